"""What the funnel is compared with: FAISS's own indexes over whole vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


@dataclass
class Rival:
    """An index, and the settings it is tried at.

    Args:
        name: Shown in the tables.
        settings: Tried in this order, from fast to exact.
        set_to: Sets one.
        search: Returns the ids of the `k` nearest to unit vectors `(batch, width)`.
        files: Where it lies on disk, for what opening it costs.
        build_s: Seconds it took.
        points: What was measured, by setting.
    """

    name: str
    settings: tuple[str, ...]
    set_to: Callable[[str], object]
    search: Callable[[Vectors, int], Ids]
    files: Path
    build_s: float
    points: dict[str, dict[str, Any]] = field(default_factory=dict)


FACTORIES: dict[str, tuple[str, int, str]] = {
    "exact": ("Flat", faiss.METRIC_INNER_PRODUCT, "none"),
    "HNSW32": ("HNSW32", faiss.METRIC_INNER_PRODUCT, "efSearch"),
    "HNSW32 SQ8": ("HNSW32_SQ8", faiss.METRIC_INNER_PRODUCT, "efSearch"),
    "HNSW32 Panorama": ("HNSW32_FlatPanorama", faiss.METRIC_L2, "efSearch"),
    "IVF": ("IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT, "nprobe"),
    "IVF Panorama": ("IVF{lists},FlatPanorama8", faiss.METRIC_INNER_PRODUCT, "nprobe"),
    "IVF RaBitQ": ("IVF{lists},RaBitQ,Refine(Flat)", faiss.METRIC_INNER_PRODUCT, "refined"),
    "IVF RaBitQ fast scan": (
        "IVF{lists},RaBitQfs,Refine(Flat)",
        faiss.METRIC_INNER_PRODUCT,
        "refined",
    ),
}
_EFFORTS = {
    "none": ("",),
    "efSearch": tuple(f"efSearch={ef}" for ef in (16, 32, 64, 128, 256, 512, 1024, 2048)),
    "nprobe": tuple(f"nprobe={n}" for n in (1, 2, 4, 8, 16, 32, 64, 128)),
    "refined": tuple(
        f"nprobe={n},k_factor={more}" for n in (2, 4, 8, 16, 32, 64) for more in (4, 16)
    ),
}


def rivals(
    gallery: Vectors,
    lists: int,
    folder: Path,
    timed: Callable[[Callable[[], Any]], float],
    only: list[str] | None = None,
) -> Iterator[Rival]:
    """Build FAISS's indexes over unit vectors, one after another."""
    for name, (factory, metric, effort) in FACTORIES.items():
        if only is not None and name not in only:
            continue
        index = faiss.index_factory(gallery.shape[1], factory.format(lists=lists), metric)
        sample = gallery[: min(len(gallery), 64 * lists)]
        seconds = timed(lambda index=index, sample=sample: index.train(sample))  # type: ignore[misc]
        seconds += timed(lambda index=index: index.add(gallery))  # type: ignore[misc]
        path = folder / f"{name.replace(' ', '_')}.faiss"
        faiss.write_index(index, str(path))
        yield Rival(name, _EFFORTS[effort], _setter(index), _searcher(index), path, seconds)


def _setter(index: Any) -> Callable[[str], object]:
    def set_to(settings: str) -> None:
        for setting in filter(None, settings.split(",")):
            name, _, value = setting.partition("=")
            if name == "k_factor":
                index.k_factor = float(value)
            elif isinstance(index, faiss.IndexRefine):
                faiss.extract_index_ivf(index.base_index).nprobe = int(value)
            else:
                faiss.ParameterSpace().set_index_parameter(index, name, float(value))

    return set_to


def _searcher(index: Any) -> Callable[[Vectors, int], Ids]:
    return lambda queries, k: index.search(queries, k)[1]
