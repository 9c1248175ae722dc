"""What makes an update bad beside its cohort: a norm far beyond those of other clients.

The norm of a delta (local minus global) depends on how much a client trains. At first it grows at
most as the training's *travel*: by how much a gradient that stays the same would have moved the
weights. Later it grows less, and then not at all. So another client's norm says how long this
client's may be: that norm, times this client's travel over the other's where it is larger. A norm
that is small is never a reason: a client with one example is honest, and a short update can't
harm the model.

Travel rests on what the server can bound by itself: the epochs and the batch size of the order,
and the examples that the client had registered when it got the order. The update's own number of
steps can only make its travel shorter.

An update is excluded if its norm is beyond all of these:

- `width` times the median of what the round's other updates allow;
- `width` times the median of what other clients' updates of the last rounds allow: few clients, or
  a cohort that happens to be alike, say little;
- half of `width` times the largest median of what other clients' updates of a landmark round allow:
  round 1, 2, 4, 8 and so on. A client whose data are unlike all others' sends an update as long as
  ever when those of the others, who agree, have become short: in balance they are as many times
  shorter as they are more;
- one percent of the norm of the global model: what moves it by less harms nothing.

The width grows where a median rests on few updates: times 2 with three of them, 1.3 with ten, 1.03
with a hundred. Fewer than three other clients give no median, and a median of 0 is no measure. So
with three clients or fewer nobody is ever excluded, and with four or more an update that is too
long is, as long as more than half of the others are honest. A client that registers more examples
than it has gains MAX_GROWTH at most.

Everything here is a function of what is recorded, so that a server that is started again judges
the same.
"""

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedrounds.training.effective_steps import effective_steps
from fedrounds.types import IncidentKind
from fedserver.events import event_of
from fedserver.records import Attempt, Exclusion, Refusal, StoredUpdate
from fedserver.settings import ServerSettings

MIN_OTHERS = 3
"""A median of fewer than three clients may be a bad client's own value."""

NUM_ROUNDS_COMPARED = 5
"""How many of the last rounds a round is compared with; more where an order was given earlier."""

MAX_GROWTH = 100.0
"""A client with more than so many times another's travel is judged as if it had so many times."""

_FEW_VALUES = 3.0
_LANDMARK_SHARE = 0.5
_HARMLESS_SHARE = 0.01


@dataclass(frozen=True, kw_only=True)
class Outlier:
    """An update whose `norm` is beyond `bound`.

    `typical` is the median of what `num_compared` other updates allow its client, and `width` how
    many times that is within the band.
    """

    update: StoredUpdate
    norm: float
    bound: float
    typical: float
    width: float
    num_compared: int


Before = Mapping[int, Sequence[StoredUpdate]]
"""By round, the updates that counted in it."""


def screen(
    closed: Attempt,
    stored: Sequence[StoredUpdate],
    *,
    before: Before,
    settings: ServerSettings,
    model_norm: float,
    trusted: Collection[int],
) -> list[Exclusion]:
    """Return the updates of a closed round that are too long; see this module.

    A function of what is recorded: `before` holds the updates that counted in earlier rounds (see
    `compared_rounds`), `settings` are the run's, `model_norm` is that of the model it began with.
    `trusted` clients are never excluded, and a band of width 0 excludes nobody.
    """
    width = settings.norm_band * closed.adjustments.norm_band_factor
    if not width:
        return []
    too_long = outliers(
        stored,
        before,
        round_number=closed.round_number,
        settings=settings,
        width=width,
        model_norm=model_norm,
    )
    return [
        _exclusion(closed, outlier)
        for outlier in too_long
        if outlier.update.client_id not in trusted
    ]


def _exclusion(closed: Attempt, outlier: Outlier) -> Exclusion:
    """Return the exclusion of an outlier, with the numbers that show it."""
    evidence = {
        "norm": outlier.norm,
        "bound": outlier.bound,
        "typical": outlier.typical,
        "width": outlier.width,
        "compared": outlier.num_compared,
    }
    reason = (
        f"the update is {outlier.norm:.6g} away from the global model (L2 norm); for this client's "
        f"work {outlier.typical:.6g} is usual (by {outlier.num_compared} updates of others), and "
        f"at most {outlier.width:.3g} times that is admitted, which is {outlier.bound:.6g}"
    )
    client_id = outlier.update.client_id
    return Exclusion(
        order_id=outlier.update.update.order_id,
        client_id=client_id,
        refusal=Refusal(reason=reason, evidence={"kind": "norm-band", **evidence}),
        kept_bytes=outlier.update.update.size_bytes,
        event=event_of(
            IncidentKind.UPDATE_EXCLUDED,
            closed,
            client_id=client_id,
            is_incident=True,
            **evidence,
        ),
    )


def compared_rounds(round_number: int, updates: Sequence[StoredUpdate]) -> list[int]:
    """Return the earlier rounds that a round's updates are compared with."""
    recent = recent_rounds(round_number, updates)
    return sorted({*recent, *landmark_rounds(round_number)})


def recent_rounds(round_number: int, updates: Sequence[StoredUpdate]) -> range:
    """Return the last rounds before a round, back to that in which its oldest order was given."""
    oldest = max((update.staleness for update in updates), default=0)
    return range(max(1, round_number - max(NUM_ROUNDS_COMPARED, oldest)), round_number)


def landmark_rounds(round_number: int) -> list[int]:
    """Return the rounds before a round whose numbers are powers of two."""
    return [2**power for power in range((round_number - 1).bit_length())]


def travel_of(update: StoredUpdate, settings: ServerSettings) -> float:
    """Return the distance that a constant gradient of norm 1 moves weights, in learning rates.

    It is the number of SGD's effective steps (fedrounds.training.effective_steps), or the number
    of another optimizer's steps. The number of steps is the number that `settings` (the run's) ask
    for with the registered examples, or the number that the update reports if that is less.
    """
    reported = update.update
    registered = update.num_registered or reported.num_examples
    asked = settings.epochs * math.ceil(registered / settings.batch_size)
    steps = max(1, min(asked, reported.num_steps))
    momentum = settings.momentum if settings.optimizer == "sgd" else 0.0
    return effective_steps(steps, momentum)


def outliers(
    updates: Sequence[StoredUpdate],
    before: Before,
    *,
    round_number: int,
    settings: ServerSettings,
    width: float,
    model_norm: float,
) -> list[Outlier]:
    """Return the updates of a round that are too long; see the module for the rule.

    `before` holds at least the rounds of `compared_rounds`, where they had updates that count.
    `model_norm` is the L2 norm of the global model's parameters.
    """
    recent = [
        update
        for number in recent_rounds(round_number, updates)
        for update in before.get(number, ())
    ]
    now = _Group(updates, settings)
    groups = [(now, 1.0), (_Group(recent, settings), 1.0)]
    for number in landmark_rounds(round_number):
        groups.append((_Group(before.get(number, ()), settings), _LANDMARK_SHARE))
    too_long = []
    for index, update in enumerate(updates):
        client_id, norm, travel = update.client_id, update.delta_norm, now.travels[index]
        # Most are short enough by this alone, which takes no look at all the others.
        if norm <= max(_HARMLESS_SHARE * model_norm, width * now.least_median(client_id)):
            continue
        bounds = []
        for group, share in groups:
            reached = group.reached_by_others(client_id, travel)
            # Where most others changed nothing there is no measure for anybody.
            if len(reached) and (typical := float(np.median(reached))):
                reach = share * width * (1 + _FEW_VALUES / len(reached))
                bounds.append((reach * typical, typical, reach, len(reached)))
        if bounds and norm > (largest := max(bounds))[0]:
            bound, typical, reach, num_compared = largest
            too_long.append(
                Outlier(
                    update=update,
                    norm=norm,
                    bound=bound,
                    typical=typical,
                    width=reach,
                    num_compared=num_compared,
                )
            )
    return too_long


class _Group:
    """The updates of one round or of several, in columns: client ids, norms and travels."""

    def __init__(self, updates: Sequence[StoredUpdate], settings: ServerSettings) -> None:
        self.client_ids = np.array([update.client_id for update in updates], dtype=np.int64)
        self.norms = np.array([update.delta_norm for update in updates])
        self.travels = np.array([travel_of(update, settings) for update in updates])
        self._ascending = np.sort(self.norms)
        self._num_of = Counter(update.client_id for update in updates)

    def reached_by_others(self, client_id: int, travel: float) -> NDArray[np.float64]:
        """Return the norms that other clients would have reached with this travel, at most.

        Empty where they are fewer than MIN_OTHERS.
        """
        if not self._has_enough(client_id):
            return np.empty(0)
        is_other = self.client_ids != client_id
        growth = np.clip(travel / self.travels[is_other], 1.0, MAX_GROWTH)
        reached: NDArray[np.float64] = self.norms[is_other] * growth
        return reached

    def least_median(self, client_id: int) -> float:
        """Return a lower bound of the median of `reached_by_others`, in constant time.

        Leaving values out of a sorted sequence makes no value before the last smaller.
        """
        if not self._has_enough(client_id):
            return 0.0
        num_others = len(self.norms) - self._num_of[client_id]
        return float(self._ascending[(num_others - 1) // 2])

    def _has_enough(self, client_id: int) -> bool:
        return len(self._num_of) - (client_id in self._num_of) >= MIN_OTHERS
