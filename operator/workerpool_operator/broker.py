"""The broker port on Redis: one pipeline a pass for all pools of a server, and a subscription to the wake channel."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from itertools import chain
from typing import Any
from urllib.parse import urlsplit

import redis
import redis.asyncio
from kombu.utils.url import url_to_parts
from redis.asyncio import BlockingConnectionPool
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff

from workerpool_operator import dry_run, moving, salvage
from workerpool_operator.dry_run import DryRun
from workerpool_operator.observation import (
    NO_ATTEMPTS,
    NOTHING_KEPT,
    Attempts,
    Breaker,
    BreakerState,
    BrokerReading,
    Checkpoint,
    QueueReading,
    Served,
    Unavailable,
    Waits,
)
from workerpool_operator.ports import NO_MARKS, NO_NEWS, Marks, Pool
from workerpool_operator.rebalancing import Transfer
from workerpool_routing.ledger import CorruptEntry, Job
from workerpool_routing.wire import (
    CAPACITY_LIFE_MS,
    JOB_LIFE_SECONDS,
    MARK_LIFE_MS,
    Capacity,
    Milliseconds,
    Policy,
    Presence,
    VersionMismatch,
    wake_channel,
)

logger = logging.getLogger("workerpool_operator.broker")

TIMEOUT_SECONDS = 2.0
"""How long a pass waits for Redis."""

CONNECTIONS = 20
"""To one server at most, whatever the number of pools on it: who finds all of them in use waits for one."""

TURN_SECONDS = 5 * TIMEOUT_SECONDS
"""How long at most: that so many others are served first says nothing against the server."""

RESUBSCRIBE_SECONDS = 1.0

SUBSCRIPTION_SECONDS = 30.0
"""A subscription to a server that froze, and that another has replaced, hears nothing for ever: so long one is kept at most."""

_TIMEOUTS = {"socket_timeout": TIMEOUT_SECONDS, "socket_connect_timeout": TIMEOUT_SECONDS}
_SENTINEL_PORT = 26379


class RedisBroker:
    """All the Redis servers that pools name; connections are made when first needed.

    Args:
        wake: set when admission names a pool that has work.
        fence: called before anything is said to Redis; does not return where this process may not act any more.
    """

    def __init__(self, wake: asyncio.Event, fence: Callable[[], None] = lambda: None) -> None:
        self._wake, self._fence = wake, fence
        self._clients: dict[str, Any] = {}
        self._told: set[tuple[str, str]] = set()
        self._listeners: dict[tuple[str, str], asyncio.Task[None]] = {}

    async def read(self, url: str, pools: Sequence[Pool]) -> Mapping[str, BrokerReading | Unavailable] | Unavailable:
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
                asked = [" ".join(map(str, command)) for command, _ in pipe.command_stack]
                clock, server, *answers = await pipe.execute(raise_on_error=False)
            for answer in (clock, server):
                if isinstance(answer, redis.RedisError):
                    return Unavailable(_why(url, answer))
            if "run_id" not in server:
                return Unavailable(f"{_place(url)}: INFO names no run_id, and without it a restart would not be seen")
            seconds, micros = clock
            now = Milliseconds(seconds * 1000 + micros // 1000)
            database = int(client.connection_pool.connection_kwargs.get("db") or 0)
            rest = (
                Unavailable(f"{command}: {_said(answer)}") if isinstance(answer, redis.RedisError) else answer
                for command, answer in zip(asked[2:], answers, strict=True)
            )
            return {pool.id: _reading(pool, rest, server["run_id"], database, now) for pool in pools}
        except (redis.RedisError, OSError) as error:
            return Unavailable(_why(url, error))

    async def publish(
        self,
        url: str,
        pool: Pool,
        policy: Policy,
        capacity: Capacity | None,
        marks: Marks = NO_MARKS,
        checkpoints: Mapping[str, Checkpoint] = NO_NEWS,
    ) -> Unavailable | None:
        """Tell API pods and workers what they may count on, and keep what the next pass, or the next operator, has to know."""
        try:
            async with self._client(url).pipeline(transaction=False) as pipe:
                pipe.set(pool.keys.policy, policy.dump())
                if capacity:
                    pipe.set(pool.keys.capacity, capacity.dump(), px=CAPACITY_LIFE_MS)
                if marks.add:
                    pipe.sadd(pool.keys.drain, *marks.add)
                if marks.remove:
                    pipe.srem(pool.keys.drain, *marks.remove)
                pipe.pexpire(pool.keys.drain, MARK_LIFE_MS)
                for name, kept in checkpoints.items():
                    pipe.hset(pool.keys.checkpoint(name), mapping=_stored(kept))
                for tier in pool.tiers:
                    pipe.expire(pool.keys.checkpoint(tier.name), JOB_LIFE_SECONDS)
                answers = await pipe.execute(raise_on_error=False)
        except (redis.RedisError, OSError) as error:
            return Unavailable(_why(url, error))
        refusal = next((answer for answer in answers if isinstance(answer, redis.RedisError)), None)
        return Unavailable(f"{_place(url)} refuses writes: {_said(refusal)}") if refusal else None

    async def take_over(self, url: str, pool: Pool, tier: str, owner: str) -> list[str]:
        """Give every job that a lost worker held to whoever the ledger says; return a sentence for each."""
        sentences: list[str] = []
        with _logged(pool):
            sentences += await salvage.take_over(self._client(url), pool, tier, owner, partial(self._say_once, pool))
        return sentences

    async def sweep(self, url: str, pool: Pool) -> list[str]:
        """Find jobs that no worker holds any more and that no lost worker accounts for; return a sentence for each."""
        sentences: list[str] = []
        with _logged(pool):
            sentences += await salvage.sweep(self._client(url), pool)
        return sentences

    async def rebalance(self, url: str, pool: Pool, policy: Policy, transfer: Transfer) -> int:
        """Move waiting jobs from one tier's queue to another's; return how many moved."""
        moved = 0
        with _logged(pool):
            moved += await moving.move(self._client(url), pool.keys, policy, transfer)
        return moved

    async def job(self, url: str, pool: Pool, task_id: str) -> Job | Unavailable | None:
        """The ledger's entry of a job, None when it has none (any more)."""
        try:
            return Job.load(task_id, await self._client(url).hgetall(pool.keys.job(task_id)))
        except (CorruptEntry, VersionMismatch) as error:
            return Unavailable(str(error))
        except (redis.RedisError, OSError) as error:
            return Unavailable(_why(url, error))

    async def dry_run(self, url: str, pool: Pool) -> DryRun | Unavailable:
        """What admission would answer now; changes nothing."""
        try:
            return await dry_run.ask(self._client(url), pool.keys)
        except ValueError as error:
            return Unavailable(f"what Redis holds of the pool cannot be read: {error}")
        except (redis.RedisError, OSError) as error:
            return Unavailable(_why(url, error))

    async def ended_jobs(self, url: str, pool: Pool) -> list[Job] | Unavailable:
        """The jobs that the ledger still has of those that ended, in no order; entries that cannot be read are left out.

        For a command: it walks all keys of the database.
        """
        jobs, client = [], self._client(url)
        try:
            pattern = re.sub(r"([\\*?\[\]])", r"\\\1", pool.keys.job("")) + "*"
            async for key in client.scan_iter(pattern, count=1_000):
                with contextlib.suppress(CorruptEntry, VersionMismatch):
                    job = Job.load(key.removeprefix(pool.keys.job("")), await client.hgetall(key))
                    if job and job.state.ended:
                        jobs.append(job)
        except (redis.RedisError, OSError) as error:
            return Unavailable(_why(url, error))
        return jobs

    async def keep_only(self, pools: Sequence[tuple[str, Pool]]) -> None:
        """End the subscriptions and connections that none of these needs."""
        for unheard in self._listeners.keys() - {(url, pool.keys.prefix) for url, pool in pools}:
            self._listeners.pop(unheard).cancel()
        unused = [self._clients.pop(url) for url in self._clients.keys() - {url for url, _ in pools}]
        for client in unused:
            await _close(client)

    async def forget(self, url: str, pool: Pool) -> None:
        """Remove what was published for a pool that is gone."""
        with _logged(pool):
            await self._client(url).delete(pool.keys.policy, pool.keys.capacity, pool.keys.drain)

    async def close(self) -> None:
        """End subscriptions and connections."""
        for listener in self._listeners.values():
            listener.cancel()
        await asyncio.gather(*self._listeners.values(), return_exceptions=True)
        for client in self._clients.values():
            await _close(client)

    def _say_once(self, pool: Pool, task_id: str, error: Exception) -> None:
        if (pool.id, task_id) not in self._told:
            self._told.add((pool.id, task_id))
            logger.warning("%s: job %s of a lost worker is not taken over: %r", pool.id, task_id, error)

    def _client(self, url: str) -> Any:
        self._fence()
        if url not in self._clients:
            self._clients[url] = _connect(url)
        return self._clients[url]

    def _listen(self, url: str, prefix: str) -> None:
        if (url, prefix) not in self._listeners or self._listeners[url, prefix].done():
            self._listeners[url, prefix] = asyncio.create_task(self._follow(url, prefix))

    async def _follow(self, url: str, prefix: str) -> None:
        """Pass wake messages on; losing one costs a tick, so an outage needs no more than another try."""
        task = asyncio.current_task()
        assert task is not None
        client = _connect(url)  # of its own: whoever listens keeps a connection
        try:
            # On Python 3.11 the wait_for inside redis-py may swallow a cancellation.
            while not task.cancelling():
                self._fence()
                with contextlib.suppress(redis.RedisError, OSError):
                    async with client.pubsub(ignore_subscribe_messages=True) as subscription:
                        await subscription.subscribe(wake_channel(prefix))
                        ends_at = time.monotonic() + SUBSCRIPTION_SECONDS
                        while not task.cancelling() and time.monotonic() < ends_at:
                            if await subscription.get_message(timeout=TIMEOUT_SECONDS / 2):
                                self._wake.set()
                if not task.cancelling():
                    await asyncio.sleep(RESUBSCRIBE_SECONDS)
        finally:
            await _close(client)


class _UnreadableUrl(redis.RedisError):
    """What redis-py says of such a URL may quote a part of the password: this says nothing of it."""

    def __init__(self) -> None:
        super().__init__("the broker's URL cannot be read; a password with any of :/?#[]@ in it has to be percent-encoded")


def _connect(url: str) -> Any:
    options: dict[str, Any] = {
        "max_connections": CONNECTIONS,
        "timeout": TURN_SECONDS,
        "decode_responses": True,
        # What is no text must not end a pass: it comes back as it went in.
        "encoding_errors": "surrogateescape",
        **_TIMEOUTS,
        # A connection that broke since the last pass is made again at once; an answer is waited for only once.
        "retry": Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
    }
    try:
        if url.startswith("sentinel://"):
            return _through_sentinels(url, options)
        return redis.asyncio.Redis.from_pool(BlockingConnectionPool.from_url(url, **options))
    except ValueError:
        raise _UnreadableUrl from None


class _BlockingSentinelPool(SentinelConnectionPool, BlockingConnectionPool):
    """Connections to whom the sentinels name, at most so many."""


def _through_sentinels(address: str, options: Mapping[str, Any]) -> Any:
    """The master that the sentinels name at every connect; user, password and database are the first URL's, as in Kombu."""
    urls, _, master = address.partition("#")
    parts = [url_to_parts(url) for url in urls.split(";")]
    sentinels: Any = Sentinel(  # type: ignore[no-untyped-call]
        [(part.hostname, part.port or _SENTINEL_PORT) for part in parts],
        sentinel_kwargs={**_TIMEOUTS, "retry": Retry(NoBackoff(), 0)},
    )
    first = parts[0]
    return sentinels.master_for(
        master,
        connection_pool_class=_BlockingSentinelPool,
        username=first.username or None,
        password=first.password or None,
        db=int((first.path or "").strip("/") or 0),
        **options,
    )


async def _close(client: Any) -> None:
    await client.aclose()
    if manager := getattr(client.connection_pool, "sentinel_manager", None):
        for sentinel in manager.sentinels:
            await sentinel.aclose()


def _ask(pipe: Any, pool: Pool) -> None:
    """Queue the commands whose answers :func:`_reading` takes in the same order."""
    keys = pool.keys
    pipe.hgetall(keys.routes)
    pipe.smembers(keys.drain)
    pipe.hlen(keys.plain_unacked)
    for tier in pool.tiers:
        for name in keys.queue_lists(tier.queue):
            pipe.llen(name)
        pipe.hlen(keys.unacked(tier.name))
        pipe.get(keys.scheduled(tier.name))
        pipe.zcard(keys.spilled(tier.name))
        pipe.hgetall(keys.presence(tier.name))
        pipe.hgetall(keys.served(tier.name))
        # Before what is counted beside it: what it counts no more is counted by then.
        pipe.hgetall(keys.checkpoint(tier.name))
        pipe.hgetall(keys.attempts(tier.name))
        pipe.hgetall(keys.waits(tier.name))
        pipe.zcard(keys.waiting(tier.name))


def _reading(pool: Pool, answers: Iterator[Any], run_id: str, database: int, now: Milliseconds) -> BrokerReading | Unavailable:
    """Take this pool's answers, all of them, then make sense of them."""
    routes, marked, plain = next(answers), next(answers), next(answers)
    answered = {tier.name: [next(answers) for _ in range(len(pool.keys.priority_steps) + 9)] for tier in pool.tiers}
    for answer in (routes, marked, plain, *chain.from_iterable(answered.values())):
        if isinstance(answer, Unavailable):
            return Unavailable(f"what Redis holds of the pool cannot be read: {answer.why}")
    try:
        tiers = {name: replace(_queue(answer, now), plain_in_flight=plain) for name, answer in answered.items()}
        return BrokerReading(
            tiers, run_id, now, {route: int(count) for route, count in routes.items()}, database, frozenset(marked)
        )
    except (VersionMismatch, ValueError, TypeError) as error:
        return Unavailable(f"what Redis holds of the pool cannot be read: {error}")


def _queue(answers: Sequence[Any], now: Milliseconds) -> QueueReading:
    *waiting, held, scheduled, spilled, presence, served, checkpoint, attempts, waits, unclaimed = answers
    kept = _checkpoint(checkpoint) if checkpoint else NOTHING_KEPT
    reports = [Presence.load(raw) for raw in presence.values()]
    return QueueReading(
        sum(waiting),
        max(0, held - int(scheduled or 0)),
        spilled,
        workers=tuple(report for report in reports if report.alive(now)),
        lost=tuple(report.owner for report in reports if not report.alive(now)),
        served=_served(served),
        waits=Waits(
            int(waits.get("jobs", 0)), float(waits.get("seconds", 0)), float(waits.get("expected", 0)), int(waits.get("right", 0))
        ),
        # What was counted since another time is over.
        counted=_attempts(attempts) if int(attempts.get("since", 0)) == kept.breaker.since else NO_ATTEMPTS,
        kept=kept,
        unclaimed=unclaimed,
    )


def _served(stored: Mapping[str, str]) -> Served:
    jobs, seconds, squares = (stored.get(field, "0") for field in ("jobs", "seconds", "squares"))
    return Served(int(jobs), float(seconds), float(squares), float(stored["mean"]) if "mean" in stored else None)


def _stored(kept: Checkpoint) -> Mapping[str, Any]:
    start = {} if kept.start_seconds is None else {"start_seconds": kept.start_seconds}
    return {**asdict(kept.breaker), **asdict(kept.baseline), **start}


def _checkpoint(stored: Mapping[str, str]) -> Checkpoint:
    at, since = Milliseconds(int(stored["at"])), Milliseconds(int(stored["since"]))
    breaker = Breaker(BreakerState(stored["state"]), at, int(stored["opened"]), since, int(stored["older"]))
    start = float(stored["start_seconds"]) if "start_seconds" in stored else None
    return Checkpoint(breaker, _attempts(stored), start)


def _attempts(stored: Mapping[str, str]) -> Attempts:
    return Attempts(*(float(stored.get(field.name, 0)) for field in fields(Attempts)))


@contextlib.contextmanager
def _logged(pool: Pool) -> Iterator[None]:
    try:
        yield
    except (redis.RedisError, OSError) as error:
        logger.warning("%s: %s", pool.id, error)


def _place(url: str) -> str:
    first, *_ = url.split(";")
    address = urlsplit(first)
    if address.scheme == "sentinel":
        return f"the master of the sentinels at {address.hostname}:{address.port or _SENTINEL_PORT}"
    return f"Redis at {address.hostname}:{address.port or 6379}"


def _said(error: Exception) -> str:
    return str(error).rstrip(".")


def _why(url: str, error: Exception) -> str:
    """What is wrong with the broker, in words, without the password that its URL may hold."""
    if isinstance(error, _UnreadableUrl):
        return str(error)
    place, said = _place(url), _said(error)
    if isinstance(error, redis.AuthenticationError):
        return f"{place} refuses the user or the password: {said}"
    if isinstance(error, redis.TimeoutError):
        return f"{place} does not answer within {TIMEOUT_SECONDS:.0f} s"
    if isinstance(error, redis.ConnectionError | OSError):
        return f"{place} cannot be reached: {said}"
    return f"{place}: {said}"
