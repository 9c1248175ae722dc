"""Faults of losses that aren't defined, or not finite, for every number they may meet."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.doctor_cases import data, tasks
from benchmarks.doctor_cases.cases import Case, Expected, Outcome
from benchmarks.doctor_cases.nets import PlainMLP
from benchmarks.doctor_cases.training import Batch, ComputeLoss, Data, Fault, Task
from fedrounds.diagnosis.values import Cause, StepPhase

_LOSS = frozenset({StepPhase.LOSS})
_BACKWARD = frozenset({StepPhase.BACKWARD})
_OUTSIDE = frozenset({""})


def loss_functions() -> list[Case]:
    """Return the cases of losses that meet a number for which they aren't defined or finite."""
    binary = replace(
        tasks.MLP, load=lambda: data.blobs(2), build=lambda: PlainMLP(num_outputs=2), num_classes=2
    )
    positive = replace(
        tasks.REGRESSION,
        load=_above_zero,
        score=_log_score,
        optimizer=tasks.sgd(0.1),
        least_score=0.93,
    )
    from_zero = replace(
        tasks.REGRESSION, load=_begins_at_zero, build=_zero_outputs, is_shuffled=False
    )
    cosine_cnn = replace(tasks.SMALL_CNN, optimizer=tasks.adam(0.002))
    hotter = replace(tasks.MLP, optimizer=tasks.sgd(0.0005))
    zero_biases = replace(tasks.MLP, build=_zero_biases)
    rows: list[tuple[str, Task, ComputeLoss, ComputeLoss, frozenset[StepPhase]]] = [
        ("mlp log of a softmax", tasks.MLP, _log_of_softmax(95.0), _cosine_softmax(95.0), _LOSS),
        (
            "small cnn log of a softmax",
            cosine_cnn,
            _log_of_softmax(110.0),
            _cosine_softmax(110.0),
            # A chance that is only just above zero: its logarithm is finite, its derivative isn't.
            _BACKWARD,
        ),
        ("mlp exponentials summed", hotter, _summed_exponentials(60.0), _log_softmax(60.0), _LOSS),
        (
            "mlp cosine softmax at a low temperature",
            tasks.MLP,
            _cosine_naive,
            _cosine_softmax(95.0),
            _LOSS,
        ),
        ("mlp bce of saturated probabilities", binary, _naive_bce(15.0), _stable_bce(15.0), _LOSS),
        (
            "mlp distillation of hard targets",
            tasks.MLP,
            _naive_divergence,
            tasks.cross_entropy,
            _LOSS,
        ),
        ("mlp focal loss of a root", tasks.MLP, _focal_root(12.0), _log_softmax(12.0), _BACKWARD),
        (
            "mlp group lasso on zero biases",
            zero_biases,
            _group_lasso(0.0),
            _group_lasso(1e-12),
            _BACKWARD,
        ),
        (
            "regression logarithm of a negative prediction",
            positive,
            _log_error(0.0),
            _log_error(0.01),
            _LOSS,
        ),
        (
            "regression square root of a perfect fit",
            from_zero,
            _root_error(0.0),
            _root_error(1e-6),
            _BACKWARD,
        ),
    ]
    cases = [
        Case(
            name=name,
            task=task,
            seed=seed,
            fault=Fault(overrides={"loss": naive}),
            expected=Expected(
                causes=frozenset({Cause.LOSS_FUNCTION}),
                phases=phases,
                modules=_OUTSIDE,
                # Of a cosine's exponentials almost all are too large or too small: where they are
                # kept finite there is next to no gradient left to learn from.
                outcome=Outcome.CURED_OR_HALTED if naive is _cosine_naive else Outcome.CURED,
            ),
            twin={"loss": sane},
        )
        for seed, (name, task, naive, sane, phases) in enumerate(rows, start=300)
    ]
    return [*cases, *_pair_losses(), _empty_sentence()]


def _scaled(model: nn.Module, batch: Batch, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    inputs, labels = batch
    outputs = model(inputs)
    return outputs, scale * outputs, labels


def _log_softmax(scale: float) -> ComputeLoss:
    def loss(model: nn.Module, batch: Batch) -> tasks.Outcome:
        outputs, logits, labels = _scaled(model, batch, scale)
        return F.cross_entropy(logits, labels), outputs

    return loss


def _log_of_softmax(scale: float) -> ComputeLoss:
    def loss(model: nn.Module, batch: Batch) -> tasks.Outcome:
        outputs, logits, labels = _scaled(model, batch, 1.0)
        # Logits may be 1.41 times the scale apart; from 104 on a chance is zero in float32.
        chances = torch.softmax(scale * F.normalize(logits, dim=1), 1)
        return F.nll_loss(torch.log(chances), labels), outputs

    return loss


def _summed_exponentials(scale: float) -> ComputeLoss:
    def loss(model: nn.Module, batch: Batch) -> tasks.Outcome:
        outputs, logits, labels = _scaled(model, batch, scale)
        chosen = logits.gather(1, labels[:, None]).squeeze(1)
        return (torch.log(torch.exp(logits).sum(1)) - chosen).mean(), outputs

    return loss


def _cosine_naive(model: nn.Module, batch: Batch) -> tasks.Outcome:
    """Finite unless a cosine is above 0.93: then its exponential isn't."""
    outputs, logits, labels = _scaled(model, batch, 1.0)
    powers = torch.exp(95 * F.normalize(logits, dim=1))
    return -torch.log(powers.gather(1, labels[:, None]).squeeze(1) / powers.sum(1)).mean(), outputs


def _cosine_softmax(scale: float) -> ComputeLoss:
    def loss(model: nn.Module, batch: Batch) -> tasks.Outcome:
        outputs, logits, labels = _scaled(model, batch, 1.0)
        return F.cross_entropy(scale * F.normalize(logits, dim=1), labels), outputs

    return loss


def _naive_bce(scale: float) -> ComputeLoss:
    def loss(model: nn.Module, batch: Batch) -> tasks.Outcome:
        outputs, logits, labels = _scaled(model, batch, scale)
        chance = torch.sigmoid(logits[:, 1] - logits[:, 0])
        log_likelihoods = labels * torch.log(chance) + (1 - labels) * torch.log(1 - chance)
        return -log_likelihoods.mean(), outputs

    return loss


def _stable_bce(scale: float) -> ComputeLoss:
    def loss(model: nn.Module, batch: Batch) -> tasks.Outcome:
        outputs, logits, labels = _scaled(model, batch, scale)
        difference = logits[:, 1] - logits[:, 0]
        return F.binary_cross_entropy_with_logits(difference, labels.float()), outputs

    return loss


def _naive_divergence(model: nn.Module, batch: Batch) -> tasks.Outcome:
    inputs, labels = batch
    outputs = model(inputs)
    wanted = F.one_hot(labels, outputs.shape[1]).float()
    divergence = wanted * (torch.log(wanted) - outputs.log_softmax(1))
    return divergence.sum(1).mean(), outputs


def _focal_root(scale: float) -> ComputeLoss:
    def loss(model: nn.Module, batch: Batch) -> tasks.Outcome:
        outputs, logits, labels = _scaled(model, batch, scale)
        log_chance = logits.log_softmax(1).gather(1, labels[:, None]).squeeze(1)
        return -((1 - log_chance.exp()) ** 0.5 * log_chance).mean(), outputs

    return loss


def _group_lasso(floor: float) -> ComputeLoss:
    def loss(model: nn.Module, batch: Batch) -> tasks.Outcome:
        value, outputs = tasks.cross_entropy(model, batch)
        norms = [(parameter.square().sum() + floor).sqrt() for parameter in model.parameters()]
        return value + 1e-4 * torch.stack(norms).sum(), outputs

    return loss


def _zero_biases() -> nn.Module:
    model = PlainMLP()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    return model


def _zero_outputs() -> nn.Module:
    # Begins at the answer zero, as residual branches and value heads often do.
    model = PlainMLP(num_outputs=1)
    nn.init.zeros_(model.get_parameter("layers.4.weight"))
    nn.init.zeros_(model.get_parameter("layers.4.bias"))
    return model


def _begins_at_zero() -> tuple[Data, Data]:
    # An instrument warming up: the first 64 targets are exactly zero.
    train, test = data.curve()
    targets = train["targets"].clone()
    targets[:64] = 0
    return train | {"targets": targets}, test


def _above_zero() -> tuple[Data, Data]:
    train, test = ({**split, "targets": 1.5 + 0.4 * split["targets"]} for split in data.curve())
    return (
        train | {"targets": train["targets"].clamp(min=0.1)},
        test | {"targets": test["targets"].clamp(min=0.1)},
    )


def _log_error(floor: float) -> ComputeLoss:
    def loss(model: nn.Module, batch: Batch) -> tasks.Outcome:
        inputs, targets = batch
        outputs = model(inputs) + 0.3
        known = outputs if floor == 0 else outputs.clamp(min=floor)
        return (known.log() - targets.log()).square().mean(), outputs

    return loss


def _log_score(model: nn.Module, test: Data) -> float:
    return tasks.explained(model, {"rows": test["rows"], "targets": test["targets"] - 0.3})


def _root_error(floor: float) -> ComputeLoss:
    def loss(model: nn.Module, batch: Batch) -> tasks.Outcome:
        value, outputs = tasks.squared_error(model, batch)
        return (value + floor).sqrt(), outputs

    return loss


def _pair_losses() -> list[Case]:
    """A pair of the same row twice: nothing is odd about it, its distance is exactly zero."""
    rows: list[tuple[str, ComputeLoss, ComputeLoss]] = [
        ("siamese root of zero", _plain_distance, tasks.contrastive_loss),
        ("siamese fourth root of zero", _fourth_root(0.0), _fourth_root(1e-6)),
    ]
    cases = []
    for seed, (name, naive, sane) in enumerate(rows, start=320):
        step, order = 37, tasks.TWINS.order(seed)
        twice = [order.at(step)[position] for position in (4, 11, 21, 30)]

        def repeat(train: Data, twice: list[int] = twice) -> None:
            train["right"][twice] = train["left"][twice]
            train["same"][twice] = 1

        cases.append(
            Case(
                name=name,
                task=tasks.TWINS,
                seed=seed,
                fault=Fault(data=repeat, overrides={"loss": naive}),
                expected=Expected(
                    causes=frozenset({Cause.LOSS_FUNCTION}),
                    phases=_BACKWARD,
                    modules=_OUTSIDE,
                    step=step,
                ),
                twin={"loss": sane},
            )
        )
    return cases


def _plain_distance(model: nn.Module, batch: Data) -> Tensor:
    left, right = model(batch["left"], batch["right"])
    distance = (left - right).square().sum(1).sqrt()
    same = batch["same"].float()
    each: Tensor = same * distance.square() + (1 - same) * F.relu(3 - distance).square()
    return each.mean()


def _fourth_root(floor: float) -> ComputeLoss:
    def loss(model: nn.Module, batch: Data) -> Tensor:
        left, right = model(batch["left"], batch["right"])
        # Between the distance, which pulls evenly, and its square, which hardly pulls when near.
        pulled = ((left - right).square().sum(1) + floor).pow(0.25) * batch["same"]
        value: Tensor = tasks.contrastive_loss(model, batch) + 1e-3 * pulled.mean()
        return value

    return loss


def _empty_sentence() -> Case:
    step, position, seed = 52, 9, 330
    index = tasks.TAGGER.order(seed).at(step)[position]

    def empty(train: Data) -> None:
        train["tags"][index] = data.PADDING

    return Case(
        name="transformer a sentence without tags",
        task=tasks.TAGGER,
        seed=seed,
        fault=Fault(data=empty, overrides={"loss": _mean_of_means(0)}),
        expected=Expected(
            # The loss divides by the number of tags; and a sentence without any is an empty sample.
            causes=frozenset({Cause.LOSS_FUNCTION, Cause.BAD_DATA}),
            phases=_LOSS,
            modules=_OUTSIDE,
            step=step,
            positions=frozenset({position}),
            indices=frozenset({index}),
        ),
        twin={"loss": _mean_of_means(1)},
    )


def _mean_of_means(least: int) -> ComputeLoss:
    def loss(model: nn.Module, batch: Batch) -> tasks.Outcome:
        words, tags = batch
        outputs = model(words)
        each = F.cross_entropy(outputs, tags, ignore_index=data.PADDING, reduction="none")
        num_tags = (tags != data.PADDING).sum(1).clamp(min=least)
        return (each.sum(1) / num_tags).mean(), outputs

    return loss
