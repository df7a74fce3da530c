"""A comparison from images to report."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from keras_mrl.comparison import ComparisonError, Plan, compare
from keras_mrl.comparison.plan import subset
from keras_mrl.comparison.splits import digests, record_parts
from tests.helpers.comparisons import PLAN as PLAN_OF_DIGITS
from tests.helpers.comparisons import (
    Compared,
    Interrupted,
    interrupt_training,
    random_images,
    write_npz,
)

PLAN = Plan((4, 8), epochs=1, filters=8, flip=False, unseen=True)


def test_the_record_has_the_images_that_train(tmp_path: Path) -> None:
    training, test = random_images(200, classes=10), random_images(60, classes=10, seed=1)
    place, out = write_npz(tmp_path / "a.npz", training, test), tmp_path / "out"
    out.mkdir()
    # Of a comparison that was stopped before it saved its plan.
    record_parts(out / "splits.npz", random_images(seed=9), test, [])
    for _ in ("begun", "goes on"):
        with pytest.raises(Interrupted):
            compare(place, out, replace(PLAN, rows=100), progress=interrupt_training)
        with np.load(out / "splits.npz") as parts:
            assert parts["train"].tolist() == digests(subset(training, 100))
            assert len(parts["train_labels"]) == 100
            assert len(parts["unseen"]) == 2


def test_fewer_images_leave_some_to_search_among(tmp_path: Path) -> None:
    training, test = random_images(200, classes=10), random_images(60, classes=10, seed=1)
    place = write_npz(tmp_path / "a.npz", training, test)
    with pytest.raises(ComparisonError, match=r"Received: 2 classes with 8 and 12\."):
        compare(place, tmp_path / "out", replace(PLAN, rows=40), progress=interrupt_training)
    assert not (tmp_path / "out" / "plan.json").exists()


def test_files_that_cannot_be_read_are_refused_or_told(tmp_path: Path) -> None:
    for row, image in enumerate(random_images().inputs):
        file = tmp_path / "data" / f"class{row % 2}" / f"{row}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(file)
    (tmp_path / "data" / "class0" / "x.png").write_bytes(b"no image")
    plan, lines = replace(PLAN, unseen=False), list[str]()

    def stop(line: str) -> None:
        lines.append(line)
        if "training and" in line:
            raise Interrupted

    with pytest.raises(ComparisonError, match=r"class0/x\.png \(it is none\)"):
        compare(tmp_path / "data", tmp_path / "out", plan, progress=stop)
    with pytest.raises(Interrupted):
        compare(tmp_path / "data", tmp_path / "out", plan, skip_unreadable=True, progress=stop)
    assert "left out, as they cannot be read: class0/x.png (it is none)" in lines


def test_a_budget_is_measured_and_one_that_is_too_small_is_refused(tmp_path: Path) -> None:
    place = write_npz(tmp_path / "a.npz", random_images(200, 10), random_images(60, 10, seed=1))
    lines: list[str] = []
    sentence = r"Received: 0\.001 minutes for 7 nets, .* Give \d+ minutes, or fewer dims\."
    with pytest.raises(ComparisonError, match=sentence):
        compare(place, tmp_path / "out", PLAN, budget_minutes=1e-3, progress=lines.append)
    assert lines[2] == "measuring how fast a net trains here"
    assert not (tmp_path / "out" / "plan.json").exists()


def test_again_nothing_is_trained_and_the_results_are_the_same(
    compared: Compared, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(compared.out, out)
    lines: list[str] = []
    results = compare(compared.place, out, PLAN_OF_DIGITS, progress=lines.append)
    assert json.loads(json.dumps(results)) == compared.results
    assert json.loads((out / "results.json").read_text()) == compared.results
    assert not [line for line in lines if "epoch" in line]
    with pytest.raises(ComparisonError, match=r"Received: seeds=2 after 1\."):
        compare(compared.place, out, replace(PLAN_OF_DIGITS, seeds=2), progress=lines.append)


def test_progress_counts_nets_epochs_and_steps(compared: Compared) -> None:
    trained = [line for line in compared.lines if "epoch" in line]
    assert [line.partition(":")[0] for line in trained] == ["mrl-0"] * 6 + ["mrl_seen-0"] * 6
    assert "[1/12] mrl-0" in compared.lines
    assert [line.partition(":")[0] for line in compared.lines[-6:]] == [
        "[1/6] heads",
        "[2/6] probe",
        "[3/6] neighbors",
        "[4/6] cascades",
        "[5/6] retrieval",
        "[6/6] unseen",
    ]
