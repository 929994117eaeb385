// How many exponentials a second this machine does at most, with the vector function of the kernels
// (csrc/simd/math.h) over a block that stays in the nearest cache: exp_limit THREADS
#include <omp.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>

#include "simd/math.h"

using namespace longspan::LONGSPAN_ISA;

int main(int, char** arguments) {
  constexpr int kCount = 4096, kRepeats = 20000, kUnroll = 4;
  const int threads = std::atoi(arguments[1]);
  double best = 0;
  for (int trial = 0; trial < 5; ++trial) {
    const auto start = std::chrono::steady_clock::now();
#pragma omp parallel num_threads(threads)
    {
      alignas(64) float in[kCount], out[kCount];
      for (int i = 0; i < kCount; ++i) in[i] = -0.01f * float(i);
      for (int r = 0; r < kRepeats; ++r) {
        for (int i = 0; i < kCount; i += kUnroll * kLanes<float>) {
#pragma GCC unroll 4
          for (int j = 0; j < kUnroll; ++j) {
            const int at = i + j * kLanes<float>;
            store(out + at, exp2_nonpositive<float>(load(in + at)));
          }
        }
        __asm__ volatile("" : : "r"(out) : "memory");
      }
    }
    const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
    const double rate = double(kCount) * kRepeats * threads / time.count();
    best = rate > best ? rate : best;
  }
  std::printf("%.6e\n", best);
}
