"""Ids that are strings, in the indexes of this process, their files and their answers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_mrl_serving import DamagedIndexError
from keras_mrl_serving.funnel import FunnelSchedule
from keras_mrl_serving.index import ExactIndex, FaissIndex, FirstStage, open_index
from keras_mrl_serving.index.ids import RowIds, SortedNames, check_ids
from tests.helpers.galleries import Refuses

Build = Callable[..., ExactIndex | FaissIndex]

SCHEDULE = FunnelSchedule((2, 4), (6,), 3)
RNG = np.random.default_rng(0)
GALLERY = RNG.normal(size=(9, 4)).astype(np.float32)
QUERIES = RNG.normal(size=(5, 4)).astype(np.float32)
NAMES = ["wren", "ant", "żubr", "a", "ab", "Ωmega", "a b", "\U0001f426", "x" * 300]


@pytest.fixture(params=["exact", "faiss"])
def build(request: pytest.FixtureRequest) -> Build:
    if request.param == "exact":
        return ExactIndex.build
    return lambda *args: FaissIndex.build(*args, first_stage=FirstStage("Flat", ""))


names = st.lists(st.text(min_size=1).filter(lambda text: text.isprintable()), unique=True)


@given(names=names)
def test_names_are_found_again(names: list[str]) -> None:
    ids = RowIds.of(check_ids(names, len(names)) if names else np.empty(0, np.int64))
    if not names:
        return
    assert ids.names is not None
    ids.names.check()
    assert list(ids.names) == sorted(names)
    assert ids.given(ids.numbers).tolist() == names
    wanted = [*names, "no such name"]
    expected = [*ids.numbers.tolist(), -1]
    if "no such name" not in names:
        assert ids.names.places(wanted).tolist() == expected
        assert [ids.names.places([name])[0] for name in wanted] == expected


def test_few_names_are_looked_up_in_many() -> None:
    many = [f"row {number}" for number in range(200)]
    ids = RowIds.of(check_ids(many, 200))
    assert ids.names is not None
    assert ids.given(ids.names.places(["row 17", "row 200", "row 3"])).tolist() == [
        "row 17",
        "",
        "row 3",
    ]


@pytest.mark.parametrize("kind", [list, np.array, lambda names: np.array(names, object)])
def test_a_search_answers_with_the_strings_of_its_rows(kind: Any, build: Build) -> None:
    plain = build(GALLERY, SCHEDULE).search(QUERIES)
    index = build(GALLERY, SCHEDULE, kind(NAMES))
    result = index.search(QUERIES)
    assert result.ids.tolist() == np.array(NAMES, object)[plain.ids].tolist()
    np.testing.assert_array_equal(result.scores, plain.scores)
    assert result.ids.dtype == object
    assert result[0][0] == (NAMES[plain.ids[0, 0]], plain.scores[0, 0])
    assert index.search(QUERIES[:0]).ids.shape == (0, 3)


def test_ties_come_in_the_order_of_the_strings(build: Build) -> None:
    index = build(np.ones((9, 4)), SCHEDULE, NAMES)
    assert index.search(QUERIES[:1]).ids.tolist() == [sorted(NAMES)[:3]]


def test_a_filter_takes_strings(build: Build) -> None:
    index = build(GALLERY, SCHEDULE, NAMES)
    result = index.search(QUERIES, among=["wren", "a", "nobody", "żubr"])
    assert {name for row in result.ids.tolist() for name in row} == {"wren", "a", "żubr"}
    assert index.search(QUERIES, among=["nobody"]).ids.shape == (5, 0)
    assert index.search(QUERIES, among=[]).ids.shape == (5, 0)


def test_ids_of_the_other_kind_are_refused(build: Build, refuses: Refuses) -> None:
    text = (
        "Ids must be of the kind that the index was built with. "
        "Received: {} for an index whose ids are {}. Give {}."
    )
    index = build(GALLERY, SCHEDULE, NAMES)
    for act in (lambda: index.search(QUERIES, among=[1]), lambda: index.reconstruct([1])):
        with refuses(ValueError, text.format("int64", "strings", "strings")):
            act()
    with refuses(ValueError, text.format("strings", "int64", "int64")):
        build(GALLERY, SCHEDULE).reconstruct(["a"])


@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_rows_are_reconstructed(metric: str, build: Build) -> None:
    for ids in (NAMES, list(range(100, 109))):
        index = build(GALLERY, SCHEDULE, ids, metric)
        rows = index.reconstruct([ids[3], ids[0], ids[3]])
        expected = GALLERY[[3, 0, 3]]
        if metric == "cosine":  # FAISS holds them scaled
            rows, expected = (
                part / np.linalg.norm(part, axis=1, keepdims=True) for part in (rows, expected)
            )
        np.testing.assert_allclose(rows, expected, rtol=1e-6)
        assert index.reconstruct([]).shape == (0, 4)


def test_rows_that_are_not_there_are_not_reconstructed(build: Build, refuses: Refuses) -> None:
    text = "ids must be those of gallery rows, in one dimension. Received: {}. Give ids of rows."
    for ids, asked, received in (
        (NAMES, ["a", "bee", "cat"], "2 that no row has, such as 'bee'"),
        (None, [9, 1], "1 that no row has, such as 9"),
        (None, [[1]], "int64 of shape (1, 1)"),
    ):
        with refuses(ValueError, text.format(received)):
            build(GALLERY, SCHEDULE, ids).reconstruct(asked)


def test_a_saved_index_has_its_strings(build: Build, tmp_path: Path) -> None:
    index = build(GALLERY, SCHEDULE, NAMES)
    index.save(tmp_path)
    opened = open_index(tmp_path)
    assert opened.search(QUERIES).ids.tolist() == index.search(QUERIES).ids.tolist()
    assert opened.reconstruct(["ant"]).tolist() == index.reconstruct(["ant"]).tolist()
    opened.save(tmp_path)
    assert open_index(tmp_path).search(QUERIES).ids.tolist() == opened.search(QUERIES).ids.tolist()


@pytest.mark.parametrize(
    ("data", "ends", "numbers", "received"),
    [
        (b"abc", [1, 1, 3], [0, 1, 2], "ends that do not part the bytes into strings"),
        (b"abc", [1, 2, 4], [0, 1, 2], "ends that do not part the bytes into strings"),
        (b"abc", [1, 3, 2], [0, 1, 2], "ends that do not part the bytes into strings"),
        (b"abc", [-1, 2, 3], [0, 1, 2], "ends that do not part the bytes into strings"),
        (b"abcd", [1, 2, 3], [0, 1, 2], "ends that do not part the bytes into strings"),
        (b"acb", [1, 2, 3], [0, 1, 2], "strings out of order"),
        (b"aab", [1, 2, 3], [0, 1, 2], "strings out of order"),
        (b"ab\xff", [1, 2, 3], [0, 1, 2], "'utf-8' codec can't decode byte 0xff"),
        (b"abc", [1, 2, 3], [0, 1, 1], "rows that share a string"),
        (b"abc", [1, 2, 3], [0, 1, 3], "rows that share a string"),
        (b"abc", [1, 2, 3], [0, 1, -1], "rows that share a string"),
    ],
)
def test_files_of_strings_are_checked(
    data: bytes, ends: list[int], numbers: list[int], received: str, tmp_path: Path
) -> None:
    index = ExactIndex.build(GALLERY[:3], FunnelSchedule((4,), (), 1), ["a", "b", "c"])
    forged = SortedNames(np.frombuffer(data, np.uint8), np.array(ends))
    index.row_ids = RowIds(np.array(numbers), forged)
    index.save(tmp_path)
    with pytest.raises(DamagedIndexError) as caught:
        open_index(tmp_path)
    assert f"ids that are no strings ({received}" in str(caught.value)


# Another schedule than that of the build.


def test_more_neighbours_than_the_schedule_returns(build: Build) -> None:
    index = build(GALLERY, SCHEDULE)
    more = index.search(QUERIES, 6)
    assert more.ids.shape == (5, 6)
    np.testing.assert_array_equal(more.ids[:, :3], index.search(QUERIES).ids)
    whole = build(GALLERY, FunnelSchedule((4,), (), 3))
    assert whole.search(QUERIES, 8).ids.shape == (5, 8)
    assert whole.search(QUERIES, 100).ids.shape == (5, 9)


def test_an_index_is_opened_with_another_schedule(build: Build, tmp_path: Path) -> None:
    build(GALLERY, FunnelSchedule((2, 3, 4), (6, 5), 3), NAMES).save(tmp_path)
    for schedule in (
        FunnelSchedule((2, 3, 4), (8, 7), 5),
        FunnelSchedule((2, 4), (9,), 4),
        FunnelSchedule((2, 3), (5,), 2),
    ):
        opened = open_index(tmp_path, schedule)
        expected = build(GALLERY, schedule, NAMES)
        assert (opened.schedule, opened.width) == (schedule, schedule.dims[-1])
        assert opened.search(QUERIES).ids.tolist() == expected.search(QUERIES).ids.tolist()
        np.testing.assert_allclose(
            opened.reconstruct(NAMES), expected.reconstruct(NAMES), rtol=1e-6
        )


def test_an_exact_index_is_opened_with_any_dims(tmp_path: Path, refuses: Refuses) -> None:
    ExactIndex.build(GALLERY, SCHEDULE).save(tmp_path)
    schedule = FunnelSchedule((1, 3), (7,), 2)
    expected = ExactIndex.build(GALLERY, schedule).search(QUERIES)
    result = ExactIndex.open(tmp_path, schedule).search(QUERIES)
    assert result.ids.tolist() == expected.ids.tolist()
    with refuses(
        ValueError,
        "The gallery must be (rows, width) with a width of at least 8. Received: shape (9, 4). "
        "Embed them at the funnel's last dim, one row each.",
    ):
        open_index(tmp_path, FunnelSchedule((8,), (), 1))


@pytest.mark.parametrize("dims", [(1, 4), (2, 3), (4,), (2,)])
def test_a_faiss_index_is_opened_with_stages_that_were_built(
    dims: tuple[int, ...], tmp_path: Path, refuses: Refuses
) -> None:
    FaissIndex.build(GALLERY, SCHEDULE, first_stage=FirstStage("Flat", "")).save(tmp_path)
    with refuses(
        ValueError,
        "A schedule must begin with the dim of the first stage, and go on with wider dims that "
        f"were built: (2, 4). Received: dims={dims}. Build another index for it.",
    ):
        open_index(tmp_path, FunnelSchedule(dims, (5,) * (len(dims) - 1), 1))


def test_a_schedule_that_returns_more_than_the_gallery_is_refused(
    build: Build, tmp_path: Path, refuses: Refuses
) -> None:
    build(GALLERY, SCHEDULE).save(tmp_path)
    with refuses(
        ValueError,
        "A gallery needs at least as many rows as the funnel returns. "
        "Received: 9 rows for k=10. Lower k, or add rows.",
    ):
        open_index(tmp_path, FunnelSchedule((2, 4), (20,), 10))
