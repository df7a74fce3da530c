"""What the results of a comparison say, in sentences that carry their numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from .tables import NAMES

_CLAIM = 0.01  # the paper's: as accurate as the separate nets


def findings(results: Mapping[str, Any]) -> list[str]:
    """Return a sentence for every question one asks of a comparison."""
    return [
        *_against_separate(results),
        *_against_cut(results),
        *_cascades(results),
        *_retrieval(results),
    ]


def _against_separate(results: Mapping[str, Any]) -> Iterator[str]:
    mrl = _means(results["top1"]["mrl"])
    for name, by_dim in results["top1"].items():
        if name in ("mrl", "svd", "rand_lp"):
            continue
        own = _means(by_dim)
        gaps = [100 * (mrl[dim] - own[dim]) for dim in mrl]
        mean = float(np.mean(gaps))
        verdict = ""
        if name == "ff":
            close = mean >= -100 * _CLAIM
            verdict = (
                "Matryoshka training costs no more than a point here: one net replaces "
                f"{len(gaps)}. "
                if close
                else "Matryoshka training costs more than a point here. "
            )
        yield (
            f"{verdict}MRL is {abs(mean):.1f} points {'above' if mean >= 0 else 'below'} "
            f"{NAMES[name]} on average over the dims: "
            + ", ".join(f"{gap:+.1f} at {dim}" for dim, gap in zip(mrl, gaps, strict=True))
            + "."
        )


def _against_cut(results: Mapping[str, Any]) -> Iterator[str]:
    heads = {name: _means(results["top1"][name]) for name in ("mrl", "svd", "rand_lp")}
    near = {
        name: {dim: scores["nn1"] for dim, scores in by_dim.items()}
        for name, by_dim in results["neighbors"].items()
    }
    for name, measure, mine, its in (
        ("svd", "accuracy", heads["mrl"], heads["svd"]),
        ("rand_lp", "accuracy", heads["mrl"], heads["rand_lp"]),
        ("pca", "1-NN accuracy", near["mrl"], near["pca"]),
        ("first_coordinates", "1-NN accuracy", near["mrl"], near["first_coordinates"]),
    ):
        better = [dim for dim in mine if mine[dim] > its[dim]]
        where = f"at {', '.join(better)} dims" if better else "at no dim"
        first = next(iter(mine))
        yield (
            f"In {measure} MRL is better than {NAMES[name]} {where}; at {first} dims "
            f"{100 * mine[first]:.1f}% against {100 * its[first]:.1f}%."
        )


def _cascades(results: Mapping[str, Any]) -> Iterator[str]:
    cascades = results["cascades"]
    width = results["plan"]["dims"][-1]
    head = results["madds"]["head"]
    share = head / (head + results["madds"]["backbone"])
    fixed = {int(dim): values[0] for dim, values in results["top1"]["mrl"].items()}
    for name, splits in cascades["splits"].items():
        accuracy, full, ff, dim = (
            float(np.mean([split[key] for split in splits]))
            for key in ("accuracy", "full_accuracy", "ff_accuracy", "expected_dim")
        )
        near = min(d for d in fixed if d >= dim - 1e-9)
        yield (
            f"The cascade '{name}' asks {dim:.1f} of {width} dims ({width / dim:.1f} times fewer) "
            f"and is {100 * accuracy:.2f}% right, the full dim {100 * full:.2f}%, FF of full width "
            f"{100 * ff:.2f}%, the same net at {near} dims for every row {100 * fixed[near]:.2f}%. "
            f"It saves {100 * share * (1 - dim / width):.2f}% of the model's multiply-adds."
        )
    if cascades["refused"]:
        yield f"No cascade could be certified: {cascades['refused']}"
    taught, judged = (
        [100 * split[part]["accuracy"] for split in cascades["search_over_greedy"]]
        for part in ("taught", "judged")
    )
    dims = [split["judged"]["expected_dim"] for split in cascades["search_over_greedy"]]
    yield (
        "At no more than greedy's expected dim on the rows that taught both, the joint search is "
        f"{np.mean(taught):+.2f} points from it there (worst split {min(taught):+.2f}) and "
        f"{np.mean(judged):+.2f} on the others (worst {min(judged):+.2f}), where its expected dim "
        f"differs by {np.mean(dims):+.1f}."
    )


def _retrieval(results: Mapping[str, Any]) -> Iterator[str]:
    for name, found in results["retrieval"].items():
        rows, chosen = found["rows"], found["rows"][found["chosen"]]
        whole = max((r for r in rows if r["kind"] == "exhaustive"), key=lambda r: r["madds"])
        yield (
            f"Retrieval with {NAMES[name]}: {' -> '.join(map(str, chosen['dims']))} with "
            f"shortlists {chosen['shortlists']} has map10 {100 * chosen['map10']:.2f}%, exhaustive "
            f"search at {whole['dims'][-1]} dims {100 * whole['map10']:.2f}%, for "
            f"{chosen['madds']:,} of {whole['madds']:,} multiply-adds per query "
            f"({whole['madds'] / chosen['madds']:.1f} times fewer, in theory, search only)."
        )


def _means(by_dim: Mapping[str, Any]) -> dict[str, float]:
    return {dim: float(np.mean(values)) for dim, values in by_dim.items()}
