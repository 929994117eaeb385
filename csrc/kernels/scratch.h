// Working memory of the kernels: counted, so that tests can assert that it is linear in the
// sequence length, and filled with NaN on request, so that tests find reads of what was never
// written. Torch-free and compiled once, for all instruction sets.
#pragma once

#include <cstddef>
#include <cstdint>

namespace longspan {

/// 64-byte aligned; aborts with a message when the system has no memory left.
void* scratch_acquire(size_t bytes);
void scratch_release(void* p, size_t bytes);

/// Asks for huge pages for memory that is about to be written for the first time, where it is large:
/// scratch and results are fresh from the system at nearly every call, and a fault for each 4 KiB
/// took a tenth of attention's backward and half of the scan's.
void prefer_huge_pages(void* p, size_t bytes);

int64_t scratch_peak();         ///< most bytes held at once since the last reset
void scratch_reset_peak();
void scratch_set_poison(bool);  ///< fill with 0xff: NaN in every floating type

}  // namespace longspan
