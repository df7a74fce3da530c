"""A cascade over exits against the whole model of the same version, in the CPU of the server.

Server and client are processes of their own, over gRPC on loopback. Laps take turns, so that what
else the machine does falls on both, and the CPU time of each process is read before and after.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
from exits_texts import DIMS, Ids, Tokens, padded
from serving_load import Server, served

from keras_mrl_export import export_saved_model
from keras_mrl_serving import CascadePolicy, Client, Options

SIZES = (1, 8, 32)
MODEL = "m"


def shares(
    server: Server,
    own: Callable[[int], object],
    full: Callable[[int], object],
    laps: int,
    calls: int,
) -> dict[str, float]:
    """Return what `own` takes as a share of `full`: medians over pairs of laps.

    Args:
        server: Whose CPU counts.
        own: A call; it is given its number.
        full: The call that it is compared with.
        laps: Pairs of laps, after one that does not count.
        calls: Calls in a lap.
    """
    ratios: dict[str, list[float]] = {"cpu": [], "wall": [], "cpu_and_client": []}
    for lap in range(-1, laps):
        taken = []
        for function in (own, full):
            before = server.cpu_s, time.process_time(), time.perf_counter()
            for call in range(calls):
                function(call)
            after = server.cpu_s, time.process_time(), time.perf_counter()
            taken.append([end - begin for begin, end in zip(before, after, strict=True)])
        if lap >= 0:
            (own_server, own_client, own_wall), (server_s, client_s, wall_s) = taken
            ratios["cpu"].append(own_server / server_s)
            ratios["cpu_and_client"].append((own_server + own_client) / (server_s + client_s))
            ratios["wall"].append(own_wall / wall_s)
    return {name: round(statistics.median(values), 4) for name, values in ratios.items()}


def requests(rows: Ids, size: int, number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return requests of rows drawn at random, each padded to its longest row."""
    order = np.random.default_rng(seed).permutation(len(rows))
    return [
        padded([rows[i] for i in np.take(order, range(k * size, (k + 1) * size), mode="wrap")])
        for k in range(number)
    ]


def measure(
    model: keras.Model,
    policy: CascadePolicy,
    rows: Ids,
    texts: Sequence[str],
    tokens: Tokens,
    laps: int,
    rows_per_lap: int,
) -> dict[str, Any]:
    """Return the shares of `classify_adaptive` at batches of 1, 8 and 32.

    Args:
        model: The model with exits.
        policy: The cascade.
        rows: Rows of tokens to ask.
        texts: The same as texts, for what tokenizing takes.
        tokens: Their tokenizer.
        laps: Pairs of laps.
        rows_per_lap: How many rows a lap asks.
    """
    facts: dict[str, Any] = {}
    order = np.random.default_rng(0).permutation(len(rows))
    with _client(model, policy, rows) as (server, client):
        for size in SIZES:
            calls = max(1, rows_per_lap // size)
            given = requests(rows, size, calls)
            own = shares(
                server,
                lambda call, given=given: client.classify_adaptive(given[call]),  # type: ignore[misc]
                lambda call, given=given: client.classify(given[call], dim=DIMS[-1]),  # type: ignore[misc]
                laps,
                calls,
            )
            facts |= {f"{name}_share_batch{size}": share for name, share in own.items()}
            print(f"batch {size}: {own}", flush=True)

        def asked(call: int) -> Any:
            return padded(tokens.ids([texts[order[call]]]))

        facts["cpu_share_with_tokenizing_and_client"] = shares(
            server,
            lambda call: client.classify_adaptive(asked(call)),
            lambda call: client.classify(asked(call), dim=DIMS[-1]),
            laps,
            min(rows_per_lap, len(order)),
        )["cpu_and_client"]
    with _client(model, never(policy), rows) as (server, client):
        given = requests(rows, 8, max(1, rows_per_lap // 8))
        facts["overhead_no_exit"] = shares(
            server,
            lambda call: client.classify_adaptive(given[call]),
            lambda call: client.classify(given[call], dim=DIMS[-1]),
            laps,
            len(given),
        )["cpu"]
    return facts


@contextmanager
def _client(
    model: keras.Model, policy: CascadePolicy, rows: Ids
) -> Iterator[tuple[Server, Client]]:
    """Export a version with this policy, and serve it."""
    options = Options(timeout_s=300, max_in_flight=1)
    signatures = ["classify_adaptive", f"classify_{DIMS[-1]}"]
    with tempfile.TemporaryDirectory() as folder:
        export_saved_model(
            model,
            folder,
            padded(rows[:8]),
            policy=policy,
            activation="softmax",
            signatures=signatures,
        )
        with (
            served(Path(folder)) as server,
            Client(server.target, MODEL, options=options) as client,
        ):
            yield server, client


def never(policy: CascadePolicy) -> CascadePolicy:
    """Return the policy of the same stages by which no row leaves early."""
    stages = [
        stage if stage.threshold is None else replace(stage, threshold=1.0)
        for stage in policy.stages
    ]
    return CascadePolicy(tuple(stages), policy.confidence)
