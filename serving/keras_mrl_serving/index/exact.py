"""The funnel in NumPy: exact at every stage, for small galleries and as the truth for others."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..embeddings import inverse_length
from ..funnel import FunnelSchedule
from ..results import Neighbors
from .base import Ids, IndexFacts, LocalIndex, Vectors, best_first, check_embeddings, check_ids
from .storage import Saved, Writing, check_engine, opened

ENGINE = "exact"

_MAX_SCORES = 1 << 24  # scores, or numbers reranked, held at once: 64 MiB of float32


class ExactIndex(LocalIndex):
    """A gallery held in column blocks, searched through a funnel.

    A later stage reads only the columns the stage before it did not, and adds their products to
    the scores it has: the dot product of a prefix is a running sum. The lengths of every prefix
    are counted once, at the start. Made by `build` or `open`.

    Args:
        facts: Schedule, metric and encoder.
        ids: Of the gallery rows, int64 `(rows,)`.
        blocks: The columns each stage adds, float32 `(rows, columns)`.
        squares: Squared lengths of the prefix of each stage, float32 `(stages, rows)`.

    Examples:
        >>> gallery = np.eye(4, dtype=np.float32) + 0.1
        >>> index = ExactIndex.build(gallery, FunnelSchedule(dims=(2, 4), shortlists=(3,), k=1))
        >>> index.search(gallery[:2]).ids.tolist()
        [[0], [1]]
        >>> index.search(gallery[:2], among=[2, 3]).ids.tolist()
        [[2], [2]]
    """

    def __init__(
        self, facts: IndexFacts, ids: Ids, blocks: Sequence[Vectors], squares: Vectors
    ) -> None:
        super().__init__(facts, ids)
        self.blocks = blocks
        self.squares = squares
        self._inverse_lengths = inverse_length(squares)

    @classmethod
    def build(
        cls,
        embeddings: npt.ArrayLike,
        schedule: FunnelSchedule,
        ids: npt.ArrayLike | None = None,
        metric: str = "cosine",
        encoder_fingerprint: str | None = None,
    ) -> ExactIndex:
        """Return the index of a gallery.

        Args:
            embeddings: The gallery, raw or scaled; copied.
            schedule: The funnel; its last dim must not exceed the width.
            ids: One int64 >= 0 per row, all different; None numbers the rows from 0.
            metric: How embeddings are compared: "cosine", "dot" or "l2"; see `IndexFacts`.
            encoder_fingerprint: Of the model the gallery was embedded with, as its manifest
                gives it; a client then refuses to search by embeddings of another.

        Shapes:
            embeddings: `(rows, width)`. ids: `(rows,)`.

        Raises:
            ValueError: If shapes do not fit, a value is not finite, ids repeat, or the gallery
                has fewer rows than the funnel returns.
        """
        facts = IndexFacts(schedule, metric, encoder_fingerprint)
        gallery = check_embeddings(embeddings, "gallery", facts.width)
        checked = check_ids(ids, len(gallery))
        facts.check_rows(len(gallery))
        blocks = _column_blocks(gallery, schedule.dims)
        squares = np.cumsum([np.square(block).sum(axis=1) for block in blocks], axis=0)
        return cls(facts, checked, blocks, squares.astype(np.float32))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index to a folder; one that is there stays whole until this one is.

        Raises:
            OSError: If it cannot be written there.
        """
        with Writing(path) as files:
            arrays: dict[str, npt.NDArray[Any]] = {"ids": self.ids, "squares": self.squares}
            arrays |= {f"columns_{stage}": block for stage, block in enumerate(self.blocks)}
            for name, array in arrays.items():
                files.array(name, array.shape, array.dtype)[:] = array
            files.commit({"engine": ENGINE, **self.facts.to_json()})

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = True) -> ExactIndex:
        """Return the index a folder holds, memory-mapped.

        Args:
            path: The folder.
            verify: Compare every byte with the digests written beside it.

        Raises:
            FileNotFoundError: If no index is there.
            DamagedIndexError: If it is not as it was written.
            ManifestError: If another engine wrote it.
        """
        return opened(path, cls.of, verify=verify)

    @classmethod
    def of(cls, saved: Saved) -> ExactIndex:
        """Return the index of files that were read."""
        check_engine(saved, ENGINE)
        facts = IndexFacts.from_json(saved.card)
        blocks = [saved.array(f"columns_{stage}") for stage in range(len(facts.schedule.dims))]
        return cls(facts, np.array(saved.array("ids")), blocks, np.array(saved.array("squares")))

    def _nearest(self, queries: Vectors, k: int, rows: Ids | None) -> Neighbors:
        step = max(1, _MAX_SCORES // self._numbers_per_query(k, rows))
        parts = [self._some(queries[i : i + step], k, rows) for i in range(0, len(queries), step)]
        return Neighbors(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def _numbers_per_query(self, k: int, among: Ids | None) -> int:
        """How many the largest step holds: all scores, or the columns a shortlist is read at."""
        rows = len(self) if among is None else len(among)
        read = (k, *(min(size, rows) for size in self.schedule.shortlists))
        widths = (block.shape[1] for block in self.blocks)
        return max(rows, k * self.width, *(a * b for a, b in zip(read, widths, strict=True)))

    def _some(self, queries: Vectors, k: int, among: Ids | None) -> tuple[Ids, Vectors]:
        blocks = _column_blocks(queries, self.schedule.dims)
        first = self.blocks[0] if among is None else self.blocks[0][among]
        dots = blocks[0] @ first.T
        rows: Ids | slice = slice(None) if among is None else among  # one list for all queries
        for stage, keep in enumerate((*self.schedule.shortlists, k)):
            if stage:
                dots = dots + np.einsum("qsd,qd->qs", self.blocks[stage][rows], blocks[stage])
            scores = self._scores(dots, stage, rows)
            best = _best(scores, keep, self.ids[rows])
            if isinstance(rows, slice):
                rows = best
            else:
                rows = np.take_along_axis(np.broadcast_to(rows, scores.shape), best, axis=1)
            dots = np.take_along_axis(dots, best, axis=1)
        return self._ordered(blocks, np.asarray(rows))

    def _ordered(self, blocks: Sequence[Vectors], rows: Ids) -> tuple[Ids, Vectors]:
        """Return the ids of each query's rows, best first, and their scores."""
        # Summed again, row by row: BLAS gives equal rows products that differ in the last bit.
        parts = [
            np.einsum("qsd,qd->qs", g[rows], q) for g, q in zip(self.blocks, blocks, strict=True)
        ]
        squares = np.sum([np.square(block).sum(axis=1) for block in blocks], axis=0)
        scores = self._scores(np.sum(parts, axis=0, dtype=np.float32), -1, rows)
        scores = self._against(scores, squares.astype(np.float32))
        order = best_first(self.ids[rows], scores)
        rows, scores = np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1)
        return self.ids[rows], scores

    def _scores(self, dots: Vectors, stage: int, rows: Ids | slice) -> Vectors:
        """What ranks rows as the metric does, and lacks only what is of the query alone."""
        if self.metric == "cosine":
            return dots * self._inverse_lengths[stage][rows]
        if self.metric == "l2":
            return 2 * dots - self.squares[stage][rows]
        return dots

    def _against(self, scores: Vectors, squares: Vectors) -> Vectors:
        """Add what is of the query alone."""
        if self.metric == "cosine":
            return scores * inverse_length(squares)[:, None]
        if self.metric == "l2":
            return np.minimum(scores - squares[:, None], 0)
        return scores


def _best(scores: Vectors, keep: int, ids: Ids) -> npt.NDArray[np.int64]:
    """Columns of the `keep` best scores of each row, best first, equal ones in order of id."""
    ids = np.broadcast_to(ids, scores.shape)
    if keep >= scores.shape[1]:
        return best_first(ids, scores)
    found = np.argpartition(-scores, keep - 1, axis=1)[:, :keep]
    last = np.take_along_axis(scores, found, axis=1).min(axis=1, keepdims=True)
    for row in np.flatnonzero((scores >= last).sum(axis=1) > keep):  # a tie across the edge
        tied = np.flatnonzero(scores[row] >= last[row])
        found[row] = tied[np.lexsort((ids[row, tied], -scores[row, tied]))[:keep]]
    kept = np.take_along_axis(ids, found, axis=1), np.take_along_axis(scores, found, axis=1)
    return np.take_along_axis(found, best_first(*kept), axis=1)


def _column_blocks(vectors: Vectors, dims: tuple[int, ...]) -> list[Vectors]:
    starts = (0, *dims[:-1])
    # Always a copy: the caller may write to the array that was given.
    return [np.array(vectors[:, a:b], order="C") for a, b in zip(starts, dims, strict=True)]
