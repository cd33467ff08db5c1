"""What a pass means to people: the status of a pool with its conditions, and the Events that say what has changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from workerpool_operator import scaling
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

ENOUGH_JOBS = 20
"""A tier's job lengths are compared with its grace period only once it has ended so many jobs."""

_ADVICE = "advice only: "
"""What begins the sentence of a decision that ``mode: Advisory`` keeps the operator from acting on."""

_MODES = {
    Mode.ACTIVE: "the operator acts",
    Mode.ADVISORY: "mode: Advisory: decides and reports, touches nothing",
    Mode.PAUSED: "mode: Paused: touches nothing",
}


@dataclass(frozen=True, slots=True)
class Findings:
    """What one pass found out about a pool, and what it decided.

    Attributes:
        pool: the pool.
        plans: one for each tier; empty when the workers could not be observed.
        now: wall-clock seconds.
        broker: why the broker could not be read; None when it could.
        refused: why the broker took no writes; None when it did, or when nothing was written.
        workers: why the workers could not be observed; None when they could.
        conflict: the queue that another pool owns.
        moved: the waiting jobs that have lately changed their tier.
        failure: what went wrong inside the operator; empty when nothing did.
    """

    pool: Pool
    plans: Sequence[TierPlan]
    now: float
    broker: Unavailable | None = None
    refused: Unavailable | None = None
    workers: Unavailable | None = None
    conflict: Conflict | None = None
    moved: Sequence[Moved] = ()
    failure: str = ""


def assess(found: Findings, previous: Mapping[str, Any]) -> tuple[Status, tuple[Event, ...]]:
    """The status of one pool after a pass, and what is worth an Event.

    Args:
        found: what the pass found out and decided.
        previous: the status after the pass before, as stored.
    """
    pool = found.pool
    if pool.spec.mode is Mode.ADVISORY:
        found = replace(found, plans=[_as_advice(plan) for plan in found.plans])
    verdicts = {kind: judge(found) for kind, judge in _JUDGES.items()}
    verdicts = {ConditionType.READY: _ready(found, verdicts), **verdicts}
    conditions = [Condition(kind, *verdict, pool.generation) for kind, verdict in verdicts.items()]
    tiers = tuple(_tier(plan) for plan in found.plans)
    status = Status(
        observed_generation=pool.generation,
        conditions=stamp(conditions, previous, found.now),
        tiers=tiers,
        waiting=total([tier.waiting for tier in tiers]) if tiers else None,
        in_flight=total([tier.in_flight for tier in tiers]) if tiers else None,
        replicas=summary(tiers),
    )
    events = [*flips(status, previous), *_scaled(found, previous)]
    return status, tuple(dict.fromkeys(events))  # once: Ready repeats the reason and message of the condition that it follows


def _as_advice(plan: TierPlan) -> TierPlan:
    """The plan as ``mode: Advisory`` tells it: nothing is ordered, marked or taken out of routing."""
    decision = replace(plan.decision, message=_ADVICE + plan.decision.message)
    breaker = plan.breaker
    if breaker and breaker.message:
        breaker = replace(breaker, message=_ADVICE + breaker.message)
    return replace(plan, decision=decision, drain=Drain(plan.workers.desired), breaker=breaker)


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


_Verdict = tuple[str, str, str]
"""Status, reason and message of a condition."""


def _ready(found: Findings, others: Mapping[ConditionType, _Verdict]) -> _Verdict:
    if unseen := _unseen(found):
        return unseen
    for kind, fatal in ((ConditionType.BROKER_REACHABLE, "False"), (ConditionType.QUEUE_SHARED, "True")):
        status, reason, message = others[kind]
        if status == fatal:
            return "False", reason, message
    for plan in found.plans:
        if plan.decision.replicas and not plan.workers.count(Phase.READY) and plan.workers.count(Phase.FAILING):
            return "False", "WorkersFailing", _details(plan, Phase.FAILING)
    if not any(plan.workers.count(Phase.READY) for plan in found.plans) and (out := _out(found)):
        reason, message = out
        return "False", reason, f"no tier has a worker: {message}"
    return "True", "Working", "the broker answers and no tier is down"


def _broker(found: Findings) -> _Verdict:
    if found.broker:
        return "False", "BrokerUnreadable", f"{found.broker.why}; replicas stay as they are"
    if found.refused:
        return "False", "BrokerRefusesWrites", f"{found.refused.why}; no worker is taken for lost meanwhile"
    return "True", "Answering", "the queues are read every second"


_OUT = (
    (Phase.UNSCHEDULABLE, "Unschedulable"),
    (Phase.FAILING, "WorkersFailing"),
    (Phase.LATE, "WorkersLate"),
    (Phase.LOST, "WorkersLost"),
    (Phase.EJECTED, "WorkersEjected"),
)
"""Workers that were ordered and take no jobs, and the reason that is told."""


def _capacity(found: Findings) -> _Verdict:
    if unseen := _unseen(found):
        return unseen
    if out := _out(found):
        return "False", *out
    if silent := [plan.tier.name for plan in found.plans if _silent(plan, found.now)]:
        message = f"{', '.join(silent)}: workers are ready but none reports: the app lacks WorkerPool({found.pool.id!r}, app)"
        return "Unknown", "WorkersSilent", f"{message}, so nothing is known of free slots and nothing falls back"
    return "True", "AsOrdered", "every worker that was ordered runs or starts"


def _out(found: Findings) -> tuple[str, str] | None:
    """Reason and message, if workers were ordered and take no jobs."""
    for phase, reason in _OUT:
        if out := [_details(plan, phase) for plan in found.plans if plan.workers.count(phase)]:
            return reason, "; ".join(out)
    return None


def _silent(plan: TierPlan, now: float) -> bool:
    """Whether workers have been ready for a while and none ever reported: then the library is not in their app."""
    since = min((r.ready_at for r in plan.workers.replicas if r.phase is Phase.READY and r.ready_at is not None), default=now)
    return plan.queue is not None and not plan.queue.workers and not plan.reported and now - since > PRESENCE_LIFE_MS / 1000


def _details(plan: TierPlan, phase: Phase) -> str:
    staying = [replica for replica in plan.workers.replicas if replica.phase is not Phase.STOPPING]
    stuck = [replica for replica in staying if replica.phase is phase]
    return f"{plan.tier.name}: {len(stuck)} of {len(staying)} {phase.lower()}: {stuck[0].detail}"


def _unseen(found: Findings) -> _Verdict | None:
    """The verdict where the workers could not be read, or where the operator itself failed."""
    if found.failure:
        message = "the operator failed on this pool; its log says where, and every pass tries again"
        return "Unknown", "InternalError", f"{found.failure}: {message}"
    return ("Unknown", "WorkersUnreadable", found.workers.why) if found.workers else None


def _unread(found: Findings) -> _Verdict | None:
    """The verdict where the workers or the queues could not be read."""
    if unseen := _unseen(found):
        return unseen
    return ("Unknown", "BrokerUnreadable", found.broker.why) if found.broker else None


def _spilling(found: Findings) -> _Verdict:
    if unread := _unread(found):
        return unread
    spilled = [
        f"jobs that wanted {plan.tier.name} and wait or run elsewhere: {plan.spilled}" for plan in found.plans if plan.spilled
    ]
    if spilled:
        return "True", "JobsElsewhere", "; ".join(spilled)
    return "False", "NoJobsElsewhere", "every job is on the tier that it wanted"


def _limited(found: Findings) -> _Verdict:
    if unread := _unread(found):
        return unread
    limited = [f"{p.tier.name}: {p.decision.message}" for p in found.plans if p.decision.reason is scaling.Reason.AT_MAXIMUM]
    if limited:
        return "True", "AtMaximum", "; ".join(limited)
    return "False", "WithinBounds", "no tier needs more than its maximum"


def _shared(found: Findings) -> _Verdict:
    if conflict := found.conflict:
        message = f"queue {conflict.queue} belongs to WorkerPool {conflict.owner}, which is older"
        return (
            "True",
            "QueueTaken",
            f"{message}; nothing is done for this pool until one of them names another queue or is deleted",
        )
    return "False", "QueuesOwned", "no other pool has these queues"


def _rivals(found: Findings) -> _Verdict:
    if unseen := _unseen(found):
        return unseen
    if rivals := [f"{plan.tier.name}: {plan.workers.rival} scales it too" for plan in found.plans if plan.workers.rival]:
        message = f"{'; '.join(rivals)}; its count is left alone until that is deleted"
        return "True", "AnotherAutoscaler", message
    if edited := [
        f"{plan.tier.name}: {plan.workers.editor} changes its Deployment" for plan in found.plans if plan.workers.editor
    ]:
        message = f"{'; '.join(edited)} back after each repair; it is repaired less and less often until that leaves it alone"
        return "True", "AnotherEditor", message
    return "False", "NoOtherAutoscaler", "no other autoscaler scales a tier"


def _grace(found: Findings) -> _Verdict:
    """Whether a tier's jobs usually outlast its grace period: longer than the mean by two standard deviations."""
    if unread := _unread(found):
        return unread
    short = []
    for plan in found.plans:
        served, grace = plan.queue.served if plan.queue else NOTHING_SERVED, grace_seconds(plan.tier)
        if served.jobs < ENOUGH_JOBS:
            continue
        mean = served.seconds / served.jobs
        long = mean + 2 * max(0.0, served.squares / served.jobs - mean**2) ** 0.5
        if long > grace:
            short.append(f"{plan.tier.name}: jobs take {mean:.0f} s, up to {long:.0f} s, and its grace period is {grace} s")
    if short:
        message = "what a rollout or a node's drain cuts off begins anew; raise terminationGracePeriodSeconds in the template"
        return "True", "JobsOutlastIt", f"{'; '.join(short)}: {message}"
    return "False", "LongEnough", "no tier is known to have jobs that outlast its grace period"


def _overdue(found: Findings) -> _Verdict:
    late = [f"{plan.tier.name}: {', '.join(plan.drain.overdue)}" for plan in found.plans if plan.drain.overdue]
    if late:
        message = f"still busy {OVERDUE_SECONDS:.0f} s after it was told to take nothing new"
        return "True", "WorkersStayBusy", f"{'; '.join(late)}: {message}; it is not killed, and leaves when its jobs end"
    return "False", "InTime", "no worker that is to leave has been busy for too long"


def _broken(found: Findings) -> _Verdict:
    if unread := _unread(found):
        return unread
    decided = [(plan.tier.name, plan.breaker) for plan in found.plans if plan.breaker and plan.breaker.message]
    message = "; ".join(f"{name}: {breaker.message}" for name, breaker in decided)
    states = {breaker.breaker.state for _, breaker in decided}
    if BreakerState.OPEN in states:
        return "True", "AttemptsFail", message
    if BreakerState.HALF_OPEN in states:
        return "True", "OnTrial", message
    return "False", "InRouting", message or "every accelerated tier takes part in routing"


def _rebalancing(found: Findings) -> _Verdict:
    if news := told(found.moved, found.now):
        return "True", "JobsMoved", "; ".join(one.message for one in news)
    return "False", "JobsStay", "no waiting job changes its tier"


def _outdated(found: Findings) -> _Verdict:
    if unknown := found.pool.unknown:
        message = (
            "the CustomResourceDefinition is older than the operator, so that nothing can be set there and the defaults hold"
        )
        return "True", "FieldsUnknown", f"{', '.join(unknown)}: {message}; apply crds/workerpool.yaml of its version"
    return "False", "UpToDate", "the CustomResourceDefinition knows every field that has a default"


def _paused(found: Findings) -> _Verdict:
    mode = found.pool.spec.mode
    return "False" if mode is Mode.ACTIVE else "True", mode.value, _MODES[mode]


_JUDGES: Mapping[ConditionType, Callable[[Findings], _Verdict]] = {
    ConditionType.BROKER_REACHABLE: _broker,
    ConditionType.CAPACITY_AVAILABLE: _capacity,
    ConditionType.SPILLING: _spilling,
    ConditionType.SCALING_LIMITED: _limited,
    ConditionType.QUEUE_SHARED: _shared,
    ConditionType.AUTOSCALER_CONFLICT: _rivals,
    ConditionType.GRACE_PERIOD_TOO_SHORT: _grace,
    ConditionType.DRAIN_OVERDUE: _overdue,
    ConditionType.TIER_BROKEN: _broken,
    ConditionType.REBALANCING: _rebalancing,
    ConditionType.DEFINITION_OUTDATED: _outdated,
    ConditionType.PAUSED: _paused,
}
"""In the order of the status, where Ready, which follows from the others, comes first."""


def _scaled(found: Findings, previous: Mapping[str, Any]) -> list[Event]:
    """One Event for each new replica count; no further one for a tier until that count has been written."""
    if found.conflict or found.pool.spec.mode is not Mode.ACTIVE:
        return []
    set_aside = {c.get("type") for c in previous.get("conditions", ()) if c.get("status") == "True"}
    decided = {tier.get("name"): tier.get("desired") for tier in previous.get("tiers", ())}
    if set_aside & {ConditionType.PAUSED, ConditionType.QUEUE_SHARED}:
        decided = {}  # what was decided then was never written
    events = []
    for plan in found.plans:
        name, before, after = plan.tier.name, plan.workers.desired, plan.decision.replicas
        if after != before == decided.get(name, before):
            events.append(Event(False, plan.decision.reason, f"{name}: {before} → {after}: {plan.decision.message}"))
    return events
