from typing import Any

import numpy as np
import pytest

from keras_mrl.evaluation import expected_calibration_error
from tests.helpers.laws import exactly

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("bins", [1, 4, 15])
def test_the_calibration_error_is_its_loop(bins: int) -> None:
    logits = RNG.normal(size=(300, 5), scale=2)
    labels = RNG.integers(0, 5, 300)
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    total = 0.0
    for bin_ in range(bins):
        inside = [i for i in range(300) if bin_ / bins <= shares[i].max() < (bin_ + 1) / bins]
        if inside:
            right = np.mean([shares[i].argmax() == labels[i] for i in inside])
            sure = np.mean([shares[i].max() for i in inside])
            total += len(inside) / 300 * abs(right - sure)
    assert expected_calibration_error(logits, labels, bins) == pytest.approx(total, abs=1e-6)


def test_bins_are_an_integer_of_any_library() -> None:
    logits, labels = RNG.normal(size=(300, 5), scale=2), RNG.integers(0, 5, 300)
    expected = expected_calibration_error(logits, labels, 4)
    for bins in (np.int64(4), np.uint8(4)):
        found = expected_calibration_error(logits, labels, bins)  # type: ignore[arg-type]
        assert found == expected
        assert type(found) is float


@pytest.mark.parametrize("bins", [0, -1, 2.0, True, "15", None])
def test_other_bins_are_refused(bins: Any) -> None:
    sentence = f"bins must be a positive integer. Received: bins={bins!r}. Give for example 15."
    with pytest.raises(ValueError, match=exactly(sentence)):
        expected_calibration_error(np.zeros((2, 2)), [0, 1], bins)


def test_a_column_of_labels_is_one_per_row() -> None:
    logits, labels = RNG.normal(size=(300, 5), scale=2), RNG.integers(0, 5, 300)
    column = expected_calibration_error(logits, labels[:, None])
    assert column == expected_calibration_error(logits, labels)


@pytest.mark.parametrize(
    ("logits", "labels", "shapes"),
    [
        (3.0, [0, 1], "logits of shape () and labels of shape (2,)"),
        ([1.0, 2.0], [0, 1], "logits of shape (2,) and labels of shape (2,)"),
        (np.zeros((2, 3, 4)), [0, 1], "logits of shape (2, 3, 4) and labels of shape (2,)"),
        (np.zeros((2, 3)), [0], "logits of shape (2, 3) and labels of shape (1,)"),
        (np.zeros((2, 3)), 0, "logits of shape (2, 3) and labels of shape ()"),
        (np.zeros((2, 3)), np.eye(2, 3), "logits of shape (2, 3) and labels of shape (2, 3)"),
    ],
)
def test_logits_are_a_table_with_a_label_per_row(logits: Any, labels: Any, shapes: str) -> None:
    sentence = (
        f"logits must be (rows, num_classes) with one label per row. Received: {shapes}. "
        "Give what predict() returns at one dim, and class ids."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        expected_calibration_error(logits, labels)
