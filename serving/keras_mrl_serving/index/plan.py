"""What a planner found: the funnel it chose, and those it chose among."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..funnel import FunnelSchedule
from .first_stage import FirstStage


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
    def quality_less_error(self) -> float:
        """The quality less one standard error: what is compared with a target."""
        return self.quality - self.error

    def line(self) -> str:
        """Return it as a line of a table."""
        dims = " -> ".join(map(str, self.schedule.dims))
        lists = ", ".join(map(str, self.schedule.shortlists))
        stages = f"{dims}, shortlist {lists}" if lists else f"{dims} alone"
        first = " ".join(filter(None, (self.first_stage.factory, self.first_stage.settings)))
        quality = f"{self.quality:.4f} +- {self.error:.4f}"
        return f"{quality} {1e6 * self.seconds:9.1f} us  {stages}, {first}"

    def to_json(self) -> dict[str, Any]:
        """Return it as it is kept with an index."""
        return {
            "factory": self.first_stage.factory,
            "settings": self.first_stage.settings,
            "schedule": self.schedule.to_json(),
            "quality": round(self.quality, 5),
            "error": round(self.error, 5),
            "seconds": round(self.seconds, 9),
        }


@dataclass(frozen=True)
class Plan:
    """The cheapest funnel that reaches a target, and the front it was chosen from.

    Args:
        choice: The funnel.
        target: What was to be reached.
        front: The fastest funnel of every quality that was found, worst first.

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
        rows = [
            f"{choice.line()}{'   <- chosen' if choice == self.choice else ''}"
            for choice in self.front
        ]
        return "\n".join(("quality +- error     per query  funnel", *rows))

    def to_json(self) -> dict[str, Any]:
        """Return it as it is kept with an index."""
        return {
            **self.choice.to_json(),
            "target": self.target,
            "front": [choice.to_json() for choice in self.front],
        }


def front(choices: Iterable[Choice]) -> tuple[Choice, ...]:
    """Return those that no other beats in both quality and time, worst quality first.

    Examples:
        >>> first, funnel = FirstStage("Flat", ""), FunnelSchedule((8,), (), 1)
        >>> slow, good, poor = (Choice(first, funnel, q, 0.0, s)
        ...     for q, s in ((0.8, 3.0), (0.9, 2.0), (0.5, 1.0)))
        >>> front([slow, good, poor]) == (poor, good)
        True
    """
    kept: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (-c.quality_less_error, c.seconds)):
        if not kept or choice.seconds < kept[-1].seconds:
            kept.append(choice)
    return tuple(reversed(kept))


def cheapest(choices: Sequence[Choice], target: float) -> Choice | None:
    """Return the fastest choice that reaches the target by its error; None if none does.

    Examples:
        >>> cheapest([], 0.9) is None
        True
    """
    reaching = [choice for choice in choices if choice.quality_less_error >= target]
    return min(reaching, key=lambda choice: choice.seconds, default=None)
