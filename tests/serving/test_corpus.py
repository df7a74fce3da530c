"""A corpus embedded to disk: resumed, whole, and never mixed from two models."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keras_mrl_serving.aio import AsyncClient
from keras_mrl_serving.calls import Call
from keras_mrl_serving.client import Client
from keras_mrl_serving.contract import Manifest
from keras_mrl_serving.corpus import EmbeddingFile, RowDigest, windows
from keras_mrl_serving.errors import (
    EncoderMismatchError,
    InvalidInputError,
    KerasMrlError,
    ServerUnavailableError,
    UnknownExitError,
)
from keras_mrl_serving.flows import Arrays
from keras_mrl_serving.options import Options
from keras_mrl_serving.results import Embedded
from keras_mrl_serving.testing import InMemoryServer
from tests.helpers.manifests import ENCODER

Model = Callable[[Call], Arrays]
Refuses = Callable[[type[Exception], str], AbstractContextManager[None]]

SOAK = bool(os.environ.get("KERAS_MRL_SOAK"))
ROWS = np.random.default_rng(0).normal(size=(97, 4)).astype(np.float32)
SPECS: Any = {"x": {"dtype": "float32", "shape": [None, 4]}}
SMALL = Options(max_batch_size=2, max_in_flight=4)  # windows of 16 rows


@pytest.fixture
def server(toys: Mapping[str, Model], manifests: Mapping[str, Manifest]) -> InMemoryServer:
    return InMemoryServer(manifests["classifier"], toys["classifier"])


def batches(sizes: list[int]) -> Iterator[dict[str, Any]]:
    start = 0
    for size in sizes:
        yield {"x": ROWS[start : start + size]}
        start += size


@pytest.mark.parametrize(
    "data",
    [
        lambda: ROWS,
        lambda: {"x": ROWS},
        lambda: batches([10] * 9 + [7]),
        lambda: batches([1] * 97),
        lambda: iter([ROWS[:90], ROWS[90:90], ROWS[90:]]),
        lambda: [ROWS],
    ],
)
def test_a_corpus_is_embedded_as_at_once(
    server: InMemoryServer, tmp_path: Path, data: Callable[[], Any]
) -> None:
    seen: list[tuple[int, int | None]] = []
    client = Client(server, options=SMALL)
    embeddings = client.embed_dataset(
        data(), 4, tmp_path / "rows.npy", progress=lambda *done: seen.append(done)
    )
    expected = Client(server).embed(ROWS, 4)
    np.testing.assert_allclose(embeddings, expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(np.load(tmp_path / "rows.npy"), embeddings)
    assert embeddings.dtype == np.float32
    assert not embeddings.flags.writeable
    assert os.listdir(tmp_path) == ["rows.npy"]
    assert seen[-1][0] == 97
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)

    async def main() -> Any:
        async with AsyncClient(server, options=SMALL) as waiting:
            return await waiting.embed_dataset(data(), 4, tmp_path / "async.npy")

    np.testing.assert_array_equal(asyncio.run(main()), embeddings)


def test_no_rows_are_an_empty_file(server: InMemoryServer, tmp_path: Path) -> None:
    assert Client(server).embed_dataset(ROWS[:0], 4, tmp_path / "a.npy").shape == (0, 4)
    assert np.load(tmp_path / "a.npy").shape == (0, 4)
    assert Client(server).embed_dataset(iter([]), 4, tmp_path / "b.npy").shape == (0, 4)


@pytest.mark.parametrize("as_batches", [False, True])
def test_what_was_done_before_an_error_is_not_done_again(
    server: InMemoryServer, tmp_path: Path, as_batches: bool
) -> None:
    def data() -> Any:
        return batches([5] * 19 + [2]) if as_batches else ROWS

    path = tmp_path / "rows.npy"
    client = Client(server, options=SMALL)
    client.embed(ROWS[:1], 4)
    answer, num_calls = server.answer, 20

    def fails_in_the_end(call: Call) -> Arrays | None:
        nonlocal num_calls
        num_calls -= 1
        if num_calls < 0:
            raise ServerUnavailableError("gone")
        return answer(call)

    server.answer = fails_in_the_end
    with pytest.raises(ServerUnavailableError):
        client.embed_dataset(data(), 4, path)
    assert sorted(os.listdir(tmp_path)) == ["rows.npy.partial", "rows.npy.partial.json"]
    done = json.loads((tmp_path / "rows.npy.partial.json").read_text())["rows"]
    assert 0 < done <= 40
    server.answer = answer
    server.calls.clear()
    embeddings = client.embed_dataset(data(), 4, path)
    embedded = sum(len(call.inputs["x"]) for call in server.calls if call.signature == "embed_4")
    assert embedded == 97 - done
    np.testing.assert_allclose(embeddings, Client(server).embed(ROWS, 4), rtol=0, atol=1e-6)


def test_rows_that_were_not_said_to_be_safe_are_written_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.npy"
    rows = np.arange(8, dtype=np.float32).reshape(4, 2)
    with EmbeddingFile(path, 2, "a") as file:
        file.append(Embedded(rows[:2], "a"), {"x": rows[:2]})
    with open(f"{path}.partial", "ab") as torn:
        torn.write(b"half a row")
    with EmbeddingFile(path, 2, "a") as file:
        assert file.rows == 2
        file.append(Embedded(rows[2:], "a"), {"x": rows[2:]})
        np.testing.assert_array_equal(file.finish(), rows)


def test_two_models_never_share_a_file(
    server: InMemoryServer, tmp_path: Path, refuses: Refuses
) -> None:
    path = tmp_path / "rows.npy"
    with EmbeddingFile(path, 4, "dead") as file:
        file.append(Embedded(np.zeros((3, 4), np.float32), "dead"), {"x": ROWS[:3]})
    text = (
        "All rows of a file are embedded by one model. Received: rows of the model with "
        f"fingerprint 'dead' and of '5e1f', for {path}.partial. Serve the model it was begun with "
        f"and call again to go on, or remove {path}.partial and {path}.partial.json to begin anew."
    )
    with refuses(EncoderMismatchError, text):
        Client(server).embed_dataset(ROWS, 4, path)


def test_a_model_swapped_meanwhile_stops_the_corpus(server: InMemoryServer, tmp_path: Path) -> None:
    def swap(*_: int | None) -> None:
        server.version, server.manifest = 2, replace(server.manifest, fingerprint="new")

    client = Client(server, options=SMALL)
    with pytest.raises(EncoderMismatchError, match="'new' and of '5e1f'"):
        client.embed_dataset(ROWS, 4, tmp_path / "rows.npy", progress=swap)
    assert json.loads((tmp_path / "rows.npy.partial.json").read_text())["rows"] == 16


def test_the_same_model_under_another_number_goes_on(
    server: InMemoryServer, tmp_path: Path
) -> None:
    def publish(*_: int | None) -> None:
        server.version += 1

    client = Client(server, options=SMALL)
    assert len(client.embed_dataset(ROWS, 4, tmp_path / "rows.npy", progress=publish)) == 97


def test_what_cannot_be_gone_on_with_is_refused(tmp_path: Path, refuses: Refuses) -> None:
    path = tmp_path / "rows.npy"
    journal, growing = Path(f"{path}.partial.json"), Path(f"{path}.partial")
    with EmbeddingFile(path, 2, "a") as file:
        file.append(Embedded(np.zeros((3, 2), np.float32), "a"), {"x": ROWS[:3]})
        with refuses(
            BlockingIOError,
            f"One process writes a file of embeddings. Received: {growing}, which another is "
            "writing. Wait for it, or choose another path.",
        ):
            EmbeddingFile(path, 2, "a")
    with refuses(
        ValueError,
        f"All rows of a file are made alike. Received: dim=4 for {growing}, begun with dim=2. Give "
        f"what it was begun with, or remove {growing} and {journal}.",
    ):
        EmbeddingFile(path, 4, "a")
    os.truncate(growing, 150)
    with refuses(
        ValueError,
        f"A file of embeddings and its journal must agree. Received: 150 bytes in {growing} where "
        f"3 rows need 152. Remove {growing} and {journal} to begin anew.",
    ):
        EmbeddingFile(path, 2, "a")
    text = (
        f"A file of embeddings and its journal must agree. Received: {journal}, which does not "
        f"read. Remove {growing} and {journal} to begin anew."
    )
    for damaged in ("{", "[" * 5000, "3"):
        journal.write_text(damaged)
        with refuses(ValueError, text):
            EmbeddingFile(path, 2, "a")
    journal.unlink()
    journal.mkdir()
    with refuses(ValueError, text):
        EmbeddingFile(path, 2, "a")
    path.touch()
    with pytest.raises(FileExistsError, match="Embeddings are never overwritten"):
        EmbeddingFile(path, 2, "a")


@pytest.mark.parametrize(
    ("made", "received"),
    [
        ({"other_tower": True}, ("other_tower=False", "other_tower=True")),
        ({"exit": "early"}, ("exit='last'", "exit='early'")),
        ({"prompt": "a at exit b"}, ("prompt=''", "prompt='a at exit b'")),
        ({"exit": "early", "prompt": "find: "}, ("exit='last'", "exit='early'")),
    ],
)
def test_rows_that_are_made_otherwise_never_share_a_file(
    tmp_path: Path, refuses: Refuses, made: Any, received: tuple[str, str]
) -> None:
    path = tmp_path / "rows.npy"
    growing = f"{path}.partial"
    with EmbeddingFile(path, 2, "a", **made) as file:
        file.append(Embedded(np.zeros((3, 2), np.float32), "a"), {"x": ROWS[:3]})
    refusal = (
        f"All rows of a file are made alike. Received: {received[0]} for {growing}, begun with "
        f"{received[1]}. Give what it was begun with, or remove {growing} and {growing}.json."
    )
    with refuses(ValueError, refusal):
        EmbeddingFile(path, 2, "a")
    # A client of before compares the fingerprint alone: it must not go on with other rows.
    assert json.loads(Path(f"{growing}.json").read_text())["fingerprint"] != "a"
    with EmbeddingFile(path, 2, "a", **made) as file:
        assert file.rows == 3


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_corpus_is_embedded_at_one_exit(tmp_path: Path, kind: type[Any]) -> None:
    exits = tuple({"name": name, "multiply_adds": 1} for name in ("early", "last"))
    manifest = replace(ENCODER, inputs=SPECS, dims=(2, 4), width=4, exits=exits)

    def answer(call: Call) -> Arrays:
        return {"embedding": call.inputs["x"] + (call.signature == "embed_early_4")}

    server = InMemoryServer(manifest, answer)

    def embed(path: Path, **more: Any) -> Any:
        made = kind(server, options=SMALL).embed_dataset(ROWS, 4, path, **more)
        return asyncio.run(made) if kind is AsyncClient else made

    def interrupt(rows: int, _: object) -> None:
        if rows >= 32:
            raise KeyboardInterrupt

    path = tmp_path / "rows.npy"
    with pytest.raises(KeyboardInterrupt):
        embed(path, exit="early", progress=interrupt)
    for other in (None, "last"):
        with pytest.raises(ValueError, match=r"Received: exit='last' for .* with exit='early'"):
            embed(path, exit=other)
    np.testing.assert_array_equal(embed(path, exit="early"), ROWS + 1)
    assert {call.signature for call in server.calls} == {"describe", "embed_early_4"}
    np.testing.assert_array_equal(embed(tmp_path / "whole.npy"), ROWS)
    for wrong, error in (({"exit": "middle"}, UnknownExitError), (OTHER_SIDE, InvalidInputError)):
        with pytest.raises(error):
            embed(tmp_path / "none.npy", **wrong)
    assert not list(tmp_path.glob("none*"))


OTHER_SIDE = {"exit": "early", "other_tower": True}


def test_a_batch_larger_than_a_window_is_cut() -> None:
    cut = [w["x"] for w in windows(iter([ROWS[:3], ROWS[3:90], ROWS[90:]]), SPECS, 10)]
    assert max(map(len, cut)) < 20
    np.testing.assert_array_equal(np.concatenate(cut), ROWS)


def begin(client: Client, data: Any, path: Path, windows: int = 2) -> None:
    """Embed the first windows of a corpus, and stop as a crash would."""

    def stop(*_: int | None) -> None:
        nonlocal windows
        windows -= 1
        if not windows:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        client.embed_dataset(data, 4, path, progress=stop)


@pytest.mark.parametrize("as_batches", [False, True])
def test_a_corpus_shorter_than_what_is_done_is_another(
    server: InMemoryServer, tmp_path: Path, as_batches: bool, refuses: Refuses
) -> None:
    path = tmp_path / "rows.npy"
    client = Client(server, options=SMALL)
    begin(client, [ROWS] if as_batches else ROWS, path)
    with refuses(
        ValueError,
        "A corpus that is gone on with must be the one that was begun. Received: one that ends "
        "2 rows before those already embedded. Give the same rows in the same order.",
    ):
        client.embed_dataset([ROWS[:30]], 4, path)


@pytest.mark.parametrize("kind", ["array", "dict", "batches", "float64"])
@pytest.mark.parametrize("row", [0, 15, 16, 20, 31])
def test_a_row_that_changed_since_it_was_embedded_is_noticed(
    server: InMemoryServer, tmp_path: Path, kind: str, row: int, refuses: Refuses
) -> None:
    def data(rows: Any) -> Any:
        return {
            "array": rows,
            "dict": {"x": rows},
            "batches": iter([rows[:7], rows[7:]]),
            "float64": rows.astype(np.float64),
        }[kind]

    path = tmp_path / "rows.npy"
    client = Client(server, options=SMALL)
    begin(client, data(ROWS), path)  # 32 rows
    other = ROWS.copy()
    other[row, 2] = np.nextafter(other[row, 2], 9)
    num_calls = len(server.calls)
    with refuses(
        ValueError,
        "A corpus that is gone on with must be the one that was begun. Received: other rows than "
        f"those of {path}.partial. Give the same rows in the same order, or remove {path}.partial "
        f"and {path}.partial.json to begin anew.",
    ):
        client.embed_dataset(data(other), 4, path)
    assert {call.signature for call in server.calls[num_calls:]} <= {"describe"}
    # In windows of another size the rows are the same.
    embeddings = Client(server, options=Options(max_batch_size=3)).embed_dataset(
        data(ROWS), 4, path
    )
    np.testing.assert_allclose(embeddings, Client(server).embed(ROWS, 4), rtol=0, atol=1e-6)


def test_rows_that_are_still_to_come_may_change(server: InMemoryServer, tmp_path: Path) -> None:
    """All but the first and last: the file holds the embeddings of the rows given last."""
    path = tmp_path / "rows.npy"
    client = Client(server, options=SMALL)
    begin(client, ROWS, path)
    other = ROWS.copy()
    other[40] += 1
    embeddings = client.embed_dataset(other, 4, path)
    np.testing.assert_allclose(embeddings, Client(server).embed(other, 4), rtol=0, atol=1e-6)


def test_rows_are_the_same_if_what_is_sent_is(server: InMemoryServer, tmp_path: Path) -> None:
    path = tmp_path / "rows.npy"
    client = Client(server, options=SMALL)
    begin(client, ROWS, path, windows=1)
    begin(client, ROWS.astype(np.float64), path, windows=1)
    begin(client, {"x": ROWS.tolist()}, path, windows=1)
    assert json.loads((tmp_path / "rows.npy.partial.json").read_text())["rows"] == 48
    assert len(client.embed_dataset(np.asfortranarray(ROWS), 4, path)) == 97


@pytest.mark.parametrize("has_digest", [False, True])
def test_a_file_begun_by_an_older_version_is_gone_on_with(
    server: InMemoryServer, tmp_path: Path, has_digest: bool
) -> None:
    path, journal = tmp_path / "rows.npy", tmp_path / "rows.npy.partial.json"
    client = Client(server, options=SMALL)
    begin(client, ROWS, path)
    entry = json.loads(journal.read_text())
    del entry["corpus_sha256"]
    entry["corpus"] = "dead"  # of the rows as they were given
    if not has_digest:
        del entry["rows_sha256"]
    journal.write_text(json.dumps(entry))
    begin(client, ROWS, path, windows=1)  # from now on it is noticed
    assert json.loads(journal.read_text())["rows"] == 48
    other = ROWS.copy()
    other[20] += 1
    with pytest.raises(ValueError, match="must be the one that was begun"):
        client.embed_dataset(other, 4, path)
    assert len(client.embed_dataset(ROWS, 4, path)) == 97


def test_texts_are_told_apart_wherever_they_are_cut() -> None:
    digests = set()
    for texts in (["ab", "c"], ["a", "bc"], ["ab", "c", ""], ["ab\0", "c"], [b"ab", b"\xff"]):
        digest, parts = RowDigest(), RowDigest()
        digest.update({"text": np.array(texts, object)})
        for text in texts:
            parts.update({"text": np.array([text], object)})
        assert digest.hexdigest() == parts.hexdigest()
        digests.add(digest.hexdigest())
    assert len(digests) == 5


def test_another_corpus_is_not_gone_on_with(server: InMemoryServer, tmp_path: Path) -> None:
    path = tmp_path / "rows.npy"

    def stop(*_: int | None) -> None:
        raise KeyboardInterrupt

    client = Client(server, options=SMALL)
    with pytest.raises(KeyboardInterrupt):
        client.embed_dataset(ROWS, 4, path, progress=stop)
    for other in (ROWS[::-1], ROWS[:90]):
        with pytest.raises(ValueError, match="must be the one that was begun"):
            client.embed_dataset(other, 4, path)
    with pytest.raises(InvalidInputError, match="inputs must be named x"):
        client.embed_dataset({"y": ROWS}, 4, path)
    assert len(client.embed_dataset(ROWS.copy(), 4, path)) == 97


@pytest.mark.parametrize("as_batches", [False, True])
def test_rows_of_unequal_inputs_are_never_paired(
    toys: Mapping[str, Model], manifests: Mapping[str, Manifest], tmp_path: Path, as_batches: bool
) -> None:
    spec = {"dtype": "float32", "shape": [None, 4]}
    two = replace(manifests["classifier"], inputs={"x": spec, "y": spec})
    server = InMemoryServer(two, toys["classifier"])
    data: Any = {"x": ROWS[:50], "y": ROWS[:16]}
    with pytest.raises(ValueError, match="the same number of rows"):
        Client(server, options=SMALL).embed_dataset(
            [data] if as_batches else data, 4, tmp_path / "rows.npy"
        )
    assert not (tmp_path / "rows.npy").exists()


def test_encoded_images_keep_their_trailing_zeros(
    manifests: Mapping[str, Manifest], tmp_path: Path
) -> None:
    images = [b"one\x00\x00", b"two", b"\x00"]
    seen: list[bytes] = []

    def answer(call: Call) -> Arrays:
        seen.extend(call.inputs["image"].tolist())
        return {"embedding": np.ones((len(call.inputs["image"]), 4), np.float32)}

    takes = {"image": {"dtype": "string", "shape": [None]}}
    server = InMemoryServer(replace(manifests["classifier"], inputs=takes), answer)
    data: Any = [[image] for image in images]
    Client(server).embed_dataset(data, 4, tmp_path / "rows.npy")
    assert seen == images


@pytest.mark.parametrize(
    "batches", [[(row for row in ROWS)], [1, 2], [None], [{"y": ROWS}], [ROWS, {"y": ROWS}]]
)
def test_batches_the_model_does_not_take_are_refused(
    server: InMemoryServer, tmp_path: Path, batches: Any
) -> None:
    with pytest.raises(InvalidInputError):
        Client(server).embed_dataset(batches, 4, tmp_path / "rows.npy")
    assert not (tmp_path / "rows.npy").exists()


@pytest.mark.parametrize(
    ("data", "received"),
    [
        (None, "NoneType"),
        (3, "int"),
        ("rows.npy", "str"),
        (np.float32(3), "float32"),
        (np.array(3), "ndarray"),
        ({"x": None}, "a dict with NoneType"),
        ({"x": "rows.npy"}, "a dict with str"),
    ],
)
def test_what_is_no_corpus_is_refused(
    server: InMemoryServer, tmp_path: Path, data: Any, received: str, refuses: Refuses
) -> None:
    with refuses(
        InvalidInputError,
        "A corpus is an array, a dict of arrays, or an iterable of such batches. "
        f"Received: {received}. Give rows, such as np.load(file, mmap_mode='r').",
    ):
        Client(server).embed_dataset(data, 4, tmp_path / "rows.npy")
    assert not os.listdir(tmp_path)


def test_nobody_knows_how_many_rows_batches_have(server: InMemoryServer, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    data = [ROWS[:50], ROWS[50:]]
    Client(server, options=SMALL).embed_dataset(
        data, 4, tmp_path / "rows.npy", progress=lambda *done: seen.append(done)
    )
    assert {total for _, total in seen} == {None}


def test_a_file_that_appears_meanwhile_is_not_overwritten(
    server: InMemoryServer, tmp_path: Path
) -> None:
    path = tmp_path / "rows.npy"
    with pytest.raises(FileExistsError):
        Client(server).embed_dataset(ROWS, 4, path, progress=lambda *_: path.write_text("precious"))
    assert path.read_text() == "precious"
    assert (tmp_path / "rows.npy.partial").exists()


PROGRAM = """
import sys
import numpy as np
from keras_mrl_serving import Client, Options

target, rows, path, batch = sys.argv[1:]
options = Options(max_batch_size=int(batch), timeout_s=60)
with Client(target, options=options) as client:
    client.embed_dataset(np.load(rows, mmap_mode="r"), 4, path)
"""


def rows_in(journal: Path) -> int:
    return int(json.loads(journal.read_text())["rows"]) if journal.exists() else 0


@pytest.mark.soak
def test_killed_at_a_random_moment_it_goes_on(saved: Mapping[str, Path], tmp_path: Path) -> None:
    """In `make soak`: a million rows, killed again and again, equal to an uninterrupted run."""
    from keras_mrl_serving.server import DevServer

    count, batch, kills = (1_000_000, 1000, 4) if SOAK else (30_000, 50, 2)
    rng = np.random.default_rng()
    np.save(tmp_path / "rows.npy", rng.normal(size=(count, 4)).astype(np.float32))
    with DevServer(saved["classifier"], file_system_poll_wait_seconds=0) as target:
        arguments = [target, str(tmp_path / "rows.npy")]

        def run(path: Path) -> subprocess.Popen[bytes]:
            return subprocess.Popen(
                [sys.executable, "-c", PROGRAM, *arguments, str(path), str(batch)]
            )

        assert run(tmp_path / "whole.npy").wait() == 0
        path, journal = tmp_path / "torn.npy", tmp_path / "torn.npy.partial.json"
        killed: list[int] = []
        while len(killed) < kills:
            process = run(path)
            done = (killed or [0])[-1]
            moment = rng.integers(done, (done + count) // 2)
            while rows_in(journal) <= moment and process.poll() is None:
                time.sleep(0.001)
            process.send_signal(signal.SIGKILL)
            if process.wait() == 0 or path.exists():  # it had ended
                break
            killed.append(rows_in(journal))
        if not path.exists():
            assert run(path).wait() == 0
    print(f"killed after {killed} of {count} rows")
    assert killed
    assert killed == sorted(killed)
    assert 0 < killed[-1] < count
    torn, whole = np.load(path), np.load(tmp_path / "whole.npy")
    assert torn.shape == (count, 4)
    np.testing.assert_allclose(torn, whole, rtol=0, atol=1e-5)


def test_a_dim_nobody_serves_leaves_no_file(server: InMemoryServer, tmp_path: Path) -> None:
    with pytest.raises(KerasMrlError):
        Client(server).embed_dataset(ROWS, 3, tmp_path / "rows.npy")
    assert not os.listdir(tmp_path)


def test_nothing_is_written_through_a_link(tmp_path: Path, refuses: Refuses) -> None:
    """The names of what is being written can be guessed, and the folder may be shared."""
    (tmp_path / "mine").write_text("mine")
    growing = tmp_path / "rows.npy.partial"
    for kind in ("link", "pipe", "folder"):
        if kind == "link":
            growing.symlink_to("mine")
        elif kind == "pipe":
            os.mkfifo(growing)
        else:
            growing.mkdir()
        with refuses(
            FileExistsError,
            f"Embeddings are written to a regular file first. Received: {growing}, which is a "
            "link, a folder, a pipe or a device. Remove it, or choose another path.",
        ):
            EmbeddingFile(tmp_path / "rows.npy", 2, "5e1f")
        growing.rmdir() if kind == "folder" else growing.unlink()
    (tmp_path / "rows.npy.partial.json.new").symlink_to("mine")
    with EmbeddingFile(tmp_path / "rows.npy", 2, "5e1f") as file:
        file.append(Embedded(np.ones((3, 2), np.float32), "5e1f"), {"x": ROWS[:3]})
        assert file.finish().shape == (3, 2)
    assert (tmp_path / "mine").read_text() == "mine"
