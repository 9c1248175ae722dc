"""Which way a client's connection takes, by the flag and the environment."""

import pytest

from fedclient.routes import Route, choose_route
from fedclient.settings import ClientSettings
from fedrounds.cli import parse

PROXY = "http://proxy.example:3128"


def route(proxy: str | None = None, server: str = "fed.example:50051", **environment: str) -> Route:
    """Return the way to a server under an environment."""
    return choose_route(server, proxy=proxy, environment=environment)


@pytest.mark.parametrize("name", ["http_proxy", "https_proxy", "HTTP_PROXY", "all_proxy"])
def test_a_proxy_that_is_for_web_pages_isnt_used_and_the_log_says_so(name: str) -> None:
    chosen = route(**{name: PROXY})
    assert chosen.proxy is None
    assert chosen.describe() == (
        f"fed.example:50051 (directly; {name} is set, but only --proxy or grpc_proxy counts)"
    )


def test_without_any_proxy_there_is_nothing_to_say() -> None:
    assert route().describe() == "fed.example:50051"


def test_the_flag_beats_the_environment() -> None:
    chosen = route("http://mine.example:8080", grpc_proxy=PROXY, no_proxy="fed.example")
    assert chosen.describe() == "fed.example:50051 through the proxy mine.example:8080"


def test_grpc_proxy_is_used_and_named() -> None:
    chosen = route(grpc_proxy=PROXY)
    assert chosen.describe() == (
        "fed.example:50051 through the proxy proxy.example:3128 (from grpc_proxy)"
    )


@pytest.mark.parametrize(
    "environment",
    [{"no_proxy": "localhost,fed.example"}, {"no_grpc_proxy": ".example"}, {"no_proxy": "*"}],
    ids=str,
)
def test_grpc_proxy_isnt_used_for_hosts_that_are_excluded(environment: dict[str, str]) -> None:
    chosen = route(grpc_proxy=PROXY, **environment)
    assert chosen.proxy is None
    assert "rules out" in chosen.note


def test_a_password_is_sent_and_never_shown() -> None:
    chosen = route("http://me:s%40cret@proxy.example")
    assert chosen.proxy is not None
    # Base64 of me:s@cret (RFC 7617).
    assert chosen.proxy.authorization == "Basic bWU6c0BjcmV0"
    assert chosen.describe() == "fed.example:50051 through the proxy proxy.example:80"


@pytest.mark.parametrize(
    "written",
    ["proxy.example:3128", "https://proxy:1", "socks5://proxy:1", "http://", "http://a:b"],
)
def test_a_proxy_that_cant_be_read_is_an_error_before_anything_starts(
    written: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Given as a flag or in the environment."""
    for argv in (["--id", "0", "--proxy", written], ["--id", "0"]):
        with pytest.raises(SystemExit) as ended:
            parse(ClientSettings, argv)
        assert ended.value.code == 2
        assert "write a proxy as http://host:port" in capsys.readouterr().err
        monkeypatch.setenv("grpc_proxy", written)
