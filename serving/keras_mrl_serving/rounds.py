"""Talks that may go on side by side: what a conversation hands to whoever can carry envelopes."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, TypeVar

from .calls import Envelope, Reply
from .errors import KerasMrlError

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
