"""On TensorFlow: write a SavedModel aside, compare it with its original, and add warm-up records.

There are two originals: a model, loaded from its `.keras` file, and a gallery.
"""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from keras_mrl import split
from keras_mrl.models.cut import gallery_backbone
from keras_mrl_serving import contract, flows
from keras_mrl_serving._session import SavedModelSession, operations_of
from keras_mrl_serving.contract import Manifest
from keras_mrl_serving.index import ExactIndex
from keras_mrl_serving.text_operations import TEXT_OPERATIONS
from keras_mrl_serving.version import __version__

from .decoder import ImageDecoder
from .folding import fold_normalizations
from .gallery import IndexGraph, forget
from .graph import trace, trace_describe, with_model_id
from .job import ExportError, Job, TextJob, TowerJob
from .model_file import load, with_scopes
from .parity import (
    MAX_QUERIES,
    check_described,
    check_parity,
    checking_identity,
    compare_searches,
    example_inputs,
    with_deep_row,
)
from .publish import Staged
from .sample import declared_inputs
from .signatures import ServedModel, Texts, Towers
from .speed import slower_than
from .text import TEXT_INPUT, TextGraph, check_tokens, served_graph
from .warmup import write_warmup

PARITY_FILE = "assets.extra/keras_mrl_parity.json"


def build(saved: Path, objects: dict[str, Any], job: Job, staged: Staged) -> list[str]:
    """Build the SavedModel of `job` from the `.keras` file `saved`, to be published.

    Args:
        saved: The model as Keras saved it.
        objects: The user's own classes and functions in it.
        job: The rest of the export.
        staged: Folders to write in.

    Returns:
        What to warn the caller of.

    Raises:
        ExportError: If the model cannot be loaded or traced, or a signature differs from it.
    """
    warnings = _build(saved, objects, job, staged, folds=True)
    if warnings is None:
        gc.collect()  # as in `build_index`
        shutil.rmtree(staged.folder)
        warnings = _build(saved, objects, job, staged, folds=False)
    return warnings or []


def _build(
    saved: Path, objects: dict[str, Any], job: Job, staged: Staged, folds: bool
) -> list[str] | None:
    """Build a SavedModel, with its batch normalizations folded or not.

    Returns:
        Warnings; None if some were folded and a signature then differs from the model: kernels are
        rounded anew, which deep nets may multiply, and no graph shows every use of a layer.
    """
    model = with_scopes(load(saved, objects), objects)
    backbone, head = split(model)
    other = gallery_backbone(model, backbone)
    towers = (backbone, None if other is backbone else other)
    texts = _text_graph(job), _text_graph(job.other_tower)
    manifest = _manifest(model, saved, towers, texts, head, job)
    try:
        folded = fold_normalizations(model) if folds else 0
        with_exits = model if job.exits else None
        served = ServedModel(towers, head, manifest, job, staged.scratch, with_exits, texts)
        _save_model(served, staged.folder)
    except (ExportError, OSError):
        raise
    except Exception as error:
        raise ExportError(
            "Every layer must run inside a TensorFlow graph. "
            f"Received: {type(error).__name__}: {error} "
            "Use keras.ops in layers of your own, not the training backend's functions."
        ) from error
    check_operations(staged.folder)
    _write_manifest(staged.folder, manifest)
    with SavedModelSession(staged.folder) as session:
        try:
            report = check_parity(session, manifest, job)
        except ExportError:
            if not folded:
                raise
            return None
        (staged.folder / PARITY_FILE).write_text(json.dumps(report, indent=1) + "\n")
        inputs = example_inputs(manifest, job)
        if job.deep_row is not None and contract.CLASSIFY_ADAPTIVE in inputs:
            inputs[contract.CLASSIFY_ADAPTIVE] = with_deep_row(manifest, job)
        write_warmup(staged.folder, session, job.name, inputs, job.warmup_batch_sizes)
        return _warnings_of(session, inputs, job)


def _warnings_of(session: SavedModelSession, inputs: Mapping[str, Any], job: Job) -> list[str]:
    """Return what to warn of in a cascade over exits."""
    name = contract.CLASSIFY_ADAPTIVE
    if job.policy is None or not job.policy.has_exits or name not in job.signatures:
        return []
    exit, dim = job.policy.keys[-1]
    whole = contract.classify(dim, exit)
    whole = whole if whole in job.signatures else contract.SERVING_DEFAULT
    slower = slower_than(session.run, name, whole, inputs[whole])
    untouched = None
    if job.deep_row is None:
        untouched = (
            "Warm-up and comparison go through all exits of a cascade where a row does. "
            f"Received: a sample of {len(job.features)} rows, none of which reaches the last stage "
            "of the policy. Give a sample with a row that does: the deep part was not compared."
        )
    return [text for text in (slower, untouched) if text is not None]


def build_index(index: ExactIndex, name: str, model_id: int | None, folder: Path) -> None:
    """Build the SavedModel of a gallery in `folder`, to be published.

    Raises:
        ExportError: If a signature answers otherwise than `index`.
    """
    manifest = _index_manifest(index, name, model_id)
    _save_index(index, manifest, folder)
    gc.collect()  # functions hold their variables in cycles, and the rows are loaded once more
    _write_manifest(folder, manifest)
    widths = {contract.SEARCH: index.width, contract.SERVING_DEFAULT: index.width}
    widths |= {contract.search(dim): dim for dim in index.schedule.dims}
    rows = np.unique(np.linspace(0, len(index) - 1, MAX_QUERIES).astype(np.int64))
    queries = np.concatenate([block[rows] for block in index.blocks], axis=1)
    inputs = {name: {"embedding": queries[:, :width]} for name, width in widths.items()}
    with SavedModelSession(folder) as session:
        run = checking_identity(session.run, manifest.model_id)
        compare_searches(run, index, queries, widths)
        run(contract.SERVING_DEFAULT, inputs[contract.SERVING_DEFAULT])
        check_described(run, manifest)
        write_warmup(folder, session, manifest.name, inputs, (1,))


# Functions of their own: what they trace is released before the SavedModel is loaded.
def _save_model(served: ServedModel, folder: Path) -> None:
    _write(served.resources(), served.signatures(), folder)


def _save_index(index: ExactIndex, manifest: Manifest, folder: Path) -> None:
    gallery = IndexGraph(index)
    module = tf.Module()
    module.state = gallery.variables()
    functions = gallery.functions()
    signatures = {
        name: trace(with_model_id(function, manifest.model_id), specs)
        for name, (function, specs) in functions.items()
    }
    signatures[contract.SERVING_DEFAULT] = trace(*functions[contract.SEARCH])
    signatures[contract.DESCRIBE] = trace_describe(manifest)
    _write(module, signatures, folder)


def _write(resources: Any, signatures: Mapping[str, Any], folder: Path) -> None:
    try:
        tf.saved_model.save(resources, str(folder), signatures=signatures)
    except tf.errors.OpError as error:  # TensorFlow's own form of an OSError
        raise ExportError(
            "A version is written whole or not at all, and TensorFlow could not write it. "
            f"Received: {error.message} "
            "Make room on the disk of base_path, or mend what the message names."
        ) from error


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    file = folder / contract.MANIFEST_FILE
    file.parent.mkdir()
    file.write_text(manifest.to_json() + "\n")


def _manifest(
    model: keras.Model, saved: Path, towers: Towers, texts: Texts, head: Any, job: Job
) -> Manifest:
    index, inputs = job.index, _input_specs(towers[0], job)
    other_tower = None
    if job.other_tower is not None:
        decoder = job.other_tower.decoder
        other_tower = {
            "inputs": _input_specs(towers[1], job.other_tower),
            "decoder": None if decoder is None else decoder.to_json(),
        }
        if job.other_tower.text is not None:
            other_tower["preprocessor"] = _preprocessor(texts[1], job.other_tower.text)
    fingerprint = fingerprint_of(
        model,
        saved,
        inputs,
        job.decoder,
        job.normalize,
        other_tower,
        [tower.text for tower in (job, job.other_tower) if tower is not None],
    )
    if index is not None:
        flows.check_encoder(index.encoder_fingerprint, fingerprint)
    num_outputs = None if head is None else head.num_classes
    of_values = job.activation == "none"
    kinds = {None: "encoder", "none": "regressor"}
    # Temperatures alone decide nothing: without its signature there is no cascade.
    is_adaptive = contract.CLASSIFY_ADAPTIVE in job.signatures
    cascade = job.policy.to_json() if job.policy and is_adaptive else None
    return Manifest(
        name=job.name,
        kind="index" if index is not None else kinds.get(job.activation, "classifier"),
        fingerprint=fingerprint,
        dims=job.dims,
        width=job.dims[-1],
        inputs=inputs,
        weights=job.weights,
        tied=bool(head is not None and head.tied),
        normalize=job.normalize,
        metric="cosine" if index is None else index.metric,
        activation=job.activation or "none",
        num_classes=None if of_values else num_outputs,
        num_values=num_outputs if of_values else None,
        top_k=job.top_k,
        labels=job.labels is not None,
        cascade=cascade if cascade and "stages" in cascade else None,
        exits=tuple(own.to_json() for own in job.exits) or None,
        exit_cascade=_with_costs(cascade, job) if cascade and "exit_stages" in cascade else None,
        decoder=None if job.decoder is None else job.decoder.to_json(),
        preprocessor=_preprocessor(texts[0], job.text),
        other_tower=other_tower,
        quality=job.quality,
        encoder_fingerprint=None if index is None else fingerprint,
        prompt=None if index is None else index.prompt,
        funnel=None if index is None else index.schedule.to_json(),
        size=None if index is None else len(index),
        model_id=job.model_id,
        made_with={
            "keras_mrl": __version__,
            "keras": keras.__version__,
            "tensorflow": tf.__version__,
            "trained_on": job.trained_on,
        },
    )


def _text_graph(job: Job | TowerJob | None) -> TextGraph | None:
    """Return what makes tokens of a tower's texts; None of one that takes none.

    Raises:
        ExportError: If it gives other tokens for the sample than the trained model was given.
    """
    if job is None or job.text is None:
        return None
    graph = served_graph(job.text)
    check_tokens(graph, job.text, job.sample[TEXT_INPUT])
    return graph


def _preprocessor(graph: TextGraph | None, text: TextJob | None) -> dict[str, Any] | None:
    """Return what a manifest says of the tokens that its graph makes; None if it makes none."""
    if graph is None or text is None:
        return None
    operations = graph.operations()
    version = ".".join(tf.__version__.split(".")[:2]) if operations else None
    return {**text.to_json(), "operations": operations, "tensorflow_text": version}


def _with_costs(cascade: Mapping[str, Any], job: Job) -> dict[str, Any]:
    """Return a cascade over exits with what a row costs that leaves at each stage."""
    costs = job.relative_costs or ()
    stages = cascade["exit_stages"]
    if costs:
        stages = [{**own, "relative_cost": cost} for own, cost in zip(stages, costs, strict=True)]
    return {**cascade, "exit_stages": stages}


def _input_specs(backbone: keras.Model, job: Job | TowerJob) -> dict[str, dict[str, Any]]:
    """Return dtype and shape of every input: those the model declares, or else the sample's."""
    if job.decoder is not None or job.text is not None:
        return {name: {"dtype": "string", "shape": [None]} for name in job.sample}
    declared = declared_inputs(backbone)
    if len(declared) == 1:
        declared = dict(zip(job.sample, declared.values(), strict=True))
    tensors = {name: declared.get(name, array) for name, array in job.sample.items()}
    return {
        name: {"dtype": _served_dtype(tensor.dtype), "shape": [None, *tensor.shape[1:]]}
        for name, tensor in tensors.items()
    }


def _served_dtype(dtype: Any) -> str:
    """Return the dtype that clients send.

    Half precision is an affair of training, and float64 in an array is only NumPy's default.
    """
    if isinstance(dtype, np.dtype) and dtype.kind in "OSU":
        return "string"
    in_float32 = {"bfloat16", "float16", *(["float64"] if isinstance(dtype, np.dtype) else [])}
    return "float32" if str(dtype) in in_float32 else str(dtype)


def fingerprint_of(
    model: keras.Model,
    saved: Path,
    inputs: Mapping[str, Mapping[str, Any]],
    decoder: ImageDecoder | None,
    normalize: bool,
    other_tower: Mapping[str, Any] | None = None,
    texts: Sequence[TextJob | None] = (),
) -> str:
    """Return the SHA-256 of all that makes an embedding out of an input.

    That is the configuration, every weight in the model's own order, values that layers keep
    besides weights (vocabularies, document frequencies), and how the model is served: its decoder,
    whether embeddings are scaled, and the types its inputs are cast to. Dims, labels, a cascade
    and the random state of Dropout change no embedding; code of the user's own layers has no form
    that every process shares.

    Args:
        model: The model as it is served.
        saved: The `.keras` file it was loaded from.
        inputs: The inputs of the manifest.
        decoder: Decodes images in the served graph.
        normalize: Whether embeddings are scaled to unit length.
        other_tower: Inputs and decoder of the other tower, as the manifest has them.
        texts: What makes tokens of texts in the served graph, by tower.
    """
    digest = hashlib.sha256(model.to_json(sort_keys=True).encode())
    served: dict[str, Any] = {
        "decoder": None if decoder is None else decoder.to_json(),
        "normalize": bool(normalize),
        "dtypes": _dtypes(inputs),
    }
    if other_tower is not None:
        decoded = other_tower["decoder"]
        served["other_tower"] = {"decoder": decoded, "dtypes": _dtypes(other_tower["inputs"])}
    if any(texts):
        served["texts"] = [None if text is None else text.identity() for text in texts]
    digest.update(json.dumps(served, sort_keys=True).encode())
    values = [keras.ops.convert_to_numpy(variable) for variable in model.weights]
    for value in (*values, *_values_besides_weights(model)):
        digest.update(f"{value.dtype}{value.shape}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    with zipfile.ZipFile(saved) as archive:
        for name in sorted(archive.namelist()):
            if name.startswith("assets/"):  # vocabularies that layers learned
                digest.update(f"{name}\n".encode())
                digest.update(archive.read(name))
    return digest.hexdigest()


def _dtypes(inputs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [inputs[name]["dtype"] for name in sorted(inputs)]


def _values_besides_weights(model: keras.Model) -> list[npt.NDArray[Any]]:
    """Return values that layers with a store of their own save, such as the weights of TF-IDF."""
    values = []
    for layer in model._flatten_layers():
        if type(layer).save_own_variables is not keras.Layer.save_own_variables:
            store: dict[str, Any] = {}
            layer.save_own_variables(store)
            values += [np.asarray(store[key]) for key in sorted(store)]
    return values


def _index_manifest(index: ExactIndex, name: str, model_id: int | None) -> Manifest:
    return Manifest(
        name=name,
        kind="index",
        fingerprint=fingerprint_of_index(index),
        encoder_fingerprint=index.encoder_fingerprint,
        prompt=index.prompt,
        dims=index.schedule.dims,
        width=index.width,
        inputs={"embedding": {"dtype": "float32", "shape": [None, index.width]}},
        normalize=False,
        metric=index.metric,
        funnel=index.schedule.to_json(),
        size=len(index),
        model_id=model_id,
        made_with={"keras_mrl": __version__, "tensorflow": tf.__version__},
    )


def fingerprint_of_index(index: ExactIndex) -> str:
    """Return the SHA-256 of the schedule, the metric, the encoder, the ids and every row."""
    digest = hashlib.sha256(json.dumps(index.facts.to_json()).encode())
    arrays: tuple[npt.NDArray[Any], ...] = (index.ids, *index.blocks)
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
        forget(array)
    return digest.hexdigest()


# These operations call back into the Python process that made them.
_OF_PYTHON = frozenset(("PyFunc", "PyFuncStateless", "EagerPyFunc"))
# TensorFlow's own too, though tf.raw_ops lacks them: Keras slices and updates by them.
_INTERNAL = ("_", "Xla")


def check_operations(folder: Path) -> None:
    """Raise `ExportError` if the SavedModel in `folder` needs more than a stock server has.

    Such a model would run here, where the package that brings the operation is imported, and load
    in no server.
    """
    foreign = sorted(name for name in operations_of(folder) if not _is_served(name))
    if foreign:
        raise ExportError(
            "A served graph may hold only operations that TensorFlow Serving has: those of "
            "TensorFlow and of tensorflow-text. "
            f"Received: a model that needs {', '.join(foreign)}. Do this before the model, in the "
            "client, or by layers of Keras: keras.ops for tf.py_function."
        )


def _is_served(name: str) -> bool:
    if name in _OF_PYTHON:
        return False
    return name in TEXT_OPERATIONS or hasattr(tf.raw_ops, name) or name.startswith(_INTERNAL)
