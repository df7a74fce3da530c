"""A model of texts, in memory and as a version: what it answers, and what it was sent."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_mrl_serving.calls import Arrays, Call
from keras_mrl_serving.contract import Manifest
from keras_mrl_serving.embeddings import truncate
from keras_mrl_serving.funnel import FunnelSchedule
from keras_mrl_serving.index import ExactIndex
from keras_mrl_serving.testing import InMemoryServer
from tests.helpers.manifests import TEXTS

PROMPTS = {"query": "query: ", "passage": "passage: "}
CLASSES = ("about birds", "about owls", "about jays")
PAIR = FunnelSchedule((8, 64), (20,), 3)


def text_manifest(prompts: Mapping[str, str] = PROMPTS, **fields: Any) -> Manifest:
    """The manifest of an encoder of texts with these prompts."""
    assert TEXTS.preprocessor is not None
    return replace(TEXTS, preprocessor={**TEXTS.preprocessor, "prompts": dict(prompts)}, **fields)


def classifier_of_texts() -> Manifest:
    """The manifest of a classifier of texts, which has a cascade."""
    stages = [{"dim": 8, "threshold": 0.5}, {"dim": 64, "threshold": None}]
    return text_manifest(
        kind="classifier",
        activation="softmax",
        num_classes=3,
        top_k=2,
        cascade={"stages": stages, "confidence": "max_probability"},
    )


def vectors_of(texts: Any, dim: int = 64) -> npt.NDArray[np.float32]:
    """The embedding of each text, str or bytes: any other text has another."""
    rows = [text.encode() if isinstance(text, str) else text for text in texts]
    seeds = [int.from_bytes(hashlib.sha256(row).digest()[:8], "little") for row in rows]
    drawn = [np.random.default_rng(seed).normal(size=64) for seed in seeds]
    return truncate(np.array(drawn, np.float32).reshape(len(rows), 64), dim)


def text_index(texts: Any, prompt: str | None = None, **facts: Any) -> ExactIndex:
    """The index of texts that were embedded with a prompt before each."""
    gallery = vectors_of([(prompt or "") + text for text in texts])
    return ExactIndex.build(gallery, PAIR, prompt=prompt, **facts)


class TextServer(InMemoryServer):
    """A server in memory of a model of texts, exported with a gallery if one is given.

    Attributes:
        texts: Every text that it was sent, in order.
    """

    def __init__(self, manifest: Manifest, index: ExactIndex | None = None) -> None:
        super().__init__(manifest, self._answer)
        self.texts: list[str | bytes] = []
        self._index = index

    def _answer(self, call: Call) -> Arrays | None:
        kind, _, name = call.signature.partition("_")
        sent = call.inputs["text"].tolist()
        self.texts += sent
        if kind == "embed":
            return {"embedding": vectors_of(sent, int(name))}
        if kind == "retrieve":
            assert self._index is not None
            found = self._index.search(vectors_of(sent))
            return {"ids": found.ids, "scores": found.scores}
        rows = len(sent)
        answer: dict[str, Any] = {
            "class_ids": np.tile(np.array([2, 0]), (rows, 1)),
            "probabilities": np.tile(np.array([0.75, 0.125], np.float32), (rows, 1)),
            "confidence": np.full(rows, 0.75, np.float32),
        }
        return answer | ({"dim": np.full(rows, 8, np.int32)} if name == "adaptive" else {})


def save_text_model(folder: Path, manifest: Manifest, gallery: Sequence[str] = ()) -> Path:
    """Write a model of texts as version 1: it embeds the set of their words, in core operations.

    Args:
        folder: The folder of the versions.
        manifest: Of a classifier or an encoder; with a gallery it becomes that of an index.
        gallery: Texts, which are embedded as they are.
    """
    import tensorflow as tf

    def features(text: Any) -> Any:
        words = tf.strings.to_hash_bucket_fast(tf.strings.split(text), 64)
        return tf.reduce_sum(tf.one_hot(words.to_tensor(-1), 64), 1) + 1e-3

    def embedded(text: Any, dim: int) -> Any:
        return tf.math.l2_normalize(features(text)[:, :dim], axis=1)

    def classified(text: Any, dim: int) -> dict[str, Any]:
        probabilities = tf.nn.softmax(features(text)[:, :dim][:, :3])
        best, class_ids = tf.math.top_k(probabilities, 2)
        return {
            "class_ids": tf.cast(class_ids, tf.int64),
            "probabilities": best,
            "confidence": best[:, 0],
        }

    def of_texts(function: Callable[[Any], Any]) -> Any:
        return tf.function(function, input_signature=[tf.TensorSpec((None,), tf.string, "text")])

    def answering(answer: Callable[[Any, int], dict[str, Any]], dim: int) -> Any:
        return of_texts(lambda text: answer(text, dim))

    signatures = {}
    for dim in (8, 64):
        signatures[f"embed_{dim}"] = answering(lambda t, d: {"embedding": embedded(t, d)}, dim)
        if manifest.num_classes:
            signatures[f"classify_{dim}"] = answering(classified, dim)
    if manifest.cascade:
        signatures["classify_adaptive"] = of_texts(
            lambda t: {**classified(t, 8), "dim": tf.fill(tf.shape(t), 8)}
        )
    if gallery:
        manifest = replace(manifest, kind="index", funnel=PAIR.to_json(), size=len(gallery))
        rows = tf.constant(embedded(tf.constant(gallery), 64).numpy())

        def retrieved(text: Any) -> dict[str, Any]:
            scores, ids = tf.math.top_k(tf.matmul(embedded(text, 64), rows, transpose_b=True), 3)
            return {"ids": tf.cast(ids, tf.int64), "scores": scores}

        signatures["retrieve"] = of_texts(retrieved)
    signatures["describe"] = tf.function(
        lambda key: {"manifest": tf.fill(tf.shape(key), manifest.to_json())},
        input_signature=[tf.TensorSpec((None,), tf.string, "key")],
    )
    tf.saved_model.save(tf.Module(), str(folder / "1"), signatures=signatures)
    return folder
