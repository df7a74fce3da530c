"""Galleries, and in float64 the neighbours that a search of them must return."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from keras_mrl_serving.funnel import FunnelSchedule
from keras_mrl_serving.index import ExactIndex, FaissIndex, FirstStage
from keras_mrl_serving.results import Neighbors

Array = npt.NDArray[Any]
Refuses = Callable[[type[Exception], str], AbstractContextManager[None]]

METRICS = ("cosine", "dot", "l2")
FLAT = FirstStage("Flat", "")
ENGINES: dict[str, Callable[..., ExactIndex | FaissIndex]] = {
    "exact": ExactIndex.build,
    "faiss": partial(FaissIndex.build, first_stage=FLAT),
}

NEAR = 3e-6  # float32 scores of unit vectors differ by less from those of float64
SHORTEST = 1e-6  # length below which a vector counts as zero


def drawn(seed: int, rows: int, width: int) -> Array:
    """Vectors of every length, one in eight of them zero up to some prefix."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(rows, width)) * 10 ** rng.uniform(-2, 2, size=(rows, 1))
    zeros = rng.integers(0, width + 1, size=rows) * (rng.random(rows) < 0.125)
    vectors[np.arange(width) < zeros[:, None]] = 0
    return vectors.astype(np.float32)


def clusters(seed: int, rows: int, width: int, *, decay: float = 0.95) -> Array:
    """Vectors as a Matryoshka model makes them: in clusters, the first coordinates the largest."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(20, width))
    vectors = centres[rng.integers(0, 20, rows)] + 0.7 * rng.normal(size=(rows, width))
    return (vectors * decay ** np.arange(width)).astype(np.float32)


def lengths(vectors: Array, dim: int) -> Array:
    return np.asarray(np.linalg.norm(vectors[:, :dim].astype(np.float64), axis=1))


def true_scores(queries: Array, gallery: Array, dim: int, metric: str) -> Array:
    q, g = (vectors[:, :dim].astype(np.float64) for vectors in (queries, gallery))
    if metric == "l2":
        return -np.square(q[:, None] - g).sum(axis=2)
    dots: Array = q @ g.T
    if metric == "dot":
        return dots
    floors = [np.maximum(lengths(vectors, dim), SHORTEST) for vectors in (queries, gallery)]
    return dots / np.multiply.outer(*floors)


def slack(queries: Array, gallery: Array, dim: int, metric: str) -> Array:
    """Bounds on the rounding error of float32 scores: it grows with the sums of squares."""
    q, g = lengths(queries, dim), lengths(gallery, dim)
    if metric == "cosine":
        return np.full((len(q), len(g)), NEAR)
    scale = np.multiply.outer(q, g) if metric == "dot" else np.add.outer(q, g) ** 2
    return NEAR * scale + 1e-30


def funnel_ids(
    query: Array,
    gallery: Array,
    schedule: FunnelSchedule,
    ids: Array,
    metric: str = "cosine",
    *,
    by_id: bool = True,
) -> Array | None:
    """The ids a funnel must return, best first; None where a near-tie decides.

    `by_id`: The index breaks exact ties (of zero vectors) across the edge of a shortlist by id.
    """
    rows = np.arange(len(gallery))
    for dim, keep in zip(schedule.dims, (*schedule.shortlists, schedule.k), strict=True):
        scores = true_scores(query[None], gallery[rows], dim, metric)[0]
        slacks = slack(query[None], gallery[rows], dim, metric)[0]
        exact = (scores == 0) & (by_id and metric != "l2")
        order = np.lexsort((ids[rows], -scores))
        rows, scores, slacks, exact = rows[order], scores[order], slacks[order], exact[order]
        near = [
            a - b < c + d and not (e and f)
            for (a, b), (c, d), (e, f) in zip(
                pairwise(scores), pairwise(slacks), pairwise(exact), strict=True
            )
        ]
        if any(near[keep - 1 : keep]):
            return None
        rows = rows[:keep]
    return None if any(near[: schedule.k - 1]) else ids[rows]


class Search(NamedTuple):
    queries: Array
    gallery: Array
    schedule: FunnelSchedule
    ids: Array
    metric: str

    def expected_ids(self, query: Array, *, by_id: bool = True) -> Array | None:
        return funnel_ids(query, self.gallery, self.schedule, self.ids, self.metric, by_id=by_id)

    def true_scores(self) -> Array:
        return true_scores(self.queries, self.gallery, self.schedule.dims[-1], self.metric)

    def slack(self) -> Array:
        return slack(self.queries, self.gallery, self.schedule.dims[-1], self.metric)

    def rows_of(self, ids: Array) -> Array:
        rows = np.argsort(self.ids)[np.searchsorted(np.sort(self.ids), ids)]
        np.testing.assert_array_equal(self.ids[rows], ids)
        return np.asarray(rows)


@st.composite
def schedules(draw: st.DrawFn, width: int, rows: int) -> FunnelSchedule:
    dims = sorted(draw(st.sets(st.integers(1, width), min_size=1, max_size=4)))
    k = draw(st.integers(1, rows))
    sizes = [draw(st.integers(k, rows + 3)) for _ in dims[1:]]
    return FunnelSchedule(tuple(dims), tuple(sorted(sizes, reverse=True)), k)


@st.composite
def searches(draw: st.DrawFn, most_queries: int = 6) -> Search:
    rows, queries, width = (draw(st.integers(1, most)) for most in (40, most_queries, 24))
    seed = draw(st.integers(0, 2**32))
    ids = np.random.default_rng(seed).permutation(rows * 10)[:rows] + draw(
        st.sampled_from([0, 2**63 - 1 - 400])
    )
    schedule, metric = draw(schedules(width, rows)), draw(st.sampled_from(METRICS))
    return Search(drawn(seed, queries, width), drawn(seed + 1, rows, width), schedule, ids, metric)


def assert_scored(result: Neighbors, search: Search) -> Array:
    """The ids are different ones of the gallery, with their own scores, best first: their rows."""
    assert [type(result.ids), type(result.scores)] == [np.ndarray, np.ndarray]
    assert [result.ids.dtype, result.scores.dtype] == [np.int64, np.float32]
    assert result.ids.shape == result.scores.shape
    rows = search.rows_of(result.ids)
    assert all(len(set(row)) == len(row) for row in rows.tolist())
    off = np.abs(result.scores - np.take_along_axis(search.true_scores(), rows, 1))
    assert (off <= np.take_along_axis(search.slack(), rows, 1)).all()
    assert (result.scores[:, :-1] >= result.scores[:, 1:]).all()
    return rows


def assert_ties_by_id(result: Neighbors) -> None:
    tied = result.scores[:, :-1] == result.scores[:, 1:]
    assert (result.ids[:, :-1] < result.ids[:, 1:])[tied].all()


class TiedSearch(NamedTuple):
    """A search of signs, whose scores float32 holds exactly at dims 4, 16 and 64: most of them tie.

    A row of it is one of a few kinds, and its prefixes are those of even fewer.
    """

    queries: Array
    gallery: Array
    schedule: FunnelSchedule
    ids: Array
    metric: str

    @classmethod
    def drawn(cls, seed: int, num_queries: int) -> TiedSearch:
        rng = np.random.default_rng(seed)
        rows = int(rng.integers(5, 200))
        kinds = rng.choice([-1.0, 1.0], size=(int(rng.integers(1, 30)), 64))
        dims = ((64,), (4, 64), (4, 16, 64))[seed % 3]
        sizes = np.sort(rng.integers(1, rows + 1, size=len(dims)))[::-1].tolist()
        return cls(
            queries=rng.choice([-1.0, 1.0], size=(num_queries, 64)),
            gallery=kinds[rng.integers(0, len(kinds), rows)],
            schedule=FunnelSchedule(dims, tuple(sizes[:-1]), sizes[-1]),
            ids=rng.permutation(5 * rows)[:rows],
            metric=str(rng.choice(METRICS)),
        )

    def expected_ids(self) -> Array:
        """The ids of the funnel whose every cut leaves out the worst, of equal ones the highest."""
        sizes = (*self.schedule.shortlists, self.schedule.k)
        expected = []
        for query in self.queries:
            rows = np.arange(len(self.gallery))
            for dim, size in zip(self.schedule.dims, sizes, strict=True):
                scores = self.gallery[rows, :dim] @ query[:dim]
                rows = rows[np.lexsort((self.ids[rows], -scores))[:size]]
            expected.append(self.ids[rows])
        return np.array(expected)


def assert_lowest_of_copies(result: Neighbors, gallery: Array, ids: Array) -> None:
    """Of rows that are copies of each other, those of the lowest ids were returned, in order."""
    _, kinds = np.unique(gallery, axis=0, return_inverse=True)
    kind_of = dict(zip(ids.tolist(), kinds.ravel().tolist(), strict=True))
    copies: dict[int, list[int]] = {}
    for id_ in np.sort(ids).tolist():
        copies.setdefault(kind_of[id_], []).append(id_)
    for row in result.ids.tolist():
        for kind in {kind_of[id_] for id_ in row}:
            returned = [id_ for id_ in row if kind_of[id_] == kind]
            assert returned == copies[kind][: len(returned)]


def assert_nearest(result: Neighbors, search: Search, among: Array | None = None) -> None:
    """The result is the nearest, in order, up to near-ties; `among`: the only ids allowed."""
    rows = assert_scored(result, search)
    scores, slacks = search.true_scores(), search.slack()
    allowed = np.ones(len(search.ids), bool) if among is None else np.isin(search.ids, among)
    assert allowed[rows].all()
    assert result.ids.shape == (len(search.queries), min(search.schedule.k, allowed.sum()))
    for query, neighbors in enumerate(rows):
        others = np.setdiff1d(np.flatnonzero(allowed), neighbors)
        if len(others) and len(neighbors):
            worst = (scores[query, neighbors] + slacks[query, neighbors]).min()
            assert (scores[query, others] - slacks[query, others]).max() <= worst


def assert_same(result: Neighbors, expected: Neighbors) -> None:
    np.testing.assert_array_equal(result.ids, expected.ids)
    np.testing.assert_array_equal(result.scores, expected.scores)


def rewrite_card(folder: Path, **changed: Any) -> None:
    """Change a saved index as another version of keras-mrl might write it: its digest fits."""
    card = json.loads((folder / "index.json").read_text())
    del card["sha256"]
    card |= changed
    digest = hashlib.sha256(json.dumps(card).encode()).hexdigest()
    (folder / "index.json").write_text(json.dumps({**card, "sha256": digest}, indent=1))
