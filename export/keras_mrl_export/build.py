"""On TensorFlow: load the model, write its SavedModel aside, and compare the two."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

from keras_mrl import split
from keras_mrl_serving import contract, flows
from keras_mrl_serving._session import SavedModelSession
from keras_mrl_serving.contract import MANIFEST_FILE, Manifest
from keras_mrl_serving.version import __version__

from .job import ExportError, Job
from .model_file import load
from .parity import PARITY_FILE, check_parity, examples
from .publish import Staged
from .sample import declared_inputs
from .signatures import ServedModel
from .warmup import write_warmup

# What an encoder is known by: equal only where `embed_<m>` answers alike.

_ASSETS = "assets/"  # in a .keras file: vocabularies that layers learned


def fingerprint_of(
    model: keras.Model, saved: Path, inputs: Mapping[str, Mapping[str, Any]], job: Job
) -> str:
    """Return the SHA-256 of all that makes an embedding out of an input.

    That is the configuration, every weight in the model's own order, what layers keep besides
    weights (vocabularies, document frequencies), and how the model is served: its decoder, whether
    embeddings are scaled, and the types its inputs are cast to. Dims, labels and a cascade change
    no embedding; code of the user's own layers has no form that is the same in every process.

    Args:
        model: The model as it is served.
        saved: The `.keras` file it was loaded from.
        inputs: Those of the manifest.
        job: How it is served.
    """
    digest = hashlib.sha256(model.to_json(sort_keys=True).encode())
    served = {
        "decoder": None if job.decoder is None else job.decoder.to_json(),
        "normalize": bool(job.normalize),
        "dtypes": [inputs[name]["dtype"] for name in sorted(inputs)],
    }
    digest.update(json.dumps(served, sort_keys=True).encode())
    values = [keras.ops.convert_to_numpy(variable) for variable in model.variables]
    for value in (*values, *_kept_besides(model)):
        digest.update(f"{value.dtype}{value.shape}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    with zipfile.ZipFile(saved) as archive:
        for name in sorted(archive.namelist()):
            if name.startswith(_ASSETS):
                digest.update(f"{name}\n".encode())
                digest.update(archive.read(name))
    return digest.hexdigest()


def _kept_besides(model: keras.Model) -> list[Any]:
    """What layers with a store of their own write there, such as the weights of TF-IDF."""
    kept = []
    for layer in model._flatten_layers():
        if type(layer).save_own_variables is not keras.Layer.save_own_variables:
            store: dict[str, Any] = {}
            layer.save_own_variables(store)
            kept += [np.asarray(store[key]) for key in sorted(store)]
    return kept


# Which operations a graph may hold: TensorFlow's own, which every server of SavedModels has.

# These call back into the Python process that made them.
_OF_PYTHON = frozenset(("PyFunc", "PyFuncStateless", "EagerPyFunc"))
# TensorFlow's own too, though tf.raw_ops does not name them: Keras slices and updates by them.
_INTERNAL = ("_", "Xla")


def check_operations(folder: Path) -> None:
    """Raise `ExportError` if the SavedModel in `folder` needs more than TensorFlow to run.

    It runs here, where the package that brings an operation is imported, and loads in no server.
    """
    graphs = SavedModel.FromString((folder / "saved_model.pb").read_bytes()).meta_graphs
    used = {op.name for graph in graphs for op in graph.meta_info_def.stripped_op_list.op}
    foreign = sorted(name for name in used if not _is_tensorflows(name))
    if foreign:
        raise ExportError(
            "A served graph may hold only operations of TensorFlow itself. "
            f"Received: a model that needs {', '.join(foreign)}. Do this before the model, in the "
            "client, or by layers of Keras: TextVectorization for a tokenizer of tensorflow-text, "
            "keras.ops for tf.py_function."
        )


def _is_tensorflows(name: str) -> bool:
    if name in _OF_PYTHON:
        return False
    return hasattr(tf.raw_ops, name) or name.startswith(_INTERNAL)


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
