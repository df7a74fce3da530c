"""What the results of a comparison say: sentences, tables, figures, a page."""

import base64
import csv
import json
import math
import os
import re
import xml.etree.ElementTree
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.image import imread

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


def test_the_report_needs_nothing_but_itself(compared: Compared) -> None:
    page = (compared.out / "report.html").read_text()
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


@pytest.fixture
def compared_text() -> Callable[..., list[str]]:
    """The findings of results in which MRL is ahead of the separate nets by so much."""

    def text(
        ahead: float, images: int = 100_000, chance: float = 0.25, first: float | None = None
    ) -> list[str]:
        separate = {"4": [0.5], "8": [0.6]}
        mrl = {dim: [values[0] + ahead] for dim, values in separate.items()}
        if first is not None:
            mrl["4"] = [0.5 + first]
        scores = {dim: {"nn1": values[0]} for dim, values in separate.items()}
        split = {
            "accuracy": 0.6,
            "full_accuracy": 0.6,
            "ff_accuracy": 0.6,
            "expected_dim": 5.0,
            "cumulative_dim": 6.0,
        }
        level = {part: {"accuracy": 0.0, "expected_dim": 0.0} for part in ("taught", "judged")}
        return findings(
            {
                "about": {"images": [0, images], "classes": 1 / chance},
                "plan": {"dims": [4, 8]},
                "madds": {"backbone": 900, "head": 100},
                "top1": {"mrl": mrl, "ff": separate, "svd": separate, "rand_lp": separate},
                "neighbors": {"mrl": scores, "pca": scores, "first_coordinates": scores},
                "cascades": {
                    "refused": "",
                    "risk": 0.02,
                    "delta": 0.1,
                    "splits": {"greedy": [split], "certified": [split], "oracle": [split]},
                    "search_over_greedy": [level],
                },
                "retrieval": {},
            }
        )

    return text


def test_every_sentence_of_the_findings_carries_its_number(
    compared_text: Callable[..., list[str]],
) -> None:
    better, worse = compared_text(0.02), compared_text(-0.02)
    # Twice the standard deviation of a difference: 2 sqrt(2 x .6 x .4 / 100,000).
    assert better[0].startswith("Differences below 0.4 points are noise among 100,000 test images")
    assert "costs no more than a point: one net replaces 2." in better[0]
    assert "MRL is 2.0 points above FF" in better[0]
    assert "costs more than a point here." in worse[0]
    assert "MRL is 2.0 points below FF" in worse[0]
    assert all(re.search(r"\d", sentence) for sentence in better)


def test_no_verdict_is_given_where_noise_or_chance_would_give_it(
    compared_text: Callable[..., list[str]],
) -> None:
    few = compared_text(-0.02, images=100)
    assert "Differences below 13.9 points are noise" in few[0]
    assert "No difference is seen on average." in few[0]
    untrained = compared_text(0.0, chance=0.4)
    assert untrained[0].startswith("Nothing can be said: the best separate net is 60.0% right")
    uneven = compared_text(0.02, first=-0.03)
    assert "no more than a point on average, but 3.0 at one dim." in uneven[0]


def test_a_cascade_saves_a_share_of_the_head(compared_text: Callable[..., list[str]]) -> None:
    (sentence,) = (line for line in compared_text(0.0) if line.startswith("The cascade 'greedy'"))
    assert "at 5.0 of 8 dims on average (1.6 times fewer)" in sentence
    assert "the same net at 8 dims for every row 60.00%" in sentence
    assert "saves 2.50% of the model's multiply-adds" in sentence  # 100 / 1000 x (8 - 6) / 8
    (certified,) = (line for line in compared_text(0.0) if "'certified'" in line)
    assert "with a chance of 0.9 over" in certified
    assert "in at most 2% of new rows" in certified


def test_results_are_json_whatever_was_measured(compared: Compared, tmp_path: Path) -> None:
    results = {**compared.results, "minutes": {"mrl": math.nan, "ff": math.inf}}
    write_report(results, tmp_path)
    text = (tmp_path / "results.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["minutes"] == {"mrl": None, "ff": None}
