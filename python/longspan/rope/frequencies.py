"""The frequencies that rotary position embedding turns with, by every scaling method.

Computed in float64 and rounded once. With pairs i from 0 to d/2 - 1 of d rotated channels, base b and
theta_i = b^(-2 i / d), each method below says what becomes of theta_i.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Model:
    """What the arguments of `frequencies` say about the model, checked."""

    head_dim: int
    dim: int  # of it are rotated
    base: float
    max_position: int | None
    original: int | None  # original_max_position_embeddings
    seq_len: int | None

    def theta(self, base: float | None = None) -> Tensor:
        exponent = torch.arange(0, self.dim, 2, dtype=torch.float64) / self.dim
        return (self.base if base is None else base) ** -exponent

    def trained(self) -> int:
        """The length that the model was trained for."""
        found = self.original if self.original is not None else self.max_position
        if found is None:
            raise ValueError(
                "frequencies: original_max_position_embeddings: expected it, or max_position, got None"
            )
        return found

    def stretch(self, base: float, factor: float) -> float:
        """The base with which the lowest frequency is ``factor`` times lower, the highest the same."""
        if self.dim == 2:
            raise ValueError(
                "frequencies: head_dim: expected more than 2 rotated channels where the base is "
                "changed, got 2"
            )
        return base * factor ** (self.dim / (self.dim - 2))

    def ramp(self, low_rotations: float, high_rotations: float, truncate: bool = True) -> Tensor:
        """From 0 at the pair that turns ``low_rotations`` times over the trained length to 1."""

        def pair(rotations: float) -> float:
            turns = self.trained() / (rotations * 2 * math.pi)
            return self.dim * math.log(turns) / (2 * math.log(self.base))

        low, high = pair(low_rotations), pair(high_rotations)
        if truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        if low == high:
            high += 0.001
        pairs = torch.arange(self.dim // 2, dtype=torch.float64)
        return ((pairs - low) / (high - low)).clamp(0, 1)


_Result = tuple[Tensor, float]
_REQUIRED = object()  # the default of an option that has none


def _number(name: str, value: Any, least: float = 0.0, *, inclusive: bool = False) -> float:
    """A finite number above ``least``, or from there on."""
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or value < least or (value == least and not inclusive):
        above = f"of {least:g} or more" if inclusive else f"above {least:g}"
        raise ValueError(f"frequencies: {name}: expected a number {above}, got {value!r}")
    return float(value)


def _factor(value: Any) -> float:
    return _number("factor", value, 1.0, inclusive=True)


def _implied_factor(m: _Model, factor: Any) -> float:
    """``factor``, or the ratio of the lengths where it is None."""
    if m.original is None or m.max_position is None:
        if factor is None:
            raise ValueError(
                "frequencies: factor: expected it, or max_position and "
                "original_max_position_embeddings, got None"
            )
        return _factor(factor)
    implied = m.max_position / m.original
    if factor is None:
        return _factor(implied)
    if implied not in (1, factor):
        raise ValueError(
            f"frequencies: factor: expected max_position / original_max_position_embeddings = "
            f"{implied:g} where both are given, or None, got {factor!r}"
        )
    return _factor(factor)


def _trained_before_growth(m: _Model) -> int:
    if m.max_position is None:
        raise ValueError("frequencies: max_position: expected the trained length, got None")
    return m.max_position


def _default(m: _Model) -> _Result:
    return m.theta(), 1.0


def _linear(m: _Model, factor: Any) -> _Result:
    return m.theta() / _factor(factor), 1.0


def _ntk(m: _Model, factor: Any) -> _Result:
    return m.theta(m.stretch(m.base, _factor(factor))), 1.0


def _dynamic(m: _Model, factor: Any) -> _Result:
    trained, factor = _trained_before_growth(m), _factor(factor)
    length = max(m.seq_len or 0, trained)
    return m.theta(m.stretch(m.base, factor * length / trained - (factor - 1))), 1.0


def _dynamic_linear(m: _Model) -> _Result:
    trained = _trained_before_growth(m)
    return m.theta() * (trained / max(m.seq_len or 0, trained)), 1.0


def _pair(name: str, value: Any) -> tuple[float, float]:
    if not isinstance(value, Sequence) or len(value) != 2:
        raise ValueError(f"frequencies: {name}: expected two numbers, got {value!r}")
    high, low = (_number(name, x) for x in value)
    if high < low:
        raise ValueError(f"frequencies: {name}: expected the greater number first, got {value!r}")
    return high, low


def _ntk_by_parts(m: _Model, factor: Any, ntk_rotations: Any, base_rotations: Any) -> _Result:
    factor = _implied_factor(m, factor)
    lowered = m.theta(m.stretch(m.base, factor))
    ramp = m.ramp(*_pair("ntk_rotations", ntk_rotations))
    mixed = m.theta() / factor * ramp + lowered * (1 - ramp)
    ramp = m.ramp(*_pair("base_rotations", base_rotations))
    return mixed * ramp + m.theta() * (1 - ramp), 1.0


def _yarn(
    m: _Model, factor: Any, attention_factor: Any, beta_fast: Any, beta_slow: Any, mscale: Any,
    mscale_all_dim: Any, truncate: Any, dynamic: Any,
) -> _Result:  # fmt: skip
    for name, value in (("truncate", truncate), ("dynamic", dynamic)):
        if not isinstance(value, bool):
            raise ValueError(f"frequencies: {name}: expected True or False, got {value!r}")
    if dynamic:
        if factor is not None:
            raise ValueError(
                f"frequencies: factor: expected None where dynamic, as seq_len decides, got {factor!r}"
            )
        factor = max(1.0, (m.seq_len or 0) / m.trained())
    else:
        factor = _implied_factor(m, factor)
    fast, slow = _pair("beta_fast and beta_slow", (beta_fast, beta_slow))
    if attention_factor is None:

        def temperature(scale: float) -> float:
            return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

        scales = [
            None if x is None else _number(name, x, inclusive=True)
            for name, x in (("mscale", mscale), ("mscale_all_dim", mscale_all_dim))
        ]
        if scales[0] and scales[1]:
            attention_factor = temperature(scales[0]) / temperature(scales[1])
        else:
            attention_factor = temperature(1.0)
    elif mscale is not None or mscale_all_dim is not None:
        raise ValueError(
            "frequencies: attention_factor: expected None beside mscale and mscale_all_dim, which "
            f"decide it, got {attention_factor!r}"
        )
    ramp = m.ramp(fast, slow, truncate)
    inv_freq = m.theta() / factor * ramp + m.theta() * (1 - ramp)
    return inv_freq, _number("attention_factor", attention_factor)


def _longrope(
    m: _Model, factor: Any, short_factor: Any, long_factor: Any, attention_factor: Any,
    short_mscale: Any, long_mscale: Any,
) -> _Result:  # fmt: skip
    lists = {"short_factor": short_factor, "long_factor": long_factor}
    for name, values in lists.items():
        if not isinstance(values, Sequence) or len(values) != m.dim // 2:
            got = f"{len(values)} of them" if isinstance(values, Sequence) else repr(values)
            raise ValueError(f"frequencies: {name}: expected {m.dim // 2} numbers, got {got}")
        lists[name] = [_number(name, x) for x in values]
    trained = m.trained()
    if trained < 2:
        raise ValueError(
            "frequencies: original_max_position_embeddings: expected 2 or more, as its logarithm "
            f"divides, got {trained}"
        )
    if (short_mscale is None) != (long_mscale is None):
        raise ValueError(
            "frequencies: short_mscale and long_mscale: expected both or neither, "
            f"got {short_mscale} and {long_mscale}"
        )
    long = (m.seq_len or 0) > trained
    inv_freq = m.theta() / torch.tensor(
        lists["long_factor" if long else "short_factor"], dtype=torch.float64
    )
    if attention_factor is not None or long_mscale is not None:
        if factor is not None:
            _implied_factor(m, factor)  # the attention factor is all that it decides
    else:
        attention_factor = math.sqrt(1 + math.log(_implied_factor(m, factor)) / math.log(trained))
    if long_mscale is None:
        return inv_freq, _number("attention_factor", attention_factor)
    if attention_factor is not None and attention_factor != long_mscale:
        raise ValueError(
            "frequencies: attention_factor: expected long_mscale beside it, "
            f"{long_mscale}, or None, got {attention_factor}"
        )
    scales = _number("short_mscale", short_mscale), _number("long_mscale", long_mscale)
    return inv_freq, scales[long]


def _llama3(m: _Model, factor: Any, low_freq_factor: Any, high_freq_factor: Any) -> _Result:
    factor = _factor(factor)
    high, low = _pair("high_freq_factor and low_freq_factor", (high_freq_factor, low_freq_factor))
    if high == low:
        raise ValueError(
            f"frequencies: high_freq_factor: expected more than low_freq_factor, {low:g}, got {high:g}"
        )
    theta = m.theta()
    turns = m.trained() * theta / (2 * math.pi)  # over the trained length
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return theta / factor * (1 - kept) + theta * kept, 1.0


def _proportional(m: _Model, factor: Any) -> _Result:
    exponent = torch.arange(0, m.dim, 2, dtype=torch.float64) / m.head_dim
    unturned = torch.zeros((m.head_dim - m.dim) // 2, dtype=torch.float64)
    return torch.cat([m.base**-exponent, unturned]) / _factor(factor), 1.0


# Each method and its options with their defaults; seq_len, max_position and the original length are
# facts about the model and the text, which a method may be indifferent to.
_METHODS: dict[str, tuple[Callable[..., _Result], dict[str, Any]]] = {
    "default": (_default, {}),
    "linear": (_linear, {"factor": _REQUIRED}),
    "ntk": (_ntk, {"factor": _REQUIRED}),
    "dynamic": (_dynamic, {"factor": _REQUIRED}),
    "dynamic_linear": (_dynamic_linear, {}),
    "ntk_by_parts": (
        _ntk_by_parts,
        {"factor": None, "ntk_rotations": (1.25, 0.75), "base_rotations": (16.0, 2.0)},
    ),
    "yarn": (
        _yarn,
        {
            "factor": None, "attention_factor": None, "beta_fast": 32.0, "beta_slow": 1.0,
            "mscale": None, "mscale_all_dim": None, "truncate": True, "dynamic": False,
        },
    ),
    "longrope": (
        _longrope,
        {
            "factor": None, "short_factor": _REQUIRED, "long_factor": _REQUIRED,
            "attention_factor": None, "short_mscale": None, "long_mscale": None,
        },
    ),
    "llama3": (
        _llama3,
        {"factor": _REQUIRED, "low_freq_factor": _REQUIRED, "high_freq_factor": _REQUIRED},
    ),
    "proportional": (_proportional, {"factor": 1.0}),
}  # fmt: skip

METHODS = tuple(_METHODS)


def takes_factor(method: str) -> bool:
    """Whether ``factor`` is among the options of this method; not for one that is not known."""
    return method in _METHODS and "factor" in _METHODS[method][1]


# Those whose frequencies depend on seq_len; YaRN's do where it is dynamic.
GROWING = ("dynamic", "dynamic_linear", "longrope")


def frequencies(
    method: str,
    *,
    head_dim: int,
    base: float = 10000.0,
    max_position: int | None = None,
    factor: float | None = None,
    seq_len: int | None = None,
    original_max_position_embeddings: int | None = None,
    partial_rotary_factor: float = 1.0,
    **method_options: Any,
) -> tuple[Tensor, float]:
    """The angles per position of rotary position embedding, scaled by one of `METHODS`.

    The angle of pair i at position m is ``m * inv_freq[i]``; cosine and sine are both multiplied by
    ``attention_factor``. Equal to transformers' functions of these names where it has them.

    ================  ==================================================================================
    method            inv_freq
    ================  ==================================================================================
    default           theta_i = base^(-2 i / d) (Su et al. 2021)
    linear            theta_i / factor: position interpolation (Chen et al. 2023)
    ntk               the base grows so that the lowest frequency falls by ``factor``
    dynamic           the same with factor * n / M - (factor - 1) for n = max(seq_len, M), M =
                      max_position, the trained length
    dynamic_linear    theta_i * M / max(seq_len, M)
    ntk_by_parts      theta_i / factor for pairs that turn less than ``ntk_rotations`` = (1.25, 0.75)
                      times over the trained length, ntk's above, theta_i above ``base_rotations`` =
                      (16, 2), with ramps between
    yarn              theta_i above ``beta_fast`` = 32 turns, theta_i / factor below ``beta_slow`` = 1,
                      a ramp between (Peng et al. 2023)
    longrope          theta_i / long_factor_i where seq_len is beyond the trained length, else
                      theta_i / short_factor_i (Ding et al. 2024)
    llama3            theta_i above ``high_freq_factor`` turns, theta_i / factor below
                      ``low_freq_factor``, a ramp between (Llama 3.1)
    proportional      theta_i over the whole head for the first ``partial_rotary_factor`` of the pairs,
                      0 for the others, / factor
    ================  ==================================================================================

    Args:
        method: One of `METHODS`.
        head_dim: D, channels of a head.
        base: Of the wavelengths, above 1.
        max_position: The model's greatest length. The trained one for the dynamic methods.
        factor: How many times longer the text may be than the trained length, 1 or more. None, for
            yarn, ntk_by_parts and longrope, is max_position / original_max_position_embeddings; given
            beside both it must be that ratio, unless that is 1.
        seq_len: Tokens of the text so far (the greatest position and 1), which the dynamic methods
            and longrope look at; None is no more than the trained length.
        original_max_position_embeddings: The trained length, L0, of yarn, ntk_by_parts, longrope and
            llama3; None is max_position.
        partial_rotary_factor: Share of the head that is rotated, d = int(D * share), an even number.
        **method_options: Those of the method.

            - yarn: ``attention_factor`` (None: 0.1 ln(factor) + 1, or with both ``mscale`` and
              ``mscale_all_dim`` the ratio of 0.1 mscale ln(factor) + 1 and that of the other),
              ``beta_fast``, ``beta_slow``, ``truncate`` (True: the ramp begins and ends at whole
              pairs), ``dynamic`` (False; True: factor is max(1, seq_len / L0)).
            - longrope: ``short_factor`` and ``long_factor``, d / 2 numbers each; ``attention_factor``
              (None: sqrt(1 + ln(factor) / ln(L0))), or PhiMoE's ``short_mscale`` and ``long_mscale``,
              one for each list, where an attention factor beside them is the latter. First tokens that
              keep their angles are `longspan.nn.RotaryEmbedding`'s ``unscaled_tokens``.
            - ntk_by_parts: ``ntk_rotations``, ``base_rotations``. llama3: ``low_freq_factor``,
              ``high_freq_factor``.

    Returns:
        ``(inv_freq, attention_factor)``: (d / 2,) float32, for proportional (D / 2,), and a float.

    Raises:
        TypeError: An option that the method does not know, or one that it needs is missing.
        ValueError: A value does not fit, or contradicts another one.

    Example::

        inv_freq, scale = longspan.rope.frequencies(
            "yarn", head_dim=64, base=1e5, factor=4.0, original_max_position_embeddings=8192
        )
    """
    if method not in _METHODS:
        raise ValueError(f"frequencies: method: expected one of {', '.join(METHODS)}, got {method!r}")
    function, defaults = _METHODS[method]
    given = method_options if factor is None else {"factor": factor, **method_options}
    unknown = sorted(given.keys() - defaults.keys())
    if unknown:
        known = ", ".join(defaults) or "no options"
        raise TypeError(f"frequencies: {unknown[0]}: expected {method}'s options, {known}, got it")
    if original_max_position_embeddings is not None and method not in (
        "yarn", "ntk_by_parts", "longrope", "llama3"
    ):  # fmt: skip
        raise TypeError(
            f"frequencies: original_max_position_embeddings: expected None, as {method} does not look "
            f"at it (its trained length is max_position), got {original_max_position_embeddings}"
        )
    options = {**defaults, **given}
    for name, value in options.items():
        if value is _REQUIRED:
            raise TypeError(f"frequencies: {name}: expected it, as {method} needs it, got None")
    for name, value in (
        ("head_dim", head_dim),
        ("max_position", max_position),
        ("seq_len", seq_len),
        ("original_max_position_embeddings", original_max_position_embeddings),
    ):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"frequencies: {name}: expected a whole number from 1, got {value!r}")
    share = _number("partial_rotary_factor", partial_rotary_factor)
    dim = int(head_dim * share)
    if method == "proportional":
        dim = 2 * int(share * head_dim // 2)
    if share > 1 or dim < 2 or dim % 2 or (method == "proportional" and head_dim % 2):
        raise ValueError(
            "frequencies: partial_rotary_factor: expected an even number of channels up to head_dim, "
            f"{head_dim}, to be rotated, got {dim} by {share:g}"
        )
    model = _Model(
        head_dim,
        dim,
        _number("base", base, 1.0),
        max_position,
        original_max_position_embeddings,
        seq_len,
    )
    inv_freq, attention_factor = function(model, **options)
    return inv_freq.float(), attention_factor
