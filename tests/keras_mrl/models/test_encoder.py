import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from keras_mrl import (
    ContrastiveLoss,
    MatryoshkaEmbeddingLoss,
    MatryoshkaEncoder,
    SupervisedContrastiveLoss,
    Truncate,
    embedder,
    split,
)
from keras_mrl.evaluation import evaluate
from tests.helpers.datasets import DATASETS, dataset
from tests.helpers.laws import exactly, policy
from tests.helpers.small_models import as_numpy

pytestmark = pytest.mark.backend

RANDOM = np.random.default_rng(0)
DIMS = (2, 4, 8)
ANCHORS = RANDOM.normal(size=(16, 5)).astype("float32")
POSITIVES = ANCHORS + 0.1 * RANDOM.normal(size=(16, 5)).astype("float32")
NEGATIVES = RANDOM.normal(size=(16, 5)).astype("float32")
SIDES = {"anchor": ANCHORS, "positive": POSITIVES, "negative": NEGATIVES}
LABELS = np.arange(16) // 4
X = ANCHORS[:12]
EAGERLY = keras.backend.backend() != "jax"  # which compiles one by one what it runs one by one


def tower(width: int = 8) -> keras.Model:
    return keras.Sequential([keras.Input((5,)), keras.layers.Dense(width)])


def compiled(encoder: MatryoshkaEncoder, **arguments: Any) -> MatryoshkaEncoder:
    encoder.compile(keras.optimizers.Adam(0.01), ContrastiveLoss(DIMS, **arguments))
    return encoder


def quick(encoder: MatryoshkaEncoder, **arguments: Any) -> MatryoshkaEncoder:
    """Without the seconds of TensorFlow's compiler, where compiling is not what is tested."""
    loss = ContrastiveLoss(DIMS, **arguments)
    encoder.compile(keras.optimizers.Adam(0.01), loss, run_eagerly=EAGERLY)
    return encoder


def log_scale(encoder: MatryoshkaEncoder) -> Any:
    return next(weight for weight in encoder.weights if weight.name == "log_scale")


STACKED = np.stack([NEGATIVES, NEGATIVES[::-1]], axis=1)
CHANCES = np.arange(1, 17) / 10
KNOWN = {"candidate_ids": LABELS, "candidate_sampling_probability": CHANCES}


@pytest.mark.parametrize(
    ("x", "y", "sides"),
    [
        ((ANCHORS, POSITIVES), None, 2),
        ({side: SIDES[side] for side in ("positive", "anchor")}, LABELS, 2),
        ((ANCHORS, POSITIVES), KNOWN, 2),
        (SIDES, LABELS, 3),
        ((ANCHORS, POSITIVES, STACKED), np.arange(48).reshape(16, 3) // 5, 4),
        (
            {
                "negative_2": NEGATIVES[::-1],
                "negative_1": NEGATIVES,
                "positive": POSITIVES,
                "anchor": ANCHORS,
            },
            None,
            4,
        ),
    ],
    ids=["pair", "ids", "ids and probabilities", "triplet", "stacked", "numbered"],
)
def test_pairs_with_any_negatives_train_and_the_log_has_the_recall_of_every_dim(
    x: Any, y: Any, sides: int
) -> None:
    encoder = quick(MatryoshkaEncoder(tower()))
    history = encoder.fit(x, y, batch_size=8, epochs=2, verbose=0, validation_data=(x, y)).history
    recalls = [f"recall_{dim}" for dim in DIMS]
    assert set(history) == {name for part in ("loss", *recalls) for name in (part, f"val_{part}")}
    stacked = encoder.predict(x, verbose=0)
    assert stacked.shape == (16, sides, 8)
    if sides == 4:
        np.testing.assert_array_equal(stacked[:, 3], encoder.predict(NEGATIVES[::-1], verbose=0))
    np.testing.assert_array_equal(stacked[:, 0], encoder.predict(ANCHORS, verbose=0))

    scores = encoder.evaluate(x, y, batch_size=16, verbose=0, return_dict=True)
    rows, hits = encoder.loss.measure(y, keras.ops.convert_to_tensor(stacked))
    assert scores["loss"] == pytest.approx(as_numpy(rows).mean(), rel=1e-5)
    by_dim = as_numpy(hits).mean(axis=1)
    assert [scores[name] for name in recalls] == pytest.approx(by_dim.tolist(), rel=1e-5)


def test_a_pair_that_stands_twice_counts_once_in_loss_and_recall() -> None:
    encoder = quick(MatryoshkaEncoder(tower()))
    x, twice = (ANCHORS, POSITIVES), np.concatenate([np.arange(16)] * 2)
    once = encoder.evaluate(x, batch_size=16, verbose=0, return_dict=True)
    both = (ANCHORS[twice], POSITIVES[twice])
    received = encoder.evaluate(both, twice, batch_size=32, verbose=0, return_dict=True)
    assert received == pytest.approx(once, rel=1e-4)
    without = encoder.evaluate(both, batch_size=32, verbose=0, return_dict=True)
    assert without["loss"] > once["loss"] + 0.1


def torch_batches(*parts: Any) -> Any:
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    return DataLoader(TensorDataset(*map(torch.from_numpy, parts)), batch_size=8)


def tensorflow_batches(*parts: Any) -> Any:
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices(parts).batch(8)


@pytest.mark.filterwarnings("ignore:`shuffle=True` was passed")
@pytest.mark.parametrize("batches", [torch_batches, tensorflow_batches])
@pytest.mark.parametrize("parts", [(ANCHORS, POSITIVES), (ANCHORS, POSITIVES, STACKED)])
def test_batches_of_pairs_are_those_of_arrays(batches: Any, parts: Any) -> None:
    layers = [keras.layers.Dense(8), keras.layers.Dense(8)]
    encoder = quick(MatryoshkaEncoder(*(keras.Sequential([layer]) for layer in layers)))
    encoder.fit(batches(*parts), verbose=0)  # builds both towers
    expected = encoder.evaluate(parts, batch_size=8, verbose=0)
    assert encoder.evaluate(batches(*parts), verbose=0) == pytest.approx(expected, rel=1e-5)


@pytest.mark.filterwarnings("ignore:`shuffle=True` was passed")
def test_batches_of_pairs_with_ids_and_weights_are_those_of_arrays() -> None:
    encoder = quick(MatryoshkaEncoder(tower()))
    x, weights = (ANCHORS, POSITIVES), np.arange(16, dtype="float32")
    encoder.fit(tensorflow_batches(x, LABELS, weights), verbose=0)
    expected = encoder.evaluate(x, LABELS, sample_weight=weights, batch_size=8, verbose=0)
    received = encoder.evaluate(tensorflow_batches(x, LABELS, weights), verbose=0)
    assert received == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", DATASETS)
def test_a_batch_of_more_parts_than_keras_reads_is_refused(kind: str) -> None:
    encoder = quick(MatryoshkaEncoder(tower()))
    sentence = (
        "Keras reads at most three parts of a batch of a data set. "
        "Received: 4, anchors, positives and 2 negatives. "
        "Yield them as the one part that they are: ((anchors, positives, *negatives),)."
    )
    parts = (ANCHORS, POSITIVES, NEGATIVES, NEGATIVES[::-1])
    with pytest.raises(ValueError, match=exactly(sentence)):
        encoder.fit(dataset(kind, *parts), verbose=0)


def test_anchors_and_positives_as_x_and_y_are_a_pair() -> None:
    encoder = quick(MatryoshkaEncoder(tower(), tower()))
    encoder.fit(ANCHORS, POSITIVES, verbose=0, validation_data=(ANCHORS, POSITIVES))
    expected = encoder.evaluate((ANCHORS, POSITIVES), verbose=0)
    assert encoder.evaluate(ANCHORS, POSITIVES, verbose=0) == pytest.approx(expected, rel=1e-5)


def test_an_encoder_of_stacked_negatives_is_saved(tmp_path: Path) -> None:
    layers = [keras.layers.Dense(8), keras.layers.Dense(8)]
    encoder = quick(MatryoshkaEncoder(*(keras.Sequential([layer]) for layer in layers)))
    x = (ANCHORS, POSITIVES, STACKED)
    encoder.fit(x, verbose=0)
    encoder.save(tmp_path / "encoder.keras")
    loaded = keras.saving.load_model(tmp_path / "encoder.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), encoder.predict(x, verbose=0))
    ids = np.arange(16)
    assert loaded.evaluate(x, ids, verbose=0) == pytest.approx(encoder.evaluate(x, ids, verbose=0))


def test_training_lowers_the_loss_and_chunks_do_not_matter() -> None:
    x = (ANCHORS, NEGATIVES)  # nothing in common: they are learnt by heart
    losses = []
    for chunk_size in (None, 5):
        keras.utils.set_random_seed(0)
        encoder = MatryoshkaEncoder(tower(), initial_temperature=0.1)
        compiled(encoder, chunk_size=chunk_size)
        history = encoder.fit(x, batch_size=16, epochs=8, shuffle=False, verbose=0).history
        losses.append(history["loss"])
    assert losses[0][-1] < 0.9 * losses[0][0]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


def test_two_towers_learn_apart_and_one_is_shared() -> None:
    for other in (None, tower()):
        encoder = quick(MatryoshkaEncoder(tower(), other))
        encoder.fit((ANCHORS, POSITIVES), verbose=0)
        assert len(encoder.trainable_weights) == (2 if other is None else 4)
        stacked = encoder.predict((ANCHORS, POSITIVES), verbose=0)
        right = (other or encoder.tower).predict(POSITIVES, verbose=0)
        np.testing.assert_allclose(stacked[:, 1], right, rtol=1e-5, atol=1e-6)
        assert np.array_equal(stacked[:, 0], encoder.predict(POSITIVES, verbose=0)) is False


def test_labels_train_one_tower() -> None:
    encoder = MatryoshkaEncoder(tower())
    encoder.compile("adam", SupervisedContrastiveLoss(DIMS), run_eagerly=EAGERLY)
    history = encoder.fit(ANCHORS, LABELS, verbose=0).history
    assert set(history) == {"loss", "recall_2", "recall_4", "recall_8"}


def test_another_loss_on_embeddings_has_no_recall() -> None:
    encoder = MatryoshkaEncoder(tower())
    inner = keras.losses.CosineSimilarity()
    encoder.compile("adam", MatryoshkaEmbeddingLoss(inner, DIMS, nested_targets=True))
    assert set(encoder.fit(ANCHORS, np.ones((16, 8)), verbose=0).history) == {"loss"}


def test_a_recompiled_encoder_logs_the_dims_of_its_new_loss() -> None:
    encoder = quick(MatryoshkaEncoder(tower()))
    encoder.fit((ANCHORS, POSITIVES), verbose=0)
    encoder.compile("sgd", ContrastiveLoss((3, 8), weights=(0, 1)), run_eagerly=EAGERLY)
    assert set(encoder.fit((ANCHORS, POSITIVES), verbose=0).history) == {"loss", "recall_8"}


def test_the_temperature_is_learnt_within_bounds_and_takes_the_place_of_the_losss() -> None:
    encoder = quick(MatryoshkaEncoder(tower(), initial_temperature=0.5))
    x = (ANCHORS, POSITIVES)
    scores = encoder.evaluate(x, batch_size=16, verbose=0, return_dict=True)
    stacked = encoder.predict(x, verbose=0)
    expected = float(ContrastiveLoss(DIMS, temperature=0.5)(None, stacked))
    assert scores["loss"] == pytest.approx(expected, rel=1e-5)
    encoder.fit(x, verbose=0)
    assert 0.4 < float(as_numpy(encoder.temperature)) != pytest.approx(0.5, abs=1e-6)
    assert MatryoshkaEncoder(tower()).temperature is None


def test_a_temperature_stops_at_its_floor_and_comes_back() -> None:
    encoder = MatryoshkaEncoder(tower(), initial_temperature=0.0101)
    encoder.tower.trainable = False
    encoder.compile(keras.optimizers.SGD(0.1), ContrastiveLoss(DIMS))
    log_scale(encoder).assign(9.0)
    encoder.fit((ANCHORS, ANCHORS), verbose=0)  # all are right: no gradient is large
    assert float(as_numpy(encoder.temperature)) == pytest.approx(0.01)
    encoder.fit((ANCHORS, ANCHORS[::-1]), verbose=0)  # all are wrong: softer is better
    assert float(as_numpy(encoder.temperature)) > 0.011


def test_dims_per_step_draws_in_training_and_not_in_evaluation() -> None:
    encoder = compiled(MatryoshkaEncoder(tower()), dims_per_step=1)
    x = (ANCHORS, POSITIVES)
    whole = compiled(MatryoshkaEncoder(encoder.tower))
    received = encoder.evaluate(x, batch_size=16, verbose=0, return_dict=True)
    assert received == whole.evaluate(x, batch_size=16, verbose=0, return_dict=True)
    first = encoder.fit(x, batch_size=16, verbose=0).history["loss"][0]
    assert first < received["loss"]  # one dim of three
    drawn = compiled(MatryoshkaEncoder(tower()), dims_per_step=2)
    drawn.optimizer.learning_rate = 0.0
    losses = [
        drawn.fit(x, batch_size=16, shuffle=False, verbose=0).history["loss"][0] for _ in range(8)
    ]
    assert len({round(loss, 3) for loss in losses}) == 2  # 8 with 2, or 8 with 4


@pytest.mark.parametrize("two", [False, True], ids=["one tower", "two towers"])
def test_a_saved_encoder_goes_on_training_where_it_stopped(two: bool, tmp_path: Path) -> None:
    encoder = MatryoshkaEncoder(tower(), tower() if two else None, initial_temperature=0.1)
    quick(encoder, symmetric=True, weights=(2, 1, 1))
    x = (ANCHORS, POSITIVES)
    encoder.fit(x, verbose=0)
    encoder.save(tmp_path / "encoder.keras")
    loaded = keras.saving.load_model(tmp_path / "encoder.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), encoder.predict(x, verbose=0))
    expected = encoder.fit(x, shuffle=False, verbose=0).history
    received = loaded.fit(x, shuffle=False, verbose=0).history
    assert received.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(received[name], values, rtol=1e-5, err_msg=name)


def test_the_tower_is_a_plain_model_that_is_cut_by_truncating() -> None:
    encoder = quick(MatryoshkaEncoder(tower()))
    encoder.fit((ANCHORS, POSITIVES), verbose=0)
    assert split(encoder) == split(encoder, other_tower=True) == (encoder.tower, None)
    prefix = as_numpy(Truncate(2)(encoder.predict(ANCHORS, verbose=0)))
    np.testing.assert_allclose(np.linalg.norm(prefix, axis=1), 1, rtol=1e-5)


def test_a_tower_that_is_given_twice_is_one(tmp_path: Path) -> None:
    body = tower()
    encoder = quick(MatryoshkaEncoder(body, body))
    assert encoder.other_tower is None
    encoder.fit((ANCHORS, POSITIVES), verbose=0)
    encoder.save(tmp_path / "encoder.keras")
    loaded = keras.saving.load_model(tmp_path / "encoder.keras")
    np.testing.assert_array_equal(loaded.predict(ANCHORS), encoder.predict(ANCHORS))


def sharing(layer: keras.layers.Layer) -> keras.Model:
    """A tower that averages what `layer` makes of its items."""
    items = keras.Input((3,), dtype="int32")
    return keras.Model(items, keras.layers.GlobalAveragePooling1D()(layer(items)))


def test_towers_share_layers_after_loading_too(tmp_path: Path) -> None:
    table = keras.layers.Embedding(20, 8, name="items")
    encoder = quick(MatryoshkaEncoder(sharing(table), sharing(table)))
    baskets = np.random.default_rng(0).integers(0, 20, (2, 12, 3)).astype("int32")
    encoder.fit(tuple(baskets), verbose=0)
    encoder.save(tmp_path / "encoder.keras")
    loaded = keras.saving.load_model(tmp_path / "encoder.keras")
    pairs: Any = [(loaded.tower, encoder.tower), (loaded.other_tower, encoder.other_tower)]
    for tower, other in pairs:
        np.testing.assert_array_equal(tower.predict(baskets[0]), other.predict(baskets[0]))
    loaded.fit(tuple(baskets), verbose=0)
    assert len(loaded.trainable_weights) == 1
    assert loaded.tower.get_layer("items") is loaded.other_tower.get_layer("items")


def test_a_layer_that_is_shared_out_of_sight_is_not_saved(tmp_path: Path) -> None:
    table = keras.layers.Embedding(20, 8, name="items")
    inner = [keras.Sequential([keras.Input((3,), dtype="int32"), table]) for _ in range(2)]
    encoder = quick(MatryoshkaEncoder(*map(sharing, inner)))
    sentence = (
        "A file can say that towers share a layer if it is a layer of both functional models. "
        "Received: 'items', inside of a layer or of a subclass. "
        "Call it in both towers itself: keras.Model(inputs, ...)."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        encoder.save(tmp_path / "encoder.keras")


def test_two_towers_are_split_one_at_a_time() -> None:
    encoder = MatryoshkaEncoder(tower(), tower())
    assert split(encoder) == (encoder.tower, None)
    assert split(encoder, other_tower=True) == (encoder.other_tower, None)


def test_towers_of_several_inputs_take_dicts() -> None:
    inputs = {name: keras.Input((5,), name=name) for name in ("left", "right")}
    joined = keras.layers.Concatenate()([*inputs.values()])
    body = keras.Model(inputs, keras.layers.Dense(8)(joined))
    encoder = quick(MatryoshkaEncoder(body))
    side = {"left": ANCHORS, "right": POSITIVES}
    encoder.fit({"anchor": side, "positive": side}, verbose=0)
    assert encoder.predict(side, verbose=0).shape == (16, 8)


def test_low_precision_towers_are_compared_in_float32() -> None:
    with policy("mixed_bfloat16"):
        encoder = quick(MatryoshkaEncoder(tower(), initial_temperature=0.1))
        history = encoder.fit((ANCHORS, POSITIVES), KNOWN, verbose=0).history
    assert log_scale(encoder).dtype == "float32"
    assert np.isfinite(history["loss"][0])


def test_weights_count_beside_labels_and_are_refused_without() -> None:
    encoder = quick(MatryoshkaEncoder(tower()))
    x, weights = (ANCHORS, POSITIVES), np.arange(16.0, dtype="float32")
    rows, _ = encoder.loss.measure(None, encoder.predict(x, verbose=0))
    scores = encoder.evaluate(
        x, np.arange(16), sample_weight=weights, batch_size=16, verbose=0, return_dict=True
    )
    assert scores["loss"] == pytest.approx((as_numpy(rows) * weights).mean(), rel=1e-5)
    sentence = (
        "Keras passes sample weights only beside labels. Received: sample_weight without y. "
        "Give candidate ids: y=numpy.arange(len(anchors)) where no positive stands twice."
    )
    for sides in (x, SIDES):
        with pytest.raises(ValueError, match=exactly(sentence)):
            encoder.fit(sides, sample_weight=weights, verbose=0)
        with pytest.raises(ValueError, match=exactly(sentence)):
            encoder.evaluate(sides, sample_weight=weights, verbose=0)
    with pytest.raises(ValueError, match=exactly(sentence)):
        encoder.fit(x, validation_data=(x, None, weights), verbose=0)
    sentence = (
        "Keras passes sample weights beside inputs and labels. "
        "Received: anchors as x, positives as y, and sample_weight. "
        "Give x=(anchors, positives) and y=candidate_ids."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        encoder.fit(ANCHORS, POSITIVES, sample_weight=weights, verbose=0)


@pytest.mark.parametrize(
    ("known", "sentence"),
    [
        (
            np.zeros(16),
            "candidate_ids must be integers that every backend can tell apart. "
            "Received: float64 from 0.0 to 0.0. "
            "Number them anew: names, ids = numpy.unique(names, return_inverse=True).",
        ),
        (
            np.full(16, 7),
            "candidate_ids must name at least two candidates: copies of a positive are no "
            "negatives. Received: 7 in all 16 rows. Give the ids of the positives, or "
            "numpy.arange(len(anchors)) where no positive stands twice.",
        ),
        (
            {"candidate_sampling_probability": np.arange(16)},
            "candidate_sampling_probability must be positive numbers. "
            "Received: int64 from 0 to 15. "
            "Give the share of each candidate among those that are drawn, or its count.",
        ),
    ],
)
def test_candidates_that_mean_something_else_are_refused(known: Any, sentence: str) -> None:
    encoder = quick(MatryoshkaEncoder(tower()))
    for method in (encoder.fit, encoder.evaluate):
        with pytest.raises(ValueError, match=exactly(sentence)):
            method((ANCHORS, POSITIVES), known, verbose=0)


def compile_with(loss: Any, **metrics: Any) -> None:
    MatryoshkaEncoder(tower()).compile("sgd", loss, **metrics)


def feature_maps() -> keras.Model:
    return keras.Sequential([keras.Input((4, 4, 1)), keras.layers.Conv2D(3, 2)])


SIDES_SENTENCE = (
    "A dict of sides has the keys anchor and positive, and of hard negatives negative, "
    "or negative_1, negative_2, ... Received: {}. Rename or add what differs."
)
ACCURACY = (
    "MatryoshkaEncoder gives embeddings and no classes, so it has no accuracy. "
    "Received: the metric {!r}. "
    "Leave it out: a contrastive loss logs recall_<dim> by itself."
)
LOSS = (
    "MatryoshkaEncoder trains on one of ContrastiveLoss, SupervisedContrastiveLoss, "
    "MatryoshkaEmbeddingLoss. Received: loss={!r}. "
    "Give for example ContrastiveLoss(dims=(8, 16, 32))."
)
MISSPELT = [("anchor", "positve"), ("anchor",), ("anchor", "negative")]
MSE = keras.losses.MeanSquaredError()


@pytest.mark.parametrize(
    ("refused", "sentence"),
    [
        (
            lambda: MatryoshkaEncoder(tower(), initial_temperature=0.005),
            "initial_temperature must be at least 0.01, the least that is learned. "
            "Received: initial_temperature=0.005. Give for example 0.07.",
        ),
        *(
            (
                lambda keys=keys: MatryoshkaEncoder(tower()).build(dict.fromkeys(keys, (None, 5))),
                SIDES_SENTENCE.format(", ".join(keys)),
            )
            for keys in MISSPELT
        ),
        *((lambda loss=loss: compile_with(loss), LOSS.format(loss)) for loss in (None, "mse", MSE)),
        (
            lambda: compile_with(ContrastiveLoss(DIMS), metrics=["accuracy"]),
            ACCURACY.format("accuracy"),
        ),
        (
            lambda: compile_with(ContrastiveLoss(DIMS), weighted_metrics=["mse", "acc"]),
            ACCURACY.format("acc"),
        ),
        (
            lambda: MatryoshkaEncoder(tower(8), tower(4)).build(((None, 5), (None, 5))),
            "Both towers must give embeddings of one width. Received: widths 8 and 4. "
            "End them in layers of as many units.",
        ),
        (
            lambda: MatryoshkaEncoder(feature_maps()).build((None, 4, 4, 1)),
            "A tower must end in embeddings (batch, width). "
            "Received: a tower whose output is (None, 3, 3, 3). "
            "Give pooling=, a layer that makes them of it: "
            "pooling=keras.layers.GlobalAveragePooling2D().",
        ),
        (
            lambda: MatryoshkaEncoder(tower()).build([(None, 5)]),
            "A list of inputs is a pair (anchors, positives), or more with hard negatives. "
            "Received: 1 inputs. Give a tower of several inputs a dict of them.",
        ),
    ],
)
def test_what_does_not_fit_is_refused(refused: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=exactly(sentence)):
        refused()


def of_maps(other: bool = False, **arguments: Any) -> MatryoshkaEncoder:
    pooling = keras.layers.GlobalAveragePooling2D()
    other_tower = feature_maps() if other else None
    return MatryoshkaEncoder(feature_maps(), other_tower, pooling=pooling, **arguments)


@pytest.mark.parametrize("two", [False, True], ids=["one tower", "two towers"])
def test_a_pooling_layer_ends_a_tower_of_feature_maps(two: bool, tmp_path: Path) -> None:
    """In every room, as in `MatryoshkaClassifier`."""
    encoder = of_maps(two)
    assert encoder.output_shape == ((None, 2, 3) if two else (None, 3))
    encoder.compile("adam", ContrastiveLoss((1, 3)), run_eagerly=EAGERLY)
    maps = RANDOM.normal(size=(2, 8, 4, 4, 1)).astype("float32")
    encoder.fit(tuple(maps), verbose=0)
    encoder.save(tmp_path / "maps.keras")
    for model in (encoder, keras.saving.load_model(tmp_path / "maps.keras")):
        first = as_numpy(encoder.tower(maps[0])).mean((1, 2))
        second = as_numpy((encoder.other_tower or encoder.tower)(maps[1])).mean((1, 2))
        np.testing.assert_allclose(as_numpy(model(maps[0])), first, rtol=1e-5, atol=1e-6)
        both = np.stack([first, second], axis=1)
        np.testing.assert_allclose(as_numpy(model(tuple(maps))), both, rtol=1e-5, atol=1e-6)
        assert [split(model, other_tower=other)[0](maps[0]).shape for other in (False, True)] == [
            (8, 3)
        ] * 2
        ids = np.arange(8)
        quality = evaluate(model, maps[0], ids, gallery=(maps[1], ids), k=2, verbose=0)
        nearest = (unit(first) @ unit(second).T).argmax(axis=1)
        assert quality[3]["nn1"] == (nearest == ids).mean()
        small = embedder(model, 3, other_tower=two)
        expected = unit(second if two else first)
        rows = maps[1] if two else maps[0]
        np.testing.assert_allclose(as_numpy(small(rows)), expected, rtol=1e-5, atol=1e-6)


def unit(rows: Any) -> Any:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_exits_stand_before_the_pooling() -> None:
    inputs = keras.Input((4, 4, 1))
    early = keras.layers.Conv2D(3, 2, name="early")(inputs)
    tower = keras.Model(inputs, keras.layers.Conv2D(3, 2, name="late")(early))
    pooling = keras.layers.GlobalAveragePooling2D()
    encoder = MatryoshkaEncoder(tower, pooling=pooling, exits=("early",))
    maps = RANDOM.normal(size=(8, 4, 4, 1)).astype("float32")
    embeddings = encoder.all_exits()(maps)
    assert {name: tuple(own.shape) for name, own in embeddings.items()} == {
        "early": (8, 3),
        "last": (8, 3),
    }
    expected = as_numpy(tower(maps)).mean((1, 2))
    np.testing.assert_allclose(as_numpy(embeddings["last"]), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(TypeError, match=r"\Apooling must be a Keras layer\. Received: pooling='"):
        MatryoshkaEncoder(tower, pooling="avg")


@pytest.mark.parametrize("keys", MISSPELT)
def test_misspelt_sides_are_named_in_fit(keys: tuple[str, ...]) -> None:
    sentence = SIDES_SENTENCE.format(", ".join(keys))
    with pytest.raises(ValueError, match=re.escape(sentence)):  # Keras adds where it was called
        quick(MatryoshkaEncoder(tower())).fit(dict.fromkeys(keys, ANCHORS), verbose=0)


def test_the_least_temperature_may_be_the_first() -> None:
    encoder = MatryoshkaEncoder(tower(), initial_temperature=0.01)
    assert float(as_numpy(encoder.temperature)) == pytest.approx(0.01)


def test_labels_that_are_missing_are_asked_for() -> None:
    encoder = MatryoshkaEncoder(tower())
    encoder.compile("sgd", SupervisedContrastiveLoss(DIMS), run_eagerly=EAGERLY)
    with pytest.raises(ValueError, match="needs one integer label per row"):
        encoder.fit(ANCHORS, verbose=0)


@pytest.mark.parametrize(
    ("labels", "received"),
    [
        (np.array([2**40, 7] * 6), "int64 from 7 to 1099511627776"),
        (np.array([2**25, 7] * 6, "float32"), "float32 from 7.0 to 33554432.0"),
        (np.array(["cat", "dog"] * 6), "<U3"),
    ],
    ids=["int64", "float32", "strings"],
)
def test_ids_that_a_backend_would_change_are_refused(labels: Any, received: str) -> None:
    encoder = MatryoshkaEncoder(tower())
    encoder.compile("sgd", SupervisedContrastiveLoss(DIMS), run_eagerly=EAGERLY)
    text = (
        f"Labels must be integers that every backend can tell apart. Received: {received}. "
        "Number them anew: names, ids = numpy.unique(names, return_inverse=True)."
    )
    with pytest.raises(ValueError, match=exactly(text)):
        encoder.fit(ANCHORS, labels, verbose=0)


def with_exits(**arguments: Any) -> Any:
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5,), name="x")
    hidden = keras.layers.Dense(6, activation="tanh", name="first_out")(inputs)
    tower = keras.Model(inputs, keras.layers.Dense(8, name="out")(hidden))
    front = keras.Sequential([keras.Input((5,)), keras.layers.Dense(8)], name="front")
    return MatryoshkaEncoder(tower, exits=[front, "first_out"], **arguments)


def numpy_by_exit(outputs: Any) -> dict[str, Any]:
    return {name: as_numpy(own) for name, own in outputs.items()}


def divergence(rows: Any, candidates: Any, taught: Any, others: Any, scale: float) -> Any:
    """The mean over rows in float64, at one dim."""

    def log_shares(a: Any, b: Any) -> Any:
        a, b = (own / np.linalg.norm(own, axis=1, keepdims=True) for own in (a, b))
        logits = a.astype("float64") @ b.T * scale
        return logits - np.log(np.exp(logits).sum(1, keepdims=True))

    own, right = log_shares(rows, candidates), log_shares(taught, others)
    return (np.exp(right) * (right - own)).sum(1).mean()


@pytest.mark.parametrize("chunk_size", [None, 5])
def test_exits_train_together_and_learn_from_the_last(chunk_size: int | None) -> None:
    encoder = with_exits()
    dims = (2, 8)
    loss = ContrastiveLoss(dims, temperature=0.5, chunk_size=chunk_size)
    encoder.compile(keras.optimizers.SGD(0.1), loss, run_eagerly=EAGERLY)
    pair = X, X + 0.1
    sides = [numpy_by_exit(encoder.all_exits()(side)) for side in pair]
    expected = 0.0
    for name in ("front", "first_out", "last"):
        anchors, positives = (side[name] for side in sides)
        alone = loss(None, np.stack([anchors, positives], axis=1))
        expected += (1 + (name == "last")) * float(alone)
        for dim in dims if name != "last" else ():
            expected += divergence(
                anchors[:, :dim], positives[:, :dim], sides[0]["last"], sides[1]["last"], 2.0
            )
    log = encoder.evaluate(x=pair, batch_size=12, verbose=0, return_dict=True)
    assert log.pop("loss") == pytest.approx(expected, rel=1e-4)
    names = {f"recall{short}_{dim}" for short in ("", "_front", "_first_out") for dim in dims}
    assert set(log) == names
    before = [np.array(weight) for weight in encoder.get_weights()]
    encoder.fit(x=pair, verbose=0)
    assert not any(map(np.array_equal, before, encoder.get_weights()))


def test_exits_of_labels_save_load_and_are_cut(tmp_path: Path) -> None:
    encoder = with_exits(initial_temperature=0.2)
    loss = SupervisedContrastiveLoss((2, 8))
    encoder.compile("sgd", loss, distillation=0.5, run_eagerly=EAGERLY)
    encoder.fit(X, np.arange(12) % 3, verbose=0)
    embeddings = numpy_by_exit(encoder.all_exits()(X))
    np.testing.assert_allclose(embeddings["last"], as_numpy(encoder(X)), 1e-6)
    plain = encoder.at(exit="first_out", dim=2)
    np.testing.assert_allclose(as_numpy(plain(X)), embeddings["first_out"][:, :2], 1e-6)
    backbone, head = split(encoder, exit="first_out")
    np.testing.assert_allclose(as_numpy(backbone(X)), embeddings["first_out"], 1e-6)
    assert head is None
    encoder.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for name, own in numpy_by_exit(loaded.all_exits()(X)).items():
        np.testing.assert_array_equal(own, embeddings[name])
    labels = np.arange(12) % 3
    losses = [own.evaluate(X, labels, verbose=0)[0] for own in (loaded, encoder)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_exits_of_two_towers_are_refused() -> None:
    other = keras.Sequential([keras.Input((5,)), keras.layers.Dense(8)])
    sentence = (
        "The exits of a MatryoshkaEncoder are those of its one tower. "
        "Received: exits=('front', 'first_out') and an other_tower. Leave one of both out."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        with_exits(other_tower=other)
