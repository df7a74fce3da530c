"""What features held in memory must be, said once for baselines and evaluation."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from ._dims import check_dims, check_width

Array = npt.NDArray[Any]

_ROWS = 8192  # looked at together


def check_features(features: Any, dim: int = 1) -> Array:
    """Return features as an array of rows, of at least `dim` coordinates.

    Raises:
        ValueError: If they are no finite table with at least one row, or narrower than `dim`.
    """
    # Keras would copy an array, and read a memory map whole.
    given = isinstance(features, np.ndarray)
    table = features if given else keras.ops.convert_to_numpy(features)
    if table.ndim != 2 or not table.size or not _is_finite(table):
        raise ValueError(
            "features must be finite numbers (rows, width) with at least one row. "
            f"Received: {table.dtype} of shape {table.shape}. "
            "Give what backbone.predict(inputs) returns."
        )
    check_width(check_dims((dim,)), table.shape[1])
    return table


def _is_finite(table: Array) -> bool:
    parts = (table[start : start + _ROWS] for start in range(0, len(table), _ROWS))
    return all(bool(np.isfinite(part).all()) for part in parts)


def check_fitted(features: Any, width: int) -> Array:
    """Return features as an array of rows, as wide as those something was fitted on.

    Raises:
        ValueError: If they are no finite table with at least one row, or of another width.
    """
    table = check_features(features)
    if table.shape[1] != width:
        raise ValueError(
            "Features must be as wide as those fitted. "
            f"Received: width {table.shape[1]}, fitted on {width}. Embed with the same backbone."
        )
    return table
