"""Whole manifests of each kind, and every way to damage one value of them."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from keras_mrl_serving.cascade.policy import CascadePolicy, Guarantee, Stage
from keras_mrl_serving.contract import Manifest
from keras_mrl_serving.funnel import FunnelSchedule

Json = dict[str, Any]
SHARED: Json = {
    "name": "birds",
    "fingerprint": "5e1f",
    "dims": (8, 16, 64),
    "width": 64,
    "inputs": {"image": {"dtype": "float32", "shape": [None, 32, 32, 3]}},
    "made_with": {"keras_mrl": "0.1.0", "trained_on": "jax"},
}
LOGITS = np.random.default_rng(0).normal(size=(40, 3, 5))
LEARNED = CascadePolicy.learn(LOGITS, np.argmax(LOGITS[:, -1], axis=-1), SHARED["dims"])
BY_HAND = CascadePolicy((Stage(8, 0.9, temperature=1.5), Stage(64, None)))
FUNNEL = FunnelSchedule(dims=(8, 64), shortlists=(200,), k=10)

ENCODER = Manifest(**SHARED, kind="encoder")
TWO_TOWERS = Manifest(
    **SHARED,
    kind="encoder",
    other_tower={
        "inputs": {"caption": {"dtype": "string", "shape": [None]}},
        "decoder": None,
    },
)
TEXTS = Manifest(
    **{**SHARED, "inputs": {"text": {"dtype": "string", "shape": [None]}}},
    kind="encoder",
    preprocessor={
        "kind": "text",
        "tokenizer": "wordpiece",
        "vocabulary_size": 30_522,
        "sequence_length": 256,
        "lowercase": True,
        "pooling": "mean",
        "prompts": {"query": "query: ", "passage": "passage: "},
        "operations": ["FastBertNormalize"],
        "tensorflow_text": "2.21.0",
    },
)
CLASSIFIER = Manifest(
    **SHARED,
    kind="classifier",
    activation="softmax",
    num_classes=5,
    top_k=3,
    labels=True,
    weights=(2.0, 1.0, 0.0),
    tied=True,
    cascade=LEARNED.to_json(),
    quality={"8": {"top1": 0.5, "map10": 0.25}, "64": {"top1": 1.0}},
)
EXITS: tuple[Json, ...] = (
    {"name": "thumbnail", "layer": None, "parameters": 90, "multiply_adds": None},
    {
        "name": "conv3_out",
        "layer": "conv3_out",
        "parameters": 1000,
        "multiply_adds": 5e6,
        "milliseconds": {"1": 0.5, "8": 2},
    },
    {"name": "last", "layer": None, "parameters": 4000, "multiply_adds": 2e7},
)
OVER_EXITS = CascadePolicy(
    (
        Stage(8, 0.5, 1.5, "thumbnail"),
        Stage(8, 0.25, exit="conv3_out"),
        Stage(64, 0.125, exit="conv3_out"),
        Stage(64, None),
    ),
    holdout=LEARNED.holdout,
    guarantee=Guarantee(risk=0.01, delta=0.05, size=2000, errors=9, gains=4, kind="accuracy_drop"),
)
DEPTHS = replace(
    CLASSIFIER,
    cascade=None,
    exits=EXITS,
    exit_cascade={
        **OVER_EXITS.to_json(),
        "exit_stages": [
            {**stage, "relative_cost": 0.5} for stage in OVER_EXITS.to_json()["exit_stages"]
        ],
    },
)
TAGS = Manifest(**SHARED, kind="classifier", activation="sigmoid", num_classes=5, top_k=5)
REGRESSOR = Manifest(**SHARED, kind="regressor", num_values=2, quality={"8": {"mae": 0.5}})
INDEX = Manifest(
    **{**SHARED, "inputs": {"embedding": {"dtype": "float32", "shape": [None, 64]}}},
    kind="index",
    encoder_fingerprint="5e1f",
    funnel=FUNNEL.to_json(),
    size=1_281_167,
    model_id=2**31 - 1,
)
TEXT_INDEX = replace(
    INDEX, inputs=TEXTS.inputs, preprocessor=TEXTS.preprocessor, prompt="passage: "
)

# What a value of a manifest may wrongly be.
WRONG_VALUES: list[Any] = [
    None, True, 0, -1, 2**70, 10**400, 1.5, "", "8", "\ud800", [], [None], ["8"], [[1]], {},
    {"8": 1}, {"": {"": {}}},
]  # fmt: skip


def places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Return the path to every value of a manifest, first the empty path to the manifest itself."""
    yield above
    if isinstance(value, dict | list):
        keys = value if isinstance(value, dict) else range(len(value))
        for key in keys:
            yield from places(value[key], (*above, key))


def with_value(manifest: Json, place: tuple[Any, ...], value: Any) -> Any:
    """Return the manifest with another value at a place."""
    if not place:
        return value
    changed: Any = copy.deepcopy(manifest)
    parent = changed
    for key in place[:-1]:
        parent = parent[key]
    parent[place[-1]] = copy.deepcopy(value)
    return changed
