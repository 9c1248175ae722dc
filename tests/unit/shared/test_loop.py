"""train_model computes textbook SGD, stops at the exact bad step, and repeats bit for bit."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fedrounds.data import make_loader
from fedrounds.doctor import TrainingHalted
from fedrounds.errors import InvalidInput
from fedrounds.tasks.models import SimpleCNN
from fedrounds.training.evaluation import evaluate
from fedrounds.training.loop import Callbacks, StepProgress, incident_of, train_model
from fedrounds.types import IncidentKind

Batch = tuple[Tensor, Tensor]


def make_batches(num: int = 3, *, size: int = 8, features: int = 5, seed: int = 0) -> list[Batch]:
    """Return batches of normal inputs and of targets among three classes."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, features, generator=generator),
            torch.randint(0, 3, (size,), generator=generator),
        )
        for _ in range(num)
    ]


def make_model(seed: int = 0) -> nn.Linear:
    """Return a linear model of five features and three classes."""
    torch.manual_seed(seed)
    return nn.Linear(5, 3)


class Product(nn.Module):
    """Logits (scale * x, 0), whose loss and gradient are easy to make bad one at a time."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(2))
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [n, 2] of x [n]."""
        return torch.stack((self.scale * x, torch.zeros_like(x)), dim=1)


def test_sgd_with_momentum_decay_and_clipping_is_the_formula() -> None:
    """Softmax regression by hand in float64.

    p = softmax(x W' + b), G = (p - onehot)' x / n, g = G min(1, c / (|G| + 1e-6)) + decay w,
    v <- momentum v + g (v = g at first), w <- w - lr v. The clip lies between the smallest and
    the largest norm, so that both branches are taken.
    """
    clip_norm = 0.63
    batches = make_batches()
    model = make_model().double()
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    velocity: list[Tensor] | None = None
    norms = []
    for inputs, targets in [(x.double(), y) for x, y in batches] * 2:
        error = torch.softmax(inputs @ weight.T + bias, 1) - F.one_hot(targets, 3)
        gradients = [error.T @ inputs / len(inputs), error.mean(0)]
        norm = math.sqrt(sum(float((gradient**2).sum()) for gradient in gradients))
        norms.append(norm)
        scale = min(1.0, clip_norm / (norm + 1e-6))
        steps = [
            gradient * scale + 0.01 * value
            for gradient, value in zip(gradients, (weight, bias), strict=True)
        ]
        velocity = (
            steps
            if velocity is None
            else [0.8 * v + g for v, g in zip(velocity, steps, strict=True)]
        )
        weight, bias = weight - 0.2 * velocity[0], bias - 0.2 * velocity[1]

    seen: list[StepProgress] = []
    result = train_model(
        model,
        [(x.double(), y) for x, y in batches],
        epochs=2,
        lr=0.2,
        momentum=0.8,
        weight_decay=0.01,
        clip_norm=clip_norm,
        callbacks=Callbacks(on_step=seen.append),
    )

    assert min(norms) < clip_norm < max(norms)
    torch.testing.assert_close(result.state_dict["weight"], weight)
    torch.testing.assert_close(result.state_dict["bias"], bias)
    assert [progress.grad_norm for progress in seen] == pytest.approx(norms, rel=1e-9)


def test_adam_takes_momentum_as_its_first_beta() -> None:
    """After one step from zero history Adam moves by lr * sign(g), whatever beta_1 is.

    In the second, m_hat = (b (1 - b) g1 + (1 - b) g2) / (1 - b^2) and
    v_hat = (0.999 * 0.001 g1^2 + 0.001 g2^2) / (1 - 0.999^2).
    """
    b, lr = 0.6, 0.01
    x1, x2 = torch.ones(1), torch.full((1,), 3.0)
    target = torch.ones(1, dtype=torch.int64)
    model = Product(0.0)
    result = train_model(
        model, [(x1, target), (x2, target)], epochs=1, lr=lr, optimizer="adam", momentum=b
    )
    # The loss is log(1 + exp(w x)), its derivative x / (1 + exp(-w x)).
    g1 = 0.5
    w1 = -lr
    g2 = 3 / (1 + math.exp(-w1 * 3))
    m = (b * (1 - b) * g1 + (1 - b) * g2) / (1 - b**2)
    v = (0.999 * 0.001 * g1**2 + 0.001 * g2**2) / (1 - 0.999**2)
    assert result.state_dict["scale"].item() == pytest.approx(w1 - lr * m / math.sqrt(v), rel=1e-4)


def test_the_report_counts_examples_steps_and_means() -> None:
    """With lr too small to change anything, the epochs' means are those of one evaluation."""
    batches = [*make_batches(2, size=8), *make_batches(1, size=3, seed=5)]
    model = make_model()
    inputs = torch.cat([x for x, _ in batches])
    targets = torch.cat([y for _, y in batches])
    logits = model(inputs)
    loss = F.cross_entropy(logits, targets).item()
    accuracy = (logits.argmax(1) == targets).double().mean().item()

    state_dict, last_accuracy, report = train_model(model, batches, epochs=2, lr=1e-12)

    assert (report.num_examples, report.num_steps) == (19, 6)
    for epoch in report.epochs:
        assert epoch.loss == pytest.approx(loss, rel=1e-5)
        assert epoch.accuracy == pytest.approx(accuracy)
    assert last_accuracy == pytest.approx(accuracy)
    assert set(state_dict) == {"weight", "bias"}
    measured = evaluate(model, batches)
    assert measured.num_examples == 19
    assert measured.loss == pytest.approx(loss, rel=1e-5)
    assert measured.accuracy == pytest.approx(accuracy)


def test_the_state_dict_is_the_callers_own() -> None:
    model = make_model()
    first = train_model(model, make_batches()).state_dict
    kept = {name: tensor.clone() for name, tensor in first.items()}
    train_model(model, make_batches())
    assert all(torch.equal(first[name], kept[name]) for name in kept)


def test_training_repeats_bit_for_bit_and_leaves_the_global_generator_alone() -> None:
    examples = TensorDataset(torch.randn(40, 1, 28, 28), torch.randint(0, 10, (40,)))

    def train(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(11)
        model = SimpleCNN()
        before = torch.get_rng_state()
        result = train_model(model, make_loader(examples, batch_size=16, seed=seed), lr=0.1)
        assert torch.equal(torch.get_rng_state(), before)
        return result.state_dict

    first, again, other = train(1), train(1), train(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["fc1.weight"], other["fc1.weight"])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_example_stops_training_at_its_step(bad: float) -> None:
    """Batch 2 of the second epoch of three: step 5. Inf - inf in the softmax is nan as well."""
    good = make_batches()
    spoilt = [(x.clone(), y) for x, y in good]
    spoilt[1][0][3, 2] = bad
    passes = iter([good, spoilt])
    seen: list[StepProgress] = []

    class Changing:
        def __iter__(self) -> Iterator[Batch]:
            return iter(next(passes))

    with pytest.raises(TrainingHalted, match=r"step 5 \(epoch 2, batch 2, lr 0.1") as caught:
        train_model(
            make_model(), Changing(), epochs=2, lr=0.1, callbacks=Callbacks(on_step=seen.append)
        )

    incident = incident_of(caught.value.diagnosis)
    assert incident.kind is IncidentKind.NON_FINITE_LOSS
    assert (incident.step, incident.epoch, incident.tensor) == (5, 2, None)
    assert incident.detail["batch"] == 2
    assert incident.detail["lr"] == 0.1
    assert not math.isfinite(incident.detail["loss"])
    assert [progress.step for progress in seen] == [1, 2, 3, 4]
    # newest first: grad_norm_0 is the bad step's
    before = [incident.detail[f"grad_norm_{age}"] for age in (1, 2, 3, 4)]
    assert before == [progress.grad_norm for progress in reversed(seen)]


def test_a_bad_gradient_under_a_good_loss_names_its_tensor() -> None:
    """The root has the value 0 and the slope infinity at 0."""

    def loss(outputs: Tensor, _: Tensor) -> Tensor:
        return (outputs[:, 0] - outputs[:, 0].detach()).sqrt().mean()

    with pytest.raises(TrainingHalted, match="non-finite-gradient in scale at step 1") as caught:
        train_model(Product(), [(torch.ones(2), torch.zeros(2, dtype=torch.int64))], loss=loss)
    incident = incident_of(caught.value.diagnosis)
    assert incident.kind is IncidentKind.NON_FINITE_GRADIENT
    assert incident.tensor == "scale"
    assert incident.detail["loss"] == 0.0


def test_a_bad_gradient_never_reaches_the_parameters() -> None:
    model = Product(2.0)

    def loss(outputs: Tensor, _: Tensor) -> Tensor:
        return (outputs[:, 0] - outputs[:, 0].detach()).sqrt().mean()

    for clip_norm in (None, 1.0):
        with pytest.raises(TrainingHalted):
            train_model(
                model,
                [(torch.ones(2), torch.zeros(2, dtype=torch.int64))],
                loss=loss,
                clip_norm=clip_norm,
            )
        assert model.scale.item() == 2.0


def test_a_step_that_overflows_a_parameter_names_it() -> None:
    """The gradient is 1e30 / 2, finite, and lr 1e10 times that is above 3.4e38."""
    batch = (torch.tensor([1e30]), torch.tensor([1]))
    with pytest.raises(TrainingHalted) as caught:
        train_model(Product(0.0), [batch], lr=1e10)
    assert incident_of(caught.value.diagnosis).kind is IncidentKind.NON_FINITE_PARAMETER
    assert incident_of(caught.value.diagnosis).tensor == "scale"
    assert incident_of(caught.value.diagnosis).step == 1


def test_a_bad_buffer_is_caught_although_no_gradient_sees_it() -> None:
    """BatchNorm in training mode uses the batch, so a huge batch shows in running_var first.

    The variance of (3e19, -3e19) overflows float32; the loss is made not to depend on it.
    """
    last = nn.Linear(1, 2)
    model = nn.Sequential(nn.BatchNorm1d(1), last)

    def loss(outputs: Tensor, _: Tensor) -> Tensor:
        return (last.weight**2).sum() + outputs.detach().nan_to_num().sum() * 0

    batch = (torch.tensor([[3e19], [-3e19]]), torch.tensor([0, 1]))
    with pytest.raises(TrainingHalted) as caught:
        train_model(model, [batch], loss=loss)
    assert incident_of(caught.value.diagnosis).kind is IncidentKind.NON_FINITE_PARAMETER
    assert incident_of(caught.value.diagnosis).tensor == "0.running_var"


def test_a_norm_that_overflows_although_all_entries_are_finite_is_no_incident() -> None:
    """Two gradients of 1.5e25 each: their squares exceed float32, the norm 2.1e25 does not.

    Clipped to 1, each is 1 / sqrt(2), and its parameter moves by lr times that.
    """

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.zeros(()))
            self.b = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack(((self.a + self.b) * x, torch.zeros_like(x)), dim=1)

    seen: list[StepProgress] = []
    batch = (torch.tensor([3e25]), torch.tensor([1]))
    result = train_model(
        Pair(),
        [batch],
        epochs=1,
        lr=0.1,
        momentum=0.0,
        clip_norm=1.0,
        callbacks=Callbacks(on_step=seen.append),
    )
    assert seen[0].grad_norm == pytest.approx(1.5e25 * math.sqrt(2), rel=1e-6)
    for name in ("a", "b"):
        assert result.state_dict[name].item() == pytest.approx(-0.1 / math.sqrt(2), rel=1e-5)


def test_large_finite_parameters_are_no_incident() -> None:
    """The screen, an L2 norm, overflows at 1e30; the entries themselves are fine."""
    model = Product(0.0)
    model.unused.data.fill_(1e30)
    result = train_model(model, [(torch.ones(2), torch.tensor([0, 1]))], epochs=1)
    assert result.report.num_steps == 1


def test_what_on_step_raises_stops_training_there() -> None:
    class Abandoned(Exception):
        pass

    steps = []

    def stop_at_four(progress: StepProgress) -> None:
        steps.append((progress.step, progress.epoch, progress.batch, progress.batch_size))
        if progress.step == 4:
            raise Abandoned

    with pytest.raises(Abandoned):
        train_model(
            make_model(), make_batches(), epochs=5, callbacks=Callbacks(on_step=stop_at_four)
        )
    assert steps == [(1, 1, 1, 8), (2, 1, 2, 8), (3, 1, 3, 8), (4, 2, 1, 8)]


def test_frozen_parameters_stay_and_integer_buffers_count() -> None:
    last = nn.Linear(5, 3)
    last.bias.requires_grad_(False)
    bias = last.bias.clone()
    model = nn.Sequential(nn.BatchNorm1d(5), last)
    state_dict = train_model(model, make_batches(), epochs=2).state_dict
    assert torch.equal(state_dict["1.bias"], bias)
    assert state_dict["0.num_batches_tracked"].item() == 6


def test_evaluation_of_nan_is_never_correct() -> None:
    """Argmax calls nan class 0, so a model full of nan would score the share of zeros."""
    model = make_model()
    with torch.no_grad():
        model.weight.fill_(math.nan)
    batch = (torch.randn(8, 5), torch.zeros(8, dtype=torch.int64))
    evaluation = evaluate(model, [batch])
    assert evaluation.accuracy == 0.0
    assert math.isnan(evaluation.loss)


def test_evaluation_changes_nothing() -> None:
    """Running statistics stay, dropout is off, and each module's own mode comes back."""
    model = nn.Sequential(nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3))
    model.train()
    model[0].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first, again = evaluate(model, make_batches()), evaluate(model, make_batches())
    assert first == again
    assert [module.training for module in model] == [False, True, True]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_outputs_for_each_pixel_count_pixels() -> None:
    """Three examples of 2 x 2 pixels, all classified as class 1, of which 5 of 12 are."""
    outputs = torch.zeros(3, 4, 2, 2)
    outputs[:, 1] = 1.0
    targets = torch.tensor([1, 1, 1, 1, 1, 0, 2, 3, 0, 2, 3, 0]).reshape(3, 2, 2)
    evaluation = evaluate(nn.Identity(), [(outputs, targets)])
    assert evaluation.accuracy == pytest.approx(5 / 12)
    assert evaluation.num_examples == 3


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"epochs": 0}, "epochs must be at least 1, but is 0"),
        ({"lr": math.nan}, "lr must be a positive number, but is nan"),
        ({"lr": 0.0}, "lr"),
        ({"momentum": 1.0}, "momentum"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"clip_norm": math.nan}, "clip_norm must be a positive number or None"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"optimizer": "lion"}, "there are: sgd, adam, adamw"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float], complaint: str) -> None:
    model = make_model()
    before = model.weight.clone()
    with pytest.raises(InvalidInput, match=complaint):
        train_model(model, make_batches(), **settings)  # type: ignore[arg-type]  # one is a name
    assert torch.equal(model.weight, before)


def test_a_loader_that_is_used_up_or_doesnt_fit_is_an_error() -> None:
    with pytest.raises(InvalidInput, match="epoch 2: the dataloader gave no examples"):
        train_model(make_model(), iter(make_batches()), epochs=2)
    with pytest.raises(InvalidInput, match="no examples"):
        evaluate(make_model(), [])


@pytest.mark.parametrize(
    ("value", "described"),
    [("good", "a str"), (None, "a NoneType"), (torch.zeros(3), r"a tensor of shape \(3,\)")],
)
def test_what_isnt_one_number_is_refused_by_name(value: Any, described: str) -> None:  # noqa: ANN401
    with pytest.raises(InvalidInput, match=f"the loss function returned {described}"):
        evaluate(make_model(), make_batches(), loss=lambda *_: value)
    with pytest.raises(InvalidInput, match=f"the loss function returned {described}"):
        train_model(make_model(), make_batches(), loss=lambda *_: value)


def test_a_loss_of_one_element_may_have_dimensions() -> None:
    def with_dimensions(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets)[None]

    model, batches = make_model(), make_batches()
    assert evaluate(model, batches, loss=with_dimensions) == evaluate(model, batches)
