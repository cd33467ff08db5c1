"""Waiting jobs change their tier: on a real Redis with messages that real Celery wrote, and with real workers in an outage."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from redis import Redis
from tests import seeds
from tests.contract.api_and_operator import operator_pool, outcome
from tests.contract.broker import ROOM, ask, open_for_jobs, read, submit
from tests.contract.passes import Place, running
from tests.contract.workers import worker
from tests.seeds import claim, consumer, fall_back, line, make_pool, publish, take
from tests.watching import until

from workerpool_operator import planning
from workerpool_operator.model import Mode
from workerpool_operator.observation import Phase, Replica, TierReplicas
from workerpool_operator.ports import Pool
from workerpool_operator.rebalancing import Transfer
from workerpool_operator.reconcile import TICK_SECONDS
from workerpool_operator.status import ConditionType
from workerpool_routing import Reason, WorkerPool, ledger
from workerpool_routing.ledger import State

pytestmark = pytest.mark.contract

AWAY, HOME = Transfer("gpu", "cpu", 100, "away"), Transfer("cpu", "gpu", 100, "home")


@pytest.fixture
def pool(redis_url: str) -> Pool:
    pool = make_pool(redis_url)
    open_for_jobs(redis_url, pool, ROOM)
    return pool


def move(pool: Pool, transfer: Transfer) -> int:
    url, policy = str(pool.spec.broker.url), planning.policy(pool.spec)
    return ask(lambda broker: broker.rebalance(url, pool, policy, transfer))


def test_what_moves_keeps_all_that_its_message_says_and_counts_where_it_went(redis_url: str, pool: Pool) -> None:
    with seeds.celery_app(pool) as app, Redis.from_url(redis_url, decode_responses=True) as client:
        task_id = WorkerPool(pool.id, app).submit(app.tasks["tasks.work"], accelerated=True, priority=6, deadline=60).task_id
        assert task_id
        since = client.zscore(pool.keys.waiting("gpu"), task_id)
        (before,) = client.lrange(pool.keys.queue_list("gpu-tasks", 6), 0, -1)
        assert move(pool, AWAY) == 1

        job = seeds.job(redis_url, pool, task_id)
        assert (job.state, job.attempt, job.tier, job.wanted, job.reason) == (State.ADMITTED, 1, "cpu", "gpu", Reason.REBALANCED)
        (after,) = client.lrange(pool.keys.queue_list("celery", 6), 0, -1)
        assert job.message == after
        old, new = json.loads(before), json.loads(after)
        assert (new["body"], new["headers"]) == (old["body"], old["headers"])
        assert new["headers"]["expires"] is not None
        assert new["properties"]["priority"] == old["properties"]["priority"] == 6
        assert new["properties"]["delivery_tag"] != old["properties"]["delivery_tag"]

        reading = read(redis_url, pool)
        assert (reading.tiers["gpu"].waiting, reading.tiers["gpu"].spilled, reading.tiers["cpu"].waiting) == (0, 1, 1)
        assert reading.routes["cpu:Rebalanced"] == 1
        assert client.zscore(pool.keys.waiting("gpu"), task_id) is None
        assert client.zscore(pool.keys.waiting("cpu"), task_id) == client.zscore(pool.keys.spilled("gpu"), task_id) == since

        assert move(pool, HOME) == 1
        assert seeds.job(redis_url, pool, task_id).tier == "gpu"
        reading = read(redis_url, pool)
        assert (reading.tiers["gpu"].waiting, reading.tiers["gpu"].spilled, reading.tiers["cpu"].waiting) == (1, 0, 0)
        assert client.zscore(pool.keys.waiting("gpu"), task_id) == since
        with consumer(pool, "gpu") as connection:
            assert claim(redis_url, pool, connection, "gpu", "w.1").task_id == task_id


def test_the_oldest_go_first_and_take_the_place_of_their_age_among_foreign_messages(redis_url: str, pool: Pool) -> None:
    publish(pool, "celery", 0)
    with seeds.celery_app(pool) as app, Redis.from_url(redis_url, decode_responses=True) as client:
        library, ids = WorkerPool(pool.id, app), []
        for n in range(8):
            decision = library.submit(app.tasks["tasks.work"], accelerated=n % 2 == 0)
            ids.append(decision.task_id)
        for n, task_id in enumerate(ids):
            client.zadd(pool.keys.waiting("cpu" if n % 2 else "gpu"), {task_id: n}, xx=True)
        publish(pool, "celery", 0)
        assert move(pool, Transfer("gpu", "cpu", 3, "")) == 3
        first, *mine, last = line(client, pool.keys.queue_list("celery", 0))
        assert mine == [ids[n] for n in (0, 1, 2, 3, 4, 5, 7)]
        assert {first, last}.isdisjoint(ids)
        assert line(client, pool.keys.queue_list("gpu-tasks", 0)) == [ids[6]]


def test_what_moves_overtakes_no_job_that_was_started_before_and_is_to_run_again(redis_url: str, pool: Pool) -> None:
    with consumer(pool, "gpu") as connection, Redis.from_url(redis_url, decode_responses=True) as client:
        failing = submit(pool)
        held = claim(redis_url, pool, connection, "gpu", "w.1")
        waiting = [submit(pool) for _ in range(2)]
        fall_back(redis_url, pool, held)
        assert move(pool, Transfer("gpu", "cpu", 1, "")) == 1
        with seeds.celery_app(pool) as app:
            there = WorkerPool(pool.id, app).submit(app.tasks["tasks.work"]).task_id
        assert move(pool, AWAY) == 1
        assert line(client, pool.keys.queue_list("celery", 0)) == [failing, *waiting, there]


@pytest.mark.parametrize(("limit", "to"), [("PLACES", 2), ("PLACES_BYTES", 1_500)])
def test_the_place_is_looked_for_near_the_head_alone(
    redis_url: str, pool: Pool, monkeypatch: pytest.MonkeyPatch, limit: str, to: int
) -> None:
    """A message is some 900 bytes long, so that 1,500 are two."""
    monkeypatch.setattr(ledger, limit, to)
    publish(pool, "celery", 0, 0, 0)
    task_id = submit(pool)
    with Redis.from_url(redis_url, decode_responses=True) as client:
        assert move(pool, AWAY) == 1
        assert line(client, pool.keys.queue_list("celery", 0)).index(task_id) == 2


def test_what_is_bound_to_its_tier_stays(redis_url: str, pool: Pool) -> None:
    publish(pool, "gpu-tasks", 0)
    with seeds.celery_app(pool) as app, consumer(pool, "gpu") as connection, Redis.from_url(redis_url) as client:
        task, library = app.tasks["tasks.work"], WorkerPool(pool.id, app)
        take(connection, "gpu-tasks")
        publish(pool, "gpu-tasks", 0)
        submit(pool)
        claim_of_a_foreign = take(connection, "gpu-tasks")
        held = claim(redis_url, pool, connection, "gpu", "w.1")
        taken = submit(pool)
        assert take(connection, "gpu-tasks").headers["id"] == taken, "taken, and not claimed yet"
        required = library.submit(task, accelerated="required").task_id
        plain = library.submit(task).task_id
        assert required
        assert plain
        client.rpush(pool.keys.queue_list("gpu-tasks", 0), "no message")
        client.lpush(pool.keys.queue_list("gpu-tasks", 0), json.dumps({"headers": {"id": "x", "workerpool": {"attempt": 1}}}))

        assert (move(pool, AWAY), move(pool, HOME)) == (0, 0)
        assert claim_of_a_foreign.headers["id"] not in (held.task_id, taken)
        tiers = {task_id: seeds.job(redis_url, pool, task_id).tier for task_id in (held.task_id, taken, required, plain)}
        assert list(tiers.values()) == ["gpu", "gpu", "gpu", "cpu"]


def test_a_job_that_has_run_before_is_not_moved_again(redis_url: str, pool: Pool) -> None:
    submit(pool)
    with consumer(pool, "gpu") as connection:
        held = claim(redis_url, pool, connection, "gpu", "w.1")
        seeds.report(redis_url, pool, "gpu", "w.1", age_ms=60_000)
        ask(lambda broker: broker.take_over(redis_url, pool, "gpu", "w.1"))
    assert (seeds.job(redis_url, pool, held.task_id).tier, move(pool, HOME)) == ("cpu", 0)


def test_two_operators_at_once_move_each_job_once(redis_url: str, pool: Pool) -> None:
    ids = {submit(pool) for _ in range(6)}
    policy = planning.policy(pool.spec)

    async def twice(broker: Any) -> list[int]:
        return list(await asyncio.gather(*(broker.rebalance(redis_url, pool, policy, AWAY) for _ in range(2))))

    assert sum(ask(twice)) == 6
    with Redis.from_url(redis_url, decode_responses=True) as client:
        moved = line(client, pool.keys.queue_list("celery", 0))
        assert (len(moved), set(moved)) == (6, ids)
        assert client.llen(pool.keys.queue_list("gpu-tasks", 0)) == 0


@pytest.mark.parametrize("changed", [{"state": "claimed"}, {"attempt": 2}, {"tier": "cpu"}, {"runs": 1}], ids=str)
def test_a_job_that_has_changed_since_it_was_read_stays(redis_url: str, pool: Pool, changed: dict[str, Any]) -> None:
    task_id = submit(pool)
    gpu, cpu = planning.policy(pool.spec).tiers
    with Redis.from_url(redis_url, decode_responses=True) as client:
        source, target = (pool.keys.queue_list(queue, 0) for queue in ("gpu-tasks", "celery"))
        call = ledger.rebalance(
            pool.keys, seeds.job(redis_url, pool, task_id), gpu, cpu, raw=client.lindex(source, 0), delivery_tag="fresh"
        )
        client.hset(pool.keys.job(task_id), mapping=changed)
        assert client.register_script(ledger.script("rebalance"))(keys=call.keys, args=call.args) == 0
        assert (client.llen(source), client.llen(target)) == (1, 0)


def test_a_copy_that_comes_up_where_the_job_has_left_is_dropped(redis_url: str, pool: Pool) -> None:
    """As when a worker was slow between taking a message and recording it, and a sweep published it anew."""
    task_id = submit(pool)
    with consumer(pool, "gpu") as connection, Redis.from_url(redis_url, decode_responses=True) as client:
        queue = pool.keys.queue_list("gpu-tasks", 0)
        client.rpush(queue, client.lindex(queue, 0))
        copy = take(connection, "gpu-tasks")
        assert move(pool, AWAY) == 1
        call = ledger.claim(
            pool.keys, task_id, attempt=1, tag=copy.delivery_tag, owner="w.1", tier="gpu", retries=0, moves_on=True,
            no_result=False, name="n",
        )  # fmt: skip
        assert client.register_script(ledger.script("claim"))(keys=call.keys, args=call.args) == ledger.Claim.STALE
        raw = client.hget(pool.keys.unacked("gpu"), copy.delivery_tag)
        back = ledger.requeue(pool.keys, "gpu", tag=copy.delivery_tag, raw=raw, delivery_tag="fresh")
        before = seeds.job(redis_url, pool, task_id)
        assert client.register_script(ledger.script("requeue"))(keys=back.keys, args=back.args) == 1
        assert seeds.job(redis_url, pool, task_id) == before, "the copy says nothing about the message that counts"
        lost = ledger.republish(pool.keys, before, planning.policy(pool.spec).tiers[0], delivery_tag="fresh")
        client.hset(pool.keys.job(task_id), "missing_at", 1)
        assert client.register_script(ledger.script("republish"))(keys=lost.keys, args=lost.args) == 0
        with consumer(pool, "cpu") as plain:
            assert claim(redis_url, pool, plain, "cpu", "w.2").task_id == task_id


def test_a_copy_is_dropped_too_in_a_tier_that_the_job_left_earlier_and_after_its_start_elsewhere(redis_url: str) -> None:
    tiers = [{"name": name, "queue": queue, "template": seeds.TEMPLATE} for name, queue in (
        ("gpu", "gpu-tasks"), ("cpu", "celery"), ("cpu-spot", "spot-tasks"),
    )]  # fmt: skip
    tiers[0]["accelerator"] = {"resource": "nvidia.com/gpu"}
    pool = make_pool(redis_url, tiers=tiers)
    open_for_jobs(redis_url, pool, ROOM)
    task_id = submit(pool)
    with ExitStack() as stack, Redis.from_url(redis_url, decode_responses=True) as client:
        copies = {}
        for source, target in (("gpu", "cpu"), ("cpu", "gpu"), ("gpu", "cpu-spot")):
            queue = pool.keys.queue_list(next(t.queue for t in pool.spec.tiers if t.name == source), 0)
            copies[source] = client.lindex(queue, 0)
            assert move(pool, Transfer(source, target, 1, "")) == 1
        client.rpush("gpu-tasks", copies["gpu"])
        client.rpush("celery", copies["cpu"])

        def claimed_as_a_copy(tier: str, queue: str, name: str) -> str:
            copy = take(stack.enter_context(consumer(pool, tier)), queue)
            call = ledger.claim(
                pool.keys, task_id, attempt=1, tag=copy.delivery_tag, owner="w.1", tier=tier, retries=0, moves_on=True,
                no_result=False, name=name,
            )  # fmt: skip
            return str(client.register_script(ledger.script("claim"))(keys=call.keys, args=call.args))

        assert claimed_as_a_copy("cpu", "celery", "a") == ledger.Claim.STALE
        held = claim(redis_url, pool, stack.enter_context(consumer(pool, "cpu-spot")), "cpu-spot", "w.2")
        client.hdel(pool.keys.unacked("cpu-spot"), held.message.delivery_tag)
        assert claimed_as_a_copy("gpu", "gpu-tasks", "b") == ledger.Claim.STALE, "its worker is lost, and its message with it"
    assert seeds.job(redis_url, pool, task_id).starts == {"cpu-spot": 1}


def test_without_redis_nothing_moves_and_nothing_is_raised(pool: Pool) -> None:
    gone = make_pool("redis://127.0.0.1:1/0")
    assert move(gone, AWAY) == 0


class Nodes(Place):
    """Where accelerated workers cannot be placed while ``down``."""

    down = False

    async def observe(self, pool: Pool) -> Mapping[str, TierReplicas]:
        ordered = dict(await super().observe(pool))
        if self.down:
            wanted = max(1, ordered["gpu"].desired)
            stuck = tuple(Replica(f"gpu-{n}", Phase.UNSCHEDULABLE, 0.0) for n in range(wanted))
            ordered["gpu"] = TierReplicas(wanted, stuck)
        return ordered


@pytest.mark.parametrize(
    ("spec", "tier"),
    [({}, "cpu"), ({"routing": {"rebalance": False}}, "gpu"), ({"mode": Mode.ADVISORY}, "gpu"), ({"mode": Mode.PAUSED}, "gpu")],
    ids=["by default", "turned off", "advisory", "paused"],
)
def test_the_pass_moves_what_waits_for_workers_that_cannot_be_placed(redis_url: str, spec: dict[str, Any], tier: str) -> None:
    pool = make_pool(redis_url, **spec)
    open_for_jobs(redis_url, pool, ROOM)
    task_id = submit(pool)

    async def scenario() -> None:
        async with running(pool) as system:
            system.place = system.reconciler._workers = nodes = Nodes()
            nodes.down = True
            await system.after()
            told = next(c for c in system.reports[-1].status.conditions if c.type is ConditionType.REBALANCING)
            moved = "1 of the waiting jobs moved from gpu to cpu: gpu: no accelerated slot is free and none can be started "
            assert (told.status, told.message.startswith(moved)) == (("True", True) if tier == "cpu" else ("False", False))

    asyncio.run(scenario())
    assert seeds.job(redis_url, pool, task_id).tier == tier


def test_an_outage_of_the_accelerated_tier_sends_waiting_jobs_away_and_home_again_each_once(
    url: str, jobs: ModuleType, tmp_path: Path
) -> None:
    pool = operator_pool(url)
    client = jobs.app.backend.client

    def jobs_on(tier: str) -> list[str]:
        return [task_id for task_id in ids if jobs.pool.job(task_id).tier == tier]

    async def passes(condition: Any, what: str, *, down: bool) -> int:
        """How many it took."""
        async with running(pool) as system:
            system.place = system.reconciler._workers = nodes = Nodes()
            nodes.down = down
            for n in range(1, 1_200):
                await system.after(0.05)
                if await asyncio.to_thread(condition):
                    return n
                await asyncio.sleep(0.05)
            pytest.fail(f"never: {what}")

    with worker(url, "cpu", "cpu-jobs", "cpu-a", tmp_path):
        with worker(url, "gpu", "gpu-jobs", "gpu-a", tmp_path) as gpu:
            until(jobs.pool.has_accelerated_workers, "a GPU slot is free")
            open_for_jobs(url, pool, ROOM)
            ids = [jobs.pool.submit(jobs.work, ({"gpu": "gate", "cpu": "gate"},), accelerated=True).task_id for _ in range(6)]
            until(lambda: [jobs.pool.job(i).state for i in ids].count(State.CLAIMED) == 1, "one runs on the GPU, five wait")
            assert len(jobs_on("gpu")) == 6
            os.killpg(gpu.pid, signal.SIGKILL)
        asyncio.run(passes(lambda: len(jobs_on("cpu")) == 6, "all six are on the CPU tier", down=True))
        until(lambda: [jobs.pool.job(i).state for i in ids].count(State.CLAIMED) == 1, "one runs on the CPU, five wait")
        assert {jobs.pool.job(i).wanted for i in ids} == {"gpu"}
        with worker(url, "gpu", "gpu-jobs", "gpu-b", tmp_path):
            until(jobs.pool.has_accelerated_workers, "it has reported")
            took = asyncio.run(passes(lambda: len(jobs_on("gpu")) >= 2, "what waits comes home", down=False))
            assert took * TICK_SECONDS <= 3.0, "5 s from Ready to the first job, of which a report and its taking may have two"
            client.set("gate", "open")
            ended = [outcome(jobs, task_id) for task_id in ids]
    assert [state for state, _ in ended] == [State.DONE] * 6
    starts = [sum(starts.values()) for _, starts in ended]
    assert sorted(starts) == [1, 1, 1, 1, 1, 2], "the one that was running when its worker died runs once more"
    assert {tier for _, starts in ended for tier in starts} == {"gpu", "cpu"}
    assert sum("gpu" in starts for _, starts in ended) >= 3
