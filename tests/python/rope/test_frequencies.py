"""`longspan.rope.frequencies` against transformers' functions and closed forms."""

import math
from typing import Any

import pytest
import torch
from checks import assert_raises
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from longspan.rope import METHODS, alibi_slopes, frequencies, from_config, xpos

transformers = pytest.importorskip("transformers")
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402

FACTORS = st.floats(1.0, 64.0)
HEADS = st.sampled_from([16, 64, 80, 128])
BASES = st.sampled_from([1e4, 1e5, 5e5, 1e6])
LENGTHS = st.sampled_from([512, 2048, 4096, 8192])
SHARES = st.sampled_from([1.0, 0.5, 0.25])
TEXTS = st.none() | st.integers(1, 200_000)


def config(head_dim: int, longest: int, **parameters: Any) -> Any:
    return transformers.LlamaConfig(
        hidden_size=4 * head_dim, num_attention_heads=4, max_position_embeddings=longest,
        rope_parameters=parameters,
    )  # fmt: skip


def assert_as_transformers(made: Any, seq_len: int | None = None) -> None:
    """Through `from_config` too.

    transformers calculates in float32: a blend of theta and theta / factor is off by some of the last
    digits of theta.
    """
    kind = made.rope_parameters["rope_type"]
    expected, scale = ROPE_INIT_FUNCTIONS[kind](made, seq_len=seq_len)
    settings = from_config(made)
    found, found_scale = frequencies(**settings, seq_len=seq_len)
    assert found.dtype == torch.float32
    unscaled = theta(made.rope_parameters["rope_theta"], 2 * len(expected))
    assert ((found - expected).abs() <= 4e-6 * unscaled.maximum(expected)).all()
    assert found_scale == pytest.approx(scale, rel=1e-12)
    for same in (made.to_dict(), dict(made.rope_parameters)):
        extra = {} if "hidden_size" in same else {
            "head_dim": settings["head_dim"], "max_position": made.max_position_embeddings
        }  # fmt: skip
        assert torch.equal(frequencies(**from_config(same, **extra), seq_len=seq_len)[0], found)


@given(HEADS, BASES, LENGTHS, SHARES, FACTORS, TEXTS)
def test_linear_dynamic_and_proportional(
    head: int, base: float, longest: int, share: float, factor: float, text: int | None
) -> None:
    for kind in ("linear", "dynamic", "proportional"):
        made = config(
            head, longest, rope_type=kind, rope_theta=base, factor=factor, partial_rotary_factor=share
        )
        assert_as_transformers(made, text)


@given(
    HEADS, BASES, LENGTHS, SHARES, FACTORS, st.booleans(),
    st.sampled_from([(None, None), (1.0, 0.7), (0.707, 1.0)]),
    st.sampled_from([(32.0, 1.0), (16.0, 2.0)]), st.none() | st.floats(0.5, 2.0),
)  # fmt: skip
def test_yarn(
    head: int, base: float, original: int, share: float, factor: float, truncate: bool,
    mscales: tuple[Any, Any], betas: tuple[float, float], temperature: float | None,
) -> None:  # fmt: skip
    parameters = {
        "rope_type": "yarn", "rope_theta": base, "factor": factor, "truncate": truncate,
        "original_max_position_embeddings": original, "partial_rotary_factor": share,
        "beta_fast": betas[0], "beta_slow": betas[1],
    }  # fmt: skip
    if mscales[0] is not None:
        parameters |= {"mscale": mscales[0], "mscale_all_dim": mscales[1]}
    elif temperature is not None:
        parameters["attention_factor"] = temperature
    assert_as_transformers(config(head, original, **parameters))


@given(HEADS, BASES, LENGTHS, st.sampled_from([2, 4, 32]), TEXTS, st.data())
def test_longrope(
    head: int, base: float, original: int, ratio: int, text: int | None, data: st.DataObject
) -> None:
    numbers = st.lists(st.floats(1.0, 60.0), min_size=head // 2, max_size=head // 2)
    parameters = {
        "rope_type": "longrope", "rope_theta": base, "short_factor": data.draw(numbers),
        "long_factor": data.draw(numbers), "original_max_position_embeddings": original,
    }  # fmt: skip
    assert_as_transformers(config(head, ratio * original, **parameters), text)
    assert_as_transformers(config(head, original, factor=3.0, **parameters), text)
    assert_as_transformers(config(head, original, attention_factor=1.19, **parameters), text)


@given(HEADS, BASES, LENGTHS, FACTORS, st.floats(0.5, 2.0), st.floats(2.5, 8.0))
def test_llama3(head: int, base: float, original: int, factor: float, low: float, high: float) -> None:
    made = config(
        head, 2 * original, rope_type="llama3", rope_theta=base, factor=factor, low_freq_factor=low,
        high_freq_factor=high, original_max_position_embeddings=original,
    )  # fmt: skip
    assert_as_transformers(made)


def test_every_function_of_transformers_is_compared() -> None:
    ours = {"dynamic_linear", "dynamic_yarn"}  # longspan.hf.register's, if something called it
    assert set(ROPE_INIT_FUNCTIONS) - ours == {
        "linear", "dynamic", "proportional", "yarn", "longrope", "llama3"
    }  # fmt: skip


def theta(base: float, dim: int) -> Tensor:
    return (base ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)).float()


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 1.0},
    "ntk": {"factor": 1.0},
    "dynamic": {"factor": 1.0, "max_position": 2048},
    "dynamic_linear": {"max_position": 2048},
    "ntk_by_parts": {"factor": 1.0, "max_position": 2048},
    "yarn": {"factor": 1.0, "max_position": 2048},
    "longrope": {
        "factor": 1.0, "short_factor": [1.0] * 32, "long_factor": [1.0] * 32, "max_position": 2048
    },
    "llama3": {
        "factor": 1.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "max_position": 2048
    },
    "proportional": {},
}  # fmt: skip


LONGROPE = OPTIONS["longrope"] | {"factor": 2.0}


@pytest.mark.parametrize("method", METHODS)
def test_a_factor_of_one_is_the_default(method: str) -> None:
    inv_freq, scale = frequencies(method, head_dim=64, **OPTIONS[method])
    assert_close(inv_freq, theta(1e4, 64))
    assert scale == 1.0


def test_a_scale_for_each_list_is_as_phimoe_has_it() -> None:
    module = pytest.importorskip("transformers.models.phimoe.modeling_phimoe")
    parameters = {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 64, "short_mscale": 1.1, "long_mscale": 1.3,
    }  # fmt: skip
    made = transformers.PhimoeConfig(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=256, rope_parameters=parameters
    )
    for length, expected in ((64, 1.1), (65, 1.3)):
        cos, _ = module.PhimoeRotaryEmbedding(made)(torch.zeros(1), torch.arange(length)[None])
        assert cos[0, 0, 0] == pytest.approx(expected)
        assert frequencies(**from_config(made), seq_len=length)[1] == expected


def test_closed_forms() -> None:
    plain, _ = frequencies("default", head_dim=128)
    assert torch.equal(plain, theta(1e4, 128))
    assert len(frequencies("default", head_dim=128, partial_rotary_factor=0.25)[0]) == 16
    ntk, _ = frequencies("ntk", head_dim=128, factor=8.0)
    assert_close(ntk[[0, -1]], plain[[0, -1]] / torch.tensor([1.0, 8.0]))
    grown, _ = frequencies("dynamic", head_dim=128, factor=2.0, max_position=2048, seq_len=4096)
    assert_close(grown, theta(30527.737, 128))
    shrunk, _ = frequencies("dynamic_linear", head_dim=128, max_position=2048, seq_len=8192)
    assert_close(shrunk, plain / 4)

    yarn, _ = frequencies("yarn", head_dim=128, factor=16.0, original_max_position_embeddings=4096)
    assert_close(yarn[[20, 33, 46]] / plain[[20, 33, 46]], torch.tensor([1.0, 0.53125, 1 / 16]))
    for length, low, high in ((2048, 16, 41), (4096, 20, 46), (8192, 25, 50)):
        inv_freq, _ = frequencies(
            "yarn", head_dim=128, factor=4.0, original_max_position_embeddings=length
        )
        kept, divided = inv_freq == plain, torch.isclose(inv_freq, plain / 4, rtol=1e-6)
        assert (int(kept.sum()) - 1, int((~divided).sum())) == (low, high)
    for factor, expected in ((4.0, 1.138629), (16.0, 1.277259), (32.0, 1.346574)):
        assert frequencies("yarn", head_dim=128, factor=factor, max_position=2048)[1] == pytest.approx(
            expected, abs=1e-6
        )
    dynamic = {"dynamic": True, "original_max_position_embeddings": 2048, "head_dim": 128}
    for length, factor in ((None, 1.0), (1000, 1.0), (8192, 4.0)):
        static = frequencies("yarn", head_dim=128, factor=factor, max_position=2048)
        found = frequencies("yarn", seq_len=length, **dynamic)
        assert torch.equal(found[0], static[0])
        assert found[1] == static[1]

    llama, _ = frequencies(
        "llama3", head_dim=128, base=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )  # fmt: skip
    ratio = theta(5e5, 128) / llama
    assert torch.equal(ratio[:29], torch.ones(29))
    assert ((ratio[29:35] > 1.001) & (ratio[29:35] < 7.999)).all()
    assert_close(ratio[35:], torch.full((29,), 8.0))
    ones = {"short_factor": [1.0] * 64, "long_factor": [2.0] * 64}
    rope = {"head_dim": 128, "max_position": 131072, "original_max_position_embeddings": 4096, **ones}
    assert frequencies("longrope", **rope)[1] == pytest.approx(math.sqrt(17 / 12), rel=1e-12)
    assert torch.equal(frequencies("longrope", **rope, seq_len=4096)[0], plain)
    assert_close(frequencies("longrope", **rope, seq_len=4097)[0], plain / 2)
    scales = {"short_mscale": 1.0, "long_mscale": 1.25}
    for more in (scales, scales | {"attention_factor": 1.25}, scales | {"factor": 32.0}):
        assert frequencies("longrope", **rope, **more)[1] == 1.0
        assert frequencies("longrope", **rope, **more, seq_len=4096)[1] == 1.0
        assert frequencies("longrope", **rope, **more, seq_len=4097)[1] == 1.25


def test_ntk_by_parts_goes_from_base_to_linear() -> None:
    plain = theta(1e4, 128)
    found, scale = frequencies("ntk_by_parts", head_dim=128, factor=4.0, max_position=2048)
    turns = 2048 * plain / (2 * math.pi)
    assert scale == 1.0
    assert_close(found[turns > 20], plain[turns > 20])
    assert_close(found[turns < 0.6], plain[turns < 0.6] / 4)
    ratio = plain / found
    assert (ratio[1:] >= ratio[:-1] - 1e-6).all()
    # All pairs but the first turn less than 326 times and more than 0.02: ntk's own frequencies.
    ntk, _ = frequencies(
        "ntk_by_parts", head_dim=128, factor=4.0, max_position=2048, ntk_rotations=(0.02, 0.02),
        base_rotations=(326.0, 326.0),
    )  # fmt: skip
    assert_close(ntk[1:], frequencies("ntk", head_dim=128, factor=4.0)[0][1:])


@pytest.mark.parametrize(
    ("kind", "parts", "method", "options"),
    [
        (ValueError, ["method", "yarn", "'yarm'"], "yarm", {}),
        (TypeError, ["factor", "default"], "default", {"factor": 2.0}),
        (TypeError, ["beta", "linear"], "linear", {"factor": 2.0, "beta": 1}),
        (TypeError, ["factor", "needs"], "linear", {}),
        (ValueError, ["factor", "1 or more", "0.5"], "linear", {"factor": 0.5}),
        (ValueError, ["factor", "nan"], "ntk", {"factor": math.nan}),
        (ValueError, ["head_dim", "0"], "default", {"head_dim": 0}),
        (ValueError, ["partial_rotary_factor", "even", "63"], "default", {"head_dim": 63}),
        (ValueError, ["partial_rotary_factor", "1.5"], "default", {"partial_rotary_factor": 1.5}),
        (ValueError, ["base", "above 1"], "default", {"base": 1.0}),
        (ValueError, ["head_dim", "more than 2"], "ntk", {"head_dim": 2, "factor": 2.0}),
        (ValueError, ["max_position", "None"], "dynamic", {"factor": 2.0}),
        (ValueError, ["seq_len", "0"], "default", {"seq_len": 0}),
        (
            TypeError,
            ["original_max_position_embeddings", "dynamic"],
            "dynamic",
            {"factor": 2.0, "max_position": 8, "original_max_position_embeddings": 4},
        ),
        (ValueError, ["original_max_position_embeddings"], "yarn", {"factor": 2.0}),
        (ValueError, ["factor", "None"], "yarn", {"max_position": 2048}),
        (
            ValueError,
            ["factor", "= 4", "2.0"],
            "yarn",
            {"factor": 2.0, "max_position": 8192, "original_max_position_embeddings": 2048},
        ),
        (
            ValueError,
            ["attention_factor", "mscale"],
            "yarn",
            {"factor": 2.0, "max_position": 8, "attention_factor": 1.1, "mscale": 1.0},
        ),
        (ValueError, ["beta_fast"], "yarn", {"factor": 2.0, "max_position": 8, "beta_fast": 0.5}),
        (ValueError, ["truncate", "1"], "yarn", {"factor": 2.0, "max_position": 8, "truncate": 1}),
        (
            ValueError,
            ["factor", "dynamic"],
            "yarn",
            {"factor": 2.0, "max_position": 8, "dynamic": True},
        ),
        (
            ValueError,
            ["short_factor", "32", "31"],
            "longrope",
            {"factor": 2.0, "max_position": 8, "short_factor": [1.0] * 31, "long_factor": [1.0] * 32},
        ),
        (
            ValueError,
            ["long_factor", "0"],
            "longrope",
            {"factor": 2.0, "max_position": 8, "short_factor": [1.0] * 32, "long_factor": [0] * 32},
        ),
        (
            ValueError,
            ["short_mscale and long_mscale", "both or neither", "1.0 and None"],
            "longrope",
            LONGROPE | {"short_mscale": 1.0},
        ),
        (
            ValueError,
            ["attention_factor", "long_mscale", "1.1", "1.2"],
            "longrope",
            LONGROPE | {"short_mscale": 1.0, "long_mscale": 1.1, "attention_factor": 1.2},
        ),
        (
            ValueError,
            ["short_mscale", "-1"],
            "longrope",
            LONGROPE | {"short_mscale": -1.0, "long_mscale": 1.1},
        ),
        (
            ValueError,
            ["high_freq_factor", "more than"],
            "llama3",
            {"factor": 2.0, "max_position": 8, "low_freq_factor": 2.0, "high_freq_factor": 2.0},
        ),
        (
            ValueError,
            ["ntk_rotations", "two"],
            "ntk_by_parts",
            {"factor": 2.0, "max_position": 8, "ntk_rotations": 3},
        ),
    ],
)
def test_wrong_settings_are_named(
    kind: type[Exception], parts: list[str], method: str, options: dict[str, Any]
) -> None:
    assert_raises(kind, parts, lambda: frequencies(method, **({"head_dim": 64} | options)))


def test_from_config_reads_old_and_nested_dictionaries() -> None:
    assert from_config({"type": "linear", "factor": 2.0}, head_dim=64) == {
        "method": "linear", "head_dim": 64, "max_position": None, "factor": 2.0
    }  # fmt: skip
    model = {
        "hidden_size": 256, "num_attention_heads": 4, "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096, "rope_theta": 1e5, "rotary_pct": 0.5,
        "rope_scaling": {"type": "su", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16},
    }  # fmt: skip
    assert from_config(model) == {
        "method": "longrope", "head_dim": 64, "base": 1e5, "max_position": 131072,
        "original_max_position_embeddings": 4096, "partial_rotary_factor": 0.5,
        "short_factor": [1.0] * 16, "long_factor": [2.0] * 16,
    }  # fmt: skip
    plain = {name: x for name, x in model.items() if name != "rope_scaling"}
    assert from_config(plain)["method"] == "default"
    assert len(frequencies(**from_config(plain))[0]) == 16
    nested = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    gemma = transformers.Gemma3TextConfig(rope_parameters=nested)
    for layer, base in (("full_attention", 1e6), ("sliding_attention", 1e4)):
        settings = from_config(gemma, layer_type=layer)
        assert (settings["base"], settings["head_dim"]) == (base, gemma.head_dim)
    for parts, call in (
        (["layer_type", "full_attention"], lambda: from_config(gemma)),
        (["layer_type", "same"], lambda: from_config(model, layer_type="full_attention")),
        (["head_dim"], lambda: from_config({"type": "default"})),
        (
            ["rope_type", "linear"],
            lambda: from_config({"type": "linear", "rope_type": "yarn"}, head_dim=8),
        ),
        (
            ["rope_theta", "10000"],
            lambda: from_config(
                model | {"rope_parameters": {"rope_theta": 10000}, "rope_scaling": None}
            ),
        ),
    ):
        assert_raises(ValueError, parts, call)
    assert_raises(TypeError, ["config", "int"], lambda: from_config(3))
    unknown = from_config({"type": "linear", "factor": 2.0, "finetuned": True}, head_dim=64)
    assert_raises(TypeError, ["finetuned"], lambda: frequencies(**unknown))


def test_xpos() -> None:
    at = torch.arange(300)
    (cos_q, sin_q), (cos_k, sin_k) = xpos(at, head_dim=16, center=150)
    q, k = (x.expand(300, 8) for x in torch.randn(2, 8, dtype=torch.float64))

    def score(center: int) -> Tensor:
        (cos_q, sin_q), (cos_k, sin_k) = (
            [x.double()[:, :8] for x in pair] for pair in xpos(at, head_dim=16, center=center)
        )
        real = torch.polar(torch.ones_like(q), q)  # any complex number a pair
        other = torch.polar(torch.ones_like(k), k)
        return ((real * (cos_q + 1j * sin_q)) @ (other * (cos_k + 1j * sin_k)).mH).real

    found = score(150)
    assert_close(found[20:, 20:], found[:-20, :-20], rtol=1e-4, atol=1e-4)
    assert_close(score(0), found, rtol=1e-4, atol=1e-4)
    zeta = (torch.arange(0, 16, 2) + 0.4 * 16) / (1.4 * 16)
    assert_close((cos_q.square() + sin_q.square()).sqrt()[200, :8], zeta ** (50 / 512))
    assert_close((cos_k.square() + sin_k.square()).sqrt()[200, 8:], zeta ** (-50 / 512))
    for cos, _ in xpos(at, head_dim=16, scale_base=math.inf):
        assert_close(cos[:, :8], (at.double()[:, None] * theta(1e4, 16)).cos().float())
    assert torch.isfinite(xpos(torch.tensor([30_000]), head_dim=64)[1][0]).all()
    for kind, parts, call in (
        (ValueError, ["positions", "center"], lambda: xpos(torch.tensor([40_000]), head_dim=64)),
        (TypeError, ["positions", "float32"], lambda: xpos(torch.ones(3), head_dim=64)),
        (ValueError, ["scale_base", "0"], lambda: xpos(at, head_dim=64, scale_base=0)),
        (ValueError, ["gamma", "-1"], lambda: xpos(at, head_dim=64, gamma=-1)),
    ):
        assert_raises(kind, parts, call)


def test_alibi_slopes() -> None:
    assert torch.equal(alibi_slopes(8), 0.5 ** torch.arange(1.0, 9.0))
    more = 2.0 ** -torch.tensor([0.5, 1.5, 2.5, 3.5])
    assert_close(alibi_slopes(12), torch.cat([alibi_slopes(8), more]))
    assert torch.equal(alibi_slopes(1), torch.tensor([2.0**-8]))
    assert_raises(ValueError, ["heads", "0"], lambda: alibi_slopes(0))
