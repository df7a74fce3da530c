"""Exits: earlier layers of a backbone that each have a nested head, and cheap models before it.

`Exits` is what a `MatryoshkaClassifier` or a `MatryoshkaEncoder` knows of its exits: one functional
model from the inputs to the features of all of them, on the backbone's own layers. Their heads and
losses belong to the models.

A branch is made of layers of Keras that stand in the backbone's graph, not of a layer of ours, so
that a model cut at an exit loads without keras_mrl.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import keras

from .._masks import mask_of
from ._shapes import _NestedModel, input_of
from .segments import Segments, flat, segments_of, tap

LAST = "last"
_TIME_MASKS = ("padding_mask", "attention_mask")


@dataclass(frozen=True)
class ExitPlan:
    """Where an exit stands, as the caller gave it.

    Attributes:
        layer: Name of the layer it follows; None for a model over the inputs.
        branch: The caller's layer from there to features; None for pooling and a dense layer.

    Examples:
        >>> from keras_mrl.models.exits import ExitPlan
        >>> ExitPlan("conv4_block6_out", None).name
        'conv4_block6_out'
    """

    layer: str | None
    branch: keras.layers.Layer | None

    @property
    def name(self) -> str:
        """The name of the exit."""
        return self.layer if self.layer is not None else str(getattr(self.branch, "name", ""))


def exit_plans(exits: Any) -> tuple[ExitPlan, ...]:
    """Return the exits that a model is given, checked as far as they can be without a backbone.

    Raises:
        TypeError: If an entry is no layer's name, pair of a name and a layer, or Keras model.
        ValueError: If two have one name, one is named as the last exit is, or a model over the
            inputs stands behind an exit of the backbone.
    """
    if isinstance(exits, Mapping):  # to branches, or to the shares of `suggest_exits`
        exits = [name if isinstance(own, Real) else (name, own) for name, own in exits.items()]
    if isinstance(exits, (str, keras.layers.Layer)) or not isinstance(exits, Sequence):
        raise TypeError(
            "exits must be a sequence of names of layers. "
            f"Received: exits={exits!r}. Write exits=('conv4_block6_out',) for one."
        )
    plans = tuple(map(_plan_of, exits))
    names = [plan.name for plan in plans]
    if len(set(names)) < len(names) or LAST in names:
        raise ValueError(
            f"Exits need names of their own, and {LAST!r} is that of the head. "
            f"Received: exits named {names}. Leave repeats out, or rename a layer."
        )
    is_front = [plan.layer is None for plan in plans]
    if is_front != sorted(is_front, reverse=True):
        raise ValueError(
            "A model over the inputs stands before the exits of the backbone. "
            f"Received: exits={names}. Put {names[len(names) - 1 - is_front[::-1].index(True)]!r} "
            "first."
        )
    return plans


def _plan_of(entry: Any) -> ExitPlan:
    if isinstance(entry, ExitPlan):
        return entry
    if isinstance(entry, str):
        return ExitPlan(entry, None)
    if isinstance(entry, keras.layers.Layer):
        return ExitPlan(None, entry)
    if isinstance(entry, (tuple, list)) and len(entry) == 2:
        layer, branch = entry
        if isinstance(layer, str) and isinstance(branch, keras.layers.Layer):
            return ExitPlan(layer, branch)
    raise TypeError(
        "An exit is the name of a layer, a pair of a name and a Keras layer from there to "
        f"features, or a Keras model over the inputs. Received: {entry!r}. "
        "Write for example exits=('conv3_block4_out', 'conv4_block6_out')."
    )


def plans_config(plans: Sequence[ExitPlan]) -> list[dict[str, Any]]:
    """Return exits as JSON."""
    return [
        {"layer": plan.layer, "branch": keras.saving.serialize_keras_object(plan.branch)}
        for plan in plans
    ]


def plans_from_config(config: Any, custom_objects: Any = None) -> tuple[ExitPlan, ...]:
    """Return the exits that `plans_config` wrote."""
    return tuple(
        ExitPlan(
            entry["layer"],
            keras.saving.deserialize_keras_object(entry["branch"], custom_objects),
        )
        for entry in config or ()
    )


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Return names for the log by the names of layers, without the words that all of these share.

    Examples:
        >>> from keras_mrl.models.exits import short_names
        >>> short_names(["conv3_block4_out", "conv4_block6_out"])
        {'conv3_block4_out': 'conv3_block4', 'conv4_block6_out': 'conv4_block6'}
        >>> short_names(["transformer_layer_0", "transformer_layer_3"])
        {'transformer_layer_0': 'layer_0', 'transformer_layer_3': 'layer_3'}
    """
    words = {name: re.split(r"[_/.:]", name) for name in names}
    most = min((len(own) for own in words.values()), default=1) - 1
    start = end = 0
    if len(words) > 1:
        start = _shared([own[:most] for own in words.values()])
        end = _shared([own[start:][::-1][: most - start] for own in words.values()])
    short = {name: "_".join(own[start : len(own) - end]) for name, own in words.items()}
    if any(not own[:1].isalpha() for own in short.values()):  # accuracy_0_64 would have two numbers
        start = max(0, start - 1)
        short = {name: "_".join(own[start : len(own) - end]) for name, own in words.items()}
    are_good = len(set(short.values())) == len(short) and all(short.values())
    return short if are_good and LAST not in short.values() else {name: name for name in names}


def _shared(sequences: Sequence[Sequence[str]]) -> int:
    """Return how many first words all sequences share."""
    number = 0
    for words in zip(*sequences, strict=False):
        if len(set(words)) > 1:
            break
        number += 1
    return number


@dataclass(frozen=True)
class Exits:
    """The exits of a model. Keras does not track this object, so its models are no weights anew.

    Attributes:
        plans: Where the exits stand.
        features: A model from the inputs to `{exit: features}`, the last exit under `"last"`.
        taps: What each branch reads: tensors of that model's graph.
        layers: The layers of the branches that are not the backbone's, to be tracked.
    """

    plans: tuple[ExitPlan, ...]
    features: keras.Model
    taps: dict[str, list[Any]]
    layers: list[keras.layers.Layer] = field(default_factory=list)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the exits before the last, shallow to deep."""
        return tuple(plan.name for plan in self.plans)

    @property
    def short_names(self) -> dict[str, str]:
        """The names of the exits in the log."""
        own = short_names([plan.name for plan in self.plans if plan.layer is not None])
        return {name: own.get(name, name) for name in self.names}

    def check(self, name: str) -> str:
        """Return the name of an exit.

        Raises:
            ValueError: If there is no such exit.
        """
        if name not in (*self.names, LAST):
            raise ValueError(
                "exit must be one of the model's exits. "
                f"Received: exit={name!r} for exits={(*self.names, LAST)}. Choose one of those."
            )
        return name

    def checked(self, inputs: Any) -> Any:
        """Return inputs of the model.

        Raises:
            ValueError: If they are a dict with a key that names no input: Keras would give the
                arrays to the inputs in the order of the keys.
        """
        names = [own.name for own in keras.tree.flatten(self.features.input)]
        if isinstance(self.features.input, Mapping):
            names = [*self.features.input]
        unknown = [key for key in inputs if key not in names] if isinstance(inputs, Mapping) else []
        if unknown:
            raise ValueError(
                "A dict of inputs has the keys that a model with exits names its inputs by. "
                f"Received: {', '.join(map(repr, unknown))} beside inputs named "
                f"{', '.join(map(repr, names))}. Leave such keys out."
            )
        return inputs

    def backbone(self, name: str) -> keras.Model:
        """Return the part of the backbone before an exit, with its branch: inputs to features."""
        return keras.Model(
            self.features.input, self.features.output[self.check(name)], name=f"{name}_features"
        )

    def segments(self, names: Sequence[str] | None = None) -> Segments:
        """Return the model in parts, one per exit; the result of each is the exit's features.

        Args:
            names: Some exits, shallow to deep: nothing is computed of the others. None means all.
        """
        names = (*self.names, LAST) if names is None else names
        stages = self.features.output
        return segments_of(
            self.features.input, [[stages[self.check(name)]] for name in names], names
        )


def make_exits(
    plans: tuple[ExitPlan, ...],
    backbone: keras.layers.Layer,
    pooling: keras.layers.Layer | None,
    width: int,
) -> Exits:
    """Make the branches of exits on the backbone's own graph.

    Args:
        plans: Where the exits stand.
        backbone: A functional or sequential model.
        pooling: What follows it before the head.
        width: How many features a branch gives.

    Raises:
        TypeError: If Keras does not know the layers of the backbone.
        ValueError: If a layer is not there, exits do not go from shallow to deep, or a branch does
            not end in `(batch, features)` that are at least as wide.
    """
    graph = flat(backbone)
    short = short_names([plan.name for plan in plans if plan.layer is not None])
    features, taps, layers = {}, {}, []
    for plan in plans:
        name = plan.name
        read = input_of(graph) if plan.layer is None else tap(graph, plan.layer)
        taps[name] = keras.tree.flatten(read)
        mask = None if plan.layer is None else _time_mask(read, graph)
        if plan.branch is not None and "mask" not in inspect.signature(plan.branch.call).parameters:
            mask = None
        taps[name] += [] if mask is None else [mask]
        if plan.branch is not None:
            layer, made = plan.branch, _called(plan.branch, read, mask, name)
        else:
            layer = keras.layers.Dense(width, name=f"{short[name]}_exit")
            made = layer(_pooled(read, mask, name, f"{short[name]}_exit_pooling"))
        _check_branch(plan, tuple(made.shape), width)
        features[name] = made
        layers.append(layer)
    output = graph.outputs[0] if isinstance(graph, keras.Sequential) else graph.output
    features[LAST] = output if pooling is None else pooling(output)
    model = keras.Model(input_of(graph), features, name=f"{backbone.name}_exits")
    exits = Exits(plans, model, taps, layers)
    exits.segments()  # refuses exits that are not in order
    return exits


def _called(branch: Any, tensors: Any, mask: Any, name: str) -> Any:
    """Return the output of the caller's branch, which is told the steps that count."""
    try:
        if mask is None:
            return branch(tensors)
        if isinstance(branch, keras.Sequential):
            return _masked(branch, tensors, mask)([tensors, mask])
        return branch(tensors, mask=mask)
    except Exception as error:
        shapes = keras.tree.map_structure(lambda own: tuple(own.shape), tensors)
        raise ValueError(
            f"The layer of the exit {name!r} must take what stands before it, {shapes}. "
            f"Received: {type(error).__name__}: {error} Give a layer for such inputs."
        ) from error


def _masked(branch: keras.Sequential, tensor: Any, mask: Any) -> keras.Model:
    """Return a model of the branch's layers that takes the mask as an input.

    Keras warns of every mask that a sequential model is given, as it makes none of its own.
    """
    inputs = [keras.Input(own.shape[1:], dtype=own.dtype) for own in (tensor, mask)]
    x, steps = inputs[0], inputs[1]
    for layer in branch.layers:
        takes_mask = "mask" in inspect.signature(layer.call).parameters
        x = layer(x, mask=steps) if takes_mask and len(x.shape) == 3 else layer(x)
    return keras.Model(inputs, x, name=branch.name)


def _pooled(tensor: Any, mask: Any, layer: str, name: str) -> Any:
    """Return the mean of a tensor over space, or over the steps that count: `(batch, features)`."""
    rank = len(tensor.shape)
    if rank == 2:
        return tensor
    if rank == 3:
        mean = keras.layers.GlobalAveragePooling1D(name=name)
        mask = getattr(tensor, "_keras_mask", None) if mask is None else mask
        if mask is None:
            return mean(tensor)
        # Of a row of padding alone all steps count: 0/0 would make all weights NaN.
        counts = keras.ops.cast(mask, "bool")
        is_empty = keras.ops.logical_not(keras.ops.any(counts, axis=1, keepdims=True))
        return mean(tensor, mask=keras.ops.logical_or(counts, is_empty))
    if rank in (4, 5):
        layers = keras.layers
        mean = layers.GlobalAveragePooling2D if rank == 4 else layers.GlobalAveragePooling3D
        return mean(name=name)(tensor)
    raise ValueError(
        "An exit pools features (batch, width), (batch, time, width) or (batch, ..., width) of two "
        f"or three axes of space. Received: {layer!r}, whose output is {tuple(tensor.shape)}. "
        f"Give a layer that makes features of it: exits=(({layer!r}, my_layer),)."
    )


def _time_mask(tensor: Any, graph: keras.Model) -> Any:
    """Return the input that says which steps count; None if Keras carries it, or all steps count.

    keras-hub's text backbones take it as an input, and put no mask on their tensors.
    """
    if len(tensor.shape) != 3 or mask_of(tensor) is not None:
        return None
    for own in keras.tree.flatten(graph.inputs):
        if own.name in _TIME_MASKS and own.shape[1:] == tensor.shape[1:2]:
            return own
    return None


def _check_branch(plan: ExitPlan, shape: tuple[int | None, ...], width: int) -> None:
    if len(shape) != 2 or shape[1] is None or shape[1] < width:
        raise ValueError(
            f"The layer of an exit must end in features (batch, {width}) or wider. "
            f"Received: {plan.name!r}, which gives {shape}. "
            f"End it in keras.layers.Dense({width})."
        )


@keras.saving.register_keras_serializable(package="keras_mrl")
class _AllExits(keras.Model):
    """A functional model that answers `{exit: outputs}`, as `all_exits()` makes it."""

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """As `predict` of every Keras model, with the exits from shallow to deep."""
        # On JAX and PyTorch, Keras returns a dict in the order of the alphabet.
        outputs = super().predict(*args, **kwargs)
        return {name: outputs[name] for name in self.output}


class _ModelWithExits(_NestedModel):
    """The base of models that may have exits."""

    def _take_exits(self, exits: Any) -> None:
        """Store the caller's exits, in the constructor."""
        self._exit_plans = exit_plans(exits or ())
        self.exits = tuple(plan.name for plan in self._exit_plans)
        self._exits: Exits | None = None
        # What Keras tracks and saves of the exits.
        self.exit_layers: list[keras.layers.Layer] = []
        # A count and not a flag: replicas take turns within a step.
        self._steps = 0

    def _make_exits(
        self, backbone: keras.layers.Layer, pooling: keras.layers.Layer | None, width: int
    ) -> None:
        """Make the branches, in `build`."""
        self._exits = make_exits(self._exit_plans, backbone, pooling, width)
        self.exit_layers = self._exits.layers

    def _exits_or_raise(self) -> Exits:
        if self._exits is None:
            kind = type(self).__name__
            raise ValueError(
                f"A {kind} has the exits that it was made with. "
                f"Received: {self.name!r}, which was made without any. "
                f"Write {kind}(..., exits=('conv4_block6_out',))."
            )
        return self._exits

    @property
    def _has_own_steps(self) -> bool:
        """Whether `call` answers otherwise within a step than outside."""
        raise NotImplementedError

    def train_step(self, *args: Any, **kwargs: Any) -> Any:
        """Train on one batch, as Keras does on this backend."""
        with self._step():
            return super().train_step(*args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate one batch, as Keras does on this backend."""
        with self._step():
            return super().test_step(*args, **kwargs)

    @contextlib.contextmanager
    def _step(self) -> Iterator[None]:
        counted = self._has_own_steps
        self._steps += counted
        try:
            yield
        finally:
            self._steps -= counted

    def segments(self, exits: Sequence[str] | None = None) -> Segments:
        """Return the model in parts, one per exit; the result of each is the exit's features.

        Args:
            exits: Some exits, shallow to deep: nothing is computed of the others. None means all.

        Raises:
            ValueError: If the model has no exits, or none of such a name.
        """
        return self._exits_or_raise().segments(exits)

    @property
    def exit_places(self) -> dict[str, str | None]:
        """The layer that each exit follows, by its name; None of a model over the inputs."""
        return {plan.name: plan.layer for plan in self._exit_plans}
