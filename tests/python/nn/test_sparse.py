"""`longspan.nn`'s sparse self-attention: transformers' numbers, and the sets of the papers."""

import copy
from typing import Any

import pytest
import torch
from checks import assert_agree, assert_raises
from torch import Tensor, nn

from longspan import patterns
from longspan.nn import BigBirdSelfAttention, LongformerSelfAttention, SparseTransformerAttention

WIDTH, HEADS = 32, 4


def some_x(batch: int, tokens: int) -> Tensor:
    return torch.randn(batch, tokens, WIDTH, dtype=torch.float64)


def gradients(layer: nn.Module, x: Tensor, call) -> dict[str, Tensor]:
    """Output, and the gradients of x and of every parameter."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    out = call(x)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    found = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "d x": x.grad} | found


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("where", [[[], []], [[0], [0]], [[0, 5, 90], [17]]], ids=str)
def test_longformer_as_transformers(where: list[list[int]], padding: bool) -> None:
    """Outputs and gradients, with the state_dict as it is; transformers' softmax is always float32."""
    longformer = pytest.importorskip("transformers.models.longformer.modeling_longformer")
    config = longformer.LongformerConfig(
        hidden_size=WIDTH, num_attention_heads=HEADS, attention_window=[32],
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    theirs = longformer.LongformerSelfAttention(config, 0)
    ours = LongformerSelfAttention(WIDTH, HEADS, attention_window=32)
    ours.load_state_dict(theirs.state_dict())
    x = some_x(2, 128).float()
    is_global = torch.zeros(2, 128, dtype=torch.bool)
    for row, tokens in zip(is_global, where):
        row[tokens] = True
    real = torch.arange(128) < torch.tensor([[128], [100 if padding else 128]])
    mask = torch.where(real, is_global.float() * 10000, -10000.0)

    def their_call(x: Tensor) -> Tensor:
        out = theirs(
            x, attention_mask=mask, is_index_masked=~real, is_index_global_attn=is_global,
            is_global_attn=bool(is_global.any()),
        )[0]  # fmt: skip
        return torch.where(real[..., None], out, 0)

    found = gradients(ours, x, lambda x: ours(x, global_mask=is_global, key_mask=real))
    rows = dict.fromkeys(dict(ours.named_parameters()), 2 * 128)  # which a parameter's gradient sums
    assert_agree(found, gradients(theirs, x, their_call), rows)


def dense(layer: nn.Module, mask: Tensor, x: Tensor, names: tuple[str, str, str]) -> Tensor:
    q, k, v = (getattr(layer, n)(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for n in names)
    score = (q @ k.transpose(-1, -2) * (WIDTH // HEADS) ** -0.5).masked_fill(~mask, -torch.inf)
    return (score.softmax(-1).nan_to_num(0) @ v).transpose(1, 2).flatten(2)


def test_longformer_dilated_and_causal() -> None:
    layer = LongformerSelfAttention(
        WIDTH, HEADS, attention_window=10, dilation=3, causal=True, dtype=torch.float64
    )
    for name in ("query", "key", "value"):  # then a global row is one of full attention
        getattr(layer, f"{name}_global").load_state_dict(getattr(layer, name).state_dict())
    is_global = torch.zeros(2, 100, dtype=torch.bool)
    is_global[:, [3, 70]] = True
    mask = patterns.longformer(100, window=10, global_tokens=[3, 70], dilation=3, causal=True)
    x = some_x(2, 100)
    wanted = dense(layer, mask.to_dense(), x, ("query", "key", "value"))
    torch.testing.assert_close(layer(x, global_mask=is_global), wanted)


@pytest.mark.parametrize("tokens", [1, 100, 700])
def test_bigbird(tokens: int) -> None:
    layer = BigBirdSelfAttention(
        WIDTH, HEADS, block_size=16, num_random_blocks=2, seed=9, dtype=torch.float64
    )
    mask = patterns.bigbird(tokens, block_size=16, num_random_blocks=2, heads=HEADS, seed=9)
    x = some_x(2, tokens)
    wanted = dense(layer, mask.to_dense(), x, ("query", "key", "value"))
    torch.testing.assert_close(layer(x), wanted)
    torch.testing.assert_close(layer.eval()(x), wanted)


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 12},
        {"stride": 20, "mode": "fixed", "summary": 3},
        {"stride": 12, "heads": ["local", "strided"] * 2},
    ],
    ids=str,
)
def test_sparse_transformer(options: dict[str, Any]) -> None:
    layer = SparseTransformerAttention(WIDTH, HEADS, **options, dtype=torch.float64)
    mask = patterns.sparse_transformer(150, **options)
    x = some_x(2, 150)
    wanted = layer.o_proj(dense(layer, mask.to_dense(), x, ("q_proj", "k_proj", "v_proj")))
    torch.testing.assert_close(layer(x), wanted)


LAYERS = {
    "longformer": lambda: LongformerSelfAttention(WIDTH, HEADS, attention_window=20),
    "bigbird": lambda: BigBirdSelfAttention(WIDTH, HEADS, block_size=8),
    "sparse transformer": lambda: SparseTransformerAttention(WIDTH, HEADS, stride=9, bias=True),
}


@pytest.mark.parametrize("name", LAYERS)
def test_padding_is_neither_read_nor_written(name: str) -> None:
    """NaN in padding reaches no other row, and no gradient; its own rows are 0."""
    layer = LAYERS[name]().double()
    real = torch.arange(90) < torch.tensor([[90], [40]])
    x = some_x(2, 90)
    bad = torch.where(real[..., None], x, torch.nan)
    clean = gradients(layer, x, lambda x: layer(x, key_mask=real))
    found = gradients(layer, bad, lambda x: layer(x, key_mask=real))
    assert_agree(found, clean)
    assert (found["out"][1, 40:] == 0).all()
    assert all(torch.isfinite(g).all() for g in found.values())


@pytest.mark.parametrize("name", LAYERS)
def test_dtypes_autocast_copies_and_repr(name: str) -> None:
    layer = LAYERS[name]()
    x = some_x(1, 70).float()
    assert copy.deepcopy(layer)(x).equal(layer(x))
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.float()(x).dtype == torch.bfloat16
    assert f"num_heads={HEADS}" in repr(layer)
    assert layer(x[:0]).shape == (0, 70, WIDTH)


X = torch.randn(1, 10, WIDTH)


@pytest.mark.parametrize(
    ("kind", "parts", "call"),
    [
        (ValueError, ["hidden_size", "5", "32"], lambda: BigBirdSelfAttention(WIDTH, 5)),
        (
            ValueError,
            ["num_random_blocks", "-1"],
            lambda: BigBirdSelfAttention(8, 2, num_random_blocks=-1),
        ),
        (
            ValueError,
            ["attention_window", "3"],
            lambda: LongformerSelfAttention(8, 2, attention_window=3),
        ),
        (ValueError, ["stride", "0"], lambda: SparseTransformerAttention(8, 2, stride=0)),
        (ValueError, ["mode", "odd"], lambda: SparseTransformerAttention(8, 2, stride=3, mode="odd")),
        (
            ValueError,
            ["heads", "2", "1"],
            lambda: SparseTransformerAttention(8, 2, stride=3, heads=["local"]),
        ),
        (ValueError, ["x", "hidden_size", "(2, 3)"], lambda: LAYERS["bigbird"]()(torch.ones(2, 3))),
        (TypeError, ["key_mask", "bool"], lambda: LAYERS["bigbird"]()(X, key_mask=torch.ones(1, 10))),
        (
            ValueError,
            ["global_mask", "(1, 9)"],
            lambda: LAYERS["longformer"]()(X, global_mask=torch.ones(1, 9, dtype=torch.bool)),
        ),
    ],
)
def test_errors(kind: type[Exception], parts: list[str], call) -> None:
    assert_raises(kind, parts, call)
