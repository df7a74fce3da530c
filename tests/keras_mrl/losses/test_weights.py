from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from keras_mrl import MatryoshkaHead, MatryoshkaLoss
from keras_mrl.losses import first_boosted
from tests.helpers.laws import exactly
from tests.helpers.small_models import (
    NUM_CLASSES,
    X,
    Y,
    as_numpy,
    classifier,
    cross_entropy,
    functional,
)

pytestmark = pytest.mark.backend

LOGITS = np.random.default_rng(0).normal(size=(12, 3, NUM_CLASSES)).astype("float32")


@keras.saving.register_keras_serializable(package="tests")
def halving(num_dims: int) -> list[float]:
    return [0.5**m for m in range(num_dims)]


def drawn(weights: Any, dims_per_step: int, steps: int = 200, num_dims: int = 5) -> Any:
    loss = MatryoshkaLoss(cross_entropy(), weights, dims_per_step)
    seed = keras.random.SeedGenerator(0)
    return np.stack([as_numpy(loss.weights_for(num_dims, seed)) for _ in range(steps)])


@pytest.mark.parametrize(
    ("weights", "numbers"),
    [
        pytest.param(first_boosted, (2.0, 1.0, 1.0), id="the paper's"),
        pytest.param(halving, (1.0, 0.5, 0.25), id="of the user"),
    ],
)
def test_weights_may_be_a_function_of_the_number_of_dims(
    weights: Callable[[int], Any], numbers: tuple[float, ...], tmp_path: Path
) -> None:
    loss = MatryoshkaLoss(cross_entropy(), weights)
    assert loss.weights_for(3) == numbers
    expected = float(MatryoshkaLoss(cross_entropy(), numbers)(Y, LOGITS))
    assert float(loss(Y, LOGITS)) == expected

    model = classifier(loss=loss)
    model.fit(X, Y, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.loss.weights is weights
    assert loaded.evaluate(X, Y, verbose=0) == pytest.approx(model.evaluate(X, Y, verbose=0))


def test_what_a_function_returns_is_checked() -> None:
    sentence = (
        "weights must hold one number per dim. Received: 2 weights (1.0, 1.0) for 3 dims. "
        "Give as many weights as the head has dims, or weights=None for ones."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        MatryoshkaLoss(cross_entropy(), lambda _: (1, 1)).weights_for(3)


def test_the_boost_may_be_another() -> None:
    assert first_boosted(3, boost=4) == (4.0, 1.0, 1.0)
    assert first_boosted(1) == (2.0,)


@pytest.mark.parametrize("dims_per_step", [1, 2, 4, 5])
def test_a_step_counts_so_many_dims_and_the_widest_always(dims_per_step: int) -> None:
    weights = drawn((2, 1, 3, 1, 5), dims_per_step)
    assert set(np.count_nonzero(weights, axis=1)) == {dims_per_step}
    assert set(weights[:, -1]) == {5.0}
    for m, weight in enumerate((2, 1, 3, 1)):
        assert set(weights[:, m]) <= {0.0, float(weight)}
        share = np.count_nonzero(weights[:, m]) / len(weights)
        assert abs(share - (dims_per_step - 1) / 4) < 0.15  # four standard errors


def test_a_dim_of_weight_zero_is_never_drawn() -> None:
    weights = drawn((1, 0, 1, 1, 0), 2)
    assert not weights[:, [1, 4]].any()
    assert weights[:, 3].all()  # the widest of those that count
    assert 0 < np.count_nonzero(weights[:, 0]) < len(weights)


def test_two_processes_draw_the_same() -> None:
    np.testing.assert_array_equal(drawn(None, 2), drawn(None, 2))


def moved_dims(model: keras.Model) -> list[tuple[int, ...]]:
    """Which kernels of the head each of ten steps changes."""
    head, moved_by_step = model.head, []
    for _ in range(10):
        before = [as_numpy(head.weights_at(dim)[0]) for dim in head.dims]
        model.fit(X, Y, batch_size=len(X), verbose=0)
        after = [as_numpy(head.weights_at(dim)[0]) for dim in head.dims]
        moved = (not np.array_equal(a, b) for a, b in zip(after, before, strict=True))
        moved_by_step.append(tuple(d for d, m in zip(head.dims, moved, strict=True) if m))
    return moved_by_step


def drawing(dims_per_step: int | None) -> keras.Model:
    keras.utils.set_random_seed(0)
    model = classifier(loss=MatryoshkaLoss(cross_entropy(), dims_per_step=dims_per_step))
    model(X)
    return model


def test_the_dims_change_from_step_to_step_in_fit_and_come_again_under_a_seed() -> None:
    moved = moved_dims(drawing(2))
    assert set(moved) == {(2, 8), (4, 8)}
    assert moved == moved_dims(drawing(2))
    assert set(moved_dims(drawing(1))) == {(8,)}


def test_the_dims_change_within_one_fit_as_well() -> None:
    whole, stepwise = drawing(2), drawing(2)
    whole.fit(X, Y, batch_size=len(X), epochs=6, verbose=0)
    for _ in range(6):
        stepwise.fit(X, Y, batch_size=len(X), verbose=0)
    for one, other in zip(whole.get_weights(), stepwise.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_evaluation_counts_every_dim() -> None:
    model = drawing(1)
    expected = float(as_numpy(MatryoshkaLoss(cross_entropy())(Y, model(X))))
    assert model.evaluate(X, Y, verbose=0) == pytest.approx(expected, rel=1e-5)


def test_a_regularizer_counts_beside_drawn_dims() -> None:
    head = MatryoshkaHead(NUM_CLASSES, dims=(2, 8), kernel_regularizer=keras.regularizers.L2(1.0))
    plain = drawing(1)
    regular = type(plain)(plain.backbone, head)
    regular.compile(loss=plain.loss)
    expected = float(as_numpy(MatryoshkaLoss(cross_entropy())(Y, regular(X))))
    expected += sum(float((as_numpy(head.weights_at(dim)[0]) ** 2).sum()) for dim in (2, 8))
    assert regular.evaluate(X, Y, verbose=0) == pytest.approx(expected, rel=1e-5)


def test_a_model_that_carries_no_seed_is_refused() -> None:
    loss = MatryoshkaLoss(cross_entropy(), dims_per_step=2)
    model = functional()
    model.compile("sgd", loss)
    sentence = (
        "dims_per_step draws dims from a seed that the model carries from step to step. "
        "Received: MatryoshkaLoss with dims_per_step=2, called alone or by a model that carries "
        "none. Train a MatryoshkaClassifier (of a functional model: "
        "MatryoshkaClassifier(*split(model))) or a MatryoshkaEncoder, or leave dims_per_step out."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        loss(Y, LOGITS)
    with pytest.raises(ValueError, match="draws dims from a seed"):
        model.fit(X, Y, verbose=0)


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True])
def test_dims_per_step_must_count(wrong: Any) -> None:
    sentence = (
        f"dims_per_step must be a positive integer. Received: dims_per_step={wrong!r}. "
        "Count the dims that a step trains, the widest included, or give None for all."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        MatryoshkaLoss(cross_entropy(), dims_per_step=wrong)


def test_more_dims_per_step_than_dims_are_refused() -> None:
    sentence = (
        "dims_per_step must not exceed the number of dims. "
        "Received: dims_per_step=3 for 2 dims of positive weight. "
        "Lower it, or leave it out to train all dims in every step."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        drawn((1, 0, 0, 0, 1), 3, steps=1)
