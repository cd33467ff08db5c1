"""What is done in Redis about jobs that no worker holds any more.

Every step is one script that compares first, so that two operators at once, or one that dies half way, do no harm: whoever comes
second finds nothing left to do. The cost is that of what looks wrong: messages that nobody renews, jobs that are overtaken.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from uuid import uuid4

import redis

from workerpool_operator import planning
from workerpool_operator.ports import Pool
from workerpool_routing import ledger
from workerpool_routing.ledger import CorruptEntry, Job, State
from workerpool_routing.wire import PRESENCE_LIFE_MS, Policy, TierPolicy, VersionMismatch, priority_of

UNRENEWED_SECONDS = PRESENCE_LIFE_MS / 1000 + 1
"""A worker renews every second what it holds: what is older than this is held by nobody."""

OVERTAKEN_MS = 6_000
"""A job is looked for when it waits longer than this and the head of its line was queued this much later, or there is no line.
Longer than an API process takes from admission to publishing.
"""

AT_ONCE = 200
"""How many jobs of a tier one sweep looks at, the oldest first."""

PUBLISHED, GIVEN_UP = 1, 2
"""What ``republish.lua`` answers when it has published a job again, and when it has done so often enough."""

_CHUNK = 1_000


async def take_over(client: Any, pool: Pool, tier: str, owner: str, refused: Callable[[str, Exception], None]) -> list[str]:
    """Give every job that a lost worker held to whoever the ledger says; return a sentence for each.

    ``refused`` is told of each that could not be given. While one of them is of another schema version, the worker is left to
    whoever knows that version and finds the job by its owner.
    """
    sentences, foreign = [], False
    for task_id in sorted(await client.smembers(pool.keys.held(owner))):
        try:
            job = await _job(client, pool, tier, task_id)
            # One that is finishing may have stored its result: it is delivered again, and whoever gets it looks first.
            if job and job.owner == owner and job.state is State.CLAIMED:
                sentences += await _move(client, pool, job)
        except VersionMismatch as error:
            foreign = True
            refused(task_id, error)
        except (redis.ResponseError, LookupError, TypeError, ValueError) as error:
            refused(task_id, error)
    if foreign:
        return sentences
    await _run(client, "leave", ledger.leave(pool.keys, tier, owner))
    return [*sentences, f"{tier}: worker {owner} is lost, it has not reported for too long"]


async def sweep(client: Any, pool: Pool) -> list[str]:
    """Find what fell between the steps, over all tiers: messages that nobody renews, jobs whose message is nowhere."""
    sentences, policy = [], _policy(pool)
    for tier in (*policy.tiers, *policy.removed):
        sentences += await _unrenewed(client, pool, tier)
        if tier.queue not in pool.ceded:  # there whoever has the queue may have run it
            sentences += await _missing(client, pool, tier)
    return sentences


async def _unrenewed(client: Any, pool: Pool, tier: TierPolicy) -> list[str]:
    seconds, _ = await client.time()
    sentences = []
    for tag in await client.zrangebyscore(pool.keys.unacked_index(tier.name), "-inf", seconds - UNRENEWED_SECONDS, 0, AT_ONCE):
        raw = await client.hget(pool.keys.unacked(tier.name), tag)
        if raw is None:
            await client.zrem(pool.keys.unacked_index(tier.name), tag)
            continue
        try:
            task_id = str(json.loads(raw)[0]["headers"]["id"])
            requeue = ledger.requeue(pool.keys, tier.name, tag=tag, raw=raw, delivery_tag=str(uuid4()))
        except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            sentences.append(await _aside(client, pool, tier.name, tag, tag=tag, reason=f"no Celery message: {error!r}", raw=raw))
            continue
        try:
            job = await _job(client, pool, tier.name, task_id)
        except VersionMismatch:
            continue
        except CorruptEntry as error:
            sentences.append(f"{tier.name}: job {task_id} is {error}")
            continue
        if job and job.state is State.CLAIMED and job.tag == tag:
            sentences += await _move(client, pool, job)
        elif await _run(client, "requeue", requeue):
            sentences.append(f"{tier.name}: job {task_id} was held by nobody, it goes back to the head of its queue")
    return sentences


async def _missing(client: Any, pool: Pool, tier: TierPolicy) -> list[str]:
    """Publish again what is admitted, overtaken, and in no list and no in-flight key twice in a row."""
    overtaken = await _overtaken(client, pool, tier)
    if not overtaken:
        return []
    nowhere = set(overtaken)
    for other in pool.tiers:
        if other.queue == tier.queue:  # that of a tier with another name by now is taken by the workers of both
            nowhere -= _ids(json.loads(raw)[0] for raw in await client.hvals(pool.keys.unacked(other.name)))
    for name in pool.keys.queue_lists(tier.queue):
        end = -1
        while nowhere and (chunk := await client.lrange(name, end - _CHUNK + 1, end)):
            nowhere -= _ids(_readable(chunk))
            end -= _CHUNK
    sentences = []
    for task_id in sorted(nowhere):
        call = ledger.republish(pool.keys, overtaken[task_id], tier, delivery_tag=str(uuid4()))
        done = await _run(client, "republish", call)
        if done == PUBLISHED:
            sentences.append(f"{tier.name}: job {task_id} was lost between the queue and a worker, it is published again")
        elif done == GIVEN_UP and await _give_up(client, pool, tier, overtaken[task_id]):
            sentences.append(
                f"{tier.name}: job {task_id} of {overtaken[task_id].task} has failed: no worker of the pool claimed it, and"
                f" it was published {1 + ledger.REPUBLISHED_AT_MOST} times: do workers without the library or a fence run it?"
            )
    return sentences


async def _give_up(client: Any, pool: Pool, tier: TierPolicy, job: Job) -> Any:
    call = ledger.settle(
        pool.keys, _policy(pool), job.task_id, attempt=job.attempt, tag="", owner="", tier=tier.name,
        before=State.ADMITTED, after=State.FAILED,
    )  # fmt: skip
    return await _run(client, "settle", call)


async def _overtaken(client: Any, pool: Pool, tier: TierPolicy) -> Mapping[str, Job]:
    """The jobs that should have started by now if their message were in its line."""
    waiting = pool.keys.waiting(tier.name)
    seconds, _ = await client.time()
    oldest = await client.zrangebyscore(waiting, "-inf", seconds * 1000 - OVERTAKEN_MS, 0, AT_ONCE, withscores=True)
    heads: dict[str, float] = {}
    overtaken = {}
    for task_id, queued_at in oldest:
        try:
            job = await _job(client, pool, tier.name, task_id)
        except (VersionMismatch, CorruptEntry):
            continue
        if job is None or job.state.ended or (job.state is not State.ADMITTED and job.tier != tier.name):
            await client.zrem(waiting, task_id)
        elif job.state is not State.CLAIMED and job.message:
            line = pool.keys.queue_list(tier.queue, priority_of(json.loads(job.message)))
            if line not in heads:
                heads[line] = await _head_queued_at(client, waiting, line)
            if heads[line] > queued_at + OVERTAKEN_MS:
                overtaken[task_id] = job
    return overtaken


async def _head_queued_at(client: Any, waiting: str, line: str) -> float:
    """When the oldest message of a line was queued; infinite where there is none, or none of ours."""
    for message in _readable(await client.lrange(line, -1, -1)):
        score = await client.zscore(waiting, message["headers"]["id"])
        if score is not None:
            return float(score)
    return float("inf")


def _readable(messages: Iterable[str]) -> Iterable[Any]:
    for text in messages:
        try:
            message = json.loads(text)
            message["headers"]["id"]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        yield message


def _ids(messages: Iterable[Any]) -> set[str]:
    return {str((message.get("headers") or {}).get("id")) for message in messages}


async def _job(client: Any, pool: Pool, tier: str, task_id: str) -> Job | None:
    """The ledger entry; one that nobody can read is set aside first.

    Raises:
        VersionMismatch: another release wrote it; it is left to those who know it.
        CorruptEntry: it is set aside now.
    """
    name = pool.keys.job(task_id)
    stored: Mapping[str, str] = {}
    try:
        stored = await client.hgetall(name)
        return Job.load(task_id, stored)
    except (CorruptEntry, redis.ResponseError) as error:  # Redis refuses to read what is no hash
        tag = stored.get("tag", "")
        raw = await client.hget(pool.keys.unacked(tier), tag) if tag else None
        await _aside(client, pool, tier, task_id, tag=tag, reason=str(error), raw=raw or stored.get("message", ""))
        raise CorruptEntry(f"set aside in {pool.keys.aside}: {error}") from error


async def _aside(client: Any, pool: Pool, tier: str, task_id: str, *, tag: str, reason: str, raw: str) -> str:
    await _run(client, "aside", ledger.aside(pool.keys, tier, task_id, tag=tag, reason=reason, message=raw))
    return f"{tier}: {task_id} is set aside in {pool.keys.aside}: {reason}"


async def _move(client: Any, pool: Pool, job: Job) -> list[str]:
    to = ledger.after_loss(_policy(pool), job)
    raw = await client.hget(pool.keys.unacked(job.tier), job.tag)
    if to is None or raw is None:
        return []
    call = ledger.move(pool.keys, job, to, held_as=job.tag, raw=raw, delivery_tag=str(uuid4()), how="lost")
    if not await _run(client, "move", call):
        return []
    return [f"job {job.task_id} of lost worker {job.owner} goes from {job.tier} to {to.tier.name}, attempt {to.attempt}"]


def _policy(pool: Pool) -> Policy:
    return planning.policy(pool.spec, pool.removed)


async def _run(client: Any, name: str, call: ledger.Call) -> Any:
    return await client.register_script(ledger.script(name))(keys=call.keys, args=call.args)
