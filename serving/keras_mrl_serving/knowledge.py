"""What a client has learned of the versions of its model."""

from __future__ import annotations

from typing import Any

from .calls import AskManifest, AskSignatures

_MOST_KEPT = 8  # more than two versions at once are rare


class Knowledge:
    """Manifests and signatures by version; any number of threads may share one.

    Attributes:
        version: The last that answered a call to the newest; None before the first answer.

    Examples:
        >>> from keras_mrl_serving.calls import AskSignatures
        >>> knowledge = Knowledge()
        >>> knowledge.keep(AskSignatures(), 3, {"embed_8": ...})
        >>> knowledge.of(AskSignatures(), 3)
        {'embed_8': Ellipsis}
        >>> knowledge.of(AskSignatures()) is None  # nothing has answered yet
        True
    """

    def __init__(self) -> None:
        self.version: int | None = None
        self._kept: dict[tuple[type, int], Any] = {}

    def of(self, about: AskManifest | AskSignatures, version: int | None = None) -> Any:
        """Return what is kept about a version, or about the last that answered; None if nothing."""
        version = self.version if version is None else version
        return None if version is None else self._kept.get((type(about), version))

    def keep(self, about: AskManifest | AskSignatures, version: int | None, known: object) -> None:
        """Remember what a version said of itself."""
        if version is None:
            return
        if len(self._kept) >= _MOST_KEPT:
            self._kept = {}
        self._kept[type(about), version] = known
