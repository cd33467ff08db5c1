"""What a new job would get now: asked of the very script that admits, which then changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any

from workerpool_operator.observation import Unavailable
from workerpool_routing import admission
from workerpool_routing.admission import Admission
from workerpool_routing.decide import Reason, Request, explain, preselect
from workerpool_routing.ledger import script
from workerpool_routing.wire import Keyspace, Policy


@dataclass(frozen=True, slots=True)
class Answer:
    """What admission says of one job.

    Attributes:
        task: its task; empty for one whose times nobody knows yet.
        accelerated: whether it asks for an accelerator.
        tier: where it would go; empty where it would be refused.
        message: why, as the caller of ``submit`` reads it.
        wait: seconds until it starts, None while no worker is there or on its way.
    """

    task: str
    accelerated: bool
    tier: str
    reason: Reason
    message: str
    wait: float | None


@dataclass(frozen=True, slots=True)
class Outlook:
    """What admission goes by, and what it answers.

    Attributes:
        operator: whether an operator has told of the pool's capacity lately: nobody else does.
        answers: for each task whose times are known, first of the jobs that ask for an accelerator.
    """

    operator: bool
    answers: tuple[Answer, ...]


async def ask(client: Any, keys: Keyspace) -> Outlook | Unavailable:
    """Ask for the tasks that the pool has run, or for any where it has run none.

    Raises ValueError for a policy that this release cannot read.
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
    return Outlook(capacity is not None, tuple([await _answer(client, keys, policy, request) for request in requests]))


async def _answer(client: Any, keys: Keyspace, policy: Policy, request: Request) -> Answer:
    call = admission.call(keys, preselect(policy, request), request)
    found = admission.parse(await client.register_script(script("admit"))(keys=call.keys, args=call.args))
    assert isinstance(found, Admission), "without a time limit nobody gives up"
    return Answer(
        task=request.task,
        accelerated=bool(request.accelerated),
        tier="" if found.reason is Reason.OVERLOADED else found.tier,
        reason=found.reason,
        message=explain(found.reason, found.tier, found.load),
        wait=None if found.wait == inf else found.wait,
    )
