// Every operator's schema, on one page. Semantics: the Python function of the same name in
// python/longspan/ops, which also carries the fake and the autograd.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(longspan, m) {
  // (B, H, T, D) each; packed sequences as B = 1 with cu_seqlens. -> out, log-sum-exp (B, H, T)
  m.def(
      "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? attn_mask, Tensor? sinks, "
      "Tensor? alibi_slopes, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? key_ranges, "
      "Tensor? dropout_seed, int left, int right, int sink_tokens, float scale, float softcap, "
      "float dropout_p) -> (Tensor, Tensor)");
  // -> dq, dk, dv, d_sinks (empty where there are none)
  m.def(
      "attention_backward(Tensor d_out, Tensor? d_lse, Tensor q, Tensor k, Tensor v, Tensor out, "
      "Tensor lse, Tensor? attn_mask, Tensor? sinks, Tensor? alibi_slopes, Tensor? cu_seqlens_q, "
      "Tensor? cu_seqlens_k, Tensor? key_ranges, Tensor? dropout_seed, int left, int right, "
      "int sink_tokens, float scale, float softcap, float dropout_p) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  // -> gradient of an additive mask, of the mask's shape
  m.def(
      "attention_mask_backward(Tensor d_out, Tensor? d_lse, Tensor q, Tensor k, Tensor v, "
      "Tensor out, Tensor lse, Tensor attn_mask, Tensor? sinks, Tensor? alibi_slopes, "
      "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? key_ranges, Tensor? dropout_seed, "
      "int left, int right, int sink_tokens, float scale, float softcap, float dropout_p) -> Tensor");
  // Writes k_new and v_new into the caches. -> out, log-sum-exp
  m.def(
      "attention_decode(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_seqlens, "
      "Tensor? k_new, Tensor? v_new, Tensor? cos, Tensor? sin, Tensor? block_table, "
      "Tensor? cache_starts, Tensor? cache_batch_idx, Tensor? sinks, Tensor? alibi_slopes, "
      "bool interleaved, int left, int right, int sink_tokens, float scale, float softcap) "
      "-> (Tensor, Tensor)");
}
