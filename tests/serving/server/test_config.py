"""Configs of many models: what is refused, in which order, what a reload waits for; and labels."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from tensorflow_serving.config.model_server_config_pb2 import ModelServerConfig

from keras_mrl_serving.server.config import (
    ConfigPoller,
    Configuration,
    Poller,
    read_config,
    single_model,
)
from keras_mrl_serving.server.models import Models, Retries
from keras_mrl_serving.server.status import StatusError
from tests.helpers.disk import Disk, states, wait_until

LOGGER = "keras_mrl_serving.server"
NEITHER = (
    "INVALID_ARGUMENT: Illegal setting neither ModelServerConfig::model_type (deprecated) nor "
    "ModelServerConfig::model_platform, model name is m"
)


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    disk = Disk(tmp_path)
    disk.put("m/1", "m/2", "n/1")
    return disk


@pytest.fixture
def models(disk: Disk) -> Models:
    return Models(disk.load, Retries(max_num=0))


@pytest.fixture
def configuration(models: Models) -> Configuration:
    return Configuration(models)


@pytest.fixture
def configure(disk: Disk) -> Callable[..., Any]:
    """A config of models under the disk's root: their names, and more text for each."""

    def configure(**texts: str) -> Any:
        config = ModelServerConfig()
        config.model_config_list.SetInParent()
        for name, text in texts.items():
            model = config.model_config_list.config.add(name=name)
            text_format.Parse(text, model)
            model.base_path = model.base_path or str(disk.root / name)
            if "model_platform" not in text and "model_type" not in text:
                model.model_platform = "tensorflow"
        return config

    return configure


Configure = Callable[..., Any]


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(StatusError) as caught:
        action()
    return f"{caught.value.code.name}: {caught.value.message}"


def labelled(**labels: int) -> str:
    return "\n".join(
        f'version_labels {{ key: "{label}" value: {number} }}' for label, number in labels.items()
    )


def test_27_a_name_twice(configuration: Configuration, configure: Configure) -> None:
    config = configure(m="", n='base_path: "relative"')
    config.model_config_list.config.add(name="m")
    assert refusal(lambda: configuration.apply(config)) == (
        "INVALID_ARGUMENT: Illegal to list model m multiple times in config list"
    )


@pytest.mark.parametrize("path", ["models/m", "./m", "m", "1s3://bucket"])
def test_28_a_relative_path(configuration: Configuration, configure: Configure, path: str) -> None:
    assert refusal(lambda: configuration.apply(configure(m=f'base_path: "{path}"'))) == (
        "INVALID_ARGUMENT: Expected model m to have an absolute path or URI; "
        f"got base_path()={path}"
    )


@pytest.mark.parametrize("path", ["/models/m", "s3://bucket/m"])
def test_28_an_absolute_path(configuration: Configuration, configure: Configure, path: str) -> None:
    assert configuration.apply(configure(m=f'base_path: "{path}"')) == {"m": frozenset()}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('model_platform: ""', NEITHER),
        (
            'model_platform: "caffe"',
            "INVALID_ARGUMENT: Model m requests unsupported platform caffe",
        ),
        (
            'model_platform: "tensorflow" model_type: TENSORFLOW',
            "INVALID_ARGUMENT: Illegal setting both ModelServerConfig::model_type (deprecated) "
            "and ModelServerConfig::model_platform.",
        ),
        (
            "model_type: OTHER",
            "INVALID_ARGUMENT: ModelServerConfig::model_type choice 2 not supported.",
        ),
    ],
)
def test_29_platforms(
    configuration: Configuration, configure: Configure, text: str, said: str
) -> None:
    assert refusal(lambda: configuration.apply(configure(m=text))) == said


def test_29_the_deprecated_type_is_a_platform(
    configuration: Configuration, configure: Configure
) -> None:
    configuration.apply(configure(m="model_type: TENSORFLOW"))
    configuration.apply(configure(m='model_platform: "tensorflow"'))


def test_29_a_platform_that_changes(configuration: Configuration, configure: Configure) -> None:
    configuration.apply(configure(m=""))
    assert refusal(lambda: configuration.apply(configure(m='model_platform: "caffe"'))) == (
        "INVALID_ARGUMENT: Illegal to change a model's platform. For model m platform was "
        "tensorflow and new platform requested is caffe"
    )


def test_29_a_config_without_a_platform_is_kept_and_refuses_every_later_one(
    configuration: Configuration, configure: Configure
) -> None:
    assert refusal(lambda: configuration.apply(configure(m='model_platform: ""'))) == NEITHER
    assert refusal(lambda: configuration.apply(configure(n=""))) == NEITHER


def test_5_and_6_labels_before_and_after_the_first_config(
    models: Models, configuration: Configuration, configure: Configure
) -> None:
    unset = "UNAVAILABLE: Model labels does not init yet.stable"
    unknown = "INVALID_ARGUMENT: Unrecognized servable version label: stable"
    assert refusal(lambda: models.labels.version("m", "stable")) == unset
    assert configuration.apply(ModelServerConfig()) == {}
    assert refusal(lambda: models.labels.version("m", "stable")) == unset
    configuration.apply(configure())
    assert refusal(lambda: models.labels.version("m", "stable")) == unknown
    configuration.apply(configure(m="", n=""))
    models.poll()
    configuration.apply(configure(m=labelled(stable=2), n=""))
    assert models.labels.version("m", "stable") == 2
    assert refusal(lambda: models.labels.version("n", "stable")) == unknown
    configuration.apply(configure(m=labelled(canary=2), n=""))
    assert models.labels.version("m", "canary") == 2
    assert refusal(lambda: models.labels.version("m", "stable")) == unknown


def not_available(number: int) -> str:
    return (
        f"FAILED_PRECONDITION: Request to assign label to version {number} of model m, which is "
        "not currently available for inference"
    )


def test_30_a_label_needs_a_version_that_is_available(
    models: Models, configuration: Configuration, configure: Configure
) -> None:
    one = configure(m=labelled(stable=2))
    assert refusal(lambda: configuration.apply(one)) == not_available(2)
    configuration.apply(configure(m=""))
    models.poll()
    configuration.apply(one)
    two = configure(m=labelled(stable=2, canary=1))
    assert refusal(lambda: configuration.apply(two)) == not_available(1)
    assert models.labels.version("m", "stable") == 2  # all labels or none


def test_30_the_config_with_a_bad_label_is_kept_but_its_models_are_not_served(
    models: Models, configuration: Configuration, configure: Configure
) -> None:
    configuration.apply(configure(m=""))
    models.poll()
    bad = configure(m=labelled(stable=9), n="")
    assert refusal(lambda: configuration.apply(bad)) == not_available(9)
    models.poll()
    assert (states(models), states(models, "n")) == ("2:AVAILABLE", "")
    assert refusal(lambda: configuration.apply(configure(n='model_platform: "caffe"'))) == (
        "INVALID_ARGUMENT: Illegal to change a model's platform. For model n platform was "
        "tensorflow and new platform requested is caffe"
    )
    assert set(configuration.apply(configure(n=""))) == {"n"}


def test_30_new_labels_may_be_allowed_for_versions_that_are_not_available(
    models: Models, configure: Configure
) -> None:
    configuration = Configuration(models, allow_labels_for_unavailable=True)
    configuration.apply(configure(m=labelled(stable=2)))
    assert models.labels.version("m", "stable") == 2
    configuration.apply(configure(m=labelled(stable=2, canary=7)))
    moved = configure(m=labelled(stable=1))
    assert refusal(lambda: configuration.apply(moved)) == not_available(1)
    models.poll()
    back = configure(m=labelled(canary=2))
    configuration.apply(back)
    assert models.labels.version("m", "canary") == 2


def test_31_a_reload_waits_for_what_it_adds(
    models: Models, configuration: Configuration, configure: Configure
) -> None:
    configuration.apply(configure(m=""))
    models.poll()
    awaited = configuration.apply(configure(m="", n=""))
    assert set(awaited) == {"n"}
    waiting = threading.Thread(target=configuration.wait, args=(awaited,))
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    models.poll()
    waiting.join(10)
    assert not waiting.is_alive()


def test_31_a_new_model_that_does_not_load(
    disk: Disk, models: Models, configuration: Configuration, configure: Configure
) -> None:
    disk.broken |= {"m/2", "n/1"}
    awaited = configuration.apply(configure(n="", m=""))
    models.poll()
    assert refusal(lambda: configuration.wait(awaited)) == (
        "UNKNOWN: 2 model(s) did not become available: {{{name: m version: 2} due to error: "
        "DATA_LOSS: m/2 is broken}, {{name: n version: 1} due to error: DATA_LOSS: n/1 is "
        "broken}, }"
    )


def test_31_an_earlier_life_of_a_model_does_not_count(
    disk: Disk, models: Models, configuration: Configuration, configure: Configure
) -> None:
    disk.broken.add("n/1")
    configuration.apply(configure(n=""))
    models.poll()
    configuration.apply(configure())
    disk.broken.clear()
    awaited = configuration.apply(configure(n=""))
    wanted = iter([True, False])
    assert refusal(lambda: configuration.wait(awaited, lambda: next(wanted))) == (
        "CANCELLED: Nobody waits for the reload any more."
    )
    models.poll()
    configuration.wait(awaited)
    assert states(models, "n") == "1:AVAILABLE"


def test_a_reload_has_a_poller_look_and_waits_for_no_unload(
    disk: Disk, models: Models, configure: Configure
) -> None:
    poller = Poller(models, 3600)
    poller.start()
    configuration = Configuration(models, wake=poller.wake)
    configuration.reload(configure(m=""))
    assert states(models) == "2:AVAILABLE"
    with models.serving("m", None):
        configuration.reload(configure())
        wait_until(lambda: states(models) == "2:UNLOADING")
    wait_until(lambda: states(models) == "2:END")
    configuration.reload(configure(m="", n=""))
    assert (states(models), states(models, "n")) == ("2:AVAILABLE", "1:AVAILABLE")
    poller.stop()
    assert disk.events.count("load m/2") == 2


def test_a_reload_waits_for_a_base_path_that_is_not_there_and_the_next_for_it(
    disk: Disk, models: Models, configure: Configure, caplog: pytest.LogCaptureFixture
) -> None:
    poller = Poller(models, 0.01)
    poller.start()
    configuration = Configuration(models, wake=poller.wake)
    first = threading.Thread(target=configuration.reload, args=(configure(x="", m=""),))
    second = threading.Thread(target=configuration.reload, args=(configure(x=""),))
    first.start()
    wait_until(lambda: "x: base path" in caplog.text)
    second.start()
    first.join(0.1)
    assert first.is_alive()
    assert second.is_alive()
    assert states(models) == ""  # one bad base path, and nothing at all is looked for
    disk.put("x/1")
    first.join(10)
    second.join(10)
    assert not first.is_alive()
    assert not second.is_alive()
    wait_until(lambda: states(models) == "2:END")
    poller.stop()


def test_a_reload_nobody_waits_for_ends(
    models: Models, configuration: Configuration, configure: Configure
) -> None:
    said = "CANCELLED: Nobody waits for the reload any more."
    assert refusal(lambda: configuration.reload(configure(m=""), lambda: False)) == said
    waiting = threading.Thread(
        target=lambda: refusal(lambda: configuration.reload(configure(n="")))
    )
    waiting.start()
    wait_until(lambda: models.versions("n") == [] and waiting.is_alive())
    configuration.close()
    waiting.join(10)
    assert not waiting.is_alive()


def test_32_request_logging_is_refused_at_the_end(models: Models, configure: Configure) -> None:
    poller = Poller(models, 3600)
    poller.start()
    configuration = Configuration(models, wake=poller.wake)
    logging_ = configure(m="logging_config { sampling_config { sampling_rate: 1 } }")
    assert refusal(lambda: configuration.reload(logging_)) == (
        "INVALID_ARGUMENT: No request-logger-creator provided."
    )
    assert states(models) == "2:AVAILABLE"
    poller.stop()


def test_only_lists_follow_a_list(configuration: Configuration, configure: Configure) -> None:
    custom = ModelServerConfig()
    custom.custom_model_config.SetInParent()
    assert refusal(lambda: configuration.apply(custom)) == (
        "INVALID_ARGUMENT: ModelServer does not yet support custom model config."
    )
    configuration.apply(configure(m=""))
    for config in (custom, ModelServerConfig()):
        assert refusal(lambda config=config: configuration.apply(config)) == (  # type: ignore[misc]
            "FAILED_PRECONDITION: Cannot transition to requested config. It is only legal to "
            "transition from one ModelConfigList to another."
        )


def test_the_config_of_two_flags() -> None:
    (model,) = single_model("m", "/models/m").model_config_list.config
    assert (model.name, model.base_path, model.model_platform) == ("m", "/models/m", "tensorflow")


def test_a_config_file(tmp_path: Path, configure: Configure) -> None:
    config = configure(m=labelled(stable=1) + "\nmodel_version_policy { all {} }", n="")
    file = tmp_path / "models.config"
    file.write_text(text_format.MessageToString(config))
    assert read_config(str(file)) == config
    file.write_text("")
    assert read_config(str(file)) == ModelServerConfig()


def test_a_config_file_that_is_none(tmp_path: Path) -> None:
    file = tmp_path / "models.config"
    with pytest.raises(OSError, match="must be a file") as caught:
        read_config(str(file))
    assert str(caught.value) == (
        f"model_config_file must be a file that can be read. Received: model_config_file='{file}' "
        "(No such file or directory). Correct the path."
    )
    for data in (b"model_config_list { confg {} }", b"\xff"):
        file.write_bytes(data)
        with pytest.raises(ValueError, match="must be a text proto") as bad:
            read_config(str(file))
        said = str(bad.value)
        assert said.startswith(
            "model_config_file must be a text proto of tensorflow.serving.ModelServerConfig. "
            f"Received: model_config_file='{file}', "
        )
        assert said.endswith(
            '. Correct the file: model_config_list { config { name: "m" base_path: "/models/m" '
            'model_platform: "tensorflow" } }.'
        )


def test_a_config_file_is_reloaded_and_what_is_wrong_with_it_is_logged_once(
    tmp_path: Path, models: Models, configure: Configure, caplog: pytest.LogCaptureFixture
) -> None:
    poller = Poller(models, 3600)
    poller.start()
    configuration = Configuration(models, wake=poller.wake)
    file = tmp_path / "models.config"
    config_poller = ConfigPoller(configuration, str(file), 0.01)

    def look(text: str) -> None:
        file.write_text(text)
        config_poller.look()
        config_poller.look()

    look(text_format.MessageToString(configure(m="")))
    assert states(models) == "2:AVAILABLE"
    look("")
    look(text_format.MessageToString(configure(m=labelled(stable=7))))
    look(text_format.MessageToString(configure(m=labelled(stable=2))))
    assert models.labels.version("m", "stable") == 2
    file.unlink()
    config_poller.look()
    said = [m for m in caplog.messages if m.startswith(str(file))]
    assert said == [
        f"{file}: FAILED_PRECONDITION: Cannot transition to requested config. It is only legal to "
        "transition from one ModelConfigList to another.",
        f"{file}: {not_available(7)}",
        f"{file}: model_config_file must be a file that can be read. Received: "
        f"model_config_file='{file}' (No such file or directory). Correct the path.",
    ]
    file.write_text(text_format.MessageToString(configure(n="")))
    config_poller.start()
    wait_until(lambda: states(models, "n") == "1:AVAILABLE" and states(models) == "2:END")
    config_poller.stop()
    poller.stop()


def test_a_wait_for_a_model_that_is_not_there_ends_once_the_file_changes(
    tmp_path: Path, models: Models, configure: Configure, caplog: pytest.LogCaptureFixture
) -> None:
    poller = Poller(models, 0.01)
    poller.start()
    file = tmp_path / "models.config"
    waits = 'base_path: "/nothing/here"'
    file.write_text(text_format.MessageToString(configure(m="", late=waits)))
    configuration = Configuration(models, wake=poller.wake)
    config_poller = ConfigPoller(configuration, str(file), 0.01)
    looked = threading.Thread(target=config_poller.look, daemon=True)
    looked.start()
    looked.join(0.3)
    assert looked.is_alive()
    again = tmp_path / "again.config"
    again.write_text(text_format.MessageToString(configure(n="")))
    file.unlink()  # a file that is away for a moment is not one that says something else
    looked.join(0.3)
    assert looked.is_alive()
    again.rename(file)
    looked.join(2)
    if looked.is_alive():
        configuration.close()
        pytest.fail("the look still waits for what the file no longer says")
    config_poller.look()
    assert states(models, "n") == "1:AVAILABLE"
    assert states(models, "late") == ""
    poller.stop()
    assert [m for m in caplog.messages if m.startswith(str(file))] == []


def test_a_path_that_no_file_system_takes_ends_nothing(
    models: Models, configure: Configure, caplog: pytest.LogCaptureFixture
) -> None:
    models.watch(configure(m="base_path: '/tmp/\\000'").model_config_list.config)
    models.poll()
    assert "cannot be read: " in caplog.text
    models.watch(configure(m="").model_config_list.config)
    models.poll()
    assert states(models) == "2:AVAILABLE"


def test_what_goes_wrong_while_it_looks_does_not_end_a_poller(
    models: Models, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    looks = []

    def fail() -> None:
        looks.append(1)
        raise RuntimeError("no reason")

    monkeypatch.setattr(models, "poll", fail)
    poller = Poller(models, 0.01)
    poller.start()
    wait_until(lambda: len(looks) > 2)
    poller.stop()
    assert "looking for versions failed" in caplog.text


def test_a_close_may_interrupt_a_close(models: Models, configure: Configure) -> None:
    """As the handler of a second signal does, in the thread it interrupts."""
    models.watch(configure(m="").model_config_list.config)
    models.poll()
    with models._managing:
        models.close()
    assert states(models) == "2:END"
