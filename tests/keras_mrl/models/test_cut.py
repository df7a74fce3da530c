"""A nested model split, cut to one dim, and frozen before a layer."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

from keras_mrl import (
    MatryoshkaClassifier,
    MatryoshkaEncoder,
    MatryoshkaHead,
    Truncate,
    cut,
    embedder,
    freeze_before,
    split,
)
from keras_mrl.evaluation import evaluate
from tests.helpers.laws import exactly
from tests.helpers.nested_models import NESTED, around, sequence
from tests.helpers.small_models import (
    DIMS,
    NUM_CLASSES,
    X,
    Y,
    as_numpy,
    backbone,
    classifier,
    compiled,
    functional,
)

pytestmark = pytest.mark.backend


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("use_bias", [False, True])
def test_the_cut_holds_the_kernel_and_bias_of_its_dim(tied: bool, use_bias: bool) -> None:
    head = MatryoshkaHead(
        NUM_CLASSES, dims=DIMS, tied=tied, use_bias=use_bias, bias_initializer="ones"
    )
    model = functional(head)
    dense = cut(model, 4).layers[-1]
    expected = [as_numpy(w) for w in head.weights_at(4) if w is not None]
    assert [w.shape for w in dense.get_weights()] == [(4, 3), (3,)][: 1 + use_bias]
    for received, own in zip(dense.get_weights(), expected, strict=True):
        np.testing.assert_array_equal(received, own)
    np.testing.assert_allclose(
        as_numpy(cut(model, 4)(X)), as_numpy(model(X))[:, 1], rtol=1e-5, atol=1e-6
    )


@pytest.mark.filterwarnings("ignore:Layer (InputLayer|GetItem)")  # which Keras cannot quantise
def test_what_changes_the_cut_leaves_the_model_as_it_was() -> None:
    model = classifier()
    before, weights = as_numpy(model(X)), model.get_weights()
    trained = model.at(8)
    trained.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    trained.fit(X, Y, verbose=0)
    frozen = model.at(8)
    frozen.trainable = False
    quantized = model.at(8)
    quantized.quantize("int8")
    assert quantized.layers[-1].quantization_mode == "int8"
    assert len(model.trainable_weights) == len(weights)
    for was, now in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(was, now)
    np.testing.assert_array_equal(as_numpy(model(X)), before)


class Doubled(layers.Layer):
    """A layer of a user's, which nobody registered."""

    def call(self, inputs: Any) -> Any:
        return 2 * inputs


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="the others have no strings")
def test_the_cut_copies_layers_of_the_users_own_and_what_layers_learned() -> None:
    texts = np.array(["a b", "b c", "c c"], object)
    words = layers.TextVectorization(output_mode="count")
    words.adapt(texts)
    text = keras.Input((), dtype="string")
    body = keras.Model(text, Doubled()(layers.Dense(8)(words(text))))
    model = MatryoshkaClassifier(body, MatryoshkaHead(NUM_CLASSES, dims=DIMS))
    inputs = keras.ops.convert_to_tensor(texts)
    np.testing.assert_allclose(as_numpy(cut(model, 4)(inputs)), as_numpy(model(inputs))[:, 1])


def test_a_cut_keeps_the_names_and_dtypes_of_the_inputs() -> None:
    inputs = {
        "words": keras.Input((4,), dtype="int32", name="words"),
        "length": keras.Input((1,), name="length"),
    }
    pooled = layers.GlobalAveragePooling1D()(layers.Embedding(9, 7)(inputs["words"]))
    body = keras.Model(inputs, layers.Concatenate()([pooled, inputs["length"]]))
    model = classifier(body)
    x = {"words": np.arange(8).reshape(2, 4), "length": np.ones((2, 1), "float32")}
    logits = as_numpy(model(x))
    plain = model.at(8)
    assert {i.name: (tuple(i.shape), i.dtype) for i in plain.inputs} == {
        "words": ((None, 4), "int32"),
        "length": ((None, 1), "float32"),
    }
    np.testing.assert_allclose(as_numpy(plain(x)), logits[:, 2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["head", "logits_4", "dense"])
def test_a_backbone_may_have_any_name(name: str) -> None:
    model = classifier(backbone(name=name))
    model(X)
    assert tuple(model.at(4)(X).shape) == (12, NUM_CLASSES)


def test_the_same_model_may_be_cut_twice() -> None:
    model = classifier()
    model(X)
    one, other = model.at(4), model.at(4)
    np.testing.assert_array_equal(as_numpy(one(X)), as_numpy(other(X)))


def test_a_model_without_a_nested_head_is_all_backbone() -> None:
    inputs = keras.Input((5,))
    plain = keras.Model(inputs, layers.Dense(8)(inputs), name="plain")
    assert split(plain) == (plain, None)
    sentence = (
        "Only a model that ends in a MatryoshkaHead can be cut to a dim. "
        "Received: Functional 'plain'. "
        "Use MatryoshkaClassifier(backbone, MatryoshkaHead(num_classes))."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        cut(plain, 8)


def test_a_dim_the_head_does_not_have_is_refused() -> None:
    sentence = (
        "dim must be one of the dims of the head. "
        "Received: dim=3 for dims=(2, 4, 8). Choose one of those."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        cut(functional(), 3)


def unbuilt_classifier() -> keras.Model:
    head = MatryoshkaHead(NUM_CLASSES, dims=DIMS)
    body = keras.Sequential([layers.Dense(8)])
    return compiled(MatryoshkaClassifier(body, head, name="unbuilt"))


def unbuilt_sequential() -> keras.Model:
    head = MatryoshkaHead(NUM_CLASSES, dims=DIMS)
    return keras.Sequential([layers.Dense(8), head], name="unbuilt")


@pytest.mark.parametrize("make", [unbuilt_classifier, unbuilt_sequential])
def test_a_model_without_weights_is_refused_until_it_was_called(
    make: Callable[[], keras.Model],
) -> None:
    model = make()
    sentence = (
        "A model must be built before a part of it is taken. "
        "Received: 'unbuilt', which has no weights yet. Call it on a batch or train it."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        cut(model, 4)
    logits = as_numpy(model(X))
    np.testing.assert_allclose(as_numpy(cut(model, 4)(X)), logits[:, 1], rtol=1e-5, atol=1e-6)


def encoder() -> keras.Model:
    return MatryoshkaEncoder(backbone())


def plain_backbone() -> keras.Model:
    return backbone()


@pytest.mark.parametrize("dim", [4, 5])
@pytest.mark.parametrize("make", [*NESTED.values(), encoder, plain_backbone])
def test_an_embedder_gives_the_prefix_at_unit_length(
    make: Callable[[], keras.Model], dim: int, tmp_path: Any
) -> None:
    model = make()
    expected = as_numpy(Truncate(dim)(split(model)[0](X)))
    embed = embedder(model, dim)
    np.testing.assert_allclose(as_numpy(embed(X)), expected, rtol=1e-6, atol=1e-7)
    before = [as_numpy(weight) for weight in model.weights]
    embed.set_weights([2 * weight for weight in embed.get_weights()])
    for weight, now in zip(before, model.weights, strict=True):
        np.testing.assert_array_equal(weight, as_numpy(now))
    embed.save(tmp_path / "embed.keras")
    loaded = keras.saving.load_model(tmp_path / "embed.keras")
    np.testing.assert_allclose(as_numpy(loaded(X)), expected, rtol=1e-6, atol=1e-7)


def test_an_embedder_of_either_tower() -> None:
    query, item = backbone(), keras.Sequential([keras.Input((3,)), layers.Dense(8)])
    model = MatryoshkaEncoder(query, item)
    expected = as_numpy(Truncate(4)(item(X[:, :3])))
    embed = embedder(model, 4, other_tower=True)
    np.testing.assert_allclose(as_numpy(embed(X[:, :3])), expected, rtol=1e-6)


@keras.saving.register_keras_serializable(package="tests")
class Twofold(MatryoshkaEncoder):
    """An encoder with a call of its own."""

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        return 2 * super().call(inputs, training=training)


def towers(kind: type[MatryoshkaEncoder] = MatryoshkaEncoder) -> MatryoshkaEncoder:
    item = keras.Sequential([keras.Input((5,)), layers.Dense(8)])
    return kind(backbone(), item, name="pair")


TOWERS_WITHIN: dict[str, tuple[Callable[[], keras.Model], str]] = {
    "sequential": (lambda: sequence(towers()), "Sequential 'sequential"),
    "functional": (lambda: around(towers()), "Functional 'around'"),
    "a call of its own": (lambda: towers(Twofold), "Twofold 'pair'"),
}


@pytest.mark.parametrize("within", TOWERS_WITHIN)
def test_what_goes_on_from_one_of_two_towers_has_no_gallery(within: str) -> None:
    make, received = TOWERS_WITHIN[within]
    model, y = make(), np.arange(12) % 2
    text = (
        "Galleries go through the other tower of a MatryoshkaEncoder as through the first. "
        rf"Received: {received}\w*'?, which goes on from the first tower of 'pair' alone. "
        "Put into each tower what comes before and after it"
    )
    assert split(model) == (model, None)
    with pytest.raises(ValueError, match=text):
        split(model, other_tower=True)
    with pytest.raises(ValueError, match=text):
        embedder(model, 4, other_tower=True)
    with pytest.raises(ValueError, match=text):
        evaluate(model, X, y, gallery=(X, y), dims=(4, 8), k=2, verbose=0)


def test_a_head_on_one_of_two_towers_is_a_classifier() -> None:
    model = MatryoshkaClassifier(towers().tower, MatryoshkaHead(NUM_CLASSES, dims=DIMS))
    assert split(model, other_tower=True)[0] is model.backbone
    inputs = keras.Input((5,))
    head = MatryoshkaHead(NUM_CLASSES, dims=DIMS)
    fine_tuned = keras.Model(inputs, head(towers()(inputs)))
    assert split(fine_tuned, other_tower=True)[1] is head


@pytest.mark.parametrize("make", [unbuilt_classifier, unbuilt_sequential])
def test_an_embedder_needs_a_built_model(make: Callable[[], keras.Model]) -> None:
    with pytest.raises(ValueError, match="A model must be built before a part of it is taken"):
        embedder(make(), 4)


@pytest.mark.parametrize(("dim", "text"), [(0, "increasing positive"), (9, "must not exceed")])
def test_an_embedder_is_no_wider_than_the_features(dim: int, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        embedder(classifier(), dim)


@pytest.mark.filterwarnings("ignore")  # of TensorFlow, about its own interpreter
@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="needs litert-torch elsewhere")
def test_an_embedder_becomes_litert(tmp_path: Any) -> None:
    import tensorflow as tf

    model = classifier()
    embedder(model, 4).export(tmp_path / "embed.tflite", format="litert", verbose=False)
    interpreter = tf.lite.Interpreter(model_path=str(tmp_path / "embed.tflite"))
    index = interpreter.get_input_details()[0]["index"]
    interpreter.resize_tensor_input(index, X.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(index, X)
    interpreter.invoke()
    answer = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    expected = as_numpy(Truncate(4)(model.backbone(X)))
    np.testing.assert_allclose(answer, expected, rtol=1e-5, atol=1e-6)


def test_what_comes_before_stays_and_what_comes_after_moves() -> None:
    names = ("first", "second", "third")
    body = keras.Sequential([keras.Input((5,)), *(layers.Dense(8, name=n) for n in names)])
    body.trainable = False
    freeze_before(body, "second")
    assert [layer.trainable for layer in body.layers] == [False, True, True]
    before = [as_numpy(w) for w in body.weights]
    classifier(body).fit(X, Y, verbose=0)
    moved = [not np.array_equal(as_numpy(w), b) for w, b in zip(body.weights, before, strict=True)]
    assert moved == [False, False, True, True, True, True]


def test_frozen_batch_statistics_stay() -> None:
    body = keras.Sequential(
        [
            keras.Input((5,)),
            layers.BatchNormalization(name="early"),
            layers.Dense(8, name="late"),
            layers.BatchNormalization(name="last"),
        ]
    )
    freeze_before(body, "late")
    before = [as_numpy(body.get_layer(name).moving_mean) for name in ("early", "last")]
    classifier(body).fit(X, Y, verbose=0)
    after = [as_numpy(body.get_layer(name).moving_mean) for name in ("early", "last")]
    assert np.array_equal(after[0], before[0])
    assert not np.array_equal(after[1], before[1])


def test_the_first_layer_freezes_nothing() -> None:
    body = keras.Sequential([keras.Input((5,)), layers.Dense(8, name="first")])
    freeze_before(body, "first")
    assert len(body.trainable_weights) == 2


def test_a_layer_that_is_not_there_is_refused() -> None:
    body = keras.Sequential([keras.Input((5,)), layers.Dense(8, name="first")], name="body")
    sentence = (
        "layer must be the name of one of the backbone's layers. "
        "Received: layer='block5' for 'body', whose last layers are ['first']. "
        "Print [layer.name for layer in backbone.layers]."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        freeze_before(body, "block5")


def test_a_layer_within_another_model_is_refused_with_the_line_that_freezes_it() -> None:
    body = keras.Sequential([keras.Input((5,)), layers.Dense(8, name="first")], name="body")
    model = keras.Sequential([keras.Input((5,)), layers.Rescaling(0.5), body], name="scaled")
    sentence = (
        "Layers are frozen in the order of the model that has them. "
        "Received: layer='first' for 'scaled', within which 'body' has it. "
        "Give that model: freeze_before(model.get_layer('body'), 'first')."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        freeze_before(model, "first")
    freeze_before(model.get_layer("body"), "first")


class Twice(MatryoshkaHead):
    """A head with a call of its own."""

    def call(self, features: Any, training: bool | None = None) -> Any:
        return 2 * super().call(features, training=training)


def test_a_head_with_a_call_of_its_own_is_not_read_by_its_kernels() -> None:
    model = MatryoshkaClassifier(backbone(), Twice(3, dims=(4, 8), name="twice"))
    text = (
        r"A head is cut, judged and served by its kernels and biases\. Received: Twice 'twice', "
        r"which computes its logits in a way of its own\. Do that in the backbone"
    )
    with pytest.raises(ValueError, match=text):
        cut(model, 4)
    with pytest.raises(ValueError, match=text):
        evaluate(model, X, np.arange(12) % 3, verbose=0)
