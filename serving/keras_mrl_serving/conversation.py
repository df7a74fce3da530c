"""How a client comes to an answer: what it knows of its model, and what it asks next. No network.

An answer takes one or several *rounds*. A round holds *talks*, which may go on side by side; a talk
is a generator that yields envelopes and is sent replies. `Client` and `AsyncClient` are two ways to
run a round, and differ in nothing else.

All calls of an answer go to the version that answered the first, and all their rows must carry the
`model_id` of one model, if the manifest names one. The first part of many rows goes alone, because
its answer names the model for all others. If that version goes away meanwhile, or another model
answers under its number, the answer starts over, once.

Rows are split per flow, not per call. A part of a cascade is the features *and* the heads of the
same rows, so the parts done before an error are answers, and memory holds the features of one part.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from copy import copy
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from . import corpus, flows, questions
from .calls import AskManifest, AskSignatures, Call, Envelope, Reply, check_label
from .contract import DESCRIBE, MODEL_ID, Manifest
from .errors import (
    DeadlineError,
    EncoderMismatchError,
    InvalidInputError,
    KerasMrlError,
    ManifestError,
    ModelChangedError,
    NoCascadeError,
    NoHeadError,
    NoIndexError,
    NoOtherTowerError,
    ServerUnavailableError,
    SignatureNotFoundError,
    UnknownDimError,
    UnknownExitError,
    UnknownPromptError,
    VersionChangedError,
    VersionNotFoundError,
    call_error,
)
from .flows import Flow
from .knowledge import Identity, Knowledge
from .options import Options
from .questions import Question, same_interface
from .results import Classification, Partial, join

T = TypeVar("T")
Progress = Callable[[int, int], object]  # rows answered, rows in all
Talk = Generator[Envelope, Reply[Any], T]  # an error of the transport is thrown in, not sent
Rounds = Generator["Round", None, T]


class Round:
    """Talks that may go on side by side, and the result or the error of each.

    The runner of a round runs each talk to its end and hands its outcome to `receive`. Once a talk
    has failed, the runner may leave out talks that have not begun.

    Args:
        talks: The talks by number.
        on_result: Called with the number and the result of each talk that succeeds.

    Attributes:
        stopped: Whether the caller has gone away, so that no talk sends anything more.

    Examples:
        >>> def talk():
        ...     return (yield Envelope("birds", None, AskStatus(), 1.0, 1.0)).answer
        >>> from keras_mrl_serving.calls import AskStatus, Envelope, Reply
        >>> round = Round({0: talk()})
        >>> next(round.talks[0]).model
        'birds'
        >>> round.receive(0, "ready")
        >>> round.answers
        {0: 'ready'}
    """

    def __init__(
        self, talks: dict[int, Talk[Any]], on_result: Callable[[int, Any], object] = lambda *_: None
    ) -> None:
        self.talks = talks
        self.answers: dict[int, Any] = {}
        self.errors: dict[int, KerasMrlError] = {}
        self.stopped = False
        self._on_result = on_result

    def receive(self, number: int, outcome: object) -> None:
        """Note the outcome of a talk: its result, or the error it raised."""
        if isinstance(outcome, KerasMrlError):
            self.errors[number] = outcome
        else:
            self.answers[number] = outcome
            self._on_result(number, outcome)


# Errors that may only mean that the client remembers the manifest of an older version.
_PERHAPS_STALE = (
    EncoderMismatchError,
    InvalidInputError,
    ManifestError,
    NoCascadeError,
    NoHeadError,
    NoIndexError,
    NoOtherTowerError,
    SignatureNotFoundError,
    UnknownDimError,
    UnknownExitError,
    UnknownPromptError,
)
# How often a call to one version may meet every other replica. Threads that share a client move the
# turn on for each other, so one time round may miss a replica.
_TIMES_ROUND = 2


class Conversation:
    """What one client knows of its model, and the order of its calls.

    One conversation serves any number of threads or tasks at once.

    Args:
        target: Address of the server, as errors name it.
        model: Name of the model.
        options: Timeout, batch size and message size.
        replicas: How many servers take turns; a version that one lacks is asked of the others.
        clock: Returns the time in seconds; only differences count.
        label: Label of the version that answers; None for the newest.
        connections: Returns how many connections the transport has made.

    Examples:
        >>> from keras_mrl_serving import questions
        >>> conversation = Conversation("localhost:8500", "birds", Options())
        >>> round = next(conversation.ask(questions.embed([[0, 127, 255]], dim=8)))
        >>> next(round.talks[0]).signature  # the manifest comes first
        'describe'
    """

    def __init__(
        self,
        target: str,
        model: str,
        options: Options,
        replicas: int = 1,
        clock: Callable[[], float] = time.monotonic,
        label: str | None = None,
        connections: Callable[[], int] = lambda: 0,
    ) -> None:
        self._label = check_label(label)
        self._replicas = replicas
        self._target = target
        self._model = model
        self._options = options
        self._clock = clock
        self._knowledge = Knowledge(connections)

    def with_options(self, options: Options) -> Conversation:
        """Return a conversation that shares this one's knowledge, and asks by other options."""
        other = copy(self)
        other._options = options
        return other

    def run(self, flow: Flow[T]) -> Rounds[T]:
        """Run a flow that needs no manifest and has no rows, such as `flows.status()`."""
        answer: T = (yield from self._run_talk(self._talk(flow, None, self._deadline())))[0]
        return answer

    def describe(self) -> Rounds[Manifest]:
        """Read the manifest of the newest version, and remember it."""
        return (yield from self._learn(AskManifest(), self._deadline()))

    def embed_dataset(
        self,
        data: corpus.Corpus,
        dim: int,
        path: str | os.PathLike[str],
        progress: corpus.Progress | None = None,
        manifest: Manifest | None = None,
        other_tower: bool = False,
        exit: str | None = None,
        prompt: str | None = None,
    ) -> Rounds[npt.NDArray[np.float32]]:
        """Embed a corpus window by window into a file: see `Client.embed_dataset`."""
        data = corpus.texts_as_rows(data)
        manifest = manifest or (yield from self.describe())
        dim, at = manifest.check_dim(dim), flows.check_exit(manifest, exit, other_tower)
        tower = manifest.tower(other_tower)
        specs, other, text = tower.inputs, tower.other_inputs, tower.check_prompt(prompt)
        fingerprint = manifest.fingerprint
        total, digest = corpus.count_rows(data), corpus.digest(data, specs, other)
        with corpus.EmbeddingFile(path, dim, fingerprint, digest, other_tower, at, text) as file:
            size = corpus.window_rows(self._options)
            for window in file.missing(corpus.windows(data, specs, size, other)):
                question = questions.embed_with_fingerprint(window, dim, other_tower, exit, prompt)
                file.append((yield from self.ask(question)), window)
                if progress:
                    progress(file.rows, total)
            return file.finish()

    def ask(self, question: Question[Any, T], progress: Progress | None = None) -> Rounds[T]:
        """Answer a question; one model answers all of its calls.

        If its version goes away meanwhile, or another model answers under its number, the answer
        starts over, once.

        Args:
            question: What to ask.
            progress: Called with the number of rows answered so far, and of all rows.

        Raises:
            KerasMrlError: As the transport raised it, with `partial` if rows were answered.
            VersionChangedError: If the answering version went away twice.
            ModelChangedError: If another model answered under its number, twice.
        """
        deadline = self._deadline()
        try:
            return (yield from self._ask(question, progress, deadline))
        except (VersionNotFoundError, ModelChangedError) as error:
            self._knowledge.version = None
            if error.partial is not None:  # each of many parts has the whole timeout
                deadline = self._deadline()
        try:
            return (yield from self._ask(question, progress, deadline))
        except VersionNotFoundError as error:
            self._knowledge.version = None
            if error.version is None:  # no version had answered: it is the label that has none
                raise
            raise self._version_changed(error) from error
        except ModelChangedError:
            self._knowledge.version = None
            raise

    def _ask(
        self, question: Question[Any, T], progress: Progress | None, deadline: float
    ) -> Rounds[T]:
        """Ask by remembered facts; if these may be stale, again by those of the version now."""
        remembered = self._knowledge.get(question.needs)
        facts = remembered or (yield from self._learn(question.needs, deadline))
        try:
            return (yield from self._ask_by(facts, question, progress, deadline))
        except _PERHAPS_STALE as error:
            identity, fresh = None, facts
            if error.version is not None and isinstance(facts, Manifest):
                fresh = yield from self._run_talk(self._read_manifest(error.version, deadline))
                identity = Identity(error.version, fresh.model_id)
                self._knowledge.answered(identity, is_identified=True)
            elif remembered is not None:
                fresh = yield from self._learn(question.needs, deadline)
            if fresh == facts:
                raise
        return (yield from self._ask_by(fresh, question, progress, deadline, identity))

    def _ask_by(
        self,
        facts: Any,
        question: Question[Any, T],
        progress: Progress | None,
        deadline: float,
        identity: Identity | None = None,
    ) -> Rounds[T]:
        """Ask by `facts`, or by those of the model that answers if its interface is another."""
        facts_before = None
        while facts is not facts_before:
            parts = question.parts(facts, self._options)
            talk = self._talk(question.flow(facts, parts[0]), identity, deadline, facts)
            first, identity = yield from self._run_talk(talk)
            facts_before = facts
            facts = yield from self._current_facts(identity, facts, question, deadline)
            if facts is not facts_before and identity is not None:
                identity = Identity(identity.version, facts.model_id)
        if len(parts) > 1:
            answer = yield from self._ask_rest(facts, question, parts, first, identity, progress)
        else:
            answer = first
            if progress:
                progress(_count_rows(parts[0]), _count_rows(parts[0]))
        if self._options.observer is not None and isinstance(facts, Manifest):
            if question.is_adaptive and isinstance(answer, Classification):
                self._options.observer.classified(self._model, facts, answer)
        return answer

    def _current_facts(
        self, identity: Identity | None, facts: Any, question: Question[Any, T], deadline: float
    ) -> Rounds[Any]:
        """Return the manifest of the model that answered, or `facts` if the interface is one."""
        if identity is None or not isinstance(facts, Manifest):
            return facts
        if self._knowledge.get(question.needs, identity) is facts:
            return facts
        manifest: Manifest = yield from self._run_talk(self._manifest_of(identity, deadline))
        return facts if same_interface(manifest, facts) else manifest

    def _ask_rest(
        self,
        facts: Any,
        question: Question[Any, T],
        parts: list[Any],
        first: T,
        identity: Identity | None,
        progress: Progress | None,
    ) -> Rounds[T]:
        """Ask the parts after the first side by side, of the model that answered the first.

        Parts that found no server are asked once more.
        """
        rows = [_count_rows(part) for part in parts]
        total, done = sum(rows), 0
        answers: dict[int, T] = {}

        def take(part: int, result: tuple[T, object]) -> None:
            nonlocal done
            answers[part] = result[0]
            done += rows[part]
            if progress:
                progress(done, total)

        take(0, (first, identity))
        for is_last_try in (False, True):
            missing = [i for i in range(len(parts)) if i not in answers]
            talks = {
                i: self._talk(question.flow(facts, parts[i]), identity, None, facts)
                for i in missing
            }
            current = Round(talks, take)
            yield current
            if not current.errors:
                return join([answers[i] for i in range(len(parts))])
            error = next(iter(current.errors.values()))
            if is_last_try or not isinstance(error, ServerUnavailableError):
                break
        starts = np.cumsum([0, *rows])
        answered = sorted(answers)
        row_numbers = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in answered])
        answer: Any = join([answers[i] for i in answered])
        error.partial = Partial(row_numbers, answer)
        raise error

    def _run_talk(self, talk: Talk[T]) -> Rounds[T]:
        """Return the result of one talk, in a round of its own."""
        round = Round({0: talk})
        yield round
        if round.errors:
            raise round.errors[0]
        answer: T = round.answers[0]
        return answer

    def _talk(
        self,
        flow: Flow[T],
        identity: Identity | None,
        deadline: float | None,
        facts: object = None,
    ) -> Talk[tuple[T, Identity | None]]:
        """Run a flow; return its result and the model that answered.

        Args:
            flow: The flow.
            identity: The model that must answer; None for the one that answers the first call.
            deadline: Time by which the last call must be answered; None for a timeout that begins
                when the flow does.
            facts: What the flow was made by. If it is a manifest, the answers must all carry the
                `model_id` of one model, or all none.
        """
        deadline = self._deadline() if deadline is None else deadline
        manifest = facts if isinstance(facts, Manifest) else None
        answer: Any = None
        while True:
            try:
                request = flow.send(answer)
            except StopIteration as done:
                return done.value, identity
            except KerasMrlError as error:  # raised by the flow about the answer it was sent
                error.version = None if identity is None else identity.version
                raise
            if isinstance(request, AskManifest):
                answer = yield from self._manifest_of(identity, deadline)
                continue
            if manifest is not None and isinstance(request, Call):
                expected_id = manifest.model_id if identity is None else identity.model_id
                request = _asking_model_id(request, expected_id)
            version = None if identity is None else identity.version
            reply = yield from self._send(request, version, deadline)
            answer = reply.answer
            if reply.version is None:
                continue
            answering = Identity(reply.version)
            if manifest is not None and isinstance(request, Call):
                answer = dict(answer)
                model_id = _model_id_in(answer.pop(MODEL_ID, None), request, expected_id)
                answering = Identity(reply.version, model_id)
            if identity is None:
                identity = answering
                self._knowledge.answered(identity, manifest is not None)
            elif answering != identity:
                received = f"an answer of {answering} after one of {identity}"
                raise self._model_changed(received, request, identity.version)

    def _send(self, request: Any, version: int | None, deadline: float) -> Talk[Reply[Any]]:
        """Send one call; a call to one version goes to replica after replica until one has it."""
        for _ in range(_TIMES_ROUND * (self._replicas - 1) if version is not None else 0):
            with suppress(VersionNotFoundError):
                return (yield from self._send_once(request, version, deadline))
        return (yield from self._send_once(request, version, deadline))

    def _send_once(self, request: Any, version: int | None, deadline: float) -> Talk[Reply[Any]]:
        envelope = self._envelope(request, version, deadline)
        start = self._clock()
        try:
            reply = yield envelope
        except KerasMrlError as error:
            self._called(envelope, start, error)
            raise
        self._called(envelope, start)
        if self._clock() > deadline:
            received = "an answer that was decoded too late"
            raise call_error(DeadlineError, envelope, self._target, received)
        return reply

    def _called(self, envelope: Envelope, start: float, error: KerasMrlError | None = None) -> None:
        if self._options.observer is not None:
            self._options.observer.called(envelope, self._clock() - start, error)

    def _manifest_of(self, identity: Identity | None, deadline: float) -> Talk[Manifest]:
        """Return the manifest of a model, as remembered or read anew; None is the newest."""
        remembered: Manifest | None = self._knowledge.get(AskManifest(), identity)
        if remembered is not None:
            return remembered
        version = None if identity is None else identity.version
        manifest = yield from self._read_manifest(version, deadline)
        if identity is not None and identity.model_id != manifest.model_id:
            answering = Identity(identity.version, manifest.model_id)
            received = f"an answer of {identity} and the manifest of {answering}"
            raise self._model_changed(received, Call(DESCRIBE, {}), identity.version)
        return manifest

    def _read_manifest(self, version: int | None, deadline: float) -> Talk[Manifest]:
        """Read the manifest of a version, None for the newest, and remember it."""
        expected = None if version is None else Identity(version)
        connections = self._knowledge.connections()
        manifest, answering = yield from self._talk(flows.describe(), expected, deadline)
        if answering is not None:
            identity = Identity(answering.version, manifest.model_id)
            self._knowledge.put(AskManifest(), identity, manifest, connections)
        return manifest

    def _learn(self, request: AskManifest | AskSignatures, deadline: float) -> Rounds[Any]:
        """Read the manifest or the signatures of the newest version, and remember them."""
        if isinstance(request, AskManifest):
            return (yield from self._run_talk(self._read_manifest(None, deadline)))
        connections = self._knowledge.connections()
        talk = self._talk(flows.signatures(), None, deadline)
        signatures, answering = yield from self._run_talk(talk)
        if answering is not None:
            self._knowledge.put(request, answering, signatures, connections)
        return signatures

    def _envelope(self, request: Any, version: int | None, deadline: float) -> Envelope:
        remaining_s, timeout_s = deadline - self._clock(), self._options.timeout_s
        envelope = Envelope(self._model, version, request, remaining_s, timeout_s, self._label)
        if remaining_s <= 0:
            received = "no time left for the next call"
            raise call_error(DeadlineError, envelope, self._target, received)
        return envelope

    def _deadline(self) -> float:
        return self._clock() + self._options.timeout_s

    def _model_changed(self, received: str, request: Any, version: int) -> KerasMrlError:
        envelope = Envelope(self._model, version, request, 0.0, self._options.timeout_s)
        return call_error(ModelChangedError, envelope, self._target, received)

    def _version_changed(self, error: VersionNotFoundError) -> KerasMrlError:
        call, timeout_s = Call(error.signature or "", {}), self._options.timeout_s
        envelope = Envelope(self._model, error.version, call, 0.0, timeout_s)
        received = "the version that began the answer was gone before its end, twice,"
        changed = call_error(VersionChangedError, envelope, self._target, received)
        if error.partial is not None:
            changed.partial = error.partial
        return changed


def _asking_model_id(call: Call, model_id: int | None) -> Call:
    """Return a call whose answer shows its model; one without an id is asked for all outputs.

    So the id of another model is seen, too, which answers in its place.
    """
    if not call.outputs:
        return call
    return replace(call, outputs=() if model_id is None else (*call.outputs, MODEL_ID))


def _model_id_in(ids: npt.NDArray[Any] | None, call: Call, expected: int | None) -> int | None:
    """Return the id of all rows: None if they have none, 0 if several; `expected` of no rows."""
    rows = _count_rows(call.inputs)
    if ids is None:
        return None if rows else expected
    if ids.dtype.kind not in "iu" or ids.shape != (rows,):
        return 0
    if not rows:
        return expected
    # Compared as bytes: of few rows that takes a tenth of the time of an array of bools.
    return ids.item(0) if ids.tobytes() == ids[:1].tobytes() * rows else 0


def _count_rows(part: Any) -> int:
    return len(next(iter(part.values())))
