"""The peers' names and signatures over longspan's operators: swap an import and nothing else.

=============================== ==============================
instead of                      import
=============================== ==============================
``flash_attn`` (Dao et al.)     `longspan.compat.flash_attn`
``mamba_ssm`` (Dao and Gu)      `longspan.compat.mamba_ssm`
``causal_conv1d`` (Dao)         `longspan.compat.causal_conv1d`
``fla`` (Yang and Zhang)        `longspan.compat.fla`
``fast_transformers`` (Idiap)   `longspan.compat.fast_transformers`
``moba`` (MoonshotAI)           `longspan.compat.moba`
=============================== ==============================

Or swap none: `install` puts them under the peers' own names. `flex_attention` stands in for the function
of that name in ``torch.nn.attention.flex_attention``, with `Softcap` and `Alibi` for its score_mod.
"""

from longspan.compat._flex import Alibi, Softcap, flex_attention
from longspan.compat._install import install

__all__ = ["Alibi", "Softcap", "flex_attention", "install"]
