"""The exits of a model, read before an export: what they are called, cost, and give for the sample.

Also a row that goes through all exits that a cascade asks. Without one, neither the comparison with
the Keras model nor the warm-up of a server would touch the deep part of the graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from keras_mrl import MatryoshkaClassifier, MatryoshkaEncoder
from keras_mrl.models.costs import Costs, count_costs
from keras_mrl.models.outputs import is_plain_nested
from keras_mrl_serving import contract
from keras_mrl_serving.cascade.policy import CascadePolicy
from keras_mrl_serving.cascade.stages import LAST_EXIT, StageKey

from .job import DeepRow, ExitJob, ExportError, terms_of
from .sample import Sample, outputs_of, row_shapes

Array = npt.NDArray[Any]
Parts = Mapping[str, tuple[keras.Model, Any]]  # of each exit, its backbone and its head


def exits_of(model: keras.Model) -> tuple[str, ...]:
    """Return the names of a model's exits, the last included; none of a model without exits.

    Raises:
        ValueError: If the exits are those of a model within the model, or a name of one could not
            stand in the name of a signature.
    """
    for own in model._flatten_layers():
        if isinstance(own, (MatryoshkaClassifier, MatryoshkaEncoder)) and own.exits:
            if own is not model or not is_plain_nested(model):
                raise ValueError(_not_its_own(model, own))
    names = tuple(getattr(model, "exits", ()) if is_plain_nested(model) else ())
    for name in names:
        if not contract.is_exit_name(name):
            raise ValueError(
                "The name of an exit is a part of names of signatures: of letters, digits, '_', "
                "'.' and '-', not of digits alone, not 'other' and not 'adaptive'. "
                f"Received: exit {name!r} of {model.name!r}. Give its layer another name."
            )
    return (*names, LAST_EXIT) if names else ()


def _not_its_own(model: keras.Model, own: Any) -> str:
    is_encoder = isinstance(own, MatryoshkaEncoder)
    kind = "MatryoshkaEncoder" if is_encoder else "MatryoshkaClassifier"
    part = "split(model)[0]" if is_encoder else "*split(model)"
    return (
        "Exits are exported of the very model that has them, with a call of its own. "
        f"Received: {type(model).__name__} {model.name!r}, and in it {kind} {own.name!r} with "
        f"exits={own.exits}. Put what comes before it into its backbone, or leave its exits out: "
        f"{kind}({part})."
    )


def check_exits_of_policy(policy: CascadePolicy | None, exits: Sequence[str]) -> None:
    """Raise `ValueError` unless a policy asks exits of the model, from shallow to deep."""
    if policy is None:
        return
    asked = list(dict.fromkeys(exit or LAST_EXIT for exit, _ in policy.keys))
    known = [name for name in exits or (LAST_EXIT,) if name in asked]
    if known != asked:
        has = f"a model with the exits {tuple(exits)}" if exits else "a model without exits"
        raise ValueError(
            "A cascade over exits asks exits of the model, from shallow to deep. "
            f"Received: a policy over {tuple(asked)} for {has}. Learn it on the logits of this "
            "model: CascadePolicy.learn(model.all_exits().predict(x), labels, dims)."
        )


def check_costs(costs: Any, names: Sequence[str], dims: Sequence[int]) -> None:
    """Raise unless costs are those of the exits and dims that are exported.

    Raises:
        TypeError: If they are no `Costs`.
        ValueError: If they are those of other exits or dims.
    """
    if costs is None:
        return
    if not isinstance(costs, Costs):
        raise TypeError(
            f"costs must be what measure_costs returns. Received: {type(costs).__name__}. "
            "Give costs=measure_costs(model)."
        )
    if tuple(costs.backbone) != tuple(names) or not {*dims} <= {*costs.head}:
        raise ValueError(
            "costs must be of the exits and dims that are exported. "
            f"Received: costs of exits {tuple(costs.backbone)} at dims {tuple(costs.head)}, for "
            f"exits {tuple(names)} and dims {tuple(dims)}. Give costs=measure_costs(model)."
        )


def exit_signatures(
    signatures: Sequence[str], exits: Sequence[str], dims: tuple[int, ...]
) -> dict[str, tuple[str, int]]:
    """Return exit and dim of those signatures that are of an exit before the last."""
    named = {
        name_of(dim, exit): (exit, dim)
        for exit in exits[:-1]
        for name_of in (contract.embed, contract.classify, contract.regress)
        for dim in dims
    }
    return {name: named[name] for name in signatures if name in named}


def read_exits(
    model: Any,
    names: Sequence[str],
    sample: Sample,
    dims: Sequence[int],
    costs: Costs | None,
    of_values: bool,
) -> tuple[ExitJob, ...]:
    """Return what is exported of each exit.

    Args:
        model: The model as it is exported.
        names: Its exits, the last included; none of a model without exits.
        sample: The caller's rows.
        dims: The dims that are exported.
        costs: Measured costs; None counts multiply-adds alone.
        of_values: Whether the outputs of heads are no logits of a softmax.
    """
    if not names:
        return ()
    counted = count_costs(model, row_shapes(model.parts()[0], sample.rows))
    jobs = []
    for name in names:
        backbone, head = model.parts(name)
        features = outputs_of(backbone, sample.rows)
        parameters = backbone.count_params()
        logits = None
        multiply_adds = float((counted.backbone[name] + counted.branch[name]).multiply_adds)
        milliseconds = None
        if head is not None:
            columns = [head.index_of(dim) for dim in dims]
            logits = outputs_of(head, features)[:, columns]
            parameters += (dims[-1] + head.use_bias) * head.num_classes
            [multiply_adds] = counted.of([(name, dims[-1])])
        if costs is not None and (sizes := [*costs.branch[name].milliseconds]):
            by_row = {size: costs.of([(name, dims[-1])], size)[0] for size in sizes}
            milliseconds = {size: time * size for size, time in by_row.items()}
        jobs.append(
            ExitJob(
                name=name,
                layer=model.exit_places.get(name),
                parameters=int(parameters),
                multiply_adds=multiply_adds,
                milliseconds=milliseconds,
                features=features[:, : dims[-1]],
                logits=logits,
                terms=terms_of(head, features, dims) if of_values and head is not None else None,
            )
        )
    return tuple(jobs)


def relative_costs(
    model: keras.Model, policy: CascadePolicy | None, sample: Sample, costs: Costs | None
) -> tuple[float, ...] | None:
    """Return what a row costs that leaves at each stage of a policy over exits.

    Args:
        model: The model.
        policy: A policy; None, or one over dims alone, has no such costs.
        sample: The caller's rows, of which multiply-adds are counted.
        costs: Measured costs, of which the milliseconds of the smallest batch count.

    Returns:
        A share of what a row costs that goes straight to the last stage.
    """
    if policy is None or not policy.has_exits:
        return None
    sizes = [] if costs is None else [*costs.branch[LAST_EXIT].milliseconds]
    if costs is None or not sizes:
        counted = count_costs(model, row_shapes(model.parts()[0], sample.rows))
        of_stages, [straight] = counted.of(policy.keys), counted.of(policy.keys[-1:])
    else:
        of_stages = costs.of(policy.keys, min(sizes))
        [straight] = costs.of(policy.keys[-1:], min(sizes))
    return tuple(cost / straight for cost in of_stages) if straight else None


def find_deep_row(
    model: Any, policy: CascadePolicy | None, exits: Sequence[ExitJob], sample: Sample, dims: Any
) -> DeepRow | None:
    """Return a row that goes through all exits that a policy asks; None if none is found.

    The first such row of the sample; or else one that is made of them, such as the mean of two, for
    which early exits are seldom sure.

    Args:
        model: The model.
        policy: A policy; None, or one over dims alone, asks one exit.
        exits: The exits, with their logits for the sample.
        sample: The caller's rows.
        dims: The dims of those logits.
    """
    if policy is None or not policy.has_exits:
        return None

    def by_stage(by_exit: Mapping[str, Any]) -> dict[StageKey, Array]:
        return {
            (exit, dim): by_exit[exit or LAST_EXIT][:, dims.index(dim)] for exit, dim in policy.keys
        }

    asked = {exit or LAST_EXIT for exit, _ in policy.keys}
    logits = by_stage({own.name: own.logits for own in exits})
    row = _deep(policy, logits)
    if row is not None:
        served = {name: array[row : row + 1] for name, array in sample.served.items()}
        return DeepRow(sample=served, logits=_at(logits, row))
    for rows in _made_rows(sample):
        try:
            logits = by_stage({name: _logits(model, name, rows, dims) for name in asked})
        except (ValueError, ExportError):  # no row that the model takes
            continue
        row = _deep(policy, logits)
        if row is not None:
            arrays = rows if isinstance(rows, Mapping) else {"": rows}
            served = {sample.names[key]: own[row : row + 1] for key, own in arrays.items()}
            return DeepRow(sample=served, logits=_at(logits, row))
    return None


def _deep(policy: CascadePolicy, logits: Mapping[StageKey, Array]) -> int | None:
    _, stage_of = policy.route(logits)
    rows = np.flatnonzero(stage_of == len(policy.stages) - 1)
    return int(rows[0]) if len(rows) else None


def _at(logits: Mapping[StageKey, Array], row: int) -> dict[StageKey, Array]:
    return {key: array[row : row + 1] for key, array in logits.items()}


def _logits(model: Any, name: str, rows: Any, dims: Sequence[int]) -> Array:
    backbone, head = model.parts(name)
    logits: Array = outputs_of(head, outputs_of(backbone, rows))
    return logits[:, [head.index_of(dim) for dim in dims]]


def _made_rows(sample: Sample) -> Iterator[Any]:
    """Yield rows made of the sample's, in its structure: means of two, mixtures, noise, zeros."""
    if sample.served.keys() != {sample.names[key] for key in sample.names} or _is_decoded(sample):
        return
    rng = np.random.default_rng(0)
    for make in (_means, _mixtures, _noise, _zeros):
        yield keras.tree.map_structure(lambda array, make=make: make(array, rng), sample.rows)


def _is_decoded(sample: Sample) -> bool:
    """Whether clients send something else than the model takes: images or texts."""
    rows = sample.rows.values() if isinstance(sample.rows, Mapping) else [sample.rows]
    return sample.text is not None or any(
        own.dtype != served.dtype or own.shape != served.shape
        for own, served in zip(rows, sample.served.values(), strict=True)
    )


def _means(array: Array, rng: np.random.Generator) -> Array:
    del rng
    if array.dtype.kind != "f":
        return array[::-1]
    return ((array + np.roll(array, 1, axis=0)) / 2).astype(array.dtype)


def _mixtures(array: Array, rng: np.random.Generator) -> Array:
    del rng
    middle = array.shape[-1] // 2 if array.ndim > 1 else 0
    return np.concatenate([array[..., :middle], np.roll(array, 1, axis=0)[..., middle:]], axis=-1)


def _noise(array: Array, rng: np.random.Generator) -> Array:
    if array.dtype.kind == "f":
        return rng.normal(array.mean(), array.std(), array.shape).astype(array.dtype)
    return rng.permuted(array, axis=None) if array.dtype.kind in "biu" else array


def _zeros(array: Array, rng: np.random.Generator) -> Array:
    del rng
    return np.zeros_like(array) if array.dtype.kind in "fbiu" else array
