"""`keras-mrl compare`: its parts, its plan, one small run, and every number of it counted again."""

import base64
import csv
import json
import re
import xml.etree.ElementTree
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import pytest
from matplotlib.image import imread
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler

from keras_mrl.baselines import random_probe
from keras_mrl.comparison import measure as measures
from keras_mrl.comparison.data import ComparisonError, Images, split_classes
from keras_mrl.comparison.measure import Answers
from keras_mrl.comparison.nets import Net, backbone, madds
from keras_mrl.comparison.plan import Plan, Speed, fitted, subset, taken_up
from keras_mrl.comparison.report import NAMES
from keras_mrl.comparison.splits import check_unseen, digests, load_parts, unseen_classes
from keras_mrl.comparison.training import held
from keras_mrl.evaluation import LinearProbe, linear_probe, mean_average_precision_at_k
from keras_mrl_cli.__main__ import main
from keras_mrl_serving import CascadePolicy

Array = npt.NDArray[Any]
PLAN = Plan(dims=(4, 8), seeds=1, epochs=3, filters=8, flip=False, unseen=False, rows=60)


def pictures(rows: int = 60, classes: int = 3, seed: int = 0) -> Images:
    pixels = np.random.default_rng(seed).integers(0, 256, (rows, 8, 8, 1)).astype(np.uint8)
    return Images(pixels, np.arange(rows) % classes, tuple(map(str, range(classes))))


def write(path: Path, training: Images, test: Images | None = None) -> list[str]:
    arrays: dict[str, Array] = {"x_train": training.pixels, "y_train": training.labels}
    if test is not None:
        arrays |= {"x_test": test.pixels, "y_test": test.labels}
    np.savez(path, allow_pickle=False, **arrays)
    return [str(path)]


def test_without_test_images_a_fifth_of_every_class_is_drawn(tmp_path: Path) -> None:
    places = write(tmp_path / "a.npz", pictures())
    training, test, left_out = load_parts(places, None, None)
    assert np.bincount(test.labels).tolist() == [4, 4, 4]
    assert np.bincount(training.labels).tolist() == [16, 16, 16]
    assert left_out == 0
    assert sorted(digests(training) + digests(test)) == sorted(digests(pictures()))
    again, _, _ = load_parts(places, None, None)
    np.testing.assert_array_equal(again.pixels, training.pixels)


def test_the_second_part_of_an_npz_is_the_test(tmp_path: Path) -> None:
    second = pictures(seed=1)
    places = write(tmp_path / "a.npz", pictures(), second)
    training, test, _ = load_parts(places, None, None)
    assert digests(test) == digests(second)
    assert digests(training) == digests(pictures())


def test_a_test_image_that_training_has_is_left_out(tmp_path: Path) -> None:
    second = pictures(seed=1)
    second.pixels[7] = pictures().pixels[3]
    places = write(tmp_path / "a.npz", pictures(), second)
    training, test, left_out = load_parts(places, None, None)
    assert left_out == 1
    assert len(test.labels) == 59
    assert not set(digests(training)) & set(digests(test))
    np.testing.assert_array_equal(test.labels, np.delete(second.labels, 7))


def test_classes_of_the_test_images_are_numbered_as_in_training(tmp_path: Path) -> None:
    second = pictures(seed=1)
    kept = second.labels > 0
    write(tmp_path / "b.npz", second.take(kept))
    training = write(tmp_path / "a.npz", pictures())
    _, test, _ = load_parts(training, [str(tmp_path / "b.npz")], None)
    np.testing.assert_array_equal(test.labels, second.labels[kept])


def test_images_that_make_no_comparison_are_refused(tmp_path: Path) -> None:
    places = write(tmp_path / "a.npz", pictures())
    strange = write(tmp_path / "b.npz", pictures(classes=4, seed=1))
    with pytest.raises(ComparisonError, match=r"Received: 3, which --data has not\."):
        load_parts(places, strange, None)
    few = write(tmp_path / "c.npz", pictures(rows=9, seed=1))
    with pytest.raises(
        ComparisonError, match=r"Received: 3 classes, 60 training images, 9 test im"
    ):
        load_parts(places, few, None)
    with pytest.raises(ComparisonError, match=r"0 test images, 60 more that training has too\."):
        load_parts(places, places, None)
    same = pictures(seed=1)
    same.pixels[8:] = same.pixels[8]
    with pytest.raises(ComparisonError, match=r"10 different test im.* 60 test images \(9 differ"):
        load_parts(places, write(tmp_path / "same.npz", same), None)
    coloured = str(tmp_path / "d.npz")
    in_colour = np.repeat(pictures(rows=12, seed=1).pixels, 3, axis=-1)
    np.savez(coloured, x_train=in_colour, y_train=np.arange(12) % 3)
    with pytest.raises(ComparisonError, match=r"Received: 3 and 1 of them\."):
        load_parts(places, [coloured], None)
    both = write(tmp_path / "e.npz", pictures(seed=2), pictures(seed=3))
    with pytest.raises(ComparisonError, match=r"Received: some in .*e\.npz alone\."):
        load_parts([*places, *both], None, None)


def test_unseen_classes_need_images_to_search_among() -> None:
    check_unseen(pictures(60, 12), pictures(24, 12, seed=1))
    with pytest.raises(ComparisonError, match=r"Received: 2 classes with 8 and 4\."):
        check_unseen(pictures(48, 12), pictures(24, 12, seed=1))
    with pytest.raises(ComparisonError, match=r"Received: 1 classes with 12 and 4\."):
        check_unseen(pictures(60, 5), pictures(20, 5, seed=1))


def test_a_comparison_goes_on_as_it_was_asked_for(tmp_path: Path) -> None:
    note = tmp_path / "plan.json"
    assert taken_up(note, {"epochs": 3, "dims": [4, 8]}, lambda: PLAN) == PLAN

    def never() -> Plan:
        raise AssertionError

    assert taken_up(note, {"epochs": 3, "dims": [4, 8]}, never) == PLAN
    with pytest.raises(ComparisonError, match=r"Received: epochs=4 after 3\. "):
        taken_up(note, {"epochs": 4, "dims": [4, 8]}, never)
    note.write_text(note.read_text()[:40])
    with pytest.raises(ComparisonError, match="which is damaged"):
        taken_up(note, {"epochs": 3, "dims": [4, 8]}, never)


def test_a_folder_is_of_one_comparison_and_one_process(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with held(out, []):
        with pytest.raises(ComparisonError, match="where another is at work"), held(out, []):
            pass
    (out / "plan.json").touch()
    (out / "report.html").touch()
    with held(out, []):
        pass
    with pytest.raises(ComparisonError, match="--out must not lie in the images"):
        with held(out, [str(tmp_path)]):
            pass
    killed = tmp_path / "killed"
    killed.mkdir()
    (killed / ".partial-splits.npz").touch()
    with held(killed, []):
        pass
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "report.html").touch()
    with pytest.raises(ComparisonError, match=r"strange with report\.html\."), held(strange, []):
        pass


@pytest.mark.parametrize(
    ("seconds", "filters", "epochs", "rows"),
    [(10_000, 64, 30, 600), (60, 32, 11, 600), (2, 8, 6, 148)],
)
def test_a_budget_takes_the_largest_net_that_has_time(
    seconds: float, filters: int, epochs: int, rows: int
) -> None:
    found = fitted(PLAN, pictures(600, 2), seconds, lambda size: Speed(32 * 1_000 / size, 0.0))
    assert found.filters == filters
    assert found.epochs == pytest.approx(epochs, abs=1)
    assert found.rows == pytest.approx(rows, abs=2)
    costs = len(PLAN.nets) - 1 + 2.2
    needed = costs * found.epochs * found.rows / (32_000 / found.filters)
    assert needed <= 0.8 * seconds


def test_a_budget_without_room_leaves_some_images_of_every_class() -> None:
    found = fitted(PLAN, pictures(600, 2), 0.1, lambda _: Speed(1000, 1.0))
    assert (found.filters, found.epochs, found.rows) == (8, 6, 20)


def test_measuring_stops_where_the_next_net_would_find_no_time() -> None:
    measured: list[int] = []

    def measure(filters: int) -> Speed:
        measured.append(filters)
        return Speed(4_000 * 8 / filters, 0.0)

    assert fitted(PLAN, pictures(600, 2), 20, measure).filters == 16
    assert measured == [8, 16]


def test_time_to_start_a_net_is_not_time_to_train_it() -> None:
    images = pictures(600, 2)
    quick = fitted(PLAN, images, 60, lambda _: Speed(500, 0.0))
    slow = fitted(PLAN, images, 60, lambda _: Speed(500, 3.0))
    assert slow.epochs * slow.rows < 0.8 * quick.epochs * quick.rows


def test_a_budget_counts_the_nets_that_do_not_see_all() -> None:
    plan, images = replace(PLAN, unseen=True), pictures(600, 2)
    assert len(plan.nets) == len(PLAN.nets) + 1 + len(PLAN.dims)
    found = fitted(plan, images, 10, lambda _: Speed(1_000, 0.0))
    costs = len(PLAN.nets) - 1 + 2.2 + 0.8 * (1 + len(PLAN.dims))
    assert found.rows == pytest.approx(0.8 * 10 * 1_000 / costs / found.epochs, abs=2)


def test_fewer_images_are_a_share_of_every_class() -> None:
    images = pictures(90)
    some = subset(images, 30)
    assert np.bincount(some.labels).tolist() == [10, 10, 10]
    assert set(digests(some)) <= set(digests(images))
    assert subset(images, 90) is images


@pytest.mark.backend
def test_multiply_adds_are_those_of_every_kernel() -> None:
    # Convolutions of a net of 8 filters on 16 x 16: input channels x output channels x 9 x places.
    places = {8: 8 * 8, 4: 4 * 4, 2: 2 * 2}
    by_hand = 9 * 3 * 8 * places[8]
    by_hand += 9 * (8 * 16 + 2 * 16 * 16) * places[4]
    by_hand += 9 * (16 * 32 + 2 * 32 * 32) * places[2]
    by_hand += 9 * 32 * 64 * places[2] + 64 * 5
    assert madds(backbone((16, 16, 3), width=5, filters=8)) == by_hand


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--dims", "8,4"], "must be two or more rising integers"),
        (["--dims", "8"], "must be two or more rising integers"),
        (["--dims", "8,x"], "must be integers with commas"),
        (["--epochs", "0"], "--epochs must be at least 1"),
        (["--budget", "nan"], "--budget must be at least 0.1"),
        (["--budget", "5", "--epochs", "3"], "Received: --budget with --epochs."),
        (["--nets", "3"], "--nets"),
    ],
)
def test_what_no_comparison_can_mean_is_refused(
    flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compare", "--data", str(tmp_path), "--out", str(tmp_path / "out"), *flags]
    try:
        status = main(command)
    except SystemExit as stopped:
        status = int(str(stopped.code))
    assert status == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which digits were compared, once: `test_comparing` trains on every backend."""
    folder = tmp_path_factory.mktemp("compared")
    digits = load_digits()
    order = np.random.default_rng(0).permutation(1200)
    pixels = (digits.images[order] * 255 / 16).astype(np.uint8)
    np.savez(folder / "digits.npz", x_train=pixels, y_train=digits.target[order])
    assert main(command(folder)) == 0
    return folder


def command(folder: Path) -> list[str]:
    given = {"data": folder / "digits.npz", "out": folder / "out", "dims": "4,12", "epochs": 6}
    flags = [f"--{name}={value}" for name, value in given.items()]
    return ["compare", *flags, "--filters=8", "--no-flip", "--unseen"]


def results_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out" / "results.json").read_text())
    return found


def test_the_numbers_are_those_of_the_saved_answers(compared: Path) -> None:
    results, nets = results_of(compared), compared / "out" / "nets"
    training, test, _ = load_parts([str(compared / "digits.npz")], None, None)
    for method, folder in (("mrl", "mrl-0"), ("slimmable", "slimmable-0"), ("mrl_e", "mrl_e-0")):
        right = np.load(nets / folder / "test_logits.npy").argmax(-1) == test.labels[:, None]
        assert results["top1"][method] == {"4": [right[:, 0].mean()], "12": [right[:, 1].mean()]}
    full = keras.saving.load_model(nets / "ff_12-0" / "model.keras")
    features = np.load(nets / "ff_12-0" / "test_12.npy")
    kernel, bias = map(keras.ops.convert_to_numpy, full.head.weights_at(12))
    left, sizes, right = np.linalg.svd(kernel.astype(np.float64), full_matrices=False)
    logits = features @ ((left[:, :4] * sizes[:4]) @ right[:4]) + bias
    assert results["top1"]["svd"]["4"] == [(logits.argmax(-1) == test.labels).mean()]
    shown = np.load(nets / "ff_12-0" / "train_12.npy")
    mean = shown.mean(axis=0, dtype=np.float64)
    _, _, axes = np.linalg.svd(shown - mean, full_matrices=False)
    for name, (gallery, queries) in {
        "mrl": (np.load(nets / "mrl-0" / "train_12.npy"), np.load(nets / "mrl-0" / "test_12.npy")),
        "first_coordinates": (shown, features),
        "pca": ((shown - mean) @ axes.T, (features - mean) @ axes.T),
    }.items():
        nearest = NearestNeighbors(n_neighbors=10, metric="cosine").fit(gallery[:, :4])
        ids = nearest.kneighbors(queries[:, :4], return_distance=False)
        hits = training.labels[ids] == test.labels[:, None]
        scores = results["neighbors"][name]["4"]
        assert scores["nn1"] == pytest.approx(hits[:, 0].mean(), abs=0.005)
        assert scores["p10"] == pytest.approx(hits.mean(), abs=0.002)


def test_heads_are_judged_beyond_the_best_answer(compared: Path) -> None:
    results, nets = results_of(compared), compared / "out" / "nets"
    _, test, _ = load_parts([str(compared / "digits.npz")], None, None)
    for method, net, at in (("mrl", "mrl-0", 1), ("ff", "ff_12-0", 0), ("mrl_e", "mrl_e-0", 1)):
        logits = np.load(nets / net / "test_logits.npy")[:, at].astype(np.float64)
        best = np.argsort(-logits, axis=-1)
        right = best[:, 0] == test.labels
        found = {name: results[name][method]["12"] for name in ("top5", "ece")}
        assert found["top5"] == [(best[:, :5] == test.labels[:, None]).any(axis=1).mean()]
        shares = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
        sure, missed = shares.max(axis=-1), 0.0
        for low in np.arange(15) / 15:
            among = (sure >= low) & (sure < low + 1 / 15)
            missed += abs((right[among] - sure[among]).sum()) / len(sure)
        assert found["ece"] == [pytest.approx(missed, abs=1e-4)]
    methods = results["top1"].keys()
    for measure in ("top1", "top5", "ece"):
        assert results[measure].keys() == methods
        assert all(by_dim.keys() == {"4", "12"} for by_dim in results[measure].values())


def test_a_linear_probe_is_trained_on_the_features(compared: Path) -> None:
    results, nets = results_of(compared), compared / "out" / "nets"
    training, test, _ = load_parts([str(compared / "digits.npz")], None, None)
    shown, asked = (np.load(nets / "mrl-0" / f"{part}_12.npy") for part in ("train", "test"))
    scaler = StandardScaler().fit(shown[:, :4])
    fitted = LogisticRegression(max_iter=1000).fit(scaler.transform(shown[:, :4]), training.labels)
    right = fitted.score(scaler.transform(asked[:, :4]), test.labels)
    assert results["probe"]["mrl"]["4"] == [pytest.approx(right, abs=0.01)]
    assert results["about"]["probed"] == len(training.labels)


def test_a_probe_sees_so_many_rows_and_no_more(
    compared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, test, _ = load_parts([str(compared / "digits.npz")], None, None)
    answers = Answers(compared / "out" / "nets", replace(PLAN, dims=(4, 12)), training, test)
    seen: list[int] = []

    def noted(features: Array, labels: Array) -> LinearProbe:
        seen.append(len(features))
        return linear_probe(features, labels)

    monkeypatch.setattr(measures, "PROBED", 200)
    monkeypatch.setattr(measures, "linear_probe", noted)
    assert measures.probes(answers)["mrl"]["12"][0] > 0.3
    assert seen == [200, 200]


def test_classes_that_taught_a_probe_nothing_are_its_last_answer() -> None:
    probe = LinearProbe(kernel=-np.eye(2), bias=np.zeros(2), classes=np.array([0, 2]))
    logits = measures.of_all(probe, np.array([[5.0, 1.0]]), 4)
    assert np.argsort(-logits, kind="stable").tolist() == [[2, 0, 1, 3]]


def neighbors(gallery: Array, queries: Array, k: int = 10) -> Array:
    found = NearestNeighbors(n_neighbors=k, metric="cosine").fit(gallery)
    return np.asarray(found.kneighbors(queries, return_distance=False))


def test_what_taught_does_not_judge(compared: Path) -> None:
    results, nets = results_of(compared), compared / "out" / "nets"
    with np.load(compared / "out" / "splits.npz") as parts:
        labels, shown = parts["test_labels"], parts["train_labels"]
        taught = [parts[f"holdout_{split}"] for split in range(10)]
    judged = [np.setdiff1d(np.arange(len(labels)), rows) for rows in taught]
    logits = np.load(nets / "mrl-0" / "test_logits.npy")
    full = np.load(nets / "ff_12-0" / "test_logits.npy")[:, -1].argmax(-1) == labels
    for split in (0, 9):
        policy = CascadePolicy.learn(logits[taught[split]], labels[taught[split]], (4, 12))
        report = policy.evaluate(logits[judged[split]], labels[judged[split]])
        found = results["cascades"]["splits"]["greedy"][split]
        for measure in ("accuracy", "full_accuracy", "expected_dim", "cumulative_dim"):
            assert found[measure] == pytest.approx(getattr(report, measure))
        assert found["ff_accuracy"] == full[judged[split]].mean()
        right = (logits[judged[split]].argmax(-1) == labels[judged[split]][:, None]).any(axis=1)
        assert results["cascades"]["splits"]["oracle"][split]["accuracy"] == right.mean()
    gallery, queries = (np.load(nets / "mrl-0" / f"{part}_12.npy") for part in ("train", "test"))
    (row,) = (r for r in results["retrieval"]["mrl"]["rows"] if r["kind"] == "two stages")
    assert row["dims"] == [4, 12]
    (longest,) = row["shortlists"]
    assert longest == len(gallery) // 50
    assert row["madds"] == len(gallery) * 4 + longest * 12
    ids = np.stack(
        [
            near[neighbors(gallery[near], query[None], 10)[0]]
            for near, query in zip(
                neighbors(gallery[:, :4], queries[:, :4], longest), queries, strict=True
            )
        ]
    )
    hits = shown[ids] == labels[:, None]
    for name, rows in (("map10", judged[0]), ("holdout_map10", taught[0])):
        assert row[name] == pytest.approx(mean_average_precision_at_k(hits[rows]), abs=0.003)


def test_classes_never_seen_were_not_seen(compared: Path) -> None:
    training, test, _ = load_parts([str(compared / "digits.npz")], None, None)
    hidden = unseen_classes(10)
    shown, asked = (split_classes(part, hidden)[1] for part in (training, test))
    scores = results_of(compared)["unseen"]
    assert list(scores["ff"]) == ["4", "12"]
    for method, name in (
        ("mrl", "mrl_seen-0"),
        ("ff", "ff_4_seen-0"),
        ("first_coordinates", "ff_12_seen-0"),
    ):
        model = keras.saving.load_model(compared / "out" / "nets" / name / "model.keras")
        assert model.head.num_classes == 8
        sides = [model.backbone.predict(part.pixels, verbose=0) for part in (shown, asked)]
        hits = shown.labels[neighbors(sides[0][:, :4], sides[1][:, :4])] == asked.labels[:, None]
        assert scores[method]["4"]["p10"] == pytest.approx(hits.mean(), abs=0.003)
    assert scores["ff"]["12"] == pytest.approx(
        {name: scores["first_coordinates"]["12"][name] for name in scores["ff"]["12"]}
    )
    named = [training.names[number] for number in hidden]
    assert results_of(compared)["about"]["unseen"] == named
    with np.load(compared / "out" / "splits.npz") as parts:
        assert parts["unseen"].tolist() == named
    assert f"<dd>{', '.join(named)}</dd>" in (compared / "out" / "report.html").read_text()
    known = np.load(compared / "out" / "nets" / "ff_12_seen-0" / "train_12.npy")
    assert len(known) == len(training.labels) - len(shown.labels)
    mean = known.mean(axis=0, dtype=np.float64)
    _, _, axes = np.linalg.svd(known - mean, full_matrices=False)
    sides = [(side - mean) @ axes[:4].T for side in sides]
    hits = shown.labels[neighbors(*sides)] == asked.labels[:, None]
    assert scores["pca"]["4"]["p10"] == pytest.approx(hits.mean(), abs=0.003)


def test_every_method_is_what_its_name_says(compared: Path) -> None:
    results, nets = results_of(compared), compared / "out" / "nets"
    load = keras.saving.load_model
    mrl, tied = (load(nets / name / "model.keras") for name in ("mrl-0", "mrl_e-0"))
    assert (mrl.head.tied, tied.head.tied) == (False, True)
    boosted, plain = Net("mrl_boosted", (4, 12)).loss(), Net("mrl", (4, 12)).loss()
    truth, logits = np.array([0]), np.array([[[0.0, 3.0], [0.0, 1.0]]], np.float32)
    first, both = np.log1p(np.exp(3.0)), np.log1p(np.exp(3.0)) + np.log1p(np.exp(1.0))
    assert float(plain(truth, logits)) == pytest.approx(both, rel=1e-5)
    assert float(boosted(truth, logits)) == pytest.approx(both + first, rel=1e-5)
    training, test, _ = load_parts([str(compared / "digits.npz")], None, None)
    for dim in (4, 12):
        shown, asked = (np.load(nets / f"ff_{dim}-0" / f"{p}_{dim}.npy") for p in ("train", "test"))
        assert shown.shape[1] == dim
        hits = training.labels[neighbors(shown, asked)] == test.labels[:, None]
        assert results["neighbors"]["ff"][str(dim)]["p10"] == pytest.approx(hits.mean(), abs=0.003)
        full = [np.load(nets / "ff_12-0" / f"{part}_12.npy") for part in ("train", "test")]
        probe = random_probe(full[0], training.labels, dim)
        right = probe.predict(full[1]) == test.labels
        assert results["top1"]["rand_lp"][str(dim)] == [pytest.approx(right.mean(), abs=0.01)]
    assert results["madds"]["head"] == 120
    assert all(minutes > 0 for minutes in results["minutes"].values())


def test_the_trained_nets_learned_something(compared: Path) -> None:
    results = results_of(compared)
    assert results["top1"]["mrl"]["12"][0] > 0.3  # a tenth by chance
    assert results["neighbors"]["ff"]["12"]["nn1"] > 0.5
    assert results["unseen"]["mrl"]["12"]["nn1"] > 0.6  # two classes
    for found in results["retrieval"].values():
        whole = found["rows"][1]
        assert whole["dims"] == [12]
        assert all(row["madds"] <= 1.2 * whole["madds"] for row in found["rows"])
        assert found["rows"][found["chosen"]]["holdout_map10"] >= whole["holdout_map10"] - 0.005
    for splits in results["cascades"]["splits"].values():
        assert len(splits) == 10
        assert all(4 <= split["expected_dim"] <= 12 for split in splits)
    for split in results["cascades"]["search_over_greedy"]:
        assert split["taught"]["expected_dim"] <= 1e-6
        assert split["taught"]["accuracy"] >= -1e-9


def test_again_nothing_is_trained_and_the_results_are_the_same(
    compared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = results_of(compared)

    def never(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(import_module("keras_mrl.comparison.compare"), "train", never)
    assert main([*command(compared), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    del before["about"]["command"], printed["about"]["command"]
    assert printed == before
    assert main([*command(compared), "--seeds=2"]) == 1
    assert "Received: seeds=2 after 1." in capsys.readouterr().err


class Addresses(HTMLParser):
    """Collects what a page would load, and checks that every element is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img"):
            self.open.append(tag)
        assert tag not in ("script", "link", "iframe", "base", "object", "embed")
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_report_needs_nothing_but_itself(compared: Path) -> None:
    page = (compared / "out" / "report.html").read_text()
    reader = Addresses()
    reader.feed(page)
    assert not reader.open
    assert len(reader.found) == 4
    assert "@import" not in page
    assert "url(" not in page
    for address in reader.found:
        kind, _, data = address.partition(",")
        assert kind == "data:image/svg+xml;base64"
        svg = base64.b64decode(data).decode()
        for element in xml.etree.ElementTree.fromstring(svg).iter():
            for name, value in element.items():
                if name.endswith(("href", "src")):
                    assert value.startswith("#")
        assert all(inner.startswith("#") for inner in re.findall(r"url\(([^)]*)\)", svg))


def test_tables_and_figures_say_the_same_numbers(compared: Path) -> None:
    out, results = compared / "out", results_of(compared)
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    head = {(r["method"], r["dim"]): float(r["value"]) for r in rows if r["measure"] == "top1"}
    for method, by_dim in results["top1"].items():
        for dim, values in by_dim.items():
            assert head[method, dim] == values[0]
    markdown = (out / "results.md").read_text()
    page = (out / "report.html").read_text()
    for dim in ("4", "12"):
        shown = f"{100 * results['top1']['mrl'][dim][0]:.2f}"
        assert f" {shown} |" in markdown
        assert f"<td>{shown}</td>" in page
    for name in ("accuracy", "neighbors", "adaptive", "retrieval"):
        assert imread(out / f"{name}.png").std() > 0.05
    assert [line.count("|") for line in markdown.splitlines() if line.startswith("| MRL |")]
    values = {(r["part"], r["method"], r["dim"], r["measure"]): float(r["value"]) for r in rows}
    for title, part, measure, found in (
        ("Top-5 accuracy of the head, %", "head", "top5", results["top5"]),
        ("Expected calibration error of the head, points", "head", "ece", results["ece"]),
        (
            "Accuracy of a linear probe of the features, trained on 964 training images, %",
            "probe",
            "probe",
            results["probe"],
        ),
        *(
            (
                f"k-NN accuracy (the vote of the 10 nearest), {where}, %",
                part,
                "knn",
                {
                    method: {dim: [scores["knn"]] for dim, scores in by_dim.items()}
                    for method, by_dim in results[part].items()
                },
            )
            for part, where in (("neighbors", "all classes"), ("unseen", "classes never seen"))
        ),
    ):
        table = markdown.partition(f"{title}\n\n")[2].partition("\n\n")[0]
        shown = page.partition(f"<caption>{title}</caption>")[2].partition("</table>")[0]
        for method, by_dim in found.items():
            cells = [f"{100 * by_dim[dim][0]:.2f}" for dim in ("4", "12")]
            assert f"| {NAMES[method]} | {' | '.join(cells)} |" in table
            assert f"<td>{NAMES[method]}</td>" + "".join(f"<td>{c}</td>" for c in cells) in shown
            for dim, (value,) in by_dim.items():
                assert values[part, method, dim, measure] == value
    assert (
        "| FF (a net per dim) |"
        in markdown.partition("k-NN accuracy (the vote")[2]
        .partition("classes never seen, %\n\n")[2]
        .partition("\n\n")[0]
    )


def test_every_sentence_of_the_findings_carries_its_number(
    compared_text: Callable[..., list[str]],
) -> None:
    better, worse = compared_text(0.02), compared_text(-0.02)
    # Twice the standard deviation of a difference: 2 sqrt(2 x .6 x .4 / 100,000).
    assert better[0].startswith("Differences below 0.4 points are noise among 100,000 test images")
    assert "costs no more than a point: one net replaces 2." in better[0]
    assert "MRL is 2.0 points above FF" in better[0]
    assert "costs more than a point here." in worse[0]
    assert "MRL is 2.0 points below FF" in worse[0]
    assert all(re.search(r"\d", sentence) for sentence in better)


def test_no_verdict_is_given_where_noise_or_chance_would_give_it(
    compared_text: Callable[..., list[str]],
) -> None:
    few = compared_text(-0.02, images=100)
    assert "Differences below 13.9 points are noise" in few[0]
    assert "No difference is seen on average." in few[0]
    untrained = compared_text(0.0, chance=0.4)
    assert untrained[0].startswith("Nothing can be said: the best separate net is 60.0% right")
    uneven = compared_text(0.02, first=-0.03)
    assert "no more than a point on average, but 3.0 at one dim." in uneven[0]


@pytest.fixture
def compared_text() -> Callable[..., list[str]]:
    """The findings of results in which MRL is ahead of the separate nets by so much."""
    from keras_mrl.comparison.report import findings

    def text(
        ahead: float, images: int = 100_000, chance: float = 0.25, first: float | None = None
    ) -> list[str]:
        separate = {"4": [0.5], "8": [0.6]}
        mrl = {dim: [values[0] + ahead] for dim, values in separate.items()}
        if first is not None:
            mrl["4"] = [0.5 + first]
        scores = {dim: {"nn1": values[0]} for dim, values in separate.items()}
        split = {
            "accuracy": 0.6,
            "full_accuracy": 0.6,
            "ff_accuracy": 0.6,
            "expected_dim": 5.0,
            "cumulative_dim": 6.0,
        }
        level = {part: {"accuracy": 0.0, "expected_dim": 0.0} for part in ("taught", "judged")}
        return findings(
            {
                "about": {"images": [0, images], "classes": 1 / chance},
                "plan": {"dims": [4, 8]},
                "madds": {"backbone": 900, "head": 100},
                "top1": {"mrl": mrl, "ff": separate, "svd": separate, "rand_lp": separate},
                "neighbors": {"mrl": scores, "pca": scores, "first_coordinates": scores},
                "cascades": {
                    "refused": "",
                    "risk": 0.02,
                    "delta": 0.1,
                    "splits": {"greedy": [split], "certified": [split], "oracle": [split]},
                    "search_over_greedy": [level],
                },
                "retrieval": {},
            }
        )

    return text


def test_a_cascade_saves_a_share_of_the_head(compared_text: Callable[..., list[str]]) -> None:
    (sentence,) = (line for line in compared_text(0.0) if line.startswith("The cascade 'greedy'"))
    assert "at 5.0 of 8 dims on average (1.6 times fewer)" in sentence
    assert "the same net at 8 dims for every row 60.00%" in sentence
    assert "saves 2.50% of the model's multiply-adds" in sentence  # 100 / 1000 x (8 - 6) / 8
    (certified,) = (line for line in compared_text(0.0) if "'certified'" in line)
    assert "with a chance of 0.9 over" in certified
    assert "in at most 2% of new rows" in certified
