// The kernels of one instruction set, and the choice among those that this processor has.
//
// A family's header declares its functions; a line here puts one into the table, and callers write
// kernels().attention_forward(params). Each instruction set defines the functions in its namespace.
#pragma once

#include "kernels/attention.h"
#include "kernels/conv.h"
#include "kernels/delta_rule.h"
#include "kernels/favor.h"
#include "kernels/linear_attention.h"
#include "kernels/merge.h"
#include "kernels/norm.h"
#include "kernels/rotary.h"
#include "kernels/selected_attention.h"
#include "kernels/selective_scan.h"
#include "kernels/ssd.h"

#define LONGSPAN_EACH_KERNEL(X)  \
  X(attention_forward)           \
  X(attention_backward)          \
  X(attention_mask_backward)     \
  X(attention_append)            \
  X(attention_decode)            \
  X(conv_forward)                \
  X(conv_backward)               \
  X(conv_update)                 \
  X(delta_rule_forward)          \
  X(delta_rule_backward)         \
  X(delta_rule_step)             \
  X(favor_forward)               \
  X(favor_exp_rows)              \
  X(favor_backward)              \
  X(linear_attention_forward)    \
  X(linear_attention_backward)   \
  X(linear_attention_step)       \
  X(merge_forward)               \
  X(merge_backward)              \
  X(norm_gated_forward)          \
  X(norm_gated_backward)         \
  X(rotary_apply)                \
  X(select_blocks)               \
  X(selected_attention_forward)  \
  X(selected_attention_backward) \
  X(selective_scan_forward)      \
  X(selective_scan_backward)     \
  X(selective_state_update)      \
  X(ssd_forward)                 \
  X(ssd_backward)

namespace longspan {

struct KernelTable {
  const char* name;
#define LONGSPAN_MEMBER(kernel) decltype(&longspan::kernel) kernel;
  LONGSPAN_EACH_KERNEL(LONGSPAN_MEMBER)
#undef LONGSPAN_MEMBER
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
#define LONGSPAN_DECLARE(kernel) decltype(longspan::kernel) kernel;
LONGSPAN_EACH_KERNEL(LONGSPAN_DECLARE)
#undef LONGSPAN_DECLARE
}  // namespace LONGSPAN_ISA
#endif

}  // namespace longspan
