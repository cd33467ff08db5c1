"""A queue belongs to one pool: of two that name the same one on the same broker, the older keeps it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from workerpool_operator.ports import Pool


@dataclass(frozen=True, slots=True)
class Conflict:
    """The queue that another pool owns."""

    queue: str
    owner: str


def conflicts(pools: Iterable[Pool], urls: Mapping[str, str]) -> dict[str, Conflict]:
    """The pools that have to wait, by id, each with the first queue that it may not serve.

    Args:
        pools: all pools.
        urls: the broker URL of each, by id; a pool whose URL is unknown owns nothing and is not held.
    """
    owners: dict[tuple[str, str], str] = {}
    held: dict[str, Conflict] = {}
    for pool in sorted(pools, key=lambda pool: (pool.created_at, pool.id)):
        if pool.id not in urls:
            continue
        queues = [(urls[pool.id], pool.spec.broker.global_key_prefix + tier.queue) for tier in pool.spec.tiers]
        taken = next(((tier.queue, owners[q]) for tier, q in zip(pool.spec.tiers, queues, strict=True) if q in owners), None)
        if taken:
            held[pool.id] = Conflict(*taken)
        else:
            owners.update(dict.fromkeys(queues, pool.id))
    return held
