"""Which image is in which part, noted by content: no two parts share one."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..asking import RefusalError
from .files import damaged, replacing
from .images import Images

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
        RefusalError: If the folder holds a comparison of other images.
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
        raise RefusalError(
            "A comparison goes on with the images and classes it began with. "
            f"Received: others than those of {path.parent}. "
            "Name another folder with --out."
        )
