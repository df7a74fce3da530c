"""Texts on the command line: embedded, classified, searched for, from words, lines and columns."""

import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from keras_mrl_cli.client import connect_and_describe
from keras_mrl_cli.texts import load_texts
from keras_mrl_serving import Client
from keras_mrl_serving.server import DevServer
from tests.helpers.cli import Call, Ended, Terminal, lines
from tests.helpers.galleries import rewrite_card
from tests.helpers.text_servers import classifier_of_texts, save_text_model, text_manifest

Ask = Callable[..., Ended]
BIRDS = ["owls see at night", "jays bury acorns", "swifts sleep on the wing", "rails run"]
QUESTION = "who can see at night"
TLS_FLAGS = ("tls_ca", "tls_server_name", "tls_cert", "tls_key")
PLAIN: dict[str, str] = {}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A development server of models of texts: with prompts, without, and with a gallery."""
    folder = tmp_path_factory.mktemp("texts")
    passages = ["passage: " + text for text in BIRDS]
    models = {
        "notes": save_text_model(folder / "notes", text_manifest()),
        "plain": save_text_model(folder / "plain", text_manifest(PLAIN)),
        "intents": save_text_model(folder / "intents", classifier_of_texts()),
        "gallery": save_text_model(folder / "gallery", text_manifest(prompt="passage: "), passages),
    }
    config = folder / "models.config"
    entries = "".join(
        f'config {{ name: "{n}" base_path: "{p}" model_platform: "tensorflow" }}\n'
        for n, p in models.items()
    )
    config.write_text(f"model_config_list {{ {entries} }}")
    with DevServer(model_config_file=str(config), file_system_poll_wait_seconds=0) as target:
        yield target


def embedded(target: str, texts: list[str], model: str = "notes", dim: int = 64) -> Any:
    with Client(target, model=model) as client:
        return client.embed(texts, dim)


def typed(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    """Standard input, as a pipe gives it."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), "utf-8"))


def same(out: str, expected: npt.NDArray[np.float32]) -> None:
    rows = [row["embedding"] for row in lines(out)]
    np.testing.assert_allclose(rows, expected, atol=1e-6)


# Where texts come from.


def test_a_line_is_a_text(ask: Ask, target: str) -> None:
    texts = [*BIRDS, "", "🦉 naïve", " blanks stay "]
    Path("a.txt").write_bytes("\r\n".join(texts).encode() + b"\r\n")
    status, out, err = ask("embed", "notes", "a.txt", "--json", "--prompt", "passage")
    assert (status, err) == (0, "")
    assert [(row["file"], row["row"]) for row in lines(out)] == [("a.txt", n) for n in range(7)]
    same(out, embedded(target, ["passage: " + text for text in texts]))


@pytest.mark.parametrize(
    ("data", "texts"),
    [
        (b"a\r\nb\n", [b"a", b"b"]),
        (b" a \n\nb", [b" a ", b"", b"b"]),
        (b"\xef\xbb\xbfa\n\xef\xbb\xbf", [b"a", b"\xef\xbb\xbf"]),
        (b"\xff\0\xe2\x80\xa8", [b"\xff\0\xe2\x80\xa8"]),
        (b"\n", [b""]),
        (b"", []),
    ],
)
def test_a_text_is_all_of_its_line(data: bytes, texts: list[bytes], folder: Path) -> None:
    (folder / "a.txt").write_bytes(data)
    (rows,) = load_texts("a.txt", text_manifest(), None).values()
    assert rows.tolist() == texts


def test_words_and_standard_input_are_texts(
    ask: Ask, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed(monkeypatch, "äöü\nb c".encode())
    out = ask("embed", "notes", "-", "how do bees see?", "--text", "owls", "--json")[1]
    assert [row.get("text", row.get("file")) for row in lines(out)] == [
        *("-", "-", "how do bees see?", "owls")
    ]
    same(out, embedded(target, ["äöü", "b c", "how do bees see?", "owls"]))
    typed(monkeypatch, b"")
    assert ask("embed", "notes", "-", "--json")[:2] == (0, "")


def test_a_column_is_texts(ask: Ask, target: str) -> None:
    quoted = 'id,text\n1,"owls, see\nat ""night"""\n2,jays\n\n'
    Path("a.csv").write_text(quoted)
    Path("b.tsv").write_text('id\ttext\n1\towls "see" at\n2\tjays\n')
    Path("c.jsonl").write_text('{"text": "owls\\nsee"}\n{"text": "jays", "id": 2}\n')
    expected = [*('owls, see\nat "night"', "jays"), 'owls "see" at', "jays", "owls\nsee", "jays"]
    out = ask("embed", "notes", "a.csv", "b.tsv", "c.jsonl", "--column", "text", "--json")[1]
    same(out, embedded(target, expected))
    Path("d.jsonl").write_text('"owls"\n"jays"\n')
    same(ask("embed", "notes", "d.jsonl", "--json")[1], embedded(target, ["owls", "jays"]))


OF_COLUMNS = (
    "keras-mrl: A file of columns has a header (.csv, .tsv) or an object a line (.jsonl), and "
    "--column names the texts. Received: {}.\n"
)


@pytest.mark.parametrize(
    ("name", "content", "words", "received"),
    [
        ("a.csv", "id,text\n", (), "a.csv with no --column. Choose one of id, text"),
        ("a.csv", "id\n", ("b",), "a.csv with --column b. Choose one of id"),
        ("a.csv", "", ("b",), "a.csv with --column b. Choose one of none"),
        ("a.csv", "a,b\n1\n", ("b",), "a.csv, line 2, without b. Mend the line"),
        ("a.jsonl", '{"b": 1}\n', ("b",), "a.jsonl, line 1, which has no text 'b'. Name a key "),
        ("a.jsonl", '{"b": "c"}\n', (), "a.jsonl, line 1, which is no text. Name a key with "),
        ("a.jsonl", '"c"\n{', (), "a.jsonl, line 2 (Expecting property name "),
        ("a.jsonl", '"\\ud800"\n', (), "a.jsonl, line 1 ('utf-8' codec can't encode character "),
    ],
)
def test_what_has_no_such_column_is_refused(
    name: str, content: str, words: tuple[str, ...], received: str, ask: Ask
) -> None:
    Path(name).write_text(content)
    column = ("--column", *words) if words else ()
    status, out, err = ask("embed", "notes", name, *column)
    assert (status, out) == (1, "")
    assert err.startswith(OF_COLUMNS.format(received)[: -len(".\n")])
    assert err.count("\n") == 1


def test_a_file_in_another_encoding_is_refused(ask: Ask) -> None:
    Path("a.txt").write_bytes("owls".encode("utf-16"))
    assert ask("embed", "notes", "a.txt")[2] == (
        "keras-mrl: A file of texts is of UTF-8. Received: a.txt, of UTF-16. Save it anew as "
        "UTF-8: iconv -f UTF-16 -t UTF-8.\n"
    )
    Path("b.txt").write_bytes(b"\xef\xbb\xbfowls\nb\xff\xfe\0c")
    (rows,) = load_texts("b.txt", text_manifest(), None).values()
    assert rows.tolist() == [b"owls", b"b\xff\xfe\0c"]


def test_a_model_of_images_takes_no_texts(call: Call, ask: Ask) -> None:
    del call
    status, _, err = ask("embed", "notes", "owls.png", "owls")
    assert status == 1
    assert "Texts are given as .txt, .csv, .tsv, .jsonl, .npy or .npz, as - for standard" in err
    assert "give one word as --text" in err


def test_a_line_is_no_column(ask: Ask) -> None:
    Path("a.txt").write_text("owls")
    assert ask("embed", "notes", "a.txt", "--column", "b")[::2] == (
        2,
        "keras-mrl: --column is of files of columns: .csv, .tsv, .jsonl. Received: a.txt with "
        "--column b. Leave it out: a line is a text.\n",
    )


# Embedded.


def test_a_table_of_texts(ask: Ask) -> None:
    out = ask("embed", "plain", "how do bees see?", "--dim", "8")[1]
    header, row = out.splitlines()
    assert header.split() == ["FILE", "ROW", "DIM", "EMBEDDING"]
    assert row.startswith("how do bees see?  ")


def test_a_prompt_that_the_model_lacks_is_refused_before_files_are_read(ask: Ask) -> None:
    assert ask("embed", "notes", "absent.txt", "--prompt", "title")[2] == (
        "keras-mrl: prompt must be the name of one of the model's prompts. Received: --prompt "
        "title for model 'birds'. Choose one of query, passage.\n"
    )
    assert ask("embed", "plain", "absent.txt", "--prompt", "query")[2] == (
        "keras-mrl: Only a model with prompts takes one. Received: --prompt query for model "
        "'birds', which has none. Leave --prompt out.\n"
    )


def test_texts_are_written_and_gone_on_with(
    ask: Ask, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"{bird} {number}" for bird in BIRDS for number in range(10)]
    Path("a.txt").write_text("\n".join(texts))
    words = ("a.txt", "--out", "E.npy", "--prompt", "passage", "--max-batch-size", "1")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", Terminal(interrupt_at="16/40 rows"))
        assert ask("embed", "notes", *words)[:2] == (130, "")
    status, _, err = ask("embed", "notes", *words[:3])
    assert status == 1
    assert "All rows of a file are made alike. Received: prompt='' for E.npy.partial" in err
    assert ask("embed", "notes", *words)[:2] == (0, "40 rows of dim 64 are in E.npy.\n")
    expected = embedded(target, ["passage: " + text for text in texts])
    np.testing.assert_allclose(np.load("E.npy"), expected, atol=1e-6)


def test_calls_of_texts_are_small_enough_to_be_answered_in_time(target: str) -> None:
    unset = dict.fromkeys(("timeout", "max_batch_size", *TLS_FLAGS))
    asked = {"target": target, "model": "notes", "files": ["a.txt"], "metadata": ()}
    arguments = SimpleNamespace(**unset, **asked, no_proxy=False, wait=0.0)
    with connect_and_describe(arguments) as (client, _):
        assert client.options.max_batch_size == 64


# Classified.


def test_texts_are_classified(ask: Ask) -> None:
    Path("a.txt").write_text("\n".join(BIRDS))
    out = ask("classify", "intents", "a.txt", "what is my balance?", "--json")[1]
    rows = lines(out)
    assert [row.get("file", row.get("text")) for row in rows] == [
        *["a.txt"] * 4,
        "what is my balance?",
    ]
    assert all(len(row["classes"]) == 1 for row in rows)
    assert len(ask("classify", "intents", "what is it?", "--dim", "64")[1].splitlines()) == 2


# Searched for.


@pytest.fixture
def built(ask: Ask, call: Call, target: str) -> Callable[..., Ended]:
    """Build an index of the birds in `I`, whose rows were embedded with this prompt."""

    def build(prompt: str | None, *words: str, model: str = "notes") -> Ended:
        Path("birds.txt").write_text("\n".join(BIRDS))
        given = () if prompt is None else ("--prompt", prompt)
        assert ask("embed", model, "birds.txt", *given, "--out", "E.npy").status == 0
        funnel = ("--dims", "8,64", "--shortlists", "4", "--k", "3", "--engine", "exact")
        arguments = ("build", "--embeddings", "E.npy", "--out", "I", *funnel, *words)
        return call("index", *arguments, "--target", target, "--model", model)

    return build


def test_a_text_is_searched_for_in_an_index(built: Callable[..., Ended], ask: Ask) -> None:
    status, out, err = built("passage", "--prompt", "passage")
    assert (status, err) == (0, "")
    assert "  prompt       'passage: ', before each text of the gallery\n" in out
    out = ask("search", "notes", "I", QUESTION, "--text", "acorns", "--json")[1]
    owls, jays = lines(out)
    assert (owls["text"], owls["ids"][0]) == (QUESTION, 0)
    assert (jays["text"], jays["ids"][0]) == ("acorns", 1)
    plain = lines(ask("search", "notes", "I", QUESTION, "--prompt", "", "--json")[1])
    assert plain[0]["scores"] != owls["scores"]
    assert "no prompt of" not in ask("search", "notes", "I", QUESTION, "--prompt", "x")[2]


def test_one_call_finds_what_two_find(built: Callable[..., Ended], ask: Ask) -> None:
    built("passage", "--prompt", "passage")
    Path("q.txt").write_text(f"{QUESTION}\nwho buries acorns\n")
    two = lines(ask("search", "notes", "I", "q.txt", QUESTION, "--json")[1])
    one = lines(ask("search", "gallery", "q.txt", QUESTION, "--json")[1])
    assert [row["ids"] for row in one] == [row["ids"] for row in two]
    assert [row.get("text", row.get("file")) for row in one] == ["q.txt", "q.txt", QUESTION]
    for flags, as_two in ((("--prompt", "passage"), False), (("--prompt", "query"), True)):
        [found] = lines(ask("search", "gallery", QUESTION, *flags, "--json")[1])
        assert bool(np.allclose(found["scores"], two[2]["scores"], atol=1e-5)) is as_two
    nearest = lines(ask("search", "gallery", QUESTION, "--k=1", "--json")[1])
    assert [row["ids"] for row in nearest] == [[0]]
    typed_out = ask("search", "gallery", QUESTION)[1]
    assert typed_out.splitlines()[1].split()[-3].startswith("0:")


def test_an_index_without_the_model_s_prompt_is_not_built(built: Callable[..., Ended]) -> None:
    status, out, err = built("passage")
    assert (status, out) == (1, "")
    assert err == (
        "keras-mrl: The gallery of a model with a prompt for galleries is embedded with that "
        "prompt. Received: an index whose gallery had none, for a model with the prompt "
        "'passage', 'passage: '. Embed the gallery with --prompt passage, and build the index "
        "with --prompt passage.\n"
    )
    assert not Path("I").exists()


def test_a_gallery_of_another_prompt_is_refused(built: Callable[..., Ended], ask: Ask) -> None:
    assert built("passage", "--prompt", "passage").status == 0
    rewrite_card(Path("I"), prompt="doc: ")
    status, out, err = ask("search", "notes", "I", QUESTION, "--no-verify")
    assert (status, out) == (1, "")
    assert "an index whose gallery had 'doc: ', for a model with the prompts: query 'quer" in err


@pytest.mark.parametrize(
    ("words", "status", "received"),
    [
        ((QUESTION, "--k", "4"), 1, "--k must lie in 1..3, as many as the served gallery answers."),
        ((QUESTION, "--among", "i.npy"), 2, "Received: --among without a folder."),
        ((), 2, "Queries are the rows of --query, or texts and files that a served model embeds."),
    ],
)
def test_what_a_served_gallery_cannot_do_is_refused(
    words: tuple[str, ...], status: int, received: str, ask: Ask
) -> None:
    ended = ask("search", "gallery", *words)
    assert (ended.status, ended.out) == (status, "")
    assert received in ended.err
    assert ended.err.count("\n") == 1


def test_a_search_needs_a_folder_or_a_server(call: Call, folder: Path) -> None:
    del folder
    status, out, err = call("search")
    assert (status, out) == (2, "")
    assert "Name a folder, or a server: --target localhost:8500" in err


def test_a_model_without_a_gallery_says_so(ask: Ask) -> None:
    assert "Only an index can be searched" in ask("search", "notes", QUESTION)[2]
    assert ask("search", "notes", "absent.index", QUESTION).status == 1


# Shown.


def test_inspect_shows_tokenizer_prompts_and_length(ask: Ask) -> None:
    out = ask("inspect", "gallery")[1]
    for line in (
        "  tokenizer    wordpiece of 30522 tokens, lower case; at most 256 tokens of a text; "
        "pooling mean\n",
        "  prompts      query 'query: ', passage 'passage: '\n",
        "  operations   FastBertNormalize, of tensorflow-text 2.21.0\n",
        "  gallery      4 rows, embedded with the prompt 'passage: '\n",
    ):
        assert line in out
    assert "  prompts      none\n" in ask("inspect", "plain")[1]
