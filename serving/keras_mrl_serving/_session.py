"""A SavedModel loaded and run by the very code of TensorFlow Serving: loader and Session::Run.

Both are private API of TensorFlow. Where a release of it lacks them, the public loader and
`Session.run` do the same work with other texts for some errors.
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike, fspath
from typing import Any, Self

import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

from .text_operations import TEXT_OPERATIONS

try:
    from tensorflow.python.client import pywrap_tf_session as _c_api
    from tensorflow.python.saved_model.loader_impl import SavedModelLoader

    # The bare Session::Run; make_callable and Session.run word the error of a bad feed differently.
    RUNS_AS_TF_SERVING = hasattr(tf.compat.v1.Session, "_call_tf_sessionrun")
except ImportError:
    RUNS_AS_TF_SERVING = False

_TAGS = ["serve"]
# Operations whose kernels refuse every wrong shape themselves. Others, such as convolutions, may
# read past the end of the shape they get, and end the process.
_REFUSING_OPS = frozenset(
    """
    AddV2 AsString AssignVariableOp Cast Const DisableCopyOnRead Fill Identity Less MatMul Max
    MergeV2Checkpoints Mul NoOp Pack PartitionedCall Placeholder ReadVariableOp RestoreV2 SaveV2
    Select Shape ShardedFilename StatefulPartitionedCall StatelessWhile StaticRegexFullMatch
    StridedSlice StringJoin Sum Unpack VarHandleOp
    """.split()
)


class Signature:
    """A signature of a SavedModel: its message, and plain dicts in place of the message's maps.

    A server reads them at each request, and reading a message's map takes ten times as long.

    Args:
        proto: the `SignatureDef`.

    Attributes:
        inputs: a `TensorInfo` by name.
        outputs: a `TensorInfo` by name.
        defaults: a `TensorProto` by the name of its input.
    """

    def __init__(self, proto: Any) -> None:
        self.proto = proto
        self.inputs: dict[str, Any] = dict(proto.inputs)
        self.outputs: dict[str, Any] = dict(proto.outputs)
        self.defaults: dict[str, Any] = dict(proto.defaults)


class SavedModelSession:
    """One loaded SavedModel, in a graph and a session of its own.

    It validates names, and shapes where a kernel might end the process over a wrong one; errors
    about values are those of the runtime. Any number of threads may call `run` at once; the GIL is
    released while one computes.

    Args:
        path: folder of the SavedModel, the one with `saved_model.pb`.
        as_tf_serving: whether to use the private API.

    Raises:
        OSError: no readable SavedModel at `path`.
        RuntimeError: it has no graph tagged `serve`.
        ImportError: it makes tokens of texts by operations of tensorflow-text, which is missing.
    """

    def __init__(
        self, path: str | PathLike[str], *, as_tf_serving: bool = RUNS_AS_TF_SERVING
    ) -> None:
        self._runs_as_tf_serving = as_tf_serving
        self._session = tf.compat.v1.Session(graph=tf.Graph())
        try:
            _register_operations(fspath(path))
            load = _load_as_tf_serving if as_tf_serving else _load_publicly
            with self._session.graph.as_default():
                meta_graph = load(self._session, fspath(path))
            # A plain dict, since a protobuf map answers a missing key with a new message.
            self.signatures: Mapping[str, Signature] = {
                key: Signature(proto) for key, proto in meta_graph.signature_def.items()
            }
            self._feeds = {key: _names(s.inputs) for key, s in self.signatures.items()}
            self._fetches = {key: _names(s.outputs) for key, s in self.signatures.items()}
            self._checked = {}  # the alias and the shape of each tensor whose shape is checked
            if not _operations(meta_graph.graph_def) <= _REFUSING_OPS:
                self._checked = {
                    info.name: (alias, tf.TensorShape(info.tensor_shape))
                    for signature in self.signatures.values()
                    for alias, info in signature.inputs.items()
                }
            if as_tf_serving:
                # Session.run does this before each call; for a graph that is final, once is enough.
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
            tf.errors.OpError: the error of the TensorFlow runtime, with its text.
        """
        feeds, fetches = self.tensors_of(signature_name, inputs, output_names)
        values = self.run_tensors(feeds, list(fetches.values()), timeout_s=timeout_s)
        return dict(zip(fetches, values, strict=True))

    def tensors_of(
        self, signature_name: str, inputs: Mapping[str, np.ndarray], output_names: Sequence[str]
    ) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """The tensors that a run of a signature feeds and fetches.

        Args:
            signature_name: a key of `signatures`.
            inputs: arrays by the signature's input names.
            output_names: the outputs to fetch; empty means all of them.

        Returns:
            the input arrays by the name of their tensor, and the tensor name of each output.

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
        """Runs the graph from some tensors of its signatures to others.

        Args:
            feeds: arrays by the name of the tensor that they replace.
            fetches: the names of the tensors to compute.
            timeout_s: how long the model may compute; None means without limit.

        Raises:
            KeyError: no signature has a tensor of that name.
            tf.errors.OpError: the error of the TensorFlow runtime, with its text; a shape that the
                signature does not declare.
        """
        for name, array in feeds.items():
            self._check_shape(name, array)
        run = self._run_as_tf_serving if self._runs_as_tf_serving else self._run_publicly
        return [as_array(value) for value in run(feeds, fetches, timeout_s)]

    def cancel(self) -> None:
        """Ends the runs under way, and all later ones, with `tf.errors.CancelledError`."""
        self._session.close()

    def close(self) -> None:
        """Frees the session and its variables; call it once no run is under way."""
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_shape(self, tensor: str, array: np.ndarray) -> None:
        alias, declared = self._checked.get(tensor, ("", None))
        if declared is not None and not declared.is_compatible_with(array.shape):
            raise tf.errors.InvalidArgumentError(
                None,
                None,
                "An input must have the shape that the signature declares. Received: "
                f"{alias} of shape {array.shape}, where {_shape_text(declared)} is declared. "
                f"Send {alias} of that shape; None takes any size.",
            )

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
        """The C handle of a tensor: `op:0`, or plain `op`, as a signature names its init op."""
        op, _, index = name.partition(":")
        output = _c_api.TF_Output()
        output.oper = self._session.graph.get_operation_by_name(op)._c_op
        output.index = int(index or 0)
        return output


def register_text_operations() -> None:
    """Makes the operations of tensorflow-text known to TensorFlow, which its import does.

    Raises:
        ImportError: it is not installed, or is of another TensorFlow than the one here.
    """
    try:
        import tensorflow_text  # noqa: F401
    except (ImportError, tf.errors.OpError) as error:  # OpError: its library does not load
        minor = ".".join(tf.__version__.split(".")[:2])
        raise ImportError(
            "A graph that makes tokens of texts runs where tensorflow-text is installed, of the "
            f"version of TensorFlow. Received: {error} beside TensorFlow {tf.__version__}. "
            f"Install it: pip install 'keras-mrl[text]' 'tensorflow-text=={minor}.*'."
        ) from error


def _register_operations(path: str) -> None:
    """Imports tensorflow-text if the graph at `path` has operations of it.

    A stock TensorFlow Serving has them, but TensorFlow's own package does not.
    """
    if TEXT_OPERATIONS.keys() & operations_of(path):
        register_text_operations()


def operations_of(path: str | PathLike[str]) -> set[str]:
    """The names of the operations that a SavedModel needs; none where it cannot be read.

    Args:
        path: folder of the SavedModel.
    """
    file = os.path.join(path, tf.saved_model.SAVED_MODEL_FILENAME_PB)
    try:
        with open(file, "rb") as opened:
            graphs = SavedModel.FromString(opened.read()).meta_graphs
    except (OSError, DecodeError):
        return set()
    return {op.name for graph in graphs for op in graph.meta_info_def.stripped_op_list.op}


def _load_as_tf_serving(session: Any, path: str) -> Any:
    """Loads as C++ does: a SavedModel whose variables are missing loads, and its runs fail."""
    loader = SavedModelLoader(path)
    saver, _ = loader.load_graph(session.graph, _TAGS)
    if tf.io.gfile.exists(os.path.join(path, "variables", "variables.index")):
        loader.restore_variables(session, saver)
    loader.run_init_ops(session, _TAGS)
    return loader.get_meta_graph_def_from_tags(_TAGS)


def _load_publicly(session: Any, path: str) -> Any:
    with _without_deprecation_warning():
        return tf.compat.v1.saved_model.loader.load(session, _TAGS, path)


def as_array(value: Any) -> np.ndarray:
    """A value that TensorFlow returned, as an array: of rank 0, it is a NumPy scalar or bytes."""
    # NumPy's own dtype for bytes, S, would lose trailing zero bytes.
    return np.array(value, dtype=object) if isinstance(value, bytes) else np.asarray(value)


def _names(infos: Mapping[str, Any]) -> dict[str, str]:
    """The tensor behind each alias of a signature's inputs or outputs."""
    return {alias: info.name for alias, info in infos.items()}


def _operations(graph: Any) -> set[str]:
    """The names of all operations of a graph and of its functions."""
    bodies = [graph.node, *(function.node_def for function in graph.library.function)]
    return {node.op for nodes in bodies for node in nodes} - {
        function.signature.name for function in graph.library.function
    }


def _shape_text(shape: tf.TensorShape) -> str:
    return str(tuple(shape.as_list()))


def _run_options(timeout_s: float) -> Any:
    # At least one millisecond, since 0 would mean without limit. At most int32, as in TensorFlow
    # Serving: gRPC's "no deadline" is a number of seconds whose milliseconds overflow int64.
    return tf.compat.v1.RunOptions(timeout_in_ms=min(max(1, int(timeout_s * 1000)), 2**31 - 1))


@contextmanager
def _without_deprecation_warning() -> Iterator[None]:
    """Silences the advice to use another loader: this one is TensorFlow Serving's."""

    def is_other(record: logging.LogRecord) -> bool:
        return "loader_impl" not in record.getMessage()

    logger = tf.get_logger()
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)
