"""A cascade beside its holdout, in production, and beside the best that any cascade could do.

`exit_drift` is a permutation test: its p-value is counted among 9,999 draws from the pooled rows.
So stages at which few rows stop need no special case, and the client needs no SciPy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..inputs import as_array
from .policy import CascadePolicy, CascadeReport, report_exits
from .stages import LAST_EXIT, Logits, labelled_stages

_DRAWS = 9999


@dataclass(frozen=True)
class Drift:
    """How two exit histograms differ.

    Args:
        p_value: Chance of a difference as large between two draws of the same rows; at least 1 in
            10,000.
        moved: Size of the effect: the share of rows that stop at another stage (the total
            variation distance), from 0 to 1.
        expected: Share of the holdout that stopped at each stage.
        seen: Share of the rows in production that did.
        size: Number of rows in production.

    Examples:
        >>> Drift(0.4, 0.02, expected=(0.7, 0.3), seen=(0.72, 0.28), size=100).moved
        0.02
    """

    p_value: float
    moved: float
    expected: tuple[float, ...]
    seen: tuple[float, ...]
    size: int


def exit_drift(
    policy: CascadePolicy,
    dims: npt.ArrayLike,
    seed: int = 0,
    *,
    exits: npt.ArrayLike | None = None,
) -> Drift:
    """Compare where rows stop in production with where the policy's holdout stopped.

    Inputs that differ from those of the holdout shift the confidences, and with them the exits,
    long before labels are there to measure accuracy by. With very many rows the smallest
    difference is significant; look at `moved`, too.

    Args:
        policy: A policy with the report of its holdout, as a manifest carries it.
        dims: The dim that decided each row: `dim` of the result of `classify_adaptive`.
        seed: Seed of the draws.
        exits: Name of the exit that decided each row, "last" for the last, where the policy has
            exits.

    Shapes:
        dims, exits: `(rows,)`.

    Formula:
        chi-squared of the two rows of counts; its p-value is the share, among 9,999 draws of the
        production's count from all rows pooled, of those as large

    Raises:
        ValueError: If the policy has no holdout, or `dims` and `exits` are not rows of its stages.

    Examples:
        >>> from keras_mrl_serving import CascadeReport, Stage
        >>> holdout = CascadeReport(0.8, 0.8, 36.0, 40.0, exit_fractions=(0.5, 0.5), size=1000)
        >>> policy = CascadePolicy((Stage(8, 0.9), Stage(64, None)), holdout=holdout)
        >>> exit_drift(policy, [8] * 50 + [64] * 50).moved
        0.0
        >>> drift = exit_drift(policy, [8] * 20 + [64] * 80)
        >>> round(drift.moved, 3), drift.p_value
        (0.3, 0.0001)
        >>> policy = CascadePolicy(
        ...     (Stage(64, 0.9, exit="early"), Stage(64, None)), holdout=holdout)
        >>> exit_drift(policy, [64] * 100, exits=["early"] * 50 + ["last"] * 50).moved
        0.0
    """
    if policy.holdout is None:
        raise ValueError(
            "Drift is seen against the holdout of a policy. Received: a policy without. "
            "Learn it, or set it: dataclasses.replace(policy, holdout=policy.evaluate(...))."
        )
    stopped = as_array("dims", dims)
    if stopped.ndim != 1 or not len(stopped) or not np.isin(stopped, policy.dims).all():
        raise ValueError(
            f"dims must be one of {', '.join(map(str, policy.dims))} for each row. "
            f"Received: {stopped.dtype} of shape {stopped.shape}. "
            "Give client.classify_adaptive(...).dim."
        )
    names = _exits_of(policy, exits, len(stopped))
    expected = np.asarray(policy.holdout.exit_fractions)
    counts_before = np.round(expected * policy.holdout.size).astype(np.int64)
    counts_now = np.array(
        [((stopped == dim) & (names == (exit_ or LAST_EXIT))).sum() for exit_, dim in policy.keys]
    )
    if counts_now.sum() < len(stopped):
        raise ValueError(
            "Every row must have stopped at a stage of the policy. "
            f"Received: {len(stopped) - counts_now.sum()} rows at other pairs of exit and dim than "
            f"{policy.keys}. Give dims and exits of one answer by this policy."
        )
    seen = counts_now / len(stopped)
    pooled = counts_before + counts_now
    draws = np.random.default_rng(seed).multivariate_hypergeometric(
        pooled, len(stopped), size=_DRAWS, method="marginals"
    )
    # The pooled counts are the same in every draw, so the rows drawn decide the statistic.
    mean = pooled * (len(stopped) / pooled.sum())
    spread = np.where(mean > 0, mean, 1)
    distances = ((draws - mean) ** 2 / spread).sum(axis=1)
    distance_now = ((counts_now - mean) ** 2 / spread).sum()
    as_far = (distances >= distance_now * (1 - 1e-12)).sum()
    return Drift(
        p_value=float((1 + as_far) / (1 + _DRAWS)),
        moved=float(np.abs(seen - expected).sum() / 2),
        expected=tuple(expected.tolist()),
        seen=tuple(seen.tolist()),
        size=len(stopped),
    )


def _exits_of(
    policy: CascadePolicy, exits: npt.ArrayLike | None, num_rows: int
) -> npt.NDArray[np.str_]:
    """Return the name of the exit that decided each row."""
    if exits is None and not policy.has_exits:
        return np.full(num_rows, LAST_EXIT)
    names = [exit_ or LAST_EXIT for exit_, _ in policy.keys]
    given = np.asarray([]) if exits is None else as_array("exits", exits)
    if given.dtype.kind in "SO":
        given = np.array([g.decode() if isinstance(g, bytes) else g for g in given.ravel()])
    if given.shape != (num_rows,) or not np.isin(given, names).all():
        received = "none" if exits is None else f"{given.dtype} of shape {given.shape}"
        raise ValueError(
            f"exits must be one of {', '.join(dict.fromkeys(names))} for each row of dims. "
            f"Received: {received} for {num_rows} rows. "
            "Give client.classify_adaptive(...).exit."
        )
    return given


def oracle_report(
    logits: Logits, labels: npt.ArrayLike, dims: Sequence[int] | None = None
) -> CascadeReport:
    """Return the report of a router that knows the label: the ceiling of every cascade.

    A row stops at the first stage that has it right, and at the first if none has: later stages
    would only cost.

    Args:
        logits: As in `search_cascades`.
        labels: Class ids, from 0.
        dims: The dims of the head; left out where logits are by stage.

    Shapes:
        logits: As in `search_cascades`. labels: `(rows,)`.

    Raises:
        ValueError: If shapes do not fit, there are no rows, or these are probabilities.

    Reference:
        Kusupati et al., Matryoshka Representation Learning, the oracle routing of its appendix.

    Examples:
        >>> first, second = [[2.0, 0.0], [0.0, 1.0]], [[2.0, 0.0], [1.0, 0.0]]
        >>> report = oracle_report([first, second], labels=[1, 0], dims=(8, 64))
        >>> report.accuracy, report.full_accuracy, report.expected_dim
        (1.0, 1.0, 36.0)
    """
    scores, truth, keys = labelled_stages(logits, labels, dims)
    is_right = np.argmax(scores, axis=-1) == truth[:, None]
    return report_exits([dim for _, dim in keys], np.argmax(is_right, axis=1), is_right)
