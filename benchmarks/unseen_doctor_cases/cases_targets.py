"""Faults of single targets and points: values for which a loss isn't defined or finite."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.unseen_doctor_cases.case import Batch, Training, planted
from benchmarks.unseen_doctor_cases.tasks import (
    accuracy,
    adam,
    as_set,
    blobs,
    minibatches,
    mlp,
    plane,
    r2,
    rng,
    some,
)


@planted("one odd target", causes="bad-label bad-data", phases="loss input")
def box_without_width(seed: int, *, fault: bool) -> Training:
    """Box regression on log sizes: three annotated boxes have no width."""
    (inputs, targets), (test_inputs, test_targets) = plane(seed)
    boxes, test_boxes = targets.exp().repeat(1, 2), test_targets.exp().repeat(1, 2)
    bad = some(640, 3, seed=seed)
    if fault:
        boxes[bad, 0] = 0.0
    model = mlp(6, 2)

    def log_sizes(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        outputs = model(batch[0])
        return F.smooth_l1_loss(outputs, batch[1].log()), outputs

    return Training(
        model=model,
        optimizer=adam(model),
        compute_loss=log_sizes,
        steps=minibatches((inputs, boxes), seed=seed),
        score=r2((test_inputs, test_boxes.log())),
        bad_samples=as_set(bad),
    )


@planted("one odd target", causes="bad-label bad-data", phases="loss input")
def missing_targets(seed: int, *, fault: bool) -> Training:
    """Two targets are NaN, as a table's empty cells become."""
    (inputs, targets), test = plane(seed)
    bad = some(640, 2, seed=seed)
    if fault:
        targets[bad] = torch.nan
    model = mlp(6, 1)

    def absolute(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        outputs = model(batch[0])
        return F.l1_loss(outputs, batch[1]), outputs

    return Training(
        model=model,
        optimizer=adam(model),
        compute_loss=absolute,
        steps=minibatches((inputs, targets), seed=seed),
        score=r2(test),
        bad_samples=as_set(bad),
    )


@planted("one odd target", causes="bad-label bad-data", phases="loss input")
def gamma_deviance_of_zero(seed: int, *, fault: bool) -> Training:
    """Gamma deviance of claims, one of which is 0: the log of an infinite quotient."""
    (inputs, targets), (test_inputs, test_targets) = plane(seed)
    claims = targets.exp()
    bad = some(640, 1, seed=seed)
    if fault:
        claims[bad] = 0.0
    model = mlp(6, 1)

    def deviance(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        outputs = model(batch[0])
        mean = outputs.exp()
        return 2 * ((mean / batch[1]).log() + batch[1] / mean - 1).mean(), outputs

    return Training(
        model=model,
        optimizer=adam(model),
        compute_loss=deviance,
        steps=minibatches((inputs, claims), seed=seed),
        score=r2((test_inputs, test_targets)),
        bad_samples=as_set(bad),
    )


@planted("one odd target", causes="bad-label bad-data", phases="loss input backward")
def action_on_the_border(seed: int, *, fault: bool) -> Training:
    """Behaviour cloning with a squashed Gaussian: an action of exactly 1 has no arc tangent."""
    (inputs, targets), (test_inputs, test_targets) = plane(seed)
    actions = torch.tanh(targets)
    bad = some(640, 3, seed=seed)
    if fault:
        actions[bad] = 1.0
    model = mlp(6, 1)

    def negative_log_prob(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        outputs = model(batch[0])
        raw = batch[1].atanh()
        log_prob = -(raw - outputs).square() / 2 - (1 - batch[1].square()).log()
        return -log_prob.mean(), outputs

    return Training(
        model=model,
        optimizer=adam(model),
        compute_loss=negative_log_prob,
        steps=minibatches((inputs, actions), seed=seed),
        score=r2((test_inputs, test_targets)),
        bad_samples=as_set(bad),
    )


@planted("overflow by one sample in the loss", causes="bad-data bad-label", phases="loss")
def ratio_of_old_policy(seed: int, *, fault: bool) -> Training:
    """Importance ratios exp(new - old): one stored log-probability is -10,000."""
    (inputs, labels), test = blobs(seed)
    old = torch.full((640,), -1.4)
    bad = some(640, 1, seed=seed)
    if fault:
        old[bad] = -1e4
    model = mlp(10, 4)

    def surrogate(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        outputs = model(batch[0])
        log_p = F.log_softmax(outputs, dim=1).gather(1, batch[2][:, None])[:, 0]
        ratio = (log_p - batch[1]).exp()
        return F.cross_entropy(outputs, batch[2]) - 0.1 * ratio.mean(), outputs

    return Training(
        model=model,
        optimizer=adam(model),
        compute_loss=surrogate,
        steps=minibatches((inputs, old, labels), seed=seed),
        score=accuracy(test),
        num_classes=4,
        bad_samples=as_set(bad),
    )


@planted("sequence loss without an alignment", causes="bad-label bad-data", phases="loss")
def transcript_too_long(seed: int, *, fault: bool) -> Training:
    """CTC: two transcripts repeat a letter and need more frames than there are."""
    drawn = rng(seed, 14)
    letters = torch.stack([1 + torch.randperm(5, generator=drawn)[:4] for _ in range(840)])
    frames = F.one_hot(letters.repeat_interleave(2, dim=1)[:, :7], 6).float()
    frames = 3 * frames + 0.5 * torch.randn(frames.shape, generator=drawn)
    bad = some(640, 2, seed=seed)
    targets = letters.clone()
    if fault:
        frames[bad, 4:] = 0.0
        targets[bad] = 2
    wide = torch.cat([targets, targets], dim=1)
    lengths = torch.full((840,), 4)
    lengths[bad] = 5 if fault else 4
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 6))

    def connectionist(model: nn.Module, batch: Batch) -> Tensor:
        log_p = F.log_softmax(model(batch[0]), dim=2).transpose(0, 1)
        frames_of = torch.full((len(batch[0]),), 7)
        return F.ctc_loss(log_p, batch[1], frames_of, batch[2])

    def decoded(model: nn.Module) -> float:
        best = model(frames[640:]).argmax(dim=2)
        right = 0
        for row, letter in zip(best, letters[640:], strict=True):
            merged = row.unique_consecutive()
            right += merged[merged > 0].tolist() == letter.tolist()
        return right / 200

    return Training(
        model=model,
        optimizer=adam(model, 0.01),
        compute_loss=connectionist,
        steps=minibatches((frames[:640], wide[:640], lengths[:640]), seed=seed),
        score=decoded,
        bad_samples=as_set(bad),
    )


@planted("one singular point", causes="bad-data loss-function", phases="loss backward")
def residual_at_the_axis(seed: int, *, fault: bool) -> Training:
    """Physics-informed net in polar coordinates: one collocation point has radius 0."""
    drawn = rng(seed, 15)
    radius = 0.05 + torch.rand(640, 1, generator=drawn)
    bad = some(640, 1, seed=seed)
    if fault:
        radius[bad] = 0.0
    model = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1))

    def residual(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        points = batch[0].detach().clone().requires_grad_()
        field = model(points)
        (slope,) = torch.autograd.grad(field.sum(), points, create_graph=True)
        (bend,) = torch.autograd.grad(slope.sum(), points, create_graph=True)
        equation = bend + slope / points - 4
        known = F.mse_loss(field, batch[1])
        return known + 1e-3 * equation.square().mean(), field

    grid = torch.linspace(0.05, 1.05, 100)[:, None]
    return Training(
        model=model,
        optimizer=adam(model, 0.01),
        compute_loss=residual,
        steps=minibatches((radius, radius.square()), seed=seed, epochs=10),
        score=r2((grid, grid.square())),
        bad_samples=as_set(bad),
    )


@planted("one silent signal", causes="bad-data bad-label loss-function", phases="loss")
def silent_reference(seed: int, *, fault: bool) -> Training:
    """Separation by SI-SDR: two references are silent, the projection is 0 over 0."""
    drawn = rng(seed, 16)
    base = torch.linalg.qr(torch.randn(16, 16, generator=drawn)).Q[:4]
    clean = torch.randn(1140, 4, generator=drawn) @ base
    noisy = clean + 0.4 * torch.randn(1140, 16, generator=drawn)
    bad = some(640, 2, seed=seed)
    if fault:
        clean[bad] = 0.0
    model = nn.Linear(16, 16)

    def distortion(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        outputs, target = model(batch[0]), batch[1]
        scale = (outputs * target).sum(1, keepdim=True) / target.square().sum(1, keepdim=True)
        rest = (outputs - scale * target).square().sum(dim=1)
        signal = (scale * target).square().sum(dim=1)
        return -10 * torch.log10(signal / (rest + 1e-8) + 1e-8).mean(), outputs

    def similarity(model: nn.Module) -> float:
        return F.cosine_similarity(model(noisy[640:]), clean[640:]).abs().mean().item()

    return Training(
        model=model,
        optimizer=adam(model, 0.01),
        compute_loss=distortion,
        steps=minibatches((noisy[:640], clean[:640]), seed=seed),
        score=similarity,
        bad_samples=as_set(bad),
    )
