"""The checks themselves: each finds what it is there to find."""

import pytest
import torch
from checks import (
    assert_agree,
    assert_error_ratio,
    assert_same_bits,
    assert_strides_change_nothing,
    assert_threads_change_nothing,
    results,
)
from torch import Tensor

import longspan

TENSORS = {"x": torch.linspace(-1, 1, 24, dtype=torch.float64).view(1, 2, 3, 4)}


def test_new_tensors_are_poisoned() -> None:
    assert torch.empty(10).isnan().all()
    with torch.profiler.profile() as profile:
        longspan.attention(*torch.randn(3, 1, 1, 4, 8))
    assert "aten::fill_" in {event.name for event in profile.events()}, "an operator's outputs are not"


def test_agreement_finds_an_output_and_a_gradient() -> None:
    want = results(lambda x: x.sin(), TENSORS)
    with pytest.raises(AssertionError, match="out: error"):
        assert_agree(results(lambda x: x.sin() + 1e-9, TENSORS), want)
    with pytest.raises(AssertionError, match="d x: error"):
        assert_agree(want | {"d x": want["d x"] + 1e-9}, want)
    with pytest.raises(AssertionError, match="out: error inf"):
        assert_agree(want | {"out": want["out"] * torch.nan}, want)


def test_error_ratio_finds_one_rounding_too_many() -> None:
    def plain(x: Tensor) -> Tensor:
        return x * 3

    def sloppy(x: Tensor) -> Tensor:
        return (x.bfloat16() * 3 + 0.02).to(x.dtype)

    assert_error_ratio(plain, plain, TENSORS, torch.bfloat16)
    with pytest.raises(AssertionError, match="out: error"):
        assert_error_ratio(sloppy, plain, TENSORS, torch.bfloat16)
    with pytest.raises(AssertionError, match="d x: error"):
        assert_error_ratio(
            lambda x: plain(x) + 0 * x.detach() + (x - x.detach()), plain, TENSORS, torch.float16
        )


def test_strides_and_threads_are_found() -> None:
    def reads_memory(x: Tensor) -> Tensor:
        return x * x.stride(-1)

    with pytest.raises(AssertionError, match="channels outside tokens"):
        assert_strides_change_nothing(reads_memory, TENSORS, ["x"])
    with pytest.raises(AssertionError, match="threads"):
        assert_threads_change_nothing(lambda: {"out": torch.tensor(torch.get_num_threads())})
    with pytest.raises(AssertionError, match="out"):
        assert_same_bits({"out": torch.tensor(1.0)}, {"out": torch.tensor(1.0 + 1e-6)})
