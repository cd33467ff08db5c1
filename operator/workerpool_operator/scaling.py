"""How many replicas a tier should have: a pure rule that says why.

In formulas, with sources and what was rejected: ``docs/adr/0008-scaling-rule.md``.

1. Without a reading the count stays where it is: unknown is not zero.
2. A job should start before its deadline, which is its arrival plus the target wait. A worker that is ordered now takes its first
   job one start time later. So the rule orders for a job when only one start time is left until its deadline, and the starts that
   can be counted on until then do not reach its place in the queue. Counted on are the expected starts, less :data:`CONFIDENCE`
   standard deviations. If not even the expected starts reach it, the rule orders at once: from zero replicas, for example.
   Workers that are on their way count, so that nothing is ordered twice.
3. A replica that is not needed any more is kept for a stabilization window (:func:`_stabilization`), the bound of the ski-rental
   problem.
4. Where a start takes longer than the target, an order comes too late for the job that asks for it. Then the jobs that will
   arrive during a start count too, and :func:`_headroom` stands ready for bursts like those of the last quarter of an hour.
5. The count is never below what the jobs in flight need, nor below what would do the work of the jobs that spilled and run
   elsewhere. The bounds of the pool hold last.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

from workerpool_operator.observation import NOTHING_SERVED, Served, Unavailable

START_SECONDS_UNTIL_KNOWN = 240.0
"""Assumed start time of a worker until one has been seen to start, unless the place where it runs knows better. It is about what
a new GPU node, an image and a model take together."""

SERVICE_SECONDS_UNTIL_KNOWN = 30.0
"""Assumed length of a job before one has been seen to end."""

LEAST_START_SECONDS = 1.0
"""No start is believed to be shorter: Kubernetes tells in whole seconds when a pod was created and ready, and by two clocks."""

CONFIDENCE = 2.33
"""Starts are counted on to this many standard deviations below their expected number. If no later pass could correct it, one
deadline in a hundred would be missed: 2.33 is the 99 % quantile of the normal distribution."""

MIN_STABILIZATION_SECONDS = 5.0
"""The count is never lowered sooner than this: a gap between two uploads is not the end of a burst."""

HANG_FACTOR = 4.0
"""A start is believed to take at most this many times what is known: one that hangs says little about the next."""

BURST_MEMORY_SECONDS = 900.0
"""How long a burst is remembered where a start takes longer than the target (four starts, if that is longer)."""

BURST_DEVIATIONS = 2.0
"""The headroom is for a burst this many standard deviations larger than the remembered one."""

_PASS_SECONDS = 1.5
"""By how much an order may come late: the time between two passes, and a margin."""

_STREAKS = 0.04
"""Jobs that arrive together are alike, so the mean length of the next ones differs from the overall mean however many they are.
This is the square of that difference, as a part of the variance of one job."""

_PRIOR_JOBS = 4.0
"""The weight of :data:`SERVICE_SECONDS_UNTIL_KNOWN` in the mean, in jobs."""

_MEMORY_JOBS = 256.0
"""How many jobs the mean remembers: with each new job the weight of all earlier ones falls by one part in so many."""

_OUTLIER = 10.0
"""The jobs of one pass count with at most this many times the mean that was known."""

_VARIATION_BOUNDS = (0.25, 4.0)
"""Between these the squared coefficient of variation of the job length is believed; 1 is that of exponential lengths."""

_BINS = 64
"""Into how many spans the record of arrivals is divided."""


class Reason(StrEnum):
    """Why a tier has the replicas it has: the closed list of conditions, Events, logs and metrics."""

    BROKER_UNREADABLE = "BrokerUnreadable"
    BACKLOG_EXCEEDS_CAPACITY = "BacklogExceedsCapacity"
    WAITING_TO_LOWER = "WaitingToLower"
    DEMAND_FELL = "DemandFell"
    HEADROOM = "Headroom"
    AS_NEEDED = "AsNeeded"
    AT_MAXIMUM = "AtMaximum"
    AT_MINIMUM = "AtMinimum"
    PAUSED = "Paused"
    ANOTHER_AUTOSCALER = "AnotherAutoscaler"
    REMOVED = "Removed"


@dataclass(frozen=True, slots=True)
class Policy:
    """What the user sets: bounds, slots of one replica, and within how many seconds a job should start."""

    minimum: int
    maximum: int
    concurrency: int = 1
    target_wait: float = 60.0


@dataclass(frozen=True, slots=True)
class Demand:
    """What one tier is asked for now, and what it has; its size does not depend on the number of jobs.

    Attributes:
        waiting: messages in its queue.
        in_flight: messages that its workers hold.
        spilled: jobs that wanted this tier and wait or run elsewhere.
        replicas: the count that is ordered now.
        start_seconds: how long the newest ready worker took from its order until it was ready; None before one was.
        ready: workers that take jobs.
        starting: for each worker on its way, the time of its order, or the time when it was last seen unable to come up.
        stuck: workers that are ordered and cannot come up for now.
        arrived: jobs that were ever sent to the tier, as far as they were counted.
        served: the jobs that it has ended.
        settled: how many of the spilled jobs need no slot here: they have one elsewhere, or will have one there no later than a
            worker that is ordered here now could give them one.
        carried: how many slots here would do the work of the settled jobs that run.
        held_up: how many seconds of ``start_seconds``, from the order on, the newest ready worker was unable to come up.
        ready_at: when the newest ready worker became ready.
    """

    waiting: int
    in_flight: int
    spilled: int
    replicas: int
    start_seconds: float | None = None
    ready: int = 0
    starting: tuple[float, ...] = ()
    stuck: int = 0
    arrived: int = 0
    served: Served = NOTHING_SERVED
    settled: int = 0
    carried: float = 0.0
    held_up: float = 0.0
    ready_at: float = 0.0

    @property
    def total(self) -> int:
        """Jobs that want a slot."""
        return self.waiting + self.in_flight + self.spilled

    @property
    def queued(self) -> int:
        """Jobs that want a slot here and have none."""
        return self.waiting + self.spilled - self.settled


@dataclass(frozen=True, slots=True)
class Unread:
    """No reading of the demand; the count that is ordered now is all that is known."""

    replicas: int
    unavailable: Unavailable


@dataclass(frozen=True, slots=True)
class Service:
    """What is known of the length of jobs: weighted sums, the newest :data:`_MEMORY_JOBS` counting most."""

    weight: float = _PRIOR_JOBS
    seconds: float = _PRIOR_JOBS * SERVICE_SECONDS_UNTIL_KNOWN
    squares: float = 2 * _PRIOR_JOBS * SERVICE_SECONDS_UNTIL_KNOWN**2

    @property
    def mean(self) -> float:
        """Seconds."""
        return max(self.seconds / self.weight, 1e-3)

    @property
    def variation(self) -> float:
        """The squared coefficient of variation, within reason."""
        low, high = _VARIATION_BOUNDS
        return min(max(self.squares / self.weight / self.mean**2 - 1, low), high)

    def after(self, jobs: int, seconds: float, squares: float) -> Service:
        """The estimate with the jobs of one more pass; their seconds count up to :data:`_OUTLIER` times the mean."""
        most = _OUTLIER * self.mean * jobs
        if seconds > most:
            squares, seconds = squares * (most / seconds) ** 2, most
        return _joined(self, jobs, seconds, squares)

    @staticmethod
    def recalled(served: Served) -> Service:
        """The estimate of an operator that has just started, from the counters alone: the mean of the latest jobs, the spread of
        all.
        """
        if not served.jobs:
            return Service()
        overall = served.seconds / served.jobs
        mean = overall if served.mean is None else served.mean
        spread = served.squares / served.jobs / overall**2 if overall else 1.0
        jobs = min(float(served.jobs), _MEMORY_JOBS)
        return _joined(Service(), jobs, jobs * mean, jobs * spread * mean**2)


def _joined(known: Service, jobs: float, seconds: float, squares: float) -> Service:
    kept = (1 - 1 / _MEMORY_JOBS) ** jobs
    return Service(known.weight * kept + jobs, known.seconds * kept + seconds, known.squares * kept + squares)


@dataclass(frozen=True, slots=True)
class Memory:
    """What the rule remembers from pass to pass; bounded, whatever the load.

    Attributes:
        total, arrived, served: the counters of the last reading, None before one.
        arrivals: ``(time, jobs)``, oldest first: how many jobs came, in little more than :data:`_BINS` spans of time.
        service: the length of jobs.
        start_seconds: the estimated start time, from workers that became ready; None before one has.
        first_start: the start time that is assumed until then.
        newest_start: when the newest worker in that estimate became ready.
        ceiling: ``(time, seconds)``: a start that was under way at that time raises the estimate to these seconds at most.
        under_way: how long the oldest start under way has lasted, as far as that is believed.
        outlasts: whether starts are known, not only assumed, to take longer than the target.
        level: the replicas that were needed at the last pass.
        fell: for each replica above that level that may still be ordered, when it was last needed; oldest first.
        bursts: ``(time, replicas)``: what recent bursts would have needed; oldest first, each smaller than the one before.
    """

    total: int | None = None
    arrived: int = 0
    served: Served = NOTHING_SERVED
    arrivals: tuple[tuple[float, int], ...] = ()
    service: Service = Service()
    start_seconds: float | None = None
    first_start: float = START_SECONDS_UNTIL_KNOWN
    newest_start: float | None = None
    ceiling: tuple[float, float] = (-math.inf, math.inf)
    under_way: float = 0.0
    outlasts: bool = False
    level: int | None = None
    fell: tuple[float, ...] = ()
    bursts: tuple[tuple[float, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Decision:
    """A replica count, why, the same in a sentence, and what to remember.

    ``again_at`` is when the answer may change although nothing happens; infinite where it will not.
    """

    replicas: int
    reason: Reason
    message: str
    memory: Memory
    again_at: float = math.inf


def decide(policy: Policy, observed: Demand | Unread, memory: Memory, now: float) -> Decision:
    """Choose the replica count of one tier; the rule stands in the module's docstring.

    Args:
        policy: bounds, slots per replica, and the target.
        observed: this pass's reading.
        memory: what the last decision returned.
        now: seconds, by the clock of ``observed.starting``.
    """
    if isinstance(observed, Unread):
        message = f"held at {observed.replicas}: {observed.unavailable.why}"
        # What was counted before the gap says nothing about the time after it; what was learnt of jobs and starts holds.
        learnt = Memory(
            service=memory.service,
            start_seconds=memory.start_seconds,
            newest_start=memory.newest_start,
            ceiling=memory.ceiling,
        )
        return Decision(observed.replicas, Reason.BROKER_UNREADABLE, message, learnt)

    memory = _learn(policy, observed, memory, now)
    outlook = _Outlook(policy, observed, memory, now)
    missing, due_at = outlook.missing()
    in_use = math.ceil(observed.in_flight / policy.concurrency)
    ordered = max(observed.replicas, in_use) + missing
    level = max(ordered if missing or observed.queued else in_use, in_use + round(observed.carried / policy.concurrency))
    memory, kept, falls_at = _keep(policy, observed, memory, min(level, policy.maximum), now)
    memory, standing, fades_at = _stand(policy, memory, now)
    needed = max(level, standing)
    replicas = min(max(needed, kept, in_use, policy.minimum), policy.maximum)
    reason = _reason(policy, observed, level, needed, replicas)
    message = _sentence(policy, observed, memory, reason, needed, replicas)
    return Decision(replicas, reason, message, memory, min(due_at, falls_at, fades_at))


def starts(policy: Policy, observed: Demand, decision: Decision, until: float, now: float) -> float:
    """How many of the waiting jobs are expected to start within ``until`` seconds, with the workers of this decision.

    A worker that will be ready only later counts with one job a slot: the jobs that it was ordered for.
    """
    ordered = max(0, decision.replicas - observed.replicas)
    seen = replace(observed, starting=(*observed.starting, *[now] * ordered))
    return _Outlook(policy, seen, decision.memory, now).starts(until)


def start_seconds(memory: Memory) -> float:
    """How long a worker is expected to take to start: as long as others did, or as one under way has lasted already."""
    return max(_known(memory), memory.under_way)


def _learn(policy: Policy, observed: Demand, memory: Memory, now: float) -> Memory:
    """Take in what happened since the last pass."""
    memory = _with_start(_not_after(memory, now), observed)
    oldest = min(observed.starting, default=now)
    under_way = min(now - oldest, _ceiling(memory, oldest))
    start = max(_known(memory), under_way)
    served, before = observed.served, memory.served
    service = memory.service
    jobs = served.jobs - before.jobs
    if memory.total is not None and jobs > 0:
        service = service.after(jobs, served.seconds - before.seconds, served.squares - before.squares)
    elif memory.total is None and service == Service():
        service = Service.recalled(served)
    span = max(policy.target_wait, start)
    arrivals = memory.arrivals
    if memory.total is not None:
        # Without a counter (tasks that bypass the library) only the net growth is seen: never too few, and never too late.
        came = max(observed.arrived - memory.arrived, observed.total - memory.total)
        arrivals = _with_arrivals(arrivals, came, span, now)
    return replace(
        memory,
        total=observed.total,
        arrived=observed.arrived,
        served=served,
        arrivals=arrivals,
        service=service,
        under_way=under_way,
        outlasts=(under_way if memory.start_seconds is None else start) + _PASS_SECONDS > policy.target_wait,
        level=observed.replicas if memory.level is None else memory.level,
    )


def _not_after(memory: Memory, now: float) -> Memory:
    """Without a time that is still to come: after the clock was set back that would count as new until it is there again."""
    stamped = (*(at for at, _ in memory.arrivals[-1:]), *memory.fell[-1:], *(at for at, _ in memory.bursts[-1:]))
    if max(stamped, default=now) <= now:
        return memory
    arrivals, bursts = (tuple((min(at, now), n) for at, n in stamps) for stamps in (memory.arrivals, memory.bursts))
    return replace(memory, arrivals=arrivals, bursts=bursts, fell=tuple(min(at, now) for at in memory.fell))


def latest_start(memory: Memory, ordered_at: float) -> float:
    """After how many seconds a start is no longer counted on; ``ordered_at`` is when it could begin."""
    return max(_ceiling(memory, ordered_at), START_SECONDS_UNTIL_KNOWN)


def _known(memory: Memory) -> float:
    return memory.first_start if memory.start_seconds is None else memory.start_seconds


def _ceiling(memory: Memory, ordered_at: float) -> float:
    """The longest that a start which was ordered at that time is believed to take.

    Starts that ran side by side share one ceiling: they hung for the same reason.
    """
    at, seconds = memory.ceiling
    # ``first_start`` is only an assumption and may be far too short, so it bounds nothing.
    known = START_SECONDS_UNTIL_KNOWN if memory.start_seconds is None else memory.start_seconds
    return seconds if ordered_at < at else HANG_FACTOR * known


def _with_start(memory: Memory, observed: Demand) -> Memory:
    """Take in the newest start that has ended. A slower one moves the estimate by half, a faster one by an eighth.

    How long a start took that was held up at first lies between two values: the time since it was held up last, and the time
    since its order. The estimate stays if it lies between them too; otherwise it moves towards the nearer one.
    """
    at = observed.ready_at
    if observed.start_seconds is None or at == memory.newest_start:
        return memory
    took = max(observed.start_seconds, LEAST_START_SECONDS)
    known, most = _known(memory), _ceiling(memory, at - took)
    told = min(max(known, took - observed.held_up), took, most)
    believed = memory.start_seconds
    if believed is not None:
        believed += (told - believed) / (2 if told > believed else 8)
    elif told != known or not observed.held_up:
        believed = told
    ceiling = memory.ceiling if at - took < memory.ceiling[0] else (at, most)
    return replace(memory, start_seconds=believed, newest_start=at, ceiling=ceiling)


def _with_arrivals(arrivals: tuple[tuple[float, int], ...], came: int, span: float, now: float) -> tuple[tuple[float, int], ...]:
    first = bisect_left(arrivals, (now - span - span / _BINS,))
    arrivals = arrivals[first:] if first else arrivals
    if came <= 0:
        return arrivals
    if arrivals and now - arrivals[-1][0] < span / _BINS:
        at, jobs = arrivals[-1]
        return (*arrivals[:-1], (at, jobs + came))
    return (*arrivals, (now, came))


class _Outlook:
    """How many jobs will start by when, with the workers that are ordered now."""

    def __init__(self, policy: Policy, observed: Demand, memory: Memory, now: float) -> None:
        self._policy, self._observed, self._now = policy, observed, now
        self._arrivals = memory.arrivals
        self._mean, self._variation = memory.service.mean, memory.service.variation
        self._start, self._outlasts = start_seconds(memory), memory.outlasts
        self._free = max(0, observed.ready * policy.concurrency - observed.in_flight)
        self._ready_in = sorted(max(ordered_at + self._start - now, 0.0) for ordered_at in observed.starting)

    def starts(self, until: float) -> float:
        """Jobs expected to start within so many seconds, and one for each slot that is on its way, however late it comes."""
        work = self._observed.ready * until + sum(max(0.0, until - ready_in) for ready_in in self._ready_in)
        slots = self._policy.concurrency
        return self._free + slots * (len(self._ready_in) + work / self._mean)

    def missing(self) -> tuple[int, float]:
        """Workers to order on top of those that are ordered, and when the next job has only one start time left."""
        lead = self._start + _PASS_SECONDS
        found, due_at = 0.0, math.inf
        for place, slack in self._queue():
            if slack > lead:
                if due_at == math.inf:
                    due_at = self._now + slack - lead
                found = max(found, self._short(place, slack, 0.0))
            else:
                found = max(found, self._short(place, max(slack, self._start), CONFIDENCE))
        wait = self._policy.target_wait
        rate = self._rate() if self._outlasts and lead > wait else 0.0
        if rate:
            # These jobs have not arrived yet, but it will be too late to order for them when they have.
            for beyond in (0.0, wait / 2, wait, 2 * wait):
                expected = self._observed.queued + rate * (lead - wait + beyond)
                found = max(found, self._short(expected, lead + beyond, 0.0))
        return max(0, math.ceil(found - 1e-9) - self._observed.stuck), due_at

    def _queue(self) -> Iterator[tuple[int, float]]:
        """For each group of jobs that came together: the last one's place in the queue, and the seconds until its deadline.

        The queue is first in, first out, so the waiting jobs are the newest arrivals. Jobs that were not seen to arrive are due
        now.
        """
        left, elsewhere = self._observed.queued, self._observed.settled
        newest: list[tuple[int, float]] = []
        for at, jobs in reversed(self._arrivals):
            if left <= 0:
                break
            # The settled jobs are taken for the newest ones, so that no age of the others is too low.
            here = max(0, jobs - elsewhere)
            elsewhere = max(0, elsewhere - jobs)
            if here:
                newest.append((left, at + self._policy.target_wait - self._now))
                left -= here
        if left > 0:
            yield left, 0.0
        yield from reversed(newest)

    def _short(self, place: float, until: float, deviations: float) -> float:
        """How many workers are missing for the job at this place to start within so many seconds."""
        slots, mean = self._policy.concurrency, self._mean
        first, work = 0, float(self._observed.ready * until)
        for ready_in in self._ready_in:
            if ready_in > until:
                break
            first += 1
            work += until - ready_in
        ends = slots * work / mean
        sure = max(0.0, ends - deviations * math.sqrt(self._variation * ends * (1 + _STREAKS * ends))) if deviations else ends
        lacking = place - self._free - slots * first - sure
        return lacking / (slots * (1 + max(0.0, until - self._start) / mean)) if lacking > 0 else 0.0

    def _rate(self) -> float:
        """Arrivals per second, over the last start time."""
        recent = self._arrivals[bisect_left(self._arrivals, (self._now - self._start,)) :]
        if not recent:
            return 0.0
        return (sum(jobs for _, jobs in recent) - 1) / (self._now - recent[0][0] + self._policy.target_wait / 2 + 1.0)


def _stabilization(policy: Policy, memory: Memory) -> float:
    """The stabilization window: how many seconds a replica is kept after it was last needed.

    After one start time an idle worker has cost as much as a start. But a job can wait for the target, so a worker need not be
    kept for jobs that could still be served in time by a new one.
    """
    start = start_seconds(memory)
    return max(start - policy.target_wait if memory.outlasts else 0.0, start / 4, MIN_STABILIZATION_SECONDS)


def _keep(policy: Policy, observed: Demand, memory: Memory, level: int, now: float) -> tuple[Memory, int, float]:
    """The level, with the replicas above it that are within their stabilization window, and when the first of these ends."""
    was = level if memory.level is None else memory.level
    fell = memory.fell[: max(0, len(memory.fell) - max(0, level - was))] + (now,) * (was - level)
    window = _stabilization(policy, memory)
    spare = max(0, observed.replicas - level)
    recent = sum(1 for at in fell[len(fell) - min(spare, len(fell)) :] if now - at < window)
    falls_at = fell[len(fell) - recent] + window if recent else math.inf
    if level != was or memory.level is None:
        memory = replace(memory, level=level, fell=fell[-policy.maximum :] if policy.maximum else ())
    return memory, level + recent, falls_at


def _stand(policy: Policy, memory: Memory, now: float) -> tuple[Memory, int, float]:
    """The standing headroom in replicas, and when it may shrink; none where an order comes in time."""
    if not memory.outlasts:
        return (replace(memory, bursts=()) if memory.bursts else memory), 0, math.inf
    steady, burst = _headroom(policy, memory, now)
    life = max(BURST_MEMORY_SECONDS, 4 * start_seconds(memory))
    bursts = (*((at, n) for at, n in memory.bursts if now - at <= life and n > burst), (now, burst))
    standing = max(steady, bursts[0][1])
    return replace(memory, bursts=bursts), standing, bursts[0][0] + life if standing else math.inf


def _headroom(policy: Policy, memory: Memory, now: float) -> tuple[int, int]:
    """Replicas for the steady load of the last start time, and for the worst burst in it.

    The steady load has its square root to spare (square-root staffing). The jobs of a burst have to be served within the time in
    which they came and the target.
    """
    mean, spread = memory.service.mean, 1 + memory.service.variation
    start, steady, burst = start_seconds(memory), 0.0, 0.0
    jobs, index = 0, len(memory.arrivals)
    for part in (16, 8, 4, 2, 1):
        span = start / part
        while index and memory.arrivals[index - 1][0] >= now - span:
            index -= 1
            jobs += memory.arrivals[index][1]
        burst = max(burst, mean * (jobs + BURST_DEVIATIONS * math.sqrt(spread * jobs)) / (span + policy.target_wait))
        steady = jobs * mean / span
    slots = policy.concurrency
    return round((steady + math.sqrt(steady)) / slots), math.ceil(burst / slots)


def _reason(policy: Policy, observed: Demand, level: int, needed: int, replicas: int) -> Reason:
    if needed > policy.maximum:
        return Reason.AT_MAXIMUM
    if replicas < observed.replicas:
        return Reason.DEMAND_FELL
    if replicas > max(needed, policy.minimum):
        return Reason.WAITING_TO_LOWER
    if needed < policy.minimum:
        return Reason.AT_MINIMUM
    if needed > level:
        return Reason.HEADROOM
    return Reason.BACKLOG_EXCEEDS_CAPACITY if replicas > observed.replicas else Reason.AS_NEEDED


def _sentence(policy: Policy, observed: Demand, memory: Memory, reason: Reason, needed: int, replicas: int) -> str:
    wants = f"{observed.waiting} waiting + {observed.in_flight} in flight"
    if observed.spilled:
        wants += f" + {observed.spilled} spilled"
    if observed.settled:
        wants += f" ({observed.settled} of these served elsewhere)"
    tail = {
        Reason.WAITING_TO_LOWER: f"; lowers when the need has stayed lower for {_stabilization(policy, memory):.0f} s",
        Reason.AT_MAXIMUM: "; replicas.max limits it",
        Reason.AT_MINIMUM: "; replicas.min holds it",
        Reason.HEADROOM: "; a start takes longer than the target, so some stand ready",
    }.get(reason, "")
    return (
        f"{wants} need {needed} worker{'' if needed == 1 else 's'} to start within {policy.target_wait:g} s (a job takes "
        f"{memory.service.mean:.3g} s, a worker's start {start_seconds(memory):.3g} s); wanted: {replicas}{tail}"
    )
