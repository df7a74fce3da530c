"""The answers of a client: small frozen dataclasses of arrays, one row per row of the inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import compress
from types import MappingProxyType
from typing import Any, NamedTuple, SupportsIndex, TypeVar, overload

import numpy as np
import numpy.typing as npt

NOT_AUDITED = -1

T = TypeVar("T")


def check_threshold(threshold: float) -> float:
    """Return a threshold of probabilities; raise `ValueError` unless it is in [0, 1].

    Examples:
        >>> check_threshold(0.5)
        0.5
    """
    if not 0 <= threshold <= 1:
        raise ValueError(
            "threshold must be a probability in [0, 1]. "
            f"Received: threshold={threshold!r}. Give for example 0.5."
        )
    return threshold


@dataclass(frozen=True)
class ClassifiedRow:
    """The best classes of one row, best first, and the dim that decided it.

    Args:
        class_ids: One int per class.
        probabilities: One float per class.
        confidence: Confidence by the policy's measure, higher is surer.
        dim: The dim that decided.
        labels: One name per class; None for a model without names.
        full_class_id: The class by the last stage; None for a row that was not audited.
        exit: Name of the exit that decided; None of a model without exits.
        relative_cost: As in `Classification`; None where it is not known.

    Examples:
        >>> row = ClassifiedRow((3, 1), (0.8, 0.1), confidence=0.8, dim=16)
        >>> row.class_id
        3
    """

    class_ids: tuple[int, ...]
    probabilities: tuple[float, ...]
    confidence: float
    dim: int
    labels: tuple[str, ...] | None = None
    full_class_id: int | None = None
    exit: str | None = None
    relative_cost: float | None = None

    @property
    def class_id(self) -> int:
        """The best class."""
        return self.class_ids[0]

    @property
    def label(self) -> str | None:
        """The name of the best class; None for a model without names."""
        return None if self.labels is None else self.labels[0]

    def above(self, threshold: float = 0.5) -> tuple[str, ...] | tuple[int, ...]:
        """Return the classes whose probability is above a threshold: see `Classification.above`."""
        check_threshold(threshold)
        above = [probability > threshold for probability in self.probabilities]
        if self.labels is None:
            return tuple(compress(self.class_ids, above))
        return tuple(compress(self.labels, above))


@dataclass(frozen=True, eq=False)
class Classification:
    """The best classes of each row, best first, and the dim that decided it.

    Args:
        class_ids: int64 `(batch, k)`.
        probabilities: float32 `(batch, k)`.
        confidence: float32 `(batch,)`, by the policy's measure, higher is surer.
        dim: int32 `(batch,)`.
        labels: Class names, object array of str `(batch, k)`; None for a model without names.
        full_class_ids: int64 `(batch,)`, the class by the last stage of each audited row, -1 of the
            others; None where no row was to be audited.
        exit: Name of the exit that decided, object array of str `(batch,)`; None of a model
            without exits.
        relative_cost: float32 `(batch,)`, what the row cost, all exits asked before included, as a
            share of one that goes straight to the last stage; None where the manifest does not
            say it, as that of a model without exits.

    Examples:
        >>> Classification(class_ids=np.array([[3, 1]]), probabilities=np.float32([[0.8, 0.1]]),
        ...     confidence=np.float32([0.8]), dim=np.int32([16]))
        Classification(1 rows, top 2, by dim {16: 1})

    An integer index gives one row, a `ClassifiedRow`; a slice gives a `Classification`.
    """

    class_ids: npt.NDArray[np.int64]
    probabilities: npt.NDArray[np.float32]
    confidence: npt.NDArray[np.float32]
    dim: npt.NDArray[np.int32]
    labels: npt.NDArray[np.object_] | None = None
    full_class_ids: npt.NDArray[np.int64] | None = None
    exit: npt.NDArray[np.object_] | None = None
    relative_cost: npt.NDArray[np.float32] | None = None

    @property
    def audited(self) -> npt.NDArray[np.int64]:
        """The numbers of the audited rows, increasing.

        Examples:
            >>> answer = Classification(class_ids=np.array([[3], [1], [1]]),
            ...     probabilities=np.ones((3, 1)), confidence=np.ones(3), dim=np.array([8, 8, 64]),
            ...     full_class_ids=np.array([-1, 2, 1]))
            >>> answer.audited.tolist()
            [1, 2]
        """
        if self.full_class_ids is None:
            return np.empty(0, np.int64)
        return np.flatnonzero(self.full_class_ids != NOT_AUDITED)

    def above(self, threshold: float = 0.5) -> list[tuple[str, ...] | tuple[int, ...]]:
        """Return the classes of each row whose probability is above a threshold, best first.

        That is how a model whose rows may have several classes names those of a row: none, one or
        more. They are named by label; by class id where the model has no names.

        Args:
            threshold: In [0, 1].

        Raises:
            ValueError: If `threshold` is not in [0, 1].

        Examples:
            >>> answer = Classification(class_ids=np.array([[3, 1], [1, 3]]),
            ...     probabilities=np.float32([[0.9, 0.8], [0.2, 0.1]]),
            ...     confidence=np.float32([0.9, 0.2]), dim=np.int32([16, 16]))
            >>> answer.above(0.5)
            [(3, 1), ()]
        """
        check_threshold(threshold)
        return [row.above(threshold) for row in self]

    def __len__(self) -> int:
        return len(self.dim)

    @overload
    def __getitem__(self, rows: SupportsIndex) -> ClassifiedRow: ...
    @overload
    def __getitem__(self, rows: slice) -> Classification: ...
    def __getitem__(self, rows: SupportsIndex | slice) -> ClassifiedRow | Classification:
        columns: Any = {n: None if c is None else c[rows] for n, c in _columns(self)}
        if isinstance(rows, slice):
            return Classification(**columns)
        labels, cost = columns["labels"], columns["relative_cost"]
        return ClassifiedRow(
            class_ids=tuple(columns["class_ids"].tolist()),
            probabilities=tuple(columns["probabilities"].tolist()),
            confidence=float(columns["confidence"]),
            dim=int(columns["dim"]),
            labels=None if labels is None else tuple(labels.tolist()),
            full_class_id=_full_class_id(columns["full_class_ids"]),
            exit=columns["exit"],
            relative_cost=None if cost is None else float(cost),
        )

    def __iter__(self) -> Iterator[ClassifiedRow]:
        return (self[row] for row in range(len(self)))

    def __repr__(self) -> str:
        of_dim, by_dim = np.unique(self.dim, return_counts=True)
        text = f"by dim {dict(zip(of_dim.tolist(), by_dim.tolist(), strict=True))}"
        if self.exit is not None:
            text += f", by exit {dict(Counter(self.exit.tolist()))}"
        if self.full_class_ids is not None:
            text += f", {len(self.audited)} audited"
        return f"Classification({len(self)} rows, top {self.class_ids.shape[1]}, {text})"


def _full_class_id(class_id: Any) -> int | None:
    return None if class_id is None or class_id == NOT_AUDITED else int(class_id)


@dataclass(frozen=True, eq=False)
class Neighbors:
    """The nearest gallery rows of each query, best first.

    Args:
        ids: int64 `(batch, k)`; an object array of str of an index whose ids are strings.
        scores: float32 `(batch, k)`, higher is nearer.

    Examples:
        >>> Neighbors(ids=np.array([[7, 2]]), scores=np.float32([[0.9, 0.4]]))
        Neighbors(1 queries, k=2)

    An integer index gives the `(id, score)` pairs of one query; a slice gives `Neighbors`.
    """

    ids: npt.NDArray[np.int64] | npt.NDArray[np.object_]
    scores: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, rows: SupportsIndex) -> list[tuple[Any, float]]: ...
    @overload
    def __getitem__(self, rows: slice) -> Neighbors: ...
    def __getitem__(self, rows: SupportsIndex | slice) -> list[tuple[Any, float]] | Neighbors:
        if isinstance(rows, slice):
            return Neighbors(self.ids[rows], self.scores[rows])
        return list(zip(self.ids[rows].tolist(), self.scores[rows].tolist(), strict=True))

    def __iter__(self) -> Iterator[list[tuple[Any, float]]]:
        return (self[row] for row in range(len(self)))

    def __repr__(self) -> str:
        return f"Neighbors({len(self)} queries, k={self.ids.shape[1]})"


class Embedded(NamedTuple):
    """Embeddings, and what is known of the model that made them.

    Args:
        embeddings: float32 `(batch, dim)`.
        fingerprint: The fingerprint in the model's manifest.
        prompts: What may stand before each text of a gallery, by name.

    Examples:
        >>> Embedded(np.zeros((2, 8), np.float32), "5e1f").fingerprint
        '5e1f'
    """

    embeddings: npt.NDArray[np.float32]
    fingerprint: str
    prompts: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, eq=False)
class Partial:
    """The answered rows of inputs that were split into calls, some of which failed.

    Args:
        rows: int64, the numbers of the answered rows, increasing.
        answer: The answer about these rows alone.

    Examples:
        >>> Partial(np.array([0, 1, 4]), np.zeros((3, 8), np.float32))
        Partial(3 rows)
    """

    rows: npt.NDArray[np.int64]
    answer: npt.NDArray[np.float32] | Classification | Neighbors

    def __repr__(self) -> str:
        return f"Partial({len(self.rows)} rows)"


def join(parts: Sequence[T]) -> T:
    """Return one answer about all rows from answers about consecutive rows.

    Args:
        parts: Embeddings, classifications or neighbors; at least one, all of one kind.

    Examples:
        >>> join([np.zeros((2, 8)), np.zeros((1, 8))]).shape
        (3, 8)
    """
    answers: Sequence[Any] = parts
    first = answers[0]
    if len(answers) == 1:
        return parts[0]
    if isinstance(first, np.ndarray):
        joined: Any = np.concatenate(answers)
    elif isinstance(first, Embedded):
        joined = first._replace(embeddings=np.concatenate([a.embeddings for a in answers]))
    else:
        joined = type(first)(
            **{
                name: None if c is None else np.concatenate([getattr(a, name) for a in answers])
                for name, c in _columns(first)
            }
        )
    return joined


def _columns(answer: Any) -> list[tuple[str, Any]]:
    return [(field.name, getattr(answer, field.name)) for field in fields(answer)]
