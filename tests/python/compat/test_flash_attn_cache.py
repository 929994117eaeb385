"""longspan.compat.flash_attn's attention over caches, against flash-attn's documented semantics."""

import math

import pytest
import torch
from flash_attn_oracle import F64, close, dense, dense_batch, expected_options, raises, randn

from longspan.compat import flash_attn as fa


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def turn(x, cos, sin, positions, interleaved):
    """x (T, H, D) rotated as complex numbers by cos + i sin (positions, R / 2)."""
    half = cos.shape[1]
    y = x[..., : 2 * half].to(F64)
    pairs = y.unflatten(-1, (half, 2)) if interleaved else y.unflatten(-1, (2, half)).transpose(-1, -2)
    turned = torch.view_as_real(
        torch.view_as_complex(pairs.contiguous())
        * torch.complex(cos.to(F64), sin.to(F64))[positions][:, None]
    )
    turned = turned if interleaved else turned.transpose(-1, -2)
    return torch.cat([turned.flatten(-2), x[..., 2 * half :].to(F64)], -1)


def angles(positions, half):
    angle = torch.arange(positions)[:, None] * 10.0 ** -torch.arange(half)
    return angle.cos().to(F64), angle.sin().to(F64)


MASKS = [
    {},
    {"causal": True},
    {"window_size": (11, 2)},
    {"causal": True, "window_size": (6, -1), "softcap": 2.0, "alibi_slopes": 1},
]


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize(
    ("interleaved", "new"),
    [(None, 0), (None, 1), (None, 3), (True, 1), (True, 3), (False, 1), (False, 3)],
)
@pytest.mark.parametrize("storage", ["rows", "batch_idx", "pages"])
@pytest.mark.parametrize("leftpad", [False, True])
def test_kvcache(mask, interleaved, new, storage, leftpad):
    batch, heads, kv_heads, d, slots, page = 3, 4, 2, 16, 48, 16
    ours, theirs = expected_options(mask, heads, batch)
    for tokens in (1, 4):
        q = randn(batch, tokens, heads, d)
        k, v = (randn(batch, new, kv_heads, d) for _ in range(2)) if new else (None, None)
        used = torch.tensor([20, 0 if new else 5, 37], dtype=torch.int32)
        pad = torch.tensor([4, 0, 20], dtype=torch.int32) if leftpad else None
        cos, sin = (None, None) if interleaved is None else angles(64, 6)
        table = rows = None
        if storage == "pages":
            table = (
                torch.randperm(batch * slots // page + 2)[: batch * slots // page]
                .reshape(batch, -1)
                .int()
            )
            shape = (batch * slots // page + 2, page, kv_heads, d)
        else:
            rows = torch.tensor([4, 0, 2], dtype=torch.int32) if storage == "batch_idx" else None
            shape = (5 if storage == "batch_idx" else batch, slots, kv_heads, d)
        k_cache, v_cache = randn(*shape), randn(*shape)

        def row(cache, b, table=table, rows=rows):
            if table is not None:
                return cache[table[b].long()].flatten(0, 1)
            return cache[b if rows is None else rows[b]]

        outs, lses, k_rows, v_rows = [], [], [], []
        for b in range(batch):
            at, first = int(used[b]), int(pad[b]) if leftpad else 0
            k_row, v_row, query = row(k_cache, b).clone(), row(v_cache, b).clone(), q[b]
            if new:
                fresh = k[b]
                if cos is not None:
                    fresh = turn(fresh, cos, sin, at + torch.arange(new), interleaved)
                    local = ours.get("causal") or "window_size" in ours
                    steps = torch.arange(tokens) if local else torch.zeros(tokens, dtype=torch.long)
                    query = turn(query, cos, sin, at + steps, interleaved)
                k_row[at : at + new], v_row[at : at + new] = fresh, v[b]
            keys = slice(first, at + new)
            out, lse = dense(query, k_row[keys], v_row[keys], **theirs)
            outs.append(out)
            lses.append(lse)
            k_rows.append(k_row)
            v_rows.append(v_row)
        before = k_cache.clone(), v_cache.clone()
        got, lse = fa.flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, cos, sin, used, rows, pad, table, **ours,
            **({} if interleaved is None else {"rotary_interleaved": interleaved}),
            num_splits=2, return_softmax_lse=True,
        )  # fmt: skip
        assert got.shape == (batch, tokens, heads, d)
        close(got, torch.stack(outs))
        close(lse, torch.stack(lses))
        for b in range(batch):
            close(row(k_cache, b), k_rows[b])
            close(row(v_cache, b), v_rows[b], rtol=0, atol=0)
        changed = [(now != then).any(-1).any(-1).sum() for now, then in zip((k_cache, v_cache), before)]
        assert changed == [batch * new] * 2


def test_kvcache_rotates_interleaved_by_default():
    cos, sin = angles(8, 4)
    new = randn(1, 1, 1, 8)
    caches = []
    for options in ({}, {"rotary_interleaved": True}, {"rotary_interleaved": False}):
        k_cache, v_cache = torch.zeros(2, 1, 8, 1, 8, dtype=F64)
        fa.flash_attn_with_kvcache(new, k_cache, v_cache, new, new, cos, sin, 5, **options)
        caches.append(k_cache)
    assert torch.equal(caches[0], caches[1])
    assert not torch.equal(caches[0], caches[2])


def test_kvcache_takes_an_int_and_all_slots_by_default():
    q, k_cache, v_cache = randn(2, 1, 2, 8), randn(2, 12, 2, 8), randn(2, 12, 2, 8)
    close(
        fa.flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=7),
        dense_batch(q, k_cache[:, :7], v_cache[:, :7])[0],
    )
    close(fa.flash_attn_with_kvcache(q, k_cache, v_cache), dense_batch(q, k_cache, v_cache)[0])
    table = torch.tensor([[0, 1], [1, 0]])
    pages = fa.flash_attn_with_kvcache(q, k_cache, v_cache, block_table=table)
    every = (torch.stack([torch.cat([x[i] for i in row]) for row in table]) for x in (k_cache, v_cache))
    close(pages, dense_batch(q, *every)[0])


def test_kvcache_is_written_where_it_lies():
    storage = torch.zeros(1, 2, 32, 24)  # heads outside tokens, and a slice of a wider row
    k_cache, v_cache = storage[..., :8].transpose(1, 2), storage[..., 8:16].transpose(1, 2)
    new = torch.ones(1, 1, 2, 8)
    fa.flash_attn_with_kvcache(new, k_cache, v_cache, new, 2 * new, cache_seqlens=3)
    expected = torch.zeros_like(storage)
    expected[:, :, 3, :8], expected[:, :, 3, 8:16] = 1, 2
    assert torch.equal(storage, expected)


def test_kvcache_step_by_step_is_the_whole():
    q, k, v = randn(2, 40, 4, 16), randn(2, 40, 2, 16), randn(2, 40, 2, 16)
    k_cache, v_cache = torch.full((2, 2, 64, 2, 16), math.nan, dtype=F64)
    steps, at = [], 0
    for n in (23, 1, 1, 5, 1, 9):
        rows = slice(at, at + n)
        steps.append(
            fa.flash_attn_with_kvcache(
                q[:, rows], k_cache, v_cache, k[:, rows], v[:, rows], cache_seqlens=at, causal=True
            )
        )
        at += n
    close(torch.cat(steps, 1), fa.flash_attn_func(q, k, v, causal=True))


def test_errors():
    q, cache, new = torch.zeros(2, 1, 4, 8), torch.zeros(2, 16, 2, 8), torch.ones(2, 1, 2, 8)
    cos = torch.ones(4, 4)
    f = fa.flash_attn_with_kvcache
    raises(ValueError, "k and v: expected both", f, q, cache, cache, new)
    raises(ValueError, "cache_seqlens: expected an int", f, q, cache, cache, new, new)
    raises(
        ValueError,
        "cache_seqlens: expected an int or",
        f,
        q,
        cache,
        cache,
        cache_seqlens=torch.zeros(3, dtype=torch.int32),
    )
    raises(
        ValueError,
        "rotary_cos: expected k and v",
        f,
        q,
        cache,
        cache,
        rotary_cos=cos,
        rotary_sin=cos,
        cache_seqlens=1,
    )
    raises(
        ValueError,
        "rotary_cos and rotary_sin: expected both",
        f,
        q,
        cache,
        cache,
        new,
        new,
        cos,
        None,
        1,
    )
    raises(ValueError, "at least 5 positions, got 4", f, q, cache, cache, new, new, cos, cos, 4)
    raises(
        ValueError, "at most half", f, q, cache, cache, new, new, torch.ones(9, 5), torch.ones(9, 5), 4
    )
    raises(ValueError, r"k: .*got \(2, 1, 4, 8\)", f, q, cache, cache, q, q, cache_seqlens=1)
    raises(TypeError, "k_cache: expected q's dtype", f, q, cache.half(), cache.half())
    raises(RuntimeError, "cache_seqlens", f, q, cache, cache, new, new, cache_seqlens=16)
    raises(RuntimeError, "no gradient", f, q.requires_grad_(), cache, cache, new, new, cache_seqlens=2)
    assert not cache.any()
