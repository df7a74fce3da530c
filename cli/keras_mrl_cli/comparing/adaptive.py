"""Adaptive classification and retrieval: learned on a part of the test images, judged on others."""

from __future__ import annotations

from typing import Any

from keras_mrl.baselines import principal_components
from keras_mrl.evaluation import mean_average_precision_at_k
from keras_mrl_serving import (
    CascadePolicy,
    ExactIndex,
    FunnelSchedule,
    certify_cascade,
    fit_temperatures,
    oracle_report,
    search_cascades,
)

from .answers import Answers
from .parts import holdouts

RISK, DELTA = 0.02, 0.1  # of the certified cascade
WITHIN = 0.005  # of the full dim: half a point

_K = 10
_SHORTLIST = 200  # the paper's
_LEAST_SHARE = 50  # a shortlist is this part of the gallery at most


def cascades(answers: Answers) -> dict[str, Any]:
    """Return policies of the first Matryoshka net: per split a fifth of the test images teaches."""
    logits, labels = answers.logits("mrl-0"), answers.test.labels
    full = answers.logits(f"{answers.full}-0")[:, -1].argmax(-1) == labels
    dims = answers.plan.dims
    splits: dict[str, list[dict[str, float]]] = {}
    refused = ""
    for split, (taught, judged) in enumerate(holdouts(len(labels))):
        given = logits[taught], labels[taught], dims
        greedy = CascadePolicy.learn(*given)
        spent = greedy.evaluate(logits[taught], labels[taught]).expected_dim
        scaled = search_cascades(*given, temperatures=fit_temperatures(*given[:2]))
        policies = {
            "greedy": greedy,
            "search at greedy's cost": search_cascades(*given).best_under(spent),
            "search within half a point": scaled.cheapest_within(WITHIN),
        }
        try:
            policies["certified"] = certify_cascade(*given, risk=RISK, delta=DELTA, seed=split)
        except ValueError as error:  # too few rows for the promise; it says how many would do
            refused = str(error)
        for name, policy in policies.items():
            columns = logits[:, [dims.index(dim) for dim in policy.dims]]
            report = policy.evaluate(columns[judged], labels[judged])
            taught_report = policy.evaluate(columns[taught], labels[taught])
            splits.setdefault(name, []).append(
                {
                    "accuracy": report.accuracy,
                    "full_accuracy": report.full_accuracy,
                    "ff_accuracy": float(full[judged].mean()),
                    "expected_dim": report.expected_dim,
                    "cumulative_dim": report.cumulative_dim,
                    "holdout_accuracy": taught_report.accuracy,
                    "holdout_dim": taught_report.expected_dim,
                }
            )
    oracle = oracle_report(logits, labels, dims)
    return {
        "risk": RISK,
        "delta": DELTA,
        "splits": splits,
        "refused": refused,
        "oracle": {"accuracy": oracle.accuracy, "expected_dim": oracle.expected_dim},
    }


def retrieval(answers: Answers) -> dict[str, Any]:
    """Return map10 and multiply-adds of exhaustive search, of two stages, and of whole funnels.

    The cheapest schedule whose map10 is within half a point of exhaustive search is chosen by a
    fifth of the queries; all numbers are those of the rest.
    """
    taught, judged = holdouts(len(answers.test.labels))[0]
    mrl = answers.features("mrl-0", answers.width)
    shown, asked = answers.features(f"{answers.full}-0", answers.width)
    pca = principal_components(shown, answers.width)
    found = {}
    for name, (gallery, queries) in {
        "mrl": mrl,
        "pca": (pca.embed(shown), pca.embed(asked)),
    }.items():
        rows = []
        for kind, schedule in _schedules(answers.plan.dims, len(gallery)):
            ids = ExactIndex.build(gallery, schedule).search(queries).ids
            hits = answers.training.labels[ids] == answers.test.labels[:, None]
            rows.append(
                {
                    "kind": kind,
                    **schedule.to_json(),
                    "madds": schedule.madds(len(gallery)),
                    "map10": mean_average_precision_at_k(hits[judged]),
                    "holdout_map10": mean_average_precision_at_k(hits[taught]),
                }
            )
        found[name] = {"rows": rows, "chosen": _chosen(rows)}
    return found


def _schedules(dims: tuple[int, ...], rows: int) -> list[tuple[str, FunnelSchedule]]:
    longest = min(_SHORTLIST, max(_K, rows // _LEAST_SHARE))
    found = [("exhaustive", FunnelSchedule((dim,), (), _K)) for dim in dims]
    for at, dim in enumerate(dims[:-1]):
        found.append(("two stages", FunnelSchedule((dim, dims[-1]), (longest,), _K)))
        if at < len(dims) - 2:
            lengths = tuple(max(_K, longest >> stage) for stage in range(len(dims) - at - 1))
            found.append(("funnel", FunnelSchedule(dims[at:], lengths, _K)))
    return found


def _chosen(rows: list[dict[str, Any]]) -> int:
    """The position of the cheapest that the holdout finds as good as exhaustive search."""
    whole = max((r for r in rows if r["kind"] == "exhaustive"), key=lambda r: r["dims"][-1])
    good = [r for r in rows if r["holdout_map10"] >= whole["holdout_map10"] - WITHIN]
    return rows.index(min(good, key=lambda row: row["madds"]))
