"""Locality-sensitive hashing attention (Reformer): `lsh_attention`, its step, and its hash."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longspan.ops._autograd import wants_gradient
from longspan.ops._checks import (
    autocast,
    check_between,
    check_bool,
    check_device,
    check_floating,
    check_integers,
    check_like,
    check_positive,
    check_shape,
    normalised,
    sum_dtype,
)
from longspan.ops._lsh_rounds import Rounds
from longspan.ops.attention import attention, merge_attention

Buckets = int | Sequence[int]

_PROJECTIONS = 2**22  # are made at once when hashing


def lsh_attention(
    qk: Tensor,
    v: Tensor,
    *,
    num_hashes: int = 4,
    num_buckets: Buckets | None = None,
    chunk_length: int = 64,
    chunks_before: int = 1,
    chunks_after: int = 0,
    causal: bool = False,
    dedup: bool = True,
    attend_across_buckets: bool = True,
    wrap: bool = False,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    norm_eps: float = 1e-6,
    dropout_p: float = 0.0,
    seed: int | None = None,
    rotations: Tensor | None = None,
    buckets: Tensor | None = None,
    return_lse: bool = False,
    return_buckets: bool = False,
) -> Any:
    """Attention with shared queries and keys, to the tokens that fall into nearby hash buckets.

    In each round tokens are sorted by (bucket, position) and cut into chunks; a token sees its chunk
    and the neighbouring ones. Keys are the queries over their root mean square, so that a score is
    ``scale * qk_i . qk_j / rms(qk_j)``. A token attends to itself only where it sees nobody else, as
    the first token of a causal sequence (Kitaev, Kaiser and Levskaya 2020, Reformer, section 2).
    Rounds are combined by their log-sum-exps. Time and memory are linear in T, up to the sort and
    the hash, which is T * num_hashes * sum(num_buckets).

    Buckets are found without a gradient, and the backward uses those of the forward. Where T is at
    most ``chunk_length`` every token sees all others and there is only one round.

    Causal means that a token never reads what comes after it. Which of the earlier tokens it sees
    does depend on how the later ones sort between them, as in every implementation of Reformer; the
    last token sees what `lsh_attention_step` lets it see.

    Args:
        qk: (B, H, T, D), queries and keys, float32, float64, bfloat16 or float16, any strides.
        v: (B, H, T, D_v).
        num_hashes: Rounds, R. The paper has 1 to 8.
        num_buckets: Of a round: an even number, or a sequence of even numbers whose product it is, so
            that hashing costs their sum. None is the power of two at or below 2 * (T // chunk_length),
            in two factors where it is great (`lsh_num_buckets`).
        chunk_length: Tokens in a chunk, m. T need not be a multiple.
        chunks_before: How many chunks before its own a token sees.
        chunks_after: How many chunks after its own.
        causal: A token sees only tokens before it.
        dedup: Count a pair that several rounds bring together once: the result is softmax attention
            over the union of the rounds, exactly. (Each pair counts in the first round that sees it,
            which equals subtracting log N of the paper's appendix A, the number of such rounds, in
            all.) False counts it in each, as transformers does.
        attend_across_buckets: See the whole chunks, as the paper does, and not only the tokens of the
            own bucket in them.
        wrap: Let the first chunk of a round look back into the last one of the round before (the last
            round, for the first), and the last chunk look ahead likewise, as transformers does. They
            have nothing in common, so by default there is nothing before the first chunk. Only
            without ``dedup``.
        key_mask: (B, T) bool, False for padding: it is not seen, and its output is 0.
        scale: Of the scores; None is D ** -0.5, and a score is then ``qk_i . qk_j / |qk_j|``, as the
            authors' code and transformers have it. fast-transformers has 1 / D.
        norm_eps: Added to the mean square of a key.
        dropout_p: Probability in [0, 1) of dropping a weight, in each round.
        seed: Of the rotations; None draws from torch's generator.
        rotations: Of `lsh_rotations`; in place of ``seed``.
        buckets: (B, H, R, T) integers, in place of hashing; R is then the number of rounds.
        return_lse: Also return the log-sum-exp of each token's scores.
        return_buckets: Also return the buckets.

    Returns:
        out (B, H, T, D_v) in qk's dtype; a tuple with lse (B, H, T) float32 (float64 for float64),
        -inf where a token sees only itself or is padding, and buckets (B, H, R, T) int64, if asked for.
        Both out and lse are differentiable.

    Raises:
        TypeError: A dtype is not supported or differs from qk's.
        ValueError: Shapes or values do not fit, or options exclude each other.

    Example::

        qk, v = torch.randn(2, 1, 8, 16384, 64, requires_grad=True)
        longspan.lsh_attention(qk, v, num_hashes=4, causal=True).sum().backward()
    """
    name = "lsh_attention"
    qk, v = _check_inputs(name, qk, v, key_mask, norm_eps)
    _check_chunks(name, chunk_length, chunks_before, chunks_after)
    check_between(name, "dropout_p", dropout_p, 0.0, 1.0)
    if wrap and dedup:
        raise ValueError(f"{name}: wrap: expected dedup=False beside it, got dedup=True")
    if sum(x is not None for x in (seed, rotations, buckets)) > 1:
        raise ValueError(f"{name}: seed, rotations and buckets: expected one of them at most")
    b, h, t, d = qk.shape
    if buckets is not None:
        check_integers(name, "buckets", buckets, (b, h, None, t), "(batch, heads, rounds, tokens)")
        num_hashes = buckets.shape[2]
    check_positive(name, "num_hashes", num_hashes)
    if key_mask is not None:
        qk, v = (torch.where(key_mask[:, None, :, None], x, 0) for x in (qk, v))
    # Everybody sees everybody: one round without sorting, and no need to hash.
    whole = t <= chunk_length and attend_across_buckets
    if buckets is None and (not whole or return_buckets):
        if num_buckets is None:
            num_buckets = lsh_num_buckets(t, chunk_length)
        if rotations is None:
            rotations = lsh_rotations(
                h, d, num_hashes=num_hashes, num_buckets=num_buckets, seed=seed, device=qk.device
            )
        buckets = lsh_buckets(qk, rotations, num_buckets=num_buckets)
        num_hashes = buckets.shape[2]
    elif rotations is not None or num_buckets is not None:
        _factors(name, 2 if num_buckets is None else num_buckets)
    if qk.shape[:3].numel() == 0:
        nothing = qk.sum(-1).to(sum_dtype(qk))
        return _returned(v + qk.sum(-1, keepdim=True), nothing, buckets, return_lse, return_buckets)
    if whole:
        lanes, chunk_length, chunks_before, chunks_after, wrap = None, t, 0, 0, False
    else:
        assert buckets is not None
        lanes = buckets.flatten(0, 1)
    rounds = Rounds(
        lanes, (b, h, t), chunk_length, chunks_before, chunks_after,
        across=attend_across_buckets, wrap=wrap, key_mask=key_mask, device=qk.device,
    )  # fmt: skip
    scale = d**-0.5 if scale is None else float(scale)
    query, value = rounds.rows(qk), rounds.rows(v)
    key = normalised(query, norm_eps)
    outs, lses = [], []
    for r in range(rounds.count):
        out, lse = attention(
            rounds.sorted(query, r),
            rounds.neighbours(key, r),
            rounds.neighbours(value, r),
            rounds.visible(r, causal=causal, dedup=dedup),
            scale=scale,
            dropout_p=dropout_p,
            return_lse=True,
        )
        outs.append(rounds.unsorted(out, r))
        lses.append(rounds.unsorted(lse, r))
    out, lse = (outs[0], lses[0]) if rounds.count == 1 else merge_attention(outs, lses)
    out = torch.where((lse == -torch.inf)[..., None], v, out)
    if key_mask is not None:
        out = torch.where(key_mask[:, None, :, None], out, 0)
        lse = torch.where(key_mask[:, None], lse, -torch.inf)
    return _returned(out, lse, buckets, return_lse, return_buckets)


def lsh_attention_step(
    qk: Tensor,
    v: Tensor,
    qk_cache: Tensor,
    v_cache: Tensor,
    bucket_cache: Tensor,
    cache_seqlens: Tensor,
    rotations: Tensor,
    *,
    num_buckets: Buckets,
    chunk_length: int = 64,
    chunks_before: int = 1,
    chunks_after: int = 0,
    dedup: bool = True,
    attend_across_buckets: bool = True,
    scale: float | None = None,
    norm_eps: float = 1e-6,
) -> Tensor:
    """Causal `lsh_attention` of one new token a sequence to a cache, which it is appended to.

    The result is the last row of `lsh_attention` over the whole sequence with the same rotations and
    buckets: the new token is hashed and sorted among the cached ones, and only the rows of its chunks
    are read, chunk_length * (1 + chunks_before + chunks_after) of each round. No gradient.

    Args:
        qk: (B, H, 1, D), the new token.
        v: (B, H, 1, D_v).
        qk_cache: (B, H, S, D), raw queries, written in place at slot ``cache_seqlens - 1``.
        v_cache: (B, H, S, D_v), likewise.
        bucket_cache: (B, H, R, S) int32 or int64, likewise.
        cache_seqlens: (B,) integers from 1 to S: tokens of each sequence, the new one included.
        rotations: Of `lsh_rotations`, those that hashed the cached tokens.
        num_buckets: Likewise.
        chunk_length, chunks_before, chunks_after, dedup, attend_across_buckets, scale, norm_eps: As in
            `lsh_attention`.

    Returns:
        out (B, H, 1, D_v) in qk's dtype.

    Raises:
        TypeError, ValueError: As `lsh_attention`; a cache is too short.
        RuntimeError: A gradient is asked for.

    Example::

        rotations = longspan.lsh_rotations(8, 64, num_hashes=4, num_buckets=64)
        options = {"num_buckets": 64, "chunk_length": 32}
        out, buckets = longspan.lsh_attention(
            qk, v, rotations=rotations, causal=True, return_buckets=True, **options)
        for cache, x in zip((qk_cache, v_cache, bucket_cache), (qk, v, buckets.mT)):
            ...  # the prompt's rows into slots 0 to T - 1
        longspan.lsh_attention_step(
            qk_new, v_new, qk_cache, v_cache, bucket_cache, torch.tensor([T + 1]), rotations, **options)
    """
    name = "lsh_attention_step"
    qk, v = _check_inputs(name, qk, v, None, norm_eps)
    _check_chunks(name, chunk_length, chunks_before, chunks_after)
    b, h, t, d = qk.shape
    if t != 1:
        raise ValueError(f"{name}: qk: expected one token, got {t}")
    check_like(name, "qk_cache", qk_cache, "qk", qk)
    check_like(name, "v_cache", v_cache, "qk", qk)
    check_shape(name, "qk_cache", qk_cache, (b, h, None, d), "(batch, heads, slots, channels) as qk")
    slots = qk_cache.shape[2]
    check_shape(name, "v_cache", v_cache, (b, h, slots, v.shape[3]), "qk_cache's shape, v's channels")
    new = lsh_buckets(qk, rotations, num_buckets=num_buckets)
    check_integers(
        name, "bucket_cache", bucket_cache, (b, h, new.shape[2], slots), "(batch, heads, rounds, slots)"
    )
    check_integers(name, "cache_seqlens", cache_seqlens, (b,), "(batch,)")
    if wants_gradient((qk, v, qk_cache, v_cache)):
        raise RuntimeError(f"{name}: decoding has no gradient; use lsh_attention, or torch.no_grad()")
    if b == 0 or h == 0:
        return torch.empty_like(v)
    length = cache_seqlens.long()
    least, used = (int(x) for x in torch.aminmax(length))
    if least < 1 or used > slots:
        raise ValueError(
            f"{name}: cache_seqlens: expected 1 to {slots}, the caches' slots, got {least} to {used}"
        )
    row = torch.arange(b, device=qk.device)
    qk_cache[row, :, length - 1] = qk[:, :, 0]
    v_cache[row, :, length - 1] = v[:, :, 0]
    bucket_cache[row, :, :, length - 1] = new[..., 0].to(bucket_cache.dtype)

    # A number for each cached token that orders them as lsh_attention sorts them. Only the new token's
    # neighbours in that order are looked for: sorting all would take longer than exact attention.
    length = length[:, None, None, None]
    count = math.prod(_factors(name, num_buckets))
    small = torch.int32 if count * used < 2**31 else torch.int64
    most = torch.iinfo(small).max
    position = torch.arange(used, device=qk.device, dtype=small)
    number = bucket_cache[..., :used].to(small) * used + position
    if least < used:
        number = number.masked_fill(position >= length, most)
    own = new.to(small) * used + (length - 1).to(small)
    not_after = number <= own
    rank = not_after.sum(-1, keepdim=True) - 1
    first = (rank // chunk_length - chunks_before) * chunk_length
    end = first + (1 + chunks_before + chunks_after) * chunk_length
    before = min((1 + chunks_before) * chunk_length, used)
    after = min((1 + chunks_after) * chunk_length - 1, used)
    # Descending from its own, which is left out, and ascending from the next.
    lower = number.masked_fill(~not_after, -1).topk(before).values[..., 1:]
    upper = number.masked_fill(not_after, most).topk(after, largest=False).values
    steps = torch.arange(max(before, after) + 1, device=qk.device)[1:]
    slot = torch.cat([rank - steps[: before - 1], rank + steps[:after]], dim=-1)
    seen = (slot >= first) & (slot < end) & (slot >= 0) & (slot < length)
    number = torch.cat([lower, upper], dim=-1)
    token = (number % used).long()  # (B, H, R, width - 1)
    if not attend_across_buckets:
        seen &= number // used == new
    token = torch.where(seen, token, used).flatten(2)
    if dedup:
        token = token.sort(-1).values
    seen = token < used
    if dedup:
        seen[..., 1:] &= token[..., 1:] != token[..., :-1]
    where = (row[:, None, None], torch.arange(h, device=qk.device)[:, None], token.clamp(max=used - 1))
    out, lse = attention(
        qk,
        normalised(qk_cache[where], norm_eps),
        v_cache[where],
        seen[:, :, None],
        scale=d**-0.5 if scale is None else float(scale),
        return_lse=True,
    )
    return torch.where((lse == -torch.inf)[..., None], v, out)


def lsh_num_buckets(tokens: int, chunk_length: int) -> int | tuple[int, int]:
    """Transformers' number of buckets: so many that a chunk holds about two.

    The power of two at or below 2 * (tokens // chunk_length), at least 2; in two factors where it is
    more than twice the greater of chunk_length and sqrt(tokens / chunk_length).

    Raises:
        ValueError: ``chunk_length`` is not positive.

    Example::

        longspan.ops.lsh_num_buckets(16384, 64)  # (16, 32)
    """
    check_positive("lsh_num_buckets", "chunk_length", chunk_length)
    power = max(1, (2 * (tokens // chunk_length)).bit_length() - 1)
    if 2**power > 2 * max(math.isqrt(tokens // chunk_length), chunk_length):
        return 2 ** (power // 2), 2 ** (power - power // 2)
    return 2**power


def lsh_rotations(
    num_heads: int,
    head_dim: int,
    *,
    num_hashes: int,
    num_buckets: Buckets,
    seed: int | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """The random projections that `lsh_buckets` hashes with.

    Args:
        num_heads: H.
        head_dim: D.
        num_hashes: Rounds, R.
        num_buckets: An even number, or several, whose product is the number of buckets.
        seed: None draws from torch's generator. The same seed gives what transformers draws after
            ``torch.manual_seed(hash_seed)``.
        device: None is torch's default.

    Returns:
        (H, D, R, sum(num_buckets) / 2) float32, normal.

    Raises:
        ValueError: A number is not positive, or one of ``num_buckets`` is odd.

    Example::

        longspan.lsh_rotations(8, 64, num_hashes=4, num_buckets=(16, 32), seed=0)
    """
    name = "lsh_rotations"
    for label, x in (("num_heads", num_heads), ("head_dim", head_dim), ("num_hashes", num_hashes)):
        check_positive(name, label, x)
    shape = (num_heads, head_dim, num_hashes, sum(_factors(name, num_buckets)) // 2)
    if seed is None:
        return torch.randn(shape, device=device, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32).to(device)


def lsh_buckets(x: Tensor, rotations: Tensor, *, num_buckets: Buckets) -> Tensor:
    """Hash each vector to a bucket: argmax of [xR, -xR] (Andoni et al. 2015), in every round.

    With several factors each has rotations of its own, and a bucket is the number whose digits their
    buckets are. Vectors at a small angle often share a bucket; their length makes no difference. Has
    no gradient.

    Args:
        x: (B, H, T, D), floating; hashed in float32 (float64 for float64).
        rotations: (H, D, R, sum(num_buckets) / 2), of `lsh_rotations`.
        num_buckets: As there.

    Returns:
        (B, H, R, T) int64, from 0 to the product of ``num_buckets`` - 1.

    Raises:
        TypeError, ValueError: Dtypes, shapes or numbers do not fit.

    Example::

        rotations = longspan.lsh_rotations(8, 64, num_hashes=4, num_buckets=64)
        longspan.lsh_buckets(torch.randn(1, 8, 1000, 64), rotations, num_buckets=64)
    """
    name = "lsh_buckets"
    check_floating(name, "x", x)
    check_shape(name, "x", x, (None,) * 4, "(batch, heads, tokens, channels)")
    factors = _factors(name, num_buckets)
    b, h, t, d = x.shape
    check_floating(name, "rotations", rotations)
    check_device(name, "rotations", rotations, "x", x)
    shape = (h, d, None, sum(factors) // 2)
    check_shape(name, "rotations", rotations, shape, "(heads, channels, rounds, half of the buckets)")
    rounds = rotations.shape[2]
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        x, rotations = x.to(sum_dtype(x)), rotations.to(sum_dtype(x))
        step = max(1, _PROJECTIONS // max(1, b * h * (sum(factors) // 2)))
        found = x.new_empty((b, h, rounds, t), dtype=torch.int64)
        for r in range(rounds):
            for first in range(0, t, step):
                turned = x[:, :, first : first + step] @ rotations[:, :, r]
                found[:, :, r, first : first + step] = _digits(turned, factors)
    return found


# ---- from the public arguments


def _check_inputs(
    name: str, qk: Tensor, v: Tensor, key_mask: Tensor | None, norm_eps: float
) -> tuple[Tensor, Tensor]:
    check_floating(name, "qk", qk)
    check_floating(name, "v", v)
    qk, v = autocast(qk, v)
    check_shape(name, "qk", qk, (None,) * 4, "(batch, heads, tokens, channels)")
    check_like(name, "v", v, "qk", qk)
    check_shape(name, "v", v, (*qk.shape[:3], None), "qk's shape but for channels")
    if key_mask is not None:
        check_bool(name, "key_mask", key_mask, (qk.shape[0], qk.shape[2]), "(batch, tokens)")
        check_device(name, "key_mask", key_mask, "qk", qk)
    if not norm_eps > 0:
        raise ValueError(f"{name}: norm_eps: expected more than 0, got {norm_eps}")
    return qk, v


def _returned(
    out: Tensor, lse: Tensor, buckets: Tensor | None, return_lse: bool, return_buckets: bool
) -> Any:
    extra = [x for x, wanted in ((lse, return_lse), (buckets, return_buckets)) if wanted]
    return (out, *extra) if extra else out


def _check_chunks(name: str, length: int, before: int, after: int) -> None:
    check_positive(name, "chunk_length", length)
    for label, x in (("chunks_before", before), ("chunks_after", after)):
        if x < 0:
            raise ValueError(f"{name}: {label}: expected 0 or more, got {x}")


# ---- hashing


def _factors(name: str, num_buckets: Buckets) -> tuple[int, ...]:
    factors = (num_buckets,) if isinstance(num_buckets, int) else tuple(num_buckets)
    if not factors or any(n < 2 or n % 2 for n in factors):
        raise ValueError(f"{name}: num_buckets: expected even numbers from 2 on, got {num_buckets}")
    return factors


def _digits(turned: Tensor, factors: tuple[int, ...]) -> Tensor:
    """(..., sum(factors) / 2) -> (...) int64, the least significant digit first."""
    bucket, unit = 0, 1
    for part, n in zip(turned.split([n // 2 for n in factors], dim=-1), factors):
        at = part.abs().argmax(-1, keepdim=True)
        digit = at + (part.gather(-1, at) < 0) * (n // 2)
        bucket = bucket + unit * digit.squeeze(-1)
        unit *= n
    assert isinstance(bucket, Tensor)
    return bucket
