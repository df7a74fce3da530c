"""Which versions are loaded and unloaded, and in which order; the sessions compute nothing."""

import logging
import threading
from pathlib import Path
from typing import Any

import grpc
import pytest

from keras_mrl_serving.server.models import Models, Retries, absent_versions, aspired_versions
from keras_mrl_serving.server.run import ServingSession
from keras_mrl_serving.server.status import StatusError
from tests.helpers.disk import Clock, Disk, IdleSession, config, states
from tests.helpers.waiting import wait_until

LOGGER = "keras_mrl_serving.server"
PATHS = {1: "/m/1", 3: "/m/3", 10: "/m/10"}
ONCE = Retries(max_num=0)


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def serve(
    disk: Disk,
    *names: str,
    policy: str = "",
    retries: Retries = ONCE,
    clock: Clock | None = None,
) -> Models:
    models = Models(disk.load, retries, clock or Clock())
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
    assert aspired_versions(PATHS, parsed) == {number: PATHS[number] for number in numbers}
    assert aspired_versions({}, parsed) == {}


def test_absent_versions(disk: Disk) -> None:
    policy = config(disk, "m", "specific { versions: 9 versions: 1 versions: 7 }")
    assert absent_versions(PATHS, policy.model_version_policy) == [7, 9]
    assert absent_versions(PATHS, config(disk, "m").model_version_policy) == []


def test_an_absent_version_of_a_policy_is_logged_once(
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
    assert disk.new_events() == ["load m/10", "load m/2", "load m/1"]
    disk.remove("m/1", "m/2", "m/10")
    models.poll()
    assert disk.new_events() == ["close m/1", "close m/2", "close m/10"]
    assert states(models) == "10:END 2:END 1:END"


def test_the_old_version_serves_until_the_new_one_does(disk: Disk) -> None:
    states_at_load = []

    def load(path: str) -> ServingSession:
        states_at_load.append(states(models))
        return disk.load(path)

    models = Models(load, ONCE)
    models.watch([config(disk, "m")])
    disk.put("m/1")
    models.poll()
    disk.put("m/2")
    models.poll()
    assert states_at_load == ["1:LOADING", "2:LOADING 1:AVAILABLE"]
    assert disk.new_events() == ["load m/1", "load m/2", "close m/1"]
    disk.remove("m/2")
    models.poll()
    assert states(models) == "2:END 1:AVAILABLE"


def test_where_an_aspired_version_serves_already_the_old_one_goes_first(disk: Disk) -> None:
    disk.put("m/1", "m/2")
    models = serve(disk, "m", policy="latest { num_versions: 2 }")
    disk.put("m/3")
    disk.new_events()
    models.poll()
    assert disk.new_events() == ["close m/1", "load m/3"]
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


def test_a_version_that_did_not_load_is_not_tried_again_while_it_stays(disk: Disk) -> None:
    disk.put("m/1")
    models = serve(disk, "m")
    disk.broken.add("m/2")
    disk.put("m/2")
    models.poll()
    assert states(models) == "2:END 1:AVAILABLE"
    disk.broken.clear()
    models.poll()
    # Nor once it is back: version 1, which stands in for it, must be gone before anything changes.
    disk.remove("m/2")
    models.poll()
    disk.put("m/2")
    models.poll()
    assert disk.new_events() == ["load m/1", "load m/2"]
    assert states(models) == "2:END 1:AVAILABLE"
    disk.put("m/3")
    models.poll()
    assert states(models) == "3:AVAILABLE 2:END 1:END"


def test_a_version_that_did_not_load_is_tried_again_once_it_was_away(disk: Disk) -> None:
    disk.broken.add("m/2")
    disk.put("m/2")
    models = serve(disk, "m")
    assert states(models) == "2:END"
    disk.remove("m/2")
    models.poll()
    disk.broken.clear()
    disk.put("m/2")
    models.poll()
    assert states(models) == "2:AVAILABLE"
    assert models.versions("m")[0].error is None


def test_without_versions_nothing_is_served(disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    disk.put("m/1")
    models = serve(disk, "m")
    disk.remove("m/1")
    models.poll()
    models.poll()
    assert states(models) == "1:END"
    with pytest.raises(StatusError, match=r"^Servable not found for request: Latest\(m\)$"):
        models.serving("m", None).__enter__()
    assert caplog.messages == [
        f"m: No versions of servable m found under base path {disk.root}/m. Did you forget to name "
        "your leaf directory as a number (eg. '/1/')?"
    ]


def test_a_base_path_that_can_be_no_path(disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    disk.put("m/1")
    impossible = config(disk, "m")
    impossible.base_path = "/tmp/\0"
    models = Models(disk.load, ONCE)
    models.watch([impossible])
    models.poll()
    assert "cannot be read: embedded null byte" in caplog.text
    models.watch([config(disk, "m")])
    models.poll()
    assert states(models) == "1:AVAILABLE"


def test_unloads_come_before_loads_of_other_models(disk: Disk) -> None:
    disk.put("a/1", "b/1")
    models = serve(disk, "a", "b")
    disk.put("a/2")
    disk.remove("b/1")
    disk.new_events()
    models.poll()
    assert disk.new_events() == ["close b/1", "load a/2", "close a/1"]


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


def test_a_version_is_tried_again_until_it_loads(disk: Disk, clock: Clock) -> None:
    disk.put("m/1", "n/1")
    disk.broken.add("m/1")
    models = serve(disk, "m", "n", retries=Retries(max_num=5, interval_s=60), clock=clock)
    assert states(models) == "1:LOADING"
    assert models.versions("m")[0].error is None
    assert states(models, "n") == "1:AVAILABLE"  # nothing else waits for it
    assert models.seconds_to_next_try() == 60
    clock.now = 59
    models.poll()
    assert models.seconds_to_next_try() == 1
    assert disk.new_events() == ["load m/1", "load n/1"]
    clock.now = 60
    models.settle()
    assert models.seconds_to_next_try() == 60
    disk.broken.clear()
    clock.now = 120
    models.settle()
    assert disk.new_events() == ["load m/1", "load m/1"]
    assert states(models) == "1:AVAILABLE"
    assert models.versions("m")[0].failure is None
    assert models.seconds_to_next_try() is None


def test_after_the_last_try_it_is_over(disk: Disk, clock: Clock) -> None:
    disk.put("m/1")
    disk.broken.add("m/1")
    models = serve(disk, "m", retries=Retries(max_num=2, interval_s=60), clock=clock)
    for now in (60, 120, 180, 240):
        clock.now = now
        models.poll()
    assert disk.new_events() == ["load m/1"] * 3
    (version,) = models.versions("m")
    assert states(models) == "1:END"
    assert version.error is not None
    assert (version.error.code, version.error.message) == (
        grpc.StatusCode.DATA_LOSS,
        "m/1 is broken",
    )


def test_tries_without_an_interval_follow_at_once(disk: Disk) -> None:
    disk.put("m/1")
    disk.broken.add("m/1")
    serve(disk, "m", retries=Retries(max_num=2, interval_s=0))
    assert disk.new_events() == ["load m/1"] * 3


@pytest.mark.parametrize("names", [(), ("m/2",)])
def test_a_version_no_longer_aspired_is_not_tried_again(
    disk: Disk, clock: Clock, names: tuple[str, ...]
) -> None:
    disk.put("m/1")
    disk.broken.add("m/1")
    models = serve(disk, "m", retries=Retries(max_num=2, interval_s=60), clock=clock)
    disk.put(*names)
    if not names:
        disk.remove("m/1")
    models.poll()
    clock.now = 60
    models.poll()
    assert disk.new_events() == ["load m/1", *(f"load {name}" for name in names)]
    assert states(models).split()[-1] == "1:END"
    assert models.versions("m")[-1].error is not None
    assert models.seconds_to_next_try() is None


def test_tries_go_on_while_an_old_version_stands_in(disk: Disk, clock: Clock) -> None:
    disk.put("m/1")
    models = serve(disk, "m", retries=Retries(max_num=3, interval_s=60), clock=clock)
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
    assert disk.new_events() == ["load m/1", *["load m/2"] * 3, "close m/1"]


def test_an_error_of_any_kind_ends_one_load_alone(disk: Disk) -> None:
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


def test_tries_go_on_while_a_base_path_is_bad(disk: Disk, clock: Clock) -> None:
    disk.put("m/1", "n/1")
    disk.broken.add("m/1")
    models = serve(disk, "m", "n", retries=Retries(max_num=2, interval_s=60), clock=clock)
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
    disk.new_events()
    added = models.watch([config(disk, "a"), config(disk, "b")])
    assert added == {"b": frozenset(models.versions("b"))}
    models.poll()
    assert disk.new_events() == ["load b/1"]
    assert states(models, "b") == "1:AVAILABLE"


def test_a_model_left_out_and_back_before_a_look_is_loaded_anew(disk: Disk) -> None:
    disk.put("a/1")
    models = serve(disk, "a")
    models.watch([])
    models.watch([config(disk, "a")])
    models.poll()
    assert disk.new_events() == ["load a/1", "close a/1", "load a/1"]


def test_an_unknown_model(disk: Disk) -> None:
    models = serve(disk)
    assert models.versions("x") == []
    text = r"^Servable not found for request: Specific\(x, 7\)$"
    with pytest.raises(StatusError, match=text), models.serving("x", 7):
        pass


def test_closing_cancels_tries_and_unloads_all(disk: Disk) -> None:
    disk.put("a/1", "b/1")
    disk.broken.add("b/1")
    models = serve(disk, "a", "b", retries=Retries())
    models.close()
    assert (states(models, "a"), states(models, "b")) == ("1:END", "1:END")
    assert disk.new_events() == ["load a/1", "load b/1", "close a/1"]


def test_a_close_with_a_grace_cancels_runs(disk: Disk) -> None:
    disk.put("a/1", "b/1")
    models = serve(disk, "a", "b")
    with models.serving("a", None) as (_, session):
        ended = threading.Event()
        session.cancel = ended.set  # type: ignore[method-assign]
        closing = threading.Thread(target=models.close, args=(60,))
        closing.start()
        assert ended.wait(60)
    closing.join()
    assert (states(models, "a"), states(models, "b")) == ("1:END", "1:END")


def test_a_close_leaves_a_run_behind_that_heeds_no_cancel(
    disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    disk.put("a/1", "b/1")
    models = serve(disk, "a", "b")
    with models.serving("a", None):
        models.close(0.01)
        assert states(models, "b") == "1:END"
    assert disk.new_events() == ["load a/1", "load b/1", "cancel a/1", "close b/1"]
    assert caplog.messages == [f"A run on {disk.root}/a/1 does not end; it is left behind."]


def test_a_close_cancels_the_runs_that_an_unload_waits_for(disk: Disk) -> None:
    disk.put("a/1")
    models = serve(disk, "a")
    disk.put("a/2")
    with models.serving("a", 1):
        polling = threading.Thread(target=models.poll)
        polling.start()
        wait_until(lambda: states(models, "a") == "2:AVAILABLE 1:UNLOADING")
        models.close(0.01)
        assert disk.new_events() == ["load a/1", "load a/2", "cancel a/1"]
    polling.join()


def test_a_close_does_not_wait_for_a_load(disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    loading, gate = threading.Event(), threading.Event()

    def load(path: str) -> Any:
        loading.set()
        assert gate.wait(60)
        return disk.load(path)

    disk.put("a/1", "a/2")
    models = Models(load, ONCE)
    models.watch([config(disk, "a", "all {}")])
    polling = threading.Thread(target=models.poll)
    polling.start()
    assert loading.wait(60)
    models.close(0.01)
    assert caplog.messages == ["A load or an unload does not end; it is left behind."]
    gate.set()
    polling.join()
    assert disk.new_events() == ["load a/2"]  # and not the other one, after the close


def test_requests_under_way_hold_an_unload_and_nothing_of_other_models(disk: Disk) -> None:
    disk.put("a/1", "b/1")
    models = serve(disk, "a", "b")
    disk.put("a/2")
    with models.serving("a", 1):
        polling = threading.Thread(target=models.poll)
        polling.start()
        wait_until(lambda: states(models, "a") == "2:AVAILABLE 1:UNLOADING")
        with models.serving("b", None) as (number, _):
            assert number == 1
        with models.serving("a", None) as (number, _):
            assert number == 2
        assert "close a/1" not in disk.events
    polling.join()
    assert "close a/1" in disk.events


def test_loads_and_unloads_are_logged(disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
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


def test_a_close_may_interrupt_a_close(disk: Disk) -> None:
    """As the handler of a second signal does, in the thread that it interrupts."""

    def load(_: str) -> Any:
        return IdleSession(lambda: models.close())

    disk.put("m/1", "n/1")
    models = Models(load, ONCE)
    models.watch([config(disk, "m"), config(disk, "n")])
    models.poll()
    closing = threading.Thread(target=models.close, daemon=True)
    closing.start()
    wait_until(lambda: not closing.is_alive(), "the end of the close")
    assert (states(models), states(models, "n")) == ("1:END", "1:END")
