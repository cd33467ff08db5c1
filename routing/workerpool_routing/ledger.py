"""The states of a job, and who may change them.

``admitted → claimed(tier, attempt, owner) → finishing → done | failed | expired``. Every step is one Lua script that compares
before it sets, so that of all processes that see an attempt end exactly one acts on it. An attempt is named by its number and by
the delivery tag under which it was claimed; a process that still holds an older pair changes nothing.

The module does no I/O. It names the scripts, builds their arguments and parses their entries, both for the workers (blocking) and
for the operator (asyncio).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from importlib.resources import files

from workerpool_routing.decide import Reason
from workerpool_routing.wire import (
    ENDED_JOB_LIFE_SECONDS,
    JOB_LIFE_SECONDS,
    MESSAGE_LIMIT_BYTES,
    SCHEMA_VERSION,
    Keyspace,
    Milliseconds,
    Policy,
    TierPolicy,
    VersionMismatch,
    carried,
    priority_of,
    retries_of,
    rewrite,
    wake_channel,
)

LOSSES_ALLOWED = 1
"""How often a job that cannot move to another tier is delivered again after its worker was lost; the next loss is final."""

EJECTED_AFTER = 3
"""A worker is ejected when, since its last success, so many of its attempts have failed whose jobs then succeeded on another
tier, and at least as many attempts of the other workers of its tier have succeeded."""

EJECTION_MS = 30_000
"""How long the first ejection lasts. If the worker fails again after it, the next one lasts twice as long."""

LONGEST_EJECTION_MS = 600_000
"""No ejection lasts longer, so that a worker that works again is noticed."""

MARKED, EJECTED = 1, 2
"""Flags in the answer of ``presence.lua``."""

AS_EXPECTED_SECONDS, AS_EXPECTED_PART = 2.0, 0.25
"""A wait was as expected if it differs from the expected one by at most so many seconds, or by this part of the real one."""

ERROR_CHARACTERS = 1_000
"""How much of an error's text the ledger keeps."""

MISSING_MS = 4_000
"""A message that is in no queue and in no worker for so long is lost: its worker died after taking it, before recording it."""

ASIDE_KEPT = 1_000
"""Of what was set aside, only the latest so many are kept; all are counted."""

REPUBLISHED_AT_MOST = 2
"""How often a job that nobody claims is published again. To lose its message more often, as many workers would have to die in the
millisecond between taking and recording it. More likely, workers without a fence run the job each time."""

PLACES = 100
"""A job that moves to another queue finds its place, by age, among so many messages at the head of that queue."""

PLACES_BYTES = 262_144
"""Fewer, where they would be longer than this together: Redis serves nobody while it looks at them."""


class State(StrEnum):
    """Where a job stands."""

    ADMITTED = "admitted"
    CLAIMED = "claimed"
    FINISHING = "finishing"
    DONE = "done"
    FAILED = "failed"
    EXPIRED = "expired"

    @property
    def ended(self) -> bool:
        """Whether nothing can change it any more."""
        return self in (State.DONE, State.FAILED, State.EXPIRED)


class Claim(StrEnum):
    """The answer of ``claim.lua`` to a delivery."""

    RUN = "run"
    UNKNOWN = "unknown"
    ENDED = "ended"
    STALE = "stale"
    LOST = "lost"
    FINISHING = "finishing"
    POISON = "poison"
    CORRUPT = "corrupt"


@dataclass(frozen=True, slots=True)
class Run:
    """One start of a job. ``how`` it ended (in a word) and ``error`` are empty while it runs; times are Redis milliseconds."""

    attempt: int
    tier: str
    owner: str
    began: Milliseconds
    ended: Milliseconds | None = None
    how: str = ""
    error: str = ""


class CorruptEntry(ValueError):
    """A ledger entry that no release of this library has written."""


@dataclass(frozen=True, slots=True)
class Job:
    """One ledger entry.

    Attributes:
        attempt: 1 for the first; one more for each fallback.
        tier: where it waits or runs.
        wanted: the tier that it asked for.
        required: whether it may run nowhere else.
        reason: why it is on its tier.
        owner: the worker life that has claimed it; empty between attempts.
        tag: the delivery tag under which it was claimed.
        losses: how often its worker was lost on a tier that it could not leave.
        starts: how often each tier has started it.
        times: when it entered each state, in milliseconds of Redis's clock.
        runs: every start, in order (the last sixteen), with the errors of all attempts.
        stays: whether it stays on its tier when its worker is lost, by a rule of its task or of its tier.
        message: the Celery message as Kombu queues it, while nobody has claimed the job; otherwise empty.
    """

    task_id: str
    task: str
    state: State
    attempt: int
    tier: str
    wanted: str
    required: bool
    reason: Reason
    owner: str = ""
    tag: str = ""
    losses: int = 0
    starts: Mapping[str, int] = field(default_factory=dict)
    times: Mapping[State, Milliseconds] = field(default_factory=dict)
    runs: Sequence[Run] = ()
    stays: bool = False
    message: str = ""

    @classmethod
    def load(cls, task_id: str, stored: Mapping[str, str]) -> Job | None:
        """Parse the entry's hash; None if there is no entry.

        Raises:
            VersionMismatch: another release has written it.
            CorruptEntry: no release can have written it.
        """
        if not stored.get("state"):
            return None
        if stored.get("version") != str(SCHEMA_VERSION):
            raise VersionMismatch(f"job {task_id} has schema version {stored.get('version')}, this side knows {SCHEMA_VERSION}")
        try:
            return cls._parse(task_id, stored)
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptEntry(f"the ledger entry of job {task_id} cannot be read: {error!r}") from error

    @classmethod
    def _parse(cls, task_id: str, stored: Mapping[str, str]) -> Job:
        last = int(stored.get("runs", 0))
        return cls(
            task_id=task_id,
            task=stored["task"],
            state=State(stored["state"]),
            attempt=int(stored["attempt"]),
            tier=stored["tier"],
            wanted=stored["wanted"],
            required=stored["required"] == "1",
            reason=Reason(stored["reason"]),
            owner=stored.get("owner", ""),
            tag=stored.get("tag", ""),
            losses=int(stored.get("losses", 0)),
            starts={key.partition(":")[2]: int(n) for key, n in stored.items() if key.startswith("starts:")},
            times={state: Milliseconds(int(stored[f"{state}_at"])) for state in State if f"{state}_at" in stored},
            runs=tuple(Run(**json.loads(stored[f"run:{n}"])) for n in range(1, last + 1) if f"run:{n}" in stored),
            stays=stored.get("stays") == "1",
            message=stored.get("message", ""),
        )


@dataclass(frozen=True, slots=True)
class Move:
    """Where a job runs next, as which attempt, and why."""

    tier: TierPolicy
    attempt: int
    reason: Reason


def after_failure(policy: Policy, job: Job) -> Move | None:
    """What follows when an attempt raised or exceeded its time limit: one more on the plain tier; None if it is final."""
    fallback = _fallback(policy, job) if policy.fallback_on_failure else None
    return Move(fallback, job.attempt + 1, Reason.ATTEMPT_FAILED) if fallback else None


def after_loss(policy: Policy, job: Job) -> Move | None:
    """What follows when an attempt's worker is lost: one more attempt on the plain tier, or the same attempt again on its own
    tier; None if its tier is no longer in the policy.
    """
    fallback = _fallback(policy, job) if policy.fallback_on_loss and not job.stays else None
    if fallback:
        return Move(fallback, job.attempt + 1, Reason.ATTEMPT_LOST)
    own = policy.tier(job.tier)
    return Move(own, job.attempt, Reason.ATTEMPT_LOST) if own else None


def _fallback(policy: Policy, job: Job) -> TierPolicy | None:
    tier = policy.tier(job.tier)
    return policy.plain_tier() if tier and tier.accelerated and not job.required else None


@cache
def script(name: str) -> str:
    """The text of ``lua/<name>.lua``, after that of ``lua/ending.lua`` if it ends an attempt."""
    names = ("ending", name) if name in ("move", "readmit", "settle") else (name,)
    return "".join(files("workerpool_routing").joinpath("lua", f"{one}.lua").read_text() for one in names)


@dataclass(frozen=True, slots=True)
class Call:
    """Keys and arguments of one script."""

    keys: Sequence[str]
    args: Sequence[str | bytes | int | float]


def fenced(name: str, task: object) -> bool:
    """Whether workers put the fence around a task: not if its author has set ``fenced = False``, or if it is Celery's own.

    ``task`` is None if only its name is known.
    """
    return bool(getattr(task, "fenced", True)) and not name.startswith("celery.")


def claim(
    keys: Keyspace, task_id: str, *, attempt: int, tag: str, owner: str, tier: str, retries: int, moves_on: bool, no_result: bool,
    name: str, scheduled: bool = False, asked_by: str = "",
) -> Call:  # fmt: skip
    """Arguments of ``claim.lua``: a delivery asks to run its job.

    Args:
        keys: the pool's.
        task_id: the job.
        attempt: its number, as in the message.
        tag: of this delivery.
        owner: the worker life that asks.
        tier: its tier.
        retries: Celery's count of the retries that the task's code asked for.
        moves_on: whether the job moves to another tier if it is lost on this one.
        no_result: if the entry is found ``finishing``: whether that attempt is known to have stored no result.
        name: of this request; when it is repeated because its answer was lost, it gets the same answer.
        scheduled: whether the caller asked for a time (ETA), so that its wait is not to be compared with the expected one.
        asked_by: the delivery tag of the attempt that asked for this retry; empty if the message is not a retry, or was
            published by a release without this field.
    """
    return Call(
        [keys.job(task_id), keys.held(owner), keys.waiting(tier), keys.unacked(tier), keys.waits(tier)],
        [task_id, attempt, tag, owner, tier, retries, LOSSES_ALLOWED, JOB_LIFE_SECONDS, int(moves_on), int(no_result),
            name, int(scheduled), asked_by, AS_EXPECTED_SECONDS, AS_EXPECTED_PART],
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Result:
    """A job's result, as its Celery backend keeps it on the same Redis server.

    Attributes:
        seconds: until it expires; 0 for never.
        database: None for the ledger's own. (Not every Redis user may change the database, and not every Redis has several.)
    """

    key: str | bytes
    value: str | bytes
    seconds: int
    database: int | None = None


def settle(
    keys: Keyspace, policy: Policy, task_id: str, *, attempt: int, tag: str, owner: str, tier: str, before: State, after: State,
    how: str = "", error: str = "", held_as: str = "", result: Result | None = None,
) -> Call:  # fmt: skip
    """Arguments of ``settle.lua``: an attempt ends, or enters ``finishing``, if it is still the one that counts.

    Args:
        keys: the pool's.
        policy: names all tiers.
        task_id: the job.
        attempt: its number.
        tag: the delivery tag under which it was claimed; empty if nobody has claimed it.
        owner: who has claimed it; empty if nobody has.
        tier: where it runs or waits.
        before: the state that it has to be in.
        after: the state that it enters.
        how: how its run ended, in a word; empty while it goes on.
        error: what it raised, if anything.
        held_as: the delivery tag of a message to acknowledge in the same step, whether or not the attempt counts.
        result: to be stored in the same step, if this attempt counts.
    """
    life = ENDED_JOB_LIFE_SECONDS if after.ended else JOB_LIFE_SECONDS
    spilled = [keys.spilled(tier.name) for tier in (*policy.tiers, *policy.removed)]
    return Call(
        [
            keys.job(task_id), keys.held(owner), keys.waiting(tier), keys.unacked(tier), keys.unacked_index(tier),
            keys.service(tier), keys.served(tier), keys.attempts(tier), keys.checkpoint(tier), keys.outlier(owner), *spilled,
        ],
        [task_id, attempt, tag, owner, before, after, life, JOB_LIFE_SECONDS, how, error[:ERROR_CHARACTERS], held_as,
            *([result.key, result.value, result.seconds, "" if result.database is None else result.database] if result else ())],
    )  # fmt: skip


def readmit(
    keys: Keyspace, task_id: str, *, attempt: int, tag: str, owner: str, tier: str, how: str, retries: int | None = None,
    message: str = "", queue: str = "", later: int = 0,
) -> Call:  # fmt: skip
    """Arguments of ``readmit.lua``: the task's code has asked for another run, by a retry or by rejecting the message.

    Args:
        keys: the pool's.
        task_id: the job.
        attempt: its number.
        tag: the delivery tag under which it was claimed.
        owner: who has claimed it.
        tier: where it ran.
        how: how its run ended, in a word.
        retries: the number of retries that the code has asked for by now; None if it has rejected the message.
        message: the retry's message as published, so that a sweep can publish it again if it gets lost; empty if it cannot.
        queue: the queue that the retry went to.
        later: in how many seconds the retry is due.
    """
    return Call(
        [keys.job(task_id), keys.held(owner), keys.waiting(tier)],
        [task_id, attempt, tag, owner, JOB_LIFE_SECONDS, how, "" if retries is None else retries, message, queue, later],
    )


def move(
    keys: Keyspace,
    job: Job,
    to: Move,
    *,
    held_as: str,
    raw: str,
    delivery_tag: str,
    how: str,
    error: str = "",
    counts: bool = True,
) -> Call:
    """Arguments of ``move.lua``: the message leaves the in-flight keys for the head of a queue.

    Args:
        keys: the pool's.
        job: as the caller has read it; the script does nothing if it has changed since.
        to: where it goes, from :func:`after_failure`, :func:`after_loss` or :func:`again`.
        held_as: the delivery tag under which the message is in flight: the caller's own delivery, or the lost one.
        raw: the value under that tag, as Kombu wrote it.
        delivery_tag: a fresh one.
        how: how the run ended, in a word.
        error: what it raised, if anything.
        counts: whether another run on the same tier counts as a loss; False if it was nobody's failure.
    """
    message = json.loads(raw)[0]
    renewed = rewrite(message, queue=to.tier.queue, attempt=to.attempt, delivery_tag=delivery_tag)
    renewed["headers"].pop("expires", None)  # a deadline is for the first start
    return Call(
        [
            keys.job(job.task_id), keys.held(job.owner), keys.unacked(job.tier), keys.unacked_index(job.tier),
            keys.queue_list(to.tier.queue, priority_of(message)), keys.routes, keys.waiting(to.tier.name),
            keys.attempts(job.tier), keys.checkpoint(job.tier), keys.served(job.tier), keys.outlier(job.owner),
        ],
        [
            job.task_id, job.attempt, job.tag, held_as, to.attempt, to.tier.name, to.reason,
            int(counts and to.tier.name == job.tier), json.dumps(renewed), wake_channel(keys.prefix), keys.pool, JOB_LIFE_SECONDS,
            to.tier.queue, how, error[:ERROR_CHARACTERS],
        ],
    )  # fmt: skip


def may_move(job: Job, source: TierPolicy, target: TierPolicy) -> bool:
    """Whether a job that waits on ``source`` may wait on ``target`` instead.

    It may if nobody has started it and it is not bound to its tier, and if the move is away from the accelerated tier that it
    asked for, or home again.
    """
    waits = job.state is State.ADMITTED and job.tier == source.name and not job.required and not job.runs
    leaves = job.tier == job.wanted and source.accelerated and not target.accelerated
    return waits and (leaves or target.name == job.wanted)


def rebalance(keys: Keyspace, job: Job, source: TierPolicy, target: TierPolicy, *, raw: str, delivery_tag: str) -> Call:
    """Arguments of ``rebalance.lua``: a waiting job goes to the queue of another tier, to its place by age.

    Args:
        keys: the pool's.
        job: as the caller has read it; the script does nothing if it has changed since.
        source: where it waits.
        target: where it goes.
        raw: its message, as it is in its list.
        delivery_tag: a fresh one.
    """
    message = json.loads(raw)
    priority = priority_of(message)
    renewed = rewrite(message, queue=target.queue, attempt=job.attempt, delivery_tag=delivery_tag)
    return Call(
        [
            keys.job(job.task_id), keys.queue_list(source.queue, priority), keys.queue_list(target.queue, priority),
            keys.waiting(source.name), keys.waiting(target.name), keys.spilled(job.wanted), keys.routes,
        ],
        [
            job.task_id, job.attempt, source.name, raw, json.dumps(renewed), target.name, target.queue, Reason.REBALANCED,
            JOB_LIFE_SECONDS, MESSAGE_LIMIT_BYTES, PLACES, PLACES_BYTES,
        ],
    )  # fmt: skip


def again(policy: Policy, job: Job) -> Move | None:
    """The same attempt on the same tier, for a worker that has to leave; None if the tier is no longer in the policy."""
    own = policy.tier(job.tier)
    return Move(own, job.attempt, job.reason) if own else None


def hold(keys: Keyspace, tier: str, *, tag: str, value: str) -> Call:
    """Arguments of ``hold.lua``: a worker has taken a message."""
    return Call([keys.unacked(tier), keys.unacked_index(tier)], [tag, value])


def check(keys: Keyspace, tier: str) -> Call:
    """Arguments of ``check.lua``: does Redis take writes."""
    return Call([keys.unacked_index(tier)], [])


def requeue(keys: Keyspace, tier: str, *, tag: str, raw: str, delivery_tag: str, unrecorded: bool = False) -> Call:
    """Arguments of ``requeue.lua``: a message that nobody has claimed, or that is finishing, is to be delivered again.

    Args:
        keys: the pool's.
        tier: the tier whose workers hold it.
        tag: the delivery tag under which it is in flight.
        raw: the value under that tag, as ``hold.lua`` has kept it: the message, "", and the queue that it came from.
        delivery_tag: a fresh one.
        unrecorded: whether it is put back even if it is not in flight: the worker that took it could not record it.
    """
    message, _, queue = json.loads(raw)
    properties = {**message["properties"], "delivery_tag": delivery_tag}
    renewed = {**message, "properties": properties, "headers": {**(message.get("headers") or {}), "redelivered": True}}
    list_name, headers = keys.queue_list(queue, priority_of(message)), message.get("headers") or {}
    task_id, attempt = str(headers.get("id")), carried(headers).get("attempt", "")
    return Call(
        [keys.unacked(tier), keys.unacked_index(tier), list_name, keys.job(task_id), keys.waiting(tier)],
        [tag, json.dumps(renewed), queue, task_id, attempt, tier, retries_of(headers.get("retries")), int(unrecorded)],
    )


def republish(keys: Keyspace, job: Job, tier: TierPolicy, *, delivery_tag: str) -> Call:
    """Arguments of ``republish.lua``: the job's message is nowhere."""
    message = json.loads(job.message)
    renewed = rewrite(message, queue=tier.queue, attempt=job.attempt, delivery_tag=delivery_tag)
    return Call(
        [keys.job(job.task_id), keys.queue_list(tier.queue, priority_of(message))],
        [job.attempt, json.dumps(renewed), MISSING_MS, wake_channel(keys.prefix), keys.pool, tier.name, REPUBLISHED_AT_MOST],
    )


def aside(keys: Keyspace, tier: str, task_id: str, *, tag: str, reason: str, message: str) -> Call:
    """Arguments of ``aside.lua``: set aside a message that nobody can read, or whose ledger entry nobody can read."""
    return Call(
        [keys.job(task_id), keys.unacked(tier), keys.unacked_index(tier), keys.aside, keys.aside_count, keys.aside_at],
        [task_id, tag, reason, message, ASIDE_KEPT],
    )


def leave(keys: Keyspace, tier: str, owner: str) -> Call:
    """Arguments of ``leave.lua``: a worker life is over, and it holds nothing that somebody has to take over."""
    return Call([keys.presence(tier), keys.slots(tier), keys.held(owner), keys.scheduled(tier), keys.outlier(owner)], [owner])


def report(keys: Keyspace, presence: Mapping[str, str | int | bool], tags: Sequence[str]) -> Call:
    """Arguments of ``presence.lua``: a worker reports that it lives and holds the deliveries of these ``tags``."""
    tier, owner = str(presence["tier"]), str(presence["owner"])
    return Call(
        [
            keys.presence(tier), keys.slots(tier), keys.unacked_index(tier), keys.scheduled(tier), keys.drain, keys.served(tier),
            keys.outlier(owner),
        ],
        [json.dumps({"version": SCHEMA_VERSION, **presence}), JOB_LIFE_SECONDS,
            EJECTED_AFTER, EJECTION_MS, LONGEST_EJECTION_MS, *tags],
    )  # fmt: skip
