// RMS normalisation with a gate. A row is read once and stays in the first cache for its two passes.
// Backward, with v what is normalised, r = rstd, y = v r weight + bias, and u = weight * dy:
//
//   dv = r (u - v r * mean(v r * u))            d_weight = sum over rows of dy v r,  d_bias = of dy
//
// (SPEC section 32.) Rows are dealt to at most 64 tasks; each leaves its sums, added in order.

#include "kernels/norm.h"

#include "kernels/parallel.h"
#include "kernels/table.h"
#include "simd/convert.h"
#include "simd/math.h"

namespace longspan::LONGSPAN_ISA {
namespace {

constexpr int64_t kMostTasks = 64, kLeastRows = 8;

template <class T>
class Norm {
  static constexpr int L = kLanes<T>;

 public:
  explicit Norm(const NormParams& p) : p_(p), groups_(p.group ? p.channels / p.group : 0) {
    rows_per_task_ = max_of(kLeastRows, ceil_div(p.rows, kMostTasks));
    tasks_ = ceil_div(p.rows, rows_per_task_);
    width_ = round_up(p.channels, L) + L;  // a group may end within a vector
  }

  void forward() const {
    const int threads = threads_for(tasks_, p_.threads);
    const int64_t bytes = round_up(width_ * int64_t(sizeof(T)), 64);
    Scratch scratch(bytes * threads);
    parallel_for(tasks_, threads, [&](int64_t task, int thread) {
      T* v = reinterpret_cast<T*>(scratch.at(bytes * thread));
      const int64_t last = min_of((task + 1) * rows_per_task_, p_.rows);
      for (int64_t r = task * rows_per_task_; r < last; ++r) forward_row(r, v);
    });
  }

  void backward(const NormGradients& g) const {
    const int threads = threads_for(tasks_, p_.threads);
    const int64_t bytes = round_up(width_ * int64_t(sizeof(T)), 64);
    Scratch scratch(2 * bytes * threads), sums(2 * bytes * max_of<int64_t>(tasks_, 1));
    parallel_for(tasks_, threads, [&](int64_t task, int thread) {
      T* normed = reinterpret_cast<T*>(scratch.at(2 * bytes * thread));
      T* u = reinterpret_cast<T*>(scratch.at(2 * bytes * thread + bytes));
      T* d_weight = reinterpret_cast<T*>(sums.at(2 * bytes * task));
      T* d_bias = reinterpret_cast<T*>(sums.at(2 * bytes * task + bytes));
      for (int64_t c = 0; c < width_; ++c) d_weight[c] = d_bias[c] = T(0);
      const int64_t last = min_of((task + 1) * rows_per_task_, p_.rows);
      for (int64_t r = task * rows_per_task_; r < last; ++r) {
        backward_row(g, r, normed, u, d_weight, d_bias);
      }
    });
    T *d_weight = static_cast<T*>(g.d_weight), *d_bias = static_cast<T*>(g.d_bias);
    for (int64_t c = 0; c < p_.channels; ++c) {
      T weight_sum = 0, bias_sum = 0;
      for (int64_t task = 0; task < tasks_; ++task) {
        weight_sum += reinterpret_cast<const T*>(sums.at(2 * bytes * task))[c];
        bias_sum += reinterpret_cast<const T*>(sums.at(2 * bytes * task + bytes))[c];
      }
      d_weight[c] = weight_sum;
      if (d_bias) d_bias[c] = bias_sum;
    }
  }

 private:
  LS_INLINE Vec<T> get(const NormRows& x, int64_t row, int64_t c, int64_t n) const {
    return load_as<T>(x.data, p_.dtype, row * x.stride + c, n);
  }
  LS_INLINE void put(const NormRows& x, int64_t row, int64_t c, Vec<T> v, int64_t n) const {
    store_as<T>(x.data, p_.dtype, row * x.stride + c, v, n);
  }
  static LS_INLINE Vec<T> parameter(const void* data, int64_t c, int64_t n) {
    const T* p = static_cast<const T*>(data) + c;
    return n >= L ? load(p) : load_first(p, n);
  }
  LS_INLINE bool gates_first() const { return p_.z.data && !p_.norm_before_gate; }

  void forward_row(int64_t row, T* v) const {
    T* rstd = static_cast<T*>(p_.rstd) + row * groups_;
    for (int64_t k = 0; k < groups_; ++k) {
      const int64_t begin = k * p_.group, end = begin + p_.group;
      Vec<T> squares = {};
      for (int64_t c = begin; c < end; c += L) {
        Vec<T> x = get(p_.x, row, c, end - c);
        if (gates_first()) {
          const Vec<T> z = get(p_.z, row, c, end - c);
          x *= z * sigmoid<T>(z);
        }
        store(v + c, x);
        squares += x * x;
      }
      const T r = T(1) / __builtin_sqrt(sum_of_lanes<T>(squares) / T(p_.group) + T(p_.eps));
      rstd[k] = r;
      for (int64_t c = begin; c < end; c += L) {
        Vec<T> y = load(v + c) * r * parameter(p_.weight, c, end - c);
        if (p_.bias) y += parameter(p_.bias, c, end - c);
        if (p_.z.data && p_.norm_before_gate) {
          const Vec<T> z = get(p_.z, row, c, end - c);
          y *= z * sigmoid<T>(z);
        }
        put(p_.out, row, c, y, end - c);
      }
    }
  }

  void backward_row(const NormGradients& g, int64_t row, T* normed, T* u, T* d_weight, T* d_bias) const {
    const T* rstd = static_cast<const T*>(p_.rstd) + row * groups_;
    for (int64_t k = 0; k < groups_; ++k) {
      const int64_t begin = k * p_.group, end = begin + p_.group;
      Vec<T> products = {};
      for (int64_t c = begin; c < end; c += L) {
        const int64_t n = end - c;
        const Vec<T> weight = parameter(p_.weight, c, n);
        Vec<T> v = get(p_.x, row, c, n), dy = get(g.d_out, row, c, n);
        if (gates_first()) {
          const Vec<T> z = get(p_.z, row, c, n);
          v *= z * sigmoid<T>(z);
        }
        v *= rstd[k];
        if (p_.z.data && p_.norm_before_gate) {
          const Vec<T> z = get(p_.z, row, c, n), s = sigmoid<T>(z);
          Vec<T> y = v * weight;
          if (p_.bias) y += parameter(p_.bias, c, n);
          put(g.dz, row, c, dy * y * s * (T(1) + z * (T(1) - s)), n);
          dy *= z * s;
        }
        // Lanes past the group's end are the next group's: nothing is added to them.
        add(d_weight + c, dy * v, n);
        add(d_bias + c, dy, n);
        dy *= weight;
        products += dy * v;
        store(normed + c, v);
        store(u + c, dy);
      }
      const T mean = sum_of_lanes<T>(products) / T(p_.group);
      for (int64_t c = begin; c < end; c += L) {
        const int64_t n = end - c;
        Vec<T> dv = (load(u + c) - load(normed + c) * mean) * rstd[k];
        if (gates_first()) {
          const Vec<T> x = get(p_.x, row, c, n), z = get(p_.z, row, c, n), s = sigmoid<T>(z);
          put(g.dz, row, c, dv * x * s * (T(1) + z * (T(1) - s)), n);
          dv *= z * s;
        }
        put(g.dx, row, c, dv, n);
      }
    }
  }

  static LS_INLINE void add(T* to, Vec<T> x, int64_t n) {
    n >= L ? store(to, load(to) + x) : store_first(to, load(to) + x, n);
  }

  const NormParams& p_;
  int64_t groups_, rows_per_task_, tasks_, width_;
};

}  // namespace

void norm_gated_forward(const NormParams& p) {
  p.dtype == Dtype::kDouble ? Norm<double>(p).forward() : Norm<float>(p).forward();
}

void norm_gated_backward(const NormParams& p, const NormGradients& g) {
  p.dtype == Dtype::kDouble ? Norm<double>(p).backward(g) : Norm<float>(p).backward(g);
}

}  // namespace longspan::LONGSPAN_ISA
