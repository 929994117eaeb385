// Causal depthwise convolution, with an activation: forward, backward, and the step of decoding.
//
//   pre[b][c][t] = bias[c] + sum over k < width of weight[c][k] * x[b][c][t - (width - 1) + k]
//   out          = pre, or pre * sigmoid(pre)
//
//   x, out, d_out, dx   [batch][channels][length]         time or channels of stride 1
//   weight              [channels][width], dense          in the type of accumulation: double where
//   bias                [channels]                        tensors are double, else float
//   initial, final      [batch][channels][width - 1], dense, the dtype of x: what lies before x,
//                       and what lies before whatever comes next
//   seq_idx             [batch][length]                   taps of another sequence count as zero; the
//                       initial state belongs to the first token's sequence
#pragma once

#include <cstdint>

#include "kernels/dtype.h"

namespace longspan {

struct ConvTensor {
  void* data = nullptr;
  int64_t batch = 0, channel = 0, time = 0;  ///< strides in elements
};

struct ConvParams {
  Dtype dtype = Dtype::kFloat;
  int64_t batch = 0, channels = 0, length = 0, width = 0;
  ConvTensor x, out;
  const void *weight = nullptr, *bias = nullptr;  ///< bias may be null
  const void* initial = nullptr;                  ///< null: zeros
  void* final = nullptr;                          ///< written where not null
  const int32_t* seq_idx = nullptr;
  bool silu = false;
  int threads = 1;
};

struct ConvGradients {
  ConvTensor d_out, dx;
  const void* d_final = nullptr;    ///< as final, or null
  void* d_initial = nullptr;        ///< as initial; written where not null
  void *d_weight = nullptr, *d_bias = nullptr;  ///< as weight and bias; d_bias may be null
};

/// `length` new inputs beside a state of slots: [rows][channels][slots], slots >= width - 1.
struct ConvState {
  ConvTensor state;                  ///< batch: between rows; time: between slots
  int64_t slots = 0;
  const int64_t* rows = nullptr;  ///< [batch] or null: whose state each is; below 0: nobody's, out is 0
  const int64_t* written = nullptr;  ///< [batch] or null: inputs so far, where the slots are a ring;
                                     ///< else the last slot is the newest and all move up
};

// Called through kernels() (table.h).
void conv_forward(const ConvParams&);
void conv_backward(const ConvParams&, const ConvGradients&);
/// Reads and writes the state; ConvParams::initial, final and seq_idx are not looked at.
void conv_update(const ConvParams&, const ConvState&);

}  // namespace longspan
