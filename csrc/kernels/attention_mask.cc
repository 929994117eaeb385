// The gradient of an additive mask: dS summed over what the mask was broadcast over.
//
// A task owns a part of d_mask that no other writes to (a batch entry, head and block of queries, as
// far as the mask tells them apart) and goes over everything that falls into it, in order. It
// computes the tiles of the backward once more, and only where a mask asks for its gradient.

#include "kernels/attention_gradient.h"
#include "kernels/table.h"

namespace longspan::LONGSPAN_ISA {
namespace {

template <class Dot>
class MaskBackward {
  using T = typename Dot::Sum;
  using Gradient = AttentionGradient<Dot>;

 public:
  MaskBackward(const AttentionParams& p, const AttentionGradients& g, const AttentionMask& d_mask)
      : p_(p), d_mask_(d_mask), index_((p.batch + 1) * int64_t(sizeof(int64_t))),
        gradient_(p, g, reinterpret_cast<int64_t*>(index_.at(0)), kKeyBlock) {}

  void run() {
    const int64_t blocks = ceil_div(p_.tokens, kQueryBlock);
    const int64_t batches = d_mask_.batch ? p_.batch : 1, heads = d_mask_.head ? p_.heads : 1;
    const int64_t parts = d_mask_.query ? blocks : 1;
    const int64_t tasks = batches * heads * parts;
    const int threads = threads_for(tasks, p_.threads);
    Arena measure;
    gradient_.lay_out(measure);
    gradient_.lay_out_record(measure);
    Scratch scratch(measure.used() * threads);
    parallel_for(tasks, threads, [&](int64_t task, int thread) {
      Arena arena(scratch.at(measure.used() * thread));
      const auto work = gradient_.lay_out(arena);
      const auto record = gradient_.lay_out_record(arena);
      const int64_t b = task / (heads * parts), h = task / parts % heads, j = task % parts;
      for (int64_t bb = b; bb < (batches == 1 ? p_.batch : b + 1); ++bb) {
        for (int64_t hh = h; hh < (heads == 1 ? p_.heads : h + 1); ++hh) {
          for (int64_t jj = j; jj < (parts == 1 ? blocks : j + 1); ++jj) block(bb, hh, jj, work, record);
        }
      }
    });
  }

 private:
  void block(int64_t b, int64_t head, int64_t j, const typename Gradient::Workspace& w,
             const QueryRecord<Dot>& record) const {
    const ScoreRules<T> rules(p_, b, head);
    const Sequence& s = rules.sequence;
    const int64_t q0 = j * kQueryBlock;
    const typename Gradient::Place at{b, head, j, q0, min_of(q0 + kQueryBlock, s.tokens)};
    gradient_.prepare(at, record);
    const int64_t kv_head = head / (p_.heads / p_.kv_heads);
    Interval ranges[2];
    s.key_ranges(at.q0, at.q1, ranges);
    for (const Interval& range : ranges) {
      if (range.empty()) continue;
      for (int64_t k0 = range.begin & ~int64_t(1); k0 < range.end; k0 += kKeyBlock) {
        const int64_t k1 = min_of(k0 + kKeyBlock, range.end);
        const TokenRows k = gradient_.key_rows(p_.k, b, kv_head).from(k0);
        const TokenRows v = gradient_.key_rows(p_.v, b, kv_head).from(k0);
        gradient_.template tile<true>(rules, record, at,
                                      by_channel<Dot>(k, k1 - k0, p_.channels, w.keys),
                                      by_channel<Dot>(v, k1 - k0, p_.value_channels, w.values), k0, k1,
                                      s.all_visible(at.q0, at.q1, k0, k1), w);
        T* out = static_cast<T*>(d_mask_.data) + b * d_mask_.batch + head * d_mask_.head;
        for (int64_t q = at.q0; q < at.q1; ++q) {
          T* row = out + q * d_mask_.query;
          if (d_mask_.key == 0) {  // one number for all keys: many small terms, so not one at a time
            double sum = 0;
            for (int64_t key = 0; key < k1 - k0; ++key) {
              sum += double(w.d_scores[key * kQueryBlock + q - at.q0]);
            }
            *row += T(sum);
            continue;
          }
          for (int64_t key = k0; key < k1; ++key) {
            row[key * d_mask_.key] += w.d_scores[(key - k0) * kQueryBlock + q - at.q0];
          }
        }
      }
    }
  }

  const AttentionParams& p_;
  const AttentionMask& d_mask_;
  Scratch index_;
  Gradient gradient_;
};

}  // namespace

void attention_mask_backward(const AttentionParams& p, const AttentionGradients& g,
                             const AttentionMask& d_mask) {
  if (p.dtype == Dtype::kDouble) return MaskBackward<DotDouble>(p, g, d_mask).run();
  MaskBackward<DotFloat>(p, g, d_mask).run();
}

}  // namespace longspan::LONGSPAN_ISA
