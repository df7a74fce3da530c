import re
import xml.etree.ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from keras_mrl.evaluation import (
    plot_accuracy,
    plot_by_cost,
    plot_by_dim,
    plot_cascade,
    plot_retrieval,
)
from tests.helpers.laws import exactly

BLUE, ORANGE = "#1f6feb", "#d9730d"
ACCURACY = {8: 0.66, 16: 0.73, 32: 0.75, 64: 0.76}
RETRIEVAL = {8: (8e3, 0.57), 16: (16e3, 0.63), 32: (32e3, 0.64)}
EXITS = {"early": {8: (1e4, 0.7), 64: (1.1e4, 0.8)}, "last": {16: (1e6, 0.9), 64: (1e6, 0.95)}}
STOPS = {"early, 64": 0.7, "last, 64": 0.3}


def draw_accuracy(path: Path, star: bool = True) -> None:
    plot_accuracy(ACCURACY, (12.5, 0.755) if star else None, path)


def draw_retrieval(path: Path, star: bool = True) -> None:
    plot_retrieval(RETRIEVAL, (9e3, 0.638) if star else None, path)


plots = pytest.mark.parametrize("draw", [draw_accuracy, draw_retrieval])


def count(path: Path, colour: str) -> int:
    """How many pixels of a PNG have this colour."""
    pixels = np.round(255 * matplotlib.image.imread(path)[..., :3]).astype(int)
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.abs(pixels - wanted) <= 2).all(-1).sum())


@plots
def test_the_png_shows_a_line_and_a_star(draw: Callable[..., None], tmp_path: Path) -> None:
    with_star, without = tmp_path / "with.png", tmp_path / "without.png"
    draw(with_star)
    draw(without, star=False)
    height, width, _ = matplotlib.image.imread(with_star).shape
    assert height > 400
    assert width > 600
    assert count(with_star, BLUE) > 500
    assert count(without, BLUE) > 500
    assert count(with_star, ORANGE) > 100
    assert count(without, ORANGE) == 0


@plots
def test_the_svg_parses_and_has_every_point(draw: Callable[..., None], tmp_path: Path) -> None:
    path = tmp_path / "plot.svg"
    draw(path)
    root = xml.etree.ElementTree.parse(path).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    text = path.read_text()
    assert BLUE in text
    assert ORANGE in text
    marks = [u for u in root.iter("{http://www.w3.org/2000/svg}use") if BLUE in u.get("style", "")]
    points = len(ACCURACY) if draw is draw_accuracy else len(RETRIEVAL)
    assert len(marks) == points + 1  # the legend has one of its own


@plots
def test_a_path_may_be_text_and_an_old_plot_is_replaced(
    draw: Callable[..., None], tmp_path: Path
) -> None:
    path = tmp_path / "plot.png"
    path.write_text("old")
    draw(f"{path}")
    assert count(path, BLUE) > 500


def test_the_order_of_the_dims_does_not_matter(tmp_path: Path) -> None:
    one, other = tmp_path / "one.png", tmp_path / "other.png"
    plot_accuracy(ACCURACY, None, one)
    plot_accuracy(dict(reversed(ACCURACY.items())), None, other)
    assert one.read_bytes() == other.read_bytes()


def test_one_dim_is_enough(tmp_path: Path) -> None:
    plot_accuracy({8: 0.66}, None, tmp_path / "one.png")
    plot_retrieval({8: (8e3, 0.57)}, None, tmp_path / "two.png")
    assert all(count(path, BLUE) > 20 for path in tmp_path.iterdir())


def test_a_cascade_is_drawn_among_the_fixed_choices_with_the_rows_it_stops(tmp_path: Path) -> None:
    path = tmp_path / "cascade.svg"
    plot_cascade(EXITS, (3e5, 0.948), STOPS, path)
    root = xml.etree.ElementTree.parse(path).getroot()
    marks = [u.get("style", "") for u in root.iter("{http://www.w3.org/2000/svg}use")]
    for colour in (BLUE, "#cf222e"):  # an exit each: its two dims, and its row of the legend
        assert sum(colour in style for style in marks) == 3
    bars = [
        p
        for p in root.iter("{http://www.w3.org/2000/svg}path")
        if ORANGE in p.get("style", "") and p.get("clip-path")
    ]
    assert len(bars) == len(STOPS)
    (first, first_top), (second, second_top) = map(width_and_top, bars)
    assert first / second == pytest.approx(0.7 / 0.3, rel=1e-3)
    assert first_top < second_top  # the first stage stands above the second
    written = [e.strip() for e in re.findall("<!-- (.*?) -->", path.read_text())]
    assert {"70%", "30%", "every row at early", "every row at last", "adaptive"} <= set(written)
    assert [own for own in written if own.startswith("dim ")] == ["dim 64", "dim 64"]


def width_and_top(bar: xml.etree.ElementTree.Element) -> tuple[float, float]:
    """How wide the bar is, and how far its top is below the upper edge of the figure."""
    corners = re.findall(r"[ML] (\S+) (\S+)", bar.get("d", ""))
    xs, ys = ([float(own) for own in along] for along in zip(*corners, strict=True))
    return max(xs) - min(xs), min(ys)


def test_the_narrowest_of_equally_good_dims_is_written(tmp_path: Path) -> None:
    path = tmp_path / "cascade.svg"
    plot_cascade({"last": {8: (1e4, 0.9), 64: (2e4, 0.9)}}, (1e4, 0.9), STOPS, path)
    assert "<!-- dim 8 -->" in path.read_text()
    assert "<!-- dim 64 -->" not in path.read_text()


def test_a_cascade_without_a_fixed_choice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="A picture needs a method with at least one dim"):
        plot_cascade({"last": {}}, (1e4, 0.9), STOPS, tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("lines", [{}, {"MRL": {}, "FF": {}}])
@pytest.mark.parametrize("draw", [plot_by_dim, plot_by_cost])
def test_a_picture_of_nothing_is_refused(
    draw: Callable[..., None], lines: Any, tmp_path: Path
) -> None:
    sentence = (
        f"A picture needs a method with at least one dim. Received: {lines}. "
        "Measure one, and give its numbers by dim."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        draw(lines, tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_the_dims_are_written_to_the_first_method_that_has_some(tmp_path: Path) -> None:
    plain, empty = tmp_path / "plain.png", tmp_path / "empty.png"
    plot_by_cost({"A": {8: (8e3, 0.57), 16: (16e3, 0.63)}, "B": {}}, plain)
    plot_by_cost({"B": {}, "A": {8: (8e3, 0.57), 16: (16e3, 0.63)}}, empty)
    assert count(empty, "#8b949e") >= count(plain, "#8b949e") > 0


def is_number(text: str) -> bool:
    return re.fullmatch(r"[\u2212-]?[\d.]+", text) is not None


@pytest.mark.parametrize(
    ("lines", "arguments", "is_percent"),
    [
        ({"MRL": {8: 0.6, 16: 0.7}}, {}, True),
        ({"spearman": {8: -0.1, 16: 0.7}}, {}, True),
        ({"mae": {8: 0.6, 16: 0.5}, "r2": {8: 0.1, 16: 0.2}}, {}, False),
        ({"MRL": {8: 0.6, 16: 0.5}}, {"measure": "rmse in kg"}, False),
        ({"MRL": {8: [7.5, 7.0], 16: 6.0}}, {"measure": "error"}, False),
        ({"MRL": {8: 0.6, 16: 0.5}}, {"measure": "error", "percent": False}, False),
        ({"mae": {8: 0.6, 16: 0.5}}, {"percent": True}, True),
    ],
)
def test_fractions_are_drawn_in_percent_and_values_as_they_are(
    lines: Any, arguments: dict[str, Any], is_percent: bool, tmp_path: Path
) -> None:
    path = tmp_path / "x.svg"
    plot_by_dim(lines, path, {"cascade": (12.0, 0.65)}, **arguments)
    texts = re.findall(r"<!-- (.+?) -->", path.read_text())
    measure = arguments.get("measure", "top-1 accuracy")
    assert (f"{measure}, %" if is_percent else measure) in texts
    numbers = [float(text.replace("\u2212", "-")) for text in texts if is_number(text)]
    assert (max(numbers) > 16) is is_percent  # the dims are numbers, too


@pytest.mark.parametrize(
    ("number", "arguments", "label"),
    [
        (0.5, {}, "map10, %"),
        (0.5, {"measure": "ndcg@10"}, "ndcg@10, %"),
        (0.5, {"measure": "mae"}, "mae"),
        (7.5, {"measure": "error in kg"}, "error in kg"),
        (0.5, {"measure": "error", "percent": False}, "error"),
    ],
)
def test_by_cost_as_by_dim(
    number: float, arguments: dict[str, Any], label: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.svg"
    plot_by_cost({"MRL": {8: (900.0, number)}}, path, {"funnel": (950.0, number)}, **arguments)
    texts = re.findall(r"<!-- (.+?) -->", path.read_text())
    assert label in texts
    heights = [
        float(text.replace("\u2212", "-")) for text in texts if is_number(text) and text != "900"
    ]
    assert (max(heights) > 16) is label.endswith("%")
