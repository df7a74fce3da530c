"""The examples and the language model's benchmark run, on a text of a few lines."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINES = (
    "When forty winters shall besiege thy brow,\n"
    "And dig deep trenches in thy beauty's field,\n"
    "Thy youth's proud livery, so gazed on now,\n"
    "Will be a tatter'd weed, of small worth held.\n"
)


def start(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / script, *map(str, arguments)],
        env={**os.environ, "KERAS_BACKEND": "tensorflow"},
        capture_output=True,
        text=True,
        check=False,
    )


def run(script: str, *arguments: object) -> list[str]:
    done = start(script, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(LINES * 30)
    return file


def test_the_language_model_is_trained_and_writes(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings = ("--vocabulary", 300, "--epochs", 1, "--tokens", 5, "--prompt", "When")
    said = run("examples/language_model.py", "--data", text, "--out", out, *settings)
    assert sorted(file.name for file in out.iterdir()) == ["model.keras", "tokenizer.json"]
    start = said.index("Perplexity of text it never saw, per dim:")
    rows = [line.split() for line in said[start + 1 : start + 6]]
    assert [int(row[0]) for row in rows] == [8, 16, 32, 64, 128]
    assert all(1 < float(row[1]) < 300 for row in rows)
    assert any(line.startswith("When") for line in said)


BAD_FILES: dict[str, tuple[bytes | None, str]] = {
    "missing": (None, "--data must be a file of plain text in UTF-8. Received: [Errno 2]"),
    "no text": (b"\xff\xfe\x00", "--data must be a file of plain text in UTF-8. Received: 'utf-8'"),
    "empty": (b"", "two rows of 64 tokens and one token more. Received: 0 characters."),
    "short": (b"a few words", "two rows of 64 tokens and one token more. Received: 11 characters"),
}


@pytest.mark.parametrize("script", ["examples/language_model.py", "benchmarks/language_model.py"])
@pytest.mark.parametrize(("content", "text"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_file_that_teaches_no_language_is_refused(
    script: str, content: bytes | None, text: str, tmp_path: Path
) -> None:
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    done = start(script, "--data", file)
    assert done.returncode == 2
    assert text in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.soak
@pytest.mark.skipif("not os.environ.get('KERAS_MRL_SOAK')", reason="four trainings")
def test_the_benchmark_of_the_language_model_ends_in_json(text: Path) -> None:
    last = run("benchmarks/language_model.py", "--data", text, "--vocabulary", 500)[-1]
    models = json.loads(last)["models"]
    assert list(models) == ["untied", "tied", "fixed-16", "fixed-128"]
    assert list(models["tied"]["perplexity"]) == ["8", "16", "32", "64", "128"]
    assert models["fixed-16"]["perplexity"].keys() == {"16"}
    assert all(0 <= funnel["recall"] <= 1 for funnel in models["untied"]["funnel"])


def test_the_recommender_knows_its_recall_and_answers(tmp_path: Path) -> None:
    settings = ("--users", 800, "--items", 60, "--epochs", 6)
    said = run("examples/recommender.py", "--out", tmp_path / "shop", *settings)
    start = next(i for i, line in enumerate(said) if line.startswith("  dims"))
    table = [[float(cell) for cell in line.split()] for line in said[start + 1 : start + 5]]
    assert [row[0] for row in table] == [4, 8, 16, 32]
    for _, unknown, known, corpus in table:
        assert abs(known - corpus) < abs(unknown - corpus) / 2
    assert said[-1].startswith("User 0 bought ")


def test_embeddings_are_adapted_and_searched(tmp_path: Path) -> None:
    said = run("examples/adapt_embeddings.py", "--rows", 2000, "--steps", 20, "--out", tmp_path)
    assert said[0].split() == ["method", "dim", "recall@10", "shortlist@0.95", "shortlist@0.98"]
    assert float(said[-1].rpartition(" ")[2]) > 0.9
    assert sorted(file.suffix for file in tmp_path.iterdir()) == ["", ".json", ".npy"]


def test_images_leave_a_backbone_early() -> None:
    lines = run("examples/exits_images.py", "--epochs", 1)
    rows = [line.rsplit(maxsplit=2) for line in lines if line.endswith("%")]
    names = [row[0] for row in rows]
    assert len(names) == 5
    assert all(name.startswith("all leave at ") for name in names[:3])
    assert names[3:] == ["the cascade", "a router that knows the answer"]
    work = [float(row[2].rstrip("%")) for row in rows]
    assert work[0] < work[1] < work[2] == 100
    accuracies = [float(row[1].rstrip("%")) for row in rows]
    assert max(accuracies) == accuracies[4]
    saved = float(lines[-1].removeprefix("Saved ").partition("%")[0])
    assert saved == pytest.approx(100 - work[3], abs=0.11)
    assert lines[-1].endswith(f"accuracy {accuracies[3]}% instead of {accuracies[2]}%.")


def test_a_service_searches_by_filters_in_eight_threads() -> None:
    said = run("examples/search_service.py", "--rows", 1500, "--queries", 40)
    assert said[0].startswith("40 queries by 8 threads in ")
    assert said[1] == "every answer is of the user's shop: True"
    assert said[2].startswith("nearest to the first: product ")
    assert said[-1].startswith("gained: a query by a filter prepared once takes ")


def test_a_gallery_of_qdrant_changes(tmp_path: Path) -> None:
    said = run("examples/qdrant_gallery.py", "--rows", 800, "--folder", tmp_path)
    assert said[0] == "710 rows, after 375 came and some went"
    assert said[1] == "colours of answers that must be red: ['red']"
    assert float(said[2].partition("recall@10 ")[2][:5]) > 0.9


@pytest.mark.parametrize("flags", [("--epochs", "2"), ("--as-it-is",)])
def test_texts_are_found_in_plain_text(
    flags: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = str(ROOT / "examples/text_search.py")
    monkeypatch.setattr(sys, "argv", [script, "--out", str(tmp_path), "--tokens", "12", *flags])
    runpy.run_path(script, run_name="__main__")  # here, where TensorFlow is loaded already
    said = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(said) if line.startswith("dims"))
    rows = [[float(cell) for cell in line.split()] for line in said[start + 1 : start + 4]]
    assert [row[0] for row in rows] == [8, 32, 64]
    trained = rows if "--epochs" in flags else rows[:1]
    assert all(row[2] > row[1] and row[4] > row[3] for row in trained)
    if "--as-it-is" in flags:  # a rotation leaves the full width as it is
        assert rows[-1][1::2] == rows[-1][2::2]
    are_answers = [line.startswith("    'we sell this ") for line in said[-13:-1]]
    assert are_answers == [False, True, True, True] * 3
    assert said[-1].startswith("gained: at 8 of 64 dims nDCG@10 went from ")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["index", "texts"]
