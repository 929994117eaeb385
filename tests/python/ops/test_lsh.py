"""`longspan.lsh_attention` is softmax attention over the pairs that its rounds bring together."""

from typing import Any

import pytest
import torch
from checks import (
    DTYPES,
    assert_agree,
    assert_error_ratio,
    assert_raises,
    assert_same_bits,
    assert_strides_change_nothing,
    assert_threads_change_nothing,
    results,
    to,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import longspan
from longspan.ops.lsh import lsh_num_buckets
from longspan.reference import lsh as reference

HALVES = (torch.bfloat16, torch.float16)
CHUNKS = {"chunk_length": 16, "chunks_before": 1, "chunks_after": 0}


def inputs(
    batch: int = 2, h: int = 2, tokens: int = 100, size: int = 8, value_size: int = 5, **kw: Any
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    kw = {"dtype": torch.float64} | kw
    return {
        "qk": torch.randn(batch, h, tokens, size, generator=generator, dtype=torch.float64).to(**kw),
        "v": torch.randn(batch, h, tokens, value_size, generator=generator, dtype=torch.float64).to(
            **kw
        ),
    }


def some_buckets(batch: int, h: int, rounds: int, tokens: int, count: int = 6, seed: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, count, (batch, h, rounds, tokens), generator=generator)


def finite(lse: Tensor) -> Tensor:
    return torch.where(lse == -torch.inf, 0, lse)


def actual(buckets: Tensor, **options: Any):
    def call(qk: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = longspan.lsh_attention(qk, v, buckets=buckets, return_lse=True, **options)
        return out, finite(lse)

    return call


def oracle(buckets: Tensor, **options: Any):
    known = (
        "chunk_length",
        "chunks_before",
        "chunks_after",
        "attend_across_buckets",
        "wrap",
        "key_mask",
    )
    count = reference.meetings(buckets, **{n: options[n] for n in known if n in options})
    rest = {n: options[n] for n in ("causal", "dedup", "key_mask") if n in options}

    def call(qk: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        scale = options.get("scale", qk.shape[3] ** -0.5)
        out, lse = reference.lsh_attention(qk, v, count, scale=scale, **rest)
        return out, finite(lse)

    return call


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "as transformers": {"causal": True, "dedup": False, "wrap": True},
    "wrapping, two sides": {"dedup": False, "wrap": True, "chunks_before": 2, "chunks_after": 1},
    "two sides": {"chunks_before": 2, "chunks_after": 1},
    "own chunk, odd": {"chunks_before": 0, "chunk_length": 13},
    "own bucket": {"attend_across_buckets": False, "causal": True},
    "own bucket, repeated": {"attend_across_buckets": False, "dedup": False},
    "scale": {"scale": 0.9, "causal": True},
    "padding": {"key_mask": torch.arange(100) < torch.tensor([[100], [61]])},
    "padding, causal": {
        "causal": True,
        "key_mask": torch.rand(2, 100, generator=torch.Generator().manual_seed(1)) < 0.6,
    },
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str, rounds: int, dtype: torch.dtype) -> None:
    """Outputs, log-sum-exps and gradients of the dense softmax over the union (or sum) of rounds."""
    options = CHUNKS | OPTIONS[name]
    buckets = some_buckets(2, 2, rounds, 100)
    tensors = inputs(dtype=dtype)
    assert_agree(
        results(actual(buckets, **options), tensors),
        results(oracle(buckets, **options), to(torch.float64, tensors)),
    )


@pytest.mark.parametrize("tokens", [17, 31, 32, 33, 63, 64, 65, 127, 129, 300])
def test_lengths(tokens: int) -> None:
    buckets = some_buckets(1, 2, 2, tokens)
    options = CHUNKS | {"causal": True}
    tensors = inputs(1, 2, tokens, 16, 16)
    assert_agree(
        results(actual(buckets, **options), tensors), results(oracle(buckets, **options), tensors)
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 63, 64])
def test_within_a_chunk_it_is_dense_attention_without_itself(tokens: int, causal: bool) -> None:
    tensors = inputs(tokens=tokens)

    def dense(qk: Tensor, v: Tensor) -> Tensor:
        k = qk / torch.sqrt(qk.square().mean(-1, keepdim=True) + 1e-6)
        score = qk @ k.mT * 8**-0.5
        row, column = torch.arange(tokens)[:, None], torch.arange(tokens)
        seen = row > column if causal else row != column
        seen = seen | (~seen.any(-1, keepdim=True) & (row == column))
        return score.masked_fill(~seen, -torch.inf).softmax(-1) @ v

    found = results(lambda **x: longspan.lsh_attention(**x, causal=causal), tensors)
    assert_agree(found, results(dense, tensors))
    # ... and so it is where all tokens share a bucket and the chunk holds them all.
    one = torch.zeros(2, 2, 3, tokens, dtype=torch.int64)
    found = results(lambda **x: longspan.lsh_attention(**x, causal=causal, buckets=one), tensors)
    assert_agree(found, results(dense, tensors))


def test_more_rounds_come_closer_to_dense_attention() -> None:
    tensors = inputs(1, 4, 512, 16, 16)
    whole = longspan.lsh_attention(**tensors, chunk_length=512)
    errors = []
    for rounds in (1, 4, 16, 64):
        out = longspan.lsh_attention(
            **tensors, num_hashes=rounds, num_buckets=16, chunk_length=16, seed=0
        )
        errors.append(float((out - whole).square().mean().sqrt()))
    assert errors[0] > 1.5 * errors[1] > 2 * errors[2] > 3 * errors[3] > 0, errors


def test_similar_vectors_share_buckets() -> None:
    """The chance of a collision falls with the angle, and does not depend on the length."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 1, 1, 2000, 16, generator=generator)
    a = a / a.norm(dim=-1, keepdim=True)
    b = b - (a * b).sum(-1, keepdim=True) * a
    b = b / b.norm(dim=-1, keepdim=True)
    rotations = longspan.lsh_rotations(1, 16, num_hashes=8, num_buckets=16, seed=1)
    shares = []
    for degrees in (0, 15, 30, 60, 90, 150, 180):
        angle = torch.tensor(degrees * torch.pi / 180)
        turned = 3 * (a * angle.cos() + b * angle.sin())
        x, y = (longspan.lsh_buckets(z, rotations, num_buckets=16) for z in (a, turned))
        shares.append(float((x == y).double().mean()))
    assert shares[0] == 1.0
    assert shares[-1] == 0.0  # the opposite is in the opposite bucket
    assert shares == sorted(shares, reverse=True)
    assert shares[1] > 2 * shares[3]


@pytest.mark.parametrize("num_buckets", [2, 16, (4, 6), (2, 4, 8)], ids=str)
def test_buckets_are_the_greatest_of_both_signs(num_buckets: Any) -> None:
    factors = (num_buckets,) if isinstance(num_buckets, int) else num_buckets
    x = inputs(tokens=50)["qk"]
    rotations = longspan.lsh_rotations(2, 8, num_hashes=3, num_buckets=num_buckets, seed=4)
    found = longspan.lsh_buckets(x, rotations, num_buckets=num_buckets)
    turned = torch.einsum("bhtd,hdrn->bhrtn", x, rotations.double())
    wanted, unit = 0, 1
    for part, n in zip(turned.split([n // 2 for n in factors], dim=-1), factors):
        wanted = wanted + unit * torch.cat([part, -part], dim=-1).argmax(-1)
        unit *= n
    assert torch.equal(found, wanted)
    assert found.shape == (2, 2, 3, 50)
    assert len(found.unique()) > 0.7 * min(unit, 300)


def test_number_of_buckets() -> None:
    """Transformers' rule, by its own words: about two buckets a chunk, factors where they are many."""
    assert lsh_num_buckets(16384, 64) == (16, 32)
    assert lsh_num_buckets(4096, 64) == 128
    assert lsh_num_buckets(10, 64) == 2
    assert lsh_num_buckets(0, 1) == 2


@pytest.mark.parametrize("num_buckets", [8, (4, 4)], ids=str)
@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("causal", [False, True])
def test_as_transformers(causal: bool, rounds: int, num_buckets: Any) -> None:
    """Same buckets from the same seed; with its habits switched on, same outputs and gradients.

    These in double: its -1e5 for a token itself is rounded to 0.008 in float32.
    """
    modeling = pytest.importorskip("transformers.models.reformer.modeling_reformer")
    from transformers import ReformerConfig

    h, size, tokens = 2, 8, 96
    factors = num_buckets if isinstance(num_buckets, int) else list(num_buckets)
    config = ReformerConfig(
        hidden_size=h * size, num_attention_heads=h, attention_head_size=size, num_hashes=rounds,
        num_buckets=factors, lsh_attn_chunk_length=16, lsh_num_chunks_before=1, lsh_num_chunks_after=0,
        hash_seed=5, is_decoder=causal, lsh_attention_probs_dropout_prob=0.0, attn_layers=["lsh"],
    )  # fmt: skip
    layer = modeling.LSHSelfAttention(config, 0)
    for projection in (layer.query_key, layer.value):
        projection.weight.data.copy_(torch.eye(h * size))
    real = torch.ones(2, tokens, dtype=torch.bool)
    real[1, 70:] = False
    x = torch.randn(2, tokens, h * size)

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (h, size)).transpose(1, 2)

    rotations = longspan.lsh_rotations(h, size, num_hashes=rounds, num_buckets=num_buckets, seed=5)
    buckets = longspan.lsh_buckets(heads(x), rotations, num_buckets=num_buckets)
    count = num_buckets if isinstance(num_buckets, int) else num_buckets[0] * num_buckets[1]
    # Padding has a bucket of its own, and each round's buckets begin where the last one's end.
    told = buckets.masked_fill(~real[:, None, None], count)
    told = told + torch.arange(rounds)[:, None] * (count + 1)
    assert torch.equal(layer(x, attention_mask=real.long()).buckets, told)

    def theirs(x: Tensor) -> Tensor:
        out = layer.double()(x, attention_mask=real.long(), buckets=told).hidden_states
        return torch.where(real[..., None], out, 0)

    def ours(x: Tensor) -> Tensor:
        out = longspan.lsh_attention(
            heads(x), heads(x), buckets=buckets, chunk_length=16, causal=causal, dedup=False, wrap=True,
            key_mask=real,
        )  # fmt: skip
        return out.transpose(1, 2).flatten(2)

    found, wanted = (results(f, {"x": x.double()}) for f in (ours, theirs))
    for name, want in wanted.items():  # numpy's square root of D is rounded to float32
        torch.testing.assert_close(found[name], want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("dedup", [True, False])
def test_half_precision_error(dtype: torch.dtype, dedup: bool) -> None:
    buckets = some_buckets(2, 2, 3, 200)
    count = reference.meetings(buckets, **CHUNKS)

    def plain(qk: Tensor, v: Tensor) -> Tensor:
        k = (qk.float() / torch.sqrt(qk.float().square().mean(-1, keepdim=True) + 1e-6)).to(qk.dtype)
        if qk.dtype == torch.float64:
            k = qk / torch.sqrt(qk.square().mean(-1, keepdim=True) + 1e-6)
        score = qk @ k.mT * qk.shape[3] ** -0.5
        bias = torch.zeros(count.shape) if dedup else count.clamp(min=1).double().log()
        seen = (count > 0) & torch.ones(200, 200, dtype=torch.bool).tril(-1)
        seen[:, :, 0, 0] = True
        alone = ~seen.any(-1, keepdim=True) & torch.eye(200, dtype=torch.bool)
        return (score + bias.to(score)).masked_fill(~(seen | alone), -torch.inf).softmax(-1) @ v

    options = CHUNKS | {"causal": True, "dedup": dedup}
    assert_error_ratio(
        lambda qk, v: longspan.lsh_attention(qk, v, buckets=buckets, **options),
        plain,
        inputs(tokens=200, size=32, value_size=16),
        dtype,
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, dict[str, Any], int]:
    batch, h, rounds = (draw(st.integers(1, n)) for n in (2, 2, 4))
    tokens = draw(st.integers(1, 90))
    length = draw(st.integers(1, 40))
    options: dict[str, Any] = {
        "chunk_length": length,
        "chunks_before": draw(st.integers(0, 3)),
        "chunks_after": draw(st.integers(0, 2)),
        "causal": draw(st.booleans()),
        "dedup": draw(st.booleans()),
        "attend_across_buckets": draw(st.booleans()),
    }
    seed = draw(st.integers(0, 2**31))
    buckets = some_buckets(batch, h, rounds, tokens, draw(st.integers(1, 12)), seed)
    if draw(st.booleans()):
        generator = torch.Generator().manual_seed(seed)
        options["key_mask"] = torch.rand(batch, tokens, generator=generator) < draw(
            st.sampled_from([0.0, 0.5, 0.9])
        )
    options["wrap"] = not options["dedup"] and draw(st.booleans())
    return buckets, options, tokens


@given(cases())
def test_any_options(case: tuple[Tensor, dict[str, Any], int]) -> None:
    buckets, options, tokens = case
    tensors = inputs(buckets.shape[0], buckets.shape[1], tokens, 4, 3)
    told = dict(options)
    if tokens <= options["chunk_length"] and options["attend_across_buckets"]:
        buckets = buckets[:, :, :1]  # one round, which sees everything
        told |= {"chunks_before": 0, "chunks_after": 0, "wrap": False}
    assert_agree(results(actual(buckets, **options), tensors), results(oracle(buckets, **told), tensors))


@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(causal: bool) -> None:
    call = actual(some_buckets(1, 2, 2, 11, 3), chunk_length=3, causal=causal)
    assert gradcheck(call, [x.requires_grad_() for x in inputs(1, 2, 11, 3, 2).values()])


def test_causal_never_reads_what_comes_after() -> None:
    """With fixed buckets the Jacobian is strictly lower triangular, but for the first token's value."""
    tensors = inputs(1, 1, 24, 3, 2)
    buckets = some_buckets(1, 1, 3, 24, 4)
    options = {"buckets": buckets, "chunk_length": 4, "causal": True}
    for name in tensors:
        jacobian = torch.autograd.functional.jacobian(
            lambda x, name=name: longspan.lsh_attention(**(tensors | {name: x}), **options),
            tensors[name],
        )
        size = jacobian.abs().sum((0, 1, 3, 4, 5, 7))  # (row, of whose input)
        row, column = torch.arange(24)[:, None], torch.arange(24)
        assert (size[row < column] == 0).all()
        assert (size[row > column] > 0).sum() > 50
        if name == "v":
            itself = size.diagonal() > 0
            assert itself[0]
            alone = longspan.lsh_attention(**tensors, **options, return_lse=True)[1] == -torch.inf
            assert torch.equal(itself, alone[0, 0])


@pytest.mark.parametrize("where", ["qk", "v"])
def test_padding_is_neither_read_nor_written(where: str) -> None:
    key_mask = torch.arange(100) < torch.tensor([[100], [61]])
    buckets = some_buckets(2, 2, 3, 100)
    call = actual(buckets, **CHUNKS, key_mask=key_mask)
    tensors = inputs()
    clean = results(call, tensors)
    tensors[where][1, :, 61:] = torch.nan
    assert_same_bits(results(call, tensors), clean)
    assert (clean["out"][1, :, 61:] == 0).all()
    short = {n: x[1:, :, :61] for n, x in inputs().items()}
    alone = longspan.lsh_attention(**short, **CHUNKS, buckets=buckets[1:, :, :, :61])
    torch.testing.assert_close(clean["out"][1:, :, :61], alone)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_strides_threads(dtype: torch.dtype) -> None:
    buckets = some_buckets(2, 2, 2, 100)
    tensors = inputs(dtype=dtype)
    call = actual(buckets, **CHUNKS, causal=True)
    found = results(call, tensors)
    assert found["out"].dtype == dtype
    assert found["out 1"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    if dtype in (torch.float32, torch.bfloat16):
        assert_strides_change_nothing(call, tensors, ["qk", "v"])
        assert_threads_change_nothing(lambda: results(call, tensors))


def test_rotations_come_from_the_seed_or_the_generator() -> None:
    tensors = inputs(tokens=200)
    options: dict[str, Any] = {"chunk_length": 16, "num_hashes": 2, "return_buckets": True}

    def buckets(**more: Any) -> Tensor:
        return longspan.lsh_attention(**tensors, **options, **more)[1]

    assert torch.equal(buckets(seed=3), buckets(seed=3))
    assert not torch.equal(buckets(seed=3), buckets(seed=4))
    torch.manual_seed(1)
    first, second = buckets(), buckets()
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(first, buckets())
    rotations = longspan.lsh_rotations(2, 8, num_hashes=2, num_buckets=lsh_num_buckets(200, 16), seed=3)
    assert torch.equal(buckets(seed=3), buckets(rotations=rotations))


def test_checkpoint_autocast_and_compile(fresh_compiler: None) -> None:
    tensors = inputs(tokens=100, dtype=torch.float32)

    def call(qk: Tensor, v: Tensor) -> Tensor:
        return longspan.lsh_attention(qk, v, chunk_length=16, num_hashes=2, causal=True)

    torch.manual_seed(2)
    wanted = results(call, tensors)
    torch.manual_seed(2)  # the recomputation draws the same rotations
    again = results(lambda **x: checkpoint(call, *x.values(), use_reentrant=False), tensors)
    assert_same_bits(again, wanted)
    buckets = some_buckets(2, 2, 2, 100)
    fixed = actual(buckets, **CHUNKS)
    with torch.autocast("cpu", torch.bfloat16):
        out = fixed(**tensors)[0]
    assert_same_bits({"out": out}, {"out": fixed(**to(torch.bfloat16, tensors))[0]})
    compiled = torch.compile(fixed, fullgraph=True, backend="aot_eager")
    assert_agree(results(compiled, tensors), results(fixed, tensors))


def test_dropout() -> None:
    tensors = inputs(1, 4, 400, 16, 1)
    tensors["v"] = torch.ones_like(tensors["v"])
    options = {"buckets": some_buckets(1, 4, 2, 400), "chunk_length": 16}
    out = longspan.lsh_attention(**tensors, **options, dropout_p=0.25)
    assert out.std() > 0.05  # each weight is dropped, or grows by 1 / 0.75
    torch.testing.assert_close(out.mean(), torch.tensor(1.0).double(), rtol=0.03, atol=0)
    assert_agree({"out": longspan.lsh_attention(**tensors, **options)}, {"out": torch.ones_like(out)})


class _Largest(TorchDispatchMode):
    """Elements of all that is made, and of the largest tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.total = self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor):
                size = x.untyped_storage().nbytes()
                self.total += size
                self.largest = max(self.largest, size)
        return out


def test_memory_is_linear_in_the_length() -> None:
    def made(tokens: int) -> tuple[int, int]:
        tensors = [
            x.requires_grad_() for x in inputs(1, 1, tokens, 16, 16, dtype=torch.float32).values()
        ]
        with _Largest() as mode:
            longspan.lsh_attention(*tensors, num_hashes=2, num_buckets=(8, 8)).sum().backward()
        return mode.total, mode.largest

    (total, largest), (twice, largest_of_twice) = made(4096), made(8192)
    assert twice <= 2.1 * total
    assert largest_of_twice <= 2.1 * largest
    assert largest < 4096 * 4096 / 8


def test_empty_tensors() -> None:
    for batch, tokens in ((0, 10), (2, 0), (0, 0)):
        tensors = inputs(batch, 2, tokens)
        found = results(lambda **x: longspan.lsh_attention(**x, return_lse=True), tensors)
        assert found["out"].shape == (batch, 2, tokens, 5)
        assert found["out 1"].shape == (batch, 2, tokens)


# ---- a step


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dedup": False},
        {"chunks_before": 2, "chunks_after": 1},
        {"attend_across_buckets": False, "scale": 0.7},
    ],
    ids=str,
)
def test_a_step_is_the_last_row(options: dict[str, Any], dtype: torch.dtype) -> None:
    """At every length, from the first token on, and sequences of two lengths at once."""
    options = {"chunk_length": 8, "num_buckets": (2, 4)} | options
    tensors = inputs(2, 2, 45, dtype=dtype)
    rotations = longspan.lsh_rotations(2, 8, num_hashes=3, num_buckets=(2, 4), seed=0)
    caches = [torch.full((2, 2, 50, n), torch.nan, dtype=dtype) for n in (8, 5)]
    buckets = torch.full((2, 2, 3, 50), 99, dtype=torch.int32)
    ahead = 7  # row 1 is so many tokens further
    prompt = {n: x[1:, :, :ahead] for n, x in tensors.items()}
    _, told = longspan.lsh_attention(
        **prompt, **options, rotations=rotations, causal=True, return_buckets=True
    )
    for cache, x in zip(caches, prompt.values()):
        cache[1:, :, :ahead] = x
    buckets[1:, :, :, :ahead] = told
    for t in range(45 - ahead):
        at = (t, t + ahead)
        new = [torch.stack([x[row, :, i : i + 1] for row, i in enumerate(at)]) for x in tensors.values()]
        lengths = torch.tensor(at) + 1
        out = longspan.lsh_attention_step(*new, *caches, buckets, lengths, rotations, **options)
        for row, i in enumerate(at):
            past = {n: x[row : row + 1, :, : i + 1] for n, x in tensors.items()}
            whole = longspan.lsh_attention(**past, **options, rotations=rotations, causal=True)
            assert_agree({"out": out[row]}, {"out": whole[0, :, -1:].double()})


def test_a_step_reads_a_few_rows_only() -> None:
    """NaN in every row of other chunks changes nothing."""
    options = {"chunk_length": 8, "num_buckets": 16}
    tensors = inputs(1, 1, 200)
    rotations = longspan.lsh_rotations(1, 8, num_hashes=2, num_buckets=16, seed=0)
    buckets = longspan.lsh_buckets(tensors["qk"], rotations, num_buckets=16)
    count = reference.meetings(buckets, chunk_length=8, chunks_before=1, chunks_after=0)
    read = count[0, 0, -1] > 0
    assert 10 < read.sum() <= 32
    new = [x[:, :, -1:].clone() for x in tensors.values()]
    caches = list(tensors.values())
    step = (torch.tensor([200]), rotations)
    wanted = longspan.lsh_attention_step(*new, *caches, buckets, *step, **options)
    for x in caches:
        x[0, 0, ~read] = torch.nan
    out = longspan.lsh_attention_step(*new, *caches, buckets, *step, **options)
    assert_same_bits({"out": out}, {"out": wanted})


# ---- errors


def attend(**change: Any):
    return lambda: longspan.lsh_attention(**(inputs() | change))


def step(**change: Any):
    arguments: dict[str, Any] = {
        "qk": torch.ones(1, 2, 1, 8), "v": torch.ones(1, 2, 1, 5), "qk_cache": torch.ones(1, 2, 9, 8),
        "v_cache": torch.ones(1, 2, 9, 5), "bucket_cache": torch.ones(1, 2, 3, 9, dtype=torch.int64),
        "cache_seqlens": torch.tensor([9]), "num_buckets": 4,
        "rotations": torch.ones(2, 8, 3, 2),
    }  # fmt: skip
    return lambda: longspan.lsh_attention_step(**(arguments | change))


@pytest.mark.parametrize(
    ("kind", "parts", "call"),
    [
        (TypeError, ["qk", "int64"], attend(qk=torch.ones(2, 2, 100, 8, dtype=torch.int64))),
        (ValueError, ["qk", "(100, 8)"], attend(qk=torch.ones(100, 8).double())),
        (TypeError, ["v", "float32"], attend(v=torch.ones(2, 2, 100, 5))),
        (ValueError, ["v", "(2, 2, 99, 5)"], attend(v=torch.ones(2, 2, 99, 5).double())),
        (ValueError, ["num_hashes", "0"], attend(num_hashes=0)),
        (ValueError, ["num_buckets", "even", "5"], attend(num_buckets=5)),
        (ValueError, ["num_buckets", "even", "(4, 3)"], attend(num_buckets=(4, 3))),
        (ValueError, ["num_buckets", "()"], attend(num_buckets=())),
        (ValueError, ["chunk_length", "0"], attend(chunk_length=0)),
        (ValueError, ["chunks_before", "-1"], attend(chunks_before=-1)),
        (ValueError, ["chunks_after", "-1"], attend(chunks_after=-1)),
        (ValueError, ["wrap", "dedup"], attend(wrap=True)),
        (ValueError, ["norm_eps", "0"], attend(norm_eps=0.0)),
        (ValueError, ["dropout_p", "1.0"], attend(dropout_p=1.0)),
        (ValueError, ["seed", "rotations"], attend(seed=1, rotations=torch.ones(1))),
        (TypeError, ["buckets", "float32"], attend(buckets=torch.ones(2, 2, 1, 100))),
        (ValueError, ["buckets", "(2, 2, 100)"], attend(buckets=torch.ones(2, 2, 100).long())),
        (ValueError, ["rotations", "(2, 8, 3, 7)"], attend(rotations=torch.ones(2, 8, 3, 7))),
        (TypeError, ["key_mask", "bool"], attend(key_mask=torch.ones(2, 100))),
        (ValueError, ["key_mask", "(2, 9)"], attend(key_mask=torch.ones(2, 9).bool())),
        (
            ValueError,
            ["qk", "one token", "2"],
            step(qk=torch.ones(1, 2, 2, 8), v=torch.ones(1, 2, 2, 5)),
        ),
        (TypeError, ["qk_cache", "float64"], step(qk_cache=torch.ones(1, 2, 9, 8).double())),
        (ValueError, ["qk_cache", "(1, 2, 9, 7)"], step(qk_cache=torch.ones(1, 2, 9, 7))),
        (ValueError, ["v_cache", "(1, 2, 8, 5)"], step(v_cache=torch.ones(1, 2, 8, 5))),
        (
            ValueError,
            ["bucket_cache", "(1, 2, 4, 9)"],
            step(bucket_cache=torch.ones(1, 2, 4, 9, dtype=torch.int64)),
        ),
        (ValueError, ["cache_seqlens", "9", "10"], step(cache_seqlens=torch.tensor([10]))),
        (ValueError, ["cache_seqlens", "0"], step(cache_seqlens=torch.tensor([0]))),
        (RuntimeError, ["gradient"], step(qk=torch.ones(1, 2, 1, 8, requires_grad=True))),
        (
            ValueError,
            ["num_hashes", "0"],
            lambda: longspan.lsh_rotations(1, 2, num_hashes=0, num_buckets=2),
        ),
    ],
)
def test_errors(kind: type[Exception], parts: list[str], call) -> None:
    assert_raises(kind, parts, call)
