"""transformers on longspan.

`register` makes ``attn_implementation="longspan"`` known; `accelerate` gives layers of a model faster
forwards; `extend_context` has a model read further than it was trained to; `to_longformer` makes a short
encoder long; `linearize` makes attention layers linear, with a state of constant size.

Example::

    longspan.hf.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="longspan")

    longspan.hf.accelerate(model)  # Mamba and its relatives, Longformer, BigBird

    longspan.hf.extend_context(model, "yarn", factor=4)

    longspan.hf.to_longformer(encoder, window=512, max_length=16384)

    longspan.hf.linearize(model, tokens)
"""

try:
    import transformers as _transformers  # noqa: F401
except ImportError as error:
    raise ImportError("longspan.hf needs transformers 5: pip install 'longspan[hf]'") from error

from longspan.hf.accelerate import Accelerated, accelerate
from longspan.hf.attention import longspan_attention, register
from longspan.hf.caches import GrowingCache, UnrotatedCache, WindowCache
from longspan.hf.extend import Extended, extend_context
from longspan.hf.linearize import Linearized, linearize, load_linearized
from longspan.hf.masks import longspan_mask
from longspan.hf.to_longformer import to_longformer

__all__ = [
    "Accelerated",
    "Extended",
    "GrowingCache",
    "Linearized",
    "UnrotatedCache",
    "WindowCache",
    "accelerate",
    "extend_context",
    "linearize",
    "load_linearized",
    "longspan_attention",
    "longspan_mask",
    "register",
    "to_longformer",
]
