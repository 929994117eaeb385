"""Faster forwards for layers of transformers models: `accelerate`."""

import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import nn

from longspan.hf._replace import Undoable, give_back, known_class, replace_forward, replacements
from longspan.hf.bigbird import bigbird_forward
from longspan.hf.gated_delta import gated_delta_forward, head_norm_forward
from longspan.hf.longformer import encoder_forward, longformer_forward
from longspan.hf.mamba import mamba_forward
from longspan.hf.mamba2 import (
    falcon_h1_gated_norm_forward,
    gated_norm_forward,
    mamba2_forward,
)

Forward = Callable[..., Any]


# Class -> its forward, called with the module first. One that has a keyword hf_compat is given
# accelerate's. New families add their lines here.
_FORWARDS: dict[str, Forward] = {
    "mamba.MambaMixer": mamba_forward,
    "falcon_mamba.FalconMambaMixer": mamba_forward,
    "jamba.JambaMambaMixer": mamba_forward,
    "zamba.ZambaMambaMixer": mamba_forward,
    "mamba2.Mamba2Mixer": mamba2_forward,
    "bamba.BambaMixer": mamba2_forward,
    "falcon_h1.FalconH1Mixer": mamba2_forward,
    "granitemoehybrid.GraniteMoeHybridMambaLayer": mamba2_forward,
    "nemotron_h.NemotronHMamba2Mixer": mamba2_forward,
    "zamba2.Zamba2MambaMixer": mamba2_forward,
    "mamba2.MambaRMSNormGated": gated_norm_forward,
    "bamba.BambaRMSNormGated": gated_norm_forward,
    "falcon_h1.FalconH1RMSNormGated": falcon_h1_gated_norm_forward,
    "granitemoehybrid.GraniteMoeHybridRMSNormGated": gated_norm_forward,
    "nemotron_h.NemotronHRMSNormGated": gated_norm_forward,
    "zamba2.Zamba2RMSNormGated": gated_norm_forward,
    "qwen3_next.Qwen3NextGatedDeltaNet": gated_delta_forward,
    "qwen3_5.Qwen3_5GatedDeltaNet": gated_delta_forward,
    "qwen3_5_moe.Qwen3_5MoeGatedDeltaNet": gated_delta_forward,
    "qwen3_next.Qwen3NextRMSNormGated": head_norm_forward,
    "qwen3_5.Qwen3_5RMSNormGated": head_norm_forward,
    "qwen3_5_moe.Qwen3_5MoeRMSNormGated": head_norm_forward,
    "longformer.LongformerSelfAttention": longformer_forward,
    "longformer.LongformerEncoder": encoder_forward,
    "led.LEDEncoderSelfAttention": longformer_forward,
    "big_bird.BigBirdBlockSparseAttention": bigbird_forward,
    "bigbird_pegasus.BigBirdPegasusBlockSparseAttention": bigbird_forward,
}


class Accelerated(Undoable):
    """What `accelerate` did to a model; on leaving it as a context, or by `undo`, it is undone.

    Example::

        with longspan.hf.accelerate(model) as accelerated:
            print(accelerated)  # Accelerated(MambaMixer: 24)
            model.generate(ids)
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        """Made by `accelerate`."""
        self._modules = modules

    @property
    def counts(self) -> dict[str, int]:
        """How many layers of each class run on longspan now."""
        return dict(Counter(found.of_class for _, _, found in replacements(self._modules)))

    def undo(self) -> None:
        """Give every layer its own forward back; harmless where that was done before."""
        give_back(self._modules)

    def __repr__(self) -> str:
        """The counts."""
        counts = ", ".join(f"{name}: {count}" for name, count in self.counts.items())
        return f"Accelerated({counts or 'undone'})"


def accelerate(model: nn.Module, hf_compat: bool = False) -> Accelerated:
    """Run layers of a transformers model on longspan's kernels: same weights, same results, faster.

    Replaces, in the model or any part of one, the forwards of these layers (and of the gated norms
    within them):

    - Mamba, FalconMamba, Jamba, Zamba: convolution, selective scan and decoding step;
    - Mamba-2, Bamba, FalconH1, GraniteMoeHybrid, Nemotron-H, Zamba2: convolution, SSD, step, norm;
    - Qwen3-Next, Qwen3.5, Qwen3.5-MoE: convolution, gated delta rule, step, norm;
    - Longformer, LED (encoder): attention by window and global tokens, dropout included; Longformer's
      encoder leaves out the tokens that fill up the last window;
    - BigBird, BigBirdPegasus (encoder): block-sparse attention.

    Modules, parameters, state_dict and caches stay what they are: training, gradient checkpointing,
    ``generate`` with beams, left padding, ``save_pretrained``, deepcopy and pickle go on as before.
    Results are those of the layers' own torch path within rounding, but that:

    - Several steps after a cache (a prompt in chunks) go on from its state in Mamba-1 layers too,
      where transformers begins with zero.
    - A single step keeps to ``time_step_limit`` in Mamba-2 layers, as the whole sequence does.
    - Packed sequences (``seq_idx`` or ``cu_seq_lens_q``) are kept apart, where the torch path raises
      or ignores them, if the model hands these to its layers: MambaForCausalLM, Mamba2ForCausalLM
      (unlike Mamba2Model), FalconMamba and Jamba do not.
    - float64 models calculate in float64 throughout.
    - BigBird sees the random blocks that it was trained with in evaluation too, where transformers
      has block 0 in their place, counted once more for each; and a block that is drawn twice, or is
      seen anyway, counts once (at 1024, 3072 and 4096 tokens transformers draws such ones).

    Longformer and BigBird: padding is hidden, not made unlikely. Weights are never formed, so a call
    with ``output_attentions`` runs on the model's own layers. Where BigBird turns to full attention for
    a short text, and after ``set_attention_type``, its layers are new ones: accelerate it again.

    For Mamba's and the delta rule's layers padding is a step with zero input, as in transformers, and
    lets a state decay:
    pad on the left where a cache shall be continued. On a device without kernels the layers run on
    the operators' plain torch reference. A model may be compiled before or after: the next call
    compiles what is there then, in one graph, or for Longformer and BigBird, whose masks follow from
    values, in several.

    Args:
        model: A transformers model, or any module with such layers in it.
        hf_compat: Repeat what transformers does in the first two points above, and in the last.

    Returns:
        `Accelerated`: its ``counts`` by class, and ``undo()``; as a context manager it undoes on exit.
        A second call replaces nothing anew; either result's ``undo()`` restores the original.

    Raises:
        TypeError: ``model`` is no torch module.
        ValueError: There is nothing in it to accelerate.

    Example::

        model = AutoModelForCausalLM.from_pretrained("state-spaces/mamba-130m-hf")
        longspan.hf.accelerate(model)
        model.generate(ids)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model: expected a torch module, got {type(model).__name__}")
    modules = [module for module in model.modules() if _replace(module, hf_compat)]
    if not modules:
        known = ", ".join(name.split(".")[1] for name in _FORWARDS)
        raise ValueError(
            f"accelerate: model: expected one of transformers' layers in it that longspan has a forward "
            f"for ({known}), found none in {type(model).__name__}"
        )
    return Accelerated(modules)


def _replace(module: nn.Module, hf_compat: bool) -> bool:
    """Put our forward in place if the module's own is one that we know."""
    name = known_class(type(module), _FORWARDS)
    if name is None:
        return False
    forward = _FORWARDS[name]
    takes = "hf_compat" in inspect.signature(forward).parameters
    replace_forward(module, forward, **({"hf_compat": hf_compat} if takes else {}))
    return True
