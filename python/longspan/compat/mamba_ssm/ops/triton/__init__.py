"""The names of mamba-ssm's Triton kernels; no Triton is needed here."""

from longspan.compat.mamba_ssm.ops.triton import (
    layer_norm,
    layernorm_gated,
    selective_state_update,
    ssd_combined,
)

__all__ = ["layer_norm", "layernorm_gated", "selective_state_update", "ssd_combined"]
