"""The client: asks TensorFlow Serving for the dim it chooses, adaptively, or for neighbours."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from types import TracebackType
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from . import _transport, contract, corpus, flows, questions
from ._transport import GrpcTransport
from .calls import Signature, Transport, VersionStatus
from .cascade.policy import CascadePolicy
from .contract import DEFAULT_MODEL_NAME, Manifest, cheapest_dim
from .conversation import Conversation, Progress, Round, Rounds, Talk
from .corpus import EmbeddingFile
from .errors import KerasMrlError
from .index import Index
from .inputs import Inputs
from .options import Options
from .results import Classification, Neighbors

T = TypeVar("T")


class Client:
    """Asks one model of a TensorFlow Serving server, or of `keras-mrl serve`.

    It needs neither TensorFlow nor Keras. What the model serves is read from the model, once and
    when its version changes. Rows are split into calls as `options` says. Threads may share it.

    Args:
        target: Address of the server's gRPC port, "host:port"; a list of them, whose servers
            take turns; "dns:///name:port", looked up again when servers come and go; or a
            `Transport`, such as `keras_mrl_serving.testing.InMemoryServer`.
        model: Name the server gives the model.
        label: Label that the server's config gives a version; None asks the newest version.
        options: Timeouts, retries, sizes, certificates.

    Raises:
        KerasMrlError: Every method raises a class of this tree, never one of grpc.

    Examples:
        ```
        with Client("localhost:8500", model="digits") as client:
            client.describe().dims                      # (2, 4, 8, 16, 32, 64)
            client.embed(images, dim=16)                # float32 (batch, 16), unit length
            client.classify_adaptive(images).class_ids  # small dims first
        ```
    """

    def __init__(
        self,
        target: str | Sequence[str] | Transport,
        model: str = DEFAULT_MODEL_NAME,
        *,
        label: str | None = None,
        options: Options | None = None,
    ) -> None:
        self.model = model
        self.label = label
        self.options = options or Options()
        self._transport: Transport = (
            GrpcTransport(target, self.options)
            if isinstance(target, str | Sequence)
            else _transport.checked_transport(target, "send")
        )
        replicas = _transport.replicas(target)
        self._conversation = Conversation(self.target, model, self.options, replicas, label=label)

    @property
    def target(self) -> str:
        """Where the server is."""
        return self._transport.target

    def describe(self) -> Manifest:
        """Return what the model says of itself now: its dims, inputs, policy and quality."""
        return self._run(self._conversation.describe())

    def status(self) -> tuple[VersionStatus, ...]:
        """Return the versions of the model that the server knows, the highest first."""
        return self._run(self._conversation.run(flows.status()))

    def signatures(self) -> Mapping[str, Signature]:
        """Return what the model can be asked by `predict`, ours or not."""
        return self._run(self._conversation.run(flows.signatures()))

    def cheapest_dim(self, quality: float = 0.98, measure: str | None = None) -> int:
        """Return the smallest dim that keeps this share of the full dim's quality.

        Args:
            quality: A share, 1.0 for no loss.
            measure: Which of the manifest's measures; None means the only one, or `top1`.
        """
        return cheapest_dim(self.describe(), quality, measure)

    def embed(
        self, inputs: Inputs, dim: int, *, progress: Progress | None = None
    ) -> npt.NDArray[np.float32]:
        """Return embeddings `(batch, dim)`.

        Args:
            inputs: One array, batch first, or a dict of them by input name.
            dim: One of `describe().dims`.
            progress: Called with the rows answered so far and all rows.
        """
        return self._run(self._conversation.ask(questions.embed(inputs, dim), progress))

    def classify(
        self, inputs: Inputs, dim: int, *, progress: Progress | None = None
    ) -> Classification:
        """Return the best classes of each row, as the head of one dim sees them.

        Args:
            inputs: One array, batch first, or a dict of them by input name.
            dim: One of `describe().dims`.
            progress: Called with the rows answered so far and all rows.
        """
        return self._run(self._conversation.ask(questions.classify(inputs, dim), progress))

    def classify_adaptive(
        self,
        inputs: Inputs,
        policy: CascadePolicy | None = None,
        *,
        progress: Progress | None = None,
    ) -> Classification:
        """Return the best classes of each row, wider dims only for rows still unsure.

        Args:
            inputs: One array, batch first, or a dict of them by input name.
            policy: None asks the model's own policy, in one call. The caller's asks for features
                once, then for each wider head with the rows still unsure.
            progress: Called with the rows answered so far and all rows.
        """
        question = questions.classify_adaptive(inputs, policy)
        return self._run(self._conversation.ask(question, progress))

    def search(
        self, embeddings: npt.ArrayLike, dim: int | None = None, *, encoder: str | None = None
    ) -> Neighbors:
        """Return the neighbours of embeddings, from a model that is an index.

        Args:
            embeddings: `(batch, width)`, or `(batch, dim)` where a dim is given.
            dim: None runs the funnel of the index; a dim searches exactly at that dim.
            encoder: Fingerprint of their model, which an index of another refuses; None: unchecked.
        """
        return self._run(self._conversation.ask(questions.search(embeddings, dim, encoder)))

    def retrieve(
        self,
        inputs: Inputs,
        index: Index | Client | None = None,
        *,
        k: int | None = None,
        among: npt.ArrayLike | None = None,
    ) -> Neighbors:
        """Return the nearest gallery rows of inputs.

        Args:
            inputs: One array, batch first, or a dict of them by input name.
            index: None asks the model's own gallery, in one call. An index in this process, or a
                client of a model that is an index, is searched by embeddings of its width; it
                refuses those of another model than it was built with.
            k: Neighbours wanted, of an index in this process; None for all its funnel returns.
            among: The only ids that may be returned, of an index in this process.
        """
        ask = self._conversation.ask
        flows.check_search(index is None or isinstance(index, Client), k, among)
        if index is None:
            return self._run(ask(questions.retrieve(inputs)))
        if isinstance(index, Client):
            found = self._run(ask(questions.embed_knowingly(inputs, index.describe().width)))
            return index.search(found.embeddings, encoder=found.fingerprint)
        found = self._run(ask(questions.embed_knowingly(inputs, index.width)))
        flows.check_encoder(index.encoder_fingerprint, found.fingerprint)
        return index.search(found.embeddings, k, among)

    def predict(
        self,
        inputs: Inputs,
        signature: str = contract.SERVING_DEFAULT,
        *,
        outputs: Sequence[str] = (),
    ) -> dict[str, npt.NDArray[np.generic]]:
        """Return what any signature answers, of any model: one call, never split.

        Args:
            inputs: One array, or a dict of them by input name.
            signature: One of `signatures()`.
            outputs: Which outputs are wanted; none means all.
        """
        question = questions.predict(inputs, signature, tuple(outputs))
        return self._run(self._conversation.ask(question))

    def embed_dataset(
        self,
        data: corpus.Corpus,
        dim: int,
        path: str | os.PathLike[str],
        *,
        progress: corpus.Progress | None = None,
    ) -> npt.NDArray[np.float32]:
        """Embed a corpus of any size into an `.npy` file; call again to go on after a crash.

        Args:
            data: An array or a dict of arrays, memory-mapped ones too, or an iterable of such
                batches; the same rows in the same order when called again.
            dim: One of `describe().dims`.
            path: The file; beside it `PATH.partial` grows until it is whole.
            progress: Called with the rows embedded so far and all rows, None where nobody knows.

        Returns:
            The embeddings `(rows, dim)`, memory-mapped, read-only.
        """
        manifest = self.describe()
        dim = manifest.check_dim(dim)
        total = corpus.count_rows(data)
        known = corpus.digest(data)
        with EmbeddingFile(path, dim, manifest.fingerprint, known) as file:
            size = corpus.window_rows(self.options)
            for rows in corpus.windows(data, manifest.inputs, size, file.rows):
                question = questions.embed_knowingly(rows, dim)
                file.append(self._run(self._conversation.ask(question)))
                if progress:
                    progress(file.rows, total)
            return file.finish()

    def close(self) -> None:
        """Close the connection."""
        self._transport.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Client({self.target!r}, model={self.model!r})"

    def _run(self, rounds: Rounds[T]) -> T:
        try:
            while True:
                self._run_round(next(rounds))
        except StopIteration as done:
            answer: T = done.value
            return answer

    def _run_round(self, round: Round) -> None:
        if len(round.talks) == 1:
            ((number, talk),) = round.talks.items()
            round.receive(number, self._outcome(round, talk))
            return
        pool = ThreadPoolExecutor(min(self.options.max_in_flight, len(round.talks)))
        try:
            running = {
                pool.submit(self._outcome_unless_failed, round, talk): number
                for number, talk in round.talks.items()
            }
            for future in as_completed(running):
                outcome = future.result()
                if outcome is not None:
                    round.receive(running[future], outcome)
        finally:  # an interrupt, or the caller's progress function, waits for no call under way
            round.stop()
            pool.shutdown(wait=False, cancel_futures=True)

    def _outcome_unless_failed(self, round: Round, talk: Talk[T]) -> T | KerasMrlError | None:
        return None if round.failed else self._outcome(round, talk)

    def _outcome(self, round: Round, talk: Talk[T]) -> T | KerasMrlError | None:
        """Send what a talk yields until it ends; return its result, or the error that ended it."""
        try:
            envelope = next(talk)
            while not round.stopped:
                try:
                    reply = self._transport.send(envelope)
                except KerasMrlError as error:
                    envelope = talk.throw(error)
                else:
                    envelope = talk.send(reply)
        except StopIteration as done:
            result: T = done.value
            return result
        except KerasMrlError as error:
            return error
        return None
