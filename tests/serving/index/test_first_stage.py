"""First stages: their settings, what a first stage is, how many lists, and FAISS itself."""

import sys
from typing import Any

import pytest

from keras_mrl_serving.index import FirstStage
from keras_mrl_serving.index.first_stage import check_first_stage, import_faiss, lists_for
from tests.helpers.galleries import Refuses


@pytest.mark.parametrize(
    "settings",
    [
        "efSearch",
        "efSearch=",
        "efSearch=x",
        "nprobe=0",
        "nprobe=-1",
        "efSearch=0.5",
        "3",
        "=3",
        "efSearch=9,",
    ],
)
def test_settings_that_are_not_names_with_numbers(settings: str, refuses: Refuses) -> None:
    text = (
        "settings must be names with numbers, and look at 1 place at least. "
        f"Received: {settings!r}. Write for example 'efSearch=64'."
    )
    with refuses(ValueError, text):
        FirstStage("HNSW8", settings)


@pytest.mark.parametrize("wrong", ["Flat", None, FirstStage])
def test_a_first_stage_is_a_first_stage(wrong: Any, refuses: Refuses) -> None:
    text = f"A first stage is a FirstStage. Received: {wrong!r}. "
    with refuses(TypeError, text + "Write FirstStage('HNSW32', 'efSearch=64')."):
        check_first_stage(wrong)


def test_the_number_of_lists_grows_with_the_root_of_the_rows() -> None:
    assert [lists_for(rows) for rows in (100, 10_000, 1_000_000, 4_000_000)] == [
        *(32, 512, 4096, 8192),
    ]


def test_without_faiss_it_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, refuses: Refuses
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    text = (
        "FaissIndex needs FAISS. Received: import of faiss halted; None in sys.modules. "
        "Install it: pip install 'keras-mrl[faiss]'."
    )
    with refuses(ImportError, text):
        import_faiss()


def test_the_module_of_that_name_is_the_library() -> None:
    """And not `keras_mrl_serving.index.faiss`, which imports it."""
    assert hasattr(import_faiss(), "IndexFlatL2")
