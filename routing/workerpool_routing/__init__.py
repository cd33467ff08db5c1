"""What API pods and workers import: admits each job, routes it to a tier, and fences its attempts."""

from workerpool_routing.decide import Reason
from workerpool_routing.decision import Decision
from workerpool_routing.errors import Overloaded, PoolUnavailable
from workerpool_routing.pool import WorkerPool
from workerpool_routing.wire import TierPolicy as Tier

__all__ = ["Decision", "Overloaded", "PoolUnavailable", "Reason", "Tier", "WorkerPool"]
