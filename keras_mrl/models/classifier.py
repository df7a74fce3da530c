"""Any Keras model as backbone, with a nested head."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import keras
from keras import ops

from .._masks import mask_of
from ..layers import MatryoshkaHead
from ..layers.head import shared, warn_frozen
from ..losses import MatryoshkaLoss
from ..losses._torch import num_replicas
from ..losses.crossentropy import nested_crossentropy
from ..losses.matryoshka import check_labels
from ..metrics import REDUCTIONS, MatryoshkaMetric, row_values, row_weights
from .cut import cut

# A training step of a classifier that goes from features to loss and metrics, without logits.

_SPARSE = keras.losses.SparseCategoricalCrossentropy
_DENSE = keras.losses.CategoricalCrossentropy


@dataclass(frozen=True)
class RowwiseStep:
    """What a compiled classifier computes of every row.

    Args:
        loss: A nested cross-entropy from logits.
        metrics: Those that losses and ranks decide.
        weighted_metrics: The same, with sample weights.
    """

    loss: MatryoshkaLoss
    metrics: tuple[MatryoshkaMetric, ...]
    weighted_metrics: tuple[MatryoshkaMetric, ...]

    def compute_loss(
        self,
        head: MatryoshkaHead,
        features: Any,
        labels: Any,
        sample_weight: Any,
        seed: Any,
        training: bool,
    ) -> Any:
        """Return the loss of a batch, and update the metrics with it.

        Args:
            head: Whose kernels are read.
            features: `(batch, ..., width)`, with the mask of the backbone.
            labels: What the loss takes for one dim.
            sample_weight: None, `(batch,)`, or one per label.
            seed: What `dims_per_step` draws from.
            training: Whether a gradient will be asked for.
        """
        dims, config = head.dims or (), self.loss.loss.get_config()
        for metric in (*self.metrics, *self.weighted_metrics):
            _check_dims(metric, dims)
        kernels, biases = head.parameters()
        mask, like = mask_of(features), features[..., 0]
        labels, targets = _labels(
            labels, features, head.num_classes, isinstance(self.loss.loss, _DENSE)
        )
        kept = mask
        if config.get("ignore_class") is not None:
            counted = ops.not_equal(labels, config["ignore_class"])
            kept = counted if mask is None else ops.logical_and(mask, counted)
        said = nested_crossentropy(
            ops.reshape(features, (-1, features.shape[-1])),
            kernels,
            biases or None,
            targets,
            dims,
            weights=self.loss.weights_for(len(dims), seed if training else None),
            row_weights=ops.reshape(
                row_weights(self.loss.reduction, like, sample_weight, kept), (-1,)
            ),
            label_smoothing=config.get("label_smoothing", 0.0),
            training=training,
        )
        shape = (*ops.shape(like), len(dims))
        losses, ranks = ops.reshape(said.losses, shape), ops.reshape(said.ranks, shape)
        for metric in self.metrics:
            metric.update_rows(losses, ranks, labels, None, mask)
        for metric in self.weighted_metrics:
            metric.update_rows(losses, ranks, labels, sample_weight, mask)
        return said.loss


def rowwise_step(
    loss: Any, metrics: Any, weighted_metrics: Any, loss_weights: Any
) -> RowwiseStep | None:
    """Return the step that needs no logits for what a classifier is compiled with; None if none."""
    if type(loss) is not MatryoshkaLoss or type(loss.loss) not in (_SPARSE, _DENSE):
        return None
    config = loss.loss.get_config()
    if not config["from_logits"] or config.get("axis", -1) != -1 or loss_weights is not None:
        return None
    if loss.reduction not in REDUCTIONS or loss.dtype != "float32":
        return None
    found = []
    for given in (metrics, weighted_metrics):
        flat = keras.tree.flatten(given or [])
        if not all(_needs_no_logits(metric, config.get("label_smoothing", 0.0)) for metric in flat):
            return None
        found.append(tuple(flat))
    return RowwiseStep(loss, *found)


def no_logits(features: Any, head: MatryoshkaHead) -> Any:
    """Return the logits of no row, `(0, ..., num_dims, num_classes)`."""
    none = ops.expand_dims(ops.zeros_like(features[:0, ..., :1]), -1)
    return none * ops.zeros((len(head.dims or ()), head.num_classes), dtype=none.dtype)


def _needs_no_logits(metric: Any, smoothing: float) -> bool:
    return type(metric) is MatryoshkaMetric and row_values(metric.metric, smoothing) is not None


def _check_dims(metric: MatryoshkaMetric, dims: tuple[int, ...]) -> None:
    if metric.dims != dims:
        raise ValueError(
            "A MatryoshkaMetric must name the dims of the head. "
            f"Received: {metric.name!r} with dims={metric.dims} for a head of {dims}. "
            f"Write MatryoshkaMetric(..., dims={dims})."
        )


def _labels(labels: Any, features: Any, num_classes: int, dense: bool) -> tuple[Any, Any]:
    """Return integer labels in the shape of the features' rows, and what the rows are to say."""
    labels = ops.convert_to_tensor(labels)
    per_class = len(labels.shape) == len(features.shape)
    if dense and (not per_class or labels.shape[-1] != num_classes):
        raise ValueError(
            "CategoricalCrossentropy takes a share of every class per row. "
            f"Received: labels of shape {tuple(labels.shape)} for {num_classes} classes. "
            "Use SparseCategoricalCrossentropy for integer labels."
        )
    if not dense and per_class and labels.shape[-1] != 1:
        raise ValueError(
            "SparseCategoricalCrossentropy takes one integer per row. "
            f"Received: labels of shape {tuple(labels.shape)} for {num_classes} classes. "
            "Use CategoricalCrossentropy for one-hot labels, or take their argmax."
        )
    if dense:
        shares = ops.reshape(ops.cast(labels, "float32"), (-1, num_classes))
        return ops.argmax(labels, axis=-1), shares
    if keras.backend.standardize_dtype(labels.dtype) == "bool":
        labels = ops.cast(labels, "int32")
    labels = ops.reshape(labels, ops.shape(features)[:-1])
    return labels, ops.reshape(labels, (-1,))


@keras.saving.register_keras_serializable(package="keras_mrl")
class MatryoshkaClassifier(keras.Model):
    """A backbone that makes features, and a `MatryoshkaHead` that reads their prefixes.

    `call` and `predict` return the logits of every dim. Compile it with a `MatryoshkaLoss` and
    train it with `fit`. A functional model that ends in a `MatryoshkaHead` does as well: whatever
    takes this class (`cut`, `split`, export) takes that too.

    Args:
        backbone: Any Keras model from the inputs to features `(batch, width)`, or
            `(batch, time, width)` for sequences.
        head: The nested head.
        **kwargs: What every Keras model takes (`name`, `dtype`).

    Shapes:
        Output: `(batch, num_dims, num_classes)`.

    Raises:
        TypeError: If `head` is not a `MatryoshkaHead` or `backbone` is not a Keras model.
        ValueError: If the backbone's output is a feature map or more than one tensor; in `fit`,
            if the loss is missing or of one dim, or in-memory integer labels name no class.

    Examples:
        >>> backbone = keras.Sequential([keras.Input((20,)), keras.layers.Dense(16)])
        >>> model = MatryoshkaClassifier(backbone, MatryoshkaHead(10, dims=(4, 8, 16)))
        >>> tuple(model(keras.ops.ones((2, 20))).shape)
        (2, 3, 10)
    """

    def __init__(self, backbone: keras.layers.Layer, head: MatryoshkaHead, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not isinstance(backbone, keras.layers.Layer) or not isinstance(head, MatryoshkaHead):
            raise TypeError(
                "MatryoshkaClassifier joins a Keras model and a MatryoshkaHead. "
                f"Received: backbone={backbone!r}, head={head!r}. "
                "Write MatryoshkaClassifier(backbone, MatryoshkaHead(num_classes))."
            )
        self.backbone = backbone
        self.head = head
        self._rowwise: RowwiseStep | None = None
        self._asking = 0
        # What `dims_per_step` draws from. The same in every process, so in every replica.
        self.seed_generator = keras.random.SeedGenerator(0)

    def build(self, input_shape: Any) -> None:
        """Build the backbone, then the head on what it gives."""
        input_shape = _as_shapes(input_shape)
        shape = _output_shape(self.backbone, input_shape)
        _check_features(shape)
        if not self.head.built:
            self.head.build(shape)

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        """Return the logits of every dim; the features, where a step needs no logits."""
        del mask  # Keras carries masks on the tensors themselves
        if training and not self.backbone.trainable_weights:
            warn_frozen(self)
        features = self.backbone(inputs, training=training)
        return features if self._asking else self.head(features, training=training)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Configure training as `keras.Model.compile` does.

        With a `MatryoshkaLoss` around a Keras cross-entropy, and metrics that a rank or a loss
        decides (accuracy, top-k accuracy, cross-entropy, `Perplexity`), `fit` and `evaluate` never
        hold the logits of a batch: see `nested_crossentropy`.
        """
        super().compile(*args, **kwargs)
        given = inspect.signature(keras.Model.compile).bind(self, *args, **kwargs).arguments
        names = ("loss", "metrics", "weighted_metrics", "loss_weights")
        ours = all(getattr(type(self), n) is getattr(MatryoshkaClassifier, n) for n in _STEP)
        # A head of another kind may make other logits of the same kernels.
        ours = ours and type(self.head) is MatryoshkaHead and not self.head.activity_regularizer
        self._rowwise = rowwise_step(*(given.get(name) for name in names)) if ours else None
        for name in ("metrics", "weighted_metrics"):
            _check_metrics(given.get(name), self.head)

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compile as a saved model was."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.optimizer is not None and self.built:
            self.optimizer.build(self.trainable_variables)

    def train_step(self, *args: Any, **kwargs: Any) -> Any:
        """Train on one batch, as the backend does."""
        with self._asking_for_features():
            return super().train_step(*args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate one batch, as the backend does."""
        with self._asking_for_features():
            return super().test_step(*args, **kwargs)

    @contextlib.contextmanager
    def _asking_for_features(self) -> Iterator[None]:
        # Counted: replicas take turns within a step.
        self._asking += self._rowwise is not None
        try:
            yield
        finally:
            self._asking -= self._rowwise is not None

    def compute_output_shape(self, input_shape: Any) -> tuple[int | None, ...]:
        """Return `(batch, num_dims, num_classes)`."""
        return self.head.compute_output_shape(_output_shape(self.backbone, input_shape))

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        """Return the compiled loss, over the dims that the step draws if the loss draws any."""
        loss = self.loss
        if self._asking and self._rowwise is not None:
            seed = self.seed_generator
            rows = self._rowwise.compute_loss(self.head, y_pred, y, sample_weight, seed, training)
            return rows + self._own_losses()
        if not isinstance(loss, MatryoshkaLoss) or loss.dims_per_step is None:
            return super().compute_loss(x, y, y_pred, sample_weight, training=training)
        step = loss.for_step(self.seed_generator if training else None)
        return step(y, y_pred, sample_weight=sample_weight) + self._own_losses()

    def _own_losses(self) -> Any:
        """Regularizers and what layers add, as Keras counts them: TensorFlow sums over replicas."""
        parts = [keras.ops.sum(keras.ops.cast(loss, "float32")) for loss in self.losses]
        return sum(parts) / num_replicas()

    def compute_metrics(
        self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None
    ) -> dict[str, Any]:
        """Return the log of a step; one that needed no logits has updated its metrics already."""
        if self._asking:
            # Keras builds and names the metrics by a batch: one without rows.
            y, y_pred = y[:0], no_logits(y_pred, self.head)
            sample_weight = None if sample_weight is None else sample_weight[:0]
        return super().compute_metrics(x, y, y_pred, sample_weight)

    def fit(self, x: Any = None, y: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train as `keras.Model.fit` does, after a look at integer labels held in memory."""
        _check_loss(self.loss)
        check_labels(self.loss, y, self.head.num_classes)
        validation = kwargs.get("validation_data")
        if isinstance(validation, (tuple, list)) and len(validation) > 1:
            check_labels(self.loss, validation[1], self.head.num_classes)
        return super().fit(x, y, *args, **kwargs)

    def at(self, dim: int) -> keras.Model:
        """Return a plain Keras model cut to `dim`: see `keras_mrl.cut`."""
        return cut(self, dim)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make this model again."""
        return {
            **super().get_config(),
            "backbone": keras.saving.serialize_keras_object(self.backbone),
            "head": keras.saving.serialize_keras_object(self.head),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        """Make the model again."""
        backbone = keras.saving.deserialize_keras_object(config["backbone"], custom_objects)
        tied = shared(config["head"], backbone)
        head = keras.saving.deserialize_keras_object(tied, custom_objects)
        return cls(**{**config, "backbone": backbone, "head": head})


# What a subclass may change, and then sees logits.
_STEP = ("call", "compute_loss", "compute_metrics", "train_step", "test_step")


def _check_loss(loss: Any) -> None:
    """Refuse what trains nothing, takes one dim's logits, or takes logits for probabilities."""
    inner = loss.loss if isinstance(loss, MatryoshkaLoss) else None
    plain = loss is None or loss == "sparse_categorical_crossentropy" or isinstance(loss, _SPARSE)
    if plain or (inner is not None and inner.get_config().get("from_logits") is False):
        around = f"MatryoshkaLoss around {_named(inner)} with from_logits=False"
        received = _named(loss) if inner is None else around
        raise ValueError(
            "MatryoshkaClassifier gives the logits of every dim, and trains on a MatryoshkaLoss "
            f"around a loss on logits. Received: {received}. Compile with "
            "loss=MatryoshkaLoss(keras.losses.SparseCategoricalCrossentropy(from_logits=True))."
        )


def _check_metrics(metrics: Any, head: MatryoshkaHead) -> None:
    """Refuse Keras's own metrics as they are: the axis of dims would pass for one of samples."""
    for metric in keras.tree.flatten(metrics or []):
        is_keras = type(metric).__module__.startswith("keras.") and metric is not None
        if isinstance(metric, str) or (is_keras and isinstance(metric, keras.metrics.Metric)):
            shown = repr(metric) if isinstance(metric, str) else type(metric).__name__
            raise ValueError(
                "Metrics of a MatryoshkaClassifier are counted per dim. "
                f"Received: {shown}. Write MatryoshkaMetric("
                f"keras.metrics.SparseCategoricalAccuracy(name='accuracy'), dims={head.dims})."
            )


def _named(loss: Any) -> str:
    return type(loss).__name__ if isinstance(loss, keras.losses.Loss) else f"loss={loss!r}"


def _as_shapes(shapes: Any) -> Any:
    """Shapes as tuples again: a saved model's configuration holds them as lists."""
    if isinstance(shapes, dict):
        return {name: _as_shapes(shape) for name, shape in shapes.items()}
    if any(isinstance(entry, (list, tuple)) for entry in shapes):
        return [_as_shapes(shape) for shape in shapes]
    return tuple(shapes)


def _output_shape(backbone: keras.layers.Layer, input_shape: Any) -> Any:
    """Build the backbone if need be, and return the shape of its features."""
    if backbone.built:
        try:
            return backbone.compute_output_shape(input_shape)
        except NotImplementedError:  # a subclassed backbone need not know it
            pass
    inputs = keras.tree.map_shape_structure(
        lambda shape: keras.Input(batch_shape=(None, *shape[1:]), dtype=backbone.compute_dtype),
        input_shape,
    )
    return keras.tree.map_structure(lambda tensor: tuple(tensor.shape), backbone(inputs))


def _check_features(shape: Any) -> None:
    """Refuse several outputs, and a feature map: its positions would be classified one by one."""
    if isinstance(shape, dict) or any(isinstance(entry, (list, tuple)) for entry in shape):
        raise ValueError(
            "A backbone must give one tensor of features. "
            f"Received: a backbone whose outputs are {shape}. "
            "Make a model of the one to use: keras.Model(backbone.input, backbone.output[0])."
        )
    if len(shape) not in (2, 3):
        raise ValueError(
            "A backbone must end in features (batch, width), or (batch, time, width) for "
            f"sequences. Received: a backbone whose output is {tuple(shape)}. "
            "Add a pooling layer, e.g. keras.layers.GlobalAveragePooling2D()."
        )
