"""The results of a comparison as tables: for Markdown, for HTML, and as rows of a CSV file."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

NAMES = {
    "mrl": "MRL",
    "ff": "FF (a net per dim)",
    "mrl_e": "MRL-E (tied)",
    "mrl_boosted": "MRL, first dim counted twice",
    "slimmable": "slimmable",
    "svd": "SVD of FF",
    "rand_lp": "Rand. LP of FF",
    "first_coordinates": "Rand. FS (first coordinates of FF)",
    "pca": "PCA of FF",
}
HEADS = {
    "top1": "Top-1 accuracy of the head, %",
    "top5": "Top-5 accuracy of the head, %",
    "ece": "Expected calibration error of the head, points",
}
MEASURES = {
    "nn1": "1-NN accuracy",
    "knn": "k-NN accuracy (the vote of the 10 nearest)",
    "p10": "precision of the 10 nearest (p10)",
    "map10": "map10",
    "recall10": "share of the full dim's 10 nearest (recall10)",
}

SPREAD = (
    "+- is one standard deviation: over seeds, or over ten splits of the same test images, which "
    "overlap. What has none is of one seed."
)


@dataclass(frozen=True)
class Table:
    """A table of text.

    Args:
        title: What it shows.
        header: Of the columns; the first is that of the names.
        rows: Cells, as many as the header has.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """Return it as Markdown, under its title."""
        lines = [f"| {' | '.join(self.header)} |", "|---" * len(self.header) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in self.rows]
        return f"{self.title}\n\n" + "\n".join(lines) + "\n"


def tables(results: Mapping[str, Any]) -> list[Table]:
    """Return all tables: percents, `+-` one standard deviation over seeds or splits."""
    dims = [str(dim) for dim in results["plan"]["dims"]]
    found = [_by_dim(title, dims, results[measure]) for measure, title in HEADS.items()]
    probed = f"trained on {results['about']['probed']:,} training images"
    title = f"Accuracy of a linear probe of the features, {probed}, %"
    found.append(_by_dim(title, dims, results["probe"]))
    for measure, title in MEASURES.items():
        for part, where in (("neighbors", "all classes"), ("unseen", "classes never seen")):
            rows = {
                name: {dim: [scores[measure]] for dim, scores in by_dim.items()}
                for name, by_dim in results.get(part, {}).items()
                if all(measure in scores for scores in by_dim.values())
            }
            if rows:
                found.append(_by_dim(f"{title}, {where}, %", dims, rows))
    return [*found, _cascades(results["cascades"]), *_retrieval(results["retrieval"])]


def as_csv(results: Mapping[str, Any]) -> str:
    """Return every measured number as a row: part, method, dim, measure, seed, value."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("part", "method", "dim", "measure", "seed_or_split", "value"))
    writer.writerows(_long(results))
    return text.getvalue()


def spread(values: Sequence[float], factor: float = 1) -> str:
    """Return a mean, with one standard deviation where there are several values.

    Examples:
        >>> spread([0.5, 0.7], 100), spread([0.5], 100)
        ('60.00 +- 14.14', '50.00')
    """
    scaled = factor * np.asarray(values)
    more = f" +- {scaled.std(ddof=1):.2f}" if len(values) > 1 else ""
    return f"{scaled.mean():.2f}{more}"


def _by_dim(title: str, dims: list[str], rows: Mapping[str, Any]) -> Table:
    cells = [
        (
            NAMES[name],
            *(spread(by_dim[dim], 100) if dim in by_dim else "" for dim in dims),
        )
        for name, by_dim in rows.items()
    ]
    return Table(title, ("", *dims), tuple(cells))


def _cascades(cascades: Mapping[str, Any]) -> Table:
    rows = []
    for name, splits in cascades["splits"].items():
        below = [split["full_accuracy"] - split["accuracy"] for split in splits]
        over = [split["accuracy"] - split["ff_accuracy"] for split in splits]
        promise = f" (risk {cascades['risk']}, delta {cascades['delta']})"
        rows.append(
            (
                name + promise * (name == "certified"),
                spread([split["accuracy"] for split in splits], 100),
                spread(below, 100),
                spread(over, 100),
                spread([split["expected_dim"] for split in splits]),
                spread([split["cumulative_dim"] for split in splits]),
            )
        )
    header = (
        "",
        "accuracy, %",
        "below the full dim, points",
        "above FF of full width, points",
        "expected dim",
        "all dims asked",
    )
    return Table("Adaptive classification, on rows that taught no threshold", header, tuple(rows))


def _retrieval(retrieval: Mapping[str, Any]) -> Iterator[Table]:
    header = ("", "dims", "shortlists", "map10, %", "multiply-adds per query", "of exhaustive")
    for name, found in retrieval.items():
        whole = max(row["madds"] for row in found["rows"] if row["kind"] == "exhaustive")
        rows = [
            (
                row["kind"] + (" (chosen)" if at == found["chosen"] else ""),
                " -> ".join(map(str, row["dims"])),
                ", ".join(map(str, row["shortlists"])),
                f"{100 * row['map10']:.2f}",
                f"{row['madds']:,}",
                f"{row['madds'] / whole:.3f}",
            )
            for at, row in enumerate(found["rows"])
        ]
        yield Table(f"Retrieval with {NAMES[name]}", header, tuple(rows))


def _long(results: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    for measure in (*HEADS, "probe"):
        part = "probe" if measure == "probe" else "head"
        for method, by_dim in results[measure].items():
            for dim, values in by_dim.items():
                for seed, value in enumerate(values):
                    yield part, method, dim, measure, seed, value
    for part in ("neighbors", "unseen"):
        for method, by_dim in results.get(part, {}).items():
            for dim, scores in by_dim.items():
                for measure, value in scores.items():
                    yield part, method, dim, measure, 0, value
    for name, splits in results["cascades"]["splits"].items():
        for split, measures in enumerate(splits):
            for measure, value in measures.items():
                yield "cascades", name, "", measure, split, value
    for name, found in results["retrieval"].items():
        for row in found["rows"]:
            dims = " -> ".join(map(str, row["dims"]))
            for measure in ("map10", "madds"):
                yield "retrieval", f"{name} {row['kind']}", dims, measure, 0, row[measure]
