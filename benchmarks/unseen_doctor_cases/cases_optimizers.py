"""Faults of rates, schedules, optimizers and scales of data that end in values not finite."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from benchmarks.unseen_doctor_cases.case import Batch, Training, planted
from benchmarks.unseen_doctor_cases.cases_models import BagOfTokens
from benchmarks.unseen_doctor_cases.tasks import (
    accuracy,
    blobs,
    cross_entropy,
    minibatches,
    mlp,
    plane,
    r2,
    sgd,
    squared_error,
    token_rows,
)


@planted("optimizer without an epsilon", causes="optimizer-state unknown", phases="optimizer")
def adam_without_epsilon(seed: int, *, fault: bool) -> Training:
    """Adam with eps=0: rows of an embedding that no text has used yet become 0 over 0."""
    (tokens, labels), test = token_rows(seed)
    model = BagOfTokens()
    return Training(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=0.01, eps=0.0 if fault else 1e-8),
        compute_loss=cross_entropy,
        steps=minibatches((tokens, labels), seed=seed, size=4, epochs=1),
        score=accuracy(test),
        num_classes=3,
    )


@planted("schedule with a spike", causes="learning-rate")
def spike_of_a_schedule(seed: int, *, fault: bool) -> Training:
    """A schedule's table has one entry of 1e6 instead of 1."""
    train, test = plane(seed)
    model = mlp(6, 1)
    optimizer = sgd(model)
    schedule = LambdaLR(optimizer, lambda step: 1e6 if fault and step == 60 else 1.0)
    return Training(
        model=model,
        optimizer=optimizer,
        compute_loss=squared_error,
        steps=minibatches(train, seed=seed),
        score=r2(test),
        scheduler=schedule,
    )


@planted("schedule whose peak is too high", causes="learning-rate exploding-gradient")
def one_cycle_too_high(seed: int, *, fault: bool) -> Training:
    """One cycle of rates up to 30 instead of 0.03."""
    train, test = plane(seed)
    model = mlp(6, 1)
    optimizer = sgd(model)
    steps = minibatches(train, seed=seed)
    schedule = OneCycleLR(optimizer, max_lr=30.0 if fault else 0.03, total_steps=len(steps) + 1)
    return Training(
        model=model,
        optimizer=optimizer,
        compute_loss=squared_error,
        steps=steps,
        score=r2(test),
        scheduler=schedule,
    )


@planted("optimizer's own constant wrong", causes="learning-rate optimizer-state")
def momentum_above_one(seed: int, *, fault: bool) -> Training:
    """Momentum of 1.9 instead of 0.9."""
    train, test = plane(seed)
    model = mlp(6, 1)
    return Training(
        model=model,
        optimizer=sgd(model, 0.02, 1.9 if fault else 0.9),
        compute_loss=squared_error,
        steps=minibatches(train, seed=seed),
        score=r2(test),
    )


@planted("optimizer's own constant wrong", causes="learning-rate", phases="")
def weight_decay_above_two(seed: int, *, fault: bool) -> Training:
    """A weight decay of 60 at a rate of 0.05: each step multiplies the weights by -2."""
    train, test = blobs(seed)
    model = mlp(10, 4)
    decay = 60.0 if fault else 1e-4
    return Training(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=decay),
        compute_loss=cross_entropy,
        steps=minibatches(train, seed=seed, epochs=10),
        score=accuracy(test),
        num_classes=4,
    )


@planted("sum instead of mean", causes="learning-rate exploding-gradient")
def summed_loss(seed: int, *, fault: bool) -> Training:
    """The loss is summed over a batch of 128 rows, the rate is that of the mean."""
    train, test = plane(seed)
    model = mlp(6, 1)

    def summed(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        outputs = model(batch[0])
        return F.mse_loss(outputs, batch[1], reduction="sum" if fault else "mean"), outputs

    return Training(
        model=model,
        optimizer=sgd(model, 0.1),
        compute_loss=summed,
        steps=minibatches(train, seed=seed, size=128, epochs=20),
        score=r2(test),
    )


@planted("wrong units everywhere", causes="exploding-gradient learning-rate", is_curable=False)
def prices_in_cents(seed: int, *, fault: bool) -> Training:
    """Targets of 1e6 instead of 1 with plain SGD."""
    (inputs, targets), (test_inputs, test_targets) = plane(seed)
    unit = 1e6 if fault else 1.0
    model = mlp(6, 1)
    return Training(
        model=model,
        optimizer=sgd(model),
        compute_loss=squared_error,
        steps=minibatches((inputs, unit * targets), seed=seed),
        score=r2((test_inputs, unit * test_targets)),
    )


@planted(
    "wrong units everywhere",
    causes="exploding-gradient learning-rate bad-data",
    is_curable=False,
)
def milliseconds_since_1970(seed: int, *, fault: bool) -> Training:
    """A column holds a time in milliseconds, 1.6e12, beside columns of about 1."""
    (inputs, targets), (test_inputs, test_targets) = plane(seed)
    if fault:
        inputs[:, 5] = 1.6e12 + 1e9 * inputs[:, 5]
        test_inputs[:, 5] = 1.6e12 + 1e9 * test_inputs[:, 5]
    model = mlp(6, 1)
    return Training(
        model=model,
        optimizer=sgd(model),
        compute_loss=squared_error,
        steps=minibatches((inputs, targets), seed=seed),
        score=r2((test_inputs, test_targets)),
    )


class Encoder(nn.Module):
    """A variational autoencoder of vectors: reconstruction, mean, log-variance."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = mlp(10, 8), mlp(4, 10)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the reconstruction, the latent's mean and log-variance."""
        mean, log_var = self.encode(inputs).chunk(2, dim=1)
        latent = mean
        if self.training:
            latent = mean + (log_var / 2).exp() * torch.randn_like(mean)
        return self.decode(latent), mean, log_var


def evidence_bound(model: nn.Module, batch: Batch, *, weight: float = 0.02) -> Tensor:
    """Return the negative evidence lower bound with a weight on the divergence."""
    again, mean, log_var = model(batch[0])
    divergence = (mean.square() + log_var.exp() - 1 - log_var).sum(dim=1).mean() / 2
    loss: Tensor = F.mse_loss(again, batch[0]) + weight * divergence
    return loss


def reconstruction(inputs: Tensor) -> float:
    """Return the variance of inputs around their mean, what a reconstruction competes with."""
    return (inputs - inputs.mean(dim=0)).square().mean().item()


@planted("exponential of a log-variance", causes="learning-rate exploding-gradient")
def variational_at_high_rate(seed: int, *, fault: bool) -> Training:
    """A variational autoencoder at 300 times its rate: exp of the log-variance overflows."""
    (inputs, _), (test, _) = blobs(seed, spread=3.0)
    model = Encoder()
    return Training(
        model=model,
        optimizer=sgd(model, 30.0 if fault else 0.1),
        compute_loss=evidence_bound,
        steps=minibatches((inputs,), seed=seed, epochs=10),
        score=lambda model: 1 - F.mse_loss(model(test)[0], test).item() / reconstruction(test),
    )
