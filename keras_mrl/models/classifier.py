"""`MatryoshkaClassifier`: any Keras model as backbone, with a nested head.

Where loss and metrics allow it, a training step goes from features to loss and metrics without the
logits of the batch (`RowwiseStep`). `train_step` and `test_step` count themselves in `_steps`, and
while one runs, `call` returns the features and not the logits.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import keras
from keras import ops

from .._tokens import takes_text
from ..layers import MatryoshkaHead
from ..layers.head import warn_frozen, with_embedding_of
from ..losses import MatryoshkaLoss
from ..losses.matryoshka import check_form_of_batch, check_labels
from ..metrics import MatryoshkaMetric
from ..text import check_preprocessor
from ._compiled import NestedMetrics, nested_loss, nested_metrics
from ._shapes import (
    as_shapes,
    check_pooling,
    known_input_shape,
    named_without_package,
    output_shape,
    with_pooling,
)
from .cut import cut
from .exit_training import ExitTraining, distillation_weight, pair_weights
from .exits import LAST, _AllExits, _ModelWithExits, plans_config, plans_from_config
from .rowwise import RowwiseStep, logits_of_no_row, num_replicas, rowwise_step


@named_without_package
@keras.saving.register_keras_serializable(package="keras_mrl")
class MatryoshkaClassifier(_ModelWithExits):
    """A backbone that makes features, and a `MatryoshkaHead` that reads their prefixes.

    `call` and `predict` return the logits of every dim. Compile it with a loss and metrics of
    Keras, which it counts at every dim, and train it with `fit`. `cut`, `split` and the export also
    take a functional model that ends in a `MatryoshkaHead`.

    Args:
        backbone: Any Keras model from the inputs to features `(batch, width)`, or
            `(batch, time, width)` for sequences. Once its shapes are known, the head is built.
        head: The nested head.
        pooling: A layer from what the backbone gives (a feature map, several tensors) to such
            features; None if it gives them itself.
        exits: Where rows may leave before the end of a functional backbone, shallow to deep: names
            of layers, whose output is pooled and goes through one dense layer; pairs of a name and
            a Keras layer of your own from there to features, or a mapping of these; and before
            them, cheap Keras models from the inputs to features. Each exit has a head like `head`.
            `call` and `predict` answer with the last exit, `head`; `all_exits` with all.
        preprocessor: A layer from strings to the backbone's inputs, such as one of keras-hub;
            `fit`, `evaluate` and `predict` then take strings, too. None means that of the backbone,
            if it is a `TextEncoder` or a task of keras-hub.
        **kwargs: Arguments of every Keras model (`name`, `dtype`).

    Shapes:
        Output: `(batch, num_dims, num_classes)`.

    Raises:
        TypeError: If `head` is not a `MatryoshkaHead` or `backbone` is not a Keras model.
        ValueError: If the backbone's output is a feature map or more than one tensor, or it cannot
            be left at the exits. In `fit`, if
            there is no loss or one for a single dim, or in-memory integer labels name no class.

    Examples:
        >>> backbone = keras.Sequential([keras.Input((20,)), keras.layers.Dense(16)])
        >>> model = MatryoshkaClassifier(backbone, MatryoshkaHead(10, dims=(4, 8, 16)))
        >>> tuple(model(keras.ops.ones((2, 20))).shape)
        (2, 3, 10)
    """

    def __init__(
        self,
        backbone: keras.layers.Layer,
        head: MatryoshkaHead,
        *,
        pooling: keras.layers.Layer | None = None,
        exits: Sequence[Any] | Mapping[str, Any] | None = None,
        preprocessor: keras.layers.Layer | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not isinstance(backbone, keras.layers.Layer) or not isinstance(head, MatryoshkaHead):
            raise TypeError(
                "MatryoshkaClassifier joins a Keras model and a MatryoshkaHead. "
                f"Received: backbone={backbone!r}, head={head!r}. "
                "Write MatryoshkaClassifier(backbone, MatryoshkaHead(num_classes))."
            )
        self.backbone = backbone
        self.head = head
        self.pooling = check_pooling(pooling)
        self._given_preprocessor = check_preprocessor(preprocessor)
        self._take_exits(exits)
        self.exit_heads: dict[str, MatryoshkaHead] = {}  # by the name of the exit
        self._exit_training: ExitTraining | None = None
        self._rowwise: RowwiseStep | None = None
        self._nested_metrics = NestedMetrics()
        # For `dims_per_step`: the same in every process, and so in every replica.
        self.seed_generator = keras.random.SeedGenerator(0)
        shape = known_input_shape(backbone)
        # A subclass may build what its constructor has yet to make.
        if shape is not None and type(self).build is MatryoshkaClassifier.build:
            self.build(shape)

    def _text_parts(self) -> tuple[Any, ...]:
        return (self.backbone,)

    def parts(self, exit: str | None = None) -> tuple[keras.layers.Layer, MatryoshkaHead]:
        """Return the backbone, with the pooling after it if there is one, and the head.

        Args:
            exit: Name of an exit, which has a backbone and a head of its own; None means the last.
        """
        if exit not in (None, LAST):
            return self._exits_or_raise().backbone(exit), self.exit_heads[exit]
        return with_pooling(self.backbone, self.pooling), self.head

    def build(self, input_shape: Any) -> None:
        """Build the backbone and the pooling, then the head on their features."""
        features_shape = self._features_shape(as_shapes(input_shape))
        _check_features(features_shape)
        if not self.head.built:
            self.head.build(features_shape)
        self._nested_metrics.set_dims(self.head.dims)
        if self._exit_plans and self._exits is None:
            self._build_exits(features_shape)

    def _build_exits(self, features_shape: Any) -> None:
        if len(features_shape) != 2 or self.head.embedding is not None:
            raise ValueError(
                "Exits classify whole rows by kernels of their own, from features (batch, width). "
                f"Received: features of shape {tuple(features_shape)}, a head with "
                f"embedding={self.head.embedding!r}. Leave exits out, or pool over time: "
                "pooling=keras.layers.GlobalAveragePooling1D()."
            )
        dims = self.head.dims or ()
        self._make_exits(self.backbone, self.pooling, dims[-1])
        exits = self._exits_or_raise()
        config = self.head.get_config()
        for name, short in exits.short_names.items():
            head = type(self.head).from_config({**config, "name": f"{short}_{self.head.name}"})
            head.build(exits.features.output[name].shape)
            self.exit_heads[name] = head

    def _features_shape(self, input_shape: Any) -> Any:
        shape = output_shape(self.backbone, input_shape)
        return shape if self.pooling is None else output_shape(self.pooling, shape)

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        """Return the logits of every dim; within a step, the features if it needs no logits.

        Within a step of a model with exits, the same of every exit by name.
        """
        del mask  # Keras keeps masks on the tensors
        if training and not self._has_trainable_features():
            warn_frozen(self)
        if self._exits is not None:
            inputs = self._exits.checked(inputs)
        if self._steps and self._exits is not None and self._exit_training is not None:
            features = self._exits.features(inputs, training=training)
            return self._exit_training.outputs(features, training)
        features = self.backbone(inputs, training=training)
        if self.pooling is not None:
            features = self.pooling(features)
        return features if self._steps else self.head(features, training=training)

    def _has_trainable_features(self) -> bool:
        parts = (self.backbone, self.pooling)
        if self.exits and not self.head.trainable_weights:  # the exits alone are trained
            return True
        return any(part.trainable_weights for part in parts if part is not None)

    def compile(
        self,
        *args: Any,
        distillation: float | None = None,
        pairs: Sequence[tuple[str, int]] | None = None,
        **kwargs: Any,
    ) -> None:
        """Configure training as `keras.Model.compile` does.

        A loss and metrics of Keras, or their names, are counted at every dim: "accuracy" logs
        `accuracy_8`, `accuracy_16`, and so on. Give a `MatryoshkaLoss` for other weights than ones.

        With a Keras cross-entropy, and metrics of a row's rank or loss (accuracy, top-k accuracy,
        cross-entropy, `Perplexity`), the logits of a batch are never in memory during `fit` and
        `evaluate`: see `nested_crossentropy`.

        With exits, all exits and dims train together: the loss is the sum over pairs of an exit and
        a dim, and metrics are logged as `<name>_<exit>_<dim>`, those of the last exit as
        `<name>_<dim>`. Metrics of your own that read all dims are given the last exit.

        Args:
            *args: As of `keras.Model.compile`.
            distillation: Weight of the divergence of every early exit from the last one at its
                widest dim; no gradient of it reaches the last. None means 1 with a loss of
                classes, 0 with any other.
            pairs: The pairs of an exit and a dim that count; one that stands twice counts twice.
                None means all pairs once, those of the last exit, "last", twice.
            **kwargs: As of `keras.Model.compile`.
        """
        arguments = inspect.signature(keras.Model.compile).bind(self, *args, **kwargs).arguments
        arguments.pop("self")
        loss = arguments["loss"] = nested_loss(arguments.get("loss"))
        for group in ("metrics", "weighted_metrics"):
            arguments[group] = nested_metrics(arguments.get(group), loss)
        nested = NestedMetrics(arguments["metrics"], arguments["weighted_metrics"])
        nested.set_dims(self.head.dims)
        super().compile(**arguments)
        self._nested_metrics, self._modes = nested, nested.modes()
        names = ("loss", "metrics", "weighted_metrics", "loss_weights")
        has_own_step = any(
            getattr(type(self), name) is not getattr(MatryoshkaClassifier, name)
            for name in _STEP_METHODS
        )
        # A head of another class may make other logits of the same kernels.
        is_plain_head = type(self.head) is MatryoshkaHead and not self.head.activity_regularizer
        self._rowwise = None
        if is_plain_head and not has_own_step:
            self._rowwise = rowwise_step(*(arguments.get(name) for name in names))
        groups = tuple(
            [m for m in keras.tree.flatten(arguments.get(name)) if isinstance(m, MatryoshkaMetric)]
            for name in names[1:3]
        )
        self._compile_exits(groups, distillation, pairs)

    def _compile_exits(self, groups: Any, distillation: float | None, pairs: Any) -> None:
        """Make the training of the exits, whose metrics are copies of the compiled `groups`."""
        self._exit_arguments = {"distillation": distillation, "pairs": pairs}
        self._exit_training = None
        if self._exits is None:
            given = [name for name, own in self._exit_arguments.items() if own is not None]
            if given:
                raise ValueError(
                    f"{given[0]} is for a model with exits. "
                    f"Received: {self.name!r}, which has none. Leave it out, or write "
                    "MatryoshkaClassifier(..., exits=('conv4_block6_out',))."
                )
            return
        if not isinstance(self.loss, MatryoshkaLoss):
            return  # `fit` refuses it
        names, dims = (*self._exits.names, LAST), self.head.dims or ()
        self._exit_training = ExitTraining.of(
            self.loss,
            {**self.exit_heads, LAST: self.head},
            pair_weights(pairs, names, dims),
            distillation_weight(self.loss.loss, distillation),
            groups,
            self._rowwise,
            self._exits.short_names,
        )
        self._modes = {**self._modes, **NestedMetrics(self._exit_training.copies).modes()}

    @property
    def metrics(self) -> list[Any]:
        """Keras's own, and those of the exits."""
        own = super().metrics
        return own if self._exit_training is None else [*own, *self._exit_training.copies]

    def get_compile_config(self) -> Any:
        """Return the arguments of `compile`."""
        config = super().get_compile_config()
        return {**config, **self._exit_arguments} if config and self._exits is not None else config

    @property
    def _has_own_steps(self) -> bool:
        return self._rowwise is not None or self._exit_training is not None

    def compute_output_shape(self, input_shape: Any) -> tuple[int | None, ...]:
        """Return `(batch, num_dims, num_classes)`."""
        return self.head.compute_output_shape(self._features_shape(as_shapes(input_shape)))

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        """Return the compiled loss, over the dims that the step draws if the loss draws any."""
        seed = self.seed_generator if training else None
        if self._steps and self._exit_training is not None:
            own = self._exit_training.compute_loss(y_pred, y, sample_weight, seed, training)
            return own + self._added_losses()
        if self._steps and self._rowwise is not None:
            loss = self._rowwise.compute_loss(self.head, y_pred, y, sample_weight, seed, training)
            return loss + self._added_losses()
        if not isinstance(self.loss, MatryoshkaLoss) or self.loss.dims_per_step is None:
            return super().compute_loss(x, y, y_pred, sample_weight, training=training)
        step_loss = self.loss.for_step(seed)
        return step_loss(y, y_pred, sample_weight=sample_weight) + self._added_losses()

    def _added_losses(self) -> Any:
        """Return the losses of regularizers and layers, as Keras counts them in a replica."""
        return sum(ops.sum(ops.cast(loss, "float32")) for loss in self.losses) / num_replicas()

    def compute_metrics(
        self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None
    ) -> dict[str, Any]:
        """Return the log of a step; if it needed no logits, `compute_loss` updated the metrics."""
        if self._steps and self._exit_training is not None:
            y_pred = y_pred[LAST]
        is_rowwise = self._steps and self._rowwise is not None
        rows = tuple(y_pred.shape[: -1 if is_rowwise else -2])
        check_form_of_batch(self.loss, y, rows, self.head.num_classes)
        if is_rowwise:
            # Keras builds and names the metrics by a batch; one without rows changes no metric.
            y, y_pred = y[:0], logits_of_no_row(y_pred, self.head)
            sample_weight = None if sample_weight is None else sample_weight[:0]
        return super().compute_metrics(x, y, y_pred, sample_weight)

    @takes_text
    def fit(self, x: Any = None, y: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train as `keras.Model.fit` does, after a check of labels that are in memory."""
        _check_loss(self.loss)
        x = self._check_data(x, y)
        validation = kwargs.get("validation_data")
        if isinstance(validation, (tuple, list)) and len(validation) > 1:
            self._check_data(*validation[:2])
        return super().fit(x, y, *args, **kwargs)

    @takes_text
    def evaluate(self, x: Any = None, y: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as `keras.Model.evaluate` does, after a check of labels that are in memory."""
        x = self._check_data(x, y)
        return super().evaluate(x, y, *args, **kwargs)

    def _check_data(self, x: Any, y: Any) -> Any:
        x = self._build_for(x)
        if self._exits is not None:  # before a step, in which JAX has taken the weights out
            self._exits.checked(x)
        if self.built:
            self._nested_metrics.set_dims(self.head.dims)
            check_labels(self.loss, y, self.output_shape)
        return x

    def at(self, dim: int, exit: str | None = None) -> keras.Model:
        """Return a plain Keras model cut to `dim`, and to an exit: see `keras_mrl.cut`."""
        return cut(self, dim, exit=exit)

    def all_exits(self) -> keras.Model:
        """Return a Keras model that answers with all exits, on the layers of this one.

        Its output is `{exit: logits}`, with logits `(batch, num_dims, num_classes)`; the last exit
        stands under `"last"`. What it predicts for a holdout is what cascades are learned on.

        Raises:
            ValueError: If the model has no exits.
        """
        features = self._exits_or_raise().features
        heads = {**self.exit_heads, LAST: self.head}
        logits = {name: heads[name](own) for name, own in features.output.items()}
        return _AllExits(features.input, logits, name=f"{self.name}_all_exits")

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make this model again."""
        return {
            **super().get_config(),
            "backbone": keras.saving.serialize_keras_object(self.backbone),
            "head": keras.saving.serialize_keras_object(self.head),
            "pooling": keras.saving.serialize_keras_object(self.pooling),
            "preprocessor": keras.saving.serialize_keras_object(self._given_preprocessor),
            "exits": plans_config(self._exit_plans) or None,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        """Make the model again."""
        backbone = keras.saving.deserialize_keras_object(config["backbone"], custom_objects)
        head_config = with_embedding_of(backbone, config["head"])
        head = keras.saving.deserialize_keras_object(head_config, custom_objects)
        pooling = keras.saving.deserialize_keras_object(config.get("pooling"), custom_objects)
        exits = plans_from_config(config.get("exits"), custom_objects) or None
        preprocessor = keras.saving.deserialize_keras_object(
            config.get("preprocessor"), custom_objects
        )
        parts = {"backbone": backbone, "head": head, "pooling": pooling, "exits": exits}
        parts["preprocessor"] = preprocessor
        return cls(**{**config, **parts})


# A subclass that overrides one of these is given logits.
_STEP_METHODS = ("call", "compute_loss", "compute_metrics", "train_step", "test_step")


def _check_loss(loss: Any) -> None:
    if loss is None:
        raise ValueError(
            "MatryoshkaClassifier trains on the loss that it is compiled with. "
            "Received: loss=None. Compile with loss='sparse_categorical_crossentropy'."
        )


def _check_features(shape: Any) -> None:
    """Raise for several outputs, and for a feature map, whose positions would be classified."""
    if isinstance(shape, dict) or any(isinstance(entry, (list, tuple)) for entry in shape):
        key = repr(next(iter(shape))) if isinstance(shape, dict) else "0"
        raise ValueError(
            "A backbone must give one tensor of features. "
            f"Received: a backbone whose outputs are {shape}. Make a model of the one to use, "
            f"keras.Model(backbone.input, backbone.output[{key}]), or give pooling=, a layer that "
            "makes features of them."
        )
    if len(shape) not in (2, 3):
        layer = f"keras.layers.GlobalAveragePooling{'3D' if len(shape) == 5 else '2D'}()"
        raise ValueError(
            "A backbone must end in features (batch, width), or (batch, time, width) for "
            f"sequences. Received: a backbone whose output is {tuple(shape)}. Add a pooling layer: "
            f"MatryoshkaClassifier(backbone, head, pooling={layer})."
        )
