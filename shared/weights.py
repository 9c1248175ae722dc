"""What the entries of a state_dict are, and the rules that follow for each kind."""

from enum import StrEnum

from torch import nn
from torch.nn.modules.batchnorm import _NormBase


class EntryKind(StrEnum):
    """How an entry of a state_dict is aggregated.

    PARAMETER and FLOAT_BUFFER are averaged; a server optimizer touches parameters only. COUNTER
    (BatchNorm's num_batches_tracked) takes the maximum. FIXED (any other integer or bool) must
    equal the base.
    """

    PARAMETER = "parameter"
    FLOAT_BUFFER = "float-buffer"
    COUNTER = "counter"
    FIXED = "fixed"

    @property
    def is_averaged(self) -> bool:
        """Whether the mean over the cohort is this entry's next value."""
        return self in (EntryKind.PARAMETER, EntryKind.FLOAT_BUFFER)


def entry_kinds(model: nn.Module) -> dict[str, EntryKind]:
    """Return the kind of every entry of the model's state_dict, tied weights under each name."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    kinds: dict[str, EntryKind] = {}
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            is_parameter = name in parameters
            kinds[name] = EntryKind.PARAMETER if is_parameter else EntryKind.FLOAT_BUFFER
        elif name.rpartition(".")[2] == "num_batches_tracked":
            kinds[name] = EntryKind.COUNTER
        else:
            kinds[name] = EntryKind.FIXED
    return kinds


def norm_entries(model: nn.Module) -> list[str]:
    """Return the state_dict's entries that belong to normalisation layers.

    These are batch, instance, group, layer and RMS norms, with their running statistics.
    """
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, _NormBase | nn.GroupNorm | nn.LayerNorm | nn.RMSNorm)
    ]
    return [name for name in model.state_dict() if name.rpartition(".")[0] in layers]
