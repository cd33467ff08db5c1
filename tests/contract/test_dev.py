"""`workerpool dev` as its users run it: a process of its own, with a real app, real workers and its private Redis."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest
from celery import Celery
from redis import Redis
from tests.contract.dev import PATIENCE_SECONDS, dev, until, write_pool

from workerpool_routing import WorkerPool
from workerpool_routing.ledger import State

pytestmark = [pytest.mark.contract, pytest.mark.timeout(540)]


def test_an_accelerated_job_starts_its_tier_from_zero_and_finishes_and_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    write_pool(tmp_path)
    with dev(tmp_path) as running:
        with Celery("tasks", broker=running.broker_url) as app:
            task = app.task(work, name="tasks.work")
            pool = WorkerPool("default/tiny", app)
            until(lambda: pool.policy, lambda: running.printed)
            assert pool.workers() == {}
            decision = pool.submit(task, args=(str(tmp_path / "result"), 0.1), accelerated=True)
            assert (decision.tier, decision.reason) == ("gpu", "SlotStarting")
            assert decision.task_id
            job = until(lambda: (j := pool.job(str(decision.task_id))) and j.state.ended and j, lambda: running.printed)
        assert (job.state, job.tier, job.starts) == (State.DONE, "gpu", {"gpu": 1})
        assert (tmp_path / "result").read_text() == "done"
        running.until_it_prints(r"tiny  BacklogExceedsCapacity: gpu: 0 → 1: ")
        # The command, its Redis, the worker with a child, and a guardian each of the workers and of Redis.
        assert len(running.processes()) == 6
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(PATIENCE_SECONDS) == 0
        assert running.processes() == {}
        assert "Traceback" not in running.printed


def test_ctrl_c_lets_a_running_task_finish_and_a_second_one_cuts_it_off(tmp_path: Path) -> None:
    write_pool(tmp_path)
    result = tmp_path / "result"
    with dev(tmp_path) as running:
        with Celery("tasks", broker=running.broker_url) as app:
            app.send_task("tasks.work", args=(str(result), 600), queue="celery")
        until(result.exists, lambda: running.printed)
        running.process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            running.process.wait(1.5)
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(PATIENCE_SECONDS) == 0
        assert running.processes() == {}
    assert result.read_text() == ""


def test_killed_it_leaves_nothing_behind(tmp_path: Path) -> None:
    write_pool(tmp_path, gpu={"replicas": {"min": 1, "max": 1}})
    with dev(tmp_path) as running:
        running.until_it_prints(r"gpu 1/1 ready")
        assert len(running.processes()) == 6
        running.process.kill()
        running.process.wait()
        until(lambda: not running.processes(), running.processes)


def test_killed_while_it_loads_the_app_it_leaves_nothing_behind(tmp_path: Path) -> None:
    write_pool(tmp_path)
    (tmp_path / "tasks.py").write_text("open('loading', 'x').close()\nimport time; time.sleep(600)\n")
    with dev(tmp_path) as running:
        until((tmp_path / "loading").exists, lambda: running.printed)
        running.process.kill()
        running.process.wait()
        until(lambda: not running.processes(), running.processes)


def test_a_worker_that_dies_at_start_is_one_line_that_says_of_what(tmp_path: Path) -> None:
    template = {"spec": {"containers": [{"name": "worker", "args": ["--no-such-option"]}]}}
    write_pool(tmp_path, gpu={"template": template, "replicas": {"min": 1, "max": 1}})
    with dev(tmp_path) as running:
        running.until_it_prints(r"^\S+  tiny  WorkersFailing: gpu: 1 of 1 failing: Error: No such option:? '?--no-such-option")
        assert "Traceback" not in running.printed


def test_advisory_mode_decides_and_starts_nothing(tmp_path: Path) -> None:
    write_pool(tmp_path, gpu={"replicas": {"min": 1, "max": 1}}, mode="Advisory")
    with dev(tmp_path) as running:
        running.until_it_prints(r"gpu 0/1 ready")
        time.sleep(1)
        assert [name for name in running.processes().values() if " -m celery " in name] == []
        assert [file.name for file in (tmp_path / "logs").iterdir() if file.suffix == ".log"] == []


def test_a_redis_that_is_there_already_is_used_and_its_password_not_shown(tmp_path: Path, redis_url: str) -> None:
    write_pool(tmp_path)
    with Redis.from_url(redis_url) as client:
        client.execute_command("ACL", "SETUSER", "dev", "on", ">pass-phrase", "~*", "&*", "+@all")
    url = redis_url.replace("redis://", "redis://dev:pass-phrase@")
    with dev(tmp_path, "--broker-url", url) as running:
        running.until_it_prints(r"^in the API: CELERY_BROKER_URL=redis://dev:\*\*@127\.0\.0\.1:\d+/0, ")
        running.until_it_prints(r"cpu 0/0 ready")
        assert "pass-phrase" not in running.printed
        assert "pass-phrase" not in (tmp_path / "logs" / "workerpool.json").read_text()
        with Redis.from_url(redis_url) as client:
            assert client.exists("workerpool:default/tiny:policy") == 1


def work(path: str, seconds: float) -> None:
    """The signature of the task that the workers have."""
