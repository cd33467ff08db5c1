"""Every way in which an attempt can end, in real workers: exactly one accepted outcome, and at most one start a tier."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
from celery.exceptions import WorkerLostError
from tests.contract.api_and_operator import admit, claimed, outcome, submit
from tests.contract.workers import connections, cut_off_what_came_after, parked, worker
from tests.watching import until

from workerpool_routing import Reason
from workerpool_routing.ledger import State

pytestmark = pytest.mark.contract


@pytest.mark.parametrize("ending", ["raise", "kill", "exit"])
@pytest.mark.parametrize("task", ["work", "based"])
def test_an_accelerated_attempt_that_ends_badly_runs_once_more_on_the_plain_tier(
    two_tiers: ModuleType, task: str, ending: str
) -> None:
    decision = submit(two_tiers, getattr(two_tiers, task), {"gpu": ending})
    assert decision.tier == "gpu"
    assert two_tiers.app.AsyncResult(decision.task_id).get(timeout=60) == "cpu"
    assert outcome(two_tiers, decision.task_id) == (State.DONE, {"gpu": 1, "cpu": 1})
    job = two_tiers.pool.job(decision.task_id)
    assert (job.attempt, job.tier, job.wanted) == (2, "cpu", "gpu")
    assert job.reason is (Reason.ATTEMPT_LOST if ending == "kill" else Reason.ATTEMPT_FAILED)


@pytest.mark.parametrize("ending", ["memory", "cancel", "repr raises", "repr is no text"])
def test_an_error_of_any_kind_is_a_failure(two_tiers: ModuleType, ending: str) -> None:
    decision = submit(two_tiers, two_tiers.work, {"gpu": ending})
    assert two_tiers.app.AsyncResult(decision.task_id).get(timeout=60) == "cpu"
    assert outcome(two_tiers, decision.task_id) == (State.DONE, {"gpu": 1, "cpu": 1})
    decision = submit(two_tiers, two_tiers.work, {"gpu": ending, "cpu": ending})
    assert outcome(two_tiers, decision.task_id) == (State.FAILED, {"gpu": 1, "cpu": 1})
    until(lambda: two_tiers.app.AsyncResult(decision.task_id).state == "FAILURE", "Celery says so too")


@pytest.mark.parametrize("task", ["hard_limited", "soft_limited"])
def test_an_accelerated_attempt_over_its_time_limit_runs_once_more_on_the_plain_tier(two_tiers: ModuleType, task: str) -> None:
    decision = submit(two_tiers, getattr(two_tiers, task), {"gpu": "hang"})
    assert two_tiers.app.AsyncResult(decision.task_id).get(timeout=60) == "cpu"
    assert outcome(two_tiers, decision.task_id) == (State.DONE, {"gpu": 1, "cpu": 1})


@pytest.mark.parametrize("endings", [{"before": "hold"}, {"gpu": "hold"}], ids=["before it began", "after it returned"])
def test_a_soft_time_limit_that_strikes_while_the_ledger_is_asked_costs_no_outcome(
    two_tiers: ModuleType, endings: dict[str, str]
) -> None:
    decision = submit(two_tiers, two_tiers.late, endings)
    # Redis may have done what was asked of it although nobody heard the answer.
    assert outcome(two_tiers, decision.task_id) in [(State.DONE, {"gpu": 1}), (State.DONE, {"gpu": 1, "cpu": 1})]
    assert two_tiers.app.AsyncResult(decision.task_id).get(timeout=60) == two_tiers.pool.job(decision.task_id).tier


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
    assert two_tiers.app.AsyncResult(decision.task_id).get(timeout=60) == "gpu"
    assert outcome(two_tiers, decision.task_id) == (State.DONE, {"gpu": 1})
    assert until(lambda: two_tiers.app.backend.client.get(f"success-of:{decision.task_id}"), "the hook ran") == b"gpu"


def test_a_job_that_raises_on_both_tiers_fails_with_its_own_exception(two_tiers: ModuleType) -> None:
    decision = submit(two_tiers, two_tiers.work, {"gpu": "raise", "cpu": "raise"})
    with pytest.raises(ValueError, match="asked to fail"):
        two_tiers.app.AsyncResult(decision.task_id).get(timeout=60)
    assert outcome(two_tiers, decision.task_id) == (State.FAILED, {"gpu": 1, "cpu": 1})


def test_a_required_job_that_raises_fails_where_it_is(two_tiers: ModuleType) -> None:
    decision = two_tiers.pool.submit(two_tiers.work, ({"gpu": "raise"},), accelerated="required")
    with pytest.raises(ValueError, match="asked to fail"):
        two_tiers.app.AsyncResult(decision.task_id).get(timeout=60)
    assert outcome(two_tiers, decision.task_id) == (State.FAILED, {"gpu": 1})


def test_a_poison_job_gets_one_accelerated_and_two_plain_attempts_then_fails_for_good(two_tiers: ModuleType) -> None:
    decision = submit(two_tiers, two_tiers.work, {"gpu": "kill", "cpu": "kill"})
    with pytest.raises(Exception, match="lost each time"):
        two_tiers.app.AsyncResult(decision.task_id).get(timeout=60)
    assert outcome(two_tiers, decision.task_id) == (State.FAILED, {"gpu": 1, "cpu": 2})


def test_a_job_past_its_deadline_expires_and_never_starts(two_tiers: ModuleType) -> None:
    client, clock = two_tiers.pool.connection.client, two_tiers.pool.connection.client.time
    blocking = submit(two_tiers, two_tiers.work, {"gpu": "gate"})
    late = two_tiers.pool.submit(two_tiers.work, ({},), accelerated="required", deadline=1.2)
    admitted = two_tiers.pool.job(late.task_id).times[State.ADMITTED] / 1000
    until(lambda: clock()[0] > admitted + 2.2, "its deadline is over")
    client.set("gate", "open")
    assert outcome(two_tiers, late.task_id) == (State.EXPIRED, {})
    assert outcome(two_tiers, blocking.task_id)[0] is State.DONE
    client.delete("gate")


def test_a_job_that_began_before_its_deadline_falls_back_after_it(two_tiers: ModuleType) -> None:
    client, clock = two_tiers.pool.connection.client, two_tiers.pool.connection.client.time
    decision = submit(two_tiers, two_tiers.work, {"gpu": "gate, raise"}, deadline=10)
    began = claimed(two_tiers, decision.task_id).times[State.ADMITTED] / 1000
    until(lambda: clock()[0] > began + 11, "its deadline is over")
    client.set("gate", "open")
    assert outcome(two_tiers, decision.task_id) == (State.DONE, {"gpu": 1, "cpu": 1})
    client.delete("gate")


def expired(raw: str) -> str:
    """The same message when its deadline has passed, as another delivery."""
    message = json.loads(raw)
    message["headers"]["expires"] = "2001-01-01T00:00:00+00:00"
    message["properties"]["delivery_tag"] = "late"
    return json.dumps(message)


def test_a_copy_that_comes_up_after_the_deadline_of_a_job_that_runs_stores_nothing(
    url: str, two_tiers: ModuleType, tmp_path: Path
) -> None:
    client, keys, log = two_tiers.pool.connection.client, two_tiers.pool.keys, tmp_path / "cpu-two.log"
    with parked(two_tiers, "cpu-a"), worker(url, "cpu", "cpu-jobs", "cpu-two", tmp_path, "-c", "2"):
        decision = two_tiers.pool.submit(two_tiers.work, ({"cpu": "gate"},))
        running = claimed(two_tiers, decision.task_id)
        copy = expired(json.dumps(json.loads(client.hget(keys.unacked("cpu"), running.tag))[0]))
        client.lpush("cpu-jobs", copy)
        until(lambda: any(said in log.read_text() for said in ("its delivery is stale", "Discarding revoked")), "it came up")
        assert two_tiers.app.AsyncResult(decision.task_id).state == "PENDING"
        client.set("gate", "open")
        assert outcome(two_tiers, decision.task_id) == (State.DONE, {"cpu": 1})
        client.delete("gate")
    assert two_tiers.app.AsyncResult(decision.task_id).get(timeout=60) == "cpu"


def test_a_job_that_began_in_time_and_was_cut_off_runs_again_after_its_deadline(two_tiers: ModuleType) -> None:
    client, keys = two_tiers.pool.connection.client, two_tiers.pool.keys
    with parked(two_tiers, "cpu-a"):
        decision = two_tiers.pool.submit(two_tiers.work, ({},))
        message = expired(until(lambda: client.rpop("cpu-jobs"), "it waits"))
        client.hset(keys.job(decision.task_id), mapping={"state": "claimed", "tag": "gone", "owner": "cpu-gone.1"})
        client.lpush("cpu-jobs", message)
    assert outcome(two_tiers, decision.task_id) == (State.DONE, {"cpu": 1})
    assert two_tiers.app.AsyncResult(decision.task_id).get(timeout=60) == "cpu"


def test_a_worker_that_dies_between_the_two_steps_of_expiring_a_job_leaves_the_second_to_the_next(two_tiers: ModuleType) -> None:
    client, keys = two_tiers.pool.connection.client, two_tiers.pool.keys
    with parked(two_tiers, "cpu-a"):
        decision = two_tiers.pool.submit(two_tiers.work, ({},))
        message = expired(until(lambda: client.rpop("cpu-jobs"), "it waits"))
        client.hset(keys.job(decision.task_id), "state", "expired")
        client.lpush("cpu-jobs", message)
    result = two_tiers.app.AsyncResult(decision.task_id)
    until(lambda: result.state == "REVOKED", "Celery has stored it")
    assert outcome(two_tiers, decision.task_id) == (State.EXPIRED, {})


def test_whether_a_job_expires_is_asked_again_when_redis_takes_the_answer(
    url: str, two_tiers: ModuleType, tmp_path: Path
) -> None:
    client, keys, log = two_tiers.pool.connection.client, two_tiers.pool.keys, tmp_path / "gpu-late.log"
    with parked(two_tiers), worker(url, "gpu", "gpu-jobs", "gpu-late", tmp_path):
        signature = admit(two_tiers, two_tiers.add.s(1))
        signature.apply_async(countdown=12, expires=12)
        until(lambda: client.hlen(keys.unacked("gpu")), "it waits for its time in the worker")
        client.config_set("maxmemory", 1)
        try:
            until(lambda: "undecided" in log.read_text(), "Redis takes nothing")
        finally:
            client.config_set("maxmemory", 0)
        assert outcome(two_tiers, signature.options["task_id"]) == (State.EXPIRED, {})
        result = two_tiers.app.AsyncResult(signature.options["task_id"])
        until(lambda: result.state == "REVOKED", "Celery has stored it, after the ledger")


def test_a_child_that_dies_before_it_claims_has_started_the_job_too(two_tiers: ModuleType) -> None:
    decision = submit(two_tiers, two_tiers.work, {"before": "gpu"})
    assert two_tiers.app.AsyncResult(decision.task_id).get(timeout=60) == "cpu"
    assert outcome(two_tiers, decision.task_id) == (State.DONE, {"gpu": 1, "cpu": 1})


def test_a_job_whose_child_always_dies_before_it_claims_fails_for_good(two_tiers: ModuleType) -> None:
    decision = submit(two_tiers, two_tiers.work, {"before": "always"})
    with pytest.raises(WorkerLostError):
        two_tiers.app.AsyncResult(decision.task_id).get(timeout=60)
    assert outcome(two_tiers, decision.task_id) == (State.FAILED, {"gpu": 1, "cpu": 2})


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


def test_nothing_is_left_in_flight_spilled_or_held(two_tiers: ModuleType) -> None:
    keys, client = two_tiers.pool.keys, two_tiers.pool.connection.client
    until(lambda: len(two_tiers.pool.workers()) == 2, "both workers are there")
    until(lambda: not client.hlen(keys.unacked("gpu")) and not client.hlen(keys.unacked("cpu")), "nothing is in flight")
    assert not client.exists(*(keys.spilled(tier) for tier in ("gpu", "cpu")))
    assert not client.exists(*(keys.held(owner) for owner in two_tiers.pool.workers()))


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


def test_both_errors_of_a_job_that_failed_twice_are_kept(two_tiers: ModuleType) -> None:
    decision = submit(two_tiers, two_tiers.work, {"gpu": "raise", "cpu": "exit"})
    assert outcome(two_tiers, decision.task_id) == (State.FAILED, {"gpu": 1, "cpu": 1})
    first, second = two_tiers.pool.job(decision.task_id).runs
    assert (first.tier, first.how, first.error) == ("gpu", "failed", "ValueError('asked to fail')")
    assert (second.tier, second.how, second.error) == ("cpu", "failed", "SystemExit(3)")
    assert first.began <= first.ended <= second.began <= second.ended


def test_the_seconds_that_a_tier_needs_are_measured(two_tiers: ModuleType) -> None:
    client, key = two_tiers.pool.connection.client, two_tiers.pool.keys.service("gpu")
    client.delete(key)
    took = []
    for seconds in (0.5, 1.5):
        decision = submit(two_tiers, two_tiers.work, {}, seconds)
        outcome(two_tiers, decision.task_id)
        (run,) = two_tiers.pool.job(decision.task_id).runs
        took.append((run.ended - run.began) / 1000)
        assert took[-1] >= seconds
    assert float(client.hget(key, two_tiers.work.name)) == pytest.approx(0.8 * took[0] + 0.2 * took[1], abs=0.002)
