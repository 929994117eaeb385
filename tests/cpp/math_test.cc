// csrc/simd/math.h against <cmath> in a wider type: the whole range of bit patterns, sampled, and the
// places where formulas change.
#include <algorithm>
#include <limits>

#include "catch.h"
#include "levels.h"
#include "numbers.h"

using namespace longspan;
using namespace longspan::test;

namespace {

template <class T>
using Wide = std::conditional_t<sizeof(T) == 4, double, long double>;

template <class T>
std::vector<T> whole_range() {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  using Limits = std::numeric_limits<T>;
  std::vector<T> x;
  // An odd step: the low bits take all values too.
  const Bits step = Limits::max() > 1e50 ? Bits(0x4000000000ull * 1031 + 1) : Bits(16411);
  for (Bits bits = 0, next = step; next > bits; bits = next, next += step) {
    x.push_back(std::bit_cast<T>(bits));
  }
  for (const T special : {T(0), T(1), Limits::infinity(), Limits::quiet_NaN(), Limits::denorm_min(),
                          Limits::min(), Limits::max(), Limits::epsilon()}) {
    x.push_back(special);
    x.push_back(-special);
  }
  // Where results matter most: dense between -200 and 200, and at every half integer.
  for (int i = -40000; i <= 40000; ++i) x.push_back(T(i) / 200 + T(i % 7) * Limits::epsilon());
  for (int i = -2200; i <= 2200; ++i) {
    for (const T side : {T(-1), T(0), T(1)}) x.push_back(T(i) / 2 * (1 + side * Limits::epsilon()));
  }
  while (x.size() % 16) x.push_back(0);
  return x;
}

/// The greatest relative error over normal results, in units of the last place; elsewhere results must
/// be what `exact` says up to denormals, which may be flushed.
template <class T, class Exact>
double error_of(void (*function)(const T*, T*, int64_t), const std::vector<T>& x, const Exact& exact) {
  using Limits = std::numeric_limits<T>;
  std::vector<T> y(x.size());
  function(x.data(), y.data(), int64_t(x.size()));
  Wide<T> worst = 0;
  T worst_at = 0;
  size_t wrong = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const Wide<T> expected = exact(Wide<T>(x[i]));
    bool right = true;
    if (std::isnan(expected)) {
      right = std::isnan(y[i]);
    } else if (std::isinf(T(expected)) || std::isinf(y[i])) {
      // Rounding may decide either way within an error of the greatest number.
      right = y[i] == T(expected) ||
              std::fabs(expected) > Wide<T>(Limits::max()) * (1 - 8 * Wide<T>(Limits::epsilon()));
    } else if (std::fabs(expected) < Limits::min()) {
      right = std::fabs(Wide<T>(y[i]) - expected) <= Limits::min();
    } else {
      const Wide<T> error = std::fabs(Wide<T>(y[i]) - expected) / std::fabs(expected);
      if (error > worst) worst = error, worst_at = x[i];
    }
    if (!right && ++wrong <= 3) UNSCOPED_INFO("f(" << x[i] << ") = " << y[i]);
  }
  CHECK(wrong == 0);
  const double ulp = double(worst / Limits::epsilon());
  UNSCOPED_INFO("worst at " << worst_at);
  return ulp;
}

template <class T>
void check_functions(const VectorProbe<T>& p) {
  const std::vector<T> x = whole_range<T>();
  CHECK(error_of(p.exp2, x, [](Wide<T> v) { return std::exp2(v); }) < 2);
  CHECK(error_of(p.exp, x, [](Wide<T> v) { return std::exp(v); }) < 3);
  CHECK(error_of(p.tanh, x, [](Wide<T> v) { return std::tanh(v); }) < 4);
  std::vector<T> nonpositive;
  for (const T v : x) nonpositive.push_back(v > 0 ? -v : v);
  CHECK(error_of(p.exp2_nonpositive, nonpositive, [](Wide<T> v) { return std::exp2(v); }) < 2);
}

}  // namespace

TEST_CASE("exp2, exp and tanh over the whole range", "[simd]") {
  for (const Level& level : levels()) {
    INFO(level.name);
    check_functions(level.probe->f32);
    check_functions(level.probe->f64);
  }
}

TEST_CASE("powers of two are exact", "[simd]") {
  for (const Level& level : levels()) {
    INFO(level.name);
    for (int n = -126; n < 128; ++n) {
      const std::vector<float> x(size_t(level.probe->f32.lanes), float(n));
      std::vector<float> y(x.size());
      level.probe->f32.exp2(x.data(), y.data(), int64_t(x.size()));
      CHECK(y[0] == std::ldexp(1.f, n));
    }
    for (int n = -1022; n < 1024; ++n) {
      const std::vector<double> x(size_t(level.probe->f64.lanes), double(n));
      std::vector<double> y(x.size());
      level.probe->f64.exp2(x.data(), y.data(), int64_t(x.size()));
      CHECK(y[0] == std::ldexp(1., n));
    }
  }
}
