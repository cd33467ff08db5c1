"""A tier in dev mode that is scaled down under load, again and again; the contract tests do it some times, chaos many."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, chdir
from dataclasses import replace
from pathlib import Path
from typing import Any

from celery import Celery
from redis import Redis
from tests.seeds import make_pool

from workerpool_operator.dev import Session, session
from workerpool_operator.local.redis_server import private_redis
from workerpool_operator.ports import Pool, Report
from workerpool_routing import Tier, WorkerPool
from workerpool_routing.ledger import Job

MOST = 5
PATIENCE_SECONDS = 150.0

APP = """
import time
from celery import Celery
from workerpool_routing import WorkerPool

app = Celery("tasks")
pool = WorkerPool("test/media", app)

@app.task
def work(seconds):
    time.sleep(seconds)
"""


class Watcher:
    """Remembers the last report."""

    last: Report | None = None

    async def report(self, report: Report) -> None:
        self.last = report


class Stage:
    """One plain tier in dev mode, its app as an API has it, and the bounds in the test's hand."""

    def __init__(self, dev: Session, watcher: Watcher, app: Celery) -> None:
        self.dev, self.watcher, self.app = dev, watcher, app
        tier = Tier("cpu", "celery", accelerated=False)
        self.pool = WorkerPool(dev.pool.id, app, tiers=[tier], timeout=5)
        self.redis: Any = Redis.from_url(dev.broker_url, decode_responses=True)
        self.jobs: list[str] = []

    def bound(self, least: int, most: int) -> None:
        pool = self.dev.pool
        tiers = tuple(tier.model_copy(update={"replicas": _bounds(tier, least, most)}) for tier in pool.spec.tiers)
        spec = pool.spec.model_copy(update={"tiers": tiers})
        self.dev.reconciler.pools[pool.id] = replace(pool, spec=spec)

    def submit(self, seconds: float) -> None:
        self.jobs.append(str(self.pool.submit(self.app.tasks["tasks.work"], (seconds,)).task_id))

    async def running(self) -> int:
        return (await self.dev.workers.observe(self.dev.pool))["cpu"].desired

    async def until_running(self, count: int) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while await self.running() > count:
            assert time.monotonic() < deadline, f"not {count} workers: {self.watcher.last and self.watcher.last.status.tiers}"
            await asyncio.sleep(0.05)

    def ready(self) -> int:
        return sum(worker.slots for worker in self.pool.workers().values())

    def entries(self) -> list[Job]:
        found = [Job.load(task, self.redis.hgetall(self.dev.pool.keys.job(task))) for task in self.jobs]
        return [job for job in found if job is not None]

    async def until(self, holds: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not holds():
            assert time.monotonic() < deadline, f"{what}: {self.watcher.last and self.watcher.last.status.tiers}"
            await asyncio.sleep(0.1)


def _work(seconds: float) -> None:
    """Nobody runs it here."""


def _bounds(tier: Any, least: int, most: int) -> Any:
    return tier.replicas.model_copy(update={"min": least, "max": most})


@asynccontextmanager
async def staged(pool: Pool, directory: Path) -> AsyncIterator[Stage]:
    watcher = Watcher()
    async with session(pool, directory=directory, reporter=watcher, broker_url=str(pool.spec.broker.url)) as dev:
        app = Celery("tasks", broker=dev.broker_url)
        app.task(_work, name="tasks.work")
        with app:
            yield Stage(dev, watcher, app)


def small_pool(url: str, directory: Path) -> Pool:
    """A pool of one plain tier whose app stands in that directory; the grace period is shorter than most jobs."""
    (directory / "tasks.py").write_text(APP)
    template = {"spec": {"terminationGracePeriodSeconds": 1, "containers": [{"name": "worker", "args": ["-P", "solo"]}]}}
    return make_pool(url, tiers=[{"name": "cpu", "queue": "celery", "replicas": {"min": 1, "max": 1}, "template": template}])


async def scale_down(directory: Path, times: int, pools: int = 1) -> list[Job]:
    """Lower the count by one so many times while every worker is at work, in that many pools; every job, when all have ended."""
    with chdir(directory):
        each = [_scale_down(directory, f"logs-{n}", times // pools) for n in range(pools)]
        return [job for jobs in await asyncio.gather(*each) for job in jobs]


async def _scale_down(directory: Path, logs: str, times: int) -> list[Job]:
    with private_redis() as server:
        async with staged(small_pool(server.url, directory), directory / logs) as stage:
            loading = asyncio.create_task(_load(stage))
            downs = 0
            while downs < times:
                stage.bound(MOST, MOST)
                await stage.until(lambda: stage.ready() >= MOST, "all workers are ready")
                for most in range(MOST - 1, 0, -1):
                    stage.bound(1, most)
                    await stage.until_running(most)
                    assert not loading.done(), loading.result()
                    downs += 1
            loading.cancel()
            await stage.until(lambda: all(job.state.ended for job in stage.entries()), "every job has ended")
            return stage.entries()


async def _load(stage: Stage) -> None:
    """Keep every worker at work, and some jobs waiting; most of them last longer than the grace period."""
    while True:
        for _ in range(max(0, 3 - stage.redis.llen("celery"))):
            await asyncio.to_thread(stage.submit, 0.8 + 0.4 * (len(stage.jobs) % 4))
        await asyncio.sleep(0.1)
