// Tensors of any number of dimensions that lie in memory in any order.
#pragma once

#include <initializer_list>
#include <utility>
#include <vector>

#include "numbers.h"
#include "tape.h"

namespace longspan::test {

class Strided {
 public:
  Strided() = default;  ///< none
  /// NaN all over. order: dimensions from the outermost to the innermost, or none for their own; gap:
  /// between the innermost rows.
  Strided(Dtype dtype, std::vector<int64_t> shape, std::vector<size_t> order = {}, int64_t gap = 0)
      : present(true), shape_(std::move(shape)), strides_(shape_.size()) {
    if (order.empty()) {
      for (size_t d = 0; d < shape_.size(); ++d) order.push_back(d);
    }
    int64_t size = 1;
    for (size_t i = order.size(); i-- > 0;) {
      strides_[order[i]] = size;
      size = size * shape_[order[i]] + (i + 1 == order.size() ? gap : 0);
    }
    memory = Array(dtype, size_t(size), NAN);
  }
  Strided(Dtype dtype, const Strided& like) : Strided(like) {
    memory = Array(dtype, like.memory.size(), NAN);
  }

  void* data() { return present ? memory.data() : nullptr; }
  int64_t stride(size_t dimension) const { return present ? strides_[dimension] : 0; }
  void fill(Random& random, double scale = 1, double shift = 0) {
    for (const size_t i : places()) memory.set(i, shift + scale * random.normal());
  }
  /// In the order of the shape.
  std::vector<double> values() const {
    std::vector<double> all;
    for (const size_t i : places()) all.push_back(memory[i]);
    return all;
  }
  Numbers leaves() const {
    Numbers all;
    for (const double x : values()) all.push_back(Number::leaf(x));
    return all;
  }

  Array memory;
  bool present = false;

 private:
  /// Where the elements lie, in the order of the shape.
  std::vector<size_t> places() const {
    std::vector<size_t> all;
    if (!present) return all;
    all.push_back(0);
    for (size_t d = 0; d < shape_.size(); ++d) {
      std::vector<size_t> next;
      for (const size_t i : all) {
        for (int64_t k = 0; k < shape_[d]; ++k) next.push_back(i + size_t(k * strides_[d]));
      }
      all = std::move(next);
    }
    return all;
  }

  std::vector<int64_t> shape_, strides_;
};

inline Dtype sum_dtype(Dtype dtype) { return dtype == Dtype::kDouble ? dtype : Dtype::kFloat; }

/// What a test looks at, by name.
using Named = std::vector<std::pair<const char*, Strided>>;

/// Units of rounding, at the size of the greatest number, that a result in its own dtype may be away.
inline double allowed(Dtype dtype, double wide, double half) {
  return epsilon_of(dtype) * (dtype == Dtype::kFloat || dtype == Dtype::kDouble ? wide : half);
}

}  // namespace longspan::test
