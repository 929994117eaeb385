// csrc/simd and the kernels' building blocks behind plain function pointers, one table for each
// instruction set (probe.cc). So the tests themselves, with all that Catch2 and std instantiate, are
// compiled once and for the least of all processors.
#pragma once

#include <cstdint>

#include "kernels/dtype.h"

namespace longspan::test {

/// Arguments of Product<Dot>::run and of the choice of its template.
template <class Element, class Sum>
struct ProductCall {
  const Element* a;
  int64_t a_row, a_depth;
  const Element* b;
  int64_t ldb;
  Sum* c;
  int64_t ldc;
  const Sum* rescale;
  int start;  ///< as enum class Start
  bool guarded;
  int64_t rows, columns, depth;
  int64_t a_group;
};

/// Vector functions for T, from and to arrays of `lanes` elements unless a count is given.
template <class T>
struct VectorProbe {
  int lanes;
  void (*load_first)(const T* in, int64_t n, T* out);
  void (*store_first)(const T* in, T* out, int64_t n);
  void (*interleave)(const T* a, const T* b, T* low, T* high);
  void (*transpose)(T* square);
  void (*maximum)(const T* a, const T* b, T* out);
  T (*sum_of_lanes)(const T* in);

  // count: whole vectors
  void (*exp2)(const T* in, T* out, int64_t count);
  void (*exp2_nonpositive)(const T* in, T* out, int64_t count);
  void (*exp)(const T* in, T* out, int64_t count);
  void (*tanh)(const T* in, T* out, int64_t count);

  void (*load_as)(const void* in, Dtype dtype, int64_t at, int64_t n, T* out);
  void (*store_as)(const T* in, void* out, Dtype dtype, int64_t at, int64_t n);
};

/// X of n tokens by channels, `stride` elements between tokens.
struct Rows {
  const void* data;
  Dtype dtype;
  int64_t stride, n, channels;
};

/// A Dot's product and the forms that enter it.
template <class Element, class Sum>
struct DotProbe {
  int depth;  ///< numbers to an element
  void (*product)(const ProductCall<Element, Sum>&);
  /// -> stride; *data is x's own memory or scratch
  int64_t (*by_channel)(const Rows& x, Element* scratch, const Element** data);
  int64_t (*by_token)(const Rows& x, bool padded, Element* scratch, const Element** data);
  void (*transposed)(const Rows& x, Element* out, int64_t ld);
  bool (*all_finite)(const Element* data, int64_t stride, int64_t rows, int64_t columns);
  void (*store_transposed)(const Sum* in, int64_t ld, const Rows& out, const Sum* scale);
};

struct Probe {
  const char* name;
  VectorProbe<float> f32;
  VectorProbe<double> f64;
  DotProbe<float, float> dot_f32;
  DotProbe<double, double> dot_f64;
  const DotProbe<uint32_t, float>* dot_bf16;  ///< null where the level has none

  void (*threefry)(uint32_t key_a, uint32_t key_b, uint32_t* x, uint32_t* y);
  /// A vector of counters at once, as many as a float vector has lanes.
  void (*threefry_lanes)(uint32_t key_a, uint32_t key_b, uint32_t* x, uint32_t* y);
  int (*threads_for)(int64_t tasks, int threads);
  void (*parallel_for)(int64_t tasks, int threads, void (*body)(void*, int64_t task, int thread),
                       void* context);
  /// Lays out pieces of 1, 3 and 100 doubles from base; their offsets and the total.
  void (*arena)(char* base, int64_t* offsets);
};

}  // namespace longspan::test
