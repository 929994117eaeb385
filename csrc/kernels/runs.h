// What the recurrences that work in chunks of time share: where tensors lie, and how sequences are cut.
//
// A run is a sequence: tokens of one batch row between two resets. Batches, cu_seqlens and the like are
// all cut into runs by the caller, so that kernels know nothing else. A run is cut into spans of kSpan
// tokens, and the state at the start of each span but the first is kept for the backward:
//
//   run      |------------ span ------------|------------ span ------------|---- span ----|
//                                           ^ boundary 0                   ^ boundary 1
#pragma once

#include <cstdint>

#include "kernels/dtype.h"

namespace longspan {

inline constexpr int64_t kSpan = 256;

/// Strides in elements; channels have stride 1.
struct SequenceTensor {
  void* data = nullptr;
  int64_t batch = 0, token = 0, head = 0;
};

/// Numbers a token (or token and channel) in a dtype of their own: gates and the like. Any strides.
struct GateTensor {
  void* data = nullptr;
  Dtype dtype = Dtype::kFloat;
  int64_t batch = 0, token = 0, head = 0, channel = 0;
};

struct Run {
  int64_t batch, begin, end;
  int64_t initial;       ///< which of the initial states it starts from, or -1: zeros
  int64_t last;          ///< where its last state goes, or -1
  int64_t first_span = 0, boundary = 0;  ///< its first ones, among all runs'

  int64_t spans() const { return (end - begin + kSpan - 1) / kSpan; }
  int64_t begin_of(int64_t span) const { return begin + span * kSpan; }
  int64_t end_of(int64_t span) const {
    return end - begin_of(span) < kSpan ? end : begin_of(span) + kSpan;
  }
};

struct Span {
  int64_t run, index;  ///< index: within the run
};

/// All of a problem's, as kernels take them.
struct RunTable {
  const Run* runs = nullptr;
  int64_t run_count = 0;
  const Span* spans = nullptr;  ///< of all runs, one run after the other
  int64_t span_count = 0, boundary_count = 0;
};

}  // namespace longspan
