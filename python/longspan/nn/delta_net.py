"""`DeltaNet` and `GatedDeltaNet`: layers whose memory is corrected, not only added to."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan.nn._mamba import decay_rates, step_bias
from longspan.nn._recurrent import Memory, RecurrentMixer, Rows
from longspan.nn.feature_maps import Elu
from longspan.nn.norm import RMSNormGated
from longspan.ops._checks import check_positive, sum_dtype
from longspan.ops.delta_rule import delta_rule, delta_rule_step

_ACTIVATIONS = ("silu", "relu", "elu", "identity")
_elu = Elu()


class _DeltaMixer(RecurrentMixer):
    """What both have: ``o_proj(o_norm(delta_rule(q, k, v, beta, gate)))``."""

    o_norm: RMSNormGated
    g_proj: nn.Linear | None
    allow_neg_eigval: bool

    def _make_output(self, use_gate: bool, norm_eps: float, **kind: Any) -> None:
        self.g_proj = None
        if use_gate:
            width = self.state_heads * self.head_v_dim
            self.g_proj = nn.Linear(self.hidden_size, width, bias=False, **kind)
        self.o_norm = RMSNormGated(self.head_v_dim, norm_eps, norm_before_gate=True, **kind)

    def _activate(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """After the projections, or the convolutions, which have activations of their own."""
        raise NotImplementedError

    def _writing(self, rows: Rows) -> tuple[Tensor, Tensor | None]:
        """beta and gate (B, T, HV), in float32 at least."""
        raise NotImplementedError

    def _mix(
        self, rows: Rows, q: Tensor, k: Tensor, v: Tensor, memory: Memory | None
    ) -> tuple[Tensor, Memory]:
        q, k, v = self._activate(q, k, v)
        beta, gate = self._writing(rows)
        out, last = delta_rule(
            q, k, v, beta.transpose(1, 2), gate=None if gate is None else gate.transpose(1, 2),
            initial_state=None if memory is None else memory[0], return_final_state=True,
            cu_seqlens=rows.cu_seqlens,
        )  # fmt: skip
        return out, (last,)

    def _mix_step(self, rows: Rows, q: Tensor, k: Tensor, v: Tensor, memory: Memory) -> Tensor:
        q, k, v = self._activate(q, k, v)
        beta, gate = (None if x is None else x.squeeze(1) for x in self._writing(rows))
        assert beta is not None
        return delta_rule_step(q, k, v, beta, memory[0], gate=gate)

    def _strength(self, b: Tensor) -> Tensor:
        beta = b.to(sum_dtype(b)).sigmoid()
        return 2 * beta if self.allow_neg_eigval else beta

    def _finish(self, rows: Rows, out: Tensor) -> Tensor:
        gate = None
        if self.g_proj is not None:
            gate = self.g_proj(rows.hidden).unflatten(-1, (-1, self.head_v_dim)).to(out.dtype)
        return self.o_norm(out, gate)


class DeltaNet(_DeltaMixer):
    """DeltaNet: linear attention that writes what its memory does not yet say.

    ``S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T`` with ``beta = sigmoid(b_proj(x))`` and keys of
    length 1, after short convolutions (Yang et al. 2024, Parallelizing linear transformers with the
    delta rule over sequence length; Schlag et al. 2021).

    Parameters and options are named as in flash-linear-attention's layer.

    Args:
        hidden_size: Channels of x.
        expand_k: K of all heads together is ``expand_k * hidden_size``.
        expand_v: V likewise.
        num_heads: H.
        use_beta: Whether there is a b_proj; else beta is 1.
        use_gate: Gate the normed heads by ``silu(g_proj(x))``.
        use_short_conv: A causal convolution after each of q_proj, k_proj and v_proj.
        conv_size: Its width.
        conv_bias: Its bias.
        allow_neg_eigval: beta is twice that, so that the state may turn what it holds.
        layer_idx: This layer's number in a model.
        qk_activation: "silu", "relu", "elu" (elu + 1) or "identity", of q and k. v's is silu.
        qk_norm: "l2", or "sum": divide q and k by their sum.
        norm_eps: Of o_norm.
        device, dtype: Of the parameters.

    Raises:
        ValueError: Sizes do not fit together, or a name is not known.

    Example::

        layer = longspan.nn.DeltaNet(256, num_heads=4)
        layer(torch.randn(1, 4096, 256)).sum().backward()
    """

    def __init__(
        self,
        hidden_size: int = 1024,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        num_heads: int = 4,
        use_beta: bool = True,
        use_gate: bool = False,
        use_short_conv: bool = True,
        conv_size: int = 4,
        conv_bias: bool = False,
        allow_neg_eigval: bool = False,
        layer_idx: int | None = None,
        qk_activation: str = "silu",
        qk_norm: str = "l2",
        norm_eps: float = 1e-5,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the parameters."""
        super().__init__()
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        for label, name, names in (
            ("qk_activation", qk_activation, _ACTIVATIONS),
            ("qk_norm", qk_norm, ("l2", "sum")),
        ):
            if name not in names:
                raise ValueError(f"DeltaNet: {label}: expected one of {', '.join(names)}, got {name!r}")
        self._make_projections(
            hidden_size, hidden_size * expand_k, hidden_size * expand_v, num_heads, None,
            (conv_size, conv_bias) if use_short_conv else None, **kind,
        )  # fmt: skip
        self.b_proj = nn.Linear(hidden_size, num_heads, bias=False, **kind) if use_beta else None
        self._make_output(use_gate, norm_eps, **kind)
        self.qk_activation, self.qk_norm = qk_activation, qk_norm
        self.allow_neg_eigval, self.layer_idx = allow_neg_eigval, layer_idx

    def _activations(self) -> tuple[str | None, str | None, str | None]:
        of_keys = "silu" if self.qk_activation == "silu" else None
        return of_keys, of_keys, "silu"

    def _activate(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.q_conv1d is None:
            v = F.silu(v)
        if self.qk_activation == "silu" and self.q_conv1d is None:
            q, k = F.silu(q), F.silu(k)
        elif self.qk_activation == "relu":
            q, k = F.relu(q), F.relu(k)
        elif self.qk_activation == "elu":
            q, k = _elu(q), _elu(k)
        if self.qk_norm == "sum":
            return q / q.sum(-1, keepdim=True), k / k.sum(-1, keepdim=True), v
        return unit(q), unit(k), v

    def _writing(self, rows: Rows) -> tuple[Tensor, Tensor | None]:
        if self.b_proj is not None:
            return self._strength(self.b_proj(rows.hidden)), None
        shape = (*rows.hidden.shape[:2], self.num_heads)
        whole = 2.0 if self.allow_neg_eigval else 1.0
        return rows.hidden.new_full(shape, whole, dtype=sum_dtype(rows.hidden)), None


class GatedDeltaNet(_DeltaMixer):
    """Gated DeltaNet: the delta rule on a memory that forgets at a rate that the token decides.

    ``S' = exp(g_t) S_{t-1}`` and ``S_t = S' + beta_t k_t (v_t - S'^T k_t)^T`` with
    ``g = -exp(A_log) softplus(a_proj(x) + dt_bias)``, Mamba-2's decay (Yang et al. 2025, Gated delta
    networks, section 3.4).

    Parameters and options are named as in flash-linear-attention's layer.

    Args:
        hidden_size: Channels of x.
        expand_v: V is ``expand_v * head_dim``.
        head_dim: K.
        num_heads: H, of queries and keys.
        num_v_heads: HV, a multiple of H; None is H.
        use_gate: Gate the normed heads by ``silu(g_proj(x))``.
        use_short_conv: A causal convolution with silu after each of q_proj, k_proj and v_proj; else a
            silu alone.
        allow_neg_eigval: beta is twice its sigmoid, so that the state may turn what it holds.
        conv_size: Width of the convolutions.
        conv_bias: Their bias.
        layer_idx: This layer's number in a model.
        norm_eps: Of o_norm.
        device, dtype: Of the parameters; A_log and dt_bias are float32 at least.

    Raises:
        ValueError: Sizes do not fit together.

    Example::

        layer = longspan.nn.GatedDeltaNet(256, head_dim=32, num_heads=6)
        layer(torch.randn(1, 4096, 256)).sum().backward()
    """

    def __init__(
        self,
        hidden_size: int = 2048,
        expand_v: float = 2.0,
        head_dim: int = 256,
        num_heads: int = 6,
        num_v_heads: int | None = None,
        use_gate: bool = True,
        use_short_conv: bool = True,
        allow_neg_eigval: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        layer_idx: int | None = None,
        norm_eps: float = 1e-5,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the parameters."""
        super().__init__()
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        check_positive("GatedDeltaNet", "head_dim", head_dim)
        heads = num_heads if num_v_heads is None else num_v_heads
        self._make_projections(
            hidden_size, num_heads * head_dim, heads * head_dim * expand_v, num_heads, None,
            (conv_size, conv_bias) if use_short_conv else None, num_v_heads=heads, **kind,
        )  # fmt: skip
        self.a_proj = nn.Linear(hidden_size, heads, bias=False, **kind)
        self.b_proj = nn.Linear(hidden_size, heads, bias=False, **kind)
        wide = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        # From 0 in the paper's code, whose logarithm is no number.
        rates = torch.empty(heads, device=device, dtype=wide).uniform_(1e-4, 16)
        self.A_log = nn.Parameter(rates.log())
        self.dt_bias = nn.Parameter(step_bias("GatedDeltaNet", heads, 0.001, 0.1, 1e-4, device, wide))
        for parameter in (self.A_log, self.dt_bias):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        self._make_output(use_gate, norm_eps, **kind)
        self.allow_neg_eigval, self.layer_idx = allow_neg_eigval, layer_idx

    def _activate(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.q_conv1d is None:
            q, k, v = F.silu(q), F.silu(k), F.silu(v)
        return unit(q), unit(k), v

    def _writing(self, rows: Rows) -> tuple[Tensor, Tensor | None]:
        a = self.a_proj(rows.hidden)
        # softplus, whose own backward has other strides than torch.compile believes (torch 2.13).
        steps = -F.logsigmoid(-(a.to(sum_dtype(a)) + self.dt_bias.to(sum_dtype(a))))
        gate = decay_rates(self.A_log).to(steps.dtype) * steps
        return self._strength(self.b_proj(rows.hidden)), gate


def unit(x: Tensor) -> Tensor:
    """x over the root of its square sum and 1e-6, as fla has it: zeros stay zeros."""
    wide = x.to(sum_dtype(x))
    return (wide * (wide.square().sum(-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype)
