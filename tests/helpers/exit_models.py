"""Small models with exits and fixed weights, cascades over them, and what NumPy says of both."""

from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from keras_mrl import MatryoshkaClassifier, MatryoshkaEncoder, MatryoshkaHead
from keras_mrl_serving import stage_logits
from keras_mrl_serving.cascade.confidence import confidence_of
from keras_mrl_serving.cascade.policy import CascadePolicy, Stage
from keras_mrl_serving.cascade.thresholds import midway
from tests.helpers.export_models import with_fixed_weights
from tests.helpers.small_bert import bert

Array = npt.NDArray[Any]
Arrays = dict[str, Array]
Key = tuple[str | None, int]

DIMS, NUM_CLASSES, ROWS = (2, 8), 5, 256
_RNG = np.random.default_rng(0)
IMAGES = _RNG.normal(size=(ROWS, 8, 8, 2)).astype("float32")
_LENGTHS = np.arange(ROWS) % 5 + 2
_TOKENS = np.where(np.arange(6) < _LENGTHS[:, None], _RNG.integers(1, 20, (ROWS, 6)), 0)
TEXTS: Arrays = {
    "token_ids": _TOKENS.astype("int32"),
    "segment_ids": np.zeros((ROWS, 6), "int32"),
    "padding_mask": (_TOKENS > 0).astype("int32"),
}
VECTORS = _RNG.normal(size=(ROWS, 5)).astype("float32")


def _head() -> MatryoshkaHead:
    return MatryoshkaHead(NUM_CLASSES, DIMS)


def images() -> keras.Model:
    """A convolutional net with batch normalization, cut inside a block, and a model before it."""
    image = keras.Input((8, 8, 2), name="image")
    x = keras.layers.Conv2D(8, 3, padding="same", name="block0_conv")(image)
    x = keras.layers.BatchNormalization(name="block0_out")(x)
    inner = keras.layers.Conv2D(8, 3, padding="same", name="block1_conv")(x)
    inner = keras.layers.BatchNormalization(name="block1_norm")(inner)
    x = keras.layers.Add(name="block1_out")([x, keras.layers.ReLU(name="block1_relu")(inner)])
    x = keras.layers.Conv2D(8, 3, strides=2, padding="same", name="block2_conv")(x)
    x = keras.layers.BatchNormalization(name="block2_out")(x)
    thumbnail = keras.Sequential(
        [
            keras.Input((8, 8, 2)),
            keras.layers.AveragePooling2D(4),
            keras.layers.Flatten(),
            keras.layers.Dense(DIMS[-1]),
        ],
        name="thumbnail",
    )
    model = MatryoshkaClassifier(
        keras.Model(image, x, name="net"),
        _head(),
        pooling=keras.layers.GlobalAveragePooling2D(),
        exits=(thumbnail, "block0_out", "block1_norm"),
        name="images",
    )
    return with_fixed_weights(model, {"": IMAGES})


def texts() -> keras.Model:
    """A text backbone of keras-hub; its padding mask is an input that every segment reads."""
    backbone = bert()
    pooled = backbone.output["pooled_output"]
    model = MatryoshkaClassifier(
        keras.Model(backbone.input, pooled, name="bert"),
        _head(),
        exits=("embeddings_dropout", "transformer_layer_0"),
        name="texts",
    )
    return with_fixed_weights(model, TEXTS)


def vectors() -> keras.Model:
    """The smallest net of all: two dense layers and an exit between them."""
    x = keras.Input((5,), name="x")
    hidden = keras.layers.Dense(8, activation="tanh", name="first")(x)
    backbone = keras.Model(x, keras.layers.Dense(8, name="second")(hidden), name="net")
    return with_fixed_weights(
        MatryoshkaClassifier(backbone, _head(), exits=("first",), name="vectors"), {"": VECTORS}
    )


def encoder() -> keras.Model:
    """A tower with an exit, and without a head."""
    x = keras.Input((5,), name="x")
    hidden = keras.layers.Dense(8, activation="tanh", name="first")(x)
    tower = keras.Model(x, keras.layers.Dense(8, name="second")(hidden), name="tower")
    return with_fixed_weights(
        MatryoshkaEncoder(tower, exits=("first",), name="encoder"), {"": VECTORS}
    )


def all_logits(model: Any, rows: Any) -> dict[Key, Array]:
    """The logits of every exit and dim, by stage."""
    outputs = model.all_exits()(rows, training=False)
    names = (*model.exits, "last")
    by_exit = {name: np.asarray(keras.ops.convert_to_numpy(outputs[name])) for name in names}
    return stage_logits(by_exit, DIMS)


def halving(logits: dict[Key, Array], keys: list[Key], measure: str = "margin") -> CascadePolicy:
    """A cascade at each stage of which half of the rows stop that reach it."""
    stages = []
    unsure = np.arange(len(next(iter(logits.values()))))
    for position, (exit, dim) in enumerate(keys[:-1]):
        temperature = 1 + position / 4
        confidences = confidence_of(measure, logits[exit, dim][unsure], temperature)
        threshold = midway(np.sort(confidences), len(unsure) // 2)
        stages.append(Stage(dim, threshold, temperature, exit))
        unsure = unsure[confidences <= np.float32(threshold)]
    exit, dim = keys[-1]
    return CascadePolicy((*stages, Stage(dim, None, 1.5, exit)), measure)


def with_thresholds(policy: CascadePolicy, threshold: float) -> CascadePolicy:
    """The same stages with one threshold for all."""
    stages = [
        Stage(own.dim, None if own.threshold is None else threshold, own.temperature, own.exit)
        for own in policy.stages
    ]
    return CascadePolicy(tuple(stages), policy.confidence)
