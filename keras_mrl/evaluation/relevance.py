"""Judgments of relevance (qrels), and what rankings are worth by them, as trec_eval counts."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from .._arrays import Array

Qrels = Mapping[Any, Mapping[Any, float] | Collection[Any]]


class Ids:
    """The ids of one side: which row has which, and the order of the rows by id.

    Args:
        name: Name of the argument, for errors.
        ids: One integer or string a row, each once; None means the numbers of the rows.
        rows: How many rows there are.

    Raises:
        ValueError: If there is not one id per row, ids repeat, or are of several kinds.

    Examples:
        >>> from keras_mrl.evaluation.relevance import Ids
        >>> ids = Ids("corpus_ids", ["d7", "d3"], rows=2)
        >>> ids.row("d3"), ids.row("d9"), ids.order.tolist(), ids.kind
        (1, None, [1, 0], 'strings')
    """

    def __init__(self, name: str, ids: Any, rows: int) -> None:
        self.name = name
        self.kind = "integers"
        self.order: Array | None = None  # None where rows stand in it already
        self.example: Any = 0
        self.rows = rows
        self._row_of: dict[Any, int] | None = None
        if ids is None:
            return
        values = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        kinds = {kind_of(value) for value in values}
        if len(values) == rows and len(kinds) == 1 and kinds <= {"integers", "strings"}:
            order: Sequence[int] = range(rows)
            if not all(a < b for a, b in pairwise(values)):
                order = sorted(order, key=values.__getitem__)
                self.order = np.asarray(order)
            self._row_of = dict(zip(values, range(rows), strict=True))
            self.kind, self.example = kinds.pop(), values[0]
            if len(self._row_of) == rows:
                return
            twice = next(values[a] for a, b in pairwise(order) if values[a] == values[b])
            received = f"{twice!r} more than once"
        else:
            received = f"{len(values)} ids of {', '.join(sorted(kinds))} for {rows} rows"
        raise ValueError(
            f"{name} must hold one integer or one string per row, each once. "
            f"Received: {received}. Leave {name} out if the numbers of the rows are the ids."
        )

    def row(self, id_: Any) -> int | None:
        """Return the row that has an id; None if no row has it."""
        if self._row_of is not None:
            return self._row_of.get(id_)
        return int(id_) if kind_of(id_) == "integers" and 0 <= id_ < self.rows else None


def kind_of(value: Any) -> str:
    """Return "integers", "strings", or the name of another type.

    Examples:
        >>> from keras_mrl.evaluation.relevance import kind_of
        >>> kind_of(np.int64(3)), kind_of("d3"), kind_of(None)
        ('integers', 'strings', 'NoneType')
    """
    if isinstance(value, str):
        return "strings"
    is_integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    return "integers" if is_integer else type(value).__name__


@dataclass(frozen=True, eq=False)
class Relevance:
    """The judgments of the queries that have any.

    Attributes:
        queries: Rows of those queries, `(judged,)`.
        gains: For each the positive grades, best first, as many as the widest cut, `(judged, k)`.
        counts: For each how many documents are relevant, in the corpus or not, `(judged,)`.
    """

    queries: Array
    gains: Array
    counts: Array
    _keys: Array  # query * corpus rows + row of the document, ascending
    _grades: Array  # of each key
    _corpus_rows: int

    def grades(self, ids: Array) -> Array:
        """Return the grades of corpus rows `(judged, k)`; 0 where none was given."""
        keys = ids + np.arange(len(ids))[:, None] * self._corpus_rows
        place = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return np.where(self._keys[place] == keys, self._grades[place], 0)

    def measures(self, ids: Array, cuts: Sequence[int]) -> dict[str, float]:
        """Return the measures of rankings `(judged, k)` of corpus rows at every cut.

        Examples:
            >>> from keras_mrl.evaluation.relevance import Ids, read_qrels
            >>> sides = Ids("query_ids", ["q"], 1), Ids("corpus_ids", None, 3)
            >>> relevance = read_qrels({"q": {0: 2, 2: 1}}, *sides, k=2)
            >>> measures = relevance.measures(np.array([[1, 0]]), cuts=(2,))
            >>> {name: round(value, 3) for name, value in measures.items()}
            {'ndcg@2': 0.48, 'mrr@2': 0.5, 'map@2': 0.25, 'recall@2': 0.5, 'precision@2': 0.5}
        """
        gains = np.maximum(self.grades(ids), 0)
        hits = gains > 0
        ranks = np.arange(1, ids.shape[1] + 1)
        discount = 1 / np.log2(ranks + 1)
        by_rank = {
            "ndcg": np.cumsum(gains * discount, axis=1),
            "mrr": np.maximum.accumulate(hits / ranks, axis=1),
            "map": np.cumsum(hits * np.cumsum(hits, axis=1) / ranks, axis=1),
            "recall": np.cumsum(hits, axis=1),
            "precision": np.cumsum(hits, axis=1) / ranks,
        }
        ideal = np.cumsum(self.gains * discount, axis=1)
        by_rank["ndcg"] /= np.where(ideal > 0, ideal, 1)
        for name in ("map", "recall"):
            by_rank[name] = by_rank[name] / np.maximum(self.counts, 1)[:, None]
        return {
            f"{name}@{cut}": float(values[:, cut - 1].mean())
            for cut in cuts
            for name, values in by_rank.items()
        }


def read_qrels(qrels: Qrels, queries: Ids, corpus: Ids, k: int) -> Relevance:
    """Return judgments in arrays.

    Args:
        qrels: Query id to document id to grade; or to a collection of relevant documents.
        queries: Ids of the queries.
        corpus: Ids of the documents.
        k: The widest cut.

    Raises:
        ValueError: If this is no such mapping, a grade is not finite, no query is judged, or no
            relevant document is in the corpus.

    Warns:
        UserWarning: If some of the relevant documents are not in the corpus.

    Examples:
        >>> from keras_mrl.evaluation.relevance import Ids, read_qrels
        >>> sides = Ids("query_ids", None, 2), Ids("corpus_ids", ["a", "b"], 2)
        >>> read_qrels({1: {"b"}}, *sides, k=1).queries.tolist()
        [1]
    """
    judged: list[int] = []
    all_gains: list[list[float]] = []
    keys: list[int] = []
    grades: list[float] = []
    missing = relevant = 0
    query: Any = None
    document: Any = None
    for query, judgments in _check_mapping(qrels).items():
        row = queries.row(query)
        if row is None or not judgments:
            continue
        of_documents = _grades_of(query, judgments)
        for document, grade in of_documents.items():
            place = corpus.row(document)
            if place is not None:
                keys.append(len(judged) * corpus.rows + place)
                grades.append(grade)
            relevant += grade > 0
            missing += place is None and grade > 0
        judged.append(row)
        all_gains.append(sorted((g for g in of_documents.values() if g > 0), reverse=True))
    if not judged:
        raise _strangers_error("queries", query, queries)
    if relevant == missing:
        if relevant:
            raise _strangers_error("documents", document, corpus)
        raise ValueError(
            "qrels must name a relevant document, one of a grade above 0. "
            f"Received: no such grade for any of {len(judged)} queries. "
            "Give for example {'q1': {'d7': 1}}."
        )
    if missing:
        warnings.warn(
            f"The corpus holds {relevant - missing} of the {relevant} relevant documents that "
            "qrels names. The others count as not retrieved, as in trec_eval. Leave them out of "
            "qrels to judge on this corpus alone.",
            UserWarning,
            stacklevel=3,
        )
    gains = np.zeros((len(judged), k))
    for index, of_query in enumerate(all_gains):
        gains[index, : len(of_query)] = of_query[:k]
    order = np.argsort(keys)
    return Relevance(
        queries=np.asarray(judged),
        gains=gains,
        counts=np.asarray([len(of_query) for of_query in all_gains]),
        _keys=np.asarray(keys, np.int64)[order],
        _grades=np.asarray(grades, np.float64)[order],
        _corpus_rows=corpus.rows,
    )


def _check_mapping(qrels: Any) -> Qrels:
    if not isinstance(qrels, Mapping):
        raise _qrels_error(f"a {type(qrels).__name__}")
    return qrels


def _grades_of(query: Any, judgments: Any) -> dict[Any, float]:
    """Document id to grade, of one query."""
    if isinstance(judgments, Mapping):
        grades = dict(judgments)
    elif isinstance(judgments, Collection) and not isinstance(judgments, (str, bytes)):
        grades = dict.fromkeys(judgments, 1)
    else:
        raise _qrels_error(f"{judgments!r:.100} for query {query!r:.100}")
    for document, grade in grades.items():
        try:
            is_number = math.isfinite(grade)
        except TypeError:
            is_number = False
        if not is_number:
            raise _qrels_error(
                f"the grade {grade!r:.100} for query {query!r:.100} and document {document!r:.100}"
            )
    return {document: float(grade) for document, grade in grades.items()}


def _qrels_error(received: str) -> ValueError:
    return ValueError(
        "qrels must map the id of a query to the grades of documents, finite numbers by their ids, "
        f"or to a set of relevant ids. Received: {received}. "
        "Give for example {'q1': {'d7': 2, 'd9': 0}} or {'q1': {'d7'}}."
    )


def _strangers_error(side: str, id_: Any, ids: Ids) -> ValueError:
    """None of the ids in qrels is one of this side: most often 7 here is "7" there."""
    return ValueError(
        f"qrels must name {side} by the ids in {ids.name}, at least one with a judgment. "
        f"Received: ids as {id_!r:.100} in qrels ({kind_of(id_)}), as {ids.example!r:.100} in "
        f"{ids.name} ({ids.kind}), none in both. Give {ids.name}, of the same kind as in qrels."
    )
