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
    points = {row[0]: float(row[3]) for row in expected}
    assert sorted(points, key=points.__getitem__)[-2:] == ["32", "16"]
    assert points["8"] < min(points["64"], points["128"])
    by_words = results["main"]["bm25"]
    measures = (f"{by_words[name]:.3f}".lstrip("0") for name in ("ndcg", "recall"))
    sentence = "BM25 on the same queries has nDCG@10 {} and recall@10 {}."
    assert sentence.format(*measures) in PAGE.read_text()


def test_the_page_says_what_the_small_runs_gave() -> None:
    results: dict[str, Any] = json.loads(RESULTS.read_text())
    small = [results[f"small, {backend}"] for backend in ("torch", "tensorflow", "jax")]
    before = small[0]["before"]
    assert [run["before"] for run in small] == [before] * 3
    rows = {
        dim: [values["ndcg"], *(run["after"][dim]["ndcg"] for run in small)]
        for dim, values in before.items()
    }
    expected = [[dim, *(f"{value:.3f}" for value in values)] for dim, values in rows.items()]
    assert rows_after("| dim | before | PyTorch | TensorFlow | JAX |") == expected
    apart = max(max(values[1:]) - min(values[1:]) for values in rows.values())
    assert f"differ by {apart:.3f}".replace("0.", ".") + " at most" in PAGE.read_text()


def test_one_call_finds_what_two_find() -> None:
    results: dict[str, Any] = json.loads(RESULTS.read_text())["retrieval"]
    assert {*results["share of equal ids"].values()} == {1.0}
    times = results["milliseconds a batch"].items()
    expected = [[name, f"{own['1']:.1f}", f"{own['32']:.1f}"] for name, own in times]
    assert rows_after("| way | 1 text | 32 texts |") == expected


def test_served_tokens_and_embeddings_are_the_original_s() -> None:
    results: dict[str, Any] = json.loads(RESULTS.read_text())["serving"]
    counts = ("texts", "differing", "differing without tensorflow-text")
    expected = [[name, *(str(own[c]) for c in counts)] for name, own in results["tokens"].items()]
    head = (
        "| texts | compared | other tokens than `tokenizers` | "
        "other tokens without tensorflow-text |"
    )
    assert rows_after(head) == expected
    cosines, times = results["cosines"], results["milliseconds"]
    assert (cosines["texts"], cosines["share of 0.9999 or more"]) == (5000, 1.0)
    page = " ".join(PAGE.read_text().split())
    assert f"cosine with the original's of {cosines['smallest cosine']:.6f} or more" in page
    of_texts = times["32"]["texts to embeddings"]
    of_graph, of_core = (
        times["32"][name] / of_texts
        for name in ("tokenizer of the graph", "the same without tensorflow-text")
    )
    assert (
        f"takes {of_graph:.1%} of the time from 32 texts to embeddings, and {of_core:.0%}" in page
    )
    assert round(times["32"]["tokens to embeddings, padded"] / of_texts) == 5
    expected = [[name, *(f"{times[n][name]:.1f}" for n in ("1", "32"))] for name in times["1"]]
    assert rows_after("| work | 1 text | 32 texts |") == expected
    odd = results["tokens"]["odd_unicode.json"]
    guide = " ".join((ROOT / "docs/text.md").read_text().split())
    assert (
        f"Of {odd['texts']} odd texts (`tests/data/odd_unicode.json`) {odd['differing']}" in guide
    )


def test_pairs_do_not_name_what_they_look_for(tmp_path: Path) -> None:
    from text import read

    file = tmp_path / "pairs.tsv"
    file.write_text("neuro-tools\tNeuro Tools, and more\nmodel_zoo\tA framework\nno tab\n")
    assert read(file) == [("model zoo", "A framework")]
