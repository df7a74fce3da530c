"""Perplexity counts tokens: not rows, not what fills rows up."""

import keras
import numpy as np
import pytest

from keras_mrl import MatryoshkaHead, MatryoshkaMetric, Perplexity
from tests.helpers.language_models import DIMS

pytestmark = pytest.mark.backend

RANDOM = np.random.default_rng(0)
LOGITS = RANDOM.normal(size=(4, 5, 7)).astype("float32")
LABELS = RANDOM.integers(0, 7, size=(4, 5))
WEIGHTS = RANDOM.uniform(0.5, 2, size=(4, 5)).astype("float32")


def reference(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> float:
    """In float64."""
    scores = logits.astype("float64")
    log = scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))
    of_label = np.take_along_axis(log, np.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    return float(np.exp(-(of_label * weights).sum() / weights.sum()))


def test_it_is_the_exponential_of_the_mean_over_all_batches() -> None:
    metric = Perplexity()
    for rows in (slice(0, 1), slice(1, 4)):
        metric.update_state(LABELS[rows], LOGITS[rows])
    expected = reference(LOGITS, LABELS, np.ones(LABELS.shape))
    assert float(metric.result()) == pytest.approx(expected, rel=1e-5)
    metric.reset_state()
    metric.update_state(LABELS[:1], LOGITS[:1])
    assert float(metric.result()) == pytest.approx(
        reference(LOGITS[:1], LABELS[:1], np.ones((1, 5))), rel=1e-5
    )


def test_ignored_labels_do_not_count_whatever_their_logits() -> None:
    ignored = LABELS.copy()
    ignored[0, 1:] = ignored[2, 3] = -1
    broken = LOGITS.copy()
    broken[0, 1:] = np.nan
    metric = Perplexity(ignore_class=-1)
    metric.update_state(ignored, broken)
    expected = reference(LOGITS, ignored, (ignored >= 0).astype("float64"))
    assert float(metric.result()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("shape", [(4,), (4, 5)], ids=["rows", "tokens"])
def test_sample_weights_weigh(shape: tuple[int, ...]) -> None:
    weights = WEIGHTS[:, 0] if shape == (4,) else WEIGHTS
    metric = Perplexity()
    metric.update_state(LABELS, LOGITS, sample_weight=weights)
    spread = np.broadcast_to(weights.reshape(*shape, *(1,) * (2 - len(shape))), (4, 5))
    assert float(metric.result()) == pytest.approx(reference(LOGITS, LABELS, spread), rel=1e-5)


def test_labels_may_come_as_a_column() -> None:
    metric = Perplexity()
    metric.update_state(LABELS[:, :1], LOGITS[:, 0])
    expected = reference(LOGITS[:, 0], LABELS[:, 0], np.ones(4))
    assert float(metric.result()) == pytest.approx(expected, rel=1e-5)


def test_masked_positions_do_not_count_at_any_dim() -> None:
    """Keras masks the sum that an Embedding with mask_zero begins."""
    tokens = np.array([[1, 2, 3, 0, 0], [4, 5, 0, 0, 0]])
    labels = np.array([[2, 3, 1, 6, 6], [5, 1, 6, 6, 6]])
    inputs = keras.Input((5,), dtype="int32")
    embedded = keras.layers.Embedding(7, 8, mask_zero=True)(inputs)

    model = keras.Model(inputs, MatryoshkaHead(7, DIMS)(embedded))
    logits = keras.ops.convert_to_numpy(model(tokens))
    metric = MatryoshkaMetric(Perplexity(), DIMS)
    metric.update_state(labels, model(tokens))
    for index, dim in enumerate(DIMS):
        expected = reference(logits[:, :, index], labels, (tokens > 0).astype("float64"))
        received = float(metric.result()[f"perplexity_{dim}"])
        assert received == pytest.approx(expected, rel=1e-5)


def test_half_precision_logits_are_summed_in_float32() -> None:
    metric = Perplexity()
    low = keras.ops.cast(LOGITS, "bfloat16")
    metric.update_state(LABELS, low)
    exact = np.asarray(keras.ops.convert_to_numpy(keras.ops.cast(low, "float32")))
    expected = reference(exact, LABELS, np.ones(LABELS.shape))
    assert float(metric.result()) == pytest.approx(expected, rel=1e-5)
