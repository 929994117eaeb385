"""`longspan.nn.LSHAttention`: transformers' layer, a cache, padding, training."""

import copy

import pytest
import torch
import torch.nn.functional as F
from checks import assert_raises
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import longspan
from longspan.nn import KVCache, LSHAttention, LSHCache

WIDTH, HEADS = 32, 4


def a_layer(**options) -> LSHAttention:
    options = {"chunk_length": 8, "num_hashes": 2, "hash_seed": 0} | options
    return LSHAttention(WIDTH, HEADS, **options)


def test_it_is_the_operator_between_projections() -> None:
    layer = a_layer(head_dim=12, causal=True, chunks_after=1, dedup=False).double()
    x = torch.randn(2, 50, WIDTH, dtype=torch.float64)
    qk, v = (y(x).unflatten(-1, (HEADS, 12)).transpose(1, 2) for y in (layer.query_key, layer.value))
    wanted = longspan.lsh_attention(
        qk, v, chunk_length=8, num_hashes=2, causal=True, chunks_after=1, dedup=False, seed=0
    )
    torch.testing.assert_close(layer(x), layer.o_proj(wanted.transpose(1, 2).flatten(2)))


def test_weights_of_transformers_load() -> None:
    """Within a chunk both are dense attention: hashing and rounds are compared in ops."""
    modeling = pytest.importorskip("transformers.models.reformer.modeling_reformer")
    from transformers import ReformerConfig

    config = ReformerConfig(
        hidden_size=WIDTH, num_attention_heads=HEADS, attention_head_size=8, is_decoder=False,
        lsh_attn_chunk_length=64, attn_layers=["lsh"], lsh_attention_probs_dropout_prob=0.0,
        hidden_dropout_prob=0.0,
    )  # fmt: skip
    theirs, output = modeling.LSHSelfAttention(config, 0), modeling.ReformerSelfOutput(config)
    ours = LSHAttention(WIDTH, HEADS)
    missing = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert missing.missing_keys == ["o_proj.weight"]
    assert not missing.unexpected_keys
    ours.o_proj.load_state_dict(output.dense.state_dict())
    x = torch.randn(2, 50, WIDTH)
    torch.testing.assert_close(ours(x), output(theirs(x).hidden_states), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prompt", [0, 1, 7, 30])
def test_a_cache_goes_on_where_the_prompt_ends(prompt: int) -> None:
    """Each step is the last row of the whole sequence up to there, hashed alike."""
    layer = a_layer(causal=True, num_buckets=4).double().eval()
    x = torch.randn(2, 40, WIDTH, dtype=torch.float64)
    cache = layer.make_cache(2, 40)
    with torch.no_grad():
        if prompt:
            torch.testing.assert_close(layer(x[:, :prompt], cache=cache), layer(x[:, :prompt]))
        steps = layer(x[:, prompt:36], cache=cache) if prompt else None
        for t in range(36 if prompt else 0, 40):
            out = layer(x[:, t : t + 1], cache=cache)
            torch.testing.assert_close(out, layer(x[:, : t + 1])[:, -1:])
        if steps is not None:
            for t in range(prompt, 36):
                torch.testing.assert_close(steps[:, t - prompt], layer(x[:, : t + 1])[:, -1])
    assert cache.lengths.tolist() == [40, 40]


def test_caches_are_reordered_cloned_and_reset() -> None:
    layer = a_layer(causal=True, hash_seed=None).eval()
    x = torch.randn(3, 20, WIDTH)
    with torch.no_grad():
        cache = layer.make_cache(3, 24)
        assert cache.nbytes == 3 * HEADS * 24 * (2 * 8 * 4 + 2 * 4)
        layer(x, cache=cache)
        other = cache.clone()
        assert isinstance(other, LSHCache)
        order = torch.tensor([2, 0, 0])
        other.reorder(order)
        new = torch.randn(3, 1, WIDTH)
        wanted = layer(new, cache=cache.clone())
        found = layer(new[order], cache=other)
        torch.testing.assert_close(found, wanted[order])
        assert cache.lengths.tolist() == [20] * 3
        layer(new, cache=cache.detach())
        assert cache.lengths.tolist() == [21] * 3
        cache.reset(torch.tensor([False, True, False]))
        assert cache.lengths.tolist() == [21, 0, 21]
        cache.reset()
        again = layer(x[:, :1], cache=cache)
        torch.testing.assert_close(again, layer(x[:, :1]))


def test_padding_is_neither_read_nor_written() -> None:
    layer = a_layer(causal=True).double()
    real = torch.arange(50) < torch.tensor([[50], [23]])
    x = torch.randn(2, 50, WIDTH, dtype=torch.float64)
    bad = torch.where(real[..., None], x, torch.nan).requires_grad_()
    out = layer(bad, key_mask=real)
    out.square().sum().backward()
    assert (out[1, 23:] == 0).all()
    assert torch.equal(out, layer(x, key_mask=real))
    assert all(y.grad.isfinite().all() for y in (bad, *layer.parameters()))
    assert (bad.grad[1, 23:] == 0).all()


def test_dropout_checkpoint_autocast_copies_and_repr() -> None:
    layer = a_layer(dropout=0.5, hash_seed=None)
    x = torch.randn(1, 50, WIDTH)
    torch.manual_seed(0)
    wanted = layer(x)
    wanted.sum().backward()
    gradients = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    torch.manual_seed(0)  # the recomputation draws the same rotations, and drops the same weights
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(layer.parameters(), gradients))
    assert not torch.equal(layer(x), wanted)
    layer = a_layer().eval()
    assert copy.deepcopy(layer)(x).equal(layer(x))
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.float()(x).dtype == torch.bfloat16
    assert "num_hashes=2" in repr(layer)
    assert "chunk_length=8" in repr(layer)
    assert layer(x[:0]).shape == (0, 50, WIDTH)


class _Copier(nn.Module):
    """A language model of one or two layers that must find where it saw a token before."""

    def __init__(self, mixers: list[nn.Module], words: int, length: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, WIDTH), nn.Embedding(length, WIDTH)
        self.mixers = nn.ModuleList(mixers)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in mixers)
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))
            for _ in mixers
        )
        self.head = nn.Linear(WIDTH, words)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.places.weight[: tokens.shape[1]]
        for norm, mixer, mlp in zip(self.norms, self.mixers, self.mlps):
            x = x + mixer(norm(x))
            x = x + mlp(x)
        return self.head(x)


def duplication(batch: int, half: int, words: int) -> Tensor:
    """0 w 0 w, as the paper has it."""
    w = torch.randint(1, words, (batch, half - 1))
    begin = torch.zeros(batch, 1, dtype=torch.int64)
    return torch.cat([begin, w, begin, w], dim=1)


def train(model: nn.Module, steps: int, half: int, words: int, lr: float = 5e-3) -> float:
    """-> share of the second half that it then gets right."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 50) * (1 - step / steps)
        tokens = duplication(32, half, words)
        logits = model(tokens[:, :-1])[:, half - 1 :]
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, half:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tokens = duplication(64, half, words)
    with torch.no_grad():
        guess = model.eval()(tokens[:, :-1])[:, half:].argmax(-1)
    return float((guess == tokens[:, half + 1 :]).double().mean())


@pytest.mark.slow
def test_it_learns_to_duplicate() -> None:
    """The paper's synthetic task, small: 0 w 0 w with w of 31 symbols, in chunks of 16, four rounds."""
    torch.manual_seed(0)
    mixer = LSHAttention(WIDTH, HEADS, chunk_length=16, num_hashes=4, num_buckets=8, causal=True)
    assert train(_Copier([mixer], 16, 64), steps=300, half=32, words=16) > 0.99


def test_it_trains() -> None:
    """A few steps on one batch of words to remember, from far above to below half of the loss."""
    torch.manual_seed(0)
    model = _Copier([a_layer(causal=True, hash_seed=None)], 16, 40)
    tokens = torch.randint(0, 16, (4, 41))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 2.5
    assert losses[-1] < 0.5 * losses[0]


def with_cache(**options):
    def call() -> None:
        change = {
            "layer": {"causal": True},
            "cache": (1, 10),
            "x": torch.ones(1, 3, WIDTH),
            "mask": None,
        }
        change |= options
        layer = a_layer(**change["layer"])
        layer.train(options.get("training", False))
        cache = (
            layer.make_cache(*change["cache"]) if isinstance(change["cache"], tuple) else change["cache"]
        )
        with torch.set_grad_enabled(options.get("grad", False)):
            layer(change["x"], cache=cache, key_mask=change["mask"])

    return call


@pytest.mark.parametrize(
    ("kind", "parts", "call"),
    [
        (ValueError, ["hidden_size", "5", "32"], lambda: LSHAttention(WIDTH, 5)),
        (ValueError, ["head_dim", "0"], lambda: a_layer(head_dim=0)),
        (ValueError, ["num_hashes", "0"], lambda: a_layer(num_hashes=0)),
        (ValueError, ["num_buckets", "3"], lambda: a_layer(num_buckets=3)),
        (ValueError, ["chunk_length", "0"], lambda: a_layer(chunk_length=0)),
        (ValueError, ["chunks_before", "-1"], lambda: a_layer(chunks_before=-1)),
        (ValueError, ["dropout", "1.0"], lambda: a_layer(dropout=1.0)),
        (ValueError, ["x", "hidden_size", "(2, 3)"], lambda: a_layer()(torch.ones(2, 3))),
        (TypeError, ["key_mask", "bool"], with_cache(cache=None, mask=torch.ones(1, 3))),
        (ValueError, ["cache", "causal"], with_cache(layer={})),
        (
            ValueError,
            ["cache", "dropout"],
            with_cache(layer={"causal": True, "dropout": 0.1}, training=True),
        ),
        (ValueError, ["key_mask", "cache"], with_cache(mask=torch.ones(1, 3, dtype=torch.bool))),
        (ValueError, ["cache", "3 slots", "2"], with_cache(cache=(1, 2))),
        (ValueError, ["cache", "(2, 4, 10, 8)"], with_cache(cache=(2, 10))),
        (TypeError, ["cache", "LSHCache", "KVCache"], with_cache(cache=KVCache(1, 4, 10, 8))),
        (TypeError, ["cache", "dtype"], with_cache(cache=a_layer().double().make_cache(1, 10))),
        (RuntimeError, ["cache", "gradient"], with_cache(grad=True)),
    ],
)
def test_errors(kind: type[Exception], parts: list[str], call) -> None:
    assert_raises(kind, parts, call)
