"""`longspan.nn.NativeSparseAttention` and `MixtureOfBlockAttention`: layers, caches, padding."""

import copy
from typing import Any

import pytest
import torch
from checks import assert_agree, assert_raises
from torch import Tensor, nn

import longspan
from longspan.nn import Attention, MixtureOfBlockAttention, NativeSparseAttention, RotaryEmbedding

WIDTH, HEADS, KV = 32, 4, 2
KIND: dict[str, Any] = {"dtype": torch.float64}
NSA = {"block_size": 8, "block_counts": 3, "window_size": 10, "compress_length": 8, "compress_stride": 4}


def rotary() -> RotaryEmbedding:
    return RotaryEmbedding(WIDTH // HEADS)


LAYERS = {
    "moba": lambda **o: MixtureOfBlockAttention(
        WIDTH, HEADS, KV, moba_chunk_size=8, moba_topk=2, **KIND, **o
    ),
    "moba, rotary, norms": lambda **o: MixtureOfBlockAttention(
        WIDTH, HEADS, KV, moba_chunk_size=8, moba_topk=3, rotary=rotary(), qk_norm=True, **KIND, **o
    ),
    "nsa": lambda **o: NativeSparseAttention(WIDTH, HEADS, KV, **NSA, **KIND, **o),
    "nsa, means": lambda **o: NativeSparseAttention(
        WIDTH, HEADS, KV, **NSA, compression="mean", rotary=rotary(), **KIND, **o
    ),
    "nsa, separate": lambda **o: NativeSparseAttention(
        WIDTH, HEADS, KV, **NSA, separate_kv=True, qk_norm=True, rotary=rotary(), **KIND, **o
    ),
}


def make(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(3)
    return LAYERS[name](**options)


def some_x(batch: int, tokens: int) -> Tensor:
    return torch.randn(batch, tokens, WIDTH, **KIND)


def gradients(layer: nn.Module, x: Tensor, **options: Any) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    layer.zero_grad()
    out = layer(x, **options)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    found = {name: p.grad for name, p in layer.named_parameters()}
    assert all(g is not None for g in found.values())
    return {"out": out.detach(), "d x": x.grad} | found


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("steps", [[1] * 45, [20, 1, 1, 1, 22], [3, 30, 12], [45]], ids=str)
def test_a_cache_changes_nothing(name: str, steps: list[int]) -> None:
    layer = make(name)
    x = some_x(2, 45)
    with torch.no_grad():
        want, cache, parts = layer(x), layer.make_cache(2, 50), []
        for part in x.split(steps, 1):
            parts.append(layer(part, cache=cache))
    torch.testing.assert_close(torch.cat(parts, 1), want)
    assert cache.lengths.tolist() == [45, 45]


@pytest.mark.parametrize("name", LAYERS)
def test_prompts_of_different_lengths(name: str) -> None:
    """Right padding, then steps and a longer piece; beams reordered, copies apart."""
    layer, lengths = make(name), torch.tensor([30, 9])
    x = some_x(2, 42)
    with torch.no_grad():
        cache = layer.make_cache(2, 60)
        layer(x[:, :30], lengths=lengths, cache=cache)
        rows = [x[:1, :42], torch.cat([x[1:, :9], x[1:, 30:42]], 1)]
        want = torch.cat([layer(row)[:, -12:] for row in rows])
        kept = cache.clone()
        found = [layer(part, cache=cache) for part in x[:, 30:].split([1, 4, 6, 1], 1)]
        torch.testing.assert_close(torch.cat(found, 1), want)
        assert kept.lengths.tolist() == [30, 9]
        kept.reorder(torch.tensor([1, 1]))
        again = torch.cat([layer(part, cache=kept) for part in x[[1, 1], 30:].split([1, 4, 6, 1], 1)], 1)
    torch.testing.assert_close(again[0], want[1])
    torch.testing.assert_close(again[1], want[1])
    assert kept.nbytes == cache.nbytes > 2 * cache.k.nbytes
    kept.reset()
    assert kept.lengths.tolist() == [0, 0]


@pytest.mark.parametrize("name", LAYERS)
def test_padding_is_neither_read_nor_written(name: str) -> None:
    layer, lengths = make(name), torch.tensor([50, 20])
    x = some_x(2, 50)
    bad = x.clone()
    bad[1, 20:] = torch.nan
    clean, found = (gradients(layer, y, lengths=lengths) for y in (x, bad))
    assert_agree(found, clean)
    assert (found["out"][1, 20:] == 0).all()
    torch.testing.assert_close(found["out"][1:, :20], layer(x[1:, :20]).detach())


@pytest.mark.parametrize("name", LAYERS)
def test_causality(name: str) -> None:
    x = some_x(1, 45)
    other = x.clone()
    other[:, 25:] += 1
    layer = make(name)
    torch.testing.assert_close(layer(x)[:, :25], layer(other)[:, :25])
    both = make(name, causal=False)
    assert (both(x)[:, :25] != both(other)[:, :25]).any()


def test_all_blocks_are_full_attention() -> None:
    layer = MixtureOfBlockAttention(WIDTH, HEADS, KV, moba_chunk_size=8, moba_topk=9, **KIND)
    full = Attention(WIDTH, HEADS, KV, causal=True, **KIND)
    full.load_state_dict(layer.state_dict())
    x = some_x(2, 70)
    assert_agree(gradients(layer, x), gradients(full, x))


def test_native_sparse_attention_by_hand() -> None:
    """Projections, perceptrons and gates written out around the operator."""
    layer = make("nsa")
    x = some_x(2, 45)
    q, k, v = (
        getattr(layer, f"{n}_proj")(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for n in "qkv"
    )
    gates = torch.sigmoid(layer.g_proj(x)).unflatten(-1, (HEADS, 3)).permute(3, 0, 2, 1)
    made = []
    for y, phi in ((k, layer.compress_k), (v, layer.compress_v)):
        spans = [(y[:, :, i : i + 8] + phi.position).flatten(2) for i in range(0, 38, 4)]
        made.append(torch.stack([phi.down(nn.functional.gelu(phi.up(s))) for s in spans], 2))
    out = longspan.native_sparse_attention(q, k, v, *gates, k_cmp=made[0], v_cmp=made[1], **NSA)
    torch.testing.assert_close(layer(x), layer.o_proj(out.transpose(1, 2).flatten(2)))


def test_branches_have_projections_of_their_own() -> None:
    layer = make("nsa, separate")
    names = {name for name, _ in layer.named_parameters()}
    assert {"k_cmp_proj.weight", "v_cmp_proj.weight", "k_swa_proj.weight", "v_swa_proj.weight"} <= names
    shared = make("nsa, separate")
    for x in "kv":
        for branch in ("cmp", "swa"):
            getattr(shared, f"{x}_{branch}_proj").load_state_dict(
                getattr(shared, f"{x}_proj").state_dict()
            )
    one = NativeSparseAttention(WIDTH, HEADS, KV, **NSA, qk_norm=True, rotary=rotary(), **KIND)
    one.load_state_dict(shared.state_dict(), strict=False)
    x = some_x(1, 45)
    torch.testing.assert_close(shared(x), one(x))
    assert (layer(x) != shared(x)).any()


@pytest.mark.parametrize("name", LAYERS)
def test_dtypes_autocast_copies_and_repr(name: str) -> None:
    layer = make(name).float()
    x = some_x(1, 45).float()
    assert copy.deepcopy(layer)(x).equal(layer(x))
    assert layer(x[:0]).shape == (0, 45, WIDTH)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert layer(x).dtype == torch.bfloat16
        cache = layer.make_cache(1, 45)
        assert cache.k.dtype == torch.bfloat16
        assert layer(x[:, :1], cache=cache).isfinite().all()
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert f"num_heads={HEADS}" in repr(layer)


def test_only_whole_spans_are_compressed_by_a_perceptron() -> None:
    layer = make("nsa")
    for tokens in (1, 7, 8, 11, 12):
        x = some_x(1, tokens)
        assert layer(x).isfinite().all()
        k = torch.randn(1, KV, tokens, WIDTH // HEADS, **KIND)
        assert layer.compress_k(k).shape[2] == max(0, (tokens - 8) // 4 + 1)


X = torch.randn(1, 10, WIDTH, **KIND)


@pytest.mark.parametrize(
    ("kind", "parts", "call"),
    [
        (ValueError, ["moba_topk", "0"], lambda: MixtureOfBlockAttention(8, 2, moba_topk=0)),
        (ValueError, ["moba_chunk_size", "0"], lambda: MixtureOfBlockAttention(8, 2, moba_chunk_size=0)),
        (ValueError, ["compression", "odd"], lambda: NativeSparseAttention(8, 2, compression="odd")),
        (ValueError, ["block_size", "16", "8"], lambda: NativeSparseAttention(8, 2, block_size=8)),
        (ValueError, ["x", "hidden_size", "(2, 3)"], lambda: make("nsa")(torch.ones(2, 3))),
        (TypeError, ["lengths", "float"], lambda: make("moba")(X, lengths=torch.ones(1))),
        (
            ValueError,
            ["lengths", "causal"],
            lambda: make("moba", causal=False)(X, lengths=torch.tensor([3])),
        ),
        (
            ValueError,
            ["positions", "1", "3"],
            lambda: make("nsa")(X, positions=torch.zeros(3, 10, dtype=torch.long)),
        ),
        (ValueError, ["cache", "10", "9"], lambda: make("nsa")(X, cache=make("nsa").make_cache(1, 9))),
        (
            ValueError,
            ["cache", "causal=True"],
            lambda: make("moba", causal=False)(X, cache=make("moba").make_cache(1, 10)),
        ),
        (
            TypeError,
            ["cache", "make_cache", "KVCache"],
            lambda: make("moba")(X, cache=Attention(WIDTH, HEADS, KV, **KIND).make_cache(1, 10)),
        ),
        (RuntimeError, ["no_grad"], lambda: make("nsa")(X, cache=make("nsa").make_cache(1, 10))),
    ],
)
def test_errors(kind: type[Exception], parts: list[str], call) -> None:
    assert_raises(kind, parts, call)
