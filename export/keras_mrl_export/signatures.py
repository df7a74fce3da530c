"""One TensorFlow function per signature of the contract, all of them on one backbone function.

TensorFlow Serving computes every output of a signature, whatever outputs a client filters for: so
every dim has signatures of its own, and so has every pair of an exit and a dim that is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from keras_mrl_serving import contract
from keras_mrl_serving.cascade.stages import LAST_EXIT
from keras_mrl_serving.contract import Manifest

from . import constants
from .adaptive import ExitGraph, LogitsAt, classify_adaptively, classify_through_exits
from .gallery import IndexGraph
from .graph import Tensors, Traceable, first_rows, lengths, trace, trace_describe, with_model_id
from .job import Job
from .likeliest import Likeliest
from .text import TextGraph
from .tower import ServedTower

Towers = tuple[keras.Model, keras.Model | None]  # of queries, and the other one if there is one
Texts = tuple[TextGraph | None, TextGraph | None]


class ServedModel:
    """Towers and a head, as the functions that TensorFlow Serving will offer of them.

    Args:
        towers: Inputs to features, on the TensorFlow backend.
        head: The nested head; None for an encoder.
        manifest: The manifest that `describe` answers with.
        job: Labels, policy, gallery, decoder, and which signatures.
        scratch: Folder for the class names, until the SavedModel holds a copy as an asset.
        with_exits: The model that has the exits; None without any.
        texts: What makes tokens of texts, by tower; None of one that takes no texts.
    """

    def __init__(
        self,
        towers: Towers,
        head: Any,
        manifest: Manifest,
        job: Job,
        scratch: Path,
        with_exits: Any = None,
        texts: Texts = (None, None),
    ) -> None:
        backbone, other = towers
        self._text, other_text = texts
        self._tower = ServedTower(backbone, manifest.inputs, job, manifest.width, self._text)
        self._other_tower = None
        is_asked = {*map(contract.embed_other, manifest.dims)} & {*job.signatures}
        if job.other_tower is not None and is_asked:
            inputs = manifest.tower(other_tower=True).inputs
            self._other_tower = ServedTower(
                other, inputs, job.other_tower, manifest.width, other_text
            )
        self._head = head
        self._with_exits = with_exits
        self._exits = self._asked_exits(manifest, job)
        self._manifest = manifest
        self._job = job
        self._labels = None if job.labels is None else _label_table(job.labels, scratch)
        self._gallery = None if job.index is None else IndexGraph(job.index, manifest.dims)
        self._answer = contract.regress if job.activation == "none" else contract.classify

    def _asked_exits(self, manifest: Manifest, job: Job) -> dict[str, tuple[ServedTower, Any]]:
        """Return towers and heads of the exits that signatures of their own, or the policy, ask."""
        asked = {exit for exit, _ in job.exit_signatures.values()}
        if job.policy is not None and contract.CLASSIFY_ADAPTIVE in job.signatures:
            asked |= {exit for exit, _ in job.policy.keys if exit is not None}
        exits = {}
        for name in manifest.exit_names[:-1]:
            if name in asked:
                backbone, head = self._with_exits.parts(name)
                tower = ServedTower(backbone, manifest.inputs, job, manifest.width, self._text)
                exits[name] = tower, head
        return exits

    def resources(self) -> tf.Module:
        """Return the resources that the SavedModel must hold: every variable, and lookup tables.

        The variables are named one by one: a Keras model as a whole would be saved with a second,
        unconnected copy of each, and the graph would read the one that is never restored. The
        tables are the class names, and those of layers (the vocabulary of a TextVectorization).
        """
        module = tf.Module()
        towers = [tower for tower in (self._tower, self._other_tower) if tower is not None]
        towers += [tower for tower, _ in self._exits.values()]
        heads = [self._head, *(head for _, head in self._exits.values())]
        layers = [*(tower.backbone for tower in towers), *filter(None, heads)]
        variables = {id(own): own for layer in layers for own in layer.variables}
        module.state = [own.value for own in variables.values()]
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
                answer = self._answer_at(self._tower, self._head, dim)
                functions[self._answer(dim)] = (answer, inputs)
                functions[contract.head(dim)] = (self._head_at(dim), {"features": prefix})
        for name, (exit, dim) in self._job.exit_signatures.items():
            tower, head = self._exits[exit]
            if name == contract.embed(dim, exit):
                functions[name] = (self._embed_at(tower, dim), inputs)
            else:
                functions[name] = (self._answer_at(tower, head, dim, exit), inputs)
        if policy is not None:
            adaptive = self._through_exits if policy.has_exits else self._over_dims
            functions[contract.CLASSIFY_ADAPTIVE] = (adaptive, inputs)
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

    def _answer_at(
        self, tower: ServedTower, head: Any, dim: int, exit: str | None = None
    ) -> Callable[..., Tensors]:
        def answer(**inputs: Any) -> Tensors:
            logits = _logits_of(head)(tower.features(**inputs)[:, :dim], dim)
            if self._job.activation == "none":
                return {"values": logits}
            return self._classification_of_all(logits, dim, exit)

        return answer

    def _over_dims(self, **inputs: Any) -> Tensors:
        policy: Any = self._job.policy
        features, logits_at = self._tower.features(**inputs), _logits_of(self._head)
        return self._named(classify_adaptively(features, policy, logits_at, self._classification))

    def _through_exits(self, **inputs: Any) -> Tensors:
        policy: Any = self._job.policy
        names = list(dict.fromkeys(exit or LAST_EXIT for exit, _ in policy.keys))
        parts = self._with_exits.segments(names)
        heads = {LAST_EXIT: self._head, **{name: head for name, (_, head) in self._exits.items()}}
        exits = [
            ExitGraph(
                self._manifest.exit_names.index(name), _segment(part), _logits_of(heads[name])
            )
            for name, part in zip(names, parts.segments, strict=True)
        ]
        tensors, rows = self._tower.read(inputs)
        state = parts.start(tensors)
        answer = classify_through_exits(
            state, tf.maximum(rows, 1), policy, exits, self._classification
        )
        return self._named({name: first_rows(column, rows) for name, column in answer.items()})

    def _head_at(self, dim: int) -> Callable[..., Tensors]:
        def head(features: Any) -> Tensors:
            logits = _logits_of(self._head)(features, dim)
            if self._job.activation == "none":
                return {"values": logits}
            if self._job.activation == "sigmoid":  # a cascade must find no class ids here
                return {"logits": logits}
            return {**self._classification_of_all(logits, dim), "logits": logits}

        return head

    def _classification_of_all(self, logits: Any, dim: int, exit: str | None = None) -> Tensors:
        if self._job.activation == "sigmoid":
            likeliest = Likeliest(tf.sigmoid(logits))
        else:
            temperature = constants.temperature(self._job.policy, (exit, dim))
            likeliest = Likeliest.of_logits(logits, temperature)
        return self._named(self._classification(likeliest, tf.range(tf.shape(logits)[0])))

    def _classification(self, likeliest: Likeliest, rows: Any) -> Tensors:
        """Return the outputs of a classification for some rows, but the names of the classes."""
        best, class_ids = likeliest.best(rows, self._manifest.top_k or 1)
        outputs = {
            "class_ids": tf.cast(class_ids, tf.int64),
            "probabilities": best,
            "confidence": best[:, 0],
        }
        if self._job.confidence != "max_probability":
            outputs["confidence"] = tf.gather(likeliest.confidence(self._job.confidence), rows)
        return outputs

    def _named(self, outputs: Tensors) -> Tensors:
        if self._labels is None:
            return outputs
        return {**outputs, "labels": self._labels.lookup(outputs["class_ids"])}


def _logits_of(head: Any) -> LogitsAt:
    return lambda prefix, dim: tf.cast(head.logits_at(prefix, dim), tf.float32)


def _segment(part: Any) -> Callable[[Mapping[str, Any]], tuple[Any, Mapping[str, Any]]]:
    """Return a part of a backbone as a function of its own, which may hold Python to be rewritten.

    Args:
        part: A `Segment` whose one result is features.
    """

    @tf.function
    def run(state: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
        [features], next_state = part(state)
        return tf.cast(features, tf.float32), next_state

    return run


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
