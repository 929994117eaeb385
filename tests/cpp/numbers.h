// bfloat16 and half in integer arithmetic, a number at a time, for comparison; and random numbers.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "kernels/dtype.h"

namespace longspan::test {

inline double value_of_bfloat16(uint16_t h) { return std::bit_cast<float>(uint32_t(h) << 16); }

inline double value_of_half(uint16_t h) {
  const double sign = h & 0x8000 ? -1 : 1;
  const int exponent = h >> 10 & 31, mantissa = h & 1023;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  return exponent == 0 ? sign * std::ldexp(mantissa, -24)
                       : sign * std::ldexp(1024 + mantissa, exponent - 25);
}

inline double value_of(Dtype dtype, uint16_t h) {
  return dtype == Dtype::kBfloat16 ? value_of_bfloat16(h) : value_of_half(h);
}

inline uint16_t infinity_of(Dtype dtype) { return dtype == Dtype::kBfloat16 ? 0x7f80 : 0x7c00; }

/// The nearest 16-bit number, ties to even, NaN for NaN, found by bisection over the positive numbers in
/// order.
inline uint16_t nearest(Dtype dtype, double x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0, infinity = infinity_of(dtype);
  if (std::isnan(x)) return sign | infinity | 0x40;
  const double magnitude = std::fabs(x);
  uint16_t low = 0, high = infinity;
  while (high - low > 1) {
    const uint16_t middle = uint16_t((low + high) / 2);
    (value_of(dtype, middle) <= magnitude ? low : high) = middle;
  }
  const double below = value_of(dtype, low);
  // Past the greatest number infinity stands where the next one would.
  const double above = high == infinity ? 2 * below - value_of(dtype, low - 1) : value_of(dtype, high);
  if (magnitude - below > above - magnitude) return sign | high;
  if (magnitude - below < above - magnitude) return sign | low;
  return sign | (low % 2 == 0 ? low : high);
}

inline double epsilon_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kDouble:
      return std::ldexp(1, -53);
    case Dtype::kFloat:
      return std::ldexp(1, -24);
    case Dtype::kBfloat16:
      return std::ldexp(1, -9);
    case Dtype::kHalf:
      return std::ldexp(1, -12);
  }
  return 0;
}

inline const char* name_of(Dtype dtype) {
  const char* const names[] = {"float", "double", "bfloat16", "half"};
  return names[int(dtype)];
}

/// Numbers of one dtype in memory, exactly as many as asked for, so that ASan sees every step outside.
class Array {
 public:
  Array() = default;
  Array(Dtype dtype, const std::vector<double>& values)
      : dtype_(dtype), bytes_(values.size() * size_t(size_of(dtype))) {
    for (size_t i = 0; i < values.size(); ++i) set(i, values[i]);
  }
  Array(Dtype dtype, size_t count, double value) : Array(dtype, std::vector<double>(count, value)) {}

  Dtype dtype() const { return dtype_; }
  size_t size() const { return bytes_.size() / size_t(size_of(dtype_)); }
  void* data() { return bytes_.data(); }
  const void* data() const { return bytes_.data(); }
  const std::vector<unsigned char>& bytes() const { return bytes_; }

  double operator[](size_t i) const {
    switch (dtype_) {
      case Dtype::kDouble:
        return get<double>(i);
      case Dtype::kFloat:
        return get<float>(i);
      default:
        return value_of(dtype_, get<uint16_t>(i));
    }
  }
  void set(size_t i, double x) {
    switch (dtype_) {
      case Dtype::kDouble:
        return put(i, x);
      case Dtype::kFloat:
        return put(i, float(x));
      default:
        put(i, nearest(dtype_, x));
    }
  }
  std::vector<double> values() const {
    std::vector<double> all(size());
    for (size_t i = 0; i < all.size(); ++i) all[i] = (*this)[i];
    return all;
  }

 private:
  template <class T>
  T get(size_t i) const {
    T x;
    __builtin_memcpy(&x, &bytes_[i * sizeof(T)], sizeof(T));
    return x;
  }
  template <class T>
  void put(size_t i, T x) {
    __builtin_memcpy(&bytes_[i * sizeof(T)], &x, sizeof(T));
  }

  Dtype dtype_ = Dtype::kFloat;
  std::vector<unsigned char> bytes_;
};

/// The greatest difference, relative to the greatest expected magnitude or 1; infinite where infinities
/// or NaN differ.
inline double distance(const std::vector<double>& got, const std::vector<double>& expected) {
  if (got.size() != expected.size()) return INFINITY;
  double worst = 0, greatest = 1;
  for (size_t i = 0; i < got.size(); ++i) {
    if (!std::isfinite(got[i]) || !std::isfinite(expected[i])) {
      if (got[i] != expected[i]) return INFINITY;
      continue;
    }
    worst = std::max(worst, std::fabs(got[i] - expected[i]));
    greatest = std::max(greatest, std::fabs(expected[i]));
  }
  return worst / greatest;
}

/// Normally distributed, the same on every machine (std::normal_distribution is not).
class Random {
 public:
  explicit Random(uint32_t seed) : engine_(seed) {}
  double normal() {
    double sum = 0;
    for (int i = 0; i < 12; ++i) sum += double(engine_()) / 4294967296.0;
    return sum - 6;
  }
  int64_t below(int64_t n) { return int64_t(engine_() % uint64_t(n)); }
  std::vector<double> normals(size_t n) {
    std::vector<double> x(n);
    for (double& each : x) each = normal();
    return x;
  }

 private:
  std::mt19937 engine_;
};

}  // namespace longspan::test
