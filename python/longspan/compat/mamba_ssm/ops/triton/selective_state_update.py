"""`selective_state_update`, one step of decoding, and its reference in plain torch."""

from torch import Tensor

from longspan.compat.mamba_ssm.ops.selective_scan_interface import _in_double
from longspan.ops._checks import check_floating
from longspan.ops.selective_scan import selective_state_update as _update
from longspan.reference import selective_scan as reference


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """One step of the scan for each of many sequences, in place on ``state``.

    Args:
        state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices: As
            `longspan.selective_state_update` takes them: (B, D, N) states, or (B, H, P, N) by heads.
            With a float64 x, A, B, C, D and dt_bias are taken in float64.

    Returns:
        As x.

    Raises:
        TypeError, ValueError, RuntimeError: As `longspan.selective_state_update`.

    Example::

        state, x, dt = torch.zeros(2, 768, 16), torch.randn(2, 768), torch.rand(2, 768)
        y = selective_state_update(state, x, dt, -torch.rand(768, 16), *torch.randn(2, 2, 16))
    """
    check_floating("selective_state_update", "x", x)
    A, B, C, D, dt_bias = (_in_double(y, x) for y in (A, B, C, D, dt_bias))
    return _update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices)


def selective_state_update_ref(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """`selective_state_update` in plain torch, to compare with; it writes ``state`` too.

    Args, Returns:
        As `selective_state_update`.

    Example::

        state, x, dt = torch.zeros(2, 8, 4), torch.randn(2, 8), torch.rand(2, 8)
        y = selective_state_update_ref(state, x, dt, -torch.rand(8, 4), *torch.randn(2, 2, 4))
    """
    if state.dim() == 4:
        return reference.selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)

    def one_head(y: Tensor | None, dim: int) -> Tensor | None:
        return None if y is None else y.unsqueeze(dim)

    return reference.selective_state_update(
        state.unsqueeze(1), x.unsqueeze(1), dt.unsqueeze(1), A.unsqueeze(0), B.unsqueeze(1),
        C.unsqueeze(1), one_head(D, 0), one_head(z, 1), one_head(dt_bias, 0), dt_softplus,
    ).squeeze(1)  # fmt: skip
