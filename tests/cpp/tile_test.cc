// kernels/tile.h and kernels/pack.h: the matrix product and the forms that enter it.
#include <algorithm>

#include "catch.h"
#include "levels.h"
#include "numbers.h"

using namespace longspan;
using namespace longspan::test;

namespace {

enum Start { kZero, kAccumulate, kRescale, kRescaleRows };

/// A product's element from its numbers: itself, or a pair of bfloat16 with the lower one first.
template <class E>
E element(const std::vector<double>& numbers) {
  if constexpr (sizeof(E) == 4 && std::is_integral_v<E>) {
    return E(nearest(Dtype::kBfloat16, numbers[0])) | E(nearest(Dtype::kBfloat16, numbers[1])) << 16;
  } else {
    return E(numbers[0]);
  }
}

template <class E>
double number(E x, int half) {
  if constexpr (std::is_integral_v<E>) {
    return value_of_bfloat16(uint16_t(x >> 16 * half));
  } else {
    return double(x);
  }
}

/// [rows][columns] of elements in rows of ld; the rest of each row is NaN.
template <class E>
std::vector<E> matrix(Random& random, int64_t rows, int64_t columns, int64_t ld, int depth) {
  E nan;
  __builtin_memset(&nan, 0xff, sizeof nan);
  std::vector<E> m(size_t(rows * ld), nan);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c)
      m[size_t(r * ld + c)] = element<E>(random.normals(size_t(depth)));
  }
  return m;
}

template <class E, class S>
void check_product(const DotProbe<E, S>& p, int lanes, Start start, bool guarded, bool unit_depth,
                   int64_t rows, int64_t columns, int64_t depth, Random& random, bool grouped = false) {
  // Grouped: 16 of the depth of all rows, then the next 16.
  const int64_t width = grouped ? 16 : depth, groups = (depth + width - 1) / width;
  const int64_t lda = (unit_depth ? width : rows) + 3, ldb = columns + 5, ldc = columns + lanes;
  const int64_t group = grouped ? rows * lda : 0;
  const auto a = unit_depth ? matrix<E>(random, groups * rows, width, lda, p.depth)
                            : matrix<E>(random, depth, rows, lda, p.depth);
  const auto b = matrix<E>(random, depth, columns, ldb, p.depth);
  std::vector<S> c(size_t(rows * ldc)), rescale(size_t(start == kRescaleRows ? rows : columns));
  for (S& x : c) x = start == kZero ? S(NAN) : S(random.normal());
  for (S& x : rescale) x = S(random.normal());
  const std::vector<S> before = c;
  const int64_t a_row = unit_depth ? lda : 1, a_depth = unit_depth ? 1 : lda;
  p.product({a.data(), a_row, a_depth, b.data(), ldb, c.data(), ldc, rescale.data(), int(start), guarded,
             rows, columns, depth, group});

  // Each sum rounds once a step: half a unit of the sum of magnitudes, at the most.
  const double unit = epsilon_of(sizeof(S) == 8 ? Dtype::kDouble : Dtype::kFloat);
  double worst = 0;
  size_t touched = 0;
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t n = 0; n < ldc; ++n) {
      const size_t at = size_t(m * ldc + n);
      if (n >= columns) {
        touched += std::bit_cast<std::array<char, sizeof(S)>>(c[at]) !=
                   std::bit_cast<std::array<char, sizeof(S)>>(before[at]);
        continue;
      }
      long double sum = start == kZero ? 0 : before[at];
      if (start == kRescale) sum *= rescale[size_t(n)];
      if (start == kRescaleRows) sum *= rescale[size_t(m)];
      long double magnitude = std::fabs(sum);
      for (int64_t k = 0; k < depth; ++k) {
        for (int half = 0; half < p.depth; ++half) {
          const int64_t in_a = grouped ? k / 16 * group + m * a_row + k % 16 : m * a_row + k * a_depth;
          const long double term =
              (long double)number(a[size_t(in_a)], half) * number(b[size_t(k * ldb + n)], half);
          sum += term;
          magnitude += std::fabs(term);
        }
      }
      const double allowed = unit * double(magnitude) * double(depth * p.depth + 2);
      worst = std::max(worst, std::fabs(double(c[at] - sum)) / std::max(allowed, 1e-300));
    }
  }
  INFO("start " << start << ", guarded " << guarded << ", unit depth " << unit_depth << ", " << rows
                << " x " << columns << " x " << depth << ", grouped " << grouped);
  CHECK(worst <= 1);
  CHECK(touched == 0);
}

template <class E, class S>
void check_products(const DotProbe<E, S>& p, int lanes) {
  Random random(1);
  for (const Start start : {kZero, kAccumulate, kRescale, kRescaleRows}) {
    for (const bool guarded : {false, true}) {
      for (const bool unit_depth : {false, true}) {
        for (int64_t rows = 1; rows <= 17; ++rows) {
          for (int vectors = 1; vectors <= 9; ++vectors) {
            check_product(p, lanes, start, guarded, unit_depth, rows, vectors * lanes, 3, random);
          }
        }
        // Around the blocks of AMX: 32 and 16 rows and columns, 16 deep, 64 before sums go to memory.
        for (const int64_t rows : {15, 16, 31, 49, 96}) {
          for (const int64_t depth : {15, 16, 17, 64, 130}) {
            for (const int vectors : {1, 2, 3}) {
              check_product(p, lanes, start, guarded, unit_depth, rows, vectors * lanes, depth, random);
              if (p.depth == 2 && unit_depth) {
                check_product(p, lanes, start, guarded, true, rows, vectors * lanes, depth, random,
                              true);
              }
            }
          }
        }
        check_product(p, lanes, start, guarded, unit_depth, 64, 64, 64, random);
        check_product(p, lanes, start, guarded, unit_depth, 5, 2 * lanes, 1, random);
        check_product(p, lanes, start, guarded, unit_depth, 5, 2 * lanes, 0, random);
      }
    }
  }
}

/// Zero times infinity or NaN: nothing when guarded, NaN when not.
template <class E, class S>
void check_guard(const DotProbe<E, S>& p, int lanes) {
  for (const double huge : {double(INFINITY), -double(INFINITY), double(NAN)}) {
    for (const bool zero_left : {false, true}) {
      for (int half = 0; half < p.depth; ++half) {
        std::vector<double> zero(size_t(p.depth), 2), other(size_t(p.depth), 3);
        zero[size_t(half)] = 0, other[size_t(half)] = huge;
        const std::vector<E> a(5, element<E>(zero_left ? zero : other));
        const std::vector<E> b(size_t(lanes), element<E>(zero_left ? other : zero));
        std::vector<S> c(size_t(5 * lanes), S(1));
        p.product({a.data(), 1, 5, b.data(), lanes, c.data(), lanes, nullptr, kAccumulate, true, 5,
                   lanes, 1, 0});
        for (const S x : c) CHECK(x == S(1 + (p.depth - 1) * 6));
        p.product({a.data(), 1, 5, b.data(), lanes, c.data(), lanes, nullptr, kAccumulate, false, 5,
                   lanes, 1});
        for (const S x : c) CHECK(std::isnan(x));
      }
    }
  }
}

/// Number `channel` of `token`, out of an operand in one of the forms.
struct Token {
  int64_t n, channels, stride;
  Array memory;
  Token(Random& random, Dtype dtype, int64_t n_, int64_t channels_, int64_t stride_)
      : n(n_), channels(channels_), stride(stride_),
        memory(dtype, random.normals(size_t((n_ - 1) * stride_ + channels_))) {}
  Rows rows() const { return {memory.data(), memory.dtype(), stride, n, channels}; }
  double at(int64_t t, int64_t c) const { return memory[size_t(t * stride + c)]; }
};

template <class E, class S>
void check_forms(const DotProbe<E, S>& p, int lanes, Dtype dtype, int64_t n, int64_t channels,
                 int64_t stride, bool native) {
  INFO(name_of(dtype) << ", " << n << " tokens of " << channels << ", stride " << stride);
  Random random(uint32_t(n * 1000 + channels));
  const Token x(random, dtype, n, channels, stride);
  const int64_t up = (channels + lanes - 1) / lanes * lanes;
  const int64_t pairs = (n + p.depth - 1) / p.depth, depth = (channels + p.depth - 1) / p.depth;
  size_t wrong = 0;
  const E* data;

  if (channels % p.depth == 0) {
    std::vector<E> scratch(size_t(n * depth));
    const int64_t ld = p.by_channel(x.rows(), scratch.data(), &data);
    CHECK((data == x.memory.data()) == (native && stride % p.depth == 0));
    for (int64_t t = 0; t < n; ++t) {
      for (int64_t c = 0; c < channels; ++c) {
        wrong += number(data[t * ld + c / p.depth], int(c % p.depth)) != x.at(t, c);
      }
    }
    CHECK(wrong == 0);

    const int64_t ldt = (n + lanes - 1) / lanes * lanes + lanes;
    std::vector<E> turned(size_t(depth * ldt), element<E>({7, 7}));
    p.transposed(x.rows(), turned.data(), ldt);
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t t = 0; t < ldt; ++t) {
        const double expected = t < n ? x.at(t, c) : t < ldt - lanes ? 0 : 7;
        wrong += number(turned[size_t(c / p.depth * ldt + t)], int(c % p.depth)) != expected;
      }
    }
    CHECK(wrong == 0);
  }
  for (const bool padded : {false, true}) {
    std::vector<E> scratch(size_t(pairs * up));
    const int64_t ld = p.by_token(x.rows(), padded, scratch.data(), &data);
    CHECK((data == x.memory.data()) == (native && p.depth == 1 && (!padded || channels % lanes == 0)));
    for (int64_t t = 0; t < pairs * p.depth; ++t) {
      for (int64_t c = 0; c < channels; ++c) {
        const double expected = t < n ? x.at(t, c) : 0;
        wrong += number(data[t / p.depth * ld + c], int(t % p.depth)) != expected;
      }
    }
    CHECK(wrong == 0);
    CHECK(p.all_finite(data, ld, pairs, channels));
  }
}

template <class E, class S>
void check_all_finite(const DotProbe<E, S>& p, int lanes) {
  const int64_t rows = 3, columns = lanes + 1, ld = columns + 2;
  for (int64_t at = 0; at < rows * ld; ++at) {
    for (const double bad : {double(INFINITY), -double(INFINITY), double(NAN)}) {
      for (int half = 0; half < p.depth; ++half) {
        std::vector<E> x(size_t(rows * ld), element<E>({1, -1}));
        std::vector<double> numbers(size_t(p.depth), 1);
        numbers[size_t(half)] = bad;
        x[size_t(at)] = element<E>(numbers);
        CHECK(p.all_finite(x.data(), ld, rows, columns) == (at % ld >= columns));
      }
    }
  }
}

template <class E, class S>
void check_store_transposed(const DotProbe<E, S>& p, int lanes, Dtype dtype) {
  const int64_t n = lanes + 3, channels = 2 * lanes + 1, stride = channels + 2, ld = 3 * lanes;
  Random random(5);
  std::vector<S> in(size_t(channels * ld)), scale(static_cast<size_t>(ld));
  for (S& x : in) x = S(random.below(64));
  for (S& x : scale) x = S(random.below(4));
  Array out(dtype, size_t((n - 1) * stride + channels), 9);
  p.store_transposed(in.data(), ld, {out.data(), dtype, stride, n, channels}, scale.data());
  for (int64_t i = 0; i < int64_t(out.size()); ++i) {
    const int64_t t = i / stride, c = i % stride;
    const double expected = c < channels ? double(in[size_t(c * ld + t)] * scale[size_t(t)]) : 9;
    CHECK(out[size_t(i)] == expected);
  }
}

template <class E, class S>
void check_pack(const DotProbe<E, S>& p, int lanes, std::initializer_list<Dtype> dtypes, Dtype native) {
  for (const Dtype dtype : dtypes) {
    for (const int64_t n : {1, 2, 15, 16, 17, 64}) {
      for (const int64_t channels : {1, 2, 15, 16, 34, 64}) {
        for (const int64_t gap : {0, 1, 6}) {
          check_forms(p, lanes, dtype, n, channels, channels + gap, dtype == native);
        }
      }
    }
  }
  check_all_finite(p, lanes);
}

}  // namespace

TEST_CASE("Product: every remainder, stride, start and guard", "[tile]") {
  for (const Level& level : levels()) {
    INFO(level.name);
    const Probe& p = *level.probe;
    check_products(p.dot_f32, p.f32.lanes);
    check_products(p.dot_f64, p.f64.lanes);
    if (p.dot_bf16) check_products(*p.dot_bf16, p.f32.lanes);
  }
}

TEST_CASE("a guarded product adds nothing for zero times infinity", "[tile]") {
  for (const Level& level : levels()) {
    INFO(level.name);
    const Probe& p = *level.probe;
    check_guard(p.dot_f32, p.f32.lanes);
    check_guard(p.dot_f64, p.f64.lanes);
    if (p.dot_bf16) check_guard(*p.dot_bf16, p.f32.lanes);
  }
}

TEST_CASE("operands in each of their forms", "[tile]") {
  for (const Level& level : levels()) {
    INFO(level.name);
    const Probe& p = *level.probe;
    const auto floats = {Dtype::kFloat, Dtype::kBfloat16, Dtype::kHalf};
    check_pack(p.dot_f32, p.f32.lanes, floats, Dtype::kFloat);
    check_pack(p.dot_f64, p.f64.lanes, {Dtype::kDouble}, Dtype::kDouble);
    if (p.dot_bf16) check_pack(*p.dot_bf16, p.f32.lanes, {Dtype::kBfloat16}, Dtype::kBfloat16);
    for (const Dtype dtype : floats) check_store_transposed(p.dot_f32, p.f32.lanes, dtype);
    check_store_transposed(p.dot_f64, p.f64.lanes, Dtype::kDouble);
  }
}
