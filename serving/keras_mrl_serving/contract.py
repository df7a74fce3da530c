"""The serving contract: the names of signatures, the values they take, and the manifest.

There is one signature per dim, since TensorFlow Serving computes every output of a signature, also
those that a client filters out. The manifest travels inside the model, in its signature `describe`,
so a client needs nothing but the server's address.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from .errors import (
    ManifestError,
    NoCascadeError,
    NoHeadError,
    NoIndexError,
    NoOtherTowerError,
    UnknownDimError,
    UnknownExitError,
    UnknownPromptError,
)
from .integers import as_int, check_dims, is_positive_integer
from .manifest_schema import EXPORT_AGAIN, SCHEMA, parse_manifest
from .manifest_schema import LARGEST_MANIFEST_BYTES as LARGEST_MANIFEST_BYTES

DEFAULT_MODEL_NAME = "default"  # what tensorflow_model_server calls a model without --model_name
MANIFEST_FILE = "assets.extra/keras_mrl.json"

DESCRIBE = "describe"
FEATURES = "features"
CLASSIFY_ADAPTIVE = "classify_adaptive"
SERVING_DEFAULT = "serving_default"
SEARCH = "search"
RETRIEVE = "retrieve"

MODEL_ID = "model_id"  # an output of every signature that has rows, but of `serving_default`
LAST_EXIT = "last"  # what a model with exits calls the one that every backbone has


def embed(dim: int, exit: str | None = None) -> str:
    """Return the name of the signature that embeds at `dim`, at an exit or at the last.

    Examples:
        >>> embed(8), embed(8, "conv4_block6_out")
        ('embed_8', 'embed_conv4_block6_out_8')
    """
    return _at("embed", dim, exit)


def _at(family: str, dim: int, exit: str | None) -> str:
    return f"{family}_{dim}" if exit in (None, LAST_EXIT) else f"{family}_{exit}_{dim}"


def embed_other(dim: int) -> str:
    """Return the name of the signature that embeds rows of the other tower at `dim`.

    Examples:
        >>> embed_other(8)
        'embed_other_8'
    """
    return f"embed_other_{dim}"


def classify(dim: int, exit: str | None = None) -> str:
    """Return the name of the signature that classifies at `dim`, at an exit or at the last.

    Examples:
        >>> classify(8), classify(8, "conv4_block6_out")
        ('classify_8', 'classify_conv4_block6_out_8')
    """
    return _at("classify", dim, exit)


def regress(dim: int, exit: str | None = None) -> str:
    """Return the name of the signature that answers with a regressor's values, as `classify`.

    Examples:
        >>> regress(8), regress(8, "conv4_block6_out")
        ('regress_8', 'regress_conv4_block6_out_8')
    """
    return _at("regress", dim, exit)


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


# `embed_other_8` is of the other tower, `classify_adaptive` of the cascade, `embed_8` of a dim.
_EXIT_NAME = re.compile(r"(?!(other|adaptive|[0-9]+)\Z)[A-Za-z0-9.][A-Za-z0-9_.-]{0,99}", re.ASCII)


def is_exit_name(name: str) -> bool:
    """Whether an exit called `name` can be a part of the name of a signature.

    Examples:
        >>> is_exit_name("conv4_block6_out"), is_exit_name("other"), is_exit_name("conv4/out")
        (True, False, False)
    """
    return _EXIT_NAME.fullmatch(name) is not None


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
        cascade: The adaptive policy over dims, as `CascadePolicy.to_json` writes it.
        exits: Where rows may leave the backbone, shallow to deep, the last one at the end: objects
            with `name`, `layer`, `parameters`, `multiply_adds` and `milliseconds`; None of a model
            without exits.
        exit_cascade: The adaptive policy over exits and dims; `cascade` is None then.
        funnel: The schedule of an index.
        decoder: Settings by which the graph decodes images.
        preprocessor: Settings by which the graph makes tokens of texts, and `prompts`, name to the
            text that a client puts before each text; None of a model that takes its inputs as
            they are. With it the one input is of strings.
        prompt: The prompt that the rows of an index were embedded with, as text; None without one.
        other_tower: `inputs`, `decoder` and `preprocessor` of the tower that galleries go through,
            where queries go through another; None of a model of one tower. `fingerprint` is of
            both together.
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
    exits: tuple[Mapping[str, Any], ...] | None = None
    exit_cascade: Mapping[str, Any] | None = None
    funnel: Mapping[str, Any] | None = None
    decoder: Mapping[str, Any] | None = None
    preprocessor: Mapping[str, Any] | None = None
    prompt: str | None = None
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
                f"Received: model_id={self.model_id!r}. {EXPORT_AGAIN}"
            )
        self._check_exits()
        _check_preprocessor("preprocessor", self.preprocessor, self.inputs)
        if self.other_tower is not None:
            tower = self.other_tower
            name = "other_tower.preprocessor"
            _check_preprocessor(name, tower.get("preprocessor"), tower["inputs"])

    def _check_exits(self) -> None:
        names = self.exit_names
        is_list = self.exits is None or (
            len(set(names)) == len(names) > 1 and names[-1] == LAST_EXIT
        )
        stages = [] if self.exit_cascade is None else self.exit_cascade["exit_stages"]
        positions = [names.index(name) for name in map(_exit_of, stages) if name in names]
        if (
            not is_list
            or len(positions) < len(stages)
            or positions != sorted(positions)
            or (self.exit_cascade is not None and self.cascade is not None)
        ):
            raise ManifestError(
                "The exits of a manifest have names of their own, shallow to deep, the last is "
                f"{LAST_EXIT!r}, and the stages of its one cascade name them in this order. "
                f"Received: exits={names}, stages at {[*map(_exit_of, stages)]}. {EXPORT_AGAIN}"
            )

    @property
    def exit_names(self) -> tuple[str, ...]:
        """The names of the exits, shallow to deep, the last one included; empty without exits."""
        return tuple(own["name"] for own in self.exits or ())

    @property
    def adaptive_cascade(self) -> Mapping[str, Any] | None:
        """What `classify_adaptive` decides by: `exit_cascade` or `cascade`; None without it."""
        return self.cascade if self.exit_cascade is None else self.exit_cascade

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
        exits = None if manifest.exits is None else tuple(manifest.exits)
        try:
            dims = check_dims(manifest.dims)
            if manifest.width != dims[-1]:
                raise ValueError(f"width={manifest.width} with dims={dims}")
        except ValueError as error:
            raise ManifestError(
                "A manifest names a model's dims and width. "
                f"Received: {str(error).rstrip('.')}. {EXPORT_AGAIN}"
            ) from error
        return replace(manifest, dims=dims, weights=weights, exits=exits)

    def check_dim(self, dim: int) -> int:
        """Return `dim` as an int; raise `UnknownDimError` if the model does not serve it."""
        if not is_positive_integer(dim) or dim not in self.dims:
            raise UnknownDimError(
                "dim must be one of the dims the model serves. "
                f"Received: dim={dim!r} for model {self.name!r}. "
                f"Choose one of {', '.join(map(str, self.dims))}."
            )
        return as_int(dim)

    def check_exit(self, exit: str | None) -> str:
        """Return the name of an exit; raise `UnknownExitError` if the model does not have it.

        Args:
            exit: Its name; None means the last.
        """
        if exit is None or exit == LAST_EXIT or exit in self.exit_names:
            return exit or LAST_EXIT
        raise UnknownExitError(
            "exit must be one of the model's exits. "
            f"Received: exit={exit!r} for model {self.name!r}. "
            f"Choose one of {', '.join(self.exit_names)}."
            if self.exits
            else "Only a model with exits is asked at one. "
            f"Received: exit={exit!r} for model {self.name!r}, which has none. Leave exit out."
        )

    def check_prompt(self, prompt: str | None) -> str:
        """Return the text of a prompt; raise `UnknownPromptError` if the model does not have it.

        Args:
            prompt: Its name; None means no prompt, whose text is empty.
        """
        if prompt is None:
            return ""
        if isinstance(prompt, str) and prompt in self.prompts:
            return self.prompts[prompt]
        raise UnknownPromptError(
            "prompt must be the name of one of the model's prompts. "
            f"Received: prompt={prompt!r} for model {self.name!r}. "
            f"Choose one of {', '.join(self.prompts)}."
            if self.prompts
            else "Only a model with prompts takes one. "
            f"Received: prompt={prompt!r} for model {self.name!r}, which has none. "
            "Leave prompt out."
        )

    def tower(self, other_tower: bool = False) -> Manifest:
        """Return the manifest with `inputs`, `decoder` and `preprocessor` of one tower.

        Its `other_tower` is then that of the queries.

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
        of_galleries: dict[str, Any] = {name: self.other_tower.get(name) for name in _OF_A_TOWER}
        of_queries = {name: getattr(self, name) for name in _OF_A_TOWER}
        return replace(self, **of_galleries, other_tower=of_queries)

    @property
    def prompts(self) -> Mapping[str, str]:
        """What may be put before a text, by name; empty of a model without prompts."""
        return (self.preprocessor or {}).get("prompts", {})

    @property
    def gallery_prompts(self) -> Mapping[str, str]:
        """What may be put before a text of a gallery: the prompts of the tower it goes through."""
        return self.tower(self.other_tower is not None).prompts

    @property
    def other_inputs(self) -> Mapping[str, Mapping[str, Any]] | None:
        """The inputs of the other tower; None of a model of one."""
        return None if self.other_tower is None else self.other_tower["inputs"]

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
        if self.adaptive_cascade is None:
            raise NoCascadeError(
                "classify_adaptive needs a cascade policy. "
                f"Received: model {self.name!r}, exported without one. Learn one on a holdout "
                "with CascadePolicy.learn, then give it as classify_adaptive(x, policy=policy), "
                "or export again with export_saved_model(..., policy=policy)."
            )


_OF_A_TOWER = ("inputs", "decoder", "preprocessor")


def _check_preprocessor(
    name: str, preprocessor: Mapping[str, Any] | None, inputs: Mapping[str, Mapping[str, Any]]
) -> None:
    if preprocessor is not None and [spec["dtype"] for spec in inputs.values()] != ["string"]:
        received = ", ".join(f"{name} of {spec['dtype']}" for name, spec in inputs.items())
        raise ManifestError(
            f"A model with {_with_article(name)} takes texts, as its one input. "
            f"Received: {received or 'no input'}. {EXPORT_AGAIN}"
        )


def _with_article(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def _exit_of(stage: Mapping[str, Any]) -> str:
    return stage["exit"] or LAST_EXIT


def _check_one_of(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ManifestError(
            f"{name} must be one of {', '.join(choices)}. Received: {name}={value!r}. "
            "Install the version of keras-mrl that exported the model, or a later one."
        )
