"""What a comparison trains, how long, and on how many images: asked for, or fitted to a budget."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .data import ComparisonError, Images
from .nets import SIZE, Batches, Net, nets_for
from .training import Recipe, compile_net, damaged, replacing

_FILTERS = (8, 16, 32, 64)  # of the first convolution; what a budget chooses among
_LEAST_EPOCHS, _MOST_EPOCHS = 6, 30
_TRAINING_SHARE = 0.8  # of a budget; the rest evaluates
_LEAST_PER_CLASS = 10
_TIMED = 6  # batches
# Cost of an epoch beside that of a net of one width; measured on two cores.
_SLIMMABLE_COST = 2.2


@dataclass(frozen=True)
class Plan:
    """What a comparison does.

    Args:
        dims: Of the nested heads, and of the separate nets.
        seeds: How many times the Matryoshka net and the separate nets of `seeded` are trained.
        epochs: Of every net.
        filters: Of the first convolution.
        flip: Whether half of the images are mirrored in training.
        unseen: Whether MRL and a separate net per dim are also trained without a fifth of the
            classes.
        rows: How many of the training images are used.
    """

    dims: tuple[int, ...]
    seeds: int
    epochs: int
    filters: int
    flip: bool
    unseen: bool
    rows: int

    @property
    def recipe(self) -> Recipe:
        """What all nets share."""
        return Recipe(self.epochs, self.filters, self.flip)

    @property
    def nets(self) -> tuple[Net, ...]:
        """What is trained, in order."""
        return nets_for(self.dims, self.seeds, self.seeded, self.unseen)

    @property
    def seeded(self) -> list[int]:
        """The dims of the separate nets that are trained with every seed."""
        return sorted({self.dims[0], self.dims[(len(self.dims) - 1) // 2], self.dims[-1]})


def taken_up(path: Path, asked: Mapping[str, Any], make: Callable[[], Plan]) -> Plan:
    """Return the plan noted at `path`, or make one and note it.

    Args:
        path: Of the note, JSON.
        asked: What the user asked for, as JSON has it.
        make: Makes the plan where none is noted.

    Raises:
        ComparisonError: If the folder holds a comparison that was asked for in other words.
    """
    if not path.exists():
        plan = make()
        with replacing(path) as partial:
            partial.write_text(json.dumps({"asked": asked, "plan": asdict(plan)}, indent=1) + "\n")
        return plan
    try:
        noted = json.loads(path.read_text())
        plan = Plan(**{**noted["plan"], "dims": tuple(noted["plan"]["dims"])})
        before = dict(noted["asked"])
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(path, error) from error
    other = [
        f"{name}={asked.get(name)} after {value}"
        for name, value in before.items()
        if asked.get(name) != value
    ]
    if other:
        raise ComparisonError(
            f"A comparison goes on as it began; {path.parent} holds one. "
            f"Received: {', '.join(other)}. Ask as before, or name another folder with --out."
        )
    return plan


@dataclass(frozen=True)
class Speed:
    """How fast a net trains here.

    Args:
        rate: Images per second.
        start_s: Seconds before the first, for building and compiling.
    """

    rate: float
    start_s: float


def fitted(plan: Plan, training: Images, seconds: float, measure: Callable[[int], Speed]) -> Plan:
    """Return the plan with the filters, epochs and images that a budget has room for.

    The most filters are taken that leave six epochs of all images; where none do, fewer images,
    though ten of each class, which may then take longer than there is. Measuring begins with the
    smallest net and ends where the next would find no time.

    Args:
        plan: What is asked for; its epochs, filters and rows are replaced.
        training: The images.
        seconds: The budget; a fifth of it is left for evaluation.
        measure: Says how fast a net of so many filters trains.

    Examples:
        >>> images = Images(np.zeros((600, 8, 8, 1), np.uint8), np.arange(600) % 2, ("a", "b"))
        >>> plan = Plan((4, 8), 1, 0, 0, flip=True, unseen=False, rows=600)
        >>> found = fitted(plan, images, 60, measure=lambda filters: Speed(30_000 / filters, 1.0))
        >>> found.filters, found.epochs, found.rows
        (32, 9, 600)
    """
    ends = time.monotonic() + _TRAINING_SHARE * seconds
    found: Plan | None = None
    for filters in _FILTERS:
        speed = measure(filters)
        left = ends - time.monotonic() - speed.start_s * len(plan.nets)
        passes = max(0.0, left * speed.rate / sum(map(_cost, plan.nets)))
        epochs = int(passes / len(training.labels))
        if epochs < _LEAST_EPOCHS:
            break
        found = replace(
            plan, filters=filters, epochs=min(epochs, _MOST_EPOCHS), rows=len(training.labels)
        )
        if epochs < 2 * _LEAST_EPOCHS:  # twice the filters take two to four times as long
            break
    if found is not None:
        return found
    least = _LEAST_PER_CLASS * len(training.names)
    rows = min(len(training.labels), max(least, int(passes / _LEAST_EPOCHS)))
    return replace(plan, filters=filters, epochs=_LEAST_EPOCHS, rows=rows)


def _cost(net: Net) -> float:
    """Of an epoch beside one of a net of one width."""
    seen = 1 if net.all_classes else 0.8
    return seen * (_SLIMMABLE_COST if net.method == "slimmable" else 1)


def measured_speed(plan: Plan, training: Images) -> Callable[[int], Speed]:
    """Return what measures how fast a Matryoshka net trains, by its filters."""

    def measure(filters: int) -> Speed:
        begun = time.perf_counter()
        net = Net("mrl", plan.dims)
        model = net.make(training.pixels.shape[1:], len(training.names), filters)
        compile_net(model, net, 1, len(training.labels))
        few = training.take(np.resize(np.arange(len(training.labels)), _TIMED * SIZE))
        model.fit(Batches(few.take(slice(2 * SIZE)), 0, 0, plan.flip), verbose=0)
        started = time.perf_counter()
        model.fit(Batches(few, 0, 1, plan.flip), verbose=0)
        rate = len(few.labels) / (time.perf_counter() - started)
        # Predicting compiles once more, about as long.
        return Speed(rate, 2 * (started - begun))

    return measure


def subset(training: Images, rows: int) -> Images:
    """Return so many of the images, drawn once and for all, of every class its share."""
    if rows >= len(training.labels):
        return training
    draw = np.random.default_rng(0)
    order = draw.permutation(len(training.labels))
    # Each image has a place within its class; the first places of all classes come first.
    place = np.empty(len(order))
    for label in np.unique(training.labels):
        own = order[training.labels[order] == label]
        place[own] = (np.arange(len(own)) + 0.5) / len(own)
    return training.take(np.sort(np.argsort(place, kind="stable")[:rows]))


def choose(asked: Plan, training: Images, budget: float | None, say: Callable[[str], None]) -> Plan:
    """Return what is asked for, or what fits into `budget` minutes, measured here and now."""
    if budget is None:
        return replace(asked, rows=len(training.labels))
    say("measuring how fast a net trains here")
    plan = fitted(asked, training, 60 * budget, measured_speed(asked, training))
    say(
        f"for {budget:g} minutes: {plan.epochs} epochs of {plan.rows:,} images, {plan.filters} "
        f"filters, {len(plan.nets)} nets"
    )
    return plan
