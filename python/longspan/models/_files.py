"""A model's folder: config.json and weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longspan._files import write_json, write_weights

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_TORCH_WEIGHTS = "pytorch_model.bin"  # mamba-ssm's


def write_pretrained(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write both, each whole or not at all, the config last."""
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder / WEIGHTS, weights, {})
    write_json(folder / CONFIG, config)


def read_pretrained(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read both.

    Raises:
        FileNotFoundError: One is not there.
        ValueError: config.json holds no JSON object.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"expected a folder with {CONFIG}, got {folder}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(config).__name__}")
    if (folder / WEIGHTS).is_file():
        from safetensors.torch import load_file

        return config, load_file(folder / WEIGHTS)
    if (folder / _TORCH_WEIGHTS).is_file():
        return config, torch.load(folder / _TORCH_WEIGHTS, map_location="cpu", weights_only=True)
    raise FileNotFoundError(f"expected {WEIGHTS} or {_TORCH_WEIGHTS} in {folder}, found neither")
