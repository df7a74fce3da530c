"""One tower or two, trained on pairs, triplets or labels so that the embeddings nest."""

from __future__ import annotations

import math
from typing import Any

import keras
from keras import ops

from ..losses import ContrastiveLoss, MatryoshkaEmbeddingLoss, SupervisedContrastiveLoss
from ..losses.similarity import check_temperature
from ..losses.weights import step_loss
from .classifier import _as_shapes, _output_shape

_SIDES = ("anchor", "positive", "negative")
_LOSSES = (ContrastiveLoss, SupervisedContrastiveLoss, MatryoshkaEmbeddingLoss)
_SHARPEST = math.log(100.0)  # as in CLIP: a temperature below 0.01 trains on rounding


@keras.saving.register_keras_serializable(package="keras_mrl")
class MatryoshkaEncoder(keras.Model):
    """A model that gives embeddings, to be compared by their prefixes.

    `fit` takes pairs `(anchors, positives)`, triplets `(anchors, positives, negatives)`, or a dict
    of them under the keys `anchor`, `positive` and `negative`, for a `ContrastiveLoss`; and inputs
    with labels for a `SupervisedContrastiveLoss`. The log has `recall_<dim>` beside the loss: how
    often the nearest embedding of the batch is a right one.

    `predict` on inputs that are no pair gives embeddings, of all coordinates and no fixed length:
    `Truncate` takes a prefix of unit length. `tower` and `other_tower` are plain Keras models, to
    be exported and saved on their own.

    Args:
        tower: Any Keras model from inputs to features `(batch, width)`. One of several inputs
            takes them as a dict.
        other_tower: A model of the same width for positives and negatives; None means `tower`.
        initial_temperature: Where a learned temperature starts, in place of the loss's own; None
            leaves the loss its own.
        **kwargs: What every Keras model takes (`name`, `dtype`).

    Shapes:
        Output: `(batch, width)`; of pairs `(batch, 2, width)`, of triplets `(batch, 3, width)`.

    Raises:
        TypeError: If a tower is not a Keras model.
        ValueError: If a tower does not end in `(batch, width)`, the two differ in width, the
            temperature starts below 0.01, or the model is compiled with a loss that is none of
            these or with an accuracy.

    Examples:
        >>> tower = keras.Sequential([keras.Input((20,)), keras.layers.Dense(16)])
        >>> encoder = MatryoshkaEncoder(tower, initial_temperature=0.07)
        >>> encoder.compile("adam", ContrastiveLoss(dims=(4, 8, 16), symmetric=True))
        >>> views = np.ones((6, 20)), np.ones((6, 20))
        >>> sorted(encoder.fit(x=views, verbose=0).history)
        ['loss', 'recall_16', 'recall_4', 'recall_8']
        >>> encoder.predict(views[0], verbose=0).shape
        (6, 16)
    """

    def __init__(
        self,
        tower: keras.layers.Layer,
        other_tower: keras.layers.Layer | None = None,
        *,
        initial_temperature: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for given in (tower, tower if other_tower is None else other_tower):
            if not isinstance(given, keras.layers.Layer):
                raise TypeError(
                    "The towers of a MatryoshkaEncoder are Keras models. "
                    f"Received: {given!r}. "
                    "Give any model from inputs to features, for example keras.Model(x, features)."
                )
        self.tower = tower
        self.other_tower = other_tower
        self.initial_temperature = initial_temperature
        if initial_temperature is not None:
            start = -math.log(_check_initial(initial_temperature))
            self._log_scale = self.add_weight(
                name="log_scale",
                shape=(),
                initializer=keras.initializers.Constant(start),
                constraint=_no_sharper,
                aggregation="mean",  # replicas write what the constraint returns, all the same
            )
        # What `dims_per_step` draws from. The same in every process, so in every replica.
        self.seed_generator = keras.random.SeedGenerator(0)
        self._recall = _Recall(())

    def build(self, input_shape: Any) -> None:
        """Build every tower on its side."""
        shape = _as_shapes(input_shape)
        sides = _sides(shape) or [shape]
        widths = [
            _checked(_output_shape(tower, side))[1]
            for tower, side in zip(self._towers(len(sides)), sides, strict=True)
        ]
        if len(set(widths)) > 1:
            raise ValueError(
                "Both towers must give embeddings of one width. "
                f"Received: widths {widths[0]} and {widths[1]}. "
                "End them in layers of as many units."
            )

    def _towers(self, num_sides: int) -> list[Any]:
        other = self.tower if self.other_tower is None else self.other_tower
        return [self.tower, *[other] * (num_sides - 1)]

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Return the embeddings of all sides, stacked; those of inputs that are no pair as such."""
        sides = _sides(inputs)
        if sides is None:
            return self.tower(inputs, training=training)
        towers = self._towers(len(sides))
        return ops.stack(
            [tower(side, training=training) for tower, side in zip(towers, sides, strict=True)],
            axis=1,
        )

    def compute_output_shape(self, input_shape: Any) -> tuple[int | None, ...]:
        """Return `(batch, width)` or `(batch, sides, width)`."""
        sides = _sides(input_shape)
        batch, width = _output_shape(self.tower, input_shape if sides is None else sides[0])
        return (batch, width) if sides is None else (batch, len(sides), width)

    @property
    def temperature(self) -> Any:
        """The learned temperature, never below 0.01; None where the loss's own holds."""
        if self.initial_temperature is None:
            return None
        return ops.exp(-ops.convert_to_tensor(self._log_scale))

    def compile(self, optimizer: Any = "rmsprop", loss: Any = None, **kwargs: Any) -> None:
        """Compile as Keras does, with one of the losses on nested embeddings."""
        if not isinstance(loss, _LOSSES):
            names = ", ".join(kind.__name__ for kind in _LOSSES)
            raise ValueError(
                f"MatryoshkaEncoder trains on one of {names}. "
                f"Received: loss={loss!r}. Give for example ContrastiveLoss(dims=(8, 16, 32))."
            )
        _refuse_accuracy([kwargs.get("metrics"), kwargs.get("weighted_metrics")])
        super().compile(optimizer, loss, **kwargs)
        knows_hits = not isinstance(loss, MatryoshkaEmbeddingLoss)
        self._recall = _Recall(loss.trained_dims if knows_hits else ())

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compile a loaded model as it was compiled."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.built:
            self.optimizer.build(self.trainable_variables)

    @property
    def metrics(self) -> list[Any]:
        """Keras's own, and one recall per dim of the compiled loss."""
        return [*super().metrics, *self._recall.means]

    def fit(self, x: Any = None, y: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train as `keras.Model.fit` does, but ignore no weights."""
        _check_weights(x, y, kwargs.get("sample_weight"))
        return super().fit(x, y, *args, **kwargs)

    def evaluate(self, x: Any = None, y: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as `keras.Model.evaluate` does, but ignore no weights."""
        _check_weights(x, y, kwargs.get("sample_weight"))
        return super().evaluate(x, y, *args, **kwargs)

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        """Return the loss of the batch, and add its recalls to the log."""
        del x
        seed = self.seed_generator if training else None
        rows, hits = self.loss.measure(y, y_pred, seed, self.temperature)
        if hits is not None:
            self._recall.add(hits)
        reduced = step_loss(lambda rows, _: rows, self.loss)
        return reduced(rows, y_pred, sample_weight=sample_weight) + sum(self.losses)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make this model again."""
        return {
            **super().get_config(),
            "tower": keras.saving.serialize_keras_object(self.tower),
            "other_tower": keras.saving.serialize_keras_object(self.other_tower),
            "initial_temperature": self.initial_temperature,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        """Make the model again."""
        towers = {
            name: keras.saving.deserialize_keras_object(config[name], custom_objects)
            for name in ("tower", "other_tower")
        }
        return cls(**{**config, **towers})


class _Recall:
    """One mean per dim. Keras tracks no such object, so `compile` may replace it."""

    def __init__(self, dims: tuple[int, ...]) -> None:
        self.means = [keras.metrics.Mean(name=f"recall_{dim}") for dim in dims]

    def add(self, hits: Any) -> None:
        for index, mean in enumerate(self.means):
            mean.update_state(hits[index])


def _no_sharper(log_scale: Any) -> Any:
    """A constraint, as a bound inside the loss would leave no gradient to come back by."""
    return ops.minimum(log_scale, _SHARPEST)


def _check_initial(temperature: float) -> float:
    if check_temperature(temperature) < 0.01:
        raise ValueError(
            "initial_temperature must be at least 0.01, the least that is learned. "
            f"Received: initial_temperature={temperature!r}. Give for example 0.07."
        )
    return float(temperature)


def _check_weights(x: Any, y: Any, sample_weight: Any) -> None:
    """Refuse weights that Keras would drop; beside a dataset it refuses them itself."""
    if isinstance(x, (tuple, list, dict)) and y is None and sample_weight is not None:
        raise ValueError(
            "Keras passes sample weights only beside labels. "
            "Received: sample_weight without y. "
            "Give y=np.zeros(len(anchors)), which ContrastiveLoss does not read."
        )


def _refuse_accuracy(metrics: Any) -> None:
    for metric in keras.tree.flatten(metrics):
        if isinstance(metric, str) and metric in ("accuracy", "acc"):
            raise ValueError(
                "MatryoshkaEncoder gives embeddings and no classes, so it has no accuracy. "
                f"Received: the metric {metric!r}. "
                "Leave it out: a contrastive loss logs recall_<dim> by itself."
            )


def _sides(inputs: Any) -> list[Any] | None:
    """The sides of a pair or triplet (or of its shapes); None of anything else."""
    if isinstance(inputs, dict):
        if not set(inputs) & set(_SIDES):
            return None
        if set(inputs) not in (set(_SIDES[:2]), set(_SIDES)):
            raise ValueError(
                "A dict of sides has the keys anchor and positive, or these and negative. "
                f"Received: {', '.join(map(str, inputs))}. Rename or add what differs."
            )
        return [inputs[side] for side in _SIDES if side in inputs]
    is_shape = isinstance(inputs, (list, tuple)) and all(
        entry is None or isinstance(entry, int) for entry in inputs
    )
    if not isinstance(inputs, (list, tuple)) or is_shape:
        return None
    if len(inputs) not in (2, 3):
        raise ValueError(
            "A list of inputs is a pair (anchors, positives) or a triplet with negatives. "
            f"Received: {len(inputs)} inputs. Give a tower of several inputs a dict of them."
        )
    return list(inputs)


def _checked(shape: Any) -> Any:
    if not isinstance(shape, tuple) or len(shape) != 2:
        raise ValueError(
            "A tower must end in embeddings (batch, width). "
            f"Received: a tower whose output is {shape}. "
            "Add a pooling layer, e.g. keras.layers.GlobalAveragePooling2D()."
        )
    return shape
