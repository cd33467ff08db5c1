"""Tasks and requests that act only while the ledger says that their attempt counts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from billiard.einfo import ExceptionInfo, ExceptionWithTraceback
from billiard.exceptions import TimeLimitExceeded, WorkerLostError
from celery import Task, states
from celery.exceptions import Ignore, Reject, Retry
from celery.utils.imports import symbol_by_name
from celery.worker.state import task_ready

from workerpool_routing import ledger
from workerpool_routing.errors import JobLost, PoolUnavailable
from workerpool_routing.ledger import Claim, Job, Move, State
from workerpool_routing.wire import Policy
from workerpool_routing.worker.attempt import Attempt, Outcome, WorkerLife

logger = logging.getLogger("workerpool_routing.worker")


def fence(task: Task, life: WorkerLife) -> None:
    """Put the fence around a registered task, whatever base class its author gave it; Celery's own tasks are left alone."""
    if task.name.startswith("celery.") or isinstance(task, FencedTask):
        return
    own_request = symbol_by_name(task.Request)
    request = type("FencedRequest", (FencedRequest, own_request), {"life": life})
    own = type(task)
    task.__class__ = type(own.__name__, (FencedTask, own), {"__module__": own.__module__, "life": life, "Request": request})
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
        attempt = self._attempt()
        if attempt is None:
            return super().__call__(*args, **kwargs)
        with _back_to_the_queue_without_redis():
            answer = attempt.claim(lambda: self.backend.get_state(attempt.task_id) == states.SUCCESS)
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
        except (Retry, Reject):
            attempt.settle(State.CLAIMED, State.ADMITTED)
            raise
        except Ignore:
            attempt.settle(State.CLAIMED, State.DONE)
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
            # The result is stored: an error here would turn it into another one.
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
        if attempt and isinstance(error, WorkerLostError | SystemExit) and self._dealt_with(attempt, ledger.after_loss):
            return None
        return super().on_failure(exc_info, send_failed_event, return_ok)  # type: ignore[misc]

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """Fall back from an attempt that ran over its hard time limit; the child is killed by the pool."""
        attempt = None if soft else self._attempt()
        if attempt and self._dealt_with(attempt, ledger.after_failure):
            return
        super().on_timeout(soft, timeout)  # type: ignore[misc]
        if attempt:
            attempt.settle(State.CLAIMED, State.FAILED)

    def revoked(self) -> bool:
        """Close the ledger entry of a job that expired or was revoked before it started."""
        revoked = bool(super().revoked())  # type: ignore[misc]
        if revoked and (attempt := self._attempt()):
            attempt.settle(State.ADMITTED, State.EXPIRED, tag="")
        return revoked

    def _dealt_with(self, attempt: Attempt, follows: Callable[[Policy, Job], Move | None]) -> bool:
        outcome = attempt.end(follows)
        if outcome is Outcome.FINAL:
            return False
        task_ready(self)
        if outcome is not Outcome.RELEASED:
            self.acknowledge()
        return True

    def _attempt(self) -> Attempt | None:
        message = self._message
        retries = int(message.headers.get("retries") or 0)
        return self.life.attempt(self.id, message.headers, message.delivery_tag, retries)

    if TYPE_CHECKING:  # what Celery's Request brings
        id: str
        _message: Any
        _already_cancelled: bool

        def acknowledge(self) -> None: ...
