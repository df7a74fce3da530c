"""Adaptive classification: some test images teach the thresholds, the others judge them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from keras_mrl_serving import (
    CascadeFront,
    CascadePolicy,
    CascadeReport,
    certify_cascade,
    fit_temperatures,
    oracle_report,
    search_cascades,
)
from keras_mrl_serving.cascade.policy import least_rows

from .answers import Answers
from .splits import Rows, holdouts

RISK, DELTA = 0.02, 0.1  # of the certified cascade
WITHIN = 0.005  # of the full dim: half a point

_EQUAL = 1e-9  # costs that differ by rounding alone


@dataclass(frozen=True, eq=False)
class _Scores:
    """What a Matryoshka net answered to the test images."""

    logits: npt.NDArray[Any]
    labels: Rows
    dims: tuple[int, ...]

    def given(self, rows: Rows) -> tuple[Any, Any, tuple[int, ...]]:
        return self.logits[rows], self.labels[rows], self.dims

    def report(self, policy: CascadePolicy, rows: Rows) -> CascadeReport:
        columns = [self.dims.index(dim) for dim in policy.dims]
        return policy.evaluate(self.logits[rows][:, columns], self.labels[rows])


def cascades(answers: Answers) -> dict[str, Any]:
    """Return how policies of the first Matryoshka net fare, split by split.

    `splits` has a list per policy; `search_over_greedy` how far the joint search is above the
    paper's thresholds at an equal expected dim.
    """
    scores = _Scores(answers.logits("mrl-0"), answers.test.labels, answers.plan.dims)
    full = answers.logits(f"{answers.full}-0")[:, -1].argmax(-1) == scores.labels
    splits: dict[str, list[dict[str, float]]] = {}
    parts = holdouts(answers.test)
    equal, refused = [], _refusal(min(len(taught) for taught, _ in parts))
    for split, (taught, judged) in enumerate(parts):
        given = scores.given(taught)
        greedy, front = CascadePolicy.learn(*given), search_cascades(*given)
        spent = scores.report(greedy, taught).expected_dim + _EQUAL
        scaled = search_cascades(*given, temperatures=fit_temperatures(*given[:2]))
        policies = {
            "greedy": greedy,
            "search at greedy's cost": front.best_under(spent),
            "search within half a point": scaled.cheapest_within(WITHIN),
        }
        if not refused:
            with warnings.catch_warnings():  # that none passed shows in the expected dim
                warnings.simplefilter("ignore", UserWarning)
                policies["certified"] = certify_cascade(*given, risk=RISK, delta=DELTA, seed=split)
        reports = {name: scores.report(policy, judged) for name, policy in policies.items()}
        reports["oracle"] = oracle_report(*scores.given(judged))
        for name, report in reports.items():
            splits.setdefault(name, []).append(
                {
                    "accuracy": report.accuracy,
                    "full_accuracy": report.full_accuracy,
                    "ff_accuracy": float(full[judged].mean()),
                    "expected_dim": report.expected_dim,
                    "cumulative_dim": report.cumulative_dim,
                }
            )
        equal.append(_over(greedy, front, spent, scores, {"taught": taught, "judged": judged}))
    return {
        "risk": RISK,
        "delta": DELTA,
        "splits": splits,
        "search_over_greedy": equal,
        "refused": refused,
    }


def _refusal(rows: int) -> str:
    """Why a holdout of so many rows certifies nothing; empty where it may."""
    needed = 2 * least_rows(RISK, DELTA)
    if rows >= needed:
        return ""
    return (
        f"a risk of {RISK} with delta {DELTA} takes a holdout of {needed} rows, a fifth of the "
        f"test images, and here it has {rows}"
    )


def _over(
    greedy: CascadePolicy,
    front: CascadeFront,
    spent: float,
    scores: _Scores,
    parts: dict[str, Rows],
) -> dict[str, dict[str, float]]:
    """How far a front is above greedy where both cost as much on the rows that taught them.

    Between two neighbours of the front lies the policy that takes either by chance.
    """
    at = max(i for i, cost in enumerate(front.costs) if cost <= spent)
    pair, costs = front.policies[at : at + 2], front.costs[at : at + 2]
    share = (spent - costs[0]) / (costs[1] - costs[0]) if len(pair) > 1 else 0.0
    found = {}
    for name, rows in parts.items():
        less, more = (scores.report(policy, rows) for policy in (pair[0], pair[-1]))
        its = scores.report(greedy, rows)
        found[name] = {
            measure: (1 - share) * getattr(less, measure)
            + share * getattr(more, measure)
            - getattr(its, measure)
            for measure in ("accuracy", "expected_dim")
        }
    return found
