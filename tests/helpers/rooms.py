"""The rooms that a model goes through from `fit` on, each a law of every model of `fitted_models`.

What a room gives is compared with NumPy's float64 on the weights; what it refuses, it refuses in a
sentence with the rule, what was received, and the remedy.
"""

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from keras_mrl import MatryoshkaClassifier, MatryoshkaEncoder, NeighborMetrics, cut, embedder, split
from keras_mrl.evaluation import evaluate
from keras_mrl_export import export_saved_model
from keras_mrl_serving import AsyncClient, Client, KerasMrlError, Manifest
from keras_mrl_serving.contract import MANIFEST_FILE
from keras_mrl_serving.server import DevServer
from tests.helpers import loss_reference
from tests.helpers.cli import Call
from tests.helpers.faulty_server import open_client
from tests.helpers.fitted_models import DIMS, Array, Kind, as_numpy
from tests.helpers.two_towers import item_embeddings

BATCH, BACKEND = 16, keras.backend.backend()
Law = Callable[["Fitted", Call], None]


@dataclass(frozen=True, eq=False)
class Fitted:
    """A model after one epoch of `fit`, the last entries of its log, and a folder."""

    kind: Kind
    model: keras.Model
    log: Mapping[str, float]
    folder: Path


def fit(kind: Kind, folder: Path) -> Fitted:
    """Fit in one epoch, watched by Keras's callbacks, and validate on all rows at once."""
    model = kind.new()
    is_ours = isinstance(model, (MatryoshkaClassifier, MatryoshkaEncoder))
    watched = {
        "monitor": f"val_{kind.log}",
        "mode": "auto" if is_ours else "max",
    }  # of others it is written
    watching = [
        keras.callbacks.EarlyStopping(**watched),
        keras.callbacks.ModelCheckpoint(
            folder / "best.weights.h5", save_best_only=True, save_weights_only=True, **watched
        ),
    ]
    log = model.fit(
        kind.x,
        kind.y,
        batch_size=BATCH,
        shuffle=False,
        validation_data=(kind.x, kind.y),
        validation_batch_size=kind.rows,
        callbacks=watching,
        verbose=0,
    ).history
    better = "less" if kind.activation == "none" else "greater"
    assert [callback.monitor_op.__name__ for callback in watching] == [better] * 2
    return Fitted(kind, model, {name: values[-1] for name, values in log.items()}, folder)


def refuses(ask: Callable[[], object], text: str) -> None:
    """By name: the rule, what was received, and the remedy, `text` among them."""
    with pytest.raises((ValueError, KerasMrlError)) as caught:
        ask()
    in_three_clauses(str(caught.value), text)


def in_three_clauses(sentence: str, text: str) -> None:
    assert re.fullmatch(r".+\. Received: .+\. [A-Z].+\.", sentence, re.DOTALL), sentence
    assert text in sentence, sentence


def near(received: Any, expected: Array, share: float = 1e-5) -> None:
    """Equal to a share of the largest magnitude."""
    received = as_numpy(received)
    assert received.shape == expected.shape
    assert np.abs(received - expected).max() <= share * np.abs(expected).max()


# What NumPy says.


def softmax(logits: Array) -> Array:
    raised = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return raised / raised.sum(axis=-1, keepdims=True)


def sigmoid(logits: Array) -> Array:
    return 1 / (1 + np.exp(-logits))


def unit(prefix: Array) -> Array:
    return prefix / np.linalg.norm(prefix, axis=-1, keepdims=True)


def probabilities(kind: Kind, logits: Array) -> Array:
    return softmax(logits) if kind.activation == "softmax" else sigmoid(logits)


def labels(kind: Kind) -> Any:
    return kind.y if kind.output is None else kind.y[kind.output]


def loss(kind: Kind, model: keras.Model) -> float:
    """The sum over the dims of the mean loss of a row."""
    if kind.activation is None:
        return embedding_loss(kind, model)
    total = 0.0
    for dim in DIMS:
        outputs, y = kind.expected_outputs(model, dim), labels(kind)
        if kind.activation == "none":
            total += ((outputs - y) ** 2).mean()
        elif kind.activation == "sigmoid":
            share = sigmoid(outputs)
            total -= (y * np.log(share) + (1 - y) * np.log(1 - share)).mean()
        else:
            total -= np.log(np.take_along_axis(softmax(outputs), y[..., None], -1)).mean()
    return total


def embedding_loss(kind: Kind, model: keras.Model) -> float:
    ones = (1.0,) * len(DIMS)
    queries = kind.expected_features(model)
    if not kind.is_pairs:
        rows = loss_reference.supervised(queries, kind.y, DIMS, ones, 0.2)
    else:
        pairs = np.stack([queries, item_embeddings(model, kind.x[1])], axis=1)
        rows = loss_reference.contrastive(pairs, DIMS, ones, 0.2, symmetric=False)
    return float(np.mean(rows))


def entry(kind: Kind, model: keras.Model) -> float | None:
    """What the log has of dim 2, beside the loss; None of an encoder."""
    if kind.activation is None:
        return None
    outputs, y = kind.expected_outputs(model, 2), labels(kind)
    if kind.activation == "none":
        return float(np.abs(outputs - y).mean())
    if kind.activation == "sigmoid":
        return float(((outputs > 0) == y).mean())
    return float((outputs.argmax(axis=-1) == y).mean())


def nearest_is_right(kind: Kind, model: keras.Model, dim: int) -> float:
    """The share of queries whose nearest of the gallery has their label."""
    queries, gallery = kind.expected_sides(model)
    cosines = unit(queries[:, :dim]) @ unit(gallery[:, :dim]).T
    return float((kind.gallery[1][cosines.argmax(axis=1)] == kind.queries[1]).mean())


# The rooms.


def log_is_numpy_s(fitted: Fitted, _: Call) -> None:
    kind, log = fitted.kind, fitted.log
    assert {f"val_{kind.log}".replace("_2", f"_{dim}") for dim in DIMS} <= log.keys()
    if kind.sums_dims:
        assert log[f"{kind.of_output}loss"] == pytest.approx(loss(kind, fitted.model), rel=1e-4)
    expected = entry(kind, fitted.model)
    if expected is not None:
        assert log[f"val_{kind.log}"] == pytest.approx(expected, rel=1e-4)


def as_outputs(model: keras.Model, kind: Kind) -> Array:
    outputs = model(kind.one_side)
    return as_numpy(outputs if kind.output is None else outputs[kind.output])


def predictions_are_numpy_s(fitted: Fitted, _: Call) -> None:
    outputs = as_outputs(fitted.model, fitted.kind)
    if fitted.kind.activation is None:
        near(outputs, fitted.kind.expected_features(fitted.model))
        return
    for column, dim in enumerate(DIMS):
        expected = fitted.kind.expected_outputs(fitted.model, dim)
        near(outputs[..., column, :], softmax(expected) if fitted.kind.is_topped else expected)


class Batches(keras.utils.PyDataset):
    """The batches of `fit`, with weights of one."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.kind = kind

    def __len__(self) -> int:
        return -(-self.kind.rows // BATCH)

    def __getitem__(self, index: int) -> Any:
        part = slice(index * BATCH, (index + 1) * BATCH)
        x = keras.tree.map_structure(lambda rows: rows[part], self.kind.x)
        if self.kind.y is None:
            return (x,)
        y = keras.tree.map_structure(lambda rows: rows[part], self.kind.y)
        ones = keras.tree.map_structure(lambda rows: np.ones(len(rows), "float32"), y)
        return x, y, ones


def a_failed_first_step_leaves_the_model(fitted: Fitted, _: Call) -> None:
    """And a data set with weights of one trains as arrays do."""
    kind = fitted.kind
    model = kind.new()
    x, y = kind.misfit()
    if kind.is_pairs:
        with pytest.raises(ValueError, match="incompatible"):  # Keras's own
            model.fit(x, y, batch_size=BATCH, verbose=0)
    elif kind.output is None:  # Keras's models of several outputs are then to be compiled anew
        refuses(lambda: model.fit(x, y, batch_size=BATCH, verbose=0), "")
    model.fit(Batches(kind), shuffle=False, verbose=0)
    for received, expected in zip(model.weights, fitted.model.weights, strict=True):
        if "seed_generator" not in expected.path:
            np.testing.assert_allclose(
                as_numpy(received), as_numpy(expected), rtol=1e-4, atol=1e-5, err_msg=expected.path
            )


def evaluate_of_keras_is_the_log_s(fitted: Fitted, _: Call) -> None:
    """Of the model, and of the model saved and loaded."""
    kind = fitted.kind
    file = fitted.folder / "model.keras"
    fitted.model.save(file)
    for model in (fitted.model, keras.saving.load_model(file)):
        scores = model.evaluate(kind.x, kind.y, batch_size=kind.rows, verbose=0, return_dict=True)
        for name, score in scores.items():
            assert score == pytest.approx(fitted.log[f"val_{name}"], rel=1e-4), name


def weights_are_loaded(fitted: Fitted, _: Call) -> None:
    """Those that `ModelCheckpoint` wrote, before any `fit` where shapes are known."""
    model = fitted.kind.new()
    if not model.built:
        model(fitted.kind.one_side)
    model.optimizer.build(model.trainable_variables)  # its state is in the file
    model.load_weights(fitted.folder / "best.weights.h5")
    received, expected = (as_outputs(part, fitted.kind) for part in (model, fitted.model))
    near(received, expected)


def evaluate_is_numpy_s(fitted: Fitted, _: Call) -> None:
    kind, model = fitted.kind, fitted.model
    if kind.activation is None:
        quality = evaluate(model, *kind.queries, gallery=kind.gallery, verbose=0)
    else:
        quality = evaluate(model, kind.x, labels(kind), verbose=0, **kind.output_only)
    for dim in DIMS:
        name, expected = measure(kind, model, dim)
        assert quality[dim][name] == pytest.approx(expected, rel=1e-4)


def measure(kind: Kind, model: keras.Model, dim: int) -> tuple[str, float]:
    """One of the measures that `evaluate` has of such a model."""
    if kind.activation is None:
        return "nn1", nearest_is_right(kind, model, dim)
    outputs, y = kind.expected_outputs(model, dim), labels(kind)
    if kind.activation == "sigmoid":
        return "ap_macro", float(average_precision_score(y, outputs, average="macro"))
    if kind.activation == "none":
        return "mae", float(np.abs(outputs - y).mean())
    return "top1", float((outputs.argmax(axis=-1) == y).mean())


def neighbors_are_numpy_s(fitted: Fitted, _: Call) -> None:
    kind, model = fitted.kind, fitted.model
    callback = NeighborMetrics(kind.gallery, kind.queries, **kind.output_only)
    callback.set_model(model)
    callback.on_train_begin()
    log: dict[str, float] = {}
    callback.on_epoch_end(0, log)
    for dim in DIMS:
        assert log[f"{kind.of_output}1nn_{dim}"] == nearest_is_right(kind, model, dim)


def cut_is_numpy_s(fitted: Fitted, _: Call) -> None:
    """Also as `at`, and in 8 bits, which leave the model itself as it was."""
    kind, model = fitted.kind, fitted.model
    for dim in DIMS[::2]:
        plain = cut(model, dim, **kind.output_only)
        expected = kind.expected_outputs(model, dim)
        assert not [own for own in plain._flatten_layers() if type(own).__module__ in OURS]
        near(plain(kind.x), expected)
    small = model.at(8) if hasattr(model, "at") else plain
    with warnings.catch_warnings():  # Keras's, of layers without kernels
        warnings.filterwarnings("ignore", "Layer .* does not have a `quantize`")
        small.quantize("int8")
    assert {layer.quantization_mode for layer in small._flatten_layers() if layer.weights} >= {
        "int8"
    }
    near(small(kind.x), expected, share=0.05)
    predictions_are_numpy_s(fitted, _)


OURS = ("keras_mrl.layers.head", "keras_mrl.models.classifier")


def parts_are_numpy_s(fitted: Fitted, _: Call) -> None:
    kind, model = fitted.kind, fitted.model
    plain = embedder(model, 4, **kind.output_only)
    near(plain(kind.one_side), unit(kind.expected_features(model)[..., :4]))
    body, head = split(model, **kind.output_only)
    assert getattr(head, "dims", None) == (None if kind.activation is None else DIMS)
    near(body(kind.one_side), kind.expected_features(model))


def served_is_numpy_s(fitted: Fitted, call: Call) -> None:
    """By the development server, of what `keras-mrl export` makes of the saved model."""
    kind, model, folder = fitted.kind, fitted.model, fitted.folder
    file, base = folder / "served.keras", folder / "served"
    model.save(file)
    words = ["export", str(file), "--base-path", str(base), *words_of(kind.output_only)]
    if kind.activation is None:
        words += ["--dims", ",".join(map(str, DIMS))]
    samples = {"sample": kind.one_side[:8], **kind.other_sample}
    for name, rows in samples.items():
        np.savez(folder / name, **(rows if isinstance(rows, dict) else {"": rows}))
        words += words_of({name: str(folder / f"{name}.npz")})
    ended = call(*words)
    if ended.status:
        raise ValueError(ended.err.partition("keras-mrl: ")[2].strip())
    assert f"on {BACKEND} ..." in ended.err
    with DevServer(base) as target:
        for of_kind in (Client, AsyncClient):
            with open_client(of_kind, target) as client:
                answers_are_numpy_s(client, kind, model)
                manifest = client.describe()
    assert manifest.made_with["trained_on"] == BACKEND
    if BACKEND == "tensorflow":
        by_function = export_saved_model(
            model,
            folder / "by_function",
            dims=DIMS,
            signatures=["embed_2"],
            warmup_batch_sizes=(),
            **samples,
            **kind.output_only,
        )
        other = Manifest.from_json((by_function / MANIFEST_FILE).read_bytes())
        assert (manifest.fingerprint, manifest.activation) == (other.fingerprint, other.activation)


def words_of(arguments: Mapping[str, str]) -> list[str]:
    return [
        word for name, value in arguments.items() for word in (f"--{name.replace('_', '-')}", value)
    ]


def answers_are_numpy_s(client: Client, kind: Kind, model: keras.Model) -> None:
    """A client is answered as Keras answers, and refused what the model has not."""
    x, features = kind.one_side, kind.expected_features(model)
    assert client.describe().activation == (kind.activation or "none")
    near(client.embed(x, 4), unit(features[:, :4]))
    if kind.other_sample:
        near(
            client.embed(kind.gallery[0], 4, other_tower=True),
            unit(kind.expected_sides(model)[1][:, :4]),
        )
    else:
        refuses(lambda: client.embed(x, 4, other_tower=True), "which has one.")
    refuses(lambda: client.classify_adaptive(x), "")
    for dim in DIMS:
        if kind.activation in (None, "none"):
            refuses(partial(client.classify, x, dim), "Only a model with ")
        if kind.activation != "none":
            refuses(partial(client.regress, x, dim), "")
        if kind.activation is None:
            continue
        outputs = kind.expected_outputs(model, dim)
        if kind.activation == "none":
            near(client.regress(x, dim), outputs)
            continue
        answer = client.classify(x, dim)
        shares = probabilities(kind, outputs)
        near(answer.probabilities, np.take_along_axis(shares, answer.class_ids, axis=1))
        np.testing.assert_array_equal(answer.class_ids[:, 0], shares.argmax(axis=1))
