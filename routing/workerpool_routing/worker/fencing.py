"""Tasks and requests that act only while the ledger says that their attempt counts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from billiard.einfo import ExceptionInfo, ExceptionWithTraceback
from billiard.exceptions import TimeLimitExceeded, WorkerLostError
from celery import Task, states
from celery.exceptions import Ignore, Reject, Retry
from celery.utils.imports import symbol_by_name
from celery.worker import state as worker_state
from celery.worker.state import task_ready
from redis import RedisError

from workerpool_routing import ledger
from workerpool_routing.errors import JobLost, PoolUnavailable
from workerpool_routing.ledger import Claim, Job, Move, State
from workerpool_routing.wire import Policy
from workerpool_routing.worker.attempt import Attempt, Outcome, WorkerLife

logger = logging.getLogger("workerpool_routing.worker")

RETRY_SECONDS = 2.0
"""How soon the main process asks again when the ledger did not answer; the worker works on meanwhile."""

_ENTERED = "workerpool_entered"
"""Set on a request whose attempt has been claimed: a task may call itself."""


def fence(task: Task, child: WorkerLife, main: WorkerLife) -> None:
    """Put the fence around a registered task, whatever base class its author gave it; Celery's own tasks are left alone.

    Args:
        task: the task.
        child: this worker's life as the pool's children act in it.
        main: the same for the main process.
    """
    if task.name.startswith("celery.") or isinstance(task, FencedTask):
        return
    own_request = symbol_by_name(task.Request)
    request = type("FencedRequest", (FencedRequest, own_request), {"life": main})
    own = type(task)
    task.__class__ = type(own.__name__, (FencedTask, own), {"__module__": own.__module__, "life": child, "Request": request})
    task.acks_late = True


@contextmanager
def _back_to_the_queue_without_redis() -> Iterator[None]:
    """While the ledger cannot be asked, nothing is decided: the message is to be delivered again."""
    try:
        yield
    except PoolUnavailable as unavailable:
        raise Reject(str(unavailable), requeue=True) from unavailable


class FencedTask(Task):
    """Runs in the pool's child: claims before the author's code, commits after it, and falls back when it raises."""

    abstract = True
    life: WorkerLife

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        attempt = None if getattr(self.request, _ENTERED, False) else self._attempt()
        if attempt is None:
            return super().__call__(*args, **kwargs)
        setattr(self.request, _ENTERED, True)
        with _back_to_the_queue_without_redis():
            answer = attempt.claim(lambda: self._result_stored(attempt.task_id))
        match answer:
            case Claim.RUN:
                return self._run(attempt, *args, **kwargs)
            case Claim.UNKNOWN:
                return super().__call__(*args, **kwargs)
            case Claim.POISON:
                raise JobLost(f"the workers that ran {self.name} on tier {self.life.tier} were lost each time; not run again")
            case _:
                raise self._dropped(attempt, f"its delivery is {answer}")

    def _run(self, attempt: Attempt, *args: Any, **kwargs: Any) -> Any:
        try:
            result = super().__call__(*args, **kwargs)
        except (Retry, Reject) as asked:
            again = isinstance(asked, Retry) or asked.requeue
            self._close(State.CLAIMED, State.ADMITTED if again else State.FAILED)
            raise
        except Ignore:
            self._close(State.CLAIMED, State.DONE)
            raise
        except Exception as error:
            with _back_to_the_queue_without_redis():
                outcome = attempt.end(ledger.after_failure)
            if outcome is Outcome.FINAL:
                raise
            if outcome is Outcome.RELEASED:
                raise Reject(str(error), requeue=True) from error
            raise self._dropped(attempt, f"it raised {error!r}: {outcome.value}") from error
        with _back_to_the_queue_without_redis():
            counts = attempt.settle(State.CLAIMED, State.FINISHING)
        if not counts:
            raise self._dropped(attempt, "it was taken over")
        return result

    def _result_stored(self, task_id: str) -> bool:
        try:
            return bool(self.backend.get_state(task_id) == states.SUCCESS)
        except NotImplementedError:  # the app keeps no results
            return False

    def _dropped(self, attempt: Attempt, why: str) -> Ignore:
        logger.warning("dropped task_id=%s task=%s attempt=%d: %s", attempt.task_id, self.name, attempt.number, why)
        return Ignore(why)

    def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
        """Close the ledger entry: Celery has stored the result."""
        self._close(State.FINISHING, State.DONE)
        super().on_success(retval, task_id, args, kwargs)

    def on_failure(self, exc: Exception, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        """Close the ledger entry: Celery has stored the failure."""
        self._close(State.CLAIMED, State.FAILED)
        super().on_failure(exc, task_id, args, kwargs, einfo)

    def _close(self, before: State, after: State) -> None:
        attempt = self._attempt()
        try:
            if attempt:
                attempt.settle(before, after)
        except PoolUnavailable as unavailable:
            # What the attempt came to stands in Celery already: an error here would turn it into another outcome.
            logger.warning("not closed task_id=%s task=%s: %s", self.request.id, self.name, unavailable)

    def _attempt(self) -> Attempt | None:
        request = self.request
        if request.called_directly or request.is_eager:
            return None
        tag = (request.properties or {}).get("delivery_tag", "")
        return self.life.attempt(request.id, request.headers, tag, request.retries or 0)


class FencedRequest:
    """Mixed into the task's request class; runs in the worker's main process, which sees the children die."""

    life: WorkerLife

    def on_failure(self, exc_info: ExceptionInfo, send_failed_event: bool = True, return_ok: bool = False) -> Any:
        """Take over from a child that was killed; what the child itself reported is Celery's to handle."""
        error = exc_info.exception
        error = error.exc if isinstance(error, ExceptionWithTraceback) else error
        attempt = None if self._already_cancelled else self._attempt()
        if attempt and isinstance(error, TimeLimitExceeded):
            return None  # on_timeout has dealt with it
        if attempt and isinstance(error, WorkerLostError | SystemExit):
            again = partial(self.on_failure, exc_info, send_failed_event, return_ok)
            if self._dealt_with(attempt, ledger.after_loss, again):
                return None
        return super().on_failure(exc_info, send_failed_event, return_ok)  # type: ignore[misc]

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """Fall back from an attempt that ran over its hard time limit; the child is killed by the pool."""
        attempt = None if soft else self._attempt()
        if attempt and self._dealt_with(attempt, ledger.after_failure, partial(self.on_timeout, soft, timeout)):
            return
        super().on_timeout(soft, timeout)  # type: ignore[misc]
        if attempt:
            self._close(attempt, State.CLAIMED, State.FAILED)

    def revoked(self) -> bool:
        """Close the ledger entry of a job that expired or was revoked before it started."""
        revoked = bool(super().revoked())  # type: ignore[misc]
        if revoked and (attempt := self._attempt()):
            self._close(attempt, State.ADMITTED, State.EXPIRED, tag="")
        return revoked

    def _dealt_with(self, attempt: Attempt, follows: Callable[[Policy, Job], Move | None], again: Callable[[], object]) -> bool:
        """Whether nothing is left for Celery to do; without the ledger the question is asked again later."""
        task_ready(self)
        try:
            outcome = attempt.end(follows)
        except (PoolUnavailable, RedisError) as unavailable:
            logger.warning("undecided task_id=%s, asked again in %.0f s: %s", self.id, RETRY_SECONDS, unavailable)
            self.life.call_later(RETRY_SECONDS, again)
            return True
        if outcome is Outcome.FINAL:
            return False
        if outcome is not Outcome.RELEASED:
            self.acknowledge()
        elif not worker_state.should_terminate:
            self.reject(requeue=True)  # it had not begun, or had asked for a retry
        return True

    def _close(self, attempt: Attempt, before: State, after: State, *, tag: str | None = None) -> None:
        try:
            attempt.settle(before, after, tag=tag)
        except (PoolUnavailable, RedisError) as unavailable:
            logger.warning("not closed task_id=%s, asked again in %.0f s: %s", self.id, RETRY_SECONDS, unavailable)
            self.life.call_later(RETRY_SECONDS, partial(self._close, attempt, before, after, tag=tag))

    def _attempt(self) -> Attempt | None:
        message = self._message
        retries = int(message.headers.get("retries") or 0)
        return self.life.attempt(self.id, message.headers, message.delivery_tag, retries)

    if TYPE_CHECKING:  # what Celery's Request brings
        id: str
        _message: Any
        _already_cancelled: bool

        def acknowledge(self) -> None: ...
        def reject(self, requeue: bool) -> None: ...
