"""`keras-mrl deploy`: what it writes parses as what reads it, and says what the model says."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import yaml
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from tensorflow_serving.config.model_server_config_pb2 import ModelServerConfig

from keras_mrl_cli.deploy import FILES
from keras_mrl_cli.serve import FLAGS
from keras_mrl_serving import Client, InvalidInputError, Options
from keras_mrl_serving.server import DevServer
from keras_mrl_serving.server.batching_config import batching_options, read_batching_parameters
from tests.helpers.cli import FRAMEWORKS, KERAS_MRL, Call, Exported, run_without

ROOT = Path(__file__).parents[2]


@pytest.fixture
def deployed(exported: Exported, tmp_path: Path, call: Call) -> Path:
    out = tmp_path / "a" / "deploy"
    ended = call("deploy", str(out), "--base-path", str(exported.base_path))
    assert (ended.status, ended.err) == (0, "")
    assert ended.out.splitlines() == [str(out / name) for name in FILES]
    return out


def flags(lines: list[str]) -> dict[str, str]:
    return dict(line.removeprefix("--").split("=", 1) for line in lines)


def documents(file: Path) -> dict[str, Any]:
    return {document["kind"]: document for document in yaml.safe_load_all(file.read_text())}


def test_every_file_is_written(deployed: Path) -> None:
    assert {file.name for file in deployed.iterdir()} == set(FILES)
    assert not [file for file in deployed.iterdir() if "${" in file.read_text()]


def test_the_models_are_a_model_server_config(deployed: Path) -> None:
    text = (deployed / "models.config").read_text()
    (model,) = text_format.Parse(text, ModelServerConfig()).model_config_list.config
    assert (model.name, model.base_path) == ("tiny_One", "/models/tiny_One")
    assert model.model_platform == "tensorflow"


def test_the_batching_is_one_the_server_takes(deployed: Path) -> None:
    options = batching_options(read_batching_parameters(str(deployed / "batching.config")))
    assert options.max_batch_size == 128
    assert options.allowed_batch_sizes == (1, 2, 4, 8, 16, 32, 64, 128)
    assert options.batch_timeout_s == 0.001


@pytest.mark.parametrize(
    ("rows", "allowed"), [("1", (1,)), ("2", (1, 2)), ("48", (1, 2, 4, 8, 16, 32, 48))]
)
def test_the_allowed_sizes_end_at_the_largest(
    exported: Exported, tmp_path: Path, rows: str, allowed: tuple[int, ...], call: Call
) -> None:
    command = ["deploy", str(tmp_path), "--base-path", str(exported.base_path)]
    assert call(*command, "--max-batch-size", rows).status == 0
    options = batching_options(read_batching_parameters(str(tmp_path / "batching.config")))
    assert options.allowed_batch_sizes == allowed
    assert f"Options(max_batch_size={rows})" in (tmp_path / "README.md").read_text()


def test_the_monitoring_is_a_monitoring_config(deployed: Path) -> None:
    # tensorflow-serving-api ships without tensorflow_serving/config/monitoring_config.proto.
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="monitoring.proto", syntax="proto3")
    prometheus = file.message_type.add(name="PrometheusConfig")
    prometheus.field.add(name="enable", number=1, type=kinds.TYPE_BOOL, label=1)
    prometheus.field.add(name="path", number=2, type=kinds.TYPE_STRING, label=1)
    file.message_type.add(name="MonitoringConfig").field.add(
        name="prometheus_config",
        number=1,
        type=kinds.TYPE_MESSAGE,
        type_name=".PrometheusConfig",
        label=1,
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    message = message_factory.GetMessageClass(pool.FindMessageTypeByName("MonitoringConfig"))()
    parsed: Any = text_format.Parse((deployed / "monitoring.config").read_text(), message)
    assert parsed.prometheus_config.enable
    assert parsed.prometheus_config.path == "/monitoring/prometheus/metrics"


def test_the_dashboard_asks_for_metrics_that_there_are(deployed: Path) -> None:
    board = json.loads((deployed / "grafana.json").read_text())
    assert board["title"] == "keras-mrl: tiny_One"
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert variables["model"]["query"] == "tiny_One"
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    asked = {
        own for query in queries for own in re.findall(r"keras_mrl\w+|:tensorflow:[\w:]+", query)
    }
    # As Prometheus spells OpenTelemetry's names, with the unit and `_total` of a counter.
    documented = re.findall(
        r"`(keras_mrl_\w+|:tensorflow:[\w:]+)`", (ROOT / "docs/watch.md").read_text()
    )
    assert {re.sub("_(bucket|count)$", "", name) for name in asked} == {
        re.sub("_(bucket|count)$", "", name) for name in documented
    }
    cells = [panel["gridPos"] for panel in board["panels"]]
    assert len({(cell["x"], cell["y"]) for cell in cells}) == len(cells)
    labels = {label for query in queries for label in re.findall(r"\$(\w+)", query)}
    assert labels == {"model", "__rate_interval"}


def test_compose_and_kubernetes_start_the_same_server(deployed: Path, exported: Exported) -> None:
    compose = yaml.safe_load((deployed / "docker-compose.yml").read_text())
    (service,) = compose["services"].values()
    kinds = documents(deployed / "kubernetes.yaml")
    pod = kinds["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert flags(service["command"]) == flags(container["args"])
    assert service["entrypoint"] == container["command"] == ["tensorflow_model_server"]
    assert service["image"] == container["image"] == "tensorflow/serving:2.20.0"
    models, config = service["volumes"]
    assert models["source"] == str(exported.base_path)
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"models": models["target"], "config": config["target"]}
    values = flags(container["args"])
    named = {Path(path).name for path in values.values() if path.startswith(config["target"])}
    kustomization = yaml.safe_load((deployed / "kustomization.yaml").read_text())
    (made,) = kustomization["configMapGenerator"]
    assert named == set(made["files"])
    assert made["name"] == pod["volumes"][1]["configMap"]["name"]
    assert kustomization["resources"] == ["kubernetes.yaml"]
    assert values["grpc_channel_arguments"] == (
        "grpc.max_connection_age_ms=60000,grpc.keepalive_permit_without_calls=1,"
        "grpc.http2.min_ping_interval_without_data_ms=10000"
    )


def test_the_flags_are_those_of_the_real_server(deployed: Path) -> None:
    compose = yaml.safe_load((deployed / "docker-compose.yml").read_text())
    (service,) = compose["services"].values()
    # The one flag that the development server lacks.
    assert set(flags(service["command"])) - set(FLAGS) == {"monitoring_config_file"}


def test_the_development_server_serves_by_them(deployed: Path, exported: Exported) -> None:
    compose = yaml.safe_load((deployed / "docker-compose.yml").read_text())
    (service,) = compose["services"].values()
    values = flags(service["command"])
    for name in ("port", "rest_api_port", "monitoring_config_file"):
        del values[name]
    config = deployed / "models.config"
    config.write_text(config.read_text().replace("/models/tiny_One", str(exported.base_path)))
    settings: dict[str, Any] = {
        name: True if value == "true" else value.replace("/config", str(deployed))
        for name, value in values.items()
    }
    rows = np.random.default_rng(0).random((200, 6), np.float32)
    with (
        DevServer(**settings) as target,
        Client(target, "tiny_One", options=Options(max_batch_size=128)) as client,
        grpc.insecure_channel(target) as channel,
    ):
        assert client.classify(rows, 4).class_ids.shape == (200, 3)
        health = HealthStub(channel).Check(HealthCheckRequest(), timeout=30)
        assert health.status == HealthCheckResponse.SERVING
        with Client(target, "tiny_One") as unaware, pytest.raises(InvalidInputError) as caught:
            unaware.classify(rows, 4)
    assert "Task size 200 is larger than maximum input batch size 128" in str(caught.value)


def test_the_service_is_headless_and_leads_to_the_pods(deployed: Path) -> None:
    kinds = documents(deployed / "kubernetes.yaml")
    assert set(kinds) == {"Service", "Deployment", "PodDisruptionBudget"}
    service, deployment = kinds["Service"]["spec"], kinds["Deployment"]["spec"]
    assert service["clusterIP"] == "None"
    labels = deployment["template"]["metadata"]["labels"]
    assert service["selector"] == labels == {"app": "tiny-one"}
    assert deployment["selector"]["matchLabels"] == labels
    assert kinds["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    (container,) = deployment["template"]["spec"]["containers"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["grpc"] == {"port": 8500}  # the health service, without a name
    assert flags(container["args"])["enable_grpc_healthcheck_service"] == "true"
    assert kinds["Service"]["metadata"]["name"] == "tiny-one"
    assert "dns:///tiny-one:8500" in (deployed / "README.md").read_text()


def test_what_is_asked_for(exported: Exported, tmp_path: Path, call: Call) -> None:
    image = f"registry:5000/tfs@sha256:{'5e1f' * 16}"
    flags_given = f"--name birds --image {image} --replicas 5 --port 9000 --rest-port 9001"
    flags_given += " --memory 4096"
    command = ["deploy", str(tmp_path), "--base-path", str(exported.base_path)]
    assert call(*command, *flags_given.split()).status == 0
    kinds = documents(tmp_path / "kubernetes.yaml")
    deployment = kinds["Deployment"]["spec"]
    assert deployment["replicas"] == 5
    (container,) = deployment["template"]["spec"]["containers"]
    assert container["image"] == image
    assert container["resources"]["limits"] == {"memory": "4096Mi"}
    assert container["readinessProbe"]["grpc"]["port"] == 9000
    values = flags(container["args"])
    assert (values["port"], values["rest_api_port"]) == ("9000", "9001")
    compose = yaml.safe_load((tmp_path / "docker-compose.yml").read_text())
    assert compose["services"]["birds"]["ports"] == ["9000:9000", "9001:9001"]
    assert compose["services"]["birds"]["mem_limit"] == "4096m"
    assert 'name: "birds"' in (tmp_path / "models.config").read_text()


def test_the_memory_grows_with_the_model(exported: Exported, tmp_path: Path, call: Call) -> None:
    version = tmp_path / "models" / "1"
    (version / "assets.extra").mkdir(parents=True)
    for name in ("saved_model.pb", "assets.extra/keras_mrl.json"):
        shutil.copy(exported.base_path / "1" / name, version / name)
    with open(version / "variables", "wb") as file:
        file.truncate(100 * 2**20 - 2**19)  # a hole: no disk is used
    assert call("deploy", str(tmp_path), "--base-path", str(version.parent)).status == 0
    compose = yaml.safe_load((tmp_path / "docker-compose.yml").read_text())
    assert compose["services"]["tiny-one"]["mem_limit"] == f"{1024 + 300}m"


@pytest.mark.parametrize("tower", ["inputs", "other_tower"])
def test_what_differs_in_shape_is_not_batched(
    exported: Exported, tmp_path: Path, call: Call, tower: str
) -> None:
    """Prompts, say: TensorFlow Serving would refuse those that meet others of another length."""
    version = shutil.copytree(exported.base_path / "1", tmp_path / "models" / "1")
    manifest = version / "assets.extra" / "keras_mrl.json"
    fields = json.loads(manifest.read_text())
    inputs = {"x": {"dtype": "float32", "shape": [None, None]}}
    fields[tower] = {"inputs": inputs} if tower == "other_tower" else inputs
    manifest.write_text(json.dumps(fields))
    out = tmp_path / "out"
    assert call("deploy", str(out), "--base-path", str(version.parent)).status == 0
    compose = yaml.safe_load((out / "docker-compose.yml").read_text())
    pods = documents(out / "kubernetes.yaml")["Deployment"]["spec"]["template"]["spec"]
    for lines in (compose["services"]["tiny-one"]["command"], pods["containers"][0]["args"]):
        assert flags(lines)["enable_batching"] == "false"
        assert "batching_parameters_file" not in flags(lines)  # the server refuses it alone
    why = "# Not in use: requests differ in the shape of x, and only equal shapes are batched."
    assert why in (out / "batching.config").read_text()
    assert why in (out / "docker-compose.yml").read_text()


def with_inputs(exported: Exported, base: Path, *names: str) -> Path:
    """A base path whose one version takes inputs of these names, in any length."""
    version = shutil.copytree(exported.base_path / "1", base / "1")
    manifest = version / "assets.extra" / "keras_mrl.json"
    fields = json.loads(manifest.read_text())
    fields["inputs"] = {name: {"dtype": "float32", "shape": [None, None]} for name in names}
    manifest.write_text(json.dumps(fields))
    return base


NAMES = [
    "in$put", "$(HOSTNAME)", "${HOME}", "$port", "a: b", "a # b", "- a", "&a", "*a", "!!python/x",
    "'", '"', "a|b", "<script>alert(1)</script>", "`x`", "größe", "値", "\\", "{a}", "x" * 200,
    "%s", "{0}",
]  # fmt: skip


def test_a_name_of_the_model_is_a_word_of_a_comment_alone(
    exported: Exported, tmp_path: Path, call: Call
) -> None:
    """It reaches no flag of the server, no key and no variable, of compose or of Kubernetes."""
    plain = tmp_path / "plain"
    command = ["deploy", "--memory", "4096", "--base-path"]
    models = with_inputs(exported, tmp_path / "models", "x")
    assert call(*command, str(models), str(plain)).status == 0
    for number, name in enumerate(NAMES):
        out = tmp_path / str(number)
        base = with_inputs(exported, tmp_path / f"models{number}", name)
        assert call(*command, str(base), str(out)).status == 0, name
        for file in FILES:
            text, expected = (folder.joinpath(file).read_text() for folder in (out, plain))
            text = text.replace(f"models{number}", "models")
            if file.endswith((".yml", ".yaml")):
                kinds = [list(yaml.safe_load_all(text)) for text in (text, expected)]
                assert kinds[0] == kinds[1], (name, file)
            changed = [
                line
                for line, before in zip(text.splitlines(), expected.splitlines(), strict=True)
                if line != before
            ]
            shown = [line.partition(" shape of ")[2].partition(", and only")[0] for line in changed]
            assert all(re.fullmatch(r"[A-Za-z0-9_.:/ \\-]+", words) for words in shown), changed


@pytest.mark.parametrize(
    "name",
    ["x\n- --model_config_file=/evil #", "\x1b[2J", "a\u202eb", "a\u200b", "\u2028", "a\x9bb", "",
     "a\n", "x" * 201],
)  # fmt: skip
def test_a_name_that_does_not_print_is_refused(
    name: str, exported: Exported, tmp_path: Path, call: Call
) -> None:
    base = with_inputs(exported, tmp_path / "models", "x", name)
    text = call.refused("deploy", str(tmp_path / "out"), "--base-path", str(base))
    assert text == (
        "A key of inputs of a manifest must be a name of 1 to 200 characters that print. "
        f"Received: {name!r:.80}. "
        "Export the model again with keras_mrl_export.export_saved_model."
    )
    assert not (tmp_path / "out").exists()


def test_a_path_is_a_string_to_yaml_and_to_compose(
    exported: Exported, tmp_path: Path, call: Call
) -> None:
    base = tmp_path / 'a "b" $HOME: #c 😀 \n\x1b\x85\u2028\u202e\ufeff\\'
    base.mkdir()
    (base / "1").symlink_to(exported.base_path / "1")
    out = tmp_path / "out"
    assert call("deploy", str(out), "--base-path", str(base)).status == 0
    compose = yaml.safe_load((out / "docker-compose.yml").read_text())
    source = compose["services"]["tiny-one"]["volumes"][0]["source"]
    assert source.replace("$$", "$") == str(base)
    assert "$$HOME" in source


def test_a_path_that_is_no_text_is_refused(exported: Exported, tmp_path: Path, call: Call) -> None:
    base = tmp_path / os.fsdecode(b"a\xff")
    base.mkdir()
    (base / "1").symlink_to(exported.base_path / "1")
    assert call.refused("deploy", str(tmp_path / "out"), "--base-path", str(base)) == (
        f"--base-path must be a path in UTF-8. Received: {tmp_path}/a\\udcff. "
        "Rename the folder, or link to it."
    )
    assert not (tmp_path / "out").exists()


def test_a_version_is_named_by_its_number(exported: Exported, tmp_path: Path, call: Call) -> None:
    """TensorFlow Serving reads a folder named so as version 7."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "\n007").symlink_to(exported.base_path / "1")
    out = tmp_path / "out"
    assert call("deploy", str(out), "--base-path", str(tmp_path / "models")).status == 0
    assert " for version 7 of model " in (out / "README.md").read_text()


@pytest.mark.parametrize(
    "name", ["on", "No", "y", "null", "true", "1e3", "0x1F", "0o7", "12", "1.5", "2026-11-25"]
)
def test_a_name_is_a_string_to_yaml(
    name: str, exported: Exported, tmp_path: Path, call: Call
) -> None:
    command = ["deploy", str(tmp_path), "--base-path", str(exported.base_path)]
    assert call(*command, "--name", name).status == 0
    (service,) = yaml.safe_load((tmp_path / "docker-compose.yml").read_text())["services"]
    kinds = documents(tmp_path / "kubernetes.yaml")
    slug = kinds["Service"]["metadata"]["name"]
    assert isinstance(slug, str)
    assert service == slug
    kustomization = yaml.safe_load((tmp_path / "kustomization.yaml").read_text())
    everything = [*strings([*kinds.values(), kustomization])]
    assert everything.count(slug) == 9  # 3 names, the labels and selectors that repeat them
    assert {f"{slug}-models", f"{slug}-config", f"/models/{name}"} <= set(everything)


def strings(value: Any) -> list[str]:
    """Every string of a document, but the keys."""
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for part in parts for text in strings(part)]


@pytest.mark.parametrize(
    "image",
    ["", "-", "~", "a b", "/tfs", "tfs/", "tfs:", "tfs@", "Tfs", "a//b", "tfs:-1",
     "tfs@sha256:5e1f", "a: b", "tfs:1:2", "http://a/b", "tfs\n", "täs"],
)  # fmt: skip
def test_what_is_no_image_is_refused(
    image: str, exported: Exported, tmp_path: Path, call: Call
) -> None:
    command = ["deploy", str(tmp_path / "out"), "--base-path", str(exported.base_path)]
    assert call.refused(*command, "--image", image, status=2) == (
        "--image must be the name of an image. "
        f"Received: {image!r}. Give for example tensorflow/serving:2.20.0."
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "image",
    ["on", "null", "tensorflow/serving:2.20.0-gpu", "localhost:5000/a/b_c__d-e.f:V1_2",
     "a.b-c.io/x"],
)  # fmt: skip
def test_an_image_is_a_string_to_yaml(
    image: str, exported: Exported, tmp_path: Path, call: Call
) -> None:
    command = ["deploy", str(tmp_path), "--base-path", str(exported.base_path)]
    assert call(*command, "--image", image).status == 0
    (service,) = yaml.safe_load((tmp_path / "docker-compose.yml").read_text())["services"].values()
    pod = documents(tmp_path / "kubernetes.yaml")["Deployment"]["spec"]["template"]["spec"]
    assert service["image"] == pod["containers"][0]["image"] == image


def test_nothing_is_replaced_without_force(deployed: Path, exported: Exported, call: Call) -> None:
    (deployed / "README.md").unlink()
    mine = deployed / "models.config"
    mine.write_text("mine")
    command = ["deploy", str(deployed), "--base-path", str(exported.base_path)]
    assert call.refused(*command) == (
        f"Files are replaced only with --force. Received: {deployed}, which holds "
        "docker-compose.yml. Add --force, or name another folder."
    )
    assert mine.read_text() == "mine"
    assert not (deployed / "README.md").exists()
    assert call(*command, "--force").status == 0
    assert mine.read_text() != "mine"


def test_what_cannot_be_deployed(exported: Exported, tmp_path: Path, call: Call) -> None:
    out, base = str(tmp_path / "out"), str(exported.base_path)
    version = exported.base_path / "1"
    assert call.refused("deploy", out, "--base-path", str(version)) == (
        "--base-path must be the folder above the versions. "
        f"Received: {version}, which is itself a version. Give {exported.base_path}."
    )
    foreign = tmp_path / "foreign" / "3"
    foreign.mkdir(parents=True)
    shutil.copy(version / "saved_model.pb", foreign)
    assert call.refused("deploy", out, "--base-path", str(foreign.parent)) == (
        "A deployment is made for a model that carries a manifest. "
        f"Received: {foreign}, which has none. Export it with keras-mrl export."
    )
    assert call.refused("deploy", out, "--base-path", base, "--name", 'a"b') == (
        "The name of a model that is served is of letters, digits, '_', '.' and '-', the first and "
        "the last a letter or digit. Received: 'a\"b'. Give another: --name."
    )
    assert call.refused("deploy", out, "--base-path", base, "--name", "") == (
        "The name of a model that is served is of letters, digits, '_', '.' and '-', the first and "
        "the last a letter or digit. Received: ''. Give another: --name."
    )
    assert call.refused("deploy", out, "--base-path", base, "--port", "8501", status=2) == (
        "gRPC and HTTP need a port each. Received: --port and --rest-port 8501. Name another."
    )
    assert call.refused("deploy", out, "--base-path", base, "--replicas", "0", status=2) == (
        "--replicas must lie in 1..1000. Received: 0. Leave it out for 2."
    )
    assert not (tmp_path / "out").exists()
    file = tmp_path / "file"
    file.touch()
    assert call.refused("deploy", str(file), "--base-path", base) == (
        f"OUT_DIR must be a folder that can be written. Received: {file} (File exists). "
        "Name another."
    )


def test_it_needs_the_client_alone(exported: Exported, tmp_path: Path) -> None:
    words = [*KERAS_MRL, "deploy", "out", "--base-path", str(exported.base_path)]
    status, out, err = run_without(FRAMEWORKS, tmp_path, *words)
    assert (status, err) == (0, "")
    assert out.splitlines() == [f"out/{name}" for name in FILES]


def test_the_dims_are_the_manifest_s(deployed: Path, exported: Exported) -> None:
    manifest = json.loads((exported.base_path / "1/assets.extra/keras_mrl.json").read_text())
    dims = ", ".join(map(str, manifest["dims"]))
    assert (
        f"version 1 of model `tiny_One` (classifier, dims {dims})"
        in (deployed / "README.md").read_text()
    )
