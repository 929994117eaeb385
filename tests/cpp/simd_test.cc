// csrc/simd: memory, shuffles, and the conversions of 16-bit numbers, all of them.
#include <algorithm>
#include <cstring>

#include "catch.h"
#include "levels.h"
#include "numbers.h"

using namespace longspan;
using namespace longspan::test;

namespace {

template <class T>
std::vector<T> counting(int64_t n, T first) {
  std::vector<T> x(static_cast<size_t>(n));
  for (size_t i = 0; i < x.size(); ++i) x[i] = first + T(i);
  return x;
}

template <class T>
void check_memory(const VectorProbe<T>& p) {
  const std::vector<T> in = counting<T>(p.lanes, 1);
  for (int n = 0; n <= p.lanes; ++n) {
    INFO(n << " of " << p.lanes << " lanes");
    // Exactly n elements exist: ASan sees a read of more.
    const std::vector<T> part(in.begin(), in.begin() + n);
    std::vector<T> out(in.size(), T(-1));
    p.load_first(part.data(), n, out.data());
    for (int i = 0; i < p.lanes; ++i) CHECK(out[size_t(i)] == (i < n ? in[size_t(i)] : T(0)));
    out.assign(in.size(), T(-1));
    p.store_first(in.data(), out.data(), n);
    for (int i = 0; i < p.lanes; ++i) CHECK(out[size_t(i)] == (i < n ? in[size_t(i)] : T(-1)));
  }
}

template <class T>
void check_shuffles(const VectorProbe<T>& p) {
  const size_t lanes = size_t(p.lanes);
  const std::vector<T> a = counting<T>(p.lanes, 0), b = counting<T>(p.lanes, 100);
  std::vector<T> low(lanes), high(lanes);
  p.interleave(a.data(), b.data(), low.data(), high.data());
  for (size_t i = 0; i < lanes; ++i) {
    const std::vector<T>& from = i % 2 ? b : a;
    CHECK(low[i] == from[i / 2]);
    CHECK(high[i] == from[lanes / 2 + i / 2]);
  }
  std::vector<T> square = counting<T>(p.lanes * p.lanes, 0);
  p.transpose(square.data());
  for (size_t i = 0; i < lanes; ++i) {
    for (size_t j = 0; j < lanes; ++j) CHECK(square[i * lanes + j] == T(j * lanes + i));
  }
  CHECK(p.sum_of_lanes(a.data()) == T(p.lanes) * T(p.lanes - 1) / 2);
}

/// NaN in the second argument comes out, NaN in the first does not.
template <class T>
void check_maximum(const VectorProbe<T>& p) {
  const T nan = std::nan("");
  const T cases[][3] = {{1, 2, 2},     {2, 1, 2},   {-1, -2, -1},        {nan, 1, 1},
                        {1, nan, nan}, {0, -0., 0}, {-INFINITY, -3, -3}, {INFINITY, 5, INFINITY}};
  for (const auto& [a, b, expected] : cases) {
    const std::vector<T> x(size_t(p.lanes), a), y(size_t(p.lanes), b);
    std::vector<T> out(size_t(p.lanes), T(-7));
    p.maximum(x.data(), y.data(), out.data());
    INFO(a << ", " << b);
    for (const T got : out) CHECK((got == expected || (std::isnan(got) && std::isnan(expected))));
  }
}

uint16_t converted(const VectorProbe<float>& p, Dtype dtype, float x) {
  std::vector<float> in(size_t(p.lanes), x);
  uint16_t out = 0x1234;
  p.store_as(in.data(), &out, dtype, 0, 1);
  return out;
}

void check_rounding(const VectorProbe<float>& p, Dtype dtype, float x, size_t& wrong) {
  const uint16_t got = converted(p, dtype, x), expected = nearest(dtype, double(x));
  if (got == expected) return;
  ++wrong;
  if (wrong <= 3) {
    UNSCOPED_INFO(name_of(dtype) << " of " << x << ": 0x" << std::hex << got << ", expected 0x"
                                 << expected);
  }
}

void check_conversions(const VectorProbe<float>& p, Dtype dtype) {
  const uint16_t infinity = infinity_of(dtype);
  size_t wrong = 0;
  for (uint32_t i = 0; i < 65536; ++i) {
    const uint16_t h = uint16_t(i);
    std::vector<float> out(size_t(p.lanes), -7.f);
    p.load_as(&h, dtype, 0, 1, out.data());
    const double expected = value_of(dtype, h);
    const uint16_t back = converted(p, dtype, out[0]);
    bool right;
    if (std::isnan(expected)) {  // stays a NaN of its sign; which one is the machine's choice
      right = std::isnan(out[0]) && std::signbit(out[0]) == (h >> 15 != 0) &&
              (back & 0x7fff) > infinity && back >> 15 == h >> 15;
    } else {
      right = std::bit_cast<uint32_t>(out[0]) == std::bit_cast<uint32_t>(float(expected)) && back == h;
    }
    if (!right && ++wrong <= 3) UNSCOPED_INFO(name_of(dtype) << " 0x" << std::hex << h);
    if (std::isnan(expected) || (h & 0x7fff) >= infinity - 1) continue;
    // The tie between this number and the next one away from zero, and the floats beside it.
    const float tie = float((expected + value_of(dtype, uint16_t(h + 1))) / 2);
    for (const float x : {tie, std::nextafterf(tie, 0), std::nextafterf(tie, tie * 2)}) {
      check_rounding(p, dtype, x, wrong);
    }
  }
  // Around the greatest number, the smallest ones, and what is beyond.
  const double greatest = value_of(dtype, uint16_t(infinity - 1));
  const double unit = greatest - value_of(dtype, uint16_t(infinity - 2));
  const double smallest = value_of(dtype, 1);
  for (const double x : {greatest, greatest + unit * 0.499, greatest + unit * 0.5, smallest,
                         smallest * 0.5, smallest * 0.501, smallest * 1.5, 0., double(INFINITY)}) {
    if (double(float(x)) != x && dtype == Dtype::kBfloat16) continue;
    check_rounding(p, dtype, float(x), wrong);
    check_rounding(p, dtype, -float(x), wrong);
  }
  const float nans[] = {NAN, -NAN, std::bit_cast<float>(0x7f800001u), std::bit_cast<float>(0xffffffffu)};
  for (const float nan : nans) wrong += (converted(p, dtype, nan) & 0x7fff) <= infinity;
  CHECK(wrong == 0);
}

/// Every dtype, every count, from an offset; nothing outside is touched.
template <class T>
void check_array_access(const VectorProbe<T>& p, Dtype dtype) {
  for (int n = 1; n <= p.lanes; ++n) {
    Array array(dtype, counting<double>(3 + n, 1));
    std::vector<T> v(size_t(p.lanes), T(-7));
    p.load_as(array.data(), dtype, 3, n, v.data());
    for (int i = 0; i < p.lanes; ++i) CHECK(v[size_t(i)] == (i < n ? T(4 + i) : T(0)));
    for (T& x : v) x = 50;
    p.store_as(v.data(), array.data(), dtype, 2, n);
    for (int i = 0; i < n + 3; ++i) CHECK(array[size_t(i)] == (i < 2 || i > n + 1 ? i + 1 : 50));
  }
}

}  // namespace

TEST_CASE("vectors in memory, and turned", "[simd]") {
  for (const Level& level : levels()) {
    INFO(level.name);
    check_memory(level.probe->f32);
    check_memory(level.probe->f64);
    check_shuffles(level.probe->f32);
    check_shuffles(level.probe->f64);
    check_maximum(level.probe->f32);
    check_maximum(level.probe->f64);
    for (const Dtype dtype : {Dtype::kFloat, Dtype::kBfloat16, Dtype::kHalf}) {
      check_array_access(level.probe->f32, dtype);
    }
    check_array_access(level.probe->f64, Dtype::kDouble);
  }
}

TEST_CASE("bfloat16 and half, every one of them", "[simd]") {
  for (const Level& level : levels()) {
    INFO(level.name);
    check_conversions(level.probe->f32, Dtype::kBfloat16);
    check_conversions(level.probe->f32, Dtype::kHalf);
  }
}
