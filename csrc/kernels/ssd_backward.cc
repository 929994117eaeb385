// Mamba-2's scan, backward. C B^T first, as in the forward; then
//
//   1. each span's own gradient of the state it began from      (spans in parallel)
//   2. the gradient at each boundary, from the last to the first (in order)
//   3. everything else                                           (spans in parallel)
//
// A task of 3 is a span and a group: it goes over the group's heads, so that dB, dC and the gradient of
// C B^T are summed where they are. Per head it calculates the span's states again, forwards from the
// boundary, and walks its chunks backwards with dH, the gradient of the state behind the chunk
// (ssd_chunk.h has the forward's names; a tick ' is the chunk's last token):
//
//   dM      = dY X^T                        d(CB^T) += dM exp(a_t - a_s) dt_s
//   dX      = M^T dY + w_s (B dH)           dB      += w_s (x_s dH^T)
//   dC     += exp(a_t) (dY H^T)             dH       = exp(a') dH + sum of exp(a_t) C_t dY_t^T
//
// a_t collects what its exponentials meet: +sum over s of dM M in its row, -the same in its column,
// +exp(a_t) dY_t.(C_t H), and the decays to the chunk's end; dt and A follow from its sum backwards.

#include "kernels/ssd_chunk.h"
#include "kernels/table.h"

namespace longspan::LONGSPAN_ISA {
namespace {

template <class Dot>
class Backward {
  using T = typename Dot::Sum;
  static constexpr int L = kLanes<T>;
  static constexpr Dtype kDtype = sizeof(T) == 8 ? Dtype::kDouble : Dtype::kFloat;

 public:
  Backward(const SsdParams& p, const SsdGradients& g) : p_(p), g_(g), chunk_(p) {}

  void run() {
    const int64_t whole = p_.runs.run_count * p_.heads;
    const int threads = threads_for(max_of(whole, p_.runs.span_count * p_.heads), p_.threads);
    Arena measure;
    lay_out(measure);
    Scratch scratch(measure.used() * threads);
    const auto work = [&](int thread) {
      Arena arena(scratch.at(measure.used() * thread));
      return lay_out(arena);
    };
    Scratch score_space(chunk_.scores_size() * int64_t(sizeof(T)));
    scores_ = reinterpret_cast<T*>(score_space.at(0));
    parallel_for(p_.runs.span_count * p_.groups, threads, [&](int64_t task, int thread) {
      chunk_.group_scores(p_.runs.spans[task / p_.groups], task % p_.groups, scores_,
                          work(thread).turned);
    });

    const int64_t boundaries = p_.runs.boundary_count * p_.heads;
    Scratch state_space(boundaries * chunk_.state_size * int64_t(sizeof(T)));
    Scratch decay_space(boundaries * int64_t(sizeof(T)));
    d_boundaries_ = reinterpret_cast<T*>(state_space.at(0));
    decays_ = reinterpret_cast<T*>(decay_space.at(0));
    parallel_for(p_.runs.span_count * p_.heads, threads, [&](int64_t task, int thread) {
      own_gradient(p_.runs.spans[task / p_.heads], task % p_.heads, work(thread));
    });
    parallel_for(whole, threads, [&](int64_t task, int thread) {
      join(p_.runs.runs[task / p_.heads], task % p_.heads, work(thread));
    });

    Scratch share_space(p_.runs.span_count * share_size() * int64_t(sizeof(T)));
    T* shares = reinterpret_cast<T*>(share_space.at(0));
    parallel_for(p_.runs.span_count * p_.groups, threads, [&](int64_t task, int thread) {
      const int64_t span = task / p_.groups;
      run_span(p_.runs.spans[span], task % p_.groups, shares + span * share_size(), work(thread));
    });
    add_shares(shares);
  }

 private:
  /// Sums over the tokens of a span: [heads] each of dA and d_bias, [heads][channels] of dD.
  int64_t share_size() const { return p_.heads * (p_.channels + 2); }

  struct Workspace {
    SsdSteps<T> steps[kSpan / kStrip];  ///< of each chunk of the span
    T* states;         ///< before each chunk of the span, [state_size] each
    T* d_state;        ///< dH
    T* turned;         ///< H^T or dH^T [channels][state_width]; at first B^T and a copy of C
    T *db, *dc;        ///< of the span, [kSpan][state_width]
    T* d_scores;       ///< d(CB^T) of each chunk, [chunk][chunk]
    T *x, *dy, *y, *dx, *update;  ///< [chunk][width]
    T* x_turned;       ///< [channels][chunk]
    T *mixed, *d_mixed;
    T *scaled, *product;  ///< [chunk][state_width]
    T* weighted;       ///< [chunk][width]
    T *da, *ddt;       ///< [chunk]
    T* row;            ///< [width]
  };

  Workspace lay_out(Arena& arena) const {
    const int64_t width = chunk_.width, state_width = chunk_.state_width;
    Workspace w;
    for (auto& steps : w.steps) steps.lay_out(arena, p_.chunk);
    w.states = arena.take<T>(kSpan / p_.chunk * chunk_.state_size);
    w.d_state = arena.take<T>(chunk_.state_size);
    w.turned = arena.take<T>(max_of(width, 2 * p_.chunk) * state_width);
    w.db = arena.take<T>(kSpan * state_width);
    w.dc = arena.take<T>(kSpan * state_width);
    w.d_scores = arena.take<T>(kSpan * p_.chunk);
    w.x = arena.take<T>(p_.chunk * width);
    w.dy = arena.take<T>(p_.chunk * width);
    w.y = arena.take<T>(p_.chunk * width);
    w.dx = arena.take<T>(p_.chunk * width);
    w.update = arena.take<T>(p_.chunk * width);
    w.weighted = arena.take<T>(p_.chunk * width);
    w.x_turned = arena.take<T>(p_.channels * p_.chunk);
    w.mixed = arena.take<T>(p_.chunk * p_.chunk);
    w.d_mixed = arena.take<T>(p_.chunk * p_.chunk);
    w.scaled = arena.take<T>(p_.chunk * state_width);
    w.product = arena.take<T>(p_.chunk * state_width);
    w.da = arena.take<T>(p_.chunk);
    w.ddt = arena.take<T>(p_.chunk);
    w.row = arena.take<T>(width);
    return w;
  }

  /// Which tokens a chunk has, of which head.
  struct Place {
    const Run& run;
    int64_t head, group, t0, n;
  };

  T* d_boundary(int64_t index, int64_t head) const {
    return d_boundaries_ + (index * p_.heads + head) * chunk_.state_size;
  }
  TokenRows rows(const SequenceTensor& x, const Place& at) const {
    return chunk_.rows(x, at.run.batch, at.head, at.t0);
  }
  TokenRows group_rows(const SequenceTensor& x, const Place& at) const {
    return chunk_.rows(x, at.run.batch, at.group, at.t0);
  }
  void scale_states(const SequenceTensor& x, const Place& at, const T* scale, T* out) const {
    copy_rows<T>(group_rows(x, at), at.n, p_.states, chunk_.state_width, scale, out);
  }

  /// dY: d_out, with a gate times silu(z).
  void load_dy(const Place& at, T* dy) const {
    copy_rows<T>(rows(g_.d_out, at), at.n, p_.channels, chunk_.width, nullptr, dy);
    if (p_.z.data == nullptr) return;
    const TokenRows z_rows = rows(p_.z, at);
    for (int64_t t = 0; t < at.n; ++t) {
      for (int64_t c = 0; c < p_.channels; c += L) {
        const Vec<T> z = load_as<T>(z_rows.from(t).data, p_.dtype, c, p_.channels - c);
        T* d = dy + t * chunk_.width + c;
        store(d, load(d) * z * sigmoid<T>(z));
      }
    }
  }

  // ---- 1 and 2: gradients at the boundaries

  void own_gradient(const Span& span, int64_t head, Workspace w) const {
    if (span.index == 0) return;
    const Run& run = p_.runs.runs[span.run];
    const int64_t first = run.begin_of(span.index), last = run.end_of(span.index);
    __builtin_memset(w.d_state, 0, size_t(chunk_.state_size) * sizeof(T));
    T decay = 1;
    for (int64_t t0 = first + (last - first - 1) / p_.chunk * p_.chunk; t0 >= first; t0 -= p_.chunk) {
      const Place at{run, head, chunk_.group_of(head), t0, min_of(p_.chunk, last - t0)};
      w.steps[0].prepare(p_, run.batch, head, t0, at.n);
      load_dy(at, w.dy);
      retreat(at, w.steps[0], w);
      decay *= w.steps[0].whole;
    }
    const int64_t boundary = run.boundary + span.index - 1;
    decays_[boundary * p_.heads + head] = decay;
    __builtin_memcpy(d_boundary(boundary, head), w.d_state, size_t(chunk_.state_size) * sizeof(T));
  }

  /// dH before a chunk, from dH behind it.
  void retreat(const Place& at, const SsdSteps<T>& steps, const Workspace& w) const {
    scale_states(p_.c, at, steps.from_start, w.scaled);
    chunk_.advance(w.scaled, steps.whole, {w.dy, chunk_.width}, at.n, w.d_state, w.row);
  }

  /// The gradient of a run's last state, [states][width]; whether there is any.
  bool load_last(const Run& run, int64_t head, T* out, T* other) const {
    const int64_t row = chunk_.final_of(run);
    const T* final = row >= 0 && g_.d_final ? chunk_.state_at(g_.d_final, row, head) : nullptr;
    const T* sequence = run.last >= 0 && g_.d_sequence_states
                            ? chunk_.state_at(g_.d_sequence_states, run.last, head)
                            : nullptr;
    chunk_.load_state(final ? final : sequence, out);
    if (final && sequence) {
      chunk_.load_state(sequence, other);
      for (int64_t i = 0; i < chunk_.state_size; i += L) store(out + i, load(out + i) + load(other + i));
    }
    return final || sequence;
  }

  void join(const Run& run, int64_t head, const Workspace& w) const {
    const bool any = load_last(run, head, w.d_state, w.states);
    if (run.spans() == 0 && run.initial >= 0 && g_.d_initial) {
      chunk_.store_state(w.d_state, chunk_.state_at(g_.d_initial, run.initial, head));
    }
    const T* after = any ? w.d_state : nullptr;
    for (int64_t k = run.spans() - 2; k >= 0; --k) {
      T* state = d_boundary(run.boundary + k, head);
      const Vec<T> decay = broadcast(decays_[(run.boundary + k) * p_.heads + head]);
      for (int64_t i = 0; after && i < chunk_.state_size; i += L) {
        store(state + i, load(state + i) + decay * load(after + i));
      }
      after = state;
    }
  }

  // ---- 3

  void run_span(const Span& span, int64_t group, T* share, Workspace w) const {
    const Run& run = p_.runs.runs[span.run];
    const int64_t first = run.begin_of(span.index), last = run.end_of(span.index);
    const int64_t bytes = (last - first) * chunk_.state_width * int64_t(sizeof(T));
    __builtin_memset(w.db, 0, size_t(bytes));
    __builtin_memset(w.dc, 0, size_t(bytes));
    __builtin_memset(w.d_scores, 0, size_t(kSpan * p_.chunk) * sizeof(T));
    const int64_t per_group = p_.heads / p_.groups;
    for (int64_t head = group * per_group; head < (group + 1) * per_group; ++head) {
      run_head(span, head, share, w);
    }
    for (int64_t t0 = first, c = 0; t0 < last; t0 += p_.chunk, ++c) {
      const Place at{run, group * per_group, group, t0, min_of(p_.chunk, last - t0)};
      finish_group(at, c, t0 - first, w);
    }
  }

  void run_head(const Span& span, int64_t head, T* share, Workspace& w) const {
    const Run& run = p_.runs.runs[span.run];
    const int64_t first = run.begin_of(span.index), last = run.end_of(span.index);
    const int64_t chunks = ceil_div(last - first, p_.chunk);
    const auto place = [&](int64_t c) {
      const int64_t t0 = first + c * p_.chunk;
      return Place{run, head, chunk_.group_of(head), t0, min_of(p_.chunk, last - t0)};
    };
    if (span.index == 0) {
      chunk_.load_state(chunk_.initial_of(run, head), w.states);
    } else {
      chunk_.load_boundary(chunk_.boundary(run.boundary + span.index - 1, head), w.states);
    }
    for (int64_t c = 0; c < chunks; ++c) {
      const Place at = place(c);
      w.steps[c].prepare(p_, run.batch, head, at.t0, at.n);
      if (c + 1 == chunks) break;
      T* next = w.states + (c + 1) * chunk_.state_size;
      __builtin_memcpy(next, next - chunk_.state_size, size_t(chunk_.state_size) * sizeof(T));
      scale_states(p_.b, at, w.steps[c].weight, w.scaled);
      copy_rows<T>(rows(p_.x, at), at.n, p_.channels, chunk_.width, nullptr, w.x);
      chunk_.advance(w.scaled, w.steps[c].whole, {w.x, chunk_.width}, at.n, next, w.row);
    }
    bool behind = true;  // whether anything after the chunk depends on its state
    if (span.index + 1 < run.spans()) {
      const T* d_state = d_boundary(run.boundary + span.index, head);
      __builtin_memcpy(w.d_state, d_state, size_t(chunk_.state_size) * sizeof(T));
    } else {
      behind = load_last(run, head, w.d_state, w.turned);
    }
    T* d_rate = share + head;
    T* d_bias = share + p_.heads + head;
    T* dd = share + 2 * p_.heads + head * p_.channels;
    *d_rate = *d_bias = T(0);
    for (int64_t c = 0; c < p_.channels; ++c) dd[c] = T(0);
    const bool from_zero = span.index == 0 && run.initial < 0;
    const bool keep = span.index == 0 && run.initial >= 0 && g_.d_initial;
    for (int64_t c = chunks - 1; c >= 0; --c) {
      const Place at = place(c);
      const T* state = from_zero && c == 0 ? nullptr : w.states + c * chunk_.state_size;
      differentiate(at, c, state, behind, d_rate, d_bias, dd, w);
      if (c > 0 || keep) retreat(at, w.steps[c], w);
      behind = true;
    }
    if (keep) chunk_.store_state(w.d_state, chunk_.state_at(g_.d_initial, run.initial, head));
  }

  /// One chunk of one head; state (null where zero) is before it, w.d_state behind it.
  void differentiate(const Place& at, int64_t c, const T* state, bool behind, T* d_rate, T* d_bias,
                     T* dd, Workspace& w) const {
    const SsdSteps<T>& s = w.steps[c];
    const int64_t n = at.n, width = chunk_.width;
    copy_rows<T>(rows(p_.x, at), n, p_.channels, width, nullptr, w.x);
    transposed<Dot>({w.x, kDtype, width}, n, p_.channels, w.x_turned, p_.chunk);
    const T* scores = chunk_.scores_at(scores_, at.run.batch, at.group, at.t0);
    load_dy(at, w.dy);
    if (p_.z.data) gate_gradient(at, s, scores, state, w);

    for (int64_t t = 0; t < n; t += kStrip) {
      const int64_t count = min_of(kStrip, n - t);
      Product<Dot>{w.dy + t * width, width, 1, w.x_turned, p_.chunk, w.d_mixed + t * p_.chunk, p_.chunk}
          .template run_as<Start::kZero, false, true>(count, round_up(t + count, L), p_.channels);
    }
    differentiate_mix(s, scores, n, w.d_scores + c * p_.chunk * p_.chunk, w);
    start_dx(at, dd, w);
    for (int64_t i = 0; i < n; i += kStrip) {
      const int64_t count = min_of(kStrip, n - i);
      Product<Dot>{w.mixed + i * p_.chunk + i, 1,    p_.chunk, w.dy + i * width, width,
                   w.dx + i * width,           width}
          .template run_as<Start::kAccumulate, false, false>(count, width, n - i);
    }
    const int64_t row = c * p_.chunk * chunk_.state_width;
    double d_end = 0;  // of a at the chunk's last token
    if (behind) d_end += state_behind(at, s, w.db + row, w);
    if (state) d_end += state_before(at, s, state, behind, w.dc + row, w);
    for (int64_t t = 0; t < n; ++t) {
      void* out = const_cast<void*>(rows(g_.dx, at).from(t).data);
      for (int64_t k = 0; k < p_.channels; k += L) {
        store_as<T>(out, p_.dtype, k, load(w.dx + t * width + k), p_.channels - k);
      }
    }
    finish_steps(at, s, d_end, d_rate, d_bias, w);
  }

  /// dz, from y before the gate, which is calculated again.
  void gate_gradient(const Place& at, const SsdSteps<T>& s, const T* scores, const T* state,
                     const Workspace& w) const {
    const int64_t width = chunk_.width;
    chunk_.mix(s, scores, at.n, w.mixed);
    if (state) {
      scale_states(p_.c, at, s.from_start, w.scaled);
      Product<Dot>{w.scaled, chunk_.state_width, 1, state, width, w.y, width}
          .template run_as<Start::kZero, false, true>(at.n, width, p_.states);
      chunk_.template add_mixed<Start::kAccumulate>(w.mixed, {w.x, width}, at.n, w.y);
    } else {
      chunk_.template add_mixed<Start::kZero>(w.mixed, {w.x, width}, at.n, w.y);
    }
    const T* d = p_.d ? static_cast<const T*>(p_.d) + at.head * p_.channels : nullptr;
    for (int64_t t = 0; t < at.n; ++t) {
      void* dz = const_cast<void*>(rows(g_.dz, at).from(t).data);
      for (int64_t c = 0; c < p_.channels; c += L) {
        const int64_t left = p_.channels - c;
        Vec<T> y = load(w.y + t * width + c);
        if (d) y += (left >= L ? load(d + c) : load_first(d + c, left)) * load(w.x + t * width + c);
        const Vec<T> z = load_as<T>(rows(p_.z, at).from(t).data, p_.dtype, c, left);
        const Vec<T> d_out = load_as<T>(rows(g_.d_out, at).from(t).data, p_.dtype, c, left);
        const Vec<T> gate = sigmoid<T>(z);
        store_as<T>(dz, p_.dtype, c, d_out * y * gate * (T(1) + z * (T(1) - gate)), left);
      }
    }
  }

  /// From dM: M again, the chunk's d(CB^T), and what dM M gives to a_t (w.da) and dt (w.ddt).
  void differentiate_mix(const SsdSteps<T>& s, const T* scores, int64_t n, T* d_scores,
                         const Workspace& w) const {
    const Vec<T> lane = __builtin_convertvector(iota<T>(), Vec<T>);
    for (int64_t i = 0; i < p_.chunk; i += L) store(w.ddt + i, Vec<T>{});
    for (int64_t t = 0; t < n; ++t) {
      const int64_t end = round_up(min_of(t / kStrip * kStrip + kStrip, n), L);
      Vec<T> in_row = {};
      for (int64_t i = 0; i < end; i += L) {
        const int64_t cell = t * p_.chunk + i;
        const Vec<T> e = s.between(t, i, lane), dt = load(s.dt + i);
        const Vec<T> score = load(scores + cell);
        const Vec<T> d = load(w.d_mixed + cell) * e;
        Vec<T> m = score * e * dt, d_score = d * dt, d_dt = d * score, d_a = d_dt * dt;
        if (i + L > t) {
          const auto seen = lane + T(i) <= T(t);
          m = select<T>(seen, m, Vec<T>{});
          d_score = select<T>(seen, d_score, Vec<T>{});
          d_dt = select<T>(seen, d_dt, Vec<T>{});
          d_a = select<T>(seen, d_a, Vec<T>{});
        }
        store(w.mixed + cell, m);
        store(d_scores + cell, load(d_scores + cell) + d_score);
        store(w.ddt + i, load(w.ddt + i) + d_dt);
        in_row += d_a;
      }
      w.da[t] = sum_of_lanes<T>(in_row);
    }
    for (int64_t t = 0; t < n; ++t) w.da[t] -= w.ddt[t] * s.dt[t];
  }

  /// dX begins as D dY; dD collects dY X.
  void start_dx(const Place& at, T* dd, const Workspace& w) const {
    const int64_t width = chunk_.width;
    const T* d = p_.d ? static_cast<const T*>(p_.d) + at.head * p_.channels : nullptr;
    for (int64_t c = 0; c < width; c += L) {
      const int64_t left = p_.channels - c;
      const Vec<T> factor = d ? (left >= L ? load(d + c) : load_first(d + c, left)) : Vec<T>{};
      Vec<T> sum = {};
      for (int64_t t = 0; t < at.n; ++t) {
        const Vec<T> dy = load(w.dy + t * width + c);
        store(w.dx + t * width + c, d ? dy * factor : Vec<T>{});
        sum += dy * load(w.x + t * width + c);
      }
      left >= L ? store(dd + c, load(dd + c) + sum)
                : store_first(dd + c, load_first(dd + c, left) + sum, left);
    }
  }

  /// What flows back from the state behind the chunk: into dX, dB and the decays to the chunk's end.
  double state_behind(const Place& at, const SsdSteps<T>& s, T* db, const Workspace& w) const {
    const int64_t n = at.n, width = chunk_.width, state_width = chunk_.state_width;
    const Operand<Dot> b = by_channel<Dot>(group_rows(p_.b, at), n, p_.states, w.scaled);
    Product<Dot>{b.data, b.stride, 1, w.d_state, width, w.update, width}
        .template run_as<Start::kZero, false, true>(n, width, p_.states);
    double d_end = 0;
    for (int64_t t = 0; t < n; ++t) {
      const Vec<T> weight = broadcast(s.weight[t]);
      Vec<T> sum = {};
      for (int64_t c = 0; c < width; c += L) {
        const int64_t cell = t * width + c;
        const Vec<T> x = load(w.x + cell), u = load(w.update + cell);
        sum += x * u;
        store(w.dx + cell, load(w.dx + cell) + weight * u);
        store(w.weighted + cell, weight * x);
      }
      const T q = sum_of_lanes<T>(sum);
      w.ddt[t] += s.to_end[t] * q;
      w.da[t] -= s.weight[t] * q;
      d_end += double(s.weight[t]) * double(q);
    }
    transposed<Dot>({w.d_state, kDtype, width}, p_.states, p_.channels, w.turned, state_width);
    Product<Dot>{w.weighted, width, 1, w.turned, state_width, db, state_width}
        .template run_as<Start::kAccumulate, false, true>(n, state_width, p_.channels);
    return d_end;
  }

  /// And from the outputs into what the state before the chunk met: dC, the decays from its start.
  double state_before(const Place& at, const SsdSteps<T>& s, const T* state, bool behind, T* dc,
                      const Workspace& w) const {
    const int64_t n = at.n, width = chunk_.width, state_width = chunk_.state_width;
    for (int64_t t = 0; t < n; ++t) {
      for (int64_t c = 0; c < width; c += L) {
        store(w.weighted + t * width + c, load(w.dy + t * width + c) * s.from_start[t]);
      }
    }
    transposed<Dot>({state, kDtype, width}, p_.states, p_.channels, w.turned, state_width);
    Product<Dot>{w.weighted, width, 1, w.turned, state_width, w.product, state_width}
        .template run_as<Start::kZero, false, true>(n, state_width, p_.channels);
    for (int64_t t = 0; t < n; ++t) {
      const TokenRows c_row = group_rows(p_.c, at).from(t);
      Vec<T> sum = {};
      for (int64_t i = 0; i < state_width; i += L) {
        const int64_t cell = t * state_width + i;
        const Vec<T> v = load(w.product + cell);
        store(dc + cell, load(dc + cell) + v);
        sum += v * load_as<T>(c_row.data, p_.dtype, i, p_.states - i);
      }
      w.da[t] += sum_of_lanes<T>(sum);
    }
    if (!behind) return 0;
    Vec<T> both = {};
    for (int64_t i = 0; i < p_.states; ++i) {
      for (int64_t c = 0; c < p_.channels; c += L) {
        const int64_t left = p_.channels - c, cell = i * width + c;
        const Vec<T> v = load(state + cell) * load(w.d_state + cell);
        both += left >= L ? v : select<T>(iota<T>() < IntOf<T>(left), v, Vec<T>{});
      }
    }
    return double(s.whole) * double(sum_of_lanes<T>(both));
  }

  /// a_t is the sum of dt A up to t, so the gradient of dt_t A is the sum of da from t on.
  void finish_steps(const Place& at, const SsdSteps<T>& s, double d_end, T* d_rate, T* d_bias,
                    const Workspace& w) const {
    const double rate = double(static_cast<const T*>(p_.a)[at.head]);
    const int64_t to = at.run.batch * g_.ddt.batch + at.head * g_.ddt.head + at.t0 * g_.ddt.token;
    double after = d_end, rate_sum = 0, bias_sum = 0;
    for (int64_t t = at.n - 1; t >= 0; --t) {
      after += double(w.da[t]);
      rate_sum += after * double(s.dt[t]);
      const T ddt = T(double(w.ddt[t]) + after * rate) * s.slope[t];
      bias_sum += double(ddt);
      store_as<T>(g_.ddt.data, p_.dt_dtype, to + t * g_.ddt.token, broadcast(ddt), 1);
    }
    *d_rate += T(rate_sum);
    *d_bias += T(bias_sum);
  }

  /// dC += d(CB^T) B, dB += d(CB^T)^T C, and both to where they go. row: of the chunk in the span.
  void finish_group(const Place& at, int64_t c, int64_t row, const Workspace& w) const {
    const int64_t n = at.n, state_width = chunk_.state_width;
    const T* d_scores = w.d_scores + c * p_.chunk * p_.chunk;
    T* db = w.db + row * state_width;
    T* dc = w.dc + row * state_width;
    scale_states(p_.b, at, nullptr, w.scaled);
    scale_states(p_.c, at, nullptr, w.product);
    for (int64_t t = 0; t < n; t += kStrip) {
      const int64_t count = min_of(kStrip, n - t);
      Product<Dot>{d_scores + t * p_.chunk, p_.chunk,   1, w.scaled, state_width,
                   dc + t * state_width,    state_width}
          .template run_as<Start::kAccumulate, false, true>(count, state_width, t + count);
      Product<Dot>{
          d_scores + t * p_.chunk + t, 1,          p_.chunk, w.product + t * state_width, state_width,
          db + t * state_width,        state_width}
          .template run_as<Start::kAccumulate, false, false>(count, state_width, n - t);
    }
    for (int64_t t = 0; t < n; ++t) {
      void* db_row = const_cast<void*>(group_rows(g_.db, at).from(t).data);
      void* dc_row = const_cast<void*>(group_rows(g_.dc, at).from(t).data);
      for (int64_t i = 0; i < p_.states; i += L) {
        store_as<T>(db_row, p_.dtype, i, load(db + t * state_width + i), p_.states - i);
        store_as<T>(dc_row, p_.dtype, i, load(dc + t * state_width + i), p_.states - i);
      }
    }
  }

  /// dA, d_bias and dD: the spans' shares, in order.
  void add_shares(const T* shares) const {
    for (int64_t i = 0; i < share_size(); ++i) {
      double sum = 0;
      for (int64_t k = 0; k < p_.runs.span_count; ++k) sum += double(shares[k * share_size() + i]);
      if (i < p_.heads) {
        static_cast<T*>(g_.da)[i] = T(sum);
      } else if (i < 2 * p_.heads) {
        static_cast<T*>(g_.d_bias)[i - p_.heads] = T(sum);
      } else if (g_.dd) {
        static_cast<T*>(g_.dd)[i - 2 * p_.heads] = T(sum);
      }
    }
  }

  const SsdParams& p_;
  const SsdGradients& g_;
  SsdChunk<Dot> chunk_;
  T *scores_ = nullptr, *d_boundaries_ = nullptr, *decays_ = nullptr;
};

}  // namespace

void ssd_backward(const SsdParams& p, const SsdGradients& g) {
  p.dtype == Dtype::kDouble ? Backward<DotDouble>(p, g).run() : Backward<DotFloat>(p, g).run();
}

}  // namespace longspan::LONGSPAN_ISA
