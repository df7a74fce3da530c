"""The funnel's schedule: the paper's own arithmetic, and what is refused."""

import json
from typing import Any

import numpy as np
import pytest

from keras_mrl_serving.errors import ManifestError
from keras_mrl_serving.funnel import FunnelSchedule
from tests.helpers.galleries import Refuses

IMAGENET = 1_281_167
PAPER = FunnelSchedule((16, 32, 64, 128, 256, 2048), (200, 100, 50, 25, 10), 10)


def test_the_paper_s_adaptive_retrieval() -> None:
    exhaustive = FunnelSchedule((2048,), (), 10).madds(IMAGENET)
    two_stages = FunnelSchedule((16, 2048), (200,), 10).madds(IMAGENET)
    assert round(exhaustive / 1e6) == 2624
    assert two_stages == 16 * IMAGENET + 200 * 2048
    assert (round(16 * IMAGENET / 1e6, 1), round(200 * 2048 / 1e6, 1)) == (20.5, 0.4)
    assert exhaustive / (16 * IMAGENET) == 128  # "128x in theory"
    assert round(exhaustive / two_stages) == 125  # with the rerank paid as well


def test_the_paper_s_funnel() -> None:
    rerank = 200 * 32 + 100 * 64 + 50 * 128 + 25 * 256 + 10 * 2048
    assert PAPER.madds(IMAGENET) == 16 * IMAGENET + rerank
    assert rerank == 46_080


def test_the_paper_s_presets() -> None:
    assert FunnelSchedule.funnel_retrieval() == PAPER
    assert FunnelSchedule.adaptive_retrieval() == FunnelSchedule((16, 2048), (200,), 10)
    assert FunnelSchedule.funnel_retrieval(100, k=60) == FunnelSchedule(
        (16, 32, 64, 100), (200, 100, 60), 60
    )
    for preset in (FunnelSchedule.funnel_retrieval, FunnelSchedule.adaptive_retrieval):
        assert preset(16) == FunnelSchedule((16,), (), 10)
        assert preset(17, k=300) == FunnelSchedule((16, 17), (300,), 300)


def test_bytes_are_those_of_the_rows_that_are_read() -> None:
    funnel = FunnelSchedule((16, 64, 256), (200, 50), 10)
    rows = 16 * 1000 + 64 * 200 + 256 * 50
    assert funnel.bytes_read(1000) == 4 * rows == 4 * funnel.madds(1000)
    assert funnel.bytes_read(1000, bits=8) == rows
    assert funnel.bytes_read(1000, bits=(1, 8, 32)) == 2 * 1000 + 64 * 200 + 4 * 256 * 50
    assert funnel.bytes_read(10, bits=(1, 8, 32)) == 2 * 10 + 64 * 10 + 4 * 256 * 10


@pytest.mark.parametrize("bits", [(), (8, 32), 0, (1, -8, 32), 65])
def test_bits_that_are_refused(bits: Any, refuses: Refuses) -> None:
    text = (
        "bits must be one number per stage, or one for all, above 0 and no more than 64. "
        f"Received: bits={bits} for dims={PAPER.dims}. Give 32 for float32, 8 for int8."
    )
    with refuses(ValueError, text):
        PAPER.bytes_read(1000, bits)


def test_a_shortlist_is_no_longer_than_the_gallery() -> None:
    assert FunnelSchedule((16, 2048), (200,), 10).madds(50) == 50 * 16 + 50 * 2048


def test_a_schedule_comes_back_from_its_json() -> None:
    numbers: Any = ([np.int64(16), 2048], np.array([200]), np.int32(10))
    for schedule in (PAPER, FunnelSchedule((8,), (), 1), FunnelSchedule(*numbers)):
        assert FunnelSchedule.from_json(json.loads(json.dumps(schedule.to_json()))) == schedule
    assert PAPER.to_json() == {
        "dims": [16, 32, 64, 128, 256, 2048],
        "shortlists": [200, 100, 50, 25, 10],
        "k": 10,
    }


@pytest.mark.parametrize(
    ("dims", "shortlists", "k"),
    [
        ((16, 64), (), 10),
        ((16,), (200,), 10),
        ((16, 64), (200, 100), 10),
        ((16, 64), (9,), 10),
        ((16, 64, 128), (100, 101), 10),
        ((16,), (), 0),
        ((16,), (), -1),
        ((16, 64), (200.0,), 10),
        ((16, 64), ("200",), 10),
        ((16, 64), 200, 10),
        ((16, 64), None, 10),
        ((16, 64), (200,), 10.0),
        ((16, 64), (200,), "10"),
        ((16, 64), (200,), None),
        ((16, 64), (200,), True),
    ],
)
def test_stages_that_do_not_narrow_are_refused(
    dims: tuple[int, ...], shortlists: Any, k: Any, refuses: Refuses
) -> None:
    text = (
        "A funnel needs one shortlist fewer than dims, none larger than the one before it, none "
        f"below k, and k >= 1. Received: dims={dims}, shortlists={shortlists}, k={k}. "
        "Write for example FunnelSchedule(dims=(16, 256), shortlists=(200,), k=10)."
    )
    with refuses(ValueError, text):
        FunnelSchedule(dims, shortlists, k)


def test_the_last_dim_may_stand_twice() -> None:
    """A coarse first stage finds a shortlist, which is scored again at the same width."""
    every: tuple[Any, ...] = ((256, 256), (64, 256, 256), [np.int64(8), 8])
    for dims in every:
        schedule = FunnelSchedule(dims, (40,) * (len(dims) - 1), 10)
        assert schedule.rescores is True
        assert schedule.dims == tuple(map(int, dims))
        assert FunnelSchedule.from_json(json.loads(json.dumps(schedule.to_json()))) == schedule
    assert PAPER.rescores is False
    assert FunnelSchedule((256, 256), (40,), 10).madds(1000) == 256 * 1040


@pytest.mark.parametrize(
    "dims", [(16, 16, 64), (64, 64, 64), (8, 16, 8), (0, 0), (16, 8, 8), ("8", "8")]
)
def test_no_other_dim_may(dims: Any) -> None:
    with pytest.raises(ValueError, match="dims must be strictly increasing positive integers"):
        FunnelSchedule(dims, (40,) * (len(dims) - 1), 10)


@pytest.mark.parametrize(
    ("dims", "remedy"),
    [
        ((64, 16), "Sort them and drop repeats: dims=(16, 64)."),
        ((), "Give prefix lengths, for example dims=(8, 16, 32)."),
        (16, "Give prefix lengths, for example dims=(8, 16, 32)."),
    ],
)
def test_dims_must_increase(dims: Any, remedy: str, refuses: Refuses) -> None:
    rule = "dims must be strictly increasing positive integers."
    with refuses(ValueError, f"{rule} Received: dims={dims}. {remedy}"):
        FunnelSchedule(dims, (200,), 10)


@pytest.mark.parametrize(
    ("funnel", "received"),
    [
        ({}, "{} (KeyError: 'dims')"),
        (None, "None (TypeError: 'NoneType' object is not subscriptable)"),
        (
            {"dims": 8, "shortlists": [], "k": 1},
            "{'dims': 8, 'shortlists': [], 'k': 1} (TypeError: 'int' object is not iterable)",
        ),
        (
            {"dims": [8, 4], "shortlists": [9], "k": 1},
            "{'dims': [8, 4], 'shortlists': [9], 'k': 1} (ValueError: dims must be strictly "
            "increasing positive integers. Received: dims=(8, 4). Sort them and drop repeats: "
            "dims=(4, 8).)",
        ),
    ],
)
def test_a_funnel_that_cannot_be_read_is_refused(
    funnel: Any, received: str, refuses: Refuses
) -> None:
    text = (
        f"A funnel names its dims, its shortlists and k. Received: {received}. "
        "Install the version of keras-mrl that exported the model, or a later one."
    )
    with refuses(ManifestError, text):
        FunnelSchedule.from_json(funnel)
