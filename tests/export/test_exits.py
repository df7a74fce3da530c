"""Models with exits: the graph routes each row as the policy does in NumPy, on every backend."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from keras_mrl import MatryoshkaClassifier, MatryoshkaEncoder, MatryoshkaHead, measure_costs
from keras_mrl.models.costs import Costs, Work
from keras_mrl_export import export_saved_model
from keras_mrl_serving import stage_logits
from keras_mrl_serving._session import SavedModelSession
from keras_mrl_serving.cascade.policy import CascadePolicy, Stage
from keras_mrl_serving.contract import Manifest
from tests.helpers import exit_models as models
from tests.helpers.exit_models import DIMS, ROWS, Array, Arrays, Key
from tests.helpers.export_images import DECODER, encoded
from tests.helpers.export_models import (
    assert_equal_rows,
    probabilities,
    read_manifest,
    warmup_records,
    written_signatures,
)

backend = pytest.mark.backend

SAMPLED = 16  # the export sees the first rows alone
ALL, NOBODY = -1.0, 1.0  # every margin is above the one, none above the other


@dataclass(frozen=True, eq=False)
class Version:
    """A published version of a model with exits, and what its policy looks up."""

    model: Any
    rows: Any
    logits: dict[Key, Array]
    policy: CascadePolicy
    path: Path
    manifest: Manifest
    session: SavedModelSession

    def ask(self, signature: str, part: Any = slice(None)) -> Arrays:
        rows = self.rows if isinstance(self.rows, dict) else {"x": self.rows}
        names = self.manifest.inputs
        return self.session.run(
            signature, {name: own[part] for name, own in zip(names, rows.values(), strict=True)}
        )

    def expected(self, part: Any = slice(None)) -> Arrays:
        """What `classify_adaptive` answers, as NumPy says."""
        logits = {key: own[part] for key, own in self.logits.items()}
        _, stage_of = self.policy.route(logits)
        keys = self.policy.keys
        rows = np.arange(len(stage_of))
        stacked = np.stack([logits[key] for key in keys])[stage_of, rows]
        temperatures = np.array([own.temperature for own in self.policy.stages])[stage_of]
        shares = probabilities(stacked / temperatures[:, None], 1.0)
        ids = np.argsort(-shares, axis=-1, kind="stable")
        best = np.take_along_axis(shares, ids, axis=-1)
        places = [self.manifest.exit_names.index(exit or "last") for exit, _ in keys]
        return {
            "class_ids": ids,
            "probabilities": best,
            "confidence": best[:, 0] - best[:, 1],
            "dim": np.array([dim for _, dim in keys])[stage_of],
            "exit": np.array(places)[stage_of],
            "model_id": np.full(len(rows), self.manifest.model_id),
        }


@contextmanager
def version_of(
    model: Any, rows: Any, base_path: Path, policy: CascadePolicy, **arguments: Any
) -> Iterator[Version]:
    sample = {k: own[:SAMPLED] for k, own in rows.items()} if isinstance(rows, dict) else None
    path = export_saved_model(
        model, base_path, rows[:SAMPLED] if sample is None else sample, policy=policy, **arguments
    )
    with SavedModelSession(path) as session:
        logits = models.all_logits(model, rows)
        yield Version(model, rows, logits, policy, path, read_manifest(path), session)


STAGES: dict[str, list[Key]] = {
    "images": [("thumbnail", 2), ("block1_norm", 2), ("block1_norm", 8), (None, 8)],
    "texts": [("embeddings_dropout", 8), ("transformer_layer_0", 8), (None, 8)],
}
MADE: dict[str, tuple[Callable[[], Any], Any]] = {
    "images": (models.images, models.IMAGES),
    "texts": (models.texts, models.TEXTS),
}


@pytest.fixture(scope="module", params=MADE)
def version(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Version]:
    make, rows = MADE[request.param]
    model = make()
    policy = models.halving(models.all_logits(model, rows), STAGES[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    with version_of(model, rows, folder, policy, top_k=models.NUM_CLASSES) as exported:
        yield exported


def assert_answers(answer: Arrays, expected: Arrays) -> None:
    assert set(answer) == set(expected)
    integers = {"class_ids": np.int64, "dim": np.int32, "exit": np.int32, "model_id": np.int32}
    for name, array in answer.items():
        assert array.dtype == integers.get(name, np.float32), name
        if name == "confidence":  # a difference of two probabilities
            np.testing.assert_allclose(array, expected[name], atol=1e-5)
        else:
            assert_equal_rows(array, expected[name])


@backend
def test_every_row_leaves_where_the_policy_lets_it(version: Version) -> None:
    assert_answers(version.ask("classify_adaptive"), version.expected())
    _, stage_of = version.policy.route(version.logits)
    assert (np.bincount(stage_of, minlength=len(version.policy.stages)) > 10).all()


@backend
def test_many_rows_at_once_are_as_many_single_rows(version: Version) -> None:
    together = version.ask("classify_adaptive")
    alone = [version.ask("classify_adaptive", slice(row, row + 1)) for row in range(ROWS)]
    backwards = version.ask("classify_adaptive", slice(None, None, -1))
    for name, array in together.items():
        single = np.concatenate([answer[name] for answer in alone])
        for others in (single, backwards[name][::-1]):
            if name == "confidence":
                np.testing.assert_allclose(others, array, atol=1e-5)
            else:
                assert_equal_rows(others, array)


@backend
def test_no_rows_have_no_answers(version: Version) -> None:
    for name in written_signatures(version.session) - {"describe"}:
        if name.startswith("head_"):
            prefixes = np.ones((ROWS, int(name.removeprefix("head_"))), np.float32)
            full, empty = (
                version.session.run(name, {"features": own}) for own in (prefixes, prefixes[:0])
            )
        else:
            full, empty = version.ask(name), version.ask(name, slice(0, 0))
        expected = {output: (0, *array.shape[1:]) for output, array in full.items()}
        assert {output: array.shape for output, array in empty.items()} == expected


@backend
def test_the_manifest_lists_the_exits(version: Version) -> None:
    manifest, model = version.manifest, version.model
    assert manifest.exits is not None
    assert manifest.exit_names == (*model.exits, "last")
    for own in manifest.exits[:-1]:
        assert own["layer"] == (None if own["name"] == "thumbnail" else own["name"])
    dim = DIMS[-1]
    if "thumbnail" in model.exits:
        cut = {name: model.at(dim, exit=name).count_params() for name in model.exits}
        assert {own["name"]: own["parameters"] for own in manifest.exits[:-1]} == cut
    work = [own["multiply_adds"] for own in manifest.exits]
    assert work == sorted(work)
    assert 0 < work[0] < work[-1]
    assert manifest.cascade is None
    assert manifest.exit_cascade is not None
    assert CascadePolicy.from_json(manifest.exit_cascade) == version.policy
    costs = [own["relative_cost"] for own in manifest.exit_cascade["exit_stages"]]
    assert costs == sorted(costs)
    assert 0 < costs[0] < 1 < costs[-1] < 2
    assert manifest.made_with["trained_on"] == keras.backend.backend()


@backend
def test_a_server_is_warm_down_to_the_last_exit(version: Version) -> None:
    [rows] = [own for name, own in warmup_records(version.path) if name == "classify_adaptive"]
    answer = version.session.run("classify_adaptive", rows)
    assert answer["exit"].tolist() == [len(version.manifest.exit_names) - 1]


OVER_DIMS: list[Key] = [(None, 2), (None, 8)]


@pytest.mark.filterwarnings("ignore")  # of TensorFlow, about its own interpreter
@pytest.mark.parametrize("keys", [OVER_DIMS, STAGES["images"]], ids=["dims", "exits"])
def test_a_cascade_without_labels_becomes_litert(keys: list[Key], tmp_path: Path) -> None:
    """Of many rows, some of which leave at each stage: LiteRT can fail on a stage of no rows."""
    import tensorflow as tf

    model = models.images()
    policy = models.halving(models.all_logits(model, models.IMAGES), keys)
    asked = ["classify_8", "classify_adaptive"]
    with version_of(model, models.IMAGES, tmp_path, policy, signatures=asked, top_k=1) as version:
        converter = tf.lite.TFLiteConverter.from_saved_model(
            str(version.path), signature_keys=asked[1:]
        )
        interpreter = tf.lite.Interpreter(model_content=converter.convert())
        answer = interpreter.get_signature_runner("classify_adaptive")(image=models.IMAGES)
        for name, array in version.ask("classify_adaptive").items():
            np.testing.assert_allclose(answer[name], array, rtol=1e-4, atol=1e-5, err_msg=name)


SMALL: list[Key] = [("first", 2), (None, 8)]


@pytest.fixture(scope="module")
def vectors() -> Any:
    return models.vectors()


def small_policy(model: Any) -> CascadePolicy:
    return models.halving(models.all_logits(model, models.VECTORS), SMALL)


@backend
@pytest.mark.filterwarnings("ignore:Warm-up and comparison go through all exits")
def test_a_cascade_that_no_row_or_every_row_leaves(vectors: Any, tmp_path: Path) -> None:
    """All rows at one exit; and a cascade that never exits is the whole model."""
    policy = small_policy(vectors)
    for threshold, place in ((NOBODY, 1), (ALL, 0)):
        forced = models.with_thresholds(policy, threshold)
        with version_of(
            vectors, models.VECTORS, tmp_path, forced, signatures=["classify", "classify_adaptive"]
        ) as version:
            answer = version.ask("classify_adaptive")
            assert set(answer.pop("exit").tolist()) == {place}
            assert set(answer.pop("dim").tolist()) == {SMALL[place][1]}
            if place:
                whole = version.ask("classify_8")
                for name, array in answer.items():
                    assert_equal_rows(array, whole[name])


def test_every_exit_is_asked_by_itself_on_request(vectors: Any, tmp_path: Path) -> None:
    asked = ["embed_first_2", "classify_first", "classify_8", "classify_adaptive"]
    with version_of(
        vectors, models.VECTORS, tmp_path, small_policy(vectors), signatures=asked
    ) as version:
        expected = {"embed_first_2", "classify_first_2", "classify_first_8", *asked[2:]}
        assert written_signatures(version.session) == expected | {"serving_default", "describe"}
        temperature = version.policy.stages[0].temperature
        for dim, divisor in ((2, temperature), (8, 1.0)):  # the policy has no stage of the other
            shares = probabilities(version.logits["first", dim], divisor)
            answer = version.ask(f"classify_first_{dim}")
            np.testing.assert_array_equal(answer["class_ids"][:, 0], shares.argmax(-1))
            np.testing.assert_allclose(answer["probabilities"][:, 0], shares.max(-1), rtol=1e-5)
        features = np.asarray(
            keras.ops.convert_to_numpy(vectors.parts("first")[0](models.VECTORS, training=False))
        )[:, :2]
        scaled = features / np.linalg.norm(features, axis=-1, keepdims=True)
        np.testing.assert_allclose(version.ask("embed_first_2")["embedding"], scaled, atol=1e-5)


def test_an_encoder_embeds_at_every_exit(tmp_path: Path) -> None:
    model = models.encoder()
    path = export_saved_model(
        model, tmp_path, models.VECTORS[:8], dims=(2, 8), signatures=["embed", "embed_first"]
    )
    manifest = read_manifest(path)
    assert manifest.exit_names == ("first", "last")
    assert manifest.exits is not None
    assert [own["multiply_adds"] for own in manifest.exits] == [5 * 8 + 8 * 8, 5 * 8 + 8 * 8]
    outputs = model.all_exits()(models.VECTORS, training=False)
    with SavedModelSession(path) as session:
        for name, signature in (("first", "embed_first_8"), ("last", "embed_8")):
            embedding = np.asarray(keras.ops.convert_to_numpy(outputs[name]))
            scaled = embedding / np.linalg.norm(embedding, axis=-1, keepdims=True)
            answer = session.run(signature, {"x": models.VECTORS})
            np.testing.assert_allclose(answer["embedding"], scaled, atol=1e-5)


def sparse_rows() -> tuple[keras.Model, Any, Any]:
    x = keras.Input((60,), sparse=True, name="x")
    rows = np.diag(np.arange(1, 61, dtype="float32"))
    return net_of(x, x), tf().sparse.from_dense(rows), rows


def ragged_rows() -> tuple[keras.Model, Any, Any]:
    x = keras.Input((None,), dtype="int32", ragged=True, name="x")
    rows = np.random.default_rng(0).integers(1, 20, (60, 3)).astype("int32")
    return (
        net_of(x, Mean()(keras.layers.Embedding(20, 8)(x))),
        tf().RaggedTensor.from_tensor(rows),
        rows,
    )


def decoded_rows() -> tuple[keras.Model, Any, Any]:
    x = keras.Input((6, 5, 3), name="x")
    rows = np.random.default_rng(0).integers(0, 256, (60, 6, 5, 3), dtype=np.uint8)
    files = np.array([encoded(own) for own in rows], object)
    return net_of(x, keras.layers.Flatten()(x)), rows / np.float32(255), files


@keras.saving.register_keras_serializable("tests")
class Mean(keras.layers.Layer):
    """The mean over time, also of ragged rows."""

    def call(self, rows: Any) -> Any:
        return tf().reduce_mean(rows, axis=1)

    def compute_output_shape(self, shape: Any) -> Any:
        return (shape[0], shape[-1])


def tf() -> Any:
    import tensorflow

    return tensorflow


def net_of(inputs: Any, x: Any) -> keras.Model:
    first = keras.layers.Dense(8, activation="tanh", name="first")(x)
    net = keras.Model(inputs, keras.layers.Dense(8)(first))
    return MatryoshkaClassifier(net, MatryoshkaHead(models.NUM_CLASSES, DIMS), exits=("first",))


@backend
@pytest.mark.parametrize("make", [sparse_rows, ragged_rows, decoded_rows])
def test_rows_of_every_kind_leave_where_the_policy_lets_them(make: Any, tmp_path: Path) -> None:
    """Sparse and ragged ones are given to Keras, and served dense; images are served encoded."""
    if make is not decoded_rows and keras.backend.backend() != "tensorflow":
        pytest.skip("Keras is given sparse and ragged rows of TensorFlow alone")
    keras.utils.set_random_seed(0)
    model, given, served = make()
    logits = stage_logits(model.all_exits().predict(given, verbose=0), DIMS)
    policy = models.halving(logits, [("first", 2), ("first", 8), (None, 8)])
    decoder = DECODER if make is decoded_rows else None
    path = export_saved_model(
        model, tmp_path, served[:SAMPLED], policy=policy, decoder=decoder, activation="softmax"
    )
    class_ids, stage_of = policy.route(logits)
    with SavedModelSession(path) as session:
        [name] = read_manifest(path).inputs
        for part in (slice(None), slice(0, 0)):
            answer = session.run("classify_adaptive", {name: served[part]})
            np.testing.assert_array_equal(answer["class_ids"][:, 0], class_ids[part])
            np.testing.assert_array_equal(answer["exit"], (stage_of == 2)[part])


def test_a_cascade_over_dims_asks_the_last_exit(vectors: Any, tmp_path: Path) -> None:
    logits = models.all_logits(vectors, models.VECTORS)
    over_dims = models.halving(logits, [(None, 2), (None, 8)])
    path = export_saved_model(vectors, tmp_path, models.VECTORS[:8], policy=over_dims)
    manifest = read_manifest(path)
    assert (manifest.exit_cascade, manifest.exit_names) == (None, ("first", "last"))
    assert manifest.cascade is not None
    with SavedModelSession(path) as session:
        answer = session.run("classify_adaptive", {"x": models.VECTORS})
    class_ids, stage_of = over_dims.route(logits)
    np.testing.assert_array_equal(answer["class_ids"][:, 0], class_ids)
    np.testing.assert_array_equal(answer["dim"], np.array([2, 8])[stage_of])
    assert "exit" not in answer


def test_measured_costs_stand_in_the_manifest(vectors: Any, tmp_path: Path) -> None:
    early, rest, test = (Work(1, {1: own, 4: own**2}) for own in (0.5, 0.25, 0.125))
    costs = Costs(
        backbone={"first": early, "last": early + rest},
        branch={"first": rest, "last": Work(0, {1: 0.0, 4: 0.0})},
        head=dict.fromkeys(DIMS, test),
    )
    policy = small_policy(vectors)
    path = export_saved_model(
        vectors,
        tmp_path,
        models.VECTORS[:8],
        policy=policy,
        costs=costs,
        signatures=["classify", "classify_adaptive"],
    )
    manifest = read_manifest(path)
    assert manifest.exits is not None
    times = [own["milliseconds"] for own in manifest.exits]
    expected = [
        {str(size): costs.of([(name, 8)], size)[0] * size for size in (1, 4)}
        for name in ("first", "last")
    ]
    assert times == expected
    assert manifest.exit_cascade is not None
    of_stages = np.array(costs.of(policy.keys, 1)) / costs.of(policy.keys[-1:], 1)[0]
    shares = [own["relative_cost"] for own in manifest.exit_cascade["exit_stages"]]
    np.testing.assert_allclose(shares, of_stages)  # of the smallest batch


def refusal(tmp_path: Path, model: Any, error: type[Exception] = ValueError, **more: Any) -> str:
    with pytest.raises(error) as caught:
        export_saved_model(model, tmp_path / "m", models.VECTORS[:4], **more)
    assert not (tmp_path / "m").exists()
    return str(caught.value)


def test_a_policy_of_other_exits_is_refused(vectors: Any, tmp_path: Path) -> None:
    learn = (
        "Learn it on the logits of this model: "
        "CascadePolicy.learn(model.all_exits().predict(x), labels, dims)."
    )
    rule = "A cascade over exits asks exits of the model, from shallow to deep. Received: "
    other = CascadePolicy((Stage(2, 0.5, exit="second"), Stage(8, None)))
    assert refusal(tmp_path, vectors, policy=other) == (
        f"{rule}a policy over ('second', 'last') for a model with the exits ('first', 'last'). "
        f"{learn}"
    )
    plain = MatryoshkaClassifier(vectors.backbone, MatryoshkaHead(5, DIMS))
    own = CascadePolicy((Stage(2, 0.5, exit="first"), Stage(8, None)))
    assert refusal(tmp_path, plain, policy=own, activation="softmax") == (
        f"{rule}a policy over ('first', 'last') for a model without exits. {learn}"
    )


def test_exits_within_another_model_and_names_that_cannot_be_served_are_refused(
    vectors: Any, tmp_path: Path
) -> None:
    around = keras.Sequential([keras.Input((5,)), keras.layers.Rescaling(0.5), vectors])
    text = refusal(tmp_path, around)
    assert text.startswith("Exits are exported of the very model that has them")
    assert text.endswith("or leave its exits out: MatryoshkaClassifier(*split(model)).")
    tower = keras.Sequential([keras.Input((5,)), models.encoder()])
    assert refusal(tmp_path, tower).endswith(
        "leave its exits out: MatryoshkaEncoder(split(model)[0])."
    )
    for name in ("other", "adaptive", "8", "grün"):
        x = keras.Input((5,), name="x")
        hidden = keras.layers.Dense(8, name=name)(x)
        named = MatryoshkaEncoder(keras.Model(x, keras.layers.Dense(8)(hidden)), exits=(name,))
        text = refusal(tmp_path, named)
        assert f"Received: exit {name!r} of " in text
        assert text.endswith("Give its layer another name.")


def test_costs_of_another_model_are_refused(vectors: Any, tmp_path: Path) -> None:
    assert refusal(tmp_path, vectors, TypeError, costs={"first": 1.0}) == (
        "costs must be what measure_costs returns. Received: dict. Give costs=measure_costs(model)."
    )
    other = measure_costs(models.images(), batch_sizes=(), laps=1)
    assert refusal(tmp_path, vectors, costs=other).startswith(
        "costs must be of the exits and dims that are exported. Received: costs of exits "
        "('thumbnail', 'block0_out', 'block1_norm', 'last')"
    )


def test_a_sample_of_which_no_row_goes_down_is_told(vectors: Any, tmp_path: Path) -> None:
    forced = models.with_thresholds(small_policy(vectors), ALL)
    with pytest.warns(UserWarning, match="Received: a sample of 4 rows, none of which reaches"):
        export_saved_model(vectors, tmp_path, models.VECTORS[:4], policy=forced)
    model, _, files = decoded_rows()  # of files no other rows are made
    with pytest.warns(UserWarning, match="Received: a sample of 4 rows, none of which reaches"):
        export_saved_model(
            model,
            tmp_path / "decoded",
            files[:4],
            policy=forced,
            decoder=DECODER,
            activation="softmax",
        )


def test_a_row_that_goes_down_is_made_where_the_sample_has_none(
    vectors: Any, tmp_path: Path
) -> None:
    """The mean of two rows is unsure of both."""
    logits = models.all_logits(vectors, models.VECTORS)
    policy = small_policy(vectors)
    _, stage_of = policy.route(logits)
    sure = models.VECTORS[stage_of == 0][:8]
    path = export_saved_model(vectors, tmp_path, sure, policy=policy)
    [rows] = [own for name, own in warmup_records(path) if name == "classify_adaptive"]
    with SavedModelSession(path) as session:
        assert session.run("classify_adaptive", rows)["exit"].tolist() == [1]
    assert not (rows["x"] == sure).all(axis=-1).any()
