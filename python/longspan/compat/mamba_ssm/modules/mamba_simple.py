"""`Mamba`, which is `longspan.nn.Mamba`."""

from longspan.nn.mamba import Mamba

__all__ = ["Mamba"]
