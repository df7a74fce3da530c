"""Ask a server for the classes of texts, images or rows.

Prints the best class of each row, its probability and the dim that decided it, and the exit in a
model with exits; of a model whose rows may have several classes all above 0.5, or dashes where
there is none. Without --dim the model's own policy decides, wider dims or deeper exits only for
rows still unsure; a model without a policy is asked at its full dim. Every file is checked before
anything is sent, and bad ones are named all at once; --skip-unreadable goes on without them. A
model that decodes images gets a JPEG or PNG as it is, and as a PNG what it would read otherwise;
for one that takes pixels, images are decoded and resized here (pip install 'keras-mrl[images]').

A model of texts takes a line of a .txt file as a text, a column of a .csv, .tsv or .jsonl, the
lines of standard input (-), and words with a blank.

  keras-mrl classify --target localhost:8500 --model birds birds/*.jpg --top 3
  keras-mrl classify --target localhost:8500 test.npy --dim 16 --json
  keras-mrl classify --target localhost:8500 "what is my balance?" more.txt
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING

import click

from .output import Table, file_width, print_json
from .shared import (
    Option,
    RefusalError,
    check_one_of,
    command,
    count_option,
    file_options,
    files_argument,
    json_option,
    server_options,
    take_target,
    target_option,
)
from .words import place_of, take_texts, text_options

if TYPE_CHECKING:
    from keras_mrl_serving import Classification, ClassifiedRow, Manifest

    from .files import Arrays

Classes = list[tuple[int, str | None, float]]  # class id, label and probability, best first
ShowRow = Callable[[str, int, "ClassifiedRow", Classes], None]


def probability(text: str) -> float:
    """Return the number of a flag, a probability."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise click.BadParameter(f"must lie in 0..1. Received: {text!r}. Give for example 0.5.")
    return number


@command(
    __doc__,
    files_argument(),
    target_option(),
    *server_options(),
    Option("--dim", type=int, metavar="M", help="ask the head of this dim alone"),
    Option(
        "--exit",
        metavar="NAME",
        help="with --dim: ask this exit of the backbone, where it was exported (the last)",
    ),
    Option("--policy", metavar="FILE", help="JSON of a CascadePolicy to ask by (the model's own)"),
    count_option(
        "--top",
        "K",
        "how many classes of each row (1, or all above --above where a row may have several)",
        remedy="Try 3.",
    ),
    Option(
        "--above",
        type=probability,
        metavar="P",
        help="only classes with a probability above P (0.5 where a row may have several)",
    ),
    *text_options(),
    *file_options(),
    json_option("print one JSON object per row"),
)
def classify(arguments: SimpleNamespace) -> int:
    """Print the classes of every row of every file."""
    take_target(arguments)
    take_texts(arguments)
    check_one_of(arguments, "dim", "policy")
    from .client import ask_files, connect_and_describe
    from .files import load_policy

    policy = None if arguments.policy is None else load_policy(arguments.policy)
    with connect_and_describe(arguments) as (client, manifest):
        manifest.check_head()
        top, above = _chosen(arguments, manifest)
        dim = None if arguments.dim is None else manifest.check_dim(arguments.dim)
        if arguments.exit is not None:
            manifest.check_exit(arguments.exit)
            if dim is None:
                raise RefusalError(
                    "An exit is asked at one dim. "
                    f"Received: --exit {arguments.exit} without --dim. "
                    f"Add --dim {manifest.width}, or leave --exit out."
                )
        if dim is None and policy is None and manifest.adaptive_cascade is None:
            dim = manifest.width
        ranked = top is None or top > 1
        show_row = _print_json if arguments.json else _table(arguments, manifest, ranked)

        def ask(rows: Arrays, progress: Callable[[int, int], object]) -> Classification:
            if dim is None:
                return client.classify_adaptive(rows, policy, progress=progress)
            return client.classify(rows, dim, exit=arguments.exit, progress=progress)

        def show(file: str, row: int, answer: Classification) -> None:
            best = answer[0]
            labels = best.labels or (None,) * len(best.class_ids)
            classes = list(zip(best.class_ids, labels, best.probabilities, strict=True))
            shown = [entry for entry in classes if entry[2] > above]
            show_row(file, row, best, shown[:top])

        return ask_files(arguments, client, manifest, ask, show)


def _chosen(arguments: SimpleNamespace, manifest: Manifest) -> tuple[int | None, float]:
    """Return how many classes of a row are shown at most, None for all, and above what."""
    top, above = arguments.top, arguments.above
    if top is not None and manifest.top_k is not None and top > manifest.top_k:
        raise RefusalError(
            f"--top must lie in 1..{manifest.top_k}, as many classes as the model names. "
            f"Received: {top}. Give fewer, or export the model with a larger top_k."
        )
    if manifest.activation == "sigmoid":
        usual = 0.5 if top is None else -1.0
    else:
        top, usual = top or 1, -1.0
    return top, usual if above is None else above


def _print_json(file: str, row: int, best: ClassifiedRow, classes: Classes) -> None:
    objects = [
        {"class_id": class_id, **({} if label is None else {"label": label}), "probability": p}
        for class_id, label, p in classes
    ]
    known = {"exit": best.exit, "relative_cost": best.relative_cost}
    at_exit = {name: value for name, value in known.items() if value is not None}
    place = place_of(file, row)
    print_json(**place, dim=best.dim, **at_exit, confidence=best.confidence, classes=objects)


def _table(arguments: SimpleNamespace, manifest: Manifest, ranked: bool) -> ShowRow:
    rank = {"RANK": -4} if ranked else {}
    last = "LABEL" if manifest.labels else "CLASS"
    width = file_width(arguments.files)
    digits = len(str(manifest.width))
    exits = {"EXIT": max(map(len, manifest.exit_names))} if manifest.exits else {}
    stage = {**exits, "DIM": -digits}
    table = Table({"FILE": width, "ROW": -6, **stage, **rank, "PROBABILITY": -6, last: 0})

    def show_row(file: str, row: int, best: ClassifiedRow, classes: Classes) -> None:
        place = (file, row, *([best.exit] if exits else []), best.dim)
        for number, (class_id, label, probability) in enumerate(classes, 1):
            name = class_id if label is None else label
            table.row(*place, *([number] if rank else []), f"{probability:.4f}", name)
        if not classes:
            table.row(*place, *(["-"] if rank else []), "-", "-")

    return show_row
