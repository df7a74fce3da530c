"""Retrieval by few dims first: chosen by a part of the queries, judged by the others."""

from __future__ import annotations

from typing import Any

from keras_mrl.baselines import principal_components
from keras_mrl.evaluation import mean_average_precision_at_k
from keras_mrl_serving import ExactIndex, FunnelSchedule

from .answers import Answers
from .splits import holdouts

WITHIN = 0.005  # of the map10 of exhaustive search: half a point

_K = 10
_SHORTLIST = 200  # the paper's
_LEAST_SHARE = 50  # a shortlist is this part of the gallery at most


def retrieval(answers: Answers) -> dict[str, Any]:
    """Return map10 and multiply-adds of exhaustive search, of two stages, and of whole funnels.

    The cheapest schedule whose map10 is within half a point of exhaustive search is chosen by a
    fifth of the queries; all numbers are those of the rest.
    """
    taught, judged = holdouts(answers.test)[0]
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
