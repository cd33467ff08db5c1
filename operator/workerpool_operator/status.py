"""The status of a pool: tiers, conditions, and the Events that say what has changed.

Pure: the previous status and the time go in, the next status comes out. Changed conditions, replicas and reasons are written at
once; if only numbers have changed, at most every :data:`NUMBERS_EVERY_SECONDS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from pydantic.alias_generators import to_camel

LONGEST_MESSAGE = 32_768
"""Characters that the API server takes as the message of a condition; it would refuse the whole status for one more."""

NUMBERS_EVERY_SECONDS = 10.0


class ConditionType(StrEnum):
    """The closed list of conditions; ``conditions.py`` has a function for each."""

    READY = "Ready"
    BROKER_REACHABLE = "BrokerReachable"
    CAPACITY_AVAILABLE = "CapacityAvailable"
    SPILLING = "Spilling"
    SCALING_LIMITED = "ScalingLimited"
    QUEUE_SHARED = "QueueShared"
    AUTOSCALER_CONFLICT = "AutoscalerConflict"
    GRACE_PERIOD_TOO_SHORT = "GracePeriodTooShort"
    DRAIN_OVERDUE = "DrainOverdue"
    TIER_BROKEN = "TierBroken"
    REBALANCING = "Rebalancing"
    DEFINITION_OUTDATED = "DefinitionOutdated"
    PAUSED = "Paused"


COMES_AND_GOES = {ConditionType.SPILLING, ConditionType.SCALING_LIMITED}
"""What a healthy pool is in and out of from one second to the next: True for :data:`HELD_SECONDS` at least, and no Event."""

HELD_SECONDS = 60.0

WARNS_WHEN = {
    ConditionType.READY: "False",
    ConditionType.BROKER_REACHABLE: "False",
    ConditionType.CAPACITY_AVAILABLE: "False",
    ConditionType.QUEUE_SHARED: "True",
    ConditionType.AUTOSCALER_CONFLICT: "True",
    ConditionType.GRACE_PERIOD_TOO_SHORT: "True",
    ConditionType.DRAIN_OVERDUE: "True",
    ConditionType.TIER_BROKEN: "True",
    ConditionType.DEFINITION_OUTDATED: "True",
}
"""The status of a condition that makes its Event a Warning."""


@dataclass(frozen=True, slots=True)
class Condition:
    """One condition, in Kubernetes' terms; ``status`` is "True", "False" or "Unknown"."""

    type: ConditionType
    status: str
    reason: str
    message: str
    observed_generation: int
    last_transition_time: str = ""


@dataclass(frozen=True, slots=True)
class TierStatus:
    """One tier at a glance; numbers that come from the broker are None if it could not be read."""

    name: str
    desired: int
    ready: int
    starting: int
    unschedulable: int
    draining: int
    waiting: int | None
    in_flight: int | None
    spilled: int | None
    reason: str
    message: str


_NUMBERS = ("waiting", "in_flight", "spilled", "message")


@dataclass(frozen=True, slots=True)
class Status:
    """What ``kubectl get wp`` and ``kubectl describe wp`` show.

    ``waiting``, ``in_flight`` and ``replicas`` sum up the tiers for the printer columns; ``replicas`` is ready/desired, such as
    ``gpu 1/2, cpu 3/3``.
    """

    observed_generation: int
    conditions: tuple[Condition, ...]
    tiers: tuple[TierStatus, ...]
    waiting: int | None
    in_flight: int | None
    replicas: str

    def dump(self) -> dict[str, Any]:
        """The status as the resource stores it; fields that are None are left out."""
        return {to_camel(name): _camel(value) for name, value in asdict(self).items() if value is not None}

    @classmethod
    def load(cls, stored: Mapping[str, Any]) -> Status | None:
        """Read the status as the resource stores it; None if none was written yet. Fields of another release are ignored."""
        if "observedGeneration" not in stored:
            return None
        tiers = [TierStatus(**_known(TierStatus, tier)) for tier in stored.get("tiers", ())]
        known = [c for c in stored.get("conditions", ()) if c.get("type") in list(ConditionType)]
        conditions = [replace(Condition(**_known(Condition, c)), type=ConditionType(c["type"])) for c in known]
        return replace(cls(**_known(cls, stored)), tiers=tuple(tiers), conditions=tuple(conditions))


@dataclass(frozen=True, slots=True)
class Event:
    """A Kubernetes Event about the pool."""

    warning: bool
    reason: str
    message: str


def rfc3339(now: float) -> str:
    """Wall-clock seconds as the API server writes times."""
    return datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def summary(tiers: Sequence[TierStatus]) -> str:
    """Ready/desired of each tier, in order of preference."""
    return ", ".join(f"{tier.name} {tier.ready}/{tier.desired}" for tier in tiers)


def total(numbers: Sequence[int | None]) -> int | None:
    """The sum; None if any part is unknown."""
    known = [number for number in numbers if number is not None]
    return sum(known) if len(known) == len(numbers) else None


def stamp(conditions: Sequence[Condition], previous: Mapping[str, Any], now: float) -> tuple[Condition, ...]:
    """Give each condition the time of its last transition: the stored one, or ``now`` if its status has changed."""
    stored = {condition.get("type"): condition for condition in previous.get("conditions", ())}
    stamped = []
    for condition in conditions:
        before = stored.get(condition.type, {})
        if _held(condition, before, now):
            condition = replace(condition, **{name: before[name] for name in ("status", "reason", "message")})
        kept = before.get("lastTransitionTime") if before.get("status") == condition.status else None
        message = condition.message[:LONGEST_MESSAGE]
        stamped.append(replace(condition, message=message, last_transition_time=kept or rfc3339(now)))
    return tuple(stamped)


def _held(condition: Condition, before: Mapping[str, str], now: float) -> bool:
    """Whether a condition that comes and goes has to stay True for now, as it was stored."""
    if condition.type not in COMES_AND_GOES or (before.get("status"), condition.status) != ("True", "False"):
        return False
    return now - datetime.fromisoformat(before["lastTransitionTime"]).timestamp() < HELD_SECONDS


def flips(status: Status, previous: Mapping[str, Any]) -> list[Event]:
    """One Event for each condition whose status has changed, and for each that is a warning from the start; none for those of
    :data:`COMES_AND_GOES`.
    """
    stored = {condition.get("type"): condition.get("status") for condition in previous.get("conditions", ())}
    events = []
    for condition in status.conditions:
        warning = WARNS_WHEN.get(condition.type) == condition.status
        changed = stored.get(condition.type) != condition.status
        if changed and condition.type not in COMES_AND_GOES and (warning or condition.type in stored):
            events.append(Event(warning, condition.reason, condition.message))
    return events


def worth_writing(status: Status, previous: Mapping[str, Any], since_last: float) -> bool:
    """Whether to write now: at once if more than numbers has changed, else every :data:`NUMBERS_EVERY_SECONDS`."""
    new = status.dump()
    if new == previous:
        return False
    return since_last >= NUMBERS_EVERY_SECONDS or _without_numbers(new) != _without_numbers(previous)


def _without_numbers(status: Mapping[str, Any]) -> dict[str, Any]:
    hidden = {to_camel(name) for name in _NUMBERS}
    tiers = [{k: v for k, v in tier.items() if k not in hidden} for tier in status.get("tiers", ())]
    conditions = [{k: v for k, v in c.items() if k != "message"} for c in status.get("conditions", ())]
    rest = {k: v for k, v in status.items() if k not in hidden}
    return {**rest, "tiers": tiers, "conditions": conditions}


def _known(kind: type[Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass, read by their stored names; those that are not stored are None."""
    return {one.name: stored.get(to_camel(one.name)) for one in fields(kind)}


def _camel(value: Any) -> Any:
    match value:
        case dict():
            return {to_camel(k): _camel(v) for k, v in value.items() if v is not None}
        case list() | tuple():
            return [_camel(v) for v in value]
        case _:
            return value
