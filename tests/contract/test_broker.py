"""The broker port on a real Redis, with messages that real Celery and Kombu wrote."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from dataclasses import replace
from math import inf
from typing import Any

import pytest
from e2e.cluster.ports import reserve_port
from redis import Redis
from redis._parsers.response_callbacks import _RedisCallbacks
from tests import seeds
from tests.contract.broker import CAPACITY, ask, open_for_jobs, read, submit
from tests.seeds import celery_app, claim, consumer, make_pool, publish, report, take

from workerpool_operator import planning
from workerpool_operator.broker import TIMEOUT_SECONDS, RedisBroker
from workerpool_operator.local import redis_server
from workerpool_operator.local.redis_server import private_redis
from workerpool_operator.observation import BrokerReading, Unavailable, Waits
from workerpool_operator.ports import Pool
from workerpool_operator.rebalancing import Transfer
from workerpool_routing import WorkerPool, ledger
from workerpool_routing.ledger import State
from workerpool_routing.wire import CAPACITY_LIFE_MS, JOB_LIFE_SECONDS, PRESENCE_LIFE_MS, Capacity, Policy, wake_channel

pytestmark = pytest.mark.contract


PASSWORD = "pass-phrase"


def why_not(url: str, pool: Pool) -> str:
    answer = ask(lambda broker: broker.read(url, [pool]))
    one = answer if isinstance(answer, Unavailable) else answer[pool.id]
    assert isinstance(one, Unavailable)
    return one.why


@pytest.fixture
def pool(redis_url: str) -> Pool:
    return make_pool(redis_url)


@pytest.mark.parametrize(
    "broker",
    [{}, {"globalKeyPrefix": "team-a:"}, {"prioritySteps": [0, 1, 5]}, {"prioritySteps": [2, 7], "globalKeyPrefix": "{x}"}],
    ids=str,
)
def test_waiting_messages_are_counted_over_all_priority_steps(redis_url: str, broker: dict[str, object]) -> None:
    pool = make_pool(redis_url, broker={"url": redis_url, **broker})
    publish(pool, "gpu-tasks", *range(10))
    publish(pool, "celery", 0, 9)
    tiers = read(redis_url, pool).tiers
    assert (tiers["gpu"].waiting, tiers["cpu"].waiting) == (10, 2)
    with consumer(pool, "gpu") as connection:
        # What is left in no list that Kombu knows would not be taken.
        assert [take(connection, "gpu-tasks") is not None for _ in range(11)] == [True] * 10 + [False]


def test_an_empty_redis_reads_as_nothing_waiting_and_nobody_there(redis_url: str, pool: Pool) -> None:
    gpu = read(redis_url, pool).tiers["gpu"]
    assert (gpu.waiting, gpu.in_flight, gpu.spilled, gpu.workers, gpu.lost) == (0, 0, 0, (), ())


@pytest.mark.parametrize("prefix", ["", "team-a:"])
def test_messages_that_a_worker_holds_are_in_flight_on_its_tier_alone(redis_url: str, prefix: str) -> None:
    pool = make_pool(redis_url, broker={"url": redis_url, "globalKeyPrefix": prefix})
    publish(pool, "gpu-tasks", 0, 3, 9)
    with consumer(pool, "gpu") as connection:
        first, _ = take(connection, "gpu-tasks"), take(connection, "gpu-tasks")
        tiers = read(redis_url, pool).tiers
        assert (tiers["gpu"].waiting, tiers["gpu"].in_flight, tiers["cpu"].in_flight) == (1, 2, 0)
        assert first
        first.ack()
        assert read(redis_url, pool).tiers["gpu"].in_flight == 1


@pytest.mark.parametrize("prefix", ["", "team-a:"])
def test_what_workers_without_the_library_hold_is_told_apart(redis_url: str, prefix: str) -> None:
    pool = make_pool(redis_url, broker={"url": redis_url, "globalKeyPrefix": prefix})
    publish(pool, "celery", 0, 0)
    with celery_app(pool).connection_for_read() as connection:
        assert take(connection, "celery") is not None
        cpu = read(redis_url, pool).tiers["cpu"]
        assert (cpu.waiting, cpu.in_flight, cpu.plain_in_flight) == (1, 0, 1)
        connection.default_channel.qos.restore_at_shutdown = False


def test_a_job_that_had_to_go_elsewhere_is_read_as_spilled_from_the_tier_it_wanted(redis_url: str, pool: Pool) -> None:
    ask(lambda broker: broker.publish(redis_url, pool, planning.policy(pool.spec), Capacity()))
    with seeds.celery_app(pool) as app:
        WorkerPool(pool.id, app).submit(app.tasks["tasks.work"], accelerated=True)
    reading = read(redis_url, pool)
    assert (reading.tiers["gpu"].spilled, reading.tiers["cpu"].spilled, reading.tiers["cpu"].waiting) == (1, 0, 1)
    assert reading.routes == {"cpu:NoCapacity": 1}


def test_any_number_of_pools_is_read_in_one_round_trip(redis_url: str) -> None:
    pools = [make_pool(redis_url, f"pool-{n}", broker={"url": redis_url, "globalKeyPrefix": f"{n % 2}:"}) for n in range(6)]
    for n, pool in enumerate(pools):
        publish(pool, "gpu-tasks", *[0] * (n // 2))

    async def requests(broker: RedisBroker, client: Any, count: int) -> Any:
        before = client.info("stats")["total_reads_processed"]
        answer = await broker.read(redis_url, pools[:count])
        assert not isinstance(answer, Unavailable)
        # Both pools of a prefix share its queue: what counts here is that every pool has its own answer.
        seen = [answer[pool.id] for pool in pools[:count]]
        waiting = [one.tiers["gpu"].waiting for one in seen if isinstance(one, BrokerReading)]
        assert waiting == [(0 + 1 + 2), (0 + 1 + 2)] * (count // 2)
        return client.info("stats")["total_reads_processed"] - before - 1

    async def scenario(broker: RedisBroker) -> None:
        with Redis.from_url(redis_url) as client:
            await broker.read(redis_url, pools)
            await listening(redis_url, "0:", "1:")
            assert [await requests(broker, client, count) for count in (2, 6)] == [1, 1]

    ask(scenario)


def test_presence_lives_by_the_clock_of_redis(redis_url: str, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    report(redis_url, pool, "gpu", "here.1", busy=1)
    report(redis_url, pool, "gpu", "late.2", age_ms=PRESENCE_LIFE_MS - 3_000)
    report(redis_url, pool, "gpu", "lost.3", age_ms=PRESENCE_LIFE_MS)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    gpu = read(redis_url, pool).tiers["gpu"]
    assert {worker.owner: worker.busy for worker in gpu.workers} == {"here.1": 1, "late.2": 0}
    assert gpu.lost == ("lost.3",)


def test_the_lost_of_long_ago_are_forgotten_when_a_worker_begins_with_slots_or_without(redis_url: str, pool: Pool) -> None:
    a_day = 1000 * JOB_LIFE_SECONDS
    workers = [("here.1", 1, 0), ("lately.1", 0, a_day - 600_000), ("drained.1", 0, a_day + 1), ("lost.1", 1, a_day + 1)]
    for owner, slots, _ in workers:
        report(redis_url, pool, "gpu", owner, slots=slots)
    for owner, slots, age in reversed(workers):
        report(redis_url, pool, "gpu", owner, slots=slots, age_ms=age)
    with Redis.from_url(redis_url, decode_responses=True) as client:
        assert client.hlen(pool.keys.presence("gpu")) == 4, "a report that is not the first costs no more with many lost"
        report(redis_url, pool, "gpu", "new.1")
        assert set(client.hkeys(pool.keys.presence("gpu"))) == {"here.1", "lately.1", "new.1"}
        assert set(client.zrange(pool.keys.slots("gpu"), 0, -1)) == {"here.1/0", "new.1/0"}


def test_a_restarted_redis_is_told_from_the_old_one(redis_url: str, pool: Pool) -> None:
    with private_redis() as other:
        ids = {read(redis_url, pool).run_id, read(redis_url, pool).run_id, read(other.url, pool).run_id}
    assert len(ids) == 2


def test_a_redis_that_is_not_there_is_named_with_its_place(pool: Pool) -> None:
    why = why_not(f"redis://me:{PASSWORD}@127.0.0.1:1/0", pool)
    assert why.startswith("Redis at 127.0.0.1:1 cannot be reached: ")
    assert PASSWORD not in why


@pytest.mark.parametrize("given", ["", f":wrong-{PASSWORD}@", f"nobody:{PASSWORD}@"])
def test_a_refused_password_is_told_and_not_repeated(given: str, pool: Pool) -> None:
    with private_redis() as server:
        place = f"127.0.0.1:{server.port}"
        with Redis.from_url(server.url) as client:
            client.config_set("requirepass", PASSWORD)
        why = why_not(f"redis://{given}{place}/0", pool)
        assert why.startswith(f"Redis at {place} refuses the user or the password: ")
        assert PASSWORD not in why
        assert read(f"redis://:{PASSWORD}@{place}/0", pool).tiers["gpu"].waiting == 0


@pytest.mark.parametrize(
    "url", [f"redis://:{PASSWORD}/1@127.0.0.1:1/0", f"redis://:a#{PASSWORD}@h:1", f"redis://h:1?password={PASSWORD}"]
)
def test_a_password_is_not_repeated_wherever_in_the_url_it_stands(url: str, pool: Pool, caplog: pytest.LogCaptureFixture) -> None:
    assert PASSWORD not in why_not(url, pool)
    refused = ask(lambda broker: broker.publish(url, pool, planning.policy(pool.spec), CAPACITY))
    assert refused
    assert PASSWORD not in refused.why
    assert ask(lambda broker: broker.take_over(url, pool, "gpu", "w.1")) == []
    ask(lambda broker: broker.forget(url, pool))
    assert len(caplog.messages) == 2
    assert PASSWORD not in caplog.text


def test_a_redis_that_does_not_answer_is_given_up_in_time_and_read_again_when_it_does(pool: Pool) -> None:
    async def scenario(broker: RedisBroker) -> None:
        with private_redis() as server:
            assert not isinstance(await broker.read(server.url, [pool]), Unavailable)
            os.kill(server.pid, signal.SIGSTOP)
            began = time.monotonic()
            answer = await broker.read(server.url, [pool])
            assert time.monotonic() - began < 2 * TIMEOUT_SECONDS
            assert answer == Unavailable(f"Redis at 127.0.0.1:{server.port} does not answer within 2 s")
            os.kill(server.pid, signal.SIGCONT)
            assert not isinstance(await broker.read(server.url, [pool]), Unavailable)

    ask(scenario)


def test_another_schema_version_is_refused_in_words(redis_url: str, pool: Pool) -> None:
    report(redis_url, pool, "gpu", "new.1")
    with Redis.from_url(redis_url, decode_responses=True) as client:
        stored = json.loads(client.hget(pool.keys.presence("gpu"), "new.1"))
        client.hset(pool.keys.presence("gpu"), "new.1", json.dumps({**stored, "version": 2}))
    assert "presence has schema version 2, this side knows 1: use one release on both sides" in why_not(redis_url, pool)


@pytest.mark.parametrize("raw", ["", "not json", "[]", "1", '{"version": 1}', '{"version": 1, "owner": "x", "surprise": 0}'])
def test_a_presence_that_no_worker_wrote_is_not_taken_for_an_empty_queue(redis_url: str, pool: Pool, raw: str) -> None:
    with Redis.from_url(redis_url) as client:
        client.hset(pool.keys.presence("gpu"), "odd.1", raw)
    assert why_not(redis_url, pool).startswith("what Redis holds of the pool cannot be read: ")
    other = replace(pool, name="other")
    both = ask(lambda broker: broker.read(redis_url, [pool, other]))
    assert not isinstance(both, Unavailable)
    assert not isinstance(both[other.id], Unavailable), "it is the affair of its own pool"


@pytest.mark.parametrize("kind", ["queue", "presence"])
def test_a_key_of_the_wrong_kind_is_named_and_is_the_affair_of_its_own_pool(redis_url: str, pool: Pool, kind: str) -> None:
    bad = make_pool(redis_url, "bad", tiers=[{"name": "gpu", "queue": "q", "template": seeds.TEMPLATE}])
    key = "q" if kind == "queue" else bad.keys.presence("gpu")
    with Redis.from_url(redis_url) as client:
        client.set(key, "a string")
    publish(pool, "gpu-tasks", 0)
    both = ask(lambda broker: broker.read(redis_url, [bad, pool]))
    assert not isinstance(both, Unavailable)
    ill, well = both[bad.id], both[pool.id]
    assert isinstance(ill, Unavailable)
    assert f"{key}: WRONGTYPE" in ill.why
    assert isinstance(well, BrokerReading)
    assert well.tiers["gpu"].waiting == 1


async def listening(url: str, *prefixes: str) -> None:
    """Return when somebody has subscribed to the wake channel of each prefix."""
    with Redis.from_url(url) as client:
        async with asyncio.timeout(60):
            while not all(count for _, count in client.pubsub_numsub(*map(wake_channel, prefixes))):  # noqa: ASYNC110 it is Redis
                await asyncio.sleep(0.02)


def test_an_admitted_job_wakes_whoever_has_read_its_pool_also_after_a_restart_of_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        wake = asyncio.Event()
        broker = RedisBroker(wake)
        port = reserve_port()
        monkeypatch.setattr(redis_server, "free_port", lambda: port)
        for _ in range(2):
            with private_redis() as server:
                pool = make_pool(server.url)
                await broker.publish(server.url, pool, planning.policy(pool.spec), CAPACITY)
                await broker.read(server.url, [pool])
                await listening(server.url, "")
                wake.clear()
                await asyncio.to_thread(submit, pool)
                async with asyncio.timeout(60):
                    await wake.wait()
            await asyncio.sleep(0.2)  # the subscription meets a port on which nobody listens
        await broker.close()

    asyncio.run(scenario())


def test_what_no_pool_names_any_more_is_let_go(redis_url: str) -> None:
    rotated = f"{redis_url}?client_name=rotated"
    old, new = (make_pool(redis_url, broker={"url": redis_url, "globalKeyPrefix": prefix}) for prefix in ("old:", "new:"))

    async def scenario(broker: RedisBroker) -> None:
        with Redis.from_url(redis_url, decode_responses=True) as client:
            await broker.read(redis_url, [old, new])
            await broker.read(rotated, [old])
            await listening(redis_url, "old:", "new:")
            await broker.keep_only([(redis_url, new)])
            async with asyncio.timeout(60):
                while client.pubsub_channels() != [wake_channel("new:")]:  # noqa: ASYNC110 it is Redis
                    await asyncio.sleep(0.02)
            assert not any(connection["name"] == "rotated" for connection in client.client_list())
            assert not isinstance(await broker.read(redis_url, [new]), Unavailable)

    ask(scenario)


def test_a_subscription_that_ended_is_made_again_by_the_next_reading(redis_url: str, pool: Pool) -> None:
    async def scenario(broker: RedisBroker) -> None:
        await broker.read(redis_url, [pool])
        await listening(redis_url, "")
        [listener] = broker._listeners.values()
        listener.cancel()
        await asyncio.wait([listener])
        await broker.read(redis_url, [pool])
        await listening(redis_url, "")

    ask(scenario)


def test_what_is_published_can_be_read_and_capacity_expires(redis_url: str, pool: Pool) -> None:
    policy = planning.policy(pool.spec)
    ask(lambda broker: broker.publish(redis_url, pool, policy, CAPACITY))
    with Redis.from_url(redis_url, decode_responses=True) as client:
        assert Policy.load(client.get(pool.keys.policy)) == policy
        assert Capacity.load(client.get(pool.keys.capacity)) == CAPACITY
        assert client.pttl(pool.keys.policy) == -1
        assert CAPACITY_LIFE_MS - 5_000 < client.pttl(pool.keys.capacity) <= CAPACITY_LIFE_MS


@pytest.mark.parametrize(
    ("setting", "words"), [("maxmemory", "used memory > 'maxmemory'"), ("min-replicas-to-write", "NOREPLICAS")]
)
def test_a_redis_that_takes_no_writes_says_so_to_whoever_publishes(pool: Pool, setting: str, words: str) -> None:
    with private_redis() as server, Redis.from_url(server.url) as client:
        client.config_set(setting, "1")
        refused = ask(lambda broker: broker.publish(server.url, pool, planning.policy(pool.spec), CAPACITY))
        assert refused
        assert refused.why.startswith(f"Redis at 127.0.0.1:{server.port} refuses writes: ")
        assert words in refused.why
        client.config_set(setting, "0")
        assert ask(lambda broker: broker.publish(server.url, pool, planning.policy(pool.spec), CAPACITY)) is None


def test_what_was_published_is_forgotten_and_the_queue_is_kept(redis_url: str, pool: Pool) -> None:
    open_for_jobs(redis_url, pool)
    publish(pool, "gpu-tasks", 0)
    ask(lambda broker: broker.forget(redis_url, pool))
    with Redis.from_url(redis_url, decode_responses=True) as client:
        assert client.keys(pool.keys.policy) + client.keys(pool.keys.capacity) == []
    assert read(redis_url, pool).tiers["gpu"].waiting == 1


def test_an_outage_while_acting_raises_nothing(pool: Pool) -> None:
    url = "redis://127.0.0.1:1/0"
    assert ask(lambda broker: broker.publish(url, pool, planning.policy(pool.spec), CAPACITY))
    assert ask(lambda broker: broker.take_over(url, pool, "gpu", "w.1")) == []
    ask(lambda broker: broker.forget(url, pool))


@pytest.mark.parametrize(
    ("expected", "waited", "scheduled", "counted"),
    [
        (100.0, 90.0, False, (1, 1)),
        (90.0, 100.0, False, (1, 1)),
        (100.0, 300.0, False, (1, 0)),
        (900.0, 300.0, False, (1, 0)),
        (inf, 300.0, False, (0, 0)),
        (0.0, 300.0, True, (0, 0)),
    ],
)
def test_a_first_start_is_held_against_what_admission_expected(
    redis_url: str, pool: Pool, expected: float, waited: float, scheduled: bool, counted: tuple[int, int]
) -> None:
    open_for_jobs(redis_url, pool)
    submit(pool)
    with consumer(pool, "gpu") as connection, Redis.from_url(redis_url, decode_responses=True) as client:
        (entry,) = client.keys(pool.keys.job("*"))
        client.hincrby(entry, "admitted_at", -int(1000 * waited))
        client.hset(entry, "wait", expected)
        held = claim(redis_url, pool, connection, "gpu", "w.1", scheduled=scheduled)
        waits = read(redis_url, pool).tiers["gpu"].waits
        assert (waits.jobs, waits.right) == counted
        assert waits.expected == (expected if counted[0] else 0.0)
        assert waits.seconds == pytest.approx(waited * counted[0], abs=20)
        # Lost, and delivered again on the other tier: its second start says nothing of what was expected.
        ask(lambda broker: broker.take_over(redis_url, pool, "gpu", "w.1"))
    with consumer(pool, "cpu") as connection:
        assert claim(redis_url, pool, connection, "cpu", "w.2").task_id == held.task_id
    assert read(redis_url, pool).tiers["cpu"].waits == Waits()


def test_the_mean_length_of_a_tiers_jobs_is_plain_at_first_and_then_follows_the_last_hundred(redis_url: str, pool: Pool) -> None:
    open_for_jobs(redis_url, pool)
    with consumer(pool, "gpu") as connection, Redis.from_url(redis_url, decode_responses=True) as client:
        for took, jobs, mean in ((900, 1, 900), (300, 2, 600), (6_000, 10, 1_140), (101_140, 500, 2_140)):
            submit(pool)
            held = claim(redis_url, pool, connection, "gpu", "w.1")
            client.hincrby(pool.keys.job(held.task_id), "claimed_at", -1000 * took)
            client.hset(pool.keys.served("gpu"), "jobs", jobs - 1)
            call = ledger.settle(
                pool.keys, planning.policy(pool.spec), held.task_id, attempt=1, tag=held.message.delivery_tag, owner="w.1",
                tier="gpu", before=State.CLAIMED, after=State.FINISHING,
            )  # fmt: skip
            assert client.register_script(ledger.script("settle"))(keys=call.keys, args=call.args) == 1
            assert float(client.hget(pool.keys.served("gpu"), "mean")) == pytest.approx(mean, abs=20)
            client.hset(pool.keys.served("gpu"), "mean", mean)


@pytest.mark.parametrize("garbage", [b"\xff\xfe is no UTF-8", pytest.param(b"[" * 5000 + b"]" * 5000, id="deep")])
def test_what_cannot_be_read_ends_no_pass_and_is_kept_as_it_was(redis_url: str, garbage: bytes) -> None:
    pool = make_pool(redis_url)
    open_for_jobs(redis_url, pool)
    with Redis.from_url(redis_url) as client:
        client.rpush("gpu-tasks", garbage)
        client.hset(pool.keys.unacked("gpu"), "tag", garbage)
        client.zadd(pool.keys.unacked_index("gpu"), {"tag": 1})
        task_id = submit(pool)
        client.zadd(pool.keys.waiting("gpu"), {task_id: 1}, xx=True)
        assert read(redis_url, pool).tiers["gpu"].waiting == 2
        moved = ask(lambda broker: broker.rebalance(redis_url, pool, planning.policy(pool.spec), Transfer("gpu", "cpu", 9, "")))
        said = ask(lambda broker: broker.sweep(redis_url, pool))
        assert moved == 1
        assert ["set aside" in sentence for sentence in said] == [True]
        assert client.lrange("gpu-tasks", 0, -1) == [garbage]
        assert garbage in client.hget(pool.keys.aside, "tag")
        assert not client.hexists(pool.keys.unacked("gpu"), "tag")


def test_a_redis_that_does_not_say_which_process_it_is_counts_as_unread(
    redis_url: str, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_RedisCallbacks, "INFO", lambda _, **__: {"redis_version": "7.4.0"})
    assert why_not(redis_url, pool).endswith(": INFO names no run_id, and without it a restart would not be seen")
