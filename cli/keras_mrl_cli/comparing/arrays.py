"""Images that are arrays already: `.npz` files and Keras's own datasets."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..asking import RefusalError
from .pictures import resized

KERAS_DATASETS = ("cifar10", "cifar100", "fashion_mnist", "mnist")

Array = npt.NDArray[Any]


def is_keras(place: str) -> bool:
    """Whether a place is one of Keras's datasets; a folder of that name comes first."""
    return place in KERAS_DATASETS and not Path(place).exists()


def is_arrays(place: str) -> bool:
    """Whether a place is an `.npz`, by its name."""
    return place.lower().endswith(".npz")


def has_test(place: str) -> bool:
    """Whether a place holds test images of its own."""
    return is_keras(place) or (is_arrays(place) and "x_test" in _stored(place))


def from_arrays(place: str, size: int | None, test: bool) -> Iterator[tuple[Array, str]]:
    """Give the images of an `.npz`, each with the name of its class.

    Raises:
        RefusalError: If it does not read, or holds no images.
    """
    names = ("x_test", "y_test") if test else ("x_train", "y_train")
    stored = _stored(place)
    if not set(names) <= set(stored):
        raise _no_arrays(place, f"only {', '.join(stored) or 'nothing'}", names)
    yield from _rows(stored[names[0]], stored[names[1]], place, size)


def from_keras(name: str, size: int | None, test: bool) -> Iterator[tuple[Array, str]]:
    """Give the images of a dataset that Keras downloads, each with the number of its class.

    Raises:
        RefusalError: If it cannot be downloaded.
    """
    import keras

    try:
        parts = getattr(keras.datasets, name).load_data()
    except Exception as error:  # whatever a download raises
        raise RefusalError(
            "A Keras dataset is downloaded the first time. "
            f"Received: {name} ({error}). Connect to the network, or give a folder, zip or .npz."
        ) from error
    pixels, labels = parts[int(test)]
    yield from _rows(pixels, labels, name, size)


def _stored(place: str) -> dict[str, Array]:
    try:
        with open(place, "rb") as file:
            stored = np.load(file, allow_pickle=False)
            if isinstance(stored, np.ndarray):
                raise ValueError("one array without a name")
            return {name: stored[name] for name in stored.files if name[:2] in ("x_", "y_")}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise _no_arrays(place, str(error), ("x_train", "y_train")) from error


def _no_arrays(place: str, received: str, names: tuple[str, str]) -> RefusalError:
    return RefusalError(
        f"An .npz of images must hold {names[0]} and {names[1]}. "
        f"Received: {place} ({received}). Write it with np.savez_compressed."
    )


def _rows(
    pixels: Array, labels: Array, place: str, size: int | None
) -> Iterator[tuple[Array, str]]:
    pixels = pixels[..., None] if pixels.ndim == 3 else pixels
    named = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if pixels.ndim != 4 or pixels.dtype != np.uint8 or named.shape != (len(pixels),):
        raise RefusalError(
            "Images must be uint8 (rows, height, width, channels), with one label each. "
            f"Received: {pixels.dtype} {pixels.shape} and labels {labels.shape} in {place}. "
            "Scale pixels to 0..255, and give class ids or names."
        )
    names = _names(named, place)
    for image, name in zip(pixels, names, strict=True):
        yield (image if size is None else resized(image, size)), name


def _names(labels: Array, place: str) -> list[str]:
    if labels.dtype.kind == "f" and np.array_equal(labels, np.floor(labels)):  # not NaN
        labels = labels.astype(np.int64)
    if labels.dtype.kind == "S":
        labels = np.char.decode(labels, "utf-8")
    if labels.dtype.kind not in "iuUb":
        raise RefusalError(
            "Labels must be class ids or names. "
            f"Received: {labels.dtype} in {place}. Give integers or strings."
        )
    return [str(label) for label in labels]
