// Derivatives of scalar loops by reverse mode: what the kernels' backward is compared with. A loop that
// is written on Numbers leaves on the tape what each result was made of.
#pragma once

#include <cmath>
#include <cstddef>
#include <vector>

namespace longspan::test {

struct TapeNode {
  size_t parents[2];
  double factors[2];  ///< derivatives by the parents
};

/// Entry 0 stands for every constant.
inline std::vector<TapeNode> tape{TapeNode{}};

class Number {
 public:
  Number() = default;
  Number(double x) : value(x) {}
  Number(double x, TapeNode made_of) : value(x), node(tape.size()) { tape.push_back(made_of); }
  /// What derivatives are taken by.
  static Number leaf(double x) { return Number(x, {}); }
  Number& operator+=(Number x);

  double value = 0;
  size_t node = 0;
};

inline Number operator+(Number a, Number b) { return {a.value + b.value, {{a.node, b.node}, {1, 1}}}; }
inline Number operator-(Number a, Number b) { return {a.value - b.value, {{a.node, b.node}, {1, -1}}}; }
inline Number operator*(Number a, Number b) {
  return {a.value * b.value, {{a.node, b.node}, {b.value, a.value}}};
}
inline Number& Number::operator+=(Number x) { return *this = *this + x; }

inline Number function_of(Number x, double value, double derivative) {
  return {value, {{x.node, 0}, {derivative, 0}}};
}
inline Number exp(Number x) { return function_of(x, std::exp(x.value), std::exp(x.value)); }
inline Number cos(Number x) { return function_of(x, std::cos(x.value), -std::sin(x.value)); }
inline Number sin(Number x) { return function_of(x, std::sin(x.value), std::cos(x.value)); }
inline double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
inline Number silu(Number x) {
  const double s = sigmoid(x.value);
  return function_of(x, x.value * s, s * (1 + x.value * (1 - s)));
}
inline double softplus(double x) { return std::log1p(std::exp(x)); }
inline Number softplus(Number x) { return function_of(x, softplus(x.value), sigmoid(x.value)); }
inline Number inverse(Number x) { return function_of(x, 1 / x.value, -1 / (x.value * x.value)); }
inline Number inverse_root(Number x) {
  const double r = 1 / std::sqrt(x.value);
  return function_of(x, r, -r / (2 * x.value));
}

using Numbers = std::vector<Number>;

inline std::vector<double> values_of(const Numbers& x) {
  std::vector<double> all;
  for (const Number& each : x) all.push_back(each.value);
  return all;
}

/// The sum of x times given weights: a loss whose gradients by x are the weights.
inline Number weighted_sum(const Numbers& x, const std::vector<double>& weights) {
  Number sum;
  for (size_t i = 0; i < weights.size(); ++i) sum += x[i] * weights[i];
  return sum;
}

/// Of one result by everything on the tape, which is empty afterwards.
class Gradients {
 public:
  explicit Gradients(Number result) : by_node_(tape.size()) {
    by_node_[result.node] = 1;
    for (size_t i = tape.size(); i-- > 1;) {
      for (int k = 0; k < 2; ++k) by_node_[tape[i].parents[k]] += tape[i].factors[k] * by_node_[i];
    }
    tape.resize(1);
  }
  std::vector<double> by(const Numbers& leaves) const {
    std::vector<double> all;
    for (const Number& each : leaves) all.push_back(by_node_[each.node]);
    return all;
  }

 private:
  std::vector<double> by_node_;
};

}  // namespace longspan::test
