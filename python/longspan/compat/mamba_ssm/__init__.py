"""mamba-ssm on the processor: ``from longspan.compat.mamba_ssm import Mamba``.

Same names, signatures, layouts and return values in the same modules. What differs:

- The last state of `selective_scan_fn` and the norms' weights of `mamba_inner_fn` have gradients, and
  the states after packed sequences do; in mamba-ssm they have none.
- `selective_state_update` takes None for D and dt_bias in its reference too, and raises where a gradient
  is asked for.
- States are carried in float32 (float64 for float64) whatever B's and C's dtype.
- ``chunk_size`` changes speed, and results by rounding only; above 64 it runs as 64, which is fastest.
- ``Mamba2.step`` keeps to ``dt_limit``; `Mamba2` keeps sequences apart by ``cu_seqlens`` alone.
- `layer_norm_fn` and `rms_norm_fn` are without ``return_dropout_mask``.
- There is no tensor parallelism: `Mamba2` refuses ``process_group`` and ``sequence_parallel``.
"""

from longspan.compat.mamba_ssm import modules, ops, utils
from longspan.compat.mamba_ssm.modules.mamba2 import Mamba2
from longspan.compat.mamba_ssm.modules.mamba_simple import Mamba
from longspan.compat.mamba_ssm.ops.selective_scan_interface import mamba_inner_fn, selective_scan_fn

__version__ = "2.2.6"  # whose interface this is

__all__ = ["Mamba", "Mamba2", "mamba_inner_fn", "modules", "ops", "selective_scan_fn", "utils"]
