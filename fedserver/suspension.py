"""Which clients a round may ask: suspended clients sit out some rounds, then come back.

A client gets a strike when it stalls, is lost, or sends an update that is bad in itself. The first
strike costs a whole round and each further strike twice as many rounds as the strike before; an
update that counts clears them all. An excluded update is no strike: it was compared with others,
which proves nothing against its client. It costs a single round, however often.
"""

from collections.abc import Collection, Mapping

from fedserver.records import Suspension

MAX_SPAN = 64
"""Rounds that a client sits out at most."""


def after_strike(
    before: Suspension | None, *, client_id: int, round_number: int, reason: str
) -> Suspension:
    """Return a client's suspension after a strike in a round; `before` is its last suspension."""
    strikes = 1 if before is None else before.strikes + 1
    return Suspension(
        client_id=client_id,
        strikes=strikes,
        suspended_until=round_number + 1 + min(MAX_SPAN, 2 ** min(strikes - 1, MAX_SPAN)),
        reason=reason,
    )


def after_exclusion(
    before: Suspension | None, *, client_id: int, round_number: int, reason: str
) -> Suspension:
    """Return the suspension of a client whose update was excluded in a round."""
    return Suspension(
        client_id=client_id,
        strikes=0 if before is None else before.strikes,
        suspended_until=round_number + 2,
        reason=reason,
    )


def eligible_clients(
    candidates: Collection[int],
    suspensions: Mapping[int, Suspension],
    *,
    round_number: int,
    num_needed: int,
) -> set[int]:
    """Return the candidates that aren't suspended in this round.

    Where they are fewer than `num_needed`, suspended candidates are called back, those whose
    suspension ends first before the others: a run must not wait for rounds that can't come.
    """

    def suspended_until(client_id: int) -> int:
        suspension = suspensions.get(client_id)
        return 0 if suspension is None else suspension.suspended_until

    active = {client_id for client_id in candidates if suspended_until(client_id) <= round_number}
    suspended = sorted(
        set(candidates) - active, key=lambda client_id: (suspended_until(client_id), client_id)
    )
    return active | set(suspended[: max(0, num_needed - len(active))])
