"""TLS on the gRPC port: who gets an answer, who does not, and files that are refused."""

from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
import trustme
from tensorflow_serving.apis.get_model_status_pb2 import GetModelStatusRequest
from tensorflow_serving.apis.model_service_pb2_grpc import ModelServiceStub

from keras_mrl_serving.server import DevServer
from keras_mrl_serving.server.grpc_options import server_credentials

RULE = "ssl_config_file must be a text proto of tensorflow.serving.SSLConfig."
REMEDY = "Correct the file: server_key, server_cert and custom_ca hold PEM text."
NOT_A_PAIR = "server_key and server_cert are no PEM pair: "
CA = trustme.CA()
SERVER = CA.issue_cert("127.0.0.1")
CLIENT = CA.issue_cert("client@example.org")
STRANGER = trustme.CA().issue_cert("stranger@example.org")


def key_of(pair: trustme.LeafCert) -> bytes:
    return pair.private_key_pem.bytes()


def chain_of(pair: trustme.LeafCert) -> bytes:
    return b"".join(pem.bytes() for pem in pair.cert_chain_pems)


def escaped(pem: bytes) -> str:
    return pem.decode().replace("\n", "\\n")


def pasted(pem: bytes) -> str:
    return pem.decode()


def config(
    form: Callable[[bytes], str] = escaped,
    *,
    key: bytes = key_of(SERVER),
    cert: bytes = chain_of(SERVER),
    ca: bytes = b"",
    client_verify: bool = False,
) -> str:
    lines = [f'server_key: "{form(key)}"', f"server_cert: '{form(cert)}'  # it's \"ours\""]
    if ca:
        lines.append(f'custom_ca: "{form(ca)}"')
    return "\n".join([*lines, f"client_verify: {str(client_verify).lower()}"])


def state(target: str, credentials: grpc.ChannelCredentials | None) -> int:
    request = GetModelStatusRequest()
    request.model_spec.name = "default"
    channel = (
        grpc.insecure_channel(target)
        if credentials is None
        else grpc.secure_channel(target, credentials)
    )
    with channel:
        response = ModelServiceStub(channel).GetModelStatus(request, timeout=20.0)
    return response.model_version_status[0].state


def refused(target: str, credentials: grpc.ChannelCredentials | None) -> bool:
    with pytest.raises(grpc.RpcError) as caught:
        state(target, credentials)
    return caught.value.code() is grpc.StatusCode.UNAVAILABLE


def trusting(pair: trustme.LeafCert | None = None) -> grpc.ChannelCredentials:
    root = CA.cert_pem.bytes()
    if pair is None:
        return grpc.ssl_channel_credentials(root)
    return grpc.ssl_channel_credentials(root, key_of(pair), chain_of(pair))


@pytest.mark.parametrize("form", [escaped, pasted])
def test_the_port_speaks_tls_and_nothing_else(
    publish: Callable[[Path, str], Path], tmp_path: Path, form: Callable[[bytes], str]
) -> None:
    file = tmp_path / "tls.txt"
    file.write_text(config(form))
    publish(tmp_path / "base", "1")
    with DevServer(tmp_path / "base", ssl_config_file=file) as target:
        assert state(target, trusting()) == 30
        assert refused(target, None)
        unknown = grpc.ssl_channel_credentials(trustme.CA().cert_pem.bytes())
        assert refused(target, unknown)


def test_client_verify_asks_for_a_certificate_of_the_custom_ca(
    publish: Callable[[Path, str], Path], tmp_path: Path
) -> None:
    file = tmp_path / "tls.txt"
    file.write_text(config(ca=CA.cert_pem.bytes(), client_verify=True))
    publish(tmp_path / "base", "1")
    with DevServer(tmp_path / "base", ssl_config_file=file) as target:
        assert state(target, trusting(CLIENT)) == 30
        assert refused(target, trusting())
        assert refused(target, trusting(STRANGER))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("server_key: a", "1:13 : "),
        ('server_keys: "a"', '1:1 : Message type "tensorflow.serving.SSLConfig" '),
        ("", NOT_A_PAIR),
        (config(key=b"key"), NOT_A_PAIR),
        (config(key=chain_of(SERVER), cert=key_of(SERVER)), NOT_A_PAIR),
        (config(key=key_of(SERVER) + chain_of(SERVER), cert=b""), NOT_A_PAIR),
        (config(key=b"", cert=key_of(SERVER) + chain_of(SERVER)), NOT_A_PAIR),
        (config(key=key_of(CLIENT)), f"{NOT_A_PAIR}[X509: KEY_VALUES_MISMATCH]"),
        (config(cert=b"-----BEGIN CERTIFICATE-----\n"), NOT_A_PAIR),
        (config(ca=b"authority"), "custom_ca is no PEM certificate: "),
        (
            config(client_verify=True),
            "client_verify without a custom_ca to verify clients with. ",
        ),
        ("\xff", "it is no UTF-8 text. "),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path: Path, text: str, reason: str) -> None:
    file = tmp_path / "tls.txt"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"^ssl_config_file must be") as caught:
        server_credentials(str(file))
    said = str(caught.value)
    assert said.startswith(f"{RULE} Received: ssl_config_file={str(file)!r}, {reason}")
    assert said.endswith(f". {REMEDY}")
    assert ".. " not in said


def test_a_server_with_a_bad_file_loads_no_model(tmp_path: Path) -> None:
    file = tmp_path / "none"
    with pytest.raises(OSError, match="ssl_config_file") as caught:
        DevServer(tmp_path, ssl_config_file=file).start()
    assert str(caught.value) == (
        f"ssl_config_file must be a file that can be read. Received: ssl_config_file={str(file)!r} "
        "(No such file or directory). Correct the path."
    )
