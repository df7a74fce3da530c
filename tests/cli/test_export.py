"""`keras-mrl export`: a .keras file becomes a version, or a sentence says why not."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image

from keras_mrl import MatryoshkaClassifier, MatryoshkaHead
from keras_mrl_serving import Manifest
from keras_mrl_serving.cascade.policy import CascadePolicy, Stage
from keras_mrl_serving.contract import MANIFEST_FILE
from keras_mrl_serving.saved_model import read_signatures
from keras_mrl_serving.server import DevServer
from tests.helpers import exit_models, text_models, two_towers
from tests.helpers import export_models as models
from tests.helpers.cli import CASCADE, KERAS_MRL, LABELS, Call, Exported
from tests.helpers.laws import on_backends
from tests.helpers.nested_models import two_heads
from tests.helpers.waiting import wait_until

_DEADLINE_S = 120
BACKEND = keras.backend.backend()
TWO_INPUTS = {"left": (7,), "right": (5,)}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models as Keras saved them."""
    folder = tmp_path_factory.mktemp("keras")
    for make in (models.untied, models.tied, models.of_tokens, models.encoder):
        make().save(folder / f"{make.__name__}.keras")
    two_heads().save(folder / "two.keras")
    inputs = keras.Input((None, 3), name="x")
    pooled = keras.layers.GlobalAveragePooling1D()(inputs)
    keras.Model(inputs, keras.layers.Dense(8)(pooled)).save(folder / "any_length.keras")
    return folder


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the test's own; whatever the command changes of the process is put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(os, "environ", os.environ.copy())
    return tmp_path


Export = Callable[..., tuple[Path, Manifest, str]]
Refused = Callable[..., str]


@pytest.fixture
def export(files: Path, call: Call) -> Export:
    """Export a model; the version, its manifest, and the lines on stderr."""

    def export(model: str, *words: str) -> tuple[Path, Manifest, str]:
        status, out, err = call("export", str(files / f"{model}.keras"), "--base-path=base", *words)
        assert status == 0, err
        version = Path(out.splitlines()[-1])
        return version, Manifest.from_json((version / MANIFEST_FILE).read_text()), err

    return export


@pytest.fixture
def refused(files: Path, call: Call) -> Refused:
    """The last line on stderr of an export that cannot be; it leaves nothing."""

    def refused(model: str, *words: str) -> str:
        file = str(files / f"{model}.keras")
        sentence = refusal_at_the_end(call.of("export", file, "--base-path=base", *words))
        assert not list(Path().glob("base/*"))
        return sentence

    return refused


def refusal_at_the_end(export: Call) -> str:
    """The last line on stderr; progress comes before it."""
    status, out, err = export()
    assert (status, out) == (1, "")
    return err.splitlines()[-1].removeprefix("keras-mrl: ")


def test_everything_that_can_be_said(export: Export) -> None:
    policy = {"stages": CASCADE["stages"], "confidence": "max_probability"}
    Path("policy.json").write_text(json.dumps(policy))
    text = "\n".join(models.NAMES) + "\n \n\n"  # as editors leave them
    Path("labels.txt").write_text(text, "utf-8-sig", newline="\r\n")
    np.save("sample.npy", models.images(4))
    files = "--policy policy.json --labels labels.txt --sample sample.npy"
    more = "--dims 16,2 --name other --version 7 --top-k 3 --no-normalize --no-identity"
    version, manifest, err = export("untied", *files.split(), *more.split())
    assert version == Path("base/7")
    assert manifest.dims == (2, 16)
    assert (manifest.name, manifest.top_k, manifest.normalize) == ("other", 3, False)
    assert manifest.model_id is None
    assert manifest.cascade is not None
    assert manifest.cascade["stages"] == CASCADE["stages"]
    assert manifest.labels
    names = (version / "assets" / "labels.txt").read_bytes()
    assert names == "".join(f"{name}\n" for name in models.NAMES).encode()
    assert manifest.made_with["trained_on"] == BACKEND
    assert f"on {BACKEND} ..." in err
    assert "random rows" not in err


@pytest.mark.backend
@on_backends("tensorflow", "torch")
def test_two_towers_from_the_file_to_the_neighbours(call: Call) -> None:
    """Every command knows the tower that the gallery goes through."""
    two_towers.two_towers().save("shop.keras")
    np.save("users.npy", two_towers.USERS)
    np.savez("items.npz", **two_towers.ITEMS)
    np.savez("two.npz", **{name: rows[:2] for name, rows in two_towers.ITEMS.items()})

    def done(*words: str) -> str:
        status, out, err = call(*words)
        assert status == 0, err
        return out

    words = ["--base-path=shop", "--sample=users.npy", "--other-sample=two.npz", "--dims=2,8"]
    version = done("export", "shop.keras", *words).splitlines()[-1]
    assert "other tower  price float32 (any, 1), size float32 (any, 4)" in done("inspect", version)
    with DevServer("shop") as target:
        at = ["--target", target]
        done("embed", *at, "--other-tower", "--out=E.npy", "items.npz")
        assert json.loads(done("embed", *at, "--json", "--other-tower", "two.npz").splitlines()[1])[
            "embedding"
        ] == pytest.approx(np.load("E.npy")[1].tolist(), abs=1e-5)
        funnel = ["--engine=exact", "--dims=8", "--shortlists=none", "--k=3"]
        done("index", "build", "--embeddings=E.npy", "--out=i.index", *at, *funnel)
        lines = done("search", "i.index", *at, "--json", "users.npy").splitlines()
        status, _, err = call("embed", *at, "--other-tower", "users.npy")
        sentence = (
            "keras-mrl: Each tower of a model takes the rows of its own side. Received: "
            "{}, which the other tower of model 'shop' takes. Embed rows of galleries with "
            "--other-tower, and rows of queries without.\n"
        )
        assert (status, err) == (1, sentence.format("users.npy"))
        for words in (["embed"], ["embed", "--out=F.npy"], ["search", "i.index"]):
            assert call(*words, *at, "items.npz")[::2] == (1, sentence.format("items.npz"))
    keras_model = keras.saving.load_model("shop.keras", compile=False)
    users = two_towers.user_embeddings(keras_model)
    items = two_towers.item_embeddings(keras_model)
    nearest = np.argsort(-two_towers.similarities(users, items, 8))[:, :3]
    assert [json.loads(line)["ids"] for line in lines] == nearest.tolist()


def test_images_as_files(export: Export) -> None:
    for name in ("a.png", "b.jpg"):
        Image.fromarray(np.full((9, 12, 3), 128, np.uint8)).save(name)
    chosen = "--images a.png b.jpg --pixel-scale 0.5 --signatures embed_2,head".split()
    version, manifest, _ = export("untied", *chosen)
    assert manifest.inputs == {"inputs": {"dtype": "string", "shape": [None]}}
    assert manifest.decoder is not None
    assert (manifest.decoder["height"], manifest.decoder["scale"]) == (6, 0.5)
    signatures = read_signatures(version)
    assert signatures.keys() - {"describe", "serving_default"} == {
        *("embed_2", "head_2", "head_4", "head_16"),
    }
    assert signatures["embed_2"].inputs == manifest.inputs
    assert signatures["embed_2"].outputs == {
        "embedding": {"dtype": "float32", "shape": [None, 2]},
        "model_id": {"dtype": "int32", "shape": [None]},
    }


def test_images_that_cannot_be(refused: Refused) -> None:
    assert refused("untied", "--images", "none.png") == (
        "--images must name files that can be read. "
        "Received: none.png (No such file or directory). Correct the path."
    )
    Path("text.png").write_text("no image")
    assert refused("untied", "--images", "text.png") == (
        "An image file must be a whole JPEG, PNG, GIF, BMP or WebP. Received: text.png (it is "
        "none). Save it anew as an 8-bit PNG or JPEG, or leave it out."
    )
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save("cut.png")
    Path("cut.png").write_bytes(Path("cut.png").read_bytes()[:6000])
    assert refused("untied", "--images", "cut.png") == (
        "An image file must be a whole JPEG, PNG, GIF, BMP or WebP. Received: cut.png (image file "
        "is truncated). Save it anew as an 8-bit PNG or JPEG, or leave it out."
    )
    assert refused("encoder", "--images", "text.png").startswith(
        "Images are decoded to the one input of a model: height, width and channels. "
        "Received: a model with inputs of shapes [(7,)]. "
    )
    assert refused("untied", "--pixel-scale", "2") == (
        "--pixel-scale is of images that the version decodes. Received: no --images. "
        "Give a few: --images FILE FILE."
    )
    assert refused("untied", "--images", "text.png", "--sample", "x.npy").startswith(
        "An export is verified on rows or on images. Received: --sample and --images. "
    )


def test_random_rows_stand_in_for_floats(export: Export) -> None:
    version, manifest, err = export("tied")
    assert version.parent == Path("base")
    assert version.name.isdecimal()
    assert set(manifest.inputs) == set(TWO_INPUTS)
    assert (
        "The export is verified on random rows in [0, 1); real rows verify more: --sample."
        in err.splitlines()
    )


def test_an_archive_holds_a_sample_by_input_name(export: Export) -> None:
    rows = models.sides(3)
    np.savez("sample.npz", left=rows["left"], right=rows["right"])
    _, manifest, err = export("tied", "--sample", "sample.npz")
    assert "random rows" not in err
    assert set(manifest.inputs) == set(TWO_INPUTS)


def test_an_encoder_has_an_input_of_no_name(export: Export) -> None:
    version, manifest, _ = export("encoder", "--dims", "4")
    assert (manifest.kind, manifest.dims, set(manifest.inputs)) == ("encoder", (4,), {"inputs"})
    assert version.parent == Path("base")


def test_one_of_several_outputs(export: Export, refused: Refused) -> None:
    text = "which has 'digit', 'odd'. Give for example --output digit."
    assert refused("two").endswith(text)
    _, manifest, _ = export("two", "--output", "odd")
    assert (manifest.name, manifest.num_classes) == ("two_odd", 2)


def test_integers_and_unknown_sizes_need_real_rows(refused: Refused) -> None:
    rule = "An export is verified on rows, and random ones stand only for floats of known shape. "
    remedy = " Give a few real rows: --sample FILE.npy, or .npz by input name."
    assert refused("of_tokens") == (rule + "Received: a model that declares no inputs." + remedy)
    assert refused("any_length") == (rule + "Received: x float32 (None, None, 3)." + remedy)


@pytest.mark.backend
def test_what_does_not_fit_the_model(refused: Refused) -> None:
    np.save("sample.npy", np.zeros((2, 3), np.float32))
    assert refused("untied", "--sample", "sample.npy") == (
        "sample must have the shape of the model's input 'image': (any, 6, 6, 3), batch first. "
        "Received: (2, 3). Prepare its rows as in training."
    )
    Path("labels.txt").write_text("one\n")
    assert refused("untied", "--labels", "labels.txt").startswith("labels must name each of the 10")
    assert refused("untied", "--dims", "3").startswith("dims must be dims of the model: (2, 4, 16)")


def test_files_that_are_not_there(refused: Refused) -> None:
    assert refused("none").startswith("A model to export must be a .keras file. Received: /")
    assert refused("untied", "--labels", "none.txt") == (
        "--labels must be a file that can be read. "
        "Received: none.txt (No such file or directory). Correct the path."
    )
    os.mkfifo("pipe.txt")
    assert refused("untied", "--labels", "pipe.txt") == (
        "--labels must be a text in UTF-8. Received: pipe.txt (a FIFO, not a regular file). "
        "Write one class name a line."
    )
    Path("latin.txt").write_bytes("grün".encode("latin-1"))
    assert refused("untied", "--labels", "latin.txt") == (
        "--labels must be a text in UTF-8. Received: latin.txt (invalid start byte). "
        "Write one class name a line."
    )
    assert refused("untied", "--policy", "none.json") == (
        "--policy must be a file that can be read. "
        "Received: none.json (No such file or directory). Correct the path."
    )
    assert refused("untied", "--sample", "none.npy") == (
        "Every file must be one that can be read. "
        "Received: none.npy (No such file or directory). Correct the path."
    )


def test_a_version_is_never_overwritten(export: Export, files: Path, call: Call) -> None:
    export("encoder", "--version", "3", "--dims", "4")
    words = ("export", str(files / "encoder.keras"), "--base-path", "base", "--version", "3")
    assert refusal_at_the_end(call.of(*words)).startswith(
        "A published version is never overwritten. "
    )


def test_a_base_path_that_is_a_file(refused: Refused) -> None:
    Path("base").touch()
    assert refused("encoder", "--dims", "4").startswith(
        "--base-path must be a folder that can be written. "
    )


def test_a_base_path_that_is_a_url_and_a_name_that_is_none(files: Path, call: Call) -> None:
    export = call.of("export", str(files / "encoder.keras"), "--base-path")
    assert refusal_at_the_end(export.of("gs://bucket/birds")) == (
        "base_path must be a folder of a file system. "
        "Received: base_path='gs://bucket/birds'. "
        "Export to a folder, then copy the version's folder to where servers read."
    )
    assert refusal_at_the_end(export.of("base", "--name", "")) == (
        "name must be of letters, digits, '_', '.' and '-', the first and the last a "
        "letter or digit. Received: name=''. Give for example 'birds'."
    )
    assert os.listdir() == []


def test_exits_and_a_policy_over_them(export: Export, files: Path) -> None:
    exit_models.vectors().save(files / "vectors.keras")
    policy = CascadePolicy((Stage(2, 0.3, exit="first"), Stage(8, None)))
    Path("policy.json").write_text(json.dumps(policy.to_json()))
    np.save("sample.npy", exit_models.VECTORS[:8])
    asked = "classify_8,classify_adaptive,classify_first_2"
    given = f"--policy policy.json --sample sample.npy --signatures {asked}"
    version, manifest, _ = export("vectors", *given.split())
    assert manifest.exit_names == ("first", "last")
    assert manifest.cascade is None
    assert manifest.exit_cascade is not None
    assert CascadePolicy.from_json(manifest.exit_cascade).stages == policy.stages
    assert {*asked.split(",")} <= read_signatures(version).keys()


@pytest.mark.parametrize("kind", [str, bytes])
def test_a_sample_of_texts(export: Export, files: Path, kind: type) -> None:
    words = keras.layers.TextVectorization(output_sequence_length=3, vocabulary=["a", "cat"])
    inputs = keras.Input((1,), dtype="string", name="text")
    vectors = keras.layers.Embedding(4, 4)(words(inputs))
    keras.Model(inputs, keras.layers.Flatten()(vectors)).save(files / "texts.keras")
    np.save("text.npy", np.array(["a cat", "a"]).astype(kind))
    _, manifest, _ = export("texts", "--sample", "text.npy", "--signatures", "embed_8")
    assert manifest.inputs == {"text": {"dtype": "string", "shape": [None, 1]}}


def test_texts_and_prompts_of_a_model_with_a_tokenizer(export: Export, files: Path) -> None:
    text_models.trained().save(files / "sentences.keras")
    Path("few.txt").write_text("a cat sat\nthe dog ran\n")
    prompts = ("--prompt", "query=query: ", "--prompt=passage=")
    _, manifest, _ = export("sentences", "--sample=few.txt", "--signatures=embed_8", *prompts)
    assert manifest.inputs == {"text": {"dtype": "string", "shape": [None]}}
    assert (manifest.preprocessor or {})["prompts"] == {"query": "query: ", "passage": ""}


def test_a_file_of_texts_that_is_not_there_and_a_model_of_no_texts(refused: Refused) -> None:
    assert "--sample must be a file" in refused("untied", "--sample=none.txt")
    Path("few.txt").write_text("a cat\n")
    assert "Received: (1,)" in refused("untied", "--sample=few.txt")


@pytest.mark.parametrize(
    ("flag", "values", "text"),
    [
        ("--dims", ["8;16"], "must be integers with commas. {} Give for example 8,16."),
        (
            "--pixel-scale",
            ["0", "1e300", "1e-60", "nan", "inf", "1/255"],
            "must be a finite number other than 0. {} "
            "Give for example 0.00392157, which is 1 / 255.",
        ),
        (
            "--prompt",
            ["query", "=query: "],
            "must be NAME=TEXT. {} Give for example 'query=query: '.",
        ),
        (
            "--signatures",
            ["", ",", " "],
            "must be names with commas. {} Give for example embed,classify_64.",
        ),
    ],
)
def test_values_that_do_not_parse(call: Call, flag: str, values: list[str], text: str) -> None:
    for value in values:
        sentence = call.misused("export", "m.keras", "--base-path", "base", flag, value)
        received = text.format(f"Received: {value!r}.")
        assert sentence == f"Invalid value for '{flag}': {received}"


def test_a_module_that_cannot_be_imported(refused: Refused) -> None:
    Path("broken.py").write_text("1 / 0")
    rule = "--import must name a module that can be imported, here or installed. "
    remedy = " Name it as in an import statement, without .py."
    assert refused("untied", "--import", "no_such_module") == (
        f"{rule}Received: no_such_module (ModuleNotFoundError: No module named 'no_such_module')."
        + remedy
    )
    assert refused("untied", "--import", "broken") == (
        f"{rule}Received: broken (ZeroDivisionError: division by zero).{remedy}"
    )
    for argument, code in (("", "None"), ("0", "0"), ("'so'", "'so'")):
        Path(f"ends_{len(argument)}.py").write_text(f"import sys; sys.exit({argument})")
        assert refused("untied", "--import", f"ends_{len(argument)}") == (
            f"{rule}Received: ends_{len(argument)} (it ends by sys.exit({code})).{remedy}"
        )


def test_a_layer_of_the_user_s_own_is_imported(exported: Exported, call: Call) -> None:
    assert exported.out == "models/1\n"
    assert [line for line in exported.err.splitlines() if line.endswith(("...", "--sample."))] == [
        "Loading tiny.keras on tensorflow ...",
        "The export is verified on random rows in [0, 1); real rows verify more: --sample.",
        "Exporting, and comparing every signature with the model ...",
    ]
    manifest = Manifest.from_json((exported.base_path / "1" / MANIFEST_FILE).read_text())
    assert (manifest.name, manifest.num_classes) == ("tiny_One", len(LABELS))
    model = exported.folder / "tiny.keras"
    sentence = refusal_at_the_end(call.of("export", str(model), "--base-path", "base"))
    assert sentence.startswith(
        f"The .keras file must load on this backend. Received: {model} on {BACKEND}, "
    )
    assert sentence.endswith(
        " Import the modules that register classes of your own with --import, and make Lambda "
        "layers classes."
    )


# On TensorFlow an export is one process; on the others it is two, which each signal ends once.
SIGNALS = {"jax": [signal.SIGHUP], "torch": [signal.SIGTERM]}


@pytest.mark.backend
@pytest.mark.parametrize("number", SIGNALS.get(BACKEND, [signal.SIGTERM, signal.SIGHUP]))
def test_an_export_that_is_told_to_end_leaves_nothing(tmp_path: Path, number: int) -> None:
    base_path, temporary = tmp_path / "models", tmp_path / "temporary"
    temporary.mkdir()
    file = tmp_path / "plain.keras"
    keras.Sequential([keras.Input((5,)), keras.layers.Dense(64)]).save(file)
    np.save(tmp_path / "rows.npy", np.ones((4, 5), np.float32))
    words = [str(file), "--base-path", str(base_path), "--sample", str(tmp_path / "rows.npy")]
    # Under nohup a child would ignore what we ignore; what we handle it does not.
    before = signal.signal(number, lambda *_: None)
    process = subprocess.Popen(
        [*KERAS_MRL, "export", *words],
        env={**os.environ, "KERAS_BACKEND": BACKEND, "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    signal.signal(number, before)
    with process:
        written = ".unfinished-*/model/variables"
        wait_until(lambda: process.poll() is not None or list(base_path.glob(written)))
        process.send_signal(number)
        assert process.wait(_DEADLINE_S) == 128 + number
        assert process.stdout is not None
        assert process.stdout.read() == b""
    assert not base_path.exists()
    assert not list(temporary.glob("keras-mrl-*"))


def of_loss(file: Path, loss: str | None) -> str:
    """A model of one output, compiled with a loss and never fitted, as a file without a suffix."""
    backbone = keras.Sequential([keras.Input((5,), name="x"), keras.layers.Dense(8)])
    model = MatryoshkaClassifier(backbone, MatryoshkaHead(2, dims=(2, 8)))
    if loss is not None:
        model.compile("sgd", loss=loss)
    model.save(file)
    return str(file.with_suffix(""))


def test_the_loss_in_the_file_says_what_the_outputs_are(export: Export, tmp_path: Path) -> None:
    for loss, kind, activation in (
        ("binary_crossentropy", "classifier", "sigmoid"),
        ("huber", "regressor", "none"),
    ):
        _, manifest, err = export(of_loss(tmp_path / "m.keras", loss), "--signatures", "features")
        assert (manifest.kind, manifest.activation) == (kind, activation)
        assert "Softmax is assumed" not in err


def test_what_no_loss_says_is_named_or_assumed_aloud(export: Export, tmp_path: Path) -> None:
    mute = of_loss(tmp_path / "mute.keras", None)
    _, manifest, err = export(mute, "--signatures", "features", "--activation", "sigmoid")
    assert manifest.activation == "sigmoid"
    assert "assumed" not in err
    _, manifest, err = export(mute, "--signatures", "features", "--version", "9999999999")
    assert manifest.activation == "softmax"
    assert "which was never compiled. Softmax is assumed. Name it with --activation: " in err
