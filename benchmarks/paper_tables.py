"""The results of `paper.py` as Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np


def markdown(results: dict[str, Any]) -> str:
    """Return the tables: accuracies in percent, sd over seeds or splits where there are several."""
    dims = results["dims"]
    parts = ["Top-1 accuracy of the head, %.", _by_dim(dims, results["top1"].items())]
    for measure, title in (("nn1", "1-NN accuracy"), ("map10", "map10"), ("recall10", "recall@10")):
        for part, where in (("neighbors", "all classes"), ("unseen", "classes never seen")):
            rows = (
                (name, {str(dim): [scores[measure]] for dim, scores in found.items()})
                for name, found in results[part].items()
                if all(measure in scores for scores in found.values())
            )
            parts += [f"{title}, {where}, %.", _by_dim(dims, rows)]
    parts += ["Cascades of the Matryoshka net of seed 0, over splits.", _cascades(results)]
    return "\n\n".join(parts) + "\n"


def _by_dim(dims: list[int], rows: Iterable[tuple[str, dict[str, list[float]]]]) -> str:
    lines = [
        "| | " + " | ".join(map(str, dims)) + " |",
        "|---" * (len(dims) + 1) + "|",
    ]
    for name, values in rows:
        cells = [_shown(values[str(dim)], 100) if str(dim) in values else "" for dim in dims]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cascades(results: dict[str, Any]) -> str:
    lines = [
        "| | accuracy, % | below the full dim, points | expected dim | every dim asked |",
        "|---|---|---|---|---|",
    ]
    for name, splits in results["cascades"]["splits"].items():
        accuracy = [split["accuracy"] for split in splits]
        below = [split["full_accuracy"] - split["accuracy"] for split in splits]
        cells = [_shown(accuracy, 100), _shown(below, 100)]
        for measure in ("expected_dim", "cumulative_dim"):
            cells.append(_shown([split[measure] for split in splits], 1))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    oracle = results["cascades"]["oracle"]
    lines.append(f"| oracle | {100 * oracle['accuracy']:.2f} | | {oracle['expected_dim']:.1f} | |")
    return "\n".join(lines)


def _shown(values: list[float], factor: float) -> str:
    scaled = factor * np.asarray(values)
    spread = f" +- {scaled.std(ddof=1):.2f}" if len(values) > 1 else ""
    return f"{scaled.mean():.2f}{spread}"
