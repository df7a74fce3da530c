"""Loss and metrics of a classifier with exits: one step for all exits and dims.

The loss is the sum over pairs of an exit and a dim. Each counts alike, and those of the last exit
twice, unless the caller lists pairs. To each pair of an earlier exit comes the divergence from the
last exit at its widest dim, which no gradient reaches: with one, the last exit would be pulled
towards the early ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from keras import ops

from .._masks import with_mask_of
from ..layers import MatryoshkaHead
from ..losses import MatryoshkaLoss
from ..losses.distillation import check_distillation
from ..losses.targets import MULTILABEL_LOSSES, SINGLE_LABEL_LOSSES, Teacher
from ..losses.weights import _RowLoss
from ..metrics import MatryoshkaMetric
from .exits import LAST


def pair_weights(
    pairs: Sequence[tuple[str, int]] | None, exits: Sequence[str], dims: tuple[int, ...]
) -> dict[str, tuple[float, ...]]:
    """Return how often each pair counts, by exit one number per dim.

    Args:
        pairs: An exit and a dim each; one that stands twice counts twice. None means all of them,
            those of the last exit twice.
        exits: Names of the exits, the last included.
        dims: The dims of the heads.

    Raises:
        ValueError: If there is no pair, or an exit or a dim that the model does not have.

    Examples:
        >>> from keras_mrl.models.exit_training import pair_weights
        >>> pair_weights(None, ("early", "last"), (8, 64))
        {'early': (1.0, 1.0), 'last': (2.0, 2.0)}
        >>> pair_weights([("early", 8), ("last", 64), ("last", 64)], ("early", "last"), (8, 64))
        {'early': (1.0, 0.0), 'last': (0.0, 2.0)}
    """
    if pairs is None:
        return {name: (2.0 if name == LAST else 1.0,) * len(dims) for name in exits}
    counted = [tuple(pair) for pair in pairs]
    possible = [(name, dim) for name in exits for dim in dims]
    wrong = [pair for pair in counted if pair not in possible]
    if wrong or not counted:
        raise ValueError(
            "pairs must be exits and dims of the model, at least one pair. "
            f"Received: pairs={counted} for exits={tuple(exits)} and dims={dims}. "
            f"Write for example pairs=[{possible[0]!r}, {possible[-1]!r}]."
        )
    return {name: tuple(float(counted.count((name, dim))) for dim in dims) for name in exits}


def distillation_weight(loss: Any, distillation: float | None) -> float:
    """Return the weight of the divergence from the last exit.

    Args:
        loss: The loss of one dim.
        distillation: The weight; None means 1 with a loss of classes, and 0 with any other.

    Raises:
        ValueError: If the weight is not a number of at least 0, or no loss of classes is there.
    """
    has_classes = isinstance(loss, (*SINGLE_LABEL_LOSSES, *MULTILABEL_LOSSES))
    if distillation is None:
        return float(has_classes)
    check_distillation(distillation)
    if distillation and not has_classes:
        raise ValueError(
            "Exits learn from the probabilities that the last exit gives to classes. "
            f"Received: distillation={distillation!r} with {type(loss).__name__}, which has none. "
            "Leave distillation out."
        )
    return float(distillation)


@dataclass(frozen=True)
class ExitTraining:
    """What a step needs to know of the exits. Keras does not track this object.

    Args:
        loss: The loss of every exit.
        heads: The heads by exit, the last included.
        weights: How often each pair of an exit and a dim counts: `pair_weights`.
        distillation: Weight of the divergence from the last exit.
        metrics: The metrics of every exit, as groups without and with sample weights.
        rowwise: What computes loss and metrics of an exit from its features; None if logits are
            needed.
    """

    loss: MatryoshkaLoss
    heads: Mapping[str, MatryoshkaHead]
    weights: Mapping[str, tuple[float, ...]]
    distillation: float
    metrics: Mapping[str, tuple[tuple[MatryoshkaMetric, ...], tuple[MatryoshkaMetric, ...]]]
    rowwise: Mapping[str, Any] | None

    @classmethod
    def of(
        cls,
        loss: MatryoshkaLoss,
        heads: Mapping[str, MatryoshkaHead],
        weights: Mapping[str, tuple[float, ...]],
        distillation: float,
        groups: tuple[Sequence[MatryoshkaMetric], Sequence[MatryoshkaMetric]],
        rowwise: Any,
        short: Mapping[str, str],
    ) -> ExitTraining:
        """Return the training of exits whose metrics are copies of the compiled ones.

        Args:
            loss: As above.
            heads: As above.
            weights: As above.
            distillation: As above.
            groups: The compiled metrics without and with sample weights, which the last exit has.
            rowwise: The step of the last exit; None if logits are needed.
            short: Names of the exits in the log.
        """
        metrics: dict[str, Any] = {LAST: tuple(map(tuple, groups))}
        stems = [own.name for own in groups[0]]
        for name in (own for own in heads if own != LAST):
            metrics[name] = (
                tuple(_copy_of(own, f"{own.name}_{short[name]}") for own in groups[0]),
                tuple(
                    _copy_of(own, f"{'weighted_' * (own.name in stems)}{own.name}_{short[name]}")
                    for own in groups[1]
                ),
            )
        steps = rowwise and {
            name: replace(rowwise, metrics=own[0], weighted_metrics=own[1])
            for name, own in metrics.items()
        }
        return cls(loss, heads, weights, distillation, metrics, steps)

    @property
    def copies(self) -> list[MatryoshkaMetric]:
        """The metrics of all exits but the last."""
        return [
            metric
            for name, groups in self.metrics.items()
            for group in groups
            for metric in group
            if name != LAST
        ]

    def outputs(self, features: Mapping[str, Any], training: bool | None) -> dict[str, Any]:
        """Return what a step computes of the features of all exits: these, or logits."""
        if self.rowwise is not None:
            return dict(features)
        return {name: self.heads[name](own, training=training) for name, own in features.items()}

    def compute_loss(
        self, outputs: Mapping[str, Any], labels: Any, sample_weight: Any, seed: Any, training: bool
    ) -> Any:
        """Return the loss of a batch, and update the metrics of the earlier exits with it.

        Args:
            outputs: As `outputs` returned them.
            labels: As the loss takes them for one dim.
            sample_weight: None, or one weight per row.
            seed: The seed of `dims_per_step`; None in evaluation.
            training: Whether the loss has a gradient.
        """
        total: Any = 0.0
        compute = self._from_logits if self.rowwise is None else self._from_features
        for name in self.heads:
            weights = self.loss.weights_for(len(self.weights[name]), seed)
            own = self.weights[name]
            if isinstance(weights, tuple):
                weights = tuple(c * often for c, often in zip(weights, own, strict=True))
            else:
                weights = weights * ops.convert_to_tensor(own, "float32")
            total = total + compute(name, outputs, labels, sample_weight, weights, training)
        return total

    def _from_features(
        self, name: str, outputs: Any, labels: Any, sample_weight: Any, weights: Any, training: bool
    ) -> Any:
        teacher = None
        if name != LAST and self.distillation:
            head = self.heads[LAST]
            dim = (head.dims or ())[-1]
            kernel, bias = head.weights_at(dim)
            teacher = Teacher(outputs[LAST][..., :dim], kernel, bias, self.distillation)
        step = (self.rowwise or {})[name]
        return step.compute_loss(
            self.heads[name],
            outputs[name],
            labels,
            sample_weight,
            None,
            training,
            ops.convert_to_tensor(weights, "float32"),
            teacher,
        )

    def _from_logits(
        self, name: str, outputs: Any, labels: Any, sample_weight: Any, weights: Any, training: bool
    ) -> Any:
        del training
        if name != LAST:
            for metric in self.metrics[name][0]:
                metric.update_state(labels, outputs[name])
            for metric in self.metrics[name][1]:
                metric.update_state(labels, outputs[name], sample_weight=sample_weight)
        if isinstance(weights, tuple) and not any(weights):
            return 0.0
        taught = ops.stop_gradient(outputs[LAST][..., -1, :])

        def rows(y_true: Any, y_pred: Any) -> Any:
            losses = self.loss.rows(y_true, y_pred, weights=weights)
            if name == LAST or not self.distillation:
                return losses
            divergences = _divergences(self.loss.loss, taught, y_pred)
            weighted = ops.sum(divergences * ops.convert_to_tensor(weights, losses.dtype), axis=-1)
            return with_mask_of(losses, losses + self.distillation * weighted)

        return _RowLoss(rows, self.loss)(labels, outputs[name], sample_weight=sample_weight)


def _copy_of(metric: MatryoshkaMetric, name: str) -> MatryoshkaMetric:
    """Return a metric of the same kind under another name, with a state of its own."""
    return MatryoshkaMetric(metric.metric, metric.dims, name, metric.activation)


def _divergences(loss: Any, taught: Any, logits: Any) -> Any:
    """Return the divergence of every dim from a teacher, `(..., num_dims)`.

    Args:
        loss: The loss of one dim, which says whether classes exclude each other.
        taught: Logits of the teacher, `(..., num_classes)`.
        logits: `(..., num_dims, num_classes)`.
    """
    taught = ops.expand_dims(ops.cast(taught, logits.dtype), -2)
    if isinstance(loss, SINGLE_LABEL_LOSSES):
        log_shares = ops.log_softmax(taught, axis=-1)
        return ops.sum(ops.exp(log_shares) * (log_shares - ops.log_softmax(logits, axis=-1)), -1)
    share = ops.sigmoid(taught)
    yes = share * (ops.log_sigmoid(taught) - ops.log_sigmoid(logits))
    no = (1 - share) * (ops.log_sigmoid(-taught) - ops.log_sigmoid(-logits))
    return ops.mean(yes + no, axis=-1)  # as Keras's loss averages the labels
