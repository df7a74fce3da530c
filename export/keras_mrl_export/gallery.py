"""The funnel inside the graph, over a gallery whose rows are variables."""

from __future__ import annotations

import functools
import gc
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from keras_mrl_serving import contract
from keras_mrl_serving._session import SavedModelSession
from keras_mrl_serving.contract import Manifest
from keras_mrl_serving.embeddings import inverse_length
from keras_mrl_serving.index import ExactIndex
from keras_mrl_serving.version import __version__

from .graph import Tensors, describing, lengths, traced
from .parity import QUERIES, check_described, check_searches, columns, forget
from .warmup import write_warmup

_ROWS_AT_ONCE = 16_384  # copied into a variable


class IndexGraph:
    """What `ExactIndex` does, as a TensorFlow graph.

    A variable per block of columns, so that a stage reads only the columns it adds: slicing one
    wide variable would copy it at every query. Rows lie in order of id, by which ties are broken.

    Args:
        index: The gallery; memory-mapped, its rows are held in the variables alone.
        dims: Those that can be searched alone, besides the stages of the funnel; none wider.
    """

    def __init__(self, index: ExactIndex, dims: Sequence[int] = ()) -> None:
        self.facts = index.facts
        self.edges = sorted({*dims, *index.schedule.dims})
        order = np.argsort(index.ids)
        self._rows = len(order)
        self._ids = tf.Variable(index.ids[order], trainable=False, name="ids")
        self._blocks = []
        self._scales = []  # by edge: one over the lengths of rows, or their squares, or nothing
        squares = np.zeros(self._rows, np.float32)
        for start, stop in zip((0, *self.edges), self.edges, strict=False):
            block, added = _block(index, start, stop, order)
            squares = squares + added
            self._blocks.append(block)
            if self.facts.metric != "dot":
                scales = squares if self.facts.metric == "l2" else inverse_length(squares)
                self._scales.append(tf.Variable(scales, trainable=False, name=f"scales_{stop}"))

    def signatures(self) -> dict[str, Any]:
        """Return `search`, and `search_<m>` for every dim."""
        width = self.facts.width
        found = {contract.SEARCH: traced(self.search, _embedding(width))}
        for dim in self.edges:
            at = functools.partial(self.search_at, dim=dim)
            found[contract.search(dim)] = traced(at, _embedding(dim))
        return found

    def variables(self) -> list[Any]:
        """Return what a SavedModel must hold."""
        return [self._ids, *self._blocks, *self._scales]

    def search(self, embedding: Any) -> Tensors:
        """Return the neighbours that the funnel finds.

        Args:
            embedding: `(batch, width)` or wider, raw or scaled.

        Returns:
            `ids` int64 and `scores` float32, `(batch, k)`.
        """
        schedule = self.facts.schedule
        queries = self._columns(embedding, schedule.dims[-1])
        dots, rows, done = None, None, 0
        for dim, size in zip(schedule.dims, (*schedule.shortlists, schedule.k), strict=True):
            stop = self.edges.index(dim) + 1
            for block in range(done, stop):
                more = self._products(queries[block], block, rows)
                dots = more if dots is None else dots + more
            dots, rows = self._best(dots, rows, stop - 1, size)
            done = stop
        return self._answer(queries, rows)

    def search_at(self, embedding: Any, dim: int) -> Tensors:
        """Return the neighbours at one dim, exactly."""
        queries = self._columns(embedding, dim)
        dots = tf.add_n([self._products(query, b, None) for b, query in enumerate(queries)])
        _, rows = self._best(dots, None, len(queries) - 1, self.facts.schedule.k)
        return self._answer(queries, rows)

    def _columns(self, embedding: Any, width: int) -> list[Any]:
        edges = self.edges[: self.edges.index(width) + 1]
        return [embedding[:, a:b] for a, b in zip((0, *edges), edges, strict=False)]

    def _products(self, query: Any, block: int, rows: Any) -> Any:
        if rows is None:
            return tf.matmul(query, self._blocks[block], transpose_b=True)
        return tf.einsum("qc,qnc->qn", query, _rows_of(self._blocks[block], rows))

    def _best(self, dots: Any, rows: Any, edge: int, size: int) -> tuple[Any, Any]:
        """Keep the best rows of each query, in order of id, with their products."""
        best = tf.math.top_k(self._ranking(dots, rows, edge), min(size, self._rows)).indices
        best = tf.sort(best, axis=1)
        kept = best if rows is None else tf.gather(rows, best, batch_dims=1)
        return tf.gather(dots, best, batch_dims=1), kept

    def _ranking(self, dots: Any, rows: Any, edge: int) -> Any:
        """What ranks rows as the metric does, and lacks only what is of the query alone."""
        if self.facts.metric == "dot":
            return dots
        scales = self._scales[edge]
        scales = scales if rows is None else _rows_of(scales, rows)
        return 2 * dots - scales if self.facts.metric == "l2" else dots * scales

    def _answer(self, queries: Sequence[Any], rows: Any) -> Tensors:
        # Summed again, row by row: a matrix product gives equal rows values that differ in the
        # last bit, and values that depend on the other queries.
        products = [
            tf.reduce_sum(_rows_of(block, rows) * query[:, None], axis=-1)
            for query, block in zip(queries, self._blocks, strict=False)
        ]
        scores = self._ranking(tf.add_n(products), rows, len(queries) - 1)
        if self.facts.metric == "cosine":
            scores = scores / lengths(tf.concat(queries, axis=-1))
        elif self.facts.metric == "l2":
            squares = tf.add_n([tf.reduce_sum(tf.square(q), -1, keepdims=True) for q in queries])
            scores = tf.minimum(scores - squares, 0)
        scores, order = tf.math.top_k(scores, self.facts.schedule.k)
        rows = tf.gather(rows, order, batch_dims=1)
        return {"ids": _rows_of(self._ids, rows), "scores": scores}


def _embedding(width: int) -> dict[str, Any]:
    return {"embedding": tf.TensorSpec([None, width], tf.float32, "embedding")}


def _rows_of(variable: Any, rows: Any) -> Any:
    """Gather rows of what is read, not of the variable.

    A variable that was gathered from is copied whole by every later read: `search_<m>` would take
    the memory of its block once more.
    """
    return tf.gather(variable.read_value(), rows)


def _block(index: ExactIndex, start: int, stop: int, order: Any) -> tuple[Any, Any]:
    """Return columns of the gallery as a variable, and the squared lengths of its rows."""
    held = columns(index, start, stop)
    shape = (len(order), stop - start)
    variable = tf.Variable(tf.zeros(shape), trainable=False, name=f"columns_{start}_{stop}")
    squares = np.empty(len(order), np.float32)
    for first in range(0, len(order), _ROWS_AT_ONCE):
        part = slice(first, first + _ROWS_AT_ONCE)
        rows = np.ascontiguousarray(held[order[part]])
        # In place: assigning to a slice would copy the whole variable first.
        variable.scatter_nd_update(np.arange(first, first + len(rows))[:, None], rows)
        squares[part] = np.einsum("rc,rc->r", rows, rows)
        forget(held)
    return variable, squares


# A gallery as a SavedModel: written, described, and compared with the index it is of.


def build_index(index: ExactIndex, name: str, folder: Path) -> None:
    """Write `index` to `folder`.

    Raises:
        ExportError: If what was written answers otherwise.
    """
    manifest = _manifest(index, name)
    _write(index, manifest, folder)
    gc.collect()  # functions hold their variables in cycles, and the rows are loaded once more
    (folder / contract.MANIFEST_FILE).parent.mkdir()
    (folder / contract.MANIFEST_FILE).write_text(manifest.to_json() + "\n")
    _check(folder, manifest, index)


def _write(index: ExactIndex, manifest: Manifest, folder: Path) -> None:
    gallery = IndexGraph(index)
    held = tf.Module()
    held.state = gallery.variables()
    signatures = gallery.signatures()
    signatures[contract.SERVING_DEFAULT] = signatures[contract.SEARCH]
    signatures[contract.DESCRIBE] = describing(manifest)
    tf.saved_model.save(held, str(folder), signatures=signatures)


def _check(folder: Path, manifest: Manifest, index: ExactIndex) -> None:
    rows = np.unique(np.linspace(0, len(index) - 1, QUERIES).astype(np.int64))
    queries = np.concatenate([block[rows] for block in index.blocks], axis=1)
    widths = {contract.SEARCH: index.width, contract.SERVING_DEFAULT: index.width}
    widths |= {contract.search(dim): dim for dim in index.schedule.dims}
    inputs = {name: {"embedding": queries[:, :width]} for name, width in widths.items()}
    with SavedModelSession(folder) as session:

        def run(signature: str, inputs: Mapping[str, Any]) -> dict[str, npt.NDArray[Any]]:
            return session.run(signature, inputs)

        check_searches(run, index, queries, widths)
        check_described(run, manifest)
        write_warmup(folder, session, manifest.name, inputs, (1,))


def _manifest(index: ExactIndex, name: str) -> Manifest:
    schedule = index.schedule
    spec = {"dtype": "float32", "shape": [None, index.width]}
    return Manifest(
        name=name,
        kind="index",
        fingerprint=_fingerprint(index),
        encoder_fingerprint=index.encoder_fingerprint,
        dims=schedule.dims,
        width=index.width,
        inputs={"embedding": spec},
        normalize=False,
        metric=index.metric,
        funnel=schedule.to_json(),
        size=len(index),
        made_with={"keras_mrl": __version__, "tensorflow": tf.__version__},
    )


def _fingerprint(index: ExactIndex) -> str:
    """SHA-256 of the schedule, the metric, the encoder, the ids and every row."""
    digest = hashlib.sha256(json.dumps(index.facts.to_json()).encode())
    arrays: tuple[npt.NDArray[Any], ...] = (index.ids, *index.blocks)
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
        forget(array)
    return digest.hexdigest()
