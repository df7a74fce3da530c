"""The files a user names: rows for a model, embeddings, labels, a policy, the folder of a model.

Arrays of `.npy` files are memory-mapped, and checked window by window, so they may be larger than
the memory; `keras_mrl_serving.untrusted` reads them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from keras_mrl_serving import (
    CascadePolicy,
    InvalidInputError,
    Manifest,
    ManifestError,
    UnreadableImageError,
)
from keras_mrl_serving.images import (
    SUFFIXES,
    is_image,
    read_image,
    resize_image,
    served_image,
)
from keras_mrl_serving.inputs import check_inputs
from keras_mrl_serving.saved_model import GRAPH_FILE, list_versions
from keras_mrl_serving.untrusted import (
    JSON_BYTES,
    UntrustedFileError,
    parse_json,
    read_array,
    read_arrays,
    read_bytes,
)

from .shared import RefusalError, one_line, refusing
from .texts import count_texts, load_texts, takes_texts
from .words import COLUMNS, LINES, is_texts

Arrays = Mapping[str, npt.NDArray[Any]]
T = TypeVar("T")

_IMAGE_BYTES = 2**31 - 1  # of a message that holds one
_TEXT_BYTES = 2**31 - 1  # of a file of ids
_CHANNELS = (1, 3, 4)
_NO_NAMES = {"", "arr_0"}  # of the array of an .npy, and of the first that numpy.savez is given
_WINDOW_BYTES = 2**24  # of a memory-mapped array that are checked at a time


def count_rows(file: str) -> int:
    """Return how many rows a file has, 0 where it does not read; images are not opened."""
    if is_texts(file):
        try:
            return count_texts(file)
        except (RefusalError, UntrustedFileError, OSError):
            return 0
    if not file.lower().endswith((".npy", ".npz")):
        return int(is_image(file))
    try:
        arrays = load_arrays(file)
    except RefusalError:
        return 0
    return max((len(array) for array in arrays.values() if array.ndim), default=0)


# The rows a model takes.


def load_rows(file: str, manifest: Manifest, scale: float, column: str | None = None) -> Arrays:
    """Return the rows of a file by input name, as many in each; those of .npy memory-mapped.

    Args:
        file: An image, an .npy or an .npz, a text or a file of texts.
        manifest: Of the model that takes them.
        scale: Multiplies the pixels of an image that is decoded here.
        column: Column of the texts.

    Raises:
        RefusalError: If the file does not read, or holds no rows of this model.
    """
    try:
        return _load_rows(file, manifest, scale, column)
    except RefusalError as refusal:
        if manifest.other_tower is None:
            raise
        try:
            _load_rows(file, manifest.tower(other_tower=True), scale, column)
        except RefusalError:
            raise refusal from None
        raise RefusalError(
            "Each tower of a model takes the rows of its own side. "
            f"Received: {file}, which the other tower of model {manifest.name!r} takes. "
            "Embed rows of galleries with --other-tower, and rows of queries without."
        ) from refusal


def _load_rows(file: str, manifest: Manifest, scale: float, column: str | None) -> Arrays:
    if is_texts(file):
        with _reading(file):
            return load_texts(file, manifest, column)
    if is_image(file):
        with _reading(file):
            return _image_row(file, manifest, scale)
    if Path(file).suffix.lower() in (".npy", ".npz"):
        return _checked(file, _by_input(file, load_arrays(file), manifest), manifest)
    is_folder = Path(file).is_dir()
    received = f"{file}{', a folder' if is_folder else ''}"
    if takes_texts(manifest):
        raise RefusalError(
            f"Texts are given as {', '.join(LINES + COLUMNS)}, .npy or .npz, as - for standard "
            f"input, or as words with a blank. Received: {received}. "
            "Rename the file, or give one word as --text."
        )
    raise RefusalError(
        f"Files must be {', '.join(SUFFIXES)}, .npy or .npz. "
        f"Received: {received}. "
        + (
            f"Name the files in it: {file.rstrip('/')}/*.jpg."
            if is_folder
            else "Save an image anew as PNG, and rows of an array with numpy.save."
        )
    )


def check_rows(file: str, manifest: Manifest, scale: float, column: str | None = None) -> Arrays:
    """Return the rows of a file as `load_rows`, once all values are checked.

    An image that is sent as it is is decoded, too. Where Pillow is not installed, the server will
    say of such an image that it is damaged.

    Raises:
        RefusalError: As `load_rows`; or if an image is damaged, or a value is none for the model.
    """
    rows = load_rows(file, manifest, scale, column)
    if not is_texts(file) and is_image(file) and next(iter(rows.values())).dtype == object:
        with _reading(file), suppress(ImportError):
            _read(file, read_image)
    elif is_texts(file) or not is_image(file):
        _check_values(file, rows, manifest)
    return rows


def _by_input(file: str, arrays: Arrays, manifest: Manifest) -> Arrays:
    if len(arrays) == len(manifest.inputs) == 1 and set(arrays) <= _NO_NAMES:
        return dict(zip(manifest.inputs, arrays.values(), strict=True))
    if set(arrays) != set(manifest.inputs):
        names = ", ".join(filter(None, arrays)) or "no names"
        raise RefusalError(
            f"A file for model {manifest.name!r} must hold arrays named "
            f"{', '.join(manifest.inputs)}. Received: {file} with {names}. "
            "Save them by name with numpy.savez."
        )
    return arrays


def _checked(file: str, arrays: Arrays, manifest: Manifest) -> Arrays:
    """Check shapes and dtypes; no value is read."""
    lengths = {len(array) if array.ndim else None for array in arrays.values()}
    try:
        if None not in lengths:
            check_inputs(manifest.inputs, {name: array[:0] for name, array in arrays.items()})
        if None in lengths or len(lengths) > 1:
            raise InvalidInputError
    except InvalidInputError as error:
        specs = {n: {"dtype": a.dtype, "shape": a.shape} for n, a in arrays.items()}
        is_text = {spec["dtype"] for spec in manifest.inputs.values()} == {"string"}
        remedy = "Give image files" if is_text else "Prepare the rows as in training"
        if is_text and manifest.decoder is None:
            remedy += ", or strings if it takes text"
        raise RefusalError(
            f"A file must hold rows as model {manifest.name!r} takes them: "
            f"{_in_words(manifest.inputs)}. Received: {file} with {_in_words(specs)}. {remedy}."
        ) from error
    return arrays


def _check_values(file: str, arrays: Arrays, manifest: Manifest) -> None:
    """Check all values, window by window: a memory-mapped array may be larger than the memory."""
    rows = len(next(iter(arrays.values())))
    row_bytes = sum(array[:1].nbytes for array in arrays.values())
    size = max(1, _WINDOW_BYTES // max(row_bytes, 1))
    for start in range(0, rows, size):
        stop = min(start + size, rows)
        try:
            check_inputs(manifest.inputs, {n: array[start:stop] for n, array in arrays.items()})
        except InvalidInputError as error:
            place = f"{file}, rows {start} to {stop - 1}"
            raise RefusalError(f"{place}: {one_line(error)}") from error


def _in_words(inputs: Mapping[str, Mapping[str, Any]]) -> str:
    shapes = {
        name: ", ".join("any" if n is None else str(n) for n in spec["shape"])
        for name, spec in inputs.items()
    }
    return " and ".join(f"{n} {inputs[n]['dtype']} ({shape})" for n, shape in shapes.items())


# Images.


def _image_row(file: str, manifest: Manifest, scale: float) -> Arrays:
    """Return one row: the file's bytes for a model that decodes them itself, else its pixels."""
    if len(manifest.inputs) != 1:
        raise _not_for_images(file, manifest)
    name, spec = next(iter(manifest.inputs.items()))
    shape = spec["shape"]
    if spec["dtype"] == "string" and shape == [None]:
        if scale != 1:
            raise RefusalError(
                "--scale multiplies pixels that are decoded here. Received: "
                f"--scale {scale} for model {manifest.name!r}, which decodes images itself. "
                "Leave it out."
            )
        row = np.empty(1, object)
        row[0] = _read(file, served_image)
        return {name: row}
    if spec["dtype"] == "string" or len(shape) != 4 or shape[3] not in _CHANNELS:
        raise _not_for_images(file, manifest)
    pixels = _read(file, read_image, channels=shape[3])
    pixels = resize_image(pixels, shape[1] or pixels.shape[0], shape[2] or pixels.shape[1])
    if np.dtype(spec["dtype"]).kind != "f":
        if scale != 1:
            raise RefusalError(
                "--scale is for models that take fractions. Received: "
                f"--scale {scale} for model {manifest.name!r}, which takes {spec['dtype']}. "
                "Leave it out."
            )
        return {name: pixels[None].astype(spec["dtype"])}
    return {name: (pixels[None] * np.float32(scale)).astype(spec["dtype"], copy=False)}


def _read(file: str, read: Callable[..., T], **settings: Any) -> T:
    """Return what a function of images makes of the bytes of a file."""
    data = read_bytes(file, _IMAGE_BYTES)
    with refusing(UnreadableImageError):
        return read(data, name=file, **settings)


def _not_for_images(file: str, manifest: Manifest) -> RefusalError:
    return RefusalError(
        "An image can be sent to a model of one input, of encoded images, string (any), or of "
        "pixels, (any, height, width, channels) with 1, 3 or 4 channels. "
        f"Received: {file} for model {manifest.name!r}, which takes {_in_words(manifest.inputs)}. "
        "Prepare the rows as in training and give them as .npy or .npz."
    )


# Arrays.


def load_arrays(file: str) -> Arrays:
    """Return the arrays of an .npz by name, or the one of an .npy under "", memory-mapped.

    Raises:
        RefusalError: If the file does not read, or holds none.
    """
    if Path(file).suffix.lower() != ".npz":
        return {"": load_array(file)}
    with _reading(file):
        return read_arrays(file)


def load_array(file: str) -> npt.NDArray[Any]:
    """Return the array of an .npy file, memory-mapped.

    Raises:
        RefusalError: If the file does not read, or holds none.
    """
    with _reading(file):
        return read_array(file)


def load_ids(file: str) -> npt.NDArray[Any]:
    """Return the ids of an .npy file, or of a text file with one a line.

    Raises:
        RefusalError: If the file does not read, or is no text.
    """
    if Path(file).suffix.lower() == ".npy":
        return load_array(file)
    with _reading(file):
        data = read_bytes(file, _TEXT_BYTES)
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise RefusalError(
            "Ids are an .npy file, or text with one a line in UTF-8. "
            f"Received: {file}, which is neither ({error.reason}). Write it as UTF-8."
        ) from error
    ids = np.empty(len(lines), object)
    ids[:] = lines
    return ids


def load_embeddings(flag: str, file: str) -> npt.NDArray[Any]:
    """Return the rows `(rows, width)` of the .npy file of a flag, memory-mapped.

    Raises:
        RefusalError: If the file does not read, or its rows are no vectors of numbers.
    """
    array = load_array(file)
    if array.ndim != 2 or array.dtype.kind not in "fiu":
        raise RefusalError(
            f"{flag} must hold embeddings, numbers of shape (rows, width). "
            f"Received: {file} with {array.dtype} {array.shape}. "
            "Write them with `keras-mrl embed --out`, or numpy.save."
        )
    return array


def load_labels(flag: str, file: str, rows: int) -> npt.NDArray[Any]:
    """Return one label per row of the .npy file of a flag.

    Raises:
        RefusalError: If the file does not read, or holds something else.
    """
    labels = load_array(file)
    if labels.shape != (rows,):
        raise RefusalError(
            f"{flag} must hold one label per row. "
            f"Received: {file} of shape {labels.shape} for {rows} rows. "
            "Save them in the order of the rows."
        )
    return labels


def _damaged(file: str, why: str) -> RefusalError:
    return RefusalError(
        f"A file must hold what its name says. Received: {file} ({why}). "
        "Make it anew, or leave it out."
    )


@contextmanager
def _reading(file: str) -> Iterator[None]:
    """Turn what reading a file raises into refusals."""
    rule = "Every file must be one that can be read."
    try:
        with refusing(rule=rule, remedy="Correct the path.", place=file):
            yield
    except UntrustedFileError as error:
        raise _damaged(file, str(error)) from error


# A policy.


def load_policy(file: str) -> CascadePolicy:
    """Return the cascade policy of the JSON file of `--policy`.

    Raises:
        RefusalError: If the file does not read, or holds none.
    """
    rule = "--policy must be a file that can be read."
    try:
        with refusing(rule=rule, remedy="Correct the path."):
            text = read_bytes(file, JSON_BYTES)
        return CascadePolicy.from_json(parse_json(text))
    except ManifestError as error:
        raise RefusalError(f"{file}: {error}") from error
    except ValueError as error:
        raise RefusalError(
            "--policy must be the JSON of a CascadePolicy. "
            f"Received: {file} ({error}). Write it with json.dump(policy.to_json(), file)."
        ) from error


# The folder of a version, and the folder above the versions.


def find_version(path: str) -> tuple[Path, dict[int, Path]]:
    """Return the version a path names, and all versions by number if it is the folder above.

    Of several the highest is returned: a server takes that one.

    Raises:
        RefusalError: If there is none.
        OSError: If the folder cannot be read.
    """
    folder = Path(path)
    if (folder / GRAPH_FILE).exists():
        return folder, {}
    versions = {}
    if folder.is_dir():
        entries = {number: Path(entry) for number, entry in list_versions(folder).items()}
        versions = {number: entry for number, entry in entries.items() if entry.is_dir()}
    if not versions:
        raise RefusalError(
            f"A model is a folder with {GRAPH_FILE}, or the folder above such, each named by its "
            f"number. Received: {path}. Correct the path, or export one with keras-mrl export."
        )
    highest = list(versions.values())[-1]
    if not (highest / GRAPH_FILE).exists():
        raise RefusalError(
            f"A version is a folder with {GRAPH_FILE}. Received: {highest} without one. "
            "Copy it again under a name that is no number, and rename it."
        )
    return highest, versions


def stray_files(base_path: str) -> list[str]:
    """Return the names of files that a server takes for versions, and cannot load."""
    entries = list_versions(Path(base_path)).values()
    return [os.path.basename(entry) for entry in entries if not os.path.isdir(entry)]
