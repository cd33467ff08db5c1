"""What a pass's plan means to people: the status with its conditions, and the Events that say what changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from workerpool_operator import scaling
from workerpool_operator.breaker import Decision
from workerpool_operator.drain import OVERDUE_SECONDS, Drain
from workerpool_operator.model import Mode
from workerpool_operator.observation import NOTHING_SERVED, BreakerState, Phase, Unavailable
from workerpool_operator.planning import TierPlan
from workerpool_operator.ports import Pool
from workerpool_operator.rebalancing import Moved, told
from workerpool_operator.sharing import Conflict
from workerpool_operator.status import Condition, ConditionType, Event, Status, TierStatus, flips, stamp, summary, total
from workerpool_operator.worker_command import grace_seconds
from workerpool_routing.wire import PRESENCE_LIFE_MS

_ASIDE = {
    Mode.ACTIVE: "the operator acts",
    Mode.ADVISORY: "mode: Advisory: decides and reports, touches nothing",
    Mode.PAUSED: "mode: Paused: touches nothing",
}


def assess(
    pool: Pool,
    plans: Sequence[TierPlan],
    broker: Unavailable | None,
    refused: Unavailable | None,
    workers: Unavailable | None,
    conflict: Conflict | None,
    previous: Mapping[str, Any],
    now: float,
    moved: Sequence[Moved] = (),
) -> tuple[Status, tuple[Event, ...]]:
    """The status of one pool after a pass, and what is worth an Event.

    Args:
        pool: the pool.
        plans: one for each tier; empty when the workers could not be seen.
        broker: why the broker could not be read, None when it could.
        refused: why the broker took no writes, None when it did or nothing was written.
        workers: the same of the workers.
        conflict: the queue that another pool owns.
        previous: the status of the pass before, as stored.
        now: wall-clock seconds.
        moved: the waiting jobs that have changed their tier.
    """
    if pool.spec.mode is Mode.ADVISORY:
        plans = [
            replace(
                plan,
                decision=_advised(plan.decision),
                drain=Drain(plan.workers.desired),
                breaker=_untouched(plan.breaker),
            )
            for plan in plans
        ]
    tiers = tuple(_tier(plan) for plan in plans)
    found = [
        _broker(broker, refused),
        _capacity(pool, plans, workers, now),
        _spilling(plans, broker, workers),
        _limited(plans, broker, workers),
        _shared(conflict),
        _rivals(plans, workers),
        _grace(plans, broker, workers),
        _overdue(plans),
        _broken(plans, broker, workers),
        _rebalancing(moved, now),
        _outdated(pool),
        _paused(pool.spec.mode),
    ]
    conditions = [Condition(*fields, pool.generation) for fields in [_ready(found, plans, workers), *found]]
    status = Status(
        observed_generation=pool.generation,
        conditions=stamp(conditions, previous, now),
        tiers=tiers,
        waiting=total([tier.waiting for tier in tiers]) if tiers else None,
        in_flight=total([tier.in_flight for tier in tiers]) if tiers else None,
        replicas=summary(tiers),
    )
    events = [*flips(status, previous), *_scaled(pool, plans, previous, held=conflict is not None)]
    return status, tuple(dict.fromkeys(events))  # Ready is False for the reason of another condition


_Fields = tuple[ConditionType, str, str, str]


def _advised(decision: scaling.Decision) -> scaling.Decision:
    return replace(decision, message=decision.message.replace(", ordered", ", would order"))


def _untouched(breaker: Decision | None) -> Decision | None:
    return replace(breaker, message=breaker.message.replace(": out of", ": would be out of")) if breaker else None


def _tier(plan: TierPlan) -> TierStatus:
    queue, workers, decision = plan.queue, plan.workers, plan.decision
    return TierStatus(
        name=plan.tier.name,
        desired=decision.replicas,
        ready=workers.count(Phase.READY),
        starting=workers.starting,
        unschedulable=workers.count(Phase.UNSCHEDULABLE),
        draining=workers.count(Phase.STOPPING) + len(plan.drain.marks - workers.names(Phase.STOPPING)),
        waiting=queue.waiting if queue else None,
        in_flight=queue.in_flight if queue else None,
        spilled=queue.spilled if queue else None,
        reason=decision.reason,
        message="; ".join(filter(None, (decision.message, plan.drain.message, plan.breaker.message if plan.breaker else ""))),
    )


def _ready(found: Sequence[_Fields], plans: Sequence[TierPlan], workers: Unavailable | None) -> _Fields:
    kind = ConditionType.READY
    if workers:
        return kind, "Unknown", "WorkersUnreadable", workers.why
    wrong = {ConditionType.BROKER_REACHABLE: "False", ConditionType.QUEUE_SHARED: "True"}
    for what, status, reason, message in found:
        if wrong.get(what) == status:
            return kind, "False", reason, message
    for plan in plans:
        if plan.decision.replicas and not plan.workers.count(Phase.READY) and plan.workers.count(Phase.FAILING):
            return kind, "False", "WorkersFailing", _details(plan, Phase.FAILING)
    return kind, "True", "Working", "the broker answers and no tier is down"


def _broker(unavailable: Unavailable | None, refused: Unavailable | None) -> _Fields:
    kind = ConditionType.BROKER_REACHABLE
    if unavailable:
        return kind, "False", "BrokerUnreadable", f"{unavailable.why}; replicas stay as they are"
    if refused:
        return kind, "False", "BrokerRefusesWrites", f"{refused.why}; no worker is taken for lost meanwhile"
    return kind, "True", "Answering", "the queues are read every second"


def _capacity(pool: Pool, plans: Sequence[TierPlan], workers: Unavailable | None, now: float) -> _Fields:
    kind = ConditionType.CAPACITY_AVAILABLE
    if workers:
        return kind, "Unknown", "WorkersUnreadable", workers.why
    for phase, reason in ((Phase.UNSCHEDULABLE, "Unschedulable"), (Phase.FAILING, "WorkersFailing")):
        stuck = [_details(plan, phase) for plan in plans if plan.workers.count(phase)]
        if stuck:
            return kind, "False", reason, "; ".join(stuck)
    if silent := [plan.tier.name for plan in plans if _silent(plan, now)]:
        message = f"{', '.join(silent)}: workers are ready but none reports: the app lacks WorkerPool({pool.id!r}, app)"
        return kind, "Unknown", "WorkersSilent", f"{message}, so nothing is known of free slots and nothing falls back"
    return kind, "True", "AsOrdered", "every worker that was ordered runs or starts"


def _silent(plan: TierPlan, now: float) -> bool:
    """Whether workers have been ready for a while and the library in them, if there is one, has never reported."""
    since = min((r.ready_at for r in plan.workers.replicas if r.phase is Phase.READY and r.ready_at is not None), default=now)
    return plan.queue is not None and not plan.queue.workers and now - since > PRESENCE_LIFE_MS / 1000


def _details(plan: TierPlan, phase: Phase) -> str:
    stuck = [replica for replica in plan.workers.replicas if replica.phase is phase]
    return f"{plan.tier.name}: {len(stuck)} of {plan.decision.replicas} {phase.lower()}: {stuck[0].detail}"


def _unread(kind: ConditionType, broker: Unavailable | None, workers: Unavailable | None) -> _Fields | None:
    if workers:
        return kind, "Unknown", "WorkersUnreadable", workers.why
    return (kind, "Unknown", "BrokerUnreadable", broker.why) if broker else None


def _spilling(plans: Sequence[TierPlan], broker: Unavailable | None, workers: Unavailable | None) -> _Fields:
    kind = ConditionType.SPILLING
    if unread := _unread(kind, broker, workers):
        return unread
    spilled = [f"{plan.spilled} jobs that wanted {plan.tier.name} wait or run elsewhere" for plan in plans if plan.spilled]
    if spilled:
        return kind, "True", "JobsElsewhere", "; ".join(spilled)
    return kind, "False", "NoJobsElsewhere", "every job is on the tier that it wanted"


def _limited(plans: Sequence[TierPlan], broker: Unavailable | None, workers: Unavailable | None) -> _Fields:
    kind = ConditionType.SCALING_LIMITED
    if unread := _unread(kind, broker, workers):
        return unread
    limited = [f"{p.tier.name}: {p.decision.message}" for p in plans if p.decision.reason is scaling.Reason.AT_MAXIMUM]
    if limited:
        return kind, "True", "AtMaximum", "; ".join(limited)
    return kind, "False", "WithinBounds", "no tier needs more than its maximum"


def _shared(conflict: Conflict | None) -> _Fields:
    kind = ConditionType.QUEUE_SHARED
    if conflict:
        message = f"queue {conflict.queue} belongs to WorkerPool {conflict.owner}, which is older; this pool is held"
        return kind, "True", "QueueTaken", message
    return kind, "False", "QueuesOwned", "no other pool has these queues"


def _rivals(plans: Sequence[TierPlan], workers: Unavailable | None) -> _Fields:
    kind = ConditionType.AUTOSCALER_CONFLICT
    if workers:
        return kind, "Unknown", "WorkersUnreadable", workers.why
    if rivals := [f"{plan.tier.name}: {plan.workers.rival} scales it too" for plan in plans if plan.workers.rival]:
        message = f"{'; '.join(rivals)}; its count is left alone until that is deleted"
        return kind, "True", "AnotherAutoscaler", message
    return kind, "False", "NoOtherAutoscaler", "nobody else scales a tier"


ENOUGH_JOBS = 20
"""Of fewer jobs than this nothing is concluded."""


def _grace(plans: Sequence[TierPlan], broker: Unavailable | None, workers: Unavailable | None) -> _Fields:
    """Whether a tier's jobs usually outlast its grace period: longer than the mean by two standard deviations."""
    kind = ConditionType.GRACE_PERIOD_TOO_SHORT
    if unread := _unread(kind, broker, workers):
        return unread
    short = []
    for plan in plans:
        served, grace = plan.queue.served if plan.queue else NOTHING_SERVED, grace_seconds(plan.tier)
        if served.jobs < ENOUGH_JOBS:
            continue
        mean = served.seconds / served.jobs
        long = mean + 2 * max(0.0, served.squares / served.jobs - mean**2) ** 0.5
        if long > grace:
            short.append(f"{plan.tier.name}: jobs take {mean:.0f} s, up to {long:.0f} s, and its grace period is {grace} s")
    if short:
        message = "what a rollout or a node's drain cuts off begins anew; raise terminationGracePeriodSeconds in the template"
        return kind, "True", "JobsOutlastIt", f"{'; '.join(short)}: {message}"
    return kind, "False", "LongEnough", "no tier is known to have jobs that outlast its grace period"


def _overdue(plans: Sequence[TierPlan]) -> _Fields:
    kind = ConditionType.DRAIN_OVERDUE
    late = [f"{plan.tier.name}: {', '.join(plan.drain.overdue)}" for plan in plans if plan.drain.overdue]
    if late:
        message = f"still busy {OVERDUE_SECONDS:.0f} s after it was told to take nothing new; it is not killed"
        return kind, "True", "WorkersStayBusy", f"{'; '.join(late)}: {message}"
    return kind, "False", "InTime", "no worker that is to leave has been busy for too long"


def _broken(plans: Sequence[TierPlan], broker: Unavailable | None, workers: Unavailable | None) -> _Fields:
    kind = ConditionType.TIER_BROKEN
    if unread := _unread(kind, broker, workers):
        return unread
    decided = [(plan.tier.name, plan.breaker) for plan in plans if plan.breaker and plan.breaker.message]
    message = "; ".join(f"{name}: {breaker.message}" for name, breaker in decided)
    states = {breaker.breaker.state for _, breaker in decided}
    if BreakerState.OPEN in states:
        return kind, "True", "AttemptsFail", message
    if BreakerState.HALF_OPEN in states:
        return kind, "True", "OnTrial", message
    return kind, "False", "InRouting", message or "every accelerated tier takes part in routing"


def _rebalancing(moved: Sequence[Moved], now: float) -> _Fields:
    kind = ConditionType.REBALANCING
    if news := told(moved, now):
        return kind, "True", "JobsMoved", "; ".join(one.message for one in news)
    return kind, "False", "JobsStay", "no waiting job changes its tier"


def _outdated(pool: Pool) -> _Fields:
    kind = ConditionType.DEFINITION_OUTDATED
    if pool.unknown:
        message = (
            "the CustomResourceDefinition is older than the operator, so that nothing can be set there and the defaults hold"
        )
        return kind, "True", "FieldsUnknown", f"{', '.join(pool.unknown)}: {message}; apply crds/workerpool.yaml of its version"
    return kind, "False", "UpToDate", "the CustomResourceDefinition knows every field that has a default"


def _paused(mode: Mode) -> _Fields:
    return ConditionType.PAUSED, "False" if mode is Mode.ACTIVE else "True", mode.value, _ASIDE[mode]


def _scaled(pool: Pool, plans: Sequence[TierPlan], previous: Mapping[str, Any], *, held: bool) -> list[Event]:
    """One Event for each count that was decided anew; none until the last one was written, however often the need changes."""
    if held or pool.spec.mode is not Mode.ACTIVE:
        return []
    set_aside = {c.get("type") for c in previous.get("conditions", ()) if c.get("status") == "True"}
    decided = {tier.get("name"): tier.get("desired") for tier in previous.get("tiers", ())}
    if set_aside & {ConditionType.PAUSED, ConditionType.QUEUE_SHARED}:
        decided = {}  # what was only advised was never written
    events = []
    for plan in plans:
        name, before, after = plan.tier.name, plan.workers.desired, plan.decision.replicas
        if after != before == decided.get(name, before):
            events.append(Event(False, plan.decision.reason, f"{name}: {before} → {after}: {plan.decision.message}"))
    return events
