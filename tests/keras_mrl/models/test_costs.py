"""What stages cost: multiply-adds as counted by hand, milliseconds that are there."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest

from keras_mrl import MatryoshkaClassifier, MatryoshkaHead, measure_costs, suggest_exits
from keras_mrl.models.costs import Costs, Work, multiply_adds
from tests.helpers.laws import exactly
from tests.helpers.small_bert import bert

pytestmark = pytest.mark.backend

layers = keras.layers


class TwoDense(keras.layers.Layer):
    """A layer of layers, as the blocks of keras-hub are."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = layers.Dense(6), layers.Dense(3)

    def build(self, input_shape: Any) -> None:
        self.first.build(input_shape)
        self.second.build((*input_shape[:-1], 6))

    def call(self, inputs: Any) -> Any:
        return self.second(self.first(inputs)) @ keras.ops.ones((3, 2))


ATTENTION = 3 * 4 * 8 * 6 + 2 * 4 * 4 * 6 + 4 * 6 * 8  # three projections, scores and sums, output
LAYERS: dict[str, tuple[Callable[[], Any], tuple[int, ...], int]] = {
    "dense": (lambda: layers.Dense(5), (7,), 7 * 5),
    "dense of steps": (lambda: layers.Dense(5), (3, 7), 3 * 7 * 5),
    "einsum": (lambda: layers.EinsumDense("abc,cde->abde", (None, 2, 5)), (3, 7), 3 * 7 * 2 * 5),
    "any axes": (lambda: layers.EinsumDense("...x,xy->...y", 5), (3, 7), 3 * 7 * 5),
    "convolution": (lambda: layers.Conv2D(5, 3, strides=2), (9, 9, 4), 4 * 4 * 5 * 9 * 4),
    "groups": (lambda: layers.Conv2D(4, 3, groups=2), (9, 9, 4), 7 * 7 * 4 * 9 * 2),
    "depthwise": (lambda: layers.DepthwiseConv2D(3), (9, 9, 4), 7 * 7 * 4 * 9),
    "separable": (lambda: layers.SeparableConv2D(5, 3), (9, 9, 4), 7 * 7 * (4 * 9 + 4 * 5)),
    "transposed": (lambda: layers.Conv2DTranspose(5, 2, strides=2), (3, 3, 4), 9 * 4 * 4 * 5),
    "normalization": (layers.BatchNormalization, (9, 9, 4), 0),
    "embedding": (lambda: layers.Embedding(9, 4), (7,), 0),
    "recurrent": (lambda: layers.GRU(5), (3, 7), 3 * (7 * 15 + 5 * 15)),
    "layers in a layer": (TwoDense, (4, 7), 4 * (7 * 6 + 6 * 3 + 3 * 2)),
    "a model": (lambda: keras.Sequential([layers.Dense(6), layers.Dense(3)]), (7,), 7 * 6 + 18),
}


@pytest.mark.parametrize(("make", "shape", "expected"), LAYERS.values(), ids=LAYERS)
def test_multiply_adds_are_those_counted_by_hand(
    make: Callable[[], Any], shape: tuple[int, ...], expected: int
) -> None:
    inputs = keras.Input(shape)
    model = keras.Model(inputs, make()(inputs))
    assert multiply_adds(model, [(1, *shape)]) == expected


def test_attention_is_counted_with_its_scores() -> None:
    inputs = keras.Input((4, 8))
    attention = layers.MultiHeadAttention(num_heads=2, key_dim=3)
    model = keras.Model(inputs, attention(inputs, inputs))
    assert multiply_adds(model, [(1, 4, 8)]) == ATTENTION


def test_multiply_adds_alone_are_counted_without_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = [("front", 2), ("a_out", 4), (None, 4)]
    expected = measure_costs(with_exits(), batch_sizes=(1,), laps=1).of(stages)

    def refuse(*_: Any) -> None:
        raise AssertionError("a model is run")

    monkeypatch.setattr(keras.Model, "predict_on_batch", refuse)
    assert measure_costs(with_exits(), batch_sizes=()).of(stages) == expected


def test_a_text_backbone_is_counted_at_the_length_of_the_rows() -> None:
    steps = 6
    layer = steps * (4 * 8 * 8 + 2 * 8 * 8) + 2 * steps * steps * 8
    assert multiply_adds(bert(), [(1, steps)] * 3) == 2 * layer + 8 * 8  # and the pooled output


def chain() -> keras.Model:
    image = keras.Input((8, 8, 2), name="image")
    x = image
    for name in "abcd":
        x = layers.Conv2D(2, 3, padding="same", name=f"{name}_conv")(x)
        inner = layers.Conv2D(2, 3, padding="same", name=f"{name}_inner")(x)
        x = layers.ReLU(name=f"{name}_out")(layers.Add(name=f"{name}_sum")([x, inner]))
    return keras.Model(image, layers.GlobalAveragePooling2D()(x), name="chain")


def test_suggested_exits_are_ends_of_blocks_at_equal_shares() -> None:
    assert suggest_exits(chain(), 3) == {"a_out": 0.25, "b_out": 0.5, "c_out": 0.75}
    assert suggest_exits(chain(), 1) == {"b_out": 0.5}


def widened_blocks() -> keras.Model:
    """Blocks as those of MobileNetV2: wide inside, and the first of a stage has no way around."""
    x = image = keras.Input((8, 8, 4))
    for name, filters in (("a", 4), ("b", 8), ("c", 8), ("d", 16)):
        before = x
        x = layers.Conv2D(6 * before.shape[-1], 1, activation="relu", name=f"{name}_expand")(x)
        x = layers.DepthwiseConv2D(3, padding="same", name=f"{name}_depthwise")(x)
        x = layers.Conv2D(filters, 1, name=f"{name}_out")(x)
        if filters == before.shape[-1]:
            x = layers.Add(name=f"{name}_add")([x, before])
    return keras.Model(image, x)


def test_suggested_exits_are_no_wide_insides_of_blocks() -> None:
    """`d_expand` is nearer to two thirds of the work than `c_add`."""
    assert list(suggest_exits(widened_blocks(), 2)) == ["b_out", "c_add"]


def test_suggested_exits_are_what_a_model_takes() -> None:
    model = MatryoshkaClassifier(
        chain(), MatryoshkaHead(3, dims=(2,)), exits=suggest_exits(chain(), 1)
    )
    assert model.exits == ("b_out",)


def test_too_many_exits_are_refused() -> None:
    sentence = (
        "A backbone needs layers between its parts to be left at 2 places. Received: 'flat', with "
        "1 such places: {'a': 0.5}. Give a smaller n, or name layers yourself."
    )
    body = keras.Sequential(
        [keras.Input((8,)), layers.Dense(8, name="a"), layers.Dense(8)], name="flat"
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        suggest_exits(body, 2)


def with_exits() -> MatryoshkaClassifier:
    front = keras.Sequential(
        [keras.Input((8, 8, 2)), layers.Flatten(), layers.Dense(4)], name="front"
    )
    head = MatryoshkaHead(3, dims=(2, 4))
    widening = keras.Sequential([layers.Dense(4)])
    return MatryoshkaClassifier(chain(), head, pooling=widening, exits=[front, "a_out"])


def test_costs_are_those_of_every_stage() -> None:
    costs = measure_costs(with_exits(), batch_sizes=(1, 2), laps=1)
    convolution = 64 * 9 * 2 * 2
    assert costs.of([("front", 2), ("a_out", 2), ("a_out", 4), (None, 4)]) == [
        128 * 4 + 2 * 3,
        128 * 4 + 2 * 3 + 2 * convolution + 2 * 4 + 2 * 3,
        128 * 4 + 2 * 3 + 2 * convolution + 2 * 4 + 2 * 3 + 4 * 3,
        128 * 4 + 2 * 3 + 2 * 4 + 2 * 3 + 4 * 3 + 8 * convolution + 2 * 4 + 4 * 3,
    ]
    assert costs.stages == [(name, dim) for name in ("front", "a_out", "last") for dim in (2, 4)]
    assert costs.backbone["front"].multiply_adds == 0
    for work in (costs.backbone["last"], costs.branch["a_out"], costs.head[4]):
        assert list(work.milliseconds) == [1, 2]
        assert min(work.milliseconds.values()) >= 0
    assert costs.backbone["last"].milliseconds[1] > 0


def test_milliseconds_add_up_along_the_way() -> None:
    def work(own: float) -> Work:
        return Work(1, {8: own})

    costs = Costs(
        backbone={"front": work(0), "early": work(3), "last": work(10)},
        branch={"front": work(1), "early": work(0.5), "last": work(0)},
        head={2: work(0.1), 4: work(0.2)},
    )
    stages = [("front", 2), ("early", 2), ("early", 4), ("last", 4)]
    assert costs.of(stages, batch_size=8) == pytest.approx([1.1, 4.7, 4.9, 12.1])
    sentence = (
        "Costs are known of exits ('front', 'early', 'last') at dims (2, 4), and in batches of "
        "[8]. Received: stages=[('early', 3)], batch_size=None. Measure the costs of that model "
        "with that batch size."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        costs.of([("early", 3)])
    with pytest.raises(ValueError, match="batch_size=1"):
        costs.of(stages, batch_size=1)


def test_open_lengths_need_a_sample() -> None:
    tokens = keras.Input((None,), dtype="int32", name="tokens")
    x = layers.Embedding(9, 4, name="embedding")(tokens)
    x = layers.Dense(4, name="dense")(x)
    body = keras.Model(tokens, layers.GlobalAveragePooling1D()(x))
    model = MatryoshkaClassifier(body, MatryoshkaHead(3, dims=(2, 4)), exits=["embedding"])
    sentence = (
        "Costs depend on the length of the rows. Received: sample=None for a model whose inputs "
        "['tokens'] have no fixed length. Give sample=, a few real rows as predict takes them."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        measure_costs(model)
    costs = measure_costs(model, (1,), sample=np.ones((2, 5), "int32"), laps=1)
    assert costs.backbone["last"].multiply_adds == 5 * 4 * 4


def test_costs_of_a_model_without_exits_are_refused() -> None:
    body = keras.Sequential([keras.Input((5,)), layers.Dense(4)])
    sentence = (
        "Costs are those of the stages of a MatryoshkaClassifier with exits. Received: Sequential "
        "'plain'. Write MatryoshkaClassifier(..., exits=('conv4_block6_out',))."
    )
    body.name = "plain"
    with pytest.raises(ValueError, match=exactly(sentence)):
        measure_costs(body)
