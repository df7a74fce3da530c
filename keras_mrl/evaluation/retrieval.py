"""How many of the nearest rows share the query's label, and how early.

Two definitions go by the name mAP@10 and both are here: `precision_at_k` and the paper's own.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def precision_at_k(hits: npt.ArrayLike) -> float:
    """Return the mean share of the k nearest whose label matches (p10 at k = 10).

    Args:
        hits: Whether each of the k nearest, best first, has the query's label.

    Shapes:
        hits: `(queries, k)`.

    Raises:
        ValueError: If `hits` is not two-dimensional or holds no query.

    Examples:
        >>> precision_at_k([[True, False], [True, True]])
        0.75
    """
    return float(_check_hits(hits).mean())


def mean_average_precision_at_k(hits: npt.ArrayLike) -> float:
    """Return the mean average precision as the paper's code counts it (map10 at k = 10).

    Args:
        hits: Whether each of the k nearest, best first, has the query's label. The query itself
            must not be in the gallery.

    Shapes:
        hits: `(queries, k)`.

    Formula:
        AP = 1/k * sum over hits at rank i <= k of precision@i; divided by k, not by the hits

    Raises:
        ValueError: If `hits` is not two-dimensional or holds no query.

    Reference:
        Kusupati et al., Matryoshka Representation Learning, section 4.3 and its public code.

    Examples:
        >>> mean_average_precision_at_k([[True, False, True]])  # (1/1 + 2/3) / 3
        0.5555555555555555
    """
    checked = _check_hits(hits)
    ranks = np.arange(1, checked.shape[1] + 1)
    precision = np.cumsum(checked, axis=1) / ranks
    return float((precision * checked).sum(axis=1).mean() / len(ranks))


def _check_hits(hits: npt.ArrayLike) -> npt.NDArray[np.bool]:
    checked = np.asarray(hits)
    if checked.ndim != 2 or not checked.size or not np.isin(checked, (0, 1)).all():
        raise ValueError(
            "hits must be booleans (queries, k) with at least one query. "
            f"Received: {checked.dtype} of shape {checked.shape}. "
            "Compare labels: gallery_labels[neighbors.ids] == query_labels[:, None]."
        )
    return checked.astype(bool)
