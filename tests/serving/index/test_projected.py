"""A first stage that looks at a projection, while the answer is of the embeddings as they are."""

from pathlib import Path

import numpy as np
import pytest

from keras_mrl_serving.funnel import FunnelSchedule
from keras_mrl_serving.index import FaissIndex, FirstStage, open_index, plan_funnel
from keras_mrl_serving.index.shortlister import Shortlister
from keras_mrl_serving.projection import Projection, principal_directions
from tests.helpers.galleries import METRICS, Array, Refuses, assert_same, clusters

ROWS = 400
TURN = np.linalg.qr(np.random.default_rng(0).normal(size=(40, 40)))[0]
GALLERY, QUERIES = (  # whose coordinates mean no more than one another
    (clusters(seed, rows, 40, decay=0.8) @ TURN).astype(np.float32)
    for seed, rows in ((0, ROWS), (1, 60))
)
PROJECTION = Projection(principal_directions(GALLERY), (8, 40))
TWICE = FunnelSchedule((40, 40), (20,), 5)

metrics = pytest.mark.parametrize("metric", METRICS)


@metrics
@pytest.mark.parametrize("factory", ["Flat", "HNSW8_SQ8"])
def test_the_first_stage_looks_at_projected_rows_and_the_last_at_rows_as_they_are(
    factory: str, metric: str, tmp_path: Path
) -> None:
    spec = FirstStage(f"Projected8,{factory}", projection=PROJECTION)
    short = FunnelSchedule((40, 40), (6,), 5)
    index = FaissIndex.build(GALLERY, short, metric=metric, first_stage=spec)
    by_hand = FaissIndex.build(
        np.concatenate([PROJECTION.transform(GALLERY, 8), GALLERY], axis=1),
        FunnelSchedule((8,), (), 6),
        metric=metric,
        first_stage=FirstStage(factory),
    )
    listed = by_hand.search(PROJECTION.transform(QUERIES, 8)).ids
    result = index.search(QUERIES)
    exact = FaissIndex.build(
        GALLERY, FunnelSchedule((40,), (), ROWS), metric=metric, first_stage=FirstStage("Flat")
    ).search(QUERIES)
    for found, shortlist, all_ in zip(result.ids, listed, exact.ids, strict=True):
        expected = [id_ for id_ in all_.tolist() if id_ in shortlist][:5]
        assert factory != "Flat" or found.tolist() == expected
    index.save(tmp_path)
    again = open_index(tmp_path)
    assert_same(again.search(QUERIES), result)
    assert_same(again.search(QUERIES[:1]), result[:1])


@metrics
@pytest.mark.parametrize("factory", ["PQ20x4fs", "SQ8", "HNSW8_SQbf16", "BFlat", "OPQ8_16,PQ8x4fs"])
def test_a_shortlist_is_scored_again_at_the_same_width(factory: str, metric: str) -> None:
    index = FaissIndex.build(GALLERY, TWICE, metric=metric, first_stage=FirstStage(factory))
    exact = FaissIndex.build(
        GALLERY, FunnelSchedule((40,), (), 5), metric=metric, first_stage=FirstStage("Flat")
    ).search(QUERIES)
    result = index.search(QUERIES)
    hits = (result.ids[:, :, None] == exact.ids[:, None, :]).any(axis=2)
    assert hits.mean() > (0.6 if factory == "BFlat" or metric == "dot" else 0.9)
    where = np.flatnonzero(hits.all(axis=1))
    assert len(where)
    np.testing.assert_allclose(result.scores[where], exact.scores[where], rtol=1e-5, atol=1e-5)
    for row in range(5):
        assert_same(index.search(QUERIES[row : row + 1]), result[row : row + 1])


def test_a_projected_first_stage_needs_its_projection(refuses: Refuses) -> None:
    narrow = Projection(np.eye(4), (4,))
    few = Projection(np.eye(4, 40), (4,))
    for projection, received in (
        (None, "none"),
        (narrow, "one of shape (4, 4)"),
        (few, "one of shape (4, 40)"),
    ):
        spec = FirstStage("Projected8,Flat", projection=projection)
        text = (
            "A projected first stage looks at a projection of embeddings of its dim. "
            f"Received: {received} for 'Projected8,Flat' over dim 40. "
            "Write FirstStage('Projected8,Flat', projection=projection)."
        )
        with refuses(ValueError, text):
            Shortlister.build(GALLERY, spec, "cosine", lambda _done, _rows: None)


@pytest.mark.parametrize("projection", [None, PROJECTION])
def test_the_planner_projects_where_no_prefix_is_enough(projection: Projection | None) -> None:
    lines: list[str] = []

    def work(index: FaissIndex, _queries: Array, _batch: int) -> float:
        return float("Projected" not in index.first_stage.factory)

    plan = plan_funnel(
        GALLERY,
        QUERIES,
        0.9,
        k=5,
        dims=(8, 40),
        says=lines.append,
        timer=work,  # type: ignore[arg-type]
        projection=projection,
    )
    assert plan.first_stage.factory == "Projected8,HNSW32_SQbf16"
    assert ("principal components of the gallery" in lines) == (projection is None)
    index = FaissIndex.build(GALLERY, plan.schedule, first_stage=plan.first_stage)
    assert index.search(QUERIES).ids.shape == (60, 5)
