"""Which dim is good enough, by the measures in a manifest."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import pytest

from keras_mrl_serving.contract import Manifest
from keras_mrl_serving.quality import cheapest_dim
from tests.helpers.manifests import ENCODER

Refuses = Callable[[type[Exception], str], AbstractContextManager[None]]

EVALUATED = {  # as `keras_mrl.evaluation.evaluate` returns it
    "8": {"top1": 0.6, "ece": 0.02, "nn1": 0.78},
    "16": {"top1": 0.79, "ece": 0.1, "nn1": 0.79},
    "64": {"top1": 0.8, "ece": 0.2, "nn1": 0.8},
}


def evaluated(quality: Any = EVALUATED) -> Manifest:
    return replace(ENCODER, quality=quality)


def test_without_a_name_the_measure_is_accuracy() -> None:
    assert cheapest_dim(evaluated()) == 16
    assert cheapest_dim(evaluated(), 0.7) == 8
    assert cheapest_dim(evaluated(), 0.97, "nn1") == 8


def test_without_a_name_the_only_measure_is_taken() -> None:
    only = {dim: {"map10": measures["nn1"], "ece": 0.1} for dim, measures in EVALUATED.items()}
    assert cheapest_dim(evaluated(only), 0.97) == 8


@pytest.mark.parametrize("measure", ["ece", "map10"])
def test_a_measure_that_is_better_when_less_has_no_share(measure: str, refuses: Refuses) -> None:
    text = f"measure must be one of top1, nn1. Received: measure={measure!r}. Choose one of them."
    with refuses(ValueError, text):
        cheapest_dim(evaluated(), 0.98, measure)


@pytest.mark.parametrize("measure", ["mse", "val_loss", "mean_squared_error", "Crossentropy"])
def test_an_error_is_never_the_only_measure(measure: str, refuses: Refuses) -> None:
    """The first dim has the largest error, which keeps more than its share of the last one's."""
    errors = {"8": {measure: 0.9}, "16": {measure: 0.5}, "64": {measure: 0.4}}
    text = (
        "A dim is chosen by a measure of which more is better. "
        f"Received: {measure} of model 'birds'. "
        "Export it with another as quality, such as top1 or r2, or name a dim."
    )
    for name in (None, measure):
        with refuses(ValueError, text):
            cheapest_dim(evaluated(errors), 0.98, name)


def test_one_of_several_measures_without_accuracy_must_be_named() -> None:
    others = {dim: {"nn1": 0.5, "map10": 0.5} for dim in EVALUATED}
    with pytest.raises(ValueError, match=r"\Ameasure must be one of nn1, map10. Received: "):
        cheapest_dim(evaluated(others))


@pytest.mark.parametrize("share", [0, -0.5, 1.5, float("nan")])
def test_a_share_lies_between_0_and_1(share: float, refuses: Refuses) -> None:
    text = (
        f"quality must be a share in (0, 1]. Received: quality={share!r}. "
        "Give for example 0.98: two hundredths of the full dim's quality may go."
    )
    with refuses(ValueError, text):
        cheapest_dim(evaluated(), share)


@pytest.mark.parametrize("measure", ["ap_macro", "r2"])
def test_several_labels_and_values_have_a_usual_measure_too(measure: str) -> None:
    others = {"ap_micro": 0.1, "f1_macro": 0.1, "mae": 1.0, "rmse": 9.0}
    quality = {d: {**others, measure: value} for d, value in (("8", 0.5), ("16", 0.9), ("64", 0.9))}
    assert cheapest_dim(evaluated(quality)) == 16


def test_a_share_of_less_than_nothing_is_refused(refuses: Refuses) -> None:
    text = (
        "A share of the full dim's quality is taken of a quality above 0. "
        "Received: r2 -0.25 at dim 64 of 'birds'. Choose another measure, or name a dim."
    )
    with refuses(ValueError, text):
        cheapest_dim(evaluated({dim: {"r2": -0.25} for dim in EVALUATED}))
