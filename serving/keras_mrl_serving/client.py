"""The client: asks a model of TensorFlow Serving for embeddings, classes or neighbours."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from copy import copy
from dataclasses import replace
from typing import Generic, Self, TypeVar

import numpy as np
import numpy.typing as npt

from . import _targets, contract, corpus, flows, questions
from ._transport import GrpcTransport
from .calls import AsyncTransport, Signature, Transport, VersionStatus
from .cascade.policy import CascadePolicy
from .contract import DEFAULT_MODEL_NAME, Manifest
from .conversation import Conversation, Progress, Round, Rounds, Talk
from .errors import (
    DeadlineError,
    KerasMrlError,
    ModelNotFoundError,
    ServerUnavailableError,
    SignatureNotFoundError,
)
from .index import Index
from .inputs import Inputs
from .options import Options
from .prompts import Prompt
from .quality import cheapest_dim
from .results import Classification, Neighbors

T = TypeVar("T")
TransportT = TypeVar("TransportT", Transport, AsyncTransport)


NOT_READY = (ServerUnavailableError, DeadlineError, ModelNotFoundError)  # that waiting may mend


class Waiting:
    """How long to pause before a server that is not ready is asked again.

    Args:
        timeout_s: How long to wait in all.
        options: The pauses are those between attempts.
        clock: Returns the time in seconds; only differences count.

    Examples:
        >>> waiting = Waiting(60.0, Options(), clock=lambda: 0.0)
        >>> [waiting.pause_s(ServerUnavailableError()) for _ in range(6)]
        [0.1, 0.2, 0.4, 0.8, 1.6, 2.0]
    """

    def __init__(
        self, timeout_s: float, options: Options, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._deadline_s = clock() + timeout_s
        self._next_s, self._most_s = options.first_backoff_s, options.max_backoff_s

    def pause_s(self, error: KerasMrlError) -> float:
        """Return the seconds; raise the error if it stays, or the time is over."""
        pause_s = min(self._next_s, self._most_s)
        if error.is_lasting or self._clock() + pause_s >= self._deadline_s:
            raise error
        self._next_s = 2 * pause_s
        return pause_s


class BaseClient(Generic[TransportT]):
    """A model at a target, and what is known of it: what `Client` and `AsyncClient` share.

    Each sets `_channel`, its transport for targets, and `_send`, the method every transport has.

    Examples:
        >>> issubclass(Client, BaseClient)
        True
    """

    _channel: Callable[[str | Sequence[str], Options], TransportT]
    _send: str

    def __init__(
        self,
        target: str | Sequence[str] | TransportT,
        model: str = DEFAULT_MODEL_NAME,
        *,
        label: str | None = None,
        options: Options | None = None,
    ) -> None:
        self.model = model
        self.label = label
        self.options = Options() if options is None else options
        if not isinstance(self.options, Options):
            raise TypeError(
                "The settings of a client are Options. "
                f"Received: {type(options).__name__}. Write for example Options(timeout_s=2.0)."
            )
        self._transport: TransportT = (
            self._channel(target, self.options)
            if isinstance(target, str | Sequence)
            else _targets.check_transport(target, self._send)
        )
        replicas = _targets.count_replicas(target)
        self._conversation = Conversation(
            self.target,
            model,
            self.options,
            replicas,
            label=label,
            connections=lambda: getattr(self._transport, "connections", 0),
        )

    @property
    def target(self) -> str:
        """Where the server is."""
        return self._transport.target

    def with_batch_size(self, rows: int | None) -> Self:
        """Return a client of the same connection and knowledge, with another `max_batch_size`.

        Args:
            rows: Rows of one call; None for no limit. Closing either client closes both.
        """
        other = copy(self)
        other.options = replace(self.options, max_batch_size=rows)
        other._conversation = self._conversation.with_options(other.options)
        return other

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.target!r}, model={self.model!r})"


class Client(BaseClient[Transport]):
    """Asks one model of a TensorFlow Serving server, or of `keras-mrl serve`.

    The client needs neither TensorFlow nor Keras. It reads the model's manifest once, and again
    when the version changes. It splits rows into calls by `options`. Threads may share one client.

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

    _channel = GrpcTransport
    _send = "send"

    def wait_until_ready(self, timeout_s: float = 60.0) -> None:
        """Return once the model answers: for a server that is starting, or is still loading it.

        Errors that waiting may mend are waited for, with the pauses that lie between attempts; any
        other, such as a certificate of another host, is raised at once.

        Args:
            timeout_s: How long to wait. A call that is under way by then is ended first.

        Raises:
            ServerUnavailableError: If no server answers by then.
            ModelNotFoundError: If the server does not have the model by then.
            DeadlineError: If its last answer took too long.
        """
        waiting = Waiting(timeout_s, self.options)
        while True:
            try:
                self.describe()
            except NOT_READY as error:
                time.sleep(waiting.pause_s(error))
            except SignatureNotFoundError:  # of another exporter: it answers
                return
            else:
                return

    def describe(self) -> Manifest:
        """Return the model's manifest as it is now: its dims, inputs, policy and quality."""
        return self._run(self._conversation.describe())

    def status(self) -> tuple[VersionStatus, ...]:
        """Return the versions of the model that the server knows, the highest first."""
        return self._run(self._conversation.run(flows.status()))

    def signatures(self) -> Mapping[str, Signature]:
        """Return the signatures that `predict` can ask, by name."""
        return self._run(self._conversation.run(flows.signatures()))

    def cheapest_dim(self, quality: float = 0.98, measure: str | None = None) -> int:
        """Return the smallest dim that keeps this share of the full dim's quality.

        Args:
            quality: The share; 1.0 for no loss.
            measure: One of the manifest's measures of which more is better; None means the only
                one, or `top1`, `ap_macro` or `r2`, whichever there is.
        """
        return cheapest_dim(self.describe(), quality, measure)

    def embed(
        self,
        inputs: Inputs,
        dim: int,
        *,
        other_tower: bool = False,
        exit: str | None = None,
        prompt: str | None = None,
        progress: Progress | None = None,
    ) -> npt.NDArray[np.float32]:
        """Return embeddings `(batch, dim)`, as the model computed them: NaN, too.

        Args:
            inputs: One array, batch first, or a dict of them by input name. Of a model of texts a
                str, or a list or an array of str or of UTF-8 bytes.
            dim: One of `describe().dims`.
            other_tower: Whether the rows are of the side of galleries, in a model of two towers;
                `describe().other_tower` has their inputs.
            exit: One of `describe().exit_names`, if the version has a signature of this exit and
                dim; None for the last.
            prompt: The name of one of `describe().prompts`, whose text is put before each text:
                "query" before what is searched for. None leaves the texts as they are.
            progress: Called with the rows answered so far and all rows.
        """
        question = questions.embed(inputs, dim, other_tower, exit, prompt)
        return self._run(self._conversation.ask(question, progress))

    def classify(
        self,
        inputs: Inputs,
        dim: int,
        *,
        exit: str | None = None,
        progress: Progress | None = None,
    ) -> Classification:
        """Return the best classes of each row, as the head of one dim sees them.

        Of a model whose rows may have several classes (`describe().activation` is "sigmoid") each
        probability stands by itself, and `answer.above(0.5)` gives the labels of each row.

        Args:
            inputs: One array, batch first, or a dict of them by input name.
            dim: One of `describe().dims`.
            exit: As for `embed`.
            progress: Called with the rows answered so far and all rows.
        """
        question = questions.classify(inputs, dim, exit)
        return self._run(self._conversation.ask(question, progress))

    def regress(
        self, inputs: Inputs, dim: int, *, progress: Progress | None = None
    ) -> npt.NDArray[np.float32]:
        """Return the values `(batch, num_values)` of a regressor at one dim.

        Args:
            inputs: One array, batch first, or a dict of them by input name.
            dim: One of `describe().dims`.
            progress: Called with the rows answered so far and all rows.
        """
        return self._run(self._conversation.ask(questions.regress(inputs, dim), progress))

    def classify_adaptive(
        self,
        inputs: Inputs,
        policy: CascadePolicy | None = None,
        *,
        audit_rate: float = 0.0,
        audit_seed: int | np.random.Generator | None = None,
        progress: Progress | None = None,
    ) -> Classification:
        """Return the best classes of each row; wider dims see only the rows still undecided.

        Args:
            inputs: One array, batch first, or a dict of them by input name.
            policy: None asks the model's own policy, in one call. The caller's policy asks for
                features once, then for wider and wider heads of the rows still undecided.
            audit_rate: Share of the rows, drawn at random, that are run to the last stage as well:
                `estimate_harm(Audits.of(answer))` takes both answers about them.
            audit_seed: Draws them: an integer, or a generator that many calls draw from. None
                draws other rows each time.
            progress: Called with the rows answered so far and all rows.
        """
        question = questions.classify_adaptive(inputs, policy, audit_rate, audit_seed)
        return self._run(self._conversation.ask(question, progress))

    def search(
        self, embeddings: npt.ArrayLike, dim: int | None = None, *, encoder: str | None = None
    ) -> Neighbors:
        """Return the neighbours of embeddings, from a model that is an index.

        Args:
            embeddings: `(batch, width)`, or `(batch, dim)` if a dim is given.
            dim: None runs the funnel of the index; a dim searches exactly at that dim.
            encoder: Fingerprint of the model that made the embeddings. An index built with another
                encoder refuses them; None skips this check.
        """
        return self._run(self._conversation.ask(questions.search(embeddings, dim, encoder)))

    def retrieve(
        self,
        inputs: Inputs,
        index: Index | Client | None = None,
        *,
        k: int | None = None,
        among: npt.ArrayLike | None = None,
        filter: object = None,
        prompt: Prompt = ...,
    ) -> Neighbors:
        """Return the nearest gallery rows of inputs.

        Args:
            inputs: One array, batch first, or a dict of them by input name.
            index: None asks the model's own gallery, in one call. An index in this process, or a
                client of a model that is an index, is searched by embeddings of its width; an index
                built with another encoder refuses them.
            k: How many neighbours an index in this process returns; None for all of its funnel.
            among: The only ids that an index in this process may return.
            filter: The same, prepared once by the index's `prepare_filter`.
            prompt: As for `embed`. Left out, it is the prompt called "query" where the model has
                one; None leaves the texts as they are. An index whose gallery was embedded with a
                prompt that the model lacks, or without the model's prompt for galleries
                ("passage" or "document"), is refused.
        """
        ask = self._conversation.ask
        flows.check_index(index, Client)
        if index is None or isinstance(index, Client):
            flows.check_served_search(k, among, filter)
        if index is None:
            return self._run(ask(questions.retrieve(inputs, prompt)))
        gallery = index.describe() if isinstance(index, Client) else index
        question = questions.embed_with_fingerprint(inputs, gallery.width, prompt=prompt)
        embedded = self._run(ask(question))
        flows.check_gallery(gallery, embedded.fingerprint, embedded.prompts)
        if isinstance(index, Client):
            return index.search(embedded.embeddings, encoder=embedded.fingerprint)
        return index.search(embedded.embeddings, k, among, filter)

    def predict(
        self,
        inputs: Inputs,
        signature: str = contract.SERVING_DEFAULT,
        *,
        outputs: Sequence[str] = (),
    ) -> dict[str, npt.NDArray[np.generic]]:
        """Return the outputs of any signature of any model: one call, never split.

        Args:
            inputs: One array, or a dict of them by input name.
            signature: One of `signatures()`.
            outputs: The outputs to return; none means all.
        """
        question = questions.predict(inputs, signature, tuple(outputs))
        return self._run(self._conversation.ask(question))

    def embed_dataset(
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
        """Embed a corpus of any size into an `.npy` file; call again to resume after a crash.

        Args:
            data: An array or a dict of arrays, memory-mapped ones too, a list of texts, or an
                iterable of such batches. To resume, give the same rows in the same order: those
                already embedded are read once more and compared with a digest.
            dim: One of `describe().dims`.
            path: The file. Until all rows are embedded, they are in `PATH.partial`.
            other_tower: As for `embed`: galleries of a model of two towers go through the other.
            exit: As for `embed`. Queries of another exit find their neighbours among these rows
                only if `keras_mrl.align_exits` put the exits into one space.
            prompt: As for `embed`: "passage" or "document" before the texts of a gallery, whichever
                the model has. Give its text, `describe().prompts[prompt]`, to the index.
            progress: Called with the rows embedded so far and all rows; None for an unknown number.
            manifest: As `describe` has just returned it; None asks for it.

        Returns:
            The embeddings `(rows, dim)`, memory-mapped, read-only.

        Raises:
            ValueError: If rows that are already embedded have changed.
            FileExistsError: If the file is there: it is never overwritten.
        """
        embed = self._conversation.embed_dataset
        return self._run(embed(data, dim, path, progress, manifest, other_tower, exit, prompt))

    def close(self) -> None:
        """Close the connection."""
        self._transport.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, rounds: Rounds[T]) -> T:
        with closing(rounds):  # an interrupt closes the file of `embed_dataset` at once
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
        finally:  # after an interrupt, do not wait for the calls under way
            round.stopped = True
            pool.shutdown(wait=False, cancel_futures=True)

    def _outcome_unless_failed(self, round: Round, talk: Talk[T]) -> T | KerasMrlError | None:
        return None if round.errors else self._outcome(round, talk)

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
