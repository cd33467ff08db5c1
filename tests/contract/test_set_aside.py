"""Messages that cannot be started, and ledger entries that cannot be read: they are set aside, and the worker goes on."""

from __future__ import annotations

import json
from types import ModuleType
from typing import Any

import pytest
from tests.contract.api_and_operator import admit, outcome
from tests.watching import until

from workerpool_routing.ledger import State

pytestmark = pytest.mark.contract


@pytest.mark.parametrize(
    "garbage",
    [
        "no json",
        '{"no": "message"}',
        "[]",
        '"text"',
        pytest.param("[" * 5000 + "]" * 5000, id="deep"),
        pytest.param("9" * 5000, id="a long number"),
        '{"__type__": "datetime", "__value__": 5}',
    ],
)
def test_what_is_no_message_is_set_aside_and_the_worker_goes_on(url: str, two_tiers: ModuleType, garbage: str) -> None:
    client, keys = two_tiers.pool.connection.client, two_tiers.pool.keys
    before = int(client.get(keys.aside_count) or 0)
    client.rpush("cpu-jobs", garbage)
    until(lambda: int(client.get(keys.aside_count) or 0) == before + 1, "it is counted")
    assert any(json.loads(kept)["message"] == garbage for kept in client.hvals(keys.aside))
    assert two_tiers.add.apply_async((1,), queue="cpu-jobs").get(timeout=60) == 2


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
    assert two_tiers.add.apply_async((1,), queue="cpu-jobs").get(timeout=60) == 2
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
    assert two_tiers.app.AsyncResult(message["headers"]["id"]).get(timeout=60) == 2
    assert two_tiers.add.apply_async((1,), queue="cpu-jobs").get(timeout=60) == 2


def test_what_is_no_text_is_set_aside_too(two_tiers: ModuleType) -> None:
    client, keys = two_tiers.pool.connection.client, two_tiers.pool.keys
    before = int(client.get(keys.aside_count) or 0)
    client.rpush("cpu-jobs", b"\xff\xfe is no UTF-8")
    until(lambda: int(client.get(keys.aside_count) or 0) == before + 1, "it is counted")
    assert two_tiers.add.apply_async((1,), queue="cpu-jobs").get(timeout=60) == 2


@pytest.mark.parametrize(("corruption", "deadline"), [("state", None), ("attempt", None), ("kind", None), ("kind", 0.001)])
def test_a_corrupted_ledger_entry_is_set_aside_with_its_message(
    two_tiers: ModuleType, corruption: str, deadline: float | None
) -> None:
    client, keys = two_tiers.pool.connection.client, two_tiers.pool.keys
    signature = admit(two_tiers, two_tiers.add.s(1))
    task_id = signature.options["task_id"]
    if corruption == "kind":
        client.delete(keys.job(task_id))
        client.set(keys.job(task_id), "a string")
    else:
        client.hset(keys.job(task_id), corruption, "nonsense")
    signature.apply_async(expires=deadline)
    kept = json.loads(until(lambda: client.hget(keys.aside, task_id), "it is set aside"))
    assert kept["reason"] == "its ledger entry cannot be read"
    assert json.loads(json.loads(kept["message"])[0]["headers"]["id"] and kept["message"])[0]["headers"]["id"] == task_id
    assert "nonsense" in kept["entry"] or kept["entry"] == ["a string"]
    assert not client.exists(keys.job(task_id))


def test_a_job_whose_task_no_worker_knows_fails_on_the_ledger_too(two_tiers: ModuleType) -> None:
    signature = admit(two_tiers, two_tiers.app.signature("jobs.nobody_knows"))
    signature.apply_async()
    assert outcome(two_tiers, signature.options["task_id"]) == (State.FAILED, {})
