"""`keras-mrl compare`: its flags, its refusals and what it prints."""

import json
from pathlib import Path
from typing import Any

import pytest

from keras_mrl import comparison
from keras_mrl.comparison import Plan
from keras_mrl_cli.__main__ import main


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--dims", "8,4"], "must be two or more rising integers"),
        (["--dims", "8"], "must be two or more rising integers"),
        (["--dims", "8,x"], "must be integers with commas"),
        (["--epochs", "0"], "--epochs must be at least 1"),
        (["--budget", "nan"], "--budget must be at least 0.1"),
        (["--budget", "5", "--epochs", "3"], "Received: --budget with --epochs."),
        (["--nets", "3"], "--nets"),
    ],
)
def test_what_no_comparison_can_mean_is_refused(
    flags: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compare", "--data", str(tmp_path), "--out", str(tmp_path / "out"), *flags]
    try:
        status = main(command)
    except SystemExit as stopped:
        status = int(str(stopped.code))
    assert status == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


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
    ],
)
def test_flags_are_arguments_of_the_library(
    flags: list[str], plan: Plan, settings: dict[str, Any], calls: list[Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert main(["compare", "--data", "a.npz", "b", "--out", str(out), *flags]) == 0
    defaults = {"test": None, "budget_minutes": None, "size": None}
    assert calls == [(["a.npz", "b"], out, plan, defaults | settings)]


def test_findings_are_printed_and_with_json_the_results(
    calls: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["compare", "--data", "a.npz", "--out", str(out), "--json"]) == 0
    assert len(calls) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines == ["- MRL is ahead.", "- FF is not.", "", f"The report is {out / 'report.html'}."]
    assert json.loads(last) == {"top1": 0.5}


def test_a_refusal_of_the_library_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "missing"
    assert main(["compare", "--data", str(place), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert f"Received: {place}, which is none of them." in error
    assert "Traceback" not in error
