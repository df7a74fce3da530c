"""The page of heads on frozen features says what its numbers say."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
PAGE, RESULTS = (ROOT / "docs/benchmarks" / name for name in ("heads.md", "heads.json"))


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def results() -> dict[str, Any]:
    results: dict[str, Any] = json.loads(RESULTS.read_text())
    return results


def test_every_number_of_the_page_is_that_of_the_results(results: dict[str, Any]) -> None:
    from heads_page import page

    assert PAGE.read_text() == page(results)


def test_pairs_of_rows_are_those_that_the_accuracies_count(results: dict[str, Any]) -> None:
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
    results: dict[str, Any],
) -> None:
    from heads_page import paired

    last = results["epochs"][-1]
    for dim in (8, 16, 32, 64, 128, 256):
        assert paired(results, "top1", dim, last)["points"] > -0.5
        assert paired(results, "nn1", dim, last)["points"] > (0 if dim <= 16 else -0.3)
