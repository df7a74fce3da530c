"""The policy beside the paper's procedure written as plain loops, row by row in float64."""

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from keras_mrl_serving.cascade.confidence import max_probability, softmax
from keras_mrl_serving.cascade.policy import CascadePolicy, CascadeReport, Stage
from keras_mrl_serving.contract import Manifest
from keras_mrl_serving.errors import ManifestError
from tests.helpers.holdouts import DIMS, holdouts

Array = npt.NDArray[Any]
Refuses = Callable[[type[Exception], str], AbstractContextManager[None]]

GRID = [np.float32(0.1 + i * 0.9 / 99) for i in range(100)]
TWO = CascadePolicy((Stage(8, 0.5), Stage(16, None)))


@st.composite
def policies(draw: st.DrawFn, stages: int) -> CascadePolicy:
    thresholds = [*(draw(st.floats(-0.1, 1.1)) for _ in range(stages - 1)), None]
    temperatures = [draw(st.floats(0.25, 4)) for _ in range(stages)]
    return CascadePolicy(tuple(map(Stage, DIMS[:stages], thresholds, temperatures)), method="drawn")


def probabilities(logits: Array, temperature: float) -> Array:
    scaled = logits.astype(np.float64) / temperature
    raised = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    return raised / raised.sum(axis=-1, keepdims=True)


def threshold_by_loops(confidence: Array, is_right: Array, is_right_next: Array) -> np.float32:
    """The paper's threshold of one adjacent pair: of the best accuracy, the smallest."""
    best, best_threshold = -1, np.float32(0)
    for threshold in GRID:
        count = sum(
            bool(is_right[row] if confidence[row] > threshold else is_right_next[row])
            for row in range(len(confidence))
        )
        if count > best:
            best, best_threshold = count, threshold
    return best_threshold


def routed_by_loops(policy: CascadePolicy, logits: Array) -> tuple[list[int], list[int]]:
    class_ids, stage_of = [], []
    for row in logits:
        for index, stage in enumerate(policy.stages):
            confidence = probabilities(row[index], stage.temperature).max()
            if stage.threshold is None:
                break
            assume(abs(confidence - stage.threshold) > 1e-5)
            if confidence > stage.threshold:
                break
        class_ids.append(int(np.argmax(row[index])))
        stage_of.append(index)
    return class_ids, stage_of


@given(holdouts())
def test_a_learned_policy_decides_as_the_papers_procedure(holdout: tuple[Array, Array]) -> None:
    logits, labels = holdout
    policy = CascadePolicy.learn(logits, labels, DIMS[: logits.shape[1]])
    assert policy.dims == DIMS[: logits.shape[1]]
    is_right = np.argmax(logits, axis=-1) == labels[:, None]
    stage_of = np.full(len(logits), len(policy.stages) - 1)
    for index in reversed(range(len(policy.stages) - 1)):
        confidence = max_probability(logits[:, index])
        theirs = confidence > threshold_by_loops(
            confidence, is_right[:, index], is_right[:, index + 1]
        )
        ours = confidence > np.float32(policy.stages[index].threshold)
        np.testing.assert_array_equal(ours, theirs)
        stage_of[theirs] = index
    np.testing.assert_array_equal(policy.route(logits)[1], stage_of)


@given(holdouts())
def test_a_threshold_lies_midway_between_two_confidences(holdout: tuple[Array, Array]) -> None:
    logits, labels = holdout
    policy = CascadePolicy.learn(logits, labels, DIMS[: logits.shape[1]])
    for index, stage in enumerate(policy.stages[:-1]):
        threshold = stage.threshold
        assert threshold is not None
        assert np.float32(threshold) == threshold
        confidence = max_probability(logits[:, index])
        below = confidence[confidence <= threshold].max(initial=0)
        above = confidence[confidence > threshold].min(initial=1)
        assert abs(threshold - (float(below) + float(above)) / 2) <= np.spacing(np.float32(above))


def test_learned_thresholds_are_the_ones_counted_by_hand() -> None:
    # Two classes; the confidence of a row is 1 / (1 + exp(-gap)).
    gaps = np.array([0.1, 0.5, 1.0, 2.0, 3.0])
    narrow = np.stack([gaps, np.zeros(5)], axis=-1)  # says class 0, ever surer
    wide = np.array([[0.0, 9.0], [0.0, 9.0], [9.0, 0.0], [0.0, 9.0], [0.0, 9.0]])
    labels = np.array([1, 1, 0, 0, 0])  # the wide dim is right on 0, 1 and 2, the narrow on 2, 3, 4
    policy = CascadePolicy.learn(np.stack([narrow, wide], axis=1), labels, (4, 8))
    # Best: the narrow dim from row 2 on. The smallest threshold for that lies above row 1.
    below, above = 1 / (1 + np.exp(-0.5)), 1 / (1 + np.exp(-1.0))
    assert policy.stages[0].threshold == pytest.approx((below + above) / 2, abs=1e-7)
    assert policy.holdout is not None
    assert asdict(policy.holdout) == {
        "accuracy": 1.0,
        "full_accuracy": 0.6,
        "expected_dim": pytest.approx((8 * 2 + 4 * 3) / 5),
        "cumulative_dim": pytest.approx((12 * 2 + 4 * 3) / 5),
        "exit_fractions": (0.6, 0.4),
        "size": 5,
    }
    assert policy.method == "paper: adjacent pairs, grid of 100, smallest best threshold"


def test_neighbouring_confidences_are_told_apart() -> None:
    """Where no float32 lies between, the threshold is the lower one: it does not accept itself."""
    logits = np.array([[[0.0, 0.0], [0.0, 1.0]], [[2.0**-22, 0.0], [0.0, 1.0]]])
    low, high = max_probability(logits[:, 0])
    assert np.nextafter(low, np.float32(1)) == high
    policy = CascadePolicy.learn(np.repeat(logits, 2, axis=0), [1, 1, 0, 0], (1, 2))
    assert policy.stages[0].threshold == low
    assert policy.holdout is not None
    assert policy.holdout.exit_fractions == (0.5, 0.5)


@given(holdouts(), st.data())
def test_route_and_evaluate_are_their_loops(
    holdout: tuple[Array, Array], data: st.DataObject
) -> None:
    logits, labels = holdout
    policy = data.draw(policies(logits.shape[1]))
    class_ids, stage_of = routed_by_loops(policy, logits)
    routed = policy.route(logits)
    assert [column.tolist() for column in routed] == [class_ids, stage_of]
    rows = len(logits)
    truth = labels.tolist()
    dims_paid = [sum(policy.dims[: stage + 1]) for stage in stage_of]
    assert asdict(policy.evaluate(logits, labels)) == {
        "accuracy": pytest.approx(sum(map(int.__eq__, class_ids, truth)) / rows),
        "full_accuracy": pytest.approx(
            sum(map(int.__eq__, logits[:, -1].argmax(axis=-1).tolist(), truth)) / rows
        ),
        "expected_dim": pytest.approx(sum(policy.dims[stage] for stage in stage_of) / rows),
        "cumulative_dim": pytest.approx(sum(dims_paid) / rows),
        "exit_fractions": pytest.approx(
            tuple(stage_of.count(stage) / rows for stage in range(len(policy.stages)))
        ),
        "size": rows,
    }


@given(holdouts(), st.data())
def test_a_row_is_decided_without_the_others(
    holdout: tuple[Array, Array], data: st.DataObject
) -> None:
    logits, _ = holdout
    policy = data.draw(policies(logits.shape[1]))
    together = np.stack(policy.route(logits))
    alone = [np.stack(policy.route(logits[row : row + 1])) for row in range(len(logits))]
    np.testing.assert_array_equal(together, np.concatenate(alone, axis=1))


@pytest.mark.parametrize(("threshold", "stage"), [(-1.0, 0), (0.0, 0), (1.0, 2), (2.0, 2)])
def test_thresholds_below_and_above_every_confidence(threshold: float, stage: int) -> None:
    logits = np.random.default_rng(0).normal(size=(50, 3, 10)) * 100  # some as sure as 1.0
    assert max_probability(logits).max() == 1
    policy = CascadePolicy((Stage(8, threshold), Stage(16, threshold), Stage(32, None)))
    assert set(policy.route(logits)[1].tolist()) == {stage}


def test_a_confidence_equal_to_the_threshold_is_not_above_it() -> None:
    policy = CascadePolicy((Stage(8, 0.5), Stage(16, None)))
    assert policy.route(np.zeros((1, 2, 2)))[1].tolist() == [1]


def test_a_temperature_divides_before_the_softmax() -> None:
    logits = np.array([[[2.0, 0.0], [0.0, 1.0]]])
    for temperature, stage in ((1.0, 0), (4.0, 1)):
        policy = CascadePolicy((Stage(8, 0.8, temperature), Stage(16, None)))
        assert policy.route(logits)[1].tolist() == [stage]


@pytest.mark.parametrize("dtype", ["float16", "float64", "int8", "object"])
def test_logits_may_be_of_any_dtype_of_numbers(dtype: str) -> None:
    logits = np.random.default_rng(0).integers(-9, -1, size=(20, 2, 3))
    expected = TWO.route(logits.astype(np.float32))
    for same in (logits.astype(dtype), logits.tolist(), np.asfortranarray(logits)):
        np.testing.assert_array_equal(TWO.route(same), expected)
    labels = np.arange(20) % 3
    numpys_own: Any = np.array([8, 16])
    assert CascadePolicy.learn(logits.astype(dtype), labels.astype(np.uint8), (8, 16)) == (
        CascadePolicy.learn(logits.astype(np.float32), labels, numpys_own)
    )


def test_no_rows_are_routed_to_no_rows() -> None:
    class_ids, stage_of = TWO.route(np.zeros((0, 2, 3)))
    assert class_ids.shape == stage_of.shape == (0,)


def test_one_stage_is_that_dim_alone() -> None:
    policy = CascadePolicy.learn([[[-1.0, -2.0]]], [0], (8,))
    assert policy.stages == (Stage(8, None),)
    assert policy.holdout == CascadeReport(1.0, 1.0, 8.0, 8.0, (1.0,), 1)


@given(holdouts(), st.data())
def test_a_policy_comes_back_from_the_manifest(
    manifests: Mapping[str, Manifest], holdout: tuple[Array, Array], data: st.DataObject
) -> None:
    by_hand = data.draw(policies(holdout[0].shape[1]))
    for policy in (by_hand, CascadePolicy.learn(*holdout, by_hand.dims)):
        manifest = replace(manifests["classifier"], cascade=policy.to_json())
        read = Manifest.from_json(manifest.to_json())
        assert read == manifest
        assert read.cascade is not None
        assert CascadePolicy.from_json(read.cascade) == policy


def test_the_manifest_s_object_has_the_keys_of_the_contract() -> None:
    written = CascadePolicy.learn([[[-1.0, -2.0]] * 2], [0], (8, 16)).to_json()
    assert json.loads(json.dumps(written)) == {
        "stages": [
            {"dim": 8, "threshold": pytest.approx(0.3655, abs=1e-4), "temperature": 1.0},
            {"dim": 16, "threshold": None, "temperature": 1.0},
        ],
        "confidence": "max_probability",
        "method": "paper: adjacent pairs, grid of 100, smallest best threshold",
        "guarantee": None,
        "holdout_size": 1,
        "accuracy": 1.0,
        "full_accuracy": 1.0,
        "expected_dim": 8.0,
        "cumulative_dim": 8.0,
        "exit_fractions": [1.0, 0.0],
    }


def test_stages_of_numpy_numbers_become_python_s_own() -> None:
    stages: Any = [Stage(np.int64(8), np.float32(0.5), np.float64(2)), Stage(np.uint8(16), None)]  # type: ignore[arg-type]
    policy = CascadePolicy(stages)
    assert policy == CascadePolicy((Stage(8, 0.5, 2.0), Stage(16, None)))
    assert hash(policy) == hash(replace(policy))
    assert json.dumps(policy.to_json())


@pytest.mark.parametrize(
    ("written", "received"),
    [
        ({}, "{} (KeyError: 'stages')"),
        ([1], "[1] (TypeError: list indices must be integers or slices, not str)"),
        ("x", "'x' (TypeError: string indices must be integers, not 'str')"),
        (None, "None (TypeError: argument of type 'NoneType' is not iterable)"),
        (
            {"stages": [], "confidence": "max_probability"},
            "{'stages': [], 'confidence': 'max_probability'} (ValueError: dims must be strictly "
            "increasing positive integers. Received: dims=(). Give prefix lengths, for example "
            "dims=(8, 16, 32).)",
        ),
        (
            {"stages": [{"dim": 8, "threshold": None}], "confidence": "surprise"},
            "{'stages': [{'dim': 8, 'threshold': None}], 'confidence': 'surprise'} (ValueError: "
            "confidence must be one of max_probability, margin, entropy. "
            "Received: confidence='surprise'. Choose one of those.)",
        ),
    ],
)
def test_a_cascade_that_cannot_be_read_is_refused(
    written: Any, received: str, refuses: Refuses
) -> None:
    text = (
        f"A cascade names its stages and its confidence. Received: {received}. "
        "Install the version of keras-mrl that exported the model, or a later one."
    )
    with refuses(ManifestError, text):
        CascadePolicy.from_json(written)


def test_keys_of_a_later_cascade_do_not_matter() -> None:
    later = {**TWO.to_json(), "colour": "green"}
    later["stages"][0]["layer"] = 3
    assert CascadePolicy.from_json(later) == TWO
    del later["stages"][0]["temperature"], later["method"]
    assert CascadePolicy.from_json(later) == replace(TWO, method="unknown")


LOGITS_5 = np.random.default_rng(0).normal(size=(5, 2, 3))
LABELS_5 = np.array([0, 1, 2, 0, 1])


def test_labels_may_be_a_column() -> None:
    """As the datasets of Keras have them."""
    column = LABELS_5[:, None]
    assert TWO.evaluate(LOGITS_5, column) == TWO.evaluate(LOGITS_5, LABELS_5)
    learned = CascadePolicy.learn(LOGITS_5, column, (8, 16))
    assert learned == CascadePolicy.learn(LOGITS_5, LABELS_5, (8, 16))


def test_logs_of_probabilities_are_logits() -> None:
    from_logs = CascadePolicy.learn(np.log(softmax(LOGITS_5)), LABELS_5, (8, 16))
    policy = CascadePolicy.learn(LOGITS_5, LABELS_5, (8, 16))
    np.testing.assert_array_equal(from_logs.route(LOGITS_5), policy.route(LOGITS_5))


# What is refused, and in which words.

SECOND = Stage(16, None)
THRESHOLDS = (
    "Every stage but the last needs a threshold, and the last accepts all. "
    "Received: thresholds={}. End with Stage(dim, None)."
)
NUMBERS = (
    "Thresholds must be finite and temperatures positive, in float32. Received: {}. "
    "A threshold of 1 accepts no row, one of 0 every row."
)
INCREASING = "dims must be strictly increasing positive integers. Received: dims={}. {}"
REFUSED_STAGES: list[tuple[tuple[Stage, ...], str]] = [
    *(
        (tuple(map(Stage, DIMS, thresholds)), THRESHOLDS.format(thresholds))
        for thresholds in ((0.5,), (None, None, None), (0.1, 0.2, 0.3))
    ),
    *(
        ((stage, SECOND), NUMBERS.format((stage, SECOND)))
        for stage in (
            Stage(8, float("nan")),
            Stage(8, float("inf")),
            Stage(8, "0.5"),  # type: ignore[arg-type]
            Stage(8, True),
            Stage(8, 1e300),
            Stage(8, 0.5, 1e-300),
            Stage(8, 0.5, 0.0),
            Stage(8, 0.5, -1.0),
            Stage(8, 0.5, float("nan")),
            Stage(8, 0.5, float("inf")),
            Stage(8, 0.5, None),  # type: ignore[arg-type]
            Stage(8, 0.5, "1"),  # type: ignore[arg-type]
        )
    ),
    (
        (Stage(16, 0.5), Stage(8, None)),
        INCREASING.format((16, 8), "Sort them and drop repeats: dims=(8, 16)."),
    ),
    (
        (Stage(8, 0.5), Stage(8, None)),
        INCREASING.format((8, 8), "Sort them and drop repeats: dims=(8,)."),
    ),
    ((), INCREASING.format((), "Give prefix lengths, for example dims=(8, 16, 32).")),
]


@pytest.mark.parametrize(("stages", "text"), REFUSED_STAGES)
def test_stages_that_are_refused(stages: tuple[Stage, ...], text: str, refuses: Refuses) -> None:
    with refuses(ValueError, text):
        CascadePolicy(stages)


def test_an_unknown_confidence_is_refused(refuses: Refuses) -> None:
    text = (
        "confidence must be one of max_probability, margin, entropy. "
        "Received: confidence='surprise'. Choose one of those."
    )
    with refuses(ValueError, text):
        CascadePolicy((Stage(8, None),), confidence="surprise")
    with refuses(ValueError, text):
        CascadePolicy.learn(LOGITS_5, LABELS_5, (8, 16), confidence="surprise")


def with_a_bad_value(value: float) -> Array:
    logits = LOGITS_5.copy()
    logits[4, 1, 2] = value
    return logits


CLASS_IDS = (
    "labels must be class ids in 0..2. Received: {}. Number the classes from 0, as in training."
)
SHAPES = (
    "logits must be (rows, num_dims, num_classes) with one label per row. "
    "Received: logits of shape {} and labels of shape {} for 2 dims. "
    "Give what predict() of the nested model returns, and class ids."
)
ROWS = "A holdout needs rows. Received: none. Keep some labelled rows out of training."
FINITE = "logits must be finite. Received: NaN or infinity. Train the model to a finite loss."
PROBABILITIES = (
    "logits must be logits, not probabilities. Received: rows that sum to 1. "
    "Leave the softmax out, or give np.log(probabilities)."
)
REALS = (
    "logits must be an array of real numbers. Received: {}. "
    "Give a NumPy array of floats, every row as long as the others."
)
UNREAL: list[tuple[Any, str]] = [
    ("abc", "<U3 of shape ()"),
    (LOGITS_5 + 0j, "complex128 of shape (5, 2, 3)"),
]
BAD = [with_a_bad_value(value) for value in (np.nan, np.inf, -np.inf)]
MASKED = (
    "{} must hold a value at every place. Received: a masked array. "
    "Fill what is masked, e.g. with .filled(0)."
)
HIDDEN: list[tuple[Any, Any, str]] = [
    (LOGITS_5, np.ma.masked_equal(LABELS_5, LABELS_5[0]), "labels"),
    (np.ma.masked_equal(LOGITS_5, LOGITS_5[0, 0, 0]), LABELS_5, "logits"),
]
REFUSED_HOLDOUTS: list[tuple[Any, Any, str]] = [
    (LOGITS_5, LABELS_5 + 1, CLASS_IDS.format("int64 labels from 1 to 3")),
    (LOGITS_5, LABELS_5 - 1, CLASS_IDS.format("int64 labels from -1 to 1")),
    (
        LOGITS_5,
        LABELS_5.astype(np.uint8) + 250,
        CLASS_IDS.format("uint8 labels from 250 to 252"),
    ),
    (LOGITS_5, LABELS_5 * 1.0, CLASS_IDS.format("float64 labels")),
    (LOGITS_5, LABELS_5 > 0, CLASS_IDS.format("bool labels")),
    (LOGITS_5, list("abcab"), CLASS_IDS.format("<U1 labels")),
    (LOGITS_5, np.array(list("abcab"), object), CLASS_IDS.format("object labels")),
    (LOGITS_5, LABELS_5[:3], SHAPES.format((5, 2, 3), (3,))),
    (LOGITS_5, np.stack([LABELS_5, LABELS_5], 1), SHAPES.format((5, 2, 3), (5, 2))),
    (
        LOGITS_5,
        np.eye(3)[LABELS_5],
        "A cascade decides which one class a row has. Received: labels of shape (5, 3), one for "
        "each class. For one-hot labels give labels.argmax(axis=1); where a row may have several "
        "classes, ask one dim.",
    ),
    (
        LOGITS_5,
        None,
        "labels must be an array. Received: NoneType. "
        "Give a NumPy array, every row as long as the others.",
    ),
    *((logits, labels, MASKED.format(name)) for logits, labels, name in HIDDEN),
    (LOGITS_5[:, :1], LABELS_5, SHAPES.format((5, 1, 3), (5,))),
    (np.zeros((5, 3, 3)), LABELS_5, SHAPES.format((5, 3, 3), (5,))),
    (LOGITS_5[:, 0], LABELS_5, SHAPES.format((5, 3), (5,))),
    (LOGITS_5[:0], LABELS_5[:0], ROWS),
    *((logits, LABELS_5, FINITE) for logits in BAD),
    *((softmax(LOGITS_5).astype(d), LABELS_5, PROBABILITIES) for d in ("float16", "float32")),
    *((logits, LABELS_5, REALS.format(received)) for logits, received in UNREAL),
]


@pytest.mark.parametrize(("logits", "labels", "text"), REFUSED_HOLDOUTS)
def test_a_holdout_that_is_refused(logits: Any, labels: Any, text: str, refuses: Refuses) -> None:
    with refuses(ValueError, text):
        CascadePolicy.learn(logits, labels, (8, 16))
    with refuses(ValueError, text):
        TWO.evaluate(logits, labels)


STAGES = (
    "logits must be (rows, num_stages, num_classes). "
    "Received: logits of shape {} for 2 stages. "
    "Give those of the policy's dims alone, in their order."
)
OF_OTHER_SHAPES: list[Any] = [
    *(LOGITS_5[:, :1], np.zeros((5, 3, 3)), LOGITS_5[0], np.zeros((5, 2, 0)), 1.0),
]
REFUSED_ROWS: list[tuple[Any, str]] = [
    *((logits, STAGES.format(np.shape(logits))) for logits in OF_OTHER_SHAPES),
    *((logits, FINITE) for logits in BAD),
    *((logits, REALS.format(received)) for logits, received in UNREAL),
]


@pytest.mark.parametrize(("logits", "text"), REFUSED_ROWS)
def test_rows_that_are_refused(logits: Any, text: str, refuses: Refuses) -> None:
    with refuses(ValueError, text):
        TWO.route(logits)


def test_rows_of_several_classes_have_no_cascade() -> None:
    text = (
        r"\AA cascade decides which one class a row has. Received: labels of shape \(6, 3\), one "
        r"for each class. For one-hot labels give labels.argmax\(axis=1\); where a row may have "
        r"several classes, ask one dim.\Z"
    )
    with pytest.raises(ValueError, match=text):
        CascadePolicy.learn(np.zeros((6, 2, 3)), np.ones((6, 3), int), (8, 16))
