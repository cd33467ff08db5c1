"""The broker port on Redis: one pipeline a pass for all pools of a server, and a subscription to the wake channel."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from uuid import uuid4

import redis
import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from workerpool_operator import planning
from workerpool_operator.observation import BrokerReading, QueueReading, Served, Unavailable
from workerpool_operator.ports import Pool
from workerpool_routing import ledger
from workerpool_routing.ledger import Job, State
from workerpool_routing.wire import CAPACITY_LIFE_MS, Capacity, Milliseconds, Policy, Presence, VersionMismatch, wake_channel

logger = logging.getLogger("workerpool_operator.broker")

TIMEOUT_SECONDS = 2.0
"""How long a pass waits for Redis."""

RESUBSCRIBE_SECONDS = 1.0


class RedisBroker:
    """All the Redis servers that pools name; connections are made when first needed.

    Args:
        wake: set when admission names a pool that has work.
    """

    def __init__(self, wake: asyncio.Event) -> None:
        self._wake = wake
        self._clients: dict[str, Any] = {}
        self._listeners: dict[tuple[str, str], asyncio.Task[None]] = {}

    async def read(self, url: str, pools: Sequence[Pool]) -> Mapping[str, BrokerReading] | Unavailable:
        """Read all pools of one server in one pipeline."""
        try:
            client = self._client(url)
            for prefix in {pool.keys.prefix for pool in pools}:
                self._listen(url, prefix)
            async with client.pipeline(transaction=False) as pipe:
                pipe.time()
                pipe.info("server")
                for pool in pools:
                    _ask(pipe, pool)
                (seconds, micros), server, *answers = await pipe.execute()
            now = Milliseconds(seconds * 1000 + micros // 1000)
            rest = iter(answers)
            return {pool.id: _reading(pool, rest, server["run_id"], now) for pool in pools}
        except (redis.RedisError, OSError, VersionMismatch, ValueError) as error:
            return Unavailable(_why(url, error))

    async def publish(self, url: str, pool: Pool, policy: Policy, capacity: Capacity) -> None:
        """Tell API pods and workers what they may count on; an outage here shows in the next reading."""
        with _logged(pool):
            async with self._client(url).pipeline(transaction=True) as pipe:
                pipe.set(pool.keys.policy, policy.dump())
                pipe.set(pool.keys.capacity, capacity.dump(), px=CAPACITY_LIFE_MS)
                await pipe.execute()

    async def take_over(self, url: str, pool: Pool, tier: str, owner: str) -> list[str]:
        """Give every job that a lost worker held to whoever the ledger says; return a sentence for each."""
        sentences = []
        with _logged(pool):
            client = self._client(url)
            for task_id in sorted(await client.smembers(pool.keys.held(owner))):
                job = Job.load(task_id, await client.hgetall(pool.keys.job(task_id)))
                if job and job.owner == owner and job.state in (State.CLAIMED, State.FINISHING):
                    sentences += await self._move(client, pool, job)
            await self._run(client, "leave", ledger.leave(pool.keys, tier, owner))
            sentences.append(f"{tier}: worker {owner} is lost, it has not reported for too long")
        return sentences

    async def forget(self, url: str, pool: Pool) -> None:
        """Remove what was published for a pool that is gone."""
        with _logged(pool):
            await self._client(url).delete(pool.keys.policy, pool.keys.capacity)

    async def close(self) -> None:
        """End subscriptions and connections."""
        for listener in self._listeners.values():
            listener.cancel()
        await asyncio.gather(*self._listeners.values(), return_exceptions=True)
        for client in self._clients.values():
            await client.aclose()

    async def _move(self, client: Any, pool: Pool, job: Job) -> list[str]:
        to = ledger.after_loss(planning.policy(pool.spec), job)
        raw = await client.hget(pool.keys.unacked(job.tier), job.tag)
        if to is None or raw is None:
            return []
        call = ledger.move(pool.keys, job, to, held_as=job.tag, raw=raw, delivery_tag=str(uuid4()))
        if not await self._run(client, "move", call):
            return []
        return [f"job {job.task_id} of lost worker {job.owner} goes from {job.tier} to {to.tier.name}, attempt {to.attempt}"]

    async def _run(self, client: Any, name: str, call: ledger.Call) -> Any:
        return await client.register_script(ledger.script(name))(keys=call.keys, args=call.args)

    def _client(self, url: str) -> Any:
        if url not in self._clients:
            self._clients[url] = redis.asyncio.Redis.from_url(
                url,
                decode_responses=True,
                socket_timeout=TIMEOUT_SECONDS,
                socket_connect_timeout=TIMEOUT_SECONDS,
                retry=Retry(NoBackoff(), 1),
            )
        return self._clients[url]

    def _listen(self, url: str, prefix: str) -> None:
        if (url, prefix) not in self._listeners:
            self._listeners[url, prefix] = asyncio.create_task(self._follow(url, prefix))

    async def _follow(self, url: str, prefix: str) -> None:
        """Pass wake messages on; losing one costs a tick, so an outage needs no more than another try."""
        while True:
            with contextlib.suppress(redis.RedisError, OSError):
                async with self._client(url).pubsub(ignore_subscribe_messages=True) as subscription:
                    await subscription.subscribe(wake_channel(prefix))
                    while True:
                        if await subscription.get_message(timeout=TIMEOUT_SECONDS / 2):
                            self._wake.set()
            await asyncio.sleep(RESUBSCRIBE_SECONDS)


def _ask(pipe: Any, pool: Pool) -> None:
    """Queue the commands whose answers :func:`_reading` takes in the same order."""
    keys = pool.keys
    pipe.hgetall(keys.routes)
    for tier in pool.spec.tiers:
        for name in keys.queue_lists(tier.queue):
            pipe.llen(name)
        pipe.hlen(keys.unacked(tier.name))
        pipe.zcard(keys.spilled(tier.name))
        pipe.hgetall(keys.presence(tier.name))
        pipe.hgetall(keys.served(tier.name))


_SERVED: Sequence[tuple[Callable[[Any], Any], str]] = ((int, "jobs"), (float, "seconds"), (float, "squares"))


def _reading(pool: Pool, answers: Iterator[Any], run_id: str, now: Milliseconds) -> BrokerReading:
    routes = {route: int(count) for route, count in next(answers).items()}
    tiers = {}
    for tier in pool.spec.tiers:
        waiting = sum(next(answers) for _ in pool.keys.priority_steps)
        in_flight, spilled, presence, served = (next(answers) for _ in range(4))
        reports = [Presence.load(raw) for raw in presence.values()]
        tiers[tier.name] = QueueReading(
            waiting,
            in_flight,
            spilled,
            workers=tuple(report for report in reports if report.alive(now)),
            lost=tuple(report.owner for report in reports if not report.alive(now)),
            served=Served(*(kind(served.get(name, 0)) for kind, name in _SERVED)),
        )
    return BrokerReading(tiers, run_id, now, routes)


@contextlib.contextmanager
def _logged(pool: Pool) -> Iterator[None]:
    try:
        yield
    except (redis.RedisError, OSError) as error:
        logger.warning("%s: %s", pool.id, error)


def _why(url: str, error: Exception) -> str:
    """What is wrong with the broker, in words, without the password that its URL may hold."""
    place = url.rpartition("@")[2].partition("://")[2] or url.rpartition("@")[2]
    if isinstance(error, redis.AuthenticationError):
        return f"Redis at {place} refuses the user or the password: {error}"
    if isinstance(error, redis.TimeoutError):
        return f"Redis at {place} does not answer within {TIMEOUT_SECONDS:.0f} s"
    if isinstance(error, redis.ConnectionError | OSError):
        return f"Redis at {place} cannot be reached: {error}"
    return f"Redis at {place}: {error}"
