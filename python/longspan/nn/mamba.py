"""`Mamba`, the layer of Mamba-1, with mamba-ssm's names."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from longspan.nn._again import computed_again
from longspan.nn._mamba import (
    MambaBase,
    as_parameter,
    check_packed,
    decay_rates,
    sequence_of_each,
    step_bias,
)
from longspan.ops._checks import check_floating, check_positive, check_shape
from longspan.ops.selective_scan import selective_scan, selective_state_update


class Mamba(MambaBase):
    """Mamba's layer: a gated convolution and selective scan (Gu and Dao 2023, figure 3).

    ``x, z = in_proj(u)``, ``x = silu(conv1d(x))``, ``dt, B, C = x_proj(x)``,
    ``out_proj(selective_scan(x, dt_proj(dt), -exp(A_log), B, C, D, z))``.

    Parameters are named, shaped and initialised as mamba-ssm's, so its state_dicts load as they are.
    Activations stay (B, L, channels) in memory from the first projection to the last.

    Args:
        d_model: Channels of the input.
        d_state: N, states a channel.
        d_conv: Width of the convolution.
        expand: The scan has ``int(expand * d_model)`` channels, d_inner.
        dt_rank: Rank of the projection to step sizes; "auto" is ceil(d_model / 16).
        dt_min, dt_max: Step sizes at the start are log-uniform between them...
        dt_init_floor: ... but not below this.
        dt_init: "random" draws ``dt_proj.weight`` from +-dt_rank^-0.5 dt_scale, "constant" sets it so.
        dt_scale: See there.
        conv_bias: A bias in conv1d.
        bias: Biases in in_proj and out_proj.
        use_fast_path: In training, let the backward compute the convolution's output and the step sizes
            again, as mamba-ssm's fused path does, rather than keep them, 2 of 5 numbers a channel and
            step. Results are the same bits.
        layer_idx: Names this layer's states in ``inference_params``.
        device, dtype: Of the parameters; A_log and D are float32 at least, as in mamba-ssm.

    Raises:
        ValueError: A value is out of range.

    Example::

        layer = longspan.nn.Mamba(768)
        layer(torch.randn(1, 2048, 768)).sum().backward()
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the parameters."""
        super().__init__()
        d_inner = int(expand * d_model)
        rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        if not isinstance(rank, int):
            raise ValueError(f'Mamba: dt_rank: expected an int or "auto", got {dt_rank!r}')
        for label, size in (
            ("d_model", d_model),
            ("d_state", d_state),
            ("d_conv", d_conv),
            ("expand * d_model", d_inner),
            ("dt_rank", rank),
        ):
            check_positive("Mamba", label, size)
        if dt_init not in ("random", "constant"):
            raise ValueError(f'Mamba: dt_init: expected "random" or "constant", got {dt_init!r}')
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner, self.dt_rank, self.layer_idx = d_inner, rank, layer_idx
        self.use_fast_path = use_fast_path
        self.state_shape = (d_inner, d_state)

        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=bias, device=device, dtype=dtype)
        self.conv1d = nn.Conv1d(
            d_inner, d_inner, d_conv, groups=d_inner, padding=d_conv - 1, bias=conv_bias, device=device,
            dtype=dtype,
        )  # fmt: skip
        self.x_proj = nn.Linear(d_inner, rank + 2 * d_state, bias=False, device=device, dtype=dtype)
        self.dt_proj = nn.Linear(rank, d_inner, device=device, dtype=dtype)
        bound = rank**-0.5 * dt_scale
        with torch.no_grad():
            if dt_init == "random":
                self.dt_proj.weight.uniform_(-bound, bound)
            else:
                self.dt_proj.weight.fill_(bound)
            self.dt_proj.bias.copy_(
                step_bias("Mamba", d_inner, dt_min, dt_max, dt_init_floor, device, dtype)
            )
        self.dt_proj.bias._no_reinit = True  # type: ignore[attr-defined]
        wide = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        states = torch.arange(1, d_state + 1, device=device, dtype=wide)
        self.A_log = nn.Parameter(states.log().repeat(d_inner, 1))
        self.A_log._no_weight_decay = True  # type: ignore[attr-defined]
        self.D = nn.Parameter(torch.ones(d_inner, device=device, dtype=wide))
        self.D._no_weight_decay = True  # type: ignore[attr-defined]
        self.out_proj = nn.Linear(d_inner, d_model, bias=bias, device=device, dtype=dtype)

    def forward(
        self,
        hidden_states: Tensor,
        inference_params: Any = None,
        *,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Run over whole sequences, or go on from the states of ``inference_params``.

        Args:
            hidden_states: (B, L, d_model).
            inference_params: An object with ``seqlen_offset`` and the dict ``key_value_memory_dict``, as
                mamba-ssm's generation has it. At offset 0 a prompt is read and the states after it are
                stored under ``layer_idx``; later the states go on from there, by a token or by several.
                No gradient goes into or out of stored states.
            cu_seqlens: (S + 1,) int32 or int64: the row (B is 1) is S sequences one after the other,
                each of which begins anew. With ``inference_params``, the states of all S are stored.

        Returns:
            (B, L, d_model).

        Raises:
            TypeError, ValueError: Shapes, dtypes or the combination do not fit.
            RuntimeError: A gradient is asked for in a step of decoding.
        """
        check_floating("Mamba", "hidden_states", hidden_states)
        shape = (None, None, self.d_model)
        check_shape("Mamba", "hidden_states", hidden_states, shape, "(batch, length, d_model)")
        batch, length, _ = hidden_states.shape
        seq_idx = None
        if cu_seqlens is not None:
            check_packed("Mamba", hidden_states, cu_seqlens)
            batch, seq_idx = cu_seqlens.shape[0] - 1, sequence_of_each(cu_seqlens, length)
        states = conv_past = ssm_past = None
        if inference_params is not None:
            states = self._get_states_from_cache(inference_params, batch)
            if inference_params.seqlen_offset > 0:
                if cu_seqlens is not None:
                    raise ValueError("Mamba: cu_seqlens: expected None after the first call")
                if length == 1:
                    return self.step(hidden_states, *states)[0]
                conv_past, ssm_past = (state.clone() for state in states)
        x, z = self.in_proj(hidden_states).transpose(1, 2).chunk(2, dim=1)
        u = self._conv(x, seq_idx, conv_past)
        again = (u, lambda: self._conv(x, seq_idx, conv_past))
        with computed_again(again, enabled=self.use_fast_path):
            dt, B, C = self._selection(u)
        delta = self._step_sizes(dt)
        with computed_again(again, (delta, lambda: self._step_sizes(dt)), enabled=self.use_fast_path):
            y, last = selective_scan(
                u, delta, decay_rates(self.A_log), B, C, as_parameter(self.D, u), z,
                as_parameter(self.dt_proj.bias, u), True, initial_state=ssm_past,
                return_final_state=True, cu_seqlens=cu_seqlens,
            )  # fmt: skip
        if states is not None:
            self._store(states, x, last, cu_seqlens, goes_on=conv_past is not None)
        return self.out_proj(y.transpose(1, 2))

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, ...]:
        """Read one token; the states are updated in place. No gradient.

        Args:
            hidden_states: (B, 1, d_model).
            conv_state: (B, d_inner, d_conv), of `allocate_inference_cache`.
            ssm_state: (B, d_inner, d_state).

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
        x, z = self.in_proj(hidden_states.squeeze(1)).chunk(2, dim=-1)
        u = self._conv_step(x, conv_state)
        dt, B, C = (y.squeeze(2) for y in self._selection(u.unsqueeze(2)))
        y = selective_state_update(
            ssm_state, u, nn.functional.linear(dt, self.dt_proj.weight), decay_rates(self.A_log), B, C,
            as_parameter(self.D, u), z, as_parameter(self.dt_proj.bias, u), True,
        )  # fmt: skip
        return self.out_proj(y).unsqueeze(1), conv_state, ssm_state

    def _selection(self, u: Tensor) -> tuple[Tensor, ...]:
        """u (B, D, L) -> dt (B, rank, L), B and C (B, N, L)."""
        widths = [self.dt_rank, self.d_state, self.d_state]
        return self.x_proj(u.transpose(1, 2)).transpose(1, 2).split(widths, dim=1)

    def _step_sizes(self, dt: Tensor) -> Tensor:
        """dt (B, rank, L) -> (B, D, L), without the bias, which the scan adds in float32."""
        return nn.functional.linear(dt.transpose(1, 2), self.dt_proj.weight).transpose(1, 2)

    def extra_repr(self) -> str:
        """The options that the parameters do not show."""
        return f"d_state={self.d_state}, dt_rank={self.dt_rank}, layer_idx={self.layer_idx}"
