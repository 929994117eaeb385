"""Attention layers of a pretrained decoder made linear and trained to match themselves: `linearize`."""

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from longspan._files import write_weights
from longspan.hf._distill import distill, layer_errors, perplexity
from longspan.hf._features import NONLINEARITIES, AttentionFeatures
from longspan.hf._replace import (
    Undoable,
    give_back,
    known_class,
    patched_forward,
    replace_forward,
    replacements,
    unchanged_decoder,
)
from longspan.hf.linearized_forward import (
    Linearization,
    attention_forward,
    decoder_forward,
    new_cache,
)
from longspan.ops._checks import sum_dtype

Tokens = Tensor | Sequence[Tensor] | Sequence[Sequence[int]]

FILE = "linearized.safetensors"
_SETTINGS = "longspan.linearize"  # in the file's header
_FAMILIES = ("llama.Llama", "mistral.Mistral", "phi3.Phi3", "qwen2.Qwen2", "qwen3.Qwen3")
_DECODERS = tuple(f"{name}Model" for name in _FAMILIES)
_ATTENTIONS = tuple(f"{name}Attention" for name in _FAMILIES)
_HELD_OUT_SHARE, _HELD_OUT_AT_MOST = 10, 8192


class Linearized(Undoable):
    """What `linearize` made of a model; on leaving it as a context, or by `undo`, it is undone.

    Attributes:
        layers: Indices of the layers that are linear.
        window, sink_tokens, feature_map: As given to `linearize`.
        perplexity: Of the held-out tokens: "before" the model was changed, "untrained" with the maps as
            they began, "distilled" with those of now; what was not measured is not there.
        errors: For each layer the squared error of its output over the softmax output's square, the
            mean over heads, at the teacher's inputs: (untrained, distilled).

    Example::

        linearized = longspan.hf.linearize(model, tokens)
        print(linearized)
        model.generate(ids, max_new_tokens=100)
        linearized.save("smollm2-linear")
    """

    def __init__(self, model: Any, decoder: Any, linearization: Linearization, feature_map: str) -> None:
        """Made by `linearize`."""
        self._model, self._decoder, self._linearization = model, decoder, linearization
        self.feature_map = feature_map
        self.perplexity: dict[str, float] = {}
        self.errors: dict[int, tuple[float, float]] = {}
        self._steps = 0

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the layers that are linear."""
        return self._linearization.layers

    @property
    def window(self) -> int | None:
        """Last tokens that are attended to exactly."""
        return self._linearization.window or None

    @property
    def sink_tokens(self) -> int:
        """First tokens that are attended to exactly."""
        return self._linearization.sinks

    @torch.inference_mode(False)
    def distill(
        self,
        data: Tokens,
        *,
        steps: int = 100,
        length: int = 1024,
        batch: int = 1,
        lr: float = 0.02,
        seed: int = 0,
        held_out: Tokens | None = None,
        progress: bool = True,
    ) -> None:
        """Train the feature maps further; arguments, and what raises, as of `linearize`.

        An interrupt leaves them as they are by then, fit for use and for `save`.
        """
        name = "distill"
        self._check_in_place(name)
        training, judging = _split(name, data, held_out)
        _check_training(name, training, judging, steps, length, batch, lr, self._linearization)
        self._run(training, judging, steps, length, batch, lr, seed, progress)

    def _run(
        self,
        training: Tensor,
        judging: Tensor,
        steps: int,
        length: int,
        batch: int,
        lr: float,
        seed: int,
        progress: bool,
    ) -> None:
        attentions = _attentions(self._decoder, self.layers)
        held = self._decoder, attentions, self._linearization
        before = layer_errors(*held, judging, length)
        if self._steps == 0:
            self.perplexity["untrained"] = perplexity(
                self._model, judging, length, "untrained", progress
            )
        distill(*held, training, steps, length, batch, lr, seed, self._steps == 0, progress)
        self._steps += steps
        after = layer_errors(*held, judging, length)
        began = {i: self.errors[i][0] if i in self.errors else before[i] for i in self.layers}
        self.errors = {i: (began[i], after[i]) for i in self.layers}
        self.perplexity["distilled"] = perplexity(self._model, judging, length, "distilled", progress)

    def new_cache(self) -> Cache:
        """Return an empty cache for this model; calls without one get theirs by themselves."""
        self._check_in_place("new_cache")
        return new_cache(self._linearization, self._decoder.config)

    def save(self, folder: str | Path) -> Path:
        """Write the feature maps and what `load_linearized` needs, and the report, into ``folder``.

        One file, ``linearized.safetensors`` with the settings as JSON in its header, whole or not at
        all; beside what ``save_pretrained`` writes, if you like, though it stands alone.

        Returns:
            The file.
        """
        self._check_in_place("save")
        weights = {
            f"{i}.{name}": x
            for i, attention in zip(self.layers, _attentions(self._decoder, self.layers))
            for name, x in attention.linear_features.state_dict().items()
        }
        settings = {
            "version": 1,
            "layers": list(self.layers),
            "window": self.window,
            "sink_tokens": self.sink_tokens,
            "feature_map": self.feature_map,
            "steps": self._steps,
            "perplexity": self.perplexity,
            "errors": {str(i): list(pair) for i, pair in self.errors.items()},
        }
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_weights(folder / FILE, weights, {_SETTINGS: json.dumps(settings)})
        return folder / FILE

    def undo(self) -> None:
        """Give the layers their own attention back; harmless where that was done already.

        Caches that were filled before raise if the model then goes on with them.
        """
        attentions = _attentions(self._decoder, self.layers)
        give_back([self._decoder, *attentions])
        for attention in attentions:
            if hasattr(attention, "linear_features"):
                del attention.linear_features

    def _in_place(self) -> bool:
        return any(replacements([self._decoder]))

    def _check_in_place(self, name: str) -> None:
        if not self._in_place():
            raise RuntimeError(
                f"Linearized.{name}: expected a model that is linear, got one after undo()"
            )

    def __repr__(self) -> str:
        """The report."""
        if not self._in_place():
            return "Linearized(undone)"
        exact = f"sinks {self.sink_tokens}, window {self.window}" if self.window else "no exact part"
        lines = [
            f"Linearized({type(self._model).__name__}",
            f"  layers: {len(self.layers)} of {self._decoder.config.num_hidden_layers}, {exact}",
        ]
        if self.perplexity:
            numbers = ", ".join(f"{x:.2f} {name}" for name, x in self.perplexity.items())
            lines.append(f"  perplexity: {numbers}")
        if self.errors:
            means = [sum(pair[i] for pair in self.errors.values()) / len(self.errors) for i in (0, 1)]
            lines.append(f"  error of a layer's output: {means[0]:.3f} -> {means[1]:.3f}")
        return "\n".join(lines) + ")"


@torch.inference_mode(False)
def linearize(
    model: nn.Module,
    data: Tokens,
    *,
    layers: Sequence[int] | Literal["all"] = "all",
    window: int | None = 256,
    sink_tokens: int | None = None,
    feature_map: str = "hedgehog",
    steps: int = 100,
    length: int = 1024,
    batch: int = 1,
    lr: float = 0.02,
    seed: int = 0,
    held_out: Tokens | None = None,
    progress: bool = True,
) -> Linearized:
    """Replace attention layers of a pretrained decoder by linear attention, trained to match them.

    For Llama, Mistral, Phi-3, Qwen2 and Qwen3 models. A replaced layer keeps its projections and its
    rotation. It attends exactly to the first ``sink_tokens`` tokens and the last ``window``, and to all
    between linearly, by ``phi_q(q) . phi_k(k)``, under one normaliser (Zhang et al. 2024, LoLCATs). So
    its time is linear in the tokens, and generation keeps a state of constant size, however long the
    text: ``(sink_tokens + window) * 2 D`` numbers in the model's dtype and ``F (D + 1)`` float32 numbers
    for each key head, F = 2 D features with "hedgehog".

    phi are feature maps with parameters of each head: ``f(x W + b) exp(x . m)``, with Hedgehog's softmax
    over both signs (Zhang et al. 2024, The Hedgehog & the Porcupine) as f by default. They are trained
    so that each layer's output is what its softmax attention gives at the inputs of the unchanged
    model: nothing else is trained, layers are trained at once, independently, and no gradient passes
    through the model. Before the first step each head's linear part is given the weight that the
    tokens have that it stands for. Maps are float32 parameters (float64 for float64) in the modules, as
    ``linear_features``: an optimizer over ``model.parameters()`` goes on with them, and
    ``save_pretrained`` writes them too, which ``from_pretrained`` then reports as unexpected.

    ``generate`` works as before (beams, left padding, prompts in chunks); a call without a cache, or
    with an empty DynamicCache, gets one by itself whose replaced layers do not grow. Sequences packed
    by ``position_ids`` that count anew or by ``cu_seq_lens_q`` are kept apart where there is no cache.
    Padding on the right is right for the tokens before it, but its cache cannot be continued. Attention
    dropout is not applied in replaced layers.

    Args:
        model: A transformers model with a language-model head and one of these decoders in it.
        data: Tokens to train on: (N,) integers, or a list of texts' tokens, laid end to end.
        layers: Which are replaced, indices from 0, negative ones from the end; "all" is each that has
            full attention (one with a sliding window of its own is of constant size as it is).
        window: Tokens that a token sees exactly, itself included; None is no exact part at all.
        sink_tokens: First tokens that are seen exactly too (attention sinks); None is 4, or 0 without
            a window, where they are not for.
        feature_map: f: "hedgehog", "elu" (elu + 1), "relu" or "softmax".
        steps: Of the training; 0 leaves the maps as they begin. `Linearized.distill` goes on.
        length: Tokens of a window of text, in training and in judging; more than window + sink_tokens.
        batch: Windows in a step, from anywhere in ``data``.
        lr: Adam's greatest; it warms up over 5 steps and falls to 0 as a cosine.
        seed: Of the windows drawn; torch's generator is not touched.
        held_out: Tokens to judge by, as ``data``; None keeps the last tenth of ``data`` apart, at most
            8192 tokens. They are never trained on.
        progress: Whether bars are shown.

    Returns:
        `Linearized`: perplexities of the held-out tokens before, right after and after training, each
        layer's errors, ``save``, ``distill`` and ``undo``. Where anything raises, an interrupt too, the
        model is as it was.

    Raises:
        TypeError: ``model`` is no torch module, or tokens are no integers.
        ValueError: There is no such decoder with a head, or more than one; it is linearized or extended
            already; there are too few tokens; or a value does not fit.
        A call of the model raises ValueError for ``output_attentions``, a mask with holes or of four
        dimensions, and caches that are not its own.

    Example::

        tokens = torch.tensor(tokenizer(text).input_ids)
        linearized = longspan.hf.linearize(model, tokens, window=256, steps=100)
        print(linearized.perplexity)
        model.generate(ids, max_new_tokens=1000)
        linearized.save("linear")  # longspan.hf.load_linearized(model, "linear") brings it back
    """
    name = "linearize"
    decoder = _decoder(name, model)
    linearization = _settings(name, decoder, layers, window, sink_tokens, feature_map)
    training, judging = _split(name, data, held_out)
    _check_training(name, training, judging, steps, length, batch, lr, linearization)
    before = perplexity(model, judging, length, "before", progress)
    linearized = Linearized(model, decoder, linearization, feature_map)
    linearized.perplexity["before"] = before
    try:
        _replace(linearized)
        linearized._run(training, judging, steps, length, batch, lr, seed, progress)
    except BaseException:
        linearized.undo()
        raise
    return linearized


@torch.inference_mode(False)
def load_linearized(model: nn.Module, folder: str | Path) -> Linearized:
    """Linearize a model as `Linearized.save` wrote it; ``model`` is the one that was linearized then.

    Args:
        model: As for `linearize`, with the weights it had.
        folder: That was saved to.

    Returns:
        `Linearized`, with the report of then.

    Raises:
        TypeError: ``model`` is no torch module.
        FileNotFoundError: There is no such file in ``folder``.
        ValueError: As `linearize`; the file is another one's, or of a model of other sizes.

    Example::

        model = AutoModelForCausalLM.from_pretrained(name)
        longspan.hf.load_linearized(model, "linear")
    """
    from safetensors import SafetensorError, safe_open

    name = "load_linearized"
    decoder = _decoder(name, model)
    path = Path(folder) / FILE
    if not path.is_file():
        raise FileNotFoundError(f"{name}: folder: expected one with {FILE}, got {folder}")
    try:
        with safe_open(path, framework="pt") as file:
            settings = json.loads((file.metadata() or {})[_SETTINGS])
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{name}: folder: expected what Linearized.save wrote, got {path}") from error
    feature_map = settings["feature_map"]
    linearization = _settings(
        name, decoder, settings["layers"], settings["window"], settings["sink_tokens"], feature_map
    )
    linearized = Linearized(model, decoder, linearization, feature_map)
    linearized.perplexity, linearized._steps = settings["perplexity"], settings["steps"]
    linearized.errors = {int(i): (pair[0], pair[1]) for i, pair in settings["errors"].items()}
    try:
        _replace(linearized)
        for i, attention in zip(linearization.layers, _attentions(decoder, linearization.layers)):
            own = {key.split(".", 1)[1]: x for key, x in weights.items() if key.startswith(f"{i}.")}
            attention.linear_features.load_state_dict(own)
    except RuntimeError as error:  # what load_state_dict raises
        linearized.undo()
        raise ValueError(
            f"{name}: model: expected one of the sizes that {path} is for: {error}"
        ) from error
    return linearized


def _replace(linearized: Linearized) -> None:
    decoder, linearization = linearized._decoder, linearized._linearization
    for attention in _attentions(decoder, linearization.layers):
        weight = attention.o_proj.weight
        size = attention.head_dim
        heads, groups = decoder.config.num_attention_heads, decoder.config.num_key_value_heads
        attention.linear_features = AttentionFeatures(
            linearized.feature_map, heads, groups, size, attention.scaling, linearization.window > 0,
            device=weight.device, dtype=sum_dtype(weight),
        )  # fmt: skip
        replace_forward(attention, attention_forward)
    names = tuple(inspect.signature(type(decoder).forward).parameters)[1:]
    replace_forward(
        decoder, decoder_forward, linearization=linearization, names=names,
        inner=patched_forward(decoder),
    )  # fmt: skip


def _attentions(decoder: Any, layers: Sequence[int]) -> list[Any]:
    return [decoder.layers[i].self_attn for i in layers]


# ---- checks


def _decoder(name: str, model: Any) -> Any:
    decoder = unchanged_decoder(name, model, _DECODERS)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        raise ValueError(
            f"{name}: model: expected a language-model head, such as LlamaForCausalLM has, got "
            f"{type(model).__name__}"
        )
    return decoder


def _settings(
    name: str, decoder: Any, layers: Any, window: Any, sink_tokens: Any, feature_map: Any
) -> Linearization:
    def wrong(label: str, expected: str, got: Any) -> ValueError:
        return ValueError(f"{name}: {label}: expected {expected}, got {got!r}")

    if window is not None and (not isinstance(window, int) or window < 1):
        raise wrong("window", "a number of tokens from 1, or None", window)
    sinks = (4 if window else 0) if sink_tokens is None else sink_tokens
    if not isinstance(sinks, int) or sinks < 0:
        raise wrong("sink_tokens", "a number of tokens from 0, or None", sink_tokens)
    if sinks and window is None:
        raise wrong("sink_tokens", "0 or None without a window", sink_tokens)
    if feature_map not in NONLINEARITIES:
        raise wrong("feature_map", f"one of {', '.join(NONLINEARITIES)}", feature_map)

    count = len(decoder.layers)
    sliding = {i for i in range(count) if _slides(decoder, i)}
    if isinstance(layers, str):
        if layers != "all":
            raise wrong("layers", "indices or 'all'", layers)
        chosen = [i for i in range(count) if i not in sliding]
    else:
        chosen = list(layers)
        for i in chosen:
            if not isinstance(i, int) or not -count <= i < count:
                raise wrong("layers", f"indices from {-count} to {count - 1}", i)
        chosen = sorted({i % count for i in chosen})
    if sliding.intersection(chosen):
        raise wrong("layers", "layers with full attention", sorted(sliding.intersection(chosen)))
    if not chosen:
        raise wrong("layers", "at least one layer with full attention", layers)
    for attention in _attentions(decoder, chosen):
        if known_class(type(attention), _ATTENTIONS) is None:
            raise wrong("model", "attention of transformers' own classes", type(attention).__name__)
        if any(replacements([attention])) or patched_forward(attention) is not None:
            raise wrong("model", "attention layers with the forward of their class", "another one")
    return Linearization(tuple(chosen), window or 0, sinks)


def _slides(decoder: Any, i: int) -> bool:
    config = decoder.config
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return kinds[i] == "sliding_attention"
    return getattr(config, "sliding_window", None) is not None


def _split(name: str, data: Any, held_out: Any) -> tuple[Tensor, Tensor]:
    """Tokens to train on and to judge by."""
    training = _tokens(name, "data", data)
    if held_out is not None:
        return training, _tokens(name, "held_out", held_out)
    apart = len(training) // _HELD_OUT_SHARE
    return training[: len(training) - apart], training[len(training) - apart :][:_HELD_OUT_AT_MOST]


def _tokens(name: str, label: str, given: Any) -> Tensor:
    """(N,) int64."""
    if isinstance(given, (str, bytes)) or not isinstance(given, (Tensor, Sequence)):
        raise TypeError(
            f"{name}: {label}: expected (N,) integers or a list of texts' tokens, got "
            f"{type(given).__name__}"
        )
    if isinstance(given, Tensor):
        parts = [given]
    elif all(isinstance(x, int) for x in given):
        parts = [torch.tensor(given, dtype=torch.int64)]
    else:
        parts = [torch.as_tensor(x) for x in given]
    for x in parts:
        if x.dim() != 1 or x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
            raise TypeError(
                f"{name}: {label}: expected (N,) integers or a list of them, got {x.dtype} "
                f"{tuple(x.shape)}"
            )
    return torch.cat([x.long().cpu() for x in parts])


def _check_training(
    name: str,
    training: Tensor,
    judging: Tensor,
    steps: int,
    length: int,
    batch: int,
    lr: float,
    linearization: Linearization,
) -> None:
    least = linearization.window + linearization.sinks + 1
    for label, value, lowest in (
        ("steps", steps, 0),
        ("length", length, max(least, 2)),
        ("batch", batch, 1),
    ):
        if not isinstance(value, int) or value < lowest:
            raise ValueError(f"{name}: {label}: expected a number from {lowest} on, got {value!r}")
    if not 0 < lr < float("inf"):
        raise ValueError(f"{name}: lr: expected a positive number, got {lr!r}")
    if len(training) < length:
        raise ValueError(
            f"{name}: data: expected length tokens or more besides those held out, {length}, got "
            f"{len(training)}"
        )
    if len(judging) < length:
        raise ValueError(
            f"{name}: held_out: expected length tokens or more, {length}, got {len(judging)}"
        )
