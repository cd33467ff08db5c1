"""Workers that are killed, and zombies: workers that were taken for lost and wake up."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import ModuleType

import pytest
from tests.contract.api_and_operator import claimed, outcome, submit, swept, taken_over
from tests.contract.workers import parked, worker
from tests.watching import until

from workerpool_operator import salvage
from workerpool_routing import wire
from workerpool_routing.ledger import State

pytestmark = pytest.mark.contract


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
    sentences = until(lambda: taken_over(url, decision.task_id), "it is taken over")
    assert ["cpu" in sentence for sentence in sentences] == [True]
    assert not taken_over(url, decision.task_id)
    assert two_tiers.app.AsyncResult(decision.task_id).get(timeout=60) == "cpu"
    assert outcome(two_tiers, decision.task_id) == (State.DONE, {"gpu": 1, "cpu": 1})


@pytest.mark.long
def test_a_zombie_changes_neither_the_ledger_nor_the_result(
    url: str, two_tiers: ModuleType, tmp_path: Path, short_life: float
) -> None:
    with parked(two_tiers), worker(url, "gpu", "gpu-jobs", "gpu-zombie", tmp_path) as zombie:
        decision = submit(two_tiers, two_tiers.work, {}, 3)
        assert claimed(two_tiers, decision.task_id).owner.startswith("gpu-zombie.")
        os.killpg(zombie.pid, signal.SIGSTOP)
        until(lambda: taken_over(url, decision.task_id), "it is taken over")
        assert two_tiers.app.AsyncResult(decision.task_id).get(timeout=60) == "cpu"
        os.killpg(zombie.pid, signal.SIGCONT)
        until(lambda: "it was taken over" in (tmp_path / "gpu-zombie.log").read_text(), "the zombie noticed")
    assert outcome(two_tiers, decision.task_id) == (State.DONE, {"gpu": 1, "cpu": 1})
    assert two_tiers.app.AsyncResult(decision.task_id).get(timeout=60) == "cpu"


def test_a_process_that_is_stopped_between_the_end_of_a_task_and_its_result_stores_nothing_when_the_job_runs_again(
    url: str, two_tiers: ModuleType, tmp_path: Path, short_life: float
) -> None:
    client = two_tiers.app.backend.client
    with parked(two_tiers), worker(url, "gpu", "gpu-jobs", "gpu-stopped", tmp_path) as zombie:
        decision = submit(two_tiers, two_tiers.stopping)
        until(lambda: os.waitpid(zombie.pid, os.WUNTRACED | os.WNOHANG)[0], "it has stopped")
        until(lambda: taken_over(url, decision.task_id), "it is taken over")
        claimed(two_tiers, decision.task_id)
        os.killpg(zombie.pid, signal.SIGCONT)
        until(lambda: "it was taken over" in (tmp_path / "gpu-stopped.log").read_text(), "the zombie noticed")
        assert two_tiers.app.AsyncResult(decision.task_id).state == "PENDING"
        client.set("gate", "open")
        assert two_tiers.app.AsyncResult(decision.task_id).get(timeout=60) == "cpu"
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
        until(lambda: taken_over(url, decision.task_id), "it is taken over")
        assert outcome(two_tiers, decision.task_id) == (State.FAILED, {"gpu": 1, "cpu": 1})
        client.set("gate", "open")
        os.killpg(zombie.pid, signal.SIGCONT)
        until(lambda: "it was taken over" in log.read_text(), "the zombie noticed")
        until(lambda: "its delivery is ended" in log.read_text(), "its retry is dropped")
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
            until(lambda: taken_over(url, decision.task_id, "cpu"), "it is taken over")
        until(lambda: claimed(two_tiers, decision.task_id).owner.startswith("cpu-a."), "it runs again")
        client.set("gate of cpu-zombie", "open")
        os.killpg(zombie.pid, signal.SIGCONT)
        until(lambda: "it was taken over" in log.read_text(), "the zombie noticed")
        until(lambda: "its delivery is stale" in log.read_text(), "its retry is dropped")
        client.set("gate of cpu-a", "open")
        assert two_tiers.app.AsyncResult(decision.task_id).get(timeout=60) == "cpu-a"
    assert outcome(two_tiers, decision.task_id) == (State.DONE, {"cpu": 2})


def test_a_worker_that_dies_between_a_stored_failure_and_its_acknowledgement_has_failed_the_job(
    url: str, two_tiers: ModuleType, tmp_path: Path, short_life: float
) -> None:
    with parked(two_tiers, "cpu-a"), worker(url, "cpu", "cpu-jobs", "cpu-cut", tmp_path) as doomed:
        decision = two_tiers.pool.submit(two_tiers.tracked, ({"cpu": "raise", "after": "kill"},))
        doomed.wait(60)
        assert two_tiers.pool.job(decision.task_id).state is State.FINISHING
        assert two_tiers.app.AsyncResult(decision.task_id).state == "FAILURE"

    until(lambda: decision.task_id in "".join(swept(url)), "it is delivered again")
    assert outcome(two_tiers, decision.task_id) == (State.FAILED, {"cpu": 1})
    assert two_tiers.app.AsyncResult(decision.task_id).state == "FAILURE"


def test_a_dead_workers_unclaimed_messages_are_delivered_again(
    url: str, two_tiers: ModuleType, tmp_path: Path, short_life: float
) -> None:
    client, keys = two_tiers.pool.connection.client, two_tiers.pool.keys
    with parked(two_tiers), worker(url, "gpu", "gpu-jobs", "gpu-eta", tmp_path) as doomed:
        result = two_tiers.add.apply_async((1,), queue="gpu-jobs", countdown=20)
        routed = two_tiers.add.apply_async((2,), queue="shelf", countdown=20)
        message = json.loads(client.rpop("shelf"))
        message["properties"]["delivery_info"] = {"exchange": "media", "routing_key": "video"}
        client.lpush("gpu-jobs", json.dumps(message))  # as Kombu does where a binding says so
        until(lambda: int(client.get(keys.scheduled("gpu")) or 0) == 2, "both are held, and it has reported so")
        os.killpg(doomed.pid, signal.SIGKILL)
    until(lambda: any("held by nobody" in sentence for sentence in swept(url)), "its worker is lost")
    assert (result.get(timeout=60), routed.get(timeout=60)) == (2, 3)
    until(lambda: client.hlen(keys.unacked("gpu")) == 0, "it is acknowledged")
