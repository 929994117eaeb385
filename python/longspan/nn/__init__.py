"""Modules for an ordinary training loop: autograd, autocast, torch.compile, state_dict."""

from longspan.nn._recurrent import RecurrentState
from longspan.nn.attention import Attention, KVCache
from longspan.nn.delta_net import DeltaNet, GatedDeltaNet
from longspan.nn.gated_linear import GatedLinearAttention
from longspan.nn.linear_attention import LinearAttention
from longspan.nn.lsh import LSHAttention, LSHCache
from longspan.nn.mamba import Mamba
from longspan.nn.mamba2 import Mamba2
from longspan.nn.moba import MixtureOfBlockAttention
from longspan.nn.norm import RMSNormGated
from longspan.nn.nsa import NativeSparseAttention, SpanCompression
from longspan.nn.performer import PerformerAttention
from longspan.nn.retention import MultiScaleRetention
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
    "DeltaNet",
    "GatedDeltaNet",
    "GatedLinearAttention",
    "KVCache",
    "LSHAttention",
    "LSHCache",
    "LinearAttention",
    "LongformerSelfAttention",
    "Mamba",
    "Mamba2",
    "MixtureOfBlockAttention",
    "MultiScaleRetention",
    "NativeSparseAttention",
    "PerformerAttention",
    "RMSNormGated",
    "RecurrentState",
    "RotaryEmbedding",
    "RoutingAttention",
    "RoutingCache",
    "SpanCompression",
    "SparseTransformerAttention",
]
