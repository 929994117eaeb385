"""The operators: one module a family, each function beside its fake and its autograd."""

from longspan.ops.attention import (
    attention,
    attention_decode,
    attention_varlen,
    merge_attention,
)
from longspan.ops.block_sparse import block_sparse_attention
from longspan.ops.conv import causal_conv1d, causal_conv1d_update
from longspan.ops.delta_rule import delta_rule, delta_rule_step
from longspan.ops.favor import favor_features, favor_projection
from longspan.ops.linear_attention import linear_attention, linear_attention_step
from longspan.ops.lsh import lsh_attention, lsh_attention_step, lsh_buckets, lsh_rotations
from longspan.ops.moba import mixture_of_block_attention, mixture_of_block_attention_step
from longspan.ops.norm import rms_norm_gated
from longspan.ops.nsa import compress_keys, compressed_attention, native_sparse_attention
from longspan.ops.performer import performer_attention, performer_attention_step
from longspan.ops.rotary import apply_rotary
from longspan.ops.routing import (
    routing_attention,
    routing_attention_step,
    routing_clusters,
    routing_kmeans,
    routing_loss,
    routing_sums,
    routing_update,
)
from longspan.ops.selected import select_blocks, selected_attention
from longspan.ops.selective_scan import selective_scan, selective_state_update
from longspan.ops.ssd import ssd

__all__ = [
    "apply_rotary",
    "attention",
    "attention_decode",
    "attention_varlen",
    "block_sparse_attention",
    "causal_conv1d",
    "causal_conv1d_update",
    "compress_keys",
    "compressed_attention",
    "delta_rule",
    "delta_rule_step",
    "favor_features",
    "favor_projection",
    "linear_attention",
    "linear_attention_step",
    "lsh_attention",
    "lsh_attention_step",
    "lsh_buckets",
    "lsh_rotations",
    "merge_attention",
    "mixture_of_block_attention",
    "mixture_of_block_attention_step",
    "native_sparse_attention",
    "performer_attention",
    "performer_attention_step",
    "rms_norm_gated",
    "routing_attention",
    "routing_attention_step",
    "routing_clusters",
    "routing_kmeans",
    "routing_loss",
    "routing_sums",
    "routing_update",
    "select_blocks",
    "selected_attention",
    "selective_scan",
    "selective_state_update",
    "ssd",
]
