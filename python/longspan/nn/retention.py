"""`MultiScaleRetention`, the layer of RetNet."""

from typing import Any

import torch
from torch import Tensor

from longspan.nn._recurrent import GatedOutput, Memory, RecurrentMixer, Rows, find_activation
from longspan.nn.rotary import RotaryEmbedding
from longspan.ops._checks import sum_dtype
from longspan.ops.linear_attention import linear_attention, linear_attention_step


def retention_gate(heads: int, like: Tensor) -> Tensor:
    """``log(1 - 2^(-5 - h))``, the logarithm of each head's decay, (H,).

    In float32 beside half precision, in which 1 - 2^-12 is 1.
    """
    halvings = -5.0 - torch.arange(heads, dtype=torch.float64, device=like.device)
    return torch.log1p(-torch.exp2(halvings)).to(sum_dtype(like))


class MultiScaleRetention(GatedOutput, RecurrentMixer):
    """RetNet's retention: linear attention in which each head forgets at a rate of its own.

    ``o_proj(rms(retention) * swish(g_proj(x)))`` where retention sums
    ``gamma_h^(n - m) (q_n . k_m) v_m`` over the past, with rotated q and k and
    ``gamma_h = 1 - 2^(-5 - h)`` (Sun et al. 2023, Retentive network, equations 5 to 8: xPos with a decay
    for each head instead of each channel). The norm over each head stands for the paper's group norm.

    Parameters and options are named as in flash-linear-attention's layer.

    Args:
        hidden_size: Channels of x.
        expand_k: K of all heads together is ``expand_k * hidden_size``.
        expand_v: V likewise.
        num_heads: H.
        num_kv_heads: H_kv, a divisor of H; None is H.
        feature_map: A function of q and k before they are rotated: "relu", "silu" and so on; None is
            none.
        use_short_conv: A causal convolution with silu after each of q_proj, k_proj and v_proj.
        conv_size: Its width.
        conv_bias: Its bias.
        use_output_gate: Gate the normed heads by ``gate_fn(g_proj(x))``.
        gate_fn: "swish", "sigmoid" and so on.
        elementwise_affine: Whether the norm has a weight.
        norm_eps: Of the norm.
        fuse_norm: Names the norm g_norm_swish_gate rather than g_norm where the gate is a swish;
            results are the same.
        layer_idx: This layer's number in a model.
        rotary_base: Of the rotation's wavelengths.
        rotary_interleaved: Rotate channels (2 i, 2 i + 1) as the paper has it, rather than
            (i, i + K / 2).
        device, dtype: Of the parameters.

    Raises:
        ValueError: Sizes do not fit together, or a name is not known.

    Example::

        layer = longspan.nn.MultiScaleRetention(256, num_heads=4)
        cache = layer.make_cache(batch_size=1)
        with torch.no_grad():
            layer(torch.randn(1, 1000, 256), cache=cache)
            layer(torch.randn(1, 1, 256), cache=cache)
    """

    def __init__(
        self,
        hidden_size: int = 1024,
        expand_k: float = 1.0,
        expand_v: float = 2.0,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        feature_map: str | None = None,
        use_short_conv: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        use_output_gate: bool = True,
        gate_fn: str = "swish",
        elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        fuse_norm: bool = True,
        layer_idx: int | None = None,
        *,
        rotary_base: float = 10000.0,
        rotary_interleaved: bool = False,
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
        if self.head_k_dim % 2:
            raise ValueError(
                "MultiScaleRetention: expand_k: expected an even number of channels a head, to be "
                f"rotated, got {self.head_k_dim}"
            )
        self._make_output(
            hidden_size, use_output_gate, gate_fn, fuse_norm, elementwise_affine, norm_eps, **kind
        )
        self._feature_map = find_activation(
            "MultiScaleRetention", "feature_map", feature_map or "identity"
        )
        self.rotary = RotaryEmbedding(self.head_k_dim, base=rotary_base, interleaved=rotary_interleaved)
        self.layer_idx = layer_idx

    def _mix(
        self, rows: Rows, q: Tensor, k: Tensor, v: Tensor, memory: Memory | None
    ) -> tuple[Tensor, Memory]:
        q, k = self.rotary(self._feature_map(q), self._feature_map(k), rows.positions())
        out, last = linear_attention(
            q, k, v, gate=retention_gate(self.num_heads, q),
            initial_state=None if memory is None else memory[0], return_final_state=True,
            cu_seqlens=rows.cu_seqlens,
        )  # fmt: skip
        return out, (last,)

    def _mix_step(self, rows: Rows, q: Tensor, k: Tensor, v: Tensor, memory: Memory) -> Tensor:
        q, k = (self._feature_map(x)[:, :, None] for x in (q, k))
        q, k = (x.squeeze(2) for x in self.rotary(q, k, rows.positions()))
        return linear_attention_step(q, k, v, memory[0], gate=retention_gate(self.num_heads, q))
