"""The report of the demo: its numbers, from the answers of the server alone, its text and plots."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .digits import DIMS, EXITS, LAST
from .output import print_line, print_lines, print_paragraph

if TYPE_CHECKING:
    from keras_mrl_serving import FunnelSchedule

K = 10
HALF_POINT = 0.005
LAPS = 5
# Small requests show what a cascade costs that saves little: they are quick, and so asked often.
REQUEST_SIZES, REQUEST_LAPS = (8, 32, 128, 512), 20
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
    requests = {
        str(size): {"adaptive": float(adaptive), "full": float(full)}
        for size, (adaptive, full) in zip(
            answers["request_sizes"], answers["request_milliseconds"], strict=True
        )
    }
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
        "request_milliseconds": requests,
        "faster_from": _faster_from(requests),
        "exit_fractions": {
            _name(*stage): float((stage_of == i).mean()) for i, stage in enumerate(stages)
        },
        "expected_dim": float(stopped.mean()),
        "cumulative_dim": float(np.cumsum(answers["stage_dims"])[stage_of].mean()),
        "stopped_by_dim": {str(dim): int((stopped == dim).sum()) for dim in dims},
        **_report_retrieval(answers, dims),
        "test_size": len(labels),
    }


def _faster_from(requests: Mapping[str, Mapping[str, float]]) -> int | None:
    """Return the size of requests from which on the cascade took no longer, if there is one."""
    sizes = [None, *map(int, requests)]
    slower = [i for i, own in enumerate(requests.values(), 1) if own["adaptive"] > own["full"]]
    first = max(slower, default=0) + 1
    return sizes[first] if first < len(sizes) else None


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
    print_paragraph(
        "Every test image at the same exit and dim. Cost: multiply-adds for one image. Time: of "
        f"one request with all {report['test_size']} images, the fastest of {LAPS}."
    )
    print_lines(f"\n  {'exit':>10}  {'dim':>3}  {'accuracy':>8}  {'cost':>9}  {'time':>9}")
    for name, own in report["fixed_dims"].items():
        _print_choice(*_parts(name), own["accuracy"], own["cost"], own["milliseconds"])
    keys = ("adaptive_accuracy", "adaptive_cost", "adaptive_milliseconds")
    _print_choice("adaptive", "", *(report[key] for key in keys))
    spread = ", ".join(
        f"{100 * share:.0f}% at {_parts(name)[0]}"
        for name, share in report["exit_fractions"].items()
    )
    rival = report["fixed_dims"][report["cheapest_fixed"]]
    exit_, dim = _parts(report["cheapest_fixed"])
    is_close = report["adaptive_accuracy"] >= report["full_accuracy"] - HALF_POINT
    as_good = "within half a point of the whole model" if is_close else "as accurate as that"
    print_line()
    print_paragraph(
        f"Adaptive: each image is answered at the first exit that is sure of it, {spread}. The "
        f"cheapest fixed choice {as_good} is {exit_} with {dim} dims: "
        f"{100 * rival['accuracy']:.2f}%. Adaptive takes "
        f"{100 * report['cost_share']:.0f}% of its multiply-adds, and "
        f"{100 * report['time_share']:.0f}% of its time in this large request."
    )
    print_lines(f"\n  {'images':>10}  {'adaptive':>9}  {'whole model':>11}")
    for size, own in report["request_milliseconds"].items():
        print_line(f"  {size:>10}  {own['adaptive']:>6.2f} ms  {own['full']:>8.2f} ms")
    print_line()
    print_paragraph(
        "Adaptive runs the model in pieces, and each piece costs some time in every request, for "
        f"few images as for many. {_when_faster(report)} The larger a model, the fewer images are "
        "needed."
    )
    _print_search(report)


def _when_faster(report: Mapping[str, Any]) -> str:
    first, (smallest, *_) = report["faster_from"], report["request_milliseconds"]
    if first is None:
        return "With a model as small as this one, it was slower in requests of any size here."
    if first == int(smallest):
        return "Here it was no slower in requests of any size."
    return (
        f"With a model as small as this one, it pays in requests of {first} images and more; in "
        "smaller ones the whole model was faster."
    )


def _print_choice(exit_: str, dim: str, accuracy: float, cost: float, milliseconds: float) -> None:
    print_line(
        f"  {exit_:>10}  {dim:>3}  {100 * accuracy:7.2f}%  {cost:>9,.0f}  {milliseconds:>6.1f} ms"
    )


def _print_search(report: Mapping[str, Any]) -> None:
    """Print what a search finds with each dim, and with a funnel."""
    rows = report["gallery_size"]
    print_line()
    print_paragraph(
        f"Search: the {K} nearest of the {rows} training images, for each test image. Precision: "
        "the share of them with the same digit. mAP: the same, but the first ranks count more. "
        "Cost: multiply-adds for one query."
    )
    print_lines(f"\n  {'dim':>10}  {'precision':>9}  {'mAP':>7}  {'cost':>9}")

    def print_row(name: str, precision: float, mean_ap: float, madds: int) -> None:
        print_line(f"  {name:>10}  {100 * precision:8.2f}%  {100 * mean_ap:6.2f}%  {madds:>9,}")

    for dim, mean_ap in report["map10_by_dim"].items():
        print_row(dim, report["p10_by_dim"][dim], mean_ap, report["madds_by_dim"][dim])
    print_row("funnel", report["p10_funnel"], report["map10_funnel"], report["funnel_madds"])
    narrow, wide = report["funnel"]["dims"]
    share = report["funnel_madds"] / report["exact_madds"]
    print_line()
    print_paragraph(
        f"Funnel: {narrow} dims of all {rows} images are compared, then all {wide} dims of the "
        f"nearest {report['funnel']['shortlists'][0]}. Its mAP is "
        f"{100 * report['map10_funnel']:.2f}%, that of a search with all dims "
        f"{100 * report['map10_exact']:.2f}%. It takes {100 * share:.0f}% of the multiply-adds."
    )


def _parts(name: str) -> tuple[str, str]:
    """Return ("glance", "8") for "glance_8", and ("last", "8") for "8"."""
    exit_, _, dim = name.rpartition("_")
    return exit_ or LAST, dim


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
        {", ".join(_parts(name)): share for name, share in report["exit_fractions"].items()},
        out / "accuracy.png",
        title="Digits: one fixed choice for every image, or adaptive",
    )
    plot_retrieval(
        {int(d): (report["madds_by_dim"][d], m) for d, m in report["map10_by_dim"].items()},
        (report["funnel_madds"], report["map10_funnel"]),
        out / "retrieval.png",
    )
