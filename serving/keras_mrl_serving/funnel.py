"""Funnel retrieval: shortlist the gallery with few dims, rerank what is left with more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from .contract import as_int, check_dims
from .errors import ManifestError

_PAPER = ((16, 200), (32, 100), (64, 50), (128, 25), (256, 10))  # stages before the whole width


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

    @classmethod
    def adaptive_retrieval(cls, width: int = 2048, k: int = 10) -> FunnelSchedule:
        """Return the paper's two stages: 200 rows by 16 dims, reranked at the whole width.

        Args:
            width: Of the embeddings; of 16 or less there is one stage.
            k: Number of neighbours returned; more than 200 lengthen the shortlist.

        Examples:
            >>> FunnelSchedule.adaptive_retrieval(512)
            FunnelSchedule(dims=(16, 512), shortlists=(200,), k=10)
        """
        return cls._before(width, k, _PAPER[:1])

    @classmethod
    def funnel_retrieval(cls, width: int = 2048, k: int = 10) -> FunnelSchedule:
        """Return the paper's funnel: dims double from 16, shortlists halve from 200 to 10.

        Args:
            width: Of the embeddings. The paper's 2,048 are compared after 256; narrower ones
                have fewer stages.
            k: Number of neighbours returned; no shortlist is shorter.

        Examples:
            >>> funnel = FunnelSchedule.funnel_retrieval()
            >>> funnel.dims, funnel.shortlists
            ((16, 32, 64, 128, 256, 2048), (200, 100, 50, 25, 10))
            >>> FunnelSchedule.funnel_retrieval(64).dims
            (16, 32, 64)
        """
        return cls._before(width, k, _PAPER)

    @classmethod
    def _before(cls, width: int, k: int, stages: Sequence[tuple[int, int]]) -> FunnelSchedule:
        kept = [(dim, max(size, k)) for dim, size in stages if dim < width]
        return cls((*(dim for dim, _ in kept), width), tuple(size for _, size in kept), k)

    def madds(self, gallery_size: int) -> int:
        """Multiply-adds per query, as the paper counts them: every stage pays its whole dim.

        Args:
            gallery_size: Number of rows searched.
        """
        seen = self._rows_seen(gallery_size)
        return sum(rows * dim for rows, dim in zip(seen, self.dims, strict=True))

    def bytes_read(self, gallery_size: int, bits: Sequence[float] | float = 32) -> int:
        """Bytes of the gallery per query, where the first stage looks at every row.

        A graph or inverted lists look at fewer: their cost is measured, by `plan_funnel`.

        Args:
            gallery_size: Number of rows searched.
            bits: Of a coordinate: 32 for float32, 8 for int8, 1 for signs, of all stages or one
                number per stage.

        Raises:
            ValueError: If the bits are not those of the stages.

        Examples:
            >>> funnel = FunnelSchedule(dims=(64, 1024), shortlists=(100,), k=10)
            >>> funnel.bytes_read(1_000_000), funnel.bytes_read(1_000_000, bits=(1, 32))
            (256409600, 8409600)
        """
        each = tuple(bits) if isinstance(bits, Sequence) else (bits,) * len(self.dims)
        if len(each) != len(self.dims) or not all(0 < width <= 64 for width in each):
            raise ValueError(
                "bits must be one number per stage, or one for all, above 0 and no more than 64. "
                f"Received: bits={bits} for dims={self.dims}. Give 32 for float32, 8 for int8."
            )
        rows = self._rows_seen(gallery_size)
        return sum(
            round(seen * dim * width / 8)
            for seen, dim, width in zip(rows, self.dims, each, strict=True)
        )

    def _rows_seen(self, gallery_size: int) -> tuple[int, ...]:
        return (gallery_size, *(min(size, gallery_size) for size in self.shortlists))

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
