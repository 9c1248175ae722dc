"""The live view and the curve: what a person is shown of a run."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fedrounds.diagnosis.as_json import diagnosis_fields
from fedrounds.goals import Goal
from fedrounds.types import Counters, EntryKind
from fedserver.clients.open_orders import OpenOrders
from fedserver.history import AttemptResult
from fedserver.models.checkpoints import Checkpoints
from fedserver.models.client_metrics import client_evaluation_events, summarise_clients
from fedserver.monitoring.terminal import LiveView
from fedserver.phases import OrderState, Phase
from fedserver.records import Event, ModelEvaluation
from fedserver.reporting.tables import draw_curve
from tests.factories import (
    make_diagnosis,
    make_event,
    make_limits,
    make_order,
    make_round,
    make_update,
)

BAR = "\N{BOX DRAWINGS HEAVY HORIZONTAL}"
PIXELS_AT = 16
"""Where a PNG's header says its width and height, four bytes each."""


@pytest.fixture
def open_orders(tmp_path: Path) -> OpenOrders:
    """Give the open orders of round 1 for clients 0 and 1."""
    opened = make_round()
    base = Checkpoints(tmp_path, {"w": EntryKind.PARAMETER}).save_initial({"w": torch.zeros(1)})
    open_orders = OpenOrders()
    open_orders.start_round(
        opened,
        base=base,
        limits=make_limits(),
        orders=[make_order(order.order_id, client_id=order.client_id) for order in opened.orders],
    )
    return open_orders


def shown(view: LiveView) -> list[str]:
    """Return the lines of the view in a terminal of 80 columns."""
    console = Console(width=80, height=24)
    with console.capture() as captured:
        console.print(view.render())
    return captured.get().splitlines()


def evaluated(round_number: int, accuracy: float) -> Event:
    """Return what the server says of a model it has looked at."""
    event = make_event("evaluated", round_number=round_number)
    return replace(event, fields={"accuracy": accuracy, "loss": 1.0})


def test_the_view_tells_round_clients_and_accuracy(open_orders: OpenOrders) -> None:
    """One client trains, the other's update is stored; round 2 was better than round 3."""
    view = LiveView(open_orders, total_rounds=10)
    order = open_orders.open_order_of([0])
    assert order is not None
    open_orders.hand_out(order)
    counters = Counters(
        batches=7, batches_total=20, evaluation_batches=2, evaluation_batches_total=4
    )
    open_orders.advance(order.order.order_id, counters)
    other = open_orders.open_order_of([1])
    assert other is not None
    open_orders.settle(other.order.order_id, OrderState.STORED)
    view.hear(evaluated(2, 0.75))
    view.hear(evaluated(3, 0.5))
    updates = [make_update(metrics={"global_accuracy": accuracy}) for accuracy in (0.25, 0.75)]
    for event in client_evaluation_events(
        make_round(round_number=3), summarise_clients(updates, holdout=0)
    ):
        view.hear(event)
    lines = shown(view)
    assert lines[0] == "round 1 of 10: 1 of 2 updates"
    assert re.fullmatch(r"elapsed \d+ s", lines[1])
    assert lines[2] == "accuracy 50.00% after round 3, best 75.00% after 2"
    spread = "accuracy on clients: mean 50.00%, worst tenth 25.00%, std 25.00% after round 2"
    assert lines[3].rstrip() == spread
    assert lines[4].startswith("client 0")
    assert lines[4].rstrip().endswith("step 5 of 16")
    assert lines[5].rstrip().endswith("update stored")
    assert (lines[4].count(BAR), lines[5].count(BAR)) == (10, 30)


def test_the_view_tells_how_long_the_run_takes(open_orders: OpenOrders) -> None:
    """Rounds of 60 and 90 s: the other 8 take 75 s each, of the third 30 s have passed."""
    now = [0.0]
    view = LiveView(open_orders, total_rounds=10, clock=lambda: now[0])
    now[0] = 1000.0
    for kind, number, at in (
        ("round-opened", 1, 1000.0),
        ("round-done", 1, 1060.0),
        ("round-opened", 2, 1060.0),
        ("round-done", 2, 1150.0),
        ("round-opened", 3, 1150.0),
    ):
        now[0] = at
        view.hear(make_event(kind, round_number=number))
    now[0] = 1180.0
    assert shown(view)[1] == "elapsed 3 min, about 9 min 30 s left"
    # A round that takes longer than those before: nothing says when it ends, but for the others.
    now[0] = 1400.0
    assert shown(view)[1] == "elapsed 6 min 40 s, about 8 min 45 s left"


def test_a_server_that_was_started_again_tells_of_the_time_before(open_orders: OpenOrders) -> None:
    """4 rounds took 400 s; of the fifth, which goes on, 20 s have passed since the restart."""
    now = [0.0]
    view = LiveView(open_orders, total_rounds=10, num_done=4, spent_s=400.0, clock=lambda: now[0])
    shown(view)
    now[0] = 20.0
    assert shown(view)[1] == "elapsed 7 min, about 10 min left"


def test_an_upload_is_shown_by_its_bytes(open_orders: OpenOrders) -> None:
    view = LiveView(open_orders, total_rounds=10)
    order = open_orders.open_order_of([0])
    assert order is not None
    assert any("client 0" in line and "not heard from yet" in line for line in shown(view))
    open_orders.hand_out(order)
    assert any("client 0" in line and "getting ready" in line for line in shown(view))
    open_orders.advance(
        order.order.order_id, Counters(batches=20, batches_total=20, bytes_sent=2_500_000)
    )
    assert any("uploading, 2.5 MB sent" in line for line in shown(view))


def test_the_newest_incidents_stay_in_view(open_orders: OpenOrders) -> None:
    """Five of seven, each on one line, until others push them out."""
    view = LiveView(open_orders, total_rounds=10)
    for number in range(7):
        event = make_event("client-stalled", round_number=number)
        view.hear(replace(event, is_incident=True, client_id=4))
    incidents = [line.rstrip() for line in shown(view) if line.startswith("! ")]
    assert incidents == [
        f"! round {number}, client 4: it got no further and was given up" for number in range(2, 7)
    ]


def test_between_rounds_the_view_counts_those_that_are_done(open_orders: OpenOrders) -> None:
    view = LiveView(open_orders, total_rounds=3)
    view.hear(make_event("round-done", round_number=1))
    open_orders.close_round()
    assert shown(view)[0] == "1 of 3 rounds done"
    assert shown(view)[2] == "no accuracy yet"
    view.hear(make_event("round-done", round_number=2))
    taken_back = make_event("model-rolled-back", round_number=2)
    view.hear(replace(taken_back, is_incident=True))
    assert shown(view)[0] == "1 of 3 rounds done"


def test_a_run_that_goes_on_knows_its_best_round(open_orders: OpenOrders) -> None:
    """After a restart: the best of all its rounds, not of those since."""
    past = {
        1: ModelEvaluation(accuracy=0.75, loss=1.0),
        2: ModelEvaluation(accuracy=None, loss=None),
    }
    view = LiveView(open_orders, total_rounds=5, num_done=3, evaluated=past)
    assert shown(view)[2].rstrip() == "accuracy 75.00% after round 1, best 75.00% after 1"
    view.hear(evaluated(3, 0.5))
    assert shown(view)[2].rstrip() == "accuracy 50.00% after round 3, best 75.00% after 1"
    open_orders.close_round()
    assert shown(view)[0] == "3 of 5 rounds done"


def test_a_model_without_an_accuracy_changes_nothing(open_orders: OpenOrders) -> None:
    view = LiveView(open_orders, total_rounds=3)
    fields = {"accuracy": None, "loss": 0.5}
    view.hear(replace(make_event("evaluated", round_number=1), fields=fields))
    assert shown(view)[2] == "no accuracy yet"


def test_a_diagnosis_is_shown_in_its_sentence_the_moment_it_comes(open_orders: OpenOrders) -> None:
    view = LiveView(open_orders, total_rounds=3)
    event = make_event("training-diagnosed", round_number=2)
    fields = {"step": 17, **diagnosis_fields(make_diagnosis())}
    view.hear(replace(event, is_incident=True, client_id=3, fields=fields))
    text = " ".join(line.strip() for line in shown(view) if "client" in line or "on" in line)
    assert (
        "! round 2, client 3: bad-data at step 17 (2 samples with NaN in the input): dropped, "
        "training went on"
    ) in text


def make_result(
    round_number: int, phase: Phase, evaluation: ModelEvaluation | None
) -> AttemptResult:
    """Return the result of an attempt whose clients weren't asked."""
    return AttemptResult(
        round_number=round_number,
        attempt=1,
        phase=phase,
        base_digest="00" * 32,
        model_digest="ab" * 32,
        evaluation=evaluation,
        client_evaluation=None,
        has_confusion=False,
    )


@pytest.mark.parametrize("accuracies", [[], [0.5], [0.5, 0.75, 0.875]], ids=len)
def test_the_curve_is_drawn_of_as_many_rounds_as_there_are(
    tmp_path: Path, accuracies: list[float]
) -> None:
    """Also of a run without a held-out set, and of one round."""
    history = [
        make_result(number, Phase.DONE, ModelEvaluation(accuracy=accuracy, loss=1.0))
        for number, accuracy in enumerate(accuracies, start=1)
    ]
    picture = tmp_path / "curve.png"
    draw_curve([*history, make_result(9, Phase.COLLECTING, None)], picture)
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert int.from_bytes(content[PIXELS_AT : PIXELS_AT + 4]) == 840  # 7 inches of 120 pixels


def test_the_best_round_is_that_of_the_goal(open_orders: OpenOrders) -> None:
    """Beside the number of the goal the last accuracy is shown, where there is one."""
    view = LiveView(open_orders, total_rounds=3, goal=Goal("f1", is_highest=True))
    assert shown(view)[2].rstrip() == "no f1 yet"
    for number, (accuracy, f1) in enumerate(((0.5, 0.75), (0.625, 0.25), (None, None)), start=1):
        fields = {"accuracy": accuracy, "loss": 1.0, "f1": f1}
        view.hear(replace(make_event("evaluated", round_number=number), fields=fields))
    line = "accuracy 62.50%, f1 0.25 after round 2, best 0.75 after 1"
    assert shown(view)[2].rstrip() == line
