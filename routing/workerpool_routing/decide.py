"""Which tier a job goes to, and why: a pure rule.

What needs no measurement is decided by :func:`preselect`; the rest, :func:`place`, stands a second time in ``lua/admit.lua``,
where it runs beside the data. A test drives both with generated inputs and holds them equal.

The rule, in this order:

1. A job that did not ask for an accelerator, or whose content type gains nothing from one, goes to a plain tier; a required one
   to an accelerated tier. Among several of a kind: the one that starts it soonest, which is the first that has a free slot; of
   equal ones the first in order of preference.
2. Any other goes to the first accelerated tier that has a free slot.
3. Else it waits for the first accelerated tier that is worth the wait, or spills to the plain tier that starts it soonest:

   * Where the service times of both are known, it waits while the accelerated tier starts it at most ``sqrt(fast * slow) - fast``
     seconds later. That is a threshold which grows with the ratio of the speeds, as Lin and Kumar (1984) have shown to be
     optimal for a fast and a slow server: every job that queues makes all behind it wait, so the shortest completion of each,
     ``slow - fast``, is too late for all of them. A task that spills so goes on to spill until the difference has fallen to
     :data:`RETURN` of the threshold. Exactly on the boundary it waits.
   * Where they are not, it waits while slots may still start, the first of them is ready no more than :data:`PATIENCE_SECONDS`
     after the plain tier would start it, and the accelerated queue is no more than :data:`MARGIN` longer.

4. If that tier cannot start it before its deadline or the longest wait allowed, the tier that starts it soonest takes it; if none
   can, the job is refused. Exactly in time is in time.

A tier whose attempts fail has no room, whatever slots it has, but for the jobs that are to try it (:attr:`Load.limit`). A job
that requires such a tier would only fail there: it is refused, however long it may wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from math import ceil, inf, sqrt

from workerpool_routing.wire import Milliseconds, Policy, TierCapacity, TierPolicy, Wish

MARGIN = 5
"""By how many waiting jobs the accelerated queue may be longer than the plain one while service times are unknown."""

RETURN = 0.5
"""The part of the threshold at which a task that spills comes back."""

SERVICE_SECONDS = 1.0
"""How long a job is taken to run while none has ended on its tier: short, so that no job is refused for want of knowledge."""

ACCELERATION = 4.0
"""By this factor, an accelerated tier is then taken to be faster: a low one, for a tier that is worth its price."""

SHORTEST_SECONDS = 0.001
"""No job is taken to run for less: this is the resolution of the clock by which run times are measured."""

START_SECONDS = 30.0
"""How long a slot is taken to start while no start has been seen: short, for the same reason, and within the patience."""

PATIENCE_SECONDS = 30.0
"""While service times are unknown, a job waits for an accelerated slot that is ready at most this much later than a plain one."""


class Reason(StrEnum):
    """Why a job is where it is: the closed list that answers, logs, status and counters use."""

    NOT_REQUESTED = "NotRequested"
    CONTENT_TYPE_GAINS_NOTHING = "ContentTypeGainsNothing"
    REQUIRED = "Required"
    ONLY_TIER = "OnlyTier"
    FREE_SLOT = "FreeSlot"
    SLOT_STARTING = "SlotStarting"
    SLOT_TOO_FAR = "SlotTooFar"
    WORTH_THE_WAIT = "WorthTheWait"
    NO_CAPACITY = "NoCapacity"
    TIER_BROKEN = "TierBroken"
    QUEUE_TOO_LONG = "QueueTooLong"
    WAIT_TOO_LONG = "WaitTooLong"
    STARTS_SOONER = "StartsSooner"
    OVERLOADED = "Overloaded"
    POLICY_UNKNOWN = "PolicyUnknown"
    ADMISSION_FAILED = "AdmissionFailed"
    ATTEMPT_FAILED = "AttemptFailed"
    ATTEMPT_LOST = "AttemptLost"
    REBALANCED = "Rebalanced"


@dataclass(frozen=True, slots=True)
class Request:
    """What the caller asks for.

    Attributes:
        content_type: its main type, None when unknown.
        limit: seconds within which the job has to start, None when it may wait for ever.
    """

    task: str
    accelerated: Wish
    content_type: str | None = None
    limit: float | None = None


@dataclass(frozen=True, slots=True)
class Candidates:
    """The tiers that may take a job, in order of preference.

    Attributes:
        accelerated: how many of them, from the first, are to be preferred to the others while they are worth the wait.
        reason: why these and no others; None where the load has to say.
    """

    tiers: tuple[TierPolicy, ...]
    accelerated: int = 0
    reason: Reason | None = None


def assumed_seconds(*, accelerated: bool) -> float:
    """How long a job is taken to run on such a tier while none has ended there."""
    return SERVICE_SECONDS / ACCELERATION if accelerated else SERVICE_SECONDS


@dataclass(frozen=True, slots=True)
class Load:
    """One tier as the admission script measures it, in slots, not in workers.

    Attributes:
        coming: slots that are on their way, and in how many seconds they are ready: soonest first, at least one slot each.
        leased: jobs that were sent to it and are not in its queue yet.
        service: mean seconds of this task on it, None when unknown.
        mean: mean seconds of the jobs that it runs, of any task; if it is None, ``service`` is used in its place.
        startable, start_seconds, target_seconds: slots that may still be ordered, as in :class:`TierCapacity`.
        limit: how many jobs it may have at once while its attempts fail; None while they do not.
        assumed: how long a job is taken to run while neither is known, see :func:`assumed_seconds`.
    """

    waiting: int
    in_flight: int
    ready: int
    coming: tuple[tuple[int, float], ...] = ()
    leased: int = 0
    service: float | None = None
    startable: int = 0
    start_seconds: float = 0.0
    target_seconds: float = 0.0
    mean: float | None = None
    limit: int | None = None
    assumed: float = SERVICE_SECONDS

    def having(self, capacity: TierCapacity, now: Milliseconds) -> Load:
        """The same with what the operator says of the tier."""
        return replace(
            self,
            coming=tuple((group.slots, max(0, group.ready_at - now) / 1000) for group in capacity.starting),
            startable=capacity.startable,
            start_seconds=capacity.start_seconds,
            target_seconds=capacity.target_seconds,
            limit=capacity.limit,
        )

    @property
    def ahead(self) -> int:
        """Jobs that have a slot or will get one first."""
        return self.in_flight + self.waiting + self.leased

    @property
    def queued(self) -> int:
        """Jobs that wait, in its queue or on their way there."""
        return self.waiting + self.leased

    @property
    def full(self) -> bool:
        """Whether it may have no more jobs, whatever slots it has."""
        return self.limit is not None and self.ahead >= self.limit

    @property
    def free(self) -> int:
        """Ready slots that no job has or waits for."""
        free = self.ready - self.ahead
        return min(0, free) if self.full else free

    @property
    def slots(self) -> int:
        """Slots that are ready, on their way, or may still be ordered."""
        return self.ready + sum(slots for slots, _ in self.coming) + self.startable

    @property
    def next_slot(self) -> float:
        """Seconds until the next slot may be ready; infinite where none comes."""
        return self.coming[0][1] if self.coming else self.start_seconds if self.startable > 0 else inf

    @property
    def wait(self) -> float:
        """Expected seconds until the job starts; infinite where no slot is ready or comes.

        The ``ahead`` jobs, of any task, start first. By the time ``t``, the ``ready`` slots have ended ``ready * t / mean`` jobs,
        and as many have started in their place. A group of ``n`` slots that is ready at ``r`` starts ``n`` jobs then, and
        ``n * (t - r) / mean`` more by ``t``. With the first groups of ``coming`` (``slots`` are theirs and ``ready`` together),
        job number ``ahead + 1`` starts at

            ``max(r of the last of them, (mean * (ahead + 1 - slots) + sum of n * r) / slots)``

        A further group can only make this earlier, so the answer is the least over all beginnings of ``coming``. It is the fluid
        limit, and exact in the mean where lengths are exponential and no group comes in between.

        If that is later than the target (or than one start, where a start takes longer), the operator will order slots, but just
        enough: the least number that, ready after one start, lets the job start by then. Each of them starts
        ``1 + (then - start) / mean`` of the jobs that are too many.
        """
        if self.full:
            return inf
        if self.free > 0:
            return 0.0
        known = self.service if self.mean is None else self.mean
        mean = max(self.assumed if known is None else known, SHORTEST_SECONDS)
        place, slots, offset = self.ahead + 1, self.ready, 0.0
        soonest = (place - slots) * mean / slots if slots > 0 else inf
        for more, ready_in in self.coming:
            slots, offset = slots + more, offset + more * ready_in
            soonest = min(soonest, max(ready_in, ((place - slots) * mean + offset) / slots))
        start, within = self.start_seconds, max(self.start_seconds, self.target_seconds)
        if self.startable <= 0 or soonest <= within:
            return soonest
        lacking = (place - slots) * mean - slots * within + offset
        more = min(self.startable, max(1, ceil(lacking / (mean + within - start))))
        slots, offset = slots + more, offset + more * start
        return min(soonest, max(start, ((place - slots) * mean + offset) / slots))


@dataclass(frozen=True, slots=True)
class Verdict:
    """Which candidate takes the job, why, and after how many seconds; a refusal is :data:`Reason.OVERLOADED`."""

    index: int
    reason: Reason
    wait: float


def preselect(policy: Policy, request: Request) -> Candidates:
    """The tiers between which :func:`place` has to choose."""
    accelerated = tuple(tier for tier in policy.tiers if tier.accelerated)
    plain = tuple(tier for tier in policy.tiers if not tier.accelerated)
    if not accelerated or not plain:
        return Candidates(policy.tiers, reason=Reason.ONLY_TIER)
    if not request.accelerated:
        return Candidates(plain, reason=Reason.NOT_REQUESTED)
    if request.accelerated == "required":
        return Candidates(accelerated, reason=Reason.REQUIRED)
    if request.content_type is not None and not gains(policy, request.content_type):
        return Candidates(plain, reason=Reason.CONTENT_TYPE_GAINS_NOTHING)
    return Candidates(accelerated + plain, accelerated=len(accelerated))


def gains(policy: Policy, content_type: str) -> bool:
    """Whether content of that type runs faster on an accelerator; only the main type counts."""
    return content_type.partition("/")[0].strip().lower() in map(str.lower, policy.accelerated_content_types)


def place(
    candidates: Candidates, loads: Sequence[Load], *, limit: float | None, spilling: bool = False, refuses: bool = True
) -> Verdict:
    """Choose among the candidates by what they hold.

    Args:
        candidates: from :func:`preselect`.
        loads: one for each of them.
        limit: seconds within which the job has to start.
        spilling: whether the last job of the task spilled because the wait was too long.
        refuses: whether a job that no tier can start in time is refused; else the one that starts it soonest takes it.
    """
    soonest = _soonest(loads, range(len(loads)))
    if candidates.reason:
        index, reason = soonest, candidates.reason
    else:
        index, reason = _prefer(candidates.accelerated, loads, spilling)
    longest = inf if limit is None else limit
    if loads[index].full or loads[index].wait > longest:
        if refuses and (loads[soonest].full or loads[soonest].wait > longest):
            return Verdict(soonest, Reason.OVERLOADED, loads[soonest].wait)
        if soonest != index:
            index, reason = soonest, Reason.STARTS_SOONER
    return Verdict(index, reason, loads[index].wait)


def _soonest(loads: Sequence[Load], among: range) -> int:
    return min(among, key=lambda index: (loads[index].full, loads[index].wait))


def _prefer(accelerated: int, loads: Sequence[Load], spilling: bool) -> tuple[int, Reason]:
    for index in range(accelerated):
        if loads[index].free > 0:
            return index, Reason.FREE_SLOT
    plain = _soonest(loads, range(accelerated, len(loads)))
    reasons = [_weigh(load, loads[plain], spilling) for load in loads[:accelerated]]
    worth = next((index for index, reason in enumerate(reasons) if reason not in SPILLS), None)
    return (plain, reasons[0]) if worth is None else (worth, reasons[worth])


def _weigh(fast: Load, slow: Load, spilling: bool) -> Reason:
    """Whether an accelerated tier without a free slot is worth the wait."""
    if fast.full:
        return Reason.TIER_BROKEN
    if fast.service is not None and slow.service is not None:
        if fast.slots <= 0:
            return Reason.NO_CAPACITY
        threshold = max(0.0, sqrt(fast.service * slow.service) - fast.service) * (RETURN if spilling else 1.0)
        return Reason.WORTH_THE_WAIT if fast.wait - slow.wait <= threshold else Reason.WAIT_TOO_LONG
    if fast.next_slot == inf:
        return Reason.NO_CAPACITY
    if fast.next_slot - slow.wait > PATIENCE_SECONDS:
        return Reason.SLOT_TOO_FAR
    return Reason.QUEUE_TOO_LONG if fast.queued > slow.queued + MARGIN else Reason.SLOT_STARTING


SPILLS = frozenset({Reason.NO_CAPACITY, Reason.TIER_BROKEN, Reason.SLOT_TOO_FAR, Reason.QUEUE_TOO_LONG, Reason.WAIT_TOO_LONG})
"""Why a job is not on the accelerated tier that it asked for."""


def explain(reason: Reason, tier: str, load: Load | None = None) -> str:
    """The decision in a sentence for people; ``load`` is what the tier that was asked for holds."""
    if load is None:
        return f"{tier}: {_WORDS[reason]}"
    first = f", the first in {load.next_slot:.0f} s" if load.next_slot < inf else ""
    return (
        f"{tier}: {_WORDS[reason]} ({load.ready} slots ready, {load.slots - load.ready} may still start{first}, "
        f"{load.in_flight} in flight, {load.queued} waiting)"
    )


_WORDS = {
    Reason.NOT_REQUESTED: "the job did not ask for an accelerator",
    Reason.CONTENT_TYPE_GAINS_NOTHING: "content of this type gains nothing from an accelerator",
    Reason.REQUIRED: "the job requires an accelerator",
    Reason.ONLY_TIER: "the pool has no other kind of tier",
    Reason.FREE_SLOT: "the accelerated tier has a free slot",
    Reason.SLOT_STARTING: "an accelerated slot is starting or may be started, and few jobs wait for it",
    Reason.SLOT_TOO_FAR: "an accelerated slot is starting or may be started, but a plain one is ready long before it",
    Reason.WORTH_THE_WAIT: "the accelerated tier is so much faster that the wait for it is worth it",
    Reason.NO_CAPACITY: "no accelerated slot is free and none can be started",
    Reason.TIER_BROKEN: "attempts on the accelerated tier fail: for now only single jobs may try it",
    Reason.QUEUE_TOO_LONG: f"the accelerated queue is more than {MARGIN} jobs longer",
    Reason.WAIT_TOO_LONG: "the wait for the accelerated tier costs more than its speed is worth",
    Reason.STARTS_SOONER: "the tier that it would have had cannot start it in time",
    Reason.OVERLOADED: "no tier can start the job in time",
    Reason.POLICY_UNKNOWN: "nothing is known of the pool, the app's own routing holds",
    Reason.ADMISSION_FAILED: "the admission script failed, the last tier takes the job",
    Reason.ATTEMPT_FAILED: "its accelerated attempt failed",
    Reason.ATTEMPT_LOST: "the worker of its last attempt was lost",
    Reason.REBALANCED: "it waited elsewhere, and this tier starts it sooner",
}
