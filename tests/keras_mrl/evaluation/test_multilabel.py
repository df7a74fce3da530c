"""Average precision and F1 of rows with several classes: equal to scikit-learn's."""

from typing import Any

import numpy as np
import pytest
from sklearn import metrics

from keras_mrl.evaluation import score_multilabel


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("digits", [1, 6])  # one digit: many equal logits
def test_they_are_those_of_scikit_learn(seed: int, digits: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.random((40, 6)) < [0.5, 0.2, 0.9, 0.02, 0.5, 1.0]
    labels[0] = True  # scikit-learn warns of a class that no row has
    logits = np.round(rng.normal(size=labels.shape) + labels, digits).astype(np.float32)
    scores, chosen = score_multilabel(logits, labels), logits > 0
    for average in ("macro", "micro"):
        expected = metrics.average_precision_score(labels, logits, average=average)
        assert scores[f"ap_{average}"] == pytest.approx(expected, rel=1e-9)
        expected = metrics.f1_score(labels, chosen, average=average, zero_division=0)
        assert scores[f"f1_{average}"] == pytest.approx(expected, rel=1e-9)


def test_a_class_that_no_row_has_counts_zero() -> None:
    scores = score_multilabel([[2.0, -1.0], [-1.0, -1.0]], [[1, 0], [0, 0]])
    assert scores == {"ap_macro": 0.5, "ap_micro": 1.0, "f1_macro": 0.5, "f1_micro": 1.0}


def test_one_class_may_come_flat() -> None:
    logits = np.array([[1.0], [-1.0], [0.5]])
    assert score_multilabel(logits, [1, 0, 0]) == score_multilabel(logits, [[1], [0], [0]])


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        ([[1, 2], [0, 1]], "are 0 or 1 for each class. Received: 2 in 1 of 2 rows. Give one"),
        (
            [1, 0],
            r"Received: labels of shape \(2,\) for outputs \(2, 2\). Give them as in training",
        ),
        ([[1, 0]], r"Received: labels of shape \(1, 2\) for outputs \(2, 2\)"),
        ([[1, np.nan], [0, 1]], "labels must be finite numbers, one for each output of the head"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        score_multilabel(np.ones((2, 2)), labels)


def test_logits_must_be_finite() -> None:
    text = r"\Alogits must be finite. Received: NaN or infinity in 1 of 2 rows. Train the model"
    with pytest.raises(ValueError, match=text):
        score_multilabel([[np.nan, 1], [1, 1]], np.ones((2, 2)))
