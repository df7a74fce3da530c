"""`MatryoshkaEncoder`: one tower or two, trained on pairs, triplets or labels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import keras
from keras import ops

from .._tokens import takes_text
from ..losses import ContrastiveLoss, MatryoshkaEmbeddingLoss, SupervisedContrastiveLoss
from ..losses.candidates import check_candidates, check_ids
from ..losses.distillation import check_distillation
from ..losses.similarity import check_temperature
from ..losses.weights import _RowLoss
from ..text import check_preprocessor, shared_preprocessor
from ._shapes import (
    as_shapes,
    check_pooling,
    known_input_shape,
    named_without_package,
    output_shape,
    with_pooling,
)
from .exits import LAST, _AllExits, _ModelWithExits, plans_config, plans_from_config
from .sides import are_sides, sides_of

_LOSSES = (ContrastiveLoss, SupervisedContrastiveLoss, MatryoshkaEmbeddingLoss)
_MAX_LOG_SCALE = math.log(100.0)  # as in CLIP: below a temperature of 0.01 roundings are trained on


@named_without_package
@keras.saving.register_keras_serializable(package="keras_mrl")
class MatryoshkaEncoder(_ModelWithExits):
    """A model of embeddings that are compared by their prefixes.

    For a `ContrastiveLoss`, `fit` takes pairs `(anchors, positives)`, and after these any number of
    hard negatives, one more array each or `(batch, negatives, ...)` in one; or a dict of them under
    the keys `anchor`, `positive`, and `negative` or `negative_1`, `negative_2`, ... Labels beside
    them are the ids of the candidates, or a dict of `candidate_ids` and
    `candidate_sampling_probability`. A data set yields such inputs with or without labels and
    weights, or `(anchors, positives)` or `(anchors, positives, negatives)` themselves. For a
    `SupervisedContrastiveLoss`, `fit` takes inputs with labels. The log has `recall_<dim>` beside
    the loss: how often the nearest embedding of the batch is a right one.

    `predict` on inputs of one side returns embeddings of full width by `tower`, not scaled:
    `Truncate` takes a prefix and scales it to unit length. Positives and galleries go through
    `other_tower`: in `fit`, `keras_mrl.evaluation.evaluate` and `NeighborMetrics`, too. Both are
    plain Keras models, which can be saved on their own.

    Args:
        tower: Any Keras model from inputs to features `(batch, width)`. A tower of several inputs
            takes them as a dict.
        other_tower: A model of the same width for positives and negatives; None means `tower`.
        pooling: A layer from what a tower gives (a feature map, several tensors) to such features,
            after both towers where there are two; None if they give them themselves.
        initial_temperature: Start of a learned temperature, which replaces that of the loss; None
            means that it is not learned.
        exits: Where rows may leave before the end of a functional `tower`: see
            `MatryoshkaClassifier`. Each exit gives an embedding of the tower's width. `predict`
            answers with the last exit, `all_exits` with all. One tower only.
        preprocessor: A layer from strings to the tower's inputs, such as one of keras-hub; `fit`,
            `evaluate` and `predict` then take strings, too. None means that of the tower, if it is
            a `TextEncoder` or a task of keras-hub.
        **kwargs: Arguments of every Keras model (`name`, `dtype`).

    Shapes:
        Output: `(batch, width)`; of pairs `(batch, 2 + negatives, width)`.

    Raises:
        TypeError: If a tower is not a Keras model.
        ValueError: If a tower does not end in `(batch, width)`, the two differ in width or in how
            they tokenize, the
            temperature starts below 0.01, or the model is compiled with any other loss than one on
            embeddings, or with an accuracy.

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
        exits: Any = None,
        pooling: keras.layers.Layer | None = None,
        preprocessor: keras.layers.Layer | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for model in (tower, tower if other_tower is None else other_tower):
            if not isinstance(model, keras.layers.Layer):
                raise TypeError(
                    "The towers of a MatryoshkaEncoder are Keras models. "
                    f"Received: {model!r}. "
                    "Give any model from inputs to features, for example keras.Model(x, features)."
                )
        self.tower = tower
        self.other_tower = None if other_tower is tower else other_tower
        self._given_preprocessor = check_preprocessor(preprocessor)
        shared_preprocessor(preprocessor, self._text_parts())
        self.pooling = check_pooling(pooling)
        self.initial_temperature = initial_temperature
        self._take_exits(exits)
        if self.exits and other_tower is not None:
            raise ValueError(
                "The exits of a MatryoshkaEncoder are those of its one tower. "
                f"Received: exits={self.exits} and an other_tower. Leave one of both out."
            )
        self._distillation: float | None = None
        if initial_temperature is not None:
            start = -math.log(_check_initial_temperature(initial_temperature))
            self._log_scale = self.add_weight(
                name="log_scale",
                shape=(),
                initializer=keras.initializers.Constant(start),
                constraint=_bounded_log_scale,
                aggregation="mean",  # every replica writes the same value
            )
        # For `dims_per_step`: the same in every process, and so in every replica.
        self.seed_generator = keras.random.SeedGenerator(0)
        self._recall = {LAST: _Recall(())}
        is_one = self.other_tower is None
        shapes = [known_input_shape(model) for model in self._towers(1 if is_one else 2)]
        # A subclass may build what its constructor has yet to make.
        if None not in shapes and type(self).build is MatryoshkaEncoder.build:
            self.build(shapes[0] if is_one else shapes)

    _has_texts_as_labels = True  # pairs (anchors, positives)

    def _text_parts(self) -> tuple[Any, ...]:
        return (self.tower, self.other_tower)

    def parts(self, exit: str | None = None) -> tuple[keras.layers.Layer, None]:
        """Return the tower, with the pooling after it if there is one, and None: it has no head."""
        if exit not in (None, LAST):
            return self._exits_or_raise().backbone(str(exit)), None
        return with_pooling(self.tower, self.pooling), None

    def gallery_part(self) -> keras.layers.Layer | None:
        """Return the other tower, which galleries go through, pooled too; None of one tower."""
        if self.other_tower is None:
            return None
        return with_pooling(self.other_tower, self.pooling)

    def build(self, input_shape: Any) -> None:
        """Build the tower of every side."""
        shape = as_shapes(input_shape)
        shapes_by_side = sides_of(shape) or [shape]
        widths = [
            _width(self._features_shape(tower, side))
            for tower, side in zip(self._towers(len(shapes_by_side)), shapes_by_side, strict=True)
        ]
        if len(set(widths)) > 1:
            raise ValueError(
                "Both towers must give embeddings of one width. "
                f"Received: widths {widths[0]} and {widths[1]}. "
                "End them in layers of as many units."
            )
        if self._exit_plans and self._exits is None:
            self._make_exits(self.tower, self.pooling, widths[0])

    def _features_shape(self, tower: Any, input_shape: Any) -> Any:
        shape = output_shape(tower, input_shape)
        return shape if self.pooling is None else output_shape(self.pooling, shape)

    def _features(self, tower: Any, inputs: Any, training: bool | None) -> Any:
        features = tower(inputs, training=training)
        return features if self.pooling is None else self.pooling(features)

    def _towers(self, num_sides: int) -> list[Any]:
        other = self.tower if self.other_tower is None else self.other_tower
        return [self.tower, *[other] * (num_sides - 1)]

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Return embeddings, `(batch, width)`; of several sides, `(batch, sides, width)`.

        Within a step of a model with exits, the same of every exit by name.
        """
        sides = sides_of(inputs)
        if self._exits is not None:
            for side in [inputs] if sides is None else sides:
                self._exits.checked(side)
        within_step = self._steps and self._exits is not None
        if within_step:
            features = self._exits_or_raise().features
            if sides is None:
                return features(inputs, training=training)
            made = [features(side, training=training) for side in sides]
            return {name: ops.stack([own[name] for own in made], axis=1) for name in made[0]}
        if sides is None:
            return self._features(self.tower, inputs, training)
        towers = zip(self._towers(len(sides)), sides, strict=True)
        return ops.stack([self._features(*own, training) for own in towers], axis=1)

    def compute_output_shape(self, input_shape: Any) -> tuple[int | None, ...]:
        """Return `(batch, width)` or `(batch, sides, width)`."""
        sides = sides_of(input_shape)
        one_side = input_shape if sides is None else sides[0]
        batch, width = self._features_shape(self.tower, one_side)
        return (batch, width) if sides is None else (batch, len(sides), width)

    @property
    def temperature(self) -> Any:
        """The learned temperature, never below 0.01; None if it is not learned."""
        if self.initial_temperature is None:
            return None
        return ops.exp(-ops.convert_to_tensor(self._log_scale))

    @property
    def _has_own_steps(self) -> bool:
        return self._exits is not None

    def compile(
        self,
        optimizer: Any = "rmsprop",
        loss: Any = None,
        *,
        distillation: float | None = None,
        **kwargs: Any,
    ) -> None:
        """Compile as Keras does, with one of the losses on embeddings.

        With exits, the loss is the sum over the exits, that of the last exit twice.

        Args:
            optimizer: As of `keras.Model.compile`.
            loss: A contrastive loss, or a `MatryoshkaEmbeddingLoss`.
            distillation: Weight of the divergence of the similarities that an early exit gives to
                the rows of a batch, from those of the last exit at its widest dim. No gradient of
                it reaches the last exit. None means 1 with a contrastive loss.
            **kwargs: As of `keras.Model.compile`.
        """
        if not isinstance(loss, _LOSSES):
            names = ", ".join(kind.__name__ for kind in _LOSSES)
            raise ValueError(
                f"MatryoshkaEncoder trains on one of {names}. "
                f"Received: loss={loss!r}. Give for example ContrastiveLoss(dims=(8, 16, 32))."
            )
        _refuse_accuracy([kwargs.get("metrics"), kwargs.get("weighted_metrics")])
        super().compile(optimizer, loss, **kwargs)
        has_hits = not isinstance(loss, MatryoshkaEmbeddingLoss)
        self._distillation = distillation
        self._teaching = _teaching_weight(distillation, has_hits, bool(self.exits))
        dims = loss.trained_dims if has_hits else ()
        self._recall = {LAST: _Recall(dims)}
        if self._exits is not None:
            for name, short in self._exits.short_names.items():
                self._recall[name] = _Recall(dims, f"recall_{short}")
        self._modes = {own.stem: "max" for own in self._recall.values()}

    @property
    def metrics(self) -> list[Any]:
        """Keras's own, and one recall per exit and dim of the compiled loss."""
        return [*super().metrics, *(mean for own in self._recall.values() for mean in own.means)]

    @takes_text
    def fit(self, x: Any = None, y: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train as `keras.Model.fit` does; raise for weights and ids that mean something else."""
        self._check_data(x, y, kwargs.get("sample_weight"))
        if isinstance(self.loss, SupervisedContrastiveLoss):
            check_ids("Labels", y, kinds="biuf")
        return super().fit(x, y, *args, **kwargs)

    @takes_text
    def evaluate(self, x: Any = None, y: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as `keras.Model.evaluate` does; raise for weights and ids as `fit` does."""
        self._check_data(x, y, kwargs.get("sample_weight"))
        return super().evaluate(x, y, *args, **kwargs)

    def train_step(self, *state_and_batch: Any) -> Any:
        """Train on a batch as Keras does, of pairs alone, too."""
        *state, batch = state_and_batch
        return super().train_step(*state, self._inputs_first(batch))

    def test_step(self, *state_and_batch: Any) -> Any:
        """Evaluate a batch as Keras does, of pairs alone, too."""
        *state, batch = state_and_batch
        return super().test_step(*state, self._inputs_first(batch))

    def _inputs_first(self, batch: Any) -> Any:
        """Return a batch as Keras has it, inputs first: `(anchors, positives)` are all inputs."""
        if not isinstance(getattr(self, "loss", None), ContrastiveLoss):
            return batch
        is_sequence = isinstance(batch, (tuple, list))
        parts = [part for part in batch if part is not None] if is_sequence else []
        if len(parts) > 3:
            raise ValueError(
                "Keras reads at most three parts of a batch of a data set. "
                f"Received: {len(parts)}, anchors, positives and {len(parts) - 2} negatives. "
                "Yield them as the one part that they are: ((anchors, positives, *negatives),)."
            )
        return (tuple(parts),) if len(parts) > 1 and not are_sides(parts[0]) else batch

    def _check_data(self, x: Any, y: Any, sample_weight: Any) -> None:
        """Raise for weights and ids in memory that would not mean what they say."""
        if self._exits is not None:  # before a step, in which JAX has taken the weights out
            sides = x.values() if isinstance(x, Mapping) else x
            for side in sides if are_sides(x) else [x]:
                self._exits.checked(side)
        _check_weights(x, y, sample_weight)
        if not isinstance(self.loss, ContrastiveLoss) or y is None:
            return
        if are_sides(x):
            check_candidates(y)
        elif sample_weight is not None:
            raise ValueError(
                "Keras passes sample weights beside inputs and labels. "
                "Received: anchors as x, positives as y, and sample_weight. "
                "Give x=(anchors, positives) and y=candidate_ids."
            )

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        """Return the loss of the batch, and add its recalls to the log."""
        data = self._inputs_first((x, y, sample_weight))
        if len(data) == 1:  # before the first step Keras tries the loss on a batch as it came
            y_pred, y, sample_weight = self(data[0], training=training), None, None
        seed = self.seed_generator if training else None
        outputs = y_pred if isinstance(y_pred, dict) else {LAST: y_pred}
        total: Any = 0.0
        for name, embeddings in outputs.items():
            losses, hits = self.loss.measure(y, embeddings, seed, self.temperature)
            if hits is not None:
                self._recall[name].add(hits)
            total = total + (losses if name != LAST or len(outputs) == 1 else 2 * losses)
            if name != LAST and self._teaching:
                divergences = self.loss.divergences(embeddings, outputs[LAST], self.temperature)
                total = total + self._teaching * divergences
        reduced_loss = _RowLoss(lambda losses, _: losses, self.loss)
        return reduced_loss(total, outputs[LAST], sample_weight=sample_weight) + sum(self.losses)

    def compute_metrics(
        self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None
    ) -> dict[str, Any]:
        """Return the log of a step; metrics of the caller's own are given the last exit."""
        last = y_pred[LAST] if isinstance(y_pred, dict) else y_pred
        return super().compute_metrics(x, y, last, sample_weight)

    def get_compile_config(self) -> Any:
        """Return the arguments of `compile`."""
        config = super().get_compile_config()
        return {**config, "distillation": self._distillation} if config else config

    def at(self, dim: int, exit: str | None = None) -> keras.Model:
        """Return a plain Keras model from inputs to the first `dim` coordinates of an exit.

        It shares the layers of the tower, and holds none behind the exit.

        Args:
            dim: How many coordinates.
            exit: Name of the exit; None means the last.

        Raises:
            ValueError: If there is no such exit, or the embedding is narrower.
        """
        features = self._exits_or_raise().backbone(LAST if exit is None else exit)
        if not 0 < dim <= features.output_shape[-1]:
            raise ValueError(
                f"dim must lie in 1..{features.output_shape[-1]}, the width of the embedding. "
                f"Received: dim={dim!r}. Give a smaller one."
            )
        return keras.Model(
            features.input, features.output[..., :dim], name=f"{self.name}_{exit or LAST}_{dim}"
        )

    def all_exits(self) -> keras.Model:
        """Return a Keras model that answers with all exits: `{exit: embeddings (batch, width)}`.

        Raises:
            ValueError: If the model has no exits.
        """
        features = self._exits_or_raise().features
        return _AllExits(features.input, features.output, name=f"{self.name}_all_exits")

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make this model again."""
        shared = _shared_layers(self.tower, self.other_tower)
        return {
            **super().get_config(),
            "tower": keras.saving.serialize_keras_object(self.tower),
            "other_tower": keras.saving.serialize_keras_object(self.other_tower),
            "pooling": keras.saving.serialize_keras_object(self.pooling),
            "preprocessor": keras.saving.serialize_keras_object(self._given_preprocessor),
            "initial_temperature": self.initial_temperature,
            **({"shared_layers": shared} if shared else {}),
            "exits": plans_config(self._exit_plans) or None,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        """Make the model again."""
        parts = {
            name: keras.saving.deserialize_keras_object(config.get(name), custom_objects)
            for name in ("tower", "other_tower", "pooling", "preprocessor")
        }
        config = {**config, **parts}
        shared = {name: parts["tower"].get_layer(name) for name in config.pop("shared_layers", ())}
        if shared:  # Keras has made each of them twice
            config["other_tower"] = keras.models.clone_model(
                parts["other_tower"], clone_function=lambda own: shared.get(own.name, own)
            )
        config["exits"] = plans_from_config(config.get("exits"), custom_objects) or None
        return cls(**config)


class _Recall:
    """One mean per dim; Keras does not track this object, so `compile` may replace it."""

    def __init__(self, dims: tuple[int, ...], stem: str = "recall") -> None:
        self.stem = stem
        self.means = [keras.metrics.Mean(name=f"{stem}_{dim}") for dim in dims]

    def add(self, hits: Any) -> None:
        for index, mean in enumerate(self.means):
            mean.update_state(hits[index])


def _teaching_weight(distillation: float | None, is_contrastive: bool, has_exits: bool) -> float:
    """Return the weight of the divergence from the last exit."""
    if distillation is None:
        return float(is_contrastive)
    check_distillation(distillation)
    if distillation and not (is_contrastive and has_exits):
        raise ValueError(
            "Exits learn from the similarities that the last exit gives to a batch. "
            f"Received: distillation={distillation!r} "
            + ("with a MatryoshkaEmbeddingLoss." if has_exits else "for a model without exits.")
            + " Leave distillation out."
        )
    return float(distillation)


def _bounded_log_scale(log_scale: Any) -> Any:
    """Constrain the variable: a bound inside the loss would have no gradient to return by."""
    return ops.minimum(log_scale, _MAX_LOG_SCALE)


def _check_initial_temperature(temperature: float) -> float:
    if check_temperature(temperature) < 0.01:
        raise ValueError(
            "initial_temperature must be at least 0.01, the least that is learned. "
            f"Received: initial_temperature={temperature!r}. Give for example 0.07."
        )
    return float(temperature)


def _check_weights(x: Any, y: Any, sample_weight: Any) -> None:
    """Raise for weights that Keras would ignore; those beside a data set Keras itself refuses."""
    if isinstance(x, (tuple, list, dict)) and y is None and sample_weight is not None:
        raise ValueError(
            "Keras passes sample weights only beside labels. "
            "Received: sample_weight without y. "
            "Give candidate ids: y=numpy.arange(len(anchors)) where no positive stands twice."
        )


def _refuse_accuracy(metrics: Any) -> None:
    for metric in keras.tree.flatten(metrics):
        if isinstance(metric, str) and metric in ("accuracy", "acc"):
            raise ValueError(
                "MatryoshkaEncoder gives embeddings and no classes, so it has no accuracy. "
                f"Received: the metric {metric!r}. "
                "Leave it out: a contrastive loss logs recall_<dim> by itself."
            )


def _shared_layers(tower: Any, other_tower: Any) -> list[str]:
    """Return the names of layers that both towers hold; raise if a file could not say so."""
    if other_tower is None:
        return []
    others = {id(layer) for layer in other_tower._flatten_layers()}
    shared = [layer for layer in tower._flatten_layers() if id(layer) in others]
    nameable = [
        {id(own): own for own in getattr(part, "layers", ()) if hasattr(part, "inputs")}
        for part in (tower, other_tower)
    ]
    named = [own for key, own in nameable[0].items() if key in nameable[1]]
    inner = {id(part) for own in named for part in own._flatten_layers()}
    hidden = [layer.name for layer in shared if id(layer) not in inner]
    if hidden:
        raise ValueError(
            "A file can say that towers share a layer if it is a layer of both functional models. "
            f"Received: {', '.join(map(repr, hidden))}, inside of a layer or of a subclass. "
            "Call it in both towers itself: keras.Model(inputs, ...)."
        )
    return [own.name for own in named if own.weights]


def _width(shape: Any) -> Any:
    """Return the width of embeddings of this shape; raise if it is not `(batch, width)`."""
    if not isinstance(shape, tuple) or len(shape) != 2 or isinstance(shape[0], tuple):
        raise ValueError(
            "A tower must end in embeddings (batch, width). "
            f"Received: a tower whose output is {shape}. "
            "Give pooling=, a layer that makes them of it: "
            "pooling=keras.layers.GlobalAveragePooling2D()."
        )
    return shape[1]
