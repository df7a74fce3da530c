"""Figures: a measure over dims, and a measure over the cost of a search.

They are drawn on matplotlib's `Figure` and not by pyplot: no global state, no display.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

_BLUE, _ORANGE, _GREY = "#1f6feb", "#d9730d", "#8b949e"
_COLOURS = (
    *(_BLUE, "#cf222e", "#1a7f37", "#8250df", "#9a6700"),
    *("#0a7a8f", "#57606a", "#bf3989", "#24292f", "#54aeff"),
)
_MARKERS = "osD^vPXh<>"
_LEGEND_COLUMNS, _LEGEND_ROW = 2, 0.21  # inches
_STARS = (_ORANGE, "#6639ba", "#116329", "#a40e26", "#4d2d00")
_IN_UNITS = ("mae", "rmse")  # measures that are no fractions, however small

Spread = float | Sequence[float]


def plot_accuracy(
    accuracy_by_dim: Mapping[int, float], adaptive: tuple[float, float] | None, path: str | Path
) -> None:
    """Draw accuracy over dims, with adaptive classification as a star at its expected dim.

    Args:
        accuracy_by_dim: Accuracy (a fraction) of every dim alone.
        adaptive: Expected dim and accuracy of the cascade; None leaves it out.
        path: File to write; its suffix chooses the format (.png, .svg).

    Raises:
        ValueError: If no method has a dim.

    Examples:
        >>> plot_accuracy({8: 0.66, 16: 0.73, 32: 0.75}, (12.5, 0.75), "accuracy.svg")
    """
    stars = {} if adaptive is None else {f"adaptive: {adaptive[0]:.1f} dims on average": adaptive}
    plot_by_dim(
        {"one dim for every row": accuracy_by_dim},
        path,
        stars,
        title="Accuracy by dim",
        measure="top-1 accuracy",
    )


def plot_by_dim(
    lines: Mapping[str, Mapping[int, Spread]],
    path: str | Path,
    stars: Mapping[str, tuple[float, float]] | None = None,
    title: str = "",
    measure: str = "top-1 accuracy",
    percent: bool | None = None,
) -> None:
    """Draw a measure over dims, one line per method.

    Args:
        lines: Method to dim to a number, or to one per seed: their mean is drawn, with a bar of
            one standard deviation to each side. A method without dims is not drawn but uses up its
            colour, so that the same methods have the same colours in several figures.
        path: File to write; its suffix chooses the format (.png, .svg).
        stars: Name to an expected dim and a number, for methods that mix dims.
        title: Of the figure.
        measure: Name of what the numbers measure.
        percent: Whether the numbers are fractions, drawn in percent. None means that they are,
            unless one lies outside -1..1, or `measure` or a line is called mae or rmse.

    Raises:
        ValueError: If no method has a dim.

    Examples:
        >>> plot_by_dim({"MRL": {8: [0.65, 0.67], 16: 0.73}, "FF": {8: 0.6, 16: 0.7}}, "top1.svg")
    """
    _check_lines(lines)
    scale = 100 if (_are_fractions(lines, measure) if percent is None else percent) else 1
    figure, axes = _figure(title, "dim (log scale)", f"{measure}, %" if scale == 100 else measure)
    dims = sorted({dim for by_dim in lines.values() for dim in by_dim})
    axes.set_xscale("log", base=2)
    axes.set_xticks(dims, [str(dim) for dim in dims])
    for name, by_dim, style in _styled(lines):
        own_dims = sorted(by_dim)
        values = [scale * np.atleast_1d(by_dim[dim]) for dim in own_dims]
        axes.errorbar(
            own_dims,
            [float(value.mean()) for value in values],
            yerr=[float(value.std(ddof=1)) if len(value) > 1 else 0.0 for value in values],
            markersize=5,
            capsize=2 if any(len(value) > 1 for value in values) else 0,
            label=name,
            **style,
        )
    _add_stars(axes, stars or {}, scale)
    _save(figure, axes, path)


def _are_fractions(lines: Mapping[str, Mapping[int, Spread]], measure: str) -> bool:
    numbers = [np.atleast_1d(number) for by_dim in lines.values() for number in by_dim.values()]
    has_units = any(word in _IN_UNITS for name in (measure, *lines) for word in name.split())
    return not has_units and bool((np.abs(np.concatenate(numbers)) <= 1).all())


def plot_retrieval(
    exhaustive: Mapping[int, tuple[float, float]],
    funnel: tuple[float, float] | None,
    path: str | Path,
) -> None:
    """Draw retrieval quality over cost, for exhaustive search at each dim and for a funnel.

    Args:
        exhaustive: Dim to multiply-adds per query and map10 (a fraction).
        funnel: The same two numbers of the funnel; None leaves it out.
        path: File to write; its suffix chooses the format (.png, .svg).

    Raises:
        ValueError: If no method has a dim.

    Examples:
        >>> plot_retrieval({8: (8e3, 0.57), 16: (16e3, 0.63)}, (9e3, 0.63), "retrieval.svg")
    """
    name = "exhaustive search at one dim"
    plot_by_cost({name: exhaustive}, path, {} if funnel is None else {"funnel": funnel})


def plot_by_cost(
    lines: Mapping[str, Mapping[int, tuple[float, float]]],
    path: str | Path,
    stars: Mapping[str, tuple[float, float]] | None = None,
    title: str = "Retrieval",
    measure: str = "map10",
    percent: bool | None = None,
) -> None:
    """Draw a measure over multiply-adds per query, one line per method.

    Args:
        lines: Method to dim to multiply-adds and a number; a method without dims is not drawn
            but uses up its colour.
        path: File to write; its suffix chooses the format (.png, .svg).
        stars: Name to multiply-adds and a number, for methods that mix dims.
        title: Of the figure.
        measure: Name of what the numbers measure.
        percent: As for `plot_by_dim`.

    Raises:
        ValueError: If no method has a dim.

    Examples:
        >>> plot_by_cost({"MRL": {8: (8e3, 0.57), 16: (16e3, 0.63)}}, "map10.png")
    """
    _check_lines(lines)
    numbers = {
        name: {dim: number for dim, (_, number) in by_dim.items()} for name, by_dim in lines.items()
    }
    scale = 100 if (_are_fractions(numbers, measure) if percent is None else percent) else 1
    label = f"{measure}, %" if scale == 100 else measure
    figure, axes = _figure(title, "multiply-adds per query (log scale)", label)
    axes.set_xscale("log")
    costs = sorted({cost for by_dim in lines.values() for cost, _ in by_dim.values()})
    axes.set_xticks(costs, [_short(cost) for cost in costs])
    axes.minorticks_off()
    axes.margins(y=0.12)
    for name, by_dim, style in _styled(lines):
        points = [by_dim[dim] for dim in sorted(by_dim)]
        axes.plot(
            [cost for cost, _ in points],
            [scale * number for _, number in points],
            label=name,
            **style,
        )
    # The dims are written at one line; the other lines have them at the same costs.
    for dim, (cost, number) in next(filter(None, lines.values())).items():
        axes.annotate(
            str(dim),
            (cost, scale * number),
            textcoords="offset points",
            xytext=(0, -14),
            ha="center",
            color=_GREY,
        )
    _add_stars(axes, stars or {}, scale)
    _save(figure, axes, path)


def plot_cascade(
    fixed: Mapping[str, Mapping[int, tuple[float, float]]],
    adaptive: tuple[float, float],
    fractions: Mapping[str, float],
    path: str | Path,
    title: str = "Adaptive classification",
) -> None:
    """Draw accuracy over cost for every fixed choice and a cascade, and where its rows stop.

    Args:
        fixed: Exit to dim to multiply-adds of a row and accuracy (a fraction): what it costs to ask
            every row at that exit and dim. An exit without dims is not drawn but uses up its
            colour.
        adaptive: Mean multiply-adds of a row under the cascade, and its accuracy.
        fractions: The share of the rows that stop at each stage, by its name, first to last.
        path: File to write; its suffix chooses the format (.png, .svg).
        title: Of the figure.

    Raises:
        ValueError: If no exit has a dim.

    Examples:
        >>> plot_cascade(
        ...     {"early": {8: (1e4, 0.7), 64: (1.1e4, 0.8)}, "last": {64: (1e6, 0.95)}},
        ...     (3e5, 0.948),
        ...     {"early, 64 dims": 0.7, "last, 64 dims": 0.3},
        ...     "cascade.png",
        ... )
    """
    _check_lines(fixed)
    figure, axes, bars = _figure(
        title, "multiply-adds per row (log scale)", "top-1 accuracy, %", columns=2
    )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda cost, _: _short(cost))
    for exit_, by_dim, style in _styled(fixed):
        costs, accuracy = zip(*(by_dim[dim] for dim in sorted(by_dim)), strict=True)
        percent = [100 * own for own in accuracy]
        label = f"every row at {exit_}"
        axes.plot(costs, percent, linestyle="", markersize=5, label=label, **style)
        # The dims of an exit cost nearly the same: the best is written, and the others are below.
        best = max(by_dim, key=lambda dim: (by_dim[dim][1], -dim))
        cost, height = by_dim[best]
        axes.annotate(
            f"dim {best}",
            (cost, 100 * height),
            textcoords="offset points",
            xytext=(0, 7),
            ha="center",
            color=_GREY,
        )
    axes.margins(x=0.12, y=0.12)
    _add_stars(axes, {"adaptive": adaptive}, 100)
    names = list(fractions)
    drawn = bars.barh(names, [100 * fractions[name] for name in names], color=_ORANGE)
    bars.bar_label(drawn, [f"{100 * fractions[name]:.0f}%" for name in names], padding=3)
    bars.invert_yaxis()
    bars.set_xlim(0, 100)
    bars.set_xlabel("rows that stop there, %")
    bars.set_title("Where the rows stop")
    _save(figure, axes, path)


def _styled(lines: Mapping[str, Any]) -> Iterator[tuple[str, Any, dict[str, str]]]:
    """Name, values by dim, colour and marker of every line that is drawn."""
    styles = zip(cycle(_COLOURS), cycle(_MARKERS), strict=False)
    for (name, by_dim), (colour, marker) in zip(lines.items(), styles, strict=False):
        if by_dim:
            yield name, by_dim, {"color": colour, "marker": marker}


def _check_lines(lines: Mapping[str, Mapping[int, Any]]) -> None:
    if not any(lines.values()):
        raise ValueError(
            "A picture needs a method with at least one dim. "
            f"Received: {dict(lines)}. "
            "Measure one, and give its numbers by dim."
        )


def _add_stars(axes: Any, stars: Mapping[str, tuple[float, float]], scale: float) -> None:
    for (name, (x, y)), colour in zip(stars.items(), cycle(_STARS), strict=False):
        axes.plot(
            [x], [scale * y], color=colour, marker="*", markersize=16, linestyle="", label=name
        )


def _short(count: float) -> str:
    """A count in three digits at most: 950, 7.2k, 57k, 2.6G."""
    for unit in ("", "k", "M", "G"):
        if count < 1000 or unit == "G":
            break
        count /= 1000
    return f"{count:.1f}{unit}" if unit and count < 10 else f"{count:.0f}{unit}"


def _figure(title: str, x: str, y: str, columns: int = 1) -> tuple[Any, ...]:
    """Return a figure and its axes from left to right; the first have the title and the labels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 + 3.2 * columns, 4.0), layout="constrained")
    axes, *others = figure.subplots(1, columns, squeeze=False, width_ratios=(2, 1)[:columns])[0]
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color="#d0d7de", linewidth=0.6)
    return figure, axes, *others


def _save(figure: Any, axes: Any, path: str | Path) -> None:
    # The legend stands beneath the axes: inside them it could hide a line or a star.
    handles, _ = axes.get_legend_handles_labels()
    rows = -(-len(handles) // _LEGEND_COLUMNS)
    figure.set_figheight(figure.get_figheight() + _LEGEND_ROW * rows)
    figure.legend(loc="outside lower center", ncols=_LEGEND_COLUMNS, frameon=False)
    figure.savefig(path, dpi=150)
