"""What the trained model makes of the sample, found out without a risk to the model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from .errors import ExportError

_BATCH = 32
_MOST_SHOWN = 300
_COLOURS = re.compile(r"\x1b\[\d*m")


def answers(model: keras.Model, rows: Any) -> npt.NDArray[np.float32]:
    """Return the one output of `model` for `rows`.

    The model is called and not asked by `predict`: on JAX that takes the weights out of the model
    while it runs, and one that fails or is interrupted never puts them back.

    Args:
        model: The model, which is built if it was not.
        rows: What it takes: one array, or arrays by input name.

    Raises:
        ValueError: If it cannot take the rows, or has several outputs.
        ExportError: If it answers with values that are not finite.
    """
    size = len(next(iter(rows.values())) if isinstance(rows, Mapping) else rows)
    batches = [_answer(model, rows, start) for start in range(0, size, _BATCH)]
    outputs = np.concatenate(batches)
    if not np.isfinite(outputs).all():
        raise ExportError(
            "A model must give finite values to be exported. "
            f"Received: NaN or infinity from {model.name!r} on the sample. "
            "Train it to a finite loss, and look for bad rows in the sample."
        )
    return outputs


def _answer(model: keras.Model, rows: Any, start: int) -> npt.NDArray[np.float32]:
    part = keras.tree.map_structure(lambda array: array[start : start + _BATCH], rows)
    try:
        output = model(part, training=False)
    except Exception as error:  # whatever a layer or the backend raises
        raise ValueError(
            "sample must hold rows that the model takes. "
            f"Received: {_shapes(rows)}, and {type(error).__name__}: {_plain(error)} "
            "Prepare its rows as in training: model(sample) must run."
        ) from error
    if isinstance(output, (list, tuple, Mapping)):
        raise ValueError(
            "A model is exported with one output. "
            f"Received: {len(output)} outputs from {model.name!r}. "
            "Name the one that is served: keras.Model(model.input, features)."
        )
    return np.asarray(keras.ops.convert_to_numpy(output), dtype=np.float32)


def _shapes(rows: Any) -> str:
    given = rows if isinstance(rows, Mapping) else {"": rows}
    return " and ".join(f"{name} {array.shape}".strip() for name, array in given.items())


def _plain(error: Exception) -> str:
    """What is said, in one line of some length."""
    text = " ".join(_COLOURS.sub("", str(error)).split())
    return text if len(text) <= _MOST_SHOWN else text[:_MOST_SHOWN] + " ..."
