"""The figures of a report that answer the pointer."""

import json
import re
import sys
from pathlib import Path

import pytest

from keras_mrl.comparison import figures
from keras_mrl.comparison.report import NAMES, html
from keras_mrl_serving import CascadePolicy, FunnelSchedule
from tests.helpers.comparisons import Compared


def test_a_click_gives_what_export_and_search_take(
    compared: Compared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "script", lambda: "/* library */")
    page = html(compared.results, compared.out)
    assert "<img" not in page
    assert "<script>/* library */</script>" in page
    text = re.search(r"const figures = (.*?);\nfor", page, re.DOTALL)
    assert text is not None
    assert "<" not in text[1]
    drawn = json.loads(text[1])
    assert set(drawn) == {"accuracy", "neighbors", "adaptive", "retrieval"}
    clicked = [
        json.loads(chosen)
        for line in (*drawn["adaptive"]["data"], *drawn["retrieval"]["data"])
        for chosen in line.get("customdata", [])
        if chosen
    ]
    policies = [CascadePolicy.from_json(chosen) for chosen in clicked if "stages" in chosen]
    schedules = [FunnelSchedule.from_json(chosen) for chosen in clicked if "shortlists" in chosen]
    assert len(policies) + len(schedules) == len(clicked)
    assert len(policies) == len(compared.results["cascades"]["policies"])
    assert schedules
    lines = drawn["accuracy"]["data"]
    assert [line["name"] for line in lines] == [NAMES[name] for name in compared.results["top1"]]
    for line in drawn["neighbors"]["data"]:
        same = [other["line"] for other in lines if other["name"] == line["name"]]
        assert same in ([], [line["line"]])  # a method has its colour in every figure
    for figure in drawn.values():  # names stand above the plot, and cover no number of the axis
        assert figure["layout"]["legend"]["y"] > 1
        assert figure["layout"]["legend"]["yanchor"] == "bottom"
    (greedy,) = (line for line in drawn["adaptive"]["data"] if line["name"] == "cascade, greedy")
    assert "% of rows stop at 12" in greedy["hovertemplate"]


def test_the_library_is_read_and_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "find_spec", lambda _: None)
    assert figures.script() is None
    package = tmp_path / "plotly"
    (package / "package_data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    (package / "package_data" / "plotly.min.js").write_text("draw()")
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "plotly", raising=False)
    assert figures.script() == "draw()"
