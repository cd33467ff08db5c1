"""The reconcile pass over a real Redis; the place where workers run is a double that keeps what it was told."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from redis import Redis
from tests import seeds
from tests.contract.passes import System, running
from tests.seeds import claim, consumer, make_pool, publish, report
from tests.watching import until_then

from workerpool_operator import planning
from workerpool_operator.ports import Pool
from workerpool_operator.reconcile import SHORTEST_PAUSE_SECONDS, TICK_SECONDS
from workerpool_operator.status import ConditionType
from workerpool_routing import WorkerPool
from workerpool_routing.decide import ACCELERATION, SERVICE_SECONDS
from workerpool_routing.wire import PRESENCE_LIFE_MS, Capacity, Policy

pytestmark = pytest.mark.contract


def submit(pool: Pool) -> str:
    """Admit a job that asks for the accelerated tier; the tier that it gets."""
    with seeds.celery_app(pool) as app:
        return str(WorkerPool(pool.id, app).submit(app.tasks["tasks.work"], accelerated=True).tier)


def bounded(url: str, **replicas: int) -> Pool:
    """A pool of one plain tier on the queue ``celery`` with workers of two slots."""
    tier = {"name": "cpu", "queue": "celery", "concurrency": 2, "replicas": replicas, "template": seeds.TEMPLATE}
    return make_pool(url, tiers=[tier])


@pytest.fixture
def pool(redis_url: str) -> Pool:
    return make_pool(redis_url)


def test_a_tier_goes_from_zero_straight_to_its_need(redis_url: str, pool: Pool) -> None:
    publish(pool, "gpu-tasks", 0, 3, 9)

    async def scenario() -> None:
        async with running(pool) as system:
            await system.after()
            assert system.place.changes == [(pool.id, {"gpu": 3, "cpu": 0})]
            await system.after()
            assert len(system.place.changes) == 1
            (first, _) = system.reports
            assert [event.message for event in first.events if event.message.startswith("gpu: 0 → 3: 3 waiting")]
            assert system.condition(pool, ConditionType.READY) == "True"

    asyncio.run(scenario())


@pytest.mark.parametrize(("messages", "replicas"), [(0, 1), (1, 1), (3, 2), (5, 3), (9, 3)])
def test_need_is_in_workers_of_so_many_slots_between_minimum_and_maximum(redis_url: str, messages: int, replicas: int) -> None:
    pool = bounded(redis_url, min=1, max=3)
    publish(pool, "celery", *[0] * messages)

    async def scenario() -> None:
        async with running(pool) as system:
            await system.after()
            assert system.place.ordered[pool.id] == {"cpu": replicas}

    asyncio.run(scenario())


def test_messages_that_are_held_keep_their_workers(redis_url: str, pool: Pool) -> None:
    publish(pool, "gpu-tasks", 0, 0)
    report(redis_url, pool, "gpu", "gpu-a.1", busy=1)
    report(redis_url, pool, "gpu", "gpu-b.1")

    async def scenario() -> None:
        async with running(pool) as system:
            with consumer(pool, "gpu") as connection:
                first = seeds.take(connection, "gpu-tasks")
                seeds.take(connection, "gpu-tasks").ack()
                await system.after()
                assert system.place.ordered[pool.id]["gpu"] == 1
                first.ack()
            await system.after(1)
            assert system.place.ordered[pool.id]["gpu"] == 1
            with Redis.from_url(redis_url) as client:
                client.delete(pool.keys.presence("gpu"))  # who reports is there, so that nobody would be taken away unmarked
            await system.watch_for(1_000)
            assert system.place.ordered[pool.id]["gpu"] == 0

    asyncio.run(scenario())


def test_a_job_that_spills_orders_one_slot_and_stays_demand_of_the_tier_it_wanted(redis_url: str, pool: Pool) -> None:
    full = planning.policy(pool.spec)

    async def scenario() -> None:
        async with running(pool) as system:
            await system.broker.publish(redis_url, pool, full, Capacity())
            assert await asyncio.to_thread(submit, pool) == "cpu"
            await system.after()
            assert system.place.ordered[pool.id] == {"gpu": 0, "cpu": 1}, "it orders where it waits"
            assert system.condition(pool, ConditionType.SPILLING) == "True"
            with consumer(pool, "cpu") as connection:
                claim(redis_url, pool, connection, "cpu", "w.1")
                await system.after()
                assert system.place.ordered[pool.id] == {"gpu": 1, "cpu": 1}, "has never been seen to run there, and runs here"

    asyncio.run(scenario())


def test_what_the_pass_publishes_lets_the_library_route_to_a_tier_at_zero(redis_url: str, pool: Pool) -> None:
    async def scenario() -> None:
        async with running(pool) as system:
            await system.after()
            assert await asyncio.to_thread(submit, pool) == "gpu"
            await system.after()
            assert system.place.ordered[pool.id] == {"gpu": 1, "cpu": 0}

    asyncio.run(scenario())


@pytest.mark.parametrize(("mode", "desired"), [("Advisory", 1), ("Paused", 0)])
def test_a_pool_that_is_set_aside_is_only_looked_at(redis_url: str, mode: str, desired: int) -> None:
    pool = make_pool(redis_url, mode=mode)
    publish(pool, "gpu-tasks", 0)
    report(redis_url, pool, "gpu", "lost.1", age_ms=PRESENCE_LIFE_MS)

    async def scenario() -> None:
        async with running(pool) as system:
            await system.watch_for(12)
            assert system.place.changes == []
            (gpu, _) = system.reports[-1].status.tiers
            assert (gpu.desired, gpu.waiting) == (desired, 1)
            assert system.condition(pool, ConditionType.PAUSED) == "True"

    asyncio.run(scenario())
    with Redis.from_url(redis_url) as client:
        assert client.exists(pool.keys.policy, pool.keys.capacity) == 0
        assert client.hlen(pool.keys.presence("gpu")) == 1


def test_of_two_pools_on_one_queue_the_younger_is_held(redis_url: str) -> None:
    younger, older = make_pool(redis_url, "a", created_at=2.0), make_pool(redis_url, "b", created_at=1.0)
    publish(older, "celery", 0)

    async def scenario() -> None:
        async with running(younger, older) as system:
            await system.after()
            assert system.place.changes == [(older.id, {"gpu": 0, "cpu": 1})]
            assert system.condition(younger, ConditionType.QUEUE_SHARED) == "True"
            assert system.condition(younger, ConditionType.READY) == "False"
            assert system.condition(older, ConditionType.QUEUE_SHARED) == "False"
            del system.reconciler.pools[older.id]
            await system.after()
            assert system.condition(younger, ConditionType.QUEUE_SHARED) == "False"
            assert system.place.ordered[younger.id] == {"gpu": 0, "cpu": 1}

    asyncio.run(scenario())
    with Redis.from_url(redis_url) as client:
        assert client.exists(younger.keys.policy) == 1


@pytest.mark.parametrize(
    ("old", "new"), [("127.0.0.1", "localhost"), ("redis://", "redis://default@"), ("/0", ""), ("/0", "?db=0")]
)
def test_one_queue_is_one_queue_however_its_url_is_spelled(redis_url: str, old: str, new: str) -> None:
    older, younger = make_pool(redis_url, "a", created_at=1.0), make_pool(redis_url.replace(old, new), "b", created_at=2.0)
    assert older.spec.broker.url != younger.spec.broker.url

    async def scenario() -> None:
        async with running(younger, older) as system:
            await system.after()
            assert [system.condition(p, ConditionType.QUEUE_SHARED) for p in (older, younger)] == ["False", "True"]
            assert system.place.ordered.keys() == {older.id}

    asyncio.run(scenario())


def test_another_database_of_one_redis_has_queues_of_its_own(redis_url: str) -> None:
    pools = make_pool(redis_url, "a"), make_pool(redis_url.replace("/0", "/1"), "b")

    async def scenario() -> None:
        async with running(*pools) as system:
            await system.after()
            assert [system.condition(pool, ConditionType.QUEUE_SHARED) for pool in pools] == ["False", "False"]

    asyncio.run(scenario())


def test_a_pool_that_moves_to_another_url_leaves_no_connection_behind(redis_url: str, pool: Pool) -> None:
    async def scenario() -> None:
        async with running(pool) as system:
            await system.after()
            url = f"{redis_url}?client_name=rotated"
            system.reconciler.pools[pool.id] = make_pool(url)
            await system.after()
            assert system.broker._clients.keys() == {url}

    asyncio.run(scenario())


def test_any_number_of_pools_on_one_redis_is_served_over_a_few_connections(redis_url: str) -> None:
    prefixed = [{"url": redis_url, "globalKeyPrefix": f"{n}:"} for n in range(110)]
    pools = [make_pool(redis_url, f"pool-{n}", broker=broker) for n, broker in enumerate(prefixed)]

    async def scenario() -> None:
        async with running(*pools) as system:
            unserved = pools
            for _ in range(10):  # a busy machine may make one late
                await system.after()
                unserved = [pool for pool in pools if system.condition(pool, ConditionType.BROKER_REACHABLE) != "True"]
                if not unserved:
                    break
            assert unserved == []

    asyncio.run(scenario())
    with Redis.from_url(redis_url) as client:
        assert client.exists(*[pool.keys.policy for pool in pools]) == len(pools)


def test_a_pool_that_was_removed_starts_afresh_when_it_comes_back(redis_url: str, pool: Pool) -> None:
    publish(pool, "gpu-tasks", 0, 0, 0)

    async def scenario() -> None:
        async with running(pool) as system:
            await system.after()
            assert system.place.ordered.pop(pool.id) == {"gpu": 3, "cpu": 0}
            del system.reconciler.pools[pool.id]
            await system.after()
            with Redis.from_url(redis_url) as client:
                client.delete("gpu-tasks")
            system.reconciler.pools[pool.id] = replace(pool, generation=1)
            await system.after()
            assert system.place.ordered[pool.id] == {"gpu": 0, "cpu": 0}

    asyncio.run(scenario())


async def pause(system: System) -> float:
    """The seconds until another pass has ended."""
    seen, began = len(system.reports), time.monotonic()
    await until_then(lambda: len(system.reports) > seen, "another pass has ended")
    return time.monotonic() - began


def test_causes_that_come_together_share_a_pass_and_without_any_there_is_the_tick(pool: Pool) -> None:
    async def scenario() -> None:
        async with running(pool) as system:
            passes = asyncio.create_task(system.reconciler.run())
            await until_then(lambda: len(system.reports) == 1, "a pass has ended")
            began = time.monotonic()
            for _ in range(50):
                system.wake.set()
                await asyncio.sleep(SHORTEST_PAUSE_SECONDS / 50)
            await until_then(lambda: len(system.reports) > 1, "another pass has ended")
            assert len(system.reports) <= 2 + (time.monotonic() - began) / SHORTEST_PAUSE_SECONDS
            pauses = [await pause(system) for _ in range(3)]
            assert max(pauses) > TICK_SECONDS / 2
            passes.cancel()
            with suppress(asyncio.CancelledError):
                await passes

    asyncio.run(scenario())


def test_the_first_jobs_are_told_what_the_place_knows_of_starts(pool: Pool) -> None:
    async def scenario() -> None:
        async with running(pool) as system:
            system.place.first_start = 4.0
            await system.after()
            with seeds.celery_app(pool) as app:
                library = WorkerPool(pool.id, app)
                assert library.submit(app.tasks["tasks.work"], accelerated=True).expected_wait == 4.0, "not ordered yet"
                await system.after()
                told = library.submit(app.tasks["tasks.work"], accelerated=True).expected_wait
            assert told is not None
            assert told <= 4.0 + SERVICE_SECONDS / ACCELERATION, "on its way, with one job ahead that nobody knows"

    asyncio.run(scenario())


def test_capacity_follows_what_is_ordered(redis_url: str, pool: Pool) -> None:
    publish(pool, "gpu-tasks", 0)

    async def capacity(system: System) -> Any:
        with Redis.from_url(redis_url) as client:
            await system.after()
            assert Policy.load(client.get(pool.keys.policy)) == planning.policy(pool.spec)
            gpu = Capacity.load(client.get(pool.keys.capacity)).tiers["gpu"]
            (seconds, _), starting = client.time(), gpu.starting
            assert all(0 < group.ready_at - 1000 * seconds <= 1000 * (gpu.start_seconds + 1) for group in starting)
            return sum(group.slots for group in starting), gpu.startable

    async def scenario() -> None:
        async with running(pool) as system:
            assert await capacity(system) == (1, 3)
            report(redis_url, pool, "gpu", "w.1")
            assert await capacity(system) == (0, 3)

    asyncio.run(scenario())
