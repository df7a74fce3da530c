"""The calls of flows that answer with classes: of one dim, by the model's cascade, by the caller's.

Of a cascade some rows may be audited: run to its last stage as well. They are drawn before either
answer is known, by whoever makes the flow.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from . import contract
from .calls import Arrays, Output
from .cascade.confidence import confidence_in, softmax
from .cascade.policy import CascadePolicy, check_no_exits
from .contract import Manifest
from .errors import InvalidInputError, ManifestError
from .flows import Flow, ask, check_finite_rows, check_lengths
from .inputs import Inputs, check_inputs
from .results import NOT_AUDITED, Classification

_LARGEST_COST = 1e6  # of a row, in rows that go straight to the last stage

Bools = npt.NDArray[np.bool]


def classify(
    manifest: Manifest, inputs: Inputs, dim: int, exit: str | None = None
) -> Flow[Classification]:
    """Ask for the classes of one dim, at an exit or at the last.

    Examples:
        >>> image = {"dtype": "float32", "shape": [None, 3]}
        >>> manifest = Manifest(name="birds", kind="classifier", fingerprint="5e1f", dims=(8, 64),
        ...     width=64, inputs={"image": image}, made_with={}, num_classes=200)
        >>> next(classify(manifest, [[0, 127, 255]], 64)).signature
        'classify_64'
    """
    manifest.check_head()
    dim, exit = manifest.check_dim(dim), manifest.check_exit(exit)
    arrays = check_inputs(manifest.inputs, inputs)
    signature = contract.classify(dim, exit)
    answer = yield from ask(signature, arrays, _class_outputs(manifest))
    _check_classes(manifest, signature, answer)
    answer["dim"] = np.full(len(answer["confidence"]), dim, np.int32)
    return _classification(answer | _at_exit(manifest, exit, len(answer["dim"])))


def classify_adaptive(
    manifest: Manifest, inputs: Inputs, audited: Bools | None = None
) -> Flow[Classification]:
    """Ask for the classes by the model's own policy: one call, the cascade in the graph.

    Audited rows that left early are sent once more, to the last stage alone.

    Args:
        manifest: Manifest of the model.
        inputs: The rows.
        audited: Which of them to run to the end as well, `(rows,)`; None for none.

    Examples:
        >>> policy = CascadePolicy((Stage(8, 0.9), Stage(64, None)))
        >>> image = {"dtype": "float32", "shape": [None, 3]}
        >>> manifest = Manifest(name="birds", kind="classifier", fingerprint="5e1f", dims=(8, 64),
        ...     width=64, inputs={"image": image}, made_with={}, num_classes=200,
        ...     cascade=policy.to_json())
        >>> next(classify_adaptive(manifest, [[0, 127, 255]])).signature
        'classify_adaptive'
    """
    manifest.check_cascade()
    _check_stages(manifest)
    arrays = check_inputs(manifest.inputs, inputs)
    outputs = {**_class_outputs(manifest), "dim": Output("int32")}
    if manifest.exit_cascade is not None:
        outputs["exit"] = Output("int32")
    answer = yield from ask(contract.CLASSIFY_ADAPTIVE, arrays, outputs)
    _check_classes(manifest, contract.CLASSIFY_ADAPTIVE, answer)
    stage_of = _stage_of(manifest, answer)
    if audited is not None:
        *_, (exit, dim, _) = stages = _stages(manifest)
        early = np.flatnonzero(audited & (stage_of < len(stages) - 1))
        rows = {name: array[early] for name, array in arrays.items()}
        signature = contract.classify(dim, exit)
        full = yield from _full_class_ids(manifest, signature, rows, len(early))
        answer["full_class_ids"] = _with_full(answer["class_ids"][:, 0], audited, early, full)
    return _classification(answer | _at_stages(manifest, stage_of))


def _check_stages(manifest: Manifest) -> None:
    """Raise `ManifestError` unless a model's cascade is one, with costs that can be.

    A model whose cascade a client does not understand is still embedded by it.
    """
    cascade = manifest.adaptive_cascade or {}
    CascadePolicy.from_json(cascade)
    costs = [stage["relative_cost"] for stage in _entries(manifest) if "relative_cost" in stage]
    for cost in costs:
        is_number = isinstance(cost, int | float) and not isinstance(cost, bool)
        if not is_number or not 0 <= cost <= _LARGEST_COST:
            raise ManifestError(
                "What a row costs is a share of the last stage's cost, a number of at least 0. "
                f"Received: relative_cost={cost!r} in the manifest of {manifest.name!r}. "
                "Export the model again with keras_mrl_export.export_saved_model."
            )


def _entries(manifest: Manifest) -> Any:
    cascade = manifest.adaptive_cascade or {}
    return cascade.get("exit_stages", cascade.get("stages", []))


def _stages(manifest: Manifest) -> list[tuple[str, int, float | None]]:
    """Return exit, dim and relative cost of each stage of a model's cascade."""
    named = [(stage.get("exit") or contract.LAST_EXIT, stage) for stage in _entries(manifest)]
    return [
        (exit, stage["dim"], stage.get("relative_cost", exit_share(manifest, exit)))
        for exit, stage in named
    ]


def _stage_of(manifest: Manifest, answer: Arrays) -> npt.NDArray[np.int64]:
    """Return the stage that decided each row; raise `ManifestError` if the cascade has none such.

    Args:
        manifest: Of a model with a cascade.
        answer: `dim` of each row, and `exit` where the cascade has exits, as the server has them.
    """
    names, has_exits = manifest.exit_names, manifest.exit_cascade is not None
    stages = [(names.index(exit) if has_exits else None, dim) for exit, dim, _ in _stages(manifest)]
    decided_at = np.full(len(answer["dim"]), -1)
    for index, (place, dim) in enumerate(stages):
        is_here = answer["dim"] == dim
        decided_at[is_here if place is None else is_here & (answer["exit"] == place)] = index
    unknown = np.flatnonzero(decided_at < 0)
    if len(unknown):
        row = unknown[0]
        asked = ", ".join(
            f"{dim}" if place is None else f"{place} ({names[place]}) at {dim}"
            for place, dim in stages
        )
        received = f"exit {answer['exit'][row]} at dim" if has_exits else "dim"
        raise ManifestError(
            "A row is decided at one of the stages of the model's cascade, "
            f"{'exit' if has_exits else 'dim'} {asked}. "
            f"Received: {received} {answer['dim'][row]} in row {row}. "
            "Export the model again with keras_mrl_export.export_saved_model."
        )
    return decided_at


def _at_stages(manifest: Manifest, stage_of: npt.NDArray[np.int64]) -> dict[str, Any]:
    """Return the exit of each row by name, and its cost if it is known of every stage.

    Of a model without exits it is nothing.
    """
    if manifest.exits is None:
        return {}
    exits, _, costs = zip(*_stages(manifest), strict=True)
    columns = {"exit": np.array(exits, object)[stage_of]}
    if None not in costs:
        columns["relative_cost"] = _as_float32(costs)[stage_of]
    return columns


def _at_exit(manifest: Manifest, exit: str, num_rows: int) -> dict[str, Any]:
    """Return the same for rows that went straight to one exit."""
    if manifest.exits is None:
        return {}
    columns: dict[str, Any] = {"exit": np.full(num_rows, exit, object)}
    share = exit_share(manifest, exit)
    if share is not None:
        columns["relative_cost"] = np.repeat(_as_float32([share]), num_rows)
    return columns


def _as_float32(costs: Any) -> npt.NDArray[np.float32]:
    with np.errstate(over="ignore"):  # whatever a manifest says
        return np.array(costs, np.float64).astype(np.float32)


def exit_share(manifest: Manifest, exit: str) -> float | None:
    """Return what a row costs that goes straight to an exit, as a share of one to the last.

    It is of milliseconds, of the smallest batch that was measured at both; else of multiply-adds.

    Args:
        manifest: Manifest of the model.
        exit: Name of the exit.

    Returns:
        None where neither is known.

    Examples:
        >>> image = {"dtype": "float32", "shape": [None, 3]}
        >>> exits = ({"name": "early", "multiply_adds": 250}, {"name": "last",
        ...     "multiply_adds": 1000})
        >>> manifest = Manifest(name="birds", kind="classifier", fingerprint="5e1f", dims=(8, 64),
        ...     width=64, inputs={"image": image}, made_with={}, num_classes=200, exits=exits)
        >>> exit_share(manifest, "early")
        0.25
    """
    if not manifest.exits:
        return None
    by_name = {own["name"]: own for own in manifest.exits}
    one, last = by_name[exit], by_name[contract.LAST_EXIT]
    times, full_times = one.get("milliseconds") or {}, last.get("milliseconds") or {}
    sizes = sorted(times.keys() & full_times.keys(), key=lambda size: (len(size), size))
    costs = [(times[size], full_times[size]) for size in sizes]
    costs.append((one.get("multiply_adds"), last.get("multiply_adds")))
    cost, full = costs[0]
    return cost / full if cost is not None and full else None


def _full_class_ids(
    manifest: Manifest, signature: str, inputs: Arrays, num_rows: int
) -> Flow[npt.NDArray[np.int64]]:
    """Ask a signature for the best class of each row; of no rows, nothing is asked."""
    if not num_rows:
        return np.empty(0, np.int64)
    class_ids = {"class_ids": Output("int64", manifest.top_k)}
    answer = yield from ask(signature, inputs, class_ids, only=True)
    _check_classes(manifest, signature, answer)
    best: npt.NDArray[np.int64] = answer["class_ids"][:, 0]
    return best


def _with_full(
    adaptive: npt.NDArray[np.int64],
    audited: Bools,
    early: npt.NDArray[np.int64],
    full: npt.NDArray[np.int64],
) -> npt.NDArray[np.int64]:
    """Return the class by the last stage of each audited row, -1 of the others.

    A row that the last stage decided has been there.

    Args:
        adaptive: The class by the cascade of all rows.
        audited: Which rows are audited.
        early: Numbers of the audited rows that left before the last stage.
        full: Their classes by the last stage.
    """
    class_ids = np.where(audited, adaptive, NOT_AUDITED)
    class_ids[early] = full
    return class_ids


def classify_by(
    manifest: Manifest, inputs: Inputs, policy: CascadePolicy, audited: Bools | None = None
) -> Flow[Classification]:
    """Ask for the classes by the caller's policy: features once, then heads for undecided rows.

    Audited rows that left early have their features read by the last head as well.

    Args:
        manifest: Manifest of the model.
        inputs: The rows.
        policy: The policy.
        audited: Which rows to run to the end as well, `(rows,)`; None for none.

    Examples:
        >>> policy = CascadePolicy((Stage(8, 0.9), Stage(64, None)))
        >>> image = {"dtype": "float32", "shape": [None, 3]}
        >>> manifest = Manifest(name="birds", kind="classifier", fingerprint="5e1f", dims=(8, 64),
        ...     width=64, inputs={"image": image}, made_with={}, num_classes=200)
        >>> flow = classify_by(manifest, [[0, 127, 255]], policy)
        >>> next(flow).signature
        'features'
        >>> flow.send({"features": np.ones((1, 64), np.float32)}).signature
        'head_8'
    """
    manifest.check_one_class()
    if not isinstance(policy, CascadePolicy):
        raise InvalidInputError(
            f"policy must be a CascadePolicy. Received: {type(policy).__name__}. Learn one with "
            "CascadePolicy.learn, or read a manifest's with CascadePolicy.from_json."
        )
    check_no_exits(
        policy,
        "A caller's policy",
        "The server runs a backbone to its end, so such a policy has to be the model's own: "
        "give it to export_saved_model, or to publish_policy.",
        InvalidInputError,
    )
    for stage in policy.stages:
        manifest.check_dim(stage.dim)
    arrays = check_inputs(manifest.inputs, inputs)
    wide = {"features": Output("float32", manifest.width)}
    answer = yield from ask(contract.FEATURES, arrays, wide)
    features = answer["features"]
    undecided = np.arange(len(features))  # rows that no stage has decided yet
    outputs = _class_outputs(manifest) | {"logits": Output("float32", manifest.num_classes)}
    del outputs["probabilities"], outputs["confidence"]  # the stage's temperature changes them
    decided: list[tuple[npt.NDArray[Any], dict[str, npt.NDArray[Any]]]] = []
    for stage in policy.stages:
        prefix = {"features": features[undecided, : stage.dim]}
        answer = yield from ask(contract.head(stage.dim), prefix, outputs, only=True)
        _check_classes(manifest, contract.head(stage.dim), answer)
        with np.errstate(over="ignore"):  # a difference beyond float32 is a probability of 0
            probabilities = softmax(answer["logits"], stage.temperature)
        confidence = confidence_in(policy.confidence, probabilities)
        sure = (
            np.ones(len(undecided), dtype=bool)
            if stage.threshold is None
            else confidence > np.float32(stage.threshold)
        )
        columns = {
            "class_ids": answer["class_ids"],
            "probabilities": np.take_along_axis(probabilities, answer["class_ids"], axis=-1),
            "confidence": confidence,
            "dim": np.full(len(undecided), stage.dim, np.int32),
            **({"labels": answer["labels"]} if manifest.labels else {}),
        }
        decided.append((undecided[sure], {name: column[sure] for name, column in columns.items()}))
        undecided = undecided[~sure]
        if not len(undecided):
            break
    order = np.argsort(np.concatenate([rows for rows, _ in decided]))
    names = decided[0][1]
    joined = {
        name: np.concatenate([columns[name] for _, columns in decided])[order] for name in names
    }
    if audited is not None:
        last = policy.dims[-1]
        early = np.flatnonzero(audited & (joined["dim"] != last))
        prefix = {"features": features[early, :last]}
        full = yield from _full_class_ids(manifest, contract.head(last), prefix, len(early))
        joined["full_class_ids"] = _with_full(joined["class_ids"][:, 0], audited, early, full)
    joined |= _at_exit(manifest, contract.LAST_EXIT, len(joined["dim"]))
    return _classification(joined)


def _class_outputs(manifest: Manifest) -> dict[str, Output]:
    k = manifest.top_k
    return {
        "class_ids": Output("int64", k),
        "probabilities": Output("float32", k),
        "confidence": Output("float32"),
        **({"labels": Output("object", k)} if manifest.labels else {}),
    }


def _check_classes(manifest: Manifest, signature: str, answer: Arrays) -> None:
    """Raise unless an answer names classes of the model, and by finite numbers."""
    for name in ("logits", "probabilities", "confidence"):
        if name in answer:
            rule = "Classes are decided by finite numbers."
            check_finite_rows(rule, signature, name, answer[name])
    class_ids, num_classes = answer["class_ids"], manifest.num_classes or 0
    check_lengths(signature, {n: answer[n] for n in _class_outputs(manifest) if n in answer})
    if not class_ids.shape[1] or (class_ids < 0).any() or (class_ids >= num_classes).any():
        received = f"{class_ids.min()} to {class_ids.max()}" if class_ids.size else "none"
        raise ManifestError(
            f"A row is of at least one class, each in 0..{num_classes - 1}. Received: class ids "
            f"{received} from signature {signature!r}. "
            "Export the model again with keras_mrl_export.export_saved_model."
        )


def _classification(columns: Arrays) -> Classification:
    fields: dict[str, Any] = dict(columns)
    if "labels" in fields:
        labels = fields["labels"]
        text = [x if isinstance(x, str) else x.decode(errors="replace") for x in labels.flat]
        fields["labels"] = np.array(text, dtype=object).reshape(labels.shape)
    return Classification(**fields)
