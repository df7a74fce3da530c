"""The work of `classify`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

from keras_mrl_serving import CascadePolicy, Classification, Client, Manifest

from . import RefusalError
from .files import Arrays
from .policy import read_policy
from .printing import Table, file_width, print_json
from .server import asked
from .walk import walk


def classify(arguments: argparse.Namespace) -> int:
    """Print the classes of every row of every file."""
    policy = None if arguments.policy is None else read_policy(arguments.policy)
    with asked(arguments) as (client, manifest):
        manifest.check_head()
        _check_top(arguments.top, manifest)
        dim = None if arguments.dim is None else manifest.check_dim(arguments.dim)
        if dim is None and policy is None and manifest.cascade is None:
            dim = manifest.width
        ask = partial(_ask, client, dim, policy)
        show = _json_row if arguments.json else _table(arguments, manifest)
        return walk(arguments, client, manifest, ask, partial(_show, show, arguments.top))


def _ask(
    client: Client,
    dim: int | None,
    policy: CascadePolicy | None,
    arrays: Arrays,
    progress: Callable[[int, int], object],
) -> Classification:
    if dim is None:
        return client.classify_adaptive(arrays, policy, progress=progress)
    return client.classify(arrays, dim, progress=progress)


def _check_top(top: int, manifest: Manifest) -> None:
    if manifest.top_k is not None and top > manifest.top_k:
        raise RefusalError(
            f"--top must lie in 1..{manifest.top_k}, as many classes as the model names. "
            f"Received: {top}. Give fewer, or export the model with a larger top_k."
        )


Row = list[tuple[int, str | None, float]]  # class id, label and probability, best first
ShowRow = Callable[[str, int, int, float, Row], None]


def _show(show: ShowRow, top: int, file: str, row: int, answer: Classification) -> None:
    best = answer[0]
    labels = best.labels or (None,) * len(best.class_ids)
    classes = list(zip(best.class_ids, labels, best.probabilities, strict=True))[:top]
    show(file, row, best.dim, best.confidence, classes)


def _json_row(file: str, row: int, dim: int, confidence: float, classes: Row) -> None:
    found = [
        {"class_id": class_id, **({} if label is None else {"label": label}), "probability": p}
        for class_id, label, p in classes
    ]
    print_json(file=file, row=row, dim=dim, confidence=confidence, classes=found)


def _table(arguments: argparse.Namespace, manifest: Manifest) -> ShowRow:
    rank = {"RANK": -4} if arguments.top > 1 else {}
    last = "LABEL" if manifest.labels else "CLASS"
    width = file_width(arguments.files)
    dims = len(str(manifest.width))
    table = Table({"FILE": width, "ROW": -6, "DIM": -dims, **rank, "PROBABILITY": -6, last: 0})

    def show(file: str, row: int, dim: int, confidence: float, classes: Row) -> None:
        del confidence
        for number, (class_id, label, probability) in enumerate(classes, 1):
            ranked = [number] if rank else []
            name = class_id if label is None else label
            table.row(file, row, dim, *ranked, f"{probability:.4f}", name)

    return show
