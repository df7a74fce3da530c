"""The demo, run for real on the current backend, and every number of its report recomputed."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import matplotlib.image
import numpy as np
import numpy.typing as npt
import pytest

pytestmark = pytest.mark.backend

Arrays = Mapping[str, npt.NDArray[Any]]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "out"


def demo(out: Path, *flags: str) -> str:
    backend = keras.backend.backend()
    command = [sys.executable, "-m", "keras_mrl_cli", "demo", "--json", f"--backend={backend}"]
    environment = {key: value for key, value in os.environ.items() if key != "KERAS_BACKEND"}
    done = subprocess.run(
        [*command, f"--out={out}", *flags],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def printed(out: Path) -> str:
    return demo(out)


@pytest.fixture(scope="module")
def report(printed: str) -> dict[str, Any]:
    last: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return last


@pytest.fixture(scope="module")
def answers(out: Path, report: dict[str, Any]) -> Arrays:
    assert report
    with np.load(out / "predictions.npz") as saved:
        return dict(saved)


def mean_average_precision(hits: npt.NDArray[np.bool]) -> float:
    """The paper's definition, one query and one rank at a time."""
    total = 0.0
    for row in hits:
        found = 0
        for rank, hit in enumerate(row, start=1):
            found += int(hit)
            total += found / rank / len(row) if hit else 0.0
    return total / len(hits)


def recomputed(answers: Arrays) -> dict[str, Any]:
    dims = answers["dims"].tolist()
    truth, gallery = answers["test_labels"], answers["gallery_labels"]
    right = answers["class_ids_by_dim"] == truth[:, None]
    stopped = answers["adaptive_dims"].tolist()
    holdout = np.argmax(answers["holdout_logits"], axis=2) == answers["holdout_labels"][:, None]
    best = max(range(len(dims)), key=lambda i: (holdout[:, i].sum(), -i))
    hits = {
        str(dim): gallery[answers["neighbors_by_dim"][:, i]] == truth[:, None]
        for i, dim in enumerate(dims)
    }
    funnel = gallery[answers["funnel_neighbors"]] == truth[:, None]
    rows, shortlist = len(gallery), int(answers["funnel_shortlist"])
    first, last = answers["funnel_dims"].tolist()
    return {
        "accuracy_by_dim": {str(dim): right[:, i].mean() for i, dim in enumerate(dims)},
        "full_accuracy": right[:, -1].mean(),
        "best_fixed_dim": dims[best],
        "best_fixed_accuracy": right[:, best].mean(),
        "adaptive_accuracy": (answers["adaptive_class_ids"] == truth).mean(),
        "expected_dim": sum(stopped) / len(stopped),
        "cumulative_dim": sum(
            sum(d for d in answers["stage_dims"].tolist() if d <= dim) for dim in stopped
        )
        / len(stopped),
        "stopped_by_dim": {str(dim): stopped.count(dim) for dim in dims},
        "p10_by_dim": {dim: found.mean() for dim, found in hits.items()},
        "map10_by_dim": {dim: mean_average_precision(found) for dim, found in hits.items()},
        "p10_funnel": funnel.mean(),
        "map10_exact": mean_average_precision(hits[str(dims[-1])]),
        "map10_funnel": mean_average_precision(funnel),
        "madds_by_dim": {str(dim): rows * dim for dim in dims},
        "exact_madds": rows * dims[-1],
        "funnel_madds": rows * first + shortlist * last,
        "funnel": {"dims": [first, last], "shortlists": [shortlist], "k": funnel.shape[1]},
        "gallery_size": rows,
        "test_size": len(truth),
    }


def test_every_number_recomputes_from_the_predictions(
    report: dict[str, Any], answers: Arrays
) -> None:
    told = {"backend", "seed", "epochs"}  # what was asked for, not measured
    wanted = recomputed(answers)
    assert set(report) == {*wanted, *told}
    assert report["funnel"] == wanted.pop("funnel")
    for name, value in wanted.items():
        assert report[name] == pytest.approx(value, abs=1e-12), name


def test_the_dims_differ(report: dict[str, Any]) -> None:
    assert len(set(report["accuracy_by_dim"].values())) >= 3


def test_adaptive_classification_keeps_the_accuracy_at_half_the_dims(
    report: dict[str, Any],
) -> None:
    assert report["adaptive_accuracy"] >= report["full_accuracy"] - 0.005
    assert report["expected_dim"] <= 0.5 * 64


def test_the_funnel_keeps_map10_at_a_third_of_the_cost(report: dict[str, Any]) -> None:
    assert report["funnel"]["shortlists"][0] <= 0.05 * report["gallery_size"]
    assert report["map10_funnel"] >= report["map10_exact"] - 0.005
    assert report["funnel_madds"] <= 0.35 * report["exact_madds"]


def test_the_artefacts_are_there(out: Path, report: dict[str, Any]) -> None:
    assert json.loads((out / "report.json").read_text()) == report
    assert (out / "models" / "digits" / "1" / "saved_model.pb").is_file()
    for plot in ("accuracy.png", "retrieval.png"):
        pixels = matplotlib.image.imread(out / plot)
        assert min(pixels.shape[:2]) > 300
        assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 10


def test_it_names_the_commands_to_go_on_with(printed: str, out: Path) -> None:
    assert f"keras-mrl serve --model_name digits --model_base_path {out}/models/digits" in printed


def test_the_three_parts_share_no_image() -> None:
    from keras_mrl_cli.demo.data import load

    parts = [{image.tobytes() for image in part.images} for part in load(seed=0)]
    assert [len(part) for part in parts] == [898, 449, 450]
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]


def test_a_second_run_publishes_a_second_version(out: Path, report: dict[str, Any]) -> None:
    assert report
    first = out / "models" / "digits" / "1"
    before = {file: file.read_bytes() for file in first.rglob("*") if file.is_file()}
    demo(out, "--epochs=1")
    assert (out / "models" / "digits" / "2" / "saved_model.pb").is_file()
    assert {file: file.read_bytes() for file in first.rglob("*") if file.is_file()} == before
