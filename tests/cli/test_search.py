"""`keras-mrl search`, by embeddings and through an encoder that is served."""

import re
import sys
from pathlib import Path

import grpc
import numpy as np
import pytest
from PIL import Image

from keras_mrl_serving import ExactIndex, FaissIndex, FirstStage, FunnelSchedule, open_index
from keras_mrl_serving.calls import Arrays
from keras_mrl_serving.calls import Call as Asking
from tests.helpers.cli import (
    BAD_FILES,
    BLUE,
    FRAMEWORKS,
    GREEN,
    KERAS_MRL,
    LEFT_OUT,
    RED,
    Call,
    Terminal,
    end_reading_early,
    lines,
    paint,
    run_without,
)
from tests.helpers.faulty_server import FaultyServer, Request, echo, rows

# What the models embed plain images to, the nearest of each a colour of its own.
COLOURS = np.array([RED, GREEN, BLUE, (255, 255, 0), (255, 255, 255)], np.float32)
IDS = [10, 20, 30, 40, 50]


@pytest.fixture
def run(call: Call, folder: Path) -> Call:
    """Call `search` in a folder that holds an index."""
    del folder
    ExactIndex.build(COLOURS, FunnelSchedule((1, 3), (5,), 4), IDS).save("a.index")
    return call.of("search")


def bind(fingerprint: str) -> None:
    """Build the index anew, for one encoder alone."""
    schedule = FunnelSchedule((1, 3), (5,), 4)
    ExactIndex.build(COLOURS, schedule, IDS, encoder_fingerprint=fingerprint).save("a.index")


def test_a_table_of_neighbours(run: Call) -> None:
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


def test_a_table_is_shortened_unless_k_is_named(run: Call) -> None:
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


def test_json_holds_every_id_and_score(run: Call) -> None:
    rng = np.random.default_rng(0)
    gallery, queries = rng.normal(size=(300, 16)), rng.normal(size=(2500, 20))
    schedule = FunnelSchedule((4, 16), (40,), 7)
    FaissIndex.build(gallery, schedule, first_stage=FirstStage("Flat", ""), path="b.index")
    np.save("Q.npy", queries)
    status, out, err = run("b.index", "--query", "Q.npy", "--json")
    assert (status, err) == (0, "")
    true = open_index("b.index").search(queries)
    answers = lines(out)
    assert [(row["file"], row["row"]) for row in answers] == [("Q.npy", n) for n in range(2500)]
    assert [row["ids"] for row in answers] == true.ids.tolist()
    np.testing.assert_allclose([row["scores"] for row in answers], true.scores, rtol=1e-5)


def test_only_some_ids_may_be_returned(run: Call) -> None:
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
        "keras-mrl: among must be int64 ids >= 0, or strings, in one dimension. "
        "Received: float64 of shape (1,). "
        "Give the ids that may be returned, or leave it out for all.\n",
    )


def test_rows_whose_ids_are_strings(run: Call) -> None:
    names = ["red one", "gręen", "blue\x1b[0m", "yellow", "white"]
    ExactIndex.build(COLOURS, FunnelSchedule((1, 3), (5,), 4), names).save("a.index")
    np.save("Q.npy", np.array([[1, 0, 0], [0, 0, 3]]))
    assert run("a.index", "--query", "Q.npy", "--k", "2")[1].splitlines()[1:] == [
        "Q.npy       0  red one:1.0000 yellow:0.7071",
        "Q.npy       1  blue\\x1b[0m:1.0000 white:0.5774",
    ]
    Path("some.txt").write_text("gręen\nnobody\nyellow\n", encoding="utf-8")
    out = run("a.index", "--query", "Q.npy", "--json", "--among", "some.txt")[1]
    assert lines(out)[0]["ids"] == ["yellow", "gręen"]
    Path("some.txt").write_bytes(b"gr\xffen\n")
    assert run("a.index", "--query", "Q.npy", "--among", "some.txt") == (
        1,
        "",
        "keras-mrl: Ids are an .npy file, or text with one a line in UTF-8. "
        "Received: some.txt, which is neither (invalid start byte). Write it as UTF-8.\n",
    )
    assert run("a.index", "--query", "Q.npy", "--among", "none.txt")[2] == (
        "keras-mrl: Every file must be one that can be read. "
        "Received: none.txt (No such file or directory). Correct the path.\n"
    )


def test_queries_and_k_that_do_not_fit(run: Call) -> None:
    np.save("narrow.npy", np.zeros((0, 2)))
    np.save("flat.npy", np.zeros(3))
    np.save("nan.npy", np.array([[1, np.nan, 0]]))
    np.save("none.npy", np.zeros((0, 3)))
    sentence_by_words = {
        ("narrow.npy",): "The queries must be (rows, width) with a width of at least 3. Received: "
        "shape (0, 2). Embed them at the funnel's last dim, one row each.",
        ("flat.npy",): "--query must hold embeddings, numbers of shape (rows, width). Received: "
        "flat.npy with float64 (3,). Write them with `keras-mrl embed --out`, or numpy.save.",
        ("nan.npy",): "The queries must be finite, and so must the squares of their lengths in "
        "float32. Received: NaN, infinity, or rows longer than 1e19. "
        "Look for failed rows where the embeddings were made.",
        ("gone.npy",): "Every file must be one that can be read. Received: gone.npy "
        "(No such file or directory). Correct the path.",
        ("none.npy", "--k", "6"): "k must lie in 1..5, as many as the last shortlist holds. "
        "Received: k=6. Open the index with a schedule whose shortlists are longer.",
        ("none.npy", "--k", "0"): "k must lie in 1..5, as many as the last shortlist holds. "
        "Received: k=0. Open the index with a schedule whose shortlists are longer.",
    }
    for arguments, sentence in sentence_by_words.items():
        assert run("a.index", "--query", *arguments) == (1, "", f"keras-mrl: {sentence}\n")
    assert run("a.index", "--query", "none.npy") == (0, "", "")


def test_another_funnel_than_the_index_was_built_with(run: Call) -> None:
    np.save("Q.npy", np.array([[3, 4, 1]]))
    by = ("a.index", "--query", "Q.npy", "--json")

    def ids(*flags: str) -> list[int]:
        status, out, err = run(*by, *flags)
        assert (status, err) == (0, "")
        return list(lines(out)[0]["ids"])

    opened = open_index("a.index", FunnelSchedule((1, 3), (1,), 1)).search(np.array([[3, 4, 1]]))
    assert ids() == [40, 50, 20, 10]
    assert ids("--shortlists", "4") == ids("--shortlists", "4", "--k", "4")
    assert ids("--shortlists", "1", "--k", "1") == opened.ids[0].tolist() != ids("--k", "1")
    assert ids("--dims", "3", "--shortlists", "none", "--k", "5") == [40, 50, 20, 10, 30]
    assert run(*by, "--dims", "3") == (
        1,
        "",
        "keras-mrl: A funnel needs one shortlist fewer than dims, none larger than the one before "
        "it, none below k, and k >= 1. Received: dims=(3,), shortlists=(5,), k=4. "
        "Write for example FunnelSchedule(dims=(16, 256), shortlists=(200,), k=10).\n",
    )
    assert "--dims, --shortlists are of an index in a folder" in run.refused(
        "--target", "t:1", "--shortlists", "9", "--text", "red", status=2
    )


def test_folders_that_hold_no_whole_index(run: Call) -> None:
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


def test_a_first_stage_that_does_not_read_is_a_sentence(run: Call) -> None:
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


def test_without_faiss_the_remedy_is_named(run: Call, monkeypatch: pytest.MonkeyPatch) -> None:
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


def served(target: str, model: str) -> tuple[str, ...]:
    return ("a.index", "--target", target, "--model", model)


@pytest.mark.parametrize("model", ["pixels", "bytes"])
def test_images_are_embedded_by_the_server(run: Call, target: str, model: str) -> None:
    bind(model)
    paint("red.png", RED)
    paint("a green one.PNG", GREEN)
    assert run(*served(target, model), "red.png", "a green one.PNG", "--k", "2") == (
        0,
        "FILE                ROW  NEIGHBORS\n"
        "red.png               0  10:1.0000 40:0.7071\n"
        "a green one.PNG       0  20:1.0000 40:0.7071\n",
        "",
    )


def test_files_after_a_flag_rows_and_some_ids(run: Call, target: str) -> None:
    np.save("x.npy", np.array([[0, 0, 9], [9, 9, 0]], np.float32))
    np.savez("y.npz", x=np.array([[0, 9, 0]], np.float32))
    np.save("some.npy", np.array([10, 30, 40]))
    more = ("--among", "some.npy", "--k=1", "--json")
    status, out, err = run(*served(target, "rows"), "x.npy", *more, "y.npz")
    assert (status, err) == (0, "")
    assert [(row["file"], row["row"], row["ids"]) for row in lines(out)] == [
        *(("x.npy", 0, [30]), ("x.npy", 1, [40]), ("y.npz", 0, [40]))
    ]
    assert lines(out)[0]["scores"] == [pytest.approx(1)]


def test_queries_are_embedded_at_the_width_of_the_index(run: Call, target: str) -> None:
    np.save("x.npy", np.array([[-5, 1, 1]], np.float32))
    for dims, unknown in ((1,), False), ((2,), True):
        ExactIndex.build(COLOURS[:, :2], FunnelSchedule(dims, (), 1), metric="dot").save("a.index")
        status, out, err = run(*served(target, "rows"), "x.npy", "--json")
        if unknown:
            assert (status, out) == (1, "")
            assert err == (
                "keras-mrl: dim must be one of the dims the model serves. "
                "Received: dim=2 for model 'rows'. Choose one of 1, 3.\n"
            )
        else:
            assert lines(out)[0] == {"file": "x.npy", "row": 0, "ids": [1], "scores": [0]}


def test_an_index_refuses_another_encoder(run: Call, target: str) -> None:
    np.save("x.npy", np.zeros((1, 3), np.float32))
    bind("pixels")
    assert run.refused(*served(target, "rows"), "x.npy") == refusal_of("rows", "pixels")
    bind("rows")
    ended = run(*served(target, "rows"), "x.npy")
    assert (ended.status, ended.err) == (0, "")


def refusal_of(encoder: str, built_with: str) -> str:
    return (
        "An index answers embeddings of the encoder it was built with. Received: embeddings of "
        f"the model with fingerprint {encoder!r}, for an index built with {built_with!r}. Embed "
        "the gallery anew with the model that is served, or serve the model the index was built "
        "with."
    )


def test_the_encoder_that_answers_is_the_one_that_counts(run: Call) -> None:
    np.save("x.npy", rows(3))
    schedule = FunnelSchedule((2, 4), (5,), 4)
    gallery = rows(9)
    ExactIndex.build(gallery, schedule, encoder_fingerprint="v1").save("b.index")

    def replace_version(request: Request, _: grpc.ServicerContext) -> None:
        if request.signature.startswith("embed"):
            server.versions = {2: echo(2)}

    with FaultyServer() as server:
        search = run.of("b.index", "--target", server.target)
        assert search("x.npy").status == 0
        assert [request.signature for request in server.requests] == ["describe", "embed_4"]
        server.before = replace_version
        assert search.refused("x.npy") == refusal_of("v2", "v1")
        server.requests.clear()
        assert search.refused("x.npy") == refusal_of("v2", "v1")
        # Nothing is sent to a model of another fingerprint.
        assert not server.requests_of("embed_4")


@pytest.mark.parametrize("model", ["pixels", "bytes"])
def test_bad_images_are_named_at_once_and_can_be_skipped(
    run: Call, target: str, model: str
) -> None:
    paint("red.png", RED)
    Path("text.jpg").write_text("no image")
    paint("blue.png", BLUE)
    files = ("red.png", "text.jpg", "gone.png", "blue.png")
    status, out, err = run(*served(target, model), *files, "--json")
    assert (status, out) == (1, "")
    *sentences, last = err.splitlines()
    assert last == BAD_FILES.format(2, 4)
    assert sentences == [
        "keras-mrl: An image file must be a whole JPEG, PNG, GIF, BMP or WebP. Received: text.jpg "
        "(it is none). Save it anew as an 8-bit PNG or JPEG, or leave it out.",
        "keras-mrl: Every file must be one that can be read. "
        "Received: gone.png (No such file or directory). Correct the path.",
    ]
    status, out, err = run(*served(target, model), *files, "--json", "--skip-unreadable")
    assert (status, err.splitlines()) == (0, [*sentences, LEFT_OUT.format(2, 4)])
    assert [(row["file"], row["ids"][0]) for row in lines(out)] == [
        *(("red.png", 10), ("blue.png", 30))
    ]


def test_rows_that_embed_to_nothing_are_reported(run: Call, target: str) -> None:
    np.save("good.npy", np.array([[0, 0, 9]], np.float32))
    np.save("nan.npy", np.array([[0, np.nan, 9]], np.float32))
    status, out, err = run(*served(target, "rows"), "nan.npy", "good.npy", "--json")
    assert status == 1
    assert [(row["file"], row["ids"][0]) for row in lines(out)] == [("good.npy", 30)]
    assert err == (
        "keras-mrl: nan.npy: The queries must be finite, and so must the squares of their lengths "
        "in float32. Received: NaN, infinity, or rows longer than 1e19. "
        "Look for failed rows where the embeddings were made.\n"
    )


@pytest.mark.parametrize("nan", [False, True])
def test_what_was_answered_before_an_error_is_printed(run: Call, nan: bool) -> None:
    corpus = rows(50)
    if nan:
        corpus[17, 3] = np.nan  # of the second window, none of which can be searched by then
    np.save("x.npy", corpus)
    schedule = FunnelSchedule((2, 4), (5,), 4)
    ExactIndex.build(rows(9), schedule).save("b.index")

    def fail_at_20(request: Request, context: grpc.ServicerContext) -> None:
        if request.first == 21 and request.signature == "embed_4":  # rows count from 1
            context.abort(grpc.StatusCode.INTERNAL, "out of memory")

    def answer(call: Asking) -> Arrays:
        outputs = echo(1)(call)
        if call.signature == "embed_4":
            outputs = {"embedding": call.inputs["x"]}
        return outputs

    words = ("b.index", "x.npy", "--max-batch-size", "1", "--json")
    with FaultyServer({1: answer}, fail_at_20) as server:
        status, out, err = run(*words, "--target", server.target)
    assert status == 1
    assert "out of memory" in err
    numbers = [row["row"] for row in lines(out)]
    assert numbers[:16] == list(range(16))
    assert (16 in numbers) != nan
    assert 20 not in numbers
    true = open_index("b.index").search(corpus[numbers])
    assert [row["ids"] for row in lines(out)] == true.ids.tolist()


def test_pixels_are_scaled(run: Call, target: str) -> None:
    ExactIndex.build(COLOURS, FunnelSchedule((3,), (), 1), metric="dot").save("a.index")
    Image.new("RGB", (6, 8), RED).save("red.png")
    for scale in 1.0, 0.5:
        out = run(*served(target, "pixels"), "red.png", "--json", "--scale", str(scale))[1]
        assert lines(out)[0]["scores"] == [pytest.approx(255 * 255 * scale)]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            [],
            "Queries are the rows of --query, or texts and files that a served model embeds. "
            "Received: neither. "
            "Give for example --query Q.npy, or --target localhost:8500 new.jpg.",
        ),
        (
            ["--target", "t:1"],
            "Queries are the rows of --query, or texts and files that a served model embeds. "
            "Received: neither. "
            "Give for example --query Q.npy, or --target localhost:8500 new.jpg.",
        ),
        (
            ["--query", "Q.npy", "red.png"],
            "Queries are the rows of --query, or texts and files that a served model embeds. "
            "Received: both. "
            "Give for example --query Q.npy, or --target localhost:8500 new.jpg.",
        ),
        (
            ["red.png"],
            "Texts and files are embedded by a model that is served. Received: red.png without "
            "--target. "
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
    ],
)
def test_arguments_that_do_not_fit(run: Call, arguments: list[str], text: str) -> None:
    assert run.refused("a.index", *arguments, status=2) == text


def test_progress_is_on_the_terminal_alone(
    run: Call, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save("x.npy", np.ones((1200, 3), np.float32))
    for words in ("a.index", "--query", "x.npy"), (*served(target, "rows"), "x.npy"):
        terminal = Terminal()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", terminal)
            ended = run(*words)
        assert ended.status == 0
        assert "rows/s" not in ended.out
        assert len(ended.out.splitlines()) == 1201
        assert "1,200/1,200 rows, " in terminal.getvalue()
        assert terminal.getvalue().endswith("\r\x1b[K")


def test_names_that_would_break_the_table_are_escaped(run: Call) -> None:
    np.save("a\nb.npy", np.array([[1, 0, 0]]))
    assert run("a.index", "--query", "a\nb.npy")[1].splitlines()[1].startswith("a\\nb.npy ")


def test_no_framework_is_needed(run: Call, target: str, tmp_path: Path) -> None:
    del run
    flat = FirstStage("Flat", "")
    FaissIndex.build(COLOURS, FunnelSchedule((1, 3), (5,), 4), first_stage=flat, path="a.index")
    words = [*KERAS_MRL, "search", *served(target, "pixels"), paint("red.png", RED), "--json"]
    status, out, err = run_without(FRAMEWORKS, tmp_path, *words)
    assert (status, err) == (0, "")
    assert lines(out)[0]["ids"][0] == 0


def test_a_reader_that_has_enough_is_no_traceback(run: Call, tmp_path: Path) -> None:
    del run
    np.save("Q.npy", np.ones((20_000, 3), np.float32))
    words = ("search", "a.index", "--query", "Q.npy")
    assert end_reading_early(tmp_path, *words) == (1, b"")
