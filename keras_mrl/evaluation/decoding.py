"""Thresholds for adaptive decoding, from what a holdout text costs at each dim."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_mrl_serving.cascade.confidence import midway
from keras_mrl_serving.cascade.policy import CascadePolicy, Stage

from .tokens import TokenScores

Array = npt.NDArray[Any]

_STEPS = 40  # halvings of the price; each leaves half of what is undecided
_SWEEPS = 3  # over the thresholds: a stage sees the tokens alone that those before it pass on


def learn_decoding_policy(scores: TokenScores, budget: float = 0.02) -> CascadePolicy:
    """Return the policy of least expected dim whose perplexity stays within a budget.

    A token costs its cross-entropy and a price per dim. At one price every threshold in turn, from
    the last to the first and a few times over, is the one of least cost given the others. The price
    rises as long as the perplexity on the holdout keeps the budget.

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
    """The thresholds of least cost at one price, each given the others."""
    costs = scores.losses.astype(np.float64) + price * np.asarray(scores.dims)
    confidences = scores.confidences.astype(np.float32)
    thresholds = [1.0] * (len(scores.dims) - 1)
    sure = np.zeros(costs.shape, bool)
    sure[:, -1] = True
    for _ in range(_SWEEPS):
        for stage in reversed(range(len(thresholds))):
            reached = ~sure[:, :stage].any(axis=1)
            stops = stage + 1 + np.argmax(sure[:, stage + 1 :], axis=1)
            later = costs[np.arange(len(costs)), stops]
            thresholds[stage] = _threshold(
                confidences[reached, stage], costs[reached, stage], later[reached]
            )
            sure[:, stage] = confidences[:, stage] > np.float32(thresholds[stage])
    stages = tuple(map(Stage, scores.dims, [*thresholds, None]))
    method = f"least expected dim within {budget:.1%} of the last dim's perplexity"
    return CascadePolicy(stages, method=method)


def _threshold(confidence: Array, here: Array, later: Array) -> float:
    """The threshold of least cost where a token costs `here` above it and `later` below."""
    order = np.argsort(confidence, kind="stable")
    ascending = confidence[order]
    passed_on = np.concatenate([[0], np.cumsum(later[order])])
    kept = np.concatenate([np.cumsum(here[order][::-1])[::-1], [0]])
    apart = np.ones(len(order) + 1, bool)
    apart[1:-1] = ascending[1:] > ascending[:-1]  # no threshold parts equal confidences
    return midway(ascending, int(np.argmin(np.where(apart, passed_on + kept, np.inf))))
