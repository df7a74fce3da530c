"""What a caller may give as inputs, and how the rest is refused."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import PosixPath
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
TEXT_REMEDY = (
    "Give str or bytes; to a model that decodes images, the bytes of image files: "
    "[pathlib.Path(file).read_bytes()]."
)
PAIR = {"image": spec("float32", 2), "age": spec("int64")}
COLUMN = {"age": spec("float32", 1)}
CHANGED = (
    "Input {!r} must be numbers that {} holds. Received: {}, in which {} would become {}. "
    "Scale or round them first."
)
MASKED = (
    "Input 'age' must hold a value at every place. Received: a masked array. "
    "Fill what is masked, e.g. with .filled(0)."
)
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


def test_numbers_too_small_for_a_float_round_to_zero() -> None:
    assert check_inputs(COLUMN, [[1e-300]])["age"].tolist() == [[0.0]]


@pytest.mark.parametrize("target", ["float16", "float32", "float64", "int8", "uint8", "uint64"])
@pytest.mark.parametrize("source", ["int8", "uint8", "int32", "int64", "uint64"])
def test_an_integer_is_cast_exactly_where_it_keeps_its_value(source: str, target: str) -> None:
    """The rule, in Python's own integers: around every power of two, and at both ends."""
    ends = np.iinfo(source)
    numbers = {
        sign * 2**power + step for sign in (1, -1) for power in range(65) for step in (-1, 0, 1)
    }
    for number in sorted(n for n in numbers | {ends.min, ends.max} if ends.min <= n <= ends.max):
        if target.startswith("float"):
            digits = np.finfo(target).nmant + 1
            is_kept = (
                abs(number) <= float(np.finfo(target).max)
                and len(f"{abs(number):b}".rstrip("0")) <= digits
            )
        else:
            is_kept = np.iinfo(target).min <= number <= np.iinfo(target).max
        specs = {"x": {"dtype": target, "shape": [1]}}
        values = np.array([number], source)
        if is_kept:
            assert int(check_inputs(specs, values)["x"][0]) == number
        else:
            with pytest.raises(InvalidInputError, match=f"{number} would become"):
                check_inputs(specs, values)


class OfTorch:
    """As NumPy meets a tensor that needs a gradient, or lies on a device."""

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        raise RuntimeError("Use tensor.detach().numpy() instead.")


def test_what_cannot_become_an_array_is_a_sentence(refuses: Refuses) -> None:
    text = (
        "Input 'age' must be an array. Received: OfTorch (Use tensor.detach().numpy() instead). "
        "Give a NumPy array, every row as long as the others."
    )
    values: Any = OfTorch()
    with refuses(InvalidInputError, text):
        check_inputs(COLUMN, values)


def test_a_masked_array_that_hides_nothing_is_an_array() -> None:
    assert check_inputs(COLUMN, np.ma.masked_equal([[1.0]], 2))["age"].tolist() == [[1.0]]


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
            "Input 'image' must be an array. Received: NoneType. "
            "Give a NumPy array, every row as long as the others.",
        ),
        (
            TEXT,
            "hare",
            "Input 'text' must be string of shape (any,), batch first. "
            "Received: object of shape (). Give a batch: for one row, [x].",
        ),
        (
            IMAGE,
            [[1], [1, 2]],
            f"Input 'image' must be an array. Received: {RAGGED}. "
            "Give a NumPy array, every row as long as the others.",
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
            CHANGED.format(
                "image", "float32", "int64 of shape (2, 2, 3)", "16777217", "16777216.0"
            ),
        ),
        (
            TOKENS,
            [[2**31]],
            CHANGED.format("tokens", "int32", "int64 of shape (1, 1)", 2**31, -(2**31)),
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
            "Input 'text' must be string. Received: object of shape (2,), with a float. "
            f"{TEXT_REMEDY}",
        ),
        (
            TEXT,
            np.array([1.0, 2.0]),
            f"Input 'text' must be string. Received: float64 of shape (2,). {TEXT_REMEDY}",
        ),
        (
            TEXT,
            np.array(["a", None], object),
            "Input 'text' must be string. Received: object of shape (2,), with a NoneType. "
            f"{TEXT_REMEDY}",
        ),
        (
            TEXT,
            [PosixPath("up.jpg")],
            "Input 'text' must be string. Received: object of shape (1,), with a PosixPath. "
            f"{TEXT_REMEDY}",
        ),
        (
            TEXT,
            np.zeros((3, 8, 8, 3), np.float32),
            "Input 'text' must be string of shape (any,), batch first. "
            f"Received: float32 of shape (3, 8, 8, 3). {TEXT_REMEDY}",
        ),
        (
            TEXT,
            ["a", "b\ud800"],
            "Input 'text' must be text that UTF-8 can hold, or bytes. Received: object of shape "
            "(2,), with half of a surrogate pair in 'b\\ud800'. "
            "Read the text with errors='replace', or give its bytes.",
        ),
        (
            COLUMN,
            np.zeros(5),
            "Input 'age' must be float32 of shape (any, 1), batch first. "
            "Received: float64 of shape (5,). "
            "Give every row its last axis, of one number: x[:, None].",
        ),
        (
            {"gray": spec("float32", 28, 28, 1)},
            np.zeros((5, 28, 28)),
            "Input 'gray' must be float32 of shape (any, 28, 28, 1), batch first. Received: "
            "float64 of shape (5, 28, 28). "
            "Give every row its last axis, of one number: x[..., None].",
        ),
        (
            {"gray": spec("float32", 28, 28, 1)},
            np.zeros((28, 28, 1)),
            "Input 'gray' must be float32 of shape (any, 28, 28, 1), batch first. "
            "Received: float64 of shape (28, 28, 1). Give a batch: for one row, x[None].",
        ),
        (
            {"gray": spec("float32", 28, 28, 1)},
            np.zeros((5, 32, 32)),
            "Input 'gray' must be float32 of shape (any, 28, 28, 1), batch first. "
            "Received: float64 of shape (5, 32, 32). Prepare the rows as in training.",
        ),
        (
            COLUMN,
            np.zeros((2, 1), [("a", "f4")]),
            "Input 'age' must be float32. Received: [('a', '<f4')] of shape (2, 1). "
            "Convert it, e.g. with .astype('float32').",
        ),
        (
            COLUMN,
            np.zeros((2, 1), "M8[s]"),
            "Input 'age' must be float32. Received: datetime64[s] of shape (2, 1). "
            "Convert it, e.g. with .astype('float32').",
        ),
        (COLUMN, np.ma.masked_equal([[1.0], [2.0]], 2), MASKED),
        (COLUMN, [np.ma.masked_equal([1.0], 1)], MASKED),
        (
            COLUMN,
            {1, 2},
            "Input 'age' must be an array. Received: set. "
            "Give a NumPy array, every row as long as the others.",
        ),
        (
            COLUMN,
            [[1e300]],
            CHANGED.format("age", "float32", "float64 of shape (1, 1)", 1e300, "inf"),
        ),
    ],
)
def test_what_the_model_does_not_take_is_refused(
    specs: dict[str, dict[str, Any]], inputs: Any, text: str, refuses: Refuses
) -> None:
    with refuses(InvalidInputError, text):
        check_inputs(specs, inputs)


@pytest.mark.parametrize("texts", [[b"png\x00", b""], ["ab\0", "c"], ["a", b"\xff\0"], [["a\0"]]])
def test_strings_keep_their_trailing_zeros(texts: list[Any]) -> None:
    specs = {"text": {"dtype": "string", "shape": None}}
    for inputs in (texts, np.array(texts, object)):
        assert check_inputs(specs, inputs)["text"].tolist() == texts


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
