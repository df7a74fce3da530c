"""The ceiling of every cascade: a router that knows the label."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .cascade_report import CascadeReport, report_exits
from .contract import check_dims
from .inputs import check_holdout


def oracle_report(
    logits: npt.ArrayLike, labels: npt.ArrayLike, dims: Sequence[int]
) -> CascadeReport:
    """Return what a router that knows the label would reach.

    A row stops at the first dim that has it right, and at the first dim if none has: asking
    further would be in vain.

    Args:
        logits: What `predict` of the nested model returns.
        labels: Class ids, from 0.
        dims: The dims of the head.

    Shapes:
        logits: `(rows, num_dims, num_classes)`. labels: `(rows,)`.

    Raises:
        ValueError: If shapes do not fit, rows are none, or probabilities were given.

    Reference:
        Kusupati et al., Matryoshka Representation Learning, the oracle routing of its appendix.

    Examples:
        >>> first, second = [[2.0, 0.0], [0.0, 1.0]], [[2.0, 0.0], [1.0, 0.0]]
        >>> report = oracle_report([first, second], labels=[1, 0], dims=(8, 64))
        >>> report.accuracy, report.full_accuracy, report.expected_dim
        (1.0, 1.0, 36.0)
    """
    dims = check_dims(dims)
    scores, truth = check_holdout(logits, labels, len(dims))
    right = np.argmax(scores, axis=-1) == truth[:, None]
    return report_exits(dims, np.argmax(right, axis=1), right)
