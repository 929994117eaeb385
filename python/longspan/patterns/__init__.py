"""Block masks: which keys each query sees, for `longspan.block_sparse_attention`."""

from longspan.patterns.block_mask import BlockMask
from longspan.patterns.builders import (
    bigbird,
    dilated_window,
    longformer,
    sliding_window,
    sparse_transformer,
)

__all__ = [
    "BlockMask",
    "bigbird",
    "dilated_window",
    "longformer",
    "sliding_window",
    "sparse_transformer",
]
