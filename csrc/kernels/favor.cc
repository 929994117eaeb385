// A task is a block of rows. Its product stays in a tile, which is read while it is in the cache:
//
//            features                        channels
//          +----------+                     +-------+
//   rows   |   y, e   |  = x W^T      rows  |  dx   |  = e W
//          +----------+                     +-------+

#include "kernels/favor.h"

#include "kernels/parallel.h"
#include "kernels/table.h"
#include "kernels/tile.h"
#include "simd/convert.h"
#include "simd/math.h"

namespace longspan::LONGSPAN_ISA {
namespace {

constexpr int64_t kRows = 48;  // a multiple of kTileRows; with 256 features the tile is 48 KB

template <class Dot>
class Favor {
  using T = typename Dot::Sum;
  static constexpr int L = kLanes<T>;

 public:
  explicit Favor(const FavorParams& p) : p_(p), tasks_(ceil_div(p.rows, kRows)) {
    tile_width_ = round_up(p.features, kFavorPadding);
    out_width_ = round_up(p.channels, kFavorPadding);
  }

  void forward() const {
    each_block(tile_width_, [&](int64_t first, int64_t count, T* tile) {
      Product<Dot> product{x(first), p_.channels, 1, directions(), tile_width_, tile, tile_width_};
      product.template run<Start::kZero>(count, tile_width_, p_.channels);
      T* top = static_cast<T*>(p_.top) + first;
      for (int64_t r = 0; r < count; ++r) {
        const T* row = tile + r * tile_width_;
        top[r] = row_maximum(row);
        if (p_.own_maximum) {
          exponentials(row, p_.y, (first + r) * p_.features, top[r]);
        } else {
          copy(row, (first + r) * p_.features);
        }
      }
    });
  }

  void exp_rows() const {
    each_block(0, [&](int64_t first, int64_t count, T*) {
      const T* offset = static_cast<const T*>(p_.top);
      for (int64_t r = first; r < first + count; ++r) {
        exponentials(static_cast<const T*>(p_.y) + r * p_.features, p_.y, r * p_.features, offset[r]);
      }
    });
  }

  void backward() const {
    each_block(p_.features + L + out_width_, [&](int64_t first, int64_t count, T* tile) {
      // A vector beyond a row's end falls on the next row, which is written after it.
      T *out = tile + kRows * p_.features + L, sums[kRows];
      for (int64_t r = 0; r < count; ++r) {
        sums[r] = weighted(first + r, tile + r * p_.features);
      }
      Product<Dot> product{tile, p_.features, 1, directions(), out_width_, out, out_width_};
      product.template run<Start::kZero>(count, out_width_, p_.features);
      for (int64_t r = 0; r < count; ++r) {
        const T *row = out + r * out_width_, *from = x(first + r);
        T* dx = static_cast<T*>(p_.dx) + (first + r) * p_.channels;
        for (int64_t c = 0; c < p_.channels; c += L) {
          const int64_t left = p_.channels - c;
          const Vec<T> v = load(row + c) - get(from + c, left) * sums[r];
          left >= L ? store(dx + c, v) : store_first(dx + c, v, left);
        }
      }
    });
  }

 private:
  const T* x(int64_t row) const { return static_cast<const T*>(p_.x) + row * p_.channels; }
  const T* directions() const { return static_cast<const T*>(p_.directions); }
  static LS_INLINE Vec<T> get(const T* p, int64_t n) { return n >= L ? load(p) : load_first(p, n); }

  template <class Body>
  void each_block(int64_t width, const Body& body) const {
    const int threads = threads_for(tasks_, p_.threads);
    const int64_t bytes = round_up((kRows * width + L) * int64_t(sizeof(T)), 64);
    Scratch scratch(bytes * threads);
    parallel_for(tasks_, threads, [&](int64_t task, int thread) {
      const int64_t first = task * kRows;
      body(first, min_of(kRows, p_.rows - first), reinterpret_cast<T*>(scratch.at(bytes * thread)));
    });
  }

  /// Of a row's features; there is at least one, and NaN stays.
  LS_INLINE T row_maximum(const T* row) const {
    Vec<T> most = broadcast(row[0]);
    for (int64_t i = 0; i < p_.features; i += L) {
      const int64_t left = p_.features - i;
      Vec<T> v = load(row + i);
      if (left < L) v = select<T>(first_lanes(left), v, most);
      most = select<T>((v > most) | (v != v), v, most);
    }
    return max_of_lanes<T>(most);
  }

  static LS_INLINE Vec<IntOf<T>> first_lanes(int64_t n) { return iota<T>() < IntOf<T>(n); }

  /// exp(row - offset - log_count / 2) + eps, as features from element `at` of `to`.
  LS_INLINE void exponentials(const T* row, void* to, int64_t at, T offset) const {
    for (int64_t i = 0; i < p_.features; i += L) {
      const int64_t left = p_.features - i;
      // The difference first: it is small where it matters, and then exact.
      const Vec<T> exponent = (get(row + i, left) - offset) - T(p_.log_count / 2);
      const Vec<T> v = exp2<T>(exponent * T(kLog2e)) + T(p_.eps);
      store_as<T>(to, p_.dtype, at + i, v, left);
    }
  }

  LS_INLINE void copy(const T* row, int64_t at) const {
    for (int64_t i = 0; i < p_.features; i += L) {
      store_as<T>(p_.y, p_.dtype, at + i, load(row + i), p_.features - i);
    }
  }

  /// e of a row into `to`, which has room for whole vectors -> their sum.
  LS_INLINE T weighted(int64_t row, T* to) const {
    Vec<T> sum = {};
    for (int64_t i = 0; i < p_.features; i += L) {
      const int64_t at = row * p_.features + i, left = p_.features - i;
      Vec<T> e =
          load_as<T>(p_.d_y, p_.dtype, at, left) * (load_as<T>(p_.y, p_.dtype, at, left) - T(p_.eps));
      if (left < L) e = select<T>(first_lanes(left), e, Vec<T>{});
      store(to + i, e);
      sum += e;
    }
    return sum_of_lanes<T>(sum);
  }

  const FavorParams& p_;
  int64_t tasks_, tile_width_, out_width_;
};

template <class Run>
LS_INLINE void pick(const FavorParams& p, const Run& run) {
  p.sum == Dtype::kDouble ? run(Favor<DotDouble>(p)) : run(Favor<DotFloat>(p));
}

}  // namespace

void favor_forward(const FavorParams& p) {
  pick(p, [](const auto& favor) { favor.forward(); });
}

void favor_exp_rows(const FavorParams& p) {
  pick(p, [](const auto& favor) { favor.exp_rows(); });
}

void favor_backward(const FavorParams& p) {
  pick(p, [](const auto& favor) { favor.backward(); });
}

}  // namespace longspan::LONGSPAN_ISA
