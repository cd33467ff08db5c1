"""Taking over from lost workers with operators that work at once, or die at any step of it: one outcome each."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from contextlib import ExitStack
from typing import Any

import pytest
from redis import Redis
from redis import asyncio as aioredis
from tests.seeds import celery_app, claim, consumer, make_pool, take

from workerpool_operator import planning, salvage
from workerpool_operator.ports import Pool
from workerpool_routing import WorkerPool, ledger
from workerpool_routing.ledger import State
from workerpool_routing.wire import Capacity, TierCapacity

pytestmark = pytest.mark.contract

OWNER = "w.1"


class Died(BaseException):
    """The end of an operator's process."""


class Mortal(aioredis.Redis):
    """A client whose operator dies before its command of that number is sent."""

    left = 0

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        if self.left == 0:
            raise Died
        self.left -= 1
        return await super().execute_command(*args, **options)  # type: ignore[no-untyped-call,unused-ignore]


def never(task_id: str, error: Exception) -> None:
    raise AssertionError(task_id) from error


async def salvaged(client: Any, pool: Pool, pause: float = 0) -> list[str]:
    """One pass: the lost worker, then what fell between the steps, twice, since what is missing must be missing twice."""
    said = await salvage.take_over(client, pool, "gpu", OWNER, never)
    said += await salvage.sweep(client, pool)
    await asyncio.sleep(pause)
    return said + await salvage.sweep(client, pool)


@pytest.fixture
def pool(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Pool:
    monkeypatch.setattr(ledger, "MISSING_MS", 0)
    monkeypatch.setattr(salvage, "OVERTAKEN_MS", 0)
    monkeypatch.setattr(salvage, "UNRENEWED_SECONDS", -2)
    return make_pool(redis_url)


def leave_behind(url: str, pool: Pool, each: int) -> dict[str, str]:
    """What a worker leaves that died with jobs claimed, finishing, held and not claimed, and taken and not recorded."""
    left = {}
    with ExitStack() as stack, Redis.from_url(url, decode_responses=True) as client:
        client.flushall()
        client.set(pool.keys.policy, planning.policy(pool.spec).dump())
        client.set(pool.keys.capacity, Capacity({"gpu": TierCapacity(startable=100)}).dump())
        app = stack.enter_context(celery_app(pool))
        router = WorkerPool(pool.id, app)
        worker = stack.enter_context(consumer(pool, "gpu"))
        for state in ("claimed", "finishing", "held", "taken"):
            for _ in range(each):
                task_id = str(router.submit(app.tasks["tasks.work"], accelerated=True).task_id)
                left[task_id] = state
                if state == "taken":
                    client.rpop("gpu-tasks")
                elif state == "held":
                    take(worker, "gpu-tasks")
                else:
                    held = claim(url, pool, worker, "gpu", OWNER)
                    if state == "finishing":
                        call = ledger.settle(
                            pool.keys, planning.policy(pool.spec), task_id, attempt=1, tag=held.message.delivery_tag, owner=OWNER,
                            tier="gpu", before=State.CLAIMED, after=State.FINISHING,
                        )  # fmt: skip
                        assert client.register_script(ledger.script("settle"))(keys=call.keys, args=call.args) == 1
        for key in client.keys(pool.keys.waiting("*")):
            for task_id in client.zrange(key, 0, -1):
                client.zadd(key, {task_id: 1})
    return left


def found(url: str, pool: Pool, left: dict[str, str]) -> None:
    """Each job waits in one place, once; one that was claimed has moved on, and is one attempt further."""
    with Redis.from_url(url, decode_responses=True) as client:
        assert not client.hlen(pool.keys.unacked("gpu"))
        queued = {queue: [json.loads(raw) for raw in client.lrange(queue, 0, -1)] for queue in ("gpu-tasks", "celery")}
        places = Counter((m["headers"]["id"], queue) for queue, messages in queued.items() for m in messages)
        assert places == Counter((task_id, "celery" if state == "claimed" else "gpu-tasks") for task_id, state in left.items())
        for task_id, state in left.items():
            job = ledger.Job.load(task_id, client.hgetall(pool.keys.job(task_id)))
            assert job
            expected = State.FINISHING if state == "finishing" else State.ADMITTED
            assert (job.state, job.attempt) == (expected, 2 if state == "claimed" else 1)
            assert bool(job.message), state
        assert not client.exists(pool.keys.held(OWNER))


@pytest.mark.parametrize("leaders", [2, 4])
def test_leaders_that_work_at_once_give_each_job_one_place(
    redis_url: str, pool: Pool, leaders: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "MISSING_MS", 2_000)
    left = leave_behind(redis_url, pool, 10)

    async def at_once() -> list[list[str]]:
        clients = [aioredis.Redis.from_url(redis_url, decode_responses=True) for _ in range(leaders)]
        said = await asyncio.gather(*(salvaged(client, pool, 2.5) for client in clients))
        for client in clients:
            await client.aclose()
        return list(said)

    sentences = Counter(sentence for said in asyncio.run(at_once()) for sentence in said if "job " in sentence)
    found(redis_url, pool, left)
    assert set(sentences.values()) == {1}
    assert len(sentences) == len(left)


def test_a_job_that_vanishes_and_is_never_claimed_is_not_published_for_ever(redis_url: str, pool: Pool) -> None:
    """Workers without the library run it each time, and say nothing of it on the ledger."""
    [(task_id, _)] = [found for found in leave_behind(redis_url, pool, 1).items() if found[1] == "taken"]

    async def runs() -> list[str]:
        client, said = aioredis.Redis.from_url(redis_url, decode_responses=True), []
        for _ in range(5):
            said += [await salvage.sweep(client, pool), await salvage.sweep(client, pool)]
            await client.delete("gpu-tasks", pool.keys.unacked("gpu"), pool.keys.unacked_index("gpu"))
        await client.aclose()
        return [sentence for each in said for sentence in each if task_id in sentence]

    *published, given_up = asyncio.run(runs())
    assert ["published again" in sentence for sentence in published] == [True] * ledger.REPUBLISHED_AT_MOST
    assert "no worker of the pool claimed it" in given_up
    with Redis.from_url(redis_url, decode_responses=True) as client:
        job = ledger.Job.load(task_id, client.hgetall(pool.keys.job(task_id)))
        assert job
        assert (job.state, job.message) == (State.FAILED, "")
        assert client.zscore(pool.keys.waiting("gpu"), task_id) is None
        assert not client.llen("gpu-tasks")


def test_jobs_that_are_due_later_hide_none_that_is_lost(redis_url: str, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(salvage, "AT_ONCE", 2)
    with celery_app(pool) as app, Redis.from_url(redis_url, decode_responses=True) as there:
        router = WorkerPool(pool.id, app)
        there.set(pool.keys.policy, planning.policy(pool.spec).dump())
        task = app.tasks["tasks.work"]
        *_, lost = [router.submit(task, accelerated="required", countdown=later).task_id for later in (3600, 3600, 3600, None)]
        there.zincrby(pool.keys.waiting("gpu"), -2_000, str(lost))  # two seconds ago
        there.delete("gpu-tasks")  # as if a worker held those of later, and one had died before it recorded the last

    async def sentences() -> list[str]:
        client = aioredis.Redis.from_url(redis_url, decode_responses=True)
        said = await salvaged(client, pool)
        await client.aclose()
        return said

    said = asyncio.run(sentences())
    assert [str(lost) in sentence for sentence in said if "published again" in sentence] == [True]


def test_the_last_of_what_is_set_aside_are_kept_and_all_are_counted(
    redis_url: str, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "ASIDE_KEPT", 3)
    with Redis.from_url(redis_url, decode_responses=True) as client:
        client.flushall()
        script = client.register_script(ledger.script("aside"))
        for n in range(7):
            call = ledger.aside(pool.keys, "gpu", f"job-{n}", tag="", reason="unreadable", message="text")
            script(keys=call.keys, args=call.args)
        assert set(client.hkeys(pool.keys.aside)) == set(client.zrange(pool.keys.aside_at, 0, -1)) == {"job-4", "job-5", "job-6"}
        assert client.get(pool.keys.aside_count) == "7"


def test_an_operator_may_die_at_every_step_and_the_next_one_finishes(redis_url: str, pool: Pool) -> None:
    async def dies_at(step: int) -> bool:
        client: Any = Mortal.from_url(redis_url, decode_responses=True)
        client.left = step
        try:
            await salvaged(client, pool)
        except Died:
            return True
        finally:
            await client.aclose()
        return False

    async def survives() -> None:
        client = aioredis.Redis.from_url(redis_url, decode_responses=True)
        await salvaged(client, pool)
        await client.aclose()

    step, died = 0, True
    while died:
        left = leave_behind(redis_url, pool, 1)
        died = asyncio.run(dies_at(step))
        asyncio.run(survives())
        found(redis_url, pool, left)
        step += 1
    assert step > 20
