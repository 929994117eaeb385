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
// Batches, seq_idx and cu_seqlens are all cut into runs and spans: runs.h.
#pragma once

#include <cstdint>

#include "kernels/dtype.h"
#include "kernels/runs.h"

namespace longspan {

/// A power of two from 16 to kSpan. Of 2 N P + chunk P / 2 multiply-adds a token and head the second
/// part grows with the chunk, and the first runs at the same speed from 64 on.
inline constexpr int64_t kSsdChunk = 64;

struct SsdParams {
  Dtype dtype = Dtype::kFloat, dt_dtype = Dtype::kFloat;
  int64_t batch = 0, length = 0, heads = 0, groups = 0, channels = 0, states = 0;
  int64_t chunk = kSsdChunk;
  SequenceTensor x, z, dt, b, c, out;  ///< z.data may be null
  const void* a = nullptr;        ///< [heads]
  const void* d = nullptr;        ///< [heads][channels] or null
  const void* dt_bias = nullptr;  ///< [heads] or null
  bool softplus = false;
  double dt_min = 0, dt_max = 0;

  RunTable runs;
  int64_t packed =
      0;  ///< sequences of cu_seqlens; 0: there is none, and a run's number is a batch row's

  const void* initial = nullptr;
  void* final = nullptr;            ///< [batch][heads][channels][states]; null: not wanted by anyone
  void* sequence_states = nullptr;  ///< likewise of each packed sequence
  void* boundaries = nullptr;  ///< [boundary][heads][states][channels]; null: not wanted by anyone
  int threads = 1;
};

struct SsdGradients {
  SequenceTensor d_out, dx, dz, ddt, db, dc;  ///< dz.data may be null; ddt is of dt's dtype
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
