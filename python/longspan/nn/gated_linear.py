"""`GatedLinearAttention`, the layer of GLA."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from longspan.nn._recurrent import GatedOutput, Memory, RecurrentMixer, Rows, find_activation
from longspan.ops._checks import check_positive, sum_dtype
from longspan.ops.linear_attention import linear_attention, linear_attention_step


class GatedLinearAttention(GatedOutput, RecurrentMixer):
    """Linear attention in which each key channel forgets at a rate that the token decides.

    ``o_proj(rms(S_t q_t) * swish(g_proj(x)))`` with ``S_t = exp(g_t) S_{t-1} + k_t v_t^T`` and
    ``g = logsigmoid(gk_proj(x)) / gate_logit_normalizer`` (Yang et al. 2023, Gated linear attention,
    section 4.4).

    Parameters and options are named as in flash-linear-attention's layer.

    Args:
        hidden_size: Channels of x.
        expand_k: K of all heads together is ``expand_k * hidden_size``.
        expand_v: V likewise.
        num_heads: H.
        num_kv_heads: H_kv, a divisor of H; None is H.
        feature_map: A function of q and k: "relu", "silu" and so on; None is none.
        use_short_conv: A causal convolution with silu after each of q_proj, k_proj and v_proj.
        conv_size: Its width.
        conv_bias: Its bias.
        use_output_gate: Gate the normed heads by ``gate_fn(g_proj(x))``.
        gate_fn: "swish", "sigmoid" and so on.
        elementwise_affine: Whether the norm has a weight.
        norm_eps: Of the norm.
        gate_logit_normalizer: What the logarithms of the decays are divided by; the greater, the longer
            the memory.
        gate_low_rank_dim: Channels between gk_proj's two matrices.
        clamp_min: Least logarithm of a decay; None is none.
        fuse_norm: Names the norm g_norm_swish_gate rather than g_norm where the gate is a swish;
            results are the same.
        layer_idx: This layer's number in a model.
        device, dtype: Of the parameters.

    Raises:
        ValueError: Sizes do not fit together, or a name is not known.

    Example::

        layer = longspan.nn.GatedLinearAttention(256, num_heads=4)
        layer(torch.randn(1, 4096, 256)).sum().backward()
    """

    def __init__(
        self,
        hidden_size: int = 1024,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        feature_map: str | None = None,
        use_short_conv: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        use_output_gate: bool = True,
        gate_fn: str = "swish",
        elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        gate_logit_normalizer: float = 16,
        gate_low_rank_dim: int = 16,
        clamp_min: float | None = None,
        fuse_norm: bool = True,
        layer_idx: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the parameters."""
        super().__init__()
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self._make_projections(
            hidden_size, hidden_size * expand_k, hidden_size * expand_v, num_heads, num_kv_heads,
            (conv_size, conv_bias) if use_short_conv else None, **kind,
        )  # fmt: skip
        check_positive("GatedLinearAttention", "gate_low_rank_dim", gate_low_rank_dim)
        if not gate_logit_normalizer > 0:
            raise ValueError(
                "GatedLinearAttention: gate_logit_normalizer: expected above 0, "
                f"got {gate_logit_normalizer}"
            )
        self._make_output(
            hidden_size, use_output_gate, gate_fn, fuse_norm, elementwise_affine, norm_eps, **kind
        )
        self._feature_map = find_activation(
            "GatedLinearAttention", "feature_map", feature_map or "identity"
        )
        self.gk_proj = nn.Sequential(
            nn.Linear(hidden_size, gate_low_rank_dim, bias=False, **kind),
            nn.Linear(gate_low_rank_dim, self.num_kv_heads * self.head_k_dim, **kind),
        )
        self.gate_logit_normalizer, self.clamp_min = gate_logit_normalizer, clamp_min
        self.layer_idx = layer_idx

    def _mix(
        self, rows: Rows, q: Tensor, k: Tensor, v: Tensor, memory: Memory | None
    ) -> tuple[Tensor, Memory]:
        out, last = linear_attention(
            self._feature_map(q), self._feature_map(k), v, gate=self._gate(rows).transpose(1, 2),
            initial_state=None if memory is None else memory[0], return_final_state=True,
            cu_seqlens=rows.cu_seqlens,
        )  # fmt: skip
        return out, (last,)

    def _mix_step(self, rows: Rows, q: Tensor, k: Tensor, v: Tensor, memory: Memory) -> Tensor:
        q, k = self._feature_map(q), self._feature_map(k)
        return linear_attention_step(q, k, v, memory[0], gate=self._gate(rows).squeeze(1))

    def _gate(self, rows: Rows) -> Tensor:
        """(B, T, H, K), in float32 at least: the sums over many tokens matter."""
        gate = self.gk_proj(rows.hidden)
        gate = logsigmoid(gate.to(sum_dtype(gate))) / self.gate_logit_normalizer
        if self.clamp_min is not None:
            gate = gate.clamp(min=self.clamp_min)
        gate = gate.unflatten(-1, (self.num_kv_heads, self.head_k_dim))
        return gate.repeat_interleave(self.num_heads // self.num_kv_heads, dim=2)
