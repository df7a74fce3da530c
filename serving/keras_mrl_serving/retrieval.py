"""Flows about neighbours: whose embeddings a query is, and what an index is asked."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

from . import contract
from .calls import AskManifest, Output
from .contract import Manifest
from .errors import EncoderMismatchError
from .flows import Flow, ask, embed
from .inputs import Inputs, check_inputs
from .results import Embedded, Neighbors


def embed_knowingly(manifest: Manifest, inputs: Inputs, dim: int) -> Flow[Embedded]:
    """Ask for embeddings of one dim, and which model they are of.

    Examples:
        >>> image = {"dtype": "float32", "shape": [None, 3]}
        >>> manifest = Manifest(name="birds", kind="encoder", fingerprint="5e1f", dims=(8, 64),
        ...     width=64, inputs={"image": image}, made_with={})
        >>> flow = embed_knowingly(manifest, [[0, 127, 255]], 8)
        >>> next(flow).signature
        'embed_8'
        >>> flow.send({"embedding": np.ones((1, 8), np.float32)})
        AskManifest()
    """
    embeddings = yield from embed(manifest, inputs, dim)
    answering = yield AskManifest()  # another version may have answered than the one kept
    return Embedded(embeddings, answering.fingerprint)


def search(
    manifest: Manifest, embeddings: Inputs, dim: int | None = None, encoder: str | None = None
) -> Flow[Neighbors]:
    """Ask an index for the neighbours of embeddings: by its funnel, or exactly at one dim.

    Args:
        manifest: That of the index.
        embeddings: `(batch, width)`, or `(batch, dim)` where a dim is given.
        dim: None asks the funnel of the index.
        encoder: Fingerprint of the model the embeddings are of; None if nobody knows.

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
    signature = contract.SEARCH if dim is None else contract.search(dim)
    answer = yield from ask(signature, arrays, _found(manifest))
    if encoder is not None:
        answering: Manifest = yield AskManifest()  # another version may have answered
        check_encoder(answering.encoder_fingerprint, encoder)
    return Neighbors(answer["ids"], answer["scores"])


def embedding_spec(manifest: Manifest, dim: int | None = None) -> dict[str, dict[str, Any]]:
    """Return what an index takes, as `check_inputs` reads it: vectors of a dim, or of its width.

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
    answer = yield from ask(contract.RETRIEVE, arrays, _found(manifest))
    return Neighbors(answer["ids"], answer["scores"])


def check_search(is_served: bool, k: int | None, among: npt.ArrayLike | None) -> None:
    """Raise `ValueError` if a served index is asked what only one in this process can be.

    Examples:
        >>> check_search(False, 3, [7, 9])
    """
    if is_served and not (k is None and among is None):
        raise ValueError(
            "k and among are for an index in this process. "
            f"Received: k={k}, among={'None' if among is None else 'ids'} for a served one. Cut "
            "its answer, or open the index here: open_index(path)."
        )


def check_encoder(built_with: str | None, encoder: str | None) -> None:
    """Raise `EncoderMismatchError` if an index was built with another encoder than this one.

    Examples:
        >>> check_encoder("5e1f", "5e1f")
        >>> check_encoder(None, "5e1f")  # nobody said what it was built with
    """
    if None not in (built_with, encoder) and built_with != encoder:
        raise EncoderMismatchError(
            "An index answers embeddings of the encoder it was built with. "
            f"Received: embeddings of the model with fingerprint {encoder!r}, for an index built "
            f"with {built_with!r}. Embed the gallery anew with the model that is served, or serve "
            "the model the index was built with."
        )


def _found(manifest: Manifest) -> dict[str, Output]:
    k = (manifest.funnel or {}).get("k")
    return {"ids": Output("int64", k), "scores": Output("float32", k)}
