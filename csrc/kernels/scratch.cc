#include "kernels/scratch.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace longspan {
namespace {
constexpr size_t kHugePage = size_t(2) << 20;
std::atomic<int64_t> held{0};
std::atomic<int64_t> peak{0};
std::atomic<bool> poison{false};
}  // namespace

void prefer_huge_pages(void* p, size_t bytes) {
#if defined(__linux__)
  if (bytes < 2 * kHugePage) return;
  const uintptr_t begin = (uintptr_t(p) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (uintptr_t(p) + bytes) / kHugePage * kHugePage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a hint: may well be refused
#else
  (void)p, (void)bytes;
#endif
}

void* scratch_acquire(size_t bytes) {
  const size_t page = bytes >= 2 * kHugePage ? kHugePage : 64;
  const size_t rounded = (bytes + page - 1) / page * page;
  void* p = std::aligned_alloc(page, rounded == 0 ? page : rounded);
  if (p == nullptr) {
    std::fprintf(stderr, "longspan: no memory for %zu bytes of scratch\n", bytes);
    std::abort();
  }
  prefer_huge_pages(p, rounded);
  if (poison.load(std::memory_order_relaxed)) std::memset(p, 0xff, rounded);
  const int64_t now = held.fetch_add(int64_t(bytes)) + int64_t(bytes);
  int64_t seen = peak.load();
  while (seen < now && !peak.compare_exchange_weak(seen, now)) {
  }
  return p;
}

void scratch_release(void* p, size_t bytes) {
  std::free(p);
  held.fetch_sub(int64_t(bytes));
}

int64_t scratch_peak() { return peak.load(); }
void scratch_reset_peak() { peak.store(held.load()); }
void scratch_set_poison(bool on) { poison.store(on); }

}  // namespace longspan
