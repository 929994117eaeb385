"""What the layers of linear attention share: projections, short convolutions, states, packed rows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan.nn._mamba import as_parameter, check_packed, last_inputs, sequence_of_each
from longspan.nn.norm import RMSNormGated
from longspan.ops._checks import (
    autocasts,
    check_bool,
    check_floating,
    check_integers,
    check_positive,
    check_shape,
    check_tensor,
    sum_dtype,
)
from longspan.ops.conv import causal_conv1d, causal_conv1d_update

Memory = tuple[Tensor, ...]

# Where each part of a memory begins: S, z, and the greatest exponent of Performer's keys.
_START = (0.0, 0.0, -torch.inf)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "identity": lambda x: x,
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "sqrelu": lambda x: F.relu(x).square(),
    "swish": F.silu,
}


@dataclass
class RecurrentState:
    """What a layer of linear attention keeps of the tokens it has read, of one size however many.

    Made by a layer's ``make_cache``, or returned by it with ``return_final_state``.

    Attributes:
        tokens: (B,) int64, how many each sequence has had.
        memory: The state S (B, H, K, V), in float32, or float64 for float64; then, where the layer
            normalises, z (B, H, K); then Performer's greatest exponent of keys (B, H_kv).
        conv: The last inputs (B, channels, conv_size - 1) of the convolutions of q, k and v, or nothing.
    """

    tokens: Tensor
    memory: Memory
    conv: tuple[Tensor, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return sum(x.nbytes for x in self._tensors())

    def reset(self, mask: Tensor | None = None) -> None:
        """Forget all sequences, or those where ``mask`` (B,) bool is True, in place."""
        starts = (0, *_START[: len(self.memory)], *([0.0] * len(self.conv)))
        for x, start in zip(self._tensors(), starts):
            if mask is None:
                x.fill_(start)
            else:
                x.masked_fill_(mask.view(-1, *[1] * (x.dim() - 1)), start)

    def reorder(self, beam_idx: Tensor) -> None:
        """Let row b continue what row ``beam_idx[b]`` holds: (B,) integers, in place."""
        check_integers("RecurrentState.reorder", "beam_idx", beam_idx, self.tokens.shape, "(batch,)")
        for x in self._tensors():
            x.copy_(x.index_select(0, beam_idx))

    def detach(self) -> "RecurrentState":
        """The same storage, outside any graph."""
        return self._map(Tensor.detach)

    def clone(self) -> "RecurrentState":
        """A copy with storage of its own, to continue a prompt in several ways."""
        return self._map(Tensor.clone)

    def copy_(self, other: "RecurrentState") -> None:
        """Take what ``other``, of the same layer and batch, holds."""
        for x, y in zip(self._tensors(), other._tensors()):
            x.copy_(y.detach())

    def _tensors(self) -> tuple[Tensor, ...]:
        return (self.tokens, *self.memory, *self.conv)

    def _map(self, f: Callable[[Tensor], Tensor]) -> "RecurrentState":
        return RecurrentState(f(self.tokens), tuple(map(f, self.memory)), tuple(map(f, self.conv)))


@dataclass
class Rows:
    """The tokens of one call: B rows of them, or with ``cu_seqlens`` one row of S sequences."""

    hidden: Tensor  # (B, T, hidden_size)
    cu_seqlens: Tensor | None
    before: Tensor | None  # (B or S,) tokens of each sequence before these

    @property
    def sequences(self) -> int:
        """B, or S."""
        return self.hidden.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    def positions(self) -> Tensor:
        """(B or 1, T) int64: where in its sequence each token stands, counted from the first call."""
        at = torch.arange(self.hidden.shape[1], device=self.hidden.device)[None]
        if self.cu_seqlens is None:
            return at if self.before is None else at + self.before[:, None]
        sequence = sequence_of_each(self.cu_seqlens, self.hidden.shape[1])
        at = at - self.cu_seqlens.long()[sequence.long()]
        return at if self.before is None else at + self.before[sequence.long()]

    def lengths(self) -> Tensor:
        """(B or S,) int64: tokens of each sequence in this call."""
        if self.cu_seqlens is not None:
            return self.cu_seqlens.long().diff()
        return torch.full((self.hidden.shape[0],), self.hidden.shape[1], device=self.hidden.device)


class RecurrentMixer(nn.Module):
    """A layer whose heads each keep a state: q_proj, k_proj and v_proj, a recurrence, o_proj.

    Subclasses call `_make_projections`, and have `_mix`, `_mix_step`, `_finish` and, where memory is
    more than S, `_memory_shapes`.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    state_heads: int
    head_k_dim: int
    head_v_dim: int
    layer_idx: int | None
    causal = True
    q_conv1d: nn.Conv1d | None
    k_conv1d: nn.Conv1d | None
    v_conv1d: nn.Conv1d | None

    def _make_projections(
        self,
        hidden_size: int,
        key_dim: float,
        value_dim: float,
        num_heads: int,
        num_kv_heads: int | None,
        conv: tuple[int, bool] | None,
        num_v_heads: int | None = None,
        **kind: Any,
    ) -> None:
        """Make q_proj (to ``key_dim``), k_proj and v_proj (a share of it for H_kv heads), o_proj.

        Args:
            hidden_size: Channels of x.
            key_dim, value_dim: K and V of all H heads together, whole numbers.
            num_heads: H.
            num_kv_heads: H_kv; None is H.
            conv: Width and bias of the short convolutions after q_proj, k_proj and v_proj; None is none.
            num_v_heads: Heads of values and of states where they are more than H; ``value_dim`` is of
                all of them.
            kind: device and dtype.
        """
        name = type(self).__name__
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        for label, size in (
            ("hidden_size", hidden_size),
            ("num_heads", num_heads),
            ("num_kv_heads", num_kv_heads),
        ):
            check_positive(name, label, size)
        if num_heads % num_kv_heads:
            raise ValueError(
                f"{name}: num_kv_heads: expected a divisor of num_heads, {num_heads}, got {num_kv_heads}"
            )
        self.state_heads = num_heads if num_v_heads is None else num_v_heads
        check_positive(name, "num_v_heads", self.state_heads)
        if self.state_heads % num_heads:
            raise ValueError(
                f"{name}: num_v_heads: expected a multiple of num_heads, {num_heads}, got {num_v_heads}"
            )
        for label, width, heads in (
            ("expand_k", key_dim, num_heads),
            ("expand_v", value_dim, self.state_heads),
        ):
            if width < 1 or abs(width - round(width)) > 1e-6 * width or round(width) % heads:
                raise ValueError(
                    f"{name}: {label}: expected channels that are a multiple of the heads, {heads}, "
                    f"got {width:g}"
                )
        self.hidden_size, self.num_heads, self.num_kv_heads = hidden_size, num_heads, num_kv_heads
        self.head_k_dim = round(key_dim) // num_heads
        self.head_v_dim = round(value_dim) // self.state_heads
        widths = (
            num_heads * self.head_k_dim,
            num_kv_heads * self.head_k_dim,
            (num_kv_heads if num_v_heads is None else num_v_heads) * self.head_v_dim,
        )
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(hidden_size, width, bias=False, **kind) for width in widths
        )
        self.o_proj = nn.Linear(round(value_dim), hidden_size, bias=False, **kind)
        self.conv_size = 0
        self.q_conv1d = self.k_conv1d = self.v_conv1d = None
        if conv is not None:
            self.conv_size, bias = conv
            if self.conv_size < 2:
                raise ValueError(f"{name}: conv_size: expected 2 or more, got {self.conv_size}")
            self.q_conv1d, self.k_conv1d, self.v_conv1d = (
                nn.Conv1d(
                    width,
                    width,
                    self.conv_size,
                    groups=width,
                    padding=self.conv_size - 1,
                    bias=bias,
                    **kind,
                )
                for width in widths
            )

    # ---- for subclasses

    def _memory_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of one sequence."""
        return ((self.state_heads, self.head_k_dim, self.head_v_dim),)

    def _mix(
        self, rows: Rows, q: Tensor, k: Tensor, v: Tensor, memory: Memory | None
    ) -> tuple[Tensor, Memory]:
        """q (B, H, T, K), k (B, H_kv, T, K), v (B, H_kv, T, V) -> (B, H, T, V), memory after them."""
        raise NotImplementedError

    def _mix_step(self, rows: Rows, q: Tensor, k: Tensor, v: Tensor, memory: Memory) -> Tensor:
        """One token (B, H, K) and so on -> (B, H, V); ``memory`` is written."""
        raise NotImplementedError

    def _finish(self, rows: Rows, out: Tensor) -> Tensor:
        """(B, T, H, V) -> (B, T, H, V), by norms and gates before o_proj."""
        return out

    def _activations(self) -> tuple[str | None, str | None, str | None]:
        """Of the three convolutions."""
        return ("silu",) * 3

    # ---- the public part

    def make_cache(
        self,
        batch_size: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> RecurrentState:
        """A state without tokens, for ``cache`` or ``initial_state``.

        Args:
            batch_size: B.
            dtype: Of the convolutions' inputs; None is what the projections compute in: autocast's
                dtype where autocast is on, else the parameters'.
            device: None is the parameters'.
        """
        check_positive(f"{type(self).__name__}.make_cache", "batch_size", batch_size)
        weight = self.q_proj.weight
        if dtype is None:
            dtype = weight.dtype
            if autocasts(weight) and dtype != torch.float64:
                dtype = torch.get_autocast_dtype(weight.device.type)
        device = device or weight.device
        memory = tuple(
            torch.full((batch_size, *shape), start, dtype=sum_dtype(weight), device=device)
            for shape, start in zip(self._memory_shapes(), _START)
        )
        past = self.conv_size - 1
        conv = tuple(
            torch.zeros(batch_size, past, c.out_channels, dtype=dtype, device=device).transpose(1, 2)
            for c in (self.q_conv1d, self.k_conv1d, self.v_conv1d)
            if c is not None
        )
        tokens = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return RecurrentState(tokens, memory, conv)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        initial_state: RecurrentState | None = None,
        return_final_state: bool = False,
        cache: RecurrentState | None = None,
    ) -> Any:
        """Run over sequences, from their beginning or from a state.

        Args:
            hidden_states: (B, T, hidden_size).
            key_mask: (B, T) bool, True for tokens, False for padding, wherever it stands: it is taken
                out before anything is computed, and its own rows of the result are 0.
            cu_seqlens: (S + 1,) int32 or int64: the row (B is 1) is S sequences one after the other,
                each of which begins anew.
            initial_state: Of `make_cache`, or what ``return_final_state`` gave: go on from there.
                Differentiable; not written. Of B sequences, or S.
            return_final_state: Also return the state after the last tokens.
            cache: Like ``initial_state``, and written: it has read these tokens too afterwards. One
                token takes a step in place. Without gradients only.

        Returns:
            (B, T, hidden_size), or (that, `RecurrentState`).

        Raises:
            TypeError, ValueError: Shapes, dtypes or the combination do not fit.
            RuntimeError: A gradient is asked for through a cache.
        """
        name = type(self).__name__
        check_tensor(name, "hidden_states", hidden_states)
        check_floating(name, "hidden_states", hidden_states)
        shape = (None, None, self.hidden_size)
        check_shape(name, "hidden_states", hidden_states, shape, "(batch, tokens, hidden_size)")
        self._check_combination(key_mask, cu_seqlens, initial_state, return_final_state, cache)
        if cu_seqlens is not None:
            check_packed(name, hidden_states, cu_seqlens)
        if key_mask is not None:
            return self._forward_unpadded(
                hidden_states, key_mask, initial_state, return_final_state, cache
            )
        state = initial_state if cache is None else cache
        if state is not None and not isinstance(state, RecurrentState):
            raise TypeError(
                f"{name}: {'initial_state' if cache is None else 'cache'}: expected a RecurrentState, "
                f"got {type(state).__name__}"
            )
        rows = Rows(hidden_states, cu_seqlens, None if state is None else state.tokens)
        if state is not None:
            self._check_state("initial_state" if cache is None else "cache", state, rows.sequences)
        if cache is not None:
            self._check_no_gradient(hidden_states, cache)
            if hidden_states.shape[1] == 1 and cu_seqlens is None:
                y = self._step(rows, cache)
                return (y, cache.clone()) if return_final_state else y
        wanted = return_final_state or cache is not None
        q, k, v, conv = self._project(rows, state, wanted)
        out, memory = self._mix(rows, q, k, v, None if state is None else state.memory)
        y = self._output(rows, out.transpose(1, 2))
        if not wanted:
            return y
        lengths = rows.lengths()
        last = RecurrentState(lengths if state is None else state.tokens + lengths, memory, conv)
        if cache is not None:
            cache.copy_(last)
        return (y, last) if return_final_state else y

    # ---- inside

    def _forward_unpadded(
        self,
        x: Tensor,
        key_mask: Tensor,
        initial_state: RecurrentState | None,
        return_final_state: bool,
        cache: RecurrentState | None,
    ) -> Any:
        check_bool(type(self).__name__, "key_mask", key_mask, x.shape[:2], "(batch, tokens)")
        lengths = key_mask.sum(1)
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0))
        packed = self.forward(
            x[key_mask][None], cu_seqlens=cu_seqlens, initial_state=initial_state,
            return_final_state=return_final_state, cache=cache,
        )  # fmt: skip
        y, last = packed if return_final_state else (packed, None)
        out = y.new_zeros(*key_mask.shape, self.hidden_size)
        out[key_mask] = y[0]
        return (out, last) if return_final_state else out

    def _step(self, rows: Rows, state: RecurrentState) -> Tensor:
        """One token of each sequence; ``state`` is written."""
        x = rows.hidden.squeeze(1)
        projected = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        convs = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
        for i, (conv, past, activation) in enumerate(zip(convs, state.conv, self._activations())):
            assert conv is not None
            at = projected[i].to(past.dtype)
            out = causal_conv1d_update(at, past, *_parameters(conv, at), activation=activation)
            projected[i] = out.to(projected[i].dtype)
        q, k, v = (
            y.unflatten(-1, (-1, size))
            for y, size in zip(projected, (self.head_k_dim, self.head_k_dim, self.head_v_dim))
        )
        out = self._mix_step(rows, q, k, v, state.memory)
        state.tokens += 1
        return self._output(rows, out[:, None])

    def _output(self, rows: Rows, out: Tensor) -> Tensor:
        """(B, T, H, V) -> (B, T, hidden_size)."""
        return self.o_proj(self._finish(rows, out).flatten(2))

    def _project(
        self, rows: Rows, state: RecurrentState | None, wanted: bool
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        """-> q (B, H, T, K), k (B, H_kv, T, K), v (B, H_kv, T, V), and the convolutions' last inputs."""
        x = rows.hidden
        projected = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        last = []
        convs = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
        for i, (conv, activation) in enumerate(zip(convs, self._activations())):
            if conv is not None:
                past = None if state is None else state.conv[i]
                projected[i], inputs = _convolve(conv, projected[i], activation, past, rows, wanted)
                last.append(inputs)
        q, k, v = (
            y.unflatten(-1, (-1, size)).transpose(1, 2)
            for y, size in zip(projected, (self.head_k_dim, self.head_k_dim, self.head_v_dim))
        )
        return q, k, v, tuple(last)

    # ---- arguments

    def _check_combination(
        self,
        key_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        initial_state: RecurrentState | None,
        return_final_state: bool,
        cache: RecurrentState | None,
    ) -> None:
        name = type(self).__name__
        if key_mask is not None and cu_seqlens is not None:
            raise ValueError(f"{name}: key_mask and cu_seqlens: expected one of them")
        if initial_state is not None and cache is not None:
            raise ValueError(f"{name}: initial_state and cache: expected one of them")
        if not self.causal and (initial_state is not None or cache is not None or return_final_state):
            raise ValueError(
                f"{name}: initial_state, cache, return_final_state: expected causal=True, else what "
                "comes would change the past"
            )

    def _check_state(self, label: str, state: RecurrentState, sequences: int) -> None:
        name = type(self).__name__
        shapes = [(sequences, *shape) for shape in self._memory_shapes()]
        got = [tuple(x.shape) for x in state.memory]
        if got != shapes or bool(state.conv) != (self.q_conv1d is not None):
            raise ValueError(
                f"{name}: {label}: expected memory of the shapes {shapes}, as make_cache gives it, "
                f"got {got}"
            )

    def _check_no_gradient(self, x: Tensor, cache: RecurrentState) -> None:
        if torch.is_grad_enabled() and any(
            y.requires_grad for y in (x, *cache.memory, *self.parameters())
        ):
            raise RuntimeError(
                f"{type(self).__name__}: cache: no gradient passes a cache; use torch.no_grad(), or "
                "initial_state"
            )

    def extra_repr(self) -> str:
        """The sizes that the modules do not show."""
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"head_k_dim={self.head_k_dim}, head_v_dim={self.head_v_dim}"
        )


class GatedOutput(nn.Module):
    """Mixed into a `RecurrentMixer`: the RMS norm of each head, gated by ``gate_fn(g_proj(x))``.

    Named as in flash-linear-attention: g_norm_swish_gate where norm and gate are one module, which
    they are for a swish gate and ``fuse_norm``, else g_norm.
    """

    head_v_dim: int
    num_heads: int

    def _make_output(
        self,
        hidden_size: int,
        use_output_gate: bool,
        gate_fn: str,
        fuse_norm: bool,
        elementwise_affine: bool,
        norm_eps: float,
        **kind: Any,
    ) -> None:
        self.gate_fn = find_activation(type(self).__name__, "gate_fn", gate_fn)
        self.use_output_gate = use_output_gate
        self.g_proj = self.g_norm = self.g_norm_swish_gate = None
        if use_output_gate:
            self.g_proj = nn.Linear(hidden_size, self.num_heads * self.head_v_dim, bias=False, **kind)
        fused = use_output_gate and fuse_norm and gate_fn == "swish"
        norm = RMSNormGated(
            self.head_v_dim, norm_eps, norm_before_gate=True, elementwise_affine=elementwise_affine,
            **kind,
        )  # fmt: skip
        if fused:
            self.g_norm_swish_gate = norm
        else:
            self.g_norm = norm

    def _finish(self, rows: Rows, out: Tensor) -> Tensor:
        gate = None
        if self.g_proj is not None:
            gate = self.g_proj(rows.hidden).unflatten(-1, (-1, self.head_v_dim)).to(out.dtype)
        if self.g_norm_swish_gate is not None:
            return self.g_norm_swish_gate(out, gate)
        assert self.g_norm is not None
        out = self.g_norm(out)
        return out if gate is None else out * self.gate_fn(gate)


def find_activation(function: str, label: str, name: str) -> Callable[[Tensor], Tensor]:
    """The function of this name.

    Raises:
        ValueError: There is none.
    """
    if name not in ACTIVATIONS:
        raise ValueError(
            f"{function}: {label}: expected one of {', '.join(sorted(ACTIVATIONS))}, got {name!r}"
        )
    return ACTIVATIONS[name]


def _parameters(conv: nn.Conv1d, x: Tensor) -> tuple[Tensor, Tensor | None]:
    bias = conv.bias
    return as_parameter(conv.weight.squeeze(1), x), None if bias is None else as_parameter(bias, x)


def _convolve(
    conv: nn.Conv1d,
    x: Tensor,
    activation: str | None,
    past: Tensor | None,
    rows: Rows,
    wanted: bool,
) -> tuple[Tensor, Tensor]:
    """x (B, T, C) after ``past`` (B or S, C, W - 1) -> as x, and if ``wanted`` the last W - 1 inputs."""
    weight, bias = _parameters(conv, x)
    x = x.transpose(1, 2)
    past = None if past is None else past.to(x.dtype)
    if rows.cu_seqlens is None:
        out, last = causal_conv1d(
            x, weight, bias, activation=activation, initial_state=past, return_final_state=True
        )
        return out.transpose(1, 2), last
    cu_seqlens, width = rows.cu_seqlens, weight.shape[1]
    sequence = sequence_of_each(cu_seqlens, x.shape[2])
    if past is None and not wanted:
        out = causal_conv1d(x, weight, bias, activation=activation, seq_idx=sequence)
        return out.transpose(1, 2), x[:, :, :0]
    # A row in which each sequence begins with its past inputs: no tap then needs another place.
    if past is None:
        past = x.new_zeros(rows.sequences, x.shape[1], width - 1)
    step = torch.arange(rows.sequences + 1, device=x.device) * (width - 1)
    longer = cu_seqlens.long() + step
    places = torch.arange(x.shape[2], device=x.device) + step[sequence[0].long() + 1]
    before = (longer[:-1, None] + torch.arange(width - 1, device=x.device)).flatten()
    row = x.new_zeros(1, x.shape[1], x.shape[2] + rows.sequences * (width - 1))
    row = row.index_copy(2, places, x)
    row = row.index_copy(2, before, past.transpose(0, 1).flatten(1)[None])
    out = causal_conv1d(
        row, weight, bias, activation=activation, seq_idx=sequence_of_each(longer, row.shape[2])
    )
    last = last_inputs(row, width - 1, longer)
    return out[:, :, places].transpose(1, 2), last
