"""Choosing a dim by the quality in a manifest."""

import re
from typing import Any

import pytest

from keras_mrl_serving.contract import Manifest, cheapest_dim

EVALUATED = {  # what `keras_mrl.evaluation.evaluate` returns, as a manifest holds it
    "8": {"top1": 0.6, "ece": 0.02, "nn1": 0.78},
    "16": {"top1": 0.79, "ece": 0.1, "nn1": 0.79},
    "64": {"top1": 0.8, "ece": 0.2, "nn1": 0.8},
}


def manifest(quality: Any) -> Manifest:
    return Manifest(
        name="birds",
        kind="encoder",
        fingerprint="5e1f",
        dims=(8, 16, 64),
        width=64,
        inputs={"x": {"dtype": "float32", "shape": [None, 3]}},
        made_with={},
        quality=quality,
    )


def test_of_several_measures_accuracy_is_meant() -> None:
    assert cheapest_dim(manifest(EVALUATED)) == 16
    assert cheapest_dim(manifest(EVALUATED), 0.7) == 8
    assert cheapest_dim(manifest(EVALUATED), 0.97, "nn1") == 8


def test_the_only_one_is_meant_whatever_it_is() -> None:
    only = {dim: {"map10": seen["nn1"], "ece": 0.1} for dim, seen in EVALUATED.items()}
    assert cheapest_dim(manifest(only), 0.97) == 8


@pytest.mark.parametrize("measure", ["ece", "map10"])
def test_no_share_is_kept_of_what_is_better_when_less(measure: str) -> None:
    text = f"measure must be one of top1, nn1. Received: measure={measure!r}. Choose one of them."
    with pytest.raises(ValueError, match=rf"\A{re.escape(text)}\Z"):
        cheapest_dim(manifest(EVALUATED), 0.98, measure)


def test_several_without_accuracy_must_be_named() -> None:
    others = {dim: {"nn1": 0.5, "map10": 0.5} for dim in EVALUATED}
    with pytest.raises(ValueError, match=r"\Ameasure must be one of nn1, map10. Received: "):
        cheapest_dim(manifest(others))
