"""Scaling methods that transformers has not, under names that its configurations may have."""

from typing import Any

from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from longspan import rope


def register_methods() -> None:
    """Make ``rope_type`` "dynamic_linear" and "dynamic_yarn" known to transformers' rotary embeddings.

    What has "dynamic" in its name they compute anew as the text grows.
    """
    for name in ("dynamic_linear", "dynamic_yarn"):
        ROPE_INIT_FUNCTIONS[name] = _parameters


def _parameters(
    config: Any, device: Any = None, seq_len: Any = None, layer_type: str | None = None, **_: Any
) -> tuple[Tensor, float]:
    """ROPE_INIT_FUNCTIONS' form of `longspan.rope.frequencies`."""
    settings = rope.from_config(config, layer_type=layer_type)
    inv_freq, scale = rope.frequencies(**settings, seq_len=None if seq_len is None else int(seq_len))
    return inv_freq.to(device), scale
