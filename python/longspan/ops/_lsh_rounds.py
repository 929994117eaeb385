"""How `lsh_attention` sorts tokens into chunks, and which pairs of them each round counts."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Pairs of a query and a key whose visibility is worked out at once: they stay in the cache.
_PAIRS = 2**19
_NOBODY = torch.iinfo(torch.int32).max  # the position of a key that is padding


class Rounds:
    """The orders of all rounds.

    A lane is a (batch, head); T' is T filled up to whole chunks, C of them, m tokens each. Tokens are
    rows (lanes * T', channels), and a round's order is a permutation of them within each lane:

        rows  --sorted-->      queries (lanes, C, m, channels)  --attention, unsorted-->  tokens
              --neighbours-->  keys (lanes, C, width, channels), width = (before + 1 + after) * m

    Args:
        buckets: (lanes, R, T); None is one round in which nobody moves.
        sizes: Batch, heads, tokens.
        chunk, before, after, across, wrap: `lsh_attention`'s options.
        key_mask: (B, T) bool or None. Padding is sorted last.
        device: Of the tokens.
    """

    def __init__(
        self,
        buckets: Tensor | None,
        sizes: tuple[int, int, int],
        chunk: int,
        before: int,
        after: int,
        *,
        across: bool,
        wrap: bool,
        key_mask: Tensor | None,
        device: torch.device,
    ) -> None:
        """Sort."""
        self.sizes, self.chunk, self.before, self.after = sizes, chunk, before, after
        self.across, self.wrap, self.plain = across, wrap, buckets is None
        batch, heads, tokens = sizes
        self.lanes, self.width = batch * heads, (before + 1 + after) * chunk
        self.chunks = -(-tokens // chunk)
        self.padded = self.chunks * chunk
        self.count = 1 if buckets is None else buckets.shape[1]
        position = torch.arange(self.padded, device=device)
        real = (position < tokens).expand(self.lanes, -1)
        if key_mask is not None:
            told = F.pad(key_mask, (0, self.padded - tokens))
            real = real & told.repeat_interleave(heads, dim=0)
        self._position = torch.where(real, position, _NOBODY).int()
        self._lane = torch.arange(self.lanes, device=device)[:, None] * self.padded
        # Of each round, (lanes, T'): tokens in their order, the place of each token in it, buckets.
        self._order: list[Tensor] = []
        self._place: list[Tensor] = []
        self._bucket: list[Tensor] = []
        for r in range(self.count):
            order = place = position.expand(self.lanes, -1)
            if buckets is not None:
                bucket = F.pad(buckets[:, r].long(), (0, self.padded - tokens))
                bucket = bucket.masked_fill(~real, torch.iinfo(torch.int64).max)
                order = torch.sort(bucket, dim=-1, stable=True).indices
                place = torch.empty_like(order).scatter_(1, order, position.expand_as(order))
                self._bucket.append(bucket)
            self._order.append(order)
            self._place.append(place)

    def rows(self, x: Tensor) -> Tensor:
        """(B, H, T, D) -> (lanes * T', D)."""
        return F.pad(x, (0, 0, 0, self.padded - x.shape[2])).reshape(-1, x.shape[3]).contiguous()

    def sorted(self, rows: Tensor, r: int) -> Tensor:
        """(lanes * T', D) -> (lanes, C, m, D)."""
        if not self.plain:
            rows = Permuted.apply(rows, self._rows_of(self._order[r]), self._rows_of(self._place[r]))
        return rows.view(self.lanes, self.chunks, self.chunk, rows.shape[1])

    def unsorted(self, x: Tensor, r: int) -> Tensor:
        """(lanes, C, m, ...) in the round's order -> (B, H, T, ...)."""
        x = x.flatten(0, 2)
        if not self.plain:
            x = Permuted.apply(x, self._rows_of(self._place[r]), self._rows_of(self._order[r]))
        batch, heads, tokens = self.sizes
        return x.view(batch, heads, self.padded, *x.shape[1:])[:, :, :tokens]

    def neighbours(self, rows: Tensor, r: int) -> Tensor:
        """(lanes * T', D) -> (lanes, C, width, D): what each chunk sees."""
        if self.before == self.after == 0:
            return self.sorted(rows, r)
        token = self._with_ends(self._order[r], r, lambda order: order)
        return _Neighbours.apply(
            rows, self._rows_of(token), self._rows_of(self._place[r]), self.lanes, self.chunk,
            self.before, self.after, self.wrap,
        )  # fmt: skip

    def visible(self, r: int, *, causal: bool, dedup: bool) -> Tensor:
        """Bool (lanes, C, m, width): which of its neighbours each token counts in this round.

        With ``dedup`` those that no earlier round counts. A token does not count itself.
        """
        with torch.no_grad():
            # What is compared: integers (lanes * C, m, 1) of queries and (lanes * C, 1, width) of keys.
            pairs = [self._of_both(self._position, r, missing=_NOBODY)]
            if not self.across:
                pairs.append(self._of_both(self._bucket[r], r))
            small = torch.int16 if self.chunks < 2**14 else torch.int32
            for other in range(r) if dedup else ():
                pairs.append(self._of_both((self._place[other] // self.chunk).to(small), r))
                if not self.across:
                    pairs.append(self._of_both(self._bucket[other], r))
            step = max(1, _PAIRS // (self.chunk * self.width))
            if torch.compiler.is_compiling():  # whose loops are fused anyway
                step = self.lanes * self.chunks
            parts = [
                self._compare(list(zip(some[::2], some[1::2])), causal)
                for some in zip(*(x.split(step) for pair in pairs for x in pair))
            ]
            seen = parts[0] if len(parts) == 1 else torch.cat(parts)
            return seen.view(self.lanes, self.chunks, self.chunk, self.width)

    def _compare(self, pairs: list[tuple[Tensor, Tensor]], causal: bool) -> Tensor:
        """`visible` of some chunks."""
        rest = iter(pairs)
        q, k = next(rest)
        seen = k < q if causal else (k != q) & (k != _NOBODY)
        if not self.across:
            q, k = next(rest)
            seen &= q == k
        for q, k in rest:
            distance = k - q
            new = (distance < -self.before) | (distance > self.after)
            if not self.across:
                q, k = next(rest)
                new |= q != k
            seen &= new
        return seen

    def _rows_of(self, token: Tensor) -> Tensor:
        """(lanes, n) numbers of tokens within a lane -> (lanes * n) numbers of rows."""
        return (token + self._lane).reshape(-1)

    def _with_ends(
        self, x: Tensor, r: int, of_order: Callable[[Tensor], Tensor], missing: int = 0
    ) -> Tensor:
        """(lanes, T') in the round's order -> (lanes, before * m + T' + after * m).

        On either side stands ``missing``, or, where rounds wrap, ``of_order`` of the tokens there.
        """
        before, after = self.before * self.chunk, self.after * self.chunk
        if not self.wrap:
            return F.pad(x, (before, after), value=missing)
        ring = torch.cat(self._order, dim=1)
        first, end = r * self.padded, (r + 1) * self.padded
        left = torch.arange(first - before, first, device=x.device) % ring.shape[1]
        right = torch.arange(end, end + after, device=x.device) % ring.shape[1]
        return torch.cat([of_order(ring[:, left]), x, of_order(ring[:, right])], dim=1)

    def _of_both(self, of_token: Tensor, r: int, missing: int = 0) -> tuple[Tensor, Tensor]:
        """A number of each token (lanes, T'), as queries and as keys: see `visible`."""
        x = of_token.gather(1, self._order[r])
        keys = self._with_ends(x, r, lambda order: of_token.gather(1, order), missing)
        return (
            x.reshape(self.lanes * self.chunks, self.chunk, 1),
            keys.unfold(1, self.width, self.chunk).reshape(-1, 1, self.width),
        )


class Permuted(torch.autograd.Function):
    """Rows in another order; the backward of a permutation is one, too, and not a sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        return gradients[0].index_select(0, inverse), None, None


class _Neighbours(torch.autograd.Function):
    """Rows (lanes * T', D) in a round's order and in overlapping windows: (lanes, C, width, D), a view.

    ``index`` names the rows in their order, with those at either end of a lane; ``inverse`` is the
    place of each row. A window is a few chunks wide, so the backward adds a few shifted slices. Ends
    that do not wrap are seen by nobody and have no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor, lanes: int, chunk: int, before: int,
        after: int, wrap: bool,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(index, inverse)
        ctx.sizes = lanes, chunk, before, wrap
        x = rows.index_select(0, index).view(lanes, -1, rows.shape[1])
        return x.unfold(1, (before + 1 + after) * chunk, chunk).transpose(2, 3)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (d,), (index, inverse) = gradients, ctx.saved_tensors
        lanes, chunk, before, wrap = ctx.sizes
        chunks, width, channels = d.shape[1:]
        shifts = width // chunk
        dx = d.new_zeros(lanes, chunks + shifts - 1, chunk, channels)
        for i in range(shifts):
            dx[:, i : i + chunks] += d[:, :, i * chunk : (i + 1) * chunk]
        d_rows = dx[:, before : before + chunks].reshape(-1, channels).index_select(0, inverse)
        if wrap:
            index = index.view(lanes, -1, chunk)
            for part in (slice(0, before), slice(before + chunks, None)):
                end = dx[:, part].reshape(-1, channels)
                d_rows = d_rows.index_add(0, index[:, part].reshape(-1), end)
        return d_rows, *([None] * 7)
