"""What a search is worth by graded relevance, beside trec_eval itself."""

import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import pytest
import pytrec_eval

from keras_mrl import ContrastiveLoss, MatryoshkaClassifier, MatryoshkaEncoder, MatryoshkaHead
from keras_mrl.evaluation import (
    evaluate_retrieval,
    inputs,
    plot_by_dim,
    score_retrieval,
)
from keras_mrl_serving.contract import Manifest
from keras_mrl_serving.quality import cheapest_dim
from tests.helpers.laws import exactly

RNG = np.random.default_rng(0)
DIMS, CUTS = (4, 16, 24), (1, 3, 10)
QUERIES = RNG.normal(size=(40, 24)).astype(np.float32)
CORPUS = RNG.normal(size=(300, 24)).astype(np.float32)
# Names in TREC's: most of a query's documents are near it, so that the measures are not all small.
TREC_NAMES = {"ndcg": "ndcg_cut", "map": "map_cut", "recall": "recall", "precision": "P"}
Names = list[Any]


def judgments(queries: Names, corpus: Names) -> dict[Any, dict[Any, int]]:
    """Grades from -1 to 3; of query 0 none, of query 1 none that is relevant."""
    scores = QUERIES @ CORPUS.T
    qrels: dict[Any, dict[Any, int]] = {}
    for row, query in enumerate(queries):
        near = np.argsort(-scores[row])[:20]
        judged = [*RNG.choice(near, 6, replace=False), *RNG.choice(300, 1 + row % 9, replace=False)]
        grades = RNG.integers(-1, 4, len(judged)) if row != 1 else np.zeros(len(judged), int)
        qrels[query] = {
            corpus[j]: int(grade) for j, grade in zip(judged, grades, strict=True) if row
        }
    return qrels


def by_trec_eval(
    qrels: dict[Any, dict[Any, int]], scores: npt.NDArray[Any], queries: Names, corpus: Names
) -> dict[str, float]:
    """The means of trec_eval's measures, under our names."""
    cuts = ",".join(map(str, CUTS))
    judge = pytrec_eval.RelevanceEvaluator(
        {str(query): {str(d): g for d, g in grades.items()} for query, grades in qrels.items()},
        {f"{name}.{cuts}" for name in TREC_NAMES.values()},
    )
    run = {
        str(query): {str(d): float(s) for d, s in zip(corpus, row, strict=True)}
        for query, row in zip(queries, scores, strict=True)
    }
    by_query = judge.evaluate(run).values()
    means = {
        f"{ours}@{cut}": float(np.mean([values[f"{theirs}_{cut}"] for values in by_query]))
        for ours, theirs in TREC_NAMES.items()
        for cut in CUTS
    }
    # recip_rank knows no cut: it is asked about the first k of every ranking.
    first = pytrec_eval.RelevanceEvaluator(
        {str(query): {str(d): g for d, g in grades.items()} for query, grades in qrels.items()},
        {"recip_rank"},
    )
    for cut in CUTS:
        heads = {
            query: dict(sorted(docs.items(), key=lambda doc: (doc[1], doc[0]))[-cut:])
            for query, docs in run.items()
        }
        ranks = [values["recip_rank"] for values in first.evaluate(heads).values()]
        means[f"mrr@{cut}"] = float(np.mean(ranks))
    return means


def cosines(queries: npt.NDArray[Any], corpus: npt.NDArray[Any], dim: int) -> npt.NDArray[Any]:
    """The same for equal rows wherever they stand, up to the length of the query."""
    rows = corpus[:, :dim].astype(np.float64)
    return (queries[:, None, :dim] * rows).sum(axis=-1) / np.linalg.norm(rows, axis=1)


NAMES: dict[str, tuple[Names, Names]] = {
    "strings": (
        [f"q{i}" for i in RNG.permutation(40)],
        [f"d{i:03}" for i in RNG.permutation(300)],
    ),
    "integers": (RNG.permutation(40).tolist(), RNG.permutation(300).tolist()),
}


@pytest.mark.parametrize("kind", NAMES)
def test_all_measures_are_trec_evals(kind: str) -> None:
    queries, corpus = NAMES[kind]
    qrels = judgments(queries, corpus)
    quality = score_retrieval(QUERIES, CORPUS, qrels, DIMS, queries, corpus, CUTS)
    for dim in DIMS:
        expected = by_trec_eval(qrels, cosines(QUERIES, CORPUS, dim), queries, corpus)
        assert quality[dim] == pytest.approx(expected, abs=1e-12)
    assert quality[24]["ndcg@10"] > quality[4]["ndcg@10"] > 0.02


def test_ties_are_trec_evals_where_its_order_of_ids_is_ours() -> None:
    """Documents of few directions, many of them equal; trec_eval puts the greater string first."""
    corpus = RNG.choice([0.0, 1.0, 2.0], size=(300, 24)).astype(np.float32)
    corpus[:, :4] = corpus[RNG.integers(0, 7, 300), :4]
    corpus[100:] = corpus[RNG.integers(0, 100, 200)]
    ours = RNG.permutation(300).tolist()
    theirs = [f"{999 - id_}" for id_ in ours]
    queries = list(range(40))
    qrels = judgments(queries, ours)
    renamed = {
        query: {f"{999 - id_}": grade for id_, grade in grades.items()}
        for query, grades in qrels.items()
    }
    quality = score_retrieval(QUERIES, corpus, qrels, (4, 24), None, ours, CUTS)
    as_trec_would = score_retrieval(QUERIES, corpus, renamed, (4, 24), None, theirs, CUTS)
    assert quality != as_trec_would  # so the order of ties decides
    for dim in (4, 24):
        expected = by_trec_eval(renamed, cosines(QUERIES, corpus, dim), queries, theirs)
        assert quality[dim] == pytest.approx(expected, abs=1e-12)


def test_the_order_of_the_rows_decides_nothing() -> None:
    copies = CORPUS[RNG.integers(0, 20, 300)]
    qrels = judgments(*NAMES["strings"])
    shuffle = RNG.permutation(300)
    names, ids = NAMES["strings"]
    one = score_retrieval(QUERIES, copies, qrels, DIMS, names, ids, CUTS)
    other = score_retrieval(
        QUERIES, copies[shuffle], qrels, DIMS, names, np.array(ids)[shuffle], CUTS
    )
    assert one == other


def test_a_set_of_documents_is_grades_of_one() -> None:
    qrels = {3: {5, 7}, 8: {250}}
    graded = {query: dict.fromkeys(documents, 1) for query, documents in qrels.items()}
    quality = score_retrieval(QUERIES, CORPUS, qrels, DIMS)
    assert quality == score_retrieval(QUERIES, CORPUS, graded, DIMS)
    listed = {query: np.array([*documents]) for query, documents in qrels.items()}
    assert quality == score_retrieval(QUERIES, CORPUS, {q: [*d] for q, d in listed.items()}, DIMS)


def test_documents_that_are_not_there_count_as_not_retrieved_and_are_named() -> None:
    qrels = {0: {1: 1, 300: 2, 301: 0}, 1: {999: 1}}
    sentence = (
        "The corpus holds 1 of the 3 relevant documents that qrels names. The others count as not "
        "retrieved, as in trec_eval. Leave them out of qrels to judge on this corpus alone."
    )
    with pytest.warns(UserWarning, match=exactly(sentence)):
        quality = score_retrieval(CORPUS[[1, 2]], CORPUS, qrels, (24,), k=1)
    assert quality[24]["recall@1"] == 0.25
    assert quality[24]["ndcg@1"] == 0.25


STRANGERS = "qrels must name {} by the ids in {}, at least one with a judgment. Received: "
IDS = (
    "{0} must hold one integer or one string per row, each once. Received: {1}. "
    "Leave {0} out if the numbers of the rows are the ids."
)
MAPPING = (
    "qrels must map the id of a query to the grades of documents, finite numbers by their ids, or "
    "to a set of relevant ids. Received: {}. "
    "Give for example {{'q1': {{'d7': 2, 'd9': 0}}}} or {{'q1': {{'d7'}}}}."
)
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "queries of another kind": (
        {"qrels": {"3": {5: 1}}},
        STRANGERS.format("queries", "query_ids")
        + "ids as '3' in qrels (strings), as 0 in query_ids (integers), none in both. "
        "Give query_ids, of the same kind as in qrels.",
    ),
    "documents of another kind": (
        {"qrels": {3: {5: 1}}, "corpus_ids": [f"{i}" for i in range(300)]},
        STRANGERS.format("documents", "corpus_ids")
        + "ids as 5 in qrels (integers), as '0' in corpus_ids (strings), none in both. "
        "Give corpus_ids, of the same kind as in qrels.",
    ),
    "nothing relevant": (
        {"qrels": {3: {5: 0}, 4: {5: -1}}},
        "qrels must name a relevant document, one of a grade above 0. "
        "Received: no such grade for any of 2 queries. Give for example {'q1': {'d7': 1}}.",
    ),
    "no judgments": (
        {"qrels": {}},
        STRANGERS.format("queries", "query_ids")
        + "ids as None in qrels (NoneType), as 0 in query_ids (integers), none in both. "
        "Give query_ids, of the same kind as in qrels.",
    ),
    "pairs": ({"qrels": [(3, 5)]}, MAPPING.format("a list")),
    "one document": ({"qrels": {3: "d5"}}, MAPPING.format("'d5' for query 3")),
    "a grade in words": (
        {"qrels": {3: {5: "good"}}},
        MAPPING.format("the grade 'good' for query 3 and document 5"),
    ),
    "a grade of NaN": (
        {"qrels": {3: {5: float("nan")}}},
        MAPPING.format("the grade nan for query 3 and document 5"),
    ),
    "too few ids": (
        {"corpus_ids": [1, 2]},
        IDS.format("corpus_ids", "2 ids of integers for 300 rows"),
    ),
    "ids of two kinds": (
        {"query_ids": [*range(39), "q39"]},
        IDS.format("query_ids", "40 ids of integers, strings for 40 rows"),
    ),
    "ids that repeat": (
        {"corpus_ids": [*range(299), 7]},
        IDS.format("corpus_ids", "7 more than once"),
    ),
    "more than there are": (
        {"k": (10, 301)},
        "A corpus must hold at least the 301 nearest that are looked for. "
        "Received: 300 rows. Give more rows.",
    ),
    "no cut": ({"k": ()}, "k must be a number of documents. Received: k=(). Give for example 10."),
    "no number": (
        {"k": "10"},
        "k must be a positive integer. Received: k='10'. Give for example 10.",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_before_anything_is_embedded(case: str) -> None:
    arguments, sentence = WRONG[case]
    arguments = {"qrels": {3: {5: 1}}, **arguments}
    with pytest.raises(ValueError, match=exactly(sentence)):
        score_retrieval(QUERIES, CORPUS, dims=DIMS, **arguments)

    def refuse(*_: Any) -> Any:
        raise AssertionError("embedded")

    model = keras.Sequential([keras.Input((24,)), keras.layers.Lambda(refuse, output_shape=(24,))])
    with pytest.raises(ValueError, match=exactly(sentence)):
        evaluate_retrieval(model, QUERIES, CORPUS, dims=DIMS, verbose=0, **arguments)


def test_what_is_no_array_of_rows_is_refused() -> None:
    model = keras.Sequential([keras.Input((24,)), keras.layers.Dense(24)])
    sentence = (
        "corpus must be an array of rows, or a dict or tuple of arrays with as many rows each, at "
        "least one. Received: a generator. Of a data set, embed the rows with model.predict and "
        "judge the embeddings: score_retrieval, score_similarity."
    )
    rows: Iterator[Any] = (row for row in CORPUS)
    with pytest.raises(ValueError, match=exactly(sentence)):
        evaluate_retrieval(model, QUERIES, rows, {3: {5: 1}}, dims=DIMS, verbose=0)
    sentence = (
        "evaluate_retrieval needs dims for a model that ends in no MatryoshkaHead with dims. "
        f"Received: dims=None for Sequential {model.name!r}. "
        "Give the prefix lengths: dims=(8, 16, 32)."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        evaluate_retrieval(model, QUERIES, CORPUS, {3: {5: 1}})


@pytest.mark.backend
def test_a_model_is_judged_by_its_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    """In three parts, the last of them short; only judged queries are embedded."""
    monkeypatch.setattr(inputs, "PART_ROWS", 128)
    backbone = keras.Sequential([keras.Input((24,)), keras.layers.Dense(16)])
    model = MatryoshkaClassifier(backbone, MatryoshkaHead(10, dims=(4, 16)))
    names, ids = NAMES["strings"]
    qrels = judgments(names, ids)
    quality = evaluate_retrieval(
        model, QUERIES, CORPUS, qrels, names, ids, k=CUTS, batch_size=64, verbose=0
    )
    embedded = backbone.predict(QUERIES, verbose=0), backbone.predict(CORPUS, verbose=0)
    expected = score_retrieval(*embedded, qrels, (4, 16), names, ids, CUTS)
    assert list(quality) == [4, 16]
    for dim, measures in expected.items():
        assert quality[dim] == pytest.approx(measures)


@pytest.mark.backend
def test_the_corpus_of_two_towers_goes_through_the_other() -> None:
    users = keras.Sequential([keras.Input((24,)), keras.layers.Dense(8)])
    sides = {name: keras.Input((width,), name=name) for name, width in (("left", 20), ("right", 4))}
    items = keras.Model(sides, keras.layers.Dense(8)(keras.layers.Concatenate()([*sides.values()])))
    encoder = MatryoshkaEncoder(users, items)
    encoder.compile("sgd", ContrastiveLoss(dims=(4, 8)))
    corpus = {"left": CORPUS[:, :20], "right": CORPUS[:, 20:]}
    qrels = judgments([*range(40)], [*range(300)])
    quality = evaluate_retrieval(encoder, QUERIES, corpus, qrels, verbose=0)
    embedded = users.predict(QUERIES, verbose=0), items.predict(corpus, verbose=0)
    for dim, measures in score_retrieval(*embedded, qrels, (4, 8)).items():
        assert quality[dim] == pytest.approx(measures)


def test_every_slow_part_shows_that_it_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    model = keras.Sequential([keras.Input((24,)), keras.layers.Dense(24)])
    for verbose, texts in ((1, ("part", "block", "1/1")), (0, ())):
        evaluate_retrieval(model, QUERIES, CORPUS, {3: {5: 1}}, dims=DIMS, verbose=verbose)
        out = capsys.readouterr().out
        assert all(text in out for text in texts)
        assert bool(out) == bool(verbose)


def test_the_numbers_go_into_a_manifest_and_a_figure(tmp_path: Path) -> None:
    quality = score_retrieval(QUERIES, CORPUS, judgments([*range(40)], [*range(300)]), DIMS)
    manifest = Manifest(
        name="search",
        kind="encoder",
        fingerprint="5e1f",
        dims=DIMS,
        width=24,
        inputs={"text": {"dtype": "float32", "shape": [None, 24]}},
        made_with={},
        quality={str(dim): measures for dim, measures in quality.items()},
    )
    assert cheapest_dim(manifest, 1.0, "ndcg@10") == 24
    plot_by_dim(quality.by_measure(), tmp_path / "retrieval.svg", measure="by measure")
    assert (tmp_path / "retrieval.svg").stat().st_size > 1000


@pytest.mark.soak
def test_memory_is_that_of_a_block_and_not_of_the_scores(tmp_path: Path) -> None:
    """50,000 x 512 and 1,000 queries at 7 dims under `make soak`; else a tenth of that."""
    scale = 1 if os.environ.get("KERAS_MRL_SOAK") else 10
    rows, queries = 50_000 // scale, 1000 // scale
    corpus: npt.NDArray[Any] = np.memmap(tmp_path / "corpus", np.float32, "w+", shape=(rows, 512))
    corpus[:] = RNG.normal(size=(rows, 512))
    near = RNG.integers(0, rows, queries)
    asked = corpus[near] + RNG.normal(size=(queries, 512), scale=0.5)
    qrels = {f"q{i}": {f"d{near[i]}": 1} for i in range(queries)}
    names = [f"q{i}" for i in range(queries)], [f"d{i}" for i in range(rows)]
    tracemalloc.start()
    quality = score_retrieval(asked, corpus, qrels, (8, 16, 32, 64, 128, 256, 512), *names)
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    assert peak < 120
    assert quality[512]["mrr@10"] == 1
