"""A funnel chosen by measurement, as the arguments ask for it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_mrl_serving import FirstStage
from keras_mrl_serving.errors import TargetNotReachedError
from keras_mrl_serving.index.plan import (
    Choice,
    Measure,
    Plan,
    average_precision_by_label,
    precision_by_label,
    table,
)
from keras_mrl_serving.index.planner import LEAST_SAMPLE, plan_funnel

from ..asking.printing import printable
from .build import BATCH, RECALL, SAMPLE, SEED
from .reading import load_embeddings, load_labels

Array = npt.NDArray[Any]


def planned(
    arguments: argparse.Namespace,
    gallery: Array,
    dims: Sequence[int] | None,
    first: FirstStage | None,
) -> tuple[Plan, dict[str, Any]]:
    """Choose a funnel, and say on stderr what is tried.

    Args:
        arguments: Of `index build`.
        gallery: The embeddings.
        dims: Those a stage may have; None: powers of two.
        first: The kind of first stage to try, and where to begin; None: the usual kinds.

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
    name, target, of_labels = _wanted(arguments)
    measure = None
    if of_labels is not None:
        measure = of_labels(*_labels(arguments, len(gallery), len(queries), own_rows))
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
            first_stages=None if first is None else [first],
            batch=batch,
            says=_say,
        )
    except TargetNotReachedError as error:
        _say_front(error.front)
        raise
    return found, {"measure": name, "queries": len(queries), "batch": batch, **found.to_json()}


def _wanted(arguments: argparse.Namespace) -> tuple[str, float, Callable[..., Measure] | None]:
    if arguments.target_precision is not None:
        return "precision", arguments.target_precision, precision_by_label
    if arguments.target_map is not None:
        return "map", arguments.target_map, average_precision_by_label
    return "recall", arguments.target_recall or RECALL, None


def _sample(rows: int, size: int, seed: int) -> npt.NDArray[np.int64]:
    chosen = np.random.default_rng(seed).choice(rows, min(size, rows), replace=False)
    return np.sort(chosen).astype(np.int64)


def _labels(
    arguments: argparse.Namespace, rows: int, queries: int, own_rows: Array | None
) -> tuple[Array, Array]:
    labels = load_labels("--labels", arguments.labels, rows)
    if own_rows is not None:
        return labels, labels[own_rows]
    return labels, load_labels("--query-labels", arguments.query_labels, queries)


def _say(text: str) -> None:
    print(printable(" ".join(text.split())), file=sys.stderr, flush=True)


def _say_front(front: Sequence[Choice]) -> None:
    if front:
        print(table(front), file=sys.stderr)
