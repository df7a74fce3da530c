import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from keras_mrl import MatryoshkaClassifier, MatryoshkaHead, MatryoshkaLoss
from keras_mrl.evaluation import score_head
from tests.helpers.laws import exactly
from tests.helpers.small_models import NUM_CLASSES, X, Y, as_numpy, compiled, cross_entropy

pytestmark = pytest.mark.backend

FEATURES = np.random.default_rng(0).normal(size=(6, 8)).astype("float32")
FROZEN = (
    "A Matryoshka head needs features that can learn to nest. "
    "Received: features none of whose weights can be trained; a new head on a frozen backbone "
    "gives about 5% at 8 dims (the paper's own finding). "
    "Unfreeze the last blocks of the backbone, or put a trainable layer before the head, "
    "e.g. keras.layers.Dense(width)."
)


def randomised(head: MatryoshkaHead, width: int = 8) -> MatryoshkaHead:
    head.build((None, width))
    random = np.random.default_rng(1)
    head.set_weights([random.normal(size=w.shape) for w in head.weights])
    return head


@pytest.mark.parametrize(
    ("width", "dims"), [(64, (8, 16, 32, 64)), (20, (8, 16, 20)), (8, (8,)), (5, (5,))]
)
def test_without_dims_the_ladder_ends_at_the_width_of_the_features(
    width: int, dims: tuple[int, ...]
) -> None:
    head = MatryoshkaHead(NUM_CLASSES)
    assert head.dims is None
    assert head.compute_output_shape((None, width)) == (None, len(dims), NUM_CLASSES)
    logits = head(np.ones((2, width), "float32"))
    assert head.dims == dims
    assert tuple(logits.shape) == (2, len(dims), NUM_CLASSES)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dims", [(8,), (3,), (1, 5), (3, 7, 8)])
def test_every_dim_reads_its_prefix_alone(dims: tuple[int, ...], tied: bool) -> None:
    head = randomised(MatryoshkaHead(NUM_CLASSES, dims=dims, tied=tied))
    logits = as_numpy(head(FEATURES))
    assert logits.shape == (6, len(dims), NUM_CLASSES)
    weights = head.get_weights()
    for m, dim in enumerate(dims):
        kernel = weights[0][:dim] if tied else weights[m]
        bias = weights[1] if tied else weights[len(dims) + m]
        expected = FEATURES[:, :dim].astype("float64") @ kernel + bias
        np.testing.assert_allclose(logits[:, m], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_sequence_is_classified_step_by_step(tied: bool) -> None:
    head = randomised(MatryoshkaHead(NUM_CLASSES, dims=(2, 8), tied=tied))
    steps = FEATURES.reshape(2, 3, 8)
    logits = as_numpy(head(steps))
    assert logits.shape == (2, 3, 2, NUM_CLASSES)
    np.testing.assert_allclose(logits.reshape(6, 2, -1), as_numpy(head(FEATURES)), rtol=1e-5)
    assert head.compute_output_shape((None, 3, 8)) == (None, 3, 2, NUM_CLASSES)
    symbolic = MatryoshkaHead(NUM_CLASSES, dims=(2, 8), tied=tied)(keras.Input((None, 8)))
    assert tuple(symbolic.shape) == (None, None, 2, NUM_CLASSES)


def test_tying_halves_the_parameters_of_the_papers_ladder() -> None:
    counts = {}
    for tied in (False, True):
        head = MatryoshkaHead(1000, tied=tied, kernel_initializer="zeros")
        head.build((None, 2048))
        assert head.dims == (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
        counts[tied] = head.count_params()
    assert counts[True] == 2048 * 1000 + 1000
    assert counts[True] / counts[False] == pytest.approx(0.50, abs=0.01)


def test_without_bias_there_is_none() -> None:
    head = randomised(MatryoshkaHead(NUM_CLASSES, dims=(2, 8), use_bias=False))
    assert [tuple(w.shape) for w in head.weights] == [(2, NUM_CLASSES), (8, NUM_CLASSES)]
    assert head.weights_at(2)[1] is None
    assert not as_numpy(head(np.zeros((1, 8), "float32"))).any()


@pytest.mark.parametrize("seed", [None, 3])
def test_no_two_kernels_begin_with_the_same_numbers(seed: int | None) -> None:
    initializer = keras.initializers.RandomNormal(seed=seed)
    head = MatryoshkaHead(
        NUM_CLASSES, dims=(6, 7, 8), use_bias=False, kernel_initializer=initializer
    )
    head.build((None, 8))
    drawn = np.concatenate([np.ravel(w) for w in head.get_weights()])
    assert len(np.unique(drawn)) == (6 + 7 + 8) * NUM_CLASSES


def test_a_seed_makes_the_same_head_again() -> None:
    first, second = (
        MatryoshkaHead(
            NUM_CLASSES, dims=(4, 8), kernel_initializer=keras.initializers.RandomNormal(seed=3)
        )
        for _ in range(2)
    )
    for head in (first, second):
        head.build((None, 8))
    for one, other in zip(first.get_weights(), second.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_regularizer_is_charged_for_every_kernel() -> None:
    head = MatryoshkaHead(
        NUM_CLASSES, dims=(2, 4), kernel_regularizer="l2", kernel_initializer="ones"
    )
    head.build((None, 4))
    charged = sum(float(as_numpy(loss)) for loss in head.losses)
    assert charged == pytest.approx(0.01 * (2 + 4) * NUM_CLASSES)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_one_dim_alone_says_what_the_whole_head_says_of_it(tied: bool) -> None:
    head = randomised(MatryoshkaHead(NUM_CLASSES, dims=(2, 5, 8), tied=tied))
    logits = as_numpy(head(FEATURES))
    for dim in (2, 5, 8):
        prefix = FEATURES[:, :dim]
        alone = as_numpy(head.logits_at(keras.ops.convert_to_tensor(prefix), dim))
        np.testing.assert_allclose(alone, logits[:, head.index_of(dim)], rtol=1e-5, atol=1e-6)
        kernel, bias = map(as_numpy, head.weights_at(dim))
        assert kernel.shape == (dim, NUM_CLASSES)
        np.testing.assert_allclose(prefix @ kernel + bias, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dim", [3, 0, "8", None])
def test_a_dim_of_no_kernel_is_refused(dim: int) -> None:
    head = randomised(MatryoshkaHead(NUM_CLASSES, dims=(2, 8)))
    sentence = (
        "dim must be one of the dims of the head. "
        f"Received: dim={dim!r} for dims=(2, 8). Choose one of those."
    )
    for ask in (head.index_of, head.weights_at):
        with pytest.raises(ValueError, match=exactly(sentence)):
            ask(dim)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_dims_wider_than_the_features_are_refused(tied: bool) -> None:
    sentence = (
        "dims must not exceed the width of the features. "
        "Received: dims=(4, 8, 16) for features of width 8. "
        "Drop the dims above 8, or widen the layer that makes the features."
    )
    head = MatryoshkaHead(NUM_CLASSES, dims=(4, 8, 16), tied=tied)
    with pytest.raises(ValueError, match=exactly(sentence)):
        head(FEATURES)


@pytest.mark.parametrize("dims", [None, (2, 4)])
def test_features_of_unknown_width_are_refused(dims: Sequence[int] | None) -> None:
    sentence = (
        "MatryoshkaHead needs features of a known width. "
        "Received: features of shape (None, None). "
        "Give the layer before it a fixed number of units."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        MatryoshkaHead(NUM_CLASSES, dims=dims)(keras.Input((None,)))


@pytest.mark.parametrize("number", [0, -3, 2.0, "3", None, True])
def test_a_number_of_classes_that_counts_nothing_is_refused(number: int) -> None:
    sentence = (
        f"num_classes must be a positive integer. Received: num_classes={number!r}. "
        "Count the classes of your labels: labels 0..9 make num_classes=10."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        MatryoshkaHead(number)


def test_numpy_integers_count_classes_and_dims() -> None:
    head = MatryoshkaHead(Y.max() + 1, dims=np.array([2, 8]))  # type: ignore[arg-type]
    config = json.loads(json.dumps(head.get_config()))
    assert (config["num_classes"], config["dims"]) == (NUM_CLASSES, [2, 8])


class SayMask(keras.layers.Layer):
    """Gives the mask it was handed as its output."""

    supports_masking = True

    def call(self, inputs: Any, mask: Any = None) -> Any:
        del inputs
        return keras.ops.cast(mask, "float32")


def test_the_mask_of_a_sequence_goes_through_the_head() -> None:
    tokens = keras.Input((4,), dtype="int32")
    embedded = keras.layers.Embedding(5, 8, mask_zero=True)(tokens)
    logits = MatryoshkaHead(NUM_CLASSES, dims=(2, 8))(embedded)
    model = keras.Model(tokens, SayMask()(logits))
    assert as_numpy(model(np.array([[1, 2, 0, 0]]))).tolist() == [[1, 1, 0, 0]]


def frozen_model(*between: keras.layers.Layer) -> keras.Model:
    inputs = keras.Input((5,))
    features = keras.layers.Dense(8, trainable=False)(inputs)
    for layer in between:
        features = layer(features)
    return compiled(keras.Model(inputs, MatryoshkaHead(NUM_CLASSES, dims=(2, 8))(features)))


def test_frozen_features_are_warned_of_once() -> None:
    model = frozen_model()
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        model.fit(X, Y, batch_size=4, epochs=2, verbose=0)
        model.fit(X, Y, batch_size=4, verbose=0)
    ours = [str(w.message) for w in record if "Matryoshka" in str(w.message)]
    assert ours == [FROZEN]


def test_precomputed_features_are_warned_of() -> None:
    inputs = keras.Input((5,))
    model = keras.Model(inputs, MatryoshkaHead(NUM_CLASSES, dims=(2, 5))(inputs))
    with pytest.warns(UserWarning, match=exactly(FROZEN)):
        compiled(model).fit(X, Y, verbose=0)


@pytest.mark.filterwarnings("error")
def test_a_trainable_layer_before_the_head_is_enough() -> None:
    frozen_model(keras.layers.Dense(8), keras.layers.Dropout(0.1)).fit(X, Y, verbose=0)


@pytest.mark.filterwarnings("error:A Matryoshka")
def test_nobody_is_warned_who_does_not_train(tmp_path: Path) -> None:
    model = frozen_model()
    model.predict(X, verbose=0)
    model.evaluate(X, Y, verbose=0)
    path = tmp_path / "frozen.keras"
    model.save(path)
    keras.saving.load_model(path)(X)


def test_the_warning_can_be_made_an_error() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with pytest.raises(UserWarning, match="needs features that can learn to nest"):
            frozen_model().fit(X, Y, verbose=0)


def test_a_nested_loss_trains_a_head_of_one_dim() -> None:
    head = MatryoshkaHead(NUM_CLASSES, dims=(8,))
    inputs = keras.Input((5,))
    model = keras.Model(inputs, head(keras.layers.Dense(8)(inputs)))
    compiled(model, loss=MatryoshkaLoss(cross_entropy(), weights=(2,)))
    losses = model.fit(X, Y, epochs=5, verbose=0).history["loss"]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_int8_kernels_are_those_of_a_dense_layer(tied: bool) -> None:
    head = randomised(MatryoshkaHead(NUM_CLASSES, dims=(2, 4, 8), tied=tied))
    before = as_numpy(head(FEATURES))
    dense = keras.layers.Dense(NUM_CLASSES)
    dense.build((None, 8))
    dense.set_weights([as_numpy(weight) for weight in head.weights_at(8)])
    dense.quantize("int8")
    head.quantize("int8")
    kernel = as_numpy(head.weights_at(8)[0])
    integers, scale = as_numpy(dense.kernel), as_numpy(dense.kernel_scale)
    np.testing.assert_allclose(kernel, integers / scale, rtol=1e-6)
    assert {weight.dtype for weight in head.weights if "kernel" in weight.name} == {"int8"}
    after = as_numpy(head(FEATURES))
    for m, dim in enumerate(head.dims or ()):
        kernel, bias = (as_numpy(weight) for weight in head.weights_at(dim))
        expected = FEATURES[:, :dim].astype("float64") @ kernel + bias
        np.testing.assert_allclose(after[:, m], expected, rtol=1e-5, atol=1e-5)
    assert 0 < np.abs(after - before).max() < 0.02 * np.abs(before).max()


@pytest.mark.filterwarnings("ignore:Layer InputLayer", "ignore:__array__")  # of Keras and PyTorch
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_quantized_model_goes_on(tied: bool, tmp_path: Path) -> None:
    body = keras.Sequential([keras.Input((5,)), keras.layers.Dense(8)])
    model = MatryoshkaClassifier(body, MatryoshkaHead(NUM_CLASSES, dims=(2, 8), tied=tied))
    model.quantize("int8")
    assert (model.head.quantization_mode, body.layers[-1].quantization_mode) == ("int8", "int8")
    logits = model.predict(X, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.head.quantization_mode == "int8"
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), logits)
    np.testing.assert_allclose(as_numpy(loaded.at(2)(X)), logits[:, 0], rtol=1e-5, atol=1e-6)
    scores = [
        score_head(as_numpy(body(X)), Y, *model.head.weights_at(dim))["top1"] for dim in (2, 8)
    ]
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
    assert model.evaluate(X, Y, verbose=0)[1:] == pytest.approx(scores)
    assert np.isfinite(model.fit(X, Y, verbose=0).history["loss"]).all()


@pytest.mark.filterwarnings("ignore:__array__")
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_head_reads_a_quantized_embedding_as_it_looks_tokens_up(mode: str) -> None:
    table = keras.layers.Embedding(NUM_CLASSES, 8, embeddings_initializer="normal")
    table.build(None)
    head = MatryoshkaHead(NUM_CLASSES, dims=(2, 8), tied=True, embedding=table)
    head.build((None, 8))
    table.quantize(mode)
    rows = as_numpy(table(np.arange(NUM_CLASSES)))
    np.testing.assert_allclose(as_numpy(head(FEATURES))[:, 1], FEATURES @ rows.T, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True], ids=["mode", "embedding"])
def test_a_head_that_cannot_be_quantized_stays_as_it_is(tied: bool) -> None:
    table = keras.layers.Embedding(NUM_CLASSES, 8)
    table.build(None)
    head = MatryoshkaHead(NUM_CLASSES, (2, 8), tied=tied, embedding=table if tied else None)
    head.build((None, 8))
    before = as_numpy(head(FEATURES))
    received = "a head with an embedding" if tied else "mode='int4'"
    text = (
        "A MatryoshkaHead has kernels of its own in float or in int8. "
        f"Received: {received}. "
        "Write quantize('int8'), or quantize the embedding."
    )
    with pytest.raises(NotImplementedError, match=exactly(text)):
        head.quantize("int8" if tied else "int4")
    np.testing.assert_array_equal(as_numpy(head(FEATURES)), before)
