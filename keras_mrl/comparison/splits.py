"""The parts of a comparison's images: training, test, holdouts of the test, unseen classes.

Images are told apart by the digests of their pixels, so that equal images are never in two parts.
`splits.npz` records which image was in which part, for anybody to check.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_mrl_serving.untrusted import read_arrays

from .data import ComparisonError, Part, Place, has_test, name_of, read, refuse_unreadable
from .folder import damaged, replacing

Rows = npt.NDArray[np.int64]
Splits = Sequence[tuple[Rows, Rows]]

LEAST = 10  # images to search among: as many neighbours are counted
HOLDOUTS = 10
_TEST_SHARE = 0.2
_HOLDOUT_SHARE = 0.2


def load_parts(
    data: Sequence[Place],
    test: Sequence[Place] | None,
    size: int | None,
    unreadable: list[str] | None = None,
) -> tuple[Part, Part, int]:
    """Return training images, test images, and how many test images training has, too.

    Those are left out of the test.

    Args:
        data: Places as `read` takes them.
        test: Places of the test images. None takes the second part of `.npz` files and Keras's
            datasets, or else a fifth of every class of `data`, drawn at random.
        size: Height and width to resize to; None keeps the first image's.
        unreadable: Takes name and reason of every image file that cannot be read; those are left
            out. None refuses them, all of both parts at once.

    Raises:
        ComparisonError: As `read`; for fewer than two classes or too few images; and for test
            images of other classes or with other channels than the training images.
    """
    left_unread: list[str] = []
    training = read(data, size, unreadable=left_unread)
    with_test = [place for place in data if has_test(place)]
    if test is not None:
        height = None if training.is_embedded else training.inputs.shape[1]
        judging = read(test, size or height, unreadable=left_unread)
    elif len(with_test) == len(data):
        judging = read(data, size, test=True)
    elif with_test:
        raise ComparisonError(
            "Test images come from --test, from all places of --data, or from none. "
            f"Received: some in {', '.join(map(name_of, with_test))} alone. Give --test."
        )
    else:
        drawn = _draw_test(training.labels)
        training, judging = training.take(~drawn), training.take(drawn)
    if unreadable is None:
        refuse_unreadable(left_unread)
    else:
        unreadable += left_unread
    judging = _renumbered(judging, training.names)
    trained = set(digests(training))
    new = np.array([digest not in trained for digest in digests(judging)], bool)
    left_out = int((~new).sum())
    judging = judging.take(new)
    _check_parts(training, judging, left_out)
    return training, judging, left_out


def digests(images: Part) -> list[str]:
    """Return a digest of the pixels of every image; different images have different ones."""
    return [hashlib.sha256(pixels.tobytes()).hexdigest()[:32] for pixels in images.inputs]


def _draw_test(labels: Rows) -> npt.NDArray[np.bool]:
    """Whether each row is of the test: a fifth of every class, at least one and never all."""
    random, drawn = np.random.default_rng(0), np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        drawn[random.permutation(rows)[: max(1, int(len(rows) * _TEST_SHARE))]] = len(rows) > 1
    return drawn


def _renumbered(images: Part, names: tuple[str, ...]) -> Part:
    """The images with their classes numbered as in `names`."""
    strange = sorted(set(images.names) - set(names))
    if strange:
        raise ComparisonError(
            "Test images must be of the classes of the training images. "
            f"Received: {', '.join(strange[:3])}, which --data has not. Correct --test."
        )
    numbers = np.array([names.index(name) for name in images.names], np.int64)
    return Part(images.inputs, numbers[images.labels], names)


def _check_parts(training: Part, test: Part, left_out: int) -> None:
    different = len(set(digests(test)))
    if len(training.names) < 2 or min(different, len(training.labels)) < LEAST:
        also = f" ({different} different)" if different < len(test.labels) else ""
        also += f", {left_out} more that training has too" if left_out else ""
        raise ComparisonError(
            f"A comparison needs two classes, {LEAST} images to search among and {LEAST} different "
            f"test images, better some hundreds. Received: {len(training.names)} classes, "
            f"{len(training.labels)} training images, {len(test.labels)} test images{also}. "
            "Give more images."
        )
    if training.inputs.shape[1:] != test.inputs.shape[1:]:
        raise ComparisonError(
            "Test images must have as many channels as the training images, and test embeddings "
            "be as wide as the training embeddings. "
            f"Received: {test.inputs.shape[1:]} and {training.inputs.shape[1:]}. "
            "Make both the same way."
        )


def unseen_classes(count: int) -> list[int]:
    """Return the fifth of `count` classes that some nets are trained without."""
    order = np.random.default_rng(0).permutation(count)
    return sorted(order[: count // 5].tolist())


def check_unseen(training: Part, test: Part) -> None:
    """Raise a `ComparisonError` where the unseen classes have too few images to search."""
    unseen = unseen_classes(len(training.names))
    gallery, queries = (int(np.isin(part.labels, unseen).sum()) for part in (training, test))
    if len(unseen) < 2 or gallery < LEAST or not queries:
        raise ComparisonError(
            f"--unseen hides a fifth of the classes: two or more, with {LEAST} training images "
            f"and one test image. Received: {len(unseen)} classes with {gallery} and {queries}. "
            "Leave --unseen out."
        )


def holdouts(test: Part) -> list[tuple[Rows, Rows]]:
    """Return ten splits of the test rows: those that teach thresholds, those that judge them.

    Rows of equal pixels are on one side together, so that no image judges what it taught. At most
    a fifth of the rows teaches: equal rows that are too many for the room left are judges.
    """
    _, group_of_row, sizes = np.unique(digests(test), return_inverse=True, return_counts=True)
    return [
        _holdout(np.random.default_rng(seed).permutation(len(group_of_row)), group_of_row, sizes)
        for seed in range(HOLDOUTS)
    ]


def _holdout(order: Rows, group_of_row: Rows, sizes: Rows) -> tuple[Rows, Rows]:
    room = max(1, int(len(order) * _HOLDOUT_SHARE))
    teaches = np.zeros(len(sizes), bool)
    for group in dict.fromkeys(group_of_row[order].tolist()):  # in the order they come up
        if sizes[group] <= room:
            teaches[group] = True
            room -= sizes[group]
    is_teacher = teaches[group_of_row[order]]
    return order[is_teacher], order[~is_teacher]


def record_parts(path: Path, training: Part, test: Part, unseen: Sequence[str]) -> None:
    """Write which image is in which part; refuse if `path` records other images.

    The file holds `train` and `test`, digests of the images' pixels, `train_labels`,
    `test_labels`, the `names` of the classes, `holdout_<i>`, the test rows that the i-th cascade
    learned from, and `unseen`, the names of the classes that some nets were trained without.

    Args:
        path: Of the file.
        training: The images that train, no more: a budget may have left some of them out.
        test: The images that judge.
        unseen: Names of classes; none where all nets see all.

    Raises:
        ComparisonError: If the folder holds a comparison of other images.
        ValueError: If an image is in two parts: training and test, or both sides of a holdout.
    """
    images: dict[str, Any] = {"train": digests(training), "test": digests(test)}
    splits = holdouts(test)
    check_disjoint(images["train"], images["test"], splits)
    images |= {"train_labels": training.labels.tolist(), "test_labels": test.labels.tolist()}
    images["names"] = list(training.names)
    if path.exists():
        _check_same(path, images)
    # Written again even so: another version of this code may have split the same images otherwise.
    parts = images | {f"holdout_{split}": rows for split, (rows, _) in enumerate(splits)}
    parts["unseen"] = np.array(unseen, np.str_)
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **parts)


def check_disjoint(train: Sequence[str], test: Sequence[str], splits: Splits) -> None:
    """Raise a `ValueError` where two parts that must differ share an image.

    Args:
        train: Digests of the training images.
        test: Digests of the test images.
        splits: The holdouts, rows of the test.
    """
    rows = np.array(test)
    pairs = {"training and test": (set(train), set(test))}
    for split, (teaching, judging) in enumerate(splits):
        pairs[f"both sides of holdout {split}"] = set(rows[teaching]), set(rows[judging])
    for where, (one, other) in pairs.items():
        if one & other:
            raise ValueError(
                "An image must not be in two parts. "
                f"Received: {len(one & other)} images in {where}. "
                "Take the parts that load_parts and holdouts return."
            )


def _check_same(path: Path, images: Mapping[str, Any]) -> None:
    try:
        recorded = read_arrays(path)
        same = all(recorded[name].tolist() == ids for name, ids in images.items())
    except (ValueError, KeyError) as error:
        raise damaged(path, error) from error
    if not same:
        raise ComparisonError(
            "A comparison goes on with the images and classes it began with. "
            f"Received: others than those of {path.parent}. "
            "Name another folder with --out."
        )
