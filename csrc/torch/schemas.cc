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

  // u, delta, z (B, D, L); A (D, N), complex (D, N, 2); B, C (D, N) or (B, G, N, L), likewise; packed
  // sequences as B = 1 with cu_seqlens. -> out, last state (sequences, D, N), and the states before
  // each chunk (chunks, N, D), of which there are none unless asked for
  m.def(
      "selective_scan_forward(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, "
      "Tensor? z, Tensor? delta_bias, Tensor? initial_state, Tensor? cu_seqlens, "
      "bool delta_softplus, bool keep_states) -> (Tensor, Tensor, Tensor)");
  // -> du, d_delta, dA, dB, dC, dD, dz, d_bias, d_initial_state (empty where there are none)
  m.def(
      "selective_scan_backward(Tensor d_out, Tensor? d_last_state, Tensor chunk_states, Tensor u, "
      "Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
      "Tensor? initial_state, Tensor? cu_seqlens, bool delta_softplus) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // state (slots, H, P, N), x, dt, z (B, H, P), A (H, P, N), B, C (B, G, N), D, dt_bias (H, P)
  m.def(
      "selective_state_update(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, "
      "Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? state_batch_indices, bool dt_softplus) -> Tensor");
}
