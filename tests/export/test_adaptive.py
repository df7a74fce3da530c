"""A cascade in the graph: which rows leave at which stage, and what is computed for the others."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from keras_mrl_export.adaptive import classify_adaptively
from keras_mrl_export.likeliest import Likeliest
from keras_mrl_serving.cascade.confidence import CONFIDENCES, confidence_of
from keras_mrl_serving.cascade.policy import CascadePolicy, Stage
from keras_mrl_serving.cascade.thresholds import midway

CLASSES, COUNT = 4, 20
ALL, NOBODY = -1.0, 1.0  # every confidence is above the one, none above the other
FEATURES = np.random.default_rng(0).normal(size=(COUNT, 6)).astype(np.float32)
KERNEL = np.random.default_rng(1).normal(size=(6, CLASSES)).astype(np.float32)


def policy(*thresholds: float, dims: tuple[int, ...] = (1, 3, 6)) -> CascadePolicy:
    stages = [Stage(dim, t, 0.5 + dim) for dim, t in zip(dims, thresholds, strict=False)]
    return CascadePolicy((*stages, Stage(dims[len(thresholds)], None)))


class Heads:
    """A head per dim that records how many rows it classifies."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def logits_at(self, prefix: Any, dim: int) -> Any:
        self.calls.append((dim, int(prefix.shape[0])))
        assert prefix.shape[1] == dim
        return prefix @ KERNEL[:dim]

    def classification(self, likeliest: Likeliest, rows: Any) -> dict[str, Any]:
        best, class_ids = likeliest.best(rows, 1)
        return {"class_id": class_ids[:, 0], "probability": best[:, 0]}


def run(policy: CascadePolicy, features: Any = FEATURES) -> tuple[dict[str, Any], Heads]:
    heads = Heads()
    answer = classify_adaptively(
        tf.constant(features), policy, heads.logits_at, heads.classification
    )
    return {name: column.numpy() for name, column in answer.items()}, heads


def expected(policy: CascadePolicy, row: Any) -> tuple[int, int, float]:
    """Class, dim and probability of one row, by the words of the contract."""
    for stage in policy.stages:
        logits = row[: stage.dim].astype(np.float64) @ KERNEL[: stage.dim]
        raised = np.exp(logits / stage.temperature)
        share = float((raised / raised.sum()).max())
        if stage.threshold is None or share > stage.threshold:
            break
    return int(np.argmax(logits)), stage.dim, share


def test_each_row_stops_where_it_is_sure_in_the_order_of_the_rows() -> None:
    two_stops = policy(0.40, 0.32)
    answer, _ = run(two_stops)
    rows = [expected(two_stops, row) for row in FEATURES]
    answers = zip(answer["class_id"].tolist(), answer["dim"].tolist(), strict=True)
    assert list(answers) == [row[:2] for row in rows]
    assert set(answer["dim"].tolist()) == {1, 3, 6}
    np.testing.assert_allclose(answer["probability"], [share for *_, share in rows], rtol=1e-5)
    assert answer["dim"].dtype == np.int32


@pytest.mark.parametrize("measure", CONFIDENCES)
def test_rows_stop_by_any_measure_as_the_policy_routes_them(measure: str) -> None:
    dims = (1, 3, 6)
    logits = np.stack([FEATURES[:, :dim] @ KERNEL[:dim] for dim in dims], axis=1)
    stages = [Stage(dim, 0.0, 0.5 + dim) for dim in dims[:-1]]
    sure = [confidence_of(measure, logits[:, i], s.temperature) for i, s in enumerate(stages)]
    middle = [midway(np.sort(column), COUNT // 2) for column in sure]
    stages = [replace(s, threshold=t) for s, t in zip(stages, middle, strict=True)]
    by_measure = CascadePolicy((*stages, Stage(6, None)), measure)
    answer, _ = run(by_measure)
    class_ids, stage_of = by_measure.route(logits)
    np.testing.assert_array_equal(answer["class_id"], class_ids)
    np.testing.assert_array_equal(answer["dim"], np.array(dims)[stage_of])
    assert len(set(answer["dim"].tolist())) == 3


def test_a_row_alone_is_answered_as_among_others() -> None:
    two_stops = policy(0.40, 0.32)
    together, _ = run(two_stops)
    for row in range(COUNT):
        alone, _ = run(two_stops, FEATURES[row : row + 1])
        assert {name: column[0] for name, column in alone.items()} == {
            name: column[row] for name, column in together.items()
        }


def test_wider_heads_are_asked_only_for_rows_still_unsure() -> None:
    answer, heads = run(policy(0.40, 0.32))
    unsure = [int((answer["dim"] >= dim).sum()) for dim in (1, 3, 6)]
    assert heads.calls == list(zip((1, 3, 6), unsure, strict=True))
    assert COUNT > unsure[1] > unsure[2] > 0


def test_a_threshold_below_all_confidences_stops_all_at_the_first_dim() -> None:
    answer, heads = run(policy(ALL, ALL))
    assert set(answer["dim"].tolist()) == {1}
    assert heads.calls == [(1, COUNT), (3, 0), (6, 0)]


def test_a_threshold_above_all_confidences_asks_every_dim() -> None:
    answer, heads = run(policy(NOBODY, NOBODY))
    assert set(answer["dim"].tolist()) == {6}
    assert heads.calls == [(1, COUNT), (3, COUNT), (6, COUNT)]
    np.testing.assert_array_equal(answer["class_id"], np.argmax(FEATURES @ KERNEL, axis=-1))


def test_a_confidence_equal_to_the_threshold_is_not_above_it() -> None:
    level = np.zeros((1, 6), np.float32)  # four equal logits: a confidence of exactly 1/4
    assert run(policy(0.25, ALL), level)[0]["dim"].tolist() == [3]
    assert run(policy(np.nextafter(np.float32(0.25), 0), ALL), level)[0]["dim"].tolist() == [1]


def test_one_stage_is_that_dim() -> None:
    answer, _ = run(CascadePolicy((Stage(3, None),)))
    assert set(answer["dim"].tolist()) == {3}
    np.testing.assert_array_equal(
        answer["class_id"], np.argmax(FEATURES[:, :3] @ KERNEL[:3], axis=-1)
    )


def test_no_rows_have_no_answers() -> None:
    answer, _ = run(policy(0.3, 0.35), FEATURES[:0])
    assert {name: column.shape for name, column in answer.items()} == {
        "class_id": (0,),
        "probability": (0,),
        "dim": (0,),
    }


@pytest.mark.parametrize("spoilt", [np.nan, np.inf, -np.inf])
def test_a_spoilt_row_spoils_no_other(spoilt: float) -> None:
    features = FEATURES.copy()
    features[7] = spoilt
    (answer, _), (clean, _) = run(policy(0.40, 0.32), features), run(policy(0.40, 0.32))
    others = np.arange(COUNT) != 7
    for name, column in answer.items():
        np.testing.assert_array_equal(column[others], clean[name][others])


def test_large_logits_do_not_overflow() -> None:
    answer, _ = run(policy(0.9, 0.9), 1e4 * np.abs(FEATURES))
    assert set(answer["dim"].tolist()) == {1}
