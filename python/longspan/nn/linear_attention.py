"""`LinearAttention`, a layer of linear attention with any of several feature maps."""

from typing import Any

import torch
from torch import Tensor, nn

from longspan.nn._recurrent import Memory, RecurrentMixer, Rows
from longspan.nn.feature_maps import FEATURE_MAPS
from longspan.nn.norm import RMSNormGated
from longspan.ops.linear_attention import linear_attention, linear_attention_step


class LinearAttention(RecurrentMixer):
    """Linear attention (Katharopoulos et al. 2020, Transformers are RNNs).

    ``o_proj(norm(linear_attention(f_q(q_proj(x)), f_k(k_proj(x)), v_proj(x))))`` with feature maps f.

    Parameters and options are named as in flash-linear-attention's layer, whose defaults differ: a
    feature_map "elementwise_product" and an output_norm "rmsnorm", without do_feature_map_norm. The
    defaults here are the paper's.

    Args:
        hidden_size: Channels of x.
        expand_k: K of all heads together is ``expand_k * hidden_size``.
        expand_v: V likewise.
        num_heads: H.
        num_kv_heads: H_kv, a divisor of H; None is H.
        feature_map: "elu" (elu + 1), "relu", "identity", "softmax" (over the channels), or with
            parameters, in feature_map_q and feature_map_k: "elementwise_product", "hedgehog", "t2r"; or
            "dpfp".
        tie_feature_map_qk: One module for both.
        output_norm: "identity", or "rmsnorm": over each head, module norm.
        norm_q, norm_k: Divide features by their sum, and 1e-4.
        do_feature_map_norm: Divide by the sum of the weights, for features that are not negative.
        elementwise_affine: Whether norm has a weight.
        norm_eps: Of norm.
        layer_idx: This layer's number in a model.
        causal: Whether a token sees only those before it and itself. Else there are no states, and no
            sequences packed by ``cu_seqlens`` see each other either.
        device, dtype: Of the parameters.

    Raises:
        ValueError: Sizes do not fit together, or a name is not known.

    Example::

        layer = longspan.nn.LinearAttention(256, num_heads=4)
        layer(torch.randn(1, 4096, 256)).sum().backward()
    """

    def __init__(
        self,
        hidden_size: int = 1024,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        feature_map: str = "elu",
        tie_feature_map_qk: bool = False,
        output_norm: str = "identity",
        norm_q: bool = False,
        norm_k: bool = False,
        do_feature_map_norm: bool = True,
        elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        layer_idx: int | None = None,
        *,
        causal: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the parameters."""
        super().__init__()
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self._make_projections(
            hidden_size, hidden_size * expand_k, hidden_size * expand_v, num_heads, num_kv_heads, None,
            **kind,
        )  # fmt: skip
        for label, name, names in (
            ("feature_map", feature_map, FEATURE_MAPS),
            ("output_norm", output_norm, ("identity", "rmsnorm")),
        ):
            if name not in names:
                raise ValueError(
                    f"LinearAttention: {label}: expected one of {', '.join(names)}, got {name!r}"
                )
        make, self._features = FEATURE_MAPS[feature_map]
        self.feature_map_q = make(self.head_k_dim, **kind)
        self.feature_map_k = self.feature_map_q if tie_feature_map_qk else make(self.head_k_dim, **kind)
        self.norm = (
            RMSNormGated(self.head_v_dim, norm_eps, elementwise_affine=elementwise_affine, **kind)
            if output_norm == "rmsnorm"
            else nn.Identity()
        )
        self.norm_q, self.norm_k, self.do_feature_map_norm = norm_q, norm_k, do_feature_map_norm
        self.causal, self.layer_idx = causal, layer_idx

    def _memory_shapes(self) -> tuple[tuple[int, ...], ...]:
        features = self.head_k_dim * self._features
        S = (self.num_heads, features, self.head_v_dim)
        return (S, (self.num_heads, features)) if self.do_feature_map_norm else (S,)

    def _mix(
        self, rows: Rows, q: Tensor, k: Tensor, v: Tensor, memory: Memory | None
    ) -> tuple[Tensor, Memory]:
        q, k = self._map(q, k)
        state: Any = memory if memory is None or self.do_feature_map_norm else memory[0]
        out, last = linear_attention(
            q, k, v.to(q.dtype), causal=self.causal, normalize=self.do_feature_map_norm,
            initial_state=state, return_final_state=True, cu_seqlens=rows.cu_seqlens,
        )  # fmt: skip
        return out, last if self.do_feature_map_norm else (last,)

    def _mix_step(self, rows: Rows, q: Tensor, k: Tensor, v: Tensor, memory: Memory) -> Tensor:
        q, k = self._map(q, k)
        state: Any = memory if self.do_feature_map_norm else memory[0]
        return linear_attention_step(q, k, v.to(q.dtype), state, normalize=self.do_feature_map_norm)

    def _map(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q, k = self.feature_map_q(q), self.feature_map_k(k)
        if self.norm_q:
            q = q / (q.sum(-1, keepdim=True) + 1e-4)
        if self.norm_k:
            k = k / (k.sum(-1, keepdim=True) + 1e-4)
        return q, k

    def _finish(self, rows: Rows, out: Tensor) -> Tensor:
        return self.norm(out)
