// The delta rule, with or without decay: forward and backward in chunks of time, and one step.
//
//   S'_t = exp(gate_t) S_{t-1}                       what is left of the state
//   r_t  = v_t - k_t S'_t                            what it gets wrong about the token
//   S_t  = S'_t + beta_t k_t^T r_t                   rows k_t, r_t
//   out_t = scale q_t S_t
//
//   q, k, dq, dk      [batch][heads][tokens][key_channels]    head h reads h / (value_heads / heads)
//   v, out, dv, d_out [batch][value_heads][tokens][value_channels]
//   beta, gate        [batch][value_heads][tokens]             and their gradients; any strides
//   states            [...][value_heads][key_channels][value_channels], dense
//
// States are in the type of accumulation: double where tensors are double, else float. How sequences
// become runs and spans: runs.h.
#pragma once

#include <cstdint>

#include "kernels/runs.h"

namespace longspan {

struct DeltaRuleParams {
  Dtype dtype = Dtype::kFloat;
  int64_t batch = 0, heads = 0, value_heads = 0, tokens = 0, key_channels = 0, value_channels = 0;
  SequenceTensor q, k, v, out;
  GateTensor beta;
  GateTensor gate;  ///< data null: no decay
  double scale = 1;

  RunTable runs;
  const void* initial = nullptr;
  void* last = nullptr;
  void* boundaries = nullptr;  ///< [boundary][value_heads] states; null: not wanted by anyone
  int threads = 1;
};

struct DeltaRuleGradients {
  SequenceTensor d_out, dq, dk, dv;
  GateTensor d_beta;
  GateTensor d_gate;             ///< where there is a gate
  const void* d_last = nullptr;  ///< may be null
  void* d_initial = nullptr;     ///< written where not null
};

/// One token for each of many states, written in place. Tensors are as above without tokens; the states'
/// value channels have stride 1.
struct DeltaRuleStep {
  Dtype dtype = Dtype::kFloat;
  int64_t batch = 0, heads = 0, value_heads = 0, key_channels = 0, value_channels = 0;
  SequenceTensor q, k, v, out;
  GateTensor beta;
  GateTensor gate;  ///< data null: no decay
  double scale = 1;
  void* state = nullptr;
  int64_t state_batch = 0, state_head = 0, state_row = 0;  ///< strides
  int threads = 1;
};

// Called through kernels() (table.h).
void delta_rule_forward(const DeltaRuleParams&);
/// DeltaRuleParams as the forward left it, boundaries included.
void delta_rule_backward(const DeltaRuleParams&, const DeltaRuleGradients&);
void delta_rule_step(const DeltaRuleStep&);

}  // namespace longspan
