"""Does the SavedModel equal the Keras model? Every signature, on real rows, before it is published.

Equal is defined here alone. Embeddings, features and logits may differ by `TOLERANCE`, a share of
their row's largest magnitude. Values, and logits of a sigmoid, may differ by that share of the
terms they are the sum of: a row may have one output alone, and that near 0. A probability may
differ by as much as such a difference of the logits can make of it, which for large logits is more
than that share of the probability itself: an absolute 1e-5 would refuse sound models whose logits
reach 50. Class ids, ids and dims may differ only where two scores, or a confidence and its
threshold, lie that near each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_mrl_serving import contract
from keras_mrl_serving._session import SavedModelSession
from keras_mrl_serving.cascade.confidence import confidence_of, softmax
from keras_mrl_serving.cascade.policy import CascadePolicy
from keras_mrl_serving.cascade.stages import LAST_EXIT, StageKey
from keras_mrl_serving.contract import Manifest
from keras_mrl_serving.embeddings import MIN_SQUARE, truncate
from keras_mrl_serving.index import ExactIndex
from keras_mrl_serving.results import Neighbors

from .gallery import columns, forget
from .job import ExportError, Job, TowerJob

Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]
Run = Callable[[str, Arrays], Arrays]  # a signature and its inputs to its outputs

TOLERANCE = 1e-5  # of a row's largest magnitude
MAX_QUERIES = 16  # of a gallery: a graph holds a score for each of them and each row


def check_parity(session: SavedModelSession, manifest: Manifest, job: Job) -> dict[str, Any]:
    """Run every signature of a loaded SavedModel and compare it with the Keras model.

    Returns:
        How near it is: the number of rows, the tolerance, and by signature the largest difference,
        as a share of a row's largest value, or for probabilities of its largest logit. A gallery is
        asked about no more than the first `MAX_QUERIES` rows.

    Raises:
        ExportError: If a signature is missing, or differs by more than the tolerance.
    """
    inputs = example_inputs(manifest, job)
    shares: dict[str, float] = {}

    checked_run = checking_identity(session.run, manifest.model_id)

    def run(signature: str, arrays: Arrays | None = None) -> Arrays:
        if signature not in session.signatures:
            raise differs(signature, "it is missing")
        return checked_run(signature, inputs[signature] if arrays is None else arrays)

    if (name := contract.FEATURES) in job.signatures:
        shares[name] = compare_rows(name, run(name)["features"], job.features)
    for column, dim in enumerate(manifest.dims):
        if (name := contract.embed(dim)) in job.signatures:
            expected = _embedding(job.features, dim, manifest.normalize)
            shares[name] = compare_rows(name, run(name)["embedding"], expected)
        if (name := contract.embed_other(dim)) in job.signatures and job.other_tower is not None:
            expected = _embedding(job.other_tower.features, dim, manifest.normalize)
            shares[name] = compare_rows(name, run(name)["embedding"], expected)
        for name in (contract.classify(dim), contract.regress(dim), contract.head(dim)):
            if name in job.signatures:
                shares[name] = _compare_head(name, run(name), column, job)
    shares |= _compare_exits(run, manifest, job)
    if (name := contract.CLASSIFY_ADAPTIVE) in job.signatures and job.policy is not None:
        shares[name] = _compare_cascade(run(name), _logits_by_stage(job), job)
        if job.deep_row is not None:
            answer = run(name, _as_served(manifest, job, job.deep_row.sample))
            deep = _compare_cascade(answer, job.deep_row.logits, job)
            shares[name] = max(shares[name], deep)
    answer, name = run(contract.SERVING_DEFAULT), contract.SERVING_DEFAULT
    if job.logits is not None:
        shares[name] = _compare_head(name, answer, len(job.dims) - 1, job)
    else:
        expected = _embedding(job.features, job.dims[-1], job.normalize)
        shares[name] = compare_rows(name, answer["embedding"], expected)
    if job.index is not None:
        queries = np.ascontiguousarray(job.features[:MAX_QUERIES, : manifest.width])
        shares |= compare_searches(run, job.index, queries, job.signatures)
        if (name := contract.RETRIEVE) in job.signatures:
            rows = {key: array[:MAX_QUERIES] for key, array in inputs[name].items()}
            neighbors, metric = job.index.search(queries), job.index.metric
            shares[name] = compare_neighbors(name, run(name, rows), neighbors, queries, metric)
    check_described(run, manifest)
    return {"rows": len(job.features), "tolerance": TOLERANCE, "largest_difference": shares}


def example_inputs(manifest: Manifest, job: Job) -> dict[str, Arrays]:
    """Return real rows for every written signature: to compare it, and to warm it up."""
    sample = _as_served(manifest, job)
    widths = {contract.SEARCH: manifest.width}
    for dim in {*manifest.dims, *(job.index.schedule.dims if job.index else ())}:
        widths |= {contract.head(dim): dim, contract.search(dim): dim}
    inputs: dict[str, Arrays] = dict.fromkeys((*job.signatures, contract.SERVING_DEFAULT), sample)
    if job.other_tower is not None:
        others = _as_served(manifest.tower(other_tower=True), job.other_tower)
        names = {*map(contract.embed_other, manifest.dims)}
        inputs |= dict.fromkeys(names & inputs.keys(), others)
    for name in inputs.keys() & widths:
        rows = np.ascontiguousarray(job.features[:, : widths[name]])
        is_head = name == contract.head(widths[name])
        inputs[name] = {"features" if is_head else "embedding": rows}
    return {**inputs, contract.DESCRIBE: {"key": np.array([b""], dtype=object)}}


def with_deep_row(manifest: Manifest, job: Job) -> Arrays:
    """Return the rows that warm `classify_adaptive` up: first one that goes through all exits."""
    rows = _as_served(manifest, job)
    if job.deep_row is None:
        return rows
    first = _as_served(manifest, job, job.deep_row.sample)
    return {name: np.concatenate([first[name], array]) for name, array in rows.items()}


def _as_served(manifest: Manifest, job: Job | TowerJob, rows: Arrays | None = None) -> Arrays:
    """Return rows of a tower in the dtypes that its inputs have in the manifest."""
    rows = job.sample if rows is None else rows
    dtypes = {name: spec["dtype"] for name, spec in manifest.inputs.items()}
    return {
        name: np.asarray(rows[name], dtype=object if dtype == "string" else dtype)
        for name, dtype in dtypes.items()
    }


def differs(signature: str, how: str) -> ExportError:
    """Return the error for a signature that is not the model's."""
    return ExportError(
        "Every signature must equal the Keras model on the sample. "
        f"Received: {signature} differs: {how}. Nothing was published. "
        "Look for layers that act differently on each backend or at random when training=False."
    )


def compare_rows(
    signature: str, served: Array, expected: Array, largest: Array | None = None
) -> float:
    """Return the largest difference, as a share of each row's largest magnitude or of `largest`.

    Raises:
        ExportError: If a difference is above the tolerance, or the shapes differ.
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


def _embedding(features: Array, dim: int, normalize: bool) -> Array:
    return truncate(features, dim) if normalize else features[:, :dim]


_WITHOUT_ID = (contract.DESCRIBE, contract.SERVING_DEFAULT)


def checking_identity(run: Run, model_id: int | None) -> Run:
    """Return a function that runs a signature, and raises unless each row carries the model's id.

    Args:
        run: Runs a signature.
        model_id: The id in the manifest; None if no signature may answer one.
    """

    def checked(signature: str, inputs: Arrays) -> Arrays:
        answer = run(signature, inputs)
        rows = len(next(iter(inputs.values())))
        expected = None if model_id is None or signature in _WITHOUT_ID else [model_id] * rows
        served = answer.get(contract.MODEL_ID)
        if (None if served is None else served.tolist()) != expected:
            raise differs(signature, "its rows do not carry the manifest's model_id")
        return answer

    return checked


def check_described(run: Run, manifest: Manifest) -> None:
    """Raise `ExportError` unless `describe` answers with the manifest."""
    described = run(contract.DESCRIBE, {"key": np.array([b"", b""], dtype=object)})
    if described["manifest"].tolist() != [manifest.to_json().encode()] * 2:
        raise differs(contract.DESCRIBE, "it is not the manifest")


def _compare_head(signature: str, answer: Arrays, column: int, job: Job) -> float:
    """Compare all that a head at one of the dims answers; return the largest difference."""
    return _compare_answer(signature, answer, column, job, job.logits, job.terms, None)


def _compare_exits(run: Callable[[str], Arrays], manifest: Manifest, job: Job) -> dict[str, float]:
    """Compare the signatures of exits before the last; return the largest difference of each."""
    shares = {}
    by_name = {own.name: own for own in job.exits}
    for name, (exit, dim) in job.exit_signatures.items():
        own, column = by_name[exit], manifest.dims.index(dim)
        if name == contract.embed(dim, exit):
            expected = _embedding(own.features, dim, manifest.normalize)
            shares[name] = compare_rows(name, run(name)["embedding"], expected)
        else:
            shares[name] = _compare_answer(
                name, run(name), column, job, own.logits, own.terms, exit
            )
    return shares


def _compare_answer(
    signature: str,
    answer: Arrays,
    column: int,
    job: Job,
    all_logits: Any,
    terms: Any,
    exit: str | None,
) -> float:
    logits, shares = all_logits[:, column], []
    largest = None if terms is None else terms[:, column]
    for name in {"logits", "values"} & {*answer}:
        shares.append(compare_rows(signature, answer[name], logits, largest))
    if "class_ids" in answer:
        temperature = job.temperature(job.dims[column], exit)
        shares.append(_compare_classes(signature, answer, logits, temperature, job))
    if not shares:
        raise differs(signature, f"it answers {', '.join(sorted(answer))}")
    return max(shares)


def _sigmoid(logits: Array) -> Array:
    return np.exp(-np.logaddexp(0, -logits.astype(np.float64))).astype(np.float32)


def _compare_classes(
    signature: str, answer: Arrays, logits: Array, temperature: float, job: Job
) -> float:
    shares = _sigmoid(logits) if job.activation == "sigmoid" else softmax(logits, temperature)
    # A logit off by the tolerance of the row's largest moves a probability by at most that much.
    scale = np.maximum(np.abs(logits).max(axis=-1, keepdims=True) / temperature, 1.0)
    allowed = TOLERANCE * scale
    ids, served = answer["class_ids"], answer["probabilities"]
    best = -np.sort(-shares, axis=-1)[:, : served.shape[1]]
    of_served_ids = np.take_along_axis(shares, ids, axis=-1)
    for expected in (best, of_served_ids):
        if not (np.abs(served - expected) <= allowed).all():
            worst = np.abs(served - expected).max()
            raise differs(signature, f"by {worst:.3g} in its probabilities")
    if job.confidence == "max_probability":
        confidence, off = served[:, 0], 0.0
    else:
        confidence = confidence_of(job.confidence, logits, temperature)
        off = _confidence_factor(job, logits.shape[-1]) * allowed[:, 0]
    if not (np.abs(answer["confidence"] - confidence) <= off).all():
        raise differs(signature, f"its confidence is not its {job.confidence}")
    if job.labels is not None:
        names = np.asarray([label.encode() for label in job.labels], dtype=object)[ids]
        if not np.array_equal(answer["labels"], names):
            raise differs(signature, "its labels do not name its class ids")
    return float((np.abs(served - best) / scale).max(initial=0.0))


def _confidence_factor(job: Job, num_classes: int) -> float:
    """How many times more than a probability a confidence may be off by.

    The others are a difference of two probabilities, and a sum over all classes.
    """
    return 1.0 if job.confidence == "max_probability" else 2 * (1 + math.log(num_classes))


def _logits_by_stage(job: Job) -> dict[StageKey, Array]:
    """Return the logits that the trained model gives the sample at each stage of the policy."""
    policy: Any = job.policy
    by_exit: dict[str | None, Any] = {own.name: own.logits for own in job.exits}
    by_exit[None] = job.logits
    return {(exit, dim): by_exit[exit][:, job.dims.index(dim)] for exit, dim in policy.keys}


def _compare_cascade(answer: Arrays, by_stage: Mapping[StageKey, Array], job: Job) -> float:
    """Compare an adaptive answer with what the policy does with the logits of the trained model."""
    policy: Any = job.policy
    _, expected_stages = policy.route(by_stage)
    served = _served_stages(answer, policy, [own.name for own in job.exits])
    for row in np.flatnonzero(served != expected_stages):
        first = min(int(served[row]), int(expected_stages[row]))  # the stage that decided otherwise
        stage, scores = policy.stages[first], by_stage[policy.keys[first]][row]
        confidence = float(confidence_of(policy.confidence, scores, stage.temperature))
        allowed = TOLERANCE * max(1.0, float(np.abs(scores).max()) / stage.temperature)
        allowed *= _confidence_factor(job, len(scores))
        if abs(confidence - (stage.threshold or 0.0)) > allowed:
            ends = [policy.keys[stages[row]] for stages in (served, expected_stages)]
            got, expected = (f"{dim} of {exit}" if exit else f"{dim}" for exit, dim in ends)
            raise differs(
                contract.CLASSIFY_ADAPTIVE, f"row {row} stops at dim {got} for {expected}"
            )
    worst = 0.0
    for index, stage in enumerate(policy.stages):
        rows = served == index
        outputs = {output: values[rows] for output, values in answer.items()}
        share = _compare_classes(
            contract.CLASSIFY_ADAPTIVE, outputs, by_stage[stage.key][rows], stage.temperature, job
        )
        worst = max(worst, share)
    return worst


def _served_stages(answer: Arrays, policy: CascadePolicy, exits: list[str]) -> Array:
    """Return the stage that decided each row, from the dim, and the exit where there are some."""
    dims = answer["dim"].tolist()
    places = answer["exit"].tolist() if policy.has_exits else [None] * len(dims)
    stages = {
        (exits.index(exit or LAST_EXIT) if policy.has_exits else None, dim): index
        for index, (exit, dim) in enumerate(policy.keys)
    }
    unknown = [end for end in zip(places, dims, strict=True) if end not in stages]
    if unknown:
        raise differs(contract.CLASSIFY_ADAPTIVE, f"a row stops at {unknown[0]}")
    return np.array([stages[end] for end in zip(places, dims, strict=True)], np.int64)


def compare_searches(
    run: Run, index: ExactIndex, queries: Array, names: Collection[str]
) -> dict[str, float]:
    """Compare `search` with the funnel of `index`, and `search_<m>` with all its rows at m.

    Args:
        run: Runs a signature.
        index: The gallery.
        queries: `(rows, width)`, of which the first `MAX_QUERIES` are asked.
        names: The signatures that are written; those that are no search are passed over.

    Returns:
        By signature, the largest difference of the scores, as `compare_neighbors` returns it.

    Raises:
        ExportError: If a search finds other neighbours.
    """
    queries = queries[:MAX_QUERIES]
    expected: dict[str, tuple[Array, Neighbors]] = {}
    if contract.SEARCH in names:
        expected[contract.SEARCH] = queries, index.search(queries)
    dims = [dim for dim in range(1, index.width + 1) if contract.search(dim) in names]
    for dim, neighbors in exact_neighbors(index, queries, dims).items():
        expected[contract.search(dim)] = np.ascontiguousarray(queries[:, :dim]), neighbors
    return {
        name: compare_neighbors(name, run(name, {"embedding": rows}), neighbors, rows, index.metric)
        for name, (rows, neighbors) in expected.items()
    }


def compare_neighbors(
    signature: str, answer: Arrays, expected: Neighbors, queries: Array, metric: str
) -> float:
    """Return the largest difference of the scores from those expected, as a share.

    Ids may change places where their scores are as near as the tolerance of the largest. A squared
    distance is a difference of squared lengths: its rounding error grows with the query's length.

    Raises:
        ExportError: If scores or ids differ.
    """
    largest = np.abs(expected.scores).max(axis=1, keepdims=True)
    if metric == "l2":
        largest = np.maximum(largest, np.square(queries).sum(axis=1, keepdims=True))
    share = compare_rows(signature, answer["scores"], expected.scores, largest)
    gaps = np.abs(np.diff(expected.scores, axis=1)) > TOLERANCE * largest
    gaps = np.pad(gaps, ((0, 0), (1, 1)), constant_values=True)
    is_alone = gaps[:, :-1] & gaps[:, 1:]
    is_alone[:, -1] = False  # a row as near as the last one may have been left out
    if (answer["ids"] != expected.ids)[is_alone].any():
        raise differs(signature, "it finds other neighbours")
    return share


def exact_neighbors(
    index: ExactIndex, queries: Array, dims: Collection[int], rows_at_once: int = 4096
) -> dict[int, Neighbors]:
    """Return the nearest of all rows at each of some dims, computed in float64.

    The gallery is read once, a part of its rows at a time.

    Args:
        index: The gallery, with the metric and `k`.
        queries: `(rows, width)`.
        dims: Dims to search at, none wider than the gallery.
        rows_at_once: How many rows of the gallery are held in float64.
    """
    if not dims:
        return {}
    edges = [0, *sorted({*dims, *(end for end in index.schedule.dims if end < max(dims))})]
    queries = queries.astype(np.float64)
    no_scores: Array = np.empty((len(queries), 0))
    best = dict.fromkeys(sorted(dims), Neighbors(no_scores.astype(np.int64), no_scores))
    for first in range(0, len(index), rows_at_once):
        part = slice(first, first + rows_at_once)
        ids = np.broadcast_to(index.ids[part], (len(queries), len(index.ids[part])))
        dots, squares = np.zeros(ids.shape), np.zeros(ids.shape[1])
        for start, stop in pairwise(edges):
            rows = columns(index, start, stop)[part].astype(np.float64)
            dots += queries[:, start:stop] @ rows.T
            squares += np.square(rows).sum(axis=1)
            if stop in best:
                query_squares = np.square(queries[:, :stop]).sum(axis=1, keepdims=True)
                scores = _scores(index.metric, dots, squares, query_squares)
                best[stop] = _merge(best[stop], ids, scores, index.schedule.k)
        for block in index.blocks:
            forget(block)
    return best


def _scores(metric: str, dots: Array, squares: Array, query_squares: Array) -> Array:
    if metric == "l2":
        return np.minimum(2 * dots - squares - query_squares, 0)
    if metric == "cosine":
        lengths = np.maximum(squares, MIN_SQUARE) * np.maximum(query_squares, MIN_SQUARE)
        return dots / np.sqrt(lengths)
    return dots.copy()


def _merge(best: Neighbors, ids: Array, scores: Array, k: int) -> Neighbors:
    """Return the `k` best of the best so far and of some more rows."""
    if k < scores.shape[1]:
        candidates = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        ids, scores = (np.take_along_axis(array, candidates, axis=1) for array in (ids, scores))
    ids, scores = (np.concatenate(pair, 1) for pair in ((best.ids, ids), (best.scores, scores)))
    order = np.lexsort((ids, -scores), axis=1)[:, :k]
    return Neighbors(np.take_along_axis(ids, order, 1), np.take_along_axis(scores, order, 1))
