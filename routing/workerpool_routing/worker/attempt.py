"""One attempt of one job in this worker, as the ledger sees it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from workerpool_routing import ledger
from workerpool_routing.connection import Connection, unavailable_when_down
from workerpool_routing.ledger import Claim, Job, Move, State
from workerpool_routing.policy import PolicySource
from workerpool_routing.wire import HEADER, Keyspace, Policy

if TYPE_CHECKING:
    from workerpool_routing.pool import WorkerPool

logger = logging.getLogger("workerpool_routing.worker")


class Outcome(Enum):
    """What became of an attempt that failed or was lost."""

    MOVED = "moved to another run"
    FINAL = "final"
    RELEASED = "claimed by nobody: it had not begun, has asked for a retry, or was given back by a cold shutdown"
    NOT_OURS = "another attempt counts by now"


@dataclass
class WorkerLife:
    """This worker, from its start to its end: the owner of its attempts.

    Attributes:
        pool: the pool.
        tier: the tier that this worker belongs to.
        owner: its name on the ledger.
        connection: to the ledger. A child of the pool waits for Redis; the main process must go on consuming and reporting.
        timer: of Celery's consumer, once the worker is ready; for what the main process has to ask again.
    """

    pool: WorkerPool
    tier: str
    owner: str
    connection: Connection
    timer: Any = None

    @property
    def keys(self) -> Keyspace:
        return self.pool.keys

    @property
    def policy(self) -> Policy:
        """What is known of the pool; without any, a policy that falls back to nothing."""
        return self._source.get() or Policy(())

    @cached_property
    def _source(self) -> PolicySource:
        return PolicySource(self.connection, self.keys, self.pool.given)

    def attempt(self, task_id: str, headers: Mapping[str, Any] | None, delivery_tag: str, retries: int) -> Attempt | None:
        """The attempt that a message carries, None for a message that was not admitted through the pool."""
        number = ((headers or {}).get(HEADER) or {}).get("attempt")
        return Attempt(self, task_id, number, delivery_tag, retries) if isinstance(number, int) else None

    def job(self, task_id: str) -> Job | None:
        """The ledger's entry."""
        with unavailable_when_down():
            return Job.load(task_id, self.connection.client.hgetall(self.keys.job(task_id)))

    def call_later(self, seconds: float, function: Callable[[], object]) -> None:
        """Run something in the main process later."""
        self.timer.call_after(seconds, function)

    def release_all(self) -> None:
        """Give back what a cold shutdown is about to cut off: it goes back to the queue, and that is not a lost attempt."""
        for task_id in self.connection.client.smembers(self.keys.held(self.owner)):
            job = self.job(task_id)
            if job and job.owner == self.owner:
                Attempt(self, task_id, job.attempt, job.tag, 0).settle(job.state, State.ADMITTED)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One delivery of one job."""

    life: WorkerLife
    task_id: str
    number: int
    tag: str
    retries: int

    def claim(self, result_stored: Callable[[], bool]) -> Claim:
        """Ask to run: RUN, UNKNOWN (not on the ledger: run it as plain Celery would), POISON (fail it), or any other: drop it.

        Finding an earlier owner reports a loss: on an accelerated tier the job moves on to the next one. An attempt that was cut
        off between its end and its stored result runs again.
        """
        answer = self._claim(no_result=False)
        if answer is Claim.FINISHING:
            if result_stored():
                self.settle(State.FINISHING, State.DONE, tag=self._ledger_tag())
                return Claim.ENDED
            answer = self._claim(no_result=True)
        if answer is Claim.LOST:
            self.end(ledger.after_loss)
        return answer

    def _claim(self, *, no_result: bool) -> Claim:
        life = self.life
        tier = life.policy.tier(life.tier)
        moves_on = bool(tier and tier.accelerated and life.policy.plain_tier() and life.policy.fallback_on_loss)
        call = ledger.claim(
            life.keys, self.task_id, attempt=self.number, tag=self.tag, owner=life.owner, tier=life.tier, retries=self.retries,
            moves_on=moves_on, no_result=no_result, name=str(uuid4()),
        )  # fmt: skip
        return Claim(life.connection.run("claim", call))

    def _ledger_tag(self) -> str:
        job = self.life.job(self.task_id)
        return job.tag if job else ""

    def settle(self, before: State, after: State, *, tag: str | None = None) -> bool:
        """Enter the next state; False when another attempt counts by now."""
        call = ledger.settle(
            self.life.keys, self.life.policy, self.task_id, attempt=self.number, tag=self.tag if tag is None else tag,
            owner=self.life.owner, before=before, after=after,
        )  # fmt: skip
        return bool(self.life.connection.run("settle", call))

    def end(self, follows: Callable[[Policy, Job], Move | None]) -> Outcome:
        """Act on a failure or a loss as the rule says (:func:`ledger.after_failure`, :func:`ledger.after_loss`)."""
        job = self.life.job(self.task_id)
        if job is None or job.attempt != self.number or job.state.ended:
            return Outcome.NOT_OURS
        if job.state is State.ADMITTED:
            return Outcome.RELEASED
        to = follows(self.life.policy, job)
        if to is None:
            return Outcome.FINAL if job.tag == self.tag else Outcome.NOT_OURS
        raw = self.life.connection.client.hget(self.life.keys.unacked(job.tier), self.tag)
        if raw is None:
            return Outcome.NOT_OURS
        call = ledger.move(self.life.keys, job, to, held_as=self.tag, raw=raw, delivery_tag=str(uuid4()))
        if not self.life.connection.run("move", call):
            return Outcome.NOT_OURS
        logger.warning(
            "moved task_id=%s task=%s from=%s to=%s attempt=%d reason=%s",
            self.task_id, job.task, job.tier, to.tier.name, to.attempt, to.reason,
        )  # fmt: skip
        return Outcome.MOVED
