"""Real servers of real exports that bear one version number: replaced, or side by side.

Every answer names its makers by its values: the first feature is the number of the model, the
second one is that of the row, and a class is ten times the number of the model that made the
features plus the number of the model that classified them.
"""

import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import pytest

from keras_mrl import MatryoshkaHead
from keras_mrl_export import export_saved_model
from keras_mrl_serving.cascade.policy import CascadePolicy, Stage
from keras_mrl_serving.client import Client
from keras_mrl_serving.errors import (
    EncoderMismatchError,
    ModelChangedError,
    ServerError,
)
from keras_mrl_serving.funnel import FunnelSchedule
from keras_mrl_serving.index import ExactIndex
from keras_mrl_serving.options import Options
from keras_mrl_serving.server import DevServer
from tests.helpers.export_models import read_manifest
from tests.helpers.waiting import wait_until

Array = npt.NDArray[Any]

SOAK = bool(os.environ.get("KERAS_MRL_SOAK"))
CLASSES, WIDTH = 100, 4
# No model is ever as sure as this: every row goes through both heads.
POLICY = CascadePolicy((Stage(2, 0.9), Stage(WIDTH, None)))
FUNNEL = FunnelSchedule((2, WIDTH), (5,), k=3)
PARTS = Options(max_batch_size=3, max_in_flight=3)


def model(number: int) -> keras.Model:
    inputs = keras.Input((2,), name="x")
    features = keras.layers.Dense(WIDTH, name="features")(inputs)
    head = MatryoshkaHead(CLASSES, dims=(2, WIDTH), name="head")
    model = keras.Model(inputs, head(features), name="numbered")
    classes = np.arange(CLASSES)
    for weight in model.weights:
        value = np.zeros(weight.shape, np.float32)
        if weight.shape[-1] == WIDTH:  # the features
            if len(weight.shape) == 2:
                value[0, 1] = 1
            else:
                value[0] = number
        elif len(weight.shape) == 2:  # logits are largest at ten times the first feature plus ours
            value[0] = 20 * classes
        else:
            value[:] = 2 * number * classes - classes**2
        weight.assign(value)
    return model


def rows(count: int, start: int = 1) -> Array:
    return np.stack([np.arange(start, start + count), np.zeros(count)], axis=1).astype(np.float32)


def makers(answer: Any) -> set[int]:
    if isinstance(answer, np.ndarray):
        return {int(number) for number in answer[:, 0]}
    return {int(digit) for class_id in answer.class_ids[:, 0] for digit in divmod(class_id, 10)}


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The base path of each export; all of them are of version 1."""
    folder = tmp_path_factory.mktemp("exports")
    arguments: dict[str, Any] = {"normalize": False, "warmup_batch_sizes": (), "top_k": 1}
    arguments |= {"signatures": ["embed", "features", "head"], "version": 1}
    arguments["activation"] = "softmax"
    numbers = {"one": 1, "one again": 1, "two": 2, "one without": 1, "two without": 2}
    for name, number in numbers.items():
        identity = not name.endswith("without")
        export_saved_model(model(number), folder / name, rows(4), identity=identity, **arguments)
    return {name: folder / name for name in numbers}


class Place:
    """An address at which one development server after another answers."""

    def __init__(self, base_path: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.target = f"127.0.0.1:{self.port}"
        self._server: DevServer | None = None
        self.serve(base_path)

    def serve(self, base_path: Path) -> None:
        self.stop()
        self._server = DevServer(base_path, port=self.port)
        self._server.start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()
            self._server = None


@pytest.fixture
def places() -> Iterator[Any]:
    with ExitStack() as stack:

        def serve(base_path: Path) -> Place:
            place = Place(base_path)
            stack.callback(place.stop)
            return place

        yield serve


def index_of(exported: Path) -> ExactIndex:
    fingerprint = read_manifest(exported / "1").fingerprint
    gallery = np.stack([np.ones(9), *rows(9).T, np.zeros(9)], axis=1).astype(np.float32)
    return ExactIndex.build(gallery, FUNNEL, metric="dot", encoder_fingerprint=fingerprint)


def test_two_exports_of_one_model_have_one_fingerprint_and_two_ids(
    exports: dict[str, Path],
) -> None:
    one, again, two = (read_manifest(exports[name] / "1") for name in ("one", "one again", "two"))
    assert one.fingerprint == again.fingerprint != two.fingerprint
    assert len({one.model_id, again.model_id, two.model_id}) == 3


def test_a_server_that_comes_back_with_another_model_is_known(
    exports: dict[str, Path], places: Any
) -> None:
    place, index = places(exports["one"]), index_of(exports["one"])
    with Client(place.target) as client:
        assert client.retrieve(rows(2), index).ids.shape == (2, 3)
        place.serve(exports["one again"])
        assert client.retrieve(rows(2), index).ids.shape == (2, 3)
        place.serve(exports["two"])
        for _ in range(2):
            with pytest.raises(EncoderMismatchError, match="An index answers embeddings of the"):
                client.retrieve(rows(2), index)
        assert makers(client.embed(rows(2), 2)) == {2}
        assert makers(client.classify_adaptive(rows(2), POLICY)) == {2}
        assert client.describe() == read_manifest(exports["two"] / "1")


def test_without_an_id_the_manifest_is_read_anew_after_a_reconnect(
    exports: dict[str, Path], places: Any
) -> None:
    place, index = places(exports["one without"]), index_of(exports["one without"])
    with Client(place.target) as client:
        assert client.retrieve(rows(2), index).ids.shape == (2, 3)
        assert client.retrieve(rows(2), index).ids.shape == (2, 3)
        place.serve(exports["two without"])
        with pytest.raises(EncoderMismatchError, match="An index answers embeddings of the"):
            client.retrieve(rows(2), index)
        assert client.describe().model_id is None


def test_an_answer_that_was_under_way_is_of_the_new_model(
    exports: dict[str, Path], places: Any
) -> None:
    place = places(exports["one"])

    sent: list[int] = []

    def replace_at_the_third() -> dict[str, str]:  # asked for headers before each call
        sent.append(1)
        if len(sent) == 3:
            place.serve(exports["two"])
        return {}

    for method in ("embed", "classify"):
        place.serve(exports["one"])
        sent.clear()
        options = Options(metadata=replace_at_the_third, max_batch_size=3, max_in_flight=1)
        with Client(place.target, options=options) as client:
            if method == "embed":
                embedding = client.embed(rows(9), 2)  # the manifest, then three parts
                assert makers(embedding) == {2}
                assert embedding[:, 1].tolist() == list(range(1, 10))
            else:
                assert makers(client.classify_adaptive(rows(3), POLICY)) == {2}
        assert len(sent) > 4


@pytest.mark.parametrize("after", ["one again", "two"])
def test_a_corpus_goes_on_with_the_same_weights_alone(
    after: str, exports: dict[str, Path], places: Any, tmp_path: Path
) -> None:
    place, path = places(exports["one"]), tmp_path / "rows.npy"

    def progress(done: int, _: int | None) -> None:
        if done == 18:
            place.serve(exports[after])

    with Client(place.target, options=PARTS) as client:
        if after == "two":
            with pytest.raises(EncoderMismatchError, match="All rows of a file are embedded by"):
                client.embed_dataset(rows(45), 2, path, progress=progress)
            place.serve(exports["one"])
        embedding = client.embed_dataset(rows(45), 2, path, progress=progress)
    assert makers(embedding) == {1}
    assert embedding[:, 1].tolist() == list(range(1, 46))


def test_replicas_that_differ_never_answer_together(exports: dict[str, Path], places: Any) -> None:
    one, two = places(exports["one"]), places(exports["two"])
    with Client([one.target, two.target]) as client:
        wait_until(
            lambda: {*makers(client.embed(rows(1), 2)), *makers(client.embed(rows(1), 2))} == {1, 2}
        )
        refused = 0
        for _ in range(20):
            try:
                assert len(makers(client.classify_adaptive(rows(3), POLICY))) == 1
            except ModelChangedError:
                refused += 1
        assert refused


@pytest.mark.soak
def test_no_answer_is_mixed_while_servers_come_back_with_other_models(
    exports: dict[str, Path], places: Any
) -> None:
    """Two replicas, each replaced again and again under the number 1."""
    replacements = 100 if SOAK else 4
    index = index_of(exports["one"])
    replicas = [places(exports["one"]), places(exports["one"])]
    targets = [replica.target for replica in replicas]
    stop, counting = threading.Event(), threading.Lock()
    names = ("answers", "refused", "unavailable", "wrong", "mixed", "replaced")
    counts: dict[str, int] = dict.fromkeys(names, 0)

    def tally(name: str) -> None:
        with counting:
            counts[name] += 1

    def check(answer: Any, is_right: bool) -> None:
        tally("answers" if is_right else "wrong")
        if len(makers(answer)) > 1:
            tally("mixed")

    def ask(client: Client, number: int) -> None:
        x = rows(9, start=100 * number)
        while not stop.is_set():
            try:
                if number % 3 == 0:
                    answer = client.classify_adaptive(x, POLICY)
                    check(answer, set(answer.dim.tolist()) == {WIDTH})
                elif number % 3 == 1:
                    embedding = client.embed(x, 2)
                    check(embedding, bool((embedding[:, 1] == x[:, 0]).all()))
                else:
                    # The nearest by the dot product is the last row; of another model, refused.
                    found = client.retrieve(x, index).ids[:, 0]
                    tally("answers" if (found == 8).all() else "wrong")
            except (ModelChangedError, EncoderMismatchError):
                tally("refused")
            except ServerError:  # none answers, or it stops and cancels what takes long
                tally("unavailable")

    def replace_each() -> None:
        while not stop.is_set():
            name = ("two", "one", "one again")[counts["replaced"] % 3]
            for replica in replicas:
                replica.serve(exports[name])
                stop.wait(0.05)
            tally("replaced")

    with Client(targets) as whole, Client(targets, options=PARTS) as split:
        with ThreadPoolExecutor(7) as pool:
            clients = [whole, split]
            threads = [pool.submit(ask, clients[n % 2], n) for n in range(6)]
            threads.append(pool.submit(replace_each))
            try:
                wait_until(
                    lambda: (
                        counts["replaced"] >= replacements
                        or any(thread.done() for thread in threads)
                    ),
                    timeout_s=1200 if SOAK else 120,
                )
            finally:
                stop.set()
            for thread in threads:
                thread.result()
    print(f"\n{counts}")
    assert (counts["wrong"], counts["mixed"]) == (0, 0)
    assert counts["answers"]
