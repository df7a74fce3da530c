"""The files a command reads: images, rows of arrays, policies."""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from keras_mrl_cli.files import check_rows, load_rows
from keras_mrl_cli.shared import RefusalError
from keras_mrl_serving import Manifest, read_image, served_image
from tests.helpers.cli import ALL_BAD, BAD_FILES, BLUE, RED, Ended, lines, paint
from tests.helpers.hostile_files import archives, arrays
from tests.helpers.image_files import files
from tests.helpers.input_models import SPECS

Ask = Callable[..., Ended]


def test_policies_that_are_none(ask: Ask) -> None:
    paint("red.png", RED)
    Path("text.json").write_text("no json")
    Path("other.json").write_text('{"stages": []}')
    ended = {
        name: ask("classify", "pixels", "red.png", "--policy", name)
        for name in ("none.json", "text.json", "other.json")
    }
    assert {status for status, _, _ in ended.values()} == {1}
    assert ended["none.json"].err == (
        "keras-mrl: --policy must be a file that can be read. "
        "Received: none.json (No such file or directory). Correct the path.\n"
    )
    assert ended["text.json"].err == (
        "keras-mrl: --policy must be the JSON of a CascadePolicy. Received: text.json "
        "(Expecting value: line 1 column 1 (char 0)). "
        "Write it with json.dump(policy.to_json(), file).\n"
    )
    assert ended["other.json"].err.startswith("keras-mrl: other.json: A cascade names its stages")


def test_pixels_are_resized_and_scaled(ask: Ask) -> None:
    left = np.zeros((8, 12, 3), np.uint8)
    left[:, :6] = 200
    Image.fromarray(left).save("half.png")
    for scale, factor in ((), 1.0), (("--scale", "0.5"), 0.5):
        row = lines(ask("embed", "pixels", "half.png", "--json", *scale)[1])[0]
        assert row["embedding"] == pytest.approx([100 * factor] * 3, abs=2 * factor)
        assert row["dim"] == 3


def test_what_is_transparent_shows_white(ask: Ask) -> None:
    paint("l.png", 90, mode="L")
    paint("rgba.png", (10, 20, 30, 0), mode="RGBA")
    rows = lines(ask("embed", "pixels", "l.png", "rgba.png", "--json")[1])
    assert [row["embedding"] for row in rows] == [
        pytest.approx([90, 90, 90]),
        pytest.approx([255, 255, 255]),
    ]


def manifest_of(image: dict[str, Any]) -> Manifest:
    about: dict[str, Any] = {"name": "m", "fingerprint": "", "made_with": {}, "kind": "encoder"}
    return Manifest(dims=(1, 3), width=3, inputs={"image": image}, **about)


def test_every_image_is_read_by_one_rule(folder: Path) -> None:
    del folder
    of_pixels = {
        channels: manifest_of({"dtype": "uint8", "shape": [None, None, None, channels]})
        for channels in (1, 3, 4)
    }
    of_files = manifest_of({"dtype": "string", "shape": [None]})
    bytes_by_name = files()
    for name, data in bytes_by_name.items():
        Path(name).write_bytes(data)
    for name in ("tiff-called.png", "float-called.png", "transparent-sixteen.png"):
        del bytes_by_name[name]
        for manifest in (*of_pixels.values(), of_files):
            with pytest.raises(RefusalError, match=rf"Received: {name} \("):
                check_rows(name, manifest, 1.0)
    for name, data in bytes_by_name.items():
        for channels, manifest in of_pixels.items():
            (pixels,) = load_rows(name, manifest, 1.0)["image"]
            np.testing.assert_array_equal(pixels, read_image(data, channels), name)
        assert check_rows(name, of_files, 1.0)["image"].tolist() == [served_image(data)]


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
        "keras-mrl: Image files are read by Pillow. "
        "Received: import of PIL halted; None in sys.modules. "
        "Install it: pip install 'keras-mrl[images]'.\n",
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
    np.savez("other.npz", y=np.zeros((1, 3)))
    Path("words.txt").write_text("1 2 3")
    Path("pics").mkdir()
    paint("red.png", RED)
    takes = "A file must hold rows as model 'rows' takes them: x float32 (any, 3). Received: "
    torn = "A file must hold what its name says. Received: {} ({}). Make it anew, or leave it out."
    sentence_by_file = {
        "wide.npy": takes + "wide.npy with x float32 (7, 5). Prepare the rows as in training.",
        "flat.npy": takes + "flat.npy with x float32 (3). Prepare the rows as in training.",
        "number.npy": takes + "number.npy with x float32 (). Prepare the rows as in training.",
        "text.npy": torn.format("text.npy", "no .npy, or not a whole one"),
        "text.npz": torn.format("text.npz", "no zip, or not a whole one (File is not a zip file)"),
        "cut.npy": torn.format("cut.npy", "an array of float32 (50, 3), 600 bytes, in 200 bytes"),
        "pickle.npy": torn.format("pickle.npy", "an array of Python objects"),
        "names.npz": "A file for model 'rows' must hold arrays named x. "
        "Received: names.npz with p, q. Save them by name with numpy.savez.",
        "other.npz": "A file for model 'rows' must hold arrays named x. "
        "Received: other.npz with y. Save them by name with numpy.savez.",
        "words.txt": "Texts can be sent to a model whose one input is of strings, which are no "
        "images. Received: words.txt for model 'rows', which takes x float32. Name files of rows, "
        "or a model of texts.",
        "song.mp3": "Files must be .jpg, .jpeg, .png, .gif, .bmp, .webp, .npy or .npz. "
        "Received: song.mp3. Save an image anew as PNG, and rows of an array with numpy.save.",
        "pics/": "Files must be .jpg, .jpeg, .png, .gif, .bmp, .webp, .npy or .npz. "
        "Received: pics/, a folder. Name the files in it: pics/*.jpg.",
        "red.png": "An image can be sent to a model of one input, of encoded images, string "
        "(any), or of pixels, (any, height, width, channels) with 1, 3 or 4 channels. Received: "
        "red.png for model 'rows', which takes x float32 (any, 3). "
        "Prepare the rows as in training and give them as .npy or .npz.",
    }
    status, out, err = ask("classify", "rows", *sentence_by_file)
    assert (status, out) == (1, "")
    sentences = [f"keras-mrl: {sentence}" for sentence in sentence_by_file.values()]
    count = len(sentences)
    assert err.splitlines() == [*sentences, ALL_BAD.format(count, count)]
    np.save("good.npy", np.zeros((2, 3), np.float32))
    for file, sentence in sentence_by_file.items():
        assert ask("embed", "rows", "good.npy", file, "--out", "E.npy") == (
            1,
            "",
            f"keras-mrl: {sentence}\n{BAD_FILES.format(1, 2)}\n",
        )
    assert not list(Path().glob("E.npy*"))


def test_a_model_that_decodes_asks_for_image_files(folder: Path) -> None:
    del folder
    np.save("x.npy", np.zeros((3, 8, 8, 3), np.float32))
    manifest = manifest_of({"dtype": "string", "shape": [None]})
    for decoder, remedy in (
        (None, "Give image files, or strings if it takes text."),
        ({"height": 8}, "Give image files."),
    ):
        with pytest.raises(RefusalError) as caught:
            load_rows("x.npy", replace(manifest, decoder=decoder), 1.0)
        assert str(caught.value) == (
            f"A file must hold rows as model {manifest.name!r} takes them: image string (any). "
            f"Received: x.npy with image float32 (3, 8, 8, 3). {remedy}"
        )


@pytest.mark.parametrize("row", [0, 5, 699_999])
def test_every_value_is_checked_before_any_is_sent(ask: Ask, row: int) -> None:
    values = np.zeros((700_000, 3))  # 16 MiB are checked at a time
    np.save("good.npy", values[:5])
    values[row, 1] = 1e300
    np.save("late.npy", values)
    np.savez("named.npz", x=values[row : row + 1])
    first, last = (699_050, 699_999) if row > 9 else (0, 699_049)
    words = (
        "Input 'x' must be numbers that float32 holds. Received: float64 of shape ({}, 3), in "
        "which 1e+300 would become inf. Scale or round them first."
    )
    for flags in ((), ("--out", "E.npy")):
        assert ask("embed", "rows", "good.npy", "late.npy", "named.npz", *flags) == (
            1,
            "",
            f"keras-mrl: late.npy, rows {first} to {last}: {words.format(last - first + 1)}\n"
            f"keras-mrl: named.npz, rows 0 to 0: {words.format(1)}\n{BAD_FILES.format(2, 3)}\n",
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
        ALL_BAD.format(2, 2),
    ]


def test_arrays_are_mapped_not_read(tmp_path: Path) -> None:
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
    assert isinstance(load_rows(str(tmp_path / "x.npy"), manifest, 1.0)["x"], np.memmap)


def test_what_is_no_regular_file_is_refused_and_not_waited_for(ask: Ask) -> None:
    os.mkfifo("fifo.npy")
    os.mkfifo("fifo.png")
    os.mkfifo("policy.json")
    Path("zero.npz").symlink_to("/dev/zero")
    Path("zero.png").symlink_to("/dev/zero")
    np.save("good.npy", np.zeros((1, 3), np.float32))
    files = ["fifo.npy", "zero.npz", "fifo.png", "zero.png"]
    kinds = ["a FIFO", "a device", "a FIFO", "a device"]
    for model in ("pixels", "bytes"):
        status, out, err = ask("classify", model, *files)
        assert (status, out) == (1, "")
        assert err.splitlines() == [
            *(
                f"keras-mrl: A file must hold what its name says. Received: {file} "
                f"({kind}, not a regular file). Make it anew, or leave it out."
                for file, kind in zip(files, kinds, strict=True)
            ),
            ALL_BAD.format(4, 4),
        ]
    assert ask("classify", "rows", "good.npy", "--policy", "policy.json") == (
        1,
        "",
        "keras-mrl: --policy must be the JSON of a CascadePolicy. Received: policy.json "
        "(a FIFO, not a regular file). Write it with json.dump(policy.to_json(), file).\n",
    )


def test_hostile_arrays_are_refused_each_by_its_name(ask: Ask) -> None:
    files = []
    for suffix, made in ((".npy", arrays()), (".npz", archives())):
        for number, data in enumerate(made.values()):
            files.append(f"{number}{suffix}")
            Path(files[-1]).write_bytes(data)
    status, out, err = ask("embed", "rows", *files)
    assert (status, out) == (1, "")
    *sentences, last = err.splitlines()
    refused = [line.partition(" Received: ")[2].partition(" ")[0] for line in sentences]
    assert (refused, last) == (files, ALL_BAD.format(len(files), len(files)))
