"""Exact attention against torch's SDPA and compiled FlexAttention: every row of its speed table.

Run as a program, this measures the one row that needs a process of its own, because both sides choose
their instruction set once, from the environment.
"""

import json
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import torch
from _measure import Bench, Row, measure_limits, run_with_environment
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import longspan

Case = tuple[str, Callable[[Bench], Row]]
sdpa = torch.nn.functional.scaled_dot_product_attention

FLOAT, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
NAMES = {FLOAT: "float", BF16: "bf16", FP16: "fp16"}
# Of the greatest value: rounding of the outputs, and of weights in between, in each type.
TOLERANCE = {FLOAT: 1e-4, BF16: 2e-2, FP16: 4e-3}


def cases() -> Iterator[Case]:
    # Work: dtype, B, H, T, D; then what is needed forward and forward + backward (None: not in the
    # table), and the fraction of the machine's multiply-adds that the forward must reach.
    for shape, forward, both, fraction in (
        ((FLOAT, 1, 8, 4096, 64), 2.3, 1.8, None),
        ((FLOAT, 1, 8, 16384, 64), 1.4, 1.25, 0.82),
        ((BF16, 1, 8, 4096, 64), 2.2, 1.8, None),
        ((BF16, 1, 8, 16384, 64), 2.2, 1.6, None),
        ((FLOAT, 1, 8, 4096, 128), 1.3, 1.3, None),
        ((BF16, 1, 8, 4096, 128), 1.3, 1.3, None),
        ((FLOAT, 1, 8, 4096, 256), 1.3, 1.3, None),
        ((BF16, 1, 8, 4096, 256), 1.3, 1.3, None),
        ((FLOAT, 4, 2, 4096, 64), 1.3, 1.3, None),
        ((BF16, 4, 2, 4096, 64), 1.3, 1.3, None),
        ((FLOAT, 1, 1, 32768, 64), None, 2.0, None),
    ):
        if forward is not None:
            yield f"forward, {_label(*shape)}", partial(_causal, shape, False, forward, fraction)
        yield f"forward + backward, {_label(*shape)}", partial(_causal, shape, True, both, None)
    yield "fp16 forward against our float, T=4096", _half_against_float
    yield "window 512 forward, T=16384, float", _window_forward
    yield "window 512 backward alone, T=16384, float", _window_backward
    yield "window 512 a token, T=16384 against 4096", _window_linear
    yield "decode B8 9/3 heads, 16384 keys, float", partial(_decode, FLOAT, 1.8)
    yield "decode B8 9/3 heads, 16384 keys, bf16", partial(_decode, BF16, 12.0)
    yield "forward, both with AVX2 alone, T=4096, float", _avx2
    yield "call, B1 H1 T=16 D64, no_grad", partial(_overhead, False)
    yield "call, B1 H1 T=16 D64, forward + backward", partial(_overhead, True)


def _label(dtype: torch.dtype, b: int, h: int, t: int, d: int) -> str:
    return f"{NAMES[dtype]} B{b} H{h} T={t} D{d}"


def _inputs(dtype: torch.dtype, b: int, h: int, t: int, d: int, grad: bool = False) -> list[Tensor]:
    """q, k, v (B, H, T, D) and a gradient of the output, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(b, h, t, d, generator=generator).to(dtype) for _ in range(4)]
    for x in tensors[:3]:
        x.requires_grad_(grad)
    return tensors


def _forward(function: Callable[..., Tensor], inputs: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return function(*inputs[:3])


def _forward_backward(function: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    out = function(*inputs[:3])
    return out, *torch.autograd.grad(out, inputs[:3], inputs[3])


def _causal(
    shape: tuple[torch.dtype, int, int, int, int],
    backward: bool,
    at_least: float | None,
    fraction: float | None,
    bench: Bench,
) -> Row:
    dtype, b, h, t, d = shape
    run = _forward_backward if backward else _forward
    inputs = _inputs(*shape, grad=backward)
    # Two products forward and five backward, over half of the T x T scores.
    products = 7 if backward else 2
    return bench.compare(
        partial(run, partial(longspan.attention, causal=True), inputs),
        partial(run, partial(sdpa, is_causal=True), inputs),
        tolerance=TOLERANCE[dtype],
        at_least=at_least,
        flops=products * b * h * t * t * d,
        dtype=dtype,
        limit_at_least=fraction,
    )


def _half_against_float(bench: Bench) -> Row:
    half = _inputs(FP16, 1, 8, 4096, 64)
    single = [x.float() for x in half]
    attend = partial(longspan.attention, causal=True)
    return bench.compare(
        partial(_forward, attend, half),
        partial(_forward, attend, single),
        tolerance=TOLERANCE[FP16],
        at_least=1 / 1.15,
        peer_name="our float",
        flops=2 * 8 * 4096 * 4096 * 64,
    )


WINDOW = 512
_windowed = partial(longspan.attention, causal=True, window=(WINDOW - 1, 0))


def _window_flops(t: int) -> float:
    """Two products over each query's window, B1 H8 D64."""
    return 4 * 8 * 64 * (t * WINDOW - WINDOW * (WINDOW - 1) / 2)


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention)


def _window_forward(bench: Bench) -> Row:
    t = 16384
    inputs = _inputs(FLOAT, 1, 8, t, 64)
    mask = create_block_mask(
        lambda b, h, q, k: (q >= k) & (q - k < WINDOW), None, None, t, t, device="cpu"
    )
    return bench.compare(
        partial(_forward, _windowed, inputs),
        partial(_forward, partial(_compiled_flex(), block_mask=mask), inputs),
        tolerance=TOLERANCE[FLOAT],
        at_least=2.0,
        peer_name="compiled FlexAttention",
        flops=_window_flops(t),
    )


def _window_backward(bench: Bench) -> Row:
    """FlexAttention has no CPU backward: ours against our own forward, at most 3.5 of them."""
    inputs = _inputs(FLOAT, 1, 8, 16384, 64, grad=True)
    out = _windowed(*inputs[:3])

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, inputs[:3], inputs[3], retain_graph=True)

    row = Row(peer="our forward", at_least=1 / 3.5, limit="float FMA")
    row.ours_seconds, row.peer_seconds = bench.times(backward, partial(_forward, _windowed, inputs))
    row.value = row.peer_seconds / row.ours_seconds
    row.limit_fraction = 2.5 * _window_flops(16384) / row.ours_seconds / 1e9 / bench.limits.float_gflops
    return row


def _window_linear(bench: Bench) -> Row:
    """Four times the tokens in at most 4 * 1.1 times the time; times are those of 1000 tokens."""
    long, short = _inputs(FLOAT, 1, 8, 16384, 64), _inputs(FLOAT, 1, 8, 4096, 64)
    times = bench.times(partial(_forward, _windowed, long), partial(_forward, _windowed, short))
    row = Row(peer="our T=4096", at_least=1 / 1.1)
    row.ours_seconds, row.peer_seconds = times[0] / 16.384, times[1] / 4.096
    row.value = row.peer_seconds / row.ours_seconds
    return row


def _decode(dtype: torch.dtype, at_least: float, bench: Bench) -> Row:
    batch, heads, kv_heads, keys, d = 8, 9, 3, 16384, 64
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(batch, heads, 1, d, generator=generator).to(dtype)
    k, v = (torch.randn(batch, kv_heads, keys, d, generator=generator).to(dtype) for _ in range(2))
    lengths = torch.full((batch,), keys)
    return bench.compare(
        partial(_forward, lambda *qkv: longspan.attention_decode(*qkv, lengths), [q, k, v]),
        partial(_forward, partial(sdpa, enable_gqa=True), [q, k, v]),
        tolerance=TOLERANCE[dtype],
        at_least=at_least,
        bytes_read=2.0 * k.numel() * k.element_size(),
        limit_at_least=0.85,
    )


def _overhead(backward: bool, bench: Bench) -> Row:
    inputs = _inputs(FLOAT, 1, 1, 16, 64, grad=backward)
    run = _forward_backward if backward else _forward
    return bench.compare(
        partial(run, partial(longspan.attention, causal=True), inputs),
        partial(run, partial(sdpa, is_causal=True), inputs),
        tolerance=TOLERANCE[FLOAT],
        at_least=0.5,
        memory=False,
    )


_AVX2 = {"LONGSPAN_ISA": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


def _avx2(bench: Bench) -> Row:
    argument = json.dumps({"threads": bench.threads, "quick": bench.quick})
    return Row(**run_with_environment(Path(__file__), argument, _AVX2))


def _avx2_process(options: dict[str, int]) -> None:
    """Measure in this process, whose environment is _AVX2, and print the row as JSON."""
    if longspan.isa() != "avx2" or torch.backends.cpu.get_cpu_capability() != "AVX2":
        raise RuntimeError(f"not AVX2: {longspan.isa()}, {torch.backends.cpu.get_cpu_capability()}")
    limits = measure_limits(options["threads"], "x86-64-v3")
    bench = Bench(options["threads"], bool(options["quick"]), limits)
    print(json.dumps(vars(_causal((FLOAT, 1, 8, 4096, 64), False, 1.1, None, bench))))


if __name__ == "__main__":
    _avx2_process(json.loads(sys.argv[1]))
