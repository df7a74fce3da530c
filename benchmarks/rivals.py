"""What the funnel is compared with: FAISS's own indexes over whole vectors, and Intel's."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from keras_mrl_serving import FirstStage, FunnelSchedule

Vectors = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

PER_LIST = 64  # rows a list is learned from, a quarter of FAISS's most, to build in minutes
_GRAPH = (12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384)
_LISTS = (4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 256)
_FACTORS = (1.5, 2, 3, 4, 6, 8, 12, 16, 24)
_FINE_FACTORS = (1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 10, 12, 14, 16, 18, 20, 24, 28, 32, 40, 48, 64)
# Each group from fast to exact: what follows one that reaches every target is slower.
_EFFORTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "graph": (tuple(f"efSearch={ef}" for ef in _GRAPH),),
    "lists": (tuple(f"nprobe={n}" for n in _LISTS),),
    "refined graph": tuple(tuple(f"efSearch={ef},k_factor={k}" for ef in _GRAPH) for k in _FACTORS),
    "refined lists": tuple(tuple(f"nprobe={n},k_factor={k}" for n in _LISTS) for k in _FACTORS),
    "refined": (tuple(f"k_factor={k}" for k in _FINE_FACTORS),),
}
FACTORIES: dict[str, tuple[str, str]] = {
    "HNSW32": ("HNSW32", "graph"),
    "HNSW32 SQ8, refined": ("HNSW32_SQ8", "refined graph"),
    "IVF PQ fast scan, refined": ("IVF{lists},PQ{half}x4fs", "refined lists"),
    "PQ fast scan, refined": ("PQ{half}x4fs", "refined"),
    "IVF RaBitQ, refined": ("IVF{lists},RaBitQ", "refined lists"),
    "IVF RaBitQ fast scan, refined": ("IVF{lists},RaBitQfs", "refined lists"),
    "PCA{width}, IVF Panorama": ("PCA{width},IVF{lists},FlatPanorama8_64", "lists"),
    "PCA{width}, HNSW32 Panorama": ("PCA{width},HNSW32_FlatPanorama8", "graph"),
    "PCA{cut}, HNSW32, refined": ("PCA{cut},HNSW32", "refined graph"),
    "PCA{cut}, HNSW32 SQ8, refined": ("PCA{cut},HNSW32_SQ8", "refined graph"),
    "PCA{cut}, PQ fast scan, refined": ("PCA{cut},PQ{half_cut}x4fs", "refined"),
    "OPQ{cut}, PQ fast scan, refined": ("OPQ{half_cut}_{cut},PQ{half_cut}x4fs", "refined"),
    "PCA{cut}, IVF Panorama, refined": ("PCA{cut},IVF{lists},FlatPanorama8_64", "refined lists"),
    "PCA{cut}, IVF PQ fast scan, refined": (
        "PCA{cut},IVF{lists},PQ{half_cut}x4fs",
        "refined lists",
    ),
    "PCA{cut}, IVF RaBitQ, refined": ("PCA{cut},IVF{lists},RaBitQ", "refined lists"),
    "OPQ{cut}, IVF PQ fast scan, refined": (
        "OPQ{half_cut}_{cut},IVF{lists},PQ{half_cut}x4fs",
        "refined lists",
    ),
}


@dataclass(eq=False)
class Rival:
    """An index, and the settings it is tried at.

    Args:
        name: Shown in the tables.
        settings: Groups of those that are tried, each from fast to exact.
        set_to: Sets one.
        search: Returns the ids of the `k` nearest to unit vectors `(batch, width)`.
        files: Where it lies on disk, for what opening it costs.
        build_s: Processor seconds it took.
        plan: Of a funnel of ours.
    """

    name: str
    settings: tuple[tuple[str, ...], ...]
    set_to: Callable[[str], object]
    search: Callable[[Vectors, int], Ids]
    files: Path
    build_s: float
    plan: Any = None

    def let_go(self) -> None:
        """Let go of the index; its files stay."""
        del self.search, self.set_to


def rival_of(name: str, factory: str, effort: str, gallery: Vectors, path: Path) -> Rival:
    """Build an index of FAISS's, or read the one that was built before.

    Raises:
        RuntimeError: If FAISS cannot make it.
    """
    began = time.process_time()
    if not path.exists():
        faiss.omp_set_num_threads(1)
        # Between unit vectors distances order as products do, and this graph has distances alone.
        is_l2 = "HNSW32_FlatPanorama" in factory
        metric = faiss.METRIC_L2 if is_l2 else faiss.METRIC_INNER_PRODUCT
        made = faiss.index_factory(gallery.shape[1], factory, metric)
        lists = faiss.try_extract_index_ivf(made)
        if lists is not None:
            lists.cp.max_points_per_centroid = PER_LIST
        made.train(gallery)
        made.add(gallery)
        faiss.write_index(made, f"{path}.part")
        os.replace(f"{path}.part", path)  # whole, for another run that looks for it
    seconds = time.process_time() - began
    base = faiss.read_index(str(path))
    is_refined = "refined" in effort
    index: Any
    if is_refined:
        rows = faiss.IndexFlatIP(gallery.shape[1])
        rows.add(gallery)
        index = faiss.IndexRefine(base, rows)
    else:
        rows, index = None, base

    def set_to(settings: str) -> None:
        for setting in settings.split(","):
            key, _, value = setting.partition("=")
            if key == "k_factor":
                index.k_factor = float(value)
            else:
                faiss.ParameterSpace().set_index_parameter(base, key, float(value))

    # FAISS frees what Python no longer holds.
    def search(queries: Vectors, k: int, parts: Any = (base, rows)) -> Ids:
        del parts
        return np.asarray(index.search(queries, k)[1])

    return Rival(name, _EFFORTS[effort], set_to, search, path, seconds)


def over_prefixes(folder: Path, schedule: FunnelSchedule, spec: FirstStage) -> Rival:
    """Return the same funnel out of FAISS's own parts, over the first stage that we saved."""
    base: Any = faiss.read_index(str(next(folder.glob("first-*.faiss"))))
    if spec.settings:
        for setting in spec.settings.split(","):
            key, _, value = setting.partition("=")
            faiss.ParameterSpace().set_index_parameter(base, key, float(value))
    index, parts, dim = base, [base], schedule.dims[0]
    sizes = (*schedule.shortlists, schedule.k)
    for wider, size, next_size in zip(schedule.dims[1:], sizes, sizes[1:], strict=False):
        if wider != dim:
            remap = faiss.RemapDimensionsTransform(wider, dim, False)  # type: ignore[arg-type]
            index = faiss.IndexPreTransform(remap, index)
            parts += [remap, index]
        rows = faiss.IndexFlatIP(wider)
        rows.add(np.load(next(folder.glob(f"rows_{wider}-*.npy"))))
        index = faiss.IndexRefine(index, rows)
        index.k_factor = (size + 0.5) / next_size
        parts += [rows, index]
        dim = wider

    def search(queries: Vectors, k: int, parts: Any = parts) -> Ids:
        del parts
        return np.asarray(index.search(queries, k)[1])

    return Rival("FAISS's own funnel", (("",),), lambda _: None, search, Path(), 0.0)


def hnswlib_rival(folder: Path, gallery: Vectors) -> Rival:
    """Build hnswlib's graph, with as many neighbours a row as FAISS's HNSW32."""
    sys.path.insert(0, str(folder))
    import hnswlib  # type: ignore[import-untyped]

    began = time.process_time()
    index = hnswlib.Index(space="ip", dim=gallery.shape[1])
    index.init_index(len(gallery), ef_construction=100, M=32, random_seed=0)
    index.set_num_threads(1)
    index.add_items(gallery)
    seconds = time.process_time() - began

    def set_to(setting: str) -> None:
        index.set_ef(int(setting.partition("=")[2]))

    def search(queries: Vectors, k: int) -> Ids:
        return np.asarray(index.knn_query(queries, k)[0], np.int64)

    settings = tuple(f"ef={size}" for size in _GRAPH)
    return Rival("hnswlib", (settings,), set_to, search, Path(), seconds)


def svs_rival(folder: Path, gallery: Vectors) -> Rival:
    """Build Intel's graph, over 8-bit codes (LVQ8) on Intel's processors, else over float16.

    Asked for its codes elsewhere the library ends the process.
    """
    sys.path.insert(0, str(folder))
    import svs  # type: ignore[import-not-found]

    kind = "LVQ8" if "GenuineIntel" in Path("/proc/cpuinfo").read_text() else "float16"
    began = time.process_time()
    parameters = svs.VamanaBuildParameters(
        graph_max_degree=64, window_size=128, alpha=0.95, prune_to=60
    )
    with tempfile.TemporaryDirectory() as scratch:
        rows: Any = gallery.astype(np.float16)
        if kind == "LVQ8":
            file = str(Path(scratch) / "rows.fvecs")
            svs.write_vecs(gallery, file)
            loader = svs.VectorDataLoader(file, svs.DataType.float32)
            rows = svs.LVQLoader(loader, primary=8)
        index = svs.Vamana.build(parameters, rows, svs.DistanceType.MIP, num_threads=1)
    seconds = time.process_time() - began

    def set_to(setting: str) -> None:
        index.search_window_size = int(setting.partition("=")[2])

    def search(queries: Vectors, k: int) -> Ids:
        return np.asarray(index.search(queries, k)[0], np.int64)

    settings = tuple(f"{kind}, window={size}" for size in _GRAPH)
    return Rival("SVS", (settings,), set_to, search, Path(), seconds)
