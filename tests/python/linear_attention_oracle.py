"""Problems for the tests of linear attention, and the two sides that they compare."""

from typing import Any

import torch
from checks import assert_agree, results, to
from torch import Tensor

import longspan
from longspan.reference import linear_attention as reference

GATES = ("none", "head", "token", "channel")
STATES = ("initial_state", "initial_norm")


def tensors(
    batch: int = 2,
    tokens: int = 70,
    heads: int = 4,
    kv_heads: int = 2,
    channels: int = 8,
    values: int = 5,
    *,
    gate: str = "none",
    states: bool = True,
    sequences: int | None = None,
    keys: int | None = None,
    positive: bool = False,
) -> dict[str, Tensor]:
    """Named tensors in double; ``positive``: q and k as a feature map gives them."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    keys = tokens if keys is None else keys
    made = {
        "q": normal(batch, heads, tokens, channels),
        "k": normal(batch, kv_heads, keys, channels) / channels**0.5,
        "v": normal(batch, kv_heads, keys, values),
    }
    if positive:
        made["q"], made["k"] = made["q"].abs() + 0.1, made["k"].abs() + 0.1
    shapes = {"head": (heads,), "token": (batch, heads, tokens), "channel": made["q"].shape}
    if gate != "none":
        made["gate"] = -torch.rand(shapes[gate], dtype=torch.float64)
    if states:
        sequences = batch if sequences is None else sequences
        made["initial_state"] = normal(sequences, heads, channels, values)
        made["initial_norm"] = normal(sequences, heads, channels).abs()
    return made


def actual(**kw: Any) -> tuple[Tensor, ...]:
    """-> (out, S) or (out, S, z)."""
    normalize = kw.get("normalize", False)
    state, norm = (kw.pop(name, None) for name in STATES)
    kw["initial_state"] = (state, norm) if normalize and state is not None else state
    out, last = longspan.linear_attention(**kw, return_final_state=True)
    return (out, *last) if normalize else (out, last)


def expected(**kw: Any) -> tuple[Tensor, ...]:
    out, state, norm = reference.linear_attention(**kw)
    return (out, state, norm) if kw.get("normalize", False) else (out, state)


def compare(given: dict[str, Tensor], dtype: torch.dtype = torch.float64, **options: Any) -> None:
    """Outputs and every gradient against the recurrence in double."""
    if not options.get("normalize", False):
        given = {name: x for name, x in given.items() if name != "initial_norm"}
    given = to(dtype, given)
    ours = results(lambda **kw: actual(**kw, **options), given)
    theirs = results(lambda **kw: expected(**kw, **options), to(torch.float64, given))
    (batch, _, tokens, channels), values = given["q"].shape, given["v"].shape[3]
    many = max(tokens, given["k"].shape[2]) * max(channels, values)
    of_gate = many * batch if "gate" in given and given["gate"].dim() == 1 else many
    assert_agree(ours, theirs, dict.fromkeys(ours, many) | {"d gate": 4 * of_gate})
