"""The measures of a head, beside scikit-learn's on handwritten digits."""

from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.metrics import top_k_accuracy_score

from keras_mrl.evaluation import expected_calibration_error, score_head
from tests.helpers.laws import exactly

RNG = np.random.default_rng(0)
DIGITS = load_digits()
FEATURES = (DIGITS.data + RNG.normal(size=DIGITS.data.shape, scale=1)).astype(np.float32)


def test_a_head_is_scored_as_scikit_learn_does() -> None:
    kernel, bias = RNG.normal(size=(32, 10)) / 50, RNG.normal(size=10)
    logits = FEATURES[:, :32] @ kernel.astype(np.float32) + bias
    found = score_head(FEATURES, DIGITS.target, kernel, bias)
    assert found["top1"] == pytest.approx((logits.argmax(1) == DIGITS.target).mean())
    assert found["top5"] == pytest.approx(top_k_accuracy_score(DIGITS.target, logits, k=5))
    assert found["ece"] == pytest.approx(
        expected_calibration_error(logits, DIGITS.target), abs=1e-6
    )


@pytest.mark.parametrize(("classes", "top5"), [(20, 0.25), (5, 1.0), (1, 1.0)])
def test_of_equal_logits_the_first_class_is_likelier(classes: int, top5: float) -> None:
    labels = np.arange(classes)
    found = score_head(np.ones((classes, 2)), labels, np.zeros((2, classes)), None)
    assert found["top1"] == 1 / classes  # argmax says class 0 of every row
    assert found["top5"] == top5  # and the next four come after it


def test_top_ranks_are_those_of_a_stable_sort() -> None:
    """Small integers: exact products, and many ties."""
    features = RNG.integers(-1, 2, (3000, 3)).astype(np.float32)
    kernel, labels = RNG.integers(-1, 2, (3, 12)), RNG.integers(0, 12, 3000)
    order = np.argsort(-(features @ kernel), axis=1, kind="stable")
    found = score_head(features, labels, kernel, None)
    assert found["top1"] == np.mean(order[:, 0] == labels)
    assert found["top5"] == np.mean((order[:, :5] == labels[:, None]).any(axis=1))


def test_a_column_of_labels_is_one_per_row() -> None:
    kernel = RNG.normal(size=(32, 10))
    column = score_head(FEATURES, DIGITS.target[:, None], kernel, None)
    assert column == score_head(FEATURES, DIGITS.target, kernel, None)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("which", ["kernel", "bias"])
def test_a_head_is_finite(which: str, value: float) -> None:
    kernel, bias = np.zeros((2, 3)), np.zeros(3)
    (kernel if which == "kernel" else bias)[..., 1] = value
    sentence = (
        "kernel and bias must be finite. "
        "Received: NaN or infinity. Train the head to a finite loss."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        score_head(np.ones((4, 2)), [0, 1, 2, 0], kernel, bias)


def test_logits_are_finite() -> None:
    features = np.array([[1, 1], [3e38, 3e38]], np.float32)
    sentence = (
        "logits must be finite. Received: NaN or infinity in 1 of 2 rows. "
        "Scale the features, or train the head to a finite loss."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        score_head(features, [0, 1], np.full((2, 3), 9.0), None)


@pytest.mark.parametrize(
    ("kernel", "bias", "shapes"),
    [
        (np.ones(2), None, "kernel of shape (2,), bias of shape (2,)"),
        (np.ones((2, 0)), None, "kernel of shape (2, 0), bias of shape (0,)"),
        (3.0, None, "kernel of shape (), bias of shape ()"),
        (np.ones((2, 3)), np.ones(2), "kernel of shape (2, 3), bias of shape (2,)"),
        (np.ones((2, 3)), np.ones((3, 1)), "kernel of shape (2, 3), bias of shape (3, 1)"),
    ],
)
def test_a_head_is_a_matrix_and_a_vector(kernel: Any, bias: Any, shapes: str) -> None:
    sentence = (
        "kernel must be (dim, num_classes), and bias (num_classes,) or None. "
        f"Received: {shapes}. Give what head.weights_at(dim) returns."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        score_head(np.ones((2, 2)), [0, 1], kernel, bias)
