"""How a worker starts: what it refuses, overrides and says, and the files of its probes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from types import ModuleType

import pytest
from tests.contract.api_and_operator import operator_pool, outcome, submit
from tests.contract.workers import ROOT, command, environment, parked, worker
from tests.watching import until

from workerpool_operator import planning
from workerpool_routing.ledger import State

pytestmark = pytest.mark.contract


@pytest.mark.parametrize(
    ("env", "says"),
    [
        (
            {"WORKERPOOL_TIER": "tpu"},
            "workerpool: WORKERPOOL_TIER='tpu': pool test/jobs has the tiers gpu, cpu, lone, eta, back, probed",
        ),
        (
            {"WORKERPOOL_POOL": "test/jbos"},
            "workerpool: WORKERPOOL_POOL='test/jbos': the app has 'test/jobs'; the two names must be the same",
        ),
        (
            {"JOBS_START_METHOD": "spawn"},
            "workerpool: worker_pool_start_method='spawn': a WorkerPool needs 'fork', or -P solo or -P threads",
        ),
        (
            {"JOBS_CONF": '{"worker_pool": "gevent"}'},
            "workerpool: worker_pool='gevent': a WorkerPool needs -P prefork, solo or threads",
        ),
        (
            {"JOBS_LATE_CONF": '{"task_track_started": true}'},
            (
                "workerpool: task_routes and broker_transport_options: replaced after WorkerPool('test/jobs', app) was made;"
                " configure the app first"
            ),
        ),
    ],
)
def test_a_worker_that_cannot_keep_the_promise_is_refused_in_one_line(
    url: str, jobs: ModuleType, env: dict[str, str], says: str
) -> None:
    ended = subprocess.run(
        command("gpu-jobs", "wrong"), env={**environment(url, "gpu", "gpu-jobs", "wrong"), **env}, cwd=ROOT,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ended.returncode != 0
    assert says in ended.stderr.splitlines()
    assert "Traceback" not in ended.stderr


def test_options_that_would_break_the_promise_are_overridden_with_a_warning(url: str, jobs: ModuleType, tmp_path: Path) -> None:
    env = {"JOBS_TRANSPORT": json.dumps({"visibility_timeout": 3})}
    with worker(url, "gpu", "odd-jobs", "odd", tmp_path, "-c", "1", "--prefetch-multiplier", "8", env=env):
        log = (tmp_path / "odd.log").read_text()
    assert "visibility_timeout=3 is below" in log
    assert "prefetch-multiplier=8 is not used" in log
    assert "acknowledged_early: acks_late=False is not used" in log


def test_a_worker_without_a_policy_says_so_and_heeds_it_when_it_comes(url: str, two_tiers: ModuleType, tmp_path: Path) -> None:
    client, keys = two_tiers.pool.connection.client, two_tiers.pool.keys
    fails = two_tiers.work, {"gpu": "raise"}
    with parked(two_tiers), worker(url, "gpu", "gpu-jobs", "gpu-early", tmp_path, env={"JOBS_WITHOUT_TIERS": "1"}):
        assert "pool test/jobs has no policy in Redis" in (tmp_path / "gpu-early.log").read_text()
        assert outcome(two_tiers, submit(two_tiers, *fails).task_id) == (State.FAILED, {"gpu": 1})
        client.set(keys.policy, planning.policy(operator_pool(url).spec).dump())
        until(
            lambda: outcome(two_tiers, submit(two_tiers, *fails).task_id) == (State.DONE, {"gpu": 1, "cpu": 1}),
            "it falls back",
            30,
        )
    client.delete(keys.policy)


def test_the_probe_files_follow_the_worker(url: str, two_tiers: ModuleType, tmp_path: Path) -> None:
    client, keys = two_tiers.pool.connection.client, two_tiers.pool.keys
    probes = tmp_path / "probes"
    with worker(url, "probed", "probed-jobs", "probed", tmp_path, env={"WORKERPOOL_PROBES": str(probes)}) as process:
        until((probes / "ready").exists, "it is ready")
        client.sadd(keys.drain, "probed")
        until(lambda: not (probes / "ready").exists(), "it is not ready while it drains")
        client.srem(keys.drain, "probed")
        until((probes / "ready").exists, "it is ready again")
        os.kill(process.pid, signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        seen = (probes / "alive").stat().st_mtime
        time.sleep(2)
        assert (probes / "alive").stat().st_mtime == seen
        os.kill(process.pid, signal.SIGCONT)
        until(lambda: (probes / "alive").stat().st_mtime > seen, "it lives again")
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        assert not (probes / "ready").exists()
