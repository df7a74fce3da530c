"""What every dim is worth, beside scikit-learn on handwritten digits."""

import tracemalloc
from collections import Counter
from typing import Any

import keras
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import top_k_accuracy_score
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from keras_mrl import MatryoshkaClassifier, MatryoshkaHead
from keras_mrl.evaluation import (
    evaluate,
    expected_calibration_error,
    score_embeddings,
    score_head,
    score_multilabel,
    score_regression,
)
from keras_mrl.evaluation.probe import linear_probe
from tests.helpers import two_towers
from tests.helpers.datasets import DATASETS, dataset
from tests.helpers.laws import exactly
from tests.helpers.nested_models import two_heads
from tests.helpers.small_models import X

RNG = np.random.default_rng(0)
DIMS = (4, 16, 64)
DIGITS = load_digits()
ROWS = RNG.permutation(len(DIGITS.target))
GALLERY, QUERIES = ROWS[:1200], ROWS[1200:]
# Noise, so that no two neighbours are equally near.
FEATURES = (DIGITS.data + RNG.normal(size=DIGITS.data.shape, scale=1)).astype(np.float32)


def model_and_rows() -> tuple[Any, Any, Any]:
    keras.utils.set_random_seed(0)
    backbone = keras.Sequential([keras.Input((64,)), keras.layers.Dense(64)])
    model = MatryoshkaClassifier(backbone, MatryoshkaHead(10, dims=DIMS))
    return model, DIGITS.data.astype(np.float32) / 16, DIGITS.target


@pytest.mark.backend
def test_one_pass_gives_all_measures() -> None:
    model, x, y = model_and_rows()
    few, shown = QUERIES[:200], GALLERY[:300]
    quality = evaluate(model, x[few], y[few], (x[shown], y[shown]), probe=True, verbose=0)
    logits = model.predict(x[few], verbose=0)
    features = model.backbone.predict(x, verbose=0)
    names = ["top1", "top5", "ece", "nn1", "knn", "p10", "map10", "recall10", "probe"]
    for index, dim in enumerate(DIMS):
        assert list(quality[dim]) == names
        assert all(type(value) is float for value in quality[dim].values())
        assert quality[dim]["top1"] == pytest.approx((logits[:, index].argmax(-1) == y[few]).mean())
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        probe.fit(features[shown, :dim], y[shown])
        expected = probe.score(features[few, :dim], y[few])
        assert quality[dim]["probe"] == pytest.approx(expected, abs=0.011)  # two rows of 200
    assert quality[64]["recall10"] == 1
    only = evaluate(model, x[few], y[few], dims=(16,), verbose=0)
    assert only == {16: {name: quality[16][name] for name in names[:3]}}


@pytest.mark.backend
def test_the_gallery_of_two_towers_goes_through_the_other() -> None:
    encoder = two_towers.two_towers()
    gallery = (two_towers.ITEMS, two_towers.ITEM_TASTES)
    query_labels = two_towers.USER_TASTES
    quality = evaluate(
        encoder,
        two_towers.USERS,
        query_labels,
        gallery,
        two_towers.DIMS,
        k=5,
        probe=True,
        verbose=0,
    )
    users, items = two_towers.user_embeddings(encoder), two_towers.item_embeddings(encoder)
    exact = np.argsort(-two_towers.similarities(users, items, 8))[:, :5]
    for dim in two_towers.DIMS:
        nearest = np.argsort(-two_towers.similarities(users, items, dim))[:, :5]
        hits = two_towers.ITEM_TASTES[nearest] == query_labels[:, None]
        shared = [len({*one} & {*other}) for one, other in zip(nearest, exact, strict=True)]
        assert quality[dim]["nn1"] == pytest.approx(hits[:, 0].mean())
        assert quality[dim]["p5"] == pytest.approx(hits.mean())
        assert quality[dim]["recall5"] == pytest.approx(np.mean(shared) / 5)
        probe = linear_probe(items[:, :dim], gallery[1]).predict(users[:, :dim])
        assert quality[dim]["probe"] == pytest.approx((probe == query_labels).mean(), abs=0.05)
    assert quality[8]["nn1"] > 0.9  # through one tower alone it would be 1 of 12 by chance


@pytest.mark.backend
@pytest.mark.parametrize("kind", DATASETS)
def test_data_sets_are_judged_as_their_arrays(kind: str) -> None:
    model, x, y = model_and_rows()
    few, shown = QUERIES[:50], GALLERY[:70]
    expected = evaluate(model, x[few], y[few], (x[shown], y[shown]), verbose=0)
    sides = [dataset(kind, x[rows], y[rows]) for rows in (few, shown)]
    for quality in (
        evaluate(model, sides[0], gallery=sides[1], verbose=0),
        evaluate(model, sides[0], gallery=(x[shown], y[shown]), verbose=0),
        evaluate(model, x[few], y[few], sides[1], verbose=0),
    ):
        for dim in DIMS:
            assert quality[dim] == pytest.approx(expected[dim])


RULE = "A data set of inputs must end, and give batches (x, y) with one integer label per row. "
REMEDY = " Batch it, leave repeat() out, and map its rows to (x, y)."


@pytest.mark.parametrize(
    ("change", "received"),
    [
        (lambda rows: rows.repeat(), "Received: one that repeats without end."),
        (lambda rows: rows.map(lambda x, _: x), "Received: batches that are a EagerTensor."),
        (lambda rows: rows.take(0), "Received: no batch."),
        (
            lambda rows: rows.unbatch(),
            "Received: inputs [(64,)] with labels () in a batch.",
        ),
        (
            lambda rows: rows.map(lambda x, _: (x, x)),
            "Received: inputs [(16, 64)] with labels (16, 64) in a batch.",
        ),
    ],
)
def test_a_data_set_that_cannot_be_judged_is_refused(change: Any, received: str) -> None:
    model, x, y = model_and_rows()
    rows = change(dataset("tf.data", x[:32], y[:32]))
    with pytest.raises(ValueError, match=exactly(RULE + received + REMEDY)):
        evaluate(model, rows, verbose=0)


def test_a_data_set_gives_its_own_labels() -> None:
    model, x, y = model_and_rows()
    text = "A data set gives its own labels. Received: labels beside a Batches. Leave labels out."
    with pytest.raises(ValueError, match=exactly(text)):
        evaluate(model, dataset("PyDataset", x[:32], y[:32]), y[:32], verbose=0)


@pytest.mark.backend
def test_a_dim_without_a_head_has_neighbours_alone() -> None:
    model, x, y = model_and_rows()
    quality = evaluate(model, x[:50], y[:50], (x[50:200], y[50:200]), dims=(10, 16), k=3, verbose=0)
    assert list(quality[10]) == ["nn1", "knn", "p3", "map3", "recall3"]
    assert "top1" in quality[16]


def test_labels_may_be_columns_and_k_of_any_library() -> None:
    model, x, y = model_and_rows()
    few, shown = QUERIES[:60], GALLERY[:100]
    plain = evaluate(model, x[few], y[few], (x[shown], y[shown]), k=5, probe=True, verbose=0)
    column = evaluate(
        model,
        x[few],
        y[few, None],
        (x[shown], y[shown, None]),
        k=np.int64(5),  # type: ignore[arg-type]
        probe=True,
        verbose=0,
    )
    assert column == plain


def test_labels_that_name_classes_are_compared_by_name() -> None:
    encoder = keras.Sequential([keras.Input((64,)), keras.layers.Dense(8)])
    x, y = DIGITS.data[:80], DIGITS.target[:80]
    names = np.array([f"digit {label}" for label in y])
    plain = evaluate(encoder, x[:40], y[:40], (x[40:], y[40:]), dims=(4,), verbose=0)
    named = evaluate(encoder, x[:40], names[:40], (x[40:], names[40:]), dims=(4,), verbose=0)
    assert named == plain


def test_every_slow_part_shows_that_it_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    model, x, y = model_and_rows()
    few, shown = QUERIES[:30], GALLERY[:101]
    for verbose, texts in ((1, ("0/2", "2/2", "block", "probe")), (0, ())):
        evaluate(
            model, x[few], y[few], (x[shown], y[shown]), dims=(4, 16), probe=True, verbose=verbose
        )
        printed = capsys.readouterr().out
        assert all(text in printed for text in texts)
        assert bool(printed) == bool(verbose)


def test_what_cannot_be_judged_is_refused() -> None:
    encoder = keras.Sequential([keras.Input((64,)), keras.layers.Dense(8)], name="encoder")
    _, x, y = model_and_rows()
    text = (
        "evaluate needs dims for a model that ends in no MatryoshkaHead with dims. "
        "Received: dims=None for Sequential 'encoder'. "
        "Give the prefix lengths: dims=(8, 16, 32)."
    )
    with pytest.raises(ValueError, match=exactly(text)):
        evaluate(encoder, x, y, (x, y))
    text = (
        "Without a head dims are judged by their neighbours. "
        "Received: gallery=None for Sequential 'encoder'. "
        "Give gallery=(x, y), rows of training for example."
    )
    with pytest.raises(ValueError, match=exactly(text)):
        evaluate(encoder, x, y, dims=(4, 8))
    model, x, y = model_and_rows()
    text = (
        "Without a gallery dims are judged by the head, which has (4, 16, 64). "
        "Received: dims=(10, 16). Give those of the head, or gallery=(x, y)."
    )
    with pytest.raises(ValueError, match=exactly(text)):
        evaluate(model, x[:9], y[:9], dims=(10, 16), verbose=0)
    for labels, received in (
        (y[:9] + 2, "int64 labels from 2 to 10"),
        (y[:9] / 2, "float64 labels"),
    ):
        text = (
            f"labels must be class ids in 0..9. Received: {received}. "
            "Number the classes from 0, as in training."
        )
        with pytest.raises(ValueError, match=exactly(text)):
            evaluate(model, x[:9], labels, verbose=0)


class Unread(keras.Sequential):
    """A backbone that nobody may embed with."""

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Fail."""
        raise AssertionError(f"embedded {len(args)}, {len(kwargs)}")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"k": 0}, "k must be a positive integer. Received: k=0. Give for example 10."),
        ({"k": True}, "k must be a positive integer. Received: k=True. Give for example 10."),
        (
            {"k": 41},
            "A gallery must hold at least the 41 nearest that are looked for. "
            "Received: 40 rows. Give more rows.",
        ),
        (
            {"dims": (8, 4)},
            "dims must be strictly increasing positive integers. Received: dims=(8, 4). "
            "Sort them and drop repeats: dims=(4, 8).",
        ),
        (
            {"dims": (5, 16), "gallery": None},
            "Without a gallery dims are judged by the head, which has (4, 16, 64). "
            "Received: dims=(5, 16). Give those of the head, or gallery=(x, y).",
        ),
        (
            {"labels": DIGITS.target[:19]},
            "labels must hold one label per row of the inputs, at least one. "
            "Received: labels of shape (19,) for inputs of shapes [(20, 64)]. "
            "Give integer labels, not one-hot rows.",
        ),
        (
            {"labels": np.eye(20)},
            "labels must hold one label per row of the inputs, at least one. "
            "Received: labels of shape (20, 20) for inputs of shapes [(20, 64)]. "
            "Give integer labels, not one-hot rows.",
        ),
        (
            {"labels": DIGITS.target[:20] + 10},
            "labels must be class ids in 0..9. Received: int64 labels from 10 to 19. "
            "Number the classes from 0, as in training.",
        ),
        (
            {"gallery": (DIGITS.data[:40], DIGITS.target[:41])},
            "labels must hold one label per row of the inputs, at least one. "
            "Received: labels of shape (41,) for inputs of shapes [(40, 64)]. "
            "Give integer labels, not one-hot rows.",
        ),
        (
            {"gallery": (DIGITS.data[:40], DIGITS.target[:40].astype(str))},
            "Labels of queries and gallery must be of one kind. "
            "Received: numbers for the queries, strings for the gallery. "
            "Name the classes alike on both sides, best by integers.",
        ),
        (
            {"gallery": (DIGITS.data[:40], np.zeros(40, int)), "probe": True},
            "A linear probe tells classes apart. Received: 40 labels, all of them 0. "
            "Give rows of two classes or more.",
        ),
    ],
)
def test_what_cannot_be_judged_is_refused_before_anything_is_embedded(
    change: dict[str, Any], text: str
) -> None:
    backbone = Unread([keras.Input((64,)), keras.layers.Dense(64)])
    model = MatryoshkaClassifier(backbone, MatryoshkaHead(10, dims=DIMS))
    given = {
        "inputs": DIGITS.data[:20],
        "labels": DIGITS.target[:20],
        "gallery": (DIGITS.data[:40], DIGITS.target[:40]),
    }
    with pytest.raises(ValueError, match=exactly(text)):
        evaluate(model, **given | change)


def cut(rows: Any, dim: int) -> Any:
    part = FEATURES[rows, 16 : 16 + dim].astype(np.float64)  # the first rows of pixels are empty
    return part / np.linalg.norm(part, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def scores() -> Any:
    wide = np.concatenate([FEATURES[:, 16:], FEATURES[:, :16]], axis=1)
    labels = DIGITS.target
    return score_embeddings(
        wide[QUERIES], labels[QUERIES], wide[GALLERY], labels[GALLERY], (4, 16, 48), k=10
    )


@pytest.mark.parametrize("dim", [4, 16, 48])
def test_neighbours_are_scikit_learns(scores: Any, dim: int) -> None:
    gallery, queries = cut(GALLERY, dim), cut(QUERIES, dim)
    labels, expected = DIGITS.target[GALLERY], DIGITS.target[QUERIES]
    for name, k in (("nn1", 1), ("knn", 10)):
        fitted = KNeighborsClassifier(k, algorithm="brute").fit(gallery, labels)
        assert scores[dim][name] == pytest.approx(fitted.score(queries, expected))
    ids = NearestNeighbors(n_neighbors=10).fit(gallery).kneighbors(queries)[1]
    assert scores[dim]["p10"] == pytest.approx((labels[ids] == expected[:, None]).mean())
    exact = NearestNeighbors(n_neighbors=10).fit(cut(GALLERY, 48)).kneighbors(cut(QUERIES, 48))[1]
    shared = [len(set(a) & set(b)) / 10 for a, b in zip(ids, exact, strict=True)]
    assert scores[dim]["recall10"] == pytest.approx(np.mean(shared))
    assert 0 < scores[dim]["map10"] <= scores[dim]["p10"]


@pytest.mark.parametrize("k", [1, 2, 5, 10])
@pytest.mark.parametrize("classes", [2, 4, 1000])
@pytest.mark.parametrize("dtype", [int, str])
def test_the_vote_is_the_most_frequent_label_and_of_equal_ones_the_smallest(
    k: int, classes: int, dtype: type[Any]
) -> None:
    """Query i lies on axis i, and so do its k neighbours; their order is that of the last axis."""
    queries = np.eye(100, 101)
    gallery = np.repeat(queries, k, axis=0)
    gallery[:, -1] = np.tile(np.arange(k) / 100, 100)
    labels = RNG.integers(0, classes, (100, k)).astype(dtype)
    votes = [Counter(row) for row in labels.tolist()]
    winners = [min(label for label in v if v[label] == max(v.values())) for v in votes]
    scores = score_embeddings(queries, winners, gallery, labels.ravel(), (101,), k=k)
    assert scores[101]["knn"] == 1
    assert scores[101][f"p{k}"] == (labels == np.array(winners)[:, None]).mean()


def test_the_memory_of_a_vote_does_not_grow_with_the_labels() -> None:
    gallery, queries = RNG.normal(size=(5000, 2)), RNG.normal(size=(5000, 2))
    peaks = []
    for classes in (10, 5000):
        labels = np.arange(5000) % classes
        tracemalloc.start()
        score_embeddings(queries, labels, gallery, labels, (2,))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]


def test_labels_may_be_columns() -> None:
    gallery, queries = FEATURES[GALLERY[:200]], FEATURES[QUERIES[:50]]
    shown, asked = DIGITS.target[GALLERY[:200]], DIGITS.target[QUERIES[:50]]
    plain = score_embeddings(queries, asked, gallery, shown, (4, 64))
    assert score_embeddings(queries, asked[:, None], gallery, shown[:, None], (4, 64)) == plain


def test_labels_of_two_kinds_are_refused() -> None:
    gallery, queries = FEATURES[GALLERY[:200]], FEATURES[QUERIES[:50]]
    shown, asked = DIGITS.target[GALLERY[:200]], DIGITS.target[QUERIES[:50]].astype(str)
    sentence = (
        "Labels of queries and gallery must be of one kind. "
        "Received: strings for the queries, numbers for the gallery. "
        "Name the classes alike on both sides, best by integers."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        score_embeddings(queries, asked, gallery, shown, (4, 64))


@pytest.mark.parametrize("k", [0, -3, 2.0, True, "10", None])
def test_k_is_a_positive_integer(k: Any) -> None:
    x, y = FEATURES[:30], DIGITS.target[:30]
    text = f"k must be a positive integer. Received: k={k!r}. Give for example 10."
    with pytest.raises(ValueError, match=exactly(text)):
        score_embeddings(x, y, x, y, (4,), k=k)


def test_k_may_be_an_integer_of_any_library() -> None:
    x, y = FEATURES[:30], DIGITS.target[:30]
    found = score_embeddings(x, y, x, y, (4,), k=np.int64(3))  # type: ignore[arg-type]
    assert found == score_embeddings(x, y, x, y, (4,), k=3)
    assert list(found[4]) == ["nn1", "knn", "p3", "map3", "recall3"]


def test_progress_counts_blocks_of_rows(capsys: pytest.CaptureFixture[str]) -> None:
    gallery, labels = np.tile(FEATURES[:1000, 20:24], (17, 1)), np.tile(DIGITS.target[:1000], 17)
    score_embeddings(gallery[:30], labels[:30], gallery, labels, (4,), k=3, verbose=1)
    printed = capsys.readouterr().out
    assert "0/3" in printed  # there before the first block is read
    assert "3/3" in printed


def test_a_head_is_scored_as_scikit_learn_does() -> None:
    kernel, bias = RNG.normal(size=(32, 10)) / 50, RNG.normal(size=10)
    logits = FEATURES[:, :32] @ kernel.astype(np.float32) + bias
    found = score_head(FEATURES, DIGITS.target, kernel, bias)
    assert found["top1"] == pytest.approx((logits.argmax(1) == DIGITS.target).mean())
    assert found["top5"] == pytest.approx(top_k_accuracy_score(DIGITS.target, logits, k=5))
    assert found["ece"] == pytest.approx(
        expected_calibration_error(logits, DIGITS.target), abs=1e-6
    )


@pytest.mark.parametrize(("classes", "top5"), [(20, 0.25), (5, 1.0), (1, 1.0)])
def test_of_equal_logits_the_first_class_is_likelier(classes: int, top5: float) -> None:
    labels = np.arange(classes)
    found = score_head(np.ones((classes, 2)), labels, np.zeros((2, classes)), None)
    assert found["top1"] == 1 / classes  # argmax says class 0 of every row
    assert found["top5"] == top5  # and the next four come after it


def test_top_ranks_are_those_of_a_stable_sort() -> None:
    """Small integers: exact products, and many ties."""
    features = RNG.integers(-1, 2, (3000, 3)).astype(np.float32)
    kernel, labels = RNG.integers(-1, 2, (3, 12)), RNG.integers(0, 12, 3000)
    order = np.argsort(-(features @ kernel), axis=1, kind="stable")
    found = score_head(features, labels, kernel, None)
    assert found["top1"] == np.mean(order[:, 0] == labels)
    assert found["top5"] == np.mean((order[:, :5] == labels[:, None]).any(axis=1))


def test_labels_of_a_head_may_be_a_column() -> None:
    kernel = RNG.normal(size=(32, 10))
    column = score_head(FEATURES, DIGITS.target[:, None], kernel, None)
    assert column == score_head(FEATURES, DIGITS.target, kernel, None)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("which", ["kernel", "bias"])
def test_a_head_is_finite(which: str, value: float) -> None:
    kernel, bias = np.zeros((2, 3)), np.zeros(3)
    (kernel if which == "kernel" else bias)[..., 1] = value
    sentence = (
        "kernel and bias must be finite. "
        "Received: NaN or infinity. Train the head to a finite loss."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        score_head(np.ones((4, 2)), [0, 1, 2, 0], kernel, bias)


def test_logits_are_finite() -> None:
    features = np.array([[1, 1], [3e38, 3e38]], np.float32)
    sentence = (
        "logits must be finite. Received: NaN or infinity in 1 of 2 rows. "
        "Scale the features, or train the head to a finite loss."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        score_head(features, [0, 1], np.full((2, 3), 9.0), None)


@pytest.mark.parametrize(
    ("kernel", "bias", "shapes"),
    [
        (np.ones(2), None, "kernel of shape (2,), bias of shape (2,)"),
        (np.ones((2, 0)), None, "kernel of shape (2, 0), bias of shape (0,)"),
        (3.0, None, "kernel of shape (), bias of shape ()"),
        (np.ones((2, 3)), np.ones(2), "kernel of shape (2, 3), bias of shape (2,)"),
        (np.ones((2, 3)), np.ones((3, 1)), "kernel of shape (2, 3), bias of shape (3, 1)"),
    ],
)
def test_a_head_is_a_matrix_and_a_vector(kernel: Any, bias: Any, shapes: str) -> None:
    sentence = (
        "kernel must be (dim, num_classes), and bias (num_classes,) or None. "
        f"Received: {shapes}. Give what head.weights_at(dim) returns."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        score_head(np.ones((2, 2)), [0, 1], kernel, bias)


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


def test_labels_of_logits_may_be_a_column() -> None:
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


# Several classes a row, and values.


def judged(loss: Any, outputs: int) -> keras.Model:
    keras.utils.set_random_seed(0)
    backbone = keras.Sequential([keras.Input((5,)), keras.layers.Dense(8)])
    model = MatryoshkaClassifier(backbone, MatryoshkaHead(outputs, dims=(2, 8)))
    if loss is not None:
        model.compile(loss=loss)
    return model


ROWS_OF_5 = np.random.default_rng(0).normal(size=(30, 5)).astype(np.float32)
KINDS_OF_HEADS: dict[str, tuple[Any, Any, Any]] = {
    "sigmoid": ("binary_crossentropy", ROWS_OF_5[:, :3] > 0, score_multilabel),
    "none": ("mse", ROWS_OF_5[:, :3], score_regression),
}


@pytest.mark.backend
@pytest.mark.parametrize("activation", KINDS_OF_HEADS)
def test_a_head_is_judged_as_its_loss_says(activation: str) -> None:
    loss, labels, score = KINDS_OF_HEADS[activation]
    model = judged(loss, 3)
    outputs = np.asarray(model.predict(ROWS_OF_5, verbose=0))
    quality = evaluate(model, ROWS_OF_5, labels, verbose=0)
    assert list(quality) == [2, 8]
    for column, dim in enumerate(quality):
        assert quality[dim] == pytest.approx(score(outputs[:, column], labels), rel=1e-4)
    named = evaluate(judged(None, 3), ROWS_OF_5, labels, verbose=0, activation=activation)
    assert named == quality
    assert list(evaluate(model, ROWS_OF_5, labels, dims=(8,), verbose=0)) == [8]


@pytest.mark.backend
@pytest.mark.parametrize("kind", DATASETS)
@pytest.mark.parametrize("activation", KINDS_OF_HEADS)
def test_data_sets_of_several_classes_and_of_values_are_judged(activation: str, kind: str) -> None:
    loss, labels, _ = KINDS_OF_HEADS[activation]
    for outputs in (1, 3):
        model, y = judged(loss, outputs), labels[:, :outputs].astype(np.float32)
        expected = evaluate(model, ROWS_OF_5, y, verbose=0)
        quality = evaluate(model, dataset(kind, ROWS_OF_5, y), verbose=0)
        for dim, measures in expected.items():
            assert quality[dim] == pytest.approx(measures, rel=1e-5)


def test_labels_of_a_data_set_have_a_column_per_output() -> None:
    rows = dataset("PyDataset", ROWS_OF_5, np.zeros((30, 3, 1)))
    text = (
        "A data set of inputs must end, and give batches (x, y) with a label per row and output. "
        "Received: inputs [(16, 5)] with labels (16, 3, 1) in a batch."
    )
    with pytest.raises(ValueError, match=exactly(text + REMEDY)):
        evaluate(judged("mse", 3), rows, verbose=0)


@pytest.mark.parametrize("activation", KINDS_OF_HEADS)
def test_rows_of_several_classes_or_values_have_no_gallery(activation: str) -> None:
    loss, labels, _ = KINDS_OF_HEADS[activation]
    with pytest.raises(ValueError, match=r"\ANeighbours are judged by the one class of a row. "):
        evaluate(judged(loss, 3), ROWS_OF_5, labels, gallery=(ROWS_OF_5, labels), verbose=0)
    with pytest.raises(ValueError, match=r"labels must be finite numbers, one for each output"):
        evaluate(judged(loss, 3), ROWS_OF_5, np.zeros(30, int), verbose=0)
    with pytest.raises(ValueError, match=r"Without a gallery dims are judged by the head"):
        evaluate(judged(loss, 3), ROWS_OF_5, labels, dims=(4,), verbose=0)


def test_class_ids_are_no_labels_of_several_classes() -> None:
    labels = np.full((30, 1), 2)
    with pytest.raises(ValueError, match=r"Received: 2 in 30 of 30 rows. Give one column per"):
        evaluate(judged("binary_crossentropy", 1), ROWS_OF_5, labels, verbose=0)


def test_one_of_several_outputs_is_judged() -> None:
    model = two_heads()
    y = {"digit": np.arange(12) % 3, "odd": np.arange(12) % 2}
    logits = {name: keras.ops.convert_to_numpy(tensor) for name, tensor in model(X).items()}
    for name, labels in y.items():
        quality = evaluate(model, X, labels, verbose=0, output=name)
        for index, dim in enumerate(quality):
            hits = logits[name][:, index].argmax(-1) == labels
            assert quality[dim]["top1"] == pytest.approx(hits.mean())
        assert quality.output == name
    with pytest.raises(ValueError, match="output must name one of the outputs of the model"):
        evaluate(model, X, y["digit"], verbose=0)
