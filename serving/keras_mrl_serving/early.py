"""Retrieval by an early exit: queries whose neighbours are settled need no more of the model.

It takes an encoder whose exits were aligned (`keras_mrl.align_exits`): all of them embed into the
space of one gallery. A query is embedded at an early exit and searched. Where the nearest row leads
by enough, that is the answer. All other queries are embedded by the whole model and searched again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from . import flows
from .aio import AsyncClient
from .client import Client
from .contract import LAST_EXIT, Manifest
from .index import Index
from .inputs import Inputs, check_inputs
from .prompts import QUERY
from .results import Neighbors

Groups = Mapping[int, Any] | Sequence[Any] | npt.NDArray[Any]


class EarlyNeighbors(NamedTuple):
    """Neighbours, and the exit that each query was embedded at.

    Attributes:
        neighbors: The nearest rows of each query.
        exit: Names of exits, `(batch,)`.

    Examples:
        >>> neighbors = Neighbors(np.array([[7, 2]]), np.float32([[0.9, 0.4]]))
        >>> EarlyNeighbors(neighbors, np.array(["early"], object)).exit.tolist()
        ['early']
    """

    neighbors: Neighbors
    exit: npt.NDArray[np.object_]


@dataclass(frozen=True, eq=False)
class EarlyRetrieval:
    """When the neighbours that an early exit finds are settled.

    The lead of a query is the score of its nearest row less that of the nearest row of another
    group; where all its neighbours are of one group, less that of the last of them.

    Args:
        exit: Name of the exit that all queries are embedded at.
        threshold: Neighbours are settled where the lead is at least as large.
        groups: The group of a gallery row by its id, such as its label; rows of a group are right
            for the same queries. None: each row is a group of its own.

    Raises:
        ValueError: If the threshold is NaN.

    Examples:
        >>> rule = EarlyRetrieval("early", 0.1, groups=["cat", "cat", "dog"])
        >>> found = Neighbors(np.array([[0, 1, 2], [2, 0, 1]]), np.float32([[9, 8, 7], [9, 9, 8]]))
        >>> rule.lead(found).tolist(), rule.settled(found).tolist()
        ([2.0, 0.0], [True, False])
    """

    exit: str
    threshold: float
    groups: Groups | None = None

    def __post_init__(self) -> None:
        """Check the threshold."""
        if np.isnan(self.threshold):
            raise ValueError(
                "A threshold is a number. Received: threshold=nan. Learn one with "
                "EarlyRetrieval.learn, or give inf to settle no query early."
            )

    @classmethod
    def learn(
        cls,
        exit: str,
        early: Neighbors,
        last: Neighbors,
        labels: npt.ArrayLike | None = None,
        groups: Groups | None = None,
        *,
        loss: float = 0.005,
    ) -> EarlyRetrieval:
        """Return the lowest threshold by which a holdout of queries loses at most `loss`.

        Args:
            exit: Name of the early exit.
            early: What the holdout finds when it is embedded at that exit.
            last: What it finds when it is embedded at the last exit, in the same order.
            labels: The group that is right for each query; it needs `groups`. None: the row that is
                nearest from the last exit is right, and every other is wrong.
            groups: As above.
            loss: The share of queries whose nearest row may be right from the last exit and wrong
                from the early one, less those that it is the other way round for.

        Raises:
            ValueError: If there are no queries, not as many of each, labels without groups, or
                fewer than two neighbours.
        """
        number = len(early)
        if not number or len(last) != number or (labels is not None and len(labels) != number):  # type: ignore[arg-type]
            raise ValueError(
                "A threshold is learned on queries that both exits were asked about. "
                f"Received: {number} queries at the early exit and {len(last)} at the last one"
                f"{'' if labels is None else f', with {len(labels)} labels'}. "  # type: ignore[arg-type]
                "Give the neighbours of the same holdout, in one order."
            )
        if labels is not None and groups is None:
            raise ValueError(
                "Labels of queries are compared with the groups of gallery rows. "
                "Received: labels without groups. Give groups, by the ids of the gallery."
            )
        rule = cls(exit, float("inf"), groups)
        lead = rule.lead(early)
        firsts = [found.ids[:, 0] for found in (early, last)]
        right = firsts[1] if labels is None else np.asarray(labels)
        if labels is not None:
            firsts = [rule._groups_of(ids) for ids in firsts]
        is_right = [np.asarray(own == right, np.int64) for own in firsts]
        # Of the surest queries, one more at a time: what is lost if these stop early.
        order = np.argsort(-lead, kind="stable")
        lost = np.cumsum((is_right[1] - is_right[0])[order])
        limits = lead[order]
        is_end = np.append(limits[1:] < limits[:-1], True)  # queries of one lead stop together
        allowed = np.flatnonzero(is_end & (lost <= loss * number + 1e-9))
        return cls(exit, float(limits[allowed[-1]]) if len(allowed) else float("inf"), groups)

    def lead(self, neighbors: Neighbors) -> npt.NDArray[np.float32]:
        """Return by how much the nearest row of each query leads, `(batch,)`.

        Raises:
            ValueError: If there are fewer than two neighbours.
        """
        ids, scores = neighbors.ids, neighbors.scores
        if ids.shape[1] < 2:
            raise ValueError(
                "The nearest row leads before another. "
                f"Received: {ids.shape[1]} neighbours of each query. Search with k=2 or more."
            )
        groups = self._groups_of(ids)
        is_other = groups != groups[:, :1]
        place = np.where(is_other.any(axis=1), is_other.argmax(axis=1), ids.shape[1] - 1)
        rivals = np.take_along_axis(scores, place[:, None], axis=1)[:, 0]
        return np.asarray(scores[:, 0] - rivals, np.float32)

    def settled(self, neighbors: Neighbors) -> npt.NDArray[np.bool]:
        """Return whether the neighbours of each query are settled, `(batch,)`."""
        return np.asarray(self.lead(neighbors) >= np.float32(self.threshold))

    def retrieve(self, client: Client, inputs: Inputs, index: Index | Client) -> EarlyNeighbors:
        """Return the nearest rows of inputs, and where each was embedded.

        Args:
            client: Asks the encoder, a version with signatures `embed` of the exit and of the last.
            inputs: One array, batch first, or a dict of them by input name. Before texts stands the
                model's prompt "query", where it has one.
            index: The gallery, embedded at the last exit: in this process, or a client of a model
                that is an index.

        Raises:
            EncoderMismatchError: If another encoder embedded the gallery.
        """
        flows.check_index(index, Client)
        gallery = index.describe() if isinstance(index, Client) else index
        steps = self._steps(client.describe(), inputs)
        found = None
        while True:
            try:
                exit, rows = steps.send(found)  # type: ignore[arg-type]
            except StopIteration as done:
                answer: EarlyNeighbors = done.value
                return answer
            prompt = _prompt_of(client.describe())
            embeddings = client.embed(rows, gallery.width, exit=exit, prompt=prompt)
            manifest = client.describe()  # of the version that answered
            flows.check_gallery(gallery, manifest.fingerprint, manifest.gallery_prompts)
            if isinstance(index, Client):
                found = index.search(embeddings, encoder=manifest.fingerprint)
            else:
                found = index.search(embeddings)

    async def retrieve_async(
        self, client: AsyncClient, inputs: Inputs, index: Index | AsyncClient
    ) -> EarlyNeighbors:
        """Return the same as `retrieve`, by async clients; a local index searches in a thread."""
        flows.check_index(index, AsyncClient)
        gallery = await index.describe() if isinstance(index, AsyncClient) else index
        steps = self._steps(await client.describe(), inputs)
        found = None
        while True:
            try:
                exit, rows = steps.send(found)  # type: ignore[arg-type]
            except StopIteration as done:
                answer: EarlyNeighbors = done.value
                return answer
            prompt = _prompt_of(await client.describe())
            embeddings = await client.embed(rows, gallery.width, exit=exit, prompt=prompt)
            manifest = await client.describe()  # of the version that answered
            flows.check_gallery(gallery, manifest.fingerprint, manifest.gallery_prompts)
            if isinstance(index, AsyncClient):
                found = await index.search(embeddings, encoder=manifest.fingerprint)
            else:
                found = await asyncio.to_thread(index.search, embeddings)

    def _steps(
        self, manifest: Manifest, inputs: Inputs
    ) -> Generator[tuple[str, Inputs], Neighbors, EarlyNeighbors]:
        """Yield an exit and the rows to embed at it; take their neighbours."""
        arrays = check_inputs(manifest.inputs, inputs)
        found = yield self.exit, arrays
        exits = np.full(len(found), self.exit, object)
        open_rows = np.flatnonzero(~self.settled(found))
        if len(open_rows):
            rows = {name: array[open_rows] for name, array in arrays.items()}
            again = yield LAST_EXIT, rows
            exits[open_rows] = LAST_EXIT
            found = Neighbors(found.ids.copy(), found.scores.copy())
            found.ids[open_rows], found.scores[open_rows] = again.ids, again.scores
        return EarlyNeighbors(found, exits)

    def _groups_of(self, ids: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return the groups of gallery rows, in the shape of their ids."""
        if self.groups is None:
            return ids
        if isinstance(self.groups, np.ndarray):
            return np.asarray(self.groups[ids])
        own = np.empty(ids.size, object)
        own[:] = [self.groups[row] for row in ids.ravel().tolist()]
        return own.reshape(ids.shape)


def _prompt_of(manifest: Manifest) -> str | None:
    return QUERY if QUERY in manifest.prompts else None
