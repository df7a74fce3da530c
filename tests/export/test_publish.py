"""A version appears whole or not at all, and never in place of another."""

import os
import shutil
import stat
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from keras_mrl_export.publish import Staged, check_version, publishing
from keras_mrl_serving.saved_model import list_versions


def publish(
    base_path: Path, version: int | None = None, text: str = "a model", now: float = 0.0
) -> Path:
    with publishing(base_path, version, lambda: now) as staged:
        write(staged, text)
    return staged.published


def write(staged: Staged, text: str = "a model") -> None:
    staged.folder.mkdir()
    (staged.folder / "saved_model.pb").write_text(text)
    (staged.scratch / "labels.txt").write_text("scratch")


def files(base_path: Path) -> dict[str, str]:
    paths = (path for path in sorted(base_path.rglob("*")) if path.is_file())
    return {str(path.relative_to(base_path)): path.read_text() for path in paths}


def files_and_folders(base_path: Path) -> list[str]:
    return sorted(str(path.relative_to(base_path)) for path in base_path.rglob("*"))


def refusal(base_path: Path, kind: type[Exception], version: Any) -> str:
    with pytest.raises(kind) as caught, publishing(base_path, version):
        pytest.fail("a version that cannot be published must not be built first")
    return str(caught.value)


def test_each_number_is_above_those_there(tmp_path: Path) -> None:
    base_path = tmp_path / "not" / "yet"
    assert publish(base_path, text="one") == base_path / "1"
    assert publish(base_path, text="two") == base_path / "2"
    assert files(base_path) == {"1/saved_model.pb": "one", "2/saved_model.pb": "two"}
    assert sorted(os.listdir(base_path)) == ["1", "2"]


def test_a_number_is_the_time_and_does_not_come_again(tmp_path: Path) -> None:
    assert publish(tmp_path, now=1_800_000_000.9) == tmp_path / "1800000000"
    assert publish(tmp_path, now=1_800_000_000.9) == tmp_path / "1800000001"
    shutil.rmtree(tmp_path / "1800000000")
    shutil.rmtree(tmp_path / "1800000001")
    assert publish(tmp_path, now=1_800_000_002.0) == tmp_path / "1800000002"
    before = int(time.time())
    with publishing(tmp_path, None) as staged:
        write(staged)
    assert int(staged.published.name) >= max(before, 1_800_000_003)


def test_a_given_number_and_the_one_after_it(tmp_path: Path) -> None:
    assert publish(tmp_path, 20260101) == tmp_path / "20260101"
    assert publish(tmp_path) == tmp_path / "20260102"
    assert publish(tmp_path, 0) == tmp_path / "0"
    assert publish(tmp_path) == tmp_path / "20260103"


def test_an_existing_number_is_refused_and_untouched(tmp_path: Path) -> None:
    publish(tmp_path, 3, "mine")
    assert refusal(tmp_path, FileExistsError, 3) == (
        "A published version is never overwritten. "
        f"Received: version=3, which exists under {tmp_path}. Leave version out to take "
        "a number that is free."
    )
    assert files(tmp_path) == {"3/saved_model.pb": "mine"}


def test_a_number_taken_while_the_model_was_built_is_refused_and_untouched(tmp_path: Path) -> None:
    def late() -> None:
        with publishing(tmp_path, 3) as staged:
            write(staged, "theirs")
            publish(tmp_path, 3, "mine")

    with pytest.raises(FileExistsError) as caught:
        late()
    assert str(caught.value) == (
        "A published version is never overwritten. "
        f"Received: version=3, which exists under {tmp_path}. Leave version out to take "
        "a number that is free."
    )
    assert files(tmp_path) == {"3/saved_model.pb": "mine"}
    assert os.listdir(tmp_path) == ["3"]


def test_a_number_written_with_zeros_is_taken_too(tmp_path: Path) -> None:
    (tmp_path / "007").mkdir()
    assert publish(tmp_path) == tmp_path / "8"
    assert refusal(tmp_path, FileExistsError, 7) == (
        "A published version is never overwritten. "
        f"Received: version=7, which exists under {tmp_path}. Leave version out to take "
        "a number that is free."
    )


def test_a_number_with_a_sign_or_blanks_is_taken_too(tmp_path: Path) -> None:
    for name in ("+5", " 6", "-1"):
        (tmp_path / name).mkdir()
    for version in (5, 6):
        assert refusal(tmp_path, FileExistsError, version) == (
            "A published version is never overwritten. Received: "
            f"version={version}, which exists under {tmp_path}. Leave version out to take "
            "a number that is free."
        )
    assert publish(tmp_path) == tmp_path / "7"


def test_below_0_is_no_reason_for_a_version_0(tmp_path: Path) -> None:
    (tmp_path / "-1").mkdir()
    assert publish(tmp_path) == tmp_path / "1"


def test_after_the_highest_number_there_is_no_next(tmp_path: Path) -> None:
    (tmp_path / str(2**63 - 1)).mkdir()
    assert refusal(tmp_path, ValueError, None) == (
        "The next version must be a number of 64 bits. "
        f"Received: {tmp_path}, which holds {2**63 - 1}. Give one that is free: version=1."
    )
    assert publish(tmp_path, 1) == tmp_path / "1"


def test_siblings_that_are_no_versions_do_not_count(tmp_path: Path) -> None:
    for name in ("tmp", "9.tmp", ".12", "latest", "1e3", "٣", "9" * 30):
        (tmp_path / name).mkdir()
    (tmp_path / "4").write_text("a file counts: the server would take it for a version")
    assert publish(tmp_path) == tmp_path / "5"


@pytest.mark.parametrize("version", [-1, True, 1.0, "1", 2**63])
def test_a_version_is_a_number_a_server_reads(tmp_path: Path, version: Any) -> None:
    assert refusal(tmp_path, ValueError, version) == (
        f"version must be a non-negative integer. Received: version={version!r}. "
        "Leave it out to take a number that is free."
    )


def test_nothing_a_server_loads_is_there_before_the_end(tmp_path: Path) -> None:
    with publishing(tmp_path, 5) as staged:
        write(staged)
        assert list_versions(str(tmp_path)) == {}
        assert staged.folder.stat().st_dev == tmp_path.stat().st_dev
    assert list_versions(str(tmp_path)) == {5: str(tmp_path / "5")}


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_nothing(tmp_path: Path, failure: type[BaseException]) -> None:
    def failing() -> None:
        with publishing(tmp_path, None) as staged:
            write(staged)
            raise failure

    publish(tmp_path, text="before")
    with pytest.raises(failure):
        failing()
    assert files(tmp_path) == {"1/saved_model.pb": "before"}
    assert os.listdir(tmp_path) == ["1"]


def test_a_failure_takes_the_folders_along_that_were_made_for_it(tmp_path: Path) -> None:
    def failing(meanwhile: str = "") -> None:
        with publishing(tmp_path / "not" / "yet", None):
            if meanwhile:
                (tmp_path / meanwhile).mkdir()
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert os.listdir(tmp_path) == []
    with pytest.raises(KeyError):
        failing("not/another")
    assert os.listdir(tmp_path / "not") == ["another"]
    with pytest.raises(KeyError):
        failing("not/yet/1")
    assert files_and_folders(tmp_path) == ["not", "not/another", "not/yet", "not/yet/1"]


def test_folders_that_another_failure_removes_are_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base_path, mkdtemp = tmp_path / "not" / "yet", tempfile.mkdtemp

    def removed_before(**arguments: Any) -> str:
        monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)
        base_path.rmdir()
        return mkdtemp(**arguments)

    monkeypatch.setattr(tempfile, "mkdtemp", removed_before)
    assert publish(base_path) == base_path / "1"
    assert files(base_path) == {"1/saved_model.pb": "a model"}


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "file" in refusal(tmp_path / "file" / "new" / "models", NotADirectoryError, None)
    assert files_and_folders(tmp_path) == ["file"]


def test_others_may_read_what_was_published(tmp_path: Path) -> None:
    mode = stat.S_IMODE(publish(tmp_path).stat().st_mode)
    (tmp_path / "plain").mkdir()
    assert mode == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.fixture
def together() -> threading.Barrier:
    return threading.Barrier(8, timeout=30)


def race(together: threading.Barrier, base_path: Path, version: int | None) -> list[Any]:
    """The version or the error of each of eight exports that take their number at once."""
    outcomes: list[Any] = [None] * together.parties

    def export(index: int) -> None:
        try:
            with publishing(base_path, version, lambda: 0.0) as staged:
                write(staged, f"model {index}")
                together.wait()
            outcomes[index] = int(staged.published.name)
        except FileExistsError as error:
            outcomes[index] = str(error)

    threads = [threading.Thread(target=export, args=(i,)) for i in range(together.parties)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def test_exports_that_race_all_get_numbers_of_their_own(
    together: threading.Barrier, tmp_path: Path
) -> None:
    outcomes = race(together, tmp_path, None)
    assert sorted(outcomes) == list(range(1, together.parties + 1))
    assert files(tmp_path) == {
        f"{number}/saved_model.pb": f"model {index}" for index, number in enumerate(outcomes)
    }


def test_of_exports_that_race_for_one_number_one_gets_it(
    together: threading.Barrier, tmp_path: Path
) -> None:
    outcomes = race(together, tmp_path, 5)
    winner = outcomes.index(5)
    assert files(tmp_path) == {"5/saved_model.pb": f"model {winner}"}
    assert set(outcomes) - {5} == {
        "A published version is never overwritten. "
        f"Received: version=5, which exists under {tmp_path}. Leave version out to take "
        "a number that is free."
    }


def test_a_version_is_no_place_for_versions(tmp_path: Path) -> None:
    version = tmp_path / "1"
    version.mkdir()
    (version / "saved_model.pb").touch()
    with pytest.raises(ValueError, match="folder above") as caught:
        check_version(version, None)
    assert str(caught.value) == (
        "base_path must be the folder above the versions. "
        f"Received: {version}, which is itself a version. Give {tmp_path}."
    )
