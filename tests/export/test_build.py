"""A fingerprint is of all that makes an embedding, and of nothing else."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from PIL import Image

from keras_mrl_export import ImageDecoder, export_saved_model
from keras_mrl_serving.contract import MANIFEST_FILE, Manifest
from tests.helpers.export_models import only_tensorflow

pytestmark = [pytest.mark.backend, only_tensorflow]

X = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)


def fingerprint(model: keras.Model, base_path: Path, sample: Any = X, **arguments: Any) -> str:
    arguments = {"signatures": [], **arguments}
    path = export_saved_model(model, base_path, sample, **arguments)
    return Manifest.from_json((path / MANIFEST_FILE).read_bytes()).fingerprint


def test_of_one_model_served_alike(tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((5,), name="x"), keras.layers.Dense(8)])
    same = [
        fingerprint(model, tmp_path),
        fingerprint(model, tmp_path, {"x": X[:2].astype(np.float64)}),
        fingerprint(model, tmp_path, dims=(2, 4), name="other", signatures=["embed"]),
        fingerprint(model, tmp_path, quality={8: {"top1": 0.5}}, warmup_batch_sizes=()),
    ]
    assert len(set(same)) == 1
    assert fingerprint(model, tmp_path, normalize=False) != same[0]


def test_of_decoders(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), 7, np.uint8)).save(file, "PNG")
    model = keras.Sequential([keras.Input((4, 4, 3)), keras.layers.Flatten()])
    found = [
        fingerprint(model, tmp_path, [file.getvalue()], decoder=decoder)
        for decoder in (
            ImageDecoder(height=4, width=4),
            ImageDecoder(height=4, width=4, scale=0.5),
            ImageDecoder(height=4, width=4, offset=(0, 0, 1)),
        )
    ]
    found.append(fingerprint(model, tmp_path, np.ones((1, 4, 4, 3), np.float32)))
    assert len(set(found)) == len(found)


class Doubled(keras.Model):
    """A model that declares no input: in bytes, twice 200 is 144."""

    def call(self, x: Any) -> Any:
        return keras.ops.cast(x * 2, "float32")


def test_of_the_types_that_inputs_are_cast_to(tmp_path: Path) -> None:
    model = Doubled()
    rows = np.full((2, 3), 200)
    assert fingerprint(model, tmp_path, rows.astype(np.uint8)) != fingerprint(
        model, tmp_path, rows.astype(np.float32)
    )


def of_texts(texts: Sequence[str], **arguments: Any) -> keras.Model:
    """A model whose layer learned its words from some texts."""
    words = keras.layers.TextVectorization(name="words", **arguments)
    words.adapt(list(texts))
    inputs = keras.Input((), dtype="string", name="text")
    outputs = words(inputs)
    if outputs.dtype != "float32":
        outputs = keras.ops.cast(outputs, "float32")
    return keras.Model(inputs, outputs, name="of_texts")


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        ({"output_sequence_length": 4}, [("a cat", "a"), ("a dog", "a"), ("a cat", "a")]),
        # The same words, which stand in more of the texts.
        (
            {"output_mode": "tf_idf"},
            [("a cat", "a"), ("a cat", "a", "a"), ("a cat", "a")],
        ),
    ],
    ids=["vocabulary", "document frequencies"],
)
def test_of_what_layers_learned_besides_weights(
    tmp_path: Path, arguments: Any, texts: list[Sequence[str]]
) -> None:
    keras.backend.clear_session()
    found = []
    for known in texts:
        keras.backend.clear_session()
        found.append(fingerprint(of_texts(known, **arguments), tmp_path, ["a cat", "a"]))
    assert found[0] == found[2] != found[1]
