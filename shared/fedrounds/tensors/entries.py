"""The kinds of a state_dict's entries, and how each kind is aggregated.

| entry | kind | its value in the next global model |
| --- | --- | --- |
| floating-point parameter | PARAMETER | the strategy's aggregate, then the server optimizer |
| any other floating-point entry | MEAN | the mean; unchanged, bit for bit, where it is constant |
| `num_batches_tracked` | MAX | the largest value of the global model and the updates |
| any other integer or boolean | KEEP | the global model's value |

A task may declare KEEP, MAX, MEAN or LOCAL for entries that match a pattern (see `entry_kinds`).
docs/own_task.md holds the same table for users; fedrounds.strategies.buffers says how far a single
update can move a mean.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from fedrounds.errors import InvalidInput
from fedrounds.tensors.codec import DTYPES
from fedrounds.types import EntryKind

DECLARABLE = (EntryKind.KEEP, EntryKind.MAX, EntryKind.MEAN, EntryKind.LOCAL)
"""The kinds that a task may declare for entries."""


def entry_kinds(
    model: nn.Module, declared: Mapping[str, str] | None = None
) -> dict[str, EntryKind]:
    """Return the kind of every entry of the model's state_dict, tied weights under each name.

    `declared` maps patterns (of fnmatch, such as "*.queue") to values of DECLARABLE. The first
    pattern that matches a name decides.

    Raises:
        InvalidInput: a pattern matches no entry, or its kind makes no sense for an entry.
    """
    patterns = declared or {}
    parameters = _all_parameters(model)
    entries = model.state_dict()
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in entries):
            raise InvalidInput(
                f"the pattern {pattern!r} matches no entry of the model's state_dict; the entries "
                f"are {_listed(list(entries))}"
            )
    kinds: dict[str, EntryKind] = {}
    for name, tensor in entries.items():
        matching = (kind for pattern, kind in patterns.items() if fnmatchcase(name, pattern))
        wanted = next(matching, None)
        kinds[name] = (
            _usual_kind(name, tensor, is_parameter=name in parameters)
            if wanted is None
            else _declared_kind(name, tensor, EntryKind(wanted), is_parameter=name in parameters)
        )
    for name, first in tied_entries(model).items():
        if kinds[name] is not kinds[first]:
            raise InvalidInput(
                f"entries {first!r} and {name!r} are one tensor, but {first!r} is declared "
                f"{kinds[first]} and {name!r} {kinds[name]}; declare the same for both"
            )
    return kinds


def _usual_kind(name: str, tensor: Tensor, *, is_parameter: bool) -> EntryKind:
    if tensor.is_floating_point():
        return EntryKind.PARAMETER if is_parameter else EntryKind.MEAN
    is_counter = name.rpartition(".")[2] == "num_batches_tracked"
    return EntryKind.MAX if is_counter else EntryKind.KEEP


def _declared_kind(name: str, tensor: Tensor, kind: EntryKind, *, is_parameter: bool) -> EntryKind:
    if is_parameter and tensor.is_floating_point():
        if kind is EntryKind.MEAN:
            return EntryKind.PARAMETER
        if kind is EntryKind.MAX:
            raise InvalidInput(
                f"entry {name!r} is a parameter and can't be declared max; declare keep or local, "
                "or let the strategy aggregate it"
            )
    if kind is EntryKind.MEAN and tensor.dtype is torch.bool:
        raise InvalidInput(f"entry {name!r} is boolean and has no mean; declare keep, max or local")
    return kind


def tied_entries(model: nn.Module) -> dict[str, str]:
    """Return the entries that are the same tensor as an earlier entry, with that entry's name."""
    firsts: dict[tuple[object, ...], str] = {}
    tied: dict[str, str] = {}
    for name, tensor in model.state_dict().items():
        if tensor.numel() == 0:
            continue
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if (first := firsts.setdefault(key, name)) != name:
            tied[name] = first
    return tied


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


def running_variances(model: nn.Module) -> frozenset[str]:
    """Return the state_dict's entries that are running variances of norm layers.

    The module's class decides, not the entry's name: a module of the task's own may mean something
    else by `running_var`.
    """
    layers = {name for name, module in model.named_modules() if isinstance(module, _NormBase)}
    return frozenset(
        name
        for name in model.state_dict()
        if name.rpartition(".")[0] in layers and name.rpartition(".")[2] == "running_var"
    )


def unfold_expanded(model: nn.Module) -> None:
    """Give each expanded tensor of the model (with a stride of 0) memory for all its elements.

    No values can be loaded into a tensor whose elements share memory.
    """
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and _is_expanded(buffer):
                module._buffers[name] = buffer.clone(memory_format=torch.contiguous_format)
        for parameter in module._parameters.values():
            if parameter is not None and _is_expanded(parameter):
                parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)


def validate_entries(model: nn.Module) -> None:
    """Refuse a model whose state_dict can't be sent, aggregated and loaded again.

    Raises:
        InvalidInput: the message names the entry and what to do.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
            raise InvalidInput(
                f"entry {name!r} of a lazy module has no shape yet; call the model once on an "
                "example in build_model, or give the layer its size"
            )
    entries = model.state_dict()
    for name, value in entries.items():
        _validate_entry(name, value)
    _validate_aliases(model, entries)
    if not any(tensor.requires_grad and tensor.numel() for tensor in model.parameters()):
        raise InvalidInput(
            "the model has no parameter that learns (with requires_grad and at least one element); "
            "give it one"
        )


def validate_first_values(model: nn.Module, kinds: Mapping[str, EntryKind], *, task: str) -> None:
    """Refuse a task's model whose parameters aren't finite before the first training.

    Raises:
        InvalidInput: a parameter isn't finite.
    """
    for name, tensor in model.state_dict().items():
        if kinds[name] is EntryKind.PARAMETER and not bool(torch.isfinite(tensor).all()):
            raise InvalidInput(
                f"task {task!r}: parameter {name!r} holds a NaN or an infinity before the first "
                "training; initialise it, or register a constant such as a mask as a buffer"
            )


def _validate_entry(name: str, value: object) -> None:
    if name == "__metadata__":
        raise InvalidInput(
            "an entry is named '__metadata__', which the safetensors format reserves; rename it"
        )
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(
            f"the name of entry {name!r} can't be written as UTF-8; rename it"
        ) from error
    if name.rpartition(".")[2] == "_extra_state" or not isinstance(value, Tensor):
        raise InvalidInput(
            f"entry {name!r} of the state_dict is a {type(value).__name__} that the model keeps "
            "beside its tensors (get_extra_state or a state_dict hook); only tensors of parameters "
            "and buffers can be sent: register a buffer for it, or leave it out of the state_dict"
        )
    if value.layout is not torch.strided:
        raise InvalidInput(
            f"entry {name!r} is sparse ({value.layout}), which can't be sent; make it dense, or "
            "register it with persistent=False"
        )
    if value.device.type == "meta":
        raise InvalidInput(
            f"entry {name!r} is on the meta device and has no values; build_model must return a "
            "model with weights"
        )
    if value.is_quantized or value.dtype not in DTYPES.values():
        raise InvalidInput(
            f"entry {name!r} has dtype {value.dtype}, which can't be sent; use one of "
            f"{', '.join(str(dtype) for dtype in DTYPES.values())}"
        )


def _validate_aliases(model: nn.Module, entries: Mapping[str, Tensor]) -> None:
    """Refuse a state_dict with copies: values loaded into them wouldn't reach the model."""
    owned = {
        tensor.untyped_storage().data_ptr()
        for tensor in (*model.parameters(), *model.buffers())
        if tensor.numel()
    }
    for name, tensor in entries.items():
        if tensor.numel() and tensor.untyped_storage().data_ptr() not in owned:
            raise InvalidInput(
                f"entry {name!r} of the state_dict is a copy, not one of the model's parameters or "
                "buffers, so a received value wouldn't reach the model; remove the hook that makes "
                "the copy"
            )


def _all_parameters(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters(remove_duplicate=False)}


def _is_expanded(tensor: Tensor) -> bool:
    return any(
        size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:10])
    return shown if len(names) <= 10 else f"{shown} and {len(names) - 10} more"
