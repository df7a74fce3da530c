"""A funnel as Qdrant is asked for it, and what it answers as neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..results import Neighbors
from .arrays import Ids, Vectors, best_first

if TYPE_CHECKING:
    from qdrant_client.models import Filter, QueryRequest, ScoredPoint, SearchParams


class Narrowing(NamedTuple):
    """What one stage of a funnel asks.

    Args:
        dim: Of its vectors.
        limit: How many rows it keeps.
        exact: Compare every row that it may keep.
        params: How to search instead; None for Qdrant's own ways.
        queries: As the metric compares them.

    Shapes:
        queries: `(batch, dim)`.

    Examples:
        >>> Narrowing(2, 1, False, None, np.zeros((1, 2), np.float32)).exact
        False
    """

    dim: int
    limit: int
    exact: bool
    params: SearchParams | None
    queries: Vectors


def nested(
    models: Any, stages: Sequence[Narrowing], wanted: Filter | None, exact: SearchParams | None
) -> list[QueryRequest]:
    """Return one query per row of the stages: each stage prefetches for the next.

    Args:
        models: `qdrant_client.models`.
        stages: Of the funnel, first stage first.
        wanted: What the first stage keeps; the later ones see nothing else.
        exact: Parameters of exact stages.

    Examples:
        >>> from qdrant_client import models
        >>> wide = Narrowing(2, 1, True, None, np.float32([[1, 2]]))
        >>> (query,) = nested(models, [wide._replace(dim=1, limit=5), wide], None, None)
        >>> query.using, query.limit, query.prefetch.using, query.prefetch.limit
        ('2', 1, '1', 5)
    """
    requests = []
    for vectors in zip(*(stage.queries.tolist() for stage in stages), strict=True):
        asked: Any = None
        for number, (stage, vector) in enumerate(zip(stages, vectors, strict=True), 1):
            make = models.Prefetch if number < len(stages) else models.QueryRequest
            asked = make(
                prefetch=asked,
                query=vector,
                using=str(stage.dim),
                limit=stage.limit,
                params=exact if stage.exact else stage.params,
                filter=wanted if number == 1 else None,
            )
        requests.append(asked)
    return requests


def only(models: Any, allowed: Ids | None) -> Filter | None:
    """Return the filter that lets these ids through; None for all.

    Examples:
        >>> from qdrant_client import models
        >>> only(models, np.array([3, 7])).must[0].has_id
        [3, 7]
    """
    if allowed is None:
        return None
    return models.Filter(must=[models.HasIdCondition(has_id=allowed.tolist())])


def as_neighbors(found: Sequence[Sequence[ScoredPoint]], k: int, metric: str) -> Neighbors:
    """Return what queries found; where one found fewer, ids of -1 with scores of -inf at its end.

    Args:
        found: Per query, at most `k` points.
        k: Columns.
        metric: "cosine", "dot" or "l2".

    Examples:
        >>> from qdrant_client.models import ScoredPoint
        >>> as_neighbors([[ScoredPoint(id=7, version=0, score=3.0)]], 2, "l2")[0]
        [(7, -9.0), (-1, -inf)]
    """
    ids = np.full((len(found), k), -1, np.int64)
    scores = np.full(ids.shape, -np.inf)
    for row, points in enumerate(found):
        ids[row, : len(points)] = [point.id for point in points]
        scores[row, : len(points)] = [point.score for point in points]
    if metric == "l2":
        scores = 0 - np.square(scores)  # Qdrant gives the distance
    with np.errstate(over="ignore"):
        rounded = scores.astype(np.float32)
    order = best_first(np.where(ids < 0, np.iinfo(np.int64).max, ids), rounded)
    return Neighbors(np.take_along_axis(ids, order, 1), np.take_along_axis(rounded, order, 1))
