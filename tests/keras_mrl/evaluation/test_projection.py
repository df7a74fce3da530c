"""`score_projection`: ranks by comparison with every row, and what a report says."""

from pathlib import Path

import numpy as np
import pytest

from keras_mrl.evaluation import Quality, score_projection
from keras_mrl.evaluation.projection import ranks_by_dim
from keras_mrl_serving import Projection
from keras_mrl_serving.projection import principal_directions

RNG = np.random.default_rng(0)
ROWS = (RNG.normal(size=(6000, 10)) * np.geomspace(2, 0.1, 10)).astype(np.float32)
TURN = np.linalg.qr(RNG.normal(size=(10, 10)))[0]
GALLERY, QUERIES = ROWS[:5200] @ TURN.astype(np.float32), ROWS[5200:5900] @ TURN.astype(np.float32)


def test_ranks_are_those_of_comparing_every_row() -> None:
    projection = Projection(principal_directions(GALLERY), (2, 5))
    targets = RNG.integers(5200, size=(700, 3))
    ranks = ranks_by_dim(projection, GALLERY, QUERIES, targets, (2, 5))
    for dim in (2, 5):
        rows, queries = (projection.transform(side, dim) for side in (GALLERY, QUERIES))
        rows, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (rows, queries))
        for query in range(0, 700, 70):  # of both blocks of queries and of rows
            scores = rows @ queries[query]
            for place, target in enumerate(targets[query]):
                expected = 1 + (scores > scores[target] + 1e-6).sum()
                assert abs(ranks[dim][query, place] - expected) <= 1


def test_measures_follow_from_the_ranks() -> None:
    projection = Projection(principal_directions(GALLERY), (2, 5, 10))
    pairs = GALLERY[:50], np.arange(50)
    report = score_projection(projection, GALLERY, QUERIES[:40], k=5, pairs=pairs)
    assert list(report.by_method) == ["truncation", "pca"]
    assert (report.rows, report.queries, report.k) == (5200, 40, 5)
    pca = report.by_method["pca"]
    assert pca[10]["recall@5"] == 1.0
    assert pca[10]["shortlist@0.98"] == 5
    assert report.full == {"ndcg@10": 1.0}
    assert pca[10]["ndcg@10"] == 1.0
    assert pca[2]["recall@5"] < pca[5]["recall@5"] < 1
    assert pca[2]["shortlist@0.95"] > pca[5]["shortlist@0.95"]
    assert pca[5]["shortlist@0.98"] >= pca[5]["shortlist@0.95"]
    assert pca[5]["recall@5"] > report.by_method["truncation"][5]["recall@5"]
    assert report.findings() == []


def test_a_report_is_a_table_a_picture_and_json(tmp_path: Path) -> None:
    turned = Projection(TURN, (4,), "listwise")
    report = score_projection(turned, GALLERY[:300], QUERIES[:30])
    lines = report.table().splitlines()
    assert [line.split()[0] for line in lines] == ["method", "truncation", "pca", "listwise"]
    saved = report.to_json()
    assert Quality(saved["methods"]["listwise"])["4"] == report.by_method["listwise"][4]  # type: ignore[index]
    report.plot(tmp_path / "report.svg")
    assert "listwise" in (tmp_path / "report.svg").read_text()


def test_what_does_not_fit_is_refused() -> None:
    projection = Projection(TURN, (4,))
    with pytest.raises(ValueError, match="at least the 10 nearest"):
        score_projection(projection, GALLERY[:5], QUERIES)
    with pytest.raises(ValueError, match="Embeddings must be"):
        score_projection(projection, GALLERY[:, :9], QUERIES)
