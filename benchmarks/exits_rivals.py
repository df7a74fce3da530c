"""Cheap ways that a cascade over exits must beat, and the paired bootstrap that compares them.

A rival is a curve: for each of its settings, which rows of the test part it has right, and what
each row costs. Its best setting is chosen on the test rows, which flatters it; our cascade is one
policy, chosen on other rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """What the settings of one way cost each row, and where they are right.

    Args:
        is_right: `(settings, rows)`.
        costs: `(settings, rows)`, in any unit.
    """

    is_right: npt.NDArray[np.bool]
    costs: Floats

    @classmethod
    def two_stages(
        cls,
        first: npt.NDArray[Any],
        last: npt.NDArray[Any],
        labels: npt.NDArray[Any],
        first_costs: Floats,
        last_costs: Floats,
        settings: int = 200,
    ) -> Curve:
        """Return the curve of a cascade of two models, by the share of rows the first decides.

        Args:
            first: Logits of the first model, `(rows, classes)`.
            last: Logits of the second.
            labels: Class ids.
            first_costs: What the first model costs each row.
            last_costs: What the second costs each row, without the first.
            settings: How many thresholds.
        """
        order = np.argsort(np.argsort(-margins(first), kind="stable"), kind="stable")
        decided = order < np.linspace(0, len(order), settings)[:, None]
        first_right = first.argmax(axis=-1) == labels
        last_right = last.argmax(axis=-1) == labels
        return cls(
            np.where(decided, first_right, last_right),
            np.where(decided, first_costs, first_costs + last_costs),
        )

    @classmethod
    def of_all(cls, curves: Sequence[Curve]) -> Curve:
        """Return the settings of several ways as one."""
        return cls(
            np.concatenate([curve.is_right for curve in curves]),
            np.concatenate([curve.costs for curve in curves]),
        )

    def points(self) -> list[tuple[float, float]]:
        """Return mean cost and accuracy of the settings that no other beats, cheapest first."""
        costs, accuracy = self.costs.mean(axis=1), self.is_right.mean(axis=1)
        best, points = -1.0, []
        for i in np.lexsort((-accuracy, costs)):
            if accuracy[i] > best:
                best = float(accuracy[i])
                points.append((float(costs[i]), best))
        return points


def margins(logits: npt.NDArray[Any]) -> Floats:
    """Return the difference of the two best probabilities of each row."""
    shares = np.exp(logits - logits.max(axis=-1, keepdims=True), dtype=np.float64)
    two = np.sort(shares / shares.sum(axis=-1, keepdims=True), axis=-1)[:, -2:]
    return np.asarray(two[:, 1] - two[:, 0])


def cost_at_equal_accuracy(
    own: Curve, rivals: Mapping[str, Curve], draws: int = 1000, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Return our cost as a share of the cheapest setting of each rival that is as accurate.

    Rows are drawn with replacement, for all ways alike. In a draw in which no setting of a rival is
    as accurate as ours, the share is 0.

    Args:
        own: Our cascade, one setting.
        rivals: By name.
        draws: How many.
        seed: Seed of the draws.

    Returns:
        For each rival the share on all rows, None where it is never as accurate, the ends of the
        interval that holds 95% of the draws, and in how many draws it was as accurate.
    """
    rng = np.random.default_rng(seed)
    rows = own.costs.shape[1]
    times = rng.multinomial(rows, np.full(rows, 1 / rows), size=draws).T.astype(np.float32)
    weights = np.concatenate([np.ones((rows, 1), np.float32), times], axis=1)
    own_right, own_costs = (own.is_right @ weights)[0], (own.costs @ weights)[0]
    results: dict[str, dict[str, Any]] = {}
    for name, curve in rivals.items():
        is_enough = curve.is_right.astype(np.float32) @ weights >= own_right
        costs = np.where(is_enough, curve.costs @ weights, np.inf).min(axis=0)
        shares = own_costs / costs
        low, high = np.quantile(shares[1:], [0.025, 0.975])
        results[name] = {
            "share": float(shares[0]) if shares[0] else None,
            "low": float(low),
            "high": float(high),
            "as_accurate_in": float(np.mean(shares[1:] > 0)),
        }
    return results


@dataclass(frozen=True)
class TfIdf:
    """A linear classifier over TF-IDF of words, pairs of words, and runs of characters."""

    vectors: Any
    classifier: Any

    @classmethod
    def learn(cls, texts: Sequence[str], labels: npt.NDArray[Any]) -> TfIdf:
        """Learn the classifier."""
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.pipeline import make_union
        from sklearn.svm import LinearSVC

        vectors = make_union(
            TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
            TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True),
        )
        return cls(vectors, LinearSVC(C=1.0).fit(vectors.fit_transform(texts), labels))

    def logits(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Return the scores of all classes, `(rows, classes)`."""
        scores = self.classifier.decision_function(self.vectors.transform(texts))
        return np.asarray(scores, np.float32)

    def multiply_adds(self, texts: Sequence[str]) -> Floats:
        """Return what each row costs: every n-gram of it meets every class."""
        counts = np.diff(self.vectors.transform(texts).indptr)
        return np.asarray(counts * float(len(self.classifier.classes_)))
