#include "kernels/table.h"

#define LONGSPAN_QUOTE_(x) #x
#define LONGSPAN_QUOTE(x) LONGSPAN_QUOTE_(x)

namespace longspan::LONGSPAN_ISA {

extern const KernelTable table;
const KernelTable table = {LONGSPAN_QUOTE(LONGSPAN_ISA),
#define LONGSPAN_ENTRY(kernel) kernel,
                           LONGSPAN_EACH_KERNEL(LONGSPAN_ENTRY)
#undef LONGSPAN_ENTRY
};

}  // namespace longspan::LONGSPAN_ISA
