"""What neighbours are worth for every method and dim, among seen and unseen classes."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

from keras_mrl.baselines import low_rank_head, principal_components
from keras_mrl.evaluation import score_embeddings

from .answers import Answers
from .heads import full_head
from .images import split_classes
from .parts import unseen_classes
from .training import AT_ONCE

Array = npt.NDArray[Any]


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
        found["ff"] |= _of_its_own(_scores(answers, *own, dims=(dim,)))
    return found


def unseen(answers: Answers) -> dict[str, dict[str, dict[str, float]]]:
    """Return the same for images of classes that neither the nets nor the baselines saw."""
    classes = unseen_classes(len(answers.training.names))
    shown, asked = (split_classes(part, classes)[1] for part in (answers.training, answers.test))

    def scored(sides: tuple[Array, Array], *dims: int) -> dict[str, dict[str, float]]:
        gallery, queries = sides
        return _as_json(score_embeddings(queries, asked.labels, gallery, shown.labels, dims))

    def embedded(name: str) -> tuple[Array, Array]:
        body = answers.model(f"{name}_seen-0").backbone
        gallery, queries = (
            body.predict(part.pixels, batch_size=AT_ONCE, verbose=0) for part in (shown, asked)
        )
        return gallery, queries

    dims, width, full = answers.plan.dims, answers.width, embedded(answers.full)
    trained, _ = answers.features(f"{answers.full}_seen-0", width)
    pca = principal_components(trained, width)
    found: dict[str, Any] = {
        "mrl": scored(embedded("mrl"), *dims),
        "first_coordinates": scored(full, *dims),
        "pca": scored((pca.embed(full[0]), pca.embed(full[1])), *dims),
        "ff": {},
    }
    for dim in dims:
        own = full if dim == width else embedded(f"ff_{dim}")
        found["ff"] |= _of_its_own(scored(own, dim))
    return found


def _cut(answers: Answers, shown: Any, asked: Any) -> dict[str, Any]:
    """What is cut from the net of full width: its first coordinates, its PCA, its head's SVD."""
    pca = principal_components(shown, answers.width)
    svd = low_rank_head(*full_head(answers), answers.width)
    return {
        "first_coordinates": _scores(answers, shown, asked),
        "pca": _scores(answers, pca.embed(shown), pca.embed(asked)),
        "svd": _scores(answers, svd.embed(shown), svd.embed(asked)),
    }


def _scores(
    answers: Answers, shown: Any, asked: Any, dims: tuple[int, ...] | None = None
) -> dict[str, dict[str, float]]:
    labels = answers.test.labels, answers.training.labels
    return _as_json(score_embeddings(asked, labels[0], shown, labels[1], dims or answers.plan.dims))


def _of_its_own(scores: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Those of a net of one dim, whose recall would be that of itself."""
    return {
        dim: {name: value for name, value in measures.items() if name != "recall10"}
        for dim, measures in scores.items()
    }


def _as_json(scores: dict[int, dict[str, float]]) -> dict[str, dict[str, float]]:
    return {str(dim): measures for dim, measures in scores.items()}
