"""Configs of many models: refusals in their order, the waits of a reload, and labels."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from tensorflow_serving.config.model_server_config_pb2 import ModelServerConfig

from keras_mrl_serving.server.config import Configuration, read_config, single_model
from keras_mrl_serving.server.models import Models, Retries
from keras_mrl_serving.server.poller import model_poller
from keras_mrl_serving.server.status import StatusError
from tests.helpers.disk import Disk, states
from tests.helpers.waiting import wait_until

INACTIVE = "CANCELLED: Nobody waits for the reload any more."
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
    return Configuration(models, check_interval_s=0.001)


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
    ("text", "message"),
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
    configuration: Configuration, configure: Configure, text: str, message: str
) -> None:
    assert refusal(lambda: configuration.apply(configure(m=text))) == message


def test_29_the_deprecated_type_is_a_platform(
    configuration: Configuration, configure: Configure
) -> None:
    configuration.apply(configure(m="model_type: TENSORFLOW"))
    configuration.apply(configure(m='model_platform: "tensorflow"'))


def test_29_a_config_without_a_platform_is_stored_and_refuses_every_later_one(
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


def test_30_a_config_with_a_bad_label_is_stored_but_its_models_are_not_served(
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


def test_31_a_reload_waits_for_the_models_it_adds(
    models: Models, configuration: Configuration, configure: Configure
) -> None:
    configuration.apply(configure(m=""))
    models.poll()
    awaited = configuration.apply(configure(m="", n=""))
    assert set(awaited) == {"n"}
    checks = []

    def is_active() -> bool:
        checks.append(states(models, "n"))
        models.poll()
        return True

    configuration.wait(awaited, is_active)
    assert checks == [""]
    assert states(models, "n") == "1:AVAILABLE"


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
    answers = iter([True, False])
    assert refusal(lambda: configuration.wait(awaited, lambda: next(answers))) == INACTIVE
    models.poll()
    configuration.wait(awaited)
    assert states(models, "n") == "1:AVAILABLE"


def test_a_reload_has_a_poller_look_and_waits_for_no_unload(
    disk: Disk, models: Models, configure: Configure
) -> None:
    poller = model_poller(models, 3600)
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


def test_a_reload_waits_for_a_missing_base_path_and_the_next_reload_for_it(
    disk: Disk, models: Models, configuration: Configuration, configure: Configure
) -> None:
    first_waits, second_waits = threading.Event(), threading.Event()

    def reload(waits: threading.Event, **texts: str) -> threading.Thread:
        def is_active() -> bool:
            waits.set()
            return True

        thread = threading.Thread(
            target=configuration.reload, args=(configure(**texts), is_active), daemon=True
        )
        thread.start()
        assert waits.wait(60)
        return thread

    first = reload(first_waits, x="", m="")
    second = reload(second_waits, x="")
    models.poll()
    assert states(models) == ""  # one bad base path, and no version of any model is loaded
    assert first.is_alive()
    assert second.is_alive()
    disk.put("x/1")
    models.poll()
    assert states(models) == "2:AVAILABLE"
    wait_until(lambda: not first.is_alive() and not second.is_alive(), "the end of both reloads")
    models.poll()
    assert (states(models), states(models, "x")) == ("2:END", "1:AVAILABLE")


def test_a_reload_ends_once_its_caller_waits_no_longer(
    configuration: Configuration, configure: Configure
) -> None:
    assert refusal(lambda: configuration.reload(configure(m=""), lambda: False)) == INACTIVE


def test_a_close_ends_the_reload_under_way(
    configuration: Configuration, configure: Configure
) -> None:
    checks: list[None] = []

    def is_active() -> bool:
        checks.append(None)
        assert len(checks) == 1, "the reload goes on"
        configuration.close()
        return True

    assert refusal(lambda: configuration.reload(configure(m=""), is_active)) == INACTIVE


def test_32_request_logging_is_refused_at_the_end(models: Models, configure: Configure) -> None:
    configuration = Configuration(models, wake=models.poll)
    with_logging = configure(m="logging_config { sampling_config { sampling_rate: 1 } }")
    assert refusal(lambda: configuration.reload(with_logging)) == (
        "INVALID_ARGUMENT: No request-logger-creator provided."
    )
    assert states(models) == "2:AVAILABLE"


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


def test_a_config_file_that_is_no_text_proto(tmp_path: Path) -> None:
    file = tmp_path / "models.config"
    file.write_text("model_config_list { confg {} }")
    with pytest.raises(ValueError, match="must be a text proto") as caught:
        read_config(str(file))
    message = str(caught.value)
    assert message.startswith(
        "model_config_file must be a text proto of tensorflow.serving.ModelServerConfig. "
        f"Received: model_config_file='{file}', Error parsing text-format "
        "tensorflow.serving.ModelServerConfig: 1:27: Message type "
        '"tensorflow.serving.ModelConfigList" has no field named "confg"'
    )
    assert message.endswith(
        '. Correct the file: model_config_list { config { name: "m" base_path: "/models/m" '
        'model_platform: "tensorflow" } }.'
    )
