"""From the server's answers to the numbers of the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_mrl.evaluation import mean_average_precision_at_k, precision_at_k

from .ask import funnel_schedule

Arrays = Mapping[str, npt.NDArray[Any]]


def summarise(answers: Arrays) -> dict[str, Any]:
    """Return the report: fractions for accuracies and mAP, multiply-adds per query for costs."""
    dims = [int(dim) for dim in answers["dims"]]
    truth = answers["test_labels"]
    accuracy = (answers["class_ids_by_dim"] == truth[:, None]).mean(axis=0)
    # The fixed dim is chosen as a policy is: on the holdout, the narrowest among the best.
    holdout = answers["holdout_logits"].argmax(axis=-1) == answers["holdout_labels"][:, None]
    best_fixed = int(np.argmax(holdout.mean(axis=0)))
    stopped = answers["adaptive_dims"]
    asked = answers["stage_dims"].tolist()
    cumulative = dict(zip(asked, np.cumsum(asked).tolist(), strict=True))
    hits = answers["gallery_labels"][answers["neighbors_by_dim"]] == truth[:, None, None]
    funnel_hits = answers["gallery_labels"][answers["funnel_neighbors"]] == truth[:, None]
    rows = len(answers["gallery_labels"])
    schedule = funnel_schedule(rows)
    map10 = [mean_average_precision_at_k(hits[:, i]) for i in range(len(dims))]
    return {
        "accuracy_by_dim": _by_dim(dims, accuracy),
        "full_accuracy": float(accuracy[-1]),
        "best_fixed_dim": dims[best_fixed],
        "best_fixed_accuracy": float(accuracy[best_fixed]),
        "adaptive_accuracy": float((answers["adaptive_class_ids"] == truth).mean()),
        "expected_dim": float(stopped.mean()),
        "cumulative_dim": float(np.mean([cumulative[int(dim)] for dim in stopped])),
        "stopped_by_dim": {str(dim): int((stopped == dim).sum()) for dim in dims},
        "p10_by_dim": _by_dim(dims, [precision_at_k(hits[:, i]) for i in range(len(dims))]),
        "map10_by_dim": _by_dim(dims, map10),
        "p10_funnel": precision_at_k(funnel_hits),
        "map10_exact": map10[-1],
        "map10_funnel": mean_average_precision_at_k(funnel_hits),
        "madds_by_dim": {str(dim): rows * dim for dim in dims},
        "exact_madds": rows * dims[-1],
        "funnel_madds": schedule.madds(rows),
        "funnel": schedule.to_json(),
        "gallery_size": rows,
        "test_size": len(truth),
    }


def show(report: Mapping[str, Any]) -> None:
    """Print the report for a person."""
    print(f"  {'dim':>6}  {'accuracy':>8}  {'stopped':>7}  {'p10':>6}  {'map10':>6}  {'madds':>8}")
    for dim, accuracy in report["accuracy_by_dim"].items():
        print(
            f"  {dim:>6}  {100 * accuracy:7.2f}%  {report['stopped_by_dim'][dim]:>7}"
            f"  {100 * report['p10_by_dim'][dim]:6.2f}  {100 * report['map10_by_dim'][dim]:6.2f}"
            f"  {report['madds_by_dim'][dim]:>8,}"
        )
    print(
        f"  adaptive classification: {100 * report['adaptive_accuracy']:.2f}% at "
        f"{report['expected_dim']:.1f} dims on average ({report['cumulative_dim']:.1f} counting "
        f"every head asked), against {100 * report['full_accuracy']:.2f}% at the full dim and "
        f"{100 * report['best_fixed_accuracy']:.2f}% at the best fixed dim, "
        f"{report['best_fixed_dim']}"
    )
    share = report["funnel_madds"] / report["exact_madds"]
    first = report["funnel"]["shortlists"][0] / report["gallery_size"]
    print(
        f"  funnel {' -> '.join(map(str, report['funnel']['dims']))} with a shortlist of "
        f"{100 * first:.1f}%: map10 {100 * report['map10_funnel']:.2f} against "
        f"{100 * report['map10_exact']:.2f} exhaustive, p10 {100 * report['p10_funnel']:.2f}, at "
        f"{report['funnel_madds']:,} multiply-adds per query against {report['exact_madds']:,} "
        f"({share:.2f}x)"
    )


def _by_dim(dims: list[int], values: Any) -> dict[str, float]:
    return {str(dim): float(value) for dim, value in zip(dims, values, strict=True)}
