"""`truncate` beside the plain formula in float64."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from keras_mrl_serving.embeddings import truncate

Refuses = Callable[[type[Exception], str], AbstractContextManager[None]]

VALUES = st.floats(-1e3, 1e3, width=32).filter(lambda value: value == 0 or abs(value) > 1e-3)
EMBEDDINGS = hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=3), elements=VALUES)


def plain(x: npt.NDArray[Any], dim: int) -> npt.NDArray[Any]:
    prefix = x.astype(np.float64)[..., :dim]
    length = np.sqrt((prefix**2).sum(axis=-1, keepdims=True))
    return np.divide(prefix, length, out=np.zeros_like(prefix), where=length > 0)


@given(EMBEDDINGS, st.data())
def test_a_prefix_is_cut_then_scaled(x: npt.NDArray[np.float32], data: st.DataObject) -> None:
    dim = data.draw(st.integers(1, x.shape[-1]))
    before = x.copy()
    cut = truncate(x, dim)
    assert cut.dtype == np.float32
    np.testing.assert_allclose(cut, plain(x, dim), rtol=0, atol=5e-7)
    np.testing.assert_array_equal(x, before)
    assert not np.shares_memory(cut, x)


def test_the_prefix_of_a_unit_vector_is_scaled_anew() -> None:
    unit = np.array([[0.6, 0.0, 0.8]])
    np.testing.assert_array_equal(truncate(unit, 2), [[1.0, 0.0]])


def test_a_prefix_of_zeros_stays_zero() -> None:
    np.testing.assert_array_equal(truncate([[0.0, 0.0, 1.0]], 2), [[0.0, 0.0]])


def test_no_rows_are_no_rows() -> None:
    assert truncate(np.zeros((0, 8)), 4).shape == (0, 4)


@pytest.mark.parametrize(
    "dtype", ["float16", "float64", "int8", "int64", "uint8", "bool", "object"]
)
def test_every_dtype_of_numbers_gives_float32(dtype: str) -> None:
    x = np.array([[1, 0, 1], [1, 1, 0]]).astype(dtype)
    cut = truncate(x, 2)
    assert cut.dtype == np.float32
    np.testing.assert_array_equal(cut, plain(x, 2).astype(np.float32))


def test_layout_does_not_matter() -> None:
    x = np.arange(24, dtype=np.float32).reshape(4, 6)
    expected = truncate(x, 3)
    readonly = x.view()
    readonly.flags.writeable = False
    for same in (np.asfortranarray(x), x.astype(">f4"), readonly, np.repeat(x, 2, axis=1)[:, ::2]):
        np.testing.assert_array_equal(truncate(same, 3), expected)
    np.testing.assert_array_equal(truncate(x[::-1], 3), expected[::-1])


@pytest.mark.parametrize("dim", [np.int64(2), np.uint8(2), np.array(2)])
def test_a_dim_may_be_an_integer_of_numpy(dim: int) -> None:
    assert truncate([[3.0, 4.0, 5.0]], dim).tolist() == truncate([[3.0, 4.0, 5.0]], 2).tolist()


@pytest.mark.parametrize(
    ("x", "shape"),
    [([[1.0, 2.0]], "(1, 2)"), ([], "(0,)"), (np.zeros((0, 2)), "(0, 2)"), (7.0, "()")],
)
def test_what_is_too_narrow_is_refused(x: Any, shape: str, refuses: Refuses) -> None:
    text = (
        f"dim must not exceed the width of the embeddings. Received: dim=3 for embeddings of shape "
        f"{shape}. Ask for fewer coordinates, or embed at a wider dim."
    )
    with refuses(ValueError, text):
        truncate(x, 3)


@pytest.mark.parametrize("dim", [0, -1, 2.0, True, None, "2"])
def test_a_dim_that_is_no_positive_integer_is_refused(dim: Any, refuses: Refuses) -> None:
    text = (
        f"dims must be strictly increasing positive integers. Received: dims=({dim!r},). "
        "Give prefix lengths, for example dims=(8, 16, 32)."
    )
    with refuses(ValueError, text):
        truncate([[1.0, 2.0]], dim)


@pytest.mark.parametrize(
    ("x", "received"),
    [
        ("abc", "<U3 of shape ()"),
        ([["1", "2"]], "<U1 of shape (1, 2)"),
        ([[b"1", b"2"]], "|S1 of shape (1, 2)"),
        ([[1j, 2.0]], "complex128 of shape (1, 2)"),
        (np.array([["2020-01-01"] * 2], "M8[D]"), "datetime64[D] of shape (1, 2)"),
        (
            [[1.0, 2.0], [1.0]],
            "list (setting an array element with a sequence. The requested array has an "
            "inhomogeneous shape after 1 dimensions. The detected shape was (2,) + inhomogeneous "
            "part)",
        ),
        ([[object, 1.0]], "object of shape (1, 2)"),
        (np.array([[None, 1.0]]), "object of shape (1, 2)"),  # NumPy would make NaN of it
        (np.array([["1.5", 1.0]], object), "object of shape (1, 2)"),
        ([[10**400, 1.0]], "object of shape (1, 2)"),
        (np.zeros((1, 2), [("a", "f4")]), "[('a', '<f4')] of shape (1, 2)"),
    ],
)
def test_what_is_no_array_of_real_numbers_is_refused(
    x: Any, received: str, refuses: Refuses
) -> None:
    text = (
        f"Embeddings must be an array of real numbers. Received: {received}. "
        "Give a NumPy array of floats, every row as long as the others."
    )
    with refuses(ValueError, text):
        truncate(x, 2)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e20])
def test_what_has_no_length_is_refused(value: float, refuses: Refuses) -> None:
    """The length of 1e20 is infinite in float32, and the row would be zero."""
    text = (
        "Embeddings must be finite, and so must the squares of their lengths in float32. "
        "Received: NaN, infinity, or rows longer than 1e19. "
        "Look for failed rows where the embeddings were made."
    )
    with refuses(ValueError, text):
        truncate([[1.0, 2.0], [value, 0.0]], 1)
    assert truncate([[1.0, value]], 1).tolist() == [[1.0]]  # past the prefix
    assert truncate(np.full((20, 1), 1e19), 1).tolist() == [[1.0]] * 20  # only their sum is


def test_bfloat16_of_jax_is_a_float() -> None:
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    assert truncate(np.array([[3.0, 4.0]], bfloat16), 1).tolist() == [[1.0]]
