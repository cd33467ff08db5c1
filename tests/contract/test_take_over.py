"""The jobs of a lost worker: they go on where the ledger says, once, and what cannot be read holds up no other."""

from __future__ import annotations

import asyncio

import pytest
from redis import Redis
from tests import seeds
from tests.contract.broker import ask, open_for_jobs, read, submit
from tests.seeds import claim, consumer, make_pool, publish, report, take

from workerpool_operator import planning
from workerpool_operator.broker import RedisBroker
from workerpool_operator.ports import Pool
from workerpool_routing import WorkerPool, ledger
from workerpool_routing.ledger import State
from workerpool_routing.wire import PRESENCE_LIFE_MS

pytestmark = pytest.mark.contract


@pytest.fixture
def pool(redis_url: str) -> Pool:
    return make_pool(redis_url)


@pytest.mark.parametrize("priority", [None, 3, 7])
def test_the_job_of_a_lost_worker_moves_to_the_head_of_the_plain_queue_once(
    redis_url: str, pool: Pool, priority: int | None
) -> None:
    open_for_jobs(redis_url, pool)
    submit(pool, priority=priority)
    publish(pool, "celery", *[priority or 0] * 2)
    with consumer(pool, "gpu") as connection, consumer(pool, "cpu") as heir:
        held = claim(redis_url, pool, connection, "gpu", "w.1")
        report(redis_url, pool, "gpu", "w.1", age_ms=PRESENCE_LIFE_MS)

        async def twice(broker: RedisBroker) -> list[list[str]]:
            return await asyncio.gather(*(broker.take_over(redis_url, pool, "gpu", "w.1") for _ in range(2)))

        sentences = [sentence for said in ask(twice) for sentence in said]
        moved = f"job {held.task_id} of lost worker w.1 goes from gpu to cpu, attempt 2"
        assert sentences.count(moved) == 1
        assert "gpu: worker w.1 is lost, it has not reported for too long" in sentences

        entry = seeds.job(redis_url, pool, held.task_id)
        assert (entry.state, entry.attempt, entry.tier, entry.owner, entry.wanted) == (State.ADMITTED, 2, "cpu", "", "gpu")
        after = read(redis_url, pool).tiers
        assert (after["gpu"].in_flight, after["gpu"].lost, after["cpu"].waiting) == (0, (), 3)

        message = take(heir, "celery")
        assert message
        assert (message.headers["id"], message.headers["workerpool"]["attempt"]) == (held.task_id, 2)
        assert message.delivery_tag != held.message.delivery_tag
        assert message.body == held.message.body
        # The old owner wakes up and acknowledges: the new delivery stays.
        held.message.ack()
        assert read(redis_url, pool).tiers["cpu"].in_flight == 1


def test_the_job_of_a_lost_plain_worker_is_delivered_there_again(redis_url: str, pool: Pool) -> None:
    open_for_jobs(redis_url, pool)
    with seeds.celery_app(pool) as app:
        WorkerPool(pool.id, app).submit(app.tasks["tasks.work"])
    with consumer(pool, "cpu") as connection:
        held = claim(redis_url, pool, connection, "cpu", "w.1")
        ask(lambda broker: broker.take_over(redis_url, pool, "cpu", "w.1"))
        entry = seeds.job(redis_url, pool, held.task_id)
        assert (entry.state, entry.attempt, entry.tier, entry.losses) == (State.ADMITTED, 1, "cpu", 1)
        again = take(connection, "celery")
        assert again
        assert again.headers["id"] == held.task_id


def test_a_worker_that_leaves_takes_its_slots_and_what_it_scheduled_and_nothing_of_the_others(redis_url: str, pool: Pool) -> None:
    with Redis.from_url(redis_url, decode_responses=True) as client:

        def run(name: str, call: ledger.Call) -> None:
            client.register_script(ledger.script(name))(keys=call.keys, args=call.args)

        def seen() -> tuple[list[str], list[str], int]:
            slots = sorted(client.zrange(pool.keys.slots("gpu"), 0, -1))
            return sorted(client.hkeys(pool.keys.presence("gpu"))), slots, int(client.get(pool.keys.scheduled("gpu")))

        def reports(owner: str, slots: int, scheduled: int) -> None:
            entry: dict[str, str | int | bool] = {
                "owner": owner, "worker": owner, "tier": "gpu", "slots": slots, "scheduled": scheduled,
            }  # fmt: skip
            run("presence", ledger.report(pool.keys, entry, ()))

        reports("a.1", 3, 1)
        reports("b.1", 2, 2)
        reports("a.1", 2, 4)
        assert seen() == (["a.1", "b.1"], ["a.1/0", "a.1/1", "b.1/0", "b.1/1"], 6)
        for _ in range(2):
            run("leave", ledger.leave(pool.keys, "gpu", "a.1"))
            assert seen() == (["b.1"], ["b.1/0", "b.1/1"], 2)


def test_a_job_that_is_acknowledged_already_is_left_alone(redis_url: str, pool: Pool) -> None:
    open_for_jobs(redis_url, pool)
    submit(pool)
    with consumer(pool, "gpu") as connection:
        held = claim(redis_url, pool, connection, "gpu", "w.1")
        before = seeds.job(redis_url, pool, held.task_id)
        held.message.ack()
        ask(lambda broker: broker.take_over(redis_url, pool, "gpu", "w.1"))
    assert seeds.job(redis_url, pool, held.task_id) == before
    tiers = read(redis_url, pool).tiers
    assert (tiers["gpu"].waiting, tiers["cpu"].waiting) == (0, 0)


def test_a_job_whose_result_may_be_stored_is_not_started_anew(redis_url: str, pool: Pool) -> None:
    open_for_jobs(redis_url, pool)
    submit(pool)
    with consumer(pool, "gpu") as connection:
        held = claim(redis_url, pool, connection, "gpu", "w.1")
        call = ledger.settle(
            pool.keys, planning.policy(pool.spec), held.task_id, attempt=1, tag=held.message.delivery_tag, owner="w.1",
            tier="gpu", before=State.CLAIMED, after=State.FINISHING,
        )  # fmt: skip
        with Redis.from_url(redis_url) as client:
            assert client.register_script(ledger.script("settle"))(keys=call.keys, args=call.args) == 1
        ask(lambda broker: broker.take_over(redis_url, pool, "gpu", "w.1"))
        assert seeds.job(redis_url, pool, held.task_id).state is State.FINISHING
        served = read(redis_url, pool).tiers["gpu"].served
        assert served.jobs == 1, "its time on a slot is over and counts"
        assert served.squares == pytest.approx(served.seconds**2)
        assert served.mean == pytest.approx(served.seconds, abs=1e-5)
        # Kombu delivers it again, and whoever gets it looks for the result first.
        assert read(redis_url, pool).tiers["gpu"].in_flight == 1


@pytest.mark.parametrize("damage", ["a field is gone", "a field is no number", "not a hash", "another version", "the message"])
def test_a_job_that_cannot_be_read_is_named_once_and_the_others_of_its_worker_are_taken_over(
    redis_url: str, pool: Pool, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    open_for_jobs(redis_url, pool)
    with consumer(pool, "gpu") as connection, Redis.from_url(redis_url, decode_responses=True) as client:
        held = []
        for _ in range(3):
            submit(pool)
            held.append(claim(redis_url, pool, connection, "gpu", "w.1"))
        report(redis_url, pool, "gpu", "w.1", age_ms=PRESENCE_LIFE_MS)
        broken, *sound = sorted(held, key=lambda one: one.task_id)
        entry = pool.keys.job(broken.task_id)
        match damage:
            case "a field is gone":
                client.hdel(entry, "task")
            case "a field is no number":
                client.hset(entry, "attempt", "one")
            case "not a hash":
                client.set(entry, "x")
            case "another version":
                client.hset(entry, "version", "2")
            case _:
                client.hset(pool.keys.unacked("gpu"), broken.message.delivery_tag, "[]")

        async def twice(broker: RedisBroker) -> None:
            for _ in range(2):
                await broker.take_over(redis_url, pool, "gpu", "w.1")

        ask(twice)
        assert {seeds.job(redis_url, pool, one.task_id).attempt for one in sound} == {2}
        assert [broken.task_id in message for message in caplog.messages] == [True]
        gone = damage != "another version"
        assert (read(redis_url, pool).tiers["gpu"].lost == ()) == gone, "whoever knows the version finds the worker"


def test_a_job_of_another_schema_version_is_not_touched(redis_url: str, pool: Pool) -> None:
    open_for_jobs(redis_url, pool)
    submit(pool)
    with consumer(pool, "gpu") as connection, Redis.from_url(redis_url, decode_responses=True) as client:
        held = claim(redis_url, pool, connection, "gpu", "w.1")
        client.hset(pool.keys.job(held.task_id), "version", "2")
        before = client.hgetall(pool.keys.job(held.task_id))
        assert ask(lambda broker: broker.take_over(redis_url, pool, "gpu", "w.1")) == []
        assert client.hgetall(pool.keys.job(held.task_id)) == before
        assert client.smembers(pool.keys.held("w.1")) == {held.task_id}
        assert client.hlen(pool.keys.unacked("gpu")) == 1
