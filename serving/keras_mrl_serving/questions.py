"""The questions a client asks about rows: which flow answers each, and how its rows are split."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from . import classification, flows
from .calls import AskManifest, AskSignatures, Signature
from .cascade.audits import audit_seed, check_audit_rate, draw_audited
from .cascade.policy import CascadePolicy
from .contract import Manifest
from .flows import Flow
from .images import served_image
from .inputs import Inputs, check_inputs
from .options import LARGEST_ANSWER_BYTES, Options
from .prompts import Prompt, put_before, text_of
from .results import Classification, Embedded, Neighbors

T = TypeVar("T")
K = TypeVar("K")  # the facts about a model that a flow needs: its manifest or its signatures

_LARGEST_MESSAGE_BYTES = 2**31 - 1  # protobuf's limit
_ENVELOPE_BYTES = 1024  # names, shapes and lengths beside the rows
_FLOAT_BYTES = 4
_NEIGHBOR_BYTES = 14  # an id as a varint and a score
_CLASS_BYTES = 64  # an id, a probability and a name of ordinary length


@dataclass(frozen=True, eq=False)
class Question(Generic[K, T]):
    """Rows, and the flow that answers a question about them.

    Args:
        inputs: The rows.
        flow: Makes the flow, of the facts about the model and some of the rows.
        needs: The request for those facts.
        specs: Returns the dtypes and shapes of the inputs, by the facts; None for rows that are
            never split.
        answer_row_bytes: Estimates the largest answer about one row, by the facts.
        decodes: Whether the graph decodes the rows as images, by the facts.
        columns: Makes further arrays, by the number of all rows: a value for each row, which the
            flow takes out of its rows and does not send. The same arrays every time, whatever is
            asked again.
        other: Returns the inputs of the other tower, by the facts; None of a model of one.
        prompt: Returns what is put before each text, by the facts; None of a model that does not
            make tokens of texts.
        is_adaptive: Whether the model's own cascade decides, whose holdout is in its manifest.

    Examples:
        >>> embed(np.zeros((3, 4)), dim=2).needs
        AskManifest()
    """

    inputs: Inputs
    flow: Callable[[K, Inputs], Flow[T]]
    needs: AskManifest | AskSignatures
    specs: Callable[[K], Mapping[str, Mapping[str, Any]]] | None
    answer_row_bytes: Callable[[K], int]
    decodes: Callable[[K], bool] = lambda _: False
    columns: Callable[[int], Mapping[str, npt.NDArray[Any]]] = lambda _: {}
    other: Callable[[K], Mapping[str, Mapping[str, Any]] | None] = lambda _: None
    prompt: Callable[[K], str | None] = lambda _: None
    is_adaptive: bool = False

    def parts(self, facts: K, options: Options) -> list[Inputs]:
        """Return the rows in parts, at least one, each within the limits of one call.

        Raises:
            InvalidInputError: If the inputs are not what the model takes.
            UnknownPromptError: If the model lacks the prompt.
            UnreadableImageError: If a model that decodes images gets what is no whole image.
            ImportError: If an image must be turned before it is sent, and Pillow is not installed.
        """
        if self.specs is None:
            return [self.inputs]
        prompt, inputs = self.prompt(facts), self.inputs
        if prompt is not None and isinstance(inputs, str | bytes):
            inputs = [inputs]
        arrays = check_inputs(self.specs(facts), inputs, self.other(facts))
        if prompt:
            arrays = {name: put_before(prompt, array) for name, array in arrays.items()}
        if self.decodes(facts):
            arrays = {name: _as_served(array) for name, array in arrays.items()}
        rows = len(next(iter(arrays.values())))
        size = options.max_batch_size or max(rows, 1)
        if rows > 1:
            sent_bytes = sum(_row_bytes(array) for array in arrays.values())
            for row_bytes, limit in (
                (sent_bytes, _LARGEST_MESSAGE_BYTES),
                (self.answer_row_bytes(facts), LARGEST_ANSWER_BYTES),
            ):
                room = (options.max_message_bytes or limit) - _ENVELOPE_BYTES
                size = min(size, max(1, room // max(row_bytes, 1)))
        arrays |= self.columns(rows)
        if rows <= size:
            return [arrays]
        starts = range(0, rows, size)
        return [{name: a[i : i + size] for name, a in arrays.items()} for i in starts]


def embed(
    inputs: Inputs,
    dim: int,
    other_tower: bool = False,
    exit: str | None = None,
    prompt: str | None = None,
) -> Question[Manifest, npt.NDArray[np.float32]]:
    """Ask for embeddings of one dim, by the tower of queries or by the other, or at an exit.

    Examples:
        >>> embed([[0, 127, 255]], dim=8).inputs
        [[0, 127, 255]]
    """
    return _about_model(
        inputs,
        lambda m, x: flows.embed(m, x, dim, other_tower, exit),
        lambda m: _vector_bytes(m, dim),
        other_tower,
        prompt,
    )


def embed_with_fingerprint(
    inputs: Inputs,
    dim: int,
    other_tower: bool = False,
    exit: str | None = None,
    prompt: Prompt = None,
) -> Question[Manifest, Embedded]:
    """Ask for embeddings of one dim, and for the fingerprint of their model.

    Examples:
        >>> embed_with_fingerprint([[0, 127, 255]], dim=8).inputs
        [[0, 127, 255]]
    """
    return _about_model(
        inputs,
        lambda m, x: flows.embed_with_fingerprint(m, x, dim, other_tower, exit),
        lambda m: _vector_bytes(m, dim),
        other_tower,
        prompt,
    )


def classify(
    inputs: Inputs, dim: int, exit: str | None = None
) -> Question[Manifest, Classification]:
    """Ask for the classes of one dim, at an exit or at the last.

    Examples:
        >>> classify([[0, 127, 255]], dim=8).inputs
        [[0, 127, 255]]
    """
    return _about_model(
        inputs, lambda m, x: classification.classify(m, x, dim, exit), _classes_bytes
    )


def regress(inputs: Inputs, dim: int) -> Question[Manifest, npt.NDArray[np.float32]]:
    """Ask a regressor for the values of one dim.

    Examples:
        >>> regress([[0, 127, 255]], dim=8).inputs
        [[0, 127, 255]]
    """
    return _about_model(
        inputs,
        lambda m, x: flows.regress(m, x, dim),
        lambda m: _FLOAT_BYTES * m.check_values(),
    )


_AUDITED = ""  # no input has this name


def classify_adaptive(
    inputs: Inputs,
    policy: CascadePolicy | None = None,
    rate: float = 0.0,
    seed: int | np.random.Generator | None = None,
) -> Question[Manifest, Classification]:
    """Ask for the classes by the model's own policy, or by the caller's.

    Args:
        inputs: The rows.
        policy: None for the model's own.
        rate: The share of rows that are run to the end as well.
        seed: Draws them.

    Raises:
        ValueError: If `rate` is no share, or `seed` is none.

    Examples:
        >>> classify_adaptive([[0, 127, 255]]).inputs
        [[0, 127, 255]]
    """
    rate = check_audit_rate(rate)
    drawing = audit_seed(seed)

    def columns(num_rows: int) -> dict[str, npt.NDArray[Any]]:
        return {_AUDITED: draw_audited(num_rows, rate, drawing)} if rate else {}

    def flow(manifest: Manifest, part: Any) -> Flow[Classification]:
        rows = {name: array for name, array in part.items() if name != _AUDITED}
        audited = part.get(_AUDITED)
        if policy is None:
            return classification.classify_adaptive(manifest, rows, audited)
        return classification.classify_by(manifest, rows, policy, audited)

    if policy is None:
        question = _about_model(inputs, flow, _classes_bytes)
    else:
        question = _about_model(
            inputs,
            flow,
            lambda m: max(
                _FLOAT_BYTES * m.width, _FLOAT_BYTES * (m.num_classes or 0) + _classes_bytes(m)
            ),
        )
    return replace(question, columns=columns, is_adaptive=policy is None)


def search(
    embeddings: Inputs, dim: int | None = None, encoder: str | None = None
) -> Question[Manifest, Neighbors]:
    """Ask an index for the neighbours of embeddings.

    Examples:
        >>> search(np.zeros((3, 8))).inputs.shape
        (3, 8)
    """
    return Question(
        embeddings,
        lambda m, x: flows.search(m, x, dim, encoder),
        AskManifest(),
        lambda m: flows.embedding_spec(m, dim),
        _neighbors_bytes,
    )


def retrieve(inputs: Inputs, prompt: Prompt = ...) -> Question[Manifest, Neighbors]:
    """Ask a model that holds encoder and index for the neighbours of inputs.

    Examples:
        >>> retrieve([[0, 127, 255]]).inputs
        [[0, 127, 255]]
    """
    return _about_model(inputs, flows.retrieve, _neighbors_bytes, prompt=prompt)


def predict(
    inputs: Inputs, signature: str, outputs: tuple[str, ...] = ()
) -> Question[Mapping[str, Signature], dict[str, npt.NDArray[Any]]]:
    """Ask any signature of any model. Its inputs are never split: they need not be rows.

    Examples:
        >>> predict([[1.0]], "serving_default").needs
        AskSignatures()
    """
    return Question(
        inputs,
        lambda signatures, x: flows.predict(signatures, x, signature, outputs),
        AskSignatures(),
        None,
        lambda _: 0,
    )


def same_interface(one: Manifest, other: Manifest) -> bool:
    """Whether two models take the same calls, and answer with the same outputs.

    Examples:
        >>> one = Manifest(name="birds", kind="encoder", fingerprint="5e1f", dims=(8,), width=8,
        ...     inputs={}, made_with={})
        >>> from dataclasses import replace
        >>> same_interface(one, replace(one, fingerprint="c0de"))
        True
        >>> same_interface(one, replace(one, dims=(4, 8)))
        False
    """
    names = (
        *("kind", "dims", "inputs", "other_tower", "prompts", "activation"),
        *("num_classes", "num_values", "top_k", "labels", "funnel", "exits"),
    )
    return _stages(one) == _stages(other) and all(
        getattr(one, name) == getattr(other, name) for name in names
    )


def _stages(manifest: Manifest) -> list[tuple[Any, ...]] | None:
    """Return what an answer of the cascade is read by: thresholds are the server's alone."""
    cascade = manifest.adaptive_cascade
    if cascade is None:
        return None
    stages = cascade.get("exit_stages", cascade.get("stages", []))
    return [tuple(stage.get(key) for key in ("exit", "dim", "relative_cost")) for stage in stages]


def _about_model(
    inputs: Inputs,
    flow: Callable[[Manifest, Inputs], Flow[T]],
    answer_row_bytes: Callable[[Manifest], int],
    other_tower: bool = False,
    prompt: Prompt = None,
) -> Question[Manifest, T]:
    def text(manifest: Manifest) -> str | None:
        tower = manifest.tower(other_tower)
        put = text_of(prompt, tower)
        return None if tower.preprocessor is None else put

    return Question(
        inputs,
        flow,
        AskManifest(),
        lambda m: m.tower(other_tower).inputs,
        answer_row_bytes,
        lambda m: m.tower(other_tower).decoder is not None,
        other=lambda m: m.tower(other_tower).other_inputs,
        prompt=text,
    )


def _as_served(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The bytes of images as a model that decodes them must get them; numbers as they are."""
    if array.dtype.kind not in "SUTO":
        return array
    images = np.empty(array.shape, object)
    for row, data in enumerate(array.ravel().tolist()):
        images.flat[row] = served_image(data, f"row {row}")
    return images


def _vector_bytes(manifest: Manifest, dim: int) -> int:
    return _FLOAT_BYTES * manifest.check_dim(dim)


def _classes_bytes(manifest: Manifest) -> int:
    return _CLASS_BYTES * (manifest.top_k or 1)


def _neighbors_bytes(manifest: Manifest) -> int:
    k: Any = (manifest.funnel or {}).get("k", 1)
    return _NEIGHBOR_BYTES * int(k)


def _row_bytes(array: npt.NDArray[Any]) -> int:
    """Return about how many bytes the largest row has: strings differ in length, numbers do not."""
    if array.dtype.kind in "OSUT":
        return max(map(_string_bytes, array.ravel().tolist()), default=0) * array[:1].size
    return array[:1].nbytes


def _string_bytes(string: str | bytes) -> int:
    return len(string.encode() if isinstance(string, str) else string) + 5  # for the length itself
