"""Flows that answer with classes, driven by models that are functions."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_mrl_serving import classification
from keras_mrl_serving.cascade.audits import Audits
from keras_mrl_serving.cascade.policy import CascadePolicy, Stage
from keras_mrl_serving.contract import Manifest
from keras_mrl_serving.errors import (
    InvalidInputError,
    KerasMrlError,
    ManifestError,
    NoCascadeError,
    NoHeadError,
    ServerError,
    UnknownDimError,
    UnknownExitError,
)
from keras_mrl_serving.flows import Arrays, Call, Flow
from keras_mrl_serving.results import join
from tests.helpers.driven_flows import ROWS, Model, columns, drive, refused_unasked, with_value
from tests.helpers.manifests import DEPTHS, REGRESSOR, TAGS

Refuses = Callable[[type[Exception], str], AbstractContextManager[None]]

TWO = CascadePolicy((Stage(2, 0.5), Stage(8, None)))
LOOK = "Look for NaN in the inputs, or train the model to a finite loss."
EXPORT = "Export the model again with keras_mrl_export.export_saved_model."


@pytest.fixture
def model(toys: Mapping[str, Model]) -> Model:
    return toys["classifier"]


@pytest.fixture
def manifest(manifests: Mapping[str, Manifest]) -> Manifest:
    return manifests["classifier"]


@pytest.mark.parametrize("dim", [4, np.int64(4)])
def test_classify_is_one_call(model: Model, manifest: Manifest, dim: int) -> None:
    answer, [call] = drive(classification.classify(manifest, ROWS, dim), model)
    assert call.signature == "classify_4"
    assert answer.dim.dtype == np.int32
    assert answer.dim.tolist() == [4] * 40
    assert (answer.confidence == answer.probabilities[:, 0]).all()


def test_labels_are_text(model: Model, manifest: Manifest, policy: CascadePolicy) -> None:
    for flow in (
        classification.classify(manifest, ROWS, 4),
        classification.classify_adaptive(manifest, ROWS),
        classification.classify_by(manifest, ROWS, policy),
    ):
        labels = drive(flow, model)[0].labels
        assert labels is not None
        assert labels.shape == (40, 3)
        assert all(isinstance(label, str) for label in labels.flat)
        assert "grüner Specht" in labels


def test_a_model_without_names_gives_none(
    toys: Mapping[str, Model], manifests: Mapping[str, Manifest]
) -> None:
    policy = CascadePolicy((Stage(2, 0.7), Stage(16, None)))
    for flow in (
        classification.classify(manifests["successor"], ROWS, 4),
        classification.classify_by(manifests["successor"], ROWS, policy),
    ):
        assert drive(flow, toys["successor"])[0].labels is None


def test_no_policy_of_the_caller_s_decides_rows_of_several_classes(policy: CascadePolicy) -> None:
    with pytest.raises(NoCascadeError, match=r"\AA cascade decides which one class a row has"):
        next(classification.classify_by(TAGS, ROWS, policy))
    with pytest.raises(NoHeadError, match=r"\AOnly a model with classes can classify"):
        next(classification.classify_by(REGRESSOR, ROWS, policy))


def test_classify_adaptive_is_one_call(model: Model, manifest: Manifest) -> None:
    answer, [call] = drive(classification.classify_adaptive(manifest, ROWS), model)
    assert call.signature == "classify_adaptive"
    assert set(answer.dim.tolist()) == {2, 4, 8}


def test_the_caller_s_policy_answers_as_the_same_policy_in_the_model(
    model: Model, manifest: Manifest, policy: CascadePolicy
) -> None:
    in_model = columns(drive(classification.classify_adaptive(manifest, ROWS), model)[0])
    by_caller = columns(drive(classification.classify_by(manifest, ROWS, policy), model)[0])
    assert in_model.keys() == by_caller.keys()
    for name, column in in_model.items():
        if column.dtype == np.float32:
            np.testing.assert_allclose(by_caller[name], column, rtol=0, atol=1e-5)
        else:
            np.testing.assert_array_equal(by_caller[name], column)
            assert by_caller[name].dtype == column.dtype


def test_classify_by_asks_the_wider_heads_for_the_rows_still_undecided(
    model: Model, manifest: Manifest, policy: CascadePolicy
) -> None:
    answer, calls = drive(classification.classify_by(manifest, ROWS, policy), model)
    assert [call.signature for call in calls] == ["features", "head_2", "head_4", "head_8"]
    features = model(calls[0])["features"]
    undecided = np.ones(40, bool)
    for call, stage in zip(calls[1:], policy.stages, strict=True):
        np.testing.assert_array_equal(call.inputs["features"], features[undecided, : stage.dim])
        assert call.outputs == ("class_ids", "labels", "logits")
        undecided &= answer.dim != stage.dim
    assert not undecided.any()


@given(
    st.lists(st.integers(0, 39), max_size=12),
    st.tuples(*[st.floats(-0.1, 1.1)] * 2),
    st.sampled_from([(2, 4, 8), (2, 8), (4,)]),
)
def test_every_row_is_answered_in_its_place_by_the_dim_that_is_sure(
    toys: Mapping[str, Model],
    manifests: Mapping[str, Manifest],
    rows: list[int],
    thresholds: tuple[float, float],
    dims: tuple[int, ...],
) -> None:
    model, manifest = toys["classifier"], manifests["classifier"]
    stages = [*thresholds[: len(dims) - 1], None]
    policy = CascadePolicy(tuple(map(Stage, dims, stages)))
    answer, calls = drive(
        classification.classify_by(manifest, ROWS[rows].reshape(-1, 4), policy), model
    )
    features = model(calls[0])["features"]
    logits = [model(Call(f"head_{dim}", {"features": features[:, :dim]}))["logits"] for dim in dims]
    if rows:
        class_ids, stage_of = policy.route(np.stack(logits, axis=1))
        assert answer.class_ids[:, 0].tolist() == class_ids.tolist()
        assert answer.dim.tolist() == [dims[stage] for stage in stage_of]
        num_rows = [len(call.inputs["features"]) for call in calls[1:]]
        assert num_rows == [int((stage_of >= s).sum()) for s in range(len(num_rows))]
        assert 0 not in num_rows
    assert [len(column) for column in columns(answer).values()] == [len(rows)] * 5


@pytest.mark.parametrize(
    ("threshold", "signatures", "dim"),
    [
        (-1.0, ["features", "head_2"], 2),
        (0.0, ["features", "head_2"], 2),
        (1.0, ["features", "head_2", "head_4", "head_8"], 8),
        (2.0, ["features", "head_2", "head_4", "head_8"], 8),
    ],
)
def test_thresholds_below_and_above_every_confidence(
    model: Model, manifest: Manifest, threshold: float, signatures: list[str], dim: int
) -> None:
    policy = CascadePolicy((Stage(2, threshold), Stage(4, threshold), Stage(8, None)))
    answer, calls = drive(classification.classify_by(manifest, ROWS, policy), model)
    assert [call.signature for call in calls] == signatures
    assert answer.dim.tolist() == [dim] * 40
    direct, _ = drive(classification.classify(replace(manifest, cascade=None), ROWS, dim), model)
    np.testing.assert_array_equal(answer.class_ids, direct.class_ids)
    np.testing.assert_array_equal(answer.labels, direct.labels)


def test_no_rows_are_no_answers(model: Model, manifest: Manifest, policy: CascadePolicy) -> None:
    answer, calls = drive(classification.classify_by(manifest, ROWS[:0], policy), model)
    assert [call.signature for call in calls] == ["features", "head_2"]
    assert (len(answer), answer.class_ids.shape) == (0, (0, 3))
    assert answer.dim.dtype == np.int32


@pytest.mark.parametrize(
    ("start", "error"),
    [
        (lambda m: classification.classify(m["encoder"], ROWS, 2), NoHeadError),
        (lambda m: classification.classify(m["classifier"], ROWS, 3), UnknownDimError),
        (lambda m: classification.classify(m["classifier"], ROWS[0], 2), InvalidInputError),
        (lambda m: classification.classify_adaptive(m["encoder"], ROWS), NoHeadError),
        (lambda m: classification.classify_adaptive(m["successor"], ROWS), NoCascadeError),
        (lambda m: classification.classify_adaptive(m["classifier"], ROWS[0]), InvalidInputError),
        (lambda m: classification.classify_by(m["encoder"], ROWS, TWO), NoHeadError),
        (lambda m: classification.classify_by(m["successor"], ROWS, TWO), UnknownDimError),
        (lambda m: classification.classify_by(m["classifier"], ROWS[0], TWO), InvalidInputError),
    ],
)
def test_what_cannot_be_answered_is_refused_before_anything_is_asked(
    start: Callable[[Mapping[str, Manifest]], Flow[Any]],
    error: type[KerasMrlError],
    manifests: Mapping[str, Manifest],
) -> None:
    refused_unasked(start(manifests), error)


@pytest.mark.parametrize("name", ["labels", "class_ids", "probabilities", "confidence", "dim"])
def test_every_column_of_a_classification_is_looked_at(
    manifest: Manifest, model: Model, name: str
) -> None:
    def shorter(call: Call) -> Arrays:
        return {n: a[:-1] if n == name else a for n, a in model(call).items()}

    with pytest.raises(ManifestError, match=f"{name} "):
        drive(classification.classify_adaptive(manifest, ROWS), shorter)


CLASSIFY: dict[str, Callable[[Manifest], Flow[Any]]] = {
    "classify_4": lambda m: classification.classify(m, ROWS, 4),
    "classify_adaptive": lambda m: classification.classify_adaptive(m, ROWS),
    "head_2": lambda m: classification.classify_by(m, ROWS, TWO),
}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["probabilities", "confidence", "logits"])
@pytest.mark.parametrize("signature", CLASSIFY)
def test_classes_are_never_decided_by_nan(
    manifest: Manifest, model: Model, signature: str, name: str, value: float, refuses: Refuses
) -> None:
    if (name == "logits") != (signature == "head_2"):
        return  # a head is asked for logits alone, and nothing else is
    text = (
        f"Classes are decided by finite numbers. Received: NaN or infinity in {name} of signature "
        f"{signature!r}, in 1 of 40 rows, first in row 3. {LOOK}"
    )
    with refuses(ServerError, text):
        drive(CLASSIFY[signature](manifest), with_value(model, name, value))


def test_logits_of_any_finite_size_decide(manifest: Manifest, model: Model) -> None:
    policy = CascadePolicy((Stage(2, -1.0, temperature=1e-30), Stage(8, None)))
    huge = with_value(model, "logits", [3e38, -3e38, 0, 1, 2])
    answer, _ = drive(classification.classify_by(manifest, ROWS, policy), huge)
    assert answer.confidence[3] == 1


@pytest.mark.parametrize("value", [-1, 5, 2**40])
@pytest.mark.parametrize("signature", CLASSIFY)
def test_a_class_is_one_of_the_model_s(
    manifest: Manifest, model: Model, signature: str, value: int
) -> None:
    rule = rf"A row is of at least one class, each in 0\.\.4\. Received: .* signature '{signature}'"
    with pytest.raises(ManifestError, match=rule):
        drive(CLASSIFY[signature](manifest), with_value(model, "class_ids", value))


@pytest.mark.parametrize(("dims", "dim"), [((2, 4, 8), 3), ((4, 8), 2)])
def test_a_row_is_decided_at_a_stage_of_the_cascade(
    manifest: Manifest, model: Model, dims: tuple[int, ...], dim: int, refuses: Refuses
) -> None:
    """Not at another dim, though the model may serve it."""
    stages = [Stage(own, None if own == dims[-1] else 0.5) for own in dims]
    cascade = CascadePolicy(tuple(stages)).to_json()
    text = (
        "A row is decided at one of the stages of the model's cascade, dim "
        f"{', '.join(map(str, dims))}. Received: dim {dim} in row 3. {EXPORT}"
    )

    def at_last(call: Call) -> Arrays:
        answer = model(call)
        return {**answer, "dim": np.where(np.arange(40) == 3, dim, 8).astype(np.int32)}

    with refuses(ManifestError, text):
        drive(classification.classify_adaptive(replace(manifest, cascade=cascade), ROWS), at_last)


def test_a_manifest_without_top_k_takes_lists_of_one_length(
    manifest: Manifest, model: Model
) -> None:
    def shorter(call: Call) -> Arrays:
        return {n: a[:, :2] if n == "labels" else a for n, a in model(call).items()}

    whole = replace(manifest, top_k=None)
    assert drive(classification.classify(whole, ROWS, 4), model)[0].class_ids.shape == (40, 3)
    with pytest.raises(ManifestError, match=r"^The lists of a row must be of one length\. "):
        drive(classification.classify(whole, ROWS, 4), shorter)


def test_a_policy_is_a_policy(manifest: Manifest, model: Model, refuses: Refuses) -> None:
    stages: Any = TWO.to_json()
    text = (
        "policy must be a CascadePolicy. Received: dict. Learn one with CascadePolicy.learn, or "
        "read a manifest's with CascadePolicy.from_json."
    )
    with refuses(InvalidInputError, text):
        drive(classification.classify_by(manifest, ROWS, stages), model)


AUDITED = np.random.default_rng(1).random(40) < 0.4
# A cascade, what it asks audited rows with, and how those are named.
CASCADES: dict[str, tuple[Callable[[Manifest, Any], Flow[Any]], str]] = {
    "the model's": (lambda m, a: classification.classify_adaptive(m, ROWS, a), "classify_8"),
    "the caller's": (lambda m, a: classification.classify_by(m, ROWS, TWO, a), "head_8"),
}


@pytest.mark.parametrize("kind", CASCADES)
def test_audited_rows_are_also_answered_by_the_last_stage(
    manifest: Manifest, model: Model, kind: str
) -> None:
    make, signature = CASCADES[kind]
    plain, plain_calls = drive(make(manifest, None), model)
    answer, calls = drive(make(manifest, AUDITED), model)
    *others, last = calls
    assert [call.signature for call in others] == [call.signature for call in plain_calls]
    assert (last.signature, last.outputs) == (signature, ("class_ids",))
    early = AUDITED & (plain.dim != 8)
    assert 0 < early.sum() < AUDITED.sum()  # some have been at the last stage already
    (sent,) = last.inputs.values()
    full = drive(classification.classify(manifest, ROWS, 8), model)[0].class_ids[:, 0]
    if kind == "the model's":
        np.testing.assert_array_equal(sent, ROWS[early].astype(np.float32))
    assert len(sent) == early.sum()
    np.testing.assert_array_equal(answer.full_class_ids, np.where(AUDITED, full, -1))
    assert answer.audited.tolist() == np.flatnonzero(AUDITED).tolist()
    both = Audits.of(answer)
    np.testing.assert_array_equal(both.adaptive, plain.class_ids[AUDITED, 0])
    np.testing.assert_array_equal(both.full, full[AUDITED])
    assert (np.asarray(both.adaptive) != both.full).any()
    assert plain.full_class_ids is None
    assert len(Audits.of(plain)) == 0
    for name, column in columns(plain).items():
        np.testing.assert_array_equal(columns(answer)[name], column)


@pytest.mark.parametrize("kind", CASCADES)
def test_where_no_audited_row_left_early_nothing_more_is_asked(
    manifest: Manifest, model: Model, kind: str
) -> None:
    make, _ = CASCADES[kind]
    plain, plain_calls = drive(make(manifest, None), model)
    answer, calls = drive(make(manifest, plain.dim == 8), model)
    assert len(calls) == len(plain_calls)
    both = Audits.of(answer)
    np.testing.assert_array_equal(both.adaptive, both.full)


@pytest.mark.parametrize("kind", CASCADES)
@pytest.mark.parametrize("damage", ["out of range", "missing", "of another dtype", "too few"])
def test_a_damaged_answer_about_audited_rows_is_refused(
    manifest: Manifest, model: Model, kind: str, damage: str
) -> None:
    make, signature = CASCADES[kind]

    def damaged(call: Call) -> Arrays:
        answer = dict(model(call))
        if call.outputs == ("class_ids",):
            class_ids = answer.pop("class_ids")
            changed = {
                "out of range": class_ids + 5,
                "of another dtype": class_ids.astype(np.float32),
                "too few": class_ids[:-1],
            }
            answer |= {"class_ids": changed[damage]} if damage in changed else {}
        return answer

    with pytest.raises(ManifestError, match=signature):
        drive(make(manifest, AUDITED), damaged)


# A cascade over exits: the stages of `DEPTHS` are (thumbnail, 8), (conv3_out, 8), (conv3_out, 64)
# and (last, 64), its exits thumbnail, conv3_out and last.
IMAGES = np.zeros((4, 32, 32, 3), np.float32)
STOPS = np.array([[0, 8], [2, 64], [1, 64], [1, 8]], np.int32)


def of_exits(call: Call) -> Arrays:
    """Row n is of class n where the cascade decides, and of class 4 at a signature of one dim."""
    rows = len(next(iter(call.inputs.values())))
    is_adaptive = call.signature == "classify_adaptive"
    class_ids = np.arange(rows)[:, None] if is_adaptive else np.full((rows, 1), 4)
    answer: dict[str, Any] = {
        "class_ids": np.repeat(class_ids, 3, axis=1),
        "probabilities": np.full((rows, 3), 0.2, np.float32),
        "confidence": np.full(rows, 0.2, np.float32),
        "labels": np.full((rows, 3), b"lynx", object),
    }
    if is_adaptive:
        answer |= {"exit": STOPS[:rows, 0], "dim": STOPS[:rows, 1]}
    return {name: answer[name] for name in call.outputs or answer}


def test_rows_carry_exit_dim_and_cost() -> None:
    costs = iter((0.0625, 0.25, 0.3125, 1.0))
    cascade = DEPTHS.exit_cascade or {}
    stages = [{**stage, "relative_cost": next(costs)} for stage in cascade["exit_stages"]]
    priced = replace(DEPTHS, exit_cascade={**cascade, "exit_stages": stages})
    answer, [call] = drive(classification.classify_adaptive(priced, IMAGES), of_exits)
    assert call.promised.keys() >= {"exit", "dim"}
    assert answer.exit is not None
    assert answer.exit.tolist() == ["thumbnail", "last", "conv3_out", "conv3_out"]
    assert answer.dim.tolist() == [8, 64, 64, 8]
    assert answer.relative_cost is not None
    assert answer.relative_cost.tolist() == [0.0625, 1.0, 0.3125, 0.25]
    assert answer.relative_cost.dtype == np.float32
    row = answer[3]
    assert (row.exit, row.dim, row.relative_cost) == ("conv3_out", 8, 0.25)
    assert repr(answer) == (
        "Classification(4 rows, top 3, by dim {8: 2, 64: 2}, "
        "by exit {'thumbnail': 1, 'last': 1, 'conv3_out': 2})"
    )
    assert [row.exit for row in join([answer, answer])] == [*answer.exit, *answer.exit]


@pytest.mark.parametrize(
    ("changed", "received"),
    [
        ({"relative_cost": -1}, "relative_cost=-1 in the manifest of 'birds'"),
        ({"relative_cost": 1e308}, "relative_cost=1e+308 in"),
        ({"relative_cost": "0.5"}, "relative_cost='0.5' in"),
        ({"relative_cost": float("nan")}, "relative_cost=nan in"),
        ({"threshold": None}, "Every stage but the last needs a threshold"),
        ({"dim": -8}, "Stages go from shallow exits to deep ones"),
        ({"temperature": 0}, "temperatures positive"),
        ({"threshold": "high"}, "Thresholds must be finite"),
    ],
)
def test_a_cascade_that_cannot_be_is_refused_before_a_row_is_sent(
    changed: dict[str, Any], received: str
) -> None:
    cascade = DEPTHS.exit_cascade or {}
    first, *others = cascade["exit_stages"]
    stages = [{**first, **changed}, *others]
    hostile = replace(DEPTHS, exit_cascade={**cascade, "exit_stages": stages})
    with pytest.raises(ManifestError) as caught:
        next(classification.classify_adaptive(hostile, IMAGES))
    assert received in str(caught.value)


def test_where_stages_have_no_cost_that_of_the_exits_counts() -> None:
    """Milliseconds of the smallest batch of both, else multiply-adds, else nothing."""
    cascade = DEPTHS.exit_cascade or {}
    stages = [
        {key: value for key, value in stage.items() if key != "relative_cost"}
        for stage in cascade["exit_stages"]
    ]
    exits = [{"name": name} for name in DEPTHS.exit_names]
    plain = replace(DEPTHS, exits=tuple(exits), exit_cascade={**cascade, "exit_stages": stages})

    def costs_of(**figures: list[Any]) -> list[float] | None:
        columns = [
            dict(zip(figures, values, strict=True))
            for values in zip(*figures.values(), strict=True)
        ]
        known = [{**own, **more} for own, more in zip(exits, columns, strict=True)]
        priced = replace(plain, exits=tuple(known))
        answer, _ = drive(classification.classify_adaptive(priced, IMAGES), of_exits)
        return None if answer.relative_cost is None else answer.relative_cost.tolist()

    adds: list[Any] = [100, 400, 1600]
    times: list[Any] = [{"8": 1.0, "16": 9}, {"8": 2, "16": 9.0}, {"16": 9.0, "8": 4.0, "1": 9.0}]
    assert costs_of(multiply_adds=adds) == [0.0625, 1.0, 0.25, 0.25]
    assert costs_of(multiply_adds=adds, milliseconds=times) == [0.25, 1.0, 0.5, 0.5]
    assert costs_of(multiply_adds=[None, 400, 1600]) is None
    assert costs_of(multiply_adds=[1, 1, 0], milliseconds=[None, {"x": 1.0}, {"x": 0}]) is None
    none, _ = drive(classification.classify_adaptive(plain, IMAGES), of_exits)
    assert none.relative_cost is None
    assert none.exit is not None
    assert none[0].relative_cost is None


def test_one_exit_is_asked_by_its_signature() -> None:
    answer, [call] = drive(classification.classify(DEPTHS, IMAGES, 8, "conv3_out"), of_exits)
    assert call.signature == "classify_conv3_out_8"
    assert answer.exit is not None
    assert (answer.exit.tolist(), answer.dim.tolist()) == (["conv3_out"] * 4, [8] * 4)
    for last in (None, "last"):
        answer, [call] = drive(classification.classify(DEPTHS, IMAGES, 8, last), of_exits)
        assert (call.signature, answer[0].exit) == ("classify_8", "last")
        assert answer[0].relative_cost == 1.0


def test_an_exit_that_the_model_has_not_is_refused(manifest: Manifest, refuses: Refuses) -> None:
    text = (
        "exit must be one of the model's exits. Received: exit='conv4_out' for model 'birds'. "
        "Choose one of thumbnail, conv3_out, last."
    )
    with refuses(UnknownExitError, text):
        next(classification.classify(DEPTHS, IMAGES, 8, "conv4_out"))
    text = (
        "Only a model with exits is asked at one. Received: exit='conv4_out' for model 'toy', "
        "which has none. Leave exit out."
    )
    with refuses(UnknownExitError, text):
        next(classification.classify(manifest, ROWS, 8, "conv4_out"))


def test_audited_rows_of_exits_go_to_the_last_stage() -> None:
    audited = np.array([True, True, False, True])
    flow = classification.classify_adaptive(DEPTHS, IMAGES, audited)
    answer, [_, call] = drive(flow, of_exits)
    assert (call.signature, len(call.inputs["image"])) == ("classify_64", 2)
    assert answer.full_class_ids is not None
    assert answer.full_class_ids.tolist() == [4, 1, -1, 4]  # row 1 has been there


@pytest.mark.parametrize(
    ("exit", "received"),
    [
        ([0, 2, 1, 3], "exit 3 at dim 8 in row 3"),
        ([-1, 2, 1, 1], "exit -1 at dim 8 in row 0"),
        ([0, 2, 0, 1], "exit 0 at dim 64 in row 2"),  # an exit and a dim that are no stage
        ([2, 2, 1, 1], "exit 2 at dim 8 in row 0"),
    ],
)
def test_rows_that_left_where_the_cascade_has_no_stage_are_refused(
    exit: list[int], received: str, refuses: Refuses
) -> None:
    text = (
        "A row is decided at one of the stages of the model's cascade, exit 0 (thumbnail) at 8, "
        f"1 (conv3_out) at 8, 1 (conv3_out) at 64, 2 (last) at 64. Received: {received}. {EXPORT}"
    )
    with refuses(ManifestError, text):
        drive(
            classification.classify_adaptive(DEPTHS, IMAGES),
            lambda call: {**of_exits(call), "exit": np.array(exit, np.int32)},
        )


@pytest.mark.parametrize("exit", [None, STOPS[:3, 0], STOPS[:, :1], np.zeros(4, np.float32)])
def test_exits_that_are_missing_or_of_another_kind_are_refused(exit: Any) -> None:
    def damaged(call: Call) -> Arrays:
        answer = {**of_exits(call), "exit": exit}
        return {name: array for name, array in answer.items() if array is not None}

    with pytest.raises(ManifestError, match=r"A signature must answer .*exit int32 \(rows,\)"):
        drive(classification.classify_adaptive(DEPTHS, IMAGES), damaged)


def test_a_caller_s_policy_over_exits_would_have_to_resume_a_backbone(refuses: Refuses) -> None:
    policy = CascadePolicy((Stage(8, 0.5, exit="conv3_out"), Stage(64, None)))
    text = (
        "A caller's policy asks the dims of the last exit. Received: a policy over the exits "
        "conv3_out, last. The server runs a backbone to its end, so such a policy has to be the "
        "model's own: give it to export_saved_model, or to publish_policy."
    )
    with refuses(InvalidInputError, text):
        next(classification.classify_by(DEPTHS, IMAGES, policy))


def test_a_caller_s_policy_over_dims_goes_to_the_last_exit(
    manifest: Manifest, model: Model
) -> None:
    deep = replace(manifest, cascade=None, exits=DEPTHS.exits)
    answer, calls = drive(classification.classify_by(deep, ROWS, TWO), model)
    plain, plain_calls = drive(classification.classify_by(manifest, ROWS, TWO), model)
    assert [call.signature for call in calls] == [call.signature for call in plain_calls]
    np.testing.assert_array_equal(answer.class_ids, plain.class_ids)
    assert answer.exit is not None
    assert set(answer.exit.tolist()) == {"last"}
    assert plain.exit is None
    assert plain.relative_cost is None
    by_model = replace(manifest, exits=DEPTHS.exits)
    answer, _ = drive(classification.classify_adaptive(by_model, ROWS), model)
    assert {(row.exit, row.relative_cost) for row in answer} == {("last", 1.0)}
