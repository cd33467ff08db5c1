"""The reconcile pass while something fails: Redis, a pool, the place where workers run, the pass itself."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from contextlib import nullcontext, suppress
from typing import Any

import pytest
from e2e.cluster.ports import reserve_port
from redis import Redis, RedisError
from tests import seeds
from tests.contract.broker import submit
from tests.contract.passes import running
from tests.seeds import claim, consumer, make_pool, publish, report
from tests.watching import until_then

from workerpool_operator import planning, witness
from workerpool_operator.local import redis_server
from workerpool_operator.local.redis_server import private_redis
from workerpool_operator.observation import Phase, Replica
from workerpool_operator.ports import Pool
from workerpool_operator.reconcile import SHORTEST_PAUSE_SECONDS
from workerpool_operator.status import ConditionType
from workerpool_routing import wire
from workerpool_routing.ledger import State
from workerpool_routing.wire import CAPACITY_LIFE_MS, PRESENCE_LIFE_MS

pytestmark = pytest.mark.contract


@pytest.fixture
def pool(redis_url: str) -> Pool:
    return make_pool(redis_url)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_without_redis_no_count_changes_and_it_recovers_by_itself(how: int, monkeypatch: pytest.MonkeyPatch) -> None:
    port = reserve_port()
    monkeypatch.setattr(redis_server, "free_port", lambda: port)

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
                with private_redis() if how == signal.SIGKILL else nullcontext():
                    await system.after(1)
                    assert system.condition(pool, ConditionType.BROKER_REACHABLE) == "True"
                    assert system.place.ordered[pool.id]["gpu"] == 2
                await system.broker.close()

    asyncio.run(scenario())


def test_without_redis_a_tier_that_is_not_there_is_created_with_its_minimum() -> None:
    tier = {"name": "cpu", "queue": "celery", "replicas": {"min": 2, "max": 3}, "template": seeds.TEMPLATE}
    pool = make_pool("redis://127.0.0.1:1/0", tiers=[tier])

    async def scenario() -> None:
        async with running(pool) as system:
            await system.after()
            await system.after()
            assert system.place.changes == [(pool.id, {"cpu": 2})]

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


def test_a_silent_worker_is_taken_for_lost_only_after_redis_answered_for_a_presence_life(redis_url: str, pool: Pool) -> None:
    async def scenario() -> None:
        async with running(pool) as system:
            await system.after()
            await asyncio.to_thread(submit, pool)
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
            await asyncio.to_thread(submit, pool)
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


def test_a_worker_whose_presence_redis_refuses_is_still_counted_on(redis_url: str, pool: Pool) -> None:
    async def scenario() -> None:
        async with running(pool) as system:
            system.place.workers["cpu"] = (Replica("w", Phase.READY, 0.0, 1.0),)
            report(redis_url, pool, "cpu", "w.1")
            await system.after()
            report(redis_url, pool, "cpu", "w.1", age_ms=PRESENCE_LIFE_MS)
            with Redis.from_url(redis_url) as client:
                client.config_set("min-replicas-to-write", "1")
                try:
                    await system.watch_for(3 * PRESENCE_LIFE_MS / 1000)
                finally:
                    client.config_set("min-replicas-to-write", "0")
            assert system.condition(pool, ConditionType.CAPACITY_AVAILABLE) == "True"
            await system.watch_for(PRESENCE_LIFE_MS / 1000 + 1)
            assert system.condition(pool, ConditionType.CAPACITY_AVAILABLE) == "False"

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
                await until_then(lambda: bool(caplog.messages), "it is told of")
                just_now = CAPACITY_LIFE_MS - 2_000
                await until_then(lambda: client.pttl(well.keys.capacity) > just_now, "it is published again and again")
                os.kill(server.pid, signal.SIGCONT)
                passes.cancel()
                await asyncio.wait([passes])

    asyncio.run(scenario())
    assert caplog.messages == ["test/well: gpu: worker dead.1 is lost, it has not reported for too long"]


def test_when_all_presence_expired_in_a_pause_of_redis_only_the_dead_are_reaped(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    life = 5_000
    for module in (wire, witness):
        monkeypatch.setattr(module, "PRESENCE_LIFE_MS", life)

    async def keeps_reporting(pool: Pool) -> None:
        while True:
            with suppress(RedisError):
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
                await until_then(lambda: bool(caplog.messages), "it is told of")
                assert time.monotonic() - began >= life / 1000
                await asyncio.sleep(1)
                for task in work:
                    task.cancel()
                await asyncio.gather(*work, return_exceptions=True)

    asyncio.run(scenario())
    assert caplog.messages == ["test/media: gpu: worker dead.1 is lost, it has not reported for too long"]


@pytest.mark.parametrize("turns", range(4))
def test_the_passes_end_also_when_they_are_cancelled_while_something_wakes_them(pool: Pool, turns: int) -> None:
    async def scenario() -> None:
        async with running(pool) as system:
            passes = asyncio.create_task(system.reconciler.run())
            await until_then(lambda: bool(system.reports), "a pass has ended")
            await asyncio.sleep(2 * SHORTEST_PAUSE_SECONDS)
            system.wake.set()
            for _ in range(turns):
                await asyncio.sleep(0)
            passes.cancel()
            assert await asyncio.wait([passes], timeout=60) == ({passes}, set())

    asyncio.run(scenario())


def test_a_pass_that_fails_is_followed_by_another(pool: Pool, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with running(pool) as system:
            system.reconciler.pools = None  # type: ignore[assignment]
            passes = asyncio.create_task(system.reconciler.run())
            await until_then(lambda: bool(caplog.messages), "it is told of")
            system.reconciler.pools = {pool.id: pool}
            system.wake.set()
            await until_then(lambda: bool(system.reports), "a pass has ended")
            passes.cancel()
            with suppress(asyncio.CancelledError):
                await passes

    asyncio.run(scenario())
    assert caplog.messages == ["the pass failed, the next one tries again"]
