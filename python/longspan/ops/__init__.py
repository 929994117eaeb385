"""The operators: one module a family, each function beside its fake and its autograd."""

from longspan.ops.attention import (
    attention,
    attention_decode,
    attention_varlen,
    merge_attention,
)

__all__ = ["attention", "attention_decode", "attention_varlen", "merge_attention"]
