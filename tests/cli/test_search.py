"""`keras-mrl search`, by embeddings and through an encoder of the development server."""

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from keras_mrl_cli.__main__ import main
from keras_mrl_serving import (
    Client,
    ExactIndex,
    FaissIndex,
    FirstStage,
    FunnelSchedule,
    Options,
    open_index,
)
from keras_mrl_serving.errors import ServerUnavailableError
from keras_mrl_serving.results import Embedded
from tests.cli.test_ask import BLOCK, BLUE, GREEN, RED, lines, paint, save

Run = Callable[..., tuple[int, str, str]]
MODELS = ("pixels", "bytes", "rows")
# What the models embed plain images to, the nearest of each a colour of its own.
COLOURS = np.array([RED, GREEN, BLUE, (255, 255, 0), (255, 255, 255)], np.float32)
IDS = [10, 20, 30, 40, 50]


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, str]]:
    """A server of each model, under its name; dims 1 and 3, fingerprints their names."""
    from keras_mrl_serving.server import DevServer

    folder = tmp_path_factory.mktemp("encoders")
    servers = {}
    for name in MODELS:
        save(name, folder / name / "1")
        servers[name] = DevServer(folder / name, model_name=name, file_system_poll_wait_seconds=0)
    yield {name: server.start() for name, server in servers.items()}
    for server in servers.values():
        server.stop()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `search` in a folder of its own, which holds an index: status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    schedule = FunnelSchedule((1, 3), (5,), 4)
    ExactIndex.build(COLOURS, schedule, IDS).save("a.index")

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main(["search", *arguments])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


def bind(fingerprint: str) -> None:
    """Build the index anew, for one encoder alone."""
    schedule = FunnelSchedule((1, 3), (5,), 4)
    ExactIndex.build(COLOURS, schedule, IDS, encoder_fingerprint=fingerprint).save("a.index")


def test_a_table_of_neighbours(run: Run) -> None:
    np.save("Q.npy", np.array([[1, 0, 0], [0, 3, 0]]))
    assert run("a.index", "--query", "Q.npy", "--k", "3") == (
        0,
        "FILE      ROW  NEIGHBORS\n"
        "Q.npy       0  10:1.0000 40:0.7071 50:0.5774\n"
        "Q.npy       1  20:1.0000 40:0.7071 50:0.5774\n",
        "",
    )
    assert run("a.index", "--query", "Q.npy")[1].splitlines()[1] == (
        "Q.npy       0  10:1.0000 40:0.7071 50:0.5774 20:0.0000"
    )


def test_a_table_is_shortened_unless_k_is_named(run: Run) -> None:
    rng = np.random.default_rng(0)
    gallery = rng.normal(size=(50, 8))
    ExactIndex.build(gallery, FunnelSchedule((8,), (), 7)).save("b.index")
    np.save("Q.npy", gallery[:1])
    for more, shown, dots in ((), 5, True), (("--k", "7"), 7, False), (("--k", "2"), 2, False):
        row = run("b.index", "--query", "Q.npy", *more)[1].splitlines()[1].split()
        assert row[:2] == ["Q.npy", "0"]
        assert len(row) == 2 + shown + dots
        assert (row[-1] == "...") == dots
        assert row[2] == "0:1.0000"


def test_json_holds_every_id_and_score(run: Run) -> None:
    rng = np.random.default_rng(0)
    gallery, queries = rng.normal(size=(300, 16)), rng.normal(size=(2500, 20))
    schedule = FunnelSchedule((4, 16), (40,), 7)
    FaissIndex.build(gallery, schedule, first_stage=FirstStage("Flat", ""), path="b.index")
    np.save("Q.npy", queries)
    status, out, err = run("b.index", "--query", "Q.npy", "--json")
    assert (status, err) == (0, "")
    true = open_index("b.index").search(queries)
    rows = lines(out)
    assert [(row["file"], row["row"]) for row in rows] == [("Q.npy", n) for n in range(2500)]
    assert [row["ids"] for row in rows] == true.ids.tolist()
    np.testing.assert_allclose([row["scores"] for row in rows], true.scores, rtol=1e-5)


def test_only_some_ids_may_be_returned(run: Run) -> None:
    np.save("Q.npy", np.array([[1, 0, 0]]))
    np.save("some.npy", np.array([50, 20, 7]))
    np.save("other.npy", np.array([7]))
    np.save("half.npy", np.array([0.5]))
    by = ("a.index", "--query", "Q.npy", "--json", "--among")
    assert lines(run(*by, "some.npy")[1])[0]["ids"] == [50, 20]
    assert lines(run(*by, "other.npy")[1])[0]["ids"] == []
    assert run(*by, "half.npy") == (
        1,
        "",
        "keras-mrl: among must be int64 ids >= 0 in one dimension. Received: float64 of shape "
        "(1,). Give the ids that may be returned, or leave it out for all.\n",
    )


def test_queries_and_k_that_do_not_fit(run: Run) -> None:
    np.save("narrow.npy", np.zeros((0, 2)))
    np.save("flat.npy", np.zeros(3))
    np.save("nan.npy", np.array([[1, np.nan, 0]]))
    np.save("none.npy", np.zeros((0, 3)))
    said = {
        ("narrow.npy",): "The queries must be (rows, width) with a width of at least 3. Received: "
        "shape (0, 2). Embed them at the funnel's last dim, one row each.",
        ("flat.npy",): "--query must hold embeddings, numbers of shape (rows, width). Received: "
        "flat.npy with float64 (3,). Write them with `keras-mrl embed --out`, or numpy.save.",
        ("nan.npy",): "The queries must be finite, and so must the squares of their lengths in "
        "float32. Received: NaN, infinity, or rows longer than 1e19. "
        "Look for failed rows where the embeddings were made.",
        ("gone.npy",): "Every file must be one that can be read. Received: gone.npy "
        "(No such file or directory). Correct the path.",
        ("none.npy", "--k", "5"): "k must lie in 1..4, as many as the funnel returns. Received: "
        "k=5. Search with a schedule whose k is larger.",
        ("none.npy", "--k", "0"): "k must lie in 1..4, as many as the funnel returns. Received: "
        "k=0. Search with a schedule whose k is larger.",
    }
    for arguments, sentence in said.items():
        assert run("a.index", "--query", *arguments) == (1, "", f"keras-mrl: {sentence}\n")
    assert run("a.index", "--query", "none.npy") == (0, "", "")


def test_folders_that_hold_no_whole_index(run: Run) -> None:
    np.save("Q.npy", np.array([[1, 0, 0]]))
    assert run("nowhere", "--query", "Q.npy") == (
        1,
        "",
        "keras-mrl: A saved index is a folder with a file index.json. Received: 'nowhere', which "
        "has none. Build one: `keras-mrl index build --help`.\n",
    )
    (file,) = Path("a.index").glob("columns_1-*.npy")
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert run("a.index", "--query", "Q.npy") == (
        1,
        "",
        f"keras-mrl: An index is read as it was written. Received: 'a.index' with {file.name}, "
        "whose bytes have changed. Copy it again from where it is whole, or build it anew.\n",
    )
    assert run("a.index", "--query", "Q.npy", "--no-verify")[0] == 0


def test_a_first_stage_that_does_not_read_is_a_sentence(run: Run) -> None:
    np.save("Q.npy", np.array([[1, 0, 0]]))
    flat = FirstStage("Flat", "")
    FaissIndex.build(COLOURS, FunnelSchedule((1, 3), (5,), 4), first_stage=flat, path="b.index")
    assert run("b.index", "--query", "Q.npy", "--no-verify")[0] == 0
    (file,) = Path("b.index").glob("first-*.faiss")
    file.write_bytes(b"what" + file.read_bytes()[4:])
    status, out, err = run("b.index", "--query", "Q.npy", "--no-verify")
    assert (status, out) == (1, "")
    assert re.fullmatch(
        r"keras-mrl: A first stage is read as FAISS wrote it\. Received: '.*' \(.*\)\. "
        r"Copy it again from where it is whole, or build the index anew\.\n",
        err,
    )


def test_without_faiss_the_remedy_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save("Q.npy", np.array([[1, 0, 0]]))
    flat = FirstStage("Flat", "")
    FaissIndex.build(COLOURS, FunnelSchedule((1, 3), (5,), 4), first_stage=flat, path="b.index")
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert run("b.index", "--query", "Q.npy") == (
        1,
        "",
        "keras-mrl: FaissIndex needs FAISS. Received: import of faiss halted; None in "
        "sys.modules. Install it: pip install 'keras-mrl[faiss]'.\n",
    )
    assert run("a.index", "--query", "Q.npy")[0] == 0


def served(targets: Mapping[str, str], model: str) -> tuple[str, ...]:
    return ("a.index", "--target", targets[model], "--model", model)


@pytest.mark.parametrize("model", ["pixels", "bytes"])
def test_images_are_embedded_by_the_server(
    run: Run, targets: Mapping[str, str], model: str
) -> None:
    bind(model)
    paint("red.png", RED)
    paint("a green one.PNG", GREEN)
    assert run(*served(targets, model), "red.png", "a green one.PNG", "--k", "2") == (
        0,
        "FILE                ROW  NEIGHBORS\n"
        "red.png               0  10:1.0000 40:0.7071\n"
        "a green one.PNG       0  20:1.0000 40:0.7071\n",
        "",
    )


def test_files_after_a_flag_rows_and_some_ids(run: Run, targets: Mapping[str, str]) -> None:
    np.save("x.npy", np.array([[0, 0, 9], [9, 9, 0]], np.float32))
    np.savez("y.npz", x=np.array([[0, 9, 0]], np.float32))
    np.save("some.npy", np.array([10, 30, 40]))
    more = ("--among", "some.npy", "--k=1", "--json")
    status, out, err = run(*served(targets, "rows"), "x.npy", *more, "y.npz")
    assert (status, err) == (0, "")
    assert [(row["file"], row["row"], row["ids"]) for row in lines(out)] == [
        *(("x.npy", 0, [30]), ("x.npy", 1, [40]), ("y.npz", 0, [40]))
    ]
    assert lines(out)[0]["scores"] == [pytest.approx(1)]


def test_queries_are_embedded_at_the_width_of_the_index(
    run: Run, targets: Mapping[str, str]
) -> None:
    np.save("x.npy", np.array([[-5, 1, 1]], np.float32))
    for dims, unknown in ((1,), False), ((2,), True):
        ExactIndex.build(COLOURS[:, :2], FunnelSchedule(dims, (), 1), metric="dot").save("a.index")
        status, out, err = run(*served(targets, "rows"), "x.npy", "--json")
        if unknown:
            assert (status, out) == (1, "")
            assert err == (
                "keras-mrl: dim must be one of the dims the model serves. "
                "Received: dim=2 for model 'rows'. Choose one of 1, 3.\n"
            )
        else:
            assert lines(out)[0] == {"file": "x.npy", "row": 0, "ids": [1], "scores": [0]}


def test_an_index_refuses_another_encoder(
    run: Run, targets: Mapping[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save("x.npy", np.zeros((1, 3), np.float32))
    sentence = (
        "keras-mrl: An index answers embeddings of the encoder it was built with. Received: "
        "embeddings of the model with fingerprint 'rows', for an index built with 'pixels'. Embed "
        "the gallery anew with the model that is served, or serve the model the index was built "
        "with.\n"
    )
    bind("pixels")
    with monkeypatch.context() as patch:
        patch.delattr(Client, "retrieve")  # nothing is sent
        assert run(*served(targets, "rows"), "x.npy") == (1, "", sentence)
    # The encoder that answers is the one that counts, should another version take over meanwhile.
    monkeypatch.setattr("keras_mrl_cli.indexing.searching.check_encoder", lambda *_: None)
    assert run(*served(targets, "rows"), "x.npy") == (1, "", sentence)
    bind("rows")
    assert run(*served(targets, "rows"), "x.npy")[::2] == (0, "")


@pytest.mark.parametrize("model", ["pixels", "bytes"])
def test_a_bad_image_is_reported_and_the_others_answered(
    run: Run, targets: Mapping[str, str], model: str
) -> None:
    paint("red.png", RED)
    Path("text.jpg").write_text("no image")
    paint("blue.png", BLUE)
    files = ("red.png", "text.jpg", "gone.png", "blue.png")
    status, out, err = run(*served(targets, model), *files, "--json")
    assert status == 1
    assert [(row["file"], row["ids"][0]) for row in lines(out)] == [
        *(("red.png", 10), ("blue.png", 30))
    ]
    said = err.splitlines()
    assert len(said) == 2
    assert all(line.startswith("keras-mrl: ") for line in said)
    assert sum("text.jpg" in line for line in said) == 1
    assert (
        "keras-mrl: Every file must be one that can be read. "
        "Received: gone.png (No such file or directory). Correct the path." in said
    )


def test_rows_that_embed_to_nothing_are_reported(run: Run, targets: Mapping[str, str]) -> None:
    np.save("good.npy", np.array([[0, 0, 9]], np.float32))
    np.save("nan.npy", np.array([[0, np.nan, 9]], np.float32))
    status, out, err = run(*served(targets, "rows"), "nan.npy", "good.npy", "--json")
    assert status == 1
    assert [(row["file"], row["ids"][0]) for row in lines(out)] == [("good.npy", 30)]
    assert err == (
        "keras-mrl: nan.npy: The queries must be finite, and so must the squares of their lengths "
        "in float32. Received: NaN, infinity, or rows longer than 1e19. "
        "Look for failed rows where the embeddings were made.\n"
    )


@pytest.mark.parametrize("nan", [False, True])
def test_what_was_answered_before_an_error_is_printed(
    run: Run, targets: Mapping[str, str], monkeypatch: pytest.MonkeyPatch, nan: bool
) -> None:
    corpus = np.arange(150, dtype=np.float32).reshape(50, 3)
    if nan:
        corpus[17] = np.nan  # of the second window, none of which can be searched by then
    np.save("x.npy", corpus)
    outcome = Client._outcome

    def failing(client: Client, round: Any, talk: Any) -> Any:
        found = outcome(client, round, talk)
        embedded = found[0] if isinstance(found, tuple) else None
        if isinstance(embedded, Embedded) and np.array_equal(embedded[0], corpus[20:21]):
            return ServerUnavailableError("No server answers. Received: rows. Start it.")
        return found

    monkeypatch.setattr(Client, "_outcome", failing)
    status, out, err = run(*served(targets, "rows"), "x.npy", "--max-batch-size", "1", "--json")
    assert (status, err) == (1, "keras-mrl: No server answers. Received: rows. Start it.\n")
    rows = [row["row"] for row in lines(out)]
    assert rows[:16] == list(range(16))
    assert (16 in rows) != nan
    assert 20 not in rows
    true = open_index("a.index").search(corpus[rows])
    assert [row["ids"] for row in lines(out)] == true.ids.tolist()


def test_the_options_reach_the_client(
    run: Run, targets: Mapping[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save("x.npy", np.zeros((1, 3), np.float32))
    seen: list[Options] = []
    begin = Client.__init__

    def noted(client: Client, target: Any, model: str, *, options: Options) -> None:
        seen.append(options)
        begin(client, target, model, options=options)

    monkeypatch.setattr(Client, "__init__", noted)
    given = ("--timeout=3", "--max-batch-size=7", "--metadata=Auth=a=b")
    assert run(*served(targets, "rows"), "x.npy", *given)[0] == 0
    assert (seen[-1].timeout_s, seen[-1].max_batch_size) == (3, 7)
    assert seen[-1].headers() == (("auth", "a=b"),)
    Path("ca.pem").write_bytes(b"whoever")
    assert run(*served(targets, "rows"), "x.npy", "--tls-ca=ca.pem", "--timeout=0.2")[0] == 1
    assert seen[-1].tls is not None
    assert seen[-1].tls.root_certificates == b"whoever"


def test_pixels_are_scaled(run: Run, targets: Mapping[str, str]) -> None:
    ExactIndex.build(COLOURS, FunnelSchedule((3,), (), 1), metric="dot").save("a.index")
    Image.new("RGB", (6, 8), RED).save("red.png")
    for scale in 1.0, 0.5:
        out = run(*served(targets, "pixels"), "red.png", "--json", "--scale", str(scale))[1]
        assert lines(out)[0]["scores"] == [pytest.approx(255 * 255 * scale)]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            [],
            "Queries are the rows of --query, or files that a served model embeds. "
            "Received: neither. "
            "Give for example --query Q.npy, or --target localhost:8500 new.jpg.",
        ),
        (
            ["--target", "t:1"],
            "Queries are the rows of --query, or files that a served model embeds. "
            "Received: neither. "
            "Give for example --query Q.npy, or --target localhost:8500 new.jpg.",
        ),
        (
            ["--query", "Q.npy", "red.png"],
            "Queries are the rows of --query, or files that a served model embeds. "
            "Received: both. "
            "Give for example --query Q.npy, or --target localhost:8500 new.jpg.",
        ),
        (
            ["red.png"],
            "Files are embedded by a model that is served. Received: red.png without --target. "
            "Name the server's gRPC port, for example --target localhost:8500, "
            "or give embeddings as --query.",
        ),
        (
            ["--query=Q.npy", "--target=t:1", "--model=m", "--timeout=1", "--tls-ca=x"],
            "The rows of --query are searched as they are, and no server is asked. "
            "Received: --target, --model, --timeout, --tls-ca with --query. "
            "Leave it out, or give files instead.",
        ),
        (
            ["--query=Q.npy", "--metadata=a=b", "--max-batch-size=1", "--scale=2"],
            "The rows of --query are searched as they are, and no server is asked. "
            "Received: --metadata, --max-batch-size, --scale with --query. "
            "Leave it out, or give files instead.",
        ),
        (
            ["red.png", "--target", "t:1", "--scale", "0"],
            "--scale must be a finite number other than 0. Received: 0.0. "
            "Give 0.00392156862745098 for pixels in 0..1.",
        ),
        (
            ["red.png", "--target", "localhost"],
            "A target must be 'host:port'. Received: 'localhost'. "
            "Give the server's gRPC port, for example localhost:8500.",
        ),
        (
            ["--query", "Q.npy", "--top", "3"],
            "Only known flags are taken. Received: --top 3. "
            "See the command's --help for those there are.",
        ),
    ],
)
def test_arguments_that_do_not_fit(run: Run, arguments: list[str], text: str) -> None:
    assert run("a.index", *arguments) == (2, "", f"keras-mrl: {text}\n")


def test_progress_is_on_the_terminal_alone(
    run: Run, targets: Mapping[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    np.save("x.npy", np.ones((1200, 3), np.float32))
    for more in ("a.index", "--query", "x.npy"), (*served(targets, "rows"), "x.npy"):
        terminal = Terminal()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", terminal)
            status, out, _ = run(*more)
        assert status == 0
        assert "rows/s" not in out
        assert len(out.splitlines()) == 1201
        assert "1,200/1,200 rows, " in terminal.getvalue()
        assert terminal.getvalue().endswith("\r\x1b[K")


def test_names_that_would_break_the_table_are_escaped(run: Run) -> None:
    np.save("a\nb.npy", np.array([[1, 0, 0]]))
    assert run("a.index", "--query", "a\nb.npy")[1].splitlines()[1].startswith("a\\nb.npy ")


def test_no_framework_is_needed(run: Run, targets: Mapping[str, str]) -> None:
    del run
    flat = FirstStage("Flat", "")
    FaissIndex.build(COLOURS, FunnelSchedule((1, 3), (5,), 4), first_stage=flat, path="a.index")
    file = paint("red.png", RED)
    arguments = ["search", *served(targets, "pixels"), file, "--json"]
    program = [sys.executable, "-c", BLOCK, *arguments]
    done = subprocess.run(program, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["ids"][0] == 0


def test_a_reader_that_has_enough_is_no_traceback(run: Run) -> None:
    del run
    np.save("Q.npy", np.ones((20_000, 3), np.float32))
    process = subprocess.Popen(
        [sys.executable, "-m", "keras_mrl_cli", "search", "a.index", "--query", "Q.npy"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 1
    process.stderr.close()


def test_the_help_teaches_by_two_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["search", "--help"])
    assert capsys.readouterr().out.count("\n  keras-mrl search birds.index --") == 2
