"""`keras-mrl index`: the flags of `build`, and what `show` prints."""

import json
import os
import re
import sys
from pathlib import Path

import pytest

from tests.helpers.cli import (
    BUILD,
    FRAMEWORKS,
    GIVEN,
    KERAS_MRL,
    Call,
    run_without,
)
from tests.helpers.cli import GALLERY_ROWS as ROWS

NO_PLAN = "Nothing is planned with --shortlists or --engine exact. Received: {}. "
NO_PLAN += "Leave them out, or let the funnel be planned."


def test_show_prints_files_digests_and_plan(run: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    table = run(*BUILD, "--dims", "16,32", "--target-recall", "0.9")[1].split("a.index")[0]
    monkeypatch.setitem(sys.modules, "faiss", None)  # a look needs none
    status, out, err = run("show", "a.index")
    assert (status, err) == (0, "")
    assert "  digests      every file is as it was written\n" in out
    assert len(re.findall(r"^  file         \w+-[0-9a-f]{16}\.\w+, \d", out, re.MULTILINE)) == 3
    assert re.search(
        r"^  planned for  recall 0\.9: (0\.9\d{3}|1\.0000) with a standard error of 0\.0\d{3}$",
        out,
        re.MULTILINE,
    )
    assert out.endswith(table)
    assert table.count("<- chosen") == 1


def test_json_of_an_index_is_the_same_when_it_is_shown(run: Call) -> None:
    status, out, err = run(*BUILD, *GIVEN, "--json")
    assert (status, err) == (0, "")
    built = json.loads(out)
    assert built.pop("seconds") > 0
    status, out, err = run("show", "a.index", "--json")
    assert (status, err) == (0, "")
    assert json.loads(out) == {**built, "verified": True}
    assert (built["index"], built["engine"], built["rows"]) == ("a.index", "faiss", ROWS)
    assert built["disk_bytes"] == sum(built["files"].values())
    assert set(built["files"]) | {"index.json"} == set(os.listdir("a.index"))
    (first,) = (size for name, size in built["files"].items() if name.endswith(".faiss"))
    assert built["first_stage_bytes"] == first


def test_a_damaged_index_is_one_sentence(run: Call) -> None:
    assert run(*BUILD, *GIVEN)[0] == 0
    (file,) = Path("a.index").glob("rows_32-*.npy")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    rule = "keras-mrl: An index is read as it was written. Received: 'a.index' with "
    remedy = " Copy it again from where it is whole, or build it anew.\n"
    changed = f"{rule}{file.name}, whose bytes have changed.{remedy}"
    assert run("show", "a.index") == (1, "", changed)
    assert run("show", "a.index", "--json") == (1, "", changed)
    file.write_bytes(data[:-1])
    assert run("show", "a.index")[2] == (
        f"{rule}{file.name} of {len(data) - 1} bytes instead of {len(data)}.{remedy}"
    )


def test_a_folder_without_an_index(run: Call) -> None:
    assert run("show", "nowhere") == (
        1,
        "",
        "keras-mrl: A saved index is a folder with a file index.json. Received: 'nowhere', which "
        "has none. Build one: `keras-mrl index build --help`.\n",
    )
    assert run.misused("show", "a", "b") == "Got unexpected extra argument (b)."


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--k", "0"], "--k must be at least 1. Received: 0. Leave it out for 10."),
        (["--sample", "0"], "--sample must be at least 1. Received: 0. Leave it out for 500."),
        (["--batch", "-1"], "--batch must be at least 1. Received: -1. Leave it out for 1."),
        (["--seed", "-1"], "--seed must be at least 0. Received: -1. Leave it out for 0."),
        (
            ["--shortlists", "9"],
            "Shortlists lead from one dim to the next. Received: --shortlists without --dims. "
            "Name both, for example --dims 16,512 --shortlists 200.",
        ),
        (
            ["--dims", "8,16", "--shortlists", "9"],
            "A funnel needs one shortlist fewer than dims, none larger than the one before it, "
            "none below k, and k >= 1. Received: dims=(8, 16), shortlists=(9,), k=10. "
            "Write for example FunnelSchedule(dims=(16, 256), shortlists=(200,), k=10).",
        ),
        (
            ["--settings", "efSearch=9"],
            "Settings are those of a first stage. Received: --settings without --first-stage. "
            "Name both, for example --first-stage HNSW32 --settings efSearch=64.",
        ),
        *(
            (
                ["--first-stage", "HNSW32", "--settings", settings],
                "settings must be names with numbers, and look at 1 place at least. "
                f"Received: {settings!r}. Write for example 'efSearch=64'.",
            )
            for settings in ("efSearch", "efSearch=inf", "efSearch=64,", "=3", "a=1 b=2")
        ),
        (
            ["--engine", "exact", "--first-stage", "Flat"],
            "The exact engine compares with every row and has no first stage of FAISS. "
            "Received: --first-stage with --engine exact. Leave out one of them.",
        ),
        ([*GIVEN, "--seed", "0"], NO_PLAN.format("--seed")),
        (
            ["--engine=exact", "--target-recall=0.9", "--batch=2"],
            NO_PLAN.format("--target-recall, --batch"),
        ),
        (
            ["--queries", "Q.npy", "--sample", "9"],
            "A sample of the gallery is drawn only where there are no queries. "
            "Received: --sample with --queries. Leave out one or the other.",
        ),
        (
            ["--target-precision", "0.9"],
            "A target by label (--target-precision, --target-map) and --labels belong together. "
            "Received: --target-precision alone. "
            "Give both, or --target-recall, which needs no labels.",
        ),
        (
            ["--labels", "L.npy"],
            "A target by label (--target-precision, --target-map) and --labels belong together. "
            "Received: --labels alone. "
            "Give both, or --target-recall, which needs no labels.",
        ),
        (
            ["--queries", "Q.npy", "--labels", "L.npy", "--target-precision", "0.9"],
            "--query-labels belong to --queries whose target is by label. "
            "Received: no --query-labels with --queries, --labels. "
            "Give --queries, --labels and --query-labels together.",
        ),
        (
            ["--query-labels", "QL.npy"],
            "--query-labels belong to --queries whose target is by label. "
            "Received: --query-labels with neither. "
            "Give --queries, --labels and --query-labels together.",
        ),
        (
            ["--model", "birds", "--timeout", "3", "--tls-ca", "x", "--metadata", "a=b"],
            "A server is asked where --target names it. "
            "Received: --model, --timeout, --tls-ca, --metadata without --target. "
            "Give for example --target localhost:8500.",
        ),
        (
            ["--target", "t:1", "--timeout", "0"],
            "--timeout must be a positive number of seconds. Received: 0.0. Give for example 10.",
        ),
        (
            ["--target", "localhost"],
            "A target must be 'host:port'. Received: 'localhost'. "
            "Give the server's gRPC port, for example localhost:8500.",
        ),
    ],
)
def test_arguments_that_do_not_fit(run: Call, arguments: list[str], text: str) -> None:
    assert run.refused(*BUILD, *arguments, status=2) == text
    assert os.listdir() == ["E.npy"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--metric", "x"], "'--metric': 'x' is not one of 'cosine', 'dot', 'l2'."),
        (
            ["--dims", "8,x"],
            "'--dims': must be integers with commas. Received: '8,x'. Give for example 8,16.",
        ),
        (
            ["--shortlists", "many"],
            "'--shortlists': must be integers with commas. Received: 'many'. "
            "Give for example 8,16.",
        ),
        (
            ["--target-recall", "95"],
            "'--target-recall': must be a share in (0, 1]. Received: '95'. Give for example 0.95.",
        ),
    ],
)
def test_words_that_do_not_parse(run: Call, words: list[str], text: str) -> None:
    assert run.misused(*BUILD, *words) == f"Invalid value for {text}"


def test_flags_that_exclude_each_other(run: Call) -> None:
    words = (*BUILD, "--target-recall", "0.9", "--target-precision", "0.9")
    assert run.refused(*words, status=2) == (
        "Only one of --target-recall, --target-precision, --target-map can be given. "
        "Received: --target-recall with --target-precision. Leave out one."
    )
    assert run.refused(*BUILD, "--fingerprint", "f", "--target", "t:1", status=2) == (
        "Only one of --fingerprint, --target, --adaptor can be given. "
        "Received: --fingerprint with --target. Leave out one."
    )


def test_no_framework_is_needed(run: Call, tmp_path: Path) -> None:
    del run
    for words in (
        [*BUILD, "--dims", "16,32", "--target-recall", "0.9"],
        ["show", "a.index", "--json"],
    ):
        ended = run_without(FRAMEWORKS, tmp_path, *KERAS_MRL, "index", *words)
        assert ended.status == 0, ended.err
    assert json.loads(ended.out)["verified"] is True


def test_what_is_printed_of_a_given_funnel(run: Call) -> None:
    status, out, err = run(*BUILD, *GIVEN, "--first-stage", "Flat", "--fingerprint", "5e1f")
    assert (status, err) == (0, "")
    place = Path("a.index")
    (first,) = place.glob("first-*.faiss")
    disk = sum(file.stat().st_size for file in place.iterdir()) - (
        (place / "index.json").stat().st_size
    )
    assert re.sub(r"in     \d+\.\d s", "in     # s", out) == (
        f"a.index: {ROWS} rows, faiss, cosine\n"
        "  funnel       8 -> 32, shortlist 60, k 10\n"
        f"  first stage  Flat, {first.stat().st_size / 1000:.1f} kB of memory\n"
        "  encoder      5e1f\n"
        f"  on disk      {disk / 1000:.1f} kB\n"
        "  built in     # s\n"
    )
