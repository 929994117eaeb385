// Random numbers, work in parallel, scratch memory and the choice of kernels.
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstring>
#include <memory>

#include "catch.h"
#include "kernels/scratch.h"
#include "levels.h"

using namespace longspan;
using namespace longspan::test;

TEST_CASE("Threefry-2x32-20 gives its published answers", "[parallel]") {
  // The known-answer vectors of Random123: key, counter, result.
  const uint32_t known[][6] = {
      {0, 0, 0, 0, 0x6b200159, 0x99ba4efe},
      {0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0x1cb996fc, 0xbb002be7},
      {0x13198a2e, 0x03707344, 0x243f6a88, 0x85a308d3, 0xc4923a9c, 0x483df7a0},
  };
  for (const Level& level : levels()) {
    INFO(level.name);
    for (const auto& [a, b, x0, y0, x1, y1] : known) {
      uint32_t x = x0, y = y0;
      level.probe->threefry(a, b, &x, &y);
      CHECK(x == x1);
      CHECK(y == y1);
    }
    // Lanes are independent counters.
    std::vector<uint32_t> x(size_t(level.probe->f32.lanes)), y(x.size());
    for (size_t i = 0; i < x.size(); ++i) x[i] = uint32_t(i) * 77, y[i] = 1000 - uint32_t(i);
    level.probe->threefry_lanes(3, 4, x.data(), y.data());
    for (size_t i = 0; i < x.size(); ++i) {
      uint32_t expected_x = uint32_t(i) * 77, expected_y = 1000 - uint32_t(i);
      level.probe->threefry(3, 4, &expected_x, &expected_y);
      CHECK(x[i] == expected_x);
      CHECK(y[i] == expected_y);
    }
  }
}

namespace {

struct Count {
  std::array<std::atomic<int>, 100> runs{};
  std::atomic<int> highest_thread{0};
  const Probe* probe = nullptr;
  std::atomic<int> nested_threads{1};
};

void count(void* context, int64_t task, int thread) {
  Count& c = *static_cast<Count*>(context);
  ++c.runs[size_t(task)];
  int seen = c.highest_thread;
  while (seen < thread && !c.highest_thread.compare_exchange_weak(seen, thread)) {
  }
  if (c.probe->threads_for(10, 4) > 1) c.nested_threads = 4;
}

}  // namespace

TEST_CASE("each task runs once, on no more threads than asked for", "[parallel]") {
  for (const Level& level : levels()) {
    const Probe& p = *level.probe;
    for (const int threads : {1, 2, 3, 7}) {
      INFO(level.name << ", " << threads << " threads");
      Count c;
      c.probe = &p;
      p.parallel_for(100, threads, count, &c);
      for (const auto& runs : c.runs) CHECK(runs == 1);
      CHECK(c.highest_thread < threads);
      if (threads > 1) CHECK(c.nested_threads == 1);  // a call inside a task is serial
    }
    CHECK(p.threads_for(0, 8) == 1);
    CHECK(p.threads_for(1, 8) == 1);
    CHECK(p.threads_for(3, 8) == 3);
    CHECK(p.threads_for(100, 8) == 8);
    Count none;
    none.probe = &p;
    p.parallel_for(0, 4, count, &none);
    for (const auto& runs : none.runs) CHECK(runs == 0);
  }
}

TEST_CASE("a forked child computes on one thread and ends", "[parallel]") {
  const Probe& p = *levels()[0].probe;
  Count before;
  before.probe = &p;
  p.parallel_for(100, 2, count, &before);  // libgomp's threads exist now
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    Count c;
    c.probe = &p;
    p.parallel_for(100, 2, count, &c);
    bool right = p.threads_for(100, 2) == 1 && c.highest_thread == 0;
    for (const auto& runs : c.runs) right = right && runs == 1;
    _exit(right ? 0 : 1);
  }
  int status = -1;
  REQUIRE(waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status));
  CHECK(WEXITSTATUS(status) == 0);
}

TEST_CASE("scratch is aligned, counted and poisoned", "[parallel]") {
  scratch_reset_peak();
  const int64_t base = scratch_peak();
  void* a = scratch_acquire(1000);
  void* b = scratch_acquire(1);
  CHECK(scratch_peak() == base + 1001);
  CHECK(uintptr_t(a) % 64 == 0);
  CHECK(uintptr_t(b) % 64 == 0);
  double first;
  std::memcpy(&first, a, sizeof first);
  CHECK(first != first);
  scratch_release(a, 1000);
  scratch_release(b, 1);
  CHECK(scratch_peak() == base + 1001);
  scratch_reset_peak();
  CHECK(scratch_peak() == base);
  void* empty = scratch_acquire(0);
  CHECK(empty != nullptr);
  scratch_release(empty, 0);
}

TEST_CASE("an arena hands out aligned pieces that do not overlap", "[parallel]") {
  for (const Level& level : levels()) {
    INFO(level.name);
    int64_t measured[4], placed[4];
    alignas(64) char memory[1024];
    level.probe->arena(nullptr, measured);
    level.probe->arena(memory, placed);
    const int64_t expected[] = {0, 64, 128, 128 + 832};
    for (int i = 0; i < 4; ++i) {
      CHECK(measured[i] == expected[i]);
      CHECK(placed[i] == expected[i]);
    }
  }
}

TEST_CASE("kernels are chosen by name", "[parallel]") {
  const std::string best = kernels().name;
  for (const Level& level : levels()) {
    CHECK(use_kernels(level.name.c_str()));
    CHECK(&kernels() == level.kernels);
  }
  CHECK_FALSE(use_kernels("mmx"));
  CHECK(kernels().name == levels().back().name);
  CHECK(use_kernels(best.c_str()));
}
