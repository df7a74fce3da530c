"""Images or embeddings and their classes: folders and zips of files, arrays, Keras's datasets.

A folder and the zip of it are read by one rule and give the same images. Files become RGB squares
as a viewer shows them; arrays are taken as they are: tables are embeddings, others images.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from keras_mrl_serving.errors import UnreadableImageError
from keras_mrl_serving.images import is_image, read_image, resize_image
from keras_mrl_serving.untrusted import (
    UntrustedFileError,
    open_archive,
    read_arrays,
    read_bytes,
)

Array = npt.NDArray[Any]
Place = str | Mapping[str, Array]  # or the arrays themselves

KERAS_DATASETS = ("cifar10", "cifar100", "fashion_mnist", "mnist")

_FILE_BYTES = 2**28  # of one image
_LARGEST = 64  # height and width of files where no size is requested: the nets are small


class ComparisonError(ValueError):
    """Says why there can be no comparison: the rule, what was received, what to do.

    Examples:
        >>> np.savez("few.npz", x_train=np.zeros((8, 8, 8), "uint8"), y_train=np.arange(8) % 2)
        >>> try:
        ...     compare("few.npz", "compared")
        ... except ComparisonError as error:
        ...     print(str(error).rpartition(". ")[2])
        Give more images.
    """


@dataclass(frozen=True, eq=False)
class Part:
    """Images of one size, or embeddings of one width, and the class of each.

    Args:
        inputs: Images, uint8 `(rows, height, width, channels)`; or embeddings, float32
            `(rows, width)`.
        labels: Positions in `names`, int64 `(rows,)`.
        names: Of the classes.
    """

    inputs: npt.NDArray[Any]
    labels: npt.NDArray[np.int64]
    names: tuple[str, ...]

    @property
    def is_embedded(self) -> bool:
        """Whether these are embeddings."""
        return self.inputs.ndim == 2

    @property
    def kind(self) -> str:
        """What the rows are called: `images` or `embeddings`."""
        return "embeddings" if self.is_embedded else "images"

    def take(self, rows: Any) -> Part:
        """Return these rows alone."""
        return Part(self.inputs[rows], self.labels[rows], self.names)


def split_classes(images: Part, unseen: Sequence[int]) -> tuple[Part, Part]:
    """Return the images of all other classes, and those of the `unseen` ones.

    Both number their classes from 0, in the order they had.
    """
    classes = np.arange(len(images.names))
    is_unseen = np.isin(classes, unseen)
    return _of_classes(images, classes[~is_unseen]), _of_classes(images, classes[is_unseen])


def _of_classes(images: Part, classes: npt.NDArray[np.int64]) -> Part:
    """The images of some classes; a class without images keeps its number, too."""
    rows = np.isin(images.labels, classes)
    names = tuple(images.names[number] for number in classes)
    labels = np.searchsorted(classes, images.labels[rows]).astype(np.int64)
    return Part(images.inputs[rows], labels, names)


def read(
    places: Sequence[Place],
    size: int | None,
    test: bool = False,
    unreadable: list[str] | None = None,
) -> Part:
    """Return the images of all `places` together.

    Args:
        places: Folders or zips with one sub-folder per class, `.npz` files, or names of
            `KERAS_DATASETS`; or arrays by the names they have in an `.npz`.
        size: Height and width to resize to. None keeps that of arrays, and gives files the height
            of the first, up to 64.
        test: Whether to read the test part of `.npz` files and Keras's datasets.
        unreadable: Takes name and reason of every image file that cannot be read; those are left
            out. None refuses them, all at once.

    Raises:
        ComparisonError: If a place is none of those, or holds no images of classes; or if image
            files cannot be read.
        OSError: If a folder cannot be read.
    """
    pixels: list[Array] = []
    names: list[str] = []
    left_out: list[str] = []
    for place in places:
        height = pixels[0].shape[0] if pixels else None
        for image, name in _images(place, size, height, test, left_out):
            pixels.append(image)
            names.append(name)
    if unreadable is None or not pixels:
        refuse_unreadable(left_out)
    else:
        unreadable += left_out
    if not pixels:
        raise ComparisonError(
            "--data must hold images in one sub-folder per class. "
            f"Received: {', '.join(map(name_of, places))}, without any. "
            "Name the folder above those of the classes."
        )
    shapes = {image.shape for image in pixels}
    if len(shapes) > 1:
        raise ComparisonError(
            "All images must have one size and as many channels, all embeddings one width. "
            f"Received: {', '.join(map(str, sorted(shapes)[:3]))}. "
            "Give --size for images, or leave some out."
        )
    classes = tuple(sorted(set(names), key=_numbers_first))
    numbers = {name: number for number, name in enumerate(classes)}
    labels = np.array([numbers[name] for name in names], np.int64)
    return Part(np.stack(pixels), labels, classes)


def refuse_unreadable(files: Sequence[str]) -> None:
    """Raise `ComparisonError` if there are image files that cannot be read, given with reasons."""
    if files:
        raise ComparisonError(
            "Every image file must be a whole JPEG, PNG, GIF, BMP or WebP. "
            f"Received: {len(files)} that cannot be read: {', '.join(files)}. Save them anew as "
            "8-bit PNG or JPEG, or go on without them: --skip-unreadable, skip_unreadable=True."
        )


def name_of(place: Place) -> str:
    """Return what a place is called in sentences and reports."""
    return place if isinstance(place, str) else "arrays"


def has_test(place: Place) -> bool:
    """Return whether a place holds a test part of its own."""
    if not isinstance(place, str):
        return "x_test" in place
    return _is_dataset(place) or (_is_npz(place) and "x_test.npy" in _names_in_npz(place))


def _numbers_first(name: str) -> tuple[bool, int, str]:
    """Sort classes named by numbers by their value, before those named by words."""
    return (not name.isdigit(), int(name) if name.isdigit() else 0, name)


def _images(
    place: Place, size: int | None, height: int | None, test: bool, unreadable: list[str]
) -> Iterator[tuple[Array, str]]:
    """The images of one place with the names of their classes; `height` is that of earlier ones."""
    if not isinstance(place, str):
        names = _names_of_part(test)
        if not set(names) <= set(place):
            raise ComparisonError(
                f"Arrays are given as {names[0]} and {names[1]}. "
                f"Received: {', '.join(map(str, place)) or 'none'}. "
                'Give {"x_train": ..., "y_train": ...}.'
            )
        inputs, labels = (np.asarray(place[name]) for name in names)
        return _from_arrays(inputs, labels, name_of(place), size)
    if _is_dataset(place):
        return _from_keras(place, size, test)
    if _is_npz(place):
        return _from_npz(place, size, test)
    return _from_files(Path(place), size or height, unreadable)


def _is_dataset(place: str) -> bool:
    """Whether a place is one of Keras's datasets; a folder of that name comes first."""
    return place in KERAS_DATASETS and not Path(place).exists()


def _is_npz(place: str) -> bool:
    return place.lower().endswith(".npz")


# Arrays.


def _from_keras(name: str, size: int | None, test: bool) -> Iterator[tuple[Array, str]]:
    try:
        parts = getattr(keras.datasets, name).load_data()
    except Exception as error:  # whatever a download raises
        raise ComparisonError(
            "A Keras dataset is downloaded the first time. "
            f"Received: {name} ({error}). Connect to the network, or give a folder, zip or .npz."
        ) from error
    pixels, labels = parts[int(test)]
    yield from _from_arrays(pixels, labels, name, size)


def _from_npz(place: str, size: int | None, test: bool) -> Iterator[tuple[Array, str]]:
    names = _names_of_part(test)
    arrays = _load_npz(place, names)
    if not set(names) <= set(arrays):
        there = ", ".join(_names_in_npz(place)).replace(".npy", "")
        raise _no_images(place, f"only {there or 'nothing'}", names)
    yield from _from_arrays(arrays[names[0]], arrays[names[1]], place, size)


def _names_of_part(test: bool) -> tuple[str, str]:
    return ("x_test", "y_test") if test else ("x_train", "y_train")


def _names_in_npz(place: str) -> Sequence[str]:
    try:
        with open_archive(place) as archive:
            return archive.names
    except (OSError, UntrustedFileError) as error:
        raise _no_images(place, str(error), ("x_train", "y_train")) from error


def _load_npz(place: str, names: tuple[str, str]) -> dict[str, Array]:
    try:
        return read_arrays(place, lambda name: name in names)
    except (OSError, UntrustedFileError) as error:
        raise _no_images(place, str(error), names) from error


def _no_images(place: str, received: str, names: tuple[str, str]) -> ComparisonError:
    return ComparisonError(
        f"An .npz of images or embeddings must hold {names[0]} and {names[1]}. "
        f"Received: {place} ({received}). Write it with np.savez_compressed."
    )


def _from_arrays(
    pixels: Array, labels: Array, place: str, size: int | None
) -> Iterator[tuple[Array, str]]:
    pixels = pixels[..., None] if pixels.ndim == 3 else pixels
    if pixels.ndim == 2:
        pixels = _check_embeddings(pixels, place, size)
    flat = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if pixels.ndim != 2 and (pixels.ndim != 4 or pixels.dtype != np.uint8):
        raise ComparisonError(
            "Images must be uint8 (rows, height, width, channels), and embeddings a table of "
            f"floats (rows, width). Received: {pixels.dtype} {pixels.shape} in {place}. "
            "Scale pixels to 0..255; pool embeddings of tokens to one row per text."
        )
    if flat.shape != (len(pixels),):
        raise ComparisonError(
            "Every image or embedding must have one label. "
            f"Received: {pixels.shape} and labels {labels.shape} in {place}. "
            "Give class ids or names, not one-hot rows."
        )
    for image, name in zip(pixels, _class_names(flat, place), strict=True):
        yield (image if size is None else resize_image(image, size, size)), name


def _check_embeddings(embeddings: Array, place: str, size: int | None) -> Array:
    """Return embeddings as float32; refuse what is no table of finite floats."""
    if embeddings.dtype.kind != "f" or not embeddings.shape[1]:
        raise ComparisonError(
            "Embeddings must be a table of floats (rows, width). "
            f"Received: {embeddings.dtype} {embeddings.shape} in {place}. "
            "Give images their height and width; give quantised embeddings as floats."
        )
    if size is not None:
        raise ComparisonError(
            "--size is that of images. "
            f"Received: embeddings {embeddings.shape} in {place}. Leave --size out."
        )
    with np.errstate(over="ignore"):  # seen as infinite below
        embeddings = embeddings.astype(np.float32)
    finite: npt.NDArray[np.bool] = np.asarray(np.isfinite(embeddings).all(axis=1))
    if not finite.all():
        raise ComparisonError(
            "Embeddings must be finite float32 numbers. "
            f"Received: {(~finite).sum():,} of {len(finite):,} rows with NaN or infinity in "
            f"{place}, the first is row {finite.argmin()}. Leave those rows out, or embed them "
            "again."
        )
    if len(embeddings) > 1 and not np.ptp(embeddings, axis=0).any():
        raise ComparisonError(
            "Embeddings must differ. "
            f"Received: {len(embeddings):,} equal rows in {place}. Correct how they are made."
        )
    return embeddings


def _class_names(labels: Array, place: str) -> list[str]:
    if labels.dtype.kind == "f" and np.array_equal(labels, np.floor(labels)):  # not NaN
        labels = labels.astype(np.int64)
    if labels.dtype.kind == "S":
        labels = np.char.decode(labels, "utf-8")
    if labels.dtype.kind not in "iuUb":
        raise ComparisonError(
            "Labels must be class ids or names. "
            f"Received: {labels.dtype} in {place}. Give integers or strings."
        )
    return [str(label) for label in labels]


# Files.


def _from_files(
    place: Path, size: int | None, unreadable: list[str]
) -> Iterator[tuple[Array, str]]:
    for name, read in _image_files(place):
        try:
            pixels = read_image(read(), name=name)
        except UnreadableImageError as error:
            unreadable.append(f"{name} ({error.reason})")
        except ImportError as error:
            raise ComparisonError(str(error)) from error
        except (OSError, UntrustedFileError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            unreadable.append(f"{name} ({reason})")
        else:
            size = size or min(len(pixels), _LARGEST)  # the first image decides
            yield resize_image(pixels, size, size), PurePosixPath(name).parent.name


def _image_files(place: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Every image in a folder or a zip by name, and what reads its bytes, in order of the names."""
    if place.is_dir():
        for name in _names_of_images(place, _walk(place)):
            yield name, partial(read_bytes, place / name, _FILE_BYTES)
        return
    try:
        with open_archive(place) as archive:
            for name in _names_of_images(place, archive.names):
                yield name, partial(archive.read, name)
    except (OSError, UntrustedFileError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ComparisonError(
            "Images come from a folder, a zip, an .npz or a Keras dataset. "
            f"Received: {place} ({reason}). "
            "Correct the path, or name cifar10, cifar100, fashion_mnist or mnist."
        ) from error


def _walk(folder: Path) -> Iterator[str]:
    """Names of all files below a folder, as a zip of it would have them."""

    def stop(error: OSError) -> None:
        raise error  # a folder that cannot be read is not an empty one

    for above, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        here = Path(above)
        folders[:] = [name for name in folders if not _links_upwards(here / name)]
        yield from ((here / name).relative_to(folder).as_posix() for name in names)


def _links_upwards(folder: Path) -> bool:
    """Whether a folder is a link to one that it lies in, which would never end."""
    here = folder.parent.resolve()
    return folder.is_symlink() and folder.resolve() in (here, *here.parents)


def _names_of_images(place: Path, names: Iterable[str]) -> list[str]:
    images = sorted(filter(_is_of_a_class, names))
    above = sorted({str(PurePosixPath(name).parent.parent) for name in images})
    if len(above) > 1:
        raise ComparisonError(
            "The folders of the classes must lie side by side. "
            f"Received: {place} with classes in {', '.join(above[:3])}. "
            "Give one of them, the test images as --test for example."
        )
    return images


def _is_of_a_class(name: str) -> bool:
    """Whether this is an image of a class: hidden files and those in no folder are not."""
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
    is_file = not name.endswith("/")  # a zip lists folders, too
    return is_file and bool(path.parent.name) and is_image(name) and not hidden
