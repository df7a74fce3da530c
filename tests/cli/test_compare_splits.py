"""Which image is in which part of a comparison: noted by content, and never in two."""

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keras_mrl.comparison import splits
from keras_mrl.comparison.data import ComparisonError, Images, split_classes
from keras_mrl.comparison.plan import Plan, subset
from keras_mrl.comparison.splits import digests, holdouts, note_parts

compare = import_module("keras_mrl.comparison.compare")  # the package has a function of that name


def pictures(rows: int = 60, classes: int = 3, seed: int = 0) -> Images:
    pixels = np.random.default_rng(seed).integers(0, 256, (rows, 8, 8, 1)).astype(np.uint8)
    return Images(pixels, np.arange(rows) % classes, tuple(map(str, range(classes))))


def doubled(sizes: list[int]) -> Images:
    """Test images of which each is there so many times."""
    images = pictures(len(sizes), seed=1)
    return images.take(np.random.default_rng(2).permutation(np.repeat(range(len(sizes)), sizes)))


def is_apart(test: Images, taught: Any, judged: Any) -> bool:
    of = np.array(digests(test))
    return not set(of[taught]) & set(of[judged])


@pytest.mark.parametrize(
    "sizes", [[1] * 60, [2] * 30, [1] * 40 + [2] * 10, [40, *[1] * 20], [11, *[9] * 9]]
)
def test_an_image_that_teaches_thresholds_does_not_judge_them(sizes: list[int]) -> None:
    test = doubled(sizes)
    found = holdouts(test)
    assert len({tuple(taught) for taught, _ in found}) > 1
    for taught, judged in found:
        assert sorted([*taught, *judged]) == list(range(sum(sizes)))
        assert 0 < len(taught) <= sum(sizes) // 5
        assert is_apart(test, taught, judged)
    if max(sizes) == 1:  # every fifth of the rows, as they come
        for split, (taught, _) in enumerate(found):
            order = np.random.default_rng(split).permutation(60)
            np.testing.assert_array_equal(taught, order[:12])


def test_where_there_is_room_a_fifth_teaches() -> None:
    assert {len(taught) for taught, _ in holdouts(doubled([1] * 40 + [2] * 10))} == {12}


def test_parts_that_share_an_image_are_not_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = tmp_path / "splits.npz"
    training, test = pictures(), doubled([2] * 30)
    with pytest.raises(ValueError, match=r"Received: 60 images in training and test\."):
        note_parts(note, training, training, [])
    note_parts(note, training, test, [])
    with np.load(note) as parts:
        for split in range(10):
            taught = parts[f"holdout_{split}"]
            assert is_apart(test, taught, np.setdiff1d(np.arange(60), taught))
    good = holdouts(test)
    by_rows = [*good[:9], (np.arange(12), np.arange(12, 60))]
    monkeypatch.setattr(splits, "holdouts", lambda _: by_rows)
    with pytest.raises(ValueError, match=r"in both sides of holdout 9\. Take the parts"):
        note_parts(tmp_path / "other.npz", training, test, [])
    assert not (tmp_path / "other.npz").exists()


def test_a_comparison_goes_on_with_its_own_images(tmp_path: Path) -> None:
    training, test = pictures(), pictures(seed=1)
    note = tmp_path / "splits.npz"
    note_parts(note, training, test, ["2"])
    note_parts(note, training, test, ["2"])
    with np.load(note) as parts:
        assert parts["train"].tolist() == digests(training)
        assert parts["unseen"].tolist() == ["2"]
        np.testing.assert_array_equal(parts["test_labels"], test.labels)
        for split, (taught, _) in enumerate(holdouts(test)):
            np.testing.assert_array_equal(parts[f"holdout_{split}"], taught)
    moved = Images(test.pixels, (test.labels + 1) % 3, test.names)
    renamed = Images(training.pixels, training.labels, ("0", "1", "other"))
    for parts_of_another in ((pictures(seed=2), test), (training, moved), (renamed, test)):
        with pytest.raises(ComparisonError, match="Received: others than those of"):
            note_parts(note, *parts_of_another, ["2"])
    note.write_bytes(note.read_bytes()[:100])
    with pytest.raises(ComparisonError, match="which is damaged"):
        note_parts(note, training, test, ["2"])


def test_holdouts_of_an_earlier_version_are_noted_anew(tmp_path: Path) -> None:
    training, test = pictures(), doubled([2] * 30)
    note = tmp_path / "splits.npz"
    note_parts(note, training, test, [])
    with np.load(note) as parts:
        earlier = {name: parts[name] for name in parts.files if name != "unseen"}
    np.savez(note, allow_pickle=False, **earlier | {"holdout_0": np.arange(12)})
    note_parts(note, training, test, ["1"])
    with np.load(note) as parts:
        assert is_apart(test, parts["holdout_0"], np.setdiff1d(range(60), parts["holdout_0"]))
        assert parts["unseen"].tolist() == ["1"]


class _Begun(Exception):
    """Nothing is trained in these tests."""


def test_the_note_says_what_is_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training, test = pictures(rows=200, classes=10), pictures(rows=60, classes=10, seed=1)
    np.savez(
        tmp_path / "a.npz",
        x_train=training.pixels,
        y_train=training.labels,
        x_test=test.pixels,
        y_test=test.labels,
    )
    out = tmp_path / "out"
    asked = Plan((4, 8), seeds=1, epochs=1, filters=8, flip=False, unseen=True, rows=0)

    def few(plan: Plan, *_: Any) -> Plan:
        return Plan(**{**vars(plan), "rows": 100})

    def stop(answers: Any, _: Any) -> None:
        assert digests(answers.training) == digests(subset(training, 100))
        raise _Begun

    monkeypatch.setattr(compare, "choose", few)
    monkeypatch.setattr(compare, "_train", stop)
    out.mkdir()
    note_parts(out / "splits.npz", pictures(seed=9), test, [])  # of one stopped before its plan
    for _ in ("begun", "goes on"):
        with pytest.raises(_Begun):
            compare.compare([str(tmp_path / "a.npz")], None, out, asked, budget=1.0)
        with np.load(out / "splits.npz") as parts:
            assert parts["train"].tolist() == digests(subset(training, 100))
            assert len(parts["train_labels"]) == 100
            assert len(parts["unseen"]) == 2


def test_a_budget_leaves_images_to_search_among(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, test = pictures(rows=200, classes=10), pictures(rows=60, classes=10, seed=1)
    asked = Plan((4, 8), seeds=1, epochs=1, filters=8, flip=False, unseen=True, rows=0)
    monkeypatch.setattr(compare, "load_parts", lambda *_: (training, test, 0))
    monkeypatch.setattr(compare, "choose", lambda plan, *_: Plan(**{**vars(plan), "rows": 40}))
    with pytest.raises(ComparisonError, match=r"Received: 2 classes with 8 and 12\."):
        compare.compare(["a.npz"], None, tmp_path / "out", asked, budget=1.0)
    assert not (tmp_path / "out" / "plan.json").exists()


def test_unseen_classes_have_one_number_in_every_part() -> None:
    training, test = pictures(12, 4), pictures(12, 4, seed=1)
    lacking = test.take(test.labels != 1)  # a class that the test has no images of
    for part in (training, lacking):
        seen, unseen = split_classes(part, [1, 3])
        assert (seen.names, unseen.names) == (("0", "2"), ("1", "3"))
        for given in (seen, unseen):
            for pixels, label in zip(given.pixels, given.labels, strict=True):
                (row,) = np.flatnonzero((part.pixels == pixels).all(axis=(1, 2, 3)))
                assert part.names[part.labels[row]] == given.names[label]
