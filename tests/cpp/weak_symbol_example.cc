// What a kernel must not do, for the test of check_symbols.py: code of std, instantiated with the flags
// of an instruction set and with linkage that the linker merges.
#include <algorithm>

namespace longspan::LONGSPAN_ISA {

void sort(float* first, float* last) { std::sort(first, last); }

}  // namespace longspan::LONGSPAN_ISA
