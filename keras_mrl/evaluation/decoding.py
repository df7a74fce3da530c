"""Thresholds for adaptive decoding, from what a holdout text costs at each dim."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from keras_mrl_serving.cascade import CascadePolicy, Stage, midway

from .tokens import TokenScores

_STEPS = 40  # halvings of the price; each leaves half of what is undecided


def learn_decoding_policy(scores: TokenScores, budget: float = 0.02) -> CascadePolicy:
    """Return the policy of least expected dim whose perplexity stays within a budget.

    A token costs its cross-entropy and a price per dim. At one price, stage by stage from the last
    to the first, the threshold is the one of least cost given those after it. The price rises as
    long as the perplexity on the holdout keeps the budget.

    Args:
        scores: Of a holdout text; it must share nothing with the training text nor with the text
            the policy is judged on.
        budget: Share by which the adaptive perplexity may exceed that of the last dim.

    Formula:
        min over t: sum_tokens loss_{m(t)} + price * m(t), where m(t) is the first m of
        confidence_m > t_m

    Raises:
        ValueError: If `budget` is not a number of at least 0.

    Examples:
        >>> sure = np.linspace(0, 1, 100)[:, None]
        >>> scores = TokenScores(
        ...     dims=(8, 64),
        ...     losses=np.hstack([3 - 2 * sure, np.ones_like(sure)]),
        ...     confidences=np.hstack([sure, sure]),
        ...     right=np.ones((100, 2), bool),
        ... )
        >>> policy = learn_decoding_policy(scores)
        >>> policy.holdout.exit_fractions, round(scores.adaptive_perplexity(policy), 3)
        ((0.14, 0.86), 2.769)
    """
    if not budget >= 0:
        raise ValueError(
            "budget must be a share of at least 0. "
            f"Received: budget={budget}. Give 0.02 for 2% above the last dim's perplexity."
        )
    limit = scores.perplexity()[scores.dims[-1]] * (1 + budget)
    low, high = np.log(1e-9), np.log(1e3)
    best = _policy(scores, 0.0, budget)
    for _ in range(_STEPS):
        price = (low + high) / 2
        tried = _policy(scores, float(np.exp(price)), budget)
        if scores.adaptive_perplexity(tried) <= limit:
            low, best = price, tried
        else:
            high = price
    return replace(best, holdout=scores.evaluate(best))


def _policy(scores: TokenScores, price: float, budget: float) -> CascadePolicy:
    """The thresholds of least cost at one price, each given those after it."""
    costs = scores.losses.astype(np.float64) + price * np.asarray(scores.dims)
    later = costs[:, -1]
    thresholds: list[float | None] = [None]
    for stage in reversed(range(len(scores.dims) - 1)):
        order = np.argsort(scores.confidences[:, stage], kind="stable")
        ascending = scores.confidences[order, stage].astype(np.float32)
        passed = np.concatenate([[0], np.cumsum(later[order])])
        kept = np.concatenate([np.cumsum(costs[order, stage][::-1])[::-1], [0]])
        apart = np.concatenate([[True], ascending[1:] > ascending[:-1], [True]])  # equals stay so
        threshold = midway(ascending, int(np.argmin(np.where(apart, passed + kept, np.inf))))
        sure = scores.confidences[:, stage].astype(np.float32) > np.float32(threshold)
        later = np.where(sure, costs[:, stage], later)
        thresholds.insert(0, threshold)
    stages = tuple(map(Stage, scores.dims, thresholds))
    method = f"least expected dim within {budget:.1%} of the last dim's perplexity"
    return CascadePolicy(stages, method=method)
