"""The rows an export is verified on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keras_mrl import split
from keras_mrl_export import ImageDecoder
from keras_mrl_export.sample import declared_inputs

from ..asking import RefusalError
from ..asking.files import load_arrays

_ROWS = 8


def read_sample(file: str) -> Any:
    """Return the rows of a file: an array, or arrays by input name.

    Raises:
        RefusalError: If the file does not read.
    """
    arrays = load_arrays(file)
    return arrays[""] if set(arrays) == {""} else dict(arrays)


def random_sample(model: Any) -> Any:
    """Return random rows in [0, 1), where the model declares floats of known shape.

    Raises:
        RefusalError: If it takes something else.
    """
    backbone, _ = split(model)
    declared = declared_inputs(backbone)
    unknown = {
        name: f"{name} {tensor.dtype} {tuple(tensor.shape)}"
        for name, tensor in declared.items()
        if "float" not in str(tensor.dtype) or None in tensor.shape[1:]
    }
    if unknown or not declared:
        raise RefusalError(
            "An export is verified on rows, and random ones stand only for floats of known shape. "
            f"Received: {', '.join(unknown.values()) or 'a model that declares no inputs'}. "
            "Give a few real rows: --sample FILE.npy, or .npz by input name."
        )
    rng = np.random.default_rng(0)
    rows = {
        name: rng.random((_ROWS, *tensor.shape[1:]), np.float32)
        for name, tensor in declared.items()
    }
    return next(iter(rows.values())) if len(rows) == 1 else rows


def image_files(model: Any, files: Sequence[str], scale: float) -> tuple[list[bytes], ImageDecoder]:
    """Return the bytes of some files, and what decodes such to the model's input.

    Raises:
        RefusalError: If a file does not read, or the model takes no image of known size.
    """
    backbone, _ = split(model)
    shapes = [tuple(tensor.shape[1:]) for tensor in declared_inputs(backbone).values()]
    if len(shapes) != 1 or len(shapes[0]) != 3 or None in shapes[0]:
        raise RefusalError(
            "Images are decoded to the one input of a model: height, width and channels. "
            f"Received: a model with inputs of shapes {shapes}. Put an input of known size before "
            "it: x = keras.Input((224, 224, 3)); keras.Model(x, model(x))."
        )
    height, width, channels = shapes[0]
    try:
        encoded = [Path(file).read_bytes() for file in files]
    except OSError as error:
        raise RefusalError(
            "--images must name files that can be read. "
            f"Received: {error.filename} ({error.strerror}). Correct the path."
        ) from error
    return encoded, ImageDecoder(height=height, width=width, channels=channels, scale=scale)
