"""Opens a saved index, whichever engine wrote it."""

from __future__ import annotations

import os

from ..errors import ManifestError
from ..funnel import FunnelSchedule
from . import exact, faiss
from .storage import SavedFiles, open_saved


def open_index(
    path: str | os.PathLike[str], schedule: FunnelSchedule | None = None, *, verify: bool = True
) -> exact.ExactIndex | faiss.FaissIndex:
    """Return the index in a folder, memory-mapped.

    Args:
        path: The folder.
        schedule: Another funnel than it was built with; see `ExactIndex.open` and
            `FaissIndex.open` for what they can do without a new build.
        verify: Compare every byte with the digests written beside it, which reads it once.

    Raises:
        FileNotFoundError: If no index is there.
        DamagedIndexError: If it is not as it was written.
        ManifestError: If a later version of keras-mrl wrote it.
        ValueError: If the schedule does not fit.

    Examples:
        >>> import tempfile
        >>> from keras_mrl_serving import ExactIndex, FunnelSchedule
        >>> folder = tempfile.mkdtemp()
        >>> ExactIndex.build(np.eye(4), FunnelSchedule((2, 4), (3,), 1)).save(folder)
        >>> open_index(folder).search(np.eye(4)[:1]).ids.tolist()
        [[0]]
    """
    return open_saved(path, lambda saved: _index_of(saved, schedule), verify=verify)


def _index_of(
    saved: SavedFiles, schedule: FunnelSchedule | None
) -> exact.ExactIndex | faiss.FaissIndex:
    engine = saved.card.get("engine")
    if engine == exact.ENGINE:
        return exact.ExactIndex.from_saved(saved, schedule)
    if engine == faiss.ENGINE:
        return faiss.FaissIndex.from_saved(saved, schedule)
    raise ManifestError(
        f'An index is of the engine "{exact.ENGINE}" or "{faiss.ENGINE}". '
        f"Received: {engine!r}. "
        "Install the version of keras-mrl that wrote it, or a later one."
    )
