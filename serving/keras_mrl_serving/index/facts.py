"""What must be known of a gallery to search it: its funnel, its metric, its encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ..embeddings import inverse_length
from ..errors import manifest_errors
from ..funnel import FunnelSchedule, check_schedule
from ..integers import as_int

Vectors = npt.NDArray[np.float32]

METRICS = ("cosine", "dot", "l2")
_NAMES = "strings"  # kind of the ids, where they are not int64


@dataclass(frozen=True)
class IndexFacts:
    """What must be known of a gallery to search it.

    Args:
        schedule: The funnel that is searched.
        metric: How embeddings are compared. "cosine" scales every prefix of gallery and query
            itself; "dot" and "l2" take them as they are. A score is the cosine, the dot product,
            or the squared distance times -1: higher is nearer.
        encoder_fingerprint: Fingerprint of the model that embedded the gallery, from its
            manifest; a client refuses to search by embeddings of another model. None: no check.
        prompt: The prompt that stood before each text when the gallery was embedded, as text:
            one of the manifest's `prompts`. None without one.
        has_names: Whether the ids of rows are strings.

    Raises:
        TypeError: If the schedule is no `FunnelSchedule`.
        ValueError: If the metric is none of the three, or the prompt is no text.

    Examples:
        >>> facts = IndexFacts(FunnelSchedule((8, 64), (20,), 5))
        >>> facts.check_k(None), facts.check_k(20)
        (5, 20)
    """

    schedule: FunnelSchedule
    metric: str = "cosine"
    encoder_fingerprint: str | None = None
    prompt: str | None = None
    has_names: bool = False

    def __post_init__(self) -> None:
        """Check the schedule, the metric and the prompt."""
        check_schedule(self.schedule)
        if self.metric not in METRICS:
            raise ValueError(
                'metric must be "cosine", "dot" or "l2". '
                f"Received: metric={self.metric!r}. Take cosine if unsure."
            )
        if not isinstance(self.prompt, str | None):
            raise ValueError(
                "prompt must be the text that stood before each text of the gallery, or None. "
                f"Received: prompt={self.prompt!r}. Give for example manifest.prompts['passage']."
            )

    @property
    def width(self) -> int:
        """Dim the queries are embedded at."""
        return self.schedule.dims[-1]

    def check_k(self, k: int | None) -> int:
        """Return the number of neighbours to find; the funnel's for None.

        Raises:
            ValueError: If it is more than the last shortlist holds.
        """
        if k is None:
            return self.schedule.k
        try:
            number = as_int(k)
        except TypeError:
            number = 0
        most = self.schedule.shortlists[-1] if self.schedule.shortlists else None
        if number >= 1 and (most is None or number <= most):
            return number
        if most is None:
            raise ValueError(f"k must be an integer from 1 up. Received: k={k!r}. Give 10.")
        raise ValueError(
            f"k must lie in 1..{most}, as many as the last shortlist holds. "
            f"Received: k={k!r}. Open the index with a schedule whose shortlists are longer."
        )

    def check_rows(self, rows: int) -> None:
        """Raise `ValueError` if a gallery has fewer rows than the funnel returns."""
        if rows < self.schedule.k:
            raise ValueError(
                "A gallery needs at least as many rows as the funnel returns. "
                f"Received: {rows} rows for k={self.schedule.k}. Lower k, or add rows."
            )

    def prefix(self, vectors: Vectors, dim: int) -> Vectors:
        """Return the first `dim` coordinates, contiguous, and of unit length for "cosine".

        Examples:
            >>> facts = IndexFacts(FunnelSchedule((2,), (), 1))
            >>> facts.prefix(np.float32([[3, 4, 12]]), 2).tolist()
            [[0.6000000238418579, 0.800000011920929]]
        """
        prefixes = np.ascontiguousarray(vectors[:, :dim])
        if self.metric != "cosine":
            return prefixes
        return prefixes * inverse_length(np.einsum("rd,rd->r", prefixes, prefixes))[:, None]

    def to_json(self) -> dict[str, Any]:
        """Return the facts as they are saved; a prompt, and strings as ids, only where they are."""
        saved = {
            "schedule": self.schedule.to_json(),
            "metric": self.metric,
            "encoder_fingerprint": self.encoder_fingerprint,
            **({} if self.prompt is None else {"prompt": self.prompt}),
        }
        return {**saved, "ids": _NAMES} if self.has_names else saved

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> IndexFacts:
        """Read what `to_json` returned.

        Raises:
            ManifestError: If `saved` is something else.
        """
        rule = "An index names its schedule, its metric and its encoder."
        with manifest_errors(rule, saved, "wrote it"):
            schedule = FunnelSchedule.from_json(saved["schedule"])
            if saved.get("ids") not in (None, _NAMES):
                raise ValueError(f"ids of a kind {saved['ids']!r:.80}")
            has_names = saved.get("ids") == _NAMES
            texts = saved["metric"], saved["encoder_fingerprint"], saved.get("prompt")
            return cls(schedule, *texts, has_names)


def other_schedule(facts: IndexFacts, schedule: FunnelSchedule | None, rows: int) -> IndexFacts:
    """Return the facts of an index that is opened with another schedule; None leaves its own.

    Raises:
        ValueError: If the gallery has fewer rows than the schedule returns.

    Examples:
        >>> facts = IndexFacts(FunnelSchedule((8, 64), (20,), 5))
        >>> other_schedule(facts, FunnelSchedule((64,), (), 7), rows=9).schedule.k
        7
    """
    if schedule is None:
        return facts
    facts = replace(facts, schedule=schedule)
    facts.check_rows(rows)
    return facts
