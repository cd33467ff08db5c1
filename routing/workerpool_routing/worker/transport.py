"""Kombu's Redis transport, different in three things.

* A message enters the in-flight keys by a script, so that its time is Redis's and not the host's.
* A message that is delivered again gets a fresh delivery tag, so that a late acknowledgement of the old delivery finds nothing.
* A lost connection puts nothing back: running jobs go on and are renewed, other messages are found by their age.
"""

from __future__ import annotations

import json
from contextlib import suppress
from json import JSONDecodeError
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import kombu.transport
from kombu.transport import redis as kombu_redis
from kombu.transport import virtual
from kombu.utils.json import dumps

from workerpool_routing import ledger
from workerpool_routing.connection import unavailable_when_down
from workerpool_routing.errors import PoolUnavailable

if TYPE_CHECKING:
    from workerpool_routing.worker.attempt import WorkerLife

OVERDUE_AT_ONCE = 100


class _OfThisWorker:
    life: WorkerLife


class QoS(_OfThisWorker, kombu_redis.QoS):  # type: ignore[misc,unused-ignore]
    """What a channel of this worker has received and not acknowledged."""

    restore_at_shutdown = False

    def append(self, message: Any, delivery_tag: str) -> None:
        """Record a message that was just received."""
        delivery = message.delivery_info
        value = dumps([message._raw, delivery["exchange"], delivery["routing_key"]])  # noqa: SLF001 as Kombu stores it
        call = ledger.hold(self.life.keys, self.life.tier, tag=delivery_tag, value=value)
        with self.channel.conn_or_acquire() as client:  # the channel's own connection: Celery handles it when that breaks
            client.eval(ledger.script("hold"), len(call.keys), *call.keys, *call.args)
        virtual.QoS.append(self, message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        """Forget a message, even if it came over a connection that is closed by now: there Kombu would end the worker."""
        if not self.channel.closed:
            super().ack(delivery_tag)
            return
        life = self.life
        with suppress(PoolUnavailable), unavailable_when_down():
            life.connection.client.hdel(life.keys.unacked(life.tier), delivery_tag)
            life.connection.client.zrem(life.keys.unacked_index(life.tier), delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """Put a message back, or forget it, even if its connection is closed by now."""
        if not self.channel.closed:
            super().reject(delivery_tag, requeue)
        elif requeue:
            with suppress(PoolUnavailable):  # then nobody renews the message, and it is found by its age
                give_back(self.life, delivery_tag)
        else:
            self.ack(delivery_tag)

    def restore_visible(self, *_: Any, **__: Any) -> None:
        """Put back messages that nobody has renewed for the visibility time-out: the last resort if no operator runs."""
        life = self.life
        client, index = life.connection.client, life.keys.unacked_index(life.tier)
        with suppress(PoolUnavailable), unavailable_when_down():
            seconds, _ = client.time()
            for tag in client.zrangebyscore(index, "-inf", seconds - self.visibility_timeout, 0, OVERDUE_AT_ONCE):
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


def give_back(life: WorkerLife, tag: str) -> None:
    """Put an in-flight message back at the head of its queue, unless it is gone by now; raises PoolUnavailable."""
    with unavailable_when_down():
        raw = life.connection.client.hget(life.keys.unacked(life.tier), tag)
        if raw is None:
            life.connection.client.zrem(life.keys.unacked_index(life.tier), tag)
            return
    life.connection.run("requeue", ledger.requeue(life.keys, life.tier, tag=tag, raw=raw, delivery_tag=str(uuid4())))


class Channel(_OfThisWorker, kombu_redis.Channel):  # type: ignore[misc,unused-ignore]
    """A channel of this worker."""

    QoS = QoS

    def _brpop_read(self, **options: Any) -> Any:
        """Read one message; text that is not JSON is set aside, where Kombu would end the worker."""
        try:
            return super()._brpop_read(**options)
        except JSONDecodeError as error:
            self.life.set_aside(str(uuid4()), reason=f"not a Celery message: {error}", message=error.doc)
            return True


class Transport(_OfThisWorker, kombu_redis.Transport):  # type: ignore[misc,unused-ignore]
    """The transport of this worker."""

    Channel = Channel

    def _deliver(self, message: Any, queue: str) -> None:
        try:
            _ = message["properties"]["delivery_tag"], message["properties"]["delivery_info"]["routing_key"], message["headers"]
        except (KeyError, TypeError) as error:
            self.life.set_aside(str(uuid4()), reason=f"not a Celery message: {error!r}", message=json.dumps(message))
            return
        super()._deliver(message, queue)


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
