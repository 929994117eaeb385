"""The forward of transformers' BigBird block-sparse self-attention on longspan's kernels.

transformers draws random blocks in training and none in evaluation, where every random slot is block
0 once more: a softmax over a multiset, in which block 0 counts 1 + num_random_blocks times. longspan
sees a set, of the blocks of training, always; ``hf_compat`` gives back the multiset. That is the set
and, for each number m of times that blocks are named, attention to those blocks with log(m - 1) added to
its log-sum-exp, which is their weight m - 1 times; `merge_attention` joins the parts.
"""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor
from transformers.utils import output_capturing

from longspan.nn._sparse import cached_mask, merge_heads, split_heads, without_padding
from longspan.ops.attention import merge_attention
from longspan.ops.block_sparse import block_sparse_attention
from longspan.patterns import BlockMask, bigbird
from longspan.patterns.builders import of_blocks


class _Plan(NamedTuple):
    """What a layer's random blocks hang on."""

    kind: Any  # its class
    tokens: int
    block: int  # tokens
    each: int  # random blocks a row
    heads: int
    longest: int  # tokens
    seed: int

    @property
    def blocks(self) -> int:
        return self.tokens // self.block


def bigbird_forward(
    layer: Any,
    hidden_states: Tensor,
    band_mask: Tensor | None = None,
    from_mask: Tensor | None = None,
    to_mask: Tensor | None = None,
    from_blocked_mask: Tensor | None = None,
    to_blocked_mask: Tensor | None = None,
    *,
    hf_compat: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """BigBirdBlockSparseAttention and BigBirdPegasusBlockSparseAttention.

    ``to_mask`` (B, 1, 1, T) is 0 for padding. Where a caller wants the weights, the layer's own forward
    runs.
    """
    if kwargs.get("output_attentions") or _captures_weights():
        return type(layer).forward(
            layer, hidden_states, band_mask, from_mask, to_mask, from_blocked_mask, to_blocked_mask,
            **kwargs,
        )  # fmt: skip
    tokens, block, heads = hidden_states.shape[1], layer.block_size, layer.num_attention_heads
    if tokens % block:
        raise ValueError(
            f"BigBird: hidden_states: expected a multiple of {block} tokens, a block, got {tokens}"
        )
    key_mask = None if to_mask is None else to_mask.reshape(-1, tokens) != 0
    if key_mask is not None and bool(key_mask.all()):
        key_mask = None
    x = without_padding(hidden_states, key_mask)
    q, k, v = (split_heads(p(x), heads) for p in (layer.query, layer.key, layer.value))
    plan = _Plan(
        type(layer), tokens, block, layer.num_random_blocks, heads, layer.max_seqlen, layer.seed or 0,
    )  # fmt: skip
    if not hf_compat:
        ((mask, _),) = _masks(plan, True, False, key_mask)
        out = block_sparse_attention(q, k, v, mask)
    else:
        outs, lses = [], []
        for mask, weight in _masks(plan, layer.training, True, key_mask):
            part, lse = block_sparse_attention(q, k, v, mask, return_lse=True)
            outs.append(part)
            lses.append(lse + weight)
        out, _ = merge_attention(outs, lses)
    return without_padding(merge_heads(out), key_mask), None


@torch.compiler.disable  # made of values and by numpy: not for dynamo to look into
def _masks(
    plan: _Plan, random: bool, multiset: bool, key_mask: Tensor | None
) -> list[tuple[BlockMask, float]]:
    """The set and, for the multiset, what it names repeatedly, with the logarithm of its weight."""
    masks = [(cached_mask(_set, plan, random, key_mask=key_mask), 0.0)]
    for n in _counts(plan, random) if multiset else ():
        masks.append((cached_mask(_named, plan, random, n, key_mask=key_mask), math.log(n - 1)))
    return masks


def _captures_weights() -> bool:
    """Whether a model's forward, now running, records its layers' weights (by hooks)."""
    collected = output_capturing._active_collector.get()
    return collected is not None and "attentions" in collected


@lru_cache(64)
def _random_blocks(plan: _Plan) -> Tensor:
    """Random blocks (heads, blocks - 2, n) of all but the first and last, as the layer trains with them.

    By its own methods; numpy's generator, which it seeds at each forward, is put back.
    """
    layer: Any = torch.nn.Module.__new__(plan.kind)
    torch.nn.Module.__init__(layer)  # in training mode
    block, count = plan.block, plan.each
    before = numpy.random.get_state()
    numpy.random.seed(plan.seed)
    try:
        if plan.tokens in (1024, 3072, 4096):
            rows = [
                layer._bigbird_block_rand_mask(
                    plan.longest, plan.longest, block, block, count, last_idx=1024
                )
                for _ in range(plan.heads)
            ]
        else:
            lengths, counts = layer._get_rand_attn_plan(plan.tokens, block, count)
            rows = layer._bigbird_block_rand_mask_with_head(
                plan.tokens, plan.tokens, block, block, plan.heads, lengths, counts
            )
    finally:
        numpy.random.set_state(before)
    return torch.from_numpy(numpy.stack(rows)[:, : plan.blocks - 2]).long()


def _set(plan: _Plan, random: bool) -> BlockMask:
    """Every block that is named, once; with the random blocks of training, or without any."""
    if not random:
        return bigbird(plan.tokens, block_size=plan.block, num_random_blocks=0)
    drawn = _random_blocks(plan)
    ends = torch.zeros(plan.heads, 1, drawn.shape[2], dtype=torch.int64)  # global: they see all anyway
    blocks = torch.cat([ends, drawn, ends], 1)
    return bigbird(plan.tokens, block_size=plan.block, heads=plan.heads, random_blocks=blocks)


def _repeated(plan: _Plan, training: bool) -> tuple[Tensor, Tensor]:
    """Blocks that a multiset names more than once, by (head, row, column) as one number; how often."""
    n = plan.blocks
    drawn = _random_blocks(plan) if training else torch.zeros(1, n - 2, plan.each, dtype=torch.int64)
    rows = torch.arange(1, n - 1).view(-1, 1)
    near = rows + torch.tensor([-1, 0, 1])
    # Rows 1 and n - 2 have a global block among their neighbours, once.
    ends = torch.tensor([0, n - 1]).expand(n - 2, 2)
    ends = ends.masked_fill((ends == near[:, :1]) | (ends == near[:, 2:]), -1)
    fixed = torch.cat([near, ends], 1).expand(len(drawn), -1, -1)
    seen = torch.cat([fixed, drawn], 2)
    which = torch.arange(len(drawn)).view(-1, 1, 1)
    numbers = ((which * n + rows) * n + seen)[seen >= 0]
    number, times = torch.unique(numbers, return_counts=True)
    return number[times > 1], times[times > 1]


@lru_cache(64)
def _counts(plan: _Plan, training: bool) -> list[int]:
    return sorted(set(_repeated(plan, training)[1].tolist()))


def _named(plan: _Plan, training: bool, count: int) -> BlockMask:
    """The blocks that are named ``count`` times."""
    number, times = _repeated(plan, training)
    chosen, n = number[times == count], plan.blocks
    heads = plan.heads if training else 1
    return of_blocks(plan.tokens, plan.block, heads, chosen // n**2, chosen // n % n, chosen % n)
