"""Adaptive classification: small dims first, wider ones only for the rows still unsure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .contract import check_dims
from .errors import ManifestError

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

    Example:
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
        check_dims(stage.dim for stage in self.stages)
        thresholds = [stage.threshold for stage in self.stages]
        if thresholds[-1] is not None or None in thresholds[:-1]:
            raise ValueError(
                "Every stage but the last needs a threshold, and the last accepts all. "
                f"Received: thresholds={tuple(thresholds)}. End with Stage(dim, None)."
            )
        if any(not np.isfinite(t) for t in thresholds[:-1] if t is not None) or any(
            not (np.isfinite(s.temperature) and s.temperature > 0) for s in self.stages
        ):
            raise ValueError(
                "Thresholds must be finite and temperatures positive. "
                f"Received: {self.stages}. A threshold of 1 accepts no row, one of 0 every row."
            )
        if self.confidence not in CONFIDENCES:
            raise ValueError(
                f"confidence must be one of {', '.join(CONFIDENCES)}. "
                f"Received: confidence={self.confidence!r}. Choose one of those."
            )

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
        scores, truth = _check_holdout(logits, labels, len(dims))
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
        """
        scores = np.asarray(logits, dtype=np.float32)
        accepted = np.ones(scores.shape[:2], dtype=bool)
        for index, stage in enumerate(self.stages[:-1]):
            confidence = max_probability(scores[:, index], stage.temperature)
            accepted[:, index] = confidence > np.float32(stage.threshold)
        stage_of = np.argmax(accepted, axis=1)
        rows = np.arange(len(scores))
        return np.argmax(scores[rows, stage_of], axis=-1), stage_of

    def evaluate(self, logits: npt.ArrayLike, labels: npt.ArrayLike) -> CascadeReport:
        """Count how the policy fares on `logits` with known `labels`.

        Args:
            logits: `(rows, num_stages, num_classes)`.
            labels: `(rows,)`.

        Raises:
            ValueError: As `learn`.
        """
        scores, truth = _check_holdout(logits, labels, len(self.stages))
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
                f"Received: {dict(cascade)!r} ({type(error).__name__}: {error}). "
                "Install the version of keras-mrl that exported the model, or a later one."
            ) from error


_REPORTED = ("accuracy", "full_accuracy", "expected_dim", "cumulative_dim", "exit_fractions")


def softmax(logits: npt.NDArray[Any], temperature: float = 1.0) -> npt.NDArray[np.float32]:
    """Return the probabilities of float32 `logits (..., classes)`."""
    scaled = np.asarray(logits, dtype=np.float32) / np.float32(temperature)
    raised = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    return raised / raised.sum(axis=-1, keepdims=True)


def max_probability(logits: npt.NDArray[Any], temperature: float = 1.0) -> npt.NDArray[Any]:
    """Return the largest probability of each row of `logits (..., classes)`."""
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
    return _midway(ascending, int(first_accepted[best]))


def _midway(ascending: npt.NDArray[np.float32], first: int) -> float:
    """A float32 threshold that accepts exactly `ascending[first:]`, far from both neighbours."""
    below = ascending[first - 1] if first > 0 else np.float32(0)
    above = ascending[first] if first < len(ascending) else np.float32(1)
    middle = np.float32(below + (above - below) / 2)
    return float(middle if below <= middle < above else below)


def _check_holdout(
    logits: npt.ArrayLike, labels: npt.ArrayLike, num_dims: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    scores = np.asarray(logits, dtype=np.float32)
    truth = np.asarray(labels)
    if scores.ndim != 3 or scores.shape[1] != num_dims or truth.shape != scores.shape[:1]:
        raise ValueError(
            "logits must be (rows, num_dims, num_classes) with one label per row. "
            f"Received: logits of shape {scores.shape} and labels of shape {truth.shape} for "
            f"{num_dims} dims. Give what predict() of the nested model returns, and class ids."
        )
    if not len(truth):
        raise ValueError(
            "A holdout needs rows. Received: none. Keep some labelled rows out of training."
        )
    if not np.isfinite(scores).all():
        raise ValueError(
            "logits must be finite. Received: NaN or infinity. Train the model to a finite loss."
        )
    if truth.dtype.kind not in "iu" or truth.min() < 0 or truth.max() >= scores.shape[2]:
        raise ValueError(
            f"labels must be class ids in 0..{scores.shape[2] - 1}. "
            f"Received: {truth.dtype} labels from {truth.min()} to {truth.max()}. "
            "Number the classes from 0, as in training."
        )
    if scores.min() >= 0 and np.allclose(scores.sum(axis=-1), 1, atol=1e-3):
        raise ValueError(
            "logits must be logits, not probabilities. Received: rows that sum to 1. "
            "Leave the softmax out, or give np.log(probabilities)."
        )
    return scores, truth.astype(np.int64)
