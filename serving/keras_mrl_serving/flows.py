"""The calls that answer each question, and their order, without any network.

A flow is a generator: it yields `Call`s, is sent the arrays that answer each, and returns the
result. `Client` drives it over gRPC; a test drives it with a function.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from . import contract
from .answers import check_answer
from .calls import Arrays as Arrays
from .calls import AskManifest, AskSignatures, AskStatus, Output, Signature, VersionStatus
from .calls import Call as Call
from .cascade.confidence import confidence_in, softmax
from .cascade.policy import CascadePolicy, check_no_exits
from .contract import Manifest
from .embeddings import check_finite
from .errors import (
    EncoderMismatchError,
    InvalidInputError,
    ManifestError,
    ServerError,
    SignatureNotFoundError,
)
from .inputs import Inputs, as_arrays, check_inputs
from .results import Classification, Embedded, Neighbors

T = TypeVar("T")
# A flow is sent the answer to the request it yielded last: arrays for a `Call`.
Flow = Generator[Call | AskManifest | AskSignatures | AskStatus, Any, T]


def ask(
    signature: str, inputs: Arrays, outputs: Mapping[str, Output], only: bool = False
) -> Flow[dict[str, npt.NDArray[Any]]]:
    """Ask a signature of the contract, whose outputs have a row for each row sent.

    Args:
        signature: Its name.
        inputs: Its inputs.
        outputs: The outputs to return, with the dtype and size that the contract promises.
        only: Whether to ask the server for these outputs alone.

    Returns:
        The outputs, in the dtypes of the contract.

    Raises:
        ManifestError: If an output is missing, or is not as the contract promises.

    Examples:
        >>> flow = ask("embed_8", {"x": np.zeros((2, 3))}, {"embedding": Output("float32", 8)})
        >>> next(flow).signature
        'embed_8'
        >>> answer = flow.send({"embedding": np.zeros((2, 8)), "other": np.zeros(1)})
        Traceback (most recent call last):
        StopIteration: {'embedding': array([[0., 0., 0., 0., 0., 0., 0., 0.],
               [0., 0., 0., 0., 0., 0., 0., 0.]], dtype=float32)}
    """
    call = Call(signature, inputs, tuple(outputs) if only else (), outputs, (contract.MODEL_ID,))
    answer = yield call
    check_answer(call, {name: (array.dtype, array.shape) for name, array in answer.items()})
    return {name: _in_dtype(answer[name], output.dtype) for name, output in outputs.items()}


def _in_dtype(array: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinity, which is looked for
        return array.astype(dtype)


def describe() -> Flow[Manifest]:
    """Ask a model what it is.

    Examples:
        >>> next(describe()).signature
        'describe'
    """
    key = {"key": np.array([b""], dtype=object)}
    text = Output("object", string_bytes=contract.LARGEST_MANIFEST_BYTES)
    answer = yield from ask(contract.DESCRIBE, key, {"manifest": text})
    return Manifest.from_json(answer["manifest"][0])


def embed(
    manifest: Manifest, inputs: Inputs, dim: int, other_tower: bool = False
) -> Flow[npt.NDArray[np.float32]]:
    """Ask for embeddings of one dim, by the tower of queries or by the other.

    Examples:
        >>> image = {"dtype": "float32", "shape": [None, 3]}
        >>> manifest = Manifest(name="birds", kind="encoder", fingerprint="5e1f", dims=(8, 64),
        ...     width=64, inputs={"image": image}, made_with={})
        >>> call = next(embed(manifest, [[0, 127, 255]], 8))
        >>> call.signature, call.inputs
        ('embed_8', {'image': array([[  0., 127., 255.]], dtype=float32)})
    """
    dim = manifest.check_dim(dim)
    arrays = check_inputs(manifest.tower(other_tower).inputs, inputs)
    signature = contract.embed_other(dim) if other_tower else contract.embed(dim)
    answer = yield from ask(signature, arrays, {"embedding": Output("float32", dim)})
    return answer["embedding"]


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


def regress(manifest: Manifest, inputs: Inputs, dim: int) -> Flow[npt.NDArray[np.float32]]:
    """Ask a regressor for the values of one dim.

    Examples:
        >>> image = {"dtype": "float32", "shape": [None, 3]}
        >>> manifest = Manifest(name="prices", kind="regressor", fingerprint="5e1f", dims=(8, 64),
        ...     width=64, inputs={"image": image}, made_with={}, num_values=1)
        >>> next(regress(manifest, [[0, 127, 255]], 64)).signature
        'regress_64'
    """
    values = {"values": Output("float32", manifest.check_values())}
    signature = contract.regress(manifest.check_dim(dim))
    answer = yield from ask(signature, check_inputs(manifest.inputs, inputs), values)
    _check_finite("Values must be finite.", signature, "values", answer["values"])
    return answer["values"]


def classify_adaptive(manifest: Manifest, inputs: Inputs) -> Flow[Classification]:
    """Ask for the classes by the model's own policy: one call, the cascade in the graph.

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
    unknown = answer["dim"][~np.isin(answer["dim"], manifest.dims)]
    if len(unknown):
        raise ManifestError(
            "A row is decided by one of the dims that the model serves, "
            f"{', '.join(map(str, manifest.dims))}. Received: dim {unknown[0]}. "
            "Export the model again with keras_mrl_export.export_saved_model."
        )
    return _classification(answer)


def classify_by(manifest: Manifest, inputs: Inputs, policy: CascadePolicy) -> Flow[Classification]:
    """Ask for the classes by the caller's policy: features once, then heads for undecided rows.

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
    return _classification(
        {name: np.concatenate([columns[name] for _, columns in decided])[order] for name in names}
    )


def _class_outputs(manifest: Manifest) -> dict[str, Output]:
    k = manifest.top_k
    return {
        "class_ids": Output("int64", k),
        "probabilities": Output("float32", k),
        "confidence": Output("float32"),
        **({"labels": Output("object", k)} if manifest.labels else {}),
    }


_LOOK_FOR_NAN = "Look for NaN in the inputs, or train the model to a finite loss."


def _check_classes(manifest: Manifest, signature: str, answer: Arrays) -> None:
    """Raise unless an answer names classes of the model, and by finite numbers."""
    for name in ("logits", "probabilities", "confidence"):
        if name in answer:
            _check_finite("Classes are decided by finite numbers.", signature, name, answer[name])
    class_ids, num_classes = answer["class_ids"], manifest.num_classes or 0
    _check_lengths(signature, {n: answer[n] for n in _class_outputs(manifest) if n in answer})
    if not class_ids.shape[1] or (class_ids < 0).any() or (class_ids >= num_classes).any():
        received = f"{class_ids.min()} to {class_ids.max()}" if class_ids.size else "none"
        raise ManifestError(
            f"A row is of at least one class, each in 0..{num_classes - 1}. Received: class ids "
            f"{received} from signature {signature!r}. "
            "Export the model again with keras_mrl_export.export_saved_model."
        )


def _check_lengths(signature: str, lists: Arrays) -> None:
    """Raise unless all lists of a row are of one length."""
    shapes = {name: array.shape for name, array in lists.items() if array.ndim > 1}
    if len(set(shapes.values())) > 1:
        raise ManifestError(
            "The lists of a row must be of one length. "
            f"Received: {', '.join(f'{n} {s}' for n, s in shapes.items())} from signature "
            f"{signature!r}. Export the model again with keras_mrl_export.export_saved_model."
        )


def _check_finite(rule: str, signature: str, name: str, values: npt.NDArray[Any]) -> None:
    finite = np.isfinite(values).all(axis=tuple(range(1, values.ndim)))
    if not finite.all():
        first, count = int(np.argmin(finite)), int((~finite).sum())
        raise ServerError(
            f"{rule} Received: NaN or infinity in {name} of signature {signature!r}, in {count} of "
            f"{len(values)} rows, first in row {first}. {_LOOK_FOR_NAN}"
        )


def _classification(columns: Arrays) -> Classification:
    fields: dict[str, Any] = dict(columns)
    if "labels" in fields:
        labels = fields["labels"]
        text = [x if isinstance(x, str) else x.decode(errors="replace") for x in labels.flat]
        fields["labels"] = np.array(text, dtype=object).reshape(labels.shape)
    return Classification(**fields)


def embed_with_fingerprint(
    manifest: Manifest, inputs: Inputs, dim: int, other_tower: bool = False
) -> Flow[Embedded]:
    """Ask for embeddings of one dim, and for the fingerprint of their model.

    Examples:
        >>> image = {"dtype": "float32", "shape": [None, 3]}
        >>> manifest = Manifest(name="birds", kind="encoder", fingerprint="5e1f", dims=(8, 64),
        ...     width=64, inputs={"image": image}, made_with={})
        >>> flow = embed_with_fingerprint(manifest, [[0, 127, 255]], 8)
        >>> next(flow).signature
        'embed_8'
        >>> flow.send({"embedding": np.ones((1, 8), np.float32)})
        AskManifest()
    """
    embeddings = yield from embed(manifest, inputs, dim, other_tower)
    answering = yield AskManifest()  # of the version that answered, perhaps not that of `manifest`
    return Embedded(embeddings, answering.fingerprint)


def search(
    manifest: Manifest, embeddings: Inputs, dim: int | None = None, encoder: str | None = None
) -> Flow[Neighbors]:
    """Ask an index for the neighbours of embeddings: by its funnel, or exactly at one dim.

    Args:
        manifest: Manifest of the index.
        embeddings: `(batch, width)`, or `(batch, dim)` if a dim is given.
        dim: None asks the funnel of the index.
        encoder: Fingerprint of the model that made the embeddings; None if unknown.

    Examples:
        >>> manifest = Manifest(name="birds", kind="index", fingerprint="c0de", dims=(8, 64),
        ...     width=64, inputs={}, made_with={}, size=1000)
        >>> next(search(manifest, np.ones((1, 64)))).signature
        'search'
        >>> next(search(manifest, np.ones((1, 8)), dim=8)).signature
        'search_8'
    """
    check_encoder(manifest.encoder_fingerprint, encoder)
    arrays = check_inputs(embedding_spec(manifest, dim), embeddings)
    try:
        check_finite("The queries", arrays["embedding"])
    except ValueError as error:
        raise InvalidInputError(str(error)) from error
    signature = contract.SEARCH if dim is None else contract.search(dim)
    answer = yield from ask(signature, arrays, _neighbor_outputs(manifest))
    _check_neighbors(signature, answer)
    if encoder is not None:
        answering: Manifest = yield AskManifest()  # of the version that answered
        check_encoder(answering.encoder_fingerprint, encoder)
    return Neighbors(answer["ids"], answer["scores"])


def embedding_spec(manifest: Manifest, dim: int | None = None) -> dict[str, dict[str, Any]]:
    """Return the spec of an index's inputs for `check_inputs`: vectors of a dim or of its width.

    Examples:
        >>> manifest = Manifest(name="birds", kind="index", fingerprint="c0de", dims=(8, 64),
        ...     width=64, inputs={}, made_with={}, size=1000)
        >>> embedding_spec(manifest, 8)
        {'embedding': {'dtype': 'float32', 'shape': [None, 8]}}
    """
    manifest.check_index()
    width = manifest.width if dim is None else manifest.check_dim(dim)
    return {"embedding": {"dtype": "float32", "shape": [None, width]}}


def retrieve(manifest: Manifest, inputs: Inputs) -> Flow[Neighbors]:
    """Ask a model that holds encoder and index for the neighbours of inputs: one call.

    Examples:
        >>> image = {"dtype": "float32", "shape": [None, 3]}
        >>> manifest = Manifest(name="birds", kind="index", fingerprint="c0de", dims=(8, 64),
        ...     width=64, inputs={"image": image}, made_with={}, size=1000)
        >>> next(retrieve(manifest, [[0, 127, 255]])).signature
        'retrieve'
    """
    manifest.check_index()
    arrays = check_inputs(manifest.inputs, inputs)
    answer = yield from ask(contract.RETRIEVE, arrays, _neighbor_outputs(manifest))
    _check_neighbors(contract.RETRIEVE, answer)
    return Neighbors(answer["ids"], answer["scores"])


def check_served_search(k: int | None, among: npt.ArrayLike | None) -> None:
    """Raise `ValueError` if a served index is given arguments that only a local index takes.

    Examples:
        >>> check_served_search(k=None, among=None)
    """
    if not (k is None and among is None):
        raise ValueError(
            "k and among are for an index in this process. "
            f"Received: k={k}, among={'None' if among is None else 'ids'} for a served one. Cut "
            "its answer, or open the index here: open_index(path)."
        )


def check_index(index: object, client: type[Any]) -> None:
    """Raise `InvalidInputError` unless an index is one in this process, or a client of this class.

    Examples:
        >>> check_index(None, object)  # the model's own gallery
    """
    names = ("search", "width", "encoder_fingerprint")
    is_local = not isinstance(index, type) and all(hasattr(index, name) for name in names)
    if not (index is None or isinstance(index, client) or is_local):
        raise InvalidInputError(
            f"An index must be one in this process, or another {client.__name__}. "
            f"Received: {type(index).__name__}. "
            f"Give open_index(path), or the {client.__name__} of a model that is an index."
        )


def check_encoder(built_with: str | None, encoder: str | None) -> None:
    """Raise `EncoderMismatchError` if an index was built with another encoder than this one.

    Examples:
        >>> check_encoder("5e1f", "5e1f")
        >>> check_encoder(None, "5e1f")  # the index does not say which encoder it was built with
    """
    if None not in (built_with, encoder) and built_with != encoder:
        raise EncoderMismatchError(
            "An index answers embeddings of the encoder it was built with. "
            f"Received: embeddings of the model with fingerprint {encoder!r}, for an index built "
            f"with {built_with!r}. Embed the gallery anew with the model that is served, or serve "
            "the model the index was built with."
        )


def _neighbor_outputs(manifest: Manifest) -> dict[str, Output]:
    k = (manifest.funnel or {}).get("k")
    return {"ids": Output("int64", k), "scores": Output("float32", k)}


def _check_neighbors(signature: str, answer: Arrays) -> None:
    """Raise unless each query has different ids, by finite scores."""
    _check_lengths(signature, answer)
    _check_finite("Neighbours are ranked by finite scores.", signature, "scores", answer["scores"])
    ids = np.sort(answer["ids"], axis=1)
    if (ids < 0).any() or (ids[:, 1:] == ids[:, :-1]).any():
        raise ManifestError(
            "The neighbours of a query are different rows, with ids of 0 or more. Received: "
            f"negative or repeated ids from signature {signature!r}. "
            "Export the index again with keras_mrl_export.export_index."
        )


def predict(
    signatures: Mapping[str, Signature],
    inputs: Inputs,
    signature: str,
    outputs: tuple[str, ...] = (),
) -> Flow[dict[str, npt.NDArray[Any]]]:
    """Ask any signature of any model.

    Examples:
        >>> signatures = {"serving_default": Signature({"x": {"dtype": "float32",
        ...     "shape": [None, 1]}}, {"y": {"dtype": "float32", "shape": [None, 1]}})}
        >>> next(predict(signatures, [[1]], "serving_default")).inputs
        {'x': array([[1.]], dtype=float32)}
    """
    if signature not in signatures:
        raise SignatureNotFoundError(
            f"The model must have the signature. Received: signature={signature!r}. "
            f"Choose one of {', '.join(sorted(signatures)):.400}."
        )
    spec = signatures[signature]
    unknown = [name for name in outputs if name not in spec.outputs]
    if unknown:
        raise InvalidInputError(
            f"outputs must be some of those of signature {signature!r}: "
            f"{', '.join(sorted(spec.outputs)):.400}. Received: {', '.join(unknown)}. Rename them."
        )
    names = outputs or tuple(spec.outputs)
    promised = {name: Output.of_signature(spec.outputs[name]) for name in names}
    call = Call(signature, as_arrays(spec.inputs, inputs), outputs, promised)
    answer = yield call
    return dict(answer)


def signatures() -> Flow[Mapping[str, Signature]]:
    """Ask which signatures the model has.

    Examples:
        >>> next(signatures())
        AskSignatures()
    """
    return (yield AskSignatures())


def status() -> Flow[tuple[VersionStatus, ...]]:
    """Ask which versions of the model the server has, and how they stand.

    Examples:
        >>> next(status())
        AskStatus()
    """
    return (yield AskStatus())
