"""The parts of the images: training and test, disjoint, and the classes that some nets miss."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .data import ComparisonError, Images, has_test, read
from .training import damaged, replacing

# Which image is in which part, noted by content: no two parts share one.

SPLITS = 10  # of the test images: a fifth learns the thresholds, the rest judges
_HOLDOUT_SHARE = 0.2

Rows = npt.NDArray[np.int64]


def digests(images: Images) -> list[str]:
    """Return what tells the pixels of an image from those of another, for each."""
    return [hashlib.sha256(pixels.tobytes()).hexdigest()[:32] for pixels in images.pixels]


def holdouts(test: Images) -> list[tuple[Rows, Rows]]:
    """Return `SPLITS` splits of the test rows: those that learn thresholds, those that judge.

    Rows of equal pixels are on one side together, so that no image judges what it taught. At most
    a fifth of the rows learns: a group that finds no room any more is among the judging.
    """
    _, groups, sizes = np.unique(digests(test), return_inverse=True, return_counts=True)
    return [
        _split(np.random.default_rng(split).permutation(len(groups)), groups, sizes)
        for split in range(SPLITS)
    ]


def _split(order: Rows, groups: Rows, sizes: Rows) -> tuple[Rows, Rows]:
    room = max(1, int(len(order) * _HOLDOUT_SHARE))
    learns = np.zeros(len(sizes), bool)
    for group in dict.fromkeys(groups[order].tolist()):  # as they come up first
        if sizes[group] <= room:
            learns[group] = True
            room -= sizes[group]
    chosen = learns[groups[order]]
    return order[chosen], order[~chosen]


def note_parts(path: Path, training: Images, test: Images, unseen: Sequence[str]) -> None:
    """Write which image is in which part, or refuse where other images are noted there.

    The file holds `train` and `test`, digests of the images' pixels, `train_labels`,
    `test_labels`, the `names` of the classes, `holdout_<i>`, the test rows that the i-th cascade
    learned from, and `unseen`, the names of the classes that some nets were trained without.

    Args:
        path: Of the file.
        training: The images that train, no more: a budget may have left some of them out.
        test: Those that judge.
        unseen: Names of classes; none where all nets see all.

    Raises:
        ComparisonError: If the folder holds a comparison of other images.
        ValueError: If an image is in two parts: training and test, or both sides of a holdout.
    """
    found: dict[str, Any] = {"train": digests(training), "test": digests(test)}
    splits = holdouts(test)
    _check_apart(found["train"], found["test"], splits)
    found |= {"train_labels": training.labels.tolist(), "test_labels": test.labels.tolist()}
    found["names"] = list(training.names)
    if path.exists():
        _check_same(path, found)
    # Written anew all the same: the images are those noted, but versions may split them otherwise.
    found |= {f"holdout_{split}": rows for split, (rows, _) in enumerate(splits)}
    found["unseen"] = np.array(unseen, np.str_)
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **found)


def _check_apart(train: list[str], test: list[str], splits: list[tuple[Rows, Rows]]) -> None:
    of = np.array(test)
    pairs = {"training and test": (set(train), set(test))}
    for split, (taught, judged) in enumerate(splits):
        pairs[f"both sides of holdout {split}"] = set(of[taught]), set(of[judged])
    for where, (one, other) in pairs.items():
        if one & other:
            raise ValueError(
                "An image must not be in two parts. "
                f"Received: {len(one & other)} images in {where}. "
                "Take the parts that load_parts and holdouts return."
            )


def _check_same(path: Path, found: Mapping[str, Any]) -> None:
    try:
        with path.open("rb") as file:
            noted = np.load(file, allow_pickle=False)
            same = all(noted[name].tolist() == ids for name, ids in found.items())
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise damaged(path, error) from error
    if not same:
        raise ComparisonError(
            "A comparison goes on with the images and classes it began with. "
            f"Received: others than those of {path.parent}. "
            "Name another folder with --out."
        )


LEAST = 10  # images to search among: as many neighbours are looked at
_TEST_SHARE = 0.2


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
        ComparisonError: As `read`; and for fewer than two classes, or classes of the test
            images that training has not.
    """
    training = read(data, size)
    own_test = [place for place in data if has_test(place)]
    if test is not None:
        judged = read(test, size or training.pixels.shape[1])
    elif len(own_test) == len(data):
        judged = read(data, size, test=True)
    elif own_test:
        raise ComparisonError(
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
        raise ComparisonError(
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
        raise ComparisonError(
            f"A comparison needs two classes, {LEAST} images to search among and {LEAST} different "
            f"test images, better some hundreds. Received: {len(training.names)} classes, "
            f"{len(training.labels)} training images, {len(test.labels)} test images{also}. "
            "Give more images."
        )
    if training.pixels.shape[1:] != test.pixels.shape[1:]:
        raise ComparisonError(
            "Test images must have as many channels as the training images. "
            f"Received: {test.pixels.shape[-1]} and {training.pixels.shape[-1]} of them. "
            "Convert one of them."
        )


def check_unseen(training: Images, test: Images) -> None:
    """Raise `ComparisonError` where too little is left to look for neighbours of unseen classes."""
    hidden = unseen_classes(len(training.names))
    among, asked = (int(np.isin(part.labels, hidden).sum()) for part in (training, test))
    if len(hidden) < 2 or among < LEAST or not asked:
        raise ComparisonError(
            f"--unseen hides a fifth of the classes: two or more, with {LEAST} training images "
            f"and one test image. Received: {len(hidden)} classes with {among} and {asked}. "
            "Leave --unseen out."
        )
