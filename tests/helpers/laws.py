"""What holds of every Keras class and of every nested loss: each law once, for tables of examples.

`tests/keras_mrl/test_laws.py` holds the tables and fails if a public class is in none.
"""

import importlib
import inspect
import json
import os
import pkgutil
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import pytest

Array = npt.NDArray[Any]

KERAS_KINDS = (
    keras.layers.Layer,
    keras.losses.Loss,
    keras.metrics.Metric,
    keras.callbacks.Callback,
    keras.optimizers.Optimizer,
    keras.initializers.Initializer,
    keras.regularizers.Regularizer,
)


def exactly(text: str) -> str:
    """A pattern for `pytest.raises(match=...)` that only the whole of `text` matches."""
    return rf"\A{re.escape(text)}\Z"


def on_backends(*names: str) -> pytest.MarkDecorator:
    """For a test that costs much and whose rule the other backends need not show again."""
    return pytest.mark.skipif(
        keras.backend.backend() not in names, reason=f"runs on {' and '.join(names)} alone"
    )


@contextmanager
def compiled_without_cpp() -> Iterator[None]:
    """PyTorch's compiler traces and differentiates steps, and makes no C++ of them.

    That takes half a minute a step. `make soak` makes it.
    """
    if keras.backend.backend() != "torch" or os.environ.get("KERAS_MRL_SOAK"):
        yield
        return
    config = importlib.import_module("torch._dynamo.config")
    with config.patch(debug_backend_override=">=0:aot_eager"):
        yield


def public_keras_classes(package: ModuleType) -> set[type]:
    """Every Keras class of its own among the public names of a package and its modules."""
    modules = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    names = [info.name for info in modules if "._" not in info.name]
    return {
        value
        for module in (package, *map(importlib.import_module, names))
        for name, value in vars(module).items()
        if isinstance(value, type)
        and issubclass(value, KERAS_KINDS)
        and value.__module__.startswith(package.__name__)
        and not name.startswith("_")
    }


@dataclass(frozen=True, kw_only=True)
class Wrong:
    """Arguments a class must refuse, and the whole sentence of its error."""

    make: Callable[[], object]
    error: type[Exception]
    sentence: str


@dataclass(frozen=True, kw_only=True)
class Example:
    """One object of a public Keras class, and a compiled model that puts it to work.

    `inputs` are what the object itself is called on; a metric is called on nothing. `roundings` is
    how many of them low precision may add up: more where many layers follow each other.
    """

    make: Callable[[], Any]
    model: Callable[[Any], keras.Model]
    x: Array
    y: Array
    inputs: tuple[Array, ...]
    wrong: tuple[Wrong, ...]
    roundings: int = 4

    def build(self) -> keras.Model:
        """The model around a new object, no weight of it zero."""
        model = self.model(self.make())
        model(self.x)
        random = np.random.default_rng(0)
        model.set_weights([random.normal(0, 0.5, w.shape) for w in model.get_weights()])
        return model


def outputs(model: keras.Model, example: Example) -> dict[str, Array]:
    """The model's output, and the loss and metrics if they are the example."""
    values = {"output": as_float(model(example.x))}
    if not isinstance(example.make(), keras.layers.Layer):
        scores = model.evaluate(example.x, example.y, verbose=0, return_dict=True)
        values |= {name: np.asarray(score) for name, score in scores.items()}
    return values


def as_float(tensor: Any) -> Array:
    return np.asarray(keras.ops.convert_to_numpy(keras.ops.cast(tensor, "float32")))


def config_is_json_and_round_trips(example: Example) -> None:
    made = example.make()
    text = json.dumps(made.get_config())
    again = type(made).from_config(json.loads(text))
    assert json.loads(json.dumps(again.get_config())) == json.loads(text)


def every_argument_is_stored_under_its_name(example: Example) -> None:
    made = example.make()
    signature = inspect.signature(type(made))
    names = {n for n, p in signature.parameters.items() if p.kind is not p.VAR_KEYWORD}
    assert names
    assert names <= set(made.get_config())
    assert [name for name in names if not hasattr(made, name)] == []


def save_and_load_keep_outputs(example: Example, path: Path) -> None:
    model = example.build()
    model.save(path)
    loaded = keras.saving.load_model(path)
    expected, received = outputs(model, example), outputs(loaded, example)
    assert expected.keys() == received.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(received[name], value, rtol=1e-6, atol=1e-6, err_msg=name)


def symbolic_shape_is_eager_shape(example: Example) -> None:
    made = example.make()
    call = made.call if isinstance(made, keras.losses.Loss) else made
    symbolic = call(*(keras.Input(i.shape[1:], dtype=i.dtype.name) for i in example.inputs))
    eager = call(*map(keras.ops.convert_to_tensor, example.inputs))
    assert eager.shape[0] == len(example.x)
    assert tuple(symbolic.shape) == (None, *eager.shape[1:])
    if isinstance(made, keras.layers.Layer):
        computed = made.compute_output_shape((None, *example.inputs[0].shape[1:]))
        assert tuple(computed) == tuple(symbolic.shape)


def one_fit_step_moves_every_trainable_weight(example: Example) -> None:
    model = example.build()
    before = {w.path: as_float(w) for w in model.trainable_weights}
    assert before
    model.fit(example.x, example.y, batch_size=len(example.x), verbose=0)
    after = {w.path: as_float(w) for w in model.trainable_weights}
    assert [path for path, value in before.items() if np.array_equal(value, after[path])] == []
    assert [path for path, value in after.items() if not np.isfinite(value).all()] == []


def low_precision_agrees(example: Example) -> None:
    """To a few roundings of bfloat16, in units of the largest number."""
    with policy("mixed_bfloat16"):
        low = example.build()
        received = outputs(low, example)
    expected = outputs(example.build(), example)
    assert not np.array_equal(received["output"], expected["output"])  # else nothing was tested
    for name, value in expected.items():
        budget = example.roundings * 2**-8 * np.abs(value).max()
        np.testing.assert_allclose(received[name], value, rtol=0, atol=budget, err_msg=name)


@contextmanager
def policy(name: str) -> Iterator[None]:
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def bad_arguments_raise(example: Example) -> None:
    assert example.wrong
    for wrong in example.wrong:
        with pytest.raises(wrong.error, match=exactly(wrong.sentence)):
            wrong.make()


@dataclass(frozen=True, kw_only=True)
class NestedLoss:
    """A nested loss around `inner`; `make` takes the weights. Logits of shape (batch, 3, ...)."""

    make: Callable[[Sequence[float] | None], keras.losses.Loss]
    inner: keras.losses.Loss
    labels: Array
    logits: Array

    def loss(self, weights: Sequence[float] | None, dims: Sequence[int] = (0, 1, 2)) -> Array:
        return as_float(self.make(weights)(self.labels, self.logits[:, list(dims)]))

    def inner_loss(self) -> Array:
        return as_float(self.inner(self.labels, self.logits[:, 2]))


@dataclass(frozen=True, kw_only=True)
class NestedEmbeddingLoss:
    """A nested loss on embeddings of width 8; `plain` is the loss of unit vectors at one dim."""

    make_at: Callable[[Sequence[float] | None, Sequence[int]], keras.losses.Loss]
    plain: Callable[[Array, Array], Array]
    labels: Array
    logits: Array  # the embeddings, under the name they have in the laws of both kinds

    def make(self, weights: Sequence[float] | None) -> keras.losses.Loss:
        return self.make_at(weights, (2, 4, 8))

    def loss(self, weights: Sequence[float] | None, dims: Sequence[int] = (0, 1, 2)) -> Array:
        chosen = [(2, 4, 8)[m] for m in dims]
        return as_float(self.make_at(weights, chosen)(self.labels, self.logits))

    def inner_loss(self) -> Array:
        lengths = np.linalg.norm(self.logits, axis=-1, keepdims=True)
        return self.plain(self.labels, self.logits / lengths)


def weight_zero_is_absence(nested: NestedLoss) -> None:
    broken = nested.logits.copy()
    broken[:, 1] = np.nan  # not even what is not a number may reach the sum
    received = as_float(nested.make((2.0, 0.0, 0.5))(nested.labels, broken))
    np.testing.assert_allclose(received, nested.loss((2.0, 0.5), dims=(0, 2)), rtol=1e-6)


def weight_zero_beyond_is_absence(nested: NestedEmbeddingLoss) -> None:
    broken = nested.logits.copy()
    broken[..., 4:] = np.nan  # as above: in no dim of positive weight
    received = as_float(nested.make((2.0, 0.5, 0.0))(nested.labels, broken))
    np.testing.assert_allclose(received, nested.loss((2.0, 0.5), dims=(0, 1)), rtol=1e-6)
    inside = nested.loss((2.0, 0.0, 0.5))
    np.testing.assert_allclose(inside, nested.loss((2.0, 0.5), dims=(0, 2)), rtol=1e-6)


def weights_add(nested: NestedLoss | NestedEmbeddingLoss) -> None:
    parts = nested.loss((2.0, 0.0, 0.25)) + nested.loss((1.0, 3.0, 0.5))
    np.testing.assert_allclose(nested.loss((3.0, 3.0, 0.75)), parts, rtol=1e-5)


def no_weights_are_ones(nested: NestedLoss | NestedEmbeddingLoss) -> None:
    np.testing.assert_array_equal(nested.loss(None), nested.loss((1.0, 1.0, 1.0)))


def one_dim_is_the_inner_loss(nested: NestedLoss | NestedEmbeddingLoss) -> None:
    inner = nested.inner_loss()
    assert inner > 0
    np.testing.assert_allclose(nested.loss(None, dims=(2,)), inner, rtol=1e-6)


def permuting_the_batch_permutes_the_result(nested: NestedLoss | NestedEmbeddingLoss) -> None:
    order = np.random.default_rng(0).permutation(len(nested.labels))
    call = nested.make((2.0, 1.0, 0.5)).call
    rows = call(*map(keras.ops.convert_to_tensor, (nested.labels, nested.logits)))
    moved = call(*map(keras.ops.convert_to_tensor, (nested.labels[order], nested.logits[order])))
    assert rows.shape[0] == len(order)
    assert len(np.unique(as_float(rows))) > len(order) // 2
    np.testing.assert_allclose(as_float(moved), as_float(rows)[order], rtol=1e-6)


def nothing_is_learnt_beyond_the_widest_dim(nested: NestedLoss, head: keras.layers.Layer) -> None:
    """`head` has three dims, the widest 4, and reads features of width 8."""
    _learns_four_of_eight(nested.make(None), head, nested.labels, (5,))


def nothing_is_learnt_beyond_the_widest_prefix(nested: NestedEmbeddingLoss) -> None:
    shape = (*nested.logits.shape[1:-1], 5)
    _learns_four_of_eight(nested.make_at(None, (1, 2, 4)), None, nested.labels, shape)


def _learns_four_of_eight(
    loss: keras.losses.Loss, head: keras.layers.Layer | None, labels: Array, shape: tuple[int, ...]
) -> None:
    inputs = keras.Input(shape)
    features = keras.layers.Dense(8, name="features")(inputs)
    model = keras.Model(inputs, features if head is None else head(features))
    model.compile(keras.optimizers.SGD(1.0), loss)
    before = [as_float(w) for w in model.get_layer("features").weights]
    x = np.random.default_rng(0).normal(size=(len(labels), *shape))
    model.fit(x, labels, batch_size=len(x), verbose=0)
    after = [as_float(w) for w in model.get_layer("features").weights]
    for was, now in zip(before, after, strict=True):
        assert (now[..., :4] != was[..., :4]).all()
        np.testing.assert_array_equal(now[..., 4:], was[..., 4:])
