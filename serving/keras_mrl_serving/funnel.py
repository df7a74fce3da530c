"""Funnel retrieval: shortlist the gallery with few dims, rerank what is left with more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from .contract import as_int, check_dims
from .errors import ManifestError


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

    Examples:
        >>> FunnelSchedule(dims=(16, 2048), shortlists=(200,), k=10).madds(1_281_167)
        20908272
    """

    dims: tuple[int, ...]
    shortlists: tuple[int, ...]
    k: int

    def __post_init__(self) -> None:
        """Check that every stage narrows the one before it."""
        object.__setattr__(self, "dims", check_dims(self.dims))
        try:
            sizes = (*map(as_int, self.shortlists), as_int(self.k))
        except TypeError:
            sizes = ()
        if len(sizes) != len(self.dims) or any(a < b for a, b in pairwise(sizes)) or sizes[-1] < 1:
            raise ValueError(
                "A funnel needs one shortlist fewer than dims, none larger than the one before "
                f"it, none below k, and k >= 1. Received: dims={self.dims}, "
                f"shortlists={self.shortlists}, k={self.k}. "
                "Write for example FunnelSchedule(dims=(16, 256), shortlists=(200,), k=10)."
            )
        object.__setattr__(self, "shortlists", sizes[:-1])
        object.__setattr__(self, "k", sizes[-1])

    def madds(self, gallery_size: int) -> int:
        """Multiply-adds per query, as the paper counts them: every stage pays its whole dim.

        Args:
            gallery_size: Number of rows searched.
        """
        seen = (gallery_size, *(min(size, gallery_size) for size in self.shortlists))
        return sum(rows * dim for rows, dim in zip(seen, self.dims, strict=True))

    def to_json(self) -> dict[str, Any]:
        """Return the `funnel` object of the manifest."""
        return {"dims": list(self.dims), "shortlists": list(self.shortlists), "k": self.k}

    @classmethod
    def from_json(cls, funnel: Mapping[str, Any]) -> FunnelSchedule:
        """Read the `funnel` object of a manifest.

        Raises:
            ManifestError: If it is none.
        """
        try:
            return cls(tuple(funnel["dims"]), tuple(funnel["shortlists"]), funnel["k"])
        except (KeyError, TypeError, ValueError) as error:
            raise ManifestError(
                "A funnel names its dims, its shortlists and k. "
                f"Received: {funnel!r} ({type(error).__name__}: {error}). "
                "Install the version of keras-mrl that exported the model, or a later one."
            ) from error
