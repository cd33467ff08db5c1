"""Arguments and answer of ``lua/admit.lua``: one round trip that measures, decides and writes the ledger."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from workerpool_routing.decide import MARGIN, Choice, Load, Reason
from workerpool_routing.wire import JOB_LIFE_SECONDS, PRESENCE_LIFE_MS, SCHEMA_VERSION, Keyspace, TierPolicy, wake_channel


@dataclass(frozen=True, slots=True)
class Entry:
    """What the ledger stores of a new job."""

    task_id: str
    task: str
    required: bool


@dataclass(frozen=True, slots=True)
class Admission:
    """Where the job goes, and the loads that the script saw (None when it had nothing to measure)."""

    choice: Choice
    accelerated: Load | None = None
    plain: Load | None = None


def argument(keys: Keyspace, open_or_chosen: Choice | tuple[TierPolicy, TierPolicy], entry: Entry | None) -> str:
    """The script's only argument; without an entry it decides and changes nothing."""
    tiers, wanted, reason = _tiers(open_or_chosen)
    document: dict[str, Any] = {
        "version": SCHEMA_VERSION,
        "tiers": [_tier(keys, tier) for tier in tiers],
        "wanted": _tier(keys, wanted),
        "capacity": keys.capacity,
        "routes": keys.routes,
        "wake": wake_channel(keys.prefix),
        "pool": keys.pool,
        "margin": MARGIN,
        "presence_life": PRESENCE_LIFE_MS,
        "job_life": JOB_LIFE_SECONDS,
    }
    if reason:
        document["choice"] = reason
    if entry:
        document["job"] = {
            "key": keys.job(entry.task_id), "id": entry.task_id, "task": entry.task, "required": int(entry.required)
        }  # fmt: skip
    return json.dumps(document)


def parse(open_or_chosen: Choice | tuple[TierPolicy, TierPolicy], reply: Sequence[Any]) -> Admission:
    """Read the script's answer."""
    tiers, wanted, _ = _tiers(open_or_chosen)
    choice = Choice(tiers[int(reply[0]) - 1], Reason(_text(reply[1])), wanted)
    numbers = [int(number) for number in reply[2:]]
    return Admission(choice, Load(*numbers[:4]), Load(*numbers[4:])) if numbers else Admission(choice)


def _tiers(open_or_chosen: Choice | tuple[TierPolicy, TierPolicy]) -> tuple[tuple[TierPolicy, ...], TierPolicy, Reason | None]:
    if isinstance(open_or_chosen, Choice):
        return (open_or_chosen.tier,), open_or_chosen.wanted, open_or_chosen.reason
    return open_or_chosen, open_or_chosen[0], None


def _tier(keys: Keyspace, tier: TierPolicy) -> dict[str, Any]:
    return {
        "name": tier.name,
        "lists": keys.queue_lists(tier.queue),
        "unacked": keys.unacked(tier.name),
        "slots": keys.slots(tier.name),
        "spilled": keys.spilled(tier.name),
        "waiting": keys.waiting(tier.name),
        "scheduled": keys.scheduled(tier.name),
    }


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
