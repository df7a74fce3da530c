"""Shortlisters: which FAISS makes, which settings they have, and whether they can select rows."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keras_mrl_serving.errors import DamagedIndexError
from keras_mrl_serving.funnel import FunnelSchedule
from keras_mrl_serving.index import FirstStage
from keras_mrl_serving.index.facts import IndexFacts
from keras_mrl_serving.index.filters import Filter
from keras_mrl_serving.index.first_stage import import_faiss
from keras_mrl_serving.index.shortlister import Shortlister
from tests.helpers.galleries import FLAT, Array, clusters

PREFIXES = clusters(0, 400, 16)
FACTS = IndexFacts(FunnelSchedule((16,), (), 1), "dot")


def built(
    factory: str, settings: str = "", metric: str = "cosine", prefixes: Array = PREFIXES
) -> Shortlister:
    spec = FirstStage(factory, settings)
    return Shortlister.build(prefixes, spec, metric, lambda _done, _rows: None)


@pytest.mark.parametrize(
    ("factory", "settings", "reason"),
    [
        ("Nope", "", "could not parse index string Nope"),
        ("", "", "could not parse index string"),
        ("B", "", "Error: 'index' failed: description B did not generate an index"),
        (
            "IVF500,Flat",
            "nprobe=1",
            "Error: 'nx >= static_cast<idx_t>(k)' failed: Number of training points (400) should "
            "be at least as large as number of clusters (500)",
        ),
        ("IDMap,Flat", "", "add does not make sense with IndexIDMap, use add_with_ids"),
    ],
)
def test_a_first_stage_that_faiss_does_not_make(factory: str, settings: str, reason: str) -> None:
    with pytest.raises(ValueError, match="The first stage") as caught:
        built(factory, settings)
    assert type(caught.value) is ValueError
    start, end = str(caught.value).split(
        f"{factory!r} for 400 rows of dim 16 and metric 'cosine' ("
    )
    assert start == (
        "The first stage must be an index FAISS can make of the gallery's prefixes. Received: "
    )
    assert end.endswith(f"{reason}). Take for example FirstStage('HNSW32').")


def test_signs_are_looked_at_by_the_byte() -> None:
    with pytest.raises(ValueError, match=r"'BFlat' for 400 rows of dim 12 .* 'd_ % 8 == 0' failed"):
        built("BFlat", prefixes=np.ascontiguousarray(PREFIXES[:, :12]))


@pytest.mark.parametrize(
    ("factory", "settings", "reason"),
    [
        ("Flat", "efSearch=64", "could not set parameter efSearch"),
        ("HNSW8", "nprobe=4", "could not set parameter nprobe"),
        ("HNSW8", "bogus=4", "could not set parameter bogus"),
        ("HNSW8", "efSearch=4,bogus=1", "could not set parameter bogus"),
        ("BFlat", "nprobe=4", "no nprobe"),
        ("BHNSW8", "ntotal=4", "no ntotal"),
        ("BFlat", "efSearch=4", "attribute 'hnsw'"),
    ],
)
def test_settings_that_the_first_stage_lacks(factory: str, settings: str, reason: str) -> None:
    with pytest.raises(ValueError, match="settings must be") as caught:
        built(factory, settings)
    assert type(caught.value) is ValueError
    start, end = str(caught.value).split(f"{settings!r} for {factory!r} (")
    assert start == (
        "settings must be those the first stage has: 'efSearch=64' of a graph, 'nprobe=8' of "
        "inverted lists, none of flat ones. Received: "
    )
    assert end.endswith(f"{reason}). Leave them out: settings=''.")


def test_settings_change_while_it_serves() -> None:
    first = built("IVF8,Flat", "nprobe=1")
    index = import_faiss().downcast_index(first.index)
    assert index.nprobe == 1
    first.set("nprobe=5")
    assert index.nprobe == 5


@pytest.mark.parametrize("factory", ["IVF1,Flat", "PCA16,IVF1,Flat"])
@pytest.mark.parametrize(("rows", "are_all"), [(64, True), (200, False)])  # FAISS: 256
def test_lists_are_learned_from_64_rows_each(rows: int, are_all: bool, factory: str) -> None:
    """The centroid of one list is the mean of the rows that it is learned from."""
    faiss = import_faiss()
    prefixes = clusters(0, rows, 16)
    first = built(factory, metric="l2", prefixes=prefixes)  # which owns the index
    index = faiss.downcast_index(first.index)
    if factory.startswith("PCA"):
        prefixes = index.chain.at(0).apply(prefixes)
    lists = faiss.extract_index_ivf(index)
    (centroid,) = faiss.downcast_index(lists.quantizer).reconstruct_n(0, 1)
    assert (np.abs(centroid - prefixes.mean(axis=0)).max() < 1e-5) == are_all


@pytest.mark.parametrize("factory", ["Flat", "HNSW8", "PCA8,IVF8,Flat"])
def test_whether_it_can_select_rows_is_tried_once(
    factory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = built(factory)
    searches = []
    search = first.index.search  # of FAISS's wrapper, which a float first stage asks only then

    def counted(*arguments: Any, **options: Any) -> Any:
        searches.append(len(arguments[0]))
        return search(*arguments, **options)

    monkeypatch.setattr(first.index, "search", counted)
    first.search(PREFIXES[:3], 5)
    assert searches == []
    for _ in range(3):
        assert first.can_choose is True
        first.search(PREFIXES[:3], 5, Filter(PREFIXES, np.arange(100)))
    assert searches == [1]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full is Linux's")
@pytest.mark.parametrize("factory", ["Flat", "BFlat"])
def test_a_disk_that_is_full_is_an_os_error(factory: str) -> None:
    """FAISS raises a RuntimeError with a line of its source."""
    first = built(factory, prefixes=np.ones((5000, 16), np.float32))
    with pytest.raises(OSError, match=r"No space left on device") as caught:
        first.write("/dev/full")
    text = str(caught.value)
    assert text.startswith("A first stage must be written whole. Received: '/dev/full' (")
    assert text.endswith("). Make room on the disk, or choose another folder.")


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("factory", ["IVF64,PQ8x4fs", "PCA8,IVF64,PQ8x4fs", "IVF8,PQ8"])
def test_lists_of_a_small_gallery_are_read_again(factory: str, metric: str, tmp_path: Path) -> None:
    """Beside what is in the file FAISS makes a table that is longer than the file."""
    first = built(factory, "nprobe=4", metric)
    first.write(tmp_path / "first.faiss")
    facts = IndexFacts(FunnelSchedule((16,), (), 1), metric)
    read = Shortlister.read(tmp_path / "first.faiss", first.spec, len(PREFIXES), facts)
    np.testing.assert_array_equal(read.search(PREFIXES, 5), first.search(PREFIXES, 5))


def test_a_file_that_faiss_does_not_read(tmp_path: Path) -> None:
    (tmp_path / "first.faiss").write_bytes(b"no index")
    with pytest.raises(DamagedIndexError, match=r"^A first stage is read as FAISS wrote it. "):
        Shortlister.read(tmp_path / "first.faiss", FLAT, 1, FACTS)
