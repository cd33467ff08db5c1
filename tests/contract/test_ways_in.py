"""Every way in that Celery has is routed, with real workers and a real beat: what the policy names, and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from celery import chain, chord, group
from redis import Redis
from tests.watching import until

from workerpool_operator.local.redis_server import private_redis
from workerpool_routing.ledger import State
from workerpool_routing.wire import Keyspace, Policy, TaskPolicy, TierPolicy

pytestmark = pytest.mark.contract

ROOT = Path(__file__).parents[2]
APP = "tests.contract.routed"
KEYS = Keyspace("test/routed")
POLICY = Policy(
    (TierPolicy("gpu", "gpu-jobs", accelerated=True), TierPolicy("cpu", "cpu-jobs", accelerated=False)),
    tasks=(TaskPolicy("routed.merge", accelerated=False), TaskPolicy("routed.*", accelerated="required")),
)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with private_redis() as server, Redis.from_url(server.url) as client:
        client.set(KEYS.policy, POLICY.dump())
        yield server.url


@pytest.fixture(scope="module")
def routed(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The app as an API process has it, with a worker on either tier; the plain one takes the default queue too."""
    log = tmp_path_factory.mktemp("workers")
    with ExitStack() as stack:
        for tier, queues in (("gpu", "gpu-jobs"), ("cpu", "cpu-jobs,celery")):
            arguments = ["worker", "-Q", queues, "-c", "1", "-n", f"{tier}@test", "--without-gossip", "--without-mingle"]
            names = {"POOL": "test/routed", "TIER": tier, "WORKER": tier, "QUEUE": queues.partition(",")[0], "CONCURRENCY": "1"}
            stack.enter_context(celery(url, log, tier, arguments, names))
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("CELERY_BROKER_URL", url)
        sys.modules.pop(APP, None)
        app = import_module(APP)
        until(lambda: len(app.pool.workers()) == 2, "both workers are there")
        yield app


@contextmanager
def celery(url: str, log: Path, name: str, arguments: list[str], names: dict[str, str]) -> Iterator[None]:
    """A Celery process; its whole group is gone afterwards."""
    environment = {**os.environ, "CELERY_BROKER_URL": url, **{f"WORKERPOOL_{key}": value for key, value in names.items()}}
    with (log / f"{name}.log").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "celery", "-A", APP, *arguments, "-l", "INFO"],
            env=environment, cwd=ROOT, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def ended(routed: ModuleType, task_id: str) -> Any:
    """Its ledger entry, once it has ended."""
    return until(lambda: (job := routed.pool.job(task_id)) and job.state.ended and job, f"{task_id} has ended")


def test_delay_apply_async_and_send_task_are_routed_and_on_the_ledger(routed: ModuleType) -> None:
    results = [
        routed.where.delay([]),
        routed.where.apply_async(([],), priority=3),
        routed.app.send_task("routed.where", ([],)),
    ]
    assert [result.get(timeout=60) for result in results] == [["gpu"]] * 3
    jobs = [ended(routed, result.id) for result in results]
    assert {(job.state, job.tier, job.attempt) for job in jobs} == {(State.DONE, "gpu", 1)}


def test_each_step_of_a_chain_goes_its_own_way_also_when_a_worker_publishes_it(routed: ModuleType) -> None:
    result = chain(routed.where.s([]), routed.other.s(), routed.where.s()).apply_async()
    assert result.get(timeout=60) == ["gpu", "cpu", "gpu"]
    assert ended(routed, result.id).tier == "gpu"
    assert routed.pool.job(result.parent.id) is None


def test_groups_and_chords_are_routed_part_by_part(routed: ModuleType) -> None:
    result = chord([routed.where.s([]), routed.where.s(["x"])])(routed.merge.s())
    assert sorted(result.get(timeout=60)) == ["cpu", "gpu", "gpu", "x"]
    assert ended(routed, result.id).tier == "cpu"
    parts = group(routed.where.s([]), routed.other.s([]))()
    assert parts.get(timeout=60) == [["gpu"], ["cpu"]]
    assert [getattr(routed.pool.job(part.id), "tier", None) for part in parts.children] == ["gpu", None]


def test_retries_stay_where_their_author_put_them_under_one_ledger_entry(routed: ModuleType) -> None:
    moved = routed.again.apply_async(queue="cpu-jobs")
    routed_there = routed.again.delay()
    assert moved.get(timeout=60) == ["cpu", 2]
    assert routed_there.get(timeout=60) == ["gpu", 2]
    job = ended(routed, routed_there.id)
    assert (job.state, job.tier, job.attempt) == (State.DONE, "gpu", 1)
    assert routed.pool.job(moved.id) is None


def test_an_explicit_queue_and_a_task_that_nobody_named_are_left_alone(routed: ModuleType) -> None:
    explicit, unnamed = routed.where.apply_async(([],), queue="cpu-jobs"), routed.other.delay([])
    assert [explicit.get(timeout=60), unnamed.get(timeout=60)] == [["cpu"], ["cpu"]]
    assert routed.pool.job(explicit.id) is routed.pool.job(unnamed.id) is None


def test_what_beat_sends_is_routed(routed: ModuleType, url: str, tmp_path: Path) -> None:
    with Redis.from_url(url, decode_responses=True) as client:
        before = set(client.scan_iter(KEYS.job("*")))

        def have_ended() -> list[Any]:
            jobs = [routed.pool.job(key.rpartition(":")[2]) for key in set(client.scan_iter(KEYS.job("*"))) - before]
            return [job for job in jobs if job and job.state.ended]

        with celery(url, tmp_path, "beat", ["beat", "-s", str(tmp_path / "schedule")], {}):
            jobs = until(lambda: len(done := have_ended()) > 1 and done, "two jobs of beat have ended")
    assert {(job.task, job.tier, job.state) for job in jobs} == {("routed.where", "gpu", State.DONE)}
    assert {tuple(routed.app.AsyncResult(job.task_id).get(timeout=60)) for job in jobs} == {("beat", "gpu")}


def test_no_lease_outlives_its_publish(routed: ModuleType, url: str) -> None:
    with Redis.from_url(url) as client:
        killed_with_beat = client.zrange(KEYS.leases("gpu"), 0, -1)
        routed.where.delay([])
        assert set(client.zrange(KEYS.leases("gpu"), 0, -1)) <= set(killed_with_beat)


def test_a_hook_that_cannot_decide_leaves_the_message_to_the_app(routed: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(routed.pool.store), "admit", lambda *_, **__: 1 / 0)
        assert routed.merge.delay([]).get(timeout=60) == ["cpu"]
        assert routed.where.delay([]).get(timeout=60) == ["gpu"], "it is required"
    assert "cannot route routed.where" in caplog.text


def test_many_threads_route_their_own_messages(routed: ModuleType) -> None:
    found: dict[str, Any] = {}

    def send(wish: Any) -> None:
        for _ in range(10):
            result = routed.other.apply_async(([],), headers={"workerpool": {"accelerated": wish}})
            found[result.id] = "gpu" if wish else "cpu"

    threads = [threading.Thread(target=send, args=(wish,)) for wish in ("required", False) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {task_id: routed.pool.job(task_id).tier for task_id in found} == found
