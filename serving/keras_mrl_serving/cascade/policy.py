"""Adaptive classification: small dims first, wider ones only for the rows still unsure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import isfinite
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt

from ..contract import check_dims
from ..errors import ManifestError
from ..inputs import check_holdout, check_logits
from .confidence import (
    check_confidence,
    check_temperatures,
    confidence_of,
    paper_grid,
    smallest_best,
)

# A promise about rows not yet seen, and how many it takes to make one.

_MOST_ROWS = 1_000_000


@dataclass(frozen=True)
class Guarantee:
    """What was certified of a policy, on rows that no threshold was chosen on.

    With probability at least 1 - delta over the draw of those rows, the chance that a new row is
    one the full dim has right and the cascade wrong is at most `risk`.

    Args:
        risk: That chance.
        delta: How often the promise may fail.
        size: Number of rows it was certified on.
        errors: How many of them the full dim had right and the cascade wrong.

    Examples:
        >>> Guarantee(risk=0.01, delta=0.05, size=2000, errors=9)
        Guarantee(risk=0.01, delta=0.05, size=2000, errors=9)
    """

    risk: float
    delta: float
    size: int
    errors: int


def least_rows(risk: float, delta: float) -> int:
    """Return how many rows without an error it takes to promise anything.

    Examples:
        >>> least_rows(risk=0.01, delta=0.05)
        299
    """
    return math.ceil(math.log(delta) / math.log1p(-risk))


def rows_for(rate: float, risk: float, delta: float) -> int | None:
    """Return about how many rows it takes to promise `risk` where a share `rate` are errors.

    Args:
        rate: What is expected of them.
        risk: As in `Guarantee`.
        delta: As in `Guarantee`.

    Returns:
        None where errors are as frequent as the risk, or nearly: no number would do.

    Examples:
        >>> rows_for(0.0, risk=0.01, delta=0.05), rows_for(0.005, risk=0.01, delta=0.05)
        (299, 1326)
        >>> rows_for(0.02, risk=0.01, delta=0.05)
    """
    rows = least_rows(risk, delta)
    while rows < _MOST_ROWS and rate < risk:
        if chance_of_so_few(math.ceil(rate * rows), rows, risk) <= delta:
            return rows
        rows += rows // 20 + 1
    return None


def chance_of_so_few(errors: int, size: int, risk: float) -> float:
    """Return the chance of at most so many errors in `size` rows if each were one with `risk`.

    It is the p-value of "the risk is larger": a binomial tail, exact for losses of 0 and 1.

    Examples:
        >>> round(chance_of_so_few(0, 299, 0.01), 4)
        0.0495
        >>> chance_of_so_few(3, 3, 0.5)
        1.0
    """
    k = np.arange(errors + 1)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, size + 1)))])
    ways = log_factorial[size] - log_factorial[k] - log_factorial[size - k]
    terms = ways + k * math.log(risk) + (size - k) * math.log1p(-risk)
    most = terms.max()
    return float(min(1.0, math.exp(most) * np.exp(terms - most).sum()))


# How a cascade fared on rows whose labels are known, counted.


@dataclass(frozen=True)
class CascadeReport:
    """How a policy fared on rows whose labels are known.

    Args:
        accuracy: Share of rows the cascade classifies right.
        full_accuracy: The same at the last dim alone.
        expected_dim: Mean of the dim that decided.
        cumulative_dim: Mean of the sum of all dims asked: what the heads together cost.
        exit_fractions: Share of the rows that stopped at each stage.
        size: Number of rows.

    Examples:
        >>> from keras_mrl_serving import CascadePolicy, Stage
        >>> policy = CascadePolicy((Stage(8, 0.9), Stage(64, None)))
        >>> sure, unsure = [[4.0, 0.0], [0.0, 1.0]], [[0.1, 0.0], [0.0, 1.0]]
        >>> policy.evaluate([sure, unsure], labels=[0, 1])  # doctest: +NORMALIZE_WHITESPACE
        CascadeReport(accuracy=1.0, full_accuracy=0.5, expected_dim=36.0, cumulative_dim=40.0,
                      exit_fractions=(0.5, 0.5), size=2)
    """

    accuracy: float
    full_accuracy: float
    expected_dim: float
    cumulative_dim: float
    exit_fractions: tuple[float, ...]
    size: int


def first_sure(
    confidence: npt.NDArray[np.float32], thresholds: Sequence[float | None]
) -> npt.NDArray[np.int64]:
    """Return the stage at which each row stops.

    Args:
        confidence: How sure each row is at each stage, `(rows, stages)`.
        thresholds: Of each stage; the last, None, accepts every row.

    Examples:
        >>> first_sure(np.float32([[0.9, 0.5], [0.2, 0.5]]), (0.8, None)).tolist()
        [0, 1]
    """
    limits = np.array([-np.inf if t is None else t for t in thresholds], np.float32)
    return np.argmax(confidence > limits, axis=1)


def report_exits(
    dims: Sequence[int], stage_of: npt.NDArray[np.int64], right: npt.NDArray[np.bool]
) -> CascadeReport:
    """Return the report of rows by the stage that decided each.

    Args:
        dims: Of the stages.
        stage_of: The stage of each row, `(rows,)`.
        right: Whether each row's class is right at each stage, `(rows, stages)`.

    Examples:
        >>> right = np.array([[True, True], [False, True]])
        >>> report_exits((8, 64), np.array([0, 1]), right).accuracy
        1.0
    """
    exits = np.bincount(stage_of, minlength=len(dims)) / len(right)
    return CascadeReport(
        accuracy=float(np.mean(right[np.arange(len(right)), stage_of])),
        full_accuracy=float(np.mean(right[:, -1])),
        expected_dim=float(exits @ np.asarray(dims)),
        cumulative_dim=float(exits @ np.cumsum(dims)),
        exit_fractions=tuple(float(share) for share in exits),
        size=len(right),
    )


@dataclass(frozen=True)
class Stage:
    """One step of a cascade.

    Args:
        dim: Dim that is asked.
        threshold: A row stops here when its confidence is strictly above it. None accepts every
            row; only the last stage has it.
        temperature: Divides the logits before the softmax.

    Examples:
        >>> Stage(dim=8, threshold=0.9)
        Stage(dim=8, threshold=0.9, temperature=1.0)
    """

    dim: int
    threshold: float | None
    temperature: float = 1.0


@dataclass(frozen=True)
class CascadePolicy:
    """When to stop: a threshold on the confidence at each dim but the last.

    Args:
        stages: Dims increasing; every stage but the last has a threshold.
        confidence: How sure a row is: `max_probability`, `margin` (the best minus the second) or
            `entropy` (its negative).
        holdout: How it fared on the holdout it was learned on; None for a policy made by hand.
        method: How the thresholds were found.
        guarantee: What was certified of it; None where nothing was.

    Raises:
        ValueError: If the stages are not a cascade.

    Reference:
        Kusupati et al., Matryoshka Representation Learning, section 4.2.1 and appendix D.

    Examples:
        >>> policy = CascadePolicy((Stage(8, 0.9), Stage(64, None)))
        >>> logits = np.array([[[4.0, 0.0], [0.0, 1.0]], [[0.1, 0.0], [0.0, 1.0]]])
        >>> class_ids, stage = policy.route(logits)
        >>> class_ids.tolist(), stage.tolist()
        ([0, 1], [0, 1])
    """

    stages: tuple[Stage, ...]
    confidence: str = "max_probability"
    holdout: CascadeReport | None = None
    method: str = "by hand"
    guarantee: Guarantee | None = None

    def __post_init__(self) -> None:
        """Check the stages."""
        dims = check_dims(stage.dim for stage in self.stages)
        thresholds = [stage.threshold for stage in self.stages]
        if thresholds[-1] is not None or None in thresholds[:-1]:
            raise ValueError(
                "Every stage but the last needs a threshold, and the last accepts all. "
                f"Received: thresholds={tuple(thresholds)}. End with Stage(dim, None)."
            )
        temperatures = [stage.temperature for stage in self.stages]
        numbers = [*temperatures, *thresholds[:-1]]
        if not all(isinstance(n, Real) and isfinite(n) for n in numbers) or min(temperatures) <= 0:
            raise ValueError(
                "Thresholds must be finite and temperatures positive. "
                f"Received: {self.stages}. A threshold of 1 accepts no row, one of 0 every row."
            )
        check_confidence(self.confidence)
        limits = [None if t is None else float(t) for t in thresholds]  # no longer NumPy's own
        stages = map(Stage, dims, limits, map(float, temperatures))
        object.__setattr__(self, "stages", tuple(stages))

    @property
    def dims(self) -> tuple[int, ...]:
        """The dims of the stages."""
        return tuple(stage.dim for stage in self.stages)

    @classmethod
    def learn(
        cls,
        logits: npt.ArrayLike,
        labels: npt.ArrayLike,
        dims: Sequence[int],
        temperatures: Sequence[float] | None = None,
        confidence: str = "max_probability",
    ) -> CascadePolicy:
        """Learn the thresholds on a holdout, by the paper's procedure.

        For each adjacent pair of dims on its own, and a grid of 100 thresholds from 0.1 to 1, the
        accuracy of "accept at the smaller dim if the confidence exceeds the threshold, else use
        the wider" is counted; the smallest threshold that reaches the best accuracy is kept, and
        moved midway between the two holdout confidences it separates.

        Args:
            logits: What `predict` of the nested model returns for the holdout.
            labels: Class ids of the holdout, from 0. It must share no row with the training data
                nor with the data the cascade is judged on.
            dims: The dims of the head.
            temperatures: One per dim, as `fit_temperatures` returns; None means ones.
            confidence: How sure a row is, as in `CascadePolicy`.

        Shapes:
            logits: `(rows, num_dims, num_classes)`. labels: `(rows,)`.

        Raises:
            ValueError: If shapes do not fit, rows are none, probabilities were given, or a
                temperature is not above 0.
        """
        dims = check_dims(dims)
        scores, truth = check_holdout(logits, labels, len(dims))
        scales = check_temperatures(temperatures, len(dims))
        right = np.argmax(scores, axis=-1) == truth[:, None]
        grid = paper_grid(check_confidence(confidence), scores.shape[-1])
        thresholds: list[float | None] = [
            smallest_best(
                confidence_of(confidence, scores[:, i], scales[i]),
                right[:, i],
                right[:, i + 1],
                grid,
            )
            for i in range(len(dims) - 1)
        ]
        stages = tuple(map(Stage, dims, [*thresholds, None], scales))
        method = "paper: adjacent pairs, grid of 100, smallest best threshold"
        policy = cls(stages, confidence, method=method)
        return replace(policy, holdout=judge(policy, scores, truth))

    def route(self, logits: npt.ArrayLike) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the class of each row and the index of the stage that decided it.

        Args:
            logits: `(rows, num_stages, num_classes)`.

        Raises:
            ValueError: If they are not, or are not finite.
        """
        scores = check_logits(logits, len(self.stages))
        stage_of = np.argmax(
            [self.is_sure(index, scores[:, index]) for index in range(len(self.stages))], axis=0
        )
        return np.argmax(scores[np.arange(len(scores)), stage_of], axis=-1), stage_of

    def is_sure(self, index: int, logits: npt.NDArray[Any]) -> npt.NDArray[np.bool]:
        """Return which rows of logits `(rows, num_classes)` stop at a stage.

        Args:
            index: Of the stage.
            logits: Those of its dim.

        Examples:
            >>> policy = CascadePolicy((Stage(8, 0.9), Stage(64, None)))
            >>> policy.is_sure(0, np.array([[4.0, 0.0], [0.1, 0.0]])).tolist()
            [True, False]
        """
        stage = self.stages[index]
        if stage.threshold is None:
            return np.ones(len(logits), bool)
        confidence = confidence_of(self.confidence, logits, stage.temperature)
        return np.asarray(confidence > np.float32(stage.threshold))

    def evaluate(self, logits: npt.ArrayLike, labels: npt.ArrayLike) -> CascadeReport:
        """Count how the policy fares on `logits` with known `labels`.

        Args:
            logits: `(rows, num_stages, num_classes)`.
            labels: `(rows,)`.

        Raises:
            ValueError: As `learn`.
        """
        scores, truth = check_holdout(logits, labels, len(self.stages))
        return judge(self, scores, truth)

    def to_json(self) -> dict[str, Any]:
        """Return the `cascade` object of the manifest."""
        seen = asdict(self.holdout) if self.holdout else {}
        if seen:
            seen["exit_fractions"] = list(seen["exit_fractions"])  # as it is read back
        return {
            "stages": [asdict(stage) for stage in self.stages],
            "confidence": self.confidence,
            "method": self.method,
            "guarantee": None if self.guarantee is None else asdict(self.guarantee),
            "holdout_size": seen.pop("size", None),
            **seen,
        }

    @classmethod
    def from_json(cls, cascade: Mapping[str, Any]) -> CascadePolicy:
        """Read the `cascade` object of a manifest.

        Raises:
            ManifestError: If it is none this version understands.
        """
        try:
            stages = tuple(
                Stage(s["dim"], s["threshold"], s.get("temperature", 1.0))
                for s in cascade["stages"]
            )
            seen = {name: cascade[name] for name in _REPORTED if name in cascade}
            holdout = None
            if len(seen) == len(_REPORTED):
                seen["exit_fractions"] = tuple(seen["exit_fractions"])
                holdout = CascadeReport(**seen, size=cascade["holdout_size"])
            said = cascade.get("guarantee")
            promise = None if said is None else Guarantee(*(said[name] for name in _PROMISED))
            method = cascade.get("method", "unknown")
            return cls(stages, cascade["confidence"], holdout, method, promise)
        except (KeyError, TypeError, ValueError) as error:
            raise ManifestError(
                "A cascade names its stages and its confidence. "
                f"Received: {cascade!r} ({type(error).__name__}: {error}). "
                "Install the version of keras-mrl that exported the model, or a later one."
            ) from error


_REPORTED = ("accuracy", "full_accuracy", "expected_dim", "cumulative_dim", "exit_fractions")
_PROMISED = ("risk", "delta", "size", "errors")


def judge(
    policy: CascadePolicy, scores: npt.NDArray[np.float32], truth: npt.NDArray[np.int64]
) -> CascadeReport:
    """Count how a policy fares on logits and labels that are checked already.

    Examples:
        >>> policy = CascadePolicy((Stage(8, None),))
        >>> judge(policy, np.float32([[[4, 0]], [[1, 0]]]), np.array([0, 1])).accuracy
        0.5
    """
    _, stage_of = policy.route(scores)
    right = np.argmax(scores, axis=-1) == truth[:, None]
    return report_exits(policy.dims, stage_of, right)
