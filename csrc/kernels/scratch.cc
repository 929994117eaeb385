#include "kernels/scratch.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace longspan {
namespace {
std::atomic<int64_t> held{0};
std::atomic<int64_t> peak{0};
std::atomic<bool> poison{false};
}  // namespace

void* scratch_acquire(size_t bytes) {
  const size_t rounded = (bytes + 63) / 64 * 64;
  void* p = std::aligned_alloc(64, rounded == 0 ? 64 : rounded);
  if (p == nullptr) {
    std::fprintf(stderr, "longspan: no memory for %zu bytes of scratch\n", bytes);
    std::abort();
  }
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
