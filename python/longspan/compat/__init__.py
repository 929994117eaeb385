"""The peers' names and signatures over longspan's operators: swap an import and nothing else.

=============================== ========================
instead of                      import
=============================== ========================
``flash_attn`` (Dao et al.)     `longspan.compat.flash_attn`
=============================== ========================
"""
