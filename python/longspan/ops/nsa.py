"""Native Sparse Attention: `native_sparse_attention` and the pieces of its compressed branch."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from longspan.ops._autograd import (
    OperatorFunction,
    below_autograd,
    overload,
    register_autograd,
    wants_gradient,
)
from longspan.ops._checks import (
    check_attention,
    check_floating,
    check_integers,
    check_positive,
    check_shape,
    has_kernels,
    sum_dtype,
)
from longspan.ops.attention import attention
from longspan.ops.selected import (
    check_compressed,
    check_strides,
    compressed_count,
    most_blocks,
    select_and_attend,
    select_blocks,
    selected_attention,
)


def native_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_cmp: Tensor | None = None,
    g_slc: Tensor | None = None,
    g_swa: Tensor | None = None,
    *,
    k_cmp: Tensor | None = None,
    v_cmp: Tensor | None = None,
    k_swa: Tensor | None = None,
    v_swa: Tensor | None = None,
    block_indices: Tensor | None = None,
    block_counts: int | Tensor = 16,
    block_size: int = 64,
    window_size: int = 512,
    compress_length: int = 32,
    compress_stride: int = 16,
    causal: bool = True,
    scale: float | None = None,
    cache_seqlens: Tensor | None = None,
) -> Tensor:
    """Native Sparse Attention: compressed, selected and near keys, each branch with its gate.

    ``o_t = g_cmp o_cmp + g_slc o_slc + g_swa o_swa`` (Yuan et al. 2025, equation 5): attention over
    compressed keys, over ``block_counts`` blocks of keys that the compressed scores choose
    (`select_blocks`; shared by the heads of a group), and over the last ``window_size`` keys. A branch
    whose gate is None is left out, and with it its work; the selection passes no gradient. Memory is
    linear in tokens and keys. Where ``causal=False`` all compressed keys and blocks are seen, and the
    window reaches to both sides. The defaults are the paper's; fla's are compress_length =
    compress_stride = block_size.

    Args:
        q: (B, H, T_q, D), float32, float64, bfloat16 or float16, any strides. The last query is aligned
            with the last key.
        k: (B, H_kv, T_k, D). H is a multiple of H_kv; query head h reads key head h // (H / H_kv).
            The selected branch is fast where the group, H / H_kv, is large (`selected_attention`).
        v: (B, H_kv, T_k, D_v).
        g_cmp: (B, H, T_q), the gate of the compressed branch, any floating dtype; differentiable.
        g_slc: (B, H, T_q), of the selected branch.
        g_swa: (B, H, T_q), of the sliding window.
        k_cmp: (B, H_kv, T_c, D), compressed keys; None is `compress_keys` of k.
        v_cmp: (B, H_kv, T_c, D_v); None is `compress_keys` of v.
        k_swa: (B, H_kv, T_k, D), the window's keys; None is k.
        v_swa: (B, H_kv, T_k, D_v); None is v.
        block_indices: (B, H_kv or H, T_q, n) integers, instead of the selection: as in
            `selected_attention`.
        block_counts: How many blocks to select, the always chosen included; or (B, H_kv, T_q) integers,
            of each query. With ``block_indices`` a tensor says how many of them, from the first on, are
            used, and an int is not read.
        block_size: Keys of a block.
        window_size: Keys of the window, the query's own included; on either side where not causal.
        compress_length: Keys that a compressed one stands for.
        compress_stride: Keys from one to the next; divides compress_length and block_size.
        causal: A query sees keys up to its own position.
        scale: Of the scores; None is D ** -0.5.
        cache_seqlens: (B,) integers, for steps of few tokens over caches of T_k slots: keys that there
            are; query t stands at ``cache_seqlens - T_q + t``.

    Returns:
        (B, H, T_q, D_v) in q's dtype.

    Raises:
        TypeError: A dtype is not supported or differs from q's.
        ValueError: Shapes or values do not fit, or every gate is None.

    Example::

        q = torch.randn(1, 16, 4096, 64, requires_grad=True)
        k, v = torch.randn(2, 1, 1, 4096, 64)
        gates = torch.rand(3, 1, 16, 4096)
        longspan.native_sparse_attention(q, k, v, *gates).sum().backward()
    """
    name = "native_sparse_attention"
    q, k, v = check_attention(name, q, k, v)
    gates = {"g_cmp": g_cmp, "g_slc": g_slc, "g_swa": g_swa}
    for label, gate in gates.items():
        if gate is not None:
            check_floating(name, label, gate)
            check_shape(name, label, gate, q.shape[:3], "(batch, heads, tokens)")
    if all(gate is None for gate in gates.values()):
        raise ValueError(f"{name}: g_cmp, g_slc and g_swa: expected one at least, got None")
    tokens, keys = q.shape[2], k.shape[2]
    if tokens > keys:
        raise ValueError(f"{name}: k: expected at least as many keys as queries, {tokens}, got {keys}")
    check_strides(name, compress_length, compress_stride, block_size)
    if (k_cmp is None) != (v_cmp is None) or (k_swa is None) != (v_swa is None):
        raise ValueError(f"{name}: k_cmp and v_cmp, k_swa and v_swa: expected both of a pair or neither")
    if cache_seqlens is not None:
        check_integers(name, "cache_seqlens", cache_seqlens, q.shape[:1], "(batch,)")
        if not causal:
            raise ValueError(f"{name}: cache_seqlens: expected None where not causal")
    if k_swa is not None and v_swa is not None:
        _, k_swa, v_swa = check_attention(name, q, k_swa, v_swa)
        check_shape(name, "k_swa", k_swa, k.shape, "k's shape")
        check_shape(name, "v_swa", v_swa, v.shape, "v's shape")
    else:
        k_swa, v_swa = k, v
    if g_swa is not None:
        check_positive(name, "window_size", window_size)
    compression: dict[str, Any] = {
        "compress_length": compress_length,
        "compress_stride": compress_stride,
    }
    selects = g_slc is not None and block_indices is None
    if g_cmp is not None or selects:
        if k_cmp is None:
            k_cmp = compress_keys(k, **compression)
            v_cmp = compress_keys(v, **compression) if g_cmp is not None else v[:, :, : k_cmp.shape[2]]
        assert v_cmp is not None
        _, k_cmp, v_cmp = check_attention(name, q, k_cmp, v_cmp)
        for label, x, like in (("k_cmp", k_cmp, k), ("v_cmp", v_cmp, v)):
            wanted = (*k.shape[:2], k_cmp.shape[2], like.shape[3])
            check_shape(name, label, x, wanted, "k's heads, and as many compressed keys")
        check_compressed(name, "k_cmp", k_cmp.shape[2], keys, compress_length, compress_stride)
    common: dict[str, Any] = {"causal": causal, "scale": scale, "cache_seqlens": cache_seqlens}
    total: Tensor | None = None
    if selects and g_cmp is not None and _fuses(q, k_cmp, v_cmp, cache_seqlens):
        assert k_cmp is not None
        count, counts = most_blocks(name, block_counts, q, k_cmp)
        number = q.shape[3] ** -0.5 if scale is None else float(scale)
        block_indices, out, _ = select_and_attend(
            q, k_cmp, v_cmp, cache_seqlens, counts, keys, compress_length, compress_stride, block_size,
            count, causal, number,
        )  # fmt: skip
        total, g_cmp, block_counts = _gated(total, g_cmp, out), None, 0
    if g_slc is not None:
        if block_indices is None:
            assert k_cmp is not None
            block_indices = select_blocks(
                q, k_cmp, keys=keys, count=block_counts, block_size=block_size, **compression, **common
            )
        elif isinstance(block_counts, Tensor):
            block_indices = _first(name, block_indices, block_counts, q, k)
        out = selected_attention(q, k, v, block_indices, block_size=block_size, **common)
        total = _gated(total, g_slc, out)
    if g_cmp is not None:
        assert k_cmp is not None
        assert v_cmp is not None
        out = compressed_attention(q, k_cmp, v_cmp, keys=keys, **compression, **common)[0]
        total = _gated(total, g_cmp, out)
    if g_swa is not None:
        window = (window_size - 1, 0 if causal else window_size - 1)
        ranges = None
        if cache_seqlens is not None:
            end = cache_seqlens.long()
            ranges = torch.stack([torch.zeros_like(end), end, end - tokens], 1)
        out = attention(q, k_swa, v_swa, causal=causal, window=window, scale=scale, key_ranges=ranges)
        total = _gated(total, g_swa, out)
    assert total is not None
    return total


def compress_keys(x: Tensor, *, compress_length: int = 32, compress_stride: int = 16) -> Tensor:
    """Means of overlapping spans of tokens: Native Sparse Attention's compression without parameters.

    Span c is tokens ``[c * compress_stride, c * compress_stride + compress_length)``, of which the last
    may have fewer; the mean is of those that there are. Summed in float32 (float64 for float64).

    Args:
        x: (..., T, D), floating.
        compress_length: A multiple of ``compress_stride``.
        compress_stride: Tokens from one span to the next.

    Returns:
        (..., T_c, D) in x's dtype, T_c = 1 + ceil((T - compress_length) / compress_stride), at least 1.

    Raises:
        TypeError, ValueError: Dtype or values do not fit.

    Example::

        longspan.compress_keys(torch.randn(1, 2, 100, 64)).shape  # (1, 2, 6, 64)
    """
    check_floating("compress_keys", "x", x)
    check_strides("compress_keys", compress_length, compress_stride, compress_stride)
    tokens, stride = x.shape[-2], compress_stride
    count = compressed_count(tokens, compress_length, stride)
    per_span = compress_length // stride
    parts = count + per_span - 1
    y = pad(x, (0, 0, 0, max(0, parts * stride - tokens)))
    sums = y.unflatten(-2, (-1, stride)).sum(-2, dtype=sum_dtype(x))[..., :parts, :]
    total = sum(sums[..., i : i + count, :] for i in range(per_span))
    there = tokens - torch.arange(count, device=x.device) * stride
    return (total / there.clamp(max=compress_length)[:, None]).to(x.dtype)


def compressed_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    *,
    keys: int,
    compress_length: int = 32,
    compress_stride: int = 16,
    causal: bool = True,
    scale: float | None = None,
    cache_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over compressed keys, each seen from the last token that it stands for on.

    The compressed branch of Native Sparse Attention (Yuan et al. 2025, section 3.3.1). Between two
    steps of the stride all queries see the same compressed keys, so each of those tokens is a head of
    its own in `longspan.attention`, and the staircase an ordinary causal mask.

    Args:
        q: (B, H, T_q, D), the last of them aligned with the last of ``keys``.
        k_cmp: (B, H_kv, T_c, D), as `select_blocks` has it.
        v_cmp: (B, H_kv, T_c, D_v).
        keys: T_k, that k_cmp was made of.
        compress_length: Keys that a compressed one stands for; a multiple of ``compress_stride``.
        compress_stride: Keys from one to the next.
        causal: False: all compressed keys are seen.
        scale: Of the scores; None is D ** -0.5.
        cache_seqlens: (B,) integers: keys that there are so far, out of ``keys`` slots, for steps of few
            tokens (a mask of tokens x compressed keys is made).

    Returns:
        (out, lse), out (B, H, T_q, D_v) in q's dtype, lse (B, H, T_q), -inf for a query that sees none.

    Raises:
        TypeError, ValueError: Dtypes, shapes or values do not fit.

    Example::

        q, k = torch.randn(1, 16, 256, 64), torch.randn(1, 1, 256, 64)
        k_cmp = longspan.compress_keys(k)
        out, lse = longspan.compressed_attention(q, k_cmp, k_cmp, keys=256)
    """
    name = "compressed_attention"
    q, k_cmp, v_cmp = check_attention(name, q, k_cmp, v_cmp)
    check_strides(name, compress_length, compress_stride, compress_stride)
    check_compressed(name, "k_cmp", k_cmp.shape[2], keys, compress_length, compress_stride)
    tokens, d = q.shape[2], compress_stride
    if not causal:
        if cache_seqlens is not None:
            raise ValueError(f"{name}: cache_seqlens: expected None where not causal")
        return attention(q, k_cmp, v_cmp, scale=scale, return_lse=True)
    few = tokens < d
    if cache_seqlens is not None or few or not has_kernels(name, q):
        end = keys if cache_seqlens is None else cache_seqlens.to(q.device)[:, None, None, None]
        at = torch.arange(tokens, device=q.device)[:, None] + end - tokens
        last = torch.arange(k_cmp.shape[2], device=q.device) * d + compress_length - 1
        return attention(q, k_cmp, v_cmp, last <= at, scale=scale, return_lse=True)
    stairs = _Stairs(q, k_cmp, keys, compress_length, d)
    each = [stairs.heads(x) for x in (k_cmp, v_cmp)]
    out, lse = attention(
        stairs.rows(q), *each, causal=True, scale=scale, key_ranges=stairs.ranges, return_lse=True
    )
    return stairs.tokens(out), stairs.tokens(lse)


class _Stairs:
    """Queries in rows of ``stride``, all of which see the same compressed keys, and row i one more.

    Token t is in row (t + before) // stride. The heads of a batch of B * H are the tokens of a row,
    which lie side by side, so that neither q nor the output is turned in memory.
    """

    def __init__(self, q: Tensor, k_cmp: Tensor, keys: int, length: int, stride: int) -> None:
        self.b, self.h, self.count, _ = q.shape
        self.stride, self.kv_heads = stride, k_cmp.shape[1]
        first, self.before = divmod(keys - self.count - length + 1, stride)
        self.each = -(-(self.count + self.before) // stride)
        self.after = self.each * stride - self.before - self.count
        self.ranges = torch.tensor([[0, k_cmp.shape[2], first]]).expand(self.b * self.h, 3)

    def rows(self, x: Tensor, value: float = 0.0) -> Tensor:
        """(B, H, T, D) -> (B * H, stride, rows, D); (B, H, T) likewise."""
        around = (0, 0) * (x.dim() - 3) + (self.before, self.after)
        padded = pad(x, around, value=value)
        return padded.reshape(self.b * self.h, self.each, self.stride, *x.shape[3:]).transpose(1, 2)

    def tokens(self, x: Tensor) -> Tensor:
        """The way back."""
        y = x.transpose(1, 2).reshape(self.b, self.h, self.each * self.stride, *x.shape[3:])
        return y[:, :, self.before : self.before + self.count]

    def heads(self, x: Tensor) -> Tensor:
        """(B, H_kv, T_c, D) -> (B * H, 1, T_c, D)."""
        return x.repeat_interleave(self.h // self.kv_heads, 1).flatten(0, 1).unsqueeze(1)

    def sum_heads(self, x: Tensor) -> Tensor:
        """The gradient's way back."""
        y = x.view(self.b, self.kv_heads, self.h // self.kv_heads, *x.shape[2:])
        return y.sum(2, dtype=sum_dtype(x)).to(x.dtype)


def _gated(total: Tensor | None, gate: Tensor, out: Tensor) -> Tensor:
    gate = gate.to(out.dtype)[..., None]
    return gate * out if total is None else total.addcmul_(gate, out)


def _first(name: str, indices: Tensor, counts: Tensor, q: Tensor, k: Tensor) -> Tensor:
    wanted = (q.shape[0], k.shape[1], q.shape[2])
    check_integers(name, "block_counts", counts, wanted, "(batch, kv_heads, tokens)")
    index = torch.arange(indices.shape[-1], device=indices.device)
    group = indices.shape[1] // counts.shape[1]
    return torch.where(index < counts.repeat_interleave(group, 1)[..., None], indices, -1)


def _fuses(q: Tensor, k_cmp: Tensor | None, v_cmp: Tensor | None, lengths: Tensor | None) -> bool:
    """Whether one pass serves the compressed branch and the selection: but for gradients of a step."""
    return has_kernels("native_sparse_attention", q) and (
        lengths is None or not wants_gradient((q, k_cmp, v_cmp))
    )


# ---- autograd

_attention_backward = overload("attention_backward")


class _SelectAndAttend(OperatorFunction):
    """longspan::select_blocks with the derivative of its attention: that of attention over stairs."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        output = below_autograd(select_and_attend, *args)
        ctx.save_for_backward(*args[:3], *output[1:])
        ctx.options = args[3:]
        ctx.mark_non_differentiable(output[0])
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        lengths, _, keys, length, stride, *_, causal, scale = ctx.options
        _, d_out, d_lse = gradients
        if v is None or (d_out is None and d_lse is None):
            return (None,) * 12
        if lengths is not None:
            raise RuntimeError("longspan.select_blocks: cache_seqlens: a step has no gradient")
        d_out = torch.zeros_like(out) if d_out is None else d_out
        none = (None,) * 5
        if not causal:
            rest = (None, -1, -1, 0, scale, 0.0, 0.0)
            dq, dk, dv, _ = _attention_backward(d_out, d_lse, q, k, v, out, lse, *none, None, *rest)
            return dq, dk, dv, *([None] * 9)
        stairs = _Stairs(q, k, keys, length, stride)
        rows = [None if x is None else stairs.rows(x) for x in (d_out, d_lse, q)]
        kept = (stairs.rows(out), stairs.rows(lse, -torch.inf))
        rest = (None, -1, 0, 0, scale, 0.0, 0.0)
        dq, dk, dv, _ = _attention_backward(
            *rows, stairs.heads(k), stairs.heads(v), *kept, *none, stairs.ranges, *rest
        )
        return stairs.tokens(dq), stairs.sum_heads(dk), stairs.sum_heads(dv), *([None] * 9)


register_autograd("select_blocks", _SelectAndAttend)
