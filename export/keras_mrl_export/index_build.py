"""A gallery as a SavedModel: written, described, and compared with the index it is of."""

from __future__ import annotations

import gc
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
from .mapped import forget
from .neighbors import QUERIES, check_searches
from .parity import check_described
from .tracing import describing
from .warmup import write_warmup


def build_index(index: ExactIndex, name: str, folder: Path) -> None:
    """Write `index` to `folder`.

    Raises:
        ExportError: If what was written answers otherwise.
    """
    manifest = _manifest(index, name)
    _write(index, manifest, folder)
    gc.collect()  # functions hold their variables in cycles, and the rows are loaded once more
    (folder / contract.MANIFEST_FILE).parent.mkdir()
    (folder / contract.MANIFEST_FILE).write_text(manifest.to_json() + "\n")
    _check(folder, manifest, index)


def _write(index: ExactIndex, manifest: Manifest, folder: Path) -> None:
    gallery = IndexGraph(index)
    held = tf.Module()
    held.state = gallery.variables()
    signatures = gallery.signatures()
    signatures[contract.SERVING_DEFAULT] = signatures[contract.SEARCH]
    signatures[contract.DESCRIBE] = describing(manifest)
    tf.saved_model.save(held, str(folder), signatures=signatures)


def _check(folder: Path, manifest: Manifest, index: ExactIndex) -> None:
    rows = np.unique(np.linspace(0, len(index) - 1, QUERIES).astype(np.int64))
    queries = np.concatenate([block[rows] for block in index.blocks], axis=1)
    widths = {contract.SEARCH: index.width, contract.SERVING_DEFAULT: index.width}
    widths |= {contract.search(dim): dim for dim in index.schedule.dims}
    inputs = {name: {"embedding": queries[:, :width]} for name, width in widths.items()}
    with SavedModelSession(folder) as session:

        def run(signature: str, inputs: Mapping[str, Any]) -> dict[str, npt.NDArray[Any]]:
            return session.run(signature, inputs)

        check_searches(run, index, queries, widths)
        check_described(run, manifest)
        write_warmup(folder, session, manifest.name, inputs, (1,))


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
    arrays: tuple[npt.NDArray[Any], ...] = (index.ids, *index.blocks)
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
        forget(array)
    return digest.hexdigest()
