"""Every torch operation of a step, and where the non-finite values among its results come from.

Each non-finite tensor is traced to the operation that made it of finite values. What dies
on the way (a mask of -inf under a softmax, a logarithm that `where` leaves out) leaves no trace in
what is made of it, because every result is looked at anew.
"""

import math
import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from fedrounds.diagnosis.values import Origin, StepPhase
from fedrounds.doctor.tensors import (
    Storage,
    covers_its_storage,
    describe,
    floating,
    is_finite,
    largest_of,
    storage_of,
    values_of,
)


class Rank(IntEnum):
    """How surely a production is at fault; among those behind a bad value the first counts."""

    FAULT = 0
    ZERO_LOGARITHM = 1
    """Minus infinity as the logarithm of a zero that depends on no parameter: how masks are made,
    unless nothing else explains what came of it."""
    CONSTANT = 2
    """Written as a number or held in a buffer: how masks are made, too."""


@dataclass(frozen=True, order=True)
class Production:
    """An operation that made a non-finite value of finite values; earlier operations come first."""

    rank: Rank
    number: int
    origin: Origin = field(compare=False)
    largest_input: float = field(compare=False)


@dataclass(frozen=True)
class _Argument:
    """A floating tensor that an operation is given.

    `position` is its (index, length) in a list, or None; `before` a copy if it may be overwritten.
    """

    tensor: Tensor
    position: tuple[int, int] | None
    storage: Storage | None
    is_written: bool
    is_bad: bool
    has_nan: bool
    before: Tensor | None


# What these leave in memory is no number of anybody's.
_UNINITIALISED = {
    *("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"),
    *("resize_", "set_"),
}
# What they write to, they don't read.
_OVERWRITING = {"copy_", "fill_", "zero_"}
_LOGARITHMS = {"log", "log2", "log10"}


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, traces the non-finite values of one step of a model.

    `phase` is set by whoever runs the step; inside of the model's forward it is FORWARD anyway.
    Tensors are known by their memory. What the memory holds was written by an operation that
    was seen, or was there before: a stale trace is overwritten with the memory. Without
    `is_judging` it only knows which operation `failed`, where, and whether it was given several
    floating dtypes.
    """

    def __init__(self, model: nn.Module, *, is_judging: bool = True) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._is_judging = is_judging
        self.phase = StepPhase.LOSS
        self.failed: tuple[BaseException, Origin, bool] | None = None
        self._model = model
        self._modules = {id(module): name for name, module in model.named_modules()}
        self._entries: dict[Storage, str] = {}
        self._buffers: set[Storage] = set()
        self._parameters: dict[int, str] = {}
        self._stack: list[tuple[str, int]] = []
        self._spans: list[tuple[int, int, str]] = []
        self._is_forward_over = False
        self._productions: dict[Storage, Production] = {}
        self._seen: set[Storage] = set()
        self._declared: dict[OpOverload, list[tuple[str, bool]]] = {}
        self._num_productions = 0
        self._bad_in_optimizer: list[weakref.ref[Tensor]] = []
        for name, tensor in model.named_buffers():
            self._buffers.add(self._remember(tensor, name))
        for name, tensor in model.named_parameters():
            self._remember(tensor, name)
            self._parameters[id(tensor)] = name

    def _remember(self, tensor: Tensor, name: str) -> Storage:
        storage = storage_of(tensor) or (tensor.device, -len(self._entries) - 1)
        self._entries.setdefault(storage, name)
        return storage

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Say no: torch would load its compiler (150 MB) only to tell it to skip this class."""
        return False

    def __enter__(self) -> Self:
        """Watch; a compiler that the task has loaded itself must not compile what watches."""
        observe = Tracer.__torch_dispatch__
        if "torch._dynamo" in sys.modules and not hasattr(observe, "__wrapped__"):
            Tracer.__torch_dispatch__ = torch.compiler.disable(observe)  # type: ignore[method-assign, no-untyped-call]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """While active, the watch knows which module is at work."""
        handles = []
        for module in self._model.modules():
            handles.append(module.register_forward_pre_hook(self._enter, prepend=True))
            handles.append(module.register_forward_hook(self._leave, always_call=True))
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, _: object) -> None:
        # Autograd numbers the nodes of its graph in the order of the forward.
        self._stack.append((self._modules[id(module)], torch._C._autograd._get_sequence_nr()))

    def _leave(self, module: nn.Module, *_: object) -> None:
        name = self._modules[id(module)]
        while self._stack:
            left, start = self._stack.pop()
            self._spans.append((start, torch._C._autograd._get_sequence_nr(), left))
            if left == name:
                break
        self._is_forward_over |= module is self._model

    def where(self, modules: Sequence[str] | None = None) -> tuple[StepPhase, str]:
        """Return the phase and the module at work; `modules` are those inside of each other."""
        within = [name for name, _ in self._stack] if modules is None else list(modules)
        module = within[-1] if within else self._module_of_node()
        # A part of the model that is called alone after the whole is the loss's own.
        is_forward = bool(within) and ("" in within or not self._is_forward_over)
        if self.phase is StepPhase.LOSS and is_forward:
            return StepPhase.FORWARD, module
        return self.phase, module

    def _module_of_node(self) -> str:
        """Return the module whose forward made the node of the graph that is being worked off."""
        node: Any = torch._C._current_autograd_node()
        if node is None:
            return ""
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            return self._parameters.get(id(variable), "").rpartition(".")[0]
        number = node._sequence_nr()
        around = [(end - start, name) for start, end, name in self._spans if start <= number < end]
        return min(around, key=lambda span: span[0])[1] if around else ""

    def name_of(self, tensor: Tensor) -> str:
        """Return the state_dict's key of the entry, or of the entry whose gradient it is."""
        storage = storage_of(tensor)
        if storage is None:
            return ""
        if storage in self._entries:
            return self._entries[storage]
        for name, parameter in self._model.named_parameters():
            if parameter.grad is not None and storage_of(parameter.grad) == storage:
                return name
        return ""

    def production_of(self, tensor: Tensor) -> Production | None:
        """Return what a non-finite tensor comes from, None if it wasn't seen."""
        storage = storage_of(tensor)
        return self._productions.get(storage) if storage is not None else None

    def bad_after_optimizer(self) -> list[Tensor]:
        """Return the non-finite tensors that the optimizer wrote and that are still held."""
        held = [reference() for reference in self._bad_in_optimizer]
        return [tensor for tensor in held if tensor is not None and not is_finite(tensor)]

    def add_source(self, tensor: Tensor, origin: Origin, rank: Rank = Rank.FAULT) -> None:
        """Say that a tensor was non-finite before the step."""
        storage = storage_of(tensor)
        if storage is not None:
            self._productions[storage] = Production(rank, -1, origin, 0.0)

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        """Run an operation, and examine its arguments before and its results after."""
        kwargs = kwargs or {}
        operation = func.overloadpacket.__name__
        arguments = list(self._arguments_of(func, args, kwargs)) if self._is_judging else []
        try:
            result = func(*args, **kwargs)
        except Exception as error:
            phase, module = self.where()
            given = {
                tensor.dtype for value in (*args, *kwargs.values()) for tensor, _ in floating(value)
            }
            origin = Origin(phase=phase, module=module, operation=operation)
            self.failed = (error, origin, len(given) > 1)
            raise
        if not self._is_judging:
            return result
        numbers = [
            value
            for value in [*args, *kwargs.values()]
            if isinstance(value, float) and not math.isfinite(value)
        ]
        old = {argument.storage for argument in arguments}
        for tensor, position in floating(result):
            storage = storage_of(tensor)
            # A view shows nothing new.
            if storage is not None and storage not in old:
                self._look_at(operation, tensor, position, arguments, numbers)
        for argument in arguments:
            if argument.is_written:
                self._look_at(operation, argument.tensor, argument.position, arguments, numbers)
        return result

    def _arguments_of(
        self, func: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Iterator[_Argument]:
        """Yield the floating arguments, looked at before the operation may overwrite them."""
        if func not in self._declared:
            self._declared[func] = [
                (declared.name, declared.alias_info is not None and declared.alias_info.is_write)
                for declared in func._schema.arguments
            ]
        is_batch_norm = "batch_norm" in func.overloadpacket.__name__
        for number, (name, is_declared) in enumerate(self._declared[func]):
            value = args[number] if number < len(args) else kwargs.get(name)
            for tensor, position in floating(value):
                storage = storage_of(tensor)
                # BatchNorm's running statistics are written without being declared.
                is_written = is_declared or (is_batch_norm and storage in self._buffers)
                is_known_good = storage in self._seen and storage not in self._productions
                is_bad = not is_known_good and not is_finite(tensor)
                if storage is not None:
                    self._seen.add(storage)
                yield _Argument(
                    tensor,
                    position,
                    storage,
                    is_written=is_written,
                    is_bad=is_bad,
                    has_nan=is_bad and bool(values_of(tensor).isnan().any()),
                    before=values_of(tensor).detach().clone() if is_written else None,
                )

    def _look_at(
        self,
        operation: str,
        tensor: Tensor,
        position: tuple[int, int] | None,
        arguments: Sequence[_Argument],
        numbers: Sequence[float],
    ) -> None:
        """Keep, extend or forget the trace of what an operation wrote."""
        storage = storage_of(tensor)
        if storage is None:
            return
        self._seen.add(storage)
        if operation in _UNINITIALISED or is_finite(tensor):
            if covers_its_storage(tensor):
                self._productions.pop(storage, None)
            return
        # In a list each entry is computed from the entries at its position in the other lists.
        inputs = [
            argument
            for argument in arguments
            if (argument.position is None or position is None or argument.position == position)
            and not (argument.is_written and operation in _OVERWRITING)
        ]
        production = self._explain(operation, tensor, inputs, numbers)
        if not covers_its_storage(tensor):
            # What the rest of the memory holds may be older.
            production = min(production, self._productions.get(storage, production))
        self._productions[storage] = production
        if self.phase is StepPhase.OPTIMIZER:
            self._bad_in_optimizer.append(weakref.ref(tensor))

    def _explain(
        self, operation: str, tensor: Tensor, inputs: Sequence[_Argument], numbers: Sequence[float]
    ) -> Production:
        """Return what made a result non-finite: this operation, or an earlier operation."""
        bad = [argument for argument in inputs if argument.is_bad]
        known = [
            self._productions[argument.storage]
            for argument in bad
            if argument.storage in self._productions
        ]
        has_nan = bool(values_of(tensor).isnan().any())
        had_nan = any(argument.has_nan for argument in bad) or any(map(math.isnan, numbers))
        is_made_nan = has_nan and not had_nan
        if known:
            first = min(known)
            # Infinity is a mask until somebody makes a NaN of it.
            if not (first.rank is Rank.CONSTANT and is_made_nan):
                return first
            rank = Rank.FAULT
        elif bad or numbers:
            rank = Rank.FAULT if has_nan else Rank.CONSTANT
        elif (
            operation in _LOGARITHMS
            and not has_nan
            and not any(argument.tensor.requires_grad for argument in inputs)
        ):
            rank = Rank.ZERO_LOGARITHM
        else:
            rank = Rank.FAULT
        self._num_productions += 1
        phase, module = self.where()
        name = self.name_of(tensor)
        if not name and phase is StepPhase.OPTIMIZER:
            name = self._name_in_optimizer(tensor, inputs)
        origin = describe(
            tensor, Origin(phase=phase, module=module, operation=operation, tensor=name)
        )
        largest = [
            largest_of(argument.tensor if argument.before is None else argument.before)
            for argument in inputs
        ]
        return Production(rank, self._num_productions, origin, max(largest, default=0.0))

    def _name_in_optimizer(self, tensor: Tensor, inputs: Sequence[_Argument]) -> str:
        """Return the parameter whose state this is: an argument, else a parameter of its shape."""
        names = (self.name_of(argument.tensor) for argument in inputs)
        alike = (
            name
            for name, parameter in self._model.named_parameters()
            if parameter.shape == tensor.shape
        )
        return next((name for name in names if name), next(alike, ""))
