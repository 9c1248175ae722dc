"""Faults in what a loss computes: formulas that leave their domain, empty sums."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
    rng,
    sgd,
    some,
    token_rows,
)


@planted("arc cosine or root at its edge", causes="loss-function", phases="loss backward")
def angle_without_clamp(seed: int, *, fault: bool) -> Training:
    """Angular loss: the arc cosine of a cosine that rounds to more than 1."""
    drawn = rng(seed, 11)
    inputs = torch.randn(1140, 3, generator=drawn)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=drawn)).Q
    targets = F.normalize(inputs @ turn, dim=1)
    model = nn.Linear(3, 3, bias=False)

    def angle(model: nn.Module, batch: Batch, *, is_safe: bool) -> Tensor:
        cosine = (F.normalize(model(batch[0]), dim=1) * batch[1]).sum(dim=1)
        return (cosine.clamp(-1 + 1e-6, 1 - 1e-6) if is_safe else cosine).acos().mean()

    return Training(
        model=model,
        optimizer=adam(model, 0.02),
        compute_loss=lambda model, batch: angle(model, batch, is_safe=not fault),
        steps=minibatches((inputs[:640], targets[:640]), seed=seed),
        score=lambda model: (
            1 - angle(model, (inputs[640:], targets[640:]), is_safe=True).item() / 3.14
        ),
    )


@planted("arc cosine or root at its edge", causes="loss-function bad-data", phases="backward loss")
def duplicated_rows_in_pairs(seed: int, *, fault: bool) -> Training:
    """Contrastive loss on the root of squared distances: a duplicated row has distance zero."""
    (inputs, labels), test = blobs(seed, dim=8)
    # Both are in the third batch of an epoch that isn't shuffled.
    first, second = 64 + 3 * seed, 75 + 3 * seed
    if fault:
        inputs[second], labels[second] = inputs[first], labels[first]
    model = mlp(8, 4)

    def contrast(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        outputs = model(batch[0])
        left, right = torch.triu_indices(len(outputs), len(outputs), 1)
        distance = (outputs[left] - outputs[right]).square().sum(dim=1).sqrt()
        is_same = batch[1][left] == batch[1][right]
        pull = torch.where(is_same, distance, (2 - distance).relu()).mean()
        return pull + F.cross_entropy(outputs, batch[1]), outputs

    return Training(
        model=model,
        optimizer=adam(model),
        compute_loss=contrast,
        steps=minibatches((inputs, labels), seed=seed, is_shuffled=False),
        score=accuracy(test),
        bad_samples=as_set([first, second]),
    )


@planted("empty sum in the denominator", causes="loss-function degenerate-batch", phases="loss")
def cox_without_events(seed: int, *, fault: bool) -> Training:
    """Cox's partial likelihood divided by the number of events: some batches have none."""
    (inputs, risk), (test_inputs, test_risk) = plane(seed)
    drawn = rng(seed, 12)
    times = torch.empty(640).exponential_(generator=drawn) * (-2 * risk[:, 0]).exp()
    events = (torch.rand(640, generator=drawn) < 0.15).float()
    model = mlp(6, 1)

    def partial_likelihood(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        outputs = model(batch[0])
        order = batch[1].argsort(descending=True)
        hazard, event = outputs[order, 0], batch[2][order]
        terms = (hazard - hazard.logcumsumexp(dim=0)) * event
        return -terms.sum() / (event.sum() if fault else event.sum().clamp(min=1)), outputs

    def concordance(model: nn.Module) -> float:
        guess = model(test_inputs)[:, 0]
        order = (guess[:, None] > guess) == (test_risk > test_risk[:, 0])
        return float(order.float().mean().item())

    return Training(
        model=model,
        optimizer=adam(model),
        compute_loss=partial_likelihood,
        steps=minibatches((inputs, times, events), seed=seed, size=16),
        score=concordance,
    )


@planted(
    "empty sum in the denominator",
    causes="degenerate-batch bad-label loss-function",
    phases="loss",
)
def every_label_ignored(seed: int, *, fault: bool) -> Training:
    """A batch whose labels are all -100: the mean of no losses."""
    (inputs, labels), test = blobs(seed)
    if fault:
        labels[320:352] = -100
    model = mlp(10, 4)
    return Training(
        model=model,
        optimizer=adam(model),
        compute_loss=cross_entropy,
        steps=minibatches((inputs, labels), seed=seed, is_shuffled=False),
        score=accuracy(test),
        num_classes=4,
    )


@planted("deviation of one sample", causes="degenerate-batch", phases="loss")
def advantages_of_one(seed: int, *, fault: bool) -> Training:
    """Rewards normalised by their deviation; the last minibatch of each epoch has one sample."""
    (inputs, labels), test = blobs(seed, num=641)
    if not fault:
        inputs, labels = inputs[:640], labels[:640]
    model = mlp(10, 4)
    weights = 1 + torch.rand(len(inputs), generator=rng(seed, 13))

    def advantage_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        outputs = model(batch[0])
        advantage = (batch[1] - batch[1].mean()) / (batch[1].std() + 1e-8)
        losses = F.cross_entropy(outputs, batch[2], reduction="none")
        return (losses * (2 + advantage).clamp(min=0)).mean(), outputs

    return Training(
        model=model,
        optimizer=adam(model),
        compute_loss=advantage_loss,
        steps=minibatches((inputs, weights, labels), seed=seed, size=32),
        score=accuracy(test),
        num_classes=4,
    )


@planted("negative scale from a raw output", causes="loss-function", phases="loss")
def raw_deviation(seed: int, *, fault: bool) -> Training:
    """Gaussian likelihood whose deviation is a raw output: the log of a negative number."""
    train, test = plane(seed)
    model = mlp(6, 2)

    def likelihood(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        outputs = model(batch[0])
        mean, scale = outputs[:, :1], outputs[:, 1:]
        scale = scale if fault else F.softplus(scale) + 0.05
        return (scale.log() + ((batch[1] - mean) / scale).square() / 2).mean(), outputs

    return Training(
        model=model,
        optimizer=adam(model),
        compute_loss=likelihood,
        steps=minibatches(train, seed=seed),
        score=r2(test),
    )


@planted("power with a steep root", causes="loss-function", phases="backward loss")
def focal_root(seed: int, *, fault: bool) -> Training:
    """Focal loss with gamma 0.5: the gradient of (1-p)^0.5 where p has become exactly 1."""
    train, test = blobs(seed, spread=4.0)
    model = mlp(10, 4)

    def focal(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        outputs = model(batch[0])
        log_p = F.log_softmax(outputs, dim=1).gather(1, batch[1][:, None])
        miss = 1 - log_p.exp()
        return -((miss if fault else miss.clamp(min=1e-6)).pow(0.5) * log_p).mean(), outputs

    return Training(
        model=model,
        optimizer=adam(model, 0.02),
        compute_loss=focal,
        steps=minibatches(train, seed=seed),
        score=accuracy(test),
        num_classes=4,
    )


@planted("zero times the log of zero", causes="loss-function", phases="loss")
def distilled_from_one_hot(seed: int, *, fault: bool) -> Training:
    """Divergence from a teacher's probabilities that hold zeros: 0 times log 0."""
    (inputs, labels), test = blobs(seed)
    teacher = F.one_hot(labels, 4).float()
    model = mlp(10, 4)

    def divergence(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        outputs = model(batch[0])
        log_p = F.log_softmax(outputs, dim=1)
        own = batch[1] * batch[1].log() if fault else torch.xlogy(batch[1], batch[1])
        return (own - batch[1] * log_p).sum(dim=1).mean(), outputs

    return Training(
        model=model,
        optimizer=adam(model),
        compute_loss=divergence,
        steps=minibatches((inputs, teacher), seed=seed),
        score=accuracy(test),
    )


@planted(
    "deviation of a constant", causes="loss-function bad-initialisation", phases="loss backward"
)
def correlation_of_constant(seed: int, *, fault: bool) -> Training:
    """Correlation loss over a head that begins at zero: the deviation of a constant output."""
    train, test = plane(seed)
    model = mlp(6, 1)
    head = model[4]
    assert isinstance(head, nn.Linear)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    tiny = 0.0 if fault else 1e-2

    def correlation(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        outputs = model(batch[0])
        left, right = outputs - outputs.mean(), batch[1] - batch[1].mean()
        spread = (left.square().mean() * right.square().mean() + tiny**2).sqrt()
        return 1 - (left * right).mean() / spread + 0.1 * F.mse_loss(outputs, batch[1]), outputs

    return Training(
        model=model,
        optimizer=adam(model),
        compute_loss=correlation,
        steps=minibatches(train, seed=seed, epochs=15),
        score=r2(test),
    )


@planted(
    "norm of a zero gradient", causes="loss-function bad-initialisation", phases="backward loss"
)
def penalty_of_flat_critic(seed: int, *, fault: bool) -> Training:
    """Gradient penalty of a critic whose head begins at zero: the root of a zero gradient."""
    (inputs, labels), test = blobs(seed, classes=2)
    model = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 1))
    head = model[2]
    assert isinstance(head, nn.Linear)
    nn.init.zeros_(head.weight)
    tiny = 0.0 if fault else 1e-6

    def penalised(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        points = batch[0].detach().clone().requires_grad_()
        value = model(points)
        (slope,) = torch.autograd.grad(value.sum(), points, create_graph=True)
        norm = (slope.square().sum(dim=1) + tiny).sqrt()
        loss = F.binary_cross_entropy_with_logits(value[:, 0], batch[1].float())
        return loss + 0.1 * (norm - 1).square().mean(), value

    return Training(
        model=model,
        optimizer=adam(model),
        compute_loss=penalised,
        steps=minibatches((inputs, labels), seed=seed),
        score=lambda model: ((model(test[0])[:, 0] > 0).long() == test[1]).float().mean().item(),
    )


@planted("rate too high", causes="learning-rate exploding-gradient", is_finite=True)
def contrastive_scale(seed: int, *, fault: bool) -> Training:
    """Paired encoders with a learned log-scale whose own rate is far too high."""
    drawn = rng(seed, 17)
    hidden = torch.randn(1140, 6, generator=drawn)
    views = [hidden @ torch.randn(6, 10, generator=drawn) for _ in range(2)]
    left, right = (view + 0.3 * torch.randn(view.shape, generator=drawn) for view in views)

    class Pair(nn.Module):
        """Two encoders and a scale."""

        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(10, 8), nn.Linear(10, 8)
            self.log_scale = nn.Parameter(torch.tensor(1.5))

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            left_unit, right_unit = (
                F.normalize(self.left(left), dim=1),
                F.normalize(self.right(right), dim=1),
            )
            return self.log_scale.exp() * left_unit @ right_unit.T

    model = Pair()
    groups = [
        {"params": [*model.left.parameters(), *model.right.parameters()], "lr": 0.01},
        {"params": [model.log_scale], "lr": 12.0 if fault else 0.01},
    ]

    def contrast(model: nn.Module, batch: Batch) -> Tensor:
        outputs = model(*batch)
        own = torch.arange(len(outputs))
        return (F.cross_entropy(outputs, own) + F.cross_entropy(outputs.T, own)) / 2

    def recall(model: nn.Module) -> float:
        outputs = model(left[640:740], right[640:740])
        return float((outputs.argmax(dim=1) == torch.arange(100)).float().mean().item())

    return Training(
        model=model,
        optimizer=torch.optim.Adam(groups),
        compute_loss=contrast,
        steps=minibatches((left[:640], right[:640]), seed=seed),
        score=recall,
    )


@planted("overflow in a custom loss", causes="loss-function", phases="loss backward")
def exponential_loss(seed: int, *, fault: bool) -> Training:
    """Boosting's exp(-margin) with a quarter of the labels flipped and logits in hundreds."""
    (inputs, labels), test = blobs(seed, classes=2, spread=2.0)
    flipped = some(640, 160, seed=seed)
    labels[flipped] = 1 - labels[flipped]
    model = nn.Linear(10, 1)
    sharpness = 120.0 if fault else 0.5

    def boosting(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        outputs = model(batch[0])
        margin = (2 * batch[1] - 1) * outputs[:, 0]
        return (-sharpness * margin).exp().mean() / sharpness, outputs

    return Training(
        model=model,
        optimizer=sgd(model, 0.02, 0.0),
        compute_loss=boosting,
        steps=minibatches((inputs, labels), seed=seed),
        score=lambda model: ((model(test[0])[:, 0] > 0).long() == test[1]).float().mean().item(),
    )


@planted("overflow in a custom loss", causes="loss-function", phases="loss backward")
def lifted_structure(seed: int, *, fault: bool) -> Training:
    """Lifted structure loss: log of a sum of plain exponentials of margins in hundreds."""
    train, test = blobs(seed, dim=8)
    model = mlp(8, 4)

    def lifted(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        outputs = model(batch[0])
        distance = torch.cdist(outputs, outputs, compute_mode="donot_use_mm_for_euclid_dist")
        is_other = (batch[1][:, None] != batch[1]).float()
        margin = 20 * (6 - distance)
        if fault:
            pushed = (margin.exp() * is_other).sum(dim=1).log()
        else:
            pushed = (margin + is_other.log().clamp(min=-1e9)).logsumexp(dim=1)
        return F.cross_entropy(outputs, batch[1]) + 1e-3 * pushed.relu().mean(), outputs

    return Training(
        model=model,
        optimizer=adam(model),
        compute_loss=lifted,
        steps=minibatches(train, seed=seed),
        score=accuracy(test),
        num_classes=4,
    )


@planted("loss of a masked sum", causes="loss-function", phases="backward")
def masked_after_the_root(seed: int, *, fault: bool) -> Training:
    """A masked root: torch.where hides the root of padding, but its gradient is NaN."""
    (tokens, labels), test = token_rows(seed)

    class Gate(nn.Module):
        """The mean of embeddings, that of padding exactly zero at the start, and a head."""

        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(31, 16)
            with torch.no_grad():
                self.embed.weight[0] = 0.0
            self.head = nn.Linear(16, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            outputs: Tensor = self.head(self.embed(tokens).mean(dim=1))
            return outputs

    model = Gate()

    def with_entropy(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        outputs = model(batch[0])
        assert isinstance(model, Gate)
        size = model.embed(batch[0]).square().sum(dim=2)
        is_token = batch[0] > 0
        safe = size if fault else torch.where(is_token, size, 1.0)
        penalty = torch.where(is_token, safe.sqrt(), 0.0).mean()
        return F.cross_entropy(outputs, batch[1]) + 1e-3 * penalty, outputs

    return Training(
        model=model,
        optimizer=adam(model, 0.01),
        compute_loss=with_entropy,
        steps=minibatches((tokens, labels), seed=seed),
        score=accuracy(test),
        num_classes=3,
    )
