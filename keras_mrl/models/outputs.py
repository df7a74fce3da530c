"""The outputs of a model, and the nested head at the end of each: the one place every room asks.

A head ends a `MatryoshkaClassifier`, a functional or sequential model, one of these inside another
model, or the `call` of a class of the user's. But for the first, the answer is read from Keras's
graph: what comes out of a head comes out of the model. A model or a layer that stands in the graph
as one step is looked into by running its `call` on symbolic tensors, and a class of the user's by
running its `call` on symbolic inputs. So nothing that comes before the head is overlooked, and what
comes after it is refused by name: logits cut, judged and served would not be the model's own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import keras

from ..layers import MatryoshkaHead
from ._shapes import _NestedModel, input_of, inputs_like


def one_output(model: keras.Model, output: str | None) -> keras.Model:
    """Return a model of one output of `model`, with its own layers and the loss of that output.

    It is `model` itself if that has no other output.

    Raises:
        ValueError: If `output` is not one of its outputs, or is left out where there are several
            with a nested head among them.
    """
    if is_plain_nested(model) or (output is None and not holds_head(model)):
        check_output(model, output, [])
        return model
    inputs, tensors = graph_of(model)
    name = check_output(model, output, list(tensors))
    if len(tensors) == 1:
        return model
    view = keras.Model(inputs, tensors[name], name=f"{model.name}_{name}")
    loss = getattr(model, "loss", None)
    if isinstance(loss, (list, tuple)):
        loss = dict(zip(tensors, loss, strict=False))
    if isinstance(loss, dict):
        loss = loss.get(name)
    if loss is not None:  # which says what the outputs are
        view.compile(loss=loss)
    return view


def is_plain_nested(model: keras.Model) -> bool:
    """Whether the parts of one of our own models say all that its `call` does."""
    if not isinstance(model, _NestedModel):
        return False
    owners = type(model).__mro__
    own_call = next(n for n, owner in enumerate(owners) if "call" in vars(owner))
    return own_call >= next(n for n, owner in enumerate(owners) if "parts" in vars(owner))


def holds_head(layer: Any) -> bool:
    """Whether a nested head is `layer` or within it."""
    layers = layer._flatten_layers() if isinstance(layer, keras.layers.Layer) else ()
    return any(isinstance(own, MatryoshkaHead) for own in layers)


def graph_of(model: keras.Model) -> tuple[Any, dict[str, Any]]:
    """Return the symbolic inputs of a built model, and its symbolic outputs by name.

    Names are those that Keras's log has: keys of a dict, or names of the last layers. Their order
    is the one in which Keras takes a list of losses.

    Raises:
        ValueError: If the model has not been built, its `call` cannot be run on symbolic inputs,
            it keeps weights outside of layers, or two outputs have one name.
    """
    if not model.built:
        raise not_built_error(model)
    recorded = getattr(model, "outputs", None) or ()
    is_sequential = isinstance(model, keras.Sequential)
    if not recorded or _has_own_call(model) or (is_sequential and len(recorded) > 1):
        inputs, outputs = _graph_of_call(model)
    else:
        inputs, outputs = input_of(model), recorded[0] if is_sequential else model.output
    flat = keras.tree.flatten(outputs)
    if isinstance(outputs, dict) and len(outputs) == len(flat):
        in_order = keras.tree.flatten({key: key for key in outputs})  # as a list of losses goes
        return inputs, {key: outputs[key] for key in in_order}
    names = [tensor._keras_history.operation.name for tensor in flat]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(
            "Outputs of a model with a nested head must have names of their own. "
            f"Received: {model.name!r}, whose outputs are {names}. Name them by a dict: "
            "keras.Model(model.input, dict(zip(('one', 'other'), model.outputs)))."
        )
    return inputs, dict(zip(names, flat, strict=True))


def _has_own_call(model: keras.Model) -> bool:
    owner = next(owner for owner in type(model).__mro__ if "call" in vars(owner))
    return not owner.__module__.startswith("keras.")


def _has_own_weights(layer: keras.layers.Layer) -> bool:
    return bool(layer._trainable_variables or layer._non_trainable_variables)


def _graph_of_call(model: keras.Model) -> tuple[Any, Any]:
    """Run the `call` of a class of the user's on symbolic inputs."""
    reason = None
    if _has_own_weights(model):
        reason = "which keeps weights outside of layers"
    try:
        inputs = inputs_like(model)
        outputs = model.call(inputs)
    except Exception as error:  # whatever the user's code raises
        reason = f"whose call raised {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if reason is not None:
        raise ValueError(
            "The head of a class of your own is found by its call on symbolic inputs. "
            f"Received: {type(model).__name__} {model.name!r}, {reason}. Use layers and keras.ops "
            "there, or join its parts: MatryoshkaClassifier(backbone, head)."
        )
    return inputs, outputs


def head_at(model: keras.Model, tensor: Any) -> tuple[Any, MatryoshkaHead] | None:
    """Return the features that the head at the end of an output reads, and the head.

    Returns:
        None if no head comes before `tensor`.

    Raises:
        ValueError: If a head comes before, but not at the end.
    """
    end = _end(tensor)
    if end is None:
        for operation, place, before in _steps_before(tensor):
            if _end(before) is not None:
                raise _not_at_the_end_error(model, operation, place)
            if holds_head(operation):
                raise _not_at_the_end_error(model, operation, None)
    return end


def _end(tensor: Any) -> tuple[Any, MatryoshkaHead] | None:
    operation, node_index, tensor_index = tensor._keras_history
    if not holds_head(operation):
        return None
    arguments = operation._inbound_nodes[node_index].arguments
    if isinstance(operation, MatryoshkaHead):
        return arguments.keras_tensors[0], operation
    if _has_own_weights(operation):  # which a graph would hold as constants
        return None
    try:
        outputs = operation.call(*arguments.args, **arguments.kwargs)
    except Exception:  # of the user's code: it stays one step
        return None
    return _end(keras.tree.flatten(outputs)[tensor_index])


def _steps_before(tensor: Any) -> Iterator[tuple[Any, int, Any]]:
    """Yield each operation that leads to `tensor`, the last first, with its inputs by place."""
    waiting, visited = [tensor], set()
    while waiting:
        operation, node_index, _ = waiting.pop(0)._keras_history
        if (id(operation), node_index) in visited:
            continue
        visited.add((id(operation), node_index))
        inputs = operation._inbound_nodes[node_index].input_tensors
        yield from ((operation, place, before) for place, before in enumerate(inputs))
        waiting += inputs


def _not_at_the_end_error(model: keras.Model, operation: Any, place: int | None) -> ValueError:
    """Say what comes after the head, and the line that leaves it out.

    Args:
        model: The model that was given.
        operation: What comes after the head, or what holds the head and does not end in it.
        place: Which input of `operation` is the logits; None if it holds the head.
    """
    received = f"{type(model).__name__} {model.name!r}, where {operation.name!r} "
    received += "does not end in its head" if place is None else "comes after the head"
    remedy = "Let that return what the head returns, and no more"
    is_sequential = isinstance(model, keras.Sequential)
    operations = model.layers if is_sequential else getattr(model, "operations", [])
    if place is not None and operation in operations:
        if isinstance(operation, keras.layers.Layer):
            step = f"model.get_layer({operation.name!r})"
        else:
            step = f"model.operations[{operations.index(operation)}]"
        inputs = "model.inputs[0]" if is_sequential else "model.input"
        several = len(operation._inbound_nodes[0].input_tensors) > 1
        logits = f"{step}.input[{place}]" if several else f"{step}.input"
        remedy = f"Leave it out: model = keras.Model({inputs}, {logits})"
    elif place is not None:
        remedy = "Let the model return what the head returns, and no more"
    return ValueError(
        "A nested model ends in its MatryoshkaHead, whose logits are cut, judged and served. "
        f"Received: {received}. {remedy}."
    )


def check_output(model: keras.Model, output: str | None, names: list[str]) -> str:
    """Return which output is meant, or raise `ValueError`."""
    if output is None and len(names) <= 1:
        return names[0] if names else ""
    if output in names:
        return output
    received = f"no output for {model.name!r}" if output is None else f"output={output!r}"
    if not names:
        rule, remedy = "output names one of several outputs", "Leave it out"
        received += f" for {type(model).__name__} {model.name!r}, which has one"
    else:
        rule = "output must name one of the outputs of the model"
        received += f", which has {', '.join(map(repr, names))}"
        remedy = f"Give for example output={names[0]!r}"
    raise ValueError(f"{rule}. Received: {received}. {remedy}.")


def not_built_error(model: keras.Model) -> ValueError:
    """The error of a model whose shapes are not known yet."""
    return ValueError(
        "A model must be built before a part of it is taken. "
        f"Received: {model.name!r}, which has no weights yet. Call it on a batch or train it."
    )
