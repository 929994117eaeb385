"""Working memory is linear in the length, and long inputs go through."""

import pytest
import torch
from attention_oracle import heads, plain
from checks import assert_agree, greatest_error
from torch import Tensor

import longspan
from longspan import _C

OPTIONS = {
    "causal": {"causal": True},
    "window": {"window": (64, 0), "sink_tokens": 4},
    "softcap, dropout": {"softcap": 2.0, "dropout_p": 0.1},
    "mask over keys": {"attn_mask": True},
}


def peaks(tokens: int, h: int, kv_heads: int, dtype: torch.dtype, name: str) -> tuple[int, int]:
    """Bytes of scratch of the forward and of the backward."""
    leaves = [x.requires_grad_() for x in heads(1, h, kv_heads, tokens, tokens, 8, dtype=dtype).values()]
    options = dict(OPTIONS[name])
    if "attn_mask" in options:
        options["attn_mask"] = torch.zeros(tokens, dtype=dtype, requires_grad=True)
    _C.scratch_reset_peak()
    before = _C.scratch_peak()
    out = longspan.attention(*leaves, **options)
    forward = _C.scratch_peak() - before
    _C.scratch_reset_peak()
    out.sum().backward()
    return forward, _C.scratch_peak() - before


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("h", "kv_heads"), [(1, 1), (2, 1), (2, 2)])
def test_scratch_is_linear_in_the_length(h: int, kv_heads: int, dtype: torch.dtype, name: str) -> None:
    """As many tokens more take no more than the last ones did; for a score matrix 1.9 times as much."""
    a, b, c = (peaks(n, h, kv_heads, dtype, name) for n in (2048, 5120, 8192))
    for i in range(2):
        assert c[i] > 0
        assert c[i] - b[i] <= 1.1 * (b[i] - a[i])
    # Of dQ, at most 16 parts: one for each share of the keys.
    assert c[1] <= 16 * (4 * h * 8192 * 8 * 4)


def test_scratch_of_decoding_is_constant() -> None:
    found = []
    for slots in (32768, 65536):
        cache = torch.randn(1, 1, slots, 16)
        _C.scratch_reset_peak()
        before = _C.scratch_peak()
        longspan.attention_decode(torch.randn(1, 2, 1, 16), cache, cache, torch.tensor([slots]))
        found.append(_C.scratch_peak() - before)
    assert 0 < found[0] == found[1]


def test_scratch_is_given_back() -> None:
    _C.scratch_reset_peak()
    before = _C.scratch_peak()
    tensors = [x.requires_grad_() for x in heads(1, 2, 1, 200, 200, 16).values()]
    longspan.attention(*tensors, causal=True).sum().backward()
    assert _C.scratch_peak() > before
    _C.scratch_reset_peak()
    assert _C.scratch_peak() == before


def test_outputs_and_what_is_saved_are_linear() -> None:
    """Nothing of size tokens x keys is kept for the backward either."""
    tensors = [x.float().requires_grad_() for x in heads(1, 2, 1, 2000, 2000, 16).values()]
    saved = 0

    def count(x: Tensor) -> Tensor:
        nonlocal saved
        saved += x.numel() * x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        longspan.attention(*tensors, causal=True, dropout_p=0.1)
    # q, k, v, out, and a log-sum-exp each; the seed.
    assert saved <= (2 + 1 + 1 + 2) * 2000 * 16 * 4 + 2 * 2000 * 4 + 8


@pytest.mark.slow
def test_131072_tokens_of_one_head() -> None:
    tokens = 131072
    tensors = {
        n: x.requires_grad_() for n, x in heads(1, 1, 1, tokens, tokens, 16, dtype=torch.float32).items()
    }
    _C.scratch_reset_peak()
    before = _C.scratch_peak()
    out = longspan.attention(**tensors, causal=True)
    out.sum().backward()
    peak = _C.scratch_peak() - before
    assert peak <= 24 * tokens * 16 * 4, f"{peak} bytes of scratch"
    last = tensors["q"].detach()[:, :, -8:]
    want = plain(last.double(), *(tensors[n].detach().double() for n in "kv"), causal=True)
    assert_agree({"out": out.detach()[:, :, -8:]}, {"out": want})
    assert all(x.grad is not None and x.grad.isfinite().all() for x in tensors.values())
    # A constant cotangent: the weights of each query sum to 1, so dv sums to the queries.
    assert abs(tensors["v"].grad.double().sum().item() / (tokens * 16) - 1) < 1e-4


@pytest.mark.slow
def test_more_elements_than_an_int32_counts() -> None:
    """B H T D of 2**31 and some, in the output: 4 GB of bfloat16."""
    h, tokens, size = 1, 2**16 + 64, 2**15
    q = torch.randn(1, h, 1, 1).bfloat16().expand(1, h, tokens, 1)
    k = torch.randn(1, h, 8, 1).bfloat16()
    v = torch.randn(1, h, 8, size).bfloat16()
    torch.utils.deterministic.fill_uninitialized_memory = False  # 4 GB, and each element is compared
    out = longspan.attention(q, k, v)
    assert out.numel() > 2**31
    row = longspan.attention(q[:, :, :1], k, v)
    for begin in range(0, tokens, 4096):
        assert (out[:, :, begin : begin + 4096] == row).all()


@pytest.mark.slow
def test_more_input_elements_than_an_int32_counts() -> None:
    """Keys and values of which each holds 2**31 elements, the last of which decides."""
    keys, size = 2**17, 2**14 + 8
    k = torch.zeros(1, 1, keys, size, dtype=torch.bfloat16)
    k[0, 0, -1, -1] = 8.0
    assert k.numel() > 2**31
    q = torch.zeros(1, 1, 1, size, dtype=torch.bfloat16)
    q[..., -1] = 8.0
    v = torch.zeros(1, 1, keys, 1, dtype=torch.bfloat16)
    v[0, 0, -1] = 1.0
    out, lse = longspan.attention(q, k, v, scale=1.0, return_lse=True)
    seen = torch.tensor(64.0, dtype=torch.float64).exp()  # 8 * 8 at the last key, 0 elsewhere
    total = seen + (keys - 1)
    assert greatest_error(lse, total.log().float().expand(1, 1, 1)) < 1e-4
    assert greatest_error(out, (seen / total).expand(1, 1, 1, 1)) < 1e-2
