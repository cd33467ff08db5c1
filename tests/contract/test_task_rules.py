"""What the author of a task may say of its attempts, and Celery's own ways to end one."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
from tests.contract.api_and_operator import claimed, outcome, submit
from tests.watching import until

from workerpool_routing.ledger import State

pytestmark = pytest.mark.contract


def test_a_task_may_keep_its_failures_where_they_are(two_tiers: ModuleType) -> None:
    decision = submit(two_tiers, two_tiers.settled_here, {"gpu": "raise"})
    assert outcome(two_tiers, decision.task_id) == (State.FAILED, {"gpu": 1})


@pytest.mark.parametrize(
    ("how", "ended"), [("device", (State.DONE, {"gpu": 1, "cpu": 1})), ("input", (State.FAILED, {"gpu": 1}))]
)
def test_a_task_may_name_the_errors_after_which_another_tier_helps(two_tiers: ModuleType, how: str, ended: Any) -> None:
    assert outcome(two_tiers, submit(two_tiers, two_tiers.particular, how).task_id) == ended


def test_a_task_may_opt_out_of_the_fence(two_tiers: ModuleType) -> None:
    result = two_tiers.unfenced.apply_async(({"gpu": "raise"},), queue="gpu-jobs")
    with pytest.raises(ValueError, match="asked to fail"):
        result.get(timeout=60)


@pytest.mark.parametrize(
    ("how", "ended"),
    [
        ("ignore", (State.DONE, {"gpu": 1})),
        ("reject", (State.FAILED, {"gpu": 1})),
        ("requeue", (State.DONE, {"gpu": 2})),
        ("replace", (State.DONE, {"gpu": 1})),
    ],
)
def test_celerys_own_exceptions_are_respected(two_tiers: ModuleType, how: str, ended: Any) -> None:
    decision = submit(two_tiers, two_tiers.special, how)
    assert outcome(two_tiers, decision.task_id) == ended
    if how == "replace":
        assert two_tiers.app.AsyncResult(decision.task_id).get(timeout=60) == 42


def test_a_job_that_is_revoked_while_it_runs_ends_there(two_tiers: ModuleType) -> None:
    decision = submit(two_tiers, two_tiers.work, {"gpu": "hang"})
    claimed(two_tiers, decision.task_id)
    two_tiers.app.control.revoke(decision.task_id, terminate=True)
    assert outcome(two_tiers, decision.task_id) == (State.EXPIRED, {"gpu": 1})
    assert two_tiers.app.AsyncResult(decision.task_id).state == "REVOKED"


def test_an_authors_hook_that_raises_before_the_task_fails_its_attempt(two_tiers: ModuleType) -> None:
    decision = submit(two_tiers, two_tiers.based, {"refused": ["gpu"]})
    assert two_tiers.app.AsyncResult(decision.task_id).get(timeout=60) == "cpu"
    assert outcome(two_tiers, decision.task_id) == (State.DONE, {"gpu": 1, "cpu": 1})
    decision = submit(two_tiers, two_tiers.based, {"refused": ["gpu", "cpu"]})
    with pytest.raises(ValueError, match="refused on cpu"):
        two_tiers.app.AsyncResult(decision.task_id).get(timeout=60)
    assert outcome(two_tiers, decision.task_id) == (State.FAILED, {"gpu": 1, "cpu": 1})


def test_retries_that_the_author_asked_for_stay_on_their_tier_and_are_no_attempts(two_tiers: ModuleType) -> None:
    decision = submit(two_tiers, two_tiers.retried, 2)
    assert two_tiers.app.AsyncResult(decision.task_id).get(timeout=60) == ["gpu", 2]
    assert outcome(two_tiers, decision.task_id)[0] is State.DONE
    assert two_tiers.pool.job(decision.task_id).attempt == 1


@pytest.mark.parametrize("admitted", [True, False])
def test_a_task_that_tracks_its_start_says_so_once_it_may_run(two_tiers: ModuleType, admitted: bool) -> None:
    task, endings, client = two_tiers.tracked, {"cpu": "gate"}, two_tiers.app.backend.client
    sent = two_tiers.pool.submit(task, (endings,)).task_id if admitted else task.apply_async((endings,), queue="cpu-jobs").id
    result = two_tiers.app.AsyncResult(sent)
    until(lambda: result.state == "STARTED", "it says that it has started")
    assert result.info["hostname"] == "cpu-a@test"
    client.set("gate", "open")
    assert result.get(timeout=60) == "cpu"
    client.delete("gate")


def test_a_task_that_calls_itself_is_one_attempt(two_tiers: ModuleType) -> None:
    decision = submit(two_tiers, two_tiers.factorial, 4)
    assert two_tiers.app.AsyncResult(decision.task_id).get(timeout=60) == 24
    assert outcome(two_tiers, decision.task_id) == (State.DONE, {"gpu": 1})


def test_a_message_that_was_never_admitted_runs_as_plain_celery(two_tiers: ModuleType) -> None:
    result = two_tiers.work.apply_async(({},), queue="cpu-jobs")
    assert result.get(timeout=60) == "cpu"
    assert two_tiers.pool.job(result.id) is None
