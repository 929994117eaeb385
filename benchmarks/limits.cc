// What this machine can do at most, as JSON: float FMA, bf16 dot product, reading and copying memory.
// The harness compiles it with -O3 -march=native -fopenmp and runs it: limits THREADS MEGABYTES
#include <omp.h>

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

#ifdef __AVX512F__
constexpr std::size_t kWidth = 64;
#else
constexpr std::size_t kWidth = 32;
#endif
typedef float Vector __attribute__((vector_size(kWidth)));
constexpr int kLanes = kWidth / sizeof(float);
// Independent chains of c = c * a + b (a product of constants would be hoisted). Latency 4 times two
// pipes needs 8; 12 and the constants fit into AVX2's 16 registers.
constexpr int kChains = 12;

// Keeps `x` in a register and unknown to the optimizer.
template <class T>
void opaque(T& x) {
#if defined(__x86_64__)
  __asm__ volatile("" : "+v"(x));
#else
  __asm__ volatile("" : "+w"(x));
#endif
}

double best_seconds(int repeats, auto&& work) {
  double best = 1e30;
  for (int i = 0; i < repeats; ++i) {
    const double start = omp_get_wtime();
    work();
    best = std::min(best, omp_get_wtime() - start);
  }
  return best;
}

// One thread's chains of multiply-adds; `step` is one of them on accumulator `c`.
template <class Accumulator, class Step>
void chains(long iterations, Step step) {
  Accumulator c[kChains] = {};
  for (long i = 0; i < iterations; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < kChains; ++j) step(c[j]);
#pragma GCC unroll 12
    for (int j = 0; j < kChains; ++j) opaque(c[j]);
  }
}

template <class Accumulator, class Step>
double gflops(int threads, double flops_a_step, Step step) {
  const long iterations = 4'000'000;
  const double seconds = best_seconds(5, [&] {
#pragma omp parallel num_threads(threads)
    chains<Accumulator>(iterations, step);
  });
  return threads * iterations * kChains * flops_a_step / seconds / 1e9;
}

double read_gigabytes(int threads, const float* data, std::size_t n) {
  const double seconds = best_seconds(7, [&] {
#pragma omp parallel num_threads(threads)
    {
      const std::size_t part = n / omp_get_num_threads() / (8 * kLanes) * (8 * kLanes);
      const float* from = data + omp_get_thread_num() * part;
      Vector sums[8] = {};
      for (std::size_t i = 0; i < part; i += 8 * kLanes) {
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) {
          sums[j] += *reinterpret_cast<const Vector*>(from + i + j * kLanes);
        }
      }
      for (Vector& sum : sums) opaque(sum);
    }
  });
  return n * sizeof(float) / seconds / 1e9;
}

// Bytes read plus bytes written.
double copy_gigabytes(int threads, const float* from, float* to, std::size_t n) {
  const double seconds = best_seconds(7, [&] {
#pragma omp parallel for simd num_threads(threads)
    for (std::size_t i = 0; i < n; ++i) to[i] = from[i];
  });
  return 2 * n * sizeof(float) / seconds / 1e9;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: limits THREADS MEGABYTES\n");
    return 2;
  }
  const int threads = std::atoi(argv[1]);
  const std::size_t n = std::atoll(argv[2]) * std::size_t{1000000} / sizeof(float);

  Vector a = {}, b = {};
  opaque(a), opaque(b);
  const double fma = gflops<Vector>(threads, 2.0 * kLanes, [=](Vector& c) { c = c * a + b; });
  std::printf("{\"threads\": %d, \"float_gflops\": %.4g", threads, fma);
#ifdef __AVX512BF16__
  __m512i bits = _mm512_setzero_si512();
  opaque(bits);
  const __m512bh pair = (__m512bh)bits;
  const double dot = gflops<__m512>(threads, 4.0 * kLanes, [=](__m512& c) {
    c = _mm512_dpbf16_ps(c, pair, pair);
  });
  std::printf(", \"bf16_gflops\": %.4g", dot);
#endif

  // Written by the threads that will read it, so that the pages lie where they are read.
  const auto aligned = [&] {
    return static_cast<float*>(std::aligned_alloc(64, (n * sizeof(float) + 63) / 64 * 64));
  };
  float* from = aligned();
  float* to = aligned();
  if (from == nullptr || to == nullptr) {
    std::fprintf(stderr, "limits: no memory for two buffers of %s MB\n", argv[2]);
    return 1;
  }
#pragma omp parallel for num_threads(threads)
  for (std::size_t i = 0; i < n; ++i) from[i] = to[i] = 1.0f;
  std::printf(", \"read_gbytes\": %.4g", read_gigabytes(threads, from, n));
  std::printf(", \"copy_gbytes\": %.4g}\n", copy_gigabytes(threads, from, to, n));
  std::free(from);
  std::free(to);
}
