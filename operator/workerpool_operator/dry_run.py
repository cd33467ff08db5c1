"""A dry run of admission: what a new job would get now, answered by the admission script itself, which then writes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any

from workerpool_operator.observation import Unavailable
from workerpool_routing import admission
from workerpool_routing.admission import Admission, Question
from workerpool_routing.decide import Reason, Request, explain, preselect
from workerpool_routing.ledger import script
from workerpool_routing.wire import Keyspace, Policy


@dataclass(frozen=True, slots=True)
class Answer:
    """What admission would answer to one job.

    Attributes:
        task: the name of its task; empty for "any task" while no task's run time is known.
        accelerated: whether it asks for an accelerator.
        tier: where it would go; empty if it would be refused.
        message: why, in the words that the caller of ``submit()`` gets.
        wait: expected seconds until it starts; None while no worker is ready or starting.
    """

    task: str
    accelerated: bool
    tier: str
    reason: Reason
    message: str
    wait: float | None


@dataclass(frozen=True, slots=True)
class DryRun:
    """What admission would answer now, and whether an operator's capacity stands behind it.

    Attributes:
        has_capacity: whether Redis holds a published capacity, which expires soon after the last operator has gone.
        answers: one for each task whose run time is known; first with, then without asking for an accelerator.
    """

    has_capacity: bool
    answers: tuple[Answer, ...]


async def ask(client: Any, keys: Keyspace) -> DryRun | Unavailable:
    """Ask once for each task that the pool has run, or once for an unknown task if it has run none.

    Raises ValueError if the pool's policy cannot be read by this release.
    """
    raw, capacity = await client.mget(keys.policy, keys.capacity)
    if raw is None:
        return Unavailable(explain(Reason.POLICY_UNKNOWN, keys.pool))
    policy = Policy.load(raw)
    async with client.pipeline(transaction=False) as pipe:
        for tier in policy.tiers:
            pipe.hkeys(keys.service(tier.name))
        tasks = sorted(frozenset[str]().union(*await pipe.execute())) or [""]
    wishes = (True, False) if policy.accelerated_tier() else (False,)
    requests = [Request(task, wish, limit=policy.max_wait_seconds) for wish in wishes for task in tasks]
    return DryRun(capacity is not None, tuple([await _answer(client, keys, policy, request) for request in requests]))


async def _answer(client: Any, keys: Keyspace, policy: Policy, request: Request) -> Answer:
    call = admission.call(keys, Question(preselect(policy, request), request))
    found = admission.parse(await client.register_script(script("admit"))(keys=call.keys, args=call.args))
    assert isinstance(found, Admission), "only a call with `until` gives up"
    return Answer(
        task=request.task,
        accelerated=bool(request.accelerated),
        tier="" if found.reason is Reason.OVERLOADED else found.tier,
        reason=found.reason,
        message=explain(found.reason, found.tier, found.load),
        wait=None if found.wait == inf else found.wait,
    )
