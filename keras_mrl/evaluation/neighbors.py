"""Which of the nearest rows of a gallery share the query's label, by exact search."""

from __future__ import annotations

from typing import Any

import numpy as np

from keras_mrl_serving.embeddings import truncate

from .._features import Array, check_features, check_labels_of

_QUERIES = 256  # at a time: their scores are one matrix (queries, gallery)


def check_gallery(rows: int, k: int = 10) -> None:
    """Raise a `ValueError` where a gallery has fewer rows than neighbours are looked for."""
    if rows < k:
        raise ValueError(
            f"A gallery must hold at least the {k} nearest that are looked for. "
            f"Received: {rows} rows. Give more rows."
        )


def nearest_hits(
    gallery: Any, gallery_labels: Any, queries: Any, query_labels: Any, dim: int, k: int = 10
) -> Array:
    """Return whether each of the k nearest by angle, best first, has the query's label.

    Args:
        gallery: Embeddings `(rows, width)`, at least k.
        gallery_labels: `(rows,)`.
        queries: Embeddings `(queries, width)`, none of them in the gallery.
        query_labels: `(queries,)`.
        dim: Both sides are cut to it, then scaled to unit length.
        k: Number of neighbours.

    Shapes:
        Returns booleans `(queries, k)`.

    Raises:
        ValueError: If embeddings and labels do not fit, or the gallery has fewer than k rows.

    Examples:
        >>> from keras_mrl.evaluation.neighbors import nearest_hits
        >>> gallery, queries = [[0.0, 1.0], [1.0, 0.0], [1.0, 0.1]], [[2.0, 0.0]]
        >>> nearest_hits(gallery, [7, 7, 8], queries, [7], dim=2, k=2).tolist()
        [[True, False]]
    """
    rows, asked = check_features(gallery, dim), check_features(queries, dim)
    labels, wanted = check_labels_of(rows, gallery_labels), check_labels_of(asked, query_labels)
    check_gallery(len(rows), k)
    columns = truncate(rows, dim).T
    hits = np.empty((len(asked), k), bool)
    for start in range(0, len(asked), _QUERIES):
        part = slice(start, start + _QUERIES)
        scores = truncate(asked[part], dim) @ columns
        nearest = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        order = np.argsort(-np.take_along_axis(scores, nearest, axis=1), axis=1, kind="stable")
        nearest = np.take_along_axis(nearest, order, axis=1)
        hits[part] = labels[nearest] == wanted[part, None]
    return hits
