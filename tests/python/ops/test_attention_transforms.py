"""`longspan.attention` and its siblings under torch.compile, export, autocast, vmap and opcheck."""

from typing import Any

import pytest
import torch
from attention_oracle import actual, expected, heads
from checks import assert_agree, assert_raises, assert_same_bits, results
from torch import Tensor
from torch.library import opcheck

import longspan

OPS = torch.ops.longspan
RULE = (20, 0, 3, 0.25, 2.0, 0.0)  # left, right, sink_tokens, scale, softcap, dropout_p
OPTIONS: dict[str, Any] = {"causal": True, "window": (20, -1), "sink_tokens": 3, "softcap": 2.0}


def forward_arguments(requires_grad: bool, packed: bool = False, bshd: bool = False) -> list[Any]:
    batch = 1 if packed else 2
    tensors = [x.float() for x in heads(batch, 4, 2, 30, 30, 16).values()]
    if bshd:
        tensors = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    sinks = torch.randn(4)
    mask = None if packed else torch.randn(2, 1, 30, 30)
    for x in (*tensors, sinks, *([] if mask is None else [mask])):
        x.requires_grad_(requires_grad)
    cu = torch.tensor([0, 10, 30]) if packed else None
    ranges = None if packed else torch.tensor([[0, 30, 0], [3, 25, 1]])
    return [*tensors, mask, sinks, torch.rand(4), cu, cu, ranges, None, *RULE]


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("layout", ["plain", "packed", "tokens outside heads"])
def test_opcheck_forward(layout: str, requires_grad: bool) -> None:
    arguments = forward_arguments(requires_grad, layout == "packed", layout == "tokens outside heads")
    opcheck(OPS.attention_forward.default, tuple(arguments))


@pytest.mark.parametrize("with_d_lse", [False, True])
@pytest.mark.parametrize("layout", ["plain", "packed", "tokens outside heads"])
def test_opcheck_backward(layout: str, with_d_lse: bool) -> None:
    q, k, v, mask, *rest = forward_arguments(False, layout == "packed", layout == "tokens outside heads")
    out, lse = OPS.attention_forward(q, k, v, mask, *rest)
    d_lse = torch.randn_like(lse) if with_d_lse else None
    arguments = (torch.randn_like(out), d_lse, q, k, v, out, lse, mask, *rest)
    opcheck(OPS.attention_backward.default, arguments)
    if mask is not None:
        opcheck(OPS.attention_mask_backward.default, arguments)


@pytest.mark.parametrize("paged", [False, True])
def test_opcheck_decode(paged: bool) -> None:
    cache = torch.randn(6, 16, 2, 8) if paged else torch.randn(2, 2, 40, 8)
    table = torch.tensor([[0, 1, 2], [3, 4, 5]]) if paged else None
    new = torch.randn(2, 2, 1, 8)
    cos = torch.randn(48, 8)
    arguments = (
        torch.randn(2, 4, 1, 8), cache, cache.clone(), torch.tensor([40, 7]), new, new, cos, cos, table,
        torch.tensor([1, 0]), None, torch.randn(4), torch.rand(4), False, 20, 0, 3, 0.25, 2.0,
    )  # fmt: skip
    opcheck(OPS.attention_decode.default, arguments)


def call_all(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Work before and after, so that there is a graph to break."""
    out, lse = longspan.attention(q * 2, k, v, mask, sinks=sinks, return_lse=True, **OPTIONS)
    merged, _ = longspan.merge_attention([out, out], [lse, lse])
    return merged.sin(), lse


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole_with_dynamic_shapes(fresh_compiler: None, backend: str) -> None:
    compiled = torch.compile(call_all, fullgraph=True, dynamic=True, backend=backend)
    for tokens, keys in [(40, 70), (64, 64), (7, 90)]:
        tensors = heads(2, 4, 2, tokens, keys, 16)
        tensors |= {"mask": torch.randn(tokens, keys).double(), "sinks": torch.randn(4).double()}
        assert_agree(results(compiled, tensors), results(call_all, tensors))


def test_compiles_without_gradient_and_with_transposed_inputs(fresh_compiler: None) -> None:
    compiled = torch.compile(longspan.attention, fullgraph=True, backend="aot_eager")
    for dtype in (torch.float32, torch.bfloat16):
        tensors = {n: x.transpose(1, 2) for n, x in heads(2, 30, 30, 4, 4, 16, dtype=dtype).items()}
        out = compiled(**tensors, causal=True)
        want = longspan.attention(**tensors, causal=True)
        assert_same_bits({"out": out}, {"out": want})
        assert out.stride() == want.stride()


def test_compiles_packed(fresh_compiler: None) -> None:
    def call(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
        return longspan.attention_varlen(q, k, v, cu, cu.int(), causal=True).cos()

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for offsets in ([0, 20, 50], [0, 0, 33, 40]):
        x = {n: torch.randn(offsets[-1], 2, 8).double() for n in "qkv"} | {"cu": torch.tensor(offsets)}
        assert_agree(results(compiled, x), results(call, x))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_decoding_that_writes_in_place(fresh_compiler: None, backend: str) -> None:
    def step(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, new: Tensor) -> Tensor:
        out = longspan.attention_decode(q + 1, k_cache, v_cache, lengths, k_new=new * 2, v_new=new)
        return out * 3

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    q, new = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 1, 8)
    eager, whole = ([torch.zeros(2, 2, 20, 8), torch.zeros(2, 2, 20, 8)] for _ in range(2))
    for n in (1, 2, 3):
        lengths = torch.tensor([n, n + 4])
        want, found = step(q, *eager, lengths, new), compiled(q, *whole, lengths, new)
        assert_same_bits({"out": found}, {"out": want})
        assert_same_bits({"k": whole[0], "v": whole[1]}, {"k": eager[0], "v": eager[1]})


class Module(torch.nn.Module):
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor
    ) -> tuple[Tensor, Tensor]:
        return call_all(q, k, v, mask, sinks)


def test_exports_with_dynamic_lengths() -> None:
    def inputs(tokens: int, keys: int) -> tuple[Tensor, ...]:
        return (
            *heads(2, 4, 2, tokens, keys, 16).values(),
            torch.randn(tokens, keys).double(),
            torch.randn(4).double(),
        )

    t, s = torch.export.Dim("t", min=2), torch.export.Dim("s", min=2)
    shapes = ({2: t}, {2: s}, {2: s}, {0: t, 1: s}, {})
    program = torch.export.export(Module(), inputs(20, 30), dynamic_shapes=shapes)
    assert "longspan.attention_forward" in str(program.graph)
    for lengths in ((20, 30), (33, 70)):
        arguments = inputs(*lengths)
        found = program.module()(*arguments)
        assert_same_bits(dict(enumerate(found)), dict(enumerate(call_all(*arguments))))


def test_exports_decoding() -> None:
    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("k", torch.zeros(1, 2, 16, 8))
            self.register_buffer("v", torch.zeros(1, 2, 16, 8))

        def forward(self, q: Tensor, new: Tensor, lengths: Tensor) -> Tensor:
            return longspan.attention_decode(q, self.k, self.v, lengths, k_new=new, v_new=new)

    arguments = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 1, 8), torch.tensor([1])
    module = torch.export.export(Step(), arguments).module()
    eager = Step()
    for n in (1, 2, 3):
        q, new = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 1, 8)
        found, want = module(q, new, torch.tensor([n])), eager(q, new, torch.tensor([n]))
        assert_same_bits({"out": found}, {"out": want})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    """q, k and v are cast as for torch's own attention; sinks and masks are not; float64 stays."""
    tensors = {n: x.float() for n, x in heads(1, 2, 1, 20, 20, 16).items()}
    sinks, mask = torch.randn(2), torch.randn(20, 20)
    leaves = {
        n: x.clone().requires_grad_() for n, x in (tensors | {"sinks": sinks, "attn_mask": mask}).items()
    }
    with torch.autocast("cpu", dtype):
        out, lse = actual(**leaves, causal=True)
        x = tensors["q"][0].transpose(0, 1)
        y = tensors["k"][0].transpose(0, 1)
        cu = torch.tensor([0, 20])
        assert longspan.attention_varlen(x, y, y, cu, cu).dtype == dtype
        assert longspan.attention(*(x.double() for x in tensors.values())).dtype == torch.float64
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    out.float().sum().backward()
    assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in leaves.values())
    cast = {n: x.to(dtype) for n, x in tensors.items()}
    want = longspan.attention(**cast, sinks=sinks, attn_mask=mask, causal=True)
    assert_same_bits({"out": out.detach()}, {"out": want})


def test_autocast_takes_mixed_inputs_as_torch_does() -> None:
    """Under autocast a float32 query may meet a bfloat16 cache."""
    q, k, v = (x.float() for x in heads(1, 2, 1, 8, 8, 16).values())
    with torch.autocast("cpu", torch.bfloat16):
        want = longspan.attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
        assert_same_bits({"out": longspan.attention(q, k.bfloat16(), v.bfloat16())}, {"out": want})


def test_vmap_is_a_loop() -> None:
    tensors = {n: torch.stack([x, x + 1, -x]) for n, x in heads(2, 2, 1, 20, 30, 8).items()}

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return actual(q, k, v, causal=True)

    def loop(**x: Tensor) -> tuple[Tensor, Tensor]:
        parts = [call(*row) for row in zip(*x.values())]
        return torch.stack([out for out, _ in parts]), torch.stack([lse for _, lse in parts])

    assert_agree(
        results(lambda q, k, v: torch.func.vmap(call)(q, k, v), tensors), results(loop, tensors)
    )


def test_vmap_over_one_argument() -> None:
    q, k, v = heads(1, 2, 2, 20, 30, 8).values()
    found = torch.func.vmap(longspan.attention, in_dims=(1, None, None), out_dims=1)(
        torch.stack([q, -q], 1), k, v
    )
    want = torch.stack([longspan.attention(q, k, v), longspan.attention(-q, k, v)], 1)
    assert_agree({"out": found}, {"out": want})


def test_functional_gradient() -> None:
    tensors = heads(1, 2, 1, 20, 30, 8)

    def loss(function):
        return lambda q, k, v: sum(x.sin().sum() for x in function(q, k, v, causal=True))

    found = torch.func.grad(loss(actual), argnums=(0, 1, 2))(*tensors.values())
    want = torch.func.grad(loss(expected), argnums=(0, 1, 2))(*tensors.values())
    assert_agree(dict(enumerate(found)), dict(enumerate(want)))


def test_forward_mode_raises() -> None:
    """There is no forward-mode derivative; a silent zero would be a wrong one."""
    q, k, v = heads(1, 2, 1, 5, 5, 8).values()
    with pytest.raises((RuntimeError, NotImplementedError), match="forward"):
        torch.func.jvp(lambda x: longspan.attention(x, k, v), (q,), (q,))


def test_vmap_of_what_writes_in_place_raises() -> None:
    x = torch.randn(3, 1, 2, 5, 8)
    with pytest.raises(RuntimeError, match="attention_decode"):
        torch.func.vmap(lambda x: longspan.attention_decode(x, x, x, torch.tensor([5])))(x)


def test_meta_tensors_give_shapes() -> None:
    tensors = {n: x.to("meta") for n, x in heads(2, 4, 2, 10, 20, 16, 24).items()}
    out, lse = actual(**tensors, attn_mask=torch.zeros(10, 20, dtype=torch.bool, device="meta"))
    assert (out.shape, out.device.type) == ((2, 4, 10, 24), "meta")
    assert lse.shape == (2, 4, 10)
    x = torch.empty(10, 4, 16, device="meta")
    cu = torch.tensor([0, 10], device="meta")
    assert longspan.attention_varlen(x, x, x, cu, cu).shape == (10, 4, 16)


def test_state_of_autograd_is_respected() -> None:
    tensors = {n: x.requires_grad_() for n, x in heads(1, 2, 1, 5, 5, 8).items()}
    with torch.no_grad():
        assert not longspan.attention(**tensors).requires_grad
    with torch.inference_mode():
        assert longspan.attention(**tensors).is_inference()
    out = longspan.attention(**tensors)
    assert out.requires_grad
    with torch.no_grad():
        tensors["q"].zero_()
    assert_raises(RuntimeError, ["modified by an inplace operation"], lambda: out.sum().backward())
