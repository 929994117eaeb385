"""Checks of arguments: an error names the argument, what was expected, and what came."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_tensor(function: str, name: str, x: object) -> None:
    """Raise TypeError unless ``x`` is a tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{function}: {name}: expected a tensor, got {type(x).__name__}")


def check_floating(function: str, name: str, x: object) -> None:
    """Raise TypeError unless ``x`` is a tensor of a dtype that kernels have."""
    check_tensor(function, name, x)
    assert isinstance(x, Tensor)
    if x.dtype not in FLOATING:
        raise TypeError(
            f"{function}: {name}: expected float32, float64, bfloat16 or float16, got {x.dtype}"
        )


def check_like(function: str, name: str, x: object, other: str, like: Tensor) -> None:
    """Raise unless ``x`` is a tensor of ``like``'s dtype and device."""
    check_tensor(function, name, x)
    assert isinstance(x, Tensor)
    if x.dtype != like.dtype:
        raise TypeError(f"{function}: {name}: expected {other}'s dtype, {like.dtype}, got {x.dtype}")
    check_device(function, name, x, other, like)


def check_device(function: str, name: str, x: Tensor, other: str, like: Tensor) -> None:
    """Raise ValueError unless ``x`` is on ``like``'s device."""
    if x.device != like.device:
        raise ValueError(f"{function}: {name}: expected {other}'s device, {like.device}, got {x.device}")


def check_parameter(function: str, name: str, x: object, other: str, like: Tensor) -> None:
    """Raise unless ``x`` is a tensor on ``like``'s device, of its dtype or float32.

    Parameters may stay float32 beside bfloat16 or float16, as autocast leaves them.
    """
    check_tensor(function, name, x)
    assert isinstance(x, Tensor)
    if x.dtype != like.dtype and (x.dtype != torch.float32 or like.dtype == torch.float64):
        raise TypeError(
            f"{function}: {name}: expected {other}'s dtype, {like.dtype}, or float32, got {x.dtype}"
        )
    if x.device != like.device:
        raise ValueError(f"{function}: {name}: expected {other}'s device, {like.device}, got {x.device}")


def check_shape(function: str, name: str, x: Tensor, shape: Sequence[int | None], what: str) -> None:
    """Raise ValueError unless ``x`` has this shape; None stands for any size."""
    is_now = x.shape
    if len(is_now) == len(shape):
        for got, want in zip(is_now, shape):  # a loop: decoding checks six shapes a layer and token
            if want is not None and got != want:
                break
        else:
            return
    wanted = ", ".join("any" if n is None else str(n) for n in shape)
    raise ValueError(f"{function}: {name}: expected {what}, here ({wanted}), got {tuple(is_now)}")


def check_group(function: str, heads: int, kv_heads: int) -> None:
    """Raise ValueError unless each head of k serves as many of q."""
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"{function}: k: expected a number of heads that divides q's, {heads}, got {kv_heads}"
        )


def check_integers(function: str, name: str, x: object, shape: Sequence[int | None], what: str) -> None:
    """Raise unless ``x`` is an int32 or int64 tensor of this shape."""
    check_tensor(function, name, x)
    assert isinstance(x, Tensor)
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{function}: {name}: expected int32 or int64, got {x.dtype}")
    check_shape(function, name, x, shape, what)


def check_offsets(function: str, cu_seqlens: object) -> None:
    """Raise unless ``cu_seqlens`` is (sequences + 1,) integers, of a sequence at least."""
    check_integers(function, "cu_seqlens", cu_seqlens, (None,), "(sequences + 1,)")
    assert isinstance(cu_seqlens, Tensor)
    if cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"{function}: cu_seqlens: expected at least 2 entries, got {cu_seqlens.shape[0]}"
        )


def check_sequences(function: str, cu_seqlens: object, name: str, batch: int) -> int:
    """Raise unless ``cu_seqlens`` can cut ``name``, of this batch. -> sequences; None: a row each."""
    if cu_seqlens is None:
        return batch
    check_offsets(function, cu_seqlens)
    assert isinstance(cu_seqlens, Tensor)
    if batch != 1:
        raise ValueError(f"{function}: {name}: expected a batch of 1 beside cu_seqlens, got {batch}")
    return cu_seqlens.shape[0] - 1


def check_state(
    function: str, name: str, x: object, other: str, like: Tensor, shape: Sequence[int], what: str
) -> None:
    """Raise unless ``x`` is a state of this shape on ``like``'s device, of any floating dtype."""
    check_floating(function, name, x)
    assert isinstance(x, Tensor)
    check_device(function, name, x, other, like)
    check_shape(function, name, x, shape, what)


def check_state_in_place(function: str, name: str, x: Tensor, like: Tensor) -> None:
    """Raise unless kernels can write to ``x``: of the accumulation's dtype, with a last stride of 1."""
    if x.dtype != sum_dtype(like):
        raise TypeError(
            f"{function}: {name}: expected {sum_dtype(like)} beside {like.dtype}, got {x.dtype}"
        )
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(f"{function}: {name}: expected a last stride of 1, got {x.stride(-1)}")


def check_bool(function: str, name: str, x: object, shape: Sequence[int | None], what: str) -> None:
    """Raise unless ``x`` is a bool tensor of this shape."""
    check_tensor(function, name, x)
    assert isinstance(x, Tensor)
    if x.dtype != torch.bool:
        raise TypeError(f"{function}: {name}: expected bool, got {x.dtype}")
    check_shape(function, name, x, shape, what)


def check_between(function: str, name: str, x: float, low: float, high: float) -> None:
    """Raise ValueError unless low <= x < high."""
    if not low <= x < high:
        raise ValueError(f"{function}: {name}: expected {low} <= {name} < {high}, got {x}")


def check_positive(function: str, name: str, x: int) -> None:
    """Raise ValueError unless x >= 1."""
    if x < 1:
        raise ValueError(f"{function}: {name}: expected 1 or more, got {x}")


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for this tensor's device."""
    device = x.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast to autocast's dtype what torch's own attention casts; float64 stays as it is."""
    if not autocasts(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def check_attention(name: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Raise unless q (B, H, T_q, D), k (B, H_kv, T_k, D) and v (B, H_kv, T_k, D_v) fit together.

    Returns:
        Them, in autocast's dtype where it is on.
    """
    check_floating(name, "q", q)
    if autocasts(q):
        check_floating(name, "k", k)
        check_floating(name, "v", v)
        q, k, v = autocast(q, k, v)
    q_shape = q.shape
    if len(q_shape) != 4:
        check_shape(name, "q", q, (None,) * 4, "(batch, heads, tokens, channels)")
    check_like(name, "k", k, "q", q)
    check_like(name, "v", v, "q", q)
    k_shape, v_shape = k.shape, v.shape
    if len(k_shape) != 4 or k_shape[0] != q_shape[0] or k_shape[3] != q_shape[3]:
        check_shape(
            name,
            "k",
            k,
            (q_shape[0], None, None, q_shape[3]),
            "(batch, kv_heads, keys, channels) as q has them",
        )
    if len(v_shape) != 4 or v_shape[:3] != k_shape[:3]:
        check_shape(name, "v", v, (*k_shape[:3], None), "k's shape but for channels")
    check_group(name, q_shape[1], k_shape[1])
    return q, k, v


def check_attention_options(
    name: str,
    q: Tensor,
    batch: int,
    sink_tokens: int,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    softcap: float,
    dropout_p: float,
) -> None:
    """Raise unless the options of attention fit q (B, H, T, D); ``batch`` is of the slopes."""
    heads = q.shape[1]
    if sink_tokens < 0:
        raise ValueError(f"{name}: sink_tokens: expected 0 or more, got {sink_tokens}")
    if softcap < 0:
        raise ValueError(f"{name}: softcap: expected 0 (off) or more, got {softcap}")
    check_between(name, "dropout_p", dropout_p, 0.0, 1.0)
    if sinks is not None:
        check_floating(name, "sinks", sinks)
        check_shape(name, "sinks", sinks, (heads,), "(heads,)")
        check_device(name, "sinks", sinks, "q", q)
    if alibi_slopes is not None:
        check_floating(name, "alibi_slopes", alibi_slopes)
        if alibi_slopes.dim() == 2:
            check_shape(name, "alibi_slopes", alibi_slopes, (batch, heads), "(heads,) or (batch, heads)")
        else:
            check_shape(name, "alibi_slopes", alibi_slopes, (heads,), "(heads,) or (batch, heads)")
        check_device(name, "alibi_slopes", alibi_slopes, "q", q)
        if alibi_slopes.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(f"{name}: alibi_slopes: expected no requires_grad: they have no gradient")


def sum_dtype(x: Tensor) -> torch.dtype:
    """What kernels accumulate in, and states are kept in: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def normalised(x: Tensor, eps: float) -> Tensor:
    """x over its root mean square, along the last dimension; whatever the strides, the same bits."""
    y = x.to(sum_dtype(x)).contiguous()
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def empty_heads(like: Tensor, channels: int) -> Tensor:
    """As csrc/torch/tensors.h: tokens outside heads in memory where ``like`` has them so."""
    b, h, t, _ = like.shape
    if like.stride(1) < like.stride(2):
        return like.new_empty(b, t, h, channels).transpose(1, 2)
    return like.new_empty(b, h, t, channels)


_warned: set[str] = set()


def has_kernels(function: str, x: Tensor) -> bool:
    """Whether compiled kernels serve this tensor's device; warns once a device where they don't."""
    device = x.device.type
    if device in ("cpu", "meta"):
        return True
    if device not in _warned:
        _warned.add(device)
        warnings.warn(
            f"{function}: longspan has no kernels for {device} yet; using the plain torch "
            "reference, which is exact but slow and takes memory of size tokens x keys",
            stacklevel=3,
        )
    return False
