"""Does the SavedModel equal the Keras model? Every signature, on a real batch, before it counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_mrl_serving import contract
from keras_mrl_serving._session import SavedModelSession
from keras_mrl_serving.cascade import softmax
from keras_mrl_serving.contract import Manifest
from keras_mrl_serving.embeddings import truncate
from keras_mrl_serving.index import ExactIndex

from .errors import ExportError
from .job import Job
from .tolerance import TOLERANCE

Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]
Run = Callable[[str, Arrays], dict[str, Array]]


def check_parity(folder: Path, manifest: Manifest, job: Job) -> None:
    """Run every signature of the SavedModel in `folder` and compare it with the Keras model.

    Embeddings, features and logits may differ by the job's tolerance of their row's largest. A
    probability may differ by what such a difference of the logits can make of it; class ids and
    dims may differ only where a probability or a confidence lies that near its neighbour or
    threshold.

    Raises:
        ExportError: If a signature is missing, or differs by more.
    """
    sample = {
        name: np.asarray(array, dtype=object if spec["dtype"] == "string" else spec["dtype"])
        for (name, spec), array in zip(
            manifest.inputs.items(), (job.sample[n] for n in manifest.inputs), strict=True
        )
    }
    tolerance = job.tolerance
    with SavedModelSession(folder) as session:

        def run(signature: str, inputs: Arrays) -> dict[str, Array]:
            if signature not in session.signatures:
                raise _differs(signature, "it is missing")
            return session.run(signature, inputs)

        _equal(
            contract.FEATURES, run(contract.FEATURES, sample)["features"], job.features, tolerance
        )
        for index, dim in enumerate(manifest.dims):
            prefix = job.features[:, :dim]
            expected = truncate(prefix, dim) if manifest.normalize else prefix
            name = contract.embed(dim)
            _equal(name, run(name, sample)["embedding"], expected, tolerance)
            if job.logits is not None:
                logits = job.logits[:, index]
                temperature = _temperature(job, dim)
                name = contract.classify(dim)
                _same_classes(name, run(name, sample), logits, temperature, job)
                name = contract.head(dim)
                answer = run(name, {"features": np.ascontiguousarray(prefix)})
                _equal(name, answer["logits"], logits, tolerance)
                _same_classes(name, answer, logits, temperature, job)
        if job.policy is not None and job.logits is not None:
            _same_cascade(run(contract.CLASSIFY_ADAPTIVE, sample), manifest, job)
        default = run(contract.SERVING_DEFAULT, sample)
        kind = contract.embed if job.logits is None else contract.classify
        for output, values in run(kind(manifest.width), sample).items():
            if not np.array_equal(default[output], values):
                raise _differs(contract.SERVING_DEFAULT, f"its {output} are of another dim")
        if job.index is not None:
            _same_index(run, sample, job.index, manifest, job)
        check_described(run, manifest)


def check_described(run: Run, manifest: Manifest) -> None:
    """Raise `ExportError` unless `describe` answers with the manifest."""
    described = run(contract.DESCRIBE, {"key": np.array([b"", b""], dtype=object)})
    if described["manifest"].tolist() != [manifest.to_json().encode()] * 2:
        raise _differs(contract.DESCRIBE, "it is not the manifest")


def same_neighbors(
    signature: str, answer: Arrays, index: ExactIndex, queries: Array, tolerance: float
) -> None:
    """Raise `ExportError` unless an answer has the neighbours and scores that `index` finds.

    Ids may change places where their scores are as near as the tolerance of the largest. A squared
    distance is a difference of squared lengths: its rounding is that of the query's own length.
    """
    expected = index.search(queries)
    largest = np.abs(expected.scores).max(axis=1, keepdims=True)
    if index.metric == "l2":
        largest = np.maximum(largest, np.square(queries).sum(axis=1, keepdims=True))
    _equal(signature, answer["scores"], expected.scores, tolerance, largest)
    apart = np.diff(expected.scores, axis=1)
    least = tolerance * largest
    far = np.pad(np.abs(apart) > least, ((0, 0), (1, 1)), constant_values=True)
    alone = far[:, :-1] & far[:, 1:]
    alone[:, -1] = False  # a row that is as near may have been left out
    if (answer["ids"] != expected.ids)[alone].any():
        raise _differs(signature, "it finds other neighbours")


def _same_index(run: Run, sample: Arrays, index: ExactIndex, manifest: Manifest, job: Job) -> None:
    queries = np.ascontiguousarray(job.features[:, : manifest.width])
    found = run(contract.RETRIEVE, sample)
    same_neighbors(contract.RETRIEVE, found, index, queries, job.tolerance)
    found = run(contract.SEARCH, {"embedding": queries})
    same_neighbors(contract.SEARCH, found, index, queries, TOLERANCE)


def _temperature(job: Job, dim: int) -> float:
    stages = job.policy.stages if job.policy else ()
    return next((stage.temperature for stage in stages if stage.dim == dim), 1.0)


def _equal(
    signature: str,
    served: Array,
    expected: Array,
    tolerance: float,
    largest: Array | None = None,
) -> None:
    if served.shape != expected.shape:
        raise _differs(signature, f"shape {served.shape} for {expected.shape}")
    if largest is None:
        largest = np.abs(expected).max(axis=-1, keepdims=True)
    excess = np.abs(served - expected) - tolerance * largest
    if not (excess <= 0).all():
        worst = np.abs(served - expected).max()
        raise _differs(signature, f"by {worst:.3g} on rows of magnitude {largest.max():.3g}")


def _same_classes(
    signature: str, answer: Arrays, logits: Array, temperature: float, job: Job
) -> None:
    expected = softmax(logits, temperature)
    # A logit off by the tolerance of the row's largest moves a probability by at most that much.
    scale = np.maximum(np.abs(logits).max(axis=-1, keepdims=True) / temperature, 1.0)
    allowed = job.tolerance * scale
    ids, served = answer["class_ids"], answer["probabilities"]
    best = -np.sort(-expected, axis=-1)[:, : served.shape[1]]
    named = np.take_along_axis(expected, ids, axis=-1)
    for wanted in (best, named):
        if not (np.abs(served - wanted) <= allowed).all():
            worst = np.abs(served - wanted).max()
            raise _differs(signature, f"by {worst:.3g} in its probabilities")
    if not np.array_equal(answer["confidence"], served[:, 0]):
        raise _differs(signature, "its confidence is not its best probability")
    if job.labels is not None:
        names = np.asarray([label.encode() for label in job.labels], dtype=object)[ids]
        if not np.array_equal(answer["labels"], names):
            raise _differs(signature, "its labels do not name its class ids")


def _same_cascade(answer: Arrays, manifest: Manifest, job: Job) -> None:
    policy, logits = job.policy, job.logits
    if policy is None or logits is None:
        return
    columns = [manifest.dims.index(stage.dim) for stage in policy.stages]
    logits = logits[:, columns]
    _, stage_of = policy.route(logits)
    dims = np.asarray(policy.dims)
    for row in np.flatnonzero(answer["dim"] != dims[stage_of]):
        served_stage = int(np.flatnonzero(dims == answer["dim"][row])[0])
        stage = policy.stages[min(served_stage, int(stage_of[row]))]
        scores = logits[row, policy.stages.index(stage)]
        margin = abs(softmax(scores, stage.temperature).max() - (stage.threshold or 0.0))
        if margin > job.tolerance * max(1.0, float(np.abs(scores).max()) / stage.temperature):
            raise _differs(
                contract.CLASSIFY_ADAPTIVE,
                f"row {row} stops at dim {answer['dim'][row]} for {dims[stage_of[row]]}",
            )
    for index, stage in enumerate(policy.stages):
        rows = answer["dim"] == stage.dim
        part = {name: column[rows] for name, column in answer.items()}
        _same_classes(contract.CLASSIFY_ADAPTIVE, part, logits[rows, index], stage.temperature, job)


def _differs(signature: str, how: str) -> ExportError:
    return ExportError(
        "Every signature must equal the Keras model on the sample. "
        f"Received: {signature} differs: {how}. Nothing was published. "
        "Look for layers that act differently on each backend or at random when training=False."
    )
