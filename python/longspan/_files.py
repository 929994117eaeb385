"""Files that are written whole or not at all."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Have ``write`` fill a temporary file beside ``path``, then rename it to ``path``.

    The temporary name keeps the suffix, from which matplotlib and others choose the format. On any
    error, an interrupt too, it is removed and ``path`` stays what it was.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    text = json.dumps(value, indent=2) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))  # type: ignore


def write_weights(path: Path, weights: Mapping[str, "Tensor"], metadata: Mapping[str, str]) -> None:
    """Write ``weights`` as safetensors with ``metadata`` and ``{"format": "pt"}``, atomically."""
    from safetensors.torch import save_file

    dense = {name: x.detach().contiguous() for name, x in weights.items()}

    def write(temporary: Path) -> None:
        temporary.touch()
        mode = temporary.stat().st_mode  # what the umask says; safetensors would let nobody else read it
        save_file(dense, temporary, metadata={"format": "pt", **metadata})
        temporary.chmod(mode)

    write_atomically(path, write)
