"""Vectors that are drawn by the million."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float32]
Labels = npt.NDArray[Any]

QUERIES = 500


@dataclass(frozen=True)
class Data:
    """Unit vectors and their labels: a gallery, queries, and a sample of others to plan on."""

    gallery: Vectors
    gallery_labels: Labels
    queries: Vectors
    query_labels: Labels
    sample: Vectors
    sample_labels: Labels


def synthetic(rows: int, width: int, centres: int = 1000) -> Data:
    """Draw clusters around Gaussian centres, every coordinate scaled by i**-0.6."""
    rng = np.random.default_rng(0)
    scale = (np.arange(1, width + 1) ** -0.6).astype(np.float32)
    places = rng.standard_normal((centres, width), dtype=np.float32) * scale

    def draw(count: int) -> tuple[Vectors, Labels]:
        labels = rng.integers(0, centres, count)
        vectors = rng.standard_normal((count, width), dtype=np.float32)
        vectors *= np.float32(0.7) * scale
        vectors += places[labels]
        return _unit(vectors), labels

    gallery, asked, sample = draw(rows), draw(QUERIES), draw(QUERIES)
    return Data(*gallery, *asked, *sample)


def _unit(vectors: npt.NDArray[Any]) -> Vectors:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)
