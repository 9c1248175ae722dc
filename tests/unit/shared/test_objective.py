"""What a training minimises: the two ways to say it, any structure of batches, and accuracy."""

import math
from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedrounds.diagnosis.values import Diagnosis, DoctorSettings
from fedrounds.doctor import TrainingHalted
from fedrounds.errors import InvalidInput
from fedrounds.training.evaluation import evaluate
from fedrounds.training.loop import Callbacks, DoctorContext, train_model
from fedrounds.training.objective import count_correct, main_output

Named = namedtuple("Named", ["x", "y"])


@dataclass(frozen=True)
class Example:
    """A batch as a dataclass, with a part that is no tensor."""

    x: Tensor
    y: Tensor
    names: list[str]


def draw(num: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num, 4, generator=generator)
    return x, torch.arange(num) % 3


def make_model() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def train(batch: object, **options: Any) -> tuple[Tensor, Any]:  # noqa: ANN401
    """Return the weight after two epochs over one batch, and the report."""
    model = make_model()
    report = train_model(model, [batch], epochs=2, lr=0.1, **options).report
    return model.weight.detach(), report


# ---- batches of any structure


def test_every_structure_of_a_batch_trains_as_the_pair_does() -> None:
    """Dictionary, list, named tuple, dataclass with strings, nested with None: the same bits."""
    x, y = draw()
    expected, report = train((x, y))
    batches: list[tuple[object, Any]] = [
        ({"x": x, "labels": y}, lambda batch: (batch["x"], batch["labels"])),
        ([x, y], tuple),
        (Named(x, y), tuple),
        (Example(x, y, ["a"] * 6), lambda batch: (batch.x, batch.y)),
        ({"a": {"x": [x, None]}, "y": y}, lambda batch: (batch["a"]["x"][0], batch["y"])),
    ]
    for batch, parts in batches:

        def step(model: nn.Module, batch: object, parts: Any = parts) -> tuple[Tensor, Tensor]:  # noqa: ANN401
            inputs, targets = parts(batch)
            outputs = model(inputs)
            return F.cross_entropy(outputs, targets), outputs

        for doctor in (DoctorSettings(), DoctorSettings(is_armed=False)):
            weight, own_report = train(
                batch,
                training_step=step,
                doctor=doctor,
                doctor_context=DoctorContext(num_classes=3),
            )
            assert torch.equal(weight, expected)
            assert own_report.num_examples == report.num_examples == 6
            assert own_report.epochs == report.epochs
        measured = evaluate(make_model(), [batch], training_step=step, num_classes=3)
        assert measured == evaluate(make_model(), [(x, y)])


def test_inputs_and_targets_of_a_pair_may_be_structures() -> None:
    x, y = draw()

    class Sum(nn.Linear):
        def forward(self, inputs: dict[str, Tensor]) -> Any:  # type: ignore[override]  # noqa: ANN401
            return {"aux": 0, "out": super().forward(inputs["left"] + inputs["right"])}

    torch.manual_seed(0)
    model = Sum(4, 3)
    batch = ({"left": x, "right": torch.zeros_like(x)}, {"kind": y, "size": x.sum(1)})

    def loss(outputs: Tensor, targets: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(outputs["out"], targets["kind"])  # type: ignore[index]

    result = train_model(model, [batch], epochs=2, lr=0.1, loss=loss)
    assert torch.equal(model.weight.detach(), train((x, y))[0])
    # Targets that are no tensor are no classes.
    assert result.accuracy is None
    assert evaluate(model, [batch], loss).accuracy is None


def test_samples_in_lists_are_counted_as_items() -> None:
    """As a detection loader gives them: images of different sizes, and their boxes."""
    images = [torch.ones(2, size) for size in (3, 4, 5)]
    boxes = [torch.ones(size - 2, 4) for size in (3, 4, 5)]

    def step(model: nn.Module, batch: Any) -> Tensor:  # noqa: ANN401
        rows = torch.stack([boxes.mean(0) for boxes in batch[1]])
        return model(rows).square().mean()  # type: ignore[no-any-return]

    _, report = train([images, boxes], training_step=step, doctor=DoctorSettings())
    assert report.num_examples == 3
    assert report.epochs[0].accuracy is None


def test_what_a_pair_cant_be_made_of_is_refused_in_a_sentence() -> None:
    x, y = draw()
    with pytest.raises(InvalidInput, match=r"a batch is a tuple of 3; give .* training_step"):
        train_model(make_model(), [(x, y, y)])
    with pytest.raises(InvalidInput, match=r"a batch is a dict; give .* training_step"):
        evaluate(make_model(), [{"x": x}])


# ---- what a training step returns


def test_a_training_step_returns_a_loss_a_pair_a_dictionary_or_an_object() -> None:
    """Of several losses "loss" is the sum, the others are outputs."""
    x, y = draw()
    expected, _ = train((x, y))

    @dataclass
    class Output:
        loss: Tensor
        logits: Tensor

    def of(form: str) -> Any:  # noqa: ANN401
        def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Any:  # noqa: ANN401
            logits = model(batch[0])
            loss = F.cross_entropy(logits, batch[1])
            match form:
                case "loss":
                    return loss[None]
                case "pair":
                    return loss, logits
                case "dictionary":
                    return {"loss": 0.25 * loss + 0.75 * loss, "first": loss, "logits": logits}
            return Output(loss, logits)

        return step

    for form in ("loss", "pair", "dictionary", "object"):
        weight, report = train(
            (x, y), training_step=of(form), doctor_context=DoctorContext(num_classes=3)
        )
        torch.testing.assert_close(weight, expected)
        assert (report.epochs[0].accuracy is None) == (form == "loss")
        unknown = train((x, y), training_step=of(form))[1].epochs[0].accuracy
        assert unknown is None


@pytest.mark.parametrize(
    ("value", "described"),
    [(3.0, "a float"), (torch.zeros(3), r"a tensor of shape \(3,\)"), ({"a": 1}, "a dict")],
)
def test_what_is_no_loss_is_refused_by_name(value: object, described: str) -> None:
    with pytest.raises(InvalidInput, match=f"training_step returned {described}; it must return"):
        train_model(make_model(), [draw()], training_step=lambda *_: value)


def test_the_doctor_cures_a_training_step_of_dictionaries() -> None:
    """A NaN in an example is left out, and the other examples are counted."""
    x, y = draw(24)
    x[7, 1] = math.nan
    batches = [{"x": part, "labels": of} for part, of in zip(x.chunk(6), y.chunk(6), strict=True)]

    class Numbered(list[Any]):
        newest_indices: list[int]

        def __iter__(self) -> Any:  # noqa: ANN401
            for start, batch in enumerate(super().__iter__()):
                self.newest_indices = list(range(4 * start, 4 * start + 4))
                yield batch

    def step(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        outputs = model(batch["x"])
        return F.cross_entropy(outputs, batch["labels"]), outputs

    diagnoses: list[Diagnosis] = []
    report = train_model(
        make_model(),
        Numbered(batches),
        epochs=1,
        training_step=step,
        doctor=DoctorSettings(),
        doctor_context=DoctorContext(num_classes=3),
        callbacks=Callbacks(on_diagnosis=diagnoses.append),
    ).report
    assert [sample.index for sample in diagnoses[0].samples] == [7]
    assert (report.num_examples, report.has_dropped_samples) == (24, True)
    with pytest.raises(TrainingHalted):
        train_model(make_model(), batches, epochs=1, training_step=step)


# ---- accuracy where it means something


@pytest.mark.parametrize(
    ("outputs", "targets"),
    [
        (torch.zeros(4, 1), torch.zeros(4, 1)),
        (torch.zeros(4, 5), torch.zeros(4, 5)),
        (torch.zeros(4, 5), torch.zeros(4, 5, dtype=torch.int64)),
        (torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64)),
        (torch.zeros(4), torch.zeros(4, dtype=torch.int64)),
        (torch.zeros(4, 3), torch.zeros(4, dtype=torch.bool)),
        (torch.zeros(4, 3), torch.zeros(4)),
        (torch.zeros(4, 3), {"kind": torch.zeros(4, dtype=torch.int64)}),
        ({"loss": torch.zeros(())}, torch.zeros(4, dtype=torch.int64)),
        (None, torch.zeros(4, dtype=torch.int64)),
    ],
    ids=[
        *("regression", "multi-label", "whole-numbers", "counts", "one-logit", "flags", "floats"),
        *("structure", "loss-alone", "no-outputs"),
    ],
)
def test_there_is_no_accuracy_where_targets_are_no_classes(outputs: Any, targets: Any) -> None:  # noqa: ANN401
    assert count_correct(outputs, targets) is None


def test_regression_has_a_loss_and_no_accuracy() -> None:
    x, _ = draw()
    batch = (x, x[:, :3])
    result = train_model(make_model(), [batch], epochs=1, loss=F.mse_loss)
    assert result.accuracy is None
    assert result.report.epochs[0].loss > 0
    measured = evaluate(make_model(), [batch], F.mse_loss, num_classes=3, counts_confusion=True)
    assert (measured.accuracy, measured.confusion, measured.num_examples) == (None, None, 6)


def test_ignored_labels_are_no_targets() -> None:
    """Of four pixels one is right, two are wrong, and one is ignored."""
    outputs = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]).T[None]
    for ignored in (-100, 255):
        targets = torch.tensor([[1, 0, 0, ignored]])

        def loss(outputs: Tensor, targets: Tensor, ignored: int = ignored) -> Tensor:
            return F.cross_entropy(outputs, targets, ignore_index=ignored)

        measured = evaluate(
            nn.Identity(), [(outputs, targets)], loss, num_classes=2, counts_confusion=True
        )
        assert measured.accuracy == pytest.approx(1 / 3)
        assert measured.confusion is not None
        assert measured.confusion.tolist() == [[0, 2, 0], [0, 1, 0]]
    nothing = [(outputs, torch.full((1, 4), -100))]
    assert evaluate(nn.Identity(), nothing, lambda *_: torch.zeros(())).accuracy is None


def test_the_main_output_is_found_in_any_structure() -> None:
    right, other = torch.ones(2), torch.zeros(2)
    for outputs in (
        right,
        (right, other),
        [[right], other],
        Named(right, other),
        {"aux": other, "out": right},
        {"main": right, "x": other},
        {"loss": other, "first": right},
        Example(right, other, []),
    ):
        assert main_output(outputs) is right
    for nothing in (None, "text", {}, (), {"loss": other}, 3):
        assert main_output(nothing) is None
