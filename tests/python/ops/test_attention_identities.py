"""What must hold of attention whatever the numbers (SPEC section 1, Check; section 0, empty rows)."""

from itertools import pairwise

import pytest
import torch
from attention_oracle import actual, expected, heads, plain
from checks import DTYPES, TOLERANCE, assert_agree, assert_same_bits, grid, results, to
from torch import Tensor
from torch.testing import assert_close

import longspan


def pair(outputs: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    return {"out": outputs[0], "lse": outputs[1]}


def test_causal_is_aligned_bottom_right() -> None:
    tensors = heads(1, 1, 1, 3, 5, 8)
    _, lse = actual(**tensors, causal=True)
    scores = (tensors["q"] @ tensors["k"].transpose(-1, -2) * 8**-0.5)[0, 0]
    for i in range(3):
        assert_close(lse[0, 0, i], scores[i, : i + 3].logsumexp(0))


def test_window_as_long_as_the_sequence_is_no_window() -> None:
    tensors = heads(1, 2, 1, 90, 130, 16)
    whole = results(lambda **x: actual(**x, causal=True), tensors)
    assert_same_bits(results(lambda **x: actual(**x, causal=True, window=(130, -1)), tensors), whole)
    assert_same_bits(results(lambda **x: actual(**x, window=(-1, 0)), tensors), whole)


def test_sinks_tokens_that_reach_the_window_are_no_window() -> None:
    tensors = heads(1, 2, 1, 90, 90, 16)
    whole = results(lambda **x: actual(**x, causal=True), tensors)
    found = results(lambda **x: actual(**x, causal=True, window=(10, 0), sink_tokens=90), tensors)
    assert_agree(found, whole)


def test_permuting_keys_changes_nothing() -> None:
    tensors = heads(2, 2, 2, 70, 150, 16)
    order = torch.randperm(150)
    shuffled = tensors | {"k": tensors["k"][:, :, order], "v": tensors["v"][:, :, order]}
    assert_agree(pair(actual(**shuffled)), pair(actual(**tensors)))


def test_a_constant_added_to_a_row_moves_its_log_sum_exp_alone() -> None:
    tensors = heads(1, 2, 2, 70, 70, 16)
    constant = torch.randn(70, 1, dtype=torch.float64)
    out, lse = actual(**tensors)
    moved, moved_lse = actual(**tensors, attn_mask=constant)
    assert_agree({"out": moved, "lse": moved_lse}, {"out": out, "lse": lse + constant[:, 0]})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cuts", [[], [64], [1, 2, 3], [100, 100], [0, 150], [17, 80, 149]], ids=str)
def test_merged_parts_are_the_whole(dtype: torch.dtype, cuts: list[int]) -> None:
    tensors = heads(2, 4, 2, 33, 150, 16, dtype=dtype)

    def in_parts(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        bounds = [0, *cuts, 150]
        parts = [actual(q, k[:, :, a:b], v[:, :, a:b]) for a, b in pairwise(bounds)]
        return longspan.merge_attention([out for out, _ in parts], [lse for _, lse in parts])

    assert_agree(results(in_parts, tensors), results(actual, tensors))


def test_merging_with_sinks_in_one_part() -> None:
    tensors = heads(1, 2, 2, 20, 60, 8)
    tensors["sinks"] = torch.randn(2, dtype=torch.float64)

    def in_parts(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
        a = actual(q, k[:, :, :30], v[:, :, :30], sinks=sinks)
        b = actual(q, k[:, :, 30:], v[:, :, 30:])
        return longspan.merge_attention([a[0], b[0]], [a[1], b[1]])

    assert_agree(results(in_parts, tensors), results(actual, tensors))


def test_merging_empty_parts() -> None:
    """A part without keys is the identity, even with a NaN output; nothing but such parts is empty."""
    out, lse = torch.randn(2, 3, 4), torch.randn(2, 3)
    nothing = torch.full_like(out, torch.nan), torch.full_like(lse, -torch.inf)
    merged = longspan.merge_attention([nothing[0], out, nothing[0]], [nothing[1], lse, nothing[1]])
    assert_close(merged, (out, lse))
    merged = longspan.merge_attention([nothing[0]] * 2, [nothing[1]] * 2)
    assert_same_bits(pair(merged), {"out": torch.zeros_like(out), "lse": nothing[1]})


def test_merging_empty_parts_has_finite_gradients() -> None:
    out = torch.randn(2, 3, 4, requires_grad=True)
    lse = torch.tensor([[-torch.inf, 0.0, 1.0], [-torch.inf, -torch.inf, 2.0]], requires_grad=True)
    other = torch.full((2, 3), -torch.inf)
    merged, merged_lse = longspan.merge_attention([out, torch.zeros(2, 3, 4)], [lse, other])
    (merged.sum() + merged_lse[merged_lse.isfinite()].sum()).backward()
    assert out.grad is not None
    assert lse.grad is not None
    assert out.grad.isfinite().all()
    assert lse.grad.isfinite().all()


def test_merging_takes_stacked_parts_and_any_size_of_log_sum_exp() -> None:
    outs, lses = torch.randn(3, 2, 5, 4), torch.randn(3, 2, 5) * 1e4
    stacked = longspan.merge_attention(outs, lses)
    assert_same_bits(pair(stacked), pair(longspan.merge_attention(list(outs), list(lses))))
    assert stacked[0].isfinite().all()
    assert_close(stacked[1], lses.logsumexp(0))


def test_merge_gradcheck() -> None:
    outs = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    lses = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(longspan.merge_attention, (outs, lses))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 2, 1, 5, 0, 8), {}),
        ((1, 2, 1, 5, 0, 8), {"causal": True}),
        ((1, 2, 1, 70, 70, 8), {"attn_mask": torch.zeros(70, 70, dtype=torch.bool)}),
        ((1, 2, 1, 70, 70, 8), {"key_ranges": torch.tensor([[30, 30, 0]])}),
        ((1, 2, 1, 70, 70, 8), {"key_ranges": torch.tensor([[50, 20, 0]])}),
        ((1, 2, 1, 70, 70, 8), {"key_ranges": torch.tensor([[0, 70, -90]]), "causal": True}),
        ((1, 2, 1, 70, 70, 8), {"key_ranges": torch.tensor([[0, 70, 500]]), "window": (3, 3)}),
    ],
)
def test_queries_without_keys(
    isa: str, dtype: torch.dtype, shape: tuple[int, ...], options: dict[str, object]
) -> None:
    tensors = heads(*shape, dtype=dtype)
    found = results(lambda **x: actual(**x, **options), tensors)
    assert (found.pop("out 1") == -torch.inf).all()
    for name, x in found.items():
        assert (x == 0).all(), name


def test_queries_without_keys_beside_others(isa: str) -> None:
    """More queries than keys, causal: the first rows are empty, in a block with others."""
    tensors = heads(2, 2, 1, 70, 50, 16)
    found = results(lambda **x: actual(**x, causal=True), tensors)
    assert (found["out"][:, :, :20] == 0).all()
    assert (found["out 1"][:, :, :20] == -torch.inf).all()
    assert (found["d q"][:, :, :20] == 0).all()
    assert_agree(found, results(lambda **x: expected(**x, causal=True), tensors))


def test_a_sink_alone() -> None:
    """No visible key but a learned sink: no value, and its logit is the log-sum-exp."""
    tensors = heads(1, 2, 1, 6, 0, 8)
    tensors["sinks"] = torch.tensor([0.5, -2.0], dtype=torch.float64)
    found = results(actual, tensors)
    assert (found["out"] == 0).all()
    assert_close(found["out 1"], tensors["sinks"][None, :, None].expand(1, 2, 6))
    assert_close(found["d sinks"], grid(1, 2, 6, seed=1).sum((0, 2)))


@pytest.mark.parametrize(
    "shape", [(0, 2, 1, 5, 6, 8), (1, 2, 1, 0, 6, 8), (1, 2, 1, 0, 0, 8), (0, 0, 1, 0, 0, 8)]
)
def test_empty_tensors(shape: tuple[int, ...]) -> None:
    tensors = heads(*shape)
    tensors["sinks"] = torch.randn(shape[1], dtype=torch.float64)
    found = results(actual, tensors)
    assert found["out"].shape == (*shape[:2], shape[3], 8)
    assert found["out 1"].shape == (*shape[:2], shape[3])
    for name, x in tensors.items():
        assert_same_bits({name: found[f"d {name}"]}, {name: torch.zeros_like(x)})


def test_no_channels_of_values() -> None:
    tensors = heads(1, 2, 1, 5, 6, 8, 0)
    found = results(actual, tensors)
    assert found["out"].shape == (1, 2, 5, 0)
    assert_agree(found, results(expected, tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_of_ten_thousand(isa: str, dtype: torch.dtype) -> None:
    """Almost one-hot weights: as exact as rounding scores of that size leaves them."""
    tensors = heads(1, 2, 1, 70, 130, 16, dtype=dtype)
    tensors["q"] = tensors["q"] * 1e4
    found = results(lambda **x: actual(**x, causal=True), tensors)
    assert all(x.isfinite().all() for x in found.values())
    assert found["out 1"].abs().max() > 1e4
    want = results(lambda **x: expected(**x, causal=True), to(torch.float64, tensors))
    size = found["out 1"].abs().max().item()
    for name in ("out", "out 1"):
        assert_close(found[name].double(), want[name], rtol=0, atol=size * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_ten_thousand_in_half_precision(isa: str, dtype: torch.dtype) -> None:
    tensors = heads(1, 2, 1, 70, 130, 16, dtype=dtype)
    tensors["q"] = tensors["q"] * 1e4
    found = results(lambda **x: actual(**x, causal=True), tensors)
    assert found["out"].isfinite().all()
    assert found["out 1"].abs().max() > 1e4


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiny_values(isa: str, dtype: torch.dtype) -> None:
    """Scores that all but vanish: the mean of the values, which are tiny themselves."""
    tiny = 1e-30 if dtype != torch.float16 else 1e-4
    tensors = {name: x * tiny for name, x in heads(1, 2, 2, 20, 70, 16, dtype=dtype).items()}
    out, lse = actual(**tensors)
    mean = tensors["v"].double().mean(2, keepdim=True).expand(1, 2, 20, 16)
    assert_close(out.double() / tiny, mean / tiny, rtol=0, atol=4 * torch.finfo(dtype).eps)
    assert_close(lse.double(), torch.full((1, 2, 20), 70.0).double().log(), rtol=0, atol=1e-5)


def test_agrees_with_torch_in_plain_cases() -> None:
    sdpa = torch.nn.functional.scaled_dot_product_attention
    tensors = heads(2, 4, 4, 70, 70, 16)
    for causal in (False, True):
        found = results(lambda **x: longspan.attention(**x, causal=causal), tensors)  # noqa: B023
        assert_agree(found, results(lambda q, k, v: sdpa(q, k, v, is_causal=causal), tensors))  # noqa: B023
        assert_agree(found, results(lambda **x: plain(**x, causal=causal), tensors))  # noqa: B023
