"""How good an answer is, query by query: what a planner is to reach."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from .arrays import Ids

Measure = Callable[[Ids], npt.NDArray[np.float64]]  # rows found (queries, k) -> (queries,) in 0..1


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
