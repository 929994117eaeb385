// Runs and their spans (kernels/runs.h), as a caller cuts them.
#pragma once

#include <algorithm>
#include <vector>

#include "kernels/runs.h"

namespace longspan::test {

struct Sequences {
  std::vector<Run> runs;
  std::vector<Span> spans;
  int64_t boundaries = 0;

  void add(Run run) {
    run.first_span = int64_t(spans.size()), run.boundary = boundaries;
    for (int64_t k = 0; k < run.spans(); ++k) spans.push_back({int64_t(runs.size()), k});
    boundaries += std::max<int64_t>(0, run.spans() - 1);
    runs.push_back(run);
  }
  RunTable table() const {
    return {runs.data(), int64_t(runs.size()), spans.data(), int64_t(spans.size()), boundaries};
  }
};

}  // namespace longspan::test
