// Compiled once, for the least of all processors: chooses the instruction set at load.
#include <pthread.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels/levels.h"  // written by the build: LONGSPAN_EACH_LEVEL(X)
#include "kernels/table.h"

#define LONGSPAN_DECLARE(level)   \
  namespace longspan::level {     \
  extern const KernelTable table; \
  }
LONGSPAN_EACH_LEVEL(LONGSPAN_DECLARE)

namespace longspan {
namespace {

/// Whether there are tile registers, and the system lets this process use them, which has to be asked.
bool has_amx() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kBf16) && (d & kTile) &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool processor_has(const char* level) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (std::strcmp(level, "avx512_amx") == 0) {
    static const bool has = processor_has("avx512_bf16") && has_amx();
    return has;
  }
  if (std::strcmp(level, "avx512_bf16") == 0) {
    return __builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512bf16");
  }
  if (std::strcmp(level, "avx512") == 0) return __builtin_cpu_supports("x86-64-v4");
  if (std::strcmp(level, "avx2") == 0) return __builtin_cpu_supports("x86-64-v3");
#endif
  return std::strcmp(level, "generic") == 0 || std::strcmp(level, "neon") == 0;
}

const KernelTable* find(const char* name) {
  for (int i = 0; const KernelTable* table = available_kernels(i); ++i) {
    if (std::strcmp(table->name, name) == 0) return table;
  }
  return nullptr;
}

const KernelTable* choose() {
  const char* wanted = std::getenv("LONGSPAN_ISA");
  if (wanted == nullptr || *wanted == '\0') return available_kernels(0);
  if (const KernelTable* table = find(wanted)) return table;
  std::fprintf(stderr,
               "longspan: LONGSPAN_ISA=%s is not among the levels of this build and processor:", wanted);
  for (int i = 0; const KernelTable* table = available_kernels(i); ++i) {
    std::fprintf(stderr, " %s", table->name);
  }
  std::fprintf(stderr, "; using %s\n", available_kernels(0)->name);
  return available_kernels(0);
}

std::atomic<const KernelTable*>& current() {
  static std::atomic<const KernelTable*> table{choose()};
  return table;
}

std::atomic<bool> forked{false};
const int watch_fork = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });

}  // namespace

const KernelTable* available_kernels(int i) {
#define LONGSPAN_ADDRESS(level) &level::table,
  static const KernelTable* const all[] = {LONGSPAN_EACH_LEVEL(LONGSPAN_ADDRESS)};
  for (const KernelTable* table : all) {
    if (processor_has(table->name) && i-- == 0) return table;
  }
  return nullptr;
}

const KernelTable& kernels() { return *current().load(std::memory_order_relaxed); }

bool use_kernels(const char* name) {
  const KernelTable* table = find(name);
  if (table != nullptr) current().store(table);
  return table != nullptr;
}

bool threads_survive() {
  (void)watch_fork;
  return !forked.load(std::memory_order_relaxed);
}

}  // namespace longspan
