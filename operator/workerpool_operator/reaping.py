"""When a silent worker may be taken for lost.

Presence that expired because Redis was down, paused, restarted, refused writes or had its clock set says nothing about workers.
So nobody is taken over from until the same Redis process has answered and taken writes without a gap for one presence life: by
then every worker that lives has reported again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from workerpool_operator.observation import Unavailable
from workerpool_routing.wire import PRESENCE_LIFE_MS

LONGEST_GAP_SECONDS = 3.0
"""Two passes further apart than this, or a clock that was set back between them, have not watched Redis without a gap."""

LONGEST_STEP_SECONDS = 6.0
"""The same by Redis's own clock, by which presence expires: a longer step lets workers look silent that have just reported."""


@dataclass(frozen=True, slots=True)
class Witness:
    """How long one Redis process has been seen to answer and to take writes: since when, when last, and its own time then."""

    run_id: str
    since: float
    last: float
    time: float


def witness(before: Witness | None, run_id: str | Unavailable, now: float, time: float) -> Witness | None:
    """What this pass's answer adds; None when there was no answer, or what the pass wrote was refused.

    Args:
        before: what the pass before has returned.
        run_id: of the process that has answered.
        now: seconds.
        time: the same by Redis's clock.
    """
    if isinstance(run_id, Unavailable):
        return None
    watched = before is not None and before.run_id == run_id and 0 <= now - before.last <= LONGEST_GAP_SECONDS
    if before is None or not watched or not 0 <= time - before.time <= LONGEST_STEP_SECONDS:
        return Witness(run_id, now, now, time)
    return replace(before, last=now, time=time)


def may_reap(seen: Witness | None) -> bool:
    """Whether silence means loss."""
    return seen is not None and seen.last - seen.since >= PRESENCE_LIFE_MS / 1000
