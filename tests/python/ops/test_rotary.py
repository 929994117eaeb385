"""`longspan.apply_rotary` computes what the reference computes in double."""

from typing import Any

import pytest
import torch
from checks import (
    assert_agree,
    assert_error_ratio,
    assert_raises,
    assert_same_bits,
    assert_strides_change_nothing,
    assert_threads_change_nothing,
    results,
    to,
)
from torch import Tensor

import longspan
from longspan.reference import rotary as reference

# batch, heads, kv heads, tokens, channels, rotated channels: around vector widths and blocks of tokens
SHAPES = [
    (2, 3, 1, 5, 8, 8),
    (1, 1, 1, 1, 2, 2),
    (1, 2, 2, 64, 64, 64),
    (2, 4, 2, 65, 80, 32),
    (1, 2, 1, 129, 40, 40),
    (1, 3, 3, 7, 64, 16),
    (1, 2, 1, 3, 30, 26),
    (1, 1, 1, 2, 5, 0),
    (1, 1, 1, 2, 256, 34),
]
ROTATE = longspan.apply_rotary


def tables(rows: int, channels: int, *batch: int, dtype: torch.dtype = torch.float64) -> Any:
    angle = 3 * torch.randn(*batch, rows, channels // 2, dtype=torch.float64)
    angle = torch.cat([angle, angle], dim=-1)
    return (1.2 * angle.cos()).to(dtype), (1.2 * angle.sin()).to(dtype)


def heads(b: int, h: int, kv: int, t: int, d: int) -> dict[str, Tensor]:
    return {
        "q": torch.randn(b, h, t, d, dtype=torch.float64),
        "k": torch.randn(b, kv, t, d, dtype=torch.float64),
    }


def ours(cos: Tensor, sin: Tensor, **options: Any) -> Any:
    def call(q: Tensor, k: Tensor) -> Any:
        same = torch.float64 if q.dtype == torch.float64 else torch.float32
        return ROTATE(q, k, cos.to(same), sin.to(same), **options)

    return call


def theirs(cos: Tensor, sin: Tensor, **options: Any) -> Any:
    return lambda q, k: tuple(reference.rotate(x, cos, sin, **options) for x in (q, k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("interleaved", [False, True])
def test_shapes(isa: str, dtype: torch.dtype, interleaved: bool) -> None:
    for b, h, kv, t, d, r in SHAPES:
        for batch in ((), (1,), (b,)):
            given = to(dtype, heads(b, h, kv, t, d))
            cos, sin = (x.to(dtype).double() for x in tables(t, r, *batch))
            found = results(ours(cos, sin, interleaved=interleaved), given)
            expected = results(theirs(cos, sin, interleaved=interleaved), to(torch.float64, given))
            assert_agree(found, expected)
            inplace = to(dtype, given)
            with torch.no_grad():
                q, k = (x.clone() for x in inplace.values())
                assert ROTATE(
                    q, k, cos.to(dtype), sin.to(dtype), interleaved=interleaved, inplace=True
                ) == (q, k)
            assert_same_bits({"out": q, "out 1": k}, {n: found[n] for n in ("out", "out 1")})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("interleaved", [False, True])
def test_half_precisions(isa: str, dtype: torch.dtype, interleaved: bool) -> None:
    for r in (32, 24, 10):
        cos, sin = tables(70, r)

        def plain(q: Tensor, k: Tensor, cos: Tensor = cos, sin: Tensor = sin) -> tuple[Tensor, ...]:
            c, s = cos.to(q.dtype), sin.to(q.dtype)
            if interleaved:
                c, s = (x[:, : x.shape[1] // 2].repeat_interleave(2, dim=1) for x in (c, s))

            def turn(x: Tensor) -> Tensor:
                x, rest = x[..., : c.shape[1]], x[..., c.shape[1] :]
                if interleaved:
                    other = torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
                else:
                    a, b = x.chunk(2, dim=-1)
                    other = torch.cat([-b, a], dim=-1)
                return torch.cat([x * c + other * s, rest], dim=-1)

            return turn(q), turn(k)

        def same_tables(
            q: Tensor, k: Tensor, cos: Tensor = cos, sin: Tensor = sin
        ) -> tuple[Tensor, ...]:
            return ROTATE(q, k, cos.to(q.dtype), sin.to(q.dtype), interleaved=interleaved)

        assert_error_ratio(same_tables, plain, heads(2, 3, 1, 70, 32), dtype)
        assert_error_ratio(ours(cos, sin, interleaved=interleaved), plain, heads(1, 2, 1, 70, 40), dtype)


def test_as_transformers_has_it() -> None:
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    given = to(torch.float32, heads(2, 9, 3, 33, 64))
    cos, sin = tables(33, 64, 2, dtype=torch.float32)
    expected = modeling.apply_rotary_pos_emb(*given.values(), cos, sin)
    torch.testing.assert_close(ROTATE(*given.values(), cos, sin), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
def test_positions_are_rows_of_the_tables(integers: torch.dtype) -> None:
    given, (cos, sin) = heads(3, 2, 1, 70, 16), tables(500, 12)
    for positions in (torch.randint(0, 500, (70,)), torch.randint(0, 500, (3, 70))):
        at = positions.to(integers)
        found = results(ours(cos, sin, positions=at), given)
        assert_agree(found, results(theirs(cos, sin, positions=positions), given))
        if at.dim() == 1:
            assert_same_bits(results(ours(cos, sin, positions=at[None]), given), found)


def test_packed_sequences_count_from_their_starts() -> None:
    lengths = [5, 0, 1, 64, 30]
    cu = torch.tensor([0, *lengths]).cumsum(0)
    (cos, sin), given = tables(64, 8), heads(1, 3, 1, 100, 8)
    packed = {name: x[0].transpose(0, 1) for name, x in given.items()}
    found = results(ours(cos, sin, cu_seqlens=cu), packed)
    at = torch.cat([torch.arange(n) for n in lengths])
    assert torch.equal(reference.token_positions(cu, 100), at)
    q, k = theirs(cos, sin, positions=at)(**given)
    assert_agree(
        {name: found[name] for name in ("out", "out 1")},
        {"out": q[0].transpose(0, 1), "out 1": k[0].transpose(0, 1)},
    )
    q, k = (x.clone() for x in packed.values())
    assert ROTATE(q, k, cos, sin, cu_seqlens=cu.int(), inplace=True) == (q, k)
    assert torch.equal(q, found["out"])
    assert torch.equal(k, found["out 1"])


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_score_depends_on_the_distance_alone(interleaved: bool) -> None:
    angle = torch.arange(50)[:, None] * 10.0 ** -torch.arange(4, dtype=torch.float64)
    cos, sin = (torch.cat([x, x], dim=-1) for x in (angle.cos(), angle.sin()))
    q, k = (x.expand(1, 1, 50, 8) for x in torch.randn(2, 8, dtype=torch.float64))
    q, k = ROTATE(q, k, cos, sin, interleaved=interleaved)
    score = (q @ k.mT)[0, 0]
    torch.testing.assert_close(score[10:, 10:], score[:-10, :-10])
    torch.testing.assert_close(q.norm(dim=-1), q[:, :, :1].norm(dim=-1).expand(1, 1, 50))


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients_first_and_second(interleaved: bool) -> None:
    q, k = (x.requires_grad_() for x in heads(2, 2, 1, 3, 6).values())
    cos, sin = tables(3, 4)
    for call in (
        lambda q, k: ROTATE(q, k, cos, sin, interleaved=interleaved),
        lambda q, k: ROTATE(q, k, cos, sin, interleaved=interleaved)[1],  # none for q
        lambda q, k: ROTATE(q, None, cos, sin, interleaved=interleaved)[0] * k.sum(),
    ):
        assert torch.autograd.gradcheck(call, (q, k))
        assert torch.autograd.gradgradcheck(call, (q, k))
    assert ROTATE(q, None, cos, sin)[1] is None
    (dq,) = torch.func.grad(lambda q: ROTATE(q, None, cos, sin)[0].sum(), argnums=(0,))(q)
    assert torch.equal(dq, torch.autograd.grad(ROTATE(q, k, cos, sin)[0].sum(), q)[0])


def test_strides_and_threads_change_nothing() -> None:
    for interleaved in (False, True):
        cos, sin = tables(70, 24, dtype=torch.float32)
        turned = [x.mT.contiguous().mT for x in (cos, sin)]
        given = to(torch.float32, heads(2, 5, 2, 70, 30))
        call = ours(cos, sin, interleaved=interleaved)
        assert_strides_change_nothing(call, given, ["q", "k"])
        assert_same_bits(results(ours(*turned, interleaved=interleaved), given), results(call, given))
        doubled = [torch.cat([x[:, 3:15]] * 2, dim=1) for x in (cos, sin)]
        wide = [torch.cat([torch.zeros(70, 5), x, torch.zeros(70, 2)], dim=1)[:, 5:-2] for x in doubled]
        assert_same_bits(results(ours(*wide), given), results(ours(*doubled), given))
        assert_threads_change_nothing(lambda call=call, given=given: results(call, given))
    q = torch.randn(2, 70, 5, 24).transpose(1, 2)
    assert ROTATE(q, None, cos, sin)[0].transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_large_outputs_go_past_the_caches(isa: str, dtype: torch.dtype) -> None:
    """The same bits as in place, where stores are ordinary ones."""
    size = torch.empty((), dtype=dtype).element_size()
    q = torch.randn(1, 2, (5 << 20) // (160 * size), 80).to(dtype)
    same = torch.float64 if dtype == torch.float64 else torch.float32
    for x in (q, q.transpose(1, 2).contiguous().transpose(1, 2), q[..., :72]):
        for channels, interleaved in ((64, False), (64, True), (40, False)):
            cos, sin = tables(x.shape[2], channels, dtype=same)
            out, _ = ROTATE(x, None, cos, sin, interleaved=interleaved)
            again, _ = ROTATE(x.clone(), None, cos, sin, interleaved=interleaved, inplace=True)
            assert torch.equal(out, again)


def test_empty() -> None:
    for b, t in ((0, 3), (2, 0)):
        found = results(ours(*tables(t, 4)), heads(b, 2, 1, t, 4))
        assert found["out"].shape == found["d q"].shape == (b, 2, t, 4)


def test_nothing_comes_of_what_is_not_there() -> None:
    """NaN in unused rows and in the second halves of sin; infinite channels that are not turned."""
    given, (cos, sin) = heads(1, 2, 1, 4, 8), tables(9, 4)
    expected = results(ours(cos, sin, positions=torch.tensor([1, 3, 5, 7])), given)
    cos[::2], sin[::2], sin[:, 2:] = torch.nan, torch.nan, torch.nan
    assert_same_bits(results(ours(cos, sin, positions=torch.tensor([1, 3, 5, 7])), given), expected)
    q = given["q"].clone()
    q[..., 4:] = torch.inf
    out, _ = ROTATE(q, None, cos, sin, positions=torch.tensor([1, 3, 5, 7]))
    assert torch.equal(out[..., 4:], q[..., 4:])
    assert torch.equal(out[..., :4], expected["out"][..., :4])


def test_opcheck_compile_and_export(fresh_compiler: None) -> None:
    given, (cos, sin) = to(torch.float32, heads(2, 3, 1, 6, 8)), tables(6, 8, dtype=torch.float32)
    positions, op = torch.arange(6), torch.ops.longspan
    for wanted in (False, True):
        q, k = (x.detach().clone().requires_grad_(wanted) for x in given.values())
        torch.library.opcheck(op.apply_rotary, (q, k, cos, sin, positions, None, False, False))
        torch.library.opcheck(op.apply_rotary, (q, None, cos, sin, None, None, True, True))
        across = q.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(wanted)
        torch.library.opcheck(op.apply_rotary, (across, k, cos, sin, None, None, True, False))
    q, k = given.values()
    torch.library.opcheck(op.apply_rotary_, (q.clone(), k.clone(), cos, sin, None, None, False))
    torch.library.opcheck(op.apply_rotary_, (q.clone(), None, cos, sin, positions, None, True))

    def call(q: Tensor, k: Tensor) -> Any:
        return ROTATE(q, k, cos, sin, positions=positions)

    assert_same_bits(results(torch.compile(call, fullgraph=True), given), results(call, given))

    def inplace(q: Tensor, k: Tensor) -> Any:
        q, k = q * 1, k * 1
        return ROTATE(q, k, cos, sin, inplace=True)

    expected = inplace(q, k)
    assert torch.equal(torch.compile(inplace, fullgraph=True)(q, k)[0], expected[0])

    class Module(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
            return ROTATE(q, k, cos, sin)

    program = torch.export.export(Module(), (q, k, cos, sin))
    assert torch.equal(program.module()(q, k, cos, sin)[1], expected[1])
    meta = ROTATE(q.to("meta"), None, cos.to("meta"), sin.to("meta"))
    assert meta[0].shape == q.shape


def test_devices_without_kernels_take_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    given, (cos, sin) = heads(2, 3, 1, 6, 8), tables(6, 4)
    cu, at = torch.tensor([0, 2, 6]), torch.tensor([[3, 1, 0, 5, 2, 4]] * 2)
    packed = {name: x[0].transpose(0, 1) for name, x in given.items()}
    expected = [
        results(ours(cos, sin, positions=at, interleaved=True), given),
        results(ours(cos, sin, cu_seqlens=cu), packed),
    ]
    monkeypatch.setattr(longspan.ops.rotary, "has_kernels", lambda *_: False)
    assert_agree(results(ours(cos, sin, positions=at, interleaved=True), given), expected[0])
    assert_agree(results(ours(cos, sin, cu_seqlens=cu), packed), expected[1])
    q, k = (x.clone() for x in given.values())
    assert ROTATE(q, k, cos, sin, positions=at, interleaved=True, inplace=True) == (q, k)
    torch.testing.assert_close(q, expected[0]["out"])


def test_wrong_arguments_are_named() -> None:
    q, k = (x.float() for x in heads(2, 3, 1, 6, 8).values())
    cos, sin = tables(6, 8, dtype=torch.float32)
    at = torch.arange(6)
    for kind, parts, call in (
        (TypeError, ["q", "tensor", "None"], lambda: ROTATE(None, k, cos, sin)),
        (TypeError, ["q", "int64"], lambda: ROTATE(q.long(), k, cos, sin)),
        (ValueError, ["q", "batch, heads"], lambda: ROTATE(q[0], k, cos, sin)),
        (ValueError, ["q", "total"], lambda: ROTATE(q, k, cos, sin, cu_seqlens=at)),
        (TypeError, ["k", "q's dtype", "float64"], lambda: ROTATE(q, k.double(), cos, sin)),
        (ValueError, ["k", "but for its heads"], lambda: ROTATE(q, k[:, :, :5], cos, sin)),
        (TypeError, ["cos", "int64"], lambda: ROTATE(q, k, cos.long(), sin)),
        (TypeError, ["sin", "cos's dtype"], lambda: ROTATE(q, k, cos, sin.bfloat16())),
        (TypeError, ["cos", "float64"], lambda: ROTATE(q, k, cos.double(), sin.double())),
        (ValueError, ["cos", "(5, 8)"], lambda: ROTATE(q, k, cos[:5], sin)),
        (ValueError, ["cos", "1 or batch"], lambda: ROTATE(q, k, cos.expand(3, 6, 8), sin)),
        (ValueError, ["sin", "cos's shape"], lambda: ROTATE(q, k, cos, sin[:, :4])),
        (ValueError, ["cos", "even", "3"], lambda: ROTATE(q, k, cos[:, :3], sin[:, :3])),
        (ValueError, ["cos", "up to 8"], lambda: ROTATE(q, k, *tables(6, 10, dtype=torch.float32))),
        (TypeError, ["positions", "float32"], lambda: ROTATE(q, k, cos, sin, positions=at.float())),
        (ValueError, ["positions", "(5,)"], lambda: ROTATE(q, k, cos, sin, positions=at[:5])),
        (
            ValueError,
            ["positions", "batch"],
            lambda: ROTATE(q, k, cos, sin, positions=at.expand(3, 6)),
        ),
        (RuntimeError, ["positions", "6", "got 6"], lambda: ROTATE(q, k, cos, sin, positions=at + 1)),
        (RuntimeError, ["positions", "got -1"], lambda: ROTATE(q, k, cos, sin, positions=at - 1)),
        (
            ValueError,
            ["positions and cu_seqlens"],
            lambda: ROTATE(q, k, cos, sin, positions=at, cu_seqlens=at),
        ),
        (ValueError, ["q", "stride 1"], lambda: ROTATE(q.mT, None, *square(), inplace=True)),
        (
            ValueError,
            ["q", "memory of its own"],
            lambda: ROTATE(q[:1].expand(2, 3, 6, 8), None, cos, sin, inplace=True),
        ),
    ):
        assert_raises(kind, parts, call)
    packed = q[0].transpose(0, 1)
    for cu, parts in (
        ([0, 5], ["cu_seqlens", "0 to 5"]),
        ([1, 6], ["cu_seqlens", "1 to 6"]),
        ([0, 4, 2, 6], ["cu_seqlens", "4 before 2"]),
        ([0, 9, 6], ["cu_seqlens", "0 before 9"]),
    ):
        wrong = torch.tensor(cu)
        assert_raises(
            RuntimeError, parts, lambda wrong=wrong: ROTATE(packed, None, cos, sin, cu_seqlens=wrong)
        )
    six = torch.tensor([0, 6])
    assert_raises(
        RuntimeError,
        ["cu_seqlens", "at most 5"],
        lambda: ROTATE(packed, None, cos[:5], sin[:5], cu_seqlens=six),
    )
    assert_raises(
        RuntimeError, ["cos", "no gradient"], lambda: ROTATE(q, k, cos.clone().requires_grad_(), sin)
    )
    assert_raises(
        RuntimeError,
        ["inplace=False"],
        lambda: ROTATE(q.clone().requires_grad_(), k, cos, sin, inplace=True),
    )


def square() -> Any:
    return tables(8, 6, dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tables_of_repeated_neighbours_raise(dtype: torch.dtype) -> None:
    q, (cos, sin) = torch.randn(1, 1, 4, 8), tables(4, 8, dtype=dtype)
    pairwise = [x[:, :4].repeat_interleave(2, dim=1) for x in (cos, sin)]
    for options in ({}, {"positions": torch.arange(4)}):
        assert_raises(
            RuntimeError,
            ["cos", "twice", "interleaved"],
            lambda options=options: ROTATE(q, None, *pairwise, interleaved=True, **options),
        )
