"""How a cascade fared on rows whose labels are known, counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


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
