"""How a connection gets to the server: directly, or through an HTTP proxy.

By itself, gRPC obeys `http_proxy` without saying so, even for localhost. Here a connection goes
through a proxy only if `--proxy` or the variable `grpc_proxy` names it, and `describe` says so.
"""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

_IGNORED = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")


@dataclass(frozen=True, kw_only=True)
class Proxy:
    """An HTTP proxy: its address, host:port, and the value of Proxy-Authorization for it."""

    address: str
    authorization: str = ""


@dataclass(frozen=True, kw_only=True)
class Route:
    """The way to a server, host:port; `note` says why it goes this way, for the log."""

    server: str
    proxy: Proxy | None = None
    note: str = ""

    def describe(self) -> str:
        """Return the way in words, without the proxy's password."""
        way = f" through the proxy {self.proxy.address}" if self.proxy else ""
        return f"{self.server}{way}{self.note and f' ({self.note})'}"


def choose_route(server: str, *, proxy: str | None, environment: Mapping[str, str]) -> Route:
    """Return the way to `server`: through `proxy`, or else the proxy that `grpc_proxy` names.

    `no_grpc_proxy`, or else `no_proxy`, lists hosts to reach without `grpc_proxy`.

    Raises:
        ValueError: a proxy's address can't be read.
    """
    if proxy:
        return Route(server=server, proxy=read_proxy(proxy))
    if named := environment.get("grpc_proxy"):
        excluded = environment.get("no_grpc_proxy", environment.get("no_proxy", ""))
        if _is_among(server.rpartition(":")[0], excluded.split(",")):
            return Route(server=server, note="without grpc_proxy, which no_proxy rules out here")
        try:
            return Route(server=server, proxy=read_proxy(named), note="from grpc_proxy")
        except ValueError as error:
            raise ValueError(f"the variable grpc_proxy is {named!r}: {error}") from None
    if ignored := next((name for name in _IGNORED if environment.get(name)), None):
        return Route(
            server=server, note=f"directly; {ignored} is set, but only --proxy or grpc_proxy counts"
        )
    return Route(server=server)


def read_proxy(text: str) -> Proxy:
    """Return the proxy that a URL names, http://[user:password@]host[:port].

    Raises:
        ValueError: it isn't written so.
    """
    try:
        url = urlsplit(text)
        host, port = url.hostname, url.port or 80
    except ValueError:
        host, port = None, 0
    if host is None or url.scheme != "http" or url.path.strip("/"):
        raise ValueError("write a proxy as http://host:port")
    secret = f"{unquote(url.username or '')}:{unquote(url.password or '')}"
    return Proxy(
        address=f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
        authorization=""
        if url.username is None
        else "Basic " + b64encode(secret.encode()).decode(),
    )


def _is_among(host: str, names: Sequence[str]) -> bool:
    """Return whether a host is among the names or in any of these domains; * matches all."""
    words = [name.strip().lower().lstrip(".") for name in names]
    return any(word and f".{host.lower()}".endswith(f".{word}") for word in words) or "*" in words
