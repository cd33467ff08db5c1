"""What a pass cannot trust: clocks that are set, workers that report and do not exist. Nothing is lost, nothing moves twice."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
from redis import Redis
from tests.contract.broker import ROOM, open_for_jobs, submit
from tests.contract.passes import running
from tests.seeds import claim, consumer, job, line, make_pool, report

from workerpool_operator.broker import RedisBroker
from workerpool_operator.observation import BrokerReading, Unavailable
from workerpool_operator.ports import Pool
from workerpool_routing.ledger import State
from workerpool_routing.wire import PRESENCE_LIFE_MS, Milliseconds

pytestmark = pytest.mark.contract

HOUR = 3_600.0
PASSES = 12
"""More than a presence life of them, at one a second."""


@pytest.fixture
def pool(redis_url: str) -> Pool:
    pool = make_pool(redis_url)
    open_for_jobs(redis_url, pool, ROOM)
    return pool


@pytest.mark.parametrize("jump", [HOUR, -HOUR])
def test_a_clock_of_the_operator_that_is_set_moves_no_job_and_takes_no_worker_from_one(
    redis_url: str, pool: Pool, jump: float
) -> None:
    ids = [submit(pool) for _ in range(3)]

    async def scenario() -> None:
        async with running(pool) as system:
            system.now = 10 * HOUR
            for step in (0.0, jump):
                system.now += step
                for _ in range(PASSES):
                    report(redis_url, pool, "gpu", "gpu-a.1", busy=1)
                    await system.after()
            assert min(replicas["gpu"] for _, replicas in system.place.changes) >= 1

    with consumer(pool, "gpu") as connection:
        held = claim(redis_url, pool, connection, "gpu", "gpu-a.1")
        asyncio.run(scenario())
    assert (job(redis_url, pool, held.task_id).state, job(redis_url, pool, held.task_id).attempt) == (State.CLAIMED, 1)
    with Redis.from_url(redis_url, decode_responses=True) as client:
        queued = [line(client, pool.keys.queue_list(queue, 0)) for queue in ("gpu-tasks", "celery")]
    assert sorted([held.task_id, *queued[0], *queued[1]]) == sorted(ids)


class SetAhead(RedisBroker):
    """A Redis whose clock is set ahead by so much."""

    seconds = 0.0

    async def read(self, url: str, pools: Sequence[Pool]) -> Mapping[str, BrokerReading | Unavailable] | Unavailable:
        answer = await super().read(url, pools)
        if isinstance(answer, Unavailable):
            return answer
        ahead = round(1000 * self.seconds)
        return {
            name: replace(reading, time=Milliseconds(reading.time + ahead)) if isinstance(reading, BrokerReading) else reading
            for name, reading in answer.items()
        }


def test_a_clock_of_redis_that_is_set_takes_no_job_from_workers_that_only_look_silent(redis_url: str, pool: Pool) -> None:
    submit(pool)

    async def scenario() -> None:
        async with running(pool) as system:
            broker = SetAhead(system.wake)
            system.reconciler._broker = system.reconciler._reaper._broker = broker
            for _ in range(PASSES):
                report(redis_url, pool, "gpu", "gpu-a.1", busy=1)
                await system.after()
            broker.seconds = HOUR
            report(redis_url, pool, "gpu", "gpu-a.1", busy=1, age_ms=round(1000 * HOUR))
            for _ in range(3):
                await system.after()
            await broker.close()

    with consumer(pool, "gpu") as connection:
        held = claim(redis_url, pool, connection, "gpu", "gpu-a.1")
        asyncio.run(scenario())
    assert (job(redis_url, pool, held.task_id).state, job(redis_url, pool, held.task_id).attempt) == (State.CLAIMED, 1)


def test_a_worker_that_reports_and_does_not_exist_serves_no_job_and_is_forgotten(redis_url: str, pool: Pool) -> None:
    task_id = submit(pool)
    report(redis_url, pool, "gpu", "ghost.1")

    async def scenario() -> None:
        async with running(pool) as system:
            await system.after()
            assert system.place.ordered[pool.id] == {"gpu": 1, "cpu": 0}, "for the job, whatever reports"
            report(redis_url, pool, "gpu", "ghost.1", age_ms=PRESENCE_LIFE_MS)
            await system.watch_for(PASSES)
            assert system.place.ordered[pool.id]["gpu"] == 1

    asyncio.run(scenario())
    assert (job(redis_url, pool, task_id).state, job(redis_url, pool, task_id).tier) == (State.ADMITTED, "gpu")
    with Redis.from_url(redis_url, decode_responses=True) as client:
        assert client.hlen(pool.keys.presence("gpu")) == 0
        assert [json.loads(text)["headers"]["id"] for text in client.lrange(pool.keys.queue_list("gpu-tasks", 0), 0, -1)] == [
            task_id
        ]
