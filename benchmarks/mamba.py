"""Mamba's selective scan and its decoding step against the paths that a CPU has without them.

The peers: mamba-ssm's reference, a Python loop over time, written out here; and mambapy, whose
parallel scan materialises (B, L, D, N) (``pip install --no-deps mambapy``).
"""

import os
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from _measure import Bench, Row, peak_bytes
from torch import Tensor

import longspan

Case = tuple[str, Callable[[Bench], Row]]
Scan = Callable[..., Tensor]

TOLERANCE = 1e-4  # of the greatest value; float32 both
OPTIONS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


def cases() -> Iterator[Case]:
    for length in (512, 2048):
        needed = 90.0 if length == 2048 else None
        yield f"forward D1536 N16 L{length}", partial(_forward, length, _loop, "torch loop", needed)
    yield "forward D1536 N16 L2048", partial(_forward, 2048, _mambapy, "mambapy", 130.0)
    yield "forward + backward D1536 N16 L2048", partial(_both, 2048)
    yield "forward + backward against our forward, L2048", _backward_share
    yield "forward D1536 N16 L2048, exponentials", partial(_exponentials, False)
    yield "the same with softplus, D and gate", partial(_exponentials, True)
    yield "bytes of inputs and outputs / peak, L16384", _memory
    yield "forward B1 D16 L65536, threads", partial(_few_channels, False)
    yield "forward + backward B1 D16 L65536, threads", partial(_few_channels, True)
    yield "state update B1024 D1536 N16", _update


def inputs(length: int, channels: int = 1536, states: int = 16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "u": normal(1, channels, length),
        "delta": normal(1, channels, length) - 3,
        "A": -torch.arange(1.0, states + 1).repeat(channels, 1),
        "B": normal(1, states, length),
        "C": normal(1, states, length),
        "D": torch.ones(channels),
        "z": normal(1, channels, length),
        "delta_bias": 0.1 * normal(channels),
    }


def _ours(**tensors: Tensor) -> Tensor:
    return longspan.selective_scan(**tensors, delta_softplus=True)


def _steps(delta: Tensor, delta_bias: Tensor) -> Tensor:
    return F.softplus(delta + delta_bias[:, None])


def _loop(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, delta_bias: Tensor
) -> Tensor:
    """Every decay and input at once, (B, D, L, N), then a loop over time."""
    step = _steps(delta, delta_bias)
    decays = torch.exp(torch.einsum("bdl,dn->bdln", step, A))
    added = torch.einsum("bdl,bnl,bdl->bdln", step, B, u)
    h = torch.zeros_like(added[:, :, 0])
    outs = []
    for t in range(u.shape[2]):
        h = decays[:, :, t] * h + added[:, :, t]
        outs.append(torch.einsum("bdn,bn->bd", h, C[:, :, t]))
    return (torch.stack(outs, dim=2) + u * D[:, None]) * F.silu(z)


def _mambapy(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, delta_bias: Tensor
) -> Tensor:
    """mambapy's scan, which is over (B, L, D, N)."""
    from mambapy.pscan import pscan

    step = _steps(delta, delta_bias).transpose(1, 2)
    decays = torch.exp(step[..., None] * A)
    added = (step * u.transpose(1, 2))[..., None] * B.transpose(1, 2)[:, :, None]
    h = pscan(decays, added)
    y = (h @ C.transpose(1, 2)[..., None]).squeeze(-1).transpose(1, 2)
    return (y + u * D[:, None]) * F.silu(z)


def _run(scan: Scan, tensors: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return scan(**tensors)


def _run_both(scan: Scan, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    out = scan(**leaves)
    return out, *torch.autograd.grad(out, list(leaves.values()), tensors["z"])


def _forward(length: int, peer: Scan, name: str, at_least: float | None, bench: Bench) -> Row:
    tensors = inputs(length)
    return bench.compare(
        partial(_run, _ours, tensors),
        partial(_run, peer, tensors),
        tolerance=TOLERANCE,
        at_least=at_least,
        peer_name=name,
    )


def _both(length: int, bench: Bench) -> Row:
    tensors = inputs(length)
    return bench.compare(
        partial(_run_both, _ours, tensors),
        partial(_run_both, _mambapy, tensors),
        tolerance=TOLERANCE,
        at_least=70.0,
        peer_name="mambapy",
    )


def _ratio(
    bench: Bench, ours: Callable[[], object], other: Callable[[], object], **facts: object
) -> Row:
    """For what is measured against ourselves: nothing is there to check."""
    row = Row(**facts)  # type: ignore[arg-type]
    row.ours_seconds, row.peer_seconds = bench.times(ours, other)
    row.value = row.peer_seconds / row.ours_seconds
    return row


def _backward_share(bench: Bench) -> Row:
    tensors = inputs(2048)
    return _ratio(
        bench, partial(_run_both, _ours, tensors), partial(_run, _ours, tensors),
        at_least=1 / 4.5, peer="our forward",
    )  # fmt: skip


@cache
def _exponentials_a_second(threads: int) -> float:
    """Of the kernels' own vector function, from exp_limit.cc, compiled for this machine's registers."""
    source = Path(__file__).with_name("exp_limit.cc")
    wide = longspan.isa().startswith("avx512")
    flags = ["-march=x86-64-v4"] if wide else ["-march=native"]
    width = {"avx2": 32, "generic": 16, "neon": 16}.get(longspan.isa(), 64)
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / f"exp_limit{sysconfig.get_config_var('EXE') or ''}")
        subprocess.run(
            [
                os.environ.get("CXX", "g++"), "-std=gnu++20", "-O3", *flags, "-fopenmp", "-Wno-psabi",
                "-ffp-contract=fast", "-DLONGSPAN_ISA=limit", f"-DLONGSPAN_VECTOR_BYTES={width}",
                f"-I{source.parent.parent / 'csrc'}", str(source), "-o", program,
            ],
            check=True,
        )  # fmt: skip
        out = subprocess.run([program, str(threads)], check=True, capture_output=True, text=True)
    return float(out.stdout)


def _exponentials(options: bool, bench: Bench) -> Row:
    tensors = inputs(2048)
    scan = _ours
    if not options:
        tensors = {name: tensors[name] for name in OPTIONS[:5]}
        tensors["delta"] = F.softplus(tensors["delta"])
        scan = longspan.selective_scan
    row = Row(peer="", limit="vector exp", limit_at_least=None if options else 0.6)
    (row.ours_seconds,) = bench.times(partial(_run, scan, tensors))
    rate = 1536 * 16 * 2048 / row.ours_seconds
    row.limit_fraction = rate / _exponentials_a_second(bench.threads)
    return row


def _memory(bench: Bench) -> Row:
    """Everything that forward and backward allocate, gradients included; at most 1.5 of the inputs'."""
    tensors = inputs(16384)
    size = sum(x.numel() * x.element_size() for x in (*tensors.values(), tensors["u"]))
    row = Row(peer="inputs and outputs", at_least=1 / 1.5, peer_peak_bytes=size)
    row.ours_peak_bytes = peak_bytes(partial(_run_both, _ours, tensors))
    row.value = size / row.ours_peak_bytes
    return row


def _few_channels(backward: bool, bench: Bench) -> Row:
    tensors = inputs(65536, channels=16)

    def run(threads: int) -> None:
        torch.set_num_threads(threads)
        (_run_both if backward else _run)(_ours, tensors)
        torch.set_num_threads(bench.threads)

    return _ratio(bench, partial(run, 2), partial(run, 1), at_least=1.5, peer="ours with 1 thread")


def _update(bench: Bench) -> Row:
    batch, channels, states = 1024, 1536, 16
    generator = torch.Generator().manual_seed(0)
    x, dt = torch.rand(2, batch, channels, generator=generator)
    b, c = torch.rand(2, batch, states, generator=generator)
    a = -torch.arange(1.0, states + 1).repeat(channels, 1)
    start = torch.rand(batch, channels, states, generator=generator)

    def plain(state: Tensor) -> Tensor:
        state.mul_(torch.exp(dt[..., None] * a)).add_((dt * x)[..., None] * b[:, None])
        return (state @ c[..., None]).squeeze(-1)

    mine, theirs = start.clone(), start.clone()
    row = bench.compare(
        lambda: longspan.selective_state_update(mine, x, dt, a, b, c),
        lambda: plain(theirs),
        tolerance=TOLERANCE,
        peer_name="torch",
        memory=False,
    )
    if row.ours_seconds is not None:
        # The limit is measured on the same tensor: reading and writing it in place.
        (scale,) = bench.times(lambda: mine.mul_(1.0))
        row.limit, row.limit_at_least = "in-place read + write", 0.8
        row.limit_fraction = scale / row.ours_seconds
    return row
