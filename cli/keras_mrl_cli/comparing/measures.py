"""What every method is worth at every dim: heads, and neighbours among seen and unseen classes."""

from __future__ import annotations

from typing import Any

import numpy as np

from keras_mrl.baselines import low_rank_head, principal_components, random_probe
from keras_mrl.evaluation import score_embeddings

from .answers import Answers
from .images import split_classes
from .parts import unseen_classes
from .training import AT_ONCE

_PROBED = 20_000  # rows at most that a linear probe is trained on

ByDim = dict[str, dict[str, list[float]]]


def top1(answers: Answers) -> ByDim:
    """Return the accuracy of the head by method and dim, one number per seed."""
    found: ByDim = {}
    labels = answers.test.labels
    for net in answers.plan.nets:
        if net.all_classes:
            logits = answers.logits(net.name)
            for at, dim in enumerate(net.dims):
                right = float((logits[:, at].argmax(-1) == labels).mean())
                found.setdefault(net.method, {}).setdefault(str(dim), []).append(right)
    cut, probed = found.setdefault("svd", {}), found.setdefault("rand_lp", {})
    kernel, bias = _head(answers)
    shown, asked = answers.features(f"{answers.full}-0", answers.width)
    rows = np.random.default_rng(0).permutation(len(shown))[:_PROBED]
    for dim in answers.plan.dims:
        logits = low_rank_head(kernel, bias, dim).logits(asked)
        cut[str(dim)] = [float((logits.argmax(-1) == labels).mean())]
        probe = random_probe(shown[rows], answers.training.labels[rows], dim)
        probed[str(dim)] = [float((probe.predict(asked) == labels).mean())]
    return found


def neighbors(answers: Answers) -> dict[str, dict[str, dict[str, float]]]:
    """Return what the neighbours of the test images among the training images are worth."""
    found: dict[str, Any] = {}
    dims, width = answers.plan.dims, answers.width
    for name in ("mrl", "mrl_e"):
        found[name] = _scores(answers, *answers.features(f"{name}-0", width))
    shown, asked = answers.features(f"{answers.full}-0", width)
    found |= _cut(answers, shown, asked)
    found["ff"] = {}
    for dim in dims:
        own = answers.features(f"ff_{dim}-0", dim)
        scores = _scores(answers, *own, dims=(dim,))[str(dim)]
        del scores["recall10"]  # of itself
        found["ff"][str(dim)] = scores
    return found


def unseen(answers: Answers) -> dict[str, dict[str, dict[str, float]]]:
    """Return the same for images of classes that neither the nets nor the baselines saw."""
    classes = unseen_classes(len(answers.training.names))
    shown, asked = (split_classes(part, classes)[1] for part in (answers.training, answers.test))
    found: dict[str, Any] = {}
    for name in ("mrl", answers.full):
        body = answers.model(f"{name}_seen-0").backbone
        gallery, queries = (
            body.predict(part.pixels, batch_size=AT_ONCE, verbose=0) for part in (shown, asked)
        )
        scores = score_embeddings(queries, asked.labels, gallery, shown.labels, answers.plan.dims)
        found["mrl" if name == "mrl" else "first_coordinates"] = _as_json(scores)
        if name != "mrl":
            trained, _ = answers.features(f"{name}_seen-0", answers.width)
            pca = principal_components(trained, answers.width)
            sides = pca.embed(queries), asked.labels, pca.embed(gallery), shown.labels
            found["pca"] = _as_json(score_embeddings(*sides, answers.plan.dims))
    return found


def _cut(answers: Answers, shown: Any, asked: Any) -> dict[str, Any]:
    """What is cut from the net of full width: its first coordinates, its PCA, its head's SVD."""
    pca = principal_components(shown, answers.width)
    svd = low_rank_head(*_head(answers), answers.width)
    return {
        "first_coordinates": _scores(answers, shown, asked),
        "pca": _scores(answers, pca.embed(shown), pca.embed(asked)),
        "svd": _scores(answers, svd.embed(shown), svd.embed(asked)),
    }


def _head(answers: Answers) -> tuple[Any, Any]:
    kernel, bias = answers.model(f"{answers.full}-0").head.weights_at(answers.width)
    return kernel, bias


def _scores(
    answers: Answers, shown: Any, asked: Any, dims: tuple[int, ...] | None = None
) -> dict[str, dict[str, float]]:
    labels = answers.test.labels, answers.training.labels
    return _as_json(score_embeddings(asked, labels[0], shown, labels[1], dims or answers.plan.dims))


def _as_json(scores: dict[int, dict[str, float]]) -> dict[str, dict[str, float]]:
    return {str(dim): measures for dim, measures in scores.items()}
