"""transformers on longspan.

`register` makes ``attn_implementation="longspan"`` known; `accelerate` gives layers of a model faster
forwards; `extend_context` has a model read further than it was trained to.

Example::

    longspan.hf.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="longspan")

    longspan.hf.accelerate(model)  # Mamba and its relatives

    longspan.hf.extend_context(model, "yarn", factor=4)
"""

try:
    import transformers as _transformers  # noqa: F401
except ImportError as error:
    raise ImportError("longspan.hf needs transformers 5: pip install 'longspan[hf]'") from error

from longspan.hf.accelerate import Accelerated, accelerate
from longspan.hf.attention import longspan_attention, register
from longspan.hf.caches import GrowingCache, UnrotatedCache, WindowCache
from longspan.hf.extend import Extended, extend_context
from longspan.hf.masks import longspan_mask

__all__ = [
    "Accelerated",
    "Extended",
    "GrowingCache",
    "UnrotatedCache",
    "WindowCache",
    "accelerate",
    "extend_context",
    "longspan_attention",
    "longspan_mask",
    "register",
]
