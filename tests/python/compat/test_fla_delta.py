"""fla's delta rules against their recurrence, written out in double."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import assert_agree, assert_error_ratio, assert_raises, results
from torch import Tensor

from longspan.compat.fla import ops

B, T, H, HV, K, V = 2, 37, 2, 4, 8, 5


def inputs(batch: int = B) -> dict[str, Tensor]:
    double = {"dtype": torch.float64}
    return {
        "q": F.normalize(torch.randn(batch, T, H, K, **double), dim=-1),
        "k": F.normalize(torch.randn(batch, T, H, K, **double), dim=-1),
        "v": torch.randn(batch, T, HV, V, **double),
        "beta": torch.rand(batch, T, HV, **double),
        "g": F.logsigmoid(torch.randn(batch, T, HV, **double)),
    }


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    S: Tensor | None = None,
    *,
    scale: float = K**-0.5,
) -> tuple[Tensor, Tensor]:
    q, k = (x.repeat_interleave(HV // H, 2) for x in (q, k))
    S = q.new_zeros(q.shape[0], HV, K, V) if S is None else S
    outs = []
    for t in range(q.shape[1]):
        if g is not None:
            S = g[:, t, :, None, None].exp() * S
        error = v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], S)
        S = S + k[:, t, :, :, None] * (beta[:, t, :, None] * error)[:, :, None]
        outs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], S))
    return torch.stack(outs, 1), S


def ours(name: str, **options: Any) -> Any:
    def call(
        q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None = None, S: Any = None
    ) -> Any:
        gate = {"g": g} if "gated" in name else {}
        function = getattr(ops, name)
        return function(q, k, v, beta=beta, initial_state=S, output_final_state=True, **gate, **options)

    return call


NAMES = (
    "chunk_delta_rule",
    "fused_recurrent_delta_rule",
    "chunk_gated_delta_rule",
    "fused_recurrent_gated_delta_rule",
)


def given_to(name: str, **options: Any) -> dict[str, Tensor]:
    made = inputs(**options)
    return made if "gated" in name else {n: x for n, x in made.items() if n != "g"}


@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_the_recurrence(name: str) -> None:
    given = given_to(name) | {"S": torch.randn(B, HV, K, V, dtype=torch.float64)}
    assert_agree(results(ours(name), given), results(recurrence, given))
    out = ours(name, scale=0.3)(**given)[0]
    torch.testing.assert_close(out, recurrence(**given, scale=0.3)[0])


@pytest.mark.parametrize("name", NAMES)
def test_half_precision(name: str) -> None:
    assert_error_ratio(ours(name), recurrence, given_to(name), torch.bfloat16)


@pytest.mark.parametrize("name", NAMES)
def test_packed_sequences(name: str) -> None:
    given, S = given_to(name, batch=1), torch.randn(3, HV, K, V, dtype=torch.float64)
    out, last = ours(name, cu_seqlens=torch.tensor([0, 10, 10, T]))(**given, S=S)
    assert torch.equal(last[1], S[1])
    for i, begin, end in ((0, 0, 10), (2, 10, T)):
        part = {n: x[:, begin:end] for n, x in given.items()}
        want, want_last = recurrence(**part, S=S[i : i + 1])
        torch.testing.assert_close(out[:, begin:end], want)
        torch.testing.assert_close(last[i : i + 1], want_last)


@pytest.mark.parametrize("name", NAMES)
def test_norms_in_the_kernel(name: str) -> None:
    given = given_to(name)
    given |= {n: 3 * torch.randn(B, T, H, K, dtype=torch.float64) for n in "qk"}
    given["k"][:, 5] = 0  # padding: writes nothing

    def unit(x: Tensor) -> Tensor:
        return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()

    def wanted(q: Tensor, k: Tensor, **more: Tensor) -> tuple[Tensor, Tensor]:
        return recurrence(unit(q), unit(k), **more)

    assert_agree(results(ours(name, use_qk_l2norm_in_kernel=True), given), results(wanted, given))


@pytest.mark.parametrize("name", ["chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"])
def test_gates_and_betas_in_the_kernel(name: str) -> None:
    given = inputs()
    given["g"], given["beta"] = torch.randn(2, B, T, HV, dtype=torch.float64)
    given |= {n: torch.randn(HV, dtype=torch.float64) for n in ("A_log", "dt_bias")}

    def call(A_log: Tensor, dt_bias: Tensor, **more: Tensor) -> Any:
        return ours(
            name, use_gate_in_kernel=True, A_log=A_log, dt_bias=dt_bias, allow_neg_eigval=True,
            use_beta_sigmoid_in_kernel=True,
        )(**more)  # fmt: skip

    def wanted(
        A_log: Tensor, dt_bias: Tensor, g: Tensor, beta: Tensor, **more: Tensor
    ) -> tuple[Tensor, Tensor]:
        decay = -A_log.exp() * F.softplus(g + dt_bias)
        return recurrence(g=decay, beta=2 * beta.sigmoid(), **more)

    assert_agree(results(call, given), results(wanted, given))


@pytest.mark.parametrize("name", NAMES[2:])
def test_states_with_values_first(name: str) -> None:
    given, S = given_to(name), torch.randn(B, HV, K, V, dtype=torch.float64)
    out, last = ours(name, state_v_first=True)(**given, S=S.transpose(-1, -2).contiguous())
    want, want_last = recurrence(**given, S=S)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(last, want_last.transpose(-1, -2))


def test_defaults() -> None:
    given = inputs()
    q, k, v, beta, g = given.values()
    out, state = ops.chunk_gated_delta_rule(q, k, v, g, beta)
    assert state is None
    torch.testing.assert_close(out, recurrence(**given)[0])
    torch.testing.assert_close(ops.chunk_delta_rule(q, k, v, beta)[0], recurrence(q, k, v, beta)[0])
    want = recurrence(q, k, v, torch.ones_like(beta))[0]
    torch.testing.assert_close(ops.fused_recurrent_delta_rule(q, k, v)[0], want)
    torch.testing.assert_close(ops.fused_recurrent_gated_delta_rule(q, k, v)[0], want)


def test_wrong_arguments_are_named() -> None:
    q, k, v, beta, g = inputs().values()
    gated, recurrent = ops.chunk_gated_delta_rule, ops.fused_recurrent_gated_delta_rule
    for parts, call in (
        (["head_first"], lambda: ops.chunk_delta_rule(q, k, v, beta, head_first=True)),
        (["beta", "value heads"], lambda: ops.chunk_delta_rule(q, k, v, beta[..., :2])),
        (["g", "value heads"], lambda: gated(q, k, v, g[..., :2], beta)),
        (["gk", "None"], lambda: recurrent(q, k, v, g, g)),
        (["gv", "None"], lambda: recurrent(q, k, v, g, None, g)),
        (["allow_neg_eigval", "use_beta"], lambda: gated(q, k, v, g, beta, allow_neg_eigval=True)),
        (["A_log", "use_gate"], lambda: gated(q, k, v, g, beta, A_log=g[0, 0])),
        (["A_log", "None"], lambda: gated(q, k, v, g, beta, use_gate_in_kernel=True)),
        (
            ["dt_bias", "(value heads,)"],
            lambda: gated(q, k, v, g, beta, use_gate_in_kernel=True, A_log=g[0, 0], dt_bias=g[0, 0, :2]),
        ),
        (["batch of 1"], lambda: gated(q, k, v, g, beta, cu_seqlens=torch.tensor([0, T]))),
    ):
        assert_raises(ValueError, parts, call)
