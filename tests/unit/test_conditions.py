"""What people are told of a pass: conditions that say only what was seen, and Events for what was done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from workerpool_operator import planning
from workerpool_operator.conditions import Findings, assess
from workerpool_operator.drain import Drain
from workerpool_operator.model import Mode, parse_spec
from workerpool_operator.observation import (
    NOTHING_SERVED,
    Attempts,
    Breaker,
    BreakerState,
    BrokerReading,
    Checkpoint,
    Phase,
    QueueReading,
    Replica,
    Served,
    TierReplicas,
    Unavailable,
)
from workerpool_operator.planning import TierPlan
from workerpool_operator.ports import Pool
from workerpool_operator.rebalancing import TOLD_SECONDS, Moved, Transfer
from workerpool_operator.sharing import Conflict
from workerpool_operator.status import Condition, ConditionType, Event, Status
from workerpool_routing.wire import Milliseconds, Presence

pytestmark = pytest.mark.unit

NOON = 1_767_268_800.0
DOWN = Unavailable("Redis at one:6379 cannot be reached")
BLIND = Unavailable("the API server does not answer")
TAKEN = Conflict("celery", "ml/older")

TEMPLATE = {"spec": {"containers": [{"name": "worker"}]}}
SPEC = parse_spec(
    {
        "app": "media.tasks",
        "broker": {"url": "redis://one"},
        "tiers": [
            {"name": "gpu", "queue": "gpu-tasks", "accelerator": {"resource": "nvidia.com/gpu"}, "template": TEMPLATE},
            {"name": "cpu", "queue": "celery", "replicas": {"min": 1, "max": 4}, "template": TEMPLATE},
        ],
    }
)
assert not isinstance(SPEC, list)
POOL = Pool("ml", "media", "uid", 7, 0.0, SPEC)


def in_mode(mode: Mode) -> Pool:
    return replace(POOL, spec=POOL.spec.model_copy(update={"mode": mode}))


def workers(desired: int, *phases: Phase, detail: str = "") -> TierReplicas:
    return TierReplicas(desired, tuple(Replica(f"w{n}", phase, 0.0, detail=detail) for n, phase in enumerate(phases)))


IDLE = {"gpu": workers(0), "cpu": workers(1, Phase.READY)}


def plans(
    seen: Mapping[str, TierReplicas], broker: Unavailable | None = None, *, pool: Pool = POOL, **queues: QueueReading
) -> list[TierPlan]:
    tiers = {"gpu": QueueReading(0, 0, 0), "cpu": QueueReading(0, 0, 0), **queues}
    return planning.plan(pool, broker or BrokerReading(tiers, "r1", Milliseconds(0)), seen, {}, 0.0)


def told(
    planned: list[TierPlan],
    broker: Unavailable | None = None,
    refused: Unavailable | None = None,
    blind: Unavailable | None = None,
    conflict: Conflict | None = None,
    pool: Pool = POOL,
    previous: Mapping[str, Any] | None = None,
    moved: Sequence[Moved] = (),
    failure: str = "",
) -> tuple[Status, tuple[Event, ...]]:
    found = Findings(pool, planned, NOON, broker, refused, blind, conflict, moved, failure)
    return assess(found, previous or {})


def conditions(outcome: tuple[Status, tuple[Event, ...]]) -> dict[str, Condition]:
    return {condition.type: condition for condition in outcome[0].conditions}


def values(outcome: tuple[Status, tuple[Event, ...]]) -> dict[str, str]:
    return {kind: condition.status for kind, condition in conditions(outcome).items()}


HEALTHY = {
    "Ready": "True",
    "BrokerReachable": "True",
    "CapacityAvailable": "True",
    "Spilling": "False",
    "ScalingLimited": "False",
    "QueueShared": "False",
    "AutoscalerConflict": "False",
    "GracePeriodTooShort": "False",
    "DrainOverdue": "False",
    "TierBroken": "False",
    "Rebalancing": "False",
    "DefinitionOutdated": "False",
    "Paused": "False",
}


def test_a_defect_of_the_operator_leaves_nothing_in_the_status_that_was_not_seen() -> None:
    outcome = told([], failure="TypeError('not a map')", previous=told(plans(IDLE))[0].dump())
    assert values(outcome) == HEALTHY | dict.fromkeys(
        ("Ready", "CapacityAvailable", "Spilling", "ScalingLimited", "AutoscalerConflict", "GracePeriodTooShort", "TierBroken"),
        "Unknown",
    )
    assert conditions(outcome)["Ready"].reason == "InternalError"
    [event] = outcome[1]
    assert event.message.startswith("TypeError('not a map'): the operator failed on this pool")


def test_a_pool_at_rest_is_healthy_and_silent() -> None:
    outcome = told(plans(IDLE))
    assert values(outcome) == HEALTHY
    assert [condition.reason for condition in outcome[0].conditions] == [
        "Working", "Answering", "AsOrdered", "NoJobsElsewhere", "WithinBounds", "QueuesOwned",
        "NoOtherAutoscaler", "LongEnough", "InTime", "InRouting", "JobsStay", "UpToDate", "Active",
    ]  # fmt: skip
    assert outcome[1] == ()
    assert {condition.observed_generation for condition in outcome[0].conditions} == {7}
    assert outcome[0].observed_generation == 7


def test_every_condition_has_a_reason_and_a_message_in_every_state() -> None:
    outcomes = [
        told(plans(IDLE)),
        told(plans(IDLE, DOWN), broker=DOWN),
        told([], blind=BLIND),
        told(plans(IDLE), conflict=TAKEN),
        told(plans(IDLE), pool=in_mode(Mode.PAUSED)),
    ]
    for outcome in outcomes:
        for condition in outcome[0].conditions:
            assert condition.reason.isalpha(), condition
            assert condition.message, condition


def test_a_broker_that_cannot_be_read_is_named_and_nothing_is_claimed_about_its_queues() -> None:
    outcome = told(plans(IDLE, DOWN), broker=DOWN)
    assert values(outcome) == HEALTHY | {
        "Ready": "False",
        "BrokerReachable": "False",
        "Spilling": "Unknown",
        "ScalingLimited": "Unknown",
        "GracePeriodTooShort": "Unknown",
        "TierBroken": "Unknown",
    }
    for kind in ("Ready", "BrokerReachable", "Spilling", "ScalingLimited"):
        assert conditions(outcome)[kind].reason == "BrokerUnreadable"
        assert DOWN.why in conditions(outcome)[kind].message
    assert (outcome[0].waiting, outcome[0].in_flight) == (None, None)
    assert {(tier.waiting, tier.in_flight, tier.spilled) for tier in outcome[0].tiers} == {(None, None, None)}


def test_a_broker_that_takes_no_writes_is_told_and_its_queues_are_still_shown() -> None:
    outcome = told(plans(IDLE), refused=Unavailable("Redis at one:6379 refuses writes: out of memory"))
    assert values(outcome) == HEALTHY | {"Ready": "False", "BrokerReachable": "False"}
    reachable = conditions(outcome)["BrokerReachable"]
    assert reachable.reason == "BrokerRefusesWrites"
    assert reachable.message == "Redis at one:6379 refuses writes: out of memory; no worker is taken for lost meanwhile"
    assert outcome[0].waiting == 0


def test_workers_that_cannot_be_seen_make_what_depends_on_them_unknown() -> None:
    outcome = told([], blind=BLIND)
    unknown = (
        "Ready", "CapacityAvailable", "Spilling", "ScalingLimited", "AutoscalerConflict", "GracePeriodTooShort", "TierBroken",
    )  # fmt: skip
    assert values(outcome) == HEALTHY | dict.fromkeys(unknown, "Unknown")
    assert {(conditions(outcome)[kind].reason, conditions(outcome)[kind].message) for kind in unknown} == {
        ("WorkersUnreadable", BLIND.why)
    }
    assert (outcome[0].tiers, outcome[0].waiting, outcome[0].in_flight, outcome[0].replicas) == ((), None, None, "")


def test_two_outages_at_once_are_both_told() -> None:
    found = values(told([], broker=DOWN, blind=BLIND))
    assert (found["Ready"], found["BrokerReachable"], found["CapacityAvailable"]) == ("Unknown", "False", "Unknown")


@pytest.mark.parametrize(
    ("phase", "reason", "words"),
    [
        (Phase.UNSCHEDULABLE, "Unschedulable", "2 of 3 unschedulable"),
        (Phase.FAILING, "WorkersFailing", "2 of 3 failing"),
        (Phase.LATE, "WorkersLate", "2 of 3 late"),
        (Phase.LOST, "WorkersLost", "2 of 3 lost"),
        (Phase.EJECTED, "WorkersEjected", "2 of 3 ejected"),
    ],
)
def test_workers_that_do_not_come_up_are_counted_and_their_trouble_is_told(phase: Phase, reason: str, words: str) -> None:
    seen = IDLE | {"gpu": workers(3, Phase.READY, phase, phase, Phase.STOPPING, detail="no node has a free GPU")}
    outcome = told(plans(seen, gpu=QueueReading(3, 0, 0)))
    lack = conditions(outcome)["CapacityAvailable"]
    assert (lack.status, lack.reason) == ("False", reason)
    assert lack.message == f"gpu: {words}: no node has a free GPU"
    assert values(outcome)["Ready"] == "True", "the other tier works"


def test_a_pool_without_any_worker_that_works_is_not_ready() -> None:
    nowhere = workers(2, Phase.UNSCHEDULABLE, detail="no node has a free GPU")
    for cpu in (workers(0), workers(1, Phase.STARTING)):
        outcome = told(plans({"gpu": nowhere, "cpu": cpu}, gpu=QueueReading(3, 0, 0)))
        assert values(outcome)["Ready"] == "False"
        assert conditions(outcome)["Ready"].message.startswith("no tier has a worker: gpu: 1 of ")


def test_every_tier_that_lacks_workers_is_named() -> None:
    seen = {"gpu": workers(1, Phase.UNSCHEDULABLE, detail="full"), "cpu": workers(1, Phase.UNSCHEDULABLE, detail="tainted")}
    message = conditions(told(plans(seen)))["CapacityAvailable"].message
    assert message == "gpu: 1 of 1 unschedulable: full; cpu: 1 of 1 unschedulable: tainted"


@pytest.mark.parametrize(
    ("cpu", "status"),
    [
        pytest.param(workers(1, Phase.FAILING, detail="exit code 1"), "False", id="all of them fail"),
        pytest.param(workers(2, Phase.FAILING, Phase.READY), "True", id="one works"),
        pytest.param(workers(1, Phase.STARTING), "True", id="it is starting"),
    ],
)
def test_a_tier_whose_workers_all_fail_makes_the_pool_not_ready(cpu: TierReplicas, status: str) -> None:
    ready = conditions(told(plans(IDLE | {"cpu": cpu})))["Ready"]
    assert ready.status == status
    assert (ready.reason == "WorkersFailing" and "exit code 1" in ready.message) == (status == "False")


def test_the_remains_of_a_tier_that_should_have_no_workers_do_not_trouble_the_pool() -> None:
    seen = IDLE | {"gpu": workers(0, Phase.FAILING)}
    assert values(told(plans(seen)))["Ready"] == "True"


def test_jobs_elsewhere_are_counted_for_the_tier_that_they_wanted() -> None:
    outcome = told(plans(IDLE, gpu=QueueReading(0, 0, 2), cpu=QueueReading(5, 0, 0)))
    spilling = conditions(outcome)["Spilling"]
    assert (spilling.status, spilling.reason, spilling.message) == (
        "True",
        "JobsElsewhere",
        "jobs that wanted gpu and wait or run elsewhere: 2",
    )


def test_a_tier_at_its_maximum_is_named_with_its_numbers() -> None:
    limited = conditions(told(plans(IDLE, cpu=QueueReading(9, 0, 0))))["ScalingLimited"]
    assert (limited.status, limited.reason) == ("True", "AtMaximum")
    assert limited.message == (
        "cpu: 9 waiting + 0 in flight need 9 workers to start within 60 s (a job takes 30 s, a worker's start 240 s); wanted: 4; "
        "replicas.max limits it"
    )


def test_a_tier_that_only_keeps_its_maximum_for_a_while_is_not_limited() -> None:
    assert values(told(plans(IDLE | {"cpu": workers(4, Phase.READY)})))["ScalingLimited"] == "False"


def test_a_shared_queue_is_named_with_its_owner_and_the_pool_is_not_ready() -> None:
    outcome = told(plans(IDLE), conflict=TAKEN)
    assert values(outcome) == HEALTHY | {"QueueShared": "True", "Ready": "False"}
    for kind in ("QueueShared", "Ready"):
        assert conditions(outcome)[kind].reason == "QueueTaken"
        assert "celery" in conditions(outcome)[kind].message
        assert "ml/older" in conditions(outcome)[kind].message


@pytest.mark.parametrize(
    ("mode", "status", "reason"), [("Active", "False", "Active"), ("Advisory", "True", "Advisory"), ("Paused", "True", "Paused")]
)
def test_a_mode_that_touches_nothing_is_a_condition(mode: str, status: str, reason: str) -> None:
    paused = conditions(told(plans(IDLE), pool=in_mode(Mode(mode))))["Paused"]
    assert (paused.status, paused.reason) == (status, reason)


def test_a_change_of_replicas_is_an_event_with_its_reason_and_numbers() -> None:
    _, events = told(plans(IDLE, gpu=QueueReading(3, 0, 0)))
    message = (
        "gpu: 0 → 3: 3 waiting + 0 in flight need 3 workers to start within 60 s (a job takes 30 s, a worker's start 240 s); "
        "wanted: 3"
    )
    assert events == (Event(False, "BacklogExceedsCapacity", message),)


def test_scaling_that_is_refused_is_one_event_however_the_backlog_grows() -> None:
    seen, previous, told_so_far = IDLE, dict[str, Any](), list[Event]()
    for waiting in range(1, 8):
        status, events = told(plans(seen, gpu=QueueReading(waiting, 0, 0)), previous=previous)
        previous = status.dump()
        told_so_far += events
    assert [event.message.partition(":")[2] for event in told_so_far] == [
        " 0 → 1: 1 waiting + 0 in flight need 1 worker to start within 60 s (a job takes 30 s, a worker's start 240 s); wanted: 1"
    ]
    # It is written at last, and the next count is news again.
    seen = IDLE | {"gpu": workers(previous["tiers"][0]["desired"])}
    _, events = told(plans(seen, gpu=QueueReading(9, 0, 0)), previous=previous)
    assert [event.message.partition(": ")[0] for event in events] == ["gpu"]


@pytest.mark.parametrize(
    ("pool", "conflict"),
    [pytest.param(in_mode(Mode.ADVISORY), None, id="Advisory"), pytest.param(POOL, TAKEN, id="held")],
)
def test_a_pool_that_is_not_touched_has_no_events_of_scaling(pool: Pool, conflict: Conflict | None) -> None:
    outcome = told(plans(IDLE, pool=pool, gpu=QueueReading(3, 0, 0)), pool=pool, conflict=conflict)
    assert [event for event in outcome[1] if "→" in event.message] == []
    assert outcome[0].tiers[0].desired == 3, "what it would do is still shown"


@pytest.mark.parametrize(("pool", "conflict"), [(in_mode(Mode.ADVISORY), None), (POOL, TAKEN)], ids=["Advisory", "held"])
def test_what_was_only_advised_is_an_event_when_it_is_done(pool: Pool, conflict: Conflict | None) -> None:
    advised, _ = told(plans(IDLE, pool=pool, gpu=QueueReading(3, 0, 0)), pool=pool, conflict=conflict)
    _, events = told(plans(IDLE, gpu=QueueReading(3, 0, 0)), previous=advised.dump())
    assert [event.message.partition(": 3 ")[0] for event in events if "→" in event.message] == ["gpu: 0 → 3"]


def test_an_advisory_pool_says_what_it_would_order() -> None:
    pool = in_mode(Mode.ADVISORY)
    status, _ = told(plans(IDLE, pool=pool, gpu=QueueReading(3, 0, 0), cpu=QueueReading(9, 0, 0)), pool=pool)
    assert [(tier.desired, tier.reason) for tier in status.tiers] == [(3, "BacklogExceedsCapacity"), (4, "AtMaximum")]
    assert status.tiers[0].message == (
        "advice only: 3 waiting + 0 in flight need 3 workers to start within 60 s (a job takes 30 s, a worker's start 240 s); "
        "wanted: 3"
    )
    limited = next(condition for condition in status.conditions if condition.type == "ScalingLimited")
    assert limited.message == (
        "cpu: advice only: 9 waiting + 0 in flight need 9 workers to start within 60 s "
        "(a job takes 30 s, a worker's start 240 s); wanted: 4; replicas.max limits it"
    )


def test_an_advisory_pool_drains_nobody_and_says_so() -> None:
    pool = in_mode(Mode.ADVISORY)
    marked = Drain(
        2, marks=frozenset({"w0"}), overdue=("w0",), message="workers still to leave: 1 (once their jobs are finished)"
    )
    gpu, cpu = plans({**IDLE, "gpu": workers(2, Phase.READY, Phase.READY)}, pool=pool)
    active, _ = told([replace(gpu, drain=marked), cpu])
    advised, _ = told([replace(gpu, drain=marked), cpu], pool=pool)
    assert [(status.tiers[0].draining, values((status, ()))["DrainOverdue"]) for status in (active, advised)] == [
        (1, "True"),
        (0, "False"),
    ]
    assert active.tiers[0].message.endswith("; workers still to leave: 1 (once their jobs are finished)")
    assert "leave" not in advised.tiers[0].message


def test_a_worker_that_was_marked_and_stops_by_now_is_counted_once_as_leaving() -> None:
    gpu, cpu = plans({**IDLE, "gpu": workers(1, Phase.STOPPING, Phase.READY)})
    status, _ = told([replace(gpu, drain=Drain(1, marks=frozenset({"w0", "w1"}))), cpu])
    assert status.tiers[0].draining == 2


def test_jobs_that_moved_are_told_for_a_minute_with_the_sentence_of_their_transfer() -> None:
    moved = [Moved(Transfer("gpu", "cpu", 4, "from gpu to cpu: no slot"), 7, NOON - TOLD_SECONDS + 1)]
    first, events = told(plans(IDLE), moved=moved)
    found = conditions((first, events))["Rebalancing"]
    assert (found.status, found.reason) == ("True", "JobsMoved")
    assert found.message == "7 of the waiting jobs moved from gpu to cpu: no slot"
    _, events = told(plans(IDLE), previous=told(plans(IDLE))[0].dump(), moved=moved)
    assert [(event.warning, event.reason) for event in events] == [(False, "JobsMoved")]
    later = told(plans(IDLE), moved=[replace(moved[0], at=NOON - TOLD_SECONDS)])
    assert values(later)["Rebalancing"] == "False"


def test_a_paused_pool_shows_what_runs_and_no_decision() -> None:
    pool = in_mode(Mode.PAUSED)
    outcome = told(plans(IDLE, pool=pool, gpu=QueueReading(3, 0, 0), cpu=QueueReading(9, 0, 0)), pool=pool)
    assert [(tier.desired, tier.waiting, tier.reason) for tier in outcome[0].tiers] == [(0, 3, "Paused"), (1, 9, "Paused")]
    assert {tier.message for tier in outcome[0].tiers} == {"mode: Paused: nothing is decided, the count is what was seen"}
    assert values(outcome)["ScalingLimited"] == "False"
    assert outcome[1] == ()


def test_a_condition_that_stays_as_it_is_gives_one_event_and_keeps_its_time() -> None:
    first, events = told(plans(IDLE, DOWN), broker=DOWN)
    assert [(event.warning, event.reason) for event in events] == [(True, "BrokerUnreadable")], "Ready says nothing new"
    again, events = assess(Findings(POOL, plans(IDLE, DOWN), NOON + 60, broker=DOWN), first.dump())
    assert events == ()
    assert again.conditions == first.conditions
    back, events = assess(Findings(POOL, plans(IDLE), NOON + 120), again.dump())
    assert [event.warning for event in events] == [False] * 4
    assert {c.last_transition_time for c in back.conditions if c.type in ("Ready", "BrokerReachable")} == {"2026-01-01T12:02:00Z"}


def test_the_status_of_a_tier_shows_what_was_seen_and_what_was_decided() -> None:
    gpu = workers(3, Phase.READY, Phase.UNSCHEDULABLE, Phase.STOPPING, Phase.STOPPING)
    status, _ = told(plans({"gpu": gpu, "cpu": workers(1, Phase.READY)}, gpu=QueueReading(4, 1, 2), cpu=QueueReading(1, 3, 0)))
    tier = status.tiers[0]
    assert (tier.name, tier.desired, tier.ready, tier.starting, tier.unschedulable, tier.draining) == ("gpu", 5, 1, 1, 1, 2)
    assert (tier.waiting, tier.in_flight, tier.spilled) == (4, 1, 2)
    assert tier.reason == "BacklogExceedsCapacity"
    assert tier.message == (
        "4 waiting + 1 in flight + 2 spilled (2 of these served elsewhere) need 5 workers to start within 60 s "
        "(a job takes 30 s, a worker's start 240 s); wanted: 5"
    )
    assert (status.waiting, status.in_flight, status.replicas) == (5, 4, "gpu 1/5, cpu 1/4")


@pytest.mark.parametrize(
    ("ready_for", "reporting", "expected"),
    [(9, False, "WorkersSilent"), (7, False, "AsOrdered"), (9, True, "AsOrdered")],
)
def test_workers_that_are_ready_and_never_report_are_told_with_the_line_that_they_lack(
    ready_for: float, reporting: bool, expected: str
) -> None:
    ready = TierReplicas(1, (Replica("w0", Phase.READY, 0.0, ready_at=NOON - ready_for),))
    report = Presence("w0.1", "w0", "cpu", "celery", 1, 0, Milliseconds(0), Milliseconds(0))
    queue = QueueReading(0, 0, 0, workers=(report,) if reporting else ())
    capacity = conditions(told(plans({"gpu": workers(0), "cpu": ready}, cpu=queue)))[ConditionType.CAPACITY_AVAILABLE]
    assert capacity.reason == expected
    assert ("WorkerPool('ml/media', app)" in capacity.message) == (expected == "WorkersSilent")


def test_another_autoscaler_is_named_and_its_count_is_what_the_status_shows() -> None:
    rival = "HorizontalPodAutoscaler keda-hpa-media of ScaledObject media"
    outcome = told(plans({**IDLE, "cpu": replace(workers(3, Phase.READY), rival=rival)}))
    condition = conditions(outcome)["AutoscalerConflict"]
    assert (condition.status, condition.reason) == ("True", "AnotherAutoscaler")
    assert condition.message.startswith(f"cpu: {rival} scales it too; its count is left alone")
    assert (outcome[0].tiers[1].desired, outcome[0].tiers[1].reason) == (3, "AnotherAutoscaler")
    assert [event.reason for event in outcome[1] if event.warning] == ["AnotherAutoscaler"]


def test_whoever_changes_a_deployment_back_after_each_repair_is_named() -> None:
    outcome = told(plans({**IDLE, "cpu": replace(workers(3, Phase.READY), editor="image-updater")}))
    condition = conditions(outcome)["AutoscalerConflict"]
    assert (condition.status, condition.reason) == ("True", "AnotherEditor")
    assert condition.message.startswith("cpu: image-updater changes its Deployment back after each repair")
    assert [event.reason for event in outcome[1] if event.warning] == ["AnotherEditor"]


@pytest.mark.parametrize(
    ("served", "status"),
    [
        (NOTHING_SERVED, "False"),
        (Served(19, 19 * 900.0, 19 * 900.0**2), "False"),  # too few to tell
        (Served(20, 20 * 900.0, 20 * 900.0**2), "True"),
        (Served(20, 20 * 590.0, 20 * 590.0**2), "False"),
        (Served(20, 20 * 500.0, 20 * (500.0**2 + 60.0**2)), "True"),  # the mean ends in time, many do not
        (Served(28, 2.800000000000001, 0.2800000000000002), "False"),  # all alike: rounding makes their variance negative
    ],
    ids=str,
)
def test_jobs_that_outlast_the_grace_period_are_told(served: Served, status: str) -> None:
    condition = conditions(told(plans(IDLE, gpu=QueueReading(0, 0, 0, served=served))))["GracePeriodTooShort"]
    assert condition.status == status
    assert ("gpu: jobs take" in condition.message and "grace period is 600 s" in condition.message) == (status == "True")


BROKEN = QueueReading(0, 0, 0, counted=Attempts(0, 6, 6, 0))
ON_TRIAL = QueueReading(0, 0, 0, kept=Checkpoint(Breaker(BreakerState.HALF_OPEN, Milliseconds(0), 1)))
MENDED = replace(ON_TRIAL, counted=Attempts(3))


def test_a_tier_that_is_taken_out_of_routing_is_told_once_and_so_is_its_return() -> None:
    previous, told_so_far = told(plans(IDLE))[0].dump(), []
    for queue in (BROKEN, replace(BROKEN, kept=Checkpoint(Breaker(BreakerState.OPEN, Milliseconds(0), 1))), ON_TRIAL, MENDED):
        outcome = told(plans(IDLE, gpu=queue), previous=previous)
        condition, previous = conditions(outcome)["TierBroken"], outcome[0].dump()
        told_so_far.append((condition.status, condition.reason, [(event.warning, event.reason) for event in outcome[1]]))
        assert condition.message.removeprefix("gpu: ") in outcome[0].tiers[0].message
    assert conditions(told(plans(IDLE)))["TierBroken"].message == "every accelerated tier takes part in routing"
    assert told_so_far == [
        ("True", "AttemptsFail", [(True, "AttemptsFail")]),
        ("True", "AttemptsFail", []),
        ("True", "OnTrial", []),
        ("False", "InRouting", [(False, "InRouting")]),
    ]


def test_the_sentence_of_a_broken_tier_says_whether_it_is_only_advice() -> None:
    acts = conditions(told(plans(IDLE, gpu=BROKEN)))["TierBroken"].message
    assert values(told(plans(IDLE, gpu=BROKEN)))["Ready"] == "True", "its jobs run elsewhere"
    assert acts == (
        "gpu: 6 of its latest 6 attempts failed, 6 of these jobs succeeded on another tier and 0 failed there too: "
        "out of routing, after 30 s single jobs try it"
    )
    pool = in_mode(Mode.ADVISORY)
    advises = conditions(told(plans(IDLE, pool=pool, gpu=BROKEN), pool=pool))["TierBroken"].message
    assert advises == acts.replace("gpu: ", "gpu: advice only: ")
    paused = in_mode(Mode.PAUSED)
    assert values(told(plans(IDLE, pool=paused, gpu=BROKEN), pool=paused))["TierBroken"] == "False"


def test_a_definition_that_is_older_than_the_operator_is_told_with_the_fields_that_it_drops() -> None:
    outcome = told(plans(IDLE), pool=replace(POOL, unknown=("spec.mode", "spec.scaling")))
    condition = conditions(outcome)["DefinitionOutdated"]
    assert (condition.status, condition.reason) == ("True", "FieldsUnknown")
    assert condition.message.startswith("spec.mode, spec.scaling: ")
    assert [event for event in outcome[1] if event.warning and event.message == condition.message]
