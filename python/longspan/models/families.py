"""Families of token mixers that a `LanguageModel` can be built of, and the cache they decode with.

A family is one entry of `FAMILIES`. To add one, here or in a program of your own:

1. Write the mixer as an ``nn.Module`` (in `longspan.nn`) that maps (B, T, d_model) to the same and lets
   no token see a later one.
2. Write its `Family`: how to make it for a layer, how to call it with a `Cache`, and the name of the
   projection that it ends with.
3. ``register_family("name", family)``. `LanguageModel`, its generation, saving, and ``longspan train
   --model name`` then have it.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from longspan.models.config import LanguageModelConfig
from longspan.nn import (
    Attention,
    DeltaNet,
    GatedDeltaNet,
    GatedLinearAttention,
    LinearAttention,
    Mamba,
    Mamba2,
    MultiScaleRetention,
    PerformerAttention,
    RotaryEmbedding,
)


@dataclass
class Cache:
    """What the layers of a model keep of the tokens they have read, in order to read on from there.

    Made by `LanguageModel.make_cache`. mamba-ssm's layers know an object of these attributes as
    ``inference_params``.

    Attributes:
        batch_size: Sequences.
        max_length: Tokens that a sequence may reach. Mamba's states have one size whatever it is.
        seqlen_offset: Tokens read so far.
        key_value_memory_dict: Each layer's states by its number, made when it reads its first token.
    """

    batch_size: int
    max_length: int
    seqlen_offset: int = 0
    key_value_memory_dict: dict[int, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all states so far."""
        return sum(
            sum(x.nbytes for x in states) if isinstance(states, tuple) else states.nbytes
            for states in self.key_value_memory_dict.values()
        )


@dataclass(frozen=True)
class Family:
    """How a kind of token mixer plugs into a `LanguageModel`.

    Attributes:
        make: ``make(d_model, device=, dtype=, **options)`` gives one layer's mixer. The options are the
            config's ``mixer``; their names and defaults are those of ``make``. The model then sets
            ``mixer.layer_idx``, the layer's number.
        mix: ``mix(mixer, x, cache)`` runs it on x (B, T, d_model). Without a cache x is whole
            sequences. With one x goes on from the tokens that the cache has seen, and the mixer
            keeps what it needs in ``cache.key_value_memory_dict[mixer.layer_idx]``.
        output: Name of the mixer's last ``nn.Linear``, whose weight starts smaller the deeper the
            model is, so that the residual stream does not grow with depth.
        mlp_ratio: Channels of the gated MLP after each mixer over d_model, where the config does not
            say; 0 is no MLP.
    """

    make: Callable[..., nn.Module]
    mix: Callable[[Any, Tensor, Cache | None], Tensor]
    output: str = "out_proj"
    mlp_ratio: float = 0.0

    def options(self) -> list[str]:
        """Names of the options that ``make`` takes."""
        given = ("d_model", "layer_idx", "device", "dtype")
        return [label for label in inspect.signature(self.make).parameters if label not in given]

    def make_layer(self, config: LanguageModelConfig, layer_idx: int, **kind: Any) -> Any:
        """The mixer of one layer.

        Raises:
            TypeError, ValueError: ``config.mixer`` has an option that this family does not know, or a
                value that does not fit.
        """
        unknown = sorted(config.mixer.keys() - set(self.options()))
        if unknown:
            raise ValueError(
                f"LanguageModel: mixer: expected options of {config.family}, which are "
                f"{', '.join(self.options())}; got {', '.join(unknown)}"
            )
        try:
            mixer: Any = self.make(config.d_model, **kind, **config.mixer)
        except TypeError as error:
            raise TypeError(
                f"LanguageModel: mixer: expected values that {config.family} takes, "
                f"got {dict(config.mixer)} ({error})"
            ) from error
        mixer.layer_idx = layer_idx
        return mixer


FAMILIES: dict[str, Family] = {}


def register_family(name: str, family: Family) -> None:
    """Make ``family`` available under ``name`` to `LanguageModelConfig` and ``longspan train``.

    Raises:
        ValueError: The name is taken.

    Example::

        longspan.models.register_family("mine", longspan.models.Family(make=MyMixer, mix=my_mix))
    """
    if name in FAMILIES:
        raise ValueError(f"register_family: name: expected a new one, got {name!r}")
    FAMILIES[name] = family


def find_family(name: str) -> Family:
    """The family of this name.

    Raises:
        ValueError: There is none.
    """
    if name not in FAMILIES:
        raise ValueError(
            f"LanguageModel: family: expected one of {', '.join(sorted(FAMILIES))}, got {name!r}"
        )
    return FAMILIES[name]


# ---- Mamba


def _mix_mamba(mixer: Any, x: Tensor, cache: Cache | None) -> Tensor:
    return mixer(x, inference_params=cache)


# ---- attention


def _make_attention(
    d_model: int,
    *,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    qk_norm: bool = False,
    window: int | None = None,
    sink_tokens: int = 0,
    rope_base: float = 10000.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Attention:
    """Causal rotary attention; ``num_heads`` None is heads of ``head_dim`` or about 64 channels.

    ``window`` counts the tokens that one sees, itself included; None is all that came before.
    """
    if num_heads is None:
        num_heads = _heads(d_model, head_dim)
    size = d_model // num_heads if head_dim is None else head_dim
    if size % 2:
        raise ValueError(f"LanguageModel: head_dim: expected an even one, to be rotated, got {size}")
    if window is not None and window < 1:
        raise ValueError(f"LanguageModel: window: expected 1 token or more, got {window}")
    return Attention(
        d_model,
        num_heads,
        num_kv_heads,
        head_dim,
        qk_norm=qk_norm,
        rotary=RotaryEmbedding(size, base=rope_base),
        causal=True,
        window=(-1, -1) if window is None else (window - 1, 0),
        sink_tokens=sink_tokens,
        device=device,
        dtype=dtype,
    )


def _heads(d_model: int, head_dim: int | None = None) -> int:
    """As many as have ``head_dim`` channels, or about 64."""
    at_most = max(1, d_model // (head_dim or 64))
    return next(n for n in range(at_most, 0, -1) if head_dim or d_model % n == 0)


def _mix_attention(mixer: Any, x: Tensor, cache: Cache | None) -> Tensor:
    if cache is None:
        return mixer(x)
    states = cache.key_value_memory_dict
    if mixer.layer_idx not in states:
        states[mixer.layer_idx] = mixer.make_cache(cache.batch_size, cache.max_length)
    return mixer(x, cache=states[mixer.layer_idx])


# ---- linear attention and its kin


def _make_recurrent(layer: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """``layer`` with d_model for hidden_size, and heads of about 64 channels where none are given."""

    def make(d_model: int, *, num_heads: int | None = None, **options: Any) -> nn.Module:
        heads = _heads(d_model, options.get("head_dim")) if num_heads is None else num_heads
        return layer(d_model, num_heads=heads, **options)

    parameters = dict(inspect.signature(layer).parameters)
    parameters["hidden_size"] = parameters["hidden_size"].replace(name="d_model")
    parameters["num_heads"] = parameters["num_heads"].replace(default=None)
    signature = inspect.Signature(list(parameters.values()))
    make.__signature__ = signature  # type: ignore[attr-defined]  # what Family.options reads
    return make


def _mix_recurrent(mixer: Any, x: Tensor, cache: Cache | None) -> Tensor:
    if cache is None:
        return mixer(x)
    states = cache.key_value_memory_dict
    if mixer.layer_idx not in states:
        states[mixer.layer_idx] = mixer.make_cache(cache.batch_size)
    return mixer(x, cache=states[mixer.layer_idx])


register_family("mamba", Family(Mamba, _mix_mamba))
register_family("mamba2", Family(Mamba2, _mix_mamba))
register_family("attention", Family(_make_attention, _mix_attention, output="o_proj", mlp_ratio=8 / 3))
for _name, _layer in (
    ("linear_attention", LinearAttention),
    ("performer", PerformerAttention),
    ("retention", MultiScaleRetention),
    ("gla", GatedLinearAttention),
    ("delta_net", DeltaNet),
    ("gated_delta_net", GatedDeltaNet),
):
    register_family(
        _name, Family(_make_recurrent(_layer), _mix_recurrent, output="o_proj", mlp_ratio=8 / 3)
    )
