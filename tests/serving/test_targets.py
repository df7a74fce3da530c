"""Targets as one address of gRPC, and the proxy on the way to them."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest

from keras_mrl_serving._targets import Proxy, channel_address, find_proxy, is_one_address
from keras_mrl_serving.aio import AsyncClient
from keras_mrl_serving.client import Client

Refuses = Callable[[type[Exception], str], AbstractContextManager[None]]

BOTH = pytest.mark.parametrize("kind", [Client, AsyncClient])


@pytest.mark.parametrize(
    ("targets", "address"),
    [
        ("localhost:8500", "localhost:8500"),
        ("[::1]:8500", "[::1]:8500"),
        ("dns:///models:8500", "dns:///models:8500"),
        ("dns://10.0.0.10/models:8500", "dns://10.0.0.10/models:8500"),
        ("unix:/tmp/socket", "unix:/tmp/socket"),
        (["127.0.0.1:8500"], "127.0.0.1:8500"),
        (["127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:1"], "ipv4:127.0.0.1:1,127.0.0.1:2"),
        (["[::1]:1", "[::1]:2"], "ipv6:[::1]:1,[::1]:2"),
    ],
)
def test_targets_become_one_address(targets: Any, address: str) -> None:
    assert channel_address(targets) == address


def no_port(target: str, example: str) -> tuple[str, str]:
    return target, (
        f"A target must be 'host:port'. Received: {target!r}. "
        f"Give the server's gRPC port, for example {example}:8500."
    )


def url(target: str, received: str, example: str, tls: str = "") -> tuple[str, str]:
    return target, (
        f"A target is 'host:port', not a URL. Received: '{received}'. "
        f"Give the server's gRPC port, '{example}'{tls}."
    )


def brackets(target: str, example: str) -> tuple[str, str]:
    return target, (f"An IPv6 address stands in brackets. Received: '{target}'. Give '{example}'.")


def no_target(target: Any, received: str) -> tuple[Any, str]:
    return target, (
        f"A target is 'host:port', a list of them, or a transport. Received: {received}. "
        "Give for example 'localhost:8500'."
    )


def unprintable(target: str, received: str) -> tuple[str, str]:
    return target, (
        f"A target is written in characters that print. Received: {received}. "
        "Give for example 'localhost:8500'."
    )


def no_address(target: str, scheme: str, example: str) -> tuple[str, str]:
    return target, (
        f"A target of {scheme}: names an address. Received: {target!r}. "
        f"Give for example {example!r}."
    )


@pytest.mark.parametrize(
    ("targets", "text"),
    [
        no_port("localhost", "localhost"),
        no_port("localhost:", "localhost"),
        no_port("birds.example.org:http", "birds.example.org"),
        no_port("birds.example.org:8500/", "birds.example.org"),
        no_port("birds.example.org:0", "birds.example.org"),
        no_port("birds.example.org:65536", "birds.example.org"),
        no_port("[::1]", "[::1]"),
        no_port("dns:///models", "dns:///models"),
        no_port("", "localhost"),
        no_port(":8500", "localhost"),
        url("http://birds:8500", "http://birds:8500", "birds:8500"),
        url("grpc://birds", "grpc://birds", "birds:8500"),
        url("http://[::1]", "http://[::1]", "[::1]:8500"),
        url("http://birds:8501/v1/models/m", "http://birds:8501", "birds:8500"),
        url("http://me:5e1f@birds:1/", "http://birds:1", "birds:1"),
        url("https://birds:443", "https://birds:443", "birds:443", ", and Options(tls=Tls())"),
        url("grpcs://birds:1", "grpcs://birds:1", "birds:1", ", and Options(tls=Tls())"),
        url("http://me:sE/cReT?5e1f@birds:1", "http://birds:1", "birds:1"),
        brackets("::1:8500", "[::1]:8500"),
        brackets("fe80::1:2:9000", "[fe80::1:2]:9000"),
        brackets("::1", "[::1]:8500"),
        (["127.0.0.1:1", "models:"], no_port("models:", "models")[1]),
        (
            "one:1,two:2",
            "A target is one address. Received: 'one:1,two:2'. "
            "Give several as a list: ['one:1', 'two:2'].",
        ),
        no_target(None, "NoneType"),
        (
            [],
            "A client needs a target. Received: an empty list. Give for example 'localhost:8500'.",
        ),
        no_target(b"localhost:8500", "bytes"),
        no_target([3], "int"),
        no_target(["127.0.0.1:1", b"127.0.0.1:2"], "bytes"),
        unprintable("local\nhost:8500", "'local\\nhost:8500'"),
        unprintable("http://me:5e1f@birds\x1b[2J:1", "'birds\\x1b[2J:1'"),
        *(no_address(scheme, "unix", "unix:/run/models.sock") for scheme in ("unix:", "unix:///")),
        *(
            no_address(list_, "ipv4", "ipv4:10.0.0.1:8500")
            for list_ in ("ipv4:", "ipv4:,", "ipv4:10.0.0.1:1,")
        ),
        no_address("xds:///", "xds", "xds:///models"),
        (
            ["127.0.0.1:1", "[::1]:2"],
            "Targets of one list must all have addresses of IPv4, or all of IPv6. "
            "Received: 127.0.0.1:1, [::1]:2. "
            "Give a client to each kind, or one 'dns:///name:port'.",
        ),
    ],
)
@BOTH
def test_targets_nobody_could_reach_are_refused(
    kind: type[Any], targets: Any, text: str, refuses: Refuses
) -> None:
    with refuses(ValueError, text):
        kind(targets)


def test_a_target_of_a_list_without_an_address_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be a host with an address\. Received: 'a b:1' \("):
        channel_address(["127.0.0.1:1", "a b:1"])


@pytest.mark.parametrize("address", ["127.0.0.1:1", "[::1]:1", "ipv4:10.0.0.1:1", "unix:/s"])
def test_one_address_is_one_machine(address: str) -> None:
    assert is_one_address(address)
    assert is_one_address("localhost:1")


@pytest.mark.parametrize("address", ["birds:1", "dns:///birds:1", "ipv4:10.0.0.1:1,10.0.0.2:1"])
def test_a_name_may_be_several_machines(address: str) -> None:
    assert not is_one_address(address)


# Proxies.

URL = "http://birds:5e1f@proxy.example.org:3128"


@pytest.mark.parametrize(
    ("environment", "variable"),
    [
        ({"http_proxy": URL}, "http_proxy"),
        ({"http_proxy": "http://other:1", "https_proxy": URL}, "https_proxy"),
        ({"https_proxy": "http://other:1", "grpc_proxy": URL}, "grpc_proxy"),
    ],
)
def test_the_proxy_is_named_without_its_password(
    environment: dict[str, str], variable: str
) -> None:
    proxy = Proxy(variable, "proxy.example.org:3128")
    for target in ("birds:8500", "dns:///birds:8500", "ipv4:10.0.0.1:1", ["birds:8500"]):
        assert find_proxy(target, environment) == proxy


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"HTTP_PROXY": URL, "HTTPS_PROXY": URL, "GRPC_PROXY": URL},  # gRPC reads none of them
        {"http_proxy": ""},
        {"http_proxy": URL, "grpc_proxy": ""},
    ],
)
def test_without_a_variable_there_is_no_proxy(environment: dict[str, str]) -> None:
    assert find_proxy("birds:8500", environment) is None


@pytest.mark.parametrize(
    "url",
    [
        "proxy.example.org:3128",
        "https://proxy.example.org:3128",
        "socks5://me:5e1f@proxy.example.org:3128",
        "http://[proxy",
    ],
)
def test_what_grpc_does_not_take_for_a_proxy_is_not_asked(url: str) -> None:
    assert find_proxy("birds:8500", {"http_proxy": url}) == Proxy("http_proxy", "", is_asked=False)
    assert find_proxy("localhost:8500", {"http_proxy": url}) is None


@pytest.mark.parametrize(
    "secret", ["sE/cReT", "12/cReT", "sE?cReT", "12?cReT", "12#cReT", "sE#c:1"]
)
def test_a_part_of_a_password_is_no_address(secret: str) -> None:
    url = f"http://birds:{secret}@proxy.example.org:3128"
    assert find_proxy("birds:8500", {"http_proxy": url}) == Proxy("http_proxy", "")


@pytest.mark.parametrize(
    "targets",
    [
        *("localhost:1", "birds.localhost:1", "127.0.0.1:1", "127.9.9.9:1", "[::1]:1"),
        *("dns:///localhost:1", "ipv4:127.0.0.1:1", "unix:/tmp/s", "unix-abstract:s"),
        ["birds:1", "owls:1"],
        "ipv4:10.0.0.1:1,10.0.0.2:1",
    ],
)
def test_loopback_and_lists_are_asked_directly(targets: Any) -> None:
    assert find_proxy(targets, {"http_proxy": URL}) is None


EXEMPT = "owls.example.org, .birds.example.org,10.0.0.0/8,192.0.2.7,2001:db8::/32,ravens:8500"


@pytest.mark.parametrize("variable", ["no_proxy", "NO_PROXY", "no_grpc_proxy"])
@pytest.mark.parametrize(
    ("target", "is_exempt"),
    [
        ("owls.example.org:8500", True),
        ("dns:///owls.example.org:8500", True),
        ("snowy.owls.example.org:8500", True),
        ("birds.example.org:8500", True),
        ("grey.Birds.example.org:8500", True),
        ("example.org:8500", False),
        ("10.1.2.3:8500", True),
        ("11.1.2.3:8500", False),
        ("192.0.2.7:8500", True),
        ("[2001:db8::1]:8500", True),
        ("[2001:db9::1]:8500", False),
        ("ravens:8500", True),
        ("ravens:8501", False),
    ],
)
def test_what_no_proxy_names_is_asked_directly(variable: str, target: str, is_exempt: bool) -> None:
    environment = {"http_proxy": URL, variable: EXEMPT}
    assert (find_proxy(target, environment) is None) == is_exempt
    assert find_proxy(target, {"http_proxy": URL, variable: "*"}) is None
    assert find_proxy(target, {"http_proxy": URL, variable: ", ,"}) is not None
