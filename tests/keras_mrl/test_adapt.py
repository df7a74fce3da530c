"""`MatryoshkaAdaptor`: its losses against float64, what it learns, what becomes of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

from keras_mrl import MatryoshkaAdaptor, MatryoshkaEncoder, Truncate
from keras_mrl.adapt import orthonormal
from keras_mrl.evaluation import score_projection
from keras_mrl.losses.rankings import listwise_divergences, pairwise_differences
from keras_mrl_serving import Projection
from keras_mrl_serving.projection import principal_directions, unit_rows
from tests.helpers.differentiate import value_and_gradient

pytestmark = pytest.mark.backend

DIMS = (2, 3, 5)
RNG = np.random.default_rng(0)
BATCH = unit_rows(RNG.normal(size=(14, 7)))
BATCH[3] = BATCH[8]  # a copy
NONE = np.full(14, -1, np.int32)
RIGHT = np.array([5, -1, 0, *[-1] * 11], np.int32)
START = np.linalg.qr(RNG.normal(size=(7, 5)))[0].astype(np.float32)
SCALES = np.array([1.0, 1.3, 0.8], np.float32)


def hidden(rows: int, seed: int) -> Any:
    """Rows of six groups; what tells a group's rows apart has less variance than the groups."""
    rng = np.random.default_rng(seed)
    groups = np.eye(32)[rng.integers(6, size=rows)]
    fine = np.concatenate([np.zeros((rows, 6)), 0.1 * rng.normal(size=(rows, 26))], axis=1)
    turn = np.linalg.qr(np.random.default_rng(2).normal(size=(32, 32)))[0]
    return ((groups + fine * np.linspace(1.5, 0.5, 32)) @ turn).astype(np.float32)


# The losses, in float64 and one row at a time.


def cosine(one: Any, other: Any) -> float:
    return float(one @ other / np.sqrt((one @ one) * (other @ other)))


def softmax(values: Any) -> Any:
    powers = np.exp(values - values.max())
    return powers / powers.sum()


def compared(rows: Any, right: Any, i: int) -> list[int]:
    """The rows that row i is compared with: neither itself nor its copies, but its right row."""
    return [
        j
        for j in range(len(rows))
        if j != i and (j == right[i] or cosine(rows[i], rows[j]) < 1 - 1e-5)
    ]


def listwise(rows: Any, projected: Any, right: Any) -> Any:
    losses = np.zeros((len(rows), len(DIMS)))
    for i in range(len(rows)):
        others = compared(rows, right, i)
        target = softmax(np.array([rows[i] @ rows[j] for j in others]) / 0.05)
        if right[i] >= 0:
            target = 0.5 * target + 0.5 * (np.array(others) == right[i])
        for m, dim in enumerate(DIMS):
            own = [cosine(projected[i, :dim], projected[j, :dim]) for j in others]
            answer = softmax(np.array(own) * float(SCALES[m]) / 0.05)
            positive = target > 0
            losses[i, m] = (target * np.log(target / answer, where=positive, out=0 * target)).sum()
    return losses


def pairwise(rows: Any, projected: Any, right: Any) -> Any:
    losses = np.zeros((len(rows), len(DIMS)))
    for i in range(len(rows)):
        others = compared(rows, right, i)
        full = np.array([rows[i] @ rows[j] for j in others])
        nearest = full > np.sort(full)[-10] - 1e-6  # all of those at the edge
        for m, dim in enumerate(DIMS):
            own = np.array([cosine(projected[i, :dim], projected[j, :dim]) for j in others])
            differences = np.abs(full - own)
            losses[i, m] = differences.mean() + differences[nearest].mean()
            if right[i] >= 0:
                place = others.index(right[i])
                losses[i, m] -= np.log(softmax(own / 0.05)[place])
    return losses


def of_kernel(loss: Callable[..., Any], right: Any) -> Callable[[Any], Any]:
    """A loss of rows as a function of the directions, in float64."""
    rows = BATCH.astype(np.float64)
    weights = np.where(right >= 0, len(right) / max(1, (right >= 0).sum()), 1.0)[:, None]
    return lambda kernel: weights * loss(rows, rows @ kernel, right)


def numeric_gradient(function: Callable[[Any], Any], kernel: Any) -> Any:
    """The gradient of the function's sum, by central differences."""
    gradient = np.zeros_like(kernel)
    for place in np.ndindex(*kernel.shape):
        step = np.zeros_like(kernel)
        step[place] = 1e-6
        gradient[place] = (function(kernel + step) - function(kernel - step)).sum() / 2e-6
    return gradient


@pytest.mark.parametrize("right", [NONE, RIGHT], ids=["rows", "pairs"])
@pytest.mark.parametrize("method", ["listwise", "pairwise"])
def test_losses_and_gradients_are_those_of_float64(method: str, right: Any) -> None:
    def loss(kernel: Any) -> Any:
        rows = ops.convert_to_tensor(BATCH)
        places = ops.convert_to_tensor(right)
        projected = ops.matmul(rows, kernel)
        if method == "pairwise":
            return pairwise_differences(rows, projected, places, DIMS, 0.05)
        return listwise_divergences(rows, projected, places, DIMS, SCALES, 0.05)

    losses, (gradient,) = value_and_gradient(loss, [START])
    exact = of_kernel({"listwise": listwise, "pairwise": pairwise}[method], right)
    kernel = START.astype(np.float64)
    np.testing.assert_allclose(losses, exact(kernel), rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(gradient, numeric_gradient(exact, kernel), rtol=1e-3, atol=1e-3)


def test_a_step_of_newton_schulz_leaves_of_the_gradient_what_turns() -> None:
    weights = RNG.normal(size=START.shape).astype(np.float32)

    def turned(kernel: Any) -> Any:
        return ops.sum(ops.multiply(orthonormal(kernel, steps=1), weights))

    _, (gradient,) = value_and_gradient(turned, [START])
    inner = START.T @ weights
    np.testing.assert_allclose(gradient, weights - START @ (inner + inner.T) / 2, atol=1e-5)


def test_a_matrix_that_nearly_is_becomes_orthonormal() -> None:
    kernel = START + 0.05 * RNG.normal(size=START.shape).astype(np.float32)
    result = ops.convert_to_numpy(orthonormal(ops.convert_to_tensor(kernel)))
    assert np.abs(result.T @ result - np.eye(5)).max() < 1e-6
    left, _, right = np.linalg.svd(kernel, full_matrices=False)
    np.testing.assert_allclose(result, left @ right, atol=1e-5)  # and the nearest one


# What is learnt.


@pytest.mark.parametrize("method", ["listwise", "pairwise"])
def test_learning_turns_prefixes_and_no_cosine(method: str) -> None:
    rows, held_out = hidden(1500, seed=3), hidden(700, seed=4)
    settings: dict[str, Any] = {"steps": 120, "batch_size": 192, "learning_rate": 0.01}
    adaptor = MatryoshkaAdaptor((4, 8), method, **settings, verbose=0).fit(rows)
    components = adaptor.components_.astype(np.float64)
    assert np.abs(components @ components.T - np.eye(32)).max() < 1e-6
    before, after = unit_rows(held_out[:50]), unit_rows(adaptor.transform(held_out[:50]))
    assert np.abs(before @ before.T - after @ after.T).max() < 1e-5
    assert adaptor.history_["val_loss"][-1] < adaptor.history_["val_loss"][0]
    report = adaptor.report(held_out[100:], held_out[:100])
    if method == "listwise":  # which is about who is near; the other is about all cosines
        learnt, pca = report.by_method[method], report.by_method["pca"]
        assert learnt[8]["recall@10"] > pca[8]["recall@10"] + 0.03


def test_the_rest_of_the_directions_are_the_principal_ones_of_what_is_left() -> None:
    rows = hidden(300, seed=3)
    adaptor = MatryoshkaAdaptor((4, 8), "listwise", steps=5, verbose=0).fit(rows)
    expected = principal_directions(rows[adaptor.rows_], after=adaptor.components_[:8])
    np.testing.assert_allclose(adaptor.components_, expected, atol=1e-4)
    few = MatryoshkaAdaptor((4, 8), "listwise", max_dim=12, steps=5, verbose=0).fit(rows)
    assert few.components_.shape == (12, 32)
    assert few.transform(rows).shape == (300, 12)


def test_principal_components_need_no_training() -> None:
    rows = hidden(300, seed=3)
    adaptor = MatryoshkaAdaptor((4, 8), max_rows=200).fit(rows)
    assert len(adaptor.rows_) == 200
    expected = principal_directions(rows[adaptor.rows_])
    np.testing.assert_allclose(adaptor.components_, expected, rtol=1e-4, atol=1e-5)
    assert adaptor.history_ == {}


def test_the_same_seed_gives_the_same_directions_whatever_is_global() -> None:
    rows = hidden(400, seed=3)
    policy = keras.config.dtype_policy()
    components = []
    for name in ("float32", "mixed_bfloat16"):
        keras.config.set_dtype_policy(name)
        keras.utils.set_random_seed(len(name))
        adaptor = MatryoshkaAdaptor((4, 8), "listwise", steps=10, verbose=0).fit(rows)
        components.append(adaptor.components_)
    keras.config.set_dtype_policy(policy)
    np.testing.assert_allclose(components[0], components[1], atol=1e-5)


def test_mapped_rows_of_any_length_learn_alike(tmp_path: Path) -> None:
    rows = hidden(300, seed=3)
    np.save(tmp_path / "rows.npy", rows * 7)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    one = MatryoshkaAdaptor((4, 8), "listwise", steps=5, verbose=0).fit(rows)
    other = MatryoshkaAdaptor((4, 8), "listwise", steps=5, verbose=0).fit(mapped)
    np.testing.assert_allclose(one.components_, other.components_, atol=1e-4)


@pytest.mark.parametrize("method", ["listwise", "pairwise"])
def test_pairs_bring_right_answers_forward(method: str) -> None:
    """Queries are rows that differ from their own where groups do; only the pairs say so."""
    turn = np.linalg.qr(np.random.default_rng(2).normal(size=(32, 32)))[0]
    rng = np.random.default_rng(5)

    def asked(some: Any) -> Any:
        coordinates = some @ turn.T
        coordinates[:, :6] += 0.3 * rng.normal(size=(len(some), 6))
        return (coordinates @ turn).astype(np.float32)

    rows, held_out = hidden(1200, seed=3), hidden(600, seed=4)
    questions = asked(held_out)[:500], np.arange(500)
    gains = []
    for pairs in (None, (asked(rows), np.arange(1200))):
        settings: dict[str, Any] = {"steps": 150, "batch_size": 128, "learning_rate": 0.02}
        adaptor = MatryoshkaAdaptor((8,), method, **settings, verbose=0).fit(rows, pairs)
        report = adaptor.report(held_out[:500], held_out[500:], pairs=questions)
        gains.append(report.by_method[method][8]["ndcg@10"])
    assert gains[1] > gains[0] + 0.05


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: MatryoshkaAdaptor((4,), "svd"), 'method must be "pca", "listwise" or "pairwise"'),
        (lambda: MatryoshkaAdaptor((8, 4)), "dims must be strictly increasing"),
        (lambda: MatryoshkaAdaptor((4, 64), max_dim=32), "dims must not exceed the number of"),
        (lambda: MatryoshkaAdaptor((4,), temperature=0), "temperature must be a positive number"),
        (lambda: MatryoshkaAdaptor((4,), weights=(1, 2)), "one number per dim"),
        (lambda: MatryoshkaAdaptor((4,), steps=0), "steps must be a positive integer"),
        (lambda: MatryoshkaAdaptor((4,)).transform(BATCH), "projects once it was fitted"),
        (lambda: MatryoshkaAdaptor((4, 9)).fit(BATCH), r"dims=\(4, 9\) for 7 directions"),
        (lambda: MatryoshkaAdaptor((4,)).fit(BATCH[0]), r"numbers \(rows, width\)"),
        (lambda: MatryoshkaAdaptor((4,)).fit(BATCH * np.nan), "must be finite"),
        (lambda: MatryoshkaAdaptor((4,), "listwise").fit(BATCH), "at least 64 rows. Received: 14"),
        (
            lambda: MatryoshkaAdaptor((4,)).fit(BATCH, (BATCH[:2], [0, 14])),
            r"queries of shape \(2, 7\) and int64 numbers of shape \(2,\), for rows of shape",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make: Callable[[], Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


# What becomes of it.


def test_a_saved_adaptor_is_a_projection_without_keras(tmp_path: Path) -> None:
    rows = hidden(300, seed=3)
    adaptor = MatryoshkaAdaptor((4, 8), max_dim=12, encoder_fingerprint="5e1f").fit(rows)
    adaptor.save(tmp_path)
    loaded, projection = MatryoshkaAdaptor.load(tmp_path), Projection.load(tmp_path)
    np.testing.assert_array_equal(loaded.transform(rows), adaptor.transform(rows))
    np.testing.assert_array_equal(projection.transform(rows, 4), adaptor.transform(rows, 4))
    assert loaded.fingerprint == projection.fingerprint == adaptor.fingerprint
    assert (loaded.dims, loaded.max_dim, loaded.method) == ((4, 8), 12, "pca")
    assert loaded.encoder_fingerprint == "5e1f"


def encoders() -> dict[str, keras.Model]:
    dense = keras.layers.Dense
    towers = keras.Sequential([keras.Input((5,)), dense(9, activation="relu"), dense(7)])
    return {
        "dense": keras.Sequential([keras.Input((5,)), dense(9, activation="relu"), dense(7)]),
        "no bias": keras.Sequential([keras.Input((5,)), dense(7, use_bias=False)]),
        "relu": keras.Sequential([keras.Input((5,)), dense(7, activation="relu")]),
        "scaled": keras.Sequential([keras.Input((5,)), dense(7), Truncate(7)]),
        "tower": MatryoshkaEncoder(towers),
    }


@pytest.mark.parametrize("name", ["dense", "no bias", "relu", "scaled", "tower"])
@pytest.mark.parametrize("max_dim", [None, 4])
def test_an_encoder_folds_it_into_its_last_layer(name: str, max_dim: int | None) -> None:
    encoder = encoders()[name]
    inputs = RNG.normal(size=(20, 5)).astype(np.float32)
    before = ops.convert_to_numpy(encoder(inputs))
    adaptor = MatryoshkaAdaptor((2, 4), max_dim=max_dim).fit(RNG.normal(size=(50, 7)))
    folded = adaptor.fold(encoder)
    np.testing.assert_allclose(
        ops.convert_to_numpy(folded(inputs)), adaptor.transform(before), atol=1e-5
    )
    np.testing.assert_array_equal(ops.convert_to_numpy(encoder(inputs)), before)
    added = folded.count_params() - encoder.count_params()
    assert (added <= 0) == (name in ("dense", "no bias", "tower"))


def test_a_folded_encoder_is_saved_and_loaded(tmp_path: Path) -> None:
    adaptor = MatryoshkaAdaptor((2, 4)).fit(RNG.normal(size=(50, 7)))
    inputs = RNG.normal(size=(6, 5)).astype(np.float32)
    for number, name in enumerate(("dense", "scaled")):
        folded = adaptor.fold(encoders()[name])
        folded.save(tmp_path / f"{number}.keras")
        loaded = keras.models.load_model(tmp_path / f"{number}.keras")
        np.testing.assert_allclose(
            ops.convert_to_numpy(loaded(inputs)), ops.convert_to_numpy(folded(inputs)), atol=1e-6
        )


def test_an_encoder_of_another_width_is_refused() -> None:
    adaptor = MatryoshkaAdaptor((2, 4)).fit(RNG.normal(size=(50, 6)))
    with pytest.raises(
        ValueError, match=r"Received: 7 of 'sequential.*' for a projection of width 6"
    ):
        adaptor.fold(encoders()["dense"])


def test_a_layer_of_it_is_frozen() -> None:
    adaptor = MatryoshkaAdaptor((2, 4), max_dim=4).fit(RNG.normal(size=(50, 7)))
    layer = adaptor.layer()
    assert layer.trainable_weights == []
    rows = RNG.normal(size=(3, 7)).astype(np.float32)
    np.testing.assert_allclose(
        ops.convert_to_numpy(layer(rows)), adaptor.transform(rows), atol=1e-5
    )


def test_a_report_of_another_method_says_where_it_loses() -> None:
    rows = RNG.normal(size=(400, 12)) * np.linspace(3, 0.1, 12)  # as if trained Matryoshka
    turned = Projection(np.linalg.qr(RNG.normal(size=(12, 12)))[0], (4,), "listwise")
    report = score_projection(turned, rows[50:], rows[:50])
    first, second = report.findings()
    assert first.startswith("listwise loses to truncation at 4: recall@10 of prefixes alone is 0.")
    assert "seem to be trained Matryoshka" in first
    assert second.startswith("listwise loses to pca at 4: recall@10 of prefixes alone is 0.")
