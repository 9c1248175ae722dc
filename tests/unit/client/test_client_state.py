"""What a client keeps between orders: in force is what went with the last order that counts."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedclient.state import ClientState, ClientStates, StateLost
from fedrounds.doctor.remedy_decay import RemedyDecay


def state(rate_factor: float) -> ClientState:
    """Return a state with this rate factor."""
    treatment = RemedyDecay().treatment
    return ClientState(
        remedy_decay=RemedyDecay(treatment=replace(treatment, rate_factor=rate_factor))
    )


@pytest.fixture
def states(tmp_path: Path) -> ClientStates:
    """Give an empty folder of states."""
    return ClientStates(tmp_path, run_id="run")


def test_only_what_went_with_the_last_counted_order_is_in_force(states: ClientStates) -> None:
    """Nothing before the first; what was kept with an order that never counted is forgotten."""
    assert states.promoted("") == ClientState()
    states.keep("first", state(0.5), follows="")
    assert states.promoted("first") == state(0.5)
    states.keep("late", state(0.25), follows="first")
    assert states.promoted("first") == state(0.5)
    with pytest.raises(StateLost, match="kept with order late is lost"):
        states.promoted("late")


def test_a_round_rolled_back_brings_the_state_before_it_back(states: ClientStates) -> None:
    """Also when its repetition is rolled back, and when it was the first order."""
    states.keep("first", state(0.5), follows="")
    states.promoted("first")
    for attempt in ("second", "second again"):
        states.keep(attempt, state(0.25), follows="first")
        assert states.promoted(attempt) == state(0.25)
        assert states.promoted("first") == state(0.5)
    states.keep("third", state(0.125), follows="first")
    states.promoted("third")
    assert states.promoted("") == ClientState()


def test_no_more_than_two_are_kept(states: ClientStates, tmp_path: Path) -> None:
    before = ""
    for number in range(5):
        states.keep(f"order-{number}", state(0.5), follows=before)
        before = f"order-{number}"
        states.promoted(before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["order-3.json", "order-4.json"]


def keep_at(time: int, states: ClientStates, order_id: str, folder: Path) -> None:
    """Keep a state that is so old: what is made at once has the same age."""
    states.keep(order_id, state(time / 8), follows="")
    os.utime(folder / f"{order_id}.json", (time, time))


def test_an_order_that_names_nothing_that_is_here_takes_nothing_away(
    states: ClientStates, tmp_path: Path
) -> None:
    """A server that is mistaken or malicious doesn't cost a personal model of months."""
    keep_at(1, states, "first", tmp_path)
    keep_at(2, states, "second", tmp_path)
    assert states.promoted("") == ClientState()
    with pytest.raises(StateLost, match="kept with order nobody's is lost"):
        states.promoted("nobody's")
    assert states.promoted("first") == state(1 / 8)


def test_orders_that_are_never_counted_leave_no_more_than_two_states(
    states: ClientStates, tmp_path: Path
) -> None:
    for number in range(5):
        assert states.promoted("") == ClientState()
        assert len(list(tmp_path.iterdir())) <= 2
        keep_at(number, states, f"order-{number}", tmp_path)
    states.promoted("")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["order-3.json", "order-4.json"]


def test_another_run_begins_without_a_state_and_leaves_those_that_are_there(
    states: ClientStates, tmp_path: Path
) -> None:
    """The run before may be gone on with: what was in force in it is in force again."""
    keep_at(1, states, "before", tmp_path)
    keep_at(2, states, "last", tmp_path)
    keep_at(3, states, "late", tmp_path)
    other = ClientStates(tmp_path, run_id="other")
    before = ""
    for time in (4, 5, 6, 7):
        other.promoted(before)
        keep_at(time, other, f"other-{time}", tmp_path)
        before = f"other-{time}"
    assert other.promoted("other-7") == state(7 / 8)
    assert states.promoted("last") == state(2 / 8)


def test_states_do_not_grow_with_the_runs(tmp_path: Path) -> None:
    """The newest three of other runs stay, whatever runs they are of."""
    for number in range(6):
        states = ClientStates(tmp_path, run_id=f"run-{number}")
        states.promoted("")
        keep_at(number, states, f"order-{number}", tmp_path)
    states.promoted("order-5")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"order-{number}.json" for number in (2, 3, 4, 5)]


def test_tensors_are_kept_with_it_and_forgotten_with_it(
    states: ClientStates, tmp_path: Path
) -> None:
    """Bit for bit; damaged tensors are a lost state, not a wrong state."""
    for number in (1, 2, 3):
        kept = ClientState(tensors={"control": {"w": torch.full((2,), number / 3)}})
        states.keep(f"order-{number}", kept, follows=f"order-{number - 1}")
        tensor = states.promoted(f"order-{number}").tensors["control"]["w"]
        assert torch.equal(tensor, torch.full((2,), number / 3))
    assert len(list(tmp_path.iterdir())) == 4
    assert torch.equal(states.promoted("order-2").tensors["control"]["w"], torch.full((2,), 2 / 3))
    (path,) = tmp_path.glob("order-2.control.*")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(StateLost, match="a client algorithm begins anew"):
        states.promoted("order-2")


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"follows": "", "state": {}}', b"\xff"])
def test_a_damaged_state_is_lost(states: ClientStates, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "order.json").write_bytes(content)
    with pytest.raises(StateLost, match="remedies are no longer in force"):
        states.promoted("order")
