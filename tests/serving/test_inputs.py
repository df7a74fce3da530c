"""What a caller may give as inputs, and how the rest is refused."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest

from keras_mrl_serving.errors import InvalidInputError
from keras_mrl_serving.inputs import as_arrays, check_inputs

Refuses = Callable[[type[Exception], str], AbstractContextManager[None]]

RAGGED = (
    "list (setting an array element with a sequence. The requested array has an inhomogeneous "
    "shape after 1 dimensions. The detected shape was (2,) + inhomogeneous part)"
)


def spec(dtype: str, *shape: int | None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [None, *shape]}


IMAGE = {"image": spec("float32", 2, 3)}
TOKENS = {"tokens": spec("int32", None)}
TEXT = {"text": spec("string")}
PAIR = {"image": spec("float32", 2), "age": spec("int64")}
ROWS = np.arange(12).reshape(2, 2, 3)


@pytest.mark.parametrize(
    "dtype",
    ["float16", "float32", "float64", "longdouble", ">f4", "int8", "uint8", "int64", "bool"],
)
def test_numbers_that_keep_their_value_are_cast_to_float(dtype: str) -> None:
    image = check_inputs(IMAGE, ROWS.astype(dtype))["image"]
    assert image.dtype == np.float32
    np.testing.assert_array_equal(image, ROWS.astype(dtype).astype(np.float32))


def test_a_float_may_lose_digits_and_be_no_number() -> None:
    inputs = np.array([[[0.1, np.nan, np.inf]] * 2])
    np.testing.assert_array_equal(check_inputs(IMAGE, inputs)["image"], inputs.astype(np.float32))


@pytest.mark.parametrize("dtype", ["int8", "uint16", "int64", "uint64", "bool"])
def test_integers_that_keep_their_value_are_cast_to_integers(dtype: str) -> None:
    tokens = check_inputs(TOKENS, np.array([[1, 0]]).astype(dtype))["tokens"]
    assert tokens.dtype == np.int32
    assert tokens.tolist() == [[1, 0]]


def test_what_needs_no_cast_is_not_copied() -> None:
    image = ROWS.astype(np.float32)
    image.flags.writeable = False
    assert check_inputs(IMAGE, image)["image"] is image


@pytest.mark.parametrize("inputs", [ROWS.tolist(), {"image": ROWS}, {"image": ROWS.tolist()}])
def test_one_input_may_be_named_or_not(inputs: Any) -> None:
    np.testing.assert_array_equal(check_inputs(IMAGE, inputs)["image"], ROWS)


def test_inputs_come_in_the_order_of_the_model() -> None:
    arrays = check_inputs(PAIR, {"age": [7], "image": [[1, 2]]})
    assert list(arrays) == ["image", "age"]
    assert [array.dtype.name for array in arrays.values()] == ["float32", "int64"]


def test_a_free_dimension_takes_any_size_and_rows_may_be_none() -> None:
    for shape in ((0, 5), (3, 0), (1, 1)):
        assert check_inputs(TOKENS, np.zeros(shape, np.int32))["tokens"].shape == shape


@pytest.mark.parametrize(
    "text",
    [
        ["a", "grün"],
        [b"a", b"\xff"],
        np.array(["a", "b"], object),
        np.array([b"a\0", b"b"], object),
        np.array(["a", "b"], np.dtypes.StringDType()),
        [],
    ],
)
def test_strings_are_left_as_they_are(text: Any) -> None:
    if len(text) == 0:
        text = np.array(text, object)
    checked = check_inputs(TEXT, text)["text"]
    assert checked.tolist() == np.asarray(text).tolist()


@pytest.mark.parametrize(
    ("specs", "inputs", "text"),
    [
        (
            PAIR,
            ROWS,
            "A model of several inputs takes a dict with image, age. Received: one ndarray. "
            "Name each array.",
        ),
        (PAIR, {"image": ROWS}, "inputs must be named image, age. Received: image. Rename them."),
        (PAIR, {}, "inputs must be named image, age. Received: none. Rename them."),
        (IMAGE, {0: ROWS}, "inputs must be named image. Received: 0. Rename them."),
        (
            PAIR,
            {"image": [[1, 2]], "age": [1, 2]},
            "Every input needs the same number of rows. Received: {'image': 1, 'age': 2}. "
            "Send whole rows.",
        ),
        (
            IMAGE,
            ROWS[0],
            "Input 'image' must be float32 of shape (any, 2, 3), batch first. "
            "Received: int64 of shape (2, 3). Give a batch: for one row, x[None].",
        ),
        (
            IMAGE,
            ROWS[:, :, :2] * 1.0,
            "Input 'image' must be float32 of shape (any, 2, 3), batch first. "
            "Received: float64 of shape (2, 2, 2). Prepare the rows as in training.",
        ),
        (
            IMAGE,
            None,
            "Input 'image' must be float32 of shape (any, 2, 3), batch first. "
            "Received: object of shape (). Prepare the rows as in training.",
        ),
        (
            TEXT,
            "hare",
            "Input 'text' must be string of shape (any,), batch first. "
            "Received: <U4 of shape (). Give a batch: for one row, x[None].",
        ),
        (
            IMAGE,
            [[1], [1, 2]],
            f"Input 'image' must be an array. Received: {RAGGED}. "
            "Make every row as long as the others.",
        ),
        (
            IMAGE,
            ROWS.astype(str),
            "Input 'image' must be float32. Received: <U21 of shape (2, 2, 3). "
            "Convert it, e.g. with .astype('float32').",
        ),
        (
            IMAGE,
            ROWS.astype(object),
            "Input 'image' must be float32. Received: object of shape (2, 2, 3). "
            "Convert it, e.g. with .astype('float32').",
        ),
        (
            IMAGE,
            ROWS + 0j,
            "Input 'image' must be float32. Received: complex128 of shape (2, 2, 3). "
            "Convert it, e.g. with .astype('float32').",
        ),
        (
            IMAGE,
            ROWS + 2**24,
            "Input 'image' must be float32. Received: int64 of shape (2, 2, 3). "
            "Convert it, e.g. with .astype('float32').",
        ),
        (
            TOKENS,
            [[2**31]],
            "Input 'tokens' must be int32. Received: int64 of shape (1, 1). "
            "Convert it, e.g. with .astype('int32').",
        ),
        (
            TOKENS,
            [[1.0]],
            "Input 'tokens' must be int32. Received: float64 of shape (1, 1). "
            "Convert it, e.g. with .astype('int32').",
        ),
        (
            TEXT,
            [1.0, 2.0],
            "Input 'text' must be string. Received: float64 of shape (2,). Give str or bytes.",
        ),
        (
            TEXT,
            np.array(["a", None], object),
            "Input 'text' must be string. Received: object of shape (2,). Give str or bytes.",
        ),
    ],
)
def test_what_the_model_does_not_take_is_refused(
    specs: dict[str, dict[str, Any]], inputs: Any, text: str, refuses: Refuses
) -> None:
    with refuses(InvalidInputError, text):
        check_inputs(specs, inputs)


def test_bytes_keep_their_trailing_zeros() -> None:
    specs = {"image": {"dtype": "string", "shape": [None]}}
    for inputs in ([b"png\x00", b""], np.array([b"png\x00", b""], object)):
        assert check_inputs(specs, inputs)["image"].tolist() == [b"png\x00", b""]


def test_inputs_of_a_foreign_model_may_be_of_any_shape() -> None:
    specs: dict[str, dict[str, Any]] = {
        "x": {"dtype": "float32", "shape": None},
        "rate": {"dtype": "float32", "shape": []},
    }
    arrays = as_arrays(specs, {"x": np.zeros((2, 3, 4)), "rate": 0.5})
    assert arrays["x"].shape == (2, 3, 4)
    assert arrays["rate"].shape == ()


def test_a_dtype_that_numpy_has_not_is_a_sentence(refuses: Refuses) -> None:
    text = (
        "An input's dtype must be one that NumPy has. Received: qint8 for input 'x'. "
        "Export the model with float32 inputs."
    )
    with refuses(InvalidInputError, text):
        check_inputs({"x": {"dtype": "qint8", "shape": [None]}}, [1.0])
