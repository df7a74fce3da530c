"""Losses on embeddings, summed over their prefixes: any Keras loss, pairs, and labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_mrl_serving.integers import check_positive_integer

from .._dims import check_dims, check_width
from .candidates import find_positives
from .distillation import similarity_divergences
from .similarity import TINY, NestedRows, Task, check_temperature
from .weights import (
    Weights,
    _NestedLoss,
    _RowLoss,
    name_in_error,
    positive_weights,
    step_weights,
)


class _EmbeddingLoss(_NestedLoss):
    """The base of all three: a nested loss that knows its dims."""

    def __init__(
        self, dims: Sequence[int], weights: Weights, dims_per_step: int | None, **kwargs: Any
    ) -> None:
        super().__init__(weights, dims_per_step, **kwargs)
        self.dims = check_dims(dims)
        self.trained_dims, self._trained_weights = positive_weights(self.weights, self.dims)

    def rows(self, y_true: Any, y_pred: Any, seed: Any = None) -> Any:
        """Return the weighted sum over the dims of one step, one value per row."""
        return self.measure(y_true, y_pred, seed)[0]

    def measure(
        self, y_true: Any, y_pred: Any, seed: Any = None, temperature: Any = None
    ) -> tuple[Any, Any]:
        """Return the loss of every row, and at which dims its nearest embedding is a right one.

        Args:
            y_true: As for the loss.
            y_pred: As for the loss.
            seed: In a training step, the `keras.random.SeedGenerator` of the model.
            temperature: Replaces the loss's own, if it has one.

        Returns:
            `(batch,)` losses, and `(num_dims, batch)` hits, zeros and ones, over `trained_dims`;
            None in place of hits if the loss compares no rows.
        """
        raise NotImplementedError

    def _step_weights(self, seed: Any) -> Any:
        return step_weights(self._trained_weights, self.dims_per_step, seed)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make this loss again."""
        return {**super().get_config(), "dims": self.dims}


@keras.saving.register_keras_serializable(package="keras_mrl")
class MatryoshkaEmbeddingLoss(_EmbeddingLoss):
    """The weighted sum of one Keras loss over prefixes of the embeddings, each of unit length.

    A prefix is cut first and scaled afterwards, in float32. An all-zero prefix stays zero and has
    a gradient of zero. For pairs and for labels, `ContrastiveLoss` and `SupervisedContrastiveLoss`
    cost less: they multiply every coordinate once for all the dims it is in.

    Args:
        loss: A `keras.losses.Loss` on embeddings of any width. Its reduction is the reduction of
            the sum.
        dims: Strictly increasing prefix lengths, the widest at most the embeddings' width.
        weights: The c_m, one per dim, or a function from the number of dims to them; None means
            ones.
        nested_targets: Whether `y_true` holds embeddings, such as a teacher's, to be cut and scaled
            like `y_pred`; otherwise `loss` takes `y_true` as it is.
        dims_per_step: How many dims a training step of `MatryoshkaEncoder` counts, the widest
            included; None means all.
        name: Name of the loss.

    Shapes:
        `y_pred`: `(..., width)`. `y_true`: what `loss` takes; `(..., width)` if nested.

    Formula:
        L = sum_m c_m * loss(y_true, y_pred[..., :m] / |y_pred[..., :m]|)

    Raises:
        TypeError: If `loss` is not a `keras.losses.Loss` on embeddings.
        ValueError: If `dims`, `weights` or `dims_per_step` are not valid.

    Examples:
        >>> loss = MatryoshkaEmbeddingLoss(
        ...     keras.losses.CosineSimilarity(), dims=(1, 2), nested_targets=True
        ... )
        >>> teacher, student = keras.ops.array([[3.0, 4.0]]), keras.ops.array([[1.0, 0.0]])
        >>> round(float(loss(teacher, student)), 3)  # -1 at 1 dim, -0.6 at 2
        -1.6
    """

    def __init__(
        self,
        loss: keras.losses.Loss,
        dims: Sequence[int],
        weights: Weights = None,
        *,
        nested_targets: bool = False,
        dims_per_step: int | None = None,
        name: str = "matryoshka_embedding_loss",
    ) -> None:
        unfit = (_NestedLoss, *_LOSSES_ON_LOGITS)
        if not isinstance(loss, keras.losses.Loss) or isinstance(loss, unfit):
            raise TypeError(
                "loss must be a Keras loss on embeddings of one width. "
                f"Received: {name_in_error(loss)}. Give an instance, for example "
                "keras.losses.CosineSimilarity(); logits of classes need a MatryoshkaHead and "
                "MatryoshkaLoss."
            )
        super().__init__(
            dims, weights, dims_per_step, name=name, reduction=loss.reduction, dtype=loss.dtype
        )
        self.loss = loss
        self.nested_targets = nested_targets

    def measure(
        self, y_true: Any, y_pred: Any, seed: Any = None, temperature: Any = None
    ) -> tuple[Any, Any]:
        """Return the loss of every row, and None in place of hits."""
        del temperature
        check_width(self.dims, y_pred.shape[-1])
        if self.nested_targets:
            check_width(self.dims, y_true.shape[-1])
        weights = self._step_weights(seed)
        total: Any = 0.0
        for index, dim in enumerate(self.trained_dims):
            target = _unit_prefix(y_true, dim) if self.nested_targets else y_true
            total = total + weights[index] * self.loss.call(target, _unit_prefix(y_pred, dim))
        return total, None

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make this loss again."""
        config = super().get_config()
        del config["reduction"]  # that of the inner loss
        inner = keras.saving.serialize_keras_object(self.loss)
        return {**config, "loss": inner, "nested_targets": self.nested_targets}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MatryoshkaEmbeddingLoss:
        """Make the loss again."""
        inner = keras.saving.deserialize_keras_object(config["loss"])
        return super().from_config({**config, "loss": inner})


_LOSSES_ON_LOGITS = (
    keras.losses.SparseCategoricalCrossentropy,
    keras.losses.CategoricalCrossentropy,
    keras.losses.CategoricalFocalCrossentropy,
)


def _unit_prefix(embeddings: Any, dim: int) -> Any:
    """Return the first `dim` coordinates scaled to unit length, in float32; zero stays zero."""
    prefix = ops.cast(embeddings[..., :dim], "float32")
    square = ops.sum(ops.square(prefix), axis=-1, keepdims=True)
    root = ops.rsqrt(ops.maximum(square, TINY))
    return prefix * ops.where(square > TINY, root, ops.zeros_like(root))


class _SimilarityLoss(_EmbeddingLoss):
    """The base of losses that compare the embeddings of a batch by a softmax over cosines."""

    def __init__(self, temperature: float, chunk_size: int | None, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.temperature = check_temperature(temperature)
        if chunk_size is not None:
            remedy = "Give how many rows are compared at a time, or None for all at once."
            chunk_size = check_positive_integer("chunk_size", chunk_size, remedy)
        self.chunk_size = chunk_size

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """Return the reduced loss, as every Keras loss does.

        Keras casts labels to float32, in which ids above 2**24 fall together. Here they do not.
        """
        if y_true is not None:
            y_true = keras.tree.map_structure(ops.convert_to_tensor, y_true)
        y_pred = ops.convert_to_tensor(y_pred)
        losses = self.call(y_true, y_pred)
        return _RowLoss(lambda losses, _: losses, self)(losses, y_pred, sample_weight)

    def _compare(
        self, anchors: Any, candidates: Any, task: Task, temperature: Any
    ) -> tuple[Any, Any]:
        """Return losses and hits `(num_dims, rows)`, of float32 embeddings `(rows, width)`."""
        scale = 1.0 / (self.temperature if temperature is None else temperature)
        return NestedRows(self.trained_dims, task, self.chunk_size)(anchors, candidates, scale)

    def _weighted(self, losses: Any, seed: Any) -> Any:
        """Return the sum over dims of `(num_dims, rows)`, one value per row."""
        weights = ops.convert_to_tensor(self._step_weights(seed), "float32")
        return ops.sum(losses * ops.expand_dims(weights, 1), axis=0)

    def divergences(self, y_pred: Any, taught: Any, temperature: Any = None) -> Any:
        """Return how far the similarities are from a teacher's, summed over dims, one per row.

        Args:
            y_pred: As for the loss.
            taught: The teacher's embeddings, in the same shape. No gradient reaches them.
            temperature: As for `measure`.
        """
        own, others = (ops.cast(tensor, "float32") for tensor in (y_pred, taught))
        scale = 1.0 / (self.temperature if temperature is None else temperature)
        anchors, candidates = self._compared(own)
        is_one_set = anchors is candidates
        divergences = similarity_divergences(
            anchors,
            candidates,
            *self._compared(others),
            dims=self.trained_dims,
            scale=scale,
            chunk_size=self.chunk_size,
            is_one_set=is_one_set,
        )
        if is_one_set and len(y_pred.shape) == 3:  # the mean over the views of a row
            by_view = (len(self.trained_dims), -1, y_pred.shape[1])
            divergences = ops.mean(ops.reshape(divergences, by_view), axis=2)
        return self._weighted(divergences, None)

    def _compared(self, y_pred: Any) -> tuple[Any, Any]:
        """Return the anchors and the candidates among embeddings, each `(rows, width)`."""
        raise NotImplementedError

    def _check_embeddings(self, y_pred: Any) -> None:
        check_width(self.dims, y_pred.shape[-1])
        if y_pred.shape[0] == 0:
            raise ValueError(
                f"{type(self).__name__} needs at least one row. "
                f"Received: embeddings of shape {tuple(y_pred.shape)}. "
                "Leave empty batches out."
            )

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make this loss again."""
        arguments = {"temperature": self.temperature, "chunk_size": self.chunk_size}
        return {**super().get_config(), **arguments}


@keras.saving.register_keras_serializable(package="keras_mrl")
class ContrastiveLoss(_SimilarityLoss):
    """The softmax over in-batch negatives (InfoNCE), summed over nested prefixes of both sides.

    Row i of the first embeddings is an anchor, and row i of the second is its positive. Its
    negatives are the positives of all other rows, and every row of further embeddings (hard
    negatives) if there are any. Prefixes are cut first and then scaled to unit length. A coordinate
    is multiplied once for all the dims it is in.

    Where a positive stands in several rows, give the ids of the candidates. Then no other copy of
    an anchor's positive is taken for a negative, and a negative that stands c times counts once:
    each copy weighs 1/c. Where popular candidates are drawn more often than others, give their
    sampling probabilities. Then the log of it is taken from every logit, and a negative counts as
    often as it stands. Hits are counted by the cosines alone, with no other copy of the positive.

    With a `chunk_size`, only that many anchors are compared at a time. Values and gradients stay
    the same; memory grows with the batch instead of its square, and one matrix product is computed
    twice.

    Args:
        dims: Strictly increasing prefix lengths, the widest at most the embeddings' width.
        weights: The c_m, one per dim, or a function from the number of dims to them; None means
            ones. A dim of weight 0 is not computed.
        temperature: Divides the cosines. `MatryoshkaEncoder` can learn it instead.
        symmetric: Whether positives also look for their anchors; the two losses are averaged.
        chunk_size: How many anchors are compared at a time; None means all.
        dims_per_step: How many dims a training step of `MatryoshkaEncoder` counts, the widest
            included; None means all.
        reduction: As of every Keras loss.
        name: Name of the loss.

    Shapes:
        `y_pred`: `(batch, 2 + negatives, width)`. `y_true`: None, integer ids, or a dict with the
        keys `candidate_ids` and `candidate_sampling_probability`, or one of them. Each is
        `(batch, 1 + negatives)`, or `(batch,)` for pairs; ids may be those of the positives alone.
        Of probabilities only the ratios count, so how often a candidate stands in the data will do.

    Formula:
        L_i = sum_m c_m * -log softmax_j(cos(a_i[1:m], b_j[1:m]) / temperature - log q_j)[j = i],
        over j = i and all j of another id; q_j is the given probability, or else the number of
        candidates with the id of j, for j = i 1

    Raises:
        ValueError: If an argument or the shape of `y_pred` is wrong, or a batch is empty.

    Reference:
        van den Oord et al., Representation Learning with Contrastive Predictive Coding, arXiv
        1807.03748; Kusupati et al., arXiv 2205.13147, section 3; Yi et al., Sampling-Bias-Corrected
        Neural Modeling for Large Corpus Item Recommendations, RecSys 2019, section 3.

    Examples:
        >>> loss = ContrastiveLoss(dims=(2, 4))
        >>> pairs = keras.ops.ones((3, 2, 4))  # all alike: each of three is as likely
        >>> round(float(loss(None, pairs)), 3)  # 2 dims x log 3
        2.197
        >>> round(float(loss(np.array([7, 7, 9]), pairs)), 3)  # 2 dims x log 2
        1.386
    """

    def __init__(
        self,
        dims: Sequence[int],
        weights: Weights = None,
        *,
        temperature: float = 0.05,
        symmetric: bool = False,
        chunk_size: int | None = None,
        dims_per_step: int | None = None,
        reduction: str | None = "sum_over_batch_size",
        name: str = "contrastive_loss",
    ) -> None:
        super().__init__(
            temperature, chunk_size, dims, weights, dims_per_step, reduction=reduction, name=name
        )
        self.symmetric = symmetric

    def measure(
        self, y_true: Any, y_pred: Any, seed: Any = None, temperature: Any = None
    ) -> tuple[Any, Any]:
        """Return the loss of every pair, and at which dims an anchor's nearest is its positive."""
        if len(y_pred.shape) != 3 or y_pred.shape[1] < 2:
            raise ValueError(
                "ContrastiveLoss needs embeddings of pairs (batch, 2, width), or of more sides "
                f"with hard negatives. Received: y_pred of shape {tuple(y_pred.shape)}. "
                "Train a MatryoshkaEncoder, or stack the two embeddings: ops.stack([a, b], axis=1)."
            )
        self._check_embeddings(y_pred)
        embeddings = ops.cast(y_pred, "float32")
        anchors, *others = (embeddings[:, side] for side in range(y_pred.shape[1]))
        candidates, task = ops.concatenate(others), find_positives(y_true, y_pred, self.symmetric)
        losses, hits = self._compare(anchors, candidates, task, temperature)
        return self._weighted(losses, seed), hits

    def _compared(self, y_pred: Any) -> tuple[Any, Any]:
        """Return the first side, and all others behind each other."""
        return y_pred[:, 0], ops.concatenate(
            [y_pred[:, side] for side in range(1, y_pred.shape[1])], axis=0
        )

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make this loss again."""
        return {**super().get_config(), "symmetric": self.symmetric}


@keras.saving.register_keras_serializable(package="keras_mrl")
class SupervisedContrastiveLoss(_SimilarityLoss):
    """The supervised contrastive loss, summed over nested prefixes of unit length.

    Every row of the batch is compared with all others, and should find those of its own label. A
    row whose label no other row has adds nothing, so batches need two rows or more of most classes.

    Args:
        dims: Strictly increasing prefix lengths, the widest at most the embeddings' width.
        weights: The c_m, one per dim, or a function from the number of dims to them; None means
            ones. A dim of weight 0 is not computed.
        temperature: Divides the cosines. `MatryoshkaEncoder` can learn it instead.
        chunk_size: How many rows are compared at a time; None means all.
        dims_per_step: How many dims a training step of `MatryoshkaEncoder` counts, the widest
            included; None means all.
        reduction: As of every Keras loss.
        name: Name of the loss.

    Shapes:
        `y_true`: integer labels `(batch,)` or `(batch, 1)`. `y_pred`: embeddings `(batch, width)`,
        or `(batch, views, width)` for several views of every row.

    Formula:
        L_i = sum_m c_m * -mean_{p: y_p = y_i, p != i} log softmax_{j != i}(cos_m(i, j) / T)[j = p]

    Raises:
        ValueError: If an argument or a shape is wrong, or a batch is empty.

    Reference:
        Khosla et al., Supervised Contrastive Learning, arXiv 2004.11362, equation 2.

    Examples:
        >>> loss = SupervisedContrastiveLoss(dims=(2, 4))
        >>> embeddings = keras.ops.ones((3, 4))
        >>> round(float(loss(keras.ops.array([7, 7, 7]), embeddings)), 3)  # 2 dims x log 2
        1.386
    """

    def __init__(
        self,
        dims: Sequence[int],
        weights: Weights = None,
        *,
        temperature: float = 0.1,
        chunk_size: int | None = None,
        dims_per_step: int | None = None,
        reduction: str | None = "sum_over_batch_size",
        name: str = "supervised_contrastive_loss",
    ) -> None:
        super().__init__(
            temperature, chunk_size, dims, weights, dims_per_step, reduction=reduction, name=name
        )

    def measure(
        self, y_true: Any, y_pred: Any, seed: Any = None, temperature: Any = None
    ) -> tuple[Any, Any]:
        """Return the loss of every row, and at which dims its nearest has its label.

        Where a row has several views, both are means over them.
        """
        labels_shape = None if y_true is None else tuple(y_true.shape)
        is_one_per_row = labels_shape is not None and (
            len(labels_shape) == 1 or (len(labels_shape) == 2 and labels_shape[1] == 1)
        )
        if len(y_pred.shape) not in (2, 3) or not is_one_per_row:
            raise ValueError(
                "SupervisedContrastiveLoss needs one integer label per row, and embeddings of "
                "shape (batch, width) or (batch, views, width). "
                f"Received: y_true of shape {labels_shape} and y_pred of shape "
                f"{tuple(y_pred.shape)}. Of one-hot labels take the argmax."
            )
        self._check_embeddings(y_pred)
        views = y_pred.shape[1] if len(y_pred.shape) == 3 else 1
        embeddings = ops.cast(ops.reshape(y_pred, (-1, y_pred.shape[-1])), "float32")
        task = _same_label(ops.repeat(ops.reshape(y_true, (-1,)), views))
        by_view = (len(self.trained_dims), -1, views)
        losses, hits = (
            ops.mean(ops.reshape(values, by_view), axis=2)
            for values in self._compare(embeddings, embeddings, task, temperature)
        )
        return self._weighted(losses, seed), hits

    def _compared(self, y_pred: Any) -> tuple[Any, Any]:
        """Return all rows, twice."""
        rows = ops.reshape(y_pred, (-1, y_pred.shape[-1]))
        return rows, rows


def _same_label(labels: Any) -> Task:
    """Return the task to find the other rows of the same label, each as right as the next."""

    def compared(numbers: Any) -> Any:
        all_numbers = ops.arange(ops.shape(labels)[0], dtype="int32")
        return ops.not_equal(ops.expand_dims(numbers, 1), all_numbers)

    def targets(numbers: Any) -> Any:
        own_labels = ops.take(labels, ops.minimum(numbers, ops.shape(labels)[0] - 1))
        is_same = ops.equal(ops.expand_dims(own_labels, 1), labels)
        is_right = ops.cast(ops.logical_and(is_same, compared(numbers)), "float32")
        return is_right / ops.maximum(ops.sum(is_right, axis=1, keepdims=True), 1.0)

    return Task(targets, compared)
