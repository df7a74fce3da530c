"""Writes the messages of the serving contract: `python tests/serving/golden/make.py`.

With tensorflow-serving-api's own messages, so that nothing of ours stands between the files and
TensorFlow Serving. README.md says what is in them, by hand: change both. The folder `0.1.0` holds
the messages of models without `model_id`, and is written by the same functions; it has none of
those models that 0.1.0 did not know: of several labels a row, of values, with exits, of texts.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import Message
from tensorflow.core.framework import tensor_pb2, tensor_shape_pb2, types_pb2
from tensorflow_serving.apis import get_model_status_pb2, model_pb2, predict_pb2

HERE = Path(__file__).parent
OLD = HERE / "0.1.0"
MODEL_ID = 1_307_194_163  # of the five manifests
# NumPy's dtype of the elements of a tensor, and the repeated field that holds them.
FIELDS = {
    types_pb2.DT_FLOAT: ("<f4", "float_val"),
    types_pb2.DT_INT32: ("<i4", "int_val"),
    types_pb2.DT_INT64: ("<i8", "int64_val"),
}

IMAGES = np.arange(8).reshape(2, 2, 2, 1) / 8
FEATURES = np.concatenate([np.arange(16) / 4 - 2, np.full(16, 0.5)]).reshape(2, 16)
UNIT = [[0.5, -0.5, 0.5, -0.5, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0, 0, 0]]
ADAPTIVE: dict[str, tuple[int, Any]] = {
    "class_ids": (types_pb2.DT_INT64, [[2, 0], [1, 2]]),
    "labels": (types_pb2.DT_STRING, [["grün", "blue"], ["red", "grün"]]),
    "probabilities": (types_pb2.DT_FLOAT, [[0.75, 0.125], [0.5, 0.375]]),
    "confidence": (types_pb2.DT_FLOAT, [0.75, 0.5]),
    "dim": (types_pb2.DT_INT32, [8, 16]),
}
AT_EXITS = {**ADAPTIVE, "exit": (types_pb2.DT_INT32, [0, 2])}
AT_EARLY = {name: array for name, array in ADAPTIVE.items() if name != "dim"}
SEVERAL: dict[str, tuple[int, Any]] = {  # each probability by itself: a row's sum is any number
    "class_ids": (types_pb2.DT_INT64, [[2, 0, 1], [1, 0, 2]]),
    "labels": (types_pb2.DT_STRING, [["grün", "blue", "red"], ["red", "blue", "grün"]]),
    "probabilities": (types_pb2.DT_FLOAT, [[0.875, 0.75, 0.125], [0.25, 0.125, 0.0625]]),
    "confidence": (types_pb2.DT_FLOAT, [0.875, 0.25]),
}


TEXTS = ["query: grüne Wiesen", "query: 🌱\0", "query: "]  # with the manifest's prompt before each


def messages(folder: Path = HERE) -> dict[str, Message]:
    """Each file's name and the message it holds; those of folder `OLD` are without `model_id`."""
    has_id = folder != OLD

    def identified(
        signature: str, rows: int = 2, write: Any = values, model: str = "digits", **outputs: Any
    ) -> Any:
        ids = {"model_id": write(types_pb2.DT_INT32, [MODEL_ID] * rows)} if has_id else {}
        return response(signature, model, **outputs, **ids)

    def described(file: str, model: str = "digits") -> Any:
        manifest = (folder / file).read_text().strip()
        return response("describe", model, manifest=values(types_pb2.DT_STRING, [manifest]))

    image = content(types_pb2.DT_FLOAT, IMAGES)
    features = content(types_pb2.DT_FLOAT, FEATURES)
    key = values(types_pb2.DT_STRING, [""])
    later: dict[str, Message] = (
        {
            "classify_8_request.bin": request("classify_8", "tags", image=image),
            "classify_8_response.bin": identified(
                "classify_8",
                model="tags",
                **{name: values(*array) for name, array in SEVERAL.items()},
            ),
            "regress_8_request.bin": request("regress_8", "prices", image=image),
            "regress_8_response.bin": identified(
                "regress_8",
                model="prices",
                values=values(types_pb2.DT_FLOAT, [[-12.5, 3], [0.25, 1024]]),
            ),
            "classify_adaptive_exits_request.bin": request(
                "classify_adaptive", "depths", image=image
            ),
            "classify_adaptive_exits_response.bin": identified(
                "classify_adaptive",
                model="depths",
                **{name: values(*array) for name, array in AT_EXITS.items()},
            ),
            "classify_conv3_out_8_request.bin": request(
                "classify_conv3_out_8", "depths", image=image
            ),
            "classify_conv3_out_8_response.bin": identified(
                "classify_conv3_out_8",
                model="depths",
                **{name: values(*array) for name, array in AT_EARLY.items()},
            ),
            "embed_conv3_out_8_request.bin": request("embed_conv3_out_8", "depths", image=image),
            "embed_conv3_out_8_response.bin": identified(
                "embed_conv3_out_8",
                model="depths",
                embedding=values(types_pb2.DT_FLOAT, UNIT),
            ),
            "embed_8_text_request.bin": request(
                "embed_8", "sentences", text=values(types_pb2.DT_STRING, TEXTS)
            ),
            "embed_8_text_response.bin": identified(
                "embed_8",
                rows=3,
                model="sentences",
                embedding=values(types_pb2.DT_FLOAT, [*UNIT, UNIT[0]]),
            ),
            "retrieve_request.bin": request(
                "retrieve", "sentences", text=values(types_pb2.DT_STRING, TEXTS)
            ),
            "retrieve_response.bin": identified(
                "retrieve",
                rows=3,
                model="sentences",
                ids=values(types_pb2.DT_INT64, [[7, 2**40], [0, 7], [11, 0]]),
                scores=values(types_pb2.DT_FLOAT, [[1, 0.5], [0.75, 0.75], [0.25, -0.25]]),
            ),
            "describe_sentences_response.bin": described("sentences_manifest.json", "sentences"),
            "describe_depths_response.bin": described("depths_manifest.json", "depths"),
            "describe_tags_response.bin": described("tags_manifest.json", "tags"),
            "describe_prices_response.bin": described("prices_manifest.json", "prices"),
        }
        if has_id
        else {}
    )
    return {
        **later,
        "embed_8_request.bin": request("embed_8", image=image),
        "embed_8_response.bin": identified("embed_8", embedding=values(types_pb2.DT_FLOAT, UNIT)),
        "classify_adaptive_request.bin": request("classify_adaptive", image=image),
        "classify_adaptive_response_values.bin": identified(
            "classify_adaptive", **{name: values(*array) for name, array in ADAPTIVE.items()}
        ),
        "classify_adaptive_response_content.bin": identified(
            "classify_adaptive",
            write=content,
            **{name: content(*array) for name, array in ADAPTIVE.items()},
        ),
        "features_request.bin": request("features", image=image),
        "features_response.bin": identified(
            "features", features=values(types_pb2.DT_FLOAT, FEATURES)
        ),
        "features_response_short.bin": identified(
            "features",
            write=partial(values, kept=1),
            features=values(types_pb2.DT_FLOAT, FEATURES, kept=17),
        ),
        "head_8_request.bin": predict_pb2.PredictRequest(
            model_spec=spec("digits", "head_8", version=3),
            inputs={"features": content(types_pb2.DT_FLOAT, FEATURES[1:, :8])},
            output_filter=["class_ids", "logits", *(["model_id"] if has_id else [])],
        ),
        "head_8_response.bin": identified(
            "head_8",
            rows=1,
            class_ids=values(types_pb2.DT_INT64, [[2, 0]]),
            logits=values(types_pb2.DT_FLOAT, [[-0.5, -1.25, 1.5]]),
        ),
        "search_request.bin": request("search", "digits-index", embedding=features),
        "search_response.bin": predict_pb2.PredictResponse(
            model_spec=spec("digits-index", "search", version=1),
            outputs={
                **identified("search").outputs,
                "ids": values(types_pb2.DT_INT64, [[7, 2**40, 0], [0, 7, 11]]),
                "scores": values(types_pb2.DT_FLOAT, [[1, 0.5, -0.25], [0.75, 0.75, 0]]),
            },
        ),
        "describe_request.bin": request("describe", key=key),
        "describe_response.bin": described("manifest.json"),
        "get_model_status_request.bin": get_model_status_pb2.GetModelStatusRequest(
            model_spec=model_pb2.ModelSpec(name="digits")
        ),
        "get_model_status_response.bin": model_status(),
    }


def serialized(message: Message) -> bytes:
    """Its bytes, with the entries of maps in the order of their keys."""
    return message.SerializeToString(deterministic=True)


def spec(model: str, signature: str, version: int | None = None) -> Any:
    """What is asked, or what answered; without a version, the newest."""
    made = model_pb2.ModelSpec(name=model, signature_name=signature)
    if version is not None:
        made.version.value = version
    return made


def request(signature: str, model: str = "digits", **inputs: Any) -> Any:
    return predict_pb2.PredictRequest(model_spec=spec(model, signature), inputs=inputs)


def response(signature: str, model: str = "digits", **outputs: Any) -> Any:
    answered = spec(model, signature, version=3)
    return predict_pb2.PredictResponse(model_spec=answered, outputs=outputs)


def model_status() -> Any:
    """A version being loaded, the one that answers, one that failed and one that was unloaded."""
    status = get_model_status_pb2.ModelVersionStatus
    made = get_model_status_pb2.GetModelStatusResponse()
    made.model_version_status.add(version=4, state=status.LOADING).status.SetInParent()
    made.model_version_status.add(version=3, state=status.AVAILABLE).status.SetInParent()
    failed = made.model_version_status.add(version=2, state=status.END)
    failed.status.error_code = 5  # NOT_FOUND
    failed.status.error_message = "Could not find meta graph def"
    made.model_version_status.add(version=1, state=status.END).status.SetInParent()
    return made


def empty(dtype: int, shape: tuple[int, ...]) -> Any:
    sizes = [tensor_shape_pb2.TensorShapeProto.Dim(size=size) for size in shape]
    return tensor_pb2.TensorProto(
        dtype=dtype, tensor_shape=tensor_shape_pb2.TensorShapeProto(dim=sizes)
    )


def values(dtype: int, array: Any, kept: int | None = None) -> Any:
    """A tensor as TensorFlow Serving answers by default: in the repeated field of its dtype."""
    tensor = empty(dtype, np.shape(array))
    if dtype == types_pb2.DT_STRING:
        tensor.string_val.extend(encoded(array))
        return tensor
    element, field = FIELDS[dtype]
    getattr(tensor, field).extend(np.asarray(array, element).ravel()[:kept].tolist())
    return tensor


def content(dtype: int, array: Any) -> Any:
    """A tensor as bytes: numbers little-endian; of strings all lengths, then all bytes."""
    tensor = empty(dtype, np.shape(array))
    if dtype == types_pb2.DT_STRING:
        strings = encoded(array)
        tensor.tensor_content = bytes(map(len, strings)) + b"".join(strings)  # each is below 128
        return tensor
    tensor.tensor_content = np.asarray(array, FIELDS[dtype][0]).tobytes()
    return tensor


def encoded(strings: Any) -> list[bytes]:
    return [string.encode() for string in np.asarray(strings, object).ravel()]


if __name__ == "__main__":
    for folder in (HERE, OLD):
        for file_name, message in messages(folder).items():
            (folder / file_name).write_bytes(serialized(message))
