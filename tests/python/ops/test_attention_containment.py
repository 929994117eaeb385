"""What a query cannot see never reaches its output or gradient, not even a NaN; what it sees does."""

from typing import Any

import pytest
import torch
from attention_oracle import actual, heads, visible
from checks import assert_same_bits, results
from torch import Tensor
from torch.testing import assert_close

import longspan

TOKENS, KEYS = 100, 140
EVERY_QUERY, EVERY_KEY = torch.ones(TOKENS, dtype=torch.bool), torch.ones(KEYS, dtype=torch.bool)
RANDOM_MASK = torch.rand(TOKENS, KEYS, generator=torch.Generator().manual_seed(7)) < 0.5

# What hides keys: options, or a mask under "seen" that becomes boolean or additive.
HIDING: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "window": {"window": (20, 10)},
    "sink tokens": {"window": (20, 0), "sink_tokens": 5},
    "key range": {"key_ranges": torch.tensor([[13, 77, 40]])},
    "key range, causal": {"key_ranges": torch.tensor([[13, 77, -5]]), "causal": True},
    "softcap, alibi": {"causal": True, "softcap": 2.0, "alibi_slopes": torch.tensor([0.1, 0.2])},
    "boolean mask": {"attn_mask": RANDOM_MASK},
    "additive mask": {"attn_mask": torch.where(RANDOM_MASK, 0.25, -torch.inf)},
    "mask over keys": {"attn_mask": RANDOM_MASK[0]},
    "boolean mask, causal": {"attn_mask": RANDOM_MASK, "causal": True},
    "softcap, additive mask": {"attn_mask": torch.where(RANDOM_MASK, 0.25, -torch.inf), "softcap": 1.0},
    "dropout": {"causal": True, "dropout_p": 0.3},
}
BAD = (torch.nan, torch.inf, -torch.inf)
KERNELS = [torch.float32, torch.bfloat16]  # the two that differ on one level and another


def seen_by(options: dict[str, Any]) -> Tensor:
    """Bool (tokens, keys)."""
    rule = {k: v for k, v in options.items() if k in ("causal", "window", "sink_tokens", "key_ranges")}
    seen = visible(TOKENS, KEYS, **rule)[0]
    mask = options.get("attn_mask")
    if mask is None:
        return seen
    return seen & (mask if mask.dtype == torch.bool else mask != -torch.inf).expand(TOKENS, KEYS)


def run(options: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    if "attn_mask" in options and options["attn_mask"].dtype != torch.bool:
        options = options | {"attn_mask": options["attn_mask"].to(tensors["q"].dtype)}

    def call(**x: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(11)
        return actual(**x, **options)

    return results(call, tensors)


def inputs(dtype: torch.dtype, size: int = 16) -> dict[str, Tensor]:
    torch.manual_seed(3)
    return heads(1, 2, 1, TOKENS, KEYS, size, dtype=dtype)


def compare(found: dict[str, Tensor], clean: dict[str, Tensor], queries: Tensor, keys: Tensor) -> None:
    """The same bits at these queries (bool) and keys.

    Where a hidden number is not finite, products go over to multiply-adds that skip zeros. In float
    and double these are what the others are made of; in bfloat16 they round otherwise than the
    processor's dot product, which may move a result to its neighbour.
    """
    half = clean["d q"].dtype == torch.bfloat16
    for name, want in clean.items():
        rows = keys if name in ("d k", "d v") else queries
        rtol, atol = (2**-7, 1e-6) if half else (0.0, 0.0)
        assert_close(
            found[name][:, :, rows], want[:, :, rows], rtol=rtol, atol=atol, equal_nan=True,
            msg=lambda m, name=name: f"{name}: {m}",
        )  # fmt: skip


@pytest.mark.parametrize("bad", BAD, ids=str)
@pytest.mark.parametrize("dtype", KERNELS)
@pytest.mark.parametrize("name", ["key range", "key range, causal", "mask over keys"])
def test_keys_that_nobody_sees(isa: str, name: str, dtype: torch.dtype, bad: float) -> None:
    options, tensors = HIDING[name], inputs(dtype)
    clean = run(options, tensors)
    hidden = ~seen_by(options).any(0)
    assert hidden.any()
    for which in (("k",), ("v",), ("k", "v")):
        dirty = {n: x.clone() for n, x in tensors.items()}
        for n in which:
            dirty[n][:, :, hidden] = bad
        found = run(options, dirty)
        compare(found, clean, EVERY_QUERY, EVERY_KEY)
        assert (found["d k"][:, :, hidden] == 0).all()
        assert (found["d v"][:, :, hidden] == 0).all()


@pytest.mark.parametrize("which", ["k", "v"])
@pytest.mark.parametrize("dtype", KERNELS)
@pytest.mark.parametrize("name", HIDING)
def test_one_bad_key_reaches_only_queries_that_see_it(
    isa: str, name: str, dtype: torch.dtype, which: str
) -> None:
    options, tensors = HIDING[name], inputs(dtype)
    clean, seen = run(options, tensors), seen_by(HIDING[name])
    for key in (14, 63, 64, 139):
        dirty = {n: x.clone() for n, x in tensors.items()}
        dirty[which][:, :, key] = torch.nan
        found = run(options, dirty)
        reached = seen[:, key]
        compare(found, clean, ~reached, ~seen[reached].any(0))
        if not options.get("dropout_p"):
            assert found["out"][:, :, reached].isnan().all(), f"key {key}: a visible NaN vanished"


@pytest.mark.parametrize("dtype", KERNELS)
@pytest.mark.parametrize("name", HIDING)
def test_one_bad_query_reaches_only_itself_and_the_keys_it_sees(
    isa: str, name: str, dtype: torch.dtype
) -> None:
    options, tensors = HIDING[name], inputs(dtype)
    clean, seen = run(options, tensors), seen_by(HIDING[name])
    for query in (0, 64, 99):
        dirty = {n: x.clone() for n, x in tensors.items()}
        dirty["q"][:, :, query] = torch.nan
        found = run(options, dirty)
        others = torch.arange(TOKENS) != query
        compare(found, clean, others, ~seen[query])
        if seen[query].any():
            assert found["out"][:, :, query].isnan().all()
        else:
            assert (found["out"][:, :, query] == 0).all()
            assert (found["d q"][:, :, query] == 0).all()


@pytest.mark.parametrize("dtype", KERNELS)
@pytest.mark.parametrize("name", HIDING)
def test_one_bad_cotangent_reaches_only_what_its_query_sees(
    isa: str, name: str, dtype: torch.dtype
) -> None:
    options, tensors = dict(HIDING[name]), inputs(dtype)
    mask = options.pop("attn_mask", None)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(dtype)
    leaves = [x.requires_grad_() for x in tensors.values()]
    out = longspan.attention(*leaves, mask, **options)
    cotangent = torch.randn(out.shape).to(dtype)
    clean = torch.autograd.grad(out, leaves, cotangent, retain_graph=True)
    seen = seen_by(HIDING[name])
    for query in (0, 64):
        bad = cotangent.clone()
        bad[:, :, query] = torch.nan
        found = torch.autograd.grad(out, leaves, bad, retain_graph=True)
        others = torch.arange(TOKENS) != query
        names = ("d q", "d k", "d v")
        compare(dict(zip(names, found)), dict(zip(names, clean)), others, ~seen[query])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    """As above: a bad key, value and query at once, with everything that can hide them."""
    for options in HIDING.values():
        tensors, seen = inputs(dtype), seen_by(options)
        clean = run(options, tensors)
        tensors["k"][:, :, 71] = torch.nan
        tensors["v"][:, :, 90] = torch.inf
        tensors["q"][:, :, 40] = torch.nan
        reached = seen[:, 71] | seen[:, 90]
        reached[40] = True
        compare(run(options, tensors), clean, ~reached, ~seen[reached].any(0))


def test_a_bad_mask_value_reaches_only_its_query(isa: str) -> None:
    tensors = inputs(torch.float32)
    tensors["attn_mask"] = torch.randn(TOKENS, KEYS)
    clean = run({"causal": True}, tensors)
    tensors["attn_mask"][70, 20] = torch.nan  # seen
    tensors["attn_mask"][30, 139] = torch.nan  # not seen
    found = run({"causal": True}, tensors)
    others = torch.arange(TOKENS) != 70
    for name in ("out", "out 1", "d q"):
        assert_same_bits({name: found[name][:, :, others]}, {name: clean[name][:, :, others]})
    assert_same_bits({"d": found["d attn_mask"][others]}, {"d": clean["d attn_mask"][others]})
    assert found["out"][:, :, 70].isnan().all()


def test_the_mask_has_no_gradient_where_it_hides(isa: str) -> None:
    """Nor from the bad keys that it hides."""
    tensors = inputs(torch.float64)
    tensors["attn_mask"] = torch.where(RANDOM_MASK, torch.randn(TOKENS, KEYS).double(), -torch.inf)
    tensors["attn_mask"][:, 33] = -torch.inf
    clean = run({}, tensors)
    assert (clean["d attn_mask"][tensors["attn_mask"] == -torch.inf] == 0).all()
    tensors["k"][:, :, 33] = torch.nan
    tensors["v"][:, :, 33] = torch.inf
    assert_same_bits(run({}, tensors), clean)


def test_other_sequences_of_a_pack(isa: str) -> None:
    q, k, v = (torch.randn(100, 2, 16) for _ in range(3))
    cu = torch.tensor([0, 30, 30, 71, 90])  # rows 90 ... 99 belong to nobody

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = longspan.attention_varlen(q, k, v, cu, cu, return_lse=True)
        return out, lse.transpose(0, 1)

    clean = results(call, {"q": q, "k": k, "v": v})
    for begin, end in [(0, 30), (30, 71), (71, 90), (90, 100)]:
        dirty = {name: x.clone() for name, x in {"q": q, "k": k, "v": v}.items()}
        for x in dirty.values():
            x[begin:end] = torch.nan
        found = results(call, dirty)
        others = torch.ones(100, dtype=torch.bool)
        others[begin:end] = False
        assert_same_bits(
            {n: x[others] for n, x in found.items()}, {n: x[others] for n, x in clean.items()}
        )
        if begin == 90:
            assert_same_bits(found, clean)
