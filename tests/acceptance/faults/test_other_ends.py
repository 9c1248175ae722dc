"""Kill -9 and SIGSTOP of the server where an order or a round ends in another way than well.

Peers make the calls by hand: a bad update, one that is late, a client that gives up, a round that
fails. What is recorded before the fault stands after it, once. What goes well is struck in
test_fail_points.py, rolling back in test_bad_models.py.
"""

import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
import pytest

from fedrounds.failpoints import VARIABLE, FailPoint
from fedrounds.wire.pb import federation_pb2 as pb
from tests.acceptance.faults.aftermath import conclude, now
from tests.acceptance.faults.test_calls import say_farewell
from tests.acceptance.federation import incident_kinds, start_server, verdicts
from tests.integration.peer import OpenRound, Peer, changed, open_round, payload_of
from tests.processes import Scene, Server, fixed_port, wait_until
from tests.tiers import FULL

OTHER_FAIL_POINTS = (FailPoint.ORDER_ABANDONED, FailPoint.ROUND_FAILED)
"""Where an undisturbed run never comes by."""

OF_THE_FAULT = ("server-restarted", "server-away")
"""What the fault itself leaves behind: an absence only if it lasts, as on a busy machine."""

pytestmark = FULL

Call = Callable[[], Any]


class Struck:
    """A server that a fault strikes in the middle of a call, and its peers."""

    def __init__(self, scene: Scene, end: "End", action: str) -> None:
        self.struck_at = now()
        self._scene = scene
        self._action = action
        self._clients = range(end.num_clients)
        self._flags = (
            *("--port", fixed_port(), "--rounds", 1, "--min-clients", end.num_clients),
            *("--seed", 5, "--farewell", 120, *end.flags),
        )
        armed = {VARIABLE: f"{end.fail_point}:{action}"}
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

    def end(self, deliverers: tuple[int, ...]) -> None:
        """Let the run end: these clients deliver well in the attempt that is open."""
        if deliverers:
            deliver(
                open_round({client_id: self.peers[client_id] for client_id in deliverers}),
                *deliverers,
            )
        say_farewell(self.server, self.peers)

    def _connect(self) -> dict[int, Peer]:
        return {client_id: Peer(self.server.address, client_id) for client_id in self._clients}


def deliver(opened: OpenRound, *client_ids: int) -> None:
    """Send a good update for each of these clients."""
    for client_id in client_ids:
        answer = opened.peers[client_id].upload(
            opened.orders[client_id], payload_of(changed(opened.base))
        )
        assert answer.receipt == pb.RECEIPT_STORED


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


def closed_without(struck: Struck, opened: OpenRound) -> list[str]:
    """An order that was open when the round closed is late; its update changes nothing."""
    struck.strike(lambda: deliver(opened, 1))
    payload = payload_of(changed(opened.base))
    assert struck.peers[0].upload(opened.orders[0], payload).receipt == pb.RECEIPT_LATE
    return ["update-late"]


def excluded(struck: Struck, opened: OpenRound) -> list[str]:
    """An update far from its cohort's is excluded, once; `verify` finds its bytes in quarantine."""
    far = payload_of(changed(opened.base, by=0.5))
    assert opened.peers[0].upload(opened.orders[0], far).receipt == pb.RECEIPT_STORED
    deliver(opened, 1, 2, 3)
    struck.strike(lambda: deliver(opened, 4))
    return ["update-excluded"]


def failed_by_exclusion(struck: Struck, opened: OpenRound) -> list[str]:
    """The attempt has failed when it was aggregated; the good updates it had count for nothing."""
    return [*excluded(struck, opened), "round-failed"]


@dataclass(frozen=True)
class End:
    """How something ends badly, where the fault strikes, and who counts in spite of it."""

    bring_about: Callable[[Struck, OpenRound], list[str]]
    """Returns the incidents that are then on record."""
    fail_point: FailPoint
    counted: tuple[int, ...] = (1,)
    deliverers: tuple[int, ...] = (1,)
    """Who delivers afterwards, so that the run ends."""
    num_failed: int = 0
    flags: tuple[str | int, ...] = ("--min-updates", 1)
    num_clients: int = 2


ONE_OF_TWO = ("--clients-per-round", 1, "--over-select", 2)
FIVE = (0, 1, 2, 3, 4)
"""Fewer than four updates aren't compared with each other."""

ENDS = {
    "an order refused": End(refused, FailPoint.UPDATE_RECORDED),
    "an order late": End(late, FailPoint.UPDATE_RECORDED),
    "an order given up": End(given_up, FailPoint.ORDER_ABANDONED),
    "an order late at the close": End(
        closed_without, FailPoint.ROUND_CLOSED, deliverers=(), flags=ONE_OF_TWO
    ),
    "an order excluded": End(
        excluded, FailPoint.ROUND_DONE, counted=FIVE[1:], deliverers=(), num_clients=len(FIVE)
    ),
    "a round failed": End(failed, FailPoint.ROUND_FAILED, num_failed=1),
    "a round failed by an exclusion": End(
        failed_by_exclusion,
        FailPoint.ROUND_FAILED,
        counted=FIVE,
        deliverers=FIVE,
        num_failed=1,
        flags=("--min-updates", len(FIVE)),
        num_clients=len(FIVE),
    ),
}


@pytest.mark.parametrize("action", ["kill", "halt"])
@pytest.mark.parametrize("name", ENDS)
def test_a_server_struck_when_something_has_ended_badly(
    scene: Scene, name: str, action: str
) -> None:
    """It is on record once, and the run ends with the clients that deliver well."""
    end = ENDS[name]
    struck = Struck(scene, end, action)
    opened = open_round(struck.peers)
    expected = end.bring_about(struck, opened)
    struck.end(end.deliverers)
    history = scene.history()
    kinds = [kind for kind in incident_kinds(history) if kind not in OF_THE_FAULT]
    assert kinds == expected
    counted = [verdict for verdict in verdicts(history) if verdict[2] == "COUNTED"]
    assert counted == [(1, client_id, "COUNTED") for client_id in end.counted]
    assert [entry["phase"] for entry in history] == ["FAILED"] * end.num_failed + ["DONE"]
    fault = "kill -9" if action == "kill" else "SIGSTOP"
    conclude(
        scene,
        fault=f"{fault} of the server with {name}, recorded and not told",
        struck_at=struck.struck_at,
    )
