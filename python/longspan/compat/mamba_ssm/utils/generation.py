"""`InferenceParams`, the states of a model's layers while it generates."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class InferenceParams:
    """What `Mamba.forward` takes as ``inference_params``.

    Attributes:
        max_seqlen, max_batch_size: Of this generation.
        seqlen_offset: Tokens read so far. The caller counts.
        batch_size_offset: As mamba-ssm has it, for attention layers.
        key_value_memory_dict: States by ``layer_idx``.
        lengths_per_sample: As mamba-ssm has it, for attention layers.

    Example::

        params = InferenceParams(max_seqlen=100, max_batch_size=1)
        with torch.no_grad():
            layer(prompt, inference_params=params)
            params.seqlen_offset += prompt.shape[1]
            layer(token, inference_params=params)
    """

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict[Any, Any] = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Begin another generation; the next prompt overwrites the states."""
        self.max_seqlen, self.max_batch_size, self.seqlen_offset = max_seqlen, max_batch_size, 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()
