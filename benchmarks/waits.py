"""How good the expected wait is: bursts of the sample's jobs on real workers, what each was told against what it waited.

``python -m benchmarks.waits [bursts] [jobs]`` prints a table. The pool is that of ``examples/media``: GPU workers that start from
nothing, CPUs that take what these cannot. At the first burst no job is known, and of starts only that of the CPU worker there.
How many waits were *as told* is the pool's own count, the one of its metrics.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from statistics import fmean, median
from typing import Any

from examples.media import samples
from redis import Redis

from workerpool_operator import manifest
from workerpool_operator.dev import session
from workerpool_operator.ports import Pool, Report
from workerpool_operator.status import TierStatus

RESOURCE = Path(__file__).parents[1] / "examples" / "media" / "workerpool.yaml"
EVERY_SECONDS = 0.1
PLAIN_EVERY = 6
"""As in the demo: every so many jobs, one does not ask for a GPU."""

LIMIT_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Burst:
    """What became of one burst.

    Attributes:
        expected, real: seconds that each job was expected to wait, and that it waited until it was first started.
        right: how many of these waits the pool itself has counted as expected.
    """

    expected: Sequence[float]
    real: Sequence[float]
    right: int


class Watched:
    """A reporter that keeps the last pass."""

    def __init__(self) -> None:
        self.tiers: Mapping[str, TierStatus] = {}

    async def report(self, report: Report) -> None:
        """Take one pass in."""
        self.tiers = {tier.name: tier for tier in report.status.tiers}

    def quiet(self) -> bool:
        """Whether the GPU tier is at zero and the CPU tier where it is without work."""
        gpu, cpu = self.tiers.get("gpu"), self.tiers.get("cpu")
        return bool(gpu and cpu and gpu.desired == gpu.ready == 0 and cpu.desired == cpu.ready == 1)


async def until(holds: Any) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not await asyncio.to_thread(holds):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not quiet after {LIMIT_SECONDS:.0f} s")
        await asyncio.sleep(0.2)


async def burst(service: Any, client: Any, paths: Sequence[Path], asked: Watched) -> Burst:
    """Submit all, wait until all have ended, and compare."""
    decisions, right = [], as_expected(service.pool, client)
    for n, path in enumerate(paths, start=1):
        kind = "image" if path.suffix == ".jpg" else "audio"
        decisions.append(
            await service.pool.submit_async(
                service.TASKS[kind], (str(path), {}), accelerated=n % PLAIN_EVERY != 0, content_type=kind
            )
        )
        await asyncio.sleep(EVERY_SECONDS)
    jobs = [decision.task_id for decision in decisions]
    await until(lambda: all(service.pool.job(job).state.ended for job in jobs))
    expected, real = [], []
    for job in jobs:
        admitted, told = client.hmget(service.pool.keys.job(job), "admitted_at", "wait")
        expected.append(float(told))
        real.append((service.pool.job(job).runs[0].began - int(admitted)) / 1000)
    await until(asked.quiet)
    return Burst(expected, real, as_expected(service.pool, client) - right)


def as_expected(pool: Any, client: Any) -> int:
    """The waits that the pool has counted as expected so far."""
    return sum(int(client.hget(pool.keys.waits(tier), "right") or 0) for tier in ("gpu", "cpu"))


async def run(bursts: int, jobs: int, directory: Path) -> list[Burst]:
    pool = manifest.parse(RESOURCE.read_text())
    assert isinstance(pool, Pool), pool
    watched = Watched()
    paths = list(islice(cycle(sorted(samples.write(directory / "samples", 9).iterdir())), jobs))
    async with session(pool, directory=directory, reporter=watched) as dev:
        os.environ["CELERY_BROKER_URL"] = dev.broker_url
        service = importlib.import_module("examples.media.tasks")
        await until(watched.quiet)
        with Redis.from_url(dev.broker_url, decode_responses=True) as client:
            return [await burst(service, client, paths, watched) for _ in range(bursts)]


def main(bursts: int = 4, jobs: int = 32) -> None:
    with tempfile.TemporaryDirectory(prefix="workerpool-waits-", ignore_cleanup_errors=True) as directory:
        found = asyncio.run(run(bursts, jobs, Path(directory)))
    print("| burst | jobs | as told | mean error s | median of the absolute s | longest wait s |")
    print("|---|---|---|---|---|---|")
    for n, one in enumerate(found, start=1):
        errors = [expected - real for expected, real in zip(one.expected, one.real, strict=True)]
        print(
            f"| {n} | {len(errors)} | {one.right / len(errors):.0%} | {fmean(errors):+.1f} | {median(map(abs, errors)):.1f} | "
            f"{max(one.real):.1f} |"
        )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
