"""`keras-mrl compare`: its flags, its refusals and what it prints."""

import json
from pathlib import Path
from typing import Any

import pytest

from keras_mrl import comparison
from keras_mrl.comparison import Plan
from keras_mrl_cli.output import print_note
from tests.helpers.cli import Call


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            ["--dims", "8,4"],
            "--dims must be two or more rising integers. Received: 8,4. Give for example 8,16,32.",
        ),
        (
            ["--dims", "8"],
            "--dims must be two or more rising integers. Received: 8. Give for example 8,16,32.",
        ),
        (
            ["--epochs", "0"],
            "--epochs must be at least 1, and below a million. Received: 0. "
            "Leave it out for the usual.",
        ),
        (
            ["--budget", "nan"],
            "--budget must be at least 0.1, and below a million. Received: nan. "
            "Leave it out for the usual.",
        ),
        (
            ["--budget", "5", "--epochs", "3"],
            "A budget chooses epochs and filters itself. Received: --budget with --epochs. "
            "Leave out one or the other.",
        ),
        (
            ["--dims", "8,x"],
            "Invalid value for '--dims': must be integers with commas. Received: '8,x'. "
            "Give for example 8,16. Try 'keras-mrl compare --help'.",
        ),
    ],
)
def test_flags_that_do_not_fit(flags: list[str], sentence: str, call: Call, folder: Path) -> None:
    assert call.refused("compare", "--data", "a.npz", "b", *flags, status=2) == sentence
    assert list(folder.iterdir()) == []


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What `compare` of the library is called with; it trains nothing and finds one sentence."""
    received: list[tuple[Any, ...]] = []

    def compare(data: list[str], out: Path, plan: Plan, **settings: Any) -> dict[str, Any]:
        received.append((data, out, plan, settings))
        out.mkdir()
        (out / "results.md").write_text("- MRL is ahead.\n- FF is not.\n\n| a table |\n")
        return {"top1": 0.5}

    monkeypatch.setattr(comparison, "compare", compare)
    return received


@pytest.mark.parametrize(
    ("flags", "plan", "settings"),
    [
        ([], Plan(), {}),
        (
            "--dims 4,8 --seeds 3 --epochs 2 --filters 8 --no-flip --unseen --size 16".split(),
            Plan((4, 8), seeds=3, epochs=2, filters=8, flip=False, unseen=True),
            {"size": 16},
        ),
        (["--budget", "2.5"], Plan(), {"budget_minutes": 2.5}),
        (["--test", "c.npz", "d.zip"], Plan(), {"test": ["c.npz", "d.zip"]}),
        (["--skip-unreadable"], Plan(), {"skip_unreadable": True}),
    ],
)
def test_flags_are_arguments_of_the_library(
    flags: list[str],
    plan: Plan,
    settings: dict[str, Any],
    calls: list[Any],
    call: Call,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    words = ("compare", "--data", "a.npz", "b", "--out", str(out), *flags)
    assert call(*words).status == 0
    defaults: dict[str, Any] = {
        "test": None,
        "budget_minutes": None,
        "size": None,
        "skip_unreadable": False,
    }
    defaults["progress"] = print_note
    assert calls == [(["a.npz", "b"], out, plan, defaults | settings)]


def test_findings_are_printed_and_with_json_the_results(
    calls: list[Any], call: Call, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ended = call("compare", "--data", "a.npz", "--out", str(out), "--json")
    assert ended.status == 0
    assert len(calls) == 1
    *lines, last = ended.out.splitlines()
    assert lines == ["- MRL is ahead.", "- FF is not.", "", f"The report is {out / 'report.html'}."]
    assert json.loads(last) == {"top1": 0.5}


def test_a_refusal_of_the_library_is_one_sentence(call: Call, tmp_path: Path) -> None:
    place = tmp_path / "missing"
    status, out, err = call("compare", "--data", str(place), "--out", str(tmp_path / "out"))
    assert (status, out) == (1, "")
    assert f"Received: {place} (No such file or directory)." in err.splitlines()[-1]
    assert "Traceback" not in err
