"""`keras-mrl embed`: embeddings of files, printed, or written to one file that is gone on with."""

import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest

from keras_mrl_serving.calls import Arrays
from keras_mrl_serving.calls import Call as WireCall
from tests.helpers.cli import KERAS_MRL, RED, Call, Ended, Terminal, lines, paint
from tests.helpers.faulty_server import FaultyServer, Request, manifest, rows

Ask = Callable[..., Ended]


def test_a_table_of_embeddings(ask: Ask) -> None:
    np.save("x.npy", np.array([[1, -2.5, 3]], np.float32))
    assert ask("embed", "rows", "x.npy")[1] == (
        "FILE      ROW  DIM  EMBEDDING\nx.npy       0    3    1.0000  -2.5000   3.0000\n"
    )
    assert ask("embed", "rows", "x.npy", "--dim", "1")[1].splitlines()[1].split() == [
        *("x.npy", "0", "1", "1.0000")
    ]


def test_the_cheapest_dim_that_is_good_enough(ask: Ask) -> None:
    paint("red.png", RED)
    for share, dim in (("0.8", 1), ("0.98", 3), ("top1=0.8", 1)):
        out = ask("embed", "bytes", "red.png", "--quality", share, "--json")[1]
        assert lines(out)[0]["dim"] == dim
    status, out, err = ask("embed", "bytes", "red.png", "--quality", "map=0.8")
    assert (status, out) == (1, "")
    assert err == (
        "keras-mrl: measure must be one of top1. Received: measure='map'. Choose one of them.\n"
    )
    np.save("x.npy", np.zeros((1, 3), np.float32))
    err = ask("embed", "rows", "x.npy", "--quality", "0.8")[2]
    assert err.startswith("keras-mrl: A dim is chosen by the quality in the manifest. Received: ")


def test_files_become_one_corpus_in_order(ask: Ask) -> None:
    corpus = np.arange(300, dtype=np.float32).reshape(100, 3)
    np.save("b.npy", corpus[:60])
    np.savez("a.npz", x=corpus[60:])
    assert ask("embed", "rows", "b.npy", "a.npz", "--out", "E.npy") == (
        0,
        "100 rows of dim 3 are in E.npy.\n",
        "",
    )
    np.testing.assert_array_equal(np.load("E.npy"), corpus)
    status, out, err = ask("embed", "rows", "b.npy", "--out", "E.npy")
    assert (status, out) == (1, "")
    assert err.startswith("keras-mrl: Embeddings are never overwritten. Received: path='E.npy'")
    arguments = ("b.npy", "a.npz", "--dim=1", "--out", "F.npy", "--json")
    files = [{"file": "b.npy", "row": 0}, {"file": "a.npz", "row": 60}]
    written = {"out": "F.npy", "rows": 100, "dim": 1, "files": files}
    assert lines(ask("embed", "rows", *arguments)[1]) == [written]
    assert ask("embed", "rows", "b.npy", "--out", "no/E.npy")[2] == (
        "keras-mrl: --out must be a file that can be written. "
        "Received: no/E.npy (No such file or directory). Name another.\n"
    )


def test_an_interrupted_corpus_goes_on(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = np.arange(150, dtype=np.float32).reshape(50, 3)
    np.save("x.npy", corpus)
    words = ("x.npy", "--out", "E.npy", "--max-batch-size", "1")
    with monkeypatch.context() as patch:
        terminal = Terminal(interrupt_at="8/50 rows")
        patch.setattr(sys, "stderr", terminal)
        assert ask("embed", "rows", *words)[:2] == (130, "")
    assert terminal.getvalue().endswith(
        "keras-mrl: 8 of 50 rows are embedded; the same command goes on after the last row that "
        "was safe.\nkeras-mrl: interrupted\n"
    )
    assert not Path("E.npy").exists()
    assert json.loads(Path("E.npy.partial.json").read_text())["rows"] == 8
    assert ask("embed", "rows", *words).status == 0
    np.testing.assert_array_equal(np.load("E.npy"), corpus)


def test_sigterm_says_how_far_it_came(folder: Path) -> None:
    np.save("x.npy", rows(50))
    is_held, is_over = threading.Event(), threading.Event()

    def hold(request: Request, _: grpc.ServicerContext) -> None:
        if request.signature == "embed_4" and request.first == 17:  # rows count from 1
            is_held.set()
            is_over.wait(60)

    with FaultyServer(before=hold) as server:
        words = ("embed", "--target", server.target, "x.npy", "--out", "E.npy")
        process = subprocess.Popen(
            [*KERAS_MRL, *words, "--max-batch-size=1"], stderr=subprocess.PIPE, text=True
        )
        assert is_held.wait(60)
        process.terminate()
        assert process.stderr is not None
        line = process.stderr.readline()
        is_over.set()
        with process.stderr:
            assert process.wait(60) == 128 + signal.SIGTERM
    assert re.fullmatch(
        r"keras-mrl: \d+ of 50 rows are embedded; the same command goes on after the last row "
        r"that was safe\.\n",
        line,
    )
    state = json.loads((folder / "E.npy.partial.json").read_text())
    assert line.startswith(f"keras-mrl: {state['rows']} of 50 rows")


def test_a_number_json_has_not_is_null(ask: Ask) -> None:
    np.save("x.npy", np.array([[1, np.nan, np.inf]], np.float32))
    row = lines(ask("embed", "rows", "x.npy", "--json")[1])[0]
    assert row["embedding"] == [1, None, None]


@pytest.mark.parametrize("more", [(), ("--out", "E.npy")], ids=["printed", "written"])
def test_one_connection(call: Call, folder: Path, more: tuple[str, ...]) -> None:
    del folder
    np.save("x.npy", rows(3))
    peers = set()
    with FaultyServer(before=lambda _, context: peers.add(context.peer())) as server:
        assert call("embed", "--target", server.target, "x.npy", *more).status == 0
    assert len(peers) == 1
    assert [request.signature for request in server.requests] == ["describe", "embed_4"]


def of_exits(call: WireCall) -> Arrays:
    """A model whose early exit adds one to every number."""
    exits = tuple({"name": name, "multiply_adds": 1} for name in ("early", "last"))
    x = call.inputs.get("x")
    if x is None:
        text = replace(manifest(1), exits=exits, model_id=None).to_json()
        return {"manifest": np.array([text.encode()], object)}
    return {"embedding": x + (call.signature == "embed_early_4")}


def test_an_exit_is_asked_and_written(call: Call, folder: Path) -> None:
    del folder
    np.save("x.npy", rows(3))
    with FaultyServer({1: of_exits}) as server:
        ask = call.of("embed", "--target", server.target, "x.npy")
        printed = [row["embedding"] for row in lines(ask("--exit=early", "--json")[1])]
        assert ask("--exit=early", "--out=E.npy")[:2] == (0, "3 rows of dim 4 are in E.npy.\n")
        for more in ((), ("--out=F.npy",)):
            assert "Choose one of early, last." in ask.refused("--exit=middle", *more)
    np.testing.assert_array_equal(np.load("E.npy"), rows(3) + 1)
    np.testing.assert_array_equal(printed, rows(3) + 1)


def test_flags_that_do_not_fit(call: Call) -> None:
    command = call.of("embed", "--target", "t:1", "x.npy")
    assert command.refused("--dim", "1", "--quality", "1", status=2) == (
        "Only one of --dim, --quality can be given. Received: --dim with --quality. Leave out one."
    )
    for quality, number in (("98", "98"), ("top1=", ""), ("top1=0", "0"), ("x", "x")):
        assert command.misused("--quality", quality) == (
            "Invalid value for '--quality': must be a share in (0, 1]. "
            f"Received: {number!r}. Give for example 0.95."
        )
