"""An outage of all accelerators, lived through by the operator's own pass, a Redis and Celery workers.

``make bench-outage`` prints the table of docs/benchmarks.md in less than four minutes. Beside each run, for the very jobs that
came and the very time for which the workers were away: what the simulator says, and what ideal late binding would reach. All is a
fifteenth of the simulated outage of ten minutes, but for the 8 s after which a lost worker is missed.
"""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from celery import Celery
from redis import Redis

from benchmarks.scaling import SLOWDOWN, bursty, one_queue
from benchmarks.sleeping import ENDS
from workerpool_operator.broker import RedisBroker
from workerpool_operator.local import LocalWorkers
from workerpool_operator.local.guardian import kill_group
from workerpool_operator.local.redis_server import private_redis
from workerpool_operator.model import WorkerPoolSpec
from workerpool_operator.observation import Phase, Replica, TierReplicas, Unavailable
from workerpool_operator.ports import Pool, Report
from workerpool_operator.reconcile import Reconciler
from workerpool_operator.simulation import engine
from workerpool_operator.simulation.compare import quantile
from workerpool_operator.simulation.engine import Outage, TierSetup, World
from workerpool_operator.simulation.policies import Operator
from workerpool_operator.simulation.trace import Trace
from workerpool_routing import WorkerPool
from workerpool_routing.decide import Reason
from workerpool_routing.ledger import Job, State

FAST, SLOTS = 4, 4
"""Accelerated workers, and slots of a plain one."""

JOB_SECONDS = 0.5
"""On an accelerator, on average."""

PATIENCE_SECONDS = 240.0


@dataclass(frozen=True, slots=True)
class Scenario:
    """How many plain workers there are at least and at most; when the outage begins and ends, and until when jobs come.

    By default the jobs take half of what 4 accelerated slots and 8 others can do.
    """

    plain: tuple[int, int]
    begins: float = 20.0
    ends: float = 60.0
    last: float = 85.0
    jobs_a_second: float = 5.3
    target_wait: int = 5


SCENARIOS = (Scenario((2, 2)), Scenario((2, 4)))


@dataclass(frozen=True, slots=True)
class Lived:
    """What came of a run; times are seconds since its beginning.

    Attributes:
        jobs: as they were admitted, with their lengths.
        waits: of each, from its admission to its first start, by the ledger.
        outage: when the accelerated workers were taken away, and when they were given back.
        back: when the first of them was ready again.
        start_seconds: how long a worker took to start.
        lost: jobs that were not done in the end.
        twice: jobs whose code came to its end more often than once, and once more for each worker that they lost: it may be
            killed between the end of the code and the record of it.
        moved: how many waiting jobs went to the plain tier, and how many came home.
    """

    jobs: Trace
    waits: Sequence[float]
    outage: Outage
    back: float
    start_seconds: float
    lost: int
    twice: int
    moved: tuple[int, int]


class Nodes:
    """Local workers, and whether there are nodes for the accelerated ones; without, these wait to be placed."""

    def __init__(self, directory: Path, wake: asyncio.Event) -> None:
        self._local, self._wake = LocalWorkers(directory, wake), wake
        self._pending: list[Replica] | None = None

    async def observe(self, pool: Pool) -> Mapping[str, TierReplicas]:
        """The processes, and who waits for a node."""
        seen, pending = dict(await self._local.observe(pool)), self._pending or ()
        seen["gpu"] = TierReplicas(seen["gpu"].desired + len(pending), (*seen["gpu"].replicas, *pending))
        return seen

    async def scale(self, pool: Pool, replicas: Mapping[str, int], leaving: frozenset[str]) -> None:
        """Start and stop processes; without a node only take the order."""
        if self._pending is not None:
            wanted = replicas["gpu"]
            new = (Replica(f"unplaced-{n}", Phase.UNSCHEDULABLE, time.time()) for n in range(len(self._pending), wanted))
            self._pending = [*self._pending, *new][:wanted]
            replicas = {**replicas, "gpu": 0}
        await self._local.scale(pool, replicas, leaving)

    async def take_away(self, pool: Pool) -> None:
        """Kill the accelerated workers; whoever is ordered in their place finds no node."""
        gone = (await self._local.observe(pool))["gpu"].replicas
        for replica in gone:
            if group := self._local.process_group(replica.worker):
                kill_group(group)
        self._pending = []
        await self._change(pool, len(gone), frozenset(replica.worker for replica in gone))

    async def give_back(self, pool: Pool) -> None:
        """Start whoever waits for a node."""
        ordered, self._pending = len(self._pending or ()), None
        await self._change(pool, ordered, frozenset())

    async def _change(self, pool: Pool, accelerated: int, leaving: frozenset[str]) -> None:
        plain = (await self._local.observe(pool))["cpu"].desired
        await self.scale(pool, {"gpu": accelerated, "cpu": plain}, leaving)
        self._wake.set()

    async def close(self) -> None:
        """End the processes."""
        await self._local.close()


class Stage:
    """A running pool; it is itself the port that knows URLs, and the reporter."""

    def __init__(self, pool: Pool, url: str, nodes: Nodes) -> None:
        self.pool, self.url, self.nodes = pool, url, nodes
        self.moved: dict[str, int] = {}

    async def broker_url(self, pool: Pool) -> str | Unavailable:  # noqa: ARG002 the port's signature
        """The private Redis."""
        return self.url

    async def report(self, report: Report) -> None:
        """Keep how many jobs have moved."""
        if not isinstance(report.reading, Unavailable):
            self.moved = {tier: report.reading.routes.get(f"{tier}:{Reason.REBALANCED}", 0) for tier in ("gpu", "cpu")}

    async def ready(self, tier: str) -> list[Replica]:
        """The workers of a tier that are ready."""
        return [r for r in (await self.nodes.observe(self.pool))[tier].replicas if r.phase is Phase.READY]


@asynccontextmanager
async def staged(scenario: Scenario, directory: Path) -> AsyncIterator[Stage]:
    """Redis, workers and the operator's passes, until the block is left."""
    with private_redis() as server:
        wake = asyncio.Event()
        broker, nodes = RedisBroker(wake), Nodes(directory, wake)
        stage = Stage(pool_of(scenario, server.url), server.url, nodes)
        reconciler = Reconciler(urls=stage, broker=broker, workers=nodes, reporter=stage, wake=wake)
        reconciler.pools[stage.pool.id] = stage.pool
        passes = asyncio.create_task(reconciler.run())
        try:
            yield stage
        finally:
            passes.cancel()
            await asyncio.gather(passes, return_exceptions=True)
            await nodes.close()
            await broker.close()


def pool_of(scenario: Scenario, url: str) -> Pool:
    """Accelerated workers that are always ordered, and plain ones of some slots each."""
    least, most = scenario.plain

    def tier(name: str, queue: str, pool: str, **rest: Any) -> dict[str, Any]:
        worker = {"name": "worker", "args": ["-P", pool]}
        return {"name": name, "queue": queue, "template": {"spec": {"containers": [worker]}}, **rest}

    gpu = tier("gpu", "gpu-tasks", "solo", accelerator={"resource": "nvidia.com/gpu"}, replicas={"min": FAST, "max": FAST})
    cpu = tier("cpu", "celery", "threads", concurrency=SLOTS, replicas={"min": least, "max": most})
    spec = {
        "app": "benchmarks.sleeping", "broker": {"url": url}, "tiers": [gpu, cpu],
        "scaling": {"targetWaitSeconds": scenario.target_wait},
    }  # fmt: skip
    return Pool("bench", "outage", "bench/outage", 1, 0.0, WorkerPoolSpec.model_validate(spec))


async def until(holds: Callable[[], Awaitable[bool]], what: str) -> None:
    """Wait until it holds; raises TimeoutError."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not await holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not after {PATIENCE_SECONDS:.0f} s: {what}")
        await asyncio.sleep(0.2)


async def live(scenario: Scenario, directory: Path, seed: int) -> Lived:
    """Play a scenario in real time."""
    planned = bursty(seed, scenario.last, scenario.jobs_a_second, JOB_SECONDS)
    async with staged(scenario, directory) as stage:

        async def all_ready() -> bool:
            return len(await stage.ready("gpu")) == FAST and len(await stage.ready("cpu")) >= scenario.plain[0]

        await until(all_ready, "all workers are ready")
        began = time.time()
        outage = asyncio.create_task(gone(stage, scenario, began))
        ids = await submit_all(stage, planned, began)
        first, last, back = await outage
        client: Any
        with Redis.from_url(stage.url, decode_responses=True) as client:

            def entries() -> list[Mapping[str, str]]:
                pipe = client.pipeline(transaction=False)
                for task_id in ids:
                    pipe.hgetall(stage.pool.keys.job(task_id))
                found: list[Mapping[str, str]] = pipe.execute()
                return found

            async def all_ended() -> bool:
                return all(State(entry["state"]).ended for entry in await asyncio.to_thread(entries))

            await until(all_ended, "all jobs have ended")
            kept = [(int(entry["admitted_at"]), Job.load(task_id, entry)) for task_id, entry in zip(ids, entries(), strict=True)]
            ends = client.hgetall(ENDS)
            twice = sum(int(ends.get(job.task_id, 0)) > 1 + sum(run.how == "lost" for run in job.runs) for _, job in kept if job)
        starts = [r.ready_at - r.ordered_at for r in await stage.ready("gpu") if r.ready_at is not None]
        return Lived(
            jobs=Trace(planned.name, [at / 1000 - began for at, _ in kept], planned.services),
            waits=[(job.runs[0].began - at) / 1000 for at, job in kept if job and job.runs],
            outage=Outage("gpu", first - began, last - began),
            back=back - began,
            start_seconds=fmean(starts),
            lost=sum(not job or job.state is not State.DONE for _, job in kept),
            twice=twice,
            moved=(stage.moved["cpu"], stage.moved["gpu"]),
        )


async def submit_all(stage: Stage, planned: Trace, began: float) -> list[str]:
    """Submit every job in its time; their task ids."""
    ids = []
    with Celery("sleeping", broker=stage.url) as app:
        work, pool = app.task(_work, name="benchmarks.sleeping.work"), WorkerPool(stage.pool.id, app)
        for at, seconds in zip(planned.arrivals, planned.services, strict=True):
            await asyncio.sleep(max(0.0, began + at - time.time()))
            decision = await pool.submit_async(work, (seconds,), accelerated=True, content_type="image")
            ids.append(str(decision.task_id))
    return ids


def _work(seconds: float) -> None:
    """Nobody runs it here."""


async def gone(stage: Stage, scenario: Scenario, began: float) -> tuple[float, float, float]:
    """Take the accelerated workers away and give them back; when that was, and when the first was ready again."""
    await asyncio.sleep(began + scenario.begins - time.time())
    first = time.time()
    await stage.nodes.take_away(stage.pool)
    await asyncio.sleep(began + scenario.ends - time.time())
    last = time.time()
    await stage.nodes.give_back(stage.pool)

    async def one_is_back() -> bool:
        return bool(await stage.ready("gpu"))

    await until(one_is_back, "a worker is back")
    return first, last, min(r.ready_at for r in await stage.ready("gpu") if r.ready_at is not None)


def simulated(scenario: Scenario, lived: Lived, *, rebalance: bool = True) -> list[float]:
    """The waits of the same jobs in the simulator."""
    pool = pool_of(scenario, "redis://simulated")
    routing = pool.spec.routing.model_copy(update={"rebalance": rebalance})
    pool = replace(pool, spec=pool.spec.model_copy(update={"routing": routing}))

    def start(_: random.Random) -> float:
        return lived.start_seconds

    tiers = (
        TierSetup("gpu", start, initial=FAST),
        TierSetup("cpu", start, concurrency=SLOTS, slowdown=SLOWDOWN, initial=scenario.plain[0]),
    )
    return engine.run(lived.jobs, World(tiers, outages=(lived.outage,)), Operator(pool)).waits


def rows(scenario: Scenario, lived: Lived) -> list[str]:
    """The lines of one scenario in the table."""
    least, most = (SLOTS * workers for workers in scenario.plain)
    plain = f"{least} to {most}" if least < most else str(least)
    found = {
        "real run": lived.waits,
        "simulator": simulated(scenario, lived),
        "simulator, nothing moves": simulated(scenario, lived, rebalance=False),
        **{f"one queue for all, {slots} plain": one_queue(lived.jobs, lived.outage, FAST, slots) for slots in {least, most}},
    }
    return [line(plain, name, waits, lived if waits is lived.waits else None) for name, waits in found.items()]


def line(plain: str, name: str, waits: Sequence[float], lived: Lived | None) -> str:
    """One of them."""
    shown = " | ".join(f"{quantile(sorted(waits), part):.1f}" for part in (0.5, 0.95, 0.99, 1.0))
    counted = f"{lived.lost} | {lived.twice} | {lived.moved[0]} | {lived.moved[1]}" if lived else " | | | "
    return f"| {plain} | {name} | {len(waits)} | {shown} | {counted} |"


def main(seed: int) -> None:
    """Print the table."""
    print("| plain slots | | jobs | p50 s | p95 s | p99 s | max s | lost | twice | moved away | home |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    notes = []
    for scenario in SCENARIOS:
        with tempfile.TemporaryDirectory(prefix="workerpool-outage-", ignore_cleanup_errors=True) as directory:
            lived = asyncio.run(live(scenario, Path(directory), seed))
        print("\n".join(rows(scenario, lived)), flush=True)
        notes.append(
            f"outage of {lived.outage.end - lived.outage.start:.1f} s, the first accelerated worker ready "
            f"{lived.back - lived.outage.end:.1f} s after it; starts of {lived.start_seconds:.1f} s"
        )
    print("\n" + "\n".join(notes))


if __name__ == "__main__":
    main(*(int(argument) for argument in (*sys.argv[1:], "1")[:1]))
