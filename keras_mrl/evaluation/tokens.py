"""Scores of a text at every dim of a language model, and thresholds for adaptive decoding.

The logits of a whole text would not fit in memory. So they are made a chunk of positions at a time,
and three numbers of each are kept: the loss, the confidence, and whether the best token is right.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from keras import ops

from keras_mrl_serving.cascade.policy import CascadePolicy, CascadeReport, Stage, report_exits
from keras_mrl_serving.cascade.thresholds import midway

from ..models import split


@dataclass(frozen=True, eq=False)
class TokenScores:
    """The cross-entropy, the confidence and the correctness of each token at each dim.

    Args:
        dims: The dims of the head.
        losses: Minus the log-probability of the true token, float32 `(tokens, num_dims)`.
        confidences: The largest probability, float32 `(tokens, num_dims)`.
        right: Whether the likeliest token is the true one, bool `(tokens, num_dims)`.

    Examples:
        >>> from keras_mrl_serving import CascadePolicy, Stage
        >>> scores = TokenScores(
        ...     dims=(8, 64),
        ...     losses=np.log([[2.0, 2.0], [8.0, 2.0]]),
        ...     confidences=np.array([[0.5, 0.5], [0.2, 0.5]]),
        ...     right=np.array([[True, True], [False, True]]),
        ... )
        >>> {dim: round(value, 3) for dim, value in scores.perplexity().items()}
        {8: 4.0, 64: 2.0}
        >>> policy = CascadePolicy((Stage(8, 0.4), Stage(64, None)))
        >>> round(scores.adaptive_perplexity(policy), 3), scores.evaluate(policy).expected_dim
        (2.0, 36.0)
    """

    dims: tuple[int, ...]
    losses: npt.NDArray[Any] = field(repr=False)
    confidences: npt.NDArray[Any] = field(repr=False)
    right: npt.NDArray[np.bool] = field(repr=False)

    def __len__(self) -> int:
        return len(self.losses)

    def perplexity(self) -> dict[int, float]:
        """Return the perplexity of the text at each dim."""
        means = np.exp(self.losses.mean(axis=0, dtype=np.float64))
        return dict(zip(self.dims, map(float, means), strict=True))

    def adaptive_perplexity(self, policy: CascadePolicy) -> float:
        """Return the perplexity where each token's distribution is that of the dim it stops at."""
        columns, stage_of = self._route(policy)
        losses = self.losses[np.arange(len(self)), columns[stage_of]]
        return float(np.exp(losses.mean(dtype=np.float64)))

    def evaluate(self, policy: CascadePolicy) -> CascadeReport:
        """Return how `policy` fares on these tokens."""
        columns, stage_of = self._route(policy)
        return report_exits(policy.dims, stage_of, self.right[:, columns])

    def _route(self, policy: CascadePolicy) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """The column of each stage, and the stage each token stops at."""
        scored = set(policy.dims) <= set(self.dims) and not policy.has_exits
        if not scored or any(stage.temperature != 1 for stage in policy.stages):
            raise ValueError(
                "A policy for these scores asks scored dims, at temperature 1. "
                f"Received: {policy.stages} for dims={self.dims}. "
                "Learn one of the scores: learn_decoding_policy(scores)."
            )
        columns = np.array([self.dims.index(dim) for dim in policy.dims])
        limits = np.array([s.threshold for s in policy.stages[:-1]], np.float32)
        stops = np.ones((len(self), len(columns)), bool)
        stops[:, :-1] = self.confidences[:, columns[:-1]].astype(np.float32) > limits
        return columns, np.argmax(stops, axis=1)


def score_tokens(
    model: keras.Model,
    tokens: npt.ArrayLike,
    labels: npt.ArrayLike,
    ignore_class: int | None = None,
    *,
    batch_size: int = 32,
    chunk: int = 1024,
) -> TokenScores:
    """Return the scores of a text at every dim, made `chunk` positions at a time.

    Args:
        model: A built language model with features at every position.
        tokens: Token ids.
        labels: The token that follows each.
        ignore_class: Label that stands for no token; its positions are left out.
        batch_size: Rows the backbone reads at once.
        chunk: Positions whose logits are held at once, at one dim.

    Shapes:
        tokens, labels: `(rows, time)`.

    Raises:
        ValueError: If the model has no nested head, shapes differ, no label is left or one names
            no token, `batch_size` or `chunk` is below 1, or a logit is NaN.

    Examples:
        >>> backbone = causal_transformer(vocabulary_size=50, width=16, length=8)
        >>> model = MatryoshkaClassifier(backbone, MatryoshkaHead(50, dims=(4, 16)))
        >>> text = np.arange(18).reshape(2, 9)
        >>> _ = model(keras.ops.convert_to_tensor(text[:, :-1]))
        >>> scores = score_tokens(model, text[:, :-1], text[:, 1:])
        >>> scores.losses.shape, list(scores.perplexity())
        ((16, 2), [4, 16])
    """
    if batch_size < 1 or chunk < 1:
        raise ValueError(
            "batch_size and chunk must be at least 1. "
            f"Received: batch_size={batch_size}, chunk={chunk}. "
            "Give the rows and the positions that fit in memory at once."
        )
    backbone, head = split(model)
    ids, truth = np.asarray(tokens), np.asarray(labels)
    counted = np.ones(truth.shape, bool) if ignore_class is None else truth != ignore_class
    if head is None or ids.shape != truth.shape or ids.ndim != 2 or not counted.any():
        raise ValueError(
            "A text is scored by a model with a MatryoshkaHead, on tokens (rows, time) and the "
            "labels of each, not all ignored. "
            f"Received: {type(model).__name__} {model.name!r}, tokens of shape {ids.shape}, "
            f"labels of shape {truth.shape}, {int(counted.sum())} that count. "
            "Write score_tokens(model, ids[:, :-1], ids[:, 1:])."
        )
    _check_tokens(truth[counted], head.num_classes)
    dims, chunks = head.dims or (), []
    for start in range(0, len(ids), batch_size):
        rows = slice(start, start + batch_size)
        batch = np.asarray(backbone.predict_on_batch(_pad(ids[rows], batch_size)))
        features = batch[: len(ids[rows])][counted[rows]]
        next_ids = truth[rows][counted[rows]].astype(np.int32)
        for first in range(0, len(next_ids), chunk):
            part = slice(first, first + chunk)
            chunks.append(
                [_score(head, features[part], next_ids[part], chunk, dim) for dim in dims]
            )
    losses, confidences, right = (
        np.concatenate([np.stack([scores[i] for scores in by_dim], axis=1) for by_dim in chunks])
        for i in range(3)
    )
    if np.isnan(losses).any():
        raise ValueError(
            "A text is scored by logits that are numbers. "
            f"Received: NaN at {int(np.isnan(losses).any(axis=1).sum())} of {len(losses)} tokens. "
            "Train the model to a finite loss."
        )
    return TokenScores(dims, losses, confidences, right.astype(bool))


def _check_tokens(labels: npt.NDArray[Any], num_classes: int) -> None:
    wrong = labels[~((labels >= 0) & (labels < num_classes))]
    if len(wrong):
        raise ValueError(
            f"Labels must name a token of the head's {num_classes}. "
            f"Received: {wrong[0]} in {len(wrong)} of {len(labels)}. "
            f"Give ignore_class={wrong[0]} if it stands for padding."
        )


def _pad(array: npt.NDArray[Any], rows: int) -> npt.NDArray[Any]:
    """The array with rows of zeros after it: one shape, so that nothing is compiled twice."""
    return np.concatenate([array, np.zeros((rows - len(array), *array.shape[1:]), array.dtype)])


def _score(head: Any, features: Any, labels: Any, rows: int, dim: int) -> list[npt.NDArray[Any]]:
    """Losses, confidences and correctness of at most `rows` positions at one dim."""
    prefix = ops.convert_to_tensor(_pad(features[:, :dim], rows))
    truth = ops.convert_to_tensor(_pad(labels, rows))
    logits = ops.cast(head.logits_at(prefix, dim), "float32")
    largest = ops.max(logits, axis=-1)
    total = ops.sum(ops.exp(logits - largest[:, None]), axis=-1)
    logit = ops.take_along_axis(logits, truth[:, None], axis=-1)[:, 0]
    losses = largest + ops.log(total) - logit
    right = ops.equal(ops.cast(ops.argmax(logits, axis=-1), "int32"), truth)
    scores = (losses, 1.0 / total, right)
    return [ops.convert_to_numpy(values)[: len(labels)] for values in scores]


_STEPS = 40  # each halves the interval that the price lies in
_SWEEPS = 3  # over the thresholds: each depends on which tokens the stages before it pass on


def learn_decoding_policy(scores: TokenScores, budget: float = 0.02) -> CascadePolicy:
    """Return the policy of least expected dim whose perplexity stays within a budget.

    A token costs its cross-entropy plus a price per dim. At a given price each threshold is set to
    the one of least cost, given the others: from the last to the first, a few times over. The price
    is the highest at which the perplexity on the holdout stays within the budget.

    Args:
        scores: Of a holdout text, which shares nothing with the training text nor with the text
            that the policy is judged on.
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
    low, high = np.log(1e-9), np.log(1e3)  # logarithms of prices
    best = _policy(scores, 0.0, budget)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        policy = _policy(scores, float(np.exp(middle)), budget)
        if scores.adaptive_perplexity(policy) <= limit:
            low, best = middle, policy
        else:
            high = middle
    return replace(best, holdout=scores.evaluate(best))


def _policy(scores: TokenScores, price: float, budget: float) -> CascadePolicy:
    """The thresholds of least cost at one price, each given the others."""
    costs = scores.losses.astype(np.float64) + price * np.asarray(scores.dims)
    confidences = scores.confidences.astype(np.float32)
    thresholds = [1.0] * (len(scores.dims) - 1)
    would_stop = np.zeros(costs.shape, bool)
    would_stop[:, -1] = True
    for _ in range(_SWEEPS):
        for stage in reversed(range(len(thresholds))):
            reached = ~would_stop[:, :stage].any(axis=1)
            next_stop = stage + 1 + np.argmax(would_stop[:, stage + 1 :], axis=1)
            later = costs[np.arange(len(costs)), next_stop]
            thresholds[stage] = _threshold(
                confidences[reached, stage], costs[reached, stage], later[reached]
            )
            would_stop[:, stage] = confidences[:, stage] > np.float32(thresholds[stage])
    stages = tuple(map(Stage, scores.dims, [*thresholds, None]))
    method = f"least expected dim within {budget:.1%} of the last dim's perplexity"
    return CascadePolicy(stages, method=method)


def _threshold(
    confidence: npt.NDArray[Any], here: npt.NDArray[Any], later: npt.NDArray[Any]
) -> float:
    """The threshold of least cost: a token costs `here` above it and `later` at it or below."""
    order = np.argsort(confidence, kind="stable")
    ascending = confidence[order]
    cost_below = np.concatenate([[0], np.cumsum(later[order])])
    cost_above = np.concatenate([np.cumsum(here[order][::-1])[::-1], [0]])
    differ = np.ones(len(order) + 1, bool)
    differ[1:-1] = ascending[1:] > ascending[:-1]  # no threshold parts equal confidences
    return midway(ascending, int(np.argmin(np.where(differ, cost_below + cost_above, np.inf))))
