"""The pages that compare methods say what their numbers say."""

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs/benchmarks"
WRITTEN_BY = {
    "adaptive": "adaptive",
    "fine_tuned": "fine_tuned_page",
    "from_scratch": "from_scratch",
    "funnel": "funnel_page",
    "heads": "heads_page",
    "heads_images": "heads_page",
}


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def results_of(name: str) -> Any:
    return json.loads((PAGES / f"{name}.json").read_text())


@pytest.fixture
def results() -> Any:
    return results_of("heads")


@pytest.mark.parametrize("name", WRITTEN_BY)
def test_every_number_of_a_page_is_that_of_its_results(name: str) -> None:
    page = importlib.import_module(WRITTEN_BY[name]).page
    assert (PAGES / f"{name}.md").read_text() == page(results_of(name))


def test_the_verdict_that_the_guide_quotes_is_that_of_these_numbers(results: Any) -> None:
    from heads_page import paired

    from keras_mrl.comparison.verdict import sentences

    last, dims = results["epochs"][-1], [dim for dim in results["dims"] if dim >= 8]
    differences = {
        rival: {str(dim): paired(results, measure, dim, last) for dim in dims}
        for rival, measure in (("ff", "top1"), ("pca", "nn1"))
    }
    given = {"best": 0.95, "chance": 0.01, "moved": {}, "differences": differences}
    quoted = "".join(
        f"> {sentence}\n" for sentence in sentences({"verdict": given, "plan": {"epochs": last}})
    )
    assert f"\n\n{quoted}\n" in (ROOT / "docs/compare.md").read_text()


def test_pairs_of_rows_are_those_that_the_accuracies_count(results: Any) -> None:
    for measure, other in (("top1", "ff"), ("nn1", "pca")):
        for dim, by_epochs in results["paired"][measure].items():
            for epochs, counts in by_epochs.items():
                scores = results["test"][measure]
                mrl, theirs = (np.mean(scores[name][dim][epochs]) for name in ("mrl", other))
                assert sum(counts.values()) == results["rows"]["test"]
                ahead = sum(int(value) * count for value, count in counts.items())
                ahead /= sum(counts.values()) * len(results["seeds"])
                assert ahead == pytest.approx(mrl - theirs, abs=2e-6)


def test_nested_heads_are_as_good_as_separate_nets_once_training_has_converged(
    results: Any,
) -> None:
    from heads_page import paired

    last = results["epochs"][-1]
    for dim in (8, 16, 32, 64, 128, 256):
        assert paired(results, "top1", dim, last)["points"] > -0.5
        assert paired(results, "nn1", dim, last)["points"] > (0 if dim <= 16 else -0.3)


def test_the_example_of_a_verdict_is_what_the_command_says_of_these_numbers(results: Any) -> None:
    from heads_page import paired

    from keras_mrl.comparison.verdict import sentences

    last, dims = results["epochs"][-1], [dim for dim in results["dims"] if dim >= 8]
    differences = {
        other: {str(dim): paired(results, measure, dim, last) for dim in dims}
        for measure, other in (("top1", "ff"), ("nn1", "pca"))
    }
    verdict = {"differences": differences, "moved": {}, "best": 0.95, "chance": 1 / 150}
    text = " ".join(sentences({"verdict": verdict, "plan": {"epochs": last}}))
    quoted = (ROOT / "docs/compare.md").read_text().replace("\n> ", " ")
    assert text in quoted, text
