"""The fence: task and request classes that act only while the ledger says that their attempt counts.

:class:`FencedTask` runs where the task's code runs (a child process, or the worker itself in the solo and threads pools), and
:class:`FencedRequest` in the worker's main process, which sees children die and outcomes stored. :func:`fence` puts both around a
task. Celery decides what it always decides; an exception of Celery's own (``Ignore``, ``Reject``, ``Retry``) is how the fence
tells it what to do with a message.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import partial
from signal import SIGTERM
from typing import TYPE_CHECKING, Any

from billiard.einfo import ExceptionInfo, ExceptionWithTraceback
from billiard.exceptions import SoftTimeLimitExceeded, TimeLimitExceeded, WorkerLostError
from celery import Task, states
from celery._state import get_current_task
from celery.app.task import get_actual_ignore_result
from celery.backends.base import DisabledBackend
from celery.exceptions import Ignore, Reject, Retry, WorkerShutdown, WorkerTerminate
from celery.utils.imports import symbol_by_name
from celery.worker.state import task_ready
from kombu.exceptions import EncodeError
from kombu.utils.encoding import safe_repr
from redis import RedisError, ResponseError

from workerpool_routing import ledger
from workerpool_routing.errors import JobLost, PoolUnavailable, TaskExited
from workerpool_routing.ledger import Claim, Job, Move, State
from workerpool_routing.message import serialise
from workerpool_routing.wire import HEADER, Policy, carried
from workerpool_routing.worker.attempt import ASKED_BY, Attempt, Outcome, WorkerLife
from workerpool_routing.worker.results import beside_ledger
from workerpool_routing.worker.transport import settled

logger = logging.getLogger("workerpool_routing.worker")


RETRY_SECONDS = 2.0
"""How soon the main process asks again if the ledger did not answer; the worker goes on meanwhile."""

_RETRIES = "workerpool_retries"
"""Attribute of a request whose attempt has been claimed: the retries that the task's code has asked for, as (message, queue,
seconds until it is due)."""


def fence(task: Task, child: WorkerLife, main: WorkerLife) -> None:
    """Put the fence around a registered task, whatever base class its author gave it.

    Celery's own tasks are left alone, and so is one whose author has set ``fenced = False``.

    Args:
        task: the task.
        child: this worker's life, for the processes that run tasks.
        main: the same, for the main process.
    """
    if isinstance(task, FencedTask) or not ledger.fenced(task.name, task):
        return
    if task.acks_late is False:
        logger.warning("%s: acks_late=False is not used: a job acknowledged early could be lost with its worker", task.name)
    own_request = symbol_by_name(task.Request)
    own = type(task)
    rules = {name: getattr(task, name, True) for name in ("fallback_on_failure", "fallback_on_loss")}
    request = type("FencedRequest", (FencedRequest, own_request), {"life": main})
    names = {"__module__": own.__module__, "life": child, "Request": request, "tracks_started": task.track_started, **rules}
    task.__class__ = type(own.__name__, (FencedTask, own), names)
    task.track_started = False  # Celery would store STARTED before the claim, over the result of a job that has ended
    task.acks_late = True
    task.reject_on_worker_lost = False  # what follows a loss is the ledger's to say, also when it is that nothing does


def note_retry(body: Any, headers: dict[str, Any], properties: Mapping[str, Any], routing_key: str, **_: Any) -> None:
    """Keep the message of a retry that the running task's code asks for, and write into its header which attempt asks.

    Receives Celery's signal ``before_task_publish``.
    """
    task = get_current_task()
    retries = getattr(task.request, _RETRIES, None) if isinstance(task, FencedTask) else None
    if retries is not None and headers.get("id") == task.request.id:
        if header := carried(headers):
            headers[HEADER] = {**header, ASKED_BY: (task.request.properties or {}).get("delivery_tag", "")}
        compression = getattr(task, "compression", None) or task.app.conf.task_compression
        encoding = {"serializer": task.serializer, "compression": compression}
        retry = serialise(body, headers, properties, encoding=encoding)
        retries.append((retry.to(routing_key), routing_key, retry.later))


def settle_unknown(life: WorkerLife, message: Any, task: str) -> None:
    """End a job whose task this worker does not know: Celery has stored the failure."""
    headers = message.headers or {}
    attempt = life.attempt(headers.get("id", ""), headers, message.delivery_tag, headers.get("retries"))
    if attempt and attempt.settle_unclaimed(State.FAILED):
        logger.error("failed task_id=%s: task %s is not known on tier %s", attempt.task_id, task, life.tier)


@contextmanager
def _back_to_the_queue_without_redis() -> Iterator[None]:
    """If the ledger cannot be asked, nothing is decided: the message is put back, to be delivered again."""
    try:
        yield
    except PoolUnavailable as unavailable:
        raise Reject(str(unavailable), requeue=True) from unavailable


class Dropped(Ignore):
    """Raised for an attempt that does not count: the outcome of its job is another attempt's."""


class FencedTask(Task):
    """Runs a task's code: claims the attempt before it, ends it on the ledger after it, and falls back if it raises.

    Attributes:
        fallback_on_failure: the task's own rule: True, False, or the only exceptions after which another tier may help.
        fallback_on_loss: False keeps its jobs on their tier when a worker is lost.
        tracks_started: whether the state STARTED is stored, as the task's ``track_started`` says.
    """

    abstract = True
    life: WorkerLife
    tracks_started: bool
    fallback_on_failure: bool | tuple[type[Exception], ...]
    fallback_on_loss: bool

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        """Put off the task's own hook until after the claim (see :meth:`_begin`): if it raises, the attempt has failed."""
        if self._attempt() is None:
            self._begin(task_id, args, kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        attempt = None if hasattr(self.request, _RETRIES) else self._attempt()  # a task may call itself
        if attempt is None:
            return super().__call__(*args, **kwargs)
        setattr(self.request, _RETRIES, [])
        with self._asking(attempt):
            answer = attempt.claim(self._stored_result)
        match answer:
            case Claim.RUN:
                return self._run(attempt, *args, **kwargs)
            case Claim.UNKNOWN:
                return self._start(*args, **kwargs)
            case Claim.POISON:
                raise JobLost(f"the workers that ran {self.name} on tier {self.life.tier} were lost each time; not run again")
            case _:
                raise self._dropped(attempt, f"its delivery is {answer}")

    def _run(self, attempt: Attempt, *args: Any, **kwargs: Any) -> Any:
        try:
            result = self._start(*args, **kwargs)
        except Retry as asked:
            if self._close(attempt, partial(attempt.retry, *(getattr(self.request, _RETRIES) or [("", "", 0)])[-1])) is False:
                raise self._dropped(attempt, "it was taken over") from asked
            raise
        except Reject as rejected:
            final = partial(attempt.settle, State.CLAIMED, State.FAILED, how="rejected")
            self._close(attempt, attempt.reject if rejected.requeue else final)
            raise
        except Ignore:
            self._close(attempt, partial(attempt.settle, State.CLAIMED, State.DONE, how="ignored"))
            raise
        except (WorkerShutdown, WorkerTerminate):  # the solo pool: the worker itself is told to end
            raise
        except Exception as error:
            self._failed(attempt, error)
            raise
        except BaseException as error:
            if isinstance(error, SystemExit) and _by_signal(error):  # terminated by the main process, which knows why
                raise
            self._failed(attempt, error)
            # As it is, it would end the child, or a whole worker that runs its tasks itself.
            raise TaskExited(f"{self.name} ended with {_text(error)}") from error
        with self._asking(attempt):
            counts = self._finish(attempt, result)
        if not counts:
            raise self._dropped(attempt, "it was taken over")
        return result

    def _start(self, *args: Any, **kwargs: Any) -> Any:
        self._begin(self.request.id, args, kwargs)
        return super().__call__(*args, **kwargs)

    def _begin(self, task_id: str, args: Any, kwargs: Any) -> None:
        request = self.request
        if self.tracks_started and not request.is_eager and not get_actual_ignore_result(self, request):
            meta = {"pid": os.getpid(), "hostname": request.hostname}
            self.backend.store_result(task_id, meta, states.STARTED, request=request)
        super().before_start(task_id, args, kwargs)

    @contextmanager
    def _asking(self, attempt: Attempt) -> Iterator[None]:
        """If a soft time limit expires while the ledger is asked, the attempt has failed, as if it had expired in the task."""
        try:
            with _back_to_the_queue_without_redis():
                yield
        except SoftTimeLimitExceeded as late:
            self._failed(attempt, late)
            raise

    def _finish(self, attempt: Attempt, result: Any) -> bool:
        """End the attempt with its result, or enter ``finishing`` until Celery has stored it; False if it no longer counts."""
        try:
            stored = beside_ledger(self, result, self.life.connection.client)
        except EncodeError:  # Celery will run into it as well, and store the failure
            return attempt.settle(State.CLAIMED, State.FINISHING, how="unencodable")
        if stored is None:
            return attempt.settle(State.CLAIMED, State.FINISHING, how="done")
        # Its part in a chord is counted after this. If this child dies before, the next worker that gets the message counts it.
        counts = attempt.finish(stored, after=State.FINISHING if self.request.chord else State.DONE)
        if counts:
            self.request.ignore_result = True  # it is stored: Celery has nothing left to store
        return counts is not False

    def _failed(self, attempt: Attempt, error: BaseException) -> None:
        """Return if the failure is final; otherwise raise what makes Celery leave the job to the next attempt."""
        with self._asking(attempt):
            outcome = attempt.end(self.rule_after(error), "failed", _text(error))
        if outcome is Outcome.FINAL:
            return
        if outcome is Outcome.RELEASED:
            raise Reject(_text(error), requeue=True) from error
        raise self._dropped(attempt, f"it raised {_text(error)}: {outcome.value}") from error

    def rule_after(self, error: BaseException) -> Callable[[Policy, Job], Move | None]:
        """What follows this error: the pool's rule, or the task's own."""
        rule = self.fallback_on_failure
        return ledger.after_failure if rule is True or (rule and isinstance(error, rule)) else _stay

    def _dropped(self, attempt: Attempt, why: str) -> Dropped:
        logger.warning("dropped task_id=%s task=%s attempt=%d: %s", attempt.task_id, self.name, attempt.number, why)
        return Dropped(why)

    def _stored_result(self) -> str:
        """The final state that an attempt stored before it was cut off, or ""; makes up for its part in a chord."""
        request = self.request
        if isinstance(self.backend, DisabledBackend):
            return ""
        meta = self.backend.get_task_meta(request.id, cache=False)
        state = str(meta["status"])
        if state not in states.READY_STATES:
            return ""
        if request.chord:
            self.backend.on_chord_part_return(request, state, meta["result"])
        return state

    def _close(self, attempt: Attempt, settle: Callable[[], bool]) -> bool | None:
        """The answer of ``settle``; None if the ledger did not answer."""
        with self._asking(attempt):
            try:
                return settle()
            except PoolUnavailable as unavailable:
                # Celery already has the outcome of the attempt: an error here would turn it into another one.
                logger.warning("not closed task_id=%s task=%s: %s", self.request.id, self.name, unavailable)
                return None

    def _attempt(self) -> Attempt | None:
        request = self.request
        if request.called_directly or request.is_eager:
            return None
        tag = (request.properties or {}).get("delivery_tag", "")
        return self.life.attempt(
            request.id, request.headers, tag, request.retries, may_move=self.fallback_on_loss, scheduled=bool(request.eta)
        )


def _text(error: BaseException) -> str:
    """Its repr as Redis can keep it, whatever the author of its class has made of that."""
    return str(safe_repr(error)).encode(errors="backslashreplace").decode()


def _by_signal(error: SystemExit) -> bool:
    """Whether a child of Billiard ends in this way on a signal: with the signal's number minus 256."""
    return isinstance(error.code, int) and -256 < error.code < -192


def _stay(_policy: Policy, _job: Job) -> None:
    """The task's own rule: the failure is final."""


class FencedRequest:
    """Mixed into the task's request class; runs in the worker's main process."""

    life: WorkerLife
    _outcome = State.DONE

    def on_failure(self, exc_info: ExceptionInfo, send_failed_event: bool = True, return_ok: bool = False) -> Any:
        """Act on the death of a child. A failure that the child itself has reported is left to Celery."""
        error = exc_info.exception
        error = error.exc if isinstance(error, ExceptionWithTraceback) else error
        attempt = None if self._already_cancelled or self._already_revoked else self._attempt()
        if attempt and isinstance(error, TimeLimitExceeded):
            return None  # on_timeout has dealt with it
        if isinstance(error, Dropped):
            task_ready(self)
            self._drop()
            return None
        lost = isinstance(error, WorkerLostError | SystemExit) and not return_ok
        if lost and self._already_cancelled and self._attempt():
            return None  # this worker has stopped the child: another delivery runs the job
        again = partial(self.on_failure, exc_info, send_failed_event, return_ok)
        if attempt and lost and self._dealt_with(attempt, ledger.after_loss, "lost", error, again):
            return None
        if attempt and isinstance(error, Ignore):  # the child may not have reached the ledger
            self.life.soon(partial(attempt.settle, State.CLAIMED, State.DONE, how="ignored"))
        self._outcome = State.FAILED
        if attempt and return_ok and isinstance(error, MemoryError):  # Celery would end the whole worker, and the jobs beside it
            task_ready(self)
            self.acknowledge()
            self.send_event("task-failed", exception=safe_repr(error), traceback=exc_info.traceback)
            return None
        return super().on_failure(exc_info, send_failed_event, return_ok)  # type: ignore[misc]

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """Fall back from an attempt that exceeded its hard time limit; the pool kills the child."""
        attempt = None if soft else self._attempt()
        if attempt is None:
            super().on_timeout(soft, timeout)  # type: ignore[misc]
            return
        error = TimeLimitExceeded(timeout)
        again = partial(self.on_timeout, soft, timeout)
        if self._dealt_with(attempt, self.task.rule_after(error), "over its hard time limit", error, again):
            return
        self._outcome = State.FAILED
        super().on_timeout(soft, timeout)  # type: ignore[misc]

    def acknowledge(self) -> None:
        """Acknowledge the message and end its job in one step: Celery has stored the outcome."""
        attempt = None if self.acknowledged else self._attempt()
        if attempt is None:
            super().acknowledge()  # type: ignore[misc]
            return
        self.acknowledged = True
        settled(self._message)
        self.life.soon(partial(attempt.acknowledge, self._outcome))
        self.life.look_for_work()

    def reject(self, requeue: bool = False) -> None:
        """End the job of a failure that Celery will not acknowledge (``task_acks_on_failure=False``) all the same."""
        if not requeue and self._attempt() is not None:
            self.acknowledge()
        super().reject(requeue)  # type: ignore[misc]

    def revoked(self) -> bool:
        """Whether the job is not to start, because it was revoked or expires; if that cannot be said, it is asked again later."""
        try:
            return bool(super().revoked())  # type: ignore[misc]
        except PoolUnavailable as unavailable:
            logger.warning("undecided task_id=%s, asked again in %.0f s: %s", self.id, RETRY_SECONDS, unavailable)
            task_ready(self)
            self.life.call_later(RETRY_SECONDS, partial(self.reject, requeue=True))
            return True

    def maybe_expire(self) -> bool:
        """Whether its deadline passed before it began. Of one that began in time, the claim decides on what comes up later."""
        attempt = self._attempt()
        if attempt is None:
            return bool(super().maybe_expire())  # type: ignore[misc]
        try:
            return datetime.now(self.expires.tzinfo) > self.expires and attempt.settle_unclaimed(State.EXPIRED)
        except ResponseError:  # its entry cannot be read: the claim sets it aside
            return False

    def _announce_revoked(self, reason: str, terminated: bool, signum: Any, expired: bool) -> None:
        """End a job that expired, was revoked before it started, or was terminated while it ran."""
        self._outcome = State.EXPIRED
        super()._announce_revoked(reason, terminated, signum, expired)  # type: ignore[misc]
        if attempt := self._attempt():
            self.life.soon(
                lambda: attempt.settle_unclaimed(State.EXPIRED) or attempt.settle(State.CLAIMED, State.EXPIRED, how=reason)
            )

    def cancel(self, pool: Any, signal: Any = None, emit_retry: bool = True) -> None:
        """Put the job back before a cold shutdown cuts it off; this does not count as a failed attempt."""
        if self._attempt() is None:
            super().cancel(pool, signal, emit_retry)  # type: ignore[misc]
            return
        with suppress(PoolUnavailable):  # then the worker's presence expires, and the job is taken over as a lost one
            self._release()
        self._stop(pool, signal)

    def give_back(self) -> bool:
        """Put the job back at the head of its queue, uncounted, and stop it; False if it does not run here, or no longer does."""
        if not self._release():
            return False
        self._stop(self.life.consumer.pool)
        return True

    def _release(self) -> bool:
        attempt = self._attempt()
        if attempt is None or not attempt.release():
            return False
        self.acknowledged = True  # the delivery is no longer this worker's
        return True

    def _stop(self, pool: Any, signal: Any = None) -> None:
        task_ready(self)
        self._already_cancelled = True
        with suppress(NotImplementedError):  # solo and threads: the running task cannot be stopped, but no longer counts
            pool.terminate_job(self.worker_pid, signal or SIGTERM)

    def _dealt_with(
        self,
        attempt: Attempt,
        follows: Callable[[Policy, Job], Move | None],
        how: str,
        error: BaseException,
        again: Callable[[], object],
    ) -> bool:
        """Whether nothing is left for Celery to do. If the ledger does not answer, nothing is, and ``again`` is called later."""
        task_ready(self)
        try:
            outcome = attempt.end(follows, how, repr(error))
            if outcome is Outcome.RELEASED and not self.acknowledged:
                # The child died before it could claim. It counts as a start: else a job that kills at once would never end.
                answer = attempt.claim(str)
                if answer is Claim.POISON:
                    return False  # final: Celery stores the failure and acknowledges
                if answer is Claim.RUN:
                    outcome = attempt.end(follows, how, repr(error))
        except (PoolUnavailable, RedisError) as unavailable:
            logger.warning("undecided task_id=%s, asked again in %.0f s: %s", self.id, RETRY_SECONDS, unavailable)
            self.life.call_later(RETRY_SECONDS, again)
            return True
        if outcome is Outcome.FINAL:
            return False
        self._drop()
        return True

    def _drop(self) -> None:
        """Acknowledge this delivery and leave the job's entry alone: even where it still names this attempt, as when the message
        was put back, its outcome is up to another delivery.
        """
        super().acknowledge()  # type: ignore[misc]
        self.life.look_for_work()

    def _attempt(self) -> Attempt | None:
        message = self._message
        headers, tag = message.headers, message.delivery_tag
        may_move = getattr(self.task, "fallback_on_loss", True)
        scheduled = bool(headers.get("eta"))
        return self.life.attempt(self.id, headers, tag, headers.get("retries"), may_move=may_move, scheduled=scheduled)

    if TYPE_CHECKING:  # what Celery's Request brings
        id: str
        task: Any
        expires: datetime
        worker_pid: int
        acknowledged: bool
        send_event: Callable[..., None]
        _message: Any
        _already_cancelled: bool
        _already_revoked: bool
