"""The page of classes never seen, cascades and funnels on CLINC150, from a comparison.

    keras-mrl compare --data features.npz --epochs 30 --unseen --out FOLDER
    python benchmarks/adaptive.py --compared FOLDER --page docs/benchmarks

`features.npz` are the embeddings that `benchmarks/heads.py texts` writes. The page and its figure
are written from `adaptive.json`, a part of the comparison's `results.json`; without `--compared`
from the one that is there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from keras_mrl.comparison.report import tables
from keras_mrl.comparison.verdict import sentences, signed

Results = Mapping[str, Any]

_PARTS = ("about", "plan", "verdict", "madds", "top1", "top5", "ece", "probe", "neighbors")
_TABLES = ("1-NN accuracy", "map10", "Adaptive classification", "Retrieval")
_LOSS = 0.005  # "as accurate" below: no more than half a point is lost


def main() -> None:
    """Write the page, its JSON and its figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compared", type=Path, help="folder of the comparison")
    parser.add_argument("--page", type=Path, required=True, help="folder of the page")
    arguments = parser.parse_args()
    file = arguments.page / "adaptive.json"
    if arguments.compared is not None:
        whole = json.loads((arguments.compared / "results.json").read_text())
        kept = {name: whole[name] for name in (*_PARTS, "cascades", "retrieval", "unseen")}
        file.write_text(json.dumps(kept, indent=1) + "\n")
    results = json.loads(file.read_text())
    (arguments.page / "adaptive.md").write_text(page(results))
    draw(results, arguments.page / "adaptive.svg")


def page(results: Results) -> str:
    """Return the page; every number in it comes from the results."""
    plan, about = results["plan"], results["about"]
    rows, judges = about["images"]
    dims, width = plan["dims"], plan["dims"][-1]
    fixed = {dim: results["top1"]["mrl"][str(dim)][0] for dim in dims}
    cascades = {name: _means(splits) for name, splits in results["cascades"]["splits"].items()}
    oracle = cascades.pop("oracle")
    good = [c for c in cascades.values() if c["accuracy"] >= c["full_accuracy"] - _LOSS]
    best = min(good or cascades.values(), key=lambda c: c["expected_dim"])
    narrow = min(dim for dim in dims if fixed[dim] >= fixed[width] - _LOSS)
    funnel, whole = _chosen(results, "mrl")
    pca, _ = _chosen(results, "pca")
    paragraphs = [
        "# Classes never seen, cascades and funnels",
        f"    keras-mrl compare --data features.npz --epochs {plan['epochs']} --unseen --out FOLDER"
        "\n    python benchmarks/adaptive.py --compared FOLDER --page docs/benchmarks",
        f"CLINC150: {rows:,} training and {judges:,} test texts of {about['classes']} intents, "
        "embedded by all-MiniLM-L6-v2 as it is ([heads on frozen features](heads.md) says how); "
        f"{plan['epochs']} epochs, {plan['seeds']} seed. For the classes never seen the nets were "
        f"trained anew without {len(about['unseen'])} of the intents, and the neighbours of their "
        f"test texts are searched among their training texts alone. {about['machine']}.",
        "## Answer",
        f"- **The verdict of the command:** {' '.join(sentences(results))}\n"
        f"- **Classes never seen, 1-NN:** MRL minus PCA of FF is "
        f"{_gaps(results, 'unseen', 'pca')} points at {_join(dims)} dims, minus separate nets "
        f"{_gaps(results, 'unseen', 'ff')}; of classes that training had, "
        f"{_gaps(results, 'neighbors', 'pca')} and {_gaps(results, 'neighbors', 'ff')}.\n"
        f"- **Adaptive classification:** the cascade that asks least and loses at most half a "
        f"point stops at {best['expected_dim']:.1f} of {width} dims on average with "
        f"{100 * best['accuracy']:.2f}%; {width} dims for all have "
        f"{100 * best['full_accuracy']:.2f}%. The narrowest dim for all that loses as little is "
        f"{narrow}, with {100 * fixed[narrow]:.2f}%. A router that knew the answer would stop at "
        f"{oracle['expected_dim']:.1f} dims.\n"
        f"- **Adaptive retrieval:** {_schedule(funnel)} has map10 {100 * funnel['map10']:.2f}%, "
        f"exhaustive search at {width} dims {100 * whole['map10']:.2f}%, for "
        f"{whole['madds'] / funnel['madds']:.1f} times fewer multiply-adds (counted, search only). "
        f"With PCA of FF {_schedule(pca)} has {100 * pca['map10']:.2f}% for "
        f"{whole['madds'] / pca['madds']:.1f} times fewer.",
        "![1-NN accuracy over dims, of classes seen in training and of others](adaptive.svg)",
        "## Where the paper says otherwise",
        "The paper's cascade reaches the accuracy of 512 fixed dims with 37 on average, 14 times "
        f"fewer; here {best['expected_dim']:.1f} dims do what {narrow} fixed ones do, "
        f"{narrow / best['expected_dim']:.1f} times fewer: with {about['classes']} classes a fixed "
        f"{narrow} dims lose next to nothing, so there is less to save. Its adaptive retrieval is "
        "128 times cheaper with 2,048 dims and a gallery of 1.3 million; here with "
        f"{width} dims and {rows:,} rows {whole['madds'] / funnel['madds']:.1f} times: a shortlist "
        "of 200 is a larger part of a small gallery.",
        "## How it was measured",
        "A fifth of the test rows teaches a cascade its thresholds and chooses the funnel, the "
        "rest judges them; `+-` is one standard deviation over ten such splits. Intervals of the "
        "verdict are 95%, by resampling test rows in pairs. All numbers are in `adaptive.json`.",
        "## Tables",
    ]
    chosen = [table for table in tables(results) if table.title.startswith(_TABLES)]
    return "\n\n".join(paragraphs) + "\n\n" + "\n".join(table.markdown() for table in chosen)


def _means(splits: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([split[name] for split in splits])) for name in splits[0]}


def _chosen(results: Results, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The funnel that was chosen, and exhaustive search at the full dim."""
    found = results["retrieval"][name]
    exhaustive = [row for row in found["rows"] if row["kind"] == "exhaustive"]
    return found["rows"][found["chosen"]], max(exhaustive, key=lambda row: row["madds"])


def _schedule(row: Mapping[str, Any]) -> str:
    shortlists = f" with shortlists of {_join(row['shortlists'])}" if row["shortlists"] else ""
    return f"{' -> '.join(map(str, row['dims']))} dims{shortlists}"


def _gaps(results: Results, part: str, other: str) -> str:
    nearest = {name: results[part][name] for name in ("mrl", other)}
    gaps = [
        100 * (nearest["mrl"][str(dim)]["nn1"] - nearest[other][str(dim)]["nn1"])
        for dim in results["plan"]["dims"]
    ]
    return ", ".join(map(signed, gaps))


def _join(numbers: list[int]) -> str:
    *some, last = map(str, numbers)
    return f"{', '.join(some)} and {last}" if some else last


def draw(results: Results, path: Path) -> None:
    """Draw 1-NN accuracy over dims, of classes seen in training and of those never seen."""
    from matplotlib.figure import Figure

    dims = results["plan"]["dims"]
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True)
    titles = {"neighbors": "all classes", "unseen": "classes never seen"}
    for axes, (part, title) in zip(panels, titles.items(), strict=True):
        for name, label in (("mrl", "MRL"), ("ff", "FF, a net per dim"), ("pca", "PCA of FF")):
            values = [100 * results[part][name][str(dim)]["nn1"] for dim in dims]
            axes.plot(dims, values, marker="o", label=label)
        axes.set_xscale("log")
        axes.set_xticks(dims, [str(dim) for dim in dims])
        axes.minorticks_off()
        axes.set_title(title)
        axes.set_xlabel("dims")
    panels[0].set_ylabel("1-NN accuracy, %")
    panels[1].legend()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
