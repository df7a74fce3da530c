"""The client for asyncio: every method of `Client`, awaited."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from . import contract, corpus, flows, questions
from ._transport import AioTransport
from .calls import AsyncTransport, Signature, VersionStatus
from .cascade.policy import CascadePolicy
from .client import NOT_READY, BaseClient, Waiting
from .contract import Manifest
from .conversation import Progress, Round, Rounds, Talk
from .errors import KerasMrlError, SignatureNotFoundError
from .index import Index
from .inputs import Inputs
from .prompts import Prompt
from .quality import cheapest_dim
from .results import Classification, Neighbors

T = TypeVar("T")


class AsyncClient(BaseClient[AsyncTransport]):
    """Asks one model of a TensorFlow Serving server from an event loop, without a thread.

    Each method is the one of `Client` with the same name, arguments, answers and errors. Any number
    of tasks of one loop may share one client.

    Args:
        target: As for `Client`; or an `AsyncTransport`, such as
            `keras_mrl_serving.testing.InMemoryServer`.
        model: Name the server gives the model.
        label: Label of the version that answers; None asks the newest version.
        options: Timeouts, retries, sizes, certificates.

    Raises:
        KerasMrlError: Every method raises a class of this tree, never one of grpc.

    Examples:
        ```
        async with AsyncClient("localhost:8500", model="digits") as client:
            answer = await client.classify_adaptive(images)
        ```
    """

    _channel = AioTransport
    _send = "send_async"

    async def wait_until_ready(self, timeout_s: float = 60.0) -> None:
        """Return once the model answers: for a server that is starting, or is still loading it."""
        waiting = Waiting(timeout_s, self.options)
        while True:
            try:
                await self.describe()
            except NOT_READY as error:
                await asyncio.sleep(waiting.pause_s(error))
            except SignatureNotFoundError:
                return
            else:
                return

    async def describe(self) -> Manifest:
        """Return the model's manifest as it is now."""
        return await self._run(self._conversation.describe())

    async def status(self) -> tuple[VersionStatus, ...]:
        """Return the versions of the model that the server knows, the highest first."""
        return await self._run(self._conversation.run(flows.status()))

    async def signatures(self) -> Mapping[str, Signature]:
        """Return the signatures that `predict` can ask, by name."""
        return await self._run(self._conversation.run(flows.signatures()))

    async def cheapest_dim(self, quality: float = 0.98, measure: str | None = None) -> int:
        """Return the smallest dim that keeps this share of the full dim's quality."""
        return cheapest_dim(await self.describe(), quality, measure)

    async def embed(
        self,
        inputs: Inputs,
        dim: int,
        *,
        other_tower: bool = False,
        exit: str | None = None,
        prompt: str | None = None,
        progress: Progress | None = None,
    ) -> npt.NDArray[np.float32]:
        """Return embeddings `(batch, dim)`."""
        question = questions.embed(inputs, dim, other_tower, exit, prompt)
        return await self._run(self._conversation.ask(question, progress))

    async def classify(
        self,
        inputs: Inputs,
        dim: int,
        *,
        exit: str | None = None,
        progress: Progress | None = None,
    ) -> Classification:
        """Return the best classes of each row, as the head of one dim sees them."""
        question = questions.classify(inputs, dim, exit)
        return await self._run(self._conversation.ask(question, progress))

    async def regress(
        self, inputs: Inputs, dim: int, *, progress: Progress | None = None
    ) -> npt.NDArray[np.float32]:
        """Return the values `(batch, num_values)` of a regressor at one dim."""
        return await self._run(self._conversation.ask(questions.regress(inputs, dim), progress))

    async def classify_adaptive(
        self,
        inputs: Inputs,
        policy: CascadePolicy | None = None,
        *,
        audit_rate: float = 0.0,
        audit_seed: int | np.random.Generator | None = None,
        progress: Progress | None = None,
    ) -> Classification:
        """Return the best classes of each row; wider dims see only the rows still undecided."""
        question = questions.classify_adaptive(inputs, policy, audit_rate, audit_seed)
        return await self._run(self._conversation.ask(question, progress))

    async def search(
        self, embeddings: npt.ArrayLike, dim: int | None = None, *, encoder: str | None = None
    ) -> Neighbors:
        """Return the neighbours of embeddings, from a model that is an index."""
        return await self._run(self._conversation.ask(questions.search(embeddings, dim, encoder)))

    async def retrieve(
        self,
        inputs: Inputs,
        index: Index | AsyncClient | None = None,
        *,
        k: int | None = None,
        among: npt.ArrayLike | None = None,
        filter: object = None,
        prompt: Prompt = ...,
    ) -> Neighbors:
        """Return the nearest gallery rows of inputs; a local index searches in a thread."""
        ask = self._conversation.ask
        flows.check_index(index, AsyncClient)
        if index is None or isinstance(index, AsyncClient):
            flows.check_served_search(k, among, filter)
        if index is None:
            return await self._run(ask(questions.retrieve(inputs, prompt)))
        gallery = await index.describe() if isinstance(index, AsyncClient) else index
        question = questions.embed_with_fingerprint(inputs, gallery.width, prompt=prompt)
        embedded = await self._run(ask(question))
        flows.check_gallery(gallery, embedded.fingerprint, embedded.prompts)
        if isinstance(index, AsyncClient):
            return await index.search(embedded.embeddings, encoder=embedded.fingerprint)
        return await asyncio.to_thread(index.search, embedded.embeddings, k, among, filter)

    async def predict(
        self,
        inputs: Inputs,
        signature: str = contract.SERVING_DEFAULT,
        *,
        outputs: Sequence[str] = (),
    ) -> dict[str, npt.NDArray[np.generic]]:
        """Return the outputs of any signature of any model: one call, never split."""
        question = questions.predict(inputs, signature, tuple(outputs))
        return await self._run(self._conversation.ask(question))

    async def embed_dataset(
        self,
        data: corpus.Corpus,
        dim: int,
        path: str | os.PathLike[str],
        *,
        other_tower: bool = False,
        exit: str | None = None,
        prompt: str | None = None,
        progress: corpus.Progress | None = None,
        manifest: Manifest | None = None,
    ) -> npt.NDArray[np.float32]:
        """Embed a corpus of any size into an `.npy` file; call again to resume after a crash."""
        embed = self._conversation.embed_dataset
        return await self._run(
            embed(data, dim, path, progress, manifest, other_tower, exit, prompt)
        )

    async def close(self) -> None:
        """Close the connection."""
        await self._transport.close_async()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _run(self, rounds: Rounds[T]) -> T:
        with closing(rounds):  # an interrupt closes the file of `embed_dataset` at once
            try:
                while True:
                    await self._run_round(next(rounds))
            except StopIteration as done:
                answer: T = done.value
                return answer

    async def _run_round(self, round: Round) -> None:
        if len(round.talks) == 1:
            ((number, talk),) = round.talks.items()
            round.receive(number, await self._outcome(talk))
            return
        numbered = iter(round.talks.items())

        async def work() -> None:
            for number, talk in numbered:  # shared: each talk goes to one worker
                if round.errors:
                    return
                round.receive(number, await self._outcome(talk))

        count = min(self.options.max_in_flight, len(round.talks))
        workers = [asyncio.create_task(work()) for _ in range(count)]
        try:
            await asyncio.gather(*workers)  # raises what the caller's progress function raised
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def _outcome(self, talk: Talk[T]) -> T | KerasMrlError:
        """Send what a talk yields until it ends; return its result, or the error that ended it."""
        try:
            envelope = next(talk)
            while True:
                try:
                    reply = await self._transport.send_async(envelope)
                except KerasMrlError as error:
                    envelope = talk.throw(error)
                else:
                    envelope = talk.send(reply)
        except StopIteration as done:
            result: T = done.value
            return result
        except KerasMrlError as error:
            return error
