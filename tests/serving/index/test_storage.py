"""An index on disk: whole, or refused, whatever happened to its files."""

import hashlib
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given

from keras_mrl_serving.errors import DamagedIndexError, ManifestError
from keras_mrl_serving.funnel import FunnelSchedule
from keras_mrl_serving.index import ExactIndex, FaissIndex, FirstStage, open_index, storage
from tests.helpers.galleries import (
    ENGINES,
    FLAT,
    METRICS,
    Array,
    Refuses,
    Search,
    assert_same,
    drawn,
    rewrite_card,
    searches,
)
from tests.helpers.hostile_files import fuzzed, read_in_process

SOAK = bool(os.environ.get("KERAS_MRL_SOAK"))

SCHEDULE = FunnelSchedule((2, 3, 4), (6, 4), 3)
GALLERY, OTHER = drawn(0, 20, 4), drawn(1, 20, 4)
QUERIES = drawn(2, 5, 4)
AMONG = np.arange(0, 20, 3)

Local = ExactIndex | FaissIndex
Build = Callable[..., Local]


@pytest.fixture(params=sorted(ENGINES))
def build(request: pytest.FixtureRequest) -> Build:
    return ENGINES[request.param]


def assert_equal(index: Local, expected: Local, queries: Array = QUERIES) -> None:
    """Both have the same facts and ids, and answer alike to the last bit."""
    assert type(index) is type(expected)
    assert index.facts == expected.facts
    np.testing.assert_array_equal(index.ids, expected.ids)
    assert_same(index.search(queries), expected.search(queries))
    among = expected.ids[::3]
    assert_same(index.search(queries, 1, among), expected.search(queries, 1, among))


@given(searches())
@pytest.mark.parametrize("name", sorted(ENGINES))
def test_an_index_comes_back_as_it_was(
    name: str, tmp_path_factory: pytest.TempPathFactory, search: Search
) -> None:
    folder = tmp_path_factory.mktemp("index")
    index = ENGINES[name](search.gallery, search.schedule, search.ids, search.metric, "5e1f")
    index.save(folder)
    again: Local = type(index).open(folder)
    for opened in (again, open_index(folder), open_index(str(folder), verify=False)):
        assert_equal(opened, index, search.queries)
    again.save(folder)  # onto itself, while it is mapped
    assert_equal(again, index, search.queries)
    assert_equal(open_index(folder), index, search.queries)
    shutil.rmtree(folder)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    "kind",
    [
        FLAT,
        FirstStage("HNSW8", "efSearch=3"),
        FirstStage("IVF4,Flat", "nprobe=2"),
        FirstStage("BFlat", ""),
        FirstStage("BHNSW8", "efSearch=3"),
        FirstStage("PCA4,IVF4,SQ8", "nprobe=2"),
    ],
    ids=str,
)
def test_any_first_stage_comes_back_as_it_was(
    kind: FirstStage, metric: str, tmp_path: Path
) -> None:
    gallery, queries = drawn(0, 200, 24), drawn(1, 9, 24)
    schedule, plan = FunnelSchedule((8, 24), (10,), 4), {"target": 0.95, "front": [{"k": None}]}
    index = FaissIndex.build(gallery, schedule, None, metric, first_stage=kind, plan=plan)
    index.save(tmp_path)
    again = FaissIndex.open(tmp_path)
    assert (again.first_stage, again.plan) == (kind, plan)
    assert_equal(again, index, queries)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("schedule", [SCHEDULE, FunnelSchedule((4,), (), 3)])
@pytest.mark.parametrize("rows", [20, 70_000])  # which are written 65,536 at a time
def test_to_build_in_a_folder_is_to_build_to_save_and_to_open(
    rows: int, schedule: FunnelSchedule, metric: str, tmp_path: Path
) -> None:
    gallery, ids = drawn(0, rows, 4), np.arange(rows) * 3
    options: dict[str, Any] = {"first_stage": FLAT, "plan": {"target": 0.9}}
    in_folder = FaissIndex.build(
        gallery, schedule, ids, metric, "5e1f", path=tmp_path / "a" / "b", **options
    )
    in_memory = FaissIndex.build(gallery, schedule, ids, metric, "5e1f", **options)
    in_memory.save(tmp_path / "c")
    assert_equal(in_folder, in_memory)
    assert_equal(FaissIndex.open(tmp_path / "a" / "b"), FaissIndex.open(tmp_path / "c"))
    cards = [json.loads((tmp_path / at / "index.json").read_text()) for at in ("a/b", "c")]
    digests = [{n: f["sha256"] for n, f in card["files"].items()} for card in cards]
    assert digests[0] == digests[1]
    assert in_folder.plan == {"target": 0.9}


def test_a_build_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    bad = GALLERY.copy()
    bad[-1, -1] = np.nan
    FaissIndex.build(GALLERY, SCHEDULE, path=tmp_path, first_stage=FLAT)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="must be finite"):
        FaissIndex.build(bad, SCHEDULE, path=tmp_path, first_stage=FLAT)
    with pytest.raises(ValueError, match="could not parse"):
        FaissIndex.build(GALLERY, SCHEDULE, path=tmp_path, first_stage=FirstStage("Nope", ""))
    assert contents(tmp_path) == before


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


class Damage:
    """Flips a bit of a file, or cuts it; undone at the end of the block."""

    def __init__(self, file: Path, chance: random.Random) -> None:
        self.file, self.whole = file, file.read_bytes()
        if chance.random() < 0.7:
            at, bit = chance.randrange(len(self.whole)), chance.randrange(8)
            flipped = bytes([self.whole[at] ^ 1 << bit])
            self.bytes = self.whole[:at] + flipped + self.whole[at + 1 :]
        else:
            self.bytes = self.whole[: chance.randrange(len(self.whole))]

    def __enter__(self) -> "Damage":
        self.file.write_bytes(self.bytes)
        return self

    def __exit__(self, *_: object) -> None:
        self.file.write_bytes(self.whole)

    @property
    def is_cut(self) -> bool:
        return len(self.bytes) < len(self.whole)

    @property
    def may_be_of_another_format(self) -> bool:
        """Whether the damage is to the number in the second line of the card, and no other."""
        lines, before = (text.splitlines() for text in (self.bytes, self.whole))
        return self.file.name == storage.CARD and lines[:1] + lines[2:] == before[:1] + before[2:]


@pytest.mark.soak
@pytest.mark.parametrize("metric", METRICS if SOAK else ["l2"])
def test_a_damaged_index_never_answers(metric: str, build: Build, tmp_path: Path) -> None:
    """A thousand damages each in `make soak`."""
    build(GALLERY, SCHEDULE, None, metric, "5e1f").save(tmp_path)
    chance = random.Random(metric)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 6 if build is ENGINES["exact"] else 5
    for _ in range(1000 if SOAK else 150):
        file = chance.choice(files)
        with Damage(file, chance) as damage:
            may_be = (ManifestError,) if damage.may_be_of_another_format else ()
            with pytest.raises((DamagedIndexError, *may_be)) as caught:
                open_index(tmp_path)
            assert file.name in str(caught.value) or may_be
            if damage.is_cut:
                with pytest.raises(DamagedIndexError):
                    open_index(tmp_path, verify=False)
    assert_equal(open_index(tmp_path), build(GALLERY, SCHEDULE, None, metric, "5e1f"))


def damaged(folder: Path, received: str) -> str:
    return (
        f"An index is read as it was written. Received: {str(folder)!r} with {received}. "
        "Copy it again from where it is whole, or build it anew."
    )


@pytest.fixture
def folder(build: Build, tmp_path: Path) -> Path:
    build(GALLERY, SCHEDULE).save(tmp_path / "index")
    return tmp_path / "index"


def ids_of(folder: Path) -> Path:
    return next(folder.glob("ids-*.npy"))


def test_a_changed_file_is_named(folder: Path, refuses: Refuses) -> None:
    file = ids_of(folder)
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    for open_ in (open_index, type(open_index(folder, verify=False)).open):
        with refuses(DamagedIndexError, damaged(folder, f"{file.name}, whose bytes have changed")):
            open_(folder)


@pytest.mark.parametrize("verify", [True, False])
def test_a_file_cut_short_is_named(verify: bool, folder: Path, refuses: Refuses) -> None:
    file = ids_of(folder)
    size = file.stat().st_size
    for cut in (file.read_bytes()[:-1], b""):
        file.write_bytes(cut)
        text = damaged(folder, f"{file.name} of {len(cut)} bytes instead of {size}")
        with refuses(DamagedIndexError, text):
            open_index(folder, verify=verify)


@pytest.mark.parametrize("verify", [True, False])
def test_a_missing_file_is_named(verify: bool, folder: Path, refuses: Refuses) -> None:
    file = ids_of(folder)
    file.unlink()
    with refuses(DamagedIndexError, damaged(folder, f"{file.name}: No such file or directory")):
        open_index(folder, verify=verify)


@pytest.mark.parametrize(
    ("card", "reason"),
    [
        (b"", "Expecting value: line 1 column 1 (char 0)"),
        (b"[]", "'str' object cannot be interpreted as an integer"),
        (b"null", "'NoneType' object has no attribute 'pop'"),
        (b"{}", "'sha256'"),
        (b'{"sha256": 1}', "not the bytes that were written"),
        (b'{\n "sha256": "0"\n}', "'format'"),
        (b'{\n "format": 1,\n "sha256": "0"\n}', "its digest differs"),
    ],
)
def test_a_card_that_does_not_read_is_named(
    card: bytes, reason: str, tmp_path: Path, refuses: Refuses
) -> None:
    (tmp_path / "index.json").write_bytes(card)
    with refuses(
        DamagedIndexError, damaged(tmp_path, f"index.json, which does not read ({reason})")
    ):
        open_index(tmp_path)


def test_a_card_may_be_rewritten(folder: Path) -> None:
    """Or the tests below would see the damage, not the change."""
    rewrite_card(folder, made_with="0.0")
    open_index(folder)


@pytest.mark.parametrize("number", [2, 0, "1"])
def test_an_index_of_another_format_says_so(number: Any, folder: Path, refuses: Refuses) -> None:
    rewrite_card(folder, format=number)
    text = (
        f"This version of keras-mrl reads indexes of format 1. Received: {str(folder)!r} of format "
        f"{number!r}. Install the version of keras-mrl that wrote it, or a later one."
    )
    with refuses(ManifestError, text):
        open_index(folder)
    for engine in (ExactIndex, FaissIndex):
        with refuses(ManifestError, text):
            engine.open(folder)


def test_a_metric_or_a_schedule_of_another_version_says_so(folder: Path) -> None:
    for changed in ({"metric": "hamming"}, {"schedule": {"dims": [4, 2]}}):
        rewrite_card(folder, **changed)
        with pytest.raises(
            ManifestError, match=r"^An index names its schedule, its metric and its"
        ):
            open_index(folder)


@pytest.mark.parametrize("where", ["missing", "empty", "a file", "in a file"])
@pytest.mark.parametrize("open_", [open_index, ExactIndex.open, FaissIndex.open])
def test_where_no_index_is_it_says_so(
    open_: Callable[[Path], Local], where: str, tmp_path: Path, refuses: Refuses
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a file").touch()
    (tmp_path / "in a file").symlink_to(tmp_path / "a file" / "index")
    path = tmp_path / "a file" / "index" if where == "in a file" else tmp_path / where
    text = (
        f"A saved index is a folder with a file index.json. Received: {str(path)!r}, which has "
        "none. Build one: `keras-mrl index build --help`."
    )
    with refuses(FileNotFoundError, text):
        open_(path)


def test_an_index_is_not_saved_over_a_file(build: Build, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(FileExistsError):
        build(GALLERY, SCHEDULE).save(tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "mine"


def test_other_files_in_the_folder_stay(build: Build, tmp_path: Path) -> None:
    foreign = ["mine.npy", "ids.npy", "notes-0123.json", "index-0123456789abcdef.json.bak", ".hid"]
    for name in foreign:
        (tmp_path / name).write_text("mine")
    (tmp_path / "folder").mkdir()
    for gallery in (GALLERY, OTHER):
        build(gallery, SCHEDULE).save(tmp_path)
    assert all((tmp_path / name).read_text() == "mine" for name in foreign)
    card = json.loads((tmp_path / "index.json").read_text())
    ours = {entry["name"] for entry in card["files"].values()}
    assert {p.name for p in tmp_path.iterdir()} == {*foreign, "folder", "index.json", *ours}


def test_an_open_index_stays_readable_when_it_is_replaced(build: Build, tmp_path: Path) -> None:
    index = build(GALLERY, SCHEDULE)
    index.save(tmp_path)
    opened = open_index(tmp_path)
    other = build(OTHER, SCHEDULE)
    other.save(tmp_path)
    assert_equal(opened, index)
    assert_equal(open_index(tmp_path), other)
    assert (opened.search(QUERIES).ids != other.search(QUERIES).ids).any()


def named_by_card(folder: Path) -> set[str]:
    card = json.loads((folder / "index.json").read_text())
    return {"index.json", *(entry["name"] for entry in card["files"].values())}


KILLED = """
import os, sys
from pathlib import Path
import numpy as np
from keras_mrl_serving.index import open_index

folder = Path(sys.argv[1])
old, new = open_index(folder / "old"), open_index(folder / "new")
steps = [
    (os, "fsync"), (os, "replace"), (os, "close"), (Path, "unlink"),
    (np.lib.format, "open_memmap"),
]

def exits_after(calls, function):
    def counted(*args, **kwargs):
        if next(calls, None) is None:
            os._exit(9)
        return function(*args, **kwargs)
    return counted

for calls in range(100):
    place = folder / f"killed-{calls:03}"
    old.save(place)
    child = os.fork()
    if not child:
        left = iter(range(calls))
        for owner, name in steps:
            setattr(owner, name, exits_after(left, getattr(owner, name)))
        new.save(place)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(status)
    if status != 9:
        break
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows forks no process")
def test_killed_at_any_step_of_saving_it_leaves_the_old_index_or_the_new(
    build: Build, tmp_path: Path
) -> None:
    """One process forks a child for each step, which kills itself before that step."""
    old, new = build(GALLERY, SCHEDULE), build(OTHER, SCHEDULE)
    old.save(tmp_path / "old")
    new.save(tmp_path / "new")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, check=True
    )
    *killed, completed = done.stdout.split()
    assert (set(killed), completed) == ({"9"}, "0")
    folders = sorted(tmp_path.glob("killed-*"))
    assert len(folders) == len(killed) + 1 > 15
    answers, num_stranded = [], 0
    for folder in folders:
        survivor = open_index(folder)
        answers.append(differ(survivor, old))
        assert_equal(survivor, new if answers[-1] else old)
        num_stranded += {file.name for file in folder.iterdir()} > named_by_card(folder)
        old.save(folder)
        assert_equal(open_index(folder), old)
        assert {file.name for file in folder.iterdir()} == named_by_card(folder)
    assert answers == sorted(answers)  # the old index up to some step, from there on the new
    assert (answers[0], answers[-1]) == (False, True)
    assert num_stranded


def differ(index: Local, other: Local) -> bool:
    return bool((index.search(QUERIES).ids != other.search(QUERIES).ids).any())


@pytest.mark.parametrize(
    ("owner", "name"), [(os, "fsync"), (os, "replace"), (os, "open"), (json, "dumps")]
)
def test_any_step_of_saving_that_fails_leaves_the_old_index_or_the_new(
    owner: Any, name: str, build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = build(GALLERY, SCHEDULE), build(OTHER, SCHEDULE)
    works = getattr(owner, name)
    num_failed = 0
    for calls in range(50):
        left = iter(range(calls))

        def fails(*args: Any, left: Iterator[int] = left, **kwargs: Any) -> Any:
            if next(left, None) is None:
                raise OSError(28, "No space left on device")
            return works(*args, **kwargs)

        old.save(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fails)
            try:
                new.save(tmp_path)
            except OSError:
                num_failed += 1
            else:
                break
        survivor = open_index(tmp_path)
        is_new = differ(survivor, old)
        assert_equal(survivor, new if is_new else old)
        if not is_new and name != "replace":  # which may have been done, and then failed
            assert {file.name for file in tmp_path.iterdir()} == named_by_card(tmp_path)
    assert num_failed == calls > 0
    assert_equal(open_index(tmp_path), new)


def test_it_is_written_in_an_order_that_a_power_cut_does_not_undo(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data, then the card, then the folder are made safe; then the card takes its name."""
    build(OTHER, SCHEDULE).save(tmp_path)
    old = named_by_card(tmp_path)
    index = build(GALLERY, SCHEDULE)
    steps: list[tuple[str, str]] = []
    fsync, replace, flush, unlink = os.fsync, os.replace, np.memmap.flush, Path.unlink
    digests: dict[str, str] = {}

    def synced(descriptor: int) -> None:
        names = {file.stat().st_ino: file.name for file in [tmp_path, *tmp_path.iterdir()]}
        name = names[os.fstat(descriptor).st_ino]
        steps.append(("fsync", name))
        if name != tmp_path.name:
            digests[name] = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        fsync(descriptor)

    def replaced(source: Path, target: Path) -> None:
        steps.append(("replace", f"{Path(source).name} {Path(target).name}"))
        digests["index.json"] = digests[Path(source).name]
        replace(source, target)

    def flushed(array: Any) -> None:
        steps.append(("flush", Path(array.filename).name))
        flush(array)

    def unlinked(file: Path, **given: Any) -> None:
        steps.append(("unlink", file.name))
        unlink(file, **given)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", synced)
        patch.setattr(os, "replace", replaced)
        patch.setattr(np.memmap, "flush", flushed)
        patch.setattr(Path, "unlink", unlinked)
        index.save(tmp_path)
    data = sorted(named_by_card(tmp_path) - {"index.json"})
    arrays = [name for name in data if name.endswith(".npy")]
    gone = old - {"index.json"}
    first = sorted(steps[: len(arrays)]), sorted(steps[len(arrays) : len(arrays) + len(data)])
    assert first == ([("flush", name) for name in arrays], [("fsync", name) for name in data])
    rest = iter(steps[len(arrays) + len(data) :])
    kind, aside = next(rest)
    assert (kind, storage.is_ours(aside), aside in data) == ("fsync", True, False)
    assert [next(rest) for _ in range(3)] == [
        ("fsync", tmp_path.name),
        ("replace", f"{aside} index.json"),
        ("fsync", tmp_path.name),
    ]
    removed = list(rest)
    assert {kind for kind, _ in removed} == {"unlink"}
    assert gone <= {name for _, name in removed} <= gone | {aside}
    for name in (*data, "index.json"):  # nothing was written after it was made safe
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digests[name]


def test_files_just_built_in_a_folder_are_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest, read = hashlib.file_digest, []

    def counted(file: Any, name: Any) -> Any:
        read.append(Path(file.name).name)
        return digest(file, name)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    FaissIndex.build(GALLERY, SCHEDULE, path=tmp_path, first_stage=FLAT)
    data = sorted(named_by_card(tmp_path) - {"index.json"})
    assert sorted(read) == data  # once each, as they were written
    FaissIndex.open(tmp_path, verify=False)
    assert sorted(read) == data
    FaissIndex.open(tmp_path)
    assert sorted(read) == sorted(2 * data)


def test_one_saves_at_a_time(build: Build, tmp_path: Path, refuses: Refuses) -> None:
    index, other = build(GALLERY, SCHEDULE), build(OTHER, SCHEDULE)
    index.save(tmp_path)
    text = (
        f"One writer at a time saves an index. Received: {str(tmp_path)!r}, which another is "
        "writing. Wait for it, or choose another folder."
    )
    with storage.IndexWriter(tmp_path):
        before = contents(tmp_path)
        with refuses(BlockingIOError, text):
            other.save(tmp_path)
        assert contents(tmp_path) == before
        assert_equal(open_index(tmp_path), index)
    other.save(tmp_path)
    assert_equal(open_index(tmp_path), other)


def test_a_writer_that_must_not_replace_does_not(
    build: Build, tmp_path: Path, refuses: Refuses
) -> None:
    """Where another writer commits after the caller looked."""
    index, other = build(GALLERY, SCHEDULE), build(OTHER, SCHEDULE)
    folder = tmp_path / "index"
    writer = storage.IndexWriter(folder, replaces=False)
    assert not folder.exists()
    index.save(folder)
    before = contents(folder)
    text = (
        f"An index is replaced only where that is asked for. Received: {str(folder)!r}, which "
        "holds one. Name another folder."
    )
    with refuses(FileExistsError, text):
        other.save(writer)
    assert contents(folder) == before
    other.save(storage.IndexWriter(tmp_path / "new", replaces=False))
    assert_equal(open_index(tmp_path / "new"), other)
    other.save(storage.IndexWriter(folder))
    assert_equal(open_index(folder), other)


@pytest.mark.soak
def test_saving_and_opening_at_the_same_time(build: Build, tmp_path: Path) -> None:
    both = build(GALLERY, SCHEDULE), build(OTHER, SCHEDULE)
    expected = [index.search(QUERIES).scores.tolist() for index in both]
    both[0].save(tmp_path)
    done, wrong, counts = threading.Event(), [], {"saved": 0, "blocked": 0, "opened": 0}

    def saves(index: Local) -> None:
        for _ in range(300 if SOAK else 30):
            try:
                index.save(tmp_path)
                counts["saved"] += 1
            except BlockingIOError:
                counts["blocked"] += 1

    def opens() -> None:
        while not done.is_set():
            if open_index(tmp_path).search(QUERIES).scores.tolist() not in expected:
                wrong.append("another answer")
            counts["opened"] += 1

    def guarded(work: Callable[..., None], *args: Any) -> None:
        try:
            work(*args)
        except Exception as error:
            wrong.append(repr(error))

    writers = [threading.Thread(target=guarded, args=(saves, index)) for index in both]
    readers = [threading.Thread(target=guarded, args=(opens,)) for _ in range(2)]
    for thread in writers + readers:
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    for thread in readers:
        thread.join()
    assert wrong == []
    assert counts["opened"]
    assert counts["saved"]
    assert {file.name for file in tmp_path.iterdir()} == named_by_card(tmp_path)


def test_a_plan_that_is_no_json_leaves_the_old_index(tmp_path: Path) -> None:
    odd: Any = {9: 1, 10: (2, 3)}  # whose text is JSON
    index = FaissIndex.build(GALLERY, SCHEDULE, first_stage=FLAT, plan=odd)
    index.save(tmp_path)
    assert FaissIndex.open(tmp_path).plan == {"9": 1, "10": [2, 3]}
    before = contents(tmp_path)
    with pytest.raises(TypeError, match="JSON"):
        FaissIndex.build(OTHER, SCHEDULE, path=tmp_path, first_stage=FLAT, plan={"a": np.int8(1)})
    assert contents(tmp_path) == before


def test_files_are_named_as_the_next_save_expects(folder: Path) -> None:
    """Or the files that a killed process leaves would lie there for ever."""
    names = named_by_card(folder) - {"index.json"}
    assert names
    assert all(map(storage.is_ours, names))
    assert not any(storage.is_ours(f"{name}.bak") for name in names)


# Folders that somebody else wrote: whoever writes a card can write its digests.


def signed(folder: Path, **data: bytes) -> None:
    """Replace the bytes of files by name, with the digests that belong to them."""
    entries = json.loads((folder / "index.json").read_text())["files"]
    for name, replaced in data.items():
        (folder / entries[name]["name"]).write_bytes(replaced)
        digest = hashlib.sha256(replaced).hexdigest()
        entries[name] |= {"bytes": len(replaced), "sha256": digest}
    rewrite_card(folder, files=entries)


@pytest.mark.parametrize(
    "name", ["/dev/zero", "../other.npy", "ids.npy", "a/b.npy", "", "x\0.npy", 7, None]
)
def test_a_card_names_files_as_saving_does(name: Any, folder: Path) -> None:
    entries = json.loads((folder / "index.json").read_text())["files"]
    entries["ids"]["name"] = name
    rewrite_card(folder, files=entries)
    for verify in (True, False):
        with pytest.raises(DamagedIndexError, match=r" with index\.json, which does not read \("):
            open_index(folder, verify=verify)


@pytest.mark.parametrize("target", ["/dev/zero", "fifo", "../ids.npy", "/etc/hostname"])
def test_a_file_of_an_index_is_a_regular_one_of_its_folder(
    target: str, folder: Path, tmp_path: Path
) -> None:
    file = ids_of(folder)
    shutil.copy(file, tmp_path / "ids.npy")
    os.mkfifo(folder / "fifo")
    card = folder / "index.json"
    for replaced in (file, card):
        whole = replaced.read_bytes()
        replaced.unlink()
        replaced.symlink_to(target)
        for verify in (True, False):
            with pytest.raises(DamagedIndexError, match=re.escape(f" with {replaced.name}, a ")):
                open_index(folder, verify=verify)
        replaced.unlink()
        replaced.write_bytes(whole)
    open_index(folder)


def test_a_link_inside_the_folder_is_followed(folder: Path) -> None:
    (folder / "..data").mkdir()
    for file in [*folder.glob("*.npy"), folder / "index.json"]:
        shutil.move(file, folder / "..data")
        file.symlink_to(Path("..data") / file.name)
    assert_equal(open_index(folder), open_index(folder))


def saved_bytes(array: Array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


OTHER_IDS = {
    "float": np.arange(20.0),
    "fewer": np.arange(19),
    "more": np.arange(21),
    "two axes": np.arange(20)[:, None],
    "of 32 bits": np.arange(20, dtype=np.int32),
    "big-endian": np.arange(20, dtype=">i8"),
}


@pytest.mark.parametrize("kind", sorted(OTHER_IDS))
def test_an_array_has_the_shape_and_dtype_that_the_facts_call_for(kind: str, folder: Path) -> None:
    signed(folder, ids=saved_bytes(OTHER_IDS[kind]))
    with pytest.raises(DamagedIndexError, match=r"^An index is read as it was written\. Received"):
        open_index(folder)


def test_rows_that_lie_about_their_dims_are_refused(folder: Path) -> None:
    entries = json.loads((folder / "index.json").read_text())["files"]
    names = [name for name in entries if name not in ("ids", "first")]
    assert names
    for name in names:
        path = folder / entries[name]["name"]
        whole = path.read_bytes()
        rows = np.load(path)
        for lie in (rows[:, :-1], rows[:-1], rows.astype(np.float64), np.asfortranarray(rows)):
            if lie.shape == rows.shape and lie.dtype == rows.dtype and lie.flags.c_contiguous:
                continue  # of one column: there is no order to lie about
            signed(folder, **{name: saved_bytes(lie)})
            with pytest.raises(DamagedIndexError, match=rf"{path.name} of .* instead of float32 "):
                open_index(folder)
        signed(folder, **{name: whole})
    open_index(folder)


def test_a_schedule_that_the_files_do_not_fit_is_refused(folder: Path) -> None:
    for dims in ([2, 3, 5], [1, 3, 4], [2, 3, 4, 8]):
        lists = [6] * (len(dims) - 1)
        rewrite_card(folder, schedule={"dims": dims, "shortlists": lists, "k": 3})
        with pytest.raises(DamagedIndexError):
            open_index(folder)


@pytest.mark.parametrize(
    "changed",
    [
        {"files": []},
        {"files": {"ids": 3}},
        {"files": {}},
        {"engine": ["exact"]},
        {"schedule": [1]},
        {"metric": {}},
        {"first_stage": None},
        {"first_stage": {"factory": "Flat"}},
        {"first_stage": {"factory": 3, "settings": ""}},
        {"first_stage": {"factory": "Fl\x1bat", "settings": ""}},
        {"first_stage": {"factory": "Flat", "settings": "nprobe=0"}},
    ],
    ids=str,
)
def test_a_card_of_other_types_is_refused(changed: dict[str, Any], tmp_path: Path) -> None:
    FaissIndex.build(GALLERY, SCHEDULE, first_stage=FLAT).save(tmp_path)
    rewrite_card(tmp_path, **changed)
    with pytest.raises((DamagedIndexError, ManifestError)):
        open_index(tmp_path)


@pytest.mark.parametrize("card", [b" " * 2**21, b'{"a": ' * 10**5, b"[" * 40 + b"]" * 40])
def test_a_card_is_short(card: bytes, tmp_path: Path) -> None:
    (tmp_path / "index.json").write_bytes(card)
    with pytest.raises(DamagedIndexError, match=r"index\.json, "):
        open_index(tmp_path)


OPENER = """
from keras_mrl_serving.errors import DamagedIndexError, ManifestError
from keras_mrl_serving.index import open_index
import numpy as np
import faiss
faiss.omp_set_num_threads(1)
refusals = (DamagedIndexError, ManifestError)
def read(path):
    index = open_index(path)
    found = index.search(np.eye(16, dtype=np.float32)[:4])
    assert set(found.ids.ravel().tolist()) <= {-1, *index.ids.tolist()}
"""


@pytest.mark.soak
@pytest.mark.parametrize("factory", ["Flat", "HNSW8", "IVF4,Flat", "IVF4,SQ8", "BFlat", "RaBitQ"])
def test_a_hostile_first_stage_takes_no_memory(factory: str, tmp_path: Path) -> None:
    """60 of each kind, and 1,000 in `make soak`; their digests fit."""
    gallery = drawn(0, 200, 16)
    schedule, first_stage = FunnelSchedule((8, 16), (20,), 3), FirstStage.usual(factory)
    chance, folders = random.Random(factory), []
    FaissIndex.build(gallery, schedule, first_stage=first_stage).save(tmp_path / "whole")
    entries = json.loads((tmp_path / "whole" / "index.json").read_text())["files"]
    whole = (tmp_path / "whole" / entries["first"]["name"]).read_bytes()
    for number in range(1000 if SOAK else 60):
        folders.append(tmp_path / str(number))
        shutil.copytree(tmp_path / "whole", folders[-1])
        signed(folders[-1], first=fuzzed(whole, chance))
    results, peak = read_in_process(OPENER, [tmp_path / "whole", *folders])
    assert results[0] == "answered"
    assert [result for result in results if result.startswith("RAISED")] == []
    assert "DamagedIndexError" in {result.partition(" ")[0] for result in results}
    assert peak <= 128
