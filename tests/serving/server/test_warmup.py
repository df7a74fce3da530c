"""Warm-up records: which are run before a model serves, and which keep it from serving."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from google.protobuf import text_format
from tensorflow_serving.apis.prediction_log_pb2 import PredictionLog

from keras_mrl_serving.server.batching_config import batching_parameters
from keras_mrl_serving.server.loading import LoadOptions, load
from keras_mrl_serving.server.status import StatusError

Warm = Callable[..., Path]
EXAMPLES = "input { example_list { examples {} examples {} } }"


class Counting(tf.Module):
    """Adds up the rows it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = tf.Variable(0)

    def _count(self, x: tf.Tensor) -> tf.Tensor:
        return tf.fill(tf.shape(x), self.rows.assign_add(tf.size(x)))

    @tf.function(input_signature=[tf.TensorSpec((None,), name="x")])
    def count(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"rows": self._count(x)}

    @tf.function(input_signature=[tf.TensorSpec((None,), tf.string, name="inputs")])
    def classify(self, inputs: tf.Tensor) -> dict[str, tf.Tensor]:
        scores = tf.cast(self._count(inputs), tf.float32)
        return {"scores": scores[:, None], "classes": tf.strings.as_string(scores)[:, None]}

    @tf.function(input_signature=[tf.TensorSpec((None,), tf.string, name="inputs")])
    def regress(self, inputs: tf.Tensor) -> dict[str, tf.Tensor]:
        # The length of a serialized example shows whether the context was put before it.
        self.rows.assign_add(tf.reduce_sum(tf.strings.length(inputs)))
        return {"outputs": tf.cast(self._count(inputs), tf.float32)}


@pytest.fixture(scope="module")
def counting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("counting") / "1"
    model = Counting()
    signatures = {"serving_default": model.count, "c": model.classify, "r": model.regress}
    tf.saved_model.save(model, str(path), signatures=signatures)
    return path


@pytest.fixture
def warm(counting: Path, tmp_path: Path) -> Warm:
    """The model with these records beside it."""

    def put(*records: PredictionLog) -> Path:
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(counting, path)
        with tf.io.TFRecordWriter(str(file(path))) as writer:
            for record in records:
                writer.write(record.SerializeToString())
        return path

    return put


def file(path: Path) -> Path:
    (path / "assets.extra").mkdir(exist_ok=True)
    return path / "assets.extra" / "tf_serving_warmup_requests"


def predict_log(x: Any, spec: str = "", outputs: Sequence[str] = ()) -> PredictionLog:
    log = PredictionLog()
    log.predict_log.request.output_filter.extend(outputs)
    log.predict_log.request.inputs["x"].CopyFrom(tf.make_tensor_proto(x))
    text_format.Parse(spec, log.predict_log.request.model_spec)
    return log


def record(text: str) -> PredictionLog:
    return text_format.Parse(text, PredictionLog())


def rows_seen(path: Path, options: LoadOptions | None = None) -> int:
    """How many rows the model has seen before it serves."""
    session = load(str(path), options or LoadOptions())
    try:
        x = np.ones(1, np.float32)
        return int(session.run("serving_default", {"x": x})["rows"][0]) - 1
    finally:
        session.close()


def refusal(path: Path) -> tuple[str, str]:
    with pytest.raises(StatusError) as caught:
        load(str(path), LoadOptions())
    return caught.value.code.name, caught.value.message


def test_records_are_run_before_the_model_serves(warm: Warm, counting: Path) -> None:
    path = warm(predict_log([1.0, 2.0]), predict_log([1.0, 2.0, 3.0], outputs=["rows"]), record(""))
    assert rows_seen(counting) == 0
    assert rows_seen(path) == 5
    assert rows_seen(path, LoadOptions(enable_model_warmup=False)) == 0


def test_of_the_model_spec_the_signature_alone_counts(warm: Warm) -> None:
    spec = 'name: "another" version { value: 77 } signature_name: "serving_default"'
    assert rows_seen(warm(predict_log([1.0], spec))) == 1


def test_records_go_through_the_batching_session(warm: Warm) -> None:
    parameters: Any = batching_parameters(True, None)
    text_format.Parse("max_batch_size {value: 8} allowed_batch_sizes: [1, 8]", parameters)
    options = LoadOptions(batching_parameters=parameters)
    assert rows_seen(warm(predict_log([1.0, 2.0])), options) == 8


def call(kind: str, signature: str, body: str = EXAMPLES) -> PredictionLog:
    spec = f'model_spec {{ signature_name: "{signature}" }}'
    return record(f"{kind}_log {{ request {{ {spec} {body} }} }}")


def tasks(*signatures_and_methods: tuple[str, str], name: str = "m") -> PredictionLog:
    text = "".join(
        f'tasks {{ model_spec {{ name: "{name}" signature_name: "{signature}" }} '
        f'method_name: "tensorflow/serving/{method}" }}'
        for signature, method in signatures_and_methods
    )
    return record(f"multi_inference_log {{ request {{ {text} {EXAMPLES} }} }}")


def test_classify_regress_and_multi_inference_are_run(warm: Warm) -> None:
    assert rows_seen(warm(call("classify", "c"))) == 2
    assert rows_seen(warm(call("regress", "r"))) == 2
    assert rows_seen(warm(tasks(("c", "classify"), ("r", "regress")))) == 4


def test_a_context_stands_before_each_example(warm: Warm) -> None:
    context = 'features { feature { key: "k" } }'
    length = text_format.Parse(context, tf.train.Example()).ByteSize()
    body = f"input {{ example_list_with_context {{ context {{ {context} }} examples {{}} }} }}"
    assert rows_seen(warm(call("regress", "r", body))) == length + 1


NO_EXAMPLES = "input { example_list {} }"
UNSUPPORTED = "Unsupported log_type for warmup: "


@pytest.mark.parametrize(
    ("log", "code", "text"),
    [
        (
            predict_log([1.0], 'signature_name: "none"'),
            "FAILED_PRECONDITION",
            'Serving signature key "none" not found.',
        ),
        (
            predict_log([1]),
            "INVALID_ARGUMENT",
            "Expects arg[0] to be float but int32 is provided",
        ),
        (
            predict_log([1.0], outputs=["y"]),
            "INVALID_ARGUMENT",
            "output tensor alias not found in signature: y Outputs expected to be in the set "
            "{rows}.",
        ),
        (record("session_run_log {}"), "UNIMPLEMENTED", f"{UNSUPPORTED}5"),
        (record("predict_streamed_log {}"), "UNIMPLEMENTED", f"{UNSUPPORTED}7"),
        (
            call("classify", "none"),
            "INVALID_ARGUMENT",
            "No signature was found with the name: none",
        ),
        (
            call("regress", "c"),
            "INVALID_ARGUMENT",
            "Expected one output Tensor.",
        ),
        (call("classify", "c", NO_EXAMPLES), "INVALID_ARGUMENT", "Input is empty."),
        (call("regress", "r", ""), "INVALID_ARGUMENT", "Input is empty."),
        (
            tasks(("c", "classify"), ("c", "classify")),
            "INVALID_ARGUMENT",
            "Duplicate evaluation of signature: c",
        ),
        (
            tasks(("none", "classify")),
            "INVALID_ARGUMENT",
            "Requested signature not found in model graph: none",
        ),
        (
            tasks(("c", "classify"), name=""),
            "INVALID_ARGUMENT",
            "Found ModelSpec with an empty model name.",
        ),
        (
            tasks(("c", "predict")),
            "UNIMPLEMENTED",
            "Unsupported signature method_name: tensorflow/serving/predict",
        ),
    ],
)
def test_a_record_that_fails_fails_the_load(
    warm: Warm, log: PredictionLog, code: str, text: str
) -> None:
    assert refusal(warm(predict_log([1.0]), log)) == (code, text)


@pytest.mark.parametrize(("kind", "word"), [("classify", "classification"), ("regress", "regress")])
def test_classify_on_a_predict_signature(warm: Warm, kind: str, word: str) -> None:
    code, text = refusal(warm(call(kind, "")))
    assert code == "INVALID_ARGUMENT"
    assert text.startswith(f"No {word}")
    assert ' inputs found in SignatureDef: inputs {\n  key: "x"\n' in text


def test_the_1001st_record(warm: Warm) -> None:
    log = predict_log([1.0])
    assert rows_seen(warm(*[log] * 1000)) == 1000
    path = warm(*[log] * 1001)
    assert refusal(path) == (
        "INVALID_ARGUMENT",
        f"Number of warmup records exceeds the maximum (1000) at {file(path)}",
    )


def test_a_file_that_is_no_tfrecord(warm: Warm) -> None:
    path = warm()
    file(path).write_bytes(b"these are not the records of a TFRecord file")
    assert refusal(path) == (
        "DATA_LOSS",
        "corrupted record at 0 (Is this even a TFRecord file?). Please verify your warmup data is "
        "in TFRecord format.",
    )


def test_a_file_that_was_cut(warm: Warm) -> None:
    path = warm(predict_log([1.0]))
    whole = file(path).read_bytes()
    file(path).write_bytes(whole[:-2])
    code, text = refusal(path)
    assert code == "DATA_LOSS"
    assert text.startswith("truncated record at 0")
    assert text.endswith(". Please verify your warmup data is in TFRecord format.")


def test_a_record_that_is_no_prediction_log(warm: Warm) -> None:
    path = warm()
    with tf.io.TFRecordWriter(str(file(path))) as writer:
        writer.write(b"\xffno")
    assert refusal(path) == (
        "INVALID_ARGUMENT",
        f"Failed to parse warmup record: \ufffdno from {file(path)}",
    )


def test_a_folder_where_the_file_should_be(warm: Warm) -> None:
    path = warm()
    file(path).unlink()
    file(path).mkdir()
    assert refusal(path) == ("FAILED_PRECONDITION", f"{file(path)}; Is a directory")
