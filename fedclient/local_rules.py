"""What a client does otherwise than plain training, by the name of the rule in its order."""

from collections.abc import Callable, Mapping

from shared.corrections import Correction
from shared.errors import WrongSettings
from shared.types import LocalRule


def correction_of(rule: LocalRule | None) -> Correction:
    """Return what a rule adds to gradients.

    Raises:
        WrongSettings: this client doesn't know the rule, or it lacks a number.
    """
    if rule is None:
        return Correction()
    if rule.name not in _RULES:
        raise WrongSettings(
            f"the server asks for the local rule {rule.name!r}, which this client doesn't know "
            f"(it knows: {', '.join(_RULES)}); update it"
        )
    try:
        return _RULES[rule.name](rule.parameters)
    except KeyError as error:
        raise WrongSettings(
            f"the server's local rule {rule.name!r} comes without {error}; both sides need the "
            "same version"
        ) from error


def _fedprox(parameters: Mapping[str, float]) -> Correction:
    """Return the gradient of mu / 2 * |w - w_global|^2 (Li et al. 2020, equation 2)."""
    return Correction(pull=parameters["mu"])


_RULES: Mapping[str, Callable[[Mapping[str, float]], Correction]] = {"fedprox": _fedprox}
