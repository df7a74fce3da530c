"""A signature that differs from the Keras model is named, and keeps the version back."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from keras_mrl_export import ExportError
from keras_mrl_export.graph import trace, trace_describe, with_model_id
from keras_mrl_export.parity import check_parity, compare_searches, exact_neighbors
from keras_mrl_serving._session import SavedModelSession
from keras_mrl_serving.cascade.policy import CascadePolicy
from keras_mrl_serving.funnel import FunnelSchedule
from keras_mrl_serving.index import ExactIndex
from tests.helpers import export_models as models
from tests.helpers.export_galleries import GALLERY, IDS, METRICS, QUERIES, WIDTH, index_of
from tests.helpers.export_models import DIMS, NAMES, TEMPERATURES, Arrays, Exported

Change = dict[str, Any]


def differs(signature: str, how: str) -> str:
    """The whole error; `how` is a pattern."""
    return re.escape(
        "Every signature must equal the Keras model on the sample. "
        f"Received: {signature} differs: HOW. Nothing was published. "
        "Look for layers that act differently on each backend or at random when training=False."
    ).replace("HOW", how)


def assert_differs(version: Exported, changes: Change, signature: str, how: str) -> None:
    with pytest.raises(ExportError, match=rf"\A{differs(signature, how)}\Z"):
        check_parity(version.session, version.manifest, replace(version.job, **changes))


def shifted(version: Exported, **shares: float) -> Change:
    """The features or the logits of the trained model, one of them moved by a share of the largest.

    It is the smallest of its row, which shows in no probability.
    """
    changes = {}
    for name, share in shares.items():
        array = getattr(version.job, name).copy()
        rows = array.reshape(-1, array.shape[-1])  # a view
        rows[3, rows[3].argmin()] -= share * np.abs(rows[3]).max()
        changes[name] = array
    return changes


def with_temperature(version: Exported, dim: int, temperature: float) -> Change:
    stages = version.policy.stages
    changed = [replace(s, temperature=temperature) if s.dim == dim else s for s in stages]
    return {"policy": CascadePolicy(tuple(changed))}


def with_threshold(version: Exported, threshold: float) -> Change:
    first, *rest = version.policy.stages
    return {"policy": CascadePolicy((replace(first, threshold=threshold), *rest))}


SMALL = r"by \d+\.?\d*(e-\d\d)?"
UNIDENTIFIED = "its rows do not carry the manifest's model_id"
MAGNITUDE = rf"{SMALL} on rows of magnitude \d+\.?\d*"

# How the trained model would have to differ for the SavedModel to be wrong, and the error.
WRONG: dict[str, tuple[Callable[[Exported], Change], str, str]] = {
    "features": (
        lambda v: shifted(v, features=1e-4),
        "features",
        MAGNITUDE,
    ),
    "fewer features": (
        lambda v: {"features": v.job.features[:-1]},
        "features",
        r"shape \(16, 16\) for \(15, 16\)",
    ),
    "logits": (
        lambda v: shifted(v, logits=1e-4),
        f"head_{DIMS[0]}",
        MAGNITUDE,
    ),
    "temperature": (
        lambda v: with_temperature(v, DIMS[1], 1.01),
        f"classify_{DIMS[1]}",
        f"{SMALL} in its probabilities",
    ),
    "names": (
        lambda _: {"labels": (*NAMES[1:], NAMES[0])},
        f"classify_{DIMS[0]}",
        "its labels do not name its class ids",
    ),
    "a threshold above all": (
        lambda v: with_threshold(v, 1.0),
        "classify_adaptive",
        rf"row \d+ stops at dim {DIMS[0]} for ({DIMS[1]}|{DIMS[2]})",
    ),
    "a threshold below all": (
        lambda v: with_threshold(v, 0.0),
        "classify_adaptive",
        rf"row \d+ stops at dim ({DIMS[1]}|{DIMS[2]}) for {DIMS[0]}",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_difference_is_named(untied: Exported, wrong: str) -> None:
    change, signature, how = WRONG[wrong]
    assert_differs(untied, change(untied), signature, how)


def test_a_confidence_by_another_measure_is_named(untied: Exported) -> None:
    policy = CascadePolicy(untied.policy.stages, "margin")
    how = "its confidence is not its margin"
    assert_differs(untied, {"policy": policy}, f"classify_{DIMS[0]}", how)


@pytest.mark.parametrize(
    ("changes", "of_job", "signature", "how"),
    [
        ({"normalize": False}, {}, "embed_8", MAGNITUDE),
        ({"name": "another"}, {}, "describe", "it is not the manifest"),
        ({"model_id": 1}, {}, "features", UNIDENTIFIED),
        ({"model_id": None}, {}, "features", UNIDENTIFIED),
        ({"dims": (8, 12, 20)}, {"signatures": ("embed_12",)}, "embed_12", "it is missing"),
        (
            {},
            {"signatures": (), "dims": (8, 16)},
            "serving_default",
            r"shape \(16, 20\) for \(16, 16\)",
        ),
    ],
)
def test_a_manifest_that_does_not_fit_is_found(
    encoder: Exported, changes: Change, of_job: Change, signature: str, how: str
) -> None:
    manifest, job = replace(encoder.manifest, **changes), replace(encoder.job, **of_job)
    with pytest.raises(ExportError, match=rf"\A{differs(signature, how)}\Z"):
        check_parity(encoder.session, manifest, job)


def test_what_was_published_is_equal(classifier: Exported, encoder: Exported) -> None:
    for version in (classifier, encoder):
        report = check_parity(version.session, version.manifest, version.job)
        assert (report["rows"], report["tolerance"]) == (16, 1e-5)
        shares = report["largest_difference"]
        assert shares.keys() == {*version.job.signatures, "serving_default"}
        assert all(0 <= share <= 1e-5 for share in shares.values())


def test_a_difference_of_rounding_is_none(untied: Exported) -> None:
    for by in ({"features": 5e-6}, {"logits": 5e-6}):
        job = replace(untied.job, **shifted(untied, **by))
        check_parity(untied.session, untied.manifest, job)


def test_a_row_that_rounding_may_send_either_way_is_no_difference(untied: Exported) -> None:
    """A threshold moved across one confidence by less than the tolerance."""
    confidences = models.confidence(untied.logits[: models.SAMPLED, 0], TEMPERATURES[DIMS[0]])
    first, *rest = untied.policy.stages
    assert first.threshold is not None
    row = int(np.argmin(np.where(confidences > first.threshold, confidences, 2)))

    def moved(by: float) -> Any:
        stage = replace(first, threshold=float(confidences[row] + by))
        return replace(untied.job, policy=CascadePolicy((stage, *rest)))

    check_parity(untied.session, untied.manifest, moved(2e-6))
    with pytest.raises(ExportError, match=rf"row {row} stops at dim {DIMS[0]} for"):
        check_parity(untied.session, untied.manifest, moved(1e-3))


# A SavedModel that is wrong: the published one, saved again with a fault in each signature.


@pytest.fixture(scope="module")
def faulty(
    untied: Exported, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SavedModelSession]:
    loaded = tf.saved_model.load(str(untied.path))
    right = loaded.signatures
    first, second, last = DIMS

    def features(image: Any) -> Any:
        return right["features"](image=image)["features"]

    def head(dim: int, features: Any) -> Any:
        outputs = right[f"head_{dim}"](features=features)
        return {name: outputs[name] for name in outputs if name != "logits"}

    def of_the_last_columns(image: Any) -> Any:
        return head(first, features(image)[:, -first:])

    def of_another_temperature(image: Any) -> Any:
        outputs = right[f"head_{second}"](features=features(image)[:, :second])
        shares = tf.nn.softmax(outputs["logits"] / 1.1)
        best = tf.gather(shares, outputs["class_ids"], batch_dims=1)
        names = {"class_ids": outputs["class_ids"], "labels": outputs["labels"]}
        return {**names, "probabilities": best, "confidence": best[:, 0]}

    def with_ids_reversed(image: Any) -> Any:
        outputs = right[f"classify_{last}"](image=image)
        return {**outputs, "class_ids": outputs["class_ids"][:, ::-1]}

    def always_at_the_last_dim(image: Any) -> Any:
        outputs = right["classify_adaptive"](image=image)
        return {**outputs, "dim": tf.fill(tf.shape(outputs["dim"]), last)}

    def of_reversed_features(features: Any) -> Any:
        return right[f"head_{second}"](features=features[:, ::-1])

    image = {"image": tf.TensorSpec([None, 6, 6, 3], tf.float32, "image")}
    prefix = {"features": tf.TensorSpec([None, second], tf.float32, "features")}

    def without_id(image: Any) -> Any:
        outputs = of_the_last_columns(image)
        return {name: outputs[name] for name in outputs if name != "model_id"}

    def traced(function: Any, specs: Any) -> Any:
        return trace(with_model_id(function, untied.manifest.model_id), specs)

    wrong = {
        f"embed_{first}": traced(lambda image: {"embedding": features(image)[:, :first]}, image),
        f"classify_{first}": traced(of_the_last_columns, image),
        f"classify_{second}": traced(of_another_temperature, image),
        f"classify_{last}": traced(with_ids_reversed, image),
        f"head_{second}": traced(of_reversed_features, prefix),
        "classify_adaptive": traced(always_at_the_last_dim, image),
        "serving_default": trace(without_id, image),
        "describe": trace_describe(replace(untied.manifest, name="another")),
    }
    folder = str(tmp_path_factory.mktemp("faulty") / "1")
    tf.saved_model.save(loaded, folder, signatures={**right, **wrong})
    with SavedModelSession(folder) as session:
        yield session


@pytest.mark.parametrize(
    ("signature", "how"),
    [
        (f"embed_{DIMS[0]}", rf"{SMALL} on rows of magnitude 1"),
        *((f"classify_{dim}", f"{SMALL} in its probabilities") for dim in DIMS),
        (f"head_{DIMS[1]}", MAGNITUDE),
        ("classify_adaptive", rf"row \d+ stops at dim {DIMS[2]} for ({DIMS[0]}|{DIMS[1]})"),
        ("serving_default", f"{SMALL} in its probabilities"),
        ("describe", "it is not the manifest"),
    ],
)
def test_a_signature_that_is_wrong_is_named(
    untied: Exported, faulty: SavedModelSession, signature: str, how: str
) -> None:
    class Repaired:
        """The right signatures, and one that is wrong."""

        signatures = untied.session.signatures

        def run(self, name: str, inputs: Any) -> Any:
            return (faulty if name == signature else untied.session).run(name, inputs)

    session: Any = Repaired()
    with pytest.raises(ExportError, match=rf"\A{differs(signature, how)}\Z"):
        check_parity(session, untied.manifest, untied.job)


# Searches of a gallery


@pytest.mark.parametrize(
    ("signature", "wrong", "how"),
    [
        ("search", "ids", "it finds other neighbours"),
        ("search", "scores", MAGNITUDE),
        ("search_4", "ids", "it finds other neighbours"),
    ],
)
def test_a_search_that_answers_otherwise_is_named(signature: str, wrong: str, how: str) -> None:
    index = index_of()

    def run(name: str, inputs: Any) -> Any:
        queries = inputs["embedding"]
        if name == "search":
            neighbors = index.search(queries)
        else:
            neighbors = exact_neighbors(index, queries, [queries.shape[1]])[queries.shape[1]]
        answer: Arrays = {"ids": neighbors.ids, "scores": neighbors.scores.astype(np.float32)}
        return {**answer, wrong: answer[wrong] + 1} if name == signature else answer

    with pytest.raises(ExportError, match=rf"\A{differs(signature, how)}\Z"):
        compare_searches(run, index, QUERIES, ["search", "search_4", "search_16"])
    shares = compare_searches(run, index, QUERIES, {"search_8", "embed_4"})
    assert list(shares) == ["search_8"]


@pytest.mark.parametrize("metric", METRICS)
def test_searches_at_one_dim_are_compared_with_the_nearest_of_all_rows(metric: str) -> None:
    index = index_of("three stages", metric)
    neighbors_by_dim = exact_neighbors(index, QUERIES, [3, 8, 12, WIDTH], rows_at_once=7)
    assert list(neighbors_by_dim) == [3, 8, 12, WIDTH]
    for dim, neighbors in neighbors_by_dim.items():
        alone = ExactIndex.build(GALLERY, FunnelSchedule((dim,), (), 10), IDS, metric)
        expected = alone.search(QUERIES[:, :dim])
        np.testing.assert_allclose(neighbors.scores, expected.scores, rtol=1e-4, atol=1e-5)
        gaps = np.abs(np.diff(neighbors.scores, axis=1, prepend=np.inf, append=-np.inf)) > 1e-4
        clear = (gaps[:, :-1] & gaps[:, 1:])[:, :-1]
        np.testing.assert_array_equal(neighbors.ids[:, :-1][clear], expected.ids[:, :-1][clear])
        assert clear.mean() > 0.5
    assert exact_neighbors(index, QUERIES, []) == {}
