"""A pool in memory, for the tests of apps that use :class:`~workerpool_routing.WorkerPool`.

It decides by the same rule, keeps the same ledger and raises the same errors; it needs neither Redis nor workers::

    from workerpool_routing.testing import in_memory

    def test_an_upload_goes_to_the_gpu(client):
        with in_memory(pool, tiers=TIERS) as double:
            double.set_capacity("gpu", ready=1)
            client.post("/process/file", files={"file": recording}, data={"gpu": "true"})
            double.assert_routed("media.tasks.transcribe", tier="gpu", reason=Reason.FREE_SLOT)
"""

from __future__ import annotations

import json
from base64 import b64decode
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from kombu.compression import decompress
from kombu.serialization import loads

from workerpool_routing.admission import Admission, Entry, Question
from workerpool_routing.decide import START_SECONDS, Candidates, Load, Reason, Request, assumed_seconds, place
from workerpool_routing.errors import PoolUnavailable
from workerpool_routing.ledger import Job, State
from workerpool_routing.message import Message
from workerpool_routing.pool import WorkerPool
from workerpool_routing.store import TierState
from workerpool_routing.wire import Milliseconds, Policy, Presence, TierPolicy


@dataclass(frozen=True, slots=True)
class Submitted:
    """One submitted job: where it went, and what its worker would get."""

    task_id: str
    task: str
    tier: str
    queue: str
    reason: Reason
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    headers: Mapping[str, Any]


@dataclass(slots=True)
class _Tier:
    ready: int = 0
    coming: tuple[tuple[int, float], ...] = ()
    busy: int = 0
    service: dict[str, float] = field(default_factory=dict)
    leases: set[str] = field(default_factory=set)
    limit: int | None = None


class Double:
    """The state of one pool in memory: a :class:`~workerpool_routing.store.Store`, and what a test sets and asks of it.

    Attributes:
        submitted: every job so far, oldest first.
        unavailable: while True, every call raises :class:`PoolUnavailable`, as with a Redis that is down.
    """

    def __init__(self, policy: Policy | None) -> None:
        self.submitted: list[Submitted] = []
        self.unavailable = False
        self._policy = policy
        self._tiers = {tier.name: _Tier() for tier in policy.tiers} if policy else {}
        self._queues: dict[str, int] = {}
        self._jobs: dict[str, Job] = {}
        self._keys: dict[str, Admission] = {}
        self._spilling: set[str] = set()

    def set_capacity(
        self,
        tier: str,
        *,
        ready: int = 0,
        starting: int = 0,
        ready_in: float = START_SECONDS,
        busy: int = 0,
        waiting: int = 0,
        service: Mapping[str, float] | None = None,
        limit: int | None = None,
    ) -> None:
        """Set what a tier has.

        Args:
            tier: its name.
            ready: slots of ready workers.
            starting: slots of starting workers.
            ready_in: seconds until those are ready.
            busy: jobs that its workers hold.
            waiting: jobs in its queue.
            service: mean seconds of each task on it; other tasks are unknown.
            limit: how many jobs it may have at once because its attempts fail: 0, out of routing; 1, single jobs try it.
        """
        self._queues[self._named(tier).queue] = waiting
        coming = ((starting, ready_in),) if starting else ()
        self._tiers[tier] = _Tier(ready, coming, busy, dict(service or {}), self._tiers[tier].leases, limit)

    def assert_routed(self, task: str, *, tier: str, reason: Reason | None = None) -> Submitted:
        """Assert that the last job of a task went to that tier (for that reason, if one is given), and return the job."""
        found = next((job for job in reversed(self.submitted) if job.task == task), None)
        assert found is not None, f"no job of {task} was submitted; there were {sorted({job.task for job in self.submitted})}"
        assert found.tier == tier, f"{task} went to {found.tier} ({found.reason}), not to {tier}"
        assert reason in (None, found.reason), f"{task} went to {tier} for {found.reason}, not for {reason}"
        return found

    def policy(self) -> Policy | None:
        """As given by the test or in the code."""
        self._reach()
        return self._policy

    def admit(self, question: Question) -> Admission:
        """As ``lua/admit.lua`` does."""
        self._reach()
        candidates, request, entry = question.candidates, question.request, question.entry
        key = entry.idempotency_key if entry else None
        if key in self._keys:
            return self._keys[key]
        loads = [self._load(tier, request.task) for tier in candidates.tiers]
        spilling = request.task in self._spilling
        verdict = place(candidates, loads, limit=request.limit, spilling=spilling, refuses=question.refuses)
        tier = candidates.tiers[verdict.index]
        task_id = entry.task_id if entry else ""
        admission = Admission(task_id, tier.name, tier.queue, verdict.reason, verdict.wait, loads[0], Milliseconds(0))
        if entry or question.lease:
            self._take_side(candidates, loads, request.task, spilling=spilling)
        if question.lease:
            self._tiers[tier.name].leases.add(question.lease)
        elif entry and verdict.reason is not Reason.OVERLOADED:
            first = candidates.tiers[0]
            self._write(entry, request, admission, question.wanted or (first if first.accelerated else tier))
            if key is not None:
                self._keys[key] = replace(admission, load=None)
        return admission

    def release(self, tier: str, lease: str) -> None:
        """The message of that lease is in its queue."""
        self._tiers[tier].leases.discard(lease)

    def push(self, queue: str, message: Message) -> None:
        """Never called: it is for a script that fails, and there is none here."""
        raise NotImplementedError

    def state(self, policy: Policy) -> Sequence[TierState]:
        """All tiers, each with one worker that has all of the tier's slots."""
        self._reach()
        states = []
        for tier in policy.tiers:
            has = self._tiers[tier.name]
            worker = Presence(
                f"{tier.name}.1", tier.name, tier.name, tier.queue, has.ready, has.busy, Milliseconds(0), Milliseconds(0)
            )
            workers = (worker,) if has.ready else ()
            states.append(
                TierState(tier, workers, sum(slots for slots, _ in has.coming), self._queues.get(tier.queue, 0), has.busy, None)
            )
        return states

    def queue_length(self, queue: str) -> int:
        """Messages waiting in a queue."""
        self._reach()
        return self._queues.get(queue, 0)

    def job(self, task_id: str) -> Job | None:
        """A job's ledger entry."""
        self._reach()
        return self._jobs.get(task_id)

    def _reach(self) -> None:
        if self.unavailable:
            raise PoolUnavailable("the test says that Redis is down")

    def _named(self, name: str) -> TierPolicy:
        found = self._policy.tier(name) if self._policy else None
        assert found is not None, f"the pool has no tier {name!r}; it has {sorted(self._tiers)}"
        return found

    def _load(self, tier: TierPolicy, task: str) -> Load:
        has = self._tiers[tier.name]
        waiting = self._queues.get(tier.queue, 0)
        assumed = assumed_seconds(accelerated=tier.accelerated)
        service = has.service.get(task)
        return Load(waiting, has.busy, has.ready, has.coming, len(has.leases), service, limit=has.limit, assumed=assumed)

    def _take_side(self, candidates: Candidates, loads: Sequence[Load], task: str, *, spilling: bool) -> None:
        side = place(candidates, loads, limit=None, spilling=spilling).reason
        if side is Reason.WAIT_TOO_LONG:
            self._spilling.add(task)
        elif side in (Reason.WORTH_THE_WAIT, Reason.FREE_SLOT):
            self._spilling.discard(task)

    def _write(self, entry: Entry, request: Request, admission: Admission, wanted: TierPolicy) -> None:
        tier, queue, reason = admission.tier, admission.queue, admission.reason
        required = request.accelerated == "required"
        if entry.fenced:
            self._jobs[entry.task_id] = Job(entry.task_id, request.task, State.ADMITTED, 1, tier, wanted.name, required, reason)
        self._queues[queue] = self._queues.get(queue, 0) + 1
        message = json.loads(entry.message.to(queue))
        body, kind = b64decode(message["body"]), message["content-type"]
        if compression := message["headers"].get("compression"):
            body = decompress(body, compression)
        args, kwargs, _ = loads(body, kind, message["content-encoding"], accept={kind})  # the test itself has written it
        self.submitted.append(Submitted(entry.task_id, request.task, tier, queue, reason, args, kwargs, message["headers"]))


@contextmanager
def in_memory(pool: WorkerPool, *, tiers: Sequence[TierPolicy] | None = None) -> Iterator[Double]:
    """Keep a pool's state in memory inside the block.

    Args:
        pool: the app's own.
        tiers: as in the WorkerPool resource. Leave it out if the tiers are given in the code.
    """
    double = Double(Policy(tuple(tiers)) if tiers else pool.given)
    with pool.kept_in(double):
        yield double


@pytest.fixture
def workerpool_in_memory() -> Iterator[Callable[..., Double]]:
    """A pytest fixture; call it like :func:`in_memory`. The state is in memory until the end of the test."""
    with ExitStack() as stack:
        yield lambda pool, **options: stack.enter_context(in_memory(pool, **options))
