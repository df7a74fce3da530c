"""A cascade on labelled rows in parts: the worst class, deciles of length, with intervals.

One percent of harm over all rows may be a third of one class, or sit in the longest inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..inputs import as_float64
from .audits import check_delta
from .bounds import share_interval
from .policy import CascadePolicy
from .stages import Logits, labelled_rows

_PARTS = 10


@dataclass(frozen=True)
class Estimate:
    """A share of some rows, and the interval that holds it for all rows of their kind.

    Args:
        share: Of the rows.
        low: Lower end.
        high: Upper end.

    Examples:
        >>> print(Estimate(0.95, 0.94, 0.96))
        95.0% (94.0 to 96.0)
    """

    share: float
    low: float
    high: float

    def __str__(self) -> str:
        """Return it in percent."""
        return f"{self.share:.1%} ({100 * self.low:.1f} to {100 * self.high:.1f})"


@dataclass(frozen=True)
class Group:
    """How a cascade fares on one part of the rows.

    Args:
        name: Which rows.
        size: Number of rows.
        accuracy: Of the cascade.
        full_accuracy: Of the last stage alone.
        harm: Share of rows that the last stage has right and the cascade wrong.
        accuracy_drop: Accuracy of the last stage, less that of the cascade.
        exit_fractions: Share of the rows that stopped at each stage.

    Examples:
        >>> one = Estimate(0.9, 0.8, 0.95)
        >>> print(Group("class 3", 80, one, one, one, one, (0.5, 0.5)))
        class 3: 80 rows, accuracy 90.0% (80.0 to 95.0) of 90.0% (80.0 to 95.0), \
harm 90.0% (80.0 to 95.0), drop 90.0% (80.0 to 95.0), exits 50% 50%
    """

    name: str
    size: int
    accuracy: Estimate
    full_accuracy: Estimate
    harm: Estimate
    accuracy_drop: Estimate
    exit_fractions: tuple[float, ...]

    def __str__(self) -> str:
        """Return it in one line."""
        exits = " ".join(f"{share:.0%}" for share in self.exit_fractions)
        return (
            f"{self.name}: {self.size} rows, accuracy {self.accuracy} of {self.full_accuracy}, "
            f"harm {self.harm}, drop {self.accuracy_drop}, exits {exits}"
        )


@dataclass(frozen=True)
class Breakdown:
    """How a cascade fares on labelled rows, and on parts of them.

    Args:
        whole: All rows.
        classes: The rows of each class that has any, by class id.
        lengths: Tenths of the rows from the shortest to the longest; none where no lengths were
            given. Rows of one length stay together, so there may be fewer.

    Examples:
        >>> policy = CascadePolicy((Stage(8, 0.9), Stage(64, None)))
        >>> logits = np.float32([[[9, 0], [9, 0]], [[9, 0], [0, 9]]] * 50)
        >>> parts = break_down(policy, logits, labels=[0, 1] * 50)
        >>> parts.worst_class.name, parts.worst_class.harm.share
        ('class 1', 1.0)
    """

    whole: Group
    classes: tuple[Group, ...]
    lengths: tuple[Group, ...]

    @property
    def worst_class(self) -> Group:
        """The class with the most harm."""
        return max(self.classes, key=lambda group: group.harm.share)

    def __str__(self) -> str:
        """Return a line each for all rows, the worst class, and the lengths."""
        return "\n".join(map(str, (self.whole, self.worst_class, *self.lengths)))


def break_down(
    policy: CascadePolicy,
    logits: Logits,
    labels: npt.ArrayLike,
    lengths: npt.ArrayLike | None = None,
    delta: float = 0.05,
) -> Breakdown:
    """Return how a cascade fares on rows that it was not learned on, and on parts of them.

    All intervals of the classes hold together in at least 1 - delta of all draws of the rows, so
    that the worst class is not the worst by luck alone; and so do all of the lengths. Those of a
    share are exact. That of a drop of accuracy is made of two, and a little wide.

    Args:
        policy: The cascade.
        logits: As `CascadePolicy.evaluate` takes them.
        labels: Class ids, from 0.
        lengths: How long each row's input is, such as its number of tokens.
        delta: How often the intervals may miss, between 0 and 1.

    Shapes:
        logits: As in `CascadePolicy.evaluate`. labels, lengths: `(rows,)`.

    Raises:
        ValueError: If shapes do not fit, or `delta` is none.

    Reference:
        Clopper and Pearson, The use of confidence or fiducial limits, Biometrika 26, 1934.

    Examples:
        >>> policy = CascadePolicy((Stage(8, 0.9), Stage(64, None)))
        >>> logits = np.float32([[[9, 0], [9, 0]], [[1, 0], [0, 9]]] * 50)
        >>> parts = break_down(policy, logits, [0, 1] * 50, lengths=[4, 9] * 50)
        >>> print(parts.whole)
        all: 100 rows, accuracy 100.0% (96.4 to 100.0) of 100.0% (96.4 to 100.0), \
harm 0.0% (0.0 to 3.6), drop 0.0% (-4.3 to 4.3), exits 50% 50%
        >>> [group.name for group in parts.lengths]
        ['length 4 to 4', 'length 9 to 9']
    """
    check_delta(delta)
    scores, truth = labelled_rows(logits, labels, policy.keys)
    class_ids, stage_of = policy.route(scores)
    rows = _Rows(
        stage_of, class_ids == truth, scores[:, -1].argmax(axis=-1) == truth, len(policy.stages)
    )
    present = np.unique(truth)
    classes = [
        rows.group(f"class {label}", truth == label, delta / len(present)) for label in present
    ]
    tenths = [] if lengths is None else list(_tenths(lengths, len(truth)))
    return Breakdown(
        rows.group("all", np.ones(len(truth), bool), delta),
        tuple(classes),
        tuple(rows.group(name, chosen, delta / len(tenths)) for name, chosen in tenths),
    )


def _tenths(lengths: npt.ArrayLike, num_rows: int) -> Iterator[tuple[str, npt.NDArray[np.bool]]]:
    values = as_float64("lengths", lengths)
    if values.shape != (num_rows,) or not np.isfinite(values).all():
        raise ValueError(
            "lengths must be one finite number for each row. "
            f"Received: shape {values.shape} for {num_rows} rows. Give each row's number of tokens."
        )
    ends = np.unique(np.quantile(values, np.arange(1, _PARTS + 1) / _PARTS, method="higher"))
    part_of = np.searchsorted(ends, values)
    for part in range(len(ends)):
        chosen = part_of == part
        yield f"length {values[chosen].min():g} to {values[chosen].max():g}", chosen


@dataclass(frozen=True)
class _Rows:
    """Rows with what each answer of theirs was worth."""

    stage_of: npt.NDArray[np.int64]
    is_right: npt.NDArray[np.bool]
    is_full_right: npt.NDArray[np.bool]
    num_stages: int

    def group(self, name: str, chosen: npt.NDArray[np.bool], delta: float) -> Group:
        """Return how the chosen rows fare."""
        right, full_right = self.is_right[chosen], self.is_full_right[chosen]
        size = len(right)
        harmed, gained = int((full_right & ~right).sum()), int((right & ~full_right).sum())
        losses, gains = (share_interval(count, size, delta / 2) for count in (harmed, gained))
        exits = np.bincount(self.stage_of[chosen], minlength=self.num_stages) / size
        return Group(
            name,
            size,
            _estimate(int(right.sum()), size, delta),
            _estimate(int(full_right.sum()), size, delta),
            _estimate(harmed, size, delta),
            Estimate((harmed - gained) / size, losses[0] - gains[1], losses[1] - gains[0]),
            tuple(exits.tolist()),
        )


def _estimate(count: int, size: int, delta: float) -> Estimate:
    return Estimate(count / size, *share_interval(count, size, delta))
