"""The report of a comparison: sentences, tables, figures, and one HTML page of all of them.

Every sentence carries its numbers. The page needs nothing but itself, so it opens offline.
"""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_mrl_serving.printable import printable

from ..evaluation import plot_by_cost, plot_by_dim
from .figures import interactive
from .folder import replacing
from .verdict import is_judged, sentences

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
    "adaptor": "adaptor of FF (no labels)",
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

LEGEND = (
    "MRL is one Matryoshka net with a head per dim, MRL-E one with a single head for all dims; FF "
    "are separate nets, one per dim. Names that end in 'of FF' are cuts of the widest of these, "
    "which is what you have without Matryoshka: by SVD of its head, by PCA or a learnt rotation "
    "(the adaptor) of its features, or at random (Rand. LP trains a new head, Rand. FS takes the "
    "first coordinates). A slimmable net runs at several widths."
)
SPREAD = (
    "+- is one standard deviation: over seeds, or over ten splits of the same test images, which "
    "overlap. What has none is of one seed."
)
FIGURES = {
    "accuracy": "Accuracy of the head over dims, for every method",
    "neighbors": "1-NN accuracy over dims, for every method",
    "adaptive": "Adaptive classification: accuracy over expected dim, and the oracle",
    "retrieval": "map10 over multiply-adds per query",
}


def write_report(results: Mapping[str, Any], folder: Path) -> None:
    """Write the figures and the four forms of the results into `folder`."""
    draw(results, folder)
    answer = " ".join(sentences(results))
    found = "".join(f"- {sentence}\n" for sentence in findings(results))
    markdown = "\n".join(table.markdown() for table in tables(results))
    texts = {
        "results.json": json.dumps(_finite(results), indent=1, allow_nan=False) + "\n",
        "results.csv": as_csv(results),
        "results.md": f"{answer}\n\n{found}\n{SPREAD}\n\n{markdown}",
        "report.html": html(results, folder),
    }
    for name, text in texts.items():
        with replacing(folder / name) as partial:
            partial.write_text(text, "utf-8")


def _finite(value: Any) -> Any:
    """Return results with null for NaN and infinity, which JSON has not."""
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(v) for key, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value


def findings(results: Mapping[str, Any]) -> list[str]:
    """Return sentences of cascades and retrieval that gain something; none before a verdict."""
    if not is_judged(results):
        return []
    return [*_describe_cascades(results), *_describe_retrieval(results["retrieval"])]


def _nearest(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """1-NN accuracy by method and dim."""
    return {
        name: {dim: scores["nn1"] for dim, scores in by_dim.items()}
        for name, by_dim in results["neighbors"].items()
    }


def _describe_cascades(results: Mapping[str, Any]) -> Iterator[str]:
    """Sentences of the cascades that are better than one dim for all rows at their cost."""
    cascades = results["cascades"]
    width = results["plan"]["dims"][-1]
    head = results["madds"]["head"]
    share = head / (head + results["madds"]["backbone"])
    accuracy_at = {int(dim): values[0] for dim, values in results["top1"]["mrl"].items()}
    for name, splits in cascades["splits"].items():
        accuracy, full, ff, dim, paid_dim = _by_measure(splits).mean(axis=1)
        fixed = max(d for d in accuracy_at if d <= dim + 1e-9)
        if name == "oracle" or accuracy <= accuracy_at[fixed] + _GAIN or dim >= width - 1e-9:
            continue
        saved = 100 * share * (1 - paid_dim / width)
        promise = ""
        if name == "certified":
            promise = (
                f" It promises, with a chance of {1 - cascades['delta']:g} over the draw of the "
                f"holdout, that the full dim is right and it is wrong in at most "
                f"{100 * cascades['risk']:g}% of new rows."
            )
        yield (
            f"The cascade '{name}' stops at {dim:.1f} of {width} dims on average and is "
            f"{100 * accuracy:.2f}% right, the full dim {100 * full:.2f}%, FF of full width "
            f"{100 * ff:.2f}%, the same net at {fixed} dims for every row "
            f"{100 * accuracy_at[fixed]:.2f}%. Counting every head asked it "
            f"{'saves' if saved >= 0 else 'costs'} {abs(saved):.2f}% of the model's multiply-adds."
            f"{promise}"
        )


_GAIN = 0.005  # less is not worth a sentence


_CASCADE_MEASURES = ("accuracy", "full_accuracy", "ff_accuracy", "expected_dim", "cumulative_dim")


def _by_measure(splits: Sequence[Mapping[str, float]]) -> npt.NDArray[np.float64]:
    """Return `(measures, splits)` in the order of `_CASCADE_MEASURES`."""
    return np.array([[split[measure] for split in splits] for measure in _CASCADE_MEASURES])


def _describe_retrieval(retrieval: Mapping[str, Any]) -> Iterator[str]:
    for name, result in retrieval.items():
        chosen, whole = result["rows"][result["chosen"]], _dearest_exhaustive(result["rows"])
        if whole["madds"] <= chosen["madds"] or chosen["map10"] < whole["map10"] - _LOSS:
            continue
        yield (
            f"Retrieval with {NAMES[name]}: {' -> '.join(map(str, chosen['dims']))} with "
            f"shortlists {chosen['shortlists']} has map10 {100 * chosen['map10']:.2f}%, exhaustive "
            f"search at {whole['dims'][-1]} dims {100 * whole['map10']:.2f}%, for "
            f"{chosen['madds']:,} of {whole['madds']:,} multiply-adds per query "
            f"({whole['madds'] / chosen['madds']:.1f} times fewer, in theory, search only)."
        )


_LOSS = 0.01  # of map10: a funnel that loses more on fresh queries saves nothing


def _dearest_exhaustive(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The row of exhaustive search at the full dim."""
    return max((row for row in rows if row["kind"] == "exhaustive"), key=lambda row: row["madds"])


@dataclass(frozen=True)
class Table:
    """A table of text.

    Args:
        title: Of the table.
        header: Of the columns; the first column holds names.
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
    by_dim = [_by_dim(title, dims, results[measure]) for measure, title in HEADS.items()]
    probed = f"trained on {results['about']['probed']:,} training images"
    title = f"Accuracy of a linear probe of the features, {probed}, %"
    by_dim.append(_by_dim(title, dims, results["probe"]))
    for measure, title in MEASURES.items():
        for part, where in (("neighbors", "all classes"), ("unseen", "classes never seen")):
            rows = {
                name: {dim: [scores[measure]] for dim, scores in scores_at.items()}
                for name, scores_at in results.get(part, {}).items()
                if all(measure in scores for scores in scores_at.values())
            }
            if rows:
                by_dim.append(_by_dim(f"{title}, {where}, %", dims, rows))
    return [*by_dim, _cascades(results["cascades"]), *_retrieval(results["retrieval"])]


def _by_dim(title: str, dims: list[str], rows: Mapping[str, Any]) -> Table:
    cells = tuple(
        (NAMES[name], *(spread(by_dim[dim], 100) if dim in by_dim else "" for dim in dims))
        for name, by_dim in rows.items()
    )
    return Table(title, ("", *dims), cells)


def _cascades(cascades: Mapping[str, Any]) -> Table:
    rows = []
    for name, splits in cascades["splits"].items():
        accuracy, full, ff, dim, paid_dim = _by_measure(splits)
        promise = f" (risk {cascades['risk']}, delta {cascades['delta']})"
        rows.append(
            (
                name + promise * (name == "certified"),
                spread(accuracy, 100),
                spread(full - accuracy, 100),
                spread(accuracy - ff, 100),
                spread(dim),
                spread(paid_dim),
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
    for name, result in retrieval.items():
        whole = _dearest_exhaustive(result["rows"])["madds"]
        rows = [
            (
                row["kind"] + (" (chosen)" if number == result["chosen"] else ""),
                " -> ".join(map(str, row["dims"])),
                ", ".join(map(str, row["shortlists"])),
                f"{100 * row['map10']:.2f}",
                f"{row['madds']:,}",
                f"{row['madds'] / whole:.3f}",
            )
            for number, row in enumerate(result["rows"])
        ]
        yield Table(f"Retrieval with {NAMES[name]}", header, tuple(rows))


def spread(values: npt.ArrayLike, factor: float = 1) -> str:
    """Return a mean, with one standard deviation where there are several values.

    Examples:
        >>> from keras_mrl.comparison.report import spread
        >>> spread([0.5, 0.7], 100), spread([0.5], 100)
        ('60.00 +- 14.14', '50.00')
    """
    scaled = factor * np.asarray(values)
    more = f" +- {scaled.std(ddof=1):.2f}" if len(scaled) > 1 else ""
    return f"{scaled.mean():.2f}{more}"


def as_csv(results: Mapping[str, Any]) -> str:
    """Return every measured number as a row: part, method, dim, measure, seed, value."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("part", "method", "dim", "measure", "seed_or_split", "value"))
    writer.writerows(_csv_rows(results))
    return text.getvalue()


def _csv_rows(results: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
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
    for name, result in results["retrieval"].items():
        for row in result["rows"]:
            dims = " -> ".join(map(str, row["dims"]))
            for measure in ("map10", "madds"):
                yield "retrieval", f"{name} {row['kind']}", dims, measure, 0, row[measure]


def draw(results: Mapping[str, Any], folder: Path) -> None:
    """Write every figure to `<name>.svg` and `<name>.png`."""
    top1, nearest = _lines(results["top1"]), _lines(_nearest(results))
    nested = {name: top1[name] for name in (NAMES["mrl"], NAMES["ff"])}
    stars = {}
    for name, splits in results["cascades"]["splits"].items():
        accuracy, _, _, dim, _ = _by_measure(splits).mean(axis=1)
        stars[name if name == "oracle" else f"cascade, {name}"] = dim, accuracy
    searches, chosen = _costs(results["retrieval"])
    for suffix in ("svg", "png"):
        path = {name: folder / f"{name}.{suffix}" for name in FIGURES}
        plot_by_dim(top1, path["accuracy"], title="Accuracy by dim")
        plot_by_dim(
            nearest,
            path["neighbors"],
            title="Nearest neighbour by dim",
            measure="1-NN accuracy",
        )
        plot_by_dim(nested, path["adaptive"], stars, title="Adaptive classification")
        plot_by_cost(searches, path["retrieval"], chosen)


def _lines(by_method: Mapping[str, Any]) -> dict[str, dict[int, Any]]:
    """A line for every method there is, so that each has its colour in every figure."""
    return {
        title: {int(dim): values for dim, values in by_method.get(name, {}).items()}
        for name, title in NAMES.items()
    }


def _costs(retrieval: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, tuple[Any, Any]]]:
    """Multiply-adds and map10 of exhaustive search by method and dim, and of chosen funnels."""
    searches = {
        f"{title}, exhaustive": {
            row["dims"][-1]: (row["madds"], row["map10"])
            for row in retrieval.get(name, {"rows": ()})["rows"]
            if row["kind"] == "exhaustive"
        }
        for name, title in NAMES.items()
    }
    funnels = {}
    for name, result in retrieval.items():
        row = result["rows"][result["chosen"]]
        title = f"{NAMES[name]}, {' -> '.join(map(str, row['dims']))}"
        funnels[title] = row["madds"], row["map10"]
    return searches, funnels


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2328; }
body { margin: 2rem auto; max-width: 68rem; padding: 0 1rem; }
h1, h2 { line-height: 1.2; }
h2 { margin-top: 2.5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; }
caption { caption-side: top; text-align: left; font-weight: 600; padding: 1.2rem 0 .3rem; }
th, td { border-bottom: 1px solid #d0d7de; padding: .3rem .7rem; }
th, td { text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
figure { display: inline-block; margin: 0; width: 32rem; max-width: 100%; }
figure img { width: 100%; }
dt { font-weight: 600; }
dd { overflow-wrap: anywhere; }
.verdict { border-left: 4px solid #0969da; padding-left: 1rem; font-size: 1.15rem; }
summary { cursor: pointer; font-weight: 600; margin-top: 2rem; }
.plot { height: 32rem; }
pre { background: #f6f8fa; padding: .6rem; overflow-x: auto; }
@media print { .plot { break-inside: avoid; } h2 { break-after: avoid; } }
"""


def html(results: Mapping[str, Any], folder: Path) -> str:
    """Return the report, with the figures of `folder` inside."""
    plan, about = results["plan"], results["about"]
    rows, judges = about["images"]
    net = (
        "one hidden layer of 512 units"
        if about["kind"] == "embeddings"
        else f"{plan['filters']} filters in the first of eight convolutions"
    )
    facts = {
        "Data": f"{about['left_out']} {about['kind']} of the test that training has too were left "
        "out",
        "Recipe": f"{plan['epochs']} epochs of {plan['rows']:,} {about['kind']}, {net}; "
        f"{plan['seeds']} seed{'s' if plan['seeds'] > 1 else ''} of MRL and of FF at "
        f"{', '.join(map(str, about['seeded']))} dims, one of the rest",
        "Intervals": "95%, by resampling the test rows 20,000 times in pairs; level: within "
        f"{results['verdict']['margin']:g} points by two one-sided tests of 5%",
        "Command": about["command"],
        "Software and machine": about["machine"],
        "Minutes of training": ", ".join(f"{name} {m:g}" for name, m in results["minutes"].items()),
    }
    if about["unseen"]:
        facts["Classes never seen"] = ", ".join(about["unseen"])
    if about["unreadable"]:
        facts["Files that cannot be read"] = f"left out: {', '.join(about['unreadable'])}"
    data = (
        f"On {', '.join(about['data'])}: {rows:,} {about['kind']} for training, {judges:,} for "
        f"judging, {about['classes']} classes; {plan['epochs']} epochs."
    )
    answer = "".join(f"<p>{_text(sentence)}</p>\n" for sentence in sentences(results))
    found = "".join(f"<li>{_text(sentence)}</li>\n" for sentence in findings(results))
    # Without its library the figures are pictures.
    figures = interactive(results, NAMES) or "".join(
        _figure(folder / f"{name}.svg", text) for name, text in FIGURES.items()
    )
    more = f"<h2>What else the numbers say</h2>\n<ul>\n{found}</ul>\n" if found else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<title>Did Matryoshka pay off?</title>\n"
        f"<style>{_STYLE}</style></head><body>\n<h1>Did Matryoshka pay off?</h1>\n"
        f'<p>{_text(data)}</p>\n<div class="verdict">\n{answer}</div>\n'
        f"<p>{_text(LEGEND)}</p>\n{figures}\n"
        f"<details><summary>Details: tables, and how it was measured</summary>\n{more}"
        f"<h2>Tables</h2>\n<p>{_text(SPREAD)}</p>\n{''.join(map(_table, tables(results)))}"
        f"<h2>How it was measured</h2>\n<dl>\n{_facts(facts)}</dl>\n</details>\n"
        "</body></html>\n"
    )


def _facts(facts: Mapping[str, str]) -> str:
    return "".join(f"<dt>{name}</dt><dd>{_text(text)}</dd>\n" for name, text in facts.items())


def _figure(svg: Path, text: str) -> str:
    # An image of its own, since figures within one page would share the names inside them.
    data = base64.b64encode(svg.read_bytes()).decode()
    return f'<figure><img alt="{_text(text)}" src="data:image/svg+xml;base64,{data}"></figure>\n'


def _table(table: Table) -> str:
    header = "".join(f"<th>{_text(cell)}</th>" for cell in table.header)
    rows = "".join(
        "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>\n"
        for row in table.rows
    )
    return (
        f'<div class="wide"><table><caption>{_text(table.title)}</caption>\n'
        f"<tr>{header}</tr>\n{rows}</table></div>\n"
    )


def _text(text: str) -> str:
    """Return text for the page; names of classes and files are anybody's.

    What does not print is shown as its escape: HTML's own escapes leave it to turn the direction of
    the text, or to be no UTF-8.
    """
    return escape(printable(text))
