"""The report of the demo: its numbers, from the answers of the server alone, its text and plots."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .digits import DIMS, EXITS, LAST
from .output import print_lines

if TYPE_CHECKING:
    from keras_mrl_serving import FunnelSchedule

K = 10
HALF_POINT = 0.005
LAPS = 5
# The first stage looks at every row with 16 dims and passes 4.5% of them on to all 64.
FUNNEL_DIMS, SHORTLIST_SHARE = (16, 64), 0.045

Arrays = Mapping[str, npt.NDArray[Any]]


def funnel_over(gallery_size: int) -> FunnelSchedule:
    """Return the funnel that the demo asks a gallery of so many rows."""
    from keras_mrl_serving import FunnelSchedule

    return FunnelSchedule(FUNNEL_DIMS, (max(K, int(SHORTLIST_SHARE * gallery_size)),), K)


def make_report(answers: Arrays) -> dict[str, Any]:
    """Return fractions for accuracies and mAP, multiply-adds per image or query for costs."""
    dims = [int(dim) for dim in answers["dims"]]
    labels = answers["test_labels"]
    accuracy = (answers["fixed_class_ids"] == labels[:, None, None]).mean(axis=0)
    fixed = {
        _name(exit_, dim): {
            "accuracy": float(accuracy[i, j]),
            "cost": float(answers["fixed_costs"][i, j]),
            "milliseconds": float(answers["fixed_milliseconds"][i, j]),
        }
        for i, exit_ in enumerate(answers["exits"].tolist())
        for j, dim in enumerate(dims)
    }
    # The fixed dim is chosen as a policy is: on the holdout, the narrowest among the best.
    holdout = answers["holdout_logits"].argmax(axis=-1) == answers["holdout_labels"][:, None]
    best_fixed = int(np.argmax(holdout.mean(axis=0)))
    stopped = answers["adaptive_dims"]
    stages = list(zip(answers["stage_exits"].tolist(), answers["stage_dims"].tolist(), strict=True))
    stage_of = np.array([stages.index(own) for own in _stages_of(answers)])
    adaptive_accuracy = float((answers["adaptive_class_ids"] == labels).mean())
    adaptive_cost = float(answers["stage_costs"][stage_of].mean())
    # Chosen on the test images themselves, which flatters the fixed choice.
    enough = min(adaptive_accuracy, float(accuracy[-1, -1]) - HALF_POINT)
    rivals = {name: own for name, own in fixed.items() if own["accuracy"] >= enough - 1e-12}
    rival = min(rivals, key=lambda name: rivals[name]["cost"])
    adaptive_ms = float(answers["adaptive_milliseconds"])
    return {
        "accuracy_by_dim": _by_dim(dims, accuracy[-1]),
        "full_accuracy": float(accuracy[-1, -1]),
        "best_fixed_dim": dims[best_fixed],
        "best_fixed_accuracy": float(accuracy[-1, best_fixed]),
        "fixed_dims": fixed,
        "cheapest_fixed": rival,
        "adaptive_accuracy": adaptive_accuracy,
        "adaptive_cost": adaptive_cost,
        "adaptive_milliseconds": adaptive_ms,
        "cost_share": adaptive_cost / fixed[rival]["cost"],
        "time_share": adaptive_ms / fixed[rival]["milliseconds"],
        "exit_fractions": {
            _name(*stage): float((stage_of == i).mean()) for i, stage in enumerate(stages)
        },
        "expected_dim": float(stopped.mean()),
        "cumulative_dim": float(np.cumsum(answers["stage_dims"])[stage_of].mean()),
        "stopped_by_dim": {str(dim): int((stopped == dim).sum()) for dim in dims},
        **_report_retrieval(answers, dims),
        "test_size": len(labels),
    }


def _name(exit_: str, dim: int) -> str:
    """Return the name of a stage, as in the names of signatures: "glance_8"; "8" at the last."""
    return str(dim) if exit_ == LAST else f"{exit_}_{dim}"


def _stages_of(answers: Arrays) -> list[tuple[str, int]]:
    """Return the exit and the dim that decided each test image."""
    exits, dims = answers["adaptive_exits"].tolist(), answers["adaptive_dims"].tolist()
    return list(zip(exits, dims, strict=True))


def _report_retrieval(answers: Arrays, dims: list[int]) -> dict[str, Any]:
    from keras_mrl.evaluation import mean_average_precision_at_k, precision_at_k

    labels = answers["test_labels"]
    hits = answers["gallery_labels"][answers["neighbors_by_dim"]] == labels[:, None, None]
    funnel_hits = answers["gallery_labels"][answers["funnel_neighbors"]] == labels[:, None]
    rows = len(answers["gallery_labels"])
    funnel = funnel_over(rows)
    map10 = [mean_average_precision_at_k(hits[:, i]) for i in range(len(dims))]
    return {
        "p10_by_dim": _by_dim(dims, [precision_at_k(hits[:, i]) for i in range(len(dims))]),
        "map10_by_dim": _by_dim(dims, map10),
        "p10_funnel": precision_at_k(funnel_hits),
        "map10_exact": map10[-1],
        "map10_funnel": mean_average_precision_at_k(funnel_hits),
        "madds_by_dim": {str(dim): rows * dim for dim in dims},
        "exact_madds": rows * dims[-1],
        "funnel_madds": funnel.madds(rows),
        "funnel": funnel.to_json(),
        "gallery_size": rows,
    }


def _by_dim(dims: list[int], values: Any) -> dict[str, float]:
    return {str(dim): float(value) for dim, value in zip(dims, values, strict=True)}


def print_report(report: Mapping[str, Any]) -> None:
    """Print what each fixed choice costs and gets right, and the same of the cascade and funnel."""
    print_lines(
        f"  every image at one exit and dim (multiply-adds of the whole model; ms for all "
        f"{report['test_size']} images in one request, the fastest of {LAPS}):\n"
        f"  {'exit and dim':>12}  {'accuracy':>8}  {'madds':>9}  {'ms':>6}"
    )
    for name, own in report["fixed_dims"].items():
        print_lines(
            f"  {_spelt(name):>12}  {100 * own['accuracy']:7.2f}%  {own['cost']:>9,.0f}"
            f"  {own['milliseconds']:>6.1f}"
        )
    rival = report["fixed_dims"][report["cheapest_fixed"]]
    spread = ", ".join(
        f"{100 * share:.0f}% at {_spelt(name)}" for name, share in report["exit_fractions"].items()
    )
    print_lines(
        f"  adaptive classification: {100 * report['adaptive_accuracy']:.2f}% at "
        f"{report['adaptive_cost']:,.0f} multiply-adds per image and "
        f"{report['adaptive_milliseconds']:.1f} ms; the whole model: "
        f"{100 * report['full_accuracy']:.2f}%\n"
        f"  rows stop: {spread}\n"
        f"  the cheapest fixed choice as good, {_spelt(report['cheapest_fixed'])}, has "
        f"{100 * rival['accuracy']:.2f}% at {rival['cost']:,.0f} and {rival['milliseconds']:.1f} "
        f"ms: adaptive costs {report['cost_share']:.2f} of its multiply-adds and "
        f"{report['time_share']:.2f} of its time\n"
        f"  search among {report['gallery_size']} clean images (multiply-adds per query):\n"
        f"  {'dim':>12}  {'p10':>8}  {'map10':>9}  {'madds':>6}"
    )
    for dim, map10 in report["map10_by_dim"].items():
        print_lines(
            f"  {dim:>12}  {100 * report['p10_by_dim'][dim]:8.2f}  {100 * map10:9.2f}"
            f"  {report['madds_by_dim'][dim]:>6,}"
        )
    share = report["funnel_madds"] / report["exact_madds"]
    first = report["funnel"]["shortlists"][0] / report["gallery_size"]
    print_lines(
        f"  funnel {' -> '.join(map(str, report['funnel']['dims']))} with a shortlist of "
        f"{100 * first:.1f}%: map10 {100 * report['map10_funnel']:.2f} against "
        f"{100 * report['map10_exact']:.2f} exhaustive, p10 {100 * report['p10_funnel']:.2f}, at "
        f"{report['funnel_madds']:,} multiply-adds per query against {report['exact_madds']:,} "
        f"({share:.2f}x)"
    )


def _spelt(name: str) -> str:
    """Return "glance, 8" for "glance_8", and "last, 8" for "8"."""
    exit_, _, dim = name.rpartition("_")
    return f"{exit_ or LAST}, {dim}"


def write_report(out: Path, answers: Arrays, report: Mapping[str, Any]) -> None:
    """Write the answers, the report and both plots into a folder."""
    from keras_mrl.evaluation import plot_cascade, plot_retrieval

    np.savez_compressed(out / "predictions.npz", allow_pickle=False, **answers)
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    fixed = report["fixed_dims"]
    plot_cascade(
        {
            name: {
                dim: (fixed[_name(name, dim)]["cost"], fixed[_name(name, dim)]["accuracy"])
                for dim in DIMS
            }
            for name in (*EXITS, LAST)
        },
        (report["adaptive_cost"], report["adaptive_accuracy"]),
        {_spelt(name): share for name, share in report["exit_fractions"].items()},
        out / "accuracy.png",
        title="Digits: one fixed choice for every image, or adaptive",
    )
    plot_retrieval(
        {int(d): (report["madds_by_dim"][d], m) for d, m in report["map10_by_dim"].items()},
        (report["funnel_madds"], report["map10_funnel"]),
        out / "retrieval.png",
    )
