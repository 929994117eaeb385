"""The operators: one module a family, each function beside its fake and its autograd."""

from longspan.ops.attention import (
    attention,
    attention_decode,
    attention_varlen,
    merge_attention,
)
from longspan.ops.selective_scan import selective_scan, selective_state_update

__all__ = [
    "attention",
    "attention_decode",
    "attention_varlen",
    "merge_attention",
    "selective_scan",
    "selective_state_update",
]
