"""One export, as it travels from the process that trained to the one that writes."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_mrl._arrays import head_arrays
from keras_mrl_serving.cascade.policy import CascadePolicy
from keras_mrl_serving.cascade.stages import StageKey
from keras_mrl_serving.index import ExactIndex

from .decoder import ImageDecoder


class ExportError(Exception):
    """The model could not be written as a SavedModel that equals it; nothing was published."""


def draw_model_id() -> int:
    """Return a random int32, 1 or greater, that no seed repeats."""
    return 1 + secrets.randbelow(2**31 - 1)


def terms_of(head: Any, features: Any, dims: Sequence[int]) -> npt.NDArray[np.float32]:
    """Return the sum of the magnitudes that each output is the sum of, `(rows, num_dims, outputs)`.

    Rounding is a share of those: an output near 0 may be the sum of terms that are not.
    """
    sums = []
    for dim in dims:
        kernel, bias = head_arrays(head, dim)
        sums.append(np.abs(features[:, :dim]) @ np.abs(kernel) + np.abs(bias))
    return np.stack(sums, axis=1)


@dataclass(frozen=True, kw_only=True, eq=False)
class TextJob:
    """A preprocessor of keras-hub, as it travels to the process that writes.

    Args:
        config: It in Keras's JSON, without the vocabulary.
        assets: The files of its vocabulary, by name.
        objects: The user's own classes in it.
        tokens: The model's inputs that it gives for the sample, by name.
        tokenizer: "wordpiece", "bytepair" or "sentencepiece".
        vocabulary_size: Tokens in its vocabulary.
        sequence_length: Tokens of a text, the padding included.
        lowercase: Whether upper and lower case are the same to it; None where it does not say.
        pooling: How the model makes one vector of those of its tokens; None if unknown.
        prompts: Name to the text that clients put before a text.
        cuts_padding: Whether the graph cuts what is padding in all texts of a batch.
    """

    config: str
    assets: Mapping[str, bytes]
    objects: Mapping[str, Any]
    tokens: Mapping[str, npt.NDArray[Any]]
    tokenizer: str
    vocabulary_size: int
    sequence_length: int
    lowercase: bool | None
    pooling: str | None
    prompts: Mapping[str, str]
    cuts_padding: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return what a manifest says of it, but by which operations it runs."""
        return {
            "kind": "text",
            "tokenizer": self.tokenizer,
            "vocabulary_size": self.vocabulary_size,
            "sequence_length": self.sequence_length,
            "lowercase": self.lowercase,
            "pooling": self.pooling,
            "prompts": dict(self.prompts),
        }

    def identity(self) -> dict[str, Any]:
        """Return all by which it makes tokens, as JSON: a fingerprint is of this."""
        assets = {name: hashlib.sha256(data).hexdigest() for name, data in self.assets.items()}
        return {
            **self.to_json(),
            "config": _without_names(json.loads(self.config)),
            "assets": dict(sorted(assets.items())),
        }


def _without_names(config: Any) -> Any:
    """Return a configuration without the names of layers, which Keras counts up."""
    if isinstance(config, Mapping):
        return {key: _without_names(own) for key, own in config.items() if key != "name"}
    return [*map(_without_names, config)] if isinstance(config, list) else config


@dataclass(frozen=True, kw_only=True, eq=False)
class TowerJob:
    """What is exported of the other tower of a model, besides the tower itself.

    Args:
        input_names: Key in the caller's sample ("" for a bare array) to served name.
        sample: The caller's sample by served name; with a decoder, encoded images.
        features: Features that the trained tower gives for the sample, `(rows, width)`.
        decoder: Decodes images inside the served graph.
        text: Makes tokens of texts inside the served graph.
    """

    input_names: Mapping[str, str]
    sample: Mapping[str, npt.NDArray[Any]]
    features: npt.NDArray[np.float32]
    decoder: ImageDecoder | None
    text: TextJob | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class ExitJob:
    """What is exported of one exit, besides the model.

    Args:
        name: Its name; that of the last is "last".
        layer: The layer it follows; None of a model over the inputs, and of the last.
        parameters: Those of a model cut at it.
        multiply_adds: Those of one row in that model.
        milliseconds: Of a batch in that model, by the number of its rows; None if not measured.
        features: Features that the trained model gives for the sample there, `(rows, width)`.
        logits: Its logits at the dims of the job; None without a head.
        terms: As those of the job.
    """

    name: str
    layer: str | None
    parameters: int
    multiply_adds: float | None
    milliseconds: Mapping[int, float] | None
    features: npt.NDArray[np.float32]
    logits: npt.NDArray[np.float32] | None
    terms: npt.NDArray[np.float32] | None

    def to_json(self) -> dict[str, Any]:
        """Return the exit as a manifest lists it."""
        times = self.milliseconds
        return {
            "name": self.name,
            "layer": self.layer,
            "parameters": self.parameters,
            "multiply_adds": self.multiply_adds,
            "milliseconds": times and {str(size): time for size, time in times.items()},
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class DeepRow:
    """A row that goes through all exits that a cascade asks.

    Args:
        sample: As the sample of the job, of one row.
        logits: Those of the trained model, by stage of the cascade, `(1, classes)` each.
    """

    sample: Mapping[str, npt.NDArray[Any]]
    logits: Mapping[StageKey, npt.NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """Everything that is exported besides the model itself, all of it checked.

    Args:
        base_path: Absolute folder of the model's versions.
        version: Number to publish; None for the next.
        name: Name in the manifest.
        dims: Dims to export.
        signatures: Names of the signatures to write, besides `describe` and `serving_default`.
        input_names: Key in the caller's sample ("" for a bare array) to served name.
        normalize: Whether embeddings are scaled to unit length.
        top_k: How many classes a classification names; None without classes.
        activation: "softmax", "sigmoid" or "none": what the head's outputs are; None without a
            head.
        policy: The cascade.
        labels: Class names.
        quality: Dim (as a string) to measures.
        weights: The c_m of the loss, one per dim.
        trained_on: Name of the backend that trained.
        sample: The caller's sample by served name; with a decoder, encoded images.
        features: Features that the trained model gives for the sample, `(rows, width)`.
        logits: Its logits at `dims`, `(rows, num_dims, num_classes)`; None without a head.
        terms: Of outputs that are no softmax's, the magnitudes of the terms that each is the sum
            of, in the shape of `logits`.
        index: A gallery of the model's embeddings, exported with it.
        decoder: Decodes images inside the served graph.
        text: Makes tokens of texts inside the served graph.
        other_tower: The tower of galleries, where queries have one of their own; None of one tower.
        exits: The exits of the model, shallow to deep, the last included; empty without any.
        exit_signatures: The exit and the dim of those of `signatures` that are of an exit before
            the last.
        relative_costs: What a row costs that leaves at each stage of a policy over exits, as a
            share of one that goes straight to the last stage; None without such a policy.
        deep_row: A row that no stage of a policy over exits is sure of, but the last; None if none
            is known.
        warmup_batch_sizes: Rows of the warm-up records of each signature.
        model_id: What every answer names its model by; None leaves answers without it.
    """

    base_path: Path
    version: int | None
    name: str
    dims: tuple[int, ...]
    signatures: tuple[str, ...]
    input_names: Mapping[str, str]
    normalize: bool
    top_k: int | None
    activation: str | None
    policy: CascadePolicy | None
    labels: tuple[str, ...] | None
    quality: Mapping[str, Mapping[str, float]] | None
    weights: tuple[float, ...] | None
    trained_on: str
    sample: Mapping[str, npt.NDArray[Any]]
    features: npt.NDArray[np.float32]
    logits: npt.NDArray[np.float32] | None
    terms: npt.NDArray[np.float32] | None
    index: ExactIndex | None
    decoder: ImageDecoder | None
    other_tower: TowerJob | None
    warmup_batch_sizes: tuple[int, ...]
    model_id: int | None
    exits: tuple[ExitJob, ...] = ()
    exit_signatures: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    relative_costs: tuple[float, ...] | None = None
    deep_row: DeepRow | None = None
    text: TextJob | None = None

    def temperature(self, dim: int, exit: str | None = None) -> float:
        """Return the divisor of the logits of `dim`: of its stage, or 1 if the policy has none."""
        stages = self.policy.stages if self.policy else ()
        return next((own.temperature for own in stages if own.key == (exit, dim)), 1.0)

    @property
    def confidence(self) -> str:
        """The measure of confidence that classifications report."""
        return self.policy.confidence if self.policy else "max_probability"
