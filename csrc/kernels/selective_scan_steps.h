// What the scan's forward and backward share: numbers with channels along the lanes, blocks of time
// turned on the way in and out, and how the work is cut.
#pragma once

#include "kernels/parallel.h"
#include "kernels/selective_scan.h"
#include "simd/convert.h"
#include "simd/math.h"

namespace longspan::LONGSPAN_ISA {

// Numbers ------------------------------------------------------------------------------------

template <class T>
struct Real {
  using Scalar = T;
  static constexpr int kParts = 1;
  Vec<T> re;
};

template <class T>
struct Complex {
  using Scalar = T;
  static constexpr int kParts = 2;
  Vec<T> re, im;
};

template <class T>
LS_INLINE Real<T> operator+(Real<T> a, Real<T> b) {
  return {a.re + b.re};
}
template <class T>
LS_INLINE Complex<T> operator+(Complex<T> a, Complex<T> b) {
  return {a.re + b.re, a.im + b.im};
}
template <class T>
LS_INLINE Real<T> operator*(Real<T> a, Real<T> b) {
  return {a.re * b.re};
}
template <class T>
LS_INLINE Complex<T> operator*(Complex<T> a, Complex<T> b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
template <class T>
LS_INLINE Real<T> scaled(Real<T> a, Vec<T> s) {
  return {a.re * s};
}
template <class T>
LS_INLINE Complex<T> scaled(Complex<T> a, Vec<T> s) {
  return {a.re * s, a.im * s};
}
template <class T>
LS_INLINE Real<T> conjugate(Real<T> a) {
  return a;
}
template <class T>
LS_INLINE Complex<T> conjugate(Complex<T> a) {
  return {a.re, -a.im};
}
/// Re(conj(a) b).
template <class T>
LS_INLINE Vec<T> dot(Real<T> a, Real<T> b) {
  return a.re * b.re;
}
template <class T>
LS_INLINE Vec<T> dot(Complex<T> a, Complex<T> b) {
  return a.re * b.re + a.im * b.im;
}

/// exp(step * A), where a is A log2(e).
template <class T>
LS_INLINE Real<T> decay(Real<T> a, Vec<T> step) {
  return {exp2_product<T>(a.re, step)};
}
template <class T>
LS_INLINE Complex<T> decay(Complex<T> a, Vec<T> step) {
  const Vec<T> size = exp2_product<T>(a.re, step);
  Vec<T> sin, cos;
  sin_cos<T>(a.im * step * T(kLn2), &sin, &cos);
  return {size * cos, size * sin};
}

/// Parts of a number lie `part` elements apart.
template <class N>
LS_INLINE N load_number(const typename N::Scalar* p, int64_t part) {
  if constexpr (N::kParts == 1) {
    return {load(p)};
  } else {
    return {load(p), load(p + part)};
  }
}
template <class N>
LS_INLINE void store_number(typename N::Scalar* p, int64_t part, N x) {
  store(p, x.re);
  if constexpr (N::kParts == 2) store(p + part, x.im);
}

/// Elements that a number, or N of them, take with a channel a lane: [state][part][lane].
template <class N>
inline constexpr int64_t kSize = N::kParts * kLanes<typename N::Scalar>;

template <class N>
LS_INLINE N load_state(const typename N::Scalar* p, int64_t n) {
  return load_number<N>(p + n * kSize<N>, kLanes<typename N::Scalar>);
}
template <class N>
LS_INLINE void store_state(typename N::Scalar* p, int64_t n, N x) {
  store_number<N>(p + n * kSize<N>, kLanes<typename N::Scalar>, x);
}

/// B_t or C_t, the same for all channels of a group: scalars [time][part][state].
template <class N>
struct Varying {
  static constexpr bool kVaries = true;
  const typename N::Scalar* data;
  int64_t row;  ///< between parts; a step is kParts rows
  LS_INLINE N at(int64_t t, int64_t n) const {
    using T = typename N::Scalar;
    const T* p = data + t * N::kParts * row + n;
    if constexpr (N::kParts == 1) {
      return {broadcast(p[0])};
    } else {
      return {broadcast(p[0]), broadcast(p[row])};
    }
  }
};

/// B or C, the same at all times: [state][part][lane].
template <class N>
struct PerChannel {
  static constexpr bool kVaries = false;
  const typename N::Scalar* data;
  LS_INLINE N at(int64_t, int64_t n) const { return load_state<N>(data, n); }
};

/// body(b, c) with B and C as they are given.
template <class N, class Body>
LS_INLINE void with_coefficients(const SelectiveScanParams& p, const typename N::Scalar* b,
                                 const typename N::Scalar* c, int64_t row, const Body& body) {
  if (p.b_varies) {
    p.c_varies ? body(Varying<N>{b, row}, Varying<N>{c, row})
               : body(Varying<N>{b, row}, PerChannel<N>{c});
  } else {
    p.c_varies ? body(PerChannel<N>{b}, Varying<N>{c, row}) : body(PerChannel<N>{b}, PerChannel<N>{c});
  }
}

// Blocks of time -----------------------------------------------------------------------------

/// Up to a vector's width of rows (channels, or states) over time.
struct Rows {
  void* data = nullptr;
  Dtype dtype = Dtype::kFloat;
  int64_t row = 0, time = 0;  ///< strides

  LS_INLINE Rows from(int64_t r, int64_t t) const {
    return {static_cast<char*>(data) + (r * row + t * time) * size_of(dtype), dtype, row, time};
  }
};

LS_INLINE Rows channel_rows(const ScanTensor& x, int64_t batch) {
  Rows r{x.data, x.dtype, x.channel, x.time};
  r.data = static_cast<char*>(x.data) + batch * x.batch * size_of(x.dtype);
  return r;
}

template <class T>
LS_INLINE Vec<T> load_lanes(const ScanTensor& x, int64_t at, int64_t stride, int64_t n) {
  return load_lanes<T>(x.data, x.dtype, at, stride, n);
}
template <class T>
LS_INLINE void store_lanes(const ScanTensor& x, int64_t at, int64_t stride, Vec<T> v, int64_t n) {
  store_lanes<T>(x.data, x.dtype, at, stride, v, n);
}

/// Whole vectors of rows over whole vectors of time, the dtype known: what nearly all of the time
/// is spent in must be unrolled for its square to stay in registers.
template <class T, Dtype kDtype>
void load_whole(Rows x, int64_t steps, T* out, int64_t ld) {
  constexpr int L = kLanes<T>;
  if (x.row == 1) {
    for (int64_t t = 0; t < steps; ++t) store(out + t * ld, load_as<T>(x.data, kDtype, t * x.time));
    return;
  }
  for (int64_t t = 0; t < steps; t += L) {
    Vec<T> square[L];
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) square[i] = load_as<T>(x.data, kDtype, i * x.row + t);
    transpose<T>(square);
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) store(out + (t + i) * ld, square[i]);
  }
}

template <class T, Dtype kDtype>
void store_whole(const T* in, Rows x, int64_t steps) {
  constexpr int L = kLanes<T>;
  if (x.row == 1) {
    for (int64_t t = 0; t < steps; ++t) store_as<T>(x.data, kDtype, t * x.time, load(in + t * L));
    return;
  }
  for (int64_t t = 0; t < steps; t += L) {
    Vec<T> square[L];
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) square[i] = load(in + (t + i) * L);
    transpose<T>(square);
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) store_as<T>(x.data, kDtype, i * x.row + t, square[i]);
  }
}

/// How many of the steps load_whole and store_whole take.
template <class T>
LS_INLINE int64_t whole_steps(Rows x, int64_t rows, int64_t steps) {
  if (rows < kLanes<T>) return 0;
  return x.row == 1 ? steps : x.time == 1 ? steps / kLanes<T> * kLanes<T> : 0;
}

/// What is left: fewer rows, fewer steps, or no unit stride.
template <class T>
void load_rest(Rows x, int64_t rows, int64_t steps, T* out, int64_t ld) {
  constexpr int L = kLanes<T>;
  if (x.row == 1) {
    for (int64_t t = 0; t < steps; ++t)
      store(out + t * ld, load_as<T>(x.data, x.dtype, t * x.time, rows));
    return;
  }
  for (int64_t t = 0; t < steps; t += L) {
    const int64_t left = min_of<int64_t>(L, steps - t);
    Vec<T> square[L];
    for (int i = 0; i < L; ++i) {
      square[i] =
          i < rows ? load_lanes<T>(x.data, x.dtype, i * x.row + t * x.time, x.time, left) : Vec<T>{};
    }
    transpose<T>(square);
    for (int i = 0; i < left; ++i) store(out + (t + i) * ld, square[i]);
  }
}

template <class T>
void store_rest(const T* in, Rows x, int64_t rows, int64_t steps) {
  constexpr int L = kLanes<T>;
  if (x.row == 1) {
    for (int64_t t = 0; t < steps; ++t) store_as<T>(x.data, x.dtype, t * x.time, load(in + t * L), rows);
    return;
  }
  for (int64_t t = 0; t < steps; t += L) {
    const int64_t left = min_of<int64_t>(L, steps - t);
    Vec<T> square[L];
    for (int i = 0; i < L; ++i) square[i] = i < left ? load(in + (t + i) * L) : Vec<T>{};
    transpose<T>(square);
    for (int i = 0; i < rows; ++i) {
      store_lanes<T>(x.data, x.dtype, i * x.row + t * x.time, x.time, square[i], left);
    }
  }
}

/// out[t][lane] for t < steps and a vector of lanes, of which those past `rows` are zero.
template <class T>
LS_INLINE void load_steps(Rows x, int64_t rows, int64_t steps, T* out, int64_t ld) {
  rows = min_of<int64_t>(rows, kLanes<T>);
  const int64_t whole = whole_steps<T>(x, rows, steps);
  if (whole > 0)
    with_dtype<T>(x.dtype, [&]<Dtype kDtype>() { load_whole<T, kDtype>(x, whole, out, ld); });
  if (whole < steps) load_rest<T>(x.from(0, whole), rows, steps - whole, out + whole * ld, ld);
}

/// The way back: in[t][lane], a vector a step.
template <class T>
LS_INLINE void store_steps(const T* in, Rows x, int64_t rows, int64_t steps) {
  rows = min_of<int64_t>(rows, kLanes<T>);
  const int64_t whole = whole_steps<T>(x, rows, steps);
  if (whole > 0) with_dtype<T>(x.dtype, [&]<Dtype kDtype>() { store_whole<T, kDtype>(in, x, whole); });
  if (whole < steps) store_rest<T>(in + whole * kLanes<T>, x.from(0, whole), rows, steps - whole);
}

/// Lines of memory asked for while a chunk is calculated: what the next one reads, and where this one
/// will write. Sixteen rows in as many pages are more than the processor foresees by itself; waiting
/// for them was a quarter of the time, and asked for at once they are more than it keeps track of.
template <class T>
class StepsAhead {
  static constexpr int L = kLanes<T>;

 public:
  /// For chunks of so many steps and lanes; touch() will be called `calls` times a step.
  StepsAhead(int64_t steps, int64_t lanes, int64_t calls)
      : steps_(steps), lanes_(lanes), calls_(calls) {}

  void read(Rows x) { add(x, false); }
  void write(Rows x) { add(x, true); }

  LS_INLINE void touch() {
    for (int64_t i = 0; i < lines_a_call_ && tensor_ < count_; ++i) {
      const Rows& x = rows_[tensor_];
      // A vector of channels at one step, or of steps of one channel: no more than a line.
      const Rows at =
          x.row == 1 ? x.from(0, line_) : x.from(min_of(line_ % L, lanes_ - 1), line_ / L * L);
      written_[tensor_] ? __builtin_prefetch(at.data, 1) : __builtin_prefetch(at.data);
      if (++line_ == steps_) line_ = 0, ++tensor_;
    }
  }

 private:
  void add(Rows x, bool written) {
    rows_[count_] = x;
    written_[count_++] = written;
    lines_a_call_ = ceil_div(count_, calls_);
  }

  int64_t steps_, lanes_, calls_, lines_a_call_ = 0, count_ = 0, tensor_ = 0, line_ = 0;
  Rows rows_[8];
  bool written_[8];
};

// How the work is cut ------------------------------------------------------------------------

/// Up to a vector's width of channels that share B and C.
struct LaneGroup {
  int64_t group, channel, lanes;
};

/// A run of whole chunks of one sequence.
struct Piece {
  int64_t sequence, begin, end;  ///< begin and end: steps of the tensor
  int64_t chunk;                 ///< its first one, among all sequences'
  bool first, last;              ///< of the sequence
};

template <class N>
class ScanShape {
  using T = typename N::Scalar;
  static constexpr int L = kLanes<T>;

 public:
  explicit ScanShape(const SelectiveScanParams& p)
      : p_(p), chunk(scan_chunk(p.states)), width(p.channels / p.groups),
        lane_groups_a_group(ceil_div(width, L)), lane_groups(p.groups * lane_groups_a_group),
        row(round_up(p.states, L)) {}

  LS_INLINE LaneGroup lane_group(int64_t i) const {
    const int64_t group = i / lane_groups_a_group, first = i % lane_groups_a_group * L;
    return {group, group * width + first, min_of<int64_t>(L, width - first)};
  }

  LS_INLINE int64_t begin(int64_t sequence) const { return p_.cu ? p_.cu[sequence] : 0; }
  LS_INLINE int64_t end(int64_t sequence) const { return p_.cu ? p_.cu[sequence + 1] : p_.steps; }

  /// Sequences cut into pieces of at most so many steps (whole chunks); writes them where out is not
  /// null. An empty sequence is one empty piece.
  int64_t pieces(int64_t most, Piece* out) const {
    int64_t count = 0, chunks = 0;
    for (int64_t s = 0; s < p_.batch; ++s) {
      int64_t at = begin(s);
      do {
        const int64_t stop = min_of(at + most, end(s));
        if (out) out[count] = {s, at, stop, chunks, at == begin(s), stop == end(s)};
        ++count;
        chunks += ceil_div(stop - at, chunk);
        at = stop;
      } while (at < end(s));
    }
    return count;
  }

  /// A, B or C of a lane group for all time: [state][part][lane], times a factor.
  void load_channels(const ScanTensor& x, LaneGroup g, T factor, T* out) const {
    for (int part = 0; part < N::kParts; ++part) {
      Rows rows{x.data, x.dtype, x.channel, x.state};
      rows.data = static_cast<char*>(rows.data) + part * x.part * size_of(x.dtype);
      load_steps<T>(rows.from(g.channel, 0), g.lanes, p_.states, out + part * L, kSize<N>);
    }
    for (int64_t i = 0; i < p_.states * kSize<N>; i += L) store(out + i, load(out + i) * factor);
  }

  /// B or C of a group at steps [t, t + steps): [time][part][state], rows of `row`, times a factor.
  void load_varying(const ScanTensor& x, int64_t sequence, int64_t group, int64_t t, int64_t steps,
                    T factor, T* out) const {
    for (int part = 0; part < N::kParts; ++part) {
      Rows rows{x.data, x.dtype, x.state, x.time};
      rows.data = static_cast<char*>(rows.data) +
                  (sequence * x.batch + group * x.group + part * x.part) * size_of(x.dtype);
      for (int64_t n = 0; n < p_.states; n += L) {
        load_steps<T>(rows.from(n, t), p_.states - n, steps, out + part * row + n, N::kParts * row);
      }
    }
    if (factor == T(1)) return;
    for (int64_t i = 0; i < steps * N::kParts * row; i += L) store(out + i, load(out + i) * factor);
  }

  /// A lane group's state from or to a tensor [batch][channel][state][part].
  void load_state_of(const ScanTensor& x, int64_t sequence, LaneGroup g, T* h) const {
    if (x.data == nullptr) {
      for (int64_t i = 0; i < p_.states * kSize<N>; i += L) store(h + i, Vec<T>{});
      return;
    }
    ScanTensor at = x;
    at.data = static_cast<char*>(x.data) + sequence * x.batch * size_of(x.dtype);
    load_channels(at, g, T(1), h);
  }
  void store_state_of(const T* h, const ScanTensor& x, int64_t sequence, LaneGroup g, int64_t n0,
                      int64_t n1) const {
    for (int64_t n = n0; n < n1; ++n) {
      for (int part = 0; part < N::kParts; ++part) {
        const Vec<T> v = load(h + n * kSize<N> + part * L);
        const int64_t at = sequence * x.batch + g.channel * x.channel + n * x.state + part * x.part;
        store_lanes<T>(x, at, x.channel, v, g.lanes);
      }
    }
  }

  /// The state before a chunk of all, kept as [state][part][channel].
  LS_INLINE T* kept(int64_t chunk_index, LaneGroup g) const {
    return static_cast<T*>(p_.chunk_states) + chunk_index * p_.states * N::kParts * p_.channels +
           g.channel;
  }
  void keep(const T* h, int64_t chunk_index, LaneGroup g, int64_t n0, int64_t n1) const {
    T* to = kept(chunk_index, g);
    for (int64_t i = n0 * N::kParts; i < n1 * N::kParts; ++i) {
      const Vec<T> v = load(h + i * L);
      g.lanes == L ? store(to + i * p_.channels, v) : store_first(to + i * p_.channels, v, g.lanes);
    }
  }
  void recall(int64_t chunk_index, LaneGroup g, T* h) const {
    const T* from = kept(chunk_index, g);
    for (int64_t i = 0; i < p_.states * N::kParts; ++i) {
      store(h + i * L,
            g.lanes == L ? load(from + i * p_.channels) : load_first(from + i * p_.channels, g.lanes));
    }
  }

  /// D_t, from delta + bias.
  LS_INLINE Vec<T> step_size(Vec<T> x) const { return p_.softplus ? softplus<T>(x) : x; }

  /// bias or D of a lane group.
  LS_INLINE Vec<T> per_channel(const ScanTensor& x, LaneGroup g) const {
    if (x.data == nullptr) return Vec<T>{};
    return load_lanes<T>(x, g.channel * x.channel, x.channel, g.lanes);
  }

 private:
  const SelectiveScanParams& p_;

 public:
  const int64_t chunk;
  const int64_t width;  ///< channels of a group
  const int64_t lane_groups_a_group, lane_groups;
  const int64_t row;  ///< states, rounded up to vectors
};

/// C enters a complex scan doubled: the output is twice the real part.
template <class N>
inline constexpr typename N::Scalar kOutputFactor = typename N::Scalar(N::kParts);

}  // namespace longspan::LONGSPAN_ISA
