"""One real run of `keras-mrl demo`, and every number of its report counted again from its files."""

import json
import os
import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import pytest
from matplotlib.image import imread
from sklearn.datasets import load_digits

from keras_mrl_cli.digits import NOISE, calibrate, load_parts, train, views
from keras_mrl_serving import stage_logits
from tests.helpers.cli import KERAS_MRL, Call
from tests.helpers.laws import on_backends

BACKEND = keras.backend.backend()
DIMS = (2, 4, 8, 16, 32, 64)
EXITS = ("glance", "block1", "last")
POINT = 0.01
SOAK = bool(os.environ.get("KERAS_MRL_SOAK"))
Array = npt.NDArray[Any]


@dataclass
class Run:
    """A run of the demo that has ended well."""

    out: Path
    stdout: str
    stderr: str

    @cached_property
    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = json.loads(self.stdout.splitlines()[-1])
        return report

    @cached_property
    def answers(self) -> dict[str, Array]:
        with np.load(self.out / "predictions.npz") as file:
            return dict(file)


def run(out: Path, *flags: str) -> Run:
    done = subprocess.run(
        [*KERAS_MRL, "demo", "--json", f"--backend={BACKEND}", f"--out={out}", *flags],
        cwd=out.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Run(out, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(tmp_path_factory.mktemp("demo") / "out")


def by_dim(values: Any) -> dict[str, float]:
    return {str(dim): value for dim, value in zip(DIMS, values, strict=True)}


def average_precision(hits: Array) -> float:
    """The paper's AP@10 of one query: precision at each hit, over ten."""
    matches, total = 0, 0.0
    for rank, hit in enumerate(hits.tolist(), start=1):
        if hit:
            matches += 1
            total += matches / rank
    return total / 10


def name_of(exit_: str, dim: int) -> str:
    return str(dim) if exit_ == "last" else f"{exit_}_{dim}"


# Multiply-adds by hand: what is before each exit, and its branch to 64 features.
BEFORE = {"glance": 0, "block1": 64 * 9 * 32}
BEFORE["last"] = BEFORE["block1"] + 16 * 9 * 32 * 64 + 16 * 9 * 64 * 64
BRANCH = {"glance": 64 * 64 + 64 * 64, "block1": 64 * 32 * 64, "last": 16 * 64 * 64}


def costs_of(stages: list[tuple[str, int]]) -> list[int]:
    """What a row costs that stops at each stage: all that is before it, and all stages asked."""
    costs = []
    for number, (exit_, _) in enumerate(stages, start=1):
        asked = stages[:number]
        branches = sum(BRANCH[name] for name in {name for name, _ in asked})
        costs.append(BEFORE[exit_] + branches + sum(10 * dim for _, dim in asked))
    return costs


def counted(answers: dict[str, Array]) -> dict[str, Any]:
    """Every number of the report, from the server's answers alone."""
    truth, gallery = answers["test_labels"], answers["gallery_labels"]
    rows, width = len(gallery), DIMS[-1]
    fixed = {
        name_of(exit_, dim): {
            "accuracy": float(np.mean(answers["fixed_class_ids"][:, i, j] == truth)),
            "cost": float(costs_of([(exit_, dim)])[0]),
            "milliseconds": float(answers["fixed_milliseconds"][i, j]),
        }
        for i, exit_ in enumerate(EXITS)
        for j, dim in enumerate(DIMS)
    }
    accuracy = [fixed[str(dim)]["accuracy"] for dim in DIMS]
    holdout = [
        float(np.mean(answers["holdout_logits"][:, index].argmax(-1) == answers["holdout_labels"]))
        for index in range(len(DIMS))
    ]
    best = holdout.index(max(holdout))
    stopped = answers["adaptive_dims"].tolist()
    stages = list(zip(answers["stage_exits"].tolist(), answers["stage_dims"].tolist(), strict=True))
    decided = list(zip(answers["adaptive_exits"].tolist(), stopped, strict=True))
    cost_of = dict(zip(stages, costs_of(stages), strict=True))
    dims_of = {stage: sum(d for _, d in stages[: stages.index(stage) + 1]) for stage in stages}
    adaptive = float(np.mean(answers["adaptive_class_ids"] == truth))
    adaptive_cost = sum(cost_of[stage] for stage in decided) / len(decided)
    enough = min(adaptive, accuracy[-1] - 0.5 * POINT) - 1e-12
    rival = min((own["cost"], name) for name, own in fixed.items() if own["accuracy"] >= enough)[1]
    adaptive_ms = float(answers["adaptive_milliseconds"])
    requests = {
        str(size): {"adaptive": float(adaptive), "full": float(full)}
        for size, (adaptive, full) in zip(
            answers["request_sizes"], answers["request_milliseconds"], strict=True
        )
    }
    faster_from = None
    for size, own in reversed(requests.items()):
        if own["adaptive"] > own["full"]:
            break
        faster_from = int(size)
    hits = [
        gallery[answers["neighbors_by_dim"][:, index]] == truth[:, None]
        for index in range(len(DIMS))
    ]
    map10 = [
        float(np.mean([average_precision(query) for query in hits_of_dim])) for hits_of_dim in hits
    ]
    funnel = gallery[answers["funnel_neighbors"]] == truth[:, None]
    shortlist = int(answers["funnel_shortlist"])
    first, last = answers["funnel_dims"].tolist()
    return {
        "accuracy_by_dim": by_dim(accuracy),
        "full_accuracy": accuracy[-1],
        "best_fixed_dim": DIMS[best],
        "best_fixed_accuracy": accuracy[best],
        "fixed_dims": fixed,
        "cheapest_fixed": rival,
        "adaptive_accuracy": adaptive,
        "adaptive_cost": adaptive_cost,
        "adaptive_milliseconds": adaptive_ms,
        "cost_share": adaptive_cost / fixed[rival]["cost"],
        "time_share": adaptive_ms / fixed[rival]["milliseconds"],
        "request_milliseconds": requests,
        "faster_from": faster_from,
        "exit_fractions": {
            name_of(*stage): decided.count(stage) / len(decided) for stage in stages
        },
        "expected_dim": sum(stopped) / len(stopped),
        "cumulative_dim": sum(dims_of[stage] for stage in decided) / len(stopped),
        "stopped_by_dim": by_dim([stopped.count(dim) for dim in DIMS]),
        "p10_by_dim": by_dim([float(hits_of_dim.mean()) for hits_of_dim in hits]),
        "map10_by_dim": by_dim(map10),
        "p10_funnel": float(funnel.mean()),
        "map10_exact": map10[-1],
        "map10_funnel": float(np.mean([average_precision(query) for query in funnel])),
        "madds_by_dim": by_dim([rows * dim for dim in DIMS]),
        "exact_madds": rows * width,
        "funnel_madds": rows * first + shortlist * last,
        "funnel": {"dims": [first, last], "shortlists": [shortlist], "k": funnel.shape[1]},
        "gallery_size": rows,
        "test_size": len(truth),
        "backend": BACKEND,
        "seed": 0,
        "epochs": 7,
    }


def flat(report: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The report's leaves by their path."""
    leaves: dict[str, Any] = {}
    for key, value in report.items():
        if isinstance(value, dict):
            leaves |= flat(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = value
    return leaves


@pytest.mark.backend
def test_every_number_of_the_report_is_in_the_answers(demo: Run) -> None:
    reported, again = flat(demo.report), flat(counted(demo.answers))
    assert set(reported) == set(again)
    for path, value in again.items():
        if isinstance(value, float):
            assert reported[path] == pytest.approx(value, rel=1e-9, abs=1e-12), path
        else:
            assert reported[path] == value, path


@pytest.mark.backend
def test_the_answers_are_to_the_right_questions(demo: Run) -> None:
    training, holdout, test = load_parts(seed=0)
    answers = demo.answers
    np.testing.assert_array_equal(answers["dims"], DIMS)
    np.testing.assert_array_equal(answers["exits"], EXITS)
    np.testing.assert_array_equal(answers["test_labels"], np.tile(test.labels, 2))
    np.testing.assert_array_equal(answers["holdout_labels"], holdout.labels)
    np.testing.assert_array_equal(answers["gallery_labels"], training.labels)
    queries = 2 * len(test.labels)
    assert answers["fixed_class_ids"].shape == (queries, len(EXITS), len(DIMS))
    assert answers["neighbors_by_dim"].shape == (queries, len(DIMS), 10)
    for name in ("neighbors_by_dim", "funnel_neighbors"):
        ids = np.sort(answers[name], axis=-1)
        assert ids.min() >= 0
        assert ids.max() < len(training.labels)
        assert (np.diff(ids) > 0).all()  # no row twice


def test_the_parts_share_no_image() -> None:
    parts = load_parts(seed=0)
    digits = load_digits()
    other = load_parts(seed=1)  # draws training and holdout anew, and leaves the test as it is
    assert (other[0].images[:9] != parts[0].images[:9]).any()
    np.testing.assert_array_equal(other[2].images, parts[2].images)
    pixels = np.concatenate([part.images.reshape(-1, 64) * 16 for part in parts])
    labels = np.concatenate([part.labels for part in parts])
    rows = np.column_stack([pixels, labels])
    whole = np.column_stack([digits.data, digits.target])
    # Together they are the data set, every image once, so none is in two of them.
    np.testing.assert_array_equal(
        rows[np.lexsort(rows.T)], whole[np.lexsort(whole.T)].astype(np.float32)
    )
    assert len({row.tobytes() for row in rows}) == len(rows) == sum(len(p.labels) for p in parts)
    assert [len(part.labels) for part in parts] == [449, 898, 450]


def test_views_are_moved_by_at_most_a_pixel_and_noisy() -> None:
    part = load_parts(seed=0)[0]
    seen = views(part, copies=3, seed=0)
    again = views(part, copies=3, seed=0)
    np.testing.assert_array_equal(seen.images, again.images)
    np.testing.assert_array_equal(seen.labels, np.tile(part.labels, 3))
    wide = np.pad(part.images[..., 0], ((0, 0), (1, 1), (1, 1)))
    moves = [(down, across) for down in range(3) for across in range(3)]
    moved = np.stack([wide[:, down : down + 8, across : across + 8] for down, across in moves])
    noise = seen.images[..., 0] - np.tile(moved, (1, 3, 1, 1))  # (moves, rows, 8, 8)
    strength = noise.std(axis=(2, 3)).min(axis=0)  # by the move that was made
    assert len(set(noise.std(axis=(2, 3)).argmin(axis=0))) == len(moves)
    assert strength.min() < 0.05 * NOISE
    assert 0.9 * NOISE < strength.max() < 1.3 * NOISE


@pytest.mark.backend
def test_exits_and_dims_differ_and_small_ones_pay_with_accuracy(demo: Run) -> None:
    accuracy = {name: own["accuracy"] for name, own in demo.report["fixed_dims"].items()}
    assert len(accuracy) == len(EXITS) * len(DIMS)
    assert accuracy["glance_2"] < accuracy["glance_64"] < accuracy["block1_64"] < accuracy["64"]
    assert accuracy["2"] < accuracy["8"] - 5 * POINT
    assert accuracy["64"] > 0.92


@pytest.mark.backend
def test_adaptive_classification_keeps_the_accuracy_and_saves_work(demo: Run) -> None:
    # One seed; the mean of ten is held to half a point, below.
    report = demo.report
    assert report["adaptive_accuracy"] >= report["full_accuracy"] - 1.5 * POINT
    assert report["cost_share"] <= 0.7
    assert max(report["exit_fractions"].values()) <= 0.8
    text = " ".join(demo.stdout.split())
    assert f"Adaptive takes {100 * report['cost_share']:.0f}% of its multiply-adds" in text
    for own in report["fixed_dims"].values():
        assert f"{100 * own['accuracy']:.2f}%  {own['cost']:>9,.0f}" in demo.stdout


@pytest.mark.backend
def test_it_says_in_which_requests_adaptive_is_slower(demo: Run) -> None:
    text = " ".join(demo.stdout.split())
    sizes = [*map(int, demo.report["request_milliseconds"])]
    assert sizes == [8, 32, 128, 512, 900]
    for size, own in demo.report["request_milliseconds"].items():
        assert f" {size} {own['adaptive']:.2f} ms {own['full']:.2f} ms " in text
    first = demo.report["faster_from"]
    assert {
        None: "it was slower in requests of any size here",
        8: "Here it was no slower in requests of any size",
    }.get(first, f"it pays in requests of {first} images and more") in text


@pytest.mark.soak
@pytest.mark.backend
@pytest.mark.skipif(not SOAK, reason="ten trainings; `make soak` runs them")
def test_ten_seeds_keep_the_accuracy_at_seven_tenths_of_the_cost() -> None:
    gaps, shares = [], []
    for seed in range(10):
        training, holdout, test = load_parts(seed)
        judged, asked = views(holdout, 1, seed + 1), views(test, 2, seed + 2)
        model = train(views(training, 8, seed), 7, seed, "digits")
        exits = model.all_exits()
        policy, costs = calibrate(model, exits.predict(judged.images, verbose=0), judged)
        stages = stage_logits(exits.predict(asked.images, verbose=0), DIMS)
        report = policy.evaluate(stages, asked.labels)
        assert max(report.exit_fractions) <= 0.8
        enough = min(report.accuracy, report.full_accuracy - 0.5 * POINT) - 1e-12
        rival = min(
            costs.of([stage])[0]
            for stage, own in stages.items()
            if (own.argmax(axis=-1) == asked.labels).mean() >= enough
        )
        gaps.append(report.full_accuracy - report.accuracy)
        shares.append(float(np.dot(report.exit_fractions, costs.of(policy.keys))) / rival)
        print(f"seed {seed}: {gaps[-1]:+.4f} of the accuracy lost, {shares[-1]:.3f} of the cost")
    print(f"mean {np.mean(gaps):+.4f} and {np.mean(shares):.3f}")
    print(f"worst {np.max(gaps):+.4f} and {np.max(shares):.3f}")
    assert np.mean(gaps) <= 0.5 * POINT
    assert np.mean(shares) <= 0.7


@pytest.mark.backend
def test_the_funnel_keeps_the_quality_at_a_third_of_the_cost(demo: Run) -> None:
    report = demo.report
    assert report["funnel"]["shortlists"][0] <= 0.05 * report["gallery_size"]
    assert report["map10_funnel"] >= report["map10_exact"] - 0.5 * POINT
    assert report["funnel_madds"] <= 0.35 * report["exact_madds"]


@pytest.mark.backend
def test_the_report_is_also_a_file(demo: Run) -> None:
    assert json.loads((demo.out / "report.json").read_text()) == demo.report


@pytest.mark.backend
@pytest.mark.parametrize(
    ("name", "shape"), [("accuracy.png", (663, 1440, 3)), ("retrieval.png", (631, 960, 3))]
)
def test_the_plots_are_pictures(demo: Run, name: str, shape: tuple[int, ...]) -> None:
    pixels = imread(demo.out / name)[..., :3]
    assert pixels.shape == shape  # 4 inches, and the rows of the legend
    assert 0.01 < (pixels != 1).any(axis=-1).mean() < 0.3  # lines on white, neither empty nor full


@pytest.mark.backend
def test_everything_is_where_it_says(demo: Run) -> None:
    assert sorted(os.listdir(demo.out)) == [
        "accuracy.png",
        "demo.log",
        "models",
        "predictions.npz",
        "report.json",
        "retrieval.png",
        "server.log",
    ]
    (version,) = os.listdir(demo.out / "models" / "digits")
    place = f"models/digits/{version}"
    assert f"Everything is in {demo.out}: the SavedModel ({place}), " in demo.stdout


@pytest.mark.backend
def test_only_its_own_words_are_on_the_screen(demo: Run) -> None:
    # TensorFlow greets on stderr before it reads TF_CPP_MIN_LOG_LEVEL.
    assert demo.stderr == ""
    assert (demo.out / "demo.log").read_text()


@pytest.mark.backend
def test_it_names_the_commands_to_go_on_with(demo: Run) -> None:
    command = "keras-mrl serve --model_name digits --model_base_path"
    assert f"{command} {demo.out}/models/digits" in demo.stdout


def files(folder: Path) -> dict[Path, tuple[bytes, int]]:
    return {
        file: (file.read_bytes(), file.stat().st_mtime_ns)
        for file in folder.rglob("*")
        if file.is_file()
    }


@pytest.mark.backend
@on_backends("tensorflow")
def test_a_second_run_publishes_a_second_version(demo: Run) -> None:
    # The last test of the file: the second run writes its report over the first one's.
    models = demo.out / "models" / "digits"
    (version,) = models.iterdir()
    first, report = files(version), demo.report
    _ = demo.answers
    second = run(demo.out, "--epochs", "1", "--seed", "3")
    assert len(list(models.glob("*/saved_model.pb"))) == len(os.listdir(models)) == 2
    assert files(version) == first
    assert (second.report["epochs"], second.report["seed"]) == (1, 3)
    assert second.report != report
    assert json.loads((demo.out / "report.json").read_text()) == second.report


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--epochs", "0"], "--epochs must be at least 1. Received: 0. Try 7."),
        (["--seed=-1"], "--seed must lie in 0..4294967295. Received: -1. Leave it out for 0."),
        (
            ["--seed", "4294967296"],
            "--seed must lie in 0..4294967295. Received: 4294967296. Leave it out for 0.",
        ),
    ],
)
def test_values_the_demo_cannot_use(words: list[str], text: str, call: Call, folder: Path) -> None:
    assert call.refused("demo", "--out", "o", *words, status=2) == text
    assert os.listdir(folder) == []


def test_a_backend_of_the_environment_is_checked_too(
    call: Call, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del folder
    monkeypatch.setenv("KERAS_BACKEND", "openvino")
    assert call.refused("demo", "--out", "o", status=2) == (
        "KERAS_BACKEND must be one of tensorflow, jax, torch for the demo. "
        "Received: openvino. Give --backend."
    )


def test_out_must_be_a_folder(call: Call, folder: Path) -> None:
    file = folder / "file"
    file.write_text("mine")
    for out, why in ((file, "File exists"), (file / "below", "Not a directory")):
        assert call.refused("demo", "--out", str(out)) == (
            f"--out must be a folder that can be written. Received: {out} ({why}). Name another."
        )
    assert file.read_text() == "mine"
