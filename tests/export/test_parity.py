"""A signature that differs from the Keras model is found, named, and keeps the version back."""

import dataclasses
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keras_mrl_export import ExportError, export_saved_model
from keras_mrl_export.parity import check_parity
from keras_mrl_serving.cascade.policy import CascadePolicy
from tests.helpers import export_models as models
from tests.helpers.export_models import DIMS, NAMES, TEMPERATURES, TOP_K, Exported, only_tensorflow

pytestmark = pytest.mark.backend

Change = dict[str, Any]


def differs(signature: str, how: str) -> str:
    """The whole text; `how` is a pattern."""
    return re.escape(
        "Every signature must equal the Keras model on the sample. "
        f"Received: {signature} differs: HOW. Nothing was published. "
        "Look for layers that act differently on each backend or at random when training=False."
    ).replace("HOW", how)


def policy_of(version: Exported) -> CascadePolicy:
    assert version.policy is not None
    return version.policy


def shifted(version: Exported, **by: float) -> Change:
    """The features or the logits of the trained model, one of them moved by a share of the largest.

    It is the smallest of its row, which shows in no probability.
    """
    changes = {}
    for name, share in by.items():
        array = getattr(version.job, name).copy()
        rows = array.reshape(-1, array.shape[-1])  # a view
        rows[3, rows[3].argmin()] -= share * np.abs(rows[3]).max()
        changes[name] = array
    return changes


def of_temperature(version: Exported, dim: int, temperature: float) -> Change:
    stages = policy_of(version).stages
    changed = [replace(s, temperature=temperature) if s.dim == dim else s for s in stages]
    return {"policy": CascadePolicy(tuple(changed))}


def of_threshold(version: Exported, threshold: float) -> Change:
    first, *rest = policy_of(version).stages
    return {"policy": CascadePolicy((replace(first, threshold=threshold), *rest))}


SMALL = r"by \d+\.?\d*(e-\d\d)?"

# What the trained model would have to be for the SavedModel to be wrong, and what is said of it.
WRONG: dict[str, tuple[Callable[[Exported], Change], str, str]] = {
    "features": (
        lambda v: shifted(v, features=1e-4),
        "features",
        rf"{SMALL} on rows of magnitude \d+\.?\d*",
    ),
    "fewer features": (
        lambda v: {"features": v.job.features[:-1]},
        "features",
        r"shape \(16, 16\) for \(15, 16\)",
    ),
    "logits": (
        lambda v: shifted(v, logits=1e-4),
        f"head_{DIMS[0]}",
        rf"{SMALL} on rows of magnitude \d+\.?\d*",
    ),
    "temperature": (
        lambda v: of_temperature(v, DIMS[1], 1.01),
        f"classify_{DIMS[1]}",
        f"{SMALL} in its probabilities",
    ),
    "names": (
        lambda _: {"labels": (*NAMES[1:], NAMES[0])},
        f"classify_{DIMS[0]}",
        "its labels do not name its class ids",
    ),
    "a threshold above all": (
        lambda v: of_threshold(v, 1.0),
        "classify_adaptive",
        rf"row \d+ stops at dim {DIMS[0]} for ({DIMS[1]}|{DIMS[2]})",
    ),
    "a threshold below all": (
        lambda v: of_threshold(v, 0.0),
        "classify_adaptive",
        rf"row \d+ stops at dim ({DIMS[1]}|{DIMS[2]}) for {DIMS[0]}",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_difference_is_named(untied: Exported, wrong: str) -> None:
    change, signature, how = WRONG[wrong]
    with pytest.raises(ExportError, match=rf"\A{differs(signature, how)}\Z"):
        check_parity(untied.path, untied.manifest, replace(untied.job, **change(untied)))


@pytest.mark.parametrize(
    ("changes", "of_job", "signature", "how"),
    [
        ({"normalize": False}, {}, "embed_8", rf"{SMALL} on rows of magnitude \d+\.?\d*"),
        ({"name": "another"}, {}, "describe", "it is not the manifest"),
        ({"dims": (8, 12, 20)}, {"signatures": ("embed_12",)}, "embed_12", "it is missing"),
        (
            {},
            {"signatures": (), "dims": (8, 16)},
            "serving_default",
            r"shape \(16, 20\) for \(16, 16\)",
        ),
    ],
)
def test_a_manifest_that_lies_is_found(
    encoder: Exported, changes: Change, of_job: Change, signature: str, how: str
) -> None:
    manifest, job = replace(encoder.manifest, **changes), replace(encoder.job, **of_job)
    with pytest.raises(ExportError, match=rf"\A{differs(signature, how)}\Z"):
        check_parity(encoder.path, manifest, job)


def test_what_was_published_is_equal(classifier: Exported, encoder: Exported) -> None:
    for version in (classifier, encoder):
        check_parity(version.path, version.manifest, version.job)


def test_a_difference_of_rounding_is_none(untied: Exported) -> None:
    for by in ({"features": 5e-6}, {"logits": 5e-6}):
        check_parity(untied.path, untied.manifest, replace(untied.job, **shifted(untied, **by)))


def test_a_row_that_rounding_may_send_either_way_is_no_difference(untied: Exported) -> None:
    """A threshold moved across one confidence by less than the tolerance."""
    sure = models.confidence(untied.job.logits[:, 0], TEMPERATURES[DIMS[0]])  # type: ignore[index]
    first, *rest = policy_of(untied).stages
    assert first.threshold is not None
    row = int(np.argmin(np.where(sure > first.threshold, sure, 2)))

    def moved(by: float) -> Any:
        policy = CascadePolicy((replace(first, threshold=float(sure[row] + by)), *rest))
        return replace(untied.job, policy=policy)

    check_parity(untied.path, untied.manifest, moved(2e-6))
    with pytest.raises(ExportError, match=rf"row {row} stops at dim {DIMS[0]} for"):
        check_parity(untied.path, untied.manifest, moved(1e-3))


def broken_temperature(served: Any, patch: pytest.MonkeyPatch) -> None:
    make = served.__init__

    def init(self: Any, *args: Any) -> None:
        make(self, *args)
        self._temperatures[DIMS[1]] = 1.1

    patch.setattr(served, "__init__", init)


def broken_scaling(served: Any, patch: pytest.MonkeyPatch) -> None:
    def embed_at(self: Any, dim: int) -> Any:
        return lambda **inputs: {"embedding": self._features(**inputs)[:, :dim]}

    patch.setattr(served, "_embed_at", embed_at)


def broken_head(served: Any, patch: pytest.MonkeyPatch) -> None:
    logits = served._logits
    patch.setattr(served, "_logits", lambda self, prefix, dim: logits(self, prefix[:, ::-1], dim))


def broken_prefix(served: Any, patch: pytest.MonkeyPatch) -> None:
    """Heads that are right about the features they are given, and given the wrong ones."""

    def classify_at(self: Any, dim: int) -> Any:
        return lambda **inputs: self._all_rows(
            self._logits(self._features(**inputs)[:, -dim:], dim), dim
        )

    patch.setattr(served, "_classify_at", classify_at)


def broken_ids(served: Any, patch: pytest.MonkeyPatch) -> None:
    classification = served._classification

    def reversed_ids(self: Any, likeliest: Any, rows: Any) -> Any:
        answer = classification(self, likeliest, rows)
        return {**answer, "class_ids": answer["class_ids"][:, ::-1]}

    patch.setattr(served, "_classification", reversed_ids)


def broken_description(served: Any, patch: pytest.MonkeyPatch) -> None:
    del served
    from keras_mrl_export import signatures
    from keras_mrl_export.graph import describing

    patch.setattr(signatures, "describing", lambda m: describing(dataclasses.replace(m, name="x")))


@only_tensorflow
@pytest.mark.parametrize(
    ("break_it", "signature", "how"),
    [
        (broken_scaling, f"embed_{DIMS[0]}", rf"{SMALL} on rows of magnitude 1"),
        (broken_temperature, f"classify_{DIMS[1]}", f"{SMALL} in its probabilities"),
        (broken_head, f"classify_{DIMS[0]}", f"{SMALL} in its probabilities"),
        (broken_prefix, f"classify_{DIMS[0]}", f"{SMALL} in its probabilities"),
        (broken_ids, f"classify_{DIMS[0]}", f"{SMALL} in its probabilities"),
        (broken_description, "describe", "it is not the manifest"),
    ],
)
def test_a_signature_that_is_wrong_is_not_published(
    untied: Exported,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    break_it: Callable[[Any, pytest.MonkeyPatch], None],
    signature: str,
    how: str,
) -> None:
    from keras_mrl_export.signatures import ServedModel

    break_it(ServedModel, monkeypatch)
    sample = models.images(models.SAMPLED)
    with pytest.raises(ExportError, match=rf"\A{differs(signature, how)}\Z"):
        export_saved_model(untied.model, tmp_path, sample, untied.policy, labels=NAMES, top_k=TOP_K)
    assert os.listdir(tmp_path) == []
