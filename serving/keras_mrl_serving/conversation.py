"""What one client knows of its model, and how it comes to an answer, without any network in it.

A *talk* is a generator that yields envelopes and is sent replies. An answer takes *rounds* of
talks, which may go on side by side; `Client` and `AsyncClient` are the two ways to run a round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np

from . import flows
from .calls import AskManifest, AskSignatures, Call, Envelope, Reply, checked_label
from .contract import Manifest
from .errors import (
    DeadlineError,
    InvalidInputError,
    KerasMrlError,
    ManifestError,
    NoCascadeError,
    NoHeadError,
    NoIndexError,
    ServerUnavailableError,
    SignatureNotFoundError,
    UnknownDimError,
    VersionChangedError,
    VersionNotFoundError,
    failed,
)
from .flows import Flow
from .options import Options
from .questions import Question, asked_alike
from .results import Partial, joined

# What a client has learned of the versions of its model.

_MOST_KEPT = 8  # more than two versions at once are rare


class Knowledge:
    """Manifests and signatures by version; any number of threads may share one.

    Attributes:
        version: The last that answered a call to the newest; None before the first answer.

    Examples:
        >>> from keras_mrl_serving.calls import AskSignatures
        >>> knowledge = Knowledge()
        >>> knowledge.keep(AskSignatures(), 3, {"embed_8": ...})
        >>> knowledge.of(AskSignatures(), 3)
        {'embed_8': Ellipsis}
        >>> knowledge.of(AskSignatures()) is None  # nothing has answered yet
        True
    """

    def __init__(self) -> None:
        self.version: int | None = None
        self._kept: dict[tuple[type, int], Any] = {}

    def of(self, about: AskManifest | AskSignatures, version: int | None = None) -> Any:
        """Return what is kept about a version, or about the last that answered; None if nothing."""
        version = self.version if version is None else version
        return None if version is None else self._kept.get((type(about), version))

    def keep(self, about: AskManifest | AskSignatures, version: int | None, known: object) -> None:
        """Remember what a version said of itself."""
        if version is None:
            return
        if len(self._kept) >= _MOST_KEPT:
            self._kept = {}
        self._kept[type(about), version] = known


# Talks that may go on side by side: what a conversation hands to whoever can carry envelopes.

T = TypeVar("T")
# Yields what is to be sent, is sent what came back or thrown the error, and returns its result.
Talk = Generator[Envelope, Reply[Any], T]
Rounds = Generator["Round", None, T]


class Round:
    """Talks that may go on side by side, and what came of each.

    Whoever runs a round runs every talk to its end and hands the outcome to `receive`; once one
    has failed, talks that were not begun may be left out.

    Args:
        talks: What is to be run, each under a number.
        received: Called with each result, after the number of its talk.

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
        self, talks: dict[int, Talk[Any]], received: Callable[[int, Any], object] = lambda *_: None
    ) -> None:
        self.talks = talks
        self.answers: dict[int, Any] = {}
        self.errors: dict[int, KerasMrlError] = {}
        self.stopped = False
        self._received = received

    @property
    def failed(self) -> bool:
        """Whether a talk has failed, so that none needs to be begun."""
        return bool(self.errors)

    def stop(self) -> None:
        """Let no talk send anything more: nobody waits for the answer."""
        self.stopped = True

    def receive(self, number: int, outcome: object) -> None:
        """Take what came of a talk: its result, or the error it raised."""
        if isinstance(outcome, KerasMrlError):
            self.errors[number] = outcome
        else:
            self.answers[number] = outcome
            self._received(number, outcome)


Progress = Callable[[int, int], object]  # rows answered, rows asked

# What may be wrong only because the manifest that is kept is no longer the model's.
_PERHAPS_STALE = (
    InvalidInputError,
    ManifestError,
    NoCascadeError,
    NoHeadError,
    NoIndexError,
    SignatureNotFoundError,
    UnknownDimError,
)
_TURNS = 2  # threads that share a client move the turn on, so one round may miss a replica


class Conversation:
    """What one client knows of its model, and the order in which it asks.

    One conversation serves any number of threads or tasks at once.

    Args:
        target: Where the server is, as errors name it.
        model: Name of the model.
        options: Budget, batch and message sizes.
        replicas: How many servers take turns; a version one has not got is asked of the others.
        clock: Seconds since some moment.
        label: The label of the version that answers; None for the newest.

    Examples:
        >>> from keras_mrl_serving import questions
        >>> conversation = Conversation("localhost:8500", "birds", Options())
        >>> round = next(conversation.ask(questions.embed([[0, 127, 255]], dim=8)))
        >>> next(round.talks[0]).signature  # what the model is comes first
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
    ) -> None:
        self._label = checked_label(label)
        self._replicas = replicas
        self._target = target
        self._model = model
        self._options = options
        self._clock = clock
        self._knowledge = Knowledge()

    def run(self, flow: Flow[T]) -> Rounds[T]:
        """Run a flow that needs no knowledge and has no rows, such as `flows.status()`."""
        answer: T = (yield from self._alone(self._talk(flow, None, self._deadline())))[0]
        return answer

    def describe(self) -> Rounds[Manifest]:
        """Ask what the model is now, and remember it."""
        return (yield from self._learn(AskManifest(), self._deadline()))

    def ask(self, question: Question[Any, T], progress: Progress | None = None) -> Rounds[T]:
        """Answer a question; all its calls are answered by the version that answered the first.

        If that version goes away meanwhile, the answer starts over once.

        Args:
            question: What is asked.
            progress: Called with the rows answered so far and all rows.

        Raises:
            KerasMrlError: As the transport raised it, with `partial` where rows were answered.
            VersionChangedError: If the version went away twice.
        """
        deadline = self._deadline()
        try:
            return (yield from self._ask(question, progress, deadline))
        except VersionNotFoundError as gone:
            self._knowledge.version = None
            # Many parts have the whole budget each.
            deadline = deadline if gone.partial is None else self._deadline()
        try:
            return (yield from self._ask(question, progress, deadline))
        except VersionNotFoundError as error:
            self._knowledge.version = None
            if error.version is None:  # no version had begun: it is the label that has none
                raise
            raise self._changed(error) from error

    def _ask(
        self, question: Question[Any, T], progress: Progress | None, deadline: float
    ) -> Rounds[T]:
        """Ask by what is known; where that does not fit, by what the version that answered says."""
        kept = self._knowledge.of(question.learn)
        known = kept or (yield from self._learn(question.learn, deadline))
        try:
            return (yield from self._ask_by(known, question, progress, deadline))
        except _PERHAPS_STALE as error:
            version = error.version
            if version is not None and isinstance(known, Manifest):
                fresh: Any = yield from self._alone(self._manifest_of(version, deadline))
            elif kept is not None:
                fresh = yield from self._learn(question.learn, deadline)
            else:
                raise
            if fresh == known:
                raise
        return (yield from self._ask_by(fresh, question, progress, deadline, version))

    def _ask_by(
        self,
        known: Any,
        question: Question[Any, T],
        progress: Progress | None,
        deadline: float,
        version: int | None = None,
    ) -> Rounds[T]:
        parts = question.parts(known, self._options)
        talk = self._talk(question.flow(known, parts[0]), version, deadline)
        first, version = yield from self._alone(talk)
        current = yield from self._known_of(version, known, question, deadline)
        if current is not known:  # the version that answered is asked otherwise: ask it so
            parts = question.parts(current, self._options)
            talk = self._talk(question.flow(current, parts[0]), version, deadline)
            first, version = yield from self._alone(talk)
        if len(parts) == 1:
            if progress:
                progress(_rows(parts[0]), _rows(parts[0]))
            return first
        return (yield from self._ask_rest(current, question, parts, first, version, progress))

    def _known_of(
        self, version: int | None, known: Any, question: Question[Any, T], deadline: float
    ) -> Rounds[Any]:
        """Return what the version that answered says of itself; `known` if it is asked alike."""
        kept = self._knowledge.of(question.learn, version)
        if version is None or kept is known or not isinstance(known, Manifest):
            return known
        manifest: Manifest = yield from self._alone(self._manifest_of(version, deadline))
        return known if asked_alike(manifest, known) else manifest

    def _ask_rest(
        self,
        known: Any,
        question: Question[Any, T],
        parts: list[Any],
        first: T,
        version: int | None,
        progress: Progress | None,
    ) -> Rounds[T]:
        """The parts after the first, side by side, to the version that answered the first."""
        rows = [_rows(part) for part in parts]
        total, done = sum(rows), 0
        answers: dict[int, T] = {}

        def take(part: int, answered: tuple[T, object]) -> None:
            nonlocal done
            answers[part] = answered[0]
            done += rows[part]
            if progress:
                progress(done, total)

        take(0, (first, version))
        for again in (True, False):
            missing = [i for i in range(len(parts)) if i not in answers]
            talks = {i: self._talk(question.flow(known, parts[i]), version, None) for i in missing}
            current = Round(talks, take)
            yield current
            if not current.failed:
                return joined([answers[i] for i in range(len(parts))])
            error = next(iter(current.errors.values()))
            if not again or not isinstance(error, ServerUnavailableError):
                break
        starts = np.cumsum([0, *rows])
        parts_done = sorted(answers)
        which = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in parts_done])
        answer: Any = joined([answers[i] for i in parts_done])
        error.partial = Partial(which, answer)
        raise error

    def _alone(self, talk: Talk[T]) -> Rounds[T]:
        alone = Round({0: talk})
        yield alone
        if alone.failed:
            raise alone.errors[0]
        answer: T = alone.answers[0]
        return answer

    def _talk(
        self, flow: Flow[T], version: int | None, deadline: float | None
    ) -> Talk[tuple[T, int | None]]:
        """Run a flow; its calls after the first go to the version that answered the first.

        A version that is given answers the first too. Without a deadline the flow has the whole
        budget from its own beginning.
        """
        deadline = self._deadline() if deadline is None else deadline
        answer: Any = None
        while True:
            try:
                request = flow.send(answer)
            except StopIteration as done:
                return done.value, version
            except KerasMrlError as error:  # the flow's own, about the answer it was sent
                error.version = version
                raise
            if isinstance(request, AskManifest):
                answer = yield from self._manifest_of(version, deadline)
                continue
            reply = yield from self._send(request, version, deadline)
            answer = reply.answer
            if version is None and reply.version is not None:
                version = self._knowledge.version = reply.version

    def _send(self, request: Any, version: int | None, deadline: float) -> Talk[Reply[Any]]:
        """Send one call; one that names a version, in turn to replicas until one has it."""
        for _ in range(_TURNS * (self._replicas - 1) if version is not None else 0):
            with suppress(VersionNotFoundError):
                return (yield self._envelope(request, version, deadline))
        return (yield self._envelope(request, version, deadline))

    def _manifest_of(self, version: int | None, deadline: float) -> Talk[Manifest]:
        kept: Manifest | None = self._knowledge.of(AskManifest(), version)
        if kept is not None:
            return kept
        manifest, answered = yield from self._talk(flows.describe(), version, deadline)
        self._knowledge.keep(AskManifest(), answered, manifest)
        return manifest

    def _envelope(self, request: Any, version: int | None, deadline: float) -> Envelope:
        remaining_s = deadline - self._clock()
        budget = remaining_s, self._options.timeout_s
        envelope = Envelope(self._model, version, request, *budget, self._label)
        if remaining_s <= 0:
            raise failed(DeadlineError, envelope, self._target, "no time left for the next call")
        return envelope

    def _deadline(self) -> float:
        return self._clock() + self._options.timeout_s

    def _learn(self, about: AskManifest | AskSignatures, deadline: float) -> Rounds[Any]:
        flow: Flow[Any] = flows.describe() if isinstance(about, AskManifest) else flows.signatures()
        known, version = yield from self._alone(self._talk(flow, None, deadline))
        self._knowledge.keep(about, version, known)
        return known

    def _changed(self, error: VersionNotFoundError) -> KerasMrlError:
        call, timeout_s = Call(error.signature or "", {}), self._options.timeout_s
        envelope = Envelope(self._model, error.version, call, 0.0, timeout_s)
        received = "the version that began the answer was gone before its end, twice,"
        changed = failed(VersionChangedError, envelope, self._target, received)
        if error.partial is not None:
            changed.partial = error.partial
        return changed


def _rows(part: Any) -> int:
    return len(next(iter(part.values())))
