"""The parts of the images: training and test, disjoint, and the classes that some nets miss."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..asking import RefusalError
from .arrays import has_test
from .images import Images, read
from .splits import digests

LEAST = 10  # images to search among: as many neighbours are looked at
_TEST_SHARE = 0.2

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


def unseen_classes(count: int) -> list[int]:
    """Return the fifth of the classes that some nets do not see."""
    order = np.random.default_rng(0).permutation(count)
    return sorted(order[: count // 5].tolist())


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
    different = len(set(digests(test)))
    if len(training.names) < 2 or min(different, len(training.labels)) < LEAST:
        also = f" ({different} different)" if different < len(test.labels) else ""
        also += f", {left_out} more that training has too" if left_out else ""
        raise RefusalError(
            f"A comparison needs two classes, {LEAST} images to search among and {LEAST} different "
            f"test images, better some hundreds. Received: {len(training.names)} classes, "
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
