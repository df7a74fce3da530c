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
from ..funnel import FunnelSchedule, check_schedule
from ..results import Neighbors
from .base import (
    Ids,
    LocalIndex,
    Vectors,
    best_first,
    check_embeddings,
    rounding,
)
from .facts import IndexFacts, other_schedule
from .filters import Filter
from .ids import RowIds, check_ids
from .storage import IndexWriter, SavedFiles, open_saved, read_ids, write_ids

ENGINE = "exact"
_GATHERED = 0.3  # share of the rows up to which those of a filter are copied to be multiplied


class ExactIndex(LocalIndex):
    """A gallery that is searched exhaustively at every stage; made by `build` or `open`.

    Args:
        facts: Schedule, metric and encoder.
        ids: Ids of the gallery rows, int64 or strings.
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
        self, facts: IndexFacts, ids: RowIds | Ids, blocks: Sequence[Vectors], squares: Vectors
    ) -> None:
        super().__init__(facts, ids)
        self.blocks = blocks
        self.squares = squares
        self._inverse_lengths = inverse_length(squares)
        self._longest = np.sqrt(squares.max(axis=1))  # by stage

    @classmethod
    def build(
        cls,
        embeddings: npt.ArrayLike,
        schedule: FunnelSchedule,
        ids: npt.ArrayLike | None = None,
        metric: str = "cosine",
        encoder_fingerprint: str | None = None,
        prompt: str | None = None,
    ) -> ExactIndex:
        """Return the index of a gallery.

        Args:
            embeddings: The gallery, raw or scaled; copied.
            schedule: The funnel; its last dim must not exceed the width.
            ids: One int64 >= 0 or one string per row, all different; None numbers the rows from 0.
            metric: How embeddings are compared: "cosine", "dot" or "l2"; see `IndexFacts`.
            encoder_fingerprint: Fingerprint of the model that embedded the gallery, from its
                manifest; a client then refuses to search by embeddings of another model.
            prompt: The prompt that stood before each text of the gallery, as text; None: none.

        Shapes:
            embeddings: `(rows, width)`. ids: `(rows,)`.

        Raises:
            ValueError: If shapes do not fit, a value is not finite, ids repeat, or the gallery
                has fewer rows than the funnel returns.
        """
        gallery = check_embeddings(embeddings, "gallery", check_schedule(schedule).dims[-1])
        row_ids = RowIds.of(check_ids(ids, len(gallery)))
        facts = IndexFacts(schedule, metric, encoder_fingerprint, prompt, row_ids.names is not None)
        facts.check_rows(len(gallery))
        return cls._of_rows(facts, row_ids, gallery)

    @classmethod
    def _of_rows(cls, facts: IndexFacts, ids: RowIds, gallery: Vectors) -> ExactIndex:
        blocks = _column_blocks(gallery, facts.schedule.dims)
        squares = np.cumsum([np.square(block).sum(axis=1) for block in blocks], axis=0)
        return cls(facts, ids, blocks, squares.astype(np.float32))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index to a folder; an index that is there stays whole until this one is.

        Raises:
            OSError: If it cannot be written there.
        """
        arrays: dict[str, npt.NDArray[Any]] = {"squares": self.squares}
        arrays |= {_block_name(stage): block for stage, block in enumerate(self.blocks)}
        with IndexWriter.at(path) as writer:
            for name, array in arrays.items():
                writer.array(name, array.shape, array.dtype)[:] = array
            write_ids(writer, self.row_ids)
            writer.commit({"engine": ENGINE, **self.facts.to_json()})

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        schedule: FunnelSchedule | None = None,
        *,
        verify: bool = True,
    ) -> ExactIndex:
        """Return the index in a folder, memory-mapped.

        Args:
            path: The folder.
            schedule: Another funnel than it was built with, over any dims up to its width. With
                other dims the rows are copied to memory.
            verify: Compare every byte with the digests written beside it.

        Raises:
            ValueError: If the gallery is narrower than the schedule, or has too few rows for it.
            FileNotFoundError: If no index is there.
            DamagedIndexError: If it is not as it was written.
            ManifestError: If another engine wrote it.
        """
        return open_saved(path, lambda saved: cls.from_saved(saved, schedule), verify=verify)

    @classmethod
    def from_saved(cls, saved: SavedFiles, schedule: FunnelSchedule | None = None) -> ExactIndex:
        """Return the index of files that were checked; see `open`."""
        saved.check_engine(ENGINE)
        facts = IndexFacts.from_json(saved.card)
        ids = read_ids(saved, facts)
        widths = np.diff(facts.schedule.dims, prepend=0).tolist()
        blocks = [
            saved.array(_block_name(stage), (len(ids), width), np.float32)
            for stage, width in enumerate(widths)
        ]
        squares = saved.array("squares", (len(widths), len(ids)), np.float32)
        opened = other_schedule(facts, schedule, len(ids))
        if opened.schedule.dims == facts.schedule.dims:
            return cls(opened, ids, blocks, np.array(squares))
        gallery = check_embeddings(np.concatenate(blocks, axis=1), "gallery", opened.width)
        return cls._of_rows(opened, ids, gallery)

    def _vectors(self, rows: Ids) -> Vectors:
        return np.concatenate([block[rows] for block in self.blocks], axis=1)

    def _nearest(self, queries: Vectors, k: int, only: Filter | None) -> Neighbors:
        rows = None if only is None else only.rows
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
        num_rows = len(self) if num_rows > _GATHERED * len(self) else num_rows
        return max(num_rows, k * self.width, *gathered)

    def _search_chunk(self, queries: Vectors, k: int, among: Ids | None) -> tuple[Ids, Vectors]:
        query_blocks = _column_blocks(queries, self.schedule.dims)
        # All queries share one list of rows until the first stage has chosen a shortlist for each.
        rows: Ids | slice = slice(None) if among is None else among
        if among is not None and len(among) > _GATHERED * len(self):
            # A product with all rows is less than a copy of most of them.
            dots = (query_blocks[0] @ self.blocks[0].T)[:, among]
        else:
            dots = query_blocks[0] @ self.blocks[0][rows].T
        for stage, size in enumerate((*self.schedule.shortlists, k)):
            if stage:
                dots = dots + np.einsum("qsd,qd->qs", self.blocks[stage][rows], query_blocks[stage])
            best = self._best_columns(dots, rows, size, query_blocks[: stage + 1])
            if isinstance(rows, slice):
                rows = best
            else:
                rows = np.take_along_axis(np.broadcast_to(rows, dots.shape), best, axis=1)
            dots = np.take_along_axis(dots, best, axis=1)
        return self._ordered(query_blocks, np.asarray(rows))

    def _best_columns(
        self, dots: Vectors, rows: Ids | slice, size: int, query_blocks: Sequence[Vectors]
    ) -> npt.NDArray[np.int64]:
        """Return the columns of each query's `size` best rows, in no order; equal ones by id."""
        if size >= dots.shape[1]:
            return np.broadcast_to(np.arange(dots.shape[1]), dots.shape)
        stage = len(query_blocks) - 1
        scores = self._scores(dots, stage, rows)
        best = np.argpartition(-scores, size - 1, axis=1)[:, :size]
        edge = np.take_along_axis(scores, best, axis=1).min(axis=1, keepdims=True)
        lengths = np.sqrt(_squares(query_blocks))[:, None]
        longest = 1.0 if self.metric == "cosine" else self._longest[stage]
        slack = rounding(self.metric, self.schedule.dims[stage], lengths, longest)
        for query in np.flatnonzero((scores >= edge - slack).sum(axis=1) > size):
            offsets = scores[query] - edge[query]
            better = np.flatnonzero(offsets > slack[query])
            near = np.flatnonzero(np.abs(offsets) <= slack[query])
            all_rows = np.arange(len(self)) if isinstance(rows, slice) else rows
            near_rows = np.broadcast_to(all_rows, dots.shape)[query, near]
            order = self._order([block[query] for block in query_blocks], near_rows)
            best[query] = np.concatenate([better, near[order[: size - len(better)]]])
        return best

    def _order(self, query_blocks: Sequence[Vectors], rows: Ids) -> npt.NDArray[np.int64]:
        """Return the order of some rows for one query: best first, equal ones by id."""
        step = max(1, self.numbers_at_once // self.width)
        parts = [rows[start : start + step] for start in range(0, len(rows), step)]
        blocks = [block[None] for block in query_blocks]
        scores = [self._row_scores(blocks, part[None])[0] for part in parts]
        return best_first(self.ids[rows][None], np.concatenate(scores)[None])[0]

    def _row_scores(self, query_blocks: Sequence[Vectors], rows: Ids) -> Vectors:
        """Return the scores of each query's rows, each summed by itself: equal for equal rows."""
        parts = [
            np.einsum("qsd,qd->qs", block[rows], query_block)
            for block, query_block in zip(self.blocks, query_blocks, strict=False)
        ]
        scores = self._scores(np.sum(parts, axis=0, dtype=np.float32), len(parts) - 1, rows)
        return self._with_query_term(scores, _squares(query_blocks))

    def _ordered(self, query_blocks: Sequence[Vectors], rows: Ids) -> tuple[Ids, Vectors]:
        """Return the ids of each query's rows, best first, and their scores."""
        scores = self._row_scores(query_blocks, rows)
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


def _squares(query_blocks: Sequence[Vectors]) -> Vectors:
    """Return the squared lengths of queries up to the last of some blocks."""
    squares = np.sum([np.square(block).sum(axis=1) for block in query_blocks], axis=0)
    return np.asarray(squares, np.float32)


def _column_blocks(vectors: Vectors, dims: tuple[int, ...]) -> list[Vectors]:
    starts = (0, *dims[:-1])
    # Always a copy: the caller may write to the array that was given.
    return [np.array(vectors[:, a:b], order="C") for a, b in zip(starts, dims, strict=True)]


def _block_name(stage: int) -> str:
    return f"columns_{stage}"
