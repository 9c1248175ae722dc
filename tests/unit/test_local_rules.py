"""Local rules against their papers' formulas, written out here in plain PyTorch."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fedclient.local_rules import correction_of
from fedserver.planning import draw_stragglers
from fedserver.settings import ServerSettings
from fedserver.strategies import find_strategy
from shared.codec import decode_state
from shared.corrections import Correction
from shared.diagnosis import DoctorSettings
from shared.errors import InvalidInput, WrongSettings
from shared.training import train_model
from shared.types import LocalRule
from tests.small_federation import SmallFederation, examples_of, gradient_of

LR = 0.1
CLIENTS = (0, 1, 2)
Vector = dict[str, Tensor]


def assert_near(found: Vector, expected: Vector) -> None:
    """Hold that two states are the same but for rounding in float64."""
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        torch.testing.assert_close(found[name], one, rtol=1e-11, atol=1e-12)


def weighted_mean(states: dict[int, Vector]) -> Vector:
    """Return the mean by the number of examples."""
    weights = {client: len(examples_of(client)) for client in states}
    total = sum(weights.values())
    first = next(iter(states.values()))
    return {
        name: torch.stack(
            [weights[one] / total * state[name] for one, state in states.items()]
        ).sum(0)
        for name in first
    }


def fedprox_local(client: int, start: Vector, *, mu: float, steps: int) -> Vector:
    """Return w after gradient steps on f(w) + mu / 2 |w - start|^2."""
    w = dict(start)
    for _ in range(steps):
        g = gradient_of(client, w)
        w = {k: w[k] - LR * (g[k] + mu * (w[k] - start[k])) for k in w}
    return w


def test_fedprox_is_gradient_descent_on_the_paper_s_objective(tmp_path: Path) -> None:
    """Three rounds, clients of different sizes, equation 2 of Li et al. 2020 written out."""
    federation = SmallFederation(tmp_path, strategy="fedprox", strategy_parameters={"mu": 0.7})
    expected = federation.state
    for _ in range(3):
        federation.play_round(CLIENTS)
        expected = weighted_mean(
            {one: fedprox_local(one, expected, mu=0.7, steps=5) for one in CLIENTS}
        )
        assert_near(federation.state, expected)


def test_fedprox_goes_to_the_closed_form_of_a_quadratic() -> None:
    """f(w) = a/2 (w - b)^2 from w0: the minimum lies at (a b + mu w0) / (a + mu)."""
    a, b, w0, mu = 2.0, 3.0, -1.0, 0.5
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.constant_(model.weight, w0)
    batch = [(torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.int64))]
    train_model(
        *(model, batch, 200, 0.1),
        momentum=0.0,
        loss=lambda outputs, _: a / 2 * (outputs - b).square().mean(),
        correction=Correction(pull=mu),
    )
    assert model.weight.item() == pytest.approx((a * b + mu * w0) / (a + mu), rel=1e-12)


@pytest.mark.parametrize("rule", ["fedprox", "median+fedadam+fedprox"])
def test_fedprox_without_a_pull_is_the_same_bytes_as_without_it(tmp_path: Path, rule: str) -> None:
    plain = rule.removesuffix("fedprox").removesuffix("+") or "fedavg"
    digests: list[str] = []
    for name, parameters in ((rule, {"mu": 0.0}), (plain, {}), (rule, {"mu": 0.1})):
        folder = tmp_path / name / str(len(digests))
        federation = SmallFederation(
            folder, strategy=name, strategy_parameters=parameters, momentum=0.9
        )
        for _ in range(2):
            federation.play_round(CLIENTS)
        digests.append(federation.model.digest)
    assert digests[0] == digests[1] != digests[2]


def test_the_doctor_s_replays_repeat_a_correction_and_it_is_added_behind_clipping() -> None:
    """A NaN in the eleventh batch: the doctor goes back, experiments and leaves the batch out."""
    anchor = {"weight": torch.full((1, 2), 0.25), "bias": torch.full((1,), -0.5)}
    shift = {"weight": torch.tensor([[0.1, -0.2]]), "bias": torch.tensor([0.3])}
    inputs = torch.randn(24, 2, generator=torch.Generator().manual_seed(1))
    inputs[20] = torch.nan
    batches = [(two, torch.zeros(2, dtype=torch.int64)) for two in torch.split(inputs, 2)]
    model = nn.Linear(2, 1)
    for one in model.parameters():
        nn.init.constant_(one, 0.5)
    w: Vector = {"weight": torch.full((1, 2), 0.5), "bias": torch.full((1,), 0.5)}
    momentum = {name: torch.zeros_like(one) for name, one in w.items()}
    for x, _ in batches[:10] + batches[11:]:
        out = x @ w["weight"].T + w["bias"]
        g = {"weight": out.T @ x, "bias": out.sum(dim=0)}
        factor = 0.05 / torch.cat([one.flatten() for one in g.values()]).norm().clamp(min=0.05)
        for name in list(w):
            full = factor * g[name] + shift[name] + 0.5 * (w[name] - anchor[name])
            momentum[name] = 0.9 * momentum[name] + full
            w[name] = w[name] - LR * momentum[name]
    found = train_model(
        *(model, batches, 1, LR),
        loss=lambda outputs, _: outputs.square().mean(),
        clip_norm=0.05,
        doctor=DoctorSettings(),
        correction=Correction(pull=0.5, anchor=anchor, shift=shift),
    )
    assert [one.step for one in found.report.diagnoses] == [11]
    for name, value in w.items():
        torch.testing.assert_close(found.state_dict[name], value, rtol=1e-5, atol=1e-6)


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


def test_stragglers_are_a_share_of_each_round_with_epochs_of_their_own(tmp_path: Path) -> None:
    """Drawn anew for each round, the same in a repetition; 1 to all of the epochs."""
    federation = SmallFederation(tmp_path, stragglers=0.9, epochs=20)
    cohort = range(10)
    rounds = [[order.training.epochs for order in federation.open_round(cohort)] for _ in range(30)]
    assert all(sum(epochs == 20 for epochs in one) >= 1 for one in rounds)
    drawn = [epochs for one in rounds for epochs in one if epochs != 20]
    assert set(drawn) == set(range(1, 20))
    assert len({tuple(one) for one in rounds}) == 30
    place = {"round_number": 3, "attempt": 1}
    settings = ServerSettings(stragglers=0.9, epochs=20)
    again = draw_stragglers(cohort, settings, **place)
    assert len(again) == 9
    assert again == draw_stragglers(list(cohort)[::-1], settings, **place)
    assert [again.get(one, 20) for one in cohort] == rounds[2]


@pytest.mark.parametrize(
    ("name", "parameters", "words"),
    [
        ("fedprox", {"mu": -1.0}, "mu is -1; it must be 0 or more"),
        ("fedprox+fedadam", {}, "then a local rule"),
        ("fedprox+fedprox", {}, "more than one local rule"),
    ],
)
def test_what_makes_no_sense_is_a_sentence(
    name: str, parameters: dict[str, float], words: str
) -> None:
    with pytest.raises(InvalidInput, match=words):
        find_strategy({"strategy": name, "strategy_parameters": parameters})


def test_a_client_that_doesn_t_know_a_rule_doesn_t_train_without_it() -> None:
    with pytest.raises(WrongSettings, match="'fedfuture', which this client doesn't know"):
        correction_of(LocalRule(name="fedfuture"))
    with pytest.raises(WrongSettings, match="comes without 'mu'"):
        correction_of(LocalRule(name="fedprox"))
