"""When silence of a worker means that it is lost: once Redis has been witnessed to work for long enough.

Presence that expired because Redis was down, paused, restarted, refused writes or had its clock set says nothing about workers.
So no worker counts as lost until the same Redis process has answered and taken writes without a gap for one presence life: by
then every worker that is alive has reported again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from workerpool_operator.observation import Unavailable
from workerpool_routing.wire import PRESENCE_LIFE_MS

LONGEST_GAP_SECONDS = 3.0
"""If two passes are further apart than this, or the clock was set back between them, Redis was not watched without a gap."""

LONGEST_STEP_SECONDS = 6.0
"""The same by Redis's own clock, by which presence expires: after a longer step, workers look silent that have just reported."""


@dataclass(frozen=True, slots=True)
class Witness:
    """How long one Redis process has been seen to answer and to take writes.

    Attributes:
        run_id: of the process.
        since: when it was first seen, in seconds of the pass.
        last: when it was last seen.
        time: its own clock then, in seconds.
    """

    run_id: str
    since: float
    last: float
    time: float


def look(before: Witness | None, run_id: str | Unavailable, now: float, time: float) -> Witness | None:
    """What is known after this pass; None when there was no answer, or when a write was refused.

    Args:
        before: what was known after the pass before.
        run_id: of the Redis process that answered.
        now: seconds.
        time: of Redis's clock, in seconds.
    """
    if isinstance(run_id, Unavailable):
        return None
    watched = before is not None and before.run_id == run_id and 0 <= now - before.last <= LONGEST_GAP_SECONDS
    if before is None or not watched or not 0 <= time - before.time <= LONGEST_STEP_SECONDS:
        return Witness(run_id, now, now, time)
    return replace(before, last=now, time=time)


def may_reap(seen: Witness | None) -> bool:
    """Whether a silent worker counts as lost."""
    return seen is not None and seen.last - seen.since >= PRESENCE_LIFE_MS / 1000
