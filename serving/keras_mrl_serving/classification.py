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

Bools = npt.NDArray[np.bool]


def classify(manifest: Manifest, inputs: Inputs, dim: int) -> Flow[Classification]:
    """Ask for the classes of one dim.

    Examples:
        >>> image = {"dtype": "float32", "shape": [None, 3]}
        >>> manifest = Manifest(name="birds", kind="classifier", fingerprint="5e1f", dims=(8, 64),
        ...     width=64, inputs={"image": image}, made_with={}, num_classes=200)
        >>> next(classify(manifest, [[0, 127, 255]], 64)).signature
        'classify_64'
    """
    manifest.check_head()
    dim = manifest.check_dim(dim)
    arrays = check_inputs(manifest.inputs, inputs)
    answer = yield from ask(contract.classify(dim), arrays, _class_outputs(manifest))
    _check_classes(manifest, contract.classify(dim), answer)
    return _classification({**answer, "dim": np.full(len(answer["confidence"]), dim, np.int32)})


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
    arrays = check_inputs(manifest.inputs, inputs)
    answer = yield from ask(
        contract.CLASSIFY_ADAPTIVE, arrays, {**_class_outputs(manifest), "dim": Output("int32")}
    )
    _check_classes(manifest, contract.CLASSIFY_ADAPTIVE, answer)
    _check_dims(manifest, answer["dim"])
    if audited is not None:
        last = CascadePolicy.from_json(manifest.cascade or {}).stages[-1].dim
        early = np.flatnonzero(audited & (answer["dim"] != last))
        rows = {name: array[early] for name, array in arrays.items()}
        full = yield from _full_class_ids(manifest, contract.classify(last), rows, len(early))
        answer["full_class_ids"] = _with_full(answer["class_ids"][:, 0], audited, early, full)
    return _classification(answer)


def _check_dims(manifest: Manifest, dims: npt.NDArray[np.int32]) -> None:
    unknown = dims[~np.isin(dims, manifest.dims)]
    if len(unknown):
        raise ManifestError(
            "A row is decided by one of the dims that the model serves, "
            f"{', '.join(map(str, manifest.dims))}. Received: dim {unknown[0]}. "
            "Export the model again with keras_mrl_export.export_saved_model."
        )


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
        "give it to export_saved_model.",
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
