// One step of the scan for each of many sequences. The limit is reading and writing the states once,
// so they are taken as they lie: states of a channel along the lanes,
//
//     h = exp(D A) h + (D x) B        y = sum over lanes  C h
//
// with the step sizes, and the sums over lanes, of a vector's width of channels at a time.

#include "kernels/selective_scan_steps.h"
#include "kernels/table.h"

namespace longspan::LONGSPAN_ISA {
namespace {

constexpr int64_t kLeastStates = 1 << 15;  // a thread is not worth its start below
constexpr int64_t kStatesPerTask = 1 << 16;
/// Bytes of state to ask for early: the window of instructions sees 1 KB.
constexpr int64_t kAhead = 2048;

template <class T>
class StateUpdate {
  static constexpr int L = kLanes<T>;
  static constexpr int64_t kChannels = 16 * L;  ///< of a task

 public:
  explicit StateUpdate(const StateUpdateParams& p) : p_(p), row_(round_up(p.states, L)) {}

  void run() {
    const int64_t blocks = ceil_div(p_.channels, kChannels), all = p_.batch * p_.heads * blocks;
    if (all == 0) return;
    // A task is so long a run of blocks that what is asked for ahead is mostly its own.
    const int64_t run = max_of<int64_t>(1, kStatesPerTask / (kChannels * p_.states));
    const int64_t tasks = ceil_div(all, run);
    const int64_t worth = p_.batch * p_.heads * p_.channels * p_.states / kLeastStates;
    const int threads = threads_for(tasks, int(min_of<int64_t>(p_.threads, max_of<int64_t>(1, worth))));
    Scratch scratch(threads * 2 * row_ * int64_t(sizeof(T)));
    parallel_for(tasks, threads, [&](int64_t task, int thread) {
      T* b = reinterpret_cast<T*>(scratch.at(0)) + thread * 2 * row_;
      for (int64_t i = task * run; i < min_of((task + 1) * run, all); ++i) {
        const int64_t channel = i % blocks * kChannels, head = i / blocks % p_.heads;
        update(i / blocks / p_.heads, head, channel, min_of(channel + kChannels, p_.channels), b,
               b + row_);
      }
    });
  }

 private:
  void update(int64_t batch, int64_t head, int64_t first, int64_t end, T* b, T* c) const {
    const auto at = [&](const ScanTensor& x, int64_t channel) {
      return batch * x.batch + head * x.time + channel * x.channel;
    };
    const int64_t slot = p_.slots ? p_.slots[batch] : batch;
    if (slot < 0) {
      for (int64_t i = first; i < end; i += L) {
        store_lanes<T>(p_.out, at(p_.out, i), p_.out.channel, Vec<T>{}, end - i);
      }
      return;
    }
    const int64_t group = head / (p_.heads / p_.groups);
    for (int64_t n = 0; n < p_.states; n += L) {
      const auto load_group = [&](const ScanTensor& x) {
        const int64_t from = batch * x.batch + group * x.group + n * x.state;
        return load_lanes<T>(x, from, x.state, p_.states - n);
      };
      store(b + n, load_group(p_.B));
      store(c + n, load_group(p_.C));
    }
    for (int64_t i = first; i < end; i += L) {
      const int64_t lanes = min_of<int64_t>(L, end - i);
      const auto lanes_of = [&](const ScanTensor& x) {
        return x.data ? load_lanes<T>(x, at(x, i), x.channel, lanes) : Vec<T>{};
      };
      const Vec<T> x = lanes_of(p_.x);
      Vec<T> step = lanes_of(p_.dt) + load_parameter(p_.bias, head, i, lanes);
      if (p_.softplus) step = softplus<T>(step);
      alignas(LONGSPAN_VECTOR_BYTES) T y[L];
      store(y, x * load_parameter(p_.D, head, i, lanes));
      alignas(LONGSPAN_VECTOR_BYTES) T steps[L], step_x[L];
      store(steps, step * T(kLog2e));  // decays are powers of two
      store(step_x, step * x);
      const ScanTensor state =
          moved(p_.state, slot * p_.state.batch + head * p_.state.time + i * p_.state.channel);
      const ScanTensor A = moved(p_.A, head * p_.A.time + i * p_.A.channel);
      // Whole vectors of states, and of A in the type that is calculated in: the common case, whose
      // cost must stay below that of the memory.
      const bool plain = state.state == 1 && p_.states % L == 0;
      if (A.state == 0) {  // one decay for all states of a channel, as Mamba-2 has it
        alignas(LONGSPAN_VECTOR_BYTES) T decays[L];
        store(decays, exp2_product<T>(load_lanes<T>(A, 0, A.channel, lanes), load(steps)));
        const auto decay = [&](int64_t k, int64_t) { return broadcast(decays[k]); };
        channels(plain, state, lanes, step_x, b, c, y, decay);
      } else if (plain && A.state == 1 && (sizeof(T) == 8 || A.dtype == Dtype::kFloat)) {
        const T* a = static_cast<const T*>(A.data);
        channels(true, state, lanes, step_x, b, c, y, [&](int64_t k, int64_t n) {
          return exp2_product<T>(load(a + k * A.channel + n), broadcast(steps[k]));
        });
      } else {
        channels(plain, state, lanes, step_x, b, c, y, [&](int64_t k, int64_t n) {
          const Vec<T> a = load_lanes<T>(A, k * A.channel + n * A.state, A.state, p_.states - n);
          return exp2_product<T>(a, broadcast(steps[k]));
        });
      }
      Vec<T> out = load(y);
      if (p_.z.data) {
        const Vec<T> z = lanes_of(p_.z);
        out *= z * sigmoid<T>(z);
      }
      store_lanes<T>(p_.out, at(p_.out, i), p_.out.channel, out, lanes);
    }
  }

  static ScanTensor moved(ScanTensor x, int64_t by) {
    x.data = static_cast<char*>(x.data) + by * size_of(x.dtype);
    return x;
  }

  LS_INLINE Vec<T> load_parameter(const ScanTensor& x, int64_t head, int64_t i, int64_t lanes) const {
    if (x.data == nullptr) return Vec<T>{};
    return load_lanes<T>(x, head * x.time + i * x.channel, x.channel, lanes);
  }

  /// A vector's width of channels; decay(channel, n) for the states from n on.
  template <class Decay>
  LS_INLINE void channels(bool plain, const ScanTensor& state, int64_t lanes, const T* step_x,
                          const T* b, const T* c, T* y, const Decay& decay) const {
    Vec<T> sums[L];
    const auto each = [&](const auto& update) {
      for (int64_t k = 0; k < L; ++k) {
        Vec<T> sum = {};
        for (int64_t n = 0; k < lanes && n < p_.states; n += L) {
          sum += update(k * state.channel + n * state.state, n, decay(k, n), load(b + n) * step_x[k]);
        }
        sums[k] = sum;
      }
    };
    if (plain) {
      with_dtype<T>(state.dtype, [&]<Dtype kDtype>() {
        each([&](int64_t at, int64_t n, Vec<T> decayed, Vec<T> added) {
          __builtin_prefetch(static_cast<char*>(state.data) + at * size_of(kDtype) + kAhead, 1);
          const Vec<T> h = decayed * load_as<T>(state.data, kDtype, at) + added;
          store_as<T>(state.data, kDtype, at, h);
          return h * load(c + n);
        });
      });
    } else {
      each([&](int64_t at, int64_t n, Vec<T> decayed, Vec<T> added) {
        const int64_t left = p_.states - n;
        const Vec<T> h = decayed * load_lanes<T>(state, at, state.state, left) + added;
        store_lanes<T>(state, at, state.state, h, left);
        // What lies past the last state may not be finite, and times zero would be NaN.
        const auto real = iota<T>() < IntOf<T>(min_of<int64_t>(L, left));
        return select<T>(real, h * load(c + n), Vec<T>{});
      });
    }
    add_sums_of_lanes<T>(sums, y);
  }

  const StateUpdateParams& p_;
  const int64_t row_;
};

}  // namespace

void selective_state_update(const StateUpdateParams& p) {
  p.in_double ? StateUpdate<double>(p).run() : StateUpdate<float>(p).run();
}

}  // namespace longspan::LONGSPAN_ISA
