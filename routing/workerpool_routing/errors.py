"""What the library raises; all of it derives from :class:`WorkerPoolError`."""


class WorkerPoolError(Exception):
    """Something about the pool keeps the call from doing what it says; the message names it and the next step."""


class PoolUnavailable(WorkerPoolError):
    """Redis, which is the broker too, did not answer in time: nothing was queued. Worth trying again."""


class NoAcceleratedTier(WorkerPoolError):
    """A job requires an accelerator and the pool has no tier with one."""


class NotConfigured(WorkerPoolError):
    """The pool's name, broker or environment is unusable; trying again does not help."""


class JobLost(WorkerPoolError):
    """The workers that ran this job were lost each time: it is not run again."""


class TaskExited(WorkerPoolError):
    """The task's own code called ``sys.exit``: a failure like any other."""
