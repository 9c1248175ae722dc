"""Trainings that look odd and are well: losses that jump, zeros, infinities and rare classes."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, CyclicLR

from benchmarks.unseen_doctor_cases.case import Batch, Step, Training, healthy
from benchmarks.unseen_doctor_cases.cases_models import Flow, flow_loss
from benchmarks.unseen_doctor_cases.cases_optimizers import Encoder, evidence_bound, reconstruction
from benchmarks.unseen_doctor_cases.tasks import (
    accuracy,
    adam,
    blobs,
    cross_entropy,
    minibatches,
    mlp,
    plane,
    r2,
    rng,
    sgd,
    squared_error,
    waves,
)


@healthy
def warm_restarts(seed: int) -> Training:
    """Cosine rates with warm restarts: the loss jumps up at each."""
    train, test = waves(seed)
    model = mlp(32, 4, width=64)
    optimizer = sgd(model, 0.3)
    return Training(
        model=model,
        optimizer=optimizer,
        compute_loss=cross_entropy,
        steps=minibatches(train, seed=seed, epochs=15),
        score=accuracy(test),
        scheduler=CosineAnnealingWarmRestarts(optimizer, T_0=60),
        num_classes=4,
    )


@healthy
def cyclic_rates(seed: int) -> Training:
    """A triangle of rates from 0.001 to 0.1."""
    train, test = blobs(seed)
    model = mlp(10, 4)
    optimizer = sgd(model)
    return Training(
        model=model,
        optimizer=optimizer,
        compute_loss=cross_entropy,
        steps=minibatches(train, seed=seed, epochs=10),
        score=accuracy(test),
        scheduler=CyclicLR(optimizer, 0.001, 0.1, step_size_up=25, cycle_momentum=False),
        num_classes=4,
    )


@healthy
def second_task(seed: int) -> Training:
    """Half-way the labels are those of another task: the loss jumps, then falls again."""
    (inputs, labels), (test_inputs, test_labels) = blobs(seed)
    first = minibatches((inputs, labels), seed=seed, epochs=6)
    second = minibatches((inputs, 3 - labels), seed=seed + 50, epochs=10)
    model = mlp(10, 4)
    return Training(
        model=model,
        optimizer=adam(model, 0.01),
        compute_loss=cross_entropy,
        steps=[*first, *(Step(step.batch, step.indices, step.epoch + 6) for step in second)],
        score=accuracy((test_inputs, 3 - test_labels)),
        num_classes=4,
    )


@healthy
def sorted_by_class(seed: int) -> Training:
    """The data set is sorted by class: whole stretches of one class, loss up at each border."""
    (inputs, labels), test = blobs(seed, spread=3.0)
    order = labels.argsort(stable=True)
    model = mlp(10, 4)
    steps = minibatches((inputs[order], labels[order]), seed=seed, epochs=8, is_shuffled=False)
    shuffled = minibatches((inputs, labels), seed=seed, epochs=5)
    return Training(
        model=model,
        optimizer=sgd(model, 0.02),
        compute_loss=cross_entropy,
        steps=[*steps, *(Step(step.batch, step.indices, step.epoch + 8) for step in shuffled)],
        score=accuracy(test),
        num_classes=4,
    )


@healthy
def harder_and_harder(seed: int) -> Training:
    """A curriculum: easy samples first, the loss rises with each stage."""
    (inputs, labels), test = blobs(seed, spread=1.0)
    drawn = rng(seed, 31)
    steps = []
    for number, step in enumerate(minibatches((inputs, labels), seed=seed, epochs=12)):
        noise = [0.0, 0.5, 1.0, 1.5][min(number // 60, 3)]
        shape = step.batch[0].shape
        moved = step.batch[0] + noise * torch.randn(shape, generator=drawn)
        steps.append(Step((moved, step.batch[1]), step.indices, step.epoch))
    model = mlp(10, 4)
    return Training(
        model=model,
        optimizer=adam(model),
        compute_loss=cross_entropy,
        steps=steps,
        score=accuracy(test),
        num_classes=4,
    )


@healthy
def term_switched_on(seed: int) -> Training:
    """At step 100 a penalty a thousand times the loss is switched on by the batch's own flag."""
    (inputs, targets), test = plane(seed)
    model = mlp(6, 1)
    steps = [
        Step((*step.batch, torch.full((len(step.indices), 1), float(number >= 100))), *step[1:])
        for number, step in enumerate(minibatches((inputs, targets), seed=seed, epochs=12))
    ]

    def with_penalty(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        outputs = model(batch[0])
        rough = (model(batch[0] + 0.05) - outputs).square()
        return F.mse_loss(outputs, batch[1]) + (batch[2] * (5 + 20 * rough)).mean(), outputs

    return Training(
        model=model,
        optimizer=adam(model, 0.01),
        compute_loss=with_penalty,
        steps=steps,
        score=r2(test),
    )


@healthy
def annealed_divergence(seed: int) -> Training:
    """A variational autoencoder whose divergence is weighed in over time."""
    (inputs, _), (test, _) = blobs(seed, spread=3.0)
    model = Encoder()
    steps = [
        Step((*step.batch, torch.full((len(step.indices),), min(number / 150, 1.0))), *step[1:])
        for number, step in enumerate(minibatches((inputs,), seed=seed, epochs=15))
    ]

    def annealed(model: nn.Module, batch: Batch) -> Tensor:
        bound = evidence_bound(model, batch[:1], weight=0.0)
        mean, log_var = model(batch[0])[1:]
        divergence = (mean.square() + log_var.exp() - 1 - log_var).sum(dim=1) / 2
        loss: Tensor = bound + 0.2 * (batch[1] * divergence).mean()
        return loss

    return Training(
        model=model,
        optimizer=adam(model, 0.01),
        compute_loss=annealed,
        steps=steps,
        score=lambda model: 1 - F.mse_loss(model(test)[0], test).item() / reconstruction(test),
    )


@healthy
def missing_as_nan(seed: int) -> Training:
    """Missing inputs are NaN; the model puts a learned value in their place."""
    (inputs, targets), (test_inputs, test_targets) = plane(seed)
    holes = torch.rand(inputs.shape, generator=rng(seed, 32)) < 0.05
    inputs[holes] = torch.nan

    class Impute(nn.Module):
        """Replaces NaN by a learned value."""

        def __init__(self) -> None:
            super().__init__()
            self.value = nn.Parameter(torch.zeros(6))

        def forward(self, inputs: Tensor) -> Tensor:
            return torch.where(inputs.isnan(), self.value, inputs)

    model = nn.Sequential(Impute(), mlp(6, 1))
    return Training(
        model=model,
        optimizer=adam(model, 0.01),
        compute_loss=squared_error,
        steps=minibatches((inputs, targets), seed=seed, epochs=10),
        score=r2((test_inputs, test_targets)),
    )


@healthy
def infinite_inputs_clamped(seed: int) -> Training:
    """Sensors that saturate report infinity; the model clamps."""
    (inputs, labels), test = blobs(seed)
    inputs[inputs > 4] = torch.inf

    class Clamp(nn.Module):
        """Bounds its inputs."""

        def forward(self, inputs: Tensor) -> Tensor:
            return inputs.clamp(-4, 4)

    model = nn.Sequential(Clamp(), mlp(10, 4))
    return Training(
        model=model,
        optimizer=adam(model),
        compute_loss=cross_entropy,
        steps=minibatches((inputs, labels), seed=seed, epochs=8),
        score=accuracy(test),
        num_classes=4,
    )


@healthy
def illegal_actions(seed: int) -> Training:
    """A policy's logits of illegal actions are -inf, and it returns them."""
    (inputs, labels), test = blobs(seed)
    drawn = rng(seed, 33)

    def legal(labels: Tensor) -> Tensor:
        mask = torch.rand(len(labels), 4, generator=drawn) < 0.6
        return mask.scatter(1, labels[:, None], value=True)

    class Policy(nn.Module):
        """A net whose illegal logits are -inf."""

        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(10, 4)

        def forward(self, inputs: Tensor, mask: Tensor) -> Tensor:
            outputs: Tensor = self.net(inputs).masked_fill(~mask, -torch.inf)
            return outputs

    model = Policy()
    return Training(
        model=model,
        optimizer=adam(model),
        compute_loss=cross_entropy,
        steps=minibatches((inputs, legal(labels), labels), seed=seed, epochs=8),
        score=accuracy((test[0], legal(test[1]), test[1])),
        num_classes=4,
    )


@healthy
def most_labels_ignored(seed: int) -> Training:
    """Semi-supervised: nine in ten labels are -100 and ignored, with a consistency term."""
    (inputs, labels), test = blobs(seed, spread=2.0)
    labels[torch.rand(640, generator=rng(seed, 34)) < 0.9] = -100
    labels[::32] = labels[::32].clamp(min=0)
    model = mlp(10, 4)

    def consistent(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        outputs = model(batch[0])
        again = model(batch[0] + 0.1 * torch.randn_like(batch[0]))
        known = F.cross_entropy(outputs, batch[1], reduction="sum") / 8
        return known + F.mse_loss(again, outputs.detach()), outputs

    return Training(
        model=model,
        optimizer=adam(model),
        compute_loss=consistent,
        steps=minibatches((inputs, labels), seed=seed, epochs=10),
        score=accuracy(test),
    )


@healthy
def negative_loss(seed: int) -> Training:
    """A flow over points near a curve: the loss passes zero and goes on down."""
    drawn = rng(seed, 35)
    left = torch.randn(1140, 1, generator=drawn)
    points = torch.cat([left, left.tanh() + 0.02 * torch.randn(1140, 1, generator=drawn)], 1)
    model = Flow()
    test = (points[640:],)
    return Training(
        model=model,
        optimizer=adam(model, 0.01),
        compute_loss=flow_loss,
        steps=minibatches((points[:640],), seed=seed, epochs=12),
        score=lambda model: 1 / (1 + torch.tensor(flow_loss(model, test).item()).exp().item()),
        clip_norm=5.0,
    )


@healthy
def batches_of_all_sizes(seed: int) -> Training:
    """A summed loss over batches of 2 to 200 samples: it varies a hundredfold."""
    (inputs, labels), test = blobs(seed)
    drawn = rng(seed, 36)
    steps = []
    for epoch in range(1, 13):
        sizes: list[int] = []
        while sum(sizes) < 640:
            sizes.append(int(2 * 10 ** (2 * torch.rand(1, generator=drawn).item())))
        sizes[-1] -= sum(sizes) - 640
        order = torch.randperm(640, generator=drawn)
        steps += [
            Step((inputs[part], labels[part]), part, epoch) for part in torch.split(order, sizes)
        ]
    model = mlp(10, 4)

    def summed(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        outputs = model(batch[0])
        return F.cross_entropy(outputs, batch[1], reduction="sum"), outputs

    return Training(
        model=model,
        optimizer=adam(model),
        compute_loss=summed,
        steps=steps,
        score=accuracy(test),
        num_classes=4,
    )


@healthy
def heavy_tails(seed: int) -> Training:
    """Targets with noise of Cauchy's kind and Huber's loss: single losses of thousands."""
    (inputs, targets), test = plane(seed)
    noise = torch.empty(640, 1).cauchy_(generator=rng(seed, 37))
    model = mlp(6, 1)

    def huber(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        outputs = model(batch[0])
        return F.smooth_l1_loss(outputs, batch[1]), outputs

    return Training(
        model=model,
        optimizer=adam(model, 0.005),
        compute_loss=huber,
        steps=minibatches((inputs, targets + 0.1 * noise), seed=seed, epochs=10),
        score=r2(test),
    )


@healthy
def margin_satisfied(seed: int) -> Training:
    """A hinge loss that is soon exactly zero, and every gradient with it."""
    train, test = blobs(seed, spread=5.0)
    model = mlp(10, 4)

    def hinge(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        outputs = model(batch[0])
        return F.multi_margin_loss(outputs, batch[1]), outputs

    return Training(
        model=model,
        optimizer=adam(model, 0.01),
        compute_loss=hinge,
        steps=minibatches(train, seed=seed, epochs=15),
        score=accuracy(test),
        num_classes=4,
    )


@healthy
def memorised(seed: int) -> Training:
    """Sixty-four samples learnt by heart: the loss falls to 1e-6 and flickers there."""
    train, test = blobs(seed, num=64, spread=3.0)
    model = mlp(10, 4)
    return Training(
        model=model,
        optimizer=adam(model, 0.02),
        compute_loss=cross_entropy,
        steps=minibatches(train, seed=seed, epochs=120, size=16),
        score=accuracy(test),
        num_classes=4,
    )
