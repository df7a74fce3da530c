"""One TensorFlow function per signature of the contract, all of them on one backbone function.

TensorFlow Serving computes every output of a signature, whatever outputs a client filters for: so
every dim has signatures of its own. The cascade picks classes once per row: a stage that passes a
row on needs only its confidence, and `top_k` runs for a row in the stage that accepts it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from keras_mrl_serving import contract
from keras_mrl_serving.cascade.confidence import check_confidence
from keras_mrl_serving.cascade.policy import CascadePolicy
from keras_mrl_serving.contract import Manifest

from . import constants
from .gallery import IndexGraph
from .graph import Tensors, Traceable, lengths, trace, trace_describe, with_model_id
from .job import Job, TowerJob
from .sample import declared_inputs, input_structure

Towers = tuple[keras.Model, keras.Model | None]  # of queries, and the other one if there is one


class ServedTower:
    """A backbone as a TensorFlow function of served inputs, decoded where they are images.

    Args:
        backbone: Inputs to features, on the TensorFlow backend.
        inputs: The inputs as a manifest names them.
        job: Input names and decoder.
        width: How many of the features are served.
    """

    def __init__(
        self,
        backbone: keras.Model,
        inputs: Mapping[str, Mapping[str, Any]],
        job: Job | TowerJob,
        width: int,
    ) -> None:
        self.specs = {
            name: tf.TensorSpec(spec["shape"], spec["dtype"], name) for name, spec in inputs.items()
        }
        self.backbone = backbone
        self.features = tf.function(self._call_backbone)
        self._job = job
        self._width = width

    def tables(self) -> list[Any]:
        """Return the lookup tables of its layers (the vocabulary of a TextVectorization)."""
        return [
            part
            for part in tf.train.TrackableView(self.backbone).descendants()
            if isinstance(part, tf.saved_model.experimental.TrackableResource)
        ]

    def _call_backbone(self, **inputs: Any) -> Any:
        decoder = self._job.decoder
        if decoder is not None:
            inputs = {name: decoder.decode(images) for name, images in inputs.items()}
        features = self.backbone(self._as_declared(inputs), training=False)
        return tf.cast(features, tf.float32)[:, : self._width]

    def _as_declared(self, inputs: Tensors) -> Any:
        """Return inputs by served name in the structure that the backbone declares."""
        declared = declared_inputs(self.backbone)
        if not declared:
            return next(iter(inputs.values())) if "" in self._job.input_names else inputs
        is_single = len(declared) == 1
        tensors = list(inputs.values()) if is_single else [inputs[name] for name in declared]
        return keras.tree.pack_sequence_as(input_structure(self.backbone), tensors)


class ServedModel:
    """Towers and a head, as the functions that TensorFlow Serving will offer of them.

    Args:
        towers: Inputs to features, on the TensorFlow backend.
        head: The nested head; None for an encoder.
        manifest: The manifest that `describe` answers with.
        job: Labels, policy, gallery, decoder, and which signatures.
        scratch: Folder for the class names, until the SavedModel holds a copy as an asset.
    """

    def __init__(
        self, towers: Towers, head: Any, manifest: Manifest, job: Job, scratch: Path
    ) -> None:
        backbone, other = towers
        self._tower = ServedTower(backbone, manifest.inputs, job, manifest.width)
        self._other_tower = None
        is_asked = {*map(contract.embed_other, manifest.dims)} & {*job.signatures}
        if job.other_tower is not None and is_asked:
            inputs = manifest.tower(other_tower=True).inputs
            self._other_tower = ServedTower(other, inputs, job.other_tower, manifest.width)
        self._head = head
        self._manifest = manifest
        self._job = job
        self._labels = None if job.labels is None else _label_table(job.labels, scratch)
        self._gallery = None if job.index is None else IndexGraph(job.index, manifest.dims)
        self._answer = contract.regress if job.activation == "none" else contract.classify

    def resources(self) -> tf.Module:
        """Return the resources that the SavedModel must hold: every variable, and lookup tables.

        The variables are named one by one: a Keras model as a whole would be saved with a second,
        unconnected copy of each, and the graph would read the one that is never restored. The
        tables are the class names, and those of layers (the vocabulary of a TextVectorization).
        """
        module = tf.Module()
        towers = [tower for tower in (self._tower, self._other_tower) if tower is not None]
        layers = [*(tower.backbone for tower in towers), *filter(None, [self._head])]
        module.state = [v.value for layer in layers for v in layer.variables]
        module.tables = [table for tower in towers for table in tower.tables()]
        module.labels = self._labels
        module.gallery = [] if self._gallery is None else self._gallery.variables()
        return module

    def signatures(self) -> dict[str, Any]:
        """Return the signatures of the job, `describe` and the default, for any batch size."""
        functions = self._functions()
        default = contract.embed if self._head is None else self._answer
        chosen = {
            name: (with_model_id(function, self._job.model_id), specs)
            for name, (function, specs) in functions.items()
            if name in self._job.signatures
        }
        chosen[contract.SERVING_DEFAULT] = functions[default(self._manifest.width)]
        signatures = {name: trace(function, specs) for name, (function, specs) in chosen.items()}
        return {**signatures, contract.DESCRIBE: trace_describe(self._manifest)}

    def _functions(self) -> dict[str, Traceable]:
        manifest, policy, gallery = self._manifest, self._job.policy, self._gallery
        inputs, other = self._tower.specs, self._other_tower

        def features(**inputs: Any) -> Tensors:
            return {"features": self._tower.features(**inputs)}

        functions: dict[str, Traceable] = {contract.FEATURES: (features, inputs)}
        for dim in manifest.dims:
            functions[contract.embed(dim)] = (self._embed_at(self._tower, dim), inputs)
            if other is not None:
                functions[contract.embed_other(dim)] = (self._embed_at(other, dim), other.specs)
            if self._head is not None:
                prefix = tf.TensorSpec([None, dim], tf.float32, "features")
                functions[self._answer(dim)] = (self._answer_at(dim), inputs)
                functions[contract.head(dim)] = (self._head_at(dim), {"features": prefix})
        if policy is not None:

            def classify_adaptive(**inputs: Any) -> Tensors:
                features = self._tower.features(**inputs)
                return classify_adaptively(features, policy, self._logits, self._classification)

            functions[contract.CLASSIFY_ADAPTIVE] = (classify_adaptive, inputs)
        if gallery is not None:

            def retrieve(**inputs: Any) -> Tensors:
                return gallery.search(self._tower.features(**inputs))

            functions |= {contract.RETRIEVE: (retrieve, inputs), **gallery.functions()}
        return functions

    def _embed_at(self, tower: ServedTower, dim: int) -> Callable[..., Tensors]:
        def embed(**inputs: Any) -> Tensors:
            prefix = tower.features(**inputs)[:, :dim]
            if self._manifest.normalize:
                prefix = prefix / lengths(prefix)
            return {"embedding": prefix}

        return embed

    def _answer_at(self, dim: int) -> Callable[..., Tensors]:
        def answer(**inputs: Any) -> Tensors:
            logits = self._logits(self._tower.features(**inputs)[:, :dim], dim)
            if self._job.activation == "none":
                return {"values": logits}
            return self._classification_of_all(logits, dim)

        return answer

    def _head_at(self, dim: int) -> Callable[..., Tensors]:
        def head(features: Any) -> Tensors:
            logits = self._logits(features, dim)
            if self._job.activation == "none":
                return {"values": logits}
            if self._job.activation == "sigmoid":  # a cascade must find no class ids here
                return {"logits": logits}
            return {**self._classification_of_all(logits, dim), "logits": logits}

        return head

    def _logits(self, prefix: Any, dim: int) -> Any:
        return tf.cast(self._head.logits_at(prefix, dim), tf.float32)

    def _classification_of_all(self, logits: Any, dim: int) -> Tensors:
        if self._job.activation == "sigmoid":
            likeliest = Likeliest(tf.sigmoid(logits))
        else:
            temperature = constants.temperature(self._job.policy, (None, dim))
            likeliest = Likeliest.of_logits(logits, temperature)
        return self._classification(likeliest, tf.range(tf.shape(logits)[0]))

    def _classification(self, likeliest: Likeliest, rows: Any) -> Tensors:
        """Return the outputs of a classification for some rows."""
        best, class_ids = likeliest.best(rows, self._manifest.top_k or 1)
        outputs = {
            "class_ids": tf.cast(class_ids, tf.int64),
            "probabilities": best,
            "confidence": best[:, 0],
        }
        if self._job.confidence != "max_probability":
            outputs["confidence"] = tf.gather(likeliest.confidence(self._job.confidence), rows)
        if self._labels is not None:
            outputs["labels"] = self._labels.lookup(outputs["class_ids"])
        return outputs


def _label_table(labels: tuple[str, ...], scratch: Path) -> Any:
    """Return a table from class id to name, whose text file becomes an asset of the SavedModel."""
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


def classify_adaptively(
    features: Any,
    policy: CascadePolicy,
    logits_at: Callable[[Any, int], Any],
    classification: Callable[[Likeliest, Any], Tensors],
) -> Tensors:
    """Run the cascade on `features`: a row leaves at the first stage that is sure of it.

    Each wider head is computed only for the rows that have not left.

    Args:
        features: `(batch, width)`.
        policy: The stages.
        logits_at: Makes logits of a prefix and its dim.
        classification: Makes the outputs for some rows of a stage.

    Returns:
        The outputs of `classification`, and `dim` int32 `(batch,)`, in the order of the rows.
    """
    unsure = tf.range(tf.shape(features)[0])
    outputs_by_stage: list[Tensors] = []
    for index, stage in enumerate(policy.stages):
        logits = logits_at(tf.gather(features[:, : stage.dim], unsure), stage.dim)
        likeliest = Likeliest.of_logits(logits, constants.temperature(policy, stage.key))
        if stage.threshold is None:
            is_sure = tf.ones_like(unsure, tf.bool)
        else:
            confidence = likeliest.confidence(policy.confidence)
            is_sure = confidence > constants.threshold(policy, index)
        leaving = tf.boolean_mask(unsure, is_sure)
        outputs = classification(likeliest, tf.cast(tf.where(is_sure)[:, 0], tf.int32))
        dims = tf.fill(tf.shape(leaving), stage.dim)
        outputs_by_stage.append({**outputs, "dim": dims, "row": leaving})
        unsure = tf.boolean_mask(unsure, ~is_sure)
    columns = {
        name: tf.concat([outputs[name] for outputs in outputs_by_stage], 0)
        for name in outputs_by_stage[0]
    }
    order = tf.math.invert_permutation(columns.pop("row"))
    return {name: tf.gather(column, order) for name, column in columns.items()}


_MANY_CLASSES = 4096  # with fewer, TensorFlow's own top_k is as fast


class Likeliest:
    """Probabilities of rows, and the largest probability of each run of neighbouring classes.

    The largest probability of a row, and its few best classes, are then found among the runs.
    `top_k` alone would read all of 100,000 classes again, in one thread, after copying the rows.
    The answers are those of `top_k`: of equal classes the lower id comes first.

    Args:
        probabilities: `(rows, classes)`, with a static number of classes.
    """

    def __init__(self, probabilities: Any) -> None:
        self._probabilities = probabilities
        num_classes = int(probabilities.shape[-1])
        self._length = run_length(num_classes)
        self._num_runs = num_classes // self._length
        self._largest = self._probabilities  # (rows, runs)
        if self._length > 1:
            by_run = tf.reshape(self._probabilities, [-1, self._num_runs, self._length])
            self._largest = tf.reduce_max(by_run, axis=-1)

    @classmethod
    def of_logits(cls, logits: Any, temperature: Any = None) -> Likeliest:
        """Return those of a softmax of `logits (rows, classes)`, divided by a temperature."""
        return cls(tf.nn.softmax(logits if temperature is None else logits / temperature))

    def confidence(self, measure: str) -> Any:
        """Return the confidence of each row, `(rows,)`, as `keras_mrl_serving` computes it.

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
        if self._length == 1 or k >= self._num_runs:
            return tuple(tf.math.top_k(tf.gather(self._probabilities, rows), k))
        # The k best classes lie in the k runs with the largest maxima. The runs are sorted, so
        # that of equal classes the lower id comes first.
        runs = tf.sort(tf.math.top_k(tf.gather(self._largest, rows), k).indices, axis=-1)
        by_run = tf.reshape(self._probabilities, [-1, self._length])
        candidates = tf.gather(by_run, rows[:, None] * self._num_runs + runs)
        best, at = tf.math.top_k(tf.reshape(candidates, [-1, k * self._length]), k)
        run = tf.gather(runs, at // self._length, batch_dims=1)
        return best, run * self._length + at % self._length


def run_length(num_classes: int) -> int:
    """Return a divisor of the number of classes near its root; 1 if there is none, or no need.

    Examples:
        >>> run_length(100), run_length(10_000)
        (1, 100)
    """
    if num_classes < _MANY_CLASSES:
        return 1
    root = math.isqrt(num_classes)
    divisors = [n for n in range(root // 4, 4 * root) if num_classes % n == 0]
    return min(divisors, key=lambda n: abs(math.log(n / root)), default=1)
