"""How good an answer is, query by query: what a planner is to reach."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from .facts import Ids, IndexFacts, Vectors, check_embeddings
from .first_stage import import_faiss

Measure = Callable[[Ids], npt.NDArray[np.float64]]  # rows found (queries, k) -> (queries,) in 0..1

_ROWS_AT_ONCE = 65_536


def recall_against(truth: Ids) -> Measure:
    """Return the measure of how many of the true neighbours were found.

    Args:
        truth: Gallery rows of the exact answer, `(queries, k)`.

    Examples:
        >>> recall_against(np.array([[4, 7]]))(np.array([[7, 9]])).tolist()
        [0.5]
    """

    def measure(found: Ids) -> npt.NDArray[np.float64]:
        hits = (found[:, :, None] == truth[:, None, :]).any(axis=1)
        return hits.mean(axis=1)

    return measure


def precision_by_label(gallery: npt.ArrayLike, queries: npt.ArrayLike) -> Measure:
    """Return the measure of how many of the neighbours have the query's label.

    Args:
        gallery: Label of every gallery row, `(rows,)`.
        queries: Label of every query, `(queries,)`.

    Examples:
        >>> precision_by_label([0, 1, 1], [1])(np.array([[2, 0]])).tolist()
        [0.5]
    """
    have, want = np.asarray(gallery), np.asarray(queries)
    return lambda found: (have[found] == want[:, None]).mean(axis=1)


def average_precision_by_label(gallery: npt.ArrayLike, queries: npt.ArrayLike) -> Measure:
    """Return the paper's AP@k by label: precision at every hit, summed, divided by k.

    Args:
        gallery: Label of every gallery row, `(rows,)`.
        queries: Label of every query, `(queries,)`.

    Reference:
        Kusupati et al., Matryoshka Representation Learning, section 4.3.

    Examples:
        >>> average_precision_by_label([0, 1, 1], [1])(np.array([[0, 2]])).tolist()
        [0.25]
    """
    have, want = np.asarray(gallery), np.asarray(queries)

    def measure(found: Ids) -> npt.NDArray[np.float64]:
        hits = have[found] == want[:, None]
        ranks = np.arange(1, found.shape[1] + 1)
        return (hits * np.cumsum(hits, axis=1) / ranks).mean(axis=1)

    return measure


def exact_neighbors(
    gallery: npt.NDArray[np.generic],
    queries: Vectors,
    k: int,
    dim: int,
    facts: IndexFacts,
) -> Ids:
    """Return the rows nearest to each query at one dim, best first; memory is flat in the gallery.

    Args:
        gallery: `(rows, width)`, memory-mapped ones too.
        queries: `(queries, width)`.
        k: How many.
        dim: How many coordinates are compared.
        facts: Whose metric compares them.

    Shapes:
        Returns int64 `(queries, k)`.

    Examples:
        >>> from keras_mrl_serving import FunnelSchedule
        >>> facts = IndexFacts(FunnelSchedule((4,), (), 1))
        >>> gallery = np.eye(4, dtype=np.float32)
        >>> exact_neighbors(gallery, gallery[1:3], 1, 4, facts).tolist()
        [[1], [2]]
    """
    faiss = import_faiss()
    is_distance = facts.metric == "l2"
    kind = faiss.METRIC_L2 if is_distance else faiss.METRIC_INNER_PRODUCT
    prefixes = facts.prefix(queries, dim)
    found = np.empty((len(queries), 0), np.int64)
    scores = np.empty((len(queries), 0), np.float32)
    for start in range(0, len(gallery), _ROWS_AT_ONCE):
        some = check_embeddings(gallery[start : start + _ROWS_AT_ONCE], "gallery", dim)
        far, rows = faiss.knn(prefixes, facts.prefix(some, dim), min(k, len(some)), metric=kind)
        found = np.concatenate([found, rows + start], axis=1)
        scores = np.concatenate([scores, -far if is_distance else far], axis=1)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        found = np.take_along_axis(found, best, axis=1)
        scores = np.take_along_axis(scores, best, axis=1)
    return found
