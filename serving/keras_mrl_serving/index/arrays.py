"""The arrays an index takes and returns: their types, their checks, their order."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from ..inputs import as_float32

Vectors = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


def check_embeddings(values: npt.ArrayLike, name: str, width: int) -> Vectors:
    """Return embeddings as float32 `(rows, width or wider)`.

    Raises:
        ValueError: If their shape does not fit, or they or their squared lengths are not finite.

    Examples:
        >>> check_embeddings([[1, 2]], "queries", 2).dtype
        dtype('float32')
    """
    vectors = as_float32(f"The {name}", values)
    if vectors.ndim != 2 or vectors.shape[1] < width:
        raise ValueError(
            f"The {name} must be (rows, width) with a width of at least {width}. "
            f"Received: shape {vectors.shape}. "
            "Embed them at the funnel's last dim, one row each."
        )
    if not math.isfinite(np.vdot(vectors, vectors)) and not _have_lengths(vectors):
        raise ValueError(
            f"The {name} must be finite, and so must the squares of their lengths in float32. "
            "Received: NaN, infinity, or rows longer than 1e19. "
            "Look for failed rows where the embeddings were made."
        )
    return vectors


def _have_lengths(vectors: Vectors) -> bool:
    with np.errstate(over="ignore"):
        squares = np.einsum("rd,rd->r", vectors, vectors)
    return bool(np.isfinite(squares).all())


def as_gallery(embeddings: npt.ArrayLike, width: int) -> npt.NDArray[Any]:
    """Return a gallery as an array of the right shape; of its values nothing is read.

    So a memory-mapped one may be larger than the memory: `check_embeddings` takes it in parts.

    Raises:
        ValueError: If it is no array of real numbers `(rows, width or wider)`.

    Examples:
        >>> as_gallery(np.zeros((5, 3), np.float64), 2).dtype
        dtype('float64')
    """
    if isinstance(embeddings, np.ndarray) and embeddings.ndim == 2:
        if embeddings.dtype.kind in "fiu" and embeddings.shape[1] >= width:
            return embeddings
    return check_embeddings(embeddings, "gallery", width)


def check_ids(ids: npt.ArrayLike | None, rows: int) -> Ids:
    """Return one id per gallery row; None numbers the rows from 0.

    Raises:
        ValueError: If they are not one int64 >= 0 per row, or two are the same.

    Examples:
        >>> check_ids(None, 3).tolist()
        [0, 1, 2]
    """
    if ids is None:
        return np.arange(rows, dtype=np.int64)
    checked = np.asarray(ids)
    if checked.shape != (rows,) or not _are_ids(checked):
        raise ValueError(
            "ids must be one int64 >= 0 per gallery row. "
            f"Received: {checked.dtype} ids of shape {checked.shape} for {rows} rows. "
            "Give one per row; an index built without any numbers its rows from 0."
        )
    repeated = rows - len(np.unique(checked))
    if repeated:
        raise ValueError(
            "ids must differ from row to row. "
            f"Received: {repeated} that repeat another. Give every row its own."
        )
    return checked.astype(np.int64)


def check_among(among: npt.ArrayLike) -> Ids:
    """Return the ids a filter lets through, sorted, each once.

    Raises:
        ValueError: If they are not int64 >= 0 in one dimension.

    Examples:
        >>> check_among([7, 2, 7]).tolist()
        [2, 7]
    """
    checked = np.asarray(among)
    if checked.ndim != 1 or not (_are_ids(checked) or not checked.size):
        raise ValueError(
            "among must be int64 ids >= 0 in one dimension. "
            f"Received: {checked.dtype} of shape {checked.shape}. "
            "Give the ids that may be returned, or leave it out for all."
        )
    return np.unique(checked.astype(np.int64))


def _are_ids(values: npt.NDArray[Any]) -> bool:
    return bool(
        values.dtype.kind in "iu"
        and not (values < 0).any()
        and not (values > np.iinfo(np.int64).max).any()
    )


def best_first(ids: Ids, scores: Vectors) -> npt.NDArray[np.int64]:
    """Return the order of each row's columns: best score first, equal ones by id.

    Examples:
        >>> best_first(np.array([[9, 4, 7]]), np.float32([[0.5, 0.5, 0.9]])).tolist()
        [[2, 1, 0]]
    """
    return np.lexsort((ids, -scores), axis=1)
