"""Language models of longspan's layers, trained, saved and continued by the same few lines each.

`LanguageModel` takes any family of token mixers (`FAMILIES`, `register_family`); `MambaLM` is that of
Mamba, with mamba-ssm's checkpoints. `tasks` has synthetic tasks that tell families apart.
"""

from longspan.models import tasks
from longspan.models.config import LanguageModelConfig
from longspan.models.families import FAMILIES, Cache, Family, register_family
from longspan.models.language_model import LanguageModel, LanguageModelOutput, MambaLM
from longspan.models.training import cosine_with_warmup, parameter_groups

__all__ = [
    "FAMILIES",
    "Cache",
    "Family",
    "LanguageModel",
    "LanguageModelConfig",
    "LanguageModelOutput",
    "MambaLM",
    "cosine_with_warmup",
    "parameter_groups",
    "register_family",
    "tasks",
]
