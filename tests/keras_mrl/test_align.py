"""Early exits embed into the space of the last: their neighbours are among its embeddings."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from keras_mrl import MatryoshkaEncoder, align_exits
from keras_mrl_export import export_saved_model
from keras_mrl_serving._session import SavedModelSession
from tests.helpers import exit_models as models

ROWS = np.random.default_rng(0).normal(size=(400, 5)).astype("float32")


def embeddings(encoder: Any, rows: Any) -> dict[str, Any]:
    outputs = encoder.all_exits()(rows, training=False)
    return {name: np.asarray(keras.ops.convert_to_numpy(own)) for name, own in outputs.items()}


def nearest(queries: Any, gallery: Any) -> Any:
    scaled = [own / np.linalg.norm(own, axis=1, keepdims=True) for own in (queries, gallery)]
    return np.argmax(scaled[0] @ scaled[1].T, axis=1)


@pytest.mark.backend
def test_early_queries_find_themselves_among_the_last_exits_embeddings() -> None:
    encoder = models.encoder()  # its last exit is a linear map of what its early exit reads
    train, asked = ROWS[:300], ROWS[300:]
    before = embeddings(encoder, asked)
    assert np.mean(nearest(before["first"], before["last"]) == np.arange(100)) < 0.2
    explained = align_exits(encoder, train, ridge=1e-9)
    assert explained.keys() == {"first"}
    assert explained["first"] > 0.9999
    after = embeddings(encoder, asked)
    np.testing.assert_array_equal(after["last"], before["last"])
    np.testing.assert_allclose(after["first"], after["last"], atol=1e-3)
    assert (nearest(after["first"], after["last"]) == np.arange(100)).all()


@pytest.mark.parametrize("use_bias", [True, False])
def test_the_weights_are_those_of_ridge_regression(use_bias: bool) -> None:
    """Also in parts, and with a branch of the caller's, whose last layer is the map."""
    x = keras.Input((5,), name="x")
    hidden = keras.layers.Dense(8, activation="tanh", name="hidden")(x)
    deep = keras.layers.Dense(3)(keras.layers.Dense(8, activation="tanh")(hidden))
    branch = keras.Sequential(
        [keras.layers.Dense(6, "relu"), keras.layers.Dense(3, use_bias=use_bias)]
    )
    encoder = MatryoshkaEncoder(keras.Model(x, deep), exits=[("hidden", branch)])
    features = keras.Model(x, branch.layers[0](hidden))(ROWS)
    read = np.asarray(keras.ops.convert_to_numpy(features), np.float64)
    given = np.asarray(embeddings(encoder, ROWS)["last"], np.float64)
    explained = align_exits(encoder, ROWS, ridge=0.1, batch_size=64)
    means = (read.mean(0), given.mean(0)) if use_bias else (np.zeros(6), np.zeros(3))
    deviations, targets = read - means[0], given - means[1]
    products = deviations.T @ deviations
    penalty = 0.1 * np.trace(products) / 6 * np.eye(6)
    kernel = np.linalg.solve(products + penalty, deviations.T @ targets)
    made, *bias = branch.layers[-1].get_weights()
    np.testing.assert_allclose(made, kernel, atol=1e-5)
    np.testing.assert_allclose(bias, [means[1] - means[0] @ kernel] * use_bias, atol=1e-5)
    rest = np.square(targets - deviations @ kernel).sum() / np.square(given - given.mean(0)).sum()
    assert explained["hidden"] == pytest.approx(1 - rest, abs=1e-5)


def test_the_graph_embeds_where_the_model_does(tmp_path: Path) -> None:
    encoder = models.encoder()
    align_exits(encoder, ROWS, ridge=1e-9)
    path = export_saved_model(
        encoder, tmp_path, ROWS[:8], dims=(2, 8), signatures=["embed_8", "embed_first_8"]
    )
    with SavedModelSession(path) as session:
        early, last = (
            session.run(name, {"x": ROWS[300:]})["embedding"]
            for name in ("embed_first_8", "embed_8")
        )
    np.testing.assert_allclose(early, last, atol=1e-3)


def test_what_cannot_be_aligned_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="Give a MatryoshkaEncoder with exits"):
        align_exits(models.vectors(), ROWS)
    tower = keras.Sequential([keras.Input((5,)), keras.layers.Dense(4, name="a")])
    with pytest.raises(ValueError, match="which was made without any"):
        align_exits(MatryoshkaEncoder(tower), ROWS)
    with pytest.raises(ValueError, match=r"ridge must be a number above 0\. Received: ridge=0"):
        align_exits(models.encoder(), ROWS, ridge=0)
    with pytest.raises(ValueError, match="NaN or infinity before the end of exit 'first'"):
        align_exits(models.encoder(), np.full_like(ROWS, np.nan))


def test_a_branch_that_ends_in_something_else_is_refused() -> None:
    def encoder(branch: Any) -> Any:
        x = keras.Input((5,), name="x")
        hidden = keras.layers.Dense(4, name="hidden")(x)
        return MatryoshkaEncoder(
            keras.Model(x, keras.layers.Dense(4, name="end")(hidden)), exits=[("hidden", branch)]
        )

    for branch in (keras.layers.Dense(4, "relu", name="map"), keras.layers.ReLU(name="map")):
        model = encoder(branch)
        kept = model.get_weights()
        with pytest.raises(ValueError, match=r"exit 'hidden', which ends in .* 'map'"):
            align_exits(model, ROWS)
        for own, before in zip(model.get_weights(), kept, strict=True):
            np.testing.assert_array_equal(own, before)


def test_a_map_under_adaptation_is_left_alone() -> None:
    """What it does is the sum of two kernels."""
    encoder = models.encoder()
    encoder.exit_layers[0].enable_lora(2)
    with pytest.raises(ValueError, match="exit 'first', which ends in Dense"):
        align_exits(encoder, ROWS)


def test_a_map_that_the_tower_uses_too_is_left_alone() -> None:
    x = keras.Input((4,), name="x")
    shared = keras.layers.Dense(4, name="shared")
    hidden = keras.layers.Dense(4, name="hidden")(x)
    tower = keras.Model(x, shared(keras.layers.Dense(4)(hidden)))
    encoder = MatryoshkaEncoder(tower, exits=[("hidden", shared)])
    with pytest.raises(ValueError, match="which ends in Dense 'shared', called 2 times"):
        align_exits(encoder, ROWS[:, :4])
