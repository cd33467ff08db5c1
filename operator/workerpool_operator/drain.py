"""Which workers leave when a tier has too many, and when: pure.

The marks in Redis are the state, so that a new leader needs no other.

1. A worker that is to leave is marked, so that it takes nothing new: those that never came up first, then the busy ones that are
   un-Ready, then the idle, then those with the fewest jobs.
2. It may go once its own report, made since the mark was seen, says that it drains and holds nothing. Only then the count is
   lowered, by no more than there are such workers.
3. Not while workers are replaced by those of another template (which of them go is then not ours to say, unless all of them may),
   and not while a worker that holds a job is un-Ready: the cluster would remove that one first.
4. New demand takes the marks back before anything is ordered.
5. A worker that never reports (no library in it) cannot be marked. It goes once the queue has been empty for
   :data:`EMPTY_WINDOW_SECONDS`, protected by its grace period alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from workerpool_operator.observation import Phase, QueueReading, Replica, TierReplicas
from workerpool_routing.wire import PRESENCE_LIFE_MS, Milliseconds, Presence

EMPTY_WINDOW_SECONDS = 60.0
"""How long a queue has to have been empty before workers leave that do not say whether they are busy."""

OVERDUE_SECONDS = 600.0
"""A worker that has not become idle for so long after its mark is reported; it is not killed."""


@dataclass(frozen=True, slots=True)
class Memory:
    """What is remembered from pass to pass; without it a drain takes a second longer.

    Attributes:
        marked: for each marked worker Redis's time and the pass's own when its mark was first seen.
        empty_since: since when nothing waits and nothing is in flight, None while something is.
    """

    marked: Mapping[str, tuple[Milliseconds, float]] = field(default_factory=dict)
    empty_since: float | None = None


@dataclass(frozen=True, slots=True)
class Drain:
    """How a tier comes down to the count that is wanted.

    Attributes:
        replicas: the count that it may have now; above the wanted one while workers finish what they have.
        leaving: the workers that go with that count.
        marks: the workers that are to take nothing new.
        overdue: those of them that have been asked long ago and are still busy.
        message: what is waited for, in words; empty where nothing is.
    """

    replicas: int
    leaving: frozenset[str] = frozenset()
    marks: frozenset[str] = frozenset()
    overdue: tuple[str, ...] = ()
    message: str = ""
    memory: Memory = field(default_factory=Memory)


@dataclass(frozen=True, slots=True)
class _Worker:
    """One worker with the last reports of its lives."""

    replica: Replica
    reports: tuple[Presence, ...]
    marked_at: Milliseconds | None

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
        """Whether nobody can say what it does."""
        return self.up and not self.reports

    @property
    def drained(self) -> bool:
        """Whether it has said, since the mark was seen, that it takes nothing and has nothing."""
        marked_at = self.marked_at
        return marked_at is not None and all(r.draining and not r.busy and r.at > marked_at for r in self.reports)

    @property
    def endangered(self) -> bool:
        """Whether the cluster would remove it before any idle one."""
        return self.busy > 0 and self.replica.phase is not Phase.READY

    def may_go(self, now: float, empty_since: float | None) -> bool:
        if not self.up:
            return True
        if not self.silent:
            return self.drained
        since = self.replica.ready_at or self.replica.ordered_at
        settled = now - since > PRESENCE_LIFE_MS / 1000
        return settled and empty_since is not None and now - empty_since >= EMPTY_WINDOW_SECONDS

    def order(self) -> tuple[bool, bool, bool, int, bool, bool, float]:
        """Who goes first. What the cluster would remove before any idle one has to become idle before anybody may go."""
        ready = self.replica.phase is Phase.READY
        return self.up, self.silent, not self.endangered, self.busy, ready, self.marked_at is None, -self.replica.ordered_at


def decide(
    wanted: int, live: TierReplicas, queue: QueueReading, marked: frozenset[str], time: Milliseconds, memory: Memory, now: float
) -> Drain:
    """Choose who leaves one tier, and how many may do so now.

    Args:
        wanted: the count that the scaling rule has chosen.
        live: the tier's workers.
        queue: its reading.
        marked: the workers of the pool whose marks were read.
        time: of Redis, at the reading.
        memory: what the last decision returned.
        now: seconds.
    """
    memory = _learn(live, queue, marked, time, memory, now)
    reports: dict[str, list[Presence]] = {}
    for report in queue.workers:
        reports.setdefault(report.worker, []).append(report)

    def worker(replica: Replica) -> _Worker:
        name = replica.worker
        return _Worker(replica, tuple(reports.get(name, ())), memory.marked[name][0] if name in memory.marked else None)

    stopping = {replica.worker for replica in live.replicas if replica.phase is Phase.STOPPING} & memory.marked.keys()
    staying = [worker(replica) for replica in live.replicas if replica.phase is not Phase.STOPPING]
    chosen = sorted(staying, key=_Worker.order)[: max(0, len(staying) - wanted)]
    surplus = live.desired - wanted
    rolling = live.rolling and any(one.up for one in staying)
    if surplus <= 0 or (rolling and wanted > 0):
        chosen = [one for one in chosen if one.marked_at is not None]
    marks = frozenset(one.replica.worker for one in chosen) | stopping
    if surplus <= 0:
        return Drain(wanted, marks=marks, memory=memory)

    gone = [one.replica.worker for one in chosen if one.may_go(now, memory.empty_since)]
    unseen = live.desired - len(staying)  # below zero while those that were let go are still there
    endangered = [one.replica.worker for one in staying if one.endangered]
    if len(gone) == len(staying):
        rolling = False  # with all of them idle it does not matter which ones the cluster takes
    step = 0 if endangered or rolling else max(0, min(surplus, unseen + len(gone)))
    overdue = tuple(
        sorted(
            one.replica.worker
            for one in chosen
            if one.busy and one.marked_at is not None and now - memory.marked[one.replica.worker][1] > OVERDUE_SECONDS
        )
    )
    return Drain(
        live.desired - step,
        leaving=frozenset(gone[: max(0, step - unseen)]) if step else frozenset(),
        marks=marks,
        overdue=overdue,
        message=_waits_for(surplus - step, chosen, endangered, rolling=rolling),
        memory=memory,
    )


def held(live: TierReplicas, wanted: int, memory: Memory) -> Drain:
    """While the broker cannot be read nothing leaves, and an empty queue is no longer known to be empty."""
    return Drain(max(live.desired, wanted), memory=Memory(memory.marked))


def _learn(
    live: TierReplicas, queue: QueueReading, marked: frozenset[str], time: Milliseconds, memory: Memory, now: float
) -> Memory:
    names = {replica.worker for replica in live.replicas}
    seen = {name: memory.marked.get(name, (time, now)) for name in marked & names}
    empty = not (queue.waiting or queue.in_flight)
    since = now if memory.empty_since is None else memory.empty_since
    return Memory(seen, since if empty else None)


def _waits_for(left: int, chosen: list[_Worker], endangered: list[str], *, rolling: bool) -> str:
    if left <= 0:
        return ""
    if rolling:
        return f"{left} more leave when the rollout is through"
    if endangered:
        return f"{left} more leave when {endangered[0]} is ready again: it holds a job and would be removed first"
    busy = sum(one.busy > 0 for one in chosen)
    if silent := sum(one.silent for one in chosen):
        return f"{silent} do not report and leave when the queue has been empty for {EMPTY_WINDOW_SECONDS:.0f} s"
    return f"{left} leave when they have finished their jobs" if busy else f"{left} take nothing new and leave"
