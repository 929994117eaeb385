"""longspan.nn.RotaryEmbedding against angles in double."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from checks import assert_raises
from torch import Tensor
from torch.testing import assert_close

import longspan
from longspan.nn import Attention, RotaryEmbedding

LONG = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"interleaved": True, "partial_rotary_factor": 0.5},
    {"method": "linear", "factor": 3.0, "base": 1e5},
    {"method": "yarn", "factor": 4.0, "max_position": 64},
    {"method": "proportional", "partial_rotary_factor": 0.5, "unscaled_tokens": 3},
    {"method": "linear", "factor": 4.0, "unscaled_tokens": 5},
    {"method": "dynamic", "factor": 2.0, "max_position": 8},
    {"method": "yarn", "dynamic": True, "max_position": 8},
    {"method": "longrope", "max_position": 32, "original_max_position_embeddings": 8, **LONG},
]


def turned(x: Tensor, positions: Tensor, settings: dict[str, Any], seq_len: int) -> Tensor:
    """x (B, H, T, D) at positions (B, T), pair by pair as complex numbers in double."""
    options = {k: v for k, v in settings.items() if k not in ("interleaved", "unscaled_tokens")}
    options = {"method": "default", **options}
    inv_freq, scale = longspan.rope.frequencies(head_dim=x.shape[-1], seq_len=seq_len, **options)
    angle = positions.double()[:, None, :, None] * inv_freq
    first = positions[:, None, :, None] < settings.get("unscaled_tokens", 0)
    factor = options.get("factor", 1.0) if settings.get("unscaled_tokens") else 1.0
    angle = torch.where(first, angle * factor, angle)
    half = len(inv_freq)
    real = x[..., : 2 * half].double()
    real = (
        real.unflatten(-1, (half, 2))
        if settings.get("interleaved")
        else real.unflatten(-1, (2, half)).mT
    )
    out = torch.view_as_real(torch.view_as_complex(real.contiguous()) * scale * torch.exp(1j * angle))
    out = out.flatten(-2) if settings.get("interleaved") else out.mT.flatten(-2)
    return torch.cat([out, x[..., 2 * half :].double()], dim=-1)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_method(settings: dict[str, Any], dtype: torch.dtype) -> None:
    rotary = RotaryEmbedding(16, **settings)
    tolerance = {torch.float32: 2e-6, torch.float64: 1e-12}[dtype]
    for positions in (
        torch.arange(7)[None],
        torch.arange(100)[None],
        torch.tensor([[5, 0, 70_000]]),  # beyond what is kept
        torch.tensor([[1], [30]]),  # decoding
        torch.tensor([[0, 0, 1, 2], [9, 10, 11, 12]]),  # left padding
    ):
        b, t = positions.shape
        q, k = (torch.randn(b, h, t, 16, dtype=dtype) for h in (3, 1))
        length = int(positions.max()) + 1
        for x, found in zip((q, k), rotary(q, k, positions)):
            expected = turned(x, positions, settings, length)
            assert found.dtype == dtype
            assert_close(found.double(), expected, rtol=tolerance, atol=4 * tolerance)
        given = rotary(q, None, positions, seq_len=20)[0]
        assert_close(
            given.double(), turned(q, positions, settings, 20), rtol=tolerance, atol=4 * tolerance
        )
    q = torch.randn(2, 2, 11, 16, dtype=dtype)
    assert torch.equal(rotary(q, None)[0], rotary(q, None, torch.arange(11).expand(2, 11))[0])
    assert rotary(q, None)[1] is None


@pytest.mark.parametrize("start", [2**24, 2**31, 2**40])
def test_far_positions_keep_their_distances(start: int) -> None:
    """Beyond float32's integers, and in a module that was cast to bfloat16."""
    rotary = RotaryEmbedding(64).bfloat16()
    q, k = torch.randn(2, 1, 1, 1, 64).double().expand(2, 1, 1, 50, 64)
    near, far = (
        torch.matmul(*(x.mT if i else x for i, x in enumerate(rotary(q, k, at)))) for at in (
            torch.arange(50), torch.arange(start, start + 50)
        )
    )  # fmt: skip
    assert_close(near, far, rtol=0, atol=16 * start * 2**-53)  # double rounds angles
    a, b = rotary(q[:, :, :1].float(), k[:, :, :1].float(), torch.tensor([start + 1]))
    assert math.isfinite(float((a * b).sum()))
    assert not torch.equal(a, rotary(q[:, :, :1].float(), None, torch.tensor([start]))[0])


def test_bfloat16_positions_do_not_collide() -> None:
    rotary = RotaryEmbedding(8).bfloat16()
    q = torch.ones(1, 1, 600, 8, dtype=torch.bfloat16)
    out = rotary(q, None)[0].double()
    expected = turned(q.double(), torch.arange(600)[None], {}, 600)
    assert float((out - expected).abs().max()) < 2**-7


def test_tables_are_shared_grown_and_not_saved() -> None:
    one, other = (RotaryEmbedding(24, "linear", factor=7.0) for _ in range(2))
    angles = one._angles
    assert other._angles is angles
    one(torch.randn(1, 1, 10, 24), None)
    kept = angles.table
    other(torch.randn(1, 1, 12, 24), None)
    assert angles.table is kept
    other(torch.randn(1, 1, 100, 24), None)
    assert len(angles.table[0]) == 128
    assert one.state_dict() == {}
    for twin in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert twin._angles is angles
    assert "factor=7.0" in repr(one)
    with torch.inference_mode():
        fresh = RotaryEmbedding(24, "linear", factor=7.5)
        fresh(torch.randn(1, 1, 10, 24), None)
    q = torch.randn(1, 1, 10, 24, requires_grad=True)
    fresh(q, None)[0].sum().backward()
    assert q.grad is not None


def test_a_dynamic_method_forgets_a_longer_text() -> None:
    rotary = RotaryEmbedding(16, "dynamic", factor=2.0, max_position=8)
    q = torch.randn(1, 1, 6, 16)
    before = rotary(q, None)[0]
    rotary(torch.randn(1, 1, 90, 16), None)
    assert torch.equal(rotary(q, None)[0], before)


def test_in_attention_compile_and_export(fresh_compiler: None) -> None:
    rotary = RotaryEmbedding(16, "yarn", factor=4.0, max_position=64)
    layer, x = Attention(32, 2, 1, rotary=rotary, causal=True), torch.randn(1, 20, 32)
    cache = layer.make_cache(1, 20)
    with torch.no_grad():
        whole = layer(x)
        steps = torch.cat([layer(x[:, t : t + 1], cache=cache) for t in range(20)], dim=1)
    assert_close(steps, whole, rtol=1e-4, atol=1e-5)

    q, at = torch.randn(2, 3, 20, 16), torch.arange(20).expand(2, 20)
    compiled = torch.compile(lambda q, at: rotary(q, None, at)[0], fullgraph=True)
    assert_close(compiled(q, at), rotary(q, None, at)[0], rtol=1e-6, atol=1e-6)

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rotary = rotary

        def forward(self, q: Tensor, at: Tensor) -> Tensor:
            return self.rotary(q, None, at)[0]

    program = torch.export.export(Module(), (q, at))
    assert_close(program.module()(q, at), rotary(q, None, at)[0], rtol=1e-6, atol=1e-6)


def test_wrong_arguments_are_named() -> None:
    assert_raises(ValueError, ["method"], lambda: RotaryEmbedding(16, "other"))
    assert_raises(TypeError, ["factor"], lambda: RotaryEmbedding(16, factor=2.0))
    assert_raises(TypeError, ["seq_len"], lambda: RotaryEmbedding(16, seq_len=3))
    assert_raises(ValueError, ["unscaled_tokens", "-1"], lambda: RotaryEmbedding(16, unscaled_tokens=-1))
    rotary, q = RotaryEmbedding(16), torch.randn(1, 1, 4, 16)
    assert_raises(TypeError, ["positions", "float32"], lambda: rotary(q, None, torch.ones(4)))
    assert_raises(ValueError, ["positions"], lambda: rotary(q, None, torch.arange(3)))
