"""From what a pass has seen of one pool to what it will do: pure, tier by tier."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import fmean

from workerpool_operator import breaker, drain, scaling
from workerpool_operator.model import Mode, Tier, WorkerPoolSpec
from workerpool_operator.observation import (
    NEVER_OPENED,
    NO_ATTEMPTS,
    BrokerReading,
    Checkpoint,
    Phase,
    QueueReading,
    Replica,
    TierReplicas,
    Unavailable,
    newest,
)
from workerpool_operator.ports import Marks, Pool
from workerpool_routing.decide import START_SECONDS, Load, assumed_seconds
from workerpool_routing.wire import (
    PRESENCE_LIFE_MS,
    Capacity,
    Milliseconds,
    Policy,
    StartingSlots,
    TaskPolicy,
    TierCapacity,
    TierPolicy,
)

GROUPS = 8
"""The slots on their way are published in at most this many groups, each with the time when it is ready."""

OVERDUE = 0.125
"""A worker that should be ready by now is expected to take this part of the start time more."""

_NEWS = 0.1
"""A start time is stored again once it differs from the stored one by more than this part of it."""

_STUCK = frozenset({Phase.UNSCHEDULABLE, Phase.FAILING, Phase.LATE})
"""The phases of a worker that is ordered and cannot come up for now. The time spent in the first two is no start time."""

REMOVED_SECONDS = 8.0
"""For how long nothing has to be left of a removed tier until it goes: longer than API pods keep a policy and publish by it."""

_SILENT = "{} has not reported for {:.0f} s or longer: it, its node or its way to Redis is gone; it counts again once it reports"

_HANGS = "{} is not ready {:.0f} s after it was ordered, and starts take {:.0f} s; see the Events of the pod"

_FAILS = "attempts on {} fail, and their jobs succeed elsewhere; it is tried again after a pause"

_PAUSED = "mode: Paused: nothing is decided, the count is what was seen"


@dataclass(frozen=True, slots=True)
class TierPlan:
    """One tier: what was seen of it, and what it should have. ``queue`` is None when the broker could not be read.

    ``drain`` says how it comes to what it should have without cutting off a job, ``breaker`` whether it takes part in routing;
    None where there is nothing to decide: a plain tier, one whose jobs have nowhere else to go, a pool that is paused or unread.
    ``stuck`` says when each worker that could not come up was last seen so, ``reported`` when each was last seen to report,
    ``removal`` how far a tier is that is not in the spec any more.
    """

    tier: Tier
    queue: QueueReading | None
    workers: TierReplicas
    decision: scaling.Decision
    drain: drain.Drain
    breaker: breaker.Decision | None = None
    stuck: Mapping[str, float] = field(default_factory=dict)
    reported: Mapping[str, float] = field(default_factory=dict)
    removal: Removal | None = None

    @property
    def memory(self) -> Memory:
        """What the next pass has to know of this one."""
        return Memory(self.decision.memory, self.drain.memory, self.stuck, self.reported, self.removal)

    @property
    def lingers(self) -> bool:
        """Whether it is a removed tier without workers that stays for now."""
        left = self.workers.desired or self.drain.replicas
        return self.removal is not None and not self.removal.over and not left

    @property
    def spilled(self) -> int | None:
        """Jobs that wanted this tier and wait or run elsewhere."""
        return self.queue.spilled if self.queue else None


@dataclass(frozen=True, slots=True)
class Removal:
    """How far a removed tier is: since when nothing of it is left, None while something is, and whether that is long enough."""

    empty_since: float | None = None
    over: bool = False


@dataclass(frozen=True, slots=True)
class Memory:
    """What is remembered of one tier from pass to pass; ``stuck``, ``reported`` and ``removal`` as in :class:`TierPlan`."""

    scaling: scaling.Memory = field(default_factory=scaling.Memory)
    drain: drain.Memory = field(default_factory=drain.Memory)
    stuck: Mapping[str, float] = field(default_factory=dict)
    reported: Mapping[str, float] = field(default_factory=dict)
    removal: Removal | None = None

    def heard(self, now: float) -> Memory:
        """The same where nobody could report, or could be heard: no worker is silent for that."""
        return replace(self, reported=dict.fromkeys(self.reported, now))


def plan(
    pool: Pool,
    reading: BrokerReading | Unavailable,
    workers: Mapping[str, TierReplicas],
    memory: Mapping[str, Memory],
    now: float,
) -> list[TierPlan]:
    """Decide for every tier. For a paused pool, the decision is the count that is there.

    Args:
        pool: the pool.
        reading: its queues.
        workers: its workers, by tier name.
        memory: what the last decisions returned, by tier name.
        now: seconds.
    """
    plans: dict[str, TierPlan] = {}
    decided: list[_Decided] = []
    # A spilled job orders where it waits, behind the tier that it wanted: what is ordered there has to be known first.
    plain, accelerated = ([t for t in pool.spec.tiers if t.accelerated is kind] for kind in (False, True))
    for tier in (*plain, *reversed(accelerated), *pool.removed):
        live, before = workers[tier.name], memory.get(tier.name, Memory())
        if isinstance(reading, Unavailable):
            plans[tier.name] = _hold(pool, tier, reading, live, before, now)
        elif tier in pool.removed:
            plans[tier.name] = _depart(pool, tier, reading, live, before, now)
        else:
            plans[tier.name], own = _decide(pool, tier, reading, live, before, decided, now)
            decided.append(own)
    return [plans[tier.name] for tier in pool.tiers]


def _hold(pool: Pool, tier: Tier, reading: Unavailable, live: TierReplicas, before: Memory, now: float) -> TierPlan:
    """The plan while the broker cannot be read: the count and the workers stay."""
    known = _informed(before, live, None)
    # The minimum needs no reading: a Deployment that is not there is created with it.
    unread = scaling.Unread(max(live.desired, tier.replicas.min), reading)
    decision = _overruled(scaling.decide(_limits(pool, tier), unread, known.scaling, now), pool, live)
    leaves = drain.held(live, decision.replicas, known.drain)
    stuck, reported = _stuck(live, before.stuck, now, unread=True), before.heard(now).reported
    removal = Removal() if tier in pool.removed else None
    return TierPlan(tier, None, live, decision, leaves, None, stuck, reported, removal)


def _depart(pool: Pool, tier: Tier, reading: BrokerReading, live: TierReplicas, before: Memory, now: float) -> TierPlan:
    """The plan of a removed tier: its workers finish what is left of it, then it goes."""
    queue = _left(pool, tier, _bounded(reading, tier))
    known, stuck = _informed(before, live, queue), _stuck(live, before.stuck, now, unread=False)
    reported = _reported(live, queue, before.reported, now)
    live = _judged(live, queue, stuck, reported, known.scaling, now)
    decision = _overruled(_departing(tier, queue, live, known), pool, live)
    leaves = drain.decide(decision.replicas, live, queue, reading.marked, reading.time, known.drain, now)
    return TierPlan(tier, queue, live, decision, leaves, None, stuck, reported, _removal(queue, live, before.removal, now))


def _decide(
    pool: Pool,
    tier: Tier,
    reading: BrokerReading,
    live: TierReplicas,
    before: Memory,
    others: Sequence[_Decided],
    now: float,
) -> tuple[TierPlan, _Decided]:
    queue = _bounded(reading, tier)
    known, stuck, limits = _informed(before, live, queue), _stuck(live, before.stuck, now, unread=False), _limits(pool, tier)
    reported = _reported(live, queue, before.reported, now)
    live = _judged(live, queue, stuck, reported, known.scaling, now)
    routing = _routing(pool, tier, queue, reading.time)
    own = demand(_servable(queue, routing), live, reading.arrived(tier.name), stuck, now)
    own = _joint(own, limits, known.scaling, others, now)
    decision = _overruled(scaling.decide(limits, own, known.scaling, now), pool, live)
    leaves = drain.decide(decision.replicas, live, queue, reading.marked, reading.time, known.drain, now)
    return TierPlan(tier, queue, live, decision, leaves, routing, stuck, reported), _Decided(limits, own, decision)


def _limits(pool: Pool, tier: Tier) -> scaling.Policy:
    return scaling.Policy(tier.replicas.min, tier.replicas.max, tier.concurrency, pool.spec.scaling.target_wait_seconds)


def _overruled(decision: scaling.Decision, pool: Pool, live: TierReplicas) -> scaling.Decision:
    """The decision, or the count that runs now where it is not this operator's to change."""
    if pool.spec.mode is Mode.PAUSED:
        return replace(decision, replicas=live.desired, reason=scaling.Reason.PAUSED, message=_PAUSED)
    if live.rival:
        why = f"the count is left to {live.rival}"
        return replace(decision, replicas=live.desired, reason=scaling.Reason.ANOTHER_AUTOSCALER, message=why)
    return decision


@dataclass(frozen=True, slots=True)
class _Decided:
    """What a tier was asked for and what it will have."""

    limits: scaling.Policy
    demand: scaling.Demand
    decision: scaling.Decision


def _joint(
    own: scaling.Demand, limits: scaling.Policy, memory: scaling.Memory, others: Sequence[_Decided], now: float
) -> scaling.Demand:
    """The demand of a tier, given what was decided for the tiers to which its jobs spill. No job orders two slots.

    A spilled job orders its slot on the tier where it waits. It orders one here only if it would start sooner on a worker that
    is ordered here now. Spilled jobs that run elsewhere count by their work, in slots of this tier. Until it is known how long
    jobs take on both tiers, one worker is ordered to find out. Workers that are stuck here stay ordered while a job that wanted
    the tier is elsewhere: a pod that waits for a node is what makes a cluster autoscaler add one.
    """
    soon = max(limits.target_wait, scaling.start_seconds(memory))
    late = sum(max(0, math.ceil(o.demand.waiting - scaling.starts(o.limits, o.demand, o.decision, soon, now))) for o in others)
    settled = max(0, own.spilled - late) if others else 0
    running = min(settled, sum(o.demand.in_flight for o in others))
    jobs, seconds = sum(o.demand.served.jobs for o in others), sum(o.demand.served.seconds for o in others)
    carried = float(min(running, limits.concurrency))
    if own.served.jobs and jobs and seconds:
        carried = running * min(1.0, own.served.seconds / own.served.jobs / (seconds / jobs))
    kept = min(own.stuck * limits.concurrency, own.spilled)
    return replace(own, settled=settled, carried=max(carried, kept))


def _reported(live: TierReplicas, queue: QueueReading, before: Mapping[str, float], now: float) -> Mapping[str, float]:
    """When each of the workers was last seen to report; those that never did are not in it."""
    heard = {**before, **dict.fromkeys((report.worker for report in queue.workers), now)}
    return {replica.worker: heard[replica.worker] for replica in live.replicas if replica.worker in heard}


def _judged(
    live: TierReplicas,
    queue: QueueReading,
    stuck: Mapping[str, float],
    reported: Mapping[str, float],
    known: scaling.Memory,
    now: float,
) -> TierReplicas:
    """The workers, with the phase Ejected, Lost or Late for those that are not to be counted on."""
    ejected = {report.worker for report in queue.workers if report.ejected}

    def judge(one: Replica) -> Replica:
        if one.phase not in (Phase.STARTING, Phase.READY):
            return one
        if one.worker in ejected:
            return replace(one, phase=Phase.EJECTED, detail=_FAILS.format(one.worker))
        silent = now - reported.get(one.worker, now)
        if silent >= PRESENCE_LIFE_MS / 1000:
            return replace(one, phase=Phase.LOST, detail=_SILENT.format(one.worker, silent))
        lasts, latest = now - _begun(one, stuck), scaling.latest_start(known, _begun(one, stuck))
        if one.phase is Phase.STARTING and one.ready_at is None and one.worker not in reported and lasts > latest:
            seconds = now - one.ordered_at, scaling.start_seconds(known)
            return replace(one, phase=Phase.LATE, detail=_HANGS.format(one.worker, *seconds))
        return one

    return replace(live, replicas=tuple(map(judge, live.replicas)))


def _stuck(live: TierReplicas, before: Mapping[str, float], now: float, *, unread: bool) -> Mapping[str, float]:
    """When each of the workers that could not come up was last seen so; none comes up while its broker does not answer."""

    def hindered(replica: Replica) -> bool:
        return replica.phase in _STUCK or (unread and replica.phase is Phase.STARTING and replica.ready_at is None)

    seen = {replica.worker: now for replica in live.replicas if hindered(replica)}
    return {one.worker: before[one.worker] for one in live.replicas if one.worker in before} | seen


def _begun(replica: Replica, stuck: Mapping[str, float]) -> float:
    """Since when a worker can come up: its order, or when it was last seen unable to."""
    return max(replica.ordered_at, stuck.get(replica.worker, replica.ordered_at))


def demand(queue: QueueReading, live: TierReplicas, arrived: int, stuck: Mapping[str, float], now: float) -> scaling.Demand:
    """What the rule is told of one tier; ``stuck`` as in :class:`TierPlan`."""
    # A pod that was ready, or that drains, is un-Ready for another reason than its start: it is back at once when that is over.
    draining = {report.worker for report in queue.workers if report.draining}
    unready = [replica for replica in live.replicas if replica.phase is Phase.STARTING]
    starts = [replica for replica in unready if replica.ready_at is None and replica.worker not in draining]
    back = len(unready) - len(starts)
    count = max(0, live.starting - back)
    starting = [_begun(replica, stuck) for replica in starts][:count] if count else []
    ready_at, last = newest(live.replicas) or (0.0, None)
    return scaling.Demand(
        waiting=queue.waiting,
        in_flight=queue.in_flight,
        spilled=queue.spilled,
        replicas=live.desired,
        start_seconds=ready_at - last.ordered_at if last else None,
        ready=live.count(Phase.READY) + back,
        # What was ordered so lately that no worker is to be seen yet is ordered now.
        starting=(*starting, *[now] * (count - len(starting))),
        stuck=sum(replica.phase in _STUCK for replica in live.replicas),
        arrived=arrived,
        served=queue.served,
        held_up=_begun(last, stuck) - last.ordered_at if last else 0.0,
        ready_at=ready_at,
    )


def _informed(memory: Memory, live: TierReplicas, queue: QueueReading | None) -> Memory:
    """The memory, with a start time from elsewhere until this operator has seen a worker of the tier start.

    It is what an earlier operator has stored, or what the place where the workers run can say.
    """
    known = memory.scaling
    if known.start_seconds is not None:
        return memory
    before = queue.kept.start_seconds if queue else None
    return replace(memory, scaling=replace(known, start_seconds=before, first_start=live.first_start or known.first_start))


def _routing(pool: Pool, tier: Tier, queue: QueueReading, time: Milliseconds) -> breaker.Decision | None:
    elsewhere = any(not other.accelerated for other in pool.spec.tiers)
    if pool.spec.mode is Mode.PAUSED or not (tier.accelerated and elsewhere):
        return None
    # Nothing is limited in this mode, and nothing is kept of what it would come to.
    stored = NEVER_OPENED if pool.spec.mode is Mode.ADVISORY else queue.kept.breaker
    return breaker.decide(stored, queue.attempts, queue.in_flight, time)


def _servable(queue: QueueReading, routing: breaker.Decision | None) -> QueueReading:
    """The jobs that the tier needs workers for: all that want it, or, while its breaker limits it, as many as may try it."""
    if routing is None or routing.limit is None:
        return queue
    return replace(queue, waiting=min(queue.waiting + queue.spilled, breaker.TRIALS_AT_ONCE), spilled=0)


def _bounded(reading: BrokerReading, tier: Tier) -> QueueReading:
    """The tier's reading, with no more spilled jobs than the other tiers hold: the ledger still lists the jobs of a queue that
    was purged.
    """
    own = reading.tiers[tier.name]
    elsewhere = sum(q.waiting + q.in_flight for name, q in reading.tiers.items() if name != tier.name)
    return replace(own, spilled=min(own.spilled, elsewhere))


def _left(pool: Pool, tier: Tier, queue: QueueReading) -> QueueReading:
    """What is left of a removed tier. If its queue is another's by now, what waits there is that one's."""
    if tier.queue in pool.ceded:
        # Who runs its jobs there leaves them waiting on the ledger.
        return replace(queue, waiting=0, unclaimed=0)
    if any(other.queue == tier.queue for other in pool.spec.tiers):
        return replace(queue, waiting=0)
    return queue


def _departing(tier: Tier, queue: QueueReading, live: TierReplicas, memory: Memory) -> scaling.Decision:
    """As many workers as have something to do, none more than there are; one if there is none and a job waits."""
    left = queue.waiting + queue.in_flight + queue.scheduled
    most = max(live.desired, min(queue.waiting, 1))
    replicas = min(most, math.ceil(left / tier.concurrency))
    message = (
        f"no longer in the WorkerPool, goes when nothing is left: {queue.waiting} waiting + {queue.in_flight} in flight"
        f" + {queue.scheduled} for a later time, {queue.unclaimed} unclaimed on the ledger; wanted: {replicas}"
    )
    return scaling.Decision(replicas, scaling.Reason.REMOVED, message, memory.scaling)


def _removal(queue: QueueReading, live: TierReplicas, before: Removal | None, now: float) -> Removal:
    if live.desired or live.replicas or queue.lost:
        return Removal()
    if queue.waiting or queue.in_flight or queue.scheduled or queue.unclaimed:
        return Removal()
    since = before.empty_since if before and before.empty_since is not None else now
    return Removal(since, now - since >= REMOVED_SECONDS)


def policy(spec: WorkerPoolSpec, removed: Sequence[Tier] = ()) -> Policy:
    """What API pods and workers have to know of the pool; ``removed`` as in :class:`Pool`."""
    return Policy(
        tiers=tuple(map(_tier_policy, spec.tiers)),
        accelerated_content_types=spec.routing.accelerated_content_types,
        tasks=tuple(TaskPolicy(task.name, task.accelerated) for task in spec.routing.tasks),
        fallback_on_failure=spec.routing.fallback.on_failure,
        fallback_on_loss=spec.routing.fallback.on_loss,
        max_wait_seconds=spec.routing.max_wait_seconds,
        removed=tuple(map(_tier_policy, removed)),
    )


def _tier_policy(tier: Tier) -> TierPolicy:
    return TierPolicy(tier.name, tier.queue, tier.accelerated, tier.concurrency)


def capacity(spec: WorkerPoolSpec, plans: list[TierPlan], time: Milliseconds, now: float) -> Capacity:
    """The slots that presence cannot show: ordered and not there yet, and those that may still be ordered; and when they come.

    Args:
        spec: of the pool.
        plans: of one pass.
        time: of the reading that they stand on, by Redis's clock.
        now: the same by the clock of the workers' times, seconds.
    """
    target = spec.scaling.target_wait_seconds
    return Capacity({plan.tier.name: _capacity(plan, target, time, now) for plan in plans})


def _capacity(plan: TierPlan, target: float, time: Milliseconds, now: float) -> TierCapacity:
    slots = plan.tier.concurrency
    stuck = sum(replica.phase in _STUCK for replica in plan.workers.replicas)
    start, ready_in = _starts(plan, stuck, now)
    return TierCapacity(
        # A job waits for no worker of a removed tier: one that may go elsewhere does.
        starting=tuple(
            StartingSlots(slots * len(group), Milliseconds(time + round(1000 * fmean(group))))
            for group in _grouped([] if plan.removal else ready_in)
        ),
        # Where one worker cannot be placed or does not come up, another would not either; another autoscaler orders none by this.
        startable=0 if stuck or plan.workers.rival else slots * max(0, plan.tier.replicas.max - plan.decision.replicas),
        start_seconds=start,
        target_seconds=target,
        unschedulable=slots * plan.workers.count(Phase.UNSCHEDULABLE),
        limit=plan.breaker.limit if plan.breaker else None,
    )


def _starts(plan: TierPlan, stuck: int, now: float) -> tuple[float, list[float]]:
    """How long a worker takes to start, and for each that is on its way in how many seconds it is ready, soonest first.

    A worker that should be there already, or that runs and does not report yet, takes :data:`OVERDUE` of the start time more.
    """
    takes_jobs = {report.worker: report.slots > 0 for report in (plan.queue.workers if plan.queue else ())}
    coming = [
        replica
        for replica in plan.workers.replicas
        if replica.phase in (Phase.STARTING, Phase.READY) and not takes_jobs.get(replica.worker)
    ]
    start = scaling.start_seconds(plan.decision.memory)
    if plan.decision.memory.start_seconds is None:
        starting = [r for r in coming if r.phase is Phase.STARTING and r.ready_at is None and r.worker not in takes_jobs]
        assumed = min(START_SECONDS, plan.decision.memory.first_start)
        start = max([assumed, *(now - _begun(replica, plan.stuck) for replica in starting)])
    out = plan.workers.count(Phase.EJECTED) + plan.workers.count(Phase.LOST)
    count = max(0, plan.decision.replicas - sum(takes_jobs.values()) - stuck - out)
    lasted = [now - _begun(replica, plan.stuck) for replica in coming]
    ready_in = sorted(min(max(start - seconds, start * OVERDUE), start) for seconds in lasted)[:count]
    # Where one worker is stuck, those that cannot be seen yet would be stuck too.
    return start, ready_in if stuck else ready_in + [start] * (count - len(ready_in))


def _grouped(ready_in: list[float]) -> list[list[float]]:
    """Ascending times in at most :data:`GROUPS` groups, cut at the widest gaps; what is ready within a second is one."""
    gaps = [(after - before, index) for index, (before, after) in enumerate(pairwise(ready_in), 1) if after - before > 1.0]
    cuts = sorted(index for _, index in sorted(gaps, reverse=True)[: GROUPS - 1])
    edges = [0, *cuts, len(ready_in)]
    return [ready_in[first:last] for first, last in pairwise(edges)] if ready_in else []


def loads(plans: list[TierPlan], capacity: Capacity, time: Milliseconds) -> Mapping[str, Load]:
    """Every tier as admission measures it at the time of the reading, ``service`` being the mean over all its jobs; none where a
    queue was not read. Slots of a worker that is known to have failed do not count, although its presence is not over yet.
    """
    return {plan.tier.name: _load(plan, plan.queue, capacity.tiers[plan.tier.name], time) for plan in plans if plan.queue}


def _load(plan: TierPlan, queue: QueueReading, capacity: TierCapacity, time: Milliseconds) -> Load:
    failed = plan.workers.names(Phase.FAILING)
    ready = sum(report.slots for report in queue.workers if report.worker not in failed)
    service = queue.served.seconds / queue.served.jobs if queue.served.jobs else None
    assumed = assumed_seconds(accelerated=plan.tier.accelerated)
    return Load(queue.waiting, queue.in_flight, ready, service=service, assumed=assumed).having(capacity, time)


def checkpoints(plans: list[TierPlan]) -> Mapping[str, Checkpoint]:
    """What to store for the next pass or the next operator: of the tiers for which it is not what was read."""
    kept = {plan.tier.name: (_checkpoint(plan, plan.queue), plan.queue.kept) for plan in plans if plan.queue}
    return {name: now for name, (now, before) in kept.items() if now != before}


def _checkpoint(plan: TierPlan, queue: QueueReading) -> Checkpoint:
    kept, decided, start = queue.kept, plan.breaker, plan.decision.memory.start_seconds
    if decided and (decided.breaker, decided.attempts) != (kept.breaker, queue.attempts):
        # If attempts count from another time on than before, none has been counted since.
        counted = queue.counted if decided.breaker.since == kept.breaker.since else NO_ATTEMPTS
        kept = replace(kept, breaker=decided.breaker, baseline=counted - decided.attempts)
    if start is not None and (kept.start_seconds is None or abs(start - kept.start_seconds) > _NEWS * kept.start_seconds):
        kept = replace(kept, start_seconds=start)
    return kept


def marks(plans: list[TierPlan], marked: frozenset[str]) -> Marks:
    """Which drain marks to set and which to take back. Those of workers that are gone are taken back too."""
    wanted = frozenset[str]().union(*(plan.drain.marks for plan in plans))
    return Marks(wanted - marked, marked - wanted)
