// Mamba's selective scan: forward, backward, and the single step of decoding.
//
//   D_t = softplus(delta_t + bias)                       one step size a channel
//   h_t = exp(D_t A) h_{t-1} + D_t B_t u_t               N states a channel
//   y_t = C_t . h_t + D u_t,   out_t = y_t silu(z_t)     (complex A: 2 Re(C_t . h_t))
//
//   u, delta, z, out     [batch][channel][time]
//   A                    [channel][state][part]
//   B, C                 [batch][group][state][time][part], or [channel][state][part] for all time
//   D, bias              [channel]
//   initial, last state  [batch][channel][state][part]
//
// Channel d belongs to group d / (channels / groups). A part is the real or imaginary one.
//
// In the order of memory that suits the caller: time or channels innermost are both read as they
// lie, in squares of a vector's width, and turned in registers; anything else is gathered.
#pragma once

#include <cstdint>

#include "kernels/dtype.h"

namespace longspan {

/// Strides in elements; 0 for a dimension that the tensor does not have.
struct ScanTensor {
  void* data = nullptr;
  Dtype dtype = Dtype::kFloat;
  int64_t batch = 0, group = 0, channel = 0, state = 0, time = 0, part = 0;
};

struct SelectiveScanParams {
  bool in_double = false;  ///< then every tensor is double; else none is
  bool complex = false;
  bool b_varies = true, c_varies = true;  ///< with time, batch and group
  bool softplus = false;
  int64_t batch = 0, groups = 1, channels = 0, states = 0;
  int64_t steps = 0;            ///< of each sequence, or of all where they are packed
  const int64_t* cu = nullptr;  ///< [batch + 1]: packed; the batch stride of u, B and so on is 0
  ScanTensor u, delta, A, B, C, D, z, bias, out;  ///< D, z, bias: data may be null
  ScanTensor initial, last;                       ///< initial: data may be null (zero)
  /// The state before each chunk, [chunk][state][part][channel], chunks of all sequences one after
  /// the other, in double or float. Null: not kept (forward only).
  void* chunk_states = nullptr;
  int threads = 1;
};

/// Steps between the states that are kept for the backward, which takes so many at a time: at most
/// half a word of state a channel and step, but never so long that a chunk leaves the cache.
inline constexpr int64_t scan_chunk(int64_t states) {
  const int64_t wanted = (2 * states + 31) / 32 * 32;
  return wanted < 32 ? 32 : wanted > 256 ? 256 : wanted;
}

/// Of the forward's layouts and meanings; those not wanted have null data.
struct SelectiveScanGradients {
  ScanTensor d_out, d_last;                    ///< d_last: data may be null
  ScanTensor du, d_delta, dA, dB, dC, dD, dz, d_bias, d_initial;
};

/// One step of the scan, in place. Mamba-1 is one head: [batch][channel] with channel D.
///
///   state             [slot][head][channel][state]
///   x, dt, z, out     [batch][head][channel]
///   A                 [head][channel][state]
///   B, C              [batch][group][state]       head h reads group h / (heads / groups)
///   D, bias           [head][channel]
///
/// The same strides as above, where `time` is a head's.
struct StateUpdateParams {
  bool in_double = false, softplus = false;
  int64_t batch = 0, heads = 1, groups = 1, channels = 0, states = 0;
  const int64_t* slots = nullptr;  ///< [batch]: whose state is row b's; negative: none, output 0
  ScanTensor state, x, dt, A, B, C, D, z, bias, out;
  int threads = 1;
};

// Called through kernels() (table.h).
void selective_scan_forward(const SelectiveScanParams&);
void selective_scan_backward(const SelectiveScanParams&, const SelectiveScanGradients&);
void selective_state_update(const StateUpdateParams&);

}  // namespace longspan
