"""Encoded images go in as they are: the graph decodes them as they were decoded for the model."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_mrl_export import ImageDecoder, export_saved_model
from keras_mrl_serving import (
    Client,
    InvalidInputError,
    UnreadableImageError,
    read_image,
    served_image,
)
from keras_mrl_serving.images import resize_image
from keras_mrl_serving.server import DevServer
from tests.helpers.export_images import DECODER, EXACT, SMOOTH, encoded, model_of_images
from tests.helpers.export_models import outputs, probabilities, read_manifest
from tests.helpers.image_files import HEIGHT, SIXTEEN, WIDTH, files


@pytest.fixture(scope="module")
def trained() -> keras.Model:
    return model_of_images()


@pytest.fixture(scope="module")
def version(trained: keras.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    sample = [*map(encoded, EXACT), encoded(SMOOTH, "JPEG")]
    return export_saved_model(trained, tmp_path_factory.mktemp("eyes"), sample, decoder=DECODER)


@pytest.fixture(scope="module")
def client(version: Path) -> Iterator[Client]:
    with DevServer(version.parent, model_name="eyes") as target, Client(target, "eyes") as client:
        yield client


def test_an_image_of_the_models_size_is_its_pixels() -> None:
    np.testing.assert_array_equal(
        DECODER.pixels([encoded(image) for image in EXACT]),
        np.stack(EXACT) * np.float32(1 / 255),
    )


def test_others_are_resized_and_a_grey_one_gets_colours() -> None:
    grey = encoded(SMOOTH[..., 0])
    pixels = DECODER.pixels([encoded(SMOOTH), encoded(SMOOTH, "JPEG"), grey])
    rows = np.add.outer(np.arange(4.5, 60, 10), np.arange(3.5, 40, 8)) / 255
    assert np.abs(pixels - rows[..., None]).max() < 0.01


def test_channels_have_numbers_of_their_own() -> None:
    decoder = ImageDecoder(height=6, width=5, scale=(1, 2, 3), offset=(0, 0.5, -1))
    expected = EXACT[0] * np.array([1, 2, 3], np.float32) + np.array([0, 0.5, -1], np.float32)
    np.testing.assert_array_equal(decoder.pixels([encoded(EXACT[0])])[0], expected)


def test_what_is_served_is_the_model(client: Client, trained: keras.Model) -> None:
    files = [encoded(image) for image in EXACT]
    logits = outputs(trained, np.stack(EXACT).astype(np.float32) / 255)
    expected = probabilities(logits[:, 0], 1.0)
    answer = client.classify(files, dim=2)
    np.testing.assert_allclose(answer.probabilities, -np.sort(-expected, -1), rtol=1e-4)
    assert client.embed(files[:1], dim=8).shape == (1, 8)


def test_the_manifest_says_how(version: Path) -> None:
    manifest = read_manifest(version)
    assert manifest.inputs == {"inputs": {"dtype": "string", "shape": [None]}}
    assert manifest.decoder == {
        **{"height": 6, "width": 5, "channels": 3, "scale": 1 / 255, "offset": 0.0},
        **{"formats": ["jpeg", "png", "gif", "bmp"], "resize": "bilinear"},
        "transparency": "white",
    }


def test_a_bad_image_fails_its_call_alone(client: Client) -> None:
    with pytest.raises(UnreadableImageError, match=r"Received: row 1 \(it is none\)\."):
        client.classify([encoded(EXACT[0]), b"no image"], dim=2)
    whole = encoded(EXACT[1])
    damaged = whole[:50] + bytes(10) + whole[60:]
    with pytest.raises(InvalidInputError, match="Invalid PNG data"):  # known to the server alone
        client.classify([encoded(EXACT[0]), damaged], dim=2)
    assert client.classify([encoded(EXACT[0])], dim=2).class_ids.shape == (1, 3)


@pytest.mark.parametrize(
    ("sample", "received"),
    [
        ([b"no image"], r"at 0, bytes b'no image': Unknown image file format\..*"),
        ([encoded(EXACT[0]), b""], r"at 1, bytes b'': Input is empty\."),
        (np.ones((2, 6, 5, 3)), r"at 0, ndarray: not bytes\."),
        (encoded(EXACT[0]), r"at 0, int: not bytes\."),
        (["a.png"], r"at 0, str: not bytes\."),
        (5, r"at 0, int: not bytes\."),
        ([encoded(EXACT[0])[:40]], r"at 0, bytes b'.+PNG.*': Invalid PNG.*\."),
    ],
)
def test_a_sample_that_is_no_list_of_images(
    trained: Any, tmp_path: Path, sample: Any, received: str
) -> None:
    with pytest.raises(ValueError, match="decoder") as caught:
        export_saved_model(trained, tmp_path, sample, decoder=DECODER)
    rule = re.escape("A sample for a model with a decoder is a list of the bytes of images. ")
    remedy = re.escape(" Give [path.read_bytes() for path in a_few_images].")
    assert re.fullmatch(f"{rule}Received: {received}{remedy}", str(caught.value))
    assert "{{" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_model_of_two_inputs_has_no_use_for_a_decoder(tmp_path: Path) -> None:
    inputs = [keras.Input((6, 5, 3), name=name) for name in ("left", "right")]
    model = keras.Model(inputs, keras.layers.Flatten()(keras.layers.Add()(inputs)))
    with pytest.raises(ValueError, match="decoder") as caught:
        export_saved_model(model, tmp_path, [encoded(EXACT[0])], decoder=DECODER)
    assert str(caught.value) == (
        "A decoder makes the one input of a model out of images. "
        "Received: a decoder for a model with the inputs left, right. "
        "Export it without, for clients that send pixels."
    )


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "GIF", "BMP"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_format_is_decoded_to_any_channels(channels: int, image_format: str) -> None:
    decoder = ImageDecoder(height=60, width=40, channels=channels)
    assert decoder.to_json()["formats"] == ["jpeg", "png", "gif", "bmp"]
    assert decoder.to_json()["transparency"] == ("kept" if channels == 4 else "white")
    pixels = decoder.pixels([encoded(SMOOTH, image_format)])[0]
    assert pixels.shape == (60, 40, channels)
    assert np.abs(pixels[..., 0] - SMOOTH[..., 0]).max() <= 2
    assert channels < 4 or (pixels[..., 3] == 255).all()


FILES = files()
UNREADABLE = {"tiff-called.png", "float-called.png"}
# One colour of sixteen bits: Pillow does not keep its low bits, the graph does.
ONLY_IN_THE_GRAPH = {"transparent-sixteen.png"}
READ_ALIKE = sorted(set(FILES) - UNREADABLE - ONLY_IN_THE_GRAPH)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_graph_has_the_pixels_that_every_room_reads(channels: int) -> None:
    decoder = ImageDecoder(height=HEIGHT, width=WIDTH, channels=channels)
    decode = tf.function(decoder.decode, input_signature=[tf.TensorSpec((None,), tf.string)])
    expected = [read_image(FILES[name], channels) for name in READ_ALIKE]
    sent = [served_image(FILES[name]) for name in READ_ALIKE]
    for name, pixels, decoded in zip(READ_ALIKE, expected, decode(sent).numpy(), strict=True):
        np.testing.assert_array_equal(decoded, pixels, name)


def test_a_jpeg_or_png_without_tags_needs_no_client_of_ours() -> None:
    decoder = ImageDecoder(height=HEIGHT, width=WIDTH)
    plain = [name for name in READ_ALIKE if served_image(FILES[name]) == FILES[name]]
    assert len(plain) > 30
    pixels = decoder.pixels([FILES[name] for name in plain])
    for name, decoded in zip(plain, pixels, strict=True):
        np.testing.assert_array_equal(decoded, read_image(FILES[name]), name)


def test_one_transparent_color_of_sixteen_bits_is_white_in_the_graph() -> None:
    decoder = ImageDecoder(height=HEIGHT, width=WIDTH)
    (decoded,) = decoder.pixels([FILES["transparent-sixteen.png"]])
    is_it = (SIXTEEN[..., :3] == SIXTEEN[2, 2, :3]).all(-1, keepdims=True)
    np.testing.assert_array_equal(decoded, np.where(is_it, 255, SIXTEEN[..., :3] >> 8))


def test_resizing_in_the_graph_is_within_a_level_of_pillows() -> None:
    small = ImageDecoder(height=8, width=11)
    for name in READ_ALIKE:
        (decoded,) = small.pixels([served_image(FILES[name])])
        assert np.abs(decoded - resize_image(read_image(FILES[name]), 8, 11)).max() < 1.001, name


def test_the_client_sends_what_the_graph_reads_right(tmp_path: Path) -> None:
    inputs = keras.Input((HEIGHT, WIDTH, 3), name="image")
    model = keras.Model(inputs, keras.layers.Flatten()(inputs), name="pixels")
    sample = [FILES["RGB.png"], FILES["baseline-2.jpg"]]
    decoder = ImageDecoder(height=HEIGHT, width=WIDTH)
    more: dict[str, Any] = {"normalize": False, "dims": (3, HEIGHT * WIDTH * 3)}
    export_saved_model(model, tmp_path / "pixels", sample, decoder=decoder, **more)
    with DevServer(tmp_path / "pixels", model_name="pixels") as target:
        with Client(target, "pixels") as client:
            answer = client.embed([FILES[name] for name in READ_ALIKE], dim=more["dims"][1])
            for name in UNREADABLE:
                with pytest.raises(UnreadableImageError, match=r"row 1 \(it is (none|a TIFF)\)"):
                    client.embed([FILES["RGB.png"], FILES[name]], dim=3)
    for name, row in zip(READ_ALIKE, answer, strict=True):
        np.testing.assert_array_equal(row, read_image(FILES[name]).ravel(), name)


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")  # Pillow's, of tags it cannot read
def test_what_is_damaged_has_the_same_pixels_or_is_refused() -> None:
    random, outcomes = np.random.default_rng(5), Counter[str]()
    for number in range(10_000 if os.environ.get("KERAS_MRL_SOAK") else 300):
        name = READ_ALIKE[number % len(READ_ALIKE)]
        damaged = bytearray(FILES[name])
        for place in random.integers(0, len(damaged), random.integers(1, 4)):
            damaged[place] = random.integers(256)
        try:
            pixels = read_image(bytes(damaged), name=name)
            sent = served_image(bytes(damaged), name=name)
        except UnreadableImageError:
            outcomes["refused by Pillow"] += 1
            continue
        if pixels.size > 2**20:  # the size itself was damaged
            continue
        try:
            (decoded,) = ImageDecoder(height=len(pixels), width=pixels.shape[1]).pixels([sent])
        except ValueError:
            outcomes["refused by the graph"] += 1
            continue
        # Of a progressive JPEG that lacks a scan, each version of libjpeg guesses what is missing.
        levels = 8 if name.startswith("progressive") else 0
        assert np.abs(decoded - pixels).max() <= levels, name
        outcomes["equal"] += 1
    assert outcomes["equal"] > 50, outcomes


def test_numbers_of_numpy_are_taken_and_written_down() -> None:
    decoder = ImageDecoder(
        height=np.int64(6),  # type: ignore[arg-type]
        width=5,
        scale=np.float32(0.5),  # type: ignore[arg-type]
        offset=np.array([0, 1, 2]),  # type: ignore[arg-type]
    )
    assert decoder == ImageDecoder(height=6, width=5, scale=0.5, offset=(0.0, 1.0, 2.0))
    assert json.loads(json.dumps(decoder.to_json()))["offset"] == [0.0, 1.0, 2.0]
    assert hash(decoder) == hash(ImageDecoder(height=6, width=5, scale=0.5, offset=(0, 1, 2)))


def test_another_size_than_the_models(trained: keras.Model, tmp_path: Path) -> None:
    other = ImageDecoder(height=5, width=5)
    with pytest.raises(
        ValueError, match=re.escape("'image': (any, 6, 5, 3), batch first. Receive")
    ):
        export_saved_model(trained, tmp_path, [encoded(EXACT[0])], decoder=other)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"height": 0},
            "An image has a height and a width in pixels, and 1, 3 or 4 channels. Received: "
            "height=0, width=5, channels=3. "
            "Give those of the model's input: ImageDecoder(height=32, width=32).",
        ),
        (
            {"channels": 2},
            "An image has a height and a width in pixels, and 1, 3 or 4 channels. Received: "
            "height=6, width=5, channels=2. "
            "Give those of the model's input: ImageDecoder(height=32, width=32).",
        ),
        (
            {"scale": (1.0, 2.0)},
            "scale must be one finite number, or one per channel. Received: scale=(1.0, 2.0) "
            "for 3 channels. Give scale=1 / 255, or a tuple of 3.",
        ),
        (
            {"offset": float("nan")},
            "offset must be one finite number, or one per channel. Received: offset=nan "
            "for 3 channels. Give offset=1 / 255, or a tuple of 3.",
        ),
        *(
            (
                {"scale": scale},
                f"scale must be one finite number, or one per channel. Received: scale={scale!r} "
                "for 3 channels. Give scale=1 / 255, or a tuple of 3.",
            )
            for scale in ("x", "1", 1e300, None, True, (1, (2, 3)))
        ),
        *(
            (
                {"scale": scale},
                "scale must not be 0, which makes every image the same. "
                f"Received: scale={scale!r}. Give scale=1 / 255, or leave it out.",
            )
            for scale in (0, 1e-50, (1.0, 0.0, 1.0))
        ),
        *(
            (
                {"channels": channels},
                "An image has a height and a width in pixels, and 1, 3 or 4 channels. Received: "
                f"height=6, width=5, channels={channels!r}. "
                "Give those of the model's input: ImageDecoder(height=32, width=32).",
            )
            for channels in (True, 3.0)
        ),
    ],
)
def test_a_decoder_that_is_none(changes: Any, text: str) -> None:
    with pytest.raises(ValueError, match=rf"\A{re.escape(text)}\Z"):
        ImageDecoder(**{"height": 6, "width": 5, **changes})
