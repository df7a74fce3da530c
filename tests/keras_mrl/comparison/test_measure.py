"""Every number of a comparison, counted again from what its nets answered."""

from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler

from keras_mrl.baselines import random_probe
from keras_mrl.comparison.data import split_classes
from keras_mrl.comparison.measure import TrainedNets, logits_of_all_classes, probe
from keras_mrl.comparison.splits import unseen_classes
from keras_mrl.evaluation import LinearProbe, linear_probe, mean_average_precision_at_k
from keras_mrl_serving import CascadePolicy
from tests.helpers.comparisons import PLAN, Compared

Array = npt.NDArray[Any]


def neighbors(gallery: Array, queries: Array, k: int = 10) -> Array:
    nearest = NearestNeighbors(n_neighbors=k, metric="cosine").fit(gallery)
    return np.asarray(nearest.kneighbors(queries, return_distance=False))


def hits_of_digits(compared: Compared, gallery: Array, queries: Array) -> Array:
    """Whether the ten nearest training images of each test image have its label."""
    labels = compared.training.labels[neighbors(gallery, queries)]
    return np.asarray(labels == compared.test.labels[:, None])


def principal_axes(features: Array) -> tuple[Array, Array]:
    mean = features.mean(axis=0, dtype=np.float64)
    return mean, np.linalg.svd(features - mean, full_matrices=False)[2].T


def model(compared: Compared, net: str) -> Any:
    return keras.saving.load_model(compared.out / "nets" / net / "model.keras")


@pytest.mark.parametrize("method", ["mrl", "mrl_e", "slimmable", "mrl_boosted"])
def test_heads_of_nested_nets_are_judged_at_every_dim(method: str, compared: Compared) -> None:
    right = compared.load(f"{method}-0", "test_logits").argmax(-1) == compared.test.labels[:, None]
    expected = {"4": [right[:, 0].mean()], "12": [right[:, 1].mean()]}
    assert compared.results["top1"][method] == expected


@pytest.mark.parametrize(
    ("method", "net", "column"),
    [("mrl", "mrl-0", 1), ("ff", "ff_12-0", 0), ("mrl_e", "mrl_e-0", 1)],
)
def test_heads_are_judged_beyond_the_best_answer(
    method: str, net: str, column: int, compared: Compared
) -> None:
    labels = compared.test.labels
    logits = compared.load(net, "test_logits")[:, column].astype(np.float64)
    best = np.argsort(-logits, axis=-1)
    right = best[:, 0] == labels
    top5 = (best[:, :5] == labels[:, None]).any(axis=1).mean()
    assert compared.results["top5"][method]["12"] == [top5]
    shares = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    confidence, ece = shares.max(axis=-1), 0.0
    for low in np.arange(15) / 15:
        inside = (confidence >= low) & (confidence < low + 1 / 15)
        ece += abs((right[inside] - confidence[inside]).sum()) / len(confidence)
    assert compared.results["ece"][method]["12"] == [pytest.approx(ece, abs=1e-4)]


def test_every_measure_of_heads_has_every_method_and_dim(compared: Compared) -> None:
    methods = {"mrl", "ff", "mrl_e", "slimmable", "mrl_boosted", "svd", "rand_lp"}
    for measure in ("top1", "top5", "ece"):
        by_method = compared.results[measure]
        assert by_method.keys() == methods
        assert all(by_dim.keys() == {"4", "12"} for by_dim in by_method.values())


def test_svd_is_the_full_head_of_low_rank(compared: Compared) -> None:
    weights = model(compared, "ff_12-0").head.weights_at(12)
    kernel, bias = map(keras.ops.convert_to_numpy, weights)
    left, sizes, right = np.linalg.svd(kernel.astype(np.float64), full_matrices=False)
    low_rank = (left[:, :4] * sizes[:4]) @ right[:4]
    logits = compared.load("ff_12-0", "test_12") @ low_rank + bias
    accuracy = (logits.argmax(-1) == compared.test.labels).mean()
    assert compared.results["top1"]["svd"]["4"] == [accuracy]


@pytest.mark.parametrize("dim", [4, 12])
def test_a_random_probe_reads_the_full_net(dim: int, compared: Compared) -> None:
    gallery, queries = (compared.load("ff_12-0", f"{part}_12") for part in ("train", "test"))
    right = random_probe(gallery, compared.training.labels, dim).predict(queries)
    accuracy = (right == compared.test.labels).mean()
    received = compared.results["top1"]["rand_lp"][str(dim)]
    assert received == [pytest.approx(accuracy, abs=0.01)]


@pytest.mark.parametrize("method", ["mrl", "first_coordinates", "pca"])
def test_neighbours_are_scikit_learns(method: str, compared: Compared) -> None:
    net = "mrl-0" if method == "mrl" else "ff_12-0"
    gallery, queries = (compared.load(net, f"{part}_12") for part in ("train", "test"))
    if method == "pca":
        mean, axes = principal_axes(gallery)
        gallery, queries = (gallery - mean) @ axes, (queries - mean) @ axes
    hits = hits_of_digits(compared, gallery[:, :4], queries[:, :4])
    scores = compared.results["neighbors"][method]["4"]
    assert scores["nn1"] == pytest.approx(hits[:, 0].mean(), abs=0.005)
    assert scores["p10"] == pytest.approx(hits.mean(), abs=0.002)


@pytest.mark.parametrize("dim", [4, 12])
def test_a_separate_net_is_as_wide_as_its_dim(dim: int, compared: Compared) -> None:
    gallery, queries = (compared.load(f"ff_{dim}-0", f"{part}_{dim}") for part in ("train", "test"))
    assert gallery.shape[1] == dim
    hits = hits_of_digits(compared, gallery, queries)
    scores = compared.results["neighbors"]["ff"][str(dim)]
    assert scores["p10"] == pytest.approx(hits.mean(), abs=0.003)
    assert "recall10" not in scores


def test_a_linear_probe_is_trained_on_the_features(compared: Compared) -> None:
    gallery, queries = (compared.load("mrl-0", f"{part}_12")[:, :4] for part in ("train", "test"))
    scaler = StandardScaler().fit(gallery)
    regression = LogisticRegression(max_iter=1000)
    regression.fit(scaler.transform(gallery), compared.training.labels)
    accuracy = regression.score(scaler.transform(queries), compared.test.labels)
    assert compared.results["probe"]["mrl"]["4"] == [pytest.approx(accuracy, abs=0.01)]
    assert compared.results["about"]["probed"] == len(compared.training.labels)


def test_a_probe_sees_so_many_rows_and_no_more(compared: Compared) -> None:
    nets = TrainedNets(compared.out / "nets", PLAN, compared.training, compared.test)
    gallery, queries = (compared.load("mrl-0", f"{part}_12") for part in ("train", "test"))
    rows = np.random.default_rng(0).permutation(len(gallery))[:100]
    few = linear_probe(gallery[rows], compared.training.labels[rows])
    accuracy = (few.predict(queries) == compared.test.labels).mean()
    assert probe(nets, most_rows=100)["mrl"]["12"] == [accuracy]
    assert compared.results["probe"]["mrl"]["12"] != [accuracy]


def test_classes_that_taught_a_probe_nothing_are_its_last_answer() -> None:
    of_two = LinearProbe(kernel=-np.eye(2), bias=np.zeros(2), classes=np.array([0, 2]))
    logits = logits_of_all_classes(of_two, np.array([[5.0, 1.0]]), 4)
    assert np.argsort(-logits, kind="stable").tolist() == [[2, 0, 1, 3]]


def holdout(compared: Compared, split: int) -> tuple[Array, Array]:
    """The test rows that taught the thresholds of a split, and those that judge them."""
    with np.load(compared.out / "splits.npz") as parts:
        rows, count = parts[f"holdout_{split}"], len(parts["test_labels"])
    return rows, np.setdiff1d(np.arange(count), rows)


@pytest.mark.parametrize("split", [0, 9])
def test_rows_that_taught_a_cascade_do_not_judge_it(split: int, compared: Compared) -> None:
    labels, logits = compared.test.labels, compared.load("mrl-0", "test_logits")
    teaching, judging = holdout(compared, split)
    policy = CascadePolicy.learn(logits[teaching], labels[teaching], (4, 12))
    report = policy.evaluate(logits[judging], labels[judging])
    splits = compared.results["cascades"]["splits"]
    for measure in ("accuracy", "full_accuracy", "expected_dim", "cumulative_dim"):
        assert splits["greedy"][split][measure] == pytest.approx(getattr(report, measure))
    full = compared.load("ff_12-0", "test_logits")[:, -1].argmax(-1) == labels
    assert splits["greedy"][split]["ff_accuracy"] == full[judging].mean()
    right = (logits[judging].argmax(-1) == labels[judging][:, None]).any(axis=1)
    assert splits["oracle"][split]["accuracy"] == right.mean()


def test_queries_that_chose_a_funnel_do_not_judge_it(compared: Compared) -> None:
    gallery, queries = (compared.load("mrl-0", f"{part}_12") for part in ("train", "test"))
    rows = compared.results["retrieval"]["mrl"]["rows"]
    (row,) = (row for row in rows if row["kind"] == "two stages")
    assert row["dims"] == [4, 12]
    (longest,) = row["shortlists"]
    assert longest == len(gallery) // 50
    assert row["madds"] == len(gallery) * 4 + longest * 12
    shortlists = neighbors(gallery[:, :4], queries[:, :4], longest)
    ids = np.stack(
        [
            shortlist[neighbors(gallery[shortlist], query[None])[0]]
            for shortlist, query in zip(shortlists, queries, strict=True)
        ]
    )
    hits = compared.training.labels[ids] == compared.test.labels[:, None]
    teaching, judging = holdout(compared, 0)
    for name, part in (("map10", judging), ("holdout_map10", teaching)):
        assert row[name] == pytest.approx(mean_average_precision_at_k(hits[part]), abs=0.003)


def test_unseen_classes_were_not_seen(compared: Compared) -> None:
    unseen = unseen_classes(10)
    gallery, queries = (
        split_classes(part, unseen)[1] for part in (compared.training, compared.test)
    )
    scores = compared.results["unseen"]

    def precision(sides: list[Array]) -> Any:
        hits = gallery.labels[neighbors(sides[0], sides[1])] == queries.labels[:, None]
        return pytest.approx(hits.mean(), abs=0.003)

    for method, net in (
        ("mrl", "mrl_seen-0"),
        ("ff", "ff_4_seen-0"),
        ("first_coordinates", "ff_12_seen-0"),
    ):
        seen = model(compared, net)
        assert seen.head.num_classes == 8
        sides = [seen.backbone.predict(part.inputs, verbose=0) for part in (gallery, queries)]
        assert scores[method]["4"]["p10"] == precision([side[:, :4] for side in sides])
    features = compared.load("ff_12_seen-0", "train_12")
    assert len(features) == len(compared.training.labels) - len(gallery.labels)
    mean, axes = principal_axes(features)
    assert scores["pca"]["4"]["p10"] == precision([(side - mean) @ axes[:, :4] for side in sides])
    assert list(scores["ff"]) == ["4", "12"]
    whole = scores["first_coordinates"]["12"]
    assert scores["ff"]["12"] == pytest.approx({name: whole[name] for name in scores["ff"]["12"]})


def test_unseen_classes_are_named(compared: Compared) -> None:
    names = [compared.training.names[number] for number in unseen_classes(10)]
    assert compared.results["about"]["unseen"] == names
    with np.load(compared.out / "splits.npz") as parts:
        assert parts["unseen"].tolist() == names
    assert f"<dd>{', '.join(names)}</dd>" in (compared.out / "report.html").read_text()


def test_costs_are_those_of_the_nets(compared: Compared) -> None:
    assert [model(compared, net).head.tied for net in ("mrl-0", "mrl_e-0")] == [False, True]
    assert compared.results["madds"]["head"] == 120
    minutes = compared.results["minutes"]
    assert list(minutes) == [net.name for net in PLAN.nets]
    assert minutes["ff_12-0"] == 0.6  # six epochs of six seconds


def test_the_trained_nets_learned_something(compared: Compared) -> None:
    assert compared.results["top1"]["mrl"]["12"][0] > 0.3  # a tenth by chance
    assert compared.results["neighbors"]["mrl"]["12"]["nn1"] > 0.5
    assert compared.results["unseen"]["mrl"]["12"]["nn1"] > 0.6  # two classes


def test_a_funnel_is_chosen_that_is_as_good_as_exhaustive_search(compared: Compared) -> None:
    for result in compared.results["retrieval"].values():
        rows = result["rows"]
        whole = rows[1]
        assert whole["dims"] == [12]
        assert all(row["madds"] <= 1.2 * whole["madds"] for row in rows)
        assert rows[result["chosen"]]["holdout_map10"] >= whole["holdout_map10"] - 0.005


def test_the_joint_search_is_no_worse_than_greedy_where_both_learned(compared: Compared) -> None:
    cascades = compared.results["cascades"]
    for splits in cascades["splits"].values():
        assert len(splits) == 10
        assert all(4 <= split["expected_dim"] <= 12 for split in splits)
    for split in cascades["search_over_greedy"]:
        assert split["taught"]["expected_dim"] <= 1e-6
        assert split["taught"]["accuracy"] >= -1e-9
