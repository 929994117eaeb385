"""longspan: long sequences in PyTorch, on the processor that everybody has.

Operators (all in :mod:`longspan.ops` and here), each with a backward, torch.compile and export::

    import torch, longspan
    q, k, v = (torch.randn(1, 8, 4096, 64) for _ in range(3))
    out = longspan.attention(q, k, v, causal=True, window=(511, 0), sink_tokens=4)
"""

import os as _os

import torch as _torch


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


if _version(_torch.__version__) < (2, 10):
    raise ImportError(f"longspan needs torch 2.10 or later; this is torch {_torch.__version__}")

try:
    from . import _C as _C
except ImportError as error:
    raise ImportError(
        "longspan's compiled extension is missing or does not load here "
        f"({error}); install the package with `pip install --no-build-isolation .` "
        "in its folder, and import it from another one"
    ) from error

if _os.environ.get("LONGSPAN_ISA") and _C.isa() != _os.environ["LONGSPAN_ISA"]:
    raise ImportError(
        f"LONGSPAN_ISA={_os.environ['LONGSPAN_ISA']}: this build and processor have "
        + ", ".join(_C.isa_levels())
    )

from longspan import models, nn, patterns, rope
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

__version__ = "0.1.0"

__all__ = [
    "__version__",
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
    "isa",
    "linear_attention",
    "linear_attention_step",
    "lsh_attention",
    "lsh_attention_step",
    "lsh_buckets",
    "lsh_rotations",
    "merge_attention",
    "mixture_of_block_attention",
    "mixture_of_block_attention_step",
    "models",
    "native_sparse_attention",
    "nn",
    "patterns",
    "performer_attention",
    "performer_attention_step",
    "rms_norm_gated",
    "rope",
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


def isa() -> str:
    """Name the instruction set whose kernels are in use.

    One of ``"avx512_amx"``, ``"avx512_bf16"``, ``"avx512"``, ``"avx2"``, ``"generic"``, ``"neon"``; the
    environment variable ``LONGSPAN_ISA`` chooses another one before the import.

    Example::

        longspan.isa()  # 'avx512_bf16'
    """
    return _C.isa()
