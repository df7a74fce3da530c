"""A cascade's policy: small dims first, wider ones only for the rows that are not confident yet.

`CascadePolicy` says when a row stops, `CascadePolicy.learn` finds its thresholds by the paper's
procedure, and `CascadeReport` counts how it fares on rows whose labels are known. `search` and
`certify` find policies in other ways.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt

from ..contract import check_dims
from ..errors import manifest_errors
from ..inputs import check_holdout, check_logits
from .confidence import check_confidence, check_temperatures, confidence_of
from .thresholds import learn_thresholds

_LARGEST, _SMALLEST = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Stage:
    """One step of a cascade.

    Args:
        dim: Dim whose logits decide.
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
        guarantee: The promise that `certify_cascade` made; None without one.

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
        # The graph compares in float32, where 1e300 is infinite and 1e-300 is 0.
        are_finite = all(
            isinstance(n, Real) and not isinstance(n, bool) and abs(n) <= _LARGEST for n in numbers
        )
        if not are_finite or min(temperatures) < _SMALLEST:
            raise ValueError(
                "Thresholds must be finite and temperatures positive, in float32. "
                f"Received: {self.stages}. A threshold of 1 accepts no row, one of 0 every row."
            )
        check_confidence(self.confidence)
        # Python's own numbers, whatever NumPy's were given: they are hashed and written as JSON.
        limits = [None if threshold is None else float(threshold) for threshold in thresholds]
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

        Each adjacent pair of dims on its own: the threshold between them is the smallest of those
        by which most rows are right.

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
            ValueError: If shapes do not fit, there are no rows, these are probabilities, or a
                temperature is not above 0.
        """
        dims = check_dims(dims)
        scores, truth = check_holdout(logits, labels, len(dims))
        scales = check_temperatures(temperatures, len(dims))
        thresholds = learn_thresholds(scores, truth, scales, check_confidence(confidence))
        stages = tuple(map(Stage, dims, [*thresholds, None], scales))
        method = "paper: adjacent pairs, grid of 100, smallest best threshold"
        policy = cls(stages, confidence, method=method)
        return replace(policy, holdout=_report(policy, scores, truth))

    def route(self, logits: npt.ArrayLike) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the class of each row and the index of the stage that decided it.

        Args:
            logits: `(rows, num_stages, num_classes)`.

        Raises:
            ValueError: If their shape is another, or they are not finite.
        """
        scores = check_logits(logits, len(self.stages))
        stops = [self.is_sure(index, scores[:, index]) for index in range(len(self.stages))]
        stage_of = np.argmax(stops, axis=0)
        return np.argmax(scores[np.arange(len(scores)), stage_of], axis=-1), stage_of

    def is_sure(self, index: int, logits: npt.NDArray[Any]) -> npt.NDArray[np.bool]:
        """Return which rows of logits `(rows, num_classes)` stop at a stage.

        Args:
            index: Index of the stage.
            logits: The logits of its dim.

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
        return _report(self, *check_holdout(logits, labels, len(self.stages)))

    def to_json(self) -> dict[str, Any]:
        """Return the `cascade` object of the manifest."""
        report = asdict(self.holdout) if self.holdout else {}
        if report:
            report["exit_fractions"] = list(report["exit_fractions"])  # as JSON is read back
        return {
            "stages": [asdict(stage) for stage in self.stages],
            "confidence": self.confidence,
            "method": self.method,
            "guarantee": None if self.guarantee is None else asdict(self.guarantee),
            "holdout_size": report.pop("size", None),
            **report,
        }

    @classmethod
    def from_json(cls, cascade: Mapping[str, Any]) -> CascadePolicy:
        """Read the `cascade` object of a manifest.

        Raises:
            ManifestError: If this version does not understand it.
        """
        rule = "A cascade names its stages and its confidence."
        with manifest_errors(rule, cascade, "exported the model"):
            stages = tuple(
                Stage(stage["dim"], stage["threshold"], stage.get("temperature", 1.0))
                for stage in cascade["stages"]
            )
            report = {name: cascade[name] for name in _REPORT_KEYS if name in cascade}
            holdout = None
            if len(report) == len(_REPORT_KEYS):
                report["exit_fractions"] = tuple(report["exit_fractions"])
                holdout = CascadeReport(**report, size=cascade["holdout_size"])
            promise = cascade.get("guarantee")
            guarantee = None
            if promise is not None:
                guarantee = Guarantee(*(promise[name] for name in _GUARANTEE_KEYS))
            method = cascade.get("method", "unknown")
            return cls(stages, cascade["confidence"], holdout, method, guarantee)


_REPORT_KEYS = ("accuracy", "full_accuracy", "expected_dim", "cumulative_dim", "exit_fractions")
_GUARANTEE_KEYS = ("risk", "delta", "size", "errors")


def _report(
    policy: CascadePolicy, scores: npt.NDArray[np.float32], truth: npt.NDArray[np.int64]
) -> CascadeReport:
    """Return the report of a policy on logits and labels that are checked already."""
    _, stage_of = policy.route(scores)
    return report_exits(policy.dims, stage_of, np.argmax(scores, axis=-1) == truth[:, None])


@dataclass(frozen=True)
class CascadeReport:
    """How a policy fared on rows whose labels are known.

    Args:
        accuracy: Share of rows the cascade classifies right.
        full_accuracy: The same at the last dim alone.
        expected_dim: Mean of the dim that decided.
        cumulative_dim: Mean of the sum of the dims up to it: what the heads together cost.
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


def report_exits(
    dims: Sequence[int], stage_of: npt.NDArray[np.int64], is_right: npt.NDArray[np.bool]
) -> CascadeReport:
    """Return the report of rows from the stage that decided each.

    Args:
        dims: Dims of the stages.
        stage_of: The stage of each row, `(rows,)`.
        is_right: Whether each row's class is right at each stage, `(rows, stages)`.

    Examples:
        >>> is_right = np.array([[True, True], [False, True]])
        >>> report_exits((8, 64), np.array([0, 1]), is_right).accuracy
        1.0
    """
    rows = len(is_right)
    exits = np.bincount(stage_of, minlength=len(dims)) / rows
    return CascadeReport(
        accuracy=float(np.mean(is_right[np.arange(rows), stage_of])),
        full_accuracy=float(np.mean(is_right[:, -1])),
        expected_dim=float(exits @ np.asarray(dims)),
        cumulative_dim=float(exits @ np.cumsum(dims)),
        exit_fractions=tuple(float(share) for share in exits),
        size=rows,
    )


@dataclass(frozen=True)
class Guarantee:
    """A promise about new rows, made on rows that no threshold was chosen on.

    With probability at least 1 - delta over the draw of those rows, a new row has a chance of at
    most `risk` that the full dim is right and the cascade wrong.

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
