"""Every example runs in small and says what was gained; so does the language model's benchmark."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from sklearn.datasets import load_digits

from keras_mrl_serving import Client
from keras_mrl_serving.server import DevServer

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


def example(name: str, *arguments: object) -> list[str]:
    """The lines that an example prints; the last says what was gained."""
    said = run(f"examples/{name}", *arguments)
    assert said[-1].startswith("gained: ")
    return said


def test_every_example_is_run_here_and_explains_itself() -> None:
    tests = Path(__file__).read_text()
    for file in sorted((ROOT / "examples").iterdir()):
        assert file.suffix in (".py", ".mjs"), file
        assert f'{file.name}"' in tests
        if file.suffix == ".py":
            done = start(f"examples/{file.name}", "--help")
            assert done.returncode == 0, done.stderr
            assert "What happens, and what to look at:" in done.stdout


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(LINES * 30)
    return file


def test_the_language_model_is_trained_and_writes(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings = ("--vocabulary", 300, "--epochs", 1, "--tokens", 5, "--prompt", "When")
    said = example("language_model.py", "--data", text, "--out", out, *settings)
    assert sorted(file.name for file in out.iterdir()) == ["model.keras", "tokenizer.json"]
    start = said.index("Perplexity of text it never saw, per dim:")
    rows = [line.split() for line in said[start + 1 : start + 6]]
    assert [int(row[0]) for row in rows] == [8, 16, 32, 64, 128]
    assert all(1 < float(row[1]) < 300 for row in rows)
    assert any(line.startswith("When") for line in said)
    assert said[-1].partition(" of 128 dims a token")[1]


@pytest.mark.soak
@pytest.mark.skipif("not os.environ.get('KERAS_MRL_SOAK')", reason="a training on a whole book")
def test_the_language_model_learns_from_what_python_ships(tmp_path: Path) -> None:
    said = example("language_model.py", "--out", tmp_path / "out", "--epochs", 1)
    assert int(said[0].split()[-3].replace(",", "")) > 300_000  # characters


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
    said = example("recommender.py", "--out", tmp_path / "shop", *settings)
    start = next(i for i, line in enumerate(said) if line.startswith("  dims"))
    table = [[float(cell) for cell in line.split()] for line in said[start + 1 : start + 5]]
    assert [row[0] for row in table] == [4, 8, 16, 32]
    for _, unknown, known, corpus in table:
        assert abs(known - corpus) < abs(unknown - corpus) / 2
    recommended, popular = map(float, re.findall(r"([\d.]+)%", said[-1]))
    assert recommended > popular


def test_the_recommender_reads_purchases_of_others(tmp_path: Path) -> None:
    file = tmp_path / "purchases.csv"
    rows = [f"user {u},item {(u + step) % 60}" for step in range(4) for u in range(300)]
    file.write_text("\n".join([*rows, "user 999,item 1", "no comma"]))
    said = example("recommender.py", "--data", file, "--epochs", 2, "--out", tmp_path / "shop")
    assert said[0].startswith("900 purchases; ")
    short = start("examples/recommender.py", "--data", __file__)
    assert short.returncode == 2
    assert "--data must have 256 users who bought two things or more" in short.stderr


def test_embeddings_are_adapted_and_searched(tmp_path: Path) -> None:
    said = example("adapt_embeddings.py", "--rows", 2000, "--steps", 20, "--out", tmp_path)
    assert said[0].split() == ["method", "dim", "recall@10", "shortlist@0.95", "shortlist@0.98"]
    work, found = map(float, re.findall(r"([\d.]+)%", said[-1]))
    assert work < 60
    assert found > 90
    assert sorted(file.suffix for file in tmp_path.iterdir()) == ["", ".json", ".npy"]


def test_images_leave_a_backbone_early() -> None:
    lines = example("exits_images.py", "--epochs", 1)
    rows = [line.rsplit(maxsplit=2) for line in lines if line.endswith("%")]
    names = [row[0] for row in rows]
    assert len(names) == 5
    assert all(name.startswith("all leave at ") for name in names[:3])
    assert names[3:] == ["the cascade", "a router that knows the answer"]
    work = [float(row[2].rstrip("%")) for row in rows]
    assert work[0] < work[1] < work[2] == 100
    accuracies = [float(row[1].rstrip("%")) for row in rows]
    assert max(accuracies) == accuracies[4]
    saved = float(lines[-1].removeprefix("gained: ").partition("%")[0])
    assert saved == pytest.approx(100 - work[3], abs=0.11)
    assert lines[-1].endswith(f"accuracy {accuracies[3]}% instead of {accuracies[2]}%.")


def test_texts_leave_an_encoder_early(tmp_path: Path) -> None:
    said = example("exits_text.py", "--out", tmp_path, "--epochs", 2)
    start = said.index("Of 1,029 texts that trained nothing,")
    shares = [line.partition(" answers ") for line in said[start + 1 : said.index("", start)]]
    assert sum(float(share.rstrip("%")) for *_, share in shares) == pytest.approx(100, abs=0.2)
    answers = [line for line in said if line.startswith("  '")]
    assert len(answers) == 6
    exits = {name.strip() for name, *_ in shares}
    assert {line.rpartition(", by ")[2] for line in answers} <= exits


@pytest.mark.soak
@pytest.mark.skipif("not os.environ.get('KERAS_MRL_SOAK')", reason="npm, a training and a server")
def test_node_asks_with_nothing_but_the_protos(tmp_path: Path) -> None:
    packages = ("@grpc/grpc-js@1", "protobufjs@7")
    subprocess.run(["npm", "install", "--silent", *packages], cwd=tmp_path, check=True)
    demo = [sys.executable, "-m", "keras_mrl_cli", "demo", "--epochs", "1"]
    subprocess.run(demo, cwd=tmp_path, check=True)
    script = shutil.copy(ROOT / "examples" / "ask.mjs", tmp_path)  # beside its node_modules
    protos = ROOT / "serving" / "keras_mrl_serving" / "_wire.proto"
    models = tmp_path / "keras-mrl-demo" / "models" / "digits"
    rows = tmp_path / "rows.json"
    images = load_digits().images[:5, ..., None].astype("float32") / 16
    rows.write_text(json.dumps(images.tolist()))
    with DevServer(models, model_name="digits") as target, Client(target, "digits") as client:
        words = ["node", script, "--target", target, "--protos", protos]
        drawn, given = (
            subprocess.check_output(own, text=True).splitlines()
            for own in (words, [*words, "--rows", rows])
        )
        expected = client.classify_adaptive(images)
    assert given[:2] == [
        "digits takes image, and answers with 2, 4, 8, 16, 32, 64 dims",
        "embeddings of 2 numbers, where the whole ones have 64",
    ]
    assert expected.labels is not None
    assert expected.exit is not None
    answers = zip(expected.labels[:, 0], expected.dim, expected.exit, strict=True)
    assert given[2:-1] == [
        f"row {i}: {name}, with {dim} dims at exit {exit_}"
        for i, (name, dim, exit_) in enumerate(answers)
    ]
    assert len(drawn) == 5
    assert drawn[-1].startswith("gained: ")


def test_a_service_searches_by_filters_in_eight_threads() -> None:
    said = example("search_service.py", "--rows", 1500, "--queries", 40)
    assert said[0].startswith("40 queries by 8 threads in ")
    assert said[1] == "every answer is of the user's shop: True"
    assert said[2].startswith("nearest to the first: product ")
    assert said[-1].startswith("gained: a query by a filter prepared once takes ")


def test_a_gallery_of_qdrant_changes(tmp_path: Path) -> None:
    said = example("qdrant_gallery.py", "--rows", 800, "--folder", tmp_path)
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
