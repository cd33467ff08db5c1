"""What one pass has seen: of a pool's queues in Redis, and of its workers where they run.

A reading that failed is a value of its own type, :class:`Unavailable`, never a zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from workerpool_routing.decide import Reason
from workerpool_routing.wire import Milliseconds, Presence


@dataclass(frozen=True, slots=True)
class Unavailable:
    """A reading that could not be had, and why, in words for the user."""

    why: str


@dataclass(frozen=True, slots=True)
class Served:
    """The jobs that a tier has ended since its Redis began.

    Attributes:
        jobs: how many.
        seconds: their time on a slot, added up.
        squares: the sum of the squares of these seconds.
        mean: the mean seconds of the latest ones; None before one has ended.
    """

    jobs: int = 0
    seconds: float = 0.0
    squares: float = 0.0
    mean: float | None = None


NOTHING_SERVED = Served()


@dataclass(frozen=True, slots=True)
class Waits:
    """The jobs that a tier has started since its Redis began.

    Attributes:
        jobs: how many.
        seconds: their waits from admission to start, added up.
        expected: what admission expected these waits to be, added up.
        right: how many waits were as expected (:data:`workerpool_routing.ledger.AS_EXPECTED_PART`).
    """

    jobs: int = 0
    seconds: float = 0.0
    expected: float = 0.0
    right: int = 0


NOTHING_STARTED = Waits()


@dataclass(frozen=True, slots=True)
class Attempts:
    """How attempts on an accelerated tier ended; of the latest the older weigh less, so these need not be whole numbers.

    Attributes:
        succeeded: ended well.
        failed: raised, ran over their time or lost their worker, so that the job went on to another tier.
        confirmed: of these, jobs that ended well there: the tier was at fault.
        refuted: of these, jobs that failed there as well: they were at fault themselves.
    """

    succeeded: float = 0.0
    failed: float = 0.0
    confirmed: float = 0.0
    refuted: float = 0.0

    def __sub__(self, other: Attempts) -> Attempts:
        return Attempts(
            self.succeeded - other.succeeded,
            self.failed - other.failed,
            self.confirmed - other.confirmed,
            self.refuted - other.refuted,
        )


class BreakerState(StrEnum):
    """Whether a tier takes part in routing: all jobs, none, or single ones that try it."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


_NEVER = Milliseconds(0)


@dataclass(frozen=True, slots=True)
class Breaker:
    """The circuit breaker of a tier; times are Redis milliseconds.

    Attributes:
        at: when it entered its state.
        opened: how often it has opened in a row.
        since: attempts that began before this do not count.
        older: jobs that the tier held when its trial began and that may be there still; the trial goes on beside them.
    """

    state: BreakerState = BreakerState.CLOSED
    at: Milliseconds = _NEVER
    opened: int = 0
    since: Milliseconds = _NEVER
    older: int = 0


NO_ATTEMPTS, NEVER_OPENED = Attempts(), Breaker()


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What the operator keeps of a tier in Redis, so that the next pass, or the next operator, goes on where this one stopped.

    Attributes:
        breaker: whether the tier takes part in routing.
        baseline: is subtracted from the attempts that were counted since ``breaker.since``: so many of them no longer count. A
            negative number adds attempts from before.
        start_seconds: how long its workers take to start, as an operator has seen it; None before one has.
    """

    breaker: Breaker = NEVER_OPENED
    baseline: Attempts = NO_ATTEMPTS
    start_seconds: float | None = None


NOTHING_KEPT = Checkpoint()


@dataclass(frozen=True, slots=True)
class QueueReading:
    """One tier as Redis has it.

    Attributes:
        waiting: messages in the tier's queue, over all priority steps.
        in_flight: messages that the tier's workers hold unacknowledged, without those of a future ETA.
        spilled: jobs that wanted this tier and wait or run elsewhere.
        unclaimed: jobs that wait there by the ledger, wherever their messages are.
        workers: the last report of each live worker.
        lost: owners that reported once and then fell silent, not yet taken over.
        served: the jobs that it has ended.
        waits: of the jobs that it has started.
        counted: how all of its attempts ended that began since its breaker last changed; workers alone count.
        kept: what an operator has stored for the tier.
        plain_in_flight: messages that workers without the library hold unacknowledged, of whatever queue of the database.
    """

    waiting: int
    in_flight: int
    spilled: int
    workers: tuple[Presence, ...] = ()
    lost: tuple[str, ...] = ()
    served: Served = NOTHING_SERVED
    waits: Waits = NOTHING_STARTED
    counted: Attempts = NO_ATTEMPTS
    kept: Checkpoint = NOTHING_KEPT
    plain_in_flight: int = 0
    unclaimed: int = 0

    @property
    def scheduled(self) -> int:
        """Messages of a future ETA that its workers hold."""
        return sum(report.scheduled for report in self.workers)

    @property
    def attempts(self) -> Attempts:
        """How its latest attempts ended."""
        return self.counted - self.kept.baseline


@dataclass(frozen=True, slots=True)
class BrokerReading:
    """All tiers of one pool at one instant.

    Attributes:
        tiers: by tier name.
        run_id: identity of the Redis process; another one means that it restarted.
        time: Redis's own clock.
        routes: decisions so far, by ``tier:reason``.
        marked: the workers that are marked to drain.
        database: the number of the database; with the process it tells the broker from all others, however its URL is spelled.
    """

    tiers: Mapping[str, QueueReading]
    run_id: str
    time: Milliseconds
    routes: Mapping[str, int] = field(default_factory=dict)
    database: int = 0
    marked: frozenset[str] = frozenset()

    def arrived(self, tier: str) -> int:
        """Jobs that were ever sent to the tier, by admission or by a fallback.

        One that moved while it waited has been counted since it was admitted.
        """
        moved = f"{tier}:{Reason.REBALANCED}"
        return sum(count for route, count in self.routes.items() if route.partition(":")[0] == tier and route != moved)


class Phase(StrEnum):
    """The state of one worker: as the place where it runs shows it, except for the last three, which ``planning.py`` decides.

    ``LATE``: it should have come up long ago. ``LOST``: it has reported once and is silent now, which its place may take minutes
    to see. ``EJECTED``: it takes no jobs because its attempts fail.
    """

    STARTING = "Starting"
    READY = "Ready"
    UNSCHEDULABLE = "Unschedulable"
    FAILING = "Failing"
    STOPPING = "Stopping"
    LATE = "Late"
    LOST = "Lost"
    EJECTED = "Ejected"


@dataclass(frozen=True, slots=True)
class Replica:
    """One worker as the place where it runs shows it; times are wall-clock seconds.

    Attributes:
        worker: the name under which it reports its presence (the pod's name).
        ordered_at: when it was created.
        ready_at: when it became ready, None before that.
        detail: what it waits for or dies of, in words.
        witnessed: whether it was seen before it was ready. If not, ``ready_at`` may be when it became ready once more, which does
            not tell how long its start took.
    """

    worker: str
    phase: Phase
    ordered_at: float
    ready_at: float | None = None
    detail: str = ""
    witnessed: bool = True


@dataclass(frozen=True, slots=True)
class TierReplicas:
    """The workers of one tier.

    Attributes:
        desired: how many are ordered.
        replicas: those that exist.
        rolling: whether they are being replaced by workers of another template.
        rival: who else scales them, in words for the user; empty if nobody does.
        editor: who changes what they are made from back after each repair, in words for the user; empty if nobody does.
        first_start: how many seconds a start is expected to take before one of the tier has been seen; None if the place where
            they run cannot tell.
    """

    desired: int
    replicas: tuple[Replica, ...] = ()
    rolling: bool = False
    rival: str = ""
    first_start: float | None = None
    editor: str = ""

    def count(self, phase: Phase) -> int:
        """How many are in that phase."""
        return [replica.phase for replica in self.replicas].count(phase)

    def names(self, phase: Phase) -> frozenset[str]:
        """Which workers are in that phase."""
        return frozenset(replica.worker for replica in self.replicas if replica.phase is phase)

    @property
    def starting(self) -> int:
        """Ordered and on their way: neither ready, nor stuck, nor leaving."""
        others = (Phase.READY, Phase.UNSCHEDULABLE, Phase.FAILING, Phase.LATE, Phase.LOST, Phase.EJECTED)
        return max(0, self.desired - sum(map(self.count, others)))


def newest(replicas: Iterable[Replica]) -> tuple[float, Replica] | None:
    """The worker that became ready last, of those whose start was witnessed, and when; None if there is none."""
    ready = [(replica.ready_at, replica) for replica in replicas if replica.ready_at is not None and replica.witnessed]
    return max(ready, key=lambda one: (one[0], -one[1].ordered_at), default=None)
