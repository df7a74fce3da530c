"""What a batch says of its candidates: which of them are one and the same, and how likely each was.

A popular item is the positive of many rows of a batch. Told the ids, a loss does not take the other
copies of a row's positive for negatives (they are accidental hits), and a negative that stands
several times counts once: each of its c copies weighs 1/c. So a batch whose pairs stand twice has
the loss of the batch in which they stand once, whatever the order of the rows.

Told how likely each candidate was to be drawn, a loss counts it as often as it stands, and takes
the log of that chance from its logit: then the softmax over the batch estimates the softmax over
all candidates. Both go by the names of keras-rs (`RemoveAccidentalHits` and
`SamplingProbabilityCorrection`), and mean the same, but nothing is added to the chances: the 1e-6
of keras-rs would make all candidates alike that are rarer than one in a million.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

from .similarity import NEVER, Task

IDS, PROBABILITY = "candidate_ids", "candidate_sampling_probability"


def find_positives(y_true: Any, y_pred: Any, symmetric: bool) -> Task:
    """Return the task of anchors to find their own positives.

    Args:
        y_true: None, candidate ids, or a dict of them and of sampling probabilities.
        y_pred: Embeddings `(batch, sides, width)`.
        symmetric: Whether positives also look for their anchors.

    Raises:
        ValueError: If `y_true` is something else.
    """
    given = _by_name(y_true, y_pred)
    if not given:
        return Task(symmetric=symmetric)
    candidates = _Candidates(given, y_pred, symmetric)
    compared = candidates.compared if IDS in given else None
    return Task(compared=compared, offsets=candidates.offsets, symmetric=symmetric)


@dataclass(frozen=True)
class _Candidates:
    """What is known of a batch, computed when it is needed: a symbolic batch has no rows to count.

    Attributes:
        given: Ids or probabilities, or both, `(known,)`.
        y_pred: Embeddings `(batch, sides, width)`.
        symmetric: Whether positives also look for their anchors.
    """

    given: dict[str, Any]
    y_pred: Any
    symmetric: bool

    def compared(self, numbers: Any) -> Any:
        """Return where a candidate is the anchor's own, or has another id than its own."""
        ids = self._ids()
        return ops.logical_or(self._own(numbers), ops.not_equal(self._of(ids, numbers), ids))

    def offsets(self, numbers: Any) -> tuple[Any, Any]:
        """Return what is added to logits in the softmax of an anchor, and in that of a candidate.

        A negative counts less by its number of copies, or by how likely it was to be drawn.
        """
        rows = ops.shape(self.y_pred)[0]
        if PROBABILITY in self.given:
            excess = ops.log(ops.cast(self.given[PROBABILITY], "float32"))
            own_excess, anchor_excess = excess[:rows], ops.zeros_like(excess[:rows])
        else:
            ids = self._ids()
            excess, anchor_excess = ops.log(_counts(ids)), ops.log(_counts(ids[:rows]))
            own_excess = ops.zeros_like(anchor_excess)
        own = self._own(numbers)
        of_anchors = ops.where(own, 0.0, self._of(own_excess, numbers) - excess)
        if IDS not in self.given or not self.symmetric:
            return of_anchors, None
        negative = -self._of(anchor_excess, numbers)
        return of_anchors, ops.where(own, 0.0, ops.where(self.compared(numbers), negative, NEVER))

    def _count(self) -> Any:
        return ops.shape(self.y_pred)[0] * (self.y_pred.shape[1] - 1)

    def _ids(self) -> Any:
        """Return small ids `(candidates,)`; a candidate without an id gets one of its own."""
        ids = self.given[IDS]
        numbers = ops.cast(ops.searchsorted(ops.sort(ids), ids), "int32")
        others = ops.arange(self._count(), dtype="int32")[ops.shape(ids)[0] :]
        return ops.concatenate([numbers, others])

    def _own(self, numbers: Any) -> Any:
        return ops.equal(ops.expand_dims(numbers, 1), ops.arange(self._count(), dtype="int32"))

    def _of(self, values: Any, numbers: Any) -> Any:
        """Return `(rows, 1)`, the values of some anchors; numbers beyond the last are padding."""
        last = ops.shape(self.y_pred)[0] - 1
        return ops.expand_dims(ops.take(values, ops.minimum(numbers, last)), 1)


def _by_name(y_true: Any, y_pred: Any) -> dict[str, Any]:
    """Return ids and probabilities as arrays `(known,)`: all positives, then all first negatives.

    Raises:
        ValueError: If `y_true` holds anything else.
    """
    given = {} if y_true is None else y_true if isinstance(y_true, dict) else {IDS: y_true}
    if set(given) - {IDS, PROBABILITY}:
        raise ValueError(
            f"What is known of candidates is a dict of {IDS} and {PROBABILITY}, or one of them. "
            f"Received: {', '.join(map(str, given))}. Rename or leave out what differs."
        )
    arrays = {name: ops.convert_to_tensor(values) for name, values in given.items()}
    for name, array in arrays.items():
        _check_shape(name, array, y_pred)
    return {
        name: ops.reshape(ops.transpose(array) if len(array.shape) == 2 else array, (-1,))
        for name, array in arrays.items()
    }


def _check_shape(name: str, array: Any, y_pred: Any) -> None:
    shape, dtype = tuple(array.shape), keras.backend.standardize_dtype(array.dtype)
    rows, candidates = y_pred.shape[0], y_pred.shape[1] - 1
    columns = shape[1] if len(shape) == 2 else 1
    fits = len(shape) in (1, 2) and (rows is None or shape[0] in (None, rows))
    received = f"Received: {dtype} of shape {shape} for embeddings of shape {tuple(y_pred.shape)}. "
    if name == IDS and not (fits and columns in (1, candidates) and "int" in dtype):
        raise ValueError(
            f"{IDS} must be integers, one per positive (batch,) or one per positive and negative "
            f"(batch, {candidates}). {received}"
            "Number the candidates: names, ids = numpy.unique(names, return_inverse=True); where "
            "no positive stands twice, numpy.arange(len(anchors))."
        )
    if name == PROBABILITY and not (fits and columns == candidates):
        raise ValueError(
            f"{PROBABILITY} must be one positive number per positive and negative, "
            f"(batch, {candidates}). {received}"
            "Give the share of each candidate among those that are drawn, or its count."
        )


def _counts(ids: Any) -> Any:
    """Return how often each of `ids` stands among them, as float32."""
    ordered = ops.sort(ids)
    last, first = (ops.searchsorted(ordered, ids, side=side) for side in ("right", "left"))
    return ops.cast(last - first, "float32")


def check_ids(name: str, values: Any, kinds: str) -> None:
    """Raise for in-memory ids that become others in int32 or float32, which backends hold.

    Args:
        name: The ids, as the start of a sentence.
        values: Ids, or None of a data set.
        kinds: NumPy's codes of the kinds of dtypes that may be.
    """
    if values is None:
        return
    ids = ops.convert_to_numpy(values)
    limit = 2**24 if ids.dtype.kind == "f" else 2**31 - 1
    if ids.dtype.kind not in kinds or (ids.size and (ids.min() < -limit or ids.max() > limit)):
        received = str(ids.dtype)
        if ids.size and ids.dtype.kind in "biuf":
            received += f" from {ids.min()} to {ids.max()}"
        raise ValueError(
            f"{name} must be integers that every backend can tell apart. "
            f"Received: {received}. "
            "Number them anew: names, ids = numpy.unique(names, return_inverse=True)."
        )


def check_candidates(known: Any) -> None:
    """Raise for in-memory ids that leave no negative, and for what is no sampling probability."""
    by_name = known if isinstance(known, dict) else {IDS: known}
    check_ids(IDS, by_name.get(IDS), kinds="iu")
    ids = ops.convert_to_numpy(by_name.get(IDS, ()))
    if ids.size > 1 and (ids == ids.flat[0]).all():
        raise ValueError(
            f"{IDS} must name at least two candidates: copies of a positive are no negatives. "
            f"Received: {ids.flat[0]} in all {len(ids)} rows. Give the ids of the positives, or "
            "numpy.arange(len(anchors)) where no positive stands twice."
        )
    chances = ops.convert_to_numpy(by_name.get(PROBABILITY, ()))
    if not (np.isfinite(chances) & (chances > 0)).all():
        raise ValueError(
            f"{PROBABILITY} must be positive numbers. "
            f"Received: {chances.dtype} from {chances.min()} to {chances.max()}. "
            "Give the share of each candidate among those that are drawn, or its count."
        )
