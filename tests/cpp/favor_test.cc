// FAVOR+'s exponentials and their gradients against a scalar loop.
#include "agreement.h"
#include "kernels/table.h"

using namespace longspan;
using namespace longspan::test;

namespace {

struct Case {
  const char* name;
  int64_t rows = 5, channels = 7, features = 11;
  double eps = 0, size = 1;  ///< size: of x, so that exponents are far apart
  bool both_signs = false;   ///< hyperbolic: directions and their opposites

  int64_t directions() const { return both_signs ? 2 * features : features; }
  int64_t padded_directions() const { return padded(directions()); }
  int64_t padded_channels() const { return padded(channels); }

 private:
  static int64_t padded(int64_t n) { return (n + kFavorPadding - 1) / kFavorPadding * kFavorPadding; }
};

const Case kCases[] = {
    {.name = "plain"},
    {.name = "eps", .eps = 1e-2},
    {.name = "hyperbolic", .features = 21, .eps = 1e-3, .both_signs = true},
    {.name = "one of each", .rows = 1, .channels = 1, .features = 1},
    {.name = "whole vectors", .rows = 48, .channels = 16, .features = 32},
    {.name = "one more", .rows = 49, .channels = 17, .features = 33, .eps = 1e-3},
    {.name = "one less", .rows = 47, .channels = 15, .features = 31},
    {.name = "several tasks", .rows = 197, .channels = 40, .features = 65},
    {.name = "far apart", .rows = 20, .size = 8},
    {.name = "no rows", .rows = 0},
};

struct Inputs {
  Strided x, directions, offset, y, d_y;
  std::vector<double> along;  ///< x W^T as it is exactly, which rounding of x and W came before

  Inputs(const Case& c, Dtype dtype) {
    Random random(3);
    const Dtype sums = sum_dtype(dtype);
    x = Strided(sums, {c.rows, c.channels});
    directions = Strided(sums, {c.directions(), c.channels});
    offset = Strided(sums, {c.rows});
    y = Strided(dtype, {c.rows, c.directions()});
    d_y = Strided(dtype, {c.rows, c.directions()});
    x.fill(random, c.size * 0.3), directions.fill(random);
    offset.fill(random, 0.5, 2), d_y.fill(random);
    for (int64_t i = 0; i < c.features * c.channels && c.both_signs; ++i) {
      directions.memory.set(size_t(c.features * c.channels + i), -directions.memory[size_t(i)]);
    }
    for (int64_t r = 0; r < c.rows; ++r) {
      for (int64_t i = 0; i < c.directions(); ++i) {
        double sum = 0;
        for (int64_t k = 0; k < c.channels; ++k) {
          sum += x.memory[size_t(r * c.channels + k)] * directions.memory[size_t(i * c.channels + k)];
        }
        along.push_back(sum);
      }
    }
    // What the backward gets is rounded to the features' own dtype.
    const std::vector<double> exact = exponentials(c, tops(c));
    for (size_t i = 0; i < exact.size(); ++i) y.memory.set(i, exact[i]);
  }

  std::vector<double> tops(const Case& c) const {
    std::vector<double> all;
    for (size_t i = 0; i < along.size(); i += size_t(c.directions())) {
      all.push_back(*std::max_element(along.begin() + i, along.begin() + i + c.directions()));
    }
    return all;
  }
  std::vector<double> exponentials(const Case& c, const std::vector<double>& from) const {
    std::vector<double> all;
    for (size_t i = 0; i < along.size(); ++i) {
      const double top = from[i / size_t(c.directions())];
      all.push_back(std::exp(along[i] - top) / std::sqrt(double(c.directions())) + c.eps);
    }
    return all;
  }
};

/// Results in the order of compute().
std::vector<std::vector<double>> reference(const Case& c, const Inputs& in) {
  const Numbers x = in.x.leaves();
  const std::vector<double> y = in.y.values();
  Numbers features;
  for (int64_t r = 0; r < c.rows; ++r) {
    const Number* row = x.data() + r * c.channels;
    for (int64_t i = 0; i < c.directions(); ++i) {
      Number exponent;  // but for what counts as a constant
      for (int64_t k = 0; k < c.channels; ++k) {
        exponent += row[k] * in.directions.memory[size_t(i * c.channels + k)] - 0.5 * row[k] * row[k];
      }
      const double value = y[features.size()];
      features.push_back(function_of(exponent, value, value - c.eps));
    }
  }
  const Gradients d(weighted_sum(features, in.d_y.values()));
  return {in.along,
          in.tops(c),
          in.exponentials(c, in.tops(c)),
          in.tops(c),
          in.exponentials(c, in.offset.values()),
          d.by(x)};
}

/// Rows of W, or its columns, with NaN after them up to what kernels read.
Array padded(const Strided& directions, int64_t rows, int64_t columns, int64_t width, bool turned) {
  Array out(directions.memory.dtype(), size_t((turned ? columns : rows) * width), NAN);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = 0; k < columns; ++k) {
      out.set(size_t(turned ? k * width + i : i * width + k),
              directions.memory[size_t(i * columns + k)]);
    }
  }
  return out;
}

Named compute(const KernelTable& kernels, const Case& c, Inputs in, int threads) {
  const auto like = [](const Strided& x) { return Strided(x.memory.dtype(), x); };
  Named results = {{"products", Strided(in.x.memory.dtype(), in.y)},
                   {"their maxima", like(in.offset)},
                   {"features", like(in.y)},
                   {"maxima", like(in.offset)},
                   {"features by an offset", Strided(in.x.memory.dtype(), in.y)},
                   {"dx", like(in.x)}};
  const int64_t directions = c.directions();
  Array columns = padded(in.directions, directions, c.channels, c.padded_directions(), true);
  Array rows = padded(in.directions, directions, c.channels, c.padded_channels(), false);
  FavorParams p;
  p.sum = in.x.memory.dtype();
  p.rows = c.rows, p.channels = c.channels, p.features = directions;
  p.x = in.x.data(), p.directions = columns.data();
  p.log_count = std::log(double(directions)), p.eps = c.eps, p.threads = threads;

  p.dtype = p.sum, p.y = results[0].second.data(), p.top = results[1].second.data();
  kernels.favor_forward(p);
  results[4].second.memory = results[0].second.memory;
  p.y = results[4].second.data(), p.top = in.offset.data();
  kernels.favor_exp_rows(p);

  p.dtype = in.y.memory.dtype(), p.y = results[2].second.data(), p.top = results[3].second.data();
  p.own_maximum = true;
  kernels.favor_forward(p);

  p.directions = rows.data(), p.y = in.y.data(), p.d_y = in.d_y.data(), p.dx = results[5].second.data();
  kernels.favor_backward(p);
  return results;
}

}  // namespace

TEST_CASE("FAVOR+'s features and their gradients agree with a scalar loop", "[favor]") {
  const auto units = [](const Case&, size_t) { return 64; };
  check_agreement<Inputs>(kCases, {Dtype::kFloat, Dtype::kDouble, Dtype::kBfloat16, Dtype::kHalf},
                          reference, compute, units);
}

TEST_CASE("FAVOR+: NaN and infinities stay in their row", "[favor]") {
  const Case c{.name = "", .rows = 60, .channels = 5, .features = 19, .eps = 1e-3};
  const size_t features = size_t(c.features), channels = size_t(c.channels);
  for (const Dtype dtype : {Dtype::kFloat, Dtype::kDouble}) {
    const Inputs clean(c, dtype);
    Inputs dirty = clean;
    dirty.x.memory.set(3 * channels + 2, NAN);
    dirty.x.memory.set(50 * channels, INFINITY);
    for (const Level& level : levels()) {
      INFO(level.name << ", " << name_of(dtype));
      const Named expected = compute(*level.kernels, c, clean, 1);
      const Named got = compute(*level.kernels, c, dirty, 1);
      for (const size_t result : {size_t(2), size_t(3), size_t(5)}) {
        const std::vector<double> a = got[result].second.values(), b = expected[result].second.values();
        const size_t width = result == 2 ? features : result == 3 ? 1 : channels;
        for (size_t i = 0; i < a.size(); ++i) {
          const size_t row = i / width;
          if (row != 3 && row != 50) CHECK(a[i] == b[i]);
        }
        CHECK(std::isnan(a[3 * width + (result == 5 ? 2 : 0)]));
        CHECK_FALSE(std::isfinite(a[50 * width]));
      }
    }
  }
}
