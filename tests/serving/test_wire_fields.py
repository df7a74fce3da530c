"""Answers of a server that lies: measured as bytes, refused by name, in little memory and time."""

import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keras_mrl_serving._wire import METADATA
from keras_mrl_serving.aio import AsyncClient
from keras_mrl_serving.calls import Signature, VersionStatus
from keras_mrl_serving.client import Client
from keras_mrl_serving.contract import Manifest
from keras_mrl_serving.errors import KerasMrlError
from keras_mrl_serving.options import Options
from keras_mrl_serving.results import Classification, Neighbors
from tests.helpers.faulty_server import open_client
from tests.helpers.hostile_answers import (
    ASKS,
    MANIFEST,
    NUM_CLASSES,
    TOP_K,
    Case,
    HostileServer,
    K,
    case_of,
    made_cases,
)

SOAK = bool(os.environ.get("KERAS_MRL_SOAK"))
MADE = range(0, len(made_cases()), 1 if SOAK else 30)
RANDOM = range(10_000 if SOAK else 200)
MOST_BYTES = 16 * 2**20  # above twice the memory of the right answer, which has two rows
TIMEOUT_S = 3.0


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    with HostileServer() as server:
        yield server.target


@dataclass
class Course:
    """Clients that ask one case after another, and what came of it."""

    target: str
    header: dict[str, str] = field(default_factory=dict)
    outcomes: Counter[str] = field(default_factory=Counter)
    most_bytes: tuple[int, str] = (0, "")
    longest_text: str = ""
    longest_s: tuple[float, str] = (0.0, "")

    def run(self, names: Iterator[str]) -> None:
        with self.open(Client) as blocking, self.open(AsyncClient) as awaited:
            for client in (blocking, awaited):
                for ask, (method, _, _) in ASKS.items():  # connections are made, caches are warm
                    assert_well_formed(ask, method(client))
            for number, name in enumerate(names):
                case = case_of(name)
                if case.damaged_call not in ("describe", METADATA):
                    self.ask((blocking, awaited)[number % 2], name, case, case.ask)
                    continue
                with self.open((Client, AsyncClient)[number % 2]) as believer:
                    for ask in (case.ask, *ASKS):  # the others believe what was said
                        self.ask(believer, name, case, ask)

    def open(self, kind: type[Any]) -> AbstractContextManager[Any]:
        options = Options(timeout_s=TIMEOUT_S, metadata=lambda: self.header)
        return open_client(kind, self.target, options)

    def ask(self, client: Any, name: str, case: Case, ask: str) -> None:
        self.header["case"] = name
        before, began = start_of_peak(), time.monotonic()
        try:
            answer = ASKS[ask][0](client)
        except KerasMrlError as error:
            outcome = type(error).__name__
            self.longest_text = max(self.longest_text, str(error), key=len)
        except Exception as error:
            raise AssertionError(f"{name}: {ask}: {case.name}: {error!r}") from error
        else:
            outcome = "answer"
            if ask == case.ask:
                assert_well_formed(ask, answer)
        took_s, grown = time.monotonic() - began, peak_bytes() - before
        self.header.clear()
        self.outcomes[outcome] += 1
        self.longest_s = max(self.longest_s, (took_s, case.name))
        self.most_bytes = max(self.most_bytes, (grown, case.name))


def start_of_peak() -> int:
    """Begin to measure the peak anew; return the resident bytes now."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def assert_well_formed(ask: str, answer: Any) -> None:
    """What a method returns is of the form that it promises, whatever the server sent."""
    if isinstance(answer, Classification):
        assert answer.class_ids.shape == answer.probabilities.shape == (2, TOP_K), ask
        assert answer.class_ids.min() >= 0
        assert answer.class_ids.max() < NUM_CLASSES
        assert np.isfinite(answer.probabilities).all()
        assert np.isfinite(answer.confidence).all()
        assert np.isin(answer.dim, MANIFEST.dims).all()
        assert answer.labels is not None
        assert all(isinstance(label, str) for label in answer.labels.flat)
        assert answer.exit is not None
        assert {*answer.exit} <= {"early", "last"}
        if ask == "audited":
            assert answer.full_class_ids is not None
            assert 0 <= answer.full_class_ids.min() <= answer.full_class_ids.max() < NUM_CLASSES
    elif isinstance(answer, Neighbors):
        assert answer.ids.shape == answer.scores.shape == (2, K), ask
        assert np.isfinite(answer.scores).all()
        assert answer.ids.min() >= 0
        assert (answer.ids[:, 0] != answer.ids[:, 1]).all()
    elif ask in ("embed", "embed_exit"):
        assert (answer.dtype, answer.shape) == (np.float32, (2, 4))
    elif ask == "describe":
        assert isinstance(answer, Manifest)
        answer.to_json().encode()
    elif ask == "status":
        assert all(isinstance(status, VersionStatus) for status in answer)
    elif ask == "signatures":
        assert all(isinstance(signature, Signature) for signature in answer.values())
    else:
        assert answer["y"].ndim == 2
        assert answer["y"].shape[1] == 3


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["made", "random"])
def test_no_answer_takes_much_memory_or_raises_what_is_not_ours(target: str, kind: str) -> None:
    """2,000 answers made by hand and 10,000 of chance in `make soak`; a few of each here."""
    numbers = MADE if kind == "made" else RANDOM
    course = Course(target)
    course.run(f"{kind} {number}" for number in numbers)
    print(kind, len(numbers), course)
    assert course.outcomes["ServerError"] > len(numbers) / 20, course
    assert course.outcomes["ManifestError"] > len(numbers) / 20, course
    assert len(course.longest_text) < 2000
    assert course.most_bytes[0] < MOST_BYTES, course
