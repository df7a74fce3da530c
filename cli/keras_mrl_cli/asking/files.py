"""From a file to the rows that a model takes."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_mrl_serving import InvalidInputError, Manifest
from keras_mrl_serving.inputs import check_inputs

from . import RefusalError
from .images import decode

Arrays = Mapping[str, npt.NDArray[Any]]

IMAGES = (".jpg", ".jpeg", ".png")


def is_image(file: str) -> bool:
    """Whether the name of a file says that it is an image."""
    return Path(file).suffix.lower() in IMAGES


def load(file: str, manifest: Manifest, scale: float) -> Arrays:
    """Return the rows of a file by input name, as many in each; those of .npy memory-mapped.

    Raises:
        RefusalError: If the file does not read, or holds no rows of this model.
    """
    suffix = Path(file).suffix.lower()
    try:
        if suffix in IMAGES:
            return _image(file, manifest, scale)
        if suffix == ".npy":
            return _checked(file, _named(file, {"": _npy(file)}, manifest), manifest)
        if suffix == ".npz":
            return _checked(file, _named(file, _npz(file), manifest), manifest)
    except OSError as error:
        raise _unreadable(file, error) from error
    raise RefusalError(
        f"Files must be .jpg, .jpeg, .png, .npy or .npz. Received: {file}. "
        "Save the rows with numpy.save."
    )


def load_array(file: str) -> npt.NDArray[Any]:
    """Return the array of an .npy file, memory-mapped.

    Raises:
        RefusalError: If the file does not read, or holds none.
    """
    try:
        return _npy(file)
    except OSError as error:
        raise _unreadable(file, error) from error


def load_arrays(file: str) -> Arrays:
    """Return the arrays of an .npz by name, or the one of an .npy under "".

    Raises:
        RefusalError: If the file does not read, or holds none.
    """
    try:
        return _npz(file) if Path(file).suffix.lower() == ".npz" else {"": _npy(file)}
    except OSError as error:
        raise _unreadable(file, error) from error


def count(file: str) -> int:
    """Return how many rows a file has, 0 where it does not read; images are not opened."""
    try:
        arrays = _npz(file) if file.lower().endswith(".npz") else None
        if file.lower().endswith(".npy"):
            arrays = {"": _npy(file)}
    except (OSError, RefusalError):
        return 0
    if arrays is None:
        return int(is_image(file))
    return max((len(array) for array in arrays.values() if array.ndim), default=0)


def shown(inputs: Mapping[str, Mapping[str, Any]]) -> str:
    """Return what a model takes, in words."""
    shapes = {
        name: ", ".join("any" if n is None else str(n) for n in spec["shape"])
        for name, spec in inputs.items()
    }
    return " and ".join(f"{n} {inputs[n]['dtype']} ({shape})" for n, shape in shapes.items())


def _image(file: str, manifest: Manifest, scale: float) -> Arrays:
    if len(manifest.inputs) != 1:
        raise _no_image(file, manifest)
    name, spec = next(iter(manifest.inputs.items()))
    shape = spec["shape"]
    if spec["dtype"] == "string" and shape == [None]:
        if scale != 1:
            raise RefusalError(
                "--scale multiplies pixels that are decoded here. Received: "
                f"--scale {scale} for model {manifest.name!r}, which decodes images itself. "
                "Leave it out."
            )
        data = Path(file).read_bytes()
        if not data:
            raise damaged(file, "it is empty")
        row = np.empty(1, object)
        row[0] = data
        return {name: row}
    if spec["dtype"] == "string" or len(shape) != 4 or shape[3] not in (1, 3, 4):
        raise _no_image(file, manifest)
    pixels = decode(file, shape[1], shape[2], shape[3])
    if np.dtype(spec["dtype"]).kind != "f":
        if scale != 1:
            raise RefusalError(
                "--scale is for models that take fractions. Received: "
                f"--scale {scale} for model {manifest.name!r}, which takes {spec['dtype']}. "
                "Leave it out."
            )
        return {name: pixels[None].astype(spec["dtype"])}
    return {name: (pixels[None] * np.float32(scale)).astype(spec["dtype"], copy=False)}


def _no_image(file: str, manifest: Manifest) -> RefusalError:
    return RefusalError(
        "An image can be sent to a model of one input, of encoded images, string (any), or of "
        "pixels, (any, height, width, channels) with 1, 3 or 4 channels. "
        f"Received: {file} for model {manifest.name!r}, which takes {shown(manifest.inputs)}. "
        "Prepare the rows as in training and give them as .npy or .npz."
    )


def damaged(file: str, why: object) -> RefusalError:
    """Return the refusal of a file that is not what its name says."""
    return RefusalError(
        f"A file must hold what its name says. Received: {file} "
        f"({str(why).rstrip('.')}). Make it anew, or leave it out."
    )


def _unreadable(file: str, error: OSError) -> RefusalError:
    return RefusalError(
        f"Every file must be one that can be read. Received: {file} "
        f"({error.strerror or error}). Correct the path."
    )


def _npy(file: str) -> npt.NDArray[Any]:
    try:
        try:
            array = np.load(file, mmap_mode="r", allow_pickle=False)
        except ValueError:  # an array without rows cannot be mapped
            array = np.load(file, allow_pickle=False)
            if isinstance(array, np.ndarray) and array.size:
                raise
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise damaged(file, "no .npy of numbers, or not a whole one") from error
    if not isinstance(array, np.ndarray):
        raise damaged(file, "it is an .npz")
    return array


def _npz(file: str) -> dict[str, npt.NDArray[Any]]:
    try:
        with np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (ValueError, EOFError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        raise damaged(file, "no .npz of numbers, or not a whole one") from error


def _named(file: str, arrays: Arrays, manifest: Manifest) -> Arrays:
    if len(arrays) == len(manifest.inputs) == 1:
        return dict(zip(manifest.inputs, arrays.values(), strict=True))
    if set(arrays) != set(manifest.inputs):
        held = ", ".join(filter(None, arrays)) or "no names"
        raise RefusalError(
            f"A file for model {manifest.name!r} must hold arrays named "
            f"{', '.join(manifest.inputs)}. Received: {file} with {held}. "
            "Save them by name with numpy.savez."
        )
    return arrays


def _checked(file: str, arrays: Arrays, manifest: Manifest) -> Arrays:
    """Check shapes and dtypes by one row, so that what is memory-mapped is not read."""
    rows = {len(array) if array.ndim else None for array in arrays.values()}
    try:
        if None not in rows:
            check_inputs(manifest.inputs, {name: array[:1] for name, array in arrays.items()})
        if None in rows or len(rows) > 1:
            raise InvalidInputError
    except InvalidInputError as error:
        held = {n: {"dtype": a.dtype, "shape": a.shape} for n, a in arrays.items()}
        raise RefusalError(
            f"A file must hold rows as model {manifest.name!r} takes them: "
            f"{shown(manifest.inputs)}. Received: {file} with {shown(held)}. "
            "Prepare the rows as in training."
        ) from error
    return arrays
