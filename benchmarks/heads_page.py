"""The page of heads on frozen features: its numbers from the results, its text from the numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_mrl.comparison.verdict import difference, signed

Results = Mapping[str, Any]
Array = npt.NDArray[Any]

METHODS = {
    "top1": {
        "mrl": "MRL",
        "mrl_e": "MRL-E (tied)",
        "ff": "FF, a net per dim",
        "svd": "SVD of FF",
        "rand_lp": "Rand. LP of FF",
    },
    "nn1": {
        "mrl": "MRL",
        "mrl_e": "MRL-E (tied)",
        "ff": "FF, a net per dim",
        "pca": "PCA of FF",
        "svd": "SVD of FF",
        "adaptor": "adaptor of FF (no labels)",
        "rand_fs": "Rand. FS of FF",
    },
}
PAIRS = {"top1": "ff", "nn1": "pca"}  # whom MRL is compared with, row by row
_TITLES = {"top1": "Top-1 accuracy of the head", "nn1": "1-NN accuracy, gallery: training rows"}


def write(case: str, out: Path, folder: Path) -> None:
    """Write the JSON, the figure and the page of a case into a folder."""
    results = collect(case, out)
    name = results["page"]
    (folder / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / f"{name}.md").write_text(page(results))
    draw(results, folder / f"{name}.svg")


def collect(case: str, out: Path) -> dict[str, Any]:
    """Return the numbers of all cells that are there for every number of epochs."""
    from heads import CASES

    plan = CASES[case]
    with np.load(out / "features.npz") as arrays:
        rows = {part: len(arrays[f"y_{part}"]) for part in ("train", "val", "test")}
    seeds = [
        s for s in plan.seeds if all((out / f"nets_{e}_{s}.npz").exists() for e in plan.epochs)
    ]
    # What is learnt on the widest net comes last: that of all seeds, or none.
    learnt = [
        epochs
        for epochs in plan.epochs
        if all((out / f"learnt_{epochs}_{seed}.npz").exists() for seed in seeds)
    ]
    cells = {
        (epochs, seed): _cell(
            out, epochs, seed, rows, ("nets", "learnt") if epochs in learnt else ("nets",)
        )
        for epochs in plan.epochs
        for seed in seeds
    }
    results: dict[str, Any] = {
        "case": case,
        "page": plan.page,
        "dims": list(plan.dims),
        "epochs": sorted(plan.epochs),
        "epochs_of_learnt": sorted(learnt),
        "seeds": seeds,
        "rate_epochs": plan.rate_epochs,
        "rates": json.loads((out / "rates.json").read_text()),
        "rows": rows,
    }
    for part in ("val", "test"):
        results[part] = {
            measure: {
                method: {
                    str(dim): {
                        str(epochs): [
                            round(float(cells[epochs, seed][part, measure, method, dim].mean()), 6)
                            for seed in seeds
                            if (part, measure, method, dim) in cells[epochs, seed]
                        ]
                        for epochs in sorted(plan.epochs)
                    }
                    for dim in plan.dims
                }
                for method in methods
            }
            for measure, methods in METHODS.items()
        }
    results["paired"] = {
        measure: {
            str(dim): {
                str(epochs): counts_of(
                    [_ahead(cells[epochs, seed], measure, other, dim) for seed in seeds]
                )
                for epochs in sorted(plan.epochs)
            }
            for dim in plan.dims
        }
        for measure, other in PAIRS.items()
    }
    return results


def _cell(
    out: Path, epochs: int, seed: int, rows: Mapping[str, int], kinds: tuple[str, ...]
) -> dict[tuple[str, str, str, int], Array]:
    """Which rows are right, by part, measure, method and dim."""
    cell = {}
    for kind in kinds:
        with np.load(out / f"{kind}_{epochs}_{seed}.npz") as arrays:
            for name in arrays.files:
                part, measure, method, dim = name.split("/")
                right = np.unpackbits(arrays[name])[: rows[part]].astype(np.int64)
                cell[part, measure, method, int(dim)] = right
    return cell


def _ahead(cell: Mapping[Any, Array], measure: str, other: str, dim: int) -> Array:
    ahead: Array = cell["test", measure, "mrl", dim] - cell["test", measure, other, dim]
    return ahead


def counts_of(ahead: list[Array]) -> dict[str, int]:
    """How many test rows MRL is ahead in, in so many more seeds than it is behind."""
    values, counts = np.unique(np.sum(ahead, axis=0), return_counts=True)
    return {str(value): int(count) for value, count in zip(values, counts, strict=True)}


def paired(results: Results, measure: str, dim: int, epochs: int) -> dict[str, Any]:
    """Return how far MRL is ahead, as `keras_mrl.comparison.verdict.difference` has it."""
    counts = results["paired"][measure][str(dim)][str(epochs)]
    values = np.array([int(value) for value in counts]) / len(results["seeds"])
    return difference(np.repeat(values, list(counts.values())))


def page(results: Results) -> str:
    """Return the page; every number in it comes from the results."""
    dims, last = results["dims"], results["epochs"][-1]
    rows, case = results["rows"], results["case"]
    heads = {dim: paired(results, "top1", dim, last) for dim in dims}
    nearest = {dim: paired(results, "nn1", dim, last) for dim in dims}
    useful = [dim for dim in dims if dim >= 8]
    first = {epochs: paired(results, "top1", 8, epochs)["points"] for epochs in results["epochs"]}
    at = f"at {_join(useful)} dims"
    average = signed(float(np.mean([heads[dim]["points"] for dim in useful])))
    svd = {dim: _gap(results, "mrl", "svd", dim) for dim in useful}
    rates = _join(sorted(map(float, results["rates"]["mrl"])))
    text = _TEXTS[case]
    answer = [
        f"- **After {last} epochs, MRL minus FF in top-1** is "
        f"{_signed(heads[d] for d in useful)} points {at} (+-"
        f"{_widest(heads[d] for d in useful):.1f}), {average} on average. "
        f"{_shown(heads, useful)}",
        f"- {_gap_over(first)}",
        f"- **1-NN, MRL minus PCA of FF**, after {last} epochs: "
        f"{_signed(nearest[d] for d in useful)} points {at} (+-"
        f"{_widest(nearest[d] for d in useful):.1f}). {_nearest_shown(nearest, useful)}"
        + _adaptor(results),
        f"- **SVD of FF's head** after {last} epochs: MRL is "
        f"{', '.join(map(signed, svd.values()))} points from it {at}.",
    ]
    if dims[0] < 8:
        answer.append(
            f"- **2 and 4 dims** are too few for 150 classes: MRL has {_percent(results, 'mrl', 2)}"
            f"% and {_percent(results, 'mrl', 4)}%, FF {_percent(results, 'ff', 2)}% and "
            f"{_percent(results, 'ff', 4)}%."
        )
    partial = [str(epochs) for epochs in results["epochs_of_learnt"]]
    is_partial = 0 < len(partial) < len(results["epochs"])
    paragraphs = [
        f"# {text.title}",
        f"    python benchmarks/heads.py {case} --data {text.data} --out FOLDER\n"
        f"    python benchmarks/heads.py {case} --out FOLDER --page docs/benchmarks",
        text.facts.format(**rows) + " On these the small net of `keras-mrl compare` is trained: "
        "512 hidden units, then the features. MRL and MRL-E have heads at "
        f"{_join(dims)} dims; FF is a net per dim. What else is in the tables "
        f"cuts the features of the widest FF net. {_seeds(results)}. The peak of the "
        f"rate is chosen on `val` for each net after {_epochs(results['rate_epochs'])}, among "
        f"{rates}, with a seed of its own."
        + f" Rand. LP and the adaptor cut nets of {' and '.join(partial)} epochs only."
        * is_partial,
        "## Answer",
        "\n".join(answer),
        f"![Top-1 of MRL minus FF over epochs, a line per dim]({results['page']}.svg)",
        "## Where the paper says otherwise",
        text.otherwise(results, svd),
        "## How it was measured",
        '"Level" is said where two one-sided tests of 5% show that the difference lies within half '
        "a point either way. `+-` beside a difference is half of its 95% interval, by resampling "
        "the test rows, each of them the mean over the seeds; in the last two tables it is one "
        "standard deviation over the seeds. Epochs stand in brackets where `val` chose them, for "
        f"each method and dim. All numbers, by dim, epochs and seed, are in "
        f"`{results['page']}.json`.",
        "## Tables",
        _difference_table(results),
    ]
    whole = "\n\n".join(paragraphs) + "\n"
    for measure in METHODS:
        whole += (
            f"\n{_TITLES[measure]}, %, `test`, epochs by `val`\n\n{_chosen(results, measure)}\n"
        )
    for measure in METHODS:
        whole += f"\n{_TITLES[measure]}, %, `test`, {last} epochs\n\n"
        whole += _table(results, measure, last) + "\n"
    return whole


def _gap_over(epochs: Mapping[int, float]) -> str:
    """What more epochs do to the gap between MRL and FF at 8 dims, points by epochs."""
    shown = ", ".join(f"{signed(gap)} after {number}" for number, gap in epochs.items())
    shown = f"At 8 dims MRL minus FF is {shown} epochs"
    first, *_, last = map(abs, epochs.values())
    if last > first / 2:
        return f"**More epochs do not close the gap.** {shown}."
    return (
        f"**The gap is training that has not converged.** {shown}: several losses that share "
        "features learn more slowly than one."
    )


def _adaptor(results: Results) -> str:
    """How the adaptor does at the narrowest useful dims, beside PCA and MRL."""
    last = results["epochs"][-1]
    if last not in results["epochs_of_learnt"]:
        return ""
    shares = {
        method: " and ".join(
            f"{100 * _mean(results, 'nn1', method, dim, last):.1f}%" for dim in (8, 16)
        )
        for method in ("adaptor", "pca", "mrl")
    }
    return (
        f" The adaptor, which sees no labels, has {shares['adaptor']} at 8 and 16 dims, PCA "
        f"{shares['pca']}, MRL {shares['mrl']}."
    )


def _texts_otherwise(results: Results, svd: Mapping[int, float]) -> str:
    return (
        "The paper (ResNet50 on ImageNet) has MRL above SVD up to 256 dims; here they differ by "
        f"{signed(svd[64])} points at 64 dims already. Its widest net has 2,048 features for 1,000 "
        "classes, of which SVD drops most; this one has 256 for 150, and a head of 150 classes has "
        "no more than 150 directions. The paper's MRL-E is 10 points below MRL at 8 dims, here "
        f"{-_gap(results, 'mrl_e', 'mrl', 8):.1f}."
    )


def _images_otherwise(results: Results, svd: Mapping[int, float]) -> str:
    return (
        "The paper (ResNet50 on ImageNet) has MRL above SVD up to 256 dims; here they differ by "
        f"{signed(svd[32])} points at 32 dims and {signed(svd[64])} at 64. Its widest net has "
        "2,048 features for 1,000 classes, of which SVD drops most; this one has 256, and a head "
        "of 100 classes has no more than 100 directions. The paper's MRL-E is 10 points below MRL "
        f"at 8 dims, here {-_gap(results, 'mrl_e', 'mrl', 8):.1f}. The paper trains the whole net; "
        "here it is frozen, and a small net is trained behind it."
    )


@dataclass(frozen=True)
class _Text:
    """What a page says beside its numbers."""

    title: str
    data: str  # of its command
    facts: str
    otherwise: Callable[[Results, Mapping[int, float]], str]


_TEXTS = {
    "texts": _Text(
        "Heads on frozen features: does nesting cost accuracy?",
        "data_full.json --encoder FOLDER",
        "CLINC150: {train:,} training texts of 150 intents, {val:,} of `val`, {test:,} of `test`. "
        "The encoder, all-MiniLM-L6-v2, is frozen: a text is the mean of its last layer, 384 "
        "numbers.",
        _texts_otherwise,
    ),
    "images": _Text(
        "Heads on frozen features of images: CIFAR-100 and a pretrained net",
        "CIFAR100 --encoder FILE",
        "CIFAR-100: {train:,} training images of 100 classes, {val:,} of `val`, {test:,} of "
        "`test`; an image whose pixels stand in an earlier part is left out. EfficientNet-Lite0 "
        "with its ImageNet weights, carried over into Keras, is frozen: an image, at 128 pixels, "
        "is the mean of its last map, 1,280 numbers.",
        _images_otherwise,
    ),
}


def _join(words: Iterable[Any]) -> str:
    *some, last = [f"{word:g}" for word in words]
    return f"{', '.join(some)} and {last}"


def _epochs(number: int) -> str:
    return f"{number} epoch{'s' * (number > 1)}"


def _seeds(results: Results) -> str:
    number = len(results["seeds"])
    return f"{number} seed{'s' * (number > 1)}"


def _signed(differences: Iterable[Mapping[str, Any]]) -> str:
    return ", ".join(signed(d["points"]) for d in differences)


def _widest(differences: Iterable[Mapping[str, Any]]) -> float:
    return float(max((d["high"] - d["low"]) / 2 for d in differences))


def _shown(by_dim: Mapping[int, Mapping[str, Any]], dims: list[int]) -> str:
    words = {
        "level": "the two are level",
        "ahead": "MRL is ahead",
        "behind": "MRL is behind",
        "unclear": "the test rows are too few to tell",
    }
    parts = []
    for shows, what in words.items():
        some = [str(dim) for dim in dims if by_dim[dim]["shows"] == shows]
        if some:
            parts.append(f"{what} at {', '.join(some)}")
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def _nearest_shown(by_dim: Mapping[int, Mapping[str, Any]], dims: list[int]) -> str:
    return _shown(by_dim, dims).replace("the two are", "MRL and PCA are")


def _mean(results: Results, measure: str, method: str, dim: int, epochs: int) -> float:
    return float(np.mean(results["test"][measure][method][str(dim)][str(epochs)]))


def _percent(results: Results, method: str, dim: int) -> str:
    return f"{100 * _mean(results, 'top1', method, dim, results['epochs'][-1]):.1f}"


def _gap(results: Results, one: str, other: str, dim: int) -> float:
    last = results["epochs"][-1]
    scores = (_mean(results, "top1", method, dim, last) for method in (one, other))
    mine, theirs = scores
    return 100 * (mine - theirs)


def _difference_table(results: Results) -> str:
    dims = results["dims"]
    lines = [
        "How far MRL is ahead, points, and half of the 95% interval",
        "",
        f"| | epochs | {' | '.join(map(str, dims))} |",
        "|---" * (len(dims) + 2) + "|",
    ]
    for measure, name in (("top1", "top-1, of FF"), ("nn1", "1-NN, of PCA of FF")):
        for epochs in results["epochs"]:
            cells = []
            for dim in dims:
                d = paired(results, measure, dim, epochs)
                cells.append(f"{signed(d['points'])} +- {(d['high'] - d['low']) / 2:.1f}")
            lines.append(f"| {name} | {epochs} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _table(results: Results, measure: str, epochs: int) -> str:
    dims = results["dims"]
    lines = [f"| | {' | '.join(map(str, dims))} |", "|---" * (len(dims) + 1) + "|"]
    for method, name in METHODS[measure].items():
        by_dim = results["test"][measure][method]
        if not any(by_dim[str(dim)][str(epochs)] for dim in dims):
            continue
        cells = [_spread(by_dim[str(dim)][str(epochs)]) for dim in dims]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _chosen(results: Results, measure: str) -> str:
    """Each method and dim at the number of epochs that is best on `val`."""
    dims = results["dims"]
    lines = [f"| | {' | '.join(map(str, dims))} |", "|---" * (len(dims) + 1) + "|"]
    for method, name in METHODS[measure].items():
        cells = []
        for dim in dims:
            by_epochs = results["val"][measure][method][str(dim)]
            means = {e: float(np.mean(values)) for e, values in by_epochs.items() if values}
            if not means:
                cells.append("")
                continue
            best = max(means, key=lambda epochs: means[epochs])
            values = results["test"][measure][method][str(dim)][best]
            cells.append(f"{100 * np.mean(values):.1f} ({best})")
        if any(cells):
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    more = f" +- {100 * np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):.2f}{more}"


def draw(results: Results, path: Path) -> None:
    """Draw how far MRL is from FF over the epochs, a line per dim."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for dim in (dim for dim in results["dims"] if dim >= 8):
        gaps = [paired(results, "top1", dim, epochs)["points"] for epochs in results["epochs"]]
        axes.plot(results["epochs"], gaps, marker="o", label=f"{dim} dims")
    axes.axhspan(-0.5, 0.5, color="0.9")
    axes.set_xscale("log")
    axes.set_xticks(results["epochs"], [str(epochs) for epochs in results["epochs"]])
    axes.minorticks_off()
    axes.set_xlabel("epochs")
    axes.set_ylabel("MRL minus FF, points of top-1")
    axes.legend()
    figure.savefig(path, metadata={"Date": None})
