"""A Qdrant collection as `QdrantIndex` uses it: its facts, its rows, and what Qdrant refuses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import ManifestError
from .arrays import Ids, Vectors
from .facts import IndexFacts
from .qdrant_failures import translated
from .qdrant_queries import Narrowing, nested, only

if TYPE_CHECKING:
    from qdrant_client import QdrantClient
    from qdrant_client.models import ScoredPoint

_IDS = 1000  # looked up at once
_KEY = "keras_mrl"  # in the collection's metadata, which no search can return

# For "cosine" scaled vectors are sent, whose dot product it is: a vector so small that it counts as
# zero stays small, as in the other indexes. Qdrant's own cosine would scale it once more.
_DISTANCES = {"cosine": "Dot", "dot": "Dot", "l2": "Euclid"}


class Collection:
    """One collection of a client; every method raises `KerasMrlError` where Qdrant fails.

    Args:
        client: A `qdrant_client.QdrantClient`: of a server, a path or ":memory:".
        name: Of the collection.

    Examples:
        >>> from qdrant_client import QdrantClient
        >>> Collection(QdrantClient(":memory:"), "pets").exists()
        False
    """

    def __init__(self, client: QdrantClient, name: str) -> None:
        self.client = client
        self.name = name

    def exists(self) -> bool:
        """Return whether it is there."""
        with self._asking():
            return self.client.collection_exists(self.name)

    def create(
        self,
        facts: IndexFacts,
        vectors: Mapping[int, Mapping[str, Any]],
        options: Mapping[str, Any],
    ) -> None:
        """Make it, with a vector of every dim of the schedule.

        Args:
            facts: Kept in its metadata.
            vectors: Options of `VectorParams` by dim.
            options: Of `create_collection`.
        """
        with self._asking() as models:
            distance = models.Distance(_DISTANCES[facts.metric])
            # A shortlist is read by id: a graph over a later stage's vectors would never be walked.
            no_graph = {"hnsw_config": models.HnswConfigDiff(m=0)}
            config = {
                str(dim): models.VectorParams(
                    size=dim,
                    distance=distance,
                    **{
                        **({} if dim == facts.schedule.dims[0] else no_graph),
                        **vectors.get(dim, {}),
                    },
                )
                for dim in facts.schedule.dims
            }
            metadata = {**(options.get("metadata") or {}), _KEY: facts.to_json()}
            self.client.create_collection(
                self.name, vectors_config=config, **{**options, "metadata": metadata}
            )
        self.facts()  # a server too old for metadata drops it in silence

    def facts(self) -> IndexFacts:
        """Return the facts it was made with.

        Raises:
            ManifestError: If there is no collection, or something else made it.
        """
        metadata: Mapping[str, Any] | None = None
        received = f"no collection {self.name!r}"
        if self.exists():
            with self._asking():
                metadata = self.client.get_collection(self.name).config.metadata
            received = f"collection {self.name!r} with metadata {metadata}"
        if not metadata or _KEY not in metadata:
            raise ManifestError(
                "A QdrantIndex needs a collection that QdrantIndex.build made, on a server that "
                f"keeps metadata. Received: {received}. "
                "Build one under a new name, on Qdrant 1.16 or later."
            )
        return IndexFacts.from_json(metadata[_KEY])

    def missing(self, facts: IndexFacts, ids: Ids) -> npt.NDArray[np.int64]:
        """Return the positions of the ids that an interrupted build did not come to.

        Args:
            facts: Of the build that goes on; kept, for its shortlists and its k may be others.
            ids: All rows of that build.

        Raises:
            ValueError: If the collection is of another gallery.
            ManifestError: If something else made it.
        """
        there = self.facts()
        received, given = _identity(there), _identity(facts)
        if received != given:
            raise ValueError(
                "A build goes on where one with the same dims, metric and encoder stopped. "
                f"Received: {given} for collection {self.name!r} of {received}. "
                "Give another name, or delete the collection."
            )
        starts = range(0, len(ids), _IDS)
        found = np.concatenate([self.has(ids[start : start + _IDS]) for start in starts])
        others = self.count(exact=True) - int(found.sum())
        if others:
            raise ValueError(
                "A build goes on over its own rows alone. "
                f"Received: collection {self.name!r} with {others} rows whose ids are "
                "not among those given. Give them all, or open the collection and add to it."
            )
        if there != facts:
            with self._asking():
                self.client.update_collection(self.name, metadata={_KEY: facts.to_json()})
        return np.flatnonzero(~found)

    def count(self, allowed: Ids | None = None, *, exact: bool) -> int:
        """Return the number of rows, of those allowed; not exact is quick, and may be high."""
        with self._asking() as models:
            wanted = only(models, allowed)
            return self.client.count(self.name, count_filter=wanted, exact=exact).count

    def has(self, ids: Ids) -> npt.NDArray[np.bool_]:
        """Return for every id whether it is there."""
        with self._asking():
            found = self.client.retrieve(
                self.name, ids.tolist(), with_payload=False, with_vectors=False
            )
        return np.isin(ids, np.array([record.id for record in found], np.int64))

    def upsert(self, ids: Ids, vectors: Mapping[int, Vectors]) -> None:
        """Write rows, given by dim; those whose ids are there are replaced."""
        with self._asking() as models:
            named = {str(dim): rows.tolist() for dim, rows in vectors.items()}
            points = models.Batch(ids=ids.tolist(), vectors=named)
            self.client.upsert(self.name, points=points, wait=True)

    def delete(self, ids: Ids) -> None:
        """Remove rows; ids that are not there are passed over."""
        with self._asking() as models:
            points = models.PointIdsList(points=ids.tolist())
            self.client.delete(self.name, points_selector=points, wait=True)

    def search(
        self, stages: Sequence[Narrowing], allowed: Ids | None = None
    ) -> list[list[ScoredPoint]]:
        """Return what every query finds, best first.

        Args:
            stages: Of the funnel, first stage first.
            allowed: The only ids that may be found; None: all.
        """
        options = self.client.init_options
        is_local = options.get("path") is not None or options.get("location") == ":memory:"
        with self._asking() as models:
            # Local mode is exact, and warns of parameters; of those a caller gave it shall.
            exact = None if is_local else models.SearchParams(exact=True)
            requests = nested(models, stages, only(models, allowed), exact)
            answers = self.client.query_batch_points(self.name, requests)
        return [answer.points for answer in answers]

    @contextmanager
    def _asking(self) -> Iterator[Any]:
        """Yield `qdrant_client.models`; what Qdrant raises leaves as an error of ours."""
        qdrant = import_qdrant()
        import grpc
        from qdrant_client.common.client_exceptions import QdrantException
        from qdrant_client.http.exceptions import ApiException

        try:
            yield qdrant.models
        except (
            ApiException,
            QdrantException,
            grpc.RpcError,
            AssertionError,  # options that create_collection does not know
            RuntimeError,  # a client that is closed
            ValueError,  # all that local mode refuses
        ) as error:
            raise translated(error, self.name) from error


def import_qdrant() -> ModuleType:
    """Return the package.

    Raises:
        ImportError: If qdrant-client is not installed.

    Examples:
        >>> import_qdrant().__name__
        'qdrant_client'
    """
    try:
        import qdrant_client
    except ImportError as error:
        raise ImportError(
            "QdrantIndex needs qdrant-client. "
            f"Received: {error}. Install it: pip install 'keras-mrl[qdrant]'."
        ) from error
    return qdrant_client


def _identity(facts: IndexFacts) -> str:
    return (
        f"dims={facts.schedule.dims}, metric={facts.metric!r}, "
        f"encoder_fingerprint={facts.encoder_fingerprint!r}"
    )
