"""`PerformerAttention`, a layer of attention by random features, and when it draws new ones."""

from typing import Any

import torch
from torch import Tensor

from longspan.nn._recurrent import Memory, RecurrentMixer, Rows
from longspan.ops._checks import check_positive
from longspan.ops.favor import Kind, check_options, count, favor_projection
from longspan.ops.performer import performer_attention, performer_attention_step

# So many calls may wait for their backward under checkpointing, as numbers, not as tensors.
_REMEMBERED = 4096


class PerformerAttention(RecurrentMixer):
    """Performer's attention: softmax attention estimated by random features, in linear time.

    ``o_proj(performer_attention(q_proj(x), k_proj(x), v_proj(x), projection))`` (Choromanski et al.
    2020, Performer). Projections are named as `longspan.nn.Attention`'s, so that one layer's weights
    load into the other.

    The random directions are the buffer ``projection`` (num_features, head_dim), in the state_dict. With
    ``redraw_interval`` they are drawn anew every so many calls in training mode, from torch's generator;
    in evaluation, and with a state, never. What ``torch.utils.checkpoint`` computes again uses the
    directions that the first computation had, whatever was drawn since: it restores torch's generator,
    by which a call is told (so its ``preserve_rng_state`` must stay on).

    Args:
        hidden_size: Channels of x.
        num_heads: H.
        num_kv_heads: H_kv, a divisor of H; None is H.
        head_dim: D; None is hidden_size / H.
        num_features: m, directions; "hyperbolic" and "trigonometric" have two features for each.
        kind: "positive", "hyperbolic", "trigonometric" or a function, as in `longspan.favor_features`.
        orthogonal: As in `longspan.favor_projection`.
        norms: Likewise.
        redraw_interval: Calls in training mode between draws; None is never.
        eps: Of the features; None is as in `longspan.favor_features`.
        layer_idx: This layer's number in a model.
        causal: Whether a token sees only those before it and itself. Else there are no states.
        device, dtype: Of the parameters and of the projection.

    Raises:
        ValueError: Sizes do not fit together, or a value is out of range.

    Example::

        layer = longspan.nn.PerformerAttention(512, num_heads=8, redraw_interval=1000)
        layer(torch.randn(1, 4096, 512)).sum().backward()
    """

    def __init__(
        self,
        hidden_size: int = 1024,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        num_features: int = 256,
        kind: Kind = "positive",
        orthogonal: bool = True,
        norms: str = "gaussian",
        redraw_interval: int | None = None,
        eps: float | None = None,
        layer_idx: int | None = None,
        *,
        causal: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the parameters, and draw the first projection."""
        super().__init__()
        check_positive("PerformerAttention", "num_heads", num_heads)
        width = hidden_size if head_dim is None else num_heads * head_dim
        self._make_projections(
            hidden_size, width, width, num_heads, num_kv_heads, None, device=device, dtype=dtype
        )
        check_positive("PerformerAttention", "num_features", num_features)
        if redraw_interval is not None:
            check_positive("PerformerAttention", "redraw_interval", redraw_interval)
        self.num_features, self.kind, self.eps = num_features, kind, eps
        self.orthogonal, self.norms, self.redraw_interval = orthogonal, norms, redraw_interval
        self.causal, self.layer_idx = causal, layer_idx
        self.projection: Tensor
        self.seed: Tensor
        self.calls: Tensor
        weight = self.q_proj.weight
        self.register_buffer("projection", weight.new_empty(num_features, self.head_k_dim))
        self.register_buffer("seed", torch.zeros((), dtype=torch.int64))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        check_options("PerformerAttention", weight[:, : self.head_k_dim], self.projection, kind, eps)
        self._drawn: dict[int, int] = {}  # which projection each call of late had
        self.redraw_projection()

    @torch.no_grad()
    def redraw_projection(self, seed: int | None = None) -> None:
        """Draw new directions, from ``seed`` or else from torch's generator."""
        self.seed.fill_(_number() if seed is None else seed)
        self.projection.copy_(self._draw(int(self.seed)))

    def _draw(self, seed: int) -> Tensor:
        return favor_projection(
            self.num_features, self.head_k_dim, orthogonal=self.orthogonal, norms=self.norms,
            generator=torch.Generator().manual_seed(seed), device=self.projection.device,
            dtype=self.projection.dtype,
        )  # fmt: skip

    def _directions(self, has_state: bool) -> Tensor:
        """The projection of this call."""
        if self.redraw_interval is None or not self.training or has_state:
            return self.projection
        return self._scheduled()

    @torch.compiler.disable
    def _scheduled(self) -> Tensor:
        # The number is the call's name: a recomputation finds torch's generator as the call found it.
        name = _number()
        if name in self._drawn:
            seed = self._drawn[name]
            return self.projection.clone() if seed == int(self.seed) else self._draw(seed)
        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "PerformerAttention: redraw_interval: what is computed again in a backward needs "
                "torch.utils.checkpoint's preserve_rng_state, or its call is too long ago"
            )
        assert self.redraw_interval is not None
        if int(self.calls) and int(self.calls) % self.redraw_interval == 0:
            self.redraw_projection(name)
        self.calls += 1
        self._drawn[name] = int(self.seed)
        while len(self._drawn) > _REMEMBERED:
            del self._drawn[next(iter(self._drawn))]
        return self.projection.clone()  # a backward must not find the next draw in its place

    def _memory_shapes(self) -> tuple[tuple[int, ...], ...]:
        features = count(self.projection, self.kind)
        heads = self.num_heads
        return (heads, features, self.head_v_dim), (heads, features), (self.num_kv_heads,)

    def _mix(
        self, rows: Rows, q: Tensor, k: Tensor, v: Tensor, memory: Memory | None
    ) -> tuple[Tensor, Memory]:
        state: Any = memory
        return performer_attention(
            q, k, v, self._directions(memory is not None), causal=self.causal, kind=self.kind,
            eps=self.eps, initial_state=state, return_final_state=True, cu_seqlens=rows.cu_seqlens,
        )  # fmt: skip

    def _mix_step(self, rows: Rows, q: Tensor, k: Tensor, v: Tensor, memory: Memory) -> Tensor:
        state: Any = memory
        return performer_attention_step(q, k, v, self.projection, state, kind=self.kind, eps=self.eps)

    def extra_repr(self) -> str:
        """The options that the modules do not show."""
        return (
            f"{super().extra_repr()}, num_features={self.num_features}, kind={self.kind!r}, "
            f"redraw_interval={self.redraw_interval}, causal={self.causal}"
        )


def _number() -> int:
    return int(torch.randint(1 << 62, ()))
