"""Messages that are in no queue and in no worker, or that nobody renews: they are delivered again."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import ModuleType

import pytest
from kombu import Connection
from tests.contract.api_and_operator import claimed, outcome, submit, swept
from tests.contract.workers import parked, worker
from tests.watching import until

from workerpool_operator import salvage
from workerpool_routing import ledger
from workerpool_routing.ledger import State

pytestmark = pytest.mark.contract


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
    assert swept(url) == []  # it may be on its way
    assert client.hget(keys.job("lost-1"), "missing_at")
    time.sleep(1.2)
    assert ["published again" in sentence for sentence in swept(url)] == [True]
    assert swept(url) == []
    assert two_tiers.app.AsyncResult("lost-1").get(timeout=60) == 2
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
        assert swept(url) == []
        time.sleep(1.2)
        assert ["published again" in sentence for sentence in swept(url)] == [True]
        assert json.loads(client.lindex("gpu-jobs", -1))["body"] == json.loads(raw)["body"]
    assert two_tiers.app.AsyncResult(decision.task_id).get(timeout=60) == ["gpu", 1]
    assert outcome(two_tiers, decision.task_id) == (State.DONE, {"gpu": 2})


def test_what_a_task_reads_by_a_connection_of_its_own_is_in_flight_nowhere_in_the_pool(two_tiers: ModuleType) -> None:
    client, keys = two_tiers.pool.connection.client, two_tiers.pool.keys
    with Connection(two_tiers.URL) as connection, connection.SimpleQueue("mail") as mail:
        for letter in ("a", "b", "c"):
            mail.put(letter)
    assert two_tiers.read_mail.apply_async((3,), queue="cpu-jobs").get(timeout=60) == ["a", "b", "c"]
    until(lambda: not client.hlen(keys.unacked("cpu")), "nothing is held but the job, until it is acknowledged")
    assert (client.hlen(keys.plain_unacked), client.llen("mail")) == (0, 1), "Kombu puts back what was not acknowledged"
    client.delete("mail")


def test_what_a_consumer_of_its_authors_holds_is_renewed(url: str, two_tiers: ModuleType, tmp_path: Path) -> None:
    client, keys = two_tiers.pool.connection.client, two_tiers.pool.keys
    with worker(url, "lone", "lone-jobs", "lone", tmp_path, env={"JOBS_LETTERS": "1"}):
        with Connection(url) as connection, connection.SimpleQueue("letters") as letters:
            letters.put("a")
        (tag,) = until(lambda: client.hkeys(keys.unacked("lone")), "it is held")
        received = client.zscore(keys.unacked_index("lone"), tag)
        until(lambda: client.zscore(keys.unacked_index("lone"), tag) > received + 2, "it is renewed")
    client.delete(keys.unacked("lone"), keys.unacked_index("lone"))


def test_workers_alone_deliver_again_what_nobody_renews(two_tiers: ModuleType) -> None:
    client, keys = two_tiers.pool.connection.client, two_tiers.pool.keys
    result = two_tiers.add.apply_async((1,), queue="shelf")
    seconds, _ = client.time()
    client.hset(keys.unacked("cpu"), "of nobody", json.dumps([json.loads(client.rpop("shelf")), "", "cpu-jobs"]))
    client.zadd(keys.unacked_index("cpu"), {"of nobody": seconds - 100})
    assert result.get(timeout=60) == 2
    until(lambda: not client.zcard(keys.unacked_index("cpu")), "it is held no more")
