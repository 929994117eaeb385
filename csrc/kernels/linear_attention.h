// Linear attention, with or without decay: forward and backward in chunks of time, and one step.
//
//   S_t = exp(gate_t) S_{t-1} + k_t v_t^T                   z_t = exp(gate_t) z_{t-1} + k_t
//   out_t = scale q_t S_t,    or normalized:    scale q_t S_t / (scale q_t . z_t + eps)
//
//   q, dq      [batch][heads][tokens][key_channels]
//   k, dk      [batch][kv_heads][tokens][key_channels]         head h reads h / (heads / kv_heads)
//   v, dv      [batch][kv_heads][tokens][value_channels]
//   out        [batch][heads][tokens][value_channels]          and d_out
//   gate       [batch][heads][tokens], or one decay for each row of S:
//              [batch][heads][tokens][key_channels]            and d_gate; any strides
//   states     [...][heads][key_channels][value_channels] of S, [...][heads][key_channels] of z, dense
//
// Not causal, S and z are the sums over all of a sequence's keys. Then there are no gates, k, v, dk and
// dv may have another number of tokens, and run i of the queries reads the state of run i of the keys.
//
// States are in the type of accumulation: double where tensors are double, else float. How sequences
// become runs and spans: runs.h.
#pragma once

#include <cstdint>

#include "kernels/dtype.h"
#include "kernels/runs.h"

namespace longspan {

enum class Gate {
  kNone,
  kToken,    ///< one decay a head and token
  kChannel,  ///< one decay a head, token and key channel
};

struct LinearAttentionParams {
  Dtype dtype = Dtype::kFloat;
  int64_t batch = 0, heads = 0, kv_heads = 0, tokens = 0, key_channels = 0, value_channels = 0;
  SequenceTensor q, k, v, out;
  Gate kind = Gate::kNone;
  GateTensor gate;
  double scale = 1, eps = 0;
  bool normalized = false;

  bool causal = true;
  RunTable runs;
  RunTable key_runs;  ///< where not causal
  const void *initial = nullptr, *initial_norm = nullptr;  ///< S and z
  void *last = nullptr, *last_norm = nullptr;
  void* denominators = nullptr;  ///< [batch][heads][tokens]; null: not wanted by anyone
  /// [boundary][heads], S and, where normalized, z after it; null: not wanted by anyone. Not causal: of
  /// each run, what its queries read.
  void* boundaries = nullptr;
  int threads = 1;
};

struct LinearAttentionGradients {
  SequenceTensor d_out, dq, dk, dv;
  GateTensor d_gate;  ///< where there is a gate
  const void *d_last = nullptr, *d_last_norm = nullptr;  ///< each may be null
  void *d_initial = nullptr, *d_initial_norm = nullptr;  ///< written where not null
};

/// One token for each of many states, written in place. Tensors are as above without tokens; the states'
/// value channels, and the key channels of norm and of a gate that has them, have stride 1.
struct LinearAttentionStep {
  Dtype dtype = Dtype::kFloat;
  int64_t batch = 0, heads = 0, kv_heads = 0, key_channels = 0, value_channels = 0;
  SequenceTensor q, k, v, out;
  Gate kind = Gate::kNone;
  GateTensor gate;
  double scale = 1, eps = 0;
  void* state = nullptr;
  int64_t state_batch = 0, state_head = 0, state_row = 0;  ///< strides
  void* norm = nullptr;  ///< null: not normalized
  int64_t norm_batch = 0, norm_head = 0;
  int threads = 1;
};

// Called through kernels() (table.h).
void linear_attention_forward(const LinearAttentionParams&);
/// LinearAttentionParams as the forward left it: boundaries and, where normalized, out and denominators.
void linear_attention_backward(const LinearAttentionParams&, const LinearAttentionGradients&);
void linear_attention_step(const LinearAttentionStep&);

}  // namespace longspan
