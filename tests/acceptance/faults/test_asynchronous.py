"""Kill -9 of either side of an asynchronous run: a round is a full buffer, whoever filled it.

Which updates meet in a buffer depends on who is fast, so there is no run to compare with: what was
acknowledged counts, once, and every model is the one that its recorded buffer makes.
"""

import signal

import pytest

from fedrounds.failpoints import VARIABLE, FailPoint
from tests.acceptance.conftest import CLIENTS
from tests.acceptance.faults.aftermath import conclude, now
from tests.acceptance.federation import expect_clean_exits, start_client, start_server
from tests.processes import Scene, fixed_port
from tests.tiers import FULL

NUM_ROUNDS = 6
BUFFER_SIZE = 2
VICTIM = 1
SERVER_FAIL_POINTS = {
    FailPoint.UPDATE_DURABLE: 3,
    FailPoint.UPDATE_RECORDED: 3,
    FailPoint.ROUND_CLOSING: 2,
    FailPoint.ROUND_CLOSED: 2,
    FailPoint.MODEL_WRITTEN: 2,
    FailPoint.ROUND_DONE: 2,
}
"""How often the server comes by until it is struck: in the second buffer."""
CLIENT_FAIL_POINTS = (
    FailPoint.ORDER_PULLED,
    FailPoint.TRAINED,
    FailPoint.UPDATE_KEPT,
    FailPoint.RECEIPT_GIVEN,
)


def run_flags(port: int) -> list[str | int]:
    """Return the server's flags, the same at every start."""
    return [
        *("--port", port, "--rounds", NUM_ROUNDS, "--min-clients", len(CLIENTS), "--seed", 5),
        *("--strategy", "fedbuff", "--strategy-parameters", f"buffer_size={BUFFER_SIZE}"),
        *("--keep-updates", "all", "--norm-band", 0, "--farewell", 120),
    ]


def expect_whole_run(scene: Scene) -> None:
    """Examine that every buffer was filled once."""
    history = scene.history()
    assert [(entry["round"], entry["attempt"], entry["phase"]) for entry in history] == [
        (number, 1, "DONE") for number in range(1, NUM_ROUNDS + 1)
    ]
    filled = [
        [update["order_id"] for update in entry["updates"] if update["verdict"] == "COUNTED"]
        for entry in history
    ]
    assert [len(orders) for orders in filled] == [BUFFER_SIZE] * NUM_ROUNDS
    assert len({order for orders in filled for order in orders}) == BUFFER_SIZE * NUM_ROUNDS


@pytest.mark.parametrize(
    "fail_point",
    [
        pytest.param(
            fail_point,
            id=str(fail_point),
            marks=() if fail_point is FailPoint.UPDATE_RECORDED else FULL,
        )
        for fail_point in SERVER_FAIL_POINTS
    ],
)
def test_an_asynchronous_server_killed_at(scene: Scene, fail_point: FailPoint) -> None:
    """Started again with the same command it goes on with the buffer it had."""
    flags = run_flags(fixed_port())
    server = start_server(
        scene, *flags, **{VARIABLE: f"{fail_point}:kill:{SERVER_FAIL_POINTS[fail_point]}"}
    )
    clients = [start_client(scene, client_id, server.address) for client_id in CLIENTS]
    assert server.wait() == -signal.SIGKILL
    struck_at = now()
    before = scene.history()[-1]
    server = start_server(scene, *flags)
    expect_clean_exits(server, *clients)
    expect_whole_run(scene)
    conclude(
        scene,
        fault=f"kill -9 of an asynchronous server at {fail_point}",
        struck_at=struck_at,
        seen=[f"round {before['round']} {before['phase']}"],
        is_asynchronous=True,
    )


@FULL
@pytest.mark.parametrize("fail_point", CLIENT_FAIL_POINTS)
def test_a_client_of_an_asynchronous_run_killed_at(scene: Scene, fail_point: FailPoint) -> None:
    """Nobody waits for it; back again, it delivers the order it had, once."""
    server = start_server(scene, *run_flags(0))
    victim = start_client(scene, VICTIM, server.address, **{VARIABLE: f"{fail_point}:kill:1"})
    others = [
        start_client(scene, client_id, server.address)
        for client_id in CLIENTS
        if client_id != VICTIM
    ]
    assert victim.wait() == -signal.SIGKILL
    struck_at = now()
    victim = start_client(scene, VICTIM, server.address)
    expect_clean_exits(server, victim, *others)
    expect_whole_run(scene)
    conclude(
        scene,
        fault=f"kill -9 of a client of an asynchronous run at {fail_point}",
        struck_at=struck_at,
        is_asynchronous=True,
    )
