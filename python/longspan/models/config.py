"""`LanguageModelConfig`: what a `LanguageModel` is made of, in our words and in mamba-ssm's."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

# mamba-ssm's names of its layers, and the families that they are here.
_MAMBA_SSM_LAYERS = {"Mamba1": "mamba", "Mamba2": "mamba2"}
# What mamba-ssm's config.json holds that is named otherwise here, or means nothing.
_MAMBA_SSM_ONLY = ("ssm_cfg", "attn_layer_idx", "attn_cfg", "fused_add_norm")


@dataclass(frozen=True)
class LanguageModelConfig:
    """The sizes and the kind of a `LanguageModel`.

    Args:
        vocab_size: Tokens there are.
        d_model: Channels between blocks.
        n_layer: Blocks.
        family: What mixes tokens: a name in `longspan.models.FAMILIES`, ``"mamba"``, ``"mamba2"``,
            ``"attention"``, ``"linear_attention"``, ``"performer"``, ``"retention"``, ``"gla"``,
            ``"delta_net"``, ``"gated_delta_net"``.
        mixer: Options of the family's mixer, by keyword, such as ``{"d_state": 32}``.
        d_intermediate: Channels inside the gated MLP after each mixer, rounded up to a multiple of 128
            as mamba-ssm does; 0 is no MLP; None is what is usual in the family: none beside Mamba,
            about 8/3 d_model beside attention.
        rms_norm: RMSNorm; False is LayerNorm.
        norm_eps: Of either.
        residual_in_fp32: Keep what flows from block to block in float32 where weights are half
            precision.
        pad_vocab_size_multiple: Rows of the embedding are vocab_size rounded up to a multiple of this.
            Logits are of vocab_size tokens.
        tie_embeddings: The head's weight is the embedding's.

    Raises:
        TypeError, ValueError: A value is not what it says, or the family is not known.

    Example::

        LanguageModelConfig(vocab_size=256, d_model=256, n_layer=4, family="mamba2")
    """

    vocab_size: int
    d_model: int
    n_layer: int
    family: str = "mamba"
    mixer: Mapping[str, Any] = field(default_factory=dict)
    d_intermediate: int | None = None
    rms_norm: bool = True
    norm_eps: float = 1e-5
    residual_in_fp32: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        """Check the sizes; the family and its options are checked where the model is made."""
        for label in ("vocab_size", "d_model", "n_layer", "pad_vocab_size_multiple"):
            _check_integer(label, getattr(self, label), 1)
        if self.d_intermediate is not None:
            _check_integer("d_intermediate", self.d_intermediate, 0)
        if not isinstance(self.mixer, Mapping):
            raise TypeError(
                f"LanguageModelConfig: mixer: expected a mapping, got {type(self.mixer).__name__}"
            )
        if not self.norm_eps > 0:
            raise ValueError(f"LanguageModelConfig: norm_eps: expected above 0, got {self.norm_eps}")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding."""
        return _round_up(self.vocab_size, self.pad_vocab_size_multiple)

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LanguageModelConfig":
        """Read what `to_dict` gave, or a config.json of mamba-ssm.

        Raises:
            ValueError: There is an entry that means nothing here, one is missing, or mamba-ssm's model
                has attention layers, whose parameters are not those of `longspan.nn.Attention`.
        """
        values = dict(values)
        if "model_type" in values:
            raise ValueError(
                f"LanguageModelConfig: expected longspan's or mamba-ssm's entries, got "
                f"transformers', model_type {values['model_type']}: load it with transformers, and see "
                "longspan.hf"
            )
        if "family" not in values:
            values = _from_mamba_ssm(values)
        unknown = sorted(values.keys() - cls.__dataclass_fields__.keys())
        if unknown:
            raise ValueError(
                f"LanguageModelConfig: expected the entries {', '.join(cls.__dataclass_fields__)}, "
                f"got {', '.join(unknown)}"
            )
        missing = [label for label in ("vocab_size", "d_model", "n_layer") if label not in values]
        if missing:
            raise ValueError(f"LanguageModelConfig: expected {', '.join(missing)}, which is not there")
        return cls(**values)


def _from_mamba_ssm(values: dict[str, Any]) -> dict[str, Any]:
    ssm = dict(values.get("ssm_cfg") or {})
    layer = ssm.pop("layer", "Mamba1")
    if layer not in _MAMBA_SSM_LAYERS:
        raise ValueError(
            f"LanguageModelConfig: ssm_cfg: expected layer {' or '.join(_MAMBA_SSM_LAYERS)}, got {layer}"
        )
    if values.get("attn_layer_idx"):
        raise ValueError(
            "LanguageModelConfig: attn_layer_idx: expected none, for mamba-ssm's attention layers have "
            f"other parameters than longspan.nn.Attention; got {values['attn_layer_idx']}"
        )
    kept = {label: value for label, value in values.items() if label not in _MAMBA_SSM_ONLY}
    return {"d_intermediate": 0, **kept, "family": _MAMBA_SSM_LAYERS[layer], "mixer": ssm}


def _check_integer(label: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"LanguageModelConfig: {label}: expected an int, got {value!r}")
    if value < least:
        raise ValueError(f"LanguageModelConfig: {label}: expected {least} or more, got {value}")


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
