"""A model of texts as a function: what a server of it answers, and what it was sent."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
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
