"""`generation`."""

from longspan.compat.mamba_ssm.utils import generation

__all__ = ["generation"]
