"""`keras-mrl adapt`, and the index that is built and searched with its projection."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keras_mrl_serving import Projection
from tests.helpers.cli import Call, Terminal

WIDTH, ROWS = 24, 900
GIVEN = ("--embeddings", "E.npy", "--dims", "4,8", "--out", "adapted")


def embeddings() -> Any:
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]
    rows = rng.normal(size=(ROWS, WIDTH)) * np.geomspace(1, 0.05, WIDTH)
    return (rows @ turn).astype(np.float32)


@pytest.fixture
def run(call: Call, folder: Path) -> Call:
    """Call any command in a folder that holds embeddings."""
    del folder
    np.save("E.npy", embeddings())
    return call


def test_a_projection_its_report_and_its_rows(run: Call) -> None:
    status, out, err = run("adapt", *GIVEN)
    assert (status, err) == (0, "")
    header, *rows = out.splitlines()
    assert header.split() == ["method", "dim", "recall@10", "shortlist@0.95", "shortlist@0.98"]
    assert [row.split()[:2] for row in rows[:4]] == [
        ["truncation", "4"],
        ["truncation", "8"],
        ["pca", "4"],
        ["pca", "8"],
    ]
    assert rows[-2:] == [
        f"{ROWS} rows of dim {WIDTH} are in adapted/projected.npy.",
        "Build an index of them: keras-mrl index build --adaptor adapted --out gallery.index",
    ]
    projection = Projection.load("adapted")
    np.testing.assert_array_equal(
        np.load("adapted/projected.npy"), projection.transform(embeddings())
    )
    report = json.loads(Path("adapted/report.json").read_text())
    assert (
        report["methods"]["pca"]["8"]["recall@10"]
        > report["methods"]["truncation"]["8"]["recall@10"]
    )
    assert Path("adapted/report.svg").stat().st_size > 1000


def test_an_index_of_projected_rows_takes_queries_as_they_are(run: Call) -> None:
    assert run("adapt", *GIVEN)[0] == 0
    funnel = ("--dims", "8,24", "--shortlists", "200", "--k", "5", "--engine", "exact")
    assert run("index", "build", "--adaptor", "adapted", *funnel, "--out", "a.index")[0] == 0
    assert run("index", "build", "--embeddings", "E.npy", *funnel, "--out", "b.index")[0] == 0
    np.save("Q.npy", embeddings()[:3])
    asked = ("--query", "Q.npy", "--k", "1", "--json")
    status, out, err = run("search", "a.index", "--adaptor", "adapted", *asked)
    assert (status, err) == (0, "")
    assert [json.loads(line)["ids"] for line in out.splitlines()] == [[0], [1], [2]]
    refused = run.refused("search", "b.index", "--adaptor", "adapted", *asked)
    assert refused.startswith("Projected queries are searched in an index of embeddings that the ")


def test_a_plan_projects_its_queries(run: Call) -> None:
    assert run("adapt", *GIVEN)[0] == 0
    np.save("Q.npy", embeddings()[:60] + np.float32(0.01))
    plan = ("--queries", "Q.npy", "--first-stage", "Flat", "--json", "--out", "a.index")
    status, out, _ = run("index", "build", "--adaptor", "adapted", *plan)
    assert status == 0
    index = json.loads(out)
    assert index["encoder_fingerprint"] == Projection.load("adapted").fingerprint
    assert index["schedule"]["dims"][-1] == WIDTH


def test_pairs_are_judged_on_rows_that_taught_nothing(run: Call) -> None:
    rows = embeddings()
    np.save("Q.npy", rows[::2] + 0.02 * np.random.default_rng(1).normal(size=(450, WIDTH)))
    np.save("ROWS.npy", np.arange(0, ROWS, 2))
    pairs = ("--method", "pairwise", "--steps", "5", "--pairs", "Q.npy", "ROWS.npy")
    status, out, _ = run("adapt", *GIVEN, *pairs, "--json")
    assert status == 0
    assert json.loads(out)["method"] == "pairwise"
    report = json.loads(Path("adapted/report.json").read_text())
    assert 0 < report["methods"]["pairwise"]["8"]["ndcg@10"] <= report["full"]["ndcg@10"] + 0.05
    np.save("ROWS.npy", np.arange(450) + ROWS)
    refused = run.refused("adapt", *GIVEN[:-1], "other", *pairs)
    assert refused.startswith("pairs must be the embeddings of queries and, for each, the number")


def test_an_interrupted_command_goes_on(run: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save("E.npy", np.tile(embeddings(), (20, 1)))
    with monkeypatch.context() as patched:
        patched.setattr("sys.stderr", Terminal(interrupt_at="8,192/18,000"))
        assert run("adapt", *GIVEN).status == 130
    assert not Path("adapted/projected.npy").exists()
    fingerprint = Projection.load("adapted").fingerprint
    refused = run.refused("adapt", *GIVEN, "--method", "listwise")
    assert refused.startswith("A folder holds one projection. Received: --out adapted")
    status, out, err = run("adapt", *GIVEN, "--json")
    assert (status, err) == (0, "Going on with the projection that is in adapted.\n")
    assert json.loads(out)["fingerprint"] == fingerprint
    assert len(np.load("adapted/projected.npy")) == 18_000
    refused = run.refused("adapt", *GIVEN)
    assert refused.startswith("Projected rows are never overwritten. Received: --out adapted")


def test_flags_that_do_not_go_together(run: Call) -> None:
    assert run.refused("index", "build", "--out", "a.index", status=2) == (
        "A gallery is the rows of --embeddings, or those that `keras-mrl adapt` projected. "
        "Received: neither. Give --embeddings E.npy, or --adaptor DIR."
    )
    both = ("--embeddings", "E.npy", "--adaptor", "adapted", "--out", "a.index")
    assert "Received: both." in run.refused("index", "build", *both, status=2)
    named = ("--fingerprint", "5e1f", "--adaptor", "adapted", "--out", "a.index")
    assert "--fingerprint" in run.refused("index", "build", *named, status=2)
    missing = run.refused("index", "build", "--adaptor", "adapted", "--out", "a.index")
    assert missing.startswith("A projection is a folder with a file projection.json. Received: 'ad")
    assert "must hold embeddings" in run.refused(
        "adapt", "--embeddings", str(_scalar()), "--out", "adapted"
    )


def _scalar() -> Path:
    np.save("one.npy", np.float32(3))
    return Path("one.npy")
