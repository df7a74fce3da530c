"""How far an answer is from what it must be, and what is said of one that is too far."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import ExportError
from .tolerance import TOLERANCE

Array = npt.NDArray[Any]


def equal_rows(
    signature: str, served: Array, expected: Array, largest: Array | None = None
) -> float:
    """Return the largest difference, as a share of each row's largest magnitude or of `largest`.

    Raises:
        ExportError: If one is above the tolerance, or the shapes differ.
    """
    if served.shape != expected.shape:
        raise differs(signature, f"shape {served.shape} for {expected.shape}")
    if largest is None:
        largest = np.abs(expected).max(axis=-1, keepdims=True)
    difference = np.abs(served - expected)
    if not (difference <= TOLERANCE * largest).all():
        worst = difference.max()
        raise differs(signature, f"by {worst:.3g} on rows of magnitude {largest.max():.3g}")
    return float((difference / np.maximum(largest, np.finfo(np.float32).tiny)).max())


def differs(signature: str, how: str) -> ExportError:
    """Return what is raised of a signature that is not the model's."""
    return ExportError(
        "Every signature must equal the Keras model on the sample. "
        f"Received: {signature} differs: {how}. Nothing was published. "
        "Look for layers that act differently on each backend or at random when training=False."
    )
