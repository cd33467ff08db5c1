"""A queue belongs to one pool: of two that name the same one on the same broker, the older keeps it."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from workerpool_operator.ports import Pool


@dataclass(frozen=True, slots=True)
class Conflict:
    """The queue that another pool owns."""

    queue: str
    owner: str


def conflicts(
    pools: Iterable[Pool], places: Mapping[str, Hashable], sure: Collection[str], before: Mapping[str, Conflict]
) -> dict[str, Conflict]:
    """The pools that are held, by id, each with the first queue that it may not serve.

    Args:
        pools: all pools.
        places: by pool id, what identifies its broker, as last known. A pool without a known place owns no queue.
        sure: the pools whose place was read just now. A pool that was held stays held until it and the queue's owner are both
            among them.
        before: the last answer.
    """
    by_age = sorted(pools, key=lambda pool: (pool.created_at, pool.id))
    ids = {pool.id for pool in by_age}
    owners: dict[_Queue, str] = {}
    held: dict[str, Conflict] = {}
    for pool in by_age:
        keys = {}
        if pool.id in places:
            keys = {tier.queue: _queue(pool, tier.queue, places) for tier in pool.spec.tiers}
        conflict = next((Conflict(queue, owners[key]) for queue, key in keys.items() if key in owners), None)
        last = before.get(pool.id)
        if conflict is None and last and last.owner in ids and not {pool.id, last.owner} <= set(sure):
            conflict = last
        if conflict:
            held[pool.id] = conflict
        else:
            owners.update(dict.fromkeys(keys.values(), pool.id))
    return held


def ceded(pools: Collection[Pool], places: Mapping[str, Hashable]) -> dict[str, frozenset[str]]:
    """By pool id, the queues of its removed tiers that another pool has in its spec.

    They are that one's at once, whatever its age: a tier on its way out neither holds another pool nor lets its own be held.
    """
    known = [pool for pool in pools if pool.id in places]
    named = {pool.id: {_queue(pool, tier.queue, places) for tier in pool.spec.tiers} for pool in known}
    return {
        pool.id: frozenset(
            tier.queue
            for tier in pool.removed
            if any(_queue(pool, tier.queue, places) in queues for other, queues in named.items() if other != pool.id)
        )
        for pool in known
    }


_Queue: TypeAlias = tuple[Hashable, str]
"""What identifies the broker, and the name of the queue there."""


def _queue(pool: Pool, name: str, places: Mapping[str, Hashable]) -> _Queue:
    return places[pool.id], pool.spec.broker.global_key_prefix + name
