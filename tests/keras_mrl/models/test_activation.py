"""What a head's outputs are, as the loss says."""

from typing import Any

import keras
import pytest

from keras_mrl import MatryoshkaHead, MatryoshkaLoss
from keras_mrl.models.activation import activation_of, check_activation

losses = keras.losses


def model_of(loss: Any = None) -> keras.Model:
    features = keras.Input((8,))
    model = keras.Model(features, MatryoshkaHead(3, dims=(4, 8))(features), name="says")
    if loss is not None:
        model.compile(loss=loss)
    return model


OF_LOSS: list[tuple[str | None, Any]] = [
    ("softmax", losses.SparseCategoricalCrossentropy(from_logits=True)),
    ("softmax", losses.CategoricalCrossentropy(from_logits=True)),
    ("softmax", losses.CategoricalFocalCrossentropy(from_logits=True)),
    ("softmax", losses.CategoricalHinge()),
    ("sigmoid", losses.BinaryCrossentropy(from_logits=True)),
    ("sigmoid", losses.BinaryFocalCrossentropy(from_logits=True)),
    ("none", losses.MeanSquaredError()),
    ("none", losses.MeanAbsoluteError()),
    ("none", losses.Huber()),
    ("none", losses.LogCosh()),
    ("none", losses.Poisson()),
    (None, losses.Dice()),
]


@pytest.mark.parametrize(("expected", "loss"), OF_LOSS, ids=lambda value: type(value).__name__)
def test_the_loss_says_what_the_outputs_are(expected: str | None, loss: Any) -> None:
    assert activation_of(model_of(MatryoshkaLoss(loss))) == expected
    assert activation_of(model_of(loss)) == expected  # of one dim


def test_losses_by_name_and_by_function_say_it_too() -> None:
    for loss in (
        "mse",
        "mean_absolute_error",
        "huber",
        "poisson",
        keras.losses.mean_squared_error,
    ):
        assert activation_of(model_of(loss)) == "none"
    assert activation_of(model_of(lambda y, p: p - y)) is None
    assert activation_of(model_of()) is None


@pytest.mark.parametrize("loss", [losses.BinaryCrossentropy(), losses.CategoricalCrossentropy()])
def test_a_loss_of_probabilities_does_not_fit_a_head(loss: Any) -> None:
    text = (
        r"\AA MatryoshkaHead gives logits, and a loss with from_logits=False takes probabilities. "
        rf"Received: {type(loss).__name__} with from_logits=False for model 'says', which ends in "
        r"the head. Train it with from_logits=True, or name what its outputs are: "
        r"activation='sigmoid'.\Z"
    )
    with pytest.raises(ValueError, match=text):
        activation_of(model_of(MatryoshkaLoss(loss)))


@pytest.mark.parametrize("loss", ["hinge", losses.SquaredHinge(), MatryoshkaLoss(losses.Hinge())])
def test_a_hinge_loss_says_only_a_sign(loss: Any) -> None:
    text = (
        r"\AA hinge loss trains the sign of each output, not a probability or a value. "
        r"Received: (Squared)?Hinge for model 'says'. Name what its outputs are: "
        r"activation='sigmoid' for the classes, those above 0.5, 'none' for the outputs.\Z"
    )
    with pytest.raises(ValueError, match=text):
        activation_of(model_of(loss))


def test_no_other_word_is_an_activation() -> None:
    with pytest.raises(ValueError, match=r"Received: activation='linear'. Give one of them"):
        check_activation("linear")
