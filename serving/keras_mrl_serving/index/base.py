"""What every index shares: the protocol, the checks of its arrays, the order of its answers.

`ExactIndex` and `FaissIndex` hold their gallery in this process and are `LocalIndex`es;
`QdrantIndex` asks a server, and shares only the facts and the checks.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..embeddings import check_finite
from ..funnel import FunnelSchedule
from ..inputs import as_float32
from ..results import Neighbors
from .facts import IndexFacts
from .facts import Vectors as Vectors
from .filters import Filter, as_filters
from .ids import Ids as Ids
from .ids import RowIds, check_among, check_some_ids

Progress = Callable[[int, int], object]  # rows done, all rows


class Index(Protocol):
    """A gallery that can be searched by embeddings of its width."""

    @property
    def schedule(self) -> FunnelSchedule:
        """The funnel that is searched."""

    @property
    def metric(self) -> str:
        """How embeddings are compared: "cosine", "dot" or "l2"."""

    @property
    def encoder_fingerprint(self) -> str | None:
        """Fingerprint of the model that embedded the gallery; None if it was not given."""

    @property
    def prompt(self) -> str | None:
        """The prompt that stood before each text of the gallery; None without one."""

    @property
    def width(self) -> int:
        """Dim the queries are embedded at."""

    def __len__(self) -> int:
        """Return the number of gallery rows."""

    def search(
        self,
        queries: npt.ArrayLike,
        k: int | None = None,
        among: npt.ArrayLike | None = None,
        filter: Any = None,
    ) -> Neighbors:
        """Return the nearest gallery rows of each query.

        Args:
            queries: Embeddings `(batch, width)` or wider, raw or scaled.
            k: Number of neighbours, at most the last shortlist of the funnel; None for its `k`.
            among: The only ids that may be returned, `(n,)`; ids that are not in the gallery are
                passed over. None: all.
            filter: What `prepare_filter` returned, or a list with one per query; None: all rows.
        """

    def prepare_filter(self, only: Any) -> Any:
        """Return a filter for any number of searches: of ids, or what else the index takes."""


class IndexBase:
    """The properties of `Index`, read from `facts`.

    Examples:
        >>> index = IndexBase()
        >>> index.facts = IndexFacts(FunnelSchedule((8, 64), (20,), 5), "l2")
        >>> index.metric, index.width
        ('l2', 64)
    """

    facts: IndexFacts

    @property
    def schedule(self) -> FunnelSchedule:
        """The funnel that is searched."""
        return self.facts.schedule

    @property
    def metric(self) -> str:
        """How embeddings are compared: "cosine", "dot" or "l2"."""
        return self.facts.metric

    @property
    def encoder_fingerprint(self) -> str | None:
        """Fingerprint of the model that embedded the gallery; None if it was not given."""
        return self.facts.encoder_fingerprint

    @property
    def prompt(self) -> str | None:
        """The prompt that stood before each text of the gallery; None without one."""
        return self.facts.prompt

    @property
    def width(self) -> int:
        """Dim the queries are embedded at."""
        return self.facts.width


class LocalIndex(IndexBase, ABC):
    """A gallery in this process, immutable once it is built.

    Args:
        facts: Schedule, metric and encoder.
        ids: Ids of the gallery rows, int64 or strings.

    Attributes:
        ids: What the engine calls the rows, int64 `(rows,)`: their ids, or where those are strings
            their places in the order of all.

    Examples:
        >>> from keras_mrl_serving.index import ExactIndex
        >>> issubclass(ExactIndex, LocalIndex)
        True
    """

    def __init__(self, facts: IndexFacts, ids: RowIds | Ids) -> None:
        self.facts = facts
        self.row_ids = ids if isinstance(ids, RowIds) else RowIds(ids)
        self.ids = self.row_ids.numbers
        self._rows_by_id: Ids | None = None  # sorted when ids are looked up for the first time

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        dims = " -> ".join(map(str, self.schedule.dims))
        return (
            f"{type(self).__name__}({len(self)} rows, {dims}, k={self.schedule.k}, {self.metric})"
        )

    def search(
        self,
        queries: npt.ArrayLike,
        k: int | None = None,
        among: npt.ArrayLike | None = None,
        filter: Filter | Sequence[Filter] | None = None,
    ) -> Neighbors:
        """Return the nearest gallery rows of each query, best first, ties in order of id.

        Args:
            queries: Embeddings `(batch, width)` or wider, raw or scaled.
            k: Number of neighbours, at most the last shortlist of the funnel; None for its `k`.
            among: The only ids that may be returned, `(n,)`; ids that are not in the gallery are
                passed over, and fewer than `k` give fewer columns. None: all.
            filter: The same, prepared once by `prepare_filter`; or a list, one per query, where
                rows that have fewer than others end in -1 (or empty strings) with scores of -inf.

        Raises:
            ValueError: If queries, k, ids or filters do not fit, or a value is not finite.
        """
        vectors = check_embeddings(queries, "queries", self.facts.width)
        k = self.facts.check_k(k)
        if among is not None and filter is not None:
            raise ValueError(
                "A search is filtered in one way. Received: among and filter. Give one of them."
            )
        filters = as_filters(self, filter, len(vectors))
        if among is not None:
            filters = Filter(self, self._rows_among(among))
        if filters is None or isinstance(filters, Filter):
            neighbors = self._filtered(vectors, k, filters)
        else:
            neighbors = self._filtered_one_by_one(vectors, k, filters)
        if self.row_ids.names is None:
            return neighbors
        return Neighbors(self.row_ids.given(np.asarray(neighbors.ids, np.int64)), neighbors.scores)

    def prepare_filter(self, only: npt.ArrayLike) -> Filter:
        """Return a filter for any number of searches of this index.

        Args:
            only: The ids that may be returned, `(n,)`, those that are not in the gallery passed
                over; or a mask of the rows as they were built, bool `(rows,)`.

        Raises:
            ValueError: If it is neither.

        Examples:
            >>> from keras_mrl_serving.index import ExactIndex
            >>> index = ExactIndex.build(np.eye(3), FunnelSchedule((3,), (), 1), ["a", "b", "c"])
            >>> only = index.prepare_filter(np.array([False, True, True]))
            >>> index.search(np.eye(3)[2:], filter=only).ids.tolist()
            [['c']]
        """
        may_be_mask = not isinstance(only, list | tuple) or isinstance((*only, None)[0], bool)
        mask = np.asarray(only) if may_be_mask else None
        if mask is None or mask.dtype != bool:
            return Filter(self, self._rows_among(only, "only"))
        if mask.shape != (len(self),):
            raise ValueError(
                "A mask has one bool per gallery row. "
                f"Received: shape {mask.shape} for {len(self)} rows. Give ids instead."
            )
        return Filter(self, np.flatnonzero(mask))

    def _filtered(self, queries: Vectors, k: int, only: Filter | None) -> Neighbors:
        k = min(k, len(self.ids) if only is None else len(only))
        if not len(queries) or not k:
            shape = (len(queries), k)
            return Neighbors(np.empty(shape, np.int64), np.empty(shape, np.float32))
        return self._nearest(queries, k, only)

    def _filtered_one_by_one(
        self, queries: Vectors, k: int, filters: Sequence[Filter]
    ) -> Neighbors:
        """Search each query by its own filter; queries of one filter together."""
        k = min(k, max(map(len, filters), default=k))
        shape = (len(queries), k)
        ids, scores = np.full(shape, -1, np.int64), np.full(shape, -np.inf, np.float32)
        rows_by_filter: dict[int, list[int]] = {}
        for row, only in enumerate(filters):
            rows_by_filter.setdefault(id(only), []).append(row)
        for rows in rows_by_filter.values():
            some = self._filtered(queries[rows], k, filters[rows[0]])
            ids[rows, : some.ids.shape[1]] = some.ids
            scores[rows, : some.ids.shape[1]] = some.scores
        return Neighbors(ids, scores)

    def reconstruct(self, ids: npt.ArrayLike) -> Vectors:
        """Return the embeddings of gallery rows, as the index holds them.

        Args:
            ids: Of the rows, `(n,)`.

        Returns:
            float32 `(n, width)`. A `FaissIndex` that compares by cosine holds rows of unit length.

        Raises:
            ValueError: If no row has such an id.

        Examples:
            >>> from keras_mrl_serving.index import ExactIndex
            >>> index = ExactIndex.build([[3, 4], [0, 2]], FunnelSchedule((2,), (), 1), ["a", "b"])
            >>> index.reconstruct(["b"]).tolist()
            [[0.0, 2.0]]
        """
        rule, remedy = "ids must be those of gallery rows, in one dimension.", "Give ids of rows."
        given = check_some_ids(ids, "ids", rule, remedy)
        rows = self._rows_of(self.row_ids.numbers_of(given))
        if (rows < 0).any():
            missing = given[rows < 0]
            raise ValueError(
                f"{rule} Received: {len(missing)} that no row has, such as "
                f"{missing.tolist()[0]!r:.80}. {remedy}"
            )
        return self._vectors(rows)

    @abstractmethod
    def _nearest(self, queries: Vectors, k: int, only: Filter | None) -> Neighbors:
        """Return the `k` nearest of the gallery, or of a filter's rows (at least `k`)."""

    @abstractmethod
    def _vectors(self, rows: Ids) -> Vectors:
        """Return the embeddings of rows at the last dim."""

    def _rows_among(self, ids: npt.ArrayLike, name: str = "among") -> Ids:
        """Return the gallery rows that have these ids, in the gallery's order."""
        given = check_among(ids, name)
        if given.dtype == np.int64 and len(given) == len(self) > 2 and given.max() <= 1:
            raise ValueError(
                "Numbers are ids, and a mask of the rows is of bools. "
                "Received: a 0 or a 1 for every row. Give index.prepare_filter(mask.astype(bool))."
            )
        rows = self._rows_of(self.row_ids.numbers_of(given))
        mask = np.zeros(len(self) + 1, bool)
        mask[rows] = True  # -1 is behind the last
        return np.flatnonzero(mask[:-1])

    @cached_property
    def _are_row_numbers(self) -> bool:
        """Whether the ids are the numbers of the rows."""
        return bool((self.ids == np.arange(len(self.ids))).all())

    def _rows_of(self, numbers: Ids) -> Ids:
        """Return the row of each of these ids, as the engine knows them; -1 where none has it."""
        if self._are_row_numbers:
            return np.where((numbers >= 0) & (numbers < len(self)), numbers, -1)
        if self._rows_by_id is None:
            self._rows_by_id = np.argsort(self.ids)
        places = np.searchsorted(self.ids, numbers, sorter=self._rows_by_id)
        rows = self._rows_by_id[np.minimum(places, len(self) - 1)]
        return np.where(self.ids[rows] == numbers, rows, -1)


def check_embeddings(values: npt.ArrayLike, name: str, width: int) -> Vectors:
    """Return embeddings as float32 `(rows, width or wider)`; errors call them `name`.

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
    check_finite(f"The {name}", vectors)
    return vectors


def as_gallery(embeddings: npt.ArrayLike, width: int) -> npt.NDArray[Any]:
    """Return a gallery as an array of the right shape, without reading its values.

    A memory-mapped gallery may be larger than the memory; `check_embeddings` reads it part by part.

    Raises:
        ValueError: If it is not an array of real numbers `(rows, width or wider)`.

    Examples:
        >>> as_gallery(np.zeros((5, 3), np.float64), 2).dtype
        dtype('float64')
    """
    if isinstance(embeddings, np.ndarray) and embeddings.ndim == 2:
        if embeddings.dtype.kind in "fiu" and embeddings.shape[1] >= width:
            return embeddings
    return check_embeddings(embeddings, "gallery", width)


def best_first(ids: Ids, scores: Vectors) -> npt.NDArray[np.int64]:
    """Return the order of each row's columns: best score first, equal ones by id.

    Examples:
        >>> best_first(np.array([[9, 4, 7]]), np.float32([[0.5, 0.5, 0.9]])).tolist()
        [[2, 1, 0]]
    """
    return np.lexsort((ids, -scores), axis=1)


def rounding(metric: str, dim: int, queries: Any, rows: Any) -> Any:
    """Return how far apart the scores of equal rows may be, for products summed in any order.

    A matrix product gives equal rows scores that differ in the last bits: those at the edge of
    its blocks are summed in another order.

    Args:
        metric: "cosine", "dot" or "l2".
        dim: Number of coordinates that are summed.
        queries: Lengths of the queries.
        rows: Length of the longest row; 1 where rows are scaled.

    Examples:
        >>> float(rounding("dot", 16, queries=1.0, rows=2.0)) < 1e-5
        True
    """
    scale = (queries + rows) ** 2 if metric == "l2" else queries * rows
    return 2.0**-21 * math.sqrt(dim) * scale


Ask = Callable[[slice, int], tuple[Vectors, Ids]]  # of some queries and a count: scores, rows


def lowest_ids_first(
    scores: Vectors, rows: Ids, ids: Ids | None, slack: float, ask: Ask
) -> npt.NDArray[np.int64]:
    """Return all columns of rows but the last; of rows as near as the last, those of lowest id.

    Where the last two columns are as near, the edge between them runs through equal rows, and an
    engine took whichever of them it met first. Such a query is asked again alone, for more rows.

    Args:
        scores: Of each row, in order from the best; higher or lower may be better.
        rows: Row numbers, best first, -1 after the last.
        ids: Ids of all rows; None takes the row numbers.
        slack: How far the scores of equal rows may differ here. From `ask` they may not.
        ask: Returns the scores of so many of the best rows of some queries, and these rows.

    Shapes:
        scores, rows: `(batch, n)`. Returns `(batch, n - 1)`.

    Examples:
        >>> ask = lambda queries, count: (np.float32([[9, 9, 9, 5]]), np.array([[2, 1, 0, 3]]))
        >>> lowest_ids_first(np.float32([[9, 9]]), np.array([[2, 1]]), None, 0.0, ask).tolist()
        [[0]]
    """
    size = rows.shape[1] - 1
    # By Python's floats: a search of one query takes little longer than NumPy to begin.
    if len(rows) == 1 and abs(scores.item(0, size) - scores.item(0, size - 1)) > slack:
        return rows[:, :size]
    best = np.ascontiguousarray(rows[:, :size])
    is_close = np.abs(scores[:, size] - scores[:, size - 1]) <= slack
    for query in np.flatnonzero(is_close & (rows[:, size] >= 0)).tolist():
        count = size
        while True:
            count *= 4
            (some_scores,), (some_rows,) = ask(slice(query, query + 1), count)
            num_rows = np.count_nonzero(some_rows >= 0)
            if num_rows < count or some_scores[-1] != some_scores[size - 1]:
                break
        if num_rows > size:  # or else FAISS returned fewer than before
            some_scores, some_rows = some_scores[:num_rows], some_rows[:num_rows]
            tied = some_rows[some_scores == some_scores[size - 1]]
            better = some_rows[: np.argmax(some_scores == some_scores[size - 1])]
            order = np.argsort(tied if ids is None else ids[tied])
            best[query] = np.concatenate([better, tied[order]])[:size]
    return best
