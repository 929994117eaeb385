"""Problems for the tests of the delta rule, and the two sides that they compare."""

from typing import Any

import torch
from checks import assert_agree, results, to
from torch import Tensor
from torch.nn.functional import normalize

import longspan
from longspan.reference import delta_rule as reference


def tensors(
    batch: int = 2,
    tokens: int = 70,
    heads: int = 2,
    value_heads: int = 4,
    channels: int = 8,
    values: int = 5,
    *,
    gate: bool = True,
    states: bool = True,
    sequences: int | None = None,
) -> dict[str, Tensor]:
    """Named tensors in double: keys of norm 1, beta from 0 to 2, both ends included."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    beta = 2 * torch.rand(batch, value_heads, tokens, dtype=torch.float64)
    beta[..., 3::7], beta[..., 4::7], beta[..., 5::7] = 0, 1, 2
    made = {
        "q": normal(batch, heads, tokens, channels),
        "k": normalize(normal(batch, heads, tokens, channels), dim=-1),
        "v": normal(batch, value_heads, tokens, values),
        "beta": beta,
    }
    if gate:
        made["gate"] = -torch.rand(batch, value_heads, tokens, dtype=torch.float64)
    if states:
        sequences = batch if sequences is None else sequences
        made["initial_state"] = normal(sequences, value_heads, channels, values)
    return made


def actual(**kw: Any) -> tuple[Tensor, Tensor]:
    return longspan.delta_rule(**kw, return_final_state=True)


def expected(**kw: Any) -> tuple[Tensor, Tensor]:
    return reference.delta_rule(**kw)


def compare(given: dict[str, Tensor], dtype: torch.dtype = torch.float64, **options: Any) -> None:
    """Outputs and every gradient against the recurrence in double."""
    given = to(dtype, given)
    ours = results(lambda **kw: actual(**kw, **options), given)
    theirs = results(lambda **kw: expected(**kw, **options), to(torch.float64, given))
    # Gradients of beta and the gate are sums over channels; the gate's also over the tokens behind it.
    tokens, most = given["q"].shape[2], max(given["q"].shape[3], given["v"].shape[3])
    assert_agree(ours, theirs, {"d beta": most, "d gate": tokens * most})
