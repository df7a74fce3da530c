"""The threads that look again and again: when they look, what ends a wait, and what they log."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from tensorflow_serving.config.model_server_config_pb2 import ModelServerConfig

from keras_mrl_serving.server.config import Awaited, Configuration
from keras_mrl_serving.server.models import Models, Retries
from keras_mrl_serving.server.poller import ConfigPoller, Poller, model_poller
from tests.helpers.disk import Clock, Disk, config, states
from tests.helpers.waiting import wait_until

ONCE = Retries(max_num=0)


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    disk = Disk(tmp_path)
    disk.put("m/1", "n/1")
    return disk


@contextmanager
def polling(poller: Poller) -> Iterator[Poller]:
    poller.start()
    try:
        yield poller
    finally:
        poller.stop()


def serve(disk: Disk, *names: str, retries: Retries = ONCE, clock: Clock | None = None) -> Models:
    models = Models(disk.load, retries, clock or Clock())
    models.watch([config(disk, name) for name in names])
    models.poll()
    return models


def test_an_error_is_logged_and_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    looks: list[None] = []

    def look() -> None:
        looks.append(None)
        raise RuntimeError("no reason")

    with polling(Poller("curious", look, lambda: 0.001)):
        wait_until(lambda: len(looks) > 2)
    assert "curious: a look failed" in caplog.messages


def test_without_a_time_to_wait_each_wake_is_a_look() -> None:
    looked = threading.Event()
    with polling(Poller("patient", looked.set, lambda: None)) as poller:
        for _ in range(3):
            assert not looked.is_set()
            poller.wake()
            assert looked.wait(60)
            looked.clear()
    assert not looked.is_set()  # the stop is no look


def test_a_stop_waits_for_the_look_under_way() -> None:
    events: list[str] = []
    entered, gate = threading.Event(), threading.Event()

    def look() -> None:
        entered.set()
        gate.wait(60)
        events.append("looked")

    poller = Poller("slow", look, lambda: 0.0)
    poller.start()
    assert entered.wait(60)

    def stop() -> None:
        poller.stop()
        events.append("stopped")

    stopping = threading.Thread(target=stop)
    stopping.start()
    wait_until(lambda: poller.is_stopping)
    gate.set()
    stopping.join()
    assert events == ["looked", "stopped"]


def test_base_paths_are_read_again_and_again(disk: Disk) -> None:
    models = serve(disk, "m")
    with polling(model_poller(models, 0.01)):
        disk.put("m/2")
        wait_until(lambda: states(models) == "2:AVAILABLE 1:END")
        disk.put("m/3")
        wait_until(lambda: states(models) == "3:AVAILABLE 2:END 1:END")


def test_base_paths_are_read_at_a_wake(disk: Disk) -> None:
    models = serve(disk, "m")
    with polling(model_poller(models, 3600)) as poller:
        disk.put("m/2")
        poller.wake()
        wait_until(lambda: states(models) == "2:AVAILABLE 1:END")


def test_at_zero_tries_and_unloads_are_made_and_no_base_path_is_read(disk: Disk) -> None:
    disk.broken.add("m/1")
    clock = Clock()
    models = serve(disk, "m", "n", retries=Retries(max_num=1, interval_s=60), clock=clock)
    with polling(model_poller(models, 0)) as poller:
        clock.now = 60
        poller.wake()
        wait_until(lambda: states(models) == "1:END")
        disk.put("m/2")
        models.watch([config(disk, "m")])
        poller.wake()
        wait_until(lambda: states(models, "n") == "1:END")
    assert states(models) == "1:END"


def test_a_try_is_made_when_it_is_due(disk: Disk) -> None:
    """Nobody wakes the poller, which reads no base path either."""
    disk.broken.add("m/1")
    models = Models(disk.load, Retries(max_num=2, interval_s=0.01))
    models.watch([config(disk, "m")])
    models.poll()
    with polling(model_poller(models, 0)):
        wait_until(lambda: states(models) == "1:END")
    assert disk.new_events() == ["load m/1"] * 3


def text_of(disk: Disk, *names: str, texts: str = "") -> str:
    """The text proto of a config of these models, with more text for each."""
    message = ModelServerConfig()
    for name in names:
        model = config(disk, name)
        model.model_platform = "tensorflow"
        text_format.Merge(texts, model)
        message.model_config_list.config.add().CopyFrom(model)
    return text_format.MessageToString(message)


def stable(number: int) -> str:
    return f'version_labels {{ key: "stable" value: {number} }}'


def test_a_config_file_is_reloaded_and_a_problem_with_it_logged_once(
    disk: Disk, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    models = Models(disk.load, ONCE)
    file = tmp_path / "models.config"
    poller = ConfigPoller(Configuration(models, wake=models.poll), str(file), 0.01)

    def look_twice(text: str) -> None:
        file.write_text(text)
        poller.look()
        poller.look()

    look_twice(text_of(disk, "m"))
    assert states(models) == "1:AVAILABLE"
    look_twice("")
    look_twice(text_of(disk, "m", texts=stable(7)))
    look_twice(text_of(disk, "m", texts=stable(1)))
    assert models.labels.version("m", "stable") == 1
    file.unlink()
    poller.look()
    assert [message for message in caplog.messages if message.startswith(str(file))] == [
        f"{file}: FAILED_PRECONDITION: Cannot transition to requested config. It is only legal to "
        "transition from one ModelConfigList to another.",
        f"{file}: FAILED_PRECONDITION: Request to assign label to version 7 of model m, which is "
        "not currently available for inference",
        f"{file}: model_config_file must be a file that can be read. Received: "
        f"model_config_file='{file}' (No such file or directory). Correct the path.",
    ]
    file.write_text(text_of(disk, "n"))
    poller.start()
    wait_until(lambda: states(models, "n") == "1:AVAILABLE" and states(models) == "1:END")
    poller.stop()


class Watched(Configuration):
    """Counts how often a wait asks whether its caller still waits."""

    checks = 0

    def wait(self, awaited: Awaited, is_active: Callable[[], bool] = lambda: True) -> None:
        def counted() -> bool:
            self.checks += 1
            return is_active()

        super().wait(awaited, counted)


def test_a_wait_for_a_model_that_is_not_there_ends_once_the_file_changes(
    disk: Disk, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    models = Models(disk.load, ONCE)
    file, other = tmp_path / "models.config", tmp_path / "other.config"
    file.write_text(text_of(disk, "m", "late"))
    other.write_text(text_of(disk, "n"))
    configuration = Watched(models, wake=models.poll, check_interval_s=0.001)
    poller = ConfigPoller(configuration, str(file), 3600)
    looking = threading.Thread(target=poller.look, daemon=True)
    looking.start()
    wait_until(lambda: configuration.checks > 2)
    file.unlink()  # a file that is away for a moment has not changed
    checks = configuration.checks
    wait_until(lambda: configuration.checks > checks + 2)
    other.rename(file)
    wait_until(lambda: not looking.is_alive(), "the end of the look")
    poller.look()
    assert states(models, "n") == "1:AVAILABLE"
    assert states(models, "late") == ""
    assert [message for message in caplog.messages if message.startswith(str(file))] == []


def test_a_stop_ends_the_wait_for_a_model_that_is_not_there(disk: Disk, tmp_path: Path) -> None:
    models = Models(disk.load, ONCE)
    file = tmp_path / "models.config"
    file.write_text(text_of(disk, "late"))
    configuration = Watched(models, wake=models.poll, check_interval_s=0.001)
    poller = ConfigPoller(configuration, str(file), 0.0)
    poller.start()
    wait_until(lambda: configuration.checks > 0)
    stopping: Any = threading.Thread(target=poller.stop, daemon=True)
    stopping.start()
    wait_until(lambda: not stopping.is_alive(), "the stop")
