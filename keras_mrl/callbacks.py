"""Callbacks for `fit`: the nearest embeddings at every dim, and one number for all dims.

Keras passes the log of an epoch to the callbacks in the order of their list, and then to its own
history and progress bar. A callback that writes an entry must stand before one that reads it:
`callbacks=[NeighborMetrics(...), AcrossDims("1nn"), EarlyStopping("val_1nn_worst", mode="max")]`.
`fit` of a `MatryoshkaClassifier` or a `MatryoshkaEncoder` finds the mode of such entries by itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from ._arrays import as_labels, check_kinds, check_unmasked, is_dataset, labelled_batches
from ._dims import check_dims, check_weights
from ._modes import _Writer, mode_of_metric
from ._tokens import are_texts, as_texts, tokenized
from .evaluation.inputs import dims_of
from .evaluation.neighbors import check_gallery, mean_average_precision_at_k, nearest_hits
from .metrics import MatryoshkaMetric
from .models.cut import as_model, check_one_vector, gallery_backbone, split
from .text import preprocessor_of


class _Neighbors(_Writer):
    """The base of callbacks that look for the nearest rows of a gallery at every dim."""

    def __init__(
        self,
        gallery: tuple[Any, Any],
        queries: tuple[Any, Any],
        k: int,
        dims: Sequence[int] | None,
        batch_size: int,
        output: str | None = None,
    ) -> None:
        super().__init__()
        self.k = check_gallery(len(gallery[1]), k)
        self._gallery, self.queries = gallery, queries
        self.dims = None if dims is None else check_dims(dims)
        self.batch_size = batch_size
        self.output = output
        self._towers: Any = None  # of the gallery and of the queries
        self._rows: Any = None  # of both, with tokens in the place of strings
        self._measured: tuple[int, ...] = ()

    def measures(self, hits: Any) -> dict[str, float]:
        """Return what is written of one dim, by name, from booleans `(queries, k)`."""
        raise NotImplementedError

    def _stem(self) -> str:
        return "" if self.output is None else f"{self.output}_"

    def on_train_begin(self, logs: Any = None) -> None:
        """Forget the model of an earlier `fit`."""
        del logs
        self._towers = self._rows = None

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Embed both sides, search, and write the measures of every dim."""
        del epoch
        if self._towers is None:  # stored: a new model would compile `predict` every epoch
            backbone, head = split(self.model, self.output)
            check_one_vector(self.model, backbone)
            self._measured = dims_of(type(self).__name__, self.model, head, self.dims)
            other, tower = gallery_backbone(self.model, backbone), as_model(backbone)
            self._towers = (tower if other is backbone else as_model(other), tower)
            preprocessor = preprocessor_of(self.model)
            self._rows = [tokenized(preprocessor, x) for x, _ in (self._gallery, self.queries)]
        gallery_y, query_y = self._gallery[1], self.queries[1]
        gallery, queries = map(self._embed, self._towers, self._rows)
        for dim in self._measured:
            hits = nearest_hits(gallery, gallery_y, queries, query_y, dim, self.k)
            for name, value in self.measures(hits).items():
                logs[f"val_{self._stem()}{name}_{dim}"] = value

    def _embed(self, tower: keras.Model, inputs: Any) -> Any:
        embeddings = tower.predict(inputs, batch_size=self.batch_size, verbose=0)
        return keras.ops.convert_to_numpy(embeddings).astype("float32")


class NeighborMetrics(_Neighbors):
    """1-NN accuracy and map10 of the embeddings at every dim, after every epoch.

    Writes `val_1nn_<dim>` and `val_map10_<dim>` into the log, for the callbacks that follow it in
    the list. The gallery of a `MatryoshkaEncoder` of two towers goes through the other tower.
    Each epoch it embeds both sides and searches exactly, queries x gallery x dims multiply-adds: a
    few thousand rows are enough.

    Args:
        gallery: Inputs and integer labels `(x, y)` to find neighbours among, e.g. of training; or a
            `tf.data.Dataset`, a `keras.utils.PyDataset` or a PyTorch `DataLoader` of batches of
            them, which is read into memory.
        queries: The same of other rows, e.g. of validation.
        dims: Dims to measure; None means those of the model's head, or of the loss of a
            `MatryoshkaEncoder`. The output of a model without
            a head is taken as its embedding.
        batch_size: Rows that are embedded at a time.
        output: Whose features to measure, in a model with several outputs. The entries are then
            `val_<output>_1nn_<dim>` and `val_<output>_map10_<dim>`, as Keras names those of its
            metrics.

    Raises:
        ValueError: If inputs and labels do not fit, a side has no row, the labels of the two sides
            are of different kinds, the gallery has fewer than 10 rows, there are no dims, or
            `output` is none of the model's outputs.

    Reference:
        Kusupati et al., Matryoshka Representation Learning, section 4.2 (1-NN) and 4.3 (mAP@10).

    Examples:
        >>> inputs = keras.Input((8,))
        >>> head = MatryoshkaHead(2, dims=(2, 4))
        >>> model = keras.Model(inputs, head(keras.layers.Dense(4)(inputs)))
        >>> loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        >>> model.compile("sgd", MatryoshkaLoss(loss))
        >>> x, y = np.eye(20, 8, dtype="float32"), np.arange(20) % 2
        >>> neighbors = NeighborMetrics(gallery=(x[:16], y[:16]), queries=(x[16:], y[16:]))
        >>> log = model.fit(x, y, callbacks=[neighbors], verbose=0).history
        >>> [name for name in sorted(log) if "1nn" in name]
        ['val_1nn_2', 'val_1nn_4']
    """

    def __init__(
        self,
        gallery: Any,
        queries: Any,
        dims: Sequence[int] | None = None,
        batch_size: int = 256,
        output: str | None = None,
    ) -> None:
        gallery, queries = _check_pair("gallery", gallery), _check_pair("queries", queries)
        check_kinds(queries[1], gallery[1])
        super().__init__(gallery, queries, 10, dims, batch_size, output)
        self.gallery = gallery

    def mode_of(self, entry: str) -> str | None:
        """Return "max" for the entries of this callback."""
        stem = re.escape(self._stem())
        return "max" if re.fullmatch(rf"{stem}(1nn|map10)_\d+", entry) else None

    def measures(self, hits: Any) -> dict[str, float]:
        """Return 1-NN accuracy and map10."""
        return {"1nn": float(hits[:, 0].mean()), "map10": mean_average_precision_at_k(hits)}


class CorpusRecall(_Neighbors):
    """Recall@k over a whole corpus of candidates at every dim, after every epoch.

    Writes `val_recall@<k>_<dim>` into the log, for the callbacks that follow it in the list: the
    share of queries whose candidate is among the k nearest of the corpus. The `recall_<dim>` of a
    `MatryoshkaEncoder` compares with the candidates of one batch alone. Each epoch it embeds both
    sides and searches exactly, queries x corpus x dims multiply-adds.

    Args:
        corpus: Inputs and ids `(x, ids)` of all candidates, each once, or a data set of them, as
            for `NeighborMetrics`. They go through the other tower of an encoder of two.
        queries: Inputs and the id of the candidate that each should find, `(x, ids)`. A query with
            several right candidates stands once for each.
        k: How many of the nearest count.
        dims: Dims to measure; None means those of the loss of a `MatryoshkaEncoder`, or of the
            model's head.
        batch_size: Rows that are embedded at a time.

    Raises:
        ValueError: If inputs and ids do not fit, a side has no row, the corpus holds an id twice,
            lacks one of the queries', or has fewer than k rows, or there are no dims.

    Examples:
        >>> tower = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
        >>> encoder = MatryoshkaEncoder(tower)
        >>> encoder.compile("sgd", ContrastiveLoss(dims=(2, 4)))
        >>> x, ids = np.eye(8, dtype="float32"), np.arange(8)
        >>> recall = CorpusRecall(corpus=(x, ids), queries=(x[:3] + 0.1, ids[:3]), k=5)
        >>> log = encoder.fit(x=(x, x), y=ids, callbacks=[recall], verbose=0).history
        >>> sorted(log)
        ['loss', 'recall_2', 'recall_4', 'val_recall@5_2', 'val_recall@5_4']
    """

    def __init__(
        self,
        corpus: Any,
        queries: Any,
        k: int = 10,
        dims: Sequence[int] | None = None,
        batch_size: int = 256,
    ) -> None:
        corpus, queries = _check_pair("corpus", corpus), _check_pair("queries", queries)
        check_kinds(queries[1], corpus[1])
        repeated = len(corpus[1]) - len(np.unique(corpus[1]))
        missing = ~np.isin(queries[1], corpus[1])
        if repeated or missing.any():
            raise ValueError(
                "A corpus must hold every candidate once, and those of all queries. "
                f"Received: {repeated} ids of the corpus that repeat earlier ones, "
                f"{missing.sum()} of {len(missing)} queries whose id is not in it. "
                "Keep the first of each: ids, rows = numpy.unique(ids, return_index=True), and "
                "add what is missing."
            )
        super().__init__(corpus, queries, k, dims, batch_size)
        self.corpus = corpus

    def mode_of(self, entry: str) -> str | None:
        """Return "max" for the entries of this callback."""
        return "max" if re.fullmatch(rf"recall@{self.k}_\d+", entry) else None

    def measures(self, hits: Any) -> dict[str, float]:
        """Return the recall."""
        return {f"recall@{self.k}": float(hits.any(axis=1).mean())}


def _check_pair(name: str, pair: Any) -> tuple[Any, Any]:
    """Return the inputs as they are, and their labels as an array `(rows,)`."""
    if is_dataset(pair):
        parts, labels_by_batch = zip(*labelled_batches(name, pair), strict=True)
        x = keras.tree.map_structure(lambda *arrays: np.concatenate(arrays), *parts)
        pair = x, np.concatenate(labels_by_batch)
    received = f"a {type(pair).__name__}"
    if isinstance(pair, (tuple, list)) and len(pair) == 2:
        x, y = pair
        x = as_texts(x) if are_texts(x) else x
        check_unmasked(x)
        labels = as_labels(y)
        shapes = [tuple(np.shape(part)) for part in keras.tree.flatten(x)]
        received = f"inputs of shapes {shapes}, labels of shape {labels.shape}"
        if labels.size and {shape[:1] for shape in shapes} == {labels.shape}:
            return x, labels
    raise ValueError(
        f"{name} must be inputs and their labels, one per row, at least one. "
        f"Received: {received}. Write {name}=(x, y), with integer labels (rows,)."
    )


class AcrossDims(_Writer):
    """One number for all dims: the worst, and the weighted mean.

    Reads the entries `<name>_<dim>` and `val_<name>_<dim>` of the log, and writes `<name>_worst`,
    `<name>_mean`, `val_<name>_worst` and `val_<name>_mean`. Keras's own `ModelCheckpoint`,
    `EarlyStopping` and `TensorBoard` read them if they follow it in the list.

    Args:
        name: Stem of the entries, such as "accuracy", "1nn" or "map10".
        weights: Weights of the mean, one per dim, in ascending order of dims; None means equal
            ones.
        lower_is_better: Whether the worst dim is the one with the largest number; None takes it
            from the metric of that name, and where there is none, more is better.

    Raises:
        ValueError: If the log has no such entry, or more or fewer of them than `weights`.

    Examples:
        >>> log = {"val_accuracy_8": 0.5, "val_accuracy_16": 0.75}
        >>> AcrossDims("accuracy", weights=(3, 1)).on_epoch_end(0, log)
        >>> log["val_accuracy_worst"], log["val_accuracy_mean"]
        (0.5, 0.5625)
    """

    def __init__(
        self,
        name: str,
        weights: Sequence[float] | None = None,
        lower_is_better: bool | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.weights = None if weights is None else check_weights(weights, len(weights))
        self.lower_is_better = lower_is_better

    def mode_of(self, entry: str) -> str | None:
        """Return "min" for the entries of this callback if lower is better, otherwise "max"."""
        if entry not in (f"{self.name}_worst", f"{self.name}_mean"):
            return None
        return "min" if self._is_lower_better() else "max"

    def _is_lower_better(self) -> bool:
        if self.lower_is_better is not None:
            return self.lower_is_better
        modes = self.metric_modes
        if self.name not in modes and self.model is not None:  # a functional model, in its `fit`
            modes = _modes_in(self.model)
        # Of one of several outputs the entry's name ends in that of the metric.
        names = [name for name in modes if f"_{self.name}".endswith(f"_{name}")]
        return bool(names) and modes[max(names, key=len)] == "min"

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Write the worst dim and the weighted mean."""
        del epoch
        written = False
        for stem in (self.name, f"val_{self.name}"):
            entry = re.compile(rf"{re.escape(stem)}_(\d+)")
            matches = map(entry.fullmatch, list(logs))
            value_by_dim = {int(match[1]): logs[match[0]] for match in matches if match}
            if value_by_dim:
                values = [value_by_dim[dim] for dim in sorted(value_by_dim)]
                weights = check_weights(self.weights, len(values))
                weighted = sum(w * v for w, v in zip(weights, values, strict=True))
                logs[f"{stem}_worst"] = (max if self._is_lower_better() else min)(values)
                logs[f"{stem}_mean"] = weighted / sum(weights)
                written = True
        if not written:
            raise ValueError(
                "AcrossDims needs a log with an entry per dim. "
                f"Received: no {self.name}_<dim> among {sorted(logs)}. "
                "Compile a MatryoshkaMetric of that name, or put the callback that writes the "
                "entries before this one."
            )


def _modes_in(model: keras.Model) -> Mapping[str, str | None]:
    """Return the modes of the metrics per dim that a model is compiled with, by name."""
    groups = [[metric, *getattr(metric, "metrics", [])] for metric in model.metrics]
    metrics = [metric for group in groups for metric in group]
    nested = [metric for metric in metrics if isinstance(metric, MatryoshkaMetric)]
    return {metric.name: mode_of_metric(metric.metric) for metric in nested}
