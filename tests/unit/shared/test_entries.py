"""What the entries of a state_dict are."""

import pytest
import torch
from torch import nn

from fedrounds.tensors.entries import entry_kinds, norm_entries, running_variances
from fedrounds.types import EntryKind
from tests.factories import TinyNet


def test_every_entry_has_the_kind_its_module_gives_it() -> None:
    """Parameters (under each name, if tied), float buffers, BatchNorm's counter, the rest."""
    kinds = entry_kinds(TinyNet())
    assert kinds == {
        "fc.weight": EntryKind.PARAMETER,
        "fc.bias": EntryKind.PARAMETER,
        "norm.weight": EntryKind.PARAMETER,
        "norm.bias": EntryKind.PARAMETER,
        "norm.running_mean": EntryKind.MEAN,
        "norm.running_var": EntryKind.MEAN,
        "norm.num_batches_tracked": EntryKind.MAX,
        "head.weight": EntryKind.PARAMETER,
        "steps": EntryKind.KEEP,
        "mask": EntryKind.KEEP,
    }
    assert list(kinds) == list(TinyNet().state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_kind_does_not_depend_on_the_precision(dtype: torch.dtype) -> None:
    """Half and double precision are averaged like single."""
    assert entry_kinds(TinyNet(dtype)) == entry_kinds(TinyNet())


def test_frozen_parameters_are_parameters() -> None:
    """A parameter that needs no gradient is still sent and averaged."""
    model = nn.Linear(2, 2)
    model.weight.requires_grad_(False)
    assert entry_kinds(model)["weight"] is EntryKind.PARAMETER


def test_every_kind_of_norm_layer_is_found() -> None:
    """With its running statistics, and nested; nothing else is."""
    model = nn.Sequential(
        nn.Linear(4, 4),
        nn.Sequential(nn.BatchNorm1d(4), nn.LayerNorm(4)),
        *(nn.GroupNorm(2, 4), nn.RMSNorm(4), nn.InstanceNorm1d(4, affine=True)),
    )
    assert {name.rpartition(".")[0] for name in norm_entries(model)} == {
        "1.0",
        "1.1",
        "2",
        "3",
        "4",
    }
    assert "1.0.running_var" in norm_entries(model)


def test_running_variances_are_those_of_norm_layers_whatever_other_entries_are_called() -> None:
    """A buffer of the task's own may have the name and honestly be negative."""

    class LogVariance(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("running_var", torch.zeros(3))
            self.register_buffer("log_running_var", torch.zeros(3))

    model = nn.Sequential(
        nn.BatchNorm2d(3),
        nn.Sequential(nn.InstanceNorm1d(3, track_running_stats=True), LogVariance()),
        nn.BatchNorm1d(3, track_running_stats=False),
    )
    assert running_variances(model) == {"0.running_var", "1.0.running_var"}
