"""What every operator is tested for, whatever it computes.

A test hands over its operator as a function of named tensors; `results` runs it and its backward and
gives back every output and gradient by name, for the comparisons below. The fixtures that poison
memory, choose instruction sets and restore settings are in conftest.py.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

Function = Callable[..., Any]
Tensors = Mapping[str, Tensor]

LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 127, 129, 1000)
HEAD_SIZES = (8, 16, 40, 64, 80, 128, 256)
THREADS = (1, 2, 3, 7)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Greatest error, relative to the greatest expected value, of sums in the operator's own precision.
# Half precisions are judged by `assert_error_ratio` instead.
TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-13}


def lengths_with_head_sizes() -> list[tuple[int, int]]:
    """Every length and every head size at least once, odd ones beside even ones: (length, size)."""
    return [(n, HEAD_SIZES[i % len(HEAD_SIZES)]) for i, n in enumerate(LENGTHS)]


def grid(*shape: int, seed: int = 1) -> Tensor:
    """Normal numbers rounded to what every dtype holds exactly, in double: for cotangents."""
    noise = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (noise.clamp(-3.9, 3.9) * 32).round() / 32


def results(function: Function, tensors: Tensors, *, gradients: bool = True) -> dict[str, Tensor]:
    """Run ``function(**tensors)`` and its backward against fixed cotangents.

    -> outputs as "out", "out 1", ... and gradients of the floating tensors as "d <name>".
    """
    leaves = {
        name: x.detach().clone().requires_grad_() if x.is_floating_point() and gradients else x
        for name, x in tensors.items()
    }
    outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    found = {"out" if i == 0 else f"out {i}": out.detach() for i, out in enumerate(outputs)}
    if gradients:
        cotangents = [grid(*out.shape, seed=i).to(out) for i, out in enumerate(outputs)]
        torch.autograd.backward(outputs, cotangents)
        for name, x in leaves.items():
            if x.requires_grad:
                assert x.grad is not None, f"{name} has no gradient"
                found[f"d {name}"] = x.grad
    return found


def to(dtype: torch.dtype, tensors: Tensors) -> dict[str, Tensor]:
    """The floating tensors in another dtype, the others as they are."""
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in tensors.items()}


def greatest_error(actual: Tensor, expected: Tensor) -> float:
    """Greatest difference; infinite where one is infinite or NaN and the other is not the same."""
    actual, expected = actual.double(), expected.double()
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    error = torch.where(same, 0, actual - expected).abs()
    return float(torch.where(error.isnan(), torch.inf, error).max()) if error.numel() else 0.0


def _scale(expected: Tensor) -> float:
    finite = expected.double().abs()
    finite = finite[finite.isfinite()]
    return float(finite.max()) if finite.numel() else 0.0


def assert_agree(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], terms: Mapping[str, int] | None = None
) -> None:
    """Every tensor of ``expected``, by name, within the tolerance of ``actual``'s dtype.

    The error is relative to the greatest expected value of that tensor, or to 1 where that is
    smaller: sums of terms of size 1 may cancel. ``terms`` names tensors that are sums of many more
    terms than channels (a gradient that was broadcast), and how many; their rounding errors add up
    as a random walk does.
    """
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        got = actual[name]
        assert got.shape == want.shape, f"{name}: {tuple(got.shape)}, expected {tuple(want.shape)}"
        size = max(1.0, _scale(want), (terms or {}).get(name, 0) ** 0.5)
        error, allowed = greatest_error(got, want), TOLERANCE[got.dtype] * size
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def assert_same_bits(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str = ""
) -> None:
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        assert_close(
            actual[name],
            want,
            rtol=0,
            atol=0,
            equal_nan=True,
            msg=lambda m, name=name: f"{name} {what}: {m}",
        )


def assert_error_ratio(
    operator: Function, plain: Function, tensors: Tensors, dtype: torch.dtype, *, ratio: float = 2.0
) -> None:
    """flash-attention's rule: the error in ``dtype`` is at most twice that of plain torch in ``dtype``.

    Both are measured against ``plain`` in double on the same rounded inputs, for every output and
    every gradient. Where plain torch happens to be exact, one rounding of the result to ``dtype``
    and of its terms (of size 1) to float32 is allowed.
    """
    rounded = to(dtype, tensors)
    truth = results(plain, to(torch.float64, rounded))
    theirs = results(plain, rounded)
    ours = results(operator, rounded)
    assert ours.keys() == truth.keys()
    for name, want in truth.items():
        rounding = torch.finfo(ours[name].dtype).eps / 2 * _scale(want)
        floor = max(rounding, 8 * torch.finfo(torch.float32).eps)
        error, allowed = greatest_error(ours[name], want), greatest_error(theirs[name], want)
        assert error <= max(ratio * allowed, floor), (
            f"{name}: error {error:.3g}, {ratio} times plain torch's is {ratio * allowed:.3g}"
        )


def assert_threads_change_nothing(call: Callable[[], Mapping[str, Tensor]]) -> None:
    """``call`` gives the same bits for every thread count."""
    before = torch.get_num_threads()
    try:
        found = []
        for n in THREADS:
            torch.set_num_threads(n)
            found.append(call())
    finally:
        torch.set_num_threads(before)
    for n, other in zip(THREADS[1:], found[1:]):
        assert_same_bits(other, found[0], f"with {n} threads")


def strided_variants(x: Tensor) -> dict[str, Tensor]:
    """The values of ``x`` (..., T, D) in other places of memory."""
    t, d = x.shape[-2:]
    wide = torch.full((*x.shape[:-2], 2 * t, d + 3), torch.nan, dtype=x.dtype)
    wide[..., ::2, 1 : d + 1] = x
    return {
        "tokens outside heads": x.transpose(-3, -2).contiguous().transpose(-3, -2),
        "channels outside tokens": x.transpose(-2, -1).contiguous().transpose(-2, -1),
        "sliced": wide[..., ::2, 1 : d + 1],
        "offset by one": torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    }


def assert_strides_change_nothing(function: Function, tensors: Tensors, names: Sequence[str]) -> None:
    """Outputs and gradients do not depend on how the named tensors lie in memory."""
    dense = {name: x.contiguous() for name, x in tensors.items()}
    expected = results(function, dense)
    for name in names:
        for what in strided_variants(dense[name]):

            def moved(name: str = name, what: str = what, **kw: Tensor) -> Any:
                return function(**(kw | {name: strided_variants(kw[name])[what]}))

            assert_same_bits(results(moved, dense), expected, f"with {name}: {what}")


def assert_raises(kind: type[Exception], parts: Sequence[str], call: Callable[[], Any]) -> None:
    """``call`` raises ``kind`` and its message has each of ``parts``."""
    with pytest.raises(kind) as raised:
        call()
    missing = [part for part in parts if part not in str(raised.value)]
    assert not missing, f"{missing} not in {raised.value}"


def random_seed() -> int:
    """A seed that no fixture has fixed."""
    return random.SystemRandom().randrange(2**32)


def far_apart(heads: int, tokens: int, channels: int) -> Tensor:
    """(1, heads, tokens, channels) of random floats, its heads 2^31 elements apart.

    Only the pages of the memory that are touched exist.
    """
    storage = torch.from_numpy(np.empty((heads - 1) * 2**31 + tokens * channels, dtype=np.float32))
    far = storage.as_strided((1, heads, tokens, channels), (0, 2**31, channels, 1))
    return far.copy_(torch.randn(1, heads, tokens, channels))
