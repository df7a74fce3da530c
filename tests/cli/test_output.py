"""What a command prints: whatever strings hold, the terminal shows it and does no more."""

import ast
import json
import os
import re
import sys
import unicodedata
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

import keras_mrl_cli
from keras_mrl_cli import serve
from keras_mrl_cli.output import Table, print_json, print_line, print_note, printable
from keras_mrl_cli.shared import RefusalError, command
from keras_mrl_serving import ExactIndex, FunnelSchedule
from tests.helpers.cli import Call, Terminal, lines
from tests.helpers.faulty_server import FaultyServer, Request, rows
from tests.helpers.galleries import rewrite_card

HOSTILE = "a\x1b]0;title\x07b\x9b2Jc\rd\ne\u202ef\u2066g\u2028h\x00i\x7fj\u200bk"
ESCAPED = r"a\x1b]0;title\x07b\x9b2Jc\rd\ne\u202ef\u2066g\u2028h\x00i\x7fj\u200bk"


def steering(text: str) -> list[str]:
    """The characters that do more than show: all but those that print, and line ends."""
    return [c for c in text if c != "\n" and unicodedata.category(c)[0] in "CZ" and c != " "]


def test_nothing_but_output_prints() -> None:
    """So there is one place in which strings are escaped."""
    printers = {"print", "echo", "secho", "print_exc", "print_exception", "write"}
    found = []
    for file in sorted(Path(keras_mrl_cli.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                called = node.func
                name = called.id if isinstance(called, ast.Name) else getattr(called, "attr", "")
                if name in printers:
                    found.append((file.name, name))
    assert {file for file, _ in found} == {"output.py"}


def test_characters_that_do_not_print_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    assert printable(HOSTILE) == ESCAPED
    assert printable("größe 値 \U0001f426 a b") == "größe 値 \U0001f426 a b"
    print_line(HOSTILE)
    print_note(HOSTILE)
    Table({HOSTILE: 3, "X": -3}).row(HOSTILE, HOSTILE)
    print_json(**{HOSTILE: [HOSTILE, float("nan")]})
    printed = capsys.readouterr()
    *text, line = printed.out.splitlines()
    assert text[0] == ESCAPED
    assert printed.err == f"{ESCAPED}\n"
    assert steering(printed.out + printed.err) == []
    assert line.isascii()
    assert json.loads(line) == {HOSTILE: [HOSTILE, None]}


def test_refusals_and_mistakes_are_escaped(monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    def refused(_: Any) -> int:
        raise RefusalError(HOSTILE)

    def broken(_: Any) -> int:
        raise ZeroDivisionError(HOSTILE)

    monkeypatch.setattr(serve, "serve", command("Serve nothing.")(refused))
    assert call.refused("serve") == ESCAPED
    monkeypatch.setattr(serve, "serve", command("Serve nothing.")(broken))
    ended = call("serve")
    assert (ended.status, ended.out) == (1, "")
    assert "ZeroDivisionError" in ended.err
    assert steering(ended.err) == []


@pytest.mark.parametrize(
    "words",
    [
        [HOSTILE],
        ["index", HOSTILE],
        ["classify", "--target", f"localhost:1{HOSTILE}", "x.npy"],
        ["classify", "--target", "localhost:1", f"--{HOSTILE}", "x.npy"],
        ["classify", "--target", "localhost:1", "x.npy", "--dim", HOSTILE],
        ["classify", "--target", "localhost:1", "x.npy", "--policy", HOSTILE.replace("\0", "")],
        ["demo", "--backend", HOSTILE],
        ["demo", HOSTILE],
        ["deploy", "out", "--base-path", HOSTILE.replace("\0", "")],
        ["inspect", HOSTILE.replace("\0", "")],
        ["index", "show", HOSTILE.replace("\0", "")],
        ["search", HOSTILE.replace("\0", ""), "--query", "q.npy"],
        ["serve", "--model_base_path", "x", "--dev", f"--{HOSTILE}"],
        ["export", HOSTILE.replace("\0", ""), "--base-path", "models"],
    ],
    ids=lambda words: " ".join(word for word in words if word.isprintable()),
)
def test_what_is_typed_is_escaped(words: list[str], call: Call, folder: Path) -> None:
    del folder
    ended = call(*words)
    assert ended.status
    assert ended.out == ""
    assert steering(ended.err) == []
    assert ended.err.count("keras-mrl: ") == 1
    assert "Traceback" not in ended.err


def test_what_a_server_says_is_escaped(call: Call, folder: Path) -> None:
    del folder
    np.save("x.npy", rows(2))

    def refuse(request: Request, context: grpc.ServicerContext) -> None:
        if request.signature == "embed_4":
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, HOSTILE.replace("\0", ""))

    with FaultyServer(before=refuse) as server:
        for more in ([], ["--out", "E.npy"], ["--json"]):
            ended = call("embed", "x.npy", "--target", server.target, *more)
            assert (ended.status, ended.out) == (1, "")
            assert r"\x1b]0;title" in ended.err
            assert steering(ended.err) == []
            (line,) = ended.err.splitlines()
            assert line.startswith("keras-mrl: ")


def test_what_an_index_says_is_escaped(call: Call, folder: Path) -> None:
    ExactIndex.build(rows(9), FunnelSchedule((2, 4), (5,), 4), None, "cosine", HOSTILE).save("i")
    plan = {
        "factory": "Flat",
        "settings": "",
        "schedule": {"dims": [2, 4], "shortlists": [5], "k": 4},
        "quality": 0.5,
        "error": 0.5,
        "seconds": 0.5,
        "target": 0.5,
        "measure": HOSTILE,
        "front": [],
    }
    rewrite_card(folder / "i", plan=plan, made_with=HOSTILE, first_stage=None)
    ended = call("index", "show", "i")
    assert (ended.status, ended.err) == (0, "")
    assert ended.out.count(ESCAPED) == 3
    assert steering(ended.out) == []
    assert lines(call("index", "show", "i", "--json").out)[0]["made_with"] == HOSTILE
    for wrong in ([1], "x", {**plan, "quality": HOSTILE}, {**plan, "factory": HOSTILE}):
        rewrite_card(folder / "i", plan=wrong)
        ended = call("index", "show", "i")
        assert ended.status == 1
        assert ended.err.startswith("keras-mrl: A ")
        assert steering(ended.err) == []


def test_progress_alone_moves_the_cursor(
    call: Call, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del folder
    name = HOSTILE.replace("\0", "") + ".npy"
    np.save(name, rows(2))
    terminal = Terminal()
    with FaultyServer() as server, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        words = ("embed", name, "gone.npy", "--skip-unreadable")
        assert call(*words, "--target", server.target).status == 0
    text = terminal.getvalue()
    assert "rows/s" in text
    assert steering(re.sub("\r\x1b\\[K", "", text)) == []


def test_names_of_files_that_are_no_text(call: Call, folder: Path) -> None:
    del folder
    name = os.fsdecode(b"a\xff\x1b[2J.npy")
    Path(name).write_text("no array")
    with FaultyServer() as server:
        ended = call("embed", name, "--target", server.target)
    assert r"a\udcff\x1b[2J.npy" in ended.err
    assert steering(ended.err) == []
