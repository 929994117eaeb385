"""Block-sparse attention against FlexAttention, transformers' Longformer and BigBird, and our own.

Longformer's and BigBird's attention are measured without their projections: copies stand in. Whole
layers are in hf_sparse.py.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
import transformers
from _measure import Bench, Row
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import longspan
from longspan import patterns
from longspan.patterns import BlockMask

Case = tuple[str, Callable[[Bench], Row]]

HEADS, SIZE, WINDOW, BLOCK = 8, 64, 512, 64
FLOAT, BF16 = torch.float32, torch.bfloat16
NAMES = {FLOAT: "float", BF16: "bf16"}
TOLERANCE = {FLOAT: 1e-4, BF16: 2e-2}  # of the greatest value


def cases() -> Iterator[Case]:
    for dtype in (FLOAT, BF16):
        yield f"window 512 causal, T=16384, {NAMES[dtype]}", partial(_window, dtype, False)
        yield f"its backward alone, {NAMES[dtype]}", partial(_window, dtype, True)
    yield "window 512 causal, T=16384, against Flex", _window_against_flex
    yield "window 512 causal, backward alone", _backward_against_forward
    for tokens, forward, both in ((4096, 10.0, 15.0), (16384, 15.0, 15.0)):
        yield f"Longformer 512, 1 global, T={tokens}", partial(_longformer, tokens, False, forward)
        yield f"Longformer, forward + backward, T={tokens}", partial(_longformer, tokens, True, both)
    for tokens, forward in ((4096, 8.0), (16384, 40.0)):
        yield f"BigBird 64, 3 random, T={tokens}", partial(_bigbird, tokens, False, forward)
        yield f"BigBird, forward + backward, T={tokens}", partial(_bigbird, tokens, True, None)
    for dtype in (FLOAT, BF16):
        for n in (4, 8, 16):
            yield f"density 1/{n}, T=16384, {NAMES[dtype]}", partial(_density, dtype, n)
    yield (
        "a Longformer mask of 65536 tokens",
        partial(_build, partial(patterns.longformer, 65536, window=WINDOW, global_tokens=[0])),
    )
    yield "a BigBird mask of 65536 tokens", partial(_build, partial(patterns.bigbird, 65536))


def _inputs(dtype: torch.dtype, tokens: int, grad: bool = False) -> list[Tensor]:
    """q, k, v and a gradient of the output, B1 H8 D64."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, HEADS, tokens, SIZE, generator=generator).to(dtype) for _ in range(4)]
    for x in tensors[:3]:
        x.requires_grad_(grad)
    return tensors


def _flops(mask: BlockMask, products: int = 2) -> float:
    """Multiply-adds, twice, inside the visited blocks."""
    tokens, keys = mask.shape
    return 2.0 * products * HEADS * SIZE * tokens * keys * mask.density


def _forward(function: Callable[..., Tensor], inputs: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return function(*inputs[:3])


def _backward_of(function: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], Any]:
    out = function(*inputs[:3])
    return lambda: torch.autograd.grad(out, inputs[:3], inputs[3], retain_graph=True)


_windowed = partial(longspan.attention, causal=True, window=(WINDOW - 1, 0))


def _masked(mask: BlockMask) -> Callable[..., Tensor]:
    return partial(longspan.block_sparse_attention, block_mask=mask)


@cache
def _window_mask() -> BlockMask:
    return patterns.sliding_window(16384, window=(WINDOW - 1, 0))


def _window(dtype: torch.dtype, backward: bool, bench: Bench) -> Row:
    """By blocks at most 10 % slower than the kernel that knows it is a window."""
    inputs = _inputs(dtype, 16384, grad=backward)
    run = _backward_of if backward else (lambda f, x: partial(_forward, f, x))
    return bench.compare(
        run(_masked(_window_mask()), inputs),
        run(_windowed, inputs),
        tolerance=TOLERANCE[dtype],
        at_least=1 / 1.1,
        peer_name="our attention(window=)",
        flops=_flops(_window_mask(), 5 if backward else 2),
        dtype=dtype,
        limit_at_least=0.65 if dtype == FLOAT and not backward else None,
    )


def _window_against_flex(bench: Bench) -> Row:
    inputs = _inputs(FLOAT, 16384)
    mask = create_block_mask(
        lambda b, h, q, k: (q >= k) & (q - k < WINDOW), None, None, 16384, 16384, device="cpu"
    )
    return bench.compare(
        partial(_forward, _masked(_window_mask()), inputs),
        partial(_forward, partial(torch.compile(flex_attention), block_mask=mask), inputs),
        tolerance=TOLERANCE[FLOAT],
        at_least=1.8,
        peer_name="compiled FlexAttention",
        flops=_flops(_window_mask()),
    )


def _backward_against_forward(bench: Bench) -> Row:
    """FlexAttention has no CPU backward: ours against our own forward, at most 3.5 of them."""
    inputs = _inputs(FLOAT, 16384, grad=True)
    function = _masked(_window_mask())
    row = Row(peer="our forward", at_least=1 / 3.5)
    row.ours_seconds, row.peer_seconds = bench.times(
        _backward_of(function, inputs), partial(_forward, function, inputs)
    )
    row.value = row.peer_seconds / row.ours_seconds
    return row


def _heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, SIZE)).transpose(1, 2)


def _self_attention(mask: BlockMask, backward: bool) -> Callable[[Tensor, Tensor], Any]:
    """Of x (1, T, H * D) with itself, in place of q, k and v."""

    def forward(x: Tensor) -> Tensor:
        h = _heads(x)
        return longspan.block_sparse_attention(h, h, h, mask).transpose(1, 2).flatten(2)

    return _step(forward, backward)


def _step(forward: Callable[[Tensor], Tensor], backward: bool) -> Callable[[Tensor, Tensor], Any]:
    def run(x: Tensor, d_out: Tensor) -> Any:
        if not backward:
            with torch.no_grad():
                return forward(x)
        out = forward(x)
        return out, torch.autograd.grad(out, x, d_out)[0]

    return run


class _Copy(nn.Module):
    """In place of a projection, for Longformer scales its queries in place."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clone()


def _without_projections(layer: nn.Module) -> nn.Module:
    for name, child in list(layer.named_children()):
        if isinstance(child, nn.Linear):
            setattr(layer, name, _Copy())
    return layer


def _against_layer(
    ours: BlockMask,
    layer: Callable[[Tensor], Tensor],
    backward: bool,
    at_least: float | None,
    bench: Bench,
) -> Row:
    x, d_out = torch.randn(2, 1, ours.shape[0], HEADS * SIZE, generator=torch.Generator().manual_seed(0))
    x.requires_grad_(backward)
    return bench.compare(
        partial(_self_attention(ours, backward), x, d_out),
        partial(_step(layer, backward), x, d_out),
        tolerance=TOLERANCE[FLOAT],
        at_least=at_least,
        peer_name="transformers",
    )


def longformer_layer(tokens: int) -> tuple[nn.Module, dict[str, Any]]:
    """transformers' layer with a window of 512, and what its calls say: token 0 is global."""
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    config = transformers.LongformerConfig(
        hidden_size=HEADS * SIZE, num_attention_heads=HEADS, attention_window=[WINDOW],
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    where = torch.zeros(1, tokens, dtype=torch.bool)
    where[:, 0] = True
    return LongformerSelfAttention(config, 0), {
        "attention_mask": where.float() * 10000,
        "is_index_masked": torch.zeros_like(where),
        "is_index_global_attn": where,
        "is_global_attn": True,
    }


def bigbird_layer(tokens: int) -> tuple[nn.Module, dict[str, Any]]:
    """transformers' layer with blocks of 64 and 3 random ones, which it draws in training mode."""
    from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention

    config = transformers.BigBirdConfig(
        hidden_size=HEADS * SIZE, num_attention_heads=HEADS, block_size=BLOCK, num_random_blocks=3,
        max_position_embeddings=tokens,
    )  # fmt: skip
    blocks = tokens // BLOCK
    ones = torch.ones(1, tokens)
    by_block = ones.view(1, blocks, BLOCK)
    return BigBirdBlockSparseAttention(config, seed=0).train(), {
        "band_mask": torch.ones(1, 1, blocks - 4, BLOCK, 3 * BLOCK),
        "from_mask": ones[:, None, :, None],
        "to_mask": ones[:, None, None],
        "from_blocked_mask": by_block,
        "to_blocked_mask": by_block,
    }


def _longformer(tokens: int, backward: bool, at_least: float, bench: Bench) -> Row:
    layer, options = longformer_layer(tokens)
    layer = _without_projections(layer)
    mask = patterns.longformer(tokens, window=WINDOW, global_tokens=[0])
    return _against_layer(mask, lambda x: layer(x, **options)[0], backward, at_least, bench)


def _bigbird(tokens: int, backward: bool, at_least: float | None, bench: Bench) -> Row:
    """With random blocks read from transformers'."""
    layer, options = bigbird_layer(tokens)
    layer = _without_projections(layer)
    drawn: list[Any] = []
    for name in ("_bigbird_block_rand_mask", "_bigbird_block_rand_mask_with_head"):
        setattr(layer, name, partial(_recorded, drawn, getattr(layer, name)))

    def attend(x: Tensor) -> Tensor:
        drawn.clear()
        return layer(x, **options)[0]

    with torch.no_grad():
        attend(torch.zeros(1, tokens, HEADS * SIZE))
    blocks = tokens // BLOCK
    chosen = torch.zeros(HEADS, blocks, 3, dtype=torch.int64)
    for head, rows in enumerate(drawn if len(drawn) == HEADS else drawn[0]):
        chosen[head, 1:-1] = torch.as_tensor(rows[: blocks - 2]).long()
    mask = patterns.bigbird(tokens, block_size=BLOCK, heads=HEADS, random_blocks=chosen)
    return _against_layer(mask, attend, backward, at_least, bench)


def _recorded(drawn: list[Any], draw: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    drawn.append(draw(*args, **kwargs))
    return drawn[-1]


def _density(dtype: torch.dtype, n: int, bench: Bench) -> Row:
    """Whole blocks in one n-th of the places against full attention: 0.8 n times as fast."""
    blocks = 16384 // 64
    layout = (torch.arange(blocks)[:, None] * 7 + torch.arange(blocks)) % n == 0
    mask = BlockMask.from_layout(layout, 64, 16384, 16384)
    inputs = _inputs(dtype, 16384)
    row = Row(peer="our full attention", at_least=0.8 * n)
    row.ours_seconds, row.peer_seconds = bench.times(
        partial(_forward, _masked(mask), inputs), partial(_forward, longspan.attention, inputs)
    )
    row.value = row.peer_seconds / row.ours_seconds
    row.limit = "bf16 dot" if dtype == BF16 and bench.limits.bf16_gflops else "float FMA"
    row.limit_fraction = _flops(mask) / row.ours_seconds / 1e9 / bench.limits.gflops(dtype)
    row.limit_at_least = 0.65 if dtype == FLOAT else None
    return row


def _build(make: Callable[[], BlockMask], bench: Bench) -> Row:
    """Under 50 ms."""
    row = Row(peer="50 ms", at_least=1.0, peer_seconds=0.05)
    (row.ours_seconds,) = bench.times(make)
    row.value = 0.05 / row.ours_seconds
    return row
