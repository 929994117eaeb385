"""Fixtures of every test: poisoned memory, instruction sets, seeds, and settings put back."""

import os
from collections.abc import Iterator

# Before torch loads: threads that spin while they wait starve each other on a shared machine, where
# these many small calls took nine times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import pytest
import torch
from checks import random_seed

from longspan import _C

hypothesis.settings.register_profile("longspan", deadline=None, print_blob=True, max_examples=40)
hypothesis.settings.load_profile("longspan")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--hypothesis-seed") is None:  # one that can be printed
        config.option.hypothesis_seed = str(random_seed())


def pytest_report_header(config: pytest.Config) -> str:
    seed = config.getoption("--hypothesis-seed")
    return f"longspan: {', '.join(_C.isa_levels())}; these examples again: --hypothesis-seed={seed}"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """NaN in every new tensor and all scratch: a read of what nobody wrote shows up in the result."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    _C.scratch_set_poison(True)
    yield
    _C.scratch_set_poison(False)
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(params=_C.isa_levels())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on every instruction set that this machine has."""
    before = _C.isa()
    assert _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """For tests that compile: no graphs of other tests, and none left over."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
