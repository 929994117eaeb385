// Runs the tests on every instruction set that this processor has, or on LONGSPAN_TEST_LEVEL alone;
// where the processor lacks that one, says so and exits with 77, which ctest takes for "skipped".
#if __has_include(<catch2/catch_session.hpp>)
#include <catch2/catch_session.hpp>
#else
#define CATCH_CONFIG_RUNNER
#include <catch2/catch.hpp>
#endif

#include <cstdio>

#include "kernels/scratch.h"
#include "levels.h"

int main(int argc, char** argv) {
  if (longspan::test::levels().empty()) {
    std::printf("skipped: this processor does not run %s\n", std::getenv("LONGSPAN_TEST_LEVEL"));
    return 77;
  }
  // Scratch begins as NaN in all tests: what reads it before writing it shows.
  longspan::scratch_set_poison(true);
  return Catch::Session().run(argc, argv);
}
