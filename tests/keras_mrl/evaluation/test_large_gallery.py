"""The measures of a large gallery: minutes, and no copy of it."""

import os
import time
import tracemalloc

import numpy as np
import pytest

from keras_mrl.evaluation import score_embeddings

RNG = np.random.default_rng(0)


def test_a_gallery_is_not_copied() -> None:
    gallery = RNG.normal(size=(200_000, 64)).astype(np.float32)
    labels = np.arange(len(gallery)) % 10
    queries = RNG.normal(size=(20, 64)).astype(np.float32)
    tracemalloc.start()
    score_embeddings(queries, labels[:20], gallery, labels, (8, 64))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < gallery.nbytes / 3


@pytest.mark.soak
def test_a_large_gallery_takes_minutes_and_no_copy() -> None:
    """50,000 x 512 and 10,000 queries at 7 dims where soak is asked for; a tenth of it else."""
    scale = 1 if os.environ.get("KERAS_MRL_SOAK") else 10
    gallery = RNG.normal(size=(50_000 // scale, 512)).astype(np.float32)
    queries = RNG.normal(size=(10_000 // scale, 512)).astype(np.float32)
    labels = np.arange(len(gallery)) % 100
    tracemalloc.start()
    started = time.monotonic()
    scores = score_embeddings(
        queries, labels[: len(queries)], gallery, labels, (8, 16, 32, 64, 128, 256, 512)
    )
    minutes, peak = (time.monotonic() - started) / 60, tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    print(f"{minutes:.2f} minutes, {peak:.0f} MiB beside {gallery.nbytes / 2**20:.0f} MiB")
    assert minutes < 5
    assert peak < 200
    assert scores[512]["recall10"] == 1
