// Block-sparse attention: a mask's lists into AttentionBlocks, and attention's kernels.
#include "kernels/table.h"
#include "torch/attention_arguments.h"

namespace longspan::binding {
namespace {

/// A block mask's tensors (patterns/block_mask.py), kept while a kernel reads them.
class Lists {
 public:
  Lists(Tensor row_begins, Tensor columns, Tensor row_patterns, Tensor column_begins, Tensor rows,
        Tensor column_patterns, Tensor bits, int64_t batch, int64_t heads)
      : tensors_{row_begins, columns, row_patterns, column_begins, rows, column_patterns, bits},
        batch_(batch), heads_(heads) {
    constexpr ScalarType kTypes[] = {ScalarType::Long, ScalarType::Int, ScalarType::Int,
                                     ScalarType::Long, ScalarType::Int, ScalarType::Int,
                                     ScalarType::Long};
    for (int i = 0; i < 7; ++i) {
      STD_TORCH_CHECK(tensors_[i].scalar_type() == kTypes[i],
                      "block_sparse_attention: a list has the wrong dtype");
      tensors_[i] = torch::stable::contiguous(tensors_[i]);
    }
  }

  void put_into(AttentionParams& p) const {
    AttentionBlocks& x = p.blocks;
    const Tensor& bits = tensors_[6];
    STD_TORCH_CHECK(bits.dim() == 3 && bits.size(0) >= 1 && bits.size(1) >= 1 && bits.size(2) >= 1 &&
                        bits.size(2) % kLeastKeyBlock == 0,
                    "block_sparse_attention: bits is (patterns, query block / 64, key block)");
    STD_TORCH_CHECK((batch_ == 1 || batch_ == p.batch) && (heads_ == 1 || heads_ == p.heads),
                    "block_sparse_attention: lists are of q's batch and heads, or shared");
    x.query_block = 64 * bits.size(1), x.key_block = bits.size(2);
    x.head = heads_ == 1 ? 0 : 1;
    x.batch = batch_ == 1 ? 0 : heads_;
    const int64_t lists = batch_ * heads_;
    const int64_t query_blocks = (p.tokens + x.query_block - 1) / x.query_block;
    const int64_t key_blocks = (p.keys + x.key_block - 1) / x.key_block;
    check(0, lists * query_blocks, key_blocks, bits.size(0));
    check(3, lists * key_blocks, query_blocks, bits.size(0));
    x.row_begins = data<int64_t>(0), x.columns = data<int32_t>(1), x.row_patterns = data<int32_t>(2);
    x.column_begins = data<int64_t>(3), x.rows = data<int32_t>(4);
    x.column_patterns = data<int32_t>(5), x.bits = data<uint64_t>(6);
  }

 private:
  template <class T>
  const T* data(int i) const {
    return static_cast<const T*>(tensors_[i].const_data_ptr());
  }

  /// Of begins, indices and patterns from tensor `at` on: all within what they point into, ascending.
  void check(int at, int64_t count, int64_t limit, int64_t patterns) const {
    const int64_t total = tensors_[at + 1].numel();
    STD_TORCH_CHECK(tensors_[at].numel() == count + 1 && tensors_[at + 2].numel() == total,
                    "block_sparse_attention: the lists are of another shape than q and k");
    const int64_t* begins = data<int64_t>(at);
    const int32_t *index = data<int32_t>(at + 1), *pattern = data<int32_t>(at + 2);
    bool fine = begins[0] == 0 && begins[count] == total;
    for (int64_t i = 0; i < count && fine; ++i) {
      fine = begins[i] <= begins[i + 1] && begins[i + 1] <= total;
      for (int64_t j = begins[i]; j < begins[i + 1] && fine; ++j) {
        fine = index[j] >= 0 && index[j] < limit && (j == begins[i] || index[j] > index[j - 1]) &&
               pattern[j] >= 0 && pattern[j] < patterns;
      }
    }
    STD_TORCH_CHECK(fine, "block_sparse_attention: a list leaves the blocks, or does not ascend");
  }

  Tensor tensors_[7];
  int64_t batch_, heads_;
};

std::tuple<Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, Tensor row_begins, Tensor columns,
                                   Tensor row_patterns, Tensor column_begins, Tensor rows,
                                   Tensor column_patterns, Tensor bits, OptionalTensor slopes,
                                   OptionalTensor seed, int64_t list_batch, int64_t list_heads,
                                   double scale, double softcap, double dropout_p) {
  const OptionalTensor none;
  AttentionArguments a(q, k, v, none, none, slopes, none, none, none, seed, -1, -1, 0, scale, softcap,
                       dropout_p);
  const Lists lists(row_begins, columns, row_patterns, column_begins, rows, column_patterns, bits,
                    list_batch, list_heads);
  lists.put_into(a.params);
  Tensor out = empty_heads(q, v.size(3));
  Tensor lse = empty_of(q, {q.size(0), q.size(1), q.size(2)}, sum_type(q));
  a.params.out = heads(out);
  a.params.lse = lse.data_ptr();
  kernels().attention_forward(a.params);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor d_out, OptionalTensor d_lse, Tensor q, Tensor k,
                                            Tensor v, Tensor out, Tensor lse, Tensor row_begins,
                                            Tensor columns, Tensor row_patterns, Tensor column_begins,
                                            Tensor rows, Tensor column_patterns, Tensor bits,
                                            OptionalTensor slopes, OptionalTensor seed,
                                            int64_t list_batch, int64_t list_heads, double scale,
                                            double softcap, double dropout_p) {
  const OptionalTensor none;
  AttentionBackwardArguments a(d_out, d_lse, q, k, v, out, lse, none, none, slopes, none, none, none,
                               seed, -1, -1, 0, scale, softcap, dropout_p);
  const Lists lists(row_begins, columns, row_patterns, column_begins, rows, column_patterns, bits,
                    list_batch, list_heads);
  lists.put_into(a.params);
  Tensor dq = empty_heads(q, q.size(3)), dk = empty_heads(k, k.size(3)), dv = empty_heads(v, v.size(3));
  a.gradients.dq = heads(dq), a.gradients.dk = heads(dk), a.gradients.dv = heads(dv);
  kernels().attention_backward(a.params, a.gradients);
  return {dq, dk, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(longspan, CPU, m) {
  m.impl("block_sparse_attention_forward", TORCH_BOX(&forward));
  m.impl("block_sparse_attention_backward", TORCH_BOX(&backward));
}

}  // namespace longspan::binding
