"""The reconcile pass over a real Redis; the place where workers run is a double that keeps what it was told."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import replace
from typing import Any

import pytest
from redis import Redis
from tests.contract import seeds
from tests.contract.seeds import claim, consumer, make_pool, publish, report

from workerpool_operator import planning, witness
from workerpool_operator.broker import RedisBroker
from workerpool_operator.local import redis_server
from workerpool_operator.local.redis_server import private_redis
from workerpool_operator.observation import TierReplicas, Unavailable
from workerpool_operator.ports import Pool, Report
from workerpool_operator.reconcile import SHORTEST_PAUSE_SECONDS, TICK_SECONDS, Reconciler
from workerpool_operator.status import ConditionType
from workerpool_routing import WorkerPool, wire
from workerpool_routing.decide import ACCELERATION, SERVICE_SECONDS
from workerpool_routing.ledger import State
from workerpool_routing.wire import CAPACITY_LIFE_MS, PRESENCE_LIFE_MS, Capacity, Policy

pytestmark = pytest.mark.contract


class Place:
    """Where workers would run: what is ordered by pool and tier, and every call that changed it."""

    def __init__(self) -> None:
        self.ordered: dict[str, dict[str, int]] = {}
        self.changes: list[tuple[str, dict[str, int]]] = []
        self.broken: set[str] = set()
        self.hanging: set[str] = set()
        self.first_start: float | None = None

    async def observe(self, pool: Pool) -> Mapping[str, TierReplicas]:
        ordered = self.ordered.get(pool.id, {})
        return {tier.name: TierReplicas(ordered.get(tier.name, 0), first_start=self.first_start) for tier in pool.tiers}

    async def scale(self, pool: Pool, replicas: Mapping[str, int], leaving: frozenset[str]) -> None:  # noqa: ARG002 nobody runs here
        if pool.id in self.broken:
            raise ConnectionResetError("the place is out of order")
        if pool.id in self.hanging:
            await asyncio.Event().wait()
        if self.ordered.get(pool.id) != dict(replicas):
            self.ordered[pool.id] = dict(replicas)
            self.changes.append((pool.id, dict(replicas)))


class System:
    """A Reconciler, its parts, and a clock set by hand; it is itself the port that knows URLs and the one that reports."""

    def __init__(self, *pools: Pool) -> None:
        self.now = 1_000.0
        self.reports: list[Report] = []
        self.unknown: set[str] = set()
        self.place = Place()
        self.wake = asyncio.Event()
        self.broker = RedisBroker(self.wake)
        self.reconciler = Reconciler(
            urls=self, broker=self.broker, workers=self.place, reporter=self, wake=self.wake, clock=lambda: self.now
        )
        self.reconciler.pools = {pool.id: pool for pool in pools}

    async def broker_url(self, pool: Pool) -> str | Unavailable:
        return Unavailable("no Secret") if pool.id in self.unknown else str(pool.spec.broker.url)

    async def report(self, report: Report) -> None:
        self.reports.append(report)

    async def after(self, seconds: float = 1.0) -> None:
        """A pass, so much later."""
        self.now += seconds
        await self.reconciler.reconcile_once()

    async def watch_for(self, seconds: float) -> None:
        """A pass a second, without a gap."""
        for _ in range(int(seconds)):
            await self.after(1)

    def condition(self, pool: Pool, kind: ConditionType) -> str:
        """Its status in the last report of the pool."""
        last = next(report for report in reversed(self.reports) if report.pool.id == pool.id)
        return next(condition.status for condition in last.status.conditions if condition.type is kind)


@asynccontextmanager
async def running(*pools: Pool) -> AsyncIterator[System]:
    system = System(*pools)
    try:
        yield system
    finally:
        await system.broker.close()


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


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_without_redis_no_count_changes_and_it_recovers_by_itself(how: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workerpool_operator.broker.TIMEOUT_SECONDS", 0.5)

    async def scenario() -> None:
        with private_redis() as server:
            pool = make_pool(server.url)
            publish(pool, "gpu-tasks", 0, 0)
            async with running(pool) as system:
                await system.after()
                os.kill(server.pid, how)
                for pause in (1, 60, 600):
                    await system.after(pause)
                    assert system.condition(pool, ConditionType.BROKER_REACHABLE) == "False"
                assert system.place.changes == [(pool.id, {"gpu": 2, "cpu": 0})]
                assert [tier.waiting for tier in system.reports[-1].status.tiers] == [None, None]
                warnings = [event.reason for report in system.reports for event in report.events if event.warning]
                assert warnings == ["BrokerUnreadable"]

                os.kill(server.pid, signal.SIGCONT)
                monkeypatch.setattr(redis_server, "free_port", lambda: server.port)
                with private_redis() if how == signal.SIGKILL else nullcontext():
                    await system.after(1)
                    assert system.condition(pool, ConditionType.BROKER_REACHABLE) == "True"
                    assert system.place.ordered[pool.id]["gpu"] == 2
                await system.broker.close()

    asyncio.run(scenario())


def test_without_redis_a_tier_that_is_not_there_is_created_with_its_minimum() -> None:
    pool = bounded("redis://127.0.0.1:1/0", min=2, max=3)

    async def scenario() -> None:
        async with running(pool) as system:
            await system.after()
            await system.after()
            assert system.place.changes == [(pool.id, {"cpu": 2})]

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


def test_a_pool_whose_secret_cannot_be_read_keeps_its_queues(redis_url: str) -> None:
    older, younger = make_pool(redis_url, "a", created_at=1.0), make_pool(redis_url, "b", created_at=2.0)
    newest = make_pool(redis_url, "c", created_at=3.0)

    async def scenario() -> None:
        async with running(younger, older) as system:
            await system.after()
            system.unknown = {older.id}
            system.reconciler.pools[newest.id] = newest
            await system.watch_for(3)
            assert system.condition(older, ConditionType.BROKER_REACHABLE) == "False"
            assert [system.condition(p, ConditionType.QUEUE_SHARED) for p in (younger, newest)] == ["True", "True"]
            assert system.place.ordered.keys() == {older.id}

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


def two_pools(url: str) -> tuple[Pool, Pool]:
    """Two pools with queues of their own."""
    prefixes = {"ill": "ill:", "well": "well:"}
    ill, well = (make_pool(url, name, broker={"url": url, "globalKeyPrefix": prefix}) for name, prefix in prefixes.items())
    return ill, well


def test_a_pool_that_fails_does_not_keep_the_others_from_their_pass(redis_url: str, caplog: pytest.LogCaptureFixture) -> None:
    ill, well = two_pools(redis_url)
    publish(well, "celery", 0)

    async def scenario() -> None:
        async with running(ill, well) as system:
            system.place.broken = {ill.id}
            for _ in range(3):
                await system.after()
            assert system.place.changes == [(well.id, {"gpu": 0, "cpu": 1})]
            assert (
                system.condition(ill, ConditionType.READY) == system.condition(ill, ConditionType.CAPACITY_AVAILABLE) == "Unknown"
            )
            assert system.condition(well, ConditionType.READY) == "True"
            message = next(r for r in reversed(system.reports) if r.pool.id == ill.id).status.conditions[0].message
            assert message.startswith("ConnectionResetError('the place is out of order'): the operator failed on this pool")
            system.place.broken = set()
            await system.after()
            assert ill.id in system.place.ordered
            assert system.condition(ill, ConditionType.READY) == "True"

    asyncio.run(scenario())
    assert [record.message for record in caplog.records] == [f"{ill.id}: the pass failed, the next one tries again"], "told once"


def test_a_decision_that_fails_leaves_no_status_that_says_otherwise(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ill, well = two_pools(redis_url)
    plan = planning.plan

    def fail(pool: Pool, *rest: Any) -> Any:
        if pool.id == ill.id:
            raise ZeroDivisionError("float division by zero")
        return plan(pool, *rest)

    async def scenario() -> None:
        async with running(ill, well) as system:
            await system.after()
            assert system.condition(ill, ConditionType.READY) == "True"
            before = dict(system.place.ordered[ill.id])
            monkeypatch.setattr(planning, "plan", fail)
            await system.after()
            assert system.condition(ill, ConditionType.READY) == "Unknown"
            assert system.condition(ill, ConditionType.SPILLING) == "Unknown"
            assert system.condition(well, ConditionType.READY) == "True"
            assert system.place.ordered[ill.id] == before
            monkeypatch.undo()
            await system.after()
            assert system.condition(ill, ConditionType.READY) == "True"

    asyncio.run(scenario())


def test_one_broker_that_is_down_keeps_only_its_own_pools_waiting(redis_url: str) -> None:
    down, up = make_pool("redis://127.0.0.1:1/0", "down"), make_pool(redis_url, "up")
    publish(up, "celery", 0)

    async def scenario() -> None:
        async with running(down, up) as system:
            await system.after()
            assert system.place.ordered[up.id] == {"gpu": 0, "cpu": 1}
            assert [system.condition(p, ConditionType.BROKER_REACHABLE) for p in (down, up)] == ["False", "True"]

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


def test_a_silent_worker_is_taken_for_lost_only_after_redis_answered_for_a_presence_life(redis_url: str, pool: Pool) -> None:
    async def scenario() -> None:
        async with running(pool) as system:
            await system.after()
            assert await asyncio.to_thread(submit, pool) == "gpu"
            with consumer(pool, "gpu") as connection:
                held = claim(redis_url, pool, connection, "gpu", "w.1")
                report(redis_url, pool, "gpu", "w.1", busy=1, age_ms=PRESENCE_LIFE_MS)
                await system.watch_for(PRESENCE_LIFE_MS / 1000 - 1)
                assert seeds.job(redis_url, pool, held.task_id).owner == "w.1"
                # Nobody has watched meanwhile: what a pass sees now says nothing about before.
                await system.after(30)
                await system.watch_for(PRESENCE_LIFE_MS / 1000 - 1)
                assert seeds.job(redis_url, pool, held.task_id).owner == "w.1"
                await system.after(1)
                taken_over = seeds.job(redis_url, pool, held.task_id)
                assert (taken_over.state, taken_over.tier, taken_over.attempt) == (State.ADMITTED, "cpu", 2)
                await system.after(1)
                assert seeds.job(redis_url, pool, held.task_id) == taken_over
                assert system.place.ordered[pool.id]["cpu"] == 1

    asyncio.run(scenario())


@pytest.mark.parametrize("setting", ["maxmemory", "min-replicas-to-write"])
def test_a_worker_whose_presence_redis_refuses_keeps_its_job(redis_url: str, pool: Pool, setting: str) -> None:
    async def scenario() -> None:
        async with running(pool) as system:
            await system.after()
            assert await asyncio.to_thread(submit, pool) == "gpu"
            with consumer(pool, "gpu") as connection, Redis.from_url(redis_url) as client:
                held = claim(redis_url, pool, connection, "gpu", "w.1")
                report(redis_url, pool, "gpu", "w.1", busy=1, age_ms=PRESENCE_LIFE_MS)
                client.config_set(setting, "1")
                try:
                    await system.watch_for(3 * PRESENCE_LIFE_MS / 1000)
                finally:
                    client.config_set(setting, "0")
                assert system.condition(pool, ConditionType.BROKER_REACHABLE) == "False"
                told = [event.reason for report in system.reports for event in report.events if event.warning]
                assert told == ["BrokerRefusesWrites"]
                await system.watch_for(PRESENCE_LIFE_MS / 1000)
                assert system.condition(pool, ConditionType.BROKER_REACHABLE) == "True"
                assert seeds.job(redis_url, pool, held.task_id).owner == "w.1"
                await system.after(1)
                assert seeds.job(redis_url, pool, held.task_id).attempt == 2

    asyncio.run(scenario())


@pytest.mark.parametrize("what", ["another broker", "the place of another pool", "the place of the pool itself"])
def test_what_hangs_delays_neither_reaping_nor_what_is_published(
    redis_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    life = 2_500
    monkeypatch.setattr(witness, "PRESENCE_LIFE_MS", life)
    well = make_pool(redis_url, "well")
    report(redis_url, well, "gpu", "dead.1", age_ms=PRESENCE_LIFE_MS)

    async def scenario() -> None:
        with private_redis() as server, Redis.from_url(redis_url) as client:
            other = make_pool(server.url, "other")
            async with running(well, other) as system:
                system.reconciler._clock = time.time
                system.place.hanging = {"the place of another pool": {other.id}, "the place of the pool itself": {well.id}}.get(
                    what, set()
                )
                if what == "another broker":
                    os.kill(server.pid, signal.SIGSTOP)
                passes = asyncio.create_task(system.reconciler.run())
                await until(lambda: bool(caplog.messages), 12)
                assert client.pttl(well.keys.capacity) > CAPACITY_LIFE_MS - 2_000
                os.kill(server.pid, signal.SIGCONT)
                passes.cancel()
                await asyncio.wait([passes])

    asyncio.run(scenario())
    assert caplog.messages == ["test/well: gpu: worker dead.1 is lost, it has not reported for too long"]


def test_when_all_presence_expired_in_a_pause_of_redis_only_the_dead_are_reaped(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    life = 2_500
    for module in (wire, witness):
        monkeypatch.setattr(module, "PRESENCE_LIFE_MS", life)

    async def keeps_reporting(pool: Pool) -> None:
        while True:
            with suppress(ConnectionError):
                await asyncio.to_thread(report, str(pool.spec.broker.url), pool, "gpu", "alive.1")
            await asyncio.sleep(0.5)

    async def scenario() -> None:
        with private_redis() as server:
            pool = make_pool(server.url)
            report(server.url, pool, "gpu", "dead.1")
            async with running(pool) as system:
                system.reconciler._clock = time.time
                work = [asyncio.create_task(one) for one in (keeps_reporting(pool), system.reconciler.run())]
                await asyncio.sleep(0.5)
                os.kill(server.pid, signal.SIGSTOP)
                await asyncio.sleep(life / 1000 + 0.5)
                os.kill(server.pid, signal.SIGCONT)
                began = time.monotonic()
                assert caplog.messages == []
                await until(lambda: bool(caplog.messages))
                assert time.monotonic() - began >= life / 1000
                await asyncio.sleep(1)
                for task in work:
                    task.cancel()
                await asyncio.gather(*work, return_exceptions=True)

    asyncio.run(scenario())
    assert caplog.messages == ["test/media: gpu: worker dead.1 is lost, it has not reported for too long"]


def test_causes_that_come_together_share_a_pass_and_without_any_there_is_the_tick(pool: Pool) -> None:
    async def scenario() -> None:
        async with running(pool) as system:
            passes = asyncio.create_task(system.reconciler.run())
            await until(lambda: len(system.reports) == 1)
            began = time.monotonic()
            for _ in range(50):
                system.wake.set()
                await asyncio.sleep(SHORTEST_PAUSE_SECONDS / 50)
            await asyncio.sleep(2 * SHORTEST_PAUSE_SECONDS)
            assert 2 <= len(system.reports) <= 2 + (time.monotonic() - began) / SHORTEST_PAUSE_SECONDS
            seen, began = len(system.reports), time.monotonic()
            await until(lambda: len(system.reports) > seen)
            assert time.monotonic() - began > TICK_SECONDS / 2
            passes.cancel()
            with suppress(asyncio.CancelledError):
                await passes

    asyncio.run(scenario())


@pytest.mark.parametrize("turns", range(4))
def test_the_passes_end_also_when_they_are_cancelled_while_something_wakes_them(pool: Pool, turns: int) -> None:
    async def scenario() -> None:
        async with running(pool) as system:
            passes = asyncio.create_task(system.reconciler.run())
            await until(lambda: bool(system.reports))
            await asyncio.sleep(2 * SHORTEST_PAUSE_SECONDS)
            system.wake.set()
            for _ in range(turns):
                await asyncio.sleep(0)
            passes.cancel()
            assert await asyncio.wait([passes], timeout=1) == ({passes}, set())

    asyncio.run(scenario())


def test_a_pass_that_fails_is_followed_by_another(pool: Pool, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with running(pool) as system:
            system.reconciler.pools = None  # type: ignore[assignment]
            passes = asyncio.create_task(system.reconciler.run())
            await until(lambda: bool(caplog.messages))
            system.reconciler.pools = {pool.id: pool}
            system.wake.set()
            await until(lambda: bool(system.reports))
            passes.cancel()
            with suppress(asyncio.CancelledError):
                await passes

    asyncio.run(scenario())
    assert caplog.messages == ["the pass failed, the next one tries again"]


async def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


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
