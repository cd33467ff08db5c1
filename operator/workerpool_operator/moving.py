"""Moves waiting jobs from one queue to another in Redis, one script call a message, so that each is always in one place."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

from workerpool_operator.rebalancing import Transfer
from workerpool_routing import ledger
from workerpool_routing.ledger import CorruptEntry, Job
from workerpool_routing.wire import HEADER, Keyspace, Policy, TierPolicy, VersionMismatch

LOOKED_AT = 1_000
"""How many messages of a queue one transfer looks at, the most urgent and oldest first."""

_CHUNK = 200


async def move(client: Any, keys: Keyspace, policy: Policy, transfer: Transfer) -> int:
    """Carry out a transfer, as far as there are jobs that may move; return how many have moved."""
    source, target = policy.tier(transfer.source), policy.tier(transfer.target)
    assert source is not None
    assert target is not None
    moved = 0
    script = client.register_script(ledger.script("rebalance"))
    async for raw, job in _waiting(client, keys, source):
        if moved >= transfer.jobs:
            break
        if ledger.may_move(job, source, target):
            call = ledger.rebalance(keys, job, source, target, raw=raw, delivery_tag=str(uuid4()))
            moved += await script(keys=call.keys, args=call.args)
    return moved


async def _waiting(client: Any, keys: Keyspace, tier: TierPolicy) -> AsyncIterator[tuple[str, Job]]:
    """The messages of a queue with their ledger entries, in the order in which workers would take them.

    If messages leave the queue meanwhile, the next chunk skips as many; a later pass finds those.
    """
    left = LOOKED_AT
    for name in keys.queue_lists(tier.queue):
        end = -1
        while left > 0 and (chunk := await client.lrange(name, end - _CHUNK + 1, end)):
            end, left = end - _CHUNK, left - _CHUNK
            messages = [(raw, task_id) for raw in reversed(chunk) if (task_id := _ours(raw))]
            async with client.pipeline(transaction=False) as pipe:
                for _, task_id in messages:
                    pipe.hgetall(keys.job(task_id))
                entries = await pipe.execute(raise_on_error=False)
            for (raw, task_id), stored in zip(messages, entries, strict=True):
                if isinstance(stored, dict) and (job := _job(task_id, stored)):
                    yield raw, job


def _ours(raw: str) -> str | None:
    """The task id of a message in its first attempt that was admitted by the pool; None for any other."""
    try:
        headers = json.loads(raw)["headers"]
        return str(headers["id"]) if headers[HEADER]["attempt"] == 1 else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _job(task_id: str, stored: dict[str, str]) -> Job | None:
    """The ledger entry; None if there is none, or if it cannot be read (the sweep will set it aside)."""
    try:
        return Job.load(task_id, stored)
    except (VersionMismatch, CorruptEntry):
        return None
