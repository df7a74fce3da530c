"""Flows driven by a function in place of a model."""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pytest

from keras_mrl_serving.errors import KerasMrlError
from keras_mrl_serving.flows import Arrays, Call, Flow
from keras_mrl_serving.results import Classification

Array = npt.NDArray[Any]
Model = Callable[[Call], Arrays]
T = TypeVar("T")

ROWS = np.random.default_rng(0).normal(size=(40, 4))


def drive(flow: Flow[T], model: Model) -> tuple[T, list[Call]]:
    """Answer every call of a flow; returns its result and the calls."""
    calls = []
    try:
        call = next(flow)
        while True:
            assert isinstance(call, Call)
            calls.append(call)
            call = flow.send(model(call))
    except StopIteration as done:
        return done.value, calls


def columns(answer: Classification) -> dict[str, Array]:
    return {name: column for name, column in vars(answer).items() if column is not None}


def with_value(model: Model, name: str, value: object) -> Model:
    """The model, of whose answers row 3 holds another value."""

    def changed(call: Call) -> Arrays:
        answer = {n: np.array(a) for n, a in model(call).items()}
        if name in answer:
            answer[name][3] = value
        return answer

    return changed


def refused_unasked(flow: Flow[Any], error: type[KerasMrlError]) -> None:
    """Assert that a flow raises just this error before it asks a server anything."""
    with pytest.raises(error) as caught:
        next(flow)
    assert type(caught.value) is error
