"""flash-attn's documented semantics, dense and in float64: what longspan.compat.flash_attn must give."""

import math

import pytest
import torch

F64 = torch.float64


def dense(q, k, v, scale=None, causal=False, window=(-1, -1), softcap=0.0, slopes=None):
    """One sequence: q (T, H, D), k and v (S, H_kv, ...) -> out (T, H, D_v), lse (H, T)."""
    (t, h, d), s = q.shape, k.shape[0]
    q, k, v = q.to(F64), k.to(F64), v.to(F64)
    k, v = (x.repeat_interleave(h // x.shape[1], dim=1) for x in (k, v))
    score = torch.einsum("thd,shd->hts", q, k) * (d**-0.5 if scale is None else scale)
    if softcap:
        score = softcap * torch.tanh(score / softcap)
    at = torch.arange(t)[:, None] + s - t
    key = torch.arange(s)[None]
    if slopes is not None:
        score = score - slopes.to(F64)[:, None, None] * (at - key).abs()
    seen = torch.ones(t, s, dtype=torch.bool)
    if window[0] >= 0:
        seen &= key >= at - window[0]
    if window[1] >= 0 or causal:
        seen &= key <= at + (0 if causal else window[1])
    score = score.masked_fill(~seen, -math.inf)
    weight = torch.softmax(score, -1).masked_fill(~seen.any(1)[:, None], 0)
    return torch.einsum("hts,shd->thd", weight, v), torch.logsumexp(score, -1)


def dense_batch(q, k, v, slopes=None, **options):
    per_row = slopes if slopes is not None and slopes.dim() == 2 else [slopes] * len(q)
    parts = [dense(*row, slopes=s, **options) for *row, s in zip(q, k, v, per_row)]
    return torch.stack([out for out, _ in parts]), torch.stack([lse for _, lse in parts])


def randn(*shape, dtype=F64, grad=False):
    return torch.randn(*shape, dtype=dtype, requires_grad=grad)


def close(actual, expected, **tolerance):
    torch.testing.assert_close(
        actual.to(F64), expected.to(F64), **({"rtol": 1e-9, "atol": 1e-9} | tolerance)
    )


def expected_options(options, heads, batch):
    ours = dict(options)
    theirs = {
        {"softmax_scale": "scale", "window_size": "window"}.get(name, name): value
        for name, value in options.items()
    }
    if "alibi_slopes" in ours:
        slopes = torch.rand(heads) if ours["alibi_slopes"] == 1 else torch.rand(batch, heads)
        ours["alibi_slopes"] = slopes
        del theirs["alibi_slopes"]
        theirs["slopes"] = slopes
    return ours, theirs


def raises(kind, match, function, *args, **options):
    with pytest.raises(kind, match=match):
        function(*args, **options)
