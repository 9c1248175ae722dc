"""Faults whose numbers stay finite: explosions, dead nets, collapse to one class."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.unseen_doctor_cases.case import Batch, Training, planted
from benchmarks.unseen_doctor_cases.tasks import (
    accuracy,
    adam,
    as_set,
    blobs,
    cross_entropy,
    minibatches,
    mlp,
    plane,
    r2,
    sgd,
    squared_error,
    token_rows,
    waves,
)


def linear(model: nn.Sequential, position: int) -> nn.Linear:
    """Return a linear layer of a sequence."""
    layer = model[position]
    assert isinstance(layer, nn.Linear)
    return layer


@planted("dead from the start", causes="bad-initialisation", is_finite=True)
def biases_far_below(seed: int, *, fault: bool) -> Training:
    """Biases begin at -50: no ReLU is ever active."""
    train, test = blobs(seed)
    model = mlp(10, 4)
    if fault:
        nn.init.constant_(linear(model, 2).bias, -50.0)
    return Training(
        model=model,
        optimizer=sgd(model),
        compute_loss=cross_entropy,
        steps=minibatches(train, seed=seed, epochs=10),
        score=accuracy(test),
        num_classes=4,
    )


@planted("dead from the start", causes="bad-initialisation", is_finite=True)
def all_zero_weights(seed: int, *, fault: bool) -> Training:
    """Every weight begins at zero: hidden units never move."""
    train, test = plane(seed)
    model = mlp(6, 1)
    if fault:
        for weight in model.parameters():
            nn.init.zeros_(weight)
    return Training(
        model=model,
        optimizer=sgd(model),
        compute_loss=squared_error,
        steps=minibatches(train, seed=seed, epochs=10),
        score=r2(test),
    )


@planted("weights too large at the start", causes="bad-initialisation", is_finite=True)
def weights_of_hundreds(seed: int, *, fault: bool) -> Training:
    """Weights begin with a deviation of 100: the first loss is about 1e10."""
    train, test = blobs(seed)
    model = mlp(10, 4)
    if fault:
        for position in (0, 2, 4):
            nn.init.normal_(linear(model, position).weight, std=100.0)
    return Training(
        model=model,
        optimizer=sgd(model),
        compute_loss=cross_entropy,
        steps=minibatches(train, seed=seed, epochs=10),
        score=accuracy(test),
        num_classes=4,
    )


@planted("saturated from the start", causes="bad-initialisation", is_finite=True)
def saturated_tanh(seed: int, *, fault: bool) -> Training:
    """Four layers of tanh with weights of deviation 30: gradients vanish behind saturation."""
    train, test = waves(seed)
    layers: list[nn.Module] = []
    for width in (32, 48, 48):
        layers += [nn.Linear(width, 48), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Linear(48, 4))
    if fault:
        for position in (0, 2, 4):
            nn.init.normal_(linear(model, position).weight, std=30.0)
    return Training(
        model=model,
        optimizer=sgd(model),
        compute_loss=cross_entropy,
        steps=minibatches(train, seed=seed, epochs=15),
        score=accuracy(test),
        num_classes=4,
    )


@planted("rate too high", causes="learning-rate", is_finite=True)
def collapse_by_rate(seed: int, *, fault: bool) -> Training:
    """A classifier of texts at a rate of 2: one class for everything."""
    (tokens, labels), test = token_rows(seed)

    class Bag(nn.Module):
        """An embedding, and a net over its sum."""

        def __init__(self) -> None:
            super().__init__()
            self.embed, self.net = nn.EmbeddingBag(31, 16, mode="sum"), mlp(16, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            outputs: Tensor = self.net(self.embed(tokens))
            return outputs

    model = Bag()
    return Training(
        model=model,
        optimizer=sgd(model, 2.0 if fault else 0.05),
        compute_loss=cross_entropy,
        steps=minibatches((tokens, labels), seed=seed, epochs=10),
        score=accuracy(test),
        num_classes=3,
    )


@planted("rate too high", causes="learning-rate", is_finite=True)
def adam_at_one(seed: int, *, fault: bool) -> Training:
    """Adam at a rate of 1 instead of 0.001."""
    train, test = waves(seed)
    model = mlp(32, 4, width=64)
    return Training(
        model=model,
        optimizer=adam(model, 1.0 if fault else 0.003),
        compute_loss=cross_entropy,
        steps=minibatches(train, seed=seed, epochs=12),
        score=accuracy(test),
        num_classes=4,
    )


@planted("schedule that never stops rising", causes="learning-rate", is_finite=True)
def warmup_without_end(seed: int, *, fault: bool) -> Training:
    """A warm-up grows by a factor at each step and is never capped."""
    train, test = blobs(seed, spread=1.0)
    model = mlp(10, 4)
    optimizer = adam(model, 0.001)
    schedule = LambdaLR(optimizer, lambda step: 1.05 ** (step if fault else min(step, 40)))
    return Training(
        model=model,
        optimizer=optimizer,
        compute_loss=cross_entropy,
        steps=minibatches(train, seed=seed, epochs=10),
        score=accuracy(test),
        scheduler=schedule,
        num_classes=4,
    )


@planted("schedule with a spike", causes="learning-rate", is_finite=True)
def restart_at_old_rate(seed: int, *, fault: bool) -> Training:
    """A resumed schedule restarts at 2,000 times the rate for ten steps."""
    train, test = blobs(seed)
    model = mlp(10, 4)
    optimizer = adam(model)
    schedule = LambdaLR(optimizer, lambda step: 2000.0 if fault and 100 <= step < 110 else 1.0)
    return Training(
        model=model,
        optimizer=optimizer,
        compute_loss=cross_entropy,
        steps=minibatches(train, seed=seed, epochs=12),
        score=accuracy(test),
        scheduler=schedule,
        num_classes=4,
    )


@planted("one sample in other units", causes="bad-data", is_finite=True)
def one_row_in_other_units(seed: int, *, fault: bool) -> Training:
    """One row of a regression is 10,000 times too large, seen once an epoch from the fourth on."""
    (inputs, targets), test = plane(seed)
    bad = 64 + 5 * seed
    steps = minibatches((inputs, targets), seed=seed, epochs=12, is_shuffled=False)
    if fault:
        for number, step in enumerate(steps):
            if step.epoch > 3 and number % 20 == 2:
                step.batch[0][5 * seed] *= 1e4
    model = mlp(6, 1)
    return Training(
        model=model,
        optimizer=adam(model, 0.01),
        compute_loss=squared_error,
        steps=steps,
        score=r2(test),
        bad_samples=as_set([bad]),
    )


@planted("one label in other units", causes="bad-label bad-data", is_finite=True)
def one_target_in_other_units(seed: int, *, fault: bool) -> Training:
    """One target of a regression is 1e6 instead of 1, in each epoch."""
    (inputs, targets), test = plane(seed)
    bad = 64 + 5 * seed
    if fault:
        targets[bad] = 1e6
    model = mlp(6, 1)
    return Training(
        model=model,
        optimizer=adam(model, 0.01),
        compute_loss=squared_error,
        steps=minibatches((inputs, targets), seed=seed, epochs=12),
        score=r2(test),
        bad_samples=as_set([bad]),
    )


@planted("optimizer's state damaged", causes="optimizer-state", is_finite=True)
def lost_second_moment(seed: int, *, fault: bool) -> Training:
    """At step 120 Adam's squares come back as zeros from a checkpoint, beside a count of 1e6."""
    train, test = blobs(seed, spread=1.0)
    model = mlp(10, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003, betas=(0.9, 0.99999))

    def resume(number: int) -> None:
        if fault and number == 120:
            for state in optimizer.state.values():
                state["exp_avg_sq"].zero_()
                state["step"].fill_(1e6)

    return Training(
        model=model,
        optimizer=optimizer,
        compute_loss=cross_entropy,
        steps=minibatches(train, seed=seed, epochs=12),
        score=accuracy(test),
        num_classes=4,
        before_step=resume,
    )


@planted("optimizer's state damaged", causes="optimizer-state")
def momentum_in_other_units(seed: int, *, fault: bool) -> Training:
    """At step 120 the momentum is loaded from a run with gradients 100,000 times larger."""
    train, test = blobs(seed)
    model = mlp(10, 4)
    optimizer = sgd(model, 0.02)

    def resume(number: int) -> None:
        if fault and number == 120:
            for state in optimizer.state.values():
                state["momentum_buffer"].mul_(1e5)

    return Training(
        model=model,
        optimizer=optimizer,
        compute_loss=cross_entropy,
        steps=minibatches(train, seed=seed, epochs=12),
        score=accuracy(test),
        num_classes=4,
        before_step=resume,
    )


@planted(
    "weights changed from outside",
    causes="not-reproducible received-model unknown",
    is_finite=True,
)
def weights_overwritten(seed: int, *, fault: bool) -> Training:
    """At step 120 a callback writes weights of another scale over a layer, beside the optimizer."""
    train, test = blobs(seed)
    model = mlp(10, 4)

    def overwrite(number: int) -> None:
        if fault and number == 120:
            with torch.no_grad():
                linear(model, 2).weight.mul_(-300.0)
                linear(model, 4).weight.mul_(300.0)

    return Training(
        model=model,
        optimizer=adam(model),
        compute_loss=cross_entropy,
        steps=minibatches(train, seed=seed, epochs=12),
        score=accuracy(test),
        num_classes=4,
        before_step=overwrite,
    )


@planted("updates lost in 16 bits", causes="precision", is_finite=True)
def weights_in_bfloat16(seed: int, *, fault: bool) -> Training:
    """Weights in bfloat16 at a small rate: updates round to nothing."""
    (inputs, labels), (test_inputs, test_labels) = blobs(seed)
    model = mlp(10, 4)
    dtype = torch.bfloat16 if fault else torch.float32
    model.to(dtype)
    return Training(
        model=model,
        optimizer=sgd(model, 0.0004, 0.9),
        compute_loss=cross_entropy,
        steps=minibatches((inputs.to(dtype), labels), seed=seed, epochs=20),
        score=accuracy((test_inputs.to(dtype), test_labels)),
        num_classes=4,
    )


@planted(
    "moving target that feeds itself",
    causes="learning-rate exploding-gradient unknown",
    is_finite=True,
    is_curable=False,
)
def bootstrapped_values(seed: int, *, fault: bool) -> Training:
    """Q-learning whose discount is 3 and that has no target net: values grow and grow."""
    (states, rewards), test = plane(seed)
    following = states.roll(1, dims=0)
    discount = 3.0 if fault else 0.05
    model = mlp(6, 1)

    def temporal(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        values = model(batch[0])
        with torch.no_grad():
            goal = batch[2] + discount * model(batch[1])
        return F.mse_loss(values, goal), values

    return Training(
        model=model,
        optimizer=adam(model, 0.01),
        compute_loss=temporal,
        steps=minibatches((states, following, rewards), seed=seed, epochs=15),
        score=r2(test),
    )
