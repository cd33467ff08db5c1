"""Real Celery workers of the app in ``jobs.py``, each in its own process group, for the time of a block."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.watching import until

ROOT = Path(__file__).parents[2]
APP = "tests.contract.jobs"


def command(queue: str, name: str, *options: str) -> list[str]:
    """How such a worker is started."""
    start = [sys.executable, "-m", "celery", "-A", APP, "worker", "-Q", queue, "-n", f"{name}@test", "-l", "INFO"]
    return [*start, "--without-gossip", "--without-mingle", *options]


def environment(url: str, tier: str, queue: str, name: str) -> dict[str, str]:
    """What the operator sets for it."""
    return {
        **os.environ, "CELERY_BROKER_URL": url, "WORKERPOOL_POOL": "test/jobs", "WORKERPOOL_TIER": tier,
        "WORKERPOOL_WORKER": name, "WORKERPOOL_QUEUE": queue, "WORKERPOOL_CONCURRENCY": "1",
        "JOBS_FURTHER_TIERS": "lone,eta,back,probed",
    }  # fmt: skip


@contextmanager
def worker(
    url: str, tier: str, queue: str, name: str, log: Path, *options: str, env: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """One Celery worker of a tier, ready; its whole process group is gone afterwards."""
    path = log / f"{name}.log"
    with path.open("wb") as output:
        process = subprocess.Popen(
            command(queue, name, *(options or ("-c", "1"))),
            env={**environment(url, tier, queue, name), **(env or {})},
            cwd=ROOT, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    try:
        until(lambda: " ready." in path.read_text() or process.poll() is not None, f"{name} is ready", 90)
        assert process.poll() is None, path.read_text()
        yield process
    finally:
        if process.poll() is None or group_lives(process.pid):
            os.killpg(process.pid, signal.SIGCONT)
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def connections(client: Any) -> set[str]:
    """Which there are to this Redis."""
    return {each["id"] for each in client.client_list()}


def cut_off_what_came_after(client: Any, before: set[str]) -> None:
    """Break every connection to this Redis that was not there before."""
    for new in connections(client) - before:
        client.client_kill_filter(_id=new)


def group_lives(group: int) -> bool:
    """Whether any process of the group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def takes_jobs(jobs: ModuleType, name: str) -> bool:
    """Whether admission counts on that worker."""
    return any(worker.worker == name and worker.slots for worker in jobs.pool.workers().values())


@contextmanager
def parked(jobs: ModuleType, name: str = "gpu-a") -> Iterator[None]:
    """That worker takes nothing for the time of a block, so that another one of its tier gets what comes."""
    client, keys = jobs.pool.connection.client, jobs.pool.keys
    client.sadd(keys.drain, name)
    until(lambda: not takes_jobs(jobs, name), f"{name} takes nothing")
    try:
        yield
    finally:
        client.srem(keys.drain, name)
        until(lambda: takes_jobs(jobs, name), f"{name} is back")
