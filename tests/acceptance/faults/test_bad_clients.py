"""Clients whose training goes wrong, among many: the model is that of the others alone."""

import pytest

from tests.acceptance.faults.aftermath import conclude, digests, now
from tests.acceptance.federation import (
    expect_clean_exits,
    incident_kinds,
    start_client,
    start_server,
    verdicts,
)
from tests.processes import Scene
from tests.tiers import FULL

pytestmark = [FULL, pytest.mark.timeout(900)]

GOOD = range(7)
BAD = {7: "pixel", 8: "gradient", 9: "gradient"}
ROUNDS = range(1, 4)


def test_three_clients_with_nan_among_ten_leave_no_trace_in_the_model(scene: Scene) -> None:
    """The seven others' models are, to the bit, those of a run with these seven alone."""
    # Nobody is left out by time: it is the training that goes wrong.
    flags = (
        *("--rounds", len(ROUNDS), "--min-updates", len(GOOD), "--seed", 5),
        *("--stall-after", 3600, "--lease", 3600, "--farewell", 120),
    )
    alone = start_server(scene, *flags, "--min-clients", len(GOOD), state="alone")
    expect_clean_exits(
        alone,
        *(
            start_client(scene, client_id, alone.address, state=f"alone-{client_id}")
            for client_id in GOOD
        ),
    )
    struck_at = now()
    server = start_server(scene, *flags, "--min-clients", len(GOOD) + len(BAD))
    good = [start_client(scene, client_id, server.address) for client_id in GOOD]
    bad = [
        start_client(scene, client_id, server.address, "--doctor", "off", TINY_BAD=fault)
        for client_id, fault in BAD.items()
    ]
    expect_clean_exits(server, *good, *bad)
    history = scene.history()
    assert digests(history) == digests(scene.history(state="alone"))
    assert verdicts(history) == [
        (number, client_id, "COUNTED" if client_id in GOOD else "ABANDONED")
        for number in ROUNDS
        for client_id in (*GOOD, *BAD)
    ]
    kinds = incident_kinds(history)
    assert kinds.count("non-finite-loss") == len(ROUNDS)
    assert kinds.count("non-finite-gradient") == 2 * len(ROUNDS)
    conclude(
        scene,
        fault=f"{len(BAD)} clients with NaN among {len(GOOD) + len(BAD)}",
        struck_at=struck_at,
        seen=["the same models as without them"],
    )
