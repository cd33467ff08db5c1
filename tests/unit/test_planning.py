"""What a pass makes of its readings: a plan for every tier, and what API pods and workers are told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workerpool_operator import breaker, drain, planning, rebalancing, scaling
from workerpool_operator.model import Replicas, WorkerPoolSpec, parse_spec
from workerpool_operator.observation import (
    NO_ATTEMPTS,
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
    newest,
)
from workerpool_operator.planning import TierPlan
from workerpool_operator.ports import Marks, Pool
from workerpool_operator.scaling import HANG_FACTOR, START_SECONDS_UNTIL_KNOWN, Memory, Reason
from workerpool_routing import wire
from workerpool_routing.decide import START_SECONDS, Load, assumed_seconds
from workerpool_routing.wire import (
    PRESENCE_LIFE_MS,
    Capacity,
    Milliseconds,
    Presence,
    StartingSlots,
    TaskPolicy,
    TierCapacity,
    TierPolicy,
)

pytestmark = pytest.mark.unit

OUTAGE = Unavailable("Redis is down")
NOW, TIME = 1_000.0, Milliseconds(77_000)
"""The same instant by the clock of the operator and by that of Redis."""

TEMPLATE = {"spec": {"containers": [{"name": "worker"}]}}
POOL_TIERS: list[dict[str, Any]] = [
    {
        "name": "gpu", "queue": "gpu-tasks", "accelerator": {"resource": "nvidia.com/gpu"}, "replicas": {"max": 8},
        "template": TEMPLATE,
    },
    {"name": "cpu", "queue": "celery", "concurrency": 4, "replicas": {"min": 1, "max": 40}, "template": TEMPLATE},
]  # fmt: skip


def spec(**changes: Any) -> WorkerPoolSpec:
    parsed = parse_spec({"app": "media.tasks", "broker": {"url": "redis://one"}, "tiers": POOL_TIERS} | changes)
    assert not isinstance(parsed, list), parsed
    return parsed


POOL = Pool("ml", "media", "uid", 1, 0.0, spec())
TIERS = {tier.name: tier for tier in POOL.spec.tiers}


def reading(**tiers: QueueReading) -> BrokerReading:
    return BrokerReading({"gpu": QueueReading(0, 0, 0), "cpu": QueueReading(0, 0, 0), **tiers}, "r1", Milliseconds(0))


def served(waiting: int, in_flight: int, spilled: int, seconds: float = 5.0) -> QueueReading:
    """A queue whose thousand jobs took so long each."""
    return QueueReading(waiting, in_flight, spilled, served=Served(1_000, 1_000 * seconds, 2_000 * seconds**2))


def replicas(desired: int, *phases: Phase) -> TierReplicas:
    return TierReplicas(desired, tuple(Replica(f"w{n}", phase, NOW - 100) for n, phase in enumerate(phases)))


def plan(
    seen: BrokerReading | Unavailable,
    gpu: TierReplicas | None = None,
    cpu: TierReplicas | None = None,
    memory: Mapping[str, Memory] | None = None,
) -> dict[str, TierPlan]:
    workers = {"gpu": gpu or replicas(0), "cpu": cpu or replicas(1)}
    known = {tier: planning.Memory(kept) for tier, kept in (memory or {}).items()}
    plans = planning.plan(POOL, seen, workers, known, NOW)
    assert [plan.tier for plan in plans] == list(POOL.spec.tiers)
    return {plan.tier.name: plan for plan in plans}


def worker(name: str, slots: int = 1, busy: int = 0) -> Presence:
    return Presence(f"{name}.1", name, "gpu", "gpu-tasks", slots, busy, Milliseconds(0), Milliseconds(0))


def capacity_of_gpu(present: tuple[Presence, ...], seen: TierReplicas, waiting: int = 0) -> TierCapacity:
    return told(plan(reading(gpu=QueueReading(waiting, 0, 0, present)), gpu=seen)["gpu"])["gpu"]


def told(one: TierPlan) -> Mapping[str, TierCapacity]:
    return planning.capacity(POOL.spec, [one], TIME, NOW).tiers


def starting(capacity: TierCapacity) -> int:
    return sum(group.slots for group in capacity.starting)


def test_no_slot_may_still_be_ordered_where_another_autoscaler_orders() -> None:
    ours, theirs = (capacity_of_gpu((), replace(replicas(0), rival=rival)) for rival in ("", "HorizontalPodAutoscaler hpa"))
    assert (ours.startable, theirs.startable) == (8, 0)


def test_each_tier_is_sized_by_its_own_queue_bounds_and_slots() -> None:
    plans = plan(reading(gpu=QueueReading(3, 1, 0), cpu=QueueReading(9, 0, 0)))
    assert {name: plan.decision.replicas for name, plan in plans.items()} == {"gpu": 4, "cpu": 3}


def test_each_tier_is_kept_by_its_own_memory() -> None:
    memory = {"gpu": Memory(start_seconds=60.0, level=5), "cpu": Memory(start_seconds=60.0, level=2)}
    plans = plan(reading(), gpu=replicas(5), cpu=replicas(7), memory=memory)
    assert {name: plan.decision.replicas for name, plan in plans.items()} == {"gpu": 5, "cpu": 2}


def test_a_tier_keeps_its_workers_for_a_part_of_the_time_that_its_own_took_to_start() -> None:
    slow = TierReplicas(2, (Replica("w", Phase.READY, ordered_at=0.0, ready_at=40.0),))
    memory = {"gpu": Memory(level=0, fell=(991.0, 991.0))}
    assert plan(reading(), gpu=slow, memory=memory)["gpu"].decision.replicas == 2
    memory = {"gpu": Memory(level=0, fell=(989.0, 989.0))}
    assert plan(reading(), gpu=slow, memory=memory)["gpu"].decision.replicas == 0


def test_the_rule_is_told_what_starts_what_is_stuck_and_what_was_served() -> None:
    live = TierReplicas(
        6,
        (
            Replica("a", Phase.READY, ordered_at=10.0, ready_at=40.0),
            Replica("b", Phase.STARTING, ordered_at=90.0),
            Replica("c", Phase.UNSCHEDULABLE, ordered_at=80.0),
            Replica("d", Phase.FAILING, ordered_at=70.0),
        ),
    )
    stuck = {"a": 15.0, "b": 95.0}
    told = planning.demand(QueueReading(3, 1, 2, served=Served(7, 70.0, 900.0)), live, 11, stuck, 100.0)
    assert told == scaling.Demand(
        3, 1, 2, 6, 30.0, 1, (95.0, 100.0, 100.0), 2, 11, Served(7, 70.0, 900.0), held_up=5.0, ready_at=40.0
    )


def test_a_worker_that_was_ready_and_is_not_now_is_no_start_under_way() -> None:
    three_days = 259_200.0
    flapping = Replica("w", Phase.STARTING, ordered_at=0.0, ready_at=3.0)
    told = planning.demand(QueueReading(0, 1, 0), TierReplicas(1, (flapping,)), 0, {}, three_days)
    assert (told.ready, told.starting) == (1, ())
    plans = planning.plan(POOL, reading(), {"gpu": TierReplicas(1, (flapping,)), "cpu": replicas(0)}, {}, three_days)
    assert planning.capacity(POOL.spec, plans, TIME, three_days).tiers["gpu"].start_seconds == 3.0
    unseen = replace(flapping, witnessed=False)
    plans = planning.plan(POOL, reading(), {"gpu": TierReplicas(1, (unseen,)), "cpu": replicas(0)}, {}, three_days)
    assert planning.checkpoints(plans) == {}, "a later operator learns nothing of it"


def test_what_was_ever_sent_to_a_tier_is_the_sum_of_its_routes_but_for_what_moved_while_it_waited() -> None:
    routes = {"gpu:FreeSlot": 3, "gpu:SlotStarting": 4, "gpu:Rebalanced": 100, "gpu2:FreeSlot": 50, "cpu:NoCapacity": 5}
    seen = BrokerReading({}, "r1", Milliseconds(0), routes)
    assert (seen.arrived("gpu"), seen.arrived("cpu"), seen.arrived("other")) == (7, 5, 0)


def test_a_single_job_that_spilled_on_an_empty_pool_orders_one_slot() -> None:
    for gpu, cpu in ((served(0, 0, 1), served(1, 0, 0)), (QueueReading(0, 0, 1), QueueReading(1, 0, 0))):
        plans = plan(reading(gpu=gpu, cpu=cpu), cpu=replicas(0))
        assert {name: plan.decision.memory.level for name, plan in plans.items()} == {"gpu": 0, "cpu": 1}


@pytest.mark.parametrize(("waiting", "replicas_of_gpu"), [(321, 4), (327, 6), (900, 8)])
def test_a_spilled_job_that_is_not_started_in_time_where_it_waits_calls_for_the_tier_that_it_wanted(
    waiting: int, replicas_of_gpu: int
) -> None:
    """160 slots start 321 jobs of 29.9 s within the target of 60 s; the 160 that run take the work of 4 slots of the other."""
    seen = reading(gpu=served(0, 0, waiting, seconds=0.75), cpu=served(waiting, 160, 0, seconds=29.9))
    plans = plan(seen, gpu=replicas(0), cpu=replicas(40, *[Phase.READY] * 40), memory={"gpu": Memory(start_seconds=20.0)})
    assert {name: plan.decision.replicas for name, plan in plans.items()} == {"gpu": replicas_of_gpu, "cpu": 40}
    assert plans["gpu"].decision.message.startswith(f"0 waiting + 0 in flight + {waiting} spilled (")


def test_jobs_that_run_elsewhere_call_for_the_slots_that_would_do_their_work() -> None:
    for running, slots in ((1, 0), (9, 2), (30, 5), (150, 8)):
        plans = plan(reading(gpu=served(0, 0, running), cpu=served(0, running, 0, seconds=30.0)), gpu=replicas(0))
        assert plans["gpu"].decision.replicas == slots, "a sixth of a slot each"


def test_until_both_lengths_are_known_one_worker_is_ordered_for_what_runs_elsewhere() -> None:
    some, none, instant = Served(9, 90.0), Served(), Served(9, 0.0)
    for here, there in ((none, none), (none, some), (some, none), (some, instant)):
        seen = reading(gpu=QueueReading(0, 0, 3, served=here), cpu=QueueReading(0, 3, 0, served=there))
        assert plan(seen)["gpu"].decision.replicas == 1


def test_a_tier_that_is_decided_first_settles_no_job_elsewhere() -> None:
    message = plan(reading(gpu=QueueReading(5, 0, 0), cpu=QueueReading(0, 0, 2)))["cpu"].decision.message
    assert message.startswith("0 waiting + 0 in flight + 2 spilled need 1 worker ")


@st.composite
def pools(draw: st.DrawFn) -> tuple[BrokerReading, dict[str, TierReplicas]]:
    """Two tiers whose jobs and starts are known: what waits, runs, is ready, on its way, and stuck."""
    live, ready, queues = {}, {}, {}
    for name, most in (("gpu", 8), ("cpu", 40)):
        phases = draw(st.lists(st.sampled_from([Phase.READY, Phase.STARTING, Phase.UNSCHEDULABLE, Phase.FAILING]), max_size=8))
        ready[name] = phases.count(Phase.READY)
        live[name] = replicas(min(len(phases) + draw(st.integers(0, 1)), most), *phases)
    for name, slots, seconds in (("gpu", 1, 5.0), ("cpu", 4, 30.0)):
        in_flight = draw(st.integers(0, ready[name] * slots))
        queues[name] = served(draw(st.integers(0, 60)), in_flight, 0, seconds)
    elsewhere = queues["cpu"].waiting + queues["cpu"].in_flight
    queues["gpu"] = replace(queues["gpu"], spilled=draw(st.integers(0, elsewhere)))
    return reading(**queues), live


def raised(seen: BrokerReading, live: dict[str, TierReplicas]) -> dict[str, int]:
    """By how many slots a pass raises each tier, of workers that start within 20 s."""
    memory = {"gpu": Memory(start_seconds=20.0, level=0), "cpu": Memory(start_seconds=20.0, level=0)}
    plans = plan(seen, live["gpu"], live["cpu"], memory)
    return {name: max(0, p.decision.replicas - live[name].desired) * p.tier.concurrency for name, p in plans.items()}


@settings(max_examples=300, deadline=None)
@given(pools())
def test_no_job_orders_two_slots(state: tuple[BrokerReading, dict[str, TierReplicas]]) -> None:
    """What waits orders at most a slot; what runs has one, and a spilled one calls for a sixth of one where it wanted to run."""
    seen, live = state
    gpu, cpu = seen.tiers["gpu"], seen.tiers["cpu"]
    new = raised(seen, live)
    carried = round(min(gpu.spilled, cpu.in_flight) / 6)
    minimum = 0 if live["cpu"].desired else 4
    assert new["cpu"] <= max(-(-cpu.waiting // 4) * 4, minimum)
    assert new["gpu"] + new["cpu"] <= max(gpu.waiting + carried + max(-(-cpu.waiting // 4) * 4, minimum), 0)
    assert new["gpu"] <= gpu.waiting + carried + min(gpu.spilled, max(0, cpu.waiting - new["cpu"]))


@settings(max_examples=300, deadline=None)
@given(pools())
def test_no_job_orders_none(state: tuple[BrokerReading, dict[str, TierReplicas]]) -> None:
    """Where it waits it starts within the target, as jobs are known, or that tier is at its maximum or has stuck workers."""
    seen, live = state
    new = raised(seen, live)
    late = {}
    for name, tier in TIERS.items():
        ready, slots = live[name].count(Phase.READY), tier.concurrency
        coming = live[name].starting + new[name] // slots
        free = max(0, ready * slots - seen.tiers[name].in_flight)
        seconds = scaling.Service.recalled(seen.tiers[name].served).mean
        starts = free + slots * (coming + (60.0 * ready + 40.0 * coming) / seconds)
        bound = live[name].desired + new[name] // slots >= tier.replicas.max or live[name].desired > ready + live[name].starting
        late[name] = 0.0 if bound else seen.tiers[name].waiting - starts
    assert max(late.values()) <= 1e-6


def test_a_tier_whose_maximum_is_nothing_takes_no_job_and_what_waits_there_leaves() -> None:
    accelerator = {"resource": "nvidia.com/gpu"}
    tiers = [
        {"name": "gpu", "queue": "gpu-tasks", "accelerator": accelerator, "replicas": {"max": 0}, "template": TEMPLATE},
        {"name": "cpu", "queue": "celery", "concurrency": 4, "replicas": {"min": 1, "max": 40}, "template": TEMPLATE},
    ]
    pool = replace(POOL, spec=spec(tiers=tiers))
    seen, live = reading(gpu=QueueReading(9, 0, 0)), {"gpu": replicas(0), "cpu": replicas(1)}
    plans = planning.plan(pool, seen, live, {}, NOW)
    assert (plans[0].decision.replicas, plans[0].decision.reason) == (0, Reason.AT_MAXIMUM)
    capacity = planning.capacity(pool.spec, plans, seen.time, NOW)
    assert (capacity.tiers["gpu"].starting, capacity.tiers["gpu"].startable) == ((), 0)
    (transfer,) = rebalancing.transfers(planning.policy(pool.spec), planning.loads(plans, capacity, seen.time), {"gpu": 0})
    assert (transfer.source, transfer.target, transfer.jobs) == ("gpu", "cpu", 9)


def test_with_all_tiers_at_their_maximum_every_job_waits_where_it_is_and_nothing_is_lowered() -> None:
    full = {"gpu": replicas(8, *[Phase.READY] * 8), "cpu": replicas(40, *[Phase.READY] * 40)}
    plans = plan(reading(gpu=served(900, 8, 700), cpu=served(900, 160, 0, 30.0)), full["gpu"], full["cpu"])
    for name, most in (("gpu", 8), ("cpu", 40)):
        assert (plans[name].decision.replicas, plans[name].decision.reason) == (most, Reason.AT_MAXIMUM)
        assert plans[name].drain.marks == frozenset()


def test_a_worker_that_finds_no_place_is_kept_while_a_job_that_wanted_it_is_elsewhere() -> None:
    seen = reading(gpu=served(0, 0, 1), cpu=served(0, 1, 0, seconds=30.0))
    memory = {"gpu": Memory(level=0, start_seconds=1.0)}
    assert plan(seen, gpu=replicas(2, Phase.UNSCHEDULABLE, Phase.UNSCHEDULABLE), memory=memory)["gpu"].decision.replicas == 1
    assert plan(reading(), gpu=replicas(1, Phase.UNSCHEDULABLE), memory=memory)["gpu"].decision.replicas == 0


def test_spills_of_a_queue_that_was_purged_call_for_nothing() -> None:
    plans = plan(reading(gpu=QueueReading(0, 0, 50)))
    assert (plans["gpu"].spilled, plans["gpu"].decision.replicas) == (0, 0)


counts = st.integers(0, 30)
queues = st.builds(QueueReading, counts, counts, counts)


@settings(max_examples=60)
@given(queues, queues)
def test_spilled_is_what_redis_says_and_never_more_than_the_other_tiers_hold(gpu: QueueReading, cpu: QueueReading) -> None:
    plans = plan(reading(gpu=gpu, cpu=cpu))
    assert plans["gpu"].spilled == min(gpu.spilled, cpu.waiting + cpu.in_flight)
    assert plans["cpu"].spilled == min(cpu.spilled, gpu.waiting + gpu.in_flight)
    for name, given_queue in (("gpu", gpu), ("cpu", cpu)):
        queue = plans[name].queue
        assert queue
        assert (queue.waiting, queue.in_flight) == (given_queue.waiting, given_queue.in_flight)


def test_workers_and_losses_of_a_reading_stay_in_the_plan() -> None:
    seen = QueueReading(0, 0, 9, workers=(worker("a"),), lost=("b.1",))
    queue = plan(reading(gpu=seen))["gpu"].queue
    assert queue
    assert (queue.workers, queue.lost) == ((worker("a"),), ("b.1",))


def test_an_unread_broker_leaves_every_tier_where_it_is() -> None:
    plans = plan(OUTAGE, gpu=replicas(3), cpu=replicas(60))
    assert {name: plan.decision.replicas for name, plan in plans.items()} == {"gpu": 3, "cpu": 60}
    assert {plan.decision.reason for plan in plans.values()} == {Reason.BROKER_UNREADABLE}
    assert {(plan.queue, plan.spilled) for plan in plans.values()} == {(None, None)}


def test_an_unread_broker_leaves_no_tier_below_its_minimum() -> None:
    plans = plan(OUTAGE, gpu=replicas(0), cpu=replicas(0))
    assert {name: plan.decision.replicas for name, plan in plans.items()} == {"gpu": 0, "cpu": 1}


@pytest.mark.parametrize(
    ("present", "seen", "waiting", "expected"),
    [
        pytest.param((), replicas(0), 0, (0, 8, 0), id="at zero all may still be started"),
        pytest.param((), replicas(0), 3, (3, 5, 0), id="what this pass orders is starting"),
        pytest.param((), replicas(3, Phase.STARTING), 3, (3, 5, 0), id="ordered and not there yet"),
        pytest.param((worker("w0"),), replicas(3, Phase.READY), 3, (2, 5, 0), id="presence shows one of three"),
        pytest.param((worker("w0", slots=0),), replicas(3), 3, (3, 5, 0), id="one that leaves does not count as there"),
        pytest.param((worker("w0"), worker("w1")), replicas(1), 1, (0, 7, 0), id="more are there than ordered"),
        pytest.param((), replicas(8), 50, (8, 0, 0), id="at the maximum nothing more can be started"),
        pytest.param(
            (), replicas(3, Phase.UNSCHEDULABLE, Phase.UNSCHEDULABLE), 3, (0, 0, 2), id="unschedulable ones start never"
        ),
        pytest.param((), replicas(3, Phase.UNSCHEDULABLE, Phase.STARTING), 3, (1, 0, 1), id="one that has its place starts"),
        pytest.param((), replicas(2, Phase.FAILING), 2, (0, 0, 0), id="a failing one says that no more would start"),
        pytest.param((), replicas(1, Phase.UNSCHEDULABLE, Phase.FAILING), 1, (0, 0, 1), id="more stuck than ordered"),
    ],
)
def test_capacity_counts_what_presence_cannot_show(
    present: tuple[Presence, ...], seen: TierReplicas, waiting: int, expected: tuple[int, int, int]
) -> None:
    capacity = capacity_of_gpu(present, seen, waiting)
    assert (starting(capacity), capacity.startable, capacity.unschedulable) == expected


def test_capacity_is_in_slots_not_in_workers() -> None:
    (cpu,) = told(
        plan(reading(cpu=QueueReading(20, 0, 0)), cpu=replicas(5, Phase.UNSCHEDULABLE, *[Phase.STARTING] * 4))["cpu"]
    ).values()
    assert (starting(cpu), cpu.startable, cpu.unschedulable) == (16, 0, 4)
    (cpu,) = told(plan(reading(cpu=QueueReading(20, 0, 0)), cpu=replicas(5))["cpu"]).values()
    assert (starting(cpu), cpu.startable, cpu.unschedulable) == (20, 140, 0)


@settings(max_examples=60)
@given(counts, st.integers(0, 12), st.lists(st.sampled_from(Phase), max_size=12), st.integers(0, 12))
def test_capacity_never_promises_more_than_the_maximum_or_less_than_nothing(
    waiting: int, desired: int, phases: list[Phase], present: int
) -> None:
    there = tuple(worker(f"w{n}") for n in range(present))
    capacity = capacity_of_gpu(there, replicas(desired, *phases), waiting)
    assert min(capacity.startable, capacity.unschedulable) >= 0
    assert starting(capacity) + capacity.startable <= 8


def ordered(*ages: float, phase: Phase = Phase.STARTING) -> TierReplicas:
    """Workers that were ordered so many seconds before the pass."""
    return TierReplicas(len(ages), tuple(Replica(f"w{n}", phase, NOW - age) for n, age in enumerate(ages)))


def quick(seen: TierReplicas) -> TierReplicas:
    """The same where a start is said to take 4 s."""
    return replace(seen, first_start=4.0)


def ready_in(seen: TierReplicas, learnt: float | None, *present: Presence, waiting: int = 8) -> list[tuple[int, float]]:
    """What capacity says of the accelerated slots that are on their way: how many, in how many seconds."""
    queue = QueueReading(waiting, 0, 0, present)
    memory = {"gpu": Memory(start_seconds=learnt, newest_start=learnt)}
    found = told(plan(reading(gpu=queue), gpu=seen, memory=memory)["gpu"])["gpu"]
    return [(group.slots, (group.ready_at - TIME) / 1000) for group in found.starting]


@pytest.mark.parametrize(
    ("seen", "learnt", "expected"),
    [
        pytest.param(replicas(0), 40.0, [(8, 40.0)], id="ordered in this pass: after the time that a start has taken so far"),
        pytest.param(replicas(0), None, [(8, START_SECONDS)], id="nothing known of starts"),
        pytest.param(ordered(10.0, 30.0), 40.0, [(1, 10.0), (1, 30.0), (6, 40.0)], id="each after its own order"),
        pytest.param(ordered(39.0, 10.0), 40.0, [(1, 5.0), (1, 30.0), (6, 40.0)], id="one that is due takes an eighth more"),
        pytest.param(ordered(-99.0), 40.0, [(8, 40.0)], id="ordered in the future, says its clock"),
        pytest.param(ordered(9_999.0, phase=Phase.READY), 40.0, [(1, 5.0), (7, 40.0)], id="ready, and not heard of yet"),
        pytest.param(ordered(20.0), None, [(1, 10.0), (7, START_SECONDS)], id="the first start that is seen"),
        pytest.param(ordered(80.0, 60.0), None, [(1, 10.0), (1, 20.0), (6, 80.0)], id="a first start that takes long"),
        pytest.param(quick(replicas(0)), None, [(8, 4.0)], id="nothing seen, and starts are quick there"),
        pytest.param(quick(ordered(2.0)), None, [(1, 2.0), (7, 4.0)], id="the first start that is seen there"),
        pytest.param(quick(ordered(8.0)), None, [(1, 1.0), (7, 8.0)], id="a first start that is not quick at all"),
        pytest.param(quick(replicas(0)), 40.0, [(8, 40.0)], id="the tier's own starts are known better"),
        pytest.param(replace(replicas(0), first_start=240.0), None, [(8, START_SECONDS)], id="nothing is refused for a guess"),
    ],
)
def test_capacity_says_when_the_slots_that_are_on_their_way_are_ready(
    seen: TierReplicas, learnt: float | None, expected: list[tuple[int, float]]
) -> None:
    assert ready_in(seen, learnt) == expected


def test_a_start_that_takes_longer_than_any_before_is_expected_to_go_on_taking_longer() -> None:
    assert ready_in(ordered(200.0), 40.0)[0] == (1, 20.0), "an eighth of four times the start time, as scaling believes then"


def test_a_worker_that_could_not_come_up_takes_its_whole_start_time_from_then_on_and_teaches_no_longer_one() -> None:
    memory = {"gpu": planning.Memory(Memory(start_seconds=40.0, level=0))}
    seen = reading(gpu=QueueReading(1, 0, 0, kept=Checkpoint(start_seconds=40.0)))

    def after(now: float, replica: Replica) -> TierPlan:
        found, _ = planning.plan(POOL, seen, {"gpu": TierReplicas(1, (replica,)), "cpu": replicas(1)}, memory, now)
        memory["gpu"] = found.memory
        return found

    def ready_at(now: float, found: TierPlan) -> list[Milliseconds]:
        return [group.ready_at for group in planning.capacity(POOL.spec, [found], TIME, now).tiers["gpu"].starting][:1]

    assert ready_at(600.0, after(600.0, Replica("w", Phase.UNSCHEDULABLE, 0.0))) == []
    assert ready_at(601.0, after(601.0, Replica("w", Phase.STARTING, 0.0))) == [TIME + 39_000]
    assert ready_at(620.0, after(620.0, Replica("w", Phase.STARTING, 0.0))) == [TIME + 20_000]
    found = after(640.0, Replica("w", Phase.READY, 0.0, 640.0))
    assert found.decision.memory.start_seconds == 40.0
    assert planning.checkpoints([found]) == {}, "the next operator finds no other either"
    assert after(700.0, Replica("another", Phase.STARTING, 700.0)).stuck == {}, "nothing is kept of workers that are gone"


def test_a_start_that_waited_for_redis_teaches_no_longer_one() -> None:
    memory = {"gpu": planning.Memory(Memory(start_seconds=40.0, level=0))}
    seen = reading(gpu=QueueReading(1, 0, 0, kept=Checkpoint(start_seconds=40.0)))

    def after(now: float, answer: BrokerReading | Unavailable, replica: Replica) -> Memory:
        found, _ = planning.plan(POOL, answer, {"gpu": TierReplicas(1, (replica,)), "cpu": replicas(1)}, memory, now)
        memory["gpu"] = found.memory
        return found.decision.memory

    after(10.0, OUTAGE, Replica("w", Phase.STARTING, 0.0))
    after(600.0, OUTAGE, Replica("w", Phase.STARTING, 0.0))
    assert after(605.0, seen, Replica("w", Phase.READY, 0.0, 605.0)).start_seconds == 40.0
    assert after(800.0, seen, Replica("slow", Phase.READY, 700.0, 800.0)).start_seconds == 70.0, "one that did not wait teaches"


def test_a_worker_that_was_to_leave_and_is_needed_again_is_back_in_a_moment() -> None:
    leaving = replace(worker("w0", slots=0), draining=True)
    assert ready_in(ordered(9_999.0), 40.0, leaving) == [(1, 5.0), (7, 40.0)]
    assert ready_in(ordered(9_999.0), None, leaving) == [(1, START_SECONDS / 8), (7, START_SECONDS)]


@pytest.mark.parametrize("learnt", [40.0, 100.0, None])
def test_a_start_that_hangs_is_promised_to_nobody_and_holds_back_others(learnt: float | None) -> None:
    latest = max(HANG_FACTOR * (learnt or START_SECONDS_UNTIL_KNOWN), START_SECONDS_UNTIL_KNOWN)
    memory = {"gpu": Memory(start_seconds=learnt, newest_start=learnt, level=1)}
    slow, hung = (
        plan(reading(gpu=QueueReading(1, 0, 0)), gpu=replace(ordered(seconds), desired=1), memory=memory)["gpu"]
        for seconds in (latest - 1, latest + 1)
    )
    assert [one.workers.count(Phase.LATE) for one in (slow, hung)] == [0, 1]
    assert [one.decision.replicas for one in (slow, hung)] == [1, 1], "another would hang as well"
    assert (starting(told(slow)["gpu"]), told(slow)["gpu"].startable) == (1, 7)
    assert (starting(told(hung)["gpu"]), told(hung)["gpu"].startable) == (0, 0)
    assert f"{latest + 1:.0f} s after it was ordered" in hung.workers.replicas[0].detail


def test_a_start_is_not_late_while_the_worker_waits_for_a_node_reports_or_has_been_ready() -> None:
    old = 10 * HANG_FACTOR * START_SECONDS_UNTIL_KNOWN
    seen = reading(gpu=QueueReading(1, 0, 0))
    memory = {"gpu": planning.Memory(stuck={"w0": NOW - 5})}
    placed, _ = planning.plan(POOL, seen, {"gpu": ordered(old), "cpu": replicas(1)}, memory, NOW)
    assert placed.workers.count(Phase.LATE) == 0, "until a moment ago it had no node"
    joined = plan(reading(gpu=QueueReading(1, 0, 0, (worker("w0"),))), gpu=ordered(old))["gpu"]
    assert joined.workers.count(Phase.LATE) == 0
    was_ready = TierReplicas(1, (Replica("w0", Phase.STARTING, NOW - old, NOW - 20),))
    assert plan(seen, gpu=was_ready)["gpu"].workers.count(Phase.LATE) == 0


SILENT_SECONDS = PRESENCE_LIFE_MS / 1000


@pytest.mark.parametrize("phase", [Phase.READY, Phase.STARTING])
def test_a_worker_that_falls_silent_is_replaced_before_the_cluster_sees_that_it_is_gone(phase: Phase) -> None:
    live = TierReplicas(1, (Replica("w0", phase, 0.0, 20.0),))
    memory = {"gpu": planning.Memory(Memory(start_seconds=20.0, newest_start=20.0, level=1))}

    def after(seconds: float, queue: QueueReading | None) -> TierPlan:
        seen = reading(gpu=queue) if queue else OUTAGE
        found, _ = planning.plan(POOL, seen, {"gpu": live, "cpu": replicas(1)}, memory, NOW + seconds)
        memory["gpu"] = found.memory
        return found

    here, gone = QueueReading(0, 1, 0, (worker("w0", busy=1),)), QueueReading(1, 0, 0)
    assert after(0.0, here).workers.count(Phase.LOST) == 0
    assert after(SILENT_SECONDS - 1, gone).workers.count(Phase.LOST) == 0
    lost = after(SILENT_SECONDS, gone)
    assert (lost.workers.count(Phase.LOST), lost.decision.replicas) == (1, 2)
    assert starting(told(lost)["gpu"]) == 1, "the one in its place"
    assert "w0 has not reported for 8 s" in lost.workers.replicas[0].detail
    both = TierReplicas(2, (Replica("w1", Phase.READY, 30.0, 50.0), *lost.workers.replicas))
    leaves = drain.decide(1, both, QueueReading(0, 0, 0, (worker("w1"),)), frozenset(), TIME, drain.Memory(), NOW)
    assert (leaves.replicas, leaves.leaving) == (1, frozenset({"w0"})), "it is the first to go, and nobody waits for it"
    after(SILENT_SECONDS + 60, None)
    assert after(SILENT_SECONDS + 61, gone).workers.count(Phase.LOST) == 0, "Redis was away, and its report with it"
    assert after(SILENT_SECONDS + 70, here).workers.count(Phase.LOST) == 0
    assert after(SILENT_SECONDS + 99, gone).workers.count(Phase.LOST) == 1
    assert after(SILENT_SECONDS + 100, here).workers.count(Phase.LOST) == 0, "it was only cut off for a while"


def test_a_worker_that_never_reported_is_not_lost() -> None:
    live = TierReplicas(1, (Replica("w0", Phase.READY, 0.0, 20.0),))
    assert plan(reading(gpu=QueueReading(1, 0, 0)), gpu=live)["gpu"].workers.count(Phase.LOST) == 0, "its app lacks the library"


def test_what_may_still_be_ordered_takes_as_long_as_starts_do() -> None:
    for learnt, seconds in ((40.0, 40.0), (None, START_SECONDS)):
        memory = {"gpu": Memory(start_seconds=learnt, newest_start=learnt)}
        found = told(plan(reading(), memory=memory)["gpu"])["gpu"]
        assert (found.start_seconds, found.target_seconds) == (seconds, POOL.spec.scaling.target_wait_seconds)


@settings(max_examples=60)
@given(st.lists(st.floats(-5, START_SECONDS_UNTIL_KNOWN), max_size=40), st.none() | st.floats(0.1, 300))
def test_slots_that_are_on_their_way_are_told_of_in_a_handful_of_groups_soonest_first(
    ages: list[float], learnt: float | None
) -> None:
    pool = replace(POOL, spec=spec(tiers=[{**POOL_TIERS[0], "replicas": {"max": 50}}, POOL_TIERS[1]]))
    memory = {"gpu": planning.Memory(Memory(start_seconds=learnt, newest_start=learnt))}
    workers = {"gpu": ordered(*ages), "cpu": replicas(1)}
    plans = planning.plan(pool, reading(gpu=QueueReading(90, 0, 0)), workers, memory, NOW)
    found = planning.capacity(pool.spec, plans, TIME, NOW).tiers["gpu"]
    assert len(found.starting) <= planning.GROUPS
    times = [group.ready_at for group in found.starting]
    assert times == sorted(times)
    assert all(TIME < at <= TIME + 1000 * found.start_seconds + 1 for at in times)
    assert starting(found) == plans[0].decision.replicas


def test_a_load_is_what_admission_measures_with_that_capacity() -> None:
    seen = QueueReading(4, 1, 0, (worker("w0", busy=1),), served=Served(10, 25.0, 90.0))
    plans = list(plan(reading(gpu=seen), gpu=replicas(1, Phase.READY)).values())
    held = Capacity({"gpu": TierCapacity((StartingSlots(2, Milliseconds(TIME + 4_000)),), 3, 9.0, 60.0), "cpu": TierCapacity()})
    assert planning.loads(plans, held, TIME) == {
        "gpu": Load(4, 1, 1, ((2, 4.0),), 0, 2.5, 3, 9.0, 60.0, assumed=assumed_seconds(accelerated=True)), "cpu": Load(0, 0, 0),
    }  # fmt: skip


def test_a_pod_that_drains_and_is_un_ready_for_it_is_not_one_that_takes_long_to_start() -> None:
    drains = replace(worker("w1", slots=0, busy=1), draining=True)
    live = replicas(3, Phase.READY, Phase.STARTING, Phase.STARTING)
    told = planning.demand(QueueReading(0, 2, 0, workers=(worker("w0", busy=1), drains)), live, 0, {}, 9_000.0)
    assert (told.ready, told.starting) == (2, (NOW - 100,))


def test_marks_are_set_for_who_is_to_leave_and_taken_back_from_who_stays_or_is_gone() -> None:
    memory = {"gpu": Memory(start_seconds=1.0, level=0, fell=(0.0, 0.0))}
    seen = QueueReading(0, 1, 0, workers=(worker("w0", busy=1), worker("w1")))
    plans = list(plan(reading(gpu=seen), gpu=replicas(2, Phase.READY, Phase.READY), memory=memory).values())
    assert planning.marks(plans, frozenset()) == Marks(add=frozenset({"w1"}))
    assert planning.marks(plans, frozenset({"w0", "w1", "gone"})) == Marks(remove=frozenset({"w0", "gone"}))


def test_the_policy_says_what_the_spec_says() -> None:
    routing = {
        "acceleratedContentTypes": ["audio"],
        "tasks": [{"name": "media.*", "accelerated": "required"}, {"name": "mail.*", "accelerated": False}],
        "maxWaitSeconds": 600,
        "fallback": {"onFailure": False, "onLoss": True},
    }
    assert planning.policy(spec(routing=routing)) == wire.Policy(
        tiers=(TierPolicy("gpu", "gpu-tasks", True, 1), TierPolicy("cpu", "celery", False, 4)),
        accelerated_content_types=("audio",),
        tasks=(TaskPolicy("media.*", "required"), TaskPolicy("mail.*", False)),
        fallback_on_failure=False,
        fallback_on_loss=True,
        max_wait_seconds=600,
    )
    swapped = planning.policy(spec(routing={"fallback": {"onFailure": True, "onLoss": False}}))
    assert (swapped.fallback_on_failure, swapped.fallback_on_loss) == (True, False)


def test_the_defaults_of_the_resource_are_the_defaults_of_the_wire() -> None:
    policy = planning.policy(spec())
    assert policy == wire.Policy(policy.tiers)


def test_what_is_starting_is_what_is_ordered_and_neither_ready_nor_stuck() -> None:
    seen = replicas(6, Phase.READY, Phase.UNSCHEDULABLE, Phase.FAILING, Phase.STARTING, Phase.STOPPING)
    assert seen.starting == 3
    assert replicas(0, Phase.READY, Phase.FAILING).starting == 0


def test_the_newest_worker_is_the_one_that_became_ready_last() -> None:
    seen = TierReplicas(
        4,
        (
            Replica("quick", Phase.READY, ordered_at=100.0, ready_at=103.0),
            Replica("latest", Phase.READY, ordered_at=90.0, ready_at=130.0),
            Replica("slow", Phase.READY, ordered_at=0.0, ready_at=80.0),
            Replica("new", Phase.STARTING, ordered_at=200.0),
        ),
    )
    assert newest(seen.replicas) == (130.0, seen.replicas[1])
    assert newest(replicas(1, Phase.STARTING).replicas) is None


def test_decisions_of_a_plan_remember_for_the_next_pass() -> None:
    first = plan(reading(gpu=QueueReading(4, 0, 0)))["gpu"].decision
    assert (
        plan(reading(), gpu=replicas(4), memory={"gpu": first.memory})["gpu"].decision.reason is scaling.Reason.WAITING_TO_LOWER
    )


FAILING, SOUND = Attempts(0, 6, 6), Attempts(5)
OUT = Checkpoint(Breaker(BreakerState.OPEN, Milliseconds(0), 1))
ON_TRIAL = replace(OUT, breaker=replace(OUT.breaker, state=BreakerState.HALF_OPEN))


@pytest.mark.parametrize(
    ("queue", "replicas_wanted"),
    [
        (QueueReading(40, 0, 20), 8),
        (QueueReading(40, 0, 20, counted=FAILING), 1),
        (QueueReading(0, 0, 20, counted=FAILING, kept=OUT), 1),
        (QueueReading(0, 0, 0, counted=FAILING, kept=OUT), 0),
        (QueueReading(9, 3, 20, counted=FAILING, kept=OUT), 4),
        (QueueReading(0, 0, 20, kept=ON_TRIAL), 1),
    ],
    ids=["sound", "breaks now", "out", "out, and nobody wants it", "out, and some still run", "on trial"],
)
def test_a_tier_that_is_out_of_routing_has_workers_for_one_trial_and_for_what_still_runs(
    queue: QueueReading, replicas_wanted: int
) -> None:
    plans = plan(reading(gpu=queue, cpu=QueueReading(60, 0, 0)))
    assert plans["gpu"].decision.replicas == replicas_wanted
    assert plans["cpu"].decision.replicas == plan(reading(cpu=QueueReading(60, 0, 0)))["cpu"].decision.replicas


@pytest.mark.parametrize(
    ("queue", "limit"),
    [
        (QueueReading(3, 0, 0, counted=SOUND), None),
        (QueueReading(3, 0, 0, counted=FAILING), 0),
        (QueueReading(3, 0, 0, kept=ON_TRIAL), 1),
    ],
    ids=["sound", "breaks now", "on trial"],
)
def test_admission_and_rebalancing_are_told_the_same_limit(queue: QueueReading, limit: int | None) -> None:
    plans = list(plan(reading(gpu=queue)).values())
    capacity = planning.capacity(POOL.spec, plans, TIME, NOW)
    assert capacity.tiers["gpu"].limit == planning.loads(plans, capacity, TIME)["gpu"].limit == limit
    assert capacity.tiers["cpu"].limit is None


def test_advice_goes_by_what_fails_now_and_by_no_trial_that_was_begun_before_the_mode_was_set() -> None:
    advised = replace(POOL, spec=spec(mode="Advisory"))
    workers = {"gpu": replicas(2), "cpu": replicas(1)}
    seen = [reading(gpu=QueueReading(3, 0, 0, counted=counted, kept=ON_TRIAL)) for counted in (SOUND, FAILING)]
    limits = [planning.plan(advised, one, workers, {}, 0.0)[0].breaker.limit for one in seen]  # type: ignore[union-attr]
    assert limits == [None, 0]


def test_a_new_operator_goes_on_with_the_start_time_that_the_last_one_kept() -> None:
    (first, *_) = plans = list(plan(reading(gpu=QueueReading(3, 0, 0, kept=Checkpoint(start_seconds=300.0)))).values())
    assert "a worker's start 300 s" in first.decision.message
    assert planning.capacity(POOL.spec, plans, TIME, NOW).tiers["gpu"].start_seconds == 300.0
    assert planning.checkpoints(plans) == {}, "no news"


@pytest.mark.parametrize(
    ("kept", "told"),
    [(None, {"gpu": 40.0}), (37.0, {}), (43.0, {}), (30.0, {"gpu": 40.0})],
    ids=["none", "less", "more", "far off"],
)
def test_a_learnt_start_time_is_kept_when_it_is_news(kept: float | None, told: dict[str, float]) -> None:
    memory = {"gpu": Memory(start_seconds=40.0, newest_start=40.0)}
    found = plan(reading(gpu=QueueReading(0, 0, 0, kept=Checkpoint(start_seconds=kept))), memory=memory)
    assert {name: kept.start_seconds for name, kept in planning.checkpoints(list(found.values())).items()} == told


def test_what_is_only_said_of_starts_sizes_the_tier_and_is_not_kept_as_learnt() -> None:
    plans = list(plan(reading(gpu=QueueReading(3, 0, 0)), gpu=quick(replicas(0))).values())
    assert "a worker's start 4 s" in plans[0].decision.message
    assert planning.checkpoints(plans) == {}


def test_no_job_comes_home_to_a_worker_that_has_failed_although_it_reported_a_moment_ago() -> None:
    live = TierReplicas(2, (Replica("w0", Phase.FAILING, 0.0), Replica("w1", Phase.READY, 0.0, 1.0)))
    reports = tuple(Presence(f"{name}.1", name, "gpu", "gpu-tasks", 1, 0, TIME, TIME) for name in ("w0", "w1"))
    plans = list(plan(reading(gpu=QueueReading(0, 0, 0, workers=reports)), gpu=live).values())
    assert planning.loads(plans, planning.capacity(POOL.spec, plans, TIME, NOW), TIME)["gpu"].ready == 1


def test_a_breaker_is_kept_when_it_changes_or_its_record_grows_too_long() -> None:
    kept = [
        planning.checkpoints(list(plan(reading(gpu=QueueReading(0, 0, 0, counted=seen))).values()))
        for seen in (SOUND, FAILING, Attempts(5_000))
    ]
    assert [list(one) for one in kept] == [[], ["gpu"], ["gpu"]]
    assert kept[1]["gpu"].breaker.state is BreakerState.OPEN
    assert kept[2]["gpu"].baseline == Attempts(5_000 - breaker.WINDOW)


@pytest.mark.parametrize(
    "counted",
    [Attempts(5_003, 17, 12, 1), NO_ATTEMPTS, Attempts(30, 40, 0, 40)],
    ids=["still counting", "counts have run out", "the jobs' own fault"],
)
@pytest.mark.parametrize("state", BreakerState)
def test_what_is_kept_is_read_as_it_was_decided_and_is_no_news_then(state: BreakerState, counted: Attempts) -> None:
    before = Checkpoint(Breaker(state, TIME, 1, TIME), Attempts(5_000, 10, 5))
    seen = QueueReading(0, 0, 0, counted=counted, kept=before)
    plans = plan(reading(gpu=seen))
    kept = planning.checkpoints(list(plans.values())).get("gpu", before)
    began_anew = kept.breaker.since != before.breaker.since
    found = replace(seen, kept=kept, counted=NO_ATTEMPTS if began_anew else counted)
    decided = plans["gpu"].breaker
    assert decided
    assert (found.kept.breaker, found.attempts) == (decided.breaker, decided.attempts)
    assert planning.checkpoints(list(plan(reading(gpu=found)).values())) == {}


@pytest.mark.parametrize("changes", [{"mode": "Paused"}, {"tiers": "accelerated alone"}], ids=str)
def test_there_is_no_breaker_where_nothing_is_decided_or_jobs_have_nowhere_else_to_go(changes: dict[str, Any]) -> None:
    if "tiers" in changes:
        alone = {"name": "gpu", "queue": "gpu-tasks", "accelerator": {"resource": "nvidia.com/gpu"}, "template": TEMPLATE}
        changes = {"tiers": [alone], "routing": {"fallback": {"onFailure": False, "onLoss": False}}}
    pool = replace(POOL, spec=spec(**changes))
    seen = reading(gpu=QueueReading(3, 0, 0, counted=FAILING))
    workers = {"gpu": replicas(2), "cpu": replicas(1)}
    plans = planning.plan(pool, seen, workers, {}, 0.0)
    assert [one.breaker for one in plans] == [None] * len(plans)
    assert planning.checkpoints(plans) == {}


def test_a_plain_tier_has_no_breaker_whatever_is_counted_there() -> None:
    assert plan(reading(cpu=QueueReading(3, 0, 0, counted=FAILING)))["cpu"].breaker is None
    assert plan(OUTAGE)["gpu"].breaker is None


def test_a_worker_that_is_ejected_is_neither_ready_nor_on_its_way_is_replaced_and_goes_first() -> None:
    live = replicas(2, Phase.READY, Phase.READY)
    sound = (worker("w0", busy=1), worker("w1"))
    ejected = (sound[0], replace(sound[1], slots=0, ejected=True))
    memory = {"gpu": Memory(start_seconds=20.0, level=0)}
    found = {
        present: plan(reading(gpu=QueueReading(1, 1, 0, present)), gpu=live, memory=memory)["gpu"] for present in (sound, ejected)
    }
    assert found[ejected].decision.replicas == found[sound].decision.replicas + 1
    assert starting(told(found[sound])["gpu"]) == 0
    assert starting(told(found[ejected])["gpu"]) == 1, "the one in its place"
    (out,) = (one for one in found[ejected].workers.replicas if one.phase is Phase.EJECTED)
    assert out.worker == "w1"
    assert "w1" in out.detail
    leaves = drain.decide(1, found[ejected].workers, QueueReading(0, 0, 0, ejected), frozenset(), TIME, drain.Memory(), NOW)
    assert leaves.marks == {"w1"}
    for phase in (Phase.STOPPING, Phase.FAILING):
        seen = plan(reading(gpu=QueueReading(0, 0, 0, ejected)), gpu=replicas(2, Phase.READY, phase))["gpu"]
        assert seen.workers.count(phase) == 1, "that says more"


GONE = TIERS["gpu"].model_copy(update={"replicas": Replicas(max=0)})
WITHOUT_GPU = replace(POOL, spec=spec(tiers=POOL_TIERS[1:]), removed=(GONE,))
EMPTY, NOBODY = QueueReading(0, 0, 0), TierReplicas(0)


def removed(queue: QueueReading, live: TierReplicas, now: float, before: TierPlan | None = None) -> TierPlan:
    memory = {"gpu": before.memory} if before else {}
    *_, gpu = planning.plan(WITHOUT_GPU, reading(gpu=queue), {"cpu": replicas(1), "gpu": live}, memory, now)
    return gpu


def test_a_removed_tier_goes_once_nothing_has_been_left_of_it_for_a_while() -> None:
    first = removed(EMPTY, NOBODY, NOW)
    just_before = removed(EMPTY, NOBODY, NOW + planning.REMOVED_SECONDS - 0.1, first)
    assert (first.lingers, just_before.lingers) == (True, True)
    assert not removed(EMPTY, NOBODY, NOW + planning.REMOVED_SECONDS, just_before).lingers


@pytest.mark.parametrize(
    ("queue", "live"),
    [
        (QueueReading(1, 0, 0), NOBODY),
        (QueueReading(0, 1, 0), NOBODY),
        (replace(EMPTY, unclaimed=1), NOBODY),
        (replace(EMPTY, lost=("w.1",)), NOBODY),
        (replace(EMPTY, workers=(replace(worker("w"), scheduled=1),)), NOBODY),
        (EMPTY, replicas(1)),
        (EMPTY, replicas(0, Phase.STOPPING)),
    ],
    ids=["waiting", "in flight", "unclaimed", "lost", "scheduled", "ordered", "stopping"],
)
def test_whatever_is_left_of_a_removed_tier_begins_the_while_anew(queue: QueueReading, live: TierReplicas) -> None:
    late = NOW + planning.REMOVED_SECONDS
    left = removed(queue, live, late, removed(EMPTY, NOBODY, NOW))
    assert left.removal == planning.Removal()
    assert removed(EMPTY, NOBODY, late + 1, left).lingers


def test_a_removed_tier_orders_nothing_for_what_spilled_from_it_and_is_not_tried_again() -> None:
    left = removed(QueueReading(0, 0, 7, served=Served(10, 10.0, 10.0)), NOBODY, NOW)
    assert (left.decision.replicas, left.breaker) == (0, None)
