"""What `export_saved_model` writes, and whole models from their training to a server's answers."""

import asyncio
import doctest
import importlib
import json
import os
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_mrl_export
from keras_mrl import (
    AdaptiveDecoder,
    ContrastiveLoss,
    MatryoshkaAdaptor,
    MatryoshkaClassifier,
    MatryoshkaEncoder,
    MatryoshkaHead,
    MatryoshkaLoss,
    generate,
    next_token,
    split,
)
from keras_mrl_export import export_saved_model
from keras_mrl_serving import (
    AsyncClient,
    Client,
    EncoderMismatchError,
    ExactIndex,
    FunnelSchedule,
    InvalidInputError,
    NoCascadeError,
    __version__,
    truncate,
)
from keras_mrl_serving._session import SavedModelSession
from keras_mrl_serving.cascade.policy import CascadePolicy, Stage
from keras_mrl_serving.contract import MANIFEST_FILE
from keras_mrl_serving.server import DevServer
from tests.helpers import export_models as models
from tests.helpers import two_towers
from tests.helpers.export_models import (
    DIMS,
    NAMES,
    NUM_CLASSES,
    TEMPERATURES,
    TOP_K,
    Arrays,
    Exported,
    X,
    assert_equal_rows,
    dense,
    outputs,
    read_manifest,
    written_signatures,
)
from tests.helpers.language_models import LENGTH, TOKENS, WIDTH, language_model
from tests.helpers.laws import on_backends
from tests.helpers.nested_models import NESTED, two_heads
from tests.helpers.vision_backbones import SHAPE, keras_cv

backend = pytest.mark.backend


def test_the_manifest_of_everything_given(untied: Exported) -> None:
    manifest = json.loads((untied.path / MANIFEST_FILE).read_bytes())
    fingerprint, model_id = manifest.pop("fingerprint"), manifest.pop("model_id")
    assert type(model_id) is int
    assert 0 < model_id < 2**31
    assert len(bytes.fromhex(fingerprint)) == 32
    assert manifest == {
        "schema": 1,
        "name": "untied",
        "kind": "classifier",
        "dims": [2, 4, 16],
        "width": 16,
        "inputs": {"image": {"dtype": "float32", "shape": [None, 6, 6, 3]}},
        "weights": [1.0, 0.5, 2.0],
        "tied": False,
        "normalize": True,
        "metric": "cosine",
        "activation": "softmax",
        "num_classes": 10,
        "num_values": None,
        "top_k": 3,
        "labels": True,
        "decoder": None,
        "exits": None,
        "exit_cascade": None,
        "other_tower": None,
        "funnel": None,
        "size": None,
        "prompt": None,
        "preprocessor": None,
        "encoder_fingerprint": None,
        "cascade": {
            "stages": [
                {"dim": dim, "threshold": stage.threshold, "temperature": TEMPERATURES[dim]}
                for dim, stage in zip(DIMS, untied.policy.stages, strict=True)
            ],
            "confidence": "max_probability",
            "method": "by hand",
            "guarantee": None,
            "holdout_size": None,
        },
        "quality": {"2": {"top1": 0.5}, "4": {"top1": 0.75}, "16": {"top1": 0.9375}},
        "made_with": {
            "keras_mrl": __version__,
            "keras": keras.__version__,
            "tensorflow": tf.__version__,
            "trained_on": keras.backend.backend(),
        },
    }
    assert CascadePolicy.from_json(untied.manifest.cascade or {}) == untied.policy


def test_the_manifest_of_nothing_given(of_tokens: Exported, encoder: Exported) -> None:
    bare = of_tokens.manifest
    assert (bare.name, bare.kind, bare.dims, bare.top_k) == ("tokens", "classifier", DIMS, 5)
    assert (bare.labels, bare.cascade, bare.quality, bare.weights) == (False, None, None, None)
    manifest = encoder.manifest
    assert (manifest.name, manifest.kind, manifest.dims) == ("encoder", "encoder", (8, 16, 20))
    assert (manifest.num_classes, manifest.top_k, manifest.activation) == (None, None, "none")


def test_the_manifest_of_a_tied_head_with_a_gallery(tied: Exported) -> None:
    manifest, index = tied.manifest, tied.job.index
    assert index is not None
    assert (manifest.tied, manifest.normalize, manifest.name) == (True, False, "renamed")
    assert manifest.width == DIMS[-1]  # of the widest dim, where the features are wider
    assert (manifest.kind, manifest.metric, manifest.size) == ("index", "dot", len(index))
    assert manifest.funnel == index.schedule.to_json()
    assert manifest.encoder_fingerprint == manifest.fingerprint
    assert manifest.made_with["trained_on"] == keras.backend.backend()


def test_what_lies_in_a_version(untied: Exported) -> None:
    files = {str(p.relative_to(untied.path)) for p in untied.path.rglob("*") if p.is_file()}
    assert files - {"fingerprint.pb"} == {
        "saved_model.pb",
        "variables/variables.index",
        "variables/variables.data-00000-of-00001",
        "assets/labels.txt",
        "assets.extra/keras_mrl.json",
        "assets.extra/keras_mrl_parity.json",
        "assets.extra/tf_serving_warmup_requests",
    }
    assert (untied.path / "assets/labels.txt").read_text("utf-8").split("\n") == [*NAMES, ""]
    assert os.listdir(untied.path.parent) == [untied.path.name]


def test_a_pooling_layer_is_part_of_what_is_served(tmp_path: Path) -> None:
    """Every signature is compared with the model before the version is published."""
    maps = keras.Sequential([keras.Input((6, 6, 3)), keras.layers.Conv2D(8, 3)], name="maps")
    pooling = keras.layers.GlobalAveragePooling2D()
    model = MatryoshkaClassifier(maps, MatryoshkaHead(3, dims=(2, 4, 8)), pooling=pooling)
    manifest = read_manifest(
        export_saved_model(models.of_one_class(model), tmp_path, models.images(4))
    )
    assert (manifest.dims, manifest.num_classes) == ((2, 4, 8), 3)


def test_versions_of_one_model(tmp_path: Path) -> None:
    model = dense(head=True)
    (tmp_path / "10.tmp").mkdir()
    paths = [
        export_saved_model(model, tmp_path, X, version=1),
        export_saved_model(model, str(tmp_path), X, version=7),
        export_saved_model(model, tmp_path, X, dims=(8, 2), top_k=1),
    ]
    assert [path.relative_to(tmp_path) for path in paths] == [
        Path("1"),
        Path("7"),
        paths[2].relative_to(tmp_path),
    ]
    assert int(paths[2].name) > 1_700_000_000  # seconds since 1970
    manifests = [read_manifest(path) for path in paths]
    assert len({manifest.fingerprint for manifest in manifests}) == 1  # of one model
    assert len({manifest.model_id for manifest in manifests}) == 3  # of three exports
    assert [manifest.dims for manifest in manifests] == [(2, 4, 8), (2, 4, 8), (2, 8)]
    assert [manifest.top_k for manifest in manifests] == [3, 3, 1]
    before = (tmp_path / "7" / MANIFEST_FILE).stat()
    with pytest.raises(FileExistsError) as caught:
        export_saved_model(model, tmp_path, X, version=7)
    assert str(caught.value) == (
        "A published version is never overwritten. "
        f"Received: version=7, which exists under {tmp_path}. Leave version out to take "
        "a number that is free."
    )
    assert (tmp_path / "7" / MANIFEST_FILE).stat() == before
    assert sorted(os.listdir(tmp_path)) == sorted(["1", "10.tmp", "7", paths[2].name])


def test_a_relative_base_path_is_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = export_saved_model(dense(), "models/e", X, dims=(3,), version=1)
    assert path == tmp_path / "models/e/1"


def test_measures_and_weights_of_other_types_are_numbers(tmp_path: Path) -> None:
    path = export_saved_model(
        dense(head=True),
        tmp_path,
        X,
        quality={np.int64(8): {"top1": np.float32(0.5)}, 2: {"top1": np.array(0.25)}},  # type: ignore[dict-item]
        weights=np.array([1, 2, 3]),  # type: ignore[arg-type]
        dims=(2, 8),
    )
    manifest = read_manifest(path)
    assert manifest.quality == {"2": {"top1": 0.25}, "8": {"top1": 0.5}}
    assert manifest.weights == (1.0, 3.0)  # those of the exported dims


def test_a_policy_may_leave_dims_out_and_all_of_it_is_served(tmp_path: Path) -> None:
    policy = CascadePolicy((Stage(2, 0.5, 3.0), Stage(8, None)))
    path = export_saved_model(dense(head=True), tmp_path, X, policy)
    manifest = read_manifest(path)
    assert manifest.dims == (2, 4, 8)
    assert CascadePolicy.from_json(manifest.cascade or {}) == policy


def test_tensors_generators_and_numbers_of_numpy_are_taken(tmp_path: Path) -> None:
    path = export_saved_model(
        dense(head=True),
        tmp_path,
        tf.constant(X),
        dims=(dim for dim in (2, 8)),  # type: ignore[arg-type]
        labels=(name for name in "abc"),  # type: ignore[arg-type]
        signatures=(name for name in ("embed",)),  # type: ignore[arg-type]
        version=np.int64(3),  # type: ignore[arg-type]
        top_k=np.int64(2),  # type: ignore[arg-type]
    )
    assert path == tmp_path / "3"
    manifest = read_manifest(path)
    assert (manifest.top_k, manifest.dims, manifest.labels) == (2, (2, 8), True)


def test_without_its_signature_a_policy_is_temperatures_alone(
    untied: Exported, tmp_path: Path
) -> None:
    sample = untied.rows[""][:4]
    path = export_saved_model(
        untied.model, tmp_path, sample, untied.policy, signatures=["classify_2", "features"]
    )
    with DevServer(tmp_path) as target, Client(target) as client:
        assert client.describe().cascade is None
        with pytest.raises(NoCascadeError, match="exported without one"):
            client.classify_adaptive(sample)
    with SavedModelSession(path) as session:
        assert written_signatures(session) == {
            *("classify_2", "features", "serving_default", "describe")
        }
        for signature, whole in (("classify_2", "classify_2"), ("serving_default", "classify_16")):
            np.testing.assert_allclose(
                session.run(signature, {"image": sample})["confidence"],
                untied.ask(whole, slice(0, 4))["confidence"],
                rtol=1e-5,
            )


def test_a_sequential_model_that_ends_in_a_head(tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((5,), name="image"), keras.layers.Dense(8)])
    model.add(MatryoshkaHead(3, dims=(2, 8)))
    path = export_saved_model(models.of_one_class(model), tmp_path, X)
    manifest = read_manifest(path)
    assert (manifest.kind, list(manifest.inputs)) == ("classifier", ["image"])
    with SavedModelSession(path) as session:
        features = session.run("features", {"image": X})["features"]
        answer = session.run("head_8", {"features": features})
    np.testing.assert_allclose(answer["logits"], outputs(model, X)[:, 1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "kind", ["classifier in a sequence", "class of a user's", "classifier with a call of its own"]
)
def test_a_head_is_served_wherever_it_ends_a_model(kind: str, tmp_path: Path) -> None:
    """Every signature is compared with the model before the version is published."""
    model = NESTED[kind]()
    path = export_saved_model(model, tmp_path, X, activation="softmax")
    manifest = read_manifest(path)
    assert (manifest.kind, manifest.dims, manifest.num_classes) == ("classifier", (2, 4, 8), 3)
    with SavedModelSession(path) as session:
        answer = session.run("classify_4", {"inputs": X})
    logits = outputs(model, X)[:, 1]
    np.testing.assert_array_equal(answer["class_ids"][:, 0], logits.argmax(-1))


def test_each_of_several_outputs_is_a_version_of_its_own(tmp_path: Path) -> None:
    model = two_heads(aux=keras.layers.Dense(4))
    losses = keras.losses.SparseCategoricalCrossentropy, keras.losses.BinaryCrossentropy
    one, several = (MatryoshkaLoss(loss(from_logits=True)) for loss in losses)
    model.compile("sgd", {"digit": one, "odd": several, "aux": None})
    versions = {
        name: export_saved_model(model, tmp_path / name, X, output=name)
        for name in ("digit", "odd", "aux")
    }
    manifests = {name: read_manifest(path) for name, path in versions.items()}
    assert [manifest.num_classes for manifest in manifests.values()] == [3, 2, None]
    activations = [manifest.activation for manifest in manifests.values()]
    assert activations == ["softmax", "sigmoid", "none"]
    assert [manifest.name for manifest in manifests.values()] == ["two_digit", "two_odd", "two_aux"]
    logits = {name: np.asarray(keras.ops.convert_to_numpy(t)) for name, t in model(X).items()}
    with SavedModelSession(versions["odd"]) as session:
        answer = session.run("head_8", {"features": outputs(split(model, "odd")[0], X)})
    assert_equal_rows(answer["logits"], logits["odd"][:, 2])
    with pytest.raises(ValueError, match=r"which has 'aux', 'digit', 'odd'\. Give for example"):
        export_saved_model(model, tmp_path / "all", X)
    assert not (tmp_path / "all").exists()


@pytest.mark.parametrize("is_pooled", [False, True])
def test_an_encoder_is_exported_as_its_tower(is_pooled: bool, tmp_path: Path) -> None:
    layers = [keras.layers.Dense(8), keras.layers.Reshape((2, 4))]
    pooling = keras.layers.GlobalAveragePooling1D()
    tower = keras.Sequential([keras.Input((5,), name="x"), *layers])
    if not is_pooled:
        tower.add(pooling)
    model = MatryoshkaEncoder(
        tower, pooling=pooling if is_pooled else None, initial_temperature=0.1
    )
    model.compile("adam", ContrastiveLoss(dims=(2, 4)), run_eagerly=True)
    model.fit((X, 2 * X), verbose=0)
    with SavedModelSession(export_saved_model(model, tmp_path, X, dims=(2, 4))) as session:
        embedded = session.run("embed_2", {"x": X})["embedding"]
    np.testing.assert_allclose(embedded, truncate(outputs(model, X), 2), rtol=0, atol=1e-5)


def test_an_adapted_encoder_serves_projected_prefixes(tmp_path: Path) -> None:
    tower = keras.Sequential([keras.Input((5,), name="x"), keras.layers.Dense(4)])
    embeddings = outputs(tower, X)
    adaptor = MatryoshkaAdaptor(dims=(2, 3)).fit(embeddings)
    with SavedModelSession(
        export_saved_model(adaptor.fold(tower), tmp_path, X, dims=adaptor.dims)
    ) as session:
        for dim in adaptor.dims:
            embedded = session.run(f"embed_{dim}", {"x": X})["embedding"]
            expected = truncate(adaptor.transform(embeddings), dim)
            np.testing.assert_allclose(embedded, expected, rtol=0, atol=1e-5)


# Two towers, from their training to the neighbours that a server's answers find.


@backend
@on_backends("tensorflow", "jax")
def test_two_towers_are_one_version(tmp_path: Path) -> None:
    encoder, some_items = two_towers.two_towers(), {n: a[:16] for n, a in two_towers.ITEMS.items()}
    rows: dict[str, Any] = {"sample": two_towers.USERS[:16], "other_sample": some_items}
    export_saved_model(encoder, tmp_path / "shop", **rows)
    users = two_towers.user_embeddings(encoder).astype(np.float32)
    items = two_towers.item_embeddings(encoder).astype(np.float32)
    nearest = np.argsort(-two_towers.similarities(users, items, 8))[:, :5]
    with (
        DevServer(tmp_path / "shop", model_name="shop") as target,
        Client(target, "shop") as client,
    ):
        for dim in two_towers.DIMS:
            embedded = client.embed(two_towers.USERS, dim)
            np.testing.assert_allclose(embedded, truncate(users, dim), rtol=0, atol=1e-5)
            embedded = client.embed(two_towers.ITEMS, dim, other_tower=True)
            np.testing.assert_allclose(embedded, truncate(items, dim), rtol=0, atol=1e-5)
        file = tmp_path / "items.npy"
        gallery = client.embed_dataset(two_towers.ITEMS, 8, file, other_tower=True)
        funnel, described = FunnelSchedule((8,), (), 5), client.describe()
        index = ExactIndex.build(gallery, funnel, encoder_fingerprint=described.fingerprint)
        neighbors = client.retrieve(two_towers.USERS, index)
        np.testing.assert_array_equal(neighbors.ids, nearest)
        strangers = ExactIndex.build(gallery, funnel, encoder_fingerprint="c0de")
        with pytest.raises(EncoderMismatchError, match="built with 'c0de'"):
            client.retrieve(two_towers.USERS, strangers)

        another = tmp_path / "another.npy"
        other_side: list[Callable[[], object]] = [
            lambda: client.embed(two_towers.ITEMS, 8),
            lambda: client.embed(two_towers.USERS, 8, other_tower=True),
            lambda: client.retrieve(two_towers.ITEMS, index),
            lambda: client.embed_dataset(two_towers.ITEMS, 8, another),
            lambda: client.embed_dataset(iter([two_towers.ITEMS]), 8, another),
        ]
        for embed_other_side in other_side:
            with pytest.raises(InvalidInputError, match="of galleries with other_tower=True"):
                embed_other_side()

        async def ask() -> tuple[Any, Any]:
            async with AsyncClient(target, "shop") as other:
                embedded = await other.embed(two_towers.ITEMS, 8, other_tower=True)
                return embedded, await other.retrieve(two_towers.USERS, index)

        embedded, found = asyncio.run(ask())
        np.testing.assert_array_equal(embedded, gallery)
        np.testing.assert_array_equal(found.ids, nearest)

    with pytest.raises(EncoderMismatchError, match="built with 'c0de'"):
        export_saved_model(encoder, tmp_path / "graph", **rows, index=strangers, signatures=[])
    rows["signatures"] = ["retrieve", "embed_other"]
    export_saved_model(encoder, tmp_path / "graph", **rows, index=index)
    with DevServer(tmp_path / "graph", model_name="shop") as target:
        client = Client(target, "shop")
        np.testing.assert_array_equal(client.retrieve(two_towers.USERS).ids, nearest)
        embedded = client.embed(two_towers.ITEMS, 8, other_tower=True)
        np.testing.assert_allclose(embedded, gallery, rtol=0, atol=1e-6)
        client.close()


def test_examples_in_docstrings() -> None:
    modules = [
        importlib.import_module(f"keras_mrl_export.{info.name}")
        for info in pkgutil.iter_modules(keras_mrl_export.__path__)
    ]
    results = [doctest.testmod(module) for module in (keras_mrl_export, *modules)]
    assert sum(result.failed for result in results) == 0


# A ResNetV2 of keras-cv, trained on JAX: every signature through gRPC is the model.

IMAGES = np.random.default_rng(0).uniform(0, 255, size=(16, *SHAPE)).astype("float32")
LABELS = np.arange(16) % NUM_CLASSES


def resnet() -> keras.Model:
    return keras.Sequential(
        [keras_cv(), keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(DIMS[-1])]
    )


@dataclass(frozen=True)
class ServedVision:
    """Outputs of a trained model for the images, and a client of its version."""

    features: Any
    logits: Any
    policy: CascadePolicy
    client: Client


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedVision]:
    backbone = resnet()
    model = MatryoshkaClassifier(backbone, MatryoshkaHead(NUM_CLASSES, DIMS), name="resnet")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.01), MatryoshkaLoss(loss))
    model.fit(IMAGES, LABELS, batch_size=len(IMAGES), verbose=0)
    logits = np.asarray(model.predict(IMAGES, verbose=0))
    policy = models.halving_policy(logits)
    base_path = tmp_path_factory.mktemp("resnet")
    export_saved_model(model, base_path, IMAGES, policy, top_k=TOP_K)
    features = np.asarray(backbone.predict(IMAGES, verbose=0))
    with DevServer(base_path) as target, Client(target) as client:
        yield ServedVision(features, logits, policy, client)


def expected_outputs(vision: ServedVision) -> dict[str, tuple[Arrays, Arrays]]:
    """By signature, its inputs and the outputs it must answer with."""
    (name,) = vision.client.describe().inputs
    sent = {name: IMAGES}
    expected = {"features": (sent, {"features": vision.features})}
    for index, dim in enumerate(DIMS):
        prefix, logits = vision.features[:, :dim], vision.logits[:, index]
        scaled = prefix / np.linalg.norm(prefix, axis=-1, keepdims=True)
        answer = models.classification(logits, TEMPERATURES[dim], TOP_K, names=False)
        expected[f"embed_{dim}"] = sent, {"embedding": scaled}
        expected[f"classify_{dim}"] = sent, answer
        expected[f"head_{dim}"] = {"features": prefix}, {**answer, "logits": logits}
    expected["classify_adaptive"] = (
        sent,
        models.cascade(vision.logits, vision.policy, TOP_K, names=False),
    )
    expected["serving_default"] = expected[f"classify_{DIMS[-1]}"]
    return expected


@backend
@on_backends("jax")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of keras-cv
def test_every_signature_is_the_model(vision: ServedVision) -> None:
    expected = expected_outputs(vision)
    assert set(vision.client.signatures()) - {"__saved_model_init_op"} == {*expected, "describe"}
    for signature, (sent, answer) in expected.items():
        outputs = vision.client.predict(sent, signature)
        identity = set() if signature == "serving_default" else {"model_id"}
        assert set(outputs) == {*answer, *identity}, signature
        for output, array in answer.items():
            assert_equal_rows(outputs[output], array)
    assert vision.client.describe().made_with["trained_on"] == "jax"


@backend
@on_backends("jax")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of keras-cv
def test_images_leave_the_cascade_at_every_dim(vision: ServedVision) -> None:
    dims, counts = np.unique(vision.client.classify_adaptive(IMAGES).dim, return_counts=True)
    assert dict(zip(dims.tolist(), counts.tolist(), strict=True)) == dict(
        zip(DIMS, (8, 4, 4), strict=True)
    )


# A language model, trained on PyTorch: tokens answer with the next one, and so write a text.

RANDOM = np.random.default_rng(0)
# Mostly counted upwards: some tokens are easy to foretell, some are not.
STEPS = RANDOM.choice([1, 1, 1, 5], size=(96, LENGTH + 1))
TEXT = (np.cumsum(STEPS, axis=1) % TOKENS).astype("int32")
PROMPTS = TEXT[:5, :3]
TEXT_DIMS = (2, 8)  # a signature of each kind per dim takes its time to trace


@dataclass(frozen=True)
class ServedLanguage:
    """A trained language model, its policy, and the version of its view of the next token."""

    model: Any
    policy: CascadePolicy
    path: Path


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> ServedLanguage:
    keras.utils.set_random_seed(0)
    model = language_model(tied=True, dims=TEXT_DIMS)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.02), MatryoshkaLoss(loss))
    model.fit(TEXT[:, :-1], TEXT[:, 1:], epochs=12, batch_size=48, verbose=0)
    policy = half_and_half(model)
    view = next_token(model)
    path = export_saved_model(view, tmp_path_factory.mktemp("lm"), TEXT[:8, :LENGTH], policy)
    return ServedLanguage(model, policy, path)


def half_and_half(model: Any) -> CascadePolicy:
    """About half the tokens of the text are decided at the first dim, none of them narrowly."""
    logits = model.predict(TEXT[:, :-1], verbose=0)[:, :, 0]
    logits = logits - logits.max(axis=-1, keepdims=True)
    confidences = np.sort((1 / np.exp(logits).sum(axis=-1)).ravel())
    middle = confidences[len(confidences) // 4 : 3 * len(confidences) // 4]
    widest = int(np.argmax(np.diff(middle)))
    threshold = float(middle[widest : widest + 2].mean())
    stages = (Stage(TEXT_DIMS[0], threshold), Stage(TEXT_DIMS[1], None))
    return CascadePolicy(stages)


@backend
@on_backends("torch")
def test_its_input_is_tokens_of_any_length(language: ServedLanguage) -> None:
    manifest = read_manifest(language.path)
    assert manifest.inputs == {"tokens": {"dtype": "int32", "shape": [None, None]}}
    assert (manifest.kind, manifest.num_classes, manifest.dims) == ("classifier", TOKENS, TEXT_DIMS)
    assert (manifest.tied, manifest.width) == (True, WIDTH)


@backend
@on_backends("torch")
def test_a_text_written_through_the_client_is_the_one_written_here(
    language: ServedLanguage,
) -> None:
    local = AdaptiveDecoder(language.model, language.policy, LENGTH)
    ids, dims = generate(local, PROMPTS, 12, LENGTH)
    with DevServer(language.path.parent) as target, Client(target) as client:

        def ask(tokens: Any) -> tuple[Any, Any]:
            answer = client.classify_adaptive(tokens)
            return answer.class_ids[:, 0], answer.dim

        remote_ids, remote_dims = generate(ask, PROMPTS, 12, LENGTH)
    np.testing.assert_array_equal(remote_ids, ids)
    np.testing.assert_array_equal(remote_dims, dims)
    assert len(np.unique(dims)) > 1
    assert len(np.unique(ids)) > 3


@backend
@on_backends("torch")
def test_two_hundred_tokens_and_what_they_cost(language: ServedLanguage) -> None:
    """As the full dim alone would write them, at how many dims a token."""
    with DevServer(language.path.parent) as target, Client(target) as client:

        def at_full_width(tokens: Any) -> tuple[Any, Any]:
            answer = client.classify(tokens, dim=TEXT_DIMS[-1])
            return answer.class_ids[:, 0], np.full(len(tokens), TEXT_DIMS[-1])

        def adaptively(tokens: Any) -> tuple[Any, Any]:
            answer = client.classify_adaptive(tokens)
            return answer.class_ids[:, 0], answer.dim

        full, _ = generate(at_full_width, PROMPTS[:1], 200, LENGTH)
        written, dims = generate(adaptively, PROMPTS[:1], 200, LENGTH)
        # Token by token, given the same text: one early difference would change all that follows.
        text = np.concatenate([PROMPTS[0], written[0]]).astype("int32")
        windows = np.stack([text[end - LENGTH : end] for end in range(LENGTH, len(text))])
        again = client.classify(windows, dim=TEXT_DIMS[-1]).class_ids[:, 0]
    assert written.shape == full.shape == (1, 200)
    agreement = np.mean(again == text[LENGTH:])
    print(f"agreement with the full dim {agreement:.3f}, expected dim {dims.mean():.2f}")
    assert agreement > 0.7
    assert TEXT_DIMS[0] < dims.mean() < TEXT_DIMS[-1]
