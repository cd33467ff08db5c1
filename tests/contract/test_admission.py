"""Admission against a real Redis: the two forms of the rule agree, and the API side says what it did."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import prometheus_client
import pytest
from celery import Celery, chain
from celery.signals import before_task_publish
from kombu.exceptions import OperationalError
from redis import Redis
from tests.seeds import load

from workerpool_operator.local.redis_server import private_redis
from workerpool_routing import Overloaded, PoolUnavailable, Reason, Tier, WorkerPool, metrics, policy, wire
from workerpool_routing.decide import Load
from workerpool_routing.decision import LOG_FIELDS
from workerpool_routing.errors import NoAcceleratedTier, NotConfigured
from workerpool_routing.ledger import State
from workerpool_routing.wire import Policy, TaskPolicy

pytestmark = pytest.mark.contract

GPU, CPU = Tier("gpu", "gpu-jobs", accelerated=True), Tier("cpu", "cpu-jobs", accelerated=False)
TIERS = (GPU, CPU)


def media_app(url: str) -> Celery:
    """An app as an API process has it."""
    app = Celery("api", broker=url)
    app.conf.broker_transport_options = {"global_keyprefix": "test-"}

    @app.task(name="media.transcribe", shared=False)  # type: ignore[untyped-decorator]
    def transcribe(path: str) -> str:
        return path

    @app.task(name="media.index", shared=False)  # type: ignore[untyped-decorator]
    def index(path: str) -> str:
        return path

    return app


@pytest.fixture
def app(redis_url: str) -> Celery:
    return media_app(redis_url)


@pytest.fixture
def pool(app: Celery) -> WorkerPool:
    return WorkerPool("ml/media", app, tiers=TIERS)


@pytest.fixture
def client(redis_url: str) -> Iterator[Any]:
    with Redis.from_url(redis_url, decode_responses=True) as client:
        yield client


def test_submit_writes_message_ledger_and_counters_and_wakes_the_operator(
    pool: WorkerPool, app: Celery, client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with client.pubsub(ignore_subscribe_messages=True) as subscription, caplog.at_level(logging.INFO, "workerpool_routing"):
        subscription.subscribe("test-workerpool:wake")
        subscription.get_message(timeout=1)
        decision = pool.submit(app.tasks["media.transcribe"], ("a.wav",), accelerated=True, content_type="audio/wav", priority=6)
        woken = [m["data"] for _ in range(3) if (m := subscription.get_message(timeout=1))]
    assert (decision.tier, decision.queue, decision.reason) == ("cpu", "cpu-jobs", Reason.NO_CAPACITY)
    message = json.loads(client.lindex(pool.keys.queue_list("cpu-jobs", 6), 0))
    assert message["headers"]["id"] == decision.task_id
    assert message["headers"]["workerpool"] == {"attempt": 1}
    job = pool.job(str(decision.task_id))
    assert job is not None
    assert (job.state, job.attempt, job.tier, job.wanted, job.reason) == (State.ADMITTED, 1, "cpu", "gpu", Reason.NO_CAPACITY)
    assert client.zrange(pool.keys.spilled("gpu"), 0, -1) == [decision.task_id]
    assert client.zrange(pool.keys.waiting("cpu"), 0, -1) == [decision.task_id]
    assert client.hgetall(pool.keys.routes) == {"cpu:NoCapacity": "1"}
    assert woken == ["ml/media"]
    assert client.ttl(pool.keys.job(job.task_id)) > 0
    lines = [record.getMessage() for record in caplog.records if "routed" in record.getMessage()]
    words = "tier=cpu queue=cpu-jobs content_type=audio reason=NoCapacity expected_wait=None"
    assert lines == [f"routed pool=ml/media task_id={job.task_id} task=media.transcribe {words}"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"priority": 6},
        {"compression": "gzip", "headers": {"mine": 1}},
        {"headers": {"workerpool": "a word"}},
        {"countdown": 60},
    ],
)
def test_every_way_in_leaves_the_message_that_celery_would_and_the_ledger_keeps_it(
    pool: WorkerPool, app: Celery, client: Any, options: dict[str, Any]
) -> None:
    task, mark = app.tasks["media.index"], {"headers": {**options.get("headers", {}), "workerpool": {"attempt": 1}}}
    wish = {"headers": {**options.get("headers", {}), "workerpool": {"accelerated": True}}}
    submitted = pool.submit(task, ("é",), accelerated=True, **options)
    hooked = task.apply_async(("é",), **{**options, **wish})
    celerys = task.apply_async(("é",), queue="cpu-jobs", **{**options, **mark})
    queued = {}
    for raw in client.lrange(pool.keys.queue_list("cpu-jobs", options.get("priority", 0)), 0, -1):
        message = json.loads(raw)
        message["properties"].pop("delivery_tag")
        queued[message["headers"]["id"]] = message
    for task_id in (str(submitted.task_id), hooked.id):
        kept = json.loads(client.hget(pool.keys.job(task_id), "message"))
        assert kept["properties"].pop("delivery_tag")
        assert kept == queued[task_id]
    own, reference = queued[submitted.task_id], queued[celerys.id]
    for message in (own, reference):
        for part, name in (("headers", "id"), ("headers", "root_id"), ("headers", "eta"), ("properties", "correlation_id")):
            message[part].pop(name)
    assert own == reference
    assert list(own) == list(reference)


def test_the_ledger_does_not_keep_a_message_beyond_its_limit(pool: WorkerPool, app: Celery, client: Any) -> None:
    decision = pool.submit(app.tasks["media.index"], ("x" * wire.MESSAGE_LIMIT_BYTES,))
    assert pool.queue_length("cpu-jobs") == 1
    assert not client.hexists(pool.keys.job(str(decision.task_id)), "message")


def test_a_caller_that_is_killed_at_any_moment_leaves_one_message_or_none(pool: WorkerPool, app: Celery, redis_url: str) -> None:
    """And the next one with its key gets that job, or makes it."""
    code = (
        "import sys; from celery import Celery; from workerpool_routing import Tier, WorkerPool\n"
        f"app = Celery('api', broker={redis_url!r}); app.conf.broker_transport_options = {{'global_keyprefix': 'test-'}}\n"
        "def index(path): return path\n"
        "task = app.task(index, name='media.index')\n"
        "pool = WorkerPool('ml/media', app, tiers=[Tier('cpu', 'cpu-jobs', accelerated=False)])\n"
        "pool.queue_length('cpu-jobs'); print('ready', flush=True)\n"
        "for n in range(100_000): pool.submit(task, (str(n),), idempotency_key=str(n))\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as caller:
        assert caller.stdout is not None
        assert caller.stdout.readline() == b"ready\n"
        deadline = time.monotonic() + 60
        while pool.queue_length("cpu-jobs") <= 10:
            assert time.monotonic() < deadline
        caller.kill()
    done = pool.queue_length("cpu-jobs")
    again = {str(pool.submit(app.tasks["media.index"], (str(n),), idempotency_key=str(n)).task_id) for n in range(done + 1)}
    assert len(again) == done + 1
    assert pool.queue_length("cpu-jobs") == done + 1
    assert all(pool.job(task_id) for task_id in again)


def test_the_event_loop_goes_on_while_redis_does_not_answer() -> None:
    async def longest_pause(pool: WorkerPool, task: Any) -> float:
        submits = [asyncio.create_task(pool.submit_async(task, ("a",))) for _ in range(4)]
        longest = 0.0
        while not all(submit.done() for submit in submits):
            before = time.monotonic()
            await asyncio.sleep(0.001)
            longest = max(longest, time.monotonic() - before)
        for submit in submits:
            with pytest.raises(PoolUnavailable):
                submit.result()
        return longest

    with private_redis() as server:
        app = media_app(server.url)
        pool = WorkerPool("ml/media", app, tiers=TIERS, timeout=3)
        pool.submit(app.tasks["media.index"], ("a",))
        os.kill(server.pid, signal.SIGSTOP)
        try:
            assert asyncio.run(longest_pause(pool, app.tasks["media.index"])) < 1.5, "it would stand still for the whole time-out"
        finally:
            os.kill(server.pid, signal.SIGCONT)


def test_however_many_calls_wait_for_a_thread_those_that_waited_out_their_time_do_not_ask_a_silent_redis() -> None:
    asked: list[int] = []

    async def submit(pool: WorkerPool, task: Any, calls: int) -> list[Any]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(4))
        return await asyncio.gather(*(pool.submit_async(task, (n,)) for n in range(calls)), return_exceptions=True)

    with private_redis() as server:
        app = media_app(server.url)
        pool = WorkerPool("ml/media", app, tiers=TIERS, timeout=1)
        before_task_publish.connect(lambda **_: asked.append(1), weak=False, dispatch_uid="asked")
        task = app.tasks["media.index"]
        try:
            assert not [one for one in asyncio.run(submit(pool, task, 100)) if isinstance(one, Exception)], "Redis answers"
            asked.clear()
            os.kill(server.pid, signal.SIGSTOP)
            answers = asyncio.run(submit(pool, task, 100))
        finally:
            os.kill(server.pid, signal.SIGCONT)
            before_task_publish.disconnect(dispatch_uid="asked")
    assert {type(one) for one in answers} == {PoolUnavailable}
    assert len(asked) < 50, "four at a time would take 25 time-outs"


def test_a_pool_that_is_not_to_fail_open_takes_nothing_undecided(app: Celery, pool: WorkerPool, client: Any) -> None:
    closed = WorkerPool("ml/other", app, fail_open=False)
    with pytest.raises(PoolUnavailable, match="policy is not in Redis"):
        closed.submit(app.tasks["media.index"], ("a",))
    client.set(pool.keys.slots("cpu"), "not a sorted set")
    for promise in ({"idempotency_key": "upload-7"}, {"accelerated": "required"}):
        client.set(pool.keys.slots("gpu"), "not a sorted set")
        with pytest.raises(PoolUnavailable, match="script failed"):
            pool.submit(app.tasks["media.index"], ("a",), **cast("dict[str, Any]", promise))
    assert pool.queue_length("cpu-jobs") == pool.queue_length("gpu-jobs") == pool.queue_length("celery") == 0


@pytest.mark.parametrize(
    "tiers", [[], [GPU, Tier("gpu", "other", accelerated=True)], [GPU, Tier("cpu", "gpu-jobs", accelerated=False)]]
)
def test_tiers_that_cannot_be_are_refused(app: Celery, tiers: list[Tier]) -> None:
    with pytest.raises(NotConfigured, match="tiers"):
        WorkerPool("ml/media", app, tiers=tiers)


def test_a_time_out_that_is_none_is_refused(app: Celery) -> None:
    with pytest.raises(NotConfigured, match="timeout"):
        WorkerPool("ml/media", app, tiers=TIERS, timeout=0)


def test_the_record_of_a_decision_has_the_documented_fields(
    pool: WorkerPool, app: Celery, client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "workerpool_routing"):
        decision = pool.submit(app.tasks["media.index"], ("a",), accelerated=True, content_type="scan.png")
        with pytest.raises(Overloaded):
            pool.submit(app.tasks["media.index"], ("a",), max_wait=5)
        plain = app.tasks["media.index"].apply_async(("a",), headers={"workerpool": {"accelerated": True}})
    records = [record for record in caplog.records if record.name == "workerpool_routing"]
    assert [[getattr(record, name) for name in LOG_FIELDS] for record in records] == [
        ["ml/media", decision.task_id, "media.index", "cpu", "cpu-jobs", "image", "NoCapacity", None],
        ["ml/media", None, "media.index", None, None, None, "Overloaded", None],
        ["ml/media", plain.id, "media.index", "cpu", "cpu-jobs", None, "NoCapacity", None],
    ]


def test_decisions_are_counted_and_timed_for_prometheus(app: Celery, client: Any) -> None:
    pool = WorkerPool("ml/counted", app, tiers=TIERS)
    pool.submit(app.tasks["media.index"], ("a",))
    with pytest.raises(Overloaded):
        pool.submit(app.tasks["media.index"], ("a",), max_wait=5)
    sample = prometheus_client.REGISTRY.get_sample_value
    labels = {"pool": "ml/counted", "tier": "cpu", "reason": "NotRequested"}
    assert sample("workerpool_decisions_total", labels) == 1
    assert sample("workerpool_decisions_total", {**labels, "tier": "", "reason": "Overloaded"}) == 1
    assert sample("workerpool_decision_seconds_count", {"pool": "ml/counted"}) == 2


def test_without_the_prometheus_client_nothing_is_counted_and_nothing_fails(
    pool: WorkerPool, app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.setattr(metrics, "_registered", metrics._registered.__wrapped__)
    assert metrics._instruments() is None
    assert pool.submit(app.tasks["media.index"], ("a",)).task_id


@pytest.mark.parametrize(
    ("wish", "content_type", "tier", "reason"),
    [
        (False, "audio", "cpu", Reason.NOT_REQUESTED),
        (True, "text/plain", "cpu", Reason.CONTENT_TYPE_GAINS_NOTHING),
        (True, "Audio/WAV", "cpu", Reason.NO_CAPACITY),
        (True, None, "cpu", Reason.NO_CAPACITY),
        ("required", "text/plain", "gpu", Reason.REQUIRED),
    ],
)
def test_a_job_goes_where_its_wish_and_its_content_say(
    pool: WorkerPool, app: Celery, wish: Any, content_type: str | None, tier: str, reason: Reason
) -> None:
    decision = pool.submit(app.tasks["media.index"], ("a",), accelerated=wish, content_type=content_type)
    assert (decision.tier, decision.reason) == (tier, reason)
    assert pool.queue_length(decision.queue) == 1


def test_what_the_policy_names_is_routed_by_plain_delay_and_in_canvases_and_nothing_else_is(app: Celery, client: Any) -> None:
    pool = WorkerPool("ml/media", app)
    policy = Policy(TIERS, tasks=(TaskPolicy("media.trans*", accelerated=True),))
    client.set(pool.keys.policy, policy.dump())
    transcribe, index = app.tasks["media.transcribe"], app.tasks["media.index"]
    routed = transcribe.delay("a")
    named = app.send_task("media.transcribe", ("b",))
    chain(transcribe.s("c"), index.s()).apply_async()
    explicit = transcribe.apply_async(("d",), queue="elsewhere")
    other = index.delay("e")
    wished = index.apply_async(("f",), headers={"workerpool": {"accelerated": "required"}})
    assert pool.queue_length("cpu-jobs") == 3
    assert [getattr(pool.job(r.id), "tier", None) for r in (routed, named, explicit, other, wished)] == [
        "cpu", "cpu", None, None, "gpu",
    ]  # fmt: skip
    assert pool.queue_length("elsewhere") == pool.queue_length("celery") == 1
    [message] = [json.loads(raw) for raw in client.lrange(pool.keys.queue_list("gpu-jobs", 0), 0, -1)]
    assert message["headers"]["workerpool"] == {"accelerated": "required", "attempt": 1}


def ends_at_once() -> None:
    """Nobody runs it here."""


def test_a_task_without_a_fence_is_routed_and_not_on_the_ledger(app: Celery, client: Any) -> None:
    """No worker claims its jobs: an entry would wait for ever, and the sweep would take each for lost."""
    pool = WorkerPool("ml/media", app)
    client.set(pool.keys.policy, Policy(TIERS, tasks=(TaskPolicy("*", accelerated=False),)).dump())
    plain = app.task(ends_at_once, name="media.plain", shared=False, fenced=False)
    first = pool.submit(plain, accelerated="required", idempotency_key="k")
    assert pool.submit(plain, accelerated="required", idempotency_key="k").task_id == first.task_id
    submitted, delayed = pool.submit(plain), plain.delay()
    celerys_own = app.send_task("celery.starmap", kwargs={"task": {"task": "media.index"}, "it": []})
    assert (pool.queue_length("gpu-jobs"), pool.queue_length("cpu-jobs")) == (1, 3)
    assert [pool.job(str(one)) for one in (first.task_id, submitted.task_id, delayed.id, celerys_own.id)] == [None] * 4
    assert not client.keys(pool.keys.waiting("*")) + client.keys(pool.keys.spilled("*")) + client.keys(pool.keys.job("*"))
    headers = [json.loads(raw)["headers"] for raw in client.lrange(pool.keys.queue_list("cpu-jobs", 0), 0, 1)]
    assert ["workerpool" in one for one in headers] == [False, False], "by delay() it is the message of plain Celery"


def test_a_job_that_requires_an_accelerator_waits_for_one_while_nothing_can_be_decided(
    app: Celery, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy, "KEPT_SECONDS", 0)
    pool = WorkerPool("ml/media", app)
    described = Policy(TIERS, tasks=(TaskPolicy("media.transcribe", accelerated="required"), TaskPolicy("media.index")))
    transcribe, index = app.tasks["media.transcribe"], app.tasks["media.index"]
    wishes = {"headers": {"workerpool": {"accelerated": "required", "content_type": 7}}}
    client.set(pool.keys.policy, described.dump())
    client.set(pool.keys.capacity, "no JSON")
    assert [transcribe.delay("a"), index.delay("b"), index.apply_async(("c",), **wishes)]
    assert (pool.queue_length("gpu-jobs"), pool.queue_length("celery")) == (2, 1)
    client.delete(pool.keys.policy)
    assert [transcribe.delay("a"), index.delay("b"), index.apply_async(("c",), **wishes)]
    assert (pool.queue_length("gpu-jobs"), pool.queue_length("celery")) == (4, 2)


def test_the_wait_of_a_job_by_plain_delay_is_the_one_before_it_counts_itself(app: Celery, client: Any) -> None:
    pool = WorkerPool("ml/media", app, tiers=TIERS)
    seconds, _ = client.time()
    client.zadd(pool.keys.slots("cpu"), {"worker/0": seconds * 1000})
    client.hset(pool.keys.served("cpu"), "mean", 30)
    waits = [
        client.hget(pool.keys.job(index.id), "wait")
        for _ in range(2)
        for index in [app.tasks["media.index"].apply_async(("a",), headers={"workerpool": {"accelerated": False}})]
    ]
    assert [float(wait) for wait in waits] == [0, 30]


@pytest.mark.parametrize("foreign", ["hello", "[1]", '"x"', '{"headers": 3}', "null"])
def test_text_that_is_no_message_at_the_end_of_a_queue_has_no_age(
    pool: WorkerPool, app: Celery, client: Any, foreign: str
) -> None:
    pool.submit(app.tasks["media.index"], ("a",))
    client.rpush(pool.keys.queue_list("cpu-jobs", 0), foreign)
    cpu = pool.status()["tiers"]["cpu"]
    assert (cpu["waiting"], cpu["oldest_wait"]) == (2, None)


def test_a_pool_that_nobody_described_leaves_every_job_to_the_app(app: Celery, caplog: pytest.LogCaptureFixture) -> None:
    pool = WorkerPool("ml/media", app)
    decision = pool.submit(app.tasks["media.index"], ("a",), accelerated=True)
    assert (decision.tier, decision.queue, decision.reason) == (None, "celery", Reason.POLICY_UNKNOWN)
    assert pool.queue_length("celery") == 1
    assert "has no policy in Redis" in caplog.text


def test_a_policy_of_another_release_is_refused_by_its_number(app: Celery, client: Any, caplog: pytest.LogCaptureFixture) -> None:
    pool = WorkerPool("ml/media", app)
    client.set(pool.keys.policy, json.dumps({**json.loads(Policy(TIERS).dump()), "version": 99}))
    assert pool.should_accelerate(app.tasks["media.index"]).reason is Reason.POLICY_UNKNOWN
    assert "schema version 99" in caplog.text


def test_a_broken_script_sends_the_job_to_the_last_tier(pool: WorkerPool, app: Celery, client: Any) -> None:
    client.set(pool.keys.slots("gpu"), "not a sorted set")
    decision = pool.submit(app.tasks["media.index"], ("a",), accelerated=True)
    assert (decision.tier, decision.reason) == ("cpu", Reason.ADMISSION_FAILED)
    assert pool.queue_length("cpu-jobs") == 1
    assert pool.should_accelerate(app.tasks["media.index"]).reason is Reason.ADMISSION_FAILED


def test_scripts_that_redis_has_forgotten_are_loaded_again(pool: WorkerPool, app: Celery, client: Any) -> None:
    pool.submit(app.tasks["media.index"], ("a",))
    client.script_flush()
    pool.submit(app.tasks["media.index"], ("b",))
    assert pool.queue_length("cpu-jobs") == 2


def test_a_required_job_without_an_accelerated_tier_is_refused(app: Celery) -> None:
    pool = WorkerPool("ml/media", app, tiers=[CPU])
    with pytest.raises(NoAcceleratedTier, match=r"media\.index"):
        pool.submit(app.tasks["media.index"], ("a",), accelerated="required")
    app.tasks["media.index"].apply_async(("a",), headers={"workerpool": {"accelerated": "required"}})
    assert pool.queue_length("cpu-jobs") == 0


@pytest.mark.parametrize("option", ["queue", "task_id", "expires"])
def test_submit_refuses_what_it_decides_itself(pool: WorkerPool, app: Celery, option: str) -> None:
    with pytest.raises(TypeError, match=option):
        pool.submit(app.tasks["media.index"], ("a",), **cast("dict[str, Any]", {option: "x"}))


def test_the_pools_longest_wait_refuses_what_is_submitted_unless_the_caller_waits_longer_and_never_a_plain_delay(
    app: Celery, client: Any
) -> None:
    pool = WorkerPool("ml/media", app)
    client.set(pool.keys.policy, Policy(TIERS, tasks=(TaskPolicy("media.*"),), max_wait_seconds=5).dump())
    load(client, pool.keys, CPU, Load(8, 1, 1), "media.index")
    task = app.tasks["media.index"]
    with pytest.raises(Overloaded) as refused:
        pool.submit(task, ("a",), accelerated=True)
    assert refused.value.retry_after == 4
    assert client.hget(pool.keys.routes, "cpu:Overloaded") == "1"
    assert pool.submit(task, ("a",), accelerated=True, max_wait=60).expected_wait == 9.0
    job = pool.job(task.delay("a").id)
    assert job is not None
    assert (job.tier, job.reason) == ("cpu", Reason.NO_CAPACITY)


def test_celerys_own_publish_is_bounded_too() -> None:
    with private_redis() as server:
        app = media_app(server.url)
        WorkerPool("ml/media", app, tiers=TIERS)
        task = app.tasks["media.index"]
        task.delay("before")
        os.kill(server.pid, signal.SIGSTOP)
        try:
            for options in ({}, {"headers": {"workerpool": {"accelerated": True}}}):
                started = time.monotonic()
                with pytest.raises(OperationalError):
                    task.apply_async(("after",), **options)
                assert time.monotonic() - started < 30
        finally:
            os.kill(server.pid, signal.SIGCONT)


@pytest.mark.parametrize("name", ["media", "ML/media", "ml/media/x", ""])
def test_a_name_that_is_no_namespace_and_name_is_refused(app: Celery, name: str) -> None:
    with pytest.raises(NotConfigured, match="namespace/name"):
        WorkerPool(name, app)


def test_an_app_without_a_redis_broker_is_refused() -> None:
    app = Celery("api", broker="amqp://localhost")
    with pytest.raises(NotConfigured, match="broker_url"):
        WorkerPool("ml/media", app, tiers=TIERS).queue_length("celery")


@pytest.mark.parametrize("fault", ["stopped", "gone", "read-only", "out of memory"])
def test_a_redis_that_does_not_take_the_job_is_an_error_within_a_bounded_time_and_leaves_nothing(fault: str) -> None:
    with private_redis() as server, Redis.from_url(server.url, decode_responses=True) as client:
        app = media_app(server.url)
        task, pool = app.tasks["media.index"], WorkerPool("ml/media", app, tiers=TIERS, timeout=1)
        pool.submit(task, ("before",))
        if fault == "stopped":
            os.kill(server.pid, signal.SIGSTOP)
        if fault == "gone":
            os.kill(server.pid, signal.SIGKILL)
        if fault == "read-only":
            client.replicaof("127.0.0.1", 1)
        if fault == "out of memory":
            client.config_set("maxmemory", 1)
        started = time.monotonic()
        try:
            with pytest.raises(PoolUnavailable):
                pool.submit(task, ("after",))
            assert time.monotonic() - started < 10
        finally:
            if fault != "gone":
                os.kill(server.pid, signal.SIGCONT)
        if fault != "gone":
            assert pool.queue_length("cpu-jobs") == 1


def test_scheduled_messages_that_ran_since_the_last_report_make_no_slot_free(pool: WorkerPool, app: Celery, client: Any) -> None:
    load(client, pool.keys, GPU, Load(waiting=1, in_flight=0, ready=1), "media.transcribe")
    client.incrby(pool.keys.scheduled("gpu"), 3)
    assert pool.should_accelerate(app.tasks["media.transcribe"]).reason is Reason.NO_CAPACITY
    assert pool.status()["tiers"]["gpu"]["in_flight"] == 0


@pytest.mark.parametrize("garbage", [b"\xff\xfe is no UTF-8", pytest.param(b"[" * 5000 + b"]" * 5000, id="deep")])
def test_what_cannot_be_read_in_a_queue_counts_as_waiting_and_has_no_age(pool: WorkerPool, client: Any, garbage: bytes) -> None:
    client.rpush("test-cpu-jobs", garbage)
    cpu = pool.status()["tiers"]["cpu"]
    assert (cpu["waiting"], cpu["oldest_wait"]) == (1, None)


def test_workers_and_status_count_the_living(pool: WorkerPool, client: Any) -> None:
    seconds, _ = client.time()
    for tier, owner, busy, age in (("gpu", "g.1", 1, 0), ("gpu", "g.2", 0, 9), ("cpu", "c.1", 0, 0)):
        report = {
            "version": 1, "owner": owner, "worker": owner[0], "tier": tier, "queue": f"{tier}-jobs", "slots": 1, "busy": busy,
            "since": 0, "at": (seconds - age) * 1000,
        }  # fmt: skip
        client.hset(pool.keys.presence(tier), owner, json.dumps(report))
    client.lpush(pool.keys.queue_list("gpu-jobs", 9), "{}")
    assert set(pool.workers()) == {"g.1", "c.1"}
    assert not pool.has_accelerated_workers()
    assert pool.status() == {
        "workers": {
            "total": 2, "gpu": 1, "cpu": 1,
            "details": {
                "g.1": {"type": "gpu", "active_tasks": 1, "max_tasks": 1, "queues": ["gpu-jobs"]},
                "c.1": {"type": "cpu", "active_tasks": 0, "max_tasks": 1, "queues": ["cpu-jobs"]},
            },
        },
        "queues": {"gpu-jobs": {"length": 1, "workers": 1}, "cpu-jobs": {"length": 0, "workers": 1}},
        "gpu_available": False,
        "tiers": {
            "gpu": {
                "type": "gpu", "queue": "gpu-jobs", "ready": 1, "starting": 0, "waiting": 1, "in_flight": 0, "oldest_wait": None,
            },
            "cpu": {
                "type": "cpu", "queue": "cpu-jobs", "ready": 1, "starting": 0, "waiting": 0, "in_flight": 0, "oldest_wait": None,
            },
        },
    }  # fmt: skip
