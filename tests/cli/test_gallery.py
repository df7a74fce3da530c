"""From a gallery to an index: funnels that are planned or named, folders, refusals."""

import errno
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keras_mrl_cli import gallery
from keras_mrl_cli.files import load_embeddings
from keras_mrl_serving import ExactIndex, FaissIndex, FunnelSchedule, open_index
from keras_mrl_serving.index.plan import average_precision_by_label
from tests.helpers.cli import (
    BUILD,
    GIVEN,
    Call,
    Terminal,
    embeddings,
)
from tests.helpers.cli import GALLERY_ROWS as ROWS
from tests.helpers.cli import GALLERY_WIDTH as WIDTH


def exact(k: int = 10, metric: str = "cosine") -> ExactIndex:
    return ExactIndex.build(embeddings(), FunnelSchedule((WIDTH,), (), k), metric=metric)


def opened(path: str) -> FaissIndex:
    index = open_index(path)
    assert isinstance(index, FaissIndex)
    return index


def recall(index: FaissIndex) -> float:
    queries = embeddings(100, seed=1)
    true = exact(index.schedule.k, index.metric).search(queries).ids
    ids = index.search(queries).ids
    return float((ids[:, :, None] == true[:, None, :]).any(axis=1).mean())


def test_a_plan_is_printed_kept_and_reaches_its_target(run: Call) -> None:
    status, out, err = run(*BUILD, "--target-recall", "0.9")
    assert status == 0
    said = [re.sub("^[0-9]+ s: ", "", line) for line in err.splitlines()]
    assert said[0] == f"exact neighbours of 60 queries at dim {WIDTH}"
    assert "building HNSW32_SQ8 over dim 8" in said
    header, *front = out[: out.index("a.index: ")].splitlines()
    assert header == "quality +- error     per query  funnel"
    (chosen,) = (line for line in front if line.endswith("   <- chosen"))
    index = opened("a.index")
    dims = " -> ".join(map(str, index.schedule.dims))
    assert f" us  {dims}" in chosen
    assert recall(index) > 0.85
    plan = index.plan
    assert plan is not None
    assert (plan["target"], plan["measure"], plan["queries"], plan["batch"]) == (
        *(0.9, "recall", 60, 1),
    )
    assert plan["schedule"] == index.schedule.to_json()
    assert plan["quality"] - plan["error"] >= 0.9
    assert len(plan["front"]) == len(front)


def test_a_plan_may_be_bounded(run: Call) -> None:
    status, _, err = run(*BUILD, "--target-recall", "0.9", "--plan-seconds", "0")
    assert status == 0
    assert " s: no more is tried: the time is over\n" in err
    plan = opened("a.index").plan
    assert plan is not None
    assert plan["quality"] >= 0.9


def test_a_row_of_the_sample_does_not_find_itself(run: Call) -> None:
    labels = np.arange(ROWS)  # no two rows are alike
    np.save("L.npy", labels)
    status, out, err = run(*BUILD, "--labels", "L.npy", "--target-precision", "0.1")
    assert (status, out) == (1, "")
    assert err.splitlines()[-1] == (
        "keras-mrl: A target must be one that exact search reaches, by more than 1.64 standard "
        f"errors. Received: target=0.1; exact search at dim {WIDTH} reaches 0.0000. Lower the "
        "target."
    )
    assert sorted(os.listdir()) == ["E.npy", "L.npy"]


def test_what_could_be_reached_is_printed(run: Call) -> None:
    status, out, err = run(*BUILD, "--first-stage", "BFlat", "--target-recall", "0.99")
    assert (status, out) == (1, "")
    assert err.splitlines()[-1].startswith(
        "keras-mrl: A target must be one that some funnel reaches, by more than 1.64 standard "
        "errors. Received: target=0.99; the best that was found: 0."
    )
    assert "quality +- error     per query  funnel" in err.splitlines()
    assert "<- chosen" not in err
    assert sorted(os.listdir()) == ["E.npy"]


def test_a_precision_of_labels_is_planned_for(run: Call) -> None:
    np.save("L.npy", np.where(embeddings()[:, 0] > 0, "warm", "cold"))
    queries = embeddings(200, seed=1)
    np.save("Q.npy", queries)
    np.save("QL.npy", np.where(queries[:, 0] > 0, "warm", "cold"))
    labels = ("--labels", "L.npy", "--target-precision", "0.6", "--dims", "4,32")
    for more, size in (
        (("--sample", "150"), 150),
        (
            ("--queries", "Q.npy", "--query-labels", "QL.npy"),
            200,
        ),
    ):
        status, out, _ = run(*BUILD, *labels, *more, "--json", "--force")
        assert status == 0
        plan = json.loads(out)["plan"]
        assert (plan["measure"], plan["target"], plan["queries"]) == ("precision", 0.6, size)
        assert plan["quality"] >= 0.6


def test_the_paper_s_mean_average_precision_is_planned_for(run: Call) -> None:
    queries = embeddings(100, seed=1)
    labels = [np.where(rows[:, 0] > 0, "warm", "cold") for rows in (embeddings(), queries)]
    for name, rows in (("Q.npy", queries), ("L.npy", labels[0]), ("QL.npy", labels[1])):
        np.save(name, rows)
    words = ("--queries", "Q.npy", "--labels", "L.npy", "--query-labels", "QL.npy")
    status, out, _ = run(*BUILD, *words, "--target-map", "0.4", "--json")
    assert status == 0
    plan = json.loads(out)["plan"]
    assert (plan["measure"], plan["target"]) == ("map", 0.4)
    ids = np.asarray(open_index("a.index").search(queries).ids, np.int64)
    reached = average_precision_by_label(*labels)(ids).mean()
    assert plan["quality"] == pytest.approx(reached, abs=1e-5)


def test_the_dims_first_stage_and_batch_of_a_plan(run: Call) -> None:
    np.save("Q.npy", embeddings(40, seed=1))
    arguments = ("--dims", "8,24", "--first-stage", "Flat", "--queries", "Q.npy", "--batch", "20")
    status, out, err = run(*BUILD, *arguments, "--target-recall", "0.7", "--k", "5", "--json")
    assert status == 0
    assert {line.rpartition("building ")[2] for line in err.splitlines() if "building" in line} <= {
        *("Flat over dim 8", "Flat over dim 24"),
    }
    index = json.loads(out)
    assert index["schedule"]["dims"][-1] == 24
    assert index["schedule"]["k"] == 5
    assert index["first_stage"] == {"factory": "Flat", "settings": ""}
    assert (index["plan"]["batch"], index["plan"]["queries"]) == (20, 40)


def test_a_graph_s_settings_are_where_a_plan_begins(
    run: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def record(*_: object, first_stages: Any, **__: object) -> None:
        seen.extend(first_stages)
        raise ValueError("Enough is seen. Received: it. Stop.")

    monkeypatch.setattr(gallery, "plan_funnel", record)
    for kind in (
        ("HNSW16",),
        ("HNSW16", "--settings", "efSearch=5"),
        ("IVF4,Flat",),
        ("IVF4_HNSW8,Flat",),
        ("Flat",),
    ):
        assert run(*BUILD, "--first-stage", *kind) == (
            *(1, "", "keras-mrl: Enough is seen. Received: it. Stop.\n"),
        )
    assert [spec.settings for spec in seen] == [
        *("efSearch=16", "efSearch=5", "nprobe=1", "nprobe=1", ""),
    ]


def test_samples_are_drawn_by_their_seed(run: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def record(rows: Any, queries: Any, *_: object, own_rows: Any, **__: object) -> None:
        np.testing.assert_array_equal(rows[own_rows], queries)
        seen.append(own_rows.tolist())
        raise ValueError("Enough is seen. Received: it. Stop.")

    monkeypatch.setattr(gallery, "plan_funnel", record)
    for seed in "0", "0", "1":
        run(*BUILD, "--sample", "50", "--seed", seed)
    run(*BUILD, "--sample", "5000")
    assert seen[0] == seen[1] != seen[2]
    assert len(set(seen[0])) == 50
    assert seen[3] == list(range(ROWS))


def test_a_funnel_that_is_given_is_not_planned(run: Call) -> None:
    assert run(*BUILD, *GIVEN, "--k", "7", "--metric", "l2")[::2] == (0, "")
    index = opened("a.index")
    assert index.schedule == FunnelSchedule((8, 32), (60,), 7)
    assert (index.metric, len(index), index.encoder_fingerprint) == ("l2", ROWS, None)
    assert index.plan is None
    assert recall(index) > 0.8


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        ((), "efSearch=64"),
        (("--first-stage", "HNSW8"), "efSearch=64"),
        (("--first-stage", "HNSW8", "--settings", "efSearch=9"), "efSearch=9"),
        (("--first-stage", "Flat"), ""),
        (("--first-stage", "Flat", "--settings", ""), ""),
        (
            ("--first-stage", "IVF2,Flat", "--settings", "nprobe=2,max_codes=9"),
            "nprobe=2,max_codes=9",
        ),
        (("--first-stage", "IVF2,Flat"), "nprobe=8"),
    ],
)
def test_first_stages_have_the_usual_settings_of_their_kind(
    run: Call, words: tuple[str, ...], settings: str
) -> None:
    status, out, _ = run(*BUILD, *GIVEN, *words, "--json")
    assert status == 0
    index = json.loads(out)
    assert index["first_stage"]["settings"] == settings
    assert index["first_stage"]["factory"] == (words[1] if words else "HNSW32")


@pytest.mark.parametrize("engine", ["exact", "faiss"])
def test_ids_are_the_lines_of_a_text(run: Call, engine: str) -> None:
    names = [f"row {row}" for row in range(ROWS)]
    Path("I.txt").write_text("\n".join(names))
    shortlists = ("--dims", "4,16", "--shortlists", "50", "--engine", engine)
    assert run(*BUILD, *shortlists, "--ids", "I.txt")[0] == 0
    assert open_index("a.index").search(embeddings()[:4], k=1).ids[:, 0].tolist() == names[:4]
    assert run("show", "a.index")[0] == 0


def test_ids_are_the_rows_of_a_file(run: Call) -> None:
    ids = np.arange(ROWS)[::-1] * 3
    np.save("I.npy", ids)
    assert run(*BUILD, *GIVEN, "--ids", "I.npy")[0] == 0
    assert open_index("a.index").search(embeddings()[:4], k=1).ids[:, 0].tolist() == (
        ids[:4].tolist()
    )


def test_the_exact_engine_is_exhaustive_unless_told(
    run: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    queries = embeddings(20, seed=1)
    status, out, err = run(*BUILD, "--engine", "exact")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"a.index: {ROWS} rows, exact, cosine"
    assert lines[1] == f"  funnel       {WIDTH} alone, k 10"
    assert re.fullmatch(
        r"  first stage  every row, in NumPy, 76.9 kB read by each search", lines[2]
    )
    index = open_index("a.index")
    assert isinstance(index, ExactIndex)
    np.testing.assert_array_equal(index.search(queries).ids, exact().search(queries).ids)
    for dims, schedule in (
        (("--dims", "16"), FunnelSchedule((16,), (), 10)),
        (("--dims", "16", "--shortlists", "none"), FunnelSchedule((16,), (), 10)),
        (GIVEN, FunnelSchedule((8, 32), (60,), 10)),
    ):
        assert run(*BUILD, "--engine", "exact", "--force", *dims)[0] == 0
        assert open_index("a.index").schedule == schedule


def test_an_index_is_replaced_only_with_force(run: Call) -> None:
    assert run(*BUILD, *GIVEN)[0] == 0
    before = sorted(os.listdir("a.index"))
    assert run(*BUILD, *GIVEN) == (
        1,
        "",
        "keras-mrl: An index is replaced only with --force. Received: --out a.index, which holds "
        "one. Add --force, or name another folder.\n",
    )
    bad = embeddings()
    bad[-1, 0] = np.nan
    np.save("bad.npy", bad)
    assert run("build", "--embeddings", "bad.npy", "--out", "a.index", "--force", *GIVEN) == (
        1,
        "",
        "keras-mrl: The gallery must be finite, and so must the squares of their lengths in "
        "float32. Received: NaN, infinity, or rows longer than 1e19. "
        "Look for failed rows where the embeddings were made.\n",
    )
    assert sorted(os.listdir("a.index")) == before
    assert run("show", "a.index")[0] == 0
    assert run(*BUILD, *GIVEN, "--force", "--k", "3")[0] == 0
    assert open_index("a.index").schedule.k == 3
    assert len(os.listdir("a.index")) == len(before)
    assert not set(os.listdir("a.index")) & set(before) - {"index.json"}


@pytest.mark.parametrize("engine", ["exact", "faiss"])
def test_an_index_that_was_built_meanwhile_is_not_replaced(
    run: Call, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[str] = []

    def build_another(path: str) -> Any:
        if not built:
            built.append("first")
            exact().save("a.index")
        return disk_usage(path)

    disk_usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", build_another)  # asked after the folder is looked at
    assert run(*BUILD, *GIVEN, "--engine", engine) == (
        1,
        "",
        "keras-mrl: An index is replaced only with --force. Received: --out a.index, which holds "
        "one. Add --force, or name another folder.\n",
    )
    assert open_index("a.index").schedule == exact().schedule
    assert built == ["first"]


def test_an_index_has_a_folder_of_its_own(run: Call) -> None:
    Path("a.index").mkdir()
    Path("a.index", "thesis.txt").write_text("mine")
    sentence = (
        "keras-mrl: An index is built in a folder of its own. "
        "Received: --out a.index, which holds thesis.txt. Name a new folder.\n"
    )
    for force in (), ("--force",):
        assert run(*BUILD, *GIVEN, *force) == (1, "", sentence)
    assert os.listdir("a.index") == ["thesis.txt"]
    Path("a.index", "thesis.txt").rename("a.index/rows_32-0123456789abcdef.npy")
    assert run(*BUILD, *GIVEN)[0] == 0  # what a build that was killed left is no hindrance
    assert not Path("a.index", "rows_32-0123456789abcdef.npy").exists()


def test_out_must_be_a_folder(run: Call) -> None:
    rule = "keras-mrl: --out must be a folder that can be written. Received: "
    arguments = ("build", "--embeddings", "E.npy", *GIVEN, "--out")
    assert run(*arguments, "E.npy") == (
        1,
        "",
        f"{rule}E.npy, which is a file. Name another.\n",
    )
    status, out, err = run(*arguments, "E.npy/below")
    assert (status, out) == (1, "")
    assert err == f"{rule}E.npy/below, for {Path('E.npy').absolute()} is a file. Name another.\n"
    np.testing.assert_array_equal(np.load("E.npy"), embeddings())


def test_a_folder_that_may_not_be_written(run: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert run(*BUILD, *GIVEN) == (
        1,
        "",
        "keras-mrl: --out must be a folder that can be written. "
        "Received: a.index (Permission denied). Name another.\n",
    )


def test_a_disk_that_is_too_full(run: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=50_000))
    assert run(*BUILD, *GIVEN) == (
        1,
        "",
        "keras-mrl: An index of these rows takes 96.0 kB of disk. Received: --out a.index with "
        "50.0 kB left. Make room, name another disk, or give fewer or narrower --dims.\n",
    )
    assert not Path("a.index").exists()


def test_without_faiss_the_remedy_is_named(run: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    for more in (), GIVEN:
        assert run(*BUILD, *more) == (
            1,
            "",
            "keras-mrl: FaissIndex needs FAISS. Received: import of faiss halted; None in "
            "sys.modules. Install it: pip install 'keras-mrl[faiss]'.\n",
        )


def test_files_that_hold_something_else(run: Call) -> None:
    np.save("flat.npy", np.zeros(3))
    np.save("number.npy", np.float32(3))
    np.save("words.npy", np.array([["a", "b"]]))
    np.save("complex.npy", np.zeros((3, 2), complex))
    Path("text.npy").write_text("no array")
    rule = "keras-mrl: --embeddings must hold embeddings, numbers of shape (rows, width). Received:"
    remedy = "Write them with `keras-mrl embed --out`, or numpy.save.\n"
    sentence_by_words = {
        "flat.npy": f"{rule} flat.npy with float64 (3,). {remedy}",
        "number.npy": f"{rule} number.npy with float32 (). {remedy}",
        "words.npy": f"{rule} words.npy with <U1 (1, 2). {remedy}",
        "complex.npy": f"{rule} complex.npy with complex128 (3, 2). {remedy}",
        "text.npy": "keras-mrl: A file must hold what its name says. Received: text.npy "
        "(no .npy, or not a whole one). Make it anew, or leave it out.\n",
        "gone.npy": "keras-mrl: Every file must be one that can be read. Received: gone.npy "
        "(No such file or directory). Correct the path.\n",
    }
    for file, sentence in sentence_by_words.items():
        assert run("build", "--embeddings", file, "--out", "a.index") == (1, "", sentence)
    assert not Path("a.index").exists()


def test_ids_labels_and_queries_that_do_not_fit(run: Call) -> None:
    np.save("twice.npy", np.zeros(ROWS, int))
    np.save("short.npy", np.arange(3))
    np.save("narrow.npy", np.zeros((9, 5)))
    np.save("L.npy", np.zeros(ROWS, int))
    np.save("Q.npy", embeddings(9))
    precision = ("--target-precision", "0.5", "--labels")
    sentence_by_words = {
        ("--ids", "twice.npy"): f"ids must differ from row to row. Received: {ROWS - 1} that "
        "repeat another. Give every row its own.",
        ("--ids", "short.npy"): "ids must be one int64 >= 0, or one string that is not empty, per "
        "gallery row. Received: int64 ids "
        f"of shape (3,) for {ROWS} rows. Give one per row; an index built without any "
        "numbers its rows from 0.",
        (*precision, "short.npy"): "--labels must hold one label per row. Received: short.npy of "
        f"shape (3,) for {ROWS} rows. Save them in the order of the rows.",
        (*precision, "L.npy", "--queries", "Q.npy", "--query-labels", "short.npy"): "--query-labels"
        " must hold one label per row. Received: short.npy of shape (3,) for 9 rows. "
        "Save them in the order of the rows.",
        ("--queries", "narrow.npy"): "The queries must be (rows, width) with a width of at least "
        "32. Received: shape (9, 5). Embed them at the funnel's last dim, one row each.",
        ("--queries", "L.npy"): "--queries must hold embeddings, numbers of shape (rows, width). "
        f"Received: L.npy with int64 ({ROWS},). "
        "Write them with `keras-mrl embed --out`, or numpy.save.",
    }
    for arguments, sentence in sentence_by_words.items():
        assert run(*BUILD, *arguments) == (1, "", f"keras-mrl: {sentence}\n")
    assert not Path("a.index").exists()


def test_galleries_and_first_stages_the_index_refuses(run: Call) -> None:
    sentence_by_words = {
        (*GIVEN, "--k", "601", "--shortlists", "601"): "A gallery needs at least as many rows as "
        f"the funnel returns. Received: {ROWS} rows for k=601. Lower k, or add rows.",
        ("--k", "600"): "A plan needs a target in (0, 1], a k below the gallery's rows, and a "
        "sample of at least 30 queries and one batch. Received: target=0.95, k=600, 540 rows, "
        "batch=1, 60 queries. Give for example target=0.95.",
        ("--dims", "8,64", "--shortlists", "60"): "The gallery must be (rows, width) with a width "
        f"of at least 64. Received: shape ({ROWS}, {WIDTH}). Embed them at the funnel's last dim, "
        "one row each.",
    }
    for arguments, sentence in sentence_by_words.items():
        assert run(*BUILD, *arguments) == (1, "", f"keras-mrl: {sentence}\n")
    status, out, err = run(*BUILD, *GIVEN, "--first-stage", "Maze")
    assert (status, out) == (1, "")
    assert err.startswith(
        "keras-mrl: The first stage must be an index FAISS can make of the gallery's prefixes. "
        f"Received: 'Maze' for {ROWS} rows of dim 8 and metric 'cosine' ("
    )
    assert err.count("\n") == 1
    assert not Path("a.index", "index.json").exists()


def test_progress_is_on_the_terminal_alone(run: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        status, out, _ = run(*BUILD, *GIVEN)
    assert status == 0
    assert "rows/s" not in out
    passes = terminal.getvalue().split("\r\x1b[K")
    assert [text.partition(" rows")[0] for text in passes if text] == ["600/600", "600/600"]
    assert passes[-1] == ""


def test_embeddings_are_mapped_not_read(run: Call) -> None:
    del run  # its folder holds the gallery
    assert isinstance(load_embeddings("--embeddings", "E.npy"), np.memmap)


def test_no_memory_is_a_sentence(run: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_: object, **__: object) -> None:
        np.empty(2**60, np.float32)

    monkeypatch.setattr(gallery, "plan_funnel", too_large)
    status, out, err = run(*BUILD)
    assert (status, out) == (1, "")
    assert re.fullmatch(
        "keras-mrl: A plan holds a scaled copy of the gallery in memory, and an index its first "
        r"stage\. Received: Unable to allocate .*\. Give --dims and --shortlists with a small "
        r"first dim, and nothing is planned\.\n",
        err,
    )


def test_errors_of_the_system_are_sentences(run: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert run(*BUILD, *GIVEN) == (
        1,
        "",
        "keras-mrl: An index lies in a folder that can be read, and written to build it. "
        "Received: No space left on device. Correct the path, or make room there.\n",
    )
    assert not os.path.exists("a.index")


def test_a_server_tells_the_fingerprint_and_the_dims(run: Call, target: str) -> None:
    np.save("three.npy", embeddings()[:, :3])
    build = ("build", "--embeddings", "three.npy", "--out", "a.index", "--json")
    served = ("--target", target, "--model", "rows")
    status, out, err = run(*build, *served, "--target-recall", "0.9")
    assert status == 0
    assert " s: what prefixes of dim 1 can reach\n" in err  # no power of two from 8
    index = json.loads(out)
    assert index["encoder_fingerprint"] == "rows"
    assert index["schedule"]["dims"] in ([1, 3], [3], [3, 3])  # codes of 3 dims, then 3 dims
    status, out, _ = run(*build, *served, "--force", "--dims=1,3", "--shortlists=600")
    assert json.loads(out)["encoder_fingerprint"] == "rows"
    unknown = "keras-mrl: dim must be one of the dims the model serves. "
    unknown += "Received: dim=2 for model 'rows'. Choose one of 1, 3.\n"
    for dims in ("--dims=1,2", "--shortlists=600"), ("--dims=1,2",):
        assert run(*build, *served, "--force", *dims) == (1, "", unknown)
    assert run(*BUILD, *served, "--force") == (
        1,
        "",
        "keras-mrl: A gallery is of a model's embeddings, as wide as one of its dims. Received: "
        "E.npy of width 32 for model 'rows' with 1, 3. "
        "Embed it with `keras-mrl embed --out`, or name the model it is of.\n",
    )
    status, out, err = run(*build, "--target", target, "--model", "nobody", "--force")
    assert (status, out) == (1, "")
    assert err.startswith("keras-mrl: ")
    assert "'nobody'" in err
