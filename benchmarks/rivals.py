"""What the funnel is compared with: FAISS's own indexes over whole vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
from galleries import Vectors

from keras_mrl_serving.index.first_stage import lists_for

Ids = npt.NDArray[np.int64]


@dataclass(eq=False)
class Rival:
    """An index, and the settings it is tried at.

    Args:
        name: Shown in the tables.
        settings: Tried in this order, from fast to exact.
        set_to: Sets one.
        search: Returns the ids of the `k` nearest to unit vectors `(batch, width)`.
        files: Where it lies on disk, for what opening it costs.
        build_s: Seconds it took.
        plan: Of a funnel of ours.
        planned_s: Seconds that took.
        points: What was measured, by setting.
    """

    name: str
    settings: tuple[str, ...]
    set_to: Callable[[str], object]
    search: Callable[[Vectors, int], Ids]
    files: Path
    build_s: float
    plan: Any = None
    planned_s: float = 0.0
    points: dict[str, dict[str, Any]] = field(default_factory=dict)

    def drop(self) -> None:
        """Let go of the index and its file; what was measured stays."""
        del self.search, self.set_to
        if self.files.is_file():
            self.files.unlink()


FACTORIES: dict[str, tuple[str, int, str]] = {
    "exact": ("Flat", faiss.METRIC_INNER_PRODUCT, "none"),
    "HNSW32": ("HNSW32", faiss.METRIC_INNER_PRODUCT, "efSearch"),
    "HNSW32 SQ8": ("HNSW32_SQ8", faiss.METRIC_INNER_PRODUCT, "efSearch"),
    "HNSW32 SQ8, refined": ("HNSW32_SQ8,RFlat", faiss.METRIC_INNER_PRODUCT, "refined graph"),
    "HNSW32 Panorama": ("HNSW32_FlatPanorama", faiss.METRIC_L2, "efSearch"),
    "IVF": ("IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT, "nprobe"),
    "IVF Panorama": ("IVF{lists},FlatPanorama8_64", faiss.METRIC_INNER_PRODUCT, "nprobe"),
    "IVF RaBitQ, refined": ("IVF{lists},RaBitQ,RFlat", faiss.METRIC_INNER_PRODUCT, "refined lists"),
    "IVF RaBitQ fast scan, refined": (
        "IVF{lists},RaBitQfs,RFlat",
        faiss.METRIC_INNER_PRODUCT,
        "refined lists",
    ),
}
PER_LIST = 64  # rows a list is learned from, a quarter of FAISS's most, to build in minutes
_GRAPH = (12, 16, 20, 24, 32, 40, 48, 64, 96, 128, 192, 256, 512, 1024)
_LISTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
_EFFORTS = {
    "none": ("",),
    "efSearch": tuple(f"efSearch={ef}" for ef in _GRAPH),
    "nprobe": tuple(f"nprobe={n}" for n in _LISTS),
    "refined graph": tuple(f"efSearch={ef},k_factor={k}" for ef in _GRAPH for k in (2, 4)),
    "refined lists": tuple(f"nprobe={n},k_factor={k}" for n in _LISTS[2:] for k in (4, 16)),
}


def rivals(
    gallery: Vectors,
    folder: Path,
    timed: Callable[[Callable[[], Any]], float],
    only: set[str] | None = None,
) -> Iterator[Rival]:
    """Build FAISS's indexes over unit vectors, each when the one before it may be dropped."""
    lists = lists_for(len(gallery))
    for name, (factory, metric, effort) in FACTORIES.items():
        if only is not None and name not in only:
            continue
        index = faiss.index_factory(gallery.shape[1], factory.format(lists=lists), metric)
        sample = gallery[: min(len(gallery), PER_LIST * lists)]
        seconds = timed(lambda index=index, sample=sample: index.train(sample))  # type: ignore[misc]
        seconds += timed(lambda index=index: index.add(gallery))  # type: ignore[misc]
        path = folder / f"{name.replace(' ', '_')}.faiss"
        faiss.write_index(index, str(path))
        efforts, setter, searcher = _EFFORTS[effort], _setter(index), _searcher(index)
        del index  # the rival alone holds it
        yield Rival(name, efforts, setter, searcher, path, seconds)
        del setter, searcher


def over_prefixes(
    gallery: Vectors, schedule: Any, spec: Any, timed: Callable[[Callable[[], Any]], float]
) -> Rival:
    """Build a funnel of two stages out of FAISS's own parts, all of it in memory."""
    width, dim = gallery.shape[1], schedule.dims[0]
    first = faiss.index_factory(dim, spec.factory, faiss.METRIC_INNER_PRODUCT)
    cut = faiss.IndexPreTransform(faiss.NormalizationTransform(dim), first)
    remap = faiss.RemapDimensionsTransform(width, dim, False)  # type: ignore[arg-type]
    cut.prepend_transform(remap)
    index = faiss.IndexRefineFlat(cut)
    seconds = timed(lambda: (index.train(gallery), index.add(gallery)))
    index.k_factor = schedule.shortlists[0] / schedule.k
    faiss.ParameterSpace().set_index_parameters(first, spec.settings)
    name = f"FAISS's own funnel, {spec.factory} {dim} -> {width}"

    # FAISS frees what Python no longer holds.
    def search(queries: Vectors, k: int, parts: Any = (cut, first, remap)) -> Ids:
        del parts
        return np.asarray(index.search(queries, k)[1])

    return Rival(name, (spec.settings,), lambda _: None, search, Path(), seconds)


def _setter(index: Any) -> Callable[[str], object]:
    def set_to(settings: str) -> None:
        for setting in filter(None, settings.split(",")):
            name, _, value = setting.partition("=")
            if name == "k_factor":
                index.k_factor = float(value)
            else:
                base = index.base_index if isinstance(index, faiss.IndexRefine) else index
                faiss.ParameterSpace().set_index_parameter(base, name, float(value))

    return set_to


def _searcher(index: Any) -> Callable[[Vectors, int], Ids]:
    return lambda queries, k: index.search(queries, k)[1]
