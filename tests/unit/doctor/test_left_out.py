"""A class may not be left out altogether; labels that the loss passes over are no class."""

import pytest
import torch
from torch import nn

from fedrounds.doctor.left_out import LeftOut
from fedrounds.doctor.stepping import StepOutcome, TrainingState

NUM_STEPS = 20


@pytest.mark.parametrize(("label", "is_excess"), [(1, True), (-100, False)])
def test_a_class_may_not_be_missing_but_ignored_labels_may(label: int, is_excess: bool) -> None:
    """A quarter of each batch is left out, and all of it has one label."""
    model = nn.Linear(1, 2)
    training = TrainingState(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        compute_loss=lambda model, batch: model(batch[0]).sum(),
        num_classes=2,
    )
    given = torch.zeros(8, 1), torch.tensor([0, 0, 0, 0, 0, 0, label, label])
    left_out = LeftOut(max_share=0.5)
    for _ in range(NUM_STEPS):
        outcome = StepOutcome(batch_size=6, batch=given[1][:6])
        left_out.count(given, outcome, training)
    assert (left_out.excess() is not None) == is_excess
