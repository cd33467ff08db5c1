"""A Redis that answers and takes no writes: workers wait for it, lose nothing, and go on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from redis import Redis
from redis.backoff import NoBackoff
from tests.contract.api_and_operator import claimed, outcome
from tests.contract.workers import worker
from tests.watching import until

from workerpool_routing import connection, ledger
from workerpool_routing.connection import Connection
from workerpool_routing.errors import PoolUnavailable
from workerpool_routing.ledger import State

pytestmark = [pytest.mark.contract, pytest.mark.timeout(240)]

KINDS = ["OOM", "READONLY", "MISCONF"]


@contextmanager
def refusing(client: Any, kind: str) -> Iterator[None]:
    """Let a Redis refuse writes: for want of memory, as a replica, or because it cannot save its data."""
    blocked = Path(tempfile.gettempdir()) / client.config_get("dbfilename")["dbfilename"]  # it runs there
    if kind == "OOM":
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", 1)
    elif kind == "READONLY":
        client.replicaof("127.0.0.1", 1)
    else:
        blocked.mkdir()
        client.config_set("save", "10000 1000000")
        client.bgsave()
        until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err", "it could not save")
    try:
        yield
    finally:
        if kind == "OOM":
            client.config_set("maxmemory", 0)
        elif kind == "READONLY":
            client.replicaof("NO", "ONE")
        else:
            client.config_set("save", "")
            blocked.rmdir()


@pytest.fixture
def client(jobs: ModuleType) -> Any:
    return jobs.pool.connection.client


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workers")


@pytest.fixture(scope="module")
def process(url: str, jobs: ModuleType, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A worker with two slots for all tests."""
    with worker(url, "cpu", "cpu-jobs", "cpu-a", log, "-c", "2") as started:
        yield started


@pytest.mark.parametrize("kind", KINDS)
def test_a_worker_waits_while_redis_refuses_writes_loses_nothing_and_goes_on(
    jobs: ModuleType, client: Any, process: subprocess.Popen[bytes], log: Path, tmp_path: Path, kind: str
) -> None:
    keys, gate = jobs.pool.keys, tmp_path / "gate"

    def report() -> Any:
        return json.loads(next(iter(client.hvals(keys.presence("cpu")))))

    def said(by: str) -> Callable[[], Any]:
        return lambda: re.search(f"{by}.*Redis refuses: {kind} .* \\(", (log / "cpu-a.log").read_text())

    gate.touch()
    running = jobs.pool.submit(jobs.held, (str(gate),))
    until(lambda: jobs.app.control.inspect(["cpu-a@test"]).active()["cpu-a@test"], "its main process knows that it runs")
    claimed(jobs, running.task_id)
    os.kill(process.pid, signal.SIGSTOP)  # what it asked for it gets, and can record it only when that is refused
    admitted = jobs.pool.submit(jobs.count, (f"admitted {kind}",))
    jobs.count.apply_async((f"plain {kind}",), queue="cpu-jobs")
    with refusing(client, kind):
        os.kill(process.pid, signal.SIGCONT)
        until(said("consumer: Cannot connect"), "it names the cause, and what to do")
        gate.unlink()
        until(said("ForkPoolWorker"), "the job has ended, and cannot say so")
        if kind == "OOM":
            until(lambda: (report()["slots"], report()["busy"]) == (0, 1), "it reports that it takes nothing")
        assert (jobs.pool.job(running.task_id).state, jobs.pool.job(admitted.task_id).state) == (State.CLAIMED, State.ADMITTED)
    assert outcome(jobs, running.task_id) == (State.DONE, {"cpu": 1})
    assert jobs.app.AsyncResult(running.task_id).get(timeout=20) == "cpu"
    assert outcome(jobs, admitted.task_id) == (State.DONE, {"cpu": 1})
    until(lambda: client.exists(f"plain {kind}"), "the other one has run too")
    until(lambda: not client.hlen(keys.unacked("cpu")), "nothing is held")
    after = jobs.pool.submit(jobs.work, ({},))
    assert outcome(jobs, after.task_id) == (State.DONE, {"cpu": 1})
    assert [client.get(f"{which} {kind}") for which in ("admitted", "plain")] == ["1", "1"]
    assert (process.poll(), client.llen("cpu-jobs")) == (None, 0)


def test_a_worker_that_starts_while_redis_refuses_writes_waits_for_it(
    url: str, jobs: ModuleType, client: Any, tmp_path: Path
) -> None:
    path, noticed = tmp_path / "lone.log", threading.Event()

    def accept() -> None:
        with refusing(client, "OOM"):
            noticed.set()
            until(lambda: path.exists() and "Cannot connect" in path.read_text(), "it cannot connect", 90)

    mending = threading.Thread(target=accept)
    mending.start()
    noticed.wait()
    with worker(url, "lone", "lone-jobs", "lone", tmp_path):
        mending.join()
        assert jobs.work.apply_async(({},), queue="lone-jobs").get(timeout=20) == "lone"


@pytest.fixture
def waiting_app(jobs: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The app, whose connections ask again at once."""
    monkeypatch.setattr(connection, "_BACKOFF", NoBackoff())
    return jobs.app


def test_a_finished_job_waits_for_redis_to_take_its_end_however_long_that_takes(
    waiting_app: Any, jobs: ModuleType, client: Any
) -> None:
    patient = Connection(waiting_app, patient=True)
    asking = threading.Thread(target=lambda: patient.run("check", ledger.check(jobs.pool.keys, "cpu")), daemon=True)
    with refusing(client, "OOM"):
        client.config_resetstat()
        asking.start()
        until(lambda: client.info("commandstats").get("cmdstat_evalsha", {}).get("calls", 0) > 50, "it asks again and again")
        assert asking.is_alive()
    asking.join(timeout=60)
    assert not asking.is_alive()


def test_after_a_failover_a_connection_to_the_old_master_is_given_up(jobs: ModuleType, client: Any) -> None:
    impatient = Connection(jobs.app, patient=False, timeout=5)
    call = ledger.check(jobs.pool.keys, "cpu")
    impatient.run("check", call)
    before = impatient.client.client_id()
    with refusing(client, "READONLY"), pytest.raises(PoolUnavailable, match=r"READONLY .* master"):
        impatient.run("check", call)
    impatient.run("check", call)
    assert impatient.client.client_id() != before


def test_a_check_for_writes_writes_nothing(jobs: ModuleType, redis_url: str) -> None:
    with Redis.from_url(redis_url, decode_responses=True) as empty:
        check = ledger.check(jobs.pool.keys, "cpu")
        assert empty.eval(ledger.script("check"), len(check.keys), *check.keys, *check.args) == 0
        assert empty.keys() == []
