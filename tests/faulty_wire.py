"""A TCP proxy between clients and a server, with the faults that a network has.

Bytes are counted as they go through, for each of the two ways over all connections, and a fault can
be set for the moment when so many more have gone: `hold` (nothing more goes through, as when every
packet is dropped, until `release`), `cut` (both ends get a reset), `flip` (one bit of one byte).
`slow_down` delays and throttles from now on, `leave_hanging` breaks connections so that one end
never hears of it, `silence` turns the connections that there are into black holes. What a
connection still holds in the kernel's buffers when it is cut is lost.
"""

import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from enum import Enum, auto

from tests.processes import GENEROUS_S, Scene

PIECE_BYTES = 1 << 16
"""What goes on at once, at most."""
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Way(Enum):
    """Where bytes go."""

    UP = auto()
    """From a client to the server."""
    DOWN = auto()
    """From the server to a client."""


class End(Enum):
    """Who is at one end of a connection."""

    CLIENT = auto()
    SERVER = auto()


class _Fault(Enum):
    HOLD = auto()
    CUT = auto()
    FLIP = auto()


@dataclass
class Link:
    """One connection through the wire, and what has gone through it."""

    client: socket.socket
    server: socket.socket
    passed_bytes: dict[Way, int] = field(default_factory=lambda: dict.fromkeys(Way, 0))
    is_over: bool = False
    is_silent: bool = False
    left_at: dict[End, float] = field(default_factory=dict)
    """When an end left a silent link, by the monotonic clock."""


class FaultyWire:
    """Forwards to `target`, host:port, what comes to `address`."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._changed = threading.Condition()
        self._faults: dict[Way, tuple[float, _Fault]] = {}
        self._delay_s = 0.0
        self._bytes_per_s: dict[Way, float] = {}
        self._is_closed = threading.Event()
        self.links: list[Link] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def passed_bytes(self, way: Way, *, since_link: int = 0) -> int:
        """Return how much has gone this way, over all connections from number `since_link` on."""
        return sum(link.passed_bytes[way] for link in self.links[since_link:])

    def hold(self, *ways: Way, after_bytes: int = 0) -> None:
        """Let `after_bytes` more go these ways, then nothing until `release`.

        Connections are still accepted. With both ways and no bytes it is a black hole.
        """
        for way in ways:
            self._set(way, _Fault.HOLD, after_bytes)

    def cut(self, way: Way, *, after_bytes: int) -> None:
        """Reset the connection over which the byte after so many more would go this way."""
        self._set(way, _Fault.CUT, after_bytes)

    def flip(self, way: Way, *, after_bytes: int) -> None:
        """Change one bit of the byte after so many more."""
        self._set(way, _Fault.FLIP, after_bytes)

    def wait_until_held(self, way: Way, timeout_s: float = GENEROUS_S) -> None:
        """Return once all that may go through has gone."""
        with self._changed:
            is_held = self._changed.wait_for(
                lambda: self.passed_bytes(way) >= self._faults[way][0], timeout_s
            )
        assert is_held, f"{self.passed_bytes(way)} of {self._faults[way][0]} bytes went {way.name}"

    def wait_until_struck(self, way: Way, timeout_s: float = GENEROUS_S) -> None:
        """Return once the cut or the flip has struck."""
        with self._changed:
            has_struck = self._changed.wait_for(lambda: way not in self._faults, timeout_s)
        assert has_struck, f"{self.passed_bytes(way)} of {self._faults[way][0]} bytes {way.name}"

    def release(self, *ways: Way) -> None:
        """Let everything through, one way or both; what was held goes first."""
        with self._changed:
            for way in ways or Way:
                self._faults.pop(way, None)
            self._changed.notify_all()

    def slow_down(self, *, delay_s: float = 0, bytes_per_s: dict[Way, float] | None = None) -> None:
        """Deliver every piece later, and only so much a second each way; from now on."""
        with self._changed:
            self._delay_s = delay_s
            self._bytes_per_s = bytes_per_s or {}

    def leave_hanging(self, end: End) -> None:
        """Break every connection so that only the other end learns of it."""
        for link in self.links:
            with self._changed:
                was_over, link.is_over = link.is_over, True
                self._changed.notify_all()
            if not was_over:
                _reset(link.client if end is End.SERVER else link.server)

    def silence(self) -> list[Link]:
        """Turn all connections that there are into black holes, and return them.

        Each end goes on writing, as to a relay that has lost its way on, and hears nothing.
        """
        with self._changed:
            silenced = [link for link in self.links if not link.is_over]
            for link in silenced:
                link.is_silent = True
            self._changed.notify_all()
        return silenced

    def wait_until_left(self, links: list[Link], timeout_s: float = GENEROUS_S) -> None:
        """Return once both ends have left all these silent connections."""
        with self._changed:
            have_left = self._changed.wait_for(
                lambda: all(len(link.left_at) == len(End) for link in links), timeout_s
            )
        assert have_left, f"still there: {[set(End) - set(link.left_at) for link in links]}"

    def close(self) -> None:
        """Cut every connection."""
        self._is_closed.set()
        with self._changed:
            self._changed.notify_all()
        self._listener.close()
        for link in self.links:
            link.client.close()
            link.server.close()

    def _set(self, way: Way, fault: _Fault, after_bytes: int) -> None:
        with self._changed:
            self._faults[way] = (self.passed_bytes(way) + after_bytes, fault)
            self._changed.notify_all()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(self._target)
            except OSError:
                _reset(client)
                continue
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            link = Link(client, server)
            self.links.append(link)
            for way in Way:
                threading.Thread(target=self._pump, args=(link, way), daemon=True).start()

    def _pump(self, link: Link, way: Way) -> None:
        ends = (link.client, link.server)
        source, sink = ends if way is Way.UP else ends[::-1]
        try:
            while data := source.recv(PIECE_BYTES):
                while data:
                    now = self._admitted(link, way, data)
                    if link.is_silent:
                        break
                    if not now:
                        return
                    sink.sendall(now)
                    data = data[len(now) :]
        except OSError:
            pass
        finally:
            with self._changed:
                if link.is_silent:
                    link.left_at[End.CLIENT if way is Way.UP else End.SERVER] = time.monotonic()
                was_over, link.is_over = link.is_over, link.is_over or not link.is_silent
                self._changed.notify_all()
            if not was_over and not link.is_silent:
                _end(link.client, link.server)

    def _admitted(self, link: Link, way: Way, data: bytes) -> bytes:
        """Return what of `data` goes on now, once anything may; nothing if the link is over."""
        pause_s = self._delay_s + min(len(data), PIECE_BYTES) / self._bytes_per_s.get(way, 1e12)
        if pause_s > 1e-4:
            self._is_closed.wait(pause_s)
        with self._changed:
            while not (self._is_closed.is_set() or link.is_over or link.is_silent):
                position, fault = self._faults.get(way, (float("inf"), _Fault.HOLD))
                room = position - self.passed_bytes(way)
                if room <= 0 and fault is _Fault.HOLD:
                    self._changed.wait()
                    continue
                if room <= 0:
                    del self._faults[way]
                    self._changed.notify_all()
                if room <= 0 and fault is _Fault.CUT:
                    link.is_over = True
                    _reset(link.client)
                    _reset(link.server)
                    return b""
                if room <= 0:
                    now = bytes([data[0] ^ 1])
                else:
                    now = data if room >= len(data) else data[: int(room)]
                link.passed_bytes[way] += len(now)
                self._changed.notify_all()
                return now
        return b""


def wire_to(scene: Scene, address: str) -> FaultyWire:
    """Put a wire between clients and the server at `address`, for as long as the scene lasts."""
    wire = FaultyWire(address)
    scene.at_end(wire.close)
    return wire


def _reset(end: socket.socket) -> None:
    """End a connection at once, as a machine that knows nothing of it does."""
    try:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        # Wakes the thread that reads from it and sends nothing.
        end.shutdown(socket.SHUT_RD)
    except OSError:
        pass
    end.close()


def _end(*sockets: socket.socket) -> None:
    """End connections as a process that ends does: what was sent still arrives."""
    for end in sockets:
        try:
            end.shutdown(socket.SHUT_RDWR)
        except OSError:
            continue
