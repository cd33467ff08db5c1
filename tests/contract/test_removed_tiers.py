"""What becomes of a tier that is taken out of its WorkerPool: its jobs, its workers, and what others have on its queue."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest
from redis import Redis
from redis import asyncio as aioredis
from tests import seeds
from tests.contract.broker import ROOM, ask, open_for_jobs, submit
from tests.contract.passes import System, running
from tests.seeds import claim, consumer, job, make_pool, publish, report, take

from workerpool_operator import planning, salvage
from workerpool_operator.model import Mode, Replicas
from workerpool_operator.observation import Phase, Replica, TierReplicas
from workerpool_operator.ports import Pool
from workerpool_operator.reaper import SWEEP_SECONDS
from workerpool_operator.status import ConditionType, TierStatus
from workerpool_routing import Reason, ledger
from workerpool_routing.ledger import State
from workerpool_routing.wire import PRESENCE_LIFE_MS, Policy, Presence

pytestmark = pytest.mark.contract

CPU = {"name": "cpu", "queue": "celery", "replicas": {"min": 0, "max": 4}, "template": seeds.TEMPLATE}
ACCELERATED = {**CPU, "name": "a100", "queue": "gpu-tasks", "accelerator": {"resource": "nvidia.com/gpu"}}
LONG_MS = 120_000
"""For so long a report of a live worker holds here, however slow the machine is."""


@pytest.fixture
def pool(redis_url: str) -> Pool:
    """With its tier ``gpu`` still in it."""
    pool = make_pool(redis_url)
    open_for_jobs(redis_url, pool, ROOM)
    return pool


def without_gpu(pool: Pool, *tiers: object, **spec: Any) -> Pool:
    """The same pool once the tier was taken out of it, with others perhaps in its place."""
    changed = make_pool(str(pool.spec.broker.url), tiers=[*tiers, CPU], **spec)
    gone = pool.spec.tiers[0].model_copy(update={"replicas": Replicas(max=0)})
    return replace(changed, generation=2, removed=(gone,))


def ordered(system: System, pool: Pool, **replicas: int) -> None:
    system.place.ordered[pool.id] = {"cpu": 0, **replicas}


def counts(system: System, tier: str = "gpu") -> list[int | None]:
    """What was ordered of the tier in each change; None where it was left as it was."""
    return [change.get(tier) for _, change in system.place.changes]


def status(system: System) -> TierStatus:
    return system.reports[-1].status.tiers[-1]


def test_a_lost_worker_of_a_removed_tier_is_taken_over_and_the_tier_goes_when_nothing_is_left(redis_url: str, pool: Pool) -> None:
    submit(pool)

    async def scenario(changed: Pool, task_id: str) -> None:
        async with running(changed) as system:
            ordered(system, changed, gpu=1)
            await system.watch_for(2)
            assert (status(system).desired, status(system).reason) == (1, "Removed")
            assert "0 waiting + 1 in flight" in status(system).message
            await system.watch_for(PRESENCE_LIFE_MS / 1000)
            moved = job(redis_url, changed, task_id)
            assert (moved.tier, moved.attempt, moved.state) == ("cpu", 2, State.ADMITTED)
            await system.watch_for(planning.REMOVED_SECONDS + 2)
            assert counts(system)[-3:] == [0, None, 0], "it has no worker, is left alone for a while, and goes"

    with consumer(pool, "gpu") as connection:
        held = claim(redis_url, pool, connection, "gpu", "w.1")
        report(redis_url, pool, "gpu", "w.1", busy=1, age_ms=PRESENCE_LIFE_MS)
        asyncio.run(scenario(without_gpu(pool), held.task_id))


def test_workers_of_a_removed_tier_still_know_what_follows_a_failure_and_routers_send_nothing_there(
    redis_url: str, pool: Pool
) -> None:
    changed = without_gpu(pool)

    async def scenario() -> None:
        async with running(changed) as system:
            ordered(system, changed, gpu=1)
            await system.after()

    asyncio.run(scenario())
    with Redis.from_url(redis_url) as client:
        policy = Policy.load(client.get(pool.keys.policy))
    assert [tier.name for tier in policy.tiers] == ["cpu"]
    running_there = ledger.Job("t", "tasks.work", State.CLAIMED, 1, "gpu", "gpu", False, Reason.FREE_SLOT)
    for move in (ledger.after_failure(policy, running_there), ledger.after_loss(policy, running_there)):
        assert move
        assert (move.tier.name, move.attempt) == ("cpu", 2)
    given_back = ledger.again(policy, running_there)
    assert given_back
    assert (given_back.tier.name, given_back.attempt) == ("gpu", 1)


def test_messages_that_only_a_removed_tier_runs_keep_its_workers_and_no_more_than_it_takes(redis_url: str, pool: Pool) -> None:
    async def scenario(changed: Pool) -> None:
        async with running(changed) as system:
            for there, waiting, wanted in [(4, 9, 4), (4, 2, 2), (2, 2, 2), (0, 1, 1), (1, 0, 0)]:
                with Redis.from_url(redis_url) as client:
                    client.delete("gpu-tasks")
                publish(pool, "gpu-tasks", *[0] * waiting)
                ordered(system, changed, gpu=there)
                await system.after()
                assert system.place.ordered[changed.id].get("gpu", 0) == wanted, (there, waiting)

    asyncio.run(scenario(without_gpu(pool)))


def test_jobs_that_wait_on_a_removed_tier_without_workers_move_to_the_plain_one(redis_url: str, pool: Pool) -> None:
    tasks = {submit(pool) for _ in range(3)}
    changed = without_gpu(pool)

    async def scenario() -> None:
        async with running(changed) as system:
            await system.watch_for(2)
            assert {job(redis_url, changed, task).tier for task in tasks} == {"cpu"}
            await system.watch_for(planning.REMOVED_SECONDS + 2)
            assert counts(system)[-1] == 0

    asyncio.run(scenario())


def test_a_job_whose_message_was_lost_on_the_way_is_found_before_its_removed_tier_goes(
    redis_url: str, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "MISSING_MS", 0)
    monkeypatch.setattr(salvage, "OVERTAKEN_MS", 0)
    changed, task_id = without_gpu(pool), submit(pool)
    with Redis.from_url(redis_url) as client:
        client.delete("gpu-tasks")
        client.zadd(pool.keys.waiting("gpu"), {task_id: 1})

    async def scenario() -> None:
        async with running(changed) as system:
            await system.watch_for(PRESENCE_LIFE_MS / 1000)
            assert "1 unclaimed" in status(system).message
            await system.watch_for(3 * SWEEP_SECONDS)
            assert job(redis_url, changed, task_id).tier == "cpu"
            await system.watch_for(planning.REMOVED_SECONDS + 2)
            assert counts(system)[-1] == 0

    asyncio.run(scenario())


def test_a_removed_tier_drains_as_any_other_and_no_busy_worker_goes(redis_url: str, pool: Pool) -> None:
    changed = without_gpu(pool)
    submit(pool)

    async def scenario() -> None:
        async with running(changed) as system:
            busy, idle = (Replica(name, Phase.READY, 0.0, 1.0) for name in ("busy", "idle"))

            async def observe(_: Pool) -> dict[str, TierReplicas]:
                return {"cpu": TierReplicas(0), "gpu": TierReplicas(2, (busy, idle))}

            system.place.observe = observe  # type: ignore[method-assign,assignment]
            await system.watch_for(3)
            with Redis.from_url(redis_url, decode_responses=True) as client:
                assert client.smembers(pool.keys.drain) == {"idle"}
                assert set(counts(system)) == {2}, "it has not said that it takes nothing new"
                report(redis_url, pool, "gpu", "idle.1", age_ms=-LONG_MS)
                idles = json.loads(client.hget(pool.keys.presence("gpu"), "idle.1"))
                client.hset(pool.keys.presence("gpu"), "idle.1", json.dumps({**idles, "draining": True, "slots": 0}))
            await system.after()
            assert counts(system)[-1] == 1
            assert "1 in flight" in status(system).message

    with consumer(pool, "gpu") as connection:
        claim(redis_url, pool, connection, "gpu", "busy.1")
        report(redis_url, pool, "gpu", "busy.1", busy=1, age_ms=-LONG_MS)
        report(redis_url, pool, "gpu", "idle.1", age_ms=-LONG_MS)
        asyncio.run(scenario())


def test_a_message_of_a_later_time_keeps_a_worker_that_would_only_hand_it_back(redis_url: str, pool: Pool) -> None:
    report(redis_url, pool, "gpu", "w.1", age_ms=-LONG_MS)
    with Redis.from_url(redis_url, decode_responses=True) as client:
        presence = json.loads(client.hget(pool.keys.presence("gpu"), "w.1"))
        client.hset(pool.keys.presence("gpu"), "w.1", json.dumps({**presence, "scheduled": 1}))
        assert Presence.load(client.hget(pool.keys.presence("gpu"), "w.1")).scheduled == 1

    async def scenario(changed: Pool) -> None:
        async with running(changed) as system:
            ordered(system, changed, gpu=1)
            await system.after()
            assert system.place.ordered[changed.id]["gpu"] == 1
            assert "1 for a later time" in status(system).message

    asyncio.run(scenario(without_gpu(pool)))


def test_nothing_is_removed_while_the_broker_cannot_be_read_or_the_pool_is_not_active(redis_url: str, pool: Pool) -> None:
    async def scenario() -> None:
        for mode in (Mode.ADVISORY, Mode.PAUSED):
            changed = without_gpu(pool, mode=mode)
            async with running(changed) as system:
                ordered(system, changed, gpu=0)
                await system.watch_for(planning.REMOVED_SECONDS + 2)
                assert system.place.changes == []
                assert status(system).name == "gpu"
        changed = without_gpu(pool)
        async with running(changed) as system:
            ordered(system, changed, gpu=0)
            system.unknown.add(changed.id)
            await system.watch_for(planning.REMOVED_SECONDS + 2)
            assert set(counts(system)) == {None}
            system.unknown.clear()
            await system.watch_for(planning.REMOVED_SECONDS)
            assert set(counts(system)) == {None}, "nobody could know for how long it has been empty"
            await system.watch_for(2)
            assert counts(system)[-1] == 0

    asyncio.run(scenario())


def test_a_renamed_tier_has_the_queue_and_the_old_workers_leave_it(redis_url: str, pool: Pool) -> None:
    changed = without_gpu(pool, ACCELERATED)
    publish(pool, "gpu-tasks", 0, 0, 0)

    async def scenario() -> None:
        async with running(changed) as system:
            ordered(system, changed, gpu=2, a100=0)
            await system.after()
            assert system.place.ordered[changed.id] == {"a100": 3, "cpu": 0, "gpu": 0}
            assert status(system).waiting == 0, "no message counts twice"

    asyncio.run(scenario())


def test_what_a_worker_of_the_new_name_has_claimed_keeps_the_old_one_no_longer(redis_url: str, pool: Pool) -> None:
    changed = without_gpu(pool, ACCELERATED)
    task_id = submit(pool)
    with Redis.from_url(redis_url, decode_responses=True) as client, consumer(changed, "a100") as connection:
        client.zadd(pool.keys.waiting("gpu"), {task_id: 1})
        claim(redis_url, changed, connection, "a100", "w.1")
        assert ask(lambda broker: broker.sweep(redis_url, changed)) == []
        assert client.zcard(pool.keys.waiting("gpu")) == 0
        assert job(redis_url, changed, task_id).tier == "a100"


@pytest.mark.parametrize("holder", ["gpu", "a100"])
def test_what_a_worker_of_either_name_holds_for_a_later_time_is_not_missing(
    redis_url: str, pool: Pool, holder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "MISSING_MS", 0)
    monkeypatch.setattr(salvage, "OVERTAKEN_MS", 0)
    changed = without_gpu(pool, ACCELERATED)
    task_id = submit(pool)
    with Redis.from_url(redis_url, decode_responses=True) as client:
        client.zadd(pool.keys.waiting("gpu"), {task_id: 1})
        with consumer(changed, holder) as connection:
            assert take(connection, "gpu-tasks")
            for _ in range(3):
                assert ask(lambda broker: broker.sweep(redis_url, changed)) == []
            assert not client.llen("gpu-tasks")
            client.delete(pool.keys.unacked(holder), pool.keys.unacked_index(holder))
            said = [ask(lambda broker: broker.sweep(redis_url, changed)) for _ in range(2)]
        assert ["published again" in sentence for sentences in said for sentence in sentences] == [True]
        assert client.llen("gpu-tasks") == 1


def test_a_queue_that_another_pool_has_by_now_is_that_ones_at_once(
    redis_url: str, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "MISSING_MS", 0)
    monkeypatch.setattr(salvage, "OVERTAKEN_MS", 0)
    heir = make_pool(redis_url, "heir", created_at=5.0, tiers=[ACCELERATED, {**CPU, "queue": "other"}])
    changed = without_gpu(pool)
    task_id = submit(pool)

    async def scenario() -> None:
        async with running(changed, heir) as system:
            ordered(system, changed, gpu=2)
            await system.after()
            assert system.place.ordered[changed.id]["gpu"] == 0
            assert system.place.ordered[heir.id]["a100"] >= 1
            for one in (changed, heir):
                assert system.condition(one, ConditionType.QUEUE_SHARED) == "False"

    asyncio.run(scenario())
    with Redis.from_url(redis_url, decode_responses=True) as client:
        assert client.llen("gpu-tasks") == 1, "its workers run what waits there"
        client.zadd(pool.keys.waiting("gpu"), {task_id: 1})
        client.delete("gpu-tasks")

        async def sweeps(one: Pool) -> list[str]:
            redis = aioredis.Redis.from_url(redis_url, decode_responses=True)
            said = [sentence for _ in range(3) for sentence in await salvage.sweep(redis, one)]
            await redis.aclose()
            return said

        assert asyncio.run(sweeps(replace(changed, ceded=frozenset({"gpu-tasks"})))) == []
        assert not client.llen("gpu-tasks"), "who has the queue has perhaps run it"
        assert len(asyncio.run(sweeps(changed))) == 1


def test_what_a_deleted_pool_has_left_in_flight_is_taken_over_by_a_new_one_of_its_name(
    redis_url: str, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its workers have their grace period; what outlasts it stays where they held it: nobody tells them a queue any more."""
    monkeypatch.setattr(salvage, "UNRENEWED_SECONDS", -2)
    task_id = submit(pool)
    with consumer(pool, "gpu") as connection:
        claim(redis_url, pool, connection, "gpu", "w.1")
    ask(lambda broker: broker.forget(redis_url, pool))
    anew = replace(pool, uid="another")
    open_for_jobs(redis_url, anew, ROOM)
    assert len(ask(lambda broker: broker.sweep(redis_url, anew))) == 1
    moved = job(redis_url, anew, task_id)
    assert (moved.tier, moved.attempt) == ("cpu", 2)
