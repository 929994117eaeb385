"""A model that reads further than it was trained to: `extend_context`."""

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers.cache_utils import Cache

from longspan.hf._pass import CacheKind, Extension
from longspan.hf._replace import (
    Undoable,
    give_back,
    patched_forward,
    replace_forward,
    unchanged_decoder,
)
from longspan.hf.attention import register
from longspan.hf.caches import CACHES
from longspan.hf.extended_attention import WINDOWED, register_extended, unrotated_name
from longspan.hf.extended_forward import decoder_forward, new_cache, rotary_forward, unturned_forward
from longspan.hf.rope_methods import scaled_settings

_DECODERS = (
    "gpt_neox.GPTNeoXModel",
    "llama.LlamaModel",
    "mistral.MistralModel",
    "phi.PhiModel",
    "phi3.Phi3Model",
    "qwen2.Qwen2Model",
    "qwen3.Qwen3Model",
)
# What a rotary embedding of transformers keeps about its frequencies.
_KEPT = (
    "rope_type", "inv_freq", "original_inv_freq", "attention_scaling", "max_seq_len_cached",
    "original_max_seq_len", "long_inv_freq",
)  # fmt: skip
_OF_CONFIG = ("rope_parameters", "max_position_embeddings", "original_max_position_embeddings")


class Extended(Undoable):
    """What `extend_context` changed; on leaving it as a context, or by `undo`, it is undone.

    Attributes:
        settings: Arguments of `longspan.rope.frequencies` that the model runs with now.
        rope_parameters: The same as the model's configuration has it, for ``save_pretrained``.

    Example::

        with longspan.hf.extend_context(model, "yarn", factor=4) as extended:
            print(extended)
            model.generate(ids)
    """

    def __init__(
        self, model: Any, decoder: Any, extension: Extension, changes: dict[str, tuple[Any, Any]]
    ) -> None:
        """Made by `extend_context`."""
        self._model, self._decoder, self._extension = model, decoder, extension
        self._changes = changes  # name -> (before, after)
        self._put_back: list[Callable[[], None]] = []

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of `longspan.rope.frequencies`."""
        return dict(self._extension.settings)

    @property
    def rope_parameters(self) -> dict[str, Any]:
        """The model's own, in transformers' form."""
        return copy.deepcopy(self._changes["rope_parameters"][1])

    @property
    def changes(self) -> dict[str, tuple[Any, Any]]:
        """By name, what each setting was before and what it is now, where those differ."""
        return {
            name: (before, after) for name, (before, after) in self._changes.items() if before != after
        }

    @property
    def tokens_seen(self) -> int | None:
        """How many tokens a token sees at most, itself included; None is all of those before it."""
        window = self._extension.window
        return None if window is None else window + self._extension.sink_tokens

    def new_cache(self) -> Cache:
        """Return an empty cache for this model; calls without one get theirs by themselves."""
        return new_cache(self._extension, self._decoder.config)

    def undo(self) -> None:
        """Put back what was there before; harmless where that was done already.

        Caches that were filled before raise if the model then goes on with them: their keys were
        rotated, or left unrotated, for the extension.
        """
        give_back([self._decoder, self._decoder.rotary_emb])
        while self._put_back:
            self._put_back.pop()()

    def __repr__(self) -> str:
        """What changed, a line each."""
        if not self._put_back:
            return "Extended(undone)"
        lines = [f"Extended({type(self._model).__name__}"]
        for name, (before, after) in self.changes.items():
            lines.append(f"  {name}: {_short(before)} -> {_short(after)}")
        return "\n".join(lines) + ")"


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_short(x)}" for key, x in value.items()) + "}"
    if isinstance(value, list) and len(value) > 4:
        return f"[{value[0]:.4g} ... {value[-1]:.4g}: {len(value)} numbers]"
    return f"{value:.6g}" if isinstance(value, float) else f"{value}"


def extend_context(
    model: nn.Module,
    method: str | Mapping[str, Any] | None = "yarn",
    factor: float | None = None,
    attention: str | None = "longspan",
    window: int | None = None,
    sink_tokens: int = 4,
    cache: CacheKind = "full",
    **method_options: Any,
) -> Extended:
    """Have a pretrained model read further than it was trained to, without training it anew.

    Replaces the frequencies of the model's rotary embedding, sets its attention implementation, and
    gives it a cache. For Llama, Mistral, Phi, Phi-3, Qwen2, Qwen3 and GPT-NeoX models; weights stay.

    ``cache`` says what is kept of keys and values, in forwards and ``generate`` alike (beams, left
    padding and prompts in chunks included); a call without a cache, or with an empty DynamicCache,
    gets it by itself:

    - ``"full"``: all, rotated. Caches of transformers may be passed too. Where frequencies change
      with the length (dynamic, longrope, dynamic_linear, dynamic YaRN), keys that are in it keep the
      older ones, as in transformers.
    - ``"unrotated"``: all, as they were before rotation, and a rotated copy that is made again when
      frequencies change. Each forward then rotates its queries and all keys by the frequencies of
      its own length, so a token's attention to the cached keys is what it is in one pass over the
      text (Peng et al. 2023, section 3.3). What earlier tokens handed on to deeper layers stays as
      it was computed, with the frequencies of their time.
    - ``"window"``: StreamingLLM (Xiao et al. 2023). The first ``sink_tokens`` tokens of each sequence
      and the last ``window``, in constant memory, so that generation goes on for ever; positions
      count within the cache, so the model needs no more than window + sink_tokens of them. Any
      split of a text into forwards gives the same. Dynamic methods take window + sink_tokens for the
      length.

    The model's configuration is changed too: ``save_pretrained`` writes, and ``from_pretrained`` alone
    restores, the frequencies (attention and cache are set anew by ``extend_context(model, None, ...)``).
    Methods that transformers has not and that do not look at the length are stored as longrope with
    the same factors; dynamic_linear and dynamic YaRN under names that `longspan.hf.register` makes
    known.

    Angles are computed in float64 whatever the model's dtype: positions neither collide nor lose
    digits, also beyond 2^24. The trained length is the configuration's
    ``original_max_position_embeddings``, or else ``max_position_embeddings``, which for the methods
    that do not grow with the text becomes ``factor`` times as much.

    Args:
        model: A transformers model with one of these decoders in it.
        method: One of `longspan.rope.METHODS`; a ``rope_parameters`` dictionary, such as
            ``longspan rope search`` writes; None is what the configuration has.
        factor: How many times longer than the trained length; None is 4, or for a dictionary what it
            says. Not for methods without one (default, dynamic_linear).
        attention: The implementation; None leaves it. With ``cache="window"`` "longspan".
        window: For ``cache="window"``: how many last tokens a token sees, itself included.
        sink_tokens: For ``cache="window"``: how many first tokens it sees besides, 0 or more.
        cache: "full", "unrotated" or "window".
        **method_options: The method's, as in `longspan.rope.frequencies`.

    Returns:
        `Extended`, which prints what changed, undoes it, and makes caches.

    Raises:
        TypeError: ``model`` is no torch module, or an option is not known to the method.
        ValueError: There is no decoder, or more than one, that this is for; the model is extended or
            linearized already, or its configuration has another scaling than the one asked for
            (scalings do not compose); settings do not fit or contradict each other.

    Example::

        model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M")
        print(longspan.hf.extend_context(model, "yarn", factor=4))
        model.save_pretrained("longer")

        longspan.hf.extend_context(model, None, cache="window", window=1020)
    """
    decoder = unchanged_decoder("extend_context", model, _DECODERS)
    _check_cache(cache, attention, window, sink_tokens, decoder)
    register()
    register_extended()
    config = decoder.config
    settings, stored, longest = scaled_settings(config, method, factor, method_options)
    extension = Extension(settings, cache, window, sink_tokens if cache == "window" else 0)

    target = model if hasattr(model, "set_attn_implementation") else decoder
    implementation = config._attn_implementation if attention is None else attention
    before = {name: getattr(config, name) for name in _OF_CONFIG if hasattr(config, name)}
    after = {**before, "rope_parameters": stored, "max_position_embeddings": longest}
    if "original_max_position_embeddings" in stored and "original_max_position_embeddings" in before:
        # Phi-3's own, which goes before the dictionary's.
        after["original_max_position_embeddings"] = stored["original_max_position_embeddings"]
    changes = {name: (copy.deepcopy(before[name]), after[name]) for name in before}
    changes["attention"] = (config._attn_implementation, implementation)
    changes["cache"] = ("transformers' own", CACHES[cache].__name__)

    if cache == "unrotated":
        implementation = unrotated_name(implementation)
    elif cache == "window":
        implementation = WINDOWED
        changes["window"] = (None, window)
        changes["sink_tokens"] = (None, sink_tokens)
    extended = Extended(model, decoder, extension, changes)
    try:
        _change(extended, target, before, after, implementation)
    except BaseException:
        extended.undo()
        raise
    return extended


def _change(
    extended: Extended, target: Any, before: dict[str, Any], after: dict[str, Any], implementation: str
) -> None:
    decoder, extension = extended._decoder, extended._extension
    config, rotary = decoder.config, decoder.rotary_emb
    kept = {name: getattr(rotary, name) for name in _KEPT if hasattr(rotary, name)}

    def put_back() -> None:
        for name, value in before.items():
            setattr(config, name, value)
        for name in _KEPT:
            if name in kept:
                setattr(rotary, name, kept[name])
            elif hasattr(rotary, name):
                delattr(rotary, name)

    extended._put_back.append(
        functools.partial(target.set_attn_implementation, config._attn_implementation)
    )
    extended._put_back.append(put_back)
    for name, value in after.items():
        setattr(config, name, copy.deepcopy(value))
    # As from_pretrained would make it, for whoever looks at the module's numbers.
    fresh = type(rotary)(config).to(rotary.inv_freq.device)
    for name in _KEPT:
        if hasattr(fresh, name):
            setattr(rotary, name, getattr(fresh, name))
    target.set_attn_implementation(implementation)

    names = tuple(inspect.signature(type(decoder).forward).parameters)[1:]
    replace_forward(
        decoder, decoder_forward, extension=extension, names=names, implementation=implementation,
        inner=patched_forward(decoder),
    )  # fmt: skip
    forward = rotary_forward if extension.kind == "full" else unturned_forward
    replace_forward(rotary, forward, extension=extension)


# ---- checks


def _check_cache(
    cache: str, attention: str | None, window: int | None, sink_tokens: int, decoder: Any
) -> None:
    def wrong(name: str, expected: str, got: Any) -> ValueError:
        return ValueError(f"extend_context: {name}: expected {expected}, got {got!r}")

    if cache not in CACHES:
        raise wrong("cache", "full, unrotated or window", cache)
    if cache != "window":
        if window is not None:
            raise wrong("window", f"None with cache={cache!r}", window)
        if sink_tokens != 4:
            raise wrong("sink_tokens", f"its default, 4, with cache={cache!r}", sink_tokens)
        return
    if not isinstance(window, int) or window < 1:
        raise wrong("window", "a number of tokens from 1 with cache='window'", window)
    if not isinstance(sink_tokens, int) or sink_tokens < 0:
        raise wrong("sink_tokens", "a number of tokens from 0", sink_tokens)
    if attention != "longspan":
        raise wrong("attention", "longspan with cache='window'", attention)
    owners = [decoder.config]
    owners += decoder.modules()
    sizes = [getattr(owner, "sliding_window", None) for owner in owners]
    narrow = [size for size in sizes if isinstance(size, int) and size < window]
    if narrow and getattr(decoder.config, "use_sliding_window", True):
        raise wrong("window", f"no more than the model's own sliding window, {min(narrow)}", window)
