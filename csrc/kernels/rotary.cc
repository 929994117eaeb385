// Rotary position embedding. A task is a block of tokens with all heads of q and k: their angles are
// read once, brought into the form that the rows multiply with, and stay in the first cache.
//
//   halves        a' = a cos - b sin                    table row: cos_0 .. | sin_0 ..
//                 b' = b cos + a sin
//   interleaved   x' = x C + (neighbours swapped x) S   table row: c_0 c_0 c_1 c_1 .. | -s_0 s_0 ..

#include "kernels/rotary.h"

#include "kernels/parallel.h"
#include "kernels/table.h"
#include "simd/convert.h"

namespace longspan::LONGSPAN_ISA {
namespace {

constexpr int64_t kTokens = 64;      // a task's
constexpr int64_t kSerial = 1 << 15;  // elements below which threads cost more than they bring

/// x1 x0 x3 x2 ...
template <class T>
LS_INLINE Vec<T> swap_neighbours(Vec<T> x) {
  constexpr int L = kLanes<T>;
  if constexpr (L == 2) {
    return LS_SHUFFLE(x, x, 1, 0);
  } else if constexpr (L == 4) {
    return LS_SHUFFLE(x, x, 1, 0, 3, 2);
  } else if constexpr (L == 8) {
    return LS_SHUFFLE(x, x, 1, 0, 3, 2, 5, 4, 7, 6);
  } else {
    static_assert(L == 16);
    return LS_SHUFFLE(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
  }
}

template <class T, Dtype kDtype>
class Rotary {
  static constexpr int L = kLanes<T>;

 public:
  explicit Rotary(const RotaryParams& p)
      : p_(p), half_(p.rotary_channels / 2), width_(round_up(p.rotary_channels, L) + L) {}

  void run() const {
    const int64_t blocks = ceil_div(p_.tokens, kTokens), tasks = p_.batch * blocks;
    const int64_t elements = p_.batch * p_.tokens * (p_.q_heads + p_.k_heads) * p_.channels;
    const int threads = threads_for(tasks, elements < kSerial ? 1 : p_.threads);
    const int64_t bytes = kTokens * 2 * width_ * int64_t(sizeof(T));
    Scratch scratch(bytes * threads);
    parallel_for(tasks, threads, [&](int64_t task, int thread) {
      T* table = reinterpret_cast<T*>(scratch.at(bytes * thread));
      const int64_t b = task / blocks, first = task % blocks * kTokens;
      const int64_t count = min_of(kTokens, p_.tokens - first);
      for (int64_t t = 0; t < count; ++t) stage(b, first + t, table + t * 2 * width_);
      turn(p_.q, p_.q_out, p_.q_heads, b, first, count, table);
      turn(p_.k, p_.k_out, p_.k_heads, b, first, count, table);
    });
  }

 private:
  LS_INLINE Vec<T> angle(const RotaryTable& x, int64_t b, int64_t row, int64_t i) const {
    return load_as<T>(x.data, p_.table_dtype, b * x.batch + row * x.row + i, half_ - i);
  }

  void stage(int64_t b, int64_t t, T* to) const {
    const int64_t row = p_.positions ? p_.positions[b * p_.positions_batch + t] : t;
    for (int64_t i = 0; i < half_; i += L) {
      const Vec<T> c = angle(p_.cos, b, row, i), s = angle(p_.sin, b, row, i);
      const Vec<T> signed_s = p_.inverse ? -s : s;
      if (p_.interleaved) {
        store(to + 2 * i, interleave_low<T>(c, c));
        store(to + width_ + 2 * i, interleave_low<T>(-signed_s, signed_s));
        if (i + L / 2 < half_) {
          store(to + 2 * i + L, interleave_high<T>(c, c));
          store(to + width_ + 2 * i + L, interleave_high<T>(-signed_s, signed_s));
        }
      } else {
        store(to + i, c);
        store(to + width_ + i, signed_s);
      }
    }
  }

  /// Rows in the order in which they lie in memory. Results go through the caches: memory fresh from the
  /// system, as large ones are, lies there when it has been cleared, and stores past them took twice as
  /// long; into memory that was in use before they were no faster.
  void turn(const RotaryHeads& in, const RotaryHeads& out, int64_t heads, int64_t b, int64_t first,
            int64_t count, const T* table) const {
    const auto row = [&](int64_t h, int64_t t) {
      const int64_t from = b * in.batch + h * in.head + (first + t) * in.token;
      const int64_t to = b * out.batch + h * out.head + (first + t) * out.token;
      const T* angles = table + t * 2 * width_;
      p_.interleaved ? turn_neighbours(in.data, from, out.data, to, angles)
                     : turn_halves(in.data, from, out.data, to, angles);
      copy_rest(in.data, from, out.data, to);
    };
    if (in.head < in.token) {
      for (int64_t t = 0; t < count; ++t) {
        for (int64_t h = 0; h < heads; ++h) row(h, t);
      }
    } else {
      for (int64_t h = 0; h < heads; ++h) {
        for (int64_t t = 0; t < count; ++t) row(h, t);
      }
    }
  }

  LS_INLINE void turn_halves(const void* in, int64_t from, void* out, int64_t to,
                             const T* angles) const {
    for (int64_t i = 0; i < half_; i += L) {
      const int64_t n = half_ - i;
      const Vec<T> c = load(angles + i), s = load(angles + width_ + i);
      const Vec<T> a = load_as<T>(in, kDtype, from + i, n);
      const Vec<T> b = load_as<T>(in, kDtype, from + half_ + i, n);
      store_as<T>(out, kDtype, to + i, a * c - b * s, n);
      store_as<T>(out, kDtype, to + half_ + i, b * c + a * s, n);
    }
  }

  LS_INLINE void turn_neighbours(const void* in, int64_t from, void* out, int64_t to,
                                 const T* angles) const {
    for (int64_t i = 0; i < 2 * half_; i += L) {
      const int64_t n = 2 * half_ - i;
      const Vec<T> x = load_as<T>(in, kDtype, from + i, n);
      const Vec<T> y = x * load(angles + i) + swap_neighbours<T>(x) * load(angles + width_ + i);
      store_as<T>(out, kDtype, to + i, y, n);
    }
  }

  LS_INLINE void copy_rest(const void* in, int64_t from, void* out, int64_t to) const {
    const int64_t rest = p_.channels - p_.rotary_channels;
    if (rest == 0 || in == out) return;
    const int64_t size = size_of(kDtype);
    __builtin_memcpy(static_cast<char*>(out) + (to + p_.rotary_channels) * size,
                     static_cast<const char*>(in) + (from + p_.rotary_channels) * size,
                     size_t(rest * size));
  }

  const RotaryParams& p_;
  const int64_t half_, width_;
};

}  // namespace

void rotary_apply(const RotaryParams& p) {
  switch (p.dtype) {
    case Dtype::kFloat:
      return Rotary<float, Dtype::kFloat>(p).run();
    case Dtype::kDouble:
      return Rotary<double, Dtype::kDouble>(p).run();
    case Dtype::kBfloat16:
      return Rotary<float, Dtype::kBfloat16>(p).run();
    case Dtype::kHalf:
      return Rotary<float, Dtype::kHalf>(p).run();
  }
}

}  // namespace longspan::LONGSPAN_ISA
