"""Arguments and answer of ``lua/admit.lua``: one round trip that measures, decides, writes the ledger and publishes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from workerpool_routing.decide import (
    MARGIN,
    PATIENCE_SECONDS,
    RETURN,
    SHORTEST_SECONDS,
    Candidates,
    Load,
    Reason,
    Request,
    assumed_seconds,
)
from workerpool_routing.ledger import Call
from workerpool_routing.wire import (
    IDEMPOTENCY_LIFE_SECONDS,
    JOB_LIFE_SECONDS,
    LEASE_MS,
    MESSAGE_LIMIT_BYTES,
    PRESENCE_LIFE_MS,
    SCHEMA_VERSION,
    Keyspace,
    Milliseconds,
    TierPolicy,
    wake_channel,
)

if TYPE_CHECKING:
    from workerpool_routing.message import Message  # the operator, which only asks, does without Celery


@dataclass(frozen=True, slots=True)
class Entry:
    """What the ledger stores of a new job.

    Attributes:
        fenced: whether workers claim it; a job that they do not claim is published, but gets no ledger entry.
        publish: whether the script publishes the message; for a plain ``delay()`` Celery does.
        idempotency_key: a second call with the same key gets the decision of the first.
        wait: the expected wait by an earlier decision on this job; None if it is decided now. (After an earlier decision the
            script would count the job itself among those that wait.)
    """

    task_id: str
    message: Message
    publish: bool = True
    idempotency_key: str | None = None
    fenced: bool = True
    wait: float | None = None


@dataclass(frozen=True, slots=True)
class Admission:
    """Where the job goes: its tier and queue, why, and the expected wait in seconds, infinite if no slot is ready or starting.

    Attributes:
        task_id: of the job; that of an earlier call if the idempotency key was used before, empty if no job was to be admitted.
        load: of the tier that was asked for, with all of its starting slots as one group, ready when the first of them is. None
            if the decision is an earlier one.
        time: of Redis's clock, at the decision.
    """

    task_id: str
    tier: str
    queue: str
    reason: Reason
    wait: float
    load: Load | None
    time: Milliseconds


@dataclass(frozen=True, slots=True)
class Question:
    """What the script is asked: where a job goes. With neither entry nor lease it decides and writes nothing.

    Attributes:
        candidates: from :func:`~workerpool_routing.decide.preselect`, or the one tier that an earlier answer named.
        request: what the caller asks for.
        entry: the job to write to the ledger.
        lease: an id under which the job counts on its tier until the lease is released, or expires.
        wanted: the tier to whose demand the job counts; None for the first candidate if that is accelerated, else for the tier
            that the job gets.
        refuses: whether the answer may be a refusal.
    """

    candidates: Candidates
    request: Request
    entry: Entry | None = None
    lease: str | None = None
    wanted: TierPolicy | None = None
    refuses: bool = True


def call(keys: Keyspace, question: Question, *, until: Milliseconds | None = None) -> Call:
    """Arguments of the script. After ``until``, by Redis's clock, it does nothing: nobody waits for its answer any more."""
    request, entry = question.request, question.entry
    ask: dict[str, Any] = {
        "task": request.task, "refuses": question.refuses, "limit": request.limit, "lease": question.lease, "until_ms": until,
    }  # fmt: skip
    parts: list[str] = []
    if entry:
        ask |= {"id": entry.task_id, "required": int(request.accelerated == "required")}
        # Either tells the script, when it is asked again because the connection broke, that the job is in its queue.
        ask["job"] = keys.job(entry.task_id) if entry.fenced else None
        known_as = entry.idempotency_key or (entry.task_id if entry.publish and not entry.fenced else None)
        ask["idempotent"] = keys.idempotent(known_as) if known_as else None
        ask["wait"] = None if entry.wait is None else f"{entry.wait:.17g}"
        ask["step"] = 1 + keys.step(entry.message.priority) if entry.publish else None
        ask["later"] = entry.message.later
        parts = [entry.message.head, entry.message.tail]
    given = json.dumps({key: value for key, value in ask.items() if value is not None})
    return Call([], [_of_the_pool(keys, question.candidates, question.wanted), given, *parts])


def parse(reply: Sequence[Any]) -> Admission | Milliseconds:
    """Parse the script's answer; only Redis's time if ``until`` had passed before the script ran."""
    if len(reply) == 1:
        return Milliseconds(int(reply[0]))
    time, task_id, tier, queue, reason, wait, *load = reply
    measured = None
    if load:
        waiting, in_flight, ready, leased, slots, next_ms = map(int, load)
        measured = Load(waiting, in_flight, ready, ((slots, next_ms / 1000),) if slots else (), leased)
    return Admission(task_id, tier, queue, Reason(reason), float(wait), measured, Milliseconds(int(time)))


@lru_cache(maxsize=64)
def _of_the_pool(keys: Keyspace, candidates: Candidates, wanted: TierPolicy | None) -> str:
    first = candidates.tiers[0]
    document: dict[str, Any] = {
        "version": SCHEMA_VERSION,
        "name": keys.pool,
        "tiers": [_tier(keys, tier) for tier in candidates.tiers],
        "accelerated": candidates.accelerated,
        "capacity": keys.capacity,
        "sides": keys.sides,
        "routes": keys.routes,
        "wake": wake_channel(keys.prefix),
        "margin": MARGIN,
        "back": RETURN,
        "shortest_seconds": SHORTEST_SECONDS,
        "patience": PATIENCE_SECONDS,
        "presence_life": PRESENCE_LIFE_MS,
        "lease_life": LEASE_MS,
        "job_life": JOB_LIFE_SECONDS,
        "idempotency_life": IDEMPOTENCY_LIFE_SECONDS,
        "message_limit": MESSAGE_LIMIT_BYTES,
    }
    if candidates.reason:
        document["reason"] = candidates.reason
    if wanted or first.accelerated:
        document["wanted"] = _tier(keys, wanted or first)
    return json.dumps(document)


def _tier(keys: Keyspace, tier: TierPolicy) -> dict[str, Any]:
    return {
        "name": tier.name,
        "queue": tier.queue,
        "lists": keys.queue_lists(tier.queue),
        "unacked": keys.unacked(tier.name),
        "slots": keys.slots(tier.name),
        "waiting": keys.waiting(tier.name),
        "scheduled": keys.scheduled(tier.name),
        "leases": keys.leases(tier.name),
        "service": keys.service(tier.name),
        "served": keys.served(tier.name),
        "assumed": assumed_seconds(accelerated=tier.accelerated),
        "spilled": keys.spilled(tier.name),
    }
