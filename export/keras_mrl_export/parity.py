"""Does the SavedModel equal the Keras model? Every signature, on a real batch, before it counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_mrl_serving import contract
from keras_mrl_serving._session import SavedModelSession
from keras_mrl_serving.cascade.confidence import confidence_of, softmax
from keras_mrl_serving.contract import Manifest
from keras_mrl_serving.embeddings import truncate

from .difference import differs, equal_rows
from .examples import Arrays, examples
from .job import Job
from .neighbors import QUERIES, check_searches, same_neighbors
from .tolerance import TOLERANCE

PARITY_FILE = "assets.extra/keras_mrl_parity.json"

Array = npt.NDArray[Any]
Run = Callable[[str, Arrays], dict[str, Array]]


def check_parity(folder: Path, manifest: Manifest, job: Job) -> dict[str, Any]:
    """Run every signature of the SavedModel in `folder` and compare it with the Keras model.

    Embeddings, features and logits may differ by a share of their row's largest (`TOLERANCE`). A
    probability may differ by what such a difference of the logits can make of it; class ids and
    dims may differ only where a probability or a confidence lies that near its neighbour or
    threshold.

    Returns:
        How near it was: the number of rows, the tolerance, and by signature the largest difference,
        as a share of what the tolerance is a share of: a row's largest, or for probabilities its
        largest logit. A gallery is asked about no more than the first few rows.

    Raises:
        ExportError: If a signature is missing, or differs by more.
    """
    inputs = examples(manifest, job)
    shares: dict[str, float] = {}
    with SavedModelSession(folder) as session:

        def run(signature: str, given: Arrays | None = None) -> dict[str, Array]:
            if signature not in session.signatures:
                raise differs(signature, "it is missing")
            return session.run(signature, inputs[signature] if given is None else given)

        def chosen(name: str) -> bool:
            return name in job.signatures

        if chosen(contract.FEATURES):
            served = run(contract.FEATURES)["features"]
            shares[contract.FEATURES] = equal_rows(contract.FEATURES, served, job.features)
        for index, dim in enumerate(manifest.dims):
            prefix = job.features[:, :dim]
            expected = truncate(prefix, dim) if manifest.normalize else prefix
            if chosen(name := contract.embed(dim)):
                shares[name] = equal_rows(name, run(name)["embedding"], expected)
            if job.logits is not None:
                logits = job.logits[:, index]
                temperature = _temperature(job, dim)
                if chosen(name := contract.classify(dim)):
                    shares[name] = _same_classes(name, run(name), logits, temperature, job)
                if chosen(name := contract.head(dim)):
                    answer = run(name)
                    shares[name] = equal_rows(name, answer["logits"], logits)
                    _same_classes(name, answer, logits, temperature, job)
        if job.logits is not None and chosen(contract.CLASSIFY_ADAPTIVE):
            name = contract.CLASSIFY_ADAPTIVE
            shares[name] = _same_cascade(run(name), manifest, job)
        shares[contract.SERVING_DEFAULT] = _same_default(run(contract.SERVING_DEFAULT), job)
        if job.index is not None:
            queries = np.ascontiguousarray(job.features[:QUERIES, : manifest.width])
            shares |= check_searches(run, job.index, queries, job.signatures)
            if chosen(name := contract.RETRIEVE):
                few = {key: array[:QUERIES] for key, array in inputs[name].items()}
                near, metric = job.index.search(queries), job.index.metric
                shares[name] = same_neighbors(name, run(name, few), near, queries, metric)
        check_described(run, manifest)
    return {"rows": len(job.features), "tolerance": TOLERANCE, "largest_difference": shares}


def check_described(run: Run, manifest: Manifest) -> None:
    """Raise `ExportError` unless `describe` answers with the manifest."""
    described = run(contract.DESCRIBE, {"key": np.array([b"", b""], dtype=object)})
    if described["manifest"].tolist() != [manifest.to_json().encode()] * 2:
        raise differs(contract.DESCRIBE, "it is not the manifest")


def _same_default(answer: Arrays, job: Job) -> float:
    """It is `classify_<d>`, or `embed_<d>` without a head, of the full dim."""
    name = contract.SERVING_DEFAULT
    if job.logits is not None:
        temperature = _temperature(job, job.dims[-1])
        return _same_classes(name, answer, job.logits[:, -1], temperature, job)
    expected = truncate(job.features, job.dims[-1]) if job.normalize else job.features
    return equal_rows(name, answer["embedding"], expected)


def _temperature(job: Job, dim: int) -> float:
    stages = job.policy.stages if job.policy else ()
    return next((stage.temperature for stage in stages if stage.dim == dim), 1.0)


def _same_classes(
    signature: str, answer: Arrays, logits: Array, temperature: float, job: Job
) -> float:
    expected = softmax(logits, temperature)
    # A logit off by the tolerance of the row's largest moves a probability by at most that much.
    scale = np.maximum(np.abs(logits).max(axis=-1, keepdims=True) / temperature, 1.0)
    allowed = TOLERANCE * scale
    ids, served = answer["class_ids"], answer["probabilities"]
    best = -np.sort(-expected, axis=-1)[:, : served.shape[1]]
    named = np.take_along_axis(expected, ids, axis=-1)
    for wanted in (best, named):
        if not (np.abs(served - wanted) <= allowed).all():
            worst = np.abs(served - wanted).max()
            raise differs(signature, f"by {worst:.3g} in its probabilities")
    measure = job.policy.confidence if job.policy else "max_probability"
    if measure == "max_probability":
        sure, off = served[:, 0], 0.0
    else:  # a sum over all classes, or a difference of two
        sure = confidence_of(measure, logits, temperature)
        off = 2 * (1 + math.log(logits.shape[-1])) * allowed[:, 0]
    if not (np.abs(answer["confidence"] - sure) <= off).all():
        raise differs(signature, f"its confidence is not its {measure}")
    if job.labels is not None:
        names = np.asarray([label.encode() for label in job.labels], dtype=object)[ids]
        if not np.array_equal(answer["labels"], names):
            raise differs(signature, "its labels do not name its class ids")
    return float((np.abs(served - best) / scale).max(initial=0.0))


def _same_cascade(answer: Arrays, manifest: Manifest, job: Job) -> float:
    policy, logits = job.policy, job.logits
    if policy is None or logits is None:
        return 0.0
    columns = [manifest.dims.index(stage.dim) for stage in policy.stages]
    logits = logits[:, columns]
    _, stage_of = policy.route(logits)
    dims = np.asarray(policy.dims)
    for row in np.flatnonzero(answer["dim"] != dims[stage_of]):
        served_stage = int(np.flatnonzero(dims == answer["dim"][row])[0])
        stage = policy.stages[min(served_stage, int(stage_of[row]))]
        scores = logits[row, policy.stages.index(stage)]
        sure = float(confidence_of(policy.confidence, scores, stage.temperature))
        near = TOLERANCE * max(1.0, float(np.abs(scores).max()) / stage.temperature)
        if policy.confidence != "max_probability":
            near *= 2 * (1 + math.log(len(scores)))
        if abs(sure - (stage.threshold or 0.0)) > near:
            raise differs(
                contract.CLASSIFY_ADAPTIVE,
                f"row {row} stops at dim {answer['dim'][row]} for {dims[stage_of[row]]}",
            )
    worst, name = 0.0, contract.CLASSIFY_ADAPTIVE
    for index, stage in enumerate(policy.stages):
        rows = answer["dim"] == stage.dim
        part = {output: column[rows] for output, column in answer.items()}
        at = logits[rows, index]
        worst = max(worst, _same_classes(name, part, at, stage.temperature, job))
    return worst
