"""FAVOR+ attention against performer-pytorch, with the same projection.

performer-pytorch's functions are called with its own feature epsilon near 0: its features then differ
from ours by factors that cancel, so the outputs can be compared. It may lie in a folder of its own on
PYTHONPATH (``pip install --no-deps --target FOLDER performer-pytorch local-attention
axial-positional-embedding einops hyper-connections``); without it the rows are ours alone.
"""

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from _measure import Bench, Row
from torch import Tensor

import longspan

Case = tuple[str, Callable[[Bench], Row]]

HEADS, CHANNELS, FEATURES = 8, 64, 256
TOLERANCE = 2e-3  # of the greatest value; float32 both, sums of exponentials over 16384 tokens


def cases() -> Iterator[Case]:
    peer = find_spec("performer_pytorch") is not None
    for tokens in (4096, 16384):
        for causal in (True, False):
            for backward in (False, True):
                work = (
                    f"{'forward + backward' if backward else 'forward'}, T={tokens}, "
                    f"{'causal' if causal else 'not causal'}"
                )
                needed = (60.0 if backward else 40.0) if causal else 2.0
                measure = (
                    partial(_against, tokens, causal, backward, needed)
                    if peer
                    else partial(_alone, tokens, causal, backward)
                )
                yield work, measure
    yield "one step, B64", _step


def inputs(tokens: int) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    tensors = [torch.randn(1, HEADS, tokens, CHANNELS).requires_grad_() for _ in range(3)]
    return tensors, longspan.favor_projection(FEATURES, CHANNELS)


def _run(function: Callable[..., Tensor], tensors: list[Tensor], backward: bool) -> Any:
    if not backward:
        with torch.no_grad():
            return function(*tensors)
    out = function(*tensors)
    return out, *torch.autograd.grad(out, tensors, tensors[2].detach())


def _ours(projection: Tensor, causal: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return longspan.performer_attention(q, k, v, projection, causal=causal, eps=0.0)


def _performer(projection: Tensor, causal: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from performer_pytorch import performer_pytorch as peer

    features = partial(peer.softmax_kernel, projection_matrix=projection, eps=0.0)
    attend = peer.causal_linear_attention_noncuda if causal else peer.linear_attention
    options = {"eps": 1e-30} if causal else {}
    return attend(features(q, is_query=True), features(k, is_query=False), v, **options)


def _against(tokens: int, causal: bool, backward: bool, at_least: float, bench: Bench) -> Row:
    tensors, projection = inputs(tokens)
    return bench.compare(
        partial(_run, partial(_ours, projection, causal), tensors, backward),
        partial(_run, partial(_performer, projection, causal), tensors, backward),
        tolerance=TOLERANCE,
        at_least=at_least,
        peer_name="performer-pytorch",
    )


def _alone(tokens: int, causal: bool, backward: bool, bench: Bench) -> Row:
    tensors, projection = inputs(tokens)
    row = Row(peer="performer-pytorch (not installed)")
    (row.ours_seconds,) = bench.times(
        partial(_run, partial(_ours, projection, causal), tensors, backward)
    )
    return row


def _step(bench: Bench) -> Row:
    """Of the bandwidth of reading and writing the states, which are most of it."""
    q, k, v = torch.randn(3, 64, HEADS, CHANNELS)
    projection = longspan.favor_projection(FEATURES, CHANNELS)
    S = torch.zeros(64, HEADS, FEATURES, CHANNELS)
    state = (S, torch.zeros(64, HEADS, FEATURES), torch.full((64, HEADS), -torch.inf))
    row = Row(peer="in-place read + write of S")
    row.ours_seconds, row.peer_seconds = bench.times(
        lambda: longspan.performer_attention_step(q, k, v, projection, state), lambda: S.mul_(1.0)
    )
    row.value = row.peer_seconds / row.ours_seconds
    return row
