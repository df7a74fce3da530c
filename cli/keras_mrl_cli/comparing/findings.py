"""What the results of a comparison say, in sentences that carry their numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import sqrt
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
        verdict = _verdict(gaps, list(own.values()), results["about"]) if name == "ff" else ""
        yield (
            f"{verdict}MRL is {abs(mean):.1f} points {'above' if mean >= 0 else 'below'} "
            f"{NAMES[name]} on average over the dims: "
            + ", ".join(f"{gap:+.1f} at {dim}" for dim, gap in zip(mrl, gaps, strict=True))
            + "."
        )


def _verdict(gaps: list[float], separate: list[float], about: Mapping[str, Any]) -> str:
    """Whether nesting costs accuracy, where so many test images can tell."""
    images, chance = about["images"][1], 1 / about["classes"]
    best = max(separate)
    # Two nets equally good, judged on images of their own, differ by more once in twenty times.
    noise = 100 * 2 * sqrt(2 * best * (1 - best) / images)
    told = f"Differences below {noise:.1f} points are noise among {images:,} test images. "
    if best < 2 * chance:
        return (
            f"Nothing can be said: the best separate net is {100 * best:.1f}% right, chance "
            f"{100 * chance:.1f}%. Train longer. "
        )
    mean, worst = float(np.mean(gaps)), min(gaps)
    if noise > 100 * _CLAIM and abs(mean) < noise:
        return f"{told}No difference is seen on average. "
    if mean < -100 * _CLAIM:
        return f"{told}Matryoshka training costs more than a point here. "
    if worst < -max(noise, 100 * _CLAIM):
        return (
            f"{told}Matryoshka training costs no more than a point on average, but "
            f"{-worst:.1f} at one dim. "
        )
    return f"{told}Matryoshka training costs no more than a point: one net replaces {len(gaps)}. "


def _against_cut(results: Mapping[str, Any]) -> Iterator[str]:
    heads = {
        name: {dim: values[0] for dim, values in results["top1"][name].items()}
        for name in ("mrl", "svd", "rand_lp")
    }
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
        shown = ", ".join(f"{100 * (mine[dim] - its[dim]):+.1f} at {dim}" for dim in mine)
        yield f"In {measure} MRL of seed 0 is ahead of {NAMES[name]} {where}: {shown}."


def _cascades(results: Mapping[str, Any]) -> Iterator[str]:
    cascades = results["cascades"]
    width = results["plan"]["dims"][-1]
    head = results["madds"]["head"]
    share = head / (head + results["madds"]["backbone"])
    fixed = {int(dim): values[0] for dim, values in results["top1"]["mrl"].items()}
    for name, splits in cascades["splits"].items():
        accuracy, full, ff, dim, paid = (
            float(np.mean([split[key] for split in splits]))
            for key in (
                *("accuracy", "full_accuracy", "ff_accuracy"),
                *("expected_dim", "cumulative_dim"),
            )
        )
        if name == "oracle":
            yield (
                "An oracle, which knows the label and stops at the first dim that is right, would "
                f"be {100 * accuracy:.2f}% right at {dim:.1f} dims."
            )
            continue
        near = min(d for d in fixed if d >= dim - 1e-9)
        saved = 100 * share * (1 - paid / width)
        promise = ""
        if name == "certified":
            promise = (
                f" It promises, with a chance of {1 - cascades['delta']:g} over the draw of the "
                f"holdout, that the full dim is right and it is wrong in at most "
                f"{100 * cascades['risk']:g}% of new rows."
            )
        yield (
            f"The cascade '{name}' stops at {dim:.1f} of {width} dims on average "
            f"({width / dim:.1f} times fewer) and is {100 * accuracy:.2f}% right, the full dim "
            f"{100 * full:.2f}%, FF of full width {100 * ff:.2f}%, the same net at {near} dims "
            f"for every row {100 * fixed[near]:.2f}%. Counting every head asked it "
            f"{'saves' if saved >= 0 else 'costs'} {abs(saved):.2f}% of the model's multiply-adds."
            f"{promise}"
        )
    if cascades["refused"]:
        yield f"No cascade is certified: {cascades['refused']}."
    taught, judged = (
        [100 * split[part]["accuracy"] for split in cascades["search_over_greedy"]]
        for part in ("taught", "judged")
    )
    dims = [split["judged"]["expected_dim"] for split in cascades["search_over_greedy"]]
    yield (
        "The joint search at no more than greedy's expected dim (by chance one of two policies of "
        f"its front) is {np.mean(taught):+.2f} points from greedy on the rows that taught both "
        f"(worst split {min(taught):+.2f}; greedy is one of its candidates) and "
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
