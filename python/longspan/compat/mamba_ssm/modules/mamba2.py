"""`Mamba2`, which is `longspan.nn.Mamba2`."""

from longspan.nn.mamba2 import Mamba2

__all__ = ["Mamba2"]
