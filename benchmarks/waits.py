"""How good the expected wait is: bursts of the sample's jobs on real workers, what each was told against what it waited.

``python -m benchmarks.waits [bursts] [jobs]`` prints a table. The pool is that of ``examples/media``: GPU workers that start from
nothing, CPUs that take what these cannot. Nothing is known at the first burst: neither how long a job takes nor how long a start.
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
class Wait:
    """Seconds that one job was expected to wait, and that it waited until it was first started."""

    expected: float
    real: float

    @property
    def right(self) -> bool:
        """Within 25 % or 2 s."""
        return abs(self.expected - self.real) <= max(2.0, 0.25 * self.real)


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


async def burst(service: Any, client: Any, paths: Sequence[Path], asked: Watched) -> list[Wait]:
    """Submit all, wait until all have ended, and compare."""
    decisions = []
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
    waits = []
    for decision in decisions:
        admitted, expected = client.hmget(service.pool.keys.job(decision.task_id), "admitted_at", "wait")
        began = service.pool.job(decision.task_id).runs[0].began
        waits.append(Wait(float(expected), (began - int(admitted)) / 1000))
    await until(asked.quiet)
    return waits


async def run(bursts: int, jobs: int, directory: Path) -> list[list[Wait]]:
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


def main(bursts: int, jobs: int) -> None:
    with tempfile.TemporaryDirectory(prefix="workerpool-waits-", ignore_cleanup_errors=True) as directory:
        found = asyncio.run(run(bursts, jobs, Path(directory)))
    print("| burst | jobs | within 25 % or 2 s | mean error s | median of the absolute s | longest wait s |")
    print("|---|---|---|---|---|---|")
    for n, waits in enumerate(found, start=1):
        errors = [wait.expected - wait.real for wait in waits]
        print(
            f"| {n} | {len(waits)} | {sum(wait.right for wait in waits) / len(waits):.0%} | {fmean(errors):+.1f} | "
            f"{median(map(abs, errors)):.1f} | {max(wait.real for wait in waits):.1f} |"
        )


if __name__ == "__main__":
    main(*(int(argument) for argument in (*sys.argv[1:], "4", "32")[:2]))
