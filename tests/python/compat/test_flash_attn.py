"""longspan.compat.flash_attn against flash-attn's documented semantics, dense and in float64."""

import inspect
import itertools
import math

import pytest
import torch
from flash_attn_oracle import F64, close, dense, dense_batch, expected_options, raises, randn

from longspan.compat import flash_attn as fa
from longspan.reference import attention as reference


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


OPTIONS = [
    {},
    {"causal": True},
    {"softmax_scale": 0.3},
    {"window_size": (7, 3)},
    {"window_size": (5, -1)},
    {"window_size": (-1, 2)},
    {"window_size": (6, 4), "causal": True},
    {"softcap": 1.5, "causal": True},
    {"alibi_slopes": 1},
    {"alibi_slopes": 2, "causal": True, "softcap": 2.0, "window_size": (9, 0)},
]


# ---- signatures


_TAIL = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
    "alibi_slopes=None, deterministic=False, return_attn_probs=False"
)


@pytest.mark.parametrize(
    ("name", "signature"),
    [
        ("flash_attn_func", f"q, k, v, {_TAIL}"),
        ("flash_attn_kvpacked_func", f"q, kv, {_TAIL}"),
        ("flash_attn_qkvpacked_func", f"qkv, {_TAIL}"),
        (
            "flash_attn_varlen_func",
            "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, "
            f"{_TAIL}, block_table=None",
        ),
        (
            "flash_attn_varlen_kvpacked_func",
            f"q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, {_TAIL}",
        ),
        ("flash_attn_varlen_qkvpacked_func", f"qkv, cu_seqlens, max_seqlen, {_TAIL}"),
        (
            "flash_attn_with_kvcache",
            "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, "
            "cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, "
            "causal=False, window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, "
            "alibi_slopes=None, num_splits=0, return_softmax_lse=False",
        ),
        ("unpad_input", "hidden_states, attention_mask, unused_mask=None"),
        ("pad_input", "hidden_states, indices, batch, seqlen"),
    ],
)
def test_signature_is_flash_attns(name, signature):
    parameters = inspect.signature(getattr(fa, name)).parameters.values()
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    ours = ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters)
    assert ours == signature


def test_modules_have_flash_attns_names():
    from longspan.compat.flash_attn.bert_padding import index_first_axis, index_put_first_axis, pad_input
    from longspan.compat.flash_attn.flash_attn_interface import flash_attn_func

    assert pad_input is fa.pad_input
    assert flash_attn_func is fa.flash_attn_func
    x = randn(5, 2, grad=True)
    at = torch.tensor([4, 1])
    y = index_put_first_axis(index_first_axis(x, at), at, 5)
    close(y, x * torch.tensor([0, 1, 0, 0, 1])[:, None])
    y.sum().backward()
    close(x.grad[:, 0], torch.tensor([0.0, 1, 0, 0, 1]))


# ---- batches


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("tokens", "keys"), [(33, 33), (5, 70), (40, 9)])
def test_func(options, tokens, keys):
    ours, theirs = expected_options(options, 6, 2)
    q, k, v = (
        randn(2, tokens, 6, 16, grad=True),
        randn(2, keys, 3, 16, grad=True),
        randn(2, keys, 3, 8, grad=True),
    )
    out, lse, dmask = fa.flash_attn_func(q, k, v, **ours, return_attn_probs=True)
    expected, expected_lse = dense_batch(q, k, v, **theirs)
    assert out.is_contiguous()
    assert dmask.shape == (0,)
    close(out, expected)
    close(lse, expected_lse)
    close(fa.flash_attn_func(q, k, v, **ours, deterministic=True), out, rtol=0, atol=0)
    weight = torch.randn_like(out)
    inputs = (q, k, v)
    # The dense gradient is NaN where softmax has no key; those rows' gradients are 0.
    empty = torch.isinf(expected_lse).any()
    if empty:
        rows = ~torch.isinf(expected_lse[0, 0])
        kept, _ = dense_batch(q[:, rows], k, v, **theirs)
        loss = (kept * weight[:, rows]).sum()
    else:
        loss = (expected * weight).sum()
    for got, want in zip(
        torch.autograd.grad((out * weight).sum(), inputs), torch.autograd.grad(loss, inputs)
    ):
        close(got, want)


def test_lse_of_an_empty_row_is_minus_infinity_and_its_output_zero():
    q, k = randn(1, 4, 2, 8), randn(1, 2, 2, 8)
    out, lse, _ = fa.flash_attn_func(q, k, k, causal=True, return_attn_probs=True)
    assert torch.equal(lse[..., :2], torch.full((1, 2, 2), -math.inf, dtype=F64))
    assert torch.isfinite(lse[..., 2:]).all()
    assert not out[:, :2].any()


def test_lse_is_differentiable():
    q, k = randn(1, 9, 2, 8, grad=True), randn(1, 9, 2, 8)
    lse = fa.flash_attn_func(q, k, k, causal=True, return_attn_probs=True)[1]
    expected = dense_batch(q, k, k, causal=True)[1]
    close(*(torch.autograd.grad(x.square().sum(), q)[0] for x in (lse, expected)))


@pytest.mark.parametrize(
    "options", [{}, {"causal": True, "window_size": (4, -1), "softcap": 3.0}], ids=str
)
def test_packed_tensors(options):
    qkv = randn(2, 20, 3, 4, 8, grad=True)
    q, k, v = qkv.unbind(2)
    want = fa.flash_attn_func(q, k, v, **options)
    got = fa.flash_attn_qkvpacked_func(qkv, **options)
    kv = fa.flash_attn_kvpacked_func(q, qkv[:, :, 1:], **options)
    close(got, want, rtol=0, atol=0)
    close(kv, want, rtol=0, atol=0)
    gradients = [
        torch.autograd.grad(x.square().sum(), qkv, retain_graph=True)[0] for x in (got, kv, want)
    ]
    close(gradients[0], gradients[2])
    close(gradients[1], gradients[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    q, k, v = (randn(1, 50, 4, 16).to(dtype) for _ in range(3))
    out, lse, _ = fa.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    plain = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True
    ).transpose(1, 2)
    expected, _ = dense_batch(q, k, v, causal=True)
    assert (out - expected).abs().max() <= 2 * (plain - expected).abs().max() + 1e-6


def test_dropout():
    q, k = randn(1, 64, 2, 8), randn(1, 64, 2, 8)
    v = torch.ones(1, 64, 2, 8, dtype=F64)
    torch.manual_seed(5)
    first = fa.flash_attn_func(q, k, v, 0.25)
    torch.manual_seed(5)
    again = fa.flash_attn_func(q, k, v, dropout_p=0.25)
    assert torch.equal(first, again)
    assert not torch.equal(first, fa.flash_attn_func(q, k, v, dropout_p=0.25))
    torch.manual_seed(5)
    seed = torch.randint(2**62, (1,))
    want, _ = reference.attention(
        *(x.transpose(1, 2) for x in (q, k, v)), scale=8**-0.5, dropout_p=0.25, dropout_seed=seed
    )
    close(first, want.transpose(1, 2))
    torch.manual_seed(5)
    packed = fa.flash_attn_varlen_func(q[0], k[0], v[0], *[torch.tensor([0, 64])] * 2, 64, 64, 0.25)
    close(packed, first[0])


# ---- packed sequences


LENGTHS_Q, LENGTHS_K = [7, 0, 20, 3], [7, 4, 33, 0]


def offsets(lengths, dtype=torch.int32):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype)


def dense_varlen(q, k, v, cu_q, cu_k, slopes=None, **options):
    outs, lses = [], []
    for b in range(len(cu_q) - 1):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        own = slopes[b] if slopes is not None and slopes.dim() == 2 else slopes
        out, lse = dense(q[rows], k[keys], v[keys], slopes=own, **options)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses, 1)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_varlen(options):
    ours, theirs = expected_options(options, 4, 4)
    cu_q, cu_k = offsets(LENGTHS_Q), offsets(LENGTHS_K)
    q, k, v = randn(30, 4, 8, grad=True), randn(44, 2, 8, grad=True), randn(44, 2, 8, grad=True)
    out, lse, dmask = fa.flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, 20, 33, **ours, return_attn_probs=True
    )
    expected, expected_lse = dense_varlen(q, k, v, cu_q, cu_k, **theirs)
    assert out.shape == (30, 4, 8)
    assert lse.shape == (4, 30)
    assert dmask.shape == (0,)
    close(out, expected)
    close(lse, expected_lse)
    kv = torch.stack([k, v], 1)
    args = (cu_q.long(), cu_k.long(), 20, 33)
    close(fa.flash_attn_varlen_kvpacked_func(q, kv, *args, **ours), out, rtol=0, atol=0)
    # Every query of sequences that have keys sees one, so the dense gradient exists.
    weight = torch.randn_like(out)
    loss = (expected[:27] * weight[:27]).sum()
    for got, want in zip(
        torch.autograd.grad((out * weight).sum(), (q, k, v)), torch.autograd.grad(loss, (q, k, v))
    ):
        close(got, want)


def test_varlen_qkvpacked():
    qkv = randn(30, 3, 4, 8, grad=True)
    cu = offsets(LENGTHS_Q)
    out = fa.flash_attn_varlen_qkvpacked_func(qkv, cu, 20, causal=True)
    expected, _ = dense_varlen(*qkv.unbind(1), cu, cu, causal=True)
    close(out, expected)
    close(*(torch.autograd.grad(x.square().sum(), qkv)[0] for x in (out, expected)))


@pytest.mark.parametrize("page", [1, 4, 16, 64])
@pytest.mark.parametrize(
    "options", [{}, {"causal": True, "window_size": (9, 0), "softcap": 2.0}], ids=str
)
def test_varlen_over_pages(page, options):
    cu_q, cu_k = offsets(LENGTHS_Q), offsets(LENGTHS_K)
    q, k, v = randn(30, 4, 8), randn(44, 2, 8), randn(44, 2, 6)
    per_row = -(-max(LENGTHS_K) // page)
    table = torch.randperm(4 * per_row + 3)[: 4 * per_row].reshape(4, per_row).int()
    k_pages = torch.full((4 * per_row + 3, page, 2, 8), math.nan, dtype=F64)
    v_pages = torch.full((4 * per_row + 3, page, 2, 6), math.nan, dtype=F64)
    for b, n in enumerate(LENGTHS_K):
        for i in range(n):
            at = table[b, i // page], i % page
            k_pages[at], v_pages[at] = k[cu_k[b] + i], v[cu_k[b] + i]
    table[1, 4 // page + 1 :] = -1  # entries past a length are not looked at
    k.requires_grad_()
    k_pages.requires_grad_()
    got = fa.flash_attn_varlen_func(
        q, k_pages, v_pages, cu_q, cu_k, 20, 33, **options, block_table=table
    )
    want = fa.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 20, 33, **options)
    close(got, want, rtol=0, atol=0)
    got.square().sum().backward()
    want.square().sum().backward()
    for b, n in enumerate(LENGTHS_K):
        rows = k_pages.grad[table[b].long()].flatten(0, 1)
        close(rows[:n], k.grad[cu_k[b] : cu_k[b + 1]])


# ---- padding


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64])
def test_unpad_and_pad(dtype):
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=dtype)
    x = randn(4, 4, 2, 3, grad=True)
    rows, indices, cu, longest, used = fa.unpad_input(x, mask)
    assert torch.equal(rows, x[mask.bool()])
    assert torch.equal(indices, torch.tensor([0, 1, 2, 6, 7, 12, 13, 14, 15]))
    assert torch.equal(cu, torch.tensor([0, 3, 5, 5, 9], dtype=torch.int32))
    assert cu.dtype == used.dtype == torch.int32
    assert (longest, type(longest)) == (4, int)
    assert used.tolist() == [3, 2, 0, 4]
    padded = fa.pad_input(rows, indices, 4, 4)
    assert torch.equal(padded, x * mask[..., None, None].to(x))
    padded.sum().backward()
    assert torch.equal(x.grad, mask[..., None, None].expand_as(x).to(x))


def test_unpad_keeps_room_for_unused_tokens():
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    unused = torch.tensor([[0, 0, 1, 0], [0, 1, 1, 1]])
    rows, indices, cu, longest, used = fa.unpad_input(torch.arange(8).reshape(2, 4), mask, unused)
    assert rows.tolist() == indices.tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert cu.tolist() == [0, 3, 7]
    assert longest == 4
    assert used.tolist() == [2, 1]


def test_unpad_attend_pad_is_attention_with_the_padding_left_out():
    mask = torch.tensor([[1] * 9 + [0] * 3, [0] * 5 + [1] * 7])
    x = randn(2, 12, 3, 2, 8)
    rows, indices, cu, longest, _ = fa.unpad_input(x, mask)
    out = fa.pad_input(
        fa.flash_attn_varlen_qkvpacked_func(rows, cu, longest, causal=True), indices, 2, 12
    )
    expected = torch.zeros_like(out)
    for b in range(2):
        own = mask[b].bool()
        expected[b, own] = dense(*x[b, own].unbind(1), causal=True)[0]
    close(out, expected)


def test_unpad_of_nothing():
    nothing = torch.zeros(0, 4, 2)
    rows, indices, cu, longest, used = fa.unpad_input(nothing, nothing[..., 0].bool())
    assert rows.shape == (0, 2)
    assert cu.tolist() == [0]
    assert (longest, len(indices), len(used)) == (0, 0, 0)


# ---- compiled


def test_compiles_whole():
    def loss(q, k, v, cu):
        a = fa.flash_attn_func(q[None], k[None], v[None], causal=True, window_size=(5, 0))
        b = fa.flash_attn_varlen_func(q, k, v, cu, cu, 12, 12, causal=True)
        return a.square().sum() + b.square().sum()

    inputs = [randn(20, 4, 8, grad=True), randn(20, 2, 8, grad=True), randn(20, 2, 8, grad=True)]
    cu = offsets([12, 8])
    want = torch.autograd.grad(loss(*inputs, cu), inputs)
    got = torch.autograd.grad(
        torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs, cu), inputs
    )
    for a, b in zip(got, want):
        close(a, b)


# ---- errors


def test_errors_show_the_callers_layout():
    q, k = torch.zeros(2, 5, 4, 8), torch.zeros(2, 5, 2, 8)
    f = fa.flash_attn_func
    raises(TypeError, "flash_attn_func: q: expected a tensor, got list", f, [1], k, k)
    raises(TypeError, "flash_attn_func: q: expected float32", f, q.long(), k.long(), k.long())
    raises(TypeError, "flash_attn_func: k: expected q's dtype", f, q, k.double(), k)
    raises(ValueError, r"flash_attn_func: q: .*\(batch, tokens, heads, channels\)", f, q[0], k, k)
    raises(ValueError, r"flash_attn_func: k: .*got \(2, 5, 2, 7\)", f, q, k[..., :7], k)
    raises(ValueError, r"flash_attn_func: v: .*got \(2, 4, 2, 8\)", f, q, k, k[:, :4])
    raises(
        ValueError, "flash_attn_func: k: expected a number of heads that divides", f, q[:, :, :3], k, k
    )
    raises(ValueError, "window", f, q, k, k, window_size=(-2, 0))
    raises(ValueError, "dropout_p", f, q, k, k, dropout_p=1.0)
    raises(ValueError, "alibi_slopes", f, q, k, k, alibi_slopes=torch.zeros(3))
    raises(ValueError, r"qkv: .*\(batch, tokens, 3, heads, channels\)", fa.flash_attn_qkvpacked_func, q)
    raises(ValueError, r"kv: .*\(batch, tokens, 2, heads, channels\)", fa.flash_attn_kvpacked_func, q, q)


def test_errors_of_packed_sequences():
    q, cu = torch.zeros(10, 2, 8), torch.tensor([0, 10])
    f = fa.flash_attn_varlen_func
    raises(ValueError, "flash_attn_varlen_func: q: .*total", f, q[None], q, q, cu, cu, 10, 10)
    raises(TypeError, "cu_seqlens_q: expected int32 or int64", f, q, q, q, cu.float(), cu, 10, 10)
    raises(RuntimeError, "cu_seqlens", f, q, q, q, cu + 1, cu, 10, 10)
    raises(ValueError, r"qkv: .*\(total, 3", fa.flash_attn_varlen_qkvpacked_func, q, cu, 10)
    pages = torch.zeros(3, 4, 2, 8)
    options = {"block_table": torch.tensor([[0, 1, 2]])}
    raises(ValueError, "k: expected .n, page", f, q, q, q, cu, cu, 10, 10, **options)
    longer = torch.tensor([0, 13])
    raises(ValueError, "pages for 13 keys", f, q, pages, pages, cu, longer, 10, 13, **options)
    for wrong in (3, -1):
        table = {"block_table": torch.tensor([[0, 1, wrong]])}
        raises(
            ValueError,
            "block_table: expected pages from 0 to 2",
            f,
            q,
            pages,
            pages,
            cu,
            cu,
            10,
            10,
            **table,
        )


def test_errors_of_padding():
    x = torch.zeros(2, 4, 3)
    raises(
        ValueError, "attention_mask: .*got .2, 3", fa.unpad_input, x, torch.ones(2, 3, dtype=torch.bool)
    )
    raises(TypeError, "attention_mask: expected bool or integers", fa.unpad_input, x, torch.ones(2, 4))
    raises(TypeError, "attention_mask: expected a tensor", fa.unpad_input, x, None)
    raises(ValueError, "indices", fa.pad_input, torch.zeros(3, 2), torch.tensor([0, 1]), 2, 2)
