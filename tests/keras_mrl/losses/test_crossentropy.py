"""Nested cross-entropy without logits: the float64 loop's values and gradients."""

from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

from keras_mrl import nested_crossentropy
from keras_mrl.losses import Teacher, first_boosted
from tests.helpers import reference
from tests.helpers.differentiate import value, value_and_gradient
from tests.helpers.laws import exactly

pytestmark = pytest.mark.backend

RANDOM = np.random.default_rng(0)
ROWS, WIDTH, CLASSES = 13, 9, 11
DIMS = (1, 3, 8)
X = RANDOM.normal(size=(ROWS, WIDTH)).astype("float32")
Y = RANDOM.integers(0, CLASSES, ROWS)
R = RANDOM.random(ROWS).astype("float32")
UNTIED = [RANDOM.normal(size=(dim, CLASSES)).astype("float32") for dim in DIMS]
BIASES = [RANDOM.normal(size=CLASSES).astype("float32") for _ in DIMS]
SHARES = RANDOM.dirichlet(np.ones(CLASSES), ROWS).astype("float32")


def parameters(tied: bool) -> tuple[list[Any], list[Any]]:
    return (UNTIED[-1:], BIASES[-1:]) if tied else (UNTIED, BIASES)


def fused(tied: bool, x: Any = X, labels: Any = Y, **arguments: Any) -> tuple[Any, list[Any]]:
    """The loss, and its gradient by features, kernels and biases."""
    kernels, biases = parameters(tied)

    def loss(features: Any, *rest: Any) -> Any:
        cut = len(kernels)
        more = {"row_weights": ops.convert_to_tensor(R)} | arguments
        return nested_crossentropy(
            features, rest[:cut], rest[cut:], ops.convert_to_tensor(labels), DIMS, **more
        ).loss

    return value_and_gradient(loss, [x, *kernels, *biases])


def loops(tied: bool, weights: Any, dtype: Any = np.float64) -> tuple[Any, list[Any]]:
    kernels, biases = parameters(tied)
    if tied:
        kernels, biases = reference.tie(kernels[0], biases[0], DIMS)
    losses = reference.nested_loss(X, kernels, biases, Y, weights, dtype)
    gradient = reference.nested_gradient(X, kernels, biases, Y, weights, R * ROWS, dtype)
    parts = reference.fold(gradient) if tied else (*gradient.kernels, *gradient.biases)
    return (losses * R.astype(dtype)).sum(), [gradient.features, *parts]


def near(received: Any, exact: Any, naive: Any) -> None:
    budget = reference.error_budget(np.asarray(exact), np.asarray(naive))
    np.testing.assert_allclose(received, exact, rtol=0, atol=budget)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("weights", "numbers", "chunk_rows"),
    [
        (first_boosted, (2, 1, 1), None),
        ((2, 0, 0.5), (2, 0, 0.5), 1),
        ((2, 0, 0.5), (2, 0, 0.5), 4),
    ],
    ids=["a function, at once", "row by row", "by chunks"],
)
def test_it_equals_the_float64_loop(
    tied: bool, weights: Any, numbers: Any, chunk_rows: int | None
) -> None:
    loss, gradient = fused(tied, weights=weights, chunk_rows=chunk_rows)
    exact, naive = loops(tied, numbers), loops(tied, numbers, np.float32)
    near(loss, exact[0], np.float32(naive[0]))
    for own, right, rough in zip(gradient, exact[1], naive[1], strict=True):
        near(own, right, rough)


@pytest.mark.parametrize(
    ("tied", "smoothing", "labels"),
    [(False, 0.2, Y), (True, 0.2, Y), (False, 0.0, SHARES), (True, 0.2, SHARES)],
    ids=["untied, integers", "tied, integers", "untied, shares", "tied, smoothed shares"],
)
def test_smoothing_and_shares_are_those_of_keras(tied: bool, smoothing: float, labels: Any) -> None:
    kernels, biases = parameters(tied)
    dense = labels if labels.ndim == 2 else np.eye(CLASSES, dtype="float32")[labels]

    def plain(features: Any, *rest: Any) -> Any:
        total: Any = 0.0
        for index, dim in enumerate(DIMS):
            owner = 0 if tied else index
            kernel, bias = rest[owner][:dim], rest[len(kernels) + owner]
            losses = keras.losses.categorical_crossentropy(
                ops.convert_to_tensor(dense),
                ops.matmul(features[:, :dim], kernel) + bias,
                from_logits=True,
                label_smoothing=smoothing,
            )
            total = total + ops.sum(losses * ops.convert_to_tensor(R))
        return total

    expected = value_and_gradient(plain, [X, *kernels, *biases])
    received = fused(tied, labels=labels, label_smoothing=smoothing, chunk_rows=5)
    np.testing.assert_allclose(received[0], expected[0], rtol=1e-5)
    for own, right in zip(received[1], expected[1], strict=True):
        np.testing.assert_allclose(own, right, rtol=0, atol=2e-5)


def rows_of(
    x: Any, kernels: Any, biases: Any, labels: Any = Y, **arguments: Any
) -> tuple[Any, Any, Any]:
    """Loss, losses and ranks, as NumPy."""
    return value(
        lambda x, kernels, biases, labels: tuple(
            nested_crossentropy(x, kernels, biases, labels, DIMS, **arguments)
        ),
        x,
        kernels,
        biases,
        labels,
    )


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("training", [False, True])
def test_losses_and_ranks_are_of_every_row_and_dim(tied: bool, training: bool) -> None:
    kernels, biases = parameters(tied)
    loss, losses, ranks = rows_of(X, kernels, biases, chunk_rows=4, training=training)
    for index, dim in enumerate(DIMS):
        owner = 0 if tied else index
        logits = X[:, :dim].astype(float) @ kernels[owner][:dim] + biases[owner]
        own = logits[np.arange(ROWS), Y]
        np.testing.assert_array_equal(ranks[:, index], (logits > own[:, None]).sum(axis=1))
        expected = np.log(np.exp(logits).sum(axis=1)) - own
        np.testing.assert_allclose(losses[:, index], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(loss, losses.sum(axis=1).mean(), rtol=1e-5)


def test_ties_are_broken_as_argmax_does() -> None:
    zeros = [np.zeros((dim, CLASSES), "float32") for dim in DIMS]
    _, _, ranks = rows_of(X, zeros, None)
    assert ((ranks == 0) == (Y == 0)[:, None]).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_summed_in_float32(dtype: str) -> None:
    def both(x: Any, kernels: Any, biases: Any) -> Any:
        half = [ops.cast(tensor, dtype) for tensor in (x, *kernels)]
        rounded = [ops.cast(tensor, "float32") for tensor in half]
        low, full = (
            nested_crossentropy(own[0], own[1:], biases, ops.convert_to_tensor(Y), DIMS).loss
            for own in (half, rounded)
        )
        assert keras.backend.standardize_dtype(low.dtype) == "float32"
        return low, full

    for tied in (False, True):
        low, full = value(both, X, *parameters(tied))
        np.testing.assert_allclose(low, full, rtol=1e-6)


def test_features_of_nan_make_loss_and_gradient_nan_and_rank_last() -> None:
    loss, gradient = fused(True, x=X * np.nan)
    assert np.isnan(loss)
    assert np.isnan(gradient[0][:, : DIMS[-1]]).all()
    _, _, ranks = rows_of(X * np.nan, UNTIED, None)
    assert (ranks == CLASSES).all()


@pytest.mark.parametrize("label", [CLASSES, -1])
def test_a_label_that_names_no_class_makes_the_loss_nan(label: int) -> None:
    loss, losses, _ = rows_of(X, UNTIED, BIASES, np.where(Y == 2, label, Y))
    assert np.isnan(loss)
    assert (np.isnan(losses) == (Y == 2)[:, None]).all()


def test_no_rows_and_one_class_have_no_loss() -> None:
    loss, gradient = fused(True, x=X[:0], labels=Y[:0], row_weights=None)
    assert loss == 0
    assert all((part == 0).all() for part in gradient)
    ones = [np.ones((dim, 1), "float32") for dim in DIMS]
    assert rows_of(X, ones, None, np.zeros(ROWS, "int32"))[0] == 0


def test_a_row_of_weight_zero_is_as_if_absent() -> None:
    outside = np.where(np.arange(ROWS) == 3, -1, Y)
    weights = np.where(np.arange(ROWS) == 3, 0, R).astype("float32")

    def loss(labels: Any) -> Any:
        return nested_crossentropy(X, UNTIED, BIASES, labels, DIMS, row_weights=weights).loss

    def both(labels: Any, other: Any) -> Any:
        return loss(labels), loss(other)

    received, expected = value(both, outside, Y)
    assert received == pytest.approx(expected)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"kernels": [np.ones((8, CLASSES), "float32")] * 3},
            "kernels must be one (dim, num_classes) per dim, or one of the widest dim for all, and "
            "biases as many. Received: kernels of shapes [(8, 11), (8, 11), (8, 11)] and "
            "no biases for dims=(1, 3, 8). "
            "MatryoshkaHead.parameters() gives both as they are needed.",
        ),
        (
            {"labels": np.ones((ROWS, 4), "float32")},
            "labels must be integers (rows,) or probabilities (rows, num_classes). "
            "Received: labels of shape (13, 4) for 11 classes. Give one label per row of features.",
        ),
        (
            {"label_smoothing": 1.0},
            "label_smoothing must lie in 0..1, 1 excluded. Received: label_smoothing=1.0. "
            "Give for example 0.1.",
        ),
        (
            {"dims": (1, 3, 16)},
            "dims must not exceed the width of the features. "
            "Received: dims=(1, 3, 16) for features of width 9. "
            "Drop the dims above 9, or widen the layer that makes the features.",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], sentence: str) -> None:
    arguments: dict[str, Any] = {"features": X, "kernels": UNTIED, "biases": None, "labels": Y}
    arguments |= {"dims": DIMS} | change
    with pytest.raises(ValueError, match=exactly(sentence)):
        nested_crossentropy(**arguments)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_features_that_are_not_finite_are_seen_even_in_a_row_of_weight_zero(tied: bool) -> None:
    weights = np.where(np.arange(ROWS) == 3, 0, R).astype("float32")
    broken = X.copy()
    broken[3, 0] = np.nan
    arguments = {"row_weights": ops.convert_to_tensor(weights)}
    assert np.isfinite(float(fused(tied, X, **arguments)[0]))
    assert np.isnan(float(fused(tied, broken, **arguments)[0]))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("chunk_rows", "labels", "smoothing"),
    [(None, Y, 0.0), (4, Y, 0.2), (1, SHARES, 0.0)],
    ids=["at once", "by chunks, smoothed", "row by row, shares"],
)
def test_a_teacher_adds_its_divergence_and_gets_no_gradient(
    tied: bool, chunk_rows: int | None, labels: Any, smoothing: float
) -> None:
    kernels, biases = parameters(tied)
    own_kernel = RANDOM.normal(size=(WIDTH, CLASSES)).astype("float32")
    other_x = RANDOM.normal(size=(ROWS, WIDTH)).astype("float32")
    dense = labels if labels.ndim == 2 else np.eye(CLASSES, dtype="float32")[labels]

    def teacher(features: Any, weight: float) -> Teacher:
        return Teacher(features, ops.convert_to_tensor(own_kernel), BIASES[0], weight)

    def plain(features: Any, *rest: Any) -> Any:
        taught = ops.softmax(teacher(ops.convert_to_tensor(other_x), 1.0).logits())
        total: Any = 0.0
        for m, dim in enumerate(DIMS):
            n = 0 if tied else m
            logits = features[:, :dim] @ rest[n][:dim] + rest[len(kernels) + n]
            hard = ops.categorical_crossentropy(
                dense * (1 - smoothing) + smoothing / CLASSES, logits, from_logits=True
            )
            soft = keras.losses.kl_divergence(taught, ops.softmax(logits))
            total = total + ops.sum(ops.convert_to_tensor(R) * (hard + 0.5 * soft))
        return total

    def chunked(features: Any, *rest: Any) -> Any:
        cut = len(kernels)
        return nested_crossentropy(
            features,
            rest[:cut],
            rest[cut:],
            ops.convert_to_tensor(labels),
            DIMS,
            row_weights=ops.convert_to_tensor(R),
            label_smoothing=smoothing,
            chunk_rows=chunk_rows,
            teacher=teacher(ops.convert_to_tensor(other_x), 0.5),
        ).loss

    arguments = [X, *kernels, *biases]
    loss, gradient = value_and_gradient(chunked, arguments)
    right_loss, right_gradient = value_and_gradient(plain, arguments)
    np.testing.assert_allclose(loss, right_loss, rtol=1e-5)
    for own, right in zip(gradient, right_gradient, strict=True):
        np.testing.assert_allclose(own, right, rtol=1e-4, atol=1e-5)

    def of_teacher(features: Any) -> Any:
        return nested_crossentropy(
            X, kernels, biases, Y, DIMS, teacher=teacher(features, 1.0), chunk_rows=chunk_rows
        ).loss

    # A linear term, so that no backend says that nothing depends on the features.
    _, [to_teacher] = value_and_gradient(lambda x: of_teacher(x) + ops.sum(x), [other_x])
    np.testing.assert_array_equal(to_teacher, np.ones_like(other_x))


def test_a_teacher_changes_no_loss_of_a_row() -> None:
    teacher = Teacher(X, UNTIED[0][:1].repeat(WIDTH, axis=0), None, 3.0)
    alone, taught = (
        nested_crossentropy(X, UNTIED, BIASES, Y, DIMS, teacher=own) for own in (None, teacher)
    )
    np.testing.assert_array_equal(alone.losses, taught.losses)
    np.testing.assert_array_equal(alone.ranks, taught.ranks)
    assert float(taught.loss) > float(alone.loss)
