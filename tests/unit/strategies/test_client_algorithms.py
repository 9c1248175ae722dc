"""Client algorithms against their papers' formulas, written out here in plain PyTorch."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedclient.client_algorithms import NOTHING, TrainingStart, begin
from fedrounds.diagnosis.values import DoctorSettings
from fedrounds.errors import InvalidInput, WrongSettings
from fedrounds.strategies import StrategySettings
from fedrounds.strategies.client_algorithms import validate_model
from fedrounds.strategies.components import UnfitCohort
from fedrounds.strategies.registry import find_strategy
from fedrounds.tensors.codec import decode_state
from fedrounds.training.corrections import Correction
from fedrounds.training.loop import train_model
from fedrounds.types import ClientAlgorithmConfig
from tests.small_federation import (
    NUM_CLASSES,
    NUM_FEATURES,
    SmallFederation,
    examples_of,
    gradient_of,
    small,
)

LR = 0.1
CLIENTS = (0, 1, 2)
Vector = dict[str, Tensor]


def assert_near(actual: Mapping[str, Tensor], expected: Vector) -> None:
    """Hold that two states are the same but for rounding in float64."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-11, atol=1e-12)


def weighted_mean(states: dict[int, Vector]) -> Vector:
    """Return the mean by the number of examples."""
    weights = {client: len(examples_of(client)) for client in states}
    total = sum(weights.values())
    first = next(iter(states.values()))
    return {
        name: torch.stack(
            [weights[client] / total * state[name] for client, state in states.items()]
        ).sum(0)
        for name in first
    }


def zeros_like(state: Vector) -> Vector:
    """Return zeros of the shapes of a state."""
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


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
            {client: fedprox_local(client, expected, mu=0.7, steps=5) for client in CLIENTS}
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


class Scaffold:
    """Algorithm 1 of Karimireddy et al. 2020 with option II; with momentum K lr is its reach."""

    def __init__(self, x: Vector, *, momentum: float, server_lr: float) -> None:
        self.x, self.momentum, self.server_lr = x, momentum, server_lr
        self.c = zeros_like(x)
        self.c_i = {client: zeros_like(x) for client in CLIENTS}

    def play_round(self, counted: tuple[int, ...], *, steps: int = 5) -> None:
        """Play a round in which these clients' updates count."""
        x, c = self.x, self.c
        moves, changes = [], []
        for client in counted:
            own, y, speed = self.c_i[client], dict(x), zeros_like(x)
            travel = reach = 0.0
            for _ in range(steps):
                g = gradient_of(client, y)
                speed = {k: self.momentum * speed[k] + g[k] - own[k] + c[k] for k in x}
                y = {k: y[k] - LR * speed[k] for k in x}
                reach = self.momentum * reach + 1
                travel += LR * reach
            self.c_i[client] = {k: own[k] - c[k] + (x[k] - y[k]) / travel for k in x}
            moves.append({k: y[k] - x[k] for k in x})
            changes.append({k: self.c_i[client][k] - own[k] for k in x})
        self.x = {k: x[k] + self.server_lr * sum(m[k] for m in moves) / len(moves) for k in x}
        self.c = {k: c[k] + sum(d[k] for d in changes) / len(CLIENTS) for k in x}


@pytest.mark.parametrize(("momentum", "server_lr"), [(0.0, 1.0), (0.9, 0.5)])
def test_scaffold_is_the_paper_s_algorithm(
    tmp_path: Path, momentum: float, server_lr: float
) -> None:
    """Over rounds with some of the clients and with all; then the mean of all c_i is c."""
    federation = SmallFederation(
        tmp_path,
        strategy="scaffold",
        strategy_parameters={"server_lr": server_lr},
        num_partitions=3,
        momentum=momentum,
    )
    expected = Scaffold(federation.state, momentum=momentum, server_lr=server_lr)
    for counted in ((0, 1), (1, 2), (0, 1, 2), (0, 1, 2)):
        federation.play_round(counted)
        expected.play_round(counted)
        assert_near(federation.state, expected.x)
        assert_near(federation.control, expected.c)
        for client in counted:
            assert_near(federation.kept_by(client, "control"), expected.c_i[client])
    kept = [federation.kept_by(client, "control") for client in CLIENTS]
    mean = {k: torch.stack([control[k] for control in kept]).mean(dim=0) for k in expected.x}
    assert_near(federation.control, mean)


def test_what_isn_t_counted_leaves_a_client_s_control_as_it_was(tmp_path: Path) -> None:
    """Client 0 trains in every round, and in the second its update comes too late."""
    federation = SmallFederation(tmp_path, strategy="scaffold", num_partitions=3)
    expected = Scaffold(federation.state, momentum=0.0, server_lr=1.0)
    federation.play_round(CLIENTS)
    expected.play_round(CLIENTS)
    before = dict(federation.kept_by(0, "control"))
    sent = [federation.train(order) for order in federation.open_round(CLIENTS)]
    federation.close_round(sent[1:])
    expected.play_round((1, 2))
    assert_near(dict(federation.kept_by(0, "control")), before)
    federation.play_round(CLIENTS)
    expected.play_round(CLIENTS)
    assert_near(federation.state, expected.x)
    assert_near(federation.control, expected.c)


def test_the_same_orders_trained_again_give_the_same_bytes(tmp_path: Path) -> None:
    """As after a kill before the update was in the outbox: with its state, too."""
    federation = SmallFederation(tmp_path, strategy="scaffold", num_partitions=3)
    federation.play_round(CLIENTS)
    order, *_ = federation.open_round(CLIENTS)
    first = federation.train(order).update
    again = federation.train(order).update
    assert [section.name for section in first.sections] == ["model", "control"]
    assert (first.digest, first.sections) == (again.digest, again.sections)


def test_feddyn_is_the_paper_s_algorithm(tmp_path: Path) -> None:
    """Algorithm 1 of Acar et al. 2021, with gradient descent for the inner minimum."""
    alpha = 0.3
    federation = SmallFederation(
        tmp_path, strategy="feddyn", strategy_parameters={"alpha": alpha, "num_clients": 3}
    )
    x = federation.state
    h, g = zeros_like(x), {client: zeros_like(x) for client in CLIENTS}
    for counted in ((0, 1), (1, 2), (0, 1, 2)):
        federation.play_round(counted)
        ends = []
        for client in counted:
            w = dict(x)
            for _ in range(5):
                slope = gradient_of(client, w)
                w = {k: w[k] - LR * (slope[k] - g[client][k] + alpha * (w[k] - x[k])) for k in w}
            g[client] = {k: g[client][k] - alpha * (w[k] - x[k]) for k in x}
            ends.append(w)
        h = {k: h[k] - alpha / 3 * sum(w[k] - x[k] for w in ends) for k in x}
        x = {k: sum(w[k] for w in ends) / len(ends) - h[k] / alpha for k in x}
        assert_near(federation.state, x)
        assert_near(federation.control, h)
        for client in counted:
            assert_near(federation.kept_by(client, "feddyn"), g[client])


def normed() -> nn.Module:
    """Return a model with a normalisation layer."""
    return nn.Sequential(
        nn.Linear(NUM_FEATURES, 5, dtype=torch.float64),
        nn.BatchNorm1d(5, dtype=torch.float64),
        nn.Linear(5, NUM_CLASSES, dtype=torch.float64),
    )


def test_fedbn_leaves_norm_layers_with_the_clients_and_averages_the_rest(tmp_path: Path) -> None:
    """Against plain models that are given the averaged entries and keep their layer "1"."""
    federation = SmallFederation(
        tmp_path,
        task=replace(small, build_model=normed),
        strategy="fedbn",
        evaluate_on_clients=True,
    )
    start = federation.state
    models = {client: normed() for client in CLIENTS}
    for model in models.values():
        model.load_state_dict(start)
    for round_number in (1, 2, 3):
        sent = federation.play_round(CLIENTS)
        for client, model in models.items():
            inputs, labels = examples_of(client).tensors
            optimizer = torch.optim.SGD(model.parameters(), lr=LR)
            for _ in range(5):
                optimizer.zero_grad()
                F.cross_entropy(model(inputs), labels).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            trained = model.state_dict()
            own = {name: tensor for name, tensor in trained.items() if name.startswith("1.")}
            assert_near(federation.kept_by(client, "norms"), own)
            update = decode_state(sent[client].payload.read_bytes())
            assert all(torch.equal(update[name], start[name]) for name in own)
            model.eval()
            with torch.no_grad():
                right = (model(inputs).argmax(dim=1) == labels).double().mean().item()
            model.train()
            assert sent[client].update.metrics["personal_accuracy"] == pytest.approx(right)
        shared = weighted_mean(
            {
                client: {k: v for k, v in model.state_dict().items() if not k.startswith("1.")}
                for client, model in models.items()
            }
        )
        assert int(own["1.num_batches_tracked"]) == 5 * round_number
        assert_near(federation.state, {**start, **shared})
        for model in models.values():
            model.load_state_dict(shared, strict=False)


def test_ditto_trains_a_model_of_its_own_beside_the_global_model(tmp_path: Path) -> None:
    """Algorithm 1 of Li et al. 2021 (Ditto); the global model is FedAvg's, bit for bit."""
    federation = SmallFederation(tmp_path, strategy="ditto", strategy_parameters={"strength": 0.4})
    plain = SmallFederation(tmp_path / "plain")
    v: dict[int, Vector] = {}
    for counted in ((0, 1), (0, 1, 2), (1, 2)):
        w = federation.state
        sent = federation.play_round(counted)
        plain.play_round(counted)
        assert federation.model.digest == plain.model.digest
        for update in sent:
            client = update.order.client_id
            # A client's own begins as the first global model that it is sent.
            v.setdefault(client, w)
            for _ in range(5):
                g = gradient_of(client, v[client])
                v[client] = {k: v[client][k] - LR * (g[k] + 0.4 * (v[client][k] - w[k])) for k in w}
            assert_near(federation.kept_by(client, "ditto"), v[client])
            inputs, labels = examples_of(client).tensors
            outputs = F.linear(inputs, v[client]["weight"], v[client]["bias"])
            metrics = update.update.metrics
            right = (outputs.argmax(dim=1) == labels).double().mean().item()
            assert metrics["personal_accuracy"] == pytest.approx(right)
            assert metrics["personal_loss"] == pytest.approx(
                F.cross_entropy(outputs, labels).item()
            )


def test_fedbn_needs_norm_layers() -> None:
    """The server says so before a run is begun; so does a client."""
    strategy = find_strategy("fedbn")
    validate_model(strategy.client_algorithm, normed(), {})
    with pytest.raises(InvalidInput, match="the task's model has none"):
        validate_model(strategy.client_algorithm, nn.Linear(2, 2), {})
    start = TrainingStart(model=nn.Linear(2, 2), parameters={}, kept={}, control=NOTHING)
    with pytest.raises(WrongSettings, match="the task's model has none"):
        begin(ClientAlgorithmConfig(name="fedbn"), start)


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
    """A NaN in the eleventh batch: the doctor goes back, experiments and leaves the sample out."""
    anchor = {"weight": torch.full((1, 2), 0.25), "bias": torch.full((1,), -0.5)}
    shift = {"weight": torch.tensor([[0.02, -0.04]]), "bias": torch.tensor([0.03])}
    inputs = torch.randn(24, 2, generator=torch.Generator().manual_seed(1))
    inputs[20] = torch.nan
    batches = [(two, torch.zeros(2, dtype=torch.int64)) for two in torch.split(inputs, 2)]
    model = nn.Linear(2, 1)
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.5)
    w: Vector = {"weight": torch.full((1, 2), 0.5), "bias": torch.full((1,), 0.5)}
    momentum = {name: torch.zeros_like(tensor) for name, tensor in w.items()}
    # The doctor leaves the bad sample out; the other sample of its batch is trained on.
    sound = [*(x for x, _ in batches[:10]), inputs[21:22], *(x for x, _ in batches[11:])]
    for x in sound:
        d = 2 / len(x) * (x @ w["weight"].T + w["bias"])
        g = {"weight": d.T @ x, "bias": d.sum(dim=0)}
        factor = 0.5 / torch.cat([tensor.flatten() for tensor in g.values()]).norm().clamp(min=0.5)
        for name in list(w):
            full = factor * g[name] + shift[name] + 0.1 * (w[name] - anchor[name])
            momentum[name] = 0.9 * momentum[name] + full
            w[name] = w[name] - LR * momentum[name]
    trained = train_model(
        *(model, batches, 1, LR),
        loss=lambda outputs, _: outputs.square().mean(),
        clip_norm=0.5,
        doctor=DoctorSettings(),
        correction=Correction(pull=0.1, anchor=anchor, shift=shift),
    )
    assert [diagnosis.step for diagnosis in trained.report.diagnoses] == [11]
    for name, value in w.items():
        torch.testing.assert_close(trained.state_dict[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "parameters", "words"),
    [
        ("fedprox", {"mu": -1.0}, "mu is -1; it must be 0 or more"),
        ("fedprox+fedadam", {}, "then a client algorithm"),
        ("fedprox+fedprox", {}, "more than one client algorithm"),
        ("krum+scaffold", {}, "so krum makes no sense with it; put it after fedavg or uniform"),
        ("fedadam+feddyn", {}, "so fedadam makes no sense with it"),
        ("nnm+feddyn", {}, "so nnm makes no sense with it"),
        ("fedavg+feddyn", {}, "so fedavg makes no sense with it; put it after uniform or alone"),
        ("fednova+fedprox", {}, "fedprox makes no sense with fednova: it divides by the norm"),
        ("feddyn", {"alpha": 0.0}, "alpha is 0; it must be above 0"),
        ("scaffold", {"server_lr": -1.0}, "server_lr is -1; it must be above 0"),
    ],
)
def test_what_makes_no_sense_is_a_sentence(
    name: str, parameters: dict[str, float], words: str
) -> None:
    with pytest.raises(InvalidInput, match=words):
        find_strategy(name, parameters, settings=StrategySettings(num_partitions=3))


def test_what_a_rule_rests_on_must_be_set() -> None:
    """SCAFFOLD corrects SGD; both rules with controls must know how many clients there are."""
    settings = StrategySettings(optimizer="adam", num_partitions=3)
    with pytest.raises(InvalidInput, match="give --optimizer sgd"):
        find_strategy("scaffold", settings=settings)
    with pytest.raises(InvalidInput, match="num_clients="):
        find_strategy("feddyn")
    strategy = find_strategy("feddyn", {"num_clients": 4})
    with pytest.raises(UnfitCohort, match="expects 4 clients in all, but 5 sent updates"):
        strategy.optimizer_for(5)


def test_a_client_that_doesn_t_know_a_rule_doesn_t_train_without_it() -> None:
    start = TrainingStart(model=nn.Linear(2, 2), parameters={}, kept={}, control=NOTHING)
    with pytest.raises(WrongSettings, match="'fedfuture', which this client doesn't know"):
        begin(ClientAlgorithmConfig(name="fedfuture"), start)
    with pytest.raises(WrongSettings, match="comes without 'mu'"):
        begin(ClientAlgorithmConfig(name="fedprox"), start)
