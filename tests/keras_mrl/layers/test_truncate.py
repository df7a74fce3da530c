import json

import keras
import numpy as np
import pytest

import keras_mrl_serving
from keras_mrl import Truncate
from tests.helpers.laws import exactly
from tests.helpers.small_models import X, as_numpy

pytestmark = pytest.mark.backend

RANDOM = np.random.default_rng(0)
EMBEDDINGS = RANDOM.normal(size=(20, 12)).astype("float32")


@pytest.mark.parametrize("dim", [1, 5, 12])
def test_it_equals_what_a_client_computes(dim: int) -> None:
    small, zero = EMBEDDINGS * np.float32(1e-4), EMBEDDINGS.copy()
    zero[3, :dim] = 0
    for embeddings in (EMBEDDINGS, small, zero, EMBEDDINGS.reshape(4, 5, 12)):
        received = as_numpy(Truncate(dim)(embeddings))
        expected = keras_mrl_serving.truncate(embeddings, dim)
        np.testing.assert_allclose(received, expected, rtol=0, atol=2e-7)


def test_the_prefix_is_cut_before_it_is_scaled() -> None:
    unit = EMBEDDINGS / np.linalg.norm(EMBEDDINGS, axis=-1, keepdims=True)
    lengths = np.linalg.norm(as_numpy(Truncate(3)(unit)), axis=-1)
    np.testing.assert_allclose(lengths, 1, rtol=1e-6)


def test_unscaled_it_is_the_slice() -> None:
    received = as_numpy(Truncate(3, normalize=False)(EMBEDDINGS))
    np.testing.assert_array_equal(received, EMBEDDINGS[:, :3])


@pytest.mark.parametrize("policy", ["float16", "bfloat16"])
def test_lengths_are_taken_in_float32_whatever_the_layers_dtype(policy: str) -> None:
    # Squares of 300 exceed float16; 4096 squares of 0.01 vanish one by one in bfloat16.
    large = np.full((1, 4), 300, "float32")
    np.testing.assert_allclose(as_float(Truncate(4, dtype=policy), large), 0.5, rtol=2**-8)
    many = np.full((1, 4096), 0.01, "float32")
    received = as_float(Truncate(4096, dtype=policy), many)
    np.testing.assert_allclose(received, 1 / 64, rtol=2**-7)


def as_float(layer: Truncate, embeddings: np.ndarray) -> np.ndarray:
    return as_numpy(keras.ops.cast(layer(embeddings), "float32"))


def test_a_zero_prefix_stays_zero() -> None:
    embeddings = np.array([[0, 0, 3], [0, 4, 3]], "float32")
    assert as_numpy(Truncate(2)(embeddings)).tolist() == [[0, 0], [0, 1]]


def test_a_zero_prefix_trains_with_a_finite_gradient() -> None:
    inputs = keras.Input((5,))
    # Linear and new, it maps a row of zeros to zeros. (A ReLU would not let a NaN back through.)
    features = keras.layers.Dense(8, name="features")(inputs)
    outputs = keras.layers.Dense(1)(Truncate(4)(features))
    model = keras.Model(inputs, outputs)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    before = model.get_layer("features").get_weights()[0]
    some_zero = np.concatenate([X[:6], np.zeros((6, 5), "float32")])
    assert not as_numpy(model.get_layer("features")(some_zero))[6:].any()
    model.fit(some_zero, np.ones(len(X)), batch_size=len(X), verbose=0)
    assert all(np.isfinite(w).all() for w in model.get_weights())
    after = model.get_layer("features").get_weights()[0]
    assert (after[:, :4] != before[:, :4]).all()  # the other rows are learnt from
    np.testing.assert_array_equal(after[:, 4:], before[:, 4:])


def test_the_shape_of_a_sequence_is_kept() -> None:
    assert tuple(Truncate(3)(keras.Input((None, 12))).shape) == (None, None, 3)
    assert Truncate(3).compute_output_shape((None, 7, 12)) == (None, 7, 3)


def test_a_dim_beyond_the_width_is_refused() -> None:
    sentence = (
        "dims must not exceed the width of the features. "
        "Received: dims=(13,) for features of width 12. "
        "Drop the dims above 12, or widen the layer that makes the features."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        Truncate(13)(EMBEDDINGS)


@pytest.mark.parametrize("dim", [0, -1, 2.0, True])
def test_a_dim_that_is_no_positive_integer_is_refused(dim: int) -> None:
    sentence = (
        f"dims must be strictly increasing positive integers. Received: dims=({dim!r},). "
        "Give prefix lengths, for example dims=(8, 16, 32)."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        Truncate(dim)


def test_a_numpy_dim_is_json() -> None:
    layer = Truncate(np.int64(3))  # type: ignore[arg-type]
    assert json.loads(json.dumps(layer.get_config()))["dim"] == 3
