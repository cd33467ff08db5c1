"""Kombu's Redis transport, for the connections of the app to its broker different in four things.

* A message enters the in-flight keys by a script, so that its time is Redis's and not the host's.
* A message that is delivered again gets a fresh delivery tag, so that a late acknowledgement of the old delivery finds nothing.
* A lost connection puts nothing back: running jobs go on and are renewed, other messages are found by their age.
* A Redis that refuses writes counts as a lost connection, and Celery connects again when it takes them. What the worker has
  received and could not record, or could not put back, is kept until then.

A connection that a task's author opens without the app is Kombu's own: it acknowledges under other keys than the tier's.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from queue import Empty
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import kombu.transport
from celery.worker import state
from kombu.transport import redis as kombu_redis
from kombu.transport import virtual
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import dumps, loads
from redis import ConnectionError as RedisConnectionError
from redis import RedisError

from workerpool_routing import ledger
from workerpool_routing.connection import unavailable_when_down
from workerpool_routing.errors import PoolUnavailable
from workerpool_routing.wire import PRESENCE_LIFE_MS, unacked_keys

if TYPE_CHECKING:
    from workerpool_routing.worker.attempt import WorkerLife

OVERDUE_AT_ONCE = 100

Overdue = Mapping[str, tuple[float, float]]
"""Delivery tag → the time of its last renewal, by Redis, and the time at which it was first seen with that, by this worker."""


def seen_overdue(before: Overdue, found: Iterable[tuple[str, float]], now: float) -> Overdue:
    """What is overdue now, with its renewals, and since when it has been seen so."""
    return {tag: before[tag] if tag in before and before[tag][0] == renewed else (renewed, now) for tag, renewed in found}


def held_by_nobody(overdue: Overdue, now: float) -> list[str]:
    """What nobody has renewed for a presence life while this worker watched: a step of Redis's clock makes all look old."""
    return [tag for tag, (_, since) in overdue.items() if now - since > PRESENCE_LIFE_MS / 1000]


class _OfThisWorker:
    life: WorkerLife


class QoS(_OfThisWorker, kombu_redis.QoS):  # type: ignore[misc,unused-ignore]
    """What a channel of this worker has received and not acknowledged."""

    restore_at_shutdown = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._overdue: Overdue = {}

    def append(self, message: Any, delivery_tag: str) -> None:
        """Record a message that was just received."""
        # Kombu would note its exchange and routing key: only a connection that knows the binding can tell the queue from them.
        value = dumps([message._raw, "", self.channel.connection.queue])  # noqa: SLF001 as Kombu stores it
        call = ledger.hold(self.life.keys, self.life.tier, tag=delivery_tag, value=value)
        try:
            with self.channel.conn_or_acquire() as client:  # the channel's own connection: Celery handles it when that breaks
                client.eval(ledger.script("hold"), len(call.keys), *call.keys, *call.args)
        except RedisError:
            self.life.owed.append(partial(put_back, self.life, delivery_tag, value))
            raise
        virtual.QoS.append(self, message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        """Forget a message, even if it came over a connection that is closed by now: there Kombu would end the worker."""
        virtual.QoS.ack(self, delivery_tag)
        self.life.soon(partial(forget, self.life, delivery_tag))

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """Put a message back, or forget it, even if its connection is closed by now."""
        if not requeue:
            self.ack(delivery_tag)
            return
        if not self.channel.closed:
            with suppress(RedisError):
                super().reject(delivery_tag, requeue=True)
                return
        virtual.QoS.ack(self, delivery_tag)
        self.life.soon(partial(give_back, self.life, delivery_tag))

    def restore_visible(self, *_: Any, **__: Any) -> None:
        """Put back messages that nobody has renewed for the visibility time-out and then a presence life: the last resort if no
        operator runs.
        """
        life = self.life
        client, index = life.connection.client, life.keys.unacked_index(life.tier)
        try:
            life.check_writes()
        except PoolUnavailable:
            self._overdue = {}  # nobody can renew anything now
            return
        with suppress(PoolUnavailable), unavailable_when_down():
            seconds, _ = client.time()
            end = seconds - self.visibility_timeout
            found = client.zrangebyscore(index, "-inf", end, 0, OVERDUE_AT_ONCE, withscores=True)
            self._overdue = seen_overdue(self._overdue, found, time.monotonic())
            for tag in held_by_nobody(self._overdue, time.monotonic()):
                give_back(life, tag)

    def restore_by_tag(self, tag: str, client: Any = None, leftmost: bool = False) -> None:
        """Put one message back: a rejected one at the end of the queue, as Kombu does; any other one at its head."""
        if leftmost:
            super().restore_by_tag(tag, client, leftmost=True)
        else:
            give_back(self.life, tag)


def settled(message: Any) -> None:
    """Stop holding a message that the script which ended its job has acknowledged."""
    message._state = "ACK"  # noqa: SLF001 as Kombu marks it
    virtual.QoS.ack(message.channel.qos, message.delivery_tag)


def forget(life: WorkerLife, tag: str) -> None:
    """Take a message out of the in-flight keys; raises PoolUnavailable."""
    with unavailable_when_down(), life.connection.client.pipeline() as pipe:
        pipe.hdel(life.keys.unacked(life.tier), tag)
        pipe.zrem(life.keys.unacked_index(life.tier), tag)
        pipe.execute()


def put_back(life: WorkerLife, tag: str, value: str) -> None:
    """Put a message back at the head of its queue that may not have been recorded as in flight; raises PoolUnavailable."""
    call = ledger.requeue(life.keys, life.tier, tag=tag, raw=value, delivery_tag=str(uuid4()), unrecorded=True)
    life.connection.run("requeue", call)


def give_back(life: WorkerLife, tag: str) -> None:
    """Put an in-flight message back at the head of its queue, unless it is gone by now; raises PoolUnavailable."""
    with unavailable_when_down():
        raw = life.connection.client.hget(life.keys.unacked(life.tier), tag)
        if raw is None:
            life.connection.client.zrem(life.keys.unacked_index(life.tier), tag)
            return
    life.connection.run("requeue", ledger.requeue(life.keys, life.tier, tag=tag, raw=raw, delivery_tag=str(uuid4())))


@contextmanager
def lost_when_refused() -> Iterator[None]:
    """Let a refusal be for Celery what a lost connection is: it connects again, at growing intervals, until it can."""
    try:
        with unavailable_when_down():
            yield
    except PoolUnavailable as unavailable:
        raise RedisConnectionError(str(unavailable)) from unavailable


class Channel(_OfThisWorker, kombu_redis.Channel):  # type: ignore[misc,unused-ignore]
    """A channel of this worker."""

    QoS = QoS

    def _brpop_read(self, **options: Any) -> Any:
        """Read one message as Kombu does; a text that cannot be read is set aside, where Kombu would end the worker."""
        try:
            with lost_when_refused():
                item, queue = self._pop(**options)
                try:
                    message = loads(bytes_to_str(item))
                except Exception as error:  # noqa: BLE001 bad syntax, too deep, too long a number, no value of its "__type__"
                    reason, text = f"not a Celery message: {error!r}", item.decode(errors="surrogateescape")
                    self.life.soon(partial(self.life.set_aside, str(uuid4()), reason=reason, message=text))
                else:
                    self.connection._deliver(message, queue)  # noqa: SLF001 as Kombu calls it
        finally:
            self._in_poll = None
        return True

    def _pop(self, **options: Any) -> tuple[bytes, str]:
        """The next message, and its queue; raises Empty if none has come in time."""
        client = self.client
        try:
            found = client.parse_response(client.connection, "BRPOP", **options)
        except self.connection_errors:
            client.connection.disconnect()
            raise
        if not found:
            raise Empty
        line, item = found
        queue: str = bytes_to_str(line).rsplit(self.sep, 1)[0]
        self._queue_cycle.rotate(queue)
        return item, queue

    def _receive(self) -> Any:
        """Read what was published, and act on it."""
        with lost_when_refused():
            return super()._receive()

    def maybe_refresh_binding_expiry(self) -> None:
        """As Kombu does it; a refusal, on which it would log a traceback each second, is presence's to tell."""
        with suppress(PoolUnavailable), unavailable_when_down():
            super().maybe_refresh_binding_expiry()


def uses_the_tiers_keys(life: WorkerLife, transport_options: Mapping[str, Any]) -> bool:
    """Whether a connection with these options keeps in the in-flight keys of this worker's tier what it has received."""
    return unacked_keys(life.pool.name, life.tier).items() <= transport_options.items()


class Transport(_OfThisWorker, kombu_redis.Transport):  # type: ignore[misc,unused-ignore]
    """The transport of this worker."""

    Channel = Channel
    queue = ""
    """From which the message comes that is being delivered."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._ours = uses_the_tiers_keys(self.life, self.client.transport_options)
        if not self._ours:
            self.Channel = super().Channel

    def establish_connection(self) -> Any:
        """Connect, if Redis takes writes: Kombu's first use of a connection is one, and Celery does not try that again."""
        if self._ours:
            with lost_when_refused():
                self.life.check_writes()
        return super().establish_connection()

    def _deliver(self, message: Any, queue: str) -> None:
        """Start what has come. What cannot be started is set aside; Celery would end this worker, and then the next one."""
        if not self._ours:
            super()._deliver(message, queue)
            return
        task_id, tag, self.queue = "", "", queue
        try:
            task_id, tag = _names_in(message)
            super()._deliver(message, queue)
        except (OSError, RedisError, PoolUnavailable):  # none of the message's fault
            raise
        except Exception as error:  # noqa: BLE001 whatever else is wrong with it
            reason = f"not a Celery message: {error!r}"
            text = json.dumps(message)
            self.life.soon(partial(self.life.set_aside, task_id or str(uuid4()), reason=reason, message=text, tag=tag))
            self._forget(tag)

    def _forget(self, tag: str) -> None:
        """Hold the message no longer, nor the slot that its task was to get."""
        for channel in self.channels:
            virtual.QoS.ack(channel.qos, tag)
        for request in [request for request in state.requests.values() if request.message.delivery_tag == tag]:
            state.task_ready(request)
            if release := getattr(self.life.consumer.controller, "_quick_release", None):  # the solo pool has none
                release()


def _names_in(message: Any) -> tuple[str, str]:
    """The task id of a message, or "", and its delivery tag; some error where they, or what Kombu needs, are not there."""
    headers, properties = message["headers"] or {}, message["properties"]
    task_id, tag = headers.get("id") or "", properties["delivery_tag"]
    _ = properties["delivery_info"]["routing_key"], str.encode(task_id), str.encode(tag)
    return task_id, tag


class SentinelChannel(Channel, kombu_redis.SentinelChannel):  # type: ignore[misc,unused-ignore]
    """A channel of this worker to the master that sentinels name."""


class SentinelTransport(Transport, kombu_redis.SentinelTransport):  # type: ignore[misc,unused-ignore]
    """The transport of this worker where sentinels name the master."""

    Channel = SentinelChannel


def use(life: WorkerLife) -> None:
    """Make this the transport of every Redis connection in this process, in which one worker lives."""
    _OfThisWorker.life = life
    for scheme, kind in (("redis", Transport), ("rediss", Transport), ("sentinel", SentinelTransport)):
        kombu.transport.TRANSPORT_ALIASES[scheme] = f"{__name__}:{kind.__name__}"
        kombu.transport._transport_cache.pop(scheme, None)  # noqa: SLF001 an earlier connection may have used Kombu's own
