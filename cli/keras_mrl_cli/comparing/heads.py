"""What heads are worth for every method and dim, and linear probes of the features."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_mrl.baselines import low_rank_head, random_probe
from keras_mrl.evaluation import LinearProbe, linear_probe, score_head

from .answers import Answers

# Training rows at most that a linear probe sees, and one of the baseline: minutes for 256 dims.
PROBED, _BASELINE_PROBED = 10_000, 20_000

Array = npt.NDArray[Any]
ByDim = dict[str, dict[str, list[float]]]


def scores(answers: Answers) -> dict[str, ByDim]:
    """Return `top1`, `top5` and `ece` of the head by method and dim, one number per seed."""
    found: dict[str, ByDim] = {"top1": {}, "top5": {}, "ece": {}}
    for method, dim, logits in _logits(answers):
        # Logits are features that a head of ones takes as they are.
        judged = score_head(logits, answers.test.labels, np.eye(logits.shape[1]), None)
        for measure, by_method in found.items():
            by_method.setdefault(method, {}).setdefault(str(dim), []).append(judged[measure])
    return found


def probes(answers: Answers) -> ByDim:
    """Return the accuracy of a linear probe of the first Matryoshka net's features, dim by dim."""
    shown, asked = answers.features("mrl-0", answers.width)
    rows = _drawn(len(shown), PROBED)
    labels = answers.training.labels[rows]
    found: dict[str, list[float]] = {}
    for dim in answers.plan.dims:
        probe = linear_probe(shown[rows, :dim], labels)
        right = probe.predict(asked[:, :dim]) == answers.test.labels
        found[str(dim)] = [float(right.mean())]
    return {"mrl": found}


def full_head(answers: Answers) -> tuple[Any, Any]:
    """Return kernel and bias of the separate net of full width."""
    kernel, bias = answers.model(f"{answers.full}-0").head.weights_at(answers.width)
    return kernel, bias


def of_all(probe: LinearProbe, features: Array, count: int) -> Array:
    """Return logits of all `count` classes; those the probe never saw are the least likely."""
    known = probe.logits(features)
    found = np.full((len(known), count), known.min() - 1e3)
    found[:, probe.classes] = known
    return found


def _logits(answers: Answers) -> Iterator[tuple[str, int, Array]]:
    """Those of the test images, by method and dim: of nets, and of what is cut from the widest."""
    for net in answers.plan.nets:
        if net.all_classes:
            logits = answers.logits(net.name)
            for at, dim in enumerate(net.dims):
                yield net.method, dim, logits[:, at]
    head = full_head(answers)
    shown, asked = answers.features(f"{answers.full}-0", answers.width)
    rows = _drawn(len(shown), _BASELINE_PROBED)
    for dim in answers.plan.dims:
        yield "svd", dim, low_rank_head(*head, dim).logits(asked)
        chosen = random_probe(shown[rows], answers.training.labels[rows], dim)
        found = of_all(chosen.probe, chosen.embed(asked), len(answers.training.names))
        yield "rand_lp", dim, found


def _drawn(rows: int, most: int) -> Array:
    return np.random.default_rng(0).permutation(rows)[:most]
