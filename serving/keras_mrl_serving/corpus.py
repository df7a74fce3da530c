"""A corpus too large to ask about at once: cut into windows, counted, and told from another."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from .inputs import Inputs, check_inputs
from .options import Options

Progress = Callable[[int, int | None], object]  # rows embedded, all rows if known
Corpus = npt.NDArray[np.generic] | Mapping[str, npt.NDArray[np.generic]] | Iterable[Inputs]

_ENDS = 16  # rows from each end of a corpus that tell it from another
_CALLS_PER_WINDOW = 2  # of each of the calls in flight: the first call of a window goes alone


def windows(
    data: Corpus, specs: Mapping[str, Mapping[str, Any]], size: int, skip: int = 0
) -> Iterator[Inputs]:
    """Cut a corpus into consecutive windows of about as many rows each.

    Args:
        data: An array or a dict of arrays, batch first, memory-mapped ones too; or any other
            iterable, of such batches.
        specs: What the model takes, by which each batch of an iterable is checked.
        size: Rows of a window; where the corpus comes in batches, which are put together, one may
            have up to twice as many.
        skip: Rows to leave out from the start; those of an iterable are made and thrown away.

    Raises:
        InvalidInputError: If a batch is not what the model takes.
        ValueError: If the corpus ends before the rows to leave out.

    Examples:
        >>> specs = {"x": {"dtype": "float32", "shape": [None, 3]}}
        >>> [len(window) for window in windows(np.zeros((10, 3)), specs, 4, skip=1)]
        [4, 4, 1]
        >>> [len(w["x"]) for w in windows([np.zeros((3, 3))] * 4, specs, 5, skip=1)]
        [5, 6]
    """
    total = count_rows(data)
    if total is not None:
        _check_longer(skip - total)
        for start in range(skip, total, size):
            yield _slice(data, start, start + size)
        return
    waiting: list[Any] = []
    held = 0
    for batch in data:
        arrays = check_inputs(specs, batch)
        rows = len(next(iter(arrays.values())))
        for start in range(min(skip, rows), rows, size):  # one may be a whole file, memory-mapped
            waiting.append(_slice(arrays, start, min(start + size, rows)))
            held += min(size, rows - start)
            if held >= size:
                yield _joined(waiting)
                waiting, held = [], 0
        skip -= min(skip, rows)
    if waiting:
        yield _joined(waiting)
    _check_longer(skip)


def window_rows(options: Options) -> int:
    """Return how many rows are asked for, and made safe, at a time.

    Examples:
        >>> window_rows(Options(max_batch_size=100, max_in_flight=2))
        400
    """
    return _CALLS_PER_WINDOW * options.max_in_flight * (options.max_batch_size or 1000)


def count_rows(data: Corpus) -> int | None:
    """Return how many rows a corpus has; None where only reading it would tell.

    Raises:
        ValueError: If a dict's arrays are not of one length.

    Examples:
        >>> count_rows({"x": np.zeros((5, 2))}), count_rows([np.zeros((5, 2))])
        (5, None)
    """
    if isinstance(data, np.ndarray) and data.ndim:
        return len(data)
    if not isinstance(data, Mapping):
        return None
    rows = {name: len(array) for name, array in data.items()}
    if len(set(rows.values())) != 1:
        raise ValueError(
            "Every input of a corpus needs the same number of rows. "
            f"Received: {rows or 'no inputs'}. Give whole rows."
        )
    return next(iter(rows.values()))


def digest(data: Corpus) -> str | None:
    """Return what tells an array, or a dict of them, from another: its first and last rows.

    Examples:
        >>> digest(np.zeros((50, 3))) == digest(np.zeros((51, 3)))
        False
        >>> digest(iter([])) is None  # only reading it would tell
        True
    """
    rows = count_rows(data)
    if rows is None:
        return None
    found = hashlib.sha256(str(rows).encode())
    arrays: Any = data if isinstance(data, Mapping) else {"": data}
    for name, array in sorted(arrays.items()):
        ends = [np.asarray(array[:_ENDS]), np.asarray(array[max(0, rows - _ENDS) :])]
        for end in ends:
            bytes_ = repr(end.tolist()).encode() if end.dtype.kind in "OT" else end.tobytes()
            found.update(f"{name} {end.dtype} {end.shape}".encode() + bytes_)
    return found.hexdigest()


def _check_longer(missing: int) -> None:
    if missing > 0:
        raise ValueError(
            "A corpus that is gone on with must be the one that was begun. "
            f"Received: one that ends {missing} rows before those already embedded. "
            "Give the same rows in the same order."
        )


def _slice(data: Any, start: int, stop: int) -> Any:
    if isinstance(data, Mapping):
        return {name: array[start:stop] for name, array in data.items()}
    return data[start:stop]


def _joined(batches: list[Any]) -> Any:
    if len(batches) == 1:
        return batches[0]
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
