"""Where a pool's state is kept: what the library needs of it (:class:`Store`), and how Redis provides it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from workerpool_routing import admission, metrics
from workerpool_routing.admission import Admission, Question
from workerpool_routing.connection import Connection, unavailable_when_down
from workerpool_routing.errors import PoolUnavailable
from workerpool_routing.ledger import Job
from workerpool_routing.message import Message
from workerpool_routing.policy import PolicySource
from workerpool_routing.wire import Capacity, Keyspace, Milliseconds, Policy, Presence, TierPolicy, VersionMismatch


@dataclass(frozen=True, slots=True)
class TierState:
    """One tier at one instant.

    Attributes:
        workers: the live ones.
        starting: slots that are on their way.
        waiting: messages in its queue, over all priority steps.
        in_flight: messages that its workers hold, without those of a future ETA.
        oldest_wait: seconds since the oldest waiting job was admitted; None if no admitted job waits.
    """

    tier: TierPolicy
    workers: tuple[Presence, ...]
    starting: int
    waiting: int
    in_flight: int
    oldest_wait: float | None

    @property
    def ready(self) -> int:
        """Slots of live workers."""
        return sum(worker.slots for worker in self.workers)


class Store(Protocol):
    """The state of one pool. Every method raises :class:`PoolUnavailable` if it cannot be reached in time."""

    def policy(self) -> Policy | None:
        """The pool's policy; None while none is known."""

    def admit(self, question: Question) -> Admission:
        """Decide, and write what the question asks for."""

    def release(self, tier: str, lease: str) -> None:
        """End a lease: its message is in the queue now."""

    def push(self, queue: str, message: Message) -> None:
        """Publish a message without a decision."""

    def state(self, policy: Policy) -> Sequence[TierState]:
        """All tiers, in order of preference."""

    def queue_length(self, queue: str) -> int:
        """Messages waiting in a queue, over all priority steps."""

    def job(self, task_id: str) -> Job | None:
        """A job's ledger entry; None if it has none, or none any more."""


class RedisStore:
    """The state in the app's broker."""

    def __init__(self, connection: Connection, keys: Keyspace, given: Policy | None) -> None:
        self.keys = keys
        self._connection = connection
        self._client = connection.client  # raises NotConfigured for an unusable broker URL before anything else happens
        self._source = PolicySource(connection, keys, given)

    def policy(self) -> Policy | None:
        """As the operator published it, or as the code gave it."""
        return self._source.get()

    def admit(self, question: Question) -> Admission:
        """Run the script. If it reaches Redis only after the time-out, it does nothing."""
        connection = self._connection
        for _ in range(2):
            until = Milliseconds(connection.now() + int(connection.timeout * 1000))
            asked = time.perf_counter()
            answer = admission.parse(connection.run("admit", admission.call(self.keys, question, until=until)))
            if isinstance(answer, Admission):
                metrics.took(self.keys.pool, time.perf_counter() - asked)
                connection.set_clock(answer.time)
                return answer
            connection.set_clock(answer)  # perhaps only our reckoning was off: after a failover another server's clock counts
        raise PoolUnavailable("Redis does not answer in time")

    def release(self, tier: str, lease: str) -> None:
        """Remove the lease, by one command."""
        with unavailable_when_down():
            self._client.zrem(self.keys.leases(tier), lease)

    def push(self, queue: str, message: Message) -> None:
        """Push it as Kombu would."""
        with unavailable_when_down():
            self._client.lpush(self.keys.queue_list(queue, message.priority), message.to(queue))

    def queue_length(self, queue: str) -> int:
        """Sum the lists of all priority steps, in one pipeline."""
        with unavailable_when_down(), self._client.pipeline(transaction=False) as pipe:
            for name in self.keys.queue_lists(queue):
                pipe.llen(name)
            return sum(pipe.execute())

    def job(self, task_id: str) -> Job | None:
        """Read the entry, by one command."""
        with unavailable_when_down():
            return Job.load(task_id, self._client.hgetall(self.keys.job(task_id)))

    def state(self, policy: Policy) -> Sequence[TierState]:
        """Read all tiers in one pipeline, and the age of their oldest messages in a second one."""
        with unavailable_when_down(), self._client.pipeline(transaction=False) as pipe:
            pipe.time()
            pipe.get(self.keys.capacity)
            for tier in policy.tiers:
                pipe.hvals(self.keys.presence(tier.name))
                pipe.hlen(self.keys.unacked(tier.name))
                pipe.get(self.keys.scheduled(tier.name))
                for name in self.keys.queue_lists(tier.queue):
                    pipe.llen(name)
                    pipe.lindex(name, -1)
            (seconds, micros), capacity, *answers = pipe.execute()
        now = Milliseconds(seconds * 1000 + micros // 1000)
        starting, size = _starting(capacity), 3 + 2 * len(self.keys.priority_steps)
        by_tier = [answers[at : at + size] for at in range(0, len(answers), size)]
        ages = self._ages([[raw for raw in rest[1::2] if raw] for _, _, _, *rest in by_tier], now)
        return [
            TierState(
                tier,
                tuple(report for raw in presence if (report := Presence.load(raw)).alive(now)),
                starting.get(tier.name, 0),
                sum(rest[0::2]),
                max(0, held - int(scheduled or 0)),
                age,
            )
            for tier, (presence, held, scheduled, *rest), age in zip(policy.tiers, by_tier, ages, strict=True)
        ]

    def _ages(self, oldest: list[list[str]], now: Milliseconds) -> list[float | None]:
        """Seconds since the oldest of each tier's messages was admitted; messages that never were admitted have no age."""
        with unavailable_when_down(), self._client.pipeline(transaction=False) as pipe:
            for raw in [raw for messages in oldest for raw in messages]:
                pipe.hget(self.keys.job(_task_id(raw)), "admitted_at")
            answers = iter(pipe.execute())
        admitted = [[at for _ in messages if (at := next(answers))] for messages in oldest]
        return [max((now - int(at)) / 1000 for at in times) if times else None for times in admitted]


def _starting(raw: str | None) -> dict[str, int]:
    try:
        tiers = Capacity.load(raw).tiers if raw else {}
        return {name: sum(group.slots for group in tier.starting) for name, tier in tiers.items()}
    except VersionMismatch:
        return {}


def _task_id(raw: str) -> str:
    """The id of a message's task; empty for text that is no message of Celery's."""
    try:
        return str(json.loads(raw)["headers"]["id"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return ""
