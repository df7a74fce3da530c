"""A gallery in, a version that TensorFlow Serving serves out."""

from __future__ import annotations

from pathlib import Path

from keras_mrl_serving.index import ExactIndex

from .arguments import check_exact
from .place import checked_base_path, checked_name
from .publish import publishing


def export_index(
    index: ExactIndex, base_path: str | Path, *, name: str = "index", version: int | None = None
) -> Path:
    """Write a gallery as the next version under `base_path`: `search`, and `search_<m>` per dim.

    The funnel of the index runs inside the graph, its first stage over every row. The version is
    written under a name no server loads, asked for the neighbours of some of its rows, compared
    with `index`, and only then renamed to its number. A gallery of 2.1 GiB that was opened from its
    folder took 1.4 times that in memory, its mapped rows among it.

    Args:
        index: The gallery, built in memory or opened from a folder: `open_index(path)`.
        base_path: Folder of the index's versions; what `--model_base_path` names. No URL.
        name: Name in the manifest, of letters, digits, `_`, `.` and `-`.
        version: Number of the version; None takes the next. None is ever overwritten.

    Returns:
        The folder of the new version.

    Raises:
        TypeError: If `index` is no `ExactIndex`, or `name` no `str`.
        ValueError: If `version` is no number, or no model can be served as `name` or from
            `base_path`.
        FileExistsError: If `version` exists.
        ExportError: If what was written answers otherwise.

    Examples:
        ```
        version = export_index(open_index("birds.index"), "models/birds_index")
        Client("localhost:8500", "birds_index").search(embeddings)
        ```
    """
    folder, name = checked_base_path(base_path), checked_name(name)
    check_exact(index)
    from .index_build import build_index  # TensorFlow, which other backends need only for this

    with publishing(folder, version) as staged:
        build_index(index, name, staged.folder)
    return staged.published
