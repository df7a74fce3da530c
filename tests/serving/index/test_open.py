"""`open_index` takes the engine that the card names."""

import json
from pathlib import Path
from typing import Any

import pytest

from keras_mrl_serving.errors import ManifestError
from keras_mrl_serving.funnel import FunnelSchedule
from keras_mrl_serving.index import ExactIndex, FaissIndex, open_index
from tests.helpers.galleries import ENGINES, Refuses, assert_same, drawn, rewrite_card

SCHEDULE = FunnelSchedule((2, 4), (6,), 3)
GALLERY, QUERIES = drawn(0, 20, 4), drawn(1, 5, 4)


@pytest.mark.parametrize("engine", ["qdrant", None, 1])
@pytest.mark.parametrize("wrote", sorted(ENGINES))
def test_an_index_of_an_unknown_engine_says_so(
    wrote: str, engine: Any, tmp_path: Path, refuses: Refuses
) -> None:
    ENGINES[wrote](GALLERY, SCHEDULE).save(tmp_path)
    rewrite_card(tmp_path, engine=engine)
    text = (
        f'An index is of the engine "exact" or "faiss". Received: {engine!r}. '
        "Install the version of keras-mrl that wrote it, or a later one."
    )
    with refuses(ManifestError, text):
        open_index(tmp_path)


@pytest.mark.parametrize(
    ("wrote", "opens", "names"),
    [("exact", FaissIndex, "'exact' for 'faiss'"), ("faiss", ExactIndex, "'faiss' for 'exact'")],
)
def test_an_index_of_the_other_engine_says_so(
    wrote: str,
    opens: type[ExactIndex] | type[FaissIndex],
    names: str,
    tmp_path: Path,
    refuses: Refuses,
) -> None:
    ENGINES[wrote](GALLERY, SCHEDULE).save(tmp_path)
    text = (
        f"An index is opened by the engine that wrote it. Received: one of the engine {names}. "
        "Open it with open_index."
    )
    with refuses(ManifestError, text):
        opens.open(tmp_path)


def test_an_engine_replaces_the_other(tmp_path: Path) -> None:
    for name in ("exact", "faiss", "exact"):
        index = ENGINES[name](GALLERY, SCHEDULE)
        index.save(tmp_path)
        assert type(open_index(tmp_path)) is type(index)
        assert_same(open_index(tmp_path).search(QUERIES), index.search(QUERIES))
        card = json.loads((tmp_path / "index.json").read_text())
        assert card["engine"] == name
        assert len(list(tmp_path.iterdir())) == 1 + len(card["files"])


@pytest.mark.parametrize("engine", sorted(ENGINES))
def test_a_saved_index_knows_its_prompt(engine: str, tmp_path: Path) -> None:
    for prompt in ("passage: ", None, ""):
        ENGINES[engine](GALLERY, SCHEDULE, prompt=prompt).save(tmp_path)
        assert open_index(tmp_path).prompt == prompt
