"""Every measure of a model from one pass, and what is told before that."""

from typing import Any

import keras
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from keras_mrl import MatryoshkaClassifier, MatryoshkaHead
from keras_mrl.evaluation import evaluate
from keras_mrl.evaluation import neighbors as neighbors_module
from tests.helpers.laws import exactly

pytestmark = pytest.mark.backend

DIMS = (4, 16, 64)
DIGITS = load_digits()
ROWS = np.random.default_rng(0).permutation(len(DIGITS.target))
GALLERY, QUERIES = ROWS[:1200], ROWS[1200:]


def model_and_rows() -> tuple[Any, Any, Any]:
    keras.utils.set_random_seed(0)
    backbone = keras.Sequential([keras.Input((64,)), keras.layers.Dense(64)])
    model = MatryoshkaClassifier(backbone, MatryoshkaHead(10, dims=DIMS))
    return model, DIGITS.data.astype(np.float32) / 16, DIGITS.target


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


def test_a_dim_without_a_head_has_neighbours_alone() -> None:
    model, x, y = model_and_rows()
    quality = evaluate(model, x[:50], y[:50], (x[50:200], y[50:200]), dims=(10, 16), k=3, verbose=0)
    assert list(quality[10]) == ["nn1", "knn", "p3", "map3", "recall3"]
    assert "top1" in quality[16]


def test_what_cannot_be_judged_is_refused() -> None:
    encoder = keras.Sequential([keras.Input((64,)), keras.layers.Dense(8)], name="encoder")
    _, x, y = model_and_rows()
    text = (
        "evaluate needs dims for a model that ends in no MatryoshkaHead. "
        "Received: dims=None for Sequential 'encoder'. "
        "Give the prefix lengths to judge: dims=(8, 16, 32)."
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


def test_every_slow_part_shows_that_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(neighbors_module, "_ROWS", 50)
    model, x, y = model_and_rows()
    few, shown = QUERIES[:30], GALLERY[:101]
    evaluate(model, x[few], y[few], (x[shown], y[shown]), dims=(4, 16), probe=True, verbose=1)
    said = capsys.readouterr().out
    for text in ("0/6", "6/6", "block", "0/2", "2/2", "probe"):
        assert text in said
    evaluate(model, x[few], y[few], (x[shown], y[shown]), dims=(4, 16), probe=True, verbose=0)
    assert capsys.readouterr().out == ""
