"""The page of the benchmark on texts, recomputed from its numbers; its parts, on a few lines."""

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE, RESULTS = (ROOT / "docs/benchmarks" / name for name in ("text.md", "text.json"))


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def rows_after(line: str) -> list[list[str]]:
    """The cells of the table whose head is `line`, without the head."""
    lines = PAGE.read_text().splitlines()
    start = lines.index(line) + 2
    rows = []
    for own in lines[start:]:
        if not own.startswith("|"):
            break
        rows.append([cell.strip() for cell in own.strip("|").split("|")])
    return rows


def test_the_page_says_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    from text import show

    results: dict[str, Any] = json.loads(RESULTS.read_text())
    head = "| dim | nDCG@10 before | after | gain | recall@10 before | after | gain |"
    show(results["main"])
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    expected = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed[2:]]
    assert rows_after(head) == expected
    ratios = [float(row[2]) / float(row[1]) for row in expected]
    assert ratios == sorted(ratios, reverse=True)
    assert min(ratios) > 1
    by_words = results["main"]["bm25"]
    measures = (f"{by_words[name]:.3f}".lstrip("0") for name in ("ndcg", "recall"))
    sentence = "BM25 on the same queries has nDCG@10 {} and recall@10 {}."
    assert sentence.format(*measures) in PAGE.read_text()


def test_the_page_says_what_the_small_runs_gave() -> None:
    results: dict[str, Any] = json.loads(RESULTS.read_text())
    small = [results[f"small, {backend}"] for backend in ("tensorflow", "jax")]
    assert small[0]["before"] == small[1]["before"]

    def rounded(when: str, dim: str) -> list[str]:
        return [f"{run[when][dim]['ndcg']:.3f}".lstrip("0") for run in small]

    before = [rounded("before", dim)[0] for dim in ("16", "32", "384")]
    after = [rounded("after", dim) for dim in ("16", "32", "384")]
    page = " ".join(PAGE.read_text().split())
    assert (
        f"from {before[0]} before, nDCG@10 at 16 dims goes to {after[0][0]} on TensorFlow and to "
        f"{after[0][1]} on JAX, at 32 from {before[1]} to {after[1][0]} and {after[1][1]}; at 384 "
        f"it stays ({before[2]}, then {after[2][0]} and {after[2][1]})."
    ) in page


def test_one_call_finds_what_two_find() -> None:
    results: dict[str, Any] = json.loads(RESULTS.read_text())["retrieval"]
    assert {*results["share of equal ids"].values()} == {1.0}
    times = results["milliseconds a batch"].items()
    expected = [[name, f"{own['1']:.1f}", f"{own['32']:.1f}"] for name, own in times]
    assert rows_after("| way | 1 text | 32 texts |") == expected


def test_pairs_do_not_name_what_they_look_for(tmp_path: Path) -> None:
    from text import read

    file = tmp_path / "pairs.tsv"
    file.write_text("neuro-tools\tNeuro Tools, and more\nmodel_zoo\tA framework\nno tab\n")
    assert read(file) == [("model zoo", "A framework")]
