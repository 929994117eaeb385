"""One layer of transformers as it is and after `longspan.hf.accelerate`, with the same weights.

Its training step at L=2048 is a Python loop of minutes (277 s on the machine of the README) and is run
only once; ``--only`` with another row's name leaves it out.
"""

import copy
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import transformers
from _measure import Bench, Row, check_same
from torch import Tensor, nn

import longspan.hf
from longspan.cli._memory import PeakMemory

Case = tuple[str, Callable[[Bench], Row]]

WIDTH = 768
TOLERANCE = 1e-4  # of the greatest value; float32 both
PEER = "transformers"


def cases() -> Iterator[Case]:
    yield "Mamba layer, forward L2048", partial(_forward, _mamba, 2048, 4.5)
    yield "the same without what is in nn.Linear", partial(_besides_linear, _mamba, 2048, 12.0)
    yield "Mamba layer, training step L512", partial(_step_once, _mamba, 512, None)
    yield "Mamba layer, training step L2048", partial(_step_once, _mamba, 2048, 500.0)
    yield "Mamba-2 layer, forward L4096", partial(_forward, _mamba2, 4096, 3.5)
    yield "Mamba-2 layer, training step L4096", partial(_step, _mamba2, 4096)
    yield "Mamba layer, one token of 8 sequences", partial(_decode, _mamba)
    yield "Mamba-2 layer, one token of 8 sequences", partial(_decode, _mamba2)


def _mamba() -> nn.Module:
    from transformers.models.mamba.modeling_mamba import MambaMixer

    return MambaMixer(transformers.MambaConfig(hidden_size=WIDTH, num_hidden_layers=1), layer_idx=0)


def _mamba2() -> nn.Module:
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = transformers.Mamba2Config(
        hidden_size=WIDTH, num_heads=24, head_dim=64, state_size=128, n_groups=1, num_hidden_layers=1
    )
    return Mamba2Mixer(config, layer_idx=0)


def _both(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """Ours and the layer as it is."""
    torch.manual_seed(0)
    layer = make()
    ours = copy.deepcopy(layer)
    longspan.hf.accelerate(ours)
    return ours, layer


def _run(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return layer(x)


def _run_step(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, and the gradients of input and weights."""
    x = x.detach().requires_grad_()
    out = layer(x)
    return [out.detach(), *torch.autograd.grad(out, [x, *layer.parameters()], torch.ones_like(out))]


def _forward(make: Callable[[], nn.Module], length: int, at_least: float, bench: Bench) -> Row:
    ours, peer = _both(make)
    x = torch.randn(1, length, WIDTH)
    return bench.compare(
        partial(_run, ours, x), partial(_run, peer, x), tolerance=TOLERANCE, at_least=at_least,
        peer_name=PEER,
    )  # fmt: skip


def _step(make: Callable[[], nn.Module], length: int, bench: Bench) -> Row:
    ours, peer = _both(make)
    x = torch.randn(1, length, WIDTH)
    return bench.compare(
        partial(_run_step, ours, x), partial(_run_step, peer, x), tolerance=1e-3, peer_name=PEER
    )


def _linears(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    """A call of the layer's nn.Linears alone, on the inputs that a forward gives them."""
    calls: list[tuple[nn.Module, Tensor]] = []

    def record(linear: nn.Module, inputs: tuple[Any, ...]) -> None:
        calls.append((linear, inputs[0]))

    found = [part for part in layer.modules() if isinstance(part, nn.Linear)]
    hooks = [linear.register_forward_pre_hook(record) for linear in found]
    _run(layer, x)
    for hook in hooks:
        hook.remove()

    def run() -> None:
        for linear, given in calls:
            _run(linear, given)

    return run


def _besides_linear(make: Callable[[], nn.Module], length: int, at_least: float, bench: Bench) -> Row:
    ours, peer = _both(make)
    x = torch.randn(1, length, WIDTH)
    row = Row(at_least=at_least, peer=PEER)
    check_same(_run(ours, x), _run(peer, x), TOLERANCE)
    seconds = bench.times(
        partial(_run, ours, x), _linears(ours, x), partial(_run, peer, x), _linears(peer, x)
    )
    row.ours_seconds, row.peer_seconds = seconds[0] - seconds[1], seconds[2] - seconds[3]
    row.value = row.peer_seconds / row.ours_seconds
    return row


def _step_once(make: Callable[[], nn.Module], length: int, at_least: float | None, bench: Bench) -> Row:
    """The peer's step is run only once: checked, measured and its memory taken in that one run."""
    ours, peer = _both(make)
    x = torch.randn(1, length, WIDTH)
    row = Row(at_least=at_least, peer=PEER)
    with PeakMemory() as memory:
        start = time.perf_counter()
        theirs = _run_step(peer, x)
        row.peer_seconds = time.perf_counter() - start
    row.peer_peak_bytes = memory.bytes
    with PeakMemory() as memory:
        mine = _run_step(ours, x)
    row.ours_peak_bytes = memory.bytes
    check_same(mine, theirs, 1e-3)
    (row.ours_seconds,) = bench.times(partial(_run_step, ours, x))
    row.value = row.peer_seconds / row.ours_seconds
    return row


def _decode(make: Callable[[], nn.Module], bench: Bench) -> Row:
    """A step with a cache, after a prompt; both caches go on from step to step."""
    layers = _both(make)
    config = transformers.MambaConfig(num_hidden_layers=1)  # a cache with one such layer
    caches = [transformers.DynamicCache(config=config) for _ in layers]
    prompt, token = torch.randn(8, 16, WIDTH), torch.randn(8, 1, WIDTH)
    with torch.no_grad():
        for layer, cache in zip(layers, caches):
            layer(prompt, cache=cache)

        def step(i: int) -> Tensor:
            with torch.no_grad():
                return layers[i](token, cache=caches[i])

        return bench.compare(
            partial(step, 0), partial(step, 1), tolerance=TOLERANCE, peer_name=PEER, memory=False
        )
