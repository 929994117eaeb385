// Mamba-2's scan, forward. C B^T first, for all chunks. Then a task is a head of a run, whose state
// stays in the cache from chunk to chunk; or, where those are too few to fill a machine, a head of a
// span:
//
//   1. each span's own last state, as if it began from zero     (spans in parallel)
//   2. boundary[k] += decay of span k * boundary[k - 1]         (in order)
//   3. each span's output, from the state at its boundary       (spans in parallel)
//
// Counted for 64 channels, 128 states and chunks of 64, a token and head: 8192 multiply-adds for the
// state, 8192 to read it, 2560 inside the chunk (40 of 64 keys a row, on average), 40 exponentials.

#include "kernels/ssd_chunk.h"
#include "kernels/table.h"

namespace longspan::LONGSPAN_ISA {
namespace {

/// Tasks that are worth having, at the least: a constant, so that results do not depend on the machine.
constexpr int64_t kEnoughTasks = 16;

template <class Dot>
class Forward {
  using T = typename Dot::Sum;
  static constexpr int L = kLanes<T>;

 public:
  explicit Forward(const SsdParams& p) : p_(p), chunk_(p_) {}

  void run() {
    const int64_t whole = p_.runs.run_count * p_.heads;
    const bool few = whole < kEnoughTasks && p_.runs.boundary_count > 0;
    const int64_t boundary_size = p_.runs.boundary_count * p_.heads * p_.states * p_.channels;
    Scratch own(few && p_.boundaries == nullptr ? boundary_size * int64_t(sizeof(T)) : 0);
    if (few && p_.boundaries == nullptr) p_.boundaries = own.at(0);
    const int threads = threads_for(max_of(whole, p_.runs.span_count * p_.heads), p_.threads);
    Arena measure;
    lay_out(measure);
    Scratch scratch(measure.used() * threads);
    const auto work = [&](int thread) {
      Arena arena(scratch.at(measure.used() * thread));
      return lay_out(arena);
    };
    Scratch score_space(chunk_.scores_size() * int64_t(sizeof(T)));
    T* scores = reinterpret_cast<T*>(score_space.at(0));
    parallel_for(p_.runs.span_count * p_.groups, threads, [&](int64_t task, int thread) {
      chunk_.group_scores(p_.runs.spans[task / p_.groups], task % p_.groups, scores,
                          work(thread).scaled);
    });

    if (!few) {
      parallel_for(whole, threads, [&](int64_t task, int thread) {
        run_whole(p_.runs.runs[task / p_.heads], task % p_.heads, scores, work(thread));
      });
      return;
    }
    Scratch decay_space(p_.runs.boundary_count * p_.heads * int64_t(sizeof(T)));
    T* decays = reinterpret_cast<T*>(decay_space.at(0));
    parallel_for(p_.runs.span_count * p_.heads, threads, [&](int64_t task, int thread) {
      own_state(p_.runs.spans[task / p_.heads], task % p_.heads, decays, work(thread));
    });
    parallel_for(whole, threads, [&](int64_t task, int) {
      join(p_.runs.runs[task / p_.heads], task % p_.heads, decays);
    });
    parallel_for(p_.runs.span_count * p_.heads, threads, [&](int64_t task, int thread) {
      const Span& span = p_.runs.spans[task / p_.heads];
      run_span(p_.runs.runs[span.run], span.index, task % p_.heads, scores, work(thread));
    });
    parallel_for(whole, threads, [&](int64_t task, int thread) {
      const Run& run = p_.runs.runs[task / p_.heads];
      if (run.spans() == 0) run_whole(run, task % p_.heads, scores, work(thread));
    });
  }

 private:
  struct Workspace {
    SsdSteps<T> steps;
    T* state;
    T* scaled;  ///< [chunk][state_width], twice: B^T and a copy of C before there are states
    T* mixed;   ///< M
    T* x;       ///< a copy, where memory does not have the form
    T* y;       ///< [chunk][width]
    T* row;
  };

  Workspace lay_out(Arena& arena) const {
    Workspace w;
    w.steps.lay_out(arena, p_.chunk);
    w.state = arena.take<T>(chunk_.state_size);
    w.scaled = arena.take<T>(2 * p_.chunk * chunk_.state_width);
    w.mixed = arena.take<T>(p_.chunk * p_.chunk);
    w.x = arena.take<T>(p_.chunk * chunk_.width);
    w.y = arena.take<T>(p_.chunk * chunk_.width);
    w.row = arena.take<T>(chunk_.width);
    return w;
  }

  bool state_wanted(const Run& run) const {
    return run.last >= 0 && (p_.sequence_states || (p_.final && chunk_.final_of(run) >= 0));
  }

  void run_whole(const Run& run, int64_t head, const T* scores, const Workspace& w) const {
    chunk_.load_state(chunk_.initial_of(run, head), w.state);
    for (int64_t k = 0; k < run.spans(); ++k) {
      walk(run, k, head, k + 1 < run.spans() || state_wanted(run), scores, w);
      if (p_.boundaries && k + 1 < run.spans()) {
        chunk_.store_boundary(w.state, chunk_.boundary(run.boundary + k, head));
      }
    }
    keep_last(run, head, w.state);
  }

  void run_span(const Run& run, int64_t k, int64_t head, const T* scores, const Workspace& w) const {
    if (k == 0) {
      chunk_.load_state(chunk_.initial_of(run, head), w.state);
    } else {
      chunk_.load_boundary(chunk_.boundary(run.boundary + k - 1, head), w.state);
    }
    walk(run, k, head, k + 1 == run.spans() && state_wanted(run), scores, w);
    if (k + 1 == run.spans()) keep_last(run, head, w.state);
  }

  void keep_last(const Run& run, int64_t head, const T* state) const {
    const int64_t final = chunk_.final_of(run);
    if (p_.final && final >= 0) chunk_.store_state(state, chunk_.state_at(p_.final, final, head));
    if (p_.sequence_states && run.last >= 0) {
      chunk_.store_state(state, chunk_.state_at(p_.sequence_states, run.last, head));
    }
  }

  /// The state that a span leaves if it begins from zero (the first: from the run's initial state), and
  /// how much of what it began from is left.
  void own_state(const Span& span, int64_t head, T* decays, Workspace w) const {
    const Run& run = p_.runs.runs[span.run];
    if (span.index + 1 == run.spans()) return;
    chunk_.load_state(span.index == 0 ? chunk_.initial_of(run, head) : nullptr, w.state);
    T decay = 1;
    for (int64_t t0 = run.begin_of(span.index); t0 < run.end_of(span.index); t0 += p_.chunk) {
      w.steps.prepare(p_, run.batch, head, t0, p_.chunk);
      decay *= w.steps.whole;
      advance(run, head, t0, p_.chunk, x_of(run, head, t0, p_.chunk, w), w);
    }
    const int64_t at = run.boundary + span.index;
    decays[at * p_.heads + head] = decay;
    chunk_.store_boundary(w.state, chunk_.boundary(at, head));
  }

  void join(const Run& run, int64_t head, const T* decays) const {
    const int64_t size = p_.states * p_.channels;
    for (int64_t k = 1; k + 1 < run.spans(); ++k) {
      const Vec<T> decay = broadcast(decays[(run.boundary + k) * p_.heads + head]);
      const T* before = chunk_.boundary(run.boundary + k - 1, head);
      T* state = chunk_.boundary(run.boundary + k, head);
      for (int64_t i = 0; i < size; i += L) {
        const int64_t n = min_of<int64_t>(size - i, L);
        store_first(state + i, load_first(state + i, n) + decay * load_first(before + i, n), n);
      }
    }
  }

  /// One span from the state in w.state, which is moved to the span's end if anyone wants it there.
  void walk(const Run& run, int64_t k, int64_t head, bool wanted, const T* scores, Workspace w) const {
    const int64_t last = run.end_of(k);
    for (int64_t t0 = run.begin_of(k); t0 < last; t0 += p_.chunk) {
      const int64_t n = min_of(p_.chunk, last - t0);
      w.steps.prepare(p_, run.batch, head, t0, n);
      const Operand<Dot> x = x_of(run, head, t0, n, w);
      const int64_t group = chunk_.group_of(head);
      const T* products = chunk_.scores_at(scores, run.batch, group, t0);
      chunk_.mix(w.steps, products, n, w.mixed);
      if (t0 == run.begin && run.initial < 0) {  // the state is zero
        chunk_.template add_mixed<Start::kZero>(w.mixed, x, n, w.y);
      } else {
        copy_rows<T>(chunk_.rows(p_.c, run.batch, group, t0), n, p_.states, chunk_.state_width,
                     w.steps.from_start, w.scaled);
        Product<Dot>{w.scaled, chunk_.state_width, 1, w.state, chunk_.width, w.y, chunk_.width}
            .template run_as<Start::kZero, false, true>(n, chunk_.width, p_.states);
        chunk_.template add_mixed<Start::kAccumulate>(w.mixed, x, n, w.y);
      }
      write(run, head, t0, n, x, w.y);
      if (wanted || t0 + n < last) advance(run, head, t0, n, x, w);
    }
  }

  Operand<Dot> x_of(const Run& run, int64_t head, int64_t t0, int64_t n, const Workspace& w) const {
    return by_token<Dot>(chunk_.rows(p_.x, run.batch, head, t0), n, p_.channels, true, w.x);
  }

  void advance(const Run& run, int64_t head, int64_t t0, int64_t n, Operand<Dot> x,
               const Workspace& w) const {
    copy_rows<T>(chunk_.rows(p_.b, run.batch, chunk_.group_of(head), t0), n, p_.states,
                 chunk_.state_width, w.steps.weight, w.scaled);
    chunk_.advance(w.scaled, w.steps.whole, x, n, w.state, w.row);
  }

  /// out = (y + D x) * silu(z)
  void write(const Run& run, int64_t head, int64_t t0, int64_t n, Operand<Dot> x, const T* y) const {
    const T* d = p_.d ? static_cast<const T*>(p_.d) + head * p_.channels : nullptr;
    const TokenRows out = chunk_.rows(p_.out, run.batch, head, t0);
    for (int64_t t = 0; t < n; ++t) {
      void* row = const_cast<void*>(out.from(t).data);
      for (int64_t c = 0; c < p_.channels; c += L) {
        const int64_t left = p_.channels - c;
        Vec<T> v = load(y + t * chunk_.width + c);
        if (d)
          v += (left >= L ? load(d + c) : load_first(d + c, left)) * load(x.data + t * x.stride + c);
        if (p_.z.data) {
          const TokenRows z_row = chunk_.rows(p_.z, run.batch, head, t0 + t);
          const Vec<T> z = load_as<T>(z_row.data, p_.dtype, c, left);
          v *= z * sigmoid<T>(z);
        }
        store_as<T>(row, p_.dtype, c, v, left);
      }
    }
  }

  SsdParams p_;  // a copy: boundaries may be our own
  SsdChunk<Dot> chunk_;
};

}  // namespace

void ssd_forward(const SsdParams& p) {
  p.dtype == Dtype::kDouble ? Forward<DotDouble>(p).run() : Forward<DotFloat>(p).run();
}

}  // namespace longspan::LONGSPAN_ISA
