"""Modules for an ordinary training loop: autograd, autocast, torch.compile, state_dict."""

from longspan.nn.attention import Attention, KVCache
from longspan.nn.lsh import LSHAttention, LSHCache
from longspan.nn.mamba import Mamba
from longspan.nn.mamba2 import Mamba2
from longspan.nn.norm import RMSNormGated
from longspan.nn.rotary import RotaryEmbedding
from longspan.nn.routing import RoutingAttention, RoutingCache
from longspan.nn.sparse import (
    BigBirdSelfAttention,
    LongformerSelfAttention,
    SparseTransformerAttention,
)

__all__ = [
    "Attention",
    "BigBirdSelfAttention",
    "KVCache",
    "LSHAttention",
    "LSHCache",
    "LongformerSelfAttention",
    "Mamba",
    "Mamba2",
    "RMSNormGated",
    "RotaryEmbedding",
    "RoutingAttention",
    "RoutingCache",
    "SparseTransformerAttention",
]
