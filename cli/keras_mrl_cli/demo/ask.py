"""What the demo asks of the server, and the answers it keeps."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from keras_mrl_serving import CascadePolicy, Client, ExactIndex, FunnelSchedule

from .data import Part

K = 10
# The first stage looks at every row with 8 dims and keeps 4.5% of them for all 64.
FUNNEL_DIMS, SHORTLIST_SHARE = (8, 64), 0.045


def funnel_schedule(gallery_size: int) -> FunnelSchedule:
    """Return the funnel of the demo."""
    return FunnelSchedule(FUNNEL_DIMS, (max(K, int(SHORTLIST_SHARE * gallery_size)),), K)


def ask(client: Client, gallery: Part, test: Part) -> dict[str, npt.NDArray[Any]]:
    """Classify and retrieve over gRPC; return every answer as arrays for predictions.npz."""
    manifest = client.describe()
    dims = manifest.dims
    by_dim = [client.classify(test.images, dim).class_ids[:, 0] for dim in dims]
    adaptive = client.classify_adaptive(test.images)
    embeddings = client.embed(gallery.images, dims[-1])
    exhaustive = [
        client.retrieve(
            test.images, ExactIndex.build(embeddings, FunnelSchedule((dim,), (), K))
        ).ids
        for dim in dims
    ]
    schedule = funnel_schedule(len(embeddings))
    return {
        "dims": np.array(dims),
        "stage_dims": np.array(CascadePolicy.from_json(manifest.cascade or {}).dims),
        "test_labels": test.labels,
        "gallery_labels": gallery.labels,
        "class_ids_by_dim": np.stack(by_dim, axis=1),
        "adaptive_class_ids": adaptive.class_ids[:, 0],
        "adaptive_dims": adaptive.dim,
        "neighbors_by_dim": np.stack(exhaustive, axis=1),
        "funnel_neighbors": client.retrieve(
            test.images, ExactIndex.build(embeddings, schedule)
        ).ids,
        "funnel_dims": np.array(schedule.dims),
        "funnel_shortlist": np.array(schedule.shortlists[0]),
    }
