"""`keras-mrl classify` and `keras-mrl embed`, against the development server."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import trustme
from PIL import Image

from keras_mrl_cli.__main__ import main
from keras_mrl_serving import CascadePolicy, Client, Manifest, Options, contract
from keras_mrl_serving.cascade.policy import Stage
from keras_mrl_serving.errors import ServerUnavailableError

Array = npt.NDArray[Any]
LABELS = ["red", "grün", "blue"]
POLICY = CascadePolicy((Stage(1, 0.9), Stage(3, None)))
# Every model's features are three numbers, and its logits are they by 50, at dim 1 the first only.
SPECS: dict[str, dict[str, dict[str, Any]]] = {
    "pixels": {"image": {"dtype": "float32", "shape": [None, 8, 6, 3]}},
    "gray": {"image": {"dtype": "uint8", "shape": [None, None, None, 1]}},
    "bytes": {"image": {"dtype": "string", "shape": [None]}},
    "rows": {"x": {"dtype": "float32", "shape": [None, 3]}},
    "pair": {
        "a": {"dtype": "float32", "shape": [None, 2]},
        "b": {"dtype": "float32", "shape": [None, 1]},
    },
}
HEAD: dict[str, Any] = {
    "kind": "classifier",
    "activation": "softmax",
    "num_classes": 3,
    "top_k": 2,
    "labels": True,
}
MORE: dict[str, dict[str, Any]] = {
    "pixels": {**HEAD, "cascade": POLICY.to_json()},
    "gray": {"kind": "encoder"},
    "bytes": {**HEAD, "quality": {"1": {"top1": 0.7}, "3": {"top1": 0.8}}},
    "rows": {**HEAD, "labels": False},
    "pair": {"kind": "encoder"},
}


def save(name: str, path: Path) -> None:
    import tensorflow as tf

    manifest = Manifest(
        name=name,
        fingerprint=name,
        dims=(1, 3),
        width=3,
        inputs=SPECS[name],
        made_with={},
        **MORE[name],
    )
    specs = [tf.TensorSpec(spec["shape"], spec["dtype"], key) for key, spec in SPECS[name].items()]

    def decoded(data: Any) -> Any:
        image = tf.io.decode_image(data, channels=3, expand_animations=False)
        return tf.reduce_mean(tf.cast(image, tf.float32), [0, 1])

    def features(*inputs: Any) -> Any:
        first = inputs[0]
        if name == "bytes":
            return tf.ensure_shape(tf.map_fn(decoded, first, tf.float32), (None, 3))
        if name == "gray":
            sizes = tf.cast(tf.shape(first)[1:3], tf.float32) + tf.zeros((tf.shape(first)[0], 2))
            mean = tf.reduce_mean(tf.cast(first, tf.float32), [1, 2])
            return tf.concat([mean, sizes], 1)
        if name == "pixels":
            return tf.reduce_mean(first, [1, 2])
        return tf.concat(inputs, 1)

    def head(prefix: Any, dim: int) -> dict[str, Any]:
        logits = tf.pad(prefix, [[0, 0], [0, 3 - dim]]) / 50
        top, class_ids = tf.math.top_k(tf.nn.softmax(logits), 2)
        answer = {"class_ids": tf.cast(class_ids, tf.int64), "probabilities": top}
        answer["confidence"] = top[:, 0]
        if manifest.labels:
            answer["labels"] = tf.gather(tf.constant(LABELS), class_ids)
        return {**answer, "logits": logits}

    def classified(found: Any, dim: int) -> dict[str, Any]:
        answer = head(found[:, :dim], dim)
        answer["dim"] = tf.fill([tf.shape(found)[0]], dim)
        del answer["logits"]
        return answer

    def adaptive(*inputs: Any) -> dict[str, Any]:
        narrow, wide = (classified(features(*inputs), dim) for dim in (1, 3))
        sure = narrow["confidence"] > 0.9
        return {
            n: tf.where(tf.reshape(sure, [-1] + [1] * (len(v.shape) - 1)), v, wide[n])
            for n, v in narrow.items()
        }

    def of_inputs(function: Callable[..., Any]) -> Any:
        return tf.function(function).get_concrete_function(*specs)

    signatures = {
        contract.DESCRIBE: tf.function(
            lambda key: {"manifest": tf.fill(tf.shape(key), manifest.to_json())},
            input_signature=[tf.TensorSpec((None,), tf.string, "key")],
        ),
        contract.FEATURES: of_inputs(lambda *inputs: {"features": features(*inputs)}),
    }
    for dim in manifest.dims:
        signatures[contract.embed(dim)] = of_inputs(
            lambda *inputs, dim=dim: {"embedding": features(*inputs)[:, :dim]}
        )
        if manifest.num_classes:
            signatures[contract.classify(dim)] = of_inputs(
                lambda *inputs, dim=dim: {
                    n: v for n, v in classified(features(*inputs), dim).items() if n != "dim"
                }
            )
            signatures[contract.head(dim)] = tf.function(
                lambda features, dim=dim: head(features, dim),
                input_signature=[tf.TensorSpec((None, dim), tf.float32, "features")],
            )
    if manifest.cascade:
        signatures[contract.CLASSIFY_ADAPTIVE] = of_inputs(adaptive)
    tf.saved_model.save(tf.Module(), str(path), signatures=signatures)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each model under its name."""
    folder = tmp_path_factory.mktemp("asked")
    for name in SPECS:
        save(name, folder / name / "1")
    return folder


@pytest.fixture(scope="module")
def targets(models: Path) -> Iterator[Mapping[str, str]]:
    """A server of each model, under its name."""
    from keras_mrl_serving.server import DevServer

    servers = {}
    for name in SPECS:
        servers[name] = DevServer(models / name, model_name=name, file_system_poll_wait_seconds=0)
    yield {name: server.start() for name, server in servers.items()}
    for server in servers.values():
        server.stop()


Ask = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ask(
    targets: Mapping[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Ask:
    """Run a command about a model in a folder of its own: status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def ask(command: str, model: str, *arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main([command, targets[model], "--model", model, *arguments])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return ask


def paint(file: str, color: Any, size: tuple[int, int] = (12, 16), mode: str = "RGB") -> str:
    Image.new(mode, size, color).save(file)
    return file


RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def lines(out: str) -> list[Any]:
    return [json.loads(line) for line in out.splitlines()]


def test_a_table_of_classes_by_the_model_s_own_policy(ask: Ask) -> None:
    paint("red.png", RED)
    paint("a green one.PNG", GREEN)
    assert ask("classify", "pixels", "red.png", "a green one.PNG") == (
        0,
        "FILE                ROW  DIM  PROBABILITY  LABEL\n"
        "red.png               0    1       0.9880  red\n"
        "a green one.PNG       0    3       0.9880  grün\n",
        "",
    )


def test_more_than_one_class_has_ranks(ask: Ask) -> None:
    np.save("two.npy", np.array([[0, 50, 0], [0, 50, 100]], np.float32))
    assert ask("classify", "rows", "two.npy", "--top", "2") == (
        0,
        "FILE        ROW  DIM  RANK  PROBABILITY  CLASS\n"
        "two.npy       0    3     1       0.5761  1\n"
        "two.npy       0    3     2       0.2119  0\n"
        "two.npy       1    3     1       0.6652  2\n"
        "two.npy       1    3     2       0.2447  1\n",
        "",
    )


def test_json_lines_of_classes(ask: Ask) -> None:
    paint("red.png", RED)
    status, out, err = ask("classify", "pixels", "red.png", "--dim", "3", "--top=2", "--json")
    assert (status, err) == (0, "")
    (row,) = lines(out)
    assert (row["file"], row["row"], row["dim"]) == ("red.png", 0, 3)
    first, second = row["classes"]
    assert (first["class_id"], first["label"]) == (0, "red")
    assert first["probability"] == row["confidence"] == pytest.approx(0.988, abs=1e-3)
    assert second["probability"] == pytest.approx(0.006, abs=1e-3)


def test_without_a_policy_the_full_dim_is_asked(ask: Ask) -> None:
    np.savez("one.npz", anything=np.array([[0.0, 100, 0]]))
    row = lines(ask("classify", "rows", "one.npz", "--json")[1])[0]
    assert row["dim"] == 3
    assert row["classes"] == [{"class_id": 1, "probability": pytest.approx(0.7870, abs=1e-4)}]


def test_a_policy_of_a_file(ask: Ask) -> None:
    paint("red.png", RED)
    Path("policy.json").write_text(json.dumps(CascadePolicy((Stage(3, None),)).to_json()))
    out = ask("classify", "pixels", "red.png", "--policy", "policy.json", "--json")[1]
    assert lines(out)[0]["dim"] == 3


def test_policies_that_are_none(ask: Ask) -> None:
    paint("red.png", RED)
    Path("text.json").write_text("no json")
    Path("other.json").write_text('{"stages": []}')
    found = {
        name: ask("classify", "pixels", "red.png", "--policy", name)
        for name in ("none.json", "text.json", "other.json")
    }
    assert {status for status, _, _ in found.values()} == {1}
    assert found["none.json"][2] == (
        "keras-mrl: --policy must be a file that can be read. "
        "Received: none.json (No such file or directory). Correct the path.\n"
    )
    assert found["text.json"][2] == (
        "keras-mrl: --policy must be the JSON of a CascadePolicy. Received: text.json "
        "(Expecting value: line 1 column 1 (char 0)). "
        "Write it with json.dump(policy.to_json(), file).\n"
    )
    assert found["other.json"][2].startswith("keras-mrl: other.json: A cascade names its stages")


def test_pixels_are_resized_and_scaled(ask: Ask) -> None:
    left = np.zeros((8, 12, 3), np.uint8)
    left[:, :6] = 200
    Image.fromarray(left).save("half.png")
    for scale, factor in ((), 1.0), (("--scale", "0.5"), 0.5):
        row = lines(ask("embed", "pixels", "half.png", "--json", *scale)[1])[0]
        assert row["embedding"] == pytest.approx([100 * factor] * 3, abs=2 * factor)
        assert row["dim"] == 3


def test_an_image_of_another_mode_becomes_what_the_model_takes(ask: Ask) -> None:
    paint("l.png", 90, mode="L")
    paint("rgba.png", (10, 20, 30, 0), mode="RGBA")
    rows = lines(ask("embed", "pixels", "l.png", "rgba.png", "--json")[1])
    assert [row["embedding"] for row in rows] == [
        pytest.approx([90, 90, 90]),
        pytest.approx([10, 20, 30]),
    ]


def test_a_model_of_any_size_gets_the_image_s_own(ask: Ask) -> None:
    paint("small.png", 40, (2, 5), "L")
    paint("large.png", 80, (7, 9), "L")
    status, out, err = ask("embed", "gray", "small.png", "large.png", "--json")
    assert (status, err) == (0, "")
    assert [row["embedding"] for row in lines(out)] == [[40, 5, 2], [80, 9, 7]]
    assert ask("embed", "gray", "small.png", "large.png", "--out", "E.npy") == (
        1,
        "",
        "keras-mrl: The rows of one --out must be of one size. Received: large.png with "
        "(9, 7, 1) after (5, 2, 1). Resize them, or write several.\n",
    )


def test_a_model_that_decodes_gets_the_bytes(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    paint("blue.png", BLUE)
    monkeypatch.setitem(sys.modules, "PIL", None)
    row = lines(ask("embed", "bytes", "blue.png", "--json")[1])[0]
    assert row["embedding"] == [0, 0, 255]
    status, out, err = ask("embed", "bytes", "blue.png", "--scale", "0.5")
    assert (status, out) == (1, "")
    assert err == (
        "keras-mrl: --scale multiplies pixels that are decoded here. Received: --scale 0.5 for "
        "model 'bytes', which decodes images itself. Leave it out.\n"
    )


def test_without_pillow_the_remedy_is_named(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    paint("blue.png", BLUE)
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert ask("classify", "pixels", "blue.png") == (
        1,
        "",
        "keras-mrl: Images for a model that takes pixels are decoded by Pillow. "
        "Received: import of PIL halted; None in sys.modules. "
        "Install it: pip install 'keras-mrl[images]'.\n",
    )


@pytest.mark.parametrize("model", ["pixels", "bytes"])
def test_a_bad_image_is_reported_and_the_others_answered(ask: Ask, model: str) -> None:
    paint("red.png", RED)
    Path("text.jpg").write_text("no image")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save("cut.png")
    Path("cut.png").write_bytes(Path("cut.png").read_bytes()[:6000])
    paint("blue.png", BLUE)
    files = ("red.png", "text.jpg", "cut.png", "gone.png", "blue.png")
    status, out, err = ask("classify", model, *files, "--json")
    assert status == 1
    assert [row["file"] for row in lines(out)] == ["red.png", "blue.png"]
    assert [row["classes"][0]["label"] for row in lines(out)] == ["red", "blue"]
    said = err.splitlines()
    assert len(said) == 3
    assert all(line.startswith("keras-mrl: ") for line in said)
    for file in ("text.jpg", "cut.png", "gone.png"):
        assert sum(file in line for line in said) == 1
    assert (
        "keras-mrl: Every file must be one that can be read. "
        "Received: gone.png (No such file or directory). Correct the path." in said
    )
    if model == "pixels":
        assert said[0] == (
            "keras-mrl: An image must be one that Pillow decodes. Received: text.jpg "
            "(it is no image). Save it anew as an 8-bit PNG or JPEG, or leave it out."
        )


def test_files_that_do_not_fit(ask: Ask) -> None:
    np.save("wide.npy", np.zeros((7, 5), np.float32))
    np.save("flat.npy", np.zeros(3, np.float32))
    np.save("number.npy", np.float32(3))
    Path("text.npy").write_text("no array")
    Path("text.npz").write_text("no archive")
    np.save("cut.npy", np.zeros((50, 3), np.float32))
    Path("cut.npy").write_bytes(Path("cut.npy").read_bytes()[:200])
    np.save("pickle.npy", np.array([{}], object), allow_pickle=True)
    np.savez("names.npz", p=np.zeros((1, 3)), q=np.zeros((1, 3)))
    Path("words.txt").write_text("1 2 3")
    paint("red.png", RED)
    takes = "A file must hold rows as model 'rows' takes them: x float32 (any, 3). Received: "
    torn = "A file must hold what its name says. Received: {} ({}). Make it anew, or leave it out."
    said = {
        "wide.npy": takes + "wide.npy with x float32 (7, 5). Prepare the rows as in training.",
        "flat.npy": takes + "flat.npy with x float32 (3). Prepare the rows as in training.",
        "number.npy": takes + "number.npy with x float32 (). Prepare the rows as in training.",
        "text.npy": torn.format("text.npy", "no .npy of numbers, or not a whole one"),
        "text.npz": torn.format("text.npz", "no .npz of numbers, or not a whole one"),
        "cut.npy": torn.format("cut.npy", "no .npy of numbers, or not a whole one"),
        "pickle.npy": torn.format("pickle.npy", "no .npy of numbers, or not a whole one"),
        "names.npz": "A file for model 'rows' must hold arrays named x. "
        "Received: names.npz with p, q. Save them by name with numpy.savez.",
        "words.txt": "Files must be .jpg, .jpeg, .png, .npy or .npz. Received: words.txt. "
        "Save the rows with numpy.save.",
        "red.png": "An image can be sent to a model of one input, of encoded images, string "
        "(any), or of pixels, (any, height, width, channels) with 1, 3 or 4 channels. Received: "
        "red.png for model 'rows', which takes x float32 (any, 3). "
        "Prepare the rows as in training and give them as .npy or .npz.",
    }
    status, out, err = ask("classify", "rows", *said)
    assert (status, out) == (1, "")
    assert err.splitlines() == [f"keras-mrl: {sentence}" for sentence in said.values()]
    np.save("good.npy", np.zeros((2, 3), np.float32))
    for file, sentence in said.items():
        assert ask("embed", "rows", "good.npy", file, "--out", "E.npy") == (
            1,
            "",
            f"keras-mrl: {sentence}\n",
        )
    assert not list(Path().glob("E.npy*"))


def test_several_inputs_come_by_name(ask: Ask) -> None:
    a, b = np.arange(8.0).reshape(4, 2), np.arange(4.0).reshape(4, 1)
    np.savez("pair.npz", a=a, b=b)
    rows = lines(ask("embed", "pair", "pair.npz", "--json")[1])
    assert [row["row"] for row in rows] == [0, 1, 2, 3]
    assert [row["embedding"] for row in rows] == np.hstack([a, b]).tolist()
    np.savez("uneven.npz", a=a, b=b[:3])
    np.save("one.npy", a)
    assert ask("embed", "pair", "uneven.npz", "one.npy")[2].splitlines() == [
        "keras-mrl: A file must hold rows as model 'pair' takes them: a float32 (any, 2) and "
        "b float32 (any, 1). Received: uneven.npz with a float64 (4, 2) and b float64 (3, 1). "
        "Prepare the rows as in training.",
        "keras-mrl: A file for model 'pair' must hold arrays named a, b. "
        "Received: one.npy with no names. Save them by name with numpy.savez.",
    ]


def test_rows_keep_their_files_across_windows(ask: Ask) -> None:
    corpus = np.arange(150, dtype=np.float32).reshape(50, 3)
    np.save("p.npy", corpus[:37])
    np.save("none.npy", corpus[:0])
    np.save("q.npy", corpus[37:])
    status, out, err = ask(
        "embed", "rows", "p.npy", "none.npy", "q.npy", "--max-batch-size", "1", "--json"
    )
    assert (status, err) == (0, "")
    rows = lines(out)
    owners = [("p.npy", row) for row in range(37)] + [("q.npy", row) for row in range(13)]
    assert [(row["file"], row["row"]) for row in rows] == owners
    assert [row["embedding"] for row in rows] == corpus.tolist()


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
    arguments = ("b.npy", "--dim=1", "--out", "F.npy", "--json")
    assert lines(ask("embed", "rows", *arguments)[1]) == [{"out": "F.npy", "rows": 60, "dim": 1}]
    assert ask("embed", "rows", "b.npy", "--out", "no/E.npy")[2] == (
        "keras-mrl: --out must be a file that can be written. "
        "Received: no/E.npy (No such file or directory). Name another.\n"
    )


def test_an_interrupted_corpus_goes_on(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = np.arange(150, dtype=np.float32).reshape(50, 3)
    np.save("x.npy", corpus)
    arguments = ("x.npy", "--out", "E.npy", "--max-batch-size", "1")
    run, seen = Client._run, []

    def interrupted(client: Client, rounds: Any) -> Any:
        seen.append(rounds)
        if len(seen) == 4:  # the manifest twice, a window of 16 rows, and now the second
            raise KeyboardInterrupt
        return run(client, rounds)

    with monkeypatch.context() as patch:
        patch.setattr(Client, "_run", interrupted)
        assert ask("embed", "rows", *arguments) == (130, "", "keras-mrl: interrupted\n")
    assert not Path("E.npy").exists()
    assert json.loads(Path("E.npy.partial.json").read_text())["rows"] == 8
    assert ask("embed", "rows", *arguments)[0] == 0
    np.testing.assert_array_equal(np.load("E.npy"), corpus)


def test_what_was_answered_before_an_error_is_printed(
    ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = np.arange(150, dtype=np.float32).reshape(50, 3)
    np.save("x.npy", corpus)
    outcome = Client._outcome

    def failing(client: Client, round: Any, talk: Any) -> Any:
        found = outcome(client, round, talk)
        if isinstance(found, tuple) and np.array_equal(found[0], corpus[20:21]):
            return ServerUnavailableError("No server answers. Received: rows. Start it.")
        return found

    monkeypatch.setattr(Client, "_outcome", failing)
    status, out, err = ask("embed", "rows", "x.npy", "--max-batch-size", "1", "--json")
    assert (status, err) == (1, "keras-mrl: No server answers. Received: rows. Start it.\n")
    rows = [row["row"] for row in lines(out)]
    assert rows[:17] == list(range(17))  # the first window, and the first row of the second
    assert 20 not in rows
    assert [row["embedding"] for row in lines(out)] == corpus[rows].tolist()


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
    assert ask("embed", "rows", "x.npy", "--tls-ca", "none.pem")[2] == (
        "keras-mrl: --tls-ca must be a file that can be read. "
        "Received: none.pem (No such file or directory). Correct the path.\n"
    )


@pytest.mark.parametrize(
    ("command", "arguments", "text"),
    [
        ("classify", ["--top", "0"], "--top must be at least 1. Received: 0. Try 3."),
        (
            "embed",
            ["--timeout", "0"],
            "--timeout must be a positive number of seconds. Received: 0.0. Give for example 10.",
        ),
        (
            "embed",
            ["--max-batch-size", "0"],
            "--max-batch-size must lie in 1..2147483647. Received: 0. Leave it out for 1000.",
        ),
        (
            "classify",
            ["--scale", "nan"],
            "--scale must be a finite number other than 0. Received: nan. "
            "Give 0.00392156862745098 for pixels in 0..1.",
        ),
        *(
            (
                "classify",
                ["--metadata", pair],
                "--metadata must be KEY=VALUE in printable ASCII, its key of letters, digits and "
                f"_.- and not ending in -bin. Received: {pair!r}. "
                "Give for example --metadata authorization='Bearer 5e1f'.",
            )
            for pair in ("key", "=x", "a b=x", "k=ü", "k-bin=x")
        ),
        (
            "embed",
            ["--batch", "3"],
            "Only known flags are taken. Received: --batch 3. "
            "See the command's --help for those there are.",
        ),
    ],
)
def test_arguments_that_do_not_fit(ask: Ask, command: str, arguments: list[str], text: str) -> None:
    assert ask(command, "rows", "x.npy", *arguments) == (2, "", f"keras-mrl: {text}\n")


def test_a_target_without_a_port(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["classify", "localhost", "x.npy"]) == 2
    assert capsys.readouterr().err == (
        "keras-mrl: A target must be 'host:port'. Received: 'localhost'. "
        "Give the server's gRPC port, for example localhost:8500.\n"
    )


@pytest.mark.parametrize(
    ("command", "text"),
    [
        (
            ["classify", "t:1", "x.npy", "--dim", "1", "--policy", "p"],
            "argument --policy: not allowed with argument --dim",
        ),
        (
            ["embed", "t:1", "x.npy", "--dim", "1", "--quality", "1"],
            "argument --quality: not allowed with argument --dim",
        ),
        (
            ["embed", "t:1", "x.npy", "--quality", "98"],
            "argument --quality: it must end in a share in (0, 1]. Received: '98'. "
            "Give for example 0.98.",
        ),
        (["embed", "t:1"], "the following arguments are required: FILES"),
    ],
)
def test_arguments_that_exclude_each_other(
    command: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith(f"keras-mrl {command[0]}: error: {text}\n")


def test_files_after_a_flag_and_several_targets(ask: Ask, targets: Mapping[str, str]) -> None:
    np.save("x.npy", np.zeros((1, 3), np.float32))
    np.save("y.npy", np.ones((1, 3), np.float32))
    both = f"{targets['rows']},{targets['rows']}"
    assert main(["embed", both, "x.npy", "--model", "rows", "--json", "y.npy"]) == 0
    assert [r["file"] for r in lines(ask("embed", "rows", "x.npy", "--json", "y.npy")[1])] == [
        *("x.npy", "y.npy")
    ]


def test_the_options_reach_the_client(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save("x.npy", np.zeros((1, 3), np.float32))
    seen: list[Options] = []
    begin = Client.__init__

    def noted(client: Client, target: Any, model: str, *, options: Options) -> None:
        seen.append(options)
        begin(client, target, model, options=options)

    monkeypatch.setattr(Client, "__init__", noted)
    given = ("--timeout=3", "--max-batch-size=7", "--metadata=Auth=a=b", "--metadata", "k=v")
    assert ask("embed", "rows", "x.npy", *given)[0] == 0
    assert (seen[-1].timeout_s, seen[-1].max_batch_size) == (3, 7)
    assert seen[-1].headers() == (("auth", "a=b"), ("k", "v"))
    assert seen[-1].tls is None
    assert ask("embed", "rows", "x.npy")[0] == 0
    assert (seen[-1].timeout_s, seen[-1].max_batch_size) == (10, 1000)
    Path("big.jpg").write_bytes(bytes(2**22))
    ask("embed", "bytes", "big.jpg")
    assert seen[-1].max_batch_size == 4
    Path("ca.pem").write_bytes(b"whoever")
    ask("embed", "rows", "x.npy", "--tls-ca", "ca.pem", "--timeout", "0.2")
    assert seen[-1].tls is not None
    assert seen[-1].tls.root_certificates == b"whoever"


def test_tls_by_the_authority_s_file(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from keras_mrl_serving.server import DevServer

    authority = trustme.CA()
    pair = authority.issue_cert("127.0.0.1")
    chain = "".join(pem.bytes().decode() for pem in pair.cert_chain_pems)
    (tmp_path / "tls.txt").write_text(
        f'server_key: "{pair.private_key_pem.bytes().decode()}"\nserver_cert: "{chain}"\n'
    )
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    np.save(tmp_path / "x.npy", np.zeros((1, 3), np.float32))
    with DevServer(models / "rows", ssl_config_file=tmp_path / "tls.txt") as target:
        arguments = ["embed", target, str(tmp_path / "x.npy"), "--json"]
        assert main([*arguments, "--tls-ca", str(tmp_path / "ca.pem")]) == 0
        assert lines(capsys.readouterr().out)[0]["embedding"] == [0, 0, 0]
        assert main([*arguments, "--timeout", "1"]) == 1


def test_progress_is_on_the_terminal_alone(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    np.save("x.npy", np.zeros((40, 3), np.float32))
    np.savez("y.npz", x=np.zeros((2, 3), np.float32))
    for more in (), ("--out", "E.npy"):
        terminal = Terminal()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", terminal)
            status, out, _ = ask("embed", "rows", "x.npy", "y.npz", "--max-batch-size=1", *more)
        assert status == 0
        assert "rows/s" not in out
        said = terminal.getvalue()
        assert "42/42 rows, " in said
        assert "16/42 rows, " in said
        assert said.endswith("\r\x1b[K")
    assert ask("embed", "rows", "x.npy")[2] == ""


def test_names_that_would_break_the_table_are_escaped(ask: Ask) -> None:
    file = os.fsdecode(b"a\n\xff.npy")
    np.save(file, np.zeros((1, 3), np.float32))
    status, out, err = ask("embed", "rows", file)
    assert (status, err) == (0, "")
    assert out.splitlines()[1].startswith("a\\n\\udcff.npy       0    3")
    assert lines(ask("embed", "rows", file, "--json")[1])[0]["file"] == file


def test_a_number_json_has_not_is_null(ask: Ask) -> None:
    np.save("x.npy", np.array([[1, np.nan, np.inf]], np.float32))
    row = lines(ask("embed", "rows", "x.npy", "--json")[1])[0]
    assert row["embedding"] == [1, None, None]


BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("tensorflow", "keras", "jax", "torch", "keras_mrl"):
            raise ImportError(f"{name} is not to be imported")
sys.meta_path.insert(0, Blocked())
from keras_mrl_cli.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("command", ["classify", "embed"])
def test_no_framework_is_needed(targets: Mapping[str, str], tmp_path: Path, command: str) -> None:
    file = paint(str(tmp_path / "red.png"), RED)
    arguments = [command, targets["pixels"], file, "--model=pixels", "--json"]
    program = [sys.executable, "-c", BLOCK, *arguments]
    done = subprocess.run(program, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert lines(done.stdout)[0]["dim"] == (1 if command == "classify" else 3)


def test_a_reader_that_has_enough_is_no_traceback(
    targets: Mapping[str, str], tmp_path: Path
) -> None:
    np.save(tmp_path / "x.npy", np.zeros((5000, 3), np.float32))
    arguments = ["embed", targets["rows"], str(tmp_path / "x.npy"), "--model=rows", "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "keras_mrl_cli", *arguments],
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


@pytest.mark.parametrize("command", ["classify", "embed"])
def test_the_help_teaches_by_two_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    out = capsys.readouterr().out
    assert out.count(f"\n  keras-mrl {command} localhost:8500 ") == 2


def test_arrays_are_mapped_not_read(tmp_path: Path) -> None:
    from keras_mrl_cli.asking.files import load

    np.save(tmp_path / "x.npy", np.zeros((4, 3), np.float32))
    manifest = Manifest(
        name="rows",
        fingerprint="",
        dims=(1, 3),
        width=3,
        inputs=SPECS["rows"],
        made_with={},
        kind="encoder",
    )
    assert isinstance(load(str(tmp_path / "x.npy"), manifest, 1.0)["x"], np.memmap)


def test_what_a_server_says_in_many_lines_is_one(ask: Ask) -> None:
    Path("text.jpg").write_text("no image")
    status, out, err = ask("embed", "bytes", "text.jpg", "--out", "E.npy")
    assert (status, out) == (1, "")
    assert err.startswith("keras-mrl: ")
    assert err.count("\n") == 1
    assert "decode" in err
