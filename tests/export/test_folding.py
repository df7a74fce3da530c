"""Batch normalizations become part of the convolutions before them, if nothing else reads these."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

from keras_mrl import MatryoshkaClassifier, MatryoshkaHead
from keras_mrl_export import export_saved_model
from keras_mrl_export.folding import fold_normalizations
from keras_mrl_serving._session import SavedModelSession, operations_of
from tests.helpers.export_models import with_fixed_weights

IMAGES = np.random.default_rng(0).normal(size=(4, 6, 6, 4)).astype("float32")
Norm = layers.BatchNormalization


def sequence(*parts: Any) -> Callable[[Any], Any]:
    def apply(x: Any) -> Any:
        for part in parts:
            x = part(x)
        return x

    return apply


def twice(x: Any) -> Any:
    """Both layers in two places."""
    convolution, norm = layers.Conv2D(4, 1), Norm()
    return norm(convolution(norm(convolution(x))))


def of_two(x: Any) -> Any:
    """One normalization after two convolutions."""
    norm = Norm()
    return norm(layers.Conv2D(4, 1)(norm(layers.Conv2D(4, 1)(x))))


def read_by_two(x: Any) -> Any:
    x = layers.Conv2D(4, 1)(x)
    return layers.Add()([Norm()(x), x])


def read_by_an_operation(x: Any) -> Any:
    x = layers.Conv2D(4, 1)(x)
    return Norm()(x) + keras.ops.abs(x)


def an_output(x: Any) -> Any:
    x = layers.Conv2D(4, 1)(x)
    return [x, Norm()(x)]


def called_in_vain(x: Any) -> Any:
    """Two calls of each, but one output of the convolution is read by nothing."""
    convolution, norm = layers.Conv2D(4, 1), Norm()
    first = norm(convolution(x))
    convolution(first)
    return [first, norm(first)]


def in_a_wrapper(x: Any) -> Any:
    convolution = layers.Conv2D(4, 1)
    frames = layers.Reshape((1, 6, 6, 4))(x)
    return [Norm()(convolution(x)), layers.TimeDistributed(convolution)(frames)]


class Scaled(layers.Layer):
    """Reads the kernel of another layer."""

    def __init__(self, other: Any) -> None:
        super().__init__()
        self.other_kernel = other.kernel

    def call(self, inputs: Any) -> Any:
        return inputs * keras.ops.mean(self.other_kernel)


def a_kernel_of_two(x: Any) -> Any:
    convolution = layers.Conv2D(4, 1)
    return [Norm()(convolution(x)), Scaled(convolution)(x)]


class Doubled(keras.Model):
    """Has a graph of calls, and a `call` that does something else."""

    def __init__(self) -> None:
        x = keras.Input(IMAGES.shape[1:])
        convolution, norm = layers.Conv2D(4, 1), Norm()
        super().__init__(x, norm(convolution(x)))
        self.convolution, self.norm = convolution, norm

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        del training, mask
        return self.norm(2 * self.convolution(inputs))


def a_call_of_its_own(x: Any) -> Any:
    return Doubled()(x)


def a_model_in_training(x: Any) -> Any:
    inputs = keras.Input(x.shape[1:])
    return keras.Model(inputs, Norm()(layers.Conv2D(4, 1)(inputs)))(x, training=True)


def of_the_batch(x: Any) -> Any:
    return Norm()(layers.Conv2D(4, 1)(x), training=True)


FOLDED = {
    "plain": (sequence(layers.Conv2D(3, 3), Norm()), 1),
    "without bias": (sequence(layers.Conv2D(3, 3, use_bias=False), Norm(epsilon=0.1)), 1),
    "without scale": (sequence(layers.Conv2D(3, 3), Norm(scale=False)), 1),
    "without center": (sequence(layers.Conv2D(3, 3), Norm(center=False)), 1),
    "in groups": (sequence(layers.Conv2D(6, 3, groups=2), Norm()), 1),
    "depthwise": (
        sequence(layers.DepthwiseConv2D(3, depth_multiplier=2, use_bias=False), Norm()),
        1,
    ),
    "a model in the model": (
        sequence(keras.Sequential([layers.Conv2D(3, 3), Norm(), layers.ReLU()]), Norm()),
        1,
    ),
    "an activation between": (sequence(layers.Conv2D(3, 3, activation="relu"), Norm()), 0),
    "another axis": (sequence(layers.Conv2D(4, 1), Norm(axis=1)), 0),
    "two": (sequence(layers.Conv2D(3, 3), Norm(), Norm()), 1),
    "both twice": (twice, 1),
    "one after two": (of_two, 0),
    "read by two": (read_by_two, 0),
    "read by an operation": (read_by_an_operation, 0),
    "an output": (an_output, 0),
    "called in vain": (called_in_vain, 0),
    "in a wrapper": (in_a_wrapper, 0),
    "a kernel of two": (a_kernel_of_two, 0),
    "a call of its own": (a_call_of_its_own, 0),
    "statistics of the batch": (of_the_batch, 0),
    "a model in training": (a_model_in_training, 0),
}


@pytest.mark.parametrize(("make", "number"), FOLDED.values(), ids=FOLDED)
def test_a_model_answers_as_before(make: Callable[[Any], Any], number: int) -> None:
    x = keras.Input(IMAGES.shape[1:])
    model = keras.Model(x, make(x))
    rng = np.random.default_rng(0)
    for own in model.weights:
        own.assign(rng.uniform(0.5, 1.5, own.shape))
    before = model(IMAGES)
    assert fold_normalizations(model) == number
    for received, expected in zip(
        keras.tree.flatten(model(IMAGES)), keras.tree.flatten(before), strict=True
    ):
        np.testing.assert_allclose(received, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.backend
def test_a_served_graph_has_them_folded(tmp_path: Path) -> None:
    """The fingerprint is that of the weights as they were trained."""
    x = keras.Input(IMAGES.shape[1:], name="x")
    hidden = Norm(name="early")(layers.Conv2D(8, 3, use_bias=False)(x))
    net = keras.Model(x, Norm()(layers.Conv2D(8, 3)(hidden)))
    model = MatryoshkaClassifier(
        net,
        MatryoshkaHead(3, (2, 8)),
        pooling=layers.GlobalAveragePooling2D(),
        exits=("early",),
    )
    with_fixed_weights(model, {"": IMAGES})
    weights = model.get_weights()
    path = export_saved_model(
        model,
        tmp_path,
        IMAGES,
        signatures=["classify", "classify_early_8"],
        activation="softmax",
    )
    assert "Rsqrt" not in operations_of(path)
    logits = model.all_exits().predict(IMAGES, verbose=0)
    with SavedModelSession(path) as session:
        for name, signature in (("last", "classify_8"), ("early", "classify_early_8")):
            shares = session.run(signature, {"x": IMAGES})["probabilities"]
            best = keras.ops.convert_to_numpy(keras.ops.softmax(logits[name][:, -1])).max(-1)
            np.testing.assert_allclose(shares[:, 0], best, rtol=1e-4)
    for own, kept in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(own, kept)


class Hidden(layers.Layer):
    """Calls a layer of a model by its name, which no graph shows."""

    def __init__(self, net: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.net = net

    def call(self, inputs: Any) -> Any:
        features = self.net.get_layer("convolution")(inputs)
        return keras.ops.mean(features, (1, 2)) + keras.ops.mean(self.net(inputs), (1, 2))

    def get_config(self) -> dict[str, Any]:
        net = keras.saving.serialize_keras_object(self.net)
        return {**super().get_config(), "net": net}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Hidden":
        return cls(keras.saving.deserialize_keras_object(config.pop("net")), **config)


def test_what_differs_folded_is_exported_as_it_is(tmp_path: Path) -> None:
    inputs = keras.Input(IMAGES.shape[1:])
    net = keras.Model(inputs, Norm()(layers.Conv2D(8, 3, name="convolution")(inputs)))
    x = keras.Input(IMAGES.shape[1:], name="x")
    model = MatryoshkaClassifier(keras.Model(x, Hidden(net)(x)), MatryoshkaHead(3, (2, 8)))
    with_fixed_weights(model, {"": IMAGES})
    path = export_saved_model(
        model, tmp_path, IMAGES, signatures=["classify"], activation="softmax"
    )
    assert "Rsqrt" in operations_of(path)
