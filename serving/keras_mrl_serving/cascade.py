"""Adaptive classification: small dims first, wider ones only for the rows still unsure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import isfinite
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt

from .contract import check_dims
from .errors import ManifestError
from .inputs import check_holdout, check_logits

# How sure a row is. The manifest and the exported graph know the same names.
CONFIDENCES = ("max_probability",)


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


@dataclass(frozen=True)
class CascadePolicy:
    """When to stop: a threshold on the confidence at each dim but the last.

    Args:
        stages: Dims increasing; every stage but the last has a threshold.
        confidence: The measure, one of `CONFIDENCES`.
        holdout: How it fared on the holdout it was learned on; None for a policy made by hand.
        method: How the thresholds were found.

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
        if self.confidence not in CONFIDENCES:
            raise ValueError(
                f"confidence must be one of {', '.join(CONFIDENCES)}. "
                f"Received: confidence={self.confidence!r}. Choose one of those."
            )
        limits = [None if t is None else float(t) for t in thresholds]  # no longer NumPy's own
        stages = map(Stage, dims, limits, map(float, temperatures))
        object.__setattr__(self, "stages", tuple(stages))

    @property
    def dims(self) -> tuple[int, ...]:
        """The dims of the stages."""
        return tuple(stage.dim for stage in self.stages)

    @classmethod
    def learn(
        cls, logits: npt.ArrayLike, labels: npt.ArrayLike, dims: Sequence[int]
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

        Shapes:
            logits: `(rows, num_dims, num_classes)`. labels: `(rows,)`.

        Raises:
            ValueError: If shapes do not fit, rows are none, or probabilities were given.
        """
        dims = check_dims(dims)
        scores, truth = check_holdout(logits, labels, len(dims))
        confidence = max_probability(scores)
        right = np.argmax(scores, axis=-1) == truth[:, None]
        thresholds: list[float | None] = [
            _learn_threshold(confidence[:, i], right[:, i], right[:, i + 1])
            for i in range(len(dims) - 1)
        ]
        stages = tuple(Stage(dim, t) for dim, t in zip(dims, [*thresholds, None], strict=True))
        policy = cls(stages, method="paper: adjacent pairs, grid of 100, smallest best threshold")
        return replace(policy, holdout=policy.evaluate(scores, truth))

    def route(self, logits: npt.ArrayLike) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the class of each row and the index of the stage that decided it.

        Args:
            logits: `(rows, num_stages, num_classes)`.

        Raises:
            ValueError: If they are not, or are not finite.
        """
        scores = check_logits(logits, len(self.stages))
        accepted = np.ones(scores.shape[:2], dtype=bool)
        for index, stage in enumerate(self.stages[:-1]):
            confidence = max_probability(scores[:, index], stage.temperature)
            accepted[:, index] = confidence > np.float32(stage.threshold)
        stage_of = np.argmax(accepted, axis=1)
        return np.argmax(scores[np.arange(len(scores)), stage_of], axis=-1), stage_of

    def evaluate(self, logits: npt.ArrayLike, labels: npt.ArrayLike) -> CascadeReport:
        """Count how the policy fares on `logits` with known `labels`.

        Args:
            logits: `(rows, num_stages, num_classes)`.
            labels: `(rows,)`.

        Raises:
            ValueError: As `learn`.
        """
        scores, truth = check_holdout(logits, labels, len(self.stages))
        class_ids, stage_of = self.route(scores)
        dims = np.asarray(self.dims)
        exits = np.bincount(stage_of, minlength=len(dims)) / len(truth)
        return CascadeReport(
            accuracy=float(np.mean(class_ids == truth)),
            full_accuracy=float(np.mean(np.argmax(scores[:, -1], axis=-1) == truth)),
            expected_dim=float(exits @ dims),
            cumulative_dim=float(exits @ np.cumsum(dims)),
            exit_fractions=tuple(float(share) for share in exits),
            size=len(truth),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the `cascade` object of the manifest."""
        seen = asdict(self.holdout) if self.holdout else {}
        if seen:
            seen["exit_fractions"] = list(seen["exit_fractions"])  # as it is read back
        return {
            "stages": [asdict(stage) for stage in self.stages],
            "confidence": self.confidence,
            "method": self.method,
            "guarantee": None,
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
            return cls(stages, cascade["confidence"], holdout, cascade.get("method", "unknown"))
        except (KeyError, TypeError, ValueError) as error:
            raise ManifestError(
                "A cascade names its stages and its confidence. "
                f"Received: {cascade!r} ({type(error).__name__}: {error}). "
                "Install the version of keras-mrl that exported the model, or a later one."
            ) from error


_REPORTED = ("accuracy", "full_accuracy", "expected_dim", "cumulative_dim", "exit_fractions")


def softmax(logits: npt.NDArray[Any], temperature: float = 1.0) -> npt.NDArray[np.float32]:
    """Return the probabilities of `logits (..., classes)`, in float32.

    Examples:
        >>> softmax(np.log([1.0, 3.0])).tolist()
        [0.25, 0.75]
    """
    scores = np.asarray(logits, dtype=np.float32)
    # Divided last: the difference of two large quotients keeps fewer digits.
    raised = np.exp((scores - scores.max(axis=-1, keepdims=True)) / np.float32(temperature))
    return raised / raised.sum(axis=-1, keepdims=True)


def max_probability(logits: npt.NDArray[Any], temperature: float = 1.0) -> npt.NDArray[Any]:
    """Return the largest probability of each row of `logits (..., classes)`.

    Examples:
        >>> max_probability(np.log([[1.0, 3.0]])).tolist()
        [0.75]
    """
    return softmax(logits, temperature).max(axis=-1)


def _learn_threshold(
    confidence: npt.NDArray[np.float32],
    right: npt.NDArray[np.bool],
    right_next: npt.NDArray[np.bool],
) -> float:
    """The smallest best threshold of one adjacent pair, over the paper's grid.

    With rows in order of confidence, a threshold accepts a tail of them, so the accuracies of all
    thresholds are two cumulative sums.
    """
    order = np.argsort(confidence, kind="stable")
    ascending = confidence[order]
    grid = np.linspace(0.1, 1.0, 100, dtype=np.float32)
    first_accepted = np.searchsorted(ascending, grid, side="right")
    below = np.concatenate([[0], np.cumsum(right_next[order])])
    above = np.concatenate([np.cumsum(right[order][::-1])[::-1], [0]])
    best = int(np.argmax(below[first_accepted] + above[first_accepted]))
    return midway(ascending, int(first_accepted[best]))


def midway(ascending: npt.NDArray[np.float32], first: int) -> float:
    """Return the threshold that accepts exactly `ascending[first:]`, far from both neighbours.

    Examples:
        >>> midway(np.float32([0.25, 0.5, 0.75]), first=1)
        0.375
    """
    below = ascending[first - 1] if first > 0 else np.float32(0)
    above = ascending[first] if first < len(ascending) else np.float32(1)
    middle = np.float32(below + (above - below) / 2)
    return float(middle if below <= middle < above else below)
