"""One TensorFlow function per signature of the contract, all of them on one backbone function."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from keras_mrl_serving import contract
from keras_mrl_serving.cascade.confidence import check_confidence
from keras_mrl_serving.cascade.policy import CascadePolicy
from keras_mrl_serving.contract import Manifest

from .gallery import IndexGraph
from .graph import Tensors, describing, lengths, traced
from .job import Job
from .sample import declared_inputs, input_structure

# The likeliest of very many classes, without a pass over all of them for each question.

_MANY = 4096  # classes; below, TensorFlow's own top_k is as fast


class Likeliest:
    """Probabilities of rows, with the largest of each run of classes.

    The largest probability of a row, and the few best ones, are then found among the runs: of
    100,000 classes `top_k` reads every one again, in one thread, and the rows it is asked for have
    to be copied first. The answers are those of `top_k`: of equal classes the lower id.

    Args:
        logits: `(rows, classes)`; the number of classes is known.
        temperature: What logits are divided by.
    """

    def __init__(self, logits: Any, temperature: float) -> None:
        self._probabilities = tf.nn.softmax(logits if temperature == 1 else logits / temperature)
        classes = int(logits.shape[-1])
        self._run = _run_length(classes)
        self._runs = classes // self._run
        self._largest = self._probabilities
        if self._run > 1:
            by_run = tf.reshape(self._probabilities, [-1, self._runs, self._run])
            self._largest = tf.reduce_max(by_run, axis=-1)

    def confidence(self, measure: str) -> Any:
        """Return how sure each row is, `(rows,)`, as `keras_mrl_serving` counts it without a graph.

        Args:
            measure: One of its `CONFIDENCES`.
        """
        if check_confidence(measure) == "max_probability":
            return tf.reduce_max(self._largest, axis=-1)
        if measure == "entropy":
            shares = self._probabilities
            return tf.reduce_sum(tf.math.xlogy(shares, shares), axis=-1)
        if self._probabilities.shape[-1] == 1:
            return self._probabilities[:, 0]
        first, second = tf.unstack(self.best(tf.range(tf.shape(self._largest)[0]), 2)[0], axis=1)
        return first - second

    def best(self, rows: Any, k: int) -> tuple[Any, Any]:
        """Return the `k` largest probabilities of some rows, and their classes.

        Args:
            rows: int32 `(chosen,)`.
            k: How many.

        Returns:
            Two of `(chosen, k)`, best first.
        """
        largest = tf.gather(self._largest, rows)
        if self._run == 1 or k >= self._runs:
            return tuple(tf.math.top_k(tf.gather(self._probabilities, rows), k))
        # The k best lie in the k runs whose largest are the largest. In order of the runs, so that
        # of equal classes the lower id comes first.
        runs = tf.sort(tf.math.top_k(largest, k).indices, axis=-1)
        by_run = tf.reshape(self._probabilities, [-1, self._run])
        among = tf.gather(by_run, rows[:, None] * self._runs + runs)
        best, at = tf.math.top_k(tf.reshape(among, [-1, k * self._run]), k)
        run = tf.gather(runs, at // self._run, batch_dims=1)
        return best, run * self._run + at % self._run


def _run_length(classes: int) -> int:
    """A divisor of the number of classes near its root; 1 where there is none, or no need."""
    root = math.isqrt(classes)
    near = range(root // 4, 4 * root)
    fitting = [n for n in near if n > 1 and classes % n == 0] if classes >= _MANY else []
    return min(fitting, key=lambda n: abs(math.log(n / root)), default=1)


# Adaptive classification inside the graph: one backbone pass, each wider head for fewer rows.


def classify_adaptively(
    features: Any,
    policy: CascadePolicy,
    logits_at: Callable[[Any, int], Any],
    classification: Callable[[Likeliest, Any], Tensors],
) -> Tensors:
    """Run the cascade on `features`; a row leaves at the first stage that is sure of it.

    The best classes are picked once per row, where it leaves.

    Args:
        features: `(batch, width)`.
        policy: The stages.
        logits_at: Logits of a prefix at a dim.
        classification: The outputs for some rows of what a stage finds likely.

    Returns:
        The outputs of `classification`, and `dim` int32 `(batch,)`, in the order of the rows.
    """
    unsure = tf.range(tf.shape(features)[0])
    decided: list[Tensors] = []
    for stage in policy.stages:
        logits = logits_at(tf.gather(features[:, : stage.dim], unsure), stage.dim)
        likeliest = Likeliest(logits, stage.temperature)
        if stage.threshold is None:
            sure = tf.ones_like(unsure, tf.bool)
        else:
            sure = likeliest.confidence(policy.confidence) > stage.threshold
        accepted = tf.boolean_mask(unsure, sure)
        outputs = classification(likeliest, tf.cast(tf.where(sure)[:, 0], tf.int32))
        decided.append({**outputs, "dim": tf.fill(tf.shape(accepted), stage.dim), "row": accepted})
        unsure = tf.boolean_mask(unsure, ~sure)
    columns = {name: tf.concat([part[name] for part in decided], 0) for name in decided[0]}
    back = tf.math.invert_permutation(columns.pop("row"))
    return {name: tf.gather(column, back) for name, column in columns.items()}


class ServedModel:
    """A backbone and a head with the functions that TensorFlow Serving will offer of them.

    Args:
        backbone: Inputs to features, on the TensorFlow backend.
        head: The nested head; None for an encoder.
        manifest: What the model says of itself.
        job: Labels, policy, gallery, decoder, and which signatures.
        scratch: Folder for the class names, until the SavedModel holds a copy as an asset.
    """

    def __init__(
        self, backbone: keras.Model, head: Any, manifest: Manifest, job: Job, scratch: Path
    ) -> None:
        self.backbone = backbone
        self.head = head
        self._manifest = manifest
        self._chosen = frozenset(job.signatures)
        self._policy = job.policy
        self._decoder = job.decoder
        self._bare = "" in job.input_names
        self._labels = None if job.labels is None else _label_table(job.labels, scratch)
        self._measure = job.policy.confidence if job.policy else "max_probability"
        self._temperatures = {s.dim: s.temperature for s in job.policy.stages} if job.policy else {}
        self._features = tf.function(self._call_backbone)
        self._gallery = None if job.index is None else IndexGraph(job.index, manifest.dims)

    def resources(self) -> tf.Module:
        """Return what the SavedModel must hold: every variable, and the table of class names.

        The variables are named one by one: a Keras model as a whole would be saved with a second,
        unconnected copy of each. A layer's own tables (the vocabulary of a TextVectorization) are
        no variables.
        """
        held = tf.Module()
        layers = [layer for layer in (self.backbone, self.head) if layer is not None]
        held.state = [variable.value for layer in layers for variable in layer.variables]
        held.tables = [
            part
            for part in tf.train.TrackableView(self.backbone).descendants()
            if isinstance(part, tf.saved_model.experimental.TrackableResource)
        ]
        held.labels = self._labels
        held.gallery = [] if self._gallery is None else self._gallery.variables()
        return held

    def signatures(self) -> dict[str, Any]:
        """Return the chosen signatures, traced for any batch size."""
        manifest = self._manifest
        inputs = {
            name: tf.TensorSpec(spec["shape"], spec["dtype"], name)
            for name, spec in manifest.inputs.items()
        }
        functions = {contract.FEATURES: lambda **given: {"features": self._features(**given)}}
        for dim in manifest.dims:
            functions[contract.embed(dim)] = self._embed_at(dim)
        if self.head is not None:
            for dim in manifest.dims:
                functions[contract.classify(dim)] = self._classify_at(dim)
            if self._policy is not None:
                functions[contract.CLASSIFY_ADAPTIVE] = self._classify_by(self._policy)
        if self._gallery is not None:
            functions[contract.RETRIEVE] = self._retrieve_from(self._gallery)
        default = contract.embed if self.head is None else contract.classify
        default_function = functions[default(manifest.width)]
        chosen = {name: f for name, f in functions.items() if name in self._chosen}
        chosen[contract.SERVING_DEFAULT] = default_function
        signatures = {name: traced(function, inputs) for name, function in chosen.items()}
        if self.head is not None:
            for dim in manifest.dims:
                if contract.head(dim) in self._chosen:
                    prefix = tf.TensorSpec([None, dim], tf.float32, "features")
                    signatures[contract.head(dim)] = traced(
                        self._head_at(dim), {"features": prefix}
                    )
        if self._gallery is not None:
            searches = self._gallery.signatures()
            signatures |= {name: searches[name] for name in searches if name in self._chosen}
        signatures[contract.DESCRIBE] = describing(manifest)
        return signatures

    def _call_backbone(self, **inputs: Any) -> Any:
        if self._decoder is not None:
            inputs = {name: self._decoder.decode(encoded) for name, encoded in inputs.items()}
        features = self.backbone(self._arranged(inputs), training=False)
        return tf.cast(features, tf.float32)[:, : self._manifest.width]

    def _arranged(self, inputs: Tensors) -> Any:
        """The inputs by served name, in the structure the backbone takes them in."""
        declared = declared_inputs(self.backbone)
        if not declared:
            return next(iter(inputs.values())) if self._bare else inputs
        one = len(declared) == 1
        flat = list(inputs.values()) if one else [inputs[name] for name in declared]
        return keras.tree.pack_sequence_as(input_structure(self.backbone), flat)

    def _embed_at(self, dim: int) -> Callable[..., Tensors]:
        def embed(**inputs: Any) -> Tensors:
            prefix = self._features(**inputs)[:, :dim]
            if self._manifest.normalize:
                prefix = prefix / lengths(prefix)
            return {"embedding": prefix}

        return embed

    def _classify_at(self, dim: int) -> Callable[..., Tensors]:
        def classify(**inputs: Any) -> Tensors:
            logits = self._logits(self._features(**inputs)[:, :dim], dim)
            return self._all_rows(logits, dim)

        return classify

    def _head_at(self, dim: int) -> Callable[..., Tensors]:
        def head(features: Any) -> Tensors:
            logits = self._logits(features, dim)
            return {**self._all_rows(logits, dim), "logits": logits}

        return head

    def _classify_by(self, policy: CascadePolicy) -> Callable[..., Tensors]:
        def classify(**inputs: Any) -> Tensors:
            features = self._features(**inputs)
            return classify_adaptively(features, policy, self._logits, self._classification)

        return classify

    def _retrieve_from(self, gallery: IndexGraph) -> Callable[..., Tensors]:
        return lambda **inputs: gallery.search(self._features(**inputs))

    def _logits(self, prefix: Any, dim: int) -> Any:
        return tf.cast(self.head.logits_at(prefix, dim), tf.float32)

    def _all_rows(self, logits: Any, dim: int) -> Tensors:
        likeliest = Likeliest(logits, self._temperatures.get(dim, 1.0))
        return self._classification(likeliest, tf.range(tf.shape(logits)[0]))

    def _classification(self, likeliest: Likeliest, rows: Any) -> Tensors:
        """The best `top_k` classes of some rows."""
        best, class_ids = likeliest.best(rows, self._manifest.top_k or 1)
        outputs = {
            "class_ids": tf.cast(class_ids, tf.int64),
            "probabilities": best,
            "confidence": best[:, 0],
        }
        if self._measure != "max_probability":
            outputs["confidence"] = tf.gather(likeliest.confidence(self._measure), rows)
        if self._labels is not None:
            outputs["labels"] = self._labels.lookup(outputs["class_ids"])
        return outputs


def _label_table(labels: tuple[str, ...], scratch: Path) -> Any:
    """Class id to name, from a text file that becomes an asset of the SavedModel."""
    file = scratch / "labels.txt"
    file.write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")
    lines = tf.lookup.TextFileInitializer(
        str(file),
        tf.int64,
        tf.lookup.TextFileIndex.LINE_NUMBER,
        tf.string,
        tf.lookup.TextFileIndex.WHOLE_LINE,
    )
    return tf.lookup.StaticHashTable(lines, default_value="")
