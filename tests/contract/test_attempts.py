"""Every way in which an attempt can end, in real workers: exactly one accepted outcome, and at most one start a tier."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from celery.exceptions import WorkerLostError
from redis import Redis
from tests.contract.workers import APP, connections, cut_off_what_came_after, until, worker

from workerpool_operator import salvage
from workerpool_operator.broker import RedisBroker
from workerpool_operator.local.redis_server import RedisServer
from workerpool_operator.model import WorkerPoolSpec
from workerpool_operator.ports import Pool
from workerpool_routing import Reason, wire
from workerpool_routing.ledger import State

pytestmark = [pytest.mark.contract, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def two_tiers(url: str, jobs: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The app, with a worker on either tier that no test kills."""
    log = tmp_path_factory.mktemp("workers")
    with ExitStack() as stack:
        stack.enter_context(worker(url, "gpu", "gpu-jobs", "gpu-a", log))
        stack.enter_context(worker(url, "cpu", "cpu-jobs", "cpu-a", log))
        yield jobs


def submit(jobs: ModuleType, task: Any, *args: Any, **options: Any) -> Any:
    """Submit to the GPU tier, when it has its slot free."""
    until(jobs.pool.has_accelerated_workers, "a GPU slot is free")
    until(lambda: jobs.pool.should_accelerate(task).reason is Reason.FREE_SLOT, "the GPU queue is empty")
    return jobs.pool.submit(task, args, accelerated=True, **options)


def outcome(jobs: ModuleType, task_id: str) -> tuple[State, dict[str, int]]:
    """How the job ended on the ledger, and how often each tier started it."""
    job = until(lambda: (j := jobs.pool.job(task_id)) and j.state.ended and j, f"{task_id} has ended")
    return job.state, job.starts


@pytest.mark.parametrize("ending", ["raise", "kill", "exit"])
@pytest.mark.parametrize("task", ["work", "based"])
def test_an_accelerated_attempt_that_ends_badly_runs_once_more_on_the_plain_tier(
    two_tiers: ModuleType, task: str, ending: str
) -> None:
    decision = submit(two_tiers, getattr(two_tiers, task), {"gpu": ending})
    assert decision.tier == "gpu"
    assert two_tiers.app.AsyncResult(decision.task_id).get(timeout=20) == "cpu"
    assert outcome(two_tiers, decision.task_id) == (State.DONE, {"gpu": 1, "cpu": 1})
    job = two_tiers.pool.job(decision.task_id)
    assert (job.attempt, job.tier, job.wanted) == (2, "cpu", "gpu")
    assert job.reason is (Reason.ATTEMPT_LOST if ending == "kill" else Reason.ATTEMPT_FAILED)


@pytest.mark.parametrize("ending", ["cancel", "repr raises", "repr is no text"])
def test_an_error_of_any_kind_is_a_failure(two_tiers: ModuleType, ending: str) -> None:
    decision = submit(two_tiers, two_tiers.work, {"gpu": ending})
    assert two_tiers.app.AsyncResult(decision.task_id).get(timeout=20) == "cpu"
    assert outcome(two_tiers, decision.task_id) == (State.DONE, {"gpu": 1, "cpu": 1})
    decision = submit(two_tiers, two_tiers.work, {"gpu": ending, "cpu": ending})
    assert outcome(two_tiers, decision.task_id) == (State.FAILED, {"gpu": 1, "cpu": 1})
    until(lambda: two_tiers.app.AsyncResult(decision.task_id).state == "FAILURE", "Celery says so too")


@pytest.mark.parametrize("task", ["hard_limited", "soft_limited"])
def test_an_accelerated_attempt_over_its_time_limit_runs_once_more_on_the_plain_tier(two_tiers: ModuleType, task: str) -> None:
    decision = submit(two_tiers, getattr(two_tiers, task), {"gpu": "hang"})
    assert two_tiers.app.AsyncResult(decision.task_id).get(timeout=20) == "cpu"
    assert outcome(two_tiers, decision.task_id) == (State.DONE, {"gpu": 1, "cpu": 1})


@pytest.mark.parametrize("endings", [{"before": "hold"}, {"gpu": "hold"}], ids=["before it began", "after it returned"])
def test_a_soft_time_limit_that_strikes_while_the_ledger_is_asked_costs_no_outcome(
    two_tiers: ModuleType, endings: dict[str, str]
) -> None:
    decision = submit(two_tiers, two_tiers.late, endings)
    # Redis may have done what was asked of it although nobody heard the answer.
    assert outcome(two_tiers, decision.task_id) in [(State.DONE, {"gpu": 1}), (State.DONE, {"gpu": 1, "cpu": 1})]
    assert two_tiers.app.AsyncResult(decision.task_id).get(timeout=20) == two_tiers.pool.job(decision.task_id).tier


def test_a_soft_time_limit_that_strikes_before_the_end_on_the_ledger_is_heard_costs_neither_outcome_nor_callback(
    two_tiers: ModuleType,
) -> None:
    callback = two_tiers.total.si([1], "unheard").set(queue="cpu-jobs")
    decision = submit(two_tiers, two_tiers.late, {"gpu": "unheard"}, link=callback)
    assert outcome(two_tiers, decision.task_id) == (State.DONE, {"gpu": 1, "cpu": 1})
    assert two_tiers.app.AsyncResult(decision.task_id).get(timeout=20) == "cpu"
    until(lambda: int(two_tiers.app.backend.client.get("unheard") or 0) == 1, "the callback ran")


def test_a_job_that_succeeds_runs_once_and_keeps_its_authors_hooks(two_tiers: ModuleType) -> None:
    decision = submit(two_tiers, two_tiers.based, {})
    assert two_tiers.app.AsyncResult(decision.task_id).get(timeout=20) == "gpu"
    assert outcome(two_tiers, decision.task_id) == (State.DONE, {"gpu": 1})
    assert until(lambda: two_tiers.app.backend.client.get(f"success-of:{decision.task_id}"), "the hook ran") == b"gpu"


def test_a_job_that_raises_on_both_tiers_fails_with_its_own_exception(two_tiers: ModuleType) -> None:
    decision = submit(two_tiers, two_tiers.work, {"gpu": "raise", "cpu": "raise"})
    with pytest.raises(ValueError, match="asked to fail"):
        two_tiers.app.AsyncResult(decision.task_id).get(timeout=20)
    assert outcome(two_tiers, decision.task_id) == (State.FAILED, {"gpu": 1, "cpu": 1})


def test_a_required_job_that_raises_fails_where_it_is(two_tiers: ModuleType) -> None:
    decision = two_tiers.pool.submit(two_tiers.work, ({"gpu": "raise"},), accelerated="required")
    with pytest.raises(ValueError, match="asked to fail"):
        two_tiers.app.AsyncResult(decision.task_id).get(timeout=20)
    assert outcome(two_tiers, decision.task_id) == (State.FAILED, {"gpu": 1})


def test_a_poison_job_gets_one_accelerated_and_two_plain_attempts_then_fails_for_good(two_tiers: ModuleType) -> None:
    decision = submit(two_tiers, two_tiers.work, {"gpu": "kill", "cpu": "kill"})
    with pytest.raises(Exception, match="lost each time"):
        two_tiers.app.AsyncResult(decision.task_id).get(timeout=30)
    assert outcome(two_tiers, decision.task_id) == (State.FAILED, {"gpu": 1, "cpu": 2})


def test_retries_that_the_author_asked_for_stay_on_their_tier_and_are_no_attempts(two_tiers: ModuleType) -> None:
    decision = submit(two_tiers, two_tiers.retried, 2)
    assert two_tiers.app.AsyncResult(decision.task_id).get(timeout=20) == ["gpu", 2]
    assert outcome(two_tiers, decision.task_id)[0] is State.DONE
    assert two_tiers.pool.job(decision.task_id).attempt == 1


def test_a_job_past_its_deadline_expires_and_never_starts(two_tiers: ModuleType) -> None:
    blocking = submit(two_tiers, two_tiers.work, {}, 3)
    late = two_tiers.pool.submit(two_tiers.work, ({},), accelerated="required", deadline=1.2)
    assert outcome(two_tiers, late.task_id) == (State.EXPIRED, {})
    assert outcome(two_tiers, blocking.task_id)[0] is State.DONE


def test_a_job_that_began_before_its_deadline_falls_back_after_it(two_tiers: ModuleType) -> None:
    client, clock = two_tiers.pool.connection.client, two_tiers.pool.connection.client.time
    decision = submit(two_tiers, two_tiers.work, {"gpu": "gate, raise"}, deadline=10)
    began = claimed(two_tiers, decision.task_id).times[State.ADMITTED] / 1000
    until(lambda: clock()[0] > began + 11, "its deadline is over")
    client.set("gate", "open")
    assert outcome(two_tiers, decision.task_id) == (State.DONE, {"gpu": 1, "cpu": 1})
    client.delete("gate")


def test_a_message_that_was_never_admitted_runs_as_plain_celery(two_tiers: ModuleType) -> None:
    result = two_tiers.work.apply_async(({},), queue="cpu-jobs")
    assert result.get(timeout=20) == "cpu"
    assert two_tiers.pool.job(result.id) is None


def test_a_task_that_calls_itself_is_one_attempt(two_tiers: ModuleType) -> None:
    decision = submit(two_tiers, two_tiers.factorial, 4)
    assert two_tiers.app.AsyncResult(decision.task_id).get(timeout=20) == 24
    assert outcome(two_tiers, decision.task_id) == (State.DONE, {"gpu": 1})


def test_a_child_that_dies_before_it_claims_has_started_the_job_too(two_tiers: ModuleType) -> None:
    decision = submit(two_tiers, two_tiers.work, {"before": "gpu"})
    assert two_tiers.app.AsyncResult(decision.task_id).get(timeout=20) == "cpu"
    assert outcome(two_tiers, decision.task_id) == (State.DONE, {"gpu": 1, "cpu": 1})


def test_a_job_whose_child_always_dies_before_it_claims_fails_for_good(two_tiers: ModuleType) -> None:
    decision = submit(two_tiers, two_tiers.work, {"before": "always"})
    with pytest.raises(WorkerLostError):
        two_tiers.app.AsyncResult(decision.task_id).get(timeout=30)
    assert outcome(two_tiers, decision.task_id) == (State.FAILED, {"gpu": 1, "cpu": 2})


def test_an_authors_hook_that_raises_before_the_task_fails_its_attempt(two_tiers: ModuleType) -> None:
    decision = submit(two_tiers, two_tiers.based, {"refused": ["gpu"]})
    assert two_tiers.app.AsyncResult(decision.task_id).get(timeout=20) == "cpu"
    assert outcome(two_tiers, decision.task_id) == (State.DONE, {"gpu": 1, "cpu": 1})
    decision = submit(two_tiers, two_tiers.based, {"refused": ["gpu", "cpu"]})
    with pytest.raises(ValueError, match="refused on cpu"):
        two_tiers.app.AsyncResult(decision.task_id).get(timeout=20)
    assert outcome(two_tiers, decision.task_id) == (State.FAILED, {"gpu": 1, "cpu": 1})


@pytest.mark.parametrize("admitted", [True, False])
def test_a_task_that_tracks_its_start_says_so_once_it_may_run(two_tiers: ModuleType, admitted: bool) -> None:
    task, endings, client = two_tiers.tracked, {"cpu": "gate"}, two_tiers.app.backend.client
    sent = two_tiers.pool.submit(task, (endings,)).task_id if admitted else task.apply_async((endings,), queue="cpu-jobs").id
    result = two_tiers.app.AsyncResult(sent)
    until(lambda: result.state == "STARTED", "it says that it has started")
    assert result.info["hostname"] == "cpu-a@test"
    client.set("gate", "open")
    assert result.get(timeout=20) == "cpu"
    client.delete("gate")


def test_a_copy_of_a_message_does_not_start_a_job_again_that_has_failed(two_tiers: ModuleType) -> None:
    client = two_tiers.pool.connection.client
    with parked(two_tiers, "cpu-a"):
        failed = two_tiers.pool.submit(two_tiers.tracked, ({"cpu": "raise"},))
        copy = until(lambda: client.lindex("cpu-jobs", 0), "it waits")
    assert outcome(two_tiers, failed.task_id) == (State.FAILED, {"cpu": 1})
    with parked(two_tiers, "cpu-a"):
        behind = two_tiers.pool.submit(two_tiers.work, ({},))
        client.rpush("cpu-jobs", copy)
    assert outcome(two_tiers, behind.task_id) == (State.DONE, {"cpu": 1})
    assert two_tiers.app.AsyncResult(failed.task_id).state == "FAILURE"
    assert outcome(two_tiers, failed.task_id) == (State.FAILED, {"cpu": 1})


def test_a_result_that_nobody_wants_is_not_stored(two_tiers: ModuleType) -> None:
    decision = submit(two_tiers, two_tiers.unstored)
    assert outcome(two_tiers, decision.task_id) == (State.DONE, {"gpu": 1})
    assert two_tiers.app.AsyncResult(decision.task_id).state == "PENDING"


def test_a_result_that_cannot_be_stored_fails_its_job(two_tiers: ModuleType) -> None:
    decision = submit(two_tiers, two_tiers.unencodable)
    with pytest.raises(Exception, match="not JSON serializable"):
        two_tiers.app.AsyncResult(decision.task_id).get(timeout=20)
    assert outcome(two_tiers, decision.task_id) == (State.FAILED, {"gpu": 1})


def test_callbacks_go_out_with_the_result(two_tiers: ModuleType) -> None:
    body = two_tiers.total.si([1], "linked").set(queue="cpu-jobs")
    decision = submit(two_tiers, two_tiers.work, {}, link=body)
    assert two_tiers.app.AsyncResult(decision.task_id).get(timeout=20) == "gpu"
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
        two_tiers.app.AsyncResult(decision.task_id).get(timeout=20)
    assert outcome(two_tiers, decision.task_id) == (State.FAILED, {"gpu": 1, "cpu": 1})


def test_a_job_whose_ledger_entry_is_gone_keeps_its_result(two_tiers: ModuleType) -> None:
    decision = submit(two_tiers, two_tiers.work, {}, 1)
    claimed(two_tiers, decision.task_id)
    two_tiers.pool.connection.client.delete(two_tiers.pool.keys.job(decision.task_id))
    assert two_tiers.app.AsyncResult(decision.task_id).get(timeout=20) == "gpu"


def test_a_failure_of_a_job_whose_ledger_entry_is_gone_is_stored(two_tiers: ModuleType) -> None:
    client = two_tiers.pool.connection.client
    decision = submit(two_tiers, two_tiers.work, {"gpu": "gate, raise"})
    claimed(two_tiers, decision.task_id)
    client.delete(two_tiers.pool.keys.job(decision.task_id))
    client.set("gate", "open")
    with pytest.raises(ValueError, match="asked to fail"):
        two_tiers.app.AsyncResult(decision.task_id).get(timeout=20)
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
    assert two_tiers.app.AsyncResult(decision.task_id).get(timeout=1) == "accepted"


def test_a_user_who_may_not_change_the_database_stores_results_all_the_same(
    redis_server: RedisServer, two_tiers: ModuleType, tmp_path: Path
) -> None:
    rights = ["on", ">secret", "~*", "&*", "+@all", "-@admin", "-@dangerous", "-select"]
    two_tiers.pool.connection.client.execute_command("ACL", "SETUSER", "app", *rights)
    url = f"redis://app:secret@127.0.0.1:{redis_server.port}/0"
    with parked(two_tiers), worker(url, "gpu", "gpu-jobs", "gpu-app", tmp_path):
        decision = submit(two_tiers, two_tiers.work, {})
        assert outcome(two_tiers, decision.task_id) == (State.DONE, {"gpu": 1})
        assert two_tiers.app.AsyncResult(decision.task_id).get(timeout=20) == "gpu"


def test_a_redis_that_pauses_while_a_job_ends_costs_neither_job_nor_result(
    redis_server: RedisServer, two_tiers: ModuleType
) -> None:
    decision = submit(two_tiers, two_tiers.work, {}, 1.5)
    claimed(two_tiers, decision.task_id)
    time.sleep(0.7)
    os.kill(redis_server.pid, signal.SIGSTOP)
    time.sleep(7)
    os.kill(redis_server.pid, signal.SIGCONT)
    assert two_tiers.app.AsyncResult(decision.task_id).get(timeout=30) == "gpu"
    assert outcome(two_tiers, decision.task_id) == (State.DONE, {"gpu": 1})


def test_a_child_that_dies_while_redis_does_not_answer_is_dealt_with_afterwards(
    redis_server: RedisServer, two_tiers: ModuleType
) -> None:
    decision = submit(two_tiers, two_tiers.work, {"gpu": "kill"}, 1)
    claimed(two_tiers, decision.task_id)
    os.kill(redis_server.pid, signal.SIGSTOP)
    time.sleep(3)
    os.kill(redis_server.pid, signal.SIGCONT)
    assert two_tiers.app.AsyncResult(decision.task_id).get(timeout=30) == "cpu"
    assert outcome(two_tiers, decision.task_id) == (State.DONE, {"gpu": 1, "cpu": 1})


def test_nothing_is_left_in_flight_spilled_or_held(two_tiers: ModuleType) -> None:
    keys, client = two_tiers.pool.keys, two_tiers.pool.connection.client
    until(lambda: len(two_tiers.pool.workers()) == 2, "both workers are there")
    until(lambda: not client.hlen(keys.unacked("gpu")) and not client.hlen(keys.unacked("cpu")), "nothing is in flight")
    assert not client.exists(*(keys.spilled(tier) for tier in ("gpu", "cpu")))
    assert not client.exists(*(keys.held(owner) for owner in two_tiers.pool.workers()))


def operator_pool(url: str) -> Pool:
    template = {"spec": {"containers": [{"name": "worker"}]}}
    tiers = [
        {"name": "gpu", "queue": "gpu-jobs", "accelerator": {"resource": "nvidia.com/gpu"}, "template": template},
        {"name": "cpu", "queue": "cpu-jobs", "template": template},
    ]
    spec = WorkerPoolSpec.model_validate({"app": APP, "broker": {"url": url}, "tiers": tiers})
    return Pool("test", "jobs", "uid", 1, 0.0, spec)


async def take_over_the_lost(url: str, tier: str) -> list[str]:
    """What the operator's pass does once presence has run out."""
    broker, pool = RedisBroker(asyncio.Event()), operator_pool(url)
    try:
        reading = await broker.read(url, [pool])
        assert isinstance(reading, dict)
        return [s for owner in reading[pool.id].tiers[tier].lost for s in await broker.take_over(url, pool, tier, owner)]
    finally:
        await broker.close()


async def swept(url: str) -> list[str]:
    """What the operator finds that fell between the steps."""
    broker = RedisBroker(asyncio.Event())
    try:
        return list(await broker.sweep(url, operator_pool(url)))
    finally:
        await broker.close()


def taken_over(url: str, task_id: str, tier: str = "gpu") -> list[str]:
    """What is said of that job; workers of other tests may be lost too."""
    return [sentence for sentence in asyncio.run(take_over_the_lost(url, tier)) if task_id in sentence]


def claimed(jobs: ModuleType, task_id: str) -> Any:
    return until(lambda: (job := jobs.pool.job(task_id)) and job.state is State.CLAIMED and job, "it is claimed")


@contextmanager
def parked(jobs: ModuleType, name: str = "gpu-a") -> Iterator[None]:
    """That worker takes nothing for the time of a block, so that another one of its tier gets what comes."""

    def takes_jobs() -> bool:
        return any(worker.worker == name and worker.slots for worker in jobs.pool.workers().values())

    client, keys = jobs.pool.connection.client, jobs.pool.keys
    client.sadd(keys.drain, name)
    until(lambda: not takes_jobs(), f"{name} takes nothing")
    try:
        yield
    finally:
        client.srem(keys.drain, name)
        until(takes_jobs, f"{name} is back")


def test_the_job_of_a_killed_worker_is_taken_over_once_and_runs_on_the_plain_tier(
    url: str, two_tiers: ModuleType, tmp_path: Path, short_life: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    with parked(two_tiers), worker(url, "gpu", "gpu-jobs", "gpu-killed", tmp_path) as doomed:
        decision = submit(two_tiers, two_tiers.work, {"gpu": "hang"})
        assert claimed(two_tiers, decision.task_id).owner.startswith("gpu-killed.")
        os.killpg(doomed.pid, signal.SIGKILL)
        with monkeypatch.context() as long_life:
            long_life.setattr(wire, "PRESENCE_LIFE_MS", 3_600_000)
            long_life.setattr(salvage, "UNRENEWED_SECONDS", 3_600)
            assert not taken_over(url, decision.task_id)  # its presence has not run out
    sentences = until(lambda: taken_over(url, decision.task_id), "it is taken over", 60)
    assert ["cpu" in sentence for sentence in sentences] == [True]
    assert not taken_over(url, decision.task_id)
    assert two_tiers.app.AsyncResult(decision.task_id).get(timeout=20) == "cpu"
    assert outcome(two_tiers, decision.task_id) == (State.DONE, {"gpu": 1, "cpu": 1})


def test_settings_that_reject_or_cancel_jobs_leave_their_outcome_to_the_ledger(
    url: str, two_tiers: ModuleType, tmp_path: Path
) -> None:
    client = two_tiers.pool.connection.client
    conf = {"task_reject_on_worker_lost": True, "worker_cancel_long_running_tasks_on_connection_loss": True}
    env, log, before = {"JOBS_CONF": json.dumps(conf)}, tmp_path / "cpu-odd.log", connections(client)
    with parked(two_tiers, "cpu-a"), worker(url, "cpu", "cpu-jobs", "cpu-odd", tmp_path, "-c", "2", env=env):
        dies = two_tiers.pool.submit(two_tiers.work, ({"before": "always"},))
        assert outcome(two_tiers, dies.task_id) == (State.FAILED, {"cpu": 2})
        runs = two_tiers.pool.submit(two_tiers.work, ({"cpu": "gate"},))
        claimed(two_tiers, runs.task_id)
        cut_off_what_came_after(client, before)
        until(lambda: log.read_text().count("Connected to redis") > 1, "the worker is connected again")
        client.set("gate", "open")
        assert outcome(two_tiers, runs.task_id) == (State.DONE, {"cpu": 1})
        client.delete("gate")


@pytest.mark.long
def test_a_zombie_changes_neither_the_ledger_nor_the_result(
    url: str, two_tiers: ModuleType, tmp_path: Path, short_life: float
) -> None:
    with parked(two_tiers), worker(url, "gpu", "gpu-jobs", "gpu-zombie", tmp_path) as zombie:
        decision = submit(two_tiers, two_tiers.work, {}, 3)
        assert claimed(two_tiers, decision.task_id).owner.startswith("gpu-zombie.")
        os.killpg(zombie.pid, signal.SIGSTOP)
        until(lambda: taken_over(url, decision.task_id), "it is taken over", 60)
        assert two_tiers.app.AsyncResult(decision.task_id).get(timeout=20) == "cpu"
        os.killpg(zombie.pid, signal.SIGCONT)
        until(lambda: "it was taken over" in (tmp_path / "gpu-zombie.log").read_text(), "the zombie noticed")
    assert outcome(two_tiers, decision.task_id) == (State.DONE, {"gpu": 1, "cpu": 1})
    assert two_tiers.app.AsyncResult(decision.task_id).get(timeout=1) == "cpu"


def test_a_process_that_is_stopped_between_the_end_of_a_task_and_its_result_stores_nothing_when_the_job_runs_again(
    url: str, two_tiers: ModuleType, tmp_path: Path, short_life: float
) -> None:
    client = two_tiers.app.backend.client
    with parked(two_tiers), worker(url, "gpu", "gpu-jobs", "gpu-stopped", tmp_path) as zombie:
        decision = submit(two_tiers, two_tiers.stopping)
        until(lambda: os.waitpid(zombie.pid, os.WUNTRACED | os.WNOHANG)[0], "it has stopped")
        until(lambda: taken_over(url, decision.task_id), "it is taken over", 60)
        claimed(two_tiers, decision.task_id)
        os.killpg(zombie.pid, signal.SIGCONT)
        until(lambda: "it was taken over" in (tmp_path / "gpu-stopped.log").read_text(), "the zombie noticed")
        assert two_tiers.app.AsyncResult(decision.task_id).state == "PENDING"
        client.set("gate", "open")
        assert two_tiers.app.AsyncResult(decision.task_id).get(timeout=20) == "cpu"
        client.delete("gate")
    assert outcome(two_tiers, decision.task_id) == (State.DONE, {"gpu": 1, "cpu": 1})


def test_a_zombie_that_asks_for_a_retry_leaves_the_result_as_it_is(
    url: str, two_tiers: ModuleType, tmp_path: Path, short_life: float
) -> None:
    client, log = two_tiers.app.backend.client, tmp_path / "gpu-wavers.log"
    with parked(two_tiers), worker(url, "gpu", "gpu-jobs", "gpu-wavers", tmp_path) as zombie:
        decision = submit(two_tiers, two_tiers.retried_late)
        claimed(two_tiers, decision.task_id)
        os.killpg(zombie.pid, signal.SIGSTOP)
        until(lambda: taken_over(url, decision.task_id), "it is taken over", 60)
        assert outcome(two_tiers, decision.task_id) == (State.FAILED, {"gpu": 1, "cpu": 1})
        client.set("gate", "open")
        os.killpg(zombie.pid, signal.SIGCONT)
        until(lambda: "it was taken over" in log.read_text(), "the zombie noticed")
        until(lambda: "its delivery is ended" in log.read_text(), "its retry is dropped", 60)
        client.delete("gate")
    assert two_tiers.app.AsyncResult(decision.task_id).state == "FAILURE"
    assert outcome(two_tiers, decision.task_id) == (State.FAILED, {"gpu": 1, "cpu": 1})


def test_a_retry_that_a_zombie_asks_for_does_not_overtake_the_attempt_that_counts(
    url: str, two_tiers: ModuleType, tmp_path: Path, short_life: float
) -> None:
    client, log = two_tiers.app.backend.client, tmp_path / "cpu-zombie.log"
    with worker(url, "cpu", "cpu-jobs", "cpu-zombie", tmp_path) as zombie:
        with parked(two_tiers, "cpu-a"):
            decision = two_tiers.pool.submit(two_tiers.retried_by_one, ("cpu-zombie",))
            claimed(two_tiers, decision.task_id)
            os.killpg(zombie.pid, signal.SIGSTOP)
            until(lambda: taken_over(url, decision.task_id, "cpu"), "it is taken over", 60)
        until(lambda: claimed(two_tiers, decision.task_id).owner.startswith("cpu-a."), "it runs again")
        client.set("gate of cpu-zombie", "open")
        os.killpg(zombie.pid, signal.SIGCONT)
        until(lambda: "it was taken over" in log.read_text(), "the zombie noticed")
        until(lambda: "its delivery is stale" in log.read_text(), "its retry is dropped", 60)
        client.set("gate of cpu-a", "open")
        assert two_tiers.app.AsyncResult(decision.task_id).get(timeout=20) == "cpu-a"
    assert outcome(two_tiers, decision.task_id) == (State.DONE, {"cpu": 2})


def test_a_worker_that_dies_between_a_stored_failure_and_its_acknowledgement_has_failed_the_job(
    url: str, two_tiers: ModuleType, tmp_path: Path, short_life: float
) -> None:
    with parked(two_tiers, "cpu-a"), worker(url, "cpu", "cpu-jobs", "cpu-cut", tmp_path) as doomed:
        decision = two_tiers.pool.submit(two_tiers.tracked, ({"cpu": "raise", "after": "kill"},))
        doomed.wait(60)
        assert two_tiers.pool.job(decision.task_id).state is State.FINISHING
        assert two_tiers.app.AsyncResult(decision.task_id).state == "FAILURE"

    until(lambda: decision.task_id in "".join(asyncio.run(swept(url))), "it is delivered again", 40)
    assert outcome(two_tiers, decision.task_id) == (State.FAILED, {"cpu": 1})
    assert two_tiers.app.AsyncResult(decision.task_id).state == "FAILURE"


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


def test_a_warm_shutdown_finishes_and_a_cold_one_gives_back_uncounted(url: str, two_tiers: ModuleType, tmp_path: Path) -> None:
    with parked(two_tiers), worker(url, "gpu", "gpu-jobs", "gpu-leaving", tmp_path) as leaving:
        decision = submit(two_tiers, two_tiers.work, {"gpu": "gate"})
        assert claimed(two_tiers, decision.task_id).owner.startswith("gpu-leaving.")
        leaving.send_signal(signal.SIGTERM)
        until(lambda: not any(w.worker == "gpu-leaving" and w.slots for w in two_tiers.pool.workers().values()), "no more slots")
        leaving.send_signal(signal.SIGQUIT)
        assert leaving.wait(20) is not None
    two_tiers.app.backend.client.set("gate", "open")
    assert outcome(two_tiers, decision.task_id) == (State.DONE, {"gpu": 2})
    two_tiers.app.backend.client.delete("gate")
    assert two_tiers.pool.job(decision.task_id).attempt == 1
    assert not [owner for owner in two_tiers.pool.workers() if owner.startswith("gpu-leaving")]
