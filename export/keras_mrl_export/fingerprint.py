"""What an encoder is known by: equal only where `embed_<m>` answers alike."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np

from .job import Job

_ASSETS = "assets/"  # in a .keras file: vocabularies that layers learned


def fingerprint_of(
    model: keras.Model, saved: Path, inputs: Mapping[str, Mapping[str, Any]], job: Job
) -> str:
    """Return the SHA-256 of all that makes an embedding out of an input.

    That is the configuration, every weight in the model's own order, what layers keep besides
    weights (vocabularies, document frequencies), and how the model is served: its decoder, whether
    embeddings are scaled, and the types its inputs are cast to. Dims, labels and a cascade change
    no embedding; code of the user's own layers has no form that is the same in every process.

    Args:
        model: The model as it is served.
        saved: The `.keras` file it was loaded from.
        inputs: Those of the manifest.
        job: How it is served.
    """
    digest = hashlib.sha256(model.to_json(sort_keys=True).encode())
    served = {
        "decoder": None if job.decoder is None else job.decoder.to_json(),
        "normalize": bool(job.normalize),
        "dtypes": [inputs[name]["dtype"] for name in sorted(inputs)],
    }
    digest.update(json.dumps(served, sort_keys=True).encode())
    values = [keras.ops.convert_to_numpy(variable) for variable in model.variables]
    for value in (*values, *_kept_besides(model)):
        digest.update(f"{value.dtype}{value.shape}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    with zipfile.ZipFile(saved) as archive:
        for name in sorted(archive.namelist()):
            if name.startswith(_ASSETS):
                digest.update(f"{name}\n".encode())
                digest.update(archive.read(name))
    return digest.hexdigest()


def _kept_besides(model: keras.Model) -> list[Any]:
    """What layers with a store of their own write there, such as the weights of TF-IDF."""
    kept = []
    for layer in model._flatten_layers():
        if type(layer).save_own_variables is not keras.Layer.save_own_variables:
            store: dict[str, Any] = {}
            layer.save_own_variables(store)
            kept += [np.asarray(store[key]) for key in sorted(store)]
    return kept
