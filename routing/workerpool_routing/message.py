"""A job's Celery message as Kombu would put it into Redis, made without a connection, so that a script can put it there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from math import ceil
from threading import local
from typing import Any
from uuid import uuid4

from celery import Task
from kombu import Connection, Exchange, Producer, Queue
from kombu.utils.json import dumps

from workerpool_routing.wire import HEADER, carried, priority_of

_PLACEHOLDER = f"workerpool-{uuid4().hex}"
_ANY_QUEUE = Queue(_PLACEHOLDER, Exchange(_PLACEHOLDER, type="direct"))
_PLACE = json.dumps(_PLACEHOLDER)

_mine = local()


@dataclass(frozen=True, slots=True)
class Message:
    """A message, cut in two where the name of its queue belongs.

    ``later``: in how many seconds its ETA is, 0 where it has none. By the clock of this host, as Celery reckons it.
    """

    head: str
    tail: str
    priority: int
    later: int = 0

    def to(self, queue: str) -> str:
        """The JSON that Kombu would push into that queue."""
        return f"{self.head}{json.dumps(queue)}{self.tail}"


def prepare(
    task: Task,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    *,
    task_id: str,
    expires: float | None,
    headers: Mapping[str, Any] | None = None,
    ignore_result: bool | None = None,
    **options: Any,
) -> Message:
    """The message that ``task.apply_async(...)`` would publish as the first attempt of a job.

    Celery does all of it, its signals included. Arguments that cannot be serialised raise here, before anything is admitted.
    """
    headers = {**(headers or {}), HEADER: {**carried(headers), "attempt": 1}}
    producer = _Recorder(_channel())
    # Else the result backend would subscribe to the result here, before anyone has asked for it: a call to Redis without a bound.
    task.apply_async(
        args, kwargs, task_id=task_id, expires=expires, headers=headers, queue=_ANY_QUEUE, producer=producer, retry=False,
        ignore_result=True, **options,
    )  # fmt: skip
    message = producer.recorded[0]
    message["headers"]["ignore_result"] = task.ignore_result if ignore_result is None else ignore_result
    return _cut(message)


def serialise(body: Any, headers: Mapping[str, Any], properties: Mapping[str, Any], *, encoding: Mapping[str, Any]) -> Message:
    """The message of a task that Celery itself is about to publish; ``encoding`` is its serializer and compression."""
    producer = _Recorder(_channel())
    producer.publish(body, exchange="", routing_key=_PLACEHOLDER, headers=dict(headers), **encoding, **properties)
    return _cut(producer.recorded[0])


class _Recorder(Producer):
    """A producer that records what it is told to publish."""

    def __init__(self, channel: Any) -> None:
        super().__init__(channel, auto_declare=False)
        self.recorded: list[dict[str, Any]] = []

    def _publish(
        self, body: Any, priority: Any, content_type: Any, content_encoding: Any, headers: Any, properties: Any, routing_key: Any,
        _mandatory: Any, _immediate: Any, exchange: Any, *_: Any, **__: Any,
    ) -> None:  # fmt: skip
        message = self.channel.prepare_message(body, priority, content_type, content_encoding, headers, properties)
        self.channel._inplace_augment_message(message, exchange, routing_key)  # noqa: SLF001 it ends before the broker
        self.recorded.append(message)


def _channel() -> Any:
    """A channel of this thread that is connected to nothing."""
    if not hasattr(_mine, "channel"):
        _mine.channel = Connection("memory://").channel()
    return _mine.channel


def _cut(message: dict[str, Any]) -> Message:
    head, _, tail = dumps(message).partition(_PLACE)
    return Message(head, tail, priority_of(message), _seconds_until(message["headers"].get("eta")))


def _seconds_until(eta: object) -> int:
    try:
        due = datetime.fromisoformat(eta) if isinstance(eta, str) else None
    except ValueError:
        due = None
    if due is None:
        return 0
    return max(0, ceil((due.replace(tzinfo=due.tzinfo or UTC) - datetime.now(UTC)).total_seconds()))
