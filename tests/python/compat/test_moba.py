"""`longspan.compat.moba` is `mixture_of_block_attention` of each sequence by itself."""

from itertools import pairwise

import pytest
import torch
from checks import assert_raises

import longspan
from longspan.compat.moba import moba_attn_varlen

Q, K, V = torch.randn(100, 4, 8), torch.randn(100, 2, 8), torch.randn(100, 2, 6)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_sequences_do_not_see_each_other(dtype: torch.dtype) -> None:
    offsets = [0, 30, 30, 99, 100]
    found = moba_attn_varlen(Q, K, V, torch.tensor(offsets, dtype=dtype), 69, 16, 2)
    for begin, end in pairwise(offsets):
        q, k, v = (x[begin:end].transpose(0, 1)[None] for x in (Q, K, V))
        want = longspan.mixture_of_block_attention(q, k, v, block_size=16, topk=2)
        torch.testing.assert_close(found[begin:end], want[0].transpose(0, 1))


def test_no_sequence() -> None:
    empty = moba_attn_varlen(Q[:0], K[:0], V[:0], torch.tensor([0]), 0, 16, 2)
    assert empty.shape == (0, 4, 6)


@pytest.mark.parametrize(
    ("kind", "parts", "change"),
    [
        (TypeError, ["cu_seqlens", "int"], {"cu_seqlens": torch.tensor([0.0, 100.0])}),
        (ValueError, ["cu_seqlens", "0 to the 100", "[0, 99]"], {"cu_seqlens": torch.tensor([0, 99])}),
        (ValueError, ["cu_seqlens", "ascend"], {"cu_seqlens": torch.tensor([0, 60, 50, 100])}),
        (ValueError, ["max_seqlen", "100", "99"], {"max_seqlen": 99}),
        (ValueError, ["k", "(100, any, any)"], {"k": K[1:]}),
        (ValueError, ["topk", "0"], {"moba_topk": 0}),
    ],
)
def test_errors(kind: type[Exception], parts: list[str], change: dict) -> None:
    arguments = {
        "q": Q, "k": K, "v": V, "cu_seqlens": torch.tensor([0, 100]), "max_seqlen": 100,
        "moba_chunk_size": 16, "moba_topk": 2,
    }  # fmt: skip
    assert_raises(kind, parts, lambda: moba_attn_varlen(**arguments | change))
