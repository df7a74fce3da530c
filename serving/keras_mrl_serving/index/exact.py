"""The funnel in NumPy: exact at every stage, for small galleries and as the truth for others."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..embeddings import inverse_length
from ..funnel import FunnelSchedule
from ..inputs import as_float32
from ..results import Neighbors

_MAX_SCORES = 1 << 24  # scores, or numbers reranked, held at once: 64 MiB of float32


class ExactIndex:
    """A gallery held in column blocks, searched by cosine through a funnel.

    A later stage reads only the columns the stage before it did not, and adds their products to
    the scores it has: the dot product of a prefix is a running sum. The lengths of every prefix
    are counted once, at the start.

    Args:
        embeddings: The gallery, raw or scaled; copied.
        schedule: The funnel; its last dim must not exceed the width.
        ids: One int64 >= 0 per row; None numbers the rows from 0.
        encoder_fingerprint: Of the model the gallery was embedded with, as its manifest gives
            it; a client then refuses to search by embeddings of another. None: nobody checks.

    Shapes:
        embeddings: `(rows, width)`. ids: `(rows,)`.

    Raises:
        ValueError: If shapes do not fit, a value is not finite, or the gallery has fewer rows
            than the funnel returns.

    Examples:
        >>> gallery = np.eye(4, dtype=np.float32) + 0.1
        >>> index = ExactIndex(gallery, FunnelSchedule(dims=(2, 4), shortlists=(3,), k=1))
        >>> index.search(gallery[:2]).ids.tolist()
        [[0], [1]]
    """

    def __init__(
        self,
        embeddings: npt.ArrayLike,
        schedule: FunnelSchedule,
        ids: npt.ArrayLike | None = None,
        encoder_fingerprint: str | None = None,
    ) -> None:
        self.encoder_fingerprint = encoder_fingerprint
        gallery = _check_embeddings(embeddings, "gallery", schedule.dims[-1])
        self.schedule = schedule
        self.ids = _check_ids(ids, len(gallery))
        if len(gallery) < schedule.k:
            raise ValueError(
                "A gallery needs at least as many rows as the funnel returns. "
                f"Received: {len(gallery)} rows for k={schedule.k}. Lower k, or add rows."
            )
        self._blocks = _column_blocks(gallery, schedule.dims)
        squares = np.cumsum([np.square(block).sum(axis=1) for block in self._blocks], axis=0)
        self._inverse_lengths = inverse_length(squares.astype(np.float32))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def width(self) -> int:
        """The width queries need."""
        return self.schedule.dims[-1]

    def search(self, queries: npt.ArrayLike) -> Neighbors:
        """Return the `k` nearest gallery rows of each query, ties in order of id.

        Args:
            queries: Embeddings `(batch, width)` or wider, raw or scaled.

        Raises:
            ValueError: If their shape does not fit or a value is not finite.
        """
        vectors = _check_embeddings(queries, "queries", self.width)
        step = max(1, _MAX_SCORES // self._numbers_per_query())
        parts = [self._search(vectors[i : i + step]) for i in range(0, len(vectors), step)]
        if not parts:
            empty = np.empty((0, self.schedule.k))
            return Neighbors(empty.astype(np.int64), empty.astype(np.float32))
        return Neighbors(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def _numbers_per_query(self) -> int:
        """How many the largest step holds: all scores, or the columns a shortlist is read at."""
        shortlists = (min(size, len(self)) for size in self.schedule.shortlists)
        widths = (block.shape[1] for block in self._blocks[1:])
        return max(len(self), *(a * b for a, b in zip(shortlists, widths, strict=True)), 1)

    def _search(self, queries: npt.NDArray[np.float32]) -> tuple[Any, Any]:
        blocks = _column_blocks(queries, self.schedule.dims)
        keeps = (*self.schedule.shortlists, self.schedule.k)
        dots = blocks[0] @ self._blocks[0].T
        rows: npt.NDArray[np.int64] | None = None
        for stage, keep in enumerate(keeps):
            if rows is not None:
                dots = dots + np.einsum("qsd,qd->qs", self._blocks[stage][rows], blocks[stage])
            lengths = self._inverse_lengths[stage]
            scores = dots * (lengths if rows is None else lengths[rows])
            best = _best(scores, keep, self.ids if rows is None else self.ids[rows])
            rows = best if rows is None else np.take_along_axis(rows, best, axis=1)
            dots = np.take_along_axis(dots, best, axis=1)
            scores = np.take_along_axis(scores, best, axis=1)
        squares = np.sum([np.square(block).sum(axis=1) for block in blocks], axis=0)
        return self.ids[rows], scores * inverse_length(squares.astype(np.float32))[:, None]


def _best(
    scores: npt.NDArray[np.float32], keep: int, ids: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Columns of the `keep` best scores of each row, best first, equal ones in order of id."""
    ids = np.broadcast_to(ids, scores.shape)
    if keep >= scores.shape[1]:
        return np.lexsort((ids, -scores), axis=1)
    found = np.argpartition(-scores, keep - 1, axis=1)[:, :keep]
    last = np.take_along_axis(scores, found, axis=1).min(axis=1, keepdims=True)
    for row in np.flatnonzero((scores >= last).sum(axis=1) > keep):  # a tie across the edge
        tied = np.flatnonzero(scores[row] >= last[row])
        found[row] = tied[np.lexsort((ids[row, tied], -scores[row, tied]))[:keep]]
    kept = np.take_along_axis(scores, found, axis=1), np.take_along_axis(ids, found, axis=1)
    return np.take_along_axis(found, np.lexsort((kept[1], -kept[0]), axis=1), axis=1)


def _column_blocks(
    vectors: npt.NDArray[np.float32], dims: tuple[int, ...]
) -> list[npt.NDArray[np.float32]]:
    starts = (0, *dims[:-1])
    # Always a copy: the caller may write to the array that was given.
    return [np.array(vectors[:, a:b], order="C") for a, b in zip(starts, dims, strict=True)]


def _check_embeddings(values: npt.ArrayLike, name: str, width: int) -> npt.NDArray[np.float32]:
    vectors = as_float32(f"The {name}", values)
    if vectors.ndim != 2 or vectors.shape[1] < width:
        raise ValueError(
            f"The {name} must be (rows, width) with a width of at least {width}. "
            f"Received: shape {vectors.shape}. "
            "Embed them at the funnel's last dim, one row each."
        )
    with np.errstate(over="ignore"):
        squares = np.einsum("rd,rd->r", vectors, vectors)
    if not np.isfinite(squares).all():
        raise ValueError(
            f"The {name} must be finite, and so must the squares of their lengths in float32. "
            "Received: NaN, infinity, or rows longer than 1e19. "
            "Look for failed rows where the embeddings were made."
        )
    return vectors


def _check_ids(ids: npt.ArrayLike | None, rows: int) -> npt.NDArray[np.int64]:
    if ids is None:
        return np.arange(rows, dtype=np.int64)
    checked = np.asarray(ids)
    if (
        checked.shape != (rows,)
        or checked.dtype.kind not in "iu"
        or (checked < 0).any()
        or (checked > np.iinfo(np.int64).max).any()
    ):
        raise ValueError(
            "ids must be one int64 >= 0 per gallery row. "
            f"Received: {checked.dtype} ids of shape {checked.shape} for {rows} rows. "
            "Leave ids out to number the rows from 0."
        )
    return checked.astype(np.int64)
