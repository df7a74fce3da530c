"""The paper's two pictures: what a dim is worth, and what a search costs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_BLUE, _ORANGE, _GREY = "#1f6feb", "#d9730d", "#8b949e"


def plot_accuracy(
    accuracy_by_dim: Mapping[int, float], adaptive: tuple[float, float] | None, path: str | Path
) -> None:
    """Draw accuracy over dims, and adaptive classification at its expected dim.

    Args:
        accuracy_by_dim: Accuracy (a fraction) of every dim alone.
        adaptive: Expected dim and accuracy of the cascade; None leaves it out.
        path: File to write; its suffix chooses the format (.png, .svg).

    Examples:
        >>> plot_accuracy({8: 0.66, 16: 0.73, 32: 0.75}, (12.5, 0.75), "accuracy.svg")
    """
    dims = sorted(accuracy_by_dim)
    figure, axes = _figure("Accuracy by dim", "dim (log scale)", "top-1 accuracy, %")
    axes.set_xscale("log", base=2)
    axes.set_xticks(dims, [str(dim) for dim in dims])
    axes.plot(
        dims,
        [100 * accuracy_by_dim[dim] for dim in dims],
        color=_BLUE,
        marker="o",
        label="one dim for every row",
    )
    if adaptive is not None:
        expected_dim, accuracy = adaptive
        axes.plot(
            [expected_dim],
            [100 * accuracy],
            color=_ORANGE,
            marker="*",
            markersize=16,
            linestyle="",
            label=f"adaptive: {expected_dim:.1f} dims on average",
        )
    _save(figure, axes, path)


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

    Examples:
        >>> plot_retrieval({8: (8e3, 0.57), 16: (16e3, 0.63)}, (9e3, 0.63), "retrieval.svg")
    """
    figure, axes = _figure("Retrieval", "multiply-adds per query (log scale)", "map10, %")
    axes.set_xscale("log")
    points = [(dim, *exhaustive[dim]) for dim in sorted(exhaustive)]
    axes.set_xticks([cost for _, cost, _ in points], [_short(cost) for _, cost, _ in points])
    axes.minorticks_off()
    axes.margins(y=0.12)
    axes.plot(
        [cost for _, cost, _ in points],
        [100 * quality for _, _, quality in points],
        color=_BLUE,
        marker="o",
        label="exhaustive search at one dim",
    )
    for dim, cost, quality in points:
        axes.annotate(
            str(dim),
            (cost, 100 * quality),
            textcoords="offset points",
            xytext=(0, -14),
            ha="center",
            color=_GREY,
        )
    if funnel is not None:
        axes.plot(
            [funnel[0]],
            [100 * funnel[1]],
            color=_ORANGE,
            marker="*",
            markersize=16,
            linestyle="",
            label="funnel",
        )
    _save(figure, axes, path)


def _short(count: float) -> str:
    """A count in three digits at most: 950, 7.2k, 57k, 2.6G."""
    for unit in ("", "k", "M", "G"):
        if count < 1000 or unit == "G":
            break
        count /= 1000
    return f"{count:.1f}{unit}" if unit and count < 10 else f"{count:.0f}{unit}"


def _figure(title: str, x: str, y: str) -> tuple[Any, Any]:
    # Figure itself, not pyplot: no global state, no display, nothing to close.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color="#d0d7de", linewidth=0.6)
    return figure, axes


def _save(figure: Any, axes: Any, path: str | Path) -> None:
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(path, dpi=150)
