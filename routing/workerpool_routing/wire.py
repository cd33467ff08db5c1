"""What API pods, workers and the operator say to one another through Redis: every key, format and version.

Nothing else in the project spells a key. Times are milliseconds of the Redis server's clock, so the clocks of the hosts do not
matter. Only the ETA and the deadline in a message are by the clock of the caller's host: Celery sets them. The module does no
I/O: it builds names and parses values.

Keys of a pool start with ``<global_keyprefix>workerpool:<namespace>/<name>:``.

========================  ======  =====================================================================================
key                       type    meaning
========================  ======  =====================================================================================
``policy``                string  JSON, :class:`Policy`; written by the operator
``capacity``              string  JSON, :class:`Capacity`; written by the operator each tick, expires by itself
``presence:<tier>``       hash    owner → JSON, :class:`Presence`; an entry older than the presence life is a lost worker
``slots:<tier>``          zset    ``owner/n`` for each slot of each consuming worker → time of its last report
``held:<owner>``          set     task ids that the worker has claimed and not ended
``job:<task id>``         hash    the ledger entry, see :mod:`workerpool_routing.ledger`
``spilled:<tier>``        zset    task ids that wanted the tier and wait or run elsewhere → time of admission
``routes``                hash    ``<tier>:<reason>`` → decisions so far
``waiting:<tier>``        zset    task ids that are on their way to a worker → time of admission, or ETA; where the sweep looks
``scheduled:<tier>``      string  messages with a future ETA that workers hold, to be subtracted from what is in flight
``leases:<tier>``         zset    leases of jobs whose message is not yet in the queue → when each of them expires
``idempotent:<key>``      hash    the decision that the first caller with that key got
``service:<tier>``        hash    task → mean seconds from claim to end, an EWMA of weight 0.2; written when a job has ended
``sides``                 hash    task → 1 while its jobs spill because the wait is too long
``served:<tier>``         hash    ``jobs``, ``seconds``, ``squares``: attempts so far, their time on a slot and the squares of it;
                                  ``succeeded``: those that ended well; ``mean``: seconds of the last hundred or so, of any task
``attempts:<tier>``       hash    ``succeeded``, ``failed``: how those that began after ``since`` have ended; ``confirmed``,
                                  ``refuted``: of those that failed, what their jobs came to on another tier; it begins anew when
                                  the checkpoint has another ``since``; written by the scripts that end attempts and nobody else
``checkpoint:<tier>``     hash    what the operator keeps for its next pass, and for the operator after it; written by it alone:
                                  ``state``, ``at``, ``opened``, ``since``, ``older``: the circuit breaker; ``succeeded``,
                                  ``failed``, ``confirmed``, ``refuted``: what counts no more of ``attempts:<tier>``;
                                  ``start_seconds``: how long a worker takes to start
``outlier:<owner>``       hash    of a worker whose attempts have failed since one went well: ``row``: how many of their jobs
                                  succeeded on another tier; ``beside``: ``succeeded`` of its tier when it began; ``times``,
                                  ``till``: how often it was ejected, and until when; ``again``: it has failed since
``waits:<tier>``          hash    ``jobs``, ``seconds``, ``expected``, ``right``: first starts so far, their waits, what admission
                                  expected these to be, and how many of them were so, see :data:`ledger.AS_EXPECTED_PART`
``drain``                 set     workers (by name) that are to stop consuming; written by the operator, expires by itself
``aside``                 hash    task id → JSON: a message or entry that nobody could read, and why; for people
``aside:at``              zset    the same task ids → when; the last thousand are kept
``aside:count``           string  how many were ever set aside
========================  ======  =====================================================================================

An *owner* is one life of a worker process: the worker's name and a suffix of its own, so that a container that restarts under
the same pod name is not taken for the one that died.

Beside them: the pub/sub channel :func:`wake_channel`, a hint for the operator, and one set of in-flight keys per tier in Kombu's
own format (:func:`unacked_keys`).
"""

from __future__ import annotations

import json
import re
from bisect import bisect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NewType

SCHEMA_VERSION = 1

PRESENCE_LIFE_MS = 8_000
"""A worker that has not reported for this long is lost."""

PRESENCE_PERIOD_SECONDS = 1.0
"""How often a worker reports."""

MARK_LIFE_MS = 30_000
"""A mark to drain that no operator renews runs out after this long: the worker then consumes again."""

CAPACITY_LIFE_MS = 10_000
"""Capacity expires after this long; from then on no slot counts as on its way."""

JOB_LIFE_SECONDS = 86_400
"""How long the ledger keeps a job after its last transition, or after its ETA."""

ENDED_JOB_LIFE_SECONDS = 3_600
"""How long the ledger keeps a job that has ended."""

LEASE_MS = 3_000
"""How long a job counts on the tier that was chosen for it before its message is in the queue, at most."""

IDEMPOTENCY_LIFE_SECONDS = 86_400
"""For how long a second call with the same idempotency key gets the decision of the first; with an ETA, from then on."""

MESSAGE_LIMIT_BYTES = 65_536
"""Until a job is claimed, the ledger keeps its message, to publish it again if it gets lost; but it keeps no longer one."""

VISIBILITY_TIMEOUT_SECONDS = 60
"""A message that nobody has renewed for this long is delivered again: the last resort, if no operator takes over before."""

PRIORITY_SEPARATOR = "\x06\x16"
"""Between queue name and priority step, as in ``kombu.transport.redis.Channel.sep``."""

PRIORITY_STEPS = (0, 3, 6, 9)
"""Kombu's default ``priority_steps``."""

HEADER = "workerpool"
"""The message header that carries what a worker must know: ``{"attempt": 1}``; callers put routing wishes there too."""

ENV_POOL = "WORKERPOOL_POOL"
ENV_TIER = "WORKERPOOL_TIER"
ENV_WORKER = "WORKERPOOL_WORKER"
ENV_QUEUE = "WORKERPOOL_QUEUE"
ENV_CONCURRENCY = "WORKERPOOL_CONCURRENCY"
ENV_BROKER_URL = "CELERY_BROKER_URL"
ENV_GRACE = "WORKERPOOL_GRACE_SECONDS"
"""From SIGTERM to SIGKILL; the worker gives back what it cannot finish a little before."""

ENV_PROBES = "WORKERPOOL_PROBES"
"""A directory for the files that probes look at: ``alive`` and ``ready``. Unset: none are written."""

TIER_NAME = "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
TIER_NAME_LENGTH = 30
"""What may be the name of a tier: it is a part of the names of keys, and of its Deployment."""

Milliseconds = NewType("Milliseconds", int)
Wish = Literal[True, False, "required"]
"""Whether a job asked for an accelerator; a required one never runs elsewhere."""


class VersionMismatch(ValueError):
    """The other side speaks a schema version that this side does not know."""


@dataclass(frozen=True, slots=True)
class Keyspace:
    """The names of one pool's keys on one broker.

    Args:
        pool: ``namespace/name``.
        prefix: Kombu's ``global_keyprefix``.
        priority_steps: Kombu's ``priority_steps``.
    """

    pool: str
    prefix: str = ""
    priority_steps: tuple[int, ...] = PRIORITY_STEPS

    def _own(self, thing: str) -> str:
        return f"{self.prefix}workerpool:{self.pool}:{thing}"

    @property
    def policy(self) -> str:
        return self._own("policy")

    @property
    def capacity(self) -> str:
        return self._own("capacity")

    @property
    def routes(self) -> str:
        return self._own("routes")

    def presence(self, tier: str) -> str:
        return self._own(f"presence:{tier}")

    def slots(self, tier: str) -> str:
        return self._own(f"slots:{tier}")

    def spilled(self, tier: str) -> str:
        return self._own(f"spilled:{tier}")

    def served(self, tier: str) -> str:
        return self._own(f"served:{tier}")

    def attempts(self, tier: str) -> str:
        return self._own(f"attempts:{tier}")

    def checkpoint(self, tier: str) -> str:
        return self._own(f"checkpoint:{tier}")

    def outlier(self, owner: str) -> str:
        return self._own(f"outlier:{owner}")

    def waits(self, tier: str) -> str:
        return self._own(f"waits:{tier}")

    @property
    def drain(self) -> str:
        return self._own("drain")

    @property
    def aside(self) -> str:
        return self._own("aside")

    @property
    def aside_at(self) -> str:
        return self._own("aside:at")

    @property
    def aside_count(self) -> str:
        return self._own("aside:count")

    def held(self, owner: str) -> str:
        return self._own(f"held:{owner}")

    def job(self, task_id: str) -> str:
        return self._own(f"job:{task_id}")

    def waiting(self, tier: str) -> str:
        return self._own(f"waiting:{tier}")

    def scheduled(self, tier: str) -> str:
        return self._own(f"scheduled:{tier}")

    def leases(self, tier: str) -> str:
        return self._own(f"leases:{tier}")

    def idempotent(self, key: str) -> str:
        return self._own(f"idempotent:{key}")

    def service(self, tier: str) -> str:
        return self._own(f"service:{tier}")

    @property
    def sides(self) -> str:
        return self._own("sides")

    def queue_lists(self, queue: str) -> list[str]:
        """The Redis lists of a queue, one per priority step, most urgent first."""
        return [self.queue_list(queue, step) for step in self.priority_steps]

    def queue_list(self, queue: str, priority: int) -> str:
        """The list that Kombu uses for a message of this priority (0 is the most urgent)."""
        step = self.priority_steps[self.step(priority)]
        return f"{self.prefix}{queue}{PRIORITY_SEPARATOR}{step}" if step else f"{self.prefix}{queue}"

    def step(self, priority: int) -> int:
        """Which of :meth:`queue_lists` takes a message of this priority."""
        return (bisect(self.priority_steps, priority) - 1) % len(self.priority_steps)

    def unacked(self, tier: str) -> str:
        """The hash of messages that workers of the tier hold: delivery tag → JSON ``[message, "", queue]``."""
        return self.prefix + unacked_keys(self.pool, tier)["unacked_key"]

    @property
    def plain_unacked(self) -> str:
        """The hash of messages that workers without the library hold, of all queues of the database."""
        return f"{self.prefix}unacked"

    def unacked_index(self, tier: str) -> str:
        """The sorted set of the same tags by time of delivery (seconds)."""
        return self.prefix + unacked_keys(self.pool, tier)["unacked_index_key"]


def unacked_keys(pool: str, tier: str) -> dict[str, str]:
    """Kombu transport options that give a tier in-flight keys of its own (Kombu adds ``global_keyprefix`` itself)."""
    own = f"workerpool:{pool}:unacked:{tier}"
    return {"unacked_key": own, "unacked_index_key": f"{own}:index", "unacked_mutex_key": f"{own}:mutex"}


def wake_channel(prefix: str = "") -> str:
    """The pub/sub channel on which admission names the pool that has work, one per broker."""
    return f"{prefix}workerpool:wake"


@dataclass(frozen=True, slots=True)
class TierPolicy:
    """What the library must know of a tier.

    Attributes:
        name: as in the WorkerPool resource; a worker is told it as ``WORKERPOOL_TIER``. Any other than :data:`TIER_NAME` is a
            ValueError.
        queue: the Celery queue that its workers, and nobody else, consume.
        accelerated: whether its workers have an accelerator.
        concurrency: jobs that one of its workers runs at a time.
    """

    name: str
    queue: str
    accelerated: bool
    concurrency: int = 1

    def __post_init__(self) -> None:
        if len(self.name) > TIER_NAME_LENGTH or not re.fullmatch(TIER_NAME, self.name):
            raise ValueError(
                f"the name of a tier is {self.name!r}; give lower-case letters, digits and dashes, no dash first or last, and at "
                f"most {TIER_NAME_LENGTH} of them"
            )


@dataclass(frozen=True, slots=True)
class TaskPolicy:
    """A shell pattern on task names, and the wish of the jobs it matches."""

    name: str
    accelerated: Wish = True


@dataclass(frozen=True, slots=True)
class Policy:
    """The routing half of a WorkerPool, as the operator publishes it; tiers in order of preference.

    ``max_wait_seconds``: beyond this expected wait a job is refused; None: never. ``removed``: tiers that were taken out of it
    and still have workers; no job is sent there, and those that are there end as on any other.
    """

    tiers: tuple[TierPolicy, ...]
    accelerated_content_types: tuple[str, ...] = ("audio", "video", "image")
    tasks: tuple[TaskPolicy, ...] = ()
    fallback_on_failure: bool = True
    fallback_on_loss: bool = True
    max_wait_seconds: int | None = None
    removed: tuple[TierPolicy, ...] = ()

    def tier(self, name: str) -> TierPolicy | None:
        """The tier of that name, a removed one too."""
        return next((tier for tier in (*self.tiers, *self.removed) if tier.name == name), None)

    def accelerated_tier(self) -> TierPolicy | None:
        """The preferred tier with an accelerator."""
        return next((tier for tier in self.tiers if tier.accelerated), None)

    def plain_tier(self) -> TierPolicy | None:
        """The preferred tier without an accelerator."""
        return next((tier for tier in self.tiers if not tier.accelerated), None)

    def dump(self) -> str:
        """As JSON, with the schema version."""
        return _dump(asdict(self))

    @classmethod
    def load(cls, raw: str | bytes) -> Policy:
        """Parse JSON; raises :class:`VersionMismatch` or ValueError."""
        with _loading(raw, "policy") as data:
            return cls(
                tiers=tuple(TierPolicy(**tier) for tier in data["tiers"]),
                accelerated_content_types=tuple(data["accelerated_content_types"]),
                tasks=tuple(TaskPolicy(**task) for task in data["tasks"]),
                fallback_on_failure=data["fallback_on_failure"],
                fallback_on_loss=data["fallback_on_loss"],
                max_wait_seconds=data["max_wait_seconds"],
                removed=tuple(TierPolicy(**tier) for tier in data.get("removed", ())),
            )


@dataclass(frozen=True, slots=True)
class StartingSlots:
    """Slots that were ordered, at least one, and Redis's time at which they are expected to be ready."""

    slots: int
    ready_at: Milliseconds


@dataclass(frozen=True, slots=True)
class TierCapacity:
    """Slots of a tier that presence cannot show.

    Attributes:
        starting: those that are on their way, soonest first; a handful of groups, however many workers start.
        startable: those that may still be ordered, as many as it takes to start jobs within ``target_seconds``.
        start_seconds: how long these take once they are ordered; no slot that is on its way takes longer.
        target_seconds: the wait that the operator orders for; where starting takes longer, that.
        unschedulable: those that were ordered and find no place.
        limit: how many jobs the tier may have at once while its attempts fail; None while they do not.
    """

    starting: tuple[StartingSlots, ...] = ()
    startable: int = 0
    start_seconds: float = 0.0
    target_seconds: float = 0.0
    unschedulable: int = 0
    limit: int | None = None

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> TierCapacity:
        """From the fields of its JSON; whatever does not fit is a KeyError or TypeError."""
        return cls(**{**fields, "starting": tuple(StartingSlots(**group) for group in fields["starting"])})


@dataclass(frozen=True, slots=True)
class Capacity:
    """What the operator has ordered, per tier. Absent or expired means: nothing is on its way."""

    tiers: Mapping[str, TierCapacity] = field(default_factory=dict)

    def dump(self) -> str:
        """As JSON, with the schema version."""
        return _dump(asdict(self))

    @classmethod
    def load(cls, raw: str | bytes) -> Capacity:
        """Parse JSON; raises :class:`VersionMismatch` or ValueError."""
        with _loading(raw, "capacity") as data:
            return cls(tiers={name: TierCapacity.of(tier) for name, tier in data["tiers"].items()})


@dataclass(frozen=True, slots=True)
class Presence:
    """One worker's last report.

    Attributes:
        owner: the worker life.
        worker: its name, under which it is marked to drain.
        slots: how many jobs it runs at a time; 0 while it is draining, leaving or ejected.
        busy: how many jobs it holds.
        since: when it first reported.
        at: when it reported last.
        scheduled: how many messages with a future ETA it holds; these are neither busy nor in flight.
        draining: whether it has stopped consuming because it is marked.
        ejected: whether it takes no jobs for a while because its attempts fail and those of others succeed.
    """

    owner: str
    worker: str
    tier: str
    queue: str
    slots: int
    busy: int
    since: Milliseconds
    at: Milliseconds
    scheduled: int = 0
    draining: bool = False
    ejected: bool = False

    def alive(self, now: Milliseconds) -> bool:
        """Whether it has reported within the presence life."""
        return now - self.at < PRESENCE_LIFE_MS

    @classmethod
    def load(cls, raw: str | bytes) -> Presence:
        """Parse what ``presence.lua`` wrote; raises :class:`VersionMismatch` or ValueError."""
        with _loading(raw, "presence") as data:
            return cls(**data)


def _dump(data: dict[str, Any]) -> str:
    return json.dumps({"version": SCHEMA_VERSION, **data}, separators=(",", ":"))


@contextmanager
def _loading(raw: str | bytes, what: str) -> Iterator[dict[str, Any]]:
    """The fields of a JSON object of this schema version; whatever does not fit them is a ValueError."""
    try:
        data = json.loads(raw)
        version = data.pop("version", None)
        if version != SCHEMA_VERSION:
            raise VersionMismatch(
                f"{what} has schema version {version!r}, this side knows {SCHEMA_VERSION}: use one release on both sides"
            )
        yield data
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{what} is not as schema version {SCHEMA_VERSION} has it: {error!r}") from error


def rewrite(message: Mapping[str, Any], *, queue: str, attempt: int, delivery_tag: str) -> dict[str, Any]:
    """The same Celery message for another queue and attempt, under a fresh delivery tag.

    Args:
        message: the JSON object that Kombu stores in a queue list or as the first item of an ``unacked`` value.
        queue: the queue that it goes to.
        attempt: the number of the attempt that will claim it.
        delivery_tag: minted by the caller; a late acknowledgement of the old delivery then touches nothing.
    """
    headers = dict(message.get("headers") or {})
    headers[HEADER] = {**carried(headers), "attempt": attempt}
    properties = dict(message["properties"])
    properties["delivery_tag"] = delivery_tag
    properties["delivery_info"] = {**properties.get("delivery_info", {}), "exchange": "", "routing_key": queue}
    return {**message, "headers": headers, "properties": properties}


def carried(headers: object) -> Mapping[str, Any]:
    """The fields of the :data:`HEADER` among a message's headers; none if it is missing, or is not an object."""
    own = headers.get(HEADER) if isinstance(headers, Mapping) else None
    return own if isinstance(own, Mapping) else {}


def retries_of(said: object) -> int:
    """The number of retries that a message states; 0 if that is not a number."""
    try:
        return int(said)  # type: ignore[call-overload,no-any-return]
    except (OverflowError, TypeError, ValueError):
        return 0


def priority_of(message: Mapping[str, Any]) -> int:
    """The message's priority as Kombu reads it: 0 (most urgent) to 9, 0 when it has none."""
    try:
        return min(max(int(message["properties"]["priority"]), 0), 9)
    except (KeyError, TypeError, ValueError):
        return 0
