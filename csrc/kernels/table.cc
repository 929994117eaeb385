#include "kernels/table.h"

#define LONGSPAN_QUOTE_(x) #x
#define LONGSPAN_QUOTE(x) LONGSPAN_QUOTE_(x)

namespace longspan::LONGSPAN_ISA {

extern const KernelTable table;
const KernelTable table = {
    LONGSPAN_QUOTE(LONGSPAN_ISA), attention_forward, attention_backward, attention_mask_backward,
    attention_decode,
};

}  // namespace longspan::LONGSPAN_ISA
