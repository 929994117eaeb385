"""Scaling methods in configurations of transformers: what is asked for, and how it is stored."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from longspan import rope
from longspan.rope.frequencies import takes_factor


def register_methods() -> None:
    """Make ``rope_type`` "dynamic_linear" and "dynamic_yarn" known to transformers' rotary embeddings.

    What has "dynamic" in its name they compute anew as the text grows.
    """
    for name in ("dynamic_linear", "dynamic_yarn"):
        ROPE_INIT_FUNCTIONS[name] = _parameters


def _parameters(
    config: Any, device: Any = None, seq_len: Any = None, layer_type: str | None = None, **_: Any
) -> tuple[Tensor, float]:
    """ROPE_INIT_FUNCTIONS' form of `longspan.rope.frequencies`."""
    settings = rope.from_config(config, layer_type=layer_type)
    inv_freq, scale = rope.frequencies(**settings, seq_len=None if seq_len is None else int(seq_len))
    return inv_freq.to(device), scale


def scaled_settings(
    config: Any, method: Any, factor: float | None, options: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], int]:
    """What `extend_context` is asked for.

    Args:
        config: Of the model, as it is.
        method, factor, options: As in `extend_context`.

    Returns:
        Arguments of `longspan.rope.frequencies`; the ``rope_parameters`` and the
        ``max_position_embeddings`` that say the same in a configuration.
    """
    own = rope.from_config(config)
    if method is None:
        if factor is not None or options:
            given = next(iter(options), "factor")
            raise ValueError(
                f"extend_context: {given}: expected none with method=None, which takes the "
                "configuration's, got it"
            )
        rope.frequencies(**own)
        return own, config.rope_parameters, config.max_position_embeddings
    if own["method"] != "default":
        raise ValueError(
            f"extend_context: method: expected None, as the model's configuration is scaled by "
            f"{own['method']} already and scalings do not compose, got {method!r}"
        )
    of_model = ("head_dim", "base", "partial_rotary_factor")
    settings: dict[str, Any] = {name: own[name] for name in of_model if name in own}
    trained = getattr(config, "original_max_position_embeddings", None)
    trained = config.max_position_embeddings if trained is None else trained
    if isinstance(method, Mapping):
        settings = _of_dictionary(method, factor, options, own, trained)
    else:
        settings = {"method": method, **settings, **options}
        if takes_factor(method) and not options.get("dynamic"):
            settings["factor"] = 4.0 if factor is None else factor
        elif factor is not None:
            settings["factor"] = factor  # which frequencies refuses
        trained = options.get("original_max_position_embeddings", trained)
        if method in ("yarn", "ntk_by_parts", "longrope", "llama3"):
            settings["original_max_position_embeddings"] = trained
        else:
            settings["max_position"] = trained
    inv_freq, scale = rope.frequencies(**settings)
    return settings, *_stored(config, settings, inv_freq, scale, trained)


def _of_dictionary(
    parameters: Mapping[str, Any],
    factor: float | None,
    options: dict[str, Any],
    own: dict[str, Any],
    trained: int,
) -> dict[str, Any]:
    if factor is not None or options:
        given = next(iter(options), "factor")
        raise ValueError(
            f"extend_context: {given}: expected none beside a dictionary, which says it, got it"
        )
    parameters = dict(parameters)
    for name, label in (("base", "rope_theta"), ("partial_rotary_factor", "partial_rotary_factor")):
        if name in own and parameters.setdefault(label, own[name]) != own[name]:
            raise ValueError(
                f"extend_context: method: {label}: expected the model's, {own[name]!r}, "
                f"got {parameters[label]!r}"
            )
    return rope.from_config(parameters, head_dim=own["head_dim"], max_position=trained)


def _stored(
    config: Any, settings: dict[str, Any], inv_freq: Tensor, scale: float, trained: int
) -> tuple[dict[str, Any], int]:
    """rope_parameters and max_position_embeddings for a configuration."""
    method, options = settings["method"], dict(settings)
    out: dict[str, Any] = {"rope_theta": options.pop("base", 10000.0)}
    own = config.rope_parameters.get("partial_rotary_factor")
    if own is not None:
        out["partial_rotary_factor"] = own
    for name in ("method", "head_dim", "max_position", "partial_rotary_factor"):
        options.pop(name, None)
    factor = options.get("factor")
    longest = trained if factor is None else math.ceil(trained * factor)
    alone = config.model_type == "phi3"  # whose configuration takes longrope and nothing else
    if method == "yarn" and options.pop("dynamic", False):
        method = "dynamic_yarn"
    if "dynamic" in method:
        if alone:
            raise ValueError(
                "extend_context: method: expected one that does not grow with the length, or longrope, "
                f"since nothing else fits into the configuration of a Phi-3 model, got {method}"
            )
        return {**out, "rope_type": method, **options}, trained
    if method in ("ntk", "ntk_by_parts") or (alone and method not in ("default", "longrope")):
        # inv_freq_i = theta_i / lambda_i: what longrope says of any frequencies.
        plain, _ = rope.frequencies("default", **{
            name: value for name, value in settings.items()
            if name in ("head_dim", "base", "partial_rotary_factor")
        })  # fmt: skip
        lambdas = (plain.double() / inv_freq.double()).tolist()
        options = {
            "short_factor": lambdas, "long_factor": list(lambdas), "attention_factor": scale,
            "factor": factor, "original_max_position_embeddings": trained,
        }  # fmt: skip
        method = "longrope"
    for name in ("short_factor", "long_factor"):
        if name in options:
            options[name] = [float(x) for x in options[name]]
    options = {name: value for name, value in options.items() if value is not None}
    return {**out, "rope_type": method, **options}, longest
