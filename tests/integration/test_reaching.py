"""A client on its way to the server: what it says when nobody answers, and which way it takes."""

import itertools
import logging
import signal
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from fedclient.connection import Connection
from fedclient.progress import Stopped
from fedclient.routes import choose_route
from fedclient.session import Patience
from fedrounds.errors import ServerUnreachable
from tests.processes import Scene, Server, fixed_port

TASK = "tests.tiny_task:tiny"


class ConnectProxy:
    """An HTTP proxy that knows CONNECT alone; `requests` are the first lines it was sent."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        """Take no further connections."""
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            request = client.recv(1 << 16).decode()
            self.requests.append(request.splitlines()[0])
            host, _, port = request.split()[1].rpartition(":")
            server = socket.create_connection((host, int(port)))
            client.sendall(b"HTTP/1.1 200 connected\r\n\r\n")
            for source, other in ((client, server), (server, client)):
                threading.Thread(target=_pump, args=(source, other), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(1 << 16):
            sink.sendall(data)
    except OSError:
        pass
    finally:
        sink.close()


@pytest.fixture
def proxy() -> Iterator[ConnectProxy]:
    """Give a proxy on this machine."""
    started = ConnectProxy()
    yield started
    started.close()


@contextmanager
def connected(server: str, *, proxy: str | None = None, **environment: str) -> Iterator[Connection]:
    """Give a connection that takes the way these say."""
    connection = Connection(choose_route(server, proxy=proxy, environment=environment))
    try:
        yield connection
    finally:
        connection.close()


def test_a_proxy_for_web_pages_never_gets_between(
    server: Server, proxy: ConnectProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GRPC by itself would go through it, even to this machine."""
    monkeypatch.setenv("http_proxy", proxy.url)
    with connected(server.address, http_proxy=proxy.url) as connection:
        connection.check(timeout_s=60)
    assert proxy.requests == []


@pytest.mark.parametrize("given", ["flag", "grpc_proxy"])
def test_the_proxy_that_is_named_is_used(
    server: Server, proxy: ConnectProxy, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    """Also where `no_proxy` would rule it out for the flag: the flag has the last word."""
    monkeypatch.setenv("no_proxy", "127.0.0.1" if given == "flag" else "elsewhere.example")
    way = {"proxy": proxy.url} if given == "flag" else {"grpc_proxy": proxy.url}
    with connected(server.address, **way) as connection:
        connection.check(timeout_s=60)
    assert proxy.requests == [f"CONNECT {server.address} HTTP/1.1"]


def test_a_proxy_that_is_not_there_is_named_as_the_cause() -> None:
    """The server may be well: nobody has asked it yet."""
    gone = f"127.0.0.1:{fixed_port()}"
    with (
        connected("127.0.0.1:9", proxy=f"http://{gone}") as connection,
        pytest.raises(ServerUnreachable, match=f"^the proxy {gone} refuses the connection"),
    ):
        connection.check(timeout_s=60)


@contextmanager
def listening(serve: Callable[[socket.socket], object]) -> Iterator[str]:
    """Give the address of something that serves each connection as `serve` does, until the end."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                kept.append(connection)
                serve(connection)

        kept: list[socket.socket] = []
        threading.Thread(target=accept, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        for accepted in kept:
            accepted.close()


def _expect_tls(connection: socket.socket) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).wrap_socket(connection, server_side=True)
    except (ssl.SSLError, OSError):
        connection.close()


def _say_it_is_a_web_server(connection: socket.socket) -> None:
    BaseHTTPRequestHandler(
        connection, ("", 0), HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    )


def cause_at(server: str, *, timeout_s: float = 60) -> str:
    """Return the cause that is named for no answer from there."""
    with connected(server) as connection, pytest.raises(ServerUnreachable) as error:
        connection.check(timeout_s=timeout_s)
    return str(error.value)


def test_each_reason_for_no_answer_is_named_with_what_may_be_its_cause() -> None:
    """Nobody there, no such host, silence, TLS on the other side only, something else there."""
    assert "is the server started" in cause_at(f"127.0.0.1:{fixed_port()}")
    assert "no such host" in cause_at("no-such-host.invalid:50051")
    with listening(lambda _: None) as silent:
        assert "firewall" in cause_at(silent, timeout_s=0.5)
    with listening(_expect_tls) as with_tls:
        assert "expect TLS" in cause_at(with_tls)
    with listening(_say_it_is_a_web_server) as web_server:
        assert "isn't a fedserver" in cause_at(web_server)


def test_a_cause_is_logged_once_however_often_the_call_is_tried(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second cause is said too; what is said of causes in all is bounded."""
    caplog.set_level(logging.INFO, logger="fedclient")
    shown: list[str] = []
    patience = Patience(server="there:1", stop=threading.Event(), show_trouble=shown.append)
    causes = iter(["a", "a", "b", "a", "c", "d", "e"])

    def attempt() -> str:
        cause = next(causes, None)
        if cause is not None:
            raise ServerUnreachable(cause)
        return "answer"

    monkeypatch.setattr(patience, "pause", lambda _: None)
    assert patience.insist(attempt) == "answer"
    warnings = [
        f"no answer from there:1: {cause}; trying again until it answers" for cause in "abc"
    ]
    assert caplog.messages == [*warnings, "there:1 answers"]
    assert shown == [*["no answer from there:1; trying again"] * 3, ""]
    causes = iter(["a"])
    patience.insist(attempt)
    assert caplog.messages[4:] == [warnings[0], "there:1 answers again"]


def test_patience_ends_when_the_process_is_asked_to_stop() -> None:
    stop = threading.Event()
    numbers = itertools.count()

    def attempt() -> None:
        if next(numbers) == 3:
            stop.set()
        raise ServerUnreachable("nobody")

    with pytest.raises(Stopped):
        Patience(server="there:1", stop=stop).insist(attempt)


def test_a_client_speaks_before_torch_is_imported(scene: Scene, tmp_path: Path) -> None:
    """Whom it connects to, that nobody answers, and that it heard Ctrl-C: torch takes seconds."""
    lines = (
        "import pathlib, sys, time",
        f"while not pathlib.Path({str(tmp_path / 'go-on')!r}).exists(): time.sleep(0.02)",
        "sys.exit(7)",
    )
    (tmp_path / "torch.py").write_text("\n".join(lines))
    port = fixed_port()
    client = scene.client(0, f"127.0.0.1:{port}", PYTHONPATH=f"{tmp_path}:{Path.cwd()}")
    client.wait_for_line(f"connecting to 127.0.0.1:{port}$")
    client.wait_for_line(f"no answer from 127.0.0.1:{port}: the connection is refused")
    client.signal(signal.SIGINT)
    client.wait_for_line("stopping")
    (tmp_path / "go-on").touch()
    client.wait()


def test_a_client_says_which_run_it_has_joined_and_with_what(scene: Scene) -> None:
    """Then a line for each order."""
    server = scene.server("--task", TASK, "--min-clients", 1, "--rounds", 2)
    client = scene.client("0-1", server.address, "--task", TASK)
    assert client.wait() == 0
    text = "\n".join(client.lines)
    assert f"connected to {server.address}: run run1-" in text
    assert f"task {TASK}, 2 rounds" in text
    assert client.count_lines(r"2 clients \(0-1\) have \d+ examples; waiting for the first") == 1
    for client_id, number in itertools.product((0, 1), (1, 2)):
        assert (
            client.count_lines(f"client {client_id}, round {number}: update stored .*steps.*loss")
            == 1
        )


def test_a_state_dir_with_a_file_named_as_a_folder_is_refused_with_a_sentence(
    server: Server, session_scene: Scene
) -> None:
    """What the client itself can't write is no error of the task's own code: no traceback."""
    folder = session_scene.folder / "client-spoilt"
    folder.mkdir()
    (folder / "outbox").write_bytes(b"no folder")
    client = session_scene.client(70, server.address, "--task", TASK, state="client-spoilt")
    assert client.wait() == 1
    assert client.count_lines("Traceback") == 0
    assert f"{folder / 'outbox'} can't be used" in client.lines[-1]
