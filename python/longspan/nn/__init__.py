"""Modules for an ordinary training loop: autograd, autocast, torch.compile, state_dict."""

from longspan.nn.attention import Attention, KVCache
from longspan.nn.mamba import Mamba
from longspan.nn.mamba2 import Mamba2
from longspan.nn.moba import MixtureOfBlockAttention
from longspan.nn.norm import RMSNormGated
from longspan.nn.nsa import NativeSparseAttention, SpanCompression
from longspan.nn.rotary import RotaryEmbedding
from longspan.nn.sparse import (
    BigBirdSelfAttention,
    LongformerSelfAttention,
    SparseTransformerAttention,
)

__all__ = [
    "Attention",
    "BigBirdSelfAttention",
    "KVCache",
    "LongformerSelfAttention",
    "Mamba",
    "Mamba2",
    "MixtureOfBlockAttention",
    "NativeSparseAttention",
    "RMSNormGated",
    "RotaryEmbedding",
    "SpanCompression",
    "SparseTransformerAttention",
]
