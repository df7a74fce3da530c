import sys
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from keras_mrl.evaluation import linear_probe
from tests.helpers.laws import exactly

PIXELS, DIGITS = load_digits(return_X_y=True)


@pytest.mark.parametrize("regularization", [1.0, 20.0])
def test_it_is_scikit_learns_logistic_regression_on_digits(regularization: float) -> None:
    regression = LogisticRegression(C=1 / regularization, max_iter=1000)
    expected = make_pipeline(StandardScaler(), regression).fit(PIXELS[:900], DIGITS[:900])
    probe = linear_probe(PIXELS[:900], DIGITS[:900], regularization)
    received = probe.predict(PIXELS[900:])
    np.testing.assert_array_equal(received, expected.predict(PIXELS[900:]))
    logits = probe.logits(PIXELS[900:])
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    np.testing.assert_allclose(shares, expected.predict_proba(PIXELS[900:]), atol=1e-9)
    assert (received == DIGITS[900:]).mean() > 0.9


def test_two_classes_have_two_logits() -> None:
    rows = DIGITS < 2
    expected = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    expected.fit(PIXELS[rows], DIGITS[rows])
    probe = linear_probe(PIXELS[rows], DIGITS[rows])
    assert probe.logits(PIXELS).shape == (len(PIXELS), 2)
    np.testing.assert_array_equal(probe.predict(PIXELS), expected.predict(PIXELS))


def test_labels_need_not_count_from_zero() -> None:
    probe = linear_probe(PIXELS[:300], DIGITS[:300] * 7 - 3)
    plain = linear_probe(PIXELS[:300], DIGITS[:300])
    assert probe.classes.tolist() == [7 * c - 3 for c in range(10)]
    np.testing.assert_array_equal(probe.predict(PIXELS), plain.predict(PIXELS) * 7 - 3)


def test_the_unit_of_a_feature_does_not_matter() -> None:
    scaled = PIXELS * np.geomspace(1e-3, 1e3, 64)
    plain = linear_probe(PIXELS[:300], DIGITS[:300]).predict(PIXELS)
    np.testing.assert_array_equal(linear_probe(scaled[:300], DIGITS[:300]).predict(scaled), plain)


@pytest.mark.parametrize("features", [np.ones(4), np.ones((0, 2)), np.full((4, 2), np.nan)])
def test_what_is_no_table_of_features_is_refused(features: Any) -> None:
    sentence = (
        "features must be finite numbers (rows, width) with at least one row. "
        f"Received: float64 of shape {features.shape}. "
        "Give what backbone.predict(inputs) returns."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        linear_probe(features, [0, 1, 0, 1])


@pytest.mark.parametrize("features", [np.ones(64), np.ones((0, 64)), np.full((4, 64), np.nan)])
def test_a_probe_reads_tables_alone(features: Any) -> None:
    probe = linear_probe(PIXELS[:100], DIGITS[:100])
    sentence = (
        "features must be finite numbers (rows, width) with at least one row. "
        f"Received: float64 of shape {features.shape}. "
        "Give what backbone.predict(inputs) returns."
    )
    for ask in (probe.predict, probe.logits):
        with pytest.raises(ValueError, match=exactly(sentence)):
            ask(features)


@pytest.mark.parametrize("width", [5, 65])
def test_a_probe_reads_the_width_it_was_fitted_on(width: int) -> None:
    probe = linear_probe(PIXELS[:100], DIGITS[:100])
    sentence = (
        "Features must be as wide as those fitted. "
        f"Received: width {width}, fitted on 64. Embed with the same backbone."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        probe.predict(np.ones((3, width)))


def test_a_probe_prints_no_arrays() -> None:
    assert repr(linear_probe(PIXELS[:100], DIGITS[:100])) == "LinearProbe()"


@pytest.mark.parametrize("regularization", [0, -1.0, float("inf"), float("nan"), "1", None, [1.0]])
def test_a_regularization_is_above_zero(regularization: Any) -> None:
    sentence = (
        "regularization must be a finite number above 0. "
        f"Received: regularization={regularization!r}. "
        "Give a small one, 1e-6, to have next to none."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        linear_probe(PIXELS[:100], DIGITS[:100], regularization)


def test_a_regularization_may_be_a_number_of_any_library() -> None:
    expected = linear_probe(PIXELS[:100], DIGITS[:100], 2.0).kernel
    for regularization in (2, np.float32(2), np.int64(2)):
        found = linear_probe(PIXELS[:100], DIGITS[:100], regularization)  # type: ignore[arg-type]
        np.testing.assert_array_equal(found.kernel, expected)


def test_a_column_of_labels_is_one_per_row() -> None:
    column = linear_probe(PIXELS[:100], DIGITS[:100, None])
    np.testing.assert_array_equal(column.kernel, linear_probe(PIXELS[:100], DIGITS[:100]).kernel)


def test_one_class_is_refused() -> None:
    sentence = (
        "A linear probe tells classes apart. Received: 4 labels, all of them 5. "
        "Give rows of two classes or more."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        linear_probe(np.ones((4, 2)), [5, 5, 5, 5])


def test_one_hot_labels_are_refused() -> None:
    sentence = (
        "labels must hold one label per row of the features. "
        "Received: labels of shape (2, 2) for features of shape (2, 3). "
        "Give integer labels, not one-hot rows."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        linear_probe(np.ones((2, 3)), np.eye(2))


def test_without_scikit_learn_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    sentence = (
        "A linear probe is trained by scikit-learn. "
        "Received: import of sklearn.linear_model halted; None in sys.modules. "
        "Install it: pip install 'keras-mrl[evaluate]'."
    )
    with pytest.raises(ImportError, match=exactly(sentence)):
        linear_probe(PIXELS, DIGITS)
