"""A gallery with ties, and indexes of it by schedule and metric."""

from __future__ import annotations

from typing import Any

import numpy as np

from keras_mrl_serving.funnel import FunnelSchedule
from keras_mrl_serving.index import ExactIndex

RNG = np.random.default_rng(0)
WIDTH = 16
GALLERY = RNG.normal(size=(300, WIDTH)).astype(np.float32)
GALLERY[100:120] = GALLERY[5]  # twenty-one rows that are as near as each other
IDS = RNG.permutation(10_000)[:300].astype(np.int64)
QUERIES = np.concatenate([GALLERY[:7], RNG.normal(size=(40, WIDTH)).astype(np.float32)])
SCHEDULES = {
    "three stages": FunnelSchedule((4, 8, WIDTH), (60, 25), 10),
    "two, of which one looks at the whole gallery": FunnelSchedule((4, WIDTH), (300,), 5),
    "a shortlist longer than the gallery": FunnelSchedule((4, WIDTH), (1000,), 5),
    "one": FunnelSchedule((WIDTH,), (), 3),
    "all rows": FunnelSchedule((WIDTH,), (), 300),
    "narrower than the gallery": FunnelSchedule((2, 6), (30,), 1),
}
METRICS = ("cosine", "dot", "l2")


def index_of(schedule: str = "three stages", metric: str = "cosine", **more: Any) -> ExactIndex:
    return ExactIndex.build(GALLERY, SCHEDULES[schedule], IDS, metric, **more)
