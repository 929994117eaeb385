"""`Mamba2`, the layer of Mamba-2, with mamba-ssm's names."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from longspan.nn._again import computed_again
from longspan.nn._mamba import (
    MambaBase,
    as_parameter,
    check_packed,
    decay_rates,
    sequence_of_each,
    step_bias,
    update_heads,
)
from longspan.nn.norm import RMSNormGated
from longspan.ops._checks import check_floating, check_positive, check_shape
from longspan.ops.ssd import CHUNKS, ssd


class Mamba2(MambaBase):
    """Mamba-2's layer: a gated convolution and state space duality (Dao and Gu 2024, section 7).

    ``z, xBC, dt = in_proj(u)``, ``x, B, C = silu(conv1d(xBC))``,
    ``out_proj(norm(ssd(x, dt, -exp(A_log), B, C, D), z))``.

    Parameters are named, shaped and initialised as mamba-ssm's, so its state_dicts load as they are.

    Args:
        d_model: Channels of the input.
        d_state: N, states a channel.
        d_conv: Width of the convolution.
        conv_init: Weights of conv1d from U(-conv_init, conv_init); None is torch's own start.
        expand: d_inner is ``expand * d_model``.
        headdim: P, channels of a head.
        d_ssm: Channels of the scan; the other d_inner - d_ssm are a gated linear unit beside it. None
            is d_inner.
        ngroups: Groups of B and C, and of channels that are normalised together.
        A_init_range: A at the start is from -U(*A_init_range).
        D_has_hdim: D has a number a channel, (d_ssm,), rather than a head, (nheads,).
        rmsnorm: Normalise y before out_proj, module norm; else y is gated by silu(z) alone.
        norm_before_gate: Whether z gates what was normalised, rather than what will be.
        dt_min, dt_max: Step sizes at the start are log-uniform between them...
        dt_init_floor: ... but not below this.
        dt_limit: Least and greatest step size after softplus, in `forward` and in `step`.
        bias: Biases in in_proj and out_proj.
        conv_bias: A bias in conv1d.
        chunk_size: Of `longspan.ssd`: 16 to 256, changes speed, and results by rounding only.
        use_mem_eff_path: In training, let the backward compute the convolution's output again, as
            mamba-ssm's fused path does, rather than keep it. Results are the same bits.
        layer_idx: Names this layer's states in ``inference_params``.
        process_group, sequence_parallel: mamba-ssm's tensor parallelism, which is not there: None.
        device, dtype: Of the parameters; D is float32 at least, as in mamba-ssm.

    Raises:
        ValueError: A value is out of range, or sizes do not fit together.

    Example::

        layer = longspan.nn.Mamba2(768)
        layer(torch.randn(1, 4096, 768)).sum().backward()
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: int = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 64,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        process_group: Any = None,
        sequence_parallel: bool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the parameters."""
        super().__init__()
        for label, option in (
            ("process_group", process_group),
            ("sequence_parallel", sequence_parallel),
        ):
            if option is not None:
                raise ValueError(
                    f"Mamba2: {label}: expected None, for there is no tensor parallelism here"
                )
        d_inner = int(expand * d_model)
        d_ssm = d_inner if d_ssm is None else d_ssm
        for label, size in (
            ("d_model", d_model),
            ("d_state", d_state),
            ("d_conv", d_conv),
            ("expand * d_model", d_inner),
            ("headdim", headdim),
            ("d_ssm", d_ssm),
            ("ngroups", ngroups),
        ):
            check_positive("Mamba2", label, size)
        if d_ssm > d_inner or d_ssm % headdim:
            raise ValueError(
                f"Mamba2: d_ssm: expected a multiple of headdim, {headdim}, up to {d_inner}, got {d_ssm}"
            )
        heads = d_ssm // headdim
        if heads % ngroups:
            raise ValueError(f"Mamba2: ngroups: expected a divisor of {heads} heads, got {ngroups}")
        if not 0 < A_init_range[0] <= A_init_range[1]:
            raise ValueError(f"Mamba2: A_init_range: expected 0 < least <= greatest, got {A_init_range}")
        if len(dt_limit) != 2 or not dt_limit[0] <= dt_limit[1]:
            raise ValueError(f"Mamba2: dt_limit: expected (least, greatest), got {dt_limit}")
        if chunk_size not in CHUNKS:
            raise ValueError(f"Mamba2: chunk_size: expected one of {CHUNKS}, got {chunk_size}")
        self.d_model, self.d_state, self.d_conv, self.conv_init = d_model, d_state, d_conv, conv_init
        self.expand, self.d_inner, self.headdim, self.d_ssm = expand, d_inner, headdim, d_ssm
        self.ngroups, self.nheads, self.D_has_hdim = ngroups, heads, D_has_hdim
        self.rmsnorm, self.norm_before_gate = rmsnorm, norm_before_gate
        self.dt_limit = (float(dt_limit[0]), float(dt_limit[1]))
        self.chunk_size, self.use_mem_eff_path, self.layer_idx = chunk_size, use_mem_eff_path, layer_idx
        self.state_shape = (heads, headdim, d_state)

        columns = 2 * d_inner + 2 * ngroups * d_state + heads
        self.in_proj = nn.Linear(d_model, columns, bias=bias, device=device, dtype=dtype)
        channels = d_ssm + 2 * ngroups * d_state
        self.conv1d = nn.Conv1d(
            channels, channels, d_conv, groups=channels, padding=d_conv - 1, bias=conv_bias,
            device=device, dtype=dtype,
        )  # fmt: skip
        if conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -conv_init, conv_init)
        self.dt_bias = nn.Parameter(
            step_bias("Mamba2", heads, dt_min, dt_max, dt_init_floor, device, dtype)
        )
        wide = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        decay = torch.empty(heads, device=device, dtype=wide).uniform_(*A_init_range)
        self.A_log = nn.Parameter(decay.log().to(dtype or torch.get_default_dtype()))
        self.D = nn.Parameter(torch.ones(d_ssm if D_has_hdim else heads, device=device, dtype=wide))
        for parameter in (self.dt_bias, self.A_log, self.D):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        if rmsnorm:
            self.norm = RMSNormGated(
                d_ssm, group_size=d_ssm // ngroups, norm_before_gate=norm_before_gate, device=device,
                dtype=dtype,
            )  # fmt: skip
        self.out_proj = nn.Linear(d_inner, d_model, bias=bias, device=device, dtype=dtype)

    def forward(
        self,
        u: Tensor,
        seqlen: int | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        inference_params: Any = None,
    ) -> Tensor:
        """Run over whole sequences, or go on from the states of ``inference_params``.

        Args:
            u: (B, L, d_model), or with ``seqlen`` (B * L, d_model).
            seqlen: L.
            seq_idx: (B, L) integers: a sequence begins anew where the number changes.
            cu_seqlens: (S + 1,) int32 or int64: the row (B is 1) is S sequences one after the other,
                each of which begins anew, without ``seq_idx`` too (mamba-ssm needs both). With
                ``inference_params``, the states of all S are stored.
            inference_params: An object with ``seqlen_offset`` and the dict ``key_value_memory_dict``, as
                mamba-ssm's generation has it. At offset 0 a prompt is read and the states after it are
                stored under ``layer_idx``; later the states go on from there, by a token or by several.
                No gradient goes into or out of stored states.

        Returns:
            As u.

        Raises:
            TypeError, ValueError: Shapes, dtypes or the combination do not fit.
            RuntimeError: A gradient is asked for in a step of decoding.
        """
        check_floating("Mamba2", "u", u)
        if seqlen is not None:
            check_shape("Mamba2", "u", u, (None, self.d_model), "(batch * seqlen, d_model)")
            if seqlen < 1 or u.shape[0] % seqlen:
                raise ValueError(f"Mamba2: seqlen: expected a divisor of {u.shape[0]}, got {seqlen}")
            rows = u.unflatten(0, (-1, seqlen))
            return self.forward(rows, None, seq_idx, cu_seqlens, inference_params).flatten(0, 1)
        check_shape("Mamba2", "u", u, (None, None, self.d_model), "(batch, length, d_model)")
        batch, length, _ = u.shape
        conv_seq_idx = seq_idx
        if cu_seqlens is not None:
            check_packed("Mamba2", u, cu_seqlens)
            batch = cu_seqlens.shape[0] - 1
            if seq_idx is None:
                conv_seq_idx = sequence_of_each(cu_seqlens, length)
        states = conv_past = ssm_past = None
        if inference_params is not None:
            states = self._get_states_from_cache(inference_params, batch)
            if inference_params.seqlen_offset > 0:
                if cu_seqlens is not None or seq_idx is not None:
                    raise ValueError("Mamba2: cu_seqlens, seq_idx: expected None after the first call")
                if length == 1:
                    return self.step(u, *states)[0]
                conv_past, ssm_past = (state.clone() for state in states)
        mlp, z, xBC, dt = self._split(self.in_proj(u))
        xBC = xBC.transpose(1, 2)
        conv = self._conv(xBC, conv_seq_idx, conv_past)
        x, B, C = self._heads(conv.transpose(1, 2))
        with computed_again(
            (conv, lambda: self._conv(xBC, conv_seq_idx, conv_past)), enabled=self.use_mem_eff_path
        ):
            y, *last = ssd(
                x, dt, decay_rates(self.A_log), B, C, chunk_size=self.chunk_size, D=self._skip(x),
                z=None if self.rmsnorm else z.unflatten(-1, (self.nheads, self.headdim)),
                dt_bias=as_parameter(self.dt_bias, x), dt_softplus=True, dt_limit=self.dt_limit,
                initial_states=ssm_past, return_final_states=cu_seqlens is None, seq_idx=seq_idx,
                cu_seqlens=cu_seqlens, return_varlen_states=cu_seqlens is not None,
            )  # fmt: skip
        if states is not None:
            self._store(states, xBC, last[0], cu_seqlens, goes_on=conv_past is not None)
        return self._finish(y.flatten(-2), z, mlp)

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, ...]:
        """Read one token; the states are updated in place. No gradient.

        Args:
            hidden_states: (B, 1, d_model).
            conv_state: (B, channels of conv1d, d_conv), of `allocate_inference_cache`.
            ssm_state: (B, nheads, headdim, d_state).

        Returns:
            out (B, 1, d_model), conv_state, ssm_state.

        Raises:
            TypeError, ValueError: Shapes or dtypes do not fit.
            RuntimeError: A gradient is asked for.

        Example::

            states = layer.allocate_inference_cache(batch_size=2, max_seqlen=1000)
            with torch.no_grad():
                y, *states = layer.step(torch.randn(2, 1, 768), *states)
        """
        self._check_step(hidden_states, conv_state, ssm_state)
        mlp, z, xBC, dt = self._split(self.in_proj(hidden_states.squeeze(1)))
        x, B, C = self._heads(self._conv_step(xBC, conv_state))
        y = update_heads(
            ssm_state, x, dt, decay_rates(self.A_log), B, C, self._skip(x),
            None if self.rmsnorm else z.unflatten(-1, (self.nheads, self.headdim)),
            as_parameter(self.dt_bias, x), self.dt_limit,
        )  # fmt: skip
        return self._finish(y.flatten(-2), z, mlp).unsqueeze(1), conv_state, ssm_state

    def _split(self, projected: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor, Tensor]:
        """-> the gated linear unit's gate and value, z, xBC, dt; all views."""
        beside = self.d_inner - self.d_ssm
        gate, value, z, xBC, dt = projected.split(
            [beside, beside, self.d_ssm, self.conv1d.out_channels, self.nheads], dim=-1
        )
        return (gate, value), z, xBC, dt

    def _heads(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., channels) -> x (..., H, P), B and C (..., G, N); all views."""
        x, B, C = xBC.split([self.d_ssm, *[self.ngroups * self.d_state] * 2], dim=-1)
        groups = (self.ngroups, self.d_state)
        return (
            x.unflatten(-1, (self.nheads, self.headdim)),
            B.unflatten(-1, groups),
            C.unflatten(-1, groups),
        )

    def _skip(self, x: Tensor) -> Tensor:
        D = as_parameter(self.D, x)
        return D.view(self.nheads, self.headdim) if self.D_has_hdim else D

    def _finish(self, y: Tensor, z: Tensor, mlp: tuple[Tensor, Tensor]) -> Tensor:
        if self.rmsnorm:
            y = self.norm(y, z)
        gate, value = mlp
        if gate.shape[-1]:
            y = torch.cat([silu(gate) * value, y], dim=-1)
        return self.out_proj(y)

    def extra_repr(self) -> str:
        """The options that the parameters do not show."""
        return (
            f"nheads={self.nheads}, headdim={self.headdim}, d_state={self.d_state}, "
            f"ngroups={self.ngroups}, d_ssm={self.d_ssm}, dt_limit={self.dt_limit}, "
            f"norm_before_gate={self.norm_before_gate}, layer_idx={self.layer_idx}"
        )
