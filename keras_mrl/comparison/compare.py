"""`compare`: a comparison from images to report."""

from __future__ import annotations

import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import keras

from . import measure
from .data import ComparisonError, Part, Place, name_of, split_classes
from .folder import NETS, PLAN, SPLITS, claim
from .measure import TrainedNets
from .nets import madds
from .plan import EMBEDDED_DIMS, IMAGE_DIMS, Plan, load_or_make_plan, make_plan, subset
from .report import write_report
from .splits import check_unseen, load_parts, record_parts, unseen_classes
from .training import count_epochs, is_trained, train
from .verdict import verdict


def compare(
    data: str | Path | Sequence[str | Path] | Mapping[str, Any],
    out: str | Path,
    plan: Plan | None = None,
    *,
    test: str | Path | Sequence[str | Path] | Mapping[str, Any] | None = None,
    budget_minutes: float | None = None,
    size: int | None = None,
    skip_unreadable: bool = False,
    progress: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> dict[str, Any]:
    """Train Matryoshka and its alternatives on your data, judge them, and write a report.

    A net that is trained is not trained again, and one that was interrupted goes on after its last
    whole epoch: call once more with the same arguments.

    Args:
        data: Places of the training images, taken together: a folder or a zip with one sub-folder
            per class, an `.npz` with `x_train` and `y_train`, or the name of one of Keras's
            datasets (`cifar10`, `cifar100`, `fashion_mnist`, `mnist`). An `x_train` of shape
            `(rows, width)` holds embeddings, on which a net of two layers is trained. The arrays
            themselves are taken, too: `{"x_train": ..., "y_train": ...}`.
        out: Folder of the nets, the results and the report; it holds one comparison.
        plan: What to train; None means `Plan()`.
        test: Places of the test images. None takes the second part of `.npz` files and Keras's
            datasets, or else a fifth of every class of `data`.
        budget_minutes: Replaces the epochs, filters and nets of the plan by those that fit into
            this time, for which the speed is measured. None trains the plan as it is.
        size: Height and width to resize to; None keeps those of the first image.
        skip_unreadable: Whether to leave out image files that cannot be read, and go on. By
            default they are refused, all of them named at once.
        progress: Takes a line of text now and then; by default it is printed to stderr.

    Returns:
        The results as `results.json` has them: `verdict`, `about`, `plan`, `minutes` and `madds`;
        `top1`, `top5` and `ece` of heads, `probe`, `neighbors`, `cascades`, `retrieval` and, if
        the plan has them, `unseen`.

    Raises:
        ComparisonError: If images cannot be read or are too few, `out` holds something else, or
            the budget is too small: it says which would do.
        OSError: If `out` cannot be written.

    Examples:
        Train, judge and report, in minutes:

        >>> results = compare("birds/", "compared", Plan(dims=(8, 32)))  # doctest: +SKIP
        >>> results["top1"]["mrl"], results["top1"]["ff"]  # doctest: +SKIP

        What cannot be compared is refused before anything is trained:

        >>> np.savez("few.npz", x_train=np.zeros((8, 8, 8), "uint8"), y_train=np.arange(8) % 2)
        >>> try:
        ...     compare("few.npz", "compared", progress=lambda line: None)
        ... except ComparisonError as error:
        ...     print(error)  # doctest: +ELLIPSIS
        A comparison needs two classes, 10 images to search among and 10 different test images, ...
    """
    places, test_places = _as_list(data), None if test is None else _as_list(test)
    requested, folder = plan or Plan(), Path(out)
    with claim(folder, places):
        progress("reading the data")
        unreadable: list[str] = []
        training, judging, left_out = load_parts(
            places, test_places, size, unreadable if skip_unreadable else None
        )
        if unreadable:
            progress(f"left out, as they cannot be read: {', '.join(unreadable)}")
        requested = _usual(requested, training)
        shape = " x ".join(map(str, training.inputs.shape[1:]))
        progress(
            f"{len(training.labels):,} training and {len(judging.labels):,} test {training.kind} "
            f"of {shape}, {len(training.names)} classes; {left_out} test {training.kind} that "
            "training has too are left out"
        )
        if requested.unseen:
            check_unseen(training, judging)
        nets = _begin(folder, training, judging, requested, budget_minutes, progress)
        _train_missing(nets, progress)
        progress("evaluating (minutes for tens of thousands of rows)")
        names = [name_of(place) for place in places]
        results = _about(nets, names, left_out, unreadable) | _measure(nets, progress)
        results["verdict"] = verdict(nets)
        write_report(results, folder)
    return results


def _as_list(places: str | Path | Sequence[str | Path] | Mapping[str, Any]) -> list[Place]:
    if isinstance(places, Mapping):
        return [places]
    return [str(places)] if isinstance(places, str | Path) else [str(place) for place in places]


def _usual(requested: Plan, training: Part) -> Plan:
    """The requested plan with the usual dims for such data where it has none."""
    if training.is_embedded and requested.filters != Plan.filters:
        raise ComparisonError(
            "Filters are those of a net on images. "
            f"Received: filters={requested.filters} for embeddings. Leave them out."
        )
    usual = EMBEDDED_DIMS if training.is_embedded else IMAGE_DIMS
    return requested if requested.dims else replace(requested, dims=usual)


def _begin(
    folder: Path,
    training: Part,
    test: Part,
    requested: Plan,
    budget_minutes: float | None,
    progress: Callable[[str], None],
) -> TrainedNets:
    """Make the plan or load it, and record which images it uses before anything is trained."""
    splits = folder / SPLITS

    def record(plan: Plan) -> TrainedNets:
        used = subset(training, plan.rows)
        record_parts(splits, used, test, _names_of_unseen(plan, training.names))
        return TrainedNets(folder / NETS, plan, used, test)

    def make() -> Plan:
        plan = make_plan(requested, training, budget_minutes, progress)
        if plan.unseen:
            check_unseen(subset(training, plan.rows), test)
        # Recorded before the plan is saved, so that no plan goes on with images it was not made
        # for. A record without a plan is that of a comparison that was stopped here.
        splits.unlink(missing_ok=True)
        record(plan)
        return plan

    wishes = {**asdict(requested), "dims": list(requested.dims), "budget": budget_minutes}
    wishes["backend"] = keras.backend.backend()
    return record(load_or_make_plan(folder / PLAN, wishes, make))


def _names_of_unseen(plan: Plan, names: tuple[str, ...]) -> list[str]:
    return [names[number] for number in unseen_classes(len(names))] if plan.unseen else []


def _train_missing(nets: TrainedNets, progress: Callable[[str], None]) -> None:
    plan, parts = nets.plan, (nets.training, nets.test)
    unseen = unseen_classes(len(nets.training.names))
    missing = [net for net in plan.nets if not is_trained(nets.folder / net.name)]
    epochs = sum(
        net.epochs_of(plan.epochs) - count_epochs(nets.folder / net.name) for net in missing
    )
    started, done = time.monotonic(), 0

    def report_epoch(line: str) -> None:
        nonlocal done
        done += 1
        minutes = (epochs - done) * (time.monotonic() - started) / done / 60
        progress(f"{line}, about {minutes:.0f} min left")

    for number, net in enumerate(missing, start=len(plan.nets) - len(missing) + 1):
        progress(f"[{number}/{len(plan.nets)}] {net.name}")
        seen = parts if net.all_classes else _without(unseen, *parts)
        train(net, nets.folder / net.name, seen, plan.recipe, report_epoch)


def _without(unseen: list[int], training: Part, test: Part) -> tuple[Part, Part]:
    return split_classes(training, unseen)[0], split_classes(test, unseen)[0]


def _about(
    nets: TrainedNets, data: list[str], left_out: int, unreadable: list[str]
) -> dict[str, Any]:
    plan, full = nets.plan, nets.model(f"{nets.full}-0")
    images, classes = len(nets.training.labels), len(nets.training.names)
    return {
        "about": {
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "data": data,
            "kind": nets.training.kind,
            "images": [images, len(nets.test.labels)],
            "classes": classes,
            "left_out": left_out,
            "unreadable": unreadable,
            "probed": min(measure.PROBED, images),
            "seeded": plan.seeded,
            "unseen": _names_of_unseen(plan, nets.training.names),
            "machine": f"Python {platform.python_version()}, Keras {keras.__version__} on "
            f"{keras.backend.backend()}, keras-mrl {version('keras-mrl')}, "
            f"{os.cpu_count()} CPU cores, {time.strftime('%Y-%m-%d')}",
        },
        "plan": {**asdict(plan), "dims": list(plan.dims)},
        "minutes": {net.name: nets.minutes(net.name) for net in plan.nets},
        "madds": {"backbone": madds(full.backbone), "head": nets.width * classes},
    }


def _measure(nets: TrainedNets, progress: Callable[[str], None]) -> dict[str, Any]:
    steps: dict[str, Callable[[TrainedNets], Any]] = {
        "heads": measure.heads,
        "probe": measure.probe,
        "neighbors": measure.neighbors,
        "cascades": measure.cascades,
        "retrieval": measure.retrieval,
    }
    if nets.plan.unseen:
        steps["unseen"] = measure.unseen
    results: dict[str, Any] = {}
    for number, (name, step) in enumerate(steps.items(), start=1):
        started = time.monotonic()
        scores = step(nets)
        results |= scores if name == "heads" else {name: scores}
        progress(f"[{number}/{len(steps)}] {name}: {time.monotonic() - started:.0f} s")
    return results
