"""What the stages of a model with exits cost: multiply-adds and milliseconds.

Multiply-adds are counted in matrix products, convolutions and attention. A layer is opened by
calling it on symbolic tensors, so that layers of one's own, and those that are made of layers, are
counted by what they compute. Milliseconds are measured, because an exit costs time whatever its
multiply-adds are: a cascade is planned with them.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import keras
import numpy as np

from keras_mrl_serving.integers import check_positive_integer

from ..layers import MatryoshkaHead
from ._shapes import input_of
from .exits import LAST, Exits, _ModelWithExits
from .segments import flat, nodes_before, nodes_of

_UNKNOWN = 64  # steps or pixels where a model leaves the number open
_WIDE = 3  # a map with so many times the values of another is the inside of a block


@dataclass(frozen=True)
class Work:
    """Work of one part of a model on one row.

    Attributes:
        multiply_adds: In matrix products, convolutions and attention.
        milliseconds: Per row, by the size of the batch that it was measured in.

    Examples:
        >>> Work(1000, {1: 0.5}) + Work(10, {1: 0.25})
        Work(multiply_adds=1010, milliseconds={1: 0.75})
    """

    multiply_adds: int
    milliseconds: Mapping[int, float]

    def __add__(self, other: Work) -> Work:
        """Return the work of both parts."""
        times = {size: own + other.milliseconds[size] for size, own in self.milliseconds.items()}
        return Work(self.multiply_adds + other.multiply_adds, times)


@dataclass(frozen=True)
class Costs:
    """What it costs to reach the exits of a model, and to ask them.

    Attributes:
        backbone: Work of the backbone up to each exit; nothing for a model over the inputs.
        branch: Work from there to the features of the exit.
        head: Work from features to the logits of each dim.

    Examples:
        >>> once = {1: 1.0}
        >>> costs = Costs(
        ...     backbone={"early": Work(300, once), "last": Work(1000, {1: 4.0})},
        ...     branch={"early": Work(10, once), "last": Work(0, {1: 0.0})},
        ...     head={8: Work(1, once), 64: Work(8, once)},
        ... )
        >>> costs.of([("early", 8), ("last", 64)])
        [311.0, 1019.0]
        >>> costs.of([("early", 8), ("last", 64)], batch_size=1)
        [3.0, 7.0]
    """

    backbone: Mapping[str, Work]
    branch: Mapping[str, Work]
    head: Mapping[int, Work]

    @property
    def stages(self) -> list[tuple[str, int]]:
        """All pairs of an exit and a dim."""
        return list(itertools.product(self.backbone, self.head))

    def of(
        self, stages: Iterable[tuple[str | None, int]], batch_size: int | None = None
    ) -> list[float]:
        """Return what a row costs that stops at each stage of a cascade.

        It pays for the backbone up to that exit, and for all exits that it was asked at before.

        Args:
            stages: Pairs of an exit and a dim, shallow to deep; None means the last exit.
            batch_size: One that was measured, for milliseconds; None for multiply-adds.

        Raises:
            ValueError: If a stage or the batch size was not measured.
        """
        counted = [(LAST if own is None else own, dim) for own, dim in stages]
        unknown = [pair for pair in counted if pair not in self.stages]
        sizes = list(self.branch[LAST].milliseconds)
        if unknown or (batch_size is not None and batch_size not in sizes):
            raise ValueError(
                f"Costs are known of exits {tuple(self.backbone)} at dims {tuple(self.head)}, and "
                f"in batches of {sizes}. Received: stages={counted}, batch_size={batch_size}. "
                "Measure the costs of that model with that batch size."
            )
        costs: list[float] = []
        asked = 0.0
        previous = ""
        for name, dim in counted:
            parts = [self.head[dim]] if name == previous else [self.branch[name], self.head[dim]]
            asked += sum(_in_unit(part, batch_size) for part in parts)
            costs.append(_in_unit(self.backbone[name], batch_size) + asked)
            previous = name
        return costs


def count_costs(model: keras.Model, shapes: Sequence[tuple[int, ...]]) -> Costs:
    """Return the multiply-adds of the stages of a model with exits, without running anything.

    Args:
        model: A `MatryoshkaClassifier` or `MatryoshkaEncoder` with exits; the latter has no heads.
        shapes: Shapes of one row of its inputs, flat, the row included.

    Raises:
        ValueError: If the model has no exits.

    Examples:
        >>> layers = [keras.layers.Dense(16, name=name) for name in ("first", "second", "third")]
        >>> backbone = keras.Sequential([keras.Input((20,)), *layers])
        >>> model = MatryoshkaClassifier(backbone, MatryoshkaHead(10, (4, 16)), exits=["first"])
        >>> from keras_mrl.models.costs import count_costs
        >>> count_costs(model, [(1, 20)]).of([("first", 4), ("last", 16)])
        [616.0, 1288.0]
    """
    exits = model._exits_or_raise()
    inputs = keras.tree.flatten(input_of(exits.features))
    whole = {name: multiply_adds(exits.backbone(name), shapes) for name in (*exits.names, LAST)}
    before = {
        plan.name: multiply_adds(keras.Model(_unpacked(inputs), exits.taps[plan.name][0]), shapes)
        for plan in exits.plans
        if plan.layer is not None
    }
    before[LAST] = whole[LAST]
    head = getattr(model, "head", None)
    widths = {} if head is None else {dim: dim * head.num_classes for dim in head.dims or ()}
    return Costs(
        backbone={name: Work(before.get(name, 0), {}) for name in whole},
        branch={name: Work(work - before.get(name, 0), {}) for name, work in whole.items()},
        head={dim: Work(work, {}) for dim, work in widths.items()},
    )


def _in_unit(work: Work, batch_size: int | None) -> float:
    return float(work.multiply_adds if batch_size is None else work.milliseconds[batch_size])


def measure_costs(
    model: keras.Model,
    batch_sizes: Sequence[int] = (1, 8),
    sample: Any = None,
    laps: int = 10,
) -> Costs:
    """Measure what the stages of a model with exits cost on this machine and backend.

    Every part is run by `predict_on_batch`, all parts in turn, and the median of the laps counts,
    less that of a model that does nothing. A server has other times: see docs/exits.md.

    Args:
        model: A `MatryoshkaClassifier` with exits.
        batch_sizes: Rows at a time; none, to count multiply-adds alone, which runs nothing.
        sample: A few rows as `predict` takes them, needed where the model leaves a length open.
            Without them rows of zeros are run.
        laps: How often each part is run.

    Raises:
        ValueError: If the model has no exits, a length is open and there is no sample, or a size is
            no positive integer.

    Examples:
        >>> layers = [keras.layers.Dense(16, name=name) for name in ("first", "second", "third")]
        >>> backbone = keras.Sequential([keras.Input((20,)), *layers])
        >>> model = MatryoshkaClassifier(backbone, MatryoshkaHead(10, (4, 16)), exits=["first"])
        >>> costs = measure_costs(model, batch_sizes=(1,), laps=1)
        >>> costs.of([("first", 4), ("last", 16)])
        [616.0, 1288.0]
    """
    exits = model._exits_or_raise() if isinstance(model, _ModelWithExits) else None
    head = getattr(model, "head", None)
    if exits is None or head is None:
        raise ValueError(
            "Costs are those of the stages of a MatryoshkaClassifier with exits. "
            f"Received: {type(model).__name__} {model.name!r}. "
            "Write MatryoshkaClassifier(..., exits=('conv4_block6_out',))."
        )
    remedy = "Give for example batch_sizes=(1, 8)."
    sizes = [check_positive_integer("batch_sizes", own, remedy) for own in batch_sizes]
    laps = check_positive_integer("laps", laps, "Give for example 10.")
    rows = _rows(exits.features, sample)
    if not sizes:
        return count_costs(model, _shapes(rows))
    parts = _parts(exits, head, rows)
    counts = {key: multiply_adds(part, _shapes(x)) for key, (part, x) in parts.items()}
    times = {size: _times(parts, size, laps) for size in sizes}

    def work(*key: Any) -> Work:
        return Work(counts.get(key, 0), {size: times[size].get(key, 0.0) for size in sizes})

    names = (*exits.names, LAST)
    return Costs(
        backbone={name: work("backbone", name) for name in names},
        branch={name: work("branch", name) for name in names},
        head={dim: work("head", dim) for dim in head.dims},
    )


def _rows(model: keras.Model, sample: Any) -> list[Any]:
    """Return one row for every input: that of the sample, or zeros."""
    inputs = keras.tree.flatten(input_of(model))
    if sample is not None:
        if isinstance(sample, Mapping):
            sample = [sample[own.name] for own in inputs]
        return [np.asarray(own)[:1] for own in keras.tree.flatten(sample)]
    unknown = [own.name for own in inputs if None in own.shape[1:] or own.dtype == "string"]
    if unknown:
        raise ValueError(
            "Costs depend on the length of the rows. "
            f"Received: sample=None for a model whose inputs {unknown} have no fixed length. "
            "Give sample=, a few real rows as predict takes them."
        )
    return [np.zeros((1, *own.shape[1:]), own.dtype) for own in inputs]


Parts = dict[tuple[Any, ...], tuple[keras.Model, list[Any]]]


def _parts(exits: Exits, head: MatryoshkaHead, rows: list[Any]) -> Parts:
    """Return every part that is measured, and one row of its inputs."""
    features = exits.features
    inputs = keras.tree.flatten(input_of(features))
    given = {id(own): row for own, row in zip(inputs, rows, strict=True)}
    whole = keras.Model(_unpacked(inputs), features.output[LAST])
    parts: Parts = {("backbone", LAST): (whole, rows)}
    for plan in exits.plans:
        taps, read = exits.taps[plan.name], rows
        if plan.layer is not None:
            before = keras.Model(_unpacked(inputs), taps[0])
            parts["backbone", plan.name] = before, rows
            tapped = np.asarray(before.predict_on_batch(_unpacked(rows)))
            read = [tapped, *(given[id(own)] for own in taps[1:])]
        branch = keras.Model(_unpacked(taps), features.output[plan.name])
        parts["branch", plan.name] = branch, read
    for dim in head.dims or ():
        prefix = keras.Input((dim,))
        x = [np.zeros((1, dim), "float32")]
        parts["head", dim] = keras.Model(prefix, head.logits_at(prefix, dim)), x
    return parts


def _unpacked(several: list[Any]) -> Any:
    return several[0] if len(several) == 1 else several


def _shapes(arrays: list[Any]) -> list[tuple[int, ...]]:
    return [tuple(array.shape) for array in arrays]


def _times(parts: Parts, size: int, laps: int) -> dict[tuple[Any, ...], float]:
    """Return the milliseconds per row of every part, in batches of `size`."""
    nothing = keras.Input((1,))
    idle = keras.Model(nothing, nothing + 1)
    runs = {**parts, ("idle",): (idle, [np.zeros((1, 1), "float32")])}
    inputs = {
        key: _unpacked([np.repeat(array, size, axis=0) for array in x])
        for key, (_, x) in runs.items()
    }
    taken: dict[tuple[Any, ...], list[float]] = {key: [] for key in runs}
    for lap in range(laps + 1):  # the first compiles
        for key, (part, _) in runs.items():
            start = time.perf_counter()
            part.predict_on_batch(inputs[key])
            if lap:
                taken[key].append(time.perf_counter() - start)
    medians = {key: statistics.median(own) for key, own in taken.items()}
    return {key: max(0.0, own - medians["idle",]) * 1000 / size for key, own in medians.items()}


def suggest_exits(backbone: keras.Model, n: int) -> dict[str, float]:
    """Return layers of a functional model where exits cut its work into about equal parts.

    Of layers with about as much work before them, those come first after which the fewest tensors
    go on, and no more than three times as many values as after the best: these are ends of blocks,
    and not the wide insides of those of MobileNetV2 or EfficientNet. Then the one behind
    normalization and activation.

    Args:
        backbone: A functional or sequential model.
        n: How many; two or three are enough, more overfit the holdout.

    Returns:
        The share of the backbone's multiply-adds before each layer, by its name. Lengths that the
        model leaves open count as 64. The names are what `exits=` takes: the dict itself, too.

    Raises:
        TypeError: If the model has no graph of layers.
        ValueError: If it has too few layers, or `n` is no positive integer.

    Examples:
        >>> layers = [keras.layers.Dense(8, name=name) for name in "abcd"]
        >>> suggest_exits(keras.Sequential([keras.Input((8,)), *layers]), 1)
        {'b': 0.5}
    """
    n = check_positive_integer("n", n, "Give for example 2.")
    graph = flat(backbone)
    nodes = nodes_of(graph)
    inputs = keras.tree.flatten(graph.inputs)
    shapes = [(1, *(own or _UNKNOWN for own in tensor.shape[1:])) for tensor in inputs]
    counts = _counts(graph, nodes, shapes)
    total = max(1, sum(counts.values()))
    candidates = []
    ends = {id(tensor) for tensor in graph.outputs}
    names = [node.operation.name for node in nodes]
    for index, node in enumerate(nodes):
        tensor = node.outputs[0]
        can_leave = len(node.outputs) == 1 and len(tensor.shape) in (2, 3, 4, 5)
        if not can_leave or id(tensor) in ends or names.count(node.operation.name) > 1:
            continue
        done: set[int] = set()
        share = sum(counts[id(own)] for own in nodes_before([tensor], inputs, done)) / total
        made = {id(own) for other in nodes if id(other) in done for own in other.outputs}
        crossing = {
            id(own): prod(length or _UNKNOWN for length in own.shape[1:])
            for other in nodes
            if id(other) not in done
            for own in other.input_tensors
            if id(own) in made
        }
        place = (len(crossing), sum(crossing.values()), index)
        candidates.append((share, place, node.operation.name))
    chosen: dict[str, float] = {}
    for number in range(1, n + 1):
        target, reach = number / (n + 1), 0.5 / (n + 1)
        near = [own for own in candidates if abs(own[0] - target) <= reach and 0 < own[0] < 1]
        if near:
            tensors, values, _ = min(place for _, place, _ in near)
            narrow = [own for own in near if own[1][:2] <= (tensors, _WIDE * values)]
            best = min(narrow, key=lambda own: (round(abs(own[0] - target), 6), -own[1][2]))
            chosen[best[2]] = round(best[0], 4)
    if len(chosen) < n:
        raise ValueError(
            f"A backbone needs layers between its parts to be left at {n} places. "
            f"Received: {graph.name!r}, with {len(chosen)} such places: {chosen}. "
            "Give a smaller n, or name layers yourself."
        )
    return chosen


def multiply_adds(model: keras.Model, shapes: Sequence[tuple[int, ...]]) -> int:
    """Return the multiply-adds of a functional model on inputs of these shapes.

    Args:
        model: A functional or sequential model.
        shapes: Shapes of its inputs with the rows, flat.

    Examples:
        >>> from keras_mrl.models.costs import multiply_adds
        >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3)])
        >>> multiply_adds(model, [(1, 8, 8, 3)]) == 6 * 6 * 4 * 3 * 3 * 3
        True
    """
    graph = flat(model)
    return sum(_counts(graph, nodes_of(graph), shapes).values())


def _counts(
    graph: keras.Model, nodes: Sequence[Any], shapes: Sequence[tuple[int, ...]]
) -> dict[int, int]:
    """Return the multiply-adds of every node by its id."""
    inputs = keras.tree.flatten(graph.inputs)
    values = {
        id(own): keras.KerasTensor(shape, own.dtype)
        for own, shape in zip(inputs, shapes, strict=True)
    }
    counts = {}
    for node in nodes:
        args, kwargs = node.arguments.fill_in(values)
        steps = _steps(args, kwargs)
        outputs = [
            keras.KerasTensor(_sizes(own, steps), own.dtype)
            for own in keras.tree.flatten(node.operation.compute_output_spec(*args, **kwargs))
        ]
        values.update((id(own), new) for own, new in zip(node.outputs, outputs, strict=True))
        counts[id(node)] = _count(node.operation, args, kwargs, outputs, steps)
    return counts


def _steps(args: Any, kwargs: Any) -> int:
    """Return how many steps of time the first tensor has."""
    shape = next(iter(_tensors(args, kwargs))).shape
    return int(shape[1]) if len(shape) > 2 and shape[1] else _UNKNOWN


def _tensors(args: Any, kwargs: Any) -> list[Any]:
    flat = keras.tree.flatten((args, kwargs))
    return [own for own in flat if isinstance(own, keras.KerasTensor)]


def _sizes(tensor: Any, steps: int) -> tuple[int, ...]:
    """Return a shape for one row: some layers of Keras forget the lengths they are called with."""
    unknown = [1, *[steps] * len(tensor.shape)]
    return tuple(own or other for own, other in zip(tensor.shape, unknown, strict=False))


def _count(operation: Any, args: Any, kwargs: Any, outputs: list[Any], steps: int) -> int:
    """Return the multiply-adds of one call; `steps` stands for lengths that are not known."""
    if not isinstance(operation, keras.layers.Layer):
        rule = _RULES.get(type(operation).__name__)
        operands = [own for own in keras.tree.flatten(args) if hasattr(own, "shape")]
        shapes = [_sizes(own, steps) for own in operands]
        return 0 if rule is None else int(rule(operation, shapes, _sizes(outputs[0], steps)))
    matrices = [weight for weight in operation.weights if len(weight.shape) > 1]
    kernels = [weight.shape for weight in matrices if "bias" not in weight.name]
    is_made_of_layers = len(operation._flatten_layers()) > 1
    if not kernels and not is_made_of_layers and not isinstance(operation, _WITHOUT_KERNELS):
        return 0
    tensors = _tensors(args, kwargs)
    try:
        made = keras.tree.flatten(operation.call(*args, **kwargs))
        inner = list(nodes_before(made, tensors, set()))
    except Exception:  # a layer that computes by more than keras.ops, such as a recurrent one
        if "Embedding" in type(operation).__name__:
            return 0
        shape, own = _sizes(tensors[0], steps), _sizes(outputs[0], steps)
        places = prod((own if len(own) == len(shape) else shape)[1:-1])
        return sum(prod(kernel) for kernel in kernels) * places
    return sum(
        _count(node.operation, node.arguments.args, node.arguments.kwargs, node.outputs, steps)
        for node in inner
    )


_WITHOUT_KERNELS = (keras.layers.Dot, keras.layers.Attention)


# Rules: from the operation, the shapes of its operands and that of its result.
def _einsum(operation: Any, shapes: Any, shape: Any) -> int:
    """Count an einsum: every combination of its labels is one multiply-add."""
    del shape
    sizes: dict[str, int] = {}
    rest = 1
    terms = operation.subscripts.replace(" ", "").split("->")[0].split(",")
    for term, dims in zip(terms, shapes, strict=True):
        front, dots, back = term.partition("...")
        sizes |= dict(zip(front, dims, strict=False))
        sizes |= dict(zip(back, dims[len(dims) - len(back) :], strict=True))
        if dots:
            rest = max(rest, prod(dims[len(front) : len(dims) - len(back)]))
    return prod(sizes.values()) * rest


def _separable(_: Any, shapes: Any, shape: Any) -> int:
    return prod(shape[:-1]) * (prod(shapes[1]) + prod(shapes[2]))


_RULES: dict[str, Any] = {
    "Matmul": lambda _, shapes, shape: prod(shape) * shapes[0][-1],
    "Einsum": _einsum,
    "Conv": lambda _, shapes, shape: prod(shape) * prod(shapes[1][:-1]),
    "DepthwiseConv": lambda _, shapes, shape: prod(shape) * prod(shapes[1][:-2]),
    "SeparableConv": _separable,
    "ConvTranspose": lambda _, shapes, __: prod(shapes[0][:-1]) * prod(shapes[1]),
    # Scores and sums over (batch, steps, heads, width).
    "DotProductAttention": lambda _, shapes, shape: 2 * prod(shape) * shapes[1][1],
}
