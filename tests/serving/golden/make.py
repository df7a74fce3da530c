"""Writes the golden messages: `python tests/serving/golden/make.py`, and commit what changes."""

from pathlib import Path

import numpy as np
from google.protobuf.any_pb2 import Any
from google.protobuf.message import Message
from google.protobuf.wrappers_pb2 import Int64Value

from keras_mrl_serving import _wire_pb2 as wire
from keras_mrl_serving._wire import to_proto


def messages() -> dict[str, Message]:
    """Each file's name and the message it holds."""
    return {
        "predict_request.bin": predict_request(),
        "predict_response.bin": predict_response(),
        "metadata_response.bin": metadata_response(),
    }


def serialized(message: Message) -> bytes:
    """Its bytes, with the entries of maps in the order of their keys."""
    return message.SerializeToString(deterministic=True)


def model_spec() -> wire.ModelSpec:
    return wire.ModelSpec(name="digits", version=Int64Value(value=3), signature_name="classify_16")


def shape(*sizes: int) -> wire.TensorShapeProto:
    return wire.TensorShapeProto(dim=[wire.TensorShapeProto.Dim(size=size) for size in sizes])


def predict_request() -> wire.PredictRequest:
    return wire.PredictRequest(
        model_spec=model_spec(),
        inputs={
            "features": to_proto(np.arange(6, dtype="float32").reshape(2, 3) / 4),
            "names": to_proto(np.array(["blue", "grün"])),
        },
        output_filter=["labels", "scores"],
    )


def predict_response() -> wire.PredictResponse:
    return wire.PredictResponse(
        model_spec=model_spec(),
        outputs={
            "scores": wire.TensorProto(
                dtype=wire.DT_FLOAT, tensor_shape=shape(2, 2), float_val=[0.25, 0.75, 1.0, 0.0]
            ),
            "labels": wire.TensorProto(
                dtype=wire.DT_INT64, tensor_shape=shape(2), int64_val=[1, -1]
            ),
            "manifest": wire.TensorProto(
                dtype=wire.DT_STRING, tensor_shape=shape(), string_val=[b"{}"]
            ),
        },
    )


def metadata_response() -> wire.GetModelMetadataResponse:
    signature = wire.SignatureDef(
        inputs={
            "features": wire.TensorInfo(
                name="features:0", dtype=wire.DT_FLOAT, tensor_shape=shape(-1, 3)
            )
        },
        outputs={
            "scores": wire.TensorInfo(
                name="scores:0", dtype=wire.DT_FLOAT, tensor_shape=shape(-1, 2)
            )
        },
        method_name="tensorflow/serving/predict",
    )
    signatures = wire.SignatureDefMap(signature_def={"classify_16": signature})
    return wire.GetModelMetadataResponse(
        model_spec=wire.ModelSpec(name="digits", version=Int64Value(value=3)),
        metadata={
            "signature_def": Any(
                type_url="type.googleapis.com/tensorflow.serving.SignatureDefMap",
                value=serialized(signatures),
            )
        },
    )


if __name__ == "__main__":
    for file_name, message in messages().items():
        Path(__file__).with_name(file_name).write_bytes(serialized(message))
