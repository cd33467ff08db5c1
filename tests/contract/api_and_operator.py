"""What API pods and the operator do with the jobs of the app in ``jobs.py``."""

from __future__ import annotations

import asyncio
import time
from types import ModuleType
from typing import Any

from tests.contract.workers import APP
from tests.seeds import TEMPLATE
from tests.watching import until

from workerpool_operator.broker import RedisBroker
from workerpool_operator.model import WorkerPoolSpec
from workerpool_operator.ports import Pool
from workerpool_routing import Reason
from workerpool_routing.ledger import State


def submit(jobs: ModuleType, task: Any, *args: Any, **options: Any) -> Any:
    """Submit to the GPU tier, when it has its slot free."""
    until(jobs.pool.has_accelerated_workers, "a GPU slot is free")
    until(lambda: jobs.pool.should_accelerate(task).reason is Reason.FREE_SLOT, "the GPU queue is empty")
    return jobs.pool.submit(task, args, accelerated=True, **options)


def admit(jobs: ModuleType, signature: Any, tier: str = "gpu") -> Any:
    """The same signature, admitted to the tier's queue as routing does it for a step of a canvas."""
    result = signature.freeze()
    keys, now = jobs.pool.keys, int(time.time() * 1000)
    entry = {"version": 1, "state": "admitted", "attempt": 1, "task": signature.task, "tier": tier, "wanted": tier}
    jobs.pool.connection.client.hset(
        keys.job(result.id), mapping={**entry, "required": 0, "reason": Reason.FREE_SLOT, "admitted_at": now}
    )
    return signature.set(queue=f"{tier}-jobs", headers={"workerpool": {"attempt": 1}})


def claimed(jobs: ModuleType, task_id: str) -> Any:
    return until(lambda: (job := jobs.pool.job(task_id)) and job.state is State.CLAIMED and job, "it is claimed")


def outcome(jobs: ModuleType, task_id: str) -> tuple[State, dict[str, int]]:
    """How the job ended on the ledger, and how often each tier started it."""
    job = until(lambda: (j := jobs.pool.job(task_id)) and j.state.ended and j, f"{task_id} has ended")
    return job.state, job.starts


def operator_pool(url: str) -> Pool:
    """The app's pool as the operator has it."""
    tiers = [
        {"name": "gpu", "queue": "gpu-jobs", "accelerator": {"resource": "nvidia.com/gpu"}, "template": TEMPLATE},
        {"name": "cpu", "queue": "cpu-jobs", "template": TEMPLATE},
    ]
    spec = WorkerPoolSpec.model_validate({"app": APP, "broker": {"url": url}, "tiers": tiers})
    return Pool("test", "jobs", "uid", 1, 0.0, spec)


async def take_over_the_lost(url: str, tier: str) -> list[str]:
    """What the operator's pass does once presence has run out."""
    broker, pool = RedisBroker(asyncio.Event()), operator_pool(url)
    try:
        reading = await broker.read(url, [pool])
        assert isinstance(reading, dict)
        return [s for owner in reading[pool.id].tiers[tier].lost for s in await broker.take_over(url, pool, tier, owner)]
    finally:
        await broker.close()


def taken_over(url: str, task_id: str, tier: str = "gpu") -> list[str]:
    """What is said of that job; workers of other tests may be lost too."""
    return [sentence for sentence in asyncio.run(take_over_the_lost(url, tier)) if task_id in sentence]


def swept(url: str) -> list[str]:
    """What the operator finds that fell between the steps."""

    async def sweep() -> list[str]:
        broker = RedisBroker(asyncio.Event())
        try:
            return list(await broker.sweep(url, operator_pool(url)))
        finally:
            await broker.close()

    return asyncio.run(sweep())
