"""Which versions are loaded and unloaded, and in which order: by hand, over sessions of nothing."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest

from keras_mrl_serving.server.config import Poller
from keras_mrl_serving.server.models import Models, Retries, absent_versions, aspired_versions
from keras_mrl_serving.server.run import ServingSession
from keras_mrl_serving.server.status import StatusError
from tests.helpers.disk import Disk, config, states, wait_until

LOGGER = "keras_mrl_serving.server"
FOUND = {1: "/m/1", 3: "/m/3", 10: "/m/10"}
ONCE = Retries(max_num=0)


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The time the models see."""
    clock = SimpleNamespace(now=0.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr("keras_mrl_serving.server.models.time", clock)
    return clock


def serve(disk: Disk, *names: str, policy: str = "", retries: Retries = ONCE) -> Models:
    models = Models(disk.load, retries)
    models.watch([config(disk, name, policy) for name in names])
    models.poll()
    return models


@pytest.mark.parametrize(
    ("policy", "numbers"),
    [
        ("", [10]),
        ("latest {}", [10]),
        ("latest { num_versions: 2 }", [3, 10]),
        ("latest { num_versions: 9 }", [1, 3, 10]),
        ("all {}", [1, 3, 10]),
        ("specific { versions: 3 }", [3]),
        ("specific { versions: 10 versions: 1 versions: 7 }", [1, 10]),
        ("specific { versions: 7 }", []),
        ("specific {}", []),
    ],
)
def test_policies(disk: Disk, policy: str, numbers: list[int]) -> None:
    parsed = config(disk, "m", policy).model_version_policy
    assert aspired_versions(FOUND, parsed) == {number: FOUND[number] for number in numbers}
    assert aspired_versions({}, parsed) == {}


def test_absent_versions(disk: Disk) -> None:
    policy = config(disk, "m", "specific { versions: 9 versions: 1 versions: 7 }")
    assert absent_versions(FOUND, policy.model_version_policy) == [7, 9]
    assert absent_versions(FOUND, config(disk, "m").model_version_policy) == []


def test_a_version_asked_for_that_is_absent_is_said_once(
    disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    disk.put("m/1")
    models = serve(disk, "m", policy="specific { versions: 1 versions: 7 }")
    models.poll()
    assert caplog.messages == [
        "m: Version 7 of servable m, which was requested to be served as a 'specific' version in "
        "the servable's version policy, was not found in the file system."
    ]
    assert states(models) == "1:AVAILABLE"


def test_the_highest_is_loaded_first_and_the_lowest_unloaded_first(disk: Disk) -> None:
    disk.put("m/1", "m/2", "m/10")
    models = serve(disk, "m", policy="all {}")
    assert disk.since() == ["load m/10", "load m/2", "load m/1"]
    disk.remove("m/1", "m/2", "m/10")
    models.poll()
    assert disk.since() == ["close m/1", "close m/2", "close m/10"]
    assert states(models) == "10:END 2:END 1:END"


def test_the_old_version_is_closed_once_the_new_one_serves(disk: Disk) -> None:
    disk.put("m/1")
    models = serve(disk, "m")
    disk.put("m/2")
    models.poll()
    assert disk.since() == ["load m/1", "load m/2", "close m/1"]


def test_where_a_wanted_version_serves_already_the_old_one_goes_first(disk: Disk) -> None:
    disk.put("m/1", "m/2")
    models = serve(disk, "m", policy="latest { num_versions: 2 }")
    disk.put("m/3")
    disk.since()
    models.poll()
    assert disk.since() == ["close m/1", "load m/3"]
    assert states(models) == "3:AVAILABLE 2:AVAILABLE 1:END"


def test_of_several_old_versions_one_stands_in_for_a_broken_one(disk: Disk) -> None:
    disk.put("m/1", "m/2")
    models = serve(disk, "m", policy="all {}")
    disk.broken.add("m/3")
    disk.put("m/3")
    models.watch([config(disk, "m")])
    models.poll()
    assert states(models) == "3:END 2:AVAILABLE 1:END"
    with models.serving("m", None) as (number, _):
        assert number == 2


def test_unloads_come_before_loads_of_other_models(disk: Disk) -> None:
    disk.put("a/1", "b/1")
    models = serve(disk, "a", "b")
    disk.put("a/2")
    disk.remove("b/1")
    disk.since()
    models.poll()
    assert disk.since() == ["close b/1", "load a/2", "close a/1"]


def test_one_bad_base_path_leaves_all_models_as_they_are(
    disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    disk.put("a/1", "b/1", "c/1")
    models = serve(disk, "a", "b", "c")
    (disk.root / "b").rename(disk.root / "away")
    disk.put("a/2")
    disk.remove("c/1")
    for _ in range(3):
        models.poll()
    assert [states(models, name) for name in "abc"] == ["1:AVAILABLE"] * 3
    path = disk.root / "b"
    assert caplog.messages == [f"b: base path {path} cannot be read: No such file or directory"]
    (disk.root / "away").rename(path)
    models.poll()
    assert states(models, "a") == "2:AVAILABLE 1:END"
    assert states(models, "c") == "1:END"


def test_a_version_is_tried_again_until_it_loads(disk: Disk, clock: SimpleNamespace) -> None:
    disk.put("m/1", "n/1")
    disk.broken.add("m/1")
    models = serve(disk, "m", "n", retries=Retries(max_num=5, interval_s=60))
    assert states(models) == "1:LOADING"
    assert models.versions("m")[0].error is None
    assert states(models, "n") == "1:AVAILABLE"  # nothing else waits for it
    assert models.next_try() == 60
    clock.now = 59
    models.poll()
    assert disk.since() == ["load m/1", "load n/1"]
    clock.now = 60
    models.settle()
    assert models.next_try() == 120
    disk.broken.clear()
    clock.now = 120
    models.settle()
    assert disk.since() == ["load m/1", "load m/1"]
    assert states(models) == "1:AVAILABLE"
    assert models.versions("m")[0].failure is None
    assert models.next_try() is None


def test_after_the_last_try_it_is_over(disk: Disk, clock: SimpleNamespace) -> None:
    disk.put("m/1")
    disk.broken.add("m/1")
    models = serve(disk, "m", retries=Retries(max_num=2, interval_s=60))
    for now in (60, 120, 180, 240):
        clock.now = now
        models.poll()
    assert disk.since() == ["load m/1"] * 3
    (version,) = models.versions("m")
    assert states(models) == "1:END"
    assert version.error is not None
    assert (version.error.code, version.error.message) == (
        grpc.StatusCode.DATA_LOSS,
        "m/1 is broken",
    )


@pytest.mark.usefixtures("clock")
def test_tries_without_an_interval_follow_at_once(disk: Disk) -> None:
    disk.put("m/1")
    disk.broken.add("m/1")
    serve(disk, "m", retries=Retries(max_num=2, interval_s=0))
    assert disk.since() == ["load m/1"] * 3


@pytest.mark.parametrize("names", [(), ("m/2",)])
def test_a_version_no_longer_wanted_is_not_tried_again(
    disk: Disk, clock: SimpleNamespace, names: tuple[str, ...]
) -> None:
    disk.put("m/1")
    disk.broken.add("m/1")
    models = serve(disk, "m", retries=Retries(max_num=2, interval_s=60))
    disk.put(*names)
    if not names:
        disk.remove("m/1")
    models.poll()
    clock.now = 60
    models.poll()
    assert disk.since() == ["load m/1", *(f"load {name}" for name in names)]
    assert states(models).split()[-1] == "1:END"
    assert models.versions("m")[-1].error is not None
    assert models.next_try() is None


def test_tries_go_on_while_an_old_version_stands_in(disk: Disk, clock: SimpleNamespace) -> None:
    disk.put("m/1")
    models = serve(disk, "m", retries=Retries(max_num=3, interval_s=60))
    disk.broken.add("m/2")
    disk.put("m/2")
    models.poll()
    disk.remove("m/2")
    models.poll()
    clock.now = 60
    models.poll()
    assert states(models) == "2:LOADING 1:AVAILABLE"
    disk.put("m/2")
    disk.broken.clear()
    clock.now = 120
    models.poll()
    assert states(models) == "2:AVAILABLE 1:END"
    assert disk.since() == ["load m/1", *["load m/2"] * 3, "close m/1"]


def test_what_is_raised_in_a_load_ends_that_load_alone(disk: Disk) -> None:
    def load(path: str) -> ServingSession:
        if path.endswith("m/1"):
            raise KeyError("x")
        return disk.load(path)

    disk.put("m/1", "n/1")
    models = Models(load, ONCE)
    models.watch([config(disk, "m"), config(disk, "n")])
    models.poll()
    assert (states(models), states(models, "n")) == ("1:END", "1:AVAILABLE")
    error = models.versions("m")[0].error
    assert error is not None
    assert (error.code, error.message) == (grpc.StatusCode.UNKNOWN, "'x'")


def test_tries_go_on_while_a_base_path_is_bad(disk: Disk, clock: SimpleNamespace) -> None:
    disk.put("m/1", "n/1")
    disk.broken.add("m/1")
    models = serve(disk, "m", "n", retries=Retries(max_num=2, interval_s=60))
    disk.remove("n/1", "n")
    disk.broken.clear()
    clock.now = 60
    models.poll()
    assert states(models) == "1:AVAILABLE"


def test_a_model_left_out_is_unloaded_and_its_versions_stay_listed(disk: Disk) -> None:
    disk.put("a/1", "b/1")
    models = serve(disk, "a", "b")
    assert models.watch([config(disk, "a")]) == {}
    models.settle()  # needs no look
    assert states(models, "b") == "1:END"
    with pytest.raises(StatusError, match=r"^Servable not found for request: Latest\(b\)$"):
        models.serving("b", None).__enter__()
    disk.since()
    added = models.watch([config(disk, "a"), config(disk, "b")])
    assert added == {"b": frozenset(models.versions("b"))}
    models.poll()
    assert disk.since() == ["load b/1"]
    assert states(models, "b") == "1:AVAILABLE"


def test_a_model_left_out_and_back_before_a_look_is_loaded_anew(disk: Disk) -> None:
    disk.put("a/1")
    models = serve(disk, "a")
    models.watch([])
    models.watch([config(disk, "a")])
    models.poll()
    assert disk.since() == ["load a/1", "close a/1", "load a/1"]


def test_a_model_nobody_has_heard_of(disk: Disk) -> None:
    models = serve(disk)
    assert models.versions("x") == []
    with pytest.raises(StatusError, match=r"^Servable not found for request: Specific\(x, 7\)$"):
        models.serving("x", 7)


def test_closing_cancels_tries_and_unloads_all(disk: Disk) -> None:
    disk.put("a/1", "b/1")
    disk.broken.add("b/1")
    models = serve(disk, "a", "b", retries=Retries())
    models.close()
    assert (states(models, "a"), states(models, "b")) == ("1:END", "1:END")
    assert disk.since() == ["load a/1", "load b/1", "close a/1"]


@contextmanager
def polling(models: Models, wait_s: float) -> Iterator[Poller]:
    poller = Poller(models, wait_s)
    poller.start()
    try:
        yield poller
    finally:
        poller.stop()


def test_a_poller_looks_again_and_again(disk: Disk) -> None:
    disk.put("m/1")
    models = serve(disk, "m")
    with polling(models, 0.01):
        disk.put("m/2")
        wait_until(lambda: states(models) == "2:AVAILABLE 1:END")
        disk.put("m/3")
        wait_until(lambda: states(models) == "3:AVAILABLE 2:END 1:END")


def test_a_poller_looks_when_it_is_woken(disk: Disk) -> None:
    disk.put("m/1")
    models = serve(disk, "m")
    with polling(models, 3600) as poller:
        disk.put("m/2")
        poller.wake()
        wait_until(lambda: states(models) == "2:AVAILABLE 1:END")


def test_a_poller_that_never_looks_tries_and_unloads_all_the_same(disk: Disk) -> None:
    disk.put("m/1", "n/1")
    disk.broken.add("m/1")
    models = serve(disk, "m", "n", retries=Retries(max_num=1, interval_s=0.02))
    with polling(models, 0) as poller:
        wait_until(lambda: states(models) == "1:END")
        disk.put("m/2")
        models.watch([config(disk, "m")])
        poller.wake()
        wait_until(lambda: states(models, "n") == "1:END")
    assert states(models) == "1:END"


def test_requests_under_way_hold_an_unload_and_nothing_of_other_models(disk: Disk) -> None:
    disk.put("a/1", "b/1")
    models = serve(disk, "a", "b")
    disk.put("a/2")
    with models.serving("a", 1):
        polling_once = threading.Thread(target=models.poll)
        polling_once.start()
        wait_until(lambda: states(models, "a") == "2:AVAILABLE 1:UNLOADING")
        with models.serving("b", None) as (number, _):
            assert number == 1
        with models.serving("a", None) as (number, _):
            assert number == 2
        assert "close a/1" not in disk.events
    polling_once.join(10)
    assert "close a/1" in disk.events


def test_what_is_loaded_and_unloaded_is_logged(
    disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    disk.put("m/1")
    models = serve(disk, "m")
    disk.broken.add("m/2")
    disk.put("m/2")
    models.poll()
    models.close()
    assert caplog.messages == [
        f"m: version 1 loaded from {disk.root}/m/1",
        "m: version 2 does not load: m/2 is broken",
        "m: version 1 unloaded",
    ]
