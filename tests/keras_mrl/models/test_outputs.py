"""The nested head is found wherever it ends a model or an output, or is refused by name."""

import re
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

from keras_mrl import MatryoshkaEncoder, MatryoshkaHead, MatryoshkaLoss, cut, split
from keras_mrl.models.activation import activation_of
from keras_mrl.models.outputs import one_output
from tests.helpers.laws import exactly
from tests.helpers.nested_models import NESTED, around, own, sequence, two_heads
from tests.helpers.small_models import DIMS, NUM_CLASSES, X, as_numpy, classifier, functional

pytestmark = pytest.mark.backend


@pytest.mark.parametrize("make", NESTED.values(), ids=NESTED)
def test_wherever_the_head_is_the_parts_and_the_cuts_are_the_model(
    make: Callable[[], keras.Model],
) -> None:
    model = make()
    logits = as_numpy(model(X))
    body, head = split(model)
    assert head is not None
    assert head in model._flatten_layers()
    assert body.count_params() + head.count_params() == model.count_params()
    np.testing.assert_allclose(as_numpy(head(body(X))), logits, rtol=1e-5, atol=1e-6)
    for m, dim in enumerate(DIMS):
        plain = cut(model, dim)
        np.testing.assert_allclose(as_numpy(plain(X)), logits[:, m], rtol=1e-5, atol=1e-6)
        assert MatryoshkaHead not in {type(layer) for layer in plain._flatten_layers()}


def functional_softmax(model: keras.Model) -> keras.Model:
    inputs = keras.Input((5,))
    return keras.Model(inputs, layers.Softmax(name="shares")(model(inputs)), name="outer")


def softmax_operation(model: keras.Model) -> keras.Model:
    inputs = keras.Input((5,))
    return keras.Model(inputs, keras.ops.softmax(model(inputs)), name="outer")


def second_of_two(model: keras.Model) -> keras.Model:
    inputs = keras.Input((5,))
    logits = model(inputs)
    added = layers.Add(name="shares")([keras.ops.zeros_like(logits), logits])
    return keras.Model(inputs, added, name="outer")


LATER: dict[str, Callable[[], keras.Model]] = {
    "softmax": lambda: functional_softmax(functional()),
    "softmax over a classifier": lambda: functional_softmax(classifier()),
    "operation": lambda: softmax_operation(classifier()),
    "sequence": lambda: sequence(classifier(), layers.Softmax(name="shares")),
    "second of two inputs": lambda: second_of_two(classifier()),
}


@pytest.mark.parametrize("make", LATER.values(), ids=LATER)
def test_what_comes_after_the_head_is_refused_with_a_line_that_works(
    make: Callable[[], keras.Model],
) -> None:
    model = make()
    with pytest.raises(ValueError, match="ends in its MatryoshkaHead, whose logits are") as caught:
        split(model)
    line = re.search(r"Leave it out: model = (.*)\.\Z", str(caught.value))
    assert line is not None
    mended = eval(line[1], {"keras": keras, "model": model})
    head = split(mended)[1]
    assert head is not None
    assert as_numpy(mended(X)).shape == (len(X), len(DIMS), NUM_CLASSES)


def test_the_sentence_about_what_comes_after_the_head() -> None:
    sentence = (
        "A nested model ends in its MatryoshkaHead, whose logits are cut, judged and served. "
        "Received: Functional 'outer', where 'shares' comes after the head. Leave it out: "
        "model = keras.Model(model.input, model.get_layer('shares').input)."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        split(functional_softmax(functional()))
    within = (
        "A nested model ends in its MatryoshkaHead, whose logits are cut, judged and served. "
        "Received: Functional 'around', where 'outer' does not end in its head. "
        "Let that return what the head returns, and no more."
    )
    with pytest.raises(ValueError, match=exactly(within)):
        split(around(functional_softmax(functional())))


class After(keras.Model):
    """A class of a user's in which a layer comes after the head."""

    def __init__(self) -> None:
        super().__init__(name="after")
        self.inner = functional()
        self.shares = layers.Softmax(name="shares")

    def call(self, inputs: Any) -> Any:
        return self.shares(self.inner(inputs))


class Weights(keras.Model):
    """A class of a user's with a weight outside of layers, and a head."""

    def __init__(self) -> None:
        super().__init__(name="weights")
        self.inner = functional()
        self.scale = self.add_weight(shape=(), initializer="ones")

    def call(self, inputs: Any) -> Any:
        return self.inner(inputs * self.scale)


class Untraceable(keras.Model):
    """A class of a user's whose call needs values."""

    def __init__(self) -> None:
        super().__init__(name="untraceable")
        self.inner = functional()

    def call(self, inputs: Any) -> Any:
        if isinstance(inputs, keras.KerasTensor):
            raise TypeError("no value")
        return self.inner(inputs)


def test_a_class_of_the_users_own_that_hides_its_head_is_refused() -> None:
    sentence = (
        "A nested model ends in its MatryoshkaHead, whose logits are cut, judged and served. "
        "Received: After 'after', where 'shares' comes after the head. "
        "Let the model return what the head returns, and no more."
    )
    after = After()
    after(X)
    with pytest.raises(ValueError, match=exactly(sentence)):
        split(after)
    rule = "The head of a class of your own is found by its call on symbolic inputs. Received: "
    remedy = (
        " Use layers and keras.ops there, or join its parts: MatryoshkaClassifier(backbone, head)."
    )
    for model, received in (
        (Weights(), "Weights 'weights', which keeps weights outside of layers."),
        (Untraceable(), "Untraceable 'untraceable', whose call raised TypeError: no value."),
    ):
        model(X)
        with pytest.raises(ValueError, match=exactly(rule + received + remedy)):
            split(model)


def test_a_model_with_weights_outside_of_layers_is_refused_inside_another_too() -> None:
    inner = Weights()
    inner(X)
    sentence = (
        "A nested model ends in its MatryoshkaHead, whose logits are cut, judged and served. "
        "Received: Functional 'around', where 'weights' does not end in its head. "
        "Let that return what the head returns, and no more."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        split(around(inner))


def test_a_class_of_the_users_own_must_be_built() -> None:
    with pytest.raises(ValueError, match="A model must be built before a part of it is taken"):
        split(type(own())())


def test_one_of_several_outputs_is_split_and_cut() -> None:
    model = two_heads(aux=layers.Dense(1))
    logits = {name: as_numpy(tensor) for name, tensor in model(X).items()}
    for name, expected in logits.items():
        body, head = split(model, name)
        if head is None:
            np.testing.assert_allclose(as_numpy(body(X)), expected, rtol=1e-5, atol=1e-6)
        else:
            np.testing.assert_allclose(as_numpy(head(body(X))), expected, rtol=1e-5, atol=1e-6)
            plain = as_numpy(cut(model, 4, output=name)(X))
            np.testing.assert_allclose(plain, expected[:, 1], rtol=1e-5, atol=1e-6)
    assert split(model, "aux")[1] is None


def test_all_of_several_outputs_are_cut_over_one_backbone() -> None:
    model = two_heads(aux=layers.Dense(1))
    logits = {name: as_numpy(tensor) for name, tensor in model(X).items()}
    plain = cut(model, 4)
    received = {name: as_numpy(tensor) for name, tensor in plain(X).items()}
    assert received.keys() == logits.keys()
    np.testing.assert_allclose(received["aux"], logits["aux"], rtol=1e-5, atol=1e-6)
    for name in ("digit", "odd"):
        np.testing.assert_allclose(received[name], logits[name][:, 1], rtol=1e-5, atol=1e-6)
    # Dense(8), Dense(8), Dense(1), and the heads of 3 and 2 classes at 4 dims.
    assert plain.count_params() == 48 + 72 + 9 + 15 + 10


def test_outputs_in_a_list_have_the_names_that_keras_logs() -> None:
    inputs = keras.Input((5,))
    heads = [MatryoshkaHead(3, dims=DIMS, name=name) for name in ("digit", "odd")]
    model = keras.Model(inputs, [head(layers.Dense(8)(inputs)) for head in heads])
    assert split(model, "odd")[1] is heads[1]
    nested = around(two_heads())
    assert split(nested, "odd")[1] is not None


OUTPUTS: tuple[tuple[Callable[[], object], str], ...] = (
    (
        lambda: split(two_heads()),
        "output must name one of the outputs of the model. Received: no output for 'two', which "
        "has 'digit', 'odd'. Give for example output='digit'.",
    ),
    (
        lambda: cut(two_heads(), 4, output="even"),
        "output must name one of the outputs of the model. Received: output='even', which has "
        "'digit', 'odd'. Give for example output='digit'.",
    ),
    (
        lambda: cut(two_heads(aux=layers.Dense(1)), 4, output="aux"),
        "Only a model that ends in a MatryoshkaHead can be cut to a dim. Received: Functional "
        "'two'. Use MatryoshkaClassifier(backbone, MatryoshkaHead(num_classes)).",
    ),
    (
        lambda: cut(two_heads(), 3),
        "dim must be one of the dims of the head. Received: dim=3 for dims=(2, 4, 8). "
        "Choose one of those.",
    ),
)


@pytest.mark.parametrize(("call", "sentence"), OUTPUTS)
def test_an_output_that_is_not_there_is_refused(call: Callable[[], object], sentence: str) -> None:
    with pytest.raises(ValueError, match=exactly(sentence)):
        call()


def test_one_output_needs_no_name() -> None:
    assert split(functional(), None)[1] is not None
    encoder = MatryoshkaEncoder(keras.Sequential([keras.Input((5,)), layers.Dense(8)]))
    with pytest.raises(ValueError, match="output names one of several outputs"):
        split(encoder, "digit")


def test_outputs_of_one_name_are_refused() -> None:
    inputs = keras.Input((5,))
    body, head = layers.Dense(8), MatryoshkaHead(3, dims=DIMS, name="shared")
    logits = [head(body(inputs)), head(body(inputs / 2))]
    model = keras.Model(inputs, logits, name="twice")
    sentence = (
        "Outputs of a model with a nested head must have names of their own. Received: 'twice', "
        "whose outputs are ['shared', 'shared']. Name them by a dict: "
        "keras.Model(model.input, dict(zip(('one', 'other'), model.outputs)))."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        split(model, "shared")
    named = keras.Model(model.input, dict(zip(("one", "other"), model.outputs, strict=True)))
    assert split(named, "other")[1] is head


@pytest.mark.parametrize("names", [("odd", "digit"), ("digit", "odd")])
def test_a_list_of_losses_is_of_outputs_as_keras_takes_them(names: tuple[str, str]) -> None:
    """Keras takes the outputs of a dict in the order of their names, however they were written."""
    inputs = keras.Input((5,))
    body = layers.Dense(8)(inputs)
    heads = {name: MatryoshkaHead(3, dims=DIMS)(body) for name in names}
    model = keras.Model(inputs, heads)
    several = keras.losses.BinaryCrossentropy(from_logits=True)
    one = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", [MatryoshkaLoss(several), MatryoshkaLoss(one)])
    y = {"digit": np.eye(3)[np.arange(12) % 3], "odd": np.arange(12) % 2}
    model.fit(X, y, verbose=0)  # which takes labels of no other form
    activations = {name: activation_of(one_output(model, name)) for name in names}
    assert activations == {"digit": "sigmoid", "odd": "softmax"}
