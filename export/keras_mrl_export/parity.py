"""Does the SavedModel equal the Keras model? Every signature, on a real batch, before it counts."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Collection, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_mrl_serving import contract
from keras_mrl_serving._session import SavedModelSession
from keras_mrl_serving.cascade.confidence import confidence_of, softmax
from keras_mrl_serving.contract import Manifest
from keras_mrl_serving.embeddings import MIN_SQUARE, truncate
from keras_mrl_serving.index import ExactIndex
from keras_mrl_serving.results import Neighbors

from .job import ExportError, Job

# How far a SavedModel may be from the Keras model and still count as equal.

TOLERANCE = 1e-5  # of a row's largest magnitude


# Rows of files that are mapped into memory, and are read once.


def forget(array: npt.NDArray[Any]) -> None:
    """Give back the memory of what was read of a file that `array` maps for reading.

    The values stay: whoever asks for them again reads the file again. An array that maps no file,
    or one it may write to, is left as it is.

    Args:
        array: Any array, of any shape.
    """
    if not isinstance(array, np.memmap) or array.mode != "r" or not hasattr(mmap, "MADV_DONTNEED"):
        return
    holder: Any = array
    while holder is not None and not isinstance(holder, mmap.mmap):
        holder = getattr(holder, "base", None)
    if holder is not None:
        holder.madvise(mmap.MADV_DONTNEED)


# How far an answer is from what it must be, and what is said of one that is too far.

Array = npt.NDArray[Any]


def equal_rows(
    signature: str, served: Array, expected: Array, largest: Array | None = None
) -> float:
    """Return the largest difference, as a share of each row's largest magnitude or of `largest`.

    Raises:
        ExportError: If one is above the tolerance, or the shapes differ.
    """
    if served.shape != expected.shape:
        raise differs(signature, f"shape {served.shape} for {expected.shape}")
    if largest is None:
        largest = np.abs(expected).max(axis=-1, keepdims=True)
    difference = np.abs(served - expected)
    if not (difference <= TOLERANCE * largest).all():
        worst = difference.max()
        raise differs(signature, f"by {worst:.3g} on rows of magnitude {largest.max():.3g}")
    return float((difference / np.maximum(largest, np.finfo(np.float32).tiny)).max())


def differs(signature: str, how: str) -> ExportError:
    """Return what is raised of a signature that is not the model's."""
    return ExportError(
        "Every signature must equal the Keras model on the sample. "
        f"Received: {signature} differs: {how}. Nothing was published. "
        "Look for layers that act differently on each backend or at random when training=False."
    )


# Real rows for every signature, made of the caller's sample: to compare, and to warm up with.

Arrays = Mapping[str, npt.NDArray[Any]]


def sample_as_served(manifest: Manifest, job: Job) -> Arrays:
    """Return the caller's sample in the dtypes of the signatures' inputs."""
    dtypes = {name: spec["dtype"] for name, spec in manifest.inputs.items()}
    return {
        name: np.asarray(job.sample[name], dtype=object if dtype == "string" else dtype)
        for name, dtype in dtypes.items()
    }


def examples(manifest: Manifest, job: Job) -> dict[str, Arrays]:
    """Return inputs for every signature that is written, `describe` and the default included."""
    sample = sample_as_served(manifest, job)
    prefixes = {contract.SEARCH: manifest.width}
    for dim in {*manifest.dims, *(job.index.schedule.dims if job.index else ())}:
        prefixes |= {contract.head(dim): dim, contract.search(dim): dim}
    found: dict[str, Arrays] = {}
    for name in (*job.signatures, contract.SERVING_DEFAULT):
        if name in prefixes:
            rows = np.ascontiguousarray(job.features[:, : prefixes[name]])
            is_head = name == contract.head(prefixes[name])
            found[name] = {"features" if is_head else "embedding": rows}
        else:
            found[name] = sample
    found[contract.DESCRIBE] = {"key": np.array([b""], dtype=object)}
    return found


# Are the neighbours that a graph finds those of its gallery? Every search, on a few queries.

QUERIES = 16  # asked; a graph holds a score for each of them and each row of the gallery
_ROWS_AT_ONCE = 4096  # held in float64

Ask = Callable[[str, Mapping[str, Array]], dict[str, Array]]


def check_searches(
    ask: Ask, index: ExactIndex, queries: Array, names: Collection[str]
) -> dict[str, float]:
    """Compare `search` with the funnel of `index`, and `search_<m>` with all its rows at m.

    Args:
        ask: Runs a signature.
        index: The gallery.
        queries: `(rows, width)`, of which the first few are asked.
        names: The signatures there are; those that are no search are left alone.

    Returns:
        By signature, the largest difference of the scores, as `same_neighbors` returns it.

    Raises:
        ExportError: If one finds others.
    """
    queries = queries[:QUERIES]
    shares = {}
    if contract.SEARCH in names:
        found = ask(contract.SEARCH, {"embedding": queries})
        expected = index.search(queries)
        shares[contract.SEARCH] = same_neighbors(
            contract.SEARCH, found, expected, queries, index.metric
        )
    dims = [dim for dim in range(1, index.width + 1) if contract.search(dim) in names]
    for dim, expected in exact_neighbors(index, queries, dims).items():
        prefix = np.ascontiguousarray(queries[:, :dim])
        found = ask(contract.search(dim), {"embedding": prefix})
        shares[contract.search(dim)] = same_neighbors(
            contract.search(dim), found, expected, prefix, index.metric
        )
    return shares


def same_neighbors(
    signature: str, answer: Mapping[str, Array], expected: Neighbors, queries: Array, metric: str
) -> float:
    """Return the largest difference of the scores from those expected, as a share.

    Ids may change places where their scores are as near as the tolerance of the largest. A squared
    distance is a difference of squared lengths: its rounding is that of the query's own length.

    Raises:
        ExportError: If scores or ids differ.
    """
    largest = np.abs(expected.scores).max(axis=1, keepdims=True)
    if metric == "l2":
        largest = np.maximum(largest, np.square(queries).sum(axis=1, keepdims=True))
    share = equal_rows(signature, answer["scores"], expected.scores, largest)
    apart = np.diff(expected.scores, axis=1)
    least = TOLERANCE * largest
    far = np.pad(np.abs(apart) > least, ((0, 0), (1, 1)), constant_values=True)
    alone = far[:, :-1] & far[:, 1:]
    alone[:, -1] = False  # a row that is as near may have been left out
    if (answer["ids"] != expected.ids)[alone].any():
        raise differs(signature, "it finds other neighbours")
    return share


def exact_neighbors(
    index: ExactIndex, queries: Array, dims: Collection[int]
) -> dict[int, Neighbors]:
    """Return the nearest of all rows at each of some dims, counted in float64.

    The gallery is read once, a part of its rows at a time.

    Args:
        index: The gallery, whose metric and `k` count.
        queries: `(rows, width)`.
        dims: None wider than the gallery.
    """
    if not dims:
        return {}
    edges = [0, *sorted({*dims, *(end for end in index.schedule.dims if end < max(dims))})]
    queries = queries.astype(np.float64)
    best = {dim: Neighbors(*_none(len(queries))) for dim in sorted(dims)}
    for first in range(0, len(index), _ROWS_AT_ONCE):
        part = slice(first, first + _ROWS_AT_ONCE)
        ids = np.broadcast_to(index.ids[part], (len(queries), len(index.ids[part])))
        dots, squares = np.zeros(ids.shape), np.zeros(ids.shape[1])
        for start, stop in pairwise(edges):
            rows = columns(index, start, stop)[part].astype(np.float64)
            dots += queries[:, start:stop] @ rows.T
            squares += np.square(rows).sum(axis=1)
            if stop in best:
                lengths = np.square(queries[:, :stop]).sum(axis=1, keepdims=True)
                scores = _scores(index.metric, dots, squares, lengths)
                best[stop] = _better(best[stop], ids, scores, index.schedule.k)
        for block in index.blocks:
            forget(block)
    return best


def columns(index: ExactIndex, start: int, stop: int) -> Array:
    """Return columns of the gallery that lie in one block of it, as a view."""
    ends = index.schedule.dims
    number = next(number for number, end in enumerate(ends) if stop <= end)
    before = (0, *ends)[number]
    block: Array = index.blocks[number]
    return block[:, start - before : stop - before]


def _none(queries: int) -> tuple[Array, Array]:
    return np.empty((queries, 0), np.int64), np.empty((queries, 0))


def _better(best: Neighbors, ids: Array, scores: Array, k: int) -> Neighbors:
    """The `k` best of those so far and of some more rows."""
    if k < scores.shape[1]:
        found = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        ids, scores = (np.take_along_axis(array, found, axis=1) for array in (ids, scores))
    ids, scores = (np.concatenate(pair, 1) for pair in ((best.ids, ids), (best.scores, scores)))
    order = np.lexsort((ids, -scores), axis=1)[:, :k]
    return Neighbors(np.take_along_axis(ids, order, 1), np.take_along_axis(scores, order, 1))


def _scores(metric: str, dots: Array, squares: Array, lengths: Array) -> Array:
    if metric == "l2":
        return np.minimum(2 * dots - squares - lengths, 0)
    if metric == "cosine":
        return dots / np.sqrt(np.maximum(squares, MIN_SQUARE) * np.maximum(lengths, MIN_SQUARE))
    return dots.copy()


PARITY_FILE = "assets.extra/keras_mrl_parity.json"

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
