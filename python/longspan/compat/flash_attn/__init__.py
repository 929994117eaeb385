"""flash-attn 2's functions on the processor: ``from longspan.compat.flash_attn import flash_attn_func``.

Same names, signatures, layouts ((B, T, H, D); packed (total, H, D)) and return values, and the same
modules: `flash_attn_interface` and `bert_padding`. What differs:

- float32 and float64 are accepted beside float16 and bfloat16; a head may have any size, and v's may
  differ from q's; a page of the cache may have any number of slots.
- Where a query sees no key the log-sum-exp is -inf (the identity of merging), where flash-attn gives
  +inf or -inf by the kernel that ran. It is differentiable here. The output is 0 in both.
- ``deterministic`` and ``num_splits`` are choices between kernels in flash-attn. Here the result has
  the same bits for any number of threads, backward included, so both values of ``deterministic`` and
  every ``num_splits`` give that result. ``max_seqlen`` sizes a launch there; here ``cu_seqlens`` is
  all that is needed.
- ``return_attn_probs`` gives (out, softmax_lse, S_dmask) with S_dmask always empty, of shape (0,), as
  flash-attn's is without dropout: it is for its own tests, and of size tokens x keys.
- Dropout draws from torch's generator, with another stream of numbers.
- ``flash_attn_with_kvcache`` raises where a gradient is asked for; flash-attn detaches in silence.
"""

from longspan.compat.flash_attn import bert_padding, flash_attn_interface
from longspan.compat.flash_attn.bert_padding import pad_input, unpad_input
from longspan.compat.flash_attn.flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

__version__ = "2.8.3"  # whose interface this is

__all__ = [
    "bert_padding",
    "flash_attn_func",
    "flash_attn_interface",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "pad_input",
    "unpad_input",
]
