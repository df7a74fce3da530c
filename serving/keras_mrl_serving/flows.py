"""The calls that answer each question, and their order, without any network.

A flow is a generator: it yields `Call`s, is sent the arrays that answer each, and returns the
result. `Client` drives it over gRPC; a test drives it with a function.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from . import contract
from .answers import check_answer
from .calls import Arrays as Arrays
from .calls import AskManifest, AskSignatures, AskStatus, Output, Signature, VersionStatus
from .calls import Call as Call
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
from .prompts import check_gallery_prompt
from .results import Embedded, Neighbors

if TYPE_CHECKING:
    from .index import Index

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
    manifest: Manifest,
    inputs: Inputs,
    dim: int,
    other_tower: bool = False,
    exit: str | None = None,
) -> Flow[npt.NDArray[np.float32]]:
    """Ask for embeddings of one dim, by the tower of queries or by the other, or at an exit.

    Examples:
        >>> image = {"dtype": "float32", "shape": [None, 3]}
        >>> manifest = Manifest(name="birds", kind="encoder", fingerprint="5e1f", dims=(8, 64),
        ...     width=64, inputs={"image": image}, made_with={})
        >>> call = next(embed(manifest, [[0, 127, 255]], 8))
        >>> call.signature, call.inputs
        ('embed_8', {'image': array([[  0., 127., 255.]], dtype=float32)})
    """
    dim = manifest.check_dim(dim)
    exit = check_exit(manifest, exit, other_tower)
    arrays = check_inputs(manifest.tower(other_tower).inputs, inputs)
    signature = contract.embed_other(dim) if other_tower else contract.embed(dim, exit)
    answer = yield from ask(signature, arrays, {"embedding": Output("float32", dim)})
    return answer["embedding"]


def check_exit(manifest: Manifest, exit: str | None, other_tower: bool) -> str:
    """Return the name of an exit; raise if the model does not have it, or the other tower is meant.

    Examples:
        >>> manifest = Manifest(name="birds", kind="encoder", fingerprint="5e1f", dims=(8, 64),
        ...     width=64, inputs={}, made_with={})
        >>> check_exit(manifest, None, other_tower=True)
        'last'
    """
    if other_tower and exit is not None:
        raise InvalidInputError(
            "Exits are of the tower of queries. "
            f"Received: exit={exit!r} and other_tower=True. Leave one of them out."
        )
    return manifest.check_exit(exit)


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
    check_finite_rows("Values must be finite.", signature, "values", answer["values"])
    return answer["values"]


_LOOK_FOR_NAN = "Look for NaN in the inputs, or train the model to a finite loss."


def check_lengths(signature: str, lists: Arrays) -> None:
    """Raise `ManifestError` unless all lists of a row are of one length.

    Examples:
        >>> check_lengths("search", {"ids": np.zeros((1, 2)), "scores": np.zeros((1, 2))})
    """
    shapes = {name: array.shape for name, array in lists.items() if array.ndim > 1}
    if len(set(shapes.values())) > 1:
        raise ManifestError(
            "The lists of a row must be of one length. "
            f"Received: {', '.join(f'{n} {s}' for n, s in shapes.items())} from signature "
            f"{signature!r}. Export the model again with keras_mrl_export.export_saved_model."
        )


def check_finite_rows(rule: str, signature: str, name: str, values: npt.NDArray[Any]) -> None:
    """Raise `ServerError` unless all values of an output are finite.

    Args:
        rule: Why they must be, for the error.
        signature: The signature that answered.
        name: The output.
        values: Its values, rows first.

    Examples:
        >>> check_finite_rows("Values must be finite.", "regress_8", "values", np.zeros((2, 1)))
    """
    finite = np.isfinite(values).all(axis=tuple(range(1, values.ndim)))
    if not finite.all():
        first, count = int(np.argmin(finite)), int((~finite).sum())
        raise ServerError(
            f"{rule} Received: NaN or infinity in {name} of signature {signature!r}, in {count} of "
            f"{len(values)} rows, first in row {first}. {_LOOK_FOR_NAN}"
        )


def embed_with_fingerprint(
    manifest: Manifest,
    inputs: Inputs,
    dim: int,
    other_tower: bool = False,
    exit: str | None = None,
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
    embeddings = yield from embed(manifest, inputs, dim, other_tower, exit)
    answering = yield AskManifest()  # of the version that answered, perhaps not that of `manifest`
    return Embedded(embeddings, answering.fingerprint, answering.gallery_prompts)


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


def check_served_search(k: int | None, among: npt.ArrayLike | None, filter: object = None) -> None:
    """Raise `ValueError` if a served index is given arguments that only a local index takes.

    Examples:
        >>> check_served_search(k=None, among=None)
    """
    if not (k is None and among is None and filter is None):
        raise ValueError(
            "k, among and filter are for an index in this process. "
            f"Received: k={k}, among={'None' if among is None else 'ids'}, "
            f"filter={'None' if filter is None else 'rows'} for a served one. Cut "
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


def check_gallery(
    gallery: Index | Manifest, encoder: str, prompts: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Raise unless a gallery was embedded by the model of the queries, with one of its prompts.

    Args:
        gallery: An index in this process, or the manifest of one that is served.
        encoder: Fingerprint of the model that embeds the queries.
        prompts: What may stand before each text of its galleries, by name.

    Raises:
        EncoderMismatchError: If another model embedded it, or it had another prompt.

    Examples:
        >>> manifest = Manifest(name="birds", kind="index", fingerprint="c0de", dims=(8, 64),
        ...     width=64, inputs={}, made_with={}, encoder_fingerprint="5e1f")
        >>> check_gallery(manifest, "5e1f")
    """
    check_encoder(gallery.encoder_fingerprint, encoder)
    check_gallery_prompt(getattr(gallery, "prompt", None), prompts)


def _neighbor_outputs(manifest: Manifest) -> dict[str, Output]:
    k = (manifest.funnel or {}).get("k")
    return {"ids": Output("int64", k), "scores": Output("float32", k)}


def _check_neighbors(signature: str, answer: Arrays) -> None:
    """Raise unless each query has different ids, by finite scores."""
    check_lengths(signature, answer)
    rule = "Neighbours are ranked by finite scores."
    check_finite_rows(rule, signature, "scores", answer["scores"])
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
