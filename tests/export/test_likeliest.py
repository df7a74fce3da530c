"""The likeliest classes are those of `top_k`, at any number of classes."""

import math

import numpy as np
import pytest
import tensorflow as tf

from keras_mrl_export.likeliest import Likeliest, run_length
from keras_mrl_serving.cascade.confidence import CONFIDENCES, confidence_of
from tests.helpers.export_models import probabilities

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("classes", [1, 7, 100, 4095, 4096, 4097, 5000, 10_000, 100_000])
@pytest.mark.parametrize("ties", [False, True])
def test_they_are_those_of_top_k(classes: int, ties: bool) -> None:
    logits = RNG.normal(size=(9, classes), scale=2).astype(np.float32)
    if ties:
        logits = np.round(logits)
    likeliest = Likeliest.of_logits(tf.constant(logits), 1.0)
    rows = np.array([8, 0, 3, 3], np.int32)
    shares = tf.nn.softmax(logits)
    np.testing.assert_array_equal(
        likeliest.confidence("max_probability"), tf.reduce_max(shares, -1)
    )
    for k in (1, 5, 20):
        if k > classes:
            continue
        best, ids = likeliest.best(tf.constant(rows), k)
        expected = tf.math.top_k(tf.gather(shares, rows), k)
        np.testing.assert_array_equal(ids, expected.indices)
        np.testing.assert_array_equal(best, expected.values)


def test_a_temperature_divides_the_logits() -> None:
    logits = RNG.normal(size=(3, 5000)).astype(np.float32)
    confidence = Likeliest.of_logits(tf.constant(logits), 0.25).confidence("max_probability")
    np.testing.assert_allclose(confidence, probabilities(logits, 0.25).max(-1), rtol=1e-5)


@pytest.mark.parametrize("classes", [1, 2, 100, 10_000])
@pytest.mark.parametrize("measure", CONFIDENCES)
def test_confidences_are_those_of_numpy(classes: int, measure: str) -> None:
    logits = RNG.normal(size=(6, classes), scale=3).astype(np.float32)
    logits[0, 0] = 500  # as sure as can be: 0 log 0 is 0
    confidence = Likeliest.of_logits(tf.constant(logits), 0.5).confidence(measure)
    np.testing.assert_allclose(
        confidence, confidence_of(measure, logits, 0.5), rtol=1e-5, atol=1e-6
    )


def test_of_no_rows_there_are_none() -> None:
    likeliest = Likeliest(tf.zeros((0, 5000)))
    best, ids = likeliest.best(tf.zeros((0,), tf.int32), 3)
    assert best.shape == ids.shape == (0, 3)
    assert likeliest.confidence("max_probability").shape == (0,)


@pytest.mark.parametrize(
    ("classes", "run"),
    [(1000, 1), (4095, 1), (4096, 64), (4099, 1), (10_000, 100), (100_000, 320)],
)
def test_runs_are_near_the_root(classes: int, run: int) -> None:
    length = run_length(classes)
    assert classes % length == 0
    assert length == run or abs(np.log(length / np.sqrt(classes))) < np.log(4)
    assert (length == 1) == (run == 1)


def test_as_many_as_there_are_runs() -> None:
    logits = RNG.normal(size=(2, 4096)).astype(np.float32)
    _, ids = Likeliest.of_logits(tf.constant(logits), 1.0).best(tf.range(2), 64)
    np.testing.assert_array_equal(ids, tf.math.top_k(logits, 64).indices)


@pytest.mark.parametrize("classes", [150, 5000])
def test_entropies_of_graph_and_numpy_are_as_near_as_float32_is(classes: int) -> None:
    """So rows of one entropy, to a few units in the last place, may leave at different stages."""
    logits = np.random.default_rng(0).normal(size=(200, classes)).astype(np.float32)
    shares = np.exp(logits.astype(np.float64) / 1.25)
    shares /= shares.sum(axis=-1, keepdims=True)
    exact = (shares * np.log(shares)).sum(axis=-1)
    graph = Likeliest.of_logits(tf.constant(logits), tf.constant(1.25)).confidence("entropy")
    for made in (graph.numpy(), confidence_of("entropy", logits, 1.25)):
        np.testing.assert_allclose(made, exact, atol=4 * np.spacing(np.float32(math.log(classes))))
