"""What computed in half precision computes in float32 when it is served, in every part."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_mrl_export import export_saved_model
from keras_mrl_export.model_file import in_float32, load, save
from tests.helpers.export_models import only_tensorflow

pytestmark = pytest.mark.backend

X = np.random.default_rng(0).normal(size=(6, 5, 5, 2)).astype(np.float32)
HALVES = ("mixed_bfloat16", "mixed_float16", "bfloat16", "float16")


class Holder(layers.Layer):
    """A layer that makes another one without naming a precision."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dense = layers.Dense(8)

    def build(self, input_shape: Any) -> None:
        self.dense.build(input_shape)

    def call(self, x: Any) -> Any:
        return self.dense(x)


class Third(layers.Layer):
    """A layer that casts what it holds when it is made."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.third = ops.cast(1 / 3, self.compute_dtype)

    def call(self, x: Any) -> Any:
        return x * ops.cast(self.third, x.dtype)


def model_of(*middle: layers.Layer) -> keras.Model:
    inputs = keras.Input(X.shape[1:], name="x")
    features: Any = inputs
    for layer in middle:
        features = layer(features)
    features = layers.Dense(8)(layers.Flatten()(features))
    return keras.Model(inputs, features)


def parts() -> list[layers.Layer]:
    means = layers.Normalization(mean=[1 / 3, 2 / 3], variance=[1 / 7, 3])
    return [means, layers.Conv2D(4, 3), layers.GroupNormalization(2), Third(), Holder()]


@pytest.fixture(autouse=True)
def policy() -> Iterator[None]:
    """The global policy is put back."""
    yield
    keras.config.set_dtype_policy("float32")


@pytest.mark.parametrize("trained_in", HALVES)
@pytest.mark.parametrize("exported_in", ["as it was trained", "float32"])
def test_every_part_computes_in_float32(trained_in: str, exported_in: str) -> None:
    keras.config.set_dtype_policy(trained_in)
    trained = model_of(*parts())
    now = "float32" if exported_in == "float32" else trained_in
    keras.config.set_dtype_policy(now)
    copy = in_float32(trained)
    assert keras.config.dtype_policy().name == now
    assert trained.layers[-1].compute_dtype != "float32"
    assert {weight.dtype for weight in copy.weights} == {"float32"}
    keras.config.set_dtype_policy("float32")
    plain = model_of(*parts())
    plain.set_weights(copy.get_weights())
    np.testing.assert_allclose(
        copy.predict(X, verbose=0), plain.predict(X, verbose=0), rtol=1e-5, atol=1e-5
    )


def test_a_model_in_float32_is_not_copied() -> None:
    model = model_of(Holder())
    keras.config.set_dtype_policy("mixed_bfloat16")
    assert in_float32(model) is model


def test_loading_takes_no_precision_of_the_callers_and_leaves_it(tmp_path: Path) -> None:
    save(model_of(Holder()), tmp_path / "model.keras")
    keras.config.set_dtype_policy("mixed_float16")
    loaded = load(tmp_path / "model.keras", {"Holder": Holder})
    assert {layer.compute_dtype for layer in loaded._flatten_layers()} == {"float32"}
    assert keras.config.dtype_policy().name == "mixed_float16"


@only_tensorflow
def test_a_model_is_exported_where_it_was_trained_in_half_precision(tmp_path: Path) -> None:
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = model_of(*parts())
    path = export_saved_model(model, tmp_path, X, signatures=["features"])
    assert path == tmp_path / "1"
