"""The work of `compare`: train what is missing, evaluate, write."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import keras

from . import measure
from .data import Images, split_classes
from .measure import Answers, cascades, retrieval
from .nets import madds
from .plan import Plan, choose, subset, taken_up
from .report import SPREAD, as_csv, draw, findings, html, tables
from .splits import check_unseen, load_parts, note_parts, unseen_classes
from .training import epochs_done, held, is_trained, replacing, train


def compare(
    data: list[str],
    test: list[str] | None,
    out: Path,
    asked: Plan,
    budget: float | None = None,
    size: int | None = None,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> dict[str, Any]:
    """Train, evaluate and write a comparison; what is there already is not made again.

    Args:
        data: Places of the images, as `images.read` takes them.
        test: Places of the test images; None draws them.
        out: Folder of everything.
        asked: What is trained; its epochs, filters and rows count where there is no budget.
        budget: Minutes there are; None means no end.
        size: Height and width of the images; None keeps the first one's.
        say: Takes lines about how far it is.

    Returns:
        The results, as `results.json` has them.

    Raises:
        ComparisonError: If images cannot be read or are too few, or `out` holds something else.
        OSError: If `out` cannot be written.
    """
    with held(out, data):
        say("reading images")
        training, judging, left_out = load_parts(data, test, size)
        rows, height, width, channels = training.pixels.shape
        say(
            f"{rows:,} training and {len(judging.labels):,} test images of {height} x {width} x "
            f"{channels}, {len(training.names)} classes; {left_out} test images that training has "
            "too are left out"
        )
        if asked.unseen:
            check_unseen(training, judging)
        answers = _begun(out, (training, judging), asked, budget, say)
        _train(answers, say)
        say("evaluating (minutes for tens of thousands of images)")
        results = _measure(answers, left_out, data, say)
        _write(results, out)
    return results


def _begun(
    out: Path,
    parts: tuple[Images, Images],
    asked: Plan,
    budget: float | None,
    say: Callable[[str], None],
) -> Answers:
    """Make the plan or take it up, and note which images it uses before anything is trained."""
    training, test = parts
    splits = out / "splits.npz"

    def noted(plan: Plan) -> Answers:
        used = subset(training, plan.rows)
        note_parts(splits, used, test, _unseen(plan, training.names))
        return Answers(out / "nets", plan, used, test)

    def begin() -> Plan:
        plan = choose(asked, training, budget, say)
        if plan.unseen:
            check_unseen(subset(training, plan.rows), test)
        # Before the plan is kept, so that no plan goes on with images it was not made for. What
        # may be there is of one that was stopped here.
        splits.unlink(missing_ok=True)
        noted(plan)
        return plan

    given = {**asdict(asked), "dims": list(asked.dims), "budget": budget}
    given["backend"] = keras.backend.backend()
    return noted(taken_up(out / "plan.json", given, begin))


def _unseen(plan: Plan, names: tuple[str, ...]) -> list[str]:
    """The classes that some nets are trained without."""
    return [names[number] for number in unseen_classes(len(names))] if plan.unseen else []


def _train(answers: Answers, say: Callable[[str], None]) -> None:
    nets, epochs = answers.plan.nets, answers.plan.epochs
    whole = answers.training, answers.test
    hidden = unseen_classes(len(answers.training.names))
    missing = [net for net in nets if not is_trained(answers.folder / net.name)]
    left = sum(epochs - epochs_done(answers.folder / net.name) for net in missing)
    started, done = time.monotonic(), 0

    def tell(line: str) -> None:
        nonlocal done
        done += 1
        minutes = (left - done) * (time.monotonic() - started) / done / 60
        say(f"{line}, about {minutes:.0f} min left")

    for at, net in enumerate(missing):
        say(f"[{len(nets) - len(missing) + at + 1}/{len(nets)}] {net.name}")
        parts = whole if net.all_classes else _seen(whole, hidden)
        train(net, answers.folder / net.name, parts, answers.plan.recipe, tell)


def _seen(parts: Any, hidden: list[int]) -> Any:
    return tuple(split_classes(part, hidden)[0] for part in parts)


def _measure(
    answers: Answers, left_out: int, data: list[str], say: Callable[[str], None]
) -> dict[str, Any]:
    plan, full = answers.plan, answers.model(f"{answers.full}-0")
    results: dict[str, Any] = {
        "about": {
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "data": data,
            "images": [len(answers.training.labels), len(answers.test.labels)],
            "classes": len(answers.training.names),
            "left_out": left_out,
            "probed": min(measure.PROBED, len(answers.training.labels)),
            "seeded": plan.seeded,
            "unseen": _unseen(plan, answers.training.names),
            "machine": f"Python {platform.python_version()}, Keras {keras.__version__} on "
            f"{keras.backend.backend()}, keras-mrl {version('keras-mrl')}, "
            f"{os.cpu_count()} CPU cores, {time.strftime('%Y-%m-%d')}",
        },
        "plan": {**asdict(plan), "dims": list(plan.dims)},
        "minutes": {net.name: answers.minutes(net.name) for net in plan.nets},
        "madds": {
            "backbone": madds(full.backbone),
            "head": answers.width * len(answers.training.names),
        },
    }
    steps: dict[str, Callable[[Answers], Any]] = {
        "heads": measure.scores,
        "probe": measure.probes,
        "neighbors": measure.neighbors,
        "cascades": cascades,
        "retrieval": retrieval,
    }
    if plan.unseen:
        steps["unseen"] = measure.unseen
    for at, (name, step) in enumerate(steps.items()):
        started = time.monotonic()
        found = step(answers)
        results |= found if name == "heads" else {name: found}
        say(f"[{at + 1}/{len(steps)}] {name}: {time.monotonic() - started:.0f} s")
    return results


def _write(results: dict[str, Any], out: Path) -> None:
    draw(results, out)
    said = "".join(f"- {sentence}\n" for sentence in findings(results)) + f"\n{SPREAD}\n"
    shown = "\n".join(table.markdown() for table in tables(results))
    texts = {
        "results.json": json.dumps(results, indent=1) + "\n",
        "results.csv": as_csv(results),
        "results.md": f"{said}\n{shown}",
        "report.html": html(results, out),
    }
    for name, text in texts.items():
        with replacing(out / name) as partial:
            partial.write_text(text, "utf-8")
