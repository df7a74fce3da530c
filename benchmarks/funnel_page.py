"""The page of the funnel: its numbers from the reports of `funnel.py`, its text from the numbers.

    python benchmarks/funnel_page.py ADAPTED.json MINILM.json WORDLLAMA.json --page docs/benchmarks

Writes `funnel.json` (the reports, by the name of their set), `funnel.svg` and `funnel.md`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Results = Mapping[str, Any]  # name of a set to its report

TARGETS = ("0.95", "0.98")
SETS = {
    "adapted": "all-MiniLM-L6-v2, adapted",
    "minilm": "all-MiniLM-L6-v2 as it is",
    "wordllama": "wordllama, trained Matryoshka",
}
_FACTS = {
    "adapted": "384 dims, turned by `MatryoshkaAdaptor((16, 32, 64, 96, 128), 'listwise')`, which "
    "learnt from 10,000 other rows. The rivals search the rows as they were: the cosines are the "
    "same.",
    "minilm": "384 dims, as the encoder made them.",
    "wordllama": "256 dims, of an embedding whose prefixes were trained.",
}
_LEAST = {"over_faiss_own": 0.98, "over_best_faiss": 0.97, "over_hnsw": 1.1}  # what was wanted
_MOST_RAM = 0.35
_ANCHORS = ("SVS", "hnswlib")  # not FAISS's


def main() -> None:
    """Write the page's files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("reports", type=Path, nargs="+", help="--out of funnel.py")
    parser.add_argument("--page", type=Path, required=True, help="folder of the page")
    arguments = parser.parse_args()
    reports = [json.loads(path.read_text()) for path in arguments.reports]
    results = {report["name"]: report for report in reports}
    (arguments.page / "funnel.json").write_text(json.dumps(results, indent=1) + "\n")
    (arguments.page / "funnel.md").write_text(page(results))
    draw(results, arguments.page / "funnel.svg")


def page(results: Results) -> str:
    """Return the page; every number in it comes from the results."""
    rows = next(iter(results.values()))["rows"]
    paragraphs = [
        "# The funnel against FAISS's own indexes",
        "Is a planned funnel over embeddings of real texts faster than what FAISS offers by "
        "itself, and in how much memory?",
        "    python benchmarks/funnel.py --embeddings E.npy --splits adapt_splits.npz --fresh "
        "--name adapted --adaptor DIR\n"
        "        --work FOLDER --svs FOLDER --hnswlib FOLDER --against MINILM.json --promise 20 "
        "--out ADAPTED.json\n"
        "    python benchmarks/funnel_page.py ADAPTED.json MINILM.json WORDLLAMA.json "
        "--page docs/benchmarks",
        "## Answer",
        "\n".join(_answer(results)),
        "![How many times as fast ours is as each rival, by set and recall](funnel.svg)",
        "## What was wanted",
        _wanted(results),
    ]
    for name, report in results.items():
        paragraphs += [f"## {SETS[name]}", _FACTS[name], _ours(report), _rivals(report)]
    paragraphs += [
        "## How it was measured",
        f"{rows:,} of 100,000 summaries of software packages are searched "
        "([which row is where](adapt_splits.npz)). The queries are rows that are in no part of "
        "the split, so that nobody had looked at them while the planner was written: every third "
        "of these plans (1,000), and the next one judges (2,000). The planner tries all that it "
        "knows. A rival's setting is the fastest whose recall on the planning queries, less 1.64 "
        "standard errors, reaches the target, as a plan's must; recalls shown are on the queries "
        "that judge.",
        "Times are processor time of the one thread that asks, one query at a time unless 100 at "
        "once are named. *Times as fast* is the median of 7 laps of 200 queries (14 for FAISS's "
        "own parts), ours timed before and after each. p50 and p99 are of the clock; p99 is the "
        "scheduler's on a shared machine. Mapped files are memory, too, as long as they are read: "
        "`mincore` counts their pages. FAISS 1.15.1, two shared cores, one thread, 2026-12-01.",
    ]
    return "\n\n".join(paragraphs) + "\n"


def _answer(results: Results) -> list[str]:
    lines = []
    for name, report in results.items():
        best = {target: _best(report, target) for target in TARGETS}
        said = " and ".join(
            f"**{ratio:.2f}** at {target} ({rival})" for target, (ratio, rival) in best.items()
        )
        hnsw = " and ".join(f"{report[f'over_hnsw_{target[2:]}']:.2f}" for target in TARGETS)
        lines.append(
            f"- **{SETS[name]}**: how many times as fast the plan is as the fastest FAISS index "
            f"that was tried: {said}; as HNSW32: {hnsw}."
        )
    owns = [point["over_faiss_own"] for report in results.values() for point in report["ours"]]
    same = min(point["same_ids"] for report in results.values() for point in report["ours"])
    lines.append(
        "- **Against the same funnel out of FAISS's own parts**, called from Python, ours is "
        f"{min(owns):.2f} to {max(owns):.2f} times as fast over these plans, with the same ids "
        f"for {100 * same:.0f}% of the queries."
    )
    memory = ", ".join(
        f"{report['ram_over_hnsw']:.2f} ({report['resident_over_hnsw']:.2f})"
        for report in results.values()
    )
    lines.append(
        f"- **Memory**: anonymous memory is {memory} of HNSW32's, in brackets with the pages of "
        "mapped files that are read."
    )
    if "over_minilm_95" in results["adapted"]:
        over = [results["adapted"][f"over_minilm_{target[2:]}"] for target in TARGETS]
        lines.append(
            f"- **Adapting the rows first** makes the plan {over[0]:.2f} and {over[1]:.2f} times "
            "as fast as the plan for the rows as they are, side by side, in "
            f"{results['adapted']['ram_over_hnsw']:.2f} against "
            f"{results['minilm']['ram_over_hnsw']:.2f} of HNSW32's anonymous memory (at "
            f"{TARGETS[0]}). FAISS's OPQ, which the planner tries for either, learns a rotation of "
            "its own."
        )
    anchors = {
        anchor: ", ".join(
            f"{report['rivals'][anchor][target]['ours_times_as_fast']:.2f}"
            for report in results.values()
            for target in TARGETS
            if target in report["rivals"].get(anchor, {})
        )
        for anchor in _ANCHORS
    }
    kinds = {
        point["setting"].split(",")[0]
        for report in results.values()
        for point in report["rivals"].get("SVS", {}).values()
    }
    lines.append(
        f"- **Not FAISS's**: ours is {anchors['SVS']} times as fast as Intel's SVS (rows as "
        f"{' and '.join(sorted(kinds))}, a graph and all of them in memory), "
        f"{anchors['hnswlib']} times as fast as hnswlib."
    )
    return lines


def _best(report: Mapping[str, Any], target: str) -> tuple[float, str]:
    """Return how many times as fast ours is as FAISS's fastest, and the name of that."""
    return min(
        (points[target]["ours_times_as_fast"], name)
        for name, points in report["rivals"].items()
        if name not in _ANCHORS and target in points
    )


def _wanted(results: Results) -> str:
    lines = [
        f"| times as fast, at least | {' | '.join(SETS[name] for name in results)} |",
        "|---" * (len(results) + 1) + "|",
    ]
    keys = ["over_faiss_own"]
    keys += [f"{kind}_{t[2:]}" for kind in ("over_best_faiss", "over_hnsw") for t in TARGETS]
    for key in keys:
        least = _LEAST[key.removesuffix("_95").removesuffix("_98")]
        is_for_adapted = key.startswith("over_hnsw")
        cells = []
        for name, report in results.items():
            missed = report[key] < least and (name == "adapted" or not is_for_adapted)
            cells.append(f"**{report[key]:.3f}**" if missed else f"{report[key]:.3f}")
        where = " (adapted)" if is_for_adapted else ""
        lines.append(f"| `{key}` >= {least}{where} | {' | '.join(cells)} |")
    for kind in ("over_faiss_pca", "over_svs"):
        for target in TARGETS:
            values = [report[f"{kind}_{target[2:]}"] for report in results.values()]
            cells = ["" if value is None else f"{value:.3f}" for value in values]
            lines.append(f"| `{kind}_{target[2:]}` | {' | '.join(cells)} |")
    plain = results["adapted"]
    for target in TARGETS:
        value = plain.get(f"over_minilm_{target[2:]}")
        if value is not None:
            shown = f"{value:.3f}" if value >= 1.1 else f"**{value:.3f}**"
            lines.append(f"| over the plan for plain rows, {target}, >= 1.1 | {shown} | | |")
    ram = [f"{report['ram_over_hnsw']:.3f}" for report in results.values()]
    lines.append(f"| `ram_over_hnsw` <= {_MOST_RAM} | {' | '.join(ram)} |")
    both = [f"{report['resident_over_hnsw']:.3f}" for report in results.values()]
    lines.append(f"| `resident_over_hnsw` | {' | '.join(both)} |")
    promises = [report.get("promise") for report in results.values()]
    if any(promises):
        for key, what in (("kept", ""), ("kept_within_0.005", " within .005")):
            cells = ["" if p is None else f"{p[key]} of {p['splits']}" for p in promises]
            lines.append(f"| the promise of {TARGETS[0]} kept{what}, >= 18 | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n\nIn bold: what was missed."


def _ours(report: Mapping[str, Any]) -> str:
    points = report["ours"]

    def cells(text: str) -> str:
        return " | ".join(text.format(**point) for point in points)

    heads = " | ".join(f"recall@10 of {point['target']}" for point in points)
    plans = " | ".join(point["funnel"].removeprefix("ours: ") for point in points)
    recalls = " | ".join(
        _short(point["recall"])
        if point["recall"] >= point["target"]
        else f"**{_short(point['recall'])}**"
        for point in points
    )
    return "\n".join(
        [
            f"| | {heads} |",
            "|---" * (len(points) + 1) + "|",
            f"| chosen by the planner | {plans} |",
            f"| recall on fresh queries | {recalls} |",
            f"| us a query, one at a time (100 at once) | {cells('{us:.0f} ({many_us:.0f})')} |",
            f"| us, as planned | {cells('{planned_us:.0f}')} |",
            f"| p50 (p99) warm, us | {cells('{warm_p50_us:.0f} ({warm_p99_us:,.0f})')} |",
            f"| p50 (p99) cold, us | {cells('{cold_p50_us:.0f} ({cold_p99_us:,.0f})')} |",
            f"| MiB of anonymous memory | {cells('{anon_mib:.1f}')} |",
            f"| MiB of mapped files in memory | {cells('{resident_mib:.0f}')} |",
        ]
    )


def _rivals(report: Mapping[str, Any]) -> str:
    lines = [
        "How many times as fast ours is; in brackets the rival's setting and its recall:",
        "",
        "| rival | 0.95 | 0.98 |",
        "|---|---|---|",
    ]
    owns = [f"{point['over_faiss_own']:.3f}" for point in report["ours"]]
    lines.append(f"| the same funnel out of FAISS's own parts | {' | '.join(owns)} |")
    best = {target: _best(report, target)[1] for target in TARGETS}
    for name, points in report["rivals"].items():
        cells = []
        for target in TARGETS:
            if target not in points:
                cells.append("not reached")
                continue
            point = points[target]
            ratio = f"{point['ours_times_as_fast']:.2f}"
            ratio = f"**{ratio}**" if best[target] == name else ratio
            cells.append(f"{ratio} ({point['setting']}, {_short(point['recall'])})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _short(recall: float) -> str:
    return re.sub("^0", "", f"{recall:.3f}")


def draw(results: Results, path: Path) -> None:
    """Draw how many times as fast ours is as each rival."""
    from matplotlib.figure import Figure

    names = sorted(
        {name for report in results.values() for name in report["rivals"]},
        key=lambda name: (name in _ANCHORS, name.startswith(("PCA", "OPQ")), name),
        reverse=True,
    )
    figure = Figure(figsize=(8.5, 1.6 + 0.27 * len(names)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, target in zip(axes, TARGETS, strict=True):
        for (name, report), marker in zip(results.items(), "os^", strict=False):
            points = [
                (points[target]["ours_times_as_fast"], names.index(rival))
                for rival, points in report["rivals"].items()
                if target in points
            ]
            axis.plot(*zip(*points, strict=True), marker, label=SETS[name], alpha=0.8)
        axis.axvline(1, color="0.4", linewidth=1)
        axis.set_xscale("log", base=2)
        ticks = (0.5, 1, 2, 4)
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_title(f"recall@10 of {target}")
        axis.set_xlabel("times as fast as the rival")
        axis.grid(axis="y", color="0.9")
    axes[0].set_yticks(range(len(names)), names)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
