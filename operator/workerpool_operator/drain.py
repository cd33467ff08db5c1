"""Which workers leave when a tier has too many, and when: pure.

The marks in Redis are the only state, so a new leader goes on from them.

1. A worker that is to leave is marked, and takes nothing new from then on. Chosen first are workers that never came up, then busy
   ones that are un-Ready, then idle ones, then those with the fewest jobs, and last those that do not report.
2. A marked worker may go once it has reported, after its mark was seen, that it drains and holds nothing. Only then is the count
   lowered, and by no more than there are such workers.
3. The count is not lowered during a rollout, when the cluster chooses which worker goes (unless all of them may), nor while a
   busy worker is un-Ready, because the cluster would remove that one first.
4. When demand rises, marks are taken back before a new worker is ordered.
5. A worker that never reports (its app lacks the library) cannot see a mark. It goes once the queue has been empty, and no such
   worker on the database has held a message, for :data:`EMPTY_WINDOW_SECONDS`, protected by its grace period alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from workerpool_operator.observation import Phase, QueueReading, Replica, TierReplicas
from workerpool_routing.wire import PRESENCE_LIFE_MS, Milliseconds, Presence

EMPTY_WINDOW_SECONDS = 60.0
"""How long a queue has to have been empty before workers that do not report leave."""

OVERDUE_SECONDS = 600.0
"""A worker that is still busy so long after its mark is reported; it is not killed."""


@dataclass(frozen=True, slots=True)
class Mark:
    """When a worker's mark was first seen: by Redis's clock, and in seconds of the pass."""

    time: Milliseconds
    at: float


@dataclass(frozen=True, slots=True)
class Memory:
    """What is remembered from pass to pass; without it a drain takes a second longer.

    Attributes:
        marked: by worker, since when it is known to be marked.
        empty_since: since when nothing has been waiting, or in flight at workers that do not report; None while something is.
    """

    marked: Mapping[str, Mark] = field(default_factory=dict)
    empty_since: float | None = None


@dataclass(frozen=True, slots=True)
class Drain:
    """How a tier comes down to the replica count that is wanted.

    Attributes:
        replicas: the count for now; above the wanted one while workers finish their jobs.
        leaving: the workers that go when the count is lowered to it.
        marks: the workers that are to take nothing new.
        overdue: those of them that were marked long ago and are still busy.
        message: what is waited for, in words; empty if nothing is.
    """

    replicas: int
    leaving: frozenset[str] = frozenset()
    marks: frozenset[str] = frozenset()
    overdue: tuple[str, ...] = ()
    message: str = ""
    memory: Memory = field(default_factory=Memory)


@dataclass(frozen=True, slots=True)
class _Worker:
    """One worker, and the last report of each life that it has had (a container restarts under the same pod name)."""

    replica: Replica
    reports: tuple[Presence, ...]
    mark: Mark | None

    @property
    def name(self) -> str:
        return self.replica.worker

    @property
    def busy(self) -> int:
        return sum(report.busy for report in self.reports)

    @property
    def up(self) -> bool:
        """Whether it may hold a job."""
        if self.reports or self.replica.phase is Phase.READY:
            return True
        return self.replica.phase is Phase.STARTING and self.replica.ready_at is not None

    @property
    def silent(self) -> bool:
        """Whether it may hold a job and does not report."""
        return self.up and not self.reports

    @property
    def drained(self) -> bool:
        """Whether it has reported, since its mark was seen, that it takes nothing new and holds nothing."""
        mark = self.mark
        return mark is not None and all(r.draining and not r.busy and r.at > mark.time for r in self.reports)

    @property
    def endangered(self) -> bool:
        """Whether it is busy and the cluster would remove it before any idle one."""
        return self.busy > 0 and self.replica.phase is not Phase.READY

    def may_go(self, now: float, empty_since: float | None) -> bool:
        if not self.up:
            return True
        if not self.silent:
            return self.drained
        since = self.replica.ready_at or self.replica.ordered_at
        settled = now - since > PRESENCE_LIFE_MS / 1000
        return settled and empty_since is not None and now - empty_since >= EMPTY_WINDOW_SECONDS

    def overdue(self, now: float) -> bool:
        return self.busy > 0 and self.mark is not None and now - self.mark.at > OVERDUE_SECONDS

    def order(self) -> tuple[bool, bool, bool, int, bool, bool, float]:
        """Who is chosen first (rule 1); of equals, one that is marked already, then the youngest."""
        ready = self.replica.phase is Phase.READY
        return self.up, self.silent, not self.endangered, self.busy, ready, self.mark is None, -self.replica.ordered_at


def decide(
    wanted: int, live: TierReplicas, queue: QueueReading, marked: frozenset[str], time: Milliseconds, memory: Memory, now: float
) -> Drain:
    """Choose who leaves one tier, and how many may do so now.

    Args:
        wanted: the count that the scaling rule has chosen.
        live: the tier's workers.
        queue: its reading.
        marked: the marked workers of the whole pool, as read.
        time: of Redis, at the reading.
        memory: what the last decision returned.
        now: seconds.
    """
    memory = _learn(live, queue, marked, time, memory, now)
    staying = _staying(live, queue, memory)
    surplus = live.desired - wanted
    rolling = live.rolling and any(one.up for one in staying)
    chosen = sorted(staying, key=_Worker.order)[: max(0, len(staying) - wanted)]
    if surplus <= 0 or (rolling and wanted > 0):
        chosen = [one for one in chosen if one.mark]  # nobody is marked anew
    marks = frozenset(one.name for one in chosen) | (live.names(Phase.STOPPING) & memory.marked.keys())
    if surplus <= 0:
        return Drain(wanted, marks=marks, memory=memory)

    may_go = [one.name for one in chosen if one.may_go(now, memory.empty_since)]
    if len(may_go) == len(staying):
        rolling = False  # all of them may go, so it does not matter which ones the cluster removes
    endangered = next((one.name for one in staying if one.endangered), None)
    unseen = live.desired - len(staying)  # ordered and not there yet; below zero while those that were let go are still there
    if unseen > 0:  # who reports is there, whatever is to be seen of it
        unseen = max(0, unseen - len({one.worker for one in queue.workers} - {one.worker for one in live.replicas}))
    step = 0 if endangered or rolling else max(0, min(surplus, unseen + len(may_go)))
    return Drain(
        live.desired - step,
        leaving=frozenset(may_go[: step - unseen]) if step else frozenset(),
        marks=marks,
        overdue=tuple(sorted(one.name for one in chosen if one.overdue(now))),
        message=_waits_for(surplus - step, chosen, endangered, rolling=rolling),
        memory=memory,
    )


def held(live: TierReplicas, wanted: int, memory: Memory) -> Drain:
    """The decision while the broker cannot be read: nobody leaves, and the queue is no longer known to be empty."""
    return Drain(max(live.desired, wanted), memory=Memory(memory.marked))


def _staying(live: TierReplicas, queue: QueueReading, memory: Memory) -> list[_Worker]:
    """The workers that have not been told to stop, each with its reports and its mark."""
    reports: dict[str, list[Presence]] = {}
    for report in queue.workers:
        reports.setdefault(report.worker, []).append(report)
    return [
        _Worker(replica, tuple(reports.get(replica.worker, ())), memory.marked.get(replica.worker))
        for replica in live.replicas
        if replica.phase is not Phase.STOPPING
    ]


def _learn(
    live: TierReplicas, queue: QueueReading, marked: frozenset[str], time: Milliseconds, memory: Memory, now: float
) -> Memory:
    names = {replica.worker for replica in live.replicas}
    seen = {name: memory.marked.get(name, Mark(time, now)) for name in marked & names}
    empty = not (queue.waiting or queue.in_flight or queue.plain_in_flight)
    since = now if memory.empty_since is None else memory.empty_since
    return Memory(seen, since if empty else None)


def _waits_for(left: int, chosen: list[_Worker], endangered: str | None, *, rolling: bool) -> str:
    if left <= 0:
        return ""
    if rolling:
        why = "once the rollout is over"
    elif endangered:
        why = f"once {endangered} is ready again: it holds a job and would be removed first"
    elif silent := sum(one.silent for one in chosen):
        why = f"{silent} of them do not report: once nothing has been waiting or in flight for {EMPTY_WINDOW_SECONDS:.0f} s"
    elif any(one.busy for one in chosen):
        why = "once their jobs are finished"
    else:
        why = "they take nothing new"
    return f"workers still to leave: {left} ({why})"
