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
  // (B, H, T, D) each. The lists of kernels/attention.h's AttentionBlocks: begins and bits int64, the
  // others int32; list_batch and list_heads are 1 where lists are shared. -> out, log-sum-exp
  m.def(
      "block_sparse_attention_forward(Tensor q, Tensor k, Tensor v, Tensor row_begins, Tensor columns, "
      "Tensor row_patterns, Tensor column_begins, Tensor rows, Tensor column_patterns, Tensor bits, "
      "Tensor? alibi_slopes, Tensor? dropout_seed, int list_batch, int list_heads, float scale, "
      "float softcap, float dropout_p) -> (Tensor, Tensor)");
  // -> dq, dk, dv
  m.def(
      "block_sparse_attention_backward(Tensor d_out, Tensor? d_lse, Tensor q, Tensor k, Tensor v, "
      "Tensor out, Tensor lse, Tensor row_begins, Tensor columns, Tensor row_patterns, "
      "Tensor column_begins, Tensor rows, Tensor column_patterns, Tensor bits, Tensor? alibi_slopes, "
      "Tensor? dropout_seed, int list_batch, int list_heads, float scale, float softcap, "
      "float dropout_p) -> (Tensor, Tensor, Tensor)");
  // Writes k_new and v_new into the caches. -> out, log-sum-exp
  m.def(
      "attention_decode(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_seqlens, "
      "Tensor? k_new, Tensor? v_new, Tensor? cos, Tensor? sin, Tensor? block_table, "
      "Tensor? cache_starts, Tensor? cache_batch_idx, Tensor? sinks, Tensor? alibi_slopes, "
      "bool interleaved, int left, int right, int sink_tokens, float scale, float softcap) "
      "-> (Tensor, Tensor)");
  // x (B, C, L), weight (C, W), states (B, C, W - 1). -> out, final state (empty where not asked for)
  m.def(
      "causal_conv1d_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, "
      "Tensor? seq_idx, bool silu, bool return_final_state) -> (Tensor, Tensor)");
  // -> dx, d_weight and d_bias in the accumulation's dtype (d_bias empty where there is none),
  //    d_initial_state (likewise)
  m.def(
      "causal_conv1d_backward(Tensor d_out, Tensor? d_final_state, Tensor x, Tensor weight, "
      "Tensor? bias, Tensor? initial_state, Tensor? seq_idx, bool silu) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  // Writes x into the state. -> out
  m.def(
      "causal_conv1d_update(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, "
      "Tensor? cache_seqlens, Tensor? conv_state_indices, bool silu) -> Tensor");
  // x (R, D), directions_t (D, m rounded up to 16). -> y (R, m), and the maximum of each row of
  // products: features, stabilised by it, where own_maximum, else the products for favor_exp_rows
  m.def(
      "favor_forward(Tensor x, Tensor directions_t, int features, bool own_maximum, float eps) "
      "-> (Tensor, Tensor)");
  // Writes exp(y - offset) / sqrt(m) + eps into y (R, m), offset (R,)
  m.def("favor_exp_rows(Tensor(a!) y, Tensor offset, float eps) -> ()");
  // d_y, y (R, m), x (R, D), directions (m, D rounded up to 16). -> dx
  m.def("favor_backward(Tensor d_y, Tensor y, Tensor x, Tensor directions, float eps) -> Tensor");
  // x, z (R, N). -> out, 1 / root mean square (R, N / group_size)
  m.def(
      "rms_norm_gated_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? z, float eps, "
      "int group_size, bool norm_before_gate) -> (Tensor, Tensor)");
  // -> dx, d_weight and d_bias in the accumulation's dtype, dz (empty where there is none)
  m.def(
      "rms_norm_gated_backward(Tensor d_out, Tensor x, Tensor weight, Tensor? bias, Tensor? z, "
      "Tensor rstd, float eps, int group_size, bool norm_before_gate) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  // q (B, H, T, D), k (B, H_kv, T, D), cos and sin (T, R) or (1 or B, T, R), or tables (max_position, R)
  // with positions (T,) or (B, T), or with cu_seqlens, where B = 1. -> the same turned, by the opposite
  // angle where inverse; the second is empty where there is no k
  m.def(
      "apply_rotary(Tensor q, Tensor? k, Tensor cos, Tensor sin, Tensor? positions, "
      "Tensor? cu_seqlens, bool interleaved, bool inverse) -> (Tensor, Tensor)");
  m.def(
      "apply_rotary_(Tensor(a!) q, Tensor(b!)? k, Tensor cos, Tensor sin, Tensor? positions, "
      "Tensor? cu_seqlens, bool interleaved) -> ()");
  // x, z (B, L, H, P), dt (B, L, H), B and C (B, L, G, N). -> out, final states (B, H, P, N), states of
  // the packed sequences (S, H, P, N), states at span boundaries (kernels/ssd.h); empty where not asked
  // for
  m.def(
      "ssd_forward(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
      "Tensor? dt_bias, Tensor? initial_states, Tensor? seq_idx, Tensor? cu_seqlens, int chunk_size, "
      "bool dt_softplus, float dt_min, float dt_max, bool return_final_states, "
      "bool return_varlen_states, bool keep_boundaries) -> (Tensor, Tensor, Tensor, Tensor)");
  // -> dx, ddt, dA, dB, dC, dD (H, P), dz, the sum of ddt (H,), d_initial_states; dD, dz and the last
  // empty where there are none
  m.def(
      "ssd_backward(Tensor d_out, Tensor? d_final_states, Tensor? d_varlen_states, Tensor boundaries, "
      "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
      "Tensor? initial_states, Tensor? seq_idx, Tensor? cu_seqlens, int chunk_size, bool dt_softplus, "
      "float dt_min, float dt_max) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, "
      "Tensor)");

  // q (B, H, T, K), k, v (B, H_kv, T, K or V), gate (B, H, T) or (B, H, T, K), states (B, H, K, V) or,
  // of packed sequences, (S, H, K, V); norms likewise (B, H, K). -> out, last state, last norm,
  // denominators (B, H, T), states between spans (kernels/runs.h); empty where not asked for
  m.def(
      "linear_attention_forward(Tensor q, Tensor k, Tensor v, Tensor? gate, Tensor? initial_state, "
      "Tensor? initial_norm, Tensor? cu_seqlens, bool causal, float scale, bool normalize, float eps, "
      "bool return_final_state, bool keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  // out where normalized. -> dq, dk, dv, d_gate, d_initial_state, d_initial_norm (empty where there are
  // none)
  m.def(
      "linear_attention_backward(Tensor d_out, Tensor? d_state, Tensor? d_norm, Tensor? out, "
      "Tensor denominators, Tensor boundaries, Tensor q, Tensor k, Tensor v, Tensor? gate, "
      "Tensor? initial_state, Tensor? initial_norm, Tensor? cu_seqlens, bool causal, float scale, "
      "bool normalize, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // q (B, H, K), k, v (B, H_kv, K or V), gate (B, H) or (B, H, K). Writes state (B, H, K, V) and norm
  m.def(
      "linear_attention_step(Tensor q, Tensor k, Tensor v, Tensor(a!) state, Tensor(b!)? norm, "
      "Tensor? gate, float scale, float eps) -> Tensor");
  // q, k (B, H, T, K), v (B, HV, T, V), beta, gate (B, HV, T), states (B, HV, K, V) or, of packed
  // sequences, (S, HV, K, V). -> out, last state, states between spans (kernels/runs.h); empty where not
  // asked for
  m.def(
      "delta_rule_forward(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? gate, "
      "Tensor? initial_state, Tensor? cu_seqlens, float scale, bool return_final_state, bool keep) "
      "-> (Tensor, Tensor, Tensor)");
  // -> dq, dk, dv, d_beta, d_gate, d_initial_state (empty where there are none)
  m.def(
      "delta_rule_backward(Tensor d_out, Tensor? d_state, Tensor boundaries, Tensor q, Tensor k, "
      "Tensor v, Tensor beta, Tensor? gate, Tensor? initial_state, Tensor? cu_seqlens, float scale) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // q, k (B, H, K), v (B, HV, V), beta, gate (B, HV). Writes state (B, HV, K, V)
  m.def(
      "delta_rule_step(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor(a!) state, Tensor? gate, "
      "float scale) -> Tensor");
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
  // q (B, H, T, D), k and v (B, H_kv, S, D), block_indices (B, H_kv or H, T, n). -> out, log-sum-exp
  m.def(
      "selected_attention_forward(Tensor q, Tensor k, Tensor v, Tensor block_indices, "
      "Tensor? cache_seqlens, int block_size, bool causal, float scale) -> (Tensor, Tensor)");
  m.def(
      "selected_attention_backward(Tensor d_out, Tensor? d_lse, Tensor q, Tensor k, Tensor v, "
      "Tensor out, Tensor lse, Tensor block_indices, Tensor? cache_seqlens, int block_size, "
      "bool causal, float scale) -> (Tensor, Tensor, Tensor)");
  // own (B, H, T, D) and own_lse (B, H, T), parts (P, D) and parts_lse (P,), place (parts a row, B * H *
  // T) int64, a permutation of 0 to P - 1. -> out
  m.def(
      "merge_parts(Tensor own, Tensor own_lse, Tensor parts, Tensor parts_lse, Tensor place) -> Tensor");
  // -> d_own, d_own_lse, d_parts, d_parts_lse
  m.def(
      "merge_parts_backward(Tensor d_out, Tensor own, Tensor own_lse, Tensor parts, Tensor parts_lse, "
      "Tensor place) -> (Tensor, Tensor, Tensor, Tensor)");
  // -> block indices (B, H_kv, T, count) int64, ascending, then -1; and where there is v_cmp the
  // attention to the compressed keys and its log-sum-exp, else empty
  m.def(
      "select_blocks(Tensor q, Tensor k_cmp, Tensor? v_cmp, Tensor? cache_seqlens, Tensor? counts, "
      "int keys, int compress_length, int compress_stride, int block_size, int count, bool causal, "
      "float scale) -> (Tensor, Tensor, Tensor)");
  // state (slots, H, P, N), x, dt, z (B, H, P), A (H, P, N), B, C (B, G, N), D, dt_bias (H, P)
  m.def(
      "selective_state_update(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, "
      "Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? state_batch_indices, bool dt_softplus) -> Tensor");
}
