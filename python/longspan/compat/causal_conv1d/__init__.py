"""causal-conv1d on the processor: ``from longspan.compat.causal_conv1d import causal_conv1d_fn``.

Same names, signatures, layouts and return values, and the same modules: `causal_conv1d_interface` and
`causal_conv1d_varlen`. What differs:

- Any width and any strides; float64 beside the others.
- ``seq_idx`` goes together with initial and final states (causal-conv1d refuses): they belong to the
  first and to the last token's sequence.
- Final states are returned whichever way x lies in memory.
- `causal_conv1d_update` raises where a gradient is asked for; causal-conv1d has none, in silence.
"""

from longspan.compat.causal_conv1d import causal_conv1d_interface, causal_conv1d_varlen
from longspan.compat.causal_conv1d.causal_conv1d_interface import causal_conv1d_fn, causal_conv1d_update
from longspan.compat.causal_conv1d.causal_conv1d_varlen import causal_conv1d_varlen_states

__version__ = "1.6.0"  # whose interface this is

__all__ = [
    "causal_conv1d_fn",
    "causal_conv1d_interface",
    "causal_conv1d_update",
    "causal_conv1d_varlen",
    "causal_conv1d_varlen_states",
]
