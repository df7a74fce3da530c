"""SavedModelSession runs as TensorFlow Serving does, with the same error texts."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.util import deprecation

from keras_mrl_serving._session import RUNS_AS_TF_SERVING, SavedModelSession

X = np.arange(8, dtype=np.float32).reshape(2, 4)
WEIGHTS = np.arange(12, dtype=np.float32).reshape(4, 3)


@pytest.fixture(scope="module")
def session(saved_model: Path) -> Iterator[SavedModelSession]:
    with SavedModelSession(saved_model) as session:
        yield session


def test_the_private_run_of_tensorflow_is_there() -> None:
    assert RUNS_AS_TF_SERVING


def test_signatures_are_those_of_the_file(session: SavedModelSession) -> None:
    assert sorted(session.signatures) == sorted(
        "__saved_model_init_op add add_default count echo kinds serving_default".split()
    )
    assert session.signatures["serving_default"].inputs["x"].name == "serving_default_x:0"


def test_all_outputs_unless_named(session: SavedModelSession) -> None:
    outputs = session.run("serving_default", {"x": X})
    assert sorted(outputs) == ["total", "y"]
    np.testing.assert_array_equal(outputs["y"], X @ WEIGHTS)
    assert list(session.run("serving_default", {"x": X}, ["total"])) == ["total"]
    assert list(session.run("serving_default", {"x": X}, ["y", "total"])) == ["y", "total"]


def test_every_output_is_an_array(session: SavedModelSession) -> None:
    outputs = session.run("kinds", {"x": np.array([1.0], np.float32)})
    assert {type(array) for array in outputs.values()} == {np.ndarray}
    assert outputs["scalar"].shape == ()
    assert outputs["bfloat16"].dtype == tf.bfloat16.as_numpy_dtype


def test_a_scalar_string_keeps_its_zero_bytes(session: SavedModelSession) -> None:
    text = session.run("echo", {"text": np.array(b"ab\0", object)})["text"]
    assert text.shape == ()
    assert text.item() == b"ab\0"


def test_a_wrong_dtype_has_the_runtimes_text(session: SavedModelSession) -> None:
    with pytest.raises(tf.errors.InvalidArgumentError) as caught:
        session.run("serving_default", {"x": X.astype(np.int32)})
    # Session.run would cast in silence; make_callable has another text.
    assert caught.value.message == "Expects arg[0] to be float but int32 is provided"


def test_an_empty_batch_is_fine(session: SavedModelSession) -> None:
    assert session.run("serving_default", {"x": X[:0]})["y"].shape == (0, 3)


def test_an_init_op_has_no_output(session: SavedModelSession) -> None:
    with pytest.raises(tf.errors.OutOfRangeError) as caught:
        session.run("__saved_model_init_op", {})
    message = "Node 'NoOp' (type: 'NoOp', num of outputs: 0) does not have output 0"
    assert caught.value.message == message


def test_a_run_ends_at_its_timeout(session: SavedModelSession) -> None:
    assert session.run("count", {"steps": np.array(7)}, timeout_s=60.0)["steps"] == 7
    with pytest.raises(tf.errors.DeadlineExceededError) as caught:
        session.run("count", {"steps": np.array(10**7)}, timeout_s=0.02)
    assert caught.value.message == "Timed out waiting for notification"


def test_a_deadline_just_passed_is_not_no_deadline(session: SavedModelSession) -> None:
    with pytest.raises(tf.errors.DeadlineExceededError):
        session.run("count", {"steps": np.array(10**7)}, timeout_s=0.0)


def test_the_public_api_does_as_well(saved_model: Path) -> None:
    with SavedModelSession(saved_model, as_tf_serving=False) as session:
        outputs = session.run("serving_default", {"x": X}, ["y"], timeout_s=60.0)
    np.testing.assert_array_equal(outputs["y"], X @ WEIGHTS)


def test_unknown_names_are_key_errors(session: SavedModelSession) -> None:
    with pytest.raises(KeyError, match=r"^'nothing'$"):
        session.run("nothing", {})
    with pytest.raises(KeyError, match=r"^'z'$"):
        session.run("serving_default", {"z": X})


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    text = f"SavedModel file does not exist at: {tmp_path}/{{saved_model.pbtxt|saved_model.pb}}"
    with pytest.raises(OSError, match=f"^{re.escape(text)}$"):
        SavedModelSession(tmp_path)


def test_a_model_half_copied_loads_and_its_runs_name_what_is_missing(
    saved_model: Path, tmp_path: Path
) -> None:
    half = tmp_path / "half"
    shutil.copytree(saved_model, half)
    shutil.rmtree(half / "variables")
    with SavedModelSession(half) as session:
        with pytest.raises(tf.errors.FailedPreconditionError, match=r"^Could not find variable "):
            session.run("serving_default", {"x": X})
        ones = np.ones(2, np.float32)
        assert list(session.run("add", {"a": ones, "b": ones})["total"]) == [2, 2]


@pytest.mark.parametrize("as_tf_serving", [True, False])
def test_the_deprecation_of_the_loader_is_not_logged(
    saved_model: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    as_tf_serving: bool,
) -> None:
    monkeypatch.setattr(deprecation, "_PRINTED_WARNING", {})  # TensorFlow logs each one once
    tf.get_logger().addHandler(caplog.handler)
    try:
        SavedModelSession(saved_model, as_tf_serving=as_tf_serving).close()
    finally:
        tf.get_logger().removeHandler(caplog.handler)
    assert [r for r in caplog.records if "deprecated" in r.getMessage()] == []
