"""The parts of the images: training, test and holdouts, noted by content and disjoint."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..asking import RefusalError
from .arrays import has_test
from .files import replacing
from .images import Images, read

LEAST = 10  # images to search among: as many neighbours are looked at
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
    own_test = [place for place in data if has_test(place)]
    if test is not None:
        judged = read(test, size or training.pixels.shape[1])
    elif len(own_test) == len(data):
        judged = read(data, size, test=True)
    elif own_test:
        raise RefusalError(
            "Test images come from --test, from all places of --data, or from none. "
            f"Received: some in {', '.join(own_test)} alone. Give --test."
        )
    else:
        rows = _drawn(training.labels)
        training, judged = training.take(~rows), training.take(rows)
    judged = _as_named(judged, training)
    known = set(digests(training))
    fresh = np.array([digest not in known for digest in digests(judged)], bool)
    left_out = int((~fresh).sum())
    judged = judged.take(fresh)
    _check(training, judged, left_out)
    return training, judged, left_out


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

    The file holds `train` and `test`, digests of the images' pixels, `train_labels`,
    `test_labels`, the `names` of the classes, and `holdout_<i>`, the test rows that the i-th
    cascade learned from.

    Raises:
        RefusalError: If the folder holds a comparison of other images.
        ValueError: If an image is in both parts.
    """
    found: dict[str, Any] = {"train": digests(training), "test": digests(test)}
    found |= {"train_labels": training.labels.tolist(), "test_labels": test.labels.tolist()}
    found["names"] = list(training.names)
    shared = set(found["train"]) & set(found["test"])
    if shared:
        raise ValueError(
            "An image must not be in two parts. "
            f"Received: {len(shared)} images in both. Take the parts that load_parts returns."
        )
    if path.exists():
        try:
            with path.open("rb") as file:
                noted = np.load(file, allow_pickle=False)
                same = all(noted[name].tolist() == ids for name, ids in found.items())
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise damaged(path, error) from error
        if not same:
            raise RefusalError(
                "A comparison goes on with the images and classes it began with. "
                f"Received: others than those of {path.parent}. "
                "Name another folder with --out."
            )
        return
    found |= {f"holdout_{i}": rows for i, (rows, _) in enumerate(holdouts(len(test.labels)))}
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **found)


def unseen_classes(count: int) -> list[int]:
    """Return the fifth of the classes that some nets do not see."""
    order = np.random.default_rng(0).permutation(count)
    return sorted(order[: count // 5].tolist())


def damaged(path: Path, error: Exception) -> RefusalError:
    """Return the refusal of a file that is not as a comparison writes it."""
    return RefusalError(
        "A comparison goes on from the files it wrote. "
        f"Received: {path}, which is damaged ({type(error).__name__}). "
        "Remove the folder and begin anew, or name another with --out."
    )


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


def _check(training: Images, test: Images, left_out: int) -> None:
    if len(training.names) < 2 or min(len(test.labels), len(training.labels)) < LEAST:
        also = f", {left_out} more that training has too" if left_out else ""
        raise RefusalError(
            f"A comparison needs two classes, {LEAST} images to search among and {LEAST} test "
            f"images, better some hundreds. Received: {len(training.names)} classes, "
            f"{len(training.labels)} training images, {len(test.labels)} test images{also}. "
            "Give more images."
        )
    if training.pixels.shape[1:] != test.pixels.shape[1:]:
        raise RefusalError(
            "Test images must have as many channels as the training images. "
            f"Received: {test.pixels.shape[-1]} and {training.pixels.shape[-1]} of them. "
            "Convert one of them."
        )


def check_unseen(training: Images, test: Images) -> None:
    """Raise `RefusalError` where too little is left to look for neighbours of unseen classes."""
    hidden = unseen_classes(len(training.names))
    among, asked = (int(np.isin(part.labels, hidden).sum()) for part in (training, test))
    if len(hidden) < 2 or among < LEAST or not asked:
        raise RefusalError(
            f"--unseen hides a fifth of the classes: two or more, with {LEAST} training images "
            f"and one test image. Received: {len(hidden)} classes with {among} and {asked}. "
            "Leave --unseen out."
        )
