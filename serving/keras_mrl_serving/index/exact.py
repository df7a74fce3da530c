"""The funnel in NumPy: exact at every stage, for small galleries and as the truth for others.

The gallery is held in column blocks, one per stage. A later stage reads only the columns the stage
before it did not, and adds their products to the dot products it has: the dot product of a prefix
is a running sum. The squared lengths of all prefixes are computed once, at the start.
"""

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
from .storage import IndexWriter, SavedFiles, open_saved

ENGINE = "exact"


class ExactIndex(LocalIndex):
    """A gallery that is searched exhaustively at every stage; made by `build` or `open`.

    Args:
        facts: Schedule, metric and encoder.
        ids: Ids of the gallery rows, int64 `(rows,)`.
        blocks: The columns each stage adds, float32 `(rows, columns)`.
        squares: Squared lengths of the prefix of each stage, float32 `(stages, rows)`.

    Attributes:
        numbers_at_once: Scores, or numbers reranked, that a search holds in memory at once;
            queries that need more are searched in chunks.

    Examples:
        >>> gallery = np.eye(4, dtype=np.float32) + 0.1
        >>> index = ExactIndex.build(gallery, FunnelSchedule(dims=(2, 4), shortlists=(3,), k=1))
        >>> index.search(gallery[:2]).ids.tolist()
        [[0], [1]]
        >>> index.search(gallery[:2], among=[2, 3]).ids.tolist()
        [[2], [2]]
    """

    numbers_at_once = 1 << 24  # 64 MiB of float32

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
            encoder_fingerprint: Fingerprint of the model that embedded the gallery, from its
                manifest; a client then refuses to search by embeddings of another model.

        Shapes:
            embeddings: `(rows, width)`. ids: `(rows,)`.

        Raises:
            ValueError: If shapes do not fit, a value is not finite, ids repeat, or the gallery
                has fewer rows than the funnel returns.
        """
        facts = IndexFacts(schedule, metric, encoder_fingerprint)
        gallery = check_embeddings(embeddings, "gallery", facts.width)
        row_ids = check_ids(ids, len(gallery))
        facts.check_rows(len(gallery))
        blocks = _column_blocks(gallery, schedule.dims)
        squares = np.cumsum([np.square(block).sum(axis=1) for block in blocks], axis=0)
        return cls(facts, row_ids, blocks, squares.astype(np.float32))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index to a folder; an index that is there stays whole until this one is.

        Raises:
            OSError: If it cannot be written there.
        """
        arrays: dict[str, npt.NDArray[Any]] = {"ids": self.ids, "squares": self.squares}
        arrays |= {_block_name(stage): block for stage, block in enumerate(self.blocks)}
        with IndexWriter(path) as writer:
            for name, array in arrays.items():
                writer.array(name, array.shape, array.dtype)[:] = array
            writer.commit({"engine": ENGINE, **self.facts.to_json()})

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = True) -> ExactIndex:
        """Return the index in a folder, memory-mapped.

        Args:
            path: The folder.
            verify: Compare every byte with the digests written beside it.

        Raises:
            FileNotFoundError: If no index is there.
            DamagedIndexError: If it is not as it was written.
            ManifestError: If another engine wrote it.
        """
        return open_saved(path, cls.from_saved, verify=verify)

    @classmethod
    def from_saved(cls, saved: SavedFiles) -> ExactIndex:
        """Return the index of files that were checked."""
        saved.check_engine(ENGINE)
        facts = IndexFacts.from_json(saved.card)
        ids = np.array(saved.array("ids", (None,), np.int64))
        widths = np.diff(facts.schedule.dims, prepend=0).tolist()
        blocks = [
            saved.array(_block_name(stage), (len(ids), width), np.float32)
            for stage, width in enumerate(widths)
        ]
        squares = saved.array("squares", (len(widths), len(ids)), np.float32)
        return cls(facts, ids, blocks, np.array(squares))

    def _nearest(self, queries: Vectors, k: int, rows: Ids | None) -> Neighbors:
        step = max(1, self.numbers_at_once // self._numbers_per_query(k, rows))
        chunks = [queries[start : start + step] for start in range(0, len(queries), step)]
        answers = [self._search_chunk(chunk, k, rows) for chunk in chunks]
        return Neighbors(*(np.concatenate(column) for column in zip(*answers, strict=True)))

    def _numbers_per_query(self, k: int, among: Ids | None) -> int:
        """Return the most numbers a step holds: all scores, or the columns of a shortlist."""
        num_rows = len(self) if among is None else len(among)
        sizes = (k, *(min(size, num_rows) for size in self.schedule.shortlists))
        widths = (block.shape[1] for block in self.blocks)
        gathered = (size * width for size, width in zip(sizes, widths, strict=True))
        return max(num_rows, k * self.width, *gathered)

    def _search_chunk(self, queries: Vectors, k: int, among: Ids | None) -> tuple[Ids, Vectors]:
        query_blocks = _column_blocks(queries, self.schedule.dims)
        # All queries share one list of rows until the first stage has chosen a shortlist for each.
        rows: Ids | slice = slice(None) if among is None else among
        dots = query_blocks[0] @ self.blocks[0][rows].T
        for stage, size in enumerate((*self.schedule.shortlists, k)):
            if stage:
                dots = dots + np.einsum("qsd,qd->qs", self.blocks[stage][rows], query_blocks[stage])
            scores = self._scores(dots, stage, rows)
            best = _best_columns(scores, size, self.ids[rows])
            if isinstance(rows, slice):
                rows = best
            else:
                rows = np.take_along_axis(np.broadcast_to(rows, scores.shape), best, axis=1)
            dots = np.take_along_axis(dots, best, axis=1)
        return self._ordered(query_blocks, np.asarray(rows))

    def _ordered(self, query_blocks: Sequence[Vectors], rows: Ids) -> tuple[Ids, Vectors]:
        """Return the ids of each query's rows, best first, and their scores."""
        # Summed again, row by row: BLAS gives equal rows products that differ in the last bit.
        parts = [
            np.einsum("qsd,qd->qs", block[rows], query_block)
            for block, query_block in zip(self.blocks, query_blocks, strict=True)
        ]
        scores = self._scores(np.sum(parts, axis=0, dtype=np.float32), -1, rows)
        squares = np.sum([np.square(block).sum(axis=1) for block in query_blocks], axis=0)
        scores = self._with_query_term(scores, squares.astype(np.float32))
        order = best_first(self.ids[rows], scores)
        rows, scores = np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1)
        return self.ids[rows], scores

    def _scores(self, dots: Vectors, stage: int, rows: Ids | slice) -> Vectors:
        """Return scores that rank one query's rows: without the term of the query alone."""
        if self.metric == "cosine":
            return dots * self._inverse_lengths[stage][rows]
        if self.metric == "l2":
            return 2 * dots - self.squares[stage][rows]
        return dots

    def _with_query_term(self, scores: Vectors, squares: Vectors) -> Vectors:
        if self.metric == "cosine":
            return scores * inverse_length(squares)[:, None]
        if self.metric == "l2":
            return np.minimum(scores - squares[:, None], 0)
        return scores


def _best_columns(scores: Vectors, size: int, ids: Ids) -> npt.NDArray[np.int64]:
    """Return the columns of each row's `size` best scores, best first, equal ones by id."""
    ids = np.broadcast_to(ids, scores.shape)
    if size >= scores.shape[1]:
        return best_first(ids, scores)
    best = np.argpartition(-scores, size - 1, axis=1)[:, :size]
    last = np.take_along_axis(scores, best, axis=1).min(axis=1, keepdims=True)
    for row in np.flatnonzero((scores >= last).sum(axis=1) > size):  # a tie across the edge
        tied = np.flatnonzero(scores[row] >= last[row])
        best[row] = tied[np.lexsort((ids[row, tied], -scores[row, tied]))[:size]]
    best_ids = np.take_along_axis(ids, best, axis=1)
    order = best_first(best_ids, np.take_along_axis(scores, best, axis=1))
    return np.take_along_axis(best, order, axis=1)


def _column_blocks(vectors: Vectors, dims: tuple[int, ...]) -> list[Vectors]:
    starts = (0, *dims[:-1])
    # Always a copy: the caller may write to the array that was given.
    return [np.array(vectors[:, a:b], order="C") for a, b in zip(starts, dims, strict=True)]


def _block_name(stage: int) -> str:
    return f"columns_{stage}"
