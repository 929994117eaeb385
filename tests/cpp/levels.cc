#include "levels.h"

#include <cstdlib>
#include <cstring>

#include "kernels/levels.h"

#define LONGSPAN_DECLARE(level)   \
  namespace longspan::level {     \
  extern const test::Probe probe; \
  }
LONGSPAN_EACH_LEVEL(LONGSPAN_DECLARE)

namespace longspan::test {

const std::vector<Level>& levels() {
  static const std::vector<Level> found = [] {
#define LONGSPAN_ADDRESS(level) &level::probe,
    const Probe* const probes[] = {LONGSPAN_EACH_LEVEL(LONGSPAN_ADDRESS)};
    const char* only = std::getenv("LONGSPAN_TEST_LEVEL");
    std::vector<Level> list;
    for (int i = 0; const KernelTable* table = available_kernels(i); ++i) {
      if (only != nullptr && std::strcmp(only, table->name) != 0) continue;
      for (const Probe* probe : probes) {
        if (std::strcmp(probe->name, table->name) == 0) list.push_back({table->name, table, probe});
      }
    }
    return list;
  }();
  return found;
}

}  // namespace longspan::test
