"""Healthy trainings whose loop, optimizer or model is unusual."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from benchmarks.unseen_doctor_cases.case import Batch, Training, healthy
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
    token_rows,
    waves,
)


@healthy
def thawed_half_way(seed: int) -> Training:
    """The first layers are frozen, and thawed at step 80."""
    train, test = blobs(seed)
    model = mlp(10, 4)
    frozen = [*model[0].parameters(), *model[2].parameters()]
    for weight in frozen:
        weight.requires_grad_(False)

    def thaw(number: int) -> None:
        if number == 80:
            for weight in frozen:
                weight.requires_grad_()

    return Training(
        model=model,
        optimizer=adam(model),
        compute_loss=cross_entropy,
        steps=minibatches(train, seed=seed, epochs=10),
        score=accuracy(test),
        num_classes=4,
        before_step=thaw,
    )


@healthy
def rate_set_by_hand(seed: int) -> Training:
    """The loop writes the rate into the optimizer before each step: warm-up, then a cosine."""
    train, test = blobs(seed)
    model = mlp(10, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)

    def set_rate(number: int) -> None:
        cosine = (1 + torch.cos(torch.tensor(number / 200 * 3.14159))).item() / 2
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * min(number / 20, cosine)

    return Training(
        model=model,
        optimizer=optimizer,
        compute_loss=cross_entropy,
        steps=minibatches(train, seed=seed, epochs=10),
        score=accuracy(test),
        num_classes=4,
        before_step=set_rate,
        clip_norm=1.0,
    )


class WithTarget(nn.Module):
    """A value net, and a copy of it that isn't trained."""

    def __init__(self) -> None:
        super().__init__()
        self.online = mlp(6, 1)
        self.target = copy.deepcopy(self.online).requires_grad_(False)

    def forward(self, states: Tensor) -> Tensor:
        """Return values [n, 1]."""
        outputs: Tensor = self.online(states)
        return outputs


@healthy
def target_net_refreshed(seed: int) -> Training:
    """Q-learning: every 25 steps the target net is overwritten, and the loss jumps."""
    (states, rewards), (test_states, test_rewards) = plane(seed)
    model = WithTarget()

    def refresh(number: int) -> None:
        if number % 25 == 0:
            model.target.load_state_dict(model.online.state_dict())

    def temporal(model: nn.Module, batch: Batch) -> Tensor:
        assert isinstance(model, WithTarget)
        goal = batch[1] + 0.9 * model.target(batch[0])
        return F.smooth_l1_loss(model(batch[0]), goal)

    return Training(
        model=model,
        optimizer=torch.optim.Adam(model.online.parameters(), lr=0.01),
        compute_loss=temporal,
        steps=minibatches((states, rewards), seed=seed, epochs=40),
        score=r2((test_states, 10 * test_rewards)),
        before_step=refresh,
    )


@healthy
def momentum_teacher(seed: int) -> Training:
    """A teacher follows the student by a moving average after each step."""
    (inputs, labels), test = blobs(seed)

    class Pair(nn.Module):
        """A student and its teacher."""

        def __init__(self) -> None:
            super().__init__()
            self.student = mlp(10, 4)
            self.teacher = copy.deepcopy(self.student).requires_grad_(False)

        def forward(self, inputs: Tensor) -> Tensor:
            outputs: Tensor = self.student(inputs)
            return outputs

    model = Pair()

    def follow(number: int) -> None:
        with torch.no_grad():
            pairs = zip(model.teacher.parameters(), model.student.parameters(), strict=True)
            for slow, fast in pairs:
                slow.lerp_(fast, 0.05)

    def mean_teacher(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        assert isinstance(model, Pair)
        outputs = model(batch[0])
        noisy = model(batch[0] + 0.1 * torch.randn_like(batch[0]))
        goal = model.teacher(batch[0])
        return F.cross_entropy(outputs, batch[1]) + F.mse_loss(noisy, goal), outputs

    return Training(
        model=model,
        optimizer=adam(model),
        compute_loss=mean_teacher,
        steps=minibatches((inputs, labels), seed=seed, epochs=10),
        score=accuracy(test),
        num_classes=4,
        before_step=follow,
    )


@healthy
def rare_class(seed: int) -> Training:
    """Three samples in a hundred are positive: for long everything is answered negative."""
    drawn = rng(seed, 41)
    inputs = torch.randn(2500, 10, generator=drawn)
    labels = (inputs[:, 0] + inputs[:, 1] > 2.66).long()
    model = mlp(10, 2)

    def balanced(model: nn.Module) -> float:
        right = model(inputs[1500:]).argmax(dim=1) == labels[1500:]
        return float(sum(right[labels[1500:] == each].float().mean().item() for each in (0, 1)) / 2)

    return Training(
        model=model,
        optimizer=sgd(model, 0.02),
        compute_loss=cross_entropy,
        steps=minibatches((inputs[:1500], labels[:1500]), seed=seed, epochs=14),
        score=balanced,
        num_classes=2,
    )


@healthy
def policy_gradient(seed: int) -> Training:
    """REINFORCE: actions are sampled in the loss, which is noisy and negative."""
    (inputs, labels), test = blobs(seed, spread=2.5)
    model = mlp(10, 4)

    def reinforce(model: nn.Module, batch: Batch) -> Tensor:
        log_p = F.log_softmax(model(batch[0]), dim=1)
        actions = torch.multinomial(log_p.detach().exp(), 1)
        reward = 10 * (actions[:, 0] == batch[1]).float() - 3
        return -(log_p.gather(1, actions)[:, 0] * reward).mean()

    return Training(
        model=model,
        optimizer=adam(model, 0.005),
        compute_loss=reinforce,
        steps=minibatches((inputs, labels), seed=seed, epochs=20),
        score=accuracy(test),
    )


@healthy
def ids_beside_labels(seed: int) -> Training:
    """The batch ends with user numbers up to a million, and the label is before them."""
    (inputs, labels), test = blobs(seed)
    users = torch.randint(1_000_000, (640,), generator=rng(seed, 42))
    model = mlp(10, 4)

    def with_users(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        outputs = model(batch[0])
        weights = 1 + (batch[2] % 3).float() / 3
        losses = F.cross_entropy(outputs, batch[1], reduction="none")
        return (losses * weights).mean(), outputs

    return Training(
        model=model,
        optimizer=adam(model),
        compute_loss=with_users,
        steps=minibatches((inputs, labels, users), seed=seed, epochs=8),
        score=accuracy(test),
    )


@healthy
def sparse_rows(seed: int) -> Training:
    """An embedding with sparse gradients and SparseAdam: most rows have none in a step."""
    (tokens, labels), test = token_rows(seed)

    class Bag(nn.Module):
        """Embeddings whose sum is the answer."""

        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.EmbeddingBag(31, 3, mode="sum", sparse=True, padding_idx=0)

        def forward(self, tokens: Tensor) -> Tensor:
            outputs: Tensor = self.embed(tokens)
            return outputs

    model = Bag()
    return Training(
        model=model,
        optimizer=torch.optim.SparseAdam(list(model.parameters()), lr=0.05),
        compute_loss=cross_entropy,
        steps=minibatches((tokens, labels), seed=seed, epochs=6),
        score=accuracy(test),
        num_classes=3,
    )


@healthy
def targets_of_millions(seed: int) -> Training:
    """Targets in millions with Adam at a rate that suits them: losses of 1e12."""
    (inputs, targets), (test_inputs, test_targets) = plane(seed)
    model = nn.Linear(6, 1)
    return Training(
        model=model,
        optimizer=adam(model, 2e4),
        compute_loss=squared_error,
        steps=minibatches((inputs, 1e6 * targets), seed=seed, epochs=15),
        score=r2((test_inputs, 1e6 * test_targets)),
    )


@healthy
def spectral_normed(seed: int) -> Training:
    """Spectral norm: buffers move in each forward."""
    train, test = blobs(seed)
    model = nn.Sequential(spectral_norm(nn.Linear(10, 32)), nn.ReLU(), nn.Linear(32, 4))
    return Training(
        model=model,
        optimizer=adam(model, 0.005),
        compute_loss=cross_entropy,
        steps=minibatches(train, seed=seed, epochs=10),
        score=accuracy(test),
        num_classes=4,
    )


@healthy
def reversed_gradient(seed: int) -> Training:
    """Domain adversary behind a reversed gradient: one part of the loss is meant to rise."""
    (inputs, labels), test = blobs(seed)
    domains = (torch.rand(640, generator=rng(seed, 43)) < 0.5).long()
    inputs[:, 9] += 3.0 * domains

    class Adversarial(nn.Module):
        """Features, a classifier and a domain classifier."""

        def __init__(self) -> None:
            super().__init__()
            self.features, self.head = nn.Linear(10, 32), nn.Linear(32, 4)
            self.critic = nn.Linear(32, 2)

        def forward(self, inputs: Tensor) -> Tensor:
            outputs: Tensor = self.head(self.features(inputs).relu())
            return outputs

    model = Adversarial()

    def adversarial(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        assert isinstance(model, Adversarial)
        hidden = model.features(batch[0]).relu()
        outputs = model.head(hidden)
        reversed_hidden = 2 * hidden.detach() - hidden
        other = F.cross_entropy(model.critic(reversed_hidden), batch[1])
        return F.cross_entropy(outputs, batch[2]) + 0.5 * other, outputs

    return Training(
        model=model,
        optimizer=adam(model),
        compute_loss=adversarial,
        steps=minibatches((inputs, domains, labels), seed=seed, epochs=10),
        score=accuracy(test),
        num_classes=4,
    )


@healthy
def complex_weights(seed: int) -> Training:
    """A layer with complex weights over a Fourier transform."""
    train, test = waves(seed)

    class Spectral(nn.Module):
        """Complex weights, then the size of the result."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(0.1 * torch.randn(17, 24, dtype=torch.complex64))
            self.head = nn.Linear(24, 4)

        def forward(self, series: Tensor) -> Tensor:
            outputs: Tensor = self.head((torch.fft.rfft(series) @ self.weight).abs())
            return outputs

    model = Spectral()
    return Training(
        model=model,
        optimizer=adam(model, 0.01),
        compute_loss=cross_entropy,
        steps=minibatches(train, seed=seed, epochs=8),
        score=accuracy(test),
        num_classes=4,
    )


@healthy
def half_precision_well_used(seed: int) -> Training:
    """Autocast to bfloat16 around the forward, BatchNorm and dropout inside."""
    train, test = blobs(seed)
    model = nn.Sequential(
        nn.Linear(10, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.4), nn.Linear(64, 4)
    )

    def autocast(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = model(batch[0])
        return F.cross_entropy(outputs.float(), batch[1]), outputs

    return Training(
        model=model,
        optimizer=adam(model),
        compute_loss=autocast,
        steps=minibatches(train, seed=seed, epochs=10),
        score=accuracy(test),
        num_classes=4,
    )
