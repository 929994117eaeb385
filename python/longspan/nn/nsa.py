"""`NativeSparseAttention`, a layer of compressed, selected and near keys with learned gates."""

from typing import Any

import torch
from torch import Tensor, nn

from longspan.nn._branches import BranchCache, SparseAttention, same_length, write
from longspan.nn.attention import KVCache, Rotary
from longspan.ops._checks import check_positive
from longspan.ops.nsa import compress_keys, native_sparse_attention
from longspan.ops.selected import check_strides, compressed_count

_STEP_TOKENS = 4  # up to so many take a mask over the compressed keys


class SpanCompression(nn.Module):
    """Native Sparse Attention's phi: a perceptron from a span of keys, with positions, to one key.

    ``phi(K) = down(gelu(up(flatten(K + position))))`` for each head and each whole span of
    ``length`` tokens, ``stride`` apart (Yuan et al. 2025, equation 7).

    Args:
        head_dim: D.
        length: Tokens of a span.
        stride: From one span to the next.
        hidden: Channels between the two layers; None is D.
        device, dtype: Of the parameters.

    Example::

        longspan.nn.SpanCompression(64, 32, 16)(torch.randn(1, 4, 100, 64)).shape  # (1, 4, 5, 64)
    """

    def __init__(
        self,
        head_dim: int,
        length: int,
        stride: int,
        *,
        hidden: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the layers."""
        super().__init__()
        self.length, self.stride = length, stride
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.position = nn.Parameter(torch.zeros(length, head_dim, **kind))
        self.up = nn.Linear(length * head_dim, hidden or head_dim, **kind)
        self.down = nn.Linear(hidden or head_dim, head_dim, **kind)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H_kv, T, D) -> (B, H_kv, whole spans, D)."""
        if x.shape[2] < self.length:
            return x[:, :, :0]
        spans = x.unfold(2, self.length, self.stride).transpose(-1, -2)  # (B, H_kv, T_c, length, D)
        rows = (spans + self.position.to(x.dtype)).flatten(-2)
        return self.down(nn.functional.gelu(self.up(rows))).to(x.dtype)


class NativeSparseAttention(SparseAttention):
    """Attention to compressed keys, to the blocks that they choose, and to a window, through gates.

    ``y = o_proj(sum_c sigmoid(g_proj(x))_c attention_c(q, k, v))`` (Yuan et al. 2025;
    `longspan.native_sparse_attention` has the equations). Projections are named as in
    flash-linear-attention's layer: with ``compression="mean"``, compress_length = compress_stride =
    block_size and shared keys its state_dict loads. Heads of a group share their blocks, and the
    selected branch is fast where groups are large.

    Args:
        hidden_size: Channels of x.
        num_heads: H.
        num_kv_heads: H_kv, a divisor of H; None is H.
        head_dim: D; None is hidden_size / H.
        block_size: Keys of a selected block.
        block_counts: Blocks that are selected, the always chosen (own, the one before, 0) included.
        window_size: Keys of the window.
        compress_length: Keys that a compressed one stands for.
        compress_stride: From one to the next; divides compress_length and block_size.
        compression: "mlp", the paper's: modules compress_k and compress_v (`SpanCompression`); or
            "mean".
        separate_kv: Keys and values of each branch have projections of their own, as in the paper
            (k_proj and v_proj are the selected branch's; k_cmp_proj, v_cmp_proj, k_swa_proj,
            v_swa_proj). Else they share k_proj and v_proj.
        qkv_bias: Biases in the projections of queries, keys and values.
        out_bias: A bias in o_proj.
        qk_norm: RMSNorm over D of q and of k before they are rotated, modules q_norm and k_norm.
        norm_eps: Its epsilon.
        rotary: As in `Attention`. Compressed keys are made of rotated ones.
        causal: A token sees itself and what is before it. Needed for a cache.
        scale: Of the scores; None is D ** -0.5.
        device, dtype: Of the parameters.

    Raises:
        ValueError: Sizes do not fit together, or a value is out of range.

    Example::

        layer = longspan.nn.NativeSparseAttention(1024, 16, 1, block_counts=8)
        layer(torch.randn(1, 4096, 1024)).sum().backward()
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        block_size: int = 64,
        block_counts: int = 16,
        window_size: int = 512,
        compress_length: int = 32,
        compress_stride: int = 16,
        compression: str = "mlp",
        separate_kv: bool = False,
        qkv_bias: bool = False,
        out_bias: bool = False,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        rotary: Rotary | None = None,
        causal: bool = True,
        scale: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the projections."""
        super().__init__(
            hidden_size, num_heads, num_kv_heads, head_dim, qkv_bias=qkv_bias, out_bias=out_bias,
            qk_norm=qk_norm, norm_eps=norm_eps, rotary=rotary, causal=causal, scale=scale,
            device=device, dtype=dtype,
        )  # fmt: skip
        name = "NativeSparseAttention"
        check_strides(name, compress_length, compress_stride, block_size)
        check_positive(name, "block_counts", block_counts)
        check_positive(name, "window_size", window_size)
        if compression not in ("mlp", "mean"):
            raise ValueError(f'{name}: compression: expected "mlp" or "mean", got {compression!r}')
        self.block_size, self.block_counts, self.window_size = block_size, block_counts, window_size
        self.compress_length, self.compress_stride = compress_length, compress_stride
        self.compression, self.separate_kv = compression, separate_kv
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.g_proj = nn.Linear(hidden_size, 3 * num_heads, bias=False, **kind)
        if separate_kv:
            width = self.num_kv_heads * self.head_dim
            for branch in ("cmp", "swa"):
                for x in "kv":
                    layer = nn.Linear(hidden_size, width, bias=qkv_bias, **kind)
                    setattr(self, f"{x}_{branch}_proj", layer)
        spans = (self.head_dim, compress_length, compress_stride)
        self.compress_k = SpanCompression(*spans, **kind) if compression == "mlp" else None
        self.compress_v = SpanCompression(*spans, **kind) if compression == "mlp" else None

    def make_cache(self, batch_size: int, max_length: int, **options: Any) -> BranchCache:
        """An empty cache, as of `Attention.make_cache`, with compressed keys and values beside it.

        With ``separate_kv`` it holds the keys and values of each branch.
        """
        check_positive("NativeSparseAttention.make_cache", "max_length", max_length)
        count = compressed_count(max_length, self.compress_length, self.compress_stride)
        more: dict[str, tuple[int, torch.dtype | None]] = {
            "k_cmp": (count, None),
            "v_cmp": (count, None),
        }
        if self.separate_kv:
            more |= dict.fromkeys(("k_raw", "v_raw", "k_swa", "v_swa"), (max_length, None))
        return self._make_cache(more, batch_size, max_length, **options)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        *,
        lengths: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Attend within x, or from x to a cache that x extends.

        Args:
            x: (B, T, hidden_size).
            lengths: (B,) integers: tokens of each sequence, the rest of its row is padding, which is
                not seen and whose output is 0. Where causal.
            positions: (B or 1, T) integers for ``rotary``; None counts the tokens of each sequence from
                0, those in the cache included.
            cache: Of `make_cache`. x's tokens are appended to it, and see all of it. Needs room for all
                T. Without gradients. Sequences of different lengths take few tokens at a time: a mask
                of tokens x compressed keys is made.

        Returns:
            (B, T, hidden_size).

        Raises:
            TypeError, ValueError: Shapes, dtypes or the combination do not fit; the cache is too short.
            RuntimeError: A gradient is asked for through a cache.
        """
        x, positions, real = self._prepare(x, lengths, positions, cache)
        q, k, v = self._project(x, positions)
        new = {"k": k, "v": v}
        if self.separate_kv:
            for branch, to in (("cmp", "raw"), ("swa", "swa")):
                new[f"k_{to}"], new[f"v_{to}"] = self._project_branch(x, positions, branch)
        gates = torch.sigmoid(self.g_proj(x)).unflatten(-1, (self.num_heads, 3)).transpose(1, 2)
        g_cmp, g_slc, g_swa = gates.unbind(-1)
        options: dict[str, Any] = {
            "g_cmp": g_cmp, "g_slc": g_slc, "g_swa": g_swa, "block_counts": self.block_counts,
            "block_size": self.block_size, "window_size": self.window_size,
            "compress_length": self.compress_length, "compress_stride": self.compress_stride,
            "causal": self.causal, "scale": self.scale,
        }  # fmt: skip
        if cache is None:
            raw = [new.get(f"{name}_raw", new[name]) for name in "kv"]
            options["k_cmp"], options["v_cmp"] = self._compress(*raw)
            options |= {name: new[name] for name in ("k_swa", "v_swa") if name in new}
            return self._finish(native_sparse_attention(q, k, v, **options), real)
        assert isinstance(cache, BranchCache)
        self._check_no_gradient(cache, k, *new.values(), q)
        before, t = cache.lengths.clone(), x.shape[1]
        kept = {"k": cache.k, "v": cache.v, **cache.more}
        for name, rows in new.items():
            write(kept[name], rows, before)
        self._update_compressed(kept, before, before + t)
        cache.lengths += t if lengths is None else lengths
        same = same_length(before)
        if same is None or t <= _STEP_TOKENS:
            options["cache_seqlens"] = before + t
        else:  # of one length: as without a cache
            count = compressed_count(same + t, self.compress_length, self.compress_stride)
            kept = {
                name: y[:, :, : count if name.endswith("cmp") else same + t] for name, y in kept.items()
            }
        options |= {name: y for name, y in kept.items() if name not in ("k", "v", "k_raw", "v_raw")}
        out = native_sparse_attention(q, kept["k"], kept["v"], **options)
        return self._finish(out, real)

    def extra_repr(self) -> str:
        """The options that are not modules."""
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, "
            f"block_size={self.block_size}, block_counts={self.block_counts}, "
            f"window_size={self.window_size}, compress_length={self.compress_length}, "
            f"compress_stride={self.compress_stride}, compression={self.compression!r}, "
            f"separate_kv={self.separate_kv}, causal={self.causal}, scale={self.scale}"
        )

    def _project_branch(self, x: Tensor, positions: Tensor, branch: str) -> tuple[Tensor, Tensor]:
        k, v = (
            getattr(self, f"{name}_{branch}_proj")(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for name in "kv"
        )
        if self.k_norm is not None:
            k = self.k_norm(k.to(self.k_norm.weight.dtype))
        if self.rotary is not None:
            k = self.rotary(k, k, positions)[1]
        return k.to(v.dtype), v

    def _compress(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.compress_k is not None and self.compress_v is not None:
            return self.compress_k(k), self.compress_v(v)
        spans = {"compress_length": self.compress_length, "compress_stride": self.compress_stride}
        return compress_keys(k, **spans), compress_keys(v, **spans)

    def _update_compressed(self, kept: dict[str, Tensor], before: Tensor, after: Tensor) -> None:
        """Of the spans that became whole. Padding's are made again when its place is taken."""
        length, stride = self.compress_length, self.compress_stride
        for b, (was, now) in enumerate(zip(before.tolist(), after.tolist())):
            first, last = (max(0, (n - length) // stride + 1) for n in (was, now))
            if first == last:
                continue
            rows = slice(first * stride, (last - 1) * stride + length)
            raw = [kept.get(f"{name}_raw", kept[name])[b : b + 1, :, rows] for name in "kv"]
            for name, made in zip(("k_cmp", "v_cmp"), self._compress(*raw)):
                kept[name][b, :, first:last] = made[0]
