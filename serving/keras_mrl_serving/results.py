"""What a client returns: small frozen dataclasses of arrays, one row per row asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, eq=False)
class Classification:
    """The best classes of each row, best first, and the dim that decided it.

    Args:
        class_ids: int64 `(batch, k)`.
        probabilities: float32 `(batch, k)`.
        confidence: float32 `(batch,)`, the policy's measure; higher is surer.
        dim: int32 `(batch,)`.
        labels: Class names, object array of str `(batch, k)`; None for a model without names.

    Examples:
        >>> Classification(class_ids=np.array([[3, 1]]), probabilities=np.float32([[0.8, 0.1]]),
        ...     confidence=np.float32([0.8]), dim=np.int32([16]))
        Classification(1 rows, top 2, by dim {16: 1})
    """

    class_ids: npt.NDArray[np.int64]
    probabilities: npt.NDArray[np.float32]
    confidence: npt.NDArray[np.float32]
    dim: npt.NDArray[np.int32]
    labels: npt.NDArray[Any] | None = None

    def __len__(self) -> int:
        return len(self.dim)

    def __repr__(self) -> str:
        dims, counts = np.unique(self.dim, return_counts=True)
        exits = dict(zip(dims.tolist(), counts.tolist(), strict=True))
        return f"Classification({len(self)} rows, top {self.class_ids.shape[1]}, by dim {exits})"


@dataclass(frozen=True, eq=False)
class Neighbors:
    """The nearest gallery rows of each query, best first.

    Args:
        ids: int64 `(batch, k)`.
        scores: float32 `(batch, k)`, higher is nearer.

    Examples:
        >>> Neighbors(ids=np.array([[7, 2]]), scores=np.float32([[0.9, 0.4]]))
        Neighbors(1 queries, k=2)
    """

    ids: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"Neighbors({len(self)} queries, k={self.ids.shape[1]})"
