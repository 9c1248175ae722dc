"""Kill -9 and SIGSTOP of the server where an order or a round ends in another way than well.

Peers make the calls by hand: a bad update, one that is late, a client that gives up, a round that
fails. What is recorded before the fault stands after it, once.
"""

import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from shared.failpoints import VARIABLE, FailPoint
from shared.pb import federation_pb2 as pb
from tests.acceptance.faults.aftermath import FULL, conclude, now
from tests.acceptance.faults.test_calls import say_farewell
from tests.acceptance.federation import incident_kinds, start_server, verdicts
from tests.integration.peer import OpenRound, Peer, changed, open_round, payload_of
from tests.processes import Scene, Server, fixed_port, wait_until

OTHER_PLACES = (FailPoint.ORDER_ABANDONED, FailPoint.ROUND_FAILED)
"""Where an undisturbed run never comes by."""

CLIENTS = (0, 1)

pytestmark = FULL

Call = Callable[[], Any]


class Struck:
    """A server that a fault strikes in the middle of a call, and its peers."""

    def __init__(self, scene: Scene, place: FailPoint, action: str, *, times: int = 1) -> None:
        self.struck_at = now()
        self._scene = scene
        self._action = action
        self._flags = (
            *("--port", fixed_port(), "--rounds", 1, "--min-clients", len(CLIENTS)),
            *("--min-updates", 1, "--seed", 5),
        )
        armed = {VARIABLE: f"{place}:{action}:{times}"}
        self.server: Server = start_server(scene, *self._flags, **armed)
        self.peers = self._connect()

    def strike(self, call: Call) -> None:
        """Make the call that leads to the fault, and bring the server back.

        It may be answered a moment before, or never.
        """
        with ThreadPoolExecutor(1) as threads:
            answer = threads.submit(call)
            if self._action == "kill":
                assert self.server.wait() == -signal.SIGKILL
                self.struck_at = now()
                assert isinstance(answer.exception(), grpc.RpcError | None)
                self.server = start_server(self._scene, *self._flags)
                for peer in self.peers.values():
                    peer.close()
                self.peers = self._connect()
            else:
                wait_until(lambda: self.server.is_halted, what="the server to be halted")
                self.struck_at = now()
                self.server.signal(signal.SIGCONT)
                answer.result()

    def end(self) -> None:
        """Let the run end: the second client delivers well in the attempt that is open."""
        current = open_round({1: self.peers[1]})
        answer = self.peers[1].upload(current.orders[1], payload_of(changed(current.base)))
        assert answer.receipt == pb.RECEIPT_STORED
        say_farewell(self.server, self.peers)

    def _connect(self) -> dict[int, Peer]:
        return {one: Peer(self.server.address, one) for one in CLIENTS}


def refused(struck: Struck, opened: OpenRound) -> list[str]:
    """An update with a NaN is refused once, and for the same reason when it is sent again."""
    order = opened.orders[0]
    bad = payload_of(changed(opened.base, float("nan")))
    struck.strike(lambda: opened.peers[0].upload(order, bad))
    again = struck.peers[0].upload(order, bad)
    assert again.receipt == pb.RECEIPT_REFUSED
    assert "holds nan" in again.reason
    return ["update-refused"]


def late(struck: Struck, opened: OpenRound) -> list[str]:
    """An update of an order that its client gave up is late once, and when it is sent again."""
    order, payload = opened.orders[0], payload_of(changed(opened.base))
    opened.peers[0].report(order, gave_up=True)
    struck.strike(lambda: opened.peers[0].upload(order, payload))
    assert struck.peers[0].upload(order, payload).receipt == pb.RECEIPT_LATE
    return ["update-late"]


def given_up(struck: Struck, opened: OpenRound) -> list[str]:
    """An order that is given up stays so."""
    order = opened.orders[0]
    struck.strike(lambda: opened.peers[0].report(order, gave_up=True))
    assert struck.peers[0].report(order, gave_up=True) == pb.DIRECTIVE_ABANDON
    return []


def failed(struck: Struck, opened: OpenRound) -> list[str]:
    """An attempt that everybody gave up has failed, once, and the next one is opened."""
    opened.peers[0].report(opened.orders[0], gave_up=True)
    struck.strike(lambda: opened.peers[1].report(opened.orders[1], gave_up=True))
    struck.peers[0].report(open_round({0: struck.peers[0]}).orders[0], gave_up=True)
    return ["round-failed"]


ENDS = {
    "refused": (refused, FailPoint.UPDATE_RECORDED),
    "late": (late, FailPoint.UPDATE_RECORDED),
    "given up": (given_up, FailPoint.ORDER_ABANDONED),
    "failed": (failed, FailPoint.ROUND_FAILED),
}


@pytest.mark.parametrize("action", ["kill", "halt"])
@pytest.mark.parametrize("end", ENDS)
def test_a_server_struck_when_something_has_ended_badly(
    scene: Scene, end: str, action: str
) -> None:
    """It is on record once, and the run ends with the client that delivers well."""
    bring_about, place = ENDS[end]
    struck = Struck(scene, place, action)
    opened = open_round(struck.peers)
    expected = bring_about(struck, opened)
    struck.end()
    history = scene.history()
    kinds = [kind for kind in incident_kinds(history) if kind != "server-restarted"]
    assert kinds == expected
    counted = [one for one in verdicts(history) if one[2] == "COUNTED"]
    assert counted == [(1, 1, "COUNTED")]
    assert [one["phase"] for one in history] == ["FAILED"] * (end == "failed") + ["DONE"]
    what = "a round" if end == "failed" else "an order"
    name = "kill -9" if action == "kill" else "SIGSTOP"
    conclude(
        scene,
        fault=f"{name} of the server with {what} {end}, recorded and not told",
        struck_at=struck.struck_at,
    )
