"""A functional model cut into segments that run one after the other, on the layers of the model.

A segment holds what a stage needs and no earlier segment has computed. Between two segments stands
a state: all tensors that later segments read, by name, each with one row per row of the inputs. So
whoever drops rows between two segments takes the same rows of every entry. A mask of Keras is such
a tensor, too: the graph records it as an argument of the layers that read it.

Segments run the nodes of the model's graph themselves. `keras.Model(tensors, outputs)` would refuse
a tensor that passes through unchanged, and confuses a layer that is called on both sides of a cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
from keras import ops

from ._shapes import input_of

State = dict[str, Any]


@dataclass(frozen=True)
class Segment:
    """One part of a model: a function from a state to results, and to the next state.

    Attributes:
        reads: Names of the entries that it reads.
        results: Names of its results, in the order in which they were asked for.
        keeps: Names of the entries of the next state.

    Examples:
        >>> inputs = keras.Input((4,), name="x")
        >>> hidden = keras.layers.Dense(8, name="hidden")(inputs)
        >>> model = keras.Model(inputs, keras.layers.Dense(2, name="out")(hidden))
        >>> first, last = segment(model, ["hidden"]).segments
        >>> first.reads, first.results, first.keeps, last.reads
        (('x',), ('hidden',), ('hidden',), ('hidden',))
    """

    reads: tuple[str, ...]
    results: tuple[str, ...]
    keeps: tuple[str, ...]
    nodes: tuple[Any, ...] = field(repr=False)
    tensors: Mapping[str, Any] = field(repr=False)  # by name, symbolic

    def __call__(self, state: Mapping[str, Any]) -> tuple[list[Any], State]:
        """Return the results, and the state that the next segment reads."""
        values = {id(self.tensors[name]): state[name] for name in self.reads}
        for node in self.nodes:
            args, kwargs = node.arguments.fill_in(values)
            outputs = keras.tree.flatten(node.operation(*args, **kwargs))
            values |= {id(own): output for own, output in zip(node.outputs, outputs, strict=True)}
        next_state = {
            name: state[name] if name in state else values[id(self.tensors[name])]
            for name in self.keeps
        }
        return [values[id(self.tensors[name])] for name in self.results], next_state


@dataclass(frozen=True)
class Segments:
    """A model in parts.

    Attributes:
        inputs: The model's inputs, as Keras has them.
        segments: The parts, in the order in which they run.

    Examples:
        >>> inputs = keras.Input((4,), name="x")
        >>> hidden = keras.layers.Dense(8, name="hidden")(inputs)
        >>> model = keras.Model(inputs, keras.layers.Dense(2, name="out")(hidden))
        >>> parts = segment(model, ["hidden"])
        >>> x = keras.ops.ones((3, 4))
        >>> [hidden], state = parts.segments[0](parts.start(x))
        >>> [out], state = parts.segments[1]({name: rows[:2] for name, rows in state.items()})
        >>> tuple(out.shape), len(state)
        ((2, 2), 0)
    """

    inputs: Any
    segments: tuple[Segment, ...]

    def start(self, inputs: Any) -> State:
        """Return the state before the first segment.

        Args:
            inputs: What the model takes: tensors or arrays, in its structure.
        """
        if isinstance(inputs, Mapping) and not isinstance(self.inputs, Mapping):
            flat = [inputs[_name_of(own)] for own in keras.tree.flatten(self.inputs)]
        else:
            flat = keras.tree.flatten(inputs)
        state = {}
        for own, value in zip(keras.tree.flatten(self.inputs), flat, strict=True):
            state[_name_of(own)] = ops.convert_to_tensor(value, own.dtype)
        return {name: state[name] for name in self.segments[0].reads + self._carried(0)}

    def run(self, inputs: Any) -> list[list[Any]]:
        """Return the results of every segment, all rows through all of them.

        Args:
            inputs: As for `start`.
        """
        state, all_results = self.start(inputs), []
        for part in self.segments:
            results, state = part(state)
            all_results.append(results)
        return all_results

    def _carried(self, index: int) -> tuple[str, ...]:
        """Return the names that pass through a segment which does not read them."""
        part = self.segments[index]
        made = {id(output) for node in part.nodes for output in node.outputs}
        return tuple(
            name
            for name in part.keeps
            if name not in part.reads and id(part.tensors[name]) not in made
        )


def segment(backbone: keras.Model, layers: Sequence[str]) -> Segments:
    """Cut a functional model after layers.

    A cut may stand inside a block: all tensors that cross it go on.

    Args:
        backbone: A functional or sequential model, also one of keras.applications, keras-cv or
            keras-hub. Models in it are looked into.
        layers: Names of layers, from shallow to deep. Keys of a keras-hub backbone's
            `pyramid_outputs` are names, too.

    Returns:
        One segment more than there are layers. The result of each is the output of its layer, and
        those of the last are the outputs of the model.

    Raises:
        TypeError: If the model has no graph of layers.
        ValueError: If a name is not that of one layer with one output, the names do not go from
            shallow to deep, or a tensor that crosses a cut does not have one row per input row.

    Examples:
        >>> backbone = keras.Sequential(
        ...     [keras.Input((4,)), *(keras.layers.Dense(3, name=name) for name in "abc")]
        ... )
        >>> [part.results for part in segment(backbone, ["a", "b"]).segments]
        [('a',), ('b',), ('c',)]
    """
    graph = flat(backbone)
    inputs = input_of(graph)
    taps = [[tap(graph, layer)] for layer in layers]
    return segments_of(inputs, [*taps, keras.tree.flatten(graph.outputs)], [*layers, "the output"])


def segments_of(inputs: Any, stages: Sequence[Sequence[Any]], names: Sequence[str]) -> Segments:
    """Cut a graph so that every segment ends in the tensors of one stage.

    Args:
        inputs: The symbolic inputs of the graph, in any structure.
        stages: Symbolic tensors of every stage, from shallow to deep.
        names: What to call the stages in errors.

    Raises:
        ValueError: If a stage needs nothing that an earlier one does not need, or a tensor between
            two segments does not have one row per input row.
    """
    sources = keras.tree.flatten(inputs)
    done: set[int] = set()
    nodes_by_stage: list[list[Any]] = []
    for stage, name in zip(stages, names, strict=True):
        nodes = list(nodes_before(stage, sources, done))
        if not nodes:
            raise ValueError(
                "Exits go from shallow to deep, and each needs layers of its own before it. "
                f"Received: {name!r}, which is computed before {names[len(nodes_by_stage) - 1]!r} "
                "or with it. Put it earlier, or leave it out."
            )
        nodes_by_stage.append(nodes)
    named = _names(sources, nodes_by_stage)
    tensors = {name: tensor for tensor, name in named.values()}
    segments: list[Segment] = []
    later: dict[str, None] = {}  # an ordered set of names
    for nodes, stage, name in reversed(list(zip(nodes_by_stage, stages, names, strict=True))):
        made = {id(output) for node in nodes for output in node.outputs}
        needed = [*(t for node in nodes for t in node.input_tensors), *stage]
        reads = dict.fromkeys(named[id(t)][1] for t in needed if id(t) not in made)
        results = tuple(named[id(t)][1] for t in stage)
        for own in later:
            _check_rows(own, tensors[own], name)
        keeps = tuple(later)
        segments.append(Segment(tuple(reads), results, keeps, tuple(nodes), tensors))
        later = reads | {n: None for n in later if id(tensors[n]) not in made}
    crossing = dict.fromkeys(name for part in segments for name in part.keeps)
    nodes = [node for nodes in nodes_by_stage for node in nodes]
    _check_same_rows(inputs, {name: tensors[name] for name in crossing}, nodes)
    return Segments(inputs, tuple(reversed(segments)))


def _check_rows(name: str, tensor: Any, stage: str) -> None:
    """Raise unless a tensor that crosses a cut has one row per input row."""
    if tensor.shape[:1] != (None,):
        raise ValueError(
            "What crosses a cut must have one row per input row. "
            f"Received: a tensor of shape {tuple(tensor.shape)} from {name!r}, which crosses the "
            f"cut at {stage!r}. Cut before {name!r}, or leave the batch size of the inputs open."
        )


_BATCH, _OTHER = 3, 16  # sizes to try shapes with


def _check_same_rows(inputs: Any, crossing: Mapping[str, Any], nodes: Sequence[Any]) -> None:
    """Raise if a tensor that crosses a cut has other rows than the inputs, as far as shapes tell.

    Layers of Keras keep the rows. An operation such as `ops.reshape(x, (-1, 8))` need not, and the
    shape it gives, with None rows, does not say so: that of a batch of three does.
    """
    sources = {id(own) for own in keras.tree.flatten(inputs)}
    made = {name: tensor for name, tensor in crossing.items() if id(tensor) not in sources}
    if not made or all(isinstance(node.operation, keras.Layer) for node in nodes):
        return
    function = keras.Function(inputs, made)
    for other in (None, _OTHER):

        def sized(tensor: Any, other: int | None = other) -> Any:
            sizes = [other if size is None else size for size in tensor.shape[1:]]
            return keras.KerasTensor((_BATCH, *sizes), tensor.dtype)

        try:
            shapes = function.compute_output_spec(keras.tree.map_structure(sized, inputs))
        except Exception:  # a layer that takes no such size: the export compares rows
            continue
        for name, own in shapes.items():
            if own.shape[0] not in (None, _BATCH):
                raise ValueError(
                    "What crosses a cut must have one row per input row. "
                    f"Received: {name!r}, which makes {own.shape[0]} rows of {_BATCH}. "
                    "Cut before it, or keep the rows: keras.layers.Reshape leaves their axis alone."
                )


def nodes_before(tensors: Iterable[Any], sources: Sequence[Any], done: set[int]) -> Iterator[Any]:
    """Yield the nodes that compute `tensors` from `sources`, each after those it needs.

    Args:
        tensors: Symbolic tensors.
        sources: Symbolic tensors that are given.
        done: Ids of nodes not to yield; all yielded ones are added.
    """
    given = {id(tensor) for tensor in sources}
    stack = [(tensor, False) for tensor in reversed(list(tensors))]
    while stack:  # a recursion would be as deep as the model
        tensor, is_ready = stack.pop()
        if id(tensor) in given:
            continue
        node = _node_of(tensor)
        if id(node) in done:
            continue
        if is_ready:
            done.add(id(node))
            yield node
        else:
            stack.append((tensor, True))
            stack += [(own, False) for own in reversed(node.input_tensors)]


def _node_of(tensor: Any) -> Any:
    """Return the call that made a symbolic tensor."""
    operation, node_index, _ = tensor._keras_history
    return operation._inbound_nodes[node_index]


def _name_of(tensor: Any) -> str:
    """Return the name of the layer that made a tensor."""
    return str(tensor._keras_history.operation.name)


def _names(sources: Sequence[Any], nodes_by_stage: Any) -> dict[int, tuple[Any, str]]:
    """Return every tensor and a name of its own, by its id: that of its layer where it can be."""
    named = {id(tensor): (tensor, _name_of(tensor)) for tensor in sources}
    taken = {name for _, name in named.values()}
    for node in (node for nodes in nodes_by_stage for node in nodes):
        for tensor in node.outputs:
            name, number = node.operation.name, 1
            while name in taken:
                name, number = f"{node.operation.name}:{number}", number + 1
            taken.add(name)
            named[id(tensor)] = (tensor, name)
    return named


def nodes_of(graph: keras.Model) -> list[Any]:
    """Return the nodes of a functional model, each after those it needs."""
    return list(nodes_before(graph.outputs, keras.tree.flatten(graph.inputs), set()))


def tap(graph: keras.Model, layer: str) -> Any:
    """Return the symbolic output of a layer of a functional model without models in it.

    Args:
        graph: The model.
        layer: Name of the layer, or a key of `pyramid_outputs`.

    Raises:
        ValueError: If the name is not that of one layer with one output.
    """
    pyramid = getattr(graph, "pyramid_outputs", {})
    if layer in pyramid:
        return pyramid[layer]
    nodes = [node for node in nodes_of(graph) if node.operation.name == layer]
    if not nodes:
        raise ValueError(
            "An exit stands after a layer of the backbone. "
            f"Received: {layer!r}, {_place_of(graph, layer)}. "
            f"Choose one of its layers, for example {', '.join(map(repr, _examples(graph)))}."
        )
    if len(nodes) > 1 or len(nodes[0].outputs) > 1:
        count = f"{len(nodes)} calls" if len(nodes) > 1 else f"{len(nodes[0].outputs)} outputs"
        raise ValueError(
            "An exit stands after a layer that is called once and has one output. "
            f"Received: {layer!r}, which has {count}. Choose the layer after it."
        )
    return nodes[0].outputs[0]


def _place_of(graph: keras.Model, layer: str) -> str:
    """Say where a layer that cannot be tapped stands."""
    for own in graph.layers:
        if any(inner.name == layer for inner in own._flatten_layers(include_self=False)):
            return f"which stands inside {own.name!r}, and to Keras that is one layer"
    return f"which {graph.name!r} does not have"


def _examples(graph: keras.Model) -> list[str]:
    """Return the names of up to five layers, evenly spaced."""
    names = [node.operation.name for node in nodes_of(graph) if len(node.outputs) == 1][:-1]
    return names[:: max(1, len(names) // 5)][:5]


def flat(backbone: Any) -> keras.Model:
    """Return a functional model of the same layers that has no model in it.

    Args:
        backbone: A functional or sequential model; itself if there is no model in it.

    Raises:
        TypeError: If it is not a functional or sequential model with known inputs.
    """
    if not isinstance(backbone, keras.Model) or not getattr(backbone, "inputs", None):
        raise TypeError(
            "Exits need a backbone whose layers Keras knows: a functional model, or a sequential "
            f"one with an Input. Received: {type(backbone).__name__} "
            f"{getattr(backbone, 'name', backbone)!r}. Write it as keras.Model(inputs, features), "
            "with a layer for every part that an exit may follow."
        )
    if not any(_is_graph(node.operation) for node in nodes_of(backbone)):
        return backbone
    inputs = input_of(backbone)
    values = {id(own): own for own in keras.tree.flatten(inputs)}
    _replay(backbone, values)
    outputs = [values[id(own)] for own in backbone.outputs]
    structure = backbone.outputs[0] if len(outputs) == 1 else backbone.output
    return keras.Model(
        inputs,
        keras.tree.pack_sequence_as(structure, outputs) if len(outputs) > 1 else outputs[0],
        name=backbone.name,
    )


def _is_graph(operation: Any) -> bool:
    return isinstance(operation, keras.Model) and bool(getattr(operation, "inputs", None))


def _replay(graph: keras.Model, values: dict[int, Any]) -> None:
    """Call the layers of a model anew, those of models in it one by one.

    Args:
        graph: The model.
        values: The new tensor for each of its inputs, by id; all others are added.
    """
    for node in nodes_of(graph):
        args, kwargs = node.arguments.fill_in(values)
        if _is_graph(node.operation):
            inner = node.operation
            flat_args = keras.tree.flatten(args[0] if args else next(iter(kwargs.values())))
            inner_values = {
                id(own): value
                for own, value in zip(keras.tree.flatten(inner.inputs), flat_args, strict=True)
            }
            _replay(inner, inner_values)
            outputs = [inner_values[id(own)] for own in inner.outputs]
        else:
            outputs = keras.tree.flatten(node.operation(*args, **kwargs))
        values.update((id(own), new) for own, new in zip(node.outputs, outputs, strict=True))
