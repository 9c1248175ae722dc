"""What of a cure lasts into a client's next rounds, and how it is released, step by step."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fedrounds.diagnosis.values import Oddity
from fedrounds.doctor.stepping import UNTREATED, Overrides
from fedrounds.errors import InvalidInput

_HEALTHY_ROUNDS = 4


@dataclass(frozen=True, kw_only=True)
class RemedyDecay:
    """A treatment that lasts, and for how many rounds since all has gone well."""

    treatment: Overrides = UNTREATED
    num_healthy_rounds: int = 0

    def after_round(
        self, treatment: Overrides, *, was_healthy: bool, has_dropped_samples: bool
    ) -> "RemedyDecay":
        """Return what is in force in the next round, given how this round ended.

        A round with a diagnosis begins the count anew. With each healthy round the norm doubles
        at which gradients are clipped. From the fourth on the rate doubles back to its own, and
        what still holds is released, but for leaving samples out as long as there are any to leave
        out. A step that was skipped is no step of the next round.
        """
        lasting = replace(
            treatment,
            skips=frozenset(),
            without=frozenset(),
            warmup_steps=0,
            warmup_from=0,
            trusts_gradient=False,
            # The next round's optimizer is another, with constants that are looked at anew.
            stabilises=False,
        )
        if not was_healthy:
            return RemedyDecay(treatment=lasting)
        num_healthy = self.num_healthy_rounds + 1
        if num_healthy < _HEALTHY_ROUNDS:
            clip_norm = None if lasting.clip_norm is None else 2 * lasting.clip_norm
            eased = replace(lasting, clip_norm=clip_norm)
            return RemedyDecay(treatment=eased, num_healthy_rounds=num_healthy)
        rate_factor = min(1.0, 2 * lasting.rate_factor)
        max_rate = math.inf if rate_factor == 1 else 2 * lasting.max_rate
        eased = replace(UNTREATED, rate_factor=rate_factor, max_rate=max_rate)
        if has_dropped_samples:
            eased = replace(eased, drops=lasting.drops, max_input=lasting.max_input)
        return RemedyDecay(treatment=eased, num_healthy_rounds=num_healthy)

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        treatment = self.treatment
        return {
            "num_healthy_rounds": self.num_healthy_rounds,
            "rate_factor": treatment.rate_factor,
            # JSON has no infinity.
            "max_rate": str(treatment.max_rate),
            "clip_norm": treatment.clip_norm,
            "drops": sorted(treatment.drops),
            "sanitises": treatment.sanitises,
            "max_input": str(treatment.max_input),
            "min_batch_size": treatment.min_batch_size,
            "guards": treatment.guards,
            "widens": treatment.widens,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "RemedyDecay":
        """Return what `as_json` gave.

        Raises:
            InvalidInput: something is missing or not what it should be.
        """
        try:
            return cls(
                num_healthy_rounds=int(values["num_healthy_rounds"]),
                treatment=Overrides(
                    rate_factor=float(values["rate_factor"]),
                    max_rate=float(values["max_rate"]),
                    clip_norm=None if values["clip_norm"] is None else float(values["clip_norm"]),
                    drops=frozenset(Oddity(name) for name in values["drops"]),
                    sanitises=bool(values["sanitises"]),
                    max_input=float(values["max_input"]),
                    min_batch_size=int(values["min_batch_size"]),
                    guards=bool(values["guards"]),
                    widens=bool(values["widens"]),
                ),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidInput(f"a kept treatment is damaged: {error!r}") from error
