"""Which image is in which part of a comparison: never in two, and recorded by content."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from keras_mrl.comparison.data import ComparisonError, Part
from keras_mrl.comparison.splits import (
    check_disjoint,
    check_unseen,
    digests,
    holdouts,
    load_parts,
    record_parts,
)
from tests.helpers.comparisons import random_images, write_npz


def test_without_test_images_a_fifth_of_every_class_is_drawn(tmp_path: Path) -> None:
    places = write_npz(tmp_path / "a.npz", random_images())
    training, test, left_out = load_parts(places, None, None)
    assert np.bincount(test.labels).tolist() == [4, 4, 4]
    assert np.bincount(training.labels).tolist() == [16, 16, 16]
    assert left_out == 0
    assert sorted(digests(training) + digests(test)) == sorted(digests(random_images()))
    again, _, _ = load_parts(places, None, None)
    np.testing.assert_array_equal(again.inputs, training.inputs)


def test_the_second_part_of_an_npz_is_the_test(tmp_path: Path) -> None:
    second = random_images(seed=1)
    places = write_npz(tmp_path / "a.npz", random_images(), second)
    training, test, _ = load_parts(places, None, None)
    assert digests(test) == digests(second)
    assert digests(training) == digests(random_images())


def test_a_test_image_that_training_has_is_left_out(tmp_path: Path) -> None:
    second = random_images(seed=1)
    second.inputs[7] = random_images().inputs[3]
    places = write_npz(tmp_path / "a.npz", random_images(), second)
    training, test, left_out = load_parts(places, None, None)
    assert left_out == 1
    assert len(test.labels) == 59
    assert not set(digests(training)) & set(digests(test))
    np.testing.assert_array_equal(test.labels, np.delete(second.labels, 7))


def test_files_of_both_parts_that_cannot_be_read_are_named_at_once(tmp_path: Path) -> None:
    places = []
    for part in ("training", "test"):
        places.append(str(tmp_path / part))
        for row, image in enumerate(random_images(seed=len(part)).inputs):
            file = tmp_path / part / f"class{row % 2}" / f"{row}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[..., 0]).save(file)
        (tmp_path / part / "class1" / f"{part}.jpg").write_bytes(b"no image")
    named = ["class1/training.jpg (it is none)", "class1/test.jpg (it is none)"]
    with pytest.raises(
        ComparisonError, match=re.escape(f"Received: 2 that cannot be read: {', '.join(named)}.")
    ):
        load_parts(places[:1], places[1:], None)
    unreadable: list[str] = []
    training, test, _ = load_parts(places[:1], places[1:], None, unreadable)
    assert unreadable == named
    assert len(training.labels) == len(test.labels) == 60


def test_classes_of_the_test_images_are_numbered_as_in_training(tmp_path: Path) -> None:
    second = random_images(seed=1)
    kept = second.labels > 0
    write_npz(tmp_path / "b.npz", second.take(kept))
    training = write_npz(tmp_path / "a.npz", random_images())
    _, test, _ = load_parts(training, [str(tmp_path / "b.npz")], None)
    np.testing.assert_array_equal(test.labels, second.labels[kept])


def with_equal_images() -> Part:
    """60 images, 9 of them different."""
    images = random_images(seed=1)
    images.inputs[8:] = images.inputs[8]
    return images


def in_colour() -> Part:
    images = random_images(rows=12, seed=1)
    return Part(np.repeat(images.inputs, 3, axis=-1), images.labels, images.names)


@pytest.mark.parametrize(
    ("test", "received"),
    [
        (random_images(classes=4, seed=1), "3, which --data has not"),
        (random_images(rows=9, seed=1), "3 classes, 60 training images, 9 test images"),
        (
            random_images(),
            "3 classes, 60 training images, 0 test images, 60 more that training has too",
        ),
        (with_equal_images(), "3 classes, 60 training images, 60 test images (9 different)"),
        (in_colour(), "(8, 8, 3) and (8, 8, 1)"),
    ],
    ids=["other classes", "too few", "those of training", "equal ones", "other channels"],
)
def test_test_images_that_judge_nothing_are_refused(
    test: Part, received: str, tmp_path: Path
) -> None:
    places = write_npz(tmp_path / "training.npz", random_images())
    with pytest.raises(ComparisonError, match=re.escape(f"Received: {received}. ")):
        load_parts(places, write_npz(tmp_path / "test.npz", test), None)


def test_test_images_of_some_places_alone_are_refused(tmp_path: Path) -> None:
    without = write_npz(tmp_path / "without.npz", random_images())
    both = write_npz(tmp_path / "both.npz", random_images(seed=2), random_images(seed=3))
    with pytest.raises(
        ComparisonError, match=r"Received: some in .*both\.npz alone\. Give --test\."
    ):
        load_parts([*without, *both], None, None)


def test_unseen_classes_need_images_to_search_among() -> None:
    check_unseen(random_images(60, 12), random_images(24, 12, seed=1))
    with pytest.raises(ComparisonError, match=r"Received: 2 classes with 8 and 4\."):
        check_unseen(random_images(48, 12), random_images(24, 12, seed=1))
    with pytest.raises(ComparisonError, match=r"Received: 1 classes with 12 and 4\."):
        check_unseen(random_images(60, 5), random_images(20, 5, seed=1))


def doubled(sizes: list[int]) -> Part:
    """Test images of which each is there so many times."""
    images = random_images(len(sizes), seed=1)
    return images.take(np.random.default_rng(2).permutation(np.repeat(range(len(sizes)), sizes)))


def is_apart(test: Part, taught: Any, judged: Any) -> bool:
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


def test_parts_that_share_an_image_are_not_recorded(tmp_path: Path) -> None:
    path = tmp_path / "splits.npz"
    training, test = random_images(), doubled([2] * 30)
    with pytest.raises(ValueError, match=r"Received: 60 images in training and test\."):
        record_parts(path, training, training, [])
    assert not path.exists()
    record_parts(path, training, test, [])
    with np.load(path) as parts:
        for split in range(10):
            teaching = parts[f"holdout_{split}"]
            assert is_apart(test, teaching, np.setdiff1d(np.arange(60), teaching))
    by_rows = [*holdouts(test)[:9], (np.arange(12), np.arange(12, 60))]
    with pytest.raises(ValueError, match=r"in both sides of holdout 9\. Take the parts"):
        check_disjoint(digests(training), digests(test), by_rows)


def test_a_comparison_goes_on_with_its_own_images(tmp_path: Path) -> None:
    training, test = random_images(), random_images(seed=1)
    path = tmp_path / "splits.npz"
    record_parts(path, training, test, ["2"])
    record_parts(path, training, test, ["2"])
    with np.load(path) as parts:
        assert parts["train"].tolist() == digests(training)
        assert parts["unseen"].tolist() == ["2"]
        np.testing.assert_array_equal(parts["test_labels"], test.labels)
        for split, (taught, _) in enumerate(holdouts(test)):
            np.testing.assert_array_equal(parts[f"holdout_{split}"], taught)
    moved = Part(test.inputs, (test.labels + 1) % 3, test.names)
    renamed = Part(training.inputs, training.labels, ("0", "1", "other"))
    for parts_of_another in ((random_images(seed=2), test), (training, moved), (renamed, test)):
        with pytest.raises(ComparisonError, match="Received: others than those of"):
            record_parts(path, *parts_of_another, ["2"])
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ComparisonError, match="which is damaged"):
        record_parts(path, training, test, ["2"])


def test_holdouts_of_an_earlier_version_are_recorded_anew(tmp_path: Path) -> None:
    training, test = random_images(), doubled([2] * 30)
    path = tmp_path / "splits.npz"
    record_parts(path, training, test, [])
    with np.load(path) as parts:
        earlier = {name: parts[name] for name in parts.files if name != "unseen"}
    np.savez(path, allow_pickle=False, **earlier | {"holdout_0": np.arange(12)})
    record_parts(path, training, test, ["1"])
    with np.load(path) as parts:
        assert is_apart(test, parts["holdout_0"], np.setdiff1d(range(60), parts["holdout_0"]))
        assert parts["unseen"].tolist() == ["1"]
