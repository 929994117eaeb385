"""`longspan.compat.flex_attention` is torch's, with a backward on the CPU."""

from typing import Any

import pytest
import torch
from attention_oracle import expected, heads
from checks import assert_agree, assert_raises, results
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, create_mask
from torch.nn.attention.flex_attention import flex_attention as torchs

from longspan.compat import Alibi, Softcap, flex_attention
from longspan.compat._flex import _converted
from longspan.patterns import BlockMask, longformer

SLOPES = torch.tensor([0.5, 0.1, 0.02, 0.0], dtype=torch.float64)
TOKENS = 200


def document(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q // 70 == k // 70) & (q >= k) & (k + b + h > 3)


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 0.3},
    "softcap": {"score_mod": Softcap(2.0)},
    "alibi": {"score_mod": Alibi(SLOPES)},
    "mask": {"block_mask": create_block_mask(document, 2, 4, TOKENS, TOKENS, device="cpu")},
    "all": {
        "score_mod": Alibi(SLOPES),
        "block_mask": create_block_mask(document, 2, 4, TOKENS, TOKENS, device="cpu"),
        "scale": 0.2,
    },
}


def oracle(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Any = None,
    block_mask: Any = None,
    scale: Any = None,
) -> tuple[Tensor, Tensor]:
    return expected(
        query, key, value,
        None if block_mask is None else create_mask(document, 2, 4, TOKENS, TOKENS, device="cpu"),
        softcap=getattr(score_mod, "cap", 0.0),
        alibi_slopes=getattr(score_mod, "slopes", None),
        scale=scale,
    )  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_as_torch(name: str) -> None:
    """torch's own eager function is dense, and has no backward here: its gradients are the oracle's."""
    tensors = heads(2, 4, 2, TOKENS, TOKENS, 16)
    renamed = {"query": tensors["q"], "key": tensors["k"], "value": tensors["v"]}
    options = CALLS[name] | {"enable_gqa": True}
    found = results(lambda **x: flex_attention(**x, **options), renamed)
    assert_agree({"out": found["out"]}, {"out": torchs(**renamed, **options)})
    wanted = results(lambda query, key, value: oracle(query, key, value, **CALLS[name])[0], renamed)
    assert_agree(found, wanted)
    _, lse = flex_attention(**renamed, **options, return_lse=True)
    out, aux = flex_attention(**renamed, **options, return_aux=AuxRequest(lse=True))
    assert torch.equal(out, found["out"])
    assert torch.equal(aux.lse, lse)
    want = torchs(**renamed, **options, return_aux=AuxRequest(lse=True))[1].lse
    seen = lse > -torch.inf
    torch.testing.assert_close(lse[seen], want[seen].to(lse))


def test_our_own_masks() -> None:
    mask = longformer(TOKENS, window=30, global_tokens=[0])
    q, k, v = heads(1, 2, 2, TOKENS, TOKENS, 16).values()
    torch.testing.assert_close(
        flex_attention(q, k, v, block_mask=mask),
        torch.nn.functional.scaled_dot_product_attention(q, k, v, mask.to_dense()),
    )


def test_a_mask_is_converted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = create_block_mask(document, None, None, TOKENS, TOKENS, device="cpu")
    q, k, v = heads(1, 2, 2, TOKENS, TOKENS, 16).values()
    first = flex_attention(q, k, v, block_mask=mask)
    monkeypatch.setattr(BlockMask, "from_flex", None)
    assert torch.equal(flex_attention(q, k, v, block_mask=mask), first)
    before = len(_converted)
    del mask
    assert len(_converted) == before - 1


def call(**change: Any):
    tensors = heads(1, 4, 4, 10, 10, 8)
    arguments = {"query": tensors["q"], "key": tensors["k"], "value": tensors["v"]} | change
    return lambda: flex_attention(**arguments)


@pytest.mark.parametrize(
    ("kind", "parts", "run"),
    [
        (TypeError, ["score_mod", "Softcap", "lambda"], call(score_mod=lambda s, b, h, q, k: s * 2)),
        (TypeError, ["block_mask", "BlockMask", "Tensor"], call(block_mask=torch.ones(10, 10))),
        (ValueError, ["key", "enable_gqa"], call(key=torch.randn(1, 2, 10, 8).double())),
        (ValueError, ["kernel_options", "BLOCK_M"], call(kernel_options={"BLOCK_M": 64})),
        (ValueError, ["return_aux", "max_scores"], call(return_aux=AuxRequest(max_scores=True))),
        (ValueError, ["return_lse", "return_aux"], call(return_aux=AuxRequest(), return_lse=True)),
        (
            ValueError,
            ["score_mod", "Alibi", "10", "9"],
            call(query=torch.randn(1, 4, 9, 8).double(), score_mod=Alibi(SLOPES)),
        ),
        (ValueError, ["query", "(3,)"], call(query=torch.ones(3))),
        (TypeError, ["value", "list"], call(value=[1])),
        (ValueError, ["cap", "0"], lambda: Softcap(0)),
        (TypeError, ["slopes", "float"], lambda: Alibi(0.5)),
    ],
)
def test_errors(kind: type[Exception], parts: list[str], run) -> None:
    assert_raises(kind, parts, run)
