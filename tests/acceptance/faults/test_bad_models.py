"""Kill -9 and SIGSTOP of the server on the way back from a bad global model.

Peers deliver a model in the second round that answers one class to everything. Wherever the fault
strikes, the model is taken back once, and the round repeated from the one before it with half the
rate: what is decided is in the store before anybody acts on it.
"""

import signal

import grpc
import pytest

from fedrounds.failpoints import VARIABLE, FailPoint
from fedrounds.wire.pb import federation_pb2 as pb
from tests.acceptance.faults.aftermath import conclude, now
from tests.acceptance.faults.test_calls import say_farewell
from tests.acceptance.federation import start_server
from tests.integration.peer import OpenRound, Peer, State, changed, open_round, payload_of
from tests.processes import Scene, Server, fixed_port, wait_until
from tests.tiers import FULL

BAD_MODEL_FAIL_POINTS = {
    FailPoint.EVALUATED: 2,
    FailPoint.ALARM_RECORDED: 1,
    FailPoint.ROLLED_BACK: 1,
    FailPoint.ROUND_OPENED: 2,
    FailPoint.ROUND_DONE: 3,
}
"""How often the server comes by until the fault strikes. It opens the first round by itself and the
repeated one; done are the first round, the second, and the second again."""

CLIENTS = (0, 1)
LR = 0.25
QUICK = {("kill", FailPoint.ALARM_RECORDED), ("kill", FailPoint.ROLLED_BACK)}


class Striking:
    """A server with a fault in it, and its peers; brought back as often as it goes."""

    def __init__(self, scene: Scene, fail_point: FailPoint, action: str) -> None:
        self.struck_at = now()
        self._scene = scene
        self._action = action
        self._flags = (
            *("--port", fixed_port(), "--rounds", 3, "--min-clients", len(CLIENTS)),
            *("--require-all", "--lr", LR, "--keep-updates", "all"),
        )
        armed = {VARIABLE: f"{fail_point}:{action}:{BAD_MODEL_FAIL_POINTS[fail_point]}"}
        self.server: Server = start_server(scene, *self._flags, **armed)
        self.peers = self._connect()

    def bring_back(self) -> None:
        """Wait for the fault to strike, and start the server again or let it go on."""
        if self._action == "kill":
            assert self.server.wait() == -signal.SIGKILL
            self.struck_at = now()
            self.server = start_server(self._scene, *self._flags)
            for peer in self.peers.values():
                peer.close()
            self.peers = self._connect()
        else:
            wait_until(lambda: self.server.is_halted, what="the server to be halted")
            self.struck_at = now()
            self.server.signal(signal.SIGCONT)

    def deliver(self, opened: OpenRound, by: State) -> None:
        """Upload an update for every client of a round; the last answer may never come."""
        payload = payload_of(by)
        for client_id, order in opened.orders.items():
            try:
                answer = self.peers[client_id].upload(order, payload)
            except grpc.RpcError:
                assert client_id == CLIENTS[-1]
            else:
                assert answer.receipt in (pb.RECEIPT_STORED, pb.RECEIPT_DUPLICATE)

    def await_order(self, round_number: int, attempt: int) -> OpenRound:
        """Return a round once its orders are there; the fault may strike meanwhile."""
        while True:
            try:
                return open_round(self.peers, attempt=(round_number, attempt))
            except grpc.RpcError:
                self.bring_back()

    def _connect(self) -> dict[int, Peer]:
        return {client_id: Peer(self.server.address, client_id) for client_id in CLIENTS}


def poisoned(base: State) -> State:
    """Return a model that answers class 0 to everything."""
    state = changed(base)
    state["3.bias"][0] += 100
    return state


def cases(action: str) -> list[object]:
    """Return the fail points, those that plain `pytest` leaves out marked so."""
    return [
        pytest.param(
            action,
            fail_point,
            id=f"{fail_point}-{action}",
            marks=() if (action, fail_point) in QUICK else FULL,
        )
        for fail_point in BAD_MODEL_FAIL_POINTS
    ]


@pytest.mark.parametrize(("action", "fail_point"), [*cases("kill"), *cases("halt")])
def test_a_server_struck_on_the_way_back_from_a_bad_model(
    scene: Scene, action: str, fail_point: FailPoint
) -> None:
    """It is taken back once and the round repeated with half the rate, as without the fault."""
    striking = Striking(scene, fail_point, action)
    first = striking.await_order(1, 1)
    striking.deliver(first, changed(first.base))
    second = striking.await_order(2, 1)
    striking.deliver(second, poisoned(second.base))
    is_struck_later = fail_point is FailPoint.ROUND_DONE
    if not is_struck_later:
        striking.bring_back()
    again = striking.await_order(2, 2)
    assert {order.training.lr for order in again.orders.values()} == {LR / 2}
    assert again.orders[0].sections == second.orders[0].sections
    # The order that was counted in the bad model isn't the client's last any more.
    assert again.orders[0].last_counted_order_id == first.orders[0].order_id
    striking.deliver(again, changed(again.base))
    if is_struck_later:
        striking.bring_back()
    third = striking.await_order(3, 2)
    assert {order.training.lr for order in third.orders.values()} == {LR}
    striking.deliver(third, changed(third.base))
    say_farewell(striking.server, striking.peers)

    history = scene.history()
    assert [(entry["round"], entry["attempt"], entry["phase"]) for entry in history] == [
        (1, 1, "DONE"),
        (2, 1, "ROLLED_BACK"),
        (2, 2, "DONE"),
        (3, 1, "ABANDONED"),
        (3, 2, "DONE"),
    ]
    kinds = [
        incident["kind"]
        for entry in history
        for incident in entry["incidents"]
        if incident["kind"] != "server-restarted"
    ]
    assert kinds == ["evaluation-collapsed", "model-rolled-back", "round-abandoned"]
    name = "kill -9" if action == "kill" else "SIGSTOP"
    conclude(
        scene,
        fault=f"{name} of the server at {fail_point}, its model being bad",
        struck_at=striking.struck_at,
    )
