"""Where in a step the first non-finite value was produced, or which part of it raised an error."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from functools import partial
from traceback import walk_tb
from typing import NamedTuple

from torch import Tensor, nn

from fedrounds.diagnosis.values import Origin, StepPhase
from fedrounds.doctor.batches import Batch, tensors_of
from fedrounds.doctor.outputs import loss_and_outputs
from fedrounds.doctor.stepping import ComputeLoss
from fedrounds.doctor.tensors import describe, is_finite
from fedrounds.doctor.tracer import Rank, Tracer


@dataclass(frozen=True)
class Fault:
    """Where it was, and the largest absolute finite value the operation was given (0: none)."""

    origin: Origin
    largest_input: float


def locate(
    model: nn.Module,
    batch: Batch,
    compute_loss: ComputeLoss,
    *,
    optimizer_step: Callable[[], object] | None = None,
) -> Fault | None:
    """Run one step under watch and return where its first non-finite value was produced.

    That is the first operation that made a NaN or an infinity of finite numbers, among those whose
    value reaches the loss, a buffer, a gradient, a parameter or what the optimizer holds. An
    infinity written as a constant (a mask) is no fault: what makes a NaN of it is.

    - A parameter or buffer that is non-finite before the step: phase FORWARD, no operation,
      `tensor` its name. A buffer of infinities is only blamed where nothing else is or where they
      come to the loss; a buffer of -inf alone is a mask.
    - A tensor of the batch: phase INPUT. So it is, too, where the step copes with it.
    - In backward, `module` is the module whose forward made the node of the graph, and `tensor` the
      first parameter, as backward comes to them, whose gradient is bad.

    Args:
        model: in the state before the step; gradients are cleared. It, the optimizer and the
            random generators are left as the step leaves them.
        batch: what compute_loss takes.
        compute_loss: forward and loss.
        optimizer_step: what follows on backward: clipping, the optimizer's step.

    Returns:
        Where, or None if the step stays finite. Whatever the step raises passes through.
    """
    entries = {
        name: tensor
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if _is_bad(tensor)
    }
    buffers = dict(model.named_buffers())
    for name, tensor in entries.items():
        if name not in buffers or bool(tensor.isnan().any()):
            return _entry(name, tensor)
    inputs = [tensor for tensor in tensors_of(batch) if _is_bad(tensor)]

    tracer = Tracer(model)
    blamed: list[Fault] = []
    for tensor in inputs:
        blamed.append(Fault(describe(tensor, Origin(phase=StepPhase.INPUT)), 0.0))
        tracer.add_source(tensor, blamed[-1].origin)
    for name, tensor in entries.items():
        is_mask = bool((tensor != float("inf")).all())
        fault = _entry(name, tensor)
        tracer.add_source(tensor, fault.origin, Rank.CONSTANT if is_mask else Rank.FAULT)
        if not is_mask:
            blamed.append(fault)
    model.zero_grad(set_to_none=True)
    fault_in_step = _run(
        tracer, model, batch, compute_loss, optimizer_step=optimizer_step, ignored=entries.keys()
    )
    return fault_in_step or next(iter(blamed), None)


class Raised(NamedTuple):
    """An error of a step, and where it was raised.

    `origin.operation` is the operation of torch that raised it, empty where none did.
    `mixes_dtypes` says that this operation was given several floating dtypes, such as float64
    inputs and float32 weights.
    """

    error: Exception
    origin: Origin
    mixes_dtypes: bool = False


def locate_error(model: nn.Module, batch: Batch, compute_loss: ComputeLoss) -> Raised | None:
    """Run forward, loss and backward; return what is raised, None if nothing is.

    The model is left as the step leaves it.
    """
    tracer = Tracer(model, is_judging=False)
    try:
        with tracer.hooked():
            loss = loss_and_outputs(compute_loss(model, batch))[0]
            tracer.phase = StepPhase.BACKWARD
            loss.backward()  # type: ignore[no-untyped-call]
    # The model and the loss are somebody's: whatever they raise is what is asked for.
    except Exception as error:
        if tracer.failed is not None and tracer.failed[0] is error:
            return Raised(error, tracer.failed[1], mixes_dtypes=tracer.failed[2])
        phase, module = tracer.where(_modules_in(error, model))
        return Raised(error, Origin(phase=phase, module=module))
    return None


def _run(
    tracer: Tracer,
    model: nn.Module,
    batch: Batch,
    compute_loss: ComputeLoss,
    *,
    optimizer_step: Callable[[], object] | None,
    ignored: Collection[str],
) -> Fault | None:
    """Run the step as far as it is finite; entries in `ignored` weren't before."""
    parameters = dict(model.named_parameters())
    entries = {**parameters, **dict(model.named_buffers())}
    judged = [(name, tensor) for name, tensor in entries.items() if name not in ignored]
    in_order: dict[str, Tensor] = {}

    def note(name: str, parameter: Tensor) -> None:
        in_order.setdefault(name, parameter)

    handles = [
        parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
            partial(note, name)
        )
        for name, parameter in parameters.items()
        if parameter.requires_grad
    ]
    try:
        with tracer.hooked():
            loss = loss_and_outputs(compute_loss(model, batch))[0]
            fault = _first_fault(tracer, [("", loss), *judged])
            if fault is not None:
                return fault
            tracer.phase = StepPhase.BACKWARD
            loss.backward()  # type: ignore[no-untyped-call]
            gradients = [(name, tensor.grad) for name, tensor in in_order.items()]
            fault = _first_fault(tracer, [*gradients, *judged])
            if fault is not None or optimizer_step is None:
                return fault
            tracer.phase = StepPhase.OPTIMIZER
            optimizer_step()
            held = [("", tensor) for tensor in tracer.bad_after_optimizer()]
            return _first_fault(tracer, [*judged, *held])
    finally:
        for handle in handles:
            handle.remove()


def _first_fault(tracer: Tracer, named: Iterable[tuple[str, Tensor | None]]) -> Fault | None:
    """Return what is behind the tensors that are non-finite, None if none is."""
    bad = [(name, tensor) for name, tensor in named if tensor is not None and _is_bad(tensor)]
    if not bad:
        return None
    name = next((name for name, _ in bad if name), "")
    productions = [tracer.production_of(tensor) for _, tensor in bad]
    seen = [production for production in productions if production is not None]
    if not seen:
        # Written by something that isn't an operation of torch.
        return Fault(describe(bad[0][1], Origin(phase=tracer.phase, tensor=name)), 0.0)
    first = min(seen)
    origin = first.origin
    if origin.phase in (StepPhase.BACKWARD, StepPhase.OPTIMIZER) and not origin.tensor:
        origin = replace(origin, tensor=name)
    return Fault(origin, first.largest_input)


def _is_bad(tensor: Tensor) -> bool:
    """Whether a tensor holds a NaN or an infinity."""
    return (tensor.is_floating_point() or tensor.is_complex()) and not is_finite(tensor)


def _entry(name: str, tensor: Tensor) -> Fault:
    """Return that an entry of the model was bad before the step."""
    module = name.rpartition(".")[0]
    return Fault(describe(tensor, Origin(phase=StepPhase.FORWARD, module=module, tensor=name)), 0.0)


def _modules_in(error: BaseException, model: nn.Module) -> list[str]:
    """Return the modules whose forward an error came out of, the innermost last."""
    names = {id(module): name for name, module in model.named_modules()}
    forwards = [
        frame.f_locals.get(frame.f_code.co_varnames[0])
        for frame, _ in walk_tb(error.__traceback__)
        if frame.f_code.co_name == "forward" and frame.f_code.co_varnames
    ]
    return [names[id(module)] for module in forwards if id(module) in names]
