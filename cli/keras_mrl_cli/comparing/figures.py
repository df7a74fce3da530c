"""The paper's figures of a comparison, as SVG and PNG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from keras_mrl.evaluation import plot_by_cost, plot_by_dim

from .tables import NAMES

FIGURES = {
    "accuracy": "Accuracy of the head over dims, for every method",
    "neighbors": "1-NN accuracy over dims, for every method",
    "adaptive": "Adaptive classification: accuracy over expected dim, and the oracle",
    "retrieval": "map10 over multiply-adds per query",
}


def draw(results: Mapping[str, Any], folder: Path) -> None:
    """Write every figure to `<name>.svg` and `<name>.png`."""
    top1 = _named(results["top1"])
    nearest = _named(
        {
            name: {dim: scores["nn1"] for dim, scores in by_dim.items()}
            for name, by_dim in results["neighbors"].items()
        }
    )
    singles = {name: top1[name] for name in (NAMES["mrl"], NAMES["ff"])}
    for suffix in ("svg", "png"):
        plot_by_dim(top1, folder / f"accuracy.{suffix}", title="Accuracy by dim")
        plot_by_dim(
            nearest,
            folder / f"neighbors.{suffix}",
            title="Nearest neighbour by dim",
            measure="1-NN accuracy",
        )
        plot_by_dim(
            singles,
            folder / f"adaptive.{suffix}",
            _stars(results["cascades"]),
            title="Adaptive classification",
        )
        plot_by_cost(*_costs(results["retrieval"], folder / f"retrieval.{suffix}"))


def _named(by_method: Mapping[str, Any]) -> dict[str, dict[int, Any]]:
    """By the names of the methods, all of them and in one order: each has its colour."""
    return {
        shown: {int(dim): values for dim, values in by_method.get(name, {}).items()}
        for name, shown in NAMES.items()
    }


def _stars(cascades: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    return {
        name if name == "oracle" else f"cascade, {name}": (
            float(np.mean([split["expected_dim"] for split in splits])),
            float(np.mean([split["accuracy"] for split in splits])),
        )
        for name, splits in cascades["splits"].items()
    }


def _costs(retrieval: Mapping[str, Any], path: Path) -> tuple[Any, Path, Any]:
    lines = {
        f"{shown}, exhaustive": {
            row["dims"][-1]: (row["madds"], row["map10"])
            for row in retrieval.get(name, {"rows": ()})["rows"]
            if row["kind"] == "exhaustive"
        }
        for name, shown in NAMES.items()
    }
    stars = {}
    for name, found in retrieval.items():
        chosen = found["rows"][found["chosen"]]
        stars[f"{NAMES[name]}, {' -> '.join(map(str, chosen['dims']))}"] = (
            chosen["madds"],
            chosen["map10"],
        )
    return lines, path, stars
