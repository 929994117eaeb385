// The instruction sets to test.
#pragma once

#include <string>
#include <vector>

#include "kernels/table.h"
#include "probe.h"

namespace longspan::test {

struct Level {
  std::string name;
  const KernelTable* kernels;
  const Probe* probe;
};

/// Those of this build that the processor runs, best first; LONGSPAN_TEST_LEVEL alone where it is set.
const std::vector<Level>& levels();

}  // namespace longspan::test
