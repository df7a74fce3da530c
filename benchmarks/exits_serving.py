"""A cascade over exits against the whole model of the same version, in the CPU of the server.

Server and client are processes of their own, over gRPC on loopback. Laps take turns.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
from exits_texts import DIMS, Ids, Tokens, padded
from serving_load import Server, served, shares

from keras_mrl_export import export_saved_model
from keras_mrl_serving import CascadePolicy, Client, Options

SIZES = (1, 8, 32)
MODEL = "m"


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
    return facts | overhead(model, policy, rows, laps, rows_per_lap)


def overhead(
    model: keras.Model, policy: CascadePolicy, rows: Ids, laps: int, rows_per_lap: int
) -> dict[str, float]:
    """Return the share at a batch of 8 by a policy of the same stages by which no row leaves."""
    with _client(model, never(policy), rows) as (server, client):
        given = requests(rows, 8, max(1, rows_per_lap // 8))
        own = shares(
            server,
            lambda call: client.classify_adaptive(given[call]),
            lambda call: client.classify(given[call], dim=DIMS[-1]),
            laps,
            len(given),
        )
    return {"overhead_no_exit": own["cpu"]}


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
