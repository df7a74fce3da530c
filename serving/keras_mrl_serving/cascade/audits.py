"""Harm in production, from rows that were drawn at random and run to the end as well.

Harm is a row that the last stage has right and the cascade wrong. It can only be where the two
answers differ, so only those few audited rows need a label.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real

import numpy as np
import numpy.typing as npt

from ..inputs import as_array
from ..results import Classification
from .bounds import share_interval

NO_LABEL = -1


@dataclass(frozen=True, eq=False)
class Audits:
    """Rows of production with both answers: the cascade's, and that of the last stage.

    The rows must be a random sample of all rows, drawn before either answer was known. Audits are
    added with `+`.

    Args:
        adaptive: Class ids by the cascade.
        full: Class ids by the last stage.
        labels: The true class ids where they are known, -1 elsewhere; None where none is.

    Shapes:
        adaptive, full, labels: `(rows,)`.

    Raises:
        ValueError: If they are not class ids of the same rows.

    Examples:
        >>> january = Audits(adaptive=[3, 1, 2], full=[3, 1, 0], labels=[-1, -1, 0])
        >>> february = Audits(adaptive=[3, 1], full=[3, 1])
        >>> (january + february).labels.tolist()
        [-1, -1, 0, -1, -1]
    """

    adaptive: npt.ArrayLike
    full: npt.ArrayLike
    labels: npt.ArrayLike | None = None

    def __post_init__(self) -> None:
        """Check the answers."""
        given = {"adaptive": self.adaptive, "full": self.full, "labels": self.labels}
        if self.labels is None:
            given["labels"] = np.full(np.shape(self.full), NO_LABEL)
        for name, values in given.items():
            array = as_array(name, values)  # type: ignore[arg-type]
            array = array.astype(np.int64) if not array.size else array
            least = NO_LABEL if name == "labels" else 0
            are_ids = array.dtype.kind in "iu" and (not array.size or array.min() >= least)
            if array.ndim != 1 or not are_ids or len(array) != np.size(self.adaptive):
                raise ValueError(
                    "Audits are class ids of the same rows, three times; a label may be -1 where "
                    f"it is not known. Received: {name} as {array.dtype} of shape {array.shape} "
                    f"for {np.size(self.adaptive)} rows. Give both answers for each audited row."
                )
            object.__setattr__(self, name, array.astype(np.int64))

    @classmethod
    def of(cls, answer: Classification, labels: npt.ArrayLike | None = None) -> Audits:
        """Return the audited rows of an answer of `classify_adaptive(..., audit_rate=...)`.

        Args:
            answer: The answer.
            labels: Of all its rows, -1 where the label is not known; None where none is.

        Shapes:
            labels: `(batch,)`.

        Raises:
            ValueError: If `labels` are not class ids of these rows.

        Examples:
            >>> from keras_mrl_serving import Classification
            >>> answer = Classification(class_ids=np.array([[3], [1], [1]]),
            ...     probabilities=np.ones((3, 1)), confidence=np.ones(3), dim=np.array([8, 8, 64]),
            ...     full_class_ids=np.array([-1, 2, 1]))
            >>> Audits.of(answer, labels=[3, 2, -1])
            Audits(adaptive=array([1, 1]), full=array([2, 1]), labels=array([ 2, -1]))
        """
        rows, best = answer.audited, answer.class_ids[:, 0]
        full = best if answer.full_class_ids is None else answer.full_class_ids
        truth = None if labels is None else cls(best, best, labels).labels
        return cls(best[rows], full[rows], None if truth is None else np.asarray(truth)[rows])

    def __len__(self) -> int:
        """Return the number of rows."""
        return int(np.size(self.adaptive))

    def __add__(self, others: Audits) -> Audits:
        """Return the rows of both."""
        names = ("adaptive", "full", "labels")
        pairs = ((getattr(self, name), getattr(others, name)) for name in names)
        return Audits(*(np.concatenate(pair) for pair in pairs))


def check_audit_rate(rate: float) -> float:
    """Return the share of rows to audit; raise `ValueError` unless it lies in 0..1.

    Examples:
        >>> check_audit_rate(0.01)
        0.01
    """
    if not isinstance(rate, Real) or isinstance(rate, bool) or not 0 <= float(rate) <= 1:
        raise ValueError(
            "audit_rate must be a share of the rows, in 0..1. "
            f"Received: audit_rate={rate!r}. Give for example 0.01."
        )
    return float(rate)


def audit_seed(seed: int | np.random.Generator | None) -> int:
    """Return the seed of one drawing: from the operating system, or drawn from the one given.

    Examples:
        >>> audit_seed(7) == audit_seed(7)
        True
        >>> rng = np.random.default_rng(7)
        >>> audit_seed(rng) == audit_seed(rng)
        False
    """
    try:
        return int(np.random.default_rng(seed).integers(2**63))
    except (TypeError, ValueError) as error:
        raise ValueError(
            "audit_seed must be an integer of at least 0, or a numpy.random.Generator. "
            f"Received: audit_seed={seed!r}. Leave it out for a drawing that nobody can repeat."
        ) from error


def draw_audited(num_rows: int, rate: float, seed: int) -> npt.NDArray[np.bool]:
    """Return which rows to audit, each with the chance `rate`, `(rows,)`.

    Args:
        num_rows: Number of rows.
        rate: The share to audit.
        seed: The same seed draws the same rows.

    Examples:
        >>> bool(draw_audited(1000, 0.1, seed=0).any()), bool(draw_audited(1000, 0, seed=0).any())
        (True, False)
    """
    return np.random.default_rng(seed).random(num_rows) < rate


@dataclass(frozen=True)
class HarmEstimate:
    """How often the last stage is right and the cascade wrong, in production.

    Args:
        harm: The estimate.
        low: Lower end of the interval.
        high: Upper end of the interval.
        size: Number of audited rows.
        differing: How many of them have two answers.
        unlabelled: How many of those have no label.

    Examples:
        >>> print(HarmEstimate(0.005, 0.001, 0.014, size=1000, differing=9, unlabelled=0))
        harm 0.50% (0.10% to 1.40%), from 1000 audited rows of which 9 have two answers
    """

    harm: float
    low: float
    high: float
    size: int
    differing: int
    unlabelled: int

    def __str__(self) -> str:
        """Return it in words."""
        without = f", {self.unlabelled} of them without a label" if self.unlabelled else ""
        return (
            f"harm {self.harm:.2%} ({self.low:.2%} to {self.high:.2%}), from {self.size} audited "
            f"rows of which {self.differing} have two answers{without}"
        )


def estimate_harm(audits: Audits, delta: float = 0.05) -> HarmEstimate:
    """Estimate the harm in production from audited rows.

    The interval holds the true harm in at least 1 - delta of all draws of the audited rows,
    whatever the model is. Rows whose answers differ and that have no label may be harm or not: the
    interval covers both, and the estimate takes them for as often harm as the labelled ones. With
    no label at all it takes the last stage for right, which is the most that harm can be.

    Args:
        audits: The rows.
        delta: How often the interval may miss, between 0 and 1.

    Raises:
        ValueError: If there are no rows, or `delta` is none.

    Reference:
        Clopper and Pearson, The use of confidence or fiducial limits, Biometrika 26, 1934.

    Examples:
        >>> adaptive, full = np.zeros(1000, int), np.zeros(1000, int)
        >>> full[:9] = 1
        >>> labels = np.where(np.arange(1000) < 5, 1, 0)
        >>> print(estimate_harm(Audits(adaptive, full, labels)))
        harm 0.50% (0.16% to 1.16%), from 1000 audited rows of which 9 have two answers
        >>> print(estimate_harm(Audits(adaptive, full)).high > 0.0116)
        True
    """
    if not len(audits):
        raise ValueError("An estimate needs audited rows. Received: none. Raise audit_rate.")
    check_delta(delta)
    adaptive, full, labels = map(np.asarray, (audits.adaptive, audits.full, audits.labels))
    differs, is_labelled = adaptive != full, labels != NO_LABEL
    harmed = int((differs & is_labelled & (full == labels)).sum())
    labelled, unlabelled = int((differs & is_labelled).sum()), int((differs & ~is_labelled).sum())
    rate = harmed / labelled if labelled else 1.0
    size = len(audits)
    return HarmEstimate(
        harm=(harmed + unlabelled * rate) / size,
        low=share_interval(harmed, size, delta)[0],
        high=share_interval(harmed + unlabelled, size, delta)[1],
        size=size,
        differing=labelled + unlabelled,
        unlabelled=unlabelled,
    )


def check_delta(delta: float) -> None:
    """Raise a `ValueError` unless delta lies between 0 and 1.

    Examples:
        >>> check_delta(0.05)
    """
    if not isinstance(delta, int | float) or not 0 < delta < 1:
        raise ValueError(
            "delta must lie between 0 and 1, both excluded. "
            f"Received: delta={delta!r}. Give for example 0.05."
        )
