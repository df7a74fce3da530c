"""The stages of a cascade: an exit and a dim each, and the logits that belong to them.

A model without exits has one stage per dim; its logits are an array. A model with exits has a stage
per exit and dim, and its logits are a mapping: by exit, as the model predicts them, or by stage,
which is what a policy looks its own up in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt

from ..contract import LAST_EXIT as LAST_EXIT
from ..inputs import as_array, as_float32, check_holdout, check_logits
from ..integers import check_dims, is_positive_integer

StageKey = tuple[str | None, int]  # an exit, None for the last, and a dim
Scores = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
Logits = npt.ArrayLike | Mapping[Any, npt.ArrayLike]


@dataclass(frozen=True)
class Stage:
    """One step of a cascade.

    Args:
        dim: Dim whose logits decide.
        threshold: A row stops here when its confidence is strictly above it. None accepts every
            row; only the last stage has it.
        temperature: Divides the logits before the softmax.
        exit: Name of the exit of the backbone that is asked; None for the last, which is also
            called "last".

    Examples:
        >>> Stage(dim=8, threshold=0.9)
        Stage(dim=8, threshold=0.9, temperature=1.0, exit=None)
        >>> Stage(dim=8, threshold=0.9, exit="conv4_block6_out").key
        ('conv4_block6_out', 8)
    """

    dim: int
    threshold: float | None
    temperature: float = 1.0
    exit: str | None = None

    def __post_init__(self) -> None:
        """Give the last exit its one name."""
        object.__setattr__(self, "exit", _exit_of(self.exit))

    @property
    def key(self) -> StageKey:
        """The exit and the dim."""
        return self.exit, self.dim


def _exit_of(name: Any) -> Any:
    return None if isinstance(name, str) and name == LAST_EXIT else name


_ORDER = (
    "Stages go from shallow exits to deep ones, the last exit at the end, and the dims of an exit "
    "increase. "
)


def check_stages(keys: Iterable[tuple[Any, Any]]) -> tuple[StageKey, ...]:
    """Return the exits and dims of stages, with dims as Python's own integers.

    That named exits go from shallow to deep cannot be seen from their names: it is the caller's
    order.

    Raises:
        ValueError: If there are no stages, an exit has no name, a dim is no positive integer, or
            they are in no order of a cascade.

    Examples:
        >>> check_stages([("early", 8), ("early", 64), (None, 64)])
        (('early', 8), ('early', 64), (None, 64))
    """
    keys = tuple((_exit_of(exit_), dim) for exit_, dim in keys)
    if all(exit_ is None for exit_, _ in keys):
        return tuple((None, dim) for dim in check_dims(dim for _, dim in keys))
    parts = [(exit_, [dim for _, dim in part]) for exit_, part in groupby(keys, itemgetter(0))]
    names = [exit_ for exit_, _ in parts]
    are_names = all(name is None or (isinstance(name, str) and name) for name in names)
    are_dims = all(is_positive_integer(dim) for _, dim in keys)
    if (
        not are_names
        or not are_dims
        or len(set(names)) < len(names)
        or None in names[:-1]
        or any(dims != sorted(set(dims)) for _, dims in parts)
    ):
        raise ValueError(
            f"{_ORDER}Received: {keys}. Give pairs of an exit and a dim in this order, "
            "None or 'last' for the last exit."
        )
    return tuple((exit_, int(dim)) for exit_, dim in keys)


def has_exits(keys: Iterable[StageKey]) -> bool:
    """Whether one of the stages stands at an exit before the last.

    Examples:
        >>> has_exits([(None, 8), (None, 64)]), has_exits([("early", 8), (None, 8)])
        (False, True)
    """
    return any(exit_ is not None for exit_, _ in keys)


def stage_logits(
    logits: Mapping[Any, npt.ArrayLike], dims: Sequence[int]
) -> dict[StageKey, Scores]:
    """Return the logits of all exits by stage: what policies with exits route and are judged on.

    A dict of these may lose stages that no cascade is to ask, and gain such as a model outside
    the backbone decides: any `(rows, classes)` under an exit's name of its own and a dim.

    Args:
        logits: What `all_exits().predict` returns: exits, shallow to deep, to their logits.
        dims: The dims of the heads.

    Shapes:
        logits: `(rows, num_dims, num_classes)` each. Returns `(rows, num_classes)` per stage.

    Raises:
        ValueError: If shapes do not fit, or a logit is not finite.

    Examples:
        >>> logits = {"early": np.zeros((5, 2, 3)), "last": np.ones((5, 2, 3))}
        >>> {stage: array.shape for stage, array in stage_logits(logits, (8, 64)).items()}
        {('early', 8): (5, 3), ('early', 64): (5, 3), (None, 8): (5, 3), (None, 64): (5, 3)}
    """
    dims = check_dims(dims)
    if not isinstance(logits, Mapping) or any(isinstance(name, tuple) for name in logits):
        received = "stages" if isinstance(logits, Mapping) else type(logits).__name__
        raise ValueError(
            "The logits of exits are a mapping from names of exits to (rows, num_dims, "
            f"num_classes). Received: {received}. Give what all_exits().predict returns; where "
            "logits are by stage already, leave dims out."
        )
    arrays = {name: as_float32(f"logits of exit {name!r}", own) for name, own in logits.items()}
    for name, array in arrays.items():
        if array.ndim != 3 or array.shape[1] != len(dims):
            raise ValueError(
                "The logits of an exit must be (rows, num_dims, num_classes). "
                f"Received: logits of shape {array.shape} at exit {name!r} for {len(dims)} dims. "
                "Give what all_exits().predict returns, and the dims of its heads."
            )
    keys = check_stages((name, dim) for name in arrays for dim in dims)
    columns = [array[:, i] for array in arrays.values() for i in range(len(dims))]
    return _of_one_shape(dict(zip(keys, columns, strict=True)))


def _of_one_shape(by_stage: dict[StageKey, Scores]) -> dict[StageKey, Scores]:
    """Return the logits of stages, `(rows, classes)` each and of equal shapes."""
    shapes = {stage: array.shape for stage, array in by_stage.items()}
    if len(set(shapes.values())) != 1 or len(next(iter(shapes.values()))) != 2:
        raise ValueError(
            "The logits of a stage must be (rows, num_classes), of the same rows and classes at "
            f"all stages. Received: {shapes}. Predict all stages on the same rows, in their order."
        )
    return by_stage


def _checked_mapping(logits: Mapping[Any, npt.ArrayLike]) -> dict[StageKey, Scores]:
    """Return logits by stage, from a mapping that is so already."""
    if not all(isinstance(stage, tuple) and len(stage) == 2 for stage in logits):
        raise ValueError(
            "Logits by stage are a mapping from (exit, dim) to (rows, num_classes). "
            f"Received: a mapping from {tuple(logits)}. "
            "Give stage_logits(logits, dims) of what all_exits().predict returns."
        )
    keys = check_stages(logits)
    arrays = [as_float32(f"logits of stage {key!r}", logits[key]) for key in logits]
    return _of_one_shape(dict(zip(keys, arrays, strict=True)))


def logits_of(logits: Logits, keys: Sequence[StageKey]) -> Scores:
    """Return the logits of some stages, `(rows, stages, classes)`, all finite.

    Args:
        logits: By stage, of these stages and maybe others; or an array of these alone.
        keys: The stages.

    Raises:
        ValueError: If their shape is another, they are not finite, or a stage has none.

    Examples:
        >>> logits = {("early", 8): np.zeros((5, 3)), (None, 8): np.ones((5, 3))}
        >>> logits_of(logits, [(None, 8)]).shape
        (5, 1, 3)
    """
    if not isinstance(logits, Mapping):
        return check_logits(logits, len(keys))
    by_stage = _checked_mapping(logits)
    missing = [key for key in keys if key not in by_stage]
    if missing:
        raise ValueError(
            "logits must hold every stage of the policy. "
            f"Received: logits of {tuple(by_stage)}, without {missing[0]}. "
            "Predict that exit and dim, too."
        )
    return check_logits(np.stack([by_stage[key] for key in keys], axis=1), len(keys))


def labelled_stages(
    logits: Logits, labels: npt.ArrayLike, dims: Sequence[int] | None
) -> tuple[Scores, Labels, tuple[StageKey, ...]]:
    """Return logits `(rows, stages, classes)`, class ids and the stages of a holdout.

    Args:
        logits: An array or a mapping by exit, both with dims; or a mapping by stage, without.
        labels: Class ids.
        dims: The dims of the head.

    Raises:
        ValueError: If shapes do not fit, there are no rows, or values cannot be logits or class
            ids.

    Examples:
        >>> logits = {"early": [[[0, 1]], [[2, 0]]], "last": [[[0, 1]], [[3, 0]]]}
        >>> scores, truth, keys = labelled_stages(logits, [1, 0], dims=(8,))
        >>> scores.shape, keys
        ((2, 2, 2), (('early', 8), (None, 8)))
    """
    if isinstance(logits, Mapping):
        by_stage = _checked_mapping(logits) if dims is None else stage_logits(logits, dims)
        truth = as_array("labels", labels)
        for key, array in by_stage.items():  # each by itself: a stage may stand outside the model
            _check_no_probabilities(key, array)
        scores, truth = check_holdout(
            np.stack(list(by_stage.values()), axis=1), truth, len(by_stage)
        )
        return scores, truth, tuple(by_stage)
    if dims is None:
        raise ValueError(
            "An array of logits needs dims. Received: none. Give the dims of the head, or logits "
            "by stage: {(exit, dim): logits}."
        )
    keys = check_stages((None, dim) for dim in check_dims(dims))
    scores, truth = check_holdout(logits, labels, len(keys))
    return scores, truth, keys


def labelled_rows(
    logits: Logits, labels: npt.ArrayLike, keys: Sequence[StageKey]
) -> tuple[Scores, Labels]:
    """Return logits `(rows, stages, classes)` of some stages, and class ids.

    Args:
        logits: By stage, of these stages and maybe others; or an array of these alone.
        labels: Class ids.
        keys: The stages.

    Raises:
        ValueError: As `logits_of` and `labelled_stages`.

    Examples:
        >>> scores, truth = labelled_rows({(None, 8): [[0, 1]], (None, 64): [[2, 3]]}, [1],
        ...     [(None, 64)])
        >>> scores.tolist(), truth.tolist()
        ([[[2.0, 3.0]]], [1])
    """
    if isinstance(logits, Mapping):
        own = {key: logits_of(logits, [key])[:, 0] for key in keys}
        return labelled_stages(own, labels, None)[:2]
    return check_holdout(logits, labels, len(keys))


def _check_no_probabilities(key: StageKey, scores: Scores) -> None:
    if len(scores) and scores.min() >= 0 and np.allclose(scores.sum(axis=-1), 1, atol=1e-3):
        raise ValueError(
            f"logits must be logits, not probabilities. Received: rows that sum to 1 at {key}. "
            "Leave the softmax out, or give np.log(probabilities)."
        )
