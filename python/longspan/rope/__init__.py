"""Position encodings that reach beyond the length a model was trained for, as pure functions."""

from longspan.rope import search
from longspan.rope.config import from_config
from longspan.rope.encodings import alibi_slopes, xpos
from longspan.rope.frequencies import METHODS, frequencies

__all__ = ["METHODS", "alibi_slopes", "frequencies", "from_config", "search", "xpos"]
