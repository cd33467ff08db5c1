"""The operator's broker port, asked one question at a time, and a pool that takes jobs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from tests import seeds
from tests.watching import until

from workerpool_operator import planning
from workerpool_operator.broker import RedisBroker
from workerpool_operator.observation import BrokerReading, Unavailable
from workerpool_operator.ports import Pool
from workerpool_routing import WorkerPool
from workerpool_routing.wire import Capacity, TierCapacity

Answer = TypeVar("Answer")

CAPACITY = Capacity({"gpu": TierCapacity(startable=1)})
ROOM = Capacity({"gpu": TierCapacity(startable=100)})


def ask(question: Callable[[RedisBroker], Awaitable[Answer]]) -> Answer:
    async def scenario() -> Answer:
        broker = RedisBroker(asyncio.Event())
        try:
            return await question(broker)
        finally:
            await broker.close()

    return asyncio.run(scenario())


def read(url: str, pool: Pool) -> BrokerReading:
    answer = ask(lambda broker: broker.read(url, [pool]))
    assert not isinstance(answer, Unavailable), answer.why
    one = answer[pool.id]
    assert not isinstance(one, Unavailable), one.why
    return one


def open_for_jobs(url: str, pool: Pool, capacity: Capacity = CAPACITY) -> None:
    """Tell policy and capacity; on a busy machine Redis may need longer for it than a pass waits."""
    policy = planning.policy(pool.spec)
    until(lambda: ask(lambda broker: broker.publish(url, pool, policy, capacity)) is None, "the pool is published")


def submit(pool: Pool, *, priority: int | None = None) -> str:
    """Admit a job that asks for the accelerated tier; its task id."""
    with seeds.celery_app(pool) as app:
        decision = WorkerPool(pool.id, app).submit(app.tasks["tasks.work"], accelerated=True, priority=priority)
    assert decision.tier == "gpu"
    assert decision.task_id
    return decision.task_id
