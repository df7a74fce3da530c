"""What the results of a comparison say: sentences, tables, figures, a page."""

import base64
import csv
import json
import math
import os
import re
import xml.etree.ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from keras_mrl.comparison import figures
from keras_mrl.comparison.report import NAMES, findings, html, write_report
from tests.helpers.comparisons import Compared


class Addresses(HTMLParser):
    """Collects what a page would load, and checks that every element is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img"):
            self.open.append(tag)
        assert tag not in ("script", "link", "iframe", "base", "object", "embed")
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plotly is not installed, whatever is."""
    monkeypatch.setattr(figures, "script", lambda: None)


def test_the_report_needs_nothing_but_itself(compared: Compared) -> None:
    page = html(compared.results, compared.out)
    reader = Addresses()
    reader.feed(page)
    assert not reader.open
    assert len(reader.found) == 4
    assert "@import" not in page
    assert "url(" not in page
    for address in reader.found:
        kind, _, data = address.partition(",")
        assert kind == "data:image/svg+xml;base64"
        svg = base64.b64decode(data).decode()
        for element in xml.etree.ElementTree.fromstring(svg).iter():
            for name, value in element.items():
                if name.endswith(("href", "src")):
                    assert value.startswith("#")
        assert all(inner.startswith("#") for inner in re.findall(r"url\(([^)]*)\)", svg))


def test_a_page_shows_names_and_does_no_more(compared: Compared) -> None:
    names = [
        "<script>alert(1)</script>", "</dd></dl><img src=x onerror=alert(1)>", "a&lt;b", "\'\"",
        "\u202egnp.txt", "\x1b[2J\x00\x9b", os.fsdecode(b"a\xff"), "--><!--", "a\nb", "<!DOCTYPE",
    ]  # fmt: skip
    about = {**compared.results["about"], "unseen": names, "command": " ".join(names)}
    page = html({**compared.results, "about": about}, compared.out)
    reader = Addresses()
    reader.feed(page)
    assert not reader.open
    assert len(reader.found) == 4
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 2
    assert not [c for c in page if not c.isprintable() and c != "\n"]
    assert page.encode()


def test_files_that_could_not_be_read_are_in_the_report(compared: Compared) -> None:
    assert "Files that cannot be read" not in html(compared.results, compared.out)
    about = {**compared.results["about"], "unreadable": ["ant/<1>.png (it is none)"]}
    page = html({**compared.results, "about": about}, compared.out)
    fact = "<dt>Files that cannot be read</dt><dd>left out: ant/&lt;1&gt;.png (it is none)</dd>"
    assert fact in page


def test_tables_and_figures_say_the_same_numbers(compared: Compared) -> None:
    out, results = compared.out, compared.results
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    head = {(r["method"], r["dim"]): float(r["value"]) for r in rows if r["measure"] == "top1"}
    for method, by_dim in results["top1"].items():
        for dim, values in by_dim.items():
            assert head[method, dim] == values[0]
    markdown = (out / "results.md").read_text()
    page = (out / "report.html").read_text()
    for dim in ("4", "12"):
        shown = f"{100 * results['top1']['mrl'][dim][0]:.2f}"
        assert f" {shown} |" in markdown
        assert f"<td>{shown}</td>" in page
    for name in ("accuracy", "neighbors", "adaptive", "retrieval"):
        assert imread(out / f"{name}.png").std() > 0.05
    assert [line.count("|") for line in markdown.splitlines() if line.startswith("| MRL |")]
    values = {(r["part"], r["method"], r["dim"], r["measure"]): float(r["value"]) for r in rows}
    for title, part, measure, found in (
        ("Top-5 accuracy of the head, %", "head", "top5", results["top5"]),
        ("Expected calibration error of the head, points", "head", "ece", results["ece"]),
        (
            "Accuracy of a linear probe of the features, trained on 964 training images, %",
            "probe",
            "probe",
            results["probe"],
        ),
        *(
            (
                f"k-NN accuracy (the vote of the 10 nearest), {where}, %",
                part,
                "knn",
                {
                    method: {dim: [scores["knn"]] for dim, scores in by_dim.items()}
                    for method, by_dim in results[part].items()
                },
            )
            for part, where in (("neighbors", "all classes"), ("unseen", "classes never seen"))
        ),
    ):
        table = markdown.partition(f"{title}\n\n")[2].partition("\n\n")[0]
        shown = page.partition(f"<caption>{title}</caption>")[2].partition("</table>")[0]
        for method, by_dim in found.items():
            cells = [f"{100 * by_dim[dim][0]:.2f}" for dim in ("4", "12")]
            assert f"| {NAMES[method]} | {' | '.join(cells)} |" in table
            assert f"<td>{NAMES[method]}</td>" + "".join(f"<td>{c}</td>" for c in cells) in shown
            for dim, (value,) in by_dim.items():
                assert values[part, method, dim, measure] == value
    assert (
        "| FF (a net per dim) |"
        in markdown.partition("k-NN accuracy (the vote")[2]
        .partition("classes never seen, %\n\n")[2]
        .partition("\n\n")[0]
    )


def given(cascade: float, dim: float, map10: float) -> dict[str, Any]:
    """Results in which a cascade is so accurate at so many dims, and a funnel finds so much."""
    split = {
        "accuracy": cascade,
        "full_accuracy": 0.6,
        "ff_accuracy": 0.6,
        "expected_dim": dim,
        "cumulative_dim": dim + 1,
    }
    row = {"kind": "funnel", "dims": [4, 8], "shortlists": [10], "madds": 100, "map10": map10}
    whole = {"kind": "exhaustive", "dims": [8], "shortlists": [], "madds": 900, "map10": 0.5}
    return {
        "verdict": {"best": 0.6, "chance": 0.1, "moved": {}},
        "about": {"images": [0, 1000], "classes": 10},
        "plan": {"dims": [4, 8], "epochs": 9},
        "madds": {"backbone": 900, "head": 100},
        "top1": {"mrl": {"4": [0.5], "8": [0.6]}},
        "cascades": {
            "risk": 0.02,
            "delta": 0.1,
            "splits": {"greedy": [split], "certified": [split], "oracle": [split]},
        },
        "retrieval": {"mrl": {"rows": [whole, row], "chosen": 1}},
    }


def test_a_cascade_that_gains_has_a_sentence_with_its_numbers() -> None:
    greedy, certified, funnel = findings(given(cascade=0.59, dim=5.0, map10=0.5))
    assert "'greedy' stops at 5.0 of 8 dims on average and is 59.00% right" in greedy
    assert "the same net at 4 dims for every row 50.00%" in greedy
    assert "saves 2.50% of the model's multiply-adds" in greedy  # 100 / 1000 x (8 - 6) / 8
    assert "with a chance of 0.9 over" in certified
    assert "in at most 2% of new rows" in certified
    assert "(9.0 times fewer" in funnel


def test_what_gains_nothing_has_no_sentence() -> None:
    assert findings(given(cascade=0.504, dim=5.0, map10=0.4)) == []
    assert findings(given(cascade=0.6, dim=8.0, map10=0.4)) == []


def test_nothing_is_told_of_nets_that_learned_nothing() -> None:
    results = given(cascade=0.59, dim=5.0, map10=0.5)
    assert findings({**results, "verdict": {"best": 0.12, "chance": 0.1, "moved": {}}}) == []


def test_results_are_json_whatever_was_measured(compared: Compared, tmp_path: Path) -> None:
    results = {**compared.results, "minutes": {"mrl": math.nan, "ff": math.inf}}
    write_report(results, tmp_path)
    text = (tmp_path / "results.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["minutes"] == {"mrl": None, "ff": None}
