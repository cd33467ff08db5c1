"""A broken accelerator: how attempts end is counted in Redis by whoever ends them, and a tier that fails leaves routing."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from redis import Redis
from tests import seeds
from tests.contract.api_and_operator import claimed, operator_pool, outcome, take_over_the_lost
from tests.contract.broker import ask, open_for_jobs, read, submit
from tests.contract.passes import running
from tests.contract.workers import parked, takes_jobs, worker
from tests.seeds import claim, consumer, fall_back, make_pool, now_of, settle
from tests.watching import until

from workerpool_operator import breaker, planning
from workerpool_operator.observation import Attempts, Breaker, BreakerState, BrokerReading, Checkpoint, TierReplicas
from workerpool_operator.ports import Pool, Report
from workerpool_operator.status import ConditionType, Event
from workerpool_routing import Overloaded, Reason
from workerpool_routing.ledger import State
from workerpool_routing.wire import ENDED_JOB_LIFE_SECONDS, Capacity, Keyspace, Milliseconds

pytestmark = pytest.mark.contract


@pytest.fixture
def pool(redis_url: str) -> Pool:
    return make_pool(redis_url)


def counted(client: Any, keys: Keyspace, tier: str = "gpu") -> Attempts:
    """How the attempts on a tier have ended so far."""
    names = ("succeeded", "failed", "confirmed", "refuted")
    return Attempts(*(float(number or 0) for number in client.hmget(keys.attempts(tier), names)))


def test_a_job_that_expires_after_it_failed_leaves_no_suspicion(redis_url: str, pool: Pool) -> None:
    open_for_jobs(redis_url, pool)
    submit(pool)
    with consumer(pool, "gpu") as gpu, consumer(pool, "cpu") as cpu, Redis.from_url(redis_url) as client:
        fall_back(redis_url, pool, claim(redis_url, pool, gpu, "gpu", "w.1"))
        assert counted(client, pool.keys) == Attempts(0, 1)
        settle(pool, claim(redis_url, pool, cpu, "cpu", "w.1"), "cpu", 2, State.EXPIRED, "revoked")
        assert counted(client, pool.keys) == Attempts()
        assert client.ttl(pool.keys.attempts("gpu")) > ENDED_JOB_LIFE_SECONDS, "it outlives the job"


@pytest.mark.parametrize("since", ["before it began", "while it ran", "while the job ran elsewhere"])
def test_what_began_before_a_trial_is_not_counted_to_it(redis_url: str, pool: Pool, since: str) -> None:
    open_for_jobs(redis_url, pool)
    submit(pool)
    submit(pool)

    def begins(at: int) -> None:
        keep(redis_url, pool, gpu=Checkpoint(Breaker(BreakerState.HALF_OPEN, Milliseconds(at), 1, Milliseconds(at))))

    with consumer(pool, "gpu") as gpu, consumer(pool, "cpu") as cpu, Redis.from_url(redis_url) as client:
        begins(1)
        good, bad = (claim(redis_url, pool, gpu, "gpu", "w.1") for _ in range(2))
        if since == "while it ran":
            begins(now_of(client) + 1)
        settle(pool, good, "gpu", 1, State.FINISHING, "done")
        fall_back(redis_url, pool, bad)
        if since == "while the job ran elsewhere":
            begins(now_of(client) + 1)
        settle(pool, claim(redis_url, pool, cpu, "cpu", "w.1"), "cpu", 2, State.FINISHING, "done")
        assert read(redis_url, pool).tiers["gpu"].attempts == (Attempts(1, 1, 1) if since == "before it began" else Attempts())


def keep(url: str, pool: Pool, **checkpoints: Checkpoint) -> None:
    policy = planning.policy(pool.spec)
    until(
        lambda: ask(lambda broker: broker.publish(url, pool, policy, Capacity(), checkpoints=checkpoints)) is None, "it is kept"
    )


def test_what_an_operator_keeps_is_read_as_it_was_left_with_what_was_counted_since(redis_url: str, pool: Pool) -> None:
    left = Breaker(BreakerState.HALF_OPEN, Milliseconds(2_000), 3, since=Milliseconds(1_000), older=2)
    kept = Checkpoint(left, Attempts(-2.5, -1.25, -0.75, -0.5), 240.5)
    keep(redis_url, pool, gpu=kept)
    found = read(redis_url, pool).tiers
    assert (found["gpu"].kept, found["gpu"].attempts) == (kept, Attempts(2.5, 1.25, 0.75, 0.5))
    assert (found["cpu"].kept, found["cpu"].attempts) == (Checkpoint(), Attempts())
    open_for_jobs(redis_url, pool)
    submit(pool)
    with consumer(pool, "gpu") as gpu, Redis.from_url(redis_url) as client:
        client.expire(pool.keys.checkpoint("gpu"), 1)
        settle(pool, claim(redis_url, pool, gpu, "gpu", "w.1"), "gpu", 1, State.DONE, "done")
        keep(redis_url, pool)
        assert read(redis_url, pool).tiers["gpu"].attempts.succeeded == 3.5
        for key in (pool.keys.checkpoint("gpu"), pool.keys.attempts("gpu")):
            assert client.ttl(key) > ENDED_JOB_LIFE_SECONDS, "it outlives the job, not a tier that nobody uses"


def decided(pool: Pool, reading: BrokerReading) -> Mapping[str, Checkpoint]:
    """What a pass that has seen this will keep."""
    workers = {tier.name: TierReplicas(tier.replicas.min) for tier in pool.spec.tiers}
    return planning.checkpoints(planning.plan(pool, reading, workers, {}, 0.0))


def test_an_attempt_that_ends_between_a_reading_and_what_comes_of_it_is_counted(redis_url: str, pool: Pool) -> None:
    open_for_jobs(redis_url, pool)
    for _ in range(3):
        submit(pool)
    with consumer(pool, "gpu") as gpu, consumer(pool, "cpu") as cpu, Redis.from_url(redis_url) as client:
        good, bad, late = (claim(redis_url, pool, gpu, "gpu", "w.1") for _ in range(3))
        client.hset(pool.keys.attempts("gpu"), mapping={"since": 0, "succeeded": 3 * breaker.WINDOW})
        seen = read(redis_url, pool)
        settle(pool, good, "gpu", 1, State.DONE, "done")
        fall_back(redis_url, pool, bad)
        keep(redis_url, pool, **decided(pool, seen))
        assert read(redis_url, pool).tiers["gpu"].attempts == Attempts(breaker.WINDOW + 1, 1)

        seen = read(redis_url, pool)
        settle(pool, claim(redis_url, pool, cpu, "cpu", "w.1"), "cpu", 2, State.DONE, "done")
        keep(redis_url, pool, **decided(pool, seen))
        fall_back(redis_url, pool, late)
        found = read(redis_url, pool).tiers["gpu"]
        assert (found.attempts.failed, found.attempts.confirmed) == pytest.approx((1 + breaker.WINDOW / (breaker.WINDOW + 2), 1))


def test_an_old_attempt_that_ends_while_a_trial_is_being_begun_is_not_counted_to_it(redis_url: str, pool: Pool) -> None:
    open_for_jobs(redis_url, pool)
    for _ in range(4):
        submit(pool)
    with consumer(pool, "gpu") as gpu, consumer(pool, "cpu") as cpu, Redis.from_url(redis_url) as client:
        old = [claim(redis_url, pool, gpu, "gpu", "w.1") for _ in range(3)]
        last = now_of(client)
        until(lambda: now_of(client) > last, "the clock of Redis goes on")
        keep(
            redis_url, pool, gpu=Checkpoint(Breaker(BreakerState.OPEN, Milliseconds(1), 1, Milliseconds(1)), Attempts(0, -6, -6))
        )
        seen = read(redis_url, pool)
        fall_back(redis_url, pool, old[0])
        keep(redis_url, pool, **decided(pool, seen))
        fall_back(redis_url, pool, old[1])
        found = read(redis_url, pool).tiers["gpu"]
        assert (found.kept.breaker.state, found.attempts) == (BreakerState.HALF_OPEN, Attempts())
        settle(pool, claim(redis_url, pool, gpu, "gpu", "w.1"), "gpu", 1, State.DONE, "done")
        fall_back(redis_url, pool, old[2])
        for _ in old:
            settle(pool, claim(redis_url, pool, cpu, "cpu", "w.1"), "cpu", 2, State.DONE, "done")
        assert read(redis_url, pool).tiers["gpu"].attempts == Attempts(1)


def break_down(client: Any, pool: Pool) -> None:
    """Count so many failures of an accelerated tier that the next pass takes it out."""
    client.hset(pool.keys.attempts("gpu"), mapping={"failed": breaker.LEAST_FAILURES, "confirmed": breaker.LEAST_FAILURES})


def test_what_waits_for_a_tier_that_is_taken_out_goes_to_the_plain_one(redis_url: str, pool: Pool) -> None:
    open_for_jobs(redis_url, pool)
    ids = [submit(pool) for _ in range(3)]
    for tier in ("gpu", "cpu"):
        seeds.report(redis_url, pool, tier, f"{tier}-a.1")

    async def scenario(client: Any) -> tuple[list[str], list[str]]:
        async with running(pool) as system:
            await system.after()
            before = [seeds.job(redis_url, pool, task_id).tier for task_id in ids]
            break_down(client, pool)
            await system.after()
            assert system.condition(pool, ConditionType.TIER_BROKEN) == "True"
            return before, [seeds.job(redis_url, pool, task_id).tier for task_id in ids]

    with Redis.from_url(redis_url) as client:
        assert asyncio.run(scenario(client)) == (["gpu"] * 3, ["cpu"] * 3)
        assert Capacity.load(client.get(pool.keys.capacity)).tiers["gpu"].limit == 0


def test_two_operators_at_once_open_a_breaker_once_and_a_new_one_keeps_it_open(redis_url: str, pool: Pool) -> None:
    async def scenario() -> tuple[str, str]:
        async with running(pool) as one, running(pool) as other:
            await asyncio.gather(one.after(), other.after())
        async with running(pool) as later:
            await later.after()
        return one.condition(pool, ConditionType.TIER_BROKEN), later.condition(pool, ConditionType.TIER_BROKEN)

    with Redis.from_url(redis_url) as client:
        break_down(client, pool)
        assert asyncio.run(scenario()) == ("True", "True")
    kept = read(redis_url, pool).tiers["gpu"].kept.breaker
    assert (kept.state, kept.opened) == (BreakerState.OPEN, 1)


@pytest.mark.parametrize("mode", ["Advisory", "Paused"])
def test_an_operator_that_touches_nothing_takes_no_tier_out(redis_url: str, mode: str) -> None:
    pool = make_pool(redis_url, mode=mode)

    async def scenario() -> None:
        async with running(pool) as system:
            await system.after()

    with Redis.from_url(redis_url) as client:
        break_down(client, pool)
        asyncio.run(scenario())
        assert client.get(pool.keys.capacity) is None
    assert read(redis_url, pool).tiers["gpu"].kept.breaker == Breaker()


def counts_of(jobs: ModuleType, task: Any, *args: Any, **options: Any) -> Attempts:
    """What one job adds, once it has ended."""
    client, keys = jobs.pool.connection.client, jobs.pool.keys
    client.delete(keys.attempts("gpu"), keys.checkpoint("gpu"))
    until(lambda: takes_jobs(jobs, "gpu-a"), "it reports")
    decision = jobs.pool.submit(task, args, **{"accelerated": True, **options})
    assert decision.tier == "gpu"
    outcome(jobs, decision.task_id)
    return counted(client, keys)


GOOD, CONFIRMED, REFUTED = Attempts(1), Attempts(0, 1, 1), Attempts(0, 1, 0, 1)


@pytest.mark.parametrize(
    ("task", "args", "options", "expected"),
    [
        ("work", [{}], {}, GOOD),
        ("work", [{"gpu": "raise"}], {}, CONFIRMED),
        ("work", [{"gpu": "exit"}], {}, CONFIRMED),
        ("work", [{"gpu": "kill"}], {}, CONFIRMED),
        ("work", [{"before": "gpu"}], {}, CONFIRMED),
        ("hard_limited", [{"gpu": "hang"}], {}, CONFIRMED),
        ("soft_limited", [{"gpu": "hang"}], {}, CONFIRMED),
        ("work", [{"gpu": "raise", "cpu": "raise"}], {}, REFUTED),
        ("work", [{"gpu": "raise", "cpu": "kill"}], {}, REFUTED),
        ("work", [{"gpu": "kill", "cpu": "kill"}], {}, REFUTED),
        ("work", [{"before": "always"}], {}, REFUTED),
        ("retried", [2], {}, GOOD),
        ("special", ["ignore"], {}, GOOD),
        ("special", ["reject"], {}, Attempts()),
        ("settled_here", [{"gpu": "raise"}], {}, Attempts()),
        ("unencodable", [], {}, Attempts()),
        ("unencodable", [{"gpu": "raise"}], {}, REFUTED),
        ("work", [{"gpu": "raise"}], {"accelerated": "required"}, Attempts()),
        ("work", [{}], {"accelerated": "required"}, GOOD),
    ],
    ids=lambda value: str(value) if isinstance(value, str | list) else "",
)
def test_the_end_of_an_attempt_is_counted_once_and_what_its_job_comes_to_says_whose_fault_it_was(
    two_tiers: ModuleType, task: str, args: list[Any], options: dict[str, Any], expected: Attempts
) -> None:
    assert counts_of(two_tiers, getattr(two_tiers, task), *args, **options) == expected


def test_a_worker_that_is_killed_is_counted_when_it_is_taken_over(
    url: str, two_tiers: ModuleType, tmp_path: Path, short_life: float
) -> None:
    client, keys = two_tiers.pool.connection.client, two_tiers.pool.keys
    with parked(two_tiers), worker(url, "gpu", "gpu-jobs", "gpu-killed", tmp_path) as doomed:
        client.delete(keys.attempts("gpu"), keys.checkpoint("gpu"))
        until(lambda: takes_jobs(two_tiers, "gpu-killed"), "it reports")
        decision = two_tiers.pool.submit(two_tiers.work, ({"gpu": "hang"},), accelerated=True)
        assert claimed(two_tiers, decision.task_id).owner.startswith("gpu-killed.")
        os.killpg(doomed.pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while not counted(client, keys).failed and time.monotonic() < deadline:
        asyncio.run(take_over_the_lost(url, "gpu"))
        time.sleep(0.2)
    outcome(two_tiers, decision.task_id)
    assert counted(client, keys) == CONFIRMED


def test_what_a_worker_gives_back_because_it_has_to_leave_is_not_counted(url: str, two_tiers: ModuleType, tmp_path: Path) -> None:
    client, keys = two_tiers.pool.connection.client, two_tiers.pool.keys
    with parked(two_tiers), worker(url, "gpu", "gpu-jobs", "gpu-leaving", tmp_path) as leaving:
        client.delete("gate", keys.attempts("gpu"), keys.checkpoint("gpu"))
        until(lambda: takes_jobs(two_tiers, "gpu-leaving"), "it reports")
        decision = two_tiers.pool.submit(two_tiers.work, ({"gpu": "gate"},), accelerated=True)
        assert claimed(two_tiers, decision.task_id).owner.startswith("gpu-leaving.")
        leaving.send_signal(signal.SIGTERM)
        until(lambda: not takes_jobs(two_tiers, "gpu-leaving"), "no more slots")
        leaving.send_signal(signal.SIGQUIT)
        leaving.wait(30)
        assert counted(client, keys) == Attempts()
        client.set("gate", "open")
    assert outcome(two_tiers, decision.task_id) == (State.DONE, {"gpu": 2})
    assert counted(client, keys) == GOOD


async def a_pass(pool: Pool, clock: float) -> Report:
    """Of an operator that has just started: all that it knows of the breaker stands in Redis."""
    async with running(pool) as system:
        system.now = clock
        await system.after()
        return system.reports[-1]


def test_a_tier_whose_driver_breaks_loses_routing_after_a_few_jobs_and_has_it_back_when_it_is_mended(
    url: str, two_tiers: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real jobs on real workers, and a new operator at every pass."""
    library, client, pool = two_tiers.pool, two_tiers.pool.connection.client, operator_pool(url)
    clock, told, ids = count(1_000.0, 1.0), list[Event](), list[str]()
    # Passes are as far apart as this machine is slow.
    monkeypatch.setattr("workerpool_operator.broker.CAPACITY_LIFE_MS", 3_600_000)
    monkeypatch.setattr(breaker, "PAUSE_SECONDS", 3_600.0)
    monkeypatch.setattr(breaker, "LONGEST_PAUSE_SECONDS", 4 * 3_600.0)
    status: dict[str, Any] = {}

    def operator() -> tuple[str, str]:
        nonlocal pool, status
        report = asyncio.run(a_pass(replace(pool, status=status), next(clock)))
        told.extend(event for event in report.events if event.reason in ("AttemptsFail", "OnTrial", "InRouting"))
        status = report.status.dump()
        broken = next(condition for condition in report.status.conditions if condition.type is ConditionType.TIER_BROKEN)
        return broken.status, broken.reason

    def submit(**options: Any) -> Any:
        """Once the GPU's slot is free, so that the breaker alone decides."""
        until(lambda: not client.hlen(library.keys.unacked("gpu")), "the GPU is idle")
        until(library.has_accelerated_workers, "the GPU worker reports")
        decision = library.submit(two_tiers.work, ({"gpu": "driver", **options},), accelerated=True)
        ids.append(decision.task_id)
        return decision

    def the_pause_ends() -> None:
        """By itself it would take an hour, on a machine of any speed."""
        with monkeypatch.context() as patch:
            patch.setattr(breaker, "PAUSE_SECONDS", 0.0)
            assert operator() == ("True", "OnTrial")

    client.delete(library.keys.attempts("gpu"), library.keys.checkpoint("gpu"))
    assert operator() == ("False", "InRouting")
    client.set("driver is broken", 1)
    decisions = list[Any]()
    while not decisions or decisions[-1].tier == "gpu":
        decisions.append(submit())
        assert outcome(two_tiers, ids[-1])[0] is State.DONE, "it succeeds on the CPU"
        operator()
        assert len(decisions) < 20
    assert [decision.reason for decision in decisions[-2:]] == [Reason.FREE_SLOT, Reason.TIER_BROKEN]
    assert len(decisions) == breaker.LEAST_FAILURES + 1, "so many fallbacks it has cost"
    assert operator() == ("True", "AttemptsFail")
    with pytest.raises(Overloaded):
        library.submit(two_tiers.work, ({"gpu": "driver"},), accelerated="required")

    the_pause_ends()
    client.delete("gate")
    assert submit().tier == "gpu", "a single job tries it"
    outcome(two_tiers, ids[-1])
    assert operator() == ("True", "AttemptsFail")
    assert read(url, pool).tiers["gpu"].kept.breaker.opened == 2
    assert submit().reason is Reason.TIER_BROKEN

    client.delete("driver is broken")
    the_pause_ends()
    trial = submit(gpu="gate")
    claimed(two_tiers, trial.task_id)
    second = library.submit(two_tiers.work, ({},), accelerated=True)
    ids.append(second.task_id)
    assert (trial.tier, second.tier, second.reason) == ("gpu", "cpu", Reason.TIER_BROKEN)
    client.set("gate", "open")
    outcome(two_tiers, trial.task_id)
    for _ in range(breaker.SUCCESSES_TO_CLOSE - 1):
        assert operator() == ("True", "OnTrial")
        assert submit().tier == "gpu"
        outcome(two_tiers, ids[-1])
    assert operator() == ("False", "InRouting")
    assert submit().reason is Reason.FREE_SLOT

    ended = [outcome(two_tiers, task_id) for task_id in ids]
    assert {state for state, _ in ended} == {State.DONE}
    assert {count for _, starts in ended for count in starts.values()} == {1}, "no job started twice on a tier"
    assert [(event.warning, event.reason) for event in told] == [(True, "AttemptsFail"), (False, "InRouting")]
    assert told[-1].message == "gpu: 3 single jobs that tried it succeeded: back in routing"


def test_jobs_that_fail_on_either_tier_leave_the_accelerated_one_in_routing(
    url: str, two_tiers: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    library, client, pool = two_tiers.pool, two_tiers.pool.connection.client, operator_pool(url)
    monkeypatch.setattr("workerpool_operator.broker.CAPACITY_LIFE_MS", 3_600_000)
    client.delete(library.keys.attempts("gpu"), library.keys.checkpoint("gpu"))
    for number in range(2 * breaker.LEAST_FAILURES):
        until(lambda: not client.hlen(library.keys.unacked("gpu")), "the GPU is idle")
        until(library.has_accelerated_workers, "the GPU worker reports")
        decision = library.submit(two_tiers.work, ({"gpu": "raise", "cpu": "raise"},), accelerated=True)
        assert decision.reason is Reason.FREE_SLOT
        assert outcome(two_tiers, decision.task_id) == (State.FAILED, {"gpu": 1, "cpu": 1})
        report = asyncio.run(a_pass(pool, 1_000.0 + number))
        assert [c.status for c in report.status.conditions if c.type is ConditionType.TIER_BROKEN] == ["False"]
    assert counted(client, library.keys).refuted == 2 * breaker.LEAST_FAILURES
