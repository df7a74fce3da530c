"""Real rows for every signature, made of the caller's sample: to compare, and to warm up with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_mrl_serving import contract
from keras_mrl_serving.contract import Manifest

from .job import Job

Arrays = Mapping[str, npt.NDArray[Any]]


def sample_as_served(manifest: Manifest, job: Job) -> Arrays:
    """Return the caller's sample in the dtypes of the signatures' inputs."""
    dtypes = {name: spec["dtype"] for name, spec in manifest.inputs.items()}
    return {
        name: np.asarray(job.sample[name], dtype=object if dtype == "string" else dtype)
        for name, dtype in dtypes.items()
    }


def examples(manifest: Manifest, job: Job) -> dict[str, Arrays]:
    """Return inputs for every signature that is written, `describe` and the default included."""
    sample = sample_as_served(manifest, job)
    prefixes = {contract.SEARCH: manifest.width}
    for dim in {*manifest.dims, *(job.index.schedule.dims if job.index else ())}:
        prefixes |= {contract.head(dim): dim, contract.search(dim): dim}
    found: dict[str, Arrays] = {}
    for name in (*job.signatures, contract.SERVING_DEFAULT):
        if name in prefixes:
            rows = np.ascontiguousarray(job.features[:, : prefixes[name]])
            is_head = name == contract.head(prefixes[name])
            found[name] = {"features" if is_head else "embedding": rows}
        else:
            found[name] = sample
    found[contract.DESCRIBE] = {"key": np.array([b""], dtype=object)}
    return found
