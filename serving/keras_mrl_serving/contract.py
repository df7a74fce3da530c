"""The serving contract: signature names and the manifest. Export writes it, clients rely on it."""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any

from .errors import ManifestError, NoCascadeError, NoHeadError, NoIndexError, UnknownDimError
from .manifest_json import SCHEMA, parse_manifest

DEFAULT_MODEL_NAME = "default"  # what tensorflow_model_server calls a model without --model_name
MANIFEST_FILE = "assets.extra/keras_mrl.json"

DESCRIBE = "describe"
FEATURES = "features"
CLASSIFY_ADAPTIVE = "classify_adaptive"
SERVING_DEFAULT = "serving_default"
SEARCH = "search"
RETRIEVE = "retrieve"


def embed(dim: int) -> str:
    """Return the name of the signature that embeds at `dim`.

    Examples:
        >>> embed(8)
        'embed_8'
    """
    return f"embed_{dim}"


def classify(dim: int) -> str:
    """Return the name of the signature that classifies at `dim`.

    Examples:
        >>> classify(8)
        'classify_8'
    """
    return f"classify_{dim}"


def head(dim: int) -> str:
    """Return the name of the signature that classifies given features at `dim`.

    Examples:
        >>> head(8)
        'head_8'
    """
    return f"head_{dim}"


def search(dim: int) -> str:
    """Return the name of the signature that searches an index exactly at `dim`.

    Examples:
        >>> search(8)
        'search_8'
    """
    return f"search_{dim}"


def check_dims(dims: Iterable[int]) -> tuple[int, ...]:
    """Return `dims` as a tuple of ints, strictly increasing and positive.

    Raises:
        ValueError: If they are none, not integers, not positive, unsorted or repeated.

    Examples:
        >>> check_dims([8, 16])
        (8, 16)
    """
    given: Any = tuple(dims) if isinstance(dims, Iterable) else dims
    try:
        checked = tuple(map(as_int, given))
    except TypeError:
        checked = ()
    good = all(d > 0 for d in checked) and all(a < b for a, b in pairwise(checked))
    if not checked or not good:
        positive = tuple(sorted({d for d in checked if d > 0}))
        remedy = (
            f"Sort them and drop repeats: dims={positive}."
            if positive
            else "Give prefix lengths, for example dims=(8, 16, 32)."
        )
        raise ValueError(
            f"dims must be strictly increasing positive integers. Received: dims={given}. {remedy}"
        )
    return checked


def as_int(value: Any) -> int:
    """Return an integer of any library as Python's own.

    Raises:
        TypeError: If it is none; True and 8.0 are none.

    Examples:
        >>> as_int(np.int64(8))
        8
    """
    if isinstance(value, bool):
        raise TypeError(f"An integer is needed. Received: {value!r}. Write it as an integer.")
    return operator.index(value)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What an exported model says of itself, in its own `describe` signature.

    The fields are those of the JSON object, under the same names.

    Args:
        name: Name of the model that was exported.
        kind: "classifier", "encoder" or "index".
        fingerprint: SHA-256 of all that makes an embedding: weights, configuration, decoder,
            scaling.
        dims: The dims that can be asked for, increasing.
        width: Width d of the full representation, the last of `dims`.
        inputs: Input name to `{"dtype": ..., "shape": [null, ...]}`.
        made_with: Versions of what made it, and the backend it was trained on.
        weights: The c_m of the loss, if known.
        tied: Whether the head's dims share one kernel.
        normalize: Whether `embed_<m>` scales to unit length.
        metric: How embeddings are compared: "cosine", "dot" or "l2".
        activation: "softmax", "sigmoid" or "none".
        num_classes: Number of classes; None without a head.
        top_k: How many classes a classification names; None without a head.
        labels: Whether classifications carry class names.
        cascade: The adaptive policy, as `CascadePolicy.to_json` writes it.
        funnel: The schedule of an index.
        decoder: What turns encoded images into the model's inputs.
        quality: Dim (as a string) to what the evaluation found there.
        encoder_fingerprint: Of the encoder whose embeddings an index holds.
        size: Number of rows of an index.
        schema: Version of this very format.
        extra: Keys of a later writer that this reader does not know.

    Raises:
        ManifestError: If a field's value is none of those named here.

    Examples:
        >>> image = {"dtype": "float32", "shape": [None, 32, 32, 3]}
        >>> manifest = Manifest(name="birds", kind="encoder", fingerprint="5e1f", dims=(8, 64),
        ...     width=64, inputs={"image": image}, made_with={"keras": "3.15"})
        >>> Manifest.from_json(manifest.to_json()) == manifest
        True
    """

    name: str
    kind: str
    fingerprint: str
    dims: tuple[int, ...]
    width: int
    inputs: Mapping[str, Mapping[str, Any]]
    made_with: Mapping[str, str]
    weights: tuple[float, ...] | None = None
    tied: bool = False
    normalize: bool = True
    metric: str = "cosine"
    activation: str = "none"
    num_classes: int | None = None
    top_k: int | None = None
    labels: bool = False
    cascade: Mapping[str, Any] | None = None
    funnel: Mapping[str, Any] | None = None
    decoder: Mapping[str, Any] | None = None
    quality: Mapping[str, Mapping[str, float]] | None = None
    encoder_fingerprint: str | None = None
    size: int | None = None
    schema: int = SCHEMA
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check what the rest of the package relies on."""
        _check_one_of("kind", self.kind, ("classifier", "encoder", "index"))
        _check_one_of("metric", self.metric, ("cosine", "dot", "l2"))
        _check_one_of("activation", self.activation, ("softmax", "sigmoid", "none"))

    def to_json(self) -> str:
        """Return the JSON object of the contract, one line."""
        fields = asdict(self)
        return json.dumps({**fields.pop("extra"), **fields}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> Manifest:
        """Read a manifest; keys it does not know are kept, an unknown schema is refused.

        Raises:
            ManifestError: If `text` is no manifest, one of another schema, or one with a value of
                another type.
        """
        fields = parse_manifest(text)
        ours = [name for name in cls.__dataclass_fields__ if name != "extra"]
        known = {name: fields.pop(name) for name in ours if name in fields}
        manifest = cls(**known, extra=fields)
        weights = None if manifest.weights is None else tuple(manifest.weights)
        try:
            dims = check_dims(manifest.dims)
            if manifest.width != dims[-1]:
                raise ValueError(f"width={manifest.width} with dims={dims}")
        except ValueError as error:
            raise ManifestError(
                "A manifest names a model's dims and width. "
                f"Received: {str(error).rstrip('.')}. "
                "Export the model again with keras_mrl_export.export_saved_model."
            ) from error
        return replace(manifest, dims=dims, weights=weights)

    def check_dim(self, dim: int) -> int:
        """Return `dim` as an int; raise `UnknownDimError`, naming those there are."""
        try:
            known = as_int(dim) in self.dims
        except TypeError:
            known = False
        if not known:
            raise UnknownDimError(
                "dim must be one of the dims the model serves. "
                f"Received: dim={dim!r} for model {self.name!r}. "
                f"Choose one of {', '.join(map(str, self.dims))}."
            )
        return as_int(dim)

    def check_head(self) -> None:
        """Raise `NoHeadError` if the model cannot classify."""
        if self.num_classes is None:
            raise NoHeadError(
                "Only a model with a head can classify. "
                f"Received: a request to classify for model {self.name!r}, an {self.kind} "
                "without one. Ask it to embed, or export a model that ends in a MatryoshkaHead."
            )

    def check_index(self) -> None:
        """Raise `NoIndexError` if the model holds no gallery."""
        if self.kind != "index":
            raise NoIndexError(
                "Only an index can be searched. "
                f"Received: a request to search model {self.name!r}, a {self.kind} without a "
                "gallery. Give an index: client.retrieve(inputs, index=ExactIndex.build(...))."
            )

    def check_cascade(self) -> None:
        """Raise `NoHeadError` or `NoCascadeError` if the model cannot classify adaptively."""
        self.check_head()
        if self.cascade is None:
            raise NoCascadeError(
                "classify_adaptive needs a cascade policy. "
                f"Received: model {self.name!r}, exported without one. Learn one on a holdout "
                "with CascadePolicy.learn, then give it as classify_adaptive(x, policy=policy), "
                "or export again with export_saved_model(..., policy=policy)."
            )


def _check_one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ManifestError(
            f"{name} must be one of {', '.join(known)}. Received: {name}={value!r}. "
            "Install the version of keras-mrl that exported the model, or a later one."
        )
