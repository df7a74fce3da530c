"""Funnel retrieval: shortlist the gallery with few dims, rerank what is left with more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from .contract import check_dims


@dataclass(frozen=True)
class FunnelSchedule:
    """Which dims look at how many gallery rows.

    The whole gallery is scored at `dims[0]`; the best `shortlists[i]` of stage i are scored anew
    at `dims[i + 1]`; the best `k` of the last stage are the answer. One dim and no shortlists is
    exhaustive search at that dim.

    Args:
        dims: Increasing, one per stage.
        shortlists: Not increasing, one fewer than `dims`, none below `k`.
        k: Number of neighbours returned.

    Raises:
        ValueError: If these do not make a funnel.

    Reference:
        Kusupati et al., Matryoshka Representation Learning, section 4.3.1 and appendix E.

    Example:
        >>> FunnelSchedule(dims=(16, 2048), shortlists=(200,), k=10).madds(1_281_167)
        20908272
    """

    dims: tuple[int, ...]
    shortlists: tuple[int, ...]
    k: int

    def __post_init__(self) -> None:
        """Check that every stage narrows the one before it."""
        object.__setattr__(self, "dims", check_dims(self.dims))
        object.__setattr__(self, "shortlists", tuple(int(size) for size in self.shortlists))
        sizes = (*self.shortlists, self.k)
        if (
            len(self.shortlists) != len(self.dims) - 1
            or any(a < b for a, b in pairwise(sizes))
            or self.k < 1
        ):
            raise ValueError(
                "A funnel needs one shortlist fewer than dims, none larger than the one before "
                f"it, none below k, and k >= 1. Received: dims={self.dims}, "
                f"shortlists={self.shortlists}, k={self.k}. "
                "Write for example FunnelSchedule(dims=(16, 256), shortlists=(200,), k=10)."
            )

    def madds(self, gallery_size: int) -> int:
        """Multiply-adds per query, as the paper counts them: every stage pays its whole dim.

        Args:
            gallery_size: Number of rows searched.
        """
        seen = (gallery_size, *(min(size, gallery_size) for size in self.shortlists))
        return sum(rows * dim for rows, dim in zip(seen, self.dims, strict=True))

    def to_json(self) -> dict[str, Any]:
        """Return the `funnel` object of the manifest."""
        return asdict(self)

    @classmethod
    def from_json(cls, funnel: Mapping[str, Any]) -> FunnelSchedule:
        """Read the `funnel` object of a manifest."""
        return cls(tuple(funnel["dims"]), tuple(funnel["shortlists"]), funnel["k"])
