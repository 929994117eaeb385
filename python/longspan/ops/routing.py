"""Routing attention (Routing Transformer): `routing_attention`, its step, and its k-means."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.ops._autograd import wants_gradient
from longspan.ops._checks import (
    autocast,
    check_between,
    check_bool,
    check_device,
    check_floating,
    check_integers,
    check_like,
    check_positive,
    check_shape,
    normalised,
    sum_dtype,
)
from longspan.ops._lsh_rounds import Permuted
from longspan.ops.attention import attention, attention_varlen, merge_attention

_SCORES = 2**22  # are made at once when tokens are told to clusters
NORM_EPS = 1e-6  # of a shared key's mean square


def routing_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    centroids: Tensor,
    *,
    window_size: int | None = None,
    causal: bool = False,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attention within clusters of queries and keys around learned centroids.

    Queries and keys are routed by the dot product of a centroid and their layer norm, which lies on
    the unit sphere (Roy, Saffar, Vaswani and Grangier 2020, Routing Transformer, section 4.1). In two
    ways:

    - ``window_size`` w: each cluster takes the w queries and the w keys that score best, so work is
      T * w * clusters in all. The output of a token is the mean over the clusters in which it is and
      sees a key, and 0 where there is none. ``causal`` then means that no token reads a later one; but
      whether a token is in a cluster depends on the tokens after it, in training as in the paper, and
      a decoder cannot know that.
    - None: each token goes to the cluster that scores best, however many others do. With ``causal``
      nothing depends on later tokens, and `routing_attention_step` computes the same token by token.

    With shared queries and keys (``k`` None) keys are the queries over their root mean square, and a
    token attends to itself only where it sees nobody else in the cluster.

    Args:
        q: (B, H, T, D), float32, float64, bfloat16 or float16, any strides.
        k: (B, H, T, D), or None for keys that are the queries.
        v: (B, H, T, D_v).
        centroids: (H, C, D) floating, of unit length; no gradient.
        window_size: w; more than T is T. None takes every token once.
        causal: A token sees itself and what is before it. Without ``window_size`` only where k is None.
        key_mask: (B, T) bool, False for padding: it is in no cluster, and its output is 0.
        scale: Of the scores; None is D ** -0.5.
        dropout_p: Probability in [0, 1) of dropping a weight.

    Returns:
        (B, H, T, D_v) in q's dtype.

    Raises:
        TypeError: A dtype is not supported or differs from q's.
        ValueError: Shapes or values do not fit, or ``causal`` with ``k`` and without ``window_size``.

    Example::

        q, v = torch.randn(2, 1, 8, 4096, 64, requires_grad=True)
        centroids = longspan.routing_kmeans(q, 64)
        longspan.routing_attention(q, None, v, centroids, causal=True).sum().backward()
    """
    name = "routing_attention"
    q, k, v = _check_inputs(name, q, k, v, centroids, key_mask)
    check_between(name, "dropout_p", dropout_p, 0.0, 1.0)
    if window_size is not None:
        check_positive(name, "window_size", window_size)
    elif causal and k is not None:
        raise ValueError(
            f"{name}: causal: expected k=None (shared queries and keys) or a window_size beside it, "
            "for only shared ones have as many keys as queries before them in a cluster"
        )
    if key_mask is not None:
        q, v = (torch.where(key_mask[:, None, :, None], x, 0) for x in (q, v))
        k = None if k is None else torch.where(key_mask[:, None, :, None], k, 0)
    # One layout from here on: gradients are then added up in one order, whatever the strides.
    q, v = q.contiguous(), v.contiguous()
    k = None if k is None else k.contiguous()
    if v.numel() == 0 or q.shape[2] == 0:
        return v + (q if k is None else q + k).sum(-1, keepdim=True)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    if window_size is not None:
        return _by_cluster(q, k, v, centroids, window_size, causal, key_mask, scale, dropout_p)
    return _by_token(q, k, v, centroids, causal, key_mask, scale, dropout_p)


def routing_attention_step(
    q: Tensor,
    v: Tensor,
    centroids: Tensor,
    q_cache: Tensor,
    v_cache: Tensor,
    cluster_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    """Causal `routing_attention` of one new token a sequence to a cache, which it is appended to.

    The result is the last row of ``routing_attention(q, None, v, centroids, causal=True)`` over the
    whole sequence: only rows of the new token's cluster are read. No gradient.

    Args:
        q: (B, H, 1, D), the new token; keys are the queries.
        v: (B, H, 1, D_v).
        centroids: (H, C, D).
        q_cache: (B, H, S, D), raw queries, written in place at slot ``cache_seqlens - 1``.
        v_cache: (B, H, S, D_v), likewise.
        cluster_cache: (B, H, S) int32 or int64, of `routing_clusters`, likewise.
        cache_seqlens: (B,) integers from 1 to S: tokens of each sequence, the new one included.
        scale: Of the scores; None is D ** -0.5.

    Returns:
        (B, H, 1, D_v) in q's dtype.

    Raises:
        TypeError, ValueError: As `routing_attention`; a cache is too short.
        RuntimeError: A gradient is asked for.

    Example::

        q_cache, v_cache = torch.zeros(2, 1, 8, 1024, 64)
        cluster_cache = torch.zeros(1, 8, 1024, dtype=torch.int32)
        q, v = torch.randn(2, 1, 8, 1, 64)
        centroids = torch.nn.functional.normalize(torch.randn(8, 16, 64), dim=-1)
        longspan.routing_attention_step(
            q, v, centroids, q_cache, v_cache, cluster_cache, torch.tensor([1]))
    """
    name = "routing_attention_step"
    q, _, v = _check_inputs(name, q, None, v, centroids, None)
    b, h, t, d = q.shape
    if t != 1:
        raise ValueError(f"{name}: q: expected one token, got {t}")
    check_like(name, "q_cache", q_cache, "q", q)
    check_like(name, "v_cache", v_cache, "q", q)
    check_shape(name, "q_cache", q_cache, (b, h, None, d), "(batch, heads, slots, channels) as q")
    slots = q_cache.shape[2]
    check_shape(name, "v_cache", v_cache, (b, h, slots, v.shape[3]), "q_cache's shape, v's channels")
    check_integers(name, "cluster_cache", cluster_cache, (b, h, slots), "(batch, heads, slots)")
    check_integers(name, "cache_seqlens", cache_seqlens, (b,), "(batch,)")
    if wants_gradient((q, v, q_cache, v_cache)):
        raise RuntimeError(
            f"{name}: decoding has no gradient; use routing_attention, or torch.no_grad()"
        )
    if v.numel() == 0:
        return v.clone()
    length = cache_seqlens.long()
    least, used = (int(x) for x in torch.aminmax(length))
    if least < 1 or used > slots:
        raise ValueError(
            f"{name}: cache_seqlens: expected 1 to {slots}, the caches' slots, got {least} to {used}"
        )
    cluster = routing_clusters(q, centroids)
    row = torch.arange(b, device=q.device)
    q_cache[row, :, length - 1] = q[:, :, 0]
    v_cache[row, :, length - 1] = v[:, :, 0]
    cluster_cache[row, :, length - 1] = cluster[..., 0].to(cluster_cache.dtype)
    before = torch.arange(used, device=q.device) < (length - 1)[:, None, None]
    with_it = (cluster_cache[..., :used] == cluster) & before
    members = with_it.nonzero(as_tuple=True)  # in the order of sequences, then heads
    ends = with_it.sum(-1).flatten().cumsum(0)
    out, lse = attention_varlen(
        q.reshape(b * h, 1, d),
        normalised(q_cache[members], NORM_EPS)[:, None],
        v_cache[members][:, None],
        torch.arange(b * h + 1, device=q.device),
        F.pad(ends, (1, 0)),
        scale=d**-0.5 if scale is None else float(scale),
        return_lse=True,
    )
    return torch.where((lse == -torch.inf).view(b, h, 1, 1), v, out.view(v.shape))


def routing_clusters(x: Tensor, centroids: Tensor) -> Tensor:
    """Which centroid each vector is nearest to, by angle.

    Args:
        x: (B, H, T, D), floating.
        centroids: (H, C, D).

    Returns:
        (B, H, T) int64.

    Raises:
        TypeError, ValueError: A dtype or shape does not fit.

    Example::

        routing_clusters(torch.randn(1, 8, 100, 64), torch.randn(8, 16, 64))
    """
    _check_points("routing_clusters", x, centroids, None)
    return _nearest(_on_sphere(x), centroids)


def routing_sums(x: Tensor, centroids: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
    """For each centroid the sum of the vectors that are nearest to it: what `routing_update` takes.

    Sums over the batch, and may be added up over micro-batches and ranks
    (``torch.distributed.all_reduce``).

    Args:
        x: (B, H, T, D), queries or keys; their layer norm is taken, on the unit sphere.
        centroids: (H, C, D).
        key_mask: (B, T) bool, False for padding.

    Returns:
        (H, C, D) in the centroids' dtype; 0 where nobody came. No gradient.

    Raises:
        TypeError, ValueError: A dtype or shape does not fit.

    Example::

        sums = (routing_sums(q, centroids) + routing_sums(k, centroids)) / 2
    """
    _check_points("routing_sums", x, centroids, key_mask)
    return _sums(_on_sphere(x), centroids, key_mask)


def routing_update(centroids: Tensor, sums: Tensor, *, decay: float = 0.999) -> Tensor:
    """One step of the centroids' exponential moving average, on the unit sphere.

    ``mu <- decay * mu + (1 - decay) * sums``, divided by its length, where ``sums`` is half the sum of
    a cluster's queries and half that of its keys (Roy et al. 2020, section 4.1). A cluster to which
    nobody came (a sum of exactly 0) keeps its centroid.

    Args:
        centroids: (H, C, D).
        sums: (H, C, D), of `routing_sums`.
        decay: From 0 to below 1.

    Returns:
        (H, C, D), new.

    Raises:
        TypeError, ValueError: A dtype, shape or value does not fit.

    Example::

        centroids = routing_update(centroids, routing_sums(q, centroids))
    """
    name = "routing_update"
    check_floating(name, "centroids", centroids)
    check_like(name, "sums", sums, "centroids", centroids)
    check_shape(name, "sums", sums, centroids.shape, "centroids' shape")
    check_between(name, "decay", decay, 0.0, 1.0)
    with torch.no_grad():
        moved = F.normalize(decay * centroids + (1 - decay) * sums, dim=-1)
        return torch.where((sums == 0).all(-1, keepdim=True), centroids, moved)


def routing_kmeans(
    x: Tensor,
    num_clusters: int,
    *,
    iterations: int = 10,
    key_mask: Tensor | None = None,
    all_reduce: Callable[[Tensor], object] | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Centroids for a first batch: k-means on the unit sphere, for each head.

    Args:
        x: (B, H, T, D), queries, or queries and keys one after the other.
        num_clusters: C.
        iterations: How often means are taken.
        key_mask: (B, T) bool, False for padding.
        all_reduce: Sums a tensor over ranks in place (``torch.distributed.all_reduce``); every rank
            then needs the same ``start``.
        start: (H, C, D), where to begin. None is C vectors of x, drawn from torch's generator without
            repetition where there are so many.

    Returns:
        (H, C, D), of unit length, float32 (float64 for float64).

    Raises:
        TypeError, ValueError: A dtype, shape or value does not fit, or there is no vector at all.

    Example::

        centroids = routing_kmeans(torch.randn(1, 8, 4096, 64), 64)
    """
    name = "routing_kmeans"
    check_floating(name, "x", x)
    check_shape(name, "x", x, (None,) * 4, "(batch, heads, tokens, channels)")
    check_positive(name, "num_clusters", num_clusters)
    if iterations < 0:
        raise ValueError(f"{name}: iterations: expected 0 or more, got {iterations}")
    h, d = x.shape[1], x.shape[3]
    if start is None:
        start = _some(name, x, num_clusters, key_mask)
    check_shape(name, "start", start, (h, num_clusters, d), "(heads, num_clusters, channels)")
    _check_points(name, x, start, key_mask)
    points = _on_sphere(x)
    centroids = F.normalize(start.detach().to(sum_dtype(x)), dim=-1)
    for _ in range(iterations):
        sums = _sums(points, centroids, key_mask)
        if all_reduce is not None:
            all_reduce(sums)
        centroids = routing_update(centroids, sums, decay=0.0)
    return centroids


def routing_loss(x: Tensor, centroids: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
    """Commitment: how far vectors are from their centroids, as a mean over tokens, heads and channels.

    ``mean((layer_norm(x) / sqrt(D) - mu)^2)``, with a gradient for x and none for the centroids. The
    usual factor beside the loss is 1e-4.

    Args:
        x: (B, H, T, D).
        centroids: (H, C, D).
        key_mask: (B, T) bool, False for padding, which does not count.

    Returns:
        A scalar, float32 (float64 for float64); 0 where there is no token.

    Raises:
        TypeError, ValueError: A dtype or shape does not fit.

    Example::

        loss = loss + 1e-4 * routing_loss(q, centroids)
    """
    _check_points("routing_loss", x, centroids, key_mask)
    points = _on_sphere(x)
    heads = torch.arange(x.shape[1], device=x.device)[:, None]
    distance = points - centroids.detach().to(points.dtype)[heads, _nearest(points, centroids)]
    square = distance.square().mean(-1)
    if key_mask is None:
        return square.sum() / max(1, square.numel())
    real = key_mask[:, None].expand_as(square)
    return torch.where(real, square, 0).sum() / real.sum().clamp(min=1)


# ---- checks


def _check_points(name: str, x: Tensor, centroids: Tensor, key_mask: Tensor | None) -> None:
    check_floating(name, "x", x)
    check_shape(name, "x", x, (None,) * 4, "(batch, heads, tokens, channels)")
    _check_centroids(name, centroids, x)
    if key_mask is not None:
        check_bool(name, "key_mask", key_mask, (x.shape[0], x.shape[2]), "(batch, tokens)")
        check_device(name, "key_mask", key_mask, "x", x)


def _check_centroids(name: str, centroids: Tensor, x: Tensor) -> None:
    check_floating(name, "centroids", centroids)
    shape = (x.shape[1], None, x.shape[3])
    check_shape(name, "centroids", centroids, shape, "(heads, clusters, channels)")
    check_positive(name, "clusters in centroids", centroids.shape[1])
    check_device(name, "centroids", centroids, "q", x)


def _check_inputs(
    name: str, q: Tensor, k: Tensor | None, v: Tensor, centroids: Tensor, key_mask: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    check_floating(name, "q", q)
    check_floating(name, "v", v)
    q, v = autocast(q, v)
    check_shape(name, "q", q, (None,) * 4, "(batch, heads, tokens, channels)")
    if k is not None:
        check_floating(name, "k", k)
        (k,) = autocast(k)
        check_like(name, "k", k, "q", q)
        check_shape(name, "k", k, q.shape, "q's shape")
    check_like(name, "v", v, "q", q)
    check_shape(name, "v", v, (*q.shape[:3], None), "q's shape but for channels")
    _check_centroids(name, centroids, q)
    if key_mask is not None:
        check_bool(name, "key_mask", key_mask, (q.shape[0], q.shape[2]), "(batch, tokens)")
        check_device(name, "key_mask", key_mask, "q", q)
    return q, k, v


# ---- clusters


def _on_sphere(x: Tensor) -> Tensor:
    """Layer norm without a weight, over sqrt(D): of length 1."""
    with torch.autocast(x.device.type, enabled=False):
        d = x.shape[3]
        return F.layer_norm(x.to(sum_dtype(x)), (d,)) * d**-0.5


@torch.no_grad()
def _nearest(points: Tensor, centroids: Tensor) -> Tensor:
    """(B, H, T) int64."""
    b, h, t, _ = points.shape
    to = centroids.to(points.dtype).transpose(1, 2)
    step = max(1, _SCORES // max(1, b * h * to.shape[2]))
    with torch.autocast(points.device.type, enabled=False):
        parts = [(points[:, :, i : i + step] @ to).argmax(-1) for i in range(0, t, step)]
    return torch.cat(parts, dim=2) if parts else points.new_empty((b, h, 0), dtype=torch.int64)


@torch.no_grad()
def _sums(points: Tensor, centroids: Tensor, key_mask: Tensor | None) -> Tensor:
    """(H, C, D) in the centroids' dtype."""
    h, c, d = centroids.shape
    slot = _nearest(points, centroids) + torch.arange(h, device=points.device)[:, None] * c
    if key_mask is not None:
        points = torch.where(key_mask[:, None, :, None], points, 0)
    sums = points.new_zeros(h * c, d).index_add_(0, slot.flatten(), points.detach().reshape(-1, d))
    return sums.view(h, c, d).to(centroids.dtype)


def _some(name: str, x: Tensor, count: int, key_mask: Tensor | None) -> Tensor:
    """(H, count, D): vectors of x at random, others for each head."""
    if key_mask is not None:
        check_bool(name, "key_mask", key_mask, (x.shape[0], x.shape[2]), "(batch, tokens)")
    rows = x.detach().transpose(1, 2).flatten(0, 1)  # (B * T, H, D)
    if key_mask is not None:
        rows = rows[key_mask.flatten()]
    if len(rows) == 0:
        raise ValueError(f"{name}: x: expected at least one token that is not padding, got none")
    repeats = -(-count // len(rows))
    drawn = torch.stack(
        [
            torch.cat([torch.randperm(len(rows)) for _ in range(repeats)])[:count].to(x.device)
            for _ in range(x.shape[1])
        ]
    )
    heads = torch.arange(x.shape[1], device=x.device)[:, None]
    return _on_sphere(rows[drawn, heads][None])[0]


# ---- each cluster takes w tokens


def _by_cluster(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    centroids: Tensor,
    window: int,
    causal: bool,
    key_mask: Tensor | None,
    scale: float,
    dropout_p: float,
) -> Tensor:
    b, h, t, _ = q.shape
    lanes, c = b * h, centroids.shape[1]
    window = min(window, t)
    real = None if key_mask is None else key_mask.repeat_interleave(h, dim=0)
    lane = torch.arange(lanes, device=q.device)[:, None] * t

    def taken(x: Tensor) -> Tensor:
        """(lanes, C * w): the best tokens of each cluster, ascending."""
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            points = _on_sphere(x)
            score = centroids.to(points.dtype) @ points.transpose(2, 3)
            score = score.masked_fill(score.isnan(), -torch.inf)
            if key_mask is not None:
                score = score.masked_fill(~key_mask[:, None, None], -torch.inf)
            return score.topk(window, dim=-1).indices.sort(-1).values.view(lanes, c * window)

    def rows(x: Tensor, token: Tensor) -> Tensor:
        """(B, H, T, D) -> (lanes, C, w, D)."""
        y = x.reshape(lanes * t, x.shape[3]).index_select(0, (token + lane).flatten())
        return y.view(lanes, c, window, x.shape[3])

    queries = taken(q)
    keys = queries if k is None else taken(k)
    row, column = queries.view(lanes, c, window, 1), keys.view(lanes, c, 1, window)
    seen = None
    if k is None:
        seen = column < row if causal else column != row
    elif causal:
        seen = column <= row
    chosen = torch.ones_like(queries, dtype=torch.bool) if real is None else real.gather(1, queries)
    if real is not None:
        known = real.gather(1, keys).view(lanes, c, 1, window).expand(-1, -1, window, -1)
        seen = known if seen is None else seen & known
    out, lse = attention(
        rows(q, queries), rows(normalised(q, NORM_EPS) if k is None else k, keys), rows(v, keys), seen,
        scale=scale, dropout_p=dropout_p, return_lse=True,
    )  # fmt: skip
    alone = lse == -torch.inf
    if k is None:
        out = torch.where(alone[..., None], rows(v, queries), out)
    else:
        chosen = chosen & ~alone.view(chosen.shape)
    where = (queries + lane).flatten()
    count = torch.zeros(lanes * t, device=q.device).index_add_(0, where, chosen.flatten().float())
    kept = torch.where(chosen.view(-1, 1), out.reshape(-1, v.shape[3]).to(sum_dtype(q)), 0)
    total = kept.new_zeros(lanes * t, v.shape[3]).index_add(0, where, kept)
    return (total / count.clamp(min=1)[:, None]).to(q.dtype).view(v.shape)


# ---- each token goes to one cluster


def _by_token(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    centroids: Tensor,
    causal: bool,
    key_mask: Tensor | None,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """Tokens sorted by (batch, head, cluster, position), and each cluster attends within itself."""
    b, h, t, _ = q.shape
    c = centroids.shape[1]

    def clusters(x: Tensor) -> Tensor:
        """(B * H * T): which of all clusters of all heads and sequences; one more for padding."""
        which = _nearest(_on_sphere(x.detach()), centroids)
        which = which + torch.arange(b * h, device=x.device).view(b, h, 1) * c
        if key_mask is not None:
            which = which.masked_fill(~key_mask[:, None], b * h * c)
        return which.flatten()

    def attend(queries: "_Ragged", keys: "_Ragged", key: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        out, lse = attention_varlen(
            queries.rows(q), keys.rows(key), keys.rows(v), queries.begins, keys.begins, causal=causal,
            scale=scale, dropout_p=dropout_p, return_lse=True,
        )  # fmt: skip
        return queries.back(out.squeeze(1)).view(v.shape), queries.back(lse.squeeze(0)).view(b, h, t)

    of_query = clusters(q)
    if k is not None:
        return attend(_Ragged(of_query, b * h * c), _Ragged(clusters(k), b * h * c), k, False)[0]
    # Without itself: the queries of a cluster against its keys but for the last is strictly causal,
    # for the last query is aligned with the last key. Both directions make what is not causal.
    key = normalised(q, NORM_EPS)
    parts = []
    for backwards in (False,) if causal else (False, True):
        order = _Ragged(of_query, b * h * c, backwards)
        parts.append(attend(order, order.without_last(), key, True))
    out, lse = parts[0] if causal else merge_attention(*zip(*parts))
    alone = lse == -torch.inf
    if key_mask is not None:
        alone = alone & key_mask[:, None]
    return torch.where(alone[..., None], v, out)


class _Ragged:
    """Rows sorted into groups, in their order or backwards; rows of group ``groups`` are left out.

    Attributes:
        begins: (groups + 1,) where each group begins, and the end: what attention_varlen takes.
    """

    def __init__(self, group: Tensor, groups: int, backwards: bool = False) -> None:
        n = len(group)
        sorted_ = torch.sort(group.flip(0) if backwards else group, stable=True)
        self._order = n - 1 - sorted_.indices if backwards else sorted_.indices
        self.begins = torch.searchsorted(sorted_.values, torch.arange(groups + 1, device=group.device))
        self._group = sorted_.values
        self._find_places()

    def _find_places(self) -> None:
        number = torch.arange(len(self._order), device=self._order.device)
        self._place = torch.empty_like(self._order).scatter_(0, self._order, number)

    def without_last(self) -> "_Ragged":
        """The same groups, each without its last row."""
        last = F.pad(self._group[1:] != self._group[:-1], (0, 1), value=True)
        other = object.__new__(_Ragged)
        other._order = self._order[torch.sort(last, stable=True).indices]
        sizes = (self.begins[1:] - self.begins[:-1] - 1).clamp(min=0)
        other.begins = F.pad(sizes.cumsum(0), (1, 0))
        other._find_places()
        return other

    def rows(self, x: Tensor) -> Tensor:
        """(B, H, T, D) -> (B * H * T, 1, D), sorted."""
        return Permuted.apply(x.reshape(-1, x.shape[3]), self._order, self._place)[:, None]

    def back(self, x: Tensor) -> Tensor:
        """Sorted rows to where they were."""
        return Permuted.apply(x, self._place, self._order)
