"""Layers: `mamba_simple` and `mamba2`."""

from longspan.compat.mamba_ssm.modules import mamba2, mamba_simple

__all__ = ["mamba2", "mamba_simple"]
