// Merging parts of attention, forward and backward, a row at a time: memory is the limit, and each
// tensor passes once. With w_i = exp(lse_i - lse):
//
//     d out_i = w_i d out          d lse_i = w_i d out . (out_i - out)

#include "kernels/merge.h"

#include "kernels/attention_geometry.h"
#include "kernels/parallel.h"
#include "kernels/table.h"
#include "simd/math.h"

namespace longspan::LONGSPAN_ISA {
namespace {

constexpr int64_t kRows = 256;  ///< of a task
constexpr int64_t kAhead = 4;   ///< rows whose parts are asked for: they lie anywhere

template <class T>
class Merge {
  static constexpr int L = kLanes<T>;

 public:
  explicit Merge(const MergeParams& p) : p_(p), rows_(p.batch * p.heads * p.tokens) {}

  void forward() const {
    for_each_row([&](int64_t row, const T* weights) {
      const TokenRows own = at(p_.own, row), out = at(p_.out, row);
      for (int64_t c = 0; c < p_.channels; c += L) {
        const int64_t n = p_.channels - c;
        Vec<T> sum = load_as<T>(own.data, p_.dtype, c, n) * weights[0];
        for (int64_t i = 0; i < p_.count; ++i) {
          sum += load_as<T>(p_.parts, p_.dtype, place(i, row) * p_.channels + c, n) * weights[i + 1];
        }
        store_as<T>(const_cast<void*>(out.data), p_.dtype, c, sum, n);
      }
    });
  }

  void backward(const MergeGradients& g) const {
    for_each_row([&](int64_t row, const T* weights) {
      const TokenRows own = at(p_.own, row), d_out = at(g.d_out, row), d_own = at(g.d_own, row);
      const auto pass = [&](int64_t i, const void* data, int64_t begin, void* to, int64_t to_begin) {
        Vec<T> sum = {};
        for (int64_t c = 0; c < p_.channels; c += L) {
          const int64_t n = p_.channels - c;
          const Vec<T> d = load_as<T>(d_out.data, p_.dtype, c, n);
          sum += d * load_as<T>(data, p_.dtype, begin + c, n);
          store_as<T>(to, p_.dtype, to_begin + c, d * weights[i], n);
        }
        return sum_of_lanes<T>(sum);  // d_out . out_i
      };
      T along = 0;  // d_out . out
      const T first = pass(0, own.data, 0, const_cast<void*>(d_own.data), 0);
      along += weights[0] * first;
      T* d_lse = static_cast<T*>(g.d_parts_lse);
      for (int64_t i = 0; i < p_.count; ++i) {
        const int64_t j = place(i, row);
        d_lse[j] = pass(i + 1, p_.parts, j * p_.channels, g.d_parts, j * p_.channels);
        along += weights[i + 1] * d_lse[j];
      }
      static_cast<T*>(g.d_own_lse)[row] = weights[0] * (first - along);
      for (int64_t i = 0; i < p_.count; ++i) {
        const int64_t j = place(i, row);
        d_lse[j] = weights[i + 1] * (d_lse[j] - along);
      }
    });
  }

 private:
  LS_INLINE int64_t place(int64_t i, int64_t row) const { return p_.place[i * rows_ + row]; }
  LS_INLINE TokenRows at(const AttentionTensor& x, int64_t row) const {
    return rows_of(x, p_.dtype, row / p_.tokens / p_.heads, row / p_.tokens % p_.heads, row % p_.tokens);
  }

  /// body(row, weights [count + 1]); all 0 where no part has keys.
  template <class Body>
  void for_each_row(const Body& body) const {
    const int64_t tasks = ceil_div(rows_, kRows);
    const int threads = threads_for(tasks, p_.threads);
    const int64_t each = round_up((p_.count + 1) * int64_t(sizeof(T)), 64);
    Scratch scratch(each * threads);
    parallel_for(tasks, threads, [&](int64_t task, int thread) {
      T* weights = reinterpret_cast<T*>(scratch.at(each * thread));
      const int64_t end = min_of((task + 1) * kRows, rows_);
      for (int64_t row = task * kRows; row < end; ++row) {
        for (int64_t i = 0; i < p_.count && row + kAhead < end; ++i) {
          const TokenRows part{p_.parts, p_.dtype, p_.channels};
          prefetch(part.from(place(i, row + kAhead)), 1, p_.channels);
        }
        T greatest = weights[0] = static_cast<const T*>(p_.own_lse)[row];
        for (int64_t i = 0; i < p_.count; ++i) {
          const T lse = weights[i + 1] = static_cast<const T*>(p_.parts_lse)[place(i, row)];
          greatest = greatest < lse ? lse : greatest;
        }
        const T reference = greatest == -kInfinity<T> ? T(0) : greatest;
        T sum = 0;
        for (int64_t i = 0; i <= p_.count; ++i) {
          weights[i] = exp2_nonpositive<T>(broadcast((weights[i] - reference) * T(kLog2e)))[0];
          sum += weights[i];
        }
        for (int64_t i = 0; i <= p_.count; ++i) weights[i] = sum == T(0) ? T(0) : weights[i] / sum;
        body(row, weights);
      }
    });
  }

  const MergeParams& p_;
  int64_t rows_;
};

}  // namespace

void merge_forward(const MergeParams& p) {
  if (p.dtype == Dtype::kDouble) return Merge<double>(p).forward();
  Merge<float>(p).forward();
}

void merge_backward(const MergeParams& p, const MergeGradients& g) {
  if (p.dtype == Dtype::kDouble) return Merge<double>(p).backward(g);
  Merge<float>(p).backward(g);
}

}  // namespace longspan::LONGSPAN_ISA
