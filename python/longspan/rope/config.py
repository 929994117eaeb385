"""From the configuration of a model in transformers' form to the arguments of `frequencies`."""

from collections.abc import Mapping
from typing import Any

_OLD_NAMES = {"su": "longrope", "dynamic_yarn": "yarn"}
# Where a whole configuration has what the dictionary of rotary settings may have too.
_OF_THE_MODEL = {
    "rope_theta": ("rope_theta", "rotary_emb_base"),
    "partial_rotary_factor": ("partial_rotary_factor", "rotary_pct"),
    "original_max_position_embeddings": ("original_max_position_embeddings",),
}


def from_config(
    config: Any,
    *,
    head_dim: int | None = None,
    max_position: int | None = None,
    layer_type: str | None = None,
) -> dict[str, Any]:
    """Arguments for `frequencies` and `longspan.nn.RotaryEmbedding` from a model's configuration.

    Args:
        config: A transformers configuration, what its config.json holds, or its ``rope_parameters`` or
            older ``rope_scaling`` dictionary alone. Not changed.
        head_dim: D; None is the configuration's (``head_dim``, or hidden_size / num_attention_heads).
        max_position: The model's greatest length; None is the configuration's
            (``max_position_embeddings``).
        layer_type: Whose settings, where they are nested by the type of the layer.

    Returns:
        A dictionary of ``method``, ``head_dim``, ``base``, ``max_position`` and the method's options.
        As in transformers the trained length is the greatest one where nothing else says, and an
        explicit factor of YaRN or LongRoPE counts whatever the ratio of lengths is: ``max_position``
        is then left out.

    Raises:
        TypeError: ``config`` is none of these.
        ValueError: Something is missing, or settings contradict each other. Settings that the method
            does not know raise in `frequencies`.

    Example::

        settings = longspan.rope.from_config(model.config)
        inv_freq, scale = longspan.rope.frequencies(**settings, seq_len=16384)
    """
    model, parameters = _split(config)
    parameters = _of_layer(parameters, layer_type)
    for name, labels in _OF_THE_MODEL.items():
        found = [model[label] for label in labels if model.get(label) is not None]
        for value in found:
            if parameters.setdefault(name, value) != value:
                raise ValueError(
                    f"from_config: {name}: expected one value, got {parameters[name]!r} among "
                    f"the rotary settings and {value!r} beside them"
                )
    kinds = {parameters.pop(label) for label in ("rope_type", "type") if label in parameters}
    if len(kinds) > 1:
        raise ValueError(f"from_config: rope_type: expected one, got {' and '.join(sorted(kinds))}")
    kind = kinds.pop() if kinds else "default"
    method = _OLD_NAMES.get(kind, kind)
    settings: dict[str, Any] = {"method": method, "head_dim": _head_dim(model, head_dim)}
    if "rope_theta" in parameters:
        settings["base"] = parameters.pop("rope_theta")
    if kind == "dynamic_yarn":  # ours, for transformers has no YaRN that grows
        parameters["dynamic"] = True
    longest = model.get("max_position_embeddings") if max_position is None else max_position
    if method in ("yarn", "longrope", "llama3"):
        if longest is not None:
            parameters.setdefault("original_max_position_embeddings", longest)
    elif model.get("original_max_position_embeddings") is not None:
        parameters.pop(
            "original_max_position_embeddings"
        )  # a fact of the model that this method needs not
    if method not in ("yarn", "longrope") or "factor" not in parameters:
        settings["max_position"] = longest
    return settings | parameters


def _split(config: Any) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """-> the whole configuration (empty where there is none), a copy of its rotary settings."""
    if not isinstance(config, Mapping):
        if not hasattr(config, "to_dict"):
            raise TypeError(
                f"from_config: config: expected a configuration or a dictionary, "
                f"got {type(config).__name__}"
            )
        # to_dict leaves out properties, some of which stand for what older configurations stored.
        labels = {"head_dim", "hidden_size", "num_attention_heads", "max_position_embeddings"}
        labels |= {label for names in _OF_THE_MODEL.values() for label in names}
        labels |= {"rope_parameters", "rope_scaling"}
        config = {label: getattr(config, label, None) for label in sorted(labels)}
    elif not config.keys() & {
        "rope_parameters",
        "rope_scaling",
        "hidden_size",
        "max_position_embeddings",
    }:
        return {}, _without_none(config)
    found = [config[label] for label in ("rope_parameters", "rope_scaling") if config.get(label)]
    if len(found) == 2 and found[0] != found[1]:
        raise ValueError(
            "from_config: rope_parameters: expected the same as rope_scaling, or one of them"
        )
    return config, _without_none(found[0] if found else {})


def _without_none(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in parameters.items() if value is not None}


def _of_layer(parameters: dict[str, Any], layer_type: str | None) -> dict[str, Any]:
    nested = {name: value for name, value in parameters.items() if isinstance(value, Mapping)}
    if nested:
        if layer_type not in nested:
            raise ValueError(
                f"from_config: layer_type: expected one of {', '.join(sorted(nested))}, "
                f"got {layer_type!r}"
            )
        return _without_none(nested[layer_type])
    if layer_type is not None:
        raise ValueError(
            f"from_config: layer_type: expected None, as settings are the same for all, "
            f"got {layer_type!r}"
        )
    return parameters


def _head_dim(model: Mapping[str, Any], head_dim: int | None) -> int:
    if head_dim is not None:
        return head_dim
    if model.get("head_dim") is not None:
        return model["head_dim"]
    if model.get("hidden_size") is None or not model.get("num_attention_heads"):
        raise ValueError("from_config: head_dim: expected it, as config does not say, got None")
    return model["hidden_size"] // model["num_attention_heads"]
