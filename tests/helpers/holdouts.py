"""Holdouts that cascades are learned from: logits `(rows, dims, classes)` and labels."""

from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

Array = npt.NDArray[Any]

DIMS = (8, 24, 40, 100)


@st.composite
def holdouts(draw: st.DrawFn) -> tuple[Array, Array]:
    """Logits of up to four dims, some of which tie, and labels."""
    rows, stages, classes = (draw(st.integers(*ends)) for ends in ((1, 24), (1, 4), (2, 12)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    logits = rng.normal(size=(rows, stages, classes), scale=draw(st.sampled_from([0.1, 1, 5])))
    if draw(st.booleans()):
        logits = np.round(logits)  # whole numbers, so that confidences tie
    # All negative, so that none pass for probabilities.
    return (logits - 50).astype(np.float32), rng.integers(0, classes, size=rows)


def noisy_holdout(
    seed: int, rows: int, noise: tuple[float, ...], classes: int = 5, scale: float = 3
) -> tuple[Array, Array]:
    """Logits around the truth, of one dim per amount of noise, and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, rows)
    errors = np.array(noise)[None, :, None] * rng.normal(size=(rows, len(noise), classes))
    return scale * (np.eye(classes)[labels][:, None] + errors), labels
