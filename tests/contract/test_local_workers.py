"""Real Celery workers as local processes: started, scaled, restarted, ended, and never left behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from tests.watching import processes

from workerpool_operator.local import LocalWorkers
from workerpool_operator.local.workers import CROWDED, FIRST_START_SECONDS
from workerpool_operator.model import WorkerPoolSpec
from workerpool_operator.observation import Phase, Replica
from workerpool_operator.ports import Pool

pytestmark = [pytest.mark.contract, pytest.mark.timeout(540)]

PATIENCE_SECONDS = 120.0
"""On a busy machine; less than the tasks last that are to be cut off."""

APP = """
import json, os, pathlib, time
from celery import Celery

app = Celery("tasks")

@app.task
def work(path, seconds):
    path = pathlib.Path(path)
    path.with_suffix(".started").write_text(json.dumps({**os.environ, "ppid": os.getppid()}))
    time.sleep(seconds)
    path.touch()
"""


@pytest.fixture
def pool(redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pool:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks.py").write_text(APP)
    return make_pool(redis_url)


def make_pool(url: str, grace: int = 30, app: str = "tasks", tiers: Sequence[str] = ("cpu",), **worker: Any) -> Pool:
    template = {"spec": {"terminationGracePeriodSeconds": grace, "containers": [{"name": "worker", **worker}]}}
    own = [{"name": name, "queue": f"{name}-tasks", "template": template} for name in tiers]
    spec = WorkerPoolSpec.model_validate({"app": app, "broker": {"url": url}, "tiers": own})
    return Pool("test", f"pool-{uuid.uuid4().hex[:12]}", "u", 1, 0.0, spec)


class Driver:
    """One pool of one tier, driven as the pass drives it."""

    def __init__(self, pool: Pool, workers: LocalWorkers, wake: asyncio.Event) -> None:
        self.pool, self.workers, self.wake = pool, workers, wake

    async def scale(self, replicas: int) -> None:
        """Bring the tier to that count; of the workers that are too many the last ordered go."""
        staying = [r.worker for r in await self.replicas() if r.phase is not Phase.STOPPING]
        await self.let_go(replicas, *staying[replicas:])

    async def let_go(self, replicas: int, *leaving: str) -> None:
        await self.workers.scale(self.pool, {"cpu": replicas}, frozenset(leaving))

    async def replicas(self) -> tuple[Replica, ...]:
        return (await self.workers.observe(self.pool))["cpu"].replicas

    async def until(self, phases: list[Phase]) -> tuple[Replica, ...]:
        """Wait, on the wake event alone, until the workers are in these phases."""
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                while [replica.phase for replica in await self.replicas()] != phases:
                    await self.wake.wait()
                    self.wake.clear()
        except TimeoutError:
            pytest.fail(f"expected {phases}, got {await self.replicas()}")
        return await self.replicas()

    def submit(self, path: Path, seconds: float) -> None:
        with Celery(broker=self.pool.spec.broker.url) as app:
            app.send_task("tasks.work", args=(str(path), seconds), queue="cpu-tasks")


@asynccontextmanager
async def driving(pool: Pool, tmp_path: Path) -> AsyncIterator[Driver]:
    wake = asyncio.Event()
    workers = LocalWorkers(tmp_path / "logs", wake)
    try:
        yield Driver(pool, workers, wake)
    finally:
        await workers.close()


async def started(path: Path) -> dict[str, Any]:
    """The environment of the task that has started to write ``path``."""
    file = path.with_suffix(".started")
    await becomes(lambda: file.exists() and file.stat().st_size > 0)
    return dict(json.loads(file.read_text()))


async def becomes(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


def test_a_tier_goes_from_zero_to_two_ready_workers_and_back(pool: Pool, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with driving(pool, tmp_path) as driver:
            assert await driver.replicas() == ()
            await driver.scale(2)
            await driver.scale(2)
            assert [replica.phase for replica in await driver.replicas()] == [Phase.STARTING, Phase.STARTING]
            ready = await driver.until([Phase.READY, Phase.READY])
            assert len({replica.worker for replica in ready}) == 2
            for replica in ready:
                assert replica.worker.startswith(f"{pool.name}-cpu-")
                assert replica.ready_at
                assert 0 < replica.ready_at - replica.ordered_at < PATIENCE_SECONDS
            assert len(processes(pool.id)) == 4
            await driver.scale(0)
            observed = (await driver.workers.observe(pool))["cpu"]
            assert (observed.desired, observed.count(Phase.STOPPING)) == (0, 2)
            await driver.until([])
            assert processes(pool.id) == {}

    asyncio.run(scenario())


@pytest.mark.usefixtures("pool")
def test_a_tier_without_workers_is_told_how_long_the_last_start_of_another_took(redis_url: str, tmp_path: Path) -> None:
    two = make_pool(redis_url, tiers=("cpu", "gpu"))

    async def scenario() -> None:
        async with driving(two, tmp_path) as driver:
            assert {tier.first_start for tier in (await driver.workers.observe(two)).values()} == {FIRST_START_SECONDS}
            await driver.workers.scale(two, {"cpu": 1, "gpu": 0}, frozenset())
            (ready,) = await driver.until([Phase.READY])
            assert ready.ready_at
            first = (await driver.workers.observe(two))["gpu"].first_start
            assert first == CROWDED * (ready.ready_at - ready.ordered_at)

    asyncio.run(scenario())


def test_the_named_leave_and_a_running_task_is_finished(pool: Pool, tmp_path: Path) -> None:
    result = tmp_path / "result"

    async def scenario() -> None:
        async with driving(pool, tmp_path) as driver:
            await driver.scale(2)
            await driver.until([Phase.READY, Phase.READY])
            driver.submit(result, 8)
            busy = (await started(result))["WORKERPOOL_WORKER"]
            idle = next(replica.worker for replica in await driver.replicas() if replica.worker != busy)
            await driver.let_go(1, idle)
            (left,) = await driver.until([Phase.READY])
            assert left.worker == busy
            await driver.let_go(0)
            assert [replica.phase for replica in await driver.replicas() if replica.worker == busy] == [Phase.READY]
            await driver.let_go(0, busy)
            await driver.let_go(0, busy)
            assert not result.exists()
            await driver.until([])
            assert result.exists()

    asyncio.run(scenario())


def test_a_worker_that_outstays_its_grace_period_is_killed_with_its_children(redis_url: str, pool: Pool, tmp_path: Path) -> None:
    impatient = make_pool(redis_url, grace=1)
    result = tmp_path / "result"

    async def scenario() -> None:
        async with driving(impatient, tmp_path) as driver:
            await driver.scale(1)
            await driver.until([Phase.READY])
            driver.submit(result, 600)
            await started(result)
            began = time.monotonic()
            await driver.scale(0)
            await driver.until([])
            assert 0.9 < time.monotonic() - began < PATIENCE_SECONDS
            assert processes(impatient.id) == {}

    asyncio.run(scenario())
    assert not result.exists()


def test_a_worker_whose_main_process_is_killed_comes_back_without_the_old_children(pool: Pool, tmp_path: Path) -> None:
    result = tmp_path / "result"

    async def scenario() -> None:
        async with driving(pool, tmp_path) as driver:
            await driver.scale(1)
            (before,) = await driver.until([Phase.READY])
            driver.submit(result, 600)
            old = processes(pool.id)
            os.kill((await started(result))["ppid"], signal.SIGKILL)
            (failing,) = await driver.until([Phase.FAILING])
            assert failing.detail.startswith("killed by SIGKILL")
            await becomes(lambda: not old.keys() & processes(pool.id).keys())
            (after,) = await driver.until([Phase.READY])
            assert (after.worker, after.ready_at) == (before.worker, before.ready_at)
            assert not old.keys() & processes(pool.id).keys()

    asyncio.run(scenario())


def test_an_app_that_cannot_be_imported_says_so(redis_url: str, pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import no_such_library\n")
    broken = make_pool(redis_url, app="broken")

    async def scenario() -> None:
        async with driving(broken, tmp_path) as driver:
            await driver.scale(1)
            (failing,) = await driver.until([Phase.FAILING])
            assert failing.detail.startswith("ModuleNotFoundError: No module named 'no_such_library' (see ")
            await driver.scale(0)
            await driver.until([])

    asyncio.run(scenario())


def test_a_worker_that_dies_again_and_again_is_restarted_ever_more_slowly(redis_url: str, pool: Pool, tmp_path: Path) -> None:
    dying = make_pool(redis_url, command=["/bin/sh", "-c", "date +%s.%N >>starts; exit 3"])

    async def scenario() -> None:
        async with driving(dying, tmp_path) as driver:
            await driver.scale(1)
            (failing,) = await driver.until([Phase.FAILING])
            assert failing.detail.startswith("exited with status 3 (see ")
            await becomes(lambda: len((tmp_path / "starts").read_text().split()) == 3)

    asyncio.run(scenario())
    first, second, third = map(float, (tmp_path / "starts").read_text().split())
    assert second - first >= 1
    assert third - second >= 2


def test_a_program_that_does_not_exist_is_a_failing_worker(redis_url: str, pool: Pool, tmp_path: Path) -> None:
    async def scenario(wrong: Pool, detail: str) -> None:
        async with driving(wrong, tmp_path) as driver:
            await driver.scale(1)
            (failing,) = await driver.until([Phase.FAILING])
            assert detail in failing.detail

    asyncio.run(scenario(make_pool(redis_url, command=["./nowhere"]), "./nowhere: not found"))
    asyncio.run(scenario(make_pool(redis_url, workingDir="/nowhere"), "No such file or directory: PosixPath('/nowhere')"))


def test_a_pool_that_needs_a_cluster_is_refused(redis_url: str, pool: Pool, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with driving(make_pool(redis_url, envFrom=[{"secretRef": {"name": "s"}}]), tmp_path) as driver:
            with pytest.raises(ValueError, match=r"containers\[0\]\.envFrom: needs a cluster"):
                await driver.scale(1)
            assert await driver.replicas() == ()

    asyncio.run(scenario())


def test_closing_leaves_nothing_and_when_cancelled_waits_for_nothing(pool: Pool, tmp_path: Path) -> None:
    result = tmp_path / "result"

    async def scenario() -> None:
        wake = asyncio.Event()
        driver = Driver(pool, LocalWorkers(tmp_path / "logs", wake), wake)
        await driver.scale(2)
        await driver.until([Phase.READY, Phase.READY])
        driver.submit(result, 600)
        await started(result)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await driver.workers.close()
        await becomes(lambda: processes(pool.id) == {})

    asyncio.run(scenario())


PARENT = """
import asyncio, os, signal, sys
from pathlib import Path
from tests.contract.test_local_workers import Driver, make_pool
from workerpool_operator.local import LocalWorkers
from workerpool_operator.local.redis_server import private_redis

async def main(seconds):
    with private_redis() as server:
        wake = asyncio.Event()
        driver = Driver(make_pool(server.url), LocalWorkers(Path("logs"), wake), wake)
        await driver.scale(2)
        if seconds is None:
            await driver.until(["Ready", "Ready"])
            driver.submit(Path("result").absolute(), 600)
        print("running", flush=True)
        await asyncio.sleep(600 if seconds is None else seconds)
        os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main(eval(sys.argv[1])))
"""


def parent(mark: str, seconds: float | None) -> subprocess.Popen[bytes]:
    """A process that orders two workers, and kills itself after so many seconds or goes on."""
    environment = {**os.environ, "MARK": mark, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen([sys.executable, "-c", PARENT, str(seconds)], stdout=subprocess.PIPE, env=environment)


def test_a_parent_that_is_killed_at_work_leaves_nothing(pool: Pool, tmp_path: Path) -> None:
    mark = f"mark-{uuid.uuid4().hex}"
    with parent(mark, None) as process:
        try:
            asyncio.run(started(tmp_path / "result"))
            # The parent, two guardians, two workers with a child each; redis-server writes over its environment.
            assert len(processes(mark)) == 7
        finally:
            process.kill()
    asyncio.run(becomes(lambda: processes(mark) == {}))


def test_a_parent_that_is_killed_while_it_starts_workers_leaves_nothing(pool: Pool) -> None:
    mark = f"mark-{uuid.uuid4().hex}"
    for seconds in (0, 0.002, 0.3):
        with parent(mark, seconds) as process:
            assert process.stdout
            assert process.stdout.read() == b"running\n"
        assert process.returncode == -signal.SIGKILL
    asyncio.run(becomes(lambda: processes(mark) == {}))
