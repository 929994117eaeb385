"""`Attention`, a layer of exact attention with all that the operators offer, and its `KVCache`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from longspan.ops._checks import (
    check_between,
    check_bool,
    check_floating,
    check_integers,
    check_positive,
    check_shape,
    check_tensor,
)
from longspan.ops._memory import empty_to_keep
from longspan.ops.attention import attention, attention_decode, attention_varlen

Rotary = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class KVCache:
    """Keys and values of one `Attention` layer, in storage that is allocated once and filled in place.

    Memory is ``2 * B * H_kv * max_length * D`` elements from the start (`nbytes`), with a window too:
    all keys stay, and the window only bounds what is read. A sequence's tokens lie one after the
    other from slot 0 on, whichever side of the batch was padded: padding is not stored.

    Args:
        batch_size: B.
        num_kv_heads: H_kv.
        max_length: Slots, S: how many tokens a sequence may reach, prompt included.
        head_dim: D.
        dtype: Of keys and values; None is torch's default.
        device: None is torch's default.

    Attributes:
        k: (B, H_kv, S, D), zeros at first. Rotated keys.
        v: (B, H_kv, S, D).
        lengths: (B,) int64, tokens of each sequence so far. What lies beyond is never read.

    Raises:
        ValueError: A size is not positive.

    Example::

        layer = longspan.nn.Attention(256, 4, causal=True)
        cache = layer.make_cache(batch_size=2, max_length=1024)
        with torch.no_grad():
            layer(torch.randn(2, 100, 256), cache=cache)  # the prompt
            layer(torch.randn(2, 1, 256), cache=cache)  # a step
        cache.lengths  # tensor([101, 101])
    """

    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        max_length: int,
        head_dim: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Allocate."""
        shape = (batch_size, num_kv_heads, max_length, head_dim)
        for label, size in zip(("batch_size", "num_kv_heads", "max_length", "head_dim"), shape):
            check_positive("KVCache", label, size)
        self.k = empty_to_keep(shape, dtype, device).zero_()
        self.v = empty_to_keep(shape, dtype, device).zero_()
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.k.nbytes + self.v.nbytes

    def reset(self, mask: Tensor | None = None) -> None:
        """Forget all sequences, or those where ``mask`` (B,) bool is True. Storage stays."""
        if mask is None:
            self.lengths.zero_()
            return
        check_bool("KVCache.reset", "mask", mask, self.lengths.shape, "(batch,)")
        self.lengths.masked_fill_(mask, 0)

    def reorder(self, beam_idx: Tensor) -> None:
        """Let row b continue what row ``beam_idx[b]`` holds: (B,) integers, repeats allowed.

        In place; what is in use is copied once.
        """
        check_integers("KVCache.reorder", "beam_idx", beam_idx, self.lengths.shape, "(batch,)")
        used = int(self.lengths.max())
        for x in (self.k, self.v):
            x[:, :, :used] = x[:, :, :used].index_select(0, beam_idx)
        self.lengths.copy_(self.lengths.index_select(0, beam_idx))

    def detach(self) -> "KVCache":
        """Another cache over the same storage, outside any graph."""
        return self._with(self.k.detach(), self.v.detach(), self.lengths)

    def clone(self) -> "KVCache":
        """A copy with storage of its own, to continue a prompt in several ways."""
        return self._with(self.k.clone(), self.v.clone(), self.lengths.clone())

    def _with(self, k: Tensor, v: Tensor, lengths: Tensor) -> "KVCache":
        other = object.__new__(KVCache)
        other.k, other.v, other.lengths = k, v, lengths
        return other


class Attention(nn.Module):
    """Exact multi-head attention with grouped-query heads, windows, sinks and a cache.

    ``y = o_proj(attention(q_proj(x), k_proj(x), v_proj(x)))``, heads named and shaped as Llama's in
    transformers, so its state_dict loads (`longspan.attention` has the equations; grouped-query heads:
    Ainslie et al. 2023; sink tokens: Xiao et al. 2023; learned sinks: gpt-oss; norms: Qwen3).

    Args:
        hidden_size: Channels of x.
        num_heads: H.
        num_kv_heads: H_kv, a divisor of H; None is H.
        head_dim: D; None is hidden_size / H.
        qkv_bias: Biases in q_proj, k_proj and v_proj.
        out_bias: A bias in o_proj.
        qk_norm: RMSNorm over D of q and of k before they are rotated, modules q_norm and k_norm.
        norm_eps: Its epsilon.
        rotary: ``rotary(q, k, positions) -> (q, k)`` with q (B, H, T, D), k (B, H_kv, T, D) and
            positions (B or 1, T) int64, counted from each sequence's first token; packed: B = 1.
            Shapes stay. A module is registered as one.
        causal: A token sees itself and what is before it. Needed for a cache.
        window: (left, right), as in `longspan.attention`; -1 is no bound.
        sink_tokens: So many first tokens of each sequence are exempt from the window's left bound.
        sinks: A learned logit per head, parameter sinks (H,), from 0.
        scale: Of the scores; None is D ** -0.5.
        softcap: c > 0 replaces a score x by c * tanh(x / c); 0 is off.
        dropout: Probability of dropping an attention weight in training mode.
        device, dtype: Of the parameters.

    Raises:
        ValueError: Sizes do not fit together, or a value is out of range.

    Example::

        layer = longspan.nn.Attention(576, 9, 3, causal=True, window=(1023, 0), sink_tokens=4)
        layer(torch.randn(1, 4096, 576)).sum().backward()
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        qkv_bias: bool = False,
        out_bias: bool = False,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        rotary: Rotary | None = None,
        causal: bool = False,
        window: tuple[int, int] = (-1, -1),
        sink_tokens: int = 0,
        sinks: bool = False,
        scale: float | None = None,
        softcap: float = 0.0,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the projections."""
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        for label, size in (
            ("hidden_size", hidden_size),
            ("num_heads", num_heads),
            ("num_kv_heads", num_kv_heads),
        ):
            check_positive("Attention", label, size)
        if num_heads % num_kv_heads:
            raise ValueError(
                f"Attention: num_kv_heads: expected a divisor of num_heads, {num_heads}, "
                f"got {num_kv_heads}"
            )
        if head_dim is None:
            if hidden_size % num_heads:
                raise ValueError(
                    f"Attention: head_dim: expected where hidden_size, {hidden_size}, is no multiple of "
                    f"num_heads, {num_heads}; got None"
                )
            head_dim = hidden_size // num_heads
        check_positive("Attention", "head_dim", head_dim)
        if len(window) != 2 or min(window) < -1:
            raise ValueError(f"Attention: window: expected (left, right), each -1 or more, got {window}")
        if sink_tokens < 0:
            raise ValueError(f"Attention: sink_tokens: expected 0 or more, got {sink_tokens}")
        if softcap < 0:
            raise ValueError(f"Attention: softcap: expected 0 (off) or more, got {softcap}")
        check_between("Attention", "dropout", dropout, 0.0, 1.0)
        self.hidden_size, self.head_dim = hidden_size, head_dim
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.causal, self.window, self.sink_tokens = causal, (window[0], window[1]), sink_tokens
        self.scale, self.softcap, self.dropout = scale, softcap, dropout
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=qkv_bias, **kind)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=qkv_bias, **kind)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=qkv_bias, **kind)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=out_bias, **kind)
        self.q_norm = nn.RMSNorm(head_dim, eps=norm_eps, **kind) if qk_norm else None
        self.k_norm = nn.RMSNorm(head_dim, eps=norm_eps, **kind) if qk_norm else None
        self.sinks = nn.Parameter(torch.zeros(num_heads, **kind)) if sinks else None
        self.rotary = rotary

    def make_cache(
        self,
        batch_size: int,
        max_length: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> KVCache:
        """An empty `KVCache` for this layer.

        Args:
            batch_size: B.
            max_length: Tokens that a sequence may reach, prompt included.
            dtype: None is what the projections compute in: autocast's dtype where autocast is on, else
                the parameters'.
            device: None is the parameters'.
        """
        weight = self.k_proj.weight
        if dtype is None:
            kind = weight.device.type
            autocast = torch.is_autocast_enabled(kind) and weight.dtype != torch.float64
            dtype = torch.get_autocast_dtype(kind) if autocast else weight.dtype
        return KVCache(
            batch_size,
            self.num_kv_heads,
            max_length,
            self.head_dim,
            dtype=dtype,
            device=device or weight.device,
        )

    def forward(
        self,
        x: Tensor,
        *,
        lengths: Tensor | None = None,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Attend within x, or from x to a cache that x extends.

        Padding, given by ``lengths`` or ``key_mask``, is neither read nor written: whatever it holds
        reaches no other row, value or gradient, and its own output rows are 0.

        Args:
            x: (B, T, hidden_size); packed sequences (total, hidden_size) with ``cu_seqlens``.
            lengths: (B,) integers: tokens of each sequence, the rest of its row is padding.
            key_mask: (B, T) bool, True for tokens, False for padding, on whichever side or between;
                ``lengths`` is faster. With a cache a row's tokens are one run.
            cu_seqlens: (B + 1,) int32 or int64: where each packed sequence begins, and the end.
            positions: (B or 1, T) integers, or packed (total,), for ``rotary``; None counts the tokens
                of each sequence from 0, those in the cache included.
            cache: Of `make_cache`. x's tokens are appended to it, and attend to all of it. Without
                gradients and dropout only.

        Returns:
            As x, in the dtype that o_proj gives.

        Raises:
            TypeError, ValueError: Shapes, dtypes or the combination do not fit; the cache is too short.
            RuntimeError: A gradient is asked for through a cache.
        """
        check_tensor("Attention", "x", x)
        check_floating("Attention", "x", x)
        if cu_seqlens is not None:
            return self._packed(x, cu_seqlens, positions, lengths, key_mask, cache)
        check_shape("Attention", "x", x, (None, None, self.hidden_size), "(batch, tokens, hidden_size)")
        b, t, _ = x.shape
        real = self._real_tokens(x, lengths, key_mask)
        if cache is not None:
            self._check_cache(cache, b)
        if real is not None:
            x = torch.where(real[..., None], x, 0)
        if positions is None:
            positions = _count(real, t, x.device)
            if cache is not None:
                positions = positions + cache.lengths[:, None]
        else:
            check_integers("Attention", "positions", positions, (None, t), "(batch or 1, tokens)")
            if positions.shape[0] not in (1, b):
                raise ValueError(
                    f"Attention: positions: expected {b} rows or 1, got {positions.shape[0]}"
                )
            positions = positions.long()
        q, k, v = self._project(x, positions)
        if cache is not None:
            out = self._cached(q, k, v, real, cache)
        else:
            ranges = mask = None
            if real is not None:
                ranges = _key_ranges(real)
                # A run of tokens is told by its ends; only what else a mask may say takes a mask.
                mask = None if key_mask is None else key_mask[:, None, None]
            out = attention(
                q, k, v, mask, key_ranges=ranges, dropout_p=self._dropout_p(), **self._options()
            )
        y = self.o_proj(out.transpose(1, 2).flatten(2))
        return y if real is None else torch.where(real[..., None], y, 0)

    def extra_repr(self) -> str:
        """The options that are not modules."""
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, "
            f"causal={self.causal}, window={self.window}, sink_tokens={self.sink_tokens}, "
            f"sinks={self.sinks is not None}, scale={self.scale}, softcap={self.softcap}, "
            f"dropout={self.dropout}"
        )

    def _options(self) -> dict[str, Any]:
        return {
            "causal": self.causal,
            "window": self.window,
            "sink_tokens": self.sink_tokens,
            "sinks": self.sinks,
            "scale": self.scale,
            "softcap": self.softcap,
        }

    def _dropout_p(self) -> float:
        return self.dropout if self.training else 0.0

    def _real_tokens(self, x: Tensor, lengths: Tensor | None, key_mask: Tensor | None) -> Tensor | None:
        """(B, T) bool, or None where there is no padding."""
        b, t, _ = x.shape
        if lengths is not None and key_mask is not None:
            raise ValueError("Attention: lengths and key_mask: expected one of them")
        if lengths is not None:
            check_integers("Attention", "lengths", lengths, (b,), "(batch,)")
            return torch.arange(t, device=x.device) < lengths[:, None]
        if key_mask is not None:
            check_bool("Attention", "key_mask", key_mask, (b, t), "(batch, tokens)")
        return key_mask

    def _project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, hidden) -> q (B, H, T, D), k and v (B, H_kv, T, D), in one dtype."""
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q = self.q_norm(q.to(self.q_norm.weight.dtype))
            k = self.k_norm(k.to(self.k_norm.weight.dtype))
        if self.rotary is not None:
            q, k = self.rotary(q, k, positions)
        # Norms, and perhaps rotations, run in float32 where autocast has the projections in bfloat16.
        return q.to(v.dtype), k.to(v.dtype), v

    def _packed(
        self,
        x: Tensor,
        cu_seqlens: Tensor,
        positions: Tensor | None,
        lengths: Tensor | None,
        key_mask: Tensor | None,
        cache: KVCache | None,
    ) -> Tensor:
        for label, other in (("lengths", lengths), ("key_mask", key_mask), ("cache", cache)):
            if other is not None:
                raise ValueError(f"Attention: {label}: expected None beside cu_seqlens")
        check_shape(
            "Attention", "x", x, (None, self.hidden_size), "(total, hidden_size) with cu_seqlens"
        )
        check_integers("Attention", "cu_seqlens", cu_seqlens, (None,), "(batch + 1,)")
        if positions is None:
            row = torch.arange(x.shape[0], device=x.device)
            sequence = torch.searchsorted(cu_seqlens.long(), row, right=True) - 1
            positions = row - cu_seqlens.long()[sequence.clamp(min=0)]
        else:
            check_integers("Attention", "positions", positions, x.shape[:1], "(total,)")
        q, k, v = (y.squeeze(0).transpose(0, 1) for y in self._project(x[None], positions.long()[None]))
        out = attention_varlen(
            q, k, v, cu_seqlens, cu_seqlens, dropout_p=self._dropout_p(), **self._options()
        )
        return self.o_proj(out.flatten(1))

    def _check_cache(self, cache: KVCache, batch: int) -> None:
        if not self.causal:
            raise ValueError("Attention: cache: expected causal=True, else a step would change the past")
        if self._dropout_p():
            raise ValueError("Attention: cache: expected eval(), for there is no dropout over a cache")
        wanted = (batch, self.num_kv_heads, None, self.head_dim)
        check_shape("Attention", "cache", cache.k, wanted, "(batch, kv_heads, slots, head_dim)")

    def _check_no_gradient(self, cache: KVCache, k: Tensor, *tensors: Tensor) -> None:
        name = type(self).__name__
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            raise RuntimeError(f"{name}: cache: no gradient passes a cache; use torch.no_grad()")
        if cache.k.dtype != k.dtype:
            raise TypeError(f"{name}: cache: expected k's dtype, {k.dtype}, got {cache.k.dtype}")

    def _cached(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, cache: KVCache) -> Tensor:
        """Append k and v, and attend from q to all that the cache holds: (B, H, T, D)."""
        t = q.shape[2]
        self._check_no_gradient(cache, k, q, k, v)
        before = cache.lengths
        if real is None:
            if not torch.compiler.is_compiling():  # there the operator checks
                _check_room(cache, before + t)
            out = attention_decode(q, cache.k, cache.v, before + t, k_new=k, v_new=v, **self._options())
            before += t
            return out
        first, count = real.long().argmax(1), real.sum(1)
        index = torch.arange(t, device=q.device)
        run = (index >= first[:, None]) & (index < (first + count)[:, None])
        if not torch.equal(run, real):
            raise ValueError("Attention: key_mask: expected one run of tokens a row beside a cache")
        _check_room(cache, before + count)
        row, token = real.nonzero(as_tuple=True)
        slot = before[row] - first[row] + token
        cache.k[row, :, slot] = k[row, :, token]
        cache.v[row, :, slot] = v[row, :, token]
        ranges = torch.stack([torch.zeros_like(before), before + count, before - first], dim=1)
        out = attention(q, cache.k, cache.v, key_ranges=ranges, **self._options())
        before += count
        return out


def _count(real: Tensor | None, tokens: int, device: torch.device) -> Tensor:
    """(B or 1, T): how many tokens of its sequence stand before each."""
    if real is None:
        return torch.arange(tokens, device=device)[None]
    return (real.long().cumsum(1) - 1).clamp(min=0)


def _key_ranges(real: Tensor) -> Tensor:
    """(B, 3) for `attention`: from the first token to the last; queries stand where their keys do."""
    t = real.shape[1]
    index = torch.arange(t, device=real.device)
    first = torch.where(real, index, t).amin(1)
    end = torch.where(real, index + 1, 0).amax(1)
    return torch.stack([first, end, torch.zeros_like(end)], dim=1)


def _check_room(cache: KVCache, lengths: Tensor) -> None:
    slots = cache.k.shape[2]
    if int(lengths.max()) > slots:
        raise ValueError(f"Attention: cache: expected {int(lengths.max())} slots or more, got {slots}")
