"""What one client knows of its model, and how it comes to an answer, without any network in it.

A *talk* is a generator that yields envelopes and is sent replies. An answer takes *rounds* of
talks, which may go on side by side; `Client` and `AsyncClient` are the two ways to run a round.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import numpy as np

from . import flows
from ._failures import failed
from .calls import AskManifest, AskSignatures, Call, Envelope
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
)
from .flows import Flow
from .options import Options
from .questions import Question, asked_alike
from .results import Partial, joined
from .rounds import Round, Rounds, Talk

T = TypeVar("T")
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
_MOST_KEPT = 8  # versions whose manifests are kept; more than two at once are rare


class Conversation:
    """What one client knows of its model, and the order in which it asks.

    One conversation serves any number of threads or tasks at once.

    Args:
        target: Where the server is, as errors name it.
        model: Name of the model.
        options: Budget, batch and message sizes.
        clock: Seconds since some moment.

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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._target = target
        self._model = model
        self._options = options
        self._clock = clock
        self._version: int | None = None  # the last that answered a call to the newest
        self._kept: dict[tuple[type, int], Any] = {}

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
            self._version = None
            if gone.partial is not None:  # many parts, each with the whole budget
                deadline = self._deadline()
        try:
            return (yield from self._ask(question, progress, deadline))
        except VersionNotFoundError as error:
            self._version = None
            raise self._changed(error) from error

    def _ask(
        self, question: Question[Any, T], progress: Progress | None, deadline: float
    ) -> Rounds[T]:
        """Ask by what is known; where that is refused and may be stale, by what is learned anew."""
        kept = self._known(question.learn)
        known = kept or (yield from self._learn(question.learn, deadline))
        try:
            return (yield from self._ask_by(known, question, progress, deadline))
        except _PERHAPS_STALE:
            if kept is None:
                raise
            fresh = yield from self._learn(question.learn, deadline)
            if fresh == kept:
                raise
        return (yield from self._ask_by(fresh, question, progress, deadline))

    def _ask_by(
        self, known: Any, question: Question[Any, T], progress: Progress | None, deadline: float
    ) -> Rounds[T]:
        parts = question.parts(known, self._options)
        talk = self._talk(question.flow(known, parts[0]), None, deadline)
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
        kept = self._known(question.learn, version)
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

        def take(part: int, answer: T) -> None:
            nonlocal done
            answers[part] = answer
            done += rows[part]
            if progress:
                progress(done, total)

        take(0, first)
        for again in (True, False):
            missing = [i for i in range(len(parts)) if i not in answers]
            talks = [self._talk(question.flow(known, parts[i]), version, None) for i in missing]
            current = Round(talks, partial(_take_part, take, missing))
            yield current
            if not current.failed:
                return joined([answers[i] for i in range(len(parts))])
            error = next(iter(current.errors.values()))
            if not again or not isinstance(error, ServerUnavailableError):
                break
        starts = np.cumsum([0, *rows])
        parts_done = sorted(answers)
        which = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in parts_done])
        answered: Any = joined([answers[i] for i in parts_done])
        error.partial = Partial(which, answered)
        raise error

    def _alone(self, talk: Talk[T]) -> Rounds[T]:
        alone = Round([talk])
        yield alone
        if alone.failed:
            raise alone.errors[0]
        answer: T = alone.answers[0]
        return answer

    def _talk(
        self, flow: Flow[T], version: int | None, deadline: float | None
    ) -> Talk[tuple[T, int | None]]:
        """Run a flow; its calls after the first go to the version that answered the first.

        Args:
            flow: What is asked.
            version: The version that must answer from the start; None for the newest.
            deadline: By when; None gives it the whole budget from its own beginning.
        """
        deadline = self._deadline() if deadline is None else deadline
        answer: Any = None
        while True:
            try:
                request = flow.send(answer)
            except StopIteration as done:
                return done.value, version
            if isinstance(request, AskManifest):
                answer = yield from self._manifest_of(version, deadline)
                continue
            reply = yield self._envelope(request, version, deadline)
            answer = reply.answer
            if version is None and reply.version is not None:
                version = self._version = reply.version

    def _manifest_of(self, version: int | None, deadline: float) -> Talk[Manifest]:
        kept: Manifest | None = self._known(AskManifest(), version)
        if kept is not None:
            return kept
        manifest, answered = yield from self._talk(flows.describe(), version, deadline)
        self._keep(AskManifest(), answered, manifest)
        return manifest

    def _envelope(self, request: Any, version: int | None, deadline: float) -> Envelope:
        remaining_s = deadline - self._clock()
        timeout_s = self._options.timeout_s
        envelope = Envelope(self._model, version, request, remaining_s, timeout_s)
        if remaining_s <= 0:
            received = "no time left for the next call"
            raise failed(DeadlineError, envelope, self._target, received)
        return envelope

    def _deadline(self) -> float:
        return self._clock() + self._options.timeout_s

    def _known(self, about: AskManifest | AskSignatures, version: int | None = None) -> Any:
        """Return what is kept about a version, or about the last that answered; None if nothing."""
        version = self._version if version is None else version
        return None if version is None else self._kept.get((type(about), version))

    def _learn(self, about: AskManifest | AskSignatures, deadline: float) -> Rounds[Any]:
        flow: Flow[Any] = flows.describe() if isinstance(about, AskManifest) else flows.signatures()
        known, version = yield from self._alone(self._talk(flow, None, deadline))
        self._keep(about, version, known)
        return known

    def _keep(self, about: AskManifest | AskSignatures, version: int | None, known: object) -> None:
        if version is None:
            return
        if len(self._kept) >= _MOST_KEPT:
            self._kept = {}
        self._kept[type(about), version] = known

    def _changed(self, error: VersionNotFoundError) -> KerasMrlError:
        envelope = Envelope(
            self._model,
            error.version,
            Call(error.signature or "", {}),
            0.0,
            self._options.timeout_s,
        )
        received = "the version that began the answer was gone before its end, twice,"
        changed = failed(VersionChangedError, envelope, self._target, received)
        if error.partial is not None:
            changed.partial = error.partial
        return changed


def _take_part(
    take: Callable[[int, T], None], parts: list[int], number: int, result: tuple[T, object]
) -> None:
    take(parts[number], result[0])


def _rows(part: Any) -> int:
    return len(next(iter(part.values())))
