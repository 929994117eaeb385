"""fast-transformers' causal product: `longspan.compat.fast_transformers.causal_dot_product`.

What its causal linear attention calls, under its own module's name too, ``causal_product``. It takes
any dtype, where fast-transformers takes float32 alone.
"""

from longspan.compat.fast_transformers import causal_product
from longspan.compat.fast_transformers.causal_product import causal_dot_product

__version__ = "0.4.0"  # whose interface this is

__all__ = ["causal_dot_product", "causal_product"]
