"""A gallery inside the graph: the funnel of an `ExactIndex`, over rows that are variables."""

from __future__ import annotations

import functools
import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from keras_mrl_serving import contract
from keras_mrl_serving.embeddings import inverse_length
from keras_mrl_serving.index import ExactIndex
from keras_mrl_serving.index.base import rounding

from .graph import Tensors, Traceable, lengths


class IndexGraph:
    """The searches of an `ExactIndex`, as a TensorFlow graph.

    A variable per block of columns, so that a stage reads only the columns it adds: slicing one
    wide variable would copy it at every query. Rows lie in order of id, which breaks ties.

    Args:
        index: The gallery; if it is memory-mapped, only the variables hold its rows in memory.
        dims: Dims to search alone, besides the stages of the funnel; none wider than the gallery.
        rows_at_once: How many rows are copied into a variable at once.
    """

    def __init__(
        self, index: ExactIndex, dims: Sequence[int] = (), rows_at_once: int = 16_384
    ) -> None:
        self._facts = index.facts
        if index.schedule.rescores:
            raise ValueError(
                "A gallery in the graph is exact at every stage, so no dim stands twice. "
                f"Received: dims={index.schedule.dims}. Build it with dims="
                f"{index.schedule.dims[:-1]}."
            )
        self._dims = sorted({*dims, *index.schedule.dims})
        order = np.argsort(index.ids)
        self._num_rows = len(order)
        self._ids = tf.Variable(index.ids[order], trainable=False, name="ids")
        self._blocks = []  # by dim: the columns that it adds to the dim before
        self._scales = []  # by dim: one over the lengths of rows, or their squares, or nothing
        self._longest = []  # by dim: the length of the longest row
        squares = np.zeros(self._num_rows, np.float32)
        for start, stop in zip((0, *self._dims), self._dims, strict=False):
            block, added_squares = _block(index, start, stop, order, rows_at_once)
            squares = squares + added_squares
            self._blocks.append(block)
            self._longest.append(float(np.sqrt(squares.max())))
            if self._facts.metric != "dot":
                scales = squares if self._facts.metric == "l2" else inverse_length(squares)
                self._scales.append(tf.Variable(scales, trainable=False, name=f"scales_{stop}"))

    def functions(self) -> dict[str, Traceable]:
        """Return `search`, and `search_<m>` for every dim, to be traced."""
        functions: dict[str, Traceable] = {
            contract.SEARCH: (self.search, _embedding(self._facts.width))
        }
        for dim in self._dims:
            search = functools.partial(self.search_at, dim=dim)
            functions[contract.search(dim)] = (search, _embedding(dim))
        return functions

    def variables(self) -> list[Any]:
        """Return the variables that a SavedModel must hold."""
        return [self._ids, *self._blocks, *self._scales]

    def search(self, embedding: Any) -> Tensors:
        """Return the neighbours that the funnel finds.

        Args:
            embedding: `(batch, width)` or wider, raw or scaled.

        Returns:
            `ids` int64 and `scores` float32, `(batch, k)`.
        """
        schedule = self._facts.schedule
        return self._search(embedding, schedule.dims, schedule.shortlists)

    def search_at(self, embedding: Any, dim: int) -> Tensors:
        """Return the neighbours at one dim, exactly."""
        return self._search(embedding, (dim,), ())

    def _search(self, embedding: Any, dims: Sequence[int], shortlists: Sequence[int]) -> Tensors:
        queries = self._split(embedding, dims[-1])
        dots, rows, next_block = None, None, 0
        for dim, size in zip(dims, (*shortlists, self._facts.schedule.k), strict=True):
            stop = self._dims.index(dim) + 1
            for block in range(next_block, stop):
                products = self._products(queries[block], block, rows)
                dots = products if dots is None else dots + products
            dots, rows = self._best(dots, rows, queries[:stop], size)
            next_block = stop
        return self._answer(queries, rows)

    def _split(self, embedding: Any, width: int) -> list[Any]:
        """Return the columns of queries by block, up to `width`."""
        stops = self._dims[: self._dims.index(width) + 1]
        return [embedding[:, a:b] for a, b in zip((0, *stops), stops, strict=False)]

    def _products(self, query: Any, block: int, rows: Any) -> Any:
        if rows is None:
            return tf.matmul(query, self._blocks[block], transpose_b=True)
        return tf.einsum("qc,qnc->qn", query, _gather(self._blocks[block], rows))

    def _best(self, dots: Any, rows: Any, queries: Sequence[Any], size: int) -> tuple[Any, Any]:
        """Return products and rows of the best `size` rows of each query, in order of id.

        Where the edge between the best and the others may run through equal rows, scores are
        summed again row by row: a matrix product gives equal rows values that differ in the last
        bit, and values that depend on the other queries. `top_k` then takes the lower of equal
        columns, which has the lower id.
        """
        ranking = self._ranking(dots, rows, len(queries) - 1)
        num_columns = self._num_rows if rows is None else rows.shape[1]
        if size < num_columns:
            top, best = tf.math.top_k(ranking, size + 1)
            is_close = top[:, size - 1] - top[:, size] <= self._slack(queries)
            tied = tf.where(is_close)  # number of each query, (n, 1)
            some_rows = None if rows is None else tf.gather_nd(rows, tied)
            scores = self._row_by_row([tf.gather_nd(q, tied) for q in queries], some_rows)
            _, settled = tf.math.top_k(scores, size)
            best = tf.tensor_scatter_nd_update(best[:, :size], tied, settled)
            best = tf.sort(best, axis=1)
            dots = tf.gather(dots, best, batch_dims=1)
        else:
            best = tf.tile(tf.range(num_columns)[None], [tf.shape(dots)[0], 1])
        return dots, best if rows is None else tf.gather(rows, best, batch_dims=1)

    def _slack(self, queries: Sequence[Any]) -> Any:
        """Return how far apart equal rows may be in `_ranking`."""
        last, metric = len(queries) - 1, self._facts.metric
        lengths_ = tf.sqrt(tf.add_n([tf.reduce_sum(tf.square(q), -1) for q in queries]))
        longest = 1.0 if metric == "cosine" else self._longest[last]
        return rounding(metric, self._dims[last], lengths_, longest)

    def _row_by_row(self, queries: Sequence[Any], rows: Any) -> Any:
        """Return the scores of rows, each summed by itself: equal rows have equal scores."""
        if rows is not None:
            products = [
                tf.reduce_sum(_gather(block, rows) * query[:, None], axis=-1)
                for query, block in zip(queries, self._blocks, strict=False)
            ]
            return self._scores(queries, tf.add_n(products), rows)

        def score_all(query: Any) -> Any:
            parts = [part[None] for part in query]
            products = [
                tf.reduce_sum(block.read_value() * part, axis=-1)[None]
                for part, block in zip(parts, self._blocks, strict=False)
            ]
            return self._scores(parts, tf.add_n(products), None)[0]

        # A query after another: each takes the memory of the gallery once more.
        return tf.map_fn(score_all, tuple(queries), fn_output_signature=tf.float32)

    def _scores(self, queries: Sequence[Any], products: Any, rows: Any) -> Any:
        """Return the scores that products make."""
        scores = self._ranking(products, rows, len(queries) - 1)
        if self._facts.metric == "cosine":
            return scores / lengths(tf.concat(queries, axis=-1))
        if self._facts.metric == "l2":
            squares = tf.add_n([tf.reduce_sum(tf.square(q), -1, keepdims=True) for q in queries])
            return tf.minimum(scores - squares, 0)
        return scores

    def _ranking(self, dots: Any, rows: Any, last_block: int) -> Any:
        """Return scores that rank rows as the metric does, without the terms of the query alone."""
        if self._facts.metric == "dot":
            return dots
        scales = self._scales[last_block]
        scales = scales if rows is None else _gather(scales, rows)
        return 2 * dots - scales if self._facts.metric == "l2" else dots * scales

    def _answer(self, queries: Sequence[Any], rows: Any) -> Tensors:
        scores, order = tf.math.top_k(self._row_by_row(queries, rows), self._facts.schedule.k)
        rows = tf.gather(rows, order, batch_dims=1)
        return {"ids": _gather(self._ids, rows), "scores": scores}


def _embedding(width: int) -> dict[str, Any]:
    return {"embedding": tf.TensorSpec([None, width], tf.float32, "embedding")}


def _gather(variable: Any, rows: Any) -> Any:
    """Gather rows of a variable's value, not of the variable.

    After one gather from the variable itself, TensorFlow copies it whole at every later read:
    `search_<m>` would take the memory of its block once more.
    """
    return tf.gather(variable.read_value(), rows)


def _block(
    index: ExactIndex, start: int, stop: int, order: npt.NDArray[Any], rows_at_once: int
) -> tuple[Any, npt.NDArray[np.float32]]:
    """Return columns of the gallery as a variable, and the squared lengths of its rows."""
    block = columns(index, start, stop)
    shape = (len(order), stop - start)
    variable = tf.Variable(tf.zeros(shape), trainable=False, name=f"columns_{start}_{stop}")
    squares = np.empty(len(order), np.float32)
    for first in range(0, len(order), rows_at_once):
        part = slice(first, first + rows_at_once)
        rows = np.ascontiguousarray(block[order[part]])
        # In place: assigning to a slice would copy the whole variable first.
        variable.scatter_nd_update(np.arange(first, first + len(rows))[:, None], rows)
        squares[part] = np.einsum("rc,rc->r", rows, rows)
        forget(block)
    return variable, squares


def columns(index: ExactIndex, start: int, stop: int) -> npt.NDArray[np.float32]:
    """Return columns of the gallery that lie in one of its blocks, as a view."""
    stops = index.schedule.dims
    number = next(number for number, end in enumerate(stops) if stop <= end)
    offset = (0, *stops)[number]
    block: npt.NDArray[np.float32] = index.blocks[number]
    return block[:, start - offset : stop - offset]


def forget(array: npt.NDArray[Any]) -> None:
    """Release the memory of a read-only mapped array: its values are read from the file again.

    An array that maps no file, or one that may be written to, is left as it is.

    Args:
        array: Any array, of any shape.
    """
    if not isinstance(array, np.memmap) or array.mode != "r" or not hasattr(mmap, "MADV_DONTNEED"):
        return
    holder: Any = array
    while holder is not None and not isinstance(holder, mmap.mmap):
        holder = getattr(holder, "base", None)
    if holder is not None:
        holder.madvise(mmap.MADV_DONTNEED)
