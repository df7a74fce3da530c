"""An index on disk: whole, or refused, whatever befell its files."""

import hashlib
import json
import os
import random
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
from keras_mrl_serving.index.first_stage import Shortlister
from tests.helpers.galleries import (
    ENGINES,
    FLAT,
    METRICS,
    Array,
    Refuses,
    Search,
    assert_same,
    drawn,
    searches,
)

SOAK = bool(os.environ.get("KERAS_MRL_SOAK"))
ROOT = Path(__file__).parents[3]

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
    """The two answer alike, to the last bit, and know the same of themselves."""
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
def test_to_build_in_a_folder_is_to_build_to_save_and_to_open(
    schedule: FunnelSchedule, metric: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("keras_mrl_serving.index.faiss._ROWS_AT_ONCE", 7)
    given: dict[str, Any] = {"first_stage": FLAT, "plan": {"target": 0.9}}
    ids = np.arange(20) * 3
    built = FaissIndex.build(
        GALLERY, schedule, ids, metric, "5e1f", path=tmp_path / "a" / "b", **given
    )
    saved_ = FaissIndex.build(GALLERY, schedule, ids, metric, "5e1f", **given)
    saved_.save(tmp_path / "c")
    assert_equal(built, saved_)
    assert_equal(FaissIndex.open(tmp_path / "a" / "b"), FaissIndex.open(tmp_path / "c"))
    cards = [json.loads((tmp_path / at / "index.json").read_text()) for at in ("a/b", "c")]
    digests = [{n: f["sha256"] for n, f in card["files"].items()} for card in cards]
    assert digests[0] == digests[1]
    assert built.plan == {"target": 0.9}


def test_what_is_wrong_with_a_gallery_leaves_nothing_behind(tmp_path: Path) -> None:
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
def test_what_was_damaged_never_answers(metric: str, build: Build, tmp_path: Path) -> None:
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


def rewrite(folder: Path, **changed: Any) -> None:
    """As another version of keras-mrl might have written it: with a digest that is right."""
    card = json.loads((folder / "index.json").read_text())
    del card["sha256"]
    card |= changed
    digest = hashlib.sha256(json.dumps(card).encode()).hexdigest()
    (folder / "index.json").write_text(json.dumps({**card, "sha256": digest}, indent=1))


def test_a_card_may_be_rewritten(folder: Path) -> None:
    """Or the tests below would see damage, not what was changed."""
    rewrite(folder, made_with="0.0")
    open_index(folder)


@pytest.mark.parametrize("number", [2, 0, "1"])
def test_an_index_of_another_format_says_so(number: Any, folder: Path, refuses: Refuses) -> None:
    rewrite(folder, format=number)
    text = (
        f"This version of keras-mrl reads indexes of format 1. Received: {str(folder)!r} of format "
        f"{number!r}. Install the version of keras-mrl that wrote it, or a later one."
    )
    with refuses(ManifestError, text):
        open_index(folder)
    for engine in (ExactIndex, FaissIndex):
        with refuses(ManifestError, text):
            engine.open(folder)


@pytest.mark.parametrize("engine", ["qdrant", None, 1])
def test_an_index_of_an_unknown_engine_says_so(engine: Any, folder: Path, refuses: Refuses) -> None:
    rewrite(folder, engine=engine)
    text = (
        f'An index is of the engine "exact" or "faiss". Received: {engine!r}. '
        "Install the version of keras-mrl that wrote it, or a later one."
    )
    with refuses(ManifestError, text):
        open_index(folder)


@pytest.mark.parametrize(
    ("wrote", "opens", "names"),
    [("exact", FaissIndex, "'exact' for 'faiss'"), ("faiss", ExactIndex, "'faiss' for 'exact'")],
)
def test_an_index_of_the_other_engine_says_so(
    wrote: str, opens: type[Local], names: str, tmp_path: Path, refuses: Refuses
) -> None:
    ENGINES[wrote](GALLERY, SCHEDULE).save(tmp_path)
    text = (
        f"An index is opened by the engine that wrote it. Received: one of the engine {names}. "
        "Open it with open_index."
    )
    with refuses(ManifestError, text):
        opens.open(tmp_path)


def test_a_metric_or_a_schedule_of_another_version_says_so(folder: Path) -> None:
    for changed in ({"metric": "hamming"}, {"schedule": {"dims": [4, 2]}}):
        rewrite(folder, **changed)
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


def test_what_others_keep_in_the_folder_stays(build: Build, tmp_path: Path) -> None:
    foreign = ["mine.npy", "ids.npy", "notes-0123.json", "index-0123456789abcdef.json.bak", ".hid"]
    for name in foreign:
        (tmp_path / name).write_text("mine")
    (tmp_path / "folder").mkdir()
    for gallery in (GALLERY, OTHER):
        build(gallery, SCHEDULE).save(tmp_path)
    assert all((tmp_path / name).read_text() == "mine" for name in foreign)
    card = json.loads((tmp_path / "index.json").read_text())
    ours = {said["name"] for said in card["files"].values()}
    assert {p.name for p in tmp_path.iterdir()} == {*foreign, "folder", "index.json", *ours}


def test_who_opened_an_index_keeps_it_when_it_is_replaced(build: Build, tmp_path: Path) -> None:
    index = build(GALLERY, SCHEDULE)
    index.save(tmp_path)
    opened = open_index(tmp_path)
    other = build(OTHER, SCHEDULE)
    other.save(tmp_path)
    assert_equal(opened, index)
    assert_equal(open_index(tmp_path), other)
    assert (opened.search(QUERIES).ids != other.search(QUERIES).ids).any()


def test_an_engine_replaces_the_other(tmp_path: Path) -> None:
    for name in ("exact", "faiss", "exact"):
        index = ENGINES[name](GALLERY, SCHEDULE)
        index.save(tmp_path)
        assert_equal(open_index(tmp_path), index)
        assert len(list(tmp_path.iterdir())) == len(ids_and(tmp_path))


def ids_and(folder: Path) -> set[str]:
    card = json.loads((folder / "index.json").read_text())
    return {"index.json", *(said["name"] for said in card["files"].values())}


STEPS = ("os.fsync", "os.replace", "os.close", "Path.unlink", "np.lib.format.open_memmap")

KILLED = """
import os, sys
from pathlib import Path
import numpy as np
from keras_mrl_serving.index import open_index
from tests.serving.index.test_saved import STEPS

folder, new, calls = sys.argv[1], sys.argv[2], int(sys.argv[3])
index = open_index(new)
owners = {"os": os, "Path": Path, "np.lib.format": np.lib.format}

def exits(function):
    def counted(*args, **kwargs):
        global calls
        calls -= 1
        if calls < 0:
            os._exit(9)
        return function(*args, **kwargs)
    return counted

for step in STEPS:
    owner, _, name = step.rpartition(".")
    setattr(owners[owner], name, exits(getattr(owners[owner], name)))
index.save(folder)
"""


@pytest.mark.soak
def test_killed_while_it_saves_it_leaves_the_old_index_or_the_new(
    build: Build, tmp_path: Path
) -> None:
    """At every step in `make soak`, else at each third."""
    old, new = build(GALLERY, SCHEDULE), build(OTHER, SCHEDULE)
    new.save(tmp_path / "new")
    answers, stranded = set(), 0
    for calls in range(0, 200, 1 if SOAK else 3):
        folder = tmp_path / f"killed-{calls}"
        old.save(folder)
        done = run(KILLED, folder, tmp_path / "new", calls)
        assert done.returncode in (0, 9), done.stderr
        left = open_index(folder)
        answers.add(is_new := bool((left.search(QUERIES).ids != old.search(QUERIES).ids).any()))
        assert_equal(left, new if is_new else old)
        stranded += {file.name for file in folder.iterdir()} > ids_and(folder)
        old.save(folder)
        assert_equal(open_index(folder), old)
        assert {file.name for file in folder.iterdir()} == ids_and(folder)
        if done.returncode == 0:
            assert is_new
            break
    assert done.returncode == 0
    assert answers == {True, False}
    assert stranded


def run(program: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.mark.parametrize("step", ["os.fsync", "os.replace", "_sync_folder", "json.dumps"])
def test_what_fails_while_it_saves_leaves_the_old_index_or_the_new(
    step: str, build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = build(GALLERY, SCHEDULE), build(OTHER, SCHEDULE)
    target = f"keras_mrl_serving.index.storage.{step}"
    owner, _, name = step.rpartition(".")
    works = getattr({"os": os, "json": json, "": storage}[owner], name)
    failed = 0
    for calls in range(50):
        left = iter(range(calls))

        def fails(*args: Any, left: Iterator[int] = left, **kwargs: Any) -> Any:
            if next(left, None) is None:
                raise OSError(28, "No space left on device")
            return works(*args, **kwargs)

        old.save(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(target, fails)
            try:
                new.save(tmp_path)
            except OSError:
                failed += 1
            else:
                break
        found = open_index(tmp_path)
        is_new = bool((found.search(QUERIES).ids != old.search(QUERIES).ids).any())
        assert_equal(found, new if is_new else old)
        if not is_new and step != "os.replace":  # which may have been done, and then failed
            assert {file.name for file in tmp_path.iterdir()} == ids_and(tmp_path)
    assert failed == calls > 0
    assert_equal(open_index(tmp_path), new)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full is Linux's")
@pytest.mark.parametrize("kind", [FLAT, FirstStage("BFlat", "")], ids=str)
def test_a_first_stage_that_finds_the_disk_full_says_so(kind: FirstStage) -> None:
    """FAISS tells of it by a RuntimeError with a line of its source."""
    rows = np.ones((5000, 16), np.float32)
    first = Shortlister.build(rows, kind, "dot", lambda _done, _rows: None)
    with pytest.raises(OSError, match=r"No space left on device") as caught:
        first.write("/dev/full")
    text = str(caught.value)
    assert text.startswith("A first stage must be written whole. Received: '/dev/full' (")
    assert text.endswith("). Make room on the disk, or choose another folder.")


def test_it_is_written_in_an_order_that_a_power_cut_does_not_undo(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data, then the card, then the folder are made safe; then the card takes its name."""
    build(OTHER, SCHEDULE).save(tmp_path)
    old = ids_and(tmp_path)
    index = build(GALLERY, SCHEDULE)
    steps: list[tuple[str, str]] = []
    fsync, replace, flush, unlink = os.fsync, os.replace, np.memmap.flush, Path.unlink
    digests: dict[str, str] = {}

    def synced(descriptor: int) -> None:
        what = os.fstat(descriptor).st_ino
        names = {file.stat().st_ino: file.name for file in [tmp_path, *tmp_path.iterdir()]}
        steps.append(("fsync", names[what]))
        if names[what] != tmp_path.name:
            digests[names[what]] = hashlib.sha256((tmp_path / names[what]).read_bytes()).hexdigest()
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
    data = sorted(ids_and(tmp_path) - {"index.json"})
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


def test_what_was_just_built_in_a_folder_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest, read = hashlib.file_digest, []

    def counted(file: Any, name: Any) -> Any:
        read.append(Path(file.name).name)
        return digest(file, name)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    FaissIndex.build(GALLERY, SCHEDULE, path=tmp_path, first_stage=FLAT)
    data = sorted(ids_and(tmp_path) - {"index.json"})
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
    with storage.Writing(tmp_path):
        before = contents(tmp_path)
        with refuses(BlockingIOError, text):
            other.save(tmp_path)
        assert contents(tmp_path) == before
        assert_equal(open_index(tmp_path), index)
    other.save(tmp_path)
    assert_equal(open_index(tmp_path), other)


@pytest.mark.soak
def test_those_who_save_and_those_who_open_do_not_disturb_one_another(
    build: Build, tmp_path: Path
) -> None:
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
    assert {file.name for file in tmp_path.iterdir()} == ids_and(tmp_path)


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
    """Or what a killed one leaves would lie there for ever."""
    names = ids_and(folder) - {"index.json"}
    assert names
    assert all(map(storage.is_ours, names))
    assert not any(storage.is_ours(f"{name}.bak") for name in names)
