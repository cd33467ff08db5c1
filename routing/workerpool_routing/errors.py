"""What the library raises; all of it derives from :class:`WorkerPoolError`."""

from __future__ import annotations

from workerpool_routing.decide import Reason


class WorkerPoolError(Exception):
    """Something about the pool keeps the call from doing what it says; the message names it and the next step."""


class PoolUnavailable(WorkerPoolError):
    """Redis, which is the broker too, did not answer in time. Worth trying again.

    Nothing was queued, unless Redis decided and its answer was lost on the way; an idempotency key makes trying again safe.
    """


class Overloaded(WorkerPoolError):
    """No tier can start the job before its deadline or the longest wait allowed: nothing was queued.

    Attributes:
        retry_after: whole seconds after which trying again makes sense.
        reason: why, from the closed list.
    """

    def __init__(self, message: str, *, retry_after: int, reason: Reason) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.reason = reason


class NoAcceleratedTier(WorkerPoolError):
    """A job requires an accelerator and the pool has no tier with one."""


class NotConfigured(WorkerPoolError):
    """The pool's name, broker or environment is unusable; trying again does not help."""


class JobLost(WorkerPoolError):
    """The workers that ran this job were lost each time: it is not run again."""


class TaskExited(WorkerPoolError):
    """The task's own code called ``sys.exit``: a failure like any other."""
