"""What a Redis looks like in the middle of things: pools, queued messages, jobs that a worker holds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from celery import Celery
from redis import Redis

from workerpool_operator import planning
from workerpool_operator.model import WorkerPoolSpec
from workerpool_operator.ports import Pool
from workerpool_routing import Tier, ledger
from workerpool_routing.decide import Load
from workerpool_routing.ledger import State
from workerpool_routing.wire import Keyspace, unacked_keys

TEMPLATE = {"spec": {"containers": [{"name": "worker"}]}}


def make_pool(url: str, name: str = "media", *, created_at: float = 0.0, **spec: Any) -> Pool:
    """A pool with an accelerated tier ``gpu`` on ``gpu-tasks`` and a plain tier ``cpu`` on ``celery``, up to 4 workers each."""
    tiers: list[dict[str, Any]] = [
        {"name": "gpu", "queue": "gpu-tasks", "accelerator": {"resource": "nvidia.com/gpu"}},
        {"name": "cpu", "queue": "celery"},
    ]
    common: dict[str, Any] = {"replicas": {"min": 0, "max": 4}, "template": TEMPLATE}
    defaults = {"app": "tasks", "broker": {"url": url}, "tiers": [{**common, **tier} for tier in tiers]}
    return Pool("test", name, f"uid-{name}", 1, created_at, WorkerPoolSpec.model_validate({**defaults, **spec}))


def transport_options(pool: Pool) -> dict[str, Any]:
    """What the users of such a pool tell Celery."""
    broker = pool.spec.broker
    return {"global_keyprefix": broker.global_key_prefix, "priority_steps": list(broker.priority_steps)}


def celery_app(pool: Pool) -> Celery:
    """An app on the pool's broker with one task, ``work``."""
    app = Celery("tasks", broker=pool.spec.broker.url)
    app.conf.broker_transport_options = transport_options(pool)
    app.task(_work, name="tasks.work")
    return app


def _work() -> None:
    """Nobody runs it here."""


def publish(pool: Pool, queue: str, *priorities: int) -> None:
    """Put a message of each priority into a queue, as any Celery client does."""
    with celery_app(pool) as app:
        for priority in priorities:
            app.send_task("tasks.work", queue=queue, priority=priority)


@contextmanager
def consumer(pool: Pool, tier: str) -> Iterator[Any]:
    """A connection like that of a worker of the tier; when it ends, it gives back nothing, as a killed worker does not."""
    with celery_app(pool).connection_for_read(transport_options=unacked_keys(pool.id, tier)) as connection:
        yield connection
        connection.default_channel.qos.restore_at_shutdown = False


def take(connection: Any, queue: str) -> Any:
    """The next message of a queue, unacknowledged; None when it is empty."""
    return connection.default_channel.basic_get(queue)


def report(url: str, pool: Pool, tier: str, owner: str, *, busy: int = 0, slots: int = 1, age_ms: int = 0) -> None:
    """A worker's presence as the worker itself writes it, that long ago."""
    entry: dict[str, str | int | bool] = {
        "owner": owner, "worker": owner.partition(".")[0], "tier": tier, "queue": "q", "slots": slots,
        "busy": busy,
    }  # fmt: skip
    call, presence = ledger.report(pool.keys, entry, ()), pool.keys.presence(tier)
    with Redis.from_url(url, decode_responses=True) as client:
        client.register_script(ledger.script("presence"))(keys=call.keys, args=call.args)
        if age_ms:
            stored = json.loads(client.hget(presence, owner))
            client.hset(presence, owner, json.dumps({**stored, "at": stored["at"] - age_ms}))


@dataclass(frozen=True, slots=True)
class Held:
    """A job that a worker has taken and claimed."""

    task_id: str
    message: Any


def claim(url: str, pool: Pool, connection: Any, tier: str, owner: str, *, scheduled: bool = False) -> Held:
    """Take the next job of a tier and claim it, as the worker ``owner`` does."""
    queue = next(t.queue for t in pool.spec.tiers if t.name == tier)
    message = take(connection, queue)
    assert message is not None
    task_id, tag = message.headers["id"], message.delivery_tag
    call = ledger.claim(
        pool.keys, task_id, attempt=message.headers["workerpool"]["attempt"], tag=tag, owner=owner, tier=tier, retries=0,
        moves_on=True, no_result=False, name=owner, scheduled=scheduled,
    )  # fmt: skip
    with Redis.from_url(url, decode_responses=True) as client:
        assert client.register_script(ledger.script("claim"))(keys=call.keys, args=call.args) == ledger.Claim.RUN
    return Held(task_id, message)


def job(url: str, pool: Pool, task_id: str) -> ledger.Job:
    """Its ledger entry."""
    with Redis.from_url(url, decode_responses=True) as client:
        found = ledger.Job.load(task_id, client.hgetall(pool.keys.job(task_id)))
    assert found is not None
    return found


def settle(pool: Pool, held: Held, tier: str, attempt: int, after: State, how: str = "", owner: str = "w.1") -> None:
    """End the run of a job that the worker has claimed."""
    call = ledger.settle(
        pool.keys, planning.policy(pool.spec), held.task_id, attempt=attempt, tag=held.message.delivery_tag, owner=owner,
        tier=tier, before=State.CLAIMED, after=after, how=how,
    )  # fmt: skip
    with Redis.from_url(str(pool.spec.broker.url)) as client:
        for _ in range(2):  # as when the first answer was lost
            assert client.register_script(ledger.script("settle"))(keys=call.keys, args=call.args) == 1


def fall_back(url: str, pool: Pool, held: Held) -> None:
    """Let a job that ``w.1`` has claimed go on to the plain tier; whoever comes second finds it gone."""
    entry = job(url, pool, held.task_id)
    move = ledger.after_failure(planning.policy(pool.spec), entry)
    assert move
    with Redis.from_url(url, decode_responses=True) as client:
        raw = client.hget(pool.keys.unacked("gpu"), held.message.delivery_tag)
        call = ledger.move(pool.keys, entry, move, held_as=entry.tag, raw=raw, delivery_tag="fresh", how="failed")
        run = client.register_script(ledger.script("move"))
        assert [run(keys=call.keys, args=call.args) for _ in range(2)] == [1, 0]


def line(client: Any, name: str) -> list[str]:
    """The task ids of a list, in the order in which workers take them."""
    return [json.loads(text)["headers"]["id"] for text in reversed(client.lrange(name, 0, -1))]


def load(client: Any, keys: Keyspace, tier: Tier, seen: Load, task: str) -> None:
    """Make Redis hold what a tier would look like under that load."""
    for n in range(seen.waiting):
        client.lpush(keys.queue_list(tier.queue, (0, 3, 6, 9)[n % 4]), "{}")
    for n in range(seen.in_flight):
        client.hset(keys.unacked(tier.name), f"tag-{n}", "[]")
    for n in range(seen.in_flight % 3):
        client.hset(keys.unacked(tier.name), f"scheduled-{n}", "[]")
        client.incr(keys.scheduled(tier.name))
    now = now_of(client)
    slots = {f"worker/{n}": now for n in range(seen.ready)} | {"lost/0": now - 9_000}
    leases = {f"lease-{n}": now + 9_000 for n in range(seen.leased)} | {"over": now - 1}
    client.zadd(keys.slots(tier.name), slots)
    client.zadd(keys.leases(tier.name), leases)
    if seen.mean is not None:
        client.hset(keys.served(tier.name), "mean", seen.mean)
    if seen.service is not None:
        client.hset(keys.service(tier.name), task, seen.service)


def now_of(client: Any) -> int:
    """Milliseconds, by the clock of Redis."""
    seconds, micros = client.time()
    return int(seconds * 1000 + micros // 1000)
