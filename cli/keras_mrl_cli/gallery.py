"""From a gallery's embeddings to a saved index, and from a saved index to its description."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_mrl_serving import ExactIndex, FaissIndex, FirstStage, FunnelSchedule, Manifest
from keras_mrl_serving.errors import KerasMrlError, TargetNotReachedError
from keras_mrl_serving.index.facts import IndexFacts
from keras_mrl_serving.index.first_stage import import_faiss
from keras_mrl_serving.index.ids import check_ids
from keras_mrl_serving.index.plan import (
    Measure,
    Plan,
    average_precision_by_label,
    precision_by_label,
    table,
)
from keras_mrl_serving.index.planner import LEAST_SAMPLE, plan_funnel
from keras_mrl_serving.index.storage import CARD, IndexWriter, is_ours, read
from keras_mrl_serving.projection import Projection
from keras_mrl_serving.prompts import check_gallery_prompt

from .adapt import PROJECTED
from .client import connect, in_flags
from .files import load_embeddings, load_ids, load_labels
from .output import Progress, in_bytes, print_json, print_line, print_lines, print_note
from .shared import DONE, MISUSED, RefusalError, refusing_index_errors

Array = npt.NDArray[Any]
# The schedule, the first stage of FAISS, and what is kept of the plan beside the index.
Funnel = tuple[FunnelSchedule, FirstStage | None, dict[str, Any] | None]

_COORDINATE_BYTES = 4


def build_index(arguments: SimpleNamespace, is_planned: bool, usual_sample: int) -> int:
    """Choose a funnel or take the one of the flags, build its index and print what it is.

    Args:
        arguments: Of `index build`.
        is_planned: Whether the funnel is chosen by measurement.
        usual_sample: Rows of the gallery that a plan measures by, if there are ten times as many.
    """
    first_stage = _first_stage(arguments, is_planned)
    with refusing_index_errors():
        _check_out(arguments.out, arguments.force)
        if arguments.engine == "faiss":
            import_faiss()
        projection = None
        if arguments.adaptor is not None:
            projection = Projection.load(arguments.adaptor)
            arguments.fingerprint = projection.fingerprint
            arguments.embeddings = os.path.join(arguments.adaptor, PROJECTED)
        gallery = load_embeddings("--embeddings", arguments.embeddings)
        ids = None if arguments.ids is None else load_ids(arguments.ids)
        check_ids(ids, len(gallery))
        manifest = None if arguments.target is None else _encoder(arguments, gallery)
        if is_planned:
            funnel = _planned_funnel(
                arguments, gallery, manifest, first_stage, usual_sample, projection
            )
        else:
            funnel = _named_funnel(arguments, gallery, manifest, first_stage)
        try:
            seconds = _build(arguments, gallery, ids, manifest, funnel)
        except FileExistsError:  # one that was built meanwhile
            _check_out(arguments.out, arguments.force)
            raise
        index = _read(arguments.out, verify=False)
    if arguments.json:
        print_json(**index, seconds=round(seconds, 3))
    else:
        _print(index)
        print_line(f"  built in     {seconds:.1f} s")
    return DONE


def _build(
    arguments: SimpleNamespace,
    gallery: Array,
    ids: Array | None,
    manifest: Manifest | None,
    funnel: Funnel,
) -> float:
    """Write the index; return the seconds it took."""
    schedule, first_stage, plan = funnel
    columns = schedule.dims[-1] if arguments.engine == "exact" else sum(schedule.dims)
    _check_room(arguments.out, len(gallery) * columns * _COORDINATE_BYTES)
    fingerprint = arguments.fingerprint if manifest is None else manifest.fingerprint
    prompt = None if manifest is None else _prompt(arguments, manifest)
    facts = (schedule, ids, arguments.metric, fingerprint, prompt)
    writer = IndexWriter(arguments.out, replaces=arguments.force)
    start = time.perf_counter()
    if arguments.engine == "exact":
        ExactIndex.build(gallery, *facts).save(writer)
    else:
        with Progress(lambda: len(gallery)) as progress:
            FaissIndex.build(
                gallery,
                *facts,
                first_stage=first_stage,
                path=writer,
                progress=lambda done, _: progress.show(done),
                plan=plan,
            )
    return time.perf_counter() - start


def _prompt(arguments: SimpleNamespace, manifest: Manifest) -> str | None:
    """Return the text of the gallery's prompt, which a client will check."""
    tower = manifest.tower(manifest.other_tower is not None)
    try:
        prompt = tower.check_prompt(arguments.prompt) or None
        check_gallery_prompt(prompt, tower.prompts)
    except KerasMrlError as error:
        raise RefusalError(in_flags(str(error))) from error
    return prompt


def _encoder(arguments: SimpleNamespace, gallery: Array) -> Manifest:
    """Return the manifest of the encoder that `--target` serves."""
    with connect(arguments) as client:
        manifest = client.describe()
    width = gallery.shape[1]
    if width not in (*manifest.dims, manifest.width):
        raise RefusalError(
            "A gallery is of a model's embeddings, as wide as one of its dims. "
            f"Received: {arguments.embeddings} of width {width} for model {manifest.name!r} with "
            f"{', '.join(map(str, manifest.dims))}. "
            "Embed it with `keras-mrl embed --out`, or name the model it is of."
        )
    return manifest


# The folder.


def _check_out(out: str, force: bool) -> None:
    """Raise `RefusalError` for a folder that holds an index already, or something else."""
    folder, is_there = _lowest_there(out), Path(out).exists()
    reason = ""
    if not folder.is_dir():
        reason = ", which is a file" if is_there else f", for {folder} is a file"
    elif not os.access(folder, os.W_OK | os.X_OK):
        reason = " (Permission denied)"
    if reason:
        raise RefusalError(
            f"--out must be a folder that can be written. Received: {out}{reason}. Name another."
        )
    names = sorted(os.listdir(out)) if is_there else []
    others = [name for name in names if not is_ours(name)]
    if CARD in names and not force:
        raise RefusalError(
            "An index is replaced only with --force. "
            f"Received: --out {out}, which holds one. Add --force, or name another folder."
        )
    if others and CARD not in names:
        raise RefusalError(
            "An index is built in a folder of its own. "
            f"Received: --out {out}, which holds {others[0]}. Name a new folder."
        )


def _lowest_there(out: str) -> Path:
    """Return the path, or the lowest of the folders above it that exists."""
    place = Path(out).absolute()
    return next(path for path in (place, *place.parents) if path.exists())


def _check_room(out: str, needed: int) -> None:
    """Raise `RefusalError` if the disk is too full: a memory-mapped file cannot say so later."""
    free = shutil.disk_usage(_lowest_there(out)).free
    if free < needed:
        raise RefusalError(
            f"An index of these rows takes {in_bytes(needed)} of disk. "
            f"Received: --out {out} with {in_bytes(free)} left. "
            "Make room, name another disk, or give fewer or narrower --dims."
        )


# The funnel.


def _first_stage(arguments: SimpleNamespace, is_planned: bool) -> FirstStage | None:
    factory, settings = arguments.first_stage, arguments.settings
    if factory is None:
        return None
    if settings is None:
        return FirstStage.least(factory) if is_planned else FirstStage.usual(factory)
    with refusing_index_errors(MISUSED):
        return FirstStage(factory, settings)


def _named_funnel(
    arguments: SimpleNamespace,
    gallery: Array,
    manifest: Manifest | None,
    first_stage: FirstStage | None,
) -> Funnel:
    """Return the funnel that the flags name."""
    dims = arguments.dims or (gallery.shape[1],)
    with refusing_index_errors(MISUSED):
        schedule = FunnelSchedule(dims, arguments.shortlists or (), arguments.k)
    if manifest is not None:
        manifest.check_dim(schedule.dims[-1])
    return schedule, first_stage, None


def _planned_funnel(
    arguments: SimpleNamespace,
    gallery: Array,
    manifest: Manifest | None,
    first_stage: FirstStage | None,
    usual_sample: int,
    projection: Projection | None,
) -> Funnel:
    """Choose a funnel by measurement; print each trial on stderr, and the front of the best.

    Raises:
        TargetNotReachedError: If no funnel reaches the target; the front is on stderr.
    """
    dims: Sequence[int] | None = arguments.dims
    if dims is None and projection is not None:
        dims = sorted({*projection.dims, gallery.shape[1]})
    if manifest is not None:
        if dims is None:
            dims = [dim for dim in manifest.dims if dim <= gallery.shape[1]]
        manifest.check_dim(dims[-1])  # at which the queries will be embedded
    own_rows = None
    if arguments.queries is not None:
        queries = load_embeddings("--queries", arguments.queries)
        if projection is not None:
            queries = projection.transform(queries)
    else:
        # The sample is left out of what is searched, so it stays a small part of it.
        usual = min(usual_sample, max(LEAST_SAMPLE, len(gallery) // 10))
        size = min(arguments.sample or usual, len(gallery))
        rng = np.random.default_rng(arguments.seed)
        own_rows = np.sort(rng.choice(len(gallery), size, replace=False)).astype(np.int64)
        queries = gallery[own_rows]
        if manifest is not None and manifest.other_tower is not None:
            _report(
                f"{manifest.name} has a tower for queries, and the plan is measured by rows of the "
                "gallery; plan by embeddings of the queries: --queries"
            )
    if dims is not None and dims[-1] < gallery.shape[1]:
        _report(
            f"recall is of the neighbours at dim {dims[-1]}; the gallery is {gallery.shape[1]} wide"
        )
    name, target, measure_by_label = _target(arguments)
    measure = None
    if measure_by_label is not None:
        labels = load_labels("--labels", arguments.labels, len(gallery))
        if own_rows is not None:
            query_labels = labels[own_rows]
        else:
            query_labels = load_labels("--query-labels", arguments.query_labels, len(queries))
        measure = measure_by_label(labels, query_labels)
    began_s = time.monotonic()
    try:
        plan = plan_funnel(
            gallery,
            queries,
            target,
            k=arguments.k,
            dims=dims,
            metric=arguments.metric,
            measure=measure,
            own_rows=own_rows,
            first_stages=None if first_stage is None else [first_stage],
            batch=arguments.batch,
            says=lambda text: _report(f"{time.monotonic() - began_s:.0f} s: {text}"),
            seconds=arguments.plan_seconds,
        )
    except TargetNotReachedError as error:
        if error.front:
            for line in table(error.front).split("\n"):
                print_note(line)
        raise
    if not arguments.json:
        print_lines(plan.table())
    how = {"measure": name, "queries": len(queries), "batch": arguments.batch}
    return plan.schedule, plan.first_stage, {**how, **plan.to_json()}


def _target(arguments: SimpleNamespace) -> tuple[str, float, Callable[..., Measure] | None]:
    if arguments.target_precision is not None:
        return "precision", arguments.target_precision, precision_by_label
    if arguments.target_map is not None:
        return "map", arguments.target_map, average_precision_by_label
    return "recall", arguments.target_recall, None


def _report(text: str) -> None:
    print_note(" ".join(text.split()))


# What an index is.


def show_index(path: str, as_json: bool) -> int:
    """Print what an index is, its files and its plan, after a look at every byte."""
    with refusing_index_errors():
        index = _read(path, verify=True)
        plan = index["plan"]
        chosen = None if plan is None else Plan.from_json(plan)
    if as_json:
        print_json(**index, verified=True)
        return DONE
    _print(index)
    print_line(f"  made with    keras-mrl {index['made_with']}")
    for name, size in index["files"].items():
        print_line(f"  {'file':11}  {name}, {in_bytes(size)}")
    print_line("  digests      every file is as it was written")
    if chosen is not None:
        print_line(
            f"  planned for  {plan.get('measure', 'quality')} {chosen.target}: "
            f"{chosen.choice.quality:.4f} with a standard error of {chosen.choice.error:.4f}"
        )
        print_lines(chosen.table())
    return DONE


def _read(path: str, *, verify: bool) -> dict[str, Any]:
    """Return what an index is, as JSON."""
    saved = read(path, verify=verify)
    facts = IndexFacts.from_json(saved.card)
    sizes = {place.name: place.stat().st_size for place in saved.files.values()}
    stage = saved.card.get("first_stage")
    if stage is not None:
        FirstStage.from_json(stage)
    first = saved.file("first" if "first" in saved.files else "columns_0")
    return {
        "index": path,
        "engine": saved.card["engine"],
        "rows": len(saved.array("ids", (None,), np.int64)),
        **facts.to_json(),
        "first_stage": stage,
        "first_stage_bytes": sizes[first.name],
        "disk_bytes": sum(sizes.values()),
        "files": sizes,
        "made_with": saved.card.get("made_with"),
        "plan": saved.card.get("plan"),
    }


def _print(index: dict[str, Any]) -> None:
    size = in_bytes(index["first_stage_bytes"])
    stage = index["first_stage"]
    first = f"every row, in NumPy, {size} read by each search"
    if stage is not None:
        first = f"{stage['factory']} {stage['settings']}".rstrip() + f", {size} of memory"
    encoder = index["encoder_fingerprint"]
    print_line(f"{index['index']}: {index['rows']} rows, {index['engine']}, {index['metric']}")
    print_line(f"  funnel       {_funnel(FunnelSchedule.from_json(index['schedule']))}")
    print_line(f"  first stage  {first}")
    print_line(f"  encoder      {'unknown, nobody checks' if encoder is None else encoder}")
    if index.get("prompt") is not None:
        print_line(f"  prompt       {index['prompt']!r}, before each text of the gallery")
    print_line(f"  on disk      {in_bytes(index['disk_bytes'])}")


def _funnel(schedule: FunnelSchedule) -> str:
    dims = " -> ".join(map(str, schedule.dims))
    shortlists = ", ".join(map(str, schedule.shortlists))
    stages = f"{dims}, shortlist {shortlists}" if shortlists else f"{dims} alone"
    return f"{stages}, k {schedule.k}"
