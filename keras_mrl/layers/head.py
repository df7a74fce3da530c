"""The nested linear head: one classifier per prefix of the features.

A head tied to the embedding of the tokens holds that layer and reads its table, so there is one
variable. In a `.keras` file Keras itself recognizes a layer that two others share. A configuration
alone (`from_config`, `clone_model`) records no sharing, and would silently make a second table. So
`MatryoshkaClassifier` looks for the embedding by its name in the backbone (`with_embedding_of`),
and a head refuses to be built before its embedding is.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_mrl_serving.integers import check_positive_integer

from .._dims import blocks, check_dims, check_width, log_spaced_dims, warn_long_ladder


@keras.saving.register_keras_serializable(package="keras_mrl")
class MatryoshkaHead(keras.layers.Layer):
    """Logits at every dim, each read from the first coordinates of the same features.

    Untied (the paper's MRL), every dim has a kernel and a bias of its own. Tied (MRL-E), there is
    one kernel and one bias: a dim reads the first rows of the kernel, and each block of rows is
    multiplied once for all the dims that contain it.

    Args:
        num_classes: Number of classes, C.
        dims: Strictly increasing prefix lengths, the widest at most the features' width. None
            means 8, 16, 32, ... ending at the width, which the attribute `dims` holds once the
            layer is built.
        tied: Whether all dims share one kernel and one bias (MRL-E, about half the parameters).
        embedding: The `keras.layers.Embedding` that the backbone reads its tokens with. Its table,
            transposed, is then the one kernel of a tied head, as in language models whose input
            and output embedding are one.
        use_bias: Whether a bias is added to the logits.
        kernel_initializer: Initializer of every kernel that the head makes.
        bias_initializer: Initializer of every bias.
        kernel_regularizer: Regularizer of every kernel that the head makes.
        **kwargs: Arguments of every Keras layer (`name`, `dtype`, `trainable`).

    Shapes:
        Input: `(..., width)`. Output: `(..., num_dims, num_classes)`.

    Formula:
        logits_m = W^(m) . x_{1:m} + b^(m); tied: W^(m) = W_{:, 1:m}, b^(m) = b

    Raises:
        TypeError: If `embedding` is not a `keras.layers.Embedding`.
        ValueError: If `dims` are not increasing positive integers or exceed the features' width,
            or `embedding` does not fit them and the classes.

    Reference:
        Kusupati et al., Matryoshka Representation Learning, arXiv 2205.13147, section 3.

    Examples:
        >>> head = MatryoshkaHead(num_classes=10, dims=(2, 4, 8))
        >>> tuple(head(keras.ops.ones((5, 8))).shape)
        (5, 3, 10)
    """

    def __init__(
        self,
        num_classes: int,
        dims: Sequence[int] | None = None,
        tied: bool = False,
        *,
        embedding: keras.layers.Embedding | None = None,
        use_bias: bool = True,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        remedy = "Count the classes of your labels: labels 0..9 make num_classes=10."
        self.num_classes = check_positive_integer("num_classes", num_classes, remedy)
        self.dims = None if dims is None else check_dims(dims)
        self.tied = tied
        self.embedding = embedding
        self.use_bias = use_bias
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.supports_masking = True
        if embedding is not None:
            _check_embedding(self)

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Create one kernel per dim, or the one kernel they all read."""
        width = input_shape[-1]
        if width is None:
            raise ValueError(
                "MatryoshkaHead needs features of a known width. "
                f"Received: features of shape {tuple(input_shape)}. "
                "Give the layer before it a fixed number of units."
            )
        if self.dims is None:
            self.dims = log_spaced_dims(width)
        check_width(self.dims, width)
        warn_long_ladder(self.dims, width)
        if self.embedding is not None:
            _check_table(self.embedding, self.dims)
        kernel_dims = self.dims[-1:] if self.tied else self.dims
        self._kernels: list[Any] = []
        self._scales: list[Any] = []
        if self.quantization_mode is not None:
            self._build_int8()
        elif self.embedding is None:
            self._kernels = [
                self.add_weight(
                    name="kernel" if self.tied else f"kernel_{dim}",
                    shape=(dim, self.num_classes),
                    initializer=_reseeded(self.kernel_initializer, index),
                    regularizer=self.kernel_regularizer,
                )
                for index, dim in enumerate(kernel_dims)
            ]
        self._biases = [
            self.add_weight(
                name="bias" if self.tied else f"bias_{dim}",
                shape=(self.num_classes,),
                initializer=_reseeded(self.bias_initializer, index),
            )
            for index, dim in enumerate(kernel_dims if self.use_bias else ())
        ]

    def call(self, features: Any, training: bool | None = None) -> Any:
        """Return the logits of every dim, `(..., num_dims, num_classes)`."""
        if training and _is_source_frozen(self):
            warn_frozen(self)
        dims = self.dims or ()
        if self.tied:
            logits_by_dim = self._tied_logits(features)
        else:
            logits_by_dim = [self.logits_at(features[..., :dim], dim) for dim in dims]
        return ops.stack(logits_by_dim, axis=-2)

    def _tied_logits(self, features: Any) -> list[Any]:
        kernel = self._kernel(0)
        logits_by_dim: list[Any] = []
        for start, stop in blocks(self.dims or ()):
            block = ops.matmul(features[..., start:stop], kernel[start:stop])
            logits_by_dim.append(logits_by_dim[-1] + block if logits_by_dim else block)
        if not self.use_bias:
            return logits_by_dim
        return [logits + self._biases[0] for logits in logits_by_dim]

    def logits_at(self, prefix: Any, dim: int) -> Any:
        """Return the logits `(..., num_classes)` of one dim from a prefix `(..., dim)`."""
        kernel, bias = self.weights_at(dim)
        logits = ops.matmul(prefix, kernel)
        return logits if bias is None else logits + bias

    def weights_at(self, dim: int) -> tuple[Any, Any]:
        """Return the kernel `(dim, num_classes)` of one dim, and its bias (None without one).

        Raises:
            ValueError: If `dim` is not one of `dims`.
        """
        dim_index = self.index_of(dim)
        index = 0 if self.tied else dim_index
        kernel = self._kernel(index)
        bias = ops.convert_to_tensor(self._biases[index]) if self.use_bias else None
        return (kernel[:dim] if self.tied else kernel), bias

    def check_linear(self) -> None:
        """Raise if a subclass computes its logits otherwise than by its kernels and biases.

        Raises:
            ValueError: If it has a `call` or a `logits_at` of its own.
        """
        own = type(self)
        if (own.call, own.logits_at) != (MatryoshkaHead.call, MatryoshkaHead.logits_at):
            raise ValueError(
                "A head is cut, judged and served by its kernels and biases. "
                f"Received: {own.__name__} {self.name!r}, which computes its logits in a way of "
                "its own. Do that in the backbone, and end the model in a MatryoshkaHead."
            )

    def parameters(self) -> tuple[list[Any], list[Any]]:
        """Return all kernels and all biases, one per dim; of a tied head one kernel and one bias.

        The list of biases is empty if `use_bias` is False.
        """
        num_kernels = 1 if self.tied else len(self.dims or ())
        biases = [ops.convert_to_tensor(bias) for bias in self._biases]
        return [self._kernel(index) for index in range(num_kernels)], biases

    def _kernel(self, index: int) -> Any:
        if self.embedding is None:
            kernel = ops.convert_to_tensor(self._kernels[index])
            if self.quantization_mode is None:
                return kernel
            scale = ops.convert_to_tensor(self._scales[index])
            return ops.cast(kernel, scale.dtype) / scale
        if self.embedding.quantization_mode is None:
            table = ops.convert_to_tensor(self.embedding.embeddings)
        else:  # its rows are integers, which the layer alone reads
            table = self.embedding(ops.arange(self.num_classes))
        return ops.transpose(table[:, : (self.dims or ())[-1]])

    def quantize(self, mode: Any = None, type_check: bool = True, config: Any = None) -> None:
        """Hold the kernels as integers of 8 bits, with a scale per class.

        The integers and scales are those of a `keras.layers.Dense` in this mode. But features stay
        as they are: what `call`, `weights_at` and an exported model compute is the same product.
        `quantize` of a Keras model calls this.

        Args:
            mode: "int8".
            type_check: Whether subclasses are left as they are.
            config: A `keras.quantizers.Int8QuantizationConfig`, for its `weight_quantizer`.

        Raises:
            NotImplementedError: If the mode is another, the kernel is that of an embedding, or the
                layer is of a subclass. `quantize` of a Keras model then warns, and leaves the head
                as it is.

        Examples:
            >>> head = MatryoshkaHead(num_classes=10, dims=(2, 4, 8))
            >>> head.build((None, 8))
            >>> head.quantize("int8")
            >>> tuple(head(keras.ops.ones((5, 8))).shape)
            (5, 3, 10)
        """
        if type_check and type(self) is not MatryoshkaHead:
            raise self._not_implemented_error(self.quantize)
        if mode != "int8" or self.embedding is not None:
            reason = f"mode={mode!r}" if self.embedding is None else "a head with an embedding"
            raise NotImplementedError(
                "A MatryoshkaHead has kernels of its own in float or in int8. "
                f"Received: {reason}. Write quantize('int8'), or quantize the embedding."
            )
        quantizer = getattr(config, "weight_quantizer", None) or keras.quantizers.AbsMaxQuantizer(0)
        values = [quantizer(kernel, to_numpy=True) for kernel in self._kernels]
        for kernel in list(self._kernels):
            self._untrack_variable(kernel)
        self._build_int8()
        for index, (integers, scale) in enumerate(values):
            self._kernels[index].assign(integers)
            self._scales[index].assign(ops.squeeze(scale, axis=0))
        if self.quantization_mode is None:
            name = f"int8_from_{self.float_policy.name}"
            self.dtype_policy: Any = keras.dtype_policies.get(name)

    @property
    def float_policy(self) -> Any:
        """The dtype policy of the layer, without the integers of a quantized one."""
        if self.quantization_mode is None:
            return self.dtype_policy
        return keras.dtype_policies.get(self.dtype_policy.name.split("_from_")[1])

    def _build_int8(self) -> None:
        kernel_dims = (self.dims or ())[-1:] if self.tied else self.dims or ()
        suffixes = [""] if self.tied else [f"_{dim}" for dim in kernel_dims]

        def weights(name: str, shapes: Sequence[tuple[int, ...]], **arguments: Any) -> list[Any]:
            return [
                self.add_weight(name=f"{name}{suffix}", shape=shape, trainable=False, **arguments)
                for suffix, shape in zip(suffixes, shapes, strict=True)
            ]

        shapes = [(dim, self.num_classes) for dim in kernel_dims]
        self._kernels = weights("kernel", shapes, initializer="zeros", dtype="int8")
        self._scales = weights("scale", [shape[1:] for shape in shapes], initializer="ones")
        self._is_quantized = True  # Keras asks for it

    def _int8_call(self, features: Any, training: bool | None = None) -> Any:
        return self.call(features, training=training)

    def index_of(self, dim: int) -> int:
        """Return the position of `dim` on the `num_dims` axis of the logits.

        Raises:
            ValueError: If `dim` is not one of `dims`.
        """
        dims = self.dims or ()
        if dim not in dims:
            raise ValueError(
                "dim must be one of the dims of the head. "
                f"Received: dim={dim!r} for dims={dims}. Choose one of those."
            )
        return dims.index(dim)

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> tuple[int | None, ...]:
        """Return `(..., num_dims, num_classes)`."""
        dims = self.dims or log_spaced_dims(int(input_shape[-1] or 0))
        return (*input_shape[:-1], len(dims), self.num_classes)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make this layer again."""
        return {
            **super().get_config(),
            "num_classes": self.num_classes,
            "dims": self.dims,
            "tied": self.tied,
            "embedding": None if self.embedding is None else _embedding_config(self.embedding),
            "use_bias": self.use_bias,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "bias_initializer": keras.initializers.serialize(self.bias_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MatryoshkaHead:
        """Make the layer again; `config` may hold the embedding itself: `with_embedding_of`."""
        embedding = config.get("embedding")
        if isinstance(embedding, dict):
            embedding = keras.saving.deserialize_keras_object(embedding)
        return cls(**{**config, "embedding": embedding})


def _reseeded(initializer: Any, index: int) -> Any:
    """Return a copy with a seed of its own: one instance would draw the same kernel every time."""
    if not isinstance(initializer, keras.Initializer):
        return initializer
    config = initializer.get_config()
    if isinstance(config.get("seed"), int):
        config["seed"] += index
    return type(initializer).from_config(config)


def _is_source_frozen(layer: keras.layers.Layer) -> bool:
    """Whether `layer` stands in a functional model and no layer before it has trainable weights.

    Walks the graph: a `keras.Model` of it could not be made in a step that PyTorch compiles.
    """
    try:
        tensors = keras.tree.flatten(layer.input)
    except AttributeError:  # not in a functional model: its caller knows what comes before it
        return False
    visited = set()
    while tensors:
        operation, node_index, _ = tensors.pop()._keras_history
        if (id(operation), node_index) not in visited:
            visited.add((id(operation), node_index))
            if getattr(operation, "trainable_weights", None):
                return False
            tensors += operation._inbound_nodes[node_index].input_tensors
    return True


def warn_frozen(owner: Any) -> None:
    """Warn, once per `owner`, that its features cannot learn to nest.

    Once, because on PyTorch a training step runs in Python for every batch.
    """
    if not getattr(owner, "_warned_frozen", False):
        owner._warned_frozen = True
        warnings.warn(
            "A Matryoshka head needs features that can learn to nest. "
            "Received: features none of whose weights can be trained; a new head on a frozen "
            "backbone gives about 5% at 8 dims (the paper's own finding). "
            "Unfreeze the last blocks of the backbone, or put a trainable layer before the head, "
            "e.g. keras.layers.Dense(width).",
            UserWarning,
            stacklevel=2,
        )


def _check_embedding(head: MatryoshkaHead) -> None:
    """Raise if the head cannot take its kernel from its `embedding`."""
    embedding: Any = head.embedding
    if not isinstance(embedding, keras.layers.Embedding):
        raise TypeError(
            "embedding must be the layer that embeds the tokens. "
            f"Received: embedding={embedding!r}. "
            "Give the keras.layers.Embedding that the backbone calls on its tokens."
        )
    if not head.tied or head.kernel_regularizer is not None:
        raise ValueError(
            "A head with an embedding has one kernel, which is the embedding's own. "
            f"Received: tied={head.tied}, kernel_regularizer={head.kernel_regularizer!r}. "
            "Write tied=True, and give the regularizer to the embedding."
        )
    if embedding.input_dim != head.num_classes:
        raise ValueError(
            "An embedding and the head that reads it must have the same tokens. "
            f"Received: num_classes={head.num_classes} for an embedding of "
            f"{embedding.input_dim} tokens. Write num_classes={embedding.input_dim}."
        )


def _check_table(embedding: keras.layers.Embedding, dims: tuple[int, ...]) -> None:
    """Raise if the embedding has no table yet, or one narrower than `dims`."""
    if not embedding.built:
        raise ValueError(
            "The embedding a head reads must be built before the head. "
            f"Received: {embedding.name!r}, which has no weights yet. "
            "Give the very layer that the backbone calls on its tokens, and build that first."
        )
    if embedding.output_dim < dims[-1]:
        raise ValueError(
            "dims must not exceed the width of the embedding the head reads. "
            f"Received: dims={dims} for an embedding of width {embedding.output_dim}. "
            f"Drop the dims above {embedding.output_dim}, or widen the embedding."
        )


def _embedding_config(embedding: keras.layers.Embedding) -> dict[str, Any]:
    """Return the serialized embedding without its build configuration.

    An embedding made from it has no weights, so that `_check_table` refuses it where it should
    have been the backbone's.
    """
    config: dict[str, Any] = keras.saving.serialize_keras_object(embedding)
    config.pop("build_config", None)
    return config


def with_embedding_of(backbone: keras.layers.Layer, head: dict[str, Any]) -> dict[str, Any]:
    """Return the serialized `head` with its embedding replaced by the backbone's layer of its name.

    By name, because a configuration outside a `.keras` file records no shared layers.
    """
    embedding = head["config"].get("embedding")
    if embedding is None:
        return head
    name = embedding["config"]["name"]
    matches = [layer for layer in backbone._flatten_layers() if layer.name == name]
    return {**head, "config": {**head["config"], "embedding": [*matches, embedding][0]}}
