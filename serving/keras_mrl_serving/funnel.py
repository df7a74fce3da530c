"""Funnel retrieval: shortlist the gallery with few dims, rerank the shortlist with more."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from .errors import manifest_errors
from .integers import as_int, check_dims

_PAPER = ((16, 200), (32, 100), (64, 50), (128, 25), (256, 10))  # (dim, shortlist) before the last


@dataclass(frozen=True)
class FunnelSchedule:
    """Which dims score how many gallery rows.

    The whole gallery is scored at `dims[0]`; the best `shortlists[i]` of stage i are scored again
    at `dims[i + 1]`; the best `k` of the last stage are the answer. One dim and no shortlists is
    exhaustive search at that dim. The last dim may stand twice, for a first stage that is coarse,
    such as codes of 4 bits: the shortlist is scored again at the same width, exactly.

    Args:
        dims: Increasing, one per stage; the last may be named twice.
        shortlists: Not increasing, one fewer than `dims`, none below `k`.
        k: Number of neighbours returned.

    Raises:
        ValueError: If a stage does not narrow the one before it.

    Reference:
        Kusupati et al., Matryoshka Representation Learning, section 4.3.1 and appendix E.

    Examples:
        >>> FunnelSchedule(dims=(16, 2048), shortlists=(200,), k=10).madds(1_281_167)
        20908272
        >>> FunnelSchedule((256, 256), (40,), 10).rescores
        True
    """

    dims: tuple[int, ...]
    shortlists: tuple[int, ...]
    k: int

    def __post_init__(self) -> None:
        """Check that every stage narrows the one before it."""
        object.__setattr__(self, "dims", _check_dims(self.dims))
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

    @property
    def rescores(self) -> bool:
        """Whether the last dim stands twice."""
        return len(set(self.dims)) < len(self.dims)

    @classmethod
    def adaptive_retrieval(cls, width: int = 2048, k: int = 10) -> FunnelSchedule:
        """Return the paper's two stages: 200 rows by 16 dims, reranked at the whole width.

        Args:
            width: Width of the embeddings; 16 or less give one stage.
            k: Number of neighbours returned; more than 200 lengthen the shortlist.

        Examples:
            >>> FunnelSchedule.adaptive_retrieval(512)
            FunnelSchedule(dims=(16, 512), shortlists=(200,), k=10)
        """
        return cls._with_stages(_PAPER[:1], width, k)

    @classmethod
    def funnel_retrieval(cls, width: int = 2048, k: int = 10) -> FunnelSchedule:
        """Return the paper's funnel: dims double from 16, shortlists halve from 200 to 10.

        Args:
            width: Width of the embeddings. The paper's 2,048 are compared after 256; narrower
                embeddings have fewer stages.
            k: Number of neighbours returned; no shortlist is shorter.

        Examples:
            >>> funnel = FunnelSchedule.funnel_retrieval()
            >>> funnel.dims, funnel.shortlists
            ((16, 32, 64, 128, 256, 2048), (200, 100, 50, 25, 10))
            >>> FunnelSchedule.funnel_retrieval(64).dims
            (16, 32, 64)
        """
        return cls._with_stages(_PAPER, width, k)

    @classmethod
    def _with_stages(cls, stages: Sequence[tuple[int, int]], width: int, k: int) -> FunnelSchedule:
        narrower = [(dim, max(size, k)) for dim, size in stages if dim < width]
        dims = (*(dim for dim, _ in narrower), width)
        return cls(dims, tuple(size for _, size in narrower), k)

    def madds(self, gallery_size: int) -> int:
        """Return the multiply-adds per query, as the paper counts them: all columns of each stage.

        Args:
            gallery_size: Number of rows searched.
        """
        rows = self._rows_by_stage(gallery_size)
        return sum(num_rows * dim for num_rows, dim in zip(rows, self.dims, strict=True))

    def bytes_read(self, gallery_size: int, bits: Sequence[float] | float = 32) -> int:
        """Return the bytes of the gallery read per query, if the first stage reads every row.

        A graph or inverted lists read fewer: `plan_funnel` measures their cost.

        Args:
            gallery_size: Number of rows searched.
            bits: Bits of a coordinate: 32 for float32, 8 for int8, 1 for signs; one number for all
                stages, or one per stage.

        Raises:
            ValueError: If `bits` are not one number per stage.

        Examples:
            >>> funnel = FunnelSchedule(dims=(64, 1024), shortlists=(100,), k=10)
            >>> funnel.bytes_read(1_000_000), funnel.bytes_read(1_000_000, bits=(1, 32))
            (256409600, 8409600)
        """
        widths = tuple(bits) if isinstance(bits, Sequence) else (bits,) * len(self.dims)
        if len(widths) != len(self.dims) or not all(0 < width <= 64 for width in widths):
            raise ValueError(
                "bits must be one number per stage, or one for all, above 0 and no more than 64. "
                f"Received: bits={bits} for dims={self.dims}. Give 32 for float32, 8 for int8."
            )
        rows = self._rows_by_stage(gallery_size)
        stages = zip(rows, self.dims, widths, strict=True)
        return sum(round(num_rows * dim * width / 8) for num_rows, dim, width in stages)

    def _rows_by_stage(self, gallery_size: int) -> tuple[int, ...]:
        return (gallery_size, *(min(size, gallery_size) for size in self.shortlists))

    def to_json(self) -> dict[str, Any]:
        """Return the `funnel` object of the manifest."""
        return {"dims": list(self.dims), "shortlists": list(self.shortlists), "k": self.k}

    @classmethod
    def from_json(cls, funnel: Mapping[str, Any]) -> FunnelSchedule:
        """Read the `funnel` object of a manifest.

        Raises:
            ManifestError: If `funnel` is something else.
        """
        rule = "A funnel names its dims, its shortlists and k."
        with manifest_errors(rule, funnel, "exported the model"):
            return cls(tuple(funnel["dims"]), tuple(funnel["shortlists"]), funnel["k"])


def check_schedule(schedule: object) -> FunnelSchedule:
    """Return a schedule; raise `TypeError` where it is something else, such as a tuple of dims.

    Examples:
        >>> check_schedule(FunnelSchedule((8,), (), 1)).k
        1
    """
    if not isinstance(schedule, FunnelSchedule):
        raise TypeError(
            f"A schedule must be a FunnelSchedule. Received: {schedule!r:.80}. "
            "Write for example FunnelSchedule(dims=(16, 256), shortlists=(200,), k=10)."
        )
    return schedule


def _check_dims(dims: Iterable[int]) -> tuple[int, ...]:
    """Return the dims of stages as a tuple of ints, as `check_dims`; the last may stand twice."""
    stages = tuple(dims) if isinstance(dims, Iterable) else dims
    repeats = isinstance(stages, tuple) and len(stages) > 1 and stages[-1] == stages[-2]
    if not repeats:
        return check_dims(stages)
    checked = check_dims(stages[:-1])
    return (*checked, checked[-1])
