"""An HTTP proxy between a client and the server: what it answers in the server's place."""

import shutil
import subprocess
from pathlib import Path

import pytest

from fedclient.connection import Connection
from fedclient.routes import Route
from fedrounds.errors import ProxyRefused, ServerUnreachable
from fedrounds.types import Registration
from tests.acceptance.federation import start_client, start_server
from tests.processes import Scene, fixed_port, wait_until

NGINX = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")

pytestmark = pytest.mark.skipif(NGINX is None, reason="no nginx here: scripts/setup-full nginx")

CONFIGURATION = """
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{}}
http {{
  access_log off;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  server {{
    listen 127.0.0.1:{port} http2;
    client_max_body_size {max_body};
    location {location} {{ grpc_pass grpc://{target}; }}
    location / {{ return 404; }}
  }}
}}
"""


def start_proxy(
    scene: Scene, target: str, *, max_body: str = "0", location: str = "/fed.v1."
) -> str:
    """Start nginx before the server at `target`; returns its address, host:port."""
    assert NGINX is not None
    folder, port = scene.folder / "nginx", fixed_port()
    folder.mkdir()
    path = folder / "nginx.conf"
    path.write_text(
        CONFIGURATION.format(
            folder=folder, port=port, target=target, max_body=max_body, location=location
        )
    )
    # Its error log is opened, for a moment, where it was built to be.
    command = [NGINX, "-e", str(folder / "error.log"), "-c", str(path), "-p", str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def end() -> None:
        process.terminate()
        process.wait()

    scene.at_end(end)
    wait_until(lambda: is_ready(folder, process), what="nginx to listen")
    return f"127.0.0.1:{port}"


def is_ready(folder: Path, process: "subprocess.Popen[bytes]") -> bool:
    """Whether nginx listens; its process id is written then."""
    assert process.poll() is None, (folder / "error.log").read_text()
    return (folder / "nginx.pid").exists()


def test_an_update_that_a_proxy_finds_too_large_ends_the_client_with_what_to_change(
    scene: Scene,
) -> None:
    """Trying again wouldn't help; with the setting changed the same command delivers it."""
    server = start_server(scene, "--rounds", 1, "--min-clients", 1)
    # The update has some 2,000 bytes, the other requests a few hundred.
    address = start_proxy(scene, server.address, max_body="1k")
    client = start_client(scene, 0, address)
    assert client.wait() == 1
    client.wait_for_line("an HTTP proxy on the way answers 413: .*`client_max_body_size 0;`")
    assert client.count_lines("^Traceback") == 0
    again = start_client(scene, 0, server.address)
    again.wait_for_line("update stored")
    assert (again.wait(), server.wait()) == (0, 0)


def test_a_proxy_that_passes_no_calls_on_isnt_asked_again(scene: Scene) -> None:
    """404 is the proxy's own answer, which waiting doesn't change."""
    nobody = f"127.0.0.1:{fixed_port()}"
    elsewhere = start_proxy(scene, nobody, location="/other.")
    registration = Registration(client_ids=(0,), instance_key="key", software_version="1")
    connection = Connection(Route(server=elsewhere))
    with pytest.raises(ProxyRefused, match="answers 404: it doesn't pass these calls on"):
        connection.register(registration)
    connection.close()


def test_a_proxy_whose_server_is_away_is_asked_again(scene: Scene) -> None:
    """502 says that the server isn't there for now."""
    proxy = start_proxy(scene, f"127.0.0.1:{fixed_port()}")
    registration = Registration(client_ids=(0,), instance_key="key", software_version="1")
    connection = Connection(Route(server=proxy))
    with pytest.raises(ServerUnreachable, match="answers 502: it doesn't reach the server"):
        connection.register(registration)
    connection.close()
