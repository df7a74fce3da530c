"""What the trained nets of a comparison answered, read from their folders."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from .images import Images
from .plan import Plan

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Answers:
    """The nets of a plan, all trained, and the images they were asked about.

    Args:
        folder: Of the nets, one folder each.
        plan: Of the comparison.
        training: Images that trained them: the gallery of every search.
        test: Images that judge them: the queries.
    """

    folder: Path
    plan: Plan
    training: Images
    test: Images

    @property
    def width(self) -> int:
        """The full dim."""
        return self.plan.dims[-1]

    @property
    def full(self) -> str:
        """The name of the separate net of full width."""
        return f"ff_{self.width}"

    def logits(self, name: str) -> Array:
        """Return those of the test images, `(rows, num_dims, num_classes)`."""
        found: Array = np.load(self.folder / name / "test_logits.npy")
        return found

    def features(self, name: str, dim: int) -> tuple[Array, Array]:
        """Return those of the training and the test images that the net may see."""
        place = self.folder / name
        return np.load(place / f"train_{dim}.npy"), np.load(place / f"test_{dim}.npy")

    def model(self, name: str) -> Any:
        """Return a net itself."""
        return keras.saving.load_model(self.folder / name / "model.keras")

    def minutes(self, name: str) -> float:
        """Return what its epochs took."""
        history = json.loads((self.folder / name / "net.json").read_text())["history"]
        return round(sum(epoch["seconds"] for epoch in history) / 60, 1)
