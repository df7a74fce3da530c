"""One real run of `keras-mrl demo`, and every number of its report counted again from its files."""

import json
import os
import subprocess
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import pytest
from matplotlib.image import imread
from sklearn.datasets import load_digits

from keras_mrl_cli.demo import load_parts, with_shifts
from tests.helpers.cli import KERAS_MRL, Call
from tests.helpers.laws import on_backends

BACKEND = keras.backend.backend()
DIMS = (2, 4, 8, 16, 32, 64)
POINT = 0.01
Array = npt.NDArray[Any]


@dataclass
class Run:
    """A run of the demo that has ended well."""

    out: Path
    stdout: str

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
    return Run(out, done.stdout)


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


def counted(answers: dict[str, Array]) -> dict[str, Any]:
    """Every number of the report, from the server's answers alone."""
    truth, gallery = answers["test_labels"], answers["gallery_labels"]
    rows, width = len(gallery), DIMS[-1]
    accuracy = [float(np.mean(column == truth)) for column in answers["class_ids_by_dim"].T]
    holdout = [
        float(np.mean(answers["holdout_logits"][:, index].argmax(-1) == answers["holdout_labels"]))
        for index in range(len(DIMS))
    ]
    fixed = holdout.index(max(holdout))
    stopped = answers["adaptive_dims"].tolist()
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
    stages = answers["stage_dims"].tolist()  # the cascade need not begin at the first dim
    return {
        "accuracy_by_dim": by_dim(accuracy),
        "full_accuracy": accuracy[-1],
        "best_fixed_dim": DIMS[fixed],
        "best_fixed_accuracy": accuracy[fixed],
        "adaptive_accuracy": float(np.mean(answers["adaptive_class_ids"] == truth)),
        "expected_dim": sum(stopped) / len(stopped),
        "cumulative_dim": sum(sum(d for d in stages if d <= dim) for dim in stopped) / len(stopped),
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
        "epochs": 10,
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
    np.testing.assert_array_equal(answers["test_labels"], test.labels)
    np.testing.assert_array_equal(answers["holdout_labels"], holdout.labels)
    np.testing.assert_array_equal(answers["gallery_labels"], training.labels)
    assert answers["class_ids_by_dim"].shape == (len(test.labels), len(DIMS))
    assert answers["neighbors_by_dim"].shape == (len(test.labels), len(DIMS), 10)
    for name in ("neighbors_by_dim", "funnel_neighbors"):
        ids = np.sort(answers[name], axis=-1)
        assert ids.min() >= 0
        assert ids.max() < len(training.labels)
        assert (np.diff(ids) > 0).all()  # no row twice


def test_the_parts_share_no_image() -> None:
    parts = load_parts(seed=0)
    digits = load_digits()
    pixels = np.concatenate([part.images.reshape(-1, 64) * 16 for part in parts])
    labels = np.concatenate([part.labels for part in parts])
    rows = np.column_stack([pixels, labels])
    whole = np.column_stack([digits.data, digits.target])
    # Together they are the data set, every image once, so none is in two of them.
    np.testing.assert_array_equal(
        rows[np.lexsort(rows.T)], whole[np.lexsort(whole.T)].astype(np.float32)
    )
    assert len({row.tobytes() for row in rows}) == len(rows) == sum(len(p.labels) for p in parts)
    assert [len(part.labels) for part in parts] == [898, 449, 450]


def test_images_moved_by_a_pixel() -> None:
    part = load_parts(seed=0)[0]
    moved = with_shifts(part)
    rows = len(part.labels)
    images = moved.images.reshape(5, rows, 8, 8)
    np.testing.assert_array_equal(images[0], part.images[..., 0])
    for index, (axis, by) in enumerate(((0, -1), (0, 1), (1, -1), (1, 1)), start=1):
        rolled = np.roll(images[0], by, axis=axis + 1)
        edge = [slice(None)] * 3
        edge[axis + 1] = slice(-1, None) if by < 0 else slice(0, 1)
        rolled[tuple(edge)] = 0
        np.testing.assert_array_equal(images[index], rolled)
    np.testing.assert_array_equal(moved.labels.reshape(5, rows), np.stack([part.labels] * 5))


@pytest.mark.backend
def test_dims_differ_and_small_ones_pay_with_accuracy(demo: Run) -> None:
    accuracy = list(demo.report["accuracy_by_dim"].values())
    assert len(set(accuracy)) > 2
    assert accuracy[0] < accuracy[-1] - 1 * POINT
    assert accuracy[-1] > 0.97
    columns = demo.answers["class_ids_by_dim"].T
    assert all((a != b).any() for a, b in pairwise(columns[:3]))


@pytest.mark.backend
def test_adaptive_classification_keeps_the_accuracy_at_half_the_dims(demo: Run) -> None:
    report = demo.report
    assert report["adaptive_accuracy"] >= report["full_accuracy"] - 0.5 * POINT
    assert report["expected_dim"] <= 0.5 * DIMS[-1]


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
@pytest.mark.parametrize("name", ["accuracy.png", "retrieval.png"])
def test_the_plots_are_pictures(demo: Run, name: str) -> None:
    pixels = imread(demo.out / name)[..., :3]
    assert pixels.shape == (631, 960, 3)  # 4 inches, and a row of legend
    assert 0.01 < (pixels != 1).any(axis=-1).mean() < 0.3  # lines on white, neither empty nor full


@pytest.mark.backend
def test_everything_is_where_it_says(demo: Run) -> None:
    assert sorted(os.listdir(demo.out)) == [
        "accuracy.png",
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
        (["--epochs", "0"], "--epochs must be at least 1. Received: 0. Try 10."),
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
