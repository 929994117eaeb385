"""Operators: `selective_scan_interface`, and `triton` for the names of mamba-ssm's Triton kernels."""

from longspan.compat.mamba_ssm.ops import selective_scan_interface, triton

__all__ = ["selective_scan_interface", "triton"]
