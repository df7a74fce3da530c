"""A corpus too large to ask about at once: cut into windows, counted, and told from another."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from .errors import EncoderMismatchError
from .inputs import Inputs, check_inputs
from .options import Options
from .results import Embedded

# Embeddings on disk: written as the rows come, and gone on with after a crash.

try:
    import fcntl
except ImportError:  # Windows: two writers of one file are not noticed there
    fcntl = None  # type: ignore[assignment]


_HEADER_BYTES = 128  # room for any number of rows, so that the header is written again in place
_VALUE_BYTES = 4


class EmbeddingFile:
    """An `.npy` of float32 embeddings that grows, and outlives its writer.

    While it grows it stands beside its place, as `PATH.partial`; `PATH.partial.json` says how many
    of its rows are safe on the disk. `finish` renames it. Whoever opens it again meanwhile goes on
    after the last safe row.

    Args:
        path: Where the finished file goes.
        dim: Width of a row.
        fingerprint: Of the model the embeddings are of.
        corpus: What tells its rows from another's, see `corpus.digest`; None: nothing.

    Raises:
        FileExistsError: If there is a finished file at `path`.
        EncoderMismatchError: If it was begun with another model.
        ValueError: If it was begun with another dim or corpus, or is damaged.
        BlockingIOError: If another process is writing it.

    Examples:
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/birds.npy"
        >>> with EmbeddingFile(path, 2, "5e1f") as file:
        ...     file.append(Embedded(np.ones((3, 2), np.float32), "5e1f"))
        >>> with EmbeddingFile(path, 2, "5e1f") as file:
        ...     file.rows, file.finish().shape
        (3, (3, 2))
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        dim: int,
        fingerprint: str,
        corpus: str | None = None,
    ) -> None:
        self.path = Path(path)
        self.corpus = corpus
        self.dim = dim
        self.fingerprint = fingerprint
        self.rows = 0
        self._growing = Path(f"{self.path}.partial")
        self._journal = Path(f"{self.path}.partial.json")
        self._check_free()
        begun = self._growing.exists()
        # Never truncated on opening: another process may be writing it.
        self._file = open(os.open(self._growing, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        try:
            self._lock()
            self._check_free()  # whoever held the lock may have finished meanwhile
            if begun and self._journal.exists():
                self.rows = self._safe_rows()
            self._file.truncate(self._end())
            self._file.seek(self._end())
        except BaseException:
            self._file.close()
            raise

    def append(self, embedded: Embedded) -> None:
        """Write rows; when this returns they are safe.

        Raises:
            EncoderMismatchError: If they are of another model than the rows before them.
            OSError: If the disk is full; the rows before them are safe.
        """
        if embedded.fingerprint != self.fingerprint:
            raise self._another_model(embedded.fingerprint)
        if embedded.embeddings.shape[1:] != (self.dim,):
            raise ValueError(
                f"Rows must be (rows, {self.dim}). Received: {embedded.embeddings.shape}. "
                "Embed them at the dim of the file."
            )
        self._file.write(np.ascontiguousarray(embedded.embeddings, "<f4").tobytes())
        self._sync()
        self.rows += len(embedded.embeddings)
        said = {"dim": self.dim, "fingerprint": self.fingerprint, "rows": self.rows}
        said["corpus"] = self.corpus
        aside = Path(f"{self._journal}.new")
        with open(aside, "w") as journal:
            json.dump(said, journal)
            journal.flush()
            os.fsync(journal.fileno())
        os.replace(aside, self._journal)

    def finish(self) -> npt.NDArray[np.float32]:
        """Put the file in its place; returns it memory-mapped, read-only.

        Raises:
            FileExistsError: If a file has appeared there meanwhile.
        """
        self._check_free()
        text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({self.rows}, {self.dim}), }}"
        magic = np.lib.format.magic(1, 0)
        room = _HEADER_BYTES - len(magic) - 2
        self._file.seek(0)
        self._file.write(magic + struct.pack("<H", room) + text.ljust(room - 1).encode() + b"\n")
        self._sync()
        os.replace(self._growing, self.path)
        self._journal.unlink(missing_ok=True)
        if not self.rows:  # nothing can be mapped
            return np.empty((0, self.dim), np.float32)
        return np.load(self.path, mmap_mode="r")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def _check_free(self) -> None:
        if self.path.exists():
            raise FileExistsError(
                f"Embeddings are never overwritten. Received: path={os.fspath(self.path)!r}, "
                "which is there already. Remove it, or choose another path."
            )

    def _end(self) -> int:
        return _HEADER_BYTES + self.rows * self.dim * _VALUE_BYTES

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(
                f"One process writes a file of embeddings. Received: {self._growing}, which "
                "another is writing. Wait for it, or choose another path."
            ) from error

    def _safe_rows(self) -> int:
        try:
            said = json.loads(self._journal.read_text())
            dim, rows, fingerprint = int(said["dim"]), int(said["rows"]), said["fingerprint"]
            corpus = said.get("corpus")
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(f"{self._journal}, which does not read") from error
        if fingerprint != self.fingerprint:
            raise self._another_model(fingerprint)
        if dim != self.dim:
            raise ValueError(
                "All rows of a file have one dim. "
                f"Received: dim={self.dim} for {self._growing}, begun with dim={dim}. Give the "
                f"dim it was begun with, or remove {self._growing} and {self._journal}."
            )
        if None not in (corpus, self.corpus) and corpus != self.corpus:
            raise ValueError(
                "A corpus that is gone on with must be the one that was begun. Received: other "
                f"rows than those of {self._growing}. Give the same rows in the same order, or "
                f"remove {self._growing} and {self._journal} to begin anew."
            )
        size, needed = self._growing.stat().st_size, _HEADER_BYTES + rows * dim * _VALUE_BYTES
        if rows < 0 or size < needed:
            raise self._damaged(f"{size} bytes in {self._growing} where {rows} rows need {needed}")
        return rows

    def _damaged(self, received: str) -> ValueError:
        return ValueError(
            f"A file of embeddings and its journal must agree. Received: {received}. "
            f"Remove {self._growing} and {self._journal} to begin anew."
        )

    def _another_model(self, fingerprint: str) -> EncoderMismatchError:
        return EncoderMismatchError(
            "All rows of a file are embedded by one model. Received: rows of the model with "
            f"fingerprint {fingerprint!r} and of {self.fingerprint!r}, for {self._growing}. "
            "Serve the model it was begun with and call again to go on, or remove "
            f"{self._growing} and {self._journal} to begin anew."
        )


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
