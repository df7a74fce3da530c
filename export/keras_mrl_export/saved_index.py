"""A gallery in, a version that TensorFlow Serving serves out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from keras_mrl_serving import contract
from keras_mrl_serving._session import SavedModelSession
from keras_mrl_serving.contract import Manifest
from keras_mrl_serving.index import ExactIndex
from keras_mrl_serving.version import __version__

from .index_graph import IndexGraph
from .parity import check_described, same_neighbors
from .publish import publishing
from .tolerance import TOLERANCE
from .tracing import describing

_QUERIES = 16  # gallery rows that both are asked


def export_index(
    index: ExactIndex, base_path: str | Path, *, name: str = "index", version: int | None = None
) -> Path:
    """Write a gallery as the next version under `base_path`: `search`, and `search_<m>` per dim.

    The funnel of the index runs inside the graph, its first stage over every row. The version is
    written under a name no server loads, asked for the neighbours of some of its rows, compared
    with `index`, and only then renamed to its number. Rows are copied in parts: an index that was
    opened from its folder is held once, one in memory twice.

    Args:
        index: The gallery, built in memory or opened from a folder: `open_index(path)`.
        base_path: Folder of the index's versions; what `--model_base_path` names.
        name: Name in the manifest.
        version: Number of the version; None takes the next. None is ever overwritten.

    Returns:
        The folder of the new version.

    Raises:
        TypeError: If `index` is no `ExactIndex`.
        ValueError: If `version` is no number.
        FileExistsError: If `version` exists.
        ExportError: If what was written answers otherwise.

    Examples:
        ```
        version = export_index(open_index("birds.index"), "models/birds_index")
        Client("localhost:8500", "birds_index").search(embeddings)
        ```
    """
    if not isinstance(index, ExactIndex):
        raise TypeError(
            "A gallery in the graph has an exact first stage, as ExactIndex has. "
            f"Received: {type(index).__name__}. "
            "Build one of the same embeddings: ExactIndex.build(gallery, schedule, ids)."
        )
    manifest = _manifest(index, name)
    with publishing(Path(base_path), version) as staged:
        _write(index, manifest, staged.folder)
        (staged.folder / contract.MANIFEST_FILE).parent.mkdir()
        (staged.folder / contract.MANIFEST_FILE).write_text(manifest.to_json() + "\n")
        _check(staged.folder, manifest, index)
    return staged.published


def _write(index: ExactIndex, manifest: Manifest, folder: Path) -> None:
    gallery = IndexGraph(index)
    held = tf.Module()
    held.state = gallery.variables()
    signatures = gallery.signatures()
    signatures[contract.SERVING_DEFAULT] = signatures[contract.SEARCH]
    signatures[contract.DESCRIBE] = describing(manifest)
    tf.saved_model.save(held, str(folder), signatures=signatures)


def _check(folder: Path, manifest: Manifest, index: ExactIndex) -> None:
    rows = np.unique(np.linspace(0, len(index) - 1, _QUERIES).astype(np.int64))
    queries = np.concatenate([block[rows] for block in index.blocks], axis=1)
    with SavedModelSession(folder) as session:

        def run(signature: str, inputs: Mapping[str, Any]) -> dict[str, npt.NDArray[Any]]:
            return session.run(signature, inputs)

        found = run(contract.SEARCH, {"embedding": queries})
        same_neighbors(contract.SEARCH, found, index, queries, TOLERANCE)
        check_described(run, manifest)


def _manifest(index: ExactIndex, name: str) -> Manifest:
    schedule = index.schedule
    spec = {"dtype": "float32", "shape": [None, index.width]}
    return Manifest(
        name=name,
        kind="index",
        fingerprint=_fingerprint(index),
        encoder_fingerprint=index.encoder_fingerprint,
        dims=schedule.dims,
        width=index.width,
        inputs={"embedding": spec},
        normalize=False,
        metric=index.metric,
        funnel=schedule.to_json(),
        size=len(index),
        made_with={"keras_mrl": __version__, "tensorflow": tf.__version__},
    )


def _fingerprint(index: ExactIndex) -> str:
    """SHA-256 of the schedule, the metric, the encoder, the ids and every row."""
    digest = hashlib.sha256(json.dumps(index.facts.to_json()).encode())
    for array in (index.ids, *index.blocks):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
