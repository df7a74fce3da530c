"""Whether the tensors of an answer are what their call promised: dtypes and shapes, no values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .calls import Call, Header
from .errors import ManifestError


def check_answer(
    call: Call,
    tensors: Mapping[str, Header],
    others: Iterable[str] = (),
    version: int | None = None,
) -> None:
    """Raise `ManifestError` unless an answer is as promised.

    Args:
        call: The call.
        tensors: Dtype and shape of each tensor by output name.
        others: Names of further tensors, which are not read.
        version: The version that answered.

    Examples:
        >>> from keras_mrl_serving.calls import Output
        >>> call = Call("embed_8", {"x": np.zeros((2, 3))}, promised={"y": Output("int32")})
        >>> check_answer(call, {"y": ("int64", (2,))})
    """
    promised = call.promised.items()
    rows = next((len(array) for array in call.inputs.values() if array.ndim), 1)
    for name, output in promised:
        if name not in tensors or not output.fits(tensors[name], rows):
            break
    else:
        return
    received = [f"{name} {dtype} {shape}" for name, (dtype, shape) in sorted(tensors.items())]
    text = ", ".join([*received, *sorted(others)]) or "nothing"
    expected = ", ".join(f"{name} {output}" for name, output in promised)
    rule, remedy = "", "Look at what the server runs: its signature says otherwise."
    if any(output.has_rows for output in call.promised.values()):
        rule = ", with a row for each row sent"
        remedy = "Export the model again with keras_mrl_export.export_saved_model."
    error = ManifestError(
        f"A signature must answer {expected:.400}{rule}."
        f" Received: {text:.400} for {rows} rows of signature {call.signature!r}. {remedy}"
    )
    error.version = version
    raise error
