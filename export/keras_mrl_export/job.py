"""One export, as it travels from the process that trained to the one that writes."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_mrl_serving.cascade.policy import CascadePolicy
from keras_mrl_serving.index import ExactIndex

from .decoder import ImageDecoder


class ExportError(Exception):
    """The model could not be written as a SavedModel that equals it; nothing was published."""


def draw_model_id() -> int:
    """Return a random int32, 1 or greater, that no seed repeats."""
    return 1 + secrets.randbelow(2**31 - 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class TowerJob:
    """What is exported of the other tower of a model, besides the tower itself.

    Args:
        input_names: Key in the caller's sample ("" for a bare array) to served name.
        sample: The caller's sample by served name; with a decoder, encoded images.
        features: Features that the trained tower gives for the sample, `(rows, width)`.
        decoder: Decodes images inside the served graph.
    """

    input_names: Mapping[str, str]
    sample: Mapping[str, npt.NDArray[Any]]
    features: npt.NDArray[np.float32]
    decoder: ImageDecoder | None


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
        other_tower: The tower of galleries, where queries have one of their own; None of one tower.
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

    def temperature(self, dim: int) -> float:
        """Return the divisor of the logits of `dim`: of its stage, or 1 if the policy has none."""
        stages = self.policy.stages if self.policy else ()
        return next((stage.temperature for stage in stages if stage.dim == dim), 1.0)

    @property
    def confidence(self) -> str:
        """The measure of confidence that classifications report."""
        return self.policy.confidence if self.policy else "max_probability"
