// Work in parallel, with results that do not depend on how many threads there are: a task is
// decided by shapes alone, and no two tasks write to the same place.
#pragma once

#include <omp.h>

#include "kernels/scratch.h"
#include "kernels/tile_amx.h"
#include "simd/simd.h"

namespace longspan {

/// False in a child of fork(): libgomp's threads did not come along, and waiting for them hangs.
bool threads_survive();

namespace LONGSPAN_ISA {

/// How many threads parallel_for will use for this many tasks.
LS_INLINE int threads_for(int64_t tasks, int threads) {
  if (tasks < 2 || threads < 2 || omp_in_parallel() || !threads_survive()) return 1;
  return int(min_of<int64_t>(threads, tasks));
}

/// body(task, thread) for each task in [0, tasks), in ascending order of start; put long tasks first.
template <class Body>
LS_INLINE void parallel_for(int64_t tasks, int threads, const Body& body) {
  threads = threads_for(tasks, threads);
  if (threads == 1) {
    [[maybe_unused]] const TileUnit unit;
    for (int64_t task = 0; task < tasks; ++task) body(task, 0);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    [[maybe_unused]] const TileUnit unit;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; ++task) body(task, omp_get_thread_num());
  }
}

/// Bytes of scratch, handed out in aligned pieces; lay_out is called twice, first to measure.
class Arena {
 public:
  explicit Arena(char* base = nullptr) : base_(base) {}
  template <class T>
  LS_INLINE T* take(int64_t count) {
    char* p = base_ + used_;
    used_ += round_up(count * int64_t(sizeof(T)), 64);
    return reinterpret_cast<T*>(p);
  }
  LS_INLINE int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

/// Scratch that is given back at the end of the scope.
class Scratch {
 public:
  LS_INLINE explicit Scratch(int64_t bytes)
      : bytes_(size_t(bytes)), p_(static_cast<char*>(scratch_acquire(bytes_))) {}
  LS_INLINE ~Scratch() { scratch_release(p_, bytes_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  LS_INLINE char* at(int64_t offset) const { return p_ + offset; }

 private:
  size_t bytes_;
  char* p_;
};

}  // namespace LONGSPAN_ISA
}  // namespace longspan
