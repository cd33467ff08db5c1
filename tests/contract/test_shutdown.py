"""A worker that is marked to drain or told to stop: what it finishes, what it gives back, and what it says meanwhile."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tests.contract.api_and_operator import claimed, outcome, submit
from tests.contract.workers import connections, cut_off_what_came_after, group_lives, parked, worker
from tests.seeds import now_of
from tests.watching import until

from workerpool_routing.ledger import State

pytestmark = pytest.mark.contract


def test_a_marked_worker_stops_within_a_second_finishes_and_resumes_when_unmarked(
    url: str, two_tiers: ModuleType, tmp_path: Path
) -> None:
    """By the clock of Redis, the best of some times: a busy machine adds to any of them, and takes nothing away."""
    client, keys = two_tiers.pool.connection.client, two_tiers.pool.keys

    def report() -> Any:
        return json.loads(next(iter(client.hvals(keys.presence("lone")))))

    def seconds_until_it_drains() -> float:
        seconds, microseconds = client.time()
        client.sadd(keys.drain, "lone")
        drains = until(lambda: (seen := report())["draining"] and seen, "it drains")
        return float(drains["at"] / 1e3 - seconds - microseconds / 1e6)

    with worker(url, "lone", "lone-jobs", "lone", tmp_path):
        running = two_tiers.count.apply_async(("drain-a",), queue="lone-jobs")
        running.get(timeout=60)
        took = [seconds_until_it_drains()]
        while took[-1] > 1 and len(took) < 10:
            client.srem(keys.drain, "lone")
            until(lambda: not report()["draining"], "it consumes again")
            took.append(seconds_until_it_drains())
        assert took[-1] <= 1, took
        later = two_tiers.count.apply_async(("drain-b",), queue="lone-jobs")
        time.sleep(2)
        assert (report()["draining"], report()["slots"], report()["busy"]) == (True, 0, 0)
        assert later.state == "PENDING"
        assert client.llen("lone-jobs") == 1
        client.srem(keys.drain, "lone")
        later.get(timeout=60)


def test_a_drain_outlasts_the_connection_and_a_cancelled_consumer_reports_no_slots(
    url: str, two_tiers: ModuleType, tmp_path: Path
) -> None:
    client, keys, log = two_tiers.pool.connection.client, two_tiers.pool.keys, tmp_path / "lone.log"
    control, only = two_tiers.app.control, ["lone@test"]

    def report() -> Any:
        return json.loads(until(lambda: next(iter(client.hvals(keys.presence("lone"))), None), "it reports"))

    def drains_again() -> bool:
        """Whether it has noticed that it was cut off: on a connection on which it listens to nobody it may not."""
        cut_off_what_came_after(client, before)
        time.sleep(3)
        return log.read_text().count("takes nothing new") > 1

    client.delete(keys.presence("lone"))  # another test's worker had that name, and may have been killed while it drained
    before = connections(client)
    with worker(url, "lone", "lone-jobs", "lone", tmp_path):
        client.sadd(keys.drain, "lone")
        until(lambda: report()["draining"], "it drains")
        until(drains_again, "it drains again, on its new connection")
        later = two_tiers.count.apply_async(("lone-count",), queue="lone-jobs")
        seen = report()["at"]
        until(lambda: report()["at"] > seen + 3000, "it has reported for three seconds")
        assert (report()["draining"], report()["slots"], client.llen("lone-jobs")) == (True, 0, 1)
        client.srem(keys.drain, "lone")
        later.get(timeout=60)
        until(lambda: report()["slots"] == 1, "it takes jobs")
        control.cancel_consumer("lone-jobs", destination=only)
        until(lambda: (report()["slots"], report()["draining"]) == (0, False), "it says that it takes none")
        control.add_consumer("lone-jobs", destination=only)
        until(lambda: report()["slots"] == 1, "it takes jobs again")


def test_a_drained_worker_hands_back_what_waits_for_its_eta(url: str, two_tiers: ModuleType, tmp_path: Path) -> None:
    client, keys = two_tiers.pool.connection.client, two_tiers.pool.keys
    with worker(url, "back", "back-jobs", "back", tmp_path):
        two_tiers.count.apply_async(("back-count",), queue="back-jobs", countdown=3600)
        until(lambda: client.hlen(keys.unacked("back")) == 1, "it is held")
        client.sadd(keys.drain, "back")
        until(lambda: client.llen("back-jobs") == 1 and client.hlen(keys.unacked("back")) == 0, "it is handed back")
        client.srem(keys.drain, "back")
    client.delete("back-jobs")


def test_a_worker_that_is_told_to_stop_hands_back_what_it_has_not_begun(url: str, two_tiers: ModuleType, tmp_path: Path) -> None:
    client, keys = two_tiers.pool.connection.client, two_tiers.pool.keys
    with worker(url, "back", "back-jobs", "back-term", tmp_path) as leaving:
        two_tiers.count.apply_async(("back-count",), queue="back-jobs", countdown=3600)
        two_tiers.limited.apply_async(queue="back-jobs").get(timeout=60)
        two_tiers.limited.apply_async(queue="back-jobs")
        until(lambda: client.hlen(keys.unacked("back")) == 2 and not client.llen("back-jobs"), "both are held")
        until(lambda: int(client.get(keys.scheduled("back")) or 0) == 1, "it has reported so")
        leaving.send_signal(signal.SIGTERM)
        assert leaving.wait(60) == 0
    assert (client.llen("back-jobs"), client.hlen(keys.unacked("back"))) == (2, 0)
    assert int(client.get(keys.scheduled("back")) or 0) == 0
    client.delete("back-jobs")


def test_a_worker_that_is_told_to_stop_finishes_and_leaves_at_once(url: str, two_tiers: ModuleType, tmp_path: Path) -> None:
    grace = {"WORKERPOOL_GRACE_SECONDS": "60"}
    with parked(two_tiers), worker(url, "gpu", "gpu-jobs", "gpu-term", tmp_path, env=grace) as leaving:
        decision = submit(two_tiers, two_tiers.work, {}, 1.5)
        claimed(two_tiers, decision.task_id)
        began = time.monotonic()
        leaving.send_signal(signal.SIGTERM)
        assert leaving.wait(50) == 0
        assert time.monotonic() - began < 40, "a third of its grace period is left"
    assert outcome(two_tiers, decision.task_id) == (State.DONE, {"gpu": 1})


@pytest.mark.parametrize("pool", ["prefork", "solo", "threads"])
def test_what_cannot_finish_within_the_grace_period_goes_back_uncounted(
    url: str, two_tiers: ModuleType, tmp_path: Path, pool: str
) -> None:
    grace = {"WORKERPOOL_GRACE_SECONDS": "8"}
    options = ("-P", pool, "-c", "1")
    with parked(two_tiers), worker(url, "gpu", "gpu-jobs", "gpu-short", tmp_path, *options, env=grace) as leaving:
        decision = submit(two_tiers, two_tiers.work, {"gpu": "gate"})
        owner = claimed(two_tiers, decision.task_id).owner
        assert owner.startswith("gpu-short.")
        told = now_of(two_tiers.pool.connection.client)
        leaving.send_signal(signal.SIGTERM)
        until(lambda: two_tiers.pool.job(decision.task_id).owner != owner, "it was given back")
        if pool == "prefork":  # what runs in a thread of the worker cannot be stopped
            assert leaving.wait(60) is not None, "it has stopped the job, which waits for its gate"
            until(lambda: not group_lives(leaving.pid), "its child is gone")
            assert two_tiers.app.AsyncResult(decision.task_id).state == "PENDING"
    job = two_tiers.pool.job(decision.task_id)
    assert 5_000 < job.runs[0].ended - told < 8_000, "a quarter of the grace period is left for it"
    assert (job.attempt, job.losses, job.runs[0].how) == (1, 0, "given back")
    two_tiers.app.backend.client.set("gate", "open")
    assert two_tiers.app.AsyncResult(decision.task_id).get(timeout=60) == "gpu"
    two_tiers.app.backend.client.delete("gate")
    assert outcome(two_tiers, decision.task_id) == (State.DONE, {"gpu": 2})


def test_a_warm_shutdown_finishes_and_a_cold_one_gives_back_uncounted(url: str, two_tiers: ModuleType, tmp_path: Path) -> None:
    with parked(two_tiers), worker(url, "gpu", "gpu-jobs", "gpu-leaving", tmp_path) as leaving:
        decision = submit(two_tiers, two_tiers.work, {"gpu": "gate"})
        assert claimed(two_tiers, decision.task_id).owner.startswith("gpu-leaving.")
        leaving.send_signal(signal.SIGTERM)
        until(lambda: not any(w.worker == "gpu-leaving" and w.slots for w in two_tiers.pool.workers().values()), "no more slots")
        leaving.send_signal(signal.SIGQUIT)
        assert leaving.wait(60) is not None
    two_tiers.app.backend.client.set("gate", "open")
    assert outcome(two_tiers, decision.task_id) == (State.DONE, {"gpu": 2})
    two_tiers.app.backend.client.delete("gate")
    assert two_tiers.pool.job(decision.task_id).attempt == 1
    assert not [owner for owner in two_tiers.pool.workers() if owner.startswith("gpu-leaving")]
