"""What is known of an index besides its gallery."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..contract import as_int
from ..embeddings import inverse_length
from ..errors import ManifestError
from ..funnel import FunnelSchedule
from .arrays import Vectors

METRICS = ("cosine", "dot", "l2")


@dataclass(frozen=True)
class IndexFacts:
    """What is known of an index besides its gallery.

    Args:
        schedule: The funnel that is searched.
        metric: How embeddings are compared. "cosine" scales every prefix of gallery and query
            itself; "dot" and "l2" take them as they are. A score is the cosine, the dot product,
            or the squared distance times -1: higher is nearer.
        encoder_fingerprint: Of the model the gallery was embedded with, as its manifest gives
            it; a client then refuses to search by embeddings of another. None: nobody checks.

    Raises:
        ValueError: If the metric is none of the three.

    Examples:
        >>> facts = IndexFacts(FunnelSchedule((8, 64), (20,), 5))
        >>> facts.check_k(None), facts.check_k(2)
        (5, 2)
    """

    schedule: FunnelSchedule
    metric: str = "cosine"
    encoder_fingerprint: str | None = None

    def __post_init__(self) -> None:
        """Check the metric."""
        if self.metric not in METRICS:
            raise ValueError(
                'metric must be "cosine", "dot" or "l2". '
                f"Received: metric={self.metric!r}. Take cosine if unsure."
            )

    @property
    def width(self) -> int:
        """Dim the queries are embedded at."""
        return self.schedule.dims[-1]

    def check_k(self, k: int | None) -> int:
        """Return how many neighbours are wanted.

        Raises:
            ValueError: If the funnel does not return so many.
        """
        if k is None:
            return self.schedule.k
        try:
            wanted = as_int(k)
        except TypeError:
            wanted = 0
        if not 1 <= wanted <= self.schedule.k:
            raise ValueError(
                f"k must lie in 1..{self.schedule.k}, as many as the funnel returns. "
                f"Received: k={k!r}. Search with a schedule whose k is larger."
            )
        return wanted

    def check_rows(self, rows: int) -> None:
        """Raise `ValueError` if a gallery has fewer rows than the funnel returns."""
        if rows < self.schedule.k:
            raise ValueError(
                "A gallery needs at least as many rows as the funnel returns. "
                f"Received: {rows} rows for k={self.schedule.k}. Lower k, or add rows."
            )

    def prefix(self, vectors: Vectors, dim: int) -> Vectors:
        """Return the first `dim` coordinates as the metric compares them, contiguous.

        Examples:
            >>> facts = IndexFacts(FunnelSchedule((2,), (), 1))
            >>> facts.prefix(np.float32([[3, 4, 12]]), 2).tolist()
            [[0.6000000238418579, 0.800000011920929]]
        """
        cut = np.ascontiguousarray(vectors[:, :dim])
        if self.metric != "cosine":
            return cut
        return cut * inverse_length(np.einsum("rd,rd->r", cut, cut))[:, None]

    def to_json(self) -> dict[str, Any]:
        """Return them as they are saved."""
        return {
            "schedule": self.schedule.to_json(),
            "metric": self.metric,
            "encoder_fingerprint": self.encoder_fingerprint,
        }

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> IndexFacts:
        """Read what `to_json` returned.

        Raises:
            ManifestError: If it is something else.
        """
        try:
            schedule = FunnelSchedule.from_json(saved["schedule"])
            return cls(schedule, saved["metric"], saved["encoder_fingerprint"])
        except (KeyError, TypeError, ValueError) as error:
            raise ManifestError(
                "An index names its schedule, its metric and its encoder. "
                f"Received: {saved!r} ({type(error).__name__}: {error}). "
                "Install the version of keras-mrl that wrote it, or a later one."
            ) from error


class Described:
    """Whatever has facts, and tells them as its own.

    Examples:
        >>> gallery = Described()
        >>> gallery.facts = IndexFacts(FunnelSchedule((8, 64), (20,), 5), "l2")
        >>> gallery.metric, gallery.width
        ('l2', 64)
    """

    facts: IndexFacts

    @property
    def schedule(self) -> FunnelSchedule:
        """The funnel that is searched."""
        return self.facts.schedule

    @property
    def metric(self) -> str:
        """How embeddings are compared: "cosine", "dot" or "l2"."""
        return self.facts.metric

    @property
    def encoder_fingerprint(self) -> str | None:
        """Of the model the gallery was embedded with; None if nobody said."""
        return self.facts.encoder_fingerprint

    @property
    def width(self) -> int:
        """Dim the queries are embedded at."""
        return self.facts.width
