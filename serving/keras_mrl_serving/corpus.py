"""A corpus too large for one answer: cut into windows, and its embeddings on disk.

`Client.embed_dataset` asks for one window of rows after another and appends the embeddings to an
`EmbeddingFile`. After a crash, the next run resumes after the rows that the file holds.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

from .contract import LAST_EXIT
from .errors import EncoderMismatchError, InvalidInputError
from .inputs import Inputs, check_inputs
from .options import Options
from .results import Embedded
from .untrusted import JSON_BYTES, parse_json, read_bytes

try:
    import fcntl
except ImportError:  # on Windows, where two writers of one file go unnoticed
    fcntl = None  # type: ignore[assignment]

Progress = Callable[[int, int | None], object]  # rows embedded, rows in all (None if unknown)
Corpus = npt.NDArray[np.generic] | Mapping[str, npt.NDArray[np.generic]] | Iterable[Inputs]

_DIGEST_ROWS = 16  # from each end of a corpus
_CALLS_IN_A_ROW = 2  # per window and call in flight, since the first call of a window goes alone


def texts_as_rows(data: Corpus) -> Corpus:
    """Return a list of texts as an array of as many rows; any other corpus as it is.

    Examples:
        >>> texts_as_rows(["owls", b"jays"]).shape
        (2,)
    """
    if not isinstance(data, list | tuple):
        return data
    if not any(isinstance(own, str | bytes) for own in data):
        return data
    rows = np.empty(len(data), object)
    rows[:] = data
    return rows


def windows(
    data: Corpus,
    specs: Mapping[str, Mapping[str, Any]],
    size: int,
    other: Mapping[str, Mapping[str, Any]] | None = None,
) -> Iterator[dict[str, npt.NDArray[Any]]]:
    """Yield consecutive windows of a corpus, of about `size` rows each, as the model takes them.

    Args:
        data: An array or a dict of arrays, batch first, memory-mapped ones too; or an iterable of
            such batches.
        specs: The inputs of the model.
        size: Rows of a window. Batches of an iterable are joined, so its windows may have up to
            twice as many.
        other: The inputs of the other tower, in a model of two.

    Raises:
        InvalidInputError: If the model does not take a batch.

    Examples:
        >>> specs = {"x": {"dtype": "float32", "shape": [None, 3]}}
        >>> [len(window["x"]) for window in windows(np.zeros((9, 3)), specs, 4)]
        [4, 4, 1]
        >>> [len(window["x"]) for window in windows([np.zeros((3, 3))] * 4, specs, 5)]
        [6, 6]
    """
    total = count_rows(data)
    if total is not None:
        for start in range(0, total, size):
            yield check_inputs(specs, _slice(data, start, start + size), other)
        return
    slices: list[Any] = []
    num_rows = 0  # in `slices`
    for batch in data:
        arrays = check_inputs(specs, batch, other)
        rows = _num_rows(arrays)
        # A batch may be a whole memory-mapped file, so it is cut too.
        for start in range(0, rows, size):
            slices.append(_slice(arrays, start, min(start + size, rows)))
            num_rows += min(size, rows - start)
            if num_rows >= size:
                yield _join(slices)
                slices, num_rows = [], 0
    if slices:
        yield _join(slices)


def _num_rows(arrays: Mapping[str, npt.NDArray[Any]]) -> int:
    return len(next(iter(arrays.values())))


def _slice(data: Any, start: int, stop: int) -> Any:
    if isinstance(data, Mapping):
        return {name: array[start:stop] for name, array in data.items()}
    return data[start:stop]


def _join(batches: list[Any]) -> Any:
    if len(batches) == 1:
        return batches[0]
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def window_rows(options: Options) -> int:
    """Return how many rows are embedded and then written to disk at a time.

    Examples:
        >>> window_rows(Options(max_batch_size=100, max_in_flight=2))
        400
    """
    return _CALLS_IN_A_ROW * options.max_in_flight * (options.max_batch_size or 1000)


def count_rows(data: Corpus) -> int | None:
    """Return how many rows a corpus has; None for an iterable, which would have to be read.

    Raises:
        InvalidInputError: If it is no corpus.
        ValueError: If the arrays of a dict differ in length.

    Examples:
        >>> count_rows({"x": np.zeros((5, 2))}), count_rows([np.zeros((5, 2))])
        (5, None)
    """
    if isinstance(data, np.ndarray) and data.ndim:
        return len(data)
    values = tuple(data.values()) if isinstance(data, Mapping) else (data,)
    for value in values:
        is_batches = value is data and isinstance(value, Iterable)
        is_one = isinstance(value, str | bytes | np.ndarray) and not getattr(value, "ndim", 0)
        if is_one or not (is_batches or hasattr(value, "__len__")):
            raise InvalidInputError(
                "A corpus is an array, a dict of arrays, or an iterable of such batches. "
                f"Received: {'' if value is data else 'a dict with '}{type(value).__name__}. "
                "Give rows, such as np.load(file, mmap_mode='r')."
            )
    if not isinstance(data, Mapping):
        return None
    rows = {name: len(array) for name, array in data.items()}
    if len(set(rows.values())) != 1:
        raise ValueError(
            "Every input of a corpus needs the same number of rows. "
            f"Received: {rows or 'no inputs'}. Give whole rows."
        )
    return next(iter(rows.values()))


def digest(
    data: Corpus,
    specs: Mapping[str, Mapping[str, Any]],
    other: Mapping[str, Mapping[str, Any]] | None = None,
) -> str | None:
    """Return a digest of the first and last rows, as they are sent, and of how many there are.

    None for an iterable, which would have to be read.

    Args:
        data: The corpus.
        specs: The inputs of the model.
        other: The inputs of the other tower, in a model of two.

    Raises:
        InvalidInputError: If the model does not take these rows.

    Examples:
        >>> specs = {"x": {"dtype": "float32", "shape": [None, 3]}}
        >>> digest(np.zeros((50, 3)), specs) == digest(np.zeros((51, 3)), specs)
        False
        >>> digest(np.zeros((50, 3)), specs) == digest({"x": np.zeros((50, 3), np.float32)}, specs)
        True
        >>> digest(iter([]), specs) is None
        True
    """
    rows = count_rows(data)
    if rows is None:
        return None
    ends, shapes = RowDigest(), {}
    for start, stop in ((0, _DIGEST_ROWS), (max(0, rows - _DIGEST_ROWS), rows)):
        sent = check_inputs(specs, _slice(data, start, stop), other)
        ends.update(sent)
        shapes = {name: array.shape[1:] for name, array in sorted(sent.items())}
    return hashlib.sha256(f"{rows} {shapes} {ends.hexdigest()}".encode()).hexdigest()


class RowDigest:
    """A digest of rows in their order, however they are cut into windows.

    Examples:
        >>> one, other = RowDigest(), RowDigest()
        >>> one.update({"x": np.arange(6)})
        >>> other.update({"x": np.arange(4)})
        >>> other.update({"x": np.arange(4, 6)})
        >>> one.hexdigest() == other.hexdigest()
        True
    """

    def __init__(self) -> None:
        self._by_input: dict[str, Any] = {}

    def update(self, rows: Mapping[str, npt.NDArray[Any]]) -> None:
        """Take in more rows, by input: numbers, or str and bytes."""
        for name, array in rows.items():
            hash_ = self._by_input.setdefault(name, hashlib.sha256())
            if array.dtype.kind not in "OSUT":
                hash_.update(np.ascontiguousarray(array))
                continue
            for element in array.ravel().tolist():
                text = element.encode() if isinstance(element, str) else element
                hash_.update(len(text).to_bytes(8, "little") + text)

    def hexdigest(self) -> str:
        """Return the digest of all rows so far."""
        by_input = {name: hash_.hexdigest() for name, hash_ in sorted(self._by_input.items())}
        return hashlib.sha256(json.dumps(by_input).encode()).hexdigest()


def _is_file(status: os.stat_result) -> bool:
    return stat.S_ISREG(status.st_mode)


_HEADER_BYTES = 128  # fits any number of rows, so that the header can be rewritten in place
_VALUE_BYTES = 4
# After the fingerprint in a journal. A client that knows none takes it for another model's.
_OF_OTHER_TOWER = " of the other tower"
_AT_EXIT = " at exit "  # and its name
_WITH_PROMPT = " with prompt "  # and the prompt as JSON


class EmbeddingFile:
    """An `.npy` file of float32 embeddings that grows, and that a later process can resume.

    Until it is finished, the file is `PATH.partial`, and `PATH.partial.json` (the journal) says how
    many of its rows are safe on the disk. Opening the file again resumes after the last safe row.
    `finish` renames it.

    Args:
        path: Path of the finished file.
        dim: Width of a row.
        fingerprint: Fingerprint of the model that makes the embeddings.
        corpus: Digest of the corpus, see `digest`; None skips the check that it is the same.
        other_tower: Whether the other tower of the model embeds the rows.
        exit: The exit of the model that embeds them.
        prompt: The text that is put before each text; "" without a prompt.

    Raises:
        FileExistsError: If there is a finished file at `path`, or something else than a file where
            it is written first.
        EncoderMismatchError: If the file was begun with another model.
        ValueError: If the file was begun with another dim, tower, exit, prompt or corpus, or is
            damaged.
        BlockingIOError: If another process is writing the file.

    Examples:
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/birds.npy"
        >>> with EmbeddingFile(path, 2, "5e1f") as file:
        ...     file.append(Embedded(np.ones((3, 2), np.float32), "5e1f"), {"x": np.zeros((3, 9))})
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
        other_tower: bool = False,
        exit: str = LAST_EXIT,
        prompt: str = "",
    ) -> None:
        self.path = Path(path)
        self.corpus = corpus
        self.dim = dim
        self.fingerprint = fingerprint
        self.made = {"dim": dim, "other_tower": other_tower, "exit": exit, "prompt": prompt}
        self.rows = 0
        self._digest = RowDigest()
        self._safe_digest: str | None = None  # of the rows that an earlier writer embedded
        self._partial = Path(f"{self.path}.partial")
        self._journal = Path(f"{self.path}.partial.json")
        self._check_free()
        was_begun = self._partial.exists()
        self._file = self._open_partial()
        try:
            self._lock()
            self._check_free()  # another process may have finished it before this one got the lock
            if was_begun and self._journal.exists():
                self.rows = self._safe_rows()
            self._file.truncate(self._end())
            self._file.seek(self._end())
        except BaseException:
            self._file.close()
            raise

    def missing(
        self, windows: Iterable[Mapping[str, npt.NDArray[Any]]]
    ) -> Iterator[Mapping[str, npt.NDArray[Any]]]:
        """Yield the rows of a corpus that the file does not hold; read the others, to check them.

        Args:
            windows: All rows of the corpus, as `windows` yields them.

        Raises:
            ValueError: If the rows that the file holds were made of others.
        """
        unread = self.rows
        for window in windows:
            rows = _num_rows(window)
            if unread:
                self._digest.update(_slice(window, 0, unread))
                window = _slice(window, min(unread, rows), rows)
                unread -= min(unread, rows)
                if not unread and self._safe_digest not in (None, self._digest.hexdigest()):
                    raise self._other_corpus_error()
            if _num_rows(window):
                yield window
        if unread:
            raise ValueError(
                "A corpus that is gone on with must be the one that was begun. "
                f"Received: one that ends {unread} rows before those already embedded. "
                "Give the same rows in the same order."
            )

    def append(self, embedded: Embedded, rows: Mapping[str, npt.NDArray[Any]]) -> None:
        """Write embeddings to the disk; once this returns, they are safe.

        Args:
            embedded: The embeddings.
            rows: The rows of the corpus that they were made of, by input.

        Raises:
            EncoderMismatchError: If another model made them than the rows before them.
            OSError: If the disk is full; the rows before them stay safe.
        """
        if embedded.fingerprint != self.fingerprint:
            raise self._other_model_error(embedded.fingerprint)
        if embedded.embeddings.shape[1:] != (self.dim,):
            raise ValueError(
                f"Rows must be (rows, {self.dim}). Received: {embedded.embeddings.shape}. "
                "Embed them at the dim of the file."
            )
        self._file.write(np.ascontiguousarray(embedded.embeddings, "<f4").tobytes())
        self._sync()
        self.rows += len(embedded.embeddings)
        self._digest.update(rows)
        entry = {
            "dim": self.dim,
            "fingerprint": self._made_by(),
            "rows": self.rows,
            "rows_sha256": self._digest.hexdigest(),
        }
        new_journal = Path(f"{self._journal}.new")
        new_journal.unlink(missing_ok=True)
        with open(new_journal, "x") as file:
            json.dump({**entry, "corpus_sha256": self.corpus}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new_journal, self._journal)

    def finish(self) -> npt.NDArray[np.float32]:
        """Move the file to its path; return its embeddings memory-mapped, read-only.

        Raises:
            FileExistsError: If another file has appeared at the path.
        """
        self._check_free()
        text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({self.rows}, {self.dim}), }}"
        magic = np.lib.format.magic(1, 0)
        size = _HEADER_BYTES - len(magic) - 2
        self._file.seek(0)
        self._file.write(magic + struct.pack("<H", size) + text.ljust(size - 1).encode() + b"\n")
        self._sync()
        os.replace(self._partial, self.path)
        self._journal.unlink(missing_ok=True)
        if not self.rows:  # an empty array cannot be memory-mapped
            return np.empty((0, self.dim), np.float32)
        return np.load(self.path, mmap_mode="r")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _made_by(self) -> str:
        tower = _OF_OTHER_TOWER if self.made["other_tower"] else ""
        exit = "" if self.made["exit"] == LAST_EXIT else f"{_AT_EXIT}{self.made['exit']}"
        prompt = f"{_WITH_PROMPT}{json.dumps(self.made['prompt'])}" if self.made["prompt"] else ""
        return f"{self.fingerprint}{tower}{exit}{prompt}"

    def _check_free(self) -> None:
        if self.path.exists():
            raise FileExistsError(
                f"Embeddings are never overwritten. Received: path={os.fspath(self.path)!r}, "
                "which is there already. Remove it, or choose another path."
            )

    def _open_partial(self) -> BinaryIO:
        """Open it without truncation, since another process may be writing it.

        Nor through a link, since its name can be guessed and its folder may be shared.
        """
        flags = os.O_RDWR | os.O_CREAT
        for flag in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"):  # not every system has all
            flags |= getattr(os, flag, 0)
        try:
            descriptor = os.open(self._partial, flags, 0o666)
        except OSError as error:
            if os.path.lexists(self._partial) and not _is_file(os.lstat(self._partial)):
                raise self._no_file_error() from error
            raise
        if not _is_file(os.fstat(descriptor)):
            os.close(descriptor)
            raise self._no_file_error()
        return open(descriptor, "r+b")

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
                f"One process writes a file of embeddings. Received: {self._partial}, which "
                "another is writing. Wait for it, or choose another path."
            ) from error

    def _safe_rows(self) -> int:
        """Return the number of rows in the journal; raise if this writer cannot resume there."""
        try:
            entry = parse_json(read_bytes(self._journal, JSON_BYTES))
            dim, rows, written = int(entry["dim"]), int(entry["rows"]), str(entry["fingerprint"])
            corpus, self._safe_digest = entry.get("corpus_sha256"), entry.get("rows_sha256")
            maker, _, quoted = written.partition(_WITH_PROMPT)
            prompt = str(parse_json(quoted)) if quoted else ""
            maker, _, exit = maker.partition(_AT_EXIT)
        except (ValueError, KeyError, TypeError, IsADirectoryError) as error:
            raise self._damaged_error(f"{self._journal}, which does not read") from error
        fingerprint = maker.removesuffix(_OF_OTHER_TOWER)
        if fingerprint != self.fingerprint:
            raise self._other_model_error(fingerprint)
        begun = {
            "dim": dim,
            "other_tower": maker != fingerprint,
            "exit": exit or LAST_EXIT,
            "prompt": prompt,
        }
        for name, own in self.made.items():
            if own != begun[name]:
                raise ValueError(
                    f"All rows of a file are made alike. Received: {name}={own!r} for "
                    f"{self._partial}, begun with {name}={begun[name]!r}. Give what it was begun "
                    f"with, or remove {self._partial} and {self._journal}."
                )
        if None not in (corpus, self.corpus) and corpus != self.corpus:
            raise self._other_corpus_error()
        size, needed = self._partial.stat().st_size, _HEADER_BYTES + rows * dim * _VALUE_BYTES
        if rows < 0 or size < needed:
            received = f"{size} bytes in {self._partial} where {rows} rows need {needed}"
            raise self._damaged_error(received)
        return rows

    def _no_file_error(self) -> FileExistsError:
        return FileExistsError(
            "Embeddings are written to a regular file first. "
            f"Received: {self._partial}, which is a link, a folder, a pipe or a device. "
            "Remove it, or choose another path."
        )

    def _other_corpus_error(self) -> ValueError:
        return ValueError(
            "A corpus that is gone on with must be the one that was begun. Received: other "
            f"rows than those of {self._partial}. Give the same rows in the same order, or "
            f"remove {self._partial} and {self._journal} to begin anew."
        )

    def _damaged_error(self, received: str) -> ValueError:
        return ValueError(
            f"A file of embeddings and its journal must agree. Received: {received}. "
            f"Remove {self._partial} and {self._journal} to begin anew."
        )

    def _other_model_error(self, fingerprint: str) -> EncoderMismatchError:
        return EncoderMismatchError(
            "All rows of a file are embedded by one model. Received: rows of the model with "
            f"fingerprint {fingerprint!r} and of {self.fingerprint!r}, for {self._partial}. "
            "Serve the model it was begun with and call again to go on, or remove "
            f"{self._partial} and {self._journal} to begin anew."
        )
