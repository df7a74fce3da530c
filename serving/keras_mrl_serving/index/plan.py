"""What a planner returns: the funnel it chose, the others it measured, and how it measures them.

A `Measure` takes the gallery rows found for a sample of queries, int64 `(queries, k)`, and returns
the quality of each answer, `(queries,)` in 0..1.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import manifest_errors
from ..funnel import FunnelSchedule
from .base import Ids, Index, Vectors
from .first_stage import FirstStage

Measure = Callable[[Ids], npt.NDArray[np.float64]]

_TIMED = 300  # batches a choice is timed by
_LONGEST_S = 1.0  # that timing one choice may take

_RULE = "A plan names its funnels, and what was measured of each."


def recall_against(truth: Ids) -> Measure:
    """Return the measure of how many of the true neighbours were found.

    Args:
        truth: Gallery rows of the exact answer, `(queries, k)`.

    Examples:
        >>> recall_against(np.array([[4, 7]]))(np.array([[7, 9]])).tolist()
        [0.5]
    """

    def measure(neighbors: Ids) -> npt.NDArray[np.float64]:
        hits = (neighbors[:, :, None] == truth[:, None, :]).any(axis=1)
        return hits.mean(axis=1)

    return measure


def precision_by_label(gallery: npt.ArrayLike, queries: npt.ArrayLike) -> Measure:
    """Return the measure of how many of the neighbours have the query's label.

    Args:
        gallery: Label of every gallery row, `(rows,)`.
        queries: Label of every query, `(queries,)`.

    Examples:
        >>> precision_by_label([0, 1, 1], [1])(np.array([[2, 0]])).tolist()
        [0.5]
    """
    hits_of = _label_hits(gallery, queries)
    return lambda neighbors: hits_of(neighbors).mean(axis=1)


def average_precision_by_label(gallery: npt.ArrayLike, queries: npt.ArrayLike) -> Measure:
    """Return the paper's AP@k by label: precision at every hit, summed, divided by k.

    Args:
        gallery: Label of every gallery row, `(rows,)`.
        queries: Label of every query, `(queries,)`.

    Reference:
        Kusupati et al., Matryoshka Representation Learning, section 4.3.

    Examples:
        >>> average_precision_by_label([0, 1, 1], [1])(np.array([[0, 2]])).tolist()
        [0.25]
    """
    hits_of = _label_hits(gallery, queries)

    def measure(neighbors: Ids) -> npt.NDArray[np.float64]:
        hits = hits_of(neighbors)
        ranks = np.arange(1, neighbors.shape[1] + 1)
        return (hits * np.cumsum(hits, axis=1) / ranks).mean(axis=1)

    return measure


def _label_hits(
    gallery: npt.ArrayLike, queries: npt.ArrayLike
) -> Callable[[Ids], npt.NDArray[np.bool_]]:
    gallery_labels, query_labels = np.asarray(gallery), np.asarray(queries)
    return lambda neighbors: gallery_labels[neighbors] == query_labels[:, None]


def time_per_query(
    index: Index, queries: Vectors, batch: int, clock: Callable[[], float] | None = None
) -> float:
    """Return the median seconds per query of searches that take `batch` queries at once.

    Args:
        index: The index to search.
        queries: A sample `(queries, width)`, of at least one batch.
        batch: Number of queries in one search.
        clock: Returns seconds; None takes the processor time of this thread for single queries,
            which have one, and the time of day for batches, which have all cores.

    Examples:
        >>> index = ExactIndex.build(np.eye(4), FunnelSchedule((4,), (), 1))
        >>> readings = iter(range(1000))
        >>> time_per_query(index, np.eye(4), batch=2, clock=lambda: next(readings))
        0.5
    """
    if clock is None:
        clock = time.thread_time if batch == 1 else time.perf_counter
    seconds = []
    stop = clock() + _LONGEST_S
    for turn in range(_TIMED):
        start = turn * batch % max(1, len(queries) - batch + 1)
        chunk = queries[start : start + batch]
        began = clock()
        index.search(chunk)
        ended = clock()
        seconds.append((ended - began) / len(chunk))
        if ended > stop and turn >= 2:
            break
    return float(np.median(seconds))


_ERRORS = 1.64  # 95% of a normal distribution lie above its mean less so many deviations


def sure(quality: float, error: float) -> float:
    """Return the quality less 1.64 standard errors: that of all queries is above it with 95%.

    Examples:
        >>> sure(0.96, 0.005)
        0.9518
    """
    return quality - _ERRORS * error


@dataclass(frozen=True)
class Choice:
    """A funnel that was measured.

    Args:
        first_stage: Which FAISS index looks at the whole gallery, and how hard.
        schedule: The funnel.
        quality: Mean of the measure over the sample of queries.
        error: Standard error of that mean.
        seconds: Median time per query, on the machine that planned.

    Examples:
        >>> funnel = FunnelSchedule((64, 512), (40,), 10)
        >>> Choice(FirstStage("Flat", ""), funnel, 0.957, 0.004, 0.0021).line()
        '0.9570 +- 0.0040    2100.0 us  64 -> 512, shortlist 40, Flat'
    """

    first_stage: FirstStage
    schedule: FunnelSchedule
    quality: float
    error: float
    seconds: float

    @property
    def sure_quality(self) -> float:
        """What is compared with a target."""
        return sure(self.quality, self.error)

    def line(self) -> str:
        """Return the funnel as a line of a table."""
        dims = " -> ".join(map(str, self.schedule.dims))
        lists = ", ".join(map(str, self.schedule.shortlists))
        stages = f"{dims}, shortlist {lists}" if lists else f"{dims} alone"
        first = " ".join(filter(None, (self.first_stage.factory, self.first_stage.settings)))
        quality = f"{self.quality:.4f} +- {self.error:.4f}"
        return f"{quality} {1e6 * self.seconds:9.1f} us  {stages}, {first}"

    def to_json(self) -> dict[str, Any]:
        """Return the JSON that is saved with an index."""
        return {
            "factory": self.first_stage.factory,
            "settings": self.first_stage.settings,
            "schedule": self.schedule.to_json(),
            "quality": self.quality,
            "error": self.error,
            "seconds": self.seconds,
        }

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Choice:
        """Read what `to_json` returned.

        Raises:
            ManifestError: If `saved` is something else.
        """
        with manifest_errors(_RULE, saved, "wrote it"):
            first = FirstStage.from_json(saved)
            schedule = FunnelSchedule.from_json(saved["schedule"])
            measured = (saved["quality"], saved["error"], saved["seconds"])
            if not all(map(_is_number, measured)):
                raise TypeError("what was measured is no numbers")
            return cls(first, schedule, *measured)


@dataclass(frozen=True)
class Plan:
    """The cheapest funnel that reaches a target, and the front it was chosen from.

    Args:
        choice: The funnel.
        target: The least quality asked for.
        front: The measured funnels that no other beats in both quality and time, worst quality
            first.

    Examples:
        >>> chosen = Choice(FirstStage("Flat", ""), FunnelSchedule((8,), (), 1), 1.0, 0.0, 1e-4)
        >>> Plan(chosen, 0.9, (chosen,)).schedule.dims
        (8,)
    """

    choice: Choice
    target: float
    front: tuple[Choice, ...]

    @property
    def schedule(self) -> FunnelSchedule:
        """The funnel that was chosen."""
        return self.choice.schedule

    @property
    def first_stage(self) -> FirstStage:
        """The first stage that was chosen."""
        return self.choice.first_stage

    def table(self) -> str:
        """Return the front as text, the chosen funnel marked."""
        return table(self.front, self.choice)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON that is saved with an index."""
        return {
            **self.choice.to_json(),
            "target": self.target,
            "front": [choice.to_json() for choice in self.front],
        }

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Plan:
        """Read what `to_json` returned; other keys are passed over.

        Raises:
            ManifestError: If `saved` is something else.

        Examples:
            >>> chosen = Choice(FirstStage("Flat"), FunnelSchedule((8,), (), 1), 1.0, 0.0, 1e-4)
            >>> plan = Plan(chosen, 0.9, (chosen,))
            >>> Plan.from_json(plan.to_json()) == plan
            True
        """
        with manifest_errors(_RULE, saved, "wrote it"):
            front, target = saved["front"], saved.get("target", 0.0)
            if not isinstance(front, list) or not _is_number(target):
                raise TypeError("they are no list and no number")
        return cls(Choice.from_json(saved), target, tuple(map(Choice.from_json, front)))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def table(front: Iterable[Choice], chosen: Choice | None = None) -> str:
    """Return funnels as text, one a line, the chosen one marked.

    Examples:
        >>> print(table([Choice(FirstStage("Flat"), FunnelSchedule((8,), (), 1), 1.0, 0.0, 1e-4)]))
        quality +- error     per query  funnel
        1.0000 +- 0.0000     100.0 us  8 alone, Flat
    """
    rows = (f"{c.line()}{'   <- chosen' if c == chosen else ''}" for c in front)
    return "\n".join(("quality +- error     per query  funnel", *rows))


def front(choices: Iterable[Choice]) -> tuple[Choice, ...]:
    """Return those that no other beats in both quality and time, worst quality first.

    Examples:
        >>> first, funnel = FirstStage("Flat", ""), FunnelSchedule((8,), (), 1)
        >>> slow, good, poor = (Choice(first, funnel, q, 0.0, s)
        ...     for q, s in ((0.8, 3.0), (0.9, 2.0), (0.5, 1.0)))
        >>> front([slow, good, poor]) == (poor, good)
        True
    """
    unbeaten: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (-c.sure_quality, c.seconds)):
        if not unbeaten or choice.seconds < unbeaten[-1].seconds:
            unbeaten.append(choice)
    return tuple(reversed(unbeaten))


def cheapest(choices: Sequence[Choice], target: float) -> Choice | None:
    """Return the fastest choice that reaches the target by its error; None if none does.

    Examples:
        >>> cheapest([], 0.9) is None
        True
    """
    reaching = [choice for choice in choices if choice.sure_quality >= target]
    return min(reaching, key=lambda choice: choice.seconds, default=None)
