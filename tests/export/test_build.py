"""A fingerprint is of all that makes an embedding; a graph holds operations of TensorFlow alone."""

import re
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from keras_mrl import MatryoshkaEncoder
from keras_mrl_export import ExportError, ImageDecoder, export_saved_model
from keras_mrl_export.build import fingerprint_of, fingerprint_of_index
from keras_mrl_export.model_file import load, save
from keras_mrl_serving._session import operations_of
from keras_mrl_serving.index import ExactIndex
from keras_mrl_serving.text_operations import TEXT_OPERATIONS
from tests.helpers.export_galleries import GALLERY, IDS, SCHEDULES, index_of
from tests.helpers.export_images import DECODER, EXACT, encoded, model_of_images
from tests.helpers.export_models import X, dense, read_manifest

FLOATS = {"inputs": {"dtype": "float32", "shape": [None, 5]}}


def fingerprint(
    model: keras.Model,
    folder: Path,
    decoder: ImageDecoder | None = None,
    normalize: bool = True,
) -> str:
    """The fingerprint of a model as it is loaded from its file."""
    save(model, folder / "model.keras")
    loaded = load(folder / "model.keras", {})
    return fingerprint_of(loaded, folder / "model.keras", FLOATS, decoder, normalize)


def exported_fingerprint(
    model: keras.Model, base_path: Path, sample: Any = X, **arguments: Any
) -> str:
    arguments = {"signatures": [], "warmup_batch_sizes": (), **arguments}
    path = export_saved_model(model, base_path, sample, **arguments)
    return read_manifest(path).fingerprint


def test_a_fingerprint_is_of_one_model_served_alike(tmp_path: Path) -> None:
    model = dense()
    expected = exported_fingerprint(model, tmp_path)
    assert expected == exported_fingerprint(
        model,
        tmp_path,
        {"x": X[:2].astype(np.float64)},
        dims=(2, 8),
        name="other",
        signatures=["embed"],
        quality={8: {"top1": 0.5}},
        warmup_batch_sizes=(2,),
    )
    before = fingerprint(model, tmp_path)
    assert fingerprint(model, tmp_path) == before
    assert fingerprint(model, tmp_path, normalize=False) != before
    model.weights[0].assign(model.weights[0] + 1.0)
    assert fingerprint(model, tmp_path) != before


def test_the_state_of_random_layers_is_none_of_a_fingerprint(tmp_path: Path) -> None:
    inputs = keras.Input((X.shape[1],))
    model = keras.Model(inputs, keras.layers.Dense(8)(keras.layers.Dropout(0.5)(inputs)))
    before = exported_fingerprint(model, tmp_path)
    model(X, training=True)  # moves the state on
    assert exported_fingerprint(model, tmp_path) == before


def test_a_fingerprint_is_of_both_towers(tmp_path: Path) -> None:
    encoder = MatryoshkaEncoder(dense(), dense())
    once = exported_fingerprint(encoder, tmp_path, other_sample=X)
    assert exported_fingerprint(encoder, tmp_path, other_sample=X, signatures=["embed"]) == once
    last: Any = encoder.other_tower
    last.weights[0].assign(last.weights[0] + 1.0)
    assert exported_fingerprint(encoder, tmp_path, other_sample=X) != once


def test_a_fingerprint_is_of_the_decoder(tmp_path: Path) -> None:
    model, images = model_of_images(), [encoded(EXACT[0])]
    once, again, scaled, moved = (
        exported_fingerprint(
            model, tmp_path, images, decoder=ImageDecoder(height=6, width=5, **more)
        )
        for more in ({}, {}, {"scale": 0.5}, {"offset": (0, 0, 1)})
    )
    assert once == again
    assert len({once, scaled, moved}) == 3
    small = dense()
    assert fingerprint(small, tmp_path) != fingerprint(small, tmp_path, decoder=DECODER)


class Doubled(keras.Model):
    """A model that declares no input: in bytes, twice 200 is 144."""

    def call(self, x: Any) -> Any:
        return keras.ops.cast(x * 2, "float32")


def test_a_fingerprint_is_of_the_types_that_inputs_are_cast_to(tmp_path: Path) -> None:
    model, rows = Doubled(), np.full((2, 3), 200)
    in_bytes, again, in_floats = (
        exported_fingerprint(model, tmp_path, rows.astype(dtype))
        for dtype in (np.uint8, np.uint8, np.float32)
    )
    assert in_bytes == again != in_floats


def of_texts(texts: Sequence[str], **arguments: Any) -> keras.Model:
    """A model whose layer learned its words from some texts."""
    keras.backend.clear_session()  # for the same names of layers
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
def test_a_fingerprint_is_of_what_layers_learned_besides_weights(
    tmp_path: Path, arguments: Any, texts: list[Sequence[str]]
) -> None:
    first, other, again = (
        fingerprint(of_texts(learned, **arguments), tmp_path) for learned in texts
    )
    assert first == again != other


def test_the_fingerprint_of_an_index_is_of_all_that_answers() -> None:
    turned = GALLERY.copy()
    turned[299, 15] *= -1
    indexes = [
        index_of(),
        index_of("one"),
        index_of(metric="dot"),
        index_of(encoder_fingerprint="5e1f"),
        ExactIndex.build(turned, SCHEDULES["three stages"], IDS),
        ExactIndex.build(GALLERY, SCHEDULES["three stages"]),
    ]
    prints = [fingerprint_of_index(index) for index in indexes]
    assert len(set(prints)) == len(indexes)
    assert fingerprint_of_index(index_of()) == prints[0]


# Operations


def refused_operations(model: keras.Model, base_path: Path, sample: Any) -> list[str]:
    with pytest.raises(ExportError) as caught:
        export_saved_model(model, base_path, sample)
    assert list(base_path.iterdir()) == []
    match = re.fullmatch(
        r"A served graph may hold only operations that TensorFlow Serving has: those of "
        r"TensorFlow and of tensorflow-text\. Received: a model that needs (.*)\. Do this before "
        r"the model, in the client, or by layers of Keras: keras\.ops for tf\.py_function\.",
        str(caught.value),
    )
    assert match
    return match[1].split(", ")


class Bits(keras.layers.Layer):
    """The bits of the first letters of a text, by an operation of tensorflow-text."""

    def call(self, texts: Any) -> Any:
        import tensorflow_text

        return tensorflow_text.utf8_binarize(texts, word_length=4, bits_per_char=2)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return (*input_shape, 8)

    def compute_output_spec(self, texts: Any) -> Any:
        return keras.KerasTensor(self.compute_output_shape(texts.shape))


def test_an_operation_of_tensorflow_text_is_served(tmp_path: Path) -> None:
    """TensorFlow Serving has it built in."""
    pytest.importorskip("tensorflow_text")
    inputs = keras.Input((), dtype="string", name="text")
    model = keras.Model(inputs, Bits()(inputs))
    sample = np.array(["a", "b"], dtype=object)
    path = export_saved_model(model, tmp_path, sample, dims=(8,), signatures=["embed"])
    assert {"TFText>Utf8Binarize"} == operations_of(path) & {*TEXT_OPERATIONS}


class Python(keras.layers.Layer):
    """A layer that calls Python from the graph."""

    def call(self, x: Any) -> Any:
        import tensorflow as tf

        twice = tf.py_function(lambda array: 2 * array, [x], tf.float32)
        twice.set_shape(x.shape)
        return twice


def test_python_inside_the_graph_is_refused(tmp_path: Path) -> None:
    inputs = keras.Input((5,))
    model = keras.Model(inputs, keras.layers.Dense(8)(Python()(inputs)))
    assert refused_operations(model, tmp_path, X) == ["EagerPyFunc"]


def test_operations_that_keras_uses_beside_the_public_ones_are_taken(tmp_path: Path) -> None:
    class Updated(keras.layers.Layer):
        def call(self, x: Any) -> Any:
            return keras.ops.slice_update(x, [0, 0], x[:1, :1] * 2)

    inputs = keras.Input((5,))
    model = keras.Model(inputs, keras.layers.Dense(8)(Updated()(inputs)))
    path = export_saved_model(model, tmp_path, X, signatures=["features"])
    assert b"XlaDynamicUpdateSlice" in (path / "saved_model.pb").read_bytes()


def test_a_disk_that_is_full_is_not_blamed_on_layers(tmp_path: Path) -> None:
    inputs = keras.Input((5,), name="x")
    hidden = keras.layers.Dense(64)(inputs)
    model = keras.Model(inputs, keras.layers.Dense(8)(hidden))
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    errors: list[str] = []
    for size in range(2_000, 60_000, 6_000):  # files of that size end in "File too large"
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, unlimited[1]))
        try:
            export_saved_model(model, tmp_path / "base", X[:2], signatures=["embed"])
            break
        except (ExportError, OSError) as error:
            errors.append(str(error))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        assert not list(tmp_path.glob("base/[0-9]*"))
    assert any("TensorFlow could not write it" in error for error in errors)
    assert any("File too large" in error for error in errors)
    assert [error for error in errors if "keras.ops" in error or "get_config" in error] == []
