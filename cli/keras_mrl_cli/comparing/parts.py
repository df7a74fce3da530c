"""The parts of the images: training, test and holdouts, noted by content and disjoint."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..asking import RefusalError
from .images import Images, read

SPLITS = 10  # of the test images: a fifth learns the thresholds, the rest judges
_TEST_SHARE = _HOLDOUT_SHARE = 0.2

Rows = npt.NDArray[np.int64]


def load_parts(
    data: Sequence[str], test: Sequence[str] | None, size: int | None
) -> tuple[Images, Images, int]:
    """Return training and test images that share none, and how many were left out for that.

    Args:
        data: Places as in `read`.
        test: Of the test images; None takes the second part of `.npz` files and Keras datasets, or
            else a fifth of every class of `data`, drawn at random.
        size: Height and width to resize to; None keeps the first image's.

    Raises:
        RefusalError: As `read`; and where there are fewer than two classes, or classes of the test
            images that training has not.
    """
    training = read(data, size)
    if test is not None:
        judged = read(test, size or training.pixels.shape[1])
    elif all(_has_test(place) for place in data):
        judged = read(data, size, test=True)
    else:
        rows = _drawn(training.labels)
        training, judged = training.take(~rows), training.take(rows)
    judged = _as_named(judged, training)
    _check(training, judged)
    known = set(digests(training))
    fresh = np.array([digest not in known for digest in digests(judged)], bool)
    return training, judged.take(fresh), int((~fresh).sum())


def digests(images: Images) -> list[str]:
    """Return what tells the pixels of an image from those of another, for each."""
    return [hashlib.sha256(pixels.tobytes()).hexdigest()[:32] for pixels in images.pixels]


def holdouts(rows: int) -> list[tuple[Rows, Rows]]:
    """Return `SPLITS` splits of test rows: those that learn thresholds, those that judge."""
    orders = [np.random.default_rng(split).permutation(rows) for split in range(SPLITS)]
    cut = max(1, int(rows * _HOLDOUT_SHARE))
    return [(order[:cut], order[cut:]) for order in orders]


def note_parts(path: Path, training: Images, test: Images) -> None:
    """Write which image is in which part, or refuse where other images are noted there.

    The file holds `train` and `test`, digests of the images' pixels, `train_labels` and
    `test_labels`, and `holdout_<i>`, the test rows that the i-th cascade learned from.

    Raises:
        RefusalError: If the folder holds a comparison of other images.
        ValueError: If an image is in both parts.
    """
    found: dict[str, Any] = {"train": digests(training), "test": digests(test)}
    shared = set(found["train"]) & set(found["test"])
    if shared:
        raise ValueError(
            "An image must not be in two parts. "
            f"Received: {len(shared)} images in both. Take the parts that load_parts returns."
        )
    if path.exists():
        with np.load(path, allow_pickle=False) as noted:
            same = all(noted[name].tolist() == ids for name, ids in found.items())
        if not same:
            raise RefusalError(
                "A comparison goes on with the images it began with. "
                f"Received: other images than those of {path.parent}. "
                "Name another folder with --out."
            )
        return
    found |= {"train_labels": training.labels, "test_labels": test.labels}
    found |= {f"holdout_{i}": rows for i, (rows, _) in enumerate(holdouts(len(test.labels)))}
    partial = path.with_name(f".partial-{path.name}")
    np.savez_compressed(partial, **found)
    partial.replace(path)


def unseen_classes(count: int) -> list[int]:
    """Return the fifth of the classes that some nets do not see."""
    order = np.random.default_rng(0).permutation(count)
    return sorted(order[: count // 5].tolist())


def _has_test(place: str) -> bool:
    from .images import KERAS_DATASETS

    if place.endswith(".npz") and Path(place).exists():
        with np.load(place, allow_pickle=False) as stored:
            return "x_test" in stored
    return place in KERAS_DATASETS and not Path(place).exists()


def _drawn(labels: Rows) -> npt.NDArray[np.bool]:
    """A fifth of every class, at least one of it and never all."""
    draw, chosen = np.random.default_rng(0), np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        chosen[draw.permutation(rows)[: max(1, int(len(rows) * _TEST_SHARE))]] = len(rows) > 1
    return chosen


def _as_named(images: Images, like: Images) -> Images:
    """The same images with the class numbers of others."""
    strange = sorted(set(images.names) - set(like.names))
    if strange:
        raise RefusalError(
            "Test images must be of the classes of the training images. "
            f"Received: {', '.join(strange[:3])}, which --data has not. Correct --test."
        )
    numbers = np.array([like.names.index(name) for name in images.names], np.int64)
    return Images(images.pixels, numbers[images.labels], like.names)


def _check(training: Images, test: Images) -> None:
    if len(training.names) < 2 or len(test.labels) < 10:
        raise RefusalError(
            "A comparison needs two classes and ten test images, better some hundreds. "
            f"Received: {len(training.names)} classes, {len(test.labels)} test images. "
            "Give more images."
        )
    if training.pixels.shape[1:] != test.pixels.shape[1:]:
        raise RefusalError(
            "Test images must have the size of the training images. "
            f"Received: {test.pixels.shape[1:]} and {training.pixels.shape[1:]}. Give --size."
        )
