"""When a silent worker may be taken for lost.

Presence that expired because Redis was down, paused, restarted or refused writes says nothing about workers. So nobody is taken
over from until the same Redis process has answered and taken writes without a gap for one presence life: by then every worker
that lives has reported again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from workerpool_operator.observation import Unavailable
from workerpool_routing.wire import PRESENCE_LIFE_MS

LONGEST_GAP_SECONDS = 3.0
"""Two passes further apart than this, or a clock that was set back between them, have not watched Redis without a gap."""


@dataclass(frozen=True, slots=True)
class Witness:
    """How long one Redis process has been seen to answer and to take writes: since when, and when last."""

    run_id: str
    since: float
    last: float


def witness(before: Witness | None, run_id: str | Unavailable, now: float) -> Witness | None:
    """What this pass's answer adds; None when there was no answer, or what the pass wrote was refused."""
    if isinstance(run_id, Unavailable):
        return None
    if before is None or before.run_id != run_id or not 0 <= now - before.last <= LONGEST_GAP_SECONDS:
        return Witness(run_id, now, now)
    return replace(before, last=now)


def may_reap(seen: Witness | None) -> bool:
    """Whether silence means loss."""
    return seen is not None and seen.last - seen.since >= PRESENCE_LIFE_MS / 1000
