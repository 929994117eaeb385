// Linear attention, with or without decay: forward and backward in chunks of time, and one step.
//
//   S_t = exp(gate_t) S_{t-1} + k_t v_t^T                   z_t = exp(gate_t) z_{t-1} + k_t
//   out_t = scale q_t S_t,    or normalized:    scale q_t S_t / (scale q_t . z_t + eps)
//
//   q, dq               [batch][heads][tokens][key_channels]
//   k, dk               [batch][kv_heads][tokens][key_channels]        head h reads h / (heads /
//   kv_heads) v, dv               [batch][kv_heads][tokens][value_channels] out, d_out
//   [batch][heads][tokens][value_channels] gate, d_gate        [batch][heads][tokens], or
//   [batch][heads][tokens][key_channels] with one decay for
//                       each row of S; any strides
//   states, of S        [...][heads][key_channels][value_channels], dense
//   states, of z        [...][heads][key_channels], dense
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

struct GateTensor {
  void* data = nullptr;
  Dtype dtype = Dtype::kFloat;
  int64_t batch = 0, token = 0, head = 0, channel = 0;
};

struct LinearAttentionParams {
  Dtype dtype = Dtype::kFloat;
  int64_t batch = 0, heads = 0, kv_heads = 0, tokens = 0, key_channels = 0, value_channels = 0;
  SequenceTensor q, k, v, out;
  Gate kind = Gate::kNone;
  GateTensor gate;
  double scale = 1, eps = 0;
  bool normalized = false;

  RunTable runs;
  const void *initial = nullptr, *initial_norm = nullptr;  ///< S and z
  void *last = nullptr, *last_norm = nullptr;
  void* denominators = nullptr;  ///< [batch][heads][tokens]; null: not wanted by anyone
  void* boundaries = nullptr;    ///< [boundary][heads], S and, where normalized, z after it; or null
  int threads = 1;
};

// Called through kernels() (table.h).
void linear_attention_forward(const LinearAttentionParams&);

}  // namespace longspan
