"""What a worker does beside its attempts: canvases, other pools, drains, farewells, future ETAs, probes, refusals."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from celery import chord, group
from tests.contract.test_attempts import claimed, operator_pool, outcome, parked, submit
from tests.contract.workers import ROOT, command, connections, cut_off_what_came_after, environment, until, worker

from workerpool_operator import planning, salvage
from workerpool_operator.broker import RedisBroker
from workerpool_routing import Reason, ledger
from workerpool_routing.ledger import State

pytestmark = pytest.mark.contract

FAR_OFF = 100
TEN_TIMES_SECONDS = 80
"""The visibility time-out of these workers is a tenth: the shortest that they accept."""


@pytest.fixture(scope="module")
def two_tiers(url: str, jobs: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The app, with a worker on either tier that no test kills."""
    log = tmp_path_factory.mktemp("workers")
    with ExitStack() as stack:
        stack.enter_context(worker(url, "gpu", "gpu-jobs", "gpu-a", log))
        stack.enter_context(worker(url, "cpu", "cpu-jobs", "cpu-a", log))
        yield jobs


@pytest.fixture(scope="module")
def far_off(url: str, jobs: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """A long job, and jobs that are to start late, under a short visibility time-out; they have the time of the other tests."""
    log = tmp_path_factory.mktemp("far-off")
    env = {"JOBS_TRANSPORT": json.dumps({"visibility_timeout": TEN_TIMES_SECONDS / 10})}
    with ExitStack() as stack:
        for name in ("eta-a", "eta-b"):
            stack.enter_context(worker(url, "eta", "eta-jobs", name, log, env=env))
        jobs.count.apply_async(("eta-long", TEN_TIMES_SECONDS), queue="eta-jobs")
        for _ in range(FAR_OFF):
            jobs.count.apply_async(("eta-count",), queue="eta-jobs", countdown=TEN_TIMES_SECONDS)
        yield jobs


def sweep(url: str) -> list[str]:
    """One sweep, as the operator does it."""

    async def once() -> list[str]:
        broker = RedisBroker(asyncio.Event())
        try:
            return await broker.sweep(url, operator_pool(url))
        finally:
            await broker.close()

    return asyncio.run(once())


def admit(jobs: ModuleType, signature: Any, tier: str = "gpu") -> Any:
    """The same signature, admitted to the tier's queue as routing does it for a step of a canvas."""
    result = signature.freeze()
    keys, now = jobs.pool.keys, int(time.time() * 1000)
    entry = {"version": 1, "state": "admitted", "attempt": 1, "task": signature.task, "tier": tier, "wanted": tier}
    jobs.pool.connection.client.hset(
        keys.job(result.id), mapping={**entry, "required": 0, "reason": Reason.FREE_SLOT, "admitted_at": now}
    )
    return signature.set(queue=f"{tier}-jobs", headers={"workerpool": {"attempt": 1}})


@pytest.mark.parametrize("task", ["add", "add_once"])
def test_a_chord_of_100_with_10_failing_parts_completes_once_with_the_right_result(two_tiers: ModuleType, task: str) -> None:
    part, body = getattr(two_tiers, task), f"bodies-of-{task}"
    header = [admit(two_tiers, part.s(n, fails=n % 10 == 0)) for n in range(100)]
    result = chord(header)(two_tiers.total.s(body).set(queue="cpu-jobs"))
    assert result.get(timeout=60) == sum(range(100)) + 100
    starts = [outcome(two_tiers, signature.options["task_id"])[1] for signature in header]
    assert starts == [{"gpu": 1, "cpu": 1} if n % 10 == 0 else {"gpu": 1} for n in range(100)]
    assert int(two_tiers.pool.connection.client.get(body)) == 1


@pytest.mark.parametrize(("dies", "which"), [("before", 1), ("after", 1), ("after", 2)])
def test_a_part_of_a_chord_whose_child_dies_before_it_is_acknowledged_counts_once(
    two_tiers: ModuleType, dies: str, which: int
) -> None:
    body = f"bodies-with-a-death-{dies}-{which}"
    header = [admit(two_tiers, two_tiers.part.s(n, dies if n == which else "")) for n in range(3)]
    result = chord(header)(two_tiers.total.s(body).set(queue="cpu-jobs"))
    assert result.get(timeout=40) == 3
    for signature in header:
        assert outcome(two_tiers, signature.options["task_id"]) == (State.DONE, {"gpu": 1})
    behind = two_tiers.pool.submit(two_tiers.work, ({},))
    assert outcome(two_tiers, behind.task_id) == (State.DONE, {"cpu": 1})
    assert int(two_tiers.pool.connection.client.get(body)) == 1


def test_a_chain_goes_on_after_a_step_that_fell_back(two_tiers: ModuleType) -> None:
    steps = admit(two_tiers, two_tiers.add.s(1, fails=True)) | two_tiers.add.s().set(queue="cpu-jobs")
    assert steps.apply_async().get(timeout=20) == 3


def test_a_group_has_every_result(two_tiers: ModuleType) -> None:
    parts = group(admit(two_tiers, two_tiers.add.s(n, fails=n == 1)) for n in range(4))
    assert parts.apply_async().get(timeout=20) == [1, 2, 3, 4]


def test_both_errors_of_a_job_that_failed_twice_are_kept(two_tiers: ModuleType) -> None:
    decision = submit(two_tiers, two_tiers.work, {"gpu": "raise", "cpu": "exit"})
    assert outcome(two_tiers, decision.task_id) == (State.FAILED, {"gpu": 1, "cpu": 1})
    first, second = two_tiers.pool.job(decision.task_id).runs
    assert (first.tier, first.how, first.error) == ("gpu", "failed", "ValueError('asked to fail')")
    assert (second.tier, second.how, second.error) == ("cpu", "failed", "SystemExit(3)")
    assert first.began <= first.ended <= second.began <= second.ended


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
        result.get(timeout=20)


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
        assert two_tiers.app.AsyncResult(decision.task_id).get(timeout=20) == 42


def test_a_job_that_is_revoked_while_it_runs_ends_there(two_tiers: ModuleType) -> None:
    decision = submit(two_tiers, two_tiers.work, {"gpu": "hang"})
    claimed(two_tiers, decision.task_id)
    two_tiers.app.control.revoke(decision.task_id, terminate=True)
    assert outcome(two_tiers, decision.task_id) == (State.EXPIRED, {"gpu": 1})
    assert two_tiers.app.AsyncResult(decision.task_id).state == "REVOKED"


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


@pytest.mark.parametrize("pool", ["solo", "threads"])
def test_the_fence_holds_in_other_pools(url: str, two_tiers: ModuleType, tmp_path: Path, pool: str) -> None:
    with parked(two_tiers), worker(url, "gpu", "gpu-jobs", f"gpu-{pool}", tmp_path, "-P", pool, "-c", "1"):
        for ending in ("return", "raise", "exit"):
            decision = submit(two_tiers, two_tiers.work, {"gpu": ending})
            tier = "gpu" if ending == "return" else "cpu"
            assert two_tiers.app.AsyncResult(decision.task_id).get(timeout=20) == tier
            assert two_tiers.pool.job(decision.task_id).runs[0].owner.startswith(f"gpu-{pool}.")
            assert outcome(two_tiers, decision.task_id)[1] == ({"gpu": 1} if tier == "gpu" else {"gpu": 1, "cpu": 1})


@pytest.mark.parametrize("pool", ["prefork", "solo", "threads"])
def test_a_slot_that_is_free_takes_the_next_job_at_once(url: str, two_tiers: ModuleType, tmp_path: Path, pool: str) -> None:
    with parked(two_tiers), worker(url, "gpu", "gpu-jobs", f"gpu-{pool}", tmp_path, "-P", pool, "-c", "1"):
        options: dict[str, Any] = {"args": ({}, 0.1), "accelerated": "required"}
        jobs = [two_tiers.pool.submit(two_tiers.work, **options).task_id for _ in range(12)]
        until(lambda: all(two_tiers.pool.job(task_id).state.ended for task_id in jobs), "all have ended")
        runs = sorted((two_tiers.pool.job(task_id).runs[0] for task_id in jobs), key=lambda run: run.began)
    pauses = sorted(after.began - before.ended for before, after in pairwise(runs))
    assert pauses[len(pauses) // 4] < 500, f"milliseconds; a loop that is not told of a free slot looks once a second: {pauses}"


def test_the_fence_holds_over_many_children_that_are_replaced(url: str, two_tiers: ModuleType, tmp_path: Path) -> None:
    options = ("-P", "prefork", "-c", "2", "--max-tasks-per-child", "2")
    with parked(two_tiers), worker(url, "gpu", "gpu-jobs", "gpu-many", tmp_path, *options):
        endings = ["return", "raise", "kill", "return", "raise", "return"]
        signatures = [admit(two_tiers, two_tiers.work.s({"gpu": how})) for how in endings]
        ids = [signature.apply_async().id for signature in signatures]
        expected = [(State.DONE, {"gpu": 1} if how == "return" else {"gpu": 1, "cpu": 1}) for how in endings]
        assert [outcome(two_tiers, task_id) for task_id in ids] == expected


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
        running.get(timeout=10)
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
        later.get(timeout=20)


@pytest.mark.parametrize("pool", ["prefork", "solo", "threads"])
def test_what_cannot_finish_within_the_grace_period_goes_back_uncounted(
    url: str, two_tiers: ModuleType, tmp_path: Path, pool: str
) -> None:
    grace = {"WORKERPOOL_GRACE_SECONDS": "6"}
    options = ("-P", pool, "-c", "1")
    with parked(two_tiers), worker(url, "gpu", "gpu-jobs", "gpu-short", tmp_path, *options, env=grace) as leaving:
        decision = submit(two_tiers, two_tiers.work, {"gpu": "gate"})
        owner = claimed(two_tiers, decision.task_id).owner
        assert owner.startswith("gpu-short.")
        began = time.monotonic()
        leaving.send_signal(signal.SIGTERM)
        until(lambda: two_tiers.pool.job(decision.task_id).owner != owner, "it was given back")
        assert 4 < time.monotonic() - began < 6
    job = two_tiers.pool.job(decision.task_id)
    assert (job.attempt, job.losses, job.runs[0].how) == (1, 0, "given back")
    two_tiers.app.backend.client.set("gate", "open")
    assert two_tiers.app.AsyncResult(decision.task_id).get(timeout=20) == "gpu"
    two_tiers.app.backend.client.delete("gate")
    assert outcome(two_tiers, decision.task_id) == (State.DONE, {"gpu": 2})


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


@pytest.mark.long
def test_messages_with_a_future_eta_are_held_and_are_neither_in_flight_nor_busy(far_off: ModuleType) -> None:
    """What it begins takes as long as the rest of this file."""
    client, keys = far_off.pool.connection.client, far_off.pool.keys
    until(lambda: client.hlen(keys.unacked("eta")) == FAR_OFF + 1, "all are held, and the long job")
    until(lambda: int(client.get(keys.scheduled("eta")) or 0) == FAR_OFF, "all are counted as scheduled")
    until(lambda: sum(json.loads(raw)["busy"] for raw in client.hvals(keys.presence("eta"))) == 1, "only the long job is busy")


def test_a_drained_worker_hands_back_what_waits_for_its_eta(url: str, two_tiers: ModuleType, tmp_path: Path) -> None:
    client, keys = two_tiers.pool.connection.client, two_tiers.pool.keys
    with worker(url, "back", "back-jobs", "back", tmp_path):
        two_tiers.count.apply_async(("back-count",), queue="back-jobs", countdown=60)
        until(lambda: client.hlen(keys.unacked("back")) == 1, "it is held")
        client.sadd(keys.drain, "back")
        until(lambda: client.llen("back-jobs") == 1 and client.hlen(keys.unacked("back")) == 0, "it is handed back", 5)
        client.srem(keys.drain, "back")
    client.delete("back-jobs")


def test_a_worker_that_is_told_to_stop_hands_back_what_it_has_not_begun(url: str, two_tiers: ModuleType, tmp_path: Path) -> None:
    client, keys = two_tiers.pool.connection.client, two_tiers.pool.keys
    with worker(url, "back", "back-jobs", "back-term", tmp_path) as leaving:
        two_tiers.count.apply_async(("back-count",), queue="back-jobs", countdown=3600)
        two_tiers.limited.apply_async(queue="back-jobs").get(timeout=20)
        two_tiers.limited.apply_async(queue="back-jobs")
        until(lambda: client.hlen(keys.unacked("back")) == 2 and not client.llen("back-jobs"), "both are held")
        until(lambda: int(client.get(keys.scheduled("back")) or 0) == 1, "it has reported so")
        leaving.send_signal(signal.SIGTERM)
        assert leaving.wait(30) == 0
    assert (client.llen("back-jobs"), client.hlen(keys.unacked("back"))) == (2, 0)
    assert int(client.get(keys.scheduled("back")) or 0) == 0
    client.delete("back-jobs")


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
        later.get(timeout=20)
        until(lambda: report()["slots"] == 1, "it takes jobs")
        control.cancel_consumer("lone-jobs", destination=only)
        until(lambda: (report()["slots"], report()["draining"]) == (0, False), "it says that it takes none")
        control.add_consumer("lone-jobs", destination=only)
        until(lambda: report()["slots"] == 1, "it takes jobs again")


def test_a_message_that_nobody_holds_goes_back_and_one_that_is_nowhere_is_published_again(
    url: str, two_tiers: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, keys = two_tiers.pool.connection.client, two_tiers.pool.keys
    with two_tiers.app.connection_for_write() as connection:
        two_tiers.add.apply_async(
            (1,), queue="shelf", headers={"workerpool": {"attempt": 1}}, task_id="lost-1", connection=connection
        )
    raw = client.rpop("shelf")
    entry = {"version": 1, "state": "admitted", "attempt": 1, "task": two_tiers.add.name, "tier": "cpu", "wanted": "cpu"}
    client.hset(
        keys.job("lost-1"),
        mapping={**entry, "required": 0, "reason": "FreeSlot", "admitted_at": 1, "message": raw, "queue": "cpu-jobs"},
    )
    client.zadd(keys.waiting("cpu"), {"lost-1": 1})
    monkeypatch.setattr(ledger, "MISSING_MS", 1_000)
    assert sweep(url) == []  # it may be on its way
    assert client.hget(keys.job("lost-1"), "missing_at")
    time.sleep(1.2)
    assert ["published again" in sentence for sentence in sweep(url)] == [True]
    assert sweep(url) == []
    assert two_tiers.app.AsyncResult("lost-1").get(timeout=20) == 2
    assert outcome(two_tiers, "lost-1") == (State.DONE, {"cpu": 1})


def test_a_retry_that_is_lost_between_the_queue_and_a_worker_is_published_again(
    url: str, two_tiers: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = two_tiers.pool.connection.client
    decision = submit(two_tiers, two_tiers.retried, 1, 2)
    claimed(two_tiers, decision.task_id)
    with parked(two_tiers):
        raw = until(lambda: client.rpop("gpu-jobs"), "the retry is in the queue")  # a worker takes it and dies
        monkeypatch.setattr(salvage, "OVERTAKEN_MS", -1_000)
        monkeypatch.setattr(ledger, "MISSING_MS", 1_000)
        until(lambda: two_tiers.pool.job(decision.task_id).state is State.ADMITTED, "its author waits for it")
        until(lambda: not client.hlen(two_tiers.pool.keys.unacked("gpu")), "what asked for it is acknowledged")
        assert sweep(url) == []
        time.sleep(1.2)
        assert ["published again" in sentence for sentence in sweep(url)] == [True]
        assert json.loads(client.lindex("gpu-jobs", -1))["body"] == json.loads(raw)["body"]
    assert two_tiers.app.AsyncResult(decision.task_id).get(timeout=20) == ["gpu", 1]
    assert outcome(two_tiers, decision.task_id) == (State.DONE, {"gpu": 2})


def test_a_retry_that_is_due_in_days_is_on_the_ledger_until_a_day_later_and_not_looked_for_before(two_tiers: ModuleType) -> None:
    client, keys, days = two_tiers.pool.connection.client, two_tiers.pool.keys, 3 * 86_400
    decision = submit(two_tiers, two_tiers.retried, 1, 2, days)
    claimed(two_tiers, decision.task_id)
    with parked(two_tiers):
        until(lambda: client.rpop("gpu-jobs"), "the retry is in the queue")
        until(lambda: two_tiers.pool.job(decision.task_id).state is State.ADMITTED, "its author waits for it")
        now = client.time()[0]
        assert client.ttl(keys.job(decision.task_id)) > days + 3_600
        assert client.zscore(keys.waiting("gpu"), decision.task_id) / 1000 > now + days - 3_600
    client.delete(keys.job(decision.task_id))
    client.zrem(keys.waiting("gpu"), decision.task_id)


def test_a_dead_workers_unclaimed_messages_are_delivered_again(
    url: str, two_tiers: ModuleType, tmp_path: Path, short_life: float
) -> None:
    client, keys = two_tiers.pool.connection.client, two_tiers.pool.keys
    with parked(two_tiers), worker(url, "gpu", "gpu-jobs", "gpu-eta", tmp_path) as doomed:
        result = two_tiers.add.apply_async((1,), queue="gpu-jobs", countdown=8)
        routed = two_tiers.add.apply_async((2,), queue="shelf", countdown=8)
        message = json.loads(client.rpop("shelf"))
        message["properties"]["delivery_info"] = {"exchange": "media", "routing_key": "video"}
        client.lpush("gpu-jobs", json.dumps(message))  # as Kombu does where a binding says so
        until(lambda: (tmp_path / "gpu-eta.log").read_text().count("received") == 2, "both are held")
        time.sleep(1.5)
        os.killpg(doomed.pid, signal.SIGKILL)
    until(lambda: any("held by nobody" in sentence for sentence in sweep(url)), "its worker is lost")
    assert (result.get(timeout=20), routed.get(timeout=20)) == (2, 3)
    until(lambda: client.hlen(keys.unacked("gpu")) == 0, "it is acknowledged")


def test_workers_alone_deliver_again_what_nobody_renews(two_tiers: ModuleType) -> None:
    client, keys = two_tiers.pool.connection.client, two_tiers.pool.keys
    result = two_tiers.add.apply_async((1,), queue="shelf")
    seconds, _ = client.time()
    client.hset(keys.unacked("cpu"), "of nobody", json.dumps([json.loads(client.rpop("shelf")), "", "cpu-jobs"]))
    client.zadd(keys.unacked_index("cpu"), {"of nobody": seconds - 100})
    assert result.get(timeout=60) == 2
    until(lambda: not client.zcard(keys.unacked_index("cpu")), "it is held no more")


@pytest.mark.parametrize("garbage", ["no json", '{"no": "message"}', "[]", '"text"'])
def test_what_is_no_message_is_set_aside_and_the_worker_goes_on(url: str, two_tiers: ModuleType, garbage: str) -> None:
    client, keys = two_tiers.pool.connection.client, two_tiers.pool.keys
    before = int(client.get(keys.aside_count) or 0)
    client.rpush("cpu-jobs", garbage)
    until(lambda: int(client.get(keys.aside_count) or 0) == before + 1, "it is counted")
    assert any(json.loads(kept)["message"] == garbage for kept in client.hvals(keys.aside))
    assert two_tiers.add.apply_async((1,), queue="cpu-jobs").get(timeout=10) == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("headers.timelimit", [5]),
        ("headers.id", {"no": "text"}),
        ("headers.id", "\ud800"),
        ("headers", [1]),
        ("headers", "a word"),
        ("content-type", None),
        ("body", 5),
        ("body", "not base64!"),
        ("properties.body_encoding", "rot13"),
        ("properties.delivery_tag", None),
        ("properties.delivery_tag", {"no": "text"}),
    ],
)
def test_a_message_that_cannot_be_started_is_set_aside_and_the_worker_goes_on(
    two_tiers: ModuleType, field: str, value: Any
) -> None:
    client, keys = two_tiers.pool.connection.client, two_tiers.pool.keys
    two_tiers.add.apply_async((1,), queue="shelf")
    message = part = json.loads(client.rpop("shelf"))
    *way, last = field.split(".")
    for name in way:
        part = part[name]
    part[last] = value
    before = int(client.get(keys.aside_count) or 0)
    client.rpush("cpu-jobs", json.dumps(message))
    until(lambda: int(client.get(keys.aside_count) or 0) > before, "it is counted")
    assert two_tiers.add.apply_async((1,), queue="cpu-jobs").get(timeout=20) == 2
    until(lambda: not client.hlen(keys.unacked("cpu")), "nothing is held")
    until(lambda: not any(worker.busy for worker in two_tiers.pool.workers().values()), "no slot is taken")


@pytest.mark.parametrize("headers", [{"workerpool": "required"}, {"workerpool": {"attempt": 1}, "retries": "x"}])
def test_a_word_where_a_header_has_an_object_or_a_number_keeps_no_job_from_running(
    two_tiers: ModuleType, headers: dict[str, Any]
) -> None:
    client = two_tiers.pool.connection.client
    two_tiers.add.apply_async((1,), queue="shelf", task_id=f"worded-{'retries' in headers}")
    message = json.loads(client.rpop("shelf"))
    client.rpush("cpu-jobs", json.dumps({**message, "headers": {**message["headers"], **headers}}))
    assert two_tiers.app.AsyncResult(message["headers"]["id"]).get(timeout=20) == 2
    assert two_tiers.add.apply_async((1,), queue="cpu-jobs").get(timeout=20) == 2


def test_what_is_no_text_is_set_aside_too(two_tiers: ModuleType) -> None:
    client, keys = two_tiers.pool.connection.client, two_tiers.pool.keys
    before = int(client.get(keys.aside_count) or 0)
    client.rpush("cpu-jobs", b"\xff\xfe is no UTF-8")
    until(lambda: int(client.get(keys.aside_count) or 0) == before + 1, "it is counted")
    assert two_tiers.add.apply_async((1,), queue="cpu-jobs").get(timeout=10) == 2


@pytest.mark.parametrize("corruption", ["state", "attempt", "kind"])
def test_a_corrupted_ledger_entry_is_set_aside_with_its_message(two_tiers: ModuleType, corruption: str) -> None:
    client, keys = two_tiers.pool.connection.client, two_tiers.pool.keys
    signature = admit(two_tiers, two_tiers.add.s(1))
    task_id = signature.options["task_id"]
    if corruption == "kind":
        client.delete(keys.job(task_id))
        client.set(keys.job(task_id), "a string")
    else:
        client.hset(keys.job(task_id), corruption, "nonsense")
    signature.apply_async()
    kept = json.loads(until(lambda: client.hget(keys.aside, task_id), "it is set aside"))
    assert kept["reason"] == "its ledger entry cannot be read"
    assert json.loads(json.loads(kept["message"])[0]["headers"]["id"] and kept["message"])[0]["headers"]["id"] == task_id
    assert "nonsense" in kept["entry"] or kept["entry"] == ["a string"]
    assert not client.exists(keys.job(task_id))


def test_a_job_whose_task_no_worker_knows_fails_on_the_ledger_too(two_tiers: ModuleType) -> None:
    signature = admit(two_tiers, two_tiers.app.signature("jobs.nobody_knows"))
    signature.apply_async()
    assert outcome(two_tiers, signature.options["task_id"]) == (State.FAILED, {})


def test_the_probe_files_follow_the_worker(url: str, two_tiers: ModuleType, tmp_path: Path) -> None:
    client, keys = two_tiers.pool.connection.client, two_tiers.pool.keys
    probes = tmp_path / "probes"
    with worker(url, "probed", "probed-jobs", "probed", tmp_path, env={"WORKERPOOL_PROBES": str(probes)}) as process:
        until((probes / "ready").exists, "it is ready", 5)
        client.sadd(keys.drain, "probed")
        until(lambda: not (probes / "ready").exists(), "it is not ready while it drains", 3)
        client.srem(keys.drain, "probed")
        until((probes / "ready").exists, "it is ready again", 3)
        os.kill(process.pid, signal.SIGSTOP)
        seen = (probes / "alive").stat().st_mtime
        time.sleep(2)
        assert (probes / "alive").stat().st_mtime == seen
        os.kill(process.pid, signal.SIGCONT)
        until(lambda: (probes / "alive").stat().st_mtime > seen, "it lives again", 5)
        process.send_signal(signal.SIGTERM)
        process.wait(15)
        assert not (probes / "ready").exists()


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


@pytest.mark.timeout(240)
def test_what_takes_ten_times_the_visibility_timeout_or_starts_after_it_runs_once(far_off: ModuleType) -> None:
    client, keys = far_off.pool.connection.client, far_off.pool.keys
    until(lambda: int(client.get("eta-count") or 0) >= FAR_OFF, "all have run", 2 * TEN_TIMES_SECONDS)
    until(lambda: client.hlen(keys.unacked("eta")) == 0, "all are acknowledged", TEN_TIMES_SECONDS)
    time.sleep(1.5)
    assert int(client.get("eta-count")) == FAR_OFF
    assert int(client.get("eta-long")) == 1
    assert int(client.get(keys.scheduled("eta"))) == 0
