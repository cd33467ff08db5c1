"""How many replicas a tier should have: a pure rule that says why.

The rule (in order):

1. Without a reading the count stays where it is: unknown is not zero.
2. Demand is everything that wants a slot: waiting, in flight, and spilled away from this tier.
3. Up goes straight to need, from zero too.
4. Down waits until the need has stayed lower for as long as a new worker would take to start: an idle worker that is kept
   that long costs at most as much as starting another one (the ski-rental bound of DelayedOff: Gandhi, Harchol-Balter,
   Raghunathan, Kozuch, "AutoScale", ACM TOCS 30(4), 2012).
   Where nothing is remembered, after a start of the operator or an outage of the broker, what is ordered counts as the need.
5. The bounds of the pool hold last.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from workerpool_operator.observation import Unavailable

START_SECONDS_UNTIL_KNOWN = 30.0
"""Assumed start time of a worker before one has been seen to start."""

MIN_LINGER_SECONDS = 5.0
"""Never lower sooner than this: a gap between two uploads is not the end of a burst."""


class Reason(StrEnum):
    """Why a tier has the replicas it has: the closed list of conditions, Events, logs and metrics."""

    BROKER_UNREADABLE = "BrokerUnreadable"
    BACKLOG_EXCEEDS_CAPACITY = "BacklogExceedsCapacity"
    WAITING_TO_LOWER = "WaitingToLower"
    DEMAND_FELL = "DemandFell"
    AS_NEEDED = "AsNeeded"
    AT_MAXIMUM = "AtMaximum"
    AT_MINIMUM = "AtMinimum"
    PAUSED = "Paused"


@dataclass(frozen=True, slots=True)
class Policy:
    """The user's bounds and the slots of one replica."""

    minimum: int
    maximum: int
    concurrency: int = 1


@dataclass(frozen=True, slots=True)
class Demand:
    """What one tier is asked for now, and what it has.

    Attributes:
        waiting: messages in its queue.
        in_flight: messages that its workers hold.
        spilled: jobs that wanted it and wait or run elsewhere.
        replicas: the count that is ordered now.
        start_seconds: how long the newest worker took to start, None before one has.
    """

    waiting: int
    in_flight: int
    spilled: int
    replicas: int
    start_seconds: float | None = None

    @property
    def total(self) -> int:
        """Jobs that want a slot."""
        return self.waiting + self.in_flight + self.spilled


@dataclass(frozen=True, slots=True)
class Unread:
    """No reading of the demand; the count that is ordered now is all that is known."""

    replicas: int
    unavailable: Unavailable


@dataclass(frozen=True, slots=True)
class Memory:
    """What the rule remembers from pass to pass: recent needs as ``(time, replicas)``, falling in replicas, oldest first; at most
    the maximum and two of them.
    """

    needs: tuple[tuple[float, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Decision:
    """A replica count, why, the same in a sentence, and what to remember.

    ``needed`` is the need before the bounds: above ``replicas`` it means that the maximum limits the pool.
    """

    replicas: int
    reason: Reason
    message: str
    memory: Memory
    needed: int


def decide(policy: Policy, observed: Demand | Unread, memory: Memory, now: float) -> Decision:
    """Choose the replica count of one tier; the rule stands in the module's docstring.

    Args:
        policy: bounds, and slots per replica.
        observed: this pass's reading.
        memory: what the last decision returned.
        now: seconds, any clock that only moves forward.
    """
    if isinstance(observed, Unread):
        message = f"held at {observed.replicas}: {observed.unavailable.why}"
        return Decision(observed.replicas, Reason.BROKER_UNREADABLE, message, Memory(), observed.replicas)

    needed = math.ceil(observed.total / policy.concurrency)
    linger = max(MIN_LINGER_SECONDS, START_SECONDS_UNTIL_KNOWN if observed.start_seconds is None else observed.start_seconds)
    needs = _remember(memory.needs or ((now, observed.replicas),), min(needed, policy.maximum), now, linger)
    replicas = min(max(needs[0][1], policy.minimum), policy.maximum)
    reason = _reason(policy, observed, needed, replicas)
    return Decision(replicas, reason, _sentence(observed, reason, needed, replicas, linger), Memory(needs), needed)


def _remember(needs: tuple[tuple[float, int], ...], needed: int, now: float, linger: float) -> tuple[tuple[float, int], ...]:
    """The needs that a later, lower one has not outlived; the first is the highest of the last ``linger`` seconds."""
    recent = [(at, n) for at, n in needs if now - at <= linger and n > needed]
    return (*recent, (now, needed))


def _reason(policy: Policy, observed: Demand, needed: int, replicas: int) -> Reason:
    if needed > policy.maximum:
        return Reason.AT_MAXIMUM
    if replicas < observed.replicas:
        return Reason.DEMAND_FELL
    if replicas > max(needed, policy.minimum):
        return Reason.WAITING_TO_LOWER
    if needed < policy.minimum:
        return Reason.AT_MINIMUM
    return Reason.BACKLOG_EXCEEDS_CAPACITY if replicas > observed.replicas else Reason.AS_NEEDED


def _sentence(observed: Demand, reason: Reason, needed: int, replicas: int, linger: float) -> str:
    wants = f"{observed.waiting} waiting + {observed.in_flight} in flight"
    if observed.spilled:
        wants += f" + {observed.spilled} spilled"
    tail = {
        Reason.WAITING_TO_LOWER: f"; lowers when the need has stayed lower for {linger:.0f} s",
        Reason.AT_MAXIMUM: "; the maximum limits it",
        Reason.AT_MINIMUM: "; the minimum holds it",
    }.get(reason, "")
    return f"{wants} need {needed}, ordered {replicas}{tail}"
