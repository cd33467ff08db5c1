"""The exceptions of the library; all derive from :class:`WorkerPoolError`."""

from __future__ import annotations

from workerpool_routing.decide import Reason


class WorkerPoolError(Exception):
    """The base class; the message names what is wrong, and what to do."""


class PoolUnavailable(WorkerPoolError):
    """Redis did not answer in time, or refuses writes, or no decision can be made. It is worth trying again.

    The job may be queued all the same, if only the answer was lost. With an idempotency key it is safe to try again.
    """


class Overloaded(WorkerPoolError):
    """No tier can start the job before its deadline or within the longest wait that is accepted; nothing was queued.

    Attributes:
        retry_after: after how many seconds it makes sense to try again.
        reason: why, from the closed list.
    """

    def __init__(self, message: str, *, retry_after: int, reason: Reason) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.reason = reason


class NoAcceleratedTier(WorkerPoolError):
    """The job requires an accelerator, and the pool has no tier with one."""


class NotConfigured(WorkerPoolError):
    """The pool's name, broker or environment is not usable; trying again does not help."""


class JobLost(WorkerPoolError):
    """Every worker that ran this job was lost, so it is not run again."""


class TaskExited(WorkerPoolError):
    """The task's code called ``sys.exit``, or raised another error that is no :class:`Exception`: a failure like any other."""
