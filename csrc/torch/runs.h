// How sequences become the runs and spans of kernels/runs.h.
#pragma once

#include "kernels/runs.h"
#include "torch/tensors.h"

namespace longspan::binding {

/// What a kernel's RunTable points to.
struct Runs {
  std::vector<Run> runs;
  std::vector<Span> spans;
  int64_t boundaries = 0;

  void add(Run run) {
    run.first_span = int64_t(spans.size());
    run.boundary = boundaries;
    for (int64_t k = 0; k < run.spans(); ++k) spans.push_back({int64_t(runs.size()), k});
    boundaries += run.spans() > 0 ? run.spans() - 1 : 0;
    runs.push_back(run);
  }
  RunTable table() const {
    return {runs.data(), int64_t(runs.size()), spans.data(), int64_t(spans.size()), boundaries};
  }
};

/// Boundaries that any way of cutting (batch, length) into runs can have: known without looking at the
/// values of cu_seqlens and the like. One more, for an exported length must not depend on whether there
/// are any.
inline int64_t most_boundaries(int64_t batch, int64_t length) { return batch * (length / kSpan + 1); }

/// Zeros in those of most_boundaries that no kernel writes: a comparison must not meet what lay there.
inline void clear_unused(const Tensor& boundaries, int64_t used) {
  Tensor all = boundaries, unused = torch::stable::narrow(all, 0, used, all.size(0) - used);
  torch::stable::fill_(unused, 0.0);
}

/// cu_seqlens beside a tensor `what` of (1, ..., length, ...).
inline void check_offsets(const char* function, const char* what, const std::vector<int64_t>& cu,
                          int64_t batch, int64_t length) {
  STD_TORCH_CHECK(batch == 1, function, ": ", what, ": expected a batch of 1 beside cu_seqlens, got ",
                  batch);
  STD_TORCH_CHECK(cu.size() >= 2 && cu.front() == 0 && cu.back() == length, function,
                  ": cu_seqlens: expected to begin with 0 and to end with the length, ", length);
  for (size_t i = 1; i < cu.size(); ++i) {
    STD_TORCH_CHECK(cu[i] >= cu[i - 1], function, ": cu_seqlens: expected not to decrease, got ", cu[i],
                    " after ", cu[i - 1]);
  }
}

}  // namespace longspan::binding
