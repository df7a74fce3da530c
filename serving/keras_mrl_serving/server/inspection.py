"""GetModelMetadata and GetModelStatus: what a server says about its models."""

from typing import Any

import grpc
from tensorflow_serving.apis.get_model_metadata_pb2 import GetModelMetadataResponse, SignatureDefMap
from tensorflow_serving.apis.get_model_status_pb2 import GetModelStatusResponse

from .lookup import check_model_spec, serving
from .manager import Models
from .status import StatusError, invalid_argument

_FIELD = "signature_def"


def get_model_metadata(models: Models, request: Any) -> Any:
    """Answers a GetModelMetadataRequest with the signatures of one version.

    Args:
        models: the models of the server.
        request: the `GetModelMetadataRequest`.

    Raises:
        StatusError: the code and the text TensorFlow Serving would send.
    """
    check_model_spec(request)
    if not request.metadata_field:
        raise invalid_argument("GetModelMetadataRequest must specify at least one metadata_field")
    for field in request.metadata_field:
        if field != _FIELD:
            raise invalid_argument(f"Metadata field {field} is not supported")
    response = GetModelMetadataResponse()
    with serving(models, request.model_spec) as (number, session):
        response.model_spec.name = request.model_spec.name
        response.model_spec.version.value = number
        response.metadata[_FIELD].Pack(SignatureDefMap(signature_def=session.signatures))
    return response


def get_model_status(models: Models, request: Any) -> Any:
    """Answers a GetModelStatusRequest: every version the server has met, highest first.

    Args:
        models: the models of the server.
        request: the `GetModelStatusRequest`; a version narrows the answer, a label does not.

    Raises:
        StatusError: the code and the text TensorFlow Serving would send.
    """
    check_model_spec(request)
    spec = request.model_spec
    versions = models.versions(spec.name)
    if spec.HasField("version"):
        number = spec.version.value
        versions = [version for version in versions if version.number == number]
        missing = f"Could not find version {number} of model {spec.name}"
    else:
        missing = f"Could not find any versions of model {spec.name}"
    if not versions:
        raise StatusError(grpc.StatusCode.NOT_FOUND, missing)
    response = GetModelStatusResponse()
    for version in versions:
        status = response.model_version_status.add(version=version.number, state=version.state)
        status.status.SetInParent()
        if version.error is not None:
            status.status.error_code = version.error.number
            status.status.error_message = version.error.message
    return response
