"""The page of CIFAR-100 from scratch, written anew from its JSON.

    keras-mrl compare --data cifar100 --dims 8,16,32,64,128,256 --epochs 8 --seeds 3 --out short
    keras-mrl compare --data cifar100 --dims 8,16,32,64,128,256 --epochs 24 --out long
    python benchmarks/from_scratch.py --page docs/benchmarks

The first two commands train, for hours on two cores; `from_scratch.json` holds the accuracies of
their `results.json`, by epochs, method, dim and seed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from keras_mrl.comparison.verdict import signed

Results = Mapping[str, Any]

NAMES = {
    "mrl": "MRL",
    "mrl_e": "MRL-E (tied)",
    "ff": "FF, a net per dim",
    "svd": "SVD of FF",
    "rand_lp": "Rand. LP of FF",
    "pca": "PCA of FF",
    "first_coordinates": "Rand. FS of FF",
    "slimmable": "slimmable",
}


def main() -> None:
    """Write the page and its figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--page", type=Path, required=True, help="folder of the page")
    folder = parser.parse_args().page
    results = json.loads((folder / "from_scratch.json").read_text())
    (folder / "from_scratch.md").write_text(page(results))
    draw(results, folder / "from_scratch.svg")


def page(results: Results) -> str:
    """Return the page; every number in it comes from the results."""
    rows, judges = results["about"]["images"]
    dims = results["dims"]
    gaps = {epochs: gaps_of(results, epochs) for epochs in results["runs"]}
    (short, few), (long, many) = gaps.items()
    seeds = results["runs"][short]["seeds"]
    rise = [
        _percent(results, long, "top1", "mrl", dim) - _percent(results, short, "top1", "mrl", dim)
        for dim in dims
    ]
    own = results["on_training_images"]
    paragraphs = [
        "# CIFAR-100 from scratch: what training that has not converged looks like",
        "\n".join(
            f"    keras-mrl compare --data cifar100 --dims {','.join(map(str, dims))} "
            f"--epochs {epochs} --seeds {run['seeds']} --out cifar_{epochs}"
            for epochs, run in results["runs"].items()
        ),
        f"{rows:,} training and {judges:,} test images; {results['about']['left_out']} test images "
        "have the very pixels of a training image and are left out. A small net of eight "
        f"convolutions, trained from random weights. {results['about']['machine']}. After {short} "
        f"epochs MRL, and FF at 8, 32 and 256 dims, are the mean of {seeds} seeds; all "
        f"else is one seed. Of the run of {long} epochs MRL and FF at "
        f"{_join(many)} dims were trained.",
        "## Answer",
        f"- **These nets are not finished.** Three times as many epochs make MRL {min(rise):.1f} "
        f"to {max(rise):.1f} points better at every dim. A difference of one or two points between "
        "methods says nothing yet about what they come to.\n"
        f"- **After {short} epochs** MRL minus FF in top-1 is {_signed(few)} points at "
        f"{_join(few)} dims.\n"
        f"- **After {long} epochs** it is {_signed(many)} at {_join(many)} dims: smaller at the "
        "wide dims, larger at 8.\n"
        f"- **Several losses learn more slowly; they do not generalise worse.** On "
        f"{own['images']:,} images, after {own['epochs']} epochs, MRL is right on "
        f"{100 * own['mrl']:.1f}% of its own *training* images at {own['dim']} dims, the separate "
        f"net on {100 * own['ff']:.1f}%.\n"
        f"- **1-NN:** PCA of FF is above MRL from {_overtakes(results, short)} dims up after "
        f"{short} epochs, and from {_overtakes(results, long)} after {long}.",
        "![Top-1 of MRL minus FF by dim, a line per number of epochs](from_scratch.svg)",
        "## Where the paper says otherwise",
        "In the paper MRL is as accurate as the separate nets, or more, at every dim. Here it is "
        f"{-np.mean(list(few.values())):.1f} points below them on average after {short} epochs, "
        "since training stops long before either has converged. With pretrained features, where "
        "training does converge, the gap closes: [heads on frozen features](heads.md).",
        "## Tables",
    ]
    text = "\n\n".join(paragraphs) + "\n"
    for measure, title in (("top1", "Top-1 accuracy of the head"), ("nn1", "1-NN accuracy")):
        for epochs, run in results["runs"].items():
            text += f"\n{title}, %, {epochs} epochs\n\n"
            text += f"| | {' | '.join(map(str, dims))} |\n" + "|---" * (len(dims) + 1) + "|\n"
            for method in run[measure]:
                cells = [
                    f"{_percent(results, epochs, measure, method, dim):.2f}"
                    if str(dim) in run[measure][method]
                    else ""
                    for dim in dims
                ]
                text += f"| {NAMES[method]} | {' | '.join(cells)} |\n"
    return text


def gaps_of(results: Results, epochs: str) -> dict[int, float]:
    """Return how far MRL is from the separate nets in top-1, in points, by dim."""
    return {
        dim: _percent(results, epochs, "top1", "mrl", dim)
        - _percent(results, epochs, "top1", "ff", dim)
        for dim in results["dims"]
        if str(dim) in results["runs"][epochs]["top1"]["ff"]
    }


def _percent(results: Results, epochs: str, measure: str, method: str, dim: int) -> float:
    return float(100 * np.mean(results["runs"][epochs][measure][method][str(dim)]))


def _overtakes(results: Results, epochs: str) -> int:
    """The first dim from which PCA of FF is above MRL at every wider one."""
    ahead = [
        _percent(results, epochs, "nn1", "pca", dim) > _percent(results, epochs, "nn1", "mrl", dim)
        for dim in results["dims"]
    ]
    first = next(place for place in range(len(ahead)) if all(ahead[place:]))
    return int(results["dims"][first])


def _signed(gaps: Mapping[int, float]) -> str:
    return ", ".join(map(signed, gaps.values()))


def _join(words: Mapping[int, float]) -> str:
    *some, last = map(str, words)
    return f"{', '.join(some)} and {last}"


def draw(results: Results, path: Path) -> None:
    """Draw how far MRL is from FF by dim, a line per number of epochs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for epochs in results["runs"]:
        gaps = gaps_of(results, epochs)
        axes.plot(list(gaps), list(gaps.values()), marker="o", label=f"{epochs} epochs")
    axes.axhspan(-0.5, 0.5, color="0.9")
    axes.set_xscale("log")
    axes.set_xticks(results["dims"], [str(dim) for dim in results["dims"]])
    axes.minorticks_off()
    axes.set_xlabel("dims")
    axes.set_ylabel("MRL minus FF, points of top-1")
    axes.legend()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
