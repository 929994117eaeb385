"""fla's and fast-transformers' functions against their recurrences, written out in double."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from checks import assert_agree, assert_error_ratio, assert_raises, results
from torch import Tensor

from longspan.compat.fast_transformers import causal_dot_product
from longspan.compat.fast_transformers.causal_product import causal_dot_product as by_module
from longspan.compat.fla import ops
from longspan.compat.fla.ops import gla, linear_attn, retention, simple_gla

B, T, H, K, V = 2, 37, 3, 8, 5


def inputs(batch: int = B, tokens: int = T, gate: str | None = None) -> dict[str, Tensor]:
    """In fla's layout; positive q and k, for `normalize`."""
    shape = (batch, tokens, H)
    made = {
        "q": torch.rand(*shape, K, dtype=torch.float64) + 0.1,
        "k": torch.rand(*shape, K, dtype=torch.float64) + 0.1,
        "v": torch.randn(*shape, V, dtype=torch.float64),
    }
    if gate == "token":
        made["g"] = torch.nn.functional.logsigmoid(torch.randn(shape, dtype=torch.float64))
    if gate == "channel":
        made["g"] = torch.nn.functional.logsigmoid(torch.randn(*shape, K, dtype=torch.float64))
    return made


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None = None,  # logarithms, broadcast to (B, T, H, K)
    initial: Tensor | None = None,
    z: Tensor | None = None,
    *,
    scale: float = K**-0.5,
    normalize: bool = False,
) -> tuple[Tensor, ...]:
    """-> o, S and, with ``normalize``, z (B, H, K)."""
    S = q.new_zeros(q.shape[0], H, K, V) if initial is None else initial
    z = q.new_zeros(q.shape[0], H, K) if z is None else z
    factor = torch.ones_like(q) if decay is None else decay.exp().expand_as(q)
    outs = []
    for t in range(q.shape[1]):
        S = factor[:, t, :, :, None] * S + k[:, t, :, :, None] * v[:, t, :, None]
        z = factor[:, t] * z + k[:, t]
        out = torch.einsum("bhk,bhkv->bhv", scale * q[:, t], S)
        if normalize:
            out = out / ((scale * q[:, t] * z).sum(-1, keepdim=True) + 1e-10)
        outs.append(out)
    return (torch.stack(outs, 1), S, z) if normalize else (torch.stack(outs, 1), S)


def gammas() -> Tensor:
    return torch.tensor([31 / 32, 63 / 64, 127 / 128], dtype=torch.float64).log()


FUNCTIONS: dict[str, tuple[Any, str | None, str]] = {  # function, kind of gate, the gate's name
    "chunk_simple_gla": (ops.chunk_simple_gla, "token", "g"),
    "fused_recurrent_simple_gla": (ops.fused_recurrent_simple_gla, "token", "g"),
    "chunk_gla": (ops.chunk_gla, "channel", "g"),
    "fused_recurrent_gla": (ops.fused_recurrent_gla, "channel", "gk"),
    "chunk_retention": (ops.chunk_retention, None, ""),
    "fused_recurrent_retention": (ops.fused_recurrent_retention, None, ""),
    "fused_recurrent_linear_attn": (ops.fused_recurrent_linear_attn, None, ""),
}
CALLS = list(FUNCTIONS)


def ours(name: str, **options: Any) -> Any:
    function, _, label = FUNCTIONS[name]

    def call(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, S: Any = None) -> Any:
        gate = {label: g} if label else {}
        return function(q, k, v, **gate, initial_state=S, output_final_state=True, **options)

    return call


def plain(name: str, scale: float = K**-0.5) -> Any:
    def call(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, S: Any = None) -> Any:
        if "retention" in name:
            decay = gammas().to(q.dtype)[:, None]
        else:
            decay = None if g is None else g if g.dim() == 4 else g[..., None]
        return recurrence(q, k, v, decay, S, scale=scale)

    return call


@pytest.mark.parametrize("name", CALLS)
def test_agrees_with_the_recurrence(name: str) -> None:
    given = inputs(gate=FUNCTIONS[name][1]) | {"S": torch.randn(B, H, K, V, dtype=torch.float64)}
    assert_agree(results(ours(name), given), results(plain(name), given))
    assert_agree(results(ours(name, scale=0.3), given), results(plain(name, 0.3), given))


@pytest.mark.parametrize("name", ["chunk_gla", "chunk_retention", "chunk_simple_gla"])
def test_half_precision(name: str) -> None:
    given = inputs(gate=FUNCTIONS[name][1])
    if "g" in given:  # a gate in float32, as layers hand it over
        given["g"] = (given["g"] * 32).round() / 32
    assert_error_ratio(ours(name), plain(name), given, torch.bfloat16)


@pytest.mark.parametrize("name", CALLS)
def test_without_a_final_state(name: str) -> None:
    function, kind, label = FUNCTIONS[name]
    given = inputs(gate=kind)
    gate = given.pop("g", None)
    out, state = function(*given.values(), **({label: gate} if label else {}))
    assert state is None
    assert torch.equal(out, ours(name)(**given, g=gate)[0])


@pytest.mark.parametrize("name", [n for n in CALLS if n.startswith("fused")])
@pytest.mark.parametrize("packed", [False, True])
def test_reverse_is_the_flipped_sequence(name: str, packed: bool) -> None:
    given = inputs(1 if packed else B, gate=FUNCTIONS[name][1])
    parts = [0, 10, 10, T] if packed else [0, T]
    S = torch.randn((3 if packed else B), H, K, V, dtype=torch.float64)
    options = {"cu_seqlens": torch.tensor(parts)} if packed else {}
    out, last = ours(name, reverse=True, **options)(**given, S=S)
    for i, (begin, end) in enumerate(pairwise(parts)):
        own = {label: x[:, begin:end].flip(1) for label, x in given.items()}
        start = S[i : i + 1] if packed else S
        want, want_last = plain(name)(**own, S=start) if end > begin else (own["v"], start)
        torch.testing.assert_close(out[:, begin:end], want.flip(1))
        torch.testing.assert_close(last[i : i + 1] if packed else last, want_last)


@pytest.mark.parametrize("name", CALLS)
def test_packed_sequences(name: str) -> None:
    given = inputs(1, gate=FUNCTIONS[name][1])
    S = torch.randn(3, H, K, V, dtype=torch.float64)
    out, last = ours(name, cu_seqlens=torch.tensor([0, 10, 10, T]))(**given, S=S)
    for i, (begin, end) in enumerate(((0, 10), (10, 10), (10, T))):
        if begin == end:
            assert torch.equal(last[i], S[i])
            continue
        want, want_last = plain(name)(
            **{label: x[:, begin:end] for label, x in given.items()}, S=S[i : i + 1]
        )
        torch.testing.assert_close(out[:, begin:end], want)
        torch.testing.assert_close(last[i : i + 1], want_last)


@pytest.mark.parametrize("name", [n for n in CALLS if "gla" in n] + ["fused_recurrent_retention"])
def test_states_with_values_first(name: str) -> None:
    given = inputs(gate=FUNCTIONS[name][1])
    S = torch.randn(B, H, K, V, dtype=torch.float64)
    out, last = ours(name, state_v_first=True)(**given, S=S.transpose(-1, -2).contiguous())
    want, want_last = plain(name)(**given, S=S)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(last, want_last.transpose(-1, -2))


def test_decays_of_heads_and_of_tokens_add_up() -> None:
    given = inputs(gate="token")
    g = given.pop("g")
    gamma = torch.tensor([-0.1, -0.5, -2.0], dtype=torch.float64)
    for function in (simple_gla.chunk_simple_gla, simple_gla.fused_recurrent_simple_gla):
        torch.testing.assert_close(
            function(*given.values(), g_gamma=gamma)[0], recurrence(**given, decay=gamma[:, None])[0]
        )
        torch.testing.assert_close(
            function(*given.values(), g=g, g_gamma=gamma)[0],
            recurrence(**given, decay=(g + gamma)[..., None])[0],
        )


@pytest.mark.parametrize("function", [ops.chunk_linear_attn, ops.fused_recurrent_linear_attn])
def test_normalized_linear_attention_carries_two_states(function: Any) -> None:
    given = inputs() | {
        "S": torch.randn(B, H, K, V, dtype=torch.float64),
        "z": torch.rand(B, H, K, dtype=torch.float64),
    }

    def call(q: Tensor, k: Tensor, v: Tensor, S: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        out, (last, z) = function(
            q, k, v, initial_state=(S, z[:, None]), output_final_state=True, normalize=True
        )
        assert z.shape == (B, 1, H, K)
        return out, last, z.squeeze(1)

    def wanted(q: Tensor, k: Tensor, v: Tensor, S: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        return recurrence(q, k, v, None, S, z, normalize=True)

    assert_agree(results(call, given), results(wanted, given))


def test_defaults_of_normalize_are_flas() -> None:
    given = inputs()
    torch.testing.assert_close(ops.chunk_linear_attn(**given)[0], recurrence(**given, normalize=True)[0])
    torch.testing.assert_close(ops.fused_recurrent_linear_attn(**given)[0], recurrence(**given)[0])


def test_causal_dot_product() -> None:
    given = {n.upper(): x.transpose(1, 2) for n, x in inputs().items()}

    def wanted(Q: Tensor, K: Tensor, V: Tensor) -> Tensor:
        return (Q @ K.transpose(-1, -2)).tril() @ V

    assert_agree(results(causal_dot_product, given), results(wanted, given))
    assert by_module is causal_dot_product


def test_wrong_arguments_are_named() -> None:
    given = inputs()
    q, k, v = given.values()
    g = torch.zeros_like(q)
    packed = torch.tensor([0, 5, T])
    row = [x[:1] for x in (q, k, v)]
    state = torch.zeros(B, H, K, V)
    for parts, call in (
        (["chunk_gla", "head_first", "False"], lambda: gla.chunk_gla(q, k, v, g, head_first=True)),
        (["head_first"], lambda: retention.chunk_retention(q, k, v, head_first=True)),
        (["head_first"], lambda: linear_attn.chunk_linear_attn(q, k, v, head_first=True)),
        (["head_first"], lambda: simple_gla.chunk_simple_gla(q, k, v, head_first=True)),
        (["fused_recurrent_gla", "gv", "None"], lambda: gla.fused_recurrent_gla(q, k, v, gv=v)),
        (["q", "(batch, tokens, heads"], lambda: gla.chunk_gla(q[0], k, v, g)),
        (["g", "q's shape"], lambda: gla.chunk_gla(q, k, v, g[..., 0])),
        (["g", "(batch, tokens, heads)"], lambda: simple_gla.chunk_simple_gla(q, k, v, g)),
        (["g_gamma", "(heads,)"], lambda: simple_gla.chunk_simple_gla(q, k, v, None, g[0, 0, 0])),
        (["q", "batch of 1"], lambda: gla.chunk_gla(q, k, v, g, cu_seqlens=packed)),
        (
            ["cu_seqlens_cpu", "copy"],
            lambda: gla.chunk_gla(*row, g[:1], cu_seqlens=packed, cu_seqlens_cpu=packed - 1),
        ),
        (["cu_seqlens_cpu", "None"], lambda: gla.chunk_gla(q, k, v, g, cu_seqlens_cpu=packed)),
        (["initial_state"], lambda: gla.chunk_gla(q, k, v, g, initial_state=state[:1])),
        (
            ["initial_state[1]", "(2, 1, 3, 8)"],
            lambda: linear_attn.chunk_linear_attn(q, k, v, initial_state=(state, state[..., 0])),
        ),
    ):
        assert_raises(ValueError, parts, call)
    assert_raises(
        TypeError,
        ["initial_state", "pair"],
        lambda: linear_attn.chunk_linear_attn(q, k, v, initial_state=state),
    )
