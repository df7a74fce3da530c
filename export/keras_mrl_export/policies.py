"""Another policy for a version that is there: its weights and its graph, under a number of its own.

What decides, and what says so, are constants of the graph (`constants`): thresholds, temperatures,
the manifest and the model's id. They are written anew in `saved_model.pb`. All other files are the
old ones.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_mrl_serving import contract
from keras_mrl_serving.cascade.policy import CascadePolicy
from keras_mrl_serving.contract import Manifest
from keras_mrl_serving.inputs import check_inputs
from keras_mrl_serving.saved_model import GRAPH_FILE, read_manifest

from .arguments import check_base_path
from .job import ExportError, draw_model_id
from .publish import publishing

Arrays = Mapping[str, npt.NDArray[Any]]
Values = dict[str, Any]  # of constants by name

_TOLERANCE = 1e-5  # of a confidence, as `parity` has it
_NEVER, _ALWAYS = 3e38, -3e38  # thresholds that no confidence is above, and that all are above


def publish_policy(
    version_folder: str | Path,
    policy: CascadePolicy,
    base_path: str | Path | None = None,
    version: int | None = None,
    *,
    sample: Any = None,
) -> Path:
    """Publish a version with the weights of another and a policy of its own.

    Nothing is trained or traced. The files are those of the other version, hard-linked where the
    file system can; only `saved_model.pb` and the manifest are written. The new version has the
    same fingerprint, so indexes and embeddings of the other remain good, and a `model_id` of its
    own. Labels of a server's config then send a share of the requests to either.

    On real rows, each stage is asked about every row, and the new version must decide each where
    the policy does; then the version gets its number, whole or not at all.

    Args:
        version_folder: A version that `export_saved_model` wrote with a policy.
        policy: The new policy: the stages and the confidence of the old one, with other thresholds
            and temperatures.
        base_path: Folder to publish in; None means that of the version.
        version: As in `export_saved_model`.
        sample: A few real rows in the form the version takes, an array or a dict by input name;
            None takes those of its warm-up records.

    Returns:
        The folder of the new version.

    Raises:
        ValueError: If the folder holds no such version, the policy asks other stages or by another
            confidence, or there are no rows to compare on.
        FileExistsError: If `version` exists.
        ExportError: If the version was exported before policies could be replaced, or decides
            otherwise than the policy.

    Examples:
        ```
        stricter = certify_cascade(logits, labels, dims, alpha=0.005)
        publish_policy("models/birds/1785000000", stricter)
        ```
    """
    source = Path(version_folder)
    manifest = _manifest_of(source)
    _check_policy(policy, manifest)
    folder = check_base_path(source.resolve().parent if base_path is None else base_path)
    named = _with_policy(manifest, policy)
    with _refusing_damaged(source):
        rows = _warmup_rows(source) if sample is None else check_inputs(manifest.inputs, sample)
        if not rows or not len(next(iter(rows.values()))):
            has_none = f"{source}, which has no warm-up records"
            raise ValueError(
                "A policy is compared on real rows before it is published. "
                f"Received: {has_none if sample is None else 'a sample of no rows'}. "
                "Give a few rows: sample=images[:16]."
            )
        with publishing(folder, version) as staged:
            _write_version(source, staged.folder, manifest, named)
            _check_decisions(source, staged.folder, staged.scratch, named, policy, rows)
    return staged.published


@contextmanager
def _refusing_damaged(source: Path) -> Iterator[None]:
    """Raise `ExportError` for what is said of files that are not whole, or cannot be written."""
    import tensorflow as tf  # which other backends need only for this
    from google.protobuf.message import DecodeError

    try:
        yield
    except FileExistsError as error:
        if error.errno is None:  # our own: the number is taken
            raise
        raise _not_whole(source, str(error)) from error
    except (DecodeError, tf.errors.OpError, OSError) as error:
        raise _not_whole(source, getattr(error, "message", None) or str(error)) from error


def _not_whole(source: Path, text: str) -> ExportError:
    said = f"of which TensorFlow or the file system says: {text.strip()[:500].rstrip('.')}."
    return ExportError(
        "A policy is published for a version that is whole, with room for another beside it. "
        f"Received: {source}, {said} Nothing was published. "
        "Copy the version again, export the model again, or make room on the disk."
    )


def _manifest_of(source: Path) -> Manifest:
    manifest = read_manifest(source) if (source / GRAPH_FILE).is_file() else None
    if manifest is None:
        raise ValueError(
            "A policy is published for a version that export_saved_model wrote. "
            f"Received: {source}, which is none. Give its folder, for example models/birds/1."
        )
    if manifest.adaptive_cascade is None:
        raise ValueError(
            "A policy takes the place of another. "
            f"Received: {source}, exported without one. Export the model with it: "
            "export_saved_model(..., policy=policy)."
        )
    return manifest


def _check_policy(policy: CascadePolicy, manifest: Manifest) -> None:
    if not isinstance(policy, CascadePolicy):
        raise TypeError(
            f"policy must be a CascadePolicy. Received: {type(policy).__name__}. "
            "Learn one with CascadePolicy.learn, or read one with CascadePolicy.from_json."
        )
    there = CascadePolicy.from_json(manifest.adaptive_cascade or {})
    if policy.keys != there.keys or policy.confidence != there.confidence:
        old, new = (
            f"{', '.join(f'{e} at {d}' if e else str(d) for e, d in own.keys)} by {own.confidence}"
            for own in (there, policy)
        )
        raise ValueError(
            "A policy for a version that is there asks the stages that its graph asks, by the same "
            f"confidence: {old}. Received: {new}. "
            "Learn thresholds for these, or export the model again with this policy."
        )


def _with_policy(manifest: Manifest, policy: CascadePolicy) -> Manifest:
    """Return the manifest of the same weights with another policy and another id."""
    cascade = policy.to_json()
    model_id = None if manifest.model_id is None else draw_model_id()
    if manifest.exit_cascade is None:
        return replace(manifest, cascade=cascade, model_id=model_id)
    # What a row costs that leaves at a stage depends on the stages, not on the thresholds.
    stages = zip(cascade["exit_stages"], manifest.exit_cascade["exit_stages"], strict=True)
    cascade["exit_stages"] = [
        {**new, **{key: old[key] for key in ("relative_cost",) if key in old}}
        for new, old in stages
    ]
    return replace(manifest, exit_cascade=cascade, model_id=model_id)


def _values(manifest: Manifest) -> Values:
    """Return the values of the constants that the graph of a version has, by name."""
    from . import constants  # TensorFlow, which other backends need only for this

    values: Values = {constants.MANIFEST: manifest.to_json().encode()}
    if manifest.model_id is not None:
        values[constants.MODEL_ID] = np.int32(manifest.model_id)
    policy = CascadePolicy.from_json(manifest.adaptive_cascade or {})
    for index, stage in enumerate(policy.stages):
        values[f"{constants.TEMPERATURE}_{index}"] = np.float32(stage.temperature)
        if stage.threshold is not None:
            values[f"{constants.THRESHOLD}_{index}"] = np.float32(stage.threshold)
    return values


def _write_version(source: Path, folder: Path, old: Manifest, new: Manifest) -> None:
    """Write a version of the files of `source` with another manifest, and its policy in the graph.

    Args:
        source: The version that is there.
        folder: Where the new one is written.
        old: The manifest of `source`.
        new: The new manifest.
    """
    _take_files(source, folder)
    (folder / contract.MANIFEST_FILE).write_text(new.to_json() + "\n")
    (folder / GRAPH_FILE).write_bytes(_graph(source, _values(old), _values(new)))


def _take_files(source: Path, folder: Path) -> None:
    """Link all files but those that are written anew, and TensorFlow's digest of the graph."""
    from .build import PARITY_FILE

    others = (GRAPH_FILE, contract.MANIFEST_FILE, PARITY_FILE, "fingerprint.pb")
    for place, _, files in os.walk(source, followlinks=True):  # rglob passes linked folders over
        name = Path(place).relative_to(source)
        (folder / name).mkdir(parents=True, exist_ok=True)
        for file in files:
            if (name / file).as_posix() not in others:
                _link(Path(place, file).resolve(), folder / name / file)
    (folder / contract.MANIFEST_FILE).parent.mkdir(parents=True, exist_ok=True)


def _link(source: Path, path: Path) -> None:
    try:
        os.link(source, path)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, path)


def _graph(source: Path, old: Values, new: Values) -> bytes:
    """Return `saved_model.pb` of a version with other values of its constants.

    Raises:
        ExportError: If the graph has not these constants, with their old values.
    """
    import tensorflow as tf
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

    # TensorFlow numbers a name that stands twice in one function: threshold_1, threshold_1_1.
    names = re.compile(rf"(?:.*/)?({'|'.join(map(re.escape, old))})(_\d+)?")
    saved = SavedModel.FromString((source / GRAPH_FILE).read_bytes())
    written: set[str] = set()
    for node in _nodes(saved):
        match = names.fullmatch(node.name) if node.op == "Const" else None
        if match is None:
            continue
        tensor = node.attr["value"].tensor
        if tf.make_ndarray(tensor).tolist() != np.asarray(old[match[1]], object).tolist():
            continue
        tensor.CopyFrom(tf.make_tensor_proto(new[match[1]]))
        written.add(match[1])
    if missing := [name for name in old if name not in written]:
        raise ExportError(
            "A policy is replaced in a graph that holds thresholds, temperatures, manifest and id "
            f"by name. Received: {source}, without {', '.join(missing)}: an earlier version of "
            "keras-mrl exported it. Export the model again with this policy."
        )
    data: bytes = saved.SerializeToString(deterministic=True)
    return data


def _nodes(saved: Any) -> list[Any]:
    graphs = [meta_graph.graph_def for meta_graph in saved.meta_graphs]
    functions = [function for graph in graphs for function in graph.library.function]
    return [
        *(node for graph in graphs for node in graph.node),
        *(node for function in functions for node in function.node_def),
    ]


def _warmup_rows(source: Path) -> dict[str, npt.NDArray[Any]]:
    """Return the rows of the warm-up records of `classify_adaptive`; none where there are none."""
    import tensorflow as tf
    from tensorflow_serving.apis.prediction_log_pb2 import PredictionLog

    from .warmup import WARMUP_FILE

    file = source / WARMUP_FILE
    records = tf.data.TFRecordDataset(str(file)) if file.is_file() else ()
    parts: list[dict[str, npt.NDArray[Any]]] = []
    for record in records:
        request = PredictionLog.FromString(record.numpy()).predict_log.request
        if request.model_spec.signature_name == contract.CLASSIFY_ADAPTIVE:
            parts.append({name: tf.make_ndarray(t) for name, t in request.inputs.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in (parts or [{}])[0]}


def _check_decisions(
    source: Path,
    folder: Path,
    scratch: Path,
    manifest: Manifest,
    policy: CascadePolicy,
    rows: Arrays,
) -> None:
    """Raise `ExportError` unless the new version decides each row where the policy does.

    What a stage makes of every row is answered by the same graph with thresholds that all rows
    pass, but for that stage, where they stop.
    """
    from keras_mrl_serving._session import SavedModelSession

    from . import constants
    from .build import PARITY_FILE

    values = _values(manifest)
    by_stage = []
    for index, stage in enumerate(policy.stages):
        stops = {
            f"{constants.THRESHOLD}_{place}": np.float32(_ALWAYS if place == index else _NEVER)
            for place, own in enumerate(policy.stages)
            if own.threshold is not None
        }
        probe = scratch / f"stage_{index}"
        _take_files(folder, probe)
        (probe / GRAPH_FILE).write_bytes(_graph(folder, values, {**values, **stops}))
        with SavedModelSession(probe) as session:
            answer = session.run(contract.CLASSIFY_ADAPTIVE, rows)
        if not np.isfinite(answer["probabilities"]).all():
            raise ValueError(
                "A policy is compared on rows that the model answers by finite numbers. Received: "
                f"rows whose probabilities at stage {index} are NaN or infinite. Leave them out."
            )
        if not (answer["dim"] == stage.dim).all():
            raise _differs(f"stage {index} is not asked at dim {stage.dim}")
        by_stage.append(answer)
        shutil.rmtree(probe)
    with SavedModelSession(folder) as session:
        answer = session.run(contract.CLASSIFY_ADAPTIVE, rows)
        described = session.run(contract.DESCRIBE, {"key": np.array([b""], object)})
    if described["manifest"].tolist() != [manifest.to_json().encode()]:
        raise _differs("describe is not the new manifest")
    report = {
        "rows": len(answer["dim"]),
        "tolerance": _TOLERANCE,
        "weights_of": source.name,
        "largest_difference": {
            contract.CLASSIFY_ADAPTIVE: _compare(answer, by_stage, policy, manifest)
        },
    }
    (folder / PARITY_FILE).write_text(json.dumps(report, indent=1) + "\n")


def _compare(
    answer: Arrays, by_stage: Sequence[Arrays], policy: CascadePolicy, manifest: Manifest
) -> float:
    """Return the largest difference of a confidence; raise where a row is decided otherwise.

    A confidence that lies as near to its threshold as rounding may be on either side.
    """
    limits = [-np.inf if s.threshold is None else s.threshold for s in policy.stages]
    confidence = np.stack([own["confidence"] for own in by_stage], axis=1)
    stage_of = np.argmax(confidence > np.array(limits, np.float32), axis=1)
    worst = 0.0
    for row, index in enumerate(stage_of.tolist()):
        own, (exit, dim) = by_stage[index], policy.keys[index]
        left_at = manifest.exit_names[answer["exit"][row]] if "exit" in answer else None
        if answer["dim"][row] != dim or left_at not in (None, exit or contract.LAST_EXIT):
            gaps = np.abs(confidence[row, : index + 1] - limits[: index + 1])
            if gaps.min() > _TOLERANCE:
                raise _differs(f"row {row} stops at dim {answer['dim'][row]}, not at {dim}")
            continue
        off = np.abs(answer["probabilities"][row] - own["probabilities"][row]).max()
        off = max(float(off), abs(float(answer["confidence"][row] - own["confidence"][row])))
        if off > _TOLERANCE:
            raise _differs(f"row {row} has other probabilities than at its stage")
        worst = max(worst, off)
    return worst


def _differs(how: str) -> ExportError:
    return ExportError(
        "A version must decide each row where its policy does. "
        f"Received: a new version that differs: {how}. Nothing was published. "
        "Export the model again with this policy."
    )
