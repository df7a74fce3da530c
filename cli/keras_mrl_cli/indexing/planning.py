"""A funnel chosen by measurement, as the arguments ask for it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_mrl_serving import FirstStage
from keras_mrl_serving.errors import TargetNotReachedError
from keras_mrl_serving.index.measures import Measure, precision_by_label
from keras_mrl_serving.index.plan import Choice, Plan
from keras_mrl_serving.index.planner import LEAST_SAMPLE, plan_funnel

from ..asking.printing import printable
from .build import BATCH, RECALL, SAMPLE, SEED
from .reading import load_embeddings, load_labels

Array = npt.NDArray[Any]


def planned(
    arguments: argparse.Namespace, gallery: Array, dims: Sequence[int] | None
) -> tuple[Plan, dict[str, Any]]:
    """Choose a funnel, and say on stderr what is tried.

    Args:
        arguments: Of `index build`.
        gallery: The embeddings.
        dims: Those a stage may have; None: powers of two.

    Returns:
        The plan, and what is kept of it beside the index.

    Raises:
        TargetNotReachedError: If no funnel reaches the target; what could be is on stderr.
    """
    own_rows = None
    if arguments.queries is not None:
        queries = load_embeddings("--queries", arguments.queries)
    else:
        # The sample is left out of what is searched, so it stays a small part of it.
        usual = min(SAMPLE, max(LEAST_SAMPLE, len(gallery) // 10))
        own_rows = _sample(len(gallery), arguments.sample or usual, arguments.seed or SEED)
        queries = gallery[own_rows]
    if dims is not None and dims[-1] < gallery.shape[1]:
        _say(
            f"recall is of the neighbours at dim {dims[-1]}; the gallery is {gallery.shape[1]} wide"
        )
    measure, target = None, arguments.target_recall or RECALL
    if arguments.target_precision is not None:
        measure = _by_label(arguments, len(gallery), len(queries), own_rows)
        target = arguments.target_precision
    batch = arguments.batch or BATCH
    try:
        found = plan_funnel(
            gallery,
            queries,
            target,
            k=arguments.k,
            dims=dims,
            metric=arguments.metric,
            measure=measure,
            own_rows=own_rows,
            first_stages=_first_stages(arguments),
            batch=batch,
            says=_say,
        )
    except TargetNotReachedError as error:
        _say_front(error.front)
        raise
    kept = {"measure": "recall" if measure is None else "precision"}
    return found, {**kept, "queries": len(queries), "batch": batch, **found.to_json()}


def first_stage(factory: str, settings: str | None, *, harder: bool) -> FirstStage:
    """Return a first stage; without settings, the usual ones of its kind.

    Args:
        factory: As FAISS knows it.
        settings: None takes the usual.
        harder: Whether they are to be doubled until they are enough.
    """
    if settings is None:
        if "IVF" in factory:
            settings = "nprobe=1" if harder else "nprobe=8"
        elif "HNSW" in factory:
            settings = "efSearch=16" if harder else "efSearch=64"
    return FirstStage(factory, settings or "")


def _first_stages(arguments: argparse.Namespace) -> list[FirstStage] | None:
    if arguments.first_stage is None:
        return None
    return [first_stage(arguments.first_stage, arguments.settings, harder=True)]


def _sample(rows: int, size: int, seed: int) -> npt.NDArray[np.int64]:
    chosen = np.random.default_rng(seed).choice(rows, min(size, rows), replace=False)
    return np.sort(chosen).astype(np.int64)


def _by_label(
    arguments: argparse.Namespace, rows: int, queries: int, own_rows: Array | None
) -> Measure:
    labels = load_labels("--labels", arguments.labels, rows)
    if own_rows is not None:
        return precision_by_label(labels, labels[own_rows])
    return precision_by_label(
        labels, load_labels("--query-labels", arguments.query_labels, queries)
    )


def _say(text: str) -> None:
    print(printable(" ".join(text.split())), file=sys.stderr, flush=True)


def _say_front(front: Sequence[Choice]) -> None:
    if front:
        table = Plan(front[-1], 1.0, tuple(front)).table().replace("   <- chosen", "")
        print(table, file=sys.stderr)
