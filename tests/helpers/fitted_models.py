"""One small model of every kind that `fit` accepts, with what NumPy says of its outputs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from keras import layers

from keras_mrl import (
    MatryoshkaClassifier,
    MatryoshkaEncoder,
    MatryoshkaHead,
    MatryoshkaLoss,
    MatryoshkaMetric,
    SupervisedContrastiveLoss,
)
from keras_mrl.baselines import slimmable
from tests.helpers import two_towers as shop
from tests.helpers.language_models import NEXT, READ, language_model
from tests.helpers.nested_models import Own, two_heads

Array = npt.NDArray[Any]

DIMS, WIDTH, CLASSES = (2, 4, 8), 8, 4
X = np.random.default_rng(0).normal(size=(48, 5)).astype("float32")
IDS = X[:, :CLASSES].argmax(axis=1)
SEVERAL = (X[:, :CLASSES] > 0).astype("float32")
VALUES = X[:, :2] + 0.5


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of model.

    Args:
        make: Makes the compiled model.
        x: Rows, as `fit` takes them.
        y: Their labels or values.
        activation: What the outputs of the head are; None without a head.
        features: Makes the features of `x`, `(rows, width)`, from the weights of a model; None
            takes those of the one dense layer named "body".
        scale: What rows are multiplied by before that layer.
        output: Which of several outputs is cut, judged and exported.
        head: What the name of the head begins with, if there are several.
        log: What the log of `fit` has of dim 2.
        queries: Rows with class ids, `(x, y)`, as `evaluate` and `NeighborMetrics` take them.
        gallery: The same, to look for neighbours among.
        is_pairs: Whether `x` is pairs of two sides, of which the gallery is the other one.
        is_topped: Whether the model ends in a softmax after its head.
        sums_dims: Whether the loss is the sum over the dims of one head.
        refused: Laws of `rooms` that the model is refused by, with a part of the sentence.
    """

    make: Callable[[], keras.Model]
    x: Any = field(default_factory=lambda: X)
    y: Any = field(default_factory=lambda: IDS)
    activation: str | None = "softmax"
    features: Callable[[keras.Model, Any], Array] | None = None
    scale: float = 1.0
    output: str | None = None
    head: str = ""
    log: str = "accuracy_2"
    queries: tuple[Any, Array] = (X[:24], IDS[:24])
    gallery: tuple[Any, Array] = (X[24:], IDS[24:])
    is_pairs: bool = False
    is_topped: bool = False
    sums_dims: bool = True
    refused: Mapping[str, str] = field(default_factory=dict)

    def new(self) -> keras.Model:
        """The model, with the same weights every time."""
        keras.utils.set_random_seed(1)
        return self.make()

    @property
    def rows(self) -> int:
        return len(keras.tree.flatten(self.x)[0])

    @property
    def one_side(self) -> Any:
        """Rows as the finished model takes them."""
        return self.x[0] if self.is_pairs else self.x

    @property
    def other_sample(self) -> dict[str, Any]:
        rows = keras.tree.map_structure(lambda rows: rows[:8], self.gallery[0])
        return {"other_sample": rows} if self.is_pairs else {}

    @property
    def output_only(self) -> dict[str, Any]:
        return {} if self.output is None else {"output": self.output}

    @property
    def of_output(self) -> str:
        """What entries of the log begin with, where rows are validated."""
        return "val_" if self.output is None else f"val_{self.output}_"

    def misfit(self) -> tuple[Any, Any]:
        """Rows and labels of which no step can be made."""
        if self.y is None:
            return (self.x[0][:, 1:], *self.x[1:]), None
        return self.x, keras.tree.map_structure(of_seven_classes, self.y)

    def expected_features(self, model: keras.Model, x: Any = None) -> Array:
        """Those of `x`, in float64, from the weights."""
        x = self.one_side if x is None else x
        if self.features is not None:
            return self.features(model, x)
        return dense(layer_named(model, "body"), self.scale * x)

    def expected_sides(self, model: keras.Model) -> tuple[Array, Array]:
        """The features of the queries and of the gallery."""
        queries, gallery = self.queries[0], self.gallery[0]
        if self.is_pairs:
            return self.expected_features(model, queries), shop.item_embeddings(model, gallery)
        return self.expected_features(model, queries), self.expected_features(model, gallery)

    def expected_outputs(self, model: keras.Model, dim: int) -> Array:
        """The outputs of the head at one dim for `x`, in float64, from the weights."""
        heads = [own for own in model._flatten_layers() if isinstance(own, MatryoshkaHead)]
        if not heads:  # Keras's own, of layers that this file does not redo in NumPy
            return as_numpy(model(self.x))[..., DIMS.index(dim), :]
        head = next(head for head in heads if head.name.startswith(self.head))
        kernels, biases = head.parameters()
        index = 0 if head.tied else DIMS.index(dim)
        kernel, bias = as_numpy(kernels[index])[:dim], as_numpy(biases[index])
        return self.expected_features(model)[..., :dim] @ kernel + bias


def of_seven_classes(labels: Array) -> Array:
    """One-hot rows of a class that no model has, or too many labels a row."""
    return np.zeros((*(labels.shape if labels.dtype.kind == "i" else labels.shape[:-1]), 7))


def layer_named(model: keras.Model, name: str) -> Any:
    return next(layer for layer in model._flatten_layers() if layer.name == name)


def as_numpy(tensor: Any) -> Array:
    return np.asarray(keras.ops.convert_to_numpy(tensor), "float64")


def body(named_input: bool = True) -> keras.Model:
    before = [keras.Input((5,), name="x")] if named_input else []
    return keras.Sequential([*before, layers.Dense(WIDTH, name="body")])


def nested(outputs: int = CLASSES, **arguments: Any) -> MatryoshkaClassifier:
    return MatryoshkaClassifier(body(), MatryoshkaHead(outputs, DIMS), **arguments)


def functional(**head: Any) -> keras.Model:
    inputs = keras.Input((5,), name="x")
    features = layers.Dense(WIDTH, name="body")(inputs)
    return keras.Model(inputs, MatryoshkaHead(CLASSES, DIMS, **head)(features), name="plain")


def compiled(model: keras.Model, loss: Any, metrics: Any) -> keras.Model:
    model.compile(keras.optimizers.SGD(0.5), loss, metrics=metrics)
    return model


def trained_on_ids(model: keras.Model, from_logits: bool = True) -> keras.Model:
    """Compiled as any model that ends in a head may be."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=from_logits)
    accuracy = keras.metrics.SparseCategoricalAccuracy(name="accuracy")
    return compiled(model, MatryoshkaLoss(loss), [MatryoshkaMetric(accuracy, DIMS)])


def own() -> keras.Model:
    model = Own()
    model(X)
    return model


def with_exits() -> keras.Model:
    inputs = keras.Input((5,), name="x")
    early = layers.Dense(6, activation="relu", name="early")(inputs)
    backbone = keras.Model(inputs, layers.Dense(WIDTH, name="body")(early))
    return MatryoshkaClassifier(
        backbone, MatryoshkaHead(CLASSES, DIMS, name="last"), exits=("early",), name="exits"
    )


def of_two_layers(model: keras.Model, x: Array) -> Array:
    return dense(layer_named(model, "body"), np.maximum(dense(layer_named(model, "early"), x), 0))


def late() -> keras.Model:
    """Its input is known at the first `fit`, and not before."""
    head = MatryoshkaHead(CLASSES, DIMS)
    return MatryoshkaClassifier(body(named_input=False), head, name="late")


def around(model: keras.Model) -> keras.Model:
    before = [keras.Input((5,), name="x"), layers.Rescaling(0.5)]
    return keras.Sequential([*before, model], name="around")


def softmax_on_top() -> keras.Model:
    model = functional()
    return keras.Model(model.input, layers.Softmax(name="shares")(model.output), name="topped")


def several_outputs() -> keras.Model:
    model = two_heads()
    sparse = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    accuracy = keras.metrics.SparseCategoricalAccuracy(name="accuracy")
    metrics = {name: [MatryoshkaMetric(accuracy, DIMS)] for name in ("digit", "odd")}
    losses = {name: MatryoshkaLoss(sparse) for name in ("digit", "odd")}
    return compiled(model, losses, metrics)


def encoder() -> keras.Model:
    model = MatryoshkaEncoder(body(), name="encoder")
    return compiled(model, SupervisedContrastiveLoss(DIMS, temperature=0.2), None)


def towers() -> keras.Model:
    return shop.two_towers(epochs=0)


def dense(layer: keras.layers.Layer, rows: Array) -> Array:
    """What a dense layer makes of rows, in float64."""
    kernel, bias = map(as_numpy, layer.weights)
    return rows @ kernel + bias


def of_keras(model: keras.Model, x: Any) -> Array:
    """Features of a model whose layers this file does not redo in NumPy."""
    return as_numpy(model.backbone(x))


SPARSE = "sparse_categorical_crossentropy"
NO_HEAD = "Only a model that ends in a MatryoshkaHead can be cut to a dim."
NO_VECTOR = "of a language model take next_token(model), or judge its tokens by score_tokens."
AFTER_HEAD = "Leave it out: model = keras.Model(model.input, model.get_layer('shares').input)."

KINDS: dict[str, Kind] = {
    "classifier": Kind(make=lambda: compiled(nested(name="mrl"), SPARSE, ["accuracy"])),
    "tied": Kind(make=lambda: trained_on_ids(functional(tied=True))),
    "late": Kind(make=lambda: compiled(late(), SPARSE, ["accuracy"])),
    "several classes": Kind(
        make=lambda: compiled(nested(name="tags"), "binary_crossentropy", ["accuracy"]),
        y=SEVERAL,
        activation="sigmoid",
    ),
    "values": Kind(
        make=lambda: compiled(nested(2, name="prices"), "mse", ["mae"]),
        y=VALUES,
        activation="none",
        log="mae_2",
    ),
    "around": Kind(
        make=lambda: trained_on_ids(around(nested(name="inner"))),
        scale=0.5,
    ),
    "class of a user's": Kind(
        make=lambda: trained_on_ids(own()),
        y=IDS % 3,
        features=lambda model, x: dense(model.body, x / 2),
    ),
    "exits": Kind(
        make=lambda: compiled(with_exits(), SPARSE, ["accuracy"]),
        features=of_two_layers,
        head="last",
        sums_dims=False,
    ),
    "several outputs": Kind(
        make=several_outputs,
        y={"digit": IDS % 3, "odd": IDS % 2},
        features=lambda model, x: dense(model.layers[1], x),
        output="digit",
        head="digit",
        log="digit_accuracy_2",
    ),
    "language model": Kind(
        make=lambda: compiled(language_model(name="language"), SPARSE, ["accuracy"]),
        x=READ,
        y=NEXT,
        features=of_keras,
        refused={
            "evaluate_is_numpy_s": NO_VECTOR,
            "neighbors_are_numpy_s": NO_VECTOR,
            "parts_are_numpy_s": NO_VECTOR,
            "served_is_numpy_s": "of a language model export next_token(model).",
        },
    ),
    "encoder": Kind(
        make=encoder, activation=None, log="recall_2", refused={"cut_is_numpy_s": NO_HEAD}
    ),
    "two towers": Kind(
        make=towers,
        x=shop.PAIRS,
        y=None,
        activation=None,
        features=shop.user_embeddings,
        log="recall_2",
        queries=(shop.USERS, shop.USER_TASTES),
        gallery=(shop.ITEMS, shop.ITEM_TASTES),
        is_pairs=True,
        refused={"cut_is_numpy_s": NO_HEAD},
    ),
    "softmax on top": Kind(
        make=lambda: trained_on_ids(softmax_on_top(), from_logits=False),
        is_topped=True,
        refused=dict.fromkeys(
            (
                "evaluate_is_numpy_s",
                "neighbors_are_numpy_s",
                "cut_is_numpy_s",
                "parts_are_numpy_s",
                "served_is_numpy_s",
            ),
            AFTER_HEAD,
        ),
    ),
    "slimmable": Kind(
        make=lambda: trained_on_ids(slimmable(body(), CLASSES, DIMS)),
        refused={
            "evaluate_is_numpy_s": "An embedding is one vector a row",
            "neighbors_are_numpy_s": "An embedding is one vector a row",
            "cut_is_numpy_s": NO_HEAD,
            "parts_are_numpy_s": "An embedding is one vector a row",
            "served_is_numpy_s": "A model is exported with features of shape (batch, width).",
        },
    ),
}
