// The kernels of one instruction set, and the choice among those that this processor has.
#pragma once

#include "kernels/attention.h"

namespace longspan {

struct KernelTable {
  const char* name;
  decltype(&longspan::attention_forward) attention_forward;
  decltype(&longspan::attention_backward) attention_backward;
  decltype(&longspan::attention_mask_backward) attention_mask_backward;
  decltype(&longspan::attention_decode) attention_decode;
};

/// In use: the best that was built and that the processor runs, unless LONGSPAN_ISA or
/// use_kernels() says otherwise.
const KernelTable& kernels();

/// Those that this processor runs, best first; i from 0, null past the last.
const KernelTable* available_kernels(int i);

/// By name; false, and no change, where this processor or this build does not have it.
bool use_kernels(const char* name);

#if defined(LONGSPAN_ISA)
namespace LONGSPAN_ISA {
void attention_forward(const AttentionParams&);
void attention_backward(const AttentionParams&, const AttentionGradients&);
void attention_mask_backward(const AttentionParams&, const AttentionGradients&,
                             const AttentionMask& d_mask);
void attention_decode(const AttentionParams&, const AttentionCache&);
}  // namespace LONGSPAN_ISA
#endif

}  // namespace longspan
