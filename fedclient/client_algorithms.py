"""The client algorithms other than plain training, by the name that an order gives.

`begin` sets an algorithm up once the model holds the global weights. Its result says what training
adds to gradients; its `finish` turns the trained model into what the client sends and what it keeps
if the order is counted. The parts at the server are in fedrounds.strategies.client_algorithms.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedclient.state import Tensors
from fedrounds.errors import WrongSettings
from fedrounds.tensors.entries import norm_entries
from fedrounds.training.corrections import Correction
from fedrounds.types import CONTROL_SECTION, ClientAlgorithmConfig

NOTHING: Tensors = {}


@dataclass(frozen=True, kw_only=True)
class TrainingStart:
    """The state before training; `model` holds the global model's weights.

    `kept` holds the tensors in force from earlier rounds, by name, `control` the server's control
    variates.
    """

    model: nn.Module
    parameters: Mapping[str, float]
    kept: Mapping[str, Tensors]
    control: Tensors

    def copy_parameters(self) -> dict[str, Tensor]:
        """Return copies of the floating-point parameters, under all their names."""
        named = self.model.named_parameters(remove_duplicate=False)
        return {
            name: parameter.detach().cpu().clone()
            for name, parameter in named
            if parameter.is_floating_point()
        }


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """The result of training.

    `effective_steps` is how far a gradient of 1 in every step would have moved a parameter: for
    plain SGD the number of steps times the rate. `was_healthy`: the doctor had nothing to cure.
    `train_also` trains other weights on the same examples, as the order says, and returns them.
    """

    state_dict: Tensors
    effective_steps: float
    was_healthy: bool
    train_also: Callable[[Tensors, Correction], Tensors]


@dataclass(frozen=True, kw_only=True)
class AlgorithmOutput:
    """The tensors to send (`model`, and other `sections` by name) and those to keep (`kept`)."""

    model: Tensors
    sections: Mapping[str, Tensors] = field(default_factory=dict)
    kept: Mapping[str, Tensors] = field(default_factory=dict)


def _send_all(trained: TrainedModel) -> AlgorithmOutput:
    return AlgorithmOutput(model=trained.state_dict)


@dataclass(frozen=True, kw_only=True)
class LocalTraining:
    """An algorithm that has begun to work on an order, which takes `num_trainings` trainings.

    `correction` is added to the gradients of the first. `has_personal_model`: the client uses, and
    measures, the model that is trained last.
    """

    num_trainings: int = 1
    has_personal_model: bool = False
    correction: Correction = field(default_factory=Correction)
    finish: Callable[[TrainedModel], AlgorithmOutput] = _send_all


def begin(config: ClientAlgorithmConfig | None, start: TrainingStart) -> LocalTraining:
    """Begin an algorithm's work on an order; None is plain training.

    Raises:
        WrongSettings: this client doesn't know the algorithm, a number of it is missing, or the
            model has no layers for it.
    """
    if config is None:
        return LocalTraining()
    if config.name not in _ALGORITHMS:
        raise WrongSettings(
            f"the server asks for the client algorithm {config.name!r}, which this client doesn't "
            f"know (it knows: {', '.join(_ALGORITHMS)}); update it"
        )
    try:
        return _ALGORITHMS[config.name](start)
    except KeyError as error:
        raise WrongSettings(
            f"the server's client algorithm {config.name!r} comes without {error}; both sides need "
            "the same version"
        ) from error


def _fedprox(start: TrainingStart) -> LocalTraining:
    """Add the gradient of mu / 2 * |w - w_global|^2 (Li et al. 2020, equation 2)."""
    return LocalTraining(correction=Correction(pull=start.parameters["mu"]))


def _scaffold(start: TrainingStart) -> LocalTraining:
    """Add c - c_i to gradients (Karimireddy et al. 2020, algorithm 1, option II).

    c_i stays the same after a training in which the doctor took steps back, since the effective
    steps aren't known then.
    """
    begin_at = start.copy_parameters()
    own = start.kept.get("control", NOTHING)
    shift = {}
    for name, parameter in begin_at.items():
        wide = _wide(parameter)
        server_control = (
            start.control[name].view_as(wide) if start.control else torch.zeros_like(wide)
        )
        shift[name] = server_control - own.get(name, torch.zeros_like(wide))

    def finish(trained: TrainedModel) -> AlgorithmOutput:
        changes, controls = {}, {}
        for name, parameter in begin_at.items():
            before = own.get(name, torch.zeros_like(shift[name]))
            change = torch.zeros_like(before)
            if trained.was_healthy and trained.effective_steps > 0:
                moved = _wide(parameter) - trained.state_dict[name].to(before.dtype)
                change = moved / trained.effective_steps - shift[name] - before
            changes[name], controls[name] = change, before + change
        return AlgorithmOutput(
            model=trained.state_dict,
            sections={CONTROL_SECTION: changes},
            kept={"control": controls},
        )

    return LocalTraining(correction=Correction(shift=shift), finish=finish)


def _feddyn(start: TrainingStart) -> LocalTraining:
    """Add -g_k + alpha * (w - w_global) to gradients (Acar et al. 2021, algorithm 1)."""
    alpha = start.parameters["alpha"]
    begin_at = start.copy_parameters()
    own = start.kept.get("feddyn", NOTHING)

    def finish(trained: TrainedModel) -> AlgorithmOutput:
        after = {}
        for name, parameter in begin_at.items():
            wide = _wide(parameter)
            moved = trained.state_dict[name].to(wide.dtype) - wide
            after[name] = own.get(name, torch.zeros_like(wide)) - alpha * moved
        return AlgorithmOutput(model=trained.state_dict, kept={"feddyn": after})

    shift = {name: -gradient for name, gradient in own.items()}
    return LocalTraining(correction=Correction(pull=alpha, shift=shift), finish=finish)


def _fedbn(start: TrainingStart) -> LocalTraining:
    """Keep the normalisation layers at the client (Li et al. 2021, algorithm 1).

    The client trains with its own entries of these layers, and sends the global entries back as
    they came.
    """
    entries = start.model.state_dict()
    names = norm_entries(start.model)
    if not names:
        raise WrongSettings(
            "fedbn keeps normalisation layers at the client, but the task's model has none"
        )
    global_values = {name: entries[name].clone() for name in names}
    with torch.no_grad():
        for name, own in start.kept.get("norms", NOTHING).items():
            entries[name].copy_(own)

    def finish(trained: TrainedModel) -> AlgorithmOutput:
        return AlgorithmOutput(
            model={**trained.state_dict, **global_values},
            kept={"norms": {name: trained.state_dict[name] for name in names}},
        )

    return LocalTraining(has_personal_model=True, finish=finish)


def _ditto(start: TrainingStart) -> LocalTraining:
    """Train a personal model v beside the global model (Li et al. 2021, algorithm 1).

    v begins as the first global model that this client gets. Its gradients get
    strength * (v - w_global) added, with the global model of this order.
    """
    first = {name: entry.clone() for name, entry in start.model.state_dict().items()}
    pull = Correction(pull=start.parameters["strength"], anchor=start.copy_parameters())
    own = start.kept.get("ditto", first)

    def finish(trained: TrainedModel) -> AlgorithmOutput:
        after = trained.train_also(own, pull)
        return AlgorithmOutput(model=trained.state_dict, kept={"ditto": after})

    return LocalTraining(num_trainings=2, has_personal_model=True, finish=finish)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype is torch.float64 else tensor.float()


_ALGORITHMS: Mapping[str, Callable[[TrainingStart], LocalTraining]] = {
    "fedprox": _fedprox,
    "scaffold": _scaffold,
    "feddyn": _feddyn,
    "fedbn": _fedbn,
    "ditto": _ditto,
}
