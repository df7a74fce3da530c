import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import keras_mrl
from keras_mrl import (
    AcrossDims,
    ContrastiveLoss,
    CorpusRecall,
    MatryoshkaClassifier,
    MatryoshkaEncoder,
    MatryoshkaHead,
    MatryoshkaLoss,
    MatryoshkaMetric,
    NeighborMetrics,
    Perplexity,
    split,
)
from tests.helpers import two_towers
from tests.helpers.datasets import DATASETS, dataset
from tests.helpers.laws import exactly, public_keras_classes
from tests.helpers.nested_models import two_heads
from tests.helpers.small_models import (
    DIMS,
    NUM_CLASSES,
    accuracy,
    as_numpy,
    classifier,
    compiled,
    cross_entropy,
    functional,
)

pytestmark = pytest.mark.backend

RANDOM = np.random.default_rng(0)
Y = np.arange(60) % NUM_CLASSES
X = (RANDOM.normal(size=(60, 5)) + 1.5 * np.eye(NUM_CLASSES, 5)[Y]).astype("float32")
GALLERY, QUERIES = (X[:40], Y[:40]), (X[40:], Y[40:])


def slow_scores(embeddings: Any, queries: Any, dim: int) -> tuple[float, float]:
    """1-NN and map10 of prefixes as a loop over queries, by distance and in float64."""
    gallery, queries = (
        e[:, :dim].astype("float64") / np.linalg.norm(e[:, :dim].astype("float64"), axis=1)[:, None]
        for e in (embeddings, queries)
    )
    first, precision = [], []
    for query, label in zip(queries, QUERIES[1], strict=True):
        hits = GALLERY[1][np.argsort(np.linalg.norm(gallery - query, axis=1))[:10]] == label
        first.append(hits[0])
        precision.append(sum(hits[: i + 1].mean() for i in range(10) if hits[i]) / 10)
    return float(np.mean(first)), float(np.mean(precision))


def fit(model: keras.Model, callbacks: list[keras.callbacks.Callback], epochs: int = 2) -> Any:
    return model.fit(
        *GALLERY, validation_data=QUERIES, epochs=epochs, callbacks=callbacks, verbose=0
    ).history


@pytest.mark.parametrize(
    "make",
    [lambda: classifier(keras.layers.Dense(8)), lambda: compiled(functional())],
    ids=["of a layer", "functional"],
)
def test_neighbours_are_those_of_a_slow_loop_after_every_epoch(make: Any) -> None:
    model = make()
    log = fit(model, [NeighborMetrics(GALLERY, QUERIES, batch_size=16)], epochs=3)
    body = split(model)[0]
    embeddings = [as_numpy(body(x)) for x, _ in (GALLERY, QUERIES)]
    for dim in DIMS:
        first, precision = slow_scores(embeddings[0], embeddings[1], dim)
        assert len(log[f"val_1nn_{dim}"]) == 3
        assert log[f"val_1nn_{dim}"][-1] == pytest.approx(first)
        assert log[f"val_map10_{dim}"][-1] == pytest.approx(precision, rel=1e-6)
    assert len({value for dim in DIMS for value in log[f"val_map10_{dim}"]}) > 5


def test_a_model_without_a_head_is_its_own_embedding() -> None:
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(8)])
    model.compile("sgd", "mse")
    neighbors = NeighborMetrics(GALLERY, QUERIES, dims=(3, 8))
    log = model.fit(X, np.zeros((60, 8)), callbacks=[neighbors], verbose=0).history
    embeddings = [as_numpy(model(x)) for x, _ in (GALLERY, QUERIES)]
    for dim in (3, 8):
        first, precision = slow_scores(embeddings[0], embeddings[1], dim)
        assert log[f"val_1nn_{dim}"] == pytest.approx([first])
        assert log[f"val_map10_{dim}"] == pytest.approx([precision], rel=1e-6)


def test_an_encoder_is_watched_between_its_epochs() -> None:
    tower = keras.Sequential([keras.Input((5,)), keras.layers.Dense(8)])
    encoder = MatryoshkaEncoder(tower)
    encoder.compile("sgd", ContrastiveLoss(dims=(2, 8)))
    neighbors = NeighborMetrics(GALLERY, QUERIES, dims=(2, 8))
    watching = [neighbors, AcrossDims("1nn"), AcrossDims("recall")]
    log = encoder.fit((X, 1.1 * X), epochs=2, callbacks=watching, verbose=0).history
    embeddings = [as_numpy(tower(x)) for x, _ in (GALLERY, QUERIES)]
    first, precision = slow_scores(embeddings[0], embeddings[1], 2)
    assert log["val_1nn_2"][1] == pytest.approx(first)
    assert log["val_map10_2"][1] == pytest.approx(precision, rel=1e-6)
    assert log["recall_worst"][1] == min(log["recall_2"][1], log["recall_8"][1])


def test_the_gallery_of_two_towers_goes_through_the_other() -> None:
    encoder = two_towers.two_towers(epochs=0)
    queries = (two_towers.USERS, two_towers.USER_TASTES)
    gallery = (two_towers.ITEMS, two_towers.ITEM_TASTES)
    neighbors = NeighborMetrics(gallery, queries, dims=two_towers.DIMS)
    log = encoder.fit(two_towers.PAIRS, epochs=2, callbacks=[neighbors], verbose=0).history
    users, items = two_towers.user_embeddings(encoder), two_towers.item_embeddings(encoder)
    for dim in two_towers.DIMS:
        nearest = np.argsort(-two_towers.similarities(users, items, dim))[:, :10]
        hits = two_towers.ITEM_TASTES[nearest] == two_towers.USER_TASTES[:, None]
        assert log[f"val_1nn_{dim}"][1] == pytest.approx(hits[:, 0].mean())
        precision = np.cumsum(hits, axis=1) / np.arange(1, 11)
        assert log[f"val_map10_{dim}"][1] == pytest.approx((precision * hits).sum(1).mean() / 10)


@pytest.mark.parametrize("kind", DATASETS)
def test_neighbours_are_found_in_data_sets(kind: str) -> None:
    model = classifier()
    sides = [dataset(kind, *side) for side in (GALLERY, QUERIES)]
    log = fit(model, [NeighborMetrics(*sides)], epochs=1)
    expected: dict[str, float] = {}
    callback = NeighborMetrics(GALLERY, QUERIES)
    callback.set_model(model)
    callback.on_epoch_end(0, expected)
    assert {name: log[name][0] for name in expected} == pytest.approx(expected)


def test_the_loss_of_an_encoder_tells_the_dims() -> None:
    encoder = MatryoshkaEncoder(classifier().backbone)
    encoder.compile("sgd", ContrastiveLoss(DIMS))
    callback = NeighborMetrics(GALLERY, QUERIES)
    log = encoder.fit(x=(X, X), verbose=0, callbacks=[callback]).history
    assert {f"val_1nn_{dim}" for dim in DIMS} <= set(log)


def test_recall_over_a_corpus_is_counted_by_hand_at_the_dims_of_the_loss() -> None:
    encoder = two_towers.two_towers(epochs=0)
    ids = 7 * np.arange(72)[::-1]
    expected_ids = ids[:48]
    recall = CorpusRecall((two_towers.ITEMS, ids), (two_towers.USERS, expected_ids), k=3)
    watching = [recall, AcrossDims("recall@3"), keras.callbacks.EarlyStopping("val_recall@3_2")]
    log = encoder.fit(two_towers.PAIRS, epochs=2, callbacks=watching, verbose=0).history
    users, items = two_towers.user_embeddings(encoder), two_towers.item_embeddings(encoder)
    recalls = []
    for dim in two_towers.DIMS:
        nearest = np.argsort(-two_towers.similarities(users, items, dim))[:, :3]
        recalls.append((ids[nearest] == expected_ids[:, None]).any(axis=1).mean())
        assert log[f"val_recall@3_{dim}"][1] == pytest.approx(recalls[-1])
    assert log["val_recall@3_worst"][1] == pytest.approx(min(recalls))
    assert 0 < min(recalls) < max(recalls) < 1


@pytest.mark.parametrize(
    ("corpus_ids", "query_ids", "received"),
    [
        ([1, 2, 3, 2], [1, 3], "1 ids of the corpus that repeat earlier ones, 0 of 2 queries"),
        ([1, 2, 3, 4], [1, 9], "0 ids of the corpus that repeat earlier ones, 1 of 2 queries"),
    ],
)
def test_a_corpus_holds_every_candidate_once(
    corpus_ids: list[int], query_ids: list[int], received: str
) -> None:
    sentence = (
        "A corpus must hold every candidate once, and those of all queries. "
        f"Received: {received} whose id is not in it. Keep the first of each: "
        "ids, rows = numpy.unique(ids, return_index=True), and add what is missing."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        CorpusRecall((X[:4], corpus_ids), (X[:2], query_ids), k=2)


def test_without_head_and_dims_it_says_so() -> None:
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(8)], name="plain")
    model.compile("sgd", "mse")
    sentence = (
        "NeighborMetrics needs dims for a model that ends in no MatryoshkaHead with dims. "
        "Received: dims=None for Sequential 'plain'. "
        "Give the prefix lengths: dims=(8, 16, 32)."
    )
    callback = NeighborMetrics(GALLERY, QUERIES)
    callback.set_model(model)
    with pytest.raises(ValueError, match=exactly(sentence)):
        callback.on_epoch_end(0, {})


def test_a_gallery_of_fewer_rows_than_neighbours_is_refused() -> None:
    few = (X[:9], Y[:9])
    sentence = (
        "A gallery must hold at least the 10 nearest that are looked for. "
        "Received: 9 rows. Give more rows."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        NeighborMetrics(few, QUERIES)


@pytest.mark.parametrize(
    ("pair", "received"),
    [
        (X, "a ndarray"),
        ((X, Y, Y), "a tuple"),
        ((X, Y[1:]), "inputs of shapes [(60, 5)], labels of shape (59,)"),
        (({"a": X, "b": X[1:]}, Y), "inputs of shapes [(60, 5), (59, 5)], labels of shape (60,)"),
        ((X[:0], Y[:0]), "inputs of shapes [(0, 5)], labels of shape (0,)"),
        ((X, np.eye(3)[Y]), "inputs of shapes [(60, 5)], labels of shape (60, 3)"),
    ],
)
def test_inputs_and_labels_that_do_not_fit_are_refused_at_once(pair: Any, received: str) -> None:
    for name, sides in (("gallery", (pair, QUERIES)), ("queries", (GALLERY, pair))):
        sentence = (
            f"{name} must be inputs and their labels, one per row, at least one. "
            f"Received: {received}. Write {name}=(x, y), with integer labels (rows,)."
        )
        with pytest.raises(ValueError, match=exactly(sentence)):
            NeighborMetrics(*sides)


def test_labels_of_two_kinds_are_refused_at_once() -> None:
    sentence = (
        "Labels of queries and gallery must be of one kind. "
        "Received: numbers for the queries, strings for the gallery. "
        "Name the classes alike on both sides, best by integers."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        NeighborMetrics((GALLERY[0], GALLERY[1].astype(str)), QUERIES)


def test_a_column_of_labels_is_one_per_row() -> None:
    """As Keras's own data sets give them."""
    columns = [(x, y[:, None]) for x, y in (GALLERY, QUERIES)]
    model = functional()
    logs: list[dict[str, float]] = [{}, {}]
    for log, (gallery, queries) in zip(logs, (columns, (GALLERY, QUERIES)), strict=True):
        callback = NeighborMetrics(gallery, queries)
        callback.set_model(model)
        callback.on_epoch_end(0, log)
    assert logs[0] == logs[1]
    assert len(logs[0]) == 2 * len(DIMS)


def test_across_dims_are_the_worst_and_the_weighted_mean_of_every_epoch() -> None:
    model = classifier(metrics=[accuracy()])
    log = fit(model, [AcrossDims("accuracy", weights=(2, 1, 1))], epochs=3)
    for prefix in ("", "val_"):
        rows = np.array([log[f"{prefix}accuracy_{dim}"] for dim in DIMS])
        assert log[f"{prefix}accuracy_worst"] == pytest.approx(rows.min(0))
        expected = np.average(rows, axis=0, weights=(2, 1, 1))
        assert log[f"{prefix}accuracy_mean"] == pytest.approx(expected)
    assert np.ptp(rows, axis=0).any()


def test_where_lower_is_better_the_largest_is_the_worst() -> None:
    log = {"perplexity_8": 3.0, "perplexity_16": 2.5, "val_perplexity_8": 4.0}
    AcrossDims("perplexity", lower_is_better=True).on_epoch_end(0, log)
    assert (log["perplexity_worst"], log["perplexity_mean"]) == (3.0, 2.75)
    assert log["val_perplexity_worst"] == 4.0


def test_names_are_not_taken_for_their_prefixes() -> None:
    log = {"accuracy_8": 0.5, "top5_accuracy_8": 0.1, "accuracy_8_x": 0.2, "accuracy_worst_8": 0.0}
    AcrossDims("accuracy").on_epoch_end(0, log)
    assert (log["accuracy_worst"], log["accuracy_mean"]) == (0.5, 0.5)
    assert "val_accuracy_worst" not in log


def test_a_log_without_such_entries_is_refused() -> None:
    sentence = (
        "AcrossDims needs a log with an entry per dim. "
        "Received: no accuracy_<dim> among ['loss', 'val_loss']. Compile a MatryoshkaMetric of "
        "that name, or put the callback that writes the entries before this one."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        AcrossDims("accuracy").on_epoch_end(0, {"loss": 1.0, "val_loss": 2.0})


def test_weights_that_do_not_fit_the_dims_are_refused() -> None:
    log = {"accuracy_2": 0.5, "accuracy_4": 0.5, "accuracy_8": 0.5}
    with pytest.raises(ValueError, match="weights must hold one number per dim"):
        AcrossDims("accuracy", weights=(1, 1)).on_epoch_end(0, log)


CORPUS = (X[:40], np.arange(40))
CALLBACKS: dict[str, Callable[[], keras.callbacks.Callback]] = {
    "corpus": lambda: CorpusRecall(CORPUS, CORPUS, dims=(2, 3, 5, 8)),
    "neighbors": lambda: NeighborMetrics(GALLERY, QUERIES, dims=(3, 5)),
    "across": lambda: AcrossDims("accuracy", weights=(2, 1, 1), lower_is_better=True),
}


def test_every_public_callback_is_in_the_table() -> None:
    classes = public_keras_classes(keras_mrl)
    callbacks = {c for c in classes if issubclass(c, keras.callbacks.Callback)}
    assert {type(make()) for make in CALLBACKS.values()} == callbacks


class Reader(keras.callbacks.Callback):
    """What a callback later in the list finds in the log."""

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        del epoch
        self.logs = dict(logs)


@pytest.mark.parametrize("make", CALLBACKS.values(), ids=CALLBACKS)
def test_a_later_callback_and_the_history_read_what_a_callback_writes(
    make: Callable[[], keras.callbacks.Callback],
) -> None:
    callback, reader = make(), Reader()
    arguments = [*inspect.signature(type(callback)).parameters]
    assert [name for name in arguments if not hasattr(callback, name)] == []
    log = fit(classifier(metrics=[accuracy()]), [callback, reader], epochs=1)
    assert reader.logs.keys() == log.keys()
    plain = {"loss", *(f"accuracy_{dim}" for dim in DIMS)}
    new = reader.logs.keys() - plain - {f"val_{name}" for name in plain}
    assert len(new) == 4
    assert all(type(reader.logs[name]) is float for name in new)
    json.dumps(reader.logs)


class Written(keras.callbacks.Callback):
    """The weights after every epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[list[Any]] = []

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        del epoch, logs
        self.weights.append(self.model.get_weights())


def test_kerass_own_callbacks_select_by_what_is_written(tmp_path: Path) -> None:
    """Chosen by one dim, by the worst and by a mean, a model is kept from its own best epoch."""
    model = classifier(optimizer=keras.optimizers.SGD(0.5), metrics=[accuracy()])
    names = ("val_accuracy_4", "val_accuracy_worst", "val_1nn_mean")
    keepers = [
        keras.callbacks.ModelCheckpoint(
            tmp_path / f"{name}.keras", monitor=name, mode="max", save_best_only=True
        )
        for name in names
    ]
    stopping = keras.callbacks.EarlyStopping("val_accuracy_worst", mode="max", patience=3)
    written = Written()
    writing = [NeighborMetrics(GALLERY, QUERIES), AcrossDims("accuracy"), AcrossDims("1nn")]
    log = fit(model, [*writing, *keepers, stopping, written], epochs=12)
    for name in names:
        loaded = keras.saving.load_model(tmp_path / f"{name}.keras")
        best = written.weights[int(np.argmax(log[name]))]
        for one, other in zip(loaded.get_weights(), best, strict=True):
            np.testing.assert_array_equal(one, other)
    worst = int(np.argmax(log["val_accuracy_worst"]))
    assert stopping.best_epoch == worst
    assert len(written.weights) == min(12, worst + 4)


def test_after_the_callback_that_reads_it_an_entry_comes_too_late() -> None:
    stopping = keras.callbacks.EarlyStopping("val_accuracy_worst", mode="max")
    with pytest.warns(UserWarning, match="which is not available"):
        fit(classifier(metrics=[accuracy()]), [stopping, AcrossDims("accuracy")], epochs=1)


def test_tensorboard_draws_what_is_written(tmp_path: Path) -> None:
    """Keras's TensorBoard writes through TensorFlow, whatever the backend."""
    pytest.importorskip("tensorflow")
    from tensorflow import make_ndarray
    from tensorflow.core.util import event_pb2
    from tensorflow.data import TFRecordDataset

    model = classifier(metrics=[accuracy()])
    log = fit(model, [AcrossDims("accuracy"), keras.callbacks.TensorBoard(tmp_path)], epochs=1)
    drawn = {}
    for file in tmp_path.glob("validation/*"):
        for record in TFRecordDataset(str(file)).as_numpy_iterator():
            for value in event_pb2.Event.FromString(record).summary.value:
                drawn[value.tag] = float(make_ndarray(value.tensor))
    for name in ("accuracy_4", "accuracy_worst", "accuracy_mean"):
        assert drawn[f"epoch_{name}"] == pytest.approx(log[f"val_{name}"][0])


def test_top_k_accuracy_per_dim_is_keras_own() -> None:
    top = keras.metrics.SparseTopKCategoricalAccuracy(k=2, name="top2")
    model = classifier(metrics=[MatryoshkaMetric(top, DIMS)])
    log = fit(model, [AcrossDims("top2")])
    logits = as_numpy(model(QUERIES[0]))
    best = np.argsort(-logits, axis=-1)[..., :2]
    expected = (best == QUERIES[1][:, None, None]).any(-1).mean(0)
    for m, dim in enumerate(DIMS):
        assert log[f"val_top2_{dim}"][-1] == pytest.approx(expected[m])
    assert log["val_top2_worst"][-1] == pytest.approx(expected.min())


@pytest.mark.parametrize("nested", [True, False], ids=["our model", "a functional model"])
def test_across_dims_takes_the_direction_from_the_metric(nested: bool) -> None:
    inputs = keras.Input((4,))
    features, head = keras.layers.Dense(4)(inputs), MatryoshkaHead(1, dims=(2, 4))
    if nested:
        model = MatryoshkaClassifier(keras.Model(inputs, features), head)
        model.compile("sgd", "mse", metrics=["mae", keras.metrics.R2Score(name="r2")])
    else:
        model = keras.Model(inputs, head(features))
        metrics = [keras.metrics.MeanAbsoluteError(name="mae"), keras.metrics.R2Score(name="r2")]
        mse = MatryoshkaLoss(keras.losses.MeanSquaredError())
        model.compile("sgd", mse, metrics=[MatryoshkaMetric(m, (2, 4)) for m in metrics])
    x = np.random.default_rng(0).normal(size=(16, 4)).astype("float32")
    stop = keras.callbacks.EarlyStopping("mae_worst", **({} if nested else {"mode": "min"}))
    callbacks = [AcrossDims("mae"), AcrossDims("r2"), stop]
    log = model.fit(x, x[:, :1] * 5, callbacks=callbacks, verbose=0).history
    assert log["mae_worst"] == [max(log["mae_2"][0], log["mae_4"][0])]
    assert log["r2_worst"] == [min(log["r2_2"][0], log["r2_4"][0])]
    assert stop.mode == "min"
    turned = AcrossDims("mae", lower_is_better=False)
    log = {"mae_2": 1.0, "mae_4": 2.0}
    turned.on_epoch_end(0, log)
    assert log["mae_worst"] == 1.0


def test_neighbors_of_one_of_several_outputs() -> None:
    model = two_heads()
    loss = MatryoshkaLoss(cross_entropy())
    perplexity = MatryoshkaMetric(Perplexity(), DIMS)
    metrics = {"digit": [accuracy(), perplexity]}
    model.compile("sgd", {"digit": loss, "odd": loss}, metrics=metrics)
    y = {"digit": Y, "odd": Y % 2}
    neighbors = NeighborMetrics(GALLERY, QUERIES, output="digit")
    callbacks = [neighbors, AcrossDims("digit_1nn"), AcrossDims("digit_accuracy")]
    callbacks.append(AcrossDims("digit_perplexity"))
    log = model.fit(X, y, validation_data=(X, y), callbacks=callbacks, verbose=0).history
    view = split(model, "digit")[0]
    gallery, queries = (as_numpy(view(side[0])) for side in (GALLERY, QUERIES))
    for dim in DIMS:
        first, _ = slow_scores(gallery, queries, dim)
        assert log[f"val_digit_1nn_{dim}"][0] == pytest.approx(first)
    assert log["val_digit_1nn_worst"][0] == min(log[f"val_digit_1nn_{dim}"][0] for dim in DIMS)
    for name, worst in (("accuracy", min), ("perplexity", max)):
        entries = [log[f"val_digit_{name}_{dim}"][0] for dim in DIMS]
        assert log[f"val_digit_{name}_worst"][0] == worst(entries)
    assert neighbors.mode_of("digit_1nn_4") == "max"
    assert neighbors.mode_of("1nn_4") is None
    with pytest.raises(ValueError, match=r"output must name one of the outputs of the model\."):
        model.fit(X, y, callbacks=[NeighborMetrics(GALLERY, QUERIES)], verbose=0)


def test_the_mode_of_a_metric_that_stands_in_weighted_metrics_too() -> None:
    model = classifier(metrics=[accuracy()], weighted_metrics=[accuracy()])
    stop = keras.callbacks.EarlyStopping("val_weighted_accuracy_8")
    log = fit(model, [stop], epochs=1)
    assert {"accuracy_8", "weighted_accuracy_8", "val_weighted_accuracy_8"} <= log.keys()
    assert stop.mode == "max"
