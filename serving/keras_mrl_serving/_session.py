"""A SavedModel loaded and run by the very code of TensorFlow Serving: loader and Session::Run."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike, fspath
from types import TracebackType
from typing import Any, Self

import numpy as np
import tensorflow as tf

try:
    from tensorflow.python.client import pywrap_tf_session as _c_api

    # make_callable and Session.run word a bad feed differently; this alone is bare Session::Run.
    RUNS_AS_TF_SERVING = hasattr(tf.compat.v1.Session, "_call_tf_sessionrun")
except ImportError:
    RUNS_AS_TF_SERVING = False
try:
    from tensorflow.python.saved_model.loader_impl import SavedModelLoader

    LOADS_AS_TF_SERVING = True
except ImportError:
    LOADS_AS_TF_SERVING = False

_TAGS = ["serve"]


class SavedModelSession:
    """One loaded SavedModel, in a graph and a session of its own.

    Nothing is validated: names are looked up, and what the runtime says about the values comes as
    it is. Any number of threads may call `run` at once; the GIL is released while one computes.

    Args:
        path: folder of the SavedModel, the one with `saved_model.pb`.

    Raises:
        OSError: no readable SavedModel at `path`.
        RuntimeError: it has no graph tagged `serve`.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self._session = tf.compat.v1.Session(graph=tf.Graph())
        try:
            load = _load_as_tf_serving if LOADS_AS_TF_SERVING else _load_publicly
            with self._session.graph.as_default():
                meta_graph = load(self._session, fspath(path))
            self.signatures: Mapping[str, Any] = dict(meta_graph.signature_def)
            # Plain dicts: asked for a missing key, a map of messages makes one instead of raising.
            self._feeds = {key: _names(s.inputs) for key, s in self.signatures.items()}
            self._fetches = {key: _names(s.outputs) for key, s in self.signatures.items()}
            if RUNS_AS_TF_SERVING:
                # Session.run does this before each call; the graph is final, so once is enough.
                self._session._extend_graph()
                self._tf_outputs = {
                    tensor: self._tf_output(tensor)
                    for aliases in (*self._feeds.values(), *self._fetches.values())
                    for tensor in aliases.values()
                }
        except BaseException:
            self._session.close()
            raise

    def run(
        self,
        signature_name: str,
        inputs: Mapping[str, np.ndarray],
        output_names: Sequence[str] = (),
        *,
        timeout_s: float | None = None,
    ) -> dict[str, np.ndarray]:
        """Runs one signature.

        Args:
            signature_name: a key of `signatures`.
            inputs: arrays by the signature's input names; strings are object arrays of bytes.
            output_names: the outputs to fetch; empty means all of them.
            timeout_s: how long the model may compute; None means without limit.

        Raises:
            KeyError: no such signature, input or output.
            tf.errors.OpError: what the TensorFlow runtime raised, with its text.
        """
        feeds, fetches = self.tensors_of(signature_name, inputs, output_names)
        values = self.run_tensors(feeds, list(fetches.values()), timeout_s=timeout_s)
        return dict(zip(fetches, values, strict=True))

    def tensors_of(
        self, signature_name: str, inputs: Mapping[str, np.ndarray], output_names: Sequence[str]
    ) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """What a run of a signature feeds and fetches.

        Args:
            signature_name: a key of `signatures`.
            inputs: arrays by the signature's input names.
            output_names: the outputs to fetch; empty means all of them.

        Returns:
            the arrays by the name of their tensor, and the tensor of each output.

        Raises:
            KeyError: no such signature, input or output.
        """
        tensors, outputs = self._feeds[signature_name], self._fetches[signature_name]
        feeds = {tensors[name]: value for name, value in inputs.items()}
        return feeds, {name: outputs[name] for name in tuple(output_names) or tuple(outputs)}

    def run_tensors(
        self,
        feeds: Mapping[str, np.ndarray],
        fetches: Sequence[str],
        *,
        timeout_s: float | None = None,
    ) -> list[np.ndarray]:
        """Runs what lies between tensors of the graph, each one's name given by a signature.

        Args:
            feeds: arrays by the name of the tensor they take the place of.
            fetches: the tensors to compute.
            timeout_s: how long the model may compute; None means without limit.

        Raises:
            KeyError: no signature has a tensor of that name.
            tf.errors.OpError: what the TensorFlow runtime raised, with its text.
        """
        run = self._run_as_tf_serving if RUNS_AS_TF_SERVING else self._run_publicly
        return [as_array(value) for value in run(feeds, fetches, timeout_s)]

    def close(self) -> None:
        """Frees the session and its variables; call it once no run is under way."""
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _run_as_tf_serving(
        self, feeds: Mapping[str, np.ndarray], fetches: Sequence[str], timeout_s: float | None
    ) -> list[Any]:
        options = None
        if timeout_s is not None:
            options = _c_api.TF_NewBufferFromString(_run_options(timeout_s).SerializeToString())
        try:
            return self._session._call_tf_sessionrun(
                options,
                {self._tf_outputs[name]: value for name, value in feeds.items()},
                [self._tf_outputs[name] for name in fetches],
                [],
                None,
            )
        finally:
            if options is not None:
                _c_api.TF_DeleteBuffer(options)

    def _run_publicly(
        self, feeds: Mapping[str, np.ndarray], fetches: Sequence[str], timeout_s: float | None
    ) -> list[Any]:
        options = None if timeout_s is None else _run_options(timeout_s)
        return self._session.run(list(fetches), feed_dict=dict(feeds), options=options)

    def _tf_output(self, name: str) -> Any:
        """The C handle of `op:0`, or of `op`, which is how a signature names its init op."""
        op, _, index = name.partition(":")
        output = _c_api.TF_Output()
        output.oper = self._session.graph.get_operation_by_name(op)._c_op
        output.index = int(index or 0)
        return output


def _load_as_tf_serving(session: Any, path: str) -> Any:
    """As the C++ loader, which takes a SavedModel without variables for one that has none.

    The loader of Python refuses it; under TensorFlow Serving each request is told what is missing.
    """
    loader = SavedModelLoader(path)
    saver, _ = loader.load_graph(session.graph, _TAGS)
    if tf.io.gfile.exists(os.path.join(path, "variables", "variables.index")):
        loader.restore_variables(session, saver)
    loader.run_init_ops(session, _TAGS)
    return loader.get_meta_graph_def_from_tags(_TAGS)


def _load_publicly(session: Any, path: str) -> Any:
    with _without_deprecation_of_the_loader():
        return tf.compat.v1.saved_model.loader.load(session, _TAGS, path)


def as_array(value: Any) -> np.ndarray:
    """What TensorFlow returned, as an array: rank 0 comes as a NumPy scalar, or as bytes."""
    # NumPy's own dtype for bytes, S, would lose trailing zero bytes.
    return np.array(value, dtype=object) if isinstance(value, bytes) else np.asarray(value)


def _names(infos: Mapping[str, Any]) -> dict[str, str]:
    """The tensor behind each alias of a signature's inputs or outputs."""
    return {alias: info.name for alias, info in infos.items()}


def _run_options(timeout_s: float) -> Any:
    # 0 would mean without limit, so a deadline just passed is one millisecond. gRPC's "no deadline"
    # is a number of seconds whose milliseconds leave int64; TensorFlow Serving cuts at int32 too.
    return tf.compat.v1.RunOptions(timeout_in_ms=min(max(1, int(timeout_s * 1000)), 2**31 - 1))


@contextmanager
def _without_deprecation_of_the_loader() -> Iterator[None]:
    """The loader of TensorFlow Serving is what we want; the advice to use another is for others."""

    def keep(record: logging.LogRecord) -> bool:
        return "loader_impl" not in record.getMessage()

    logger = tf.get_logger()
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
