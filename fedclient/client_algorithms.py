"""What a client does otherwise than plain training, by the name of the rule in its order.

A rule begins when the global model is there, says what is added to gradients, and ends when
training has: with what is sent beside the model, and what is kept if the order is counted.
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
class Start:
    """What a rule begins with: the model holds the global one's weights.

    `kept` are the tensors in force from earlier rounds, by name, `control` the server's control
    variates.
    """

    model: nn.Module
    parameters: Mapping[str, float]
    kept: Mapping[str, Tensors]
    control: Tensors

    def copy_parameters(self) -> dict[str, Tensor]:
        """Return copies of the floating-point parameters, under all their names."""
        named = self.model.named_parameters(remove_duplicate=False)
        return {name: one.detach().cpu().clone() for name, one in named if one.is_floating_point()}


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What training led to.

    `travel` is by how much a gradient of 1 in every step would have moved a parameter: for plain
    SGD the number of steps times the rate. `was_healthy`: the doctor had nothing to cure.
    `train_also` trains other weights on the same examples, as the order says, and returns what
    comes of them.
    """

    state_dict: Tensors
    travel: float
    was_healthy: bool
    train_also: Callable[[Tensors, Correction], Tensors]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What comes of a training: `model` is sent, with other `sections` by name; `kept` is kept."""

    model: Tensors
    sections: Mapping[str, Tensors] = field(default_factory=dict)
    kept: Mapping[str, Tensors] = field(default_factory=dict)


def _send_all(trained: Trained) -> Outcome:
    return Outcome(model=trained.state_dict)


@dataclass(frozen=True, kw_only=True)
class Begun:
    """A rule at work on one order; `num_trainings` is how many trainings it takes.

    `is_personal`: the model trained last is what the client uses, and is measured.
    """

    num_trainings: int = 1
    is_personal: bool = False
    correction: Correction = field(default_factory=Correction)
    end: Callable[[Trained], Outcome] = _send_all


def begin_rule(rule: ClientAlgorithmConfig | None, start: Start) -> Begun:
    """Begin a rule's work on an order; without a rule nothing is done otherwise.

    Raises:
        WrongSettings: this client doesn't know the rule, it lacks a number, or the model isn't for
            it.
    """
    if rule is None:
        return Begun()
    if rule.name not in _RULES:
        raise WrongSettings(
            f"the server asks for the client algorithm {rule.name!r}, which this client doesn't "
            f"know (it knows: {', '.join(_RULES)}); update it"
        )
    try:
        return _RULES[rule.name](start)
    except KeyError as error:
        raise WrongSettings(
            f"the server's client algorithm {rule.name!r} comes without {error}; both sides need "
            "the same version"
        ) from error


def _fedprox(start: Start) -> Begun:
    """Add the gradient of mu / 2 * |w - w_global|^2 (Li et al. 2020, equation 2)."""
    return Begun(correction=Correction(pull=start.parameters["mu"]))


def _scaffold(start: Start) -> Begun:
    """Add c - c_i to gradients (Karimireddy et al. 2020, algorithm 1, option II).

    After a round in which the doctor took steps back, travel isn't known: c_i stays.
    """
    begin = start.copy_parameters()
    own = start.kept.get("control", NOTHING)
    shift = {}
    for name, one in begin.items():
        wide = _wide(one)
        of_all = start.control[name].view_as(wide) if start.control else torch.zeros_like(wide)
        shift[name] = of_all - own.get(name, torch.zeros_like(wide))

    def end(trained: Trained) -> Outcome:
        changes, controls = {}, {}
        for name, one in begin.items():
            before = own.get(name, torch.zeros_like(shift[name]))
            change = torch.zeros_like(before)
            if trained.was_healthy and trained.travel > 0:
                moved = _wide(one) - trained.state_dict[name].to(before.dtype)
                change = moved / trained.travel - shift[name] - before
            changes[name], controls[name] = change, before + change
        return Outcome(
            model=trained.state_dict,
            sections={CONTROL_SECTION: changes},
            kept={"control": controls},
        )

    return Begun(correction=Correction(shift=shift), end=end)


def _feddyn(start: Start) -> Begun:
    """Add -g_k + alpha * (w - w_global) to gradients (Acar et al. 2021, algorithm 1)."""
    alpha = start.parameters["alpha"]
    begin = start.copy_parameters()
    own = start.kept.get("feddyn", NOTHING)

    def end(trained: Trained) -> Outcome:
        after = {}
        for name, one in begin.items():
            wide = _wide(one)
            moved = trained.state_dict[name].to(wide.dtype) - wide
            after[name] = own.get(name, torch.zeros_like(wide)) - alpha * moved
        return Outcome(model=trained.state_dict, kept={"feddyn": after})

    shift = {name: -one for name, one in own.items()}
    return Begun(correction=Correction(pull=alpha, shift=shift), end=end)


def _fedbn(start: Start) -> Begun:
    """Keep the normalisation layers here (Li et al. 2021, algorithm 1).

    Their own entries take the place of the global ones in the model that is trained; what is sent
    has the global ones as they came.
    """
    entries = start.model.state_dict()
    names = norm_entries(start.model)
    if not names:
        raise WrongSettings(
            "fedbn keeps normalisation layers at the client, but the task's model has none"
        )
    sent = {name: entries[name].clone() for name in names}
    with torch.no_grad():
        for name, one in start.kept.get("norms", NOTHING).items():
            entries[name].copy_(one)

    def end(trained: Trained) -> Outcome:
        return Outcome(
            model={**trained.state_dict, **sent},
            kept={"norms": {name: trained.state_dict[name] for name in names}},
        )

    return Begun(is_personal=True, end=end)


def _ditto(start: Start) -> Begun:
    """Train a model of one's own beside the global one (Li et al. 2021, algorithm 1).

    It begins as the global model and is pulled to the one that came by strength * (v - w_global).
    """
    begin = {name: one.clone() for name, one in start.model.state_dict().items()}
    pull = Correction(pull=start.parameters["strength"], anchor=start.copy_parameters())
    own = start.kept.get("ditto", begin)

    def end(trained: Trained) -> Outcome:
        after = trained.train_also(own, pull)
        return Outcome(model=trained.state_dict, kept={"ditto": after})

    return Begun(num_trainings=2, is_personal=True, end=end)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype is torch.float64 else tensor.float()


_RULES: Mapping[str, Callable[[Start], Begun]] = {
    "fedprox": _fedprox,
    "scaffold": _scaffold,
    "feddyn": _feddyn,
    "fedbn": _fedbn,
    "ditto": _ditto,
}
