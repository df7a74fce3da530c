"""The work of `index build`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import numpy.typing as npt

from keras_mrl_serving import ExactIndex, FaissIndex, FirstStage, FunnelSchedule, Manifest
from keras_mrl_serving.index.base import check_ids
from keras_mrl_serving.index.first_stage import import_faiss

from ..asking import RefusalError
from ..asking.files import load_array
from ..asking.printing import print_json
from ..asking.progress import Progress
from ..asking.server import described
from .build import is_planned
from .places import check_out, check_room
from .planning import planned
from .reading import load_embeddings
from .refusing import refusing
from .showing import print_index, read_index

Funnel = tuple[FunnelSchedule, FirstStage | None, dict[str, Any] | None]

_BYTES = 4  # of a coordinate


def build(arguments: argparse.Namespace) -> int:
    """Choose a funnel, or take the one that is given, build its index and say what it is."""
    first = _first_stage(arguments)
    with refusing():
        check_out(arguments.out, arguments.force)
        if arguments.engine == "faiss":
            import_faiss()
        gallery = load_embeddings("--embeddings", arguments.embeddings)
        ids = None if arguments.ids is None else load_array(arguments.ids)
        check_ids(ids, len(gallery))
        manifest = None if arguments.target is None else _encoder(arguments, gallery)
        funnel = _planned if is_planned(arguments) else _given
        schedule, spec, plan = funnel(arguments, gallery, manifest, first)
        _check_room(arguments, gallery, schedule)
        fingerprint = arguments.fingerprint if manifest is None else manifest.fingerprint
        known = (schedule, ids, arguments.metric, fingerprint)
        start = time.perf_counter()
        if arguments.engine == "exact":
            ExactIndex.build(gallery, *known).save(arguments.out)
        else:
            with _Passes() as progress:
                FaissIndex.build(
                    gallery,
                    *known,
                    first_stage=spec,
                    path=arguments.out,
                    progress=progress,
                    plan=plan,
                )
        seconds = time.perf_counter() - start
        index = read_index(arguments.out, verify=False)
    if arguments.json:
        print_json(**index, seconds=round(seconds, 3))
    else:
        print_index(index)
        print(f"  built in     {seconds:.1f} s")
    return 0


def _first_stage(arguments: argparse.Namespace) -> FirstStage | None:
    factory, settings = arguments.first_stage, arguments.settings
    if factory is None:
        return None
    if settings is None:
        usual = FirstStage.least if is_planned(arguments) else FirstStage.usual
        return usual(factory)
    with refusing(status=2):
        return FirstStage(factory, settings)


def _encoder(arguments: argparse.Namespace, gallery: npt.NDArray[Any]) -> Manifest:
    manifest = described(arguments)
    width = gallery.shape[1]
    if width not in (*manifest.dims, manifest.width):
        raise RefusalError(
            "A gallery is of a model's embeddings, as wide as one of its dims. "
            f"Received: {arguments.embeddings} of width {width} for model {manifest.name!r} with "
            f"{', '.join(map(str, manifest.dims))}. "
            "Embed it with `keras-mrl embed --out`, or name the model it is of."
        )
    return manifest


def _planned(
    arguments: argparse.Namespace,
    gallery: npt.NDArray[Any],
    manifest: Manifest | None,
    first: FirstStage | None,
) -> Funnel:
    dims: Sequence[int] | None = arguments.dims
    if manifest is not None:
        if dims is None:
            dims = [dim for dim in manifest.dims if dim <= gallery.shape[1]]
        manifest.check_dim(dims[-1])  # at which the queries will be embedded
    plan, kept = planned(arguments, gallery, dims, first)
    if not arguments.json:
        print(plan.table(), flush=True)
    return plan.schedule, plan.first_stage, kept


def _given(
    arguments: argparse.Namespace,
    gallery: npt.NDArray[Any],
    manifest: Manifest | None,
    first: FirstStage | None,
) -> Funnel:
    dims = arguments.dims or (gallery.shape[1],)
    with refusing(status=2):
        schedule = FunnelSchedule(dims, arguments.shortlists or (), arguments.k)
    if manifest is not None:
        manifest.check_dim(schedule.dims[-1])
    return schedule, first, None


def _check_room(
    arguments: argparse.Namespace, gallery: npt.NDArray[Any], schedule: FunnelSchedule
) -> None:
    columns = schedule.dims[-1] if arguments.engine == "exact" else sum(schedule.dims)
    check_room(arguments.out, len(gallery) * columns * _BYTES)


class _Passes:
    """A progress line for each time the rows are gone over."""

    def __init__(self) -> None:
        self._line: Progress | None = None
        self._last = 0

    def __call__(self, done: int, rows: int) -> None:
        if self._line is None or done <= self._last:
            self._clear()
            self._line = Progress(lambda: rows)
        self._line.show(done)
        self._last = done

    def _clear(self) -> None:
        if self._line is not None:
            self._line.clear()

    def __enter__(self) -> _Passes:
        return self

    def __exit__(self, *_: object) -> None:
        self._clear()
