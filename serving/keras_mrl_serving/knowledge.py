"""What a client remembers of its model: manifests and signatures, by the model that has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from .calls import AskManifest, AskSignatures


class Identity(NamedTuple):
    """Which model answered. A version number is no identity: two models may bear the same one.

    Args:
        version: Its version.
        model_id: The `model_id` that all rows of the answer carried; None if they carried none,
            0 if they carried several.

    Examples:
        >>> print(Identity(3, 5), "|", Identity(3, 0), "|", Identity(3))
        version 3 with model_id 5 | version 3 with several model_ids | version 3 without a model_id
    """

    version: int
    model_id: int | None = None

    def __str__(self) -> str:
        if self.model_id is None:
            return f"version {self.version} without a model_id"
        id_ = f"model_id {self.model_id}" if self.model_id else "several model_ids"
        return f"version {self.version} with {id_}"


class Knowledge:
    """The manifests and the signatures a client has read; threads may share it.

    A manifest that names a `model_id` is remembered by it, so it never stands for another model.
    All else is remembered by the number of the version alone, and forgotten once another connection
    was made: there may be another server at its end, with another model of that number.

    Args:
        connections: Returns how many connections were made so far.

    Attributes:
        version: The version that last answered a call to the newest; None before the first answer.
        connections: Returns how many connections were made so far.

    Examples:
        >>> knowledge = Knowledge()
        >>> knowledge.put(AskSignatures(), Identity(3), {"embed_8": ...}, connections=0)
        >>> knowledge.get(AskSignatures(), Identity(3))
        {'embed_8': Ellipsis}
        >>> knowledge.get(AskSignatures()) is None  # nothing has answered yet
        True
    """

    def __init__(self, connections: Callable[[], int] = lambda: 0) -> None:
        self.version: int | None = None
        self.connections = connections
        self._model_ids: dict[int, int | None] = {}  # of each version, as it last answered
        self._facts: dict[tuple[type, Identity], tuple[int, Any]] = {}

    def get(self, request: AskManifest | AskSignatures, identity: Identity | None = None) -> Any:
        """Return the facts about a model; None takes the last that answered. None if unknown."""
        if identity is None:
            if self.version is None:
                return None
            identity = Identity(self.version, self._model_ids.get(self.version))
        key = _key(request, identity)
        connections, facts = self._facts.get(key, (0, None))
        is_sure = key[1].model_id is not None or connections == self.connections()
        return facts if is_sure else None

    def put(
        self,
        request: AskManifest | AskSignatures,
        identity: Identity,
        facts: object,
        connections: int,
    ) -> None:
        """Remember what a model answered to a request.

        Args:
            request: The request.
            identity: The model.
            facts: The answer.
            connections: How many connections were made before the request was sent: the one that
                carried the answer may be lost, and made anew, before the answer is remembered.
        """
        if len(self._facts) >= _MOST_FACTS:
            self._facts = {}
            self._model_ids = {}
        self._facts[_key(request, identity)] = (connections, facts)
        if isinstance(request, AskManifest):
            self._model_ids[identity.version] = identity.model_id

    def answered(self, identity: Identity, is_identified: bool) -> None:
        """Note the model that answered a call to the newest version.

        Args:
            identity: The model.
            is_identified: Whether the call was made by a manifest; if not, the id is unknown.
        """
        self.version = identity.version
        if is_identified:
            self._model_ids[identity.version] = identity.model_id or None


_MOST_FACTS = 8  # more than two models at once are rare


def _key(request: AskManifest | AskSignatures, identity: Identity) -> tuple[type, Identity]:
    is_manifest = isinstance(request, AskManifest)
    return type(request), identity if is_manifest else Identity(identity.version)
