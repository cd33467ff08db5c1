"""Where results and failures are stored, and what is if the ledger, or Redis, cannot say."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from types import ModuleType

import pytest
from redis import Redis
from tests.contract.api_and_operator import claimed, outcome, submit
from tests.contract.workers import parked, worker
from tests.watching import until

from workerpool_operator.local.redis_server import RedisServer
from workerpool_routing.ledger import State

pytestmark = pytest.mark.contract


def test_a_result_that_nobody_wants_is_not_stored(two_tiers: ModuleType) -> None:
    decision = submit(two_tiers, two_tiers.unstored)
    assert outcome(two_tiers, decision.task_id) == (State.DONE, {"gpu": 1})
    assert two_tiers.app.AsyncResult(decision.task_id).state == "PENDING"


def test_a_result_that_cannot_be_stored_fails_its_job(two_tiers: ModuleType) -> None:
    decision = submit(two_tiers, two_tiers.unencodable)
    with pytest.raises(Exception, match="not JSON serializable"):
        two_tiers.app.AsyncResult(decision.task_id).get(timeout=60)
    assert outcome(two_tiers, decision.task_id) == (State.FAILED, {"gpu": 1})


def test_callbacks_go_out_with_the_result(two_tiers: ModuleType) -> None:
    body = two_tiers.total.si([1], "linked").set(queue="cpu-jobs")
    decision = submit(two_tiers, two_tiers.work, {}, link=body)
    assert two_tiers.app.AsyncResult(decision.task_id).get(timeout=60) == "gpu"
    assert outcome(two_tiers, decision.task_id) == (State.DONE, {"gpu": 1})
    until(lambda: int(two_tiers.app.backend.client.get("linked") or 0) == 1, "the callback ran")


@pytest.mark.parametrize(("host", "database"), [("127.0.0.1", 3), ("localhost", 0)])
def test_the_result_is_where_the_app_says(
    redis_server: RedisServer, url: str, two_tiers: ModuleType, tmp_path: Path, host: str, database: int
) -> None:
    """In another database of the ledger's Redis, and in a Redis that is not known to be the same."""
    backend = {"JOBS_BACKEND": f"redis://{host}:{redis_server.port}/{database}"}
    with parked(two_tiers), worker(url, "gpu", "gpu-jobs", f"gpu-{host}", tmp_path, env=backend) as leaving:
        decision = submit(two_tiers, two_tiers.work, {})
        assert outcome(two_tiers, decision.task_id) == (State.DONE, {"gpu": 1})
        leaving.terminate()
        leaving.wait(30)
    key = f"celery-task-meta-{decision.task_id}"
    with Redis("127.0.0.1", redis_server.port, database) as client:
        stored = json.loads(client.get(key) or "null")
        assert (stored["status"], stored["result"], stored["task_id"]) == ("SUCCESS", "gpu", decision.task_id)
        assert 0 < client.ttl(key) <= 24 * 3600
    assert bool(two_tiers.app.backend.client.exists(key)) == (database == 0)


def test_a_failure_that_is_not_acknowledged_ends_its_job_all_the_same(two_tiers: ModuleType) -> None:
    decision = submit(two_tiers, two_tiers.not_acknowledged)
    with pytest.raises(RuntimeError, match="cpu"):
        two_tiers.app.AsyncResult(decision.task_id).get(timeout=60)
    assert outcome(two_tiers, decision.task_id) == (State.FAILED, {"gpu": 1, "cpu": 1})


def test_a_job_whose_ledger_entry_is_gone_keeps_its_result(two_tiers: ModuleType) -> None:
    decision = submit(two_tiers, two_tiers.work, {}, 1)
    claimed(two_tiers, decision.task_id)
    two_tiers.pool.connection.client.delete(two_tiers.pool.keys.job(decision.task_id))
    assert two_tiers.app.AsyncResult(decision.task_id).get(timeout=60) == "gpu"


def test_a_failure_of_a_job_whose_ledger_entry_is_gone_is_stored(two_tiers: ModuleType) -> None:
    client = two_tiers.pool.connection.client
    decision = submit(two_tiers, two_tiers.work, {"gpu": "gate, raise"})
    claimed(two_tiers, decision.task_id)
    client.delete(two_tiers.pool.keys.job(decision.task_id))
    client.set("gate", "open")
    with pytest.raises(ValueError, match="asked to fail"):
        two_tiers.app.AsyncResult(decision.task_id).get(timeout=60)
    client.delete("gate")


def test_a_failure_of_a_job_whose_ledger_entry_cannot_be_read_ends_it(two_tiers: ModuleType) -> None:
    client, keys = two_tiers.pool.connection.client, two_tiers.pool.keys
    decision = submit(two_tiers, two_tiers.work, {"gpu": "gate, raise"})
    claimed(two_tiers, decision.task_id)
    client.hset(keys.job(decision.task_id), "reason", "nonsense")
    client.set("gate", "open")
    until(lambda: client.hget(keys.job(decision.task_id), "state") == State.FAILED, "it has failed")
    client.delete("gate")
    assert two_tiers.app.AsyncResult(decision.task_id).state == "FAILURE"


def test_a_result_that_comes_when_the_ledger_has_forgotten_its_job_replaces_no_success(two_tiers: ModuleType) -> None:
    client = two_tiers.pool.connection.client
    decision = submit(two_tiers, two_tiers.work, {"gpu": "gate"})
    claimed(two_tiers, decision.task_id)
    client.delete(two_tiers.pool.keys.job(decision.task_id))
    accepted = {"task_id": decision.task_id, "status": "SUCCESS", "result": "accepted", "traceback": None, "children": []}
    client.set(f"celery-task-meta-{decision.task_id}", two_tiers.app.backend.encode(accepted))
    client.set("gate", "open")
    until(lambda: not client.hlen(two_tiers.pool.keys.unacked("gpu")), "it is acknowledged")
    client.delete("gate")
    assert two_tiers.app.AsyncResult(decision.task_id).get(timeout=60) == "accepted"


def test_a_user_who_may_not_change_the_database_stores_results_all_the_same(
    redis_server: RedisServer, two_tiers: ModuleType, tmp_path: Path
) -> None:
    rights = ["on", ">secret", "~*", "&*", "+@all", "-@admin", "-@dangerous", "-select"]
    two_tiers.pool.connection.client.execute_command("ACL", "SETUSER", "app", *rights)
    url = f"redis://app:secret@127.0.0.1:{redis_server.port}/0"
    with parked(two_tiers), worker(url, "gpu", "gpu-jobs", "gpu-app", tmp_path):
        decision = submit(two_tiers, two_tiers.work, {})
        assert outcome(two_tiers, decision.task_id) == (State.DONE, {"gpu": 1})
        assert two_tiers.app.AsyncResult(decision.task_id).get(timeout=60) == "gpu"


def test_an_ignore_whose_end_does_not_get_through_is_entered_as_soon_as_redis_takes_it(
    url: str, two_tiers: ModuleType, tmp_path: Path
) -> None:
    client = two_tiers.app.backend.client
    client.set("door", "closed")
    with parked(two_tiers), worker(url, "gpu", "gpu-jobs", "gpu-full", tmp_path):
        decision = submit(two_tiers, two_tiers.special, "ignore")
        claimed(two_tiers, decision.task_id)
        client.config_set("maxmemory", 1)
        try:
            client.delete("door")
            until(lambda: "asked again" in (tmp_path / "gpu-full.log").read_text(), "Redis takes nothing")
            assert two_tiers.pool.job(decision.task_id).state is State.CLAIMED
        finally:
            client.config_set("maxmemory", 0)
        assert outcome(two_tiers, decision.task_id) == (State.DONE, {"gpu": 1})
    assert two_tiers.pool.job(decision.task_id).runs[0].how == "ignored"


def test_a_redis_that_pauses_while_a_job_ends_costs_neither_job_nor_result(
    redis_server: RedisServer, two_tiers: ModuleType
) -> None:
    decision = submit(two_tiers, two_tiers.work, {}, 1.5)
    claimed(two_tiers, decision.task_id)
    time.sleep(0.7)
    os.kill(redis_server.pid, signal.SIGSTOP)
    time.sleep(7)
    os.kill(redis_server.pid, signal.SIGCONT)
    assert two_tiers.app.AsyncResult(decision.task_id).get(timeout=60) == "gpu"
    assert outcome(two_tiers, decision.task_id) == (State.DONE, {"gpu": 1})


def test_a_child_that_dies_while_redis_does_not_answer_is_dealt_with_afterwards(
    redis_server: RedisServer, two_tiers: ModuleType
) -> None:
    decision = submit(two_tiers, two_tiers.work, {"gpu": "kill"}, 1)
    claimed(two_tiers, decision.task_id)
    os.kill(redis_server.pid, signal.SIGSTOP)
    time.sleep(3)
    os.kill(redis_server.pid, signal.SIGCONT)
    assert two_tiers.app.AsyncResult(decision.task_id).get(timeout=60) == "cpu"
    assert outcome(two_tiers, decision.task_id) == (State.DONE, {"gpu": 1, "cpu": 1})
