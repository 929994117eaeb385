"""The picture of a mask."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longspan.patterns._entries import unpack

if TYPE_CHECKING:
    from longspan.patterns.block_mask import BlockMask

# Up to here every pair of tokens is drawn.
_MOST_TOKENS = 2048


def _picture(mask: BlockMask, which: int) -> Tensor:
    """Share that is seen, (rows, columns), in tokens or in blocks."""
    grid, entries = mask._grid(), mask._entries()
    if max(mask.shape) <= _MOST_TOKENS:
        return mask.to_dense().flatten(0, -3)[which].float()
    share = unpack(mask.bits).float().mean((1, 2))
    picture = torch.zeros(grid.rows * grid.columns)
    mine = entries.keys // len(picture) == which
    picture[entries.keys[mine] % len(picture)] = share[entries.patterns[mine]]
    return picture.view(grid.rows, grid.columns)


def draw(mask: BlockMask, which: int) -> Any:
    """-> a matplotlib Figure of the list ``which``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    tokens, keys = mask.shape
    axes.imshow(
        _picture(mask, which).numpy(),
        cmap="Blues",
        vmin=0,
        vmax=1,
        aspect="equal",
        extent=(0, keys, tokens, 0),
    )
    axes.spines[:].set_visible(False)  # they would hide a global token at the edge
    axes.set_xlabel("key")
    axes.set_ylabel("query")
    axes.set_title(f"{tokens} x {keys}, density {mask.density:.3f}")
    return figure
