"""Self-attention of Longformer, BigBird and the Sparse Transformer, over block masks."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from longspan.nn._sparse import (
    SelfAttention,
    cached_mask,
    longformer_attention,
    longformer_mask,
    without_padding,
)
from longspan.ops._checks import check_positive
from longspan.patterns import BlockMask, bigbird, sparse_transformer


class LongformerSelfAttention(SelfAttention):
    """Longformer's attention: a window for each token, and global tokens with projections of their own.

    A token sees its window and the global tokens, in one softmax; a global token sees everything,
    through query_global, key_global and value_global (Beltagy, Peters and Cohan 2020, section 3.1).
    Parameters are named as in transformers' ``LongformerSelfAttention``, so its state_dict loads; like
    it, this has no output projection. Lengths need not be multiples of the window.

    Args:
        hidden_size: Channels of x.
        num_heads: H.
        attention_window: Total width, even: half of it on either side.
        dilation: Distance between the keys of a window.
        causal: Leave out what looks ahead, for the global tokens too.
        device, dtype: Of the parameters.

    Raises:
        ValueError: Sizes do not fit.

    Example::

        layer = longspan.nn.LongformerSelfAttention(768, 12, attention_window=512)
        is_global = torch.zeros(1, 4096, dtype=torch.bool)
        is_global[:, 0] = True
        layer(torch.randn(1, 4096, 768), global_mask=is_global).sum().backward()
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        attention_window: int = 512,
        dilation: int = 1,
        causal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the projections."""
        super().__init__(hidden_size, num_heads)
        if attention_window < 0 or attention_window % 2:
            raise ValueError(
                "LongformerSelfAttention: attention_window: expected an even number of 0 or more, "
                f"got {attention_window}"
            )
        check_positive("LongformerSelfAttention", "dilation", dilation)
        self.attention_window, self.dilation, self.causal = attention_window, dilation, causal
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.query = nn.Linear(hidden_size, hidden_size, **kind)
        self.key = nn.Linear(hidden_size, hidden_size, **kind)
        self.value = nn.Linear(hidden_size, hidden_size, **kind)
        self.query_global = nn.Linear(hidden_size, hidden_size, **kind)
        self.key_global = nn.Linear(hidden_size, hidden_size, **kind)
        self.value_global = nn.Linear(hidden_size, hidden_size, **kind)

    def forward(
        self, x: Tensor, *, global_mask: Tensor | None = None, key_mask: Tensor | None = None
    ) -> Tensor:
        """Attend within x.

        Args:
            x: (B, T, hidden_size).
            global_mask: (B, T) bool, True for global tokens; None is none.
            key_mask: (B, T) bool, False for padding, which is not seen, and whose output is 0.

        Returns:
            (B, T, hidden_size).

        Raises:
            TypeError, ValueError: A dtype or shape does not fit.
        """
        x = self._check(x, key_mask)
        if global_mask is not None:
            self._check_bool("global_mask", global_mask, x)
        options = (self.dilation, self.causal)
        mask = longformer_mask(x.shape[1], self.attention_window, global_mask, key_mask, *options)
        return longformer_attention(
            self,
            x,
            self.num_heads,
            mask,
            is_global=global_mask,
            key_mask=key_mask,
            causal=self.causal,
        )

    def extra_repr(self) -> str:
        """The options that are not modules."""
        return (
            f"num_heads={self.num_heads}, attention_window={self.attention_window}, "
            f"dilation={self.dilation}, causal={self.causal}"
        )


class BigBirdSelfAttention(SelfAttention):
    """BigBird's attention: neighbouring, random and global blocks (Zaheer et al. 2020).

    Parameters are named as in transformers' ``BigBirdBlockSparseAttention``, so its state_dict loads;
    like it, this has no output projection. The random blocks follow from ``seed`` and the length, in
    training and evaluation alike, and a block counts once however often it is chosen
    (`longspan.patterns.bigbird`). Lengths need not be multiples of the block.

    Args:
        hidden_size: Channels of x.
        num_heads: H; each draws random blocks of its own.
        block_size: Tokens in a block.
        num_random_blocks: Random blocks that each block sees.
        seed: Of the random blocks: give each layer another one.
        bias: Biases in the projections.
        device, dtype: Of the parameters.

    Raises:
        ValueError: Sizes do not fit.

    Example::

        layer = longspan.nn.BigBirdSelfAttention(768, 12, seed=layer_index)
        layer(torch.randn(1, 4096, 768)).sum().backward()
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        block_size: int = 64,
        num_random_blocks: int = 3,
        seed: int = 0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the projections."""
        super().__init__(hidden_size, num_heads)
        check_positive("BigBirdSelfAttention", "block_size", block_size)
        if num_random_blocks < 0:
            raise ValueError(
                f"BigBirdSelfAttention: num_random_blocks: expected 0 or more, got {num_random_blocks}"
            )
        self.block_size, self.num_random_blocks, self.seed = block_size, num_random_blocks, seed
        kind: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.query = nn.Linear(hidden_size, hidden_size, **kind)
        self.key = nn.Linear(hidden_size, hidden_size, **kind)
        self.value = nn.Linear(hidden_size, hidden_size, **kind)

    def forward(self, x: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        """Attend within x (B, T, hidden_size); ``key_mask`` (B, T) bool is False for padding.

        Returns:
            (B, T, hidden_size), 0 for padding.

        Raises:
            TypeError, ValueError: A dtype or shape does not fit.
        """
        x = self._check(x, key_mask)
        mask = cached_mask(
            _bigbird, x.shape[1], self.block_size, self.num_random_blocks, self.num_heads, self.seed,
            key_mask=key_mask,
        )  # fmt: skip
        return self._attend(self.query(x), self.key(x), self.value(x), mask, key_mask)

    def extra_repr(self) -> str:
        """The options that are not modules."""
        return (
            f"num_heads={self.num_heads}, block_size={self.block_size}, "
            f"num_random_blocks={self.num_random_blocks}, seed={self.seed}"
        )


class SparseTransformerAttention(SelfAttention):
    """The Sparse Transformer's attention, causal: strided or fixed factors (Child et al. 2019).

    ``y = o_proj(attention(q_proj(x), k_proj(x), v_proj(x)))`` over
    `longspan.patterns.sparse_transformer`'s mask.

    Args:
        hidden_size: Channels of x.
        num_heads: H.
        stride: Of the pattern, about the square root of the length.
        mode: "strided" or "fixed".
        summary: Tokens at the end of each chunk, of mode "fixed".
        heads: Which set each head has, H names; None merges both sets in every head.
        bias: Biases in the projections.
        device, dtype: Of the parameters.

    Raises:
        ValueError: Sizes or names do not fit.

    Example::

        layer = longspan.nn.SparseTransformerAttention(512, 8, stride=64)
        layer(torch.randn(1, 4096, 512)).sum().backward()
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        stride: int,
        mode: str = "strided",
        summary: int = 8,
        heads: Sequence[str] | None = None,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the projections."""
        super().__init__(hidden_size, num_heads)
        if heads is not None and len(heads) != num_heads:
            raise ValueError(
                f"SparseTransformerAttention: heads: expected {num_heads} names, got {len(heads)}"
            )
        self._pattern: dict[str, Any] = {
            "stride": stride,
            "mode": mode,
            "summary": summary,
            "heads": None if heads is None else tuple(heads),
        }
        sparse_transformer(1, **self._pattern)  # raises for what does not fit
        kind: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.q_proj = nn.Linear(hidden_size, hidden_size, **kind)
        self.k_proj = nn.Linear(hidden_size, hidden_size, **kind)
        self.v_proj = nn.Linear(hidden_size, hidden_size, **kind)
        self.o_proj = nn.Linear(hidden_size, hidden_size, **kind)

    def forward(self, x: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        """Attend within x (B, T, hidden_size); ``key_mask`` (B, T) bool is False for padding.

        Returns:
            (B, T, hidden_size), 0 for padding.

        Raises:
            TypeError, ValueError: A dtype or shape does not fit.
        """
        x = self._check(x, key_mask)
        mask = cached_mask(_sparse_transformer, x.shape[1], *self._pattern.items(), key_mask=key_mask)
        out = self._attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), mask, key_mask)
        return without_padding(self.o_proj(out), key_mask)

    def extra_repr(self) -> str:
        """The options that are not modules."""
        pattern = ", ".join(f"{name}={value!r}" for name, value in self._pattern.items())
        return f"num_heads={self.num_heads}, {pattern}"


def _bigbird(tokens: int, block_size: int, num_random_blocks: int, heads: int, seed: int) -> BlockMask:
    return bigbird(
        tokens, block_size=block_size, num_random_blocks=num_random_blocks, heads=heads, seed=seed
    )


def _sparse_transformer(tokens: int, *pattern: tuple[str, Any]) -> BlockMask:
    return sparse_transformer(tokens, **dict(pattern))
