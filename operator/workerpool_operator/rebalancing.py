"""Which waiting jobs go to another tier: how many, from where to where, and why.

Admission decides once, by what it sees then. After an outage, after its end, or after jobs that took longer than most, jobs wait
in a queue to which admission would not send them now. They move by admission's own rule
(:func:`workerpool_routing.decide.place`), so that the two never disagree:

* *Away* from an accelerated tier go the jobs that admission would send elsewhere now: all of them if no slot there is ready or
  may still start, or if its attempts fail; otherwise no more than can start at once on the other tier.
* *Home* go the jobs that ready slots there start sooner, until both queues are expected to take equally long.

Jobs do not go back and forth: they come home because the wait there is shorter, and to leave again it would have to be longer by
admission's threshold. The oldest go first. A job that is bound to its tier, by the ledger, never moves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf

from workerpool_routing.decide import Candidates, Load, Reason, explain, place
from workerpool_routing.wire import Policy, TierPolicy

AT_ONCE = 100
"""The most jobs that one pass moves between two tiers."""

TOLD_SECONDS = 60.0
"""How long the condition tells that jobs have moved; moves with shorter pauses between them are told as one."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """A move of up to ``jobs`` jobs, the oldest that may move, from one tier's queue to another's."""

    source: str
    target: str
    jobs: int
    message: str

    @property
    def way(self) -> tuple[str, str]:
        """(source, target)."""
        return self.source, self.target


@dataclass(frozen=True, slots=True)
class Moved:
    """Waiting jobs that have changed their tier.

    Attributes:
        last: the newest of the transfers that are told as one.
        jobs: how many jobs moved in all of them.
        at: when the last one moved, in seconds.
    """

    last: Transfer
    jobs: int
    at: float

    @property
    def message(self) -> str:
        """In a sentence."""
        return f"{self.jobs} of the waiting jobs moved {self.last.message}"


def told(moved: Sequence[Moved], now: float) -> list[Moved]:
    """The moves that are still to be told."""
    return [one for one in moved if now - one.at < TOLD_SECONDS]


def tell(moved: Sequence[Moved], transfer: Transfer, jobs: int, now: float) -> list[Moved]:
    """What is to be told after one more transfer: one entry for each pair of tiers."""
    news = told(moved, now)
    before = sum(one.jobs for one in news if one.last.way == transfer.way)
    return [*(one for one in news if one.last.way != transfer.way), Moved(transfer, before + jobs, now)]


def transfers(policy: Policy, loads: Mapping[str, Load], spilled: Mapping[str, int]) -> list[Transfer]:
    """What should move now; at most one transfer for each accelerated tier.

    Args:
        policy: the pool's tiers.
        loads: of every tier; ``service`` is the mean over its jobs.
        spilled: by accelerated tier, how many of its jobs wait or run elsewhere.
    """
    plain = [tier for tier in policy.tiers if not tier.accelerated]
    if not plain:
        return []
    found = [_away(tier, plain, loads) or _home(tier, plain, loads, spilled) for tier in policy.tiers if tier.accelerated]
    found += [_away(tier, plain, loads) for tier in policy.removed if tier.accelerated]
    return [transfer for transfer in found if transfer]


def _away(fast: TierPolicy, plain: list[TierPolicy], loads: Mapping[str, Load]) -> Transfer | None:
    candidates = Candidates((fast, *plain), accelerated=1)
    held = [loads[tier.name] for tier in candidates.tiers]
    to, jobs, reason = 0, 0, Reason.NO_CAPACITY
    while held[0].waiting and jobs < AT_ONCE:
        without = replace(held[0], waiting=held[0].waiting - 1)
        verdict = place(candidates, [without, *held[1:]], limit=None)
        if verdict.index == 0 or verdict.wait == inf or verdict.index != (to or verdict.index):
            break
        serves = without.slots > 0 and not without.full
        if serves and held[verdict.index].free <= 0:
            break
        to, reason, jobs, held[0] = verdict.index, verdict.reason, jobs + 1, without
        held[to] = replace(held[to], waiting=held[to].waiting + 1)
    if not jobs:
        return None
    return _transfer(fast, candidates.tiers[to], jobs, explain(reason, fast.name, loads[fast.name]))


def _home(fast: TierPolicy, plain: list[TierPolicy], loads: Mapping[str, Load], spilled: Mapping[str, int]) -> Transfer | None:
    source = max(plain, key=lambda tier: (loads[tier.name].waiting > 0, loads[tier.name].wait))
    # Slots that are only starting may never come, and then the jobs would have to go back.
    there, slow, jobs = replace(loads[fast.name], coming=(), startable=0), loads[source.name], 0
    most = min(spilled.get(fast.name, 0), slow.waiting, AT_ONCE)
    while jobs < most:
        slow = replace(slow, waiting=slow.waiting - 1)
        if there.wait >= slow.wait:
            break
        jobs, there = jobs + 1, replace(there, waiting=there.waiting + 1)
    if not jobs:
        return None
    before, after = loads[source.name].wait, replace(there, limit=None).wait
    return _transfer(source, fast, jobs, f"the last of its queue would wait {before:.0f} s, there it waits at most {after:.0f} s")


def _transfer(source: TierPolicy, target: TierPolicy, jobs: int, why: str) -> Transfer:
    return Transfer(source.name, target.name, jobs, f"from {source.name} to {target.name}: {why}")
