"""The serving contract: the names of signatures, the values they take, and the manifest.

There is one signature per dim, since TensorFlow Serving computes every output of a signature, also
those that a client filters out. The manifest travels inside the model, in its signature `describe`,
so a client needs nothing but the server's address.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any

from .errors import (
    ManifestError,
    NoCascadeError,
    NoHeadError,
    NoIndexError,
    NoOtherTowerError,
    UnknownDimError,
)
from .integers import as_int, check_dims, is_positive_integer
from .untrusted import parse_json

SCHEMA = 1

DEFAULT_MODEL_NAME = "default"  # what tensorflow_model_server calls a model without --model_name
MANIFEST_FILE = "assets.extra/keras_mrl.json"

DESCRIBE = "describe"
FEATURES = "features"
CLASSIFY_ADAPTIVE = "classify_adaptive"
SERVING_DEFAULT = "serving_default"
SEARCH = "search"
RETRIEVE = "retrieve"

MODEL_ID = "model_id"  # an output of every signature that has rows, but of `serving_default`


def embed(dim: int) -> str:
    """Return the name of the signature that embeds at `dim`.

    Examples:
        >>> embed(8)
        'embed_8'
    """
    return f"embed_{dim}"


def embed_other(dim: int) -> str:
    """Return the name of the signature that embeds rows of the other tower at `dim`.

    Examples:
        >>> embed_other(8)
        'embed_other_8'
    """
    return f"embed_other_{dim}"


def classify(dim: int) -> str:
    """Return the name of the signature that classifies at `dim`.

    Examples:
        >>> classify(8)
        'classify_8'
    """
    return f"classify_{dim}"


def regress(dim: int) -> str:
    """Return the name of the signature that answers with the values of a regressor at `dim`.

    Examples:
        >>> regress(8)
        'regress_8'
    """
    return f"regress_{dim}"


def head(dim: int) -> str:
    """Return the name of the signature that reads given features at `dim`.

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


# A name stands in flags, in URLs and in names of containers.
_MODEL_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?")


def is_model_name(name: str) -> bool:
    """Whether a model can be exported, deployed and served under `name`.

    Examples:
        >>> is_model_name("birds-2.1"), is_model_name("birds/2")
        (True, False)
    """
    return _MODEL_NAME.fullmatch(name) is not None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The description of an exported model, which its signature `describe` returns.

    The fields are those of the JSON object, under the same names.

    Args:
        name: Name of the model that was exported.
        kind: "classifier", "regressor", "encoder" or "index".
        fingerprint: SHA-256 of all that an embedding depends on: weights, configuration, decoder,
            scaling.
        dims: The dims that the model serves, increasing.
        width: Width d of the full representation, the last of `dims`.
        inputs: Input name to `{"dtype": ..., "shape": [null, ...]}`.
        made_with: Versions of Keras and the other packages, and the backend of the training.
        weights: The c_m of the loss, if known.
        tied: Whether the head's dims share one kernel.
        normalize: Whether `embed_<m>` scales to unit length.
        metric: How embeddings are compared: "cosine", "dot" or "l2".
        activation: What makes probabilities of the head's outputs: "softmax" of classes of which
            a row has one, "sigmoid" where a row may have several, "none" of values.
        num_classes: Number of classes; None without a head that classifies.
        num_values: Number of values that a regressor answers; None without a head of values.
        top_k: How many classes a classification lists; None without classes.
        labels: Whether classifications have class names.
        cascade: The adaptive policy, as `CascadePolicy.to_json` writes it.
        funnel: The schedule of an index.
        decoder: Settings by which the graph decodes images.
        other_tower: `inputs` and `decoder` of the tower that galleries go through, where queries go
            through another; None of a model of one tower. `fingerprint` is of both together.
        quality: Dim (as a string) to the measures of the evaluation at this dim.
        encoder_fingerprint: Fingerprint of the encoder whose embeddings an index holds.
        size: Number of rows of an index.
        model_id: The number that every row of an answer carries, drawn anew at each export; None
            of a model whose answers carry none.
        schema: Version of the manifest's format.
        extra: Keys that a later version wrote and this one does not know.

    Raises:
        ManifestError: If `kind`, `metric` or `activation` is not one of the values named here.

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
    num_values: int | None = None
    top_k: int | None = None
    labels: bool = False
    cascade: Mapping[str, Any] | None = None
    funnel: Mapping[str, Any] | None = None
    decoder: Mapping[str, Any] | None = None
    other_tower: Mapping[str, Any] | None = None
    quality: Mapping[str, Mapping[str, float]] | None = None
    encoder_fingerprint: str | None = None
    size: int | None = None
    model_id: int | None = None
    schema: int = SCHEMA
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the values that the rest of the package compares with."""
        _check_one_of("kind", self.kind, ("classifier", "regressor", "encoder", "index"))
        _check_one_of("metric", self.metric, ("cosine", "dot", "l2"))
        _check_one_of("activation", self.activation, ("softmax", "sigmoid", "none"))
        if self.model_id is not None and not 0 < self.model_id < 2**31:
            raise ManifestError(
                "model_id of a manifest must be in 1..2147483647, or null. "
                f"Received: model_id={self.model_id!r}. {_EXPORT_AGAIN}"
            )

    def to_json(self) -> str:
        """Return the manifest as a JSON object on one line.

        Raises:
            ManifestError: If it is longer than a client reads.
        """
        fields = asdict(self)
        text = json.dumps({**fields.pop("extra"), **fields}, allow_nan=False)
        if len(text) > LARGEST_MANIFEST_BYTES:
            raise ManifestError(
                f"A manifest has at most {LARGEST_MANIFEST_BYTES} bytes. Received: {len(text)} "
                f"bytes for model {self.name!r}. Give fewer measures as quality, or shorter names."
            )
        return text

    @classmethod
    def from_json(cls, text: str | bytes) -> Manifest:
        """Return the manifest in a JSON text; unknown keys become `extra`.

        Raises:
            ManifestError: If `text` is not a manifest, or one of another schema, or a value has
                another type.
        """
        fields = parse_manifest(text)
        names = [name for name in cls.__dataclass_fields__ if name != "extra"]
        values = {name: fields.pop(name) for name in names if name in fields}
        manifest = cls(**values, extra=fields)
        weights = None if manifest.weights is None else tuple(manifest.weights)
        try:
            dims = check_dims(manifest.dims)
            if manifest.width != dims[-1]:
                raise ValueError(f"width={manifest.width} with dims={dims}")
        except ValueError as error:
            raise ManifestError(
                "A manifest names a model's dims and width. "
                f"Received: {str(error).rstrip('.')}. {_EXPORT_AGAIN}"
            ) from error
        return replace(manifest, dims=dims, weights=weights)

    def check_dim(self, dim: int) -> int:
        """Return `dim` as an int; raise `UnknownDimError` if the model does not serve it."""
        if not is_positive_integer(dim) or dim not in self.dims:
            raise UnknownDimError(
                "dim must be one of the dims the model serves. "
                f"Received: dim={dim!r} for model {self.name!r}. "
                f"Choose one of {', '.join(map(str, self.dims))}."
            )
        return as_int(dim)

    def tower(self, other_tower: bool = False) -> Manifest:
        """Return the manifest with the `inputs` and the `decoder` of one tower.

        Args:
            other_tower: Whether it is the tower of galleries; the manifest itself is of queries.

        Raises:
            NoOtherTowerError: If the model has one tower.
        """
        if not other_tower:
            return self
        if self.other_tower is None:
            raise NoOtherTowerError(
                "Only a model of two towers has another one. "
                f"Received: other_tower=True for model {self.name!r}, which has one. Leave "
                "other_tower out, or export a MatryoshkaEncoder(tower, other_tower)."
            )
        inputs, decoder = self.other_tower["inputs"], self.other_tower.get("decoder")
        return replace(self, inputs=inputs, decoder=decoder)

    def check_head(self) -> None:
        """Raise `NoHeadError` if the model cannot classify."""
        if self.num_values is not None:
            raise NoHeadError(
                "Only a model with classes can classify. "
                f"Received: a request to classify for model {self.name!r}, whose head gives "
                f"values, {self.num_values} a row. Ask for them: client.regress(inputs, dim)."
            )
        if self.num_classes is None:
            raise NoHeadError(
                "Only a model with a head can classify. "
                f"Received: a request to classify for model {self.name!r}, "
                f"{_with_article(self.kind)} without one. "
                "Ask it to embed, or export a model that ends in a MatryoshkaHead."
            )

    def check_values(self) -> int:
        """Return how many values a row has; raise `NoHeadError` if the model gives none."""
        if self.num_values is None:
            ask = "embed" if self.num_classes is None else "classify"
            raise NoHeadError(
                "Only a regressor answers with values. "
                f"Received: a request for those of model {self.name!r}, "
                f"{_with_article(self.kind)}. Ask it to {ask}; "
                "export_saved_model(..., activation='none') makes a regressor."
            )
        return self.num_values

    def check_one_class(self) -> None:
        """Raise `NoHeadError` or `NoCascadeError` if a row has not just one class."""
        self.check_head()
        if self.activation == "sigmoid":
            raise NoCascadeError(
                "A cascade decides which one class a row has. "
                f"Received: model {self.name!r}, of whose classes a row may have several "
                "(sigmoid). Ask one dim: client.classify(inputs, dim)."
            )

    def check_index(self) -> None:
        """Raise `NoIndexError` if the model holds no gallery."""
        if self.kind != "index":
            raise NoIndexError(
                "Only an index can be searched. "
                f"Received: a request to search model {self.name!r}, "
                f"{_with_article(self.kind)} without a gallery. "
                "Give an index: client.retrieve(inputs, index=ExactIndex.build(...))."
            )

    def check_cascade(self) -> None:
        """Raise `NoHeadError` or `NoCascadeError` if the model cannot classify adaptively."""
        self.check_one_class()
        if self.cascade is None:
            raise NoCascadeError(
                "classify_adaptive needs a cascade policy. "
                f"Received: model {self.name!r}, exported without one. Learn one on a holdout "
                "with CascadePolicy.learn, then give it as classify_adaptive(x, policy=policy), "
                "or export again with export_saved_model(..., policy=policy)."
            )


def _with_article(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def _check_one_of(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ManifestError(
            f"{name} must be one of {', '.join(choices)}. Received: {name}={value!r}. "
            "Install the version of keras-mrl that exported the model, or a later one."
        )


_EXPORT_AGAIN = "Export the model again with keras_mrl_export.export_saved_model."

# An exported model's manifest has about 2 KB. JSON may take forty times its size in memory.
LARGEST_MANIFEST_BYTES = 2**18


def parse_manifest(text: str | bytes) -> dict[str, Any]:
    """Return the JSON object of a manifest, with every value of the type that its schema names.

    Types, names and required keys are checked here; the code that uses a value checks the rest.

    Args:
        text: The JSON.

    Raises:
        ManifestError: If it is not a manifest, or one of another schema, or a value has another
            type.

    Examples:
        >>> parse_manifest('{"schema": 2}')
        Traceback (most recent call last):
        ...
        keras_mrl_serving.errors.ManifestError: This client reads manifests of schema 1. Received: \
schema 2. Install the version of keras-mrl that exported the model, or a later one.
    """
    try:
        if len(text) > LARGEST_MANIFEST_BYTES:
            raise ValueError(f"{len(text)} bytes are more than {LARGEST_MANIFEST_BYTES}")
        fields: dict[str, Any] = parse_json(text)
        schema = fields["schema"]
    except (ValueError, TypeError, KeyError) as error:
        raise ManifestError(
            "A manifest is a JSON object with a schema. "
            f"Received: {text!r:.80} ({type(error).__name__}: {error}). {_EXPORT_AGAIN}"
        ) from error
    if type(schema) is not int or schema != SCHEMA:
        raise ManifestError(
            f"This client reads manifests of schema {SCHEMA}. Received: schema {schema!r:.80}. "
            "Install the version of keras-mrl that exported the model, or a later one."
        )
    _check(fields, _rules(), "")
    return fields


@cache
def _rules() -> dict[str, Any]:
    from importlib.resources import files  # slower to import than the rest of this module

    text = (files("keras_mrl_serving") / "manifest.schema.json").read_text("utf-8")
    rules: dict[str, Any] = json.loads(text)
    return rules


def _check(value: Any, rule: Mapping[str, Any], place: str) -> None:
    rule, may_be_null = _resolved(rule)
    if value is None and may_be_null:
        return
    types = rule.get("type", [])
    types = [types] if isinstance(types, str) else types
    if types and not any(_TYPES[name][1](value) for name in types):
        expected = " or ".join(_TYPES[name][0] for name in [*types, *["null"] * may_be_null])
        raise ManifestError(
            f"{place} of a manifest must be {expected}. Received: {value!r:.80}. {_EXPORT_AGAIN}"
        )
    if isinstance(value, str) and not re.search(rule.get("pattern", ""), value):
        raise ManifestError(
            f"{place} of a manifest must be a name of 1 to 200 characters that print. "
            f"Received: {value!r:.80}. {_EXPORT_AGAIN}"
        )
    if isinstance(value, dict):
        rule_of_key, other_rule = rule.get("properties", {}), rule.get("additionalProperties", {})
        prefix = f"{place}." if place else ""
        for key in rule.get("required", ()):
            if key not in value:
                raise ManifestError(
                    f"{prefix}{key} of a manifest must be given. Received: none. {_EXPORT_AGAIN}"
                )
        for key, child in value.items():
            if "$ref" in rule.get("propertyNames", {}):
                _check(key, rule["propertyNames"], f"A key of {place}")
            _check(child, rule_of_key.get(key, other_rule), f"{prefix}{key}")
    elif isinstance(value, list):
        for position, child in enumerate(value):
            _check(child, rule.get("items", {}), f"{place}[{position}]")


def _resolved(rule: Mapping[str, Any]) -> tuple[Mapping[str, Any], bool]:
    """Return the rule that a rule refers to, and whether the value may be null.

    The schema uses `anyOf` only for "this, or null".
    """
    may_be_null = "anyOf" in rule
    rule = rule["anyOf"][0] if may_be_null else rule
    if "$ref" in rule:
        rule = _rules()["$defs"][rule["$ref"].rpartition("/")[2]]
    return rule, may_be_null


def _is_number(value: Any) -> bool:
    largest = sys.float_info.max
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and -largest <= value <= largest


# The types of JSON: how an error names each, and whether a value is of it.
_TYPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "object": ("an object", lambda value: isinstance(value, dict)),
    "array": ("an array", lambda value: isinstance(value, list)),
    "string": ("a string", lambda value: isinstance(value, str)),
    "boolean": ("true or false", lambda value: isinstance(value, bool)),
    "integer": (
        "an integer of 64 bits",
        lambda value: type(value) is int and -(2**63) <= value < 2**63,
    ),
    "number": ("a number", _is_number),
    "null": ("null", lambda value: value is None),
}
