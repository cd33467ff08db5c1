"""Workers, and a private Redis, as processes of this machine."""

from workerpool_operator.local.workers import LocalWorkers

__all__ = ["LocalWorkers"]
