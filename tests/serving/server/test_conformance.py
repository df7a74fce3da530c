"""The reference, row by row: codes, whole texts, and the shape of answers.

Against the development server, or against the tensorflow_model_server at KERAS_MRL_TFS_TARGET that
watches the folder KERAS_MRL_TFS_BASE_PATH (which the test fills, and which has the same path for
the server) for a model named "default". Its config is reloaded, and left with that model alone. Its
flags must say --max_num_load_retries=0, or a version that does not load holds up all others for
five minutes.
"""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tensorflow as tf
from google.protobuf import text_format
from tensorflow.core.framework.tensor_pb2 import TensorProto
from tensorflow.core.protobuf.saved_model_pb2 import SavedModel
from tensorflow_serving.apis.get_model_metadata_pb2 import GetModelMetadataRequest, SignatureDefMap
from tensorflow_serving.apis.get_model_status_pb2 import GetModelStatusRequest
from tensorflow_serving.apis.model_management_pb2 import ReloadConfigRequest, ReloadConfigResponse
from tensorflow_serving.apis.predict_pb2 import PredictRequest, PredictResponse

from keras_mrl_serving.server import DevServer
from tests.helpers.server_target import (
    TIMEOUT_S,
    Served,
    label,
    metadata,
    predict,
    reload,
    spec,
    status,
)

X = np.arange(8, dtype=np.float32).reshape(2, 4)
WEIGHTS = np.arange(12, dtype=np.float32).reshape(4, 3)


def tensor(text: str) -> TensorProto:
    return text_format.Parse(text, TensorProto())


ROW_2 = ("INVALID_ARGUMENT", "ModelSpec has no name specified.")
ROW_26 = (
    "INVALID_ARGUMENT",
    "ServerModelConfig type not supported by HandleReloadConfigRequest. Only ModelConfigList is "
    "currently supported",
)
LABEL = ("INVALID_ARGUMENT", "Unrecognized servable version label: canary")
A = np.ones(1, np.float32)

REFUSED = {
    "1 predict": (PredictRequest(), "INVALID_ARGUMENT", "Missing ModelSpec"),
    "1 metadata": (GetModelMetadataRequest(), "INVALID_ARGUMENT", "Missing ModelSpec"),
    "1 status": (GetModelStatusRequest(), "INVALID_ARGUMENT", "Missing ModelSpec"),
    "2 predict": (predict(inputs={}, name=""), *ROW_2),
    "2 predict, before the label": (predict(inputs={}, name="", label="canary"), *ROW_2),
    "2 metadata": (metadata("signature_def", name=""), *ROW_2),
    "3 predict": (
        predict(inputs={}, name="none"),
        "NOT_FOUND",
        "Servable not found for request: Latest(none)",
    ),
    "3 metadata": (
        metadata("signature_def", name="none"),
        "NOT_FOUND",
        "Servable not found for request: Latest(none)",
    ),
    "4": (
        predict(inputs={}, version=7),
        "NOT_FOUND",
        "Servable not found for request: Specific(default, 7)",
    ),
    "4 version 0 is a version": (
        predict(inputs={}, version=0),
        "NOT_FOUND",
        "Servable not found for request: Specific(default, 0)",
    ),
    "4 unknown model": (
        predict(inputs={}, name="none", version=7),
        "NOT_FOUND",
        "Servable not found for request: Specific(none, 7)",
    ),
    "5": (predict(inputs={}, label="canary"), *LABEL),
    "5 unknown model": (predict(inputs={}, name="none", label="canary"), *LABEL),
    "5 empty label": (
        predict(inputs={}, label=""),
        "INVALID_ARGUMENT",
        "Unrecognized servable version label: ",
    ),
    "7": (
        predict(inputs={}, signature="embed_8"),
        "FAILED_PRECONDITION",
        'Serving signature key "embed_8" not found.',
    ),
    "8 none": (
        predict(inputs={}),
        "INVALID_ARGUMENT",
        "input size does not match signature: 0!=1 len({}) != len({x}). Sent extra: {}. "
        "Missing but required: {x}.",
    ),
    "8 more": (
        predict(inputs={"x": X, "v": A, "u": A}),
        "INVALID_ARGUMENT",
        "input size does not match signature: 3!=1 len({u,v,x}) != len({x}). Sent extra: {u,v}. "
        "Missing but required: {}.",
    ),
    "8 fewer": (
        predict(inputs={"b": A}, signature="add"),
        "INVALID_ARGUMENT",
        "input size does not match signature: 1!=2 len({b}) != len({a,b}). Sent extra: {}. "
        "Missing but required: {a}.",
    ),
    "9 wrong name": (
        predict(inputs={"y": X}),
        "INVALID_ARGUMENT",
        "Signature input alias: x(feed name: serving_default_x:0) not found in request and no "
        "default value provided. Inputs expected to be in the request {y}, or default input alias "
        "set: ",
    ),
    "9 no default for it": (
        predict(inputs={"b": A}, signature="add_default"),
        "INVALID_ARGUMENT",
        "Signature input alias: a(feed name: add_default_a:0) not found in request and no default "
        "value provided. Inputs expected to be in the request {b}, or default input alias set: b",
    ),
    "10": (
        predict(inputs={"a": A, "c": A}, signature="add_default"),
        "INVALID_ARGUMENT",
        "Inputs contains invalid name. Used request inputs: a, request input: a,c",
    ),
    "11 no dtype": (
        predict(inputs={"x": TensorProto()}),
        "INVALID_ARGUMENT",
        "tensor parsing error: x",
    ),
    "11 content of another size": (
        predict(inputs={"x": tensor('dtype: 1 tensor_shape {dim {size: 2}} tensor_content: "a"')}),
        "INVALID_ARGUMENT",
        "tensor parsing error: x",
    ),
    "11 negative dim": (
        predict(inputs={"x": tensor("dtype: 1 tensor_shape {dim {size: -1}} float_val: 1")}),
        "INVALID_ARGUMENT",
        "tensor parsing error: x",
    ),
    "11 no such dtype": (
        predict(inputs={"x": tensor("dtype: 77 tensor_shape {} float_val: 1")}),
        "INVALID_ARGUMENT",
        "tensor parsing error: x",
    ),
    "12": (
        predict(("y", "z"), inputs={"x": X}),
        "INVALID_ARGUMENT",
        "output tensor alias not found in signature: z Outputs expected to be in the set "
        "{total,y}.",
    ),
    "13": (
        predict(("y", "y"), inputs={"x": X}),
        "INVALID_ARGUMENT",
        "duplicate output tensor alias: y",
    ),
    "14 string": (
        predict(inputs={"x": ["a"]}),
        "INVALID_ARGUMENT",
        "Expects arg[0] to be float but string is provided",
    ),
    "14 double": (
        predict(inputs={"x": X.astype(np.float64)}),
        "INVALID_ARGUMENT",
        "Expects arg[0] to be float but double is provided",
    ),
    "24 no field": (
        metadata(name="none"),
        "INVALID_ARGUMENT",
        "GetModelMetadataRequest must specify at least one metadata_field",
    ),
    "24 another field": (
        metadata("signature_def", "weights", name="none"),
        "INVALID_ARGUMENT",
        "Metadata field weights is not supported",
    ),
    "25 version": (
        status(version=9999),
        "NOT_FOUND",
        "Could not find version 9999 of model default",
    ),
    "25 version 0": (status(version=0), "NOT_FOUND", "Could not find version 0 of model default"),
    "25 model": (status(name="none"), "NOT_FOUND", "Could not find any versions of model none"),
    "25 no name": (status(name=""), "NOT_FOUND", "Could not find any versions of model "),
    "26 nothing": (ReloadConfigRequest(), *ROW_26),
    "26 a custom config": (
        text_format.Parse("config { custom_model_config {} }", ReloadConfigRequest()),
        *ROW_26,
    ),
}


@pytest.mark.parametrize(("request_", "code", "text"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(served: Served, request_: Any, code: str, text: str) -> None:
    assert served.refuses(request_) == (code, text)


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (np.ones((2, 5), np.float32), "Matrix size-incompatible: In[0]: [2,5], In[1]: [4,3]"),
        (np.ones(4, np.float32), "In[0] ndims must be >= 2"),
    ],
)
def test_15_a_wrong_shape_is_the_kernels_to_refuse(
    served: Served, x: np.ndarray, text: str
) -> None:
    code, details = served.refuses(predict(("y",), inputs={"x": x}))
    assert code == "INVALID_ARGUMENT"
    node = r"\n\t \[\[\{\{node [\w/]+/matmul\}\}\]\]"
    assert details is not None
    assert re.fullmatch(re.escape(text) + node, details), details


def test_15_an_empty_batch_is_fine(served: Served) -> None:
    response = served(predict(inputs={"x": X[:0]}))
    assert tf.make_ndarray(response.outputs["y"]).shape == (0, 3)


def test_texts_are_cut_at_1024_bytes(served: Served) -> None:
    code, details = served.refuses(predict(inputs={}, signature="s" * 2000))
    assert code == "FAILED_PRECONDITION"
    assert details == f'Serving signature key "{"s" * 1001}...TRUNCATED'


def test_a_deadline_ends_the_run(served: Served) -> None:
    request = predict(inputs={"steps": np.array(10**7)}, signature="count")
    with pytest.raises(grpc.RpcError) as caught:
        served(request, timeout_s=0.2)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_a_deadline_is_not_needed(served: Served) -> None:
    assert list(served(predict(inputs={"x": X}), timeout_s=None).outputs["total"].float_val)


def test_predict_answers_with_the_version_and_float_val(served: Served) -> None:
    response = served(predict(inputs={"x": X}))
    expected = text_format.Parse(
        f"""
        model_spec {{ name: "default" signature_name: "serving_default"
                      version {{ value: {served.version} }} }}
        outputs {{ key: "y" value {{ dtype: DT_FLOAT
                   tensor_shape {{ dim {{ size: 2 }} dim {{ size: 3 }} }} }} }}
        outputs {{ key: "total" value {{ dtype: DT_FLOAT tensor_shape {{ dim {{ size: 2 }} }} }} }}
        """,
        PredictResponse(),
    )
    expected.outputs["y"].float_val.extend((X @ WEIGHTS).ravel())
    expected.outputs["total"].float_val.extend(X.sum(1))
    assert response == expected


def test_predict_echoes_the_signature_asked_for(served: Served) -> None:
    request = predict(inputs={"a": A, "b": A}, signature="add", version=served.version)
    model_spec = served(request).model_spec
    assert model_spec.signature_name == "add"
    assert model_spec.version.value == served.version
    assert not model_spec.HasField("version_label")


def test_output_filter(served: Served) -> None:
    assert list(served(predict(("y",), inputs={"x": X})).outputs) == ["y"]


def test_an_input_with_a_default_may_be_left_out(served: Served) -> None:
    response = served(predict(inputs={"a": A}, signature="add_default"))
    assert list(response.outputs["total"].float_val) == [11.0]
    response = served(predict(inputs={"a": A, "b": A}, signature="add_default"))
    assert list(response.outputs["total"].float_val) == [2.0]


@pytest.mark.parametrize(
    ("output", "text"),
    [
        ("float64", "dtype: DT_DOUBLE double_val: [1, 0]"),
        ("int8", "dtype: DT_INT8 int_val: [1, 0]"),
        ("uint8", "dtype: DT_UINT8 int_val: [1, 0]"),
        ("int32", "dtype: DT_INT32 int_val: [1, 0]"),
        ("int64", "dtype: DT_INT64 int64_val: [1, 0]"),
        ("uint32", "dtype: DT_UINT32 uint32_val: [1, 0]"),
        ("uint64", "dtype: DT_UINT64 uint64_val: [1, 0]"),
        ("bool", "dtype: DT_BOOL bool_val: [true, false]"),
        ("float16", "dtype: DT_HALF half_val: [15360, 0]"),
        ("bfloat16", "dtype: DT_BFLOAT16 half_val: [16256, 0]"),
        ("complex64", "dtype: DT_COMPLEX64 scomplex_val: [1, 0, 0, 0]"),
        ("string", 'dtype: DT_STRING string_val: ["1.000000", "0.000000"]'),
    ],
)
def test_each_dtype_answers_in_its_field(served: Served, output: str, text: str) -> None:
    response = served(predict((output,), inputs={"x": [1.0, 0.0]}, signature="kinds"))
    assert response.outputs[output] == tensor(f"{text} tensor_shape {{ dim {{ size: 2 }} }}")


def test_a_scalar_has_an_empty_shape(served: Served) -> None:
    response = served(predict(("scalar",), inputs={"x": [1.0, 2.0]}, signature="kinds"))
    assert response.outputs["scalar"] == tensor("dtype: DT_FLOAT float_val: 3 tensor_shape {}")


@pytest.mark.parametrize(
    ("text", "values"),
    [
        (r'tensor_content: "\000\000\200\077\000\000\000\100"', [1.0, 2.0]),
        ("float_val: [1, 2]", [1.0, 2.0]),
        ("float_val: 3", [3.0, 3.0]),
        ("", [0.0, 0.0]),
        ("float_val: [1, 2, 3]", [1.0, 2.0]),
    ],
)
def test_inputs_come_in_both_encodings(served: Served, text: str, values: list[float]) -> None:
    x = tensor(f"dtype: DT_FLOAT tensor_shape {{ dim {{ size: 2 }} }} {text}")
    response = served(predict(("float64",), inputs={"x": x}, signature="kinds"))
    assert list(response.outputs["float64"].double_val) == values


def test_a_string_keeps_its_zero_bytes(served: Served) -> None:
    text = tensor('dtype: DT_STRING tensor_shape {} string_val: "ab\\000"')
    response = served(predict(inputs={"text": text}, signature="echo"))
    assert response.outputs["text"] == text


def test_messages_have_no_limit(served: Served) -> None:
    rows = 1_500_000
    x = np.ones((rows, 4), np.float32)
    y = served(predict(("y",), inputs={"x": x})).outputs["y"].float_val
    assert len(y) == 3 * rows
    assert y[-3:] == [18.0, 22.0, 26.0]


def test_metadata_carries_the_signatures_of_the_file(served: Served, saved_model: Path) -> None:
    response = served(metadata("signature_def"))
    assert response.model_spec == spec(GetModelStatusRequest(), version=served.version).model_spec
    assert list(response.metadata) == ["signature_def"]
    signatures = SignatureDefMap()
    assert response.metadata["signature_def"].Unpack(signatures)
    file = SavedModel.FromString((saved_model / "saved_model.pb").read_bytes())
    assert dict(signatures.signature_def) == dict(file.meta_graphs[0].signature_def)


def test_status_of_the_version_served(served: Served) -> None:
    for request in (status(), status(version=served.version), status(label="any")):
        first = served(request).model_version_status[0]
        assert (first.version, first.state) == (served.version, 30)
        assert first.HasField("status")
        assert (first.status.error_code, first.status.error_message) == (0, "")


def test_a_method_that_is_not_there(served: Served) -> None:
    call: Any = served.channel.unary_unary("/tensorflow.serving.PredictionService/PredictStreamed")
    with pytest.raises(grpc.RpcError) as caught:
        call(b"", timeout=TIMEOUT_S)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(
            'base_path: "models/default"',
            "Expected model default to have an absolute path or URI; "
            "got base_path()=models/default",
            id="28",
        ),
        pytest.param(
            'model_platform: ""',
            "Illegal setting neither ModelServerConfig::model_type (deprecated) nor "
            "ModelServerConfig::model_platform, model name is default",
            id="29 none",
        ),
        pytest.param(
            'model_platform: "caffe"',
            "Illegal to change a model's platform. For model default platform was tensorflow and "
            "new platform requested is caffe",
            id="29 changed",
        ),
    ],
)
def test_a_config_that_is_refused_changes_nothing(served: Served, text: str, message: str) -> None:
    assert served.refuses(reload(served, text)) == ("INVALID_ARGUMENT", message)
    assert served(predict(inputs={"x": X})).model_spec.version.value == served.version


def test_27_a_name_twice(served: Served) -> None:
    request = reload(served)
    request.config.model_config_list.config.add(name="default", base_path="relative")
    assert served.refuses(request) == (
        "INVALID_ARGUMENT",
        "Illegal to list model default multiple times in config list",
    )


def test_29_a_platform_nobody_has(reloaded: Served) -> None:
    assert reloaded.refuses(reload(reloaded, caffeinated='model_platform: "caffe"')) == (
        "INVALID_ARGUMENT",
        "Model caffeinated requests unsupported platform caffe",
    )


def test_30_a_label_on_a_version_that_is_not_available(reloaded: Served) -> None:
    assert reloaded.refuses(reload(reloaded, label("stable", 9999))) == (
        "FAILED_PRECONDITION",
        "Request to assign label to version 9999 of model default, which is not currently "
        "available for inference",
    )
    assert reloaded.refuses(predict(inputs={}, label="stable"))[0] == "INVALID_ARGUMENT"


def test_31_a_new_model_that_does_not_load(reloaded: Served) -> None:
    path = reloaded.base / "of-broken" / "1"
    path.mkdir(parents=True, exist_ok=True)
    with pytest.raises(grpc.RpcError) as caught:
        reloaded(reload(reloaded, broken=""))
    assert caught.value.code() is grpc.StatusCode.UNKNOWN
    assert caught.value.details() == (
        "1 model(s) did not become available: {{{name: broken version: 1} due to error: "
        "NOT_FOUND: Specified file path does not appear to contain a SavedModel bundle (should "
        f"have a file called `saved_model.pb`)\nSpecified file path: {path}}}, }}"
    )
    (only,) = reloaded(status(name="broken")).model_version_status
    assert (only.state, only.status.error_code) == (50, 5)


def test_a_reload_adds_models_with_policies_and_labels_and_leaves_them_out_again(
    reloaded: Served, publish: Callable[[Path, str], Path]
) -> None:
    base = reloaded.base / "of-second"
    shutil.rmtree(base, ignore_errors=True)
    publish(base, "1")
    publish(base, "2")

    def by_label(name: str) -> int:
        spec = reloaded(predict(inputs={"x": X}, name="second", label=name)).model_spec
        assert spec.WhichOneof("version_choice") == "version"  # the label is not echoed
        assert reloaded(metadata("signature_def", name="second", label=name)).model_spec == (
            status(name="second", version=spec.version.value).model_spec
        )
        return int(spec.version.value)

    answer = reloaded(reload(reloaded, second="model_version_policy { all {} }"))
    assert answer == text_format.Parse("status {}", ReloadConfigResponse())
    reloaded.reaches("second", (2, "AVAILABLE"), (1, "AVAILABLE"))
    both = "model_version_policy { all {} } " + label("stable", 1)
    reloaded(reload(reloaded, label("mine", reloaded.version), second=both + label("new", 2)))
    assert (by_label("stable"), by_label("new")) == (1, 2)
    assert reloaded(predict(inputs={"x": X}, label="mine")).model_spec.version.value == (
        reloaded.version
    )
    # Labels belong to one model, and a later config knows only its own.
    assert reloaded.refuses(predict(inputs={"x": X}, label="new")) == (
        "INVALID_ARGUMENT",
        "Unrecognized servable version label: new",
    )
    reloaded(reload(reloaded, second="model_version_policy { all {} } " + label("stable", 2)))
    assert by_label("stable") == 2
    assert reloaded.refuses(predict(inputs={"x": X}, name="second", label="new"))[1] == (
        "Unrecognized servable version label: new"
    )
    reloaded(reload(reloaded))
    gone = predict(inputs={"x": X}, name="second")
    reloaded.reaches("second", (2, "END"), (1, "END"))
    assert reloaded.refuses(gone)[1] == "Servable not found for request: Latest(second)"


@pytest.mark.skipif(
    "KERAS_MRL_TFS_TARGET" in os.environ, reason="needs a server that starts with an empty config"
)
def test_6_labels_before_any_config(tmp_path: Path) -> None:
    config = tmp_path / "models.config"
    config.touch()
    with DevServer(model_config_file=config) as address:
        served = Served(address, tmp_path, 0)
        assert served.refuses(predict(inputs={}, label="stable")) == (
            "UNAVAILABLE",
            "Model labels does not init yet.stable",
        )
        assert served.refuses(predict(inputs={}))[0] == "NOT_FOUND"
        served.channel.close()
