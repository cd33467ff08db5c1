"""What a Redis and a machine look like in the middle of things: pools, queued messages, jobs that a worker holds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from celery import Celery
from redis import Redis

from workerpool_operator.model import WorkerPoolSpec
from workerpool_operator.ports import Pool
from workerpool_routing import ledger
from workerpool_routing.wire import unacked_keys

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


def processes(*marks: str) -> Mapping[int, str]:
    """Every live process whose environment or command line holds one of the marks."""
    found = {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            environment, command = (directory / "environ").read_bytes(), (directory / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if command and any(mark.encode() in environment + command for mark in marks):
            found[int(directory.name)] = command.decode().replace("\0", " ")
    return found
