"""Metrics over a data set: what one evaluation computes, and what many clients' reports give."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torchmetrics
from torch import Tensor, nn

from fedrounds.errors import InvalidInput
from fedrounds.training.evaluation import evaluate
from fedrounds.training.metrics import (
    MetricFactory,
    make_metrics,
    measurement_sizes,
    measurements_of,
    pool,
)
from fedrounds.types import MAX_SUMS

NUM_CLASSES = 3
CLASSIFICATION: Mapping[str, MetricFactory] = {
    "macro_f1": lambda: torchmetrics.F1Score("multiclass", num_classes=3, average="macro"),
    "kappa": lambda: torchmetrics.CohenKappa("multiclass", num_classes=3),
    "binned_auc": lambda: torchmetrics.AUROC("multiclass", num_classes=3, thresholds=20),
}
REGRESSION: Mapping[str, MetricFactory] = {
    "r2": torchmetrics.R2Score,
    "mse": torchmetrics.MeanSquaredError,
}
EXACT: Mapping[str, MetricFactory] = {
    "auc": lambda: torchmetrics.AUROC("multiclass", num_classes=3),
}
"""Its state is the predictions and the labels themselves."""


def draw_classes(num_examples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return probabilities [n, 3] that lean to the target, and targets [n]."""
    random = torch.Generator().manual_seed(seed)
    targets = torch.randint(NUM_CLASSES, (num_examples,), generator=random)
    scores = torch.randn(num_examples, NUM_CLASSES, generator=random)
    scores[torch.arange(num_examples), targets] += 1
    return scores.softmax(dim=1), targets


def draw_values(num_examples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return predictions [n] and targets [n]."""
    random = torch.Generator().manual_seed(seed)
    targets = torch.randn(num_examples, generator=random)
    return targets + 0.5 * torch.randn(num_examples, generator=random), targets


def measure(factories: Mapping[str, MetricFactory], batch: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Return what a client with these outputs and targets reports."""
    metrics = make_metrics(factories)
    for metric in metrics.values():
        metric.update(*batch)
    return measurements_of(metrics)


def test_a_metric_is_that_of_the_whole_data_set() -> None:
    """Two classes, each alone in its batch, all answers right but one.

    Over all four: F1 is 4/5 for class 0 (2 right, 1 wrongly in it) and 2/3 for class 1: 11/15. Of
    each batch alone, as a mean of batches has it: (1 + 0) / 2 and (0 + 2/3) / 2, in the mean 5/12.
    """
    outputs = torch.tensor([[9.0, 0.0], [9.0, 0.0], [0.0, 9.0], [9.0, 0.0]])
    targets = torch.tensor([0, 0, 1, 1])
    evaluation = evaluate(
        nn.Identity(),
        [(outputs[:2], targets[:2]), (outputs[2:], targets[2:])],
        metrics={"f1": lambda: torchmetrics.F1Score("multiclass", num_classes=2, average="macro")},
    )
    assert evaluation.metrics == {"f1": pytest.approx(11 / 15)}


@pytest.mark.parametrize(
    ("factories", "draw"), [(CLASSIFICATION, draw_classes), (REGRESSION, draw_values)]
)
def test_sums_of_clients_give_the_metric_of_all_their_examples(
    factories: Mapping[str, MetricFactory], draw: Callable[[int, int], tuple[Tensor, Tensor]]
) -> None:
    """Clients of other sizes, one of a single example, which alone couldn't compute R2."""
    batches = [draw(size, seed) for seed, size in enumerate((1, 7, 40))]
    together = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    pooled = pool(factories, [measure(factories, batch) for batch in batches])
    for name, factory in factories.items():
        metric: Any = factory()
        metric.update(*together)
        assert pooled[name].value == pytest.approx(float(metric.compute()), rel=1e-5), name
        assert (pooled[name].is_pooled, pooled[name].num_clients) == (True, 3)


def test_what_clients_report_has_the_sizes_that_the_server_expects() -> None:
    for factories, batch in (
        ({**CLASSIFICATION, **EXACT}, draw_classes(9, 0)),
        (REGRESSION, draw_values(9, 0)),
    ):
        reported = measure(factories, batch)
        sizes = {name: len(values) for name, values in reported.items()}
        assert sizes == measurement_sizes(factories)


def test_a_state_of_predictions_stays_where_it_is() -> None:
    """Nine examples, one number; over clients it is the mean of their numbers."""
    reports = [measure(EXACT, draw_classes(9, seed)) for seed in range(2)]
    assert [{name: len(values) for name, values in report.items()} for report in reports] == [
        {"auc": 1},
        {"auc": 1},
    ]
    pooled = pool(EXACT, reports)["auc"]
    assert pooled.value == pytest.approx((reports[0]["auc"][0] + reports[1]["auc"][0]) / 2)
    assert (pooled.is_pooled, pooled.num_clients) == (False, 2)


def test_a_state_that_is_too_large_stays_where_it_is() -> None:
    size = MAX_SUMS + 1
    factories: Mapping[str, MetricFactory] = {
        "f1": lambda: torchmetrics.F1Score("multiclass", num_classes=size, average="macro")
    }
    assert measurement_sizes(factories) == {"f1": 1}


def test_clients_without_a_metric_are_passed_over() -> None:
    """The metric is that of those that report all of it; without any it isn't there."""
    whole = measure(REGRESSION, draw_values(9, 0))
    half = {name: values for name, values in whole.items() if name != "r2/total"}
    pooled = pool(REGRESSION, [whole, half])
    assert (pooled["r2"].num_clients, pooled["mse"].num_clients) == (1, 2)
    assert pool(REGRESSION, [{}]) == {}


@pytest.mark.parametrize("value", [0.0, -1e30, 1e30])
def test_sums_that_a_client_makes_up_end_nothing(value: float) -> None:
    """A metric that can't be computed from them is None, never an error."""
    factories = {**CLASSIFICATION, **REGRESSION}
    report = {name: (value,) * size for name, size in measurement_sizes(factories).items()}
    for metric in pool(factories, [report]).values():
        assert metric.value is None or abs(metric.value) < float("inf")
    assert pool(REGRESSION, [{**report, "r2/total": (0.0,)}])["r2"].value is None


def test_a_model_of_nan_has_no_metrics() -> None:
    """Argmax takes a NaN for an answer: all of class 0, which is half of these targets."""
    outputs = torch.full((4, 2), torch.nan)
    evaluation = evaluate(
        nn.Identity(),
        [(outputs, torch.tensor([0, 1, 0, 1]))],
        metrics={"f1": lambda: torchmetrics.F1Score("multiclass", num_classes=2)},
    )
    assert evaluation.metrics == {}


class OneNumber:
    """A metric without torchmetrics: what a task of its own may write."""

    def __init__(self, value: object) -> None:
        self._value = value

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Take nothing."""

    def compute(self) -> object:
        """Return the number that was given."""
        return self._value


@pytest.mark.parametrize("value", [0.5, torch.tensor([0.5]), 1])
def test_a_metric_is_anything_with_update_and_compute(value: object) -> None:
    evaluation = evaluate(
        nn.Identity(),
        [(torch.eye(2), torch.tensor([0, 1]))],
        metrics={"own": lambda: OneNumber(value)},
    )
    assert evaluation.metrics == {"own": float(value)}  # type: ignore[arg-type]
    assert measurement_sizes({"own": lambda: OneNumber(value)}) == {"own": 1}


@pytest.mark.parametrize(
    ("value", "described"),
    [("good", "a str"), (None, "a NoneType"), (torch.zeros(3), r"a tensor of shape \(3,\)")],
)
def test_what_isnt_one_number_is_refused_by_name(value: object, described: str) -> None:
    evaluation = evaluate(
        nn.Identity(),
        [(torch.eye(2), torch.tensor([0, 1]))],
        metrics={"own": lambda: OneNumber(value)},
    )
    with pytest.raises(InvalidInput, match=f"metric 'own' computed {described}; it must compute"):
        _ = evaluation.metrics


def test_a_factory_that_makes_no_metric_is_refused_by_name() -> None:
    """As where somebody gives a function of a batch."""
    factories: Any = {"f1": lambda: 0.5}
    with pytest.raises(InvalidInput, match="metric 'f1': its factory returned a float"):
        make_metrics(factories)


def test_metrics_of_a_training_step_need_its_outputs() -> None:
    """With them the step's labels are the targets; without them the refusal says what to return."""
    batch = {"values": torch.eye(2), "labels": torch.tensor([0, 0])}
    factories: Mapping[str, MetricFactory] = {
        "f1": lambda: torchmetrics.Accuracy("multiclass", num_classes=2)
    }

    def step(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        outputs = model(batch["values"])
        return outputs.mean(), outputs

    evaluation = evaluate(
        nn.Identity(), [batch], None, training_step=step, metrics=factories, num_classes=2
    )
    assert evaluation.metrics == {"f1": 0.5}
    with pytest.raises(InvalidInput, match=r"metrics \(f1\) need outputs and targets"):
        evaluate(
            nn.Identity(),
            [batch],
            None,
            training_step=lambda model, batch: step(model, batch)[0],
            metrics=factories,
        )
