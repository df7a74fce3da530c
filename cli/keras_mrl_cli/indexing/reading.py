"""Arrays of embeddings and labels, as files hold them."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

from ..asking import RefusalError
from ..asking.files import load_array


def load_embeddings(flag: str, file: str) -> npt.NDArray[Any]:
    """Return the rows of an .npy file, memory-mapped.

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
    """Return one label per row.

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
