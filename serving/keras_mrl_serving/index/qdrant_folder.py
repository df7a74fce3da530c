"""A gallery in a folder, with Qdrant's own engine in this process (qdrant-edge-py).

The folder of a gallery holds `gallery.json`, the facts of the index, and the engine's shard, a
folder that this card names. The card is written when the shard is there, so that a build that is
killed leaves a gallery or none. What is written goes to the engine's log first: killed in the
middle of an upsert, it is there whole after the next opening, or not at all.

The engine locks its shard, so one process at a time has it open. All indexes of this process share
one shard, which is closed with the last of them.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import (
    InvalidInputError,
    KerasMrlError,
    ManifestError,
    ServerError,
    ServerUnavailableError,
)
from ..untrusted import JSON_BYTES, UntrustedFileError, parse_json, read_bytes
from .facts import IndexFacts, Vectors
from .payloads import Payload
from .points import DISTANCES, PointCollection, PointId, StageQuery

CARD = "gallery.json"
_SHARD = re.compile(r"shard-[0-9a-f]{16}")
_NO_GRAPH = {"m": 0, "ef_construct": 100, "full_scan_threshold": 10_000}


class _Shard:
    """The engine of one folder, and whether it was closed."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine


_OPEN: weakref.WeakValueDictionary[str, _Shard] = weakref.WeakValueDictionary()
_OPENING = threading.Lock()


class FolderCollection(PointCollection):
    """One gallery in a folder; every method raises `KerasMrlError` where the engine fails.

    Args:
        folder: Where galleries lie, each in a folder of its own.
        name: Name of the gallery.

    Examples:
        >>> import tempfile
        >>> FolderCollection(tempfile.mkdtemp(), "pets").exists()
        False
    """

    def __init__(self, folder: str | os.PathLike[str], name: str) -> None:
        super().__init__(name)
        if not name or name in (".", "..") or re.search(r"[/\\\0]", name):
            raise ValueError(
                "A gallery's name is that of a folder, without a path. "
                f"Received: {name!r}. Name the path by the first argument."
            )
        if "://" in os.fspath(folder) or os.fspath(folder) == ":memory:":
            raise ValueError(
                "A gallery is in a folder, or behind a client. "
                f"Received: {os.fspath(folder)!r}. Give QdrantClient({os.fspath(folder)!r})."
            )
        self.path = Path(folder) / name
        self._shard: _Shard | None = None

    def exists(self) -> bool:
        """Return whether the gallery is there."""
        return (self.path / CARD).exists()

    def create(
        self,
        facts: IndexFacts,
        vectors: Mapping[int, Mapping[str, Any]],
        options: Mapping[str, Any],
    ) -> None:
        """Make the gallery, with a vector of every dim of the schedule.

        Args:
            facts: Kept in its card.
            vectors: Options of `EdgeVectorParams` by dim.
            options: Options of `EdgeConfig`.
        """
        shard = f"shard-{secrets.token_hex(8)}"
        with self._our_errors() as edge:
            distance = getattr(edge.Distance, DISTANCES[facts.metric])
            # A shortlist is read by id: a graph over a later stage's vectors would never be walked.
            config = {}
            for dim in facts.schedule.dims:
                defaults = {}
                if dim != facts.schedule.dims[0]:
                    defaults = {"hnsw_config": edge.HnswIndexConfig(**_NO_GRAPH)}
                given = {**defaults, **vectors.get(dim, {})}
                config[str(dim)] = edge.EdgeVectorParams(size=dim, distance=distance, **given)
            made = edge.EdgeConfig(vectors=config, **options)
            self._make_folder(shard)
            engine = edge.EdgeShard.create(str(self.path / shard), made)
            engine.close()
        self._write({"format": 1, "shard": shard, "facts": facts.to_json()}, is_new=True)

    def _make_folder(self, shard: str) -> None:
        try:
            (self.path / shard).mkdir(parents=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise InvalidInputError(
                "A gallery needs a folder. "
                f"Received: {os.fspath(self.path)!r}, where a file stands in the way ({error}). "
                "Name another folder, or move the file."
            ) from error

    def facts(self) -> IndexFacts:
        """Return the facts the gallery was made with.

        Raises:
            ManifestError: If there is no gallery, or something else made it.
        """
        return IndexFacts.from_json(self._card()["facts"])

    def replace_facts(self, facts: IndexFacts) -> None:
        """Keep other facts with the gallery."""
        self._write({**self._card(), "facts": facts.to_json()}, is_new=False)

    def _card(self) -> dict[str, Any]:
        received = "no gallery"
        try:
            card = parse_json(read_bytes(self.path / CARD, JSON_BYTES, within=self.path))
            if card["format"] == 1 and _SHARD.fullmatch(card["shard"]) and card["facts"]:
                return dict(card)
            received = f"{CARD} of format {card['format']!r:.80}"
        except OSError:
            pass
        except (UntrustedFileError, ValueError, KeyError, TypeError) as error:
            received = f"{CARD}, which does not read ({error})"
        raise ManifestError(
            f"A gallery in a folder has a file {CARD} that QdrantIndex.build wrote. "
            f"Received: {os.fspath(self.path)!r} with {received}. Build one under a new name."
        )

    def _write(self, card: Mapping[str, Any], *, is_new: bool) -> None:
        """Write the card in one step; a new one never over another."""
        temporary = self.path / f"{CARD}-{secrets.token_hex(8)}"
        with open(temporary, "wb") as file:
            file.write(json.dumps(card, indent=1).encode())
            file.flush()
            os.fsync(file.fileno())
        try:
            if is_new:
                os.link(temporary, self.path / CARD)
            else:
                os.replace(temporary, self.path / CARD)
        finally:
            temporary.unlink(missing_ok=True)

    @property
    def _engine(self) -> Any:
        if self._shard is None:
            place = self.path / self._card()["shard"]
            with _OPENING:
                shard = _OPEN.get(os.path.realpath(place))
                if shard is None:
                    shard = _Shard(self._loaded(place))
                    _OPEN[os.path.realpath(place)] = shard
            self._shard = shard
        return self._shard.engine

    def _loaded(self, place: Path) -> Any:
        with self._our_errors() as edge:
            return edge.EdgeShard.load(str(place))

    def records(
        self, points: Sequence[PointId], *, payload: bool = False, dim: int | None = None
    ) -> list[Any]:
        """Return the records that are there, in any order, with their `id`."""
        engine = self._engine
        with self._our_errors():
            return list(
                engine.retrieve(list(points), payload, False if dim is None else [str(dim)])
            )

    def count(self, only: Any = None, *, exact: bool) -> int:
        engine = self._engine
        with self._our_errors() as edge:
            return int(engine.count(edge.CountRequest(exact=exact, filter=only)))

    def upsert(
        self,
        points: Sequence[PointId],
        vectors: Mapping[int, Vectors],
        payloads: Sequence[Payload] | None,
    ) -> None:
        engine = self._engine
        by_dim = {str(dim): rows.tolist() for dim, rows in vectors.items()}
        with self._our_errors() as edge:
            rows = [
                edge.Point(
                    point,
                    {dim: rows[at] for dim, rows in by_dim.items()},
                    None if payloads is None else dict(payloads[at]),
                )
                for at, point in enumerate(points)
            ]
            engine.update(edge.UpdateOperation.upsert_points(rows))

    def delete(self, points: Sequence[PointId]) -> None:
        engine = self._engine
        with self._our_errors() as edge:
            engine.update(edge.UpdateOperation.delete_points(list(points)))

    def only_ids(self, points: Sequence[PointId]) -> Any:
        with self._our_errors() as edge:
            return edge.Filter(must=[edge.HasIdCondition(set(points))])

    def create_payload_index(self, field: str, kind: Any) -> None:
        engine = self._engine
        with self._our_errors() as edge:
            engine.update(edge.UpdateOperation.create_field_index(field, kind))

    def _query(self, engine: Any, stage: StageQuery, **parts: Any) -> Any:
        make: Any = engine.QueryRequest if parts["is_last"] else engine.Prefetch
        payload = {} if parts["payload"] is None else {"with_payload": parts["payload"]}
        return make(
            prefetches=None if parts["before"] is None else [parts["before"]],
            query=engine.Query.Nearest(parts["vector"], using=str(stage.dim)),
            limit=stage.limit,
            params=engine.SearchParams(exact=True) if stage.exact else stage.params,
            filter=parts["only"],
            **payload,
        )

    def _answers(self, engine: Any, queries: Sequence[Any]) -> list[list[Any]]:
        return list(self._engine.query_batch(engine.QueryBatchRequest(list(queries))))

    def optimize(self) -> None:
        """Build the graphs of rows that have none; nothing else in this process runs meanwhile."""
        engine = self._engine
        with self._our_errors():
            engine.optimize()

    def flush(self) -> None:
        """Make what was written safe on the disk."""
        engine = self._engine
        with self._our_errors():
            engine.flush()

    def close(self) -> None:
        """Close the shard, for all indexes of this process; a later call opens it again."""
        shard, self._shard = self._shard, None
        if shard is None:
            return
        with _OPENING:
            for place in [place for place, other in _OPEN.items() if other is shard]:
                del _OPEN[place]
        with self._our_errors():
            shard.engine.close()

    @contextmanager
    def _our_errors(self) -> Iterator[Any]:
        """Yield `qdrant_edge`; raise what the engine raises as an error of this package."""
        try:
            import qdrant_edge
        except ImportError as error:
            raise ImportError(
                "A QdrantIndex in a folder needs qdrant-edge-py. "
                f"Received: {error}. Install it: pip install 'keras-mrl[qdrant-edge]'."
            ) from error
        try:
            yield qdrant_edge
        except (KerasMrlError, OSError):
            raise
        except Exception as error:  # the engine raises nothing more precise
            raise _our_error(error, self.path) from error


def _our_error(error: Exception, path: Path) -> KerasMrlError:
    text = " ".join(str(error).split()).rstrip(".")
    place = f"for gallery {os.fspath(path)!r}"
    if "WouldBlock" in text:
        return ServerUnavailableError(
            "One process at a time opens a gallery in a folder. "
            f"Received: {text}, {place}. Close it there, or run Qdrant as a server."
        )
    if "not initialized" in text:
        return ServerUnavailableError(
            f"A gallery must be open. Received: {text}, {place}. Open it again."
        )
    if isinstance(error, TypeError | ValueError) or "Service" not in text:
        return InvalidInputError(
            f"Qdrant must take the request. Received: {text}, {place}. "
            "Give objects of qdrant_edge, and options that it knows."
        )
    return ServerError(
        f"Qdrant must answer without an error. Received: {text}, {place}. "
        "See that the folder is whole, and that the disk has room."
    )
