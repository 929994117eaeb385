"""flash-linear-attention on the processor: ``from longspan.compat.fla.ops.gla import chunk_gla``.

Same names, signatures, layouts ((B, T, H, D), unlike longspan's own) and return values, in the same
modules of ``fla.ops``. ``chunk_`` and ``fused_recurrent_`` functions compute the same, by the same
kernels: longspan chooses by the length. What differs:

- Any dtype, float32 and float64 too, in every function; final states are float32 (float64 for float64).
- A final state is returned where ``output_final_state`` asks for it, also by the linear attentions with
  ``normalize``, whose defaults stay fla's: True in `chunk_linear_attn`, False in
  `fused_recurrent_linear_attn`.
- Gates, and states before and after, have gradients in every function.
- ``head_first`` is refused, as in fla; so is ``gv``, gates of values.
"""

from longspan.compat.fla import ops

__version__ = "0.4.0"  # whose interface this is

__all__ = ["ops"]
