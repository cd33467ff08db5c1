"""The states of a job, and who may change them.

``admitted → claimed(tier, attempt, owner) → finishing → done | failed | expired``. Every step is one Lua script that compares
before it sets, so that of all who see an attempt end exactly one acts on it. An attempt is named by its number and by the
delivery tag under which it was claimed; whoever still holds an older pair changes nothing.

The module does no I/O: it names the scripts, builds their arguments and reads what they leave, for the workers (blocking) and
for the operator (asyncio) alike.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from importlib.resources import files

from workerpool_routing.decide import Reason
from workerpool_routing.wire import (
    ENDED_JOB_LIFE_SECONDS,
    JOB_LIFE_SECONDS,
    SCHEMA_VERSION,
    Keyspace,
    Milliseconds,
    Policy,
    TierPolicy,
    VersionMismatch,
    priority_of,
    rewrite,
    wake_channel,
)

LOSSES_ALLOWED = 1
"""How often a job that cannot move on is delivered again after its worker was lost; the next loss is final."""


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


@dataclass(frozen=True, slots=True)
class Job:
    """One ledger entry.

    Attributes:
        attempt: 1 for the first; one more for each fallback.
        tier: where it waits or runs.
        wanted: the tier that it asked for.
        required: whether it may run nowhere else.
        reason: why it is on its tier.
        owner: the worker life that has claimed it, empty between attempts.
        tag: the delivery tag under which it was claimed.
        losses: how often its worker was lost on a tier that it could not leave.
        starts: how often each tier started it.
        times: milliseconds of Redis's clock at which it entered a state.
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

    @classmethod
    def load(cls, task_id: str, stored: Mapping[str, str]) -> Job | None:
        """Parse the hash; None when there is no entry; raises :class:`~workerpool_routing.wire.VersionMismatch`."""
        if not stored.get("state"):
            return None
        if stored.get("version") != str(SCHEMA_VERSION):
            raise VersionMismatch(f"job {task_id} has schema version {stored.get('version')}, this side knows {SCHEMA_VERSION}")
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
        )


@dataclass(frozen=True, slots=True)
class Move:
    """Another run: where, as which attempt, and why."""

    tier: TierPolicy
    attempt: int
    reason: Reason


def after_failure(policy: Policy, job: Job) -> Move | None:
    """What follows when an attempt raised or ran over its time: one more on the plain tier, or None, the failure is final."""
    fallback = _fallback(policy, job) if policy.fallback_on_failure else None
    return Move(fallback, job.attempt + 1, Reason.ATTEMPT_FAILED) if fallback else None


def after_loss(policy: Policy, job: Job) -> Move | None:
    """What follows when a worker is gone: the plain tier, or once more on its own; None when its tier is no longer in the
    policy.
    """
    fallback = _fallback(policy, job) if policy.fallback_on_loss else None
    if fallback:
        return Move(fallback, job.attempt + 1, Reason.ATTEMPT_LOST)
    own = policy.tier(job.tier)
    return Move(own, job.attempt, Reason.ATTEMPT_LOST) if own else None


def _fallback(policy: Policy, job: Job) -> TierPolicy | None:
    tier = policy.tier(job.tier)
    return policy.plain_tier() if tier and tier.accelerated and not job.required else None


def script(name: str) -> str:
    """The text of ``lua/<name>.lua``."""
    return files("workerpool_routing").joinpath("lua", f"{name}.lua").read_text()


@dataclass(frozen=True, slots=True)
class Call:
    """Keys and arguments of one script."""

    keys: Sequence[str]
    args: Sequence[str | int]


def claim(
    keys: Keyspace,
    task_id: str,
    *,
    attempt: int,
    tag: str,
    owner: str,
    tier: str,
    retries: int,
    moves_on: bool,
    no_result: bool,
    name: str,
) -> Call:
    """Arguments of ``claim.lua``: a delivery asks to run its job.

    Args:
        keys: the pool's.
        task_id: the job.
        attempt: as the message says it.
        tag: of this delivery.
        owner: the worker life that asks.
        tier: its tier.
        retries: Celery's count of the retries that the task's author asked for.
        moves_on: whether a loss on this tier takes the job to another one.
        no_result: whether an attempt found finishing is known to have stored nothing.
        name: of this request; the same again, when its answer was lost, gets the same answer.
    """
    return Call(
        [keys.job(task_id), keys.held(owner)],
        [
            task_id,
            attempt,
            tag,
            owner,
            tier,
            retries,
            LOSSES_ALLOWED,
            JOB_LIFE_SECONDS,
            int(moves_on),
            int(no_result),
            name,
        ],
    )


def settle(
    keys: Keyspace, policy: Policy, task_id: str, *, attempt: int, tag: str, owner: str, before: State, after: State
) -> Call:
    """Arguments of ``settle.lua``: an attempt enters its next state, if it is still the one that counts."""
    life = ENDED_JOB_LIFE_SECONDS if after.ended else JOB_LIFE_SECONDS
    spilled = [keys.spilled(tier.name) for tier in policy.tiers]
    # The script alone knows the tier of the attempt, and ends the name of the key with it.
    return Call([keys.job(task_id), keys.held(owner), *spilled], [task_id, attempt, tag, before, after, life, keys.served("")])


def move(keys: Keyspace, job: Job, to: Move, *, held_as: str, raw: str, delivery_tag: str) -> Call:
    """Arguments of ``move.lua``: the message leaves the in-flight keys for the head of a queue.

    Args:
        keys: the pool's.
        job: as the caller has read it; the script refuses when that is no longer so.
        to: from :func:`after_failure` or :func:`after_loss`.
        held_as: the delivery tag under which the message is in flight (of the caller's own delivery, or the lost one).
        raw: the value under that tag, as Kombu wrote it.
        delivery_tag: a fresh one.
    """
    message = json.loads(raw)[0]
    renewed = rewrite(message, queue=to.tier.queue, attempt=to.attempt, delivery_tag=delivery_tag)
    return Call(
        [
            keys.job(job.task_id),
            keys.held(job.owner),
            keys.unacked(job.tier),
            keys.unacked_index(job.tier),
            keys.queue_list(to.tier.queue, priority_of(message)),
            keys.routes,
        ],
        [
            job.task_id, job.attempt, job.tag, held_as, to.attempt, to.tier.name, to.reason, int(to.tier.name == job.tier),
            json.dumps(renewed), wake_channel(keys.prefix), keys.pool, JOB_LIFE_SECONDS,
        ],
    )  # fmt: skip


def leave(keys: Keyspace, tier: str, owner: str) -> Call:
    """Arguments of ``leave.lua``: a worker life is over and nothing of it is left to take over."""
    return Call([keys.presence(tier), keys.slots(tier), keys.held(owner)], [owner])
