"""The plan of a comparison: nets, epochs and number of images, requested or fitted to a budget.

A budget of minutes is spent on the largest net that leaves six epochs of all images. How fast nets
train is measured on the spot, with a Matryoshka net of every size in turn.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from keras_mrl_serving.untrusted import JSON_BYTES, parse_json, read_bytes

from .data import ComparisonError, Images
from .folder import damaged, replacing
from .nets import Net, nets_for
from .training import BATCH, Batches, Recipe, compile_net

_FILTERS = (8, 16, 32, 64)  # of the first convolution; a budget chooses among them
_LEAST_EPOCHS, _MOST_EPOCHS = 6, 30
_TRAINING_SHARE = 0.8  # of a budget; the rest evaluates
_LEAST_PER_CLASS = 10
_TIMED = 6  # batches
# Cost of an epoch beside that of a net of one width; measured on two cores.
_SLIMMABLE_COST = 2.2


@dataclass(frozen=True)
class Plan:
    """What a comparison trains, and on how many images.

    Args:
        dims: Of the nested heads, and of the separate nets; two or more, ascending.
        seeds: How many times the Matryoshka net and the separate nets of `seeded` are trained.
        epochs: Of every net.
        filters: Of the first convolution.
        flip: Whether half of the images are mirrored in training.
        unseen: Whether MRL and a separate net per dim are also trained without a fifth of the
            classes.
        rows: How many of the training images are used; 0 means all.

    Examples:
        >>> plan = Plan(dims=(8, 16, 32))
        >>> [net.name for net in plan.nets]
        ['mrl-0', 'ff_32-0', 'mrl_e-0', 'ff_8-0', 'ff_16-0', 'slimmable-0', 'mrl_boosted-0']
    """

    dims: tuple[int, ...] = (8, 16, 32, 64, 128)
    seeds: int = 1
    epochs: int = 10
    filters: int = 32
    flip: bool = True
    unseen: bool = False
    rows: int = 0

    @property
    def recipe(self) -> Recipe:
        """What all nets share."""
        return Recipe(self.epochs, self.filters, self.flip)

    @property
    def nets(self) -> tuple[Net, ...]:
        """The nets to train, in order."""
        return nets_for(self.dims, self.seeds, self.seeded, self.unseen)

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
    training: Images,
    budget_minutes: float | None,
    progress: Callable[[str], None],
) -> Plan:
    """Return the requested plan, or what of it fits into a budget, measured here and now."""
    if budget_minutes is None:
        images = len(training.labels)
        return replace(requested, rows=min(requested.rows or images, images))
    progress("measuring how fast a net trains here")
    plan = fit_to_budget(
        requested,
        training,
        60 * budget_minutes,
        lambda filters: measure_speed(requested, training, filters),
    )
    progress(
        f"for {budget_minutes:g} minutes: {plan.epochs} epochs of {plan.rows:,} images, "
        f"{plan.filters} filters, {len(plan.nets)} nets"
    )
    return plan


@dataclass(frozen=True)
class Speed:
    """How fast a net trains here.

    Args:
        rate: Images per second.
        start_s: Seconds for building and compiling, before the first image.
    """

    rate: float
    start_s: float


def fit_to_budget(
    plan: Plan,
    training: Images,
    seconds: float,
    measure: Callable[[int], Speed],
    clock: Callable[[], float] = time.monotonic,
) -> Plan:
    """Return the plan with the filters, epochs and images that a budget has room for.

    The most filters are taken that leave six epochs of all images; where none do, fewer images,
    though ten of each class, which may then take longer than there is. Measuring begins with the
    smallest net and ends where the next would find no time.

    Args:
        plan: The requested plan; its epochs, filters and rows are replaced.
        training: The images.
        seconds: The budget; a fifth of it is left for evaluation.
        measure: Returns how fast a net of so many filters trains.
        clock: Returns the time in seconds: measuring is paid from the budget.

    Examples:
        >>> from keras_mrl.comparison.data import Images
        >>> from keras_mrl.comparison.plan import Speed, fit_to_budget
        >>> images = Images(np.zeros((600, 8, 8, 1), np.uint8), np.arange(600) % 2, ("a", "b"))
        >>> plan = fit_to_budget(
        ...     Plan((4, 8)), images, seconds=60, measure=lambda filters: Speed(30_000 / filters, 1)
        ... )
        >>> plan.filters, plan.epochs, plan.rows
        (32, 9, 600)
    """
    images = len(training.labels)
    deadline = clock() + _TRAINING_SHARE * seconds
    largest: Plan | None = None
    for filters in _FILTERS:
        speed = measure(filters)
        remaining = deadline - clock() - speed.start_s * len(plan.nets)
        passes = max(0.0, remaining * speed.rate / sum(map(_cost, plan.nets)))  # images per net
        epochs = int(passes / images)
        if epochs < _LEAST_EPOCHS:
            break
        largest = replace(plan, filters=filters, epochs=min(epochs, _MOST_EPOCHS), rows=images)
        if epochs < 2 * _LEAST_EPOCHS:  # twice the filters take two to four times as long
            break
    if largest is not None:
        return largest
    least = _LEAST_PER_CLASS * len(training.names)
    rows = min(images, max(least, int(passes / _LEAST_EPOCHS)))
    return replace(plan, filters=filters, epochs=_LEAST_EPOCHS, rows=rows)


def _cost(net: Net) -> float:
    """The cost of an epoch beside that of a net of one width that sees all classes."""
    seen = 1 if net.all_classes else 0.8
    return seen * (_SLIMMABLE_COST if net.method == "slimmable" else 1)


def measure_speed(plan: Plan, training: Images, filters: int) -> Speed:
    """Return how fast a Matryoshka net of so many filters trains."""
    begun = time.perf_counter()
    net = Net("mrl", plan.dims)
    model = net.make(training.pixels.shape[1:], len(training.names), filters)
    compile_net(model, net, 1, len(training.labels))
    some = training.take(np.resize(np.arange(len(training.labels)), _TIMED * BATCH))
    model.fit(Batches(some.take(slice(2 * BATCH)), 0, 0, plan.flip), verbose=0)
    started = time.perf_counter()
    model.fit(Batches(some, 0, 1, plan.flip), verbose=0)
    rate = len(some.labels) / (time.perf_counter() - started)
    # Predicting compiles once more, about as long.
    return Speed(rate, 2 * (started - begun))


def subset(training: Images, rows: int) -> Images:
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
