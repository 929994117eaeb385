// Mamba-2's scan (state space duality): forward and backward, in chunks of time.
//
//   dt   = clamp(softplus(dt + dt_bias))                       one number a token and head
//   H_t  = exp(dt_t A) H_{t-1} + dt_t x_t B_t^T                state, channels x states
//   y_t  = H_t C_t + D x_t;   out = y or y * silu(z)
//
//   x, z, out, d_out, dx, dz    [batch][length][heads][channels]       channels have stride 1
//   dt, ddt                     [batch][length][heads]                 any strides
//   B, C, dB, dC                [batch][length][groups][states]        states have stride 1
//   states (all kinds)          [...][heads][channels][states], dense
//
// States and parameters are in the type of accumulation: double where tensors are double, else float.
//
// A run is a sequence: tokens of one batch row between two resets. Batches, seq_idx and cu_seqlens are
// all cut into runs by the caller, so that kernels know nothing else. A run is cut into spans of
// kSsdSpan tokens, and the state at the start of each span but the first is kept for the backward:
//
//   run      |------------ span ------------|------------ span ------------|---- span ----|
//                                           ^ boundary 0                   ^ boundary 1
//   chunks   |--64--|--64--|--64--|--64--|  ...
#pragma once

#include <cstdint>

#include "kernels/dtype.h"

namespace longspan {

inline constexpr int64_t kSsdSpan = 256;

/// A power of two from 16 to kSsdSpan. Of 2 N P + chunk P / 2 multiply-adds a token and head the second
/// part grows with the chunk, and the first runs at the same speed from 64 on.
inline constexpr int64_t kSsdChunk = 64;

struct SsdTensor {
  void* data = nullptr;
  int64_t batch = 0, token = 0, head = 0;  ///< strides in elements; head: or group
};

struct SsdRun {
  int64_t batch, begin, end;
  int64_t initial;     ///< which state of SsdParams::initial it starts from, or -1: zeros
  int64_t final;       ///< where its last state goes in SsdParams::final, or -1
  int64_t sequence;    ///< likewise in SsdParams::sequence_states
  int64_t first_span;  ///< its spans are first_span ... in SsdParams::spans
  int64_t boundary;    ///< its first boundary

  int64_t spans() const { return (end - begin + kSsdSpan - 1) / kSsdSpan; }
};

struct SsdSpan {
  int64_t run, index;  ///< index: within the run
};

struct SsdParams {
  Dtype dtype = Dtype::kFloat, dt_dtype = Dtype::kFloat;
  int64_t batch = 0, length = 0, heads = 0, groups = 0, channels = 0, states = 0;
  int64_t chunk = kSsdChunk;
  SsdTensor x, z, dt, b, c, out;  ///< z.data may be null
  const void* a = nullptr;        ///< [heads]
  const void* d = nullptr;        ///< [heads][channels] or null
  const void* dt_bias = nullptr;  ///< [heads] or null
  bool softplus = false;
  double dt_min = 0, dt_max = 0;

  const SsdRun* runs = nullptr;
  int64_t run_count = 0;
  const SsdSpan* spans = nullptr;  ///< of all runs
  int64_t span_count = 0, boundary_count = 0;

  const void* initial = nullptr;
  void *final = nullptr, *sequence_states = nullptr;
  void* boundaries = nullptr;  ///< [boundary][heads][states][channels]; null: not wanted by anyone
  int threads = 1;
};

struct SsdGradients {
  SsdTensor d_out, dx, dz, ddt, db, dc;  ///< dz.data may be null; ddt is of dt's dtype
  const void *d_final = nullptr, *d_sequence_states = nullptr;  ///< may be null
  void* d_initial = nullptr;                                    ///< written where not null
  void* da = nullptr;       ///< [heads]
  void* dd = nullptr;       ///< [heads][channels], where d is not null
  void* d_bias = nullptr;   ///< [heads]
};

// Called through kernels() (table.h).
void ssd_forward(const SsdParams&);
/// SsdParams::out is not looked at; boundaries are what the forward left there.
void ssd_backward(const SsdParams&, const SsdGradients&);

}  // namespace longspan
