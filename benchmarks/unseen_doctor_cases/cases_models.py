"""Faults that come up in a model's forward or backward pass."""

import math
from typing import Any

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
    graphs,
    minibatches,
    mlp,
    plane,
    r2,
    rng,
    sgd,
    some,
    squared_error,
    token_rows,
    waves,
)


class MeanPool(nn.Module):
    """The mean over the tokens that aren't padding; without a guard, 0 over 0 for none."""

    def __init__(self, *, is_safe: bool) -> None:
        super().__init__()
        self.is_safe = is_safe

    def forward(self, vectors: Tensor, tokens: Tensor) -> Tensor:
        """Return [n, width] of vectors [n, length, width]."""
        is_token = (tokens > 0).float()[:, :, None]
        count = is_token.sum(dim=1)
        return (vectors * is_token).sum(dim=1) / (count.clamp(min=1) if self.is_safe else count)


class BagOfTokens(nn.Module):
    """Embedding, pooling, head."""

    def __init__(self, *, vocab: int = 31, is_safe: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, 16)
        self.pool = MeanPool(is_safe=is_safe)
        self.head = nn.Linear(16, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits [n, 3]."""
        outputs: Tensor = self.head(self.pool(self.embed(tokens), tokens))
        return outputs


@planted("empty sequence", causes="bad-data", phases="forward", modules="pool")
def pooling_no_tokens(seed: int, *, fault: bool) -> Training:
    """Mean pooling over tokens: two texts are empty, 0 over 0."""
    (tokens, labels), test = token_rows(seed)
    bad = some(640, 2, seed=seed)
    if fault:
        tokens[bad] = 0
    model = BagOfTokens(is_safe=False)
    return Training(
        model=model,
        optimizer=adam(model, 0.01),
        compute_loss=cross_entropy,
        steps=minibatches((tokens, labels), seed=seed),
        score=accuracy(test),
        num_classes=3,
        bad_samples=as_set(bad),
    )


@planted("index outside of a table", causes="bad-data", phases="forward", modules="embed")
def token_beyond_vocabulary(seed: int, *, fault: bool) -> Training:
    """A tokenizer with one more token than the embedding has rows: IndexError."""
    (tokens, labels), test = token_rows(seed)
    bad = some(640, 1, seed=seed)
    if fault:
        tokens[bad, 1] = 31
    model = BagOfTokens()
    return Training(
        model=model,
        optimizer=adam(model, 0.01),
        compute_loss=cross_entropy,
        steps=minibatches((tokens, labels), seed=seed),
        score=accuracy(test),
        num_classes=3,
        bad_samples=as_set(bad),
    )


class Standardise(nn.Module):
    """Subtracts the mean and divides by the deviation over a dimension, with no epsilon."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the standardised inputs."""
        centred = inputs - inputs.mean(dim=self.dim, keepdim=True)
        return centred / centred.square().mean(dim=self.dim, keepdim=True).sqrt()


@planted("constant signal", causes="bad-data", phases="forward", modules="scale")
def flat_series(seed: int, *, fault: bool) -> Training:
    """Series scaled each by its own deviation: three sensors never moved."""
    (series, labels), test = waves(seed)
    bad = some(640, 3, seed=seed)
    if fault:
        series[bad] = torch.tensor([[0.0], [1.0], [-2.0]])
    model = nn.Sequential()
    model.add_module("scale", Standardise(1))
    model.add_module("net", mlp(32, 4, width=64))
    return Training(
        model=model,
        optimizer=adam(model, 0.005),
        compute_loss=cross_entropy,
        steps=minibatches((series, labels), seed=seed, epochs=12),
        score=accuracy(test),
        num_classes=4,
        bad_samples=as_set(bad),
    )


@planted("constant column", causes="degenerate-batch", phases="forward", modules="scale")
def rare_indicator_column(seed: int, *, fault: bool) -> Training:
    """Columns scaled by the batch's deviation: a rare indicator is 0 in all of some batches."""
    (inputs, labels), (test_inputs, test_labels) = blobs(seed)
    drawn = rng(seed, 21)
    rate = 0.06 if fault else 0.5
    indicator = (torch.rand(640, 1, generator=drawn) < rate).float()
    test_indicator = (torch.rand(1000, 1, generator=drawn) < rate).float()
    model = nn.Sequential()
    model.add_module("scale", Standardise(0))
    model.add_module("net", mlp(11, 4))
    return Training(
        model=model,
        optimizer=adam(model),
        compute_loss=cross_entropy,
        steps=minibatches((torch.cat([inputs, indicator], 1), labels), seed=seed),
        score=accuracy((torch.cat([test_inputs, test_indicator], 1), test_labels)),
        num_classes=4,
    )


class GraphNet(nn.Module):
    """Two convolutions over a graph normalised by its degrees."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 16), nn.Linear(16, 2)
        self.normalise = DegreeNorm()

    def forward(self, adjacency: Tensor, features: Tensor) -> Tensor:
        """Return logits [n, 2]."""
        spread = self.normalise(adjacency)
        hidden = (spread @ self.first(features)).relu()
        outputs: Tensor = self.second(hidden + features.mean(2, keepdim=True)).mean(dim=1)
        return outputs


class DegreeNorm(nn.Module):
    """Symmetric normalisation by the root of the degrees."""

    def forward(self, adjacency: Tensor) -> Tensor:
        """Return the normalised adjacency."""
        root = adjacency.sum(dim=2).pow(-0.5)
        return root[:, :, None] * adjacency * root[:, None, :]


@planted("node without edges", causes="bad-data", phases="forward", modules="normalise")
def isolated_node(seed: int, *, fault: bool) -> Training:
    """Graph convolution: in two graphs a node has no edge, its degree's root is infinite."""
    (adjacency, features, labels), test = graphs(seed)
    bad = some(640, 2, seed=seed)
    if fault:
        adjacency[bad, 3, :] = 0.0
        adjacency[bad, :, 3] = 0.0
    model = GraphNet()
    return Training(
        model=model,
        optimizer=adam(model, 0.01),
        compute_loss=cross_entropy,
        steps=minibatches((adjacency, features, labels), seed=seed),
        score=accuracy(test),
        num_classes=2,
        bad_samples=as_set(bad),
    )


class LogOf(nn.Module):
    """The logarithm of one more than its input."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logarithm."""
        return inputs.log1p()


@planted("log of a negative input", causes="bad-data", phases="forward", modules="log")
def negative_count(seed: int, *, fault: bool) -> Training:
    """Counts go through log(1+x): three rows use -999 for missing."""
    (inputs, targets), (test_inputs, test_targets) = plane(seed)
    counts, test_counts = inputs.exp(), test_inputs.exp()
    bad = some(640, 3, seed=seed)
    if fault:
        counts[bad, 2] = -999.0
    model = nn.Sequential()
    model.add_module("log", LogOf())
    model.add_module("net", mlp(6, 1))
    return Training(
        model=model,
        optimizer=adam(model, 0.01),
        compute_loss=squared_error,
        steps=minibatches((counts, targets), seed=seed),
        score=r2((test_counts, test_targets)),
        bad_samples=as_set(bad),
    )


class LogEnergy(nn.Module):
    """The log of the energy in bands, with no floor."""

    def forward(self, signal: Tensor) -> Tensor:
        """Return [n, bands] of signals [n, length]."""
        outputs: Tensor = torch.fft.rfft(signal).abs()[:, 1:].square().log()
        return outputs


@planted("silent signal", causes="bad-data", phases="forward", modules="energy")
def silent_clip(seed: int, *, fault: bool) -> Training:
    """Log spectra without a floor: one clip is silent."""
    (clips, labels), test = waves(seed)
    bad = some(640, 1, seed=seed)
    if fault:
        clips[bad] = 0.0
    model = nn.Sequential()
    model.add_module("energy", LogEnergy())
    model.add_module("net", nn.Linear(16, 4))
    return Training(
        model=model,
        optimizer=adam(model, 0.01),
        compute_loss=cross_entropy,
        steps=minibatches((clips, labels), seed=seed),
        score=accuracy(test),
        num_classes=4,
        bad_samples=as_set(bad),
    )


class SquaredReLU(nn.Module):
    """The square of a ReLU."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the square."""
        return inputs.relu().square()


@planted("overflow in 16 bits", causes="precision", phases="forward", modules="square")
def half_squares(seed: int, *, fault: bool) -> Training:
    """Squared ReLUs in float16 over inputs in hundreds: beyond 65,504."""
    (inputs, labels), (test_inputs, test_labels) = blobs(seed)
    model = nn.Sequential()
    model.add_module("wide", nn.Linear(10, 32))
    model.add_module("square", SquaredReLU())
    model.add_module("norm", nn.LayerNorm(32))
    model.add_module("head", nn.Linear(32, 4))

    def in_half(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", dtype=torch.float16, enabled=fault):
            outputs = model(batch[0])
        return F.cross_entropy(outputs.float(), batch[1]), outputs

    return Training(
        model=model,
        optimizer=adam(model),
        compute_loss=in_half,
        steps=minibatches((100 * inputs, labels), seed=seed),
        score=accuracy((100 * test_inputs, test_labels)),
        num_classes=4,
    )


@planted("overflow in 16 bits", causes="precision", phases="forward loss", modules="attend")
def half_mask(seed: int, *, fault: bool) -> Training:
    """Attention in float16 sums exponentials of scores that haven't been scaled."""
    (tokens, labels), test = token_rows(seed)

    class Attend(nn.Module):
        """Softmax by hand: exp, sum, quotient."""

        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Linear(16, 1)

        def forward(self, vectors: Tensor) -> Tensor:
            scores = self.query(vectors)
            if fault:
                scores = scores.half()
            weights = (scores * 8).exp()
            outputs: Tensor = (
                (weights / weights.sum(dim=1, keepdim=True) * vectors).sum(dim=1).float()
            )
            return outputs

    class Reader(nn.Module):
        """Embedding, attention, head."""

        def __init__(self) -> None:
            super().__init__()
            self.embed, self.attend = nn.Embedding(31, 16), Attend()
            self.head = nn.Linear(16, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            outputs: Tensor = self.head(self.attend(self.embed(tokens)))
            return outputs

    model = Reader()
    return Training(
        model=model,
        optimizer=adam(model, 0.01),
        compute_loss=cross_entropy,
        steps=minibatches((tokens, labels), seed=seed, epochs=8),
        score=accuracy(test),
        num_classes=3,
    )


class SignGate(torch.autograd.Function):
    """Multiplies by the sign; the backward divides by the input."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:  # noqa: ANN401
        """Return the absolute values."""
        ctx.save_for_backward(inputs)
        return inputs.abs()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # noqa: ANN401
        """Return the gradient: 0 over 0 at 0."""
        (inputs,) = ctx.saved_tensors
        gradient: Tensor = grad * inputs / inputs.abs()
        return gradient


class Gate(nn.Module):
    """A module around the function."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the gate's outputs."""
        return SignGate.apply(inputs)  # type: ignore[no-any-return]


@planted("custom autograd function", causes="bad-data unknown", phases="backward", modules="gate")
def own_backward(seed: int, *, fault: bool) -> Training:
    """An own autograd function divides by its input: one sample is all zero."""
    (inputs, labels), test = blobs(seed)
    bad = some(640, 1, seed=seed)
    if fault:
        inputs[bad] = 0.0
    model = nn.Sequential()
    model.add_module("mix", nn.Linear(10, 16, bias=False))
    model.add_module("gate", Gate())
    model.add_module("net", mlp(16, 4))
    return Training(
        model=model,
        optimizer=adam(model),
        compute_loss=cross_entropy,
        steps=minibatches((inputs, labels), seed=seed),
        score=accuracy(test),
        num_classes=4,
        bad_samples=as_set(bad),
    )


class Recurrent(nn.Module):
    """A recurrent net of ReLUs over a series, and a head."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.cell = nn.RNN(1, width, nonlinearity="relu", batch_first=True)
        self.head = nn.Linear(width, 4)

    def forward(self, series: Tensor) -> Tensor:
        """Return logits [n, 4]."""
        outputs: Tensor = self.head(self.cell(series[:, :, None])[0][:, -1])
        return outputs


@planted("weights too large at the start", causes="bad-initialisation", modules="cell")
def recurrent_growth(seed: int, *, fault: bool) -> Training:
    """A recurrent net of ReLUs whose recurrent weights begin at 20 times the identity."""
    (series, labels), test = waves(seed)
    model = Recurrent()
    with torch.no_grad():
        weight = model.cell.get_parameter("weight_hh_l0")
        weight.copy_((20.0 if fault else 1.0) * torch.eye(len(weight)))
    return Training(
        model=model,
        optimizer=adam(model),
        compute_loss=cross_entropy,
        steps=minibatches((series, labels), seed=seed, epochs=10),
        score=accuracy(test),
        clip_norm=1.0,
        num_classes=4,
    )


class Flow(nn.Module):
    """Two affine couplings over pairs of numbers, with unbounded log-scales."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList([mlp(1, 2, width=16) for _ in range(2)])

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Return the latent points and the log-determinants."""
        left, right = points[:, :1], points[:, 1:]
        log_det = torch.zeros(len(points))
        for net in self.nets:
            log_scale, shift = net(left).chunk(2, dim=1)
            right = right * log_scale.exp() + shift
            log_det = log_det + log_scale[:, 0]
            left, right = right, left
        return torch.cat([left, right], dim=1), log_det


def flow_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean negative log-likelihood."""
    latent, log_det = model(batch[0])
    loss: Tensor = (latent.square().sum(dim=1) / 2 - log_det).mean()
    return loss


@planted("overflow by one sample", causes="bad-data", phases="forward loss backward")
def flow_outlier(seed: int, *, fault: bool) -> Training:
    """A coupling flow with unbounded scales: one point lies at 30,000."""
    drawn = rng(seed, 22)
    angle = 6.28 * torch.rand(1140, 1, generator=drawn)
    ring = torch.cat([angle.cos(), angle.sin() * angle.cos()], dim=1)
    points = 2 * ring + 0.2 * torch.randn(1140, 2, generator=drawn)
    bad = some(640, 1, seed=seed)
    if fault:
        points[bad] = 30_000.0
    model = Flow()
    test = (points[640:],)
    return Training(
        model=model,
        optimizer=adam(model, 0.005),
        compute_loss=flow_loss,
        steps=minibatches((points[:640],), seed=seed),
        score=lambda model: math.exp(-max(flow_loss(model, test).item(), 0.0) / 4),
        bad_samples=as_set(bad),
    )


@planted("join with an empty denominator", causes="bad-data", phases="input forward")
def rate_over_zero(seed: int, *, fault: bool) -> Training:
    """A column of rates: four rows had no visits, their rate is infinite."""
    (inputs, targets), test = plane(seed)
    bad = some(640, 4, seed=seed)
    if fault:
        inputs[bad, 1] = torch.inf
    model = mlp(6, 1)
    return Training(
        model=model,
        optimizer=adam(model, 0.01),
        compute_loss=squared_error,
        steps=minibatches((inputs, targets), seed=seed),
        score=r2(test),
        bad_samples=as_set(bad),
    )


@planted("norm layer on one sample", causes="degenerate-batch", phases="forward", modules="norm")
def last_batch_of_one(seed: int, *, fault: bool) -> Training:
    """BatchNorm, and 641 samples in batches of 32: the last batch has one sample."""
    (inputs, labels), test = blobs(seed, num=641 if fault else 640)
    model = nn.Sequential()
    model.add_module("wide", nn.Linear(10, 32))
    model.add_module("norm", nn.BatchNorm1d(32))
    model.add_module("act", nn.ReLU())
    model.add_module("head", nn.Linear(32, 4))
    return Training(
        model=model,
        optimizer=adam(model),
        compute_loss=cross_entropy,
        steps=minibatches((inputs, labels), seed=seed),
        score=accuracy(test),
        num_classes=4,
    )


@planted("label outside of the classes", causes="bad-label", phases="loss input")
def label_of_another_map(seed: int, *, fault: bool) -> Training:
    """Two labels come from a label map with a fifth class: IndexError."""
    (inputs, labels), test = blobs(seed)
    bad = some(640, 2, seed=seed)
    if fault:
        labels[bad] = 4
    model = mlp(10, 4)
    return Training(
        model=model,
        optimizer=sgd(model),
        compute_loss=cross_entropy,
        steps=minibatches((inputs, labels), seed=seed),
        score=accuracy(test),
        bad_samples=as_set(bad),
    )


@planted("singular matrix", causes="bad-data", phases="forward backward", modules="whiten")
def singular_covariance(seed: int, *, fault: bool) -> Training:
    """A layer solves a linear system of each sample's rows: two samples repeat a row."""
    drawn = rng(seed, 23)
    matrices = 0.4 * torch.randn(1140, 3, 3, generator=drawn) + 2 * torch.eye(3)
    vectors = torch.randn(1140, 3, generator=drawn)
    targets = torch.linalg.solve(matrices, vectors).sum(dim=1, keepdim=True)
    bad = some(640, 2, seed=seed)
    if fault:
        matrices[bad, 2] = matrices[bad, 1]

    class Whiten(nn.Module):
        """Solves by Cramer's rule with an explicit determinant."""

        def forward(self, packed: Tensor) -> Tensor:
            matrix, vector = packed[:, :9].view(-1, 3, 3), packed[:, 9:]
            rows = matrix.unbind(dim=1)
            crossed = [torch.linalg.cross(rows[i - 2], rows[i - 1]) for i in range(3)]
            determinant = (rows[0] * crossed[0]).sum(dim=1, keepdim=True)
            adjugate = torch.stack(crossed, dim=2)
            outputs: Tensor = (adjugate @ vector[:, :, None])[:, :, 0] / determinant
            return outputs

    packed = torch.cat([matrices.flatten(1), vectors], dim=1)
    model = nn.Sequential()
    model.add_module("whiten", Whiten())
    model.add_module("net", nn.Linear(3, 1))
    return Training(
        model=model,
        optimizer=adam(model, 0.02),
        compute_loss=lambda model, batch: F.l1_loss(model(batch[0]), batch[1]),
        steps=minibatches((packed[:640], targets[:640]), seed=seed),
        score=r2((packed[640:], targets[640:])),
        bad_samples=as_set(bad),
    )
