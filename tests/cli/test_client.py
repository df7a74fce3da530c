"""The one connection of a command that asks a server, and its walk through the files."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np
import pytest
import trustme
from PIL import Image

from keras_mrl_cli.client import in_flags
from keras_mrl_serving import ExactIndex, FunnelSchedule, InvalidInputError, KerasMrlError, Manifest
from keras_mrl_serving.calls import Arrays, AskStatus, Envelope
from keras_mrl_serving.calls import Call as Asking
from keras_mrl_serving.errors import ServerError, ServerUnavailableError, call_error
from tests.helpers.cli import (
    ALL_BAD,
    BAD_FILES,
    BLUE,
    FRAMEWORKS,
    KERAS_MRL,
    LEFT_OUT,
    RED,
    Call,
    Ended,
    Terminal,
    end_reading_early,
    lines,
    paint,
    run_without,
)
from tests.helpers.faulty_server import FaultyServer, Request, rows
from tests.helpers.proxies import ConnectProxy

Ask = Callable[..., Ended]


def test_rows_keep_their_files_across_windows(ask: Ask) -> None:
    corpus = np.arange(150, dtype=np.float32).reshape(50, 3)
    np.save("p.npy", corpus[:37])
    np.save("none.npy", corpus[:0])
    np.save("q.npy", corpus[37:])
    status, out, err = ask(
        "embed", "rows", "p.npy", "none.npy", "q.npy", "--max-batch-size", "1", "--json"
    )
    assert (status, err) == (0, "")
    answers = lines(out)
    owners = [("p.npy", row) for row in range(37)] + [("q.npy", row) for row in range(13)]
    assert [(row["file"], row["row"]) for row in answers] == owners
    assert [row["embedding"] for row in answers] == corpus.tolist()


def cut_noise(file: str) -> None:
    """Write an image whose header is whole, and whose pixels are cut off."""
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(file)
    whole = Path(file).read_bytes()
    Path(file).write_bytes(whole[: len(whole) // 2])


def damage_noise(file: str) -> None:
    """Write a whole PNG, one byte of whose pixels is another."""
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(file, "PNG")
    data = bytearray(Path(file).read_bytes())
    data[len(data) // 2] ^= 255
    Path(file).write_bytes(data)


@pytest.mark.parametrize("model", ["pixels", "bytes"])
def test_bad_images_are_named_at_once_and_can_be_skipped(ask: Ask, model: str) -> None:
    paint("red.png", RED)
    Path("text.jpg").write_text("no image")
    cut_noise("cut.png")
    paint("blue.png", BLUE)
    files = ("red.png", "text.jpg", "cut.png", "gone.png", "blue.png")
    is_none = (
        "keras-mrl: An image file must be a whole JPEG, PNG, GIF, BMP or WebP. Received: {} ({}). "
        "Save it anew as an 8-bit PNG or JPEG, or leave it out."
    )
    sentences = [
        is_none.format("text.jpg", "it is none"),
        is_none.format("cut.png", "image file is truncated"),
        "keras-mrl: Every file must be one that can be read. "
        "Received: gone.png (No such file or directory). Correct the path.",
    ]
    status, out, err = ask("classify", model, *files, "--json")
    assert (status, out) == (1, "")
    assert err.splitlines() == [*sentences, BAD_FILES.format(3, 5)]
    for command, key in (("classify", "classes"), ("embed", "embedding")):
        status, out, err = ask(command, model, *files, "--json", "--skip-unreadable")
        assert (status, err.splitlines()) == (0, [*sentences, LEFT_OUT.format(3, 5)])
        assert [row["file"] for row in lines(out)] == ["red.png", "blue.png"]
        assert all(key in row for row in lines(out))
    ended = ask("embed", model, *files, "--out", "E.npy")
    assert ended.err.splitlines() == [*sentences, BAD_FILES.format(3, 5)]
    assert not list(Path().glob("E.npy*"))
    ended = ask("embed", model, *files, "--out", "E.npy", "--skip-unreadable", "--json")
    assert ended.err.splitlines() == [*sentences, LEFT_OUT.format(3, 5)]
    owners = [{"file": "red.png", "row": 0}, {"file": "blue.png", "row": 1}]
    assert lines(ended.out) == [{"out": "E.npy", "rows": 2, "dim": 3, "files": owners}]
    np.testing.assert_array_equal(np.load("E.npy"), [RED, BLUE])
    ended = ask("classify", model, "text.jpg", "cut.png", "--skip-unreadable")
    assert (ended.status, ended.out) == (1, "")
    assert ended.err.splitlines() == [*sentences[:2], ALL_BAD.format(2, 2)]


def test_damage_that_the_server_alone_finds_is_reported(
    ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    paint("red.png", RED)
    damage_noise("bad.png")
    monkeypatch.setitem(sys.modules, "PIL", None)
    status, out, err = ask("embed", "bytes", "bad.png", "red.png", "--json")
    assert (status, [row["file"] for row in lines(out)]) == (1, ["red.png"])
    assert err.startswith("keras-mrl: bad.png: ")
    assert "Invalid PNG data" in err


def test_what_was_answered_before_an_error_is_printed(call: Call, folder: Path) -> None:
    del folder
    np.save("x.npy", rows(50))

    def fail_at_20(request: Request, context: grpc.ServicerContext) -> None:
        if request.first == 21 and request.signature == "embed_4":  # rows count from 1
            context.abort(grpc.StatusCode.INTERNAL, "out of memory")

    words = ("embed", "x.npy", "--max-batch-size", "1", "--json")
    with FaultyServer(before=fail_at_20) as server:
        status, out, err = call(*words, "--target", server.target)
    assert status == 1
    assert err.startswith("keras-mrl: ")
    assert "out of memory" in err
    numbers = [row["row"] for row in lines(out)]
    assert numbers[:17] == list(range(17))  # the first window, and the first row of the second
    assert 20 not in numbers
    assert [row["embedding"][0] for row in lines(out)] == [number + 1 for number in numbers]


def test_errors_of_the_model_are_sentences(ask: Ask) -> None:
    np.save("x.npy", np.zeros((1, 3), np.float32))
    assert ask("classify", "rows", "x.npy", "--dim", "2") == (
        1,
        "",
        "keras-mrl: dim must be one of the dims the model serves. "
        "Received: dim=2 for model 'rows'. Choose one of 1, 3.\n",
    )
    assert ask("classify", "pair", "x.npy")[2].startswith(
        "keras-mrl: Only a model with a head can classify. Received: "
    )
    assert ask("classify", "rows", "x.npy", "--top", "3")[2] == (
        "keras-mrl: --top must lie in 1..2, as many classes as the model names. Received: 3. "
        "Give fewer, or export the model with a larger top_k.\n"
    )
    status, out, err = ask("classify", "rows", "x.npy", "--model", "nobody")
    assert (status, out) == (1, "")
    assert err.startswith("keras-mrl: ")
    assert "'nobody'" in err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (
            ["--timeout", "0"],
            "--timeout must be a positive number of seconds. Received: 0.0. Give for example 10.",
        ),
        (
            ["--max-batch-size", "0"],
            "--max-batch-size must lie in 1..2147483647. Received: 0. Leave it out for 1000.",
        ),
        (
            ["--scale", "nan"],
            "--scale must be a finite number other than 0. Received: nan. "
            "Give 0.00392156862745098 for pixels in 0..1.",
        ),
        (
            ["--target", "localhost"],
            "A target must be 'host:port'. Received: 'localhost'. "
            "Give the server's gRPC port, for example localhost:8500.",
        ),
    ],
)
def test_flags_that_do_not_fit(call: Call, words: list[str], text: str) -> None:
    for command in ("classify", "regress", "embed"):
        assert call.refused(command, "--target", "t:1", "x.npy", *words, status=2) == text


UNFIT = (
    "Metadata must be KEY=VALUE or KEY=@FILE in printable ASCII, its key of letters, digits and "
    "_.- and not ending in -bin. Received: {}. Give for example --metadata authorization=@token, "
    "a file that holds 'Bearer 5e1f'."
)


@pytest.mark.parametrize(
    ("pair", "why"),
    [
        ("s3cret", "which has no '='"),
        ("", "which has no '='"),
        ("Bearer s3cret", "which has no '='"),
        ("=s3cret", "whose key is another"),
        ("Bearer s3cret==", "whose key is another"),
        ("k-bin=s3cret", "whose key is another"),
        ("k=s3crét", "whose value is another"),
        ("k=s3cret\x1b[2J", "whose value is another"),
        ("k=@s3cret", "whose file does not read (No such file or directory)"),
        ("k=@.", "whose file does not read (Is a directory)"),
        ("k=@/dev/zero", "whose file is a device, not a regular file"),
        ("k=@empty", "whose file is empty"),
        ("k=@two", "whose value is another"),
        ("k=@long", "whose file is 65,537 bytes, more than 65,536"),
    ],
)
def test_metadata_that_does_not_fit_is_not_repeated(
    pair: str, why: str, call: Call, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "two").write_text("s3cret\ns3cret")
    (folder / "long").write_text("s" * (2**16 + 1))
    (folder / "empty").write_text(" \n")
    asked = ("embed", "--target", "t:1", "x.npy")
    text = call.refused(*asked, "--metadata", "a=b", "--metadata", pair, status=2)
    assert text == UNFIT.format(f"--metadata number 2, {why}")
    if pair and pair.isprintable():
        monkeypatch.setenv("KERAS_MRL_METADATA", f"a=b\n{pair}\n")
        assert call.refused(*asked, status=2) == UNFIT.format(
            f"line 2 of KERAS_MRL_METADATA, {why}"
        )


def test_metadata_comes_from_files_and_the_environment(
    call: Call, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save("x.npy", rows(2))
    (folder / "token").write_text("Bearer s3cret\r\n")
    (folder / "mounted").symlink_to("token")  # as Kubernetes mounts secrets
    monkeypatch.setenv("KERAS_MRL_METADATA", "Authorization=@token\n\n \nteam=birds\n")
    with FaultyServer() as server:
        asked = call.of("embed", "x.npy", "--target", server.target)
        assert asked().status == 0
        headers = server.requests[-1].headers
        assert (headers["authorization"], headers["team"]) == ("Bearer s3cret", "birds")
        assert asked("--metadata", "team=bees", "--metadata", "k=@mounted").status == 0
        headers = server.requests[-1].headers
        assert headers["authorization"] == headers["k"] == "Bearer s3cret"
        assert headers["team"] == "bees"
        ended = call("inspect", str(folder))  # which asks no server, and needs no metadata
        assert "METADATA" not in ended.err


def test_files_after_a_flag_and_several_targets(call: Call, target: str, folder: Path) -> None:
    del folder
    np.save("x.npy", np.zeros((1, 3), np.float32))
    np.save("y.npy", np.ones((1, 3), np.float32))
    both = f"{target},{target}"
    ended = call("embed", "x.npy", "--target", both, "--model", "rows", "--json", "y.npy")
    assert [row["file"] for row in lines(ended.out)] == ["x.npy", "y.npy"]


def test_the_flags_reach_the_server(call: Call, folder: Path) -> None:
    del folder
    np.save("x.npy", rows(20))
    seconds: list[float] = []
    flags = ("--timeout=300", "--max-batch-size=7", "--metadata=Auth=a=b", "--metadata", "k=v")
    with FaultyServer(before=lambda _, context: seconds.append(context.time_remaining())) as server:
        assert call("embed", "x.npy", "--target", server.target, *flags).status == 0
        assert sorted(request.count for request in server.requests_of("embed_4")) == [6, 7, 7]
        assert all(100 < remaining < 301 for remaining in seconds)
        for request in server.requests:
            assert (request.headers["auth"], request.headers["k"]) == ("a=b", "v")
        seconds.clear()
        assert call("embed", "x.npy", "--target", server.target).status == 0
        assert server.requests_of("embed_4")[-1].count == 20
        assert all(remaining < 11 for remaining in seconds)


def test_a_model_that_still_loads_is_waited_for(call: Call, folder: Path) -> None:
    del folder
    np.save("x.npy", rows(1))
    refusals = iter(range(2))

    def load(_: Request, context: grpc.ServicerContext) -> None:
        if next(refusals, None) is not None:
            context.abort(grpc.StatusCode.NOT_FOUND, "Servable not found for request: Latest(m)")

    with FaultyServer(before=load) as server:
        embed = call.of("embed", "x.npy", "--target", server.target)
        assert embed().status == 1
        assert embed("--wait", "600").status == 0
        assert next(refusals, None) is None
    unavailable = call_error(
        ServerUnavailableError, Envelope("m", None, AskStatus(), 1, 1), "t", ""
    )
    assert "If it is starting, give --wait 60." in in_flags(str(unavailable))


def test_a_proxy_of_the_environment_is_turned_off(
    call: Call, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del folder
    np.save("x.npy", rows(1))
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    embed = call.of("embed", "x.npy", "--target", "nobody.invalid:8500", "--timeout=20")
    with FaultyServer() as server, ConnectProxy(server.port) as proxy:
        monkeypatch.setenv("grpc_proxy", f"http://{proxy.target}")
        assert embed().status == 0
        assert proxy.asked == ["nobody.invalid:8500"]
        assert "errors resolving nobody.invalid:8500" in embed("--no-proxy").err
        assert proxy.connections == 1


def test_a_call_holds_few_large_images(call: Call, folder: Path) -> None:
    del folder
    files = [f"{number}.jpg" for number in range(6)]
    for file in files:
        paint(file, RED)
        Path(file).write_bytes(Path(file).read_bytes().ljust(2**22, b"\0"))
    manifest = Manifest(
        name="images",
        kind="encoder",
        fingerprint="5e1f",
        dims=(2,),
        width=2,
        inputs={"image": {"dtype": "string", "shape": [None]}},
        made_with={},
    )

    def answer(images: Asking) -> Arrays:
        if images.signature == "describe":
            return {"manifest": np.array([manifest.to_json().encode()], object)}
        return {"embedding": np.ones((len(images.inputs["image"]), 2), np.float32)}

    with FaultyServer({1: answer}) as server:
        assert call("embed", *files, "--target", server.target).status == 0
    assert sorted(request.count for request in server.requests_of("embed_2")) == [2, 4]


def write_tls_files(folder: Path) -> None:
    """Write a server's config, which asks for certificates, and what a client of it needs."""
    authority = trustme.CA()
    server, client = authority.issue_cert("birds.example.org"), authority.issue_cert("me@here")
    key, *chain = server.private_key_and_cert_chain_pem.bytes().decode().partition("-----BEGIN CER")
    texts = {"server_key": key, "server_cert": "".join(chain)}
    texts["custom_ca"] = authority.cert_pem.bytes().decode()
    fields = "".join(f'{name}: "{text}"\n' for name, text in texts.items())
    (folder / "tls.txt").write_text(f"{fields}client_verify: true\n")
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    client.private_key_pem.write_to_path(str(folder / "key.pem"))
    client.cert_chain_pems[0].write_to_path(str(folder / "cert.pem"))


def test_tls_by_files_and_the_server_s_name(input_models: Path, call: Call, folder: Path) -> None:
    from keras_mrl_serving.server import DevServer

    write_tls_files(folder)
    np.save("x.npy", np.zeros((1, 3), np.float32))
    with DevServer(input_models / "rows", ssl_config_file=folder / "tls.txt") as target:
        embed = call.of("embed", "--target", target, "x.npy", "--json", "--tls-ca", "ca.pem")
        mutual = embed.of("--tls-key", "key.pem", "--tls-cert", "cert.pem")
        named = ("--tls-server-name", "birds.example.org")
        assert lines(mutual(*named).out)[0]["embedding"] == [0, 0, 0]
        assert mutual.refused().endswith(
            ". The server's certificate bears another name than the target: give it by "
            "--tls-server-name."
        )
        assert embed.refused(*named, "--timeout", "1").endswith(
            "If it asks for TLS, give --tls-ca; if for a certificate of its clients, add "
            "--tls-key and --tls-cert."
        )


@pytest.mark.parametrize(
    ("words", "start", "end"),
    [
        ("--tls-ca none.pem", "The files of --tls-ca, --tls-key and --tls-cert", "the path."),
        ("--tls-ca key.pem", "--tls-ca must be whole certificates in PEM. ", "the right file."),
        ("--tls-cert key.pem --tls-key cert.pem", "--tls-cert must be whole cer", "right file."),
        (
            "--tls-key key.pem",
            "A client proves who it is with --tls-key and --tls-cert",
            "neither.",
        ),
    ],
)
def test_files_of_tls_that_do_not_fit_are_not_repeated(
    words: str, start: str, end: str, call: Call, folder: Path
) -> None:
    write_tls_files(folder)
    ended = call("embed", "--target", "t:1", "x.npy", *words.split())
    assert ended.status == (1 if "none" in words else 2)
    assert ended.err.startswith(f"keras-mrl: {start}")
    assert ended.err.endswith(f"{end}\n")
    assert (folder / "key.pem").read_text().splitlines()[1] not in ended.err


def test_remedies_name_flags() -> None:
    """Settings without a flag are left: of messages, of idle connections."""
    envelope = Envelope("birds", None, AskStatus(), 1.0, 1.0)
    kinds: list[type[KerasMrlError]] = [InvalidInputError, ServerError]
    for kind in (*kinds, *ServerError.__subclasses__()):
        text = in_flags(str(call_error(kind, envelope, "t:1", "NO")))
        assert "Options(" not in text.replace("Options(max_message_bytes=...)", "")
        assert "Client(target" not in text


def test_progress_is_on_the_terminal_alone(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save("x.npy", np.zeros((40, 3), np.float32))
    np.savez("y.npz", x=np.zeros((2, 3), np.float32))
    for more in (), ("--out", "E.npy"):
        terminal = Terminal()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", terminal)
            ended = ask("embed", "rows", "x.npy", "y.npz", "--max-batch-size=1", *more)
        assert ended.status == 0
        assert "rows/s" not in ended.out
        text = terminal.getvalue()
        assert "42/42 rows, " in text
        assert "16/42 rows, " in text
        assert text.endswith("\r\x1b[K")
    assert ask("embed", "rows", "x.npy").err == ""


def test_names_that_would_break_the_table_are_escaped(ask: Ask) -> None:
    file = os.fsdecode(b"a\n\xff.npy")
    np.save(file, np.zeros((1, 3), np.float32))
    status, out, err = ask("embed", "rows", file)
    assert (status, err) == (0, "")
    assert out.splitlines()[1].startswith("a\\n\\udcff.npy       0    3")
    assert lines(ask("embed", "rows", file, "--json")[1])[0]["file"] == file


@pytest.mark.parametrize(("command", "dim"), [("classify", 1), ("embed", 3)])
def test_no_framework_is_needed(target: str, folder: Path, command: str, dim: int) -> None:
    words = [*KERAS_MRL, command, "--target", target, paint("red.png", RED), "--model=pixels"]
    status, out, err = run_without(FRAMEWORKS, folder, *words, "--json")
    assert (status, err) == (0, "")
    assert lines(out)[0]["dim"] == dim


def test_a_reader_that_has_enough_is_no_traceback(target: str, folder: Path) -> None:
    np.save("x.npy", np.zeros((5000, 3), np.float32))
    words = ("embed", "--target", target, "x.npy", "--model=rows", "--json")
    assert end_reading_early(folder, *words) == (1, b"")


def test_what_a_server_says_in_many_lines_is_one(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    damage_noise("bad.png")
    monkeypatch.setitem(sys.modules, "PIL", None)
    status, out, err = ask("embed", "bytes", "bad.png", "--out", "E.npy")
    assert (status, out) == (1, "")
    assert err.startswith("keras-mrl: ")
    assert err.count("\n") == 1
    assert "decode" in err


def test_every_command_describes_once_over_one_connection(call: Call, folder: Path) -> None:
    del folder
    np.save("x.npy", rows(3))
    np.save("E.npy", rows(9))
    ExactIndex.build(rows(9), FunnelSchedule((2, 4), (5,), 4)).save("b.index")
    funnel = ("--dims", "2,4", "--shortlists", "5", "--k", "3", "--engine", "exact")
    for words in (
        ("classify", "x.npy"),
        ("embed", "x.npy"),
        ("embed", "x.npy", "--out", "x_embedded.npy"),
        ("search", "b.index", "x.npy"),
        ("index", "build", "--embeddings", "E.npy", "--out", "c.index", *funnel),
    ):
        with FaultyServer() as server:
            assert call(*words, "--target", server.target).status == 0, words
        assert len(server.requests_of("describe")) == 1, words
        assert len({request.peer for request in server.requests}) == 1, words
