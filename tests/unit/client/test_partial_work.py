"""Clients that do a part of their work: what they send of it, and who they are in experiments."""

import itertools
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedrounds.tensors.codec import decode_state
from fedserver.rounds.planning import draw_stragglers
from fedserver.settings import ServerSettings
from fedserver.updates.admission import validate_header
from tests.factories import make_limits
from tests.small_federation import SmallFederation, examples_of, small


def test_who_stops_early_sends_what_it_has_done(tmp_path: Path) -> None:
    """By its own limit, or by the order's deadline: counted as it is, and no empty update."""
    federation = SmallFederation(
        tmp_path, strategy="fedprox", strategy_parameters={"mu": 0.7}, batch_size=4, epochs=3
    )
    start = federation.state
    orders = federation.open_round((1,))
    whole = federation.train(orders[0])
    assert (whole.update.num_steps, whole.update.num_examples) == (9, 12)
    within_first = federation.train(orders[0], max_steps=2)
    assert (within_first.update.num_steps, within_first.update.num_examples) == (2, 8)
    later = federation.train(orders[0], max_steps=4)
    assert (later.update.num_steps, later.update.num_examples) == (4, 12)
    hurried = SmallFederation(
        tmp_path / "hurried", batch_size=4, epochs=3, work_deadline=1e-9
    ).play_round((1,))
    assert hurried[0].update.num_steps == 1
    sent = decode_state(later.payload.read_bytes())
    assert any(not torch.equal(sent[name], start[name]) for name in start)


def test_a_loss_beyond_all_bounds_is_left_out_and_the_update_is_good(tmp_path: Path) -> None:
    """Targets in unusual units may make it so large; nothing is wrong with their client."""

    def large(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets) + 1e31

    federation = SmallFederation(
        tmp_path, task=replace(small, loss=large), evaluate_on_clients=True, batch_size=4
    )
    [order] = federation.open_round((1,))
    sent = federation.train(order)
    assert set(sent.update.metrics) == {
        *("accuracy", "train_s", "global_accuracy", "global_examples"),
    }
    validate_header(sent.update, federation.model.file, make_limits(max_steps_per_example=5))


def test_two_trainings_of_an_order_share_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that goes on by a second a look: each of Ditto's two may look at it half as often."""
    looks = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: float(next(looks)))
    monkeypatch.setattr("fedclient.training.time", clock)
    given: dict[str, Any] = {"batch_size": 4, "epochs": 9, "work_deadline": 12}
    [alone] = SmallFederation(tmp_path / "alone", **given).play_round((1,))
    [shared] = SmallFederation(
        tmp_path, strategy="ditto", strategy_parameters={"strength": 0.1}, **given
    ).play_round((1,))
    assert (alone.update.num_steps, shared.update.num_steps) == (12, 6)


def test_a_personal_training_that_cant_be_cured_takes_no_update_with_it(tmp_path: Path) -> None:
    """The loss is NaN from the second training's 50th step on: the first's update is FedAvg's.

    The personal model keeps what it learned before.
    """
    num_losses = itertools.count()

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        healthy = F.cross_entropy(outputs, labels)
        if not torch.is_grad_enabled() or next(num_losses) < 60 + 50:
            return healthy
        return healthy * math.nan

    federation = SmallFederation(
        tmp_path,
        task=replace(small, loss=loss),
        epochs=60,
        strategy="ditto",
        strategy_parameters={"strength": 0.1},
    )
    plain = SmallFederation(tmp_path / "plain", epochs=60)
    start = federation.state
    [sent] = federation.play_round((1,))
    plain.play_round((1,))
    assert federation.model.digest == plain.model.digest
    assert federation.diagnoses == [], "the server hears of nothing that concerns its model"
    kept = federation.kept_by(1, "ditto")
    assert all(bool(entry.isfinite().all()) for entry in kept.values())
    assert not torch.equal(kept["weight"], start["weight"])
    inputs, labels = examples_of(1).tensors
    personal = F.cross_entropy(F.linear(inputs, kept["weight"], kept["bias"]), labels)
    assert sent.update.metrics["personal_loss"] == pytest.approx(personal.item())


def test_stragglers_are_a_share_of_each_round_with_epochs_of_their_own(tmp_path: Path) -> None:
    """Drawn anew for each round, the same in a repetition; 1 to all of the epochs."""
    federation = SmallFederation(tmp_path, stragglers=0.9, epochs=20)
    cohort = range(10)
    rounds = [[order.training.epochs for order in federation.open_round(cohort)] for _ in range(30)]
    assert all(sum(epochs == 20 for epochs in assigned) >= 1 for assigned in rounds)
    drawn = [epochs for assigned in rounds for epochs in assigned if epochs != 20]
    assert set(drawn) == set(range(1, 20))
    assert len({tuple(assigned) for assigned in rounds}) == 30
    attempt = {"round_number": 3, "attempt": 1}
    settings = ServerSettings(stragglers=0.9, epochs=20)
    again = draw_stragglers(cohort, settings, **attempt)
    assert len(again) == 9
    assert again == draw_stragglers(list(cohort)[::-1], settings, **attempt)
    assert [again.get(client_id, 20) for client_id in cohort] == rounds[2]
