"""On TensorFlow: load the model, write its SavedModel aside, and compare the two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_mrl import split
from keras_mrl_serving import contract, flows
from keras_mrl_serving._session import SavedModelSession
from keras_mrl_serving.contract import MANIFEST_FILE, Manifest
from keras_mrl_serving.version import __version__

from .errors import ExportError
from .examples import examples
from .fingerprint import fingerprint_of
from .inputs import declared_inputs
from .job import Job
from .operations import check_operations
from .parity import PARITY_FILE, check_parity
from .publish import Staged
from .signatures import ServedModel
from .travel import load
from .warmup import write_warmup


def build(saved: Path, objects: dict[str, Any], job: Job, staged: Staged) -> None:
    """Build the SavedModel of `job` from the `.keras` file `saved`, to be published.

    Args:
        saved: The model as Keras saved it.
        objects: The user's own classes and functions in it.
        job: What to export.
        staged: Where to write it.

    Raises:
        ExportError: If the model cannot be loaded or traced, or a signature differs from it.
    """
    model = load(saved, objects)
    backbone, head = split(model)
    manifest = _manifest(model, saved, backbone, head, job)
    try:
        _write(ServedModel(backbone, head, manifest, job, staged.scratch), staged.folder)
    except OSError:
        raise
    except Exception as error:
        raise ExportError(
            "Every layer must run inside a TensorFlow graph. "
            f"Received: {type(error).__name__}: {error} "
            "Use keras.ops in layers of your own, not the training backend's functions."
        ) from error
    check_operations(staged.folder)
    (staged.folder / MANIFEST_FILE).parent.mkdir()
    (staged.folder / MANIFEST_FILE).write_text(manifest.to_json() + "\n")
    report = check_parity(staged.folder, manifest, job)
    (staged.folder / PARITY_FILE).write_text(json.dumps(report, indent=1) + "\n")
    with SavedModelSession(staged.folder) as session:
        inputs = examples(manifest, job)
        write_warmup(staged.folder, session, job.name, inputs, job.warmup_batch_sizes)


def _write(served: ServedModel, folder: Path) -> None:
    tf.saved_model.save(served.resources(), str(folder), signatures=served.signatures())


def _manifest(
    model: keras.Model, saved: Path, backbone: keras.Model, head: Any, job: Job
) -> Manifest:
    index, inputs = job.index, _input_specs(backbone, job)
    fingerprint = fingerprint_of(model, saved, inputs, job)
    if index is not None:
        flows.check_encoder(index.encoder_fingerprint, fingerprint)
    return Manifest(
        name=job.name,
        kind=_kind(head, job),
        fingerprint=fingerprint,
        dims=job.dims,
        width=job.dims[-1],
        inputs=inputs,
        weights=job.weights,
        tied=bool(head is not None and head.tied),
        normalize=job.normalize,
        metric="cosine" if index is None else index.metric,
        activation="none" if head is None else "softmax",
        num_classes=None if head is None else head.num_classes,
        top_k=job.top_k,
        labels=job.labels is not None,
        cascade=_cascade(job),
        decoder=None if job.decoder is None else job.decoder.to_json(),
        quality=job.quality,
        encoder_fingerprint=None if index is None else fingerprint,
        funnel=None if index is None else index.schedule.to_json(),
        size=None if index is None else len(index),
        made_with={
            "keras_mrl": __version__,
            "keras": keras.__version__,
            "tensorflow": tf.__version__,
            "trained_on": job.trained_on,
        },
    )


def _cascade(job: Job) -> dict[str, Any] | None:
    """What the version decides by; temperatures alone decide nothing."""
    if job.policy is None or contract.CLASSIFY_ADAPTIVE not in job.signatures:
        return None
    return job.policy.to_json()


def _kind(head: Any, job: Job) -> str:
    if job.index is not None:
        return "index"
    return "encoder" if head is None else "classifier"


def _input_specs(backbone: keras.Model, job: Job) -> dict[str, dict[str, Any]]:
    """Dtype and shape of every input: as the model declares them, else as the sample has them."""
    if job.decoder is not None:
        return {name: {"dtype": "string", "shape": [None]} for name in job.sample}
    declared = declared_inputs(backbone)
    if len(declared) == 1:
        declared = dict(zip(job.sample, declared.values(), strict=True))
    specs = {}
    for name, array in job.sample.items():
        known = declared.get(name, array)
        specs[name] = {"dtype": _served_dtype(known.dtype), "shape": [None, *known.shape[1:]]}
    return specs


def _served_dtype(dtype: Any) -> str:
    """float64 is NumPy's default and no decision; half precision is the model's own affair."""
    if isinstance(dtype, np.dtype) and dtype.kind in "OSU":
        return "string"
    halves = {"bfloat16", "float16", *(["float64"] if isinstance(dtype, np.dtype) else [])}
    return "float32" if str(dtype) in halves else str(dtype)
