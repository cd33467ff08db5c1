"""One attempt of one job in this worker, as the ledger sees it."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from redis import RedisError

from workerpool_routing import ledger
from workerpool_routing.connection import Connection, unavailable_when_down
from workerpool_routing.errors import PoolUnavailable
from workerpool_routing.ledger import Claim, Job, Move, Result, State
from workerpool_routing.policy import PolicySource
from workerpool_routing.wire import MESSAGE_LIMIT_BYTES, Keyspace, Policy, carried, retries_of
from workerpool_routing.worker.transport import give_back

if TYPE_CHECKING:
    from workerpool_routing.pool import WorkerPool

logger = logging.getLogger("workerpool_routing.worker")


UNKNOWN_JOB = -1
"""The answer of ``settle.lua`` if the job has no ledger entry."""

ASKED_BY = "asked_by"
"""In a retry's ``workerpool`` header: the delivery tag of the attempt that asked for it."""

LOST_EARLIER = "lost"
"""How a run ended, in the ledger's word, if a later delivery of the same attempt finds it unfinished."""


def _turn() -> None:
    """One turn of a loop that waits."""


class Outcome(Enum):
    """What became of an attempt that failed or was lost."""

    MOVED = "moved to another run"
    FINAL = "final"
    RELEASED = "claimed by nobody: it had not begun, has asked for a retry, or was given back by a cold shutdown"
    NOT_OURS = "another attempt counts by now"


@dataclass
class WorkerLife:
    """One run of this worker, from its start to its end: the owner of its attempts.

    There are two in a worker, with the same owner: one for the child processes that run tasks, one for the main process.

    Attributes:
        pool: the pool.
        tier: the tier that this worker belongs to.
        owner: its name on the ledger.
        connection: to the ledger. A child process waits for Redis; the main process must not, to go on consuming and reporting.
        consumer: Celery's, once the worker is ready: its loop is where the main process asks again, and looks for work.
        owed: what Redis did not take, see :meth:`soon`.
    """

    pool: WorkerPool
    tier: str
    owner: str
    connection: Connection
    consumer: Any = None
    owed: deque[Callable[[], object]] = field(default_factory=deque)

    @cached_property
    def keys(self) -> Keyspace:
        return self.pool.keys

    @property
    def policy(self) -> Policy:
        """The pool's policy; while none is known, one without tiers, under which nothing falls back."""
        return self._source.get() or Policy(())

    @cached_property
    def _source(self) -> PolicySource:
        return PolicySource(self.connection, self.keys, self.pool.given)

    def attempt(
        self,
        task_id: str,
        headers: Mapping[str, Any] | None,
        delivery_tag: str,
        retries: object,
        *,
        may_move: bool = True,
        scheduled: bool = False,
    ) -> Attempt | None:
        """The attempt that a message carries; None for a message that was not admitted by the pool."""
        header = carried(headers)
        number = header.get("attempt")
        if not isinstance(number, int):
            return None
        asked_by = str(header.get(ASKED_BY, ""))
        return Attempt(self, task_id, number, delivery_tag, retries_of(retries), may_move, scheduled, asked_by)

    def job(self, task_id: str) -> Job | None:
        """A job's ledger entry; None if it has none."""
        with unavailable_when_down():
            return Job.load(task_id, self.connection.client.hgetall(self.keys.job(task_id)))

    def call_later(self, seconds: float, function: Callable[[], object]) -> None:
        """Run something in the main process after so many seconds."""
        self.consumer.timer.call_after(seconds, function)

    def soon(self, do: Callable[[], object]) -> None:
        """Do something now, or else as soon as Redis takes it: the presence thread tries again."""
        try:
            do()
        except (PoolUnavailable, RedisError) as unavailable:
            logger.warning("put off: %s", unavailable)
            self.owed.append(do)

    def catch_up(self) -> None:
        """Try again what was put off."""
        for _ in range(len(self.owed)):
            do = self.owed.popleft()
            try:
                do()
            except (PoolUnavailable, RedisError):
                self.owed.append(do)

    def check_writes(self) -> None:
        """Raise PoolUnavailable if Redis takes no writes."""
        self.connection.run("check", ledger.check(self.keys, self.tier))

    def look_for_work(self) -> None:
        """Wake the main process's loop because a slot is free; after a thread of the pool has freed one it would look a second
        later.
        """
        self.consumer.call_soon(_turn)

    def set_aside(self, task_id: str, *, reason: str, message: str, tag: str = "") -> None:
        """Move a message that cannot be read to a key of its own, with the reason, and count it."""
        self.connection.run("aside", ledger.aside(self.keys, self.tier, task_id, tag=tag, reason=reason, message=message))
        logger.error("set aside task_id=%s in key %s: %s", task_id, self.keys.aside, reason)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One delivery of one job."""

    life: WorkerLife
    task_id: str
    number: int
    tag: str
    retries: int
    may_move: bool = True
    """Whether its task allows another tier after a loss (``fallback_on_loss``)."""
    scheduled: bool = False
    """Whether its caller asked for a time (ETA)."""
    asked_by: str = ""
    """If it is a retry, the delivery tag of the attempt that asked for it."""

    def claim(self, stored_result: Callable[[], str]) -> Claim:
        """Ask the ledger whether to run, and report an earlier owner's loss if it finds one.

        Returns:
            RUN: run it. UNKNOWN: it is not on the ledger; run it as plain Celery would. POISON: let it fail, it has lost too many
            workers. Any other: drop it; on an accelerated tier a lost job has been moved to the next tier by then.

        Args:
            stored_result: looks for the result of an attempt that was cut off after its end: its final Celery state, or "".
                Without a stored result the job runs again.
        """
        answer = self._claim(no_result=False)
        if answer is Claim.FINISHING:
            if stored := stored_result():
                self._close_for_another(State.DONE if stored == "SUCCESS" else State.FAILED)
                return Claim.ENDED
            answer = self._claim(no_result=True)
        if answer is Claim.LOST:
            self.end(ledger.after_loss, LOST_EARLIER)
        if answer is Claim.CORRUPT:
            raw = self._raw()
            self.life.set_aside(self.task_id, reason="its ledger entry cannot be read", message=raw or "", tag=self.tag)
        return answer

    def _close_for_another(self, after: State) -> None:
        """Close the entry of an attempt that has stored its result and was cut off before it could close it itself."""
        job = self.life.job(self.task_id)
        if job:
            self._settle(State.FINISHING, after, job.tag, job.owner, how=after)

    def _claim(self, *, no_result: bool) -> Claim:
        life = self.life
        tier = life.policy.tier(life.tier)
        moves_on = bool(self.may_move and tier and tier.accelerated and life.policy.plain_tier() and life.policy.fallback_on_loss)
        call = ledger.claim(
            life.keys, self.task_id, attempt=self.number, tag=self.tag, owner=life.owner, tier=life.tier, retries=self.retries,
            moves_on=moves_on, no_result=no_result, name=str(uuid4()), scheduled=self.scheduled, asked_by=self.asked_by,
        )  # fmt: skip
        return Claim(life.connection.run("claim", call))

    def settle(self, before: State, after: State, *, how: str = "", error: str = "") -> bool:
        """Enter the next state; False if another attempt counts by now."""
        return self._settle(before, after, self.tag, self.life.owner, how=how, error=error)

    def finish(self, result: Result, *, after: State) -> bool | None:
        """Store the job's result and enter the next state, in one step; False if another attempt counts by now.

        None if the job is no longer on the ledger: then nothing is stored, because another attempt may have been accepted.
        """
        answer = self._answer(State.CLAIMED, after, self.tag, self.life.owner, how="done", result=result)
        return None if answer == UNKNOWN_JOB else bool(answer)

    def retry(self, message: str, queue: str, later: int) -> bool:
        """Return to ``admitted``, to wait for the retry that the task's code has asked for.

        It is due in ``later`` seconds. Its message is kept for the sweep if it went to the tier's queue. False if another attempt
        counts by now; it may be the retry itself, if a worker has claimed it already.
        """
        tier = self.life.policy.tier(self.life.tier)
        kept = bool(tier and tier.queue == queue and len(message) <= MESSAGE_LIMIT_BYTES)
        return self._readmit("retry", retries=self.retries + 1, message=message if kept else "", queue=queue, later=later)

    def reject(self) -> bool:
        """Return to ``admitted``, to be delivered again: the task's code has rejected the message and wants it back."""
        return self._readmit("rejected")

    def _readmit(self, how: str, **retry: Any) -> bool:
        life = self.life
        call = ledger.readmit(
            life.keys, self.task_id, attempt=self.number, tag=self.tag, owner=life.owner, tier=life.tier, how=how, **retry
        )
        return bool(life.connection.run("readmit", call))

    def acknowledge(self, after: State) -> None:
        """Acknowledge the message and, if this attempt still counts, end its job. Celery has stored the outcome."""
        ended = self._settle(State.FINISHING, after, self.tag, self.life.owner, held_as=self.tag)
        if not ended and after is State.FAILED:  # the child could not say so: it failed over the ledger entry itself
            self.settle(State.CLAIMED, after, how="failed")

    def settle_unclaimed(self, after: State) -> bool:
        """End a job that was never started, because it expired, was revoked, or its task is not known here."""
        return self._settle(State.ADMITTED, after, "", "")

    def _settle(self, before: State, after: State, tag: str, owner: str, **more: Any) -> bool:
        return bool(self._answer(before, after, tag, owner, **more))

    def _answer(self, before: State, after: State, tag: str, owner: str, **more: Any) -> int:
        life = self.life
        call = ledger.settle(
            life.keys, life.policy, self.task_id, attempt=self.number, tag=tag, owner=owner, tier=life.tier, before=before,
            after=after, **more,
        )  # fmt: skip
        return int(life.connection.run("settle", call))

    def end(self, follows: Callable[[Policy, Job], Move | None], how: str, error: str = "") -> Outcome:
        """Act on a failure or a loss as the rule says (:func:`ledger.after_failure`, :func:`ledger.after_loss`)."""
        job = self.life.job(self.task_id)
        if job is None:  # as at a claim, it is plain Celery's then
            return Outcome.FINAL
        if job.attempt != self.number or job.state.ended:
            return Outcome.NOT_OURS
        if job.state is State.ADMITTED:
            return Outcome.RELEASED
        if job.tag != self.tag and how != LOST_EARLIER:
            return Outcome.NOT_OURS
        if job.state is State.FINISHING and job.tag == self.tag:  # its result may be stored: the next claim looks for it
            give_back(self.life, self.tag)
            return Outcome.MOVED
        to = follows(self.life.policy, job)
        if to is None:
            finishing = self.settle(State.CLAIMED, State.FINISHING, how=how, error=error)
            return Outcome.FINAL if finishing else Outcome.NOT_OURS
        if not self._move(job, to, how, error):
            return Outcome.NOT_OURS
        logger.warning(
            "moved task_id=%s task=%s from=%s to=%s attempt=%d reason=%s",
            self.task_id, job.task, job.tier, to.tier.name, to.attempt, to.reason,
        )  # fmt: skip
        return Outcome.MOVED

    def release(self) -> bool:
        """Put the job back at the head of its queue because this worker has to leave; this does not count as an attempt."""
        job = self.life.job(self.task_id)
        if job is None or job.state is not State.CLAIMED or (job.attempt, job.tag, job.owner) != (
            self.number, self.tag, self.life.owner,
        ):  # fmt: skip
            return False
        to = ledger.again(self.life.policy, job)
        return bool(to and self._move(job, to, "given back", counts=False))

    def _move(self, job: Job, to: Move, how: str, error: str = "", *, counts: bool = True) -> bool:
        raw = self._raw()
        if raw is None:
            return False
        call = ledger.move(
            self.life.keys, job, to, held_as=self.tag, raw=raw, delivery_tag=str(uuid4()), how=how, error=error, counts=counts
        )
        return bool(self.life.connection.run("move", call))

    def _raw(self) -> str | None:
        """This delivery, as Kombu keeps it in flight; None if it is gone."""
        raw: str | None = self.life.connection.client.hget(self.life.keys.unacked(self.life.tier), self.tag)
        return raw
