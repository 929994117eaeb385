"""Longformer's and BigBird's layers of transformers, projections and all, before and after accelerate.

Without their projections, these are rows of block_sparse.py, which has the layers.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from _measure import Bench, Row
from block_sparse import HEADS, SIZE, bigbird_layer, longformer_layer
from torch import Tensor, nn

import longspan.hf

Case = tuple[str, Callable[[Bench], Row]]
Make = Callable[[int], tuple[nn.Module, dict[str, Any]]]

TOLERANCE = 1e-4  # of the greatest value; float32 both
PEER = "transformers"


def cases() -> Iterator[Case]:
    for tokens, at_least in ((4096, 3.0), (16384, None)):
        yield f"Longformer layer, T={tokens}", partial(_forward, longformer_layer, tokens, at_least)
        yield f"Longformer layer, training step, T={tokens}", partial(_step, longformer_layer, tokens)
    for tokens in (4096, 16384):
        yield f"BigBird layer, T={tokens}", partial(_forward, bigbird_layer, tokens, None)
    yield "BigBird layer, training step, T=4096", partial(_step, bigbird_layer, 4096)
    yield (
        "BigBird layer as evaluated (hf_compat), T=4096",
        partial(_forward, _evaluated, 4096, None, hf_compat=True),
    )


def _evaluated(tokens: int) -> tuple[nn.Module, dict[str, Any]]:
    layer, options = bigbird_layer(tokens)
    return layer.eval(), options


def _both(
    make: Make, tokens: int, hf_compat: bool = False
) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """Ours, the layer as it is, and what calls say."""
    torch.manual_seed(0)
    layer, options = make(tokens)
    ours = copy.deepcopy(layer)
    longspan.hf.accelerate(ours, hf_compat)
    return ours, layer, options


def _run(layer: nn.Module, options: dict[str, Any], x: Tensor) -> Tensor:
    with torch.no_grad():
        return layer(x, **options)[0]


def _run_step(layer: nn.Module, options: dict[str, Any], x: Tensor, d_out: Tensor) -> list[Tensor]:
    """Output, and the gradients of input and weights; those of keys' biases are rounding around 0."""
    x = x.detach().requires_grad_()
    out = layer(x, **options)[0]
    names = ["x", *(name for name, _ in layer.named_parameters())]
    gradients = torch.autograd.grad(out, [x, *layer.parameters()], d_out)
    kept = (g for n, g in zip(names, gradients) if n not in ("key.bias", "key_global.bias"))
    return [out.detach(), *kept]


def _forward(
    make: Make, tokens: int, at_least: float | None, bench: Bench, hf_compat: bool = False
) -> Row:
    ours, peer, options = _both(make, tokens, hf_compat)
    x = torch.randn(1, tokens, HEADS * SIZE)
    return bench.compare(
        partial(_run, ours, options, x), partial(_run, peer, options, x), tolerance=TOLERANCE,
        at_least=at_least, peer_name=PEER,
    )  # fmt: skip


def _step(make: Make, tokens: int, bench: Bench) -> Row:
    ours, peer, options = _both(make, tokens)
    x, d_out = torch.randn(2, 1, tokens, HEADS * SIZE)
    return bench.compare(
        partial(_run_step, ours, options, x, d_out), partial(_run_step, peer, options, x, d_out),
        tolerance=1e-3, peer_name=PEER,
    )  # fmt: skip
