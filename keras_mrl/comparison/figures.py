"""The figures of a report that answer: a point under the pointer tells its numbers.

A click on a cascade or a funnel shows its policy or schedule as JSON. Plotly draws them; its
JavaScript stands within the page, so that the page opens offline and asks nobody.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

_LAYOUT: dict[str, Any] = {
    "font": {"family": "system-ui, sans-serif", "size": 13},
    "margin": {"l": 60, "r": 20, "t": 10, "b": 60},
    "hovermode": "closest",
    # Above the plot: below it, rows of names would cover the numbers of the axis.
    "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom"},
}
_CLICK = """
for (const [id, figure] of Object.entries(figures)) {
  const place = document.getElementById(id);
  Plotly.newPlot(place, figure.data, figure.layout,
    {responsive: true, displaylogo: false, displayModeBar: false});
  place.on("plotly_click", event => {
    const chosen = event.points[0].customdata;
    const shown = document.getElementById("chosen");
    if (chosen) { shown.textContent = chosen; shown.scrollIntoView({block: "nearest"}); }
  });
}
"""


def script() -> str | None:
    """Return Plotly's JavaScript; None where Plotly is not installed.

    The package is not imported: that takes a second, and its Python draws nothing here.
    """
    found = find_spec("plotly")
    for folder in (found and found.submodule_search_locations) or ():
        file = Path(folder) / "package_data" / "plotly.min.js"
        if file.is_file():
            return file.read_text("utf-8")
    return None


def interactive(results: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """Return the figures as a part of a page; empty where Plotly is not installed.

    Args:
        results: Of a comparison.
        names: What methods are called.
    """
    library = script()
    if library is None:
        return ""
    figures = {
        "accuracy": _by_dim(results["top1"], names, "top-1 accuracy, %"),
        "neighbors": _by_dim(
            {
                name: {dim: [scores["nn1"]] for dim, scores in by_dim.items()}
                for name, by_dim in results["neighbors"].items()
            },
            names,
            "1-NN accuracy, %",
        ),
        "adaptive": _adaptive(results),
        "retrieval": _retrieval(results["retrieval"], names),
    }
    # A cut head of few dims is far below: drawn whole it would lay the other lines on each other.
    trained = [
        line["y"]
        for line in figures["accuracy"]["data"]
        if line["name"] in {names[name] for name in ("mrl", "mrl_e", "ff")}
    ]
    least, most = np.min(trained), np.max(trained)
    room = 0.1 * max(most - least, 1)
    figures["accuracy"]["layout"]["yaxis"]["range"] = [least - 2 * room, most + room]
    places = "".join(
        f'<h2>{_TITLES[name]}</h2>\n<div class="plot" id="{name}"></div>\n' for name in figures
    )
    # Within a script no text may look like its end.
    text = json.dumps(figures).replace("<", "\\u003c")
    return (
        "<p>Click a name in grey to draw it; two clicks in a figure show all of a line.</p>\n"
        f"{places}"
        "<p>A cascade asks the narrowest dim first and a wider one where that is unsure; its dims "
        "are the mean. 'greedy' chooses its thresholds dim by dim, a search all together, "
        "'certified' so that few new rows are wrong by it alone; the oracle knows which dim is "
        "right, so no cascade can be better. A search of two stages, or a funnel of several, finds "
        "a shortlist by few dims and compares it by more; map10 is the mean average precision of "
        "the ten nearest. Cascades are the mean of ten splits, and the policy is that of the "
        "first; it is what <code>keras-mrl export --policy FILE</code> takes.</p>\n"
        '<pre id="chosen">Click a cascade or a funnel: its JSON appears here.</pre>\n'
        f"<script>{library}</script>\n<script>const figures = {text};{_CLICK}</script>\n"
    )


_TITLES = {
    "accuracy": "Accuracy of the head",
    "neighbors": "Nearest neighbours",
    "adaptive": "Adaptive classification",
    "retrieval": "Retrieval",
}


def _figure(data: list[dict[str, Any]], x: dict[str, Any], y: str) -> dict[str, Any]:
    layout = {**_LAYOUT, "xaxis": x, "yaxis": {"title": {"text": y}}}
    return {"data": data, "layout": layout}


def _by_dim(by_method: Mapping[str, Any], names: Mapping[str, str], measure: str) -> dict[str, Any]:
    data = []
    for name, by_dim in by_method.items():
        dims = sorted(map(int, by_dim))
        values = [100 * float(np.mean(by_dim[str(dim)])) for dim in dims]
        data.append(
            {
                "x": dims,
                "y": values,
                "name": names[name],
                "mode": "lines+markers",
                "line": {"color": _COLOURS[list(names).index(name) % len(_COLOURS)]},
                "hovertemplate": "%{y:.2f}% at %{x} dims",
                **({"visible": "legendonly"} if name in _HIDDEN else {}),
            }
        )
    return _figure(data, _axis(by_method), measure)


# A method has its colour in every figure.
_COLOURS = (
    *("#1f77b4", "#ff7f0e", "#2ca02c", "#bcbd22", "#7f7f7f"),
    *("#8c564b", "#e377c2", "#17becf", "#d62728", "#9467bd"),
)
_HIDDEN = ("slimmable", "mrl_boosted", "rand_lp", "first_coordinates")  # until they are clicked


def _axis(by_method: Mapping[str, Any]) -> dict[str, Any]:
    dims = sorted({int(dim) for by_dim in by_method.values() for dim in by_dim})
    return {"title": {"text": "dims"}, "type": "log", "tickvals": dims, "ticktext": dims}


def _adaptive(results: Mapping[str, Any]) -> dict[str, Any]:
    fixed = results["top1"]["mrl"]
    data: list[dict[str, Any]] = [
        {
            "x": [int(dim) for dim in fixed],
            "y": [100 * values[0] for values in fixed.values()],
            "name": "one dim for every row",
            "mode": "lines+markers",
            "hovertemplate": "%{y:.2f}% at %{x} dims",
        }
    ]
    for name, splits in results["cascades"]["splits"].items():
        accuracy, dim = (
            sum(split[measure] for split in splits) / len(splits)
            for measure in ("accuracy", "expected_dim")
        )
        policy = results["cascades"]["policies"].get(name)
        shares = _shares(policy) if policy else ""
        data.append(
            {
                "x": [dim],
                "y": [100 * accuracy],
                "name": _ORACLE if name == "oracle" else f"cascade, {name}",
                "mode": "markers",
                "marker": {"size": 12, "symbol": "star"},
                "hovertemplate": f"%{{y:.2f}}% at %{{x:.1f}} dims{shares}",
                "customdata": [json.dumps(policy["policy"], indent=1)] if policy else [None],
            }
        )
    return _figure(data, _axis({"mrl": fixed}), "top-1 accuracy, %")


_ORACLE = "oracle: knows which dim is right"


def _shares(policy: Mapping[str, Any]) -> str:
    stops = zip(policy["dims"], policy["fractions"], strict=True)
    return "<br>" + "<br>".join(f"{100 * share:.0f}% of rows stop at {dim}" for dim, share in stops)


def _retrieval(retrieval: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    data = [line for name, result in retrieval.items() for line in _searches(names[name], result)]
    axis = {"title": {"text": "multiply-adds per query"}, "type": "log"}
    return _figure(data, axis, "map10, %")


def _searches(name: str, result: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for kind in ("exhaustive", "two stages", "funnel"):
        rows = [row for row in result["rows"] if row["kind"] == kind]
        schedules = [{key: row[key] for key in ("dims", "shortlists", "k")} for row in rows]
        if rows:
            yield {
                "x": [row["madds"] for row in rows],
                "y": [100 * row["map10"] for row in rows],
                "name": f"{name}, {kind}",
                "mode": "lines+markers" if kind == "exhaustive" else "markers",
                "text": [" -> ".join(map(str, row["dims"])) for row in rows],
                "hovertemplate": "%{text}: %{y:.2f}%, %{x:,} multiply-adds",
                "customdata": [json.dumps(schedule, indent=1) for schedule in schedules],
            }
