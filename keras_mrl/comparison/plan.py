"""The plan of a comparison: nets, epochs and number of rows, requested or fitted to a budget.

A budget of minutes is spent on the largest net that leaves six epochs of all rows, and on up to 30
epochs and three seeds of it. How fast nets train is measured on the spot, with a separate net and a
Matryoshka net of every size in turn. Building and compiling a net takes as long for few rows as for
many, so rows are never left out to pay for that: slimmable nets and the boosted loss are, and then
the budget is refused with one that would do.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from keras_mrl_serving.untrusted import JSON_BYTES, parse_json, read_bytes

from .data import ComparisonError, Part
from .folder import damaged, replacing
from .nets import Net, nets_for
from .training import BATCH, Batches, Recipe, compile_net, predict

_FILTERS = (8, 16, 32, 64)  # of the first convolution; a budget chooses among them
_LEAST_EPOCHS, _MOST_EPOCHS = 6, 30
_MOST_SEEDS = 3  # for which the rest of a budget is spent
_TRAINING_SHARE = 0.8  # of a budget; the rest evaluates
_LEAST_PER_CLASS, _LEAST_ROWS = 50, 2000  # that a budget leaves
_TIMED, _MOST_TIMED = 6, 96  # batches; the more the shorter they take
_LEAST_TIMED_S = 0.5
# Cost of an epoch beside that of the Matryoshka net; measured on two cores.
_SLIMMABLE_COST = 2.2

IMAGE_DIMS = (8, 16, 32, 64, 128)
EMBEDDED_DIMS = (8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Plan:
    """What a comparison trains, and on how many images.

    Args:
        dims: Of the nested heads, and of the separate nets; two or more, ascending. None means
            the usual: 8 to 128 for images, 8 to 256 for embeddings.
        seeds: How many times the Matryoshka net and the separate nets of `seeded` are trained.
        epochs: Of every net.
        filters: Of the first convolution of nets on images.
        flip: Whether half of the images are mirrored in training.
        unseen: Whether MRL and a separate net per dim are also trained without a fifth of the
            classes.
        rows: How many of the training rows are used; 0 means all.
        variants: Whether slimmable nets and the loss whose first dim counts twice are trained, too.

    Examples:
        >>> plan = Plan(dims=(8, 16, 32))
        >>> [net.name for net in plan.nets][:6]
        ['mrl-0', 'ff_32-0', 'mrl_e-0', 'ff_8-0', 'ff_16-0', 'mrl_half-0']
    """

    dims: tuple[int, ...] = ()
    seeds: int = 1
    epochs: int = 10
    filters: int = 32
    flip: bool = True
    unseen: bool = False
    rows: int = 0
    variants: bool = True

    @property
    def recipe(self) -> Recipe:
        """What all nets share."""
        return Recipe(self.epochs, self.filters, self.flip)

    @property
    def nets(self) -> tuple[Net, ...]:
        """The nets to train, in order."""
        nets = nets_for(self.dims, self.seeds, self.seeded, self.unseen, self.variants)
        return tuple(net for net in nets if net.epochs_of(self.epochs))

    @property
    def seeded(self) -> list[int]:
        """The dims of the separate nets that are trained with every seed."""
        return sorted({self.dims[0], self.dims[(len(self.dims) - 1) // 2], self.dims[-1]})


def load_or_make_plan(path: Path, requested: Mapping[str, Any], make: Callable[[], Plan]) -> Plan:
    """Return the plan saved at `path`, or make one and save it.

    Args:
        path: Of the plan, JSON.
        requested: The user's wishes, as JSON has them.
        make: Makes the plan where none is saved.

    Raises:
        ComparisonError: If the folder holds a comparison that was requested in other words.
    """
    if not path.exists():
        plan = make()
        text = json.dumps({"asked": requested, "plan": asdict(plan)}, indent=1)
        with replacing(path) as partial:
            partial.write_text(text + "\n")
        return plan
    try:
        saved = parse_json(read_bytes(path, JSON_BYTES))
        plan = Plan(**{**saved["plan"], "dims": tuple(saved["plan"]["dims"])})
        before = dict(saved["asked"])
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(path, error) from error
    changes = [
        f"{name}={requested.get(name)} after {value}"
        for name, value in before.items()
        if requested.get(name) != value
    ]
    if changes:
        raise ComparisonError(
            f"A comparison goes on as it began; {path.parent} holds one. "
            f"Received: {', '.join(changes)}. Ask as before, or name another folder with --out."
        )
    return plan


def make_plan(
    requested: Plan,
    training: Part,
    budget_minutes: float | None,
    progress: Callable[[str], None],
) -> Plan:
    """Return the requested plan, or what of it fits into a budget, measured here and now."""
    if budget_minutes is None:
        rows = len(training.labels)
        return replace(requested, rows=min(requested.rows or rows, rows))
    progress("measuring how fast a net trains here")
    plan = fit_to_budget(
        requested,
        training,
        60 * budget_minutes,
        lambda net, filters: measure_speed(net, training, filters, requested.flip),
    )
    size = "" if training.is_embedded else f", {plan.filters} filters"
    progress(
        f"for {budget_minutes:g} minutes: {plan.epochs} epochs of {plan.rows:,} {training.kind}"
        f"{size}, {len(plan.nets)} nets, {plan.seeds} seed{'s' if plan.seeds > 1 else ''}"
    )
    return plan


@dataclass(frozen=True)
class Speed:
    """How fast a net trains here.

    Args:
        rate: Rows per second.
        start_s: Seconds for building and compiling what trains and what predicts.
    """

    rate: float
    start_s: float


def fit_to_budget(
    plan: Plan,
    training: Part,
    seconds: float,
    measure: Callable[[Net, int], Speed],
    clock: Callable[[], float] = time.monotonic,
) -> Plan:
    """Return the plan with the filters, epochs and rows that a budget has room for.

    The most filters are taken that leave six epochs of all rows; what is left beyond 30 epochs goes
    to more seeds. Where none do, slimmable nets and the boosted loss are left out, then rows,
    though 50 of each class and 2,000 stay. Measuring begins with the smallest net and ends where
    the next would find no time.

    Args:
        plan: The requested plan; its epochs, filters and rows are replaced, its seeds if there is
            time for more.
        training: The images.
        seconds: The budget; a fifth of it is left for evaluation.
        measure: Returns how fast a net trains, with so many filters.
        clock: Returns the time in seconds: measuring is paid from the budget.

    Examples:
        >>> from keras_mrl.comparison.data import Part
        >>> from keras_mrl.comparison.plan import Speed, fit_to_budget
        >>> images = Part(np.zeros((600, 8, 8, 1), np.uint8), np.arange(600) % 2, ("a", "b"))
        >>> plan = fit_to_budget(
        ...     Plan((4, 8)),
        ...     images,
        ...     seconds=60,
        ...     measure=lambda net, filters: Speed(30_000 / filters, 1),
        ...     clock=lambda: 0,
        ... )
        >>> plan.filters, plan.epochs, plan.rows
        (32, 7, 600)
    """
    rows, begun = len(training.labels), clock()
    sizes = (plan.filters,) if training.is_embedded else _FILTERS
    # The first net of a process loads what the others find loaded, and what it compiled is kept:
    # its start tells nothing of the others, its rate does.
    separate = measure(Net("ff", plan.dims[-1:]), sizes[0])
    largest: Plan | None = None
    for filters in sizes:
        speed = measure(Net("mrl", plan.dims), filters)
        timed = clock() - begun
        room = _TRAINING_SHARE * seconds - timed
        # With more filters the body takes its time, whatever the heads.
        ratio = min(1.0, speed.rate / separate.rate) if filters == sizes[0] else 1.0
        wanted = replace(plan, filters=filters)
        epochs = int(_passes(wanted, speed, ratio, room) / rows)
        if epochs < _LEAST_EPOCHS and largest is None:
            wanted = replace(wanted, variants=False)
            epochs = int(_passes(wanted, speed, ratio, room) / rows)
        if epochs < _LEAST_EPOCHS:
            break
        largest = replace(wanted, epochs=min(epochs, _MOST_EPOCHS), rows=rows)
        for seeds in range(plan.seeds + 1, _MOST_SEEDS + 1):
            if _passes(replace(largest, seeds=seeds), speed, ratio, room) >= _MOST_EPOCHS * rows:
                largest = replace(largest, seeds=seeds)
        if epochs < 2 * _LEAST_EPOCHS:  # twice the filters take two to four times as long
            break
    if largest is not None:
        return largest
    least = min(rows, max(_LEAST_PER_CLASS * len(training.names), _LEAST_ROWS))
    affordable = int(_passes(wanted, speed, ratio, room) / _LEAST_EPOCHS)
    if affordable < least:
        needed = (_seconds(wanted, speed, ratio, least) + timed) / _TRAINING_SHARE
        raise ComparisonError(
            "A budget must have time to build every net and to train it for "
            f"{_LEAST_EPOCHS} epochs. Received: {seconds / 60:g} minutes for {len(wanted.nets)} "
            f"nets, each of which takes {speed.start_s:.0f} s before its first step here. "
            f"Give {ceil(1.1 * needed / 60)} minutes, or fewer dims."
        )
    return replace(wanted, epochs=_LEAST_EPOCHS, rows=min(rows, affordable))


def _passes(plan: Plan, speed: Speed, ratio: float, seconds: float) -> float:
    """How many rows every net is trained on in so many seconds."""
    training = seconds - speed.start_s * len(plan.nets)
    return max(0.0, training * speed.rate / sum(_cost(net, ratio) for net in plan.nets))


def _seconds(plan: Plan, speed: Speed, ratio: float, rows: int) -> float:
    """How long it takes to train every net for the fewest epochs of so many rows."""
    passes = _LEAST_EPOCHS * rows * sum(_cost(net, ratio) for net in plan.nets)
    return speed.start_s * len(plan.nets) + passes / speed.rate


def _cost(net: Net, ratio: float) -> float:
    """The cost beside that of the Matryoshka net; `ratio` is that of a separate net."""
    share = (1 if net.all_classes else 0.8) * (0.5 if net.half else 1)
    return share * {"slimmable": _SLIMMABLE_COST, "ff": ratio}.get(net.method, 1.0)


def measure_speed(net: Net, training: Part, filters: int, flip: bool) -> Speed:
    """Return how fast a net of so many filters trains."""
    begun = time.perf_counter()
    model = net.make(training.inputs.shape[1:], len(training.names), filters)
    compile_net(model, net, 1, len(training.labels))
    few = training.take(slice(2 * BATCH))
    model.fit(Batches(few, 0, 0, flip), verbose=0)
    for part in (model.backbone, model):  # what predicts is compiled, too
        predict(part, few)
    start_s = time.perf_counter() - begun
    count = _TIMED
    while True:
        some = training.take(np.resize(np.arange(len(training.labels)), count * BATCH))
        started = time.perf_counter()
        model.fit(Batches(some, 0, 1, flip), verbose=0)
        seconds = time.perf_counter() - started
        if seconds >= _LEAST_TIMED_S or count >= _MOST_TIMED:
            return Speed(len(some.labels) / seconds, start_s)
        count *= 2  # what is over at once is mostly the start of `fit`


def subset(training: Part, rows: int) -> Part:
    """Return so many of the images, the same in every call, of every class its share."""
    if rows >= len(training.labels):
        return training
    order = np.random.default_rng(0).permutation(len(training.labels))
    # Each image has a place within its class; the first places of all classes come first.
    place = np.empty(len(order))
    for label in np.unique(training.labels):
        own = order[training.labels[order] == label]
        place[own] = (np.arange(len(own)) + 0.5) / len(own)
    return training.take(np.sort(np.argsort(place, kind="stable")[:rows]))
